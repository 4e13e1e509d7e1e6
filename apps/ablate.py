"""When does the motion branch help? Compares Hawk with it, without it and with nothing but it, among more and
more stationary objects (the toy world's clutter), with many frames of a clip and with few.

    python -m apps.ablate --weights runs/tiny/stage0/last --features runs/tiny/features --data data/toy \\
        --out runs/motion
    python -m apps.ablate … --seeds 1 --out runs/again     # do its rows lie within the spread of the table?
    python -m apps.ablate … --variants full "without consistency" "without motion-language" \\
        --frames 8 --clutter 0 --out runs/losses           # what do the two extra losses bring?
    python -m apps.ablate … --variants "without motion" "without both losses" full LoRA --frames 1 8 \\
        --seeds 1 --out runs/ladder                        # Hawk built up step by step

All runs start from the same towers, and runs with the same seed see the same clips in the same order. A run
makes three calls of `apps.towers facts` (facts, captions, questions), as in examples/train_tiny.sh but with
one round of facts, and then describes held-out clips, which are the same at every level of clutter except
for the clutter itself. The first call trains on the facts alone, without text and hence without the two extra
losses, so variants with the same branches share it. The other two use all losses, with separate targets for
the motion-language loss (--motion-targets, as in the paper).

"Without motion" and "motion alone" are models with one branch: they train on the same cache, ignore the
features of the other branch, and do without the losses that need it. --frames 2 takes the first and the
fifth of eight frames from the cache: appearance then shows two still images, while each motion frame still
shows what moves at that moment.

OUT/results.jsonl gets one line per run. A stopped ablation resumes: finished runs are not repeated, and
training continues from its last checkpoint. The tables (markdown, mean ± standard deviation over the seeds)
are printed, written to OUT/table.md, and drawn into OUT/ablation.png if matplotlib is installed.

In this file: the variants; towers, cache and held-out clips; one run; all runs; tables and plot; options.
"""

import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from apps import run_program
from apps.evaluate import sha256, write_json
from apps.scores import FACTS, appendable, as_line, read_lines, total
from apps.toy import KINDS
from data import replace_file, replaced_folder
from hawk import Hawk, require
from sample import PROBLEMS, make_parser, note, number, print_error

ROOT = Path(__file__).resolve().parents[1]
NO_EXTRA_LOSS = {"motion_language_weight": 0, "consistency_weight": 0}
VARIANTS = {  # "branches", unless all; "train": what captions and questions train; fields of the config
    "full": {},
    "without motion": {"branches": "appearance"} | NO_EXTRA_LOSS,
    "motion alone": {"branches": "motion", "consistency_weight": 0},
    "without consistency": {"consistency_weight": 0},
    "consistency debiased": {"consistency": "debiased"},
    "without motion-language": {"motion_language_weight": 0},
    "without both losses": NO_EXTRA_LOSS,
    "LoRA": {"train": "lora", "lora_rank": 16},  # LLaMA keeps the weights of stage 0
}
BY_DEFAULT = ("full", "without motion", "motion alone")
RECIPE = {  # step -> options of `apps.towers facts`, as in examples/train_tiny.sh, with one round of facts
    "facts": "--stage 1 --facts-only --ask-facts 1 --lr 3e-3 --set dropout=0.1",
    "captions": "--stage 1 --ask-facts 1 --lr 1e-3",
    "questions": "--stage 2 --ask-facts 1 --lr 1e-3 --motion-targets",
}
COMMON = "--min-lr 1e-5 --clip 1 --workers 0 --resume --save-every 500 --eval-every 1000000"


class Run(NamedTuple):
    variant: str
    frames: int
    seed: int


# ------------------------------------------------------------------------------------------------------------
# Programs


