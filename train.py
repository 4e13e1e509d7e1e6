"""Training: one process or many, one file, one loop.

    python train.py --preset tiny --stage 0 --data data/toy --out runs/stage0          # the small towers and the toy language
    python train.py --weights runs/stage0/last --stage 2 --train all --data data/toy --out runs/tiny
    torchrun --standalone --nproc_per_node=4 train.py --weights weights/start --stage 1 --data data/captions --out runs/stage1
    python train.py ... --resume                                                       # goes on where the run stopped

Stage 0 gives the tiny preset what EVA-CLIP, BLIP-2 and LLaMA-2 bring to the real one: eyes (what, which colour and where,
frame by frame) and a language (text alone). Stages 1 and 2 are Hawk's own (paper, Sec. 3.3): captions, then questions.

What is random about a sample is a function of (seed, epoch, sample), what is random in the model (dropout) of (seed,
step, process): so a run does not depend on the number of loader workers, and a resumed run repeats the undisturbed one.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, count, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler
from tqdm import tqdm

from data import (
    COLOURS,
    SLOTS,
    CachedFeatures,
    FrameDataset,
    HawkDataset,
    Tokenizer,
    best_device,
    collate,
    frozen_fingerprint,
    load_batches,
    peak_memory_mb,
    read_index,
    settings,
    usable_device,
)
from hawk import BRANCHES, PAPER, Hawk, HawkConfig, read_chain, recover_folder, replaced_folder


# ---- Options ---------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--preset", choices=["tiny", "7b"], help="start from nothing at this size")
    add("--weights", help="start from this folder of weights")
    add("--stage", type=int, choices=[0, 1, 2], default=2, help="0 towers and text, 1 captions, 2 questions")
    add("--train", choices=["released", "paper", "lora", "all"], help="what learns (default: paper; all with --preset)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a config field, e.g. consistency=debiased")
    add = p.add_argument_group("data").add_argument
    add("--data", required=True, help="folder with train.jsonl and test.jsonl")
    add("--features", help="folder that `prepare.py features` wrote: no video is read, no ViT is run")
    add("--augment", action=argparse.BooleanOptionalAction, default=False, help="random crops, as in the release")
    add("--motion-targets", action="store_true", help="stage 2: a motion caption as the motion branch's target (paper)")
    add("--ask-facts", type=float, default=0.0, metavar="WEIGHT",
        help="toy world: also ask kind, object, colour, place, moment and scene of the soft tokens; weight of that loss")  # fmt: skip
    add("--facts-only", action="store_true", help="ask those and nothing else: no words, many times as fast")
    add("--workers", type=int, default=2, help="loader processes")
    add = p.add_argument_group("recipe (defaults as released; examples/train_tiny.sh: the tiny preset's)").add_argument
    add("--steps", type=int, default=400_000)
    add("--batch-size", type=int, default=4, help="global: over all processes and accumulation steps")
    add("--accumulate", type=int, default=1, help="split a process's share of the batch into this many passes")
    add("--lr", type=float, default=1e-5)
    add("--min-lr", type=float, default=1e-6)
    add("--warmup", type=int, default=1000, help="steps from 1e-6 to --lr")
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0: no clipping, as released")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: float32 on the CPU, else bfloat16 where supported")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the model; meant for GPUs, takes many minutes on a CPU")
    add("--seed", type=int, default=42)
    add("--device", help="default: cuda, else mps, else cpu")
    add = p.add_argument_group("the run's folder").add_argument
    add("--out", required=True)
    add("--save-every", type=int, default=500)
    add("--eval-every", type=int, default=500)
    add("--eval-samples", type=int, default=64, help="held-out clips for the loss; a few of them are answered too")
    add("--resume", action="store_true", help="go on from OUT/last")
    args = p.parse_args(argv)
    if bool(args.preset) == bool(args.weights):
        p.error("say where to start: either --preset tiny|7b or --weights FOLDER")
    if args.facts_only and not args.ask_facts:
        p.error("--facts-only goes with --ask-facts WEIGHT")
    for name, least in dict(steps=1, batch_size=1, accumulate=1, save_every=1, eval_every=1, seed=0).items():
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be {least} or more")
    args.train = args.train or ("all" if args.preset or args.stage == 0 else "paper")
    bridge = args.features or args.augment or args.motion_targets or args.ask_facts or args.train != "all"
    if args.stage == 0 and bridge:  # which it does not train
        p.error("--features, --augment, --motion-targets, --ask-facts and --train are for stages 1 and 2")
    return args


# ---- Stage 0: eyes and a language, each on its own -------------------------------------------------------------------
EYES = "ln_vision|queries|qformer"  # of a branch: what makes a frame's queries of the ViT's features
PLACE_CELLS = (12, 24)  # columns and rows of the picture


class Pretraining(nn.Module):
    """What a frame shows: is a thing of slot k (a type of object) there, where, and in which colour? Query k of the
    Q-Former has to answer, and so has the very patch of the ViT that holds the thing: the patch learns fast, and a
    query can only pass on what a patch knows. One Q-Former learns on the frames of both streams. Beside it LLaMA learns
    the language from text alone. The heads are thrown away afterwards."""

    def __init__(self, hawk):
        super().__init__()
        self.hawk, answers = hawk, 2 + sum(PLACE_CELLS) + len(COLOURS)  # presence, lying, place cells, colours
        self.query_head = nn.Linear(hawk.config.qformer_dim, answers)
        self.query_presence = nn.Parameter(torch.zeros(len(SLOTS), hawk.config.qformer_dim))  # "is my kind here?"
        self.patch_head = nn.Linear(hawk.config.vit_dim, answers)
        self.patch_kind = nn.Linear(hawk.config.vit_dim, len(SLOTS))

    def forward(self, frames, targets, colours, input_ids, labels):
        """frames (clips, n, 3, H, W), targets (clips, n, slots, 4): present, x, y, lying; colours (clips, n, slots) or -100"""
        frames, targets, colours = (x.flatten(0, 1) for x in (frames, targets, colours))  # (N, …)
        eyes, features = self.hawk.appearance, self.hawk.vit(frames)
        queries = eyes.frames(features)[:, : len(SLOTS)]  # (N, slots, C)
        patch = self.patch_of(features, targets)  # (N, slots)
        patches = eyes.ln_vision(features).gather(1, patch[..., None].expand(-1, -1, features.shape[-1]))
        answers = self.query_head(queries).float()
        answers[..., 0] += (queries * self.query_presence).sum(-1)
        losses = answer_losses(answers, targets, colours)
        from_patch = answer_losses(self.patch_head(patches).float(), targets, colours)
        kind_loss = F.cross_entropy(self.patch_kind(patches[patch > 0]).float(), (patch > 0).nonzero()[:, 1])
        losses["patches"] = sum(from_patch.values()) + kind_loss
        losses["pointing"] = self.pointing_loss(features, patch)
        logits = self.hawk.llama.lm_head(self.hawk.llama(self.hawk.llama.embed_tokens(input_ids))[:, :-1]).float()
        losses["language"] = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return losses | {"total": sum(losses.values())}

    def patch_of(self, features, targets):
        """Index (N, slots) of the token of the ViT that holds each thing; the class token, 0, for what is not there."""
        side = math.isqrt(features.shape[1] - 1)
        column, row = (targets[..., 1:3].clamp(0, 0.999) * side).long().unbind(-1)
        return (1 + row * side + column) * (targets[..., 0] > 0)

    def pointing_loss(self, features, patch):
        """-log of the weight that the first cross-attention of query k gives to the patch that holds thing k. Attention
        that has to find its object by itself takes very long to do so."""
        eyes, slots = self.hawk.appearance, patch.shape[1]
        layer, x = eyes.qformer.layers[0], eyes.qformer.norm(eyes.queries)
        q = layer.cross_attention.query(layer.self_attention(x, x))[0, :slots]  # the same for every frame
        k, heads = layer.cross_attention.key(eyes.ln_vision(features)), layer.cross_attention.heads
        q, k = q.unflatten(-1, (heads, -1)).float(), k.unflatten(-1, (heads, -1)).float()
        scores = torch.einsum("shd,nphd->npsh", q, k) / math.sqrt(q.shape[-1])  # (N, 1 + patches, slots, heads)
        return F.cross_entropy(scores, patch[..., None].expand(-1, -1, heads))


class ClipFacts(nn.Module):
    """For small models that learn from nothing: kind, object, colour, place, moment and scene (fields of the toy
    rows) are also asked of the soft tokens directly, each of a share of every branch's tokens. Through LLaMA alone the
    video Q-Formers take long to find out what is worth telling. The heads are thrown away afterwards."""

    FIELDS = ("kind", "object", "colour", "place", "moment", "scene")

    def __init__(self, hawk, train_set, held_out, weight, alone=False):
        super().__init__()
        rows = [row for dataset in (train_set, held_out) for row in dataset.rows]
        if any(row.get(field) is None for row in rows for field in self.FIELDS):
            raise ValueError(f"--ask-facts needs {', '.join(self.FIELDS)} in each row of the index, as toy rows have")
        words = {field: sorted({row[field] for row in train_set.rows}) for field in self.FIELDS}
        for dataset in (train_set, held_out):
            rows = [[w.index(row[f]) if row[f] in w else -100 for f, w in words.items()] for row in dataset.rows]
            dataset.facts = torch.tensor(rows)
        self.hawk, self.weight, self.alone = hawk, weight, alone
        self.heads = nn.ModuleList(nn.Linear(len(BRANCHES) * hawk.config.llama_dim, len(w)) for w in words.values())

    def forward(self, appearance, motion, facts, **texts):
        encoding = self.hawk.encode(appearance, motion)
        losses = {"total": 0.0} if self.alone else self.hawk(None, None, **texts, encoding=encoding)
        shares = encoding.tokens.unflatten(1, (len(BRANCHES), -1)).tensor_split(len(self.FIELDS), dim=2)
        for i, (field, head, share) in enumerate(zip(self.FIELDS, self.heads, shares, strict=True)):
            losses[field] = F.cross_entropy(head(share.mean(2).flatten(1)).float(), facts[:, i])  # (B, branches * D) ->
            losses["total"] = losses["total"] + self.weight * losses[field]
        return losses


def place_cells(xy):
    """Positions (…, 2) in 0 to 1 -> (…, 36): how near each of 12 columns and 24 rows is, 1 where the thing is.

    Asked for x and y themselves a query learns a code in which the average over the frames is the mean position, and
    all movement is lost in it. The average of place cells is a histogram: how far a thing went, and how it swayed."""
    places = zip(xy.split(1, dim=-1), PLACE_CELLS, strict=True)
    distances = [(z - torch.linspace(0, 1, n, device=xy.device)) * (n - 1) for z, n in places]  # in cells
    return torch.exp(-((torch.cat(distances, dim=-1) / 0.7) ** 2))


def answer_losses(answers, targets, colours):
    """Losses of the answers (N, slots, 2 + cells + colours); all but presence only where a thing is present."""
    present = targets[..., 0] > 0
    presence, lying, places, colour = answers.split([1, 1, sum(PLACE_CELLS), len(COLOURS)], -1)
    return {
        "presence": F.binary_cross_entropy_with_logits(presence[..., 0], targets[..., 0]),
        "position": (places - place_cells(targets[..., 1:3]))[present].square().sum(-1).mean(),
        "lying": F.binary_cross_entropy_with_logits(lying[present][:, 0], targets[..., 3][present]),
        "colour": F.cross_entropy(colour.flatten(0, 1), colours.flatten(), ignore_index=-100),
    }


# ---- Leaves: schedule, optimizer, order of the samples, log ----------------------------------------------------------
def learning_rate(step, args):
    """Linear warm-up from 1e-6, then the cosine of the whole run (which the warm-up does not shift, as released)."""
    if step < args.warmup:
        return min(1e-6, args.lr) + (args.lr - min(1e-6, args.lr)) * step / args.warmup
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def make_optimizer(module, args):
    """AdamW with weight decay on tensors of two or more dimensions only."""
    train = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in train if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in train if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999))


class StepBatches:
    """Batch sampler: the samples that this process needs for the steps from `start` on, one list a pass. Sample numbers
    run on over the epochs (epoch = number // n); each epoch is shuffled by (seed, epoch)."""

    def __init__(self, n, args, start, rank, world):
        self.n, self.args, self.start, self.rank, self.world = n, args, start, rank, world

    def shuffled(self, epoch):
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
        return (epoch * self.n + torch.randperm(self.n, generator=generator)).tolist()

    def __iter__(self):
        epoch, done = divmod(self.start * self.args.batch_size, self.n)
        numbers = islice(chain.from_iterable(map(self.shuffled, count(epoch))), done, None)
        for _ in range(self.start, self.args.steps):
            mine = list(islice(numbers, self.args.batch_size))[self.rank :: self.world]
            size = len(mine) // self.args.accumulate
            yield from (mine[j : j + size] for j in range(0, len(mine), size))


class Log:
    """OUT/log.jsonl, one object a step, and the same on TensorBoard if it is installed. Rank 0 only."""

    def __init__(self, out, start):
        self.path, self.out = out / "log.jsonl", out
        kept = [line for line in self.read() if line["step"] <= start]  # a resumed run logs each step once
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)
        except ImportError:
            self.board = None

    def read(self):
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []  # the last one may be cut
        try:
            return [json.loads(line) for line in lines]
        except ValueError as e:
            raise ValueError(f"{self.path}: cannot be read ({e}); move it away") from None

    def write(self, step, values):
        """What is not a finite number becomes null: JSON has no NaN."""
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        values = values | {name: None for name, value in numbers.items() if not math.isfinite(value)}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in numbers.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def plot(self):
        """OUT/curves.png, when matplotlib is installed; TensorBoard keeps up with it."""
        if self.board:
            self.board.flush()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines, figure = self.read(), Figure(figsize=(11, 4), layout="tight")
        axes = figure.subplots(1, 2)
        others = {"lr", "grad_norm", "samples_per_s", "memory_mb", "bias_cosine"}
        for name in sorted({k for line in lines for k, v in line.items() if isinstance(v, float)} - others):
            points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
            axes[0].plot(*zip(*points, strict=True), label=name.replace("_", " "), lw=1.5 if "held" in name else 0.8)
        axes[1].plot([line["step"] for line in lines], [line["lr"] for line in lines])
        axes[0].set(yscale="log", xlabel="step", title="losses")
        axes[1].set(xlabel="step", title="learning rate")
        axes[0].legend(fontsize=8)
        figure.savefig(self.out / "curves.tmp.png", dpi=110)
        (self.out / "curves.tmp.png").replace(self.out / "curves.png")


