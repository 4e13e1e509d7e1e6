"""Jobs that run once, before anything is trained or asked. One sub-command each:

    python prepare.py weights --llama DIR --vit FILE --qformer FILE --hawk FILE --out weights/hawk-7b
    python prepare.py features --weights weights/hawk-7b --data data/hawk --out data/features
    python prepare.py merge --weights runs/x/last --out weights/x
    python prepare.py hawk --annotations DIR --videos DIR --out data/hawk

Top to bottom: weights (names, sizes, the motion Q-Former that no file holds), features, merge, hawk.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads wait without spinning
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

import data
from hawk import Branch, Hawk, HawkConfig, is_frame_level, read_chain, require, save_tensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 10**9


def note(text):
    print("note:", text, file=sys.stderr)


def read_json(file, *needed):
    """The content of a JSON file; ValueError if it cannot be read, or is no object with the `needed` keys."""
    try:
        content = json.loads(file.read_bytes())
        return content | {key: content[key] for key in needed} if needed else content
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"{file}: is missing, or not the JSON expected ({type(e).__name__}: {e})") from e


# ---- 1. weights: the released files -> one folder of ours --------------------------------------------------
# Our name of a tensor, less that of its branch, becomes the released one by these replacements, in this
# order; {m} is "_motion" in the motion branch.
RELEASED = {
    r"^llama\.lm_head": "lm_head", r"^llama\.": "model.",
    r"^vit\.patch_embed": "patch_embed.proj", r"^vit\.": "",
    r"^ln_vision": "ln_vision{m}", r"^frame_position": "video_frame_position_embedding{m}",
    r"^proj_0": "llama_proj{m}_0", r"^(encoder|decoder)_": r"llama_proj{m}_last.\1_",
    r"^(video_|)queries": r"\1query_tokens{m}",
    r"^(video_|)qformer\.norm": r"\1Qformer{m}.bert.embeddings.LayerNorm",
    r"^(video_|)qformer\.layers": r"\1Qformer{m}.bert.encoder.layer",
    r"(?:self|(cross))_attention": r"\1attention", r"attention\.(query|key|value)": r"attention.self.\1",
    r"attention\.output": "attention.output.dense", r"attention\.norm": "attention.output.LayerNorm",
    r"(layer.+)mlp\.fc1": r"\1intermediate_query.dense", r"(layer.+)mlp\.fc2": r"\1output_query.dense",
    r"(layer.+)mlp\.norm": r"\1output_query.LayerNorm",
}  # fmt: skip
# Hugging Face's BLIP-2 has other names. Its qkv.bias holds three biases; "[q]" and "[v]" are thirds of it.
HUGGING_FACE = {
    "^cls_token": "vision_model.embeddings.class_embedding", r"\.norm(\d)": r".layer_norm\1",
    "^pos_embed": "vision_model.embeddings.position_embedding", r"attn\.proj": "self_attn.projection",
    r"^patch_embed\.proj": "vision_model.embeddings.patch_embedding", r"attn\.qkv": "self_attn.qkv",
    "^ln_vision": "vision_model.post_layernorm", r"attn\.([qv])_bias": r"self_attn.qkv.bias[\1]",
    r"^Qformer\.bert\.embeddings\.LayerNorm": "qformer.layernorm", "^blocks": "vision_model.encoder.layers",
    r"^(Qformer\.bert.+attention)\.self": r"\1.attention", r"^Qformer\.bert": "qformer",
}  # fmt: skip
# What a file may hold beyond that: the end of EVA's classifier, BLIP-2's language model, tables of positions,
# Video-LLaMA's projection, the other tower in a folder with both of BLIP-2's. Anything else is an error.
EVA_HEAD = r"(norm|head)\..+"
LEFT_OUT = {
    "llama": r".+\.inv_freq",
    "vit": EVA_HEAD + r"|(qformer|t5_proj|language_.+|vision_model\.post_layernorm)\..+|query_tokens",
    "qformer": r"(t5_proj|language_.+|vision_model\.(embeddings|encoder))\..+|.+\.position_ids",
    "hawk": r".+\.(position_ids|inv_freq)|llama_proj\..+",
}


def released_names(name):
    """What our tensor `name` is called in [the released .pth files, Hugging Face's BLIP-2]."""
    released = re.sub(r"^(appearance|motion)\.", "", name)
    for pattern, replacement in RELEASED.items():
        released = re.sub(pattern, replacement, released)
    released = released.replace("{m}", "_motion" if name.startswith("motion.") else "")
    hugging_face = released
    for pattern, replacement in HUGGING_FACE.items():
        hugging_face = re.sub(pattern, replacement, hugging_face)
    return [released, hugging_face]


@cache
def open_tensors(file):
    """{name: tensor} of a .pth, .bin or .safetensors file, mapped, not read; of a checkpoint, its "model"."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        # files older than torch 1.6 are no zip files and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        content = content.get("model", content.get("state_dict", content))
        wrapped = r"^(module\.|_orig_mod\.)+"  # by DistributedDataParallel and torch.compile
        return {re.sub(wrapped, "", name): tensor.detach() for name, tensor in content.items()}
    except Exception as e:  # these readers raise almost anything at a damaged file
        reason = re.split(r"\n|\. ", str(e))[0]
        raise ValueError(f"{file}: is missing, cut short, or holds other than tensors ({reason})") from e


def read_tensor(held, name):
    """The tensor of this name in the file `held`, or `held` itself where it was made here."""
    name, _, third = name.partition("[")
    tensor = held if isinstance(held, torch.Tensor) else open_tensors(held)[name]
    if not third:
        return tensor
    fits = tensor.ndim == 1 and len(tensor) % 3 == 0 and not tensor.chunk(3)[1].any()  # keys have no bias
    require(fits, f"{held}: {name} {tuple(tensor.shape)} must be [queries, zeros, values]")
    return tensor.chunk(3)["qkv".index(third[0])]


def locate(name, sources, motion):
    """(role, released name, file or tensor) of a tensor of ours; ValueError if it is missing.

    sources: {role: (path, {released name: file or tensor})}. motion: the choice of --motion-qformer."""
    tower = name.partition(".")[0]
    role = tower if tower in sources else "hawk"
    # BLIP-2's Q-Former serves both branches, except for the motion queries: published training saved its own
    saved = released_names(name)[0] in sources["hawk"][1]
    copied = tower == "appearance" or (motion == "blip2" and not saved)
    if role == "hawk" and is_frame_level(name) and copied:
        role = "qformer"
        name = name.replace("motion.", "appearance.")
    path, held = sources[role]
    names = dict.fromkeys(released_names(name))
    for released in names:
        key = released.partition("[")[0]
        if key in held:
            return role, released, held[key]
    raise ValueError(f"{path}: the tensor {' or '.join(names)} is missing (it becomes {name})")


LLAMA = {  # HawkConfig: LLaMA's config.json
    "llama_dim": "hidden_size", "llama_layers": "num_hidden_layers", "llama_heads": "num_attention_heads",
    "llama_mlp": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def infer_config(sources, overrides):
    """HawkConfig of the files: LLaMA's sizes from its config.json, others from shapes; `overrides` wins."""

    def shape(name, dims):
        _, released, held = locate(name, sources, "blip2")
        found = tuple(read_tensor(held, released).shape)
        require(len(found) == dims, f"{held}: {released} must have {dims} dimensions, not {found}")
        return found

    def layers(role, pattern):
        numbers = [re.match(pattern + r"\.(\d+)\.", name) for name in sources[role][1]]
        return 1 + max((int(found[1]) for found in numbers if found), default=0)

    file = sources["llama"][0] / "config.json"
    llama = read_json(file, *LLAMA.values())
    # what would change the arithmetic is used, or refused by name; transformers 5 writes rope_parameters
    only = {"num_key_value_heads": llama["num_attention_heads"], "hidden_act": "silu"}
    only |= {"head_dim": llama["hidden_size"] // llama["num_attention_heads"]}
    for key, value in (only | {"attention_bias": False, "mlp_bias": False}).items():
        found = llama.get(key)
        require(found in (None, value), f"{file}: {key} is {found!r}; Hawk's LLaMA can only do {value!r}")
    rope = (llama.get("rope_scaling") or {}) | (llama.get("rope_parameters") or {})
    scaled = {key: x for key, x in rope.items() if key != "rope_theta" and x not in ("default", None, 1.0)}
    require(not scaled, f"{file}: rope_scaling or rope_parameters has {scaled}; positions cannot be scaled")
    c = {ours: llama[theirs] for ours, theirs in LLAMA.items()}
    c["rope_theta"] = rope.get("rope_theta", llama.get("rope_theta", 10000.0))
    c["context_length"] = llama.get("max_position_embeddings", 4096)

    c["vit_dim"], _, c["patch_size"], _ = shape("vit.patch_embed.weight", 4)
    c["vit_mlp"], _ = shape("vit.blocks.0.mlp.fc1.weight", 2)
    _, positions, _ = shape("vit.pos_embed", 3)
    c["image_size"] = math.isqrt(positions - 1) * c["patch_size"]
    if c["vit_dim"] != 1408:  # else 39, as published
        c["vit_depth"] = layers("vit", r"(?:blocks|vision_model\.encoder\.layers)")
        whole = any(re.fullmatch(EVA_HEAD, name) for name in sources["vit"][1])
        c["vit_depth"] -= whole  # of a whole EVA the last block is not used
    _, c["n_queries"], c["qformer_dim"] = shape("appearance.queries", 3)
    c["qformer_mlp"], _ = shape("appearance.qformer.layers.0.mlp.fc1.weight", 2)
    c["qformer_layers"] = layers("qformer", r"(?:Qformer\.bert|qformer)\.encoder\.layer")
    c["tight_dim"] = c["llama_dim"] // 16
    if sources["hawk"][1]:
        c["n_frames"], _ = shape("appearance.frame_position.weight", 2)
        _, c["n_video_queries"], _ = shape("appearance.video_queries", 3)
        c["video_layers"] = layers("hawk", r"video_Qformer\.bert\.encoder\.layer")
    if "llama_proj_last.encoder_1.weight" in sources["hawk"][1]:  # not in Video-LLaMA's file
        c["tight_dim"], _ = shape("appearance.encoder_1.weight", 2)
    for tower, published in (("vit", 1408), ("qformer", 768)):  # shapes do not show the number of heads
        dim = c[f"{tower}_dim"]
        known = dim == published or f"{tower}_heads" in overrides
        require(known, f"{tower}_dim is {dim}, not {published}: add --set {tower}_heads=N")
    require("branches" not in overrides, "--set branches: is for `prepare.py merge`; released files have two")
    return HawkConfig.from_dict(c | overrides, "the released files and --set")


# The motion Q-Former that no file holds: the released code builds it at random and freezes it, and its
# checkpoints leave frozen parts out. But training began with torch.manual_seed(42), so it follows from that
# seed and from everything that is drawn before it: two ViTs and the appearance Q-Former.
BERT_WORDS = 30522  # bert-base-uncased, whose text half the released code builds and throws away
BERT_POSITIONS = 512


def replay_motion_qformer(config, seed=42):
    """The motion Q-Former of the released training: {released name: tensor}, bit for bit.

    Uniform numbers can be skipped in portions of any size. Normal ones are drawn tensor by tensor, because
    torch draws 16 more for a size that is no multiple of 16, and two at a time below 16."""
    generator = torch.Generator().manual_seed(seed)
    scratch = torch.empty(1 << 16)

    def skip_uniform(count):
        for start in range(0, count, len(scratch)):
            scratch[: count - start].uniform_(generator=generator)

    def normal(*shape):
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)

    with torch.device("meta"):
        model = Hawk(config)  # lists its parameters in the order in which the released modules are built
    # A ViT draws torch's default initialisers (none for norms, q_bias, v_bias), then a truncated normal, one
    # uniform number each, for positions, class token and the weights of its Linears again.
    drawn = [p for name, p in model.vit.named_parameters() if not re.search(r"norm|[qv]_bias", name)]
    skip_uniform(2 * sum(p.numel() * (2 if p.ndim == 2 else 1) for p in drawn))

    dim = config.qformer_dim
    mlp = config.qformer_mlp
    shapes = {name: p.shape for name, p in model.motion.qformer.named_parameters(prefix="motion.qformer")}
    linears = sum(shape.numel() for name, shape in shapes.items() if "norm" not in name)
    linears += config.qformer_layers * (2 * dim * mlp + mlp + dim)  # each layer has a second MLP, for text
    for _ in range(2):  # the appearance Q-Former, then the motion Q-Former
        made = {}
        # BertModel is built with torch's default initialisers, then initialised: normal weights, zero biases
        normal(BERT_WORDS, dim)
        normal(BERT_POSITIONS, dim)
        skip_uniform(linears)
        normal(BERT_WORDS, dim)
        normal(BERT_POSITIONS, dim)
        for name, shape in shapes.items():
            if name.endswith("mlp.fc1.weight"):  # the MLP for text comes first
                normal(mlp, dim)
                normal(dim, mlp)
            constant = torch.full(shape, float(name.endswith("norm.weight")))
            made[released_names(name)[0]] = normal(*shape) if len(shape) == 2 else constant
        # the head for words is built and initialised; what BertModel has initialised is skipped this time
        skip_uniform(dim * dim + dim + BERT_WORDS * dim)
        normal(dim, dim)
        normal(BERT_WORDS, dim)
        made["query_tokens_motion"] = normal(1, config.n_queries, dim)
    return made


def fresh_weights(config, held):
    """{released name: tensor} of what training without --hawk starts with. `held`, Video-LLaMA's tensors if
    there are any, serve both branches; the rest is drawn from a fixed seed, as released code draws it."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        branches = nn.ModuleDict({name: Branch(config) for name in config.branches})
        for name, p in branches.named_parameters():
            released = released_names(name)[0]
            given = released.replace("_motion", "")
            if ".video_" in name and p.ndim > 1:  # BERT's initialiser; torch's own elsewhere
                nn.init.normal_(p, std=0.02)
            if held and given.startswith("video_"):
                if given in held:  # else locate() says that it is missing
                    made[released] = read_tensor(held[given], given)
            elif not is_frame_level(name):
                made[released] = p.detach()
    return made


def complete_motion(choice, path, held, config):
    """Makes `held`, the tensors of --hawk (at `path`, or None), what --motion-qformer asks for, and says it.

    -> (choice, that line, {released name: file or tensor})"""
    there = any(name.startswith("Qformer_motion.bert.encoder.") for name in held)
    require(there or choice != "checkpoint", f"{path or '--hawk'}: holds no Qformer_motion to take")
    if choice == "auto" and path is None:
        choice = "blip2"
    elif choice == "auto":
        choice = "checkpoint" if there else "replay"
    origins = {"checkpoint": "from the checkpoint", "blip2": "a copy of BLIP-2's"}
    line = origins.get(choice, "rebuilt from seed 42")
    if choice == "replay" and path and not there:
        line += f" ({path} does not hold it)"
    print("motion Q-Former:", line, flush=True)
    if choice != "checkpoint":
        held = {n: h for n, h in held.items() if not n.startswith(("Qformer_motion.", "ln_vision_motion."))}
    if choice == "replay":
        held = replay_motion_qformer(config) | held
    if choice != "blip2":  # built by the released code, and never loaded
        identity = nn.LayerNorm(config.vit_dim).state_dict(prefix="ln_vision_motion.")
        held = identity | held
    return choice, line, held


def weights(args):
    """Turns the released files into one folder that Hawk.from_pretrained opens."""
    open_tensors.cache_clear()
    overrides = data.settings(args.set)
    paths = {"llama": args.llama, "vit": args.vit, "qformer": args.qformer}
    paths["hawk"] = args.hawk or args.video_llama
    sources = {}
    for role, path in paths.items():  # a file, or a Hugging Face folder of shards
        files = [path] if path else []
        if path and path.is_dir():
            files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        sources[role] = (path, {name: file for file in files for name in open_tensors(file)})
    adapters = sorted(args.llama.glob("adapter_*"))
    require(
        not adapters, f"{args.llama}: holds a LoRA adapter ({adapters[:1]}); merge it into the base first"
    )
    config = infer_config(sources, overrides)
    data.Tokenizer(args.llama / "tokenizer.model", config.vocab_size)  # before anything large is written
    if read_json(args.llama / "config.json").get("tie_word_embeddings"):
        held = sources["llama"][1]
        embedding = "model.embed_tokens.weight"
        held.setdefault("lm_head.weight", read_tensor(held[embedding], embedding))
    held = sources["hawk"][1]
    if args.hawk is None:
        held = held | fresh_weights(config, held)
    motion, motion_line, held = complete_motion(args.motion_qformer, args.hawk, held, config)
    sources["hawk"] = (paths["hawk"], held)
    with torch.device("meta"):
        wanted = dict(Hawk(config).named_parameters())

    entries = []
    origins = {}
    surplus = {role: dict(tensors) for role, (_, tensors) in sources.items()}
    for name, like in wanted.items():
        role, released, held = locate(name, sources, motion)
        surplus[role].pop(released.partition("[")[0], None)
        origins[name] = f"{'made here' if isinstance(held, torch.Tensor) else held}: {released}"
        tensor = read_tensor(held, released)
        found = f"{origins[name]} is {tuple(tensor.shape)} {tensor.dtype}"
        fits = tensor.shape == like.shape and tensor.is_floating_point()
        require(fits, f"{found}, but {name} needs {tuple(like.shape)} of floating point")
        dtype = tensor.dtype
        if name.startswith(("vit.", "llama.")):  # the big frozen towers; the rest stays as it was trained
            dtype = DTYPES.get(args.dtype, dtype)
        if name.startswith("llama.") and args.dtype == "released":
            dtype = torch.bfloat16  # so the released code rounds it
        entries.append((name, like.numel(), dtype, partial(read_tensor, held, released)))

    left_out = dict(LEFT_OUT)
    left_out["vit"] += rf"|blocks\.{config.vit_depth}\..+"  # EVA's last block, which BLIP-2 does without
    for role, tensors in surplus.items():
        for name, held in tensors.items():
            shape = tuple(read_tensor(held, name).shape)
            known = re.fullmatch(left_out[role], name)
            require(known, f"{held}: unknown tensor {name} {shape}: the model has no place for it")
        left_out[role] = sorted(tensors)
    record = {"motion_qformer": motion_line, "set": overrides, "left_out": left_out, "tensors": origins}
    files = {held for _, tensors in sources.values() for held in tensors.values() if isinstance(held, Path)}
    write_folder(args.out, config, args.llama / "tokenizer.model", entries, record, sorted(files))


def write_folder(out, config, tokenizer, entries, record=None, files=()):
    """Writes one of our folders, or nothing. entries: (name, size, dtype, function that reads the tensor).
    One shard is in memory at a time, and the mapped files are closed before each: what was read of them
    counts as our memory. `record` becomes provenance.json, with the SHA-256 of `files`."""
    shards = defaultdict(list)
    total = 0
    for name, size, dtype, read in entries:
        shards[total // SHARD_BYTES].append((name, dtype, read))
        total += size * dtype.itemsize
    with data.replaced_folder(out) as folder:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        for number, shard in enumerate(tqdm(shards.values(), desc="writing", unit="shard"), 1):
            open_tensors.cache_clear()
            tensors = {name: read().to(dtype, copy=True).contiguous() for name, dtype, read in shard}
            for name, tensor in tensors.items():
                finite = math.isfinite(sum(torch.aminmax(tensor)))
                origin = record["tensors"][name] if record else name
                require(finite, f"{origin}: holds NaN, or a number too large for {tensor.dtype}")
            part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            save_tensors(tensors, folder / f"model{part}.safetensors")
        if record:
            record["sha256"] = {}
            for file in tqdm(files, desc="SHA-256", unit="file"):
                with file.open("rb") as opened:
                    record["sha256"][str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
            (folder / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}: {total / 1e9:.2f} GB")


# ---- 2. features: what is frozen in training, computed once for all clips ----------------------------------
def features(args):
    """Computes the frozen part of every clip once, for training without videos, ViT and frame Q-Formers.

    Writes OUT/train and OUT/test, a file for each clip and each of its --crops variants. What is there is
    done: a second run resumes. A folder made with other weights or settings is refused."""
    splits = [split for split in ("train", "test") if (args.data / f"{split}.jsonl").exists()]
    require(splits, f"{args.data}: holds neither train.jsonl nor test.jsonl")
    model = Hawk.from_pretrained(args.weights, device=data.usable_device(args.device))
    fingerprint = data.frozen_fingerprint(model)
    for split in splits:
        rows = data.read_index(args.data / f"{split}.jsonl")
        folder = args.out / split
        crops = args.crops if split == "train" else 1
        options = (args.seed, args.dtype, args.bfloat16)
        meta = data.cache_meta(rows, model.config, fingerprint, crops, *options)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "meta.json").exists():
            data.replace_file(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
        there = read_json(folder / "meta.json", "weights")
        for key, value in meta.items():
            old = there.get(key)
            require(old == value, f"{folder}: has {key} {old!r}, not {value!r}; choose another --out")
        variants = VariantDataset(rows, model.config, args.seed)
        todo = [(row, k) for k in range(crops) for row in range(len(rows))]
        todo = [sample for sample in todo if not data.cache_file(folder, *sample).exists()]
        order = BatchSampler(todo, args.batch_size, drop_last=False)
        loader = DataLoader(variants, batch_sampler=order, num_workers=args.workers, collate_fn=list)
        bad = []
        for batch in tqdm(loader, desc=f"{split}: {len(todo)} clips", unit="batch"):
            good = [sample for sample in batch if "error" not in sample]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bfloat16):
                write_features(model, good, folder, args.dtype)
            bad += [sample for sample in batch if "error" in sample]
            lines = [json.dumps(sample) + "\n" for sample in bad]
            data.replace_file(folder / "bad_videos.jsonl", "".join(lines))
        for sample in bad:
            note(sample["error"])


class VariantDataset(data.ClipDataset):
    """Sample (row, k) is variant k of the row's clip: the whole picture for k = 0, else cropped at random."""

    def __getitem__(self, sample):
        row, k = sample
        video = self.rows[row]["video"]
        try:
            streams, clip = self.read(row, "uniform", None)
        except data.VideoError as error:
            return {"row": row, "video": os.path.basename(video), "error": str(error)}
        if k > 0:
            streams = data.random_crop(streams, data.clip_generator(self.seed, k, row))
        facts = {"message": clip.message, "indices": json.dumps(clip.indices.tolist())}
        facts["bytes"] = str(os.path.getsize(video))  # tells when another video takes its place
        return {"place": sample, "streams": streams, "facts": facts}


@torch.no_grad()
def write_features(model, samples, folder, dtype):
    """Encodes the frames of all samples together, and writes {branch: (T, Q, C)} of each into a file."""
    if not samples:
        return
    streams = {}
    for name in model.config.branches:
        clips = [sample["streams"][name] for sample in samples]
        streams[name] = torch.cat(clips)[None].to(model.device) / 255  # (1, frames of all clips, 3, H, W)
    features = {}
    for name, x in model.frame_features(streams).items():
        features[name] = x[0].to("cpu", DTYPES[dtype]).split([len(clip) for clip in clips])
    for n, sample in enumerate(samples):
        content = safetensors.torch.save({name: x[n] for name, x in features.items()}, sample["facts"])
        data.replace_file(data.cache_file(folder, *sample["place"]), content)


# ---- 3. merge: trained weights, what they are based on and their LoRA -> one folder ------------------------
def merge(args):
    """Makes one folder of trained weights, what they are based on and their LoRA.

    What LoRA corrects is written in float32 unless --dtype says otherwise: merging rounds nothing away. --set
    branches=a,b,c copies the motion branch (without one, the last) to each branch that the weights lack, and
    leaves out those that it does not name."""
    model = Hawk.from_pretrained(args.weights, dtype=None)
    held = {name: p.detach() for name, p in model.named_parameters() if "lora_" not in name}
    lora = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    config = HawkConfig.from_dict(asdict(model.config) | {"lora_rank": 0} | data.settings(args.set), "--set")
    before = model.config.branches
    pattern = "motion" if "motion" in before else before[-1]
    new = [name for name in config.branches if name not in before]
    dropped = [name for name in before if name not in config.branches]
    with torch.device("meta"):
        wanted = dict(Hawk(config).named_parameters())
    # surplus: dropped branches, and encoder_1 in one that has no other to be compared with any more
    kept = [name for name in held if name.partition(".")[0] not in dropped and ".encoder_1." not in name]
    misfits = [name for name in kept if name not in wanted]
    entries = []
    for name, like in wanted.items():
        tower, _, part = name.partition(".")
        source = f"{pattern}.{part}" if tower in new else name
        if source not in held or held[source].shape != like.shape:
            misfits.append(name)
            continue
        stored = torch.float32 if source in lora else held[source].dtype
        read = partial(merged, held[source], lora.get(source))
        entries.append((name, like.numel(), DTYPES.get(args.dtype, stored), read))
    require(not misfits, f"--set {' '.join(args.set)}: is not how these weights are shaped ({misfits[:1]})")
    if new or dropped:
        print(f"copied from {pattern}: {', '.join(new) or 'none'}; left out: {', '.join(dropped) or 'none'}")
    tokenizers = [folder / "tokenizer.model" for folder in reversed(read_chain(args.weights)[1])]
    write_folder(args.out, config, next(filter(Path.exists, tokenizers), tokenizers[0]), entries)


def merged(weight, lora):
    """W + scale · B A in float32, or W where there is no LoRA: computed only when it is written."""
    if lora is None:
        return weight
    return weight.float() + lora.scale * (lora.lora_B.float() @ lora.lora_A.float()).detach()


# ---- 4. hawk: the published annotations, and videos as they lie on this disk -> index files of ours --------
FOLDERS = {  # in the annotations, which hold paths of their authors' machine: in the published videos
    "UCF-Crime": "UCF_Crime", "ShanghaiTechDataset": "ShanghaiTech", "avenue/avenue": "CUHK_Avenue",
    "ped1/ped1": "Ped1", "ped2/ped2": "Ped2", "DoTA": "DoTA", "UBnormal": "UBnormal",
}  # fmt: skip
FOLDERS |= {new: new for new in FOLDERS.values()}
PUBLISHED = re.compile(f"(?:^|/)({'|'.join(FOLDERS)})/(.+)", re.DOTALL)
REFUSAL = r"\bas (an ai\b(?!-)|a language model)|^\W*((i['’]m|i am) (sorry|unable)|sorry,|i apolog)"
REFUSAL = re.compile(REFUSAL, re.IGNORECASE)


def video_path(videos, name):
    """The path of a video in a folder; ValueError for a name that leads out: "..", a full path, a link."""
    path = videos.resolve() / name
    inside = ".." not in Path(name).parts and path.resolve().is_relative_to(videos.resolve())
    require(inside, f"{str(name)!r} leads out of the folder of videos")
    return path


def index_row(path, source, description, qa=()):
    """A row of an index, flagged if its description is a refusal. Motion captions: apps/captions.py."""
    qa = [{"q": turn["q"], "a": turn["a"]} for turn in qa]
    flags = ["refusal"] if REFUSAL.search(description) else []
    return {"video": str(path), "source": source, "description": description, "qa": qa, "flags": flags}


def write_splits(out, splits):
    """Writes OUT/train.jsonl and so on. splits: {name: rows}; without rows there is no file."""
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        if rows:
            data.replace_file(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            (out / f"{split}.jsonl").unlink(missing_ok=True)
            note(f"no row for {split}.jsonl, so there is none")
    note(f"stage 1 also needs motion captions: python -m apps.captions {out}")


def hawk(args):
    """Turns Hawk's annotations into index files, and finds each video, whose folder may have been renamed.

    Writes the rows whose video is there into OUT/train.jsonl and OUT/test.jsonl, the others, with the reason,
    into OUT/report.json, and prints a table by source. "refusals" are descriptions in which their author, a
    language model, refused ("As an AI …"): they get a flag. The annotations stay as they are."""
    table = defaultdict(Counter)
    report = {"missing": [], "broken": []}
    splits = {}
    for split in ("train", "test"):
        name = f"all_videos_{split}.json"
        files = [args.annotations / folder / name for folder in ("", "Annotation/All_Mix", "All_Mix")]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            note(f"{args.annotations}: no {name}, nor in Annotation/All_Mix or All_Mix")
        else:
            splits[split] = list(hawk_rows(file, args.videos, table, report))
    total = sum(table.values(), Counter())
    first = json.dumps(next(iter(report["missing"] + report["broken"]), "no annotations"))
    require(total["found"], f"{args.videos}: no video of {total['rows']} rows; the first: {first}")
    write_splits(args.out, splits)
    data.replace_file(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    columns = ("rows", "found", "missing", "refusals", "broken")
    print(f"{'source':14}" + "".join(f"{column:>10}" for column in columns))
    for source, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{source:14}" + "".join(f"{counts[column]:10}" for column in columns))
    note(f"missing and broken rows, and why: {args.out / 'report.json'}")


def hawk_rows(file, videos, table, report):
    """Yields the index rows of one annotation file whose videos are there; counts and reports the others."""
    entries = read_json(file)
    require(isinstance(entries, list), f"{file}: must be a list of objects with video, QA and description")
    for number, entry in enumerate(tqdm(entries, desc=file.stem, unit="row"), 1):
        name = entry.get("video") if isinstance(entry, dict) else None
        found = PUBLISHED.search(name) if isinstance(name, str) else None
        source = FOLDERS[found[1]] if found else "other"
        try:
            row = {"video": entry["video"], "description": entry["description"], "qa": entry["QA"]}
            data.check_row({key: 0 if value is None else value for key, value in row.items()})
            path = video_path(videos, Path(source, found[2]) if found else name)
            state = "found" if path.is_file() and path.stat().st_size > 0 else "missing"
            reason = f"{path}: is missing or empty"
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as e:  # the last: links in a circle
            state = "broken"
            reason = f"needs video, QA and description ({type(e).__name__}: {e})"
        table[source].update(("rows", state))
        if state == "found":
            row = index_row(path, source, row["description"], row["qa"])
            table[source]["refusals"] += len(row["flags"])
            yield row
        else:
            report[state].append({"file": str(file), "number": number, "reason": reason})


# ---- Command line ------------------------------------------------------------------------------------------
MOTION_HELP = "as --hawk holds it, rebuilt from the released training's seed, or BLIP-2's; auto: what applies"
DTYPE_HELP = "of ViT and LLaMA; released: LLaMA in bfloat16, as the released code loads it; keep: as stored"


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    def add_job(run):
        job = jobs.add_parser(run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__)
        job.set_defaults(run=run)
        job.add_argument("--out", type=Path, required=True, help="folder to write")
        return job

    job = add_job(weights)
    add = job.add_argument
    add("--llama", type=Path, required=True, help="Hugging Face folder of llama-2-7b-chat-hf")
    add("--vit", type=Path, required=True, help="eva_vit_g.pth, or a Hugging Face folder of BLIP-2")
    add("--qformer", type=Path, required=True, help="blip2_pretrained_flant5xxl.pth, or that same folder")
    start = job.add_mutually_exclusive_group().add_argument
    start("--hawk", type=Path, help="finetune.pth or pretrained.pth; without it: a start for training")
    start("--video-llama", type=Path, help="VL_LLaMA_2_7B_Finetuned.pth, a better start for training")
    choices = ("auto", "checkpoint", "replay", "blip2")
    add("--motion-qformer", choices=choices, default="auto", help=MOTION_HELP)
    add("--dtype", choices=["released", "keep", *DTYPES], default="released", help=DTYPE_HELP)
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the config")

    add = add_job(features).add_argument
    add("--weights", type=Path, required=True, help="folder whose ViT and Q-Formers encode the clips")
    add("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    add("--crops", type=int, default=1, help="variants of each training clip; all but the first are cropped")
    add("--dtype", choices=["float16", "float32"], default="float16", help="of the files")
    add("--bfloat16", action="store_true", help="compute in bfloat16: about twice as fast")
    add("--batch-size", type=int, default=8)
    add("--workers", type=int, default=2, help="processes that read videos")
    add("--device", help="default: the best there is")
    add("--seed", type=int, default=42, help="of the crops")

    add = add_job(merge).add_argument
    add("--weights", type=Path, required=True, help="folder that train.py wrote")
    add("--dtype", choices=["keep", *DTYPES], default="keep", help="keep: as stored, merged in float32")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the config")

    add = add_job(hawk).add_argument
    add("--annotations", type=Path, required=True, help="folder with all_videos_{train,test}.json")
    add("--videos", type=Path, required=True, help="folder that holds UCF_Crime, DoTA, Ped1 and so on")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        taken = args.run in (weights, merge) and args.out.exists() and any(args.out.iterdir())
        require(not taken, f"{args.out}: is not empty; choose another name, or delete it first")
        args.run(args)
    except (OSError, ValueError, safetensors.SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit("error: " + str(error).strip().split("\n")[-1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is removed
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
