"""prepare.py hawk and webvid: published annotations with their faults -> index files; and the captions of the motion.

python -m pytest tests/test_datasets.py -s -k sentences     prints how well the motion captions' rules find the words."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare
from data import DESCRIBE_QUESTIONS, HawkDataset, clip_generator, read_index

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", job, *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())])
        try:
            prepare.main()
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
    crime, good = AUTHORS + next(iter(PLACES)), AUTHORS + "DoTA/-a b'c.mp4"
    test = [entry(crime, description="As an AI language model, I cannot watch videos."), entry(good)]
    test += [entry(AUTHORS + "DoTA/gone.mp4"), entry(AUTHORS + "DoTA/empty.mp4")]
    outside = ["/etc/hostname", "../secret.mp4", "UCF-Crime/../../secret.mp4", "DoTA//etc/hostname", "DoTA/link.mp4"]
    test += [entry(video) for video in [*outside, "DoTA/nul\0.mp4", "DoTA/" + "x" * 300, "DoTA/\ud800.mp4"]]
    test += [entry(""), entry(7), entry(good, description=None), entry(good, description=["x"]), entry(good, QA="Who?")]
    test += [
        entry(good, QA=[{"q": "Who?"}]),
        {"video": good, "description": "x"},
        {"QA": QA, "description": "x"},
        "x",
        None,
    ]
    folder = tmp_path / "annotations/Annotation/All_Mix"
    put(folder / "all_videos_train.json", json.dumps([entry(AUTHORS + video) for video in PLACES]))
    put(folder / "all_videos_test.json", json.dumps(test))
    return SimpleNamespace(
        folder=folder, test=test, annotations=tmp_path / "annotations", videos=tmp_path / "videos", out=tmp_path / "out"
    )


def make(world):
    return run("hawk", annotations=world.annotations, videos=world.videos, out=world.out)


def test_renamed_folders(world):
    assert make(world) is None
    rows = read_index(world.out / "train.jsonl")
    assert [row["video"] for row in rows] == [str(world.videos / place) for place in PLACES.values()]
    assert [row["source"] for row in rows] == [place.split("/")[0] for place in PLACES.values()]
    assert {"description", "qa", "motion", "flags"} <= rows[0].keys() and rows[0]["qa"] == QA
    assert rows[0]["motion"] == "man falls hall" and rows[0]["motion_by"] in ("rules", "spacy")


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
    assert "description" in report["broken"][-2]["reason"] and "\n" not in "".join(
        r["reason"] for r in report["broken"]
    )
    table = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in capsys.readouterr().out.splitlines()[1:]}
    assert table["UCF_Crime"] == [3, 2, 0, 1, 1]  # rows, found, missing, refusals, broken
    assert table["all"] == [7 + len(world.test), 9, 2, 1, len(world.test) - 4]
    assert all(row[0] == row[1] + row[2] + row[4] for row in table.values())
    assert sorted(path.name for path in world.out.iterdir()) == ["report.json", "test.jsonl", "train.jsonl"]


def test_index_to_conversation(world):
    """The rows go on into the dataset; a refusal stays in the index, with its flag."""
    make(world)
    refused, row = read_index(world.out / "test.jsonl")
    assert refused["flags"] == ["refusal"] and row["flags"] == []
    test = HawkDataset([refused, row], None, 2, 28, 4, stage=2, train=False)
    assert test.conversation(row, None) == [{"q": DESCRIBE_QUESTIONS[0], "a": row["description"]}]
    train = HawkDataset([row], None, 2, 28, 4, stage=2)
    rounds = [train.conversation(row, clip_generator(0, 0, i)) for i in range(20)]
    assert QA in rounds and any(r[0]["a"] == row["description"] and r[1:] == QA[1:] for r in rounds)
    HawkDataset([refused, row], None, 2, 28, 4, stage=1)  # which needs "motion" in each row


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


@pytest.mark.parametrize(
    "text", ["As an AI, I can't.", "I'm sorry, but I cannot.", "Sorry, as an AI model I", "I’m unable to"]
)
def test_refusals(text):
    assert prepare.REFUSAL.search(text)


@pytest.mark.parametrize(
    "text", ["The guard uses an AI camera.", "He says that he is sorry.", "As an aide falls", "A man"]
)
def test_no_refusals(text):
    assert not prepare.REFUSAL.search(text)


# ----------------------------------------------------------------------------------------------------------------------
# WebVid

HEADER = "videoid,contentUrl,duration,page_dir,name\n"


def webvid(folder, csv, **options):
    (folder / "web.csv").write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    return run("webvid", csv=folder / "web.csv", videos=folder, out=folder / "out", **options)


def test_webvid(tmp_path, capsys):
    lines = [f'{n},http://x/y.mp4,PT00H,000001_000050,"A dog, no. {n}, runs in the park"\n' for n in range(30)]
    for n in range(30):
        if n != 3:
            put(tmp_path / f"000001_000050/{n}.mp4", "" if n == 4 else "some bytes")
    assert webvid(tmp_path, "\ufeff" + HEADER + "".join(lines) + lines[7], n_test=5) is None
    states = ("31 rows", "28 found", "1 absent", "1 empty", "1 repeated")
    printed = capsys.readouterr().out
    assert all(state in printed for state in states)
    train, test = (read_index(tmp_path / f"out/{split}.jsonl") for split in ("train", "test"))
    names = [Path(row["video"]).name for row in train + test]
    assert len(test) == 5 and sorted(names) == sorted(f"{n}.mp4" for n in range(30) if n not in (3, 4))
    assert train[0]["description"].startswith("A dog, no. ") and "runs park" in train[0]["motion"]
    assert train[0]["source"] == "webvid" and "000001_000050" in train[0]["video"]
    assert webvid(tmp_path, HEADER + "".join(reversed(lines)), n_test=5) is None
    assert read_index(tmp_path / "out/test.jsonl") == test  # whatever the order
    assert webvid(tmp_path, HEADER + "".join(lines)) is None
    assert len(read_index(tmp_path / "out/test.jsonl")) == 2  # a tenth of 28
    assert "none to train on" in webvid(tmp_path, HEADER + "".join(lines), n_test=28)
    assert webvid(tmp_path, HEADER + "".join(lines), n_test=0) is None
    assert not (tmp_path / "out/test.jsonl").exists()  # features and train.py refuse an empty one


def test_a_refused_answer_does_not_flag_the_description():
    qa = [{"q": "Who?", "a": "I'm sorry, but I cannot tell."}]
    assert prepare.index_row("x.mp4", "s", "A man breaks a window.", qa)["flags"] == []
    assert prepare.index_row("x.mp4", "s", "As an AI, I cannot see it.", qa)["flags"] == ["refusal"]


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
def test_webvid_errors(tmp_path, csv, line, reason):
    error = webvid(tmp_path, csv)
    assert reason in error and (line is None or f"web.csv, line {line}: " in error)


# ----------------------------------------------------------------------------------------------------------------------
# motion captions


def score(sentences):
    """Precision, recall, F1 of the words of captions, without their order."""
    right = found = wanted = 0
    for sentence, words in sentences:
        caption, words = (set(w.lower().replace(",", "").split()) for w in (prepare.built_in_motion(sentence), words))
        right, found, wanted = right + len(caption & words), found + len(caption), wanted + len(words)
    return right / found, right / wanted, 2 * right / (found + wanted)


def test_sentences():
    lines = (Path(__file__).parent / "motion_sentences.txt").read_text().splitlines()
    sentences = [line.split(" | ") for line in lines if not line.startswith("#")]
    assert len(sentences) == 60
    parts = [
        ("tuned on", sentences[:24], 0.98),
        ("not looked at", sentences[24:48], 0.96),
        ("later", sentences[48:], 0.82),
    ]
    for name, part, floor in parts:
        precision, recall, f1 = score(part)
        print(f"{name}: {len(part)} sentences, precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")
        assert f1 > floor


def test_motion_caption(monkeypatch):
    monkeypatch.setattr(prepare, "spacy_model", lambda: None)
    caption = prepare.motion_caption("In the video, a white car swerves into the left lane and hits a red van.")
    assert caption == "car swerves lane, hits van"
    assert prepare.motion_caption("") == "" == prepare.motion_caption("Aerial view of a city at night")


def word(text, dep, pos="NOUN", *children):
    return SimpleNamespace(text=text, dep_=dep, pos_=pos, children=children)


def test_spacy_is_used_when_it_is_there(monkeypatch):
    """A stand-in for spaCy: it is not installed here, so what is seen is which words of a parse are taken."""
    into = word("into", "prep", "ADP", word("lane", "pobj"))
    parse = [word("swerves", "ROOT", "VERB", word("car", "nsubj"), into), word("parked", "amod", "VERB")]
    parse += [word("hits", "conj", "VERB", word("van", "dobj")), word("is", "ROOT", "AUX", word("it", "nsubj"))]
    for loaded, model in ((True, "spacy"), (False, "rules")):

        def load(name, loaded=loaded):
            assert name == "en_core_web_sm"
            if not loaded:
                raise OSError("no model")
            return lambda text: parse

        monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
        prepare.spacy_model.cache_clear()
        row = prepare.index_row("x.mp4", "webvid", "A dog runs.")
        assert (row["motion"], row["motion_by"]) == ("car swerves lane, hits van" if loaded else "dog runs", model)
    prepare.spacy_model.cache_clear()
