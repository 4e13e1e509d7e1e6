"""Which of two files of predictions is better, and is the difference more than the luck of these clips?

    python -m apps.compare before.jsonl after.jsonl
    python -m apps.compare before.jsonl after.jsonl --kinds data/toy/kinds.json --json

Compares what both files answer: the same question about the same clip. For each task, source and metric it
prints both scores, the difference B − A, and the interval that holds it in 95% of 1000 bootstrap resamples of
the clips (a clip is drawn with all its questions, and in both files alike). A star marks an interval without
0. Metrics: BLEU-1…4; the marks of each judge that marked both files (FILE.judge.jsonl); with --kinds, toy
descriptions that name the right kind.
"""

import json
import os
import sys
from collections import Counter

import numpy as np

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
)
from sample import PROBLEMS, Parser, note, number, print_error

# ------------------------------------------------------------------------------------------------------------
# Metrics: a row of counts for each prediction, and a function from summed counts to scores


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


def ratio(counts):
    """Counts (…, 2) -> (…, 1): the first divided by the second, NaN where that is 0."""
    unknown = np.full_like(counts[..., :1], np.nan)
    return np.divide(counts[..., :1], counts[..., 1:], out=unknown, where=counts[..., 1:] > 0)


def metrics(pair, paths, kinds=None):
    """Yields (names, counts of A, counts of B, function): counts have a row for each prediction, and the
    function turns their sum over predictions (…, counts) into the named scores (…, names)."""
    bleu = [bleu_counts([p["answer"] for p in ps], [p["reference"] for p in ps]) for ps in pair]
    yield [f"BLEU-{n}" for n in range(1, 5)], *bleu, bleu_from_counts
    records = [f"{path}.judge.jsonl" for path in paths]
    judges = [
        {line["model"] for line in read_lines(record, lambda line: line["model"])} for record in records
    ]
    marks = [read_marks(record) for record in records]
    for model in sorted(judges[0] & judges[1]):
        for criterion in CRITERIA:
            yield [f"{criterion} ({model})"], *mark_counts(pair, marks, model, criterion), ratio
    if kinds:
        yield ["kind named"], *(kind_counts(predictions, kinds) for predictions in pair), ratio


def mark_counts(pair, marks, model, criterion):
    """[counts of A, counts of B], rows of (mark, 1), or (0, 0) for a prediction that is not marked in both
    files."""
    a, b = (
        [found.get(key_of(model, criterion, p)) for p in ps] for found, ps in zip(marks, pair, strict=True)
    )
    rows = [[(x, 1), (y, 1)] if None not in (x, y) else [(0, 0), (0, 0)] for x, y in zip(a, b, strict=True)]
    return np.array(rows, float).transpose(1, 0, 2)


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


def intervals(a, b, clips, score, resamples=1000, seed=0, level=0.95):
    """Scores of the counts a and b (a row for each prediction), and the bootstrap interval of their
    difference over clips (the number of each row's clip): (A, B, low, high), each an array over the metric's
    names."""
    n = clips.max() + 1
    a_of = np.zeros((n, a.shape[1]))  # counts of each clip
    b_of = np.zeros((n, b.shape[1]))
    np.add.at(a_of, clips, a)
    np.add.at(b_of, clips, b)
    # How often each clip is drawn when n are drawn with replacement: (resamples, n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)
    differences = score(drawn @ b_of) - score(drawn @ a_of)
    differences = differences[~np.isnan(differences).any(1)]  # NaN: no judged prediction was drawn
    if len(differences):
        low, high = np.percentile(differences, [50 * (1 - level), 50 * (1 + level)], axis=0)
    else:
        low = np.full(differences.shape[1], np.nan)
        high = low
    return score(a.sum(0)), score(b.sum(0)), low, high


def compare(paths, kinds=None, resamples=1000, seed=0):
    """-> (lines, predictions in only one file); a line: task, source, metric, clips, a, b, difference, low,
    high."""
    files = [read_lines(path) for path in paths]
    for path, predictions in zip(paths, files, strict=True):
        if not predictions:
            raise ValueError(f"{path}: no predictions")
    *pair, alone = pair_up(*files)
    if not pair[0]:
        raise ValueError(f"{paths[0]} and {paths[1]} answer no question in common")
    lines = []
    measured = list(metrics(pair, paths, kinds))
    for task, source, chosen in per_source(pair[0]):
        videos = [pair[0][i]["video"] for i in chosen]
        clips = np.unique(videos, return_inverse=True)[1]
        about = {"task": task, "source": source, "clips": len(set(videos))}
        for names, a, b, score in measured:
            found = intervals(a[chosen], b[chosen], clips, score, resamples, seed)
            for name, x, y, low, high in zip(names, *found, strict=True):
                if not np.isnan(x):
                    numbers = {"a": x, "b": y, "difference": y - x, "low": low, "high": high}
                    lines.append(
                        about | {"metric": name} | {key: float(value) for key, value in numbers.items()}
                    )
    return lines, alone


# ------------------------------------------------------------------------------------------------------------
# Command line


def print_table(lines):
    before = None
    for line in lines:
        group = (line["task"], line["source"])
        if group != before:
            print(f"{line['task']}, {line['source'] or '(no source)'}, {line['clips']} clips")
            before = group
        star = " *" if line["low"] > 0 or line["high"] < 0 else ""
        row = "  {metric:32}{a:7.3f}{b:8.3f}{difference:+9.3f}  [{low:+.3f}, {high:+.3f}]".format(**line)
        print(row + star)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("files", nargs=2, metavar="FILE", help="A and B, written by apps.evaluate")
    p.add_argument("--kinds", metavar="FILE", help="kinds.json of the toy world, to compare the kinds named")
    p.add_argument("--resamples", type=number(int, 1), default=1000, help="of the bootstrap (default: 1000)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the bootstrap (default: 0)")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    return p.parse_args(argv)


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
        print("\n".join(map(json.dumps, lines)))
    else:
        print_table(lines)
    if alone:
        note(f"note: {alone} predictions are in only one of the files and were left out")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
