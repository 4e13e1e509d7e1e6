"""The released recipe of both stages, as the README's commands give it, and steps that go wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import prepare
import sample
import train
from data import (
    DESCRIBE_QUESTIONS,
    Clip,
    HawkDataset,
    Tokenizer,
    clip_generator,
    collate,
    read_index,
    settings,
)
from hawk import Hawk, HawkConfig, LlamaBlock

ROOT = Path(__file__).parents[1]
QA = [{"q": "Who is it?", "a": "A red car."}, {"q": "Why?", "a": "It is a dog."}]
CAPTION = "A red car drives the wrong way in the near lane."
ROW = {"description": CAPTION, "motion": "red car drives", "qa": QA}
CPU = torch.device("cpu")


def parse(*flags):
    return train.parse_args([*map(str, flags), "--recipe", "released"], train.HawkTask())


@pytest.fixture(scope="module")
def recipe():
    """stage -> the options of the README's command for it."""
    block = (ROOT / "README.md").read_text().split("## The recipe")[1].split("```")[1]
    common, *commands = block.strip().splitlines()
    common = common.strip('"').split("train.py")[1]
    parsed = [parse(*common.split(), *command.removeprefix("$run").split()) for command in commands]
    return {args.stage: args for args in parsed}


def index(folder, *videos):
    """train.jsonl and test.jsonl with ROW for each video."""
    rows = [json.dumps(ROW | {"video": str(video)}) + "\n" for video in videos]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(rows))


# ------------------------------------------------------------------------------------------------------------
# The recipe


def test_schedule(recipe):
    """1e-6 to 1e-5 over 1000 steps, cosine to 1e-6 over 160 epochs of 2500; a clip on each of 4 GPUs."""
    assert sorted(recipe) == [1, 2] and "runs/stage1/last" in recipe[2].weights  # which starts from the first
    for args in recipe.values():
        assert (args.steps, args.batch_size, args.accumulate, args.clip) == (160 * 2500, 4, 1, 0.0)
        assert args.train == "paper" and args.dtype is None and args.augment
        for step in (0, 1, 250, 999):
            assert train.learning_rate(step, args) == pytest.approx(1e-6 + 9e-6 * step / 1000, rel=1e-12)
        for step in (1000, 2500, 100_000, 200_000, 399_999):
            cosine = 0.5 * (1 + math.cos(math.pi * step / 400_000))
            assert train.learning_rate(step, args) == pytest.approx(1e-6 + 9e-6 * cosine, rel=1e-12)
        assert train.learning_rate(200_000, args) == pytest.approx(5.5e-6)
        assert train.learning_rate(400_000, args) == pytest.approx(1e-6)


def test_optimizer_and_losses(recipe):
    c = HawkConfig.preset("7b")
    assert (c.video_language_weight, c.motion_language_weight, c.consistency_weight) == (1.0, 0.1, 0.1)
    assert (c.consistency, c.motion_mask, c.n_frames, c.dropout) == ("cosine", "hard", 32, 0.1)
    model = Hawk(HawkConfig.preset("tiny"))
    model.set_trainable(recipe[2].train)
    names = {p: name for name, p in model.named_parameters()}
    decayed, plain = train.make_optimizer(model, recipe[2]).param_groups
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
    assert decayed["betas"] == plain["betas"] == (0.9, 0.999) and decayed["eps"] == 1e-8
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[p] for group in (decayed, plain) for p in group["params"]} == trained
    flat = {names[p] for p in plain["params"]}  # biases and norms; queries and frame positions decay
    assert flat == {name for name in trained if re.search(r"\.(bias|norm\.weight)$", name)}
    assert {"motion.video_queries", "appearance.frame_position.weight"} <= {
        names[p] for p in decayed["params"]
    }


# ------------------------------------------------------------------------------------------------------------
# Samples


