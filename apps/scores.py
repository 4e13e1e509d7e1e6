"""From predictions to numbers: BLEU, the toy world's kinds and facts, the table. What evaluate, judge and compare share."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

FACTS = ("colour", "object", "place")  # fields of toy rows that a description should name
CRITERIA = ("reasonability", "detail", "consistency")  # of the paper's GPT-guided scores
PAPER = {  # Hawk's row of Table 1 in arXiv 2405.16886: BLEU-1…4, then the three GPT-guided scores
    "describe": [0.270, 0.139, 0.074, 0.043, 0.283, 0.320, 0.218],
    "answer": [0.319, 0.179, 0.112, 0.073, 0.840, 0.794, 0.753],
}
TOKENISATION = "lower-cased, mteval-v13a"
MARKUP = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # as 13a has it

# ----------------------------------------------------------------------------------------------------------------------
# Files of JSON lines that survive a kill


def identity(prediction):
    return tuple(prediction[key] for key in ("video", "task", "question", "reference"))


def check_prediction(line):
    hash(identity(line) + (line["answer"].lower(), line.get("source", "")))


def read_lines(path, check=check_prediction):
    """The objects of a file of JSON lines, [] if there is none yet. A half-written last line, of a run that was killed,
    does not count; any other line that is not JSON, or that `check` cannot read, is a ValueError."""
    objects = []
    if os.path.exists(path):
        for i, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
            try:
                objects.append(json.loads(line))
                check(objects[-1])
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                raise ValueError(f"{path}, line {i}: not what this program writes; is it another file?") from None
    return objects


def appendable(path):
    """The file, opened to add lines; a half-written last one is cut off."""
    file = open(path, "ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def as_line(thing):
    return json.dumps(thing).encode() + b"\n"


# ----------------------------------------------------------------------------------------------------------------------
# BLEU


def words(text):
    """Lower-cased, split at spaces and around punctuation by the rules of mteval-v13a (sacrebleu's "13a"): a full stop or
    comma between two digits, an apostrophe, and a hyphen that follows no digit stay in the word."""
    text = text.lower().rstrip()
    for old, new in MARKUP.items():
        text = text.replace(old, new)
    text = re.sub(r'([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])', r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu_counts(hypotheses, references):
    """What BLEU needs of each pair, a row of 10: matching n-grams, n-grams of the hypothesis (n = 1…4), both lengths. The
    counts of a corpus are the sum of its rows."""
    rows = np.zeros((len(hypotheses), 10))
    for row, *pair in zip(rows, hypotheses, references, strict=True):
        h, r = map(words, pair)
        for n in range(1, 5):
            ours, theirs = (Counter(zip(*(w[i:] for i in range(n)))) for w in (h, r))  # noqa: B905
            row[n - 1], row[n + 3] = (ours & theirs).total(), ours.total()
        row[8:] = len(h), len(r)
    return rows


def bleu_from_counts(counts):
    """(…, 10) -> (…, 4): the brevity penalty times the geometric mean of the clipped 1…n-gram precisions."""
    matched, total, length, reference = counts[..., :4], counts[..., 4:8], counts[..., 8:9], counts[..., 9:]
    some = matched > 0  # then so are total and length; where 4 words match, 3 do, so that zeros come last
    log_precision = np.log(np.where(some, matched, 1) / np.where(some, total, 1))
    penalty = np.minimum(0, 1 - reference / np.maximum(length, 1))
    return np.where(some, np.exp(penalty + log_precision.cumsum(-1) / [1, 2, 3, 4]), 0.0)


def bleu(hypotheses, references):
    """Corpus BLEU with one reference each: [BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1, over lists of texts.

    Without smoothing: BLEU-n is what `sacrebleu --lowercase --smooth-method none` gives with that n. An empty answer has
    no n-gram and length 0, so that it costs through the brevity penalty; nothing but empty answers is 0.
    """
    return bleu_from_counts(bleu_counts(hypotheses, references).sum(0)).tolist()


def per_source(predictions):
    """Yields (task, source or "all", numbers of its predictions)."""
    for task in sorted({p["task"] for p in predictions}, reverse=True):
        of_task = [i for i, p in enumerate(predictions) if p["task"] == task]
        for name in [*sorted({predictions[i].get("source") or "" for i in of_task}), "all"]:
            yield task, name, [i for i in of_task if name in ("all", predictions[i].get("source") or "")]


def bleu_per_source(predictions):
    """{task: {source or "all": {"n": predictions, "bleu": [BLEU-1…4]}}}"""
    counts, table = bleu_counts(*([p[key] for p in predictions] for key in ("answer", "reference"))), {}
    for task, name, chosen in per_source(predictions):
        scores = bleu_from_counts(counts[chosen].sum(0)).tolist()
        table.setdefault(task, {})[name] = {"n": len(chosen), "bleu": scores}
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def read_kinds(path):
    """A file {kind: the phrase that only its descriptions have}."""
    kinds = json.loads(Path(path).read_text())
    if not (isinstance(kinds, dict) and kinds and all(isinstance(phrase, str) for phrase in kinds.values())):
        raise ValueError(f'{path}: must be JSON like {{"kind": "phrase", ...}}')
    return kinds


def names_kind(prediction, kinds):
    """The kinds of event that an answer names. kinds: {kind: phrase}."""
    return [kind for kind, phrase in kinds.items() if phrase.lower() in prediction["answer"].lower()]


def kind_scores(predictions, kinds):
    """Of toy descriptions: {"overall": share that names the right kind and no other, "kinds": {kind: [right, all]},
    "confusions": [[kind, what was named, count], …] by count}. kinds: {kind: phrase}."""
    counts, confusions = {kind: [0, 0] for kind in kinds}, Counter()
    for p in predictions:
        if p["task"] != "describe" or p.get("kind") not in kinds:
            continue
        named = names_kind(p, kinds)
        counts[p["kind"]][0] += named == [p["kind"]]
        counts[p["kind"]][1] += 1
        if named != [p["kind"]]:
            confusions[p["kind"], " and ".join(named) or "none"] += 1
    right, n = (sum(column) for column in zip(*counts.values(), strict=True))
    ranked = [[*pair, count] for pair, count in confusions.most_common()]
    return {"overall": right / n if n else None, "kinds": counts, "confusions": ranked}


def fact_scores(predictions, rows, names):
    """{fact: [descriptions that have it, all]} for colour, object and place of the toy rows, matched as whole words."""
    row_of, counts = dict(zip(names, rows, strict=True)), {fact: [0, 0] for fact in FACTS}
    for p in predictions:
        for fact in FACTS:
            truth = row_of.get(p["video"], {}).get(fact)
            if p["task"] == "describe" and truth:
                found = re.search(rf"\b{re.escape(truth)}\b", p["answer"], re.IGNORECASE)
                counts[fact][0] += bool(found)
                counts[fact][1] += 1
    return counts


def print_scores(scores):
    """The layout of the paper's Table 1, one task after the other, then what only the toy world has."""

    def row(name, numbers, n):
        cells = "".join("        –" if x is None else f"{x:9.3f}" for x in numbers)
        print(f"  {name:24}{cells}  {n:>11}")

    columns = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "Reason.", "Detail", "Consist."]
    for task, sources in scores["bleu"].items():
        print(f"{task:26}" + "".join(f"{column:>9}" for column in columns) + "  predictions")
        for source, score in sources.items():
            judged = scores.get("judge", {}).get("scores", {}).get(task, {}).get(source, {})
            row(source or "(no source)", score["bleu"] + [judged.get(name) for name in CRITERIA], score["n"])
        if task in PAPER:
            row("Hawk, paper, its data", PAPER[task], "")
    print(f"BLEU: corpus level, {TOKENISATION} tokens, no smoothing; the paper may have split words otherwise")
    if "judge" in scores:
        print(f"judge: {scores['judge']['model']}, {scores['judge']['failed']} marks failed")
    if "kinds" in scores:
        kinds, share = scores["kinds"], "{0:>6.1%}  ({1}/{2})".format
        print("kind named, and no other")
        counts = kinds["kinds"] | {"all": [sum(column) for column in zip(*kinds["kinds"].values(), strict=True)]}
        for name, (right, n) in (counts | {f"{f} named": c for f, c in scores["facts"].items()}).items():
            if n:
                print(f"  {name:22}  {share(right / n, right, n)}")
        for kind, named, count in kinds["confusions"][:10]:
            print(f"  {count:4} times {kind} was taken for {named}")
    if "counts" in scores:
        c, bad = scores["counts"], len(scores["unreadable"])
        print(
            f"{c['clips']} clips: {bad} unreadable, {c['skipped']} skipped; {c['refused']} refused references left out"
        )
