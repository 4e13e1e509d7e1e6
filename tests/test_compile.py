"""`--compile` (sample.py): the same words, one graph for all steps, and a line where it cannot be had."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sample
from hawk import Encoding, Hawk, HawkConfig
from sample import OneDNNLinear, compile_decoding, quantize_int8

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as it compiles
SMALL = dict(vit_dim=32, vit_depth=1, vit_heads=2, vit_mlp=32, qformer_dim=32, qformer_layers=1, qformer_heads=2)
LLAMA = dict(qformer_mlp=32, llama_dim=64, llama_layers=2, llama_heads=4, llama_mlp=128, vocab_size=300)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by a compiler that only runs them; a graph that changes from step to step fails."""
    found, real = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    def compile(function, options, **others):
        return real(function, backend=backend, **others)

    monkeypatch.setattr(torch, "compile", compile)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.reset()
        yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("int8", [False, True])
def test_the_same_words_from_one_graph(graphs, monkeypatch, int8):
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA)).eval()
    if int8:
        monkeypatch.setattr(sample, "has_kernel", lambda device: False)  # what is compiled is its own kernel
        quantize_int8(model)
    c = model.config
    encodings = [Encoding(torch.randn(2, c.n_visual, c.llama_dim), None, None) for _ in range(3)]
    ids = [[c.image_id] * c.n_visual + torch.randint(3, 300, (n,)).tolist() for n in (9, 5)]  # one is padded

    def answers():
        return [model.generate(None, None, ids, 12, eos_id=-1, encoding=encoding) for encoding in encodings]

    expected = answers()
    assert compile_decoding(model) is model
    assert answers() == expected and expected[0] != expected[1]
    assert len(graphs) == 1

    def others():  # as long answers and chats have; the page answers in a thread of its own
        for doubled in range(9):
            few, new = iter([True, True, False]), 128 << doubled
            model.generate(None, None, ids, new, encoding=encodings[0], on_token=lambda _, few=few: next(few))

    with torch._dynamo.config.patch(error_on_recompile=False), ThreadPoolExecutor(1) as pool:
        pool.submit(others).result()
    assert len(graphs) == 10


def test_the_real_compiler(world, capsys):
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, none is here")
    command = ["--weights", str(world / "weights"), "--video", str(world / "a b.mp4"), "--json", "--device", "cpu"]
    command += ["--max-new-tokens", "5"]
    answers = []
    for more in ([], ["--compile"]):
        assert sample.main([*command, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_what_it_refuses(world, monkeypatch, capsys):
    command = ["--weights", str(world / "weights"), "--video", str(world / "a b.mp4"), "--device", "cpu", "--compile"]
    assert sample.main([*command, "--beams", "2"]) == 2
    assert capsys.readouterr().err == "error: --beams and --compile exclude each other\n"

    def broken(graph, inputs):
        raise RuntimeError("no compiler is here\nand more")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **others: real(function, backend=broken, **others))
    assert sample.main([*command, "--max-new-tokens", "3"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "--compile: torch.compile failed" in error[0] and "no compiler is here" in error[0]


def test_products_of_onednn_can_be_compiled():
    layer, x = OneDNNLinear(1024, 512), torch.rand(2, 3, 1024)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, layer(x))
