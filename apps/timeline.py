"""When does it happen? A video of any length in overlapping windows, each with an anomaly score from 0 to 1.

    python -m apps.timeline --video long.mp4                   # a curve, and in words what stands out
    python -m apps.timeline --video long.mp4 --json            # one object a window, as soon as it closes
    python -m apps.timeline --video long.mp4 --plot curve.png --out-video with_curve.mp4
    tail -c +1 -f growing.ts | python -m apps.timeline --video - --json    # a stream, or a growing file
    python -m apps.timeline --annotations data/toy/long.jsonl  # how well it finds what was annotated

The video is decoded once, from front to back, and only the frames of the open window are held. The frames of
a window are sampled as read_clip samples those of a clip, so the model sees what it was trained on. The score
says how likely the model is to say something abnormal, in one of two ways:

    contrast  It begins to describe the window by itself ("A red car ..."). The score is the probability that
              a phrase of an abnormal kind ("drives the wrong way", ...) comes next, added over the kinds, at
              the word where that is highest.
    yes       P(yes) / (P(yes) + P(no)) for the first word of the answer to a fixed question.

Windows that share frames are seldom wrong together, so each score is averaged with those of the earlier
windows that it overlaps. Times are those of the frames themselves, also where the frame rate varies.

In this file: windows, scores, agreement with annotations, pictures, the command line. Exit status: 0, or 2 if
anything failed.
"""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from data import (
    CONTAINERS,
    DESCRIBE_QUESTIONS,
    VideoError,
    make_clip,
    open_video,
    replace_file,
    sample_frames,
    stream_frames,
)
from hawk import KVCache
from sample import PROBLEMS, Parser, add_model_options, encode_clips, load, number, print_error

TOY_KINDS = Path(__file__).parent.parent / "examples" / "kinds.json"
YES_QUESTION = "Does anything unusual or dangerous happen in this video? Answer yes or no."
SUBJECT_WORDS = 5  # a phrase is tried after each of the answer's first words: "A red car" is three
MAX_BYTES = 1 << 30  # of the frames that are held
PHRASES_PER_BATCH = 16
PICTURE = (640, 360)  # pixels of --out-video
STRIP = 96  # height of the curve below it
EPSILON = 1e-6  # seconds that do not matter

# ---- Windows -----------------------------------------------------------------------------------------------


@dataclass
class Window:
    """One object of --json."""

    video: str
    start: float  # seconds
    end: float
    score: float  # 0 to 1, see shared_score
    description: str | None  # of windows that stand out


def windows(frames, length, stride, max_frames=math.inf):
    """(seconds, frame) pairs -> yields (end, pairs of one window) as windows close.

    Windows of `length` seconds begin at multiples of `stride`. Nothing is left out if stride <= length.
    A last one reaches back from the end, unless one closed there. Where frames are so far apart that windows
    would hold the same ones, one of these windows is yielded. Raises OverflowError beyond max_frames."""
    held = deque()
    start = 0.0  # of the next window to close
    duration = 0.04  # of the newest frame: taken to be the time since the one before it
    closed = True
    for seconds, frame in frames:
        if held:
            duration = seconds - held[-1][0]
        start = min(start, seconds)  # after a long gap the next window was put too late
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


