"""prepare.py hawk: the published annotations, with all their faults, become index files."""

import json
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare
from apps.annotations import index_row, write_splits
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


def test_the_job_needs_its_program(monkeypatch):
    monkeypatch.setitem(sys.modules, "apps.annotations", None)
    with pytest.raises(SystemExit, match="^error: .*apps.annotations"):
        prepare.main(["hawk", "--annotations", "x", "--videos", "y", "--out", "z"])


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
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {(source, state): int(count) for source, count, state in printed}
    assert counts["UCF_Crime", "found"] == 2 and counts["UCF_Crime", "refusal"] == 1
    assert sum(n for (_, state), n in counts.items() if state != "refusal") == 7 + len(world.test)
    assert sorted(path.name for path in world.out.iterdir()) == ["report.json", "test.jsonl", "train.jsonl"]


def test_descriptions_that_training_would_cut_are_counted(world, tmp_path, capsys):
    tokenizer = Path(prepare.__file__).parent / "weights/tiny/tokenizer.model"
    long = [entry("DoTA/-a b'c.mp4", description="A man falls in the hall. " * n) for n in (1, 20, 200)]
    put(tmp_path / "long.json", json.dumps(long))
    options = {"annotations": tmp_path / "long.json", "videos": tmp_path / "videos", "out": tmp_path / "cut"}
    assert run("hawk", **options, tokenizer=tokenizer) is None
    assert "1 of 3 descriptions lose their end at the released 512 tokens" in capsys.readouterr().out
    assert run("hawk", **options) is None and "lose" not in capsys.readouterr().out


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


def test_one_file_for_each_source(world):
    """Without a published split, files whose names end in "test" are for testing; a file may stand alone."""
    folder = world.annotations.parent / "sources/Annotation"
    for name, video in (
        ("DoTA", "DoTA/-a b'c.mp4"),
        ("UCFCrime", "UCF-Crime/Videos/Abuse/Abuse001_x264.mp4"),
    ):
        put(folder / f"{name}.json", json.dumps([entry(AUTHORS + video)]))
    put(folder / "Ped_test.json", json.dumps([entry("ped1/ped1/Test001.mp4")]))
    assert run("hawk", annotations=folder.parent, videos=world.videos, out=world.out) is None
    sources = [row["source"] for row in read_index(world.out / "train.jsonl")]
    assert sources == ["DoTA", "UCF_Crime"]
    assert [row["source"] for row in read_index(world.out / "test.jsonl")] == ["Ped1"]
    alone = world.out / "alone"
    assert run("hawk", annotations=folder / "DoTA.json", videos=world.videos, out=alone) is None
    [row] = read_index(alone / "train.jsonl")
    assert row["video"].endswith("-a b'c.mp4") and not (alone / "test.jsonl").exists()


def test_the_file_of_all_clips_counts_only_alone(world):
    """It repeats what the other files hold."""
    folder = world.annotations.parent / "sources/Annotation"
    clip = "DoTA/-a b'c.mp4"
    whole = put(folder / "All_Mix/all_videos_all.json", json.dumps([entry(clip), entry(PLACES[clip])]))

    def count():
        assert run("hawk", annotations=folder, videos=world.videos, out=world.out) is None
        return len(read_index(world.out / "train.jsonl"))

    assert count() == 2
    put(folder / "DoTA/DoTA.json", json.dumps([entry(clip)]))
    assert count() == 1
    put(folder / "All_Mix/all_videos_train.json", json.dumps([entry(clip)] * 3))
    assert count() == 3
    for file in (folder / "DoTA/DoTA.json", folder / "All_Mix/all_videos_train.json"):
        file.unlink()
    put(folder / "copy/all_videos_all.json", whole.read_text())
    assert "which one" in run("hawk", annotations=folder, videos=world.videos, out=world.out)


