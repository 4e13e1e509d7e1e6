"""prepare.py hawk: the published annotations, with all their faults, become index files."""

import json
from types import SimpleNamespace

import pytest

import prepare
from data import DESCRIBE_QUESTIONS, HawkDataset, clip_generator, read_index
from hawk import HawkConfig

AUTHORS = "/remote-home/share/jiaqitang/Data/"
QA = [{"q": "Who falls?", "a": "A man falls."}, {"q": "Why?", "a": "The floor is wet."}]
PLACES = {  # path in the annotations: path in the published videos
    "UCF-Crime/Videos/Abuse/Abuse001_x264.mp4": "UCF_Crime/Videos/Abuse/Abuse001_x264.mp4",
    "ShanghaiTechDataset/Testing/01_0014.mp4": "ShanghaiTech/Testing/01_0014.mp4",
    "avenue/avenue/testing/avenue 1.mp4": "CUHK_Avenue/testing/avenue 1.mp4",
    "ped1/ped1/Test001.mp4": "Ped1/Test001.mp4",
    "ped2/ped2/Tëst001.mp4": "Ped2/Tëst001.mp4",
    "DoTA/-a b'c.mp4": "DoTA/-a b'c.mp4",
    "UBnormal/Scene1/abnormal.mp4": "UBnormal/Scene1/abnormal.mp4",
}


def run(job, **options):
    """Runs prepare.py; returns its one line of error, or None."""
    try:
        prepare.main([job, *(f"--{key}={value}" for key, value in options.items())])
    except SystemExit as e:
        assert str(e.code).startswith("error: ") and "\n" not in str(e.code)
        return str(e.code)


def entry(video, **changes):
    return {"video": video, "QA": QA, "description": "A man falls in the hall."} | changes


