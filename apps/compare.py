"""Which of two files of predictions is better, and could the difference be due to the choice of clips?

    python -m apps.compare before.jsonl after.jsonl
    python -m apps.compare after.jsonl               # how certain is each score? its own interval
    python -m apps.compare before.jsonl after.jsonl --kinds data/toy/kinds.json --json

Compares answers to the same question about the same clip. For each task, source and metric it prints
both scores, the difference B − A, and the interval that holds it in 95% of 1000 bootstrap resamples of
the clips (a clip is drawn with all its questions, and in both files alike). A star marks an interval without
0. Metrics: BLEU-1…4, ROUGE-L and words per answer; the marks of each judge that marked both files with
the same prompts (FILE.judge.jsonl); with --kinds, descriptions that name the right kind; for detect, ROC
AUC, average precision, accuracy and F1.
"""

import json
import os
from collections import Counter

import numpy as np

from apps import run_program
from apps.detect import METRICS, measure
from apps.judge import key_of, read_marks
from apps.scores import (
    CRITERIA,
    bleu_counts,
    bleu_from_counts,
    identity,
    names_kind,
    per_source,
    read_kinds,
    read_lines,
    rouge_l,
)
from sample import PROBLEMS, make_parser, note, number, print_error

BLOCK = 100  # resamples at a time: less memory than all at once

# ------------------------------------------------------------------------------------------------------------
# Metrics: a row of numbers for each prediction, and a function from rows and their weights to scores


def by_question(predictions):
    """{key: prediction}; the key also counts how often the same question has been asked about the clip."""
    found = {}
    seen = Counter()
    for p in predictions:
        found[(*identity(p), seen[identity(p)])] = p
        seen[identity(p)] += 1
    return found


def pair_up(a, b):
    """-> the predictions that both lists have, in the order of the first, and how many are in only one of
    them."""
    a = by_question(a)
    b = by_question(b)
    common = [key for key in a if key in b]
    alone = len(a) + len(b) - 2 * len(common)
    return [a[key] for key in common], [b[key] for key in common], alone


def summed(function):
    """A metric of weighted rows from a `function` of their sum, (…, counts) -> (…, names)."""
    return lambda rows, weights: function(weights @ rows)


@summed
def ratio(counts):
    """Counts (…, 2) -> (…, 1): the first divided by the second, NaN where that is 0."""
    unknown = np.full_like(counts[..., :1], np.nan)
    return np.divide(counts[..., :1], counts[..., 1:], out=unknown, where=counts[..., 1:] > 0)


def detection(rows, weights):
    """Rows (score, label) -> (…, names of METRICS)"""
    return measure(rows[:, 0], rows[:, 1] > 0, weights)


def text_metrics(files, paths, kinds=None):
    """Yields (names, rows of each file, function): rows have numbers for each prediction, and the function
    turns them and weights (…, N), how often each prediction counts, into the named scores (…, names)."""
    bleu = [bleu_counts([p["answer"] for p in ps], [p["reference"] for p in ps]) for ps in files]
    yield [f"BLEU-{n}" for n in range(1, 5)], bleu, summed(bleu_from_counts)
    rouge = [[(rouge_l(p["answer"], p["reference"]), 1) for p in ps] for ps in files]
    yield ["ROUGE-L"], rouge, ratio
    yield ["words"], [[(len(p["answer"].split()), 1) for p in ps] for ps in files], ratio
    marks = []
    judges = []
    for path in paths:
        lines = read_lines(f"{path}.judge.jsonl", lambda line: line["model"])
        judges.append({(line["model"], line.get("prompts") or "") for line in lines})
        marks.append(read_marks(f"{path}.judge.jsonl"))
    for model, digest in sorted(set.intersection(*judges)):
        about = f"{model}, prompts {digest[:8]}" if digest else model
        for criterion in CRITERIA:
            yield [f"{criterion} ({about})"], mark_counts(files, marks, model, criterion, digest), ratio
    if kinds:
        yield ["kind named"], [kind_counts(predictions, kinds) for predictions in files], ratio


def mark_counts(files, marks, model, criterion, digest=None):
    """For each file, rows of (mark, 1), or (0, 0) for a prediction that is not marked in all files."""
    found = [
        [of_file.get(key_of(model, criterion, p, digest)) for p in ps]
        for of_file, ps in zip(marks, files, strict=True)
    ]
    everywhere = [None not in row for row in zip(*found, strict=True)]
    return [
        [(mark, 1) if whole else (0, 0) for mark, whole in zip(of_file, everywhere, strict=True)]
        for of_file in found
    ]


def kind_counts(predictions, kinds):
    """Rows of (is the right kind named and no other, 1), or (0, 0) for what is not a description of a known
    kind."""
    counts = np.zeros((len(predictions), 2))
    for row, p in zip(counts, predictions, strict=True):
        if p["task"] == "describe" and p.get("kind") in kinds:
            row[0] = names_kind(p, kinds) == [p["kind"]]
            row[1] = 1
    return counts


