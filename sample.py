"""Ask a trained model about a video. In this file: load, encode, answer, chat, the command line.

    python sample.py --video examples/falling.mp4                   # "Can you describe the anomaly …?"
    python sample.py --video a.mp4 b.mp4 --question "Where is it?"  # one line a video, "PATH: answer"
    python sample.py --video a.mp4 b.mp4 --json                     # one JSON object a line, with times
    python sample.py --video a.mp4 --chat                           # rounds that remember each other

Answers go to stdout; times, notes and errors go to stderr. A video that cannot be read does not stop the
others, but the exit status is then 2.
"""

import argparse
import json
import math
import os
import readline
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch

import data
from hawk import Encoding, Hawk, Int8Linear, KVCache, require

WEIGHTS = Path(__file__).parent / "weights"
PROBLEMS = (ValueError, OSError, torch.OutOfMemoryError)  # a wrong file or question, or too small a machine


# ---- From a video to an answer -----------------------------------------------------------------------------
def load(weights, device=None, dtype=None, int8=False, compile=False):
    """A folder of weights -> (model, tokenizer). Raises ValueError that says what is wrong in which file."""
    device = data.usable_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # rounding to int8 happens on the CPU, so that the device never holds the larger matrices
    model = Hawk.from_pretrained(weights, "cpu" if int8 else device, dtype)
    if int8:
        model = quantize_int8(model).to(device)
    model.compile_step = compile
    return model, data.Tokenizer(Path(weights) / "tokenizer.model", model.config.vocab_size)


