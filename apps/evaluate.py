"""Score a model on the clips of an index: describe each clip, answer every question about it.

    python -m apps.evaluate --annotations data/toy/test.jsonl --out predictions.jsonl
    python -m apps.evaluate --annotations data/hawk/test.jsonl --out hawk.jsonl --weights weights/hawk-7b --task describe
    torchrun --standalone --nproc_per_node=4 -m apps.evaluate --annotations data/hawk/test.jsonl --out hawk.jsonl
    python -m apps.evaluate --out hawk.jsonl --judge gpt-4o-mini --dry-run    # the paper's GPT scores, see apps/judge.py
    python -m apps.compare hawk.jsonl other.jsonl                             # the same clips, two models: who is better?

Each line of the output is one prediction: video, task (describe or answer), question, answer, reference, source, and for
toy clips the kind. Decoding is greedy, or with --beams a search; never random. What decides the answers (SHA-256 of the
weights and of the index, options) is written to OUT.options.json before the first clip. Start a run that was killed again
and it goes on where it was, to the same file; with other weights or options it refuses. Under torchrun each process takes
every n-th batch into OUT.rank0, OUT.rank1, …, and the first one puts them together in the order of the index.

At the end it prints, and writes to OUT.scores.json: corpus BLEU-1…4 per source in the layout of the paper's Table 1, what
was left out, and for a toy world (a kinds.json beside the index) how often the right kind of event is named, what is
confused, and how often the colour, object and place of the main actor stand in the description.
"""

import glob
import hashlib
import json
import os
import sys
from collections import defaultdict, deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from apps.scores import (
    PAPER,
    TOKENISATION,
    appendable,
    as_line,
    bleu_per_source,
    fact_scores,
    identity,
    kind_scores,
    print_scores,
    read_kinds,
    read_lines,
)
from apps.scores import bleu as bleu  # the name that others import from here
from data import DESCRIBE_QUESTIONS, VideoError, load_batches, read_clip, read_index, usable_device
from hawk import Encoding, read_chain
from sample import (
    PROBLEMS,
    Parser,
    add_model_options,
    complain,
    context_length,
    encode_clips,
    load_from_options,
    note,
    number,
    weights_folder,
)

# ----------------------------------------------------------------------------------------------------------------------
# What is asked


def questions(row, name, args):
    """The predictions that a row of an index asks for, with an empty answer."""
    asked = []
    if args.task != "answer" and row.get("description") and (args.keep_refusals or not refused(row)):
        asked.append(("describe", DESCRIBE_QUESTIONS[0], row["description"]))
    if args.task != "describe":
        asked += [("answer", turn["q"], turn["a"]) for turn in row.get("qa") or [] if turn["a"]]
    extra = {"source": row.get("source") or ""} | ({"kind": row["kind"]} if "kind" in row else {})
    return [{"video": name, "task": t, "question": q, "answer": "", "reference": r} | extra for t, q, r in asked]


def refused(row):
    """Whether the description is a refusal of the language model that should have written it ("As an AI …")."""
    return "refusal" in (row.get("flags") or [])


def load_index(args):
    """-> rows of the index that ask something (absolute paths in "video"), the predictions they ask for with videos named
    as the index does, and how many were left out."""
    folder = os.path.dirname(os.path.abspath(args.annotations)) + os.sep
    rows = read_index(args.annotations)[: args.limit]
    asked = [questions(row, row["video"].removeprefix(folder), args) for row in rows]
    counts = {"clips": len(rows), "skipped": sum(not predictions for predictions in asked)}
    left_out = args.task != "answer" and not args.keep_refusals
    counts["refused"] = sum(refused(row) and bool(row.get("description")) for row in rows) if left_out else 0
    if counts["skipped"] == len(rows):
        raise ValueError(f"{args.annotations}: holds nothing for --task {args.task}")
    kept = [i for i, predictions in enumerate(asked) if predictions]
    return [rows[i] for i in kept], [asked[i] for i in kept], counts


# ----------------------------------------------------------------------------------------------------------------------
# Files that survive a kill


