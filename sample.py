"""Ask a trained model about a video.

    python sample.py --video examples/falling.mp4                                # "Can you describe the anomaly in the video?"
    python sample.py --video a.mp4 b.mp4 --question "Who is involved?"           # one answer a line, "PATH: answer"
    python sample.py --video a.mp4 b.mp4 --json                                  # one object a line, with times and memory
    python sample.py --video a.mp4 --temperature 0.7 --top-p 0.9 --seed 1        # other words for each seed
    python sample.py --video a.mp4 --chat                                        # rounds that remember each other; /help

Answers go to stdout; times, notes and errors go to stderr, an error as one line that starts with "error:". A video that
cannot be read does not stop the others. Exit status: 0, or 2 if anything failed. From Python:

    model, tokenizer = load("weights/tiny")
    print(ask(model, tokenizer, "a.mp4", "Who is involved?").answer)
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DESCRIBE_QUESTIONS, SYSTEM, Tokenizer, peak_memory_mb, read_clip, read_flow, usable_device
from hawk import Encoding, Hawk

WEIGHTS = Path(__file__).parent / "weights"
PROBLEMS = (ValueError, OSError, torch.OutOfMemoryError)  # what a wrong file, question or machine raises


# ---- Model, video, answer: what other programs import ----------------------------------------------------------------
def load(weights, device=None, dtype=None, int8=False):
    """A folder of weights -> (model, tokenizer). Raises ValueError, one line, for anything that does not fit.

    int8: rounds LLaMA's weights on the CPU, so that the device never holds the larger ones."""
    device = usable_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = Hawk.from_pretrained(weights, "cpu" if int8 else device, dtype)
    if int8:
        model = quantize_int8(model).to(device)
    use_onednn(model)
    return model, Tokenizer(Path(weights) / "tokenizer.model", model.config.vocab_size)


def small_world(config):
    """Whether these are small weights with a vocabulary of their own, trained from nothing on the toy world."""
    return config.vocab_size < 32000


def context_length(config):
    """The most tokens a prompt and its answer may have: LLaMA-2's 4096, or what a small model saw in training."""
    return 512 if small_world(config) else 4096


# A clip and what the model makes of it, an Encoding of a batch of one: enough to answer any number of questions
Seen = namedtuple("Seen", "path clip encoding seconds")  # seconds: {"read", "encode"}
# One object of --json
Answer = namedtuple("Answer", "video question answer seconds tokens peak_memory_mb")  # seconds: also "generate"


def spent(seconds):
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


@torch.no_grad()
def encode_clips(model, clips):
    """Clips -> Encoding of the batch. Together if they have the same number of frames; short clips are not padded."""
    if len({len(clip.appearance) for clip in clips}) > 1:
        alone = [vars(encode_clips(model, [clip])) for clip in clips]
        return Encoding(**{name: torch.cat([encoding[name] for encoding in alone]) for name in alone[0]})
    streams = ([getattr(clip, stream) for clip in clips] for stream in ("appearance", "motion"))
    frames = (torch.stack([torch.from_numpy(x) for x in stream]).to(model.device) for stream in streams)
    return model.encode(*(x.permute(0, 1, 4, 2, 3).float() / 255 for x in frames))


def look(model, path):
    """Reads and encodes a video, once. Raises VideoError."""
    c, start = model.config, time.perf_counter()
    clip = read_clip(path, c.n_frames, c.image_size, motion=c.motion)
    middle = time.perf_counter()
    encoding = encode_clips(model, [clip])
    encoding.tokens.cpu()  # waits for the device
    return Seen(str(path), clip, encoding, {"read": middle - start, "encode": time.perf_counter() - middle})


