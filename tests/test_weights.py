"""prepare.py weights and merge: files in the released formats become a folder of ours. Their sizes are small
and their numbers random; formats, names and dtypes are the published ones."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from robust.full_size import released_shapes
from safetensors.torch import load_file, save_file
from torch import nn

import prepare
from hawk import Hawk, HawkConfig, LoRALinear

ROOT = Path(__file__).parents[1]
CONFIG = HawkConfig(
    n_frames=6, image_size=28, vit_dim=32, vit_depth=2, vit_heads=2, vit_mlp=139, qformer_dim=24,
    qformer_layers=3, qformer_heads=3, qformer_mlp=96, n_queries=4, n_video_queries=5, tight_dim=3,
    llama_dim=48, llama_layers=2, llama_heads=4, llama_mlp=80, vocab_size=60, context_length=128,
    norm_eps=1e-6,
)  # fmt: skip
VIT = CONFIG.vit_dim
DEPTH = CONFIG.vit_depth
QF = CONFIG.qformer_dim
LLAMA = CONFIG.llama_dim
QUERY = "video_Qformer.bert.encoder.layer.1.attention.self.query.weight"
SHARD = "llama/pytorch_model-0000{}-of-00002.bin"


# ---- Small files in the released formats


def random_tensors(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(like.shape, generator=generator) * 0.1).to(dtype) for n, like in shapes.items()}


def write_shards(folder, tensors, stem, suffix, save):
    """A Hugging Face folder of two shards and an index."""
    folder.mkdir()
    names = list(tensors)
    shards = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    weight_map = {name: shards[i >= len(names) // 2] for i, name in enumerate(names)}
    for shard in shards:
        save({n: t.clone() for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@cache
def pieces(size):
    """A SentencePiece model of so many pieces."""
    model = io.BytesIO()
    words = iter(["A red car drives the wrong way, and a dog falls near the bridge."] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2
    )
    return model.getvalue()


def write_llama(folder, tensors, *kind):
    write_shards(folder, tensors, *kind)
    config = {"hidden_size": LLAMA, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config |= {"vocab_size": 60, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(pieces(60))


def hugging_face_blip2(vit, qformer):
    """The same ViT and Q-Former under the names of Hugging Face's BLIP-2."""
    words = [("patch_embed.proj", "embeddings.patch_embedding"), ("cls_token", "embeddings.class_embedding")]
    words += [
        ("pos_embed", "embeddings.position_embedding"),
        ("blocks.", "encoder.layers."),
        (".norm", ".layer_norm"),
    ]
    words += [(".attn.", ".self_attn."), (".proj.", ".projection.")]
    tensors = {"query_tokens": qformer["query_tokens"]}
    for name, tensor in vit.items():
        if not name.startswith(("norm.", "head.", f"blocks.{DEPTH}.")) and not name.endswith("v_bias"):
            if name.endswith("q_bias"):
                tensor = torch.cat([tensor, torch.zeros_like(tensor), vit[name.replace("q_bias", "v_bias")]])
            for theirs, other in [*words, ("q_bias", "qkv.bias")]:
                name = name.replace(theirs, other)
            tensors[f"vision_model.{name.replace('embeddings.patch_embedding.embeddings.', '')}"] = tensor
    for name, tensor in qformer.items():
        if name.startswith("ln_vision"):
            tensors[name.replace("ln_vision", "vision_model.post_layernorm")] = tensor
        if name.startswith("Qformer.bert.") and "position_ids" not in name:
            name = name.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
            name = name.replace("Qformer.bert", "qformer").replace("attention.self", "attention.attention")
            tensors[name] = tensor
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def tensors():
    """The tensors of each released file. EVA has one block more than is used, and a head."""
    shapes = released_shapes(CONFIG)
    shapes["vit"] |= {"norm.weight": torch.empty(VIT), "head.weight": torch.empty(7, VIT)}
    for m in ("", "_motion"):
        shapes["hawk"][f"video_Qformer{m}.bert.embeddings.position_ids"] = torch.empty(1, 512)
    half = {"vit": torch.float16, "llama": torch.float16}
    return {role: random_tensors(shapes[role], seed, half.get(role)) for seed, role in enumerate(shapes)}