@pytest.fixture
def samples(recipe, world, monkeypatch):
    """stage -> (training set of the README's command over one row, how its clips were read). Both streams
    show the same."""
    reads = []

    def read_clip(path, n_frames, image_size, branches, motion_mask, sampling, generator, fps, device):
        assert (device, fps) == ("cpu", 25)  # as for every loader process
        reads.append((sampling, motion_mask))
        indices = data.sample_frames(40, n_frames, sampling, generator)
        shape = (40, image_size, image_size, 3)
        frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)[indices]
        streams = {name: frames.copy() for name in branches}
        return Clip(streams, [], "The video contains 4 frames. ", indices)

    def make(stage):
        recipe[stage].data = str(world)
        model = type("Model", (), {"config": HawkConfig(n_frames=4, image_size=32)})
        tokenizer = Tokenizer(world / "tokenizer.model")
        return train.HawkTask().dataset(recipe[stage], model, tokenizer, "train"), reads

    monkeypatch.setattr(data, "read_clip", read_clip)
    index(world, "a b.mp4")
    return make


@pytest.mark.parametrize("stage", [1, 2])
def test_frames_and_crops(samples, stage):
    """Stage 1 draws half of its frames from each half of the video, stage 2 takes them at equal distances.
    One crop for both streams, another in each epoch."""
    dataset, reads = samples(stage)
    drawn = [dataset[epoch] for epoch in range(30)]  # one row: a number is an epoch
    assert set(reads) == {("headtail" if stage == 1 else "uniform", "hard")}
    counts = Counter(i for sample in drawn for i in sample["indices"].tolist())
    if stage == 1:
        assert all((sample["indices"] < 20).sum() == 2 for sample in drawn) and len(counts) > 25
    else:
        assert set(counts) == {0, 10, 20, 30}
    streams = [sample["streams"] for sample in drawn]
    assert all(torch.equal(stream["appearance"], stream["motion"]) for stream in streams)
    assert len({stream["appearance"].numpy().tobytes() for stream in streams}) > 20
    # evaluation: the same frames, uncropped, every time
    dataset.augment = False
    dataset.train = False
    plain = [dataset[epoch]["streams"]["appearance"] for epoch in range(3)]
    assert all(torch.equal(frames, plain[0]) for frames in plain)
    assert dataset[0]["indices"].tolist() == [0, 10, 20, 30]


def test_texts_of_stage_1(samples, world):
    dataset = samples(1)[0]
    tok = Tokenizer(world / "tokenizer.model")
    sample = dataset[0]
    caption = tok.sp.encode("a red car drives the wrong way in the near lane\n")[:32]
    ids = [tok.bos] + [tok.image_id] * 64 + caption
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == [-100] * 65 + caption
    motion = sample["motion_input_ids"].tolist()
    assert motion[:33] == [tok.bos] + [tok.image_id] * 32 and tok.decode(motion) == "red car drives"


def test_texts_of_stage_2(samples, world):
    """Half of the time the annotated rounds, else one of the 20 questions and the description in place of the
    first round; message and question in the training format; no motion target, unless it is asked for."""
    dataset = samples(2)[0]
    tok = Tokenizer(world / "tokenizer.model")
    described = Counter()
    for epoch in range(400):
        qa = dataset.conversation(dataset.rows[0], clip_generator(42, epoch, 0))
        if qa != QA:
            assert qa[0]["q"] in DESCRIBE_QUESTIONS and qa[0]["a"] == CAPTION and qa[1:] == QA[1:]
            described[qa[0]["q"]] += 1
    assert 160 < described.total() < 240 and len(described) == 20
    assert dataset.rows[0]["qa"] == QA  # the row itself is never edited
    sample = dataset[0]
    qa = dataset.conversation(dataset.rows[0], clip_generator(42, 0, 0))
    ids, labels = tok.encode_conversation(qa, "The video contains 4 frames. ", 64, 512)
    assert sample["input_ids"].tolist() == ids and sample["labels"].tolist() == labels and len(ids) <= 512
    text = tok.decode(ids)
    assert f"</Video> The video contains 4 frames. {qa[0]['q']} [/INST] {qa[0]['a']}" in text
    assert "motion_input_ids" not in sample
    with_targets = HawkDataset(dataset.rows, tok, dataset.config, stage=2, motion_targets=True)
    assert "motion_input_ids" in with_targets[0]


