"""How fast, beside what one would otherwise run: one JSON object a line, then a table.

    python tests/bench.py --quick            # under two minutes on a CPU
    python tests/bench.py                    # also the 10-minute video and the LLaMA of a billion parameters
    python tests/bench.py --only flow encode growth
    python tests/bench.py --only load        # 1,000 clips (--quick: 200) through apps.evaluate: does its memory grow?

{"name", "ours", "peer", "ratio", "unit", "note"}: ratio above 1 means that we are faster. Ours and the peer run in turn in
this process, on the same machine, with the same threads, each once to warm up; the median of some runs counts. Peers:
decord + OpenCV (pip install decord) for reading a clip as the released code does, OpenCV's flow, transformers' BLIP-2
towers and LLaMA on the same weights; for training, the same training without the cache. Parts that need a GPU say so
where there is none.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Tokenizer, farneback, read_clip, sample_frames  # noqa: E402
from hawk import Encoding, Hawk, HawkConfig  # noqa: E402
from sample import use_onednn  # noqa: E402

SMALL_EYES = dict(
    vit_dim=64, vit_depth=1, vit_heads=2, vit_mlp=64,
    qformer_dim=64, qformer_layers=1, qformer_heads=2, qformer_mlp=64,
)  # fmt: skip
REAL_EYES = {name: getattr(HawkConfig(), name) for name in SMALL_EYES}
ONE_BILLION = dict(llama_dim=2048, llama_layers=20, llama_heads=16, llama_mlp=5632)
GPU_ONLY = "needs a GPU, none is here"
COPIED, SIDE = 1 << 30, 8192  # bytes of the copy and side of the matrix that tell what a card can do


def medians(runs, repeat):
    """Median seconds of each; run in turn, so that what else the machine does meets all. The first turn does not count."""

    def clock(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    turns = [[clock(run) for run in runs] for _ in range(repeat + 1)]
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def seconds(run, repeat):
    return medians([run], repeat)[0]


def compare(name, ours, peer, repeat=3, note="", unit="s"):
    """Times both. A peer of None is one that is not installed."""
    a, b = medians([ours, peer], repeat) if peer else (seconds(ours, repeat), None)
    return row(name, a, b, b and b / a, unit, note)


def row(name, ours, peer, ratio, unit, note):
    digits = {"ours": ours, "peer": peer, "ratio": ratio}
    return {"name": name} | {k: v and float(f"{v:.3g}") for k, v in digits.items()} | {"unit": unit, "note": note}


# ---- Reading a clip --------------------------------------------------------------------------------------------------
def make_video(path, duration):
    """720p at 25 frames a second, moving, as a camera's encoder would write it."""
    source = f"testsrc2=size=1280x720:rate=25:duration={duration},noise=alls=6:allf=t"
    options = "-loglevel error -y -f lavfi -i".split(), "-c:v libx264 -preset ultrafast -g 50 -pix_fmt yuv420p".split()
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *options[0], source, *options[1], str(path)], check=True)


def loop_video(source, path, times):
    options = ["-stream_loop", str(times - 1), "-i", str(source), "-c", "copy", str(path)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *options], check=True)


def released_reading(path, once=False):
    """-> (appearance, motion), as the released code reads a clip: it opens the video for the sampled frames, then again for
    the motion, when all frames are decoded at 224×224 and kept, and OpenCV finds the flow of each sampled one.
    once: all from the second opening."""
    import cv2
    import decord

    def reader():
        return decord.VideoReader(str(path), height=224, width=224)

    video, motion = reader(), []
    indices = sample_frames(len(video), 32)
    if not once:
        appearance, video = video.get_batch(indices).asnumpy(), reader()
    frames = video.get_batch(range(len(video))).asnumpy()
    for i in np.maximum(indices, 1):
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[i - 1 : i + 1]]
        flow = cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 3, 10, 3, 5, 1.2, 0)
        motion.append(frames[i] * (cv2.cartToPolar(flow[..., 0], flow[..., 1])[0] > 0.2)[..., None])
    return frames[indices] if once else appearance, np.stack(motion)


