"""Rows that say what is normal, the score of a clip, and what scores and labels add up to."""

import json
import math
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from apps import detect
from data import clip_options, read_clip
from hawk import Encoding
from sample import TINY, encode_clips, load

# ---- Rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, label", [
    ({"label": 0}, 0), ({"label": 1}, 1), ({"label": "normal"}, 0), ({"label": "abnormal"}, 1),
    ({"abnormal": []}, 0), ({"abnormal": [1, 2]}, 1), ({"abnormal": [[1, 2], [4, 5]]}, 1),
    ({"kind": "normal"}, 0), ({"kind": "fire"}, 1), ({"label": None, "kind": "fire"}, 1),
    ({"kind": "Normal"}, 0), ({"kind": " NORMAL\n"}, 0), ({"kind": "Abnormal"}, 1),
    ({"label": 0, "kind": " "}, 0),
    ({"label": 1, "abnormal": [1, 2], "kind": "fire"}, 1), ({"label": "normal", "abnormal": []}, 0),
])  # fmt: skip
def test_what_a_row_says(said, label):
    assert detect.label_of({"video": "x"} | said) == label


@pytest.mark.parametrize("said, reason", [
    ({}, "does not say whether"), ({"description": "A fire."}, "does not say whether"),
    ({"label": 2}, '"label" must be'), ({"label": "fire"}, '"label" must be'), ({"label": []}, '"label" mu'),
    ({"abnormal": True}, 'needs "abnormal"'), ({"abnormal": "12"}, 'needs "abnormal"'),
    ({"label": 0, "kind": "fire"}, "says both"), ({"label": 1, "abnormal": []}, "says both"),
    ({"kind": ""}, "does not say whether"), ({"kind": " "}, "does not say whether"),
    ({"label": 1, "kind": "Normal "}, "says both"),
    ({"kind": 3}, '"kind" must be a text'), ({"video": 3}, '"video" must be'),
])  # fmt: skip
def test_a_row_that_says_nothing_is_refused_by_name(tmp_path, said, reason):
    index = tmp_path / "index.jsonl"
    rows = [{"video": "a.mp4", "label": 0}, {"video": "b.mp4"} | said]
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"^{index}, line 2: .*{reason}") as error:
        detect.read_labels(index)
    assert "\n" not in str(error.value)


def test_rows_about_the_same_video_count_as_one(tmp_path):
    index = tmp_path / "index.jsonl"
    rows = [{"video": "a.mp4", "abnormal": [1, 2], "source": "s"}, {"video": "b.mp4", "label": 0}]
    rows.append({"video": "./a.mp4", "abnormal": [3, 4]})
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(row["video"], row["label"]) for row in detect.read_labels(index)]
    assert found == [(str(tmp_path / "a.mp4"), 1), (str(tmp_path / "b.mp4"), 0)]
    index.write_text(index.read_text() + '{"video": "b.mp4", "label": 1}\n')
    with pytest.raises(ValueError, match="one row says that b.mp4 is normal, another that it is not"):
        detect.read_labels(index)


# ---- Scores ------------------------------------------------------------------------------------------------


def test_the_score_of_a_clip_is_that_of_its_row_in_the_batch(world):
    model, tokenizer = load(world / "weights", "cpu")
    clips = [read_clip(world / name, 4, 28) for name in ("a b.mp4", "c.mp4")]
    asked = [[{"answer": ""}], [{"answer": ""}, {"answer": ""}]]
    detect.score_clips(model, tokenizer, clips, asked, detect.yes_score)
    encoding = encode_clips(model, clips)
    for i, clip in enumerate(clips):
        prompt = tokenizer.encode_prompt(detect.YES_QUESTION, clip.message, model.config.n_visual)
        one = Encoding(encoding.tokens[i : i + 1], {})
        words = [tokenizer.sp.encode(word) for word in ("Yes", "yes", "No", "no")]
        p = detect.log_likelihoods(model, one, prompt, words, [0] * 4).exp()
        expected = ((p[0] + p[1]) / p.sum()).item()
        for prediction in asked[i]:
            assert prediction["score"] == pytest.approx(expected, abs=1e-5)
            assert prediction["answer"] == ("yes" if expected >= 0.5 else "no")


def test_the_answer_changes_at_the_threshold(world, monkeypatch):
    monkeypatch.setattr(detect, "encode_clips", lambda *_: Encoding(torch.zeros(3, 1, 1), {}))
    asked = [[{}], [{}], [{}]]
    values = iter([0.49, 0.5, 1.0])
    detect.score_clips(None, None, [None] * 3, asked, lambda *_: next(values))
    assert [prediction["answer"] for (prediction,) in asked] == ["no", "yes", "yes"]