def test_pixels_are_not_normalised(world, monkeypatch):
    """Training and answering feed the ViT 0 to 1, without the mean and deviation that CLIP expects."""
    clip = data.read_clip(world / "a b.mp4", 4, 28)
    model = Hawk.from_pretrained(world / "weights")
    seen = []
    forward = model.vit.forward
    monkeypatch.setattr(model.vit, "forward", lambda images: seen.append(images) or forward(images))
    sample.encode_clips(model, [clip])
    frames = torch.from_numpy(np.concatenate([clip.appearance, clip.motion])).permute(0, 3, 1, 2)
    assert torch.equal(seen[0], frames.float() / 255) and seen[0].max() > 0.9
    dataset = [{"streams": {"appearance": frames}, "input_ids": torch.tensor([1])}]
    args = parse("--preset", "tiny", "--data", world, "--out", world, "--workers", 0)
    [(made, clips, unread)] = train.load(dataset, [[0]], args, CPU)
    assert torch.equal(made["streams"]["appearance"], frames.float()[None] / 255)
    assert made["input_ids"].tolist() == [[1]] and (clips, unread) == (1, 0)


def test_samples_are_made_on_the_cpu_even_where_there_is_a_gpu(world, monkeypatch):
    """A loader worker that touches CUDA dies: the main process holds it already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was touched"))
    index(world, "a b.mp4")
    rows = read_index(world / "train.jsonl")
    config = HawkConfig(n_frames=4, image_size=28)
    dataset = HawkDataset(rows, Tokenizer(world / "tokenizer.model"), config, stage=1)
    batch = collate([dataset[0], dataset[1]])
    tensors = [*batch.pop("streams").values(), *(x for x in batch.values() if torch.is_tensor(x))]
    assert {x.device.type for x in tensors} == {"cpu"} and not batch["errors"]


@pytest.mark.parametrize("dtype, relative", [("float32", 0), ("float16", 1e-3)])
def test_training_from_the_cache_is_training_from_the_videos(world, tmp_path, dtype, relative):
    index(world, "a b.mp4", "broken.mp4", "c.mp4")
    command = [
        "features",
        "--weights",
        world / "weights",
        "--data",
        world,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    ]
    prepare.main([*map(str, command), "--dtype", dtype, "--workers", "0"])
    losses = []
    for features in ([], ["--features", tmp_path]):
        start = ["--weights", world / "weights", "--data", world, "--out", "x", "--dtype", "float32"]
        args = parse(*start, *features)
        model, tokenizer = train.build(args, args.weights, torch.device("cpu"))
        dataset = train.HawkTask().dataset(args, model, Tokenizer(tokenizer), "train")
        assert "broken.mp4" in dataset[1]["error"]
        here = parse(*start, "--out", tmp_path, "--workers", 0)
        for batch, _, _ in train.load(dataset, [[0], [2]], here, CPU):
            losses += [loss.item() for loss in model(**batch).values()]
    half = len(losses) // 2
    assert losses[half:] == pytest.approx(losses[:half], rel=relative, abs=0) and all(losses)


def test_a_model_without_the_motion_branch_trains(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    alone = ["--set", "branches=appearance"]
    prepare.main(["merge", "--weights", str(world / "weights"), "--out", str(tmp_path / "weights"), *alone])
    main(*options(world, tmp_path, 2, "--weights", tmp_path / "weights"))
    lines = log_of(tmp_path)
    assert lines[0]["consistency"] == 0 and "bias_cosine" not in lines[0]
    assert all(math.isfinite(line["total"]) for line in lines)
    saved = Hawk.from_pretrained(tmp_path / "run/last")
    assert saved.config.branches == ("appearance",) and not hasattr(saved, "motion")


# ------------------------------------------------------------------------------------------------------------
# Steps that go wrong

COMPARE = """
import hashlib
import torch.distributed as dist
import train
built, build, destroy = [], train.build, dist.destroy_process_group
train.build = lambda *args: built.append(build(*args)) or built[-1]
def compare():
    tensors = built[0][0].state_dict().values()
    mine, all_of_them = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest(), [None] * 2
    dist.all_gather_object(all_of_them, mine)
    print("PROCESSES AGREE" if len(set(all_of_them)) == 1 else f"THEY DIFFER {all_of_them}")
    destroy()
