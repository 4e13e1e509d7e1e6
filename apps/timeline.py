"""When does it happen? A video of any length in overlapping windows, each with an anomaly score from 0 to 1.

    python -m apps.timeline long.mp4                           # a curve, and descriptions of what stands out
    python -m apps.timeline --video long.mp4 --json            # one object per window, as they close
    python -m apps.timeline --video long.mp4 --plot curve.png --out-video with_curve.mp4
    tail -c +1 -f growing.ts | python -m apps.timeline --video - --json    # a stream, or a growing file
    python -m apps.timeline --annotations data/long/long.jsonl # how well it finds what was annotated
    torchrun --standalone --nproc_per_node=4 -m apps.timeline --annotations INDEX --scores DIR

The video is decoded once, from start to end, and only the frames of the open window are kept. The frames of a
window are sampled as read_clip samples those of a clip, so the model sees what it was trained on. The score
says how likely the model is to report something abnormal, in one of three ways:

    contrast  The model begins to describe the window ("A red car ..."). The score is the probability that
              a phrase of an abnormal kind ("drives the wrong way", ...) comes next, added over the kinds, at
              the word where that is highest.
    choice    The probability of the sentences of the abnormal kinds among those of all kinds, for weights
              that were trained on an index of apps.index.
    yes       P(yes) / (P(yes) + P(no)) for the first word of the answer to a fixed question.

Windows that share frames are seldom wrong together, so each score is averaged with those of the earlier
windows that it overlaps, and with that of the next one, for which it waits. Times are those of the frames
themselves, even where the frame rate varies.

With --annotations it prints how often the window with the highest score is on an event, the windows' AUC,
and the usual frame-level AUC and average precision. --scores DIR writes the scores of each video's frames to
DIR/NAME.npy; a run that was killed and is started again with the same DIR scores only what is missing.

In this file: windows, scores, agreement with annotations, files of scores, pictures, the command line. The
model's score of a window is in apps/detect.py. Exit status: 0, or 2 if anything failed.
"""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, deque
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

from apps.detect import (
    NO_PHRASES,
    add_score_options,
    choose_score,
    describe,
    find_kinds,
    is_normal,
    numbers,
    phrases_of,
    read_intervals,
    read_rows,
)
from apps.evaluate import differences, first_alone, gather, start_processes, weights_options
from apps.look import all_frames
from data import (
    CONTAINERS,
    Video,
    VideoError,
    clip_of,
    damage,
    open_video,
    replace_file,
    sample_frames,
)
from hawk import read_chain
from sample import PROBLEMS, add_model_options, encode_clips, load, make_parser, note, number, print_error

MAX_BYTES = 1 << 30  # of frames that are kept at a time
PICTURE = (640, 360)  # pixels of --out-video
STRIP = 96  # height of the curve below it
EPSILON = 1e-6  # seconds: no smaller difference matters

# ---- Windows -----------------------------------------------------------------------------------------------


@dataclass
class Window:
    """One object of --json."""

    video: str
    start: float  # seconds
    end: float
    score: float  # 0 to 1, see shared_score
    description: str | None  # only of windows that stand out


def windows(frames, length, stride, max_frames=math.inf):
    """(seconds, frame) pairs -> yields (end, pairs of one window) as windows close.

    Windows of `length` seconds begin at multiples of `stride`, or after a gap. If stride <= length,
    nothing is left out. A last window reaches back from the end, unless one closed there. Where frames are so
    far apart that several windows would hold the same ones, only one is yielded. A gap of more than `length`,
    in which nothing was recorded, ends a recording: no window spans it. (Where all frames are that far apart,
    the first is a window of its own.) Raises OverflowError beyond max_frames."""
    held = deque()
    start = 0.0  # of the next window to close
    duration = 0.04  # of the newest frame: assumed to be the time since the one before it
    interval = 0.0  # between the last two frames
    end = 0.0  # of the newest frame
    closed = True  # whether a window has closed there
    for seconds, frame in frames:
        if held:
            before = interval
            interval = seconds - held[-1][0]
            if interval <= max(length, 2 * before):
                duration = max(interval, 0.001)  # as times are rounded: a window has a length
            else:  # a gap; had the frame rate dropped, the next interval would be as long
                if not closed:
                    yield end, [pair for pair in held if pair[0] >= end - length - EPSILON]
                held.clear()
                start = seconds
        start = min(start, seconds)  # after a long interval the next window had been set to start too late
        held.append((seconds, frame))
        end = seconds + duration
        while held[0][0] < min(start, end - length) - EPSILON:
            held.popleft()
        if len(held) > max_frames:
            raise OverflowError(f"more than {max_frames} frames in {length} s")
        closed = end >= start + length - EPSILON
        if closed:
            yield end, [pair for pair in held if pair[0] >= start - EPSILON]
            # the first multiple of the stride whose window is still open
            start = stride * (math.floor((end - length) / stride + EPSILON) + 1)
    if not closed:
        yield end, [pair for pair in held if pair[0] >= end - length - EPSILON]


