"""The Hawk model: a video-language model that sees a clip twice, as it is and with everything still blacked out.

    frames ─┐           ┌ appearance: Q-Former → + frame position → video Q-Former → projection → 32 soft tokens ┐
            ├─ one ViT ─┤                                                                                        ├ LLaMA → words
    motion ─┘           └ motion:     Q-Former → + frame position → video Q-Former → projection → 32 soft tokens ┘

It reads only its own format from disk; `prepare.py weights` turns the released files into it.
Letters: B batch, T frames, S sequence length, Q queries, C width of ViT or Q-Former, D width of LLaMA, h heads.

    model = Hawk.from_pretrained("weights/tiny")
    soft = model.encode(appearance, motion)             # (B, T, 3, H, W) each, in [0, 1]  ->  .tokens (B, 64, D)
    ids = model.generate(appearance, motion, input_ids)
"""

import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint


# ---- Configuration: every size, flat. The defaults are the published 7B model; preset "tiny" is the one trained here -
@dataclass
class HawkConfig:
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
    cross_every: int = 2  # every second layer of the frame Q-Former looks at the image
    n_queries: int = 32  # per frame
    video_layers: int = 2
    n_video_queries: int = 32  # soft tokens per branch
    tight_dim: int = 256  # width of the features that the consistency loss compares
    llama_dim: int = 4096
    llama_layers: int = 32
    llama_heads: int = 32
    llama_mlp: int = 11008
    vocab_size: int = 32000  # the placeholder <ImageHere> is one past the end: id `vocab_size`
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1  # in Q-Formers that train
    consistency: str = "cosine"  # or "debiased": without the bias of encoder_1
    video_language_weight: float = 1.0
    motion_language_weight: float = 0.1
    consistency_weight: float = 0.1
    motion: str = "hard"  # the motion mask trained on; "soft": the paper's Eq. 4; "none": the branch sees nothing
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: str = "q_proj,v_proj"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.consistency not in ("cosine", "debiased") or self.motion not in ("hard", "soft", "none"):
            raise ValueError(f"consistency {self.consistency!r}, motion {self.motion}: cosine|debiased, hard|soft|none")
        for name, value in vars(self).items():  # a file may ask for anything: nothing is built before this
            least, most = name != "lora_rank", 200 if name.endswith(("depth", "layers")) else 1 << 18
            if type(value) is int and not least <= value <= most or type(value) is float and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}")
        for tower in ("vit", "qformer", "llama"):
            dim, heads = getattr(self, f"{tower}_dim"), getattr(self, f"{tower}_heads")
            if dim % heads or tower == "llama" and dim // heads % 2:  # its positions turn pairs
                raise ValueError(f"{tower}_dim {dim} does not divide into {tower}_heads {heads}, evenly wide in llama")
        if self.image_size < self.patch_size or not re.fullmatch("[qkvo]_proj(,[qkvo]_proj)*", self.lora_targets):
            raise ValueError(f"image_size {self.image_size} < patch_size, or lora_targets {self.lora_targets}: q_proj…")

    image_id = property(lambda self: self.vocab_size)  # token id of the placeholder that soft tokens replace
    n_visual = property(lambda self: len(BRANCHES) * self.n_video_queries)  # soft tokens of a clip, appearance first

    @classmethod
    def preset(cls, name):
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, values, source="config"):
        """Refuses unknown keys and changed types: a typo must not silently become a default."""
        types = {f.name: f.type for f in fields(cls)}
        for key, value in values.items():
            if key not in types:
                raise ValueError(f"{source}: unknown key {key!r}")
            if type(value) is not types[key] and (type(value), types[key]) != (int, float):
                raise ValueError(f"{source}: {key} must be {types[key].__name__}, not {value!r}")
        return cls(**{key: types[key](value) for key, value in values.items()})


BRANCHES = ("appearance", "motion")  # the streams, in the order of their soft tokens
PRESETS = {"7b": {}, "tiny": dict(
    n_frames=8, image_size=112, patch_size=14, vit_dim=128, vit_depth=4, vit_heads=4, vit_mlp=512,
    qformer_dim=128, qformer_layers=2, qformer_heads=4, qformer_mlp=512, cross_every=1, n_queries=16, tight_dim=32,
    llama_dim=192, llama_layers=4, llama_heads=6, llama_mlp=512, vocab_size=1024, dropout=0.0,
)}  # fmt: skip