@pytest.fixture
def convert(tensors, tmp_path, monkeypatch):
    """Writes the released files. Runs `prepare.py weights`, with changes -> (config.json, tensors)."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama", tensors["llama"], "pytorch_model", ".bin", torch.save)
    torch.save(tensors["vit"], "vit.pth")
    torch.save({"model": tensors["qformer"]}, "qformer.pth")
    torch.save({"model": tensors["hawk"], "optimizer": {"state": {}}, "epoch": 10}, "hawk.pth")

    def run(*more, out="out", **changed):
        paths = {"llama": "llama", "vit": "vit.pth", "qformer": "qformer.pth", "hawk": "hawk.pth"} | changed
        flat = [
            word for role, path in paths.items() if path for word in (f"--{role.replace('_', '-')}", path)
        ]
        prepare.main(["weights", "--out", out, *flat, "--set", "vit_heads=2", "qformer_heads=3", *more])
        loaded = {n: t for file in (tmp_path / out).glob("*.safetensors") for n, t in load_file(file).items()}
        return json.loads((tmp_path / out / "config.json").read_text()), loaded

    return run


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def inputs(config):
    """The streams of a clip, a prompt and its labels."""
    clip = torch.rand(1, 2, 3, 28, 28)
    ids = torch.tensor([[1] + [config.image_id] * config.n_visual + [5, 6]])
    return dict.fromkeys(config.branches, clip), ids, ids.masked_fill(ids == config.image_id, -100)


# ---- What comes out

# Where a tensor of each kind goes: file, released name, our name.
PLACES = """
vit      cls_token                  vit.cls_token
vit      patch_embed.proj.weight    vit.patch_embed.weight
vit      blocks.1.norm2.bias        vit.blocks.1.norm2.bias
vit      blocks.1.attn.v_bias       vit.blocks.1.attn.v_bias
vit      blocks.1.attn.qkv.weight   vit.blocks.1.attn.qkv.weight
vit      blocks.1.mlp.fc2.bias      vit.blocks.1.mlp.fc2.bias
qformer  query_tokens               appearance.queries
qformer  ln_vision.weight           appearance.ln_vision.weight
qformer  Qformer.bert.embeddings.LayerNorm.bias                 appearance.qformer.norm.bias
qformer  BERT.1.attention.self.key.bias                LAYER.1.self_attention.key.bias
qformer  BERT.0.attention.output.LayerNorm.weight      LAYER.0.self_attention.norm.weight
qformer  BERT.2.crossattention.self.value.weight       LAYER.2.cross_attention.value.weight
qformer  BERT.2.crossattention.output.dense.bias       LAYER.2.cross_attention.output.bias
qformer  BERT.0.intermediate_query.dense.weight        LAYER.0.mlp.fc1.weight
qformer  BERT.0.output_query.dense.weight              LAYER.0.mlp.fc2.weight
qformer  BERT.0.output_query.LayerNorm.bias            LAYER.0.mlp.norm.bias
hawk     query_tokens_motion        motion.queries
hawk     video_query_tokens         appearance.video_queries
hawk     video_query_tokens_motion  motion.video_queries
hawk     video_frame_position_embedding_motion.weight           motion.frame_position.weight
hawk     llama_proj_0.weight        appearance.proj_0.weight
hawk     llama_proj_motion_0.bias   motion.proj_0.bias
hawk     llama_proj_motion_last.encoder_1.weight                motion.encoder_1.weight
hawk     llama_proj_last.decoder_2.weight                       appearance.decoder_2.weight
hawk     video_Qformer_motion.bert.encoder.layer.1.attention.self.query.weight
         motion.video_qformer.layers.1.self_attention.query.weight
