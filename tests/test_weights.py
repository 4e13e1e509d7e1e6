"""prepare.py weights: small files in the released formats, filled with random numbers, become a folder of ours."""

import json
import shutil
import sys
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prepare
from hawk import Hawk, HawkConfig

VIT, DEPTH, VIT_MLP, QF, QF_LAYERS, QF_MLP, QUERIES, FRAMES, LLAMA, TIGHT = 32, 2, 139, 24, 3, 96, 4, 6, 48, 3
HEADS = ["--set", "vit_heads=2", "qformer_heads=3"]
QUERY = "video_Qformer.bert.encoder.layer.1.attention.self.query.weight"


# ----------------------------------------------------------------------------------------------------------------------
# Small files in the released formats


def random_tensors(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def vit_shapes():
    shapes = {"cls_token": (1, 1, VIT), "pos_embed": (1, 5, VIT)}
    shapes |= {"patch_embed.proj.weight": (VIT, 3, 14, 14), "patch_embed.proj.bias": (VIT,)}
    for i in range(DEPTH + 1):  # EVA has one block more than is used
        b = f"blocks.{i}"
        shapes |= norm(f"{b}.norm1", VIT) | {f"{b}.attn.q_bias": (VIT,), f"{b}.attn.v_bias": (VIT,)}
        shapes |= (
            {f"{b}.attn.qkv.weight": (3 * VIT, VIT)} | linear(f"{b}.attn.proj", VIT, VIT) | norm(f"{b}.norm2", VIT)
        )
        shapes |= linear(f"{b}.mlp.fc1", VIT_MLP, VIT) | linear(f"{b}.mlp.fc2", VIT, VIT_MLP)
    return shapes | norm("norm", VIT) | linear("head", 7, VIT)


def qformer_shapes(name, layers, cross_every, context):
    shapes = {f"{name}.bert.embeddings.position_ids": (1, 512)} | norm(f"{name}.bert.embeddings.LayerNorm", QF)
    for i in range(layers):
        layer = f"{name}.bert.encoder.layer.{i}"
        for kind, width in (("attention", QF), ("crossattention", context)):
            if kind == "attention" or i % cross_every == 0:
                shapes |= linear(f"{layer}.{kind}.self.query", QF, QF) | linear(f"{layer}.{kind}.self.key", QF, width)
                shapes |= linear(f"{layer}.{kind}.self.value", QF, width)
                shapes |= linear(f"{layer}.{kind}.output.dense", QF, QF) | norm(f"{layer}.{kind}.output.LayerNorm", QF)
        shapes |= linear(f"{layer}.intermediate_query.dense", QF_MLP, QF)
        shapes |= linear(f"{layer}.output_query.dense", QF, QF_MLP) | norm(f"{layer}.output_query.LayerNorm", QF)
    return shapes


def hawk_shapes():
    shapes = {"query_tokens_motion": (1, QUERIES, QF), "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    for m in ("", "_motion"):
        shapes |= {f"video_query_tokens{m}": (1, 5, QF), f"video_frame_position_embedding{m}.weight": (FRAMES, QF)}
        shapes |= qformer_shapes(f"video_Qformer{m}", 2, 1, QF) | {f"Qformer{m}.bert.embeddings.position_ids": (1, 512)}
        shapes |= linear(f"llama_proj{m}_0", LLAMA, QF) | linear(f"llama_proj{m}_last.encoder_0", LLAMA, LLAMA)
        shapes |= linear(f"llama_proj{m}_last.encoder_1", TIGHT, LLAMA)
        shapes |= linear(f"llama_proj{m}_last.decoder_2", LLAMA, LLAMA)
    return shapes


def llama_shapes():
    shapes = {"model.embed_tokens.weight": (60, LLAMA)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (LLAMA, LLAMA) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (80, LLAMA) for p in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (LLAMA, 80), f"{layer}.self_attn.rotary_emb.inv_freq": (8,)}
        shapes |= {f"{layer}.{n}.weight": (LLAMA,) for n in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (LLAMA,), "lm_head.weight": (60, LLAMA)}


def write_llama(folder, tensors, suffix=".bin"):
    """A Hugging Face folder of two shards and an index."""
    folder.mkdir()
    stem, save = ("pytorch_model", torch.save) if suffix == ".bin" else ("model", save_file)
    names, shards = list(tensors), [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    weight_map = {name: shards[i >= len(names) // 2] for i, name in enumerate(names)}
    for shard in shards:
        save({n: t.clone() for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"hidden_size": LLAMA, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 60, "rms_norm_eps": 1e-6}))
    (folder / "tokenizer.model").write_bytes(b"pieces")


def hugging_face_blip2(vit, qformer):
    """The same ViT and Q-Former under the names of Hugging Face's BLIP-2."""
    tensors = {"query_tokens": qformer["query_tokens"]}
    for part in ("weight", "bias"):
        tensors[f"vision_model.post_layernorm.{part}"] = qformer[f"ln_vision.{part}"]
        tensors[f"vision_model.embeddings.patch_embedding.{part}"] = vit[f"patch_embed.proj.{part}"]
    tensors["vision_model.embeddings.class_embedding"] = vit["cls_token"]
    tensors["vision_model.embeddings.position_embedding"] = vit["pos_embed"]
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}.", f"vision_model.encoder.layers.{i}."
        q, v = vit[f"{ours}attn.q_bias"], vit[f"{ours}attn.v_bias"]
        tensors[f"{theirs}self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        for a, b in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.projection")):
            tensors |= {f"{theirs}{b}.{part}": vit[f"{ours}{a}.{part}"] for part in ("weight", "bias")}
        tensors[f"{theirs}self_attn.qkv.weight"] = vit[f"{ours}attn.qkv.weight"]
        tensors |= {f"{theirs}{n}": vit[ours + n] for n in linear("mlp.fc1", 1, 1) | linear("mlp.fc2", 1, 1)}
    for name, tensor in qformer.items():
        if name.startswith("Qformer.bert.") and "position_ids" not in name:
            name = name.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
            tensors[name.replace("Qformer.bert", "qformer").replace("attention.self", "attention.attention")] = tensor
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def tensors():
    """The tensors of each released file."""
    qformer = {"query_tokens": (1, QUERIES, QF)} | norm("ln_vision", VIT) | linear("t5_proj", 7, QF)
    made = {"vit": random_tensors(vit_shapes(), 1, torch.float16)}
    made["qformer"] = random_tensors(qformer | qformer_shapes("Qformer", QF_LAYERS, 2, VIT), 2)
    made["hawk"], made["llama"] = random_tensors(hawk_shapes(), 3), random_tensors(llama_shapes(), 4, torch.float16)
    return made


@pytest.fixture
def files(tensors, tmp_path):
    """Arguments of `prepare.py weights` for a set of released files."""
    write_llama(tmp_path / "llama", tensors["llama"])
    torch.save(tensors["vit"], tmp_path / "vit.pth")
    torch.save({"model": tensors["qformer"]}, tmp_path / "qformer.pth")
    torch.save({"model": tensors["hawk"], "optimizer": {"state": {}}, "epoch": 10}, tmp_path / "hawk.pth")
    return {"--llama": "llama", "--vit": "vit.pth", "--qformer": "qformer.pth", "--hawk": "hawk.pth"}


@pytest.fixture
def convert(files, tmp_path, monkeypatch):
    """Runs `prepare.py weights`, with changed arguments or further ones, on `files`; returns config and tensors."""

    def run(*more, out="out", **changed):
        monkeypatch.chdir(tmp_path)
        arguments = files | {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
        flat = [word for pair in arguments.items() if pair[1] is not None for word in pair]
        monkeypatch.setattr(sys, "argv", ["prepare.py", "weights", "--out", out, *flat, *HEADS, *more])
        prepare.main()
        listing = json.loads((tmp_path / out / "model.safetensors.index.json").read_text())["weight_map"]
        loaded = {n: t for file in set(listing.values()) for n, t in load_file(tmp_path / out / file).items()}
        assert loaded.keys() == listing.keys()
        return json.loads((tmp_path / out / "config.json").read_text()), loaded

    return run


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


def test_every_tensor_finds_its_place(convert, tensors):
    config, ours = convert()
    assert config["vit_depth"] == DEPTH and config["tight_dim"] == TIGHT and config["image_size"] == 28
    assert config["n_frames"] == FRAMES and config["norm_eps"] == 1e-6 and config["cross_every"] == 2
    places = {
        "vit": {"cls_token": "vit.cls_token", "patch_embed.proj.weight": "vit.patch_embed.weight"}
        | {
            f"blocks.1.{n}": f"vit.blocks.1.{n}"
            for n in ("norm2.bias", "attn.q_bias", "attn.qkv.weight", "mlp.fc2.bias")
        },
        "qformer": {
            "query_tokens": "appearance.queries",
            "ln_vision.weight": "appearance.ln_vision.weight",
            "Qformer.bert.embeddings.LayerNorm.bias": "appearance.qformer.norm.bias",
        }
        | {
            f"Qformer.bert.encoder.layer.{i}.{released}": f"appearance.qformer.layers.{i}.{name}"
            for i, released, name in (
                (1, "attention.self.key.bias", "self_attention.key.bias"),
                (0, "attention.output.LayerNorm.weight", "self_attention.norm.weight"),
                (2, "crossattention.self.value.weight", "cross_attention.value.weight"),
                (2, "crossattention.output.dense.bias", "cross_attention.output.bias"),
                (0, "intermediate_query.dense.weight", "mlp.fc1.weight"),
                (0, "output_query.dense.weight", "mlp.fc2.weight"),
                (0, "output_query.LayerNorm.bias", "mlp.norm.bias"),
            )
        },
        "hawk": {
            "query_tokens_motion": "motion.queries",
            "video_query_tokens": "appearance.video_queries",
            "video_query_tokens_motion": "motion.video_queries",
            "video_frame_position_embedding_motion.weight": "motion.frame_position.weight",
            "llama_proj_0.weight": "appearance.proj_0.weight",
            "llama_proj_motion_0.bias": "motion.proj_0.bias",
            "llama_proj_motion_last.encoder_1.weight": "motion.encoder_1.weight",
            "llama_proj_last.decoder_2.weight": "appearance.decoder_2.weight",
            QUERY: "appearance.video_qformer.layers.1.self_attention.query.weight",
            QUERY.replace("Qformer", "Qformer_motion"): "motion.video_qformer.layers.1.self_attention.query.weight",
        },
    }
    for file, names in places.items():
        for released, name in names.items():
            assert same(ours[name], tensors[file][released]), name
    released = {n: t for n, t in tensors["llama"].items() if "inv_freq" not in n}
    for name, tensor in released.items():  # rounded to bfloat16, as the released code loads it
        assert same(ours["llama." + name.removeprefix("model.")], tensor.bfloat16()), name


def test_the_folder_opens_and_runs(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 100_000)
    _, tensors = convert()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    model = Hawk.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, tensors[name].float()) for name, p in model.named_parameters())
    clip = torch.rand(1, 2, 3, 28, 28)
    ids = torch.tensor([[1] + [model.config.image_id] * 10 + [5, 6]])
    assert model(clip, clip, ids, ids.masked_fill(ids == model.config.image_id, -100))["total"].isfinite()


def test_provenance(convert, tmp_path):
    _, ours = convert()
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["motion_qformer"] == "rebuilt from seed 42 (hawk.pth does not hold it)"
    assert record["tensors"].keys() == ours.keys()
    assert record["tensors"]["vit.blocks.0.attn.q_bias"] == "vit.pth: blocks.0.attn.q_bias"
    assert record["sources"]["hawk.pth"]["sha256"] == sha256((tmp_path / "hawk.pth").read_bytes()).hexdigest()
    assert record["set"] == {"vit_heads": 2, "qformer_heads": 3}
    assert sum(map(len, record["ignored"]["vit"].values())) == 13 + 4  # a block, norm and head


def test_other_formats_give_the_same(convert, tensors, tmp_path):
    write_llama(tmp_path / "llama2", tensors["llama"], ".safetensors")
    blip2 = tmp_path / "blip2"
    blip2.mkdir()
    held = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    save_file({n: t for n, t in held.items() if n.startswith("vision")}, blip2 / "model-00001-of-00003.safetensors")
    save_file({n: t for n, t in held.items() if not n.startswith("vision")}, blip2 / "model-00002-of-00003.safetensors")
    weight_map = {n: f"model-0000{1 if n.startswith('vision') else 2}-of-00003.safetensors" for n in held}
    weight_map["language_model.lm_head.weight"] = "model-00003-of-00003.safetensors"  # not downloaded
    (blip2 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config, ours = convert()
    other_config, other = convert(llama="llama2", vit="blip2", qformer="blip2", out="other")
    assert config == other_config and ours.keys() == other.keys()
    assert all(torch.equal(ours[n].float(), other[n].float()) for n in ours)
    torch.save(tensors["vit"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert all(same(t, ours[n]) for n, t in convert(vit="old.pth", out="third")[1].items())


def test_hugging_face_names_are_right(tensors):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    vision = {"hidden_size": VIT, "intermediate_size": VIT_MLP, "num_hidden_layers": DEPTH, "image_size": 28}
    qformer = {
        "hidden_size": QF,
        "num_hidden_layers": QF_LAYERS,
        "intermediate_size": QF_MLP,
        "encoder_hidden_size": VIT,
    }
    text = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "patch_size": 14}
    with torch.device("meta"):
        config = Blip2Config(vision_config=vision | heads, qformer_config=qformer | heads, text_config=text)
        reference = Blip2ForConditionalGeneration(config).state_dict()
    reference = {n for n in reference if not n.startswith("language_")}
    assert reference == hugging_face_blip2(tensors["vit"], tensors["qformer"]).keys()


def test_dtype_is_for_the_frozen_towers(convert):
    for dtype, vit, llama in (
        ("keep", torch.float16, torch.float16),
        ("released", torch.float16, torch.bfloat16),
        ("float32", torch.float32, torch.float32),
    ):
        _, ours = convert("--dtype", dtype, out=dtype)
        assert ours["vit.pos_embed"].dtype == vit and ours["llama.lm_head.weight"].dtype == llama
        assert ours["appearance.proj_0.weight"].dtype == ours["motion.queries"].dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Where the motion Q-Former comes from


class BertLayer(nn.Module):
    """The released Q-Former's layer, as far as its construction matters."""

    def __init__(self, crosses):
        super().__init__()
        for name, width in (("attention", QF), ("crossattention", VIT)):
            if name == "attention" or crosses:
                modules = {"query": nn.Linear(QF, QF), "key": nn.Linear(width, QF), "value": nn.Linear(width, QF)}
                output = nn.ModuleDict({"dense": nn.Linear(QF, QF), "LayerNorm": nn.LayerNorm(QF)})
                setattr(self, name, nn.ModuleDict({"self": nn.ModuleDict(modules), "output": output}))
        for half in ("", "_query"):
            setattr(self, f"intermediate{half}", nn.ModuleDict({"dense": nn.Linear(QF, QF_MLP)}))
            output = nn.ModuleDict({"dense": nn.Linear(QF_MLP, QF), "LayerNorm": nn.LayerNorm(QF)})
            setattr(self, f"output{half}", output)


def init_bert(module):
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(0.0, 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.data.zero_()


def build_qformer():
    embeddings = nn.ModuleDict({"words": nn.Embedding(30522, QF, padding_idx=0), "positions": nn.Embedding(512, QF)})
    embeddings["LayerNorm"] = nn.LayerNorm(QF)
    encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(i % 2 == 0) for i in range(QF_LAYERS))})
    bert = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder}).apply(init_bert)
    nn.ModuleList([nn.Linear(QF, QF), nn.Linear(QF, 30522, bias=False)]).apply(init_bert)  # the head for words
    return bert, torch.zeros(1, QUERIES, QF).normal_(0.0, 0.02)


