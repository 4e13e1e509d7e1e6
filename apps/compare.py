"""Which of two files of predictions is better, and is the difference more than the luck of these clips?

    python -m apps.compare before.jsonl after.jsonl
    python -m apps.compare before.jsonl after.jsonl --kinds data/toy/kinds.json --json

Compares what both files answer: the same question about the same clip. For each task, source and metric it prints both
scores, the difference B − A, and the interval that holds it in 95% of 1000 bootstrap resamples of the clips (a clip is
drawn with all its questions, in both files alike). A star stands where the interval leaves out 0. Metrics: BLEU-1…4; the
marks of each judge that marked both files (FILE.judge.jsonl); with --kinds, toy descriptions that name the right kind.
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
from sample import PROBLEMS, Parser, complain, note, number


def pair_up(a, b):
    """The predictions that both lists have, in the order of the first."""

    def numbered(predictions):
        seen = Counter()
        for p in predictions:
            yield (*identity(p), seen[identity(p)]), p
            seen[identity(p)] += 1

    a, b = dict(numbered(a)), dict(numbered(b))
    common = [key for key in a if key in b]
    return [a[key] for key in common], [b[key] for key in common], len(a) + len(b) - 2 * len(common)


def ratio(counts):
    return np.divide(
        counts[..., :1], counts[..., 1:], out=np.full_like(counts[..., :1], np.nan), where=counts[..., 1:] > 0
    )


def metrics(pair, paths, kinds=None):
    """Yields (names, counts of A, counts of B, function): counts have a row for each prediction, and the function makes
    the named scores of their sum over predictions, (…, counts) -> (…, names)."""
    texts = [[[p[key] for p in predictions] for key in ("answer", "reference")] for predictions in pair]
    yield [f"BLEU-{n}" for n in range(1, 5)], *(bleu_counts(*text) for text in texts), bleu_from_counts
    records = [f"{path}.judge.jsonl" for path in paths]
    models = [{line["model"] for line in read_lines(record, lambda line: line["model"])} for record in records]
    marks = [read_marks(record) for record in records]
    for model in sorted(models[0] & models[1]):
        for criterion in CRITERIA:
            both = [[m.get(key_of(model, criterion, p)) for p in ps] for m, ps in zip(marks, pair, strict=True)]
            known = [None not in ab for ab in zip(*both, strict=True)]  # marked in both files
            counts = (np.array([[x if k else 0, k] for x, k in zip(xs, known, strict=True)], float) for xs in both)
            yield [f"{criterion} ({model})"], *counts, ratio
    if kinds:
        counts = ([[names_kind(p, kinds) == [p.get("kind")], p["task"] == "describe" and p.get("kind") in kinds]
                   for p in predictions] for predictions in pair)  # fmt: skip
        yield ["kind named"], *(np.array([[r * n, n] for r, n in c], float) for c in counts), ratio


def intervals(a, b, clips, score, resamples=1000, seed=0, level=0.95):
    """Scores of the counts a and b (a row each prediction), and the bootstrap interval of the difference over clips
    (the number of each row's clip): (A, B, low, high), each an array over the metric's names."""
    per_clip = np.zeros((2, clips.max() + 1, a.shape[1]))
    for sums, counts in zip(per_clip, (a, b), strict=True):
        np.add.at(sums, clips, counts)
    n = per_clip.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)  # (resamples, clips)
    differences = score(drawn @ per_clip[1]) - score(drawn @ per_clip[0])
    differences = differences[~np.isnan(differences).any(1)]  # draws without a single judged prediction
    edges = [50 * (1 - level), 50 * (1 + level)]
    low, high = (
        np.percentile(differences, edges, axis=0) if len(differences) else np.full((2, differences.shape[1]), np.nan)
    )
    return score(a.sum(0)), score(b.sum(0)), low, high


def compare(paths, kinds=None, resamples=1000, seed=0):
    """-> (lines, predictions in only one file); a line: task, source, metric, clips, a, b, difference, low, high."""
    files = [read_lines(path) for path in paths]
    for path, predictions in zip(paths, files, strict=True):
        if not predictions:
            raise ValueError(f"{path}: no predictions")
    *pair, alone = pair_up(*files)
    if not pair[0]:
        raise ValueError(f"{paths[0]} and {paths[1]} answer no question in common")
    lines, measured = [], list(metrics(pair, paths, kinds))
    for task, source, chosen in per_source(pair[0]):
        videos = [pair[0][i]["video"] for i in chosen]
        clips = np.unique(videos, return_inverse=True)[1]
        for names, a, b, score in measured:
            found = intervals(a[chosen], b[chosen], clips, score, resamples, seed)
            for name, x, y, low, high in zip(names, *found, strict=True):
                if not np.isnan(x):
                    numbers = {"a": x, "b": y, "difference": y - x, "low": low, "high": high}
                    about = {"task": task, "source": source, "metric": name, "clips": len(set(videos))}
                    lines.append(about | {key: float(value) for key, value in numbers.items()})
    return lines, alone


def print_table(lines):
    before = None
    for line in lines:
        if (line["task"], line["source"]) != before:
            before = line["task"], line["source"]
            print(f"{line['task']}, {line['source'] or '(no source)'}, {line['clips']} clips")
        star = " *" if line["low"] > 0 or line["high"] < 0 else ""
        print("  {metric:32}{a:7.3f}{b:8.3f}{difference:+9.3f}  [{low:+.3f}, {high:+.3f}]".format(**line) + star)


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
        complain(error)
        return 2
    if args.json:
        print("\n".join(map(json.dumps, lines)))
    else:
        print_table(lines)
    if alone:
        note(f"note: {alone} predictions stand in only one of the files and were left out")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
