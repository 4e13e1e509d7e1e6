"""How abnormal is a clip? Shared by apps/timeline.py and apps/evaluate.py; it is not a program.

In this order: rows of an index that say what is normal, the model's score of a clip, from scores to numbers.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from apps.scores import per_source
from data import DESCRIBE_QUESTIONS, check_row
from hawk import Encoding, KVCache, require
from sample import TINY, encode_clips

NO_PHRASES = (
    "no kinds.json beside the index or the weights, and no --kinds FILE: the model is asked yes or no"
)
TOY_KINDS = Path(__file__).parent.parent / "examples" / "kinds.json"
YES_QUESTION = "Does anything unusual or dangerous happen in this video? Answer yes or no."
SUBJECT_WORDS = 5  # a phrase is tried after each of so many first words: "A red car" is three
PHRASES_PER_BATCH = 16
THRESHOLD = 0.5  # a clip with this score or more is called abnormal
METRICS = {"auc": "ROC AUC", "ap": "av. prec.", "accuracy": "accuracy", "f1": "F1"}
LABELS = {0: 0, 1: 1, "normal": 0, "abnormal": 1}

# ---- Rows that say what is normal --------------------------------------------------------------------------


def read_rows(path, parse):
    """An index -> what `parse` makes of each row. (data.read_index would require a description in each.)

    Raises a ValueError that names the line, also if `parse` raises one."""
    rows = []
    with open(path, "rb") as file:  # as bytes, so that only a line feed ends a line, not U+2028 in a text
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                blank = not str(row.get("description") or "").strip()
                check_row(row | ({"description": "-"} if blank else {}))
                rows.append(parse(row))
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_intervals(abnormal):
    """The field "abnormal" of a row: [start, end] in seconds, a list of such, or [] for a normal video ->
    [(start, end), …]. Raises ValueError."""
    if isinstance(abnormal, list) and abnormal and not isinstance(abnormal[0], list):
        abnormal = [abnormal]
    if not isinstance(abnormal, list) or not all(map(is_interval, abnormal)):
        raise ValueError('needs "abnormal": [start, end] in seconds, a list of such, or [] (a normal video)')
    return [(start, end) for start, end in abnormal]


def is_interval(pair):
    two = isinstance(pair, list) and len(pair) == 2 and all(type(value) in (int, float) for value in pair)
    return two and 0 <= pair[0] < pair[1] < 1e9


def is_normal(kind):
    """Whether a kind is "normal", however people write it: "Normal", "normal "."""
    return kind.strip().lower() == "normal"


def label_of(row):
    """Whether a row says that its video is abnormal: 0 or 1, by "label", "abnormal", or "kind", which is
    "normal" or another; an empty kind says nothing. Raises ValueError if it has none of them, or if they
    contradict each other."""
    said = set()
    if row.get("label") is not None:
        label = row["label"]
        if isinstance(label, list | dict) or label not in LABELS:
            raise ValueError('"label" must be 0 or "normal", 1 or "abnormal"')
        said.add(LABELS[label])
    if row.get("abnormal") is not None:
        said.add(int(bool(read_intervals(row["abnormal"]))))
    if kind := (row.get("kind") or "").strip():
        said.add(int(not is_normal(kind)))
    if not said:
        ways = '"label": 0 or 1, "abnormal": intervals or [], or "kind": "normal" or another'
        raise ValueError(f"does not say whether the video is normal; give {ways}")
    if len(said) == 2:
        raise ValueError("says both that the video is normal and that it is not")
    return said.pop()


def read_labels(path):
    """An index -> its rows, with absolute paths in "video" and 0 or 1 in "label". Rows about the same video
    count as one. Raises a ValueError that names a row without a label, or one that contradicts another."""
    found = {}
    folder = os.path.dirname(os.path.abspath(path))
    for row in read_rows(path, lambda row: row | {"label": label_of(row)}):
        video = os.path.join(folder, row["video"])
        before = found.setdefault(os.path.realpath(video), row | {"video": video})
        if before["label"] != row["label"]:
            raise ValueError(f"{path}: one row says that {row['video']} is normal, another that it is not")
    return list(found.values())


# ---- The model's score of a clip ---------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model, encoding, prompt, answers, starts):
    """log P(answers[j][starts[j]:] | clip, prompt, answers[j][:starts[j]]) -> (J,). Prompt and answers are
    lists of ids; the prompt is read once for all answers."""
    x = model.embed(torch.tensor([prompt], device=model.device), encoding.tokens)  # (1, S, D)
    cache = KVCache(model.config, 1, len(prompt), x)
    last = model.llama(x, cache)[:, -1:]  # (1, 1, D): predicts the first token of every answer
    results = []
    for i in range(0, len(answers), PHRASES_PER_BATCH):
        batch = answers[i : i + PHRASES_PER_BATCH]
        L = max(len(ids) for ids in batch)
        padded = [ids + [0] * (L - len(ids)) for ids in batch]
        target = torch.tensor(padded, device=model.device)  # (J, L)
        counted = torch.zeros(target.shape, device=model.device)
        for j, ids in enumerate(batch):
            counted[j, starts[i + j] : len(ids)] = 1
        # a cache with the prompt in every row, and room for the answers after it
        longer = KVCache(model.config, len(batch), len(prompt) + L, x)
        for kv, of_prompt in zip(longer.layers, cache.layers, strict=True):
            kv[..., : len(prompt), :] = of_prompt
        longer.length.fill_(len(prompt))
        hidden = model.llama(model.llama.embed_tokens(target), longer)[:, :-1]
        hidden = torch.cat([last.expand(len(batch), -1, -1), hidden], dim=1)  # (J, L, D): predicts each token
        log_p = model.llama.lm_head(hidden).float().log_softmax(-1)  # (J, L, vocabulary)
        log_p = log_p.gather(-1, target[..., None])[..., 0]  # (J, L)
        results.append((log_p * counted).sum(1))
    return torch.cat(results)


def describe(model, tokenizer, clip, encoding, max_new_tokens=300):
    """-> (the prompt that asks for a description, up to max_new_tokens of the answer)"""
    prompt = tokenizer.encode_prompt(DESCRIBE_QUESTIONS[0], clip.message, model.config.n_visual)
    room = min(max_new_tokens, model.config.context_length - len(prompt))
    require(room > 0, f"a prompt of {len(prompt)} tokens; these weights take {model.config.context_length}")
    (new,) = model.generate(encoding, [prompt], room, eos_id=tokenizer.eos)
    return prompt, tokenizer.decode(new)


def contrast_score(model, tokenizer, clip, encoding, phrases):
    """How likely it is that an answer that begins like the model's own continues with one of the phrases.

    The phrases exclude each other, so their probabilities add up. Which word they fit after is not known, so
    they are tried after each of the first words, and the highest sum counts."""
    prompt, said = describe(model, tokenizer, clip, encoding, 2 * SUBJECT_WORDS)
    words = said.split()[:SUBJECT_WORDS]
    answers = []
    starts = []
    for n in range(len(words) + 1):
        beginning = tokenizer.sp.encode(" ".join(words[:n]))
        for phrase in phrases:
            ids = tokenizer.sp.encode(" ".join([*words[:n], phrase]))
            answers.append(ids)
            starts.append(len(os.path.commonprefix([beginning, ids])))
    p = log_likelihoods(model, encoding, prompt, answers, starts).exp()
    return p.view(-1, len(phrases)).sum(1).max().clamp(max=1).item()


def yes_score(model, tokenizer, clip, encoding):
    """P(yes) / (P(yes) + P(no))"""
    prompt = tokenizer.encode_prompt(YES_QUESTION, clip.message, model.config.n_visual)
    answers = [tokenizer.sp.encode(word) for word in ("Yes", "yes", "No", "no")]
    yes, no = log_likelihoods(model, encoding, prompt, answers, [0] * 4).view(2, 2).logsumexp(1)
    return (yes - no).sigmoid().item()


def read_phrases(path):
    """The phrases of the abnormal kinds in a file {kind: phrase}; the kind "normal" is left out."""
    try:
        kinds = json.loads(Path(path).read_bytes())
        phrases = [phrase for kind, phrase in kinds.items() if not is_normal(kind)]
        if not all(map(str.strip, kinds)):
            raise ValueError("a kind has no name")
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise ValueError("no phrases")
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f'{path}: must be JSON like {{"kind": "phrase", ...}} ({error})') from None
    return phrases


def add_score_options(add, name):
    """Adds the options that choose a score. add: an argparse method; name: of the first option."""
    told = "default: choice if there are sentences (apps.index), contrast if there are phrases, else yes"
    add(name, choices=["choice", "contrast", "yes"], help=told)
    told = "phrases for contrast; default: kinds.json beside the index or the weights, and for weights/tiny "
    told += "examples/kinds.json"
    add("--kinds", metavar="FILE", help=told)


def find_kinds(args):
    """The file of phrases: --kinds, else kinds.json beside the index, else in the folder of weights, else for
    weights/tiny that of the toy world, else None."""
    folders = [Path(args.annotations).parent] if args.annotations else []
    files = [folder / "kinds.json" for folder in (*folders, Path(args.weights))]
    files += [TOY_KINDS] if Path(args.weights).resolve() == TINY else []
    return args.kinds or next(filter(Path.is_file, files), None)


@torch.no_grad()
def choice_score(model, tokenizer, clip, encoding, sentences):
    """The probability that the description is the sentence of an abnormal kind, if it is one of them at all.
    sentences: {kind: sentence}. (Alone, it is low if the sentence can be split into tokens in many ways.)"""
    prompt = tokenizer.encode_prompt(DESCRIBE_QUESTIONS[0], clip.message, model.config.n_visual)
    answers = [tokenizer.sp.encode(sentence) for sentence in sentences.values()]
    p = log_likelihoods(model, encoding, prompt, answers, [0] * len(answers)).softmax(0)
    return sum(x for kind, x in zip(sentences, p.tolist(), strict=True) if not is_normal(kind))


def read_sentences(kinds):
    """{kind: sentence} of clips.json, which apps.index writes beside kinds.json, or None."""
    file = Path(kinds).with_name("clips.json") if kinds else None
    if not file or not file.exists():
        return None
    try:
        sentences = json.loads(file.read_bytes())["sentences"]
        if not all(sentence.strip() for sentence in sentences.values()):
            raise ValueError("an empty sentence")
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not what apps.index writes ({error})") from None
    return sentences


def choose_score(how, kinds):
    """The function (model, tokenizer, clip, encoding) -> score from 0 to 1.

    how: "choice", "contrast", "yes", or None: the first for which there are sentences, phrases, or nothing.
    kinds: the file of phrases, with the sentences beside it. ValueError if what is needed is missing."""
    sentences = read_sentences(kinds) or {}
    if len(set(map(is_normal, sentences))) < 2:  # among abnormal kinds alone, the choice is always abnormal
        sentences = {}
    if how == "choice" and not sentences:
        raise ValueError(
            "choice needs the sentences, of normal and others, that apps.index writes (clips.json)"
        )
    if how == "contrast" and kinds is None:
        raise ValueError(
            "contrast needs phrases: --kinds FILE, or a kinds.json beside the index or the weights"
        )
    if how == "yes" or kinds is None:
        return yes_score
    if how != "contrast" and sentences:
        return partial(choice_score, sentences=sentences)
    return partial(contrast_score, phrases=read_phrases(kinds))


def phrases_of(score):
    """The phrases or sentences that decide a score, None for `yes_score`: to be recorded with it."""
    return next(iter(score.keywords.values())) if isinstance(score, partial) else None


def score_clips(model, tokenizer, clips, asked, score):
    """Fills in "score", and "yes" or "no" as "answer", of the predictions asked[i] about each clip i."""
    encoding = encode_clips(model, clips)
    for i, (clip, predictions) in enumerate(zip(clips, asked, strict=True)):
        value = score(model, tokenizer, clip, Encoding(encoding.tokens[i : i + 1], {}))
        for prediction in predictions:
            prediction["score"] = value
            prediction["answer"] = "yes" if value >= THRESHOLD else "no"


# ---- From scores to numbers --------------------------------------------------------------------------------


def measure(scores, abnormal, weights=None):
    """ROC AUC, average precision, accuracy and F1 at THRESHOLD -> (…, 4), in the order of METRICS.

    scores: (N,); abnormal: (N,) bool; weights: (…, N), how often each of the N counts (default: once). Like
    scikit-learn's, except for NaN where a metric is undefined: the first two if there are no normal or no
    abnormal ones, F1 if none is abnormal and none is called so."""
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(scores)
    first = np.flatnonzero(np.diff(scores[order], prepend=-math.inf))  # the first with each score
    # how many have each of the U distinct scores, in ascending order: (…, U)
    positive = np.add.reduceat((weights * abnormal)[..., order], first, axis=-1)
    negative = np.add.reduceat((weights * ~abnormal)[..., order], first, axis=-1)
    P = positive.sum(-1)
    N = negative.sum(-1)
    below = negative.cumsum(-1) - negative
    hits = P[..., None] - positive.cumsum(-1) + positive  # abnormal ones with this score or a higher one
    alarms = N[..., None] - below  # the same of normal ones
    called = scores >= THRESHOLD
    right = (weights * (called == abnormal)).sum(-1)
    found = (weights * (called & abnormal)).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # the share of (abnormal, normal) pairs that are ranked correctly; ties count half
        auc = (positive * (below + negative / 2)).sum(-1) / (P * N)
        precision = np.nan_to_num(hits / (hits + alarms))  # 0 / 0 where the weights are 0
        ap = (positive * precision).sum(-1) / P
        accuracy = right / (P + N)
        f1 = 2 * found / (P + (weights * called).sum(-1))
    return np.stack([auc, np.where(N > 0, ap, np.nan), accuracy, f1], axis=-1)


def numbers(scores, abnormal):
    """{name in METRICS: value, or None where it is undefined}, see `measure`."""
    values = measure(np.asarray(scores, float), np.asarray(abnormal, bool)).tolist()
    return {name: None if math.isnan(x) else x for name, x in zip(METRICS, values, strict=True)}


def detection_per_source(predictions):
    """{source or "all": {"n": videos, "abnormal": how many of them are, and each of METRICS or None}}"""
    table = {}
    for task, source, chosen in per_source(predictions):
        if task == "detect":
            labels = [predictions[i]["label"] for i in chosen]
            about = {"n": len(chosen), "abnormal": sum(labels)}
            table[source] = about | numbers([predictions[i]["score"] for i in chosen], labels)
    return table


def print_detection(table):
    print(f"{'detect':26}" + "".join(f"{name:>10}" for name in METRICS.values()) + "  abnormal of videos")
    for source, line in table.items():
        cells = ["–" if line[name] is None else f"{line[name]:.3f}" for name in METRICS]
        counts = f"{line['abnormal']} of {line['n']}"
        print(f"  {source or '(no source)':24}" + "".join(f"{cell:>10}" for cell in cells) + f"{counts:>20}")
    print(f"accuracy and F1: a video is called abnormal from a score of {THRESHOLD:g} on")
