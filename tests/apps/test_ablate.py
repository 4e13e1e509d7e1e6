"""The ablation: what is run and what is shared, resuming, the tables; and one run of it with real
training."""

import json
import os
import re
import shutil
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prepare
from apps import ablate
from apps.scores import kind_scores
from data import CachedFeatures, frozen_fingerprint, read_clip, read_index
from hawk import Hawk, read_chain

ROOT = Path(__file__).resolve().parents[2]
CAR = {"kind": "wrong_way", "object": "car", "place": "near lane", "motion": "car drives"}
DOG = {"kind": "normal", "object": "dog", "place": "road", "motion": "nothing happens"}
TEXTS = [
    ("a b.mp4", CAR, "A red car drives the wrong way in the near lane.", "It is a car."),
    ("c.mp4", DOG, "Nothing unusual happens on the road.", "It is a dog."),
]


@pytest.fixture(scope="module")
def world(world):
    """The folder of weights and clips, with an index of them, as the toy world has it, and their cache."""
    rows = []
    for video, facts, description, answer in TEXTS:
        row = {"video": video, "description": description, "qa": [{"q": "What is it?", "a": answer}]}
        rows.append(row | facts | {"colour": "red", "moment": "throughout the clip", "scene": "a park road"})
    for split in ("train", "test"):
        (world / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "examples" / "kinds.json", world)
    command = ["features", "--weights", world / "weights", "--data", world, "--out", world / "features"]
    prepare.main([*map(str, command), "--device", "cpu", "--dtype", "float32", "--workers", "0"])
    return world


def options(world, out, *more):
    paths = ["--weights", world / "weights", "--features", world / "features", "--data", world, "--out", out]
    sizes = ["--dtype", "float32", "--batch-size", "2", "2", "1", "--limit", "2"]
    return [*map(str, paths), *sizes, *more]


def value_of(command, option):
    return command[command.index(option) + 1]


class Launches:
    """Stands in for `launch`: remembers the commands, leaves the files behind that they would write."""

    def __init__(self, fail_at=None, part=1):
        self.commands = []
        self.part = part  # of the steps, after which a run of training is told to stop
        self.fail_at = fail_at

    def __call__(self, log, *command, threads):
        command = [str(x) for x in command]
        if len(self.commands) == self.fail_at:
            raise ValueError("stopped")
        self.commands.append(command)
        out = Path(value_of(command, "--out"))
        alone = "without-motion/" in str(out)
        if "apps.toy" in command:
            out.mkdir()
            (out / "test.jsonl").touch()
        elif "apps.towers" in command:
            (out / "last").mkdir(parents=True)
            step = int(value_of(command, "--steps")) // self.part
            line = {"step": step, "bias_cosine": None if alone else 0.5, "held_out_video_language": 1.0}
            (out / "log.jsonl").write_text(json.dumps(line) + "\n")
        else:
            clutter = int(re.search(r"clutter-(\d)", str(out))[1])
            right = (4 if alone else 9) + int(re.search(r"seed(\d)", str(out))[1]) - clutter
            kinds = {"normal": [10, 10], "speeding": [right, 20], "fire": [5, 10]}
            scores = {"kinds": {"kinds": kinds}, "facts": {fact: [3, 4] for fact in ablate.FACTS}}
            scores["bleu"] = {"describe": {"all": {"bleu": [0.4, 0.3, 0.2, 0.1]}}}
            Path(f"{out}.scores.json").write_text(json.dumps(scores))