def test_its_own_report_is_no_annotation_however_it_is_spelled(world, monkeypatch):
    folder = world.annotations.parent / "mine"
    put(folder / "a.json", json.dumps([entry("DoTA/-a b'c.mp4"), entry("DoTA/gone.mp4")]))
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    for out in (folder / "index", "mine/index", "link/index", "mine/../mine/index"):
        assert run("hawk", annotations="mine", videos=world.videos, out=out) is None


def found(folder, on_disk, wanted):
    """The paths below `folder` that an index has for `wanted`, and the report."""
    for name in on_disk:
        put(folder / "disk" / name)
    file = put(folder / "a.json", json.dumps([entry(name) for name in wanted]))
    error = run("hawk", annotations=file, videos=folder / "disk", out=folder / "index")
    if error:
        return [], error
    rows = read_index(folder / "index/train.jsonl")
    report = json.loads((folder / "index/report.json").read_text())
    return [row["video"].removeprefix(f"{folder}/disk/") for row in rows], report


def test_folders_that_were_not_renamed(tmp_path):
    """Each as published in one place, and as the authors had it in another."""
    for names in (list(PLACES), list(PLACES.values())):
        here = tmp_path / names[0][:4]
        paths, report = found(here, [f"Videos/{name}" for name in names], [AUTHORS + name for name in PLACES])
        assert paths == [f"Videos/{name}" for name in names] and report == {"missing": [], "broken": []}


def test_two_spellings_of_an_accent(tmp_path):
    """One character as in most annotations, or letter and accent as in archives of macOS."""
    spellings = [unicodedata.normalize(form, "Ped2/Tëst001.mp4") for form in ("NFC", "NFD")]
    for on_disk in spellings:
        for wanted in spellings:
            assert found(tmp_path / ascii(on_disk) / ascii(wanted), [on_disk], [wanted])[0] == [on_disk]


def test_the_archive_s_own_name_of_a_source(tmp_path):
    wanted = [AUTHORS + "UCF-Crime/Videos/1.mp4"]
    assert found(tmp_path, ["UCF_Crimes/Videos/1.mp4"], wanted)[0] == ["UCF_Crimes/Videos/1.mp4"]


def test_a_whole_copy_comes_before_an_empty_one(tmp_path):
    for place in ("a", "z"):
        put(tmp_path / place / "disk/backup" / "DoTA/1.mp4", "" if place == "a" else "whole")
        put(tmp_path / place / "disk/DoTA/1.mp4", "whole" if place == "a" else "")
        assert found(tmp_path / place, [], ["DoTA/1.mp4"])[1] == {"missing": [], "broken": []}


def test_the_most_complete_copy_counts(tmp_path):
    """Hidden folders and what macOS adds to archives do not; an archive may hold a folder of its own name."""
    put(tmp_path / "disk/a/DoTA/1.mp4")
    (put(tmp_path / "disk/old/DoTA/1.mp4")).write_bytes(b"v")
    for folder in ("unfinished/Ped1", "real/Ped1/Ped1", "__MACOSX/Ped1", ".Trash/Ped1"):
        (tmp_path / "disk" / folder / "Test001").mkdir(parents=True)
    for number in range(3):
        put(tmp_path / f"disk/real/Ped1/Ped1/Test001/{number}.tif")
    for folder in ("__MACOSX", ".Trash"):
        for number in range(9):
            put(tmp_path / f"disk/{folder}/Ped1/Test001/{number}.tif")
    paths, _ = found(tmp_path, [], ["DoTA/1.mp4", "ped1/ped1/Test001"])
    assert paths == ["a/DoTA/1.mp4", "real/Ped1/Ped1/Test001"]