def fit_prompt(model, tokenizer, seen, question, history, system, max_new_tokens):
    """-> (prompt ids, how many of the oldest rounds are left out, so that an answer of max_new_tokens fits, or of a quarter
    of the context if that is less). Raises ValueError if even none is too much."""
    n_visual, limit = model.config.n_visual, context_length(model.config)
    for forgotten in range(len(history) + 1):
        ids = tokenizer.encode_prompt(question, seen.clip.message, n_visual, system, history[forgotten:])
        if len(ids) + min(max_new_tokens, limit // 4) <= limit:
            break
    if len(ids) >= limit:
        raise ValueError(f"the question is too long: {len(ids)} tokens with the video, these weights take {limit}")
    return ids, forgotten


def ask(model, tokenizer, video, question=DESCRIBE_QUESTIONS[0], history=(), system=SYSTEM, on_text=None,
        max_new_tokens=128, **generation):  # fmt: skip
    """The answer to a question about a video (a path, or what `look` returned), as an Answer.

    history: earlier (question, answer) pairs. on_text(str): called with each new piece of the answer as it is made.
    generation: options of Hawk.generate. Raises ValueError (VideoError for a video that gives no frames).
    """
    if not question.strip():
        raise ValueError("the question is empty")
    seen = video if isinstance(video, Seen) else look(model, video)
    ids, _ = fit_prompt(model, tokenizer, seen, question, list(history), system, max_new_tokens)
    room = context_length(model.config) - len(ids)
    start, made, said = time.perf_counter(), [], ""

    def show(tokens):
        nonlocal said
        made.extend(tokens)
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # else a letter of which some bytes are still to come
            on_text(text[len(said) :])
            said = text

    new = model.generate(
        None, None, [ids], min(max_new_tokens, room), eos_id=tokenizer.eos, encoding=seen.encoding,
        on_token=show if on_text else None, **generation,
    )[0]  # fmt: skip
    answer = tokenizer.decode(new)
    if on_text and answer != said:  # beams say nothing on the way
        on_text(answer[len(said) :])
    seconds = seen.seconds | {"generate": time.perf_counter() - start}
    seconds = {name: round(value, 4) for name, value in seconds.items()}
    return Answer(seen.path, question, answer, seconds, len(new), peak_memory_mb(model.device))


def flow_colours(flow):
    """Flow (…, 2) -> (…, 3) uint8. The hue is the direction (right red, down green, left cyan, up violet), the brightness
    the root of the speed: the fastest of all, if it is a pixel a frame or more, is as bright as can be."""
    angle, speed = np.arctan2(flow[..., 1:], flow[..., :1]), np.hypot(flow[..., 1:], flow[..., :1])  # (…, 1)
    hue = np.clip(0.5 + np.cos(angle - np.arange(3) * (2 * np.pi / 3)), 0, 1)  # (…, 3)
    return np.rint(255 * hue * np.sqrt(speed / max(speed.max(), 1))).astype(np.uint8)


def motion_sheet(path, clip, columns=8):
    """A picture (H, W, 3) of a clip: frames, below them the same frames as the motion branch sees them, and the flow from
    the frame before each, for which the video is read once more. Raises VideoError."""
    T = len(clip.appearance)
    order = np.unique(np.linspace(0, T - 1, min(columns, T)).astype(int))
    flow = flow_colours(read_flow(path, clip.indices[order], clip.appearance.shape[1]))
    return np.concatenate([np.concatenate(row, axis=1) for row in (clip.appearance[order], clip.motion[order], flow)])


def write_picture(sheet, path):
    """(H, W, 3) uint8 -> PNG file"""
    options = f"-nostdin -v error -y -f rawvideo -pix_fmt rgb24 -s {sheet.shape[1]}x{sheet.shape[0]} -i pipe:0 "
    options += "-frames:v 1 -c:v png -f image2 -update 1"
    temporary = Path(f"{path}.tmp")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), f"file:{temporary}"]
    done = subprocess.run(command, input=sheet.tobytes(), capture_output=True)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({done.stderr.decode(errors='replace').strip()})")
    os.replace(temporary, path)


# ---- int8: LLaMA's weights at half the memory of bfloat16, for inference only ----------------------------------------
FEW_ROWS = 8  # so many rows at once, as in decoding, wait for the weights to be read; more wait for the arithmetic