dist.destroy_process_group = compare
train.main()
"""


def options(world, out, steps, *more):
    start = [
        "--weights",
        world / "weights",
        "--data",
        out,
        "--out",
        out / "run",
        "--stage",
        2,
        "--steps",
        steps,
    ]
    return [*start, "--batch-size", 2, "--lr", 1e-3, "--warmup", 1, "--workers", 0, "--device", "cpu", *more]


@pytest.fixture
def main():
    """train.py in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *flags: train.main([*map(str, flags)])
    signal.signal(signal.SIGTERM, handler)


def log_of(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_a_process_without_a_readable_clip_waits_for_no_one(world, tmp_path, main):
    """Four clips, two processes, one clip each a step: every second step, one has nothing to learn from."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        index(tmp_path / name, *(world / video for video in ("a b.mp4", "a b.mp4", "broken.mp4", "a b.mp4")))
    (tmp_path / "compare.py").write_text(COMPARE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "compare.py"]
    command = [sys.executable, *map(str, [*launch, *options(world, tmp_path / "two", 4)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("PROCESSES AGREE") == 2, done.stdout
    main(*options(world, tmp_path / "one", 4))
    for name in ("one", "two"):  # listed once, however often it comes
        [entry] = map(json.loads, (tmp_path / name / "run/bad_videos.jsonl").read_text().splitlines())
        assert entry["video"].endswith("broken.mp4") and "broken.mp4" in entry["error"]
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    saved = Hawk.from_pretrained(tmp_path / "one/run/last")
    biases = [saved.branch(name).encoder_1.bias for name in ("appearance", "motion")]
    cosine = torch.nn.functional.cosine_similarity(*biases, dim=0).item()
    assert one[-1]["bias_cosine"] == pytest.approx(cosine, abs=1e-6)
    for a, b in zip(one, two, strict=True):  # what cannot be read adds nothing, in any number of processes
        assert b["total"] == pytest.approx(a["total"], rel=2e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3)


def test_videos_of_which_none_can_be_read_end_the_run(world, tmp_path, main):
    index(tmp_path, world / "broken.mp4")
    with pytest.raises(ValueError, match="not one of the videos can be read; see .*bad_videos.jsonl"):
        main(*options(world, tmp_path, 1))


def test_parts_that_are_stored_in_different_types_train(world, tmp_path, main, capsys):
    """As `prepare.py weights` writes them: ViT in float16, LLaMA in bfloat16, the rest in float32."""
    model = Hawk.from_pretrained(world / "weights")
    model.vit.half()
    model.llama.bfloat16()
    model.save_pretrained(tmp_path / "mixed", tokenizer=world / "tokenizer.model")
    index(tmp_path, world / "a b.mp4")
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"video": "/nowhere.mp4"}) + "\n")
    main(*options(world, tmp_path, 1, "--weights", tmp_path / "mixed", "--dtype", "bfloat16"))
    [line] = log_of(tmp_path)
    assert math.isfinite(line["total"]) and math.isfinite(line["held_out_total"])
    assert "nowhere.mp4" in (tmp_path / "run/bad_videos.jsonl").read_text()  # a held-out one
    assert "note: 1 videos could not be read" in capsys.readouterr().err


def test_gradient_checkpointing_changes_nothing(world, tmp_path, main, monkeypatch):
    """LLaMA's layer runs once more for each step, and the weights learn the same; on the CPU in float32."""
    weights = []
    runs = []
    forward = LlamaBlock.forward
    monkeypatch.setattr(LlamaBlock, "forward", lambda *inputs: runs.append(1) or forward(*inputs))
    for value in ("false", "true"):
        (tmp_path / value).mkdir()
        index(tmp_path / value, world / "a b.mp4")
        (tmp_path / value / "test.jsonl").unlink()
        flags = ["--train", "all", "--set", "dropout=0.2", "--set", f"gradient_checkpointing={value}"]
        main(*options(world, tmp_path / value, 2, *flags))
        weights.append((tmp_path / value / "run/last/model.safetensors").read_bytes())
        assert json.loads((tmp_path / value / "run/last/args.json").read_text())["dtype"] == "float32"
    assert weights[0] == weights[1]
    assert len(runs) == 2 + 4  # video-language only: there are no motion targets


def test_two_processes_do_not_train_into_one_folder(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    (tmp_path / "run").mkdir()
    held = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); "
    held += "sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", held, tmp_path / "run/lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="run: another process is training there"):
            main(*options(world, tmp_path, 1, "--resume"))
        other.stdin.close()
    main(*options(world, tmp_path, 1, "--resume"))  # free again, as after a kill


def test_a_run_is_not_lost_by_starting_it_again(world, tmp_path, main, capsys):
    index(tmp_path, world / "a b.mp4")
    main(*options(world, tmp_path, 1, "--resume"))  # there is none yet
    assert "last is not there yet: this run begins" in capsys.readouterr().err
    before = (tmp_path / "run/log.jsonl").read_text()
    with pytest.raises(ValueError, match="there is a run; continue it with --resume"):
        main(*options(world, tmp_path, 2))
    with pytest.raises(ValueError, match="there is a run"):
        main(*options(world, tmp_path, 2, "--weights", tmp_path / "run/last"))
    (tmp_path / "run/last").rename(tmp_path / "last")
    with pytest.raises(ValueError, match="there is a run"):  # its best/ is there
        main(*options(world, tmp_path, 2))
    (tmp_path / "last").rename(tmp_path / "run/last")
    other = Hawk.from_pretrained(world / "weights")
    shutil.copytree(world / "weights", tmp_path / "moved")
    other.llama.norm.weight.data += 1
    other.save_pretrained(tmp_path / "b", tokenizer=world / "tokenizer.model")
    with pytest.raises(ValueError, match="b: is not what .*last was trained on"):
        main(*options(world, tmp_path, 2, "--resume", "--weights", tmp_path / "b"))
    with pytest.raises(ValueError, match="--data .*: this run began with"):
        main(*options(world, tmp_path, 2, "--resume", "--data", tmp_path / "b"))
    assert (tmp_path / "run/log.jsonl").read_text() == before
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 2, "total"')  # as a kill would leave it
    main(*options(world, tmp_path, 2, "--resume", "--weights", tmp_path / "moved"))
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]


