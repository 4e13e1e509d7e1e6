"""The Hawk model: a video-language model that sees a clip twice, as it is and with everything still blacked out.

    frames ─┐           ┌ appearance: Q-Former → + frame position → video Q-Former → projection → 32 soft tokens ┐
            ├─ one ViT ─┤                                                                                        ├ LLaMA → words
    motion ─┘           └ motion:     Q-Former → + frame position → video Q-Former → projection → 32 soft tokens ┘

From leaf to whole: attention, ViT, Q-Former, Branch (one class, built twice), LLaMA, LoRA, Hawk, files. Unlike the
released code it keeps one ViT for both branches instead of two equal ones, and reads only its own format from disk
(`prepare.py weights` turns the released files into it).

    model = Hawk.from_pretrained("weights/tiny")
    soft = model.encode(appearance, motion)             # (B, T, 3, H, W) each, in [0, 1]  ->  .tokens (B, 64, D)
    ids = model.generate(appearance, motion, input_ids)

Letters: B batch, T frames, S sequence length, Q queries, C width of ViT or Q-Former, D width of LLaMA, h heads.
"""

import json
import math
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

# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the defaults are the published 7B model


@dataclass
class HawkConfig:
    """Every size of the model, flat. `HawkConfig()` is the published model; `preset("tiny")` the one trained here."""

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
    motion: str = "hard"  # the motion mask the weights were trained on; "soft" is the paper's Eq. 4
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: str = "q_proj,v_proj"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.consistency not in ("cosine", "debiased") or self.motion not in ("hard", "soft"):
            raise ValueError(f"consistency {self.consistency!r}, motion {self.motion!r}: cosine|debiased, hard|soft")
        for name, value in asdict(self).items():
            if type(value) is int and value < (0 if name == "lora_rank" else 1):
                raise ValueError(f"{name} is {value}")
        for dim, heads in (("vit_dim", "vit_heads"), ("qformer_dim", "qformer_heads"), ("llama_dim", "llama_heads")):
            if getattr(self, dim) % getattr(self, heads):
                raise ValueError(f"{dim} {getattr(self, dim)} does not divide into {heads} {getattr(self, heads)}")

    @property
    def image_id(self):
        """Token id of the placeholder that soft tokens replace."""
        return self.vocab_size

    @property
    def n_visual(self):
        """Soft tokens that a clip becomes, appearance first."""
        return len(BRANCHES) * self.n_video_queries

    @classmethod
    def preset(cls, name):
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, values, source="config"):
        """Refuses unknown keys and changed types: a typo must not silently become a default."""
        types = {f.name: f.type for f in fields(cls)}
        values = {k: float(v) if types.get(k) is float and type(v) is int else v for k, v in values.items()}
        wrong = [k for k, v in values.items() if type(v) is not types.get(k)]
        if wrong:
            key, kind = wrong[0], types.get(wrong[0])
            problem = f"{key} must be {kind.__name__}, not {values[key]!r}" if kind else f"unknown key {key!r}"
            raise ValueError(f"{source}: {problem}")
        return cls(**values)


BRANCHES = ("appearance", "motion")  # the streams, in the order of their soft tokens

