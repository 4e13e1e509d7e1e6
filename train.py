"""Training: stage 1 (captions) and stage 2 (questions) of the paper, Sec. 3.3. One loop, one process or many.

    python train.py --weights weights/start --stage 1 --data data/webvid --out runs/stage1 --recipe released
    python train.py --weights runs/stage1/last --stage 2 --data data/hawk --out runs/stage2 --steps 10000
    torchrun --standalone --nproc_per_node=4 train.py …    # the same options
    python train.py … --resume                             # continues from OUT/last
Sample randomness is seeded by (seed, epoch, index), model randomness (dropout) by (seed, step, rank): the
number of loader workers changes nothing, and a resumed run repeats what an uninterrupted one does."""

import fcntl
import json
import math
import os
import signal
import sys
from collections import Counter
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads wait without spinning
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from hawk import Branch, Hawk, HawkConfig, QFormerLayer, ViT, fingerprint, is_frame_level, read_chain, require


# ---- The task and the options ------------------------------------------------------------------------------
class HawkTask:  # what is trained, on which samples: Hawk's stages. Tasks of apps/towers.py override parts
    def add_options(self, parser):
        add = parser.add_argument_group("stages 1 and 2").add_argument
        add("--stage", type=int, choices=[1, 2], default=2, help="1: captions, 2: questions (default 2)")
        about = "what to train (see Hawk.set_trainable); default: paper, or all with --preset"
        add("--train", choices=["released", "paper", "lora", "all"], help=about)
        add("--features", help="folder that `prepare.py features` wrote: no video is read, no ViT runs")
        add("--augment", action="store_true", help="random crops, as released")
        add("--motion-targets", action="store_true", help="stage 2: motion captions as targets (paper)")
        add("--max-tokens", type=int, default=512, help="stage 2: cut longer texts (default 512)")

    def dataset(self, args, model, tokenizer, split):
        """The samples of a split: "train", or the held-out "test"."""
        train = split == "train"
        rows = data.read_index(Path(args.data) / f"{split}.jsonl")
        given = (rows, tokenizer, model.config, args.stage, args.seed, train, args.augment)
        samples = data.HawkDataset(*given, max_tokens=args.max_tokens, motion_targets=args.motion_targets)
        if args.features:
            cache = (Path(args.features) / split, rows, model.config, data.frozen_fingerprint(model))
            samples.features = data.CachedFeatures(*cache)
            require(not samples.augment or samples.features.choices > 1, "--augment: --features lack --crops")
        if train and args.stage == 2 and os.environ.get("RANK", "0") == "0":
            usual = ("60.0, " * model.config.n_frames, model.config.n_visual, None)  # a message's length
            lost = 0
            for row in rows:  # of the two conversations that may be drawn, the longer one
                qa = row.get("qa") or []
                both = qa, [{"q": data.DESCRIBE_QUESTIONS[0], "a": row.get("description") or ""}, *qa[1:]]
                lost += max(len(tokenizer.encode_conversation(x, *usual)[0]) for x in both) > args.max_tokens
            if lost:  # cut texts do not teach when to stop
                data.note(f"note: --max-tokens {args.max_tokens} cuts {lost} of {len(rows)} rows")
        return samples

    def objective(self, args, model, train_set):
        """Sets what trains -> the module whose forward(**inputs) gives losses by name, among them "total"."""
        model.set_trainable(args.train)
        for name, p in model.named_parameters():  # what comes before cached features cannot train
            p.requires_grad_(p.requires_grad and not (args.features and is_frame_level(name)))
        return model


STOPPING = (signal.SIGTERM, signal.SIGINT)  # finish the step, save, and end the run
SCALED = {"warmup": 1000, "save_every": 500, "eval_every": 500}  # default: a tenth of --steps, at most this
# What may change when a run is resumed (though --steps, --set and --dtype change its result); no others may.
FREE = "out resume weights set recipe steps accumulate device dtype workers features save_every eval_every"


