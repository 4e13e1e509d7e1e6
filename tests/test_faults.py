"""What befalls long jobs: a full disk, a folder that cannot be written, processes that die, videos that go away.

Nothing that was done is lost, and nothing half-written is taken for whole. Kills of train.py and apps.evaluate are in
their own test files.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, resource, runpy, sys, traceback
import data, hawk, sample, prepare, train
from apps import evaluate
for name in ("torch.utils.tensorboard", "matplotlib.pyplot"):  # what each run would import again
    try:
        __import__(name)
    except ImportError:
        pass
def child(job):
    os.setsid()
    os.environ.update(job["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    program, *sys.argv[1:] = job["command"]
    sys.argv[0] = program
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0
for line in sys.stdin:
    command, value = json.loads(line)
    if command == "start":
        pid = os.fork()
        if pid == 0:
            code = child(value)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(value, 0)[1]), flush=True)
"""


class Jobs:
    """Programs as processes of one that has imported torch already."""

    def __init__(self, folder):
        self.folder, self.n = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, *message):
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *command, largest_file=None, **environment):
        """-> (process number, path of its log without ".stderr")"""
        self.n += 1
        job = {"command": list(map(str, command)), "log": f"{self.folder}/{self.n}", "largest_file": largest_file}
        return self.ask("start", job | {"environment": environment}), job["log"]

    def wait(self, started):
        """-> (exit code, what it wrote to stderr)"""
        return self.ask("wait", started[0]), Path(f"{started[1]}.stderr").read_text()

    def run(self, *command, **options):
        return self.wait(self.start(*command, **options))

    def fails(self, *command, words, **options):
        """Runs what must fail with one line that says "error:" (beside a bar and notes)."""
        code, errors = self.run(*command, **options)
        said = [line for line in errors.replace("\r", "\n").split("\n") if "error: " in line]
        assert code in (1, 2) and len(said) == 1 and words in said[0] and "Traceback" not in errors, (code, errors)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("logs"))
    yield jobs
    jobs.server.stdin.close()
    jobs.server.wait(60)