"""
PLACES = (
    PLACES.replace("BERT", "Qformer.bert.encoder.layer").replace("LAYER", "appearance.qformer.layers").split()
)


def test_every_tensor_finds_its_place(convert, tensors, tmp_path):
    config, ours = convert()
    assert HawkConfig.from_dict(config) == CONFIG
    for file, released, name in zip(PLACES[::3], PLACES[1::3], PLACES[2::3], strict=True):
        assert same(ours[name], tensors[file][released]), name
    for name, tensor in tensors["llama"].items():  # rounded to bfloat16, as the released code loads it
        if "inv_freq" not in name:
            assert same(ours["llama." + name.removeprefix("model.")], tensor.bfloat16()), name
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # readable like any other
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["files"] == ["llama", "vit.pth", "qformer.pth", "hawk.pth"]
    assert record["motion_qformer"] == "replay" and record["set"] == ["vit_heads=2", "qformer_heads=3"]


def test_the_folder_opens_and_runs(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 100_000)
    _, tensors = convert()
    shards = list((tmp_path / "out").glob("model*.safetensors"))
    assert len(shards) > 2 and sum(len(load_file(shard)) for shard in shards) == len(tensors)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == pieces(60)
    model = Hawk.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, tensors[name].float()) for name, p in model.named_parameters())
    assert model(*inputs(model.config))["total"].isfinite()


def test_wrappers_thetas_and_tied_heads(convert, tensors, tmp_path):
    """What DistributedDataParallel, torch.compile and transformers 5 add to names and to config.json."""
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in tensors["hawk"].items()}
    torch.save({"state_dict": wrapped}, "wrapped.pth")
    tied = {name: tensor for name, tensor in tensors["llama"].items() if name != "lm_head.weight"}
    write_llama(tmp_path / "tied", tied, "model", ".safetensors", save_file)
    file = tmp_path / "tied/config.json"
    rope = {"rope_type": "default", "rope_theta": 1e6}
    more = {"tie_word_embeddings": True, "rope_parameters": rope, "hidden_act": "silu", "head_dim": 12}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    config, ours = convert()
    other_config, other = convert(hawk="wrapped.pth", llama="tied", out="other")
    assert other_config["rope_theta"] == 1e6 and config["rope_theta"] == 1e4
    assert same(other["llama.lm_head.weight"], other["llama.embed_tokens.weight"])
    assert all(same(other[name], ours[name]) for name in ours if name != "llama.lm_head.weight")


def test_other_formats_give_the_same(convert, tensors, tmp_path):
    write_llama(tmp_path / "llama2", tensors["llama"], "model", ".safetensors", save_file)
    blip2 = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    write_shards(tmp_path / "blip2", blip2, "model", ".safetensors", save_file)
    listing = tmp_path / "blip2/model.safetensors.index.json"
    absent = {"language_model.lm_head.weight": "model-00003-of-00003.safetensors"}  # not downloaded
    listing.write_text(json.dumps({"weight_map": json.loads(listing.read_text())["weight_map"] | absent}))
    config, ours = convert()
    other_config, other = convert(llama="llama2", vit="blip2", qformer="blip2", out="other")
    assert config == other_config and ours.keys() == other.keys()
    assert all(torch.equal(ours[n].float(), other[n].float()) for n in ours)
    for number, half in enumerate(({"vit": "blip2"}, {"qformer": "blip2"})):  # the other one is a file
        mixed = convert(**half, out=f"mixed{number}")[1]
        assert all(torch.equal(t.float(), ours[name].float()) for name, t in mixed.items())
    torch.save(tensors["vit"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert all(same(t, ours[n]) for n, t in convert(vit="old.pth", out="third")[1].items())


def test_hugging_face_names_are_right(tensors):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    heads = {"num_attention_heads": 2, "patch_size": 14}
    vision = {
        "hidden_size": VIT,
        "intermediate_size": 139,
        "num_hidden_layers": DEPTH,
        "image_size": 28,
    } | heads
    qformer = {"hidden_size": QF, "intermediate_size": 96, "num_hidden_layers": 3, "encoder_hidden_size": VIT}
    text = {
        "model_type": "t5",
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 20,
    }
    with torch.device("meta"):
        config = Blip2Config(vision_config=vision, qformer_config=qformer | heads, text_config=text)
        reference = Blip2ForConditionalGeneration(config).state_dict()
    reference = {n for n in reference if not n.startswith("language_")}
    assert reference == hugging_face_blip2(tensors["vit"], tensors["qformer"]).keys()


@pytest.mark.parametrize(
    "more, vit, llama",
    [([], torch.float16, torch.bfloat16), (["--dtype", "float32"], torch.float32, torch.float32)],
)
def test_dtype_is_for_the_frozen_towers(more, vit, llama, convert):
    _, ours = convert(*more)
    assert ours["vit.pos_embed"].dtype == vit and ours["llama.lm_head.weight"].dtype == llama
    assert ours["appearance.proj_0.weight"].dtype == ours["motion.queries"].dtype == torch.float32


# ---- Where the motion Q-Former comes from


def build_qformer():
    """{released name: weight} and queries of real modules, built and initialised in the released order."""
    made = {"words": nn.Embedding(30522, QF, padding_idx=0), "positions": nn.Embedding(512, QF)}
    made["embeddings.LayerNorm"] = nn.LayerNorm(QF)
    for i in range(3):
        layer = f"encoder.layer.{i}"
        for kind, width in (("attention", QF), ("crossattention", VIT))[: 1 + (i % 2 == 0)]:
            for name, inputs in (("query", QF), ("key", width), ("value", width)):
                made[f"{layer}.{kind}.self.{name}"] = nn.Linear(inputs, QF)
            made[f"{layer}.{kind}.output.dense"] = nn.Linear(QF, QF)
            made[f"{layer}.{kind}.output.LayerNorm"] = nn.LayerNorm(QF)
        for half in ("", "_query"):
            made[f"{layer}.intermediate{half}.dense"] = nn.Linear(QF, 96)
            made[f"{layer}.output{half}.dense"] = nn.Linear(96, QF)
            made[f"{layer}.output{half}.LayerNorm"] = nn.LayerNorm(QF)

    def init_bert(modules):
        for module in modules:
            if not isinstance(module, nn.LayerNorm):
                module.weight.data.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()

    init_bert(made.values())
    init_bert([nn.Linear(QF, QF), nn.Linear(QF, 30522, bias=False)])  # the head for words
    state = {
        f"Qformer_motion.bert.{name}.{key}": t
        for name, m in made.items()
        for key, t in m.state_dict().items()
    }
    return state, torch.zeros(1, 4, QF).normal_(0.0, 0.02)


def build_vit():
    def truncated_normal(tensor):  # as timm: one uniform number each
        tensor.detach().uniform_(-1, 1).erfinv_()

    nn.Conv2d(3, VIT, 14)
    linears = []
    for _ in range(DEPTH):
        linears += [
            nn.Linear(VIT, 3 * VIT, bias=False),
            nn.Linear(VIT, VIT),
            nn.Linear(VIT, 139),
            nn.Linear(139, VIT),
        ]
    truncated_normal(torch.empty(1, 5, VIT))
    truncated_normal(torch.empty(1, 1, VIT))
    for module in linears:
        truncated_normal(module.weight)


def test_replay_draws_what_the_released_code_draws():
    """Against real modules, built and initialised in the released order from torch's global generator."""
    torch.manual_seed(42)
    build_vit()
    build_vit()
    build_qformer()
    state, queries = build_qformer()
    before = torch.random.get_rng_state()
    replayed = prepare.replay_motion_qformer(CONFIG)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers change
    assert torch.equal(replayed.pop("query_tokens_motion"), queries)
    thrown_away = ["words", "positions"]
    thrown_away += [f"layer.{i}.{half}." for i in range(3) for half in ("intermediate", "output")]
    kept = {name: tensor for name, tensor in state.items() if not any(word in name for word in thrown_away)}
    assert kept.keys() == replayed.keys()
    assert all(torch.equal(kept[name], replayed[name]) for name in kept)
    assert not torch.equal(prepare.replay_motion_qformer(CONFIG, seed=43)["query_tokens_motion"], queries)


