"""Score a model on the clips of an index: describe each clip, answer every question about it.

    python -m apps.evaluate --annotations data/toy/test.jsonl --out predictions.jsonl
    python -m apps.evaluate --annotations data/hawk/test.jsonl --out hawk.jsonl --task describe
    torchrun --standalone --nproc_per_node=4 -m apps.evaluate --annotations INDEX --out hawk.jsonl
    python -m apps.evaluate --annotations INDEX --out out.jsonl --task detect    # normal or abnormal?
    python -m apps.evaluate --out hawk.jsonl --judge gpt-4o-mini --dry-run   # GPT scores, see apps/judge.py
    python -m apps.compare hawk.jsonl other.jsonl                            # which of two models is better?

Each line of the output is one prediction: video, task (describe, answer or detect), question, answer,
reference, source, the kind if the row has one, and the answer's tokens. Decoding is greedy, or a search with
--beams; never random. What determines the answers (SHA-256 of weights and index, options) is written to
OUT.options.json before the first clip. A killed run resumes when started again with the same --out; it
refuses other weights or options. Under torchrun each process takes every n-th batch into OUT.rank0,
OUT.rank1, …, and the first process merges them in the order of the index.

With --task detect the model says how likely it is that the video is abnormal, by P(yes) against P(no) or as
apps/timeline.py does (--detect contrast). The line then has a score and a label, 1 for abnormal, which each
row of the index must say: "label": 0 or 1, "abnormal": [] or intervals, or "kind": "normal" or another.

At the end it prints, and writes to OUT.scores.json: corpus BLEU-1…4 per source in the layout of the paper's
Table 1, ROUGE-L and the length of the answers; for detect ROC AUC, average precision, accuracy and F1; what
was left out; and, if the rows have a kind (phrases from a kinds.json beside the index or the weights, else
the toy world's), how often the right one is named and which are confused. For a toy world also how often the
colour, object and place of the main actor are in the description.

In this file: the questions, the files that survive a kill, the predictions, the command line.
"""

import glob
import hashlib
import json
import os
import sys
from collections import defaultdict, deque
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apps import named_death, run_program
from apps.detect import (
    NO_PHRASES,
    THRESHOLD,
    YES_QUESTION,
    add_score_options,
    choose_score,
    detection_per_source,
    find_kinds,
    phrases_of,
    print_detection,
    read_labels,
    score_clips,
)
from apps.judge import Prompts, cost, judge
from apps.scores import (
    PAPER,
    ROUGE_TOKENISATION,
    TOKENISATION,
    appendable,
    as_line,
    bleu_per_source,
    fact_scores,
    identity,
    kind_scores,
    lengths_per_source,
    locked,
    print_scores,
    read_kinds,
    read_lines,
    rouge_per_source,
)
from apps.scores import bleu as bleu  # others import it from here
from data import (
    DESCRIBE_QUESTIONS,
    VideoError,
    clip_options,
    read_clip,
    read_index,
    replace_file,
    usable_device,
)
from hawk import Encoding, read_chain
from sample import (
    PROBLEMS,
    add_model_options,
    encode_clips,
    generate,
    load,
    make_parser,
    note,
    number,
    print_error,
)

MEETING = timedelta(minutes=10)  # for all processes to start; those of a killed torchrun end after it

# ------------------------------------------------------------------------------------------------------------
# What is asked


def refused(row):
    """Whether the description is a refusal of the language model that should have written it ("As an AI
    …")."""
    return "refusal" in (row.get("flags") or [])


def questions(row, name, args):
    """The predictions that a row of an index asks for, with empty answers. name: what to call the video."""
    asked = []
    if args.task == "detect":
        asked.append(("detect", YES_QUESTION, "yes" if row["label"] else "no"))
    describes = args.task in ("describe", "both") and row.get("description")
    if describes and (args.keep_refusals or not refused(row)):
        asked.append(("describe", DESCRIBE_QUESTIONS[0], row["description"]))
    if args.task in ("answer", "both"):
        asked += [("answer", turn["q"], turn["a"]) for turn in row.get("qa") or [] if turn["a"].strip()]
    predictions = []
    for task, question, reference in asked:
        prediction = {"video": name, "task": task, "question": question, "answer": "", "reference": reference}
        prediction["source"] = row.get("source") or ""
        if "kind" in row:
            prediction["kind"] = row["kind"]
        if task == "detect":
            prediction |= {"score": None, "label": row["label"]}
        predictions.append(prediction)
    return predictions