# ---- Leaves: norms, attention, MLP -----------------------------------------------------------------------------------
class LayerNorm(nn.LayerNorm):  # computed in float32 whatever the dtype of its input and weights
    def forward(self, x):
        w, b = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):  # LLaMA's norm: x / rms(x) · weight, computed in float32
    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


def attend(q, k, v, heads, dropout=0.0):
    """softmax(q kᵀ / √d) v over `heads` heads, no mask. q (B, Sq, C), k and v (B, Sk, C) -> (B, Sq, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, S, C/h)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def run(layers, x, *args, save_memory=False):
    """x through the layers; `save_memory` recomputes each layer in the backward pass instead of storing it."""
    save_memory = save_memory and torch.is_grad_enabled()
    for layer in layers:
        x = checkpoint(layer, x, *args, use_reentrant=False) if save_memory else layer(x, *args)
    return x


# ---- ViT: EVA-CLIP-g, as in BLIP-2 -----------------------------------------------------------------------------------
class ViTAttention(nn.Module):  # qkv is one weight; keys have no bias (it would cancel in the softmax)
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        bias = torch.cat([b.to(x.dtype) for b in (self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads))


class ViTBlock(nn.Module):  # pre-norm
    def __init__(self, config):
        super().__init__()
        C = config.vit_dim
        self.norm1, self.norm2 = LayerNorm(C, eps=1e-6), LayerNorm(C, eps=1e-6)
        self.attn, self.mlp = ViTAttention(C, config.vit_heads), MLP(C, config.vit_mlp)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):  # equals the released `forward_features`: pixels not normalised, no norm after the last block
    def __init__(self, config):
        super().__init__()
        self.save_memory, C, patch = config.gradient_checkpointing, config.vit_dim, config.patch_size
        self.patch_embed = nn.Conv2d(3, C, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, C))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.vit_depth))

    def forward(self, images):
        """images (N, 3, H, W) in [0, 1] -> (N, 1 + patches, C)"""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (N, patches, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        return run(self.blocks, x, save_memory=self.save_memory)


# ---- Q-Former: a BERT whose input is learned queries that look at an image (or at a clip) through cross-attention ----
class QFormerAttention(nn.Module):  # BERT's, post-norm: norm(x + output(attention(x, context)))
    def __init__(self, dim, heads, context_dim, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(d, dim) for d in (dim, context_dim, context_dim))
        self.output, self.norm = nn.Linear(dim, dim), LayerNorm(dim, eps=1e-12)

    def forward(self, x, context):
        p = self.dropout if self.training else 0.0
        y = attend(self.query(x), self.key(context), self.value(context), self.heads, dropout=p)
        return self.norm(x + F.dropout(self.output(y), p))


class QFormerLayer(nn.Module):
    def __init__(self, config, context_dim, crosses):
        super().__init__()
        dim, heads, self.dropout = config.qformer_dim, config.qformer_heads, config.dropout
        self.self_attention = QFormerAttention(dim, heads, dim, self.dropout)
        self.cross_attention = QFormerAttention(dim, heads, context_dim, self.dropout) if crosses else None
        self.mlp = MLP(dim, config.qformer_mlp)
        self.mlp.norm = LayerNorm(dim, eps=1e-12)

    def forward(self, x, context):
        x = self.self_attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context)
        return self.mlp.norm(x + F.dropout(self.mlp(x), self.dropout, self.training))


class QFormer(nn.Module):  # equals the released `Qformer.bert(query_embeds=…, …)`, its unused text half left out
    def __init__(self, config, layers, context_dim, cross_every):
        super().__init__()
        self.dropout, self.save_memory = config.dropout, config.gradient_checkpointing
        self.norm = LayerNorm(config.qformer_dim, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(config, context_dim, i % cross_every == 0) for i in range(layers))

    def forward(self, queries, context):
        """Learned queries (1, Q, C) read a context (B, S, context_dim) and become (B, Q, C)."""
        x = F.dropout(self.norm(queries), self.dropout, self.training).expand(len(context), -1, -1)
        return run(self.layers, x, context, save_memory=self.save_memory)


# ---- Branch: from ViT features of T frames to 32 soft tokens. Built twice: appearance and motion ---------------------
class Branch(nn.Module):  # paper, Sec. 3.2: f = P(E(X)), with weights of its own for appearance and for motion
    def __init__(self, config):
        super().__init__()
        dim, D = config.qformer_dim, config.llama_dim
        # frozen in the published training: BLIP-2's
        self.ln_vision = LayerNorm(config.vit_dim, eps=1e-5)
        self.queries = nn.Parameter(torch.zeros(1, config.n_queries, dim))
        self.qformer = QFormer(config, config.qformer_layers, config.vit_dim, config.cross_every)
        # what trains: the frame order, the video Q-Former and the bridge to LLaMA
        self.frame_position = nn.Embedding(config.n_frames, dim)
        self.video_queries = nn.Parameter(torch.zeros(1, config.n_video_queries, dim))
        self.video_qformer = QFormer(config, config.video_layers, dim, cross_every=1)
        self.proj_0, self.encoder_0 = nn.Linear(dim, D), nn.Linear(D, D)
        self.encoder_1, self.decoder_2 = nn.Linear(D, config.tight_dim), nn.Linear(D, D)

    def frames(self, features):
        """Each frame on its own: ViT features (N, 1 + patches, vit_dim) -> (N, Q, C). Frozen, so it can be cached."""
        return self.qformer(self.queries, self.ln_vision(features))

    def video(self, frames):
        """All frames together: (B, T, Q, C) -> soft tokens (B, 32, D) and tight features (B, 32, tight_dim)."""
        T = frames.shape[1]
        if T > self.frame_position.num_embeddings:
            raise ValueError(f"a clip of {T} frames; this model has positions for {self.frame_position.num_embeddings}")
        position = self.frame_position(torch.arange(T, device=frames.device))  # (T, C)
        x = (frames.to(position.dtype) + position[:, None]).flatten(1, 2)  # (B, T·Q, C)
        x = self.video_qformer(self.video_queries, x)  # (B, 32, C)
        x = self.encoder_0(self.proj_0(x))  # (B, 32, D); no activation anywhere in this chain
        return self.decoder_2(x), self.encoder_1(x)


# ---- LLaMA-2 ---------------------------------------------------------------------------------------------------------
def rotate(x, cos, sin):
    """Rotary position: turns the pairs (x_i, x_{i + d/2}) by their angle (Hugging Face's layout). x (B, h, S, d)."""
    a, b = (x32 := x.float()).chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class KVCache:  # keys and values of every layer, allocated once for `size` positions, of which `length` are filled
    def __init__(self, config, batch, size, like, padding=0, static=False):
        self.size, self.length, self.static = 1 << (size - 1).bit_length() if static else size, 0, static
        shape = (batch, config.llama_heads, self.size, config.llama_dim // config.llama_heads)
        self.k, self.v = ([like.new_zeros(shape) for _ in range(config.llama_layers)] for _ in range(2))
        self.padding = torch.as_tensor(padding, device=like.device).view(-1, 1, 1, 1)  # (B or 1, 1, 1, 1): left padding

    def write(self, layer, k, v):
        """Stores k, v (B, h, S, d) of the last S positions; returns those so far, if static all: the rest is zeros."""
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            held.index_copy_(2, self.query[:, 0], new.to(held.dtype))
        return self.k[layer][:, :, : self.end], self.v[layer][:, :, : self.end]

    def extend(self, S):
        """By S tokens: their positions (B or 1, 1, S), and which of all keys each one sees (B or 1, 1, S, end)."""
        self.length += S
        self.end = self.size if self.static else self.length
        key = torch.arange(self.end, device=self.padding.device)
        query = self.query = torch.arange(self.length - S, self.length, device=key.device)[:, None]  # (S, 1)
        mask = (self.padding <= key) & (key <= query) | (key == query)  # padding sees itself: its softmax is not 0 / 0
        return (query[:, 0] - self.padding[..., 0]).clamp_min(0), mask


class LlamaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, self.heads, self.layer = config.llama_dim, config.llama_heads, layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x, cos, sin, mask, cache):
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)  # (B, h, S, d)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):  # SwiGLU: down(silu(gate(x)) · up(x))
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, eps = config.llama_dim, config.norm_eps
        self.input_layernorm, self.self_attn = RMSNorm(D, eps), LlamaAttention(config, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(D, eps), LlamaMLP(D, config.llama_mlp)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):  # over embeddings: equals transformers' `LlamaForCausalLM` (names too), head not tied
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.llama_dim)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.llama_layers))
        self.norm = RMSNorm(config.llama_dim, config.norm_eps)
        self.lm_head = nn.Linear(config.llama_dim, config.vocab_size, bias=False)

    def forward(self, x, cache=None):
        """Embeddings (B, S, D) -> hidden states (B, S, D) before the head. With a cache, x continues what is in it."""
        positions, mask = cache.extend(x.shape[1]) if cache else (torch.arange(x.shape[1], device=x.device), None)
        return self.through_layers(x, positions, mask, cache)

    def through_layers(self, x, positions, *args):  # apart, so that sample.py:compile_decoding can compile it
        c, d = self.config, self.config.llama_dim // self.config.llama_heads
        frequency = c.rope_theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
        angle = positions[..., None].float() * frequency.repeat(2)  # (B or 1, 1, S, d) with a cache, else (S, d)
        return self.norm(run(self.layers, x, angle.cos(), angle.sin(), *args, save_memory=c.gradient_checkpointing))


