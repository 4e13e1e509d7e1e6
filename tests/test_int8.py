"""LLaMA's weights in int8 (sample.py): near the model they come from, half as large, and in use."""

import copy
import json

import pytest
import torch
import torch.nn as nn

import sample
from hawk import Encoding, Hawk, HawkConfig
from sample import Int8Linear, quantize_int8

SMALL = dict(vit_dim=32, vit_depth=1, vit_heads=2, vit_mlp=32, qformer_dim=32, qformer_layers=1, qformer_heads=2)
LLAMA = dict(qformer_mlp=32, llama_dim=256, llama_layers=2, llama_heads=4, llama_mlp=512, vocab_size=300)


def tensor_bytes(module):
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("rows", [1, 50])  # torch's kernel, and floats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_within_half_a_step(rows, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=False, dtype=dtype)
    linear.weight.data[3] = 0
    rounded = Int8Linear(linear)
    restored = rounded.weight.float() * rounded.scale.float()[:, None]
    error = (restored - linear.weight.float()).abs()
    assert (error <= 0.51 * rounded.scale.float()[:, None]).all() and error.max() > 0
    x = torch.randn(rows, 1, 96).to(dtype)
    y = rounded(x)
    assert y.dtype == dtype and y.shape == (rows, 1, 64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.float(), x.float() @ restored.T, rtol=tolerance, atol=tolerance)


def test_logits_memory_and_generation(monkeypatch):
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA)).eval()
    rounded = quantize_int8(copy.deepcopy(model))
    c = model.config
    x = torch.randn(2, 20, c.llama_dim)
    with torch.no_grad():
        logits, near = (m.llama.lm_head(m.llama(x)) for m in (model, rounded))
    assert 0 < (near - logits).norm() / logits.norm() < 0.02
    embeddings = tensor_bytes(model.llama.embed_tokens)
    halves = [tensor_bytes(m.to(torch.bfloat16).llama) - embeddings // 2 for m in (copy.deepcopy(model), rounded)]
    assert halves[1] < 0.51 * halves[0]
    rounded = quantize_int8(model)
    ids = torch.cat([torch.full((1, c.n_visual), c.image_id), torch.randint(3, 300, (1, 9))], dim=1)
    encoding = Encoding(torch.randn(1, c.n_visual, c.llama_dim), None, None)
    answers = []
    for kernel in (True, False):
        monkeypatch.setattr(sample, "has_kernel", lambda device, kernel=kernel: kernel)
        answers.append(rounded.generate(None, None, ids, 12, eos_id=-1, encoding=encoding))
    assert answers[0] == answers[1] and len(answers[0][0]) == 12


def test_option_and_lora(world, capsys):
    command = [
        "--weights",
        str(world / "weights"),
        "--video",
        str(world / "a b.mp4"),
        "--max-new-tokens",
        "5",
        "--json",
    ]
    assert sample.main([*command, "--int8", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    model, _ = sample.load(world / "weights", "cpu", int8=True)
    assert isinstance(model.llama.layers[0].self_attn.q_proj, Int8Linear)
    with pytest.raises(ValueError, match="merge"):
        quantize_int8(Hawk(HawkConfig(**SMALL, **LLAMA, lora_rank=2)))