def test_replay_at_full_size_makes_every_tensor():
    with torch.device("meta"):
        names = [name for name, _ in Hawk(HawkConfig()).motion.named_parameters(prefix="motion")]
    made = {prepare.released_name(name) for name in names if name.startswith(("motion.qf", "motion.queries"))}
    assert len(made) == 255  # with the LayerNorms and the queries


def test_motion_qformer_choices(convert, tensors, capsys):
    _, replayed = convert(out="replay")
    assert "motion Q-Former: replay" in capsys.readouterr().out
    assert torch.equal(replayed["motion.ln_vision.weight"], torch.ones(VIT))
    assert torch.equal(replayed["motion.queries"], tensors["hawk"]["query_tokens_motion"])
    _, copied = convert("--motion-qformer", "blip2", out="blip2")
    for name in copied:
        if name.startswith(("motion.qformer.", "motion.ln_vision.")):
            assert torch.equal(copied[name], copied[name.replace("motion", "appearance")])
            assert not name.endswith("weight") or not torch.equal(copied[name], replayed[name])
    saved = {
        n.replace("Qformer.", "Qformer_motion."): t for n, t in tensors["qformer"].items() if n[0] == "Q"
    }
    torch.save({"model": tensors["hawk"] | saved}, "full.pth")
    _, kept = convert(hawk="full.pth", out="checkpoint")
    query_name = "Qformer_motion.bert.encoder.layer.0.crossattention.self.query.weight"
    assert same(kept["motion.qformer.layers.0.cross_attention.query.weight"], saved[query_name])
    assert same(kept["motion.ln_vision.bias"], torch.zeros(VIT))
    _, again = convert("--motion-qformer", "replay", hawk="full.pth", out="again")
    assert all(same(again[n], replayed[n]) for n in replayed)
    for name in saved.keys() & {"Qformer_motion.bert.embeddings.LayerNorm.bias", query_name}:
        others = {n: t for n, t in saved.items() if n != name}  # not to be replaced because of one that lacks
        torch.save({"model": tensors["hawk"] | others}, "lacking.pth")
        with pytest.raises(SystemExit, match=name):
            convert(hawk="lacking.pth", out="lacking")
    torch.save(
        {"model": tensors["hawk"] | {"Qformer_motion.bert.embeddings.position_ids": torch.zeros(1)}},
        "ids.pth",
    )
    assert same(convert(hawk="ids.pth", out="ids")[1]["motion.queries"], replayed["motion.queries"])