@pytest.fixture(scope="module")
def world(world, jobs):
    """Weights, two clips, a folder "data" whose index names them again and again, and the cache of their features."""
    (world / "data").mkdir()
    rows = [
        {"video": f"../{name}.mp4", "description": f"A red car number {i}."} for i, name in enumerate(["a b", "c"] * 4)
    ]
    (world / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert jobs.run(*features(world, world / "features")) == (0, jobs_errors(jobs))
    return world


def jobs_errors(jobs):
    return Path(f"{jobs.folder}/{jobs.n}.stderr").read_text()


def features(world, out, *more):
    return ["prepare.py", "features", "--weights", world / "weights", "--data", world / "data", "--out", out, "--workers", 0,
            "--batch-size", 2, *more]  # fmt: skip


def training(world, out, steps, *more):
    return ["train.py", "--weights", world / "weights", "--data", world / "data", "--features", world / "features", "--out", out,
            "--steps", steps, "--batch-size", 2, "--workers", 0, "--save-every", 2, "--resume", *more]  # fmt: skip


def evaluation(world, out, *more):
    return ["apps.evaluate", "--annotations", world / "data/train.jsonl", "--weights", world / "weights", "--out", out, "--device",
            "cpu", "--workers", 0, "--batch-size", 2, "--max-new-tokens", 4, *more]  # fmt: skip


def merging(world, out, *more):
    return ["prepare.py", "merge", "--weights", world / "weights", "--out", out, *more]


def same_files(a, b, *names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


CACHE = ("train/appearance.npy", "train/motion.npy", "train/clips.jsonl", "train/meta.json")


# ----------------------------------------------------------------------------------------------------------------------
# A full disk


def test_training_on_a_full_disk_keeps_the_last_step_saved(world, jobs, tmp_path):
    assert jobs.run(*training(world, tmp_path / "whole", 4))[0] == 0
    assert jobs.run(*training(world, tmp_path / "run", 2))[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run/last").iterdir()}
    jobs.fails(*training(world, tmp_path / "run", 4), words="", largest_file=100)  # not even the log fits
    assert {file.name: file.read_bytes() for file in (tmp_path / "run/last").iterdir()} == before
    assert not (tmp_path / "run/last.tmp").exists()
    weights = before["model.safetensors"]
    jobs.fails(
        *training(world, tmp_path / "run", 4), words="run/last", largest_file=len(weights) + 1000
    )  # state.pt does not
    assert (tmp_path / "run/last/model.safetensors").read_bytes() == weights


def test_features_on_a_full_disk(world, jobs, tmp_path):
    jobs.fails(*features(world, tmp_path / "f"), words="no room for the cache", largest_file=2000)
    assert not list(tmp_path.glob("f/train/*.npy"))
    assert jobs.run(*features(world, tmp_path / "f"))[0] == 0 and same_files(tmp_path / "f", world / "features", *CACHE)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here (only root can)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_full_disk(world, jobs, small_disk):
    """Mapped files, above all: writing to one that has no room would kill the process without a word."""
    jobs.fails(*features(world, small_disk / "f"), words="no room for the cache")
    jobs.fails(*merging(world, small_disk / "m"), words="")
    jobs.fails(*training(world, small_disk / "t", 2), words="")
    assert (
        not (small_disk / "m").exists() and not (small_disk / "m.tmp").exists() and not (small_disk / "t/last").exists()
    )


def test_merging_on_a_full_disk_leaves_nothing(world, jobs, tmp_path):
    size = (world / "tokenizer.model").stat().st_size  # which is written first, and is the smaller file
    jobs.fails(*merging(world, tmp_path / "m"), words="m: cannot be written", largest_file=size + 9)
    assert not list(tmp_path.iterdir())


def test_evaluation_on_a_full_disk_goes_on_later(world, jobs, tmp_path):
    rows = [json.loads(line) for line in (world / "data/train.jsonl").read_text().splitlines()]
    index = world / "data/long.jsonl"  # answers larger than what ffmpeg writes about a clip
    index.write_text("".join(json.dumps(row | {"description": row["description"] * 80}) + "\n" for row in rows))
    assert jobs.run(*evaluation(world, tmp_path / "whole", "--annotations", index))[0] == 0
    jobs.fails(*evaluation(world, tmp_path / "out", "--annotations", index), words="File too large", largest_file=8000)
    assert 4000 < (tmp_path / "out").stat().st_size <= 8000
    assert jobs.run(*evaluation(world, tmp_path / "out", "--annotations", index))[0] == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Folders that cannot be written


@pytest.mark.parametrize("command", [features, training, evaluation, merging])
def test_a_place_that_cannot_be_written(world, jobs, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    more = [2] if command is training else []
    jobs.fails(*command(world, tmp_path / "file/out", *more), words="file")
    if os.geteuid():
        tmp_path.chmod(0o500)
        jobs.fails(*command(world, tmp_path / "out", *more), words="Permission denied")
        tmp_path.chmod(0o700)
    assert (tmp_path / "file").read_text() == "mine" and [f.name for f in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------------------------------------
# Processes that die


class Deadly(torch.utils.data.Dataset):
    """Its process is killed at number 5, as often as there are files in the folder."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, i):
        if i == 5 and (left := sorted(self.folder.iterdir())):
            left[0].unlink()
            time.sleep(0.5)  # until the batches before have been handed over
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_loader_process_that_is_killed(tmp_path, monkeypatch, capfd, deaths):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr("torch.utils.data.dataloader._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    for i in range(deaths):
        (tmp_path / str(i)).touch()
    order = [[2 * i, 2 * i + 1] for i in range(8)]
    batches = data.load_batches(Deadly(tmp_path), order, 1, collate_fn=list)
    if deaths == 1:
        assert list(batches) == order
    else:
        with pytest.raises(OSError, match="batch 2: DataLoader worker"):
            list(batches)
    assert capfd.readouterr().err.count("goes on with batch 2") == 1


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
def test_a_run_whose_loader_is_killed_ends_in_the_same_weights(world, jobs, tmp_path):
    """From the videos, so that the loader has something to do; the undisturbed run has no loader process at all."""
    command = [
        x for x in training(world, tmp_path / "run", 14, "--stage", 2) if x not in ("--features", world / "features")
    ]
    command[command.index("--workers") + 1] = 1
    started, killed = jobs.start(*command), []
    until = time.monotonic() + 120
    while not killed and time.monotonic() < until and Path(f"/proc/{started[0]}").exists():
        log = tmp_path / "run/log.jsonl"
        if log.exists() and log.read_text().count("\n") >= 2:
            killed = [p for p in children(started[0]) if b"ffmpeg" not in Path(f"/proc/{p}/cmdline").read_bytes()]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    code, errors = jobs.wait(started)
    assert code == 0 and killed and "a new process goes on" in errors, errors
    command[command.index("--out") + 1] = tmp_path / "whole"
    command[command.index("--workers") + 1] = 0
    assert jobs.run(*command)[0] == 0 and same_files(
        tmp_path / "run/last", tmp_path / "whole/last", "model.safetensors"
    )


def test_when_one_process_of_a_training_dies_the_other_ends(world, jobs, tmp_path):
    both = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29617",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": "0",
    }
    command = training(world, tmp_path / "run", 100_000, "--device", "cpu")
    ranks = [jobs.start(*command, **both, RANK=str(rank)) for rank in (0, 1)]
    until, last = time.monotonic() + 120, tmp_path / "run/last/state.pt"
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(ranks[1][0], signal.SIGKILL)
    assert jobs.wait(ranks[1])[0] == -signal.SIGKILL
    start = time.monotonic()
    code, errors = jobs.wait(ranks[0])
    assert code not in (0, None) and time.monotonic() - start < 60, errors
    done = torch.load(last, weights_only=True)["step"]
    assert jobs.run(*training(world, tmp_path / "run", done + 2))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_features_that_are_stopped_go_on(world, jobs, tmp_path, number):
    started, record = jobs.start(*features(world, tmp_path / "f", "--batch-size", 1)), tmp_path / "f/train/clips.jsonl"
    until = time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(started[0], number)
    assert jobs.wait(started)[0] == (-9 if number == signal.SIGKILL else 143)
    record.write_text(record.read_text() + '{"row": 7, "choi')  # torn, as a full disk would leave it
    assert jobs.run(*features(world, tmp_path / "f", "--batch-size", 1))[0] == 0
    for name in CACHE[:2]:
        ours, whole = (np.load(folder / name) for folder in (tmp_path / "f", world / "features"))
        np.testing.assert_allclose(ours, whole, atol=2e-3)  # batches of other sizes sum in another order
    assert len(record.read_text().splitlines()) == 8


# ----------------------------------------------------------------------------------------------------------------------
# Videos that go away, damaged states, the clock, other numbers of processes


def test_a_video_that_disappears_is_listed_and_read_when_it_is_back(world, jobs, tmp_path):
    gone = world / "c.mp4"
    content = gone.read_bytes()
    gone.unlink()
    try:
        assert jobs.run(*features(world, tmp_path / "f"))[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "f/train/clips.jsonl").read_text().splitlines()]
        assert ["No such file" in line.get("error", "") for line in lines] == [False, True] * 4
        command = training(world, tmp_path / "run", 2)
        command[command.index("--features") + 1] = tmp_path / "f"
        assert jobs.run(*command)[0] == 0 and "c.mp4" in (tmp_path / "run/bad_videos.jsonl").read_text()
        code, errors = jobs.run(*evaluation(world, tmp_path / "out"))
        assert code == 0 and errors.count("error: ") == 4 and "c.mp4: No such file" in errors
    finally:
        gone.write_bytes(content)
    assert jobs.run(*features(world, tmp_path / "f"))[0] == 0
    assert same_files(tmp_path / "f", world / "features", *CACHE[:2])
    assert jobs.run(*evaluation(world, tmp_path / "out"))[0] == 0
    assert (tmp_path / "out").read_text().count("\n") == 8


@pytest.mark.parametrize("name", ["clips.jsonl", "meta.json", "appearance.npy", "motion.npy"])
def test_a_damaged_cache_is_refused(world, jobs, tmp_path, name):
    shutil.copytree(world / "features", tmp_path / "f")
    file = tmp_path / "f/train" / name
    file.write_bytes(file.read_bytes()[:-9])
    rows = data.read_index(world / "data/train.jsonl")
    with pytest.raises(ValueError, match="not a feature cache|only 7 of 8"):
        data.CachedFeatures(tmp_path / "f/train", rows, {})


def test_a_cache_of_other_videos_is_refused(world, jobs, tmp_path):
    """Of the same names: the words of one would be learnt with the pictures of the other."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(json.dumps({"video": "v.mp4", "description": "A dog."}) + "\n")
    shutil.copy(world / "c.mp4", tmp_path / "data/v.mp4")
    here = ["--data", tmp_path / "data"]
    assert jobs.run(*features(world, tmp_path / "f", *here))[0] == 0
    shutil.copy(world / "a b.mp4", tmp_path / "data/v.mp4")
    jobs.fails(*features(world, tmp_path / "f", *here), words="v.mp4 is another video now")
    jobs.fails(*training(world, tmp_path / "t", 1, *here, "--features", tmp_path / "f"), words="v.mp4 is another video")
    (tmp_path / "data/v.mp4").unlink()
    assert jobs.run(*training(world, tmp_path / "t", 1, *here, "--features", tmp_path / "f"))[0] == 0


def test_features_of_nothing_or_nowhere(world, jobs, tmp_path):
    jobs.fails(*features(world, tmp_path / "f", "--data", tmp_path), words="holds neither train.jsonl nor test.jsonl")
    jobs.fails(*features(world, tmp_path / "f", "--device", "nowhere"), words="device 'nowhere' cannot be used")
    assert not (tmp_path / "f").exists()


def test_loader_processes_do_not_change_a_byte(world, jobs, tmp_path):
    assert jobs.run(*features(world, tmp_path / "f", "--workers", 2))[0] == 0
    assert same_files(tmp_path / "f", world / "features", *CACHE)


def test_no_wall_clock_decides_anything():
    """It may jump. (The judge needs it for the date that a server says to come back at.)"""
    for file in (*ROOT.glob("*.py"), *(ROOT / "apps").glob("*.py")):
        assert "time.time()" not in file.read_text() or file.name == "judge.py", file
