"""From predictions to numbers: shared by apps/evaluate.py, apps/judge.py and apps/compare.py. It is not a
program.

In this order: files of JSON lines that survive a kill, BLEU, ROUGE-L, groups of predictions by source, the
toy world's kinds and facts, and the printed table.
"""

import fcntl
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np

FACTS = ("colour", "object", "place")  # fields of toy rows that a description should name
CRITERIA = ("reasonability", "detail", "consistency")  # of the paper's GPT-guided scores
SOURCES = {"UCF_Crime", "ShanghaiTech", "UBnormal", "CUHK_Avenue", "Ped1", "Ped2", "DoTA"}  # of Hawk's videos
PAPER = {  # Hawk's row of Table 1 in arXiv 2405.16886: BLEU-1…4, then the three GPT-guided scores
    "describe": [0.270, 0.139, 0.074, 0.043, 0.283, 0.320, 0.218],
    "answer": [0.319, 0.179, 0.112, 0.073, 0.840, 0.794, 0.753],
}
TOKENISATION = "lower-cased, mteval-v13a"
ROUGE_TOKENISATION = "lower-cased, runs of a-z and 0-9, not stemmed, as rouge-score"
LOCK_SECONDS = 10.0  # to wait for a lock: loader workers of a killed run hold it until they end

# ------------------------------------------------------------------------------------------------------------
# Files of JSON lines that survive a kill


def identity(prediction):
    """What makes two predictions answers to the same question."""
    return tuple(prediction[key] for key in ("video", "task", "question", "reference"))


def check_prediction(line):
    """Raises one of the errors that read_lines catches if `line` is not a prediction."""
    texts = all(isinstance(text, str) for text in (*identity(line), line["answer"]))
    texts = texts and all(isinstance(line.get(key), str | None) for key in ("source", "kind"))
    if not texts or type(line.get("tokens", 0)) is not int:
        raise ValueError("not the texts and the number of tokens")
    if line["task"] == "detect" and not (0 <= line["score"] <= 1 and line["label"] in (0, 1)):
        raise ValueError("not a score and a label")


def read_lines(path, check=check_prediction):
    """The objects in a file of JSON lines, [] if there is no file yet.

    A half-written last line, left by a run that was killed, does not count. Any other line that is not JSON,
    or that `check` cannot read, raises ValueError.
    """
    if not os.path.exists(path):
        return []
    objects = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            check(line)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            message = f"{path}, line {number}: not what this program writes; is it another file?"
            raise ValueError(message) from None
        objects.append(line)
    return objects


def locked(path):
    """The file, opened and locked until it is closed; its content is kept. ValueError if another process has
    locked it."""
    file = open(path, "ab+")
    lock(file)
    return file