def test_a_broken_row_counts_for_its_source_and_a_repeated_one_is_told(tmp_path, capsys):
    broken = entry("DoTA/1.mp4") | {"QA": "x"}
    put(tmp_path / "videos/DoTA/1.mp4")
    put(tmp_path / "a/DoTA.json", json.dumps([entry("DoTA/1.mp4"), broken]))
    put(tmp_path / "a/DoTA (1).json", json.dumps([entry("DoTA/1.mp4")]))
    put(tmp_path / "a/.ipynb_checkpoints/DoTA-checkpoint.json", json.dumps([entry("DoTA/1.mp4")]))
    folders = {"annotations": tmp_path / "a", "videos": tmp_path / "videos", "out": tmp_path / "index"}
    assert run("hawk", **folders) is None
    printed = capsys.readouterr()
    assert printed.out.split() == ["DoTA", "1", "broken", "DoTA", "2", "found"]
    assert f"note: 1 rows repeat video and description of others, such as {tmp_path}" in printed.err


@pytest.mark.parametrize("name", ["DoTA", "dota"])
def test_folders_may_be_links(tmp_path, name):
    """To another disk, for example; a file may not, and a circle of them is not walked for ever."""
    real = put(tmp_path / "disk2/x/1.mp4").parent
    (real / "up").symlink_to("..")
    (real / "out.mp4").symlink_to(put(tmp_path / "secret.mp4"))
    (real / "pictures").mkdir()
    for folder, link in (("Videos", name), ("Ped1", "Test001")):
        (tmp_path / "disk" / folder).mkdir(parents=True)
        (tmp_path / "disk" / folder / link).symlink_to(real / "pictures" if link == "Test001" else real)
    wanted = ["DoTA/1.mp4", "ped1/ped1/Test001", "DoTA/out.mp4", f"{name}/../../secret.mp4"]
    paths, report = found(tmp_path, [], wanted)
    assert paths == [str(real / "1.mp4"), str(real / "pictures")]
    assert ["leads out" in row["reason"] for row in report["broken"]] == [True, True]


def test_two_published_splits_are_one_too_many(world):
    put(world.annotations / "old/all_videos_train.json", "[]")
    assert "which one" in make(world)


def test_the_latest_annotations_are_no_test_and_a_report_no_annotations(world):
    folder = world.annotations.parent / "mine"
    put(folder / "latest.json", json.dumps([entry("DoTA/-a b'c.mp4")]))
    put(folder / "DoTATest.json", json.dumps([entry("DoTA/-a b'c.mp4"), entry("DoTA/gone.mp4")]))
    for _ in range(2):
        assert run("hawk", annotations=folder, videos=world.videos, out=folder) is None
        assert [len(read_index(folder / f"{split}.jsonl")) for split in ("train", "test")] == [1, 1]


@pytest.mark.parametrize(
    "train, test",
    [
        ("train/DoTA.json", "test/DoTA.json"),
        ("DoTA_TRAIN.json", "DoTA_TEST.json"),
        ("DoTA.json", "UCFtest.json"),
        ("train_DoTA.json", "test_DoTA.json"),
        ("DoTA_train.json", "DoTA_testing.json"),
        ("train_test_split/train/a.json", "train_test_split/test/a.json"),
        ("test/DoTA_training.json", "train/v2/DoTATest.json"),
        ("All_Videos_Train.json", "All_Videos_TEST.json"),
        ("latest/fastest.json", "TestSet/contest.json"),
    ],
)
def test_which_file_is_for_testing(world, capsys, train, test):
    folder = world.annotations.parent / "mine"
    put(folder / train, json.dumps([entry("DoTA/-a b'c.mp4")]))
    put(folder / test, json.dumps([entry("DoTA/-a b'c.mp4")] * 2))
    put(folder / "._a.json", "\0")  # as in archives of macOS
    assert run("hawk", annotations=folder, videos=world.videos, out=world.out) is None
    assert [len(read_index(world.out / f"{split}.jsonl")) for split in ("train", "test")] == [1, 2]
    told = capsys.readouterr().err
    assert f"{test}: for test\n" in told and f"{train}: for train\n" in told
    assert "1 videos are in train and in test" in told


