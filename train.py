"""Training: stage 1 (captions) and stage 2 (questions) of the paper, Sec. 3.3. One loop, one process or many.

    python train.py --weights weights/start --stage 1 --data data/webvid --out runs/stage1
    python train.py --weights runs/stage1/last --stage 2 --data data/hawk --out runs/stage2
    torchrun --standalone --nproc_per_node=4 train.py …    # same options; --batch-size is global
    python train.py … --resume                             # continues from OUT/last

In order: task and options, setting up, loading samples, checkpoints, held-out loss, one step, the loop.
Sample randomness is seeded by (seed, epoch, index), model randomness (dropout) by (seed, step, rank): loader
workers change nothing, and a run that was killed and resumed repeats the undisturbed one.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

import data
from hawk import COMPARED, Branch, Encoding, Hawk, HawkConfig, QFormerLayer, ViT, is_frame_level, read_chain


# ---- The task and the options ------------------------------------------------------------------------------
class HawkTask:
    """What is trained, on which samples: Hawk's own stages. apps/towers.py has tasks that override parts."""

    forward_options = {"per_sample": True}  # each clip counts the same, however many processes share a batch

    def add_options(self, parser):
        add = parser.add_argument_group("stages 1 and 2").add_argument
        add("--stage", type=int, choices=[1, 2], default=2, help="1: captions, 2: questions")
        add("--train", choices=["released", "paper", "lora", "all"], help="default: paper, with --preset all")
        add("--features", help="folder that `prepare.py features` wrote: no video is read and no ViT runs")
        add("--augment", action="store_true", help="random crops, as released")
        add("--motion-targets", action="store_true", help="stage 2: motion captions as targets (paper)")

    def dataset(self, args, model, tokenizer, split):
        """The samples of the "train" split, or the first ones of the "test" split, which are held out."""
        train = split == "train"
        rows = read_rows(args.data, split)
        options = {"augment": args.augment and train, "motion_targets": args.motion_targets}
        if args.features and rows:
            fingerprint = data.frozen_fingerprint(model)
            folder = Path(args.features) / split
            options["features"] = data.CachedFeatures(folder, rows, model.config, fingerprint)
        rows = rows if train else rows[: args.eval_samples]
        return data.HawkDataset(rows, tokenizer, model.config, args.stage, args.seed, train, **options)

    def objective(self, args, model, train_set):
        """Sets what trains -> the module whose forward(**inputs) gives losses by name, among them "total"."""
        model.set_trainable(args.train)
        if args.features:  # what comes before the cached features cannot learn
            for name, p in model.named_parameters():
                p.requires_grad_(p.requires_grad and not is_frame_level(name))
        return model

    def before_saving(self, model):
        """Called before a checkpoint is written."""


def read_rows(folder, split):
    """Those of train.jsonl or test.jsonl; without a test.jsonl there are no held-out ones."""
    file = Path(folder) / f"{split}.jsonl"
    return data.read_index(file) if split == "train" or file.exists() else []


