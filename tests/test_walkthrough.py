"""docs/WALKTHROUGH.md: every block, pasted in order into one session, prints what stands below it."""

import code
import importlib
import math
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import sample
from apps import look

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/WALKTHROUGH.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d*)?")


def same(found, expected):
    """Whether two texts are the same but for the last digits of their fractions and for spaces."""
    if "".join(NUMBER.sub("#", found).split()) != "".join(NUMBER.sub("#", expected).split()):
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.011) if "." in a + b else a == b
        for a, b in pairs
    )


@pytest.fixture
def session(monkeypatch):
    """A Python session in the repository's folder. What it sets for all of torch is reset afterwards."""
    monkeypatch.chdir(ROOT)
    yield code.InteractiveConsole({"__name__": "__console__"})
    torch.set_grad_enabled(True)
    torch.set_printoptions(profile="default")


def test_every_block_prints_what_stands_below_it(session, capsys):
    assert len(BLOCKS) == TEXT.count("```python")  # each has its output
    for block, expected in BLOCKS:
        for line in block.split("\n"):  # as if typed: a result that nobody asked for would be printed
            session.push(line)
        out, err = capsys.readouterr()
        assert all(line.startswith("note:") for line in err.splitlines()), f"{block}\n{err}"
        assert same(out, expected), f"{block}\n{out}"


@pytest.mark.parametrize(
    "found, expected, equal",
    [
        ("loss 1.234", "loss 1.24", True),
        ("[ 1., 20.]", "[1.,  20.]", True),
        ("loss 1.234", "loss 1.30", False),
        ("(1, 111)", "(1, 110)", False),
        ("loss 1.234", "cost 1.234", False),
        ("True", "False", False),
        ("a 1", "a 1 2", False),
        ("0.5", "-0.5", False),
    ],
)
def test_comparison(found, expected, equal):
    assert same(found, expected) == equal


def test_functions_named_are_there():
    places = re.findall(r"`(\w+(?:/\w+)?)\.py:([\w.]+)`", TEXT)
    assert len(places) >= 15
    for file, function in places:
        module = importlib.import_module(file.replace("/", "."))
        assert callable(attrgetter(function)(module)), (file, function)


def test_pictures_are_there_and_small():
    pictures = sorted((ROOT / "docs/pictures").glob("*.png"))
    shown = re.findall(r"\]\(pictures/([\w-]+\.png)\)", TEXT)
    assert set(shown) <= {picture.name for picture in pictures} and len(shown) >= 5
    sizes = [picture.stat().st_size for picture in pictures]
    assert max(sizes) < 150_000 and sum(sizes) < 600_000


def test_the_trace_is_todays(monkeypatch):
    monkeypatch.chdir(ROOT)
    model, tokenizer = sample.load("weights/tiny", "cpu")
    trace = look.Trace()
    trace.steps = look.look_at(model, tokenizer, "examples/speeding.mp4").steps
    assert trace.table() in (ROOT / "docs/pictures/trace.md").read_text()
