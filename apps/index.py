"""Clips of your own -> an index to train on, and one to test with.

    python -m apps.index clips --out data/mine                   # a folder per kind: normal, fall …
    python -m apps.index clips --out data/mine --csv clips.csv   # or a table: video, description, kind, group

A clip is a video file, or a folder of numbered pictures. Each is read once, the same way as in training. What
cannot be read is left out, counted, and listed with the reason in OUT/report.json. What was read is noted in
OUT/checked.jsonl: the next run, even after a kill, reads only what is new, has changed, or could not be read
before.

Every description begins with the sentence of its kind, followed by text from the table. The first run writes
the sentences to OUT/sentences.json. Edit them and run again, or give a file of your own (--sentences). They
yield OUT/kinds.json, {kind: phrase}, by which evaluation and timeline recognise the kinds: the phrase is what
follows the words that all sentences begin with, or else the whole sentence. A phrase must not occur in a
description of another kind. Sentences that begin alike are learned fastest.

Clips cut from one recording stay on one side of the split. The recording of a clip is given by the table
(column "group"), or by --group REGEX (the part of the name that matches), or else by the name before its last
number: cam3_0007.mp4 is from cam3_. If that makes all clips of a kind one recording, each of them counts as a
recording of its own. Only readable clips count. The last lines of the output say which rule was used.

If clips are added, the next run keeps the earlier ones on their sides (OUT/split.json), so that no test clip
was trained on before. A different --seed, --test or --group draws a new split.
"""

import csv
import filecmp
import hashlib
import io
import json
import os
import re
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from apps import run_program
from apps.detect import SUBJECT_WORDS, YES_QUESTION
from apps.scores import appendable, as_line, read_lines
from data import VideoError, check_row, read_clip, replace_file
from sample import PROBLEMS, make_parser, note, number, print_error

NORMAL = "normal"  # the kind in which nothing is abnormal
KIND_QUESTION = "What kind of event is it?"
TRIES = 20  # attempts at the split
COLUMNS = ("video", "description", "kind")
PICTURE = r"(?i).*\.(jpe?g|png|tiff?|bmp)"
SHOWS = "The clip shows {}."
SHOWN = {  # to begin OUT/sentences.json with; for other kinds, the name of the folder is used
    NORMAL: "nothing unusual",
    "accident": "an accident",
    "collision": "a collision",
    "crash": "a crash",
    "fall": "somebody who falls to the ground",
    "falling": "somebody who is falling to the ground",
    "fight": "a fight",
    "fighting": "people who are fighting",
    "fire": "a fire",
    "intrusion": "somebody who must not be there",
    "robbery": "a robbery",
    "theft": "a theft",
}


class Clip(NamedTuple):
    """A video before it is read."""

    video: Path
    kind: str
    text: str  # about this clip alone; "" for none
    name: str  # in the folder or the table
    group: str  # the recording that it was cut from; "" until that is known