def end_with_parent():
    """Called in a new process: on Linux, it dies with this program, so that no training goes on unnoticed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


running = set()  # the processes that were launched and have not ended
stopping = []  # if not empty, they are told to end, and no others start


def launch(log, *command, threads):
    """Runs `python COMMAND` with its output in the file `log`; raises a ValueError with the last line of
    it if the program fails."""
    require(not stopping, "stopped")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=end_with_parent,
        )
        running.add(process)
        if stopping:  # stopped while this one was being launched
            process.terminate()
        status = process.wait()
        running.discard(process)
    require(not stopping, "stopped")
    if status:
        last = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        program = command[1] if command[0] == "-m" else command[0]
        raise ValueError(f"{log}: `{program}` ended with status {status}: {last[-1]}")


# ------------------------------------------------------------------------------------------------------------
# Towers, cache and held-out clips


def towers(args, branches, frames):
    """The folder of towers with these branches ("a,b"; None: all) and this many frames, made if needed."""
    folder = args.out / f"towers-{branches or 'all'}-{frames}"
    if not folder.exists():
        model = Hawk.from_pretrained(args.weights)
        kept = tuple(branches.split(",")) if branches else model.config.branches
        smaller = Hawk(replace(model.config, n_frames=frames, branches=kept))
        state = model.state_dict()
        for name in smaller.state_dict():
            if name.endswith("frame_position.weight"):  # not trained yet
                state[name] = state[name][:frames]
        smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
        with replaced_folder(folder) as new:
            smaller.save_pretrained(new, tokenizer=args.weights / "tokenizer.model")
    return folder


def cache(args, frames):
    """The folder of features with this many frames per clip: --features, or evenly spaced frames of it."""
    meta = json.loads((args.features / "train" / "meta.json").read_text())
    every = meta["n_frames"] // frames
    if every * frames != meta["n_frames"]:
        raise ValueError(
            f"--frames {frames} does not divide the {meta['n_frames']} frames of {args.features}"
        )
    folder = args.out / f"features-{frames}"
    if every == 1:
        return args.features
    for split in ("train", "test"):
        if (folder / split).exists():
            continue
        with replaced_folder(folder / split) as new:
            for file in tqdm(sorted((args.features / split).iterdir()), f"{frames} frames, {split}"):
                fewer = fewer_frames(file, every) if file.suffix == ".safetensors" else file.read_bytes()
                (new / file.name).write_bytes(fewer)
            meta = json.loads((new / "meta.json").read_text())
            (new / "meta.json").write_text(json.dumps(meta | {"n_frames": frames}))
    return folder


def fewer_frames(file, every):
    """The bytes of a file of the feature cache, reduced to one in `every` frames."""
    with safe_open(file, "pt") as opened:
        streams = {name: opened.get_tensor(name)[::every].contiguous() for name in opened.keys()}
        about = opened.metadata()
    about = json.loads(about["about"]) if "about" in about else about  # caches used to have three entries
    seconds = re.findall(r"\d+\.\d+", about["message"])[::every]
    about["message"] = f"The video contains {len(seconds)} frames sampled at {', '.join(seconds)} seconds. "
    about["indices"] = json.dumps(json.loads(about["indices"])[::every])
    return save(streams, {"about": json.dumps(about)})


def held_out(args, clutter):
    """The index of held-out clips with this many stationary objects, made if needed."""
    folder = args.out / f"clutter-{clutter}"
    if not (folder / "test.jsonl").exists():
        options = ["--n-test", args.limit, "--seed", 501, "--clutter", clutter, "--out", folder]
        launch(args.out / f"{folder.name}.txt", "-m", "apps.toy", *options, threads=1)
    return folder / "test.jsonl"


# ------------------------------------------------------------------------------------------------------------
# One run


def train(args, out, start, step, run, settings):
    """One call of `apps.towers facts`, resumed where it was stopped; returns the folder of weights."""
    done = out / step / "done"
    if not done.exists():
        number = list(RECIPE).index(step)
        steps = args.steps[number]
        options = ["--weights", start, "--data", args.data, "--features", cache(args, run.frames)]
        options += ["--out", out / step, "--seed", run.seed]
        options += ["--steps", steps, "--warmup", max(1, steps // 15)]
        options += ["--batch-size", args.batch_size[number], "--dtype", args.dtype, *RECIPE[step].split()]
        options += ["--eval-samples", args.limit, *COMMON.split(), "--train", settings.get("train", "all")]
        for key, value in settings.items():
            options += ["--set", f"{key}={value}"] if key != "train" else []
        launch(out / f"{step}.txt", "-m", "apps.towers", "facts", *options, threads=args.threads)
        last = json.loads((out / step / "log.jsonl").read_text().splitlines()[-1])["step"]
        require(last == steps, f"{out / step}: stopped after {last} of {steps} steps; start again to resume")
        done.touch()
    return out / step / "last"


def facts(args, run):
    """The first step, which all variants with the same branches share."""
    branches = VARIANTS[run.variant].get("branches")
    out = args.out / f"frames{run.frames}-seed{run.seed}" / f"branches-{branches or 'all'}"
    return train(args, out, towers(args, branches, run.frames), "facts", run, {})


def one_run(args, run):
    """The steps after the facts, and the evaluations -> the run's line of results.jsonl."""
    began = time.perf_counter()
    out = args.out / f"frames{run.frames}-seed{run.seed}" / run.variant.replace(" ", "-")
    settings = {key: value for key, value in VARIANTS[run.variant].items() if key != "branches"}
    weights = facts(args, run)  # done already
    for step in ("captions", "questions"):
        weights = train(args, out, weights, step, run, settings)
    result = run._asdict() | {"clutter": {}}
    for clutter in args.clutter:
        predictions = out / f"clutter-{clutter}.jsonl"
        options = ["--annotations", held_out(args, clutter), "--weights", weights, "--out", predictions]
        options += "--task describe --batch-size 50 --max-new-tokens 80 --workers 0".split()
        launch(out / "evaluate.txt", "-m", "apps.evaluate", *options, threads=args.threads)
        scores = json.loads(Path(f"{predictions}.scores.json").read_text())
        bleu = scores["bleu"]["describe"]["all"]["bleu"]
        kinds = {"kinds": scores["kinds"]["kinds"], "facts": scores["facts"]}
        result["clutter"][str(clutter)] = kinds | {"bleu_1": bleu[0], "bleu_4": bleu[3]}
    last = json.loads((out / "questions" / "log.jsonl").read_text().splitlines()[-1])
    result["bias_cosine"] = last.get("bias_cosine")  # None with one branch
    result["held_out_loss"] = last["held_out_video_language"]
    return result | {"minutes": round((time.perf_counter() - began) / 60, 2)}