def write_json(path, thing):
    new = Path(f"{path}.tmp")
    new.write_text(json.dumps(thing, indent=1) + "\n")
    new.replace(path)


def sha256(*files):
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def decisive_options(args):
    """Everything that decides the answers, and (the two paths) for the reader where it came from."""
    folder = weights_folder(args)
    folders = read_chain(folder)[1]  # weights may build on others; all of them count
    files = [file for f in folders for file in sorted(f.glob("model*.safetensors")) or [f / "config.json"]]
    device = usable_device(args.device).type
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    names = ("task", "limit", "keep_refusals", "batch_size", "max_new_tokens", "beams", "repetition_penalty")
    return {
        "weights": str(folder.resolve()), "weights_sha256": sha256(*files, folder / "tokenizer.model"),
        "config": vars(read_chain(folder)[0]), "annotations": os.path.abspath(args.annotations),
        "annotations_sha256": sha256(args.annotations), "device": device, "dtype": dtype, "temperature": 0.0,
    } | {k: True for k in ("int8", "compile") if getattr(args, k)} | {name: getattr(args, name) for name in names}  # fmt: skip


def record_options(args):
    """Writes OUT.options.json; if the output is begun, a ValueError that says which options differ from it."""
    path, new = Path(f"{args.out}.options.json"), json.loads(json.dumps(decisive_options(args)))
    begun = read_lines(args.out) or parts(args.out)
    if not begun and not path.exists() and os.path.exists(args.out) and os.path.getsize(args.out):
        raise ValueError(f"{args.out}: is there, and not written by this program; give another --out")
    if begun and not path.exists():
        note(f"note: {args.out} has no {path.name}; its answers are taken to come from these weights and options")
    if begun and path.exists():
        try:
            old = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path}: cannot be read; give another --out") from None
        names = (old | new).keys() - {"weights", "annotations"}
        pairs = ((name, old.get(name), new.get(name)) for name in sorted(names))
        differ = [
            name if name == "config" else f"{name} was {str(a)[:12]}, is {str(b)[:12]}"
            for name, a, b in pairs
            if a != b
        ]
        if differ:
            raise ValueError(
                f"{args.out} was begun otherwise ({'; '.join(differ)}); give another --out, or the same options"
            )
    write_json(path, new)
    return new


def parts(out):
    """The files of single processes, OUT.rank0, OUT.rank1, … Their lines: {"clip": number, "predictions": [...]}."""
    return sorted(glob.glob(f"{glob.escape(str(out))}.rank[0-9]*"))


def read_done(out, asked):
    """For each clip its predictions so far, None for one that is missing."""
    done, places = [[None] * len(predictions) for predictions in asked], defaultdict(deque)
    for i, predictions in enumerate(asked):
        for j, p in enumerate(predictions):
            places[identity(p)].append((i, j))  # several, if an index asks the same twice
    for p in read_lines(out):
        if not places[identity(p)]:
            raise ValueError(f"{out}: holds a prediction about {p['video']} that the index does not ask for")
        i, j = places[identity(p)].popleft()
        done[i][j] = p
    for line in (line for part in parts(out) for line in read_lines(part, lambda line: done[line["clip"]])):
        pairs = zip(done[line["clip"]], line["predictions"], strict=True)
        done[line["clip"]] = [have or made for have, made in pairs]
    return done


def merge(out, asked):
    """Puts everything done into `out`, in the order of the index, and returns it."""
    done = [p for predictions in read_done(out, asked) for p in predictions if p]
    content = b"".join(map(as_line, done))
    if not os.path.exists(out) or Path(out).read_bytes() != content:
        Path(f"{out}.tmp").write_bytes(content)
        os.replace(f"{out}.tmp", out)
    for part in parts(out):
        os.remove(part)
    return done


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


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