def reading(args):
    try:
        import decord  # noqa: F401
    except ImportError:
        decord = None
    with tempfile.TemporaryDirectory() as folder:
        for name, duration in [("6 s of 720p", 6)] + [("10 min of 720p", 600)] * (not args.quick):
            path = Path(folder) / f"{duration}.mp4"
            make_video(path, min(duration, 6))
            if duration > 6:
                short, path = path, path.with_name("long.mp4")
                loop_video(short, path, duration // 6)
            ours, repeat = lambda path=path: read_clip(path), 5 if duration < 60 else 1
            if decord is None:
                yield compare(f"clip, {name}", ours, None, repeat, "decord is not installed")
                continue
            clip, (appearance, motion) = ours(), released_reading(path)
            np.testing.assert_array_equal(clip.appearance, appearance)
            assert ((clip.motion > 0) == (motion > 0)).mean() > 0.999
            for once, note in (False, "as the released code reads"), (True, "the same, decoded only once"):
                peer = lambda path=path, once=once: released_reading(path, once)  # noqa: E731
                yield compare(f"clip, {name}" + ", once" * once, ours, peer, repeat, "decord + OpenCV, " + note)


def flow(args):
    import cv2

    generator = np.random.default_rng(0)
    first = cv2.GaussianBlur(generator.uniform(0, 255, (16, 224, 224)).astype(np.float32).transpose(1, 2, 0), (9, 9), 2)
    first = np.ascontiguousarray(first.transpose(2, 0, 1)).astype(np.uint8)
    second = np.roll(first, 2, axis=2)

    def peer():
        for a, b in zip(first, second, strict=True):
            cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 10, 3, 5, 1.2, 0)

    yield compare("optical flow, 16 pairs", lambda: farneback(first, second), peer, 5, "OpenCV")
    if not torch.cuda.is_available():
        yield row("optical flow, 16 pairs, GPU", None, None, None, "-", GPU_ONLY)
    else:
        pair = [torch.from_numpy(x).to("cuda") for x in (first, second)]
        yield compare("optical flow, 16 pairs, GPU", lambda: farneback(*pair).cpu(), peer, 5, "OpenCV on the CPU")


# ---- The model -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def encode(args):
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = HawkConfig(vit_depth=2 if args.quick else 4, llama_layers=1, llama_dim=64, llama_heads=2, video_layers=1)
    n, repeat = (2, 5) if args.quick else (8, 5)
    images, model = torch.rand(n, 3, 224, 224), use_onednn(Hawk(config).eval())  # as sample.load
    reference = Blip2VisionModel(Blip2VisionConfig(
        hidden_size=config.vit_dim, intermediate_size=config.vit_mlp, num_hidden_layers=config.vit_depth,
        num_attention_heads=config.vit_heads, image_size=224, patch_size=14, hidden_act="gelu",
    )).eval()  # fmt: skip
    note = f"transformers' BLIP-2 tower of the same size, {config.vit_depth} of 39 blocks, float32"
    yield compare(f"ViT-g, {n} frames", lambda: model.vit(images), lambda: reference(images), repeat, note)
    queries, qformer, reference = qformers(model.appearance)
    features = torch.randn(n, 257, config.vit_dim)
    ours, theirs = qformer(queries, features), reference(queries.expand(n, -1, -1), encoder_hidden_states=features)
    torch.testing.assert_close(ours, theirs.last_hidden_state, rtol=1e-3, atol=1e-4)
    yield compare(
        f"Q-Former, {n} frames",
        lambda: qformer(queries, features),
        lambda: reference(queries.expand(n, -1, -1), encoder_hidden_states=features),
        repeat,
        "transformers' BLIP-2 Q-Former, same weights, all 12 layers, float32",
    )


