"""From files to tensors: everything between an annotated video and a batch for the model.

1. Video     open (when is each frame shown?), sample, decode, flow, streams; all in read_clip(path) -> Clip
2. Text      the tokenizer, and the two formats that Hawk reads: conversations and captions
3. Datasets  index files (JSON lines), samples of both training stages, batches
4. Cache     reading the frame features that `python prepare.py features` wrote
5. Machine   helpers for the programs that use this file: sample.py, train.py and prepare.py"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import threading
from array import array
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from hawk import is_frame_level, require

# ---- 1. Video: open ----------------------------------------------------------------------------------------
# Formats that contain the video itself; no playlists, scripts or patterns, which open other files.
CONTAINERS = "mov,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,asf,ogg,rm,gif,apng,nut"
CONTAINERS += ",mxf,dv,wtv,dhav,yuv4mpegpipe,mjpeg,jpeg_pipe"
SUPPORTED = "mp4, mkv, webm, avi, ts, wmv, dav, y4m, mjpeg and so on, and folders of numbered pictures"
PICTURES = b"option pattern_type none\noption format_whitelist image2,jpeg_pipe,png_pipe,tiff_pipe,bmp_pipe\n"
MEMORY_LIMIT = 2 << 30  # bytes for one ffmpeg process: a tiny file can declare tables of any size
SMALL_FILE = 1 << 18  # bytes: smaller files are decoded completely right away, to save a run of ffmpeg
HELD_BYTES = 96 << 20  # of decoded frames, at most, that a Video keeps
SEEK_MARGIN = 24  # a seek aims this many frames early: decoding may depend on some of them
# Codecs that decode exactly from a keyframe on, and the NAL unit types of such keyframes (None: any).
CLEAN_KEYFRAMES = {"h264": "5", "hevc": "16-21", "vp9": None, "av1": None}
PACKETS = " -c copy -copyinkf -copypriorss 1 -f framecrc pipe:1"  # lists packets without decoding

# `seconds` of each frame since the first; `log`: ffmpeg's messages, one text per run; `notes` for the user;
# all `frames` if they are few, or the `files` of a folder. If the packet table can be trusted: `stamps` in
# ticks, `tick` in seconds, `keys` (keyframes), the `codec` if seeks may be exact; else the `promised` length.
FIELDS = "path seconds log notes frames files stamps tick keys codec promised"
Video = namedtuple("Video", FIELDS, defaults=(None,) * 8)
PROBLEMS = (ValueError, OSError, torch.OutOfMemoryError)  # a bad file or question, or too little memory


class VideoError(ValueError):
    """A video that yields no clip or no sample. The message is one line: "PATH: reason"."""

    def __init__(self, path, *reason):  # unpickled, it has its message as path
        super().__init__(" ".join(": ".join([os.fsdecode(path), *map(str, reason)]).splitlines()))


def check_file(path):
    """A file's size in bytes. VideoError if it is empty or not regular (a named pipe may never end)."""
    try:
        size = os.stat(path).st_size
        require(os.path.isfile(path), "is not a regular file")
        with open(path, "rb") as file:
            require(file.read(1), "is empty")
    except (OSError, ValueError) as error:
        raise VideoError(path, getattr(error, "strerror", None) or error) from None
    return size