# ---- Setting up ------------------------------------------------------------------------------------------------------
def start_processes(args):
    """(rank, processes, device): torchrun sets RANK; without it this is one process."""
    name = args.device or best_device()
    if "RANK" not in os.environ:
        return 0, 1, usable_device(name)
    device = usable_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def choose_precision(args, device):
    """(autocast context maker, gradient scaler); resolves --dtype auto: bfloat16 where the GPU has it, else float16;
    float32 on the CPU."""
    if args.dtype == "auto":
        on_gpu = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        args.dtype = on_gpu if device.type == "cuda" else "float32"
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    return lambda: torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"), scaler


def build(args, last):
    """(model, path of its tokenizer, objective module): from OUT/last, --weights, or nothing."""
    torch.manual_seed(args.seed)
    folder = last if args.resume else Path(args.weights) if args.weights else None
    tokenizer = (folder or Path(args.data)) / "tokenizer.model"
    stored = read_chain(folder)[0] if folder else HawkConfig.preset(args.preset)
    if not folder and args.preset == "tiny":  # a small world has few words: the table is as long as its tokenizer says
        stored.vocab_size = Tokenizer(tokenizer).vocab_size
    config = HawkConfig.from_dict(asdict(stored) | settings(args.set), "--set")
    if folder:
        rank, config.lora_rank = config.lora_rank, stored.lora_rank
        if rank != stored.lora_rank and (stored.lora_rank or args.train != "lora"):
            raise ValueError(f"--set lora_rank={rank} goes with --train lora and weights without a LoRA; that of {folder} "
                             f"has rank {stored.lora_rank}")  # fmt: skip
        # under autocast what is frozen stays in the type that it is stored in
        dtype = torch.float32 if args.dtype == "float32" else None
        model = Hawk.from_pretrained(folder, dtype=dtype, config=config)
        config.lora_rank = rank  # set_trainable adds it
    else:
        model = Hawk(config)
    model.set_trainable(args.train)
    learns = rf"vit|appearance\.({EYES})|llama" if args.stage == 0 else rf"{PAPER}|llama" if args.features else ""
    for name, p in model.named_parameters():  # nothing that comes before cached features can learn
        p.requires_grad_(p.requires_grad and re.match(learns, name) is not None)
    return model, tokenizer, model if args.stage else Pretraining(model)


