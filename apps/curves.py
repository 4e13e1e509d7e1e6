"""Draws the curves of training runs from the log.jsonl that train.py writes, one object per step.

    python -m apps.curves runs/stage1 runs/stage2 --out curves.png      # needs matplotlib
    python -m apps.curves runs/tiny/stage1 runs/tiny/stage2 --cosines --out cosines.png
    python -m apps.curves runs/stage1 --tensorboard runs/board          # needs tensorboard

It can be used at any time, even during a run.
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
    lines = file.read_text(errors="replace").split("\n")
    lines.pop()  # the last line of a run in progress may be cut short
    curves = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: not a step of train.py ({error})") from None
        for name, value in line.items():
            if type(value) in (int, float) and name != "step":
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise ValueError(f"{file}: no step yet")
    return curves


def draw(runs, out):
    """One picture: the losses on a logarithmic scale on the left, the learning rate on the right.

    A loss has the same colour in every run, and a run the same style of line; held-out losses are thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    losses, rate = figure.subplots(1, 2, width_ratios=(3, 2))
    names = {name.removeprefix("held_out_") for curves in runs.values() for name in curves.keys() - NO_LOSSES}
    colours = {name: f"C{k % 10}" for k, name in enumerate(sorted(names))}
    for k, (run, curves) in enumerate(runs.items()):
        prefix = f"{run}: " if len(runs) > 1 else ""
        style = ("-", "--", ":", "-.")[k % 4]
        for name in sorted(curves.keys() - NO_LOSSES):
            held_out = name.startswith("held_out_")
            look = {
                "color": colours[name.removeprefix("held_out_")],
                "ls": style,
                "lw": 2.5 if held_out else 1,
            }
            label = prefix + name.replace("_", " ").replace("held out", "held-out")
            losses.plot(*zip(*curves[name], strict=True), label=label, **look)
        if "lr" in curves:
            rate.plot(*zip(*curves["lr"], strict=True), label=run, color="0.2", ls=style)
    losses.set(yscale="log", xlabel="step", ylabel="loss", title="Losses")
    rate.set(xlabel="step", title="Learning rate")
    columns = min(len(runs), 3)  # one for each run
    named = [figure.legend(*losses.get_legend_handles_labels(), ncols=columns, loc="outside lower left")]
    if len(runs) > 1 and rate.lines:
        named.append(rate.legend())
    for text in [text for legend in named for text in legend.get_texts()]:
        text.set_parse_math(False)  # a dollar sign in the name of a run is a dollar sign
    save(figure, out)


def save(figure, out):
    """Writes a picture in the format that the extension of `out` names."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(out).suffix[1:] or "png", dpi=110)
    replace_file(out, content.getvalue())


def draw_cosines(runs, out):
    """The cosines between the two compared branches, over the runs, one after another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    styles = {"consistency": {"ls": "--", "zorder": 3}}  # it lies upon the curve of the biases
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
            axis.axvline(before, color="0.7", lw=0.8)  # the end of a run
        axis.plot(steps, values, label=label, lw=1.5, **styles.get(name, {}))
    axis.set(xlabel="step (a grey line: the end of a run)", ylabel="cosine", ylim=(-1.05, 1.05))
    axis.set_title("Cosine between the appearance and the motion branch")
    axis.legend(fontsize=10)
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
        "--cosines", action="store_true", help="draw the cosines behind the consistency loss, not the losses"
    )
    p.add_argument("--tensorboard", metavar="DIR", help="folder to write TensorBoard's files to")
    args = p.parse_args(argv)
    if not args.out and not args.tensorboard:
        p.error("give --out FILE, --tensorboard DIR, or both")
    try:
        runs = {run: read_curves(run) for run in args.runs}
        if args.out:
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