def load_index(args):
    """-> rows that ask something (absolute paths in "video"), for each row the predictions it asks for
    (videos named as in the index), and counts of what was left out."""
    folder = os.path.dirname(os.path.abspath(args.annotations)) + os.sep
    rows = []
    asked = []
    counts = {"clips": 0, "skipped": 0, "refused": 0}
    read = read_labels if args.task == "detect" else read_index
    for row in read(args.annotations)[: args.limit]:
        counts["clips"] += 1
        predictions = questions(row, row["video"].removeprefix(folder), args)
        describes = args.task in ("describe", "both") and row.get("description")
        if describes and refused(row) and not args.keep_refusals:
            counts["refused"] += 1
        if predictions:
            rows.append(row)
            asked.append(predictions)
        else:
            counts["skipped"] += 1
    if not rows:
        raise ValueError(f"{args.annotations}: holds nothing for --task {args.task}")
    return rows, asked, counts


# ------------------------------------------------------------------------------------------------------------
# Files that survive a kill


def write_json(path, value):
    replace_file(path, json.dumps(value, indent=1) + "\n")


def sha256(*files):
    """One digest for the contents of several files."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def weights_options(args):
    """What determines a model's answers, whatever the questions: the weights and the arithmetic."""
    config, folders = read_chain(args.weights)
    files = []
    for source in folders:  # weights may build on others; all of them count
        files += sorted(source.glob("model*.safetensors")) or [source / "config.json"]
    device = usable_device(args.device).type
    options = {
        "weights": str(args.weights.resolve()),
        "weights_sha256": sha256(*files, args.weights / "tokenizer.model"),
        "config": asdict(config),
        "device": device,
        "dtype": args.dtype or ("bfloat16" if device == "cuda" else "float32"),
    }
    for name in ("int8", "compile"):
        if getattr(args, name):
            options[name] = True
    return json.loads(json.dumps(options))  # as it will be when read back


def decisive_options(args):
    """Everything that determines the answers and, for the reader, the two paths that they came from."""
    options = weights_options(args) | {
        "annotations": os.path.abspath(args.annotations),
        "annotations_sha256": sha256(args.annotations),
        "temperature": 0.0,
    }
    names = ["task", "limit", "keep_refusals", "batch_size", "max_new_tokens", "beams", "repetition_penalty"]
    if args.task == "detect":
        names = ["task", "limit", "batch_size"]
        options["phrases"] = phrases_of(choose_score(args.detect, find_kinds(args)))
    return options | {name: getattr(args, name) for name in names}


def differences(old, new):
    """What differs between two records of decisive options, in words; the two paths do not count."""
    found = []
    for name in sorted((old | new).keys() - {"weights", "annotations"}):
        before = old.get(name)
        now = new.get(name)
        if before != now:
            values = "" if name == "config" else f" was {str(before)[:12]}, is {str(now)[:12]}"
            found.append(name + values)
    return found


def options_file(out):
    return Path(f"{out}.options.json")


def differences_from_record(out, options):
    """What differs between OUT.options.json, if there is one, and these options, in words."""
    path = options_file(out)
    try:
        return differences(dict(json.loads(path.read_bytes())), options) if path.exists() else []
    except (ValueError, TypeError):
        raise ValueError(f"{path}: cannot be read; give another --out") from None


def is_begun(out):
    """Whether a run has begun to answer. From then on no other options are recorded."""
    found = parts(out)  # first: a run that merges its parts writes `out` before it removes them
    return bool(read_lines(out) or found)


