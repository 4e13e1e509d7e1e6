"""The released recipe of both stages, as the README's commands give it; and what happens to a step that goes wrong."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import prepare
import sample
import train
from data import DESCRIBE_QUESTIONS, Clip, HawkDataset, Tokenizer, clip_generator, collate, read_index, settings
from hawk import BRANCHES, Hawk, HawkConfig

ROOT = Path(__file__).parents[1]
QA = [{"q": "Who is it?", "a": "A red car."}, {"q": "Why?", "a": "It is a dog."}]
ROW = {"description": "A red car drives the wrong way in the near lane.", "motion": "red car drives", "qa": QA}


@pytest.fixture(scope="module")
def recipe():
    """stage -> the options of the README's command for it ("Official recipe")."""
    block = (ROOT / "README.md").read_text().split("**Official recipe**")[1].split("```")[1]
    commands = [line.split("train.py ")[1].split() for line in block.strip().splitlines()]
    return {args.stage: args for args in map(train.parse_args, commands)}


def index(folder, *videos):
    for split in ("train", "test"):
        rows = (ROW | {"video": str(video)} for video in videos)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------------------
# The recipe


def test_schedule(recipe):
    """Warm-up 1e-6 to 1e-5 over 1000 steps, cosine to 1e-6 over 160 epochs of 2500 steps; one clip on each of 4 GPUs."""
    assert sorted(recipe) == [1, 2] and "runs/stage1/last" in recipe[2].weights  # stage 2 starts from stage 1's result
    for args in recipe.values():
        assert (args.steps, args.batch_size, args.accumulate, args.clip) == (160 * 2500, 4, 1, 0.0)
        assert args.train == "paper" and args.dtype == "auto"
        for step in (0, 1, 250, 999):
            assert train.learning_rate(step, args) == pytest.approx(1e-6 + 9e-6 * step / 1000, rel=1e-12)
        for step in (1000, 2500, 100_000, 200_000, 399_999):
            cosine = 0.5 * (1 + math.cos(math.pi * step / 400_000))
            assert train.learning_rate(step, args) == pytest.approx(1e-6 + 9e-6 * cosine, rel=1e-12)
        assert train.learning_rate(200_000, args) == pytest.approx(5.5e-6)
        assert train.learning_rate(400_000, args) == pytest.approx(1e-6)


def test_optimizer_and_losses(recipe):
    config = HawkConfig.preset("7b")
    assert (config.video_language_weight, config.motion_language_weight, config.consistency_weight) == (1.0, 0.1, 0.1)
    assert (config.consistency, config.motion, config.n_frames, config.dropout) == ("cosine", "hard", 32, 0.1)
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
    assert {"motion.video_queries", "appearance.frame_position.weight"} <= {names[p] for p in decayed["params"]}


@pytest.fixture
def samples(recipe, world, monkeypatch):
    """stage -> (training set of the README's command over one row, how its clips were read). Both streams show the same."""

    def read_clip(path, n_frames, image_size, motion, sampling, generator):
        reads.append((sampling, motion))
        indices = data.sample_frames(40, n_frames, sampling, generator)
        frames = np.random.default_rng(0).integers(0, 256, (40, image_size, image_size, 3), np.uint8)[indices]
        return Clip(frames, frames.copy(), [], "The video contains 4 frames. ", indices)

    def make(stage):
        args, c, tokenizer = recipe[stage], HawkConfig(n_frames=4, image_size=32), Tokenizer(world / "tokenizer.model")
        args.data, model = str(world), type("Model", (), {"config": c})
        return train.datasets(args, model, tokenizer)[0], reads

    reads = []
    monkeypatch.setattr(data, "read_clip", read_clip)
    index(world, "a b.mp4")
    return make