def to_device(x, device):
    """A tensor, or tensors by name; uint8 frames become float in [0, 1]."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    x = x.to(device, non_blocking=True)
    return x.float() / 255 if x.dtype == torch.uint8 else x


def parse_args(argv, task):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train, and where").add_argument
    add("--preset", choices=["tiny", "7b"], help="start from random weights of this size")
    add("--weights", help="start from this folder of weights")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set a field of the config")
    add("--data", required=True, help="folder with train.jsonl and, for the held-out loss, test.jsonl")
    add("--out", required=True, help="folder of the run: log.jsonl, bad_videos.jsonl, weights in last/")
    add("--resume", action="store_true", help="continue from OUT/last")
    task.add_options(p)
    add = p.add_argument_group("recipe (defaults as released)").add_argument
    add("--steps", type=int, default=400_000)
    add("--batch-size", type=int, default=4, help="global: over all processes and micro-batches")
    add("--accumulate", type=int, default=1, help="micro-batches per step")
    add("--lr", type=float, default=1e-5)
    add("--min-lr", type=float, default=1e-6)
    add("--warmup", type=int, default=1000, help="steps from 1e-6 to --lr")
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0, as released: no clipping")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of autocast")
    add("--compile", action="store_true", help="torch.compile the model (for GPUs)")
    add("--seed", type=int, default=42)
    add("--device", help="default: cuda, else mps, else cpu")
    add("--workers", type=int, default=2, help="loader workers of each process")
    add("--save-every", type=int, default=500)
    add("--eval-every", type=int, default=500)
    add("--eval-samples", type=int, default=64, help="held-out clips for the loss; stage 2 answers three")
    args = p.parse_args(argv)
    if bool(args.preset) == bool(args.weights):
        p.error("give either --preset tiny|7b or --weights FOLDER to start from")
    args.train = args.train or ("all" if args.preset else "paper")
    return args


# ---- Setting up --------------------------------------------------------------------------------------------
def choose_precision(args, device):
    """(autocast context, gradient scaler). --dtype auto: float32 on the CPU, else bfloat16 if supported."""
    if args.dtype == "auto":
        args.dtype = "float32"
        if device.type == "cuda":
            args.dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    dtype = getattr(torch, args.dtype)
    # from torch's default of 2^16, many steps would be skipped until the scale fits the gradients
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=args.dtype == "float16")
    return torch.autocast(device.type, dtype, enabled=args.dtype != "float32"), scaler


def init_weights(module):
    """Unit-variance layers, so that depth does not shrink the signal of a model that learns from nothing."""
    if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
        torch.nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    if isinstance(module, torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.1)
    if isinstance(module, Branch | ViT):
        for p in module.parameters(recurse=False):  # queries, class token, positions
            torch.nn.init.normal_(p, std=0.2)
    if isinstance(module, Branch):  # features of unit variance must not drown it
        torch.nn.init.normal_(module.frame_position.weight, std=0.5)
    if isinstance(module, QFormerLayer):  # at full strength, self-attention soon makes all queries the same
        module.self_attention.output.weight.data *= 0.1
    if isinstance(module, ViT):  # filters of zero mean: that of pixels in [0, 1] would drown the rest
        module.patch_embed.weight.data -= module.patch_embed.weight.mean(dim=(1, 2, 3), keepdim=True)


def build(args, folder, device):
    """(model, file of its tokenizer), from a folder of weights or, if None, random weights of the preset."""
    torch.manual_seed(args.seed)
    tokenizer = Path(folder or args.data) / "tokenizer.model"
    stored = read_chain(folder)[0] if folder else HawkConfig.preset(args.preset)
    if not folder and args.preset == "tiny":  # as many words as the tokenizer of the data has
        stored.vocab_size = data.Tokenizer(tokenizer).vocab_size
    config = HawkConfig.from_dict(vars(stored) | data.settings(args.set), "--set")
    if not folder:
        return Hawk(config).apply(init_weights), tokenizer
    lora_rank = config.lora_rank
    if args.train == "lora" and not stored.lora_rank:
        config.lora_rank = 0  # the folder holds no LoRA: set_trainable will add it
    # on a GPU, under autocast, frozen weights keep the type they are stored in
    dtype = None if device.type == "cuda" and args.dtype != "float32" else torch.float32
    model = Hawk.from_pretrained(folder, dtype=dtype, config=config)
    config.lora_rank = lora_rank
    return model, tokenizer


def checkpoint_gradients(model):
    """LLaMA's layers run again in the backward pass, so that their activations need not be kept."""
    for block in model.llama.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def bias_cosine(model):
    """Cosine of the biases of the two encoder_1, None without both: near 1 they alone meet the consistency loss."""
    layers = [model.branch(name).encoder_1 for name in model.config.branches if name in COMPARED]
    if len(layers) < 2:
        return None
    return torch.nn.functional.cosine_similarity(layers[0].bias, layers[1].bias, dim=0).item()


