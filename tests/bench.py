"""How fast this is beside what one would otherwise run: one JSON object a line, then a table.

    python tests/bench.py --quick            # under two minutes on a CPU
    python tests/bench.py                    # also the 10-minute video and the LLaMA of a billion parameters
    python tests/bench.py --only flow encode growth
    python tests/bench.py --only load        # 1,000 clips (--quick: 200) through apps.evaluate: memory

{"name", "ours", "peer", "ratio", "unit", "note"}: a ratio above 1 means that we are faster. Ours and the peer
run in turn in this process, on the same machine, with the same threads, each once to warm up; the median of
several runs counts. Peers: decord + OpenCV (pip install decord) for reading a clip as the released code does,
OpenCV's flow, transformers' BLIP-2 towers and LLaMA on the same weights; for training, the same training
without the cache. Parts that need a GPU say so where there is none.

From top to bottom: timing, reading and flow, the model's parts, training, int8, growth, GPU, load.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from data import farneback, read_clip, sample_frames  # noqa: E402
from hawk import Encoding, Hawk, HawkConfig  # noqa: E402
from sample import RowLinear, encode_video  # noqa: E402

SMALL_TOWERS = dict(
    vit_dim=64, vit_depth=1, vit_heads=2, vit_mlp=64,
    qformer_dim=64, qformer_layers=1, qformer_heads=2, qformer_mlp=64,
)  # fmt: skip
REAL_TOWERS = {name: getattr(HawkConfig(), name) for name in SMALL_TOWERS}
SMALL_LLAMA = dict(llama_dim=768, llama_layers=12, llama_heads=12, llama_mlp=2048)
ONE_BILLION = dict(llama_dim=2048, llama_layers=20, llama_heads=16, llama_mlp=5632)
GPU_ONLY = "needs a GPU, none is here"
COPIED = 1 << 30  # bytes of the copy that tells a card's bandwidth
SIDE = 8192  # side of the matrices that tell its arithmetic


# ---- Timing ------------------------------------------------------------------------------------------------
def clock(run):
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs, repeat):
    """Median seconds of each run. They take turns, so that whatever else the machine does meets all of them;
    the first turn does not count."""
    turns = [[clock(run) for run in runs] for _ in range(repeat + 1)]
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def seconds(run, repeat):
    return medians([run], repeat)[0]


def compare(name, ours, peer, repeat=3, note="", unit="s"):
    """Times both. A peer of None is one that is not installed."""
    if peer is None:
        return row(name, seconds(ours, repeat), None, None, unit, note)
    a, b = medians([ours, peer], repeat)
    return row(name, a, b, b / a, unit, note)


def row(name, ours, peer, ratio, unit, note):
    line = {"name": name}
    for key, value in (("ours", ours), ("peer", peer), ("ratio", ratio)):
        line[key] = None if value is None else float(f"{value:.3g}")
    return line | {"unit": unit, "note": note}


# ---- Reading a clip, flow ----------------------------------------------------------------------------------
def ffmpeg(*options):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, options)], check=True
    )


def make_video(path, duration):
    """720p at 25 frames a second, moving, as a camera's encoder would write it."""
    source = f"testsrc2=size=1280x720:rate=25:duration={duration},noise=alls=6:allf=t"
    ffmpeg(
        "-f", "lavfi", "-i", source, *"-c:v libx264 -preset ultrafast -g 50 -pix_fmt yuv420p".split(), path
    )


def loop_video(source, path, times):
    ffmpeg("-stream_loop", times - 1, "-i", source, "-c", "copy", path)


def released_reading(path, once=False):
    """-> (appearance, motion), as the released code reads a clip: it opens the video for the sampled frames,
    then again for the motion, when all frames are decoded at 224×224 and kept, and OpenCV finds the flow of
    each sampled one. once: everything from the second opening."""
    import cv2
    import decord

    def reader():
        return decord.VideoReader(str(path), height=224, width=224)

    video = reader()
    indices = sample_frames(len(video), 32)
    if not once:
        appearance = video.get_batch(indices).asnumpy()
        video = reader()
    frames = video.get_batch(range(len(video))).asnumpy()
    if once:
        appearance = frames[indices]
    motion = []
    for i in np.maximum(indices, 1):
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[i - 1 : i + 1]]
        flow = cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 3, 10, 3, 5, 1.2, 0)
        speed = cv2.cartToPolar(flow[..., 0], flow[..., 1])[0]
        motion.append(frames[i] * (speed > 0.2)[..., None])
    return appearance, np.stack(motion)