def ffmpeg(path, log, size=None, terms=("1",), before="", after="", stdin=None, threads=0, patient=False):
    """Runs ffmpeg on one file, without shell or network, and yields lines (bytes): headers, then one per
    packet; or, given a size, frames that match a term of ffmpeg's `select`: (time in seconds, (size, size, 3)
    uint8 RGB). VideoError, maybe after the last item. log: a list that gets all messages as one text. before,
    after: options around the input. stdin: an open file instead. patient, stdin: no time limit."""
    seconds = threading.TIMEOUT_MAX if stdin else 120 + check_file(path) / 2e4  # a file's time limit
    source = "pipe:0" if stdin else "file:" + os.fsdecode(path)
    threads = min(threads or torch.get_num_threads(), 8)
    options = f"-nostdin -protocol_whitelist file,pipe -format_whitelist {CONTAINERS} -max_pixels 100000000"
    options += f" -max_alloc 300000000 -threads {threads} -filter_threads {threads} -hide_banner -nostats"
    options += f" -copyts -correct_ts_overflow 0 -v level+verbose {before} -i"  # keeps timestamps as they are
    times, times_end = os.pipe()  # for the timestamps of frames, one per line
    if size:
        rgb = ",format=rgb24" * ("concat" in before)  # where sizes differ, ffmpeg would scale twice
        after += f" -vf select='{'+'.join(terms)}',scale={size}:{size}:flags=bilinear{rgb}"
        after += f" -enc_time_base demux -stats_enc_pre pipe:{times_end} -stats_enc_pre_fmt {{pts}},{{tb}}"
    after += " -fps_mode passthrough -map_metadata -1 -f rawvideo -pix_fmt rgb24 pipe:1" if size else PACKETS
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), source, "-an", "-sn", "-dn", *after.split()]
    with open(times) as times, tempfile.TemporaryFile() as messages:
        pipes = {"stdin": stdin or DEVNULL, "stdout": PIPE, "stderr": messages, "pass_fds": [times_end]}
        with Popen(command, **pipes, process_group=0) as process:
            os.close(times_end)
            with suppress(AttributeError, OSError, ValueError):  # not on Linux, or the limit is lower already
                resource.prlimit(process.pid, resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
            clock = threading.Timer(threading.TIMEOUT_MAX if patient else seconds, process.kill)
            clock.daemon = True  # an unfinished generator must not keep Python from exiting
            clock.start()
            count = 0
            try:
                for item in read_frames(process.stdout, times, size) if size else process.stdout:
                    yield item
                    count += 1
                code = process.wait()
            finally:
                clock.cancel()
                process.kill()
        messages.seek(0)
        text = messages.read().replace(os.fsencode(source), b"").decode(errors="replace")
    text = re.sub(r"^(\[info\] {5}| +: ).*", "", text, flags=re.M)  # names and titles are not messages
    if log is not None:
        log.append(text)
    check_run(path, code, text, count)


def read_frames(pipe, times, size):
    frame = np.empty((size, size, 3), np.uint8)
    while pipe.readinto(frame) == frame.size:
        ticks, tick = times.readline().split(",")
        yield int(ticks) * Fraction(tick), frame.copy()


def check_run(path, code, log, count):
    """VideoError if ffmpeg was killed, the file is cut short or has no video, or `count` is 0 (no output)."""
    if code < 0:
        raise VideoError(path, f"exceeded the time or memory limit (ffmpeg ended by signal {-code})")
    cut = r"(?:stream \d+, offset 0x[0-9a-f]+: partial file|File ended prematurely)$"
    if count and re.search(cut, log, re.M):  # no ^: ffmpeg's threads write into each other's lines
        raise VideoError(path, "is cut short; get the whole file again")
    pictures = re.search(r"^\[info\]   Stream #0:\d+.*?: Video: (?!.*\(attached pic\))", log, re.M)
    if re.search(r"^\[info\] Input #0", log, re.M) and not pictures:
        raise VideoError(path, "has no video stream")
    if "Format not on whitelist" in log or (count == 1 and "Input #0, jpeg_pipe" in log):
        raise VideoError(path, f"cannot be read as a video; supported are {SUPPORTED}")
    if count == 0 and (failed := re.search(r" 0 frames decoded; ([1-9]\d*) decode errors", log)):
        raise VideoError(path, f"none of its {failed[1]} frames can be decoded; it is damaged or encrypted")
    if not count:
        error = re.search(r"^(?:\[[^]]* @ [^]]*\] )*\[(?:error|fatal)\] (.*?)(?: '.*)?$", log, re.M)
        hint = "; in a pipe, an mp4 needs its index in front: ffmpeg -movflags +faststart" * (path == "-")
        raise VideoError(path, f"cannot be read as a video ({error[1] if error else 'no frames'}){hint}")


def damage(video):
    """Notes on damage to the decoded frames. VideoError if most of them are damaged."""
    sound = r"^\[(?:aac|e?ac3|alac|flac|truehd|mlp|mp[23]|opus|vorbis|dca).*\n(?: +Last message.*\n)?"
    text = "".join(re.sub(sound, "", run, flags=re.M) for run in video.log)
    runs = re.findall(r"; (\d+) frames decoded; (\d+) decode errors", text)
    decoded, failed = np.array(runs, dtype=int).reshape(-1, 2).sum(0).tolist()
    concealed = re.findall(r"(?:corrupt decoded frame|overread.*)\n(?: +Last message repeated (\d+))?", text)
    bad = failed + sum(int(again or 0) + 1 for again in concealed)
    total = max(video.promised or 0, decoded + failed)
    bad += (total - decoded - failed) * (bad > 0)  # lost silently; if bad is 0, the table was just wrong
    if 2 * bad > total:
        raise VideoError(video.path, f"{bad} of {total} frames are damaged or encrypted")
    mild = r"mmco|co located|Application|.*\bref|no frame!|Invalid frame dim|decode_slice"  # if intact, too
    mild += "|[PS]PS|Error (?:con|par)|Skipping" * bool(re.search("PPS id o|SPS . does", text))  # cut HEVC
    errors = re.findall(rf"\[error\] (?!{mild})(.+)|(corrupt input packet)", text)
    notes = list(video.notes or ())
    if bad:
        notes.append(f"{bad} of {total} frames did not decode without errors: the video is damaged")
    elif errors:
        notes.append(f"the video may be damaged: {len(errors)} errors, first: {''.join(errors[0])}")
    sizes = dict.fromkeys(f"{w}x{h}" for w, h in re.findall(r"input from stream .*? w:(\d+) h:(\d+)", text))
    if video.files and (len(sizes) > 1 or "display matrix changed" in text):
        notes.append(f"several sizes or orientations (without EXIF: as the one before): {', '.join(sizes)}")
    return notes


def open_folder(path, fps):
    """Opens a folder of pictures -> Video, in order of their last numbers or, if these have gaps, of all."""
    numbered = {}
    try:
        for entry in os.scandir(path):
            found = re.fullmatch(r"(?!\._)(?:.*\D)?(\d+)\D*\.(?:jpe?g|png|tiff?|bmp)", entry.name, re.I)
            if found and entry.is_file(follow_symlinks=False):  # a link may lead out of the folder
                twin = numbered.setdefault(int(found[1]), entry)
                require(twin is entry, f"{twin.name} and {entry.name} have the same number; keep one series")
        require(numbered, "is a folder without numbered pictures (.jpg, .png, .tif, .bmp)")
    except (OSError, ValueError) as error:
        raise VideoError(path, getattr(error, "strerror", None) or error) from None
    order = sorted(numbered, key=lambda n: [int(digits) for digits in re.findall(r"\d+", numbered[n].name)])
    numbers = sorted(order) if max(order) - min(order) < len(order) else order  # say, date and time
    gaps = [f"{a + 1} to {b - 1}" for a, b in zip(numbers, numbers[1:], strict=False) if b > a + 1]
    notes = [f"{len(gaps)} gap(s) in the numbers of the pictures; first missing: {gaps[0]}"] if gaps else []
    return Video(path, np.arange(len(numbers)) / fps, [], notes, files=[numbered[n].path for n in numbers])


def read_files(video, size, numbers):
    """Yields (number, frame) of these pictures of a folder, decoded in turn by one ffmpeg process."""
    count = 0
    with tempfile.TemporaryFile() as listing:
        for number in numbers:  # each lasts a second; none may be a list of other files
            name = os.path.abspath(video.files[number])
            if re.search("[\r\n]", name):
                raise VideoError(name, "has a line break in its path; rename it")
            quoted = os.fsencode(name).replace(b"'", rb"'\''")
            listing.write(b"file 'file:%s'\nduration 1\n%s" % (quoted, PICTURES))
        listing.seek(0)
        before = "-f concat -safe 0 -format_whitelist concat"
        frames = ffmpeg(video.path, video.log, size, ("1",), before, stdin=listing)
        with suppress(VideoError), closing(frames):  # the error below names the picture
            for (stamp, frame), number in zip(frames, numbers, strict=False):
                if stamp != count:
                    break
                count += 1
                yield number, frame
    if count < len(numbers):
        raise VideoError(video.files[numbers[count]], "cannot be decoded, or not as the first one; remove it")


def open_video(path, size, fps=25):
    """Opens a video -> Video, from its packet table; decodes it all if it is small, or if a packet may not be
    exactly one frame with a time of its own. fps: pictures per second, in a folder. Raises VideoError."""
    if os.path.isdir(path):
        return open_folder(path, fps)
    if check_file(path) < SMALL_FILE:
        return decode_all(path, size)
    log = []
    header = {}
    table = array("q")  # timestamp and flags of each packet: 16 bytes a frame, even for a million frames
    for line in ffmpeg(path, log):
        fields = line.decode().replace(",", " ").split()
        if fields[0].startswith("#"):
            header[fields[0]] = fields[-1]
        else:  # stream, dts, pts, duration, size, checksum, and F=0x10 or so unless the flags are just "key"
            flags = [int(entry[2:], 16) for entry in fields if entry.startswith("F=")]
            table.extend((int(fields[2]), *(flags or [1])))
    packets = np.array(table, dtype=np.int64).reshape(-1, 2)
    stamps, flags = packets[np.argsort(packets[:, 0])].T  # they came in decoding order
    keys = np.flatnonzero(flags & 1)
    ordinary = not (flags & ~0x11).any()  # only "key" and "disposable": no packet is to be dropped
    if not np.diff(stamps).all() or not ordinary or not len(keys) or keys[0] > 0 or "[error]" in log[0]:
        return decode_all(path, size)
    tick = Fraction(header["#tb"])
    seconds = (stamps - stamps[0]) * float(tick.numerator) / tick.denominator
    seeks = re.search(r"^\[info\] Input #0, (mov|matroska),", log[0], re.M)
    return Video(path, seconds, [], stamps=stamps, tick=tick, keys=keys, codec=seeks and header["#codec_id"])


def decode_all(path, size):
    """Opens a video by decoding all of it -> Video, which is right even if the packet table is not."""
    seconds = []
    frames = []
    log = []
    for second, frame in stream_frames(path, size, patient=False, log=log):
        seconds.append(second)
        if len(frames) < HELD_BYTES // frame.size:
            frames.append(frame)
    held = len(frames) == len(seconds)
    return Video(path, np.array(seconds), log if held else [], frames=frames if held else None)


def stream_frames(path, size, stdin=None, patient=True, log=None):
    """Yields (seconds since the first frame, (size, size, 3) uint8 RGB) for all frames of a file in order, as
    they are decoded. Other arguments, and VideoError: as in `ffmpeg`."""
    previous = float("inf")
    step = Fraction(1, 25)
    shown = -step
    for stamp, frame in ffmpeg(path, log, size, stdin=stdin, patient=patient):
        step = stamp - previous if stamp > previous else step  # where time jumps back, the last step holds
        shown += step if stamp != previous else 0  # equal timestamps stay equal
        previous = stamp
        yield float(shown), frame


def even_times(seconds):
    """Times (T,) -> i / fps, as released, if one rate fits all to 1 ms (container precision); else as is."""
    numbers = np.arange(len(seconds))
    fps = numbers[-1] / max(seconds[-1], 1e-9)
    rates = [round(fps), round(fps * 1.001) * 1000 / 1001, fps]  # 30, NTSC's 30000/1001, or any other
    even = [numbers / rate for rate in rates if rate]
    return next((times for times in even if np.abs(times - seconds).max() < 0.00101), seconds)


# ---- 1. Video: sample and decode ---------------------------------------------------------------------------
def sample_frames(total, n_frames, sampling="uniform", generator=None):
    """min(n_frames, total) ascending frame numbers. sampling: "uniform", or "headtail": half of them
    drawn from each half of the video, with `generator` (numpy)."""
    n = min(n_frames, total)
    if sampling == "uniform":
        return np.arange(0, total, total / n).astype(int)[:n]  # rounding may give one too many
    require(sampling == "headtail", f'sampling must be "uniform" or "headtail", not {sampling!r}')
    head, tail = np.split(np.arange(total), [total // 2])
    drawn = [generator.choice(head, n // 2, replace=False), generator.choice(tail, n - n // 2, replace=False)]
    return np.sort(np.concatenate(drawn))


def decode(video, size, numbers):
    """Yields (number, frame) of these frames (ascending), bit for bit those of `ffmpeg -i PATH -vf
    scale=S:S:flags=bilinear -fps_mode passthrough`, no others. EOFError if the packet table is wrong."""
    # Seeking is exact from clean keyframes and, if there are many, faster than decoding everything.
    seeks = video.codec in CLEAN_KEYFRAMES and len(video.keys) >= len(numbers)
    if seeks and (clean := CLEAN_KEYFRAMES[video.codec]):
        table = ffmpeg(video.path, None, after=f"-bsf:v filter_units=pass_types={clean}")
        seeks = sum(not line.startswith(b"#") for line in table) == len(video.keys)
    if video.frames is not None:
        yield from ((number, video.frames[number]) for number in numbers)
    elif video.files:
        yield from read_files(video, size, numbers)
    elif seeks:
        yield from seek(video, size, numbers)
    else:
        # In a short video, optical flow, computed meanwhile, takes as long: each gets half of the threads.
        threads = torch.get_num_threads() // (2 if len(video.seconds) < 300 else 1)
        # ffmpeg's n restarts when the frame size changes: if packets proved wrong, we count all frames here.
        all_here = video.stamps is None
        wanted = ["1"] if all_here else [f"eq(n,{number})" for number in numbers]
        frames = ffmpeg(video.path, video.log, size, wanted, threads=threads)
        for (_, frame), number in zip(frames, range(sys.maxsize) if all_here else numbers, strict=False):
            if number in numbers:
                yield number, frame
        whole = next(frames, None) is None and f"; {len(video.seconds)} frames decoded;" in video.log[-1]
        if not whole or (not all_here and len(re.findall("input from stream .*? w:", video.log[-1])) > 1):
            raise EOFError


def seek(video, size, numbers):
    """As `decode`, but each run of neighbours is decoded from a keyframe before it, several at a time."""

    def decode_neighbours(wanted):
        terms = [f"eq(pts,{stamp})" for stamp in video.stamps[wanted]]
        start = float(int(video.stamps[max(0, wanted[0] - SEEK_MARGIN)]) * video.tick)
        before = f"-noaccurate_seek -seek_timestamp 1 -ss {start:.6f}" if wanted[0] > SEEK_MARGIN else ""
        after = f"-frames:v {len(wanted)}"
        with suppress(VideoError):  # counts as no frames found
            return list(ffmpeg(video.path, video.log, size, terms, before, after, threads=1))
        return []

    neighbours = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for wanted, found in zip(neighbours, pool.map(decode_neighbours, neighbours), strict=True):
            if [stamp for stamp, _ in found] != [int(stamp) * video.tick for stamp in video.stamps[wanted]]:
                raise EOFError  # a damaged frame is missing
            yield from zip(wanted.tolist(), (frame for _, frame in found), strict=True)
    if len(set(re.findall(" input from stream .*? (w:.*)", "".join(video.log)))) > 1:
        raise EOFError  # of several sizes: ffmpeg scales frames after a change differently


# ---- 1. Video: optical flow --------------------------------------------------------------------------------
BLOCK = 3  # frame pairs whose flow a thread computes at a time: more do not fit into the CPU cache


def in_threads(function, items):
    """As list(map(...)), in up to three threads (60 MB each), which start while later items are made."""
    threads = torch.get_num_threads()
    torch.empty(31 << 20, dtype=torch.uint8)  # and freed: glibc then reuses blocks of this size, 10% faster
    try:
        with ThreadPoolExecutor(min(threads, 3), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


def rgb_to_gray(frames):  # (..., 3) uint8 -> (...) uint8: 0.299 R + 0.587 G + 0.114 B, as OpenCV computes it
    red, green, blue = frames.int().unbind(-1)
    return ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).to(torch.uint8)


def farneback(previous, current, *, levels=3, winsize=10, iterations=3, poly_n=5, poly_sigma=1.2):
    """Optical flow (Farnebäck 2003): gray frames (..., H, W) -> (..., H, W, 2), x and y in pixels, float32.

    Equals cv2.calcOpticalFlowFarneback with a box window. At each pixel, both frames are approximated by a
    quadratic f(u) = uᵀA u + bᵀu + c. If the second is the first shifted by d, then f₂(u) = f₁(u - d),
    so A₂ = A₁ and b₂ = b₁ - 2 A d. Hence A d = (b₁ - b₂)/2: two equations a pixel, solved by
    least squares over a window. Large shifts are found in downscaled images first, then refined."""
    pairs = torch.stack([torch.as_tensor(frames).float() for frames in (previous, current)])
    scales = [0.5**k for k in range(levels + 1) if k == 0 or min(pairs.shape[-2:]) * 0.5**k >= 32]

    def coarse_to_fine(frames):  # (2, B, H, W) -> flow (2, B, H, W)
        flow = frames.new_zeros(2, frames.shape[1], 1, 1)
        for scale in reversed(scales):
            images = blur_and_shrink(frames, scale)  # (2, B, h, w)
            flow = 2 * F.interpolate(flow, images.shape[-2:], mode="bilinear")
            first, second = polynomial_expansion(images, poly_n, poly_sigma)  # (5, B, h, w) each
            # Padded to 2ᵃ + 1 pixels, so that grid_sample's coordinates, -1 to 1, hit whole pixels exactly.
            bottom, right = (2 ** max(n - 1, 1).bit_length() + 1 - n for n in images.shape[-2:])
            second = F.pad(second.transpose(0, 1), (0, right, 0, bottom))
            for _ in range(iterations):
                flow = improve(flow, first, second, winsize)
        return flow

    blocks = pairs.reshape(2, -1, *pairs.shape[-2:]).split(BLOCK if pairs.is_cpu else pairs.numel(), dim=1)
    in_order = in_threads if len(blocks) > 1 else map  # torch cannot split such short operations well
    flow = torch.cat([*in_order(coarse_to_fine, blocks)], dim=1)
    return flow.permute(1, 2, 3, 0).reshape(*pairs.shape[1:], 2)


def correlate(images, dim, weights, sign=1):
    """Weighted sums of 2n + 1 neighbours along a dimension, which shrinks by 2n. `weights` are for offsets
    0...n; those for -n...-1 mirror them, times `sign`. (Faster than a convolution on a CPU.)"""
    n = len(weights) - 1
    neighbours = images.unfold(dim, 2 * n + 1, 1).unbind(-1)
    total = neighbours[n] * weights[0]
    pair = torch.empty_like(total)  # one buffer for all: allocating takes as long as adding, and memory
    for k in range(1, n + 1):
        torch.add(neighbours[n + k], neighbours[n - k], alpha=sign, out=pair)
        total.add_(pair, alpha=weights[k])
    return total


def gaussian(n, sigma):
    """Weights at offsets 0...n of a Gaussian window of 2n + 1 pixels that sums to 1."""
    g = np.exp(-(np.arange(n + 1) ** 2) / (2 * sigma**2))
    return g / (2 * g.sum() - g[0])


def blur_and_shrink(images, scale):
    """(..., h, w) -> (..., h·scale, w·scale): a Gaussian blur with mirrored borders, then interpolation."""
    sigma = (1 / scale - 1) / 2
    n = max(round(sigma * 5) // 2, 1)
    weights = gaussian(n, sigma) if sigma else [0.5, 0.25]
    blurred = correlate(correlate(F.pad(images, (n, n, n, n), mode="reflect"), -1, weights), -2, weights)
    size = [round(length * scale) for length in images.shape[-2:]]
    return F.interpolate(blurred, size, mode="bilinear") if sigma else blurred


def polynomial_expansion(images, n, sigma):
    """(2, B, h, w) -> (2, 5, B, h, w): at each pixel, half of by, bx, ayy, axx, axy of the best quadratic
    f = c + by y + bx x + ayy y² + axx x² + 2 axy xy. (Half, so that two frames' sum is their mean.)

    Least squares over (2n + 1)² pixels with weights g. Odd moments vanish; m2 = Σ g x², m4 = Σ g x⁴:
        Σ g f y = m2 by        Σ g f x = m2 bx        Σ g f xy = m2² 2 axy
        Σ g f = c + m2 ayy + m2 axx        Σ g f y² = m2 c + m4 ayy + m2² axx        (for x² alike)
    The matrix is the same everywhere, so each coefficient is a correlation of the image with a function of x
    times one of y: g, g x / m2 (`slope`), or g x² mixed with g to solve the last equations (`bend`)."""
    x = np.arange(n + 1)
    g = gaussian(n, sigma)
    m2 = 2 * (x**2 * g).sum()
    m4 = 2 * (x**4 * g).sum()
    of_one, of_square = np.linalg.inv([[1, m2, m2], [m2, m4, m2 * m2], [m2, m2 * m2, m4]])[:2, 1]
    bend = (x**2 * of_square + of_one) * g / 2
    slope = x * g / m2 / 2
    padded = F.pad(images, (n, n, n, n), mode="replicate")
    levels = correlate(padded, -1, g)
    slopes = correlate(padded, -1, slope, sign=-1)
    by = correlate(levels, -2, slope, sign=-1)
    bx = correlate(slopes, -2, g)
    ayy = correlate(levels, -2, bend)
    axx = correlate(correlate(padded, -1, bend), -2, g)
    axy = correlate(slopes, -2, slope, sign=-1)
    return torch.stack([by, bx, ayy, axx, axy], dim=1)


def improve(flow, first, second, winsize):
    """Refines the flow (2, B, h, w). first: coefficients (5, B, h, w). second: (B, 5, padded h, w), sampled
    where the flow points. A is the mean of both; Δb = (b₁ - b₂)/2 + A·flow adds the d found so far.
    Outside the image, A is the first one's, and b₂ = 0. The normal equations AᵀA d = AᵀΔb, summed over
    windows of 2·(winsize//2) + 1 pixels, are a 2x2 system at each pixel."""
    h, w = flow.shape[-2:]
    dx, dy = flow
    x = dx + torch.arange(w, device=flow.device)
    y = dy + torch.arange(h, device=flow.device)[:, None]
    inside = ((x >= 0) & (x < w - 1) & (y >= 0) & (y < h - 1)).float()  # as in OpenCV, not the last pixel
    grid = torch.stack([x * (2 / (second.shape[-1] - 1)), y * (2 / (second.shape[-2] - 1))]).sub_(1)
    second = F.grid_sample(second, grid.permute(1, 2, 3, 0), align_corners=True).transpose(0, 1).mul_(inside)
    by, bx = first[:2] - second[:2]
    ayy, axx, axy = second[2:].add_(first[2:]).mul_(2 - inside)  # in place: allocating is slower
    by.addcmul_(ayy, dy).addcmul_(axy, dx)
    bx.addcmul_(axx, dx).addcmul_(axy, dy)
    equations = [(ayy * ayy).addcmul_(axy, axy), (ayy + axx).mul_(axy), (axx * axx).addcmul_(axy, axy)]
    equations += [(ayy * by).addcmul_(axy, bx), (axy * by).addcmul_(axx, bx)]
    # Pixels near the border count less, by OpenCV's factors.
    ramp = torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472] + [1.0] * max(h, w), device=flow.device)
    weight = ((ramp[:h] * ramp[:h].flip(0))[:, None] * ramp[:w] * ramp[:w].flip(0)) ** 2
    m = winsize // 2
    padded = F.pad(torch.stack(equations).mul_(weight), (m, m, m, m), mode="replicate")
    sums = padded.unfold(-2, 2 * m + 1, 1).sum(-1)  # fast in this direction only
    yy, xy, xx, by, bx = correlate(sums, -1, [1] * (m + 1))
    determinant = yy * xx - xy * xy + 1e-3 * winsize**4  # OpenCV's 1e-3 is for sums / winsize²
    return torch.stack([yy * bx - xy * by, xx * by - xy * bx]) / determinant


# ---- 1. Video: streams -------------------------------------------------------------------------------------
def moving(speed, kind):
    """Weight of each pixel in the motion stream, by its speed in pixels per frame, (T, H, W, 1). kind: "hard"
    keeps what is faster than 0.2 (as released), "soft" scales a frame's speeds to 0...1 (paper, Eq. 4)."""
    if kind == "hard":
        return speed > 0.2
    require(kind == "soft", f'motion_mask must be "hard" or "soft", not {kind!r}')
    return speed / speed.amax((-3, -2), keepdim=True).clamp(min=1e-6)


# What a branch sees: the frames times a weight, a function of (speed, kind); None: the frames as they are.
MASKS = {"appearance": None, "motion": moving}


@dataclass
class Clip:  # T sampled frames of a video, as each branch sees them
    streams: dict  # branch -> (T, H, W, 3) uint8 RGB; from a feature cache, float tensors (T, Q, C)
    seconds: list  # T times, rounded to 0.1
    message: str  # precedes the question in the prompt
    indices: np.ndarray  # (T) frame numbers in the video
    notes: list = field(default_factory=list)  # remarks about damage
    appearance = property(lambda self: self.streams["appearance"])
    motion = property(lambda self: self.streams["motion"])


def read_clip(path, n_frames=32, image_size=224, branches=("appearance", "motion"), motion_mask="hard",
              fps=25, device="cpu", **sampling):  # fmt: skip
    """Video file, or folder of numbered pictures -> Clip of min(n_frames, total) frames. Raises VideoError.
    branches: keys of MASKS; no flow is computed if none is masked. fps: pictures per second, in a folder.
    device: where the flow is computed. sampling: see `sample_frames`."""
    video = open_video(path, image_size, fps)
    for _ in range(2):
        indices = sample_frames(len(video.seconds), n_frames, **sampling)
        try:
            return clip_of(video, image_size, indices, branches, motion_mask, device)
        except EOFError:  # the packet table was wrong: decode everything
            video = decode_all(path, image_size)._replace(promised=len(video.seconds))
    raise VideoError(path, "changes its number of frames from one decoding to the next")


def clip_options(config):  # the options of read_clip for a model
    return {name: getattr(config, name) for name in ("n_frames", "image_size", "branches", "motion_mask")}


def clip_of(video, size, indices, branches, motion_mask, device="cpu"):
    """A Clip of these frames of a Video. Threads compute the flow of a block as soon as it is decoded."""
    for name in branches:
        require(name in MASKS, f"no stream is called {name!r}, only {', '.join(MASKS)} (data.MASKS)")
    masks = {name: MASKS[name] for name in branches if MASKS[name]}
    # Motion needs a previous frame. Frame 0 has none: frame 1 stands in for it, as released.
    last = len(video.seconds) - 1
    current = np.clip(indices, 1, last)  # a lone frame stays 0, and is its own previous one
    previous = np.maximum(current - 1, 0)
    wanted = np.unique([indices, previous, current] if masks else indices)  # in ascending order
    on_cpu = torch.device(device).type == "cpu"  # a GPU takes all pairs at once, after decoding
    step = BLOCK if on_cpu else len(indices)
    blocks = np.split(np.arange(len(indices)), range(step, len(indices), step)) if masks else []
    frames = {}

    def mask(block):
        pairs = [np.stack([frames[i] for i in numbers[block]]) for numbers in (previous, current)]
        before, after = (torch.from_numpy(x).to(device) for x in pairs)  # (B, H, W, 3)
        flow = farneback(rgb_to_gray(before), rgb_to_gray(after))
        speed = torch.hypot(flow[..., :1], flow[..., 1:]) * (last > 0)  # a lone frame does not move
        seen = {name: after * weigh(speed, motion_mask) for name, weigh in masks.items()}
        return {name: x.round().to(torch.uint8) for name, x in seen.items()}

    def decoded():
        for number, frame in decode(video, size, wanted.tolist()):
            frames[number] = frame
            while blocks and number >= current[blocks[0][-1]]:
                yield blocks.pop(0)

    masked = in_threads(mask, decoded()) if on_cpu else list(map(mask, decoded()))
    streams = {name: np.stack([frames[i] for i in indices]) for name in branches}
    streams |= {name: np.concatenate([block[name].cpu().numpy() for block in masked]) for name in masks}
    shown = [round(second, 1) for second in even_times(video.seconds)[indices].tolist()]
    message = f"The video contains {len(shown)} frames sampled at {', '.join(map(str, shown))} seconds. "
    return Clip(streams, shown, message, indices, damage(video))


# ---- 2. Text: tokenizer and prompts ------------------------------------------------------------------------
DESCRIBE_QUESTIONS = [  # asked in place of a row's own first question when the answer is the description
    "Can you describe the anomaly in the video?", "What is unusual in this video?",
    "Please describe what goes wrong in the video.", "Tell me about the abnormal event in this clip.",
    "Which abnormal event does the video show?",
    "Does anything out of the ordinary happen in the video, and what is it?",
    "Give a description of the anomaly that you see.",
    "How would you describe the strange event in this video?", "Explain what is abnormal in the clip.",
    "What happens in this video that should not happen?", "Describe any unexpected behaviour in the video.",
    "Summarise the anomaly in the video.", "What stands out as abnormal in this scene?",
    "Look at the video and report what is not normal.", "Could you say what anomaly occurs in the video?",
    "In a few words, what is odd about this clip?",
    "Write down what the abnormal event is and how it unfolds.",
    "What kind of anomaly can be seen in the video?", "Is there an anomaly in the video? Describe it.",
    "Please tell me in detail about the irregular event in the video.",
]  # fmt: skip
SYSTEM = " "  # the released system text: a single space
IGNORE = -100  # label of a token that is left out of the loss
MARKER = re.compile(r"(\[(?=/?INST\])|<(?=</?SYS>>|/?Video>))")  # first character of a marker of the prompt


def plain_text(text):
    """Makes user text harmless: a space breaks the prompt's own markers, lone surrogates become "?".
    (SentencePiece makes no control tokens of text, but `[/INST]`, plain text to LLaMA, would end a turn.)"""
    return MARKER.sub(r"\1 ", text).encode("utf-8", "replace").decode("utf-8")


class Tokenizer:
    """SentencePiece, and a placeholder id for soft tokens. Equals transformers 4.28's slow LLaMA tokenizer
    with `<ImageHere>` added: text between control tokens is encoded separately, after a dummy space."""

    def __init__(self, path, vocab_size=None):
        """path: a tokenizer.model. vocab_size: that of the model beside it. ValueError if it differs."""
        require(os.path.isfile(path), f"{path}: no such tokenizer file")
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model; get the whole tokenizer.model") from None
        self.vocab_size = self.sp.vocab_size()
        self.image_id = self.vocab_size  # the placeholder follows the vocabulary
        self.bos = self.sp.bos_id()
        self.eos = self.sp.eos_id()
        require(min(self.bos, self.eos) >= 0, f"{path}: the vocabulary has no <s> or no </s>")
        fits = vocab_size in (None, self.vocab_size)
        require(fits, f"{path}: has {self.vocab_size} pieces, the model beside it {vocab_size}")

    def encode_conversation(self, qa, message="", n_visual=64, max_tokens=512, system=SYSTEM):
        """Rounds of {"q", "a"} -> (ids, labels), at most max_tokens; labels are IGNORE except for answers.
        Equals the released `preprocess_for_llama_v2`. A round whose answer is "" ends with `[/INST]`."""
        ids = []
        labels = []
        for turn in qa:
            if not ids:
                start = f"[INST] <<SYS>>\n{plain_text(system) or SYSTEM}\n<</SYS>>\n\n<Video>"
                prompt = self.sp.encode(start) + [self.image_id] * n_visual
                prompt += self.sp.encode(f"</Video> {plain_text(message + turn['q'])} [/INST]")
            else:
                prompt = self.sp.encode(f"[INST] {plain_text(turn['q'])} [/INST]")
            answer = self.sp.encode(plain_text(turn["a"]) + " ") + [self.eos] if turn["a"] else []
            ids += [self.bos] + prompt + answer  # the answer's dummy prefix is the space after [/INST]
            labels += [IGNORE] * (1 + len(prompt)) + answer
        return ids[:max_tokens], labels[:max_tokens]

    def encode_prompt(self, question, message="", n_visual=64, system=SYSTEM, history=()):
        """The prompt's ids, up to the answer to be generated. history: earlier (question, answer) pairs."""
        qa = [{"q": q, "a": a} for q, a in [*history, (question, "")]]
        return self.encode_conversation(qa, message, n_visual, None, system)[0]

    def encode_caption(self, text, n_visual, max_tokens=32):
        """Stage 1 -> (ids, labels): `<s>`, placeholders, up to max_tokens of the caption + "\\n", in lower
        case, without most punctuation, at most 50 words, as the released `BlipCaptionProcessor` does it."""
        text = re.sub(r'[.!"()*#:;~]', " ", plain_text(text).strip().lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        caption = self.sp.encode(" ".join(text.split(" ")[:50]) + "\n")[:max_tokens]
        start = [self.bos] + [self.image_id] * n_visual
        return start + caption, [IGNORE] * len(start) + caption

    def decode(self, ids):
        """Token ids -> text, without control tokens, padding and placeholders."""
        known = [i for i in map(int, ids) if 0 < i < self.vocab_size and not self.sp.is_control(i)]
        return self.sp.decode(known).strip()


# ---- 3. Datasets: index files, samples, batches ------------------------------------------------------------
def read_index(path):
    """An index file (JSON lines) -> its rows, with absolute video paths. ValueError names a bad line."""
    rows = []
    folder = os.path.dirname(os.path.abspath(path))
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    row = check_row(json.loads(text, parse_constant=int))  # NaN is not JSON: int rejects it
                    rows.append(row | {"video": os.path.join(folder, row["video"])})
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from None
    require(rows, f"{path}: no rows; an index has one JSON object a line, with video and description or qa")
    return rows


def check_row(row):
    """Returns the row, or raises a ValueError that says which field is wrong."""
    require(isinstance(row, dict), "not a JSON object")
    row = {key: value for key, value in row.items() if not (isinstance(value, str) and value.isspace())}
    video = row.get("video")
    require(isinstance(video, str) and video and "\0" not in video, '"video" must be the path of a file')
    for name in ("description", "motion", "source", "kind"):
        require(isinstance(row.get(name), str | None), f'"{name}" must be a text')
    for name in ("qa", "flags"):
        require(isinstance(row.get(name), list | None), f'"{name}" must be a list')
    fps = row.get("fps", 25)
    require(type(fps) in (int, float) and 0 < fps < 1e6, '"fps" must be a positive number')
    said = [isinstance(turn, dict) and turn.get(key) for turn in row.get("qa") or [] for key in ("q", "a")]
    require(all(isinstance(text, str) for text in said), 'each entry of "qa" must be {"q": text, "a": text}')
    texts = [row.get("description") or "", row.get("motion") or "", *said]
    require(sum(map(len, texts)) <= 100_000, "more than 100,000 characters of text")
    require(texts[0] or any(map(str.strip, said[1::2])), 'needs a "description", or "qa" with an answer')
    return row


def clip_generator(seed, epoch, index):  # of all that is random in a sample; worker and process do not matter
    return np.random.default_rng([seed, epoch, index])


def random_crop(streams, generator, scale=(0.5, 1.0)):
    """{name: uint8 (T, 3, H, W)} -> the same, all cropped to one rectangle and resized back, as torchvision's
    RandomResizedCrop. (The released code draws one for each stream, and lets values beyond 0...255 wrap.)"""
    height, width = next(iter(streams.values())).shape[-2:]
    share = generator.uniform(*scale)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    h = min(height, round(height * np.sqrt(share / aspect)))
    w = min(width, round(width * np.sqrt(share * aspect)))
    top = int(generator.integers(height - h + 1))
    left = int(generator.integers(width - w + 1))
    cropped = {}
    for name, frames in streams.items():
        part = frames[..., top : top + h, left : left + w].float()
        cropped[name] = F.interpolate(part, (height, width), mode="bicubic").round().clamp(0, 255).byte()
    return cropped


class HawkDataset(torch.utils.data.Dataset):
    """Rows of an index -> samples of stage 1 (caption and motion caption) or stage 2 (conversation), dicts of
    tensors. A subclass may define another sample(i, generator)."""

    def __init__(self, rows, tokenizer, config, stage=2, seed=0, train=True, augment=True, features=None,
                 max_tokens=512, motion_targets=False):  # fmt: skip
        """augment: random crops, in training. features: CachedFeatures, which replace the videos.
        motion_targets: the motion caption is a target in stage 2 too, as the paper describes."""
        self.rows = rows
        self.tokenizer = tokenizer
        self.config = config
        self.stage = stage
        self.seed = seed
        self.train = train
        self.augment = augment and train
        self.features = features
        self.max_tokens = max_tokens
        self.device = "cpu"  # where the flow is computed: a GPU only outside of loader processes
        self.motion_targets = (motion_targets or stage == 1) and "motion" in config.branches
        without = [row["video"] for row in rows if self.motion_targets and row.get("motion") is None]
        advice = f"(such as that of {without[:1]}); python -m apps.captions DIR adds them"
        require(not without, f'{len(without)} rows have no "motion" caption {advice}')

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        """Sample numbers continue across epochs, so that no loader worker has to be told the epoch."""
        epoch, i = divmod(number, len(self.rows))
        try:
            return self.sample(i, clip_generator(self.seed, epoch, i))
        except VideoError as error:
            # In place of a sample: the training loop reports it, and no other clip silently replaces it.
            return {"error": str(error), "video": self.rows[i]["video"], "index": i}

    def read(self, i, sampling, generator):
        """-> ({branch: uint8 tensor (T, 3, H, W)}, Clip)"""
        more = clip_options(self.config) | {"sampling": sampling, "generator": generator}
        clip = read_clip(self.rows[i]["video"], fps=self.rows[i].get("fps", 25), device=self.device, **more)
        streams = {name: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for name, x in clip.streams.items()}
        return streams, clip

    def sample(self, i, generator):
        row = self.rows[i]
        qa = self.conversation(row, generator)
        if self.features:
            choice = int(generator.integers(self.features.choices)) if self.augment else 0
            clip = self.features.load(i, choice)
            streams = clip.streams
        else:
            sampling = "headtail" if self.stage == 1 and self.train else "uniform"
            streams, clip = self.read(i, sampling, generator)
            streams = random_crop(streams, generator) if self.augment else streams
        n_visual = self.config.n_visual
        if self.stage == 1:
            ids, labels = self.tokenizer.encode_caption(row.get("description") or qa[0]["a"], n_visual)
        else:
            ids, labels = self.tokenizer.encode_conversation(qa, clip.message, n_visual, self.max_tokens)
        if all(label == IGNORE for label in labels):
            raise VideoError(row["video"], f"its text leaves no room for an answer in {len(ids)} tokens")
        sample = dict(index=i, indices=clip.indices, counts=len(clip.indices), input_ids=ids, labels=labels)
        if self.motion_targets:
            ids, labels = self.tokenizer.encode_caption(row["motion"], self.config.n_video_queries)
            sample |= {"motion_input_ids": ids, "motion_labels": labels}
        return {"streams": streams} | {key: torch.as_tensor(value) for key, value in sample.items()}

    def conversation(self, row, generator):
        """In training, the annotated rounds half of the time; else the description is the first answer."""
        qa = [turn for turn in row.get("qa") or [] if turn["a"].strip()]  # a new list: rows are never edited
        description = row.get("description")
        if not self.train:
            return [{"q": DESCRIBE_QUESTIONS[0], "a": description}] if description else qa
        annotated = bool(qa) and generator.random() < 0.5
        question = DESCRIBE_QUESTIONS[generator.integers(len(DESCRIBE_QUESTIONS))]
        if annotated or not description:
            return qa
        return [{"q": question, "a": description}, *qa[1:]]  # as released, later rounds are kept


def collate(samples, pad_id=0):
    """Samples -> a batch of tensors, with "streams" {branch: (B, T, ...)}, and "errors", the bad samples."""
    good = [sample for sample in samples if "error" not in sample]
    errors = [sample for sample in samples if "error" in sample]
    return {"errors": errors} | (stack(good, pad_id) if good else {})


def stack(values, pad_id, key=""):
    """B dicts or tensors -> one, padded to the greatest length. Hawk.encode cuts clips to their `counts`."""
    if isinstance(values[0], dict):
        return {name: stack([value[name] for value in values], pad_id, name) for name in values[0]}
    if values[0].dim() == 0:
        return torch.stack(values)
    padding = IGNORE if key.endswith("labels") and values[0].dim() == 1 else pad_id  # not of a stream
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)


# ---- 4. Feature cache: what `prepare.py features` wrote ----------------------------------------------------
# FOLDER/meta.json says what was computed from what. Each clip has a file of its own, which appears only once
# complete. FOLDER/bad_videos.jsonl lists the rows whose videos could not be read.
def cache_file(folder, row, choice=0):
    """A file of {branch: (T, Q, C)} and "message", "indices", "bytes" (video_mark). choice 0: not cropped."""
    return Path(folder) / (f"{row}-{choice}.safetensors" if choice else f"{row}.safetensors")


def video_mark(path):  # a file's size in bytes, or a hash of a folder's first picture; None if there is none
    with suppress(OSError, VideoError):
        picture = os.path.isdir(path) and Path(open_folder(path, 1).files[0]).read_bytes()
        return hashlib.sha256(picture).hexdigest() if picture else str(os.path.getsize(path))


def cache_meta(rows, config, fingerprint):
    """What features are made from. Videos are identified by file name (and fps): their folder may move."""
    names = json.dumps([os.path.basename(row["video"]) + str(row.get("fps", "")) for row in rows])
    meta = {"weights": fingerprint, "videos": hashlib.sha256(names.encode()).hexdigest()[:16]}
    return meta | {name: getattr(config, name) for name in ("motion_mask", "n_frames", "image_size")}


def frozen_fingerprint(model):
    """{branch: hash of the ViT and of the branch's frozen part}: other weights make other features."""
    digests = {tower: hashlib.sha256() for tower in ("vit", *model.config.branches)}
    for name, tensor in sorted(model.state_dict().items()):
        if is_frame_level(name):
            digests[name.split(".")[0]].update(name.encode() + tensor.cpu().float().numpy().tobytes())
    vit = digests.pop("vit").hexdigest()[:8]
    return {branch: vit + digest.hexdigest()[:8] for branch, digest in digests.items()}


class CachedFeatures:  # of an index's rows. ValueError: of other weights, settings, videos, or incomplete
    def __init__(self, folder, rows, config, fingerprint):
        self.folder = Path(folder)
        self.rows = rows
        self.branches = config.branches
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            entries = map(json.loads, (self.folder / "bad_videos.jsonl").read_text().splitlines())
            self.bad = {entry["row"]: entry["error"].split(": ", 1)[-1] for entry in entries}
            self.choices = meta["choices"]
            meta["weights"] = {name: meta["weights"].get(name, "no such stream") for name in self.branches}
        except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: not a feature cache ({error}); run `prepare.py features`") from error
        for key, value in cache_meta(rows, config, fingerprint).items():
            found = f"{folder}: made with {key} {meta.get(key)!r}"
            require(meta.get(key) == value, f"{found}, this run has {value!r}; use another folder")
        clips = [(i, choice) for i in range(len(rows)) if i not in self.bad for choice in range(self.choices)]
        missing = [clip for clip in clips if not cache_file(folder, *clip).exists()]
        require(not missing, f"{folder}: {len(missing)} clips are missing; run `prepare.py features` again")

    def load(self, i, choice):
        """A Clip whose streams are features. VideoError if row i has none, or its video has changed since."""
        file = cache_file(self.folder, i, choice)
        video = self.rows[i]["video"]
        if not file.exists():
            raise VideoError(video, self.bad.get(i, f"{file} is gone"))
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata()
                about = json.loads(about["about"]) if "about" in about else about
                streams = {name: opened.get_tensor(name).float() for name in self.branches}
            hashed = not about["bytes"].isdigit()  # older caches do not know a folder again
            if os.path.isdir(video) == hashed and video_mark(video) not in (None, about["bytes"]):
                raise VideoError(video, f"is another video now; remove {file} and make it again")
            return Clip(streams, [], about["message"], np.array(json.loads(about["indices"])))
        except (SafetensorError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise VideoError(video, f"damaged features ({error}); remove {file} and make it again") from error


# ---- 5. Machine --------------------------------------------------------------------------------------------
def note(text):
    print(re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", "?", text), file=sys.stderr, flush=True)  # no escapes


def print_error(error):  # in one line; returns the exit status
    lines = str(error).strip().splitlines()
    note(f"error: {lines[-1] if 'Traceback' in str(error) else ' '.join(lines)}")  # from a loader worker
    return 2


def make_parser(about):  # a parser whose errors are one line that starts with "error:"
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"error: {message} (see --help)\n")
    return p


def read_json(file, *needed):
    """The content of a JSON file; ValueError if it cannot be read, or lacks one of the `needed` keys."""
    try:
        content = json.loads(file.read_bytes())
        for key in needed:
            content[key]
        return content
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"{file}: is missing, or not the JSON expected ({type(e).__name__}: {e})") from e


def settings(pairs):
    """`--set KEY=VALUE ...` -> {key: value as in config.json, or text}, which HawkConfig.from_dict checks."""
    values = dict(pair.partition("=")[::2] for pair in pairs)
    for key, text in values.items():
        with suppress(ValueError):
            values[key] = json.loads(text.lower())  # lower: Python's True is JSON's true
    return values


def usable_device(name=None):
    """The torch.device of this name, by default the best available. ValueError if it cannot be used."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(device for device in there if there[device])
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown to torch, or not in this machine
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":  # CUDA graphs and Triton kernels run on the current device
        torch.cuda.set_device(device)
    return device


def peak_memory_mb(device):
    """The most memory that this process has used: GPU memory if the model is there, else RAM."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


@contextmanager
def replaced_folder(folder):
    """Yields an empty folder beside `folder` to write into; on success it atomically replaces `folder`."""
    folder, old = recover_folder(folder)
    new = Path(f"{folder}.being-written")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch raise when the disk is full
        raise OSError(f"{folder}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)  # also after ctrl-C: nothing half-written stays behind


def recover_folder(folder):
    """Undoes a replacement that was killed between its two renames -> (folder, name for its old content)."""
    folder = Path(folder).resolve()  # follows links to the folder itself
    old = Path(f"{folder}.being-replaced")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)
    return folder, old


def replace_file(path, content):
    """Writes text or bytes under a temporary name and renames it: `path` never holds half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