def quantize_int8(model):
    """Replaces LLaMA's linear layers by Int8Linear; returns the model. Raises ValueError if it has a LoRA."""
    require(not model.config.lora_rank, "these weights hold a LoRA, merge it before --int8: prepare.py merge")
    for name, module in list(model.llama.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.llama.set_submodule(name, Int8Linear(module))
    return model


# A video that was read and encoded, enough to answer any number of questions. seconds: {"read", "encode"}
Seen = namedtuple("Seen", "path clip encoding seconds")
# One object of --json. seconds: {"read", "encode", "generate"}; notes: what to know about the clip
Answer = namedtuple("Answer", "video question answer seconds tokens peak_memory_mb notes")


@torch.no_grad()
def encode_clips(model, clips):
    """Clips -> Encoding of the batch. One by one if they differ in length: frames cannot be padded."""
    if len({len(clip.indices) for clip in clips}) > 1:
        parts = [encode_clips(model, [clip]).tokens for clip in clips]
        return Encoding(torch.cat(parts), {})
    streams = {}
    for name in model.config.branches:
        frames = torch.stack([torch.from_numpy(clip.streams[name]) for clip in clips])  # (B, T, H, W, 3)
        streams[name] = frames.to(model.device).permute(0, 1, 4, 2, 3).float() / 255  # (B, T, 3, H, W)
    return model.encode(streams)


def encode_video(model, path):
    """Reads and encodes a video -> Seen. Raises VideoError."""
    start = time.perf_counter()
    clip = data.read_clip(path, **data.clip_options(model.config))
    middle = time.perf_counter()
    encoding = encode_clips(model, [clip])
    encoding.tokens.cpu()  # waits for the device
    return Seen(str(path), clip, encoding, {"read": middle - start, "encode": time.perf_counter() - middle})


def generate(model, encoding, prompts, beams=1, **options):
    """Hawk.generate, or a beam search for each prompt. Raises ValueError where --compile has no compiler."""
    if beams > 1:
        length = {name: options[name] for name in ("max_new_tokens", "eos_id") if name in options}
        clips = encoding.tokens.split(1)
        return [beam_search(model, *clip, beams, **length) for clip in zip(clips, prompts, strict=True)]
    try:
        return model.generate(encoding, prompts, **options)
    except RuntimeError as error:
        require(
            not model.compile_step, f"--compile: torch.compile failed: {' '.join(str(error).split()[:24])}"
        )
        raise


@torch.no_grad()
def beam_search(model, soft, ids, beams, max_new_tokens=300, eos_id=2):
    """The `beams` best continuations of one prompt, side by side: soft (1, N, D), ids (S,) -> the new ids of
    the best by mean log-probability per token, a finished one or, at the limit, perhaps an open one."""
    x = model.embed(torch.as_tensor(ids, device=model.device)[None], soft)  # (1, S, D)
    cache = KVCache(model.config, beams, x.shape[1] + max_new_tokens, x)
    x = x.expand(beams, -1, -1)
    new = torch.empty(beams, 0, dtype=torch.long, device=x.device)
    score = torch.tensor([0.0] + [-torch.inf] * (beams - 1), device=x.device)  # all are equal: one spreads
    finished = []
    for length in range(1, max_new_tokens + 1):
        logits = model.llama.lm_head(model.llama(x, cache)[:, -1]).float()  # (beams, vocabulary)
        total = score[:, None] + logits.log_softmax(-1)
        score, best = total.flatten().topk(2 * beams)  # of which `beams` are open even if as many have ended
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
        for layer in range(model.config.llama_layers):  # beam b continues beam rows[kept[b]]
            cache.k[layer] = cache.k[layer][rows[kept]]
            cache.v[layer] = cache.v[layer][rows[kept]]
        x = model.llama.embed_tokens(new[:, -1:])
    return max([*finished, (score[0].item() / length, new[0].tolist())])[1]


def fit_prompt(model, tokenizer, seen, question, history, system, max_new_tokens):
    """-> (prompt ids, number of oldest rounds left out to make room for the answer). Raises ValueError if the
    question alone fills the context."""
    limit = model.config.context_length
    room = min(max_new_tokens, limit // 4)
    for dropped in range(len(history) + 1):
        message = seen.clip.message
        ids = tokenizer.encode_prompt(question, message, model.config.n_visual, system, history[dropped:])
        if len(ids) + room <= limit:
            break
    if len(ids) >= limit:
        raise ValueError(f"the question is too long: {len(ids)} tokens with the video, the limit is {limit}")
    return ids, dropped


def ask(model, tokenizer, video, question=data.DESCRIBE_QUESTIONS[0], history=(), system=data.SYSTEM,
        max_new_tokens=300, **generation):  # fmt: skip
    """Answer to a question about a video: a path, or a Seen. Raises ValueError (VideoError for the video).

    history: earlier (question, answer) pairs. generation: more options of Hawk.generate, such as on_token."""
    if not question.strip():
        raise ValueError("the question is empty")
    seen = video if isinstance(video, Seen) else encode_video(model, video)
    ids, dropped = fit_prompt(model, tokenizer, seen, question, list(history), system, max_new_tokens)
    notes = list(seen.clip.notes)
    if dropped:
        notes.append(f"left out the {dropped} oldest round(s): the conversation has outgrown the context")
    room = min(max_new_tokens, model.config.context_length - len(ids))
    start = time.perf_counter()
    options = {"max_new_tokens": room, "eos_id": tokenizer.eos} | generation
    (new,) = generate(model, seen.encoding, [ids], **options)
    seconds = seen.seconds | {"generate": time.perf_counter() - start}
    seconds = {name: round(value, 4) for name, value in seconds.items()}
    memory = data.peak_memory_mb(model.device)
    return Answer(seen.path, question, tokenizer.decode(new), seconds, len(new), memory, notes)


# ---- What is printed ---------------------------------------------------------------------------------------
def note(text):
    print(text, file=sys.stderr, flush=True)


def write(text):
    print(text, end="", flush=True)


def print_error(error):
    """Prints an error as one line; returns the exit status for it."""
    lines = str(error).strip().splitlines()
    if "Traceback" in str(error):  # an error in a loader worker arrives with its traceback
        lines = lines[-1:]
    note(f"error: {' '.join(lines)}")
    return 2


def remarks(answer):
    """Lines for stderr: the notes on an answer, then what it took."""
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in answer.seconds.items())
    rate = answer.tokens / max(answer.seconds["generate"], 1e-9)
    made = f"({answer.tokens} tokens, {rate:.1f} a second), peak memory {answer.peak_memory_mb:.0f} MB"
    return [*answer.notes, f"{seconds} {made}"]


# ---- Chat --------------------------------------------------------------------------------------------------
HELP = """Type a question and press enter. ctrl-C stops an answer, ctrl-D ends the chat.
/new         forget the rounds so far
/video PATH  switch to another video
/save FILE   write all rounds, one line a conversation, as an index that train.py reads
/help        this text"""


class Chat:
    """Rounds about one video, which is read and encoded once. options: those of `ask`."""

    def __init__(self, model, tokenizer, options):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.conversations = []  # rows of an index, {"video", "qa": [{"q", "a"}, …]}; the last one continues

    def open(self, video):
        """Begins a conversation about a video: a path, or a Seen. Raises VideoError."""
        self.seen = video if isinstance(video, Seen) else encode_video(self.model, video)
        self.conversations.append({"video": os.path.abspath(self.seen.path), "qa": []})

    def say(self, question, write=write, tell=note):
        """Writes the answer as it is made, then tells what it took."""
        rounds = self.conversations[-1]["qa"]
        history = [(turn["q"], turn["a"]) for turn in rounds]
        made = []
        shown = ""

        def show(tokens):
            nonlocal shown
            made.extend(tokens)
            text = self.tokenizer.decode(made)
            if not text.endswith("\ufffd"):  # otherwise some bytes of the last character are still missing
                piece = text[len(shown) :]
                shown = text
                write(piece)

        options = self.options | {"history": history, "on_token": show}
        try:
            answer = ask(self.model, self.tokenizer, self.seen, question, **options)
            write(answer.answer[len(shown) :])  # beam search shows nothing before its end
            shown = answer.answer
        finally:  # an answer that ctrl-C stopped counts as far as it got
            if shown:
                rounds.append({"q": question, "a": shown})
            write("\n")
        self.seen = self.seen._replace(seconds={})  # later rounds need not read and encode the video
        for line in remarks(answer):
            tell(line)

    def handle_line(self, line):
        """One line of input: a command or a question."""
        match line.split(maxsplit=1):
            case ["/new"]:
                self.open(self.seen)
            case ["/video", path]:
                self.open(path)
            case ["/save", path]:
                rows = [json.dumps(row) + "\n" for row in self.conversations if row["qa"]]
                data.replace_file(path, "".join(rows))
                note(f"{path}: {len(rows)} conversation(s)")
            case [command, *_] if command.startswith("/"):
                note(HELP)
            case [_, *_]:
                self.say(line)

    def run(self, line):
        """Handles a first line, then those of stdin until its end. ctrl-C or an error ends the line only.
        Returns the exit status."""
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""  # only answers go to a file
        status = 0
        while True:
            try:
                self.handle_line(line.strip())
                line = input(prompt)
            except EOFError:
                return status
            except KeyboardInterrupt:
                line = ""
                note("(stopped; ctrl-D ends)")
            except PROBLEMS as error:
                line = ""
                status = print_error(error)


# ---- Command line ------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that starts with "error:"."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # nan is not within anything
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse's messages show it
    return convert


def add_model_options(p):
    add = p.add_argument_group("model").add_argument
    add("--weights", help="folder of weights (default: weights/hawk-7b if it exists, else weights/tiny)")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32")
    add("--int8", action="store_true", help="LLaMA in int8: half of bfloat16's memory, slightly less exact")
    add("--compile", action="store_true", help="compile the decoding step, for GPUs; takes about a minute")


def weights_folder(args):
    if args.weights:
        return Path(args.weights)
    real = WEIGHTS / "hawk-7b"
    return real if real.is_dir() else WEIGHTS / "tiny"


def is_bundled(folder):
    """Whether these are the small weights of this repository, which know the toy world only."""
    return Path(folder).resolve() == WEIGHTS.resolve() / "tiny"


def load_from_options(args):
    """(model, tokenizer) for the options of add_model_options."""
    if args.compile and getattr(args, "beams", 1) > 1:  # beam search does not take the compiled step
        raise ValueError("--beams and --compile exclude each other")
    folder = weights_folder(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if is_bundled(folder):
        real = f"for real videos put the 7B weights into {WEIGHTS / 'hawk-7b'}"
        note(f"note: {folder} knows the toy world only; {real} (README: python prepare.py weights)")
    return load(folder, args.device, dtype, args.int8, args.compile)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--video", nargs="+", action="extend", required=True, metavar="PATH", help="one or more video files")
    add("--question", help=f"default: {data.DESCRIBE_QUESTIONS[0]}")
    add("--chat", action="store_true", help="ask round after round, questions from stdin")
    add("--json", action="store_true", help="one JSON object a video, also with times, memory and notes")
    add_model_options(p)
    add = p.add_argument_group("generation").add_argument
    add("--system", default=data.SYSTEM, help="system text of the prompt (default: a space, as in training)")
    add("--max-new-tokens", type=number(int, 1), default=300, help="longest answer (default: 300)")
    add("--temperature", type=number(float, 0), default=0.0, help="0, the default: always the likeliest word")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="draw from the likeliest with this sum")
    add("--beams", type=number(int, 1, 64), default=1, help="width of a beam search")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help="above 1: fewer repeated words")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of --temperature")
    args = p.parse_args(argv)
    if args.beams > 1 and (args.temperature > 0 or args.repetition_penalty != 1):
        p.error("--beams excludes --temperature and --repetition-penalty")
    if args.chat and (args.json or len(args.video) > 1):
        p.error("--chat takes one --video and no --json")
    return args


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    names = ("system", "max_new_tokens", "temperature", "top_p", "beams", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    status = 0
    try:
        model, tokenizer = load_from_options(args)
        if args.chat:
            sys.stdin.reconfigure(errors="replace")
            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one question
            chat = Chat(model, tokenizer, options)
            chat.open(args.video[0])
            return chat.run(args.question or "")
    except PROBLEMS as error:
        return print_error(error)
    question = data.DESCRIBE_QUESTIONS[0] if args.question is None else args.question
    for path in args.video:
        try:
            answer = ask(model, tokenizer, path, question, **options)
        except PROBLEMS as error:
            status = print_error(error)
            continue
        if args.json:
            print(json.dumps(answer._asdict()), flush=True)
        else:
            print(answer.answer if len(args.video) == 1 else f"{path}: {answer.answer}", flush=True)
            for line in remarks(answer):
                note(f"{path}: {line}")
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head -1` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