def reading(args):
    try:
        import decord  # noqa: F401
    except ImportError:
        decord = None
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.mp4"
        make_video(short, 6)
        videos = [("6 s of 720p", short, 5)]
        if not args.quick:
            long = Path(folder) / "long.mp4"
            loop_video(short, long, 100)
            videos.append(("10 min of 720p", long, 1))
        for name, path, repeat in videos:
            ours = lambda path=path: read_clip(path)  # noqa: E731
            if decord is None:
                yield compare(f"clip, {name}", ours, None, repeat, "decord is not installed")
                continue
            clip = ours()
            appearance, motion = released_reading(path)
            np.testing.assert_array_equal(clip.appearance, appearance)
            assert ((clip.motion > 0) == (motion > 0)).mean() > 0.999
            peer = lambda path=path: released_reading(path)  # noqa: E731
            yield compare(f"clip, {name}", ours, peer, repeat, "decord + OpenCV, as the released code reads")
            peer = lambda path=path: released_reading(path, once=True)  # noqa: E731
            yield compare(f"clip, {name}, once", ours, peer, repeat, "decord + OpenCV, decoded only once")


def flow(args):
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (224, 224, 16)).astype(np.float32)
    first = np.ascontiguousarray(cv2.GaussianBlur(noise, (9, 9), 2).transpose(2, 0, 1)).astype(np.uint8)
    second = np.roll(first, 2, axis=2)

    def peer():
        for a, b in zip(first, second, strict=True):
            cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 10, 3, 5, 1.2, 0)

    yield compare("optical flow, 16 pairs", lambda: farneback(first, second), peer, 5, "OpenCV")
    name = "optical flow, 16 pairs, GPU"
    if torch.cuda.is_available():
        pair = [torch.from_numpy(x).to("cuda") for x in (first, second)]
        yield compare(name, lambda: farneback(*pair).cpu(), peer, 5, "OpenCV on the CPU")
    else:
        yield row(name, None, None, None, "-", GPU_ONLY)


# ---- The model ---------------------------------------------------------------------------------------------
@torch.no_grad()
def encode(args):
    from transformers import Blip2VisionConfig, Blip2VisionModel

    if torch.cuda.is_available():
        depth, n, numbers = 39, 64, "bfloat16"
        model = random_model("cuda", **REAL_TOWERS, llama_layers=1)
    else:
        depth, n, numbers = (2, 2, "float32") if args.quick else (4, 8, "float32")
        small = dict(llama_layers=1, llama_dim=64, llama_heads=2, video_layers=1)
        model = Hawk(HawkConfig(vit_depth=depth, **small)).eval()
    c = model.config
    like = dict(device=model.device, dtype=model.vit.cls_token.dtype)
    images = torch.rand(n, 3, 224, 224, **like)
    with torch.device(model.device):
        peer = Blip2VisionModel(Blip2VisionConfig(
            hidden_size=c.vit_dim, intermediate_size=c.vit_mlp, num_hidden_layers=depth,
            num_attention_heads=c.vit_heads, image_size=224, patch_size=14, hidden_act="gelu",
        )).to(**like).eval()  # fmt: skip
    note = f"transformers' BLIP-2 tower of the same size, {depth} of 39 blocks, {numbers}"
    yield compare(f"ViT-g, {n} frames", lambda: model.vit(images), lambda: peer(images), 5, note)

    branch = model.appearance
    n = min(n, 32)
    queries = branch.queries.expand(n, -1, -1)
    features = torch.randn(n, 257, c.vit_dim, **like)
    qformer = peer_qformer(branch.qformer).to(**like)
    ours = lambda: branch.qformer(branch.queries, features)  # noqa: E731
    theirs = lambda: qformer(queries, encoder_hidden_states=features)  # noqa: E731
    expected = theirs().last_hidden_state.float()
    off = (ours().float() - expected).norm() / expected.norm()
    assert off < {"float32": 1e-4, "bfloat16": 0.03}[numbers], off
    note = f"transformers' BLIP-2 Q-Former, same weights, all 12 layers, {numbers}"
    yield compare(f"Q-Former, {n} frames", ours, theirs, 5, note)


