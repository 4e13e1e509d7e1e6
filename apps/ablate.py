"""What do the motion branch and the two extra losses bring? The paper's ablation, repeated on the toy world.

    python -m apps.ablate --weights runs/tiny/stage0/last --features runs/tiny/features --data data/toy --out runs/ablation
    python -m apps.ablate … --seeds 1 --out runs/again       # seed 1 alone: its rows should lie within the table's spread

Five variants from the same towers, with the same seeds, clips and steps (--steps FACTS CAPTIONS QUESTIONS). A run is three
calls of train.py, as in examples/train_tiny.sh but shorter, and one of apps.evaluate on held-out clips. The facts are learnt
without a word, hence without the two extra losses, so the variants that see motion share that step of their seed: the losses
then act on a bridge that has learnt something before, as Hawk's act on Video-LLaMA's. In the other two steps all losses act,
the motion-language loss with a target of its own in both (--motion-targets, as the paper describes it). "Without motion"
gives the motion branch zeros, in training and evaluation, and leaves out the two losses that need it.

OUT/results.jsonl gets one line a run. Start a stopped ablation again and it goes on: finished runs are not repeated, training
goes on from its last checkpoint. In the end the tables (markdown, mean ± standard deviation over the seeds) are printed and
written to OUT/table.md, and drawn into OUT/ablation.png if matplotlib is installed.
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
from apps.scores import FACTS, appendable, as_line, read_lines
from prepare import KINDS
from sample import PROBLEMS, Parser, complain, note, number

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # fields of the config
    "full": {},
    "without motion": {"motion": "none", "motion_language_weight": 0, "consistency_weight": 0},
    "without consistency": {"consistency_weight": 0},
    "consistency debiased": {"consistency": "debiased"},
    "without motion-language": {"motion_language_weight": 0},
}
RECIPE = {  # step -> options of train.py, as in examples/train_tiny.sh
    "facts": "--stage 1 --facts-only --ask-facts 1 --lr 3e-3",
    "captions": "--stage 1 --ask-facts 0.5 --lr 1e-3",
    "questions": "--stage 2 --ask-facts 0.5 --lr 1e-3 --motion-targets",
}
COMMON = "--train all --min-lr 1e-5 --clip 1 --workers 0 --resume --save-every 100 --eval-every 1000000"


# ---- One run ---------------------------------------------------------------------------------------------------------
def end_with_parent():
    """In a new process, on Linux: it is killed when this program is, so that no training goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(log, *command, threads):
    """Runs `python COMMAND` with its output in the file `log`; a ValueError with its last line if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with open(log, "ab") as file:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                              stdout=file, stderr=file, preexec_fn=end_with_parent)  # fmt: skip
    if done.returncode:
        last = Path(log).read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise ValueError(f"{log}: `{command[0]}` ended with status {done.returncode}: {last[-1]}")


def train(args, out, start, step, seed, settings):
    """One call of train.py, which goes on where it was stopped; returns the folder of weights."""
    done = out / step / "done"
    if not done.exists():
        steps, clips = args.steps[list(RECIPE).index(step)], args.batch_size * (4 if step == "facts" else 1)
        options = ["--weights", start, "--data", args.data, "--features", args.features, "--out", out / step]
        options += f"--seed {seed} --steps {steps} --warmup {max(1, steps // 15)} --batch-size {clips}".split()
        options += [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
        options += ["--eval-samples", args.limit, "--dtype", args.dtype, *RECIPE[step].split(), *COMMON.split()]
        out.mkdir(parents=True, exist_ok=True)
        launch(out / f"{step}.txt", "train.py", *options, threads=args.threads)
        done.touch()
    return out / step / "last"


def facts(args, motion, seed):
    """The first step, which all variants of this seed share that see motion."""
    settings = {"motion": motion} if motion else {}
    return train(args, args.out / f"seed{seed}" / f"motion-{motion or 'seen'}", args.weights, "facts", seed, settings)


def run(args, variant, seed):
    """What comes after the facts, and the evaluation -> the run's line of results.jsonl."""
    began, out = time.perf_counter(), args.out / f"seed{seed}" / variant.replace(" ", "-")
    weights = facts(args, VARIANTS[variant].get("motion"), seed)  # done already
    for step in ("captions", "questions"):
        weights = train(args, out, weights, step, seed, VARIANTS[variant])
    options = ["--annotations", args.data / "test.jsonl", "--weights", weights, "--out", out / "predictions.jsonl"]
    options += f"--task describe --limit {args.limit} --batch-size 50 --max-new-tokens 80 --workers 0".split()
    launch(out / "evaluate.txt", "-m", "apps.evaluate", *options, threads=args.threads)
    scores = json.loads((out / "predictions.jsonl.scores.json").read_text())
    last = json.loads((out / "questions" / "log.jsonl").read_text().splitlines()[-1])
    return {
        "variant": variant, "seed": seed, "kinds": scores["kinds"]["kinds"], "facts": scores["facts"],
        "bleu_4": scores["bleu"]["describe"]["all"]["bleu"][3], "bias_cosine": last["bias_cosine"],
        "held_out_loss": last["held_out_video_language"],
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }  # fmt: skip


# ---- All runs --------------------------------------------------------------------------------------------------------
def check_options(args):
    """Writes OUT/options.json with all that decides the numbers but the seeds; a ValueError if it was begun otherwise."""
    files = (args.weights / "model.safetensors", args.data / "train.jsonl", args.data / "test.jsonl")
    new = {name: getattr(args, name) for name in ("steps", "batch_size", "dtype", "limit", "threads")}
    new = json.loads(json.dumps(new | {"sha256": sha256(*files), "recipe": [RECIPE, COMMON, VARIANTS]}))
    path = args.out / "options.json"
    old = json.loads(path.read_text()) if path.exists() else new
    if differ := [name for name in new if old.get(name) != new[name]]:
        raise ValueError(f"{args.out}: was begun with another {', '.join(differ)}; give another --out")
    write_json(path, new)