class Int8Linear(nn.Module):
    """Stands in for an nn.Linear without bias: (…, in) -> (…, out) in the dtype of the input. Each row of the weight becomes
    whole numbers of -127…127 and one scale: W ≈ scale · int8, wrong by half a step of the row's largest weight / 127."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).to(linear.weight.dtype)  # rounded before it is used
        weight = (weight / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if not torch.compiler.is_compiling() and len(rows) <= FEW_ROWS and has_kernel(x.device.type):
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).unflatten(0, x.shape[:-1])
        # the same with the scale as float32; without, torch.compile puts torch's own kernel there, see has_kernel
        scale = self.scale.float() if x.is_cuda else self.scale
        return (F.linear(x, self.weight.to(x.dtype)) * scale).to(x.dtype)


def has_kernel(device_type):
    """Whether torch multiplies with int8 weights as they are there; otherwise they are turned into floats each time, by
    torch.compile as they are read. CUDA's kernel (torch 2.9 on) is left alone: one thread goes through a whole row."""
    return device_type != "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::_weight_int8pack_mm", device_type.upper()
    )


def quantize_int8(model):
    """Replaces all linear layers of a Hawk's LLaMA (embeddings, norms and the branches stay); returns the model. With LoRA
    it raises ValueError: a correction beside rounded weights is not what was trained."""
    if model.config.lora_rank:
        raise ValueError("these weights hold a LoRA, merge it before --int8: python prepare.py merge")
    for name, module in list(model.llama.named_modules()):
        if isinstance(module, nn.Linear):
            model.llama.set_submodule(name, Int8Linear(module))
    return model


# ---- oneDNN: faster products of float32 on a CPU, for inference only -------------------------------------------------
class OneDNNLinear(nn.Linear):
    """An nn.Linear whose product is oneDNN's; torch's own is MKL's, which on AMD takes 1.6 times as long for one row, twice
    for a few and 1.1 times for a thousand. With gradients, in torch.compile and elsewhere than on a CPU it is torch's."""

    def forward(self, x):
        fits = x.is_cpu and x.dtype == self.weight.dtype
        if not fits or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        rows, shape = x.flatten(0, -2), x.shape[:-1]
        # oneDNN keeps half a megabyte for each number of rows that it has met, and prompts have any
        rows = F.pad(rows, (0, 0, 0, -len(rows) % 16 if len(rows) > 16 else 0))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return y[: shape.numel()].unflatten(0, shape)


def use_onednn(model):
    """Makes the large linear layers of a model OneDNNLinear where they are float32 on a CPU of the kind that oneDNN is made
    for; returns the model. Not smaller ones: a call takes 10 µs longer to begin."""
    usable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    for module in model.modules() if usable else ():
        if type(module) is nn.Linear and module.weight.numel() >= 1 << 19:
            if module.weight.is_cpu and module.weight.dtype == torch.float32:
                module.__class__ = OneDNNLinear
    return model


# ---- Compiled decoding -----------------------------------------------------------------------------------------------
def compile_decoding(model):
    """Compiles what LLaMA does for each further token; returns the model. Small steps become one kernel, and a GPU records
    all kernels once as a CUDA graph: one by one they take longer to start than to run. The first answer waits for the
    compiler, and so does the first of each other batch size or length of the cache (a power of two)."""
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}  # the latter for products with one row
    eager, kept = model.llama.through_layers, {}  # keys and values by shape: a graph wants them where they once were
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, options=options)

    def through_layers(x, positions, mask, cache):
        if cache is None or x.shape[1] > 1 or not cache.static:
            return eager(x, positions, mask, cache)
        held = kept.setdefault(cache.k[0].shape, (cache.k, cache.v))
        for old, new in zip(held[0] + held[1], cache.k + cache.v, strict=True):
            torch._dynamo.mark_static_address(old)
            if new is not old:
                old.copy_(new)
        cache.k, cache.v = held
        torch._dynamo.config.recompile_limit = 256  # shapes; here, because it holds for this thread only
        try:
            return compiled(x, positions, mask, cache)
        except torch._dynamo.exc.TorchDynamoException as error:  # such as a machine without a C++ compiler
            raise ValueError(f"--compile: torch.compile failed: {' '.join(str(error).split()[:24])}") from error

    model.static_cache = True
    model.llama.through_layers = through_layers
    return model


# ---- Chat ------------------------------------------------------------------------------------------------------------
HELP = """Write a question and press enter. ctrl-C stops an answer, ctrl-D ends.
/new         forget what was said about this video
/video PATH  look at another video
/save FILE   write all rounds so far, one line a video: an index that train.py reads
/help        this text"""