QFORMER_NAMES = (  # ours, transformers'; replaced in this order
    ("layers.", "encoder.layer."),
    ("self_attention.", "attention.attention."),
    ("cross_attention.", "crossattention.attention."),
    ("attention.attention.output.", "attention.output.dense."),
    ("attention.attention.norm.", "attention.output.LayerNorm."),
    ("mlp.fc1.", "intermediate_query.dense."),
    ("mlp.fc2.", "output_query.dense."),
    ("mlp.norm.", "output_query.LayerNorm."),
)


def peer_qformer(qformer):
    """transformers' Q-Former with the same weights."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    tensors = {}
    for name, tensor in qformer.state_dict().items():
        for ours, theirs in QFORMER_NAMES:
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = "layer" + name
        tensors[name] = tensor
    peer = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    peer.load_state_dict(tensors)
    return peer


def random_encoding(config, batch=1, **options):
    return Encoding(torch.randn(batch, config.n_visual, config.llama_dim, **options), {})


def random_prompt(config, words, batch=1, device="cpu"):
    """Ids (batch, placeholders + words)."""
    visual = torch.full((batch, config.n_visual), config.image_id, device=device)
    return torch.cat([visual, torch.randint(3, config.vocab_size, (batch, words), device=device)], dim=1)


@torch.no_grad()
def generation(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    new = 32 if args.quick else 64
    sizes = {"0.1B": SMALL_LLAMA | {"vocab_size": 8000}}
    if not args.quick:
        sizes["1B"] = ONE_BILLION
    for name, size in sizes.items():
        model = Hawk(HawkConfig(**SMALL_TOWERS, **size)).eval()
        c = model.config
        peer = LlamaForCausalLM(LlamaConfig(
            hidden_size=c.llama_dim, intermediate_size=c.llama_mlp, num_hidden_layers=c.llama_layers,
            num_attention_heads=c.llama_heads, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
        )).eval()  # fmt: skip
        tensors = model.llama.state_dict().items()
        peer.load_state_dict(
            {n if n.startswith("lm_head") else f"model.{n}": tensor for n, tensor in tensors}
        )
        encoding = random_encoding(c)
        ids = random_prompt(c, 40)
        embeds = model.embed(ids, encoding.tokens)
        fixed = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        ours = lambda: model.generate(encoding, ids, new, eos_id=-1)  # noqa: E731, B023
        theirs = lambda: peer.generate(inputs_embeds=embeds, **fixed)  # noqa: E731, B023
        note = f"transformers' generate, {new} tokens, float32"
        yield compare(f"generate, LLaMA {name}", ours, theirs, 3, note)


@torch.no_grad()
def decoding(args):
    """A word of the 7B model on a GPU: beside the card's bandwidth (a word reads every weight once), beside
    transformers' generate, compiled, and in int8."""
    if not torch.cuda.is_available():
        yield row("decoding on a GPU", None, None, None, "-", GPU_ONLY)
        return
    new = 33 if args.quick else 65
    peer_rate, peer_first = peer_generation(new)
    bandwidth = copy_bandwidth()
    model = random_model("cuda")
    read = sum(p.nbytes for name, p in model.llama.named_parameters() if "embed_tokens" not in name)
    limit = bandwidth / read
    share = f"the bandwidth limit: {bandwidth / 1e9:.0f} GB/s copied, {read / 1e9:.2f} GB a word"
    theirs = "transformers' generate, bf16"

    def rate(batch=1):
        model.steps.clear()
        first, each = generation_times(model, new, 150, batch)
        return batch / each, first

    default, first = rate()
    yield row("7B, batch 1", default, limit, default / limit, "tokens/s", share)
    ratio = default / peer_rate[1]
    yield row("7B, batch 1, beside a peer", default, peer_rate[1], ratio, "tokens/s", theirs)
    ratio = peer_first[1] / first
    yield row("7B, prompt of 214, first token", first, peer_first[1], ratio, "s", theirs)
    several, _ = rate(8)
    yield row("7B, batch 8", several, peer_rate[8], several / peer_rate[8], "tokens/s", theirs)
    model.compile_step = True
    as_loaded(model, int8=False)
    compiled = rate()[0]
    yield row("7B, batch 1, --compile", compiled, limit, compiled / limit, "tokens/s", share)
    several, _ = rate(8)
    yield row("7B, batch 8, --compile", several, peer_rate[8], several / peer_rate[8], "tokens/s", theirs)
    as_loaded(model, int8=True)
    model.compile_step = False
    ours = rate()[0]
    yield row("7B, batch 1, --int8", ours, default, ours / default, "tokens/s", "bf16")
    model.compile_step = True
    ours = rate()[0]
    yield row("7B, batch 1, --int8 --compile", ours, compiled, ours / compiled, "tokens/s", "bf16, --compile")