def read_windows(path, config, length, stride):
    """Yields (start, end, Clip) as windows close; path "-" is standard input. Raises VideoError, for a file
    that is cut short only after its last whole window."""
    size = config.image_size
    stdin = sys.stdin if path == "-" else None
    with closing(stream_frames(path, size, stdin=stdin)) as frames:
        try:
            for end, pairs in windows(frames, length, stride, MAX_BYTES // (3 * size * size)):
                start = pairs[0][0]
                times = [seconds - start for seconds, _ in pairs]
                held = [frame for _, frame in pairs]
                chosen = sample_frames(len(pairs), config.n_frames)
                clip = make_clip(held, times, chosen, config.branches, config.motion_mask)
                yield round(start, 3), round(end, 3), clip
        except OverflowError as error:
            raise VideoError(path, f"has too many frames to hold, {error}; use a shorter --window") from None


# ---- Scores ------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model, encoding, prompt, answers, starts):
    """log P(answers[j][starts[j]:] | clip, prompt, answers[j][:starts[j]]) -> (J,). Prompt and answers are
    lists of ids; the prompt is read once for all answers."""
    x = model.embed(torch.tensor([prompt], device=model.device), encoding.tokens)  # (1, S, D)
    cache = KVCache(model.config, 1, len(prompt), x)
    last = model.llama(x, cache)[:, -1:]  # (1, 1, D): predicts the first token of every answer
    results = []
    for i in range(0, len(answers), PHRASES_PER_BATCH):
        batch = answers[i : i + PHRASES_PER_BATCH]
        L = max(len(ids) for ids in batch)
        padded = [ids + [0] * (L - len(ids)) for ids in batch]
        target = torch.tensor(padded, device=model.device)  # (J, L)
        counted = torch.zeros(target.shape, device=model.device)
        for j, ids in enumerate(batch):
            counted[j, starts[i + j] : len(ids)] = 1
        # a cache with the prompt in every row, and room for the answers behind it
        longer = KVCache(model.config, len(batch), len(prompt) + L, x)
        for layer in range(model.config.llama_layers):
            longer.k[layer][:, :, : len(prompt)] = cache.k[layer]
            longer.v[layer][:, :, : len(prompt)] = cache.v[layer]
        longer.length.fill_(len(prompt))
        hidden = model.llama(model.llama.embed_tokens(target), longer)[:, :-1]
        hidden = torch.cat([last.expand(len(batch), -1, -1), hidden], dim=1)  # (J, L, D): predicts each token
        log_p = model.llama.lm_head(hidden).float().log_softmax(-1)  # (J, L, vocabulary)
        log_p = log_p.gather(-1, target[..., None])[..., 0]  # (J, L)
        results.append((log_p * counted).sum(1))
    return torch.cat(results)


def describe(model, tokenizer, clip, encoding, max_new_tokens=300):
    """-> (prompt that asks for a description, the answer's beginning)"""
    prompt = tokenizer.encode_prompt(DESCRIBE_QUESTIONS[0], clip.message, model.config.n_visual)
    room = min(max_new_tokens, model.config.context_length - len(prompt))
    (new,) = model.generate(encoding, [prompt], room, eos_id=tokenizer.eos)
    return prompt, tokenizer.decode(new)


def contrast_score(model, tokenizer, clip, encoding, phrases):
    """How likely an answer that begins as the model's own continues with one of the phrases.

    Each phrase excludes the others, so their probabilities add up. Which word they fit behind is not known,
    so they are tried behind each of the first words, and the highest sum counts."""
    prompt, said = describe(model, tokenizer, clip, encoding, 2 * SUBJECT_WORDS)
    words = said.split()[:SUBJECT_WORDS]
    answers = []
    starts = []
    for n in range(len(words) + 1):
        beginning = tokenizer.sp.encode(" ".join(words[:n]))
        for phrase in phrases:
            ids = tokenizer.sp.encode(" ".join([*words[:n], phrase]))
            answers.append(ids)
            starts.append(len(os.path.commonprefix([beginning, ids])))
    p = log_likelihoods(model, encoding, prompt, answers, starts).exp()
    return p.view(-1, len(phrases)).sum(1).max().clamp(max=1).item()


def yes_score(model, tokenizer, clip, encoding):
    """P(yes) / (P(yes) + P(no))"""
    prompt = tokenizer.encode_prompt(YES_QUESTION, clip.message, model.config.n_visual)
    answers = [tokenizer.sp.encode(word) for word in ("Yes", "yes", "No", "no")]
    yes, no = log_likelihoods(model, encoding, prompt, answers, [0] * 4).view(2, 2).logsumexp(1)
    return (yes - no).sigmoid().item()


def watch(model, tokenizer, path, score, length=4.0, stride=2.0, threshold=0.5):
    """Yields a Window as each closes. score(model, tokenizer, clip, encoding) -> 0 to 1; from `threshold` on
    the window is described. Raises VideoError."""
    open_windows = []
    for start, end, clip in read_windows(path, model.config, length, stride):
        encoding = encode_clips(model, [clip])
        open_windows = [window for window in open_windows if window[1] > start]
        open_windows.append((start, end, score(model, tokenizer, clip, encoding)))
        shared = shared_score(open_windows)
        description = None
        if shared >= threshold:
            _, description = describe(model, tokenizer, clip, encoding)
        yield Window(path, start, end, round(shared, 4), description)


def shared_score(overlapping):
    """[(start, end, own score)] of windows that overlap the last of them -> the last one's score: the mean,
    weighted by how much of the last one each covers. Later windows are not waited for."""
    newest = overlapping[-1][0]
    total = 0.0
    weights = 0.0
    for start, end, own in overlapping:
        weight = end - max(newest, start)
        total += weight * own
        weights += weight
    return total / weights


def read_phrases(path):
    """The phrases of the abnormal kinds in a file {kind: phrase}; the kind "normal" is left out."""
    try:
        kinds = json.loads(Path(path).read_text(encoding="utf-8"))
        phrases = [phrase for kind, phrase in kinds.items() if kind != "normal"]
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise ValueError("no phrases")
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{path}: must be JSON like {{"kind": "phrase", ...}} ({error})') from None
    return phrases


# ---- Agreement with annotations ----------------------------------------------------------------------------


def auc(positive, negative):
    """The probability that a score of the first list is above one of the second, where equal ones count half.
    None if a list is empty."""
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).mean() / (2 * len(negative)))