def test_windows_paths(tmp_path):
    wanted = ["D:\\Data\\DoTA\\x\\1.mp4", "C:\\UCF-Crime\\2.mp4", "E:/ped1/ped1\\3.mp4"]
    assert found(tmp_path, ["DoTA/x/1.mp4", "UCF_Crime/2.mp4", "Ped1/3.mp4"], wanted)[0] == [
        "DoTA/x/1.mp4",
        "UCF_Crime/2.mp4",
        "Ped1/3.mp4",
    ]


def test_another_case_only_where_it_is_clear(tmp_path):
    on_disk = ["dota/One.mp4", "DoTA/two.mp4", "DoTA/TWO.mp4", "Mine/three.MP4", "Mine/4.mp4", "mine/4.MP4"]
    wanted = ["DoTA/one.MP4", "dota/two.mp4", "DoTA/Two.mp4", "mine/three.mp4", "mine/4.MP4", "MINE/4.mp4"]
    paths, report = found(tmp_path, on_disk, wanted)
    assert paths == ["dota/One.mp4", "DoTA/two.mp4", "Mine/three.MP4", "mine/4.MP4"]
    assert [row["number"] for row in report["missing"]] == [3, 6]
    assert "DoTA/Two.mp4: could be any of DoTA/TWO.mp4, DoTA/two.mp4" in report["missing"][0]["reason"]


def test_errors_of_one_line(world):
    assert "no video" in run("hawk", annotations=world.annotations, videos=world.annotations, out=world.out)
    assert "not the JSON expected" in run(
        "hawk", annotations=world.videos, videos=world.videos, out=world.out
    )
    for content in ("{}", "[1,", "[" * 100000, "\xff"):
        (world.folder / "all_videos_train.json").write_text(content, encoding="latin-1")
        assert "all_videos_train.json" in make(world)
    assert not world.out.exists()


