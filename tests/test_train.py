"""The training loop, on toy clips: it learns, it goes on where it was killed, and processes do not matter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import DESCRIBE_QUESTIONS, Tokenizer, read_index
from hawk import Hawk, HawkConfig
from sample import ask, load

ROOT = Path(__file__).parents[1]
SMALL = dict(vit_depth=1, vit_dim=64, vit_mlp=128, n_queries=10, llama_layers=2, image_size=56, n_frames=4)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads sums in another order


def run(*command, check=True):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four clips to learn and two to hold out, random small weights, and the cache of their frame features."""
    folder = tmp_path_factory.mktemp("world")
    run("prepare.py", "toy", "--out", folder, "--n-train", 4, "--n-test", 2, "--seed", 5)
    tokenizer = folder / "tokenizer.model"
    torch.manual_seed(0)
    config = HawkConfig(**{**vars(HawkConfig.preset("tiny")), **SMALL, "vocab_size": Tokenizer(tokenizer).vocab_size})
    Hawk(config).save_pretrained(folder / "weights", tokenizer=tokenizer)
    run("prepare.py", "features", "--weights", folder / "weights", "--data", folder, "--out", folder / "features",
        "--workers", 0, "--dtype", "float32")  # fmt: skip
    return folder


def options(world, out, steps, *more):
    """Command line of a short run from the cache."""
    return ["--weights", world / "weights", "--data", world, "--features", world / "features", "--out", out, "--train", "all",
            "--steps", steps, "--batch-size", 4, "--lr", 2e-3, "--warmup", 5, "--clip", 1, "--workers", 0, *more]  # fmt: skip


def test_four_clips_are_learnt_word_for_word(world, tmp_path):
    run("train.py", *options(world, tmp_path, 220, "--stage", 2, "--save-every", 500, "--eval-every", 220))
    model, tokenizer = load(tmp_path / "last", "cpu")
    for row in read_index(world / "train.jsonl"):
        assert ask(model, tokenizer, row["video"], DESCRIBE_QUESTIONS[0]).answer == row["description"]
        assert ask(model, tokenizer, row["video"], row["qa"][0]["q"]).answer == row["qa"][0]["a"]
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 221))
    assert (
        lines[-1]["total"] < 0.2 * lines[0]["total"]
        and "held_out_total" in lines[-1]
        and len(lines[-1]["answers"]) == 2
    )


def stop_and_go(command, out, stops, steps):
    """Runs the command again and again; each time a signal of `stops` ends it and all its processes a random moment after
    a few steps. Then lets it finish."""
    moments = random.Random(0)
    for number in stops:
        done = len(log_of(out)) if (out / "log.jsonl").exists() else 0
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True
        )
        until, wanted = time.time() + 120, min(done + moments.randint(1, 5), steps - 1)
        while time.time() < until and not ((out / "log.jsonl").exists() and len(log_of(out)) >= wanted):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        os.killpg(process.pid, number)
        assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    run(*command[1:])