def learning_rate(step, args):
    """Linear warm-up from 1e-6, then a cosine that, as released, counts all steps from 0."""
    if step < args.warmup:
        lowest = min(1e-6, args.lr)
        return lowest + (args.lr - lowest) * step / args.warmup
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def make_optimizer(module, args):
    """AdamW with weight decay on tensors of two or more dimensions only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], lr=args.lr, betas=(0.9, 0.999))


# ---- Samples: their order, and loading them ----------------------------------------------------------------
def micro_batches(n, args, start, rank, world):
    """Yields this process's micro-batches from step `start` on: lists of sample numbers (epoch * n + index).
    All epochs form one line of positions; a micro-batch takes the next few for all processes together."""
    together = args.batch_size // args.accumulate
    epoch = None
    for first in range(start * args.batch_size, args.steps * args.batch_size, together):
        numbers = []
        for position in range(first + rank, first + together, world):
            if position // n != epoch:
                epoch = position // n
                generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
                order = torch.randperm(n, generator=generator).tolist()
            numbers.append(epoch * n + order[position % n])
        yield numbers


def load(dataset, order, args):
    """Yields (batch, clips in it, unreadable clips) for each list of sample numbers in `order`.

    The unreadable are listed in OUT/bad_videos.jsonl, each once. A batch without others holds the first clip
    that can be read but counts as one of 0 clips: in DDP, other processes wait for its backward pass."""
    listed = Path(args.out) / "bad_videos.jsonl"
    options = {"num_workers": args.workers, "worker_init_fn": block_sigterm, "collate_fn": data.collate}
    options["generator"] = torch.Generator()  # the default one is for the model's dropout
    for batch in DataLoader(dataset, batch_sampler=order, **options):
        errors = batch["errors"]
        for error in errors:
            line = json.dumps(error) + "\n"
            if not listed.exists() or line not in listed.read_text():
                with listed.open("a") as file:
                    file.write(line)
        clips = len(batch.get("input_ids", ()))
        i = 0
        while "input_ids" not in batch:
            if i == len(dataset):
                raise ValueError(f"not one of the videos can be read; see {listed}")
            batch = data.collate([dataset[i]])
            i += 1
        inputs = {name: x for name, x in batch.items() if name not in ("errors", "index", "indices")}
        yield inputs, clips, len(errors)


def block_sigterm(_):
    """A scheduler signals all processes, but workers and their ffmpeg must outlast the loop's last step."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


