"""One-off jobs that come before training and asking. One sub-command each:

    python prepare.py weights --llama DIR --vit FILE --qformer FILE --hawk FILE --out weights/hawk-7b
    python prepare.py features --weights weights/hawk-7b --data data/hawk --out data/features
    python prepare.py merge --weights runs/x/last --out weights/x
The index files come from `python prepare.py hawk --annotations PATH --videos DIR --out data/hawk`."""

import importlib
import json
import os
import re
import signal
import sys
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads wait without spinning
import safetensors.torch
import torch
from tqdm import tqdm

import data
from hawk import Branch, Hawk, HawkConfig, is_frame_level, require, save_tensors

SHARD_BYTES = 10**9
CROP_SEED = 42  # of cached clips


# ---- 1. weights: the released files -> one folder of ours --------------------------------------------------
# All of these replacements, in turn, make the released name of a tensor from ours: motion.qformer.norm.bias
# -> qformer.norm.bias -> Qformer{m}.bert.embeddings.LayerNorm.bias; {m} is "_motion" in that branch, else "".
RELEASED = {
    r"^(appearance|motion)\.": "", r"^llama\.lm_head": "lm_head", r"^llama\.": "model.",
    r"^vit\.patch_embed": "patch_embed.proj", r"^vit\.": "", r"^ln_vision": "ln_vision{m}",
    r"^frame_position": "video_frame_position_embedding{m}", r"^proj_0": "llama_proj{m}_0",
    r"^(encoder|decoder)_": r"llama_proj{m}_last.\1_", r"^(video_|)queries": r"\1query_tokens{m}",
    r"^(video_|)qformer\.norm": r"\1Qformer{m}.bert.embeddings.LayerNorm",
    r"^(video_|)qformer\.layers": r"\1Qformer{m}.bert.encoder.layer",
    r"(?:self|(cross))_attention": r"\1attention", r"attention\.(query|key|value)": r"attention.self.\1",
    r"attention\.output": "attention.output.dense", r"attention\.norm": "attention.output.LayerNorm",
    r"(layer.+)mlp\.fc1": r"\1intermediate_query.dense", r"(layer.+)mlp\.fc2": r"\1output_query.dense",
    r"(layer.+)mlp\.norm": r"\1output_query.LayerNorm",
}  # fmt: skip
# Hugging Face's BLIP-2 has other names, which likewise become the released ones.
HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "cls_token", "vision_model.encoder.layers": "blocks",
    "vision_model.embeddings.position_embedding": "pos_embed", "vision_model.post_layernorm": "ln_vision",
    "vision_model.embeddings.patch_embedding": "patch_embed.proj", "layer_norm": "norm",
    "self_attn": "attn", "projection": "proj", "attention.attention": "attention.self",
    "qformer.encoder": "Qformer.bert.encoder", "qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
}  # fmt: skip
# Tensors that files may hold and we do not use: EVA's classifier head and last block (number DEPTH), BLIP-2's
# language model, position tables, Video-LLaMA's projection. Anything else is an error.
LEFT_OUT = r".+\.(inv_freq|position_ids)|(norm|head|blocks\.DEPTH|t5_proj|language_.+|llama_proj)\..+"
Held = namedtuple("Held", "origin read")  # a tensor: its file and name, for messages; a function to read it


def released_name(name):
    """What our tensor `name` is called in the released .pth files."""
    released = name
    for pattern, replacement in RELEASED.items():
        released = re.sub(pattern, replacement, released)
    return released.replace("{m}", "_motion" if name.startswith("motion.") else "")


@cache
def open_tensors(file):
    """{released name: (name in the file, tensor)} of a .pth, .bin or .safetensors file, memory-mapped. A
    qkv.bias is split into q_bias and v_bias. ValueError if the file is damaged or holds anything else."""
    tensors = {}
    try:
        if file.suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        else:  # files older than torch 1.6 are not zip files and cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        content = content.get("model", content.get("state_dict", content))  # of a checkpoint
        for key, tensor in content.items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", key)  # DistributedDataParallel and torch.compile
            if name.startswith(("vision_model.", "qformer.")):
                for theirs, released in HUGGING_FACE.items():
                    name = name.replace(theirs, released)
            tensors[name] = (key, tensor.detach())
            if name.endswith(".qkv.bias"):  # [queries, keys, values], but our keys have no bias
                q, k, v = tensors.pop(name)[1].chunk(3)
                require(not k.any(), f"{key} has a bias for keys")
                tensors |= {name.replace("qkv.", "q_"): (key, q), name.replace("qkv.", "v_"): (key, v)}
    except Exception as e:  # for a damaged file, these readers raise almost anything
        reason = re.split(r"\n|\. ", str(e))[0]
        raise ValueError(f"{file}: is missing, cut short, or holds other than tensors ({reason})") from e
    return tensors