def peer_generation(new):
    """transformers' generate on a 7B LLaMA: ({batch: tokens a second}, {batch: seconds to the first token}),
    after a prompt of 214."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("cuda"):
        peer = LlamaForCausalLM(LlamaConfig(**size, vocab_size=32000)).to(torch.bfloat16).eval()
    rates = {}
    firsts = {}
    for batch in (1, 8):
        x = torch.randn(batch, 214, 4096, device="cuda", dtype=torch.bfloat16)

        def run(words, x=x):
            fixed = dict(do_sample=False, pad_token_id=0, max_new_tokens=words, min_new_tokens=words)
            peer.generate(inputs_embeds=x, **fixed)

        firsts[batch], whole = medians([partial(run, 1), partial(run, new)], 2)
        rates[batch] = batch * (new - 1) / (whole - firsts[batch])
    return rates, firsts


def as_loaded(model, int8):
    """Puts in place what `sample.load` does for --int8, or for --compile."""
    for place, module in list(model.llama.named_modules()):
        if isinstance(module, torch.nn.Linear | RowLinear):
            if int8 or place.endswith(("down_proj", "lm_head")):
                model.llama.set_submodule(place, RowLinear(module, int8))
    model.steps.clear()


def answer(args):
    """What a user waits for: a 720p video of 6 seconds is read, its flow found, 2 x 32 frames encoded, a
    prompt read and 64 words made, with random weights of the 7B size."""
    if not torch.cuda.is_available():
        yield row("video to 64 words, 7B, GPU", None, None, None, "-", GPU_ONLY)
        return
    model = random_model("cuda", **REAL_TOWERS)
    yield answering("video to 64 words, 7B, GPU", model)
    as_loaded(model, int8=True)
    torch.cuda.empty_cache()
    yield answering("video to 64 words, 7B, GPU, --int8", model)


def answering(name, model):
    ids = random_prompt(model.config, 150, device="cuda")
    parts = []
    torch.cuda.reset_peak_memory_stats()

    def run(path):
        seen = encode_video(model, path)
        start = time.perf_counter()
        model.generate(seen.encoding, ids, 64, eos_id=-1)
        parts.append([*seen.seconds.values(), time.perf_counter() - start])

    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        make_video(video, 6)
        run(video)
        first = torch.cuda.max_memory_allocated() / 1e9
        spent = seconds(lambda: run(video), 5)
    read, encoded, made = np.median(parts[2:], axis=0)
    held = torch.cuda.max_memory_allocated() / 1e9  # also the cache of the answer before
    note = f"no peer; read {read:.3f} s, encode {encoded:.3f} s, words {made:.3f} s"
    note += f"; first answer {parts[0][2]:.2f} s for the words, {first:.2f} GB, others {held:.2f} GB"
    return row(name, spent, None, None, "s", note)


# ---- Training ----------------------------------------------------------------------------------------------
def call(*command):
    """Runs `python COMMAND` in the repository."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)


