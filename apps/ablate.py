"""What do the motion branch and the two extra losses contribute? The paper's ablation, repeated on the toy
world.

    python -m apps.ablate --weights runs/tiny/stage0/last --features runs/tiny/features --data data/toy \\
        --out runs/ablation
    python -m apps.ablate … --seeds 1 --out runs/again     # do its rows lie within the spread of the table?

Five variants from the same towers, with the same seeds, clips and steps (--steps FACTS CAPTIONS QUESTIONS). A
run is three calls of `apps.towers facts`, as in examples/train_tiny.sh but shorter, and one of apps.evaluate
on held-out clips. The first call trains on the facts alone, without words and hence without the two extra
losses, so variants with the same branches share it: the losses then act on a bridge that knows something, as
Hawk's act on Video-LLaMA's. In the other two calls all losses act, the motion-language loss with a target of
its own in both (--motion-targets, as in the paper).

"Without motion" is a model without a motion branch: `prepare.py merge --set branches=appearance` makes its
towers, and it trains on the same cache, whose motion features it ignores, without the two losses that need
the branch.

OUT/results.jsonl gets one line a run. A stopped ablation resumes: finished runs are not repeated, and
training continues from its last checkpoint. The tables (markdown, mean ± standard deviation over the seeds)
are printed, written to OUT/table.md, and drawn into OUT/ablation.png if matplotlib is installed.

In this file: the variants, one run, all runs, tables and plot, the command line.
"""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apps.evaluate import sha256, write_json
from apps.scores import FACTS, appendable, as_line, read_lines, total
from apps.toy import KINDS
from sample import PROBLEMS, Parser, note, number, print_error

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # fields of the config: `prepare.py merge` sets the branches, training the rest
    "full": {},
    "without motion": {"branches": "appearance", "motion_language_weight": 0, "consistency_weight": 0},
    "without consistency": {"consistency_weight": 0},
    "consistency debiased": {"consistency": "debiased"},
    "without motion-language": {"motion_language_weight": 0},
}
RECIPE = {  # step -> options of `apps.towers facts`, as in examples/train_tiny.sh
    "facts": "--stage 1 --facts-only --ask-facts 1 --lr 3e-3",
    "captions": "--stage 1 --ask-facts 0.5 --lr 1e-3",
    "questions": "--stage 2 --ask-facts 0.5 --lr 1e-3 --motion-targets",
}
COMMON = "--train all --min-lr 1e-5 --clip 1 --workers 0 --resume --save-every 100 --eval-every 1000000"


# ------------------------------------------------------------------------------------------------------------
# One run


def end_with_parent():
    """In a new process, on Linux: it is killed when this program is, so that no training continues unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(log, *command, threads):
    """Runs `python COMMAND` with its output in the file `log`; a ValueError with its last line if it
    fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=end_with_parent,
        )
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        program = command[1] if command[0] == "-m" else command[0]
        raise ValueError(f"{log}: `{program}` ended with status {done.returncode}: {last[-1]}")


def towers(args, branches):
    """The folder of towers with these branches (a comma list, or None for those of --weights), made if need
    be."""
    if branches is None:
        return args.weights
    folder = args.out / f"towers-{branches}"
    if not folder.exists():  # merge writes all of it or nothing
        command = ["prepare.py", "merge", "--weights", args.weights, "--set", f"branches={branches}"]
        launch(args.out / f"{folder.name}.txt", *command, "--out", folder, threads=args.threads)
    return folder


