"""The Hawk model, bottom up. It sees a clip twice: as it is, and with whatever does not move blacked out.

    frames -+        +- appearance: Q-Former, + frame position, video Q-Former, projection -+
            +- ViT --+                                                                      +- tokens - LLaMA
    motion -+        +- motion:     Q-Former, + frame position, video Q-Former, projection -+  2 x 32

    model = Hawk.from_pretrained("weights/tiny")
    encoding = model.encode({"appearance": frames, "motion": masked})  # (B, T, 3, H, W) each, in [0, 1]
    ids = model.generate(encoding, input_ids)  # lists of new token ids
B clips, T frames, Q queries, S tokens, N soft tokens, vocabulary V; h heads of width d; width C (LLaMA: D)"""

import hashlib
import json
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

COMPARED = ("appearance", "motion")  # the branches whose features the consistency loss compares
FROZEN = ("ln_vision", "queries", "qformer")  # the frame-level part of a branch, as in BLIP-2

# ---- Configuration -----------------------------------------------------------------------------------------
# A clip, step by step (rows 2-5: a branch)   7b: shape        parameters    tiny: shape       parameters
#   ViT, on the frames of every branch        (32, 257, 1408)  985,894,528   (8, 65, 128)         876,416
#   ln_vision, queries, frame Q-Former        (32, 32, 768)    105,165,056   (8, 16, 128)         531,712
#   + frame position, frames side by side     (1024, 768)           24,576   (128, 128)             1,024
#   video Q-Former and its queries            (32, 768)         18,929,664   (32, 128)            533,504
#   proj_0, encoder_0, encoder_1, decoder_2   (32, 4096)        37,761,280   (32, 192)            105,056
#   LLaMA, over the whole sentence            (S, 4096)      6,738,415,616   (S, 192)           2,164,416


@dataclass
class HawkConfig:  # all sizes and options; the defaults are those of the published 7B model
    branches: tuple = ("appearance", "motion")  # streams of a clip, in the order of their soft tokens
    n_frames: int = 32  # rows of the frame position table: the most frames a clip may have
    image_size: int = 224
    patch_size: int = 14
    vit_dim: int = 1408
    vit_depth: int = 39
    vit_heads: int = 16
    vit_mlp: int = 6144  # int(1408 · 4.3637)
    qformer_dim: int = 768
    qformer_layers: int = 12
    qformer_heads: int = 12
    qformer_mlp: int = 3072
    cross_every: int = 2  # every second layer of the frame Q-Former attends to the image
    n_queries: int = 32  # per frame
    video_layers: int = 2
    n_video_queries: int = 32  # soft tokens per branch
    tight_dim: int = 256  # width of the "tight" (compressed) features that the consistency loss compares
    llama_dim: int = 4096
    llama_layers: int = 32
    llama_heads: int = 32
    llama_mlp: int = 11008
    vocab_size: int = 32000  # the placeholder <ImageHere> is one past the end: id `vocab_size`
    context_length: int = 4096  # most tokens in a prompt and its answer together; sample.ask enforces it
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1  # in training, of Q-Formers with trainable parameters
    motion_mask: str = "hard"  # how the motion stream is masked, see data.moving; "soft": the paper's Eq. 4
    consistency: str = "cosine"  # "debiased" leaves out the bias of encoder_1
    video_language_weight: float = 1.0
    motion_language_weight: float = 0.1
    consistency_weight: float = 0.1
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple = ("q_proj", "v_proj")
    gradient_checkpointing: bool = False  # train.py: recompute LLaMA's layers in the backward pass

    def __post_init__(self):
        """Raises ValueError for a model that cannot be built: a config file may hold anything."""
        for name, value in vars(self).items():  # type(): for isinstance, a bool is an int
            least = 1 if name == "rope_theta" or (type(value) is int and name != "lora_rank") else 0
            require(type(value) not in (int, float) or least <= value < 2**31, f"{name} is {value}")
        depth = max(self.vit_depth, self.qformer_layers, self.video_layers, self.llama_layers)
        require(depth <= 200, f"{depth} layers; at most 200 are possible")
        require(self.image_size >= self.patch_size, f"image_size {self.image_size} is below one patch")
        for tower, of in (("vit", 1), ("qformer", 1), ("llama", 2)):  # rotary embedding: even width
            dim = getattr(self, f"{tower}_dim")
            heads = getattr(self, f"{tower}_heads")
            require(dim % (heads * of) == 0, f"{heads} {tower}_heads do not divide {tower}_dim {dim} evenly")
        known = self.motion_mask in ("hard", "soft") and self.consistency in ("cosine", "debiased")
        known = known and {"q_proj", "k_proj", "v_proj", "o_proj"}.issuperset(self.lora_targets)
        require(known, f"motion_mask {self.motion_mask}, consistency {self.consistency}, {self.lora_targets}")
        words = {name for name in self.branches if str(name).isidentifier() and not hasattr(Hawk, name)}
        known = 0 < len(self.branches) == len(words - {"vit", "llama", "config", "steps", *vars(nn.Module())})
        require(known, f"branches {self.branches} must be distinct words that the model does not use")

    image_id = property(lambda self: self.vocab_size)  # token id of the placeholder that soft tokens replace
    n_visual = property(lambda self: len(self.branches) * self.n_video_queries)  # soft tokens of a clip
    preset = staticmethod(lambda name: HawkConfig(**PRESETS[name]))

    @classmethod
    def from_dict(cls, values, source="config"):
        """Rejects unknown keys and wrong types. A tuple may be a list (JSON) or "a,b,c" (command line)."""
        types = {field.name: field.type for field in fields(cls)}
        checked = {}
        for key, value in values.items():
            require(key in types, f"{source}: unknown key {key!r}")
            if types[key] is tuple and isinstance(value, str):
                value = value.split(",")
            fits = type(value) is types[key] or (type(value), types[key]) in ((int, float), (list, tuple))
            require(fits, f"{source}: {key} must be {types[key].__name__}, not {value!r}")
            checked[key] = tuple(map(str, value)) if types[key] is tuple else types[key](value)
        return cls(**checked)


