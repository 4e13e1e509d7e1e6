"""A GPU for machines that have none: tensors that say they are on `cuda:0` and are computed on the CPU.

    with pretended_gpu() as device:
        model.to(device)

An operation on tensors of both devices raises, as on a real GPU; so does reading such a tensor with numpy. What only a
real one shows: its kernels, its speed, its memory, autocast.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")


class GPUTensor(torch.Tensor):
    """For torch's own code it is on the device "meta", which each build of torch has."""

    device, is_cuda, is_meta = (property(lambda self, x=x: x) for x in (GPU, True, False))
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"GPUTensor({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    name, device = str(function), kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, GPUTensor) for x in tensors)
    elsewhere = [tuple(x.shape) for x in tensors if not isinstance(x, GPUTensor) and x.ndim]  # a number may be there
    indexed = name.startswith(("aten.index.", "aten.index_put")) and isinstance(args[0], GPUTensor)  # by a CPU tensor
    if there and elsewhere and not indexed and not name.startswith("aten.copy_."):
        raise RuntimeError(f"{name}: tensors of shapes {elsewhere} are on the CPU, others on {GPU}")
    if device is not None:
        there, kwargs = torch.device(device).type in ("cuda", "meta"), kwargs | {"device": torch.device("cpu")}
    with _disable_current_modes():
        out = function(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    if name.split(".")[1].rstrip("_") + "_" == name.split(".")[1]:  # in place
        return args[0]
    return kwargs.get("out", tree_map(lambda x: GPUTensor(x) if there and isinstance(x, torch.Tensor) else x, out))


def on_cpu(x):
    return x.inner if isinstance(x, GPUTensor) else x


class Dispatch(TorchDispatchMode):  # for what makes tensors from nothing
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:  # which would ask the driver for the current one
            args = [GPU if isinstance(x, str | torch.device) and str(x) == "cuda" else x for x in args]
        kwargs = dict(kwargs or {})
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "meta":  # asked for by name: not ours
            with _disable_current_modes():
                return function(*args, **kwargs)
        # these copy lists to the device behind the dispatcher's back
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device"):
            return function(*args, **kwargs | {"device": None}).to(device)
        return function(*args, **kwargs)


class Generator(torch.Generator):  # draws on the CPU, so that the draws can be compared
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@contextmanager
def pretended_gpu():
    present = dict(is_available=lambda: True, device_count=lambda: 1, _lazy_init=lambda: None)
    present |= dict(max_memory_allocated=lambda *_: 0, synchronize=lambda *_: None)
    with patch.multiple(torch.cuda, **present), patch.object(torch, "Generator", Generator), Functions(), Dispatch():
        yield GPU