def train(args, out, start, step, seed, settings):
    """One call of `apps.towers facts`, resumed where it was stopped; returns the folder of weights."""
    done = out / step / "done"
    if not done.exists():
        steps = args.steps[list(RECIPE).index(step)]
        clips = args.batch_size * (4 if step == "facts" else 1)
        options = ["--weights", start, "--data", args.data, "--features", args.features, "--out", out / step]
        options += ["--seed", seed, "--steps", steps, "--warmup", max(1, steps // 15), "--batch-size", clips]
        options += [
            "--eval-samples",
            args.limit,
            "--dtype",
            args.dtype,
            *RECIPE[step].split(),
            *COMMON.split(),
        ]
        for key, value in settings.items():
            options += ["--set", f"{key}={value}"]
        launch(out / f"{step}.txt", "-m", "apps.towers", "facts", *options, threads=args.threads)
        done.touch()
    return out / step / "last"


def facts(args, branches, seed):
    """The first step, which all variants with these branches share."""
    out = args.out / f"seed{seed}" / f"branches-{branches or 'all'}"
    return train(args, out, towers(args, branches), "facts", seed, {})


def run(args, variant, seed):
    """The steps after the facts, and the evaluation -> the run's line of results.jsonl."""
    began = time.perf_counter()
    out = args.out / f"seed{seed}" / variant.replace(" ", "-")
    settings = dict(VARIANTS[variant])
    weights = facts(args, settings.pop("branches", None), seed)  # done already
    for step in ("captions", "questions"):
        weights = train(args, out, weights, step, seed, settings)
    predictions = out / "predictions.jsonl"
    options = ["--annotations", args.data / "test.jsonl", "--weights", weights, "--out", predictions]
    options += [
        "--limit",
        args.limit,
        *"--task describe --batch-size 50 --max-new-tokens 80 --workers 0".split(),
    ]
    launch(out / "evaluate.txt", "-m", "apps.evaluate", *options, threads=args.threads)
    scores = json.loads(Path(f"{predictions}.scores.json").read_text())
    last = json.loads((out / "questions" / "log.jsonl").read_text().splitlines()[-1])
    return {
        "variant": variant,
        "seed": seed,
        "kinds": scores["kinds"]["kinds"],
        "facts": scores["facts"],
        "bleu_4": scores["bleu"]["describe"]["all"]["bleu"][3],
        "bias_cosine": last.get("bias_cosine"),  # of two branches
        "held_out_loss": last["held_out_video_language"],
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


# ------------------------------------------------------------------------------------------------------------
# All runs


def check_options(args):
    """Writes OUT/options.json with all that decides the numbers except the seeds; ValueError if OUT was begun
    with other options."""
    new = {name: getattr(args, name) for name in ("steps", "batch_size", "dtype", "limit", "threads")}
    new["sha256"] = sha256(
        args.weights / "model.safetensors", args.data / "train.jsonl", args.data / "test.jsonl"
    )
    new["recipe"] = [RECIPE, COMMON, VARIANTS]
    path = args.out / "options.json"
    old = json.loads(path.read_text()) if path.exists() else new
    differ = [name for name in new if old.get(name) != new[name]]
    if differ:
        raise ValueError(f"{args.out}: was begun with another {', '.join(differ)}; give another --out")
    write_json(path, new)


def ablate(args):
    """Trains and scores what results.jsonl lacks; returns all results."""
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args)
    path = args.out / "results.jsonl"
    have = {(line["variant"], line["seed"]) for line in read_lines(path, summary)}
    wanted = [(variant, seed) for seed in range(1, args.seeds + 1) for variant in args.variants]
    todo = [pair for pair in wanted if pair not in have]
    note(f"{len(todo)} runs to do, {len(have)} done; {args.jobs} at a time, {args.threads} threads each")
    starts = dict.fromkeys((VARIANTS[variant].get("branches"), seed) for variant, seed in todo)  # each once
    for branches, _ in starts:
        towers(args, branches)
    with appendable(path) as file, ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda pair: facts(args, *pair), starts))
            for result in pool.map(lambda pair: run(args, *pair), todo):
                file.write(as_line(result))
                file.flush()
                note(summary(result))
        except BaseException:  # also Ctrl-C: nothing new is begun
            pool.shutdown(cancel_futures=True)
            raise
    return read_lines(path, summary)


# ------------------------------------------------------------------------------------------------------------
# Tables and plot


def share(counts):
    right, n = total(counts)
    return right / max(n, 1)


