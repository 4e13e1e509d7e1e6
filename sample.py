"""Ask a trained model about a video. In this file: fast kernels, int8, from a video to an answer, chat.

    python sample.py examples/crossing.mp4                  # "Can you describe the anomaly …?"
    python sample.py a.mp4 b.mp4 --question "Where is it?"  # a line per video, "PATH: answer"
    python sample.py --chat a.mp4                           # a chat that remembers earlier rounds

Answers go to stdout; times, notes and errors to stderr. After an error the exit status is 2."""

import argparse
import json
import os
import readline
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads wait without spinning
import torch

import data
from data import PROBLEMS, make_parser, note, print_error
from hawk import Hawk, KVCache, require

TINY = Path(__file__).resolve().parent / "weights" / "tiny"
WEIGHTS = TINY.with_name("hawk-7b" if TINY.with_name("hawk-7b").is_dir() else "tiny")  # the default
TINY_NOTE = "weights/tiny knows the toy world only; the README says how to get the 7B weights"
HELP = """Type a question. ctrl-C stops an answer, /new forgets earlier rounds, /quit or ctrl-D ends the chat.
weights/tiny knows: What happens? Who is involved? Where is it? When does it happen? Why is it dangerous?
How many road users are on their way?"""
Seen = namedtuple("Seen", "path clip encoding seconds")  # an encoded video; seconds: {"read", "encode"}
Answer = namedtuple("Answer", "video question answer seconds tokens peak_memory_mb notes")  # as in --json


