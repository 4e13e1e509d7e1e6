"""Draws the curves of training runs: reads the log.jsonl that train.py writes, one object a step.

    python -m apps.curves runs/stage1 runs/stage2 --out curves.png      # needs matplotlib
    python -m apps.curves runs/tiny/stage1 runs/tiny/stage2 --cosines --out cosines.png
    python -m apps.curves runs/stage1 --tensorboard runs/board          # needs tensorboard

It may be called at any time, also while a run is going on.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from apps import run_program
from data import replace_file

NO_LOSSES = {"step", "lr", "grad_norm", "skipped", "samples_per_s", "memory_mb", "bias_cosine"}
COSINES = {  # curves of the consistency loss and of what it acts on (apps.towers logs the second)
    "consistency": "compared features",
    "consistency_debiased": "the same without the biases of encoder_1",
    "bias_cosine": "the biases of encoder_1",
}


def read_curves(run):
    """{name: [(step, number), …]} of a run's folder. Raises ValueError or OSError that names the file."""
    file = Path(run) / "log.jsonl"
    if not file.exists():
        raise ValueError(f"{file}: there is no log; give the folder that train.py wrote, its --out")
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
    """One picture: the losses on a logarithmic scale on the left, the learning rate on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="tight")
    losses, rate = figure.subplots(1, 2)
    for run, curves in runs.items():
        prefix = f"{run}: " if len(runs) > 1 else ""
        for name in sorted(curves.keys() - NO_LOSSES):
            width = 1.5 if name.startswith("held_out") else 0.8
            losses.plot(*zip(*curves[name], strict=True), label=prefix + name.replace("_", " "), lw=width)
        if "lr" in curves:
            rate.plot(*zip(*curves["lr"], strict=True))
    losses.set(yscale="log", xlabel="step", title="losses")
    losses.legend(fontsize=8)
    rate.set(xlabel="step", title="learning rate")
    save(figure, out)


def save(figure, out):
    """Writes a picture, of the kind that the ending of `out` says."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(out).suffix[1:] or "png", dpi=110)
    replace_file(out, content.getvalue())


def draw_cosines(runs, out):
    """The cosines between the two compared branches, over the runs one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="tight")
    axis = figure.subplots()
    for name, label in COSINES.items():
        steps = []
        values = []
        before = 0
        for run, curves in runs.items():
            if name not in curves:
                raise ValueError(f"{run}: logs no {name}; stages 1 and 2 of apps.towers facts do")
            steps += [before + step for step, _ in curves[name]]
            values += [value if name == "bias_cosine" else 1 - value for _, value in curves[name]]
            before += curves[name][-1][0]
            axis.axvline(before, color="0.8", lw=0.8)
        axis.plot(steps, values, label=label, lw=1)
    axis.set(xlabel="step", title="cosine between the appearance and the motion branch", ylim=(-1.05, 1.05))
    axis.legend(fontsize=8)
    save(figure, out)


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
    p.add_argument(
        "--cosines", action="store_true", help="draw what the consistency loss does, not the losses"
    )
    p.add_argument("--tensorboard", metavar="DIR", help="folder to write TensorBoard's files to")
    args = p.parse_args(argv)
    if not args.out and not args.tensorboard:
        p.error("give --out FILE, --tensorboard DIR, or both")
    try:
        runs = {run: read_curves(run) for run in args.runs}
        if args.out:
            import matplotlib

            with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign is a dollar sign
                (draw_cosines if args.cosines else draw)(runs, args.out)
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
