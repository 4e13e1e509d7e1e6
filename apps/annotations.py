"""Hawk's published annotations, and the videos on this disk -> index files.

    python prepare.py hawk --annotations Hawk/Annotation --videos Hawk/Videos --out data/hawk

Videos are found even if their folders have been renamed or are links. Refusals ("As an AI …") get a flag.

In this file: what the sources are called, and how refusals sound; rows and files of an index, for all
programs that make one; the job, file by file and row by row.
"""

import json
import os
import re
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

import data
from apps import run_program
from hawk import require
from prepare import main

SOURCES = {  # folders of the published videos: how annotations and other copies of the videos spell them
    "UCF_Crime": "UCF[-_]?Crimes?", "ShanghaiTech": "ShanghaiTech(Dataset)?", "UBnormal": "UBnormal",
    "CUHK_Avenue": "avenue/avenue|CUHK[-_]Avenue", "Ped1": "ped1/ped1|ped1", "Ped2": "ped2/ped2|ped2",
    "DoTA": "DoTA",
}  # fmt: skip
REFUSALS = (  # a language model that should describe a video says that it is one, or that it sees no video
    r"^\W*(unfortunately, )?(i['’]m|i am) (just |only )?(sorry|afraid|unable|not able|not capable)\b",
    r"^\W*(unfortunately, )?(sorry,|sorry for [^.]{0,30}[,;] but\b|apologies[,.;]|my apolog|i apolog)",
    r"\bwithout (view|see|watch)ing the (\w+ )?(videos?|footage|clips?)\b(?! (camera|control|room|screen))",
    r"\b(no video (was |is |has been )?|video (was|is) not )(provided|given|attached)\b"
    r"(?! with (\w+ )?(sound|audio))",
    r"\b(for me to|my inability to) (\w+ )?(view|watch|see\b|access|analy|describ|process|provid|give|tell)",
    r"\bi (have not|haven['’]t) (seen|watched|viewed) the (\w+ )?"
    r"(videos?|footage|clips?)\b(?! (camera|control|room|screen))",
    r"\bi(['’]m| am) (only )?(designed|made|built|trained) to (process|read|work with) text\b",
    r"\b(language model|text-based (ai|model)|openai|i(['’]m| am) (just )?an ai)\b",
    r"\bas an? ([\w-]+ )?(ai|artificial intelligence)( model| assistant| system)?([,.;]| i\b| \w+ed by\b)",
    r"\bi(['’]m| am)?( \w+)? (can(not|['’]t| not| only)|could(n['’]t| not)|unable|lack|"
    r"not (able|capable|equipped)|(won['’]t|will not) be able|would need|"
    r"(do not|don.t) (have|possess)|have no)\b"
    r"[^.]{0,40}\b(view|watch|see\b|access|analy|describ|interpret|process|provid|offer|help|video|visual)",
    r"\bwithout (the (\w+ )?ability|being able|(having )?(\w+ )?access|"
    r"(view|see|watch)ing the actual|more \w+ or access)\b[^.,]{0,40}\b"
    r"(videos?|footage|clips?|media|visuals?)\b(?! (camera|control|game|recorder|room|screen|store))",
)


def published_path(name):
    """A path in the annotations or on this disk, in upper or lower case -> (source, path in the published
    videos). An accented letter becomes one character: macOS archives use two, which look the same."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    for source, pattern in SOURCES.items():
        if found := re.search(f"(?i)(^|/)(({pattern})/)+", name):  # an archive may hold a folder of its name
            return source, str(Path(source, name[found.end() :]))
    return "other", name


def video_path(videos, name):
    """The real path of a video in a folder. ValueError for a name that leads out: "..", a full path, a link
    to a file elsewhere. Folders may be links, to another disk for example."""
    top = os.path.abspath(videos)
    path = Path(os.path.abspath(videos / name))
    inside = path.is_relative_to(top)
    if inside and not path.is_dir():
        real = path.resolve()
        above = path.relative_to(top).parents  # of d/e/a.mp4: d/e, d and the folder of videos
        inside = any(real.is_relative_to(Path(top, folder).resolve()) for folder in above)
    require(inside, f"{str(name)!r} leads out of the folder of videos")
    return path.resolve()


def walk(folder):
    """Yields the paths of everything below a folder; what is behind links to folders comes last. No folder is
    entered twice: links may form a cycle. Hidden folders, and what macOS adds to archives, are left out."""
    entered = set()
    starts = [folder]
    while starts:
        for place, folders, files in os.walk(starts.pop(0)):
            if os.path.realpath(place) in entered:
                folders.clear()
                continue
            entered.add(os.path.realpath(place))
            folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
            starts += [Path(place, name) for name in sorted(folders) if os.path.islink(f"{place}/{name}")]
            yield from (Path(place, name) for name in folders + files)


def size(path):
    """Bytes of a file, or how many numbered pictures a folder holds; 0 if there is nothing to see."""
    if path.is_dir():
        with suppress(data.VideoError):  # no pictures, or not this user's
            return len(data.open_folder(path, fps=25).files)
        return 0
    return path.stat().st_size if path.is_file() else 0


def index_row(path, source, description, qa=()):
    """A row of an index, flagged if its description is a refusal. Motion captions: apps/captions.py."""
    told = re.sub(r"""(?<=\w)[,:]? ["“][^"”]*["”]""", "", description)  # without quoted speech
    flags = ["refusal"] * any(re.search(pattern, told, re.IGNORECASE) for pattern in REFUSALS)
    return {"video": str(path), "source": source, "description": description, "qa": list(qa), "flags": flags}


