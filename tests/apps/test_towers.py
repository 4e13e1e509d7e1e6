"""Stage 0 and the facts: their targets and losses, and what their runs leave behind."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from apps import towers, toy
from apps.toy import COLOURS, OBJECTS
from data import CachedFeatures, Tokenizer, frozen_fingerprint, read_index
from hawk import Hawk, HawkConfig

SMALL = dict(
    vit_depth=1, vit_dim=64, vit_mlp=128, qformer_layers=1, qformer_dim=64, qformer_mlp=64, video_layers=1,
    n_queries=10, llama_layers=1, llama_dim=48, llama_mlp=64, llama_heads=2, image_size=56, n_frames=4,
)  # fmt: skip
SETTINGS = [text for name, value in SMALL.items() for text in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of four clips and two held out."""
    folder = tmp_path_factory.mktemp("world")
    toy.main(["--out", str(folder), "--n-train", "4", "--n-test", "2", "--seed", "5"])
    return folder


@pytest.fixture(scope="module")
def weights(world):
    """Random small weights."""
    torch.manual_seed(0)
    config = replace(HawkConfig.preset("tiny"), **SMALL)
    config.vocab_size = Tokenizer(world / "tokenizer.model").vocab_size
    Hawk(config).save_pretrained(world / "weights", tokenizer=world / "tokenizer.model")
    return world / "weights"