def datasets(args, model, tokenizer):
    """(training set, held-out set, which may be empty)"""
    c, made = model.config, []
    mask = {} if c.motion == "none" else {"motion": c.motion}  # without motion the other half of any cache will do
    expected = {"weights": frozen_fingerprint(model)} | mask if args.features else {}
    for split in ("train", "test"):
        path = Path(args.data) / f"{split}.jsonl"
        rows, train = read_index(path) if path.exists() or split == "train" else [], split == "train"
        features = CachedFeatures(Path(args.features) / split, rows, expected) if args.features and rows else None
        rows = rows if train else rows[: args.eval_samples]
        how = dict(n_frames=c.n_frames, image_size=c.image_size, seed=args.seed, motion=c.motion)
        if args.stage:
            how |= dict(n_visual=c.n_visual, stage=args.stage, train=train, augment=args.augment and train)
            how |= dict(features=features, motion_targets=args.motion_targets)
        made.append((HawkDataset if args.stage else FrameDataset)(rows, tokenizer, **how))
    return made


def inputs(batch, device, stage):
    """What the objective takes of a collated batch, on the device; uint8 frames become float in [0, 1]."""
    unused = ("errors", "index", "indices")
    batch = {name: x.to(device, non_blocking=True) for name, x in batch.items() if name not in unused}
    batch = {name: x.float() / 255 if x.dtype == torch.uint8 else x for name, x in batch.items()}
    return batch | ({"per_sample": True} if stage else {})  # each clip counts the same, whatever the processes


