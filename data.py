"""From files to tensors."""

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from array import array
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

IGNORE = -100  # label of what is not learnt

# ---- 1. Video: decode, sample, motion --------------------------------------------------------------------------------
# Formats that hold a video in themselves, whatever the file is called. Not among them: playlists, concat scripts and
# image patterns, which open other files, and texts, which ffmpeg would draw.
CONTAINERS = "mov,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,asf,ogg,rm,gif,apng,nut,mxf,dv,wtv"
ONE_RUN_BYTES = 1 << 18  # smaller files are read in one run of ffmpeg: quicker than a first run that only looks
HELD_BYTES = 96 << 20  # of frames, at most, are held in that run
MOST_BYTES = 2 << 30  # of a run of ffmpeg: a kilobyte can declare frames and tables that need any amount
BLOCK = 3  # pairs of frames whose flow a thread computes at a time: more wait for memory, fewer for Python's lock
SEEK_MARGIN = 24  # frames before the wanted one, so that a seek never lands on a keyframe whose leading frames are lost
# Codecs in which decoding can start at a keyframe and be exact, and the kinds of NAL unit that such keyframes are.
CLEAN_KEYFRAMES = {"h264": "5", "hevc": "16-21", "vp9": None, "av1": None}


class VideoError(ValueError):
    """A file that gives no frames. The message is one line: "PATH: reason"."""

    def __init__(self, path, reason):
        super().__init__(" ".join(f"{path if isinstance(path, str) else os.fsdecode(path)}: {reason}".splitlines()))


@dataclass
class Clip:
    """T sampled frames; `motion` shows the same frames with everything that does not move blacked out."""

    appearance: np.ndarray  # (T, H, W, 3) uint8 RGB
    motion: np.ndarray  # (T, H, W, 3) uint8 RGB
    seconds: list  # T times, rounded to 0.1
    message: str  # stands before the question in the prompt
    indices: np.ndarray  # (T) frame numbers in the video


def read_clip(path, n_frames=32, image_size=224, motion="hard", sampling="uniform", generator=None):
    """Video file -> Clip of min(n_frames, total) frames. Raises VideoError.

    motion: "hard" or "soft" (see `motion_mask`), or "none": black, and no flow is computed.
    sampling: "uniform", or "headtail" (half from each half of the video, drawn with `generator`, a numpy Generator).
    """
    choose = lru_cache(lambda total: sample_frames(total, n_frames, sampling, generator))  # drawn once
    with _threads() as pool:
        frames, fps = _decode(path, image_size, lambda total: _Frames(choose(total), total, motion, pool))
        return frames.clip(fps)


def make_clip(frames, fps, indices, motion="hard"):
    """Clip of the frames with these numbers out of a list of all frames."""
    with _threads() as pool:
        wanted = _Frames(indices, len(frames), motion, pool)
        wanted.fill(enumerate(frames))
        return wanted.clip(fps)


class _Frames(dict):
    """{number: frame} of a clip: the chosen frames (`indices`) and their predecessors (together: `numbers`). Motion is
    computed in the threads of a pool, a block of pairs as soon as its last frame is put in: while others are decoded."""

    def __init__(self, indices, total, motion="none", pool=None):
        super().__init__()
        self.indices, self.motion, self.pool, self.masked = indices, motion, pool, []
        current = np.maximum(indices, 1)  # frame 0 has no predecessor: frame 1 stands in for it, as released
        self.numbers = [i for i in np.union1d(current - 1, current).tolist() if i < total]
        self.blocks = [] if motion == "none" else np.split(current, range(BLOCK, len(indices), BLOCK))

    def fill(self, numbered):
        """Puts in what is wanted of (number, frame) pairs -> how many there were."""
        count = 0
        for count, (number, frame) in enumerate(numbered, 1):  # noqa: B007
            if number not in self.numbers:
                continue
            self[number] = frame
            while self.blocks and all(i in self and i - 1 in self for i in self.blocks[0].tolist()):
                current = self.blocks.pop(0)
                pairs = (torch.from_numpy(np.stack([self[i] for i in which])) for which in (current - 1, current))
                self.masked.append(self.pool.submit(motion_mask, *pairs, self.motion))
        return count

    def clip(self, fps):
        appearance = np.stack([self[i] for i in self.indices])
        masked = np.concatenate([block.result().numpy() for block in self.masked] or [np.zeros_like(appearance)])
        seconds = [round(i / fps, 1) for i in self.indices.tolist()]
        message = f"The video contains {len(seconds)} frames sampled at {', '.join(map(str, seconds))} seconds. "
        return Clip(appearance, masked, seconds, message, self.indices)


def read_flow(path, indices, image_size=224):
    """The flow that the motion frames are made of: from the frame before to each numbered frame -> (T, H, W, 2) float32."""
    frames, _ = _decode(path, image_size, lambda total: _Frames(indices, total))
    current = np.maximum(indices, min(1, len(frames) - 1))  # frame 0 as in _Frames
    pairs = (torch.from_numpy(np.stack([frames[i] for i in which])) for which in (np.maximum(current - 1, 0), current))
    return farneback(*map(rgb_to_gray, pairs)).numpy() * (len(frames) > 1)  # a lone frame does not move