def record_options(args):
    """Writes OUT.options.json and returns its content. ValueError if the output was begun with other
    options."""
    options = decisive_options(args)
    settled = options_file(args.out).exists() and is_begun(args.out)
    # Until then locked, so that no other run begins between the check and the writing
    with nullcontext() if settled else locked(args.out):
        check_begun(args.out, options)
        write_json(options_file(args.out), options)
    return options


def check_begun(out, options):
    """ValueError if the output was begun with other options, or by another program."""
    path = options_file(out)
    begun = is_begun(out)
    if not begun and not path.exists() and os.path.exists(out) and os.path.getsize(out):
        raise ValueError(f"{out}: exists, and was not written by this program; give another --out")
    if begun and not path.exists():
        note(f"note: {out} has no {path.name}; its answers are taken to come from these weights and options")
    if begun and (found := differences_from_record(out, options)):
        message = f"{out} was begun with other options ({'; '.join(found)})"
        raise ValueError(f"{message}; give another --out, or the same options")


def check_still_ours(out, options):
    """ValueError if another run with other options has begun the output since this one recorded its own."""
    if found := differences_from_record(out, options):
        raise ValueError(f"another run has begun {out} ({'; '.join(found)}); give another --out")


def parts(out):
    """The files of single processes, OUT.rank0, OUT.rank1, … Their lines: {"clip": number, "predictions":
    [...]}."""
    return sorted(glob.glob(f"{glob.escape(str(out))}.rank[0-9]*"))


def row_identity(prediction):
    """What makes two predictions answers to the same question of the same row, or of a copy of it."""
    return *identity(prediction), prediction.get("source"), prediction.get("kind")


def read_done(out, asked):
    """For each clip the list of its predictions so far, with None for each one that is missing."""
    done = [[None] * len(predictions) for predictions in asked]
    places = defaultdict(deque)  # where a prediction belongs; several places if an index asks the same twice
    for i, predictions in enumerate(asked):
        for j, prediction in enumerate(predictions):
            places[row_identity(prediction)].append((i, j))
    for prediction in read_lines(out):
        if not places[row_identity(prediction)]:
            message = f"{out}: holds a prediction about {prediction['video']} that the index does not ask for"
            raise ValueError(message)
        i, j = places[row_identity(prediction)].popleft()
        done[i][j] = prediction
    for part in parts(out):
        for line in read_lines(part, lambda line: done[line["clip"]]):
            old = done[line["clip"]]
            done[line["clip"]] = [have or made for have, made in zip(old, line["predictions"], strict=True)]
    return done


def merge(out, asked, options):
    """Writes everything done into `out`, in the order of the index, removes the parts, and returns the
    predictions. ValueError if they come from other options."""
    done = [prediction for predictions in read_done(out, asked) for prediction in predictions if prediction]
    check_still_ours(out, options)
    content = b"".join(map(as_line, done))
    if not os.path.exists(out) or Path(out).read_bytes() != content:
        replace_file(out, content)
    for part in parts(out):
        os.remove(part)
    return done


# ------------------------------------------------------------------------------------------------------------
# Predictions


class Clips(Dataset):
    """Clips of videos, read in loader workers; in place of one that cannot be read, the reason as text."""

    def __init__(self, rows, config):
        self.rows = rows
        self.config = config

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            rate = {"fps": self.rows[i]["fps"]} if "fps" in self.rows[i] else {}
            return read_clip(self.rows[i]["video"], **clip_options(self.config), **rate)
        except VideoError as error:
            return str(error)