# ---- What there is -----------------------------------------------------------------------------------------
def find_in_folders(folder, out):
    """The clips in FOLDER/KIND/ -> [Clip]. Raises ValueError; see the messages."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; give the one that holds normal/, fall/ and so on")
    kinds = sorted(path for path in visible(folder) if path.is_dir() and path.resolve() != out.resolve())
    kinds = [path for path in kinds if not (path / "checked.jsonl").exists()]  # another --out of this program
    beside = [path for path in visible(folder) if not path.is_dir()]
    if beside:
        note(f"note: {len(beside)} files beside the folders of kinds are left out, such as {beside[0]}")
    if not kinds:
        raise ValueError(f"{folder}: has no class folders; sort the clips into {folder}/{NORMAL} and so on")
    clips = []
    for path in kinds:
        found = visible(path)
        if not found:
            raise ValueError(f"{path}: is empty; put clips of this kind there, or remove the folder")
        if all(re.fullmatch(PICTURE, video.name) for video in found):
            raise ValueError(f"{path}: is one clip made of pictures; put this folder into that of its kind")
        clips += [Clip(video, path.name.lower(), "", f"{path.name}/{video.name}", "") for video in found]
    check_kinds(clips, folder)
    return clips


def visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def check_kinds(clips, where):
    kinds = {clip.kind for clip in clips}
    if len(kinds) < 2:
        raise ValueError(f"{where}: has only one kind ({', '.join(kinds) or 'none'}); two or more are needed")


def check_copies(clips):
    """ValueError for one clip in two class folders under the same name: one of them is in the wrong folder.
    clips: those that can be read; the same Thumbs.db may be everywhere."""
    earlier = {}
    for clip in clips:
        for other in earlier.setdefault(clip.video.name, []):
            if same_content(clip.video, other.video):
                raise ValueError(f"{clip.video}: is a copy of {other.video}; keep it where it belongs")
        earlier[clip.video.name].append(clip)


def note_copies(clips):
    """Says which clips are the same, byte for byte: one of them may be held out, and not be new then."""
    of_size = {}
    for clip in clips:
        if clip.video.is_file():
            of_size.setdefault(clip.video.stat().st_size, []).append(clip.video)
    copies = []
    for videos in of_size.values():
        first = {}
        if len(videos) > 1:
            for video in videos:
                with video.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                copies += [(video, first[content])] if content in first else []
                first.setdefault(content, video)
    if copies:
        told = "held-out clips may not be new; keep one of each"
        note(f"note: {len(copies)} clips are copies of others, {copies[0][0]} of {copies[0][1]}: {told}")


def same_content(one, other):
    """Whether two files, or two folders of files, are the same, byte for byte."""
    if one.is_dir() != other.is_dir():
        return False
    if one.is_file():
        return filecmp.cmp(one, other, shallow=False)
    names = [path.name for path in visible(one)]
    found = filecmp.cmpfiles(one, other, names, shallow=False)[0]
    return names == found == [path.name for path in visible(other)]


def find_in_table(file, folder):
    """The rows of a CSV file -> [Clip]. folder: what paths are relative to. ValueError names the line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8; save it as such") from None
    semicolons = ";" in text.partition("\n")[0]  # as spreadsheets write where the comma is the decimal mark
    # a space after a comma is not part of a name, and a quote after it still counts as a quote
    options = {"delimiter": ";" if semicolons else ",", "skipinitialspace": True, "strict": True}
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    separators = "semicolons" if semicolons else "commas"
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise ValueError(f"{file}, line 1: {error}") from None
    for name in COLUMNS:
        if name not in reader.fieldnames:
            raise ValueError(f"{file}: has no column {name!r}; needed are {', '.join(COLUMNS)}")
    for name in (*COLUMNS, "group"):
        if reader.fieldnames.count(name) > 1:
            raise ValueError(f"{file}: has two columns {name!r}; keep one of them")
    clips = []
    first = {}
    try:
        for row in reader:
            if any(cell.strip() for cell in row.get(None, ())):  # the rest of a text that was cut
                hint = f"put a text with {separators} in quotes"
                raise ValueError(f"has more fields than the first line; {hint}")
            clips.append(table_clip(row, folder))
            line = first.setdefault(os.path.realpath(clips[-1].video), reader.line_num)
            if line != reader.line_num:
                raise ValueError(f"{clips[-1].name} stands in line {line} already; keep one of the two")
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file}, line {reader.reader.line_num}: {error}") from None
    check_kinds(clips, file)
    return clips


def table_clip(row, folder):
    video, text, kind, group = ((row.get(name) or "").strip() for name in (*COLUMNS, "group"))
    if not video or not kind:
        raise ValueError("needs a video and a kind")
    return Clip(folder / video, kind.lower(), " ".join(text.split()), video, group)