# ------------------------------------------------------------------------------------------------------------
# All runs


def check_options(args):
    """Writes OUT/options.json with all that decides the numbers except the seeds; ValueError if OUT was begun
    with other options."""
    new = {name: getattr(args, name) for name in ("steps", "batch_size", "dtype", "limit", "threads")}
    new["sha256"] = sha256(
        args.weights / "model.safetensors", args.data / "train.jsonl", args.data / "test.jsonl"
    )
    new["recipe"] = [RECIPE, COMMON, args.clutter]
    path = args.out / "options.json"
    old = json.loads(path.read_text()) if path.exists() else new
    differ = [name for name in new if old.get(name) != new[name]]
    if differ:
        raise ValueError(f"{args.out}: was begun with another {', '.join(differ)}; use another --out")
    write_json(path, new)


def ablate(args):
    """Trains and scores what results.jsonl lacks; returns all results."""
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args)
    path = args.out / "results.jsonl"
    have = {run_of(line) for line in read_lines(path, summary)}
    wanted = [
        Run(variant, frames, seed)
        for seed in range(1, args.seeds + 1)
        for frames in args.frames
        for variant in args.variants
    ]
    todo = [run for run in wanted if run not in have]
    note(f"{len(todo)} runs to do, {len(have)} done; {args.jobs} at a time, {args.threads} threads each")
    for run in todo:  # what several runs share is made before they start
        towers(args, VARIANTS[run.variant].get("branches"), run.frames)
        cache(args, run.frames)
    for clutter in args.clutter if todo else ():
        held_out(args, clutter)
    starts = {(VARIANTS[run.variant].get("branches"), run.frames, run.seed): run for run in todo}  # each once
    with appendable(path) as file, ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(partial(facts, args), starts.values()))
            for result in pool.map(partial(one_run, args), todo):
                file.write(as_line(result))
                file.flush()
                note(summary(result))
        except BaseException:  # also Ctrl-C and SIGTERM: running programs are told to save, no new ones start
            stopping.append(True)
            for process in tuple(running):
                process.terminate()
            pool.shutdown(cancel_futures=True)
            stopping.clear()
            raise
    return read_lines(path, summary)