PRESETS = {"7b": {}, "tiny": dict(
    n_frames=8, image_size=112, vit_dim=128, vit_depth=4, vit_heads=4, vit_mlp=512, tight_dim=32, dropout=0.0,
    qformer_dim=128, qformer_layers=2, qformer_heads=4, qformer_mlp=512, cross_every=1, n_queries=16,
    llama_dim=192, llama_layers=4, llama_heads=6, llama_mlp=512, vocab_size=1024, context_length=512,
)}  # fmt: skip


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ---- Attention and linear layers ---------------------------------------------------------------------------
def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, S, C) -> (B, h, S, C/h)


def attend(q, k, v, heads, dropout=0.0):
    """softmax(q kᵀ / √d) v in each head, unmasked. q (B, Sq, C), k and v (B, Sk, C) -> (B, Sq, C)."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def linears(**sizes):  # named Linears, each (in, out) or (in, out, bias); other modules may be added
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def drawn(std, *shape):  # normal; no draw on the meta device, where it would load torch's compiler
    x = torch.empty(shape)
    return nn.Parameter(x if x.is_meta else x.normal_(0, std))


# ---- ViT: EVA-CLIP-g, as in BLIP-2 -------------------------------------------------------------------------
class ViTBlock(nn.Module):  # pre-norm; keys have no bias: it would cancel in the softmax
    def __init__(self, config):
        super().__init__()
        C = config.vit_dim
        self.heads = config.vit_heads
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = linears(qkv=(C, 3 * C, False), proj=(C, C))
        self.attn.q_bias = nn.Parameter(torch.zeros(C))
        self.attn.v_bias = nn.Parameter(torch.zeros(C))
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = linears(fc1=(C, config.vit_mlp), fc2=(config.vit_mlp, C))

    def forward(self, x):
        bias = torch.cat([self.attn.q_bias, torch.zeros_like(self.attn.q_bias), self.attn.v_bias])
        q, k, v = F.linear(self.norm1(x), self.attn.qkv.weight, bias).chunk(3, dim=-1)
        x = x + self.attn.proj(attend(q, k, v, self.heads))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):  # equals the released `forward_features`: no pixel normalisation, no final norm
    def __init__(self, config):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, config.vit_dim, config.patch_size, stride=config.patch_size)
        self.cls_token = drawn(0.02, 1, 1, config.vit_dim)
        self.pos_embed = drawn(0.02, 1, 1 + patches, config.vit_dim)
        self.blocks = nn.Sequential(*(ViTBlock(config) for _ in range(config.vit_depth)))

    def forward(self, images):
        """B·T images (B·T, 3, H, W) in [0, 1] -> (B·T, 1 + patches, C)"""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B·T, patches, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        return self.blocks(x)


# ---- Q-Former: a BERT over learned queries, which attend to an image, or a clip, by cross-attention --------
class QFormerAttention(nn.Module):  # BERT's, post-norm: norm(x + output(attention(x, context)))
    def __init__(self, dim, heads, context_dim, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, context):
        dropout = self.dropout if self.training else 0.0
        y = attend(self.query(x), self.key(context), self.value(context), self.heads, dropout)
        return self.norm(x + F.dropout(self.output(y), dropout))


class QFormerLayer(nn.Module):
    def __init__(self, config, context_dim, crosses):
        super().__init__()
        dim = config.qformer_dim
        heads = config.qformer_heads
        self.dropout = config.dropout
        self.self_attention = QFormerAttention(dim, heads, dim, self.dropout)
        self.cross_attention = QFormerAttention(dim, heads, context_dim, self.dropout) if crosses else None
        self.mlp = linears(fc1=(dim, config.qformer_mlp), fc2=(config.qformer_mlp, dim))
        self.mlp.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x, context):
        x = self.self_attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(x)))
        return self.mlp.norm(x + F.dropout(y, self.dropout, self.training))


class QFormer(nn.Module):  # equals the released `Qformer.bert(query_embeds=…)` without its text half
    def __init__(self, config, layers, context_dim, every):
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.qformer_dim, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(config, context_dim, i % every == 0) for i in range(layers))

    def forward(self, queries, context):
        """Learned queries (1, Q, C) attend to a context (B, S, context_dim) -> (B, Q, C)."""
        x = F.dropout(self.norm(queries).expand(len(context), -1, -1), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, context)
        return x


# ---- Branch: from the ViT's features of T frames to 32 soft tokens -----------------------------------------
class Branch(nn.Module):
    """Paper, Sec. 3.2: f = P(E(X)). Built once for each of config.branches. It has tight features only if the
    consistency loss compares them, because DDP would wait for the gradient of a layer that no loss uses."""

    def __init__(self, config, compared=True):
        super().__init__()
        dim = config.qformer_dim
        D = config.llama_dim
        self.ln_vision = nn.LayerNorm(config.vit_dim, eps=1e-5)  # as in BLIP-2, like everything in FROZEN
        self.queries = drawn(0.02, 1, config.n_queries, dim)
        self.qformer = QFormer(config, config.qformer_layers, config.vit_dim, config.cross_every)
        # trained: the frame positions, the video Q-Former and the projection into LLaMA
        self.frame_position = nn.Embedding.from_pretrained(drawn(1, config.n_frames, dim), freeze=False)
        self.video_queries = drawn(0.02, 1, config.n_video_queries, dim)
        self.video_qformer = QFormer(config, config.video_layers, dim, every=1)
        self.proj_0 = nn.Linear(dim, D)
        self.encoder_0 = nn.Linear(D, D)
        self.encoder_1 = nn.Linear(D, config.tight_dim) if compared else None  # a side exit for the loss
        self.decoder_2 = nn.Linear(D, D)

    def frames(self, features):
        """Each frame on its own: ViT features (B·T, 1 + patches, vit_dim) -> (B·T, Q, C). Cacheable."""
        return self.qformer(self.queries, self.ln_vision(features))

    def video(self, frames):
        """All frames: (B, T, Q, C) -> soft tokens (B, 32, D), tight features (B, 32, tight_dim) or None."""
        T = frames.shape[1]
        require(T <= len(self.frame_position.weight), f"{T} frames are more than the model has positions")
        position = self.frame_position(torch.arange(T, device=frames.device))  # (T, C)
        x = (frames.to(position.dtype) + position[:, None]).flatten(1, 2)  # (B, T·Q, C)
        x = self.video_qformer(self.video_queries, x)  # (B, 32, C)
        x = self.encoder_0(self.proj_0(x))  # (B, 32, D); no activation anywhere in this chain
        return self.decoder_2(x), None if self.encoder_1 is None else self.encoder_1(x)


# ---- LLaMA-2, its KV cache, and one decoding step ----------------------------------------------------------
def rotate(x, cos, sin):
    """Rotary embedding: rotates the pairs (x_i, x_{i + d/2}) of x (B, h, S, d), as in transformers. cos and
    sin (…, S, d) of the angles are float32; the first half of sin is negated."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of each layer, for up to `size` tokens. `length`, how many are filled, is a tensor on
    the device, so that a CUDA graph can capture a step. `padding`: padding tokens before each prompt."""

    def __init__(self, config, batch, size, like):
        shape = (2, batch, config.llama_heads, size, config.llama_dim // config.llama_heads)  # k and v
        self.layers = [like.new_zeros(shape) for _ in range(config.llama_layers)]
        self.slots = torch.arange(size, device=like.device)
        self.length = torch.zeros((), dtype=torch.long, device=like.device)
        self.padding = torch.zeros(batch, 1, 1, 1, dtype=torch.long, device=like.device)

    def clear(self, padding):  # (B,)
        for kv in self.layers:
            kv.zero_()  # masked entries must be finite, too: 0 times NaN is NaN
        self.length.zero_()
        self.padding.copy_(padding.view(-1, 1, 1, 1))

    def extend(self, S):
        """Appends S tokens -> positions after the padding (B, 1, S), slots (S,), mask (B, 1, S, size)."""
        slots = self.length + torch.arange(S, device=self.length.device)
        self.length += S
        seen = (self.padding <= self.slots) & (self.slots <= slots[:, None])
        seen = seen | (self.slots == slots[:, None])  # padding sees itself, to avoid a softmax of 0 / 0
        mask = torch.zeros_like(seen, dtype=self.layers[0].dtype).masked_fill(~seen, -torch.inf)
        return (slots - self.padding[..., 0]).clamp_min(0), slots, mask


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.llama_dim
        self.heads = config.llama_heads
        self.input_layernorm = nn.RMSNorm(D, config.norm_eps)
        self.self_attn = linears(**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (D, D, False)))
        self.post_attention_layernorm = nn.RMSNorm(D, config.norm_eps)
        up = (D, config.llama_mlp, False)
        self.mlp = linears(gate_proj=up, up_proj=up, down_proj=(config.llama_mlp, D, False))

    def forward(self, x, cos, sin, kv=None, slots=None, mask=None):  # kv: this layer's part of a KVCache
        y = self.input_layernorm(x)
        q, k, v = (split_heads(self.self_attn[f"{part}_proj"](y), self.heads) for part in "qkv")
        q, k = (rotate(part, cos, sin) for part in (q, k))  # (B, h, S, d)
        if kv is not None:  # written into the cache beside those of earlier tokens: (B, h, size, d)
            k, v = kv.index_copy_(3, slots, torch.stack([k, v]).to(kv.dtype))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))  # SwiGLU


class Llama(nn.Module):  # on embeddings: equals transformers' `LlamaForCausalLM` (names too), untied head
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(drawn(1, config.vocab_size, config.llama_dim), False)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.llama_layers))
        self.norm = nn.RMSNorm(config.llama_dim, config.norm_eps)
        self.lm_head = nn.Linear(config.llama_dim, config.vocab_size, bias=False)

    def forward(self, x, cache=None, run_layer=nn.Module.__call__):
        """Embeddings (B, S, D) -> hidden states (B, S, D). With a cache, x continues what it holds.
        `run_layer` may be a compiled LlamaBlock.forward; by default, layers are called as usual."""
        alone = [torch.arange(x.shape[1], device=x.device)]
        positions, *where = cache.extend(x.shape[1]) if cache else alone  # (B, 1, S) or (S,); slots, mask
        d = self.config.llama_dim // self.config.llama_heads
        pairs = torch.arange(0, d, 2, device=x.device, dtype=torch.float32)
        turn = self.config.rope_theta ** (-pairs / d)
        angle = positions[..., None].float() * torch.cat([-turn, turn])  # (…, S, d), signed for rotate
        rotation = (angle.cos(), angle.sin())
        for i, layer in enumerate(self.layers):
            x = run_layer(layer, x, *rotation, cache and cache.layers[i], *where)
        return self.norm(x)


class DecodingStep:
    """Makes one token: embeds the last one, runs the layers over the cache, applies the head and takes the
    likeliest. Nothing waits for the CPU and no tensor is reallocated, so a GPU captures the step once, as a
    CUDA graph, and replays it: launching a thousand small kernels takes longer than running them."""

    def __init__(self, llama, batch, size, like, compiled=False):
        self.llama = llama
        self.cache = KVCache(llama.config, batch, size, like)
        self.token = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.logits = torch.zeros(batch, llama.config.vocab_size, device=like.device)
        self.run_layer = nn.Module.__call__
        if compiled:  # inductor fuses small kernels; it compiles once for all layers and cache sizes
            options = {"coordinate_descent_tuning": True}
            self.run_layer = torch.compile(LlamaBlock.forward, fullgraph=True, dynamic=True, options=options)
        if like.is_cuda and not torch.is_autocast_enabled("cuda"):  # a graph would keep autocast's copies
            self.run()  # warm-up: a capture must not load or compile kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(like.device), torch.cuda.graph(graph):
                self.run()
            self.run = graph.replay  # replaces the method

    def run(self):
        self.read(self.llama.embed_tokens(self.token[:, None]), self.run_layer)

    def read(self, x, run_layer=nn.Module.__call__):  # a prompt (B, S, D), or the last token
        self.logits.copy_(self.llama.lm_head(self.llama(x, self.cache, run_layer)[:, -1]))
        self.token.copy_(self.logits.argmax(-1))


# ---- LoRA: replaces a Linear -------------------------------------------------------------------------------
class LoRALinear(nn.Linear):  # y = W x + (alpha / rank) · B A dropout(x); A starts as in a Linear, B at zero
    def __init__(self, linear, config):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.scale = config.lora_alpha / config.lora_rank
        self.dropout = config.lora_dropout
        self.lora_A = nn.Linear(self.in_features, config.lora_rank, False, device=self.weight.device).weight
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.lora_rank).to(self.weight.device))

    def forward(self, x):
        low = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype) @ self.lora_A.T  # (…, rank)
        return F.linear(x, self.weight) + self.scale * (low @ self.lora_B.T).to(x.dtype)


# ---- Hawk --------------------------------------------------------------------------------------------------
# Of B clips: soft tokens (B, N, D), 32 per branch; tight features {compared branch: (B, 32, tight_dim)}
Encoding = namedtuple("Encoding", "tokens tight")


def is_frame_level(name):
    """Whether a parameter of this name acts on single frames (ViT, frame Q-Former): the paper freezes it."""
    tower, _, part = name.partition(".")
    return tower == "vit" or (tower != "llama" and part.startswith(FROZEN))


class Hawk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        both = set(COMPARED) <= set(config.branches)
        for name in config.branches:
            self.add_module(name, Branch(config, compared=both and name in COMPARED))
        self.llama = Llama(config)
        self.steps = {}  # the last DecodingStep, keyed by everything it depends on
        if config.lora_rank:
            self.add_lora()

    device = property(lambda self: self.llama.embed_tokens.weight.device)
    branch = nn.Module.get_submodule  # by its name
    compile_step = False  # whether generate compiles its decoding step

    def set_trainable(self, mode):
        """Chooses what trains. "paper": all after the frame Q-Formers except LLaMA; "released": that and the
        motion branch's queries, by its authors' oversight; "lora": "paper" and LoRA, added if missing;
        "all": everything. The rest stays in eval mode, even after train(). ValueError for other modes."""
        require(mode in ("released", "paper", "lora", "all"), f"mode {mode!r}: released, paper, lora or all")
        if mode == "lora" and not any(isinstance(module, LoRALinear) for module in self.modules()):
            self.config.lora_rank = self.config.lora_rank or 8
            self.add_lora()
        for name, p in self.named_parameters():
            learns = mode == "all" or not (is_frame_level(name) or name.startswith("llama."))
            learns |= (mode, name) == ("released", "motion.queries") or (mode == "lora" and ".lora_" in name)
            p.requires_grad_(learns)
        return self.train(self.training)

    def train(self, mode=True):
        self.steps.clear()  # a captured graph keeps the layers and dropout of its capture
        for module in self.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self

    def add_lora(self):
        for block in self.llama.layers:
            for target in self.config.lora_targets:
                block.self_attn[target] = LoRALinear(block.self_attn[target], self.config)

    def frame_features(self, streams):
        """Frames {branch: (B, T, 3, H, W)} in [0, 1] -> {branch: (B, T, Q, C)}, which can be cached."""
        images = torch.cat([streams[name].flatten(0, 1) for name in self.config.branches])
        images = images.to(self.vit.cls_token.dtype).split(32)  # limits activation memory
        features = torch.cat([self.vit(x) for x in images]).chunk(len(self.config.branches))
        pairs = zip(self.config.branches, features, strict=True)  # features: (B·T, 1 + patches, C)
        return {name: self.branch(name).frames(x).unflatten(0, streams[name].shape[:2]) for name, x in pairs}

    def encode(self, streams, counts=None):
        """Frames {branch: (B, T, 3, H, W)} in [0, 1] or cached {branch: (B, T, Q, C)} -> Encoding. counts
        (B,): frames of each clip, if padded. ValueError if streams are missing, unequal, or too long."""
        if counts is not None and counts.min() < max(x.shape[1] for x in streams.values()):
            out = [self.encode({k: x[i, None, :n] for k, x in streams.items()}) for i, n in enumerate(counts)]
            tight = {name: torch.cat([clip.tight[name] for clip in out]) for name in out[0].tight}
            return Encoding(torch.cat([clip.tokens for clip in out]), tight)  # padding would change them
        for name in self.config.branches:
            require(name in streams, f"no stream for the model's branch {name}: there are {list(streams)}")
        alike = len({streams[name].shape for name in self.config.branches}) == 1
        require(alike, f"streams differ in shape: {[x.shape for x in streams.values()]}")
        if streams[self.config.branches[0]].ndim == 5:
            streams = self.frame_features(streams)
        encoded = {name: self.branch(name).video(streams[name]) for name in self.config.branches}
        tokens = torch.cat([soft for soft, _ in encoded.values()], dim=1)
        return Encoding(tokens, {name: tight for name, (_, tight) in encoded.items() if tight is not None})

    def embed(self, input_ids, soft):
        """Embeds ids (B, S), with the soft tokens (B, N, D) in place of placeholders, in order: the only way
        that vision enters LLaMA. Raises ValueError if a row does not have N placeholders."""
        slots = input_ids == self.config.image_id
        counts = slots.sum(1).tolist()
        require(counts == [soft.shape[1]] * len(soft), f"{counts} placeholders, {soft.shape[1]} soft tokens")
        x = self.llama.embed_tokens(input_ids.masked_fill(slots, 0))  # (B, S, D)
        return x.masked_scatter(slots[..., None], soft.to(x.dtype))

    def language_loss(self, input_ids, labels, soft, per_sample=False):
        """Cross-entropy of the next token, averaged over labelled tokens (not -100); with per_sample, over
        each row, then over rows. Only labelled tokens go through the head, whose output is large."""
        hidden = self.llama(self.embed(input_ids, soft))[:, :-1]
        target = labels[:, 1:]
        kept = target != -100  # (B, S - 1)
        require(kept.any(), "a batch without a single supervised token (all labels are -100)")
        loss = F.cross_entropy(self.llama.lm_head(hidden[kept]).float(), target[kept], reduction="none")
        weight = kept / kept.sum(1, keepdim=True) / len(kept) if per_sample else kept / kept.sum()
        return (loss * weight[kept]).sum()  # [kept] leaves out rows without labels, whose weights are 0 / 0

    def consistency_loss(self, encoding):
        """Paper, Eq. 7: 1 − cos(tight appearance, tight motion), flattened per sample, mean over the batch.
        The biases of the two encoder_1 alone can minimise it; "debiased" compares without them."""
        if not encoding.tight:  # one of the two branches is missing
            return encoding.tokens.new_zeros(())
        share = 1 if self.config.consistency == "debiased" else 0  # of the bias that is subtracted
        a, m = (encoding.tight[name] - share * self.branch(name).encoder_1.bias for name in COMPARED)
        return (1 - F.cosine_similarity(a.flatten(1).float(), m.flatten(1).float())).mean()

    def losses(self, clips, input_ids, labels, motion_input_ids=None, motion_labels=None, per_sample=False):
        """Encoding of clips, ids and labels (B, S) -> losses by name (scalars). Without a motion target or a
        motion branch, motion_language repeats video_language, as in the released stage 2."""
        c = self.config
        video_language = self.language_loss(input_ids, labels, clips.tokens, per_sample)
        motion_language = video_language
        if motion_input_ids is not None and "motion" in c.branches:
            soft = clips.tokens.split(c.n_video_queries, dim=1)[c.branches.index("motion")]
            motion_language = self.language_loss(motion_input_ids, motion_labels, soft, per_sample)
        consistency = self.consistency_loss(clips)
        total = c.video_language_weight * video_language  # paper, Eq. 9
        total = total + c.motion_language_weight * motion_language + c.consistency_weight * consistency
        losses = {"video_language": video_language, "motion_language": motion_language}
        return losses | {"consistency": consistency, "total": total}

    def forward(self, streams, input_ids, labels, *motion, counts=None, **options):
        return self.losses(self.encode(streams, counts), input_ids, labels, *motion, **options)

    @torch.no_grad()
    def generate(self, encoding, input_ids, max_new_tokens=300, temperature=0.0, top_p=1.0,
                 repetition_penalty=1.0, seed=0, eos_id=2, on_token=None):  # fmt: skip
        """Continues rows of input_ids ((B, S), or unequal lists) to `eos_id` (included) or max_new_tokens
        -> new ids (lists). See `choose`. on_token(B ids) may return False to stop. ValueError: as `embed`."""
        rows = [torch.as_tensor(row, device=self.device) for row in input_ids]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")  # zeros in front
        x = self.embed(ids, encoding.tokens)  # (B, S, D)
        answers = [[] for _ in rows]
        generator = torch.Generator(self.device).manual_seed(seed)
        step = self.decoding_step(x, max_new_tokens)
        step.cache.clear(torch.tensor([ids.shape[1] - len(row) for row in rows], device=self.device))
        step.read(x)
        for n in range(max_new_tokens):
            if n and not x.is_cuda:  # a GPU has done it already, below
                step.run()
            if temperature > 0 or repetition_penalty != 1:  # else the step has already chosen
                new = torch.tensor(answers, dtype=torch.long, device=self.device)  # (B, n)
                step.token.copy_(choose(step.logits, new, temperature, top_p, repetition_penalty, generator))
            token = step.token.to("cpu", non_blocking=x.is_cuda)
            if x.is_cuda:
                arrival = torch.cuda.current_stream(x.device).record_event()
                step.run()  # starts on the next token before the CPU reads this one
                arrival.synchronize()
            for answer, word in zip(answers, token.tolist(), strict=True):
                answer.append(word)
            if (on_token and on_token(token.tolist()) is False) or all(eos_id in row for row in answers):
                break
        return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in answers]

    def decoding_step(self, x, max_new_tokens):
        """The DecodingStep for a prompt (B, S, D) and its answer; a new one if any weight has moved."""
        size = math.ceil((x.shape[1] + max_new_tokens) / 64) * 64
        how = (x.device, x.is_inference(), torch.is_autocast_enabled(x.device.type), self.compile_step)
        key = (len(x), size, x.dtype, *how, *(w.data_ptr() for w in self.llama.state_dict().values()))
        if key not in self.steps:
            self.steps.clear()  # frees the last one's cache first
            self.steps[key] = DecodingStep(self.llama, len(x), size, x, self.compile_step)
        return self.steps[key]

    def save_pretrained(self, folder, dtype=None, tokenizer=None, base=None, mark=None):
        """Writes config.json, model.safetensors and tokenizer.model (copied from the path `tokenizer`). With
        `base` (where training started), only trained weights, and its path and fingerprint (or `mark`)."""
        folder = Path(folder)
        require(base is None or folder.resolve() != Path(base).resolve(), f"{folder}: is itself the base")
        folder.mkdir(parents=True, exist_ok=True)
        kept = [(name, p) for name, p in self.named_parameters() if base is None or p.requires_grad]
        save_tensors({name: p.detach().to("cpu", dtype) for name, p in kept}, folder / "model.safetensors")
        config = asdict(self.config)
        if base is not None:
            config |= {"base": str(Path(base).resolve()), "base_fingerprint": mark or fingerprint(base)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if tokenizer is not None:
            (folder / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, config=None, base=None):
        """Loads a folder that save_pretrained or `prepare.py weights` wrote, in eval mode. Built on the meta
        device and filled tensor by tensor. `config` replaces the folder's; `base`: see read_chain."""
        stored, folders = read_chain(folder, base=base)
        with torch.device("meta"):
            model = cls(config or stored)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        hint = f"for other branches: python prepare.py merge --weights {folder} --set branches=… --out …"
        for file, name, x in read_tensors(folders):
            fits = shapes.get(name) == x.shape
            require(fits, f"{file}: {name} has shape {tuple(x.shape)}, not {shapes.get(name)} ({hint})")
            fits = x.is_floating_point() and x.itemsize > 1 and all(map(math.isfinite, x.aminmax()))
            require(fits, f"{file}: {name} ({x.dtype}) must be finite floats")  # aminmax has no float8
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(x.to(device, dtype)))
        missing = [name for name, p in model.named_parameters() if p.is_meta]
        require(not missing, f"{folder}: {len(missing)} tensors are missing, first {missing[:1]} ({hint})")
        return model.eval()


