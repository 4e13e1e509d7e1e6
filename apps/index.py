"""Your own clips -> an index to train on and one to test with.

    python -m apps.index clips --out data/mine                  # clips/normal/…, clips/fall/…: a folder each
    python -m apps.index clips --out data/mine --csv clips.csv  # or a table: video, kind, description, group

A video is a file, or a folder of numbered pictures. Each is read once; what cannot be read is left out, and
report.json says why. The first run writes OUT/sentences.json, {kind: the sentence that describes it}. Edit it
and run again: "The clip shows a fall." becomes "A person falls and stays on the ground.", say. All sentences
should begin alike, because apps.timeline listens for what follows (OUT/kinds.json). A description from the
table is added behind the sentence.

Clips of one recording belong on one side of the split. --group REGEX says which part of a path names the
recording, as in '--group cam[0-9]+'; the column "group" of the table does too. Otherwise each video counts as
a recording of its own.
"""

import csv
import json
import os
import re
import signal
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from apps.detect import YES_QUESTION
from data import VideoError, open_video, read_clip, replace_file
from sample import PROBLEMS, Parser, note, number, print_error

NORMAL = "normal"  # the kind in which nothing is abnormal
KIND_QUESTION = "What happens in the video?"


class Found(NamedTuple):
    """A video before it is read."""

    video: Path
    kind: str
    description: str  # of this video alone; "" for none
    group: str


# ---- What there is -----------------------------------------------------------------------------------------


def find_in_folders(folder, pattern):
    """The videos in FOLDER/KIND/ -> [Found]. ValueError if there are less than two kinds, or an empty one."""
    kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(kinds) < 2:
        raise ValueError(f"{folder}: needs a folder for each kind, such as {folder}/normal and {folder}/fall")
    found = []
    for kind in kinds:
        videos = sorted(path for path in kind.iterdir() if not path.name.startswith("."))
        if not videos:
            raise ValueError(f"{kind}: is empty; put clips of this kind there, or remove the folder")
        found += [Found(path, kind.name.lower(), "", group_of(path, pattern)) for path in videos]
    return found


def find_in_table(file, folder, pattern):
    """The rows of a CSV file with columns video and kind, perhaps also description and group -> [Found]."""
    found = []
    with open(file, newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened, strict=True)
        try:
            missing = {"video", "kind"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"has no column {' and no '.join(sorted(missing))}")
            for row in reader:
                if not row["video"] or not row["kind"]:
                    raise ValueError("needs a video and a kind")
                path = folder / row["video"]
                group = row.get("group") or group_of(path, pattern)
                description = (row.get("description") or "").strip()
                found.append(Found(path, row["kind"].strip().lower(), description, group))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}") from None
    if len({row.kind for row in found}) < 2:
        raise ValueError(f"{file}: needs rows of two kinds or more")
    return found


def group_of(path, pattern):
    """What names the recording in a path: the first match of the pattern, else the whole path."""
    match = re.search(pattern, str(path)) if pattern else None
    return match[0] if match else str(path)


def check_video(path):
    """(its length in seconds, None), or (None, why it cannot be read)."""
    try:
        read_clip(path, 4, 32, ("appearance",))
        seconds = open_video(path, 32).seconds
        return float(seconds[-1] * len(seconds) / max(len(seconds) - 1, 1)), None
    except VideoError as error:
        return None, str(error)


# ---- What it is called -------------------------------------------------------------------------------------


def read_sentences(file, kinds):
    """{kind: sentence}, from the file; what it lacks is made up and added to it."""
    sentences = json.loads(file.read_text()) if file.exists() else {}
    if not isinstance(sentences, dict) or not all(isinstance(x, str) and x for x in sentences.values()):
        raise ValueError(f'{file}: must be JSON like {{"fall": "The clip shows a fall."}}')
    for kind in kinds:
        words = "nothing unusual" if kind == NORMAL else re.sub(r"[\W_]+", " ", kind).strip()
        sentences.setdefault(kind, f"The clip shows {words}.")
    replace_file(file, json.dumps(sentences, indent=1, ensure_ascii=False) + "\n")
    return {kind: sentences[kind] for kind in kinds}


def phrases_of(sentences):
    """{kind: what its sentence says after the words with which all begin}, without the full stop."""
    words = [sentence.rstrip(". ").split() for sentence in sentences.values()]
    alike = len(os.path.commonprefix(words))
    rests = [" ".join(some[alike:]) for some in words]
    return dict(zip(sentences, rests, strict=True))