# ---- Checkpoints -------------------------------------------------------------------------------------------
def save(last, step, args, model, objective, optimizer, scaler, tokenizer):
    """OUT/last: the weights (only those that train, unless all do) and all else that the loop carries."""
    base = None if args.train == "all" else args.weights
    state = {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state["objective"] = {} if objective is model else objective.state_dict()  # a task's own heads
    with data.replaced_folder(last) as new:
        model.save_pretrained(new, tokenizer=tokenizer, base=base)
        torch.save(state, new / "state.pt")
        (new / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")


def load_state(last, objective, optimizer, scaler, device):
    """What `save` wrote beside the weights; returns the step."""
    try:
        state = torch.load(last / "state.pt", map_location=device, weights_only=True)
        objective.load_state_dict(state["objective"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return int(state["step"])
    except Exception as e:  # a damaged file raises almost anything
        reason = str(e).split("\n")[0]
        raise ValueError(f"{last}/state.pt: cannot resume from it ({type(e).__name__}: {reason})") from e


# ---- Held-out loss -----------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(objective, model, test_set, tokenizer, autocast, task, args, device):
    """Mean held-out losses as {"held_out_…": float}; in stage 2 also "answers": three, with references."""
    objective.eval()
    sums = Counter()
    answers = []
    order = BatchSampler(range(len(test_set)), 16, drop_last=False)
    for batch, clips, _ in load(test_set, order, args):
        x = to_device(batch, device)
        with autocast:  # for the answers too: the parts of the model may be stored in different types
            for name, loss in objective(**x, **task.forward_options).items():
                sums[f"held_out_{name}"] += loss.item() * clips
            sums["clips"] += clips
            if args.stage == 2 and not answers:
                encoding = model.encode(x["streams"])
                for i in range(min(clips, 3)):
                    target = x["labels"][i] != data.IGNORE  # what comes before it is the prompt
                    prompt = x["input_ids"][i : i + 1, : int(target.nonzero()[0])]
                    clip = Encoding(encoding.tokens[[i]], {})
                    ids = model.generate(clip, prompt, eos_id=tokenizer.eos)[0]
                    reference = tokenizer.decode(x["labels"][i][target].tolist())
                    answers.append({"answer": tokenizer.decode(ids), "reference": reference})
    objective.train()
    clips = sums.pop("clips")
    means = {name: value / clips for name, value in sums.items()}
    return means | {"answers": answers} if answers else means


# ---- The loop ----------------------------------------------------------------------------------------------
def train_step(module, batches, optimizer, scaler, autocast, task, args, device):
    """One optimizer step over this process's share of a batch -> (losses, gradient norm, clips not read).

    A step whose gradient is not finite changes nothing. Clips that could not be read count with loss 0."""
    sums = Counter()
    unread = 0
    for k in range(args.accumulate):
        batch, clips, missing = next(batches)
        unread += missing
        weight = clips / (clips + missing) / args.accumulate
        # DDP averages the gradients over the processes once, in the last backward pass
        module.require_backward_grad_sync = k == args.accumulate - 1
        # on the CPU, plain matrix products beat fused attention, whose backward pass is slow there
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            with autocast:
                losses = module(**to_device(batch, device), **task.forward_options)
            scaler.scale(losses["total"] * weight).backward()
        for name, loss in losses.items():
            sums[name] += loss.detach().float() * weight
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm, unread


def main(argv=None, task=None):
    task = task or HawkTask()
    args = parse_args(argv, task)
    # torchrun sets these for each process that it starts
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    device = data.usable_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size is no multiple of {world} processes × --accumulate {args.accumulate}")

    # the run's folder
    last = Path(args.out) / "last"
    if rank == 0:
        last.parent.mkdir(parents=True, exist_ok=True)
        data.recover_folder(last)
    if world > 1:
        dist.barrier()
    if last.exists() and not args.resume:
        raise ValueError(f"{last}: there is a run; continue it with --resume, or choose another --out")
    args.resume = last.exists()
    bases = read_chain(last)[1][-2:-1] if args.resume and args.weights else []
    if bases and bases[0].resolve() != Path(args.weights).resolve():
        raise ValueError(f"--weights {args.weights}: the run in {args.out} began with {bases[0]}")

    # the model, its samples, and the module that computes its losses
    autocast, scaler = choose_precision(args, device)
    model, tokenizer_file = build(args, last if args.resume else args.weights, device)
    tokenizer = data.Tokenizer(tokenizer_file, model.config.vocab_size)
    train_set = task.dataset(args, model, tokenizer, "train")
    test_set = task.dataset(args, model, tokenizer, "test")
    objective = task.objective(args, model, train_set).to(device).train()
    if model.config.gradient_checkpointing:
        checkpoint_gradients(model)
    for p in objective.parameters():
        if p.requires_grad:  # small steps need all the digits
            p.data = p.data.float()
    optimizer = make_optimizer(objective, args)
    start = load_state(last, objective, optimizer, scaler, device) if args.resume else 0
    if args.compile:
        objective.compile(dynamic=True)  # in place: the weights keep their names
    module = torch.nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    batches = load(train_set, micro_batches(len(train_set), args, start, rank, world), args)

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # finish the step, save, end
    if rank == 0:  # a resumed run repeats the steps after the last checkpoint, and logs each once
        log_file = last.with_name("log.jsonl")
        lines = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
        data.replace_file(log_file, "".join(lines[:start]))
        log = log_file.open("a", buffering=1)
    bar = tqdm(total=args.steps, initial=start, disable=rank > 0, desc=f"stage {args.stage}")
    skipped = 0
    unread = 0
    began = time.perf_counter()
    for step in range(start + 1, args.steps + 1):
        lr = learning_rate(step - 1, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + rank)  # dropout
        losses, norm, missing = train_step(module, batches, optimizer, scaler, autocast, task, args, device)
        means = torch.stack(list(losses.values()))
        told_to_stop = torch.tensor(float(len(stop)), device=device)
        if world > 1:
            dist.all_reduce(means)
            dist.all_reduce(told_to_stop)
        values = dict(zip(losses, (means / world).tolist(), strict=True))

        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == 5:
            raise ValueError(f"step {step}: not finite for 5 steps in a row; lower --lr or set --clip 1")
        unread += missing
        seen = (step - start) * args.batch_size
        if unread > 20 and unread > 0.05 * seen / world:
            raise ValueError(f"step {step}: over 5% of the videos are unreadable; see bad_videos.jsonl")

        if rank == 0:
            rate = round(seen / (time.perf_counter() - began), 2)
            values |= {"lr": lr, "grad_norm": norm, "skipped": skipped, "samples_per_s": rate}
            values |= {"memory_mb": data.peak_memory_mb(device), "bias_cosine": bias_cosine(model)}
            if len(test_set) and (step % args.eval_every == 0 or step == args.steps):
                values |= evaluate(objective, model, test_set, tokenizer, autocast, task, args, device)
            for name, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    values[name] = None  # JSON has neither NaN nor infinity
            log.write(json.dumps({"step": step} | values) + "\n")
            bar.update()
            bar.set_postfix(loss=values["total"], samples_s=rate)
            if step % args.save_every == 0 or step == args.steps or told_to_stop > 0:
                task.before_saving(model)
                save(last, step, args, model, objective, optimizer, scaler, tokenizer_file)
        if told_to_stop > 0:
            break
    if world > 1:
        dist.destroy_process_group()


def run(argv=None, task=None):
    """`main` as a program: returns the exit status, and prints an error as one line."""
    try:
        main(argv, task)
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error).strip().split("\n")[-1]
        if "DataLoader worker (pid" in str(error):
            message = "a loader worker died, perhaps for want of memory; start again with --resume"
        elif isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run())