def test_variants_differ_in_what_they_should(world, tmp_path, monkeypatch, capsys):
    launches = Launches()
    monkeypatch.setattr(ablate, "launch", launches)
    sizes = ["--seeds", "2", "--jobs", "3", "--steps", "30", "5", "6", "--clutter", "0", "3"]
    chosen = [*sizes, "--frames", "4", "2", "--variants", *ablate.VARIANTS]
    assert ablate.main(options(world, tmp_path, *chosen)) == 0
    made = [command for command in launches.commands if "apps.toy" in command]
    trained = [command for command in launches.commands if "apps.towers" in command]
    assert [value_of(command, "--clutter") for command in made] == ["0", "3"]
    assert len({(value_of(command, "--seed"), value_of(command, "--n-test")) for command in made}) == 1
    n = len(ablate.VARIANTS)
    assert len(trained) == 2 * 2 * (3 + n * 2) and len(launches.commands) == 2 + len(trained) + 2 * 2 * n * 2
    plain = (
        set()
    )  # the commands without what may differ: all of a step, seed and number of frames are the same
    for command in trained:
        settings = {command[i + 1] for i, word in enumerate(command) if word == "--set"}
        folder = value_of(command, "--out")
        one_branch = "without-motion/" in folder or "motion-alone/" in folder
        frames = re.search(r"frames(\d)", folder)[1]
        assert ("consistency=debiased" in settings) == ("debiased" in folder)
        neither = "without-motion/" in folder or "without-both-losses/" in folder
        no_consistency = neither or "motion-alone/" in folder or "without-consistency/" in folder
        assert ("consistency_weight=0" in settings) == no_consistency
        assert ("motion_language_weight=0" in settings) == (neither or "-motion-language/" in folder)
        assert (value_of(command, "--train") == "lora") == ("lora_rank=16" in settings) == ("LoRA/" in folder)
        start = value_of(command, "--weights")
        if "--facts-only" in command:
            branches = re.search(r"branches-(\w+)", folder)[1]
            assert start == str(tmp_path / f"towers-{branches}-{frames}")
        if folder.endswith("captions"):
            branches = "appearance" if "without-motion/" in folder else "motion" if one_branch else "all"
            assert f"/frames{frames}-seed{command[command.index('--seed') + 1]}/" in start
            assert f"/branches-{branches}/facts/last" in start
        paths = {"--out", "--weights", "--set", "--train"}
        plain.add(" ".join(word for i, word in enumerate(command) if not {word, command[i - 1]} & paths))
    assert len(plain) == 2 * 2 * 3
    sizes = {re.search(r"--steps (\d+) .*--batch-size (\d+)", command).groups() for command in plain}
    assert sizes == {("30", "2"), ("5", "2"), ("6", "1")}

    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    clutter, variants, kinds = printed.split("\n\n")
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in clutter.splitlines())
    assert [row[:3] for row in rows[:2]] == [["4", "full", "0"], ["4", "full", "3"]]
    assert len(rows) == 2 * n * 2
    named = dict(zip(head, next(row for row in rows if row[:3] == ["2", "without motion", "3"]), strict=True))
    assert named["motion-only kinds"] == "0.125 ± 0.035" and named["others"] == "0.750 ± 0.000"
    assert named["kinds"] == f"{17.5 / 40:.3f} ± {statistics.stdev([17 / 40, 18 / 40]):.3f}"
    assert named["BLEU-4"] == "0.100 ± 0.000" and named["object"] == "0.750 ± 0.000"
    assert "| 2 | without motion | 2 | 1.000 ± 0.000 | – |" in variants
    assert "| 2 | full | 2 | 1.000 ± 0.000 | 0.500 ± 0.000 |" in variants
    assert "| speeding † | 36/80 | 16/80 |" in kinds and "| fire | 20/40 |" in kinds
    assert (tmp_path / "ablation.png").stat().st_size > 5000


def about_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def test_fewer_frames_of_the_same_clips(world, tmp_path, monkeypatch):
    """Their cache holds evenly chosen features, and their towers begin from the same numbers."""
    monkeypatch.setattr(ablate, "launch", Launches())
    assert ablate.main(options(world, tmp_path, "--frames", "2", "--seeds", "1", "--clutter", "0")) == 0
    rows = read_index(world / "train.jsonl")
    caches, models = [], []
    for weights, features in (
        (world / "weights", world / "features"),
        (tmp_path / "towers-all-2", tmp_path / "features-2"),
    ):
        models.append(Hawk.from_pretrained(weights))
        given = (features / "train", rows, models[-1].config, frozen_fingerprint(models[-1]))
        caches.append(CachedFeatures(*given).load(0, 0))
    many, few = caches
    n = models[0].config.n_frames // 2
    for name in ("appearance", "motion"):
        assert torch.equal(few.streams[name], many.streams[name][::n])
    assert few.message == read_clip(rows[0]["video"], 2, 56).message
    file = world / "features" / "train" / "0.safetensors"  # older caches have their texts apart
    old = tmp_path / "old.safetensors"
    save_file(load_file(file), old, about_of(file))
    old.write_bytes(ablate.fewer_frames(old, n))
    assert about_of(old) == about_of(tmp_path / "features-2" / "train" / "0.safetensors")
    assert few.indices.tolist() == read_clip(rows[0]["video"], 2, 56).indices.tolist()
    weight = [model.appearance.frame_position.weight for model in models]
    assert torch.equal(weight[1], weight[0][:2])
    with pytest.raises(ValueError, match="--frames 3 does not divide"):
        ablate.cache(SimpleNamespace(features=world / "features", out=tmp_path), 3)