@pytest.mark.parametrize("stage", [1, 2])
def test_frames_and_crops(samples, stage):
    """Stage 1 draws half of its frames from each half of the video, stage 2 takes them at equal distances; one crop for
    both streams, another in each epoch."""
    dataset, reads = samples(stage)
    drawn = [dataset[epoch] for epoch in range(30)]  # one row: a number is an epoch
    assert set(reads) == {("headtail" if stage == 1 else "uniform", "hard")}
    counts = Counter(i for sample in drawn for i in sample["indices"].tolist())
    if stage == 1:
        assert all((sample["indices"] < 20).sum() == 2 for sample in drawn) and len(counts) > 25
    else:
        assert set(counts) == {0, 10, 20, 30}
    assert all(torch.equal(sample["appearance"], sample["motion"]) for sample in drawn)
    assert len({sample["appearance"].numpy().tobytes() for sample in drawn}) > 20
    dataset.augment, dataset.train = False, False  # evaluation: the same frames, uncropped, every time
    plain = [dataset[epoch] for epoch in range(3)]
    assert all(torch.equal(sample["appearance"], plain[0]["appearance"]) for sample in plain)
    assert plain[0]["indices"].tolist() == [0, 10, 20, 30]


def test_texts_of_stage_1(samples, recipe, world):
    dataset, tok = samples(1)[0], Tokenizer(world / "tokenizer.model")
    sample, n = dataset[0], len(dataset.tokenizer.sp.encode("a red car drives the wrong way in the near lane\n"))
    ids = sample["input_ids"].tolist()
    assert ids[:65] == [tok.bos] + [tok.image_id] * 64 and len(ids) == 65 + min(n, 32)
    assert tok.decode(ids) == tok.decode(tok.sp.encode("a red car drives the wrong way in the near lane\n")[:32])
    assert sample["labels"].tolist() == [-100] * 65 + ids[65:]
    motion = sample["motion_input_ids"].tolist()
    assert motion[:33] == [tok.bos] + [tok.image_id] * 32 and tok.decode(motion) == "red car drives"


def test_texts_of_stage_2(samples, world):
    """Half of the time the annotated rounds, else one of the 20 questions and the description in place of the first
    round; message and question in the training format; no motion target, unless it is asked for."""
    dataset, tok = samples(2)[0], Tokenizer(world / "tokenizer.model")
    described = Counter()
    for epoch in range(400):
        qa = dataset.conversation(dataset.rows[0], clip_generator(42, epoch, 0))
        assert qa == QA or (qa[0]["q"] in DESCRIBE_QUESTIONS and qa[0]["a"] == ROW["description"] and qa[1:] == QA[1:])
        described[qa[0]["q"]] += qa != QA
    assert 160 < described.total() < 240 and sum(n > 0 for n in described.values()) == 20
    assert dataset.rows[0]["qa"] == QA  # the row itself is never edited
    sample = dataset[0]
    qa = dataset.conversation(dataset.rows[0], clip_generator(42, 0, 0))
    ids, labels = tok.encode_conversation(qa, "The video contains 4 frames. ", 64, 512)
    assert sample["input_ids"].tolist() == ids and sample["labels"].tolist() == labels and len(ids) <= 512
    text = tok.decode(ids)
    assert f"</Video> The video contains 4 frames. {qa[0]['q']} [/INST] {qa[0]['a']}" in text
    assert "motion_input_ids" not in sample and "motion_input_ids" in HawkDataset(
        dataset.rows, tok, 4, 32, 64, stage=2, motion_targets=True
    ).sample(0, clip_generator(42, 0, 0))


def test_pixels_are_not_normalised(world, monkeypatch):
    """What training and answering feed the ViT is 0 to 1, without the mean and deviation that CLIP models expect."""
    clip, seen = data.read_clip(world / "a b.mp4", 4, 28), []
    model = Hawk.from_pretrained(world / "weights")
    monkeypatch.setattr(model.vit, "forward", lambda images: seen.append(images) or torch.zeros(len(images), 5, 32))
    sample.encode_clips(model, [clip])
    frames = torch.from_numpy(np.concatenate([clip.appearance, clip.motion])).permute(0, 3, 1, 2)
    assert torch.equal(seen[0], frames.float() / 255) and seen[0].max() > 0.9
    batch = {"appearance": frames[None], "input_ids": torch.tensor([[1]]), "errors": [], "index": torch.tensor([0])}
    made = train.inputs(batch, torch.device("cpu"), 2)
    assert torch.equal(made["appearance"], frames.float()[None] / 255) and made["input_ids"].dtype == torch.long


def test_precision(recipe, monkeypatch):
    """bfloat16 where the GPU has it, else float16 with a scaler; float32 on the CPU."""
    chosen = {}
    for device, bfloat16 in (("cpu", True), ("cuda", True), ("cuda", False)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda have=bfloat16: have)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: enabled)
        args = train.parse_args(["--preset", "tiny", "--data", "x", "--out", "y"])
        chosen[device, bfloat16] = (train.choose_precision(args, torch.device(device))[1], args.dtype)
    assert chosen["cpu", True] == (False, "float32")
    assert chosen["cuda", True] == (False, "bfloat16") and chosen["cuda", False] == (True, "float16")


