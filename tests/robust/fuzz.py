"""Damaged videos by the thousand: each must give a clip, or a VideoError of one line, within a time and a
memory.

    python tests/robust/fuzz.py                          # 2,000 files, two processes
    python tests/robust/fuzz.py --count 200 --seed 7 --workers 1 --keep failures

Small clips of a dozen formats are damaged (bits, bytes, numbers, pieces cut out, doubled, swapped, joined to
another clip), and `read_clip` reads them, some as if they were large or long. File i of a seed is always the
same. Prints one JSON object of counts; wrong outcomes (anything but a sound Clip or a VideoError, over time,
over memory) go to stderr, their files stay in --keep, and the exit status is then 1. Memory is the most that
a run of ffmpeg held, or the growth of the process that reads, whichever is larger."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads wait without spinning
import imageio_ffmpeg
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from data import Clip, VideoError, read_clip

X264 = "-c:v libx264 -preset ultrafast -g 4"
SEEDS = {  # clips that are damaged: how ffmpeg makes them
    "h264.mp4": X264, "fast.mp4": f"{X264} -bf 2 -movflags +faststart",
    "pieces.mp4": f"{X264} -movflags +frag_keyframe",
    "hevc.mp4": "-c:v libx265 -preset ultrafast -x265-params log-level=none", "h264.mkv": X264,
    "h264.ts": X264,
    "vp9.webm": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8", "mpeg4.avi": "-c:v mpeg4",
    "mpeg2.mpg": "-c:v mpeg2video -r 25",
    "mjpeg.mov": "-c:v mjpeg -pix_fmt yuvj420p", "flv.flv": "-c:v flv1", "moving.gif": "-pix_fmt rgb24",
    "raw.h264": X264,
    "wmv.asf": "-c:v wmv2", "theora.ogg": "-c:v libtheora", "pictures.apng": "-pix_fmt rgb24 -plays 0",
}  # fmt: skip
SIZE, FRAMES = 56, 4


def make_seeds(folder):
    """The clips, 48x32, 1.2 s at 10 frames a second -> their bytes. Codecs that this ffmpeg lacks are left
    out."""
    for name, options in SEEDS.items():
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-nostdin",
            "-v",
            "quiet",
            "-y",
            "-threads",
            "1",
            "-f",
            "lavfi",
        ]
        command += ["-i", "testsrc2=s=48x32:r=10", "-t", "1.2", *options.split(), str(folder / name)]
        subprocess.run(command, check=False)
    found = ((folder / name).read_bytes() for name in SEEDS if (folder / name).exists())
    return [content for content in found if content]


def damage(seeds, generator):
    """One damaged file: bytes."""
    content = bytearray(seeds[generator.integers(len(seeds))])

    def place(length=1):  # tables stand at the start or the end
        low, high = ((0, 1.0), (0, 0.1), (0.85, 1.0))[generator.integers(3)]
        return int(max(0, min(generator.uniform(low, high) * len(content), len(content) - length)))

    def piece():
        start = place()
        return start, start + int(2 ** generator.uniform(0, np.log2(len(content))))

    for _ in range(generator.integers(1, 5)):
        kind, (start, end) = generator.integers(9), piece()
        if kind == 0:
            for _ in range(generator.integers(1, 33)):
                content[place()] ^= 1 << generator.integers(8)
        elif kind == 1:
            content[start : start + 16] = generator.bytes(len(content[start : start + 16]))
        elif kind == 2:  # numbers that count, offset or measure something
            width, value = (
                (2, 0xFFFF),
                (4, 0xFFFFFFFF),
                (4, 0x7FFFFFFF),
                (4, 0),
                (4, 1 << 24),
                (8, 1 << 62),
            )[generator.integers(6)]
            at = place(width)
            content[at : at + width] = value.to_bytes(width, ("big", "little")[generator.integers(2)])
        elif kind == 3:
            del content[start:end]
        elif kind == 4:
            content[start:start] = content[start:end]
        elif kind == 5:
            content[start:start] = generator.bytes(int(generator.integers(1, 64)))
        elif kind == 6:
            content = content[: place()]
        elif kind == 7:
            other = seeds[generator.integers(len(seeds))]
            content = content[:start] + other[int(generator.integers(len(other))) :]
        else:
            content[start:end] = bytes(end - start)
        if not content:
            return b""
    return bytes(content)


class Overtime(BaseException):  # no Exception: nothing on the way may take it for its own
    pass


@contextmanager
def limited(seconds):
    """Raises Overtime in the block when it takes longer. For the main thread of a process."""

    def stop(*_):
        raise Overtime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_of(field, pid="self"):
    """VmHWM or VmRSS of a process in MB, 0 where there is no /proc or no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