def test_what_is_not_given_scales_with_the_run(world, tmp_path, main, capsys):
    index(tmp_path, world / "a b.mp4")
    begun = ["--weights", world / "weights", "--data", tmp_path, "--out", tmp_path / "run", "--workers", 0]
    main(*begun, "--steps", 4)
    args = json.loads((tmp_path / "run/last/args.json").read_text())
    assert [args[name] for name in ("warmup", "save_every", "eval_every")] == [1, 1, 1]
    main(*begun, "--steps", 12, "--resume")  # longer: the warm-up stays as it was
    assert json.loads((tmp_path / "run/last/args.json").read_text())["warmup"] == 1
    assert "never reaches" not in capsys.readouterr().err
    main(*options(world, tmp_path, 4, "--out", tmp_path / "slow", "--warmup", 4))
    assert "never reaches --lr: --warmup is 4 of 4 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_args(["--weights", "w", "--data", "d", "--out", "o"], train.HawkTask())
    assert "--steps N, or --recipe released" in capsys.readouterr().err


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    main(*options(world, tmp_path, 3, "--eval-every", 1, "--lr", 1e-3))
    best = Hawk.from_pretrained(tmp_path / "run/best").state_dict()
    last = Hawk.from_pretrained(tmp_path / "run/last").state_dict()
    losses = [line["held_out_total"] for line in log_of(tmp_path)]
    assert min(losses) == losses[2] and all(torch.equal(best[name], last[name]) for name in best)
    rising = ["--out", tmp_path / "up", "--lr", 10, "--warmup", 3, "--eval-every", 1, "--train", "all"]
    main(*options(world, tmp_path, 2, *rising))
    best = Hawk.from_pretrained(tmp_path / "up/best").state_dict()
    last = Hawk.from_pretrained(tmp_path / "up/last").state_dict()
    assert any(not torch.equal(best[name], last[name]) for name in best)
    before = {file.name: file.read_bytes() for file in (tmp_path / "up/best").iterdir()}
    main(*options(world, tmp_path, 3, *rising, "--resume"))  # which does not forget the lowest
    losses = [line["held_out_total"] for line in map(json.loads, (tmp_path / "up/log.jsonl").open())]
    assert len(losses) == 3 and losses[0] < min(losses[1:])
    assert {file.name: file.read_bytes() for file in (tmp_path / "up/best").iterdir()} == before