# ---- Which recording a clip comes from ---------------------------------------------------------------------
def find_groups(clips, pattern):
    """([Clip] with groups, the rule in words). pattern: of --group, or None."""
    if pattern:
        names = [re.search(pattern, clip.name) for clip in clips]
        without = names.count(None)
        if without == len(names):
            raise ValueError(f"--group {pattern}: is in no name, such as {clips[0].name}")
        groups = [found[0] if found else clip.name for found, clip in zip(names, clips, strict=True)]
        rest = f"; {without} clips without it are recordings of their own" if without else ""
        return with_groups(clips, groups), f"a recording is what --group {pattern} finds in a name{rest}"
    if any(clip.group for clip in clips):
        groups = [clip.group or clip.name for clip in clips]
        return with_groups(clips, groups), 'a recording is what the column "group" says'
    grouped = with_groups(clips, [before_last_number(clip.video) for clip in clips])
    rule = "a recording is the part of the file names before the last number"
    alike = [kind for kind, n in sorted(groups_of_kinds(grouped).items()) if n < 2]
    if not alike:
        return grouped, rule
    # their numbers count the clips of the kind; the other kinds keep their recordings
    groups = [clip.name if clip.kind in alike else clip.group for clip in grouped]
    told = f"of {', '.join(alike)} each clip is a recording of its own, as their names do not tell recordings"
    told += " apart (--group REGEX can)"
    if any(clip.kind not in alike for clip in clips):
        told += f"; elsewhere {rule}"
    return with_groups(clips, groups), told


def with_groups(clips, groups):
    return [clip._replace(group=group) for clip, group in zip(clips, groups, strict=True)]


def before_last_number(video):
    """cam3_0007.mp4 -> cam3_; a name without a number is a recording of its own."""
    stem = video.name if video.is_dir() else video.stem
    found = re.fullmatch(r"(.*)(?<!\d)\d+\D*", stem)
    return found[1] if found else stem


def groups_of_kinds(clips):
    """{kind: how many recordings it has}, for kinds of more than one clip"""
    counts = Counter(clip.kind for clip in clips)
    pairs = Counter(kind for kind, _ in {(clip.kind, clip.group) for clip in clips})
    return {kind: n for kind, n in pairs.items() if counts[kind] > 1}


def held_out(clips, share, seed, before=None):
    """The groups to test with. In random order, each is taken that brings the shares of the kinds closer to
    the wanted one and leaves every kind a group to train on. Of TRIES such choices, the best is taken: with
    the fewest kinds without a test clip and, among those, the shares closest to the wanted one (in steps of
    0.1). before: {name: "train" or "test"} of clips that stay there; a group that has both is trained on.
    """
    total = Counter(clip.kind for clip in clips)
    groups = {}
    for clip in clips:
        groups.setdefault(clip.group, Counter())[clip.kind] += 1
    before = before or {}
    trained = {clip.group for clip in clips if before.get(clip.name) == "train"}
    tested_before = {clip.group for clip in clips if before.get(clip.name) == "test"} - trained
    new = sorted(groups.keys() - trained - tested_before)
    rng = np.random.default_rng(seed)

    def distance(tested):
        return sum((tested[kind] / total[kind] - share) ** 2 for kind in total)

    def choose():
        left = Counter(kind for counts in groups.values() for kind in counts)  # groups to train on
        tested = Counter()
        chosen = set(tested_before)
        for name in tested_before:
            tested += groups[name]
            left.subtract(groups[name].keys())
        for name in rng.permutation(new).tolist():
            counts = groups[name]
            if distance(tested + counts) < distance(tested) and all(left[kind] > 1 for kind in counts):
                chosen.add(name)
                tested += counts
                left.subtract(counts.keys())
        return len(total) - len(tested), int(10 * (distance(tested) / len(total)) ** 0.5), chosen

    return min((choose() for _ in range(TRIES)), key=lambda choice: choice[:2])[2]


def read_split(file, drawn):
    """{name of a clip: "train" or "test"} as an earlier run wrote it; {} if there is none, or it was drawn
    with other options. Raises ValueError if the file holds something else."""
    if not file.exists():
        return {}
    try:
        split = json.loads(file.read_bytes())
        clips = {name: {"train": "train", "test": "test"}[side] for name, side in split["clips"].items()}
        return clips if {key: split[key] for key in drawn} == drawn else {}
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(f"{file}: not what this program writes; remove it to draw a new split") from None


