"""WebVid's CSV files and the videos that are on this disk -> index files, for stage 1.

    python -m apps.webvid --csv results_2M_train.csv --videos WebVid/videos --out data/webvid
    python -m apps.webvid --csv WebVid/partitions --videos WebVid/videos --out data/webvid   # or a folder

The videos are expected at VIDEOS/<page_dir>/<videoid>.mp4; the folders may be links. Many copies of WebVid
lack some of them: such rows are counted and left out. `python -m apps.captions OUT` adds motion captions
afterwards. The rows are kept in a temporary database on disk, so that memory use does not grow with their
number, which is 10 million in all of WebVid.
"""

import csv
import hashlib
import os
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from apps import run_program
from apps.annotations import index_row, video_path, write_splits
from sample import make_parser, number, print_error

COLUMNS = {"videoid", "page_dir", "name"}  # name is the caption; other columns are ignored


def csv_files(path):
    """The file itself, or the CSV files of a folder, sorted."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.csv") if not file.name.startswith("._"))  # macOS's
    if not files:
        raise ValueError(f"{path}: holds no .csv file")
    return files


def new_table():
    """A database that vanishes when closed. `digest`, of the video's name, decides what is held out."""
    table = sqlite3.connect("")
    table.execute("CREATE TABLE captions (path BLOB PRIMARY KEY, caption TEXT, digest BLOB) WITHOUT ROWID")
    return table


def read_captions(file, videos, table, counts):
    """Adds the usable rows of one CSV file to the table of captions; counts the rows by state.

    Raises a ValueError that names file and line for a malformed row, or one that leads out of the videos.
    """
    with file.open("rb") as lines:  # decoded line by line, so that an error knows its line
        reader = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
        try:
            missing = COLUMNS - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"has no column {', '.join(sorted(missing))}")
            rows = tqdm(reader, desc=file.name, unit=" rows", leave=False, delay=1)
            for row in rows:  # every column is text: the folder 000001_000050 must not become a number
                if None in row or None in row.values() or not row["videoid"]:
                    raise ValueError("has more or fewer fields than the first line, or no videoid")
                path = video_path(videos, Path(row["page_dir"], row["videoid"] + ".mp4"))
                counts[add_row(table, path, row["name"].strip())] += 1
        except (csv.Error, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
            line = reader.reader.line_num
            if isinstance(error, UnicodeDecodeError):  # the reader never received this line
                line += 1
            raise ValueError(f"{file}, line {line}: {error}") from None


def add_row(table, path, caption):
    """Adds a row if it is usable -> its state."""
    if not caption:
        return "without a caption"
    if not path.is_file():
        return "absent"
    if not path.stat().st_size:
        return "empty"
    row = (os.fsencode(path), caption, hashlib.sha256(path.name.encode(errors="surrogateescape")).digest())
    added = table.execute("INSERT OR IGNORE INTO captions VALUES (?, ?, ?)", row).rowcount
    return "found" if added else "repeated"


def split_rows(table, n_test):
    """{"train": rows, "test": rows}, which are read from the table as they are needed."""
    (found,) = table.execute("SELECT count(*) FROM captions").fetchone()
    if n_test is None:
        n_test = min(500, found // 10)
    if n_test >= found:
        raise ValueError(f"--videos: {found} usable videos, {n_test} to hold out: none to train on")

    def rows(limit, offset):
        chosen = "SELECT path, caption FROM captions ORDER BY digest LIMIT ? OFFSET ?"
        for path, caption in table.execute(chosen, (limit, offset)):
            yield index_row(os.fsdecode(path), "webvid", caption)

    return {"train": rows(found, n_test), "test": rows(n_test, 0)}


def parse_args(argv):
    parser = make_parser(__doc__)
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
    counts = Counter()
    try:
        if not args.videos.is_dir():  # before millions of rows are read
            raise ValueError(f"{args.videos}: no such folder; --videos holds <page_dir>/<videoid>.mp4")
        with closing(new_table()) as table:
            for file in csv_files(args.csv):
                read_captions(file, args.videos, table, counts)
            states = ", ".join(f"{count} {state}" for state, count in counts.items())
            print(f"{args.csv}: {counts.total()} rows: {states}")
            write_splits(args.out, split_rows(table, args.n_test))
    except (OSError, ValueError, sqlite3.Error) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