def put(path, content="some bytes"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def world(tmp_path):
    """Every source once in train, and refusals, faults and attempts to get out in test."""
    for place in PLACES.values():
        put(tmp_path / "videos" / place)
    put(tmp_path / "videos/DoTA/empty.mp4", "")
    put(tmp_path / "secret.mp4")
    (tmp_path / "videos/DoTA/link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "videos/DoTA/circle.mp4").symlink_to("circle.mp4")
    crime = AUTHORS + next(iter(PLACES))
    good = AUTHORS + "DoTA/-a b'c.mp4"
    test = [entry(crime, description="As an AI language model, I cannot watch videos."), entry(good)]
    test += [entry(AUTHORS + "DoTA/gone.mp4"), entry(AUTHORS + "DoTA/empty.mp4")]
    outside = ["/etc/hostname", "../secret.mp4", "UCF-Crime/../../secret.mp4", "DoTA//etc/hostname"]
    odd = ["DoTA/link.mp4", "DoTA/nul\0.mp4", "DoTA/" + "x" * 300, "DoTA/\ud800.mp4", "", 7]
    test += [entry(video) for video in outside + odd]
    test += [entry(good, description=None), entry(good, description=["x"]), entry(good, QA="Who?")]
    test += [
        entry(good, QA=[{"q": "Who?"}]),
        {"video": good, "description": "x"},
        {"QA": QA, "description": "x"},
    ]
    test += ["x", None]
    folder = tmp_path / "annotations/Annotation/All_Mix"
    put(folder / "all_videos_train.json", json.dumps([entry(AUTHORS + video) for video in PLACES]))
    put(folder / "all_videos_test.json", json.dumps(test))
    paths = {name: tmp_path / name for name in ("annotations", "videos", "out")}
    return SimpleNamespace(folder=folder, test=test, **paths)


def make(world):
    return run("hawk", annotations=world.annotations, videos=world.videos, out=world.out)


def test_renamed_folders(world):
    assert make(world) is None
    rows = read_index(world.out / "train.jsonl")
    assert [row["video"] for row in rows] == [str(world.videos / place) for place in PLACES.values()]
    assert [row["source"] for row in rows] == [place.split("/")[0] for place in PLACES.values()]
    assert {"description", "qa", "flags"} <= rows[0].keys() and rows[0]["qa"] == QA


def test_faults_are_left_out_and_listed(world, capsys):
    before = (world.folder / "all_videos_test.json").read_bytes()
    assert make(world) is None
    assert (world.folder / "all_videos_test.json").read_bytes() == before
    assert len(read_index(world.out / "test.jsonl")) == 2
    report = json.loads((world.out / "report.json").read_text())
    assert [row["number"] for row in report["missing"]] == [3, 4]
    assert [row["number"] for row in report["broken"]] == [*range(5, len(world.test) + 1)]
    assert all(row["file"].endswith("all_videos_test.json") and row["reason"] for row in report["broken"])
    assert all("leads out" in row["reason"] for row in report["broken"][:5])
    assert all("\n" not in row["reason"] for row in report["broken"])
    assert all("needs video, QA and description" in row["reason"] for row in report["broken"][-4:])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    table = {source: [int(count) for count in counts] for source, *counts in lines}
    assert table["UCF_Crime"] == [3, 2, 0, 1, 1]  # rows, found, missing, refusals, broken
    assert table["all"] == [7 + len(world.test), 9, 2, 1, len(world.test) - 4]
    assert all(row[0] == row[1] + row[2] + row[4] for row in table.values())
    assert sorted(path.name for path in world.out.iterdir()) == ["report.json", "test.jsonl", "train.jsonl"]


def test_index_to_conversation(world):
    """The dataset reads the rows; a refusal stays in the index, with its flag."""
    make(world)
    refused, row = read_index(world.out / "test.jsonl")
    assert refused["flags"] == ["refusal"] and row["flags"] == []
    config = HawkConfig.preset("tiny")
    test = HawkDataset([refused, row], None, config, stage=2, train=False)
    assert test.conversation(row, None) == [{"q": DESCRIBE_QUESTIONS[0], "a": row["description"]}]
    train = HawkDataset([row], None, config, stage=2)
    rounds = [train.conversation(row, clip_generator(0, 0, i)) for i in range(20)]
    assert QA in rounds and any(r[0]["a"] == row["description"] and r[1:] == QA[1:] for r in rounds)


@pytest.mark.parametrize("below", ["", "All_Mix"])
def test_other_layouts(world, below):
    target = world.annotations / "moved" / below
    target.mkdir(parents=True)
    (world.folder / "all_videos_train.json").rename(target / "all_videos_train.json")
    assert run("hawk", annotations=world.annotations / "moved", videos=world.videos, out=world.out) is None
    assert len(read_index(world.out / "train.jsonl")) == 7 and not (world.out / "test.jsonl").exists()


def test_errors_of_one_line(world):
    assert "no video" in run("hawk", annotations=world.annotations, videos=world.annotations, out=world.out)
    assert "no annotations" in run("hawk", annotations=world.videos, videos=world.videos, out=world.out)
    for content in ("{}", "[1,", "[" * 100000, "\xff"):
        (world.folder / "all_videos_train.json").write_text(content, encoding="latin-1")
        assert "all_videos_train.json" in make(world)
    assert not world.out.exists()


REFUSALS = ["As an AI, I can't.", "I'm sorry, but I cannot.", "Sorry, as an AI model I", "I’m unable to"]
OTHERS = ["The guard uses an AI camera.", "He says that he is sorry.", "As an aide falls", "A man"]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert prepare.REFUSAL.search(text)


@pytest.mark.parametrize("text", OTHERS)
def test_no_refusals(text):
    assert not prepare.REFUSAL.search(text)


def test_a_refused_answer_does_not_flag_the_description():
    qa = [{"q": "Who?", "a": "I'm sorry, but I cannot tell."}]
    assert prepare.index_row("x.mp4", "s", "A man breaks a window.", qa)["flags"] == []
    assert prepare.index_row("x.mp4", "s", "As an AI, I cannot see it.", qa)["flags"] == ["refusal"]


def test_one_line_says_where_motion_captions_are_made(tmp_path, capsys):
    row = prepare.index_row("x.mp4", "webvid", "A dog runs.")
    prepare.write_splits(tmp_path, {"train": [row] * 3, "test": []})
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"python -m apps.captions {tmp_path}" in line for line in lines) == 1