# ---- Can it be read? ---------------------------------------------------------------------------------------
def check_clips(clips, out, fps):
    """{video: {"seconds", "notes", "error"}}; what OUT/checked.jsonl knows already is not read again."""
    file = out / "checked.jsonl"
    known = {line["video"]: line for line in read_lines(file, lambda line: line["video"] + line["error"])}
    stamps = {str(clip.video): stamp(clip.video, fps) for clip in clips}
    # what could not be read is tried again: a repair need not show in the stamp
    good = {video: line.get("stamp") for video, line in known.items() if not line["error"]}
    fresh = [video for video in stamps if good.get(video) != stamps[video]]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with appendable(file) as record:
            checked = pool.map(lambda video: check(video, fps), fresh)
            bar = tqdm(checked, "reading", len(fresh), unit="clip", disable=not fresh)
            for video, found in zip(fresh, bar, strict=True):
                known[video] = {"video": video, "stamp": stamps[video]} | found
                record.write(as_line(known[video]))
                record.flush()
    finally:
        pool.shutdown(cancel_futures=True)  # after ctrl-C nothing more is read
    return {video: known[video] for video in stamps}


def stamp(video, fps):
    """A value that changes with the video, any of its pictures, or their fps; [] if there is no file."""
    try:
        status = os.stat(video)
        if not video.is_dir():
            return [status.st_size, status.st_mtime_ns, None]
        # rewriting a picture changes neither the size nor the time of its folder
        times = [entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(video)]
        return [len(times), max([status.st_mtime_ns, *times]), fps]
    except (OSError, ValueError):
        return []


def check(video, fps):
    """Reads a clip as training does, but small and without flow. "error" is "" if it can be read."""
    try:
        clip = read_clip(video, image_size=64, branches=("appearance",), fps=fps)
    except VideoError as error:
        return {"seconds": 0, "notes": [], "error": str(error)}
    n = len(clip.seconds)
    seconds = (
        (clip.seconds[-1] - clip.seconds[0]) * n / max(n - 1, 1)
    )  # the last frame is shown for a while, too
    return {"seconds": round(float(seconds), 1), "notes": clip.notes, "error": ""}


# ---- What is said of it ------------------------------------------------------------------------------------
def read_sentences(file, kinds):
    """{kind: sentence} from the file, kinds in lower case as everywhere; {} if there is none.
    Raises ValueError that names the file."""
    try:
        sentences = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(sentences, dict) or not all(isinstance(text, str) for text in sentences.values()):
        raise ValueError(f'{file}: must be JSON like {{"fall": "A person falls to the ground."}}')
    by_kind = {}
    for name, text in sentences.items():
        kind = name.lower()
        if kind in by_kind:
            raise ValueError(f"{file}: has two sentences for {kind}; keep one of them")
        if kind in kinds and not without_stop(text):
            raise ValueError(f"{file}: the sentence of {kind} is empty")
        by_kind[kind] = text
    return by_kind


def all_sentences(args, kinds):
    """({kind: sentence}, the file they are from). Adds missing ones to OUT/sentences.json."""
    file = args.sentences or args.out / "sentences.json"
    if args.sentences and not file.exists():
        raise ValueError(f"{file}: there is no such file; without --sentences, sentences are made up")
    sentences = read_sentences(file, kinds)
    missing = [kind for kind in kinds if kind not in sentences]
    if args.sentences and missing:
        raise ValueError(f"{file}: has no sentence for {missing[0]}")
    if missing:
        sentences |= {kind: SHOWS.format(SHOWN.get(kind, words(kind))) for kind in missing}
        replace_file(file, as_json(sentences))
    return {kind: sentences[kind].strip() for kind in kinds}, file


def words(kind):
    return re.sub(r"[\W_]+", " ", kind).strip() or kind


def without_stop(sentence):
    return sentence.strip().rstrip(".!? ")