class Values(torch.nn.Module):
    """An objective whose loss is the mean of the samples' values."""

    def forward(self, streams, input_ids, value, per_sample):
        assert per_sample and not self.training and len(streams["motion"]) == len(value)
        return {"total": value.mean(), "square": (value**2).mean()}


def test_each_held_out_clip_counts_the_same(tmp_path):
    """17 of them: a batch of 16 and one of a single clip."""
    numbers = [float(i == 16) * 100 + i for i in range(17)]
    samples = [
        {"streams": {"motion": torch.zeros(1, 3)}, "input_ids": torch.tensor([1]), "value": torch.tensor(x)}
        for x in numbers
    ]
    args = parse("--preset", "tiny", "--data", tmp_path, "--out", tmp_path, "--workers", 0)
    objective = Values()
    found = train.evaluate(objective, samples, nullcontext(), args, CPU)
    assert objective.training and found.keys() == {"held_out_total", "held_out_square"}
    assert found["held_out_total"] == pytest.approx(np.mean(numbers))
    assert found["held_out_square"] == pytest.approx(np.square(numbers).mean())
    args.eval_samples = 3
    assert train.evaluate(objective, samples, nullcontext(), args, CPU)["held_out_total"] == pytest.approx(1)


def test_a_base_is_neither_overwritten_nor_replaced_unnoticed(world, tmp_path, main, monkeypatch):
    index(tmp_path, world / "a b.mp4")
    main(*options(world, tmp_path, 1))
    shutil.rmtree(tmp_path / "run/last")
    with pytest.raises(ValueError, match="run/best: this run would overwrite it; choose another --out"):
        main(*options(world, tmp_path, 1, "--weights", tmp_path / "run/best"))
    assert Hawk.from_pretrained(tmp_path / "run/best")
    base = tmp_path / "base"
    shutil.copytree(world / "weights", base)
    step = train.train_step

    def step_and_replace(*arguments):  # as another run that saves does
        model = Hawk.from_pretrained(base)
        model.llama.norm.weight.data *= 3
        model.save_pretrained(base)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", step_and_replace)
    main(*options(world, tmp_path, 1, "--weights", base, "--out", tmp_path / "other"))
    with pytest.raises(ValueError, match="base: is not what .*other/last was trained on, or has changed"):
        Hawk.from_pretrained(tmp_path / "other/last")


def test_crops_that_a_cache_does_not_hold(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    paths = ["--weights", world / "weights", "--data", tmp_path, "--out", tmp_path / "features"]
    prepare.main(["features", *map(str, paths), "--device", "cpu", "--workers", "0"])
    with pytest.raises(ValueError, match="--augment: --features lack --crops"):
        main(*options(world, tmp_path, 1, "--augment", "--features", tmp_path / "features"))


def test_the_best_checkpoint_is_found_again_where_a_kill_left_it(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    main(*options(world, tmp_path, 1))
    (tmp_path / "run/best").rename(tmp_path / "run/best.being-replaced")
    main(*options(world, tmp_path, 1, "--resume"))
    assert (tmp_path / "run/best/config.json").exists() and not (
        tmp_path / "run/best.being-replaced"
    ).exists()


@pytest.mark.parametrize("others", [["a b.mp4"], []])
def test_held_out_videos_that_cannot_be_read_end_no_run(world, tmp_path, main, others):
    """Those that are asked for, whether or not others of the split can be read."""
    index(tmp_path, world / "broken.mp4", *(world / name for name in others))
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW | {"video": str(world / "a b.mp4")}) + "\n")
    main(*options(world, tmp_path, 1, "--eval-samples", 1))
    [line] = log_of(tmp_path)
    assert math.isfinite(line["total"]) and "held_out_total" not in line
    assert (tmp_path / "run/last").exists() and not (tmp_path / "run/best").exists()