# ---- The run ---------------------------------------------------------------------------------------------------------
def main():
    args = parse_args()
    rank, world, device = start_processes(args)
    out, last = open_run(args, rank, world)
    precision, scaler = choose_precision(args, device)
    model, tokenizer_path, objective = build(args, last)
    tokenizer = Tokenizer(tokenizer_path, model.config.vocab_size)
    train_set, test_set = datasets(args, model, tokenizer)
    if args.ask_facts:
        objective = ClipFacts(model, train_set, test_set, args.ask_facts, args.facts_only)
    objective.to(device).train()
    for p in objective.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # small steps need all the digits
    optimizer = make_optimizer(objective, args)
    start = load_state(last, objective, optimizer, scaler, device) if args.resume else 0
    stop = []  # SIGTERM: finish the step, save, end
    signal.signal(signal.SIGTERM, lambda *_: stop.append("SIGTERM"))
    batches = loaded(train_set, StepBatches(len(train_set), args, start, rank, world), args)
    module = objective
    if args.compile:
        objective.compile(dynamic=True)  # in place: the names of the weights stay
    if world > 1:
        module = DistributedDataParallel(objective, find_unused_parameters=args.facts_only)

    log = Log(out, start) if rank == 0 else None
    skipped, bad, began = 0, 0, time.perf_counter()
    with tqdm(total=args.steps, initial=start, disable=rank > 0, desc=f"stage {args.stage}", dynamic_ncols=True) as bar:
        for step in range(start + 1, args.steps + 1):
            lr = learning_rate(step - 1, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + rank)  # dropout
            losses, norm, errors = train_step(module, batches, train_set, optimizer, precision, scaler, args, device)
            # float16's scaler begins too high and halves until the gradients fit: that is no fault
            settling = scaler.is_enabled() and scaler.get_scale() >= 1 and losses["total"].isfinite()
            skipped, bad = 0 if math.isfinite(norm) or settling else skipped + 1, bad + list_bad(errors, out)
            refuse_to_go_on(step, skipped, bad, (step - start) * args.batch_size / world, out)
            losses["stop"] = torch.tensor(float(len(stop)), device=device)  # all processes end after the same step
            values = average(losses, world) | {"lr": lr, "grad_norm": norm, "skipped": skipped}
            stopping = values.pop("stop") > 0
            if rank == 0:
                rate = (step - start) * args.batch_size / (time.perf_counter() - began)
                values |= {"samples_per_s": round(rate, 2), "memory_mb": peak_memory_mb(device)}
                if args.stage:  # 1: the biases alone satisfy the consistency loss
                    biases = [getattr(model, name).encoder_1.bias for name in BRANCHES]
                    values["bias_cosine"] = F.cosine_similarity(*biases, dim=0).item()
                if len(test_set) and (step % args.eval_every == 0 or step == args.steps):
                    values |= evaluate(objective, model, test_set, args, device, precision, tokenizer)
                log.write(step, values)
                bar.update()
                bar.set_postfix(loss=f"{values['total']:.3f}", samples_s=values["samples_per_s"])
                if step % args.save_every == 0 or step == args.steps or stopping:
                    save(step, model, objective, optimizer, scaler, tokenizer_path, args, last)
                    log.plot()
            if stopping:
                break
    if world > 1:
        dist.destroy_process_group()