def make_row(clip, sentence, fps, yes_no):
    """A line of the index. yes_no: also ask what apps.detect asks weights without phrases."""
    if clip.text.lower().startswith(without_stop(sentence).lower()):
        text = clip.text
    else:
        end = "" if sentence.endswith((".", "!", "?")) else "."
        text = f"{sentence}{end} {clip.text}".strip()
    row = {"video": os.path.abspath(clip.video), "source": "own", "kind": clip.kind, "description": text}
    row["qa"] = [{"q": KIND_QUESTION, "a": sentence}]
    try:
        check_row(row)
    except ValueError as error:
        raise ValueError(f"{clip.video}: {error}") from None
    if yes_no:
        row["qa"].append({"q": YES_QUESTION, "a": "No" if clip.kind == NORMAL else "Yes"})
    return row | ({"fps": fps} if clip.video.is_dir() else {})


def find_phrases(sentences, rows, file):
    """{kind: phrase}: what follows the words that all sentences begin with (no more words than apps.detect
    tries) or, if that does not tell the kinds apart, whole sentences. ValueError if those do not, either."""
    split = [without_stop(sentence).split() for sentence in sentences.values()]
    alike = min(len(os.path.commonprefix(split)), SUBJECT_WORDS)
    for start in (alike, 0):
        phrases = {kind: " ".join(some[start:]) for kind, some in zip(sentences, split, strict=True)}
        clash = find_clash(phrases, rows)
        if not clash:
            return phrases
    raise ValueError(f"{file}: sentences must tell the kinds apart; {clash}")


def find_clash(phrases, rows):
    """Says which phrase occurs in a description of another kind; "" if none does."""
    for kind, phrase in phrases.items():
        for row in rows:
            if row["kind"] != kind and phrase.lower() in " ".join(row["description"].lower().split()):
                return f"that of {kind} also stands in {row['description']!r} ({row['kind']}, {row['video']})"
    return ""