def numbers(result):
    """{column: number, or None where there is none} of one run. A kind counts when it is named and no other
    is; loss: video-language, held-out."""
    counts = result["kinds"]
    moving = [counts[kind] for kind in counts if KINDS[kind].motion_only]
    other = [counts[kind] for kind in counts if not KINDS[kind].motion_only]
    columns = {
        "all kinds": share(moving + other),
        "motion-only kinds": share(moving),
        "other kinds": share(other),
    }
    for fact in FACTS:
        columns[fact] = share([result["facts"][fact]])
    columns["BLEU-4"] = result["bleu_4"]
    columns["loss"] = result["held_out_loss"]
    columns["bias cosine"] = result["bias_cosine"]
    return columns


def summary(result):
    values = [f"{name} {value:.3f}" for name, value in numbers(result).items() if value is not None]
    return f"{result['variant']}, seed {result['seed']}: {', '.join(values)}; {result['minutes']} min"


def mean_and_spread(values):
    if None in values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def tables(results):
    """Markdown: a row for each variant with everything, and a row for each kind (right/all, added up over
    seeds)."""
    runs_of = {}
    for variant in VARIANTS:
        runs = [result for result in results if result["variant"] == variant]
        if runs:
            runs_of[variant] = runs
    by_variant = [["variant", *numbers(results[0]), "seeds"]]
    for variant, runs in runs_of.items():
        columns = zip(*(numbers(result).values() for result in runs), strict=True)
        by_variant.append([variant, *map(mean_and_spread, columns), str(len(runs))])
    by_kind = [["kind (motion only: †)", *runs_of]]
    for kind in results[0]["kinds"]:
        cells = []
        for runs in runs_of.values():
            right, n = total([result["kinds"][kind] for result in runs])
            cells.append(f"{right}/{n}")
        mark = " †" if KINDS[kind].motion_only else ""
        by_kind.append([kind.replace("_", " ") + mark, *cells])
    return markdown(by_variant) + "\n" + markdown(by_kind)


def markdown(table):
    head, *body = ("| " + " | ".join(row) + " |\n" for row in table)
    return head + "|---" * len(table[0]) + "|\n" + "".join(body)


def plot(results, path):
    """Draws each run as a dot; a note instead if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return note(f"no {path.name}: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [variant for variant in VARIANTS if any(result["variant"] == variant for result in results)]
    layout = dict(sharey=True, width_ratios=[3, 2, 2], layout="constrained")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), **layout)
    panels = (["motion-only kinds", "other kinds"], ["BLEU-4"], ["bias cosine"])
    for axis, columns in zip(axes, panels, strict=True):
        for i, column in enumerate(columns):
            x = [numbers(result)[column] for result in results]
            y = [names.index(result["variant"]) + 0.2 * i for result in results]
            axis.plot([float("nan") if value is None else value for value in x], y, "o", alpha=0.6)
        above = dict(loc="lower left", bbox_to_anchor=(0, 1))
        axis.legend(columns, fontsize=8, ncols=2, frameon=False, **above)
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = Parser(__doc__)
    positive = number(int, 1)
    add = p.add_argument
    add("--weights", type=Path, required=True, help="folder of towers that stage 0 trained")
    add("--features", type=Path, required=True, help="their cache, from `prepare.py features`")
    add("--data", type=Path, required=True, help="the toy world of that cache, from `python -m apps.toy`")
    add("--out", type=Path, required=True, help="folder of runs, results and tables; resumed if it exists")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 1 to N (default: 3)")
    names = list(VARIANTS)
    add("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add(
        "--steps",
        type=positive,
        nargs=3,
        default=[600, 180, 80],
        metavar="N",
        help="facts, captions, questions",
    )
    add(
        "--batch-size",
        type=positive,
        default=16,
        help="clips a step, four times as many for facts (default: 16)",
    )
    add(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of training (default: bfloat16)"
    )
    add("--limit", type=positive, default=200, help="held-out clips to describe (default: 200)")
    add("--jobs", type=positive, default=2, help="runs side by side (default: 2)")
    add("--threads", type=positive, default=1, help="of each run (default: 1)")
    args = p.parse_args(argv)
    for name in ("weights", "features", "data", "out"):  # the programs are started in the repository
        setattr(args, name, getattr(args, name).resolve())
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        results = ablate(args)
        (args.out / "table.md").write_text(tables(results))
        plot(results, args.out / "ablation.png")
    except PROBLEMS as error:
        return print_error(error)
    print(tables(results), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
