"""apps.webvid: CSV files with their faults, and videos that are only partly there -> index files."""

from pathlib import Path

import pytest

from apps import webvid
from data import read_index

HEADER = "videoid,contentUrl,duration,page_dir,name\n"
NAMES = [f"{n}.mp4" for n in range(30) if n not in (3, 4)]  # what the folder of videos holds


@pytest.fixture
def folder(tmp_path):
    """Thirty videos, of which no. 3 is absent and no. 4 empty."""
    (tmp_path / "000001_000050").mkdir()
    for n in range(30):
        if n != 3:
            (tmp_path / f"000001_000050/{n}.mp4").write_text("" if n == 4 else "some bytes")
    return tmp_path


@pytest.fixture
def lines():
    return [f'{n},http://x/y.mp4,PT00H,000001_000050,"A dog, no. {n}, runs in the park"\n' for n in range(30)]


def run(folder, csv, *options):
    """csv: what the one CSV file holds, or the path of a folder of such files. Returns the exit status."""
    path = csv
    if not isinstance(csv, Path):
        path = folder / "web.csv"
        path.write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    return webvid.main([f"--csv={path}", f"--videos={folder}", f"--out={folder / 'out'}", *options])


def names(folder, split):
    return [Path(row["video"]).name for row in read_index(folder / f"out/{split}.jsonl")]


def test_rows_whose_videos_are_there(folder, lines, capsys):
    assert run(folder, "\ufeff" + HEADER + "".join(lines) + lines[7], "--n-test=5") == 0
    printed = capsys.readouterr().out
    for state in ("31 rows", "28 found", "1 absent", "1 empty", "1 repeated"):
        assert state in printed
    assert len(names(folder, "test")) == 5
    assert sorted(names(folder, "train") + names(folder, "test")) == sorted(NAMES)
    row = read_index(folder / "out/train.jsonl")[0]
    assert row["description"].startswith("A dog, no. ") and row["source"] == "webvid"
    assert "000001_000050" in row["video"]


def test_the_same_videos_are_held_out_in_any_order(folder, lines):
    assert run(folder, HEADER + "".join(lines), "--n-test=5") == 0
    held_out = names(folder, "test")
    assert run(folder, HEADER + "".join(reversed(lines)), "--n-test=5") == 0
    assert names(folder, "test") == held_out


def test_a_linked_folder_of_videos(folder, lines):
    (folder / "videos").mkdir()
    (folder / "000001_000050").rename(folder / "other disk")
    (folder / "videos/000001_000050").symlink_to(folder / "other disk")
    assert run(folder, HEADER + "".join(lines), "--n-test=5", f"--videos={folder / 'videos'}") == 0
    assert sorted(names(folder, "train") + names(folder, "test")) == sorted(NAMES)


def test_how_many_are_held_out(folder, lines, capsys):
    csv = HEADER + "".join(lines)
    assert run(folder, csv) == 0
    assert len(names(folder, "test")) == 2  # a tenth of 28
    assert run(folder, csv, "--n-test=28") == 2
    assert "none to train on" in capsys.readouterr().err
    assert run(folder, csv, "--n-test=0") == 0
    assert not (folder / "out/test.jsonl").exists()  # an empty index would be refused later


def test_a_folder_of_csv_files(folder, lines, capsys):
    csvs = folder / "csv"
    csvs.mkdir()
    assert run(folder, csvs) == 2
    assert "holds no .csv file" in capsys.readouterr().err
    (csvs / "b.csv").write_text(HEADER + "".join(lines[10:]))
    (csvs / "a.csv").write_text(HEADER + "".join(lines[:12]))
    assert run(folder, csvs) == 0
    assert "32 rows" in (printed := capsys.readouterr().out) and "2 repeated" in printed
    assert sorted(names(folder, "train") + names(folder, "test")) == sorted(NAMES)
    (csvs / "c.csv").write_text(HEADER + "1,u,d\n")
    assert run(folder, csvs) == 2
    assert "c.csv, line 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "csv, line, reason",
    [
        ("videoid,name\n1,x\n", 1, "page_dir"),
        ("", 0, "page_dir"),
        (HEADER + "1,u,d,p,x\n2,u,d\n", 3, "fields"),
        (HEADER + "1,u,d,p,x,more\n", 2, "fields"),
        (HEADER + ",u,d,p,x\n", 2, "videoid"),
        (HEADER + '1,u,d,p,"never closed\n', 2, "end of data"),
        (HEADER + "1,u,d,../..,x\n", 2, "leads out"),
        (HEADER + "/etc/x,u,d,p,x\n", 2, "leads out"),
        (HEADER.encode() + b"1,u,d,p,x\n2,u,d,p,\xff\n", 3, "utf-8"),
        (HEADER + "1,u,d,p,x\n", None, "none to train on"),
    ],
)
def test_errors(tmp_path, csv, line, reason, capsys):
    assert run(tmp_path, csv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error
    assert line is None or f"web.csv, line {line}: " in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_videos_that_is_not_there(folder, lines, capsys):
    assert run(folder, HEADER + "".join(lines), f"--videos={folder / 'vidoes'}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder / 'vidoes'}: no such folder; --videos holds")
    assert err.count("\n") == 1