# ------------------------------------------------------------------------------------------------------------
# Comparison


def intervals(rows, clips, score, resamples=1000, seed=0, level=0.95):
    """Bootstrap over clips -> (list of the scores of all files, low, high), arrays over the metric's names.

    rows: one or two arrays, with a row for each prediction; clips: the number of each row's clip. low and
    high enclose the score of the one file, or the second one's difference from the first."""
    rows = [np.asarray(of_file, float) for of_file in rows]
    n = clips.max() + 1
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, BLOCK):
        # how often each clip is drawn when n are drawn with replacement: (BLOCK or the rest, n)
        drawn = rng.multinomial(n, np.full(n, 1 / n), min(BLOCK, resamples - start)).astype(float)
        weights = drawn[:, clips]  # (…, N)
        scores = [score(of_file, weights) for of_file in rows]
        found.append(scores[-1] - (scores[0] if len(rows) > 1 else 0))
    low = []
    high = []
    for values in np.concatenate(found).T:  # (resamples,) of each name
        values = values[~np.isnan(values)]  # NaN: no marked prediction was drawn, or only normal videos
        ends = np.percentile(values, [50 * (1 - level), 50 * (1 + level)]) if len(values) else [np.nan] * 2
        low.append(ends[0])
        high.append(ends[1])
    everything = np.ones(len(clips))
    return [score(of_file, everything) for of_file in rows], np.array(low), np.array(high)


def compare(paths, kinds=None, resamples=1000, seed=0):
    """One or two files -> (lines, predictions in only one file). A line: task, source, metric, clips, a, low,
    high; of two files also b and difference, which low and high are then about."""
    files = [read_lines(path) for path in paths]
    alone = 0
    for path, predictions in zip(paths, files, strict=True):
        if not predictions:
            raise ValueError(f"{path}: no predictions")
    if len(files) > 1:
        *files, alone = pair_up(*files)
        if not files[0]:
            raise ValueError(f"{paths[0]} and {paths[1]} answer no question in common")
    measured = list(text_metrics(files, paths, kinds))
    labelled = [[(p.get("score", 0), p.get("label", 0)) for p in ps] for ps in files]
    detected = [(list(METRICS.values()), labelled, detection)]
    lines = []
    for task, source, chosen in per_source(files[0]):
        videos = [files[0][i]["video"] for i in chosen]
        clips = np.unique(videos, return_inverse=True)[1]
        about = {"task": task, "source": source, "clips": len(set(videos))}
        for names, rows, score in detected if task == "detect" else measured:
            some = [np.asarray(of_file, float)[chosen] for of_file in rows]
            scores, low, high = intervals(some, clips, score, resamples, seed)
            for i, name in enumerate(names):
                if not any(np.isnan(of_file[i]) for of_file in scores):
                    numbers = {"a": scores[0][i]}
                    if len(files) > 1:
                        numbers |= {"b": scores[1][i], "difference": scores[1][i] - scores[0][i]}
                    numbers |= {"low": low[i], "high": high[i]}
                    numbers = {key: float(value) for key, value in numbers.items()}
                    lines.append(about | {"metric": name} | numbers)
    return lines, alone


# ------------------------------------------------------------------------------------------------------------
# Command line


def print_table(lines):
    before = None
    for line in lines:
        group = (line["task"], line["source"])
        if group != before:
            few = " (too few for these intervals: 30 or more are needed)" if line["clips"] < 30 else ""
            print(f"{line['task']}, {line['source'] or '(no source)'}, {line['clips']} clips{few}")
            before = group
        row = "  {metric:32}{a:7.3f}"
        if "b" in line:
            row += "{b:8.3f}{difference:+9.3f}  [{low:+.3f}, {high:+.3f}]"
            row += " *" if line["low"] > 0 or line["high"] < 0 else ""
        else:
            row += "  [{low:.3f}, {high:.3f}]"
        print(row.format(**line))


def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="A, or A and B, written by apps.evaluate")
    p.add_argument("--kinds", metavar="FILE", help="kinds.json of the index, to compare the kinds named")
    p.add_argument("--resamples", type=number(int, 1), default=1000, help="in the bootstrap (default: 1000)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of the bootstrap (default: 0)")
    p.add_argument("--json", action="store_true", help="one JSON object per line")
    args = p.parse_args(argv)
    if len(args.files) > 2:
        p.error("give one or two files")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        for path in args.files:
            if not os.path.exists(path):
                raise ValueError(f"{path}: no such file")
        kinds = read_kinds(args.kinds) if args.kinds else None
        lines, alone = compare(args.files, kinds, args.resamples, args.seed)
    except PROBLEMS as error:
        return print_error(error)
    if args.json:
        for line in lines:  # JSON has no NaN, the ends of an interval of too few resamples
            print(json.dumps({key: None if value != value else value for key, value in line.items()}))
    else:
        print_table(lines)
    if alone:
        note(f"note: {alone} predictions are in only one of the files and were left out")
    return 0


if __name__ == "__main__":
    run_program(main)