def qformers(branch):
    """A branch's queries, its frame Q-Former and transformers' with the same weights."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    peer, tensors = Blip2QFormerModel(Blip2QFormerConfig()).eval(), {}
    for name, tensor in branch.qformer.state_dict().items():
        for ours, theirs in (
            ("layers.", "encoder.layer."),
            ("self_attention.", "attention.attention."),
            ("cross_attention.", "crossattention.attention."),
            ("attention.attention.output.", "attention.output.dense."),
            ("attention.attention.norm.", "attention.output.LayerNorm."),
            ("mlp.fc1.", "intermediate_query.dense."),
            ("mlp.fc2.", "output_query.dense."),
            ("mlp.norm.", "output_query.LayerNorm."),
        ):
            name = name.replace(ours, theirs)
        tensors["layernorm" + name[4:] if name.startswith("norm.") else name] = tensor
    peer.load_state_dict(tensors)
    return branch.queries, branch.qformer, peer


@torch.no_grad()
def generation(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"0.1B": dict(llama_dim=768, llama_layers=12, llama_heads=12, llama_mlp=2048, vocab_size=8000)}
    if not args.quick:
        sizes["1B"] = ONE_BILLION
    for name, size in sizes.items():
        model = use_onednn(Hawk(HawkConfig(**SMALL_EYES, **size)).eval())  # as sample.load does
        c, new = model.config, 32 if args.quick else 64
        peer = LlamaForCausalLM(LlamaConfig(
            hidden_size=c.llama_dim, intermediate_size=c.llama_mlp, num_hidden_layers=c.llama_layers,
            num_attention_heads=c.llama_heads, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
        )).eval()  # fmt: skip
        weights = {
            name if name.startswith("lm_head") else f"model.{name}": p for name, p in model.llama.state_dict().items()
        }
        peer.load_state_dict(weights)
        encoding = Encoding(torch.randn(1, c.n_visual, c.llama_dim), None, None)
        ids = torch.cat([torch.full((1, c.n_visual), c.image_id), torch.randint(3, c.vocab_size, (1, 40))], dim=1)
        embeds = model.embed(ids, encoding.tokens)
        fixed = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        ours = lambda: model.generate(None, None, ids, new, eos_id=-1, encoding=encoding)  # noqa: E731, B023
        note = f"transformers' generate, {new} tokens, float32"
        yield compare(f"generate, LLaMA {name}", ours, lambda: peer.generate(inputs_embeds=embeds, **fixed), 3, note)  # noqa: B023


def training(args):
    """Samples a second of `train.py --stage 2` from the cache and from the videos: of the tiny preset, on a GPU of the
    7B one with random weights and the toy world's vocabulary (needs 17 GB of disk), and what that holds in memory."""
    gpu = torch.cuda.is_available()
    clips, steps, batch = (96, 40, 16) if gpu else (16, 12, 8) if args.quick else (64, 40, 8)
    with tempfile.TemporaryDirectory() as folder:

        def run(*command):
            subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True, capture_output=True)

        def train(out, steps, *more):
            """(samples a second in the second half of the steps, when what the loader held at the start is used up; peak GB)"""
            common = ["--stage", 2, "--data", "toy", "--batch-size", batch, "--workers", 8 if gpu else 2]
            run(ROOT / "train.py", "--weights", weights, *common, "--steps", steps, "--out", out, *more)
            lines = [json.loads(line) for line in (Path(folder) / out / "log.jsonl").read_text().splitlines()]
            half, end = (line["step"] * batch / line["samples_per_s"] for line in (lines[steps // 2 - 1], lines[-1]))
            return steps // 2 * batch / (end - half), lines[-1]["memory_mb"] * 2**20 / 1e9

        run(ROOT / "prepare.py", "toy", "--out", "toy", "--n-train", clips)
        weights, preset = ROOT / "weights/tiny", "tiny preset"
        if gpu:
            weights, preset = Path(folder) / "weights", "7B, GPU"
            tokenizer = Path(folder) / "toy/tokenizer.model"
            vocab_size = Tokenizer(tokenizer).vocab_size
            random_model("cuda", **REAL_EYES, vocab_size=vocab_size).save_pretrained(weights, tokenizer=tokenizer)
            torch.cuda.empty_cache()
        run(ROOT / "prepare.py", "features", "--weights", weights, "--data", "toy", "--out", "features")
        cached = ["--features", "features"]
        (ours, held), (peer, _) = train("cached", steps, *cached), train("videos", steps)
        note = "the same training from the videos, mode paper" + f"; batch {batch}, {held:.1f} GB held" * gpu
        yield row(f"stage 2 from cached features, {preset}", ours, peer, ours / peer, "samples/s", note)
        for mode in ("paper", "lora") if gpu else ():
            options = ["--train", mode, "--set", "gradient_checkpointing=true", *cached]
            rate, held = train(mode, steps, *options)
            note = f"no peer; batch {batch}, {rate:.1f} samples/s"
            yield row(f"7B, {mode}, cached, checkpointing, peak", held, None, None, "GB", note)


def saved_bytes(model, run):
    """Bytes that the backward pass of run() needs, without the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(x):
        if (key := x.untyped_storage()._cdata) not in weights:
            saved[key] = x  # kept alive, so that no other tensor takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()  # what it refers to must live until all is counted
        return sum(x.untyped_storage().nbytes() for x in saved.values()) if result is not None else 0


def memory(args):
    """What training the 7B preset needs at least, by tensor, computed without any memory; nothing is timed."""
    for mode, save_memory in (("paper", False), ("paper", True), ("lora", False), ("lora", True)):
        with torch.device("meta"):
            model = Hawk(HawkConfig(gradient_checkpointing=save_memory)).to(torch.bfloat16)
            model.set_trainable(mode)
            c = model.config
            frames = torch.empty(1, 32, c.n_queries, c.qformer_dim, dtype=torch.bfloat16)

            text = torch.empty(1, 256, c.llama_dim, dtype=torch.bfloat16)

            def step(model=model, frames=frames, text=text):
                tokens = model.encode(frames, frames).tokens
                return model.llama.lm_head(model.llama(torch.cat([tokens, text], dim=1))).float().log_softmax(-1)

            activations = saved_bytes(model, step)
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stays = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        parts = {"frozen, 2 bytes each": 2 * stays, "trained, gradient, two moments": 16 * learns}
        parts["activations a sample of 320 tokens"] = activations
        note = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        name = f"7B, {mode}, cached" + ", checkpointing" * save_memory
        yield row(name, sum(parts.values()) / 1e9, None, None, "GB", note)


# ---- int8, growth, GPU -----------------------------------------------------------------------------------------------
def random_model(device, **size):
    """A Hawk in bfloat16 with uniform weights, made on the device without an initialisation that takes minutes."""
    with torch.device("meta"):
        model = Hawk(HawkConfig(**SMALL_EYES | size)).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        p.uniform_(-0.02, 0.02) if p.ndim > 1 else p.fill_(1)
    return model


def generation_times(model, new, prompt=40, batch=1):
    """(seconds until the first token, seconds for each further one): medians."""
    c, device = model.config, model.device
    tokens = torch.randn(batch, c.n_visual, c.llama_dim, device=device, dtype=torch.bfloat16)
    words = torch.randint(3, c.vocab_size, (batch, prompt), device=device)
    ids = torch.cat([torch.full((batch, c.n_visual), c.image_id, device=device), words], dim=1)

    def intervals():
        encoding, marks = Encoding(tokens, None, None), [time.perf_counter()]
        come = lambda _: marks.append(time.perf_counter())  # noqa: E731
        model.generate(None, None, ids, new, eos_id=-1, encoding=encoding, on_token=come)
        return np.diff(marks)

    turns = np.stack([intervals() for _ in range(4)])[1:]  # the first only warms up
    return float(np.median(turns[:, 0])), float(np.median(turns[:, 1:]))


def tensor_bytes(module):
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def int8(args):
    """Decoding with int8 weights beside bfloat16: a LLaMA of (half) a billion parameters, on a GPU the 7B one."""
    from sample import compile_decoding, quantize_int8

    gpu = torch.cuda.is_available()
    size = {} if gpu else ONE_BILLION | {"llama_layers": 8} if args.quick else ONE_BILLION
    model = random_model("cuda" if gpu else "cpu", **size)
    if gpu:  # where starting the kernels one by one would take longer than they do
        compile_decoding(model)
    new = 9 if args.quick else 33
    name = f"LLaMA {'7B' if gpu else '0.5B' if args.quick else '1B'}, {'GPU' if gpu else 'CPU'}"
    larger, peer = tensor_bytes(model.llama) / 1e9, generation_times(model, new)[1]
    quantize_int8(model)
    smaller, ours = tensor_bytes(model.llama) / 1e9, generation_times(model, new)[1]
    yield row(f"int8, {name}", 1 / ours, 1 / peer, peer / ours, "tokens/s", "bfloat16, batch 1, without the prompt")
    yield row(f"int8 weights, {name}", smaller, larger, larger / smaller, "GB", "bfloat16")


def peak_of(code, *arguments):
    """(seconds, peak MB) of a few lines of Python in a process of its own, data.py imported."""
    start = "import sys, time; sys.path[:0] = sys.argv[1:3]; import data, fuzz; start = time.perf_counter()\n"
    end = "\nprint(time.perf_counter() - start, fuzz.peak_of('VmHWM'))"  # ru_maxrss begins at the parent's size
    command = [sys.executable, "-c", start + code + end, str(ROOT), str(ROOT / "tests"), *map(str, arguments)]
    return map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def growth(args):
    """How time and memory grow; no peer. Memory of reading is above a process that only imports data.py."""
    base = [*peak_of("")][1]
    with tempfile.TemporaryDirectory() as folder:
        second, read = Path(folder) / "1.mp4", "data.read_clip(sys.argv[3], int(sys.argv[4]))"
        make_video(second, 2)
        for duration, n_frames in [(6, 8), (6, 32), (60, 32)] + [(600, 32), (600, 128)] * (not args.quick):
            path = Path(folder) / f"{duration}.mp4"
            if not path.exists():
                loop_video(second, path, duration // 2)
            spent, peak = peak_of(read, path, n_frames)
            name = f"read {n_frames} of {duration} s"
            yield row(name, spent, None, None, "s", f"no peer; peak {peak - base:.0f} MB above the import")
    size = {} if torch.cuda.is_available() else dict(llama_dim=768, llama_layers=12, llama_heads=12, llama_mlp=2048)
    model = random_model("cuda" if torch.cuda.is_available() else "cpu", **size)
    for prompt, batch in [(40, 1), (400, 1), (40, 4)] + [(1600, 1), (40, 16)] * (not args.quick):
        first, each = generation_times(model, 5 if args.quick else 17, prompt, batch)
        cache = 4 * model.config.llama_layers * model.config.llama_dim * batch * (prompt + 64) / 1e6
        note = f"no peer; first token after {first:.3f} s, keys and values {cache:.1f} MB"
        yield row(f"token, prompt {prompt}, batch {batch}", each, None, None, "s", note)


def gpu(args):
    """Decoding against the card's memory bandwidth, and how much of its arithmetic a training step uses."""
    if not torch.cuda.is_available():
        yield row("decoding and training on a GPU", None, None, None, "-", GPU_ONLY)
        return
    from sample import compile_decoding

    bandwidth, model = copy_bandwidth(), random_model("cuda")
    read = sum(p.nbytes for name, p in model.llama.named_parameters() if "embed_tokens" not in name)
    note = f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; the ratio is the share of the limit"
    for name in ("7B, bf16, batch 1", "7B, bf16, batch 1, --compile"):
        if "compile" in name:
            compile_decoding(model)
        each = generation_times(model, 17 if args.quick else 65)[1]
        yield row(name, 1 / each, bandwidth / read, read / each / bandwidth, "tokens/s", note)
    square = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    peak = 2 * SIDE**3 / gpu_seconds(lambda: square @ square)
    x = torch.randn(8, 512, model.config.llama_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        model.llama(x).float().square().mean().backward()
        x.grad = None

    # Frozen weights: forward 2, gradient of the activations 2 operations for each weight and token.
    layers = sum(p.numel() for p in model.llama.layers.parameters())
    done = 4 * layers * x.shape[0] * x.shape[1] / gpu_seconds(step)
    note = f"a bf16 matrix product of {SIDE}²; frozen LLaMA, 8 x 512 tokens, forward and backward"
    yield row("7B, training step", done / 1e12, peak / 1e12, done / peak, "TFLOP/s", note)


def copy_bandwidth():
    """Bytes a second, read and written, of the largest simple thing: a copy within the card."""
    source, target = torch.empty(2, COPIED, dtype=torch.uint8, device="cuda")
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source))


def gpu_seconds(run):
    def wait():
        run()
        torch.cuda.synchronize()

    return seconds(wait, 5)


# ---- What does not grow ----------------------------------------------------------------------------------------------
def load(args):
    """Memory (MB) and open files of apps.evaluate with weights/tiny at every hundred clips, which it reads itself and,
    in a second run, gets from a loader process. The index names the clips of examples/ again and again."""
    from apps import evaluate

    examples, count = ROOT / "examples", 200 if args.quick else 1000
    lines = (examples / "index.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{"video": str(examples / row["video"]), "description": row["description"]} for row in rows]
    real, answered, found = evaluate.answer_batch, 0, []

    def counted(model, tokenizer, clips, asked, options):
        nonlocal answered
        real(model, tokenizer, clips, asked, options)
        answered += len(clips)
        if answered % 100 == 0:
            status = Path("/proc/self/status").read_text()
            held = int(status.split("VmRSS:")[1].split()[0]) / 1024
            found.append((held, len(list(Path("/proc/self/fd").iterdir()))))
            print(f"{answered} clips, {options.workers} workers: {held:.1f} MB, {found[-1][1]} files", flush=True)

    evaluate.answer_batch = counted
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.jsonl"
        index.write_text("".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(count)))
        for workers in (0, 1):
            answered, out = 0, f"{folder}/{workers}.jsonl"
            options = ["--annotations", index, "--out", out, "--weights", ROOT / "weights/tiny", "--device", "cpu"]
            options += ["--workers", workers, "--batch-size", 10, "--max-new-tokens", 16]
            status = evaluate.main([str(option) for option in options])
            assert status == 0, status
            (first, files), (last, files_at_end) = found[-count // 100], found[-1]
            note = f"from {first:.1f} MB after 100 clips; open files {files} and {files_at_end}"
            yield row(f"growth, {count} clips, {workers} workers", last - first or 1e-9, None, None, "MB", note)
    evaluate.answer_batch = real


PARTS = {
    "reading": reading,
    "flow": flow,
    "encode": encode,
    "generation": generation,
    "training": training,
    "memory": memory,
    "int8": int8,
    "growth": growth,
    "gpu": gpu,
    "load": load,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[p for p in PARTS if p != "load"], help="these parts only"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for part in args.only:
        for found in PARTS[part](args):
            rows.append(found)
            print(json.dumps(found), flush=True)
    print(f"\n{'':32}{'ours':>9}{'peer':>9}{'ratio':>8}   unit, peer ({torch.get_num_threads()} threads)")
    for r in rows:
        ours, peer, ratio = (f"{r[key]:g}" if r[key] else "-" for key in ("ours", "peer", "ratio"))
        print(f"{r['name']:32}{ours:>9}{peer:>9}{ratio:>8}   {r['unit']}, {r['note']}")


if __name__ == "__main__":
    main()
