"""LLaMA's weights in int8: about half the memory of bfloat16, for inference only.

    python sample.py --video examples/falling.mp4 --int8
    python -m apps.evaluate --annotations data/toy/test.jsonl --out predictions.jsonl --int8

Each row of a weight matrix becomes whole numbers of -127…127 and one scale: W ≈ scale · int8, wrong by half a step of the
row's largest weight / 127 at most. Activations, embeddings, norms and what makes the soft tokens stay as they are.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

FEW_ROWS = 8  # so many rows at once, as in decoding, wait for the weights to be read; more wait for the arithmetic


class Int8Linear(nn.Module):
    """Stands in for an nn.Linear without bias: (…, in) -> (…, out) in the dtype of the input."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).to(linear.weight.dtype)  # rounded before it is used
        weight = (weight / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if len(rows) <= FEW_ROWS and has_kernel(x.device.type):
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def has_kernel(device_type):
    """Whether torch multiplies with int8 weights as they are there; otherwise they are turned into floats each time."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", device_type.upper())


def quantize_int8(model):
    """Replaces all linear layers of a Hawk's LLaMA, one after the other; returns the model. With LoRA it raises
    ValueError: a correction beside rounded weights is not what was trained."""
    if model.config.lora_rank:
        raise ValueError("these weights hold a LoRA, merge it before --int8: python prepare.py merge")
    for module in list(model.llama.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def tensor_bytes(module):
    """Bytes of all weights."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