def ablate(args):
    """Trains and scores what results.jsonl lacks; returns all results."""
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args)
    path = args.out / "results.jsonl"
    have = {(line["variant"], line["seed"]) for line in read_lines(path, summary)}
    todo = [(v, seed) for seed in range(1, args.seeds + 1) for v in args.variants if (v, seed) not in have]
    starts = dict.fromkeys((VARIANTS[v].get("motion"), seed) for v, seed in todo)  # each once
    note(f"{len(todo)} runs to do, {len(have)} done; {args.jobs} at a time, {args.threads} threads each")
    with appendable(path) as file, ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda what: facts(args, *what), starts))
            for result in pool.map(lambda what: run(args, *what), todo):
                file.write(as_line(result))
                file.flush()
                note(summary(result))
        except BaseException:  # also Ctrl-C: nothing new is begun
            pool.shutdown(cancel_futures=True)
            raise
    return read_lines(path, summary)


# ---- Tables, plot, command line --------------------------------------------------------------------------------------
def share(counts):
    right, n = map(sum, zip(*counts, strict=True))
    return right / max(n, 1)


def numbers(result):
    """{column: number} of one run. A kind counts when it is named and no other is; loss: video-language, held-out."""
    kinds = result["kinds"]
    moving, other = ([kinds[k] for k in kinds if KINDS[k].motion_only == only] for only in (True, False))
    columns = {"all kinds": share(moving + other), "motion-only kinds": share(moving), "other kinds": share(other)}
    columns |= {fact: share([result["facts"][fact]]) for fact in FACTS}
    return columns | {"BLEU-4": result["bleu_4"], "loss": result["held_out_loss"], "bias cosine": result["bias_cosine"]}


def summary(result):
    values = ", ".join(f"{name} {value:.3f}" for name, value in numbers(result).items())
    return f"{result['variant']}, seed {result['seed']}: {values}; {result['minutes']} min"


def mean_and_spread(values):
    mean = f"{statistics.fmean(values):.3f}"
    return mean + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(results):
    """Markdown: a row for each variant with everything, and a row for each kind (right/all, the seeds added up)."""
    of = {v: [r for r in results if r["variant"] == v] for v in VARIANTS}
    of = {v: runs for v, runs in of.items() if runs}
    table = [["variant", *numbers(results[0]), "seeds"]]
    for variant, runs in of.items():
        columns = zip(*(numbers(r).values() for r in runs), strict=True)
        table.append([variant, *map(mean_and_spread, columns), str(len(runs))])
    kinds = [["kind (motion only: †)", *of]]
    for kind in results[0]["kinds"]:
        counts = ([sum(r["kinds"][kind][i] for r in runs) for i in (0, 1)] for runs in of.values())
        name = kind.replace("_", " ") + " †" * KINDS[kind].motion_only
        kinds.append([name, *(f"{right}/{n}" for right, n in counts)])
    return markdown(table) + "\n" + markdown(kinds)


def markdown(table):
    head, *body = ("| " + " | ".join(row) + " |\n" for row in table)
    return head + "|---" * len(table[0]) + "|\n" + "".join(body)


def plot(results, path):
    """Each run a dot; a note if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return note(f"no {path.name}: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [v for v in VARIANTS if any(r["variant"] == v for r in results)]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True, width_ratios=[3, 2, 2], layout="constrained")
    panels = (["motion-only kinds", "other kinds"], ["BLEU-4"], ["bias cosine"])
    for axis, columns in zip(axes, panels, strict=True):
        for i, column in enumerate(columns):
            points = [(numbers(r)[column], names.index(r["variant"]) + 0.2 * i) for r in results]
            axis.plot(*zip(*points, strict=True), "o", alpha=0.6)
        axis.legend(columns, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # above
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    path.with_suffix(".tmp.png").replace(path)
    plt.close(figure)


def parse_args(argv=None):
    p, positive = Parser(__doc__), number(int, 1)
    add = p.add_argument
    add("--weights", type=Path, required=True, help="folder of towers that stage 0 trained")
    add("--features", type=Path, required=True, help="their cache, from `prepare.py features`")
    add("--data", type=Path, required=True, help="the toy world of that cache, from `prepare.py toy`")
    add("--out", type=Path, required=True, help="folder of the runs, results and tables; gone on with if it is there")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 1 to N (default: 3)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--steps", type=positive, nargs=3, default=[600, 180, 80], metavar="N", help="facts, captions, questions")
    add("--batch-size", type=positive, default=16, help="clips a step, four times as many for facts (default: 16)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of training (default: bfloat16)")
    add("--limit", type=positive, default=200, help="held-out clips that are described (default: 200)")
    add("--jobs", type=positive, default=2, help="runs side by side (default: 2)")
    add("--threads", type=positive, default=1, help="of each run (default: 1)")
    args = p.parse_args(argv)
    for name in ("weights", "features", "data", "out"):  # train.py is started in the repository
        setattr(args, name, getattr(args, name).resolve())
    return args


def main(argv=None):
    try:
        args = parse_args(argv)
        results = ablate(args)
        (args.out / "table.md").write_text(tables(results))
        plot(results, args.out / "ablation.png")
        print(tables(results), end="")
    except PROBLEMS as error:
        complain(error)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
