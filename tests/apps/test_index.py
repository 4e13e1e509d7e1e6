"""Class folders or a table become an index; what was fine-tuned on it finds its own kinds."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from apps import index, timeline, toy
from data import read_index

ROOT = Path(__file__).parents[2]
KINDS = ("normal", "fire", "crossing")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """CLIPS/KIND/….mp4, eight or more of each of three kinds, drawn."""
    folder = tmp_path_factory.mktemp("clips")
    made = tmp_path_factory.mktemp("made")
    counts = Counter()
    for number in range(200):
        kind = toy.toy_clip(5, "train", number)[0].kind
        if kind not in KINDS or counts[kind] == 8:
            continue
        counts[kind] += 1
        (made / "videos").mkdir(exist_ok=True)
        row = toy.make_toy_clip(made, 5, "train", number)
        (folder / kind).mkdir(exist_ok=True)
        (made / row["video"]).rename(folder / kind / f"cam{number % 4}_{number}.mp4")
    assert set(counts.values()) == {8}
    return folder


def run(*options):
    return index.main([*map(str, options)])


def read(path):
    return json.loads(path.read_text())


def test_folders_become_an_index(clips, tmp_path, capsys):
    (tmp_path / "clips").symlink_to(clips)
    out = tmp_path / "mine"
    assert run(clips, "--out", out, "--test", 0.25) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[1:]] == [[kind, "6", "2"] for kind in sorted(KINDS)]
    rows = {split: read_index(out / f"{split}.jsonl") for split in ("train", "test")}
    videos = {split: {row["video"] for row in some} for split, some in rows.items()}
    assert not videos["train"] & videos["test"] and len(videos["train"] | videos["test"]) == 24
    kinds = read(out / "kinds.json")
    assert kinds == {"crossing": "crossing", "fire": "fire", "normal": "nothing unusual"}
    for row in rows["train"]:
        assert row["description"] == f"The clip shows {kinds[row['kind']]}."
        assert row["qa"][0]["a"] == ("No" if row["kind"] == "normal" else "Yes")
    assert read(out / "clips.json") == {"seconds": 4.0}
    # the same seed, the same split; another, another
    before = (out / "test.jsonl").read_bytes()
    assert run(clips, "--out", out, "--test", 0.25) == 0 and (out / "test.jsonl").read_bytes() == before
    assert run(clips, "--out", out, "--test", 0.25, "--seed", 1) == 0
    assert (out / "test.jsonl").read_bytes() != before


def test_sentences_can_be_edited_and_decide_the_phrases(clips, tmp_path, capsys):
    said = {"normal": "A street on which all is well.", "fire": "A street on which something burns."}
    (tmp_path / "sentences.json").write_text(json.dumps(said))
    assert run(clips, "--out", tmp_path) == 0
    assert read(tmp_path / "sentences.json") == said | {"crossing": "The clip shows crossing."}
    said["crossing"] = "A street on which someone runs across."
    (tmp_path / "sentences.json").write_text(json.dumps(said))
    assert run(clips, "--out", tmp_path) == 0
    phrases = {"normal": "all is well", "fire": "something burns", "crossing": "someone runs across"}
    assert read(tmp_path / "kinds.json") == phrases
    capsys.readouterr()
    for sentence, words in (("A street on which all is well. Not really, something burns.", "also stands in"),
                            ("A street on which", "says no more")):  # fmt: skip
        (tmp_path / "sentences.json").write_text(json.dumps(said | {"normal": sentence}))
        assert run(clips, "--out", tmp_path) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'sentences.json'}: ") and words in error


def test_a_recording_is_on_one_side(clips, tmp_path):
    assert run(clips, "--out", tmp_path, "--group", "cam[0-9]+", "--test", 0.3) == 0
    sides = {}
    for split in ("train", "test"):
        for row in read_index(tmp_path / f"{split}.jsonl"):
            sides.setdefault(Path(row["video"]).name.split("_")[0], set()).add(split)
    assert len(sides) == 4 and all(len(side) == 1 for side in sides.values())
    assert {"train"} in sides.values() and {"test"} in sides.values()


def test_a_table(clips, tmp_path):
    videos = sorted(path.relative_to(clips) for path in clips.rglob("*.mp4"))
    lines = [f'{path},{path.parts[0].upper()},"A camera, high up.",{path.name[:4]}' for path in videos]
    table = tmp_path / "a.csv"
    table.write_text("\ufeffvideo,kind,description,group\n" + "\n".join(lines) + "\n")
    assert run(clips, "--csv", table, "--out", tmp_path / "out") == 0
    rows = read_index(tmp_path / "out/train.jsonl")
    assert {row["kind"] for row in rows} == set(KINDS)
    assert all(row["description"].endswith(". A camera, high up.") for row in rows)


def test_what_cannot_be_read_is_left_out_and_told(clips, tmp_path, capsys):
    shutil.copytree(clips, tmp_path / "clips")
    (tmp_path / "clips/fire/notes.mp4").write_text("no video")
    assert run(tmp_path / "clips", "--out", tmp_path / "out") == 0
    assert "1 of 25 videos cannot be read" in capsys.readouterr().err
    (reason,) = read(tmp_path / "out/report.json")["unreadable"]
    assert "notes.mp4: cannot be read as a video" in reason


@pytest.mark.parametrize("spoil, words", [
    (lambda d: shutil.rmtree(d / "fire"), "needs a folder for each kind"),
    (lambda d: (d / "fire/a.mp4").unlink(), "fire: is empty"),
    (lambda d: (d / "a.csv").write_text("video,what\n"), "no column kind"),
    (lambda d: (d / "a.csv").write_text("video,kind\nx.mp4,\n"), "line 2: needs a video and a kind"),
    (lambda d: (d / "a.csv").write_text("video,kind\nx.mp4,fire\n"), "rows of two kinds"),
    (lambda d: None, "no video of fire can be read; the first reason: "),
])  # fmt: skip
def test_errors(tmp_path, capsys, spoil, words):
    for kind in ("normal", "fire"):
        (tmp_path / "clips" / kind).mkdir(parents=True)
        (tmp_path / "clips" / kind / "a.mp4").write_text("no video")
    spoil(tmp_path / "clips")
    table = tmp_path / "clips/a.csv"
    options = ["--csv", table] if table.exists() else []
    assert run(tmp_path / "clips", "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out/train.jsonl").exists()


def test_the_recipe_from_folders_to_a_timeline(clips, tmp_path, capsys):
    """docs/APPS.md: index, fine-tune, and a timeline that listens for the kinds of one's own."""

    def program(*command):
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    for kind in ("normal", "fire"):
        (tmp_path / "clips" / kind).mkdir(parents=True)
        for video in sorted((clips / kind).iterdir())[:4]:
            shutil.copy(video, tmp_path / "clips" / kind)
    data = tmp_path / "mine"
    cache = tmp_path / "cache"
    run_folder = tmp_path / "run"
    assert run(tmp_path / "clips", "--out", data) == 0
    tiny = ROOT / "weights" / "tiny"
    program("prepare.py", "features", "--weights", tiny, "--data", data, "--out", cache)
    start = ["--weights", tiny, "--data", data, "--features", cache, "--train", "lora", "--out", run_folder]
    program("train.py", *start, *"--steps 60 --batch-size 4 --lr 6e-3 --clip 1".split())
    for folder in ("last", "best"):
        for name in ("kinds.json", "clips.json"):
            assert (run_folder / folder / name).read_bytes() == (data / name).read_bytes()
    options = ["--weights", str(run_folder / "last"), "--json", "--device", "cpu"]
    args = timeline.parse_args(["--video", "x", *options])
    assert (args.window, args.stride) == (4.0, 2.0)
    scores = []
    for kind in ("fire", "normal"):
        video = sorted((tmp_path / "clips" / kind).iterdir())[0]
        capsys.readouterr()
        assert timeline.main(["--video", str(video), *options]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[0])["score"])
    assert scores[0] > 2 * scores[1]
