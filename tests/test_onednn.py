"""oneDNN's products (sample.py): the same numbers, only where they fit, and no memory for each length of a prompt."""

import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from data import Tokenizer
from hawk import Encoding, Hawk, HawkConfig
from sample import OneDNNLinear, quantize_int8, use_onednn

SMALL = dict(vit_dim=32, vit_depth=1, vit_heads=2, vit_mlp=32, qformer_dim=32, qformer_layers=1, qformer_heads=2)
LLAMA = dict(qformer_mlp=32, llama_dim=512, llama_layers=2, llama_heads=4, llama_mlp=1024, vocab_size=320)
usable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
pytestmark = pytest.mark.skipif(not usable, reason="no oneDNN in this torch, or none for this processor")


@pytest.fixture
def rows(monkeypatch):
    """The numbers of rows that oneDNN was called with."""
    met, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, *others: met.append(len(x)) or product(x, *others)
    )
    return met


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=2), bias=st.booleans(), turned=st.booleans())
def test_the_product_is_the_same(shape, bias, turned):
    torch.manual_seed(0)
    layer = OneDNNLinear(96, 64, bias=bias)
    x = torch.randn(*shape, 96)
    x = x.transpose(0, -2) if turned else x
    wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), wanted.detach(), rtol=1e-5, atol=1e-5)


def test_only_large_layers_of_float32_take_it(rows):
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA)).eval()
    others = [copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), quantize_int8(copy.deepcopy(model))]
    made = [name for name, m in use_onednn(model).named_modules() if type(m) is OneDNNLinear]
    assert made == [f"llama.layers.{i}.mlp.{m}_proj" for i in range(2) for m in ("gate", "up", "down")]
    for other in others[1:]:
        kinds = {type(m) for m in use_onednn(other).llama.modules()}
        assert OneDNNLinear not in kinds
    x = torch.randn(2, 9, 512)
    with torch.no_grad():
        torch.testing.assert_close(model.llama(x), others[0].llama(x), rtol=1e-4, atol=1e-5)
    assert rows == [32] * 6
    assert model.state_dict().keys() == others[0].state_dict().keys()


def test_gradients_and_mixed_types_are_left_to_torch(rows):
    torch.manual_seed(0)
    layer, x = OneDNNLinear(64, 32), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, -1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert rows == []


def test_lengths_of_prompts_do_not_pile_up(rows):
    layer = OneDNNLinear(64, 32)
    with torch.no_grad():
        for n in range(1, 200):
            assert layer(torch.zeros(1, n, 64)).shape == (1, n, 32)
    assert set(rows) == {*range(1, 17), *range(32, 209, 16)}


def test_loaded_models_use_it_and_say_the_same(world, tmp_path, rows):
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA | {"vocab_size": Tokenizer(world / "tokenizer.model").vocab_size})).eval()
    model.save_pretrained(tmp_path / "weights", tokenizer=world / "tokenizer.model")
    loaded, _ = sample.load(tmp_path / "weights", "cpu")
    c = model.config
    ids = torch.cat([torch.full((2, c.n_visual), c.image_id), torch.randint(3, 300, (2, 9))], dim=1)
    encoding = Encoding(torch.randn(2, c.n_visual, c.llama_dim), None, None)
    answers = [m.generate(None, None, ids, 8, eos_id=-1, encoding=encoding) for m in (model, loaded)]
    assert answers[0] == answers[1]
    assert rows == [160] * 6 + [2] * 6 * 7  # 2 rows of 64 + 9 tokens, 146 in all; then a word for each