def read_windows(path, config, length, stride, fps=25):
    """Yields (start, end, Clip) as windows close; path "-" is standard input. Raises VideoError; if a
    file is cut short, only after its last complete window. fps: frames per second of a folder."""
    size = config.image_size
    stdin = sys.stdin if path == "-" else None
    log = []
    with closing(all_frames(path, size, stdin=stdin, fps=fps, log=log)) as frames:
        try:
            for end, pairs in windows(frames, length, stride, MAX_BYTES // (3 * size * size)):
                start = pairs[0][0]
                times = [seconds - start for seconds, _ in pairs]
                held = [frame for _, frame in pairs]
                chosen = sample_frames(len(pairs), config.n_frames)
                video = Video("", np.array(times), [], frames=held)
                clip = clip_of(video, None, chosen, config.branches, config.motion_mask)
                yield round(start, 3), round(end, 3), clip
        except OverflowError as error:
            raise VideoError(path, f"has too many frames to hold, {error}; use a shorter --window") from None
    video = open_video(path, size, fps) if os.path.isdir(path) else Video(path, None, log)
    for remark in damage(video._replace(log=log)):
        print_above(note, f"{path}: {remark}")


# ---- Scores ------------------------------------------------------------------------------------------------


def watch(model, tokenizer, path, score, length=4.0, stride=1.0, threshold=0.5, fps=25):
    """Yields each Window once the next one has closed. score(model, tokenizer, clip, encoding) -> 0 to 1;
    windows from `threshold` on are described. fps: frames per second of a folder. Raises VideoError."""
    owns = []  # (start, end, own score) of windows that overlap `seen`
    seen = None  # the window that waits for the next one

    def told(start, end, clip, encoding):
        shared = round(shared_score(start, end, owns), 4)
        description = describe(model, tokenizer, clip, encoding)[1] if shared >= threshold else None
        return Window(path, start, end, shared, description)

    try:
        for start, end, clip in read_windows(path, model.config, length, stride, fps):
            encoding = encode_clips(model, [clip])
            owns.append((start, end, score(model, tokenizer, clip, encoding)))
            if seen:
                yield told(*seen)
                owns = [own for own in owns if own[1] > start]
            seen = (start, end, clip, encoding)
    except VideoError:  # a recording that is cut short
        if seen:
            yield told(*seen)
        raise
    if seen:
        yield told(*seen)


def shared_score(start, end, owns):
    """Score of a window from the own scores [(start, end, own score)] of those around it: the mean, weighted
    by how much of it each of them covers."""
    total = 0.0
    weights = 0.0
    for other_start, other_end, own in owns:
        weight = max(0.0, min(end, other_end) - max(start, other_start))
        total += weight * own
        weights += weight
    return total / weights


# ---- Agreement with annotations ----------------------------------------------------------------------------


@dataclass
class Annotated:
    """An annotated video, and its results."""

    path: str
    intervals: list  # abnormal [(start, end), …] in seconds; none in a normal video
    times: np.ndarray | None = None  # of the frames (N,), in seconds; None until it is opened
    windows: list | None = None  # None until it is scored
    file: str | None = None  # of its scores, without the extension
    options: dict | None = None  # that determine them
    fps: float | None = None  # frames per second of a folder, if the index says so


def read_annotations(path):
    """An index with rows {"video", "abnormal"} -> an Annotated for each video, from all rows about it.
    Raises a ValueError that names the line."""
    found = {}
    folder = os.path.dirname(path)
    for row in read_rows(path, annotated_row):
        name = os.path.join(folder, row["video"])
        video = found.setdefault(os.path.realpath(name), Annotated(name, [], fps=row.get("fps")))
        video.intervals = united(video.intervals + row["abnormal"])
    return list(found.values())


def annotated_row(row):
    """The row with a list of (start, end) as "abnormal". {"kind": "normal"} counts as []."""
    normal = "abnormal" not in row and is_normal(row.get("kind") or "")
    return row | {"abnormal": read_intervals([] if normal else row.get("abnormal"))}


def united(intervals):
    """The same times in ascending order, as intervals that do not overlap, so that none counts twice."""
    result = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            start, before = result.pop()
            end = max(end, before)
        result.append((start, end))
    return result


def check_intervals(video):
    """Raises ValueError for an interval beyond the end of the video: perhaps in frames, not in seconds."""
    times = video.times
    last = times[-1] - times[-2] if len(times) > 1 else 0.04  # how long the last frame is shown
    length = times[-1] + last
    for start, end in video.intervals:
        if start >= length or end > length + 1:
            reason = f"is beyond the end of the video at {length:.2f} s; give seconds, not frame numbers"
            raise ValueError(f"{video.path}: [{start}, {end}] {reason}")


def open_annotated(video, size, fps):
    """Sets the times of the frames and checks the intervals, before the model runs. Prints what is wrong, and
    returns whether all is well."""
    try:
        video.fps = video.fps or fps
        video.times = open_video(video.path, size, video.fps).seconds
        check_intervals(video)
    except PROBLEMS as error:
        print_above(print_error, error)
        return False
    return True


def print_above(say, what):
    """Prints a note or an error (say: the function that does) above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        say(what)


def frame_scores(seen, times):
    """The score of each frame (N,) float32: the mean of the windows that are open at its time.

    times: (N,) ascending. A window is open from its start until before its end, the last one to the end of
    the video. No array of windows x frames is made: for hours of video it would not fit into memory."""
    times = np.array([round(float(seconds), 3) for seconds in times])  # as read_windows rounds
    total = np.zeros(len(times))
    count = np.zeros(len(times))
    for window in seen:
        first, end = np.searchsorted(times, [window.start, window.end])
        if window is seen[-1]:
            end = len(times)
        total[first:end] += window.score
        count[first:end] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def overlap(window, interval):
    """In seconds"""
    return max(0.0, min(window.end, interval[1]) - max(window.start, interval[0]))


def window_agreement(found):
    """found: the Annotated videos -> {videos, abnormal, normal, hits, chance, windows, auc}.

    abnormal: videos with an interval; hits: how many of them have their highest window on one; chance: the
    share of hits that a random window would have. Normal videos can have no hit and are left out of both. For
    the AUC a window is abnormal if at least half of it is inside an interval, normal if nothing of it is, and
    left out otherwise."""
    hits = 0
    chances = []
    scores = []
    labels = []
    for video in found:
        inside = [sum(overlap(window, pair) for pair in video.intervals) for window in video.windows]
        if video.intervals:
            highest = max(range(len(inside)), key=lambda i: video.windows[i].score)
            hits += inside[highest] > 0
            chances.append(sum(seconds > 0 for seconds in inside) / len(inside))
        for window, seconds in zip(video.windows, inside, strict=True):
            half = seconds >= (window.end - window.start) / 2
            if half or seconds == 0:
                scores.append(window.score)
                labels.append(half)
    result = {"videos": len(found), "abnormal": len(chances), "normal": len(found) - len(chances)}
    result |= {"hits": hits, "chance": sum(chances) / len(chances) if chances else None}
    return result | {"windows": len(scores), "auc": numbers(scores, labels)["auc"]}


def frame_agreement(found):
    """found: the Annotated videos -> {frames, abnormal_frames, frame_auc, frame_ap}.

    Over all frames of all videos together, as the field reports both ("micro"). None without abnormal, or
    without normal, frames. A frame is abnormal from the start of an interval until before its end."""
    labels = []
    for video in found:
        abnormal = np.zeros(len(video.times), bool)
        for start, end in video.intervals:
            abnormal |= (start <= video.times) & (video.times < end)
        labels.append(abnormal)
    labels = np.concatenate(labels)
    scores = np.concatenate([frame_scores(video.windows, video.times) for video in found])
    found = numbers(scores, labels)
    areas = {"frame_auc": found["auc"], "frame_ap": found["ap"]}
    return {"frames": len(labels), "abnormal_frames": int(labels.sum())} | areas


def print_agreement(result):
    """The table of what window_agreement and frame_agreement found, and of how many videos failed."""
    n = result["abnormal"]
    hits = f"videos with an event: {n}"
    if n:
        hits += f" (by chance {result['chance']:.0%})"
    if result["normal"]:
        hits += f"; normal, left out: {result['normal']}"
    frames = f"{result['frames']} frames, {result['abnormal_frames']} of them abnormal"
    lines = [("highest window on an event", f"{result['hits'] / n:.0%}" if n else "-", hits)]
    for name, key, about in (
        ("AUC of the windows", "auc", f"{result['windows']} windows"),
        ("frame-level AUC", "frame_auc", frames),
        ("frame-level average precision", "frame_ap", "the same frames"),
    ):
        value = result[key]
        lines.append((name, "-" if value is None else f"{value:.3f}", about))
    for name, value, about in lines:
        print(f"{name:<30} {value:>6}   {about}")
    if result["failed"]:
        print(f"{result['failed']} of {result['videos'] + result['failed']} videos failed and count nowhere")


# ---- Files of scores ---------------------------------------------------------------------------------------


def score_names(paths):
    """The names of the videos' files of scores: the video's own, without extension. Videos that share it get
    their path below the folder common to all, with _ for /."""
    shared = Counter(Path(path).stem.casefold() for path in paths)
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = []
    taken = set()
    for path in paths:
        name = Path(path).stem
        if shared[name.casefold()] > 1:
            name = os.path.relpath(path, top).replace(os.sep, "_")
        while name.casefold() in taken:
            name += "_"
        taken.add(name.casefold())
        names.append(name)
    return names


def decisive_options(args, config):
    """What determines the scores of a video, apart from the video itself."""
    phrases = phrases_of(choose_score(args.score, find_kinds(args)))
    size = {"window": args.window, "stride": args.stride, "next": 1}  # next: windows that a score waits for
    return weights_options(args) | {"phrases": phrases} | size


def read_record(video):
    """The windows of a video that an earlier run scored, None if none did. Raises ValueError if it had other
    options, or scored another video."""
    record = Path(f"{video.file}.json")
    if not video.file or not record.exists():
        return None
    try:
        made = json.loads(record.read_bytes())
        windows = [Window(**window) for window in made["windows"]]
        found = differences(made["options"], options_of(video))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{record}: not what this program writes; give another --scores") from None
    if found:
        raise ValueError(f"{record}: made with other options ({'; '.join(found)}); give another --scores")
    return windows


def options_of(video):
    """Everything that determines the scores of a video."""
    about = {"video": os.path.abspath(video.path), "video_bytes": os.path.getsize(video.path)}
    if os.path.isdir(video.path):
        about["fps"] = video.fps
    return video.options | about


def save_scores(video):
    """Writes FILE.npy, the scores of the frames, and then FILE.json, from which another run resumes."""
    content = io.BytesIO()
    np.save(content, frame_scores(video.windows, video.times))
    replace_file(f"{video.file}.npy", content.getvalue())
    record = {"options": options_of(video), "windows": [asdict(window) for window in video.windows]}
    replace_file(f"{video.file}.json", json.dumps(record) + "\n")


# ---- Pictures ----------------------------------------------------------------------------------------------


def curve(seen, n):
    """n scores, evenly spaced over the video, as of frames at these times."""
    return frame_scores(seen, (np.arange(n) + 0.5) * seen[-1].end / n)


def events(seen, threshold):
    """Windows that stand out, neighbours merged -> [(start of the first, end of the last, the highest)].
    Windows on both sides of a gap in the recording are no neighbours."""
    longest = max(window.end - window.start for window in seen)
    found = []
    previous = None  # the window before, if it stands out
    for window in seen:
        if window.score < threshold:
            previous = None
            continue
        if previous is None or window.start > previous.end + longest:
            found.append((window.start, window.end, window))
        start, _, top = found[-1]
        found[-1] = (start, window.end, max(top, window, key=lambda window: window.score))
        previous = window
    return found


def print_timeline(seen, threshold, rows=4):
    """The curve in blocks, then a line for each event."""
    print(seen[0].video)
    width = max(20, shutil.get_terminal_size().columns - 6)
    scores = curve(seen, width)
    labels = {rows - 1: "1", 0: "0"}
    for row in range(rows - 1, -1, -1):
        eighths = np.clip(np.rint((scores * rows - row) * 8), 0, 8).astype(int)
        print(f"{labels.get(row, ''):>2} " + "".join(" ▁▂▃▄▅▆▇█"[n] for n in eighths))
    print(f"   0{f'{seen[-1].end:.1f} s':>{width - 1}}")
    found = events(seen, threshold)
    for start, end, top in found:
        print(f"{start:.1f}-{end:.1f} s  {top.score:.2f}  {top.description}")
    if not found:
        top = max(seen, key=lambda window: window.score)
        print(f"nothing stands out; the highest score is {top.score:.2f} at {top.start:.1f}-{top.end:.1f} s")


def write_plot(seen, threshold, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(np.linspace(0, seen[-1].end, 1000), curve(seen, 1000), alpha=0.3, label="frames")
    axes.plot(
        [(w.start + w.end) / 2 for w in seen], [w.score for w in seen], ".-", label="windows, at their middle"
    )
    axes.axhline(threshold, color="grey", linestyle=":", label="threshold")
    for k, (start, end, _) in enumerate(events(seen, threshold)):
        axes.axvspan(start, end, color="red", alpha=0.1, label="reported" if k == 0 else None)
    axes.set(xlim=(0, seen[-1].end), ylim=(0, 1.02), xlabel="seconds", ylabel="anomaly score")
    axes.set_title(os.path.basename(seen[0].video.rstrip("/")), parse_math=False)  # a $ in it is a $
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    temporary = f"{path}.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def draw_strip(seen, threshold, width=PICTURE[0], height=STRIP):
    """(height, width, 3) uint8: the area below the curve, green to red, and dots at the threshold."""
    scores = curve(seen, width)
    level = 1 - (np.arange(height)[:, None] + 0.5) / height  # of each row: 1 at the top, 0 at the bottom
    colours = np.stack([60 + 195 * scores, 200 - 150 * scores, np.full(width, 60.0)], axis=-1).astype(
        np.uint8
    )
    background = np.full((height, width, 3), 24, np.uint8)
    strip = np.where((level < scores)[..., None], colours, background)
    strip[min(height - 1, int((1 - threshold) * height)), ::6] = 160
    return strip


def write_video(seen, threshold, path):
    """The video with the curve below the picture, and a line that moves across it: one run of ffmpeg."""
    width, height = PICTURE
    filters = (
        f"[0:v]scale={width}:{height}:force_original_aspect_ratio=decrease,setsar=1,"
        f"pad={width}:{height + STRIP}:(ow-iw)/2:({height}-ih)/2[picture];"
        f"[picture][1:v]overlay=0:{height}[both];color=white:size=2x{STRIP}[line];"
        f"[both][line]overlay=x='({width}-2)*min(t/{seen[-1].end},1)':y={height}:shortest=1[out]"
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-max_pixels", "100000000"]
    command += [
        "-protocol_whitelist",
        "file,pipe",
        "-format_whitelist",
        CONTAINERS,
        "-i",
        f"file:{seen[0].video}",
    ]
    command += f"-f rawvideo -pix_fmt rgb24 -s {width}x{STRIP} -i pipe:0".split()
    command += ["-filter_complex", filters, *"-map [out] -pix_fmt yuv420p -f mp4".split(), f"file:{path}.tmp"]
    done = subprocess.run(command, input=draw_strip(seen, threshold).tobytes(), capture_output=True)
    if done.returncode:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({done.stderr.decode(errors='replace').strip()})")
    os.replace(f"{path}.tmp", path)


# ---- Command line ------------------------------------------------------------------------------------------


def clip_seconds(weights):
    """The length of the clips that the weights were trained on: measured by apps.index, saved by training."""
    file = Path(weights) / "clips.json"
    try:
        seconds = float(json.loads(file.read_bytes())["seconds"]) if file.exists() else 4.0
        if not 0.05 <= seconds <= sys.maxsize:
            raise ValueError(f"clips of {seconds} s")
        return seconds
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not what apps.index writes ({error}); give --window S") from None


def parse_args(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("video", nargs="*", action="extend", metavar="VIDEO", help='files, folders of pictures, or "-"')
    add("--video", nargs="+", action="extend", metavar="PATH", help='the same; "-" is a stream on stdin')
    add(
        "--annotations",
        metavar="INDEX",
        help='instead: rows {"video", "abnormal": [start, end] in seconds, a list of these, or []}',
    )
    told = "seconds (default: as long as the clips that the weights were trained on, else 4)"
    add("--window", type=number(float, 0.05), metavar="S", help=told)
    told = "seconds from one window to the next (default: a quarter of a window, at most 2)"
    add("--stride", type=number(float, 0.05), metavar="S", help=told)
    add_score_options(add, "--score")
    add(
        "--threshold",
        type=number(float, 0, 1),
        default=0.5,
        help="scores from this on stand out (default: 0.5)",
    )
    add(
        "--scores",
        metavar="DIR",
        help="with --annotations: scores per frame, DIR/NAME.npy; resumed if it exists",
    )
    add("--fps", type=number(float, 0.001), default=25.0, help="frames per second of a folder (default: 25)")
    add(
        "--json",
        action="store_true",
        help="one JSON object per window; the results of --annotations go to stderr",
    )
    add("--plot", metavar="FILE.png", help="also draw the curve (needs matplotlib)")
    add("--out-video", metavar="FILE.mp4", help="also write the video with the curve below the picture")
    add_model_options(p)
    args = p.parse_intermixed_args(argv)
    args.video = args.video or []
    if bool(args.video) == bool(args.annotations):
        p.error("give either a video or --annotations")
    if args.scores and not args.annotations:
        p.error("--scores is for --annotations")
    if args.kinds and args.score == "yes":
        p.error("--kinds is for --score contrast")
    try:
        args.window = args.window or clip_seconds(args.weights)
    except ValueError as error:
        p.error(str(error))
    args.stride = args.stride or min(2.0, args.window / 4)
    if args.stride > args.window:
        p.error("--stride is longer than --window: what lies between two windows would not be seen")
    outputs = [Path(file) for file in (args.plot, args.out_video) if file]
    if outputs and len(args.video) != 1:
        p.error("--plot and --out-video take one --video")
    if args.out_video and (args.video == ["-"] or Path(args.video[0]).is_dir()):
        p.error("--out-video takes a file, not a stream or a folder of pictures")
    for file in outputs:
        if not file.parent.is_dir():
            p.error(f"{file.parent}: no such folder")
        if file.resolve() == Path(args.video[0]).resolve():
            p.error(f"{file}: is the video itself")
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        p.error(f"--plot {args.plot}: it is written as PNG; give a name that ends in .png")
    if args.out_video and Path(args.out_video).suffix.lower() != ".mp4":
        p.error(f"--out-video {args.out_video}: it is written as MP4; give a name that ends in .mp4")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            p.error("--plot needs matplotlib: pip install matplotlib")
    if "-" in args.video and sys.stdin.isatty():
        p.error("--video - reads a video from standard input, which is a terminal here")
    return args


def show_video(path, found, args):
    """Shows the windows of one video, an iterator, as the options say -> those that are kept."""
    seen = []
    problem = None
    keep = not args.json or args.plot or args.out_video  # a stream has no end
    bar = tqdm(desc=path, unit="s of video", leave=False, disable=args.json, file=sys.stderr)
    try:
        for window in found:
            bar.update(window.end - bar.n)
            if keep:
                seen.append(window)
            if args.json:
                print_window(window)
    except KeyboardInterrupt:  # the way to end a stream, of which what was seen is shown
        if path != "-" or not seen:
            raise
    except PROBLEMS as error:  # a recording that is cut short: what was seen of it is shown first
        if not seen:
            raise
        problem = error
    finally:
        bar.close()
    show_seen(seen, args)
    if problem:
        raise problem
    return seen


def show_seen(seen, args):
    if not args.json:
        print_timeline(seen, args.threshold)
    if args.plot:
        write_plot(seen, args.threshold, args.plot)
    if args.out_video:
        write_video(seen, args.threshold, args.out_video)


def print_window(window):
    print(json.dumps(asdict(window)), flush=True)


def score_videos(videos, args, rank):
    """Scores those of the videos that no earlier run has scored. Prints the errors of those that fail; their
    windows stay None."""
    if all(video.windows for video in videos):
        return
    model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
    score = choose_score(args.score, find_kinds(args))
    options = {"disable": rank > 0, "file": sys.stderr}
    for video in tqdm(videos, unit="video", **options):
        if video.windows:
            continue
        # an infinite threshold: only scores count here, no window is described
        size = (args.window, args.stride)
        found = watch(model, tokenizer, video.path, score, *size, threshold=math.inf, fps=video.fps)
        windows = []
        try:
            with tqdm(desc=video.path, unit="s of video", leave=False, **options) as bar:
                for window in found:
                    windows.append(window)
                    bar.update(window.end - bar.n)
            video.windows = windows
        except PROBLEMS as error:
            print_above(print_error, error)
            continue
        if video.file:
            save_scores(video)


def score_annotated(annotated, args, rank, world):
    """Scores every world-th of the annotated videos from number `rank` on -> [(number, Annotated)]. Those
    that failed have no windows."""
    config = read_chain(args.weights)[0]
    if args.scores:
        Path(args.scores).mkdir(parents=True, exist_ok=True)
        options = decisive_options(args, config)
        for video, name in zip(annotated, score_names([video.path for video in annotated]), strict=True):
            video.file = os.path.join(args.scores, name)
            video.options = options
    mine = list(enumerate(annotated))[rank::world]
    bar = tqdm(mine, desc="opening", unit="video", leave=False, disable=rank > 0, file=sys.stderr)
    readable = [video for _, video in bar if open_annotated(video, config.image_size, args.fps)]
    for video in readable:
        video.windows = read_record(video)
        if video.windows and not os.path.exists(f"{video.file}.npy"):
            save_scores(video)
    score_videos(readable, args, rank)
    return mine


def check_run(args):
    """Raises an error if something is wrong with the index or the phrases."""
    if not (args.score or find_kinds(args)):
        note(f"note: {NO_PHRASES}")
    read_annotations(args.annotations)
    choose_score(args.score, find_kinds(args))


def measure_agreement(args):
    """Everything for --annotations -> exit status. Under torchrun the processes share the videos."""
    rank, world = start_processes(args)
    first_alone(lambda: check_run(args), rank, world)
    results = gather(score_annotated(read_annotations(args.annotations), args, rank, world), world)
    if rank > 0:
        return 0
    found = [video for _, video in results if video.windows]
    failed = len(results) - len(found)
    if args.json:
        for video in found:
            for window in video.windows:
                print_window(window)
    if found:
        result = window_agreement(found) | frame_agreement(found) | {"failed": failed}
        if args.json:
            note(json.dumps(result))
        else:
            print_agreement(result)
    return 2 if failed else 0


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.annotations:
            return measure_agreement(args)
        if not (args.score or find_kinds(args)):
            note(f"note: {NO_PHRASES}")
        model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
        score = choose_score(args.score, find_kinds(args))
    except PROBLEMS as error:
        return print_error(error)
    status = 0
    for path in args.video:
        size = (args.window, args.stride)
        seen = watch(model, tokenizer, path, score, *size, threshold=args.threshold, fps=args.fps)
        try:
            show_video(path, seen, args)
        except PROBLEMS as error:
            status = print_error(error)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