def answer_batch(model, tokenizer, clips, asked, args):
    """Fills in "answer" of the predictions asked[i] about each clip i, --batch-size prompts at a time."""
    encoding = encode_clips(model, clips)
    jobs = [(i, prediction) for i, predictions in enumerate(asked) for prediction in predictions]
    for start in range(0, len(jobs), args.batch_size):
        chunk = jobs[start : start + args.batch_size]
        prompts = [
            tokenizer.encode_prompt(prediction["question"], clips[i].message, model.config.n_visual)
            for i, prediction in chunk
        ]
        longest = max(map(len, prompts))
        limit = model.config.context_length
        if longest >= limit:
            tqdm.write(f"note: a prompt of {longest} tokens; these weights take {limit}", file=sys.stderr)
        room = [limit - len(prompt) if len(prompt) < limit else limit for prompt in prompts]
        answers = generate(
            model,
            Encoding(encoding.tokens[[i for i, _ in chunk]], {}),
            prompts,
            args.beams,
            max_new_tokens=min(args.max_new_tokens, max(room)),
            repetition_penalty=args.repetition_penalty,
            eos_id=tokenizer.eos,
        )
        for (_, prediction), ids, most in zip(chunk, answers, room, strict=True):
            ids = ids[:most]  # prompt and answer together fill the context, as in sample.ask
            prediction["answer"] = tokenizer.decode(ids)
            prediction["tokens"] = len(ids) - ids.count(tokenizer.eos)


def predict(rows, asked, args, options, rank=0, world=1):
    """Adds what is missing to the output. Returns [(row, video)] of those that cannot be read. ValueError if
    another run has begun the output with options other than the `options` that this run recorded.

    Batches do not depend on what is done already or on how many processes share them, and they are answered
    as a whole, so every run computes what an uninterrupted one does, to the last bit (on the CPU: with the
    same number of threads).
    """
    done = read_done(args.out, asked)
    starts = range(0, len(rows), args.batch_size)
    batches = [range(start, min(start + args.batch_size, len(rows))) for start in starts][rank::world]
    todo = [batch for batch in batches if any(None in done[i] for i in batch)]
    if not todo:
        check_still_ours(args.out, options)
        return []
    model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
    detects = args.task == "detect"
    score = choose_score(args.detect, find_kinds(args)) if detects else None
    loader = DataLoader(
        Clips(rows, model.config), batch_sampler=todo, num_workers=args.workers, collate_fn=list
    )
    total = sum(map(len, batches))
    left = sum(map(len, todo))
    bar = tqdm(total=total, initial=total - left, unit="clip", file=sys.stderr, disable=rank > 0)
    out = args.out if world == 1 else f"{args.out}.rank{rank}"
    unreadable = []
    with named_death(), appendable(out) as file, bar:
        # check again: another run may have recorded its options, and written, before this one had the lock
        with locked(args.out) if world > 1 else nullcontext():  # which is what record_options locks
            check_still_ours(args.out, options)
        done = read_done(args.out, asked)
        for batch, clips in zip(todo, loader, strict=True):
            readable = []
            for i, clip in zip(batch, clips, strict=True):
                if isinstance(clip, str):
                    tqdm.write(f"error: {clip}", file=sys.stderr)
                    unreadable.append((i, asked[i][0]["video"]))
                else:
                    for remark in clip.notes:
                        tqdm.write(f"note: {rows[i]['video']}: {remark}", file=sys.stderr)
                    readable.append((i, clip))
            if any(None in done[i] for i, _ in readable):  # else only what cannot be read was missing
                read = [clip for _, clip in readable]
                wanted = [asked[i] for i, _ in readable]
                if detects:
                    score_clips(model, tokenizer, read, wanted, score)
                else:
                    answer_batch(model, tokenizer, read, wanted, args)
            for i, _ in readable:
                write_answers(file, i, asked[i], done[i], world)
            file.flush()
            bar.update(len(batch))
    return unreadable


def write_answers(file, i, made, done, world):
    """Appends to `file` those predictions about clip i that are not done yet."""
    if None not in done:
        return
    if world > 1:  # the number lets the first process put it in its place
        file.write(as_line({"clip": i, "predictions": made}))
        return
    for prediction, have in zip(made, done, strict=True):
        if have is None:
            file.write(as_line(prediction))


def start_processes(args):
    """(rank, processes): torchrun sets RANK; without it this is one process. They exchange only short
    messages. Raises ValueError if they cannot connect."""
    if "RANK" not in os.environ:
        return 0, 1
    try:
        dist.init_process_group("gloo", timeout=MEETING)
    except RuntimeError as error:
        raise ValueError(f"the processes did not find each other ({str(error).splitlines()[0]})") from None
    patient_group()
    if args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return dist.get_rank(), dist.get_world_size()


