"""docs/PUBLISHED.md: the programs' own parsers take every command of the card, and its numbers add up."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import train
from apps import download
from hawk import Hawk, HawkConfig

ROOT = Path(__file__).parents[2]
CARD = (ROOT / "docs/PUBLISHED.md").read_text()
BLOCKS = re.findall(r"^```(?:bash)?\n(.*?)^```", CARD, re.DOTALL | re.MULTILINE)


def commands(blocks):
    """The commands in blocks of shell, as lists of words; variables stand for "2"."""
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\w+", "2", line), comments=True)
            if words and "=$(" not in line:
                yield words


class Parsed(Exception):
    """Raised in place of what a program would do once its command line is parsed."""


def stop_after_parsing(monkeypatch):
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, args=None, namespace=None, original=original):
            raise Parsed(vars(original(self, args, namespace)))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)


def parse(words, monkeypatch):
    """(program, options as its parser reads them). SystemExit if it refuses the command."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        return parse(["python", args.training_script, *args.training_script_args], monkeypatch)
    assert words[0] == "python", f"{words[0]} is no program that this test knows"
    if words[1] == "-m":
        name = words[2]
        options = words[3:]
    else:
        name = words[1].removesuffix(".py")
        options = words[2:]
    program = importlib.import_module(name)
    if name == "train":
        return name, vars(train.parse_args(options, train.HawkTask()))
    if hasattr(program, "parse_args"):
        return name, vars(program.parse_args(options))
    with monkeypatch.context() as patched:
        stop_after_parsing(patched)
        with pytest.raises(Parsed) as found:
            program.main(options)
    return name, found.value.args[0]


def test_every_command_can_be_parsed(monkeypatch):
    found = [parse(words, monkeypatch) for words in commands(BLOCKS)]
    names = [name for name, _ in found]
    first = ["apps.download", "prepare", "sample", "prepare", "train"]
    assert names[:5] == first and len(list(commands(BLOCKS[:1]))) == 5  # "in five commands"
    assert {"apps.evaluate", "apps.curves"} <= set(names) and names.count("train") == 4


def test_each_command_uses_what_an_earlier_one_made(monkeypatch):
    """Folders of weights, caches and runs are written before they are read."""
    made = set()
    for name, args in (parse(words, monkeypatch) for words in commands(BLOCKS)):
        for key in ("weights", "features"):
            if args.get(key) and name in ("train", "sample", "prepare", "apps.evaluate"):
                assert str(args[key]).removesuffix("/last") in made, (name, args[key])
        if name in ("prepare", "train"):
            made.add(str(args["out"]))


def test_batches_can_be_shared_by_the_processes(monkeypatch):
    """--batch-size is a multiple of the processes; variables stand for 2, as --nodes=2 in the script."""
    assert "#SBATCH --nodes=2" in CARD
    counts = []
    for words in commands(BLOCKS):
        if "torchrun" in words:
            launch = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
            nodes = 1 if launch.standalone else int(launch.nnodes)
            processes = nodes * int(launch.nproc_per_node)
            counts.append(processes)
            assert parse(words, monkeypatch)[1]["batch_size"] % processes == 0
    assert counts == [4, 4, 8]


def test_options_in_the_text_exist(monkeypatch, capsys):
    """Each --option that is named between the commands is one of a program on the card, or of torchrun."""
    known = get_args_parser().format_help()
    jobs = [["prepare", job] for job in ("weights", "features", "merge", "hawk")]
    apps = [[f"apps.{name}"] for name in ("download", "index", "evaluate", "timeline")]
    for command in (*jobs, *apps, ["sample"], ["train"]):
        with pytest.raises(SystemExit):
            importlib.import_module(command[0]).main([*command[1:], "--help"])
        known += capsys.readouterr().out
    text = re.sub(r"^#SBATCH.*", "", CARD, flags=re.MULTILINE)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert len(options) > 20
    unknown = {option for option in options if not re.search(rf"{option}(?![\w-])", known)}
    assert unknown == {"--only"} and '"--only"' in (ROOT / "tests/bench.py").read_text()  # of bench.py


def cell(row, column=1):
    """A cell of the first table row that contains these words."""
    line = next(line for line in CARD.splitlines() if line.startswith("|") and row in line)
    return line.split("|")[column + 1].strip()


def test_sizes_are_those_of_the_model_and_of_download():
    known = {name: size for files in download.KNOWN.values() for name, size in files.items()}
    known |= download.KNOWN["llama"]
    for file in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"):
        assert float(cell(f"`{file}`")) == round(known[file] / 1e9, 2)
    assert float(cell("hawk/finetune.pth")) == round(known["finetune.pth"] / 1e9, 2)
    assert float(cell("`Llama-2-7b-chat-hf`")) == round(known["model-*.safetensors"] / 1e9, 2)
    names = ["llama", "vit", "qformer", "hawk"]
    total = sum(size for name in names for size in download.KNOWN[name].values())
    assert float(cell("| together |")) == round(total / 1e9, 1)

    with torch.device("meta"):
        model = Hawk(HawkConfig.preset("7b"))
    towers = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("llama."))
    assert cell("`prepare.py features`").startswith(f"{4 * towers / 1e9:.1f} in float32")
    model.set_trainable("lora")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{4 * trained / 1e9:.2f} GB of trained tensors" in " ".join(CARD.split())
    assert f"`last/` takes {12 * trained / 1e9:.1f} GB" in " ".join(CARD.split())
    clip = 2 * 32 * 32 * 768 * 2
    assert f"{clip / 1e6:.1f} MB a clip" in " ".join(CARD.split())


def test_memory_is_that_of_the_page_on_performance():
    """The computed table is quoted, not repeated from memory."""
    page = (ROOT / "docs/PERFORMANCE.md").read_text()
    for mode in ("paper", "lora"):
        together = re.findall(rf"^\| `{mode}`.*\| ([\d.]+) \|$", page, re.MULTILINE)
        quoted = re.findall(r"[\d.]+", cell(f"`--train {mode}` from the cache"))
        assert quoted[:2] == together
    for figure in ("16.6 GB", "9.99 GB", "458 TFLOP/s"):
        assert figure in page and figure.split()[0] in CARD
    for row, rate in (
        ("`--train paper` from the cache |", "29.6 samples/s"),
        ("`--train lora`, with it", "12.7 samples/s"),
    ):
        assert rate in page and cell(row) == f"{4 / float(rate.split()[0]):.2f}"