def appendable(path):
    """The file, `locked` and opened to append lines; a half-written last line is cut off."""
    file = locked(path)
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def lock(file):
    """Locks an open file, or closes it and raises ValueError if it stays locked."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                text = "another process is writing to it; wait until that has ended"
                raise ValueError(f"{file.name}: {text}") from None
        except OSError:  # some network file systems have no locks
            return
        time.sleep(0.1)


def as_line(value):
    return json.dumps(value).encode() + b"\n"


# ------------------------------------------------------------------------------------------------------------
# BLEU

# What mteval-v13a (sacrebleu's "13a") replaces before it splits a text into words
MARKUP = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def words(text):
    """Lower-cased words, split at spaces and around punctuation by the rules of mteval-v13a: a full stop or
    comma between two digits, an apostrophe, and a hyphen that does not follow a digit stay inside the
    word."""
    text = text.lower().rstrip()
    for old, new in MARKUP.items():
        text = text.replace(old, new)
    text = re.sub(r'([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])', r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


def ngrams(text, n):
    """Counter of the n-grams in a list of words."""
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def bleu_counts(hypotheses, references):
    """What BLEU needs to know of each pair -> (pairs, 10): matching n-grams for n = 1…4, n-grams of the
    hypothesis for n = 1…4, length of the hypothesis, length of the reference. The counts of a corpus are the
    sum of its rows."""
    rows = np.zeros((len(hypotheses), 10))
    for row, hypothesis, reference in zip(rows, hypotheses, references, strict=True):
        made = words(hypothesis)
        wanted = words(reference)
        for n in range(1, 5):
            ours = ngrams(made, n)
            row[n - 1] = (ours & ngrams(wanted, n)).total()
            row[n + 3] = ours.total()
        row[8] = len(made)
        row[9] = len(wanted)
    return rows


def bleu_from_counts(counts):
    """Counts (…, 10) -> BLEU-1…4 (…, 4): brevity penalty times the geometric mean of the clipped n-gram
    precisions."""
    matched = counts[..., :4]
    total = counts[..., 4:8]
    length = counts[..., 8:9]
    reference = counts[..., 9:]
    # Where 4-grams match, 3-grams do: a zero makes all later scores zero too.
    some = matched > 0
    log_precision = np.log(np.where(some, matched, 1) / np.where(some, total, 1))
    penalty = np.minimum(0, 1 - reference / np.maximum(length, 1))
    mean = log_precision.cumsum(-1) / [1, 2, 3, 4]
    return np.where(some, np.exp(penalty + mean), 0.0)


def bleu(hypotheses, references):
    """Corpus BLEU with one reference each: [BLEU-1, BLEU-2, BLEU-3, BLEU-4], 0 to 1, over lists of texts.

    Without smoothing: BLEU-n is what `sacrebleu --lowercase --smooth-method none` gives with that n. An empty
    answer has no n-grams and length 0, so it costs through the brevity penalty; if all answers are
    empty, the score is 0.
    """
    return bleu_from_counts(bleu_counts(hypotheses, references).sum(0)).tolist()


# ------------------------------------------------------------------------------------------------------------
# ROUGE-L


def rouge_l(hypothesis, reference):
    """Longest common subsequence of two texts, as an F-measure: the harmonic mean of its shares of both
    lengths. 0 to 1; 0 if a text has no words. Without stemming, `rouge-score` gives the same."""
    made = re.findall("[a-z0-9]+", hypothesis.lower())
    wanted = re.findall("[a-z0-9]+", reference.lower())
    longest = np.zeros(len(wanted) + 1)  # [j]: with the words so far and the first j of the reference
    for word in made:
        same = np.array([word == other for other in wanted], float)
        longest[1:] = np.maximum.accumulate(np.maximum(longest[1:], longest[:-1] + same))
    return float(2 * longest[-1] / max(len(made) + len(wanted), 1))


# ------------------------------------------------------------------------------------------------------------
# Scores


def per_source(predictions):
    """Yields (task, source or "all", indices of its predictions). A source called "all" is "all " here."""
    sources = ["all " if p.get("source") == "all" else p.get("source") or "" for p in predictions]
    for task in sorted({p["task"] for p in predictions}, reverse=True):  # "describe" before "answer"
        of_task = [i for i, p in enumerate(predictions) if p["task"] == task]
        for name in sorted({sources[i] for i in of_task}):
            yield task, name, [i for i in of_task if sources[i] == name]
        yield task, "all", of_task


def bleu_per_source(predictions):
    """{task: {source or "all": {"n": predictions, "bleu": [BLEU-1…4]}}}"""
    counts = bleu_counts([p["answer"] for p in predictions], [p["reference"] for p in predictions])
    table = {}
    for task, name, chosen in per_source(predictions):
        scores = bleu_from_counts(counts[chosen].sum(0)).tolist()
        table.setdefault(task, {})[name] = {"n": len(chosen), "bleu": scores}
    return table


def rouge_per_source(predictions):
    """{task: {source or "all": mean ROUGE-L of its answers}}"""
    scores = [rouge_l(p["answer"], p["reference"]) for p in predictions]
    table = {}
    for task, name, chosen in per_source(predictions):
        table.setdefault(task, {})[name] = mean([scores[i] for i in chosen])
    return table


def lengths_per_source(predictions):
    """{task: {source or "all": {"words", "tokens", "reference_words"}}}: means.

    Words are split at spaces; tokens are those that the model made, without the end token; None if no line
    has them."""
    table = {}
    for task, name, chosen in per_source(predictions):
        of = [predictions[i] for i in chosen]
        line = {"words": mean([len(p["answer"].split()) for p in of])}
        line["tokens"] = mean([p["tokens"] for p in of if "tokens" in p])
        line["reference_words"] = mean([len(p["reference"].split()) for p in of])
        table.setdefault(task, {})[name] = line
    return table


def mean(values):
    return sum(values) / len(values) if values else None


def read_kinds(path):
    """A file {kind: the phrase that only its descriptions contain}."""
    try:
        kinds = json.loads(Path(path).read_bytes())  # UTF-8, whatever the locale is
    except (ValueError, RecursionError):
        kinds = None
    if not (isinstance(kinds, dict) and kinds and all(isinstance(phrase, str) for phrase in kinds.values())):
        raise ValueError(f'{path}: must be JSON like {{"kind": "phrase", ...}}')
    return kinds


def names_kind(prediction, kinds):
    """The kinds of event that an answer names. kinds: {kind: phrase}."""
    answer = prediction["answer"].lower()
    return [kind for kind, phrase in kinds.items() if phrase.lower() in answer]


def kind_scores(predictions, kinds):
    """Scores of toy descriptions: {"overall": share that names the right kind and no other, "kinds": {kind:
    [right, all]}, "confusions": [[kind, what was named, count], …], most frequent first}. kinds: {kind:
    phrase}."""
    counts = {kind: [0, 0] for kind in kinds}
    confusions = Counter()
    for p in predictions:
        if p["task"] != "describe" or p.get("kind") not in kinds:
            continue
        kind = p["kind"]
        named = names_kind(p, kinds)
        counts[kind][1] += 1
        if named == [kind]:
            counts[kind][0] += 1
        else:
            confusions[kind, " and ".join(named) or none_named(kinds)] += 1
    right, n = total(counts.values())
    ranked = [[*pair, count] for pair, count in confusions.most_common()]
    return {"overall": right / n if n else None, "kinds": counts, "confusions": ranked}


def none_named(kinds):
    """The label for an answer that names no kind: "none", unless there is a kind of that name."""
    return "no kind" if "none" in kinds else "none"


def total(pairs):
    """[right, all] of several such pairs, added up."""
    return [sum(column) for column in zip(*pairs, strict=True)]


def fact_scores(predictions, rows, names):
    """{fact: [descriptions that name it, all]} for colour, object and place of the toy rows, matched as whole
    words; in other people's rows these fields may hold anything, and only texts count. names: what the
    predictions call the video of each row."""
    row_of = {}
    for name, row in zip(names, rows, strict=True):
        # of several rows about one video, the first that tells a fact counts
        row_of[name] = {fact: row[fact] for fact in FACTS if row.get(fact)} | row_of.get(name, {})
    counts = {fact: [0, 0] for fact in FACTS}
    for p in predictions:
        for fact in FACTS:
            truth = row_of.get(p["video"], {}).get(fact)
            if p["task"] == "describe" and isinstance(truth, str) and truth:
                found = re.search(rf"\b{re.escape(truth)}\b", p["answer"], re.IGNORECASE)
                counts[fact][0] += bool(found)
                counts[fact][1] += 1
    return counts


# ------------------------------------------------------------------------------------------------------------
# The printed table


def print_scores(scores):
    """Prints, for each task, the layout of the paper's Table 1 followed by ROUGE-L and the length of the
    answers; then what was left out, and the scores that only toy worlds have."""
    for task, sources in scores["bleu"].items():
        judged = scores.get("judge", {}).get("scores", {}).get(task, {})
        print_task(task, sources, judged, scores["rouge_l"][task], scores["lengths"][task])
    if scores["bleu"]:
        print(
            f"BLEU: corpus level, {TOKENISATION} tokens, no smoothing; the paper may have split words "
            f"differently\nROUGE-L: mean F-measure of the answers; {ROUGE_TOKENISATION}"
        )
    if "judge" in scores:
        judge = scores["judge"]
        prompts = f", prompts {judge['prompts'][:12]}" if judge.get("prompts") else ""
        print(f"judge: {judge['model']}{prompts}, {judge['failed']} marks failed")
    if "kinds" in scores:
        print_kinds(scores["kinds"], scores["facts"])
    if "counts" in scores:
        counts = scores["counts"]
        unreadable = len(scores["unreadable"])
        print(
            f"{counts['clips']} clips: {unreadable} unreadable, {counts['skipped']} skipped; "
            f"{counts['refused']} refused references left out"
        )


def print_task(task, sources, judged, rouge, lengths):
    columns = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "Reason.", "Detail", "Consist.", "ROUGE-L"]
    header = f"{task:26}" + "".join(f"{column:>9}" for column in columns)
    print(header + "".join(f"{column:>8}" for column in ("words", "tokens")) + "  predictions")
    for source, score in sources.items():
        marks = [judged.get(source, {}).get(name) for name in CRITERIA]
        length = [lengths[source][name] for name in ("words", "tokens")]
        print_row(source or "(no source)", [*score["bleu"], *marks, rouge[source]], length, score["n"])
    if task in PAPER and not SOURCES.isdisjoint(sources):  # for other videos it says nothing
        print_row("Hawk, paper, its data", [*PAPER[task], None], [None, None], "")


def print_row(name, numbers, lengths, n):
    cells = "".join("        –" if x is None else f"{x:9.3f}" for x in numbers)
    cells += "".join("       –" if x is None else f"{x:8.1f}" for x in lengths)
    print(f"  {name:24}{cells}  {n:>11}")


def print_kinds(kinds, facts):
    if any(n for _, n in kinds["kinds"].values()):
        print("kind named, and no other")
    shares = kinds["kinds"] | {"all": total(kinds["kinds"].values())}
    shares |= {f"{fact} named": counts for fact, counts in facts.items()}
    for name, (right, n) in shares.items():
        if n:
            print(f"  {name:22}  {right / n:>6.1%}  ({right}/{n})")
    for line in confusion_table(kinds):
        print(f"  {line}")


def confusion_table(kinds):
    """Yields the lines of a confusion table from `kind_scores`: a row for each kind that a clip had or that
    an answer named alone; a column for each of these, numbered like the rows, one for several kinds at once,
    and one for none. No lines if no clip had a kind."""
    counts = {(kind, named): count for kind, named, count in kinds["confusions"]}
    counts |= {(kind, kind): right for kind, (right, _) in kinds["kinds"].items() if right}
    had = [kind for kind, (_, n) in kinds["kinds"].items() if n]
    others = [
        kind for kind in kinds["kinds"] if kind not in had and any(named == kind for _, named in counts)
    ]
    columns = [*had, *others]
    if not columns:
        return
    none = none_named(kinds["kinds"])
    width = max(map(len, [*columns, "kind"])) + 5
    yield "kind".ljust(width) + "".join(f"{i:>5}" for i in range(1, len(columns) + 1)) + " several none"
    for i, kind in enumerate(columns, 1):
        row = {named: count for (true, named), count in counts.items() if true == kind}
        several = sum(count for named, count in row.items() if named not in columns and named != none)
        cells = "".join(f"{row.get(named, '.'):>5}" for named in columns)
        yield f"{i:>3}  {kind}".ljust(width) + f"{cells}{several or '.':>8}{row.get(none, '.'):>5}"
