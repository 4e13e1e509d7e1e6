"""LLaMA's weights in int8 (sample.py): near the model they come from, half as large, and in use."""

import copy
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn as nn
from conftest import in_int8

import sample
from hawk import Encoding, Hawk, HawkConfig

SMALL = dict(
    vit_dim=32, vit_depth=1, vit_heads=2, vit_mlp=32, qformer_dim=32, qformer_layers=1, qformer_heads=2
)
LLAMA = dict(qformer_mlp=32, llama_dim=256, llama_layers=2, llama_heads=4, llama_mlp=512, vocab_size=300)


def tensor_bytes(module):
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("rows", [3, 50])  # few rows: torch's int8 kernel; many: the weights as floats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [96, 100])  # that kernel is wrong in bfloat16 unless K is a multiple of 16
def test_each_weight_is_within_half_a_step(rows, dtype, K):
    torch.manual_seed(0)
    linear = nn.Linear(K, 64, bias=False, dtype=dtype)
    linear.weight.data[3] = 0  # a row without a largest weight to scale by
    rounded = sample.RowLinear(linear, int8=True)
    step = rounded.scale.float()[:, None]
    restored = rounded.weight.float() * step
    error = (restored - linear.weight.float()).abs()
    assert (error <= 0.51 * step).all() and error.max() > 0
    x = torch.randn(rows, 2, K).to(dtype)[:, 1:]  # not contiguous, like the last tokens of a batch of prompts
    with mock.patch("torch._weight_int8pack_mm", wraps=torch._weight_int8pack_mm) as kernel:
        y = rounded(x)
    assert kernel.called == (rows == 3 and K == 96)
    assert all(call.args[0].is_contiguous() for call in kernel.call_args_list)  # torch 2.6 refuses others
    assert y.dtype == dtype and y.shape == (rows, 1, 64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.float(), x.float() @ restored.T, rtol=tolerance, atol=tolerance)


def test_logits_memory_and_generation():
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA)).eval()
    c = model.config
    rounded = in_int8(copy.deepcopy(model))
    x = torch.randn(2, 20, c.llama_dim)
    with torch.no_grad():
        logits = model.llama.lm_head(model.llama(x))
        near = rounded.llama.lm_head(rounded.llama(x))
    assert 0 < (near - logits).norm() / logits.norm() < 0.02

    embeddings = tensor_bytes(model.llama.embed_tokens)  # stay as they are
    half = tensor_bytes(copy.deepcopy(model).to(torch.bfloat16).llama) - embeddings // 2
    quarter = tensor_bytes(copy.deepcopy(rounded).to(torch.bfloat16).llama) - embeddings // 2
    assert quarter < 0.51 * half

    tokens = torch.randn(1, c.n_visual, c.llama_dim)
    ids = torch.cat([torch.full((1, c.n_visual), c.image_id), torch.randint(3, 300, (1, 9))], dim=1)
    naive = []
    with (
        torch.no_grad()
    ):  # without a cache the products have many rows, so that the other arithmetic makes them
        embedded = rounded.embed(ids, tokens)
        for _ in range(12):
            token = rounded.llama.lm_head(rounded.llama(embedded)[:, -1]).argmax(-1)
            naive.append(token.item())
            embedded = torch.cat([embedded, rounded.llama.embed_tokens(token[:, None])], dim=1)
    assert rounded.generate(Encoding(tokens, {}), ids, 12, eos_id=-1) == [naive]


def test_option_and_lora(world, tmp_path, capsys):
    command = ["--weights", str(world / "weights"), "--video", str(world / "a b.mp4")]
    assert sample.main([*command, "--max-new-tokens", "5", "--json", "--int8", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    model, _ = sample.load(world / "weights", "cpu", int8=True)
    q_proj = model.llama.layers[0].self_attn.q_proj
    assert isinstance(q_proj, sample.RowLinear) and q_proj.weight.dtype == torch.int8
    Hawk(HawkConfig(**SMALL, **LLAMA, lora_rank=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge"):
        sample.load(tmp_path, "cpu", int8=True)


def test_the_triton_kernel_multiplies_as_the_plain_product():
    """In Triton's interpreter, which needs no GPU and must be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton is for Linux on x86_64")
    code = """
import torch, sample
torch.manual_seed(0)
for N, K in ((8, 1024), (6, 1500), (3, 7), (64, 2100)):
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        linear = torch.nn.Linear(K, N, bias=False).to(dtype)
        for int8 in (True, False):
            row = sample.RowLinear(linear, int8)
            x = torch.randn(1, K).to(dtype)
            y = torch.full((1, N), torch.nan, dtype=dtype)
            grid = (-(-N // 8),)
            sample.row_product[grid](x, row.weight, row.scale, y, N, K, ROWS=8, BLOCK=1024)
            expected = x.double() @ row.weight.double().T * (row.scale.double() if int8 else 1)
            assert (y - expected).norm() < near * expected.norm(), (N, K, dtype, int8)
row = sample.RowLinear(torch.nn.Linear(256, 4, bias=False), int8=True)  # every byte there is
row.weight[0] = torch.arange(-128, 128)
x = torch.eye(256)
for k in range(256):
    y = torch.empty(1, 4)
    sample.row_product[(1,)](x[k : k + 1], row.weight, torch.ones(4), y, 4, 256, ROWS=4, BLOCK=1024)
    assert y[0, 0] == k - 128, k
print("done")
"""
    path = os.path.dirname(sample.__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([path, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_the_threads_of_the_triton_kernel_do_not_wait_for_each_other(monkeypatch, tmp_path):
    """Compiled for an H100, it needs barriers for the sums at the end only. A thread that loads 16 numbers of
    int8 at a time, but 8 of x, would need the rest of them from other threads, in each round."""
    triton = pytest.importorskip(
        "triton", "3.3", reason="Triton is for Linux on x86_64, and this for 3.3 or newer"
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as ever; else it warns
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    names = sample.row_product.arg_names
    pointers = {"x": "*bf16", "weight": "*bf16", "scale": "constexpr", "y": "*bf16", "N": "i32", "K": "i32"}

    def barriers(**changes):
        types = pointers | {"ROWS": "constexpr", "BLOCK": "constexpr"} | changes
        values = {"ROWS": 8, "BLOCK": 1024} | ({} if changes else {"scale": None})
        values = {(names.index(name),): value for name, value in values.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i in range(len(names)) if types[names[i]] != "constexpr"
        }
        source = triton.compiler.ASTSource(sample.row_product, types, values, aligned)
        return triton.compile(source, target=target).asm["ptx"].count("bar.sync")

    assert barriers(weight="*i8", scale="*bf16") == barriers() > 0