# ---- LoRA: a low-rank correction beside a frozen weight; `prepare.py merge` adds it to the weight --------------------
class LoRALinear(nn.Linear):  # y = W x + (alpha / rank) · B A dropout(x); B is zero at the start, so nothing changes
    def __init__(self, linear, config):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.scale, self.dropout = linear.weight, config.lora_alpha / config.lora_rank, config.lora_dropout
        A, B = torch.empty(config.lora_rank, self.in_features), torch.zeros(self.out_features, config.lora_rank)
        self.lora_A, self.lora_B = (nn.Parameter(x.to(self.weight.device)) for x in (A, B))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype) @ self.lora_A.T
        return F.linear(x, self.weight) + self.scale * (low @ self.lora_B.T).to(x.dtype)


# ---- Hawk ------------------------------------------------------------------------------------------------------------
@dataclass
class Encoding:  # of a batch of clips
    tokens: torch.Tensor  # soft tokens (B, 2·32, D), appearance first
    appearance_tight: torch.Tensor  # features (B, 32, tight_dim) for the consistency loss
    motion_tight: torch.Tensor


PAPER = r"(appearance|motion)\.(frame_position|video_q|proj_0|encoder_|decoder_2)"  # after the frozen frame Q-Former
# names of the parameters that learn in each mode; the released code forgets to freeze the motion queries
TRAINED = {"paper": PAPER, "released": rf"{PAPER}|motion\.queries", "lora": rf"{PAPER}|.*\.lora_[AB]", "all": ""}