def build_vit():
    def truncated_normal(tensor):  # as timm: one uniform number each
        tensor.detach().uniform_(-1, 1).erfinv_()

    nn.Conv2d(3, VIT, 14)
    blocks = nn.ModuleList()
    for _ in range(DEPTH):
        linears = [nn.Linear(VIT, 3 * VIT, bias=False), nn.Linear(VIT, VIT), nn.Linear(VIT, VIT_MLP)]
        blocks.append(nn.ModuleList([*linears, nn.Linear(VIT_MLP, VIT)]))
    truncated_normal(torch.empty(1, 5, VIT))
    truncated_normal(torch.empty(1, 1, VIT))
    blocks.apply(lambda m: truncated_normal(m.weight) if isinstance(m, nn.Linear) else None)


def test_replay_draws_what_the_released_code_draws():
    """Against real modules, built and initialised in the released order from torch's global generator."""
    torch.manual_seed(42)
    build_vit(), build_vit(), build_qformer()
    bert, queries = build_qformer()
    config = HawkConfig(
        image_size=28, vit_dim=VIT, vit_depth=DEPTH, vit_heads=2, vit_mlp=VIT_MLP, qformer_dim=QF, qformer_heads=3,
        qformer_layers=QF_LAYERS, qformer_mlp=QF_MLP, n_queries=QUERIES,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    replayed = prepare.replay_motion_qformer(config)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's random numbers change
    assert torch.equal(replayed.pop("query_tokens_motion"), queries)
    kept = {f"Qformer_motion.bert.{name}": t for name, t in bert.state_dict().items()}
    for name in list(kept):
        if "words" in name or "positions" in name or ".intermediate." in name or ".output.dense" in name:
            if ".attention." not in name and ".crossattention." not in name:
                del kept[name]
    kept = {n: t for n, t in kept.items() if not n.split("layer.")[-1][1:].startswith(".output.")}
    assert kept.keys() == replayed.keys()
    assert all(torch.equal(kept[name], replayed[name]) for name in kept)
    other = prepare.replay_motion_qformer(config, seed=43)
    assert not torch.equal(other["query_tokens_motion"], queries)


def test_replay_has_the_published_tensors():
    with torch.device("meta"):
        names = [n for n in Hawk(HawkConfig()).motion.state_dict() if n.startswith(("qformer.", "queries"))]
    linears = list(prepare.bert_linears(HawkConfig()))
    kept = [n for n, *_ in linears if not n.endswith((".intermediate.dense", ".output.dense")) or "attention" in n]
    norms = 1 + sum("output" in n for n in kept)
    assert len(names) == 2 * (len(kept) + norms) + 1 == 255


def test_motion_qformer_choices(convert, tensors, tmp_path, capsys):
    _, replayed = convert(out="replay")
    assert "motion Q-Former: rebuilt from seed 42" in capsys.readouterr().out
    assert torch.equal(replayed["motion.ln_vision.weight"], torch.ones(VIT))
    assert torch.equal(replayed["motion.queries"], tensors["hawk"]["query_tokens_motion"])
    _, copied = convert("--motion-qformer", "blip2", out="blip2")
    for name in copied:
        if name.startswith(("motion.qformer.", "motion.ln_vision.")):
            assert torch.equal(copied[name], copied[name.replace("motion", "appearance")])
            assert not name.endswith("weight") or not torch.equal(copied[name], replayed[name])
    saved = {n: t for n, t in random_tensors(qformer_shapes("Qformer_motion", QF_LAYERS, 2, VIT), 9).items()}
    torch.save({"model": tensors["hawk"] | saved}, tmp_path / "full.pth")
    _, kept = convert(hawk="full.pth", out="checkpoint")
    name = "encoder.layer.0.crossattention.self.query.weight"
    assert torch.equal(
        kept["motion.qformer.layers.0.cross_attention.query.weight"], saved[f"Qformer_motion.bert.{name}"]
    )
    assert torch.equal(kept["motion.ln_vision.bias"], torch.zeros(VIT))
    _, again = convert("--motion-qformer", "replay", hawk="full.pth", out="again")
    assert all(same(again[n], replayed[n]) for n in replayed)


def test_start_for_training(convert, tensors, tmp_path):
    config, fresh = convert(hawk=None, out="fresh")
    assert config["tight_dim"] == LLAMA // 16 and config["video_layers"] == 2
    assert torch.equal(fresh["motion.queries"], tensors["qformer"]["query_tokens"])
    assert torch.equal(fresh["motion.qformer.norm.weight"], fresh["appearance.qformer.norm.weight"])
    assert not torch.equal(fresh["motion.proj_0.weight"], fresh["appearance.proj_0.weight"])
    assert 0 < fresh["motion.proj_0.weight"].abs().max() <= QF**-0.5 and not fresh["motion.proj_0.bias"].any()
    assert torch.equal(fresh["motion.video_qformer.norm.weight"], torch.ones(QF))
    assert all(same(t, fresh[n]) for n, t in convert(hawk=None, out="twice")[1].items())
    video = {n: t for n, t in tensors["hawk"].items() if n.startswith("video_") and "_motion" not in n}
    torch.save({"model": video | {"llama_proj.weight": torch.zeros(LLAMA, QF)}}, tmp_path / "video.pth")
    _, start = convert(hawk=None, video_llama="video.pth", out="start")
    for branch in ("appearance", "motion"):
        assert same(start[f"{branch}.video_queries"], video["video_query_tokens"])
        assert same(start[f"{branch}.frame_position.weight"], video["video_frame_position_embedding.weight"])
        assert same(start[f"{branch}.proj_0.weight"].abs().gt(0).any(), torch.tensor(True))


# ----------------------------------------------------------------------------------------------------------------------
# What must be refused


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content["model"] if "model" in content else content)
    torch.save(content, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "missing tensor": (lambda d: edit(d / "hawk.pth", lambda t: t.pop(QUERY)), ["hawk.pth", QUERY, "missing"]),
    "missing in the ViT": (
        lambda d: edit(d / "vit.pth", lambda t: t.pop("blocks.0.attn.v_bias")),
        ["vit.pth", "blocks.0.attn.v_bias"],
    ),
    "wrong shape": (
        lambda d: edit(d / "hawk.pth", lambda t: t.update({QUERY: torch.zeros(QF, 7)})),
        ["hawk.pth", QUERY, f"({QF}, 7)", f"({QF}, {QF})"],
    ),
    "integers": (
        lambda d: edit(d / "vit.pth", lambda t: t.update(cls_token=t["cls_token"].long())),
        ["cls_token", "int64"],
    ),
    "unknown tensor": (
        lambda d: edit(d / "qformer.pth", lambda t: t.update(extra=torch.zeros(2, 3))),
        ["qformer.pth", "extra", "(2, 3)"],
    ),
    "appearance Q-Former twice": (
        lambda d: edit(d / "hawk.pth", lambda t: t.update({"query_tokens": torch.zeros(1, 4, QF)})),
        ["hawk.pth", "query_tokens", "unknown"],
    ),
    "two blocks too many": (
        lambda d: edit(d / "vit.pth", lambda t: t.update({"blocks.4.norm1.bias": torch.zeros(VIT)})),
        ["blocks.3"],
    ),
    "missing shard": (
        lambda d: (d / "llama/pytorch_model-00002-of-00002.bin").unlink(),
        ["pytorch_model-00002-of-00002.bin", "is missing", "model."],
    ),
    "tensor not in its shard": (
        lambda d: edit(d / "llama/pytorch_model-00001-of-00002.bin", lambda t: t.pop("model.embed_tokens.weight")),
        ["pytorch_model-00001-of-00002.bin", "model.embed_tokens.weight", "missing"],
    ),
    "tensor not in the index": (
        lambda d: edit(d / "llama/pytorch_model-00001-of-00002.bin", lambda t: t.update(stray=torch.zeros(1))),
        ["pytorch_model-00001-of-00002.bin", "stray"],
    ),
    "cut file": (lambda d: cut(d / "hawk.pth"), ["hawk.pth", "cut short"]),
    "cut shard": (lambda d: cut(d / "llama/pytorch_model-00002-of-00002.bin"), ["pytorch_model-00002", "cut short"]),
    "empty file": (lambda d: (d / "hawk.pth").write_bytes(b""), ["hawk.pth"]),
    "not weights": (lambda d: (d / "hawk.pth").write_text("<html>not found</html>"), ["hawk.pth"]),
    "a pickle that runs code": (
        lambda d: torch.save({"model": Evil()}, d / "hawk.pth"),
        ["hawk.pth", "would run code"],
    ),
    "not a state dict": (lambda d: torch.save([1, 2], d / "hawk.pth"), ["hawk.pth", "state dict"]),
    "no such file": (lambda d: (d / "vit.pth").unlink(), ["vit.pth", "is missing"]),
    "no tokenizer": (lambda d: (d / "llama/tokenizer.model").unlink(), ["tokenizer.model", "is missing"]),
    "broken config": (lambda d: (d / "llama/config.json").write_text("{"), ["config.json", "JSON"]),
    "grouped keys": (
        lambda d: (d / "llama/config.json").write_text(
            (d / "llama/config.json").read_text().replace("{", '{"num_key_value_heads": 2, ')
        ),
        ["config.json", "num_key_value_heads"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name, convert, tmp_path):
    spoil, words = BAD[name]
    spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        convert()
    message = stopped.value.code
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message
    assert sorted(tmp_path.iterdir()) == before  # no output, nothing half-written, and no code was run


def test_bad_arguments(convert, tmp_path):
    for more, changed, words in (
        ([], {"vit": "nowhere.pth"}, "nowhere.pth: is missing"),
        (["--set", "vit_haeds=2"], {}, "vit_haeds"),
        (["--set", "vit_heads=two"], {}, "int"),
        (["--set", "vit_heads=5"], {}, "vit_heads 5"),
        (["--motion-qformer", "checkpoint"], {}, "hawk.pth: holds no Qformer_motion"),
        ([], {"llama": "."}, "tokenizer.model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            convert(*more, **changed)
        assert words in stopped.value.code and "\n" not in stopped.value.code
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="out: exists already"):
        convert()


def test_a_bias_on_keys_is_refused(convert, tensors, tmp_path):
    held = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    held["vision_model.encoder.layers.0.self_attn.qkv.bias"][VIT] = 1.0
    (tmp_path / "blip2").mkdir()
    save_file(held, tmp_path / "blip2/model.safetensors")
    with pytest.raises(SystemExit, match="layers.0.self_attn.qkv.bias"):
        convert(vit="blip2", qformer="blip2")


def test_a_failure_while_writing_leaves_nothing(convert, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "save_file", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="No space left"):
        convert()
    assert sorted(tmp_path.iterdir()) == before


def test_set_depth_wins(convert, tensors, tmp_path):
    shutil.copy(tmp_path / "vit.pth", tmp_path / "whole.pth")
    edit(tmp_path / "whole.pth", lambda t: [t.pop(n) for n in list(t) if n.startswith(("norm.", "head."))])
    config, _ = convert(vit="whole.pth", out="whole")
    assert config["vit_depth"] == DEPTH + 1  # nothing says that the last block is one too many ...
    config, ours = convert("--set", f"vit_depth={DEPTH}", vit="whole.pth", out="told")
    assert config["vit_depth"] == DEPTH and f"vit.blocks.{DEPTH}.norm1.weight" not in ours  # ... but a reader may


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("named", [True, False])
def test_merged_equals_unmerged(named, convert, tmp_path, monkeypatch):
    convert(out="base")
    tuned = Hawk.from_pretrained("base")
    tuned.set_trainable("lora")
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tuned.save_pretrained("tuned", base="base")
    monkeypatch.setattr(prepare, "SHARD_BYTES", 100_000)
    if not named:
        shutil.move("base", "moved")
    more = [] if named else ["--base", "moved"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "merge", "--weights", "tuned", "--out", "merged", *more])
    prepare.main()
    assert sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name) == ["merged"]
    merged = Hawk.from_pretrained("merged")
    assert merged.config.lora_rank == 0 and not any("lora" in name for name, _ in merged.named_parameters())
    clip = torch.rand(1, 2, 3, 28, 28)
    ids = torch.tensor([[1] + [merged.config.image_id] * 10 + [5, 6]])
    labels = ids.masked_fill(ids == merged.config.image_id, -100)
    with torch.no_grad():
        a, b = (model.eval()(clip, clip, ids, labels)["total"] for model in (tuned, merged))
    assert abs(a - b) < 1e-5 * a
    again = dict(tuned.merge_lora().named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in merged.named_parameters())
    with pytest.raises(SystemExit, match="no LoRA"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "merge", "--weights", "merged", "--out", "more"])
        prepare.main()