def test_samples_are_made_on_the_cpu_even_where_there_is_a_gpu(world, monkeypatch):
    """A loader process that touches CUDA dies: the main process holds it already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was touched"))
    index(world, "a b.mp4")
    rows, tokenizer = read_index(world / "train.jsonl"), Tokenizer(world / "tokenizer.model")
    batch = collate([HawkDataset(rows, tokenizer, 4, 28, 64, stage=stage)[0] for stage in (1, 1)])
    assert {x.device.type for x in batch.values() if torch.is_tensor(x)} == {"cpu"} and not batch["errors"]


# ----------------------------------------------------------------------------------------------------------------------
# The cache of what is frozen


def cache(world, out, **changes):
    options = dict(weights=world / "weights", data=world, out=out, device="cpu", seed=42, bfloat16=False, crops=1,
                   dtype="float32", batch_size=2, workers=0)  # fmt: skip
    prepare.features(type("Options", (), options | changes))
    return out


@pytest.mark.parametrize("dtype, relative", [("float32", 0), ("float16", 1e-3)])
def test_training_from_the_cache_is_training_from_the_videos(world, tmp_path, dtype, relative):
    index(world, "a b.mp4", "broken.mp4", "c.mp4")
    cache(world, tmp_path, dtype=dtype)
    losses = []
    for features in ([], ["--features", tmp_path]):
        command = map(
            str, ["--weights", world / "weights", "--data", world, "--out", "x", "--dtype", "float32", *features]
        )
        args = train.parse_args([*command])
        model, tokenizer, _ = train.build(args, None)
        dataset = train.datasets(args, model, Tokenizer(tokenizer))[0]
        samples = [dataset[i] for i in range(3)]
        assert "broken.mp4" in samples[1]["error"]
        batches = (train.inputs(collate([samples[i]]), torch.device("cpu"), 2) for i in (0, 2))
        losses.append([loss.item() for batch in batches for loss in model(**batch).values()])
    assert losses[1] == pytest.approx(losses[0], rel=relative, abs=0) and all(losses[0])


def test_another_cache_is_refused(world, tmp_path):
    index(world, "a b.mp4", "c.mp4")
    folder = cache(world, tmp_path / "features") / "train"
    rows = read_index(world / "train.jsonl")
    fingerprint = data.frozen_fingerprint(Hawk.from_pretrained(world / "weights"))
    expected = {"weights": fingerprint, "motion": "hard"}
    data.CachedFeatures(folder, rows, expected)
    for changed, words in (
        ({"weights": "other"}, "made with weights"),
        ({"motion": "soft"}, "made with motion 'hard'"),
    ):
        with pytest.raises(ValueError, match=words):
            data.CachedFeatures(folder, rows, expected | changed)
    for other, words in ((rows[::-1], "made with videos"), (rows[:1], "made with videos")):
        with pytest.raises(ValueError, match=words):
            data.CachedFeatures(folder, other, expected)
    with pytest.raises(ValueError, match="a cache with bfloat16 False, not True; choose another --out"):
        cache(world, tmp_path / "features", bfloat16=True)
    before = (folder / "appearance.npy").read_bytes()
    clips = (folder / "clips.jsonl").read_bytes()
    (folder / "clips.jsonl").write_bytes(clips[: clips.index(b"\n") + 9])  # killed while it wrote the second line
    with pytest.raises(ValueError, match="only 1 of 2 clips are done|not a feature cache"):
        data.CachedFeatures(folder, rows, expected)
    (folder / "clips.jsonl").write_bytes(clips.replace(b'"row": 1', b'"row": 7'))
    with pytest.raises(ValueError, match="only 1 of 2 clips are done"):
        data.CachedFeatures(folder, rows, expected)
    (folder / "clips.jsonl").write_bytes(clips + clips.splitlines()[1].replace(b'"row": 1', b'"row": 7') + b"\n")
    with pytest.raises(ValueError, match="names clips that the index does not have"):
        data.CachedFeatures(folder, rows, expected)
    (folder / "clips.jsonl").write_bytes(clips[: clips.index(b"\n") + 9])
    cache(world, tmp_path / "features")  # goes on there
    assert (folder / "clips.jsonl").read_bytes() == clips and (folder / "appearance.npy").read_bytes() == before


def test_a_model_that_is_blind_to_motion(world, tmp_path):
    """motion=none: the motion branch gets zeros, in training from videos and from any cache, and when it is asked."""
    index(world, "a b.mp4")
    cache(world, tmp_path)
    made = []
    for features in ([], ["--features", tmp_path]):
        flags = ["--weights", world / "weights", "--data", world, "--out", "x", "--set", "motion=none", *features]
        args = train.parse_args([*map(str, flags)])
        model, tokenizer, _ = train.build(args, None)
        batch = train.inputs(collate([train.datasets(args, model, Tokenizer(tokenizer))[0][0]]), torch.device("cpu"), 2)
        made.append(model.eval().encode(batch["appearance"], batch["motion"]))
    clip = data.read_clip(world / "a b.mp4", 4, 28)  # with motion frames: they must not matter
    assert clip.motion.any()
    made.append(sample.encode_clips(model, [clip]))
    made.append(sample.look(model, world / "a b.mp4").encoding)
    assert all(torch.equal(e.tokens, made[0].tokens) for e in made)
    zeros = model.motion.video(torch.zeros(1, 4, 16, model.config.qformer_dim))[0]
    assert torch.equal(made[0].tokens[:, 32:], zeros)
    model.config.motion = "hard"
    assert not torch.equal(sample.encode_clips(model, [clip]).tokens, made[0].tokens)
    args = train.parse_args(["--preset", "tiny", "--stage", "0", "--data", str(world), "--out", "x"])
    model.config.motion = "none"
    with pytest.raises(ValueError, match="stage 0 needs .*, and motion"):
        train.datasets(args, model, Tokenizer(tokenizer))


# ----------------------------------------------------------------------------------------------------------------------
# Steps that go wrong

COMPARE = """
import hashlib, sys
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
sys.argv[0] = "train.py"
train.main()
"""


def options(world, out, steps, *more):
    return ["--weights", world / "weights", "--data", out, "--out", out / "run", "--stage", 2, "--steps", steps, "--batch-size", 2,
            "--lr", 1e-3, "--warmup", 1, "--workers", 0, "--device", "cpu", *more]  # fmt: skip


@pytest.fixture
def main(monkeypatch):
    """train.py in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    yield main
    signal.signal(signal.SIGTERM, handler)