def open_run(args, rank, world):
    """(--out, its folder of the last checkpoint), made and whole; sets args.resume if there is something to resume."""
    out, last = Path(args.out), Path(args.out) / "last"
    if args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size}: no multiple of {world} processes × {args.accumulate} passes")
    if args.weights and Path(args.weights).resolve().is_relative_to(last.resolve()):
        raise ValueError(f"--out {out} would overwrite the weights it starts from; choose another, or go on with "
                         "--resume and the --weights that the run began with")  # fmt: skip
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        recover_folder(last)
    if world > 1:
        dist.barrier()
    if last.exists() and not args.resume:
        raise ValueError(f"--out {out} holds a run; --resume goes on with it, or choose another --out")
    if args.resume and not last.exists() and rank == 0:
        print(f"note: nothing in {last} to go on from: this run begins anew", file=sys.stderr)
    args.resume = args.resume and last.exists()
    if args.resume and args.weights:
        folders = read_chain(last)[1]
        if len(folders) > 1 and folders[-2].resolve() != Path(args.weights).resolve():
            raise ValueError(f"--weights {args.weights}: the run in {out} began with {folders[-2]}")
    return out, last


def loaded(dataset, order, args):
    """The batches of these lists of sample numbers."""
    return load_batches(dataset, order, args.workers, collate_fn=collate, worker_init_fn=obey_parent_only)