# ---- Putting it together -----------------------------------------------------------------------------------
def make_index(args):
    folder = args.folder or args.csv.parent
    clips = find_in_table(args.csv, folder) if args.csv else find_in_folders(folder, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = sorted({clip.kind for clip in clips})
    sentences, file = all_sentences(args, kinds)
    rows = {clip.video: make_row(clip, sentences[clip.kind], args.fps, args.yes_no) for clip in clips}
    phrases = find_phrases(sentences, rows.values(), file)  # before the slow part

    checked = check_clips(clips, args.out, args.fps)
    errors = {clip: checked[str(clip.video)]["error"] for clip in clips}
    good = [clip for clip in clips if not errors[clip]]
    for kind in sorted(set(kinds) - {clip.kind for clip in good}):
        first = next(error for clip, error in errors.items() if clip.kind == kind)
        raise ValueError(f"not one clip of {kind} can be read; the first: {first}")
    if not args.csv:
        check_copies(good)
    note_copies(good)
    good, rule = find_groups(good, args.group)  # a stray file is not a recording
    drawn = {"seed": args.seed, "test": args.test, "group": args.group}
    before = read_split(args.out / "split.json", drawn)
    chosen = held_out(good, args.test, args.seed, before)
    side = {clip.name: "test" if clip.group in chosen else "train" for clip in good}
    splits = {"train": [], "test": []}
    for clip in good:
        splits[side[clip.name]].append(rows[clip.video])
    # kinds alternate, because training computes its held-out loss on the first clips
    of_kinds = [[row for row in splits["test"] if row["kind"] == kind] for kind in kinds]
    splits["test"] = [row for turn in zip_longest(*of_kinds) for row in turn if row]

    counts = {kind: {} for kind in kinds}
    for kind in kinds:
        for split, some in splits.items():
            counts[kind][split] = sum(row["kind"] == kind for row in some)
        counts[kind]["unreadable"] = sum(clip.kind == kind for clip in clips) - sum(counts[kind].values())
    report = {"rule": rule, "seed": args.seed, "test": args.test, "kinds": counts}
    report["unreadable"] = [
        {"video": str(clip.video), "kind": clip.kind, "reason": error}
        for clip, error in errors.items()
        if error
    ]
    report["notes"] = [f"{clip.video}: {text}" for clip in good for text in checked[str(clip.video)]["notes"]]
    lengths = [checked[str(clip.video)]["seconds"] for clip in good]
    about = {"seconds": statistics.median(lengths), "sentences": sentences}  # for apps.timeline
    replace_file(args.out / "split.json", as_json(drawn | {"clips": before | side}))
    write(args.out, splits, phrases, about, report)
    tell(args, sentences, file, report)


def write(out, splits, phrases, about, report):
    """Writes all files of OUT. train.jsonl is removed first and written last, so that a run killed in between
    does not leave halves of two different splits."""
    files = {"report.json": as_json(report), "kinds.json": as_json(phrases), "clips.json": as_json(about)}
    for split in ("test", "train"):
        files[f"{split}.jsonl"] = b"".join(map(as_line, splits[split]))
    # what cannot be written as JSON has failed by now, while the earlier index is still intact
    (out / "train.jsonl").unlink(missing_ok=True)
    (out / "test.jsonl").unlink(missing_ok=True)
    for name, content in files.items():
        if content:
            replace_file(out / name, content)


def as_json(value):
    """JSON as bytes, with letters of all languages as they are. Only what is not UTF-8 in a file name is
    escaped: Python turns it into lone surrogates, which backslashreplace writes just as JSON would."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def tell(args, sentences, file, report):
    """Prints a table of the kinds, and notes on what a user may want to change."""
    print(f"{'kind':20}{'train':>7}{'test':>7}{'unreadable':>12}  description begins with")
    for kind, counts in report["kinds"].items():
        print(f"{kind:20}{counts['train']:7}{counts['test']:7}{counts['unreadable']:12}  {sentences[kind]}")
    sys.stdout.flush()
    note(f"note: {report['rule']}; seed {args.seed}")
    bad = len(report["unreadable"])
    if bad or report["notes"]:
        told = f"{bad} clips cannot be read and are left out, {len(report['notes'])} notes on others"
        note(f"note: {told}: {args.out}/report.json")
    folders = [entry["video"] for entry in report["unreadable"] if os.path.isdir(entry["video"])]
    if folders:
        told = f"{len(folders)} folders inside class folders, such as {folders[0]}, are no clips"
        note(f"note: {told}; videos in them are not looked for: move them up")
    alone = [kind for kind, counts in report["kinds"].items() if args.test and not counts["test"]]
    if alone:
        note(f"note: no clip of {', '.join(alone)} is held out: too few clips or recordings")
    if NORMAL not in sentences:
        note(f"note: no kind is called {NORMAL!r}, so every clip counts as abnormal")
    if not args.sentences:
        note(f"note: edit the sentences in {file}, then run the same command again")


# ---- Command line ------------------------------------------------------------------------------------------
def regex(text):
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(error) from None
    return text


def parse_args(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("folder", nargs="?", type=Path, help="holds a folder for each kind; with --csv, the videos")
    add("--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl, kinds.json and so on")
    add("--csv", type=Path, metavar="FILE", help="a table with columns video, description, kind (and group)")
    add("--sentences", type=Path, metavar="FILE", help="JSON {kind: sentence} (default: OUT/sentences.json)")
    add("--test", type=number(float, 0, 0.9), default=0.2, help="share that is held out (default: 0.2)")
    add("--group", type=regex, metavar="REGEX", help="matches the recording in KIND/FILE or the table's path")
    add("--fps", type=number(float, 0.001), default=25.0, help="frames per second of folders (default: 25)")
    add("--yes-no", action="store_true", help="also ask whether anything unusual happens (needs more steps)")
    add("--seed", type=number(int, 0), default=0, help="random seed of the split (default: 0)")
    args = p.parse_args(argv)
    if not args.folder and not args.csv:
        p.error("give the folder that holds a folder for each kind, or --csv FILE")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        make_index(args)
    except PROBLEMS as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