def parse_args(argv, task):
    p = data.make_parser(__doc__)
    add = p.add_mutually_exclusive_group(required=True).add_argument
    add("--preset", choices=["tiny", "7b"], help="start from random weights of this size")
    add("--weights", type=lambda path: str(Path(path)), help="start from this folder of weights")
    add = p.add_argument
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="fields of the config")
    add("--data", required=True, type=os.path.abspath, help="folder of train.jsonl and, held out, test.jsonl")
    add("--out", required=True, help="folder: weights in last/ and best/, log.jsonl, bad_videos.jsonl")
    add("--resume", action="store_true", help="continue from OUT/last, if it is there")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="autocast dtype; default: bfloat16 on a GPU")
    add("--steps", type=int, help="optimizer steps, one batch each")
    add("--recipe", choices=["released"], help="400,000 steps; the release used --augment --train released")
    add("--batch-size", type=int, default=4, help="clips per step, over all processes (default 4)")
    add("--lr", type=float, default=1e-5, help="learning rate after the --warmup from 1e-6 (default 1e-5)")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end (default 1e-6)")
    add("--weight-decay", type=float, default=0.05, help="for tensors of 2 or more dimensions (default 0.05)")
    add("--seed", type=int, default=42, help="for order, crops, questions and dropout (default 42)")
    add("--accumulate", type=int, default=1, help="micro-batches per step, to save memory (default 1)")
    add("--workers", type=int, default=2, help="loader processes per training process (default 2)")
    add("--clip", type=float, default=0.0, help="clip the gradient norm to this (default 0: no clipping)")
    add("--eval-samples", type=int, default=64, help="held-out clips to evaluate; 0: none (default 64)")
    for name, most in SCALED.items():
        add("--" + name.replace("_", "-"), type=int, help=f"default: a tenth of --steps, at most {most}")
    task.add_options(p)
    args = p.parse_args(argv)
    if not (args.steps or args.recipe):
        p.error("how long? --steps N, or --recipe released for the published 400,000")
    args.steps = args.steps or 400_000
    args.train = args.train or ("all" if args.preset else "paper")
    return args if args.resume else settle(args, {})


def settle(args, begun):
    """Fills in what depends on --steps, and checks the options. begun: those of the run being resumed."""
    for name, most in SCALED.items():
        if getattr(args, name) is None:
            setattr(args, name, begun.get(name, min(most, math.ceil(args.steps / 10))))
    for name, now in vars(args).items():
        same = name in FREE.split() or now == begun.get(name, now)
        require(same, f"--{name.replace('_', '-')} {now}: this run began with {begun.get(name)}")
    require(min(args.clip, args.min_lr, args.warmup) >= 0, "--clip, --min-lr and --warmup are not negative")
    counts = (args.steps, args.batch_size, args.accumulate, args.save_every, args.eval_every)
    require(min(counts) > 0, "--steps, --batch-size, --accumulate, --save-every and --eval-every are above 0")
    return args


# ---- Setting up --------------------------------------------------------------------------------------------
def init_weights(module):
    """Unit-variance layers, so that depth does not shrink the signal of a model trained from scratch.
    Module.apply visits submodules first, so the ViT can then correct its patch_embed."""
    if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
        torch.nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    if isinstance(module, torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.1)
    if isinstance(module, Branch | ViT):
        for p in module.parameters(recurse=False):  # queries, class token, positions
            torch.nn.init.normal_(p, std=0.2)
    if isinstance(module, Branch):  # features of unit variance must not drown it out
        torch.nn.init.normal_(module.frame_position.weight, std=0.5)
    if isinstance(module, QFormerLayer):  # at full strength, self-attention soon makes all queries the same
        module.self_attention.output.weight.data *= 0.1
    if isinstance(module, ViT):  # zero-mean filters: the mean of pixels in [0, 1] would drown out the rest
        module.patch_embed.weight.data -= module.patch_embed.weight.mean(dim=(1, 2, 3), keepdim=True)