def test_it_resumes_where_it_stopped(world, tmp_path, monkeypatch, capsys):
    """Stopped before each launch in turn: what was done is not done again, and the table is that of an
    undisturbed run."""
    chosen = ["--seeds", "1", "--jobs", "1", "--variants", "full", "without motion", "--frames", "4"]
    chosen += ["--clutter", "1"]
    whole = Launches()
    monkeypatch.setattr(ablate, "launch", whole)
    assert ablate.main(options(world, tmp_path / "whole", *chosen)) == 0
    table = capsys.readouterr().out
    done = []
    for _ in whole.commands:
        launches = Launches(fail_at=1)
        monkeypatch.setattr(ablate, "launch", launches)
        status = ablate.main(options(world, tmp_path / "stopped", *chosen))
        done += launches.commands
        assert status == (0 if len(done) == len(whole.commands) else 2)
    steps = []
    for folder, commands in (("whole", whole.commands), ("stopped", done)):
        written = [value_of(command, "--out") for command in commands]
        steps.append([out.removeprefix(str(tmp_path / folder)) for out in written])
    assert steps[0] == steps[1] and len(set(steps[0])) == len(steps[0]) == 9
    assert capsys.readouterr().out == table
    results = tmp_path / "stopped" / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])  # killed while writing the last line: scored again
    launches = Launches()
    monkeypatch.setattr(ablate, "launch", launches)
    assert ablate.main(options(world, tmp_path / "stopped", *chosen)) == 0
    assert capsys.readouterr().out == table
    assert [command[:2] for command in launches.commands] == [["-m", "apps.evaluate"]]


def test_a_step_that_was_told_to_stop_is_not_done(world, tmp_path, monkeypatch, capfd):
    """A scheduler's SIGTERM ends training with status 0."""
    chosen = ["--seeds", "1", "--jobs", "1", "--variants", "full", "--frames", "4", "--clutter", "1"]
    monkeypatch.setattr(ablate, "launch", Launches(part=2))
    assert ablate.main(options(world, tmp_path, *chosen)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"^error: .*facts: stopped after \d+ of \d+ steps; start again", error)
    shutil.rmtree(next(tmp_path.glob("**/facts/last")))
    launches = Launches()
    monkeypatch.setattr(ablate, "launch", launches)
    assert ablate.main(options(world, tmp_path, *chosen)) == 0
    assert "--facts-only" in launches.commands[0]


def test_what_runs_ends_when_it_is_stopped(world, tmp_path, monkeypatch):
    """By ctrl-C or a scheduler's signal, here while the first of two runs trains."""

    def stop(*_):
        raise KeyboardInterrupt

    def facts(args, run):
        if run.seed == 1:
            return launch(tmp_path / "log.txt", "-c", "import time; time.sleep(60)", threads=1)
        while not ablate.running:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    launch = ablate.launch
    monkeypatch.setattr(ablate, "launch", Launches())  # of held-out clips
    monkeypatch.setattr(ablate, "facts", facts)
    chosen = ["--seeds", "2", "--jobs", "2", "--variants", "full", "--frames", "4", "--clutter", "1"]
    handler = signal.signal(signal.SIGUSR1, stop)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            ablate.main(options(world, tmp_path, *chosen))
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert time.monotonic() - began < 50 and not ablate.running and not ablate.stopping


def test_other_options_do_not_share_a_table(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ablate, "launch", Launches())
    chosen = ["--seeds", "1", "--variants", "full", "--frames", "4"]
    assert ablate.main(options(world, tmp_path, *chosen)) == 0
    assert ablate.main(options(world, tmp_path, *chosen, "--steps", "1", "2", "3")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "another steps" in error
    nowhere = ["--weights", str(tmp_path / "nowhere")]
    assert ablate.main(options(world, tmp_path / "other", *chosen, *nowhere)) == 2
    assert "nowhere" in capfd.readouterr().err.splitlines()[-1]


def test_a_real_run(world, tmp_path, capfd):
    """Two steps of everything, without motion: apps.towers and apps.evaluate write what the table needs."""
    chosen = ["--seeds", "1", "--variants", "without motion", "--jobs", "1", "--steps", "2", "2", "2"]
    chosen += ["--frames", "2", "--clutter", "1"]
    assert ablate.main(options(world, tmp_path, *chosen)) == 0, capfd.readouterr().err
    assert "| 2 | without motion | 1 |" in capfd.readouterr().out
    run = tmp_path / "frames2-seed1" / "without-motion"
    config = read_chain(run / "questions" / "last")[0]
    assert config.branches == ("appearance",) and config.n_frames == 2
    assert config.motion_language_weight == config.consistency_weight == 0
    result = json.loads((tmp_path / "results.jsonl").read_text())
    predictions = [json.loads(line) for line in (run / "clutter-1.jsonl").read_text().splitlines()]
    kinds = json.loads((world / "kinds.json").read_text())
    assert (
        len(predictions) == 2 and result["clutter"]["1"]["kinds"] == kind_scores(predictions, kinds)["kinds"]
    )
    assert result["held_out_loss"] > 0 and result["bias_cosine"] is None


def test_a_step_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"log\.txt: `-c` ended with status 1: error: no towers$"):
        ablate.launch(
            tmp_path / "log.txt", "-c", "print('working'); raise SystemExit('error: no towers')", threads=1
        )
    ablate.launch(
        tmp_path / "log.txt", "-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '3'", threads=3
    )