def same_weights(*folders):
    return len({(folder / "last" / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_weights(world, tmp_path):
    """Four SIGKILLs and one SIGTERM, with processes of the loader, dropout and LoRA."""
    more = ["--stage", 2, "--save-every", 2, "--resume", "--workers", 1, "--train", "lora", "--set", "lora_rank=2"]
    more += ["--set", "dropout=0.1"]
    whole, command = (
        [sys.executable, "train.py", *map(str, options(world, tmp_path / name, 36, *more))]
        for name in ("whole", "stopped")
    )
    undisturbed = subprocess.Popen(whole, cwd=ROOT, stderr=subprocess.DEVNULL, env=ENVIRONMENT)  # side by side
    stop_and_go(command, tmp_path / "stopped", [signal.SIGKILL] * 2 + [signal.SIGTERM] + [signal.SIGKILL] * 2, 36)
    assert undisturbed.wait() == 0
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert [line["step"] for line in log_of(tmp_path / "stopped")] == list(range(1, 37))
    losses = [[line["total"] for line in log_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]


def test_a_killed_run_of_two_processes_ends_in_the_same_weights(world, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    more = ["--stage", 1, "--save-every", 3, "--resume", "--workers", 1]
    run(*launch, *options(world, tmp_path / "whole", 12, *more))
    command = [sys.executable, *launch, *map(str, options(world, tmp_path / "killed", 12, *more))]
    stop_and_go(command, tmp_path / "killed", [signal.SIGKILL], 12)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, 13))


def test_two_processes_compute_what_one_does(world, tmp_path):
    flags = options(world, tmp_path / "one", 4, "--stage", 2)
    run("train.py", *flags)
    flags[flags.index("--out") + 1] = tmp_path / "two"
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags, "--accumulate", 2)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("total", "video_language", "consistency", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)


def test_an_unreadable_video_is_listed_and_does_not_stop_the_run(world, tmp_path):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows = [row | {"video": str(world / row["video"])} for row in rows] + [rows[0] | {"video": "gone.mp4"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = options(world, tmp_path / "run", 5, "--stage", 2, "--data", tmp_path)
    features = flags.index("--features")
    run("train.py", *flags[:features], *flags[features + 2 :], "--batch-size", 1)  # each clip once, from the videos
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert len(bad) == 1 and bad[0]["video"].endswith("gone.mp4") and "no such file" in bad[0]["error"].lower()
    totals = [line["total"] for line in log_of(tmp_path / "run")]
    assert len(totals) == 5 and totals.count(0.0) == 1  # that clip adds nothing


def test_stage_0_shares_its_eyes(world, tmp_path):
    run("train.py", "--preset", "tiny", "--stage", 0, "--data", world, "--out", tmp_path, "--steps", 2, "--batch-size", 2,
        "--workers", 0, *(x for k, v in SMALL.items() for x in ("--set", f"{k}={v}")))  # fmt: skip
    model = Hawk.from_pretrained(tmp_path / "last")
    for name in ("ln_vision", "qformer"):
        ours, other = (getattr(branch, name).state_dict() for branch in (model.appearance, model.motion))
        assert all(torch.equal(ours[key], other[key]) for key in ours)
    assert {"presence", "position", "colour", "pointing", "language", "held_out_total"} <= log_of(tmp_path)[-1].keys()


def test_settings_reach_what_starts_from_weights():
    """--set reaches the modules, the LoRA has the rank asked for, and under autocast the weights come as stored, in float16."""
    more = ["--stage", "2", "--train", "lora", "--set", "lora_rank=3", "--set", "dropout=0.3", "--dtype", "bfloat16"]
    args = train.parse_args(["--weights", str(ROOT / "weights" / "tiny"), "--data", "x", "--out", "y", *more])
    model = train.build(args, None)[0]
    assert model.motion.video_qformer.layers[0].mlp.fc1.weight.dtype == torch.float16
    assert model.motion.video_qformer.dropout == model.motion.video_qformer.layers[1].cross_attention.dropout == 0.3
    assert {p.shape[0] for name, p in model.named_parameters() if name.endswith("lora_A")} == {3}
    assert not model.llama.lm_head.weight.requires_grad and model.config.lora_rank == 3


def test_place_cells_peak_where_the_thing_is():
    cells = train.place_cells(torch.tensor([[4 / 11, 10 / 23], [0.0, 1.0]]))
    columns, rows = cells.split(train.PLACE_CELLS, dim=-1)
    assert columns.argmax(-1).tolist() == [4, 0] and rows.argmax(-1).tolist() == [10, 23]
    assert columns.amax() == pytest.approx(1) and columns[0, 5] == pytest.approx(columns[0, 3]) and columns[0, 8] < 1e-6


def test_facts_without_words_teach_the_bridge_alone(world, tmp_path):
    run("train.py", *options(world, tmp_path, 3, "--stage", 1, "--ask-facts", 1, "--facts-only"))
    losses = log_of(tmp_path)[-1]
    assert {"kind", "object", "colour", "place", "total"} <= losses.keys() and "video_language" not in losses
    before, after = (Hawk.from_pretrained(folder).state_dict() for folder in (world / "weights", tmp_path / "last"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "motion.video_queries" in changed and not any(name.startswith(("llama", "vit")) for name in changed)


def test_every_sample_comes_once_an_epoch():
    args = train.parse_args(
        ["--preset", "tiny", "--data", "x", "--out", "y", "--steps", "6", "--batch-size", "4", "--accumulate", "2"]
    )
    one = [sum(step, []) for step in zip(*[iter(train.StepBatches(8, args, 0, 0, 1))] * 2, strict=True)]
    assert sorted(sum(one[:2], [])) == list(range(8)) and sorted(sum(one[2:4], [])) == list(range(8, 16))
    ranks = [list(train.StepBatches(8, args, 3, rank, 2)) for rank in (0, 1)]
    assert sorted(sum(ranks[0] + ranks[1], [])) == sorted(sum(one[3:], []))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--weights", "nowhere", "--data", "x"], "nowhere"),
        (["--preset", "tiny", "--data", "nowhere"], "nowhere"),
        (["--preset", "tiny", "--data", "x", "--batch-size", "3", "--accumulate", "2"], "--batch-size 3"),
    ],
)
def test_errors_are_one_line(tmp_path, flags, word):
    done = run("train.py", *flags, "--out", tmp_path, check=False)
    assert done.returncode and done.stderr.startswith("error:") and word in done.stderr and done.stderr.count("\n") == 1


def test_own_videos_as_the_readme_shows(tmp_path):
    """The walk-through's commands, as they stand there, in a folder that looks like the repository."""
    commands = (ROOT / "README.md").read_text().split("**Your own videos.**")[1].split("```")[1].strip("\n")
    for name in ("hawk.py", "data.py", "prepare.py", "train.py", "sample.py", "examples", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "Call the doctor: somebody lies on the ground."