def sample_frames(total, n_frames, sampling="uniform", generator=None):
    """Ascending frame numbers, min(n_frames, total) of them."""
    n = min(n_frames, total)
    if sampling == "uniform":
        return np.arange(0, total, total / n).astype(int)[:n]  # float steps may give one too many
    if sampling != "headtail":
        raise ValueError(f'sampling must be "uniform" or "headtail", not {sampling!r}')
    head, tail = np.split(np.arange(total), [total // 2])
    drawn = [generator.choice(head, n // 2, replace=False), generator.choice(tail, n - n // 2, replace=False)]
    return np.sort(np.concatenate(drawn))


def _decode(path, size, begin):
    """-> (_Frames, frame rate). begin: from the number of all frames to the _Frames to be filled.

    Frames are, bit for bit, those of `ffmpeg -i PATH -vf scale=S:S:flags=bilinear -fps_mode passthrough`. A first run
    reads only the packets' times, and then nothing but the chosen frames is scaled and comes out of the runs that
    decode, so memory does not grow with the video's length. Of a small file one run gives both, if its frames are few.
    """
    if _check_file(path) < ONE_RUN_BYTES:
        most = HELD_BYTES // (3 * size * size)
        with _ffmpeg(path, size, table="all") as run:
            held = list(islice(run.frames(), most + 1))
            if len(held) <= most:
                run.check(len(held))
                frames = begin(len(held))
                frames.fill(enumerate(held))
                return frames, run.packets().rate
    with _ffmpeg(path, table="all") as run:
        run.process.wait()
        run.check(None if os.path.exists(f"{run.folder}/table") else 0)
        packets = run.packets()
    total, frames = max(1, len(packets.times)), None
    if packets.plain:
        frames = _seek(path, size, packets, begin(total)) or _select(path, size, packets, begin(total))
    return frames or _decode_through(path, size, total, begin), packets.rate


def _check_file(path):
    """Only a regular, readable file that is not empty goes to ffmpeg: a named pipe could block for ever. -> its size."""
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            raise ValueError("is a folder" if os.path.isdir(path) else "is not a regular file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise ValueError("is empty")
        return size
    except (OSError, ValueError) as error:
        raise VideoError(path, getattr(error, "strerror", None) or error) from None


def _decode_through(path, size, total, begin):
    """Decodes the whole video and keeps the chosen frames; `total` is a guess, the end of the run tells the truth."""
    for _ in range(2):
        frames = begin(total)
        with _ffmpeg(path, size) as run:
            count = frames.fill(enumerate(run.frames()))
            run.check(count)
        if count == total:
            return frames
        total = count
    raise VideoError(path, "changes its number of frames from one decoding to the next")


def _select(path, size, packets, frames):
    """Decodes the whole video, but only the wanted frames come out -> `frames`; None where a packet is no frame."""
    # flow, if it is computed meanwhile, takes as long as decoding a short video does
    threads = (torch.get_num_threads() + 1) // 2 if frames.blocks and len(packets.times) < 300 else None
    with _ffmpeg(path, size, times=packets.times[frames.numbers], threads=threads) as run:
        found = frames.fill(zip(frames.numbers, run.frames(), strict=False))
        run.process.wait()
        decoded = run.log(r".*Input stream #0:\d+ \(video\): .*; (\d+) frames decoded")
    return frames if found == len(frames.numbers) and decoded == [str(len(packets.times))] else None


def _seek(path, size, packets, frames):
    """Decodes only from the keyframe before each pair -> `frames`; None where that is not exact, fails or is slower."""
    if packets.container not in ("mov", "matroska") or packets.codec not in CLEAN_KEYFRAMES:
        return None
    groups = {}  # keyframe -> frame numbers that are decoded from there
    for number in frames.numbers:
        before = packets.keys <= max(0, number - SEEK_MARGIN)
        groups.setdefault(int(packets.keys[before][-1]), []).append(number)
    if sum(wanted[-1] - key + SEEK_MARGIN for key, wanted in groups.items()) > 0.7 * len(packets.times):
        return None
    if clean := CLEAN_KEYFRAMES[packets.codec]:
        with _ffmpeg(path, table=clean) as run:
            run.process.wait()
            if sum(not line.startswith("#") for line in run.lines("table")) != len(packets.keys):
                return None

    def decode(key, wanted):
        start = packets.times[max(key, wanted[0] - SEEK_MARGIN)] * packets.tick if key else None
        with _ffmpeg(path, size, times=packets.times[wanted], stop=True, start=start, threads=1) as run:
            return zip(wanted, list(run.frames()), strict=False)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = sum(map(frames.fill, pool.map(decode, groups, groups.values())))
    return frames if found == len(frames.numbers) else None  # a frame that is lost does not come out at its time


@contextmanager
def _ffmpeg(path, size=None, table=None, times=(), stop=False, start=None, stdin=None, threads=None):
    """One run of ffmpeg on one file -> _Run: no shell, no network, and an end with the `with` block.

    size: frames come out, all or those at `times` (ticks); with `stop` the run ends after the last of them. start: where
    to seek to (seconds). table: lists the packets, those that hold such kinds of NAL unit, or all. stdin: an open file
    that takes the place of `path`, and is waited for as long as it takes. threads: at most as many as torch has.
    """
    threads = min(threads or torch.get_num_threads(), 8)  # one in a loader worker
    options = f"-nostdin -hide_banner -nostats -v level+verbose -copyts -threads {threads} -filter_threads {threads} "
    options += "-max_pixels 100000000 -max_alloc 300000000 -protocol_whitelist file,pipe "
    options += f"-format_whitelist {CONTAINERS} "
    options += "" if start is None else f"-noaccurate_seek -seek_timestamp 1 -ss {start:.6f}"
    # a stream is waited for as long as it takes, a file is not
    limit = threading.TIMEOUT_MAX if stdin else 120 + _check_file(path) / 2e4
    source = "pipe:0" if stdin else "file:" + os.fsdecode(path)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), "-i", source]
    copy = "-an -sn -dn -c copy -copyinkf -copypriorss 1 -f framecrc".split()
    pipes = {"stdin": stdin or subprocess.DEVNULL, "stdout": subprocess.PIPE, "pipesize": 1 << 20}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "wb") as log:
        if table:
            which = [] if table == "all" else ["-bsf:v", f"filter_units=pass_types={table}"]
            command += [*copy, *which, f"file:{folder}/table"]
        if size:
            select = f"select='{'+'.join(f'eq(pts,{time})' for time in times)}'," if len(times) else ""
            command += ["-an", "-sn", "-dn", "-vf", f"{select}scale={size}:{size}:flags=bilinear"]
            command += ["-frames:v", str(len(times))] if stop else []
            command += "-fps_mode passthrough -f rawvideo -pix_fmt rgb24 pipe:1".split()
        with subprocess.Popen(command, stderr=log, **pipes) as process:
            with suppress(AttributeError, OSError, ValueError):  # not on Linux; or less is allowed already
                resource.prlimit(process.pid, resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            run = _Run(path, size, folder, process, threading.Timer(limit, process.kill))
            run.timer.start()
            try:
                yield run
            finally:
                run.timer.cancel()
                process.kill()


# What the container says, without decoding. times: when frame i is shown, ascending, in ticks of `tick` seconds; keys:
# numbers of the keyframes; rate: average, frames a second; plain: nothing speaks against each packet being one frame.
_Packets = namedtuple("_Packets", "container codec times keys tick rate plain")


@dataclass
class _Run:
    path: str
    size: int
    folder: str  # of the log and the tables
    process: subprocess.Popen
    timer: threading.Timer

    def frames(self):
        """Yields (size, size, 3) uint8 arrays as they come."""
        while True:
            frame = np.empty((self.size, self.size, 3), np.uint8)
            if self.process.stdout.readinto(frame.data.cast("B")) < frame.size:
                return
            yield frame

    def lines(self, name):
        with open(f"{self.folder}/{name}", encoding="utf-8", errors="replace") as file:
            yield from file

    def log(self, pattern):
        """What the pattern finds at the starts of the lines that ffmpeg printed."""
        return [found for line in self.lines("log") for found in re.findall("^" + pattern, line)]

    def header(self):
        """What is printed of the stream that is decoded: (container, codec, frames a second to two digits, seconds)."""
        container = [*self.log(r"\[info\] Input #0, (\w+)"), ""][0]
        stream = [*self.log(r"\[info\]   Stream (#0:\d+) -> #\d:0 "), "none"][0]
        codec = [*self.log(rf"\[info\]   Stream {stream}\b.*?: Video: (\w+)"), ""][0]
        rate = [*self.log(rf"\[info\]   Stream {stream}\b.*? ([\d.]+k?) (?:fps|tbr),"), "0"][0]
        hours, minutes, seconds = [*self.log(r"\[info\]   Duration: (\d+):(\d+):([\d.]+)"), (0, 0, 0)][0]
        return container, codec, float(rate.replace("k", "e3")), int(hours) * 3600 + int(minutes) * 60 + float(seconds)

    def check(self, n_frames=None):
        """At the end: raises VideoError if there was no frame, or if the file is cut."""
        if (code := self.process.wait()) < 0:
            raise VideoError(self.path, f"took too long or too much to read and was stopped (by signal {-code})")
        errors = self.log(r"(?:\[[^]]* @ [^]]*\] )*\[(?:error|fatal)\] (.*)")
        # also in the middle of a line: ffmpeg's threads write into each other's
        if self.log(r".*(?:stream \d+, offset 0x[0-9a-f]+: partial file|File ended prematurely)$"):
            after = f" after {n_frames} frames" if n_frames else ""
            raise VideoError(self.path, f"is cut short{after}; get the whole file again")
        pictures, opened = r"\[info\]   Stream #0:\d+.*?: Video: (?!.*\(attached pic\))", self.log(r"\[info\] Input #0")
        if opened and not self.log(pictures):
            raise VideoError(self.path, "holds no video stream")
        if n_frames and not opened:
            raise self.no_space()
        if n_frames == 0:
            reason = errors[0].split(" '")[0] if errors else "it has no frames"
            raise VideoError(self.path, f"cannot be read as a video ({reason})")

    def no_space(self):
        return OSError(errno.ENOSPC, "the temporary folder is full", self.folder)

    def packets(self):
        """Reads the tables. A packet's line: stream, dts, pts, duration, size, checksum, and flags unless just "key"."""
        rows, num, den = array("q"), 1, 1  # times, durations and flags, one after the other; of the tick
        for line in self.lines("table"):
            if not line.endswith("\n"):
                raise self.no_space()
            if line.startswith("#tb"):
                num, den = map(int, line.split()[-1].split("/"))
            elif not line.startswith("#"):
                fields = line.split(",")
                rows.extend((int(fields[2]), int(fields[3]), int(fields[6].strip()[2:], 16) if len(fields) > 6 else 1))
        times, durations, flags = np.array(rows).reshape(-1, 3).T
        order, duration = np.argsort(times), durations.sum(dtype=float)
        times, keys = times[order], np.flatnonzero(flags[order] & 1)
        plain = len(np.unique(times)) == len(times) and 0 in keys[:1] and not self.log(r".*\[error\]")
        plain = plain and not (flags & ~0x11).any()  # no other than "key" and "disposable"
        container, codec, printed_rate, _ = self.header()
        # The printed rate is rounded; the packets' durations, or NTSC's 1000/1001, give it exactly.
        rates = [len(times) * den / (duration * num)] if duration > 0 else []
        rates += [round(printed_rate * 1.001) * 1000 / 1001] if printed_rate else []
        near = (rate for rate in rates if abs(rate - printed_rate) < 0.0051)
        rate = next(near, printed_rate or (rates or [25.0])[0])
        return _Packets(container, codec, times, keys, num / den, rate, plain)


def motion_mask(previous, current, kind="hard"):
    """RGB frames (T, H, W, 3) uint8, tensors -> `current` with what does not move blacked out.

    kind: "hard" keeps the pixels whose flow is longer than 0.2 px (as released); "soft" multiplies each pixel with its
    flow's length, scaled to [0, 1] in each frame (paper, Eq. 4).
    """
    if kind not in ("hard", "soft"):
        raise ValueError(f'motion must be "hard", "soft" or "none", not {kind!r}')
    flow = farneback(rgb_to_gray(previous), rgb_to_gray(current))
    length = torch.hypot(flow[..., :1], flow[..., 1:])  # (T, H, W, 1)
    if kind == "hard":
        return current * (length > 0.2)
    return (current * (length / length.amax((-3, -2), keepdim=True).clamp(min=1e-6))).round().to(torch.uint8)


def rgb_to_gray(frames):
    """(…, 3) uint8 RGB -> (…) uint8: 0.299 R + 0.587 G + 0.114 B in OpenCV's 15-bit integers."""
    red, green, blue = frames.int().unbind(-1)
    return ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).to(torch.uint8)


def farneback(previous, current, *, pyr_scale=0.5, levels=3, winsize=10, iterations=3, poly_n=5, poly_sigma=1.2):
    """Dense optical flow of Farnebäck (2003): gray frames (…, H, W) -> (…, H, W, 2), x and y in pixels, float32.

    Equals cv2.calcOpticalFlowFarneback with a box window. Both frames are written, around every pixel, as a parabola
    f(u) = uᵀA u + bᵀu + c. If the second frame is the first one moved by d, then A is the same and b₂ = b₁ - 2A d, so
    that A d = (b₁ - b₂)/2: two equations for each pixel, solved by least squares over a window, from coarse to fine.
    """
    previous, current = torch.as_tensor(previous), torch.as_tensor(current)
    side = min(previous.shape[-2:])
    scales = [pyr_scale**k for k in range(levels + 1) if k == 0 or side * pyr_scale**k >= 32]

    def coarse_to_fine(previous, current):  # (B, H, W) -> (2, B, H, W)
        frames = torch.stack([previous.float(), current.float()])
        flow = frames.new_zeros(2, len(previous), 1, 1)  # where 2 is x and y; coarser than any scale
        for scale in reversed(scales):
            images = _blur_and_shrink(frames, scale)  # (2, B, h, w)
            flow = F.interpolate(flow, images.shape[-2:], mode="bilinear") / pyr_scale
            first, second = _polynomial_expansion(images, poly_n, poly_sigma)
            # Padded to 2ᵃ + 1 and 2ᵇ + 1, so that grid_sample's coordinates, -1…1, hold whole pixels exactly. Otherwise
            # what stands still at the left border is found at -0.000001 for some pixels, and that counts as outside.
            bottom, right = (2 ** max(n - 1, 1).bit_length() + 1 - n for n in images.shape[-2:])
            second = F.pad(second.transpose(0, 1), (0, right, 0, bottom))
            for _ in range(iterations):
                flow = _solve(_window_sums(_equations(first, second, flow), winsize), winsize)
        return flow

    pairs = [frames.reshape(-1, *frames.shape[-2:]) for frames in (previous, current)]
    blocks = [frames.split(BLOCK if frames.device.type == "cpu" else len(frames)) for frames in pairs]
    # Threads take whole blocks: single steps are too short to be worth dividing, and torch's own threads, which would do
    # that, wait for each other badly when the machine is busy. The result does not depend on the number of threads.
    with _threads() as pool:
        in_order = pool.map if len(blocks[0]) > 1 and torch.get_num_threads() > 1 else map
        flow = torch.cat([*in_order(coarse_to_fine, *blocks)], dim=1)
    return flow.permute(1, 2, 3, 0).reshape(*previous.shape, 2)


@contextmanager
def _threads():
    """A pool of as many threads as torch has, but three at most, in each of which torch has one."""
    threads = torch.get_num_threads()
    # What glibc gives back to the system at once grows with the largest block that was ever freed, up to 32 MB. Without
    # this each step of the flow gets new pages, 10% of a clip's time; with it each thread keeps 60 MB, so they are few.
    torch.empty(31 << 20, dtype=torch.uint8)
    pool = ThreadPoolExecutor(min(threads, 3), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _correlate(images, dim, weights, sign=1):
    """Weighted sums of 2n + 1 neighbours along a dimension, which gets shorter by 2n. The weights given are those at 0…n;
    at -n…-1 they are the same or, with sign -1, minus the same: then what is equal on both sides cancels exactly."""
    n = len(weights) - 1
    neighbours = images.unfold(dim, 2 * n + 1, 1).unbind(-1)
    total = neighbours[n] * weights[0]
    both = torch.empty_like(total)
    for k in range(1, n + 1):  # on a CPU faster than a convolution (14.6 ms a pair of frames instead of 16.4)
        torch.add(neighbours[n + k], neighbours[n - k], alpha=sign, out=both)
        total.add_(both, alpha=weights[k])
    return total


def _gaussian(n, sigma):
    """-> x = 0 … n, and the weights there of a Gaussian window of 2n + 1 whole numbers."""
    x = np.arange(n + 1)
    g = np.exp(-(x**2) / (2 * sigma**2))
    return x, g / (2 * g.sum() - g[0])


def _blur_and_shrink(images, scale):
    """(…, h, w) -> (…, h·scale, w·scale): a Gaussian blur with mirrored borders, then bilinear interpolation."""
    sigma = (1 / scale - 1) / 2
    n = max(round(sigma * 5) // 2, 1)
    weights = _gaussian(n, sigma)[1] if sigma else [0.5, 0.25]
    size = [round(length * scale) for length in images.shape[-2:]]
    padded = F.pad(images, (n, n, n, n), mode="reflect")
    blurred = _correlate(_correlate(padded, -1, weights), -2, weights)
    return F.interpolate(blurred, size, mode="bilinear") if sigma else blurred


def _polynomial_expansion(images, n, sigma):
    """(2, B, h, w) -> (2, 5, B, h, w): the parabola that fits best around each pixel, as halves of the coefficients of
    y, x, y², x² and a quarter of that of xy: what two frames share is then their sum, what differs their difference.

    The fit is weighted by a Gaussian g over the (2n+1)² neighbours. Its normal equations have the same small matrix
    everywhere, so the coefficients are correlations of the image with products of functions of x and of y.
    """
    x, g = _gaussian(n, sigma)
    m2, m4 = 2 * (x**2 * g).sum(), 2 * (x**4 * g).sum()
    mixed, second = np.linalg.inv([[1, m2, m2], [m2, m4, m2 * m2], [m2, m2 * m2, m4]])[:2, 1] / 2  # of 1, x², y²
    level, slope, bend = (g, 1), (x * g / m2 / 2, -1), (x**2 * g * second + g * mixed, 1)  # weights and sign
    padded = F.pad(images, (n, n, n, n), mode="replicate")
    levels, slopes, bends = (_correlate(padded, -1, *along_x) for along_x in (level, slope, bend))
    planes = (levels, slope), (slopes, level), (levels, bend), (bends, level), (slopes, slope)
    return torch.stack([_correlate(rows, -2, *along_y) for rows, along_y in planes], dim=1)


def _equations(first, second, flow):
    """The normal equations of A d = Δb for each pixel -> (5, B, h, w): AᵀA as yy, xy, xx, and AᵀΔb as y, x.

    `second` (B, 5, h, w and more) is read where the flow so far points to; A is the mean of both frames' and
    Δb = (b₁ - b₂)/2 + A·flow. Outside the frame A is the first one's alone and b₂ = 0. Near the border everything counts
    less. Planes are written in place wherever that can be: new memory for each would take as long as the sums do.
    """
    h, w = flow.shape[-2:]
    dx, dy = flow
    grid, outside = torch.empty_like(flow), torch.zeros_like(dx)
    steps = torch.arange(w, device=flow.device), torch.arange(h, device=flow.device)[:, None]
    for i, (n, padded) in enumerate(((w, second.shape[-1]), (h, second.shape[-2]))):
        at = flow[i] + steps[i]
        torch.mul(at, 2 / (padded - 1), out=grid[i]).sub_(1)  # now -1…1
        inner = at.clamp(0, np.nextafter(np.float32(n - 1), np.float32(0)).item())  # the last pixel is already outside
        outside += inner.sub_(at).abs_()
    outside.sign_()
    grid[0].add_(outside, alpha=1e6)  # so far off that zeros are read
    second = F.grid_sample(second, grid.permute(1, 2, 3, 0), padding_mode="zeros", align_corners=True).transpose(0, 1)
    b, A = second[:2], second[2:]
    torch.sub(first[:2], b, out=b)
    A.add_(first[2:]).mul_(outside.add_(1))
    (by, bx), (ayy, axx, axy) = b, A
    by.addcmul_(ayy, dy).addcmul_(axy, dx)
    bx.addcmul_(axx, dx).addcmul_(axy, dy)
    yy, xy, xx, y, x = equations = torch.empty(first.shape, device=flow.device)
    torch.add(ayy, axx, out=xy).mul_(axy)
    torch.mul(ayy, by, out=y).addcmul_(axy, bx)
    torch.mul(axy, by, out=x).addcmul_(axx, bx)
    axy.square_()
    torch.addcmul(axy, ayy, ayy, out=yy)
    torch.addcmul(axy, axx, axx, out=xx)
    return equations.mul_(_border_weight(h, w).to(flow.device))


@lru_cache
def _border_weight(h, w):
    """(h, w) squared weight of a pixel, by its distance to the border."""
    ramp = torch.cat([torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472]), torch.ones(max(h, w))])
    rows, columns = ((ramp[:n] * ramp[:n].flip(0)) ** 2 for n in (h, w))
    return rows[:, None] * columns


def _window_sums(planes, winsize):
    """(5, B, h, w) -> the same, summed over windows of 2·(winsize//2) + 1 squared, the border pixels repeated."""
    m = winsize // 2
    padded = F.pad(planes, (m, m, m, m), mode="replicate")
    return _neighbour_sums(_neighbour_sums(padded, -2, 2 * m + 1), -1, 2 * m + 1)


def _neighbour_sums(planes, dim, n):
    """Sums of n neighbours along a dimension, which gets shorter by n - 1: twice those of n // 2, and one if n is odd. Of
    11 neighbours that is 5 additions instead of 10: 0.51 instead of 0.74 ms for the sums of a pair at 224²."""
    if n == 1:
        return planes
    half, size = _neighbour_sums(planes, dim, n // 2), planes.shape[dim] - n + 1
    total = half.narrow(dim, 0, size) + half.narrow(dim, n // 2, size)
    return total.add_(planes.narrow(dim, n - 1, size)) if n % 2 else total


def _solve(equations, winsize):
    """2×2 systems, sums over windows (5, B, h, w) -> flow (2, B, h, w). 1e-3 is meant for sums divided by winsize²."""
    yy, xy, xx, y, x = equations
    determinant = (yy * xx).addcmul_(xy, xy, value=-1).add_(1e-3 * winsize**4)
    flow = equations.new_empty(2, *y.shape)
    torch.mul(yy, x, out=flow[0]).addcmul_(xy, y, value=-1)
    torch.mul(xx, y, out=flow[1]).addcmul_(xy, x, value=-1)
    return flow.div_(determinant)


# ---- 2. Text: tokenizer and prompts ----------------------------------------------------------------------------------
DESCRIBE_QUESTIONS = [  # asked in place of a row's own first question when the answer is the description
    "Can you describe the anomaly in the video?", "What is unusual in this video?",
    "Please describe what goes wrong in the video.", "Tell me about the abnormal event in this clip.",
    "Which abnormal event does the video show?",
    "Does anything out of the ordinary happen in the video, and what is it?",
    "Give a description of the anomaly that you see.", "How would you describe the strange event in this video?",
    "Explain what is abnormal in the clip.", "What happens in this video that should not happen?",
    "Describe any unexpected behaviour in the video.", "Summarise the anomaly in the video.",
    "What stands out as abnormal in this scene?", "Look at the video and report what is not normal.",
    "Could you say what anomaly occurs in the video?", "In a few words, what is odd about this clip?",
    "Write down what the abnormal event is and how it unfolds.", "What kind of anomaly can be seen in the video?",
    "Is there an anomaly in the video? Describe it.",
    "Please tell me in detail about the irregular event in the video.",
]  # fmt: skip

SYSTEM = " "  # the released system text: a single space
PROMPT_MARKER = re.compile(r"(\[(?=/?INST\])|<(?=</?SYS>>|/?Video>))")  # first character of a marker of the prompt


def plain_text(text):
    """What a user wrote, as text only: markers of the prompt are broken by a space, lone surrogates become "?".

    SentencePiece never makes a control token from text (`<s>` and the like come out as ordinary pieces), but `[/INST]`
    is ordinary text to LLaMA as well, and a question that holds it could close its own turn.
    """
    return PROMPT_MARKER.sub(r"\1 ", text).encode("utf-8", "replace").decode("utf-8")


def clean_caption(text, max_words=50):
    """Stage-1 captions as BLIP cleans them (released `BlipCaptionProcessor`): lower case, less punctuation."""
    text = re.sub(r'[.!"()*#:;~]', " ", text.strip().lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """SentencePiece plus one placeholder id for soft tokens, and the two formats that Hawk reads.

    Equals transformers 4.28's slow LLaMA tokenizer with an added `<ImageHere>`: text between control tokens is encoded
    piece by piece, and each piece starts with SentencePiece's dummy prefix (a space). Control ids are put in here and
    nowhere else, so that no text can produce one.
    """

    def __init__(self, path, vocab_size=None):
        """path: a `tokenizer.model`; vocab_size: how many pieces the model beside it knows. Raises ValueError if it has
        another number, or is not a SentencePiece model with <s> and </s>."""
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model (a complete tokenizer.model is needed)") from None
        self.vocab_size = self.image_id = self.sp.vocab_size()  # the placeholder is the first id after the vocabulary
        self.bos, self.eos, self.pad = self.sp.bos_id(), self.sp.eos_id(), 0
        if min(self.bos, self.eos) < 0:
            raise ValueError(f"{path}: the vocabulary has no <s> or no </s>")
        if vocab_size not in (None, self.vocab_size):
            raise ValueError(f"{path}: has {self.vocab_size} pieces, the model beside it {vocab_size}")

    def encode_conversation(self, qa, message="", n_visual=64, max_tokens=512, system=SYSTEM):
        """qa: rounds of {"q", "a"} -> (ids, labels), lists of at most max_tokens; labels are -100 but on the answers.

        Equals the released `preprocess_for_llama_v2`. A round whose answer is "" stays open: nothing follows `[/INST]`.
        """
        ids, labels = [], []

        def add(tokens, target=False):
            ids.extend(tokens)
            labels.extend(tokens if target else [IGNORE] * len(tokens))

        for i, turn in enumerate(qa):
            question, answer = plain_text((message if i == 0 else "") + turn["q"]), plain_text(turn["a"])
            add([self.bos])
            if i == 0:
                add(self.sp.encode(f"[INST] <<SYS>>\n{plain_text(system) or SYSTEM}\n<</SYS>>\n\n<Video>"))
                add([self.image_id] * n_visual)
                add(self.sp.encode(f"</Video> {question} [/INST]"))
            else:
                add(self.sp.encode(f"[INST] {question} [/INST]"))
            if answer:  # the dummy prefix of this piece is the space after [/INST]
                add(self.sp.encode(answer + " ") + [self.eos], target=True)
        return ids[:max_tokens], labels[:max_tokens]

    def encode_prompt(self, question, message="", n_visual=64, system=SYSTEM, history=()):
        """The ids of a conversation up to the answer that is to be generated. history: earlier (question, answer)."""
        qa = [{"q": q, "a": a} for q, a in [*history, (question, "")]]
        return self.encode_conversation(qa, message, n_visual, None, system)[0]

    def encode_caption(self, text, n_visual, max_tokens=32):
        """Stage 1: `<s>`, n_visual placeholders, then the cleaned caption and a line feed in at most max_tokens."""
        caption = self.sp.encode(clean_caption(plain_text(text)) + "\n")[:max_tokens]
        start = [self.bos] + [self.image_id] * n_visual
        return start + caption, [IGNORE] * len(start) + caption

    def decode(self, ids):
        """Token ids -> text; control tokens, padding and placeholders are left out."""
        text = (int(i) for i in ids if 0 < i < self.vocab_size)
        return self.sp.decode([i for i in text if not self.sp.is_control(i)]).strip()


# ---- 3. Datasets: index files, samples, batches ----------------------------------------------------------------------
SLOTS = ("car", "bus", "truck", "motorbike", "person", "cyclist", "dog", "bag", "fire", "crash")  # stage-0 targets
COLOURS = ("red", "blue", "green", "yellow", "white", "purple")
STILL = 0.25  # pixels: an object that moved less than this between two frames is absent from the motion frame


def read_index(path):
    """An index file (JSON lines) -> its rows, with absolute video paths. A bad line is a ValueError of one line."""
    rows, folder = [], os.path.dirname(os.path.abspath(path))
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    rows.append(check_row(json.loads(text, parse_constant=no_number)))
                    rows[-1]["video"] = os.path.join(folder, rows[-1]["video"])
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from None
    if not rows:
        raise ValueError(f"{path}: no rows; an index has one JSON object a line, with video and description or qa")
    return rows


def no_number(word):
    raise ValueError(f"{word} is no number")  # json's own reader takes NaN and Infinity


def check_row(row):
    """The row, or a ValueError that says which field is wrong."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    video, qa = row.get("video"), row.get("qa") or []
    if not isinstance(video, str) or not video or "\0" in video:
        raise ValueError('"video" must be the path of a file')
    texts = ("description", "motion", "source", "kind", "object", "colour", "place", "moment", "scene")
    lists = ("qa", "flags", "objects")
    for field, kind in (*((name, str) for name in texts), *((name, list) for name in lists)):
        if not isinstance(row.get(field), (kind, type(None))):
            raise ValueError(f'"{field}" must be a {"text" if kind is str else "list"}')
    if not all(isinstance(turn, dict) and isinstance(turn.get(key), str) for turn in qa for key in "qa"):
        raise ValueError('each entry of "qa" must be {"q": text, "a": text}')
    said = [row.get("description") or "", row.get("motion") or "", *(turn[key] for turn in qa for key in "qa")]
    if sum(map(len, said)) > 100_000:
        raise ValueError("more than 100,000 letters of text")
    for thing in row.get("objects") or ():
        check_object(thing)
    if not row.get("description") and not any(turn["a"] for turn in qa):
        raise ValueError('needs a "description", or "qa" with an answer')
    return row


def check_object(thing):
    """An entry of "objects": its slot, colour, and where it is in each frame of the video, None where it is not."""
    try:
        known = thing["object"] in SLOTS and thing["colour"] in (None, *COLOURS)
        pairs = zip(thing["x"], thing["y"], strict=True)
        known &= all({type(x), type(y)} <= {int, float} or x is y is None for x, y in pairs)
        known &= len(thing.get("lying") or thing["x"]) == len(thing["x"])
    except (AttributeError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError('each entry of "objects" must be {"object", "colour", "x", "y"} as the toy world has them')


def clip_generator(seed, epoch, index):
    """Everything random about a sample comes from here, so neither the worker nor the process can matter."""
    return np.random.default_rng([seed, epoch, index])


def random_crop(appearance, motion, generator, scale=(0.5, 1.0)):
    """Crop both streams by one rectangle, resize back. uint8 (T, 3, H, W) twice -> the same.

    A share `scale` of the area at an aspect of 3:4 to 4:3, cut off at the frame. (The released code draws a rectangle for
    each stream, with torchvision's RandomResizedCrop, and lets bicubic values that leave 0-255 wrap around.)
    """
    height, width = appearance.shape[-2:]
    share, aspect = generator.uniform(*scale), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    h, w = min(height, round(height * np.sqrt(share / aspect))), min(width, round(width * np.sqrt(share * aspect)))
    top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
    both = torch.cat([appearance, motion])[..., top : top + h, left : left + w].float()
    both = F.interpolate(both, size=(height, width), mode="bicubic", align_corners=False)
    return both.round().clamp(0, 255).to(torch.uint8).split(len(appearance))


class ClipDataset(torch.utils.data.Dataset):
    """Rows of an index and how their clips are read; what a clip is worth as a sample, the two classes below say."""

    def __init__(self, rows, n_frames, image_size, seed=0, train=True, motion="hard"):
        self.rows, self.n_frames, self.image_size = rows, n_frames, image_size
        self.seed, self.train, self.motion = seed, train, motion

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        """Sample `number`: they run on over the epochs, so that no worker has to be told which epoch it is."""
        epoch, i = divmod(number, len(self.rows))
        try:
            return self.sample(i, clip_generator(self.seed, epoch, i))
        except VideoError as error:
            return self.bad(i, str(error))

    def bad(self, i, reason):
        """In place of a sample: the loop lists and counts these; another clip never takes their place unseen."""
        return {"error": reason, "video": self.rows[i]["video"], "index": i}

    def read(self, i, sampling, generator):
        """-> (appearance, motion) uint8 tensors (T, 3, H, W), Clip"""
        clip = read_clip(self.rows[i]["video"], self.n_frames, self.image_size, self.motion, sampling, generator)
        frames = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (clip.appearance, clip.motion))
        return *frames, clip


class HawkDataset(ClipDataset):
    """Samples of stage 1 (caption and motion caption) and stage 2 (conversation).

    features: None, or a cache that stands in for the videos: `.choices` (variants of each clip, number 0 not cropped)
    and `.load(i, choice)` -> an object with .appearance, .motion (float tensors (T, queries, width)), .message, .indices.
    """

    def __init__(self, rows, tokenizer, n_frames, image_size, n_visual, stage, seed=0, train=True, augment=None,
                 motion="hard", features=None, max_tokens=512, motion_targets=False):  # fmt: skip
        super().__init__(rows, n_frames, image_size, seed, train, motion)
        self.tokenizer, self.n_visual, self.stage, self.max_tokens = tokenizer, n_visual, stage, max_tokens
        self.augment = train if augment is None else augment
        self.features, self.motion_targets = features, motion_targets or stage == 1
        self.facts = None  # long (rows, facts): what train.py may also ask of the soft tokens directly
        without = [row["video"] for row in rows if row.get("motion") is None] if self.motion_targets else []
        if without:
            raise ValueError(f'{len(without)} rows have no "motion" caption, the first is that of {without[0]}')

    def conversation(self, row, generator):
        """Half of the time the annotated rounds, else the description as the answer to the first of them."""
        qa = [turn for turn in row.get("qa") or [] if turn["a"]]  # a new list: the row itself is never edited
        description = row.get("description")
        if not self.train:
            return [{"q": DESCRIBE_QUESTIONS[0], "a": description}] if description else qa
        annotated = bool(qa) and generator.random() < 0.5
        question = DESCRIBE_QUESTIONS[generator.integers(len(DESCRIBE_QUESTIONS))]
        # as released, the later rounds stay
        return qa if annotated or not description else [{"q": question, "a": description}, *qa[1:]]

    def sample(self, i, generator):
        row, sample = self.rows[i], {"index": torch.tensor(i)}
        if self.facts is not None:
            sample["facts"] = self.facts[i]
        qa = self.conversation(row, generator)
        if self.features is not None:
            clip = self.features.load(i, int(generator.integers(self.features.choices)) if self.augment else 0)
            appearance, motion = clip.appearance, clip.motion
        else:
            sampling = "headtail" if self.stage == 1 and self.train else "uniform"
            appearance, motion, clip = self.read(i, sampling, generator)
            if self.augment:
                appearance, motion = random_crop(appearance, motion, generator)
        sample |= {"appearance": appearance, "motion": motion, "indices": torch.as_tensor(clip.indices).long()}
        if self.stage == 1:
            caption = row.get("description") or next(turn["a"] for turn in row["qa"] if turn["a"])
            ids, labels = self.tokenizer.encode_caption(caption, self.n_visual)
        else:
            ids, labels = self.tokenizer.encode_conversation(qa, clip.message, self.n_visual, self.max_tokens)
        if all(label == IGNORE for label in labels):
            return self.bad(i, f"{row['video']}: message and question leave no room for an answer in {len(ids)} tokens")
        sample |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if self.motion_targets:
            ids, labels = self.tokenizer.encode_caption(row["motion"], self.n_visual // 2)
            sample |= {"motion_input_ids": torch.tensor(ids), "motion_labels": torch.tensor(labels)}
        return sample


class FrameDataset(ClipDataset):
    """Stage 0: single frames with what is in them, from the toy rows' "objects" (positions per frame of the video), and
    the row's text without its video. Of the 2·T frames of a clip, `per_clip` are drawn: neighbours are alike."""

    def __init__(self, rows, tokenizer, n_frames, image_size, seed=0, train=True, motion="hard", per_clip=16):
        if motion == "none" or any(not row.get(field) for row in rows for field in ("objects", "description", "qa")):
            raise ValueError('stage 0 needs "objects", "description", "qa" in each row, as toy rows have, and motion')
        super().__init__(rows, n_frames, image_size, seed, train, motion)
        self.tokenizer, self.per_clip = tokenizer, per_clip

    def sample(self, i, generator):
        row = self.rows[i]
        appearance, motion, clip = self.read(i, "uniform", generator)
        if any(len(thing["x"]) <= max(clip.indices[-1], 1) for thing in row["objects"]):
            return self.bad(i, f'{row["video"]}: has more frames than positions in "objects"')
        targets, colours = frame_targets(row["objects"], clip.indices, self.image_size)
        drawn = generator.choice(len(targets), min(self.per_clip, len(targets)), replace=False)
        drawn = torch.from_numpy(np.sort(drawn))
        question = DESCRIBE_QUESTIONS[generator.integers(len(DESCRIBE_QUESTIONS))]
        qa = [{"q": question, "a": row["description"]}] if generator.random() < 0.5 else row["qa"]
        ids, labels = self.tokenizer.encode_conversation(qa, clip.message, 0)
        sample = {"index": torch.tensor(i), "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        frames = torch.cat([appearance, motion])[drawn]
        return sample | {"frames": frames, "targets": targets[drawn], "colours": colours[drawn]}


def frame_targets(objects, indices, image_size):
    """-> float (2T, SLOTS, 4): presence, x, y, lying; long (2T, SLOTS): colour or -100. T appearance frames, T motion frames.

    The motion frame of index i shows the step from frame i - 1 to i (from 0 to 1 for i = 0), so only what moved counts
    as present there; a fire flickers and always counts. Of two objects of one kind the first in the list is asked.
    """
    frames = [(int(i), False) for i in indices] + [(max(int(i), 1), True) for i in indices]
    targets = torch.zeros(len(frames), len(SLOTS), 4)
    colours = torch.full((len(frames), len(SLOTS)), IGNORE)
    for thing in objects:
        slot, x, y = SLOTS.index(thing["object"]), thing["x"], thing["y"]
        lying = thing.get("lying") or [False] * len(x)
        for row, (j, moving) in enumerate(frames):
            if x[j] is None or targets[row, slot, 0]:
                continue
            if moving and thing["object"] not in ("fire", "crash") and x[j - 1] is not None:  # what just came in moved
                if image_size * np.hypot(x[j] - x[j - 1], y[j] - y[j - 1]) <= STILL:
                    continue
            targets[row, slot] = torch.tensor([1.0, x[j], y[j], float(lying[j])])
            colours[row, slot] = IGNORE if thing["colour"] is None else COLOURS.index(thing["colour"])
    return targets, colours


def load_batches(dataset, order, workers, **options):
    """Yields the batches of `order`, lists of sample numbers, as DataLoader does. When a loader process dies (a system that
    runs out of memory kills), new ones go on after the last batch that came; OSError if that happens twice at one place."""
    come, failed = 0, -1
    options |= {"num_workers": workers, "generator": torch.Generator()}  # not the model's, whose dropout would change
    while True:
        loader = iter(DataLoader(dataset, batch_sampler=islice(order, come, None), **options))
        # torch's handler would raise in the midst of anything; without it the next batch tells
        if workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for batch in loader:
                yield batch
                come += 1
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # else it is an error of its own, not its end
                raise
            if failed == come:
                raise OSError(f"batch {come}: {error}") from error
            failed = come
            print(f"note: {error}; a new process goes on with batch {come}", file=sys.stderr)


def collate(samples, pad_id=0):
    """Samples -> one batch of tensors, plus "errors": the samples of clips that could not be read.

    Ids and labels are padded on the right. A clip of fewer frames repeats its last one: a still picture is something
    that the towers know, unlike a black frame, and the model needs no mask over frames.
    """
    good = [s for s in samples if "error" not in s]
    batch = {"errors": [s for s in samples if "error" in s]}
    for key in good[0] if good else ():
        values = [s[key] for s in good]
        if key.endswith(("input_ids", "labels")):
            batch[key] = pad_sequence(values, True, pad_id if key.endswith("input_ids") else IGNORE)
            continue
        if values[0].dim() > 0:
            longest = torch.arange(max(map(len, values)))
            values = [v[longest.clamp(max=len(v) - 1)] for v in values]
        batch[key] = torch.stack(values)
    return batch


# ---- 4. Feature cache: what `prepare.py features` writes -------------------------------------------------------------
class CachedFeatures:
    """Frame features (T, Q, C) of both branches for every row of an index, memory-mapped, so that all processes share
    them. A folder holds appearance.npy and motion.npy (rows, choices, T, Q, C), clips.jsonl (one line for each clip
    that is done) and meta.json. Raises ValueError when the cache was made with other weights or settings, or of clips of
    other names or sizes; the videos themselves need not be there any more."""

    def __init__(self, folder, rows, expected):
        """expected: the entries that meta.json must have, such as the fingerprint of the frozen weights."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            clips = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
            self.streams = [np.load(folder / name, mmap_mode="r") for name in ("appearance.npy", "motion.npy")]
            self.clips, self.choices = {(clip["row"], clip["choice"]): clip for clip in clips}, meta["choices"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{folder}: not a feature cache ({e}); make it with `python prepare.py features`") from e
        for key, value in {**expected, "videos": videos_digest(rows)}.items():
            if meta.get(key) != value:
                raise ValueError(f"{folder}: made with {key} {meta.get(key)!r}, this run has {value!r}; make it again")
        needed = {(i, k) for i in range(len(rows)) for k in range(self.choices)}
        done = len(needed & self.clips.keys())
        if done < len(needed):
            raise ValueError(f"{folder}: only {done} of {len(needed)} clips are done; run it again")
        if len(self.clips) > len(needed):
            raise ValueError(f"{folder}: clips.jsonl names clips that the index does not have; make it again")
        refuse_changed(folder, rows, clips)

    def load(self, i, choice):
        """Row i, variant `choice` -> Clip whose streams are features, float tensors (T, Q, C). VideoError if that video
        could not be read when the cache was made."""
        clip = self.clips[i, choice]
        if "error" in clip:
            raise VideoError(clip["video"], clip["error"])
        appearance, motion = (torch.tensor(x[i, choice, : len(clip["indices"])]) for x in self.streams)
        return Clip(appearance, motion, [], clip["message"], clip["indices"])


def refuse_changed(folder, rows, clips):
    """A ValueError if a video has another size than when the cache read it."""
    for path, size in ((rows[clip["row"]]["video"], clip.get("bytes")) for clip in clips):
        if size is not None and os.path.exists(path) and os.path.getsize(path) != size:
            raise ValueError(f"{folder}: {path} is another video now; make the cache again, in another folder")


def videos_digest(rows):
    """One number for the rows' videos and their order, by name: a folder may move."""
    names = "\n".join(os.path.basename(row["video"]) for row in rows)
    return hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def frozen_fingerprint(model):
    """SHA-256 over ViT and frame Q-Formers in float32: a cache made with other eyes is another cache."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("vit.") or name.split(".")[1] in ("ln_vision", "queries", "qformer"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().numpy().data)
    return digest.hexdigest()[:16]


# ---- 5. The command line and the machine -----------------------------------------------------------------------------
def settings(pairs):
    """Of `--set KEY=VALUE`: ["KEY=VALUE", …] -> {key: number, truth or text}, for HawkConfig.from_dict to judge."""
    values = dict(pair.partition("=")[::2] for pair in pairs)
    for key, text in values.items():
        values[key] = {"true": True, "false": False}.get(text.lower(), text)
        for number in (float, int):  # the last that fits stays
            with suppress(ValueError):
                values[key] = number(text)
    return values


def usable_device(name=None):
    """The torch.device of this name, by default the best there is; a ValueError where it cannot be used."""
    name = name or best_device()
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown to torch, or not in this machine
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def best_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def peak_memory_mb(device):
    """The most memory this process has held: of the GPU if the model is there, else of the machine."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