# ------------------------------------------------------------------------------------------------------------
# Tables and plot


def run_of(result):
    return Run(*(result[name] for name in Run._fields))


def share(counts):
    right, n = total(counts)
    return right / max(n, 1)


def numbers(result, clutter):
    """{column: share or score} of one run at one level of clutter. A kind counts if it alone is named."""
    scores = result["clutter"][clutter]
    moving = [counts for kind, counts in scores["kinds"].items() if KINDS[kind].motion_only]
    other = [counts for kind, counts in scores["kinds"].items() if not KINDS[kind].motion_only]
    columns = {"kinds": share(moving + other), "motion-only kinds": share(moving), "others": share(other)}
    columns |= {fact: share([scores["facts"][fact]]) for fact in FACTS}
    return columns | {"BLEU-1": scores["bleu_1"], "BLEU-4": scores["bleu_4"]}


def summary(result):
    kinds = [f"{numbers(result, clutter)['kinds']:.3f}" for clutter in result["clutter"]]
    run = run_of(result)
    about = f"{run.variant}, {run.frames} frames, seed {run.seed}: kinds {', '.join(kinds)}"
    return f"{about} (clutter {', '.join(result['clutter'])}); {result['minutes']} min"


def mean_and_spread(values):
    if None in values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def grouped(results):
    """{(frames, variant): its results}, in the order of VARIANTS."""
    groups = {}
    for frames in sorted({result["frames"] for result in results}, reverse=True):
        for variant in VARIANTS:
            runs = [
                result for result in results if (result["variant"], result["frames"]) == (variant, frames)
            ]
            if runs:
                groups[frames, variant] = runs
    return groups


def tables(results):
    """Markdown: a row for each level of clutter and group of runs, a row for each group, a row for each kind
    (right/all, added up over seeds and clutter)."""
    groups = grouped(results)
    levels = list(results[0]["clutter"])
    by_clutter = [["frames", "variant", "clutter", *numbers(results[0], levels[0])]]
    by_variant = [["frames", "variant", "seeds", "held-out loss", "bias cosine"]]
    for (frames, variant), runs in groups.items():
        for clutter in levels:
            columns = zip(*(numbers(result, clutter).values() for result in runs), strict=True)
            by_clutter.append([str(frames), variant, clutter, *map(mean_and_spread, columns)])
        last = [mean_and_spread([run[name] for run in runs]) for name in ("held_out_loss", "bias_cosine")]
        by_variant.append([str(frames), variant, str(len(runs)), *last])
    by_kind = [["kind (motion only: †)", *(f"{variant}, {frames}" for frames, variant in groups)]]
    for kind in results[0]["clutter"][levels[0]]["kinds"]:
        cells = []
        for runs in groups.values():
            counts = [result["clutter"][clutter]["kinds"][kind] for result in runs for clutter in levels]
            right, n = total(counts)
            cells.append(f"{right}/{n}")
        mark = " †" if KINDS[kind].motion_only else ""
        by_kind.append([kind.replace("_", " ") + mark, *cells])
    return "\n".join(map(markdown, (by_clutter, by_variant, by_kind)))