LLAMA = {  # HawkConfig: LLaMA's config.json
    "llama_dim": "hidden_size", "llama_layers": "num_hidden_layers", "llama_heads": "num_attention_heads",
    "llama_mlp": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
SHAPES = {  # released name of a tensor: the fields of HawkConfig that its first dimensions give
    "patch_embed.proj.weight": ("vit_dim", None, "patch_size"), "blocks.0.mlp.fc1.weight": ["vit_mlp"],
    "pos_embed": (None, "image_size"), "query_tokens": (None, "n_queries", "qformer_dim"),
    "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": ["qformer_mlp"],
    "video_frame_position_embedding.weight": ["n_frames"], "video_query_tokens": (None, "n_video_queries"),
    "llama_proj_last.encoder_1.weight": ["tight_dim"],
}  # fmt: skip
LAYERS = {"vit_depth": "blocks", "qformer_layers": "Qformer", "video_layers": "video_Qformer"}


def infer_config(file, llama, held, overrides):
    """HawkConfig from LLaMA's config.json (`llama`, read from `file`) and tensor shapes; `overrides` win."""
    ropes = [llama.get(key) or {} for key in ("rope_scaling", "rope_parameters")]  # the old and the new name
    require(set(map(type, ropes)) == {dict}, f"{file}: rope_scaling or rope_parameters holds no settings")
    rope = ropes[0] | ropes[1]
    c = {ours: llama[theirs] for ours, theirs in LLAMA.items()}
    c["rope_theta"] = rope.pop("rope_theta", llama.get("rope_theta", 10000.0))
    c["context_length"] = llama.get("max_position_embeddings", 4096)
    published = HawkConfig.from_dict(c, file)
    only = {"num_key_value_heads": published.llama_heads, "hidden_act": "silu", "attention_bias": False}
    only |= {"head_dim": published.llama_dim // published.llama_heads, "mlp_bias": False}
    for key, value in (only | {"model_type": "llama"}).items():  # rejected: what would change the arithmetic
        require(llama.get(key) in (None, value), f"{file}: {key} must be {value!r}, not {llama.get(key)!r}")
    scaled = {key: value for key, value in rope.items() if value not in ("default", None, 1.0)}
    require(not scaled, f"{file}: rope_scaling or rope_parameters has {scaled}; positions cannot be scaled")
    c = asdict(published) | {"tight_dim": max(1, published.llama_dim // 16)}  # unless the files say otherwise
    for name, fields in SHAPES.items():
        shape = held[name].read().shape if name in held else ()  # what is missing is reported later
        c |= {field: size for field, size in zip(fields, shape, strict=False) if field}
    for field, stack in LAYERS.items():  # layers are counted by the numbers in their names
        numbers = {found[1] for name in held if (found := re.match(rf"{stack}\D*\.(\d+)\.", name))}
        c[field] = len(numbers) or c[field]
    c["image_size"] = round(max(0, c["image_size"] - 1) ** 0.5) * c["patch_size"]  # less the class token
    whole = any(name.startswith(("norm.", "head.")) for name in held)  # EVA's last block, which is not used
    c["vit_depth"] = 39 if c["vit_dim"] == 1408 else c["vit_depth"] - int(whole)
    for field, known in (("vit_heads", c["vit_dim"] == 1408), ("qformer_heads", c["qformer_dim"] == 768)):
        require(known or field in overrides, f"shapes do not show {field}: add --set {field}=N")
    require("branches" not in overrides, "--set branches: is for `prepare.py merge`; released files have two")
    return HawkConfig.from_dict(c | overrides, "the released files and --set")


def replay_motion_qformer(config, seed=42):
    """Recreates the motion Q-Former, which no file holds, bit for bit -> {released name: tensor}.

    The released code draws it at random, freezes it, and saves only trained weights. But training began with
    torch.manual_seed(42): that seed, and what is drawn before the Q-Former, determine it. Uniform numbers can
    be skipped in chunks of any size, but how torch draws normal ones depends on the size of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.normal, 0.0, 0.02, generator=generator)

    def skip_uniform(count):
        for start in range(0, count, 1 << 16):
            torch.rand(min(count - start, 1 << 16), generator=generator)

    # Our parameters are in the order in which the released modules are built. Each of its two ViTs draws
    # torch's default initialisation (nothing for norms, q_bias, v_bias), then truncated normals, one uniform
    # number each, for positions, class token and, a second time, the weights of its Linears.
    model = {name: p.shape for name, p in parameters(config).items()}
    drawn = [shape for name, shape in model.items() if re.match(r"vit\.(?!.*(norm|[qv]_bias))", name)]
    skip_uniform(2 * sum(shape.numel() * (2 if len(shape) == 2 else 1) for shape in drawn))
    shapes = {name: shape for name, shape in model.items() if name.startswith("motion.qformer.")}
    dim = config.qformer_dim
    words = 30522  # in bert-base-uncased, whose text half, with an MLP per layer, is built, then dropped
    linears = sum(x.numel() * (2 if ".fc" in name else 1) for name, x in shapes.items() if "norm" not in name)
    for _ in range(2):  # the appearance Q-Former, then the motion Q-Former
        made = {}
        # BertModel is built with torch's default initialisers, then initialised: normal weights, zero biases
        for others in (linears, 0):
            normal((words, dim))
            normal((512, dim))  # word positions
            skip_uniform(others)
        for name, shape in shapes.items():
            if name.endswith("mlp.fc1.weight"):  # the MLP for text comes first, and is thrown away
                normal(shape)
                normal(shape[::-1])
            constant = torch.full(shape, float(name.endswith("norm.weight")))  # norms 1, biases 0
            made[released_name(name)] = normal(shape) if len(shape) == 2 else constant
        # the language-model head is built and initialised; BertModel is not initialised a second time
        skip_uniform(dim * dim + dim + words * dim)
        normal((dim, dim))
        normal((words, dim))
        made["query_tokens_motion"] = normal((1, config.n_queries, dim))
    return made


def made_here(config, motion, new):
    """{our name: Held} of no file: motion's ln_vision; Q-Former and queries, if replayed; the rest if new."""
    made = torch.nn.LayerNorm(config.vit_dim).state_dict(prefix="motion.ln_vision.")  # as released
    if new:  # from a fixed seed
        torch.manual_seed(0)
        branches = torch.nn.ModuleDict({name: Branch(config) for name in config.branches})
        for name, p in branches.named_parameters():
            if ".video_" in name and p.ndim > 1:  # BERT's initialiser; torch's own elsewhere
                torch.nn.init.normal_(p, std=0.02)
            if not is_frame_level(name):
                made[name] = p
    held = {name: Held("made here", x.detach) for name, x in made.items()}
    replay = cache(partial(replay_motion_qformer, config))  # runs when read: missing files are reported first
    lost = [name for name in parameters(config) if motion == "replay" and name.startswith("motion.q")]
    return held | {name: Held("replayed", lambda name=name: replay()[released_name(name)]) for name in lost}


def weights(args):
    """Converts the released files into one folder that Hawk.from_pretrained opens.

    Without --hawk, the result is a starting point for training, a better one with --video-llama. If --hawk
    holds no motion Q-Former, it is recreated from the seed of the released training ("replay")."""
    given = [path for path in (args.llama, args.vit, args.qformer, args.hawk, args.video_llama) if path]
    open_tensors.cache_clear()
    held = {}
    sources = {}  # {(whether the file was named, tensor): file}
    for path in sorted(dict.fromkeys(given), key=Path.is_file):  # named files override folders
        shards = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        for file in shards if path.is_dir() else [path]:
            for name, (key, _) in open_tensors(file).items():
                other = sources.setdefault((path.is_file(), name), file)
                clear = other == file or re.fullmatch(LEFT_OUT, name)
                require(clear, f"{file}: {key} is in {other}, too; unknown which counts")
                held[name] = Held(f"{file}: {key}", lambda file=file, name=name: open_tensors(file)[name][1])
    require(not list(args.llama.glob("adapter_*")), f"{args.llama}: holds a LoRA adapter; merge it first")
    llama = data.read_json(args.llama / "config.json", *LLAMA.values())
    config = infer_config(args.llama / "config.json", llama, held, data.settings(args.set))
    data.Tokenizer(args.llama / "tokenizer.model", config.vocab_size)  # before anything large is written
    if llama.get("tie_word_embeddings") and "model.embed_tokens.weight" in held:
        held.setdefault("lm_head.weight", held["model.embed_tokens.weight"])
    motion = args.motion_qformer
    if motion == "auto":
        motion = "replay" if args.hawk else "blip2"
        theirs = [name for name in held if re.match(r"(Qformer|ln_vision)_motion\.(?!.*_ids)", name)]
        motion = "checkpoint" if theirs else motion
    print("motion Q-Former:", motion, flush=True)
    rejected = () if motion == "checkpoint" else ("Qformer_motion.", "ln_vision_motion.")
    held = {name: found for name, found in held.items() if not name.startswith(rejected)}
    made = made_here(config, motion, new=args.hawk is None)
    ours = {}  # the motion branch may be a copy of the appearance branch
    for name in parameters(config):
        released = released_name(name)
        copied = motion == "blip2" if is_frame_level(name) else args.video_llama and "video_" in released
        other = ours.get(name.replace("motion.", "appearance.")) if copied else made.get(name)
        ours[name] = held.pop(released, None) or other
        require(ours[name], f"{released} (our {name}) is missing in {', '.join(map(str, given))}")
    known = LEFT_OUT.replace("DEPTH", str(config.vit_depth))
    for name, (origin, read) in held.items():
        require(re.fullmatch(known, name), f"{origin} {tuple(read().shape)} is unknown")
    dtypes = {"vit": args.dtype, "llama": args.dtype or "bfloat16"}  # the released code rounds it to this
    write_folder(args.out, config, ours, dtypes, args.llama)
    record = {"files": [str(path) for path in given], "motion_qformer": motion, "set": args.set}
    data.replace_file(args.out / "provenance.json", json.dumps(record, indent=1) + "\n")


def parameters(config):
    """{name: parameter on the meta device} of the model."""
    with torch.device("meta"):
        return dict(Hawk(config).named_parameters())


def write_folder(out, config, held, dtypes, source):
    """Writes a folder of weights, or nothing. held: {our name: Held}. dtypes: {tower: dtype, None as stored}.
    source: the folder that holds the tokenizer and, for apps.timeline, phrases."""
    for name, like in parameters(config).items():
        origin, read = held[name]
        tensor = read()
        misfit = f"{origin} is {tuple(tensor.shape)} {tensor.dtype}, not {tuple(like.shape)} floats: {name}"
        require(tensor.shape == like.shape and tensor.is_floating_point(), misfit)
    tensors = {}
    with data.replaced_folder(out) as folder:
        phrases = [name for name in ("kinds.json", "clips.json") if (source / name).exists()]
        for name in ("tokenizer.model", *phrases):
            (folder / name).write_bytes((source / name).read_bytes())
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        for number, (name, (origin, read)) in enumerate(tqdm(held.items(), desc="writing"), 1):
            dtype = dtypes.get(name.partition(".")[0])
            tensors[name] = read().to(getattr(torch, dtype) if dtype else None, copy=True)
            require(tensors[name].isfinite().all(), f"{origin}: NaN or too large for {dtype or 'its type'}")
            if number == len(held) or sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_BYTES:
                part = f"-{number}" if number < len(held) else ""  # of a shard: its last tensor's number
                save_tensors(tensors, folder / f"model{part}.safetensors")
                tensors.clear()
                open_tensors.cache_clear()  # until then, pages read from mapped files stay in memory


# ---- 2. features: outputs of the frozen part, computed once for all clips ----------------------------------
def features(args, dataset=None):
    """Computes the frozen part of every clip once, for training without videos, ViT and frame Q-Formers.

    Reads DATA/train.jsonl and test.jsonl, writes OUT/train (--crops files for each clip) and OUT/test.
    Existing files are kept: a second run resumes. A folder of other weights or settings is rejected."""
    require(args.crops > 0, "--crops must be at least 1")
    splits = [split for split in ("train", "test") if (args.data / f"{split}.jsonl").exists()]
    require(splits, f"{args.data}: holds neither train.jsonl nor test.jsonl")
    device = data.usable_device(args.device)
    model = Hawk.from_pretrained(args.weights, dtype=None)
    del model.llama  # not needed for frames, and in float32 it would fill a 24 GB card
    model = model.float().to(device)
    fingerprint = data.frozen_fingerprint(model)
    for split in splits:
        rows = data.read_index(args.data / f"{split}.jsonl")
        folder = args.out / split
        crops = args.crops if split == "train" else 1
        meta = data.cache_meta(rows, model.config, fingerprint) | {"choices": crops, "seed": CROP_SEED}
        meta |= {"dtype": args.dtype, "bfloat16": args.bfloat16}
        folder.mkdir(parents=True, exist_ok=True)
        old = data.read_json(folder / "meta.json", *meta) if (folder / "meta.json").exists() else meta
        for key, value in meta.items():
            require(old[key] == value, f"{folder}: has {key} {old[key]!r}, not {value!r}; use another --out")
        data.replace_file(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
        files = [[data.cache_file(folder, i, crop) for crop in range(crops)] for i in range(len(rows))]
        todo = [i for i, found in enumerate(files) if not all(map(Path.exists, found))]
        clips = (dataset or FeatureDataset)(rows, None, model.config)
        clips.crops = crops
        if device.type == "cpu" or dataset:
            samples = torch.utils.data.DataLoader(clips, None, sampler=todo, num_workers=args.workers)
        else:  # threads share the GPU, which computes flow in a tenth of the time
            clips.device = device
            samples = read_ahead(clips.__getitem__, todo, max(1, args.workers))
        bad = []
        for sample in tqdm(samples, desc=split, total=len(todo)):
            for remark in sample.get("notes", [sample.get("error")]):
                tqdm.write(f"note: {remark}", file=sys.stderr)
            if "error" in sample:
                bad.append(json.dumps({"row": sample["index"]} | sample) + "\n")
                continue
            for file, streams in zip(files[sample["index"]], sample["variants"], strict=True):
                streams = {name: x[None].to(device) / 255 for name, x in streams.items()}
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.bfloat16):
                    found = model.frame_features(streams)  # {branch: (1, T, Q, C)}
                found = {name: x[0].to("cpu", getattr(torch, args.dtype)) for name, x in found.items()}
                data.replace_file(file, safetensors.torch.save(found, {"about": json.dumps(sample["about"])}))
        data.replace_file(folder / "bad_videos.jsonl", "".join(bad))
        require(len(bad) < len(rows), f"{folder}: none of the {len(rows)} videos can be read")


def read_ahead(function, items, threads):
    """Like map() over a sequence, but threads work ahead, on up to two items for each thread."""
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(function, item) for item in items[: 2 * threads]]
        for item in items[2 * threads :]:
            yield ahead.pop(0).result()
            ahead.append(pool.submit(function, item))
        yield from (result.result() for result in ahead)


class FeatureDataset(data.HawkDataset):  # `crops` variants of each clip, and what the cache records about it
    def sample(self, i, generator):
        streams, clip = self.read(i, "uniform", None)
        generators = [data.clip_generator(CROP_SEED, crop, i) for crop in range(1, self.crops)]
        crops = [streams, *(data.random_crop(streams, generator) for generator in generators)]
        about = {"message": clip.message, "indices": json.dumps(clip.indices.tolist())}
        video = Path(self.rows[i]["video"])  # a subclass may need no file
        about["bytes"] = data.video_mark(video) or "0"  # shows if it is replaced later
        return {"index": i, "variants": crops, "about": about, "notes": [f"{video}: {x}" for x in clip.notes]}


# ---- 3. merge: trained weights, their base and their LoRA -> one folder ------------------------------------
def merge(args):
    """Merges trained weights, their base and their LoRA into one folder.

    Matrices with LoRA are written in float32 unless --dtype says otherwise. --set branches=a,b,c copies the
    motion branch (if there is none, the last) to new branches, and drops those that it does not name."""
    model = Hawk.from_pretrained(args.weights, dtype=None, base=args.base)
    config = HawkConfig.from_dict(asdict(model.config) | {"lora_rank": 0} | data.settings(args.set), "--set")
    held = {name: Held(name, p.detach) for name, p in model.named_parameters() if "lora_" not in name}

    def merged(x):  # W + scale · B A in float32, when it is written: all at once would fill the memory
        return (x.weight.float() + x.scale * (x.lora_B.float() @ x.lora_A.float())).detach()

    lora = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    held |= {f"{name}.weight": Held(name, partial(merged, layer)) for name, layer in lora.items()}
    before = model.config.branches
    pattern = "motion" if "motion" in before else before[-1]
    for branch in sorted(set(config.branches) - set(before)):
        unknown = "" if branch in data.MASKS else "; data.MASKS does not have it yet"
        print(f"{branch}: copied from {pattern}{unknown}")
        held |= {name: Held(name, p.detach) for name, p in model.branch(pattern).named_parameters(branch)}
    wanted = parameters(config)
    for name in held.keys() - wanted:  # encoder_1 is unused without another branch to compare with
        if name.partition(".")[0] in set(before) - set(config.branches) or ".encoder_1." in name:
            del held[name]
    misfits = sorted(held.keys() ^ wanted)
    require(not misfits, f"--set {' '.join(args.set)}: is not how these weights are shaped {misfits[:1]}")
    dtypes = dict.fromkeys(("vit", "llama", *config.branches), args.dtype)
    write_folder(args.out, config, held, dtypes, args.weights)


def hawk(args):
    """Converts Hawk's annotations into index files, and finds each video (in apps/annotations.py).

    A folder's all_videos_train.json and all_videos_test.json are read; without them, all JSON files, those
    named "..test" as the test split. OUT/report.json lists what is missing or broken."""
    importlib.import_module("apps.annotations").make_index(args)


# ---- Command line ------------------------------------------------------------------------------------------
PATHS = {  # options that name files and folders
    "llama": "folder of meta-llama/Llama-2-7b-chat-hf", "vit": "eva_vit_g.pth, or a folder of BLIP-2",
    "qformer": "blip2_pretrained_flant5xxl.pth, or a folder of BLIP-2", "out": "folder to write",
    "hawk": "finetune.pth or pretrained.pth", "video-llama": "VL_LLaMA_2_7B_Finetuned.pth",
    "weights": "folder of weights, such as runs/x/last", "base": "the base of --weights, if it has moved",
    "data": "folder of train.jsonl and test.jsonl", "annotations": "JSON file, or a folder of such files",
    "videos": "folder of UCF_Crime, DoTA and so on", "tokenizer": "tokenizer.model: count overlong texts",
}  # fmt: skip
OPTIONAL = ("hawk", "video-llama", "base", "tokenizer")
JOBS = {weights: "llama vit qformer hawk video-llama out", features: "weights data out",
        merge: "weights base out", hawk: "annotations videos tokenizer out"}  # fmt: skip


def main(argv=None):
    parser = data.make_parser(__doc__)
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    for run, names in JOBS.items():
        job = jobs.add_parser(run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__)
        job.set_defaults(run=run)
        job.error = parser.error
        add = job.add_argument
        for key in names.split():
            add(f"--{key}", type=Path, required=key not in OPTIONAL, help=PATHS[key])
        if run is weights:
            text = "auto: the checkpoint's; else, with --hawk, redrawn from the released seed; else BLIP-2's"
            add("--motion-qformer", choices="auto checkpoint replay blip2".split(), default="auto", help=text)
        if run in (weights, merge):
            about = "fields of config.json, such as vit_heads=16"
            add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=about)
            about = "dtype of files; default: as stored; converted LLaMA in bfloat16, merged LoRA in float32"
            add("--dtype", choices=("float16", "bfloat16", "float32"), help=about)
        if run is features:
            add("--crops", type=int, default=1, help="variants per clip, the first uncropped (default 1)")
            add("--dtype", choices=("float16", "float32"), default="float16", help="default: float16")
            add("--bfloat16", action="store_true", help="compute in bfloat16: about twice as fast")
            add("--workers", type=int, default=2, help="processes (on a GPU: threads) that read (default 2)")
            add("--device", help="default: the best available")
    args = parser.parse_args(argv)
    try:
        taken = args.run in (weights, merge) and args.out.exists() and any(args.out.iterdir())
        require(not taken, f"{args.out}: is not empty; choose another name, or delete it first")
        args.run(args)
    except (OSError, ValueError, ImportError, safetensors.SafetensorError, RuntimeError) as error:
        died = isinstance(error, ConnectionResetError) or "DataLoader worker (pid" in str(error)
        sys.exit("error: " + ("a worker died; start again" if died else str(error).strip().split("\n")[-1]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit cleanly: half-written files are removed
    signal.signal(signal.SIGINT, lambda *_: torch.utils.data.get_worker_info() or sys.exit(130))
    main()