def choose(logits, new, temperature, top_p, penalty, generator):
    """Logits (B, V) -> tokens (B,): the likeliest (temperature 0), or a sample from the fewest that together
    reach top_p. The penalty divides positive logits of tokens in new (B, n), and multiplies negative ones."""
    seen = logits.gather(1, new)
    logits = logits.scatter(1, new, torch.where(seen > 0, seen / penalty, seen * penalty))
    if temperature < 1e-6:  # dividing by less would overflow
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def read_chain(folder, above=(), base=None):
    """(HawkConfig, [folders]) of weights and the bases they build on, base first: later tensors win. `base`:
    where the base is now. ValueError if it is missing, or not the one that training started from."""
    folders = [Path(folder), *above]
    file = folders[0] / "config.json"
    try:
        values = {**json.loads(file.read_text())}
        mark = values.pop("base_fingerprint", None)
        base = Path(base or values["base"]) if "base" in values else None
        there = base and base.is_dir()
        config = HawkConfig.from_dict({key: value for key, value in values.items() if key != "base"})
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); try RUN/last; prepare.py weights makes one") from e
    if base is None or base in folders:
        return config, folders
    require(there, f"{file}: its base {base} is not there; correct it here, or prepare.py merge --base DIR")
    same = mark is None or mark == fingerprint(base)
    require(same, f"{base}: is not what {folder} was trained on, or has changed")
    return config, read_chain(base, folders)[1]


def fingerprint(folder):
    """A hash of up to 64 numbers of each tensor in a folder: reading all of them would take too long."""
    numbers = [x.flatten()[:: x.numel() // 64 + 1].tolist() for _, _, x in read_tensors([Path(folder)])]
    return hashlib.sha256(str(numbers).encode()).hexdigest()


def read_tensors(folders):
    """Yields (file, name, tensor) of the folders' safetensors, one tensor at a time (memory-mapped)."""
    for folder in folders:
        for file in sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():
                        yield file, name, tensors.get_tensor(name)
            except (OSError, SafetensorError) as e:
                raise ValueError(f"{file}: cannot be read as safetensors ({e})") from e


def save_tensors(tensors, file):
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
