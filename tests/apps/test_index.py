"""Class folders or a table become an index; what was fine-tuned on it says its sentences."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import pytest

import prepare
import sample
from apps import detect, evaluate, index, timeline, toy
from data import read_index

ROOT = Path(__file__).parents[2]
KINDS = ("crossing", "fire", "normal")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """CLIPS/KIND/camN_NUMBER.mp4, eight drawn clips of each of three kinds."""
    folder = tmp_path_factory.mktemp("clips")
    made = tmp_path_factory.mktemp("made")
    (made / "videos").mkdir()
    counts = Counter()
    for number in range(200):
        kind = toy.toy_clip(5, "train", number)[0].kind
        if kind in KINDS and counts[kind] < 8:
            counts[kind] += 1
            row = toy.make_toy_clip(made, 5, "train", number)
            (folder / kind).mkdir(exist_ok=True)
            (made / row["video"]).rename(folder / kind / f"cam{number % 4}_{number}.mp4")
    assert set(counts.values()) == {8}
    return folder


@pytest.fixture
def few(clips, tmp_path):
    """A copy of four clips of two kinds, to spoil."""
    folder = tmp_path / "clips"
    for kind in ("fire", "normal"):
        (folder / kind).mkdir(parents=True)
        for video in sorted((clips / kind).iterdir())[:2]:
            shutil.copy(video, folder / kind)
    return folder


def run(*options):
    return index.main([*map(str, options)])


def read(path):
    return json.loads(path.read_text())


def rows_of(out):
    return {split: read_index(out / f"{split}.jsonl") for split in ("train", "test")}


def table_of(printed):
    return {line.split()[0]: [int(cell) for cell in line.split()[1:4]] for line in printed.splitlines()[1:]}


def test_folders_become_an_index(clips, tmp_path, capsys):
    assert run(clips, "--out", tmp_path, "--test", 0.25) == 0
    out, err = capsys.readouterr()
    assert table_of(out) == dict.fromkeys(KINDS, [6, 2, 0])
    assert "the part of the file names before the last number" in err
    rows = rows_of(tmp_path)
    assert [row["kind"] for row in rows["test"]] == sorted(KINDS) * 2  # in turn, for --eval-samples
    every = rows["train"] + rows["test"]
    assert {row["video"] for row in every} == {str(path) for path in clips.rglob("*.mp4")}
    kinds = read(tmp_path / "kinds.json")
    assert kinds == {"crossing": "crossing", "fire": "a fire", "normal": "nothing unusual"}
    for row in every:
        assert row["description"] == f"The clip shows {kinds[row['kind']]}."
        assert row["qa"] == [{"q": index.KIND_QUESTION, "a": row["description"]}]
        assert detect.label_of(row) == (row["kind"] != "normal")
    assert read(tmp_path / "clips.json") == {"seconds": 4.0, "sentences": read(tmp_path / "sentences.json")}
    assert detect.read_phrases(tmp_path / "kinds.json") == ["crossing", "a fire"]


def test_the_same_names_in_two_folders_are_two_clips(few, tmp_path):
    for kind in few.iterdir():
        for number, video in enumerate(sorted(kind.iterdir())):
            video.rename(kind / f"{number:03}.mp4")
    assert run(few, "--out", tmp_path / "out", "--test", 0.5) == 0
    rows = rows_of(tmp_path / "out")
    assert [len(rows[split]) for split in ("train", "test")] == [2, 2]
    assert len({row["video"] for row in rows["train"] + rows["test"]}) == 4


def test_a_recording_is_on_one_side(clips, tmp_path):
    assert run(clips, "--out", tmp_path, "--test", 0.25, "--seed", 1) == 0
    sides = {}
    for split, rows in rows_of(tmp_path).items():
        for row in rows:
            sides.setdefault(Path(row["video"]).name.split("_")[0], set()).add(split)
    assert len(sides) == 4 and all(len(side) == 1 for side in sides.values())


def test_the_seed_decides(clips, tmp_path):
    tests = []
    for seed in (0, 1, 0):  # in a name KIND/camN_NUMBER.mp4 each number is another recording
        assert run(clips, "--out", tmp_path, "--group", r"\d+(?=\.)", "--seed", seed) == 0
        tests.append((tmp_path / "test.jsonl").read_bytes())
    assert tests[0] == tests[2] != tests[1]


@pytest.fixture
def videos_only(monkeypatch):
    """Every .mp4 can be read, whatever is in it, and nothing else."""

    def check(video, fps):
        return {"seconds": 4, "notes": [], "error": "" if Path(video).suffix == ".mp4" else "no video"}

    monkeypatch.setattr(index, "check", check)


def folders(folder, clips):
    """FOLDER/KIND/NAME for {kind: names}; each file is different."""
    for kind, names in clips.items():
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / name).write_text(f"{kind} {name}")
    return folder


def test_a_stray_file_is_no_recording(tmp_path, videos_only, capsys):
    """With it a kind whose clips are called fall_1, fall_2 … would seem to have two recordings."""
    names = {kind: [f"{kind}_{number}.mp4" for number in range(5)] for kind in ("fall", "normal")}
    assert run(folders(tmp_path / "clean", names), "--out", tmp_path / "one") == 0
    strays = {kind: [*some, "readme.txt"] for kind, some in names.items()}
    assert run(folders(tmp_path / "stray", strays), "--out", tmp_path / "two") == 0
    tables = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in tables if line.startswith("fall")] == [
        ["4", "1", "0"],
        ["4", "1", "1"],
    ]
    assert read(tmp_path / "one/report.json")["rule"] == read(tmp_path / "two/report.json")["rule"]


def sides_of(out):
    rows = [(Path(row["video"]).name, split) for split, some in rows_of(out).items() for row in some]
    return dict(rows)


def test_more_clips_move_none_to_the_other_side(tmp_path, videos_only, monkeypatch, capsys):
    """A clip to test with must not be one that was trained on before."""
    names = {kind: [f"{kind}{number}_0.mp4" for number in range(9)] for kind in ("fall", "normal")}
    clips = folders(tmp_path / "clips", names)
    out = tmp_path / "out"
    assert run(clips, "--out", out) == 0
    first = sides_of(out)
    assert Counter(first.values()) == {"train": 14, "test": 4}
    folders(clips, {"fire": [f"fire{number}_0.mp4" for number in range(5)]})
    for number in range(9, 20):
        (clips / "normal" / f"normal{number}_0.mp4").write_text(f"{number}")
    (clips / "fall" / "fall0_1.mp4").write_text("of the recording of fall0_0.mp4")
    clips.rename(tmp_path / "moved")
    assert run(tmp_path / "moved", "--out", out) == 0
    second = sides_of(out)
    assert first.items() <= second.items() and second["fall0_1.mp4"] == first["fall0_0.mp4"]
    count = Counter((name[:4], side) for name, side in second.items())
    assert count["norm", "test"] == 4 and count["fire", "test"] == 1  # a fifth, as before
    assert run(tmp_path / "moved", "--out", tmp_path / "anew") == 0
    assert not first.items() <= sides_of(tmp_path / "anew").items()
    assert run(tmp_path / "moved", "--out", out, "--seed", 3) == 0
    assert not first.items() <= sides_of(out).items()  # asked for
    assert not capsys.readouterr().err.count("error")
    for content in ("[]", "{", '{"clips": {"a": "b"}}'):
        (out / "split.json").write_text(content)
        assert run(tmp_path / "moved", "--out", out) == 2
        assert "split.json: not what this program writes; remove it" in capsys.readouterr().err


def test_a_group_that_no_name_has(tmp_path, videos_only, capsys):
    names = {kind: [f"{kind}_cam{number}.mp4" for number in range(3)] for kind in ("fall", "normal")}
    clips = folders(tmp_path / "clips", names)
    assert run(clips, "--out", tmp_path / "out", "--group", "camera") == 2
    assert "--group camera: is in no name, such as fall/fall_cam0.mp4" in capsys.readouterr().err
    assert run(clips, "--out", tmp_path / "out", "--group", "cam[01]") == 0
    assert "in a name; 2 clips without it are recordings of their own" in capsys.readouterr().err


def test_clips_in_deeper_folders_are_pointed_out(tmp_path, videos_only, capsys):
    names = {kind: [f"{kind}{number}.mp4" for number in range(3)] for kind in ("fall", "normal")}
    clips = folders(tmp_path / "clips", names)
    (clips / "normal" / "monday").mkdir()
    shutil.copy(clips / "normal" / "normal0.mp4", clips / "normal" / "monday")
    assert run(clips, "--out", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert f"1 folders inside class folders, such as {clips}/normal/monday, are no clips" in err


def test_copies_are_told(few, tmp_path, capsys):
    first = sorted((few / "fire").iterdir())[0]
    shutil.copy(first, few / "fire/another name.mp4")
    assert run(few, "--out", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert f"note: 1 clips are copies of others, {first} of {few}/fire/another name.mp4: held-out" in err


def test_what_is_no_clip_may_be_in_two_folders(tmp_path, videos_only):
    clips = folders(
        tmp_path / "clips", {kind: [f"{kind}_{n}.mp4" for n in range(2)] for kind in ("fall", "normal")}
    )
    for kind in ("fall", "normal"):
        (clips / kind / "Thumbs.db").write_text("the same")
        (clips / kind / "gone").symlink_to(tmp_path / "nowhere")
    assert run(clips, "--out", tmp_path / "out") == 0
    left_out = [Path(bad["video"]).name for bad in read(tmp_path / "out/report.json")["unreadable"]]
    assert left_out == ["Thumbs.db", "gone"] * 2


def test_a_kind_without_recordings_leaves_those_of_the_others(tmp_path, videos_only, capsys):
    cameras = [f"cam{camera}_{number}.mp4" for camera in range(1, 6) for number in range(4)]
    names = {"fall": [f"fall_{number:02}.mp4" for number in range(5)], "fire": cameras, "normal": cameras}
    assert run(folders(tmp_path / "clips", names), "--out", tmp_path / "out") == 0
    sides = {
        split: {Path(row["video"]).name for row in some} for split, some in rows_of(tmp_path / "out").items()
    }
    trained, tested = ({name[:4] for name in names if "cam" in name} for names in sides.values())
    assert tested and not trained & tested
    assert sum("fall" in name for name in sides["test"]) == 1
    assert "note: of fall each clip is a recording of its own" in capsys.readouterr().err


def some(*names):
    return [index.Clip(Path(name), Path(name).parent.name, "", name, "") for name in names]


def test_what_a_recording_is():
    """The rules, in the order in which they count."""
    names = ["a/cam3_0007.mp4", "a/cam4_1.mp4", "b/cam3_8x.mp4", "b/street.mp4"]
    clips, rule = index.find_groups(some(*names), None)
    assert [clip.group for clip in clips] == ["cam3_", "cam4_", "cam3_", "street"]
    assert "before the last number" in rule
    # names that would make all clips of a kind one recording tell nothing
    numbered = some("a/a_1.mp4", "a/a_2.mp4", "b/x1.mp4", "b/y2.mp4")
    clips, rule = index.find_groups(numbered, None)
    assert len({clip.group for clip in clips}) == 4 and "each clip is a recording of its own" in rule
    assert "elsewhere" in rule
    clips, rule = index.find_groups(some("a/a_1.mp4", "a/a_2.mp4", "b/b_1.mp4", "b/b_2.mp4"), None)
    assert (
        len({clip.group for clip in clips}) == 4 and "of a, b each clip" in rule and "elsewhere" not in rule
    )
    clips, rule = index.find_groups(some(*names), "cam[0-9]")
    assert [clip.group for clip in clips] == ["cam3", "cam4", "cam3", "b/street.mp4"] and "cam[0-9]" in rule
    told = [clip._replace(group=group) for clip, group in zip(some(*names), ["x", "", "x", "y"], strict=True)]
    clips, rule = index.find_groups(told, None)
    assert [clip.group for clip in clips] == ["x", "a/cam4_1.mp4", "x", "y"] and "column" in rule


@pytest.mark.parametrize(
    "n, share, tested", [(2, 0.2, 0), (3, 0.2, 1), (10, 0.2, 2), (10, 0, 0), (2, 0.9, 1)]
)
def test_the_share_that_is_held_out(n, share, tested):
    clips = [clip._replace(group=clip.name) for clip in some(*(f"{k}/{i}" for k in "ab" for i in range(n)))]
    chosen = index.held_out(clips, share, 0)
    assert Counter(name[0] for name in chosen) == Counter(a=tested, b=tested)


def test_sentences_can_be_edited_and_decide_the_phrases(clips, tmp_path, capsys):
    out = tmp_path / "mine"
    assert run(clips, "--out", out) == 0
    said = read(out / "sentences.json")
    assert said == {kind: f"The clip shows {phrase}." for kind, phrase in read(out / "kinds.json").items()}
    # they need not begin alike; what is there is never overwritten, what is missing is made up
    (out / "sentences.json").write_text(json.dumps({"fire": "Something burns!", "other": "Kept."}))
    assert run(clips, "--out", out) == 0
    assert read(out / "sentences.json")["other"] == "Kept."
    assert read(out / "kinds.json")["fire"] == "Something burns"
    assert read(out / "kinds.json")["normal"] == "The clip shows nothing unusual"
    given = tmp_path / "given.json"
    given.write_text(json.dumps({kind: f"A street with {kind}" for kind in KINDS}))
    before = given.read_bytes()
    assert run(clips, "--out", out, "--sentences", given) == 0
    assert read(out / "kinds.json") == {kind: kind for kind in KINDS} and given.read_bytes() == before
    assert {row["description"] for row in rows_of(out)["train"]} == {
        f"A street with {kind}." for kind in KINDS
    }


@pytest.mark.parametrize("said, words", [
    ({"fire": "It burns.", "normal": "It burns. Not really."}, "that of fire also stands in 'It burns. Not"),
    ({"fire": "It burns.", "normal": "it  BURNS"}, "sentences must tell the kinds apart"),
    ({"fire": "It burns.", "normal": " . "}, "the sentence of normal is empty"),
    ({"fire": "It burns.", "normal": 3}, "must be JSON like"),
    ({"fire": "It burns."}, "has no sentence for normal"),
    ({"fire": "It burns.", "Fire": "Fire.", "normal": "Fine."}, "has two sentences for fire; keep one"),
    (None, "is not JSON"),
])  # fmt: skip
def test_sentences_that_are_refused(few, tmp_path, capsys, said, words):
    file = tmp_path / "said.json"
    file.write_text(json.dumps(said) if said else "{")
    assert run(few, "--out", tmp_path / "out", "--sentences", file) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {file}: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "out/train.jsonl").exists()


def test_sentences_are_found_in_any_case(tmp_path, videos_only):
    clips = folders(tmp_path / "clips", {"Fall": ["a.mp4"], "NORMAL": ["b.mp4"]})
    said = {"Fall": "Somebody falls.", "normal": "All is well."}
    given = tmp_path / "given.json"
    given.write_text(json.dumps(said))
    assert run(clips, "--out", tmp_path / "one", "--sentences", given) == 0
    out = tmp_path / "two"
    out.mkdir()
    (out / "sentences.json").write_text(json.dumps({"FALL": said["Fall"]}))
    assert run(clips, "--out", out) == 0  # this one lacks a sentence
    for folder in (tmp_path / "one", out):
        assert "Somebody falls." in {row["description"] for row in read_index(folder / "train.jsonl")}
    assert read(out / "sentences.json") == {"fall": said["Fall"], "normal": "The clip shows nothing unusual."}


def test_a_table(clips, tmp_path, capsys):
    lines = [
        f'{path.relative_to(clips)},"Seen from above, {k}.",{path.parent.name.upper()},{path.name[:4]}'
        for k, path in enumerate(sorted(clips.rglob("*.mp4")))
    ]
    table = clips / "a.csv"
    table.write_text("\ufeffvideo,description,kind,group\n" + "\n".join(lines) + "\n", encoding="utf-8")
    try:
        assert run("--csv", table, "--out", tmp_path) == 0  # paths are relative to the table
    finally:
        table.unlink()
    assert 'the column "group"' in capsys.readouterr().err
    rows = rows_of(tmp_path)
    phrases = read(tmp_path / "kinds.json")
    for row in rows["train"] + rows["test"]:
        assert re.fullmatch(
            rf"The clip shows {phrases[row['kind']]}\. Seen from above, \d+\.", row["description"]
        )
    cameras = [{Path(row["video"]).name[:4] for row in some} for some in rows.values()]
    assert not cameras[0] & cameras[1]


@pytest.mark.parametrize("header", [
    "Video,Description,Kind,Group",
    "video, description, kind, group",
    ' "VIDEO", "Description ", Kind , "group"',
])  # fmt: skip
def test_columns_are_found_in_any_case_and_spacing(tmp_path, header):
    table = tmp_path / "a.csv"
    table.write_text(f'{header}\nx.mp4, "Red, hot", Fire, one\ny.mp4,, normal, two\n')
    clips = index.find_in_table(table, tmp_path)
    assert [clip[1:] for clip in clips] == [
        ("fire", "Red, hot", "x.mp4", "one"),
        ("normal", "", "y.mp4", "two"),
    ]


def test_a_phrase_that_others_use_gives_way_to_the_whole_sentence(few, tmp_path):
    videos = [str(path) for path in sorted(few.rglob("*.mp4"))]
    texts = ["", "", "Far from a fire.", ""]
    kinds = ["fire", "fire", "normal", "normal"]
    lines = [";".join(cells) for cells in zip(videos, texts, kinds, strict=True)]  # as spreadsheets may write
    (tmp_path / "a.csv").write_text("video;description;kind\n" + "\n".join(lines) + "\n")
    assert run("--csv", tmp_path / "a.csv", "--out", tmp_path / "out") == 0
    phrases = {"fire": "The clip shows a fire", "normal": "The clip shows nothing unusual"}
    assert read(tmp_path / "out/kinds.json") == phrases


def test_yes_and_no(few, tmp_path, capsys):
    assert run(few, "--out", tmp_path, "--yes-no", "--test", 0) == 0
    answers = {row["kind"]: row["qa"][1] for row in read_index(tmp_path / "train.jsonl")}
    assert answers == {
        "fire": {"q": detect.YES_QUESTION, "a": "Yes"},
        "normal": {"q": detect.YES_QUESTION, "a": "No"},
    }
    assert not (tmp_path / "test.jsonl").exists()


def test_folders_of_pictures_are_clips(few, tmp_path, capsys):
    pictures = few / "fire/walk"
    pictures.mkdir()
    (video, _) = sorted((few / "fire").glob("*.mp4"))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", video, pictures / "%04d.png"]
    subprocess.run(command, check=True)
    assert run(few, "--out", tmp_path / "out", "--fps", 8, "--test", 0) == 0
    found = {row["video"]: row.get("fps") for row in read_index(tmp_path / "out/train.jsonl")}
    assert found.pop(str(pictures)) == 8 and set(found.values()) == {None} and len(found) == 4
    lines = map(json.loads, (tmp_path / "out/checked.jsonl").read_text().splitlines())
    assert {line["seconds"] for line in lines} == {4.0}


def test_what_cannot_be_read_is_left_out_and_told(few, tmp_path, capsys):
    (few / "fire/notes.mp4").write_text("no video")
    (few / "fire/empty").mkdir()
    assert run(few, "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "2 clips cannot be read and are left out" in err and table_of(out)["fire"][2] == 2
    report = read(tmp_path / "out/report.json")
    reasons = {Path(bad["video"]).name: bad["reason"] for bad in report["unreadable"]}
    assert "cannot be read as a video" in reasons["notes.mp4"]
    assert "without numbered pictures" in reasons["empty"] and len(reasons) == 2
    assert report["kinds"]["fire"]["unreadable"] == 2 and report["kinds"]["normal"]["unreadable"] == 0


def test_nothing_is_read_twice(few, tmp_path, monkeypatch):
    """A second run, or one after a kill, reads what is new or has changed."""
    seen = []
    check = index.check
    monkeypatch.setattr(index, "check", lambda video, fps: seen.append(Path(video).name) or check(video, fps))
    out = tmp_path / "out"
    assert run(few, "--out", out) == 0 and len(seen) == 4
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    seen.clear()
    assert run(few, "--out", out) == 0 and seen == []
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # a line that a kill has cut, a video that was replaced
    lines = (out / "checked.jsonl").read_bytes().splitlines(keepends=True)
    (out / "checked.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    replaced = sorted((few / "fire").iterdir())[0]
    shutil.copy(sorted((few / "normal").iterdir())[0], replaced)
    assert run(few, "--out", out) == 0
    assert sorted(seen) == sorted([replaced.name, Path(json.loads(lines[3])["video"]).name])


def test_a_repair_is_noticed(tmp_path, monkeypatch):
    """Of a folder of pictures, whose own size and time say nothing about what is in them."""
    pictures = tmp_path / "walk"
    pictures.mkdir()
    for number in range(2):
        (pictures / f"{number}.png").write_bytes(bytes(9))
    os.utime(pictures, ns=(0, 0))
    errors = iter(["damaged", "", "", ""])
    found = {"seconds": 1, "notes": []}
    monkeypatch.setattr(index, "check", lambda video, fps: found | {"error": next(errors)})
    clips = [index.Clip(pictures, "fire", "", "walk", "")]

    def left():
        index.check_clips(clips, tmp_path, 25)
        return len(list(copy.copy(errors)))

    assert left() == 3  # it failed
    assert left() == 2  # so it is read again
    assert left() == 2
    (pictures / "1.png").write_bytes(bytes(9)[::-1])
    os.utime(pictures / "1.png", (4e9, 4e9))
    assert left() == 1 and left() == 1
    (pictures / "1.png").unlink()
    os.utime(pictures, ns=(0, 0))
    assert left() == 0


def test_a_kill_between_two_files_leaves_no_mixed_split(clips, tmp_path, monkeypatch):
    assert run(clips, "--out", tmp_path, "--test", 0.25, "--seed", 0) == 0
    replace = index.replace_file

    def killed(path, content):
        if path.name == "train.jsonl":
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(index, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run(clips, "--out", tmp_path, "--test", 0.25, "--seed", 3)
    assert not (tmp_path / "train.jsonl").exists()


def test_names_that_are_not_utf8(few, tmp_path, capsys):
    """A file and a folder as they come from another system's archive."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as run_program does
    video = sorted((few / "fire").iterdir())[0]
    video.rename(video.with_name(os.fsdecode(b"cam9_\xe9t\xe9.mp4")))
    (few / "normal" / os.fsdecode(b"\xff.txt")).write_text("no video")
    kind = os.fsdecode(b"br\xfblant")
    (few / "fire").rename(few / kind)
    out = tmp_path / "out"
    said = {"normal": "The clip shows nothing, être."}
    out.mkdir()
    (out / "sentences.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    for _ in range(2):  # the second run reads what the first has written
        assert run(few, "--out", out, "--test", 0) == 0
    assert {row["video"] for row in read_index(out / "train.jsonl")} == {str(p) for p in few.rglob("*.mp4")}
    assert read(out / "kinds.json").keys() == read(out / "sentences.json").keys() == {kind, "normal"}
    assert read(out / "report.json")["unreadable"][0]["video"] == str(
        few / "normal" / os.fsdecode(b"\xff.txt")
    )
    assert "être" in (out / "sentences.json").read_text(encoding="utf-8")  # still easy to edit


def test_what_cannot_be_written_leaves_the_earlier_index(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("earlier")
    with pytest.raises(TypeError):
        index.write(tmp_path, {"train": [{}], "test": []}, {}, {}, {"no JSON": object()})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "train.jsonl": "earlier",
        "test.jsonl": "earlier",
    }


def copy_a_clip(folder):
    shutil.copy(sorted((folder / "fire").iterdir())[0], folder / "normal")


def spoil_pictures(folder):
    shutil.rmtree(folder / "fire")
    (folder / "fire").mkdir()
    (folder / "fire/0001.jpg").write_text("")


def only_notes(folder):
    shutil.rmtree(folder / "fire")
    (folder / "fire").mkdir()
    (folder / "fire/notes.txt").write_text("no video")


def empty_kind(folder):
    for video in (folder / "fire").iterdir():
        video.unlink()


@pytest.mark.parametrize("spoil, words", [
    (shutil.rmtree, "clips: is no folder"),
    (lambda d: [shutil.rmtree(path) for path in d.iterdir()], "has no class folders"),
    (lambda d: shutil.rmtree(d / "fire"), "has only one kind (normal)"),
    (empty_kind, "fire: is empty"),
    (copy_a_clip, "is a copy of"),
    (spoil_pictures, "fire: is one clip made of pictures"),
    (only_notes, "not one clip of fire can be read; the first: "),
])  # fmt: skip
def test_errors_of_folders(few, tmp_path, capsys, spoil, words):
    spoil(few)
    assert run(few, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out/train.jsonl").exists()


@pytest.mark.parametrize("text, words", [
    ("video,kind\nx.mp4,fire\n", "has no column 'description'"),
    ("", "has no column 'video'"),
    ("video,description,kind,Kind\nx.mp4,,fire,normal\n", "has two columns 'kind'; keep one"),
    ('"video,description,kind\nx.mp4,,fire\n', "a.csv, line 1: "),
    ("video,description,kind\nx.mp4,,\n", "line 2: needs a video and a kind"),
    ("video,description,kind\nx.mp4,,fire\n", "has only one kind (fire)"),
    ("video,description,kind\nx.mp4,,fire\ny.mp4,,normal\nx.mp4,,normal\n", "x.mp4 stands in line 2 already"),
    ('video,description,kind\nx.mp4,"a,fire\n', "line 2: "),
    ("video,description,kind\nx.mp4,\xe9,fire\n", "is not UTF-8"),
    ("video,kind,description\nx.mp4,fire,Red, hot\n", "line 2: has more fields than the first line; "),
    ("video;description;kind\nx.mp4;a;b;fire\n", "put a text with semicolons in quotes"),
    (f"video,description,kind\nx.mp4,{'a ' * 60_000},fire\ny.mp4,,normal\n", "x.mp4: more than 100,000"),
    ("video,description,kind\nx.mp4,a,fire,, \n", "has only one kind (fire)"),  # as spreadsheets end rows
    ("video,description,kind\nx.mp4,,fire\ny.mp4,,normal\n", "not one clip of fire can be read"),
])  # fmt: skip
def test_errors_of_tables(tmp_path, capsys, text, words):
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert run("--csv", tmp_path / "a.csv", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out/train.jsonl").exists()


def test_errors_of_the_command_line(few, tmp_path, capsys):
    for options in (["--out", "x"], [few, "--out", "x", "--group", "("], [few, "--out", "x", "--test", "1"]):
        with pytest.raises(SystemExit):
            run(*options)
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert run("--csv", tmp_path / "none.csv", "--out", tmp_path / "out") == 2


# ---- The recipe of docs/APPS.md ----------------------------------------------------------------------------
def recipe():
    """The commands of the first block below its heading."""
    text = (ROOT / "docs/APPS.md").read_text().split("## Your own kinds of event\n")[1]
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_recipe(clips, tmp_path, monkeypatch, capsys):
    """From folders to a model that says the sentences, finds the event, and is scored by its own kinds."""
    kinds = ("fire", "normal")  # whose words the small weights know, so that few steps are enough
    for kind in kinds:
        shutil.copytree(clips / kind, tmp_path / "clips" / kind)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def program(command):
        monkeypatch.chdir(tmp_path)
        if command[1] == "prepare.py":  # in this process, without the start of another
            return prepare.main(command[2:])
        if command[2] == "apps.evaluate":
            assert evaluate.main(command[3:]) == 0
            return capsys.readouterr().out
        start = [sys.executable] + ([] if command[1] == "-m" else [str(ROOT / command[1])])
        options = command[1:] if command[1] == "-m" else command[2:]
        done = subprocess.run(
            [*start, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    commands = {command[2] if command[1] == "-m" else command[1]: command for command in recipe()}
    order = ["apps.index", "prepare.py", "train.py", "sample.py", "apps.evaluate", "apps.timeline"]
    assert list(commands) == order
    steps = commands["train.py"].index("--steps") + 1
    commands["train.py"][steps] = "60"
    for name in order[:3]:
        program(commands[name])
    last = tmp_path / "runs/mine/last"
    for name in ("kinds.json", "clips.json"):
        assert (last / name).read_bytes() == (tmp_path / "data/mine" / name).read_bytes()

    sentences = read(tmp_path / "data/mine/sentences.json")
    model, tokenizer = sample.load(last, "cpu")
    answers = []
    for video in sorted((tmp_path / "clips").rglob("*.mp4")):
        answers.append(sample.ask(model, tokenizer, video).answer == sentences[video.parent.name])
    assert sum(answers) >= 14  # of 16; most of them were trained on

    program(commands["apps.evaluate"])
    named = read(tmp_path / "runs/mine/test.jsonl.scores.json")["kinds"]["kinds"]
    assert named.keys() == set(kinds) and sum(n for _, n in named.values()) >= 2

    # the timeline scores clips by the phrases that training copied
    args = timeline.parse_args(commands["apps.timeline"][3:])
    score = detect.choose_score(args.score, detect.find_kinds(args))
    assert score.func is detect.choice_score and detect.phrases_of(score) == sentences
    scores = {}
    for kind in kinds:
        seen = sample.encode_video(model, min((tmp_path / "clips" / kind).iterdir()))
        scores[kind] = score(model, tokenizer, seen.clip, seen.encoding)
    assert scores["fire"] > 0.5 > scores["normal"]
