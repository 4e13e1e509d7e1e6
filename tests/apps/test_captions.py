"""Motion captions: from spaCy's parse, or by the rules of apps.captions, which adds them to index files.

python -m pytest tests/apps/test_captions.py -s -k sentences     prints how well the rules find the words
"""

import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps import captions, scores
from apps.captions import motion_by_rules
from data import read_index


def score(sentences):
    """Precision, recall and F1 of the captions' words, regardless of their order."""
    right = found = wanted = 0
    for sentence, words in sentences:
        caption = set(motion_by_rules(sentence).lower().replace(",", "").split())
        words = set(words.lower().replace(",", "").split())
        right += len(caption & words)
        found += len(caption)
        wanted += len(words)
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


@pytest.mark.parametrize(
    "text, caption",
    [
        (
            "In the video, a white car swerves into the left lane and hits a red van.",
            "car swerves lane, hits van",
        ),
        ("Aerial view of a city at night", ""),
        ("The man left the shop.", "man left shop"),
        ("A man and a woman walk out of the store.", "man walk store"),
        ("Two men fight while a guard with raised arms watches them.", "men fight, guard watches them"),
        ("There is a dog running across the road.", "dog running road"),
        ("", ""),
    ],
)
def test_rules(text, caption):
    assert motion_by_rules(text) == caption


# ------------------------------------------------------------------------------------------------------------
# Index files


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")


def test_rows_without_a_motion_caption_receive_one(tmp_path, capsys):
    qa = [{"q": "What happens?", "a": ""}, {"q": "Who falls?", "a": "A man falls."}]
    described = {"video": "a.mp4", "description": "A dog runs.", "own": 1.5}
    asked = {"video": "a.mp4", "qa": qa, "motion": None}
    has_one = {"video": "a.mp4", "description": "A dog runs.", "motion": "", "motion_by": "spacy"}
    write(tmp_path / "train.jsonl", [described, has_one, asked])
    write(tmp_path / "test.jsonl", [has_one])
    before = (tmp_path / "test.jsonl").stat()
    assert captions.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().err
    assert "train.jsonl: 3 rows, 2 of them" in printed and "test.jsonl: 1 rows, 0 of them" in printed
    rules = {"motion_by": "rules"}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines() if line]
    assert rows == [
        described | {"motion": "dog runs"} | rules,
        has_one,
        asked | {"motion": "man falls"} | rules,
    ]
    assert len(read_index(tmp_path / "train.jsonl")) == 3
    assert (tmp_path / "test.jsonl").stat().st_mtime_ns == before.st_mtime_ns  # not written again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert "empty" not in printed
    write(tmp_path / "test.jsonl", [described, {"video": "b.mp4", "description": "Ein Hund rennt."}])
    assert captions.main([str(tmp_path)]) == 0
    assert "note: 1 of these captions are empty: no verb was found" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[1]", '{"video": "a.mp4"}', "[" * 100000])
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, line, capsys):
    content = '{"video": "a.mp4", "description": "A dog runs."}\n' + line
    (tmp_path / "train.jsonl").write_text(content)
    assert captions.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "train.jsonl, line 2: " in error
    assert (tmp_path / "train.jsonl").read_text() == content


def test_a_folder_without_an_index(tmp_path, capsys):
    assert captions.main([str(tmp_path)]) == 2
    assert "no train.jsonl or test.jsonl" in capsys.readouterr().err


def test_an_index_file_instead_of_its_folder(tmp_path, capsys):
    index = tmp_path / "mine.jsonl"
    write(index, [{"video": "a.mp4", "description": "A dog runs."}])
    assert captions.main([str(index)]) == 0
    assert "mine.jsonl: 1 rows, 1 of them received a motion caption (1 by rules)" in capsys.readouterr().err
    assert read_index(index)[0]["motion"] == "dog runs"