@pytest.mark.parametrize("normal", ["normal", "Normal", " NORMAL "])
def test_normal_is_left_out_however_it_is_written(tmp_path, monkeypatch, normal):
    kinds = tmp_path / "kinds.json"
    kinds.write_text(json.dumps({normal: "all is well", "fire": "burns"}))
    assert detect.read_phrases(kinds) == ["burns"]
    kinds.write_text(json.dumps({normal: "all is well"}))
    with pytest.raises(ValueError, match="no phrases"):
        detect.read_phrases(kinds)
    kinds.write_text(json.dumps({normal: "all is well", " ": "burns"}))
    with pytest.raises(ValueError, match=f"^{kinds}: .*a kind has no name"):
        detect.read_phrases(kinds)
    monkeypatch.setattr(detect, "log_likelihoods", lambda *_: torch.tensor([0.0, 0.0]))
    config = SimpleNamespace(n_visual=1)
    tokenizer = SimpleNamespace(encode_prompt=lambda *_: [], sp=SimpleNamespace(encode=list))
    sentences = {normal: "All is well.", "fire": "It burns."}
    clip = SimpleNamespace(message="")
    score = detect.choice_score(SimpleNamespace(config=config), tokenizer, clip, None, sentences)
    assert score == pytest.approx(0.5)


def test_phrases_that_decide_are_named():
    assert "catches fire" in detect.phrases_of(detect.choose_score(None, detect.TOY_KINDS))
    assert detect.phrases_of(detect.choose_score("yes", detect.TOY_KINDS)) is None


def test_fine_tuned_weights_never_meet_the_toy_phrases(tmp_path):
    """kinds.json beside the index wins, then the one that training copied beside the weights."""

    def found(**options):
        given = {"kinds": None, "annotations": None, "weights": tmp_path / "last"} | options
        return detect.find_kinds(Namespace(**given))

    for folder in ("last", "data"):
        (tmp_path / folder).mkdir()
    index = tmp_path / "data" / "test.jsonl"
    assert found() is found(annotations=index) is None
    assert detect.choose_score(None, None) is detect.yes_score
    assert found(weights=TINY) == detect.TOY_KINDS and found(kinds="mine.json") == "mine.json"
    for folder in ("last", "data"):
        (tmp_path / folder / "kinds.json").write_text('{"normal": "all is well", "fall": "falls"}')
    assert found() == tmp_path / "last" / "kinds.json"
    assert found(annotations=index) == tmp_path / "data" / "kinds.json"


# ---- Numbers -----------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    scores = np.array([0.9, 0.6, 0.6, 0.4, 0.1])
    abnormal = np.array([True, True, False, True, False])
    auc, ap, accuracy, f1 = detect.measure(scores, abnormal).tolist()
    # of six pairs, 0.9, 0.6 and 0.4 against 0.1 are in order, so is 0.9 against 0.6, and 0.6 is equal to 0.6
    assert auc == pytest.approx((4 + 1 / 2) / 6)
    # found at 0.9: 1 of 1; at 0.6: 2 of 3; at 0.4: 3 of 4
    assert ap == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # called abnormal: 0.9, 0.6 and, wrongly, 0.6; 0.4 is missed
    assert accuracy == pytest.approx(3 / 5) and f1 == pytest.approx(2 * 2 / (3 + 3))


def test_numbers_that_do_not_exist():
    assert detect.numbers([0.2, 0.3], [0, 0]) == {"auc": None, "ap": None, "accuracy": 1, "f1": None}
    assert detect.numbers([0.2, 0.7], [1, 1]) == {"auc": None, "ap": None, "accuracy": 0.5, "f1": 2 / 3}
    assert detect.numbers([0.7], [0]) == {"auc": None, "ap": None, "accuracy": 0, "f1": 0}


pairs = st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.500001, 0.9, 1.0]) | st.floats(0, 1), st.booleans())