def check_phrases(phrases, rows, file):
    """ValueError if a phrase is empty, or stands in a description of another kind."""
    for kind, phrase in phrases.items():
        if not phrase:
            raise ValueError(f"{file}: the sentence of {kind} says no more than the others; edit it")
        other = [row for row in rows if row["kind"] != kind and phrase.lower() in row["description"].lower()]
        if other:
            told = f"the phrase of {kind}, {phrase!r}, also stands in a description of {other[0]['kind']}"
            raise ValueError(f"{file}: {told}: {other[0]['description']!r}; edit one of the two")


def make_row(found, sentence, phrase):
    """A line of the index: the description, and the questions of apps.evaluate and apps.timeline."""
    answers = {
        YES_QUESTION: "No" if found.kind == NORMAL else "Yes",
        KIND_QUESTION: phrase.capitalize() + ".",
    }
    row = {"video": str(found.video.absolute()), "source": "own", "kind": found.kind}
    row["description"] = f"{sentence} {found.description}".strip()
    return row | {"qa": [{"q": q, "a": a} for q, a in answers.items()]}


# ---- Which side it is on -----------------------------------------------------------------------------------


def held_out(found, share, seed):
    """The groups that are for testing: taken at random until each kind has its share, as far as every kind
    keeps a group to train on."""
    total = Counter(row.kind for row in found)
    groups = {}
    for row in found:
        groups.setdefault(row.group, Counter())[row.kind] += 1
    left = {kind: sum(kind in counts for counts in groups.values()) for kind in total}
    tested = Counter()
    chosen = set()
    for name in np.random.default_rng(seed).permutation(sorted(groups)).tolist():
        counts = groups[name]
        wanted = any(tested[kind] + counts[kind] / 2 <= share * total[kind] for kind in counts)
        if share and wanted and all(left[kind] > 1 for kind in counts):
            chosen.add(name)
            tested += counts
            left = {kind: n - (kind in counts) for kind, n in left.items()}
    return chosen


def write_index(args):
    pattern = args.group and re.compile(args.group)
    if args.csv:
        found = find_in_table(args.csv, args.folder, pattern)
    else:
        found = find_in_folders(args.folder, pattern)
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(check_video, [row.video for row in found])
        checked = list(tqdm(checked, total=len(found), desc="reading", unit="video"))
    bad = [reason for _, reason in checked if reason]
    good = [row for row, (_, reason) in zip(found, checked, strict=True) if not reason]
    kinds = sorted({row.kind for row in found})
    lost = sorted(set(kinds) - {row.kind for row in good})
    if lost:
        raise ValueError(f"no video of {lost[0]} can be read; the first reason: {bad[0]}")

    file = args.out / "sentences.json"
    sentences = read_sentences(file, kinds)
    phrases = phrases_of(sentences)
    rows = [make_row(row, sentences[row.kind], phrases[row.kind]) for row in good]
    check_phrases(phrases, rows, file)
    chosen = held_out(good, args.test, args.seed)
    splits = {"train": [], "test": []}
    for place, row in zip(good, rows, strict=True):
        splits["test" if place.group in chosen else "train"].append(row)
    for split, some in splits.items():
        replace_file(args.out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    if not splits["test"]:
        (args.out / "test.jsonl").unlink()
    replace_file(args.out / "kinds.json", json.dumps(phrases, indent=1) + "\n")
    seconds = statistics.median(length for length, _ in checked if length is not None)
    replace_file(args.out / "clips.json", json.dumps({"seconds": round(seconds, 2)}) + "\n")
    replace_file(args.out / "report.json", json.dumps({"unreadable": bad}, indent=1) + "\n")
    print(f"{'kind':24}{'train':>8}{'test':>8}  sentence")
    for kind in kinds:
        counts = [sum(row["kind"] == kind for row in some) for some in splits.values()]
        print(f"{kind:24}{counts[0]:8}{counts[1]:8}  {sentences[kind]}")
    if bad:
        note(
            f"note: {len(bad)} of {len(found)} videos cannot be read and are left out: {args.out}/report.json"
        )
    note(f"note: the sentences can be edited: {file}; then run this again")


# ---- Command line ------------------------------------------------------------------------------------------


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("folder", type=Path, help="with a folder for each kind, or that of the videos in --csv")
    add("--csv", type=Path, help="a table with columns video and kind, perhaps description and group")
    add("--out", type=Path, required=True, help="folder to write the index to")
    add("--test", type=number(float, 0, 0.9), default=0.2, help="share that is held out (default: 0.2)")
    add("--group", metavar="REGEX", help="part of a path that names the recording (default: each its own)")
    add("--seed", type=number(int, 0), default=0, help="of the split (default: 0)")
    args = p.parse_args(argv)
    try:
        write_index(args)
    except re.error as error:
        return print_error(f"--group {args.group}: {error}")
    except PROBLEMS as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