def build(args, folder, device):
    """(model, its tokenizer file), from a folder of weights or, if None, with the preset's random weights."""
    torch.manual_seed(args.seed)
    tokenizer = Path(folder or args.data) / "tokenizer.model"
    base = args.weights if args.resume else None  # given again, in case it has moved
    stored = read_chain(folder, base=base)[0] if folder else HawkConfig.preset(args.preset)
    # taken now: another run may replace these weights before this one saves
    args.base_fingerprint = fingerprint(args.weights) if args.weights and args.train != "all" else None
    if not folder:
        stored.vocab_size = data.Tokenizer(tokenizer).vocab_size
    config = HawkConfig.from_dict(vars(stored) | data.settings(args.set), "--set")
    if not folder:
        return Hawk(config).apply(init_weights), tokenizer
    # set_trainable adds the LoRA if the folder holds none
    held = {"lora_rank": 0} if args.train == "lora" and not stored.lora_rank else {}
    # on a GPU, under autocast, frozen weights keep the dtype they are stored in
    dtype = None if device.type == "cuda" and args.dtype != "float32" else torch.float32
    model = Hawk.from_pretrained(folder, dtype=dtype, config=HawkConfig(**vars(config) | held), base=base)
    model.config = config
    return model, tokenizer


def begin(args):
    """Joins the other processes, creates or finds the run -> (rank, processes, device, last checkpoint)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    device = data.usable_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    last, best = (Path(args.out) / name for name in ("last", "best"))
    if rank == 0:
        last.parent.mkdir(parents=True, exist_ok=True)
        begin.lock = last.with_name("lock").open("w")  # held until this process ends
        try:
            fcntl.lockf(begin.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some file systems have no locks
            require(not isinstance(error, BlockingIOError), f"{args.out}: another process is training there")
        data.recover_folder(last)
        data.recover_folder(best)
        last.with_name("bad_videos.jsonl").open("a" if last.exists() else "w").close()
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))  # they wait for rank 0
        torch.distributed.barrier()
    overwritten = Path(args.weights or "/").resolve() == best.resolve()
    require(not overwritten, f"{args.weights}: this run would overwrite it; choose another --out")
    taken = not args.resume and (last.exists() or best.exists())
    require(not taken, f"{args.out}: there is a run; continue it with --resume, or choose another --out")
    if args.resume and not last.exists() and rank == 0:
        data.note(f"note: {last} is not there yet: this run begins")
    args.resume = last.exists()
    settle(args, data.read_json(last / "args.json", "steps") if args.resume else {})
    even = args.batch_size % (world * args.accumulate) == 0
    require(even, f"--batch-size must be a multiple of {world} processes × --accumulate {args.accumulate}")
    if args.warmup >= args.steps > 1 and rank == 0:
        data.note(f"note: learning rate never reaches --lr: --warmup is {args.warmup} of {args.steps} steps")
    return rank, world, device, last


def learning_rate(step, args):
    """Linear warm-up from 1e-6, then a cosine over all steps from 0 (not from the warm-up), as released."""
    if step < args.warmup:
        return 1e-6 + (args.lr - 1e-6) * step / args.warmup
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def make_optimizer(module, args):
    """AdamW with weight decay on tensors of two or more dimensions only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:  # small updates need the precision of float32
        p.data = p.data.float()
    decayed = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], lr=args.lr, betas=(0.9, 0.999))


# ---- Samples, held-out loss, checkpoints -------------------------------------------------------------------
def micro_batches(n, args, start, rank, world):
    """Yields this process's micro-batches from step `start` on: lists of sample numbers (epoch * n + index).
    The epochs form one long sequence; all processes share the next few numbers as a micro-batch."""
    generators = (torch.Generator().manual_seed(args.seed * 1_000_003 + epoch) for epoch in count())
    orders = (torch.randperm(n, generator=generator).tolist() for generator in generators)
    numbers = (epoch * n + index for epoch, order in enumerate(orders) for index in order)
    numbers = islice(numbers, start * args.batch_size, args.steps * args.batch_size)
    while together := list(islice(numbers, args.batch_size // args.accumulate)):
        yield together[rank::world]


def load(dataset, order, args, device, most=math.inf):
    """Yields (batch, clips in it, unreadable clips) for each list of sample numbers in `order`. If none is
    readable, another clip stands in, with weight 0 (DDP needs a backward pass in every process); a held-out
    batch (most: inf) is skipped. ValueError if no clip can be read, or more than `most` cannot."""
    listed = Path(args.out) / "bad_videos.jsonl"
    options = {"num_workers": args.workers, "collate_fn": data.collate}
    options["generator"] = torch.Generator()  # leaves the default one to the model's dropout
    # a scheduler signals all processes, but workers and their ffmpeg must survive the loop's last step
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=order, **options))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise at any moment
    for batch in loader:
        unread = len(batch["errors"])
        lines = {json.dumps(error) + "\n" for error in batch["errors"]}
        with listed.open("a+") as file:  # shared by all processes; a user may delete it
            file.seek(0)
            file.writelines(sorted(lines.difference(file)))
        bad = {row["video"] for row in dataset.rows} if unread else set()  # in this split, not the other
        bad &= {json.loads(line)["video"] for line in listed.open()}
        advice = f"see {listed.name}; delete it once they are repaired"
        require(len(bad) <= most, f"{len(bad)} unreadable videos for {len(dataset)} rows; {advice}")
        clips = len(batch.get("input_ids", ()))
        if not clips and most == math.inf:
            continue
        if not clips:
            others = (data.collate([dataset[i]]) for i in range(len(dataset)))
            batch = next((other for other in others if "input_ids" in other), None)
            require(batch, f"not one of the videos can be read; see {listed}")
        inputs = {k: batch[k].to(device) for k in batch.keys() - {"errors", "index", "indices", "streams"}}
        streams = {name: x.to(device) for name, x in batch["streams"].items()}  # uint8 frames, or features
        inputs["streams"] = {name: x / 255 if x.dtype == torch.uint8 else x for name, x in streams.items()}
        yield inputs, clips, unread


