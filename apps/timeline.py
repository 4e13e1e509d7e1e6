"""When does it happen? A video of any length in overlapping windows, each with an anomaly score from 0 to 1.

    python -m apps.timeline --video long.mp4                                  # a curve, and what stands out in words
    python -m apps.timeline --video long.mp4 --json                           # one object a window, as soon as it closes
    python -m apps.timeline --video long.mp4 --plot curve.png --out-video with_curve.mp4
    tail -c +1 -f growing.ts | python -m apps.timeline --video - --json       # a stream, or a file that still grows
    python -m apps.timeline --annotations data/toy/long.jsonl                 # how well it finds what was annotated

The video is decoded once, front to back, and only the frames of the open window are held. A window's frames are those
that `read_clip` would take from a clip cut out just there, so the model sees what it was trained on. The score is how
likely the model is to say something abnormal, in one of two ways:

    contrast  It begins to describe the window by itself ("A red car ..."). The score is the probability that a phrase of
              an abnormal kind ("drives the wrong way", ...) comes next, added over the kinds, where that is highest.
    yes       P(yes) / (P(yes) + P(no)) for the first word of the answer to a fixed question.

Windows that share frames are seldom wrong together, so each score is a mean with the windows before that it overlaps.

Times are frame numbers over the frame rate. Exit status: 0, or 2 if anything failed.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from data import CONTAINERS, DESCRIBE_QUESTIONS, VideoError, _ffmpeg, make_clip, sample_frames
from hawk import KVCache
from sample import PROBLEMS, Parser, add_model_options, complain, encode_clips, load_from_options, number, small_world

KINDS = Path(__file__).parent.parent / "examples" / "kinds.json"
YES_QUESTION = "Does anything unusual or dangerous happen in this video? Answer yes or no."
SUBJECT_WORDS = 5  # a phrase is tried after each of the answer's first words: "A red car" is three
MOST_BYTES = 1 << 30  # of the frames of one window
TRY_AT_ONCE = 16  # phrases in one batch
PICTURE, STRIP = (640, 360), 96  # pixels of --out-video, and the height of the curve below

# ----------------------------------------------------------------------------------------------------------------------
# Windows


@dataclass
class Window:
    """One object of --json."""

    video: str
    start: float  # seconds
    end: float
    score: float  # 0 to 1, see shared_score
    description: str | None  # of windows that stand out


def windows(frames, length, step):
    """Yields (number of the first frame, frames) of windows of `length` frames, `step` (may be a fraction) apart, as they
    close. One more, of the last `length` frames or of all if there are fewer, reaches the end."""
    held, count, k, closed = deque(maxlen=length), 0, 0, 0
    for frame in frames:
        held.append(frame)
        count += 1
        if count == round(k * step) + length:
            yield count - length, list(held)
            k, closed = k + 1, count
    if count > closed:
        yield count - len(held), list(held)


def frame_rate(run):
    """Of a run that has given a frame. ffmpeg prints two digits: 29.97 is 30000 / 1001."""
    printed = run.header()[2] or 25.0
    exact = round(printed * 1.001) * 1000 / 1001
    return exact if abs(exact - printed) < 0.0051 else printed


def read_windows(path, config, window, stride, bar):
    """Yields (start, end, Clip) as windows close; path "-" is standard input. Raises VideoError, also after the last
    whole window of a file that is cut."""
    stdin = sys.stdin if path == "-" else None
    with _ffmpeg(path, config.image_size, stdin=stdin) as run:
        frames = checked(run)
        head = next(frames)
        rate = frame_rate(run)
        length = max(1, math.ceil(window * rate - 1e-6))
        if rate > 500:  # of each frame only its own time is known
            raise VideoError(path, f"has no usable frame rate ({rate:.0f}); give it one with ffmpeg -i IN -r 25 OUT")
        if length * head.size > MOST_BYTES:
            raise VideoError(path, f"a window of {window} s has {length} frames, too many to hold; use a shorter one")
        bar.total = None if stdin else run.header()[3] or None
        for first, held in windows(chain([head], frames), length, max(1.0, stride * rate)):
            run.timer.cancel()  # the limit is ffmpeg's; it must not end because the model takes its time
            clip = make_clip(held, rate, sample_frames(len(held), config.n_frames), config.motion)
            yield round(first / rate, 3), round((first + len(held)) / rate, 3), clip
            run.timer = threading.Timer(run.timer.interval, run.process.kill)
            run.timer.start()


def checked(run):
    """Its frames; after the last one, VideoError if something was wrong."""
    count = 0
    for count, frame in enumerate(run.frames(), 1):  # noqa: B007
        yield frame
    if run.path == "-" and not count:
        reason = "gives no frames; an mp4 in a pipe needs its index in front (ffmpeg -movflags +faststart)"
        raise VideoError("-", reason)
    run.check(count)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def log_likelihoods(model, encoding, prompt, answers, starts):
    """log P(answers[j][starts[j]:] | clip, prompt, answers[j][:starts[j]]) -> (J,). Lists of ids; the prompt is read once."""
    x = model.embed(torch.tensor([prompt], device=model.device), encoding.tokens)
    cache = KVCache(model.config, 1, len(prompt), x)
    before, result = model.llama(x, cache)[:, -1:], []  # (1, 1, D)
    for i in range(0, len(answers), TRY_AT_ONCE):
        batch = list(zip(answers, starts, strict=True))[i : i + TRY_AT_ONCE]
        J, L = len(batch), max(len(ids) for ids, _ in batch)
        target = torch.tensor([ids + [0] * (L - len(ids)) for ids, _ in batch], device=model.device)  # (J, L)
        kept = torch.tensor([[start <= t < len(ids) for t in range(L)] for ids, start in batch], device=model.device)
        longer = KVCache(model.config, J, len(prompt) + L, x)
        for each, of_prompt in zip(longer.k + longer.v, cache.k + cache.v, strict=True):
            each[:, :, : len(prompt)] = of_prompt
        longer.length = len(prompt)
        hidden = model.llama(model.llama.embed_tokens(target), longer)[:, :-1]
        hidden = torch.cat([before.expand(J, -1, -1), hidden], dim=1)  # (J, L, D): what predicts each token
        log_p = model.llama.lm_head(hidden).float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
        result.append((log_p * kept).sum(1))
    return torch.cat(result)


def reply(model, tokenizer, clip, encoding, max_new_tokens=128):
    """-> (prompt that asks for a description, the answer's beginning)"""
    prompt = tokenizer.encode_prompt(DESCRIBE_QUESTIONS[0], clip.message, model.config.n_visual)
    new = model.generate(None, None, [prompt], max_new_tokens, eos_id=tokenizer.eos, encoding=encoding)[0]
    return prompt, tokenizer.decode(new)


def contrast_score(model, tokenizer, clip, encoding, phrases):
    """How likely an answer that begins as the model's own goes on with one of the phrases. Each excludes the others, so
    their probabilities add up; after which word they fit, the probabilities themselves tell."""
    prompt, said = reply(model, tokenizer, clip, encoding, 2 * SUBJECT_WORDS)
    words, answers, starts = said.split(), [], []
    for n in range(min(SUBJECT_WORDS, len(words)) + 1):
        begun = tokenizer.sp.encode(" ".join(words[:n]))
        for phrase in phrases:
            answers.append(tokenizer.sp.encode(" ".join([*words[:n], phrase])))
            starts.append(len(os.path.commonprefix([begun, answers[-1]])))
    p = log_likelihoods(model, encoding, prompt, answers, starts).exp()
    return p.view(-1, len(phrases)).sum(1).max().clamp(max=1).item()


def yes_score(model, tokenizer, clip, encoding):
    """P(yes) / (P(yes) + P(no))"""
    prompt = tokenizer.encode_prompt(YES_QUESTION, clip.message, model.config.n_visual)
    answers = [tokenizer.sp.encode(word) for word in ("Yes", "yes", "No", "no")]
    yes, no = log_likelihoods(model, encoding, prompt, answers, [0] * 4).view(2, 2).logsumexp(1)
    return (yes - no).sigmoid().item()


def watch(model, tokenizer, path, score, window=4.0, stride=2.0, threshold=0.5, bar=None):
    """Yields a Window as each closes. score(model, tokenizer, clip, encoding) -> 0 to 1; from `threshold` on the window
    is described. Raises VideoError."""
    bar, before = tqdm(disable=True) if bar is None else bar, []
    for start, end, clip in read_windows(path, model.config, window, stride, bar):
        encoding = encode_clips(model, [clip])
        before.append((start, end, score(model, tokenizer, clip, encoding)))
        found, before = shared_score(before)
        words = reply(model, tokenizer, clip, encoding)[1] if found >= threshold else None
        bar.update(end - bar.n)
        yield Window(path, start, end, round(found, 4), words)


def shared_score(seen):
    """seen: [(start, end, score of its own)] of windows up to the newest -> (the newest one's score: the mean, weighted by
    how much of it each of them covers; those that cover some of it). Windows that come later are not waited for."""
    start = seen[-1][0]
    seen = [window for window in seen if window[1] > start]
    weights = [end - max(start, begun) for begun, end, _ in seen]
    return sum(w * own for w, (*_, own) in zip(weights, seen, strict=True)) / sum(weights), seen


def read_phrases(path):
    """The phrases of the abnormal kinds in a file {kind: phrase}; the kind "normal" is left out."""
    try:
        kinds = json.loads(Path(path).read_text())
        phrases = [phrase for kind, phrase in kinds.items() if kind != "normal"]
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise ValueError("no phrases")
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{path}: must be JSON like {{"kind": "phrase", ...}} ({error})') from None
    return phrases


# ----------------------------------------------------------------------------------------------------------------------
# Against annotations


def auc(positive, negative):
    """The probability that a score of the first list is above one of the second, equal ones counting half; None for empty."""
    if not len(positive) or not len(negative):
        return None
    below, up_to = (np.searchsorted(np.sort(negative), positive, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(negative)))


def overlap(window, interval):
    return max(0.0, min(window.end, interval[1]) - max(window.start, interval[0]))  # seconds


def read_annotations(path):
    """Rows {"video", "abnormal": [start, end]} of an index -> [(path of the video, interval)]"""
    rows, folder = [], os.path.dirname(path)
    for line_number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            start, end = map(float, row["abnormal"])
            if not start < end:
                raise ValueError("an empty interval")
            rows.append((os.path.join(folder, row["video"]), (start, end)))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'{path}, line {line_number}: needs "video" and "abnormal": [start, end]') from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def agreement(found):
    """found: [(windows of a video, interval)] -> {videos, hits: whose highest window overlaps the interval, chance: the
    share of hits if it were any window, windows, auc}. For the AUC a window is abnormal if at least half of it is inside
    the interval, normal if nothing is, and else left out."""
    hits, chance, positive, negative = 0, 0.0, [], []
    for seen, interval in found:
        hits += overlap(max(seen, key=lambda w: w.score), interval) > 0
        chance += sum(overlap(w, interval) > 0 for w in seen) / len(seen) / len(found)
        positive += [w.score for w in seen if overlap(w, interval) >= (w.end - w.start) / 2]
        negative += [w.score for w in seen if overlap(w, interval) == 0]
    counts = {"videos": len(found), "hits": hits, "chance": chance, "windows": len(positive) + len(negative)}
    return counts | {"auc": auc(positive, negative)}