def note(text):
    print(text, file=sys.stderr, flush=True)


def write(text):
    print(text, end="", flush=True)


class Chat:
    """Rounds about one video, which is read and encoded once."""

    def __init__(self, model, tokenizer, system, generation):
        self.model, self.tokenizer, self.system, self.generation = model, tokenizer, system, generation
        self.seen, self.history, self.waited, self.transcript = None, [], "", []

    def open(self, path):
        self.seen, self.history = look(self.model, path), []
        self.waited = spent(self.seen.seconds)
        self.transcript.append({"video": os.path.abspath(path), "qa": []})

    def say(self, question, write=write, tell=note):
        """Writes the answer as it is made, and tells its times; what was said is remembered, also if stopped."""
        if self.seen is None:
            raise ValueError("no video yet: /video PATH")
        length = self.generation["max_new_tokens"]
        forgotten = fit_prompt(self.model, self.tokenizer, self.seen, question, self.history, self.system, length)[1]
        if forgotten:
            tell(f"forgot the {forgotten} oldest round(s): the conversation has outgrown the context")
        self.history, said, first, start = self.history[forgotten:], [], [], time.perf_counter()

        def show(text):
            first.append(time.perf_counter() - start)
            said.append(text)
            write(text)

        try:
            given = {"history": self.history, "system": self.system, "on_text": show}
            ask(self.model, self.tokenizer, self.seen, question, **given, **self.generation)
        finally:
            answer = "".join(said).strip()
            if answer:
                self.history.append((question, answer))
                self.transcript[-1]["qa"].append({"q": question, "a": answer})
            write("\n")
        after = f" after {self.waited} for the video" if self.waited else ""
        tell(f"first word {first[0] if first else 0:.2f} s{after}, whole answer {time.perf_counter() - start:.2f} s")
        self.waited = ""

    def save(self, path):
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.transcript if row["qa"]]
        Path(path + ".tmp").write_text("".join(rows), encoding="utf-8", errors="replace")
        os.replace(path + ".tmp", path)
        note(f"{path}: {len(rows)} video(s)")

    def obey(self, line):
        """One line of input: a command or a question."""
        match line.split(maxsplit=1):
            case ["/new", *_]:
                self.history = []
            case ["/video", path]:
                self.open(path)
            case ["/save", path]:
                self.save(path)
            case ["/help", *_]:
                note(HELP)
            case ["/video" | "/save" as command]:
                raise ValueError(f"{command} needs a path")
            case [command, *_] if command.startswith("/"):
                raise ValueError(f"no command {command}; /help lists them")
            case _:
                self.say(line)

    def run(self, lines):
        """Until the lines end; ctrl-C stops what is being done, and an error is one line. Returns the exit status."""
        status, lines = 0, filter(None, map(str.strip, lines))
        while True:
            try:
                for line in lines:
                    self.obey(line)
                return status
            except KeyboardInterrupt:
                note("(stopped; ctrl-D ends)")
            except PROBLEMS as error:
                status = complain(error)


def typed_lines():
    """Lines of stdin, with a prompt and line editing at a terminal. An iterator that outlives ctrl-C."""
    sys.stdin.reconfigure(errors="replace")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return iter(sys.stdin.readline, "")
    import readline  # gives input() its line editing

    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one question, whatever its lines

    def read():
        try:
            return input("> ") + "\n"
        except EOFError:
            print()
            return ""

    return iter(read, "")


# ---- Command line ----------------------------------------------------------------------------------------------------
def complain(error):
    """The error as one line; returns the exit status that says so."""
    lines = str(error).strip().splitlines()
    lines = lines[-1:] if "Traceback" in str(error) else lines  # a loader process sends all of it
    note(f"error: {' '.join(lines)}")
    return 2


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line that starts with "error:"."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message} (--help explains)\n")


def number(kind, low, high=float("inf")):
    """An argparse type: a finite int or float within low … high."""

    def convert(text):
        value = kind(text)
        if not (low <= value <= high and abs(value) < float("inf")):  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