def train_rate(out, steps, batch, *options, run=None):
    """(samples a second in the second half of the steps, when what the loader held at the start is used up;
    peak GB). run: another way than `python train.py`."""
    run = run or partial(call, "train.py")
    run("--stage", 2, "--steps", steps, "--batch-size", batch, "--out", out, *options)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    half, end = (line["step"] * batch / line["samples_per_s"] for line in (lines[steps // 2 - 1], lines[-1]))
    return steps // 2 * batch / (end - half), lines[-1]["memory_mb"] * 2**20 / 1e9


def training(args):
    """Samples a second of `train.py --stage 2` from the cache and from the videos: with the tiny preset, or,
    on a GPU, with the 7B one."""
    if torch.cuda.is_available():
        yield from training_7b(args)
        return
    clips, steps, batch = (16, 12, 8) if args.quick else (64, 40, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy = folder / "toy"
        call("-m", "apps.toy", "--out", toy, "--n-train", clips, "--n-test", 8, "--seed", 0)
        weights = ROOT / "weights/tiny"
        call("prepare.py", "features", "--weights", weights, "--data", toy, "--out", folder / "features")
        common = ["--weights", weights, "--data", toy, "--workers", 2]
        ours, _ = train_rate(folder / "cached", steps, batch, *common, "--features", folder / "features")
        peer, _ = train_rate(folder / "videos", steps, batch, *common)
        note = "the same training from the videos, mode paper"
        yield row("stage 2 from cached features, tiny", ours, peer, ours / peer, "samples/s", note)


def training_7b(args):
    """The programs run in this process, so that random weights of the 7B size (with the vocabulary of
    weights/tiny, 0.5 GB less) are made once, on the GPU, and written nowhere."""
    size = REAL_TOWERS | {"vocab_size": HawkConfig.preset("tiny").vocab_size}
    tokenizer = ROOT / "weights/tiny/tokenizer.model"
    clips = 16 if args.quick else 32
    saved = (Hawk.from_pretrained, data.frozen_fingerprint, train.build, train.save)

    def run(main, *command):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        main([str(word) for word in command])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_video(folder / "0.mp4", 6)
        example = json.loads((ROOT / "examples/index.jsonl").read_text().splitlines()[0])
        with open(folder / "train.jsonl", "w") as index:
            for i in range(clips):
                if i:
                    (folder / f"{i}.mp4").hardlink_to(folder / "0.mp4")
                index.write(json.dumps(example | {"video": f"{i}.mp4"}) + "\n")
        try:
            Hawk.from_pretrained = lambda *_, **__: random_model("cuda", **size, llama_layers=1)
            data.frozen_fingerprint = lambda model: dict.fromkeys(model.config.branches, "random weights")
            options = ["--weights", folder, "--data", folder, "--out", folder / "features", "--bfloat16"]
            run(prepare.main, "features", *options, "--workers", 8)
            files = (folder / "features/train").glob("*.safetensors")
            made = sorted(file.stat().st_mtime for file in files)[clips // 2 - 1 :]
            rate = (len(made) - 1) / (made[-1] - made[0])
            note = f"no peer; {clips} clips of 6 s of 720p, 8 readers, the second half"
            yield row("prepare.py features, 7B towers", rate, None, None, "clips/s", note)
            Hawk.from_pretrained = saved[0]
            model = random_model("cuda", **size)
            train.build = lambda *_: (model, tokenizer)
            train.save = lambda *_, **__: None
            common = ["--weights", folder, "--data", folder, "--device", model.device]
            cached = [*common, "--features", folder / "features"]
            rate = partial(train_rate, run=partial(run, train.main))
            ours, held = rate(folder / "cached", 48, 4, *cached)
            for workers, steps in ((2, 16), (8, 40)):
                peer, _ = rate(folder / f"videos-{workers}", steps, 4, *common, "--workers", workers)
                name = f"stage 2 from cached features, 7B, {workers} loaders"
                note = f"the same training from the videos, mode paper, batch 4; {held:.1f} GB held"
                yield row(name, ours, peer, ours / peer, "samples/s", note)
            model.config.gradient_checkpointing = True
            for mode in ("paper", "lora"):
                for block in model.llama.layers:
                    block.__dict__.pop("forward", None)  # the checkpointing of the run before
                speed, held = rate(folder / mode, 8, 4, *cached, "--train", mode)
                note = f"no peer; batch 4, {speed:.1f} samples/s"
                yield row(f"7B, {mode}, cached, checkpointing, peak", held, None, None, "GB", note)
        finally:
            Hawk.from_pretrained, data.frozen_fingerprint, train.build, train.save = saved


def saved_bytes(model, run):
    """Bytes that the backward pass of run() needs, without the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(x):
        key = x.untyped_storage()._cdata
        if key not in weights:
            saved[key] = x  # kept alive, so that no other tensor takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()  # what it refers to must live until all is counted
        size = sum(x.untyped_storage().nbytes() for x in saved.values())
    del result
    return size


def memory(args):
    """What training the 7B preset needs at least, by tensor, computed without any memory; nothing is
    timed."""
    for mode, save_memory in (("paper", False), ("paper", True), ("lora", False), ("lora", True)):
        with torch.device("meta"):
            model = Hawk(HawkConfig.preset("7b")).to(torch.bfloat16)
            model.set_trainable(mode)
            for block in model.llama.layers if save_memory else ():  # as train.py does
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            c = model.config
            frames = torch.empty(1, 32, c.n_queries, c.qformer_dim, dtype=torch.bfloat16)
            text = torch.empty(1, 256, c.llama_dim, dtype=torch.bfloat16)

            def step(model=model, frames=frames, text=text):
                tokens = model.encode({name: frames for name in model.config.branches}).tokens
                hidden = model.llama(torch.cat([tokens, text], dim=1))
                return model.llama.lm_head(hidden).float().log_softmax(-1)

            activations = saved_bytes(model, step)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        parts = {"frozen, 2 bytes each": 2 * frozen, "trained, gradient, two moments": 16 * trained}
        parts["activations a sample of 320 tokens"] = activations
        note = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        name = f"7B, {mode}, cached" + ", checkpointing" * save_memory
        yield row(name, sum(parts.values()) / 1e9, None, None, "GB", note)


# ---- int8, growth ------------------------------------------------------------------------------------------
def random_model(device, **size):
    """A Hawk in bfloat16 with uniform weights, made on the device without an initialisation that takes
    minutes."""
    with torch.device("meta"):
        model = Hawk(HawkConfig(**SMALL_TOWERS | size)).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.uniform_(-0.02, 0.02)
        else:
            p.fill_(1)
    return model


def generation_times(model, new, prompt=40, batch=1):
    """(seconds until the first token, seconds for each further one): medians."""
    encoding = random_encoding(model.config, batch, device=model.device, dtype=torch.bfloat16)
    ids = random_prompt(model.config, prompt, batch, model.device)

    def intervals():
        marks = [time.perf_counter()]
        model.generate(encoding, ids, new, eos_id=-1, on_token=lambda _: marks.append(time.perf_counter()))
        return np.diff(marks)

    turns = np.stack([intervals() for _ in range(4)])[1:]  # the first only warms up
    return float(np.median(turns[:, 0])), float(np.median(turns[:, 1:]))


def tensor_bytes(module):
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def int8(args):
    """Decoding with int8 weights beside bfloat16 on a CPU: a LLaMA of (half) a billion parameters."""
    name = "LLaMA 0.5B, CPU" if args.quick else "LLaMA 1B, CPU"
    model = random_model("cpu", **ONE_BILLION | ({"llama_layers": 8} if args.quick else {}))
    new = 9 if args.quick else 33
    larger = tensor_bytes(model.llama) / 1e9
    peer = generation_times(model, new)[1]
    as_loaded(model, int8=True)
    smaller = tensor_bytes(model.llama) / 1e9
    ours = generation_times(model, new)[1]
    note = "bfloat16, batch 1, without the prompt"
    yield row(f"int8, {name}", 1 / ours, 1 / peer, peer / ours, "tokens/s", note)
    yield row(f"int8 weights, {name}", smaller, larger, larger / smaller, "GB", "bfloat16")


def held_mb(field):
    """VmRSS (now) or VmHWM (at most) of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def measured(code, *arguments):
    """(seconds, peak MB) of a few lines of Python in a process of its own, where data.py is imported. Not
    ru_maxrss, which begins at the size of the parent."""
    start = (
        "import sys, time; sys.path[:0] = sys.argv[1:3]; import bench, data; start = time.perf_counter()\n"
    )
    end = "\nprint(time.perf_counter() - start, bench.held_mb('VmHWM'))"
    command = [sys.executable, "-c", start + code + end, ROOT, ROOT / "tests", *arguments]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def growth(args):
    """How time and memory grow; no peer. Memory of reading is above a process that only imports."""
    imported = measured("")[1]
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.mp4"
        make_video(short, 2)
        for duration, n_frames in [(6, 8), (6, 32), (60, 32)] + [(600, 32), (600, 128)] * (not args.quick):
            path = Path(folder) / f"{duration}.mp4"
            if not path.exists():
                loop_video(short, path, duration // 2)
            spent, peak = measured("data.read_clip(sys.argv[3], int(sys.argv[4]))", path, n_frames)
            note = f"no peer; peak {peak - imported:.0f} MB above the import"
            yield row(f"read {n_frames} of {duration} s", spent, None, None, "s", note)
    gpu = torch.cuda.is_available()
    model = random_model("cuda") if gpu else random_model("cpu", **SMALL_LLAMA)
    for prompt, batch in [(40, 1), (400, 1), (40, 4)] + [(1600, 1), (40, 16)] * (not args.quick):
        first, each = generation_times(model, 5 if args.quick else 17, prompt, batch)
        note = f"no peer; first token after {first:.3f} s"
        yield row(f"token, prompt {prompt}, batch {batch}", each, None, None, "s", note)


# ---- GPU ---------------------------------------------------------------------------------------------------
def gpu(args):
    """How much of a card's arithmetic a training step of the frozen LLaMA uses."""
    if not torch.cuda.is_available():
        yield row("a training step on a GPU", None, None, None, "-", GPU_ONLY)
        return
    model = random_model("cuda")
    square = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    peak = 2 * SIDE**3 / seconds(lambda: square @ square, 5)
    x = torch.randn(8, 512, model.config.llama_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        model.llama(x).float().square().mean().backward()
        x.grad = None

    # Frozen weights: for each weight and token 2 operations forward, 2 for the gradient of the activations
    layers = sum(p.numel() for p in model.llama.layers.parameters())
    done = 4 * layers * x.shape[0] * x.shape[1] / seconds(step, 5)
    note = f"a bf16 matrix product of {SIDE}²; frozen LLaMA, 8 x 512 tokens, forward and backward"
    yield row("7B, training step", done / 1e12, peak / 1e12, done / peak, "TFLOP/s", note)


def copy_bandwidth():
    """Bytes a second, read and written, of the largest simple operation: a copy within the card."""
    source, target = torch.empty(2, COPIED, dtype=torch.uint8, device="cuda")
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 5)


# ---- What does not grow ------------------------------------------------------------------------------------
def load(args):
    """Memory (MB) and open files of apps.evaluate with weights/tiny at every hundred clips, which it reads
    itself and, in a second run, gets from a loader worker. The index names the clips of examples/ again and
    again."""
    from apps import evaluate

    examples = ROOT / "examples"
    count = 200 if args.quick else 1000
    rows = []
    for line in (examples / "index.jsonl").read_text().splitlines():
        example = json.loads(line)
        rows.append({"video": str(examples / example["video"]), "description": example["description"]})
    answer_batch = evaluate.answer_batch
    answered = 0
    found = []  # (MB, open files) at every hundred clips

    def counted(model, tokenizer, clips, asked, options):
        nonlocal answered
        answer_batch(model, tokenizer, clips, asked, options)
        answered += len(clips)
        if answered % 100 == 0:
            found.append((held_mb("VmRSS"), len(list(Path("/proc/self/fd").iterdir()))))
            mb, files = found[-1]
            print(f"{answered} clips, {options.workers} workers: {mb:.1f} MB, {files} files", flush=True)

    evaluate.answer_batch = counted
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.jsonl"
        index.write_text("".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(count)))
        for workers in (0, 1):
            answered = 0
            options = ["--annotations", index, "--out", f"{folder}/{workers}.jsonl"]
            options += ["--weights", ROOT / "weights/tiny", "--device", "cpu", "--workers", workers]
            options += ["--batch-size", 10, "--max-new-tokens", 16]
            status = evaluate.main([str(option) for option in options])
            assert status == 0, status
            first, files = found[-count // 100]
            last, files_at_end = found[-1]
            note = f"from {first:.1f} MB after 100 clips; open files {files} and {files_at_end}"
            yield row(f"growth, {count} clips, {workers} workers", last - first, None, None, "MB", note)
    evaluate.answer_batch = answer_batch


ALL = (reading, flow, encode, generation, decoding, answer, training, memory, int8, growth, gpu, load)
PARTS = {part.__name__: part for part in ALL}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    usual = [name for name in PARTS if name != "load"]
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=usual, help="these parts (default: all but load)"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for part in args.only:
        for found in PARTS[part](args):
            rows.append(found)
            print(json.dumps(found), flush=True)
    print(f"\n{'':32}{'ours':>9}{'peer':>9}{'ratio':>8}   unit, peer ({torch.get_num_threads()} threads)")
    for line in rows:
        ours, peer, ratio = (
            "-" if line[key] is None else f"{line[key]:g}" for key in ("ours", "peer", "ratio")
        )
        print(f"{line['name']:32}{ours:>9}{peer:>9}{ratio:>8}   {line['unit']}, {line['note']}")


if __name__ == "__main__":
    main()