def log_of(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_a_process_without_a_readable_clip_waits_for_no_one(world, tmp_path, main):
    """Four clips, two processes, one clip each a step: in one step of two, one process has nothing to learn from."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        index(folder, *(world / name for name in ("a b.mp4", "a b.mp4", "broken.mp4", "a b.mp4")))
    (tmp_path / "compare.py").write_text(COMPARE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "compare.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, [*launch, *options(world, folders[1], 4)])], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("PROCESSES AGREE") == 2, done.stdout
    main(*options(world, folders[0], 4))
    bad = [[json.loads(x) for x in (f / "run" / "bad_videos.jsonl").read_text().splitlines()] for f in folders]
    assert bad[0] == bad[1] and len(bad[1]) == 1  # however often it comes
    assert all(entry["video"].endswith("broken.mp4") and "broken.mp4" in entry["error"] for entry in bad[1])
    one, two = map(log_of, folders)
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    biases = [getattr(Hawk.from_pretrained(folders[0] / "run" / "last"), name).encoder_1.bias for name in BRANCHES]
    assert one[-1]["bias_cosine"] == pytest.approx(torch.cosine_similarity(*biases, dim=0).item(), abs=1e-6)
    for a, b in zip(one, two, strict=True):  # what cannot be read adds nothing, however many processes there are
        assert b["total"] == pytest.approx(a["total"], rel=2e-3) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=2e-3
        )


def test_parts_that_are_stored_in_different_types_train_and_answer(world, tmp_path, main):
    """As `prepare.py weights` writes them: ViT in float16, LLaMA in bfloat16, the rest in float32."""
    model = Hawk.from_pretrained(world / "weights")
    model.vit.half(), model.llama.bfloat16()
    model.save_pretrained(tmp_path / "mixed", tokenizer=world / "tokenizer.model")
    index(tmp_path, world / "a b.mp4")
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"video": "/nowhere.mp4"}) + "\n")
    main(*options(world, tmp_path, 1, "--weights", tmp_path / "mixed", "--dtype", "bfloat16"))
    assert math.isfinite(log_of(tmp_path)[0]["held_out_total"]) and len(log_of(tmp_path)[0]["answers"]) == 1
    assert "nowhere.mp4" in (tmp_path / "run/bad_videos.jsonl").read_text()  # a held-out one


def test_the_scaler_of_float16_settles_and_is_kept(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    flags = ["--dtype", "float16", "--train", "all", "--set", "video_language_weight=1000", "--clip", 1]
    main(*options(world, tmp_path, 14, *flags))
    skipped = [not math.isfinite(line["grad_norm"] or math.inf) for line in log_of(tmp_path)]
    assert sum(skipped) > 5 and not skipped[-1]  # infinite at first, in gradients alone, and that stops no run
    main(*options(world, tmp_path, 15, *flags, "--resume"))
    assert math.isfinite(log_of(tmp_path)[-1]["grad_norm"])  # it does not begin anew


def test_a_run_is_not_lost_by_starting_it_again(world, tmp_path, main, capsys):
    index(tmp_path, world / "a b.mp4")
    main(*options(world, tmp_path, 1, "--resume"))
    assert "begins anew" in capsys.readouterr().err
    before = (tmp_path / "run/log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run; --resume goes on with it"):
        main(*options(world, tmp_path, 2))
    Hawk.from_pretrained(world / "weights").save_pretrained(tmp_path / "b", tokenizer=world / "tokenizer.model")
    with pytest.raises(ValueError, match="began with .*weights"):
        main(*options(world, tmp_path, 2, "--resume", "--weights", tmp_path / "b"))
    assert (tmp_path / "run/log.jsonl").read_text() == before
    (tmp_path / "run/log.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match="log.jsonl: cannot be read"):
        main(*options(world, tmp_path, 2, "--resume"))


@pytest.mark.parametrize(
    "flags, words",
    [("--steps 0", "--steps must be 1"), ("--save-every 0", "--save-every"), ("--accumulate 0", "--accumulate"),
     ("--seed -1", "--seed"), ("--stage 0 --augment", "stages 1 and 2"), ("--stage 0 --train lora", "stages 1 and 2")],
)  # fmt: skip
def test_options_that_make_no_run(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(["--preset", "tiny", "--data", "x", "--out", "y", *flags.split()])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, words",
    [("n_visual=3", "unknown key 'n_visual'"), ("preset=3", "unknown key"), ("n_frames", "n_frames must be int"),
     ("gradient_checkpointing=on", "must be bool, not 'on'"), ("dropout=much", "dropout must be float"),
     ("n_frames=8x", "n_frames must be int, not '8x'"), ("motion=1", "motion must be str"), ("dropout=NaN", "dropout is nan"),
     ("lora_targets=q", "lora_targets q:"), ("image_size=10", "image_size 10"), ("llama_heads=64", "llama_heads 64")],
)  # fmt: skip
def test_settings_that_make_no_model(setting, words):
    with pytest.raises(ValueError, match=words):
        HawkConfig.from_dict(asdict(HawkConfig.preset("tiny")) | settings([setting]), "--set")


def test_settings_that_do():
    pairs = ["gradient_checkpointing=True", "dropout=.1", "lora_alpha=8", "motion=soft", "n_frames=4", "n_frames=5"]
    config = HawkConfig.from_dict(settings(pairs), "--set")
    assert config == HawkConfig(gradient_checkpointing=True, dropout=0.1, lora_alpha=8.0, motion="soft", n_frames=5)


def test_losses_that_are_not_finite_change_nothing_and_end_the_run(world, tmp_path, main):
    index(tmp_path, world / "a b.mp4")
    with pytest.raises(ValueError, match="step 5: the loss was not finite for 5 steps in a row"):
        main(*options(world, tmp_path, 9, "--set", "video_language_weight=1e39", "--save-every", 4))
    assert [line["skipped"] for line in log_of(tmp_path)] == [1, 2, 3, 4]
    before, after = (Hawk.from_pretrained(f).state_dict() for f in (world / "weights", tmp_path / "run" / "last"))
    assert all(torch.equal(before[name], after[name]) for name in before)