@cache
def patient_group():
    """A group of all processes with a long timeout: the first to finish waits for the last."""
    return dist.new_group(timeout=timedelta(days=7))


def prepare_run(args):
    """What the first process checks and writes before any clip -> (options, kinds or None)."""
    load_index(args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    options = record_options(args)
    path = find_kinds(args)
    if args.task == "detect" and not (args.detect or path):
        note(f"note: {NO_PHRASES}")
    kinds = read_kinds(path) if path and args.task != "detect" else None
    return options, kinds


def first_alone(prepare, rank, world):
    """Calls prepare() in the first process and returns its result in all of them; the others wait. An error
    there ends all of them, and only the first one reports it."""
    message = [None, None]  # result, error
    if rank == 0:
        try:
            message = [prepare(), None]
        except PROBLEMS as error:
            message = [None, error]
    if world > 1:
        dist.broadcast_object_list(message, group=patient_group())
    result, error = message
    if error:
        raise error if rank == 0 else SystemExit(2)
    return result


def gather(numbered, world):
    """The (number, …) pairs of all processes, sorted by number. Waits for all processes."""
    if world == 1:
        return sorted(numbered, key=lambda pair: pair[0])
    gathered = [None] * world
    try:
        dist.all_gather_object(gathered, numbered, group=patient_group())
    except RuntimeError as error:
        message = "another process ended early; what is done is kept: start the same command again"
        raise ValueError(message) from error
    dist.destroy_process_group()
    return sorted((pair for pairs in gathered for pair in pairs), key=lambda pair: pair[0])


def predict_index(args):
    """Everything that --annotations asks for: (predictions, scores so far), or None in all processes but the
    first."""
    rank, world = start_processes(args)
    options, kinds = first_alone(lambda: prepare_run(args), rank, world)
    rows, asked, counts = load_index(args)
    unreadable = gather(predict(rows, asked, args, options, rank, world), world)
    if rank > 0:
        return None
    predictions = merge(args.out, asked, options)
    scores = {"counts": counts, "unreadable": [name for _, name in unreadable], "options": options}
    if kinds:
        names = [predictions_of_row[0]["video"] for predictions_of_row in asked]
        scores["kinds"] = kind_scores(predictions, kinds)
        scores["facts"] = fact_scores(predictions, rows, names)
    return predictions, scores


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("--annotations", metavar="INDEX", help="index file (JSON lines); without it, score what --out holds")
    add("--out", required=True, metavar="FILE", help="predictions; resumed if it exists")
    add(
        "--task",
        choices=["describe", "answer", "both", "detect"],
        default="both",
        help="default: both, describe and answer",
    )
    add("--limit", type=number(int, 1), help="only the first clips of the index")
    add(
        "--keep-refusals",
        action="store_true",
        help='also describe clips flagged "refusal" (default: count them)',
    )
    add("--batch-size", type=number(int, 1), default=16, help="clips, and prompts, at a time (default: 16)")
    add("--workers", type=number(int, 0), default=2, help="loader workers, which read videos (default: 2)")
    add_model_options(p)
    add = p.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=number(int, 1, 4096), default=300, help="longest answer (default: 300)")
    add("--beams", type=number(int, 1, 64), default=1, help="width of a beam search (default: 1)")
    add(
        "--repetition-penalty",
        type=number(float, 0.01),
        default=1.0,
        help="above 1: repeat less (default: 1)",
    )
    add = p.add_argument_group("--task detect").add_argument
    add_score_options(add, "--detect")
    about = (
        "The paper's GPT-guided scores from any OpenAI-compatible endpoint. Every reply is kept in "
        "OUT.judge.jsonl, and none is paid for twice. The key is read from OPENAI_API_KEY."
    )
    add = p.add_argument_group("judge", about).add_argument
    add("--judge", metavar="MODEL", help="the model that marks the answers, as the endpoint calls it")
    add("--judge-prompts", metavar="FILE", help="prompts to replace ours: JSON {criterion: text}")
    add("--judge-url", metavar="URL", help="default: OPENAI_BASE_URL, else https://api.openai.com/v1")
    add(
        "--judge-rate",
        type=number(float, 0.01),
        default=60.0,
        metavar="N",
        help="requests per minute (default: 60)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="send nothing, predict nothing: how many requests would it take?",
    )
    args = p.parse_args(argv)
    if not args.annotations and not os.path.exists(args.out):
        p.error("--annotations is missing, and --out does not exist, so there is nothing to score")
    if args.annotations and os.path.isdir(args.annotations):
        p.error(f"--annotations {args.annotations} is a folder; give an index, such as its test.jsonl")
    if (args.dry_run or args.judge_prompts) and not args.judge:
        p.error("--dry-run and --judge-prompts need --judge MODEL")
    if args.task == "detect" and args.judge:
        p.error("--judge marks texts; --task detect writes none")
    if args.task != "detect" and (args.detect or args.kinds):
        p.error("--detect and --kinds are for --task detect")
    if args.kinds and args.detect == "yes":
        p.error("--kinds is for --detect contrast")
    if args.beams > 1 and (args.compile or args.repetition_penalty != 1):
        p.error("--beams excludes --compile and --repetition-penalty")
    return args