def overlap(window, interval):
    """In seconds"""
    return max(0.0, min(window.end, interval[1]) - max(window.start, interval[0]))


def read_annotations(path):
    """An index with rows {"video", "abnormal"} -> [(path of the video, [(start, end), …])] in seconds.

    "abnormal" is [start, end], a list of such intervals, or [] for a normal video. Raises ValueError that
    names the line."""
    rows = []
    folder = os.path.dirname(path)
    with open(path, "rb") as file:  # as bytes, a line ends with a line feed only, not with U+2028 in a text
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    row = json.loads(text)
                    rows.append((os.path.join(folder, row["video"]), read_intervals(row["abnormal"])))
            except (ValueError, TypeError, KeyError, RecursionError):
                wanted = '"video" and "abnormal": [start, end], a list of such, or []'
                raise ValueError(f"{path}, line {number}: needs {wanted}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_intervals(abnormal):
    """[start, end], a list of such, or [] -> [(start, end), …]. Raises ValueError or TypeError for others."""
    if abnormal and not isinstance(abnormal[0], list):
        abnormal = [abnormal]
    intervals = [(float(start), float(end)) for start, end in abnormal]
    if not all(0 <= start < end < math.inf for start, end in intervals):
        raise ValueError("not an interval")
    return intervals


def check_intervals(path, intervals, seen):
    """Raises ValueError for an interval behind the end of the video: frame numbers, perhaps, for seconds."""
    length = seen[-1].end
    for start, end in intervals:
        if end > length + 1:
            raise ValueError(f"{path}: [{start:g}, {end:g}] is beyond its end at {length:g} s; give seconds")


def agreement(found):
    """found: [(windows of a video, its intervals)] -> {videos, abnormal, hits, chance, windows, auc}.

    abnormal: videos with an interval; hits: how many of them have their highest window on one; chance: the
    share of hits that a random window would have. For the AUC a window is abnormal if at least half of it is
    inside an interval, normal if nothing of it is, and left out otherwise."""
    hits = 0
    chances = []
    positive = []
    negative = []
    for seen, intervals in found:
        inside = [sum(overlap(window, interval) for interval in intervals) for window in seen]
        if intervals:
            highest = max(range(len(seen)), key=lambda i: seen[i].score)
            hits += inside[highest] > 0
            chances.append(sum(seconds > 0 for seconds in inside) / len(seen))
        for window, seconds in zip(seen, inside, strict=True):
            if seconds >= (window.end - window.start) / 2:
                positive.append(window.score)
            elif seconds == 0:
                negative.append(window.score)
    result = {"videos": len(found), "abnormal": len(chances), "hits": hits}
    result["chance"] = sum(chances) / max(len(chances), 1)
    return result | {"windows": len(positive) + len(negative), "auc": auc(positive, negative)}


def frame_scores(seen, times):
    """The score of each frame (N,): the mean of the windows that are open at its time in `times` (N,)."""
    is_open = np.array([(w.start - EPSILON <= times) & (times < w.end + EPSILON) for w in seen])
    scores = np.array([w.score for w in seen])
    return scores @ is_open / np.maximum(is_open.sum(0), 1)


def frame_auc(found):
    """found: [(scores of a video's frames (N,), their times (N,), intervals)] -> AUC over all frames of all
    videos together, as the field reports it ("micro"); None without abnormal, or without normal, frames."""
    positive = []
    negative = []
    for scores, times, intervals in found:
        abnormal = np.zeros(len(times), bool)
        for start, end in intervals:
            abnormal |= (start <= times) & (times < end)
        positive.append(scores[abnormal])
        negative.append(scores[~abnormal])
    return auc(np.concatenate(positive), np.concatenate(negative))


def save_scores(folder, path, scores, taken):
    """Writes FOLDER/<name of the video>.npy; with its folder's name in front if that is taken."""
    name = Path(path).stem
    if name in taken:
        name = f"{Path(path).resolve().parent.name}_{name}"
    taken.add(name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, scores.astype(np.float32))
    replace_file(Path(folder) / f"{name}.npy", content.getvalue())


def report(result):
    n = result["abnormal"]
    areas = [result[name] for name in ("auc", "frame_auc")]
    windows, frames = ("undefined" if area is None else f"{area:.3f}" for area in areas)
    hits = f"{result['hits'] / n:.0%} of {n} videos (by chance {result['chance']:.0%})" if n else "no event"
    normal = f"; {result['videos'] - n} normal" if result["videos"] > n else ""
    return (
        f"highest window on the event: {hits}{normal}\nAUC of window scores: {windows} "
        f"({result['windows']} windows)\nAUC of frame scores: {frames} ({result['frames']} frames)"
    )


# ---- Pictures ----------------------------------------------------------------------------------------------


def curve(seen, n):
    """n scores at equal distances over the video: the mean of the windows that are open at each time."""
    t = (np.arange(n) + 0.5) * seen[-1].end / n
    is_open = np.array([(w.start <= t) & (t < w.end) for w in seen])  # (windows, n)
    scores = np.array([w.score for w in seen])
    return scores @ is_open / np.maximum(is_open.sum(0), 1)


def events(seen, threshold):
    """Windows that stand out, neighbours as one -> [(start of the first, end of the last, the highest)]"""
    found = []
    for stands_out, run in groupby(seen, lambda window: window.score >= threshold):
        run = list(run)
        if stands_out:
            found.append((run[0].start, run[-1].end, max(run, key=lambda window: window.score)))
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
    axes.fill_between(np.linspace(0, seen[-1].end, 1000), curve(seen, 1000), alpha=0.3)
    axes.plot([(w.start + w.end) / 2 for w in seen], [w.score for w in seen], ".-", label="windows")
    axes.axhline(threshold, color="grey", linestyle=":")
    for start, end, _ in events(seen, threshold):
        axes.axvspan(start, end, color="red", alpha=0.1)
    axes.set(xlim=(0, seen[-1].end), ylim=(0, 1.02), xlabel="seconds", ylabel="anomaly score")
    axes.set_title(seen[0].video, parse_math=False)  # a file name may contain a $
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
    """The video with the curve below the picture, and a line that walks over it: one run of ffmpeg."""
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


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--video", nargs="+", action="extend", default=[], metavar="PATH", help='"-" is a stream on stdin')
    add(
        "--annotations",
        metavar="INDEX",
        help='instead: rows {"video", "abnormal": [start, end], a list of such, or []} to agree with',
    )
    add("--window", type=number(float, 0.05), default=4.0, metavar="S", help="seconds (default: 4)")
    add(
        "--stride",
        type=number(float, 0.05),
        default=2.0,
        metavar="S",
        help="from one to the next (default: 2)",
    )
    add("--score", choices=["contrast", "yes"], help="default: contrast if there are phrases, else yes")
    add("--kinds", metavar="FILE", help="phrases for contrast (default for toy weights: examples/kinds.json)")
    add("--threshold", type=number(float, 0, 1), default=0.5, help="scores that stand out (default: 0.5)")
    add(
        "--scores",
        metavar="DIR",
        help="with --annotations: write each video's scores per frame to DIR/NAME.npy",
    )
    add("--json", action="store_true", help="one JSON object a window; results of --annotations on stderr")
    add("--plot", metavar="FILE.png", help="also draw the curve (needs matplotlib)")
    add("--out-video", metavar="FILE.mp4", help="also write the video with the curve below the picture")
    add_model_options(p)
    args = p.parse_args(argv)
    if bool(args.video) == bool(args.annotations):
        p.error("give either --video or --annotations")
    if args.scores and not args.annotations:
        p.error("--scores is for --annotations")
    if args.kinds and args.score == "yes":
        p.error("--kinds is for --score contrast")
    if args.stride > args.window:
        p.error("--stride is longer than --window: what lies between two windows would not be seen")
    outputs = [Path(file) for file in (args.plot, args.out_video) if file]
    if outputs and len(args.video) != 1 or args.out_video and args.video == ["-"]:
        p.error("--plot and --out-video take one --video, and --out-video no stream")
    for file in outputs:
        if not file.parent.is_dir():
            p.error(f"{file.parent}: no such folder")
        if file.resolve() == Path(args.video[0]).resolve():
            p.error(f"{file}: is the video itself")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            p.error("--plot needs matplotlib: pip install matplotlib")
    if "-" in args.video and sys.stdin.isatty():
        p.error("--video - reads a video from standard input, which is a terminal here")
    return args


def choose_score(args, config):
    """The function that scores a clip, as `watch` takes it."""
    kinds = args.kinds
    if kinds is None and config.vocab_size < 32000:  # a small vocabulary is that of the toy world
        kinds = TOY_KINDS
    if args.score == "yes" or (args.score is None and kinds is None):
        return yes_score
    if kinds is None:
        raise ValueError("--score contrast needs --kinds FILE with these weights")
    return partial(contrast_score, phrases=read_phrases(kinds))


def show_video(path, found, args):
    """Shows the windows of one video, an iterator, as the options say -> those that are needed later."""
    seen = []
    keep = not args.json or args.annotations or args.plot or args.out_video  # a stream has no end
    bar = tqdm(desc=path, unit="s of video", leave=False, disable=args.json, file=sys.stderr)
    try:
        for window in found:
            bar.update(window.end - bar.n)
            if keep:
                seen.append(window)
            if args.json:
                print(json.dumps(asdict(window)), flush=True)
    except KeyboardInterrupt:  # the way to end a stream, of which what was seen is shown
        if path != "-" or not seen:
            raise
    finally:
        bar.close()
    if args.video and not args.json:
        print_timeline(seen, args.threshold)
    if args.plot:
        write_plot(seen, args.threshold, args.plot)
    if args.out_video:
        write_video(seen, args.threshold, args.out_video)
    return seen


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        jobs = [(path, None) for path in args.video]
        if args.annotations:
            jobs = read_annotations(args.annotations)
        model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
        score = choose_score(args, model.config)
    except PROBLEMS as error:
        return print_error(error)
    threshold = math.inf if args.annotations else args.threshold  # there only scores count, no descriptions
    status = 0
    scored = []
    frames = []
    names = set()
    for path, intervals in jobs:
        found = watch(model, tokenizer, path, score, args.window, args.stride, threshold)
        try:
            seen = show_video(path, found, args)
            if args.annotations:
                check_intervals(path, intervals, seen)
                times = open_video(path, model.config.image_size).seconds
                scores = frame_scores(seen, times)
                if args.scores:
                    save_scores(args.scores, path, scores, names)
                scored.append((seen, intervals))
                frames.append((scores, times, intervals))
        except PROBLEMS as error:
            status = print_error(error)
    if scored:
        result = agreement(scored)
        result |= {"frames": sum(len(times) for _, times, _ in frames), "frame_auc": frame_auc(frames)}
        text = json.dumps(result) if args.json else report(result)
        print(text, file=sys.stderr if args.json else sys.stdout)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