def write_splits(out, splits):
    """Writes OUT/train.jsonl and so on once all are complete. splits: {name: rows}; no file without rows."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as folder:
        for split, rows in splits.items():
            with Path(folder, split).open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for split in splits:
            made = Path(folder, split).replace(out / f"{split}.jsonl")
            if not made.stat().st_size:
                made.unlink()
    print(f"note: stage 1 also needs motion captions: python -m apps.captions {out}", file=sys.stderr)


def make_index(args):
    """`prepare.py hawk`. args: its options. ValueError if nothing is found."""
    videos = args.videos.resolve()
    places = {}  # {published path in lower case: {published path: path on this disk}}
    for path in sorted(walk(videos)):
        published = published_path(str(path.relative_to(videos)))[1]
        found = places.setdefault(published.lower(), {})
        if published not in found or size(path) > size(found[published]):  # of copies, the most complete one
            found[published] = path
    rows = {"train": [], "test": [], "missing": [], "broken": []}
    counts = Counter()
    for file in annotation_files(args):
        split = split_of(file, args.annotations)
        print(f"{file}: for {split}", file=sys.stderr)
        entries = data.read_json(file)
        require(isinstance(entries, list), f"{file}: must be a list of {{video, QA, description}}")
        for number, entry in enumerate(tqdm(entries, desc=file.stem, unit="row"), 1):
            state, row = hawk_row(entry, videos, places)
            rows[split if state == "found" else state].append(row | {"file": str(file), "number": number})
            counts.update((row["source"], column) for column in (state, *row.get("flags", ())))
    report = {state: rows.pop(state) for state in ("missing", "broken")}
    repeated = Counter((row["video"], row["description"]) for row in rows["train"] + rows["test"])
    if more := repeated.total() - len(repeated):
        (first, _), _ = repeated.most_common(1)[0]
        print(f"note: {more} rows repeat video and description of others, such as {first}", file=sys.stderr)
    both = {row["video"] for row in rows["train"]} & {row["video"] for row in rows["test"]}
    if both:
        print(f"note: {len(both)} videos are in train and in test, first {min(both)}", file=sys.stderr)
    first = json.dumps(next(iter(report["missing"] + report["broken"]), "no annotations"))
    require(any(rows.values()), f"{args.videos}: holds no video of {args.annotations}; first: {first}")
    write_splits(args.out, rows)
    data.replace_file(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    for (source, column), count in sorted(counts.items()):
        print(f"{source:14}{count:7} {column}")
    if args.tokenizer:  # the prompt lists 32 times, here as long as in a video of about two minutes
        encode = partial(data.Tokenizer(args.tokenizer).encode_conversation, message="60.0, " * 32)
        turns = [{"q": data.DESCRIBE_QUESTIONS[0], "a": row["description"]} for row in sum(rows.values(), [])]
        lost = sum(len(encode([turn], max_tokens=513)[0]) > 512 for turn in turns)
        print(f"{lost} of {len(turns)} descriptions lose their end at the released 512 tokens (--max-tokens)")


def split_of(file, top):
    """The split: "test" if the name of the file has the word test or testing and not train or training; if it
    has neither, the folders below `top` decide in the same way, the innermost first; else "train"."""
    for name in (file.stem, *reversed(file.relative_to(top).parts[:-1])):
        words = {word.lower() for word in re.findall("[A-Z]+(?=test|train|[^a-z]|$)|[A-Z]?[a-z]+", name)}
        tests = bool(words & {"test", "testing"})  # "latest" is not one
        if tests != bool(words & {"train", "training"}):
            return "test" if tests else "train"
    return "train"


def annotation_files(args):
    """The files of the published split if present, else all JSON files; the file of all clips, which repeats
    the others, only if there is nothing else. ValueError if a published file is there twice."""
    published = ("all_videos_train.json", "all_videos_test.json", "all_videos_all.json")
    report = os.path.realpath(args.out / "report.json")
    files = [file for file in sorted(args.annotations.rglob("*.json")) if os.path.realpath(file) != report]
    hidden = (".", "__MACOSX")  # such as what macOS puts into archives, and notebooks' checkpoints
    below = {file: file.relative_to(args.annotations).parts for file in files}
    files = [file for file in files if not any(part.startswith(hidden) for part in below[file])]
    split = [file for file in files if file.name.lower() in published[:2]]
    parts = [file for file in files if file.name.lower() != published[2]]
    chosen = split or parts or files
    whole = {}
    for file in chosen:
        if file.name.lower() in published:
            other = whole.setdefault(file.name.lower(), file)
            require(other is file, f"{other} and {file}: which one? give --annotations the folder of one")
    return chosen or [args.annotations]


def hawk_row(entry, videos, places):
    """("found", row of an index), or ("missing" or "broken", {"source", "reason"}), of an annotation."""
    source = "other"
    try:
        if isinstance(entry["video"], str):
            source, name = published_path(entry["video"])
        row = {"video": entry["video"], "description": entry["description"], "qa": entry["QA"]}
        data.check_row({key: 0 if value is None else value for key, value in row.items()})
        found = places.get(name.lower(), {name: videos / name})
        if len(found) > 1 and name not in found:
            return "missing", {"source": source, "reason": f"{name}: could be any of {', '.join(found)}"}
        path = video_path(videos, found.get(name) or next(iter(found.values())))
        if path.is_dir() or size(path):  # a folder of pictures, or a video
            return "found", index_row(path, source, row["description"], row["qa"])
        return "missing", {"source": source, "reason": f"{path}: is missing or empty"}
    except (KeyError, TypeError) as e:
        return "broken", {"source": source, "reason": f"needs video, QA and description ({e!r})"}
    except (ValueError, OSError, RuntimeError) as e:  # the last: links form a cycle
        return "broken", {"source": source, "reason": str(e)}


if __name__ == "__main__":
    run_program(lambda: main(["hawk", *sys.argv[1:]]))