PRESETS = {
    "7b": {},
    "tiny": dict(
        n_frames=16, image_size=112, patch_size=14, vit_dim=128, vit_depth=4, vit_heads=4, vit_mlp=512,
        qformer_dim=128, qformer_layers=2, qformer_heads=4, qformer_mlp=512, cross_every=1, n_queries=16, tight_dim=32,
        llama_dim=192, llama_layers=4, llama_heads=6, llama_mlp=512, vocab_size=1024, dropout=0.0,
    ),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Leaves: norms and attention


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whatever the dtype of its input and weights."""

    def forward(self, x):
        x32, weight, bias = x.float(), self.weight.float(), self.bias.float()
        return F.layer_norm(x32, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 (LLaMA's norm)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


def attend(q, k, v, heads, dropout=0.0):
    """softmax(q kᵀ / √d) v over `heads` heads, no mask. q (B, Sq, C), k and v (B, Sk, C) -> (B, Sq, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, S, C/h)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def run(layers, x, *args, save_memory=False):
    """x through the layers; `save_memory` recomputes each layer in the backward pass instead of storing it."""
    for layer in layers:
        if save_memory and torch.is_grad_enabled():
            x = checkpoint(layer, x, *args, use_reentrant=False)
        else:
            x = layer(x, *args)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# ViT: EVA-CLIP-g, as in BLIP-2


class ViTAttention(nn.Module):
    """qkv is one weight; queries and values have a bias, keys have none (a bias on keys would cancel in the softmax)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(config.vit_dim, eps=1e-6), LayerNorm(config.vit_dim, eps=1e-6)
        self.attn = ViTAttention(config.vit_dim, config.vit_heads)
        self.mlp = MLP(config.vit_dim, config.vit_mlp)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images to features of their patches. Equals `VisionTransformer.forward_features` of the released eva_vit.py:
    no mean/std normalisation of the pixels before it and no norm after its last block."""

    def __init__(self, config):
        super().__init__()
        self.save_memory = config.gradient_checkpointing
        n_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, config.vit_dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.vit_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, n_patches + 1, config.vit_dim))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.vit_depth))

    def forward(self, images):
        """images (N, 3, H, W) in [0, 1] -> (N, 1 + patches, C)"""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (N, patches, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        return run(self.blocks, x, save_memory=self.save_memory)


# ----------------------------------------------------------------------------------------------------------------------
# Q-Former: a BERT whose input is learned queries that look at an image (or at a clip) through cross-attention


class QFormerAttention(nn.Module):
    """BERT attention, post-norm: norm(x + output(attention(x, context))). Self-attention when context is x."""

    def __init__(self, dim, heads, context_dim, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(context_dim, dim), nn.Linear(context_dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=1e-12)

    def forward(self, x, context):
        p = self.dropout if self.training else 0.0
        y = attend(self.query(x), self.key(context), self.value(context), self.heads, dropout=p)
        return self.norm(x + F.dropout(self.output(y), p))


class QFormerMLP(MLP):
    def __init__(self, dim, hidden, dropout):
        super().__init__(dim, hidden)
        self.norm, self.dropout = LayerNorm(dim, eps=1e-12), dropout

    def forward(self, x):
        return self.norm(x + F.dropout(super().forward(x), self.dropout, self.training))


class QFormerLayer(nn.Module):
    def __init__(self, config, context_dim, crosses):
        super().__init__()
        dim, heads, dropout = config.qformer_dim, config.qformer_heads, config.dropout
        self.self_attention = QFormerAttention(dim, heads, dim, dropout)
        self.cross_attention = QFormerAttention(dim, heads, context_dim, dropout) if crosses else None
        self.mlp = QFormerMLP(dim, config.qformer_mlp, dropout)

    def forward(self, x, context):
        x = self.self_attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context)
        return self.mlp(x)


class QFormer(nn.Module):
    """Learned queries (1, Q, C) read a context (B, S, context_dim) and become (B, Q, C). Equals the released
    `Qformer.bert(query_embeds=…, encoder_hidden_states=…)` with its unused text half left out."""

    def __init__(self, config, layers, context_dim, cross_every):
        super().__init__()
        self.dropout, self.save_memory = config.dropout, config.gradient_checkpointing
        self.norm = LayerNorm(config.qformer_dim, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(config, context_dim, i % cross_every == 0) for i in range(layers))

    def forward(self, queries, context):
        x = F.dropout(self.norm(queries), self.dropout, self.training).expand(len(context), -1, -1)
        return run(self.layers, x, context, save_memory=self.save_memory)


# ----------------------------------------------------------------------------------------------------------------------
# Branch: from ViT features of T frames to 32 soft tokens. Built twice: appearance and motion


class Branch(nn.Module):
    """Paper, Sec. 3.2: f = P(E(X)), with the same architecture and separate weights for appearance and for motion."""

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
        self.proj_0 = nn.Linear(dim, D)
        self.encoder_0 = nn.Linear(D, D)
        self.encoder_1 = nn.Linear(D, config.tight_dim)
        self.decoder_2 = nn.Linear(D, D)

    def trained_parts(self):
        """The modules and parameters after the frozen part (what `--train paper` trains)."""
        linear = [self.proj_0, self.encoder_0, self.encoder_1, self.decoder_2]
        return [self.frame_position, self.video_queries, self.video_qformer, *linear]

    def frames(self, features):
        """Each frame on its own: ViT features (N, 1 + patches, vit_dim) -> (N, Q, C). Frozen, so it can be cached."""
        return self.qformer(self.queries, self.ln_vision(features))

    def video(self, frames):
        """All frames together: (B, T, Q, C) -> soft tokens (B, 32, D) and tight features (B, 32, tight_dim)."""
        B, T, _, _ = frames.shape
        if T > self.frame_position.num_embeddings:
            raise ValueError(f"a clip of {T} frames; this model has positions for {self.frame_position.num_embeddings}")
        position = self.frame_position(torch.arange(T, device=frames.device))  # (T, C)
        x = (frames + position[None, :, None]).flatten(1, 2)  # (B, T·Q, C)
        x = self.video_qformer(self.video_queries, x)  # (B, 32, C)
        x = self.encoder_0(self.proj_0(x))  # (B, 32, D); no activation anywhere in this chain
        return self.decoder_2(x), self.encoder_1(x)


# ----------------------------------------------------------------------------------------------------------------------
# LLaMA-2


def rotary_tables(positions, head_dim, theta):
    """cos and sin (…, S, head_dim) in float32 for positions (…, S); the halves repeat (the Hugging Face layout)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin()


def rotate(x, cos, sin):
    """Rotary position: turns the pairs (x_i, x_{i + d/2}) by their angle. x (B, h, S, d)."""
    x32 = x.float()
    a, b = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer for `size` positions, allocated once. `length` positions are filled; the first
    `padding[b]` of row b are left padding, which is never attended to."""

    def __init__(self, config, batch, size, like, padding=None):
        shape = (config.llama_layers, batch, config.llama_heads, size, config.llama_dim // config.llama_heads)
        self.k, self.v, self.length = like.new_empty(shape), like.new_empty(shape), 0
        self.padding = padding if padding is not None and padding.any() else None

    def write(self, layer, k, v):
        """Stores k, v (B, h, S, d) behind what is there; returns all keys and values so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end], self.v[layer, :, :, self.length : end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def positions(self, S):
        position = torch.arange(self.length, self.length + S, device=self.k.device)
        return position if self.padding is None else (position - self.padding[:, None]).clamp_min(0)[:, None]  # (B,1,S)

    def mask(self, S):
        """None where a plain causal mask (or, for one token, no mask) says the same; else (B or 1, 1, S, length + S)."""
        if self.padding is None and (S == 1 or self.length == 0):
            return None
        query = torch.arange(self.length, self.length + S, device=self.k.device)[:, None]
        key = torch.arange(self.length + S, device=self.k.device)
        mask = (key <= query)[None, None]
        if self.padding is not None:  # a padding token sees itself, or its softmax would be 0 / 0
            mask = mask & ((key >= self.padding[:, None, None, None]) | (key == query))
        return mask

    def reorder(self, rows):
        """Beam search: row b continues what row rows[b] has said."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class LlamaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, self.heads, self.layer = config.llama_dim, config.llama_heads, layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, h, S, d)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.llama_dim, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.llama_dim, config.norm_eps)
        self.mlp = LlamaMLP(config.llama_dim, config.llama_mlp)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """LLaMA-2 over embeddings: equals transformers' `LlamaForCausalLM` (names too), head not tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.llama_dim)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.llama_layers))
        self.norm = RMSNorm(config.llama_dim, config.norm_eps)
        self.lm_head = nn.Linear(config.llama_dim, config.vocab_size, bias=False)

    def forward(self, x, cache=None):
        """Embeddings (B, S, D) -> hidden states (B, S, D) before the head. With a cache, x continues what is in it."""
        c, S = self.config, x.shape[1]
        positions = torch.arange(S, device=x.device) if cache is None else cache.positions(S)
        mask = None if cache is None else cache.mask(S)
        cos, sin = rotary_tables(positions, c.llama_dim // c.llama_heads, c.rope_theta)
        x = run(self.layers, x, cos, sin, mask, cache, save_memory=c.gradient_checkpointing and cache is None)
        if cache is not None:
            cache.length += S
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: a low-rank correction beside a frozen weight


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) · B A dropout(x). A is random and B zero, so that nothing changes at the start."""

    def __init__(self, linear, config):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.scale, self.dropout = linear.weight, config.lora_alpha / config.lora_rank, config.lora_dropout
        A, B = torch.empty(config.lora_rank, self.in_features), torch.zeros(self.out_features, config.lora_rank)
        self.lora_A, self.lora_B = (nn.Parameter(x.to(linear.weight.device)) for x in (A, B))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype) @ self.lora_A.T
        return F.linear(x, self.weight) + self.scale * (low @ self.lora_B.T).to(x.dtype)

    def merged(self):
        """An ordinary Linear with the correction added to its weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        return linear


# ----------------------------------------------------------------------------------------------------------------------
# Hawk


@dataclass
class Encoding:
    """What the two branches make of a batch of clips: soft tokens (B, 2·32, D), appearance first, and the tight
    features (B, 32, tight_dim) that the consistency loss compares."""

    tokens: torch.Tensor
    appearance_tight: torch.Tensor
    motion_tight: torch.Tensor


class Hawk(nn.Module):
    """ViT, two branches and LLaMA."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.appearance = Branch(config)
        self.motion = Branch(config)
        self.llama = Llama(config)
        self.apply(init_weights)
        if config.lora_rank:
            self.add_lora()

    @property
    def device(self):
        return self.llama.lm_head.weight.device

    def set_trainable(self, mode):
        """Chooses what learns: "paper" everything after the frame Q-Formers but LLaMA; "released" the motion branch's
        frame queries too; "lora" a LoRA too; "all" everything. What is frozen stays in eval mode (no dropout)."""
        if mode not in ("released", "paper", "lora", "all"):
            raise ValueError(f"train mode {mode!r}: choose released, paper, lora or all")
        if mode == "lora" and not any(isinstance(m, LoRALinear) for m in self.modules()):
            self.config.lora_rank = self.config.lora_rank or 8
            self.add_lora()
        self.requires_grad_(mode == "all")
        for name in BRANCHES:
            for part in getattr(self, name).trained_parts():
                part.requires_grad_(True)
        if mode == "released":  # the released code means to freeze these queries and forgets to
            self.motion.queries.requires_grad_(True)
        if mode == "lora":
            for name, p in self.named_parameters():
                p.requires_grad_(p.requires_grad or "lora_" in name)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if mode and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def add_lora(self):
        c = self.config
        for block in self.llama.layers:
            for target in c.lora_targets.split(","):
                linear = getattr(block.self_attn, target)
                setattr(block.self_attn, target, LoRALinear(linear, c))

    def merge_lora(self):
        """Adds every LoRA correction to its weight and removes it; the output stays the same."""
        for block in self.llama.layers:
            for name, module in list(block.self_attn.named_children()):
                if isinstance(module, LoRALinear):
                    setattr(block.self_attn, name, module.merged())
        self.config.lora_rank = 0
        return self

    def frame_features(self, *streams):
        """Frames (B, T, 3, H, W) in [0, 1], one tensor per branch -> a list of (B, T, Q, C). The frozen part: what
        `prepare.py features` caches. All streams go through the ViT as one batch."""
        B, T = streams[0].shape[:2]
        images = torch.cat([s.flatten(0, 1) for s in streams]).to(self.vit.patch_embed.weight.dtype)  # (2·B·T, 3, H, W)
        features = self.vit(images).chunk(len(streams))
        branches = (getattr(self, name) for name in BRANCHES)
        return [b.frames(f).unflatten(0, (B, T)) for b, f in zip(branches, features, strict=True)]

    def encode(self, appearance, motion):
        """Clips -> Encoding. appearance, motion: frames (B, T, 3, H, W) in [0, 1], or cached features (B, T, Q, C)."""
        streams = [appearance, motion]
        if appearance.ndim == 5:
            streams = self.frame_features(*streams)
        dtype = self.appearance.proj_0.weight.dtype
        seen = [getattr(self, name).video(x.to(dtype)) for name, x in zip(BRANCHES, streams, strict=True)]
        return Encoding(torch.cat([tokens for tokens, _ in seen], dim=1), *(tight for _, tight in seen))

    def embed(self, input_ids, soft):
        """Embeds ids (B, S) and puts the soft tokens (B, N, D) into the placeholder slots, in order: the one way in
        which vision enters the sentence. Raises ValueError when the slots of a row are not N."""
        slots = input_ids == self.config.image_id
        counts = slots.sum(1).tolist()
        if counts != [soft.shape[1]] * len(soft):
            raise ValueError(
                f"rows with {counts} placeholders, but {len(soft)} clips of {soft.shape[1]} soft tokens"
            )
        x = self.llama.embed_tokens(input_ids.masked_fill(slots, 0))  # (B, S, D)
        return x.masked_scatter(slots[..., None], soft.to(x.dtype))

    def language_loss(self, input_ids, labels, soft, per_sample=False):
        """Mean cross-entropy of the next token over all tokens with a label (not -100), or, per_sample, over the tokens
        of each row and then over the rows: what training at one clip a process computes. The head sees only those
        positions: at 32,000 words its output is the largest tensor of a training step."""
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

    @torch.no_grad()
    def bias_cosine(self):
        """Cosine of the two encoder_1 biases: near 1 when they alone satisfy the consistency loss."""
        return F.cosine_similarity(self.appearance.encoder_1.bias, self.motion.encoder_1.bias, dim=0).item()

    def forward(
        self, appearance, motion, input_ids, labels, motion_input_ids=None, motion_labels=None, per_sample=False
    ):
        """The losses of a batch, by name (paper, Eq. 9: total is their weighted sum). Without a motion target,
        motion_language is video_language again, as in the released stage 2."""
        texts = (input_ids, labels, motion_input_ids, motion_labels)
        return self.losses(self.encode(appearance, motion), *texts, per_sample=per_sample)

    def losses(self, encoding, input_ids, labels, motion_input_ids=None, motion_labels=None, per_sample=False):
        """What `forward` returns, for clips that are encoded already."""
        c = self.config
        losses = {"video_language": self.language_loss(input_ids, labels, encoding.tokens, per_sample)}
        losses["motion_language"] = losses["video_language"]
        if motion_input_ids is not None:
            motion_tokens = encoding.tokens[:, c.n_video_queries :]
            losses["motion_language"] = self.language_loss(motion_input_ids, motion_labels, motion_tokens, per_sample)
        losses["consistency"] = self.consistency_loss(encoding)
        losses["total"] = sum(getattr(c, f"{name}_weight") * loss for name, loss in losses.items())
        return losses

    @torch.no_grad()
    def generate(
        self, appearance, motion, input_ids, max_new_tokens=128, temperature=0.0, top_p=1.0, beams=1,
        repetition_penalty=1.0, seed=0, eos_id=2, encoding=None, on_token=None,
    ):  # fmt: skip
        """Continues each row of input_ids (a (B, S) tensor, or lists of unequal length) until `eos_id` (included) or
        max_new_tokens; returns lists of new ids. temperature 0 is greedy; `encoding` saves encoding a clip again;
        `on_token(list of B ids)` is called as tokens are made, and stops the generation by returning False."""
        if max_new_tokens < 1 or beams < 1 or not 0 < top_p <= 1 or (beams > 1 and temperature > 0):
            raise ValueError(
                "needs max_new_tokens and beams of 1 or more, top_p in (0, 1], and beams without temperature"
            )
        encoding = encoding or self.encode(appearance, motion)
        ids, padding = left_pad(input_ids, self.device)
        x = self.embed(ids, encoding.tokens)
        if beams > 1:
            prompts = (x[b : b + 1, padding[b] :] for b in range(len(x)))
            return [self.beam_search(x, max_new_tokens, beams, repetition_penalty, eos_id) for x in prompts]
        cache = KVCache(self.config, len(x), x.shape[1] + max_new_tokens, x, padding)
        generator = torch.Generator(self.device).manual_seed(seed)
        new, done = ids[:, :0], torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            logits = self.llama.lm_head(self.llama(x, cache)[:, -1]).float()  # (B, vocabulary)
            token = choose(penalise(logits, new, repetition_penalty), temperature, top_p, generator)
            new, done = torch.cat([new, token[:, None]], dim=1), done | (token == eos_id)
            if (on_token and on_token(token.tolist()) is False) or done.all():
                break
            x = self.llama.embed_tokens(token[:, None])
        return [cut(row, eos_id) for row in new.tolist()]

    @torch.no_grad()
    def generate_naive(self, appearance, motion, input_ids, max_new_tokens=128, eos_id=2):
        """Greedy without a cache, the whole sequence again for every token: the reference that tests compare with."""
        x, new = self.embed(input_ids, self.encode(appearance, motion).tokens), []
        for _ in range(max_new_tokens):
            new.append(self.llama.lm_head(self.llama(x)[:, -1]).argmax(-1))
            x = torch.cat([x, self.llama.embed_tokens(new[-1])[:, None]], dim=1)
        return [cut(row, eos_id) for row in torch.stack(new, dim=1).tolist()]

    def beam_search(self, x, max_new_tokens, beams, repetition_penalty, eos_id):
        """The `beams` best continuations of one prompt x (1, S, D), kept side by side; returns the best one by mean
        log-probability per token: a finished one, or at the limit perhaps the best of those still open."""
        cache = KVCache(self.config, beams, x.shape[1] + max_new_tokens, x)
        x, new = x.expand(beams, -1, -1), torch.empty(beams, 0, dtype=torch.long, device=x.device)
        score = torch.full((beams,), -torch.inf, device=x.device)
        score[0] = 0.0  # all beams start equal: let only one of them spread in the first step
        finished = []
        for step in range(1, max_new_tokens + 1):
            logits = self.llama.lm_head(self.llama(x, cache)[:, -1]).float()
            total = score[:, None] + penalise(logits, new, repetition_penalty).log_softmax(-1)  # (beams, vocabulary)
            score, best = total.flatten().topk(2 * beams)  # enough to keep `beams` of them when as many have ended
            rows, token = best // logits.shape[1], best % logits.shape[1]
            for i in (token[:beams] == eos_id).nonzero()[:, 0].tolist():
                finished.append((score[i].item() / step, [*new[rows[i]].tolist(), eos_id]))
            alive = (token != eos_id).nonzero()[:beams, 0]
            score, rows, token = score[alive], rows[alive], token[alive]
            new = torch.cat([new[rows], token[:, None]], dim=1)
            if len(finished) >= beams and sorted(finished)[-beams][0] >= score[0].item() / step:
                break
            cache.reorder(rows)
            x = self.llama.embed_tokens(token[:, None])
        finished.append((score[0].item() / new.shape[1], new[0].tolist()))
        return max(finished)[1]

    def save_pretrained(self, folder, dtype=None, tokenizer=None, base=None):
        """Writes config.json, model.safetensors and tokenizer.model (copied from the path `tokenizer`). With `base`
        (the folder of the weights that training started from), only tensors that train are written, and the base is
        named in config.json. The folder appears whole or not at all."""
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
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The model in a folder that save_pretrained or `prepare.py weights` wrote, in eval mode. Built without memory
        and filled tensor by tensor from the mapped files. Raises ValueError that names the file and the tensor."""
        config, folders = read_chain(folder)
        with torch.device("meta"):
            model = cls(config)
        missing = set(dict(model.named_parameters()))
        for source in folders:
            missing -= load_folder(model, source, device, dtype)
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {min(missing)}")
        return model.eval()


def init_weights(module):
    """For training from nothing (the tiny preset): unit-variance layers, so that depth does not shrink the signal."""
    if module.__class__ in (nn.Linear, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    elif isinstance(module, Branch | ViT):
        for p in module.parameters(recurse=False):  # queries, class token, positions
            nn.init.normal_(p, std=0.2)
        if isinstance(module, Branch):  # beside features of unit variance: when must not be drowned by what
            nn.init.normal_(module.frame_position.weight, std=0.5)
    if isinstance(module, QFormerLayer):  # queries that attend to each other at full strength soon are all the same
        module.self_attention.output.weight.data *= 0.1
    if isinstance(module, ViT):  # filters of zero mean: pixels are in [0, 1], and their mean would drown the rest
        weight = module.patch_embed.weight
        weight.data -= weight.mean(dim=(1, 2, 3), keepdim=True)


def left_pad(rows, device):
    """Rows of ids of unequal length -> (B, S) with zeros in front, and the number of zeros of each row (B,)."""
    rows = [torch.as_tensor(row, device=device) for row in rows]
    S = max(len(row) for row in rows)
    padding = torch.tensor([S - len(row) for row in rows], device=device)
    return torch.stack([F.pad(row, (S - len(row), 0)) for row in rows]), padding


def cut(row, eos_id):
    """A row of ids up to its end token, that included."""
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def penalise(logits, new, penalty):
    """Repetition penalty: the logits (B, vocabulary) of tokens already generated, new (B, n), divided by it if positive,
    else multiplied."""
    if penalty == 1.0 or not new.shape[1]:
        return logits
    seen = logits.gather(1, new)
    return logits.scatter(1, new, torch.where(seen > 0, seen / penalty, seen * penalty))


def choose(logits, temperature, top_p, generator):
    """The next token of each row: the best one at temperature 0, else a draw from the smallest set of tokens whose
    probability reaches top_p. logits (B, vocabulary) -> (B,)"""
    if temperature <= 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def read_config(folder):
    """(HawkConfig, folder of the base or None) of a folder's config.json."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        base = values.pop("base", None)
        return HawkConfig.from_dict(values), None if base is None else Path(base)
    except (OSError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read as a model's config ({e})") from e


def read_chain(folder):
    """(HawkConfig, [folders]) of weights and what they are based on, the base first: a later folder's tensors replace an
    earlier one's (stage 2 continues stage 1, which continues the published model)."""
    folders = [Path(folder)]
    config, base = read_config(folders[0])
    while base is not None and base not in folders:
        folders.insert(0, base)
        base = read_config(base)[1]
    return config, folders


def save_tensors(tensors, file):
    """Writes a safetensors file that whoever may read its folder may read (the library's own are for the owner only)."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)


def load_folder(model, folder, device, dtype):
    """Assigns every tensor of the folder's safetensors to the parameter of that name; returns the names it filled."""
    wanted, filled = dict(model.named_parameters()), set()
    for file in sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    tensor = tensors.get_tensor(name)
                    if name not in wanted or tensor.shape != wanted[name].shape:
                        expected = tuple(wanted[name].shape) if name in wanted else "no tensor of that name"
                        raise ValueError(
                            f"{file}: {name} has shape {tuple(tensor.shape)}, the model expects {expected}"
                        )
                    module, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device, dtype)))
                    filled.add(name)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{file}: cannot be read as safetensors ({e})") from e
    return filled


@contextmanager
def replaced_folder(folder):
    """Yields an empty folder beside `folder` to write into, which takes its name when the block ends well."""
    folder = Path(folder)
    recover_folder(folder)
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:  # also Ctrl-C: nothing half-written stays behind
        shutil.rmtree(new)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder):
    """Undoes a replacement that was killed between its two renames."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
