"""Draws the curves of training runs: reads the log.jsonl that train.py writes, one object a step.

    python -m apps.curves runs/stage1 runs/stage2 --out curves.png      # needs matplotlib
    python -m apps.curves runs/stage1 --tensorboard runs/board          # needs tensorboard

It may be called at any time, also while a run is going on.
"""

import argparse
import json
import sys
from pathlib import Path

from apps import run_program

NO_LOSSES = {"step", "lr", "grad_norm", "skipped", "samples_per_s", "memory_mb", "bias_cosine"}
# what the consistency loss does: the cosine of both branches' features, with and (apps.towers logs it) without
# the biases of encoder_1, and that of the biases themselves
COSINES = {"consistency": "features", "consistency_debiased": "without biases", "bias_cosine": "biases"}


def read_curves(run):
    """{name: [(step, number), …]} of a run's folder. Raises ValueError or OSError that names the file."""
    file = Path(run) / "log.jsonl"
    lines = file.read_text().split("\n")[:-1]  # the last line of a run that is going on may be cut short
    curves = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not a step of train.py ({error})") from None
        for name, value in line.items():
            if type(value) in (int, float) and name != "step":
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise ValueError(f"{file}: no step yet")
    return curves


def draw(runs, out):
    """One picture: the losses on a logarithmic scale, the cosines of both branches' features where a run has
    them, the learning rate."""
    from matplotlib.figure import Figure

    compared = any("bias_cosine" in curves for curves in runs.values())
    figure = Figure(figsize=(15 if compared else 11, 4), layout="tight")
    losses, *cosines, rate = figure.subplots(1, 2 + compared)
    for run, curves in runs.items():
        prefix = f"{run}: " if len(runs) > 1 else ""
        for name in sorted(curves.keys() - NO_LOSSES):
            width = 1.5 if name.startswith("held_out") else 0.8
            losses.plot(*zip(*curves[name], strict=True), label=prefix + name.replace("_", " "), lw=width)
        for name in COSINES if compared else ():
            steps, values = zip(*curves.get(name, [(0, float("nan"))]), strict=True)
            values = values if name == "bias_cosine" else [1 - value for value in values]
            cosines[0].plot(steps, values, label=prefix + COSINES[name], lw=1)
        rate.plot(*zip(*curves["lr"], strict=True), label=run)
    losses.set(yscale="log", xlabel="step", title="losses")
    losses.legend(fontsize=8)
    for axis in cosines:
        axis.set(xlabel="step", title="cosine between the branches", ylim=(-1.05, 1.05))
        axis.legend(fontsize=8)
    rate.set(xlabel="step", title="learning rate")
    figure.savefig(out, dpi=110)


def write_tensorboard(runs, folder):
    """Every number of the logs as a scalar, each run in a folder of its own."""
    from torch.utils.tensorboard import SummaryWriter

    for run, curves in runs.items():
        with SummaryWriter(Path(folder) / run.strip("/").replace("/", "-")) as board:
            for name, points in curves.items():
                for step, value in points:
                    board.add_scalar(name, value, step)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote (its --out)")
    p.add_argument("--out", help="picture to draw (.png, .svg or .pdf)")
    p.add_argument("--tensorboard", metavar="DIR", help="folder to write TensorBoard's files to")
    args = p.parse_args(argv)
    if not args.out and not args.tensorboard:
        p.error("give --out FILE, --tensorboard DIR, or both")
    try:
        runs = {run: read_curves(run) for run in args.runs}
        if args.out:
            draw(runs, args.out)
        if args.tensorboard:
            write_tensorboard(runs, args.tensorboard)
    except ImportError as error:
        print(f"error: {error}; install it with pip", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
