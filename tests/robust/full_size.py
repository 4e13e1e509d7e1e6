"""The 7B model at its real size, without the real weights: time and peak memory of converting, loading, use.

    python tests/robust/full_size.py --video examples/some.mp4       # needs 34 GB of disk, 20 GB of memory

Makes files in the released formats and sizes (17 GB, random numbers, a vocabulary of made-up words), runs
`prepare.py weights` on them, loads the result in bfloat16 on the CPU, lets `sample.py` describe a clip (the
answer is noise). Prints one JSON object a step: {"step", "seconds", "peak_gb"}; mapped files count as memory.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LLAMA_SHARDS = 3
LOAD = "import sys, torch; from hawk import Hawk; Hawk.from_pretrained(sys.argv[1], dtype=torch.bfloat16)"


def random_like(name, like, dtype):
    """Weights of which a forward pass makes finite numbers: small ones, and norms that do nothing."""
    if "norm" in name.lower() or "ln_vision" in name:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype)
    return torch.empty(like.shape, dtype=dtype).uniform_(-0.03, 0.03)


def tokenizer_model(size):
    """A SentencePiece model of `size` pieces, each a made-up word."""
    import sentencepiece

    model = io.BytesIO()
    words = (" ".join(f"word{i + j}" for j in range(50)) for i in range(0, size, 50))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, model_type="word", vocab_size=size, use_all_vocab=False,
        hard_vocab_limit=True, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def released_shapes(config):
    """{"vit" | "qformer" | "hawk" | "llama": {released name: tensor on the meta device}}, with some that a
    reader must leave out."""
    from hawk import Hawk, is_frame_level
    from prepare import released_name

    shapes = {"llama": {}, "vit": {}, "qformer": {}, "hawk": {}}
    with torch.device("meta"):
        parameters = dict(Hawk(replace(config, vit_depth=config.vit_depth + 1)).named_parameters())
        shapes["qformer"]["t5_proj.weight"] = torch.empty(4096, config.qformer_dim)
        for i in range(config.llama_layers):
            inv_freq = torch.empty(config.llama_dim // config.llama_heads // 2)
            shapes["llama"][f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = inv_freq
    for name, like in parameters.items():
        tower = name.partition(".")[0]
        released = released_name(name)
        if tower in ("llama", "vit"):
            shapes[tower][released] = like
        elif not is_frame_level(name):
            shapes["hawk"][released] = like
        elif tower == "appearance":
            shapes["qformer"][released] = like
    shapes["hawk"]["query_tokens_motion"] = parameters["motion.queries"]
    return shapes


def make(folder):
    """Writes the released files, full size, into `folder`."""
    from hawk import HawkConfig

    torch.manual_seed(0)
    config = HawkConfig()
    shapes = released_shapes(config)
    for role, dtype in (("vit", torch.float16), ("qformer", torch.float32), ("hawk", torch.float32)):
        tensors = {name: random_like(name, like, dtype) for name, like in shapes[role].items()}
        torch.save(tensors if role == "vit" else {"model": tensors}, folder / f"{role}.pth")
    write_llama(folder / "llama", shapes["llama"], config)


def write_llama(folder, shapes, config):
    folder.mkdir()
    limit = sum(like.numel() for like in shapes.values()) / LLAMA_SHARDS
    weight_map = {}
    filled = 0
    for name, like in shapes.items():
        weight_map[name] = f"pytorch_model-{int(filled / limit) + 1:05}-of-{LLAMA_SHARDS:05}.bin"
        filled += like.numel()
    for shard in sorted(set(weight_map.values())):
        names = [name for name in shapes if weight_map[name] == shard]
        held = {name: random_like(name, shapes[name], torch.float16) for name in names}
        torch.save(held, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = {"hidden_size": config.llama_dim, "num_hidden_layers": config.llama_layers}
    sizes |= {"num_attention_heads": config.llama_heads, "intermediate_size": config.llama_mlp}
    sizes |= {"rms_norm_eps": config.norm_eps, "max_position_embeddings": config.context_length}
    (folder / "config.json").write_text(json.dumps(sizes | {"vocab_size": config.vocab_size}))
    (folder / "tokenizer.model").write_bytes(tokenizer_model(config.vocab_size))


def measured(step, *command):
    """Runs a command; prints its time and its peak memory; stops everything if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{step} failed:\n{output}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    figures = {"step": step, "seconds": round(time.perf_counter() - start, 1)}
    figures["peak_gb"] = round(usage.ru_maxrss * unit / 1e9, 2)
    print(json.dumps(figures), flush=True)
    return output


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", type=Path, help="clip to describe")
    parser.add_argument(
        "--folder", type=Path, help="work here and keep the files (default: a temporary folder)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="length of the answer")
    parser.add_argument(
        "--make", type=Path, help=argparse.SUPPRESS
    )  # the first step, in a process of its own
    args = parser.parse_args()
    if args.make:
        return make(args.make)
    if args.video is None:
        parser.error("--video is needed")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="hawk-full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measured("make the files", __file__, "--make", folder)
        released = [
            "--llama",
            folder / "llama",
            "--vit",
            folder / "vit.pth",
            "--qformer",
            folder / "qformer.pth",
        ]
        out = folder / "hawk-7b"
        released += ["--hawk", folder / "hawk.pth", "--out", out]
        print(measured("prepare.py weights", "prepare.py", "weights", *released))
        measured("from_pretrained, bfloat16", "-c", LOAD, out)
        options = ["--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", args.tokens, "--json"]
        print(measured("sample.py", "sample.py", "--weights", out, "--video", args.video.resolve(), *options))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
