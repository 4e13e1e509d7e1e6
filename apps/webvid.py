"""WebVid's CSV files and the videos that are on this disk -> index files, for stage 1.

    python -m apps.webvid --csv results_2M_train.csv --videos WebVid/videos --out data/webvid
    python -m apps.webvid --csv WebVid/partitions --videos WebVid/videos --out data/webvid   # or a folder

The videos are expected at VIDEOS/<page_dir>/<videoid>.mp4. Many copies of WebVid lack some of them: such rows
are counted and left out. `python -m apps.captions OUT` adds motion captions afterwards.
"""

import csv
import hashlib
import signal
import sys
from collections import Counter
from pathlib import Path

from prepare import index_row, video_path, write_splits
from sample import Parser, number, print_error

COLUMNS = {"videoid", "page_dir", "name"}  # name is the caption; other columns are ignored


def csv_files(path):
    """The file itself, or the CSV files of a folder, sorted."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.csv"))
    if not files:
        raise ValueError(f"{path}: holds no .csv file")
    return files


def read_captions(file, videos, captions, counts):
    """Adds {video path: caption} for the usable rows of one CSV file to captions; counts the rows by state.

    Raises a ValueError that names file and line for a malformed row, or one that leads out of the videos.
    """
    with file.open("rb") as lines:  # decoded line by line, so that an error knows its line
        reader = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
        try:
            missing = COLUMNS - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"has no column {', '.join(sorted(missing))}")
            for row in reader:  # every column is text: the folder 000001_000050 must not become a number
                if None in row or None in row.values() or not row["videoid"]:
                    raise ValueError("has more or fewer fields than the first line, or no videoid")
                path = video_path(videos, Path(row["page_dir"], row["videoid"] + ".mp4"))
                state = row_state(path, row["name"].strip(), captions)
                counts[state] += 1
                if state == "found":
                    captions[str(path)] = row["name"].strip()
        except (csv.Error, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            line = reader.reader.line_num
            if isinstance(error, UnicodeDecodeError):  # the reader never received this line
                line += 1
            raise ValueError(f"{file}, line {line}: {error}") from None


def row_state(path, caption, captions):
    if not caption:
        return "without a caption"
    if str(path) in captions:
        return "repeated"
    if not path.is_file():
        return "absent"
    return "found" if path.stat().st_size else "empty"


def split_rows(captions, n_test):
    """{"train": rows, "test": rows}. The SHA-256 of a video's name decides whether it is held out."""
    if n_test is None:
        n_test = min(500, len(captions) // 10)
    if n_test >= len(captions):
        raise ValueError(f"--videos: {len(captions)} usable videos, {n_test} to hold out: none to train on")
    order = sorted(captions, key=lambda path: hashlib.sha256(Path(path).name.encode()).digest())
    rows = [index_row(path, "webvid", captions[path]) for path in order]
    return {"train": rows[n_test:], "test": rows[:n_test]}


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--csv", type=Path, required=True, metavar="PATH", help="a CSV file of WebVid, or a folder of them")
    add(
        "--videos", type=Path, required=True, metavar="DIR", help="folder that holds <page_dir>/<videoid>.mp4"
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write train.jsonl and test.jsonl into",
    )
    add(
        "--n-test",
        type=number(int, 0),
        metavar="N",
        help="videos to hold out (default: a tenth, at most 500)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    captions = {}
    counts = Counter()
    try:
        for file in csv_files(args.csv):
            read_captions(file, args.videos, captions, counts)
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        print(f"{args.csv}: {counts.total()} rows: {states}")
        write_splits(args.out, split_rows(captions, args.n_test))
    except (OSError, ValueError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