class Hawk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.vit = config, ViT(config)
        self.appearance, self.motion = Branch(config), Branch(config)
        self.llama = Llama(config)
        self.apply(init_weights)
        if config.lora_rank:
            self.add_lora()

    static_cache = False  # generate's; for compiled steps, which want the same shapes each time
    device = property(lambda self: self.llama.lm_head.weight.device)

    def set_trainable(self, mode):
        """Chooses what learns: "paper" everything after the frame Q-Formers but LLaMA; "released" the motion branch's
        frame queries too; "lora" a LoRA too; "all" everything. What is frozen stays in eval mode (no dropout)."""
        if mode not in TRAINED:
            raise ValueError(f"train mode {mode!r}: choose {', '.join(TRAINED)}")
        if mode == "lora" and not any(isinstance(module, LoRALinear) for module in self.modules()):
            self.config.lora_rank = self.config.lora_rank or 8
            self.add_lora()
        for name, p in self.named_parameters():
            p.requires_grad_(re.match(TRAINED[mode], name) is not None)
        return self.train(self.training)

    def train(self, mode=True):
        for module in self.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self

    def add_lora(self):
        for attention in (block.self_attn for block in self.llama.layers):
            for target in self.config.lora_targets.split(","):
                setattr(attention, target, LoRALinear(getattr(attention, target), self.config))

    def frame_features(self, *streams):
        """Frames (B, T, 3, H, W) in [0, 1] of each branch -> list of (B, T, Q, C): the frozen part, which can be cached."""
        B, T = streams[0].shape[:2]
        images = torch.cat([s.flatten(0, 1) for s in streams]).to(self.vit.patch_embed.weight.dtype)  # (2·B·T, 3, H, W)
        features = zip(BRANCHES, self.vit(images).chunk(len(streams)), strict=True)
        return [getattr(self, name).frames(x).unflatten(0, (B, T)) for name, x in features]

    def encode(self, appearance, motion):
        """Frames (B, T, 3, H, W) in [0, 1], or their cached features (B, T, Q, C), of the two streams -> Encoding."""
        streams = self.frame_features(appearance, motion) if appearance.ndim == 5 else (appearance, motion)
        motion = streams[1] * (self.config.motion != "none")  # zeros then, also of cached features
        tokens, tight = zip(self.appearance.video(streams[0]), self.motion.video(motion), strict=True)
        return Encoding(torch.cat(tokens, dim=1), *tight)

    def embed(self, input_ids, soft):
        """Embeds ids (B, S), with the soft tokens (B, N, D) in the placeholder slots, in order: the one way in which
        vision enters the sentence. Raises ValueError when the slots of a row are not N."""
        slots = input_ids == self.config.image_id
        counts = slots.sum(1).tolist()
        if counts != [soft.shape[1]] * len(soft):
            raise ValueError(f"rows with {counts} placeholders, but {len(soft)} clips of {soft.shape[1]} soft tokens")
        x = self.llama.embed_tokens(input_ids.masked_fill(slots, 0))  # (B, S, D)
        return x.masked_scatter(slots[..., None], soft.to(x.dtype))

    def language_loss(self, input_ids, labels, soft, per_sample=False):
        """Mean cross-entropy of the next token over all tokens with a label (not -100), or, per_sample, over those of each
        row and then over the rows. Only their positions go through the head, whose output is the largest of all tensors."""
        hidden, target = self.llama(self.embed(input_ids, soft))[:, :-1], labels[:, 1:]
        kept = target != -100
        if not kept.any():
            raise ValueError("a batch without a single supervised token (all labels are -100)")
        loss = F.cross_entropy(self.llama.lm_head(hidden[kept]).float(), target[kept], reduction="none")
        weight = kept / kept.sum(1, keepdim=True) / len(kept) if per_sample else kept / kept.sum()
        return (loss * weight[kept]).sum()

    def consistency_loss(self, encoding):
        """Paper, Eq. 7: 1 − cos(tight appearance, tight motion), each flattened per sample, mean over the batch. The
        biases of the two encoder_1 alone can satisfy it; "debiased" compares the features without them."""
        a, m = encoding.appearance_tight, encoding.motion_tight
        if self.config.consistency == "debiased":
            a, m = a - self.appearance.encoder_1.bias, m - self.motion.encoder_1.bias
        return (1 - F.cosine_similarity(a.flatten(1).float(), m.flatten(1).float())).mean()

    def forward(self, appearance, motion, input_ids, labels, motion_input_ids=None, motion_labels=None,
                per_sample=False, encoding=None):  # fmt: skip
        """The losses of a batch of clips by name; total is their weighted sum (paper, Eq. 9). Without a motion target,
        motion_language is video_language again, as in the released stage 2. `encoding` saves encoding the clips again."""
        c, encoding = self.config, encoding or self.encode(appearance, motion)
        losses = {"video_language": self.language_loss(input_ids, labels, encoding.tokens, per_sample)}
        losses["motion_language"] = losses["video_language"]
        if motion_input_ids is not None:
            tokens = encoding.tokens[:, c.n_video_queries :]
            losses["motion_language"] = self.language_loss(motion_input_ids, motion_labels, tokens, per_sample)
        losses["consistency"] = self.consistency_loss(encoding)
        losses["total"] = sum(getattr(c, f"{name}_weight") * loss for name, loss in losses.items())
        return losses

    @torch.no_grad()
    def generate(self, appearance, motion, input_ids, max_new_tokens=128, temperature=0.0, top_p=1.0, beams=1,
                 repetition_penalty=1.0, seed=0, eos_id=2, encoding=None, on_token=None):  # fmt: skip
        """Continues each row of input_ids (a (B, S) tensor, or lists of unequal length) until `eos_id` (included) or
        max_new_tokens; returns lists of new ids. temperature 0 is greedy; `encoding` saves encoding a clip again;
        `on_token(list of B ids)` is called as tokens are made, and stops the generation by returning False."""
        if max_new_tokens < 1 or beams < 1 or not 0 < top_p <= 1 or (beams > 1 and temperature > 0):
            raise ValueError("needs max_new_tokens and beams of 1 or more, top_p in (0, 1], beams without temperature")
        encoding = encoding or self.encode(appearance, motion)
        ids, padding = left_pad(input_ids, self.device)
        x = self.embed(ids, encoding.tokens)
        if beams > 1:
            prompts = (x[b : b + 1, padding[b] :] for b in range(len(x)))
            return [self.beam_search(x, max_new_tokens, beams, repetition_penalty, eos_id) for x in prompts]
        cache = KVCache(self.config, len(x), x.shape[1] + max_new_tokens, x, padding, self.static_cache)
        generator = torch.Generator(self.device).manual_seed(seed)
        new, done = ids[:, :0], torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            logits = self.llama.lm_head(self.llama(x, cache)[:, -1]).float()  # (B, vocabulary)
            token = choose(penalise(logits, new, repetition_penalty), temperature, top_p, generator)
            new, done = torch.cat([new, token[:, None]], dim=1), done | (token == eos_id)
            if (on_token and on_token(token.tolist()) is False) or done.all():
                break
            x = self.llama.embed_tokens(token[:, None])
        return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in new.tolist()]

    def beam_search(self, x, max_new_tokens, beams, repetition_penalty, eos_id):
        """The `beams` best continuations of one prompt x (1, S, D), kept side by side; returns the best one by mean
        log-probability per token: a finished one, or at the limit perhaps the best of those still open."""
        cache = KVCache(self.config, beams, x.shape[1] + max_new_tokens, x)
        x, new, finished = x.expand(beams, -1, -1), torch.empty(beams, 0, dtype=torch.long, device=x.device), []
        score = torch.tensor([0.0] + [-torch.inf] * (beams - 1), device=x.device)  # equal at first: only one spreads
        for step in range(1, max_new_tokens + 1):
            logits = self.llama.lm_head(self.llama(x, cache)[:, -1]).float()
            total = score[:, None] + penalise(logits, new, repetition_penalty).log_softmax(-1)  # (beams, vocabulary)
            score, best = total.flatten().topk(2 * beams)  # enough to keep `beams` of them when as many have ended
            rows, token = best // logits.shape[1], best % logits.shape[1]
            for i in (token[:beams] == eos_id).nonzero()[:, 0].tolist():
                finished.append((score[i].item() / step, [*new[rows[i]].tolist(), eos_id]))
            score, rows, token = (x[token != eos_id][:beams] for x in (score, rows, token))
            new = torch.cat([new[rows], token[:, None]], dim=1)
            if len(finished) >= beams and sorted(finished)[-beams][0] >= score[0].item() / step:
                break
            cache.k, cache.v = ([x[rows] for x in held] for held in (cache.k, cache.v))  # row b continues row rows[b]
            x = self.llama.embed_tokens(token[:, None])
        return max([*finished, (score[0].item() / step, new[0].tolist())])[1]

    def save_pretrained(self, folder, dtype=None, tokenizer=None, base=None):
        """Writes config.json, model.safetensors and tokenizer.model (copied from the path `tokenizer`), or nothing. With
        `base`, the folder that training started from, only what trains is written, and config.json names the base."""
        if base is not None and Path(base).resolve() == Path(folder).resolve():
            raise ValueError(f"{folder}: is the base of these weights; save them to another folder")
        keep = {name for name, p in self.named_parameters() if base is None or p.requires_grad}
        tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in self.state_dict().items() if n in keep}
        config = asdict(self.config) | ({} if base is None else {"base": str(Path(base).resolve())})
        with replaced_folder(folder) as new:
            save_tensors(tensors, new / "model.safetensors")
            (new / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, new / "tokenizer.model")

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, config=None):
        """The model in a folder that save_pretrained or `prepare.py weights` wrote, in eval mode; built without memory
        and filled tensor by tensor; `config` replaces the folder's. Raises ValueError that names file and tensor."""
        stored, folders = read_chain(folder)
        with torch.device("meta"):
            model = cls(config or stored)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for file, name, tensor in (found for source in folders for found in read_tensors(source)):
            shape, expected = tuple(tensor.shape), shapes.get(name, "no tensor of that name")
            if shape != expected:
                raise ValueError(f"{file}: {name} has shape {shape}, the model expects {expected}")
            if str(tensor.dtype)[-7:-2] != "float" or not math.isfinite(sum(torch.aminmax(tensor))):
                raise ValueError(f"{file}: {name} ({tensor.dtype}) must be of floating point, without NaN and infinity")
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device, dtype)))
        if missing := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
        return model.eval()