def refuse_to_go_on(step, skipped, bad, seen, out):
    """A ValueError after 5 skipped steps in a row, or when over 5% of the clips that were seen could not be read."""
    if skipped == 5:
        raise ValueError(f"step {step}: the loss was not finite for 5 steps in a row; lower --lr or set --clip 1")
    if bad > 20 and bad > 0.05 * seen:
        raise ValueError(f"step {step}: {bad} videos (over 5%) could not be read; see {out / 'bad_videos.jsonl'}")


def obey_parent_only(_):
    """For the loader's processes: schedulers send SIGTERM to all, but it is the loop that must end first, in order."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def train_step(module, batches, train_set, optimizer, precision, scaler, args, device):
    """One optimizer step over this process's share of a batch -> (losses by name, gradient norm, unreadable clips).
    The processes' gradients are averaged once, in the last pass. A step whose gradient is not finite changes nothing.
    A pass counts by its readable clips; one that has none still runs, with weight 0, as the other processes wait for it."""
    sums, errors = Counter(), []
    for k in range(args.accumulate):
        batch = next(batches)
        errors += batch["errors"]
        readable = len(batch.get("input_ids", ()))
        weight = readable / (readable + len(batch["errors"])) / args.accumulate
        batch = batch if readable else collate([any_readable(train_set)])
        together = nullcontext() if k == args.accumulate - 1 else getattr(module, "no_sync", nullcontext)()
        # on the CPU plain matrix products beat the fused attention, whose backward pass is slow there
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with together, attention:
            with precision():
                losses = module(**inputs(batch, device, args.stage))
            scaler.scale(losses["total"] * weight).backward()
        for name, loss in losses.items():
            sums[name] += loss.detach() * weight
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, args.clip or math.inf).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm, errors


def any_readable(dataset):
    """The first sample whose video can be read."""
    for i in range(len(dataset)):
        if "error" not in (sample := dataset[i]):
            return sample
    raise ValueError("not one video of train.jsonl can be read")


@torch.no_grad()
def evaluate(module, model, test_set, args, device, precision, tokenizer):
    """Mean held-out losses as {"held_out_…": float}, and in stage 2 a few answers beside what they should be."""
    module.eval()
    sums, n, answers = Counter(), 0, []
    for batch in loaded(test_set, BatchSampler(range(len(test_set)), 16, False), args):
        list_bad(batch["errors"], Path(args.out))
        x, size = inputs(batch, device, args.stage), len(batch.get("input_ids", ()))
        if not size:
            continue
        n += size
        with precision():  # for the answers too: the parts may be stored in different types
            for name, loss in module(**x).items():
                sums[f"held_out_{name}"] += loss.item() * size
            for i in range(min(3 - len(answers), size) if args.stage == 2 else 0):
                prompt = x["input_ids"][i : i + 1, : int((x["labels"][i] != -100).nonzero()[0])]
                ids = model.generate(x["appearance"][i : i + 1], x["motion"][i : i + 1], prompt, eos_id=tokenizer.eos)
                reference = x["labels"][i][x["labels"][i] >= 0].tolist()
                answers.append({"answer": tokenizer.decode(ids[0]), "reference": tokenizer.decode(reference)})
    module.train()
    return {name: value / n for name, value in sums.items()} | ({"answers": answers} if answers else {})


def average(losses, world):
    """The step's losses as floats, averaged over the processes."""
    values = torch.stack([loss.float() for loss in losses.values()])
    if world > 1:
        dist.all_reduce(values)
    return dict(zip(losses, (values / world).tolist(), strict=True))