def test_memory_does_not_grow_with_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "motion_by_rules", lambda text: "dog runs")
    row = json.dumps({"video": "a.mp4", "description": "A dog runs. " * 400}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 1000)
    tracemalloc.start()
    assert captions.main([str(tmp_path)]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < (tmp_path / "train.jsonl").stat().st_size / 4


def test_another_call_is_not_disturbed(tmp_path, monkeypatch, capsys):
    write(tmp_path / "train.jsonl", [{"video": "a.mp4", "description": "A dog runs."}])
    monkeypatch.setattr(scores, "LOCK_SECONDS", 0)
    with (tmp_path / "train.jsonl.tmp").open("w") as f:
        scores.lock(f)
        assert captions.main([str(tmp_path)]) == 2
    assert "train.jsonl.tmp: another process is writing to it" in capsys.readouterr().err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("change", ["nothing", "half a line", "the index", "a longer index", "another file"])
def test_a_killed_call_is_resumed(tmp_path, monkeypatch, change):
    """As far as what it has written follows from the index as it is now."""
    index = tmp_path / "train.jsonl"
    has_one = {"video": "0.mp4", "description": "A man sits.", "motion": "man sits"}
    rows = [has_one] + [{"video": f"{i}.mp4", "description": f"Dog {i} runs.", "own": "é"} for i in range(9)]
    index.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n\n" for row in rows).encode())
    asked = []

    def make(text, last=None):
        asked.append(text)
        if text == last:
            raise Killed
        return text.lower()

    monkeypatch.setattr(captions, "motion_by_rules", lambda text: make(text, "Dog 5 runs."))
    with pytest.raises(Killed):
        captions.main([str(index)])
    assert len(read_index(index)) == 10 and "Dog 5" not in (part := tmp_path / "train.jsonl.tmp").read_text()
    content = part.read_bytes()
    kept = 5
    if change == "half a line":
        part.write_bytes(content[:-8])
        kept = 4
    elif change == "the index":
        rows[4]["description"] = "Dog 33 runs."
        kept = 3
    elif change == "a longer index":
        rows.insert(0, has_one)
        kept = 0
    elif change == "another file":
        part.write_bytes(b"null\n[1]\n" + content)
        kept = 0
    index.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    monkeypatch.setattr(captions, "motion_by_rules", make)
    asked.clear()
    assert captions.main([str(index)]) == 0
    assert asked == [row["description"] for row in rows if "motion" not in row][kept:]
    done = [json.loads(line) for line in index.read_text().splitlines() if line]
    assert [row.items() >= before.items() for row, before in zip(done, rows, strict=True)] == [True] * len(
        rows
    )
    assert all(row["motion"] == row["description"].lower() for row in done if row["description"][0] == "D")
    assert [*tmp_path.iterdir()] == [index]


# ------------------------------------------------------------------------------------------------------------
# spaCy, where it is installed


def word(text, dep, pos="NOUN", *children):
    return SimpleNamespace(text=text, dep_=dep, pos_=pos, children=children)


@pytest.mark.parametrize("installed", [True, False])
def test_spacy_is_used_where_it_is_installed(monkeypatch, installed, tmp_path, capsys):
    """With a stand-in for spaCy: this shows which words of a parse are taken."""
    into = word("into", "prep", "ADP", word("lane", "pobj"))
    parse = [
        word("swerves", "ROOT", "VERB", word("car", "nsubj"), into),
        word("parked", "amod", "VERB"),
        word("hits", "conj", "VERB", word("van", "dobj")),
        word("is", "ROOT", "AUX", word("it", "nsubj")),
    ]

    def load(name):
        if not installed:
            raise OSError(f"no model {name}")
        return lambda text: parse

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    captions.spacy_model.cache_clear()
    line, _ = captions.caption_line(b'{"video": "x.mp4", "description": "A dog runs."}')
    (tmp_path / "train.jsonl").write_bytes(line.replace(b"motion", b"own"))
    assert captions.main([str(tmp_path)]) == 0
    assert f"(1 by {'spaCy' if installed else 'rules'})" in capsys.readouterr().err
    captions.spacy_model.cache_clear()
    row = json.loads(line)
    wanted = ("car swerves lane, hits van", "spacy") if installed else ("dog runs", "rules")
    assert (row["motion"], row["motion_by"]) == wanted