def run(task, world, out, *options):
    flags = ["--data", world, "--out", out, "--batch-size", 2, "--workers", 0, "--device", "cpu", *options]
    assert towers.main([task, *map(str, flags)]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# Stage 0


def test_what_each_frame_shows():
    """A car that stands still and then moves, a fire, and a second car, which is parked."""
    car = {"object": "car", "colour": "red", "x": [0.5, 0.5, 0.6, None], "y": [0.2, 0.2, 0.2, None]}
    fire = {"object": "fire", "colour": None, "x": [None, 0.1, 0.1, 0.1], "y": [None, 0.9, 0.9, 0.9]}
    other = {"object": "car", "colour": "blue", "x": [0.9] * 4, "y": [0.9] * 4, "lying": [True] * 4}
    things = towers.things_of_frames([car, fire, other], np.arange(4), image_size=112)
    assert things.shape == (8, towers.MOST_THINGS, 5) and (things[:, 3:] == -1).all()
    kinds = [OBJECTS.index(name) for name in ("car", "fire")]
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    assert things[:, 0, 0].tolist() == [kinds[0]] * 3 + [-1, -1, -1, kinds[0], -1]  # moves from 1 to 2
    assert things[2, 0].tolist() == pytest.approx([kinds[0], 0.6, 0.2, 0, red])
    assert things[:, 1, 0].tolist() == [-1] + [kinds[1]] * 7 and (things[1:, 1, 4] == -1).all()  # flickers
    assert things[:, 2, 0].tolist() == [kinds[0]] * 4 + [-1] * 4 and things[0, 2, 3:].tolist() == [1, blue]
    # both cars together: the largest of each answer
    answers = towers.all_of_a_kind(things, towers.answers_of(things))
    there, lying, places, colours = answers[2, kinds[0]].split(towers.ANSWERS)
    assert (there, lying) == (1, 1) and colours.nonzero().flatten().tolist() == sorted([red, blue])
    assert places[:12].topk(2).indices.sort().values.tolist() == [7, 10]  # 0.6 and 0.9 of eleven
    assert not answers[3, OBJECTS.index("bus")].any() and answers[1, kinds[1], -len(COLOURS) :].sum() == 0


@pytest.mark.parametrize(
    "change", [{"object": "tree"}, {"colour": "pink"}, {"x": [0.5]}, {"y": ["a", 0.1]}, {"lying": [True]}]
)
def test_objects_that_no_toy_world_has(change):
    entry = {"object": "car", "colour": "red", "x": [0.5, None], "y": [0.5, None]}
    towers.check_object(entry, "v.mp4")
    with pytest.raises(ValueError, match="v.mp4: each entry of"):
        towers.check_object(entry | change, "v.mp4")


def test_place_cells_peak_at_the_object():
    cells = towers.place_cells(torch.tensor([[4 / 11, 10 / 23], [0.0, 1.0]]))
    columns, rows = cells.split(towers.PLACE_CELLS, dim=-1)
    assert columns.argmax(-1).tolist() == [4, 0] and rows.argmax(-1).tolist() == [10, 23]
    assert columns.amax() == pytest.approx(1) and columns[0, 5] == pytest.approx(columns[0, 3])
    assert columns[0, 8] < 1e-6


def test_perfect_answers_cost_nothing():
    things = torch.full((1, 3, 5), -1.0)
    things[0, 0] = torch.tensor([2, 0.3, 0.7, 1, 1])
    targets = towers.all_of_a_kind(things, towers.answers_of(things))
    answers = 80 * (targets - 0.5)
    answers[..., 2:38] = targets[..., 2:38]
    losses = towers.answer_losses(answers, targets)
    assert all(loss < 1e-6 for loss in losses.values()), losses
    answers[0, 2, 38 + 1] = -80
    assert towers.answer_losses(answers, targets)["colour"] > 10
    things[0, 1] = torch.tensor([2, 0.3, 0.7, 1, 3])  # another, of another colour: both are right
    both = towers.all_of_a_kind(things, towers.answers_of(things))
    answers[0, 2, 38:] = 80 * (both[0, 2, 38:] - 0.5)
    assert towers.answer_losses(answers, both)["colour"] == pytest.approx(np.log(2), rel=1e-4)


def test_drawn_clips_need_no_video(tmp_path):
    """Rows without videos give the samples of rows with them, but for the codec."""
    flags = ["--n-train", "2", "--seed", "5"]
    toy.main(["--out", str(tmp_path / "drawn"), *flags, "--no-videos"])
    toy.main(["--out", str(tmp_path / "filmed"), *flags])
    assert not list((tmp_path / "drawn/videos").iterdir())
    drawn, filmed = (read_index(tmp_path / name / "train.jsonl") for name in ("drawn", "filmed"))
    assert drawn[1]["drawn"] == [5, "train", 1, [0, 6]] and "drawn" not in filmed[1]
    assert drawn[1]["video"].endswith(
        "drawn/train_000001_seed5_clutter0-6"
    )  # a cache is of these clips alone
    tokenizer = Tokenizer(tmp_path / "drawn/tokenizer.model")
    config = HawkConfig.preset("tiny")
    one, other = (towers.FrameDataset(rows, tokenizer, config)[1] for rows in (drawn, filmed))
    short = towers.FrameDataset(drawn, tokenizer, replace(config, n_frames=40))[1]  # clips have 32
    assert short["error"].endswith("has fewer than 40 frames")
    for name in ("things", "input_ids"):
        assert torch.equal(one[name], other[name])
    appearance, motion = (one["streams"]["both"].float() - other["streams"]["both"]).split(8)
    assert appearance.abs().mean() < 5
    assert ((motion.abs() > 30).float().mean()) < 0.03  # most of the masks is the same


def test_features_of_drawn_clips(weights, tmp_path):
    """The cache holds what the model makes of the drawn frames, in bfloat16."""
    toy.main(["--out", str(tmp_path), "--n-train", "2", "--seed", "5", "--no-videos"])
    paths = ["--weights", str(weights), "--data", str(tmp_path), "--out", str(tmp_path / "features")]
    assert towers.main(["features", *paths, "--workers", "0"]) == 0
    model = Hawk.from_pretrained(weights)
    rows = read_index(tmp_path / "train.jsonl")
    cached = CachedFeatures(tmp_path / "features/train", rows, model.config, frozen_fingerprint(model))
    streams, clip = towers.DrawnFeatures(rows, None, model.config).read(1, "uniform", None)
    with torch.no_grad():
        features = model.frame_features({name: x[None] / 255 for name, x in streams.items()})
    found = cached.load(1, 0)
    assert found.message == clip.message and "4 frames" in clip.message
    for name, x in features.items():
        assert (found.streams[name] - x[0]).abs().mean() < 0.02 * x.std()
    assert towers.main(["features", *paths[:2], "--data", str(tmp_path / "no"), *paths[4:]]) == 2


def test_stage_0_teaches_one_q_former_and_copies_it(world, tmp_path):
    branches = ["--set", "branches=appearance,motion,third"]
    lines = run("towers", world, tmp_path, "--preset", "tiny", "--steps", 2, *SETTINGS, *branches)
    names = {"presence", "position", "lying", "colour", "patches", "pointing", "language"}
    assert names | {"held_out_total"} <= lines[-1].keys() and "video_language" not in lines[-1]
    assert lines[0]["total"] == pytest.approx(sum(lines[0][name] for name in names), rel=1e-5)
    model = Hawk.from_pretrained(tmp_path / "last")
    for name in ("motion", "third"):
        for part in ("ln_vision", "qformer"):
            learned = getattr(model.appearance, part).state_dict()
            copied = getattr(model.branch(name), part).state_dict()
            assert all(torch.equal(learned[key], copied[key]) for key in learned)
        assert torch.equal(model.appearance.queries, model.branch(name).queries)
        assert not torch.equal(model.appearance.video_queries, model.branch(name).video_queries)


def test_stage_0_resumes_with_its_heads(world, tmp_path):
    """Which are in no folder of weights."""
    flags = ["--preset", "tiny", *SETTINGS, "--eval-every", 100]
    whole = run("towers", world, tmp_path / "whole", "--steps", 3, *flags)
    best = Hawk.from_pretrained(tmp_path / "whole/best")
    assert torch.equal(
        best.appearance.queries, best.motion.queries
    )  # the best checkpoint has the copies, too
    step = train.train_step

    def step_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
        return step(*arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step_and_stop)
        assert len(run("towers", world, tmp_path / "parts", "--steps", 3, *flags)) == 1
    signal.signal(signal.SIGTERM, handler)
    resumed = run("towers", world, tmp_path / "parts", "--steps", 3, *flags, "--resume")
    assert [line["total"] for line in resumed] == [line["total"] for line in whole]
    heads = torch.load(tmp_path / "whole/last/state.pt", weights_only=True)["objective"]
    assert "query_head.weight" in heads and not [name for name in heads if name.startswith("hawk.")]


# ------------------------------------------------------------------------------------------------------------
# Facts


def test_facts_alone_teach_what_they_reach(world, weights, tmp_path):
    lines = run(
        "facts", world, tmp_path, "--weights", weights, "--train", "all", "--steps", 2, "--facts-only"
    )
    assert {*towers.FACTS, "total"} <= lines[-1].keys() and "video_language" not in lines[-1]
    assert lines[0]["total"] == pytest.approx(sum(lines[0][fact] for fact in towers.FACTS), rel=1e-5)
    before = Hawk.from_pretrained(weights).state_dict()
    after = Hawk.from_pretrained(tmp_path / "last").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"motion.video_queries", "appearance.decoder_2.weight", "vit.cls_token"} <= changed
    assert not [name for name in changed if name.startswith("llama.") or ".encoder_1." in name]