def answer_batch(model, tokenizer, clips, asked, args):
    """Fills in "answer" of the predictions asked[i] about each clip i, --batch-size prompts at a time."""
    encoding = encode_clips(model, clips)
    jobs = [(i, prediction) for i, predictions in enumerate(asked) for prediction in predictions]
    search = {"beams": args.beams, "repetition_penalty": args.repetition_penalty, "eos_id": tokenizer.eos}
    for start in range(0, len(jobs), args.batch_size):
        of, predictions = zip(*jobs[start : start + args.batch_size], strict=True)
        ids = [
            tokenizer.encode_prompt(prediction["question"], clips[i].message, model.config.n_visual)
            for i, prediction in zip(of, predictions, strict=True)
        ]
        if max(map(len, ids)) >= context_length(model.config):
            tqdm.write(f"note: a prompt of {max(map(len, ids))} tokens; these weights take {context_length(model.config)}",
                       file=sys.stderr)  # fmt: skip
        rows = Encoding(*(x[list(of)] for x in vars(encoding).values()))
        made = model.generate(None, None, ids, args.max_new_tokens, encoding=rows, **search)
        for prediction, new in zip(predictions, made, strict=True):
            prediction["answer"] = tokenizer.decode(new)


def predict(rows, asked, args, rank=0, world=1):
    """Adds to the output what it lacks. Returns [(row, video)] of those that cannot be read.

    Batches are the same whatever is done already and however many processes share them, and are answered whole, so that
    every run computes what an undisturbed one does, to the last bit (on the CPU: with the same number of threads).
    """
    done = read_done(args.out, asked)
    batches = [range(i, min(i + args.batch_size, len(rows))) for i in range(0, len(rows), args.batch_size)][rank::world]
    todo = [batch for batch in batches if any(None in done[i] for i in batch)]
    if not todo:
        return []
    model, tokenizer = load_from_options(args)
    bad, clips = [], Clips([row["video"] for row in rows], model.config)
    loader = load_batches(clips, todo, args.workers, collate_fn=list)
    total = sum(map(len, batches))
    bar = tqdm(total=total, initial=total - sum(map(len, todo)), unit="clip", file=sys.stderr, disable=rank > 0)
    with appendable(args.out if world == 1 else f"{args.out}.rank{rank}") as file, bar:
        for batch, read in zip(todo, loader, strict=True):
            good = [(i, clip) for i, clip in zip(batch, read, strict=True) if not isinstance(clip, str)]
            for i, reason in zip(batch, read, strict=True):
                if isinstance(reason, str):
                    tqdm.write(f"error: {reason}", file=sys.stderr)
                    bad.append((i, asked[i][0]["video"]))
            if any(None in done[i] for i, _ in good):  # else only what cannot be read was missing
                answer_batch(model, tokenizer, [clip for _, clip in good], [asked[i] for i, _ in good], args)
            for i in (i for i, _ in good if None in done[i]):
                if world > 1:
                    file.write(as_line({"clip": i, "predictions": asked[i]}))
                else:
                    file.writelines(as_line(p) for p, have in zip(asked[i], done[i], strict=True) if not have)
            file.flush()
            bar.update(len(batch))
    return bad