def add_model_options(p):
    add = p.add_argument_group("model").add_argument
    add("--weights", help="folder of weights (default: weights/hawk-7b if it is there, else weights/tiny)")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32")
    add("--int8", action="store_true", help="LLaMA's weights in int8: half bfloat16's memory, slightly other numbers")
    add("--compile", action="store_true", help="compile the making of words: meant for GPUs; costs a minute at first")


def weights_folder(args):
    real = WEIGHTS / "hawk-7b"
    return Path(args.weights or (real if real.is_dir() else WEIGHTS / "tiny"))


def load_from_options(args):
    """(model, tokenizer) for the model options, with one line on stderr when these weights know only the toy world."""
    folder, real = weights_folder(args), WEIGHTS / "hawk-7b"
    if args.compile and getattr(args, "beams", 1) > 1:  # which move what a graph would have to find in its place
        raise ValueError("--beams and --compile exclude each other")
    model, tokenizer = load(folder, args.device, getattr(torch, args.dtype) if args.dtype else None, args.int8)
    if args.compile:
        compile_decoding(model)
    if small_world(model.config):
        note(
            f"note: the small weights in {folder} know the toy world only; for real videos put the 7B weights into "
            f"{real} (README: python prepare.py weights)"
        )
    return model, tokenizer


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--video", nargs="+", action="extend", default=[], metavar="PATH", help="one or more video files")
    add("--question", help=f"default: {DESCRIBE_QUESTIONS[0]}")
    add("--chat", action="store_true", help="ask round after round (questions from stdin)")
    add("--show-motion", metavar="FILE", help="also write a PNG: frames, what the motion branch sees, optical flow")
    add("--json", action="store_true", help="one JSON object a video: answer, seconds, tokens, peak memory")
    add("--system", default=SYSTEM, help="system text of the prompt (default: a space, as in training)")
    add_model_options(p)
    add = p.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=number(int, 1), default=128, help="longest answer (default: 128)")
    add("--temperature", type=number(float, 0), default=0.0, help="0: always the likeliest word (default)")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="sample from the likeliest words that reach this")
    add("--beams", type=number(int, 1, 64), default=1, help="continuations followed side by side")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help="above 1: fewer repeated words")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of --temperature")
    args = p.parse_args(argv)
    if args.beams > 1 and args.temperature > 0:
        p.error("--beams and --temperature exclude each other")
    if args.chat and (args.json or len(args.video) > 1):
        p.error("--chat takes one --video and no --json")
    if not args.chat and not args.video:
        p.error("--video is missing")
    if args.show_motion and (args.chat or len(args.video) > 1):
        p.error("--show-motion takes one --video and no --chat")
    if args.show_motion and os.path.realpath(args.show_motion) == os.path.realpath(args.video[0]):
        p.error(f"--show-motion {args.show_motion} is the video itself")
    return args


def answer(model, tokenizer, path, args, generation):
    """Prints what is asked about one video; raises what `ask` and `write_picture` do."""
    seen = look(model, path)
    if args.show_motion:
        write_picture(motion_sheet(path, seen.clip), args.show_motion)
    question = DESCRIBE_QUESTIONS[0] if args.question is None else args.question
    result = ask(model, tokenizer, seen, question, system=args.system, **generation)
    if args.json:
        return print(json.dumps(result._asdict()), flush=True)
    print(result.answer if len(args.video) == 1 else f"{path}: {result.answer}", flush=True)
    rate = result.tokens / max(result.seconds["generate"], 1e-9)
    made = f"({result.tokens} tokens, {rate:.1f} a second), peak memory {result.peak_memory_mb:.0f} MB"
    note(f"{path}: {spent(result.seconds)} {made}")


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    names = ("max_new_tokens", "temperature", "top_p", "beams", "repetition_penalty", "seed")
    generation, status = {name: getattr(args, name) for name in names}, 0
    try:
        model, tokenizer = load_from_options(args)
        if args.chat:
            chat = Chat(model, tokenizer, args.system, generation)
            if args.video:
                chat.open(args.video[0])
            return chat.run(chain([args.question or ""], typed_lines()))
    except PROBLEMS as error:
        return complain(error)
    for path in args.video:
        try:
            answer(model, tokenizer, path, args, generation)
        except PROBLEMS as error:
            status = complain(error)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