def test_facts_alone_teach_no_lora(world, weights, tmp_path, capsys):
    flags = ["--data", world, "--out", tmp_path, "--weights", weights, "--train", "lora", "--steps", 1]
    assert towers.main(["facts", *map(str, flags), "--facts-only"]) == 2
    assert capsys.readouterr().err == "error: --facts-only reaches no LoRA: use --train paper\n"


def test_facts_beside_words(world, weights, tmp_path):
    options = ["--weights", weights, "--stage", 2, "--steps", 1, "--ask-facts", 0.5]
    [line] = run("facts", world, tmp_path, *options)
    hawk = line["video_language"] + 0.1 * line["motion_language"] + 0.1 * line["consistency"]
    assert line["total"] == pytest.approx(hawk + 0.5 * sum(line[fact] for fact in towers.FACTS), rel=1e-5)


def test_unknown_words_are_not_asked():
    """A held-out row may have a word that no training row has; a row without the fields is refused."""
    rows = [dict.fromkeys(towers.FACTS, "a") | {"video": "v.mp4"}, dict.fromkeys(towers.FACTS, "b")]
    dataset = SimpleNamespace(rows=rows)
    words = dict.fromkeys(towers.FACTS, ["a", "c"])
    assert towers.WithFacts(dataset, words).facts == [[0] * 6, [-100] * 6]
    model = Hawk(replace(HawkConfig.preset("tiny"), **SMALL))  # a batch without a single known word
    streams = {name: torch.zeros(2, 2, 10, 64) for name in model.config.branches}
    losses = towers.ClipFacts(model, words, 1.0, alone=True)(streams, torch.full((2, 6), -100))
    assert all(loss == 0 for loss in losses.values())  # not NaN, of which no mean could be made
    dataset.rows = [{"video": "v.mp4", "kind": "normal"}]
    with pytest.raises(ValueError, match="v.mp4: its row lacks object, colour, place, moment, scene"):
        towers.WithFacts(dataset, words)


@pytest.mark.parametrize(
    ("task", "lacking"), [("towers", '"objects", "description" or "qa"'), ("facts", "kind, object")]
)
def test_other_data_is_refused_in_one_line(world, weights, tmp_path, capsys, task, lacking):
    row = {"video": str(world / "videos/x.mp4"), "description": "A car."}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--weights", weights, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 1]
    assert towers.main([task, *map(str, flags)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error:") and lacking in said and said.count("\n") == 1