def report(result):
    hits, area = result["hits"] / result["videos"], "undefined" if result["auc"] is None else f"{result['auc']:.3f}"
    return (
        f"highest window on the event: {hits:.0%} of {result['videos']} videos (by chance {result['chance']:.0%})\n"
        f"AUC of window scores: {area} ({result['windows']} windows)"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def curve(seen, n):
    """n scores at equal distances from the start to the end of the video: the mean of the windows that are open then."""
    t = (np.arange(n) + 0.5) * seen[-1].end / n
    inside = np.array([(w.start <= t) & (t < w.end) for w in seen])  # (windows, n)
    return np.array([w.score for w in seen]) @ inside / np.maximum(inside.sum(0), 1)


def events(seen, threshold):
    """Windows that stand out, neighbours as one: the highest of them, from the start of the first to the end of the last."""
    runs = [list(run) for high, run in groupby(seen, lambda w: w.score >= threshold) if high]
    return [(run[0].start, run[-1].end, max(run, key=lambda w: w.score)) for run in runs]


def print_timeline(seen, threshold, rows=4):
    """The curve in blocks, then a line for each event."""
    print(seen[0].video)
    width = max(20, shutil.get_terminal_size().columns - 6)
    scores = curve(seen, width)
    for row in range(rows - 1, -1, -1):
        label = {rows - 1: "1", 0: "0"}.get(row, "")
        heights = np.clip(np.rint((scores * rows - row) * 8), 0, 8).astype(int)
        print(f"{label:>2} " + "".join(" ▁▂▃▄▅▆▇█"[h] for h in heights))
    print(f"   0{f'{seen[-1].end:.1f} s':>{width - 1}}")
    for start, end, top in events(seen, threshold):
        print(f"{start:.1f}-{end:.1f} s  {top.score:.2f}  {top.description}")
    if max(w.score for w in seen) < threshold:
        top = max(seen, key=lambda w: w.score)
        print(f"nothing stands out; the highest score is {top.score:.2f} at {top.start:.1f}-{top.end:.1f} s")


def write_plot(seen, threshold, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes, scores = figure.subplots(), curve(seen, 1000)
    axes.fill_between(np.linspace(0, seen[-1].end, 1000), scores, alpha=0.3)
    axes.plot([(w.start + w.end) / 2 for w in seen], [w.score for w in seen], ".-", label="windows")
    axes.axhline(threshold, color="grey", linestyle=":")
    for start, end, _ in events(seen, threshold):
        axes.axvspan(start, end, color="red", alpha=0.1)
    axes.set(xlim=(0, seen[-1].end), ylim=(0, 1.02), xlabel="seconds", ylabel="anomaly score")
    axes.set_title(seen[0].video, parse_math=False)  # a file's name may hold a $
    temporary = f"{path}.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def draw_strip(seen, threshold, width=PICTURE[0], height=STRIP):
    """(height, width, 3) uint8: the curve filled, green to red, and a dotted line at the threshold."""
    scores = curve(seen, width)
    up = 1 - (np.arange(height)[:, None] + 0.5) / height  # of each row, 0 to 1
    strip = np.full((height, width, 3), 24, np.uint8)
    colours = np.stack([60 + 195 * scores, 200 - 150 * scores, np.full(width, 60.0)], axis=-1).astype(np.uint8)
    strip = np.where((up < scores)[..., None], colours, strip)
    strip[min(height - 1, int((1 - threshold) * height)), ::6] = 160
    return strip


def write_video(seen, threshold, path):
    """The video with the curve drawn under the picture and a line where it is: one run of ffmpeg, one drawn strip."""
    (width, height), end = PICTURE, seen[-1].end
    filters = (
        f"[0:v]scale={width}:{height}:force_original_aspect_ratio=decrease,setsar=1,"
        f"pad={width}:{height + STRIP}:(ow-iw)/2:({height}-ih)/2[picture];"
        f"[picture][1:v]overlay=0:{height}[both];color=white:size=2x{STRIP}[line];"
        f"[both][line]overlay=x='({width}-2)*min(t/{end},1)':y={height}:shortest=1[out]"
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-max_pixels", "100000000"]
    command += ["-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-i", f"file:{seen[0].video}"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{STRIP}", "-i", "pipe:0"]
    command += ["-filter_complex", filters, "-map", "[out]", "-pix_fmt", "yuv420p", "-f", "mp4", f"file:{path}.tmp"]
    done = subprocess.run(command, input=draw_strip(seen, threshold).tobytes(), capture_output=True)
    if done.returncode:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({done.stderr.decode(errors='replace').strip()})")
    os.replace(f"{path}.tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--video", nargs="+", action="extend", default=[], metavar="PATH", help='"-" is a stream on stdin')
    p.add_argument(
        "--annotations", metavar="INDEX", help='instead: rows {"video", "abnormal": [start, end]} to agree with'
    )
    p.add_argument("--window", type=number(float, 0.05), default=4.0, metavar="S", help="seconds (default: 4)")
    p.add_argument(
        "--stride", type=number(float, 0.05), default=2.0, metavar="S", help="from one to the next (default: 2)"
    )
    p.add_argument(
        "--score", choices=["contrast", "yes"], help="default: contrast with --kinds or small weights, else yes"
    )
    p.add_argument(
        "--kinds", metavar="FILE", help="phrases for contrast (default for small weights: examples/kinds.json)"
    )
    p.add_argument("--threshold", type=number(float, 0, 1), default=0.5, help="scores that stand out (default: 0.5)")
    p.add_argument("--json", action="store_true", help="one JSON object a window")
    p.add_argument("--plot", metavar="FILE.png", help="also draw the curve (needs matplotlib)")
    p.add_argument("--out-video", metavar="FILE.mp4", help="also write the video with the curve under the picture")
    add_model_options(p)
    args = p.parse_args(argv)
    if bool(args.video) == bool(args.annotations):
        p.error("give either --video or --annotations")
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


def scorer(args, config):
    """The function that scores a clip, as `watch` takes it."""
    kinds = args.kinds or (KINDS if small_world(config) else None)
    if (args.score or ("contrast" if kinds else "yes")) == "yes":
        return yes_score
    if kinds is None:
        raise ValueError("--score contrast needs --kinds FILE with these weights")
    return partial(contrast_score, phrases=read_phrases(kinds))


def timeline(path, watched, args):
    """Shows the windows of one video as the options want it; returns those that are still needed."""
    seen, keep = [], not args.json or args.annotations or args.plot or args.out_video  # else a stream goes on for ever
    with tqdm(desc=path, unit="s of video", leave=False, disable=args.json, file=sys.stderr) as bar:
        try:
            for window in watched(path, bar=bar):
                if keep:
                    seen.append(window)
                if args.json:
                    print(json.dumps(asdict(window)), flush=True)
        except KeyboardInterrupt:
            if path != "-" or not seen:
                raise
            # ctrl-C is how a stream ends: what was seen of it is shown
    if args.video and not args.json:
        print_timeline(seen, args.threshold)
    if args.plot:
        write_plot(seen, args.threshold, args.plot)
    if args.out_video:
        write_video(seen, args.threshold, args.out_video)
    return seen


def main(argv=None):
    args, failed, found = parse_args(argv), False, []
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        jobs = read_annotations(args.annotations) if args.annotations else [(path, None) for path in args.video]
        model, tokenizer = load_from_options(args)
        threshold = math.inf if args.annotations else args.threshold  # only scores are wanted: no descriptions
        how = {"window": args.window, "stride": args.stride, "threshold": threshold}
        watched = partial(watch, model, tokenizer, score=scorer(args, model.config), **how)
    except PROBLEMS as error:
        complain(error)
        return 2
    for path, interval in jobs:
        try:
            found.append((timeline(path, watched, args), interval))
        except PROBLEMS as error:
            failed = complain(error)
    if args.annotations and found:
        print(report(agreement(found)), file=sys.stderr if args.json else sys.stdout)
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