# ---- LLaMA's matrix products: a GPU kernel for decoding steps, and int8 ------------------------------------
try:
    import triton
    import triton.language as tl

    @triton.jit
    def row_product(x, weight, scale, y, N, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """y (N,) = scale · (weight (N, K) x): each program computes ROWS of y, BLOCK columns at a time."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            k = tl.max_contiguous(start + tl.arange(0, BLOCK), 8)  # spreads int8 like x: no barriers
            w = tl.load(weight + n[:, None] * K + k, mask=(n < N)[:, None] & (k < K), other=0)
            if scale is not None:  # int8 w as the low bits of the float 2²³ + 128 + w: faster than .to
                w = (w.to(tl.int32) + 0x4B000080).to(tl.float32, bitcast=True) - 8388736
            total += w.to(tl.float32) * tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        result = tl.sum(total, 1)
        if scale is not None:
            result *= tl.load(scale + n, mask=n < N, other=0).to(tl.float32)
        tl.store(y + n, result.to(y.dtype.element_ty), mask=n < N)
except ImportError:  # torch installs Triton only where it helps: on Linux with CUDA
    triton = None


class RowLinear(torch.nn.Module):
    """A Linear without bias, for inference: on a GPU, the one row of a decoding step goes through the kernel
    above. In int8, W ≈ scale · weight, with a scale for each row of W: half the memory of bfloat16."""

    def __init__(self, linear, int8=False):
        super().__init__()
        self.register_buffer("scale", None)
        weight = linear.weight  # (out, in)
        if int8:
            w = weight.detach().float()
            self.scale = (w.abs().amax(1) / 127).clamp(min=1e-30).to(weight.dtype)
            weight = torch.nn.Buffer((w / self.scale.float()[:, None]).round().clamp(-127, 127).char())
        self.weight = weight

    def forward(self, x):
        N, K = self.weight.shape
        if triton and x.is_cuda and x.numel() == K and not torch.is_grad_enabled():
            y = x.new_empty(*x.shape[:-1], N)
            row_product[((N + 7) // 8,)](x, self.weight, self.scale, y, N, K, ROWS=8, BLOCK=1024)
            return y
        if self.scale is not None and x.is_cpu and x.numel() <= 8 * K and K % 16 == 0:  # else it can be wrong
            y = torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), self.weight, self.scale)
            return y.view(*x.shape[:-1], N)
        y = torch.nn.functional.linear(x, self.weight.to(x.dtype))
        # a float32 scale keeps inductor from putting torch's slow CUDA kernel in place of this product
        return y if self.scale is None else (y * self.scale.float()).to(x.dtype)


# ---- From a video to an answer -----------------------------------------------------------------------------
def load(weights, device=None, dtype=None, int8=False, compile=False):
    """Folder of weights -> (model, tokenizer). dtype: torch's, or its name. ValueError names the bad file."""
    if Path(weights).resolve() == TINY:
        note(f"note: {TINY_NOTE}")
    device = data.usable_device(device)
    dtype = str(dtype or ("bfloat16" if device.type == "cuda" else "float32")).removeprefix("torch.")
    # rounding to int8 happens on the CPU, so that the device never holds the larger matrices
    model = Hawk.from_pretrained(weights, "cpu" if int8 else device, getattr(torch, dtype))
    require(not (int8 and model.config.lora_rank), "--int8 is for weights without LoRA: prepare.py merge")
    if int8 or compile:  # on a GPU, both need a C compiler, unlike the default
        for name, module in list(model.llama.named_modules()):
            # without int8, inductor is faster for q, k, v and for gate, up: it fuses their products
            if type(module) is torch.nn.Linear and (int8 or name.endswith(("down_proj", "lm_head"))):
                model.llama.set_submodule(name, RowLinear(module, int8))
        model.to(device)
    model.compile_step = compile
    return model, data.Tokenizer(Path(weights) / "tokenizer.model", model.config.vocab_size)


@torch.no_grad()
def encode_clips(model, clips):
    """Clips -> Encoding of the batch; one by one if clips differ in length."""
    streams = [{name: torch.from_numpy(x) for name, x in clip.streams.items()} for clip in clips]
    frames = {name: x.to(model.device) / 255 for name, x in data.stack(streams, 0).items()}  # (B, T, H, W, 3)
    counts = torch.tensor([len(clip.indices) for clip in clips])
    return model.encode({name: x.permute(0, 1, 4, 2, 3) for name, x in frames.items()}, counts)


def encode_video(model, path, fps=25):
    """Reads and encodes a video -> Seen. fps: pictures per second, in a folder. Raises VideoError."""
    no_path = not os.path.exists(path) and ("://" in str(path) or "*" in str(path))
    require(not no_path, f"{path}: no such file; download a URL first; give a pattern without quotes")
    start = time.perf_counter()
    clip = data.read_clip(path, **data.clip_options(model.config), fps=fps, device=model.device)
    middle = time.perf_counter()
    encoding = encode_clips(model, [clip])
    encoding.tokens.cpu()  # waits for the device
    span = clip.seconds[-1] - clip.seconds[0]
    if len(clip.seconds) < 3:
        clip.notes.append("the video has too few frames to see how anything moves")
    if span > 600 or span > 20 * len(clip.seconds):
        clip.notes.append(f"too few frames for {span / 60:.0f} minutes; use python -m apps.timeline")
    return Seen(str(path), clip, encoding, {"read": middle - start, "encode": time.perf_counter() - middle})


def generate(model, encoding, prompts, beams=1, **options):
    """Hawk.generate, or a beam search for each prompt. Raises ValueError where --compile has no compiler."""
    try:
        if beams == 1:
            return model.generate(encoding, prompts, **options)
        rows = zip(encoding.tokens.split(1), prompts, strict=True)
        return [beam_search(model, soft, ids, beams, **options) for soft, ids in rows]
    except (RuntimeError, subprocess.CalledProcessError) as error:  # the latter from Triton's C compiler
        built = isinstance(model.llama.lm_head, RowLinear) and not isinstance(error, torch.OutOfMemoryError)
        require(not built, f"--int8 or --compile failed: {' '.join(str(error).split()[:24])}")
        raise


@torch.no_grad()
def beam_search(model, soft, ids, beams, max_new_tokens=300, eos_id=2, **_):  # _: sampling options
    """Follows the `beams` best continuations of a prompt, soft (1, N, D) and ids (S,), until as many finished
    ones score better than the best unfinished one. The score is the mean log-probability per token. Returns
    the new ids of the best; at max_new_tokens it may be unfinished."""
    x = model.embed(torch.as_tensor(ids, device=model.device)[None], soft).expand(beams, -1, -1)
    cache = KVCache(model.config, beams, x.shape[1] + max_new_tokens, x)
    new = torch.empty(beams, 0, dtype=torch.long, device=x.device)
    score = torch.tensor([0.0] + [-torch.inf] * (beams - 1), device=x.device)  # all start equal: one counts
    finished = []
    for length in range(1, max_new_tokens + 1):
        logits = model.llama.lm_head(model.llama(x, cache)[:, -1]).float()  # (beams, vocabulary)
        score, best = (score[:, None] + logits.log_softmax(-1)).flatten().topk(2 * beams)  # half may end
        rows = best // logits.shape[1]
        token = best % logits.shape[1]
        new = torch.cat([new[rows], token[:, None]], dim=1)  # (2 · beams, length)
        for i in (token[:beams] == eos_id).nonzero()[:, 0].tolist():
            finished.append((score[i].item() / length, new[i].tolist()))
        kept = (token != eos_id).nonzero()[:beams, 0]
        score = score[kept]
        new = new[kept]
        if len(finished) >= beams and sorted(finished)[-beams][0] >= score[0].item() / length:
            break
        for kv in cache.layers:  # beam b continues beam rows[kept[b]]
            kv.copy_(kv[:, rows[kept]])
        x = model.llama.embed_tokens(new[:, -1:])
    return max([*finished, (score[0].item() / length, new[0].tolist())])[1]


def ask(model, tokenizer, video, question=data.DESCRIBE_QUESTIONS[0], history=(), system=data.SYSTEM,
        max_new_tokens=300, **generation):  # fmt: skip
    """Answers a question about a video (a path, or a Seen). history: earlier (question, answer) pairs.
    generation: more options of `generate`, such as on_token. Raises ValueError, for a video VideoError."""
    require(question.strip(), "the question is empty")
    seen = video if isinstance(video, Seen) else encode_video(model, video)
    notes = list(seen.clip.notes)
    config = model.config
    for dropped in range(len(history) + 1):  # drop the oldest rounds until the answer fits
        ids = tokenizer.encode_prompt(question, seen.clip.message, config.n_visual, system, history[dropped:])
        if len(ids) + min(max_new_tokens, config.context_length // 4) <= config.context_length:
            break
    require(len(ids) < config.context_length, f"the question is too long: {len(ids)} tokens with the video")
    if dropped:
        notes.append(f"left out the {dropped} oldest round(s): the conversation has outgrown the context")
    room = min(max_new_tokens, config.context_length - len(ids))
    start = time.perf_counter()
    (new,) = generate(model, seen.encoding, [ids], max_new_tokens=room, eos_id=tokenizer.eos, **generation)
    seconds = seen.seconds | {"generate": time.perf_counter() - start}
    if tokenizer.eos not in new:
        why = "--max-new-tokens sets the limit" if room == max_new_tokens else "the context is full"
        notes.append(f"the answer was cut after {len(new)} tokens; {why}")
    memory = data.peak_memory_mb(model.device)
    return Answer(seen.path, question, tokenizer.decode(new), seconds, len(new), memory, notes)


# ---- Chat and command line ---------------------------------------------------------------------------------
def remarks(answer, prefix=""):  # the notes, then time and memory, one per line
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in answer.seconds.items())
    rate = f"{answer.tokens} tokens, {answer.tokens / answer.seconds['generate']:.1f} a second"
    took = f"{seconds} ({rate}), peak memory {answer.peak_memory_mb:.0f} MB"
    return "\n".join(prefix + line for line in [*answer.notes, took])


def chat(model, tokenizer, seen, questions, **options):
    """Answers these questions about a Seen, then stdin's -> exit status. ctrl-C or an error ends a round."""
    require(sys.stdin, "--chat reads questions from stdin, which is closed")
    sys.stdin.reconfigure(errors="replace")
    readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one question
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""  # only answers go to a file
    note("/help lists the commands")
    rounds = []  # [question, answer], the last one as far as it got
    status = 0

    def show(tokens):
        made.extend(tokens)
        text = tokenizer.decode(made).rstrip("\ufffd")  # a character whose bytes are incomplete
        print(text[len(rounds[-1][1]) :], end="", flush=True)
        rounds[-1][1] = text

    while True:
        try:
            question = (questions.pop(0) if questions else input(prompt)).strip()
            if question in ("/quit", "quit", "exit"):
                return status
            if question == "/new":
                rounds = []
            elif question.startswith("/"):
                note(HELP)
            elif question:
                rounds = [done for done in rounds if done[1]] + [[question, ""]]
                made = []  # the tokens of the answer
                answer = ask(model, tokenizer, seen, question, rounds[:-1], on_token=show, **options)
                print(answer.answer[len(rounds[-1][1]) :], flush=True)  # beam search shows nothing early
                rounds[-1][1] = answer.answer
                note(remarks(answer))
                seen = seen._replace(seconds={})  # later rounds do not read and encode the video again
        except EOFError:
            return status
        except KeyboardInterrupt:
            note("\n(stopped; ctrl-D ends)")
        except PROBLEMS as error:
            status = print_error(error)


def number(kind, low, high=sys.maxsize):  # an argparse type
    def number(text):  # argparse prints this name if the text is not a number
        if low <= kind(text) <= high:  # nan is not within anything
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")

    return number


def add_model_options(p):
    add = p.add_argument_group("model").add_argument
    add("--weights", type=Path, default=WEIGHTS, help="default: weights/hawk-7b if there, else weights/tiny")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32")
    add("--int8", action="store_true", help="LLaMA in int8: half of bfloat16's memory, slightly less exact")
    add("--compile", action="store_true", help="compile the decoding step, for GPUs; takes 10 to 25 seconds")


def main(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("video", nargs="*", action="extend", metavar="VIDEO", help="files, folders of numbered pictures")
    add("--video", nargs="+", action="extend", metavar="VIDEO", help="the same as without --video")
    add("--question", help=f"default: {data.DESCRIBE_QUESTIONS[0]}")
    add("--chat", action="store_true", help="ask about one video in rounds, questions from stdin")
    add("--json", action="store_true", help="one JSON object per video, with times, memory and notes")
    add("--fps", type=number(float, 0.001), default=25.0, help="frames per second of a folder (default: 25)")
    add_model_options(p)
    add = p.add_argument_group("generation").add_argument
    add("--system", default=data.SYSTEM, help="system text of the prompt (default: a space, as in training)")
    add("--max-new-tokens", type=number(int, 1), default=300, help="longest answer (default: 300)")
    add("--temperature", type=number(float, 0), default=0.0, help="0, the default: take the likeliest token")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="likeliest share to draw from (default: 1)")
    add("--beams", type=number(int, 1, 64), default=1, help="width of a beam search (default: 1)")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help=">1: repeat less (default: 1)")
    add("--seed", type=number(int, 0), default=0, help="random seed for --temperature (default: 0)")
    args = p.parse_intermixed_args(argv)
    if not args.video or (args.chat and (args.json or len(args.video) > 1)):
        p.error("give the path of a video; --chat takes only one, and no --json")
    if args.beams > 1 and (args.temperature > 0 or args.repetition_penalty != 1 or args.compile):
        p.error("--beams excludes --temperature, --repetition-penalty and --compile")
    sys.stdout.reconfigure(errors="backslashreplace")
    names = ("system", "max_new_tokens", "temperature", "top_p", "beams", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    status = 0
    try:
        model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
        if args.chat:
            seen = encode_video(model, args.video[0], args.fps)
            return chat(model, tokenizer, seen, [args.question] if args.question else [], **options)
    except PROBLEMS as error:
        return print_error(error)
    question = data.DESCRIBE_QUESTIONS[0] if args.question is None else args.question
    for path in args.video:
        try:
            answer = ask(model, tokenizer, encode_video(model, path, args.fps), question, **options)
            if args.json:
                print(json.dumps(answer._asdict()), flush=True)
            else:
                one_line = f"{path}: {' '.join(answer.answer.split())}"  # whatever line breaks it has
                print(answer.answer if len(args.video) == 1 else one_line, flush=True)
                note(remarks(answer, f"{path}: "))
        except PROBLEMS as error:
            status = print_error(error)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
