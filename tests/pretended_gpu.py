"""A GPU for machines that have none: tensors that say they are on `cuda:0` and are computed on the CPU.

    with pretended_gpu() as device:
        model.to(device)

An operation on tensors of both devices raises, as on a real GPU; so does reading such a tensor with numpy. A
CUDA graph is a list of the operations that were run while it was recorded: a replay runs them again on the
same tensors, and a value that the CPU wants to see meanwhile raises. Only a real GPU shows its kernels, its
speed, its memory, and autocast.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
recording = []  # the graph that is being recorded, if any


class GPUTensor(torch.Tensor):
    """For torch's own code it is on the device "meta", which each build of torch has."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"GPUTensor({self.inner})"

    def tolist(self):
        refuse_while_recording("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def refuse_while_recording(name):
    if recording:
        raise RuntimeError(f"{name}: not permitted while a CUDA graph is recorded")


def compute(function, args, kwargs):
    """Runs one operation on the CPU; its result is on the GPU if its tensors are, or if it asks for that
    device."""
    name = str(function)
    device = kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, GPUTensor) for x in tensors)
    elsewhere = [
        tuple(x.shape) for x in tensors if not isinstance(x, GPUTensor) and x.ndim
    ]  # numbers may be there
    indexed = name.startswith(("aten.index.", "aten.index_put")) and isinstance(
        args[0], GPUTensor
    )  # by a CPU tensor
    if there and elsewhere and not indexed and not name.startswith("aten.copy_."):
        raise RuntimeError(f"{name}: tensors of shapes {elsewhere} are on the CPU, others on {GPU}")
    if device is not None:
        was_there = there
        there = torch.device(device).type in ("cuda", "meta")
        if tensors and there != was_there:
            refuse_while_recording(name)
        kwargs = kwargs | {"device": torch.device("cpu")}
    if name == "aten._local_scalar_dense.default":
        refuse_while_recording(name)
    result = run_on_cpu(function, args, kwargs)
    if name.split(".")[1].rstrip("_") + "_" == name.split(".")[1]:  # in place
        out = args[0]
    else:
        wrapped = tree_map(lambda x: GPUTensor(x) if there and isinstance(x, torch.Tensor) else x, result)
        out = kwargs.get("out", wrapped)
    if recording:
        recording[-1].operations.append((function, args, kwargs, out))
    return out


def run_on_cpu(function, args, kwargs):
    with _disable_current_modes():
        return function(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))


def on_cpu(x):
    return x.inner if isinstance(x, GPUTensor) else x


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []  # (function, args, kwargs, what it returned)

    def replay(self):
        for function, args, kwargs, out in self.operations:
            result = run_on_cpu(function, args, kwargs)
            for old, new in zip(tree_leaves(tree_map(on_cpu, out)), tree_leaves(result), strict=True):
                if (
                    isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr()
                ):  # neither a view nor in place
                    with _disable_current_modes():
                        old.copy_(new)


@contextmanager
def record(graph):
    """Stands in for torch.cuda.graph."""
    recording.append(graph)
    try:
        yield
    finally:
        recording.pop()


class Stream:
    """Stands in for torch.cuda.Stream, the current one, and the context that makes one current."""

    def __init__(self, stream=None):
        pass

    def wait_stream(self, other):
        pass

    def record_event(self):
        return Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Event:
    """Stands in for torch.cuda.Event: all that is asked for is done at once."""

    def synchronize(self):
        refuse_while_recording("synchronize")


class Dispatch(TorchDispatchMode):  # for operations that make tensors from nothing
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:  # would ask the driver for the current device
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
    present |= dict(set_device=lambda _: None)
    present |= dict(max_memory_allocated=lambda *_: 0, synchronize=lambda *_: None)
    present |= dict(reset_peak_memory_stats=lambda *_: None, empty_cache=lambda: None)
    present |= dict(Stream=Stream, current_stream=Stream, stream=Stream, CUDAGraph=Graph, graph=record)
    present |= dict(device=Stream)  # a context, too
    present |= dict(is_current_stream_capturing=lambda: False)  # AdamW asks
    with (
        patch.multiple(torch.cuda, **present),
        patch.object(torch, "Generator", Generator),
        patch("sample.triton", None),
        Functions(),
        Dispatch(),
    ):
        yield GPU