def list_bad(errors, out):
    """Appends clips that could not be read to OUT/bad_videos.jsonl, each once; returns how many there were."""
    if errors:
        path, lines = out / "bad_videos.jsonl", [json.dumps(error) + "\n" for error in errors]
        listed = set(path.read_text().splitlines(keepends=True)) if path.exists() else set()
        with path.open("a") as file:
            file.writelines(line for line in dict.fromkeys(lines) if line not in listed)
    return len(errors)


def save(step, model, objective, optimizer, scaler, tokenizer_path, args, last):
    """OUT/last: the weights (only what trains, when that is the smaller part), and all else that the loop carries."""
    if args.stage == 0:  # the motion branch gets the same eyes, as both start from BLIP-2's in the paper
        eyes = {k: v for k, v in model.appearance.state_dict().items() if re.match(EYES, k)}
        model.motion.load_state_dict(eyes, strict=False)
    n_trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    base = args.weights if n_trained * 2 < sum(p.numel() for p in model.parameters()) else None
    heads = {k: v for k, v in objective.state_dict().items() if objective is not model and not k.startswith("hawk.")}
    with replaced_folder(last) as new:
        model.save_pretrained(new, tokenizer=tokenizer_path, base=base)
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "heads": heads}
        torch.save(state, new / "state.pt")
        (new / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")


def load_state(last, objective, optimizer, scaler, device):
    """What `save` wrote beside the weights; returns the step."""
    try:
        state = torch.load(last / "state.pt", map_location=device, weights_only=True)
        objective.load_state_dict(state["heads"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        return int(state["step"])
    except Exception as e:  # a damaged file raises almost anything
        reason = str(e).split("\n")[0]
        raise ValueError(f"{last / 'state.pt'}: cannot be gone on from ({type(e).__name__}: {reason})") from e


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit("error: " + str(e).strip().split("\n")[-1])