def init_weights(module):
    """For training from nothing (the tiny preset): unit-variance layers, so that depth does not shrink the signal."""
    if type(module) in (nn.Linear, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    if isinstance(module, Branch | ViT):
        for p in module.parameters(recurse=False):  # queries, class token, positions
            nn.init.normal_(p, std=0.2)
    if isinstance(module, Branch):  # beside features of unit variance: when must not be drowned by what
        nn.init.normal_(module.frame_position.weight, std=0.5)
    if isinstance(module, QFormerLayer):  # queries that attend to each other at full strength soon are all the same
        module.self_attention.output.weight.data *= 0.1
    if isinstance(module, ViT):  # filters of zero mean: pixels are in [0, 1], and their mean would drown the rest
        module.patch_embed.weight.data -= module.patch_embed.weight.mean(dim=(1, 2, 3), keepdim=True)


def left_pad(rows, device):
    """Rows of ids of unequal length -> (B, S) with zeros in front, and the number of zeros of each row (B,)."""
    rows = [torch.as_tensor(row, device=device) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    return ids, torch.tensor([ids.shape[1] - len(row) for row in rows], device=device)


def penalise(logits, new, penalty):
    """Repetition penalty: divides the logits (B, vocabulary) of tokens in new (B, n) if positive, else multiplies."""
    return logits.scatter(1, new, torch.where((seen := logits.gather(1, new)) > 0, seen / penalty, seen * penalty))


def choose(logits, temperature, top_p, generator):
    """Next token (B,) of logits (B, vocabulary): the best, or a draw from the fewest whose probability reaches top_p."""
    if temperature < 1e-6:  # a division by less would overflow
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def read_chain(folder):
    """(HawkConfig, [folders]) of weights and what they are based on, the base first: a later folder's tensors replace an
    earlier one's (stage 2 continues stage 1, which continues the published model)."""
    configs, folders, base = [], [], Path(folder)
    while base is not None and base not in folders:
        folders, file = [base, *folders], base / "config.json"
        try:
            values = {**json.loads(file.read_text())}
            base = Path(values.pop("base")) if "base" in values else None
            configs.append(HawkConfig.from_dict(values))
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as e:
            raise ValueError(f"{file}: cannot be read as a model's config ({e})") from e
    return configs[0], folders


def save_tensors(tensors, file):
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)  # the library's own are for the owner only


def read_tensors(folder):
    """Yields (file, name, tensor) of a folder's safetensors, one tensor at a time from the mapped files."""
    for file in sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield file, name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{file}: cannot be read as safetensors ({e})") from e


@contextmanager
def replaced_folder(folder):
    """Yields an empty folder beside `folder` to write into, which takes its name when the block ends well."""
    folder, old = recover_folder(folder)
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException as e:  # also Ctrl-C: nothing half-written stays behind
        shutil.rmtree(new)
        if isinstance(e, SafetensorError | RuntimeError):  # what safetensors and torch raise where the disk is full
            raise OSError(f"{folder}: cannot be written ({str(e).splitlines()[0]})") from e
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder):
    """Undoes a replacement that was killed between its two renames; returns (folder, where the old one waits)."""
    old = (folder := Path(folder)).with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)
    return folder, old