def test_start_for_training(convert, tensors):
    config, fresh = convert(hawk=None, out="fresh")
    assert config["tight_dim"] == LLAMA // 16 and config["video_layers"] == 2
    assert torch.equal(fresh["motion.queries"], tensors["qformer"]["query_tokens"])
    assert torch.equal(fresh["motion.qformer.norm.weight"], fresh["appearance.qformer.norm.weight"])
    assert not torch.equal(fresh["motion.proj_0.weight"], fresh["appearance.proj_0.weight"])
    assert abs(fresh["motion.proj_0.weight"].std() * (3 * QF) ** 0.5 - 1) < 0.1  # torch's default Linear
    assert abs(fresh["motion.video_queries"].std() / 0.02 - 1) < 0.2  # BERT's
    assert abs(fresh["motion.frame_position.weight"].std() - 1) < 0.2
    assert torch.equal(fresh["motion.video_qformer.norm.weight"], torch.ones(QF))
    assert all(same(t, fresh[n]) for n, t in convert(hawk=None, out="twice")[1].items())
    video = {n: t for n, t in tensors["hawk"].items() if n.startswith("video_") and "_motion" not in n}
    video["llama_proj.weight"] = torch.zeros(LLAMA, QF)
    torch.save({"model": video}, "video.pth")
    _, start = convert(hawk=None, video_llama="video.pth", out="start")
    for branch in ("appearance", "motion"):
        assert same(start[f"{branch}.video_queries"], video["video_query_tokens"])
        assert same(start[f"{branch}.frame_position.weight"], video["video_frame_position_embedding.weight"])
        assert start[f"{branch}.proj_0.weight"].any()
    del video["video_query_tokens"]
    torch.save({"model": video}, "video.pth")
    with pytest.raises(SystemExit, match="video_query_tokens .* is missing in .*video.pth"):
        convert(hawk=None, video_llama="video.pth", out="refused")


# ---- What must be refused


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def change(file, **tensors):
    """Spoils a file: replaces tensors, or removes those that are None."""

    def spoil(folder):
        path = folder / file
        content = torch.load(path, weights_only=True)
        held = content["model"] if "model" in content else content
        for name, tensor in tensors.items():
            held.pop(name, None)
            if tensor is not None:
                held[name] = tensor
        torch.save(content, path)

    return spoil


def configure(**values):
    """Changes LLaMA's config.json."""

    def spoil(folder):
        path = folder / "llama/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def removed(file):
    return lambda folder: (folder / file).unlink()


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-1000])


