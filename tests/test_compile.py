"""The compiled decoding step (model.compile_step, --compile): the same words, one graph for all steps, clear
errors."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import in_int8

import sample
from hawk import Encoding, Hawk, HawkConfig
from train import init_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning"
)  # torch's own, as it compiles
SMALL = dict(
    vit_dim=32, vit_depth=1, vit_heads=2, vit_mlp=32, qformer_dim=32, qformer_layers=1, qformer_heads=2
)
LLAMA = dict(qformer_mlp=32, llama_dim=64, llama_layers=2, llama_heads=4, llama_mlp=128, vocab_size=300)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by a compiler that runs them as they are."""
    found = []
    real = torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    def compile(function, options=None, **others):
        return real(function, backend=backend, **others)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("int8", [False, True])
def test_the_same_words_from_one_graph(graphs, int8):
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**SMALL, **LLAMA)).apply(init_weights).eval()
    if int8:
        in_int8(model)
    c = model.config
    encodings = [Encoding(torch.randn(2, c.n_visual, c.llama_dim), {}) for _ in range(3)]
    prompts = [
        [c.image_id] * c.n_visual + torch.randint(3, 300, (n,)).tolist() for n in (9, 5)
    ]  # one is padded

    def answers():
        return [model.generate(encoding, prompts, 12, eos_id=-1) for encoding in encodings]

    expected = answers()
    model.compile_step = True
    model.steps.clear()
    assert answers() == expected and expected[0] != expected[1]
    assert len(graphs) == 1  # layers, steps, prompts and clips share it

    def others():  # they serve all sizes of the cache, also in the web page's thread
        for extra in range(1, 11):
            few = iter([True, True, False])
            model.generate(encodings[0], prompts, 12 + 256 * extra, on_token=lambda _, few=few: next(few))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(others).result()
    assert len(graphs) == 1


def test_the_real_compiler(world, capsys):
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, none is here")
    command = [
        "--weights",
        str(world / "weights"),
        "--video",
        str(world / "a b.mp4"),
        "--json",
        "--device",
        "cpu",
    ]
    answers = []
    for more in ([], ["--compile"]):
        assert sample.main([*command, "--max-new-tokens", "5", *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_what_it_refuses(world, monkeypatch, capsys):
    command = [
        "--weights",
        str(world / "weights"),
        "--video",
        str(world / "a b.mp4"),
        "--device",
        "cpu",
        "--compile",
    ]
    with pytest.raises(SystemExit, match="2"):
        sample.main([*command, "--beams", "2"])
    assert "--beams excludes --temperature, --repetition-penalty and --compile" in capsys.readouterr().err

    def broken(graph, inputs):
        raise RuntimeError("no compiler is here\nand more")

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **others: real(function, backend=broken, **others)
    )
    assert sample.main([*command, "--max-new-tokens", "3"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "--compile failed" in error[0]
    assert "no compiler is here" in error[0]


def test_the_c_compiler_that_triton_calls_fails(world, monkeypatch, capsys):
    def fails(*_):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    monkeypatch.setattr(sample.RowLinear, "forward", fails)
    command = ["--weights", str(world / "weights"), "--device", "cpu", "--int8", str(world / "a b.mp4")]
    assert sample.main(command) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    reason = "Command '['gcc', 'main.c']' returned non-zero exit status 1."
    assert error == [f"error: --int8 or --compile failed: {reason}"]