REFUSED = [
    "It is not possible for me to watch the recording.",
    "Given my inability to see pictures, this is a guess.",
    "My apologies, but videos are beyond me.",
    "Without seeing the actual clip, any description remains a guess.",
    "I have no way to access the footage.",
    "I can only offer a general idea of such an accident.",
    "As an AI, I can't describe this clip.",
    "I'm sorry, but I cannot help with that.",
    "Sorry, as an AI model I only read text.",
    "I’m unable to watch this recording.",
    "I am unable to analyze the footage that you mention.",
    "I cannot view videos, so here is a guess: a man may be stealing a bike.",
    "I can't watch the clip, but the title suggests a robbery.",
    "I apologize for the misunderstanding; videos are beyond what I can read.",
    "Without the ability to see the actual footage, I can still sketch what may happen.",
    "Without access to the video itself, one can only imagine a fight in a shop.",
    "Without being able to watch the clip, it is hard to say who started the fight.",
    "Unfortunately, I'm not able to open media files.",
    "Unfortunately, I do not have access to the recording.",
    "As a text-based AI I can only work with words.",
    "As a large language model, I have no eyes.",
    "Being a language model, I rely on your summary: a car hits a wall.",
    "A summary would be: two men fight. However, I currently cannot access the visual material.",
    "I do not have the capability to interpret images or sound.",
    "I don't have the means to play videos. A hypothetical scene: a woman runs.",
    "As an artificial intelligence developed by a company, I see no pictures.",
    "I'm an AI and do not see anything.",
    "I am currently unable to process recordings.",
    "I’m unable to",
    "Sorry, as an AI model I",
    "I am not capable of watching clips.",
    "I lack the means to view footage.",
    "I could not see the recording, so this is made up.",
    "Without seeing the video, I can only guess.",
    "Without more details or access to the clip, a guess must do.",
    "Apologies, but pictures are beyond me.",
    "Sorry for the trouble, but I can only read.",
    "As no video is attached, I will invent one.",
    "I would need to watch the video first.",
    "I am not equipped to view videos.",
    "I won't be able to watch this recording.",
    "I do not possess the ability to watch videos.",
    "I haven't seen the video, so this is a guess.",
    "I am designed to process text and not videos.",
    "No video provided with your message.",
]
DESCRIBED = [
    "Without watching the video screens, the guard misses the thief.",
    "I do not know the man, says the sign that he carries.",
    "Without looking at the traffic, the cyclist crosses the road.",
    "Without the ability to brake in time, the truck hits the van.",
    "Without access to the building, the man breaks a window.",
    "Without being able to see the road in the fog, the driver leaves the lane.",
    "Without having access to a phone, the woman calls for help.",
    "The man says he is sorry and leaves.",
    "A driver is unable to stop at the red light.",
    "Unable to stop on the wet road, the car slides into a tree.",
    "The cyclist cannot see the car behind the bus.",
    'A woman shouts, "I cannot see anything!", and runs.',
    'The clerk says "I am unable to help you" and closes the door.',
    "The guard uses an AI camera to watch the gate.",
    "As an aide falls, two men run away.",
    "As an AI-controlled car turns, a child crosses.",
    "As an airplane passes, nobody looks up.",
    "As an analyst watches the screens, a thief opens the safe.",
    "Unfortunately, the driver does not see the child.",
    "The guard views the video on a screen and calls the police.",
    "A man apologizes to the officer after the accident.",
    "Police officers cannot access the house and break the door.",
    "The video shows a man who is not able to open the car.",
    "A shop assistant helps a customer without watching the till.",
    "I see a man who runs across the street.",
    "He says that he is sorry.",
    "A man",
    "A driver turns left without seeing the motorcycle in the video.",
    "A man takes a package without seeing the camera that records the video.",
    "A thief enters without the owner having access to the footage.",
    "Apologies are exchanged after the two cars collide.",
    "Sorry sight: a car burns, but nobody is hurt.",
    "A guard without access to the video room calls the police.",
    "Without more help or access to a ladder, the boy falls.",
    "A man who could not see the dog falls over it.",
    "The white van does not wait for me to pass and hits my car.",
    "Due to my inability to stop in time, my car hits the van.",
    "The video was not provided with sound; a man falls.",
    "I haven't seen the video camera on the pole, and a car hits me.",
]


def flagged(description):
    return index_row("x.mp4", "s", description)["flags"] == ["refusal"]


@pytest.mark.parametrize("text", REFUSED)
def test_refusals(text):
    assert flagged(text) and flagged(f"{text} A man may be running.")


@pytest.mark.parametrize("text", DESCRIBED)
def test_descriptions_are_no_refusals(text):
    assert not flagged(text) and not flagged(f"The street is busy. {text}")


def test_a_refused_answer_does_not_flag_the_description():
    qa = [{"q": "Who?", "a": "I'm sorry, but I cannot tell."}]
    assert index_row("x.mp4", "s", "A man breaks a window.", qa)["flags"] == []
    assert index_row("x.mp4", "s", "As an AI, I cannot see it.", qa)["flags"] == ["refusal"]


def test_an_index_is_replaced_when_all_of_it_is_whole(tmp_path):
    """Else a held-out row of the old split could be in the new one's train.jsonl."""

    def rows():
        yield row
        raise ValueError

    row = index_row("x.mp4", "webvid", "A dog runs.")
    write_splits(tmp_path, {"train": [row], "test": [row]})
    with pytest.raises(ValueError):
        write_splits(tmp_path, {"train": [row] * 3, "test": rows()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert len(read_index(tmp_path / "train.jsonl")) == 1


def test_one_line_says_where_motion_captions_are_made(tmp_path, capsys):
    row = index_row("x.mp4", "webvid", "A dog runs.")
    write_splits(tmp_path, {"train": [row] * 3, "test": []})
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"python -m apps.captions {tmp_path}" in line for line in lines) == 1