TEN = torch.zeros(10)
NAN = torch.full((QF, QF), torch.nan)
HUGE = torch.full((1, 1, VIT), torch.inf)
LONG = torch.ones(1, 1, VIT, dtype=torch.long)
BIAS = "blocks.0.attn.v_bias"
QUERIES = torch.zeros(1, 4, QF)
BAD = {  # how to spoil the files, and what the message says
    "missing": (change("hawk.pth", **{QUERY: None}), ["hawk.pth", QUERY, "missing"]),
    "missing in the ViT": (change("vit.pth", **{BIAS: None}), ["vit.pth", BIAS]),
    "shape": (change("hawk.pth", **{QUERY: TEN}), ["hawk.pth", QUERY, "(10,)", f"({QF}, {QF})"]),
    "shape in a shard": (
        change(SHARD.format(2), **{"lm_head.weight": TEN}),
        ["2.bin", "lm_head.weight", "(10,)"],
    ),
    "dimensions": (change("qformer.pth", query_tokens=TEN), ["qformer.pth", "query_tokens", "(10,)"]),
    "integers": (change("vit.pth", cls_token=LONG), ["vit.pth", "cls_token", "int64"]),
    "NaN": (change("hawk.pth", **{QUERY: NAN}), ["hawk.pth", QUERY, "NaN"]),
    "too large": (change("vit.pth", cls_token=HUGE), ["vit.pth", "cls_token", "too large"]),
    "absurd size": (configure(hidden_size=10**12), ["llama_dim is 1000000000000"]),
    "unknown": (change("qformer.pth", extra=torch.zeros(2, 3)), ["qformer.pth", "extra", "(2, 3)"]),
    "Q-Former twice": (
        change("hawk.pth", query_tokens=QUERIES),
        ["hawk.pth", "query_tokens", "is in qformer.pth, too", "unknown"],
    ),
    "two blocks more": (change("vit.pth", **{"blocks.4.norm1.bias": torch.zeros(VIT)}), ["blocks.4"]),
    "missing shard": (removed(SHARD.format(2)), ["model.layers.", "is missing in llama, "]),
    "gap in a shard": (
        change(SHARD.format(2), **{"lm_head.weight": None}),
        ["llama", "lm_head.weight", "missing"],
    ),
    "stray in a shard": (change(SHARD.format(1), stray=TEN), [SHARD.format(1), "stray"]),
    "cut file": (cut("hawk.pth"), ["hawk.pth", "cut short"]),
    "cut shard": (cut(SHARD.format(2)), [SHARD.format(2), "cut short"]),
    "empty file": (written("hawk.pth", b""), ["hawk.pth"]),
    "not weights": (written("hawk.pth", b"<html>not found</html>"), ["hawk.pth"]),
    "code in the pickle": (
        lambda d: torch.save({"model": Evil()}, d / "hawk.pth"),
        ["hawk.pth", "other than"],
    ),
    "not a state dict": (lambda d: torch.save([1, 2], d / "hawk.pth"), ["hawk.pth", "other than tensors"]),
    "no such file": (removed("vit.pth"), ["vit.pth", "is missing"]),
    "no tokenizer": (removed("llama/tokenizer.model"), ["tokenizer.model", "no such tokenizer file"]),
    "nothing that is known": (
        lambda folder: [torch.save({x: TEN}, folder / f"{x}.pth") for x in ("vit", "qformer", "hawk")],
        ["missing in llama, vit.pth"],
    ),
    "broken config": (written("llama/config.json", b"{"), ["config.json", "JSON"]),
    "grouped keys": (configure(num_key_value_heads=2), ["config.json", "num_key_value_heads"]),
    "scaled positions": (configure(rope_scaling={"factor": 2}), ["config.json", "rope_scaling", "factor"]),
    "positions that are no settings": (configure(rope_scaling=4), ["config.json", "rope_scaling"]),
    "scaled positions, transformers 5": (
        configure(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        ["config.json", "rope_parameters", "linear"],
    ),
    "another activation": (configure(hidden_act="gelu"), ["config.json", "hidden_act", "'gelu'"]),
    "biases": (configure(attention_bias=True), ["config.json", "attention_bias"]),
    "a head width of its own": (configure(head_dim=64), ["config.json", "head_dim"]),
    "another family with LLaMA's names": (configure(model_type="mistral"), ["config.json", "model_type"]),
    "another vocabulary": (
        lambda folder: (folder / "llama/tokenizer.model").write_bytes(pieces(50)),
        ["tokenizer.model", "has 50 pieces", "60"],
    ),
    "a LoRA beside the base": (
        lambda folder: (folder / "llama/adapter_config.json").write_text("{}"),
        ["llama", "LoRA adapter"],
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
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), (
        message
    )
    assert sorted(tmp_path.iterdir()) == before  # no output, nothing half-written, and no code was run


@pytest.mark.parametrize(
    "more, changed, words",
    [
        ([], {"vit": "nowhere.pth"}, "nowhere.pth: is missing"),
        (["--set", "vit_haeds=2"], {}, "vit_haeds"),
        (["--set", "vit_heads=two"], {}, "int"),
        (["--set", "vit_heads=5"], {}, "5 vit_heads"),
        (["--set", "branches=motion"], {}, "prepare.py merge"),
        (["--motion-qformer", "checkpoint"], {}, "Qformer_motion.bert.embeddings.LayerNorm.weight"),
        ([], {"llama": "empty"}, "config.json"),
        ([], {"out": "full"}, "full: is not empty"),
    ],
)
def test_bad_arguments(more, changed, words, convert, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full/file").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        convert(*more, **changed)
    assert words in stopped.value.code and "\n" not in stopped.value.code


def test_a_bias_on_keys_is_refused(convert, tensors, tmp_path):
    held = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    held["vision_model.encoder.layers.0.self_attn.qkv.bias"][VIT] = 1.0
    (tmp_path / "blip2").mkdir()
    save_file(held, tmp_path / "blip2/model.safetensors")
    with pytest.raises(SystemExit, match="model.safetensors: .*layers.0.self_attn.qkv.bias"):
        convert(vit="blip2", qformer="blip2")


def test_what_is_missing_is_said_before_the_replay(convert, tmp_path, monkeypatch):
    """which takes seconds."""
    monkeypatch.setattr(prepare, "replay_motion_qformer", lambda config: pytest.fail("too early"))
    torch.save({}, tmp_path / "vit.pth")
    with pytest.raises(SystemExit, match="is missing in llama, vit.pth"):
        convert("--motion-qformer", "replay")


def test_two_folders_that_both_hold_everything_are_one_too_many(convert, tensors, tmp_path):
    blip2 = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(blip2, tmp_path / name / "model.safetensors")
    with pytest.raises(SystemExit, match="two/model.s.*: .* is in one/model.s.*, too; unknown which counts"):
        convert(vit="one", qformer="two")
    save_file(blip2, tmp_path / "one/model.fp16.safetensors")  # as is another set of files in one folder
    with pytest.raises(SystemExit, match="model.s.*: .* is in one/model.fp16.s.*, too; unknown which counts"):
        convert(vit="one", qformer="one")


def test_errors_name_the_tensors_of_hugging_face_as_the_file_does(convert, tensors, tmp_path):
    held = hugging_face_blip2(tensors["vit"], tensors["qformer"])
    (tmp_path / "blip2").mkdir()
    for name, words in (
        ("vision_model.encoder.layers.0.layer_norm1.bias", "is \\(10,\\) .*, not \\(32,\\)"),
        ("vision_model.encoder.layers.0.layer_norm9.bias", "\\(10,\\) is unknown"),
    ):
        save_file(held | {name: torch.zeros(10)}, tmp_path / "blip2/model.safetensors")
        with pytest.raises(SystemExit, match=f"model.safetensors: {name} {words}"):
            convert(vit="blip2", qformer="blip2")


def test_a_failure_while_writing_leaves_nothing(convert, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "save_tensors", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="No space left"):
        convert()
    assert sorted(tmp_path.iterdir()) == before


# a slow disk, or one on which a file has at most `largest` bytes
SLOW = """
import resource, runpy, sys, time
sys.path.insert(0, sys.argv.pop(1))
largest = int(sys.argv.pop(1))
import hawk
save = hawk.save_tensors
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
else:
    hawk.save_tensors = lambda tensors, path: (save(tensors, path), time.sleep(60))
runpy.run_path("prepare.py", run_name="__main__")
"""


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "full disk"])
def test_a_conversion_that_is_stopped_leaves_no_folder_of_weights(fault, convert, tmp_path):
    """What is not whole never has the folder's name, and the next run makes it."""
    roles = {"--llama": "llama", "--vit": "vit.pth", "--qformer": "qformer.pth", "--hawk": "hawk.pth"}
    files = [word for role, name in roles.items() for word in (role, tmp_path / name)]
    largest = 300_000 if fault == "full disk" else 0
    command = [sys.executable, "-c", SLOW, ROOT, largest, "weights", "--out", tmp_path / "out", *files]
    command = [*map(str, command), "--set", "vit_heads=2", "qformer_heads=3"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while process.poll() is None and not largest and time.monotonic() < until:
            if (tmp_path / "out.being-written/model.safetensors").exists():
                process.send_signal(getattr(signal, fault))
                break
            time.sleep(0.002)
        errors = process.communicate()[1]
    assert not (tmp_path / "out").exists()
    if fault == "full disk":
        said = [line for line in errors.replace("\r", "\n").split("\n") if "error: " in line]
        assert process.returncode == 1 and len(said) == 1 and "out: cannot be written" in said[0], errors
    else:
        assert process.returncode == (-9 if fault == "SIGKILL" else 143)
    assert (tmp_path / "out.being-written").exists() == (fault == "SIGKILL")
    _, again = convert()
    _, whole = convert(out="whole")
    assert again.keys() == whole.keys() and all(same(again[name], whole[name]) for name in whole)
    assert not (tmp_path / "out.being-written").exists()


def test_set_depth_wins(convert, tmp_path):
    change("vit.pth", **{"norm.weight": None, "head.weight": None})(tmp_path)
    config, _ = convert(out="whole")
    assert config["vit_depth"] == DEPTH + 1  # nothing says that the last block is one too many ...
    config, ours = convert("--set", f"vit_depth={DEPTH}", out="told")
    assert (
        config["vit_depth"] == DEPTH and f"vit.blocks.{DEPTH}.norm1.weight" not in ours
    )  # ... but a reader may


# ---- merge


def test_merged_equals_unmerged(convert, tmp_path, monkeypatch):
    convert(out="base")
    middle = Hawk.from_pretrained("base")  # trained twice, so that what is merged has a chain of bases
    middle.set_trainable("paper")
    nn.init.normal_(middle.motion.proj_0.weight.data)
    middle.save_pretrained("middle", base="base", tokenizer="base/tokenizer.model")
    tuned = Hawk.from_pretrained("middle")
    tuned.set_trainable("lora")
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.1)
    tuned.save_pretrained("tuned", base="middle", tokenizer="middle/tokenizer.model")
    monkeypatch.setattr(prepare, "SHARD_BYTES", 100_000)
    command = ["merge", "--weights", "tuned", "--out", "merged", "--set"]
    with pytest.raises(SystemExit, match="not how these weights are shaped"):
        prepare.main([*command, "vit_depth=1"])
    prepare.main([*command, "dropout=0", "consistency=debiased"])
    assert sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name) == ["merged"]
    for folder in ("base", "middle", "tuned"):
        shutil.rmtree(folder)
    merged = Hawk.from_pretrained("merged")
    assert (merged.config.dropout, merged.config.consistency) == (0.0, "debiased")
    merged.config.consistency = "cosine"
    assert merged.config.lora_rank == 0 and (tmp_path / "merged/tokenizer.model").read_bytes() == pieces(60)
    batch = inputs(merged.config)
    with torch.no_grad():
        a, b = (model.eval()(*batch)["total"] for model in (tuned, merged))
    assert abs(a - b) < 1e-5 * a
    for layer in (m for m in tuned.modules() if isinstance(m, LoRALinear)):
        layer.weight.data += layer.scale * (layer.lora_B @ layer.lora_A)
    by_hand = dict(tuned.named_parameters())
    assert all(torch.equal(parameter, by_hand[name]) for name, parameter in merged.named_parameters())


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_merge_exports_without_lora(dtype, convert, tmp_path):
    convert(out="base")
    (tmp_path / "exported").mkdir()  # empty: may be filled
    command = ["merge", "--weights", "base", "--out", "exported"] + ["--dtype", dtype][: 2 * bool(dtype)]
    prepare.main(command)
    names = ["config.json", "model.safetensors", "tokenizer.model"]
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == names
    base = load_file(tmp_path / "base/model.safetensors")
    ours = load_file(tmp_path / "exported/model.safetensors")
    assert base.keys() == ours.keys()
    assert all(same(t, base[n].half() if dtype else base[n]) for n, t in ours.items())
    with pytest.raises(SystemExit, match="exported: is not empty"):
        prepare.main(command)


