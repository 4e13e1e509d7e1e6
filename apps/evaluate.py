"""Score a model on the clips of an index: describe each clip, answer every question about it.

    python -m apps.evaluate --annotations data/toy/test.jsonl --out predictions.jsonl
    python -m apps.evaluate --annotations data/hawk/test.jsonl --out hawk.jsonl --weights weights/hawk-7b --task describe

Each line of the output is one prediction: video, task (describe or answer), question, answer, reference, source, and for
toy clips the kind. Decoding is greedy. Start a run that was stopped again and it goes on where it was, to the same file.
At the end it prints, and writes to OUT.scores.json: corpus BLEU-1…4 per source (paper, Table 1), and for a toy world (a
kinds.json beside the index) how often the right kind of event is named, what is confused, and how often the colour,
object and place of the main actor stand in the description.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import DESCRIBE_QUESTIONS, VideoError, read_clip, read_index
from hawk import Encoding
from sample import PROBLEMS, Parser, add_model_options, complain, encode_clips, load_from_options, note, number

MAX_NEW_TOKENS = 128
FACTS = ("colour", "object", "place")  # fields of toy rows that a description should name

# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def questions(row, name, task):
    """The predictions that a row of an index asks for, with an empty answer."""
    asked = []
    if task != "answer" and row.get("description"):
        asked.append(("describe", DESCRIBE_QUESTIONS[0], row["description"]))
    if task != "describe":
        asked += [("answer", turn["q"], turn["a"]) for turn in row.get("qa") or [] if turn["a"]]
    extra = {"source": row.get("source", "")} | ({"kind": row["kind"]} if "kind" in row else {})
    return [{"video": name, "task": t, "question": q, "answer": "", "reference": r} | extra for t, q, r in asked]


def identity(prediction):
    return tuple(prediction[key] for key in ("video", "task", "question", "reference"))


def load_index(path, limit=None):
    """-> rows of the index (absolute paths in "video"), and the name of each video as the index has it."""
    rows, folder = read_index(path)[:limit], os.path.dirname(os.path.abspath(path)) + os.sep
    return rows, [row["video"].removeprefix(folder) for row in rows]


def read_predictions(path):
    """The predictions of a file, [] if there is none yet. A half-written last line, of a run that was killed, is cut off
    the file; any other bad line is a ValueError."""
    if not os.path.exists(path):
        return []
    text = Path(path).read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    lines = []
    for number_, line in enumerate(text[:whole].decode().splitlines(), 1):
        try:
            lines.append(json.loads(line))
            identity(lines[-1])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number_}: not a prediction; is it another file?") from None
    return lines


class Clips(Dataset):
    """Clips of videos, read in loader processes; for one that cannot be read, the reason."""

    def __init__(self, paths, config):
        self.paths, self.config = paths, config

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        c = self.config
        try:
            return read_clip(self.paths[i], c.n_frames, c.image_size, motion=c.motion)
        except VideoError as error:
            return str(error)


def answer_batch(model, tokenizer, clips, asked, size):
    """Fills in "answer" of the predictions asked[i] about each clip i, `size` prompts at a time."""
    encoding = encode_clips(model, clips)
    jobs = [(i, prediction) for i, predictions in enumerate(asked) for prediction in predictions]
    for start in range(0, len(jobs), size):
        of, predictions = zip(*jobs[start : start + size], strict=True)
        ids = [
            tokenizer.encode_prompt(prediction["question"], clips[i].message, model.config.n_visual)
            for i, prediction in zip(of, predictions, strict=True)
        ]
        rows = Encoding(*(x[list(of)] for x in vars(encoding).values()))
        made = model.generate(None, None, ids, MAX_NEW_TOKENS, eos_id=tokenizer.eos, encoding=rows)
        for prediction, new in zip(predictions, made, strict=True):
            prediction["answer"] = tokenizer.decode(new)


def predict(model, tokenizer, rows, names, args):
    """Appends to args.out what it lacks. Returns the names of the videos that cannot be read.

    Batches are the same whatever is done already, and are answered whole, so that a resumed run computes what an
    undisturbed one does, to the last bit.
    """
    asked = [questions(row, name, args.task) for row, name in zip(rows, names, strict=True)]
    new, have = [[] for _ in rows], Counter(map(identity, read_predictions(args.out)))  # new: what the file lacks
    for i, p in ((i, p) for i, predictions in enumerate(asked) for p in predictions):
        have[identity(p)] -= 1  # counted, since an index may ask the same twice
        if have[identity(p)] < 0:
            new[i].append(p)
    batches = [list(range(i, min(i + args.batch_size, len(rows)))) for i in range(0, len(rows), args.batch_size)]
    batches = [batch for batch in batches if any(new[i] for i in batch)]
    bad, clips = [], Clips([row["video"] for row in rows], model.config)
    loader = DataLoader(clips, batch_sampler=batches, num_workers=args.workers, collate_fn=list)
    bar = tqdm(total=len(rows), initial=len(rows) - sum(map(len, batches)), unit="clip", file=sys.stderr)
    with open(args.out, "a", encoding="utf-8") as file, bar:
        for batch, read in zip(batches, loader, strict=True):
            for i, reason in zip(batch, read, strict=True):
                if isinstance(reason, str):
                    tqdm.write(f"error: {reason}", file=sys.stderr)
                    bad.append(names[i])
            good = [(clip, i) for clip, i in zip(read, batch, strict=True) if not isinstance(clip, str)]
            if good:
                answer_batch(model, tokenizer, [c for c, _ in good], [asked[i] for _, i in good], args.batch_size)
            file.writelines(json.dumps(p) + "\n" for _, i in good for p in new[i])
            file.flush()
            bar.update(len(batch))
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# BLEU


def words(text):
    """Lower-cased, split at spaces and around punctuation by the rules of mteval-v13a (sacrebleu's "13a"): a full stop or
    comma between two digits, an apostrophe, and a hyphen that follows no digit stay in the word."""
    text = f" {text.lower()} "
    text = re.sub(r'([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])', r" \1 ", text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(hypotheses, references):
    """Corpus BLEU with one reference each: [BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1, over lists of texts.

    BLEU-n is the brevity penalty times the geometric mean of the clipped 1…n-gram precisions, without smoothing: equal
    to `sacrebleu --lowercase --smooth-method none` with that n. An empty answer has no n-gram and counts as length 0.
    """
    matched, total, lengths = [0] * 4, [0] * 4, [0, 0]
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        pair = words(hypothesis), words(reference)
        for n in range(1, 5):
            h, r = (Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in pair)
            matched[n - 1] += (h & r).total()
            total[n - 1] += h.total()
        lengths = [length + len(w) for length, w in zip(lengths, pair, strict=True)]
    scores, log_precision = [], 0.0
    for n in range(1, 5):
        if not matched[n - 1]:
            return scores + [0.0] * (5 - n)
        log_precision += math.log(matched[n - 1] / total[n - 1])
        scores.append(math.exp(min(0.0, 1 - lengths[1] / lengths[0]) + log_precision / n))
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def bleu_per_source(predictions):
    """{task: {source or "all": {"n": predictions, "bleu": [BLEU-1…4]}}}"""
    table = {}
    for task in sorted({p["task"] for p in predictions}, reverse=True):
        of_task = [p for p in predictions if p["task"] == task]
        sources = sorted({p["source"] for p in of_task})
        for name in [*sources, "all"]:
            chosen = [p for p in of_task if name in ("all", p["source"])]
            score = bleu([p["answer"] for p in chosen], [p["reference"] for p in chosen])
            table.setdefault(task, {})[name] = {"n": len(chosen), "bleu": score}
    return table


def kind_scores(predictions, kinds):
    """Of toy descriptions: {"overall": share that names the right kind and no other, "kinds": {kind: [right, all]},
    "confusions": [[kind, what was named, count], …] by count}. kinds: {kind: phrase}."""
    counts, confusions = {kind: [0, 0] for kind in kinds}, Counter()
    for p in predictions:
        if p["task"] != "describe" or p.get("kind") not in kinds:
            continue
        named = [kind for kind, phrase in kinds.items() if phrase.lower() in p["answer"].lower()]
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
    share = "{0:>6.1%}  ({1}/{2})".format
    for task, sources in scores["bleu"].items():
        print(f"{task:24}" + "".join(f"  BLEU-{n}" for n in range(1, 5)) + "  predictions")
        for source, score in sources.items():
            print(
                f"  {source or '(no source)':22}" + "".join(f"  {b:6.3f}" for b in score["bleu"]) + f"  {score['n']:11}"
            )
    if "kinds" in scores:
        kinds = scores["kinds"]
        print("kind named, and no other")
        counts = kinds["kinds"] | {"all": [sum(column) for column in zip(*kinds["kinds"].values(), strict=True)]}
        for name, (right, n) in (counts | {f"{f} named": c for f, c in scores["facts"].items()}).items():
            if n:
                print(f"  {name:22}  {share(right / n, right, n)}")
        for kind, named, count in kinds["confusions"][:10]:
            print(f"  {count:4} times {kind} was taken for {named}")
    if scores["unreadable"]:
        print(f"{len(scores['unreadable'])} videos could not be read")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--annotations", required=True, metavar="INDEX", help="index file (JSON lines)")
    p.add_argument("--out", required=True, metavar="FILE", help="predictions; gone on with if it is there")
    p.add_argument("--task", choices=["describe", "answer", "both"], default="both")
    p.add_argument("--limit", type=number(int, 1), help="only the first clips of the index")
    p.add_argument("--batch-size", type=number(int, 1), default=16, help="clips, and prompts, at a time")
    p.add_argument("--workers", type=number(int, 0), default=2, help="processes that read videos")
    add_model_options(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        rows, names = load_index(args.annotations, args.limit)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        read_predictions(args.out)  # another file by mistake? Say so before the model is loaded
        bad = predict(*load_from_options(args), rows, names, args)
        predictions = read_predictions(args.out)
        scores = {"bleu": bleu_per_source(predictions), "unreadable": bad}
        kinds = Path(args.annotations).parent / "kinds.json"
        if kinds.exists():
            scores["kinds"] = kind_scores(predictions, json.loads(kinds.read_text()))
            scores["facts"] = fact_scores(predictions, rows, names)
        out = Path(f"{args.out}.scores.json")
        out.with_suffix(".tmp").write_text(json.dumps(scores, indent=1) + "\n")
        out.with_suffix(".tmp").replace(out)
    except PROBLEMS as error:
        complain(error)
        return 2
    print_scores(scores)
    note(f"written: {args.out}, {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