@torch.no_grad()
def evaluate(objective, test_set, autocast, args, device):
    """Mean held-out losses as {"held_out_…": float}."""
    objective.eval()
    sums = Counter()
    order = torch.utils.data.BatchSampler(range(len(test_set))[: args.eval_samples], 16, drop_last=False)
    for batch, clips, _ in load(test_set, order, args, device):
        with autocast:
            losses = objective(**batch, per_sample=True)
        sums.update({name: loss.item() * clips for name, loss in losses.items()} | {"clips": clips})
    objective.train()
    clips = sums.pop("clips", 1)  # without a readable clip there are no losses either
    return {f"held_out_{name}": value / clips for name, value in sums.items()}


def save(folder, args, model, objective, tokenizer, **progress):
    """Writes weights, options, the heads of a task, and `progress`: the step, and the state of the loop."""
    heads = {} if objective is model else objective.state_dict()
    base = None if args.train == "all" else args.weights  # which holds what is not trained
    with data.replaced_folder(folder) as new:
        model.save_pretrained(new, tokenizer=tokenizer, base=base, mark=args.base_fingerprint)
        torch.save(progress | {"objective": heads}, new / "state.pt")
        (new / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
        for name in ("kinds.json", "clips.json"):  # phrases and length of the clips, for apps.timeline
            if (Path(args.data) / name).exists():
                (new / name).write_bytes((Path(args.data) / name).read_bytes())


def restore(file, objective, optimizer):
    """Reads what `save` wrote beside the weights -> (steps done, lowest held-out loss)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # AdamW's step counts stay there
        objective.load_state_dict(state["objective"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state.get("best", math.inf))
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"{file}: cannot resume from it ({type(error).__name__})") from error


# ---- One step, and the run ---------------------------------------------------------------------------------
def train_step(module, batches, optimizer, autocast, args):
    """One optimizer step over this process's share of a batch -> (its losses, gradient norm). The loss of an
    unreadable clip counts as 0. If the gradient is not finite, the weights stay as they are."""
    sums = Counter()
    for k in range(args.accumulate):
        batch, clips, unread = next(batches)
        share = clips / (clips + unread) / args.accumulate  # of this process's mean
        # like DDP's no_sync(): gradients are averaged over the processes only in the last backward pass
        module.require_backward_grad_sync = k == args.accumulate - 1
        with autocast:  # per sample: all clips count the same, however many processes share a batch
            losses = module(**batch, per_sample=True)
        (losses["total"] * share).backward()
        sums.update({name: loss.detach().float() * share for name, loss in losses.items()})
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip or math.inf).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


def main(argv=None, task=None):
    task = task or HawkTask()
    args = parse_args(argv, task)
    rank, world, device, last = begin(args)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    model, tokenizer_file = build(args, last if args.resume else args.weights, device)
    tokenizer = data.Tokenizer(tokenizer_file, model.config.vocab_size)
    train_set = task.dataset(args, model, tokenizer, "train")
    held_out = args.eval_samples > 0 and (Path(args.data) / "test.jsonl").exists()
    test_set = task.dataset(args, model, tokenizer, "test") if held_out else None
    objective = task.objective(args, model, train_set).to(device).train()
    for block in model.llama.layers if model.config.gradient_checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # saves memory
    optimizer = make_optimizer(objective, args)
    start, best = restore(last / "state.pt", objective, optimizer) if args.resume else (0, math.inf)
    require(start <= args.steps, f"--steps {args.steps}: this run is at step {start} already")
    module = torch.nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    order = micro_batches(len(train_set), args, start, rank, world)
    batches = load(train_set, order, args, device, most=max(1, 0.05 * len(train_set)))
    parts = (args, model, objective, tokenizer_file)  # of a checkpoint
    log = last.with_name("log.jsonl")
    if rank == 0:  # a resumed run repeats the steps after the last checkpoint, and logs each once
        lines = log.read_text().splitlines(keepends=True)[:start] if log.exists() else []
        data.replace_file(log, "".join(lines))
    stop = []
    for number in STOPPING:
        signal.signal(number, lambda number, _: stop.append(number))
    skipped = 0
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step - 1, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + rank)  # dropout; 1009 ranks at most
        losses, norm = train_step(module, batches, optimizer, autocast, args)
        # what every process has to know: the mean losses, and whether one of them was told to stop
        means = torch.stack([*losses.values(), torch.tensor(float(len(stop)), device=device)])
        if world > 1:
            torch.distributed.all_reduce(means)
        *means, told_to_stop = (means / world).tolist()
        skipped = 0 if math.isfinite(norm) else skipped + 1
        require(skipped < 5, f"step {step}: not finite for 5 steps in a row; lower --lr or set --clip 1")
        if rank == 0:
            values = dict(zip(losses, means, strict=True)) | {"lr": lr, "grad_norm": norm, "skipped": skipped}
            values["memory_mb"] = data.peak_memory_mb(device)
            values["samples_per_s"] = round((step - start) * args.batch_size / bar.format_dict["elapsed"], 2)
            biases = [p for name, p in model.named_parameters() if name.endswith(".encoder_1.bias")]
            if biases:  # near 1: biases alone satisfy the consistency loss
                values["bias_cosine"] = torch.nn.functional.cosine_similarity(*biases, dim=0).item()
            if held_out and (step % args.eval_every == 0 or step == args.steps):
                values |= evaluate(objective, test_set, autocast, args, device)
            finite = {name: x for name, x in values.items() if math.isfinite(x)}  # JSON has no NaN
            with log.open("a") as file:
                file.write(json.dumps({"step": step} | finite) + "\n")
            bar.set_postfix(loss=values["total"], samples_s=values["samples_per_s"])
            if values.get("held_out_total", math.inf) < best:
                best = values["held_out_total"]
                save(last.with_name("best"), *parts, step=step)
            if step % args.save_every == 0 or step == args.steps or told_to_stop:
                save(last, *parts, step=step, best=best, optimizer=optimizer.state_dict())
        if told_to_stop and rank == 0:
            data.note("\nnote: stopped, and saved; the same command with --resume continues")
        if told_to_stop:
            break
    if world > 1:
        torch.distributed.destroy_process_group()
    listed = last.with_name("bad_videos.jsonl")
    if rank == 0 and (bad := {json.loads(line)["video"] for line in listed.open()}):
        data.note(f"note: {len(bad)} videos could not be read (of {len(train_set)} rows): {listed}")
    return 130 if signal.SIGINT in stop else 0  # SIGTERM, from a scheduler, is not a failure


def run(argv=None, task=None):
    """`main` as a program: returns the exit status, and prints an error as one line."""
    try:
        return main(argv, task)
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, *data.PROBLEMS) as error:
        if isinstance(error, ConnectionResetError) or "DataLoader worker (pid" in str(error):
            error = "a loader worker died, perhaps out of memory; start again with --resume"
        elif not isinstance(error, data.PROBLEMS) and "allocate memory" not in str(error):
            raise
        return data.print_error(error)


if __name__ == "__main__":
    sys.exit(run())
