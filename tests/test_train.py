"""The training loop on toy clips: it learns, it resumes where it was killed, and processes do not matter."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import imageio_ffmpeg
import pytest
import torch

import data
import prepare
import train
from apps import toy
from data import DESCRIBE_QUESTIONS, Tokenizer, read_index
from hawk import Hawk, HawkConfig
from sample import ask, load

ROOT = Path(__file__).parents[1]
SMALL = dict(vit_depth=1, vit_dim=64, vit_mlp=128, n_queries=10, llama_layers=2, image_size=56, n_frames=4)
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads sums in another order


def send(number, pid):
    """A signal to a process and to all that it has started: torchrun's processes have groups of their own."""
    everyone = [pid]
    for one in everyone:
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):
                everyone += map(int, file.read_text().split())
    for one in everyone:
        with suppress(ProcessLookupError):
            os.kill(one, number)


@contextmanager
def started(command, **options):
    """Popen, of which nothing runs on after the block, whatever happens in it."""
    options = dict(stderr=DEVNULL, cwd=ROOT, env=ENVIRONMENT, start_new_session=True) | options
    with Popen(command, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                send(signal.SIGKILL, process.pid)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(*command):
    command = [sys.executable, *map(str, command)]
    with started(command, stdout=DEVNULL, stderr=PIPE, text=True) as process:
        errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors[-2000:]


def run_two(*options):
    """train.py as two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = ENVIRONMENT | both | {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "train.py", *map(str, options)]
    with (
        started(command, env=both | {"RANK": "0"}, stderr=PIPE, text=True) as one,
        started(command, env=both | {"RANK": "1"}) as other,
    ):
        errors = one.communicate(timeout=240)[1]
        assert (one.returncode, other.wait(60)) == (0, 0), errors[-2000:]


def run_here(*options):
    """train.py in this process, with one thread: without the start of another."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train.run([*map(str, options)]) == 0
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def make_features(weights, folder, out):
    options = ["--weights", weights, "--data", folder, "--out", out, "--workers", 0, "--dtype", "float32"]
    prepare.main(["features", *map(str, options), "--device", "cpu"])


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four clips to learn and two held out, random small weights, and the cache of their frame features."""
    folder = tmp_path_factory.mktemp("world")
    assert toy.main(["--out", str(folder), *"--n-train 4 --n-test 2 --seed 5".split()]) == 0
    tokenizer = folder / "tokenizer.model"
    torch.manual_seed(0)
    config = vars(HawkConfig.preset("tiny")) | SMALL | {"vocab_size": Tokenizer(tokenizer).vocab_size}
    Hawk(HawkConfig(**config)).apply(train.init_weights).save_pretrained(
        folder / "weights", tokenizer=tokenizer
    )
    make_features(folder / "weights", folder, folder / "features")
    return folder


def options(world, out, steps, *more):
    """Command line of a short run from the cache."""
    start = ["--weights", world / "weights", "--data", world, "--features", world / "features", "--out", out]
    recipe = ["--train", "all", "--batch-size", 4, "--lr", 2e-3, "--warmup", 5, "--clip", 1, "--workers", 0]
    return [*start, *recipe, "--steps", steps, *more]


def test_four_clips_are_memorised_word_for_word(world, tmp_path):
    run_here(*options(world, tmp_path, 170, "--stage", 2, "--eval-every", 170))
    model, tokenizer = load(tmp_path / "last", "cpu")
    for row in read_index(world / "train.jsonl"):
        assert ask(model, tokenizer, row["video"], DESCRIBE_QUESTIONS[0]).answer == row["description"]
        assert ask(model, tokenizer, row["video"], row["qa"][0]["q"]).answer == row["qa"][0]["a"]
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 171))
    assert lines[-1]["total"] < 0.2 * lines[0]["total"]
    assert math.isfinite(lines[-1]["held_out_total"])


# ------------------------------------------------------------------------------------------------------------
# Killed and resumed


def kill_and_resume(command, out, signals, steps):
    """Starts the command again and again; each time a signal of `signals` ends it, with all its processes, a
    random moment after a few steps. Then lets it finish."""
    moments = random.Random(0)
    log = out / "log.jsonl"
    for number in signals:
        done = len(log_of(out)) if log.exists() else 0
        wanted = min(done + moments.randint(1, 5), steps - 1)
        with started(command) as process:
            until = time.monotonic() + 120
            while time.monotonic() < until and not (log.exists() and len(log_of(out)) >= wanted):
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            send(number, process.pid)
            status = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0, signal.SIGINT: 130}
            assert process.wait(120) == status[number]
            assert len(log_of(out)) < steps
    run(*command[1:])


def weights_of(folder):
    return (folder / "last" / "model.safetensors").read_bytes()


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_weights(world, tmp_path):
    """Three SIGKILLs, a SIGTERM and a ctrl-C, with a loader worker, dropout and LoRA."""
    more = ["--stage", 2, "--save-every", 2, "--resume", "--workers", 1, "--train", "lora"]
    more += ["--set", "lora_rank=2", "--set", "dropout=0.1"]
    commands = []
    for name in ("whole", "stopped"):
        commands.append([sys.executable, "train.py", *map(str, options(world, tmp_path / name, 36, *more))])
    signals = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    with started(commands[0]) as whole:  # side by side
        kill_and_resume(commands[1], tmp_path / "stopped", signals, 36)
        assert whole.wait(240) == 0
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "stopped")
    lines = log_of(tmp_path / "stopped")
    assert [line["step"] for line in lines] == list(range(1, 37))
    assert [line["total"] for line in lines] == [line["total"] for line in log_of(tmp_path / "whole")]


def test_a_killed_run_of_two_processes_ends_in_the_same_weights(world, tmp_path):
    more = ["--stage", 1, "--save-every", 3, "--resume", "--workers", 1]
    run_two(*options(world, tmp_path / "whole", 12, *more))
    command = [sys.executable, *TWO, *map(str, options(world, tmp_path / "killed", 12, *more))]
    kill_and_resume(command, tmp_path / "killed", [signal.SIGKILL], 12)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "killed")
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, 13))


def test_resume_refuses_other_options(world, tmp_path, capsys):
    """A run of stage 2 must not continue as one of stage 1 and overwrite its weights."""
    run_here(*options(world, tmp_path, 2, "--stage", 2))
    before = weights_of(tmp_path)
    assert train.run([*map(str, options(world, tmp_path, 1, "--stage", 2, "--resume"))]) == 2
    assert "error: --steps 1: this run is at step 2 already" in capsys.readouterr().err
    others = [("--stage", 1), ("--batch-size", 2), ("--seed", 5), ("--max-tokens", 99), ("--augment", True)]
    for option, value in others:
        change = [option] if value is True else [option, value]
        assert train.run([*map(str, options(world, tmp_path, 2, "--resume", *change))]) == 2
        assert f"error: {option} {value}: this run began with" in capsys.readouterr().err
    assert weights_of(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------
# Processes, epochs, videos


def test_two_processes_compute_what_one_does(world, tmp_path):
    run_here(*options(world, tmp_path / "one", 4, "--stage", 2))
    run_two(*options(world, tmp_path / "two", 4, "--stage", 2, "--accumulate", 2))
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("total", "video_language", "consistency", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)


def test_a_clip_counts_the_same_whatever_is_in_its_batch(world, tmp_path):
    """Two clips of four and two of two frames: in one batch, or one after the other; from the cache, too."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["video"] = str(world / row["video"])
        if i % 2:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", row["video"], "-frames:v", "2"]
            subprocess.run([*command, tmp_path / f"{i}.mp4"], check=True)
            row["video"] = str(tmp_path / f"{i}.mp4")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_features(world / "weights", tmp_path, tmp_path / "features")
    for features in (tmp_path / "features", ""):
        more = ["--stage", 2, "--data", tmp_path, "--features", features, "--train", "paper"]
        one, four = (tmp_path / f"{name}{bool(features)}" for name in ("one", "four"))
        run_here(*options(world, one, 3, *more))
        run_here(*options(world, four, 3, *more, "--accumulate", 4))
        for a, b in zip(log_of(one), log_of(four), strict=True):
            for name in ("total", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name, features)


def test_two_processes_train_three_branches(world, tmp_path, monkeypatch):
    """The third has no features that a loss compares: a weight without a gradient would end the run."""
    weights, cache = tmp_path / "weights", tmp_path / "features"
    third = ["--set", "branches=appearance,motion,again"]
    monkeypatch.setitem(data.MASKS, "again", data.MASKS["motion"])
    prepare.main(["merge", *map(str, ["--weights", world / "weights", "--out", weights, *third])])
    make_features(weights, world, cache)
    more = ["--weights", weights, "--features", cache, "--train", "paper"]
    run_here(*options(world, tmp_path / "one", 2, *more))
    run_two(*options(world, tmp_path / "two", 2, *more))
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two["total"] == pytest.approx(one["total"], rel=2e-3)


def test_every_sample_comes_once_an_epoch():
    flags = ["--preset", "tiny", "--data", "x", "--out", "y", "--steps", "6", "--batch-size", "4"]
    args = train.parse_args([*flags, "--accumulate", "2"], train.HawkTask())
    passes = list(train.micro_batches(8, args, 0, 0, 1))
    assert [len(numbers) for numbers in passes] == [2] * 12
    one = sum(passes, [])
    assert sorted(one[:8]) == list(range(8)) and sorted(one[8:16]) == list(range(8, 16))
    assert one[:8] != [number - 8 for number in one[8:16]]
    # two processes share each step, also when they start in the middle
    ranks = [sum(train.micro_batches(8, args, 3, rank, 2), []) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    assert sorted(ranks[0][:2] + ranks[1][:2]) == sorted(one[12:16])
    assert sorted(ranks[0] + ranks[1]) == sorted(one[12:])


def test_an_unreadable_video_is_listed_and_does_not_stop_the_run(world, tmp_path):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows = [row | {"video": str(world / row["video"])} for row in rows]
    rows.append(rows[0] | {"video": "gone.mp4"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = ["--weights", world / "weights", "--data", tmp_path, "--out", tmp_path / "run"]
    run("train.py", *start, "--steps", 5, "--batch-size", 1)  # each clip once, from the videos
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert len(bad) == 1 and bad[0]["video"].endswith("gone.mp4")
    assert "no such file" in bad[0]["error"].lower()
    totals = [line["total"] for line in log_of(tmp_path / "run")]
    assert len(totals) == 5 and totals.count(0.0) == 1  # that clip adds nothing


# ------------------------------------------------------------------------------------------------------------
# Starting


def test_rows_that_are_cut_are_counted(world, tmp_path, capsys):
    """A text loses its end where prompt, message and answer are longer than --max-tokens."""
    rows = [{"description": "A red car turns back. " * n, "motion": "car turns"} for n in (1, 20, 30)]
    rows = [row | {"video": f"{i}.mp4"} for i, row in enumerate(rows)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(world / "tokenizer.model")
    model = Hawk.from_pretrained(world / "weights")

    def said(*more, split="train"):
        start = ["--weights", str(world / "weights"), "--data", str(tmp_path), "--out", "x", "--steps", "1"]
        flags = [*start, *map(str, more)]
        task = train.HawkTask()
        args = train.parse_args(flags, task)
        samples = task.dataset(args, model, tokenizer, split)
        assert samples.max_tokens == args.max_tokens
        return capsys.readouterr().err

    answers = [len(tokenizer.sp.encode(row["description"])) for row in rows]
    assert answers[0] < 20 < 100 < answers[1] < answers[2] - 50
    between = (answers[1] + answers[2]) // 2
    prompt = len(tokenizer.encode_prompt(DESCRIBE_QUESTIONS[0])) + 4 * 6  # and the times of 4 frames
    assert said() == said("--max-tokens", 4096) == ""
    assert (
        said("--max-tokens", prompt + between) == f"note: --max-tokens {prompt + between} cuts 1 of 3 rows\n"
    )
    assert said("--max-tokens", prompt + 60) == f"note: --max-tokens {prompt + 60} cuts 2 of 3 rows\n"
    rows = [row | {"qa": [{"q": "Where?", "a": "There."}]} for row in rows]  # either may be drawn
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said("--max-tokens", prompt + 60) == f"note: --max-tokens {prompt + 60} cuts 2 of 3 rows\n"
    assert said("--max-tokens", 64, split="test") == said("--max-tokens", 64, "--stage", 1) == ""


def test_settings_reach_what_starts_from_weights():
    """--set reaches the modules, the LoRA has the rank asked for, and under autocast the weights keep the
    type that they are stored in, float16."""
    flags = ["--weights", str(ROOT / "weights" / "tiny"), "--data", "x", "--out", "y", "--steps", "1"]
    flags += ["--train", "lora"]
    flags += ["--set", "lora_rank=3", "--set", "dropout=0.3", "--dtype", "bfloat16"]
    task = train.HawkTask()
    args = train.parse_args(flags, task)
    model = task.objective(args, train.build(args, args.weights, torch.device("cuda"))[0], None)
    assert model.motion.video_qformer.layers[0].mlp.fc1.weight.dtype == torch.float16
    assert model.motion.video_qformer.layers[1].cross_attention.dropout == 0.3
    assert {p.shape[0] for name, p in model.named_parameters() if name.endswith("lora_A")} == {3}
    assert not model.llama.lm_head.weight.requires_grad and model.config.lora_rank == 3


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--weights", "nowhere", "--data", "x"], "nowhere"),
        (["--preset", "tiny", "--data", "nowhere"], "nowhere"),
        (["--preset", "tiny", "--data", "x", "--batch-size", "3", "--accumulate", "2"], "--batch-size"),
        (["--preset", "tiny", "--data", "x", "--save-every", "0"], "--save-every"),
        (["--preset", "tiny", "--data", "x", "--clip=-1"], "--clip, --min-lr and --warmup are not negative"),
        (["--preset", "tiny", "--data", "x", "--min-lr=-1"], "--clip, --min-lr and --warmup"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, flags, word):
    assert train.run([*flags, "--out", str(tmp_path), "--steps", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error:") and word in said and said.count("\n") == 1


def test_four_clips_of_your_own_as_the_readme_shows(tmp_path):
    """The commands as they stand there, in a folder that looks like the repository."""
    commands = (ROOT / "README.md").read_text().split("## Train something small")[1].split("```")[1]
    for name in ("hawk.py", "data.py", "prepare.py", "train.py", "sample.py", "examples", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = ["bash", "-euo", "pipefail", "-c", commands.strip("\n")]
    with started(shell, cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
        answer, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    assert answer.strip() == "Call the doctor: somebody lies on the ground."