def start_processes(args):
    """(rank, processes): torchrun sets RANK; without it this is one process. Only short messages go between them."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the first to finish waits for the last
    if args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return dist.get_rank(), dist.get_world_size()


def predict_index(args):
    """All that --annotations asks for: (predictions, scores so far), or None on all processes but the first."""
    rank, world = start_processes(args)
    message = [None]
    if rank == 0:  # the first process checks and prepares; an error of its is everyone's end
        try:
            rows, asked, counts = load_index(args)
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            options, path = record_options(args), Path(args.annotations).parent / "kinds.json"
            kinds = read_kinds(path) if path.exists() else None
        except PROBLEMS as error:
            message = [error]
    if world > 1:
        dist.broadcast_object_list(message)
    if message[0]:
        raise message[0] if rank == 0 else SystemExit(2)
    if rank:
        rows, asked, counts = load_index(args)
    bad = [predict(rows, asked, args, rank, world)]
    if world > 1:
        bad, mine = [None] * world, bad[0]
        try:
            dist.all_gather_object(bad, mine)  # also waits for all
        except RuntimeError as error:
            raise ValueError("another process has ended early; what is done is kept: start them again") from error
        dist.destroy_process_group()
    if rank:
        return None
    predictions = merge(args.out, asked)
    unreadable = [name for _, name in sorted(pair for pairs in bad for pair in pairs)]
    scores = {"counts": counts, "unreadable": unreadable, "options": options}
    if kinds:
        names = [predictions_[0]["video"] for predictions_ in asked]
        scores["kinds"] = kind_scores(predictions, kinds)
        scores["facts"] = fact_scores(predictions, rows, names)
    return predictions, scores


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--annotations", metavar="INDEX", help="index file (JSON lines); without it, score what --out holds")
    p.add_argument("--out", required=True, metavar="FILE", help="predictions; gone on with if it is there")
    p.add_argument("--task", choices=["describe", "answer", "both"], default="both")
    p.add_argument("--limit", type=number(int, 1), help="only the first clips of the index")
    p.add_argument(
        "--keep-refusals", action="store_true", help='also describe clips flagged "refusal" (default: count)'
    )
    p.add_argument("--batch-size", type=number(int, 1), default=16, help="clips, and prompts, at a time (default: 16)")
    p.add_argument("--workers", type=number(int, 0), default=2, help="processes that read videos (default: 2)")
    add_model_options(p)
    g = p.add_argument_group("decoding")
    g.add_argument("--max-new-tokens", type=number(int, 1, 4096), default=128, help="longest answer (default: 128)")
    g.add_argument(
        "--beams", type=number(int, 1, 64), default=1, help="continuations followed side by side (default: 1)"
    )
    g.add_argument("--repetition-penalty", type=number(float, 0.01), default=1.0, help="above 1: fewer repeated words")
    g = p.add_argument_group("judge", "The paper's GPT-guided scores from any OpenAI-compatible endpoint; every reply is "
                             "kept in OUT.judge.jsonl, and none is paid for twice. The key is read from OPENAI_API_KEY.")  # fmt: skip
    g.add_argument("--judge", metavar="MODEL", help="the endpoint's name of the model that marks the answers")
    g.add_argument("--judge-url", metavar="URL", help="default: OPENAI_BASE_URL, else https://api.openai.com/v1")
    g.add_argument(
        "--judge-rate", type=number(float, 0.01), default=60.0, metavar="N", help="requests a minute (default: 60)"
    )
    g.add_argument(
        "--dry-run", action="store_true", help="send nothing, predict nothing: how many requests would it be?"
    )
    args = p.parse_args(argv)
    if not args.annotations and not os.path.exists(args.out):
        p.error("--annotations is missing, and --out is not there to be scored")
    if args.dry_run and not args.judge:
        p.error("--dry-run goes with --judge MODEL")
    return args


def dry_run(args):
    """Prints the cost of --judge; an answer that is still to be made is taken to be as long as its reference."""
    from apps.judge import cost

    predictions = read_lines(args.out)
    if args.annotations:
        asked = load_index(args)[1]
        pairs = zip(asked, read_done(args.out, asked), strict=True)
        both = [pair for p, done in pairs for pair in zip(p, done, strict=True)]
        predictions = [done or p | {"answer": p["reference"]} for p, done in both]
    print(cost(predictions, args.judge, f"{args.out}.judge.jsonl", args.judge_rate))


def score(args):
    if not args.annotations and int(os.environ.get("RANK", 0)):
        return  # nothing to share
    if args.dry_run:
        return dry_run(args)
    out = Path(f"{args.out}.scores.json")
    if args.annotations:
        found = predict_index(args)
        if found is None:
            return
        predictions, scores = found
    else:
        predictions = read_lines(args.out)
        scores = json.loads(out.read_text()) if out.exists() else {}
    if not predictions:
        raise ValueError(f"{args.out}: no predictions to score")
    scores |= {"bleu": bleu_per_source(predictions), "tokenisation": TOKENISATION, "paper": PAPER}
    write_json(out, scores)  # before the judge, who may take hours
    if args.judge:
        from apps.judge import judge

        scores["judge"] = judge(predictions, args.judge, f"{args.out}.judge.jsonl", args.judge_url, args.judge_rate)
        write_json(out, scores)
    print_scores(scores)
    note(f"written: {args.out}, {out}")


def main(argv=None):
    try:
        score(parse_args(argv))
    except PROBLEMS as error:
        complain(error)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
