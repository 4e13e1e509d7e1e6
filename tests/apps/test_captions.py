"""Motion captions: from spaCy's parse, or by the rules of apps.captions, which adds them to index files.

python -m pytest tests/apps/test_captions.py -s -k sentences     prints how well the rules find the words
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps import captions
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


# ------------------------------------------------------------------------------------------------------------
# spaCy, where it is installed


def word(text, dep, pos="NOUN", *children):
    return SimpleNamespace(text=text, dep_=dep, pos_=pos, children=children)


@pytest.mark.parametrize("installed", [True, False])
def test_spacy_is_used_where_it_is_installed(monkeypatch, installed):
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
    captions.spacy_model.cache_clear()
    row = json.loads(line)
    wanted = ("car swerves lane, hits van", "spacy") if installed else ("dog runs", "rules")
    assert (row["motion"], row["motion_by"]) == wanted