def markdown(table):
    head, *body = ("| " + " | ".join(row) + " |\n" for row in table)
    return head + "|---" * len(table[0]) + "|\n" + "".join(body)


# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #999999".split()


def plot(results, path):
    """Draws a curve over clutter for each variant, and the range over the seeds as a band. Without matplotlib
    it only prints a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return note(f"no {path.name}: matplotlib is not installed")
    groups = grouped(results)
    all_frames = list(dict.fromkeys(frames for frames, _ in groups))
    columns = ("kinds", "motion-only kinds", "object", "colour", "place")
    figure = Figure(figsize=(2.5 * len(columns), 2.6 * len(all_frames) + 1), layout="constrained")
    axes = figure.subplots(len(all_frames), len(columns), sharex=True, sharey=True, squeeze=False)
    for (frames, variant), runs in groups.items():
        x = [int(clutter) for clutter in runs[0]["clutter"]]
        k = list(VARIANTS).index(variant)
        style = {"color": COLOURS[k % 8], "marker": "os^DvPX*"[k % 8], "ms": 6, "label": variant}
        for axis, column in zip(axes[all_frames.index(frames)], columns, strict=True):
            y = [[numbers(result, clutter)[column] for result in runs] for clutter in runs[0]["clutter"]]
            axis.plot(x, [statistics.fmean(values) for values in y], **style)
            axis.fill_between(x, [*map(min, y)], [*map(max, y)], alpha=0.2, color=style["color"], lw=0)
            axis.grid(alpha=0.3)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column)
    for line, frames in zip(axes, all_frames, strict=True):
        line[0].set_ylabel(f"{frames} frames:\nshare of clips named right")
    for axis in axes[-1]:
        axis.set(xlabel="stationary objects", xticks=x, ylim=(0, 1.02))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(VARIANTS))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = make_parser(__doc__)
    positive = number(int, 1)
    add = p.add_argument
    add("--weights", type=Path, required=True, help="folder of towers that stage 0 trained")
    add("--features", type=Path, required=True, help="their cache, from `apps.towers features`")
    add("--data", type=Path, required=True, help="the toy world of that cache, from `python -m apps.toy`")
    add("--out", type=Path, required=True, help="folder of runs, results and tables; resumed if it exists")
    add("--seeds", type=positive, default=2, metavar="N", help="seeds 1 to N (default: 2)")
    add("--variants", nargs="+", choices=VARIANTS, default=BY_DEFAULT, metavar="NAME",
        help=f"{', '.join(VARIANTS)} (default: the first three)")  # fmt: skip
    add("--frames", type=positive, nargs="+", default=[8, 2], metavar="N", help="per clip (default: 8 2)")
    add("--clutter", type=number(int, 0), nargs="+", default=[0, 2, 4, 6], metavar="N",
        help="stationary objects in the held-out clips (default: 0 2 4 6)")  # fmt: skip
    three = dict(type=positive, nargs=3, metavar="N")
    add(
        "--steps",
        default=[5000, 500, 650],
        **three,
        help="training steps: facts, captions, questions (default: 5000 500 650)",
    )
    add("--batch-size", default=[64, 32, 32], **three, help="of the same three (default: 64 32 32)")
    add(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of training (default: bfloat16)"
    )
    add("--limit", type=positive, default=200, help="held-out clips to describe (default: 200)")
    add("--jobs", type=positive, default=2, help="runs in parallel (default: 2)")
    add("--threads", type=positive, default=1, help="threads per run (default: 1)")
    args = p.parse_args(argv)
    for name in ("weights", "features", "data", "out"):  # the programs run in the repository
        setattr(args, name, getattr(args, name).resolve())
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        results = ablate(args)
        replace_file(args.out / "table.md", tables(results))
        plot(results, args.out / "ablation.png")
    except PROBLEMS as error:
        return print_error(error)
    print(tables(results), end="")
    return 0


if __name__ == "__main__":
    run_program(main)