def test_many_unreadable_videos_end_even_a_short_run(world, tmp_path, main, capsys):
    good = world / "a b.mp4"
    index(tmp_path, good, good, good, "one.mp4", good, good, "two.mp4", good)
    with pytest.raises(ValueError, match="2 unreadable videos for 8 rows; see bad_videos.jsonl"):
        main(*options(world, tmp_path, 8))
    index(tmp_path, good, good, good, "one.mp4", good, good, good, good)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "run/bad_videos.jsonl", tmp_path / "b")  # of a run that is not there any more
    main(*options(world, tmp_path, 8, "--out", tmp_path / "b"))
    assert "note: 1 videos could not be read (of 8 rows)" in capsys.readouterr().err
    index(tmp_path, good, "one.mp4")
    held_out = [json.dumps(ROW | {"video": str(video)}) + "\n" for video in (good, "other.mp4")]
    (tmp_path / "test.jsonl").write_text("".join(held_out))
    main(*options(world, tmp_path, 2, "--out", tmp_path / "c", "--eval-every", 1))  # one of each is no reason
    assert "note: 2 videos could not be read (of 2 rows)" in capsys.readouterr().err


def test_losses_that_are_not_finite_change_nothing_and_end_the_run(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    model = Hawk.from_pretrained(world / "weights")
    model.llama.lm_head.weight.data *= 1e38  # its logits are infinite
    model.save_pretrained(tmp_path / "huge", tokenizer=world / "tokenizer.model")
    with pytest.raises(ValueError, match="step 5: not finite for 5 steps in a row"):
        main(*options(world, tmp_path, 9, "--weights", tmp_path / "huge", "--save-every", 4))
    assert [line["skipped"] for line in log_of(tmp_path)] == [1, 2, 3, 4]
    before = model.state_dict()
    after = Hawk.from_pretrained(tmp_path / "run" / "last").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "setting, words",
    [
        ("n_visual=3", "unknown key 'n_visual'"),
        ("preset=3", "unknown key"),
        ("motion=none", "unknown key"),
        ("n_frames", "n_frames must be int"),
        ("n_frames=8x", "n_frames must be int, not '8x'"),
        ("gradient_checkpointing=on", "must be bool, not 'on'"),
        ("dropout=much", "dropout must be float"),
        ("dropout=NaN", "dropout"),
        ("motion_mask=1", "motion_mask must be str"),
        ("motion_mask=none", "motion_mask"),
        ("branches=vit", "branches"),
        ("branches=[[1]]", "branches"),
        ("lora_targets=[true]", "True"),
        ("llama_heads=64", "llama"),
    ],
)
def test_settings_that_make_no_model(setting, words):
    with pytest.raises(ValueError, match=words):
        HawkConfig.from_dict(asdict(HawkConfig.preset("tiny")) | settings([setting]), "--set")


def test_settings_that_do():
    pairs = ["gradient_checkpointing=True", "dropout=0.1", "lora_alpha=8", "motion_mask=soft", "n_frames=5"]
    config = HawkConfig.from_dict(settings([*pairs, "branches=motion,appearance"]), "--set")
    expected = HawkConfig(gradient_checkpointing=True, dropout=0.1, lora_alpha=8.0, n_frames=5)
    expected.motion_mask = "soft"
    expected.branches = ("motion", "appearance")
    assert config == expected