class Watched(subprocess.Popen):
    """Notes how much memory the process has held at most: looked up while it runs, and reported by the system
    at its end. (That counts the parent's memory at its start, too, so it only tells where it is more.)"""

    peak_mb = 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        while self.returncode is None and (held := peak_of("VmHWM", self.pid)):
            Watched.peak_mb = max(Watched.peak_mb, held)
            time.sleep(0.003)

    def _try_wait(self, flags):
        pid, status, usage = os.wait4(self.pid, flags)
        if pid and usage.ru_maxrss / 1024 > 1.05 * peak_of("VmHWM"):
            Watched.peak_mb = max(Watched.peak_mb, usage.ru_maxrss / 1024)
        return pid, status


def outcome(path, **options):
    """What read_clip makes of a file: ("answered" | "refused" | "wrong", one line)."""
    try:
        clip = read_clip(path, FRAMES, SIZE, **options)
    except VideoError as error:
        message = str(error)
        sound = len(message.splitlines()) == 1 and message.startswith(
            " ".join(os.fsdecode(path).splitlines()) + ": "
        )
        return ("refused" if sound else "wrong"), message
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    T = len(clip.indices)
    sound = isinstance(clip, Clip) and 1 <= T <= FRAMES and T == len(clip.seconds)
    sound &= clip.appearance.shape == clip.motion.shape == (T, SIZE, SIZE, 3)
    sound &= clip.appearance.dtype == clip.motion.dtype == np.uint8
    sound &= bool(
        (np.diff(clip.indices) > 0).all() and np.isfinite(clip.seconds).all() and min(clip.seconds) >= 0
    )
    return ("answered" if sound else "wrong"), f"{T} frames, {clip.seconds}"


def try_one(number, seeds, args):
    """-> (outcome, what was said, seconds, MB, bytes of the file)"""
    torch.set_num_threads(1)
    data.HELD_BYTES = (96 << 20) if number % 2 else 6 * SIZE * SIZE * 3  # six frames: as if it were long
    data.SMALL_FILE = (1 << 20) if number % 4 else 0  # as if it were large
    subprocess.Popen, Watched.peak_mb = Watched, 0.0
    content = damage(seeds, np.random.default_rng([args.seed, number]))
    before = peak_of("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        path, start = f"{folder}/{number}.mp4", time.monotonic()
        Path(path).write_bytes(content)
        try:
            with limited(args.seconds):
                kind, said = outcome(path, sampling="uniform" if number % 3 else "headtail",
                                     generator=np.random.default_rng(number))  # fmt: skip
        except Overtime:
            kind, said = "wrong", f"more than {args.seconds:g} s"
    memory = max(Watched.peak_mb, peak_of("VmRSS") - before)
    if memory > args.megabytes:
        kind, said = "wrong", f"{memory:.0f} MB ({said})"
    return kind, said, time.monotonic() - start, memory, content


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=2000, help="files")
    p.add_argument("--first", type=int, default=0, help="number of the first file")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--seconds", type=float, default=60, help="for one file")
    p.add_argument("--megabytes", type=float, default=1000, help="for one file")
    p.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for the files of wrong outcomes"
    )
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
    counts, slowest, largest, start = Counter(answered=0, refused=0, wrong=0), 0.0, 0.0, time.monotonic()
    numbers = range(args.first, args.first + args.count)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        done = pool.map(partial(try_one, seeds=seeds, args=args), numbers, chunksize=4)
        try:
            for number, (kind, said, seconds, memory, content) in zip(numbers, done, strict=True):
                counts[kind] += 1
                slowest, largest = max(slowest, seconds), max(largest, memory)
                if kind == "wrong":
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{args.seed}-{number}.mp4").write_bytes(content)
                    print(f"wrong: file {number} of seed {args.seed}: {said}", file=sys.stderr, flush=True)
                if sys.stderr.isatty() and number % 10 == 9:
                    print(f"\r{sum(counts.values())} of {args.count}", end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # what was found so far counts
            pool.shutdown(wait=False, cancel_futures=True)
    figures = {"files": counts.total(), "seed": args.seed, "formats": len(seeds), **counts}
    figures |= {"slowest_s": round(slowest, 2), "largest_mb": round(largest)}
    figures |= {"minutes": round((time.monotonic() - start) / 60, 1)}
    print(json.dumps(figures))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