@settings(deadline=None)
@given(st.lists(st.tuples(pairs, st.integers(0, 3)), min_size=1, max_size=30))
def test_numbers_are_those_of_scikit_learn(drawn):
    """Also where each counts as often as a bootstrap has drawn it, perhaps never."""
    scores = np.array([score for (score, _), _ in drawn])
    labels = np.array([label for (_, label), _ in drawn])
    weights = np.array([[weight for _, weight in drawn], [1] * len(drawn)], float)
    called = scores >= 0.5
    for counts, found in zip(weights, detect.measure(scores, labels, weights), strict=True):
        auc, ap, accuracy, f1 = found
        counts = counts.astype(int)
        y = np.repeat(labels, counts)
        x = np.repeat(scores, counts)
        if len(set(y.tolist())) < 2:
            assert math.isnan(auc) and math.isnan(ap)
        else:
            assert auc == pytest.approx(metrics.roc_auc_score(y, x))
            assert ap == pytest.approx(metrics.average_precision_score(y, x))
        if len(y):
            assert accuracy == pytest.approx(metrics.accuracy_score(y, np.repeat(called, counts)))
        if (y | np.repeat(called, counts)).any():
            assert f1 == pytest.approx(metrics.f1_score(y, np.repeat(called, counts)))
        else:
            assert math.isnan(f1)


def test_per_source(capsys):
    lines = [("a", 0.9, 1), ("a", 0.1, 0), ("b", 0.4, 1), ("b", 0.8, 1), ("", 0.5, 0)]
    predictions = [{"task": "detect", "source": s, "score": x, "label": y} for s, x, y in lines]
    table = detect.detection_per_source([*predictions, {"task": "describe", "source": "a"}])
    assert list(table) == ["", "a", "b", "all"]
    assert table["a"] == {"n": 2, "abnormal": 1, "auc": 1, "ap": 1, "accuracy": 1, "f1": 1}
    assert table["b"]["auc"] is None and table["b"]["accuracy"] == 0.5
    # pairs of 0.9, 0.4, 0.8 with 0.1 and 0.5: all but 0.4 against 0.5
    assert table["all"]["auc"] == pytest.approx(5 / 6) and table["all"]["f1"] == pytest.approx(4 / 6)
    detect.print_detection(table)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["detect", "ROC", "AUC"] and "(no source)" in printed[1]
    assert printed[3].split() == "b – – 0.500 0.667 2 of 2".split()
    assert printed[4].split() == [
        "all",
        "0.833",
        f"{table['all']['ap']:.3f}",
        "0.600",
        "0.667",
        "3",
        "of",
        "5",
    ]
    assert "from a score of 0.5 on" in printed[5]


def test_a_choice_among_sentences(monkeypatch, tmp_path):
    """By hand: e^-1, e^-2 and e^-9 among each other, without that of normal."""
    sentences = {"normal": "The clip shows nothing.", "fire": "The clip shows a fire.", "fall": "A fall."}
    monkeypatch.setattr(detect, "log_likelihoods", lambda *_: torch.tensor([-1.0, -2.0, -9.0]))
    model, tokenizer = load(TINY, "cpu")
    clip = SimpleNamespace(message="")
    p = [math.exp(x) for x in (-1, -2, -9)]
    score = detect.choice_score(model, tokenizer, clip, None, sentences)
    assert score == pytest.approx((p[1] + p[2]) / sum(p))
    kinds = tmp_path / "kinds.json"
    kinds.write_text('{"normal": "nothing", "fire": "a fire", "fall": "fall"}')
    assert detect.choose_score(None, kinds).func is detect.contrast_score
    with pytest.raises(ValueError, match="needs the sentences"):
        detect.choose_score("choice", kinds)
    (tmp_path / "clips.json").write_text(json.dumps({"seconds": 4, "sentences": sentences}))
    assert detect.phrases_of(detect.choose_score(None, kinds)) == sentences
    assert detect.choose_score("contrast", kinds).func is detect.contrast_score
    (tmp_path / "clips.json").write_text('{"sentences": {"fire": "A fire.", "fall": "A fall."}}')
    assert (
        detect.choose_score(None, kinds).func is detect.contrast_score
    )  # the choice would always be abnormal
    with pytest.raises(ValueError, match="needs the sentences, of normal and others"):
        detect.choose_score("choice", kinds)
    for wrong in ([1, 2], {"a": 5}, {"a": " "}, 3):
        (tmp_path / "clips.json").write_text(json.dumps({"sentences": wrong}))
        with pytest.raises(ValueError, match=r"clips\.json: not what apps\.index writes"):
            detect.choose_score(None, kinds)


def test_a_prompt_longer_than_the_context_is_one_line(world):
    model, tokenizer = load(world / "weights", "cpu")
    clip = read_clip(world / "c.mp4", **clip_options(model.config))
    model.config.context_length = 40
    with pytest.raises(ValueError, match="a prompt of .* tokens; these weights take 40"):
        detect.describe(model, tokenizer, clip, encode_clips(model, [clip]))