def dry_run(args, prompts):
    """Prints the cost of --judge; a missing answer is assumed to be as long as its reference."""
    predictions = read_lines(args.out)
    if args.annotations:
        asked = load_index(args)[1]
        predictions = []
        for made, done in zip(asked, read_done(args.out, asked), strict=True):
            for prediction, have in zip(made, done, strict=True):
                predictions.append(have or prediction | {"answer": prediction["reference"]})
    texts = [p for p in predictions if p["task"] != "detect"]
    print(cost(texts, args.judge, f"{args.out}.judge.jsonl", args.judge_rate, prompts))


def read_scores(path):
    """What an earlier run wrote into OUT.scores.json, {} if there is none."""
    try:
        scores = dict(json.loads(path.read_bytes())) if path.exists() else {}
        if "kinds" in scores:
            scores["kinds"]["kinds"], scores["facts"]  # which print_scores needs, too
        return scores
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(
            f"{path}: cannot be read; remove it, or give --annotations to make it anew"
        ) from None


def score(args):
    if not args.annotations and int(os.environ.get("RANK", 0)):
        return  # one process is enough to score
    prompts = Prompts(args.judge_prompts)  # a bad file ends the run now, not after hours
    if args.dry_run:
        return dry_run(args, prompts)
    out = Path(f"{args.out}.scores.json")
    if args.annotations:
        found = predict_index(args)
        if found is None:
            return
        predictions, scores = found
    else:
        predictions = read_lines(args.out)
        scores = read_scores(out)
    if not predictions:
        raise ValueError(f"{args.out}: no predictions to score")
    texts = [p for p in predictions if p["task"] != "detect"]
    scores |= {"bleu": bleu_per_source(texts), "tokenisation": TOKENISATION, "paper": PAPER}
    scores |= {"rouge_l": rouge_per_source(texts), "rouge_tokenisation": ROUGE_TOKENISATION}
    scores["lengths"] = lengths_per_source(texts)
    if len(texts) < len(predictions):
        scores |= {"detection": detection_per_source(predictions), "threshold": THRESHOLD}
    write_json(out, scores)  # before the judge, which may take hours
    if args.judge:
        record = f"{args.out}.judge.jsonl"
        scores["judge"] = judge(texts, args.judge, record, args.judge_url, args.judge_rate, prompts)
        write_json(out, scores)
    print_scores(scores)
    if "detection" in scores:
        print_detection(scores["detection"])
    note(f"written: {args.out}, {out}")


def main(argv=None):
    with suppress(AttributeError):  # a notebook's stdout has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # for what a non-UTF-8 terminal cannot show
    try:
        score(parse_args(argv))
    except BrokenPipeError:  # run_program ends it quietly
        raise
    except PROBLEMS as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