def test_merge_is_told_where_the_base_is_now(convert, tmp_path):
    convert(out="base")
    tuned = Hawk.from_pretrained("base")
    tuned.set_trainable("paper")
    tuned.save_pretrained("tuned", base="base", tokenizer="base/tokenizer.model")
    Path("base").rename("moved")
    Path("tuned/kinds.json").write_text("{}")
    with pytest.raises(
        SystemExit, match="error: tuned/config.json: its base .*base is not there.*--base DIR"
    ):
        prepare.main(["merge", "--weights", "tuned", "--out", "merged"])
    prepare.main(["merge", "--weights", "tuned", "--base", "moved", "--out", "merged"])
    merged = dict(Hawk.from_pretrained("merged").named_parameters())
    assert all(torch.equal(p, merged[name]) for name, p in tuned.named_parameters())
    assert Path("merged/kinds.json").read_text() == "{}"  # phrases of one's own move along


def merge_branches(source, branches):
    prepare.main(["merge", "--weights", source, "--out", branches, "--set", f"branches={branches}"])
    return Hawk.from_pretrained(branches)


def test_merge_copies_and_drops_branches(convert, capsys):
    convert(out="base")
    base = Hawk.from_pretrained("base")
    three = merge_branches("base", "appearance,motion,background")
    assert "background: copied from motion; data.MASKS does not have it yet" in capsys.readouterr().out
    assert three(*inputs(three.config))["total"].isfinite()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, three.get_parameter(name)), name
    assert three.background.encoder_1 is None  # only the compared branches have tight features
    for name, parameter in three.background.named_parameters():
        assert torch.equal(parameter, base.motion.get_parameter(name)), name

    one = merge_branches("appearance,motion,background", "appearance")
    assert {name.partition(".")[0] for name, _ in one.named_parameters()} == {"vit", "llama", "appearance"}
    other = merge_branches("appearance", "appearance,background")
    assert torch.equal(other.background.proj_0.weight, base.appearance.proj_0.weight)
    with pytest.raises(SystemExit, match="not how these weights are shaped .*encoder_1"):
        merge_branches("appearance", "appearance,motion")  # to be compared by tight features, which are gone
