"""Scoring with a small random model: resuming after a kill, several processes, BLEU, the judge, the
comparison."""

import functools
import hashlib
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

import sample
from apps import compare, detect, evaluate, judge, run_program, scores
from data import clip_options, read_clip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(world):
    """The folder of weights and clips, with an index of them and its kinds."""
    rows = [
        {
            "video": "a b.mp4",
            "source": "toy",
            "description": "A car turns back.",
            "kind": "turn",
            "colour": "red",
        },
        {
            "video": "c.mp4",
            "source": "toy",
            "description": "As an AI language model, I cannot.",
            "flags": ["refusal"],
        },
        {"video": "broken.mp4", "source": "toy", "description": "A car turns back.", "kind": "turn"},
        {"video": "c.mp4", "source": "web", "description": "Fire.", "qa": [{"q": "Who?", "a": "A dog."}] * 2},
        {"video": "a b.mp4", "source": "web", "qa": [{"q": "Where is it?", "a": "In the near lane."}]},
        {"video": "a b.mp4", "source": "web", "qa": [{"q": "Where is it?", "a": "In the near lane."}]},
    ]
    written(world / "index.jsonl", rows)
    (world / "kinds.json").write_text(json.dumps({"turn": "turns back", "fire": "catches fire"}))
    labelled = [{"video": "a b.mp4", "label": 0, "source": "web"}, {"video": "broken.mp4", "label": 1}]
    labelled += [{"video": "c.mp4", "abnormal": [0, 0.4], "source": "web"}]
    for number in range(4):
        shutil.copy(world / "c.mp4", world / f"c{number}.mp4")
        labelled.append({"video": f"c{number}.mp4", "kind": "normal" if number % 2 else "fire"})
    written(world / "labels.jsonl", labelled)
    return world


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(world, out, *more):
    paths = ["--annotations", world / "index.jsonl", "--weights", world / "weights", "--out", out]
    return [*map(str, paths), *"--device cpu --workers 0 --batch-size 2 --max-new-tokens 8".split(), *more]


remembered = functools.lru_cache(evaluate.read_clip)


@pytest.fixture
def run(world, capfd, monkeypatch):
    """evaluate's main with these options -> (status, output). Each clip is read once for all tests."""
    monkeypatch.setattr(evaluate, "read_clip", remembered)

    def run(out, *more):
        capfd.readouterr()
        try:
            status = evaluate.main(options(world, out, *more))
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------------
# Predictions


def test_evaluate_resumes_to_the_same_file(world, tmp_path, run):
    whole = tmp_path / "whole.jsonl"
    part = tmp_path / "part.jsonl"
    status, printed = run(whole)
    assert status == 0 and "error: " in printed.err and "broken.mp4" in printed.err
    predictions = [json.loads(line) for line in whole.read_text().splitlines()]
    described = [("a b.mp4", "describe"), ("c.mp4", "describe")]
    answered = [("c.mp4", "answer")] * 2 + [("a b.mp4", "answer")] * 2
    assert [(p["video"], p["task"]) for p in predictions] == described + answered
    fields = ["video", "task", "question", "answer", "reference", "source", "kind", "tokens"]
    assert list(predictions[0]) == fields and 1 <= predictions[0]["tokens"] <= 8
    assert predictions[2]["reference"] == "A dog." and "kind" not in predictions[2]
    found = json.loads((tmp_path / "whole.jsonl.scores.json").read_text())
    assert found["unreadable"] == ["broken.mp4"] and found["kinds"]["kinds"]["turn"][1] == 1
    assert found["counts"] == {"clips": 6, "skipped": 1, "refused": 1}
    assert found["bleu"]["describe"]["all"]["n"] == 2 and list(found["bleu"]["answer"]) == ["web", "all"]
    assert found["options"] == json.loads((tmp_path / "whole.jsonl.options.json").read_text())
    assert len(found["options"]["weights_sha256"]) == 64 and found["options"]["max_new_tokens"] == 8
    assert "6 clips: 1 unreadable, 1 skipped; 1 refused references left out" in printed.out
    assert "Hawk, paper" not in printed.out and "mteval-v13a" in printed.out
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, ends[0], ends[2] + 20, ends[-1]):
        part.write_bytes(data[:cut])
        assert run(part)[0] == 0 and part.read_bytes() == data, cut
    assert run(part, "--workers", "1")[1].out == printed.out and part.read_bytes() == data
    assert evaluate.main(["--out", str(part)]) == 0  # scored again, without index and weights
    assert json.loads(Path(f"{part}.scores.json").read_text())["bleu"] == found["bleu"]


def test_another_run_is_refused(world, tmp_path, run):
    out = tmp_path / "out.jsonl"
    assert run(out, "--limit", "1")[0] == 0
    for more, word in (
        (("--limit", "2"), "limit was 1, is 2"),
        (("--limit", "1", "--max-new-tokens", "9"), "max_new_tokens was 8, is 9"),
        (("--limit", "1", "--beams", "2"), "beams"),
    ):
        before = out.read_bytes()
        status, printed = run(out, *more)
        assert status == 2 and word in printed.err and printed.err.count("\n") == 1
        assert out.read_bytes() == before
    record = Path(f"{out}.options.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_sha256": "0" * 64}))
    assert "weights_sha256 was 000000000000, is " in run(out, "--limit", "1")[1].err
    record.unlink()
    for text in (
        "not a prediction\n",
        '{"video": "x", "task": "answer", "question": "", "reference": "", "answer": ""}\n',
    ):
        out.write_text(text)
        status, printed = run(out, "--limit", "1")
        assert status == 2 and printed.err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in printed.err
    Path(f"{out}.options.json").unlink(missing_ok=True)
    out.write_text('{"one": "line without an end"}')  # not a half-written one of ours
    status, printed = run(out, "--limit", "1")
    assert status == 2 and "not written by this program" in printed.err and "one" in out.read_text()
    status, printed = run(tmp_path / "new.jsonl", "--task", "answer", "--limit", "1")
    assert status == 2 and "holds nothing for --task answer" in printed.err


def test_two_runs_do_not_write_to_one_file(world, tmp_path, run, monkeypatch):
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    file = scores.appendable(whole)
    threading.Timer(0.2, file.close).start()  # like the last workers of a run that was killed
    assert run(whole, "--limit", "1")[0] == 0 and whole.read_bytes().count(b"\n") == 1
    with scores.appendable(out):
        monkeypatch.setattr(scores, "LOCK_SECONDS", 0)
        status, printed = run(out, "--limit", "1")
        assert status == 2 and f"error: {out}: another process is writing to it" in printed.err
        assert "Traceback" not in printed.err and out.read_bytes() == b""
    # another run that ends between the first look at the file and the lock
    load = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda *args: shutil.copy(whole, out) and load(*args))
    assert run(out, "--limit", "1")[0] == 0 and out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("world_size", [1, 2])
def test_of_two_runs_that_begin_at_once_one_is_refused(world, tmp_path, monkeypatch, world_size):
    """Both record their options before the other has begun: what the later one answers is not taken over."""

    def stub(model, tokenizer, clips, asked, args):
        for prediction in sum(asked, []):
            prediction |= {"answer": f"{args.max_new_tokens}", "tokens": 1}

    config = evaluate.read_chain(world / "weights")[0]
    monkeypatch.setattr(evaluate, "read_clip", remembered)
    monkeypatch.setattr(evaluate, "load", lambda *_: (SimpleNamespace(config=config), None))
    monkeypatch.setattr(evaluate, "answer_batch", stub)
    out = tmp_path / "out"
    ours = evaluate.parse_args(options(world, out))
    other = evaluate.parse_args(options(world, out, "--max-new-tokens", "9"))
    ranks = range(world_size)

    def predict(args, recorded, rank):
        rows, asked, _ = evaluate.load_index(args)
        return evaluate.predict(rows, asked, args, recorded, rank, world_size)

    message = f"^another run has begun {out} .max_new_tokens was 9, is 8.; give another --out$"
    refused = functools.partial(pytest.raises, ValueError, match=message)
    first = evaluate.record_options(ours)
    second = evaluate.record_options(other)  # no line yet, so both may begin
    for rank in ranks:
        with refused():  # before the other has answered anything
            predict(ours, first, rank)
    for rank in ranks:
        predict(other, second, rank)
        with refused():  # amid its answers, or when it has ended: nothing is left to do
            predict(ours, first, rank)
    asked = evaluate.load_index(ours)[1]
    with refused():
        evaluate.merge(out, asked, first)
    with pytest.raises(ValueError, match="was begun with other options"):
        evaluate.record_options(ours)
    assert {p["answer"] for p in evaluate.merge(out, asked, second)} == {"9"}

    # the same options: both add what is missing
    out.unlink()
    first = evaluate.record_options(ours)
    second = evaluate.record_options(ours)
    for rank in ranks:
        predict(ours, first, rank)
        predict(ours, second, rank)
    assert len(evaluate.merge(out, asked, first)) == len(evaluate.merge(out, asked, second)) == 6


def test_options_are_recorded_under_the_lock(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = evaluate.parse_args(options(world, out))
    monkeypatch.setattr(scores, "LOCK_SECONDS", 0)
    record = Path(f"{out}.options.json")
    with scores.appendable(out), pytest.raises(ValueError, match="another process is writing to it"):
        evaluate.record_options(args)
    assert not record.exists()
    out.write_text("half a line")  # of another program
    with pytest.raises(ValueError, match="was not written by this program"):
        evaluate.record_options(args)
    assert out.read_text() == "half a line" and not record.exists()


def test_help_and_wrong_options_are_for_people(tmp_path, capfd):
    for program, words in ((evaluate, "--judge-rate"), (compare, "--resamples")):
        with pytest.raises(SystemExit, match="0"):
            program.main(["--help"])
        assert words in capfd.readouterr().out
    (tmp_path / "there").touch()
    for wrong in ("", "--out nowhere", f"--out {tmp_path}/there --dry-run", "--out x --judge-rate 0"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(wrong.split())
        assert capfd.readouterr().err.startswith("error: ")


def test_what_is_beside_the_index(world, tmp_path, run):
    """A source of null is no source; a kinds.json that is none of ours is refused before the work."""
    row = json.loads((world / "index.jsonl").read_text().splitlines()[0])
    rows = [row | {"source": None}, row | {"source": "toy"}]
    named = [evaluate.questions(row, "v", evaluate.parse_args(options(world, "x")))[0] for row in rows]
    assert list(evaluate.bleu_per_source(named)["describe"]) == ["", "toy", "all"]
    file = tmp_path / "kinds.json"
    for text in (b"{}", b"[1]", b'{"a": 3}', b"no", b'{"a": "\xff"}', b"[" * 100_000):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"^{file}: "):
            evaluate.read_kinds(file)
    file.write_text('{"a": "é"}', encoding="utf-8-sig")  # as some editors save it
    assert evaluate.read_kinds(file) == {"a": "é"} and detect.read_phrases(file) == ["é"]
    (tmp_path / "clips.json").write_text('{"sentences": {"a": "É."}}', encoding="utf-8-sig")
    assert detect.read_sentences(file) == {"a": "É."}


def test_refusals_are_kept_on_demand(world):
    args = evaluate.parse_args(options(world, "x", "--keep-refusals"))
    rows, asked, counts = evaluate.load_index(args)
    assert counts == {"clips": 6, "skipped": 0, "refused": 0}
    assert asked[1][0]["reference"].startswith("As an AI")


def test_a_loader_worker_that_dies_ends_the_run_and_the_next_one_resumes(world, tmp_path, run, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    here = os.getpid()
    readings = tmp_path / "readings"

    def deadly(path, **options):
        if os.getpid() != here:
            with open(readings, "a") as file:
                file.write("x")
            if readings.stat().st_size == 4:
                time.sleep(0.5)  # until the batches before have been handed over
                os.kill(os.getpid(), signal.SIGKILL)
        return remembered(path, **options)

    assert run(whole)[0] == 0
    monkeypatch.setattr(evaluate, "read_clip", deadly)
    status, printed = run(out, "--workers", "1")
    errors = [line for line in printed.err.splitlines() if "loader worker died" in line]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    assert "again to resume" in errors[0]
    assert "Traceback" not in printed.err
    assert run(out, "--workers", "1")[0] == 0 and out.read_bytes() == whole.read_bytes()


# Runs evaluate with the options of its first line. Then each line holds jobs that run at the same time, as
# [[options, environment, kill]], where kill is [function, n]: SIGKILL instead of its n-th call ("torn": at
# the n-th batch, with half a line written). Answers each line with the exit codes.
FORKS = """
import functools, json, os, signal, sys, traceback
from apps import evaluate
evaluate.read_clip = functools.lru_cache(evaluate.read_clip)
evaluate.main(json.loads(input()))
def child(options, environment, kill):
    os.environ.update(environment)
    if kill:
        name, left = kill
        module, name = (os, name[3:]) if name.startswith("os.") else (evaluate, name)
        torn, name = name == "torn", name.replace("torn", "answer_batch")
        function = getattr(module, name)
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if torn:
                    with open(evaluate.parse_args(options).out, "ab") as file:
                        file.write(b'{"video": "c.mp')
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        setattr(module, name, counted)
    try:
        return evaluate.main(options)
    except SystemExit as stop:
        return stop.code
    except BaseException:
        traceback.print_exc()
        return 99
sys.stdout.flush()
for line in sys.stdin:
    processes = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            os._exit(child(*job))
        processes.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]), flush=True)
"""


def test_kills_and_processes_change_nothing(world, tmp_path):
    """Killed with SIGKILL at any place, and started again, alone or as several processes: the same file."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def ranks(out, kills=(None, None), more=()):
        both = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return [
            [options(world, out, *more), both | {"RANK": str(r), "LOCAL_RANK": "0"}, kills[r]] for r in (0, 1)
        ]

    def alone(out, kill=None):
        return [[options(world, out), {}, kill]]

    kills = [
        ("os.replace", 1),
        ("torn", 2),
        ("answer_batch", 3),
    ]  # before the first record, amid and between clips
    jobs = [options(world, tmp_path / "whole")]
    expected = []
    for i, kill in enumerate(kills):
        jobs += [alone(tmp_path / f"kill{i}", kill), alone(tmp_path / f"kill{i}")]
        expected += [[-signal.SIGKILL], [0]]
    jobs += [ranks(tmp_path / "two"), ranks(tmp_path / "two", more=["--limit", "1"])]
    jobs += [alone(tmp_path / "changed", ("answer_batch", 3)), ranks(tmp_path / "changed")]
    expected += [[0, 0], [2, 2], [-signal.SIGKILL], [0, 0]]
    jobs += [ranks(tmp_path / "one dies", (None, ("answer_batch", 1))), ranks(tmp_path / "one dies")]
    expected += [[2, -signal.SIGKILL], [0, 0]]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input="".join(json.dumps(job) + "\n" for job in jobs), text=True,
        cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert codes == expected, done.stderr
    whole = (tmp_path / "whole").read_bytes()
    assert whole.count(b"\n") == 6
    for name in [f"kill{i}" for i in range(len(kills))] + ["two", "changed", "one dies"]:
        assert (tmp_path / name).read_bytes() == whole, name
        assert not list(tmp_path.glob(f"{name}.rank*"))
    refusals = [line for line in done.stderr.splitlines() if "was begun with other options" in line]
    assert len(refusals) == 1 and "limit was None, is 1" in refusals[0] and "Traceback" not in done.stderr


def detection(world):
    """Further options for --task detect."""
    return ["--annotations", str(world / "labels.jsonl"), "--task", "detect", "--detect", "yes"]


def test_detection(world, tmp_path, run):
    out = tmp_path / "out.jsonl"
    status, printed = run(out, *detection(world))
    assert status == 0 and "broken.mp4" in printed.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    fields = ["video", "task", "question", "answer", "reference", "source", "score", "label"]
    assert list(lines[0]) == fields and [line["video"] for line in lines] == [
        "a b.mp4", "c.mp4", "c0.mp4", "c1.mp4", "c2.mp4", "c3.mp4"
    ]  # fmt: skip
    assert [line["label"] for line in lines] == [0, 1, 1, 0, 1, 0]
    assert [line["reference"] for line in lines] == ["no", "yes", "yes", "no", "yes", "no"]
    assert all(0 < line["score"] < 1 and line["answer"] in ("yes", "no") for line in lines)
    assert all(line["score"] == pytest.approx(lines[1]["score"]) for line in lines[2:])  # the same clip
    found = json.loads(Path(f"{out}.scores.json").read_text())
    assert found["counts"] == {"clips": 7, "skipped": 0, "refused": 0} and found["bleu"] == {}
    assert found["unreadable"] == ["broken.mp4"] and found["threshold"] == 0.5
    assert found["detection"]["all"]["n"] == 6 and list(found["detection"]) == ["", "web", "all"]
    of_web = [line["score"] for line in lines[:2]]
    assert found["detection"]["web"]["auc"] == metrics.roc_auc_score([0, 1], of_web)
    assert "phrases" in found["options"] and "beams" not in found["options"]
    assert "BLEU" not in printed.out and "ROC AUC" in printed.out and "3 of 6" in printed.out

    # scored again without the index; resumed after a kill; refused with another question
    assert evaluate.main(["--out", str(out)]) == 0
    assert json.loads(Path(f"{out}.scores.json").read_text())["detection"] == found["detection"]
    whole = out.read_bytes()
    for cut in (0, whole.index(b"\n") + 1, len(whole) - 30):
        out.write_bytes(whole[:cut])
        assert run(out, *detection(world))[0] == 0 and out.read_bytes() == whole
    kinds = ["--detect", "contrast", "--kinds", str(world / "kinds.json")]
    assert "phrases was None" in run(out, *detection(world), *kinds)[1].err
    contrast = tmp_path / "contrast.jsonl"
    assert run(contrast, *detection(world), *kinds)[0] == 0
    assert all(0 <= json.loads(line)["score"] <= 1 for line in contrast.read_text().splitlines())


def test_wrong_options_of_detection(world, tmp_path, run):
    out = tmp_path / "out.jsonl"
    for wrong in (["--judge", "m"], ["--kinds", "x"], ["--task", "both"]):
        status, printed = run(out, *detection(world), *wrong)
        assert status == 2 and printed.err.count("\n") == 1 and not out.exists()
    status, printed = run(out, "--task", "detect")  # the index of texts
    assert status == 2 and "index.jsonl, line 2: does not say whether the video is normal" in printed.err
    line = {"video": "a", "task": "detect", "question": "", "reference": "no", "answer": "no", "source": ""}
    for wrong in ({}, {"score": 2, "label": 0}, {"score": 0.5, "label": 3}, {"score": "1", "label": 0}):
        written(out, [line | wrong])
        status, printed = run(out, *detection(world))
        assert status == 2 and "line 1: not what this program writes" in printed.err


def test_kills_and_processes_change_no_detection(world, tmp_path):
    """As above: SIGKILL amid and between clips, and two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    both |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

    def alone(name, kill=None):
        return [[options(world, tmp_path / name, *detection(world)), {}, kill]]

    def ranks(name, kill=None):
        flags = options(world, tmp_path / name, *detection(world))
        return [[flags, both | {"RANK": "0"}, None], [flags, both | {"RANK": "1"}, kill]]

    jobs = [alone("killed", ("score_clips", 2)), alone("killed")]
    jobs += [ranks("two"), ranks("one dies", ("score_clips", 1)), ranks("one dies")]
    lines = [options(world, tmp_path / "whole", *detection(world)), *jobs]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input="".join(json.dumps(line) + "\n" for line in lines), text=True,
        cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert codes == [[-signal.SIGKILL], [0], [0, 0], [2, -signal.SIGKILL], [0, 0]], done.stderr
    whole = (tmp_path / "whole").read_bytes()
    assert whole.count(b"\n") == 6
    for name in ("killed", "two", "one dies"):
        assert (tmp_path / name).read_bytes() == whole, name
        scores_of = [json.loads((tmp_path / f"{n}.scores.json").read_text()) for n in (name, "whole")]
        assert scores_of[0]["detection"] == scores_of[1]["detection"]


def test_ranks_that_were_killed_leave_their_answers(world, tmp_path, run, monkeypatch):
    """One process resumes where several were killed, also between the merge and the removal of their
    files."""
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    assert run(whole)[0] == 0
    args = evaluate.parse_args(options(world, out))
    rows, asked, _ = evaluate.load_index(args)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    evaluate.record_options(args)
    ours = evaluate.as_line({"clip": 2, "predictions": lines[1:4]})
    Path(f"{out}.rank1").write_bytes(
        ours + evaluate.as_line({"clip": 3, "predictions": lines[4:5]})[:-9]
    )  # torn
    seen = []
    answer = evaluate.answer_batch
    monkeypatch.setattr(
        evaluate, "answer_batch", lambda m, t, c, a, o: seen.append(a) or answer(m, t, c, a, o)
    )
    assert run(out)[0] == 0 and out.read_bytes() == whole.read_bytes() and len(seen) == 3
    assert not evaluate.parts(out)
    Path(f"{out}.rank1").write_bytes(ours)
    assert run(out)[0] == 0 and out.read_bytes() == whole.read_bytes() and len(seen) == 3
    assert not evaluate.parts(out)


def test_beams_take_no_penalty(world, run, tmp_path):
    status, printed = run(tmp_path / "out", "--beams", "2", "--repetition-penalty", "2")
    assert status == 2 and "--beams excludes --compile and --repetition-penalty" in printed.err


def test_answers_end_with_the_context(world):
    """As in sample.ask, also where a longer prompt is answered beside it."""
    model, tokenizer = sample.load(world / "weights", "cpu")
    clip = read_clip(world / "c.mp4", **clip_options(model.config))
    asked = [{"question": question} for question in ("Who?", "Where is the person who runs? " * 3)]
    prompts = [tokenizer.encode_prompt(p["question"], clip.message, model.config.n_visual) for p in asked]
    model.config.context_length = max(map(len, prompts)) + 4
    args = SimpleNamespace(batch_size=2, beams=1, max_new_tokens=300, repetition_penalty=1.0)
    evaluate.answer_batch(model, tokenizer, [clip], [asked], args)
    for made, prompt in zip(asked, prompts, strict=True):
        alone = sample.ask(model, tokenizer, world / "c.mp4", made["question"])
        assert made["answer"] == alone.answer and len(prompt) + made["tokens"] <= model.config.context_length


def test_rows_that_differ_in_their_source_keep_it(tmp_path):
    """One clip in three sources: what two killed runs left is put where it belongs."""
    asked = [
        [
            {
                "video": "a",
                "task": "answer",
                "question": "q",
                "reference": "r",
                "source": source,
                "answer": source,
            }
        ]
        for source in "abc"
    ]
    written(tmp_path / "out", [asked[1][0]])
    written(tmp_path / "out.rank0", [{"clip": 2, "predictions": asked[2]}])
    assert evaluate.read_done(tmp_path / "out", asked) == [[None], asked[1], asked[2]]


def test_processes_that_do_not_find_each_other_end(monkeypatch):
    monkeypatch.setattr(evaluate, "MEETING", timedelta(seconds=1))
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="did not find each other"):
        evaluate.start_processes(None)


# ------------------------------------------------------------------------------------------------------------
# Scores

WORDS = "a red Car, 1.5 3,x it's 2-3 well-made (so) …! . é".split()
sentences = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def assert_like_sacrebleu(pairs):
    hypotheses, references = map(list, zip(*pairs, strict=True))
    for n, ours in enumerate(evaluate.bleu(hypotheses, references), 1):
        metric = sacrebleu.BLEU(lowercase=True, smooth_method="none", max_ngram_order=n)
        assert ours == pytest.approx(metric.corpus_score(hypotheses, [references]).score / 100, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4))
def test_bleu_equals_sacrebleu(pairs):
    assert_like_sacrebleu(pairs)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.text(max_size=5))
def test_bleu_equals_sacrebleu_on_any_text(texts, end):
    assert_like_sacrebleu([(text + end, text) for text in texts] + [("&quot;a-\nb&lt;", '"a-b <')])


def test_bleu_by_hand():
    assert evaluate.bleu(["", ""], ["a b c", "d"]) == evaluate.bleu([], []) == [0, 0, 0, 0]
    assert evaluate.bleu(["The cat sat down."], ["the cat sat down ."]) == [1, 1, 1, 1]
    assert evaluate.bleu(["a b c"], ["a b d"]) == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5, 0, 0])
    assert evaluate.bleu(["a b", ""], ["a b", "c d"])[:2] == pytest.approx(
        [np.exp(-1)] * 2
    )  # half is not answered
    with pytest.raises(ValueError):
        evaluate.bleu(["a"], [])


def test_rouge_by_hand():
    assert scores.rouge_l("The cat sat on the mat.", "the cat is on the mat") == pytest.approx(10 / 12)
    assert scores.rouge_l("a b c d", "d c b a") == pytest.approx(2 / 8)
    assert scores.rouge_l("a x b", "a b") == pytest.approx(4 / 5)  # words may stand between
    assert scores.rouge_l("It's 1.5 m", "it s 1 5 m") == 1  # split at all that is no letter and no digit
    assert scores.rouge_l("", "a") == scores.rouge_l("a", "") == scores.rouge_l("", "") == 0
    assert scores.rouge_l("é", "é") == 0  # as in rouge-score, which knows a to z only


letters = st.lists(st.sampled_from("abc"), max_size=9)


@settings(deadline=None)
@given(letters, letters)
def test_rouge_finds_the_longest_common_subsequence(made, wanted):
    @functools.cache
    def longest(i, j):
        if not (i and j):
            return 0
        if made[i - 1] == wanted[j - 1]:
            return 1 + longest(i - 1, j - 1)
        return max(longest(i - 1, j), longest(i, j - 1))

    expected = 2 * longest(len(made), len(wanted)) / max(len(made) + len(wanted), 1)
    assert scores.rouge_l(" ".join(made), " ".join(wanted)) == pytest.approx(expected)


def test_rouge_and_lengths_per_source(capsys):
    lines = [("a", "one two", "one two three", 5), ("a", "x", "y", 2), ("b", "one, two", "one two", None)]
    made = []
    for source, answer, reference, tokens in lines:
        line = {"task": "describe", "source": source, "answer": answer, "reference": reference}
        made.append(line | ({"tokens": tokens} if tokens else {}))
    rouge = scores.rouge_per_source(made)
    assert rouge == {"describe": {"a": pytest.approx(0.4), "b": 1.0, "all": pytest.approx(0.6)}}
    lengths = scores.lengths_per_source(made)["describe"]
    assert lengths["a"] == {"words": 1.5, "tokens": 3.5, "reference_words": 2}
    assert lengths["b"]["tokens"] is None and lengths["all"]["tokens"] == 3.5
    found = {"bleu": scores.bleu_per_source(made), "rouge_l": rouge, "lengths": {"describe": lengths}}
    scores.print_scores(found)
    header, a, b, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[-4:] == ["ROUGE-L", "words", "tokens", "predictions"]
    assert a.split()[-4:] == ["0.400", "1.5", "3.5", "2"] and b.split()[-4:] == ["1.000", "2.0", "–", "1"]


def test_kinds_and_facts():
    kinds = {"turn": "turns back", "fire": "catches fire", "normal": "nothing unusual happens"}
    answers = [
        ("turn", "A red car Turns back."),
        ("turn", "It turns back and catches fire."),
        ("fire", "It turns back."),
        ("fire", ""),
        ("normal", "Nothing unusual happens in the far lane."),
    ]
    facts = {"colour": "red", "place": "in the far lane"}
    rows = [facts | {"video": str(i), "kind": kind} for i, (kind, _) in enumerate(answers)]
    predictions = [dict(row, task="describe", answer=a) for row, (_, a) in zip(rows, answers, strict=True)]
    predictions.append({"video": "0", "task": "answer", "kind": "turn", "answer": "A car."})
    found = evaluate.kind_scores(predictions, kinds)
    assert found["kinds"] == {"turn": [1, 2], "fire": [0, 2], "normal": [1, 1]}
    assert found["overall"] == 2 / 5
    assert sorted(found["confusions"]) == [
        ["fire", "none", 1],
        ["fire", "turn", 1],
        ["turn", "turn and fire", 1],
    ]
    assert list(scores.confusion_table(found)) == [
        "kind           1    2    3 several none",
        "  1  turn      1    .    .       1    .",
        "  2  fire      1    .    .       .    1",
        "  3  normal    .    .    1       .    .",
    ]
    assert evaluate.kind_scores(predictions, {"other": "x"})["overall"] is None
    assert not list(scores.confusion_table(evaluate.kind_scores(predictions, {"other": "x"})))
    facts = evaluate.fact_scores(predictions, rows, [row["video"] for row in rows])
    assert facts == {"colour": [1, 5], "object": [0, 0], "place": [1, 5]}  # "ca(tches fi)red" is no colour
    others = [{"colour": 3, "object": ["car"], "place": {"in": "the near lane"}}] + rows[1:]
    facts = evaluate.fact_scores(predictions, others, [row["video"] for row in rows])
    assert facts == {"colour": [0, 4], "object": [0, 0], "place": [1, 4]}
    again = {"video": rows[1]["video"], "qa": []}  # a row with other questions about the same video
    assert (
        evaluate.fact_scores(predictions, [*others, again], [row["video"] for row in [*rows, again]]) == facts
    )


def test_a_source_called_all_has_a_row_of_its_own():
    predictions = [prediction(0, source="all"), prediction(1, "Fire 1.", source="b")]
    assert {name: row["n"] for name, row in scores.bleu_per_source(predictions)["describe"].items()} == {
        "all ": 1, "b": 1, "all": 2
    }  # fmt: skip


def test_kinds_with_awkward_names():
    kinds = {"hit and run": "drives off", "none": "is empty", "fall": "falls", "calm": "is calm"}
    said = {"hit and run": ["drives off", "falls", "falls, is calm"], "none": ["is empty", "hm"], "fall": []}
    predictions = [
        {"task": "describe", "kind": kind, "answer": answer}
        for kind, texts in said.items()
        for answer in texts
    ]
    assert list(scores.confusion_table(evaluate.kind_scores(predictions, kinds))) == [
        "kind                1    2    3 several none",
        "  1  hit and run    1    .    1       1    .",
        "  2  none           .    1    .       .    1",
        "  3  fall           .    .    .       .    .",
    ]


def test_predictions_of_another_make(tmp_path, capfd):
    path = tmp_path / "p"
    line = {"video": "a", "task": "answer", "question": "", "reference": "r", "answer": None}
    wrong = [line, *(line | {"answer": "", key: 5} for key in ("reference", "source", "task", "kind"))]
    wrong += [line | {"answer": "", "tokens": "x"}, line | {"answer": "", "kind": []}]
    for text in (*(json.dumps(line) + "\n" for line in wrong), "[" * 100_000 + "\n", "[]\n", ""):
        path.write_text(text)
        assert evaluate.main(["--out", str(path)]) == 2 and capfd.readouterr().err.count("\n") == 1
    written(path, [line | {"answer": ""}])
    damaged = tmp_path / "p.scores.json"
    for content in (
        b'{"bleu": ',
        b"\xff",
        b"3",
        b'{"kinds": 1}',
        b'{"kinds": {"kinds": {}, "confusions": []}}',
    ):
        damaged.write_bytes(content)
        assert evaluate.main(["--out", str(path)]) == 2
        assert capfd.readouterr().err.startswith(f"error: {damaged}: cannot be read")


def test_a_terminal_that_is_not_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = written(tmp_path / "p", [prediction(0, source="é")])
    for program in (evaluate.main, lambda options: run_program(lambda: compare.main(options[1:]))):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
        try:
            status = program(["--out", out])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        assert status == 0 and b"\\xe9" in shown.getvalue()


@pytest.mark.parametrize("buffered", [True, False])
def test_nobody_reads_what_is_printed(tmp_path, monkeypatch, capfd, buffered):
    """`… | true` ends quietly, as the other programs do, with all that it was to write."""
    out = written(tmp_path / "p", [prediction(0)])
    reading, writing = os.pipe()
    os.close(reading)
    dup2 = os.dup2
    monkeypatch.setattr(os, "dup2", lambda new, _: dup2(new, writing))  # not pytest's own output
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--out", out])
    monkeypatch.delitem(sys.modules, "apps.evaluate")
    with open(writing, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=not buffered))
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("apps.evaluate", run_name="__main__")
        sys.stdout.flush()
    assert stop.value.code == 141 and "error" not in capfd.readouterr().err
    assert json.loads(Path(f"{out}.scores.json").read_text())["bleu"]


# ------------------------------------------------------------------------------------------------------------
# Judge


def prediction(i, answer="A car turns back.", source="toy", task="describe"):
    about = {"video": f"{i}.mp4", "task": task, "question": "What?", "reference": f"Fire {i}."}
    return about | {"answer": answer, "source": source}


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("{'score': 0.675}", 0.675),
        (
            'Sure! Here it is:\n```json\n{\n  "score": 0.4,\n  "why": "2 of 3 match"\n}\n```\nGood, 10/10!',
            0.4,
        ),
        ("<think>score: 0.1? no</think>\nScore: 1.", 1.0),
        ("Perhaps {'score': 0.4}?\n</think>\n{'score': 0.5}", 0.5),
        ("**Score**: `0`", 0.0),
        ("**Score:** 0.8", 0.8),
        ("The score is: 0.8", 0.8),
        ("The score is .5.", 0.5),
        ("```\n0.25\n```", 0.25),
        ('{"result": {"score": "8e-1"}}', 0.8),
        ("score = 0.3 at first; finally {'score': 0.6}", 0.6),
        ("{“score”: “0.5”}", 0.5),
        ("Score: 0.8, to be fair", 0.8),
        ("Score: 0.8\n\n(To be precise, the car is red.)", 0.8),
        ("score: 0.8 (-0.2 for the colour)", 0.8),
    ],
)
def test_marks_are_read(reply, mark):
    assert judge.read_mark(reply) == mark


@pytest.mark.parametrize(
    "reply",
    [
        "", "I cannot judge this.", "{'score': 1.2}", "{'score': -0.1}", "{'score': 7/10}", "score: 70%",
        "score: 0,7", "score: nan", "{'score': 0.2} {'score': 0.9}", "score: 1 out of 10", "score: 0.6-0.8",
        "score: 0 to 1", "{'reasonability_score': 0.5}", "{'score':", "In 3 of 4 cases", "0.5 or 0.6",
        "score: 0.5.1", "<think>score: 0.1", "{'score': 0.1}</think>", "Score: 1 (out of 10)",
        "score: 1, out of 10",
        "{'score': 1 point out of 10}", "score: 1 [/10]",
    ],
)  # fmt: skip
def test_nonsense_is_no_mark(reply):
    with pytest.raises(ValueError, match="no mark"):
        judge.read_mark(reply)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that answers as `plan` says: for the n-th request a reply's words, a status, a
    (status, headers), or bytes; when the plan is over, {'score': 0.5}. It keeps what it was sent, and
    when."""
    plan = []
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                got.append((time.monotonic(), self.path, self.headers["Authorization"], body))
                what = plan.pop(0) if plan else "{'score': 0.5}"
            if what == "slow":
                time.sleep(1.0)
                what = "late"
            if what == "drop":
                return
            status = 200
            headers = {}
            content = b"Unsupported value: temperature"
            if isinstance(what, int):
                status = what
            elif isinstance(what, tuple):
                status, headers = what
            elif isinstance(what, bytes):
                content = what
            else:
                content = json.dumps({"choices": [{"message": {"content": what}}]}).encode()
            length = len(content) * (2 if what == CUT else 1)
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(length)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # it did not wait

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-test\n")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(judge, "TIMEOUT", 0.4)
    yield plan, got
    http.shutdown()
    http.server_close()


CUT = b'{"choices": [{"mess'  # with a Content-Length of twice as much


def marked(tmp_path, n=1, **more):
    predictions = [prediction(i) for i in range(n)]
    return judge.judge(predictions, "m", tmp_path / "r", **({"rate": 1e6} | more))


def test_judge_outlives_a_reply_of_brackets(tmp_path, server):
    server[0].append(b"[" * 200_000)
    assert marked(tmp_path)["failed"] == 0 and len(server[1]) == 4


def test_judge_outlives_a_bad_server(tmp_path, server):
    plan, got = server
    plan += [
        429,
        500,
        "slow",
        CUT,
        b"<html>",
        b'{"choices": []}',
        503,
        "drop",
        (429, {"Retry-After": "0.02"}),
        b"null",
    ]
    found = marked(tmp_path)
    assert found["failed"] == 0
    assert found["scores"]["describe"]["all"] == {
        "reasonability": 0.5,
        "detail": 0.5,
        "consistency": 0.5,
        "n": 1,
        "marks": 3,
    }
    assert len(got) == 13 and {path for _, path, _, _ in got} == {"/v1/chat/completions"}
    assert {key for _, _, key, _ in got} == {"Bearer sk-test"}
    body = got[-1][3]
    assert body["model"] == "m" and body["temperature"] == 0 and "Fire 0." in body["messages"][1]["content"]
    record = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert sorted(line["criterion"] for line in record) == ["consistency", "detail", "reasonability"]


def test_judge_does_not_record_the_key(tmp_path, server, monkeypatch):
    plan, _ = server
    key = "sk-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = f"bad request with Bearer {key}".encode()

    def post(endpoint, body):
        raise urllib.error.HTTPError(endpoint.url, 422, "", {}, io.BytesIO(said))

    plan += [said] * judge.TRIES * 3
    assert marked(tmp_path)["failed"] == 3
    monkeypatch.setattr(judge.Endpoint, "post", post)
    assert marked(tmp_path)["failed"] == 3
    record = (tmp_path / "r").read_text()
    assert key not in record and record.count("Bearer [key]") == 6


def test_judge_asks_again_after_nonsense_and_counts_failures(tmp_path, server, monkeypatch):
    monkeypatch.setattr(judge, "THREADS", 1)
    plan, got = server
    replies = ["no", "{'score': 3}", "```\n{'score': 0.9}\n```", "no", "no", "no"]
    plan += [*replies, 400]  # which also names the temperature
    found = marked(tmp_path)
    scores = found["scores"]["describe"]["toy"]
    assert (scores["reasonability"], scores["detail"], scores["consistency"]) == (0.9, None, 0.5)
    assert found["failed"] == 1
    assert len(got) == 8 and "temperature" not in got[-1][3]
    record = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [line["reply"] for line in record] == [*replies, "{'score': 0.5}"]
    assert [line["mark"] for line in record] == [None, None, 0.9, None, None, None, 0.5]
    assert "3.0" in record[1]["error"]
    assert marked(tmp_path)["failed"] == 0 and len(got) == 9  # only what failed is asked again


def test_a_model_that_takes_only_its_own_temperature_may_say_so_to_many_at_once(
    tmp_path, server, monkeypatch
):
    together = threading.Barrier(3)
    reason = b"Unsupported value: temperature"

    def post(endpoint, body):
        if "temperature" in body:
            together.wait(10)
            raise urllib.error.HTTPError(endpoint.url, 400, "", {}, io.BytesIO(reason))
        return "{'score': 0.5}"

    monkeypatch.setattr(judge.Endpoint, "post", post)
    assert marked(tmp_path)["failed"] == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\nsk-2")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a character that no key has"):
        marked(tmp_path, 2)


def test_judge_resumes(tmp_path, server):
    _, got = server
    whole = marked(tmp_path, 4)
    lines = (tmp_path / "r").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(got) == 12
    (tmp_path / "r").write_bytes(b"".join(lines[:7]) + lines[7][:30])  # killed while it wrote
    cost = judge.cost([prediction(i) for i in range(4)], "m", tmp_path / "r", 60)
    assert cost.startswith("5 requests to m (7 already")
    assert marked(tmp_path, 4) == whole and len(got) == 17
    changed = [prediction(0, "Another answer.")] + [prediction(i) for i in range(1, 4)]
    judge.judge(changed, "m", tmp_path / "r", rate=1e6)
    assert len(got) == 20  # what has changed is marked anew


WORDING = {
    name: f"Mark {name}. {{odd}} {{{{question}}}} R: {{reference}} A: {{answer}} as {{'score': 0.5}}"
    for name in scores.CRITERIA
}


def test_other_prompts(tmp_path, server):
    plan, got = server
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(WORDING))
    prompts = judge.Prompts(file)
    assert prompts.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    odd = prediction(0, answer="It says {reference}, \\1 and {question}.")
    messages = prompts.messages("detail", odd)
    said = (
        "Mark detail. {odd} {What?} R: Fire 0. A: It says {reference}, \\1 and {question}. as {'score': 0.5}"
    )
    assert messages == [{"role": "user", "content": said}]

    # a record of marks for our prompts: nothing of it counts, and nothing of it is lost
    ours = marked(tmp_path)
    assert ours["prompts"] is None and len(got) == 3
    plan += ["{'score': 0.9}"] * 3
    theirs = marked(tmp_path, prompts=prompts)
    assert theirs["prompts"] == prompts.digest and len(got) == 6
    assert got[-1][3]["messages"][0]["content"].startswith("Mark ")
    means = [found["scores"]["describe"]["all"]["detail"] for found in (ours, theirs)]
    assert means == [0.5, 0.9]
    record = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [line["prompts"] for line in record] == [None] * 3 + [prompts.digest] * 3
    assert marked(tmp_path) == ours and marked(tmp_path, prompts=prompts) == theirs and len(got) == 6
    cost = judge.cost([prediction(0)], "m", tmp_path / "r", 60, prompts)
    assert cost.startswith("0 requests to m (3 already")
    file.write_text(json.dumps(WORDING | {"detail": "{reference} {answer}"}))
    assert (
        marked(tmp_path, prompts=judge.Prompts(file)) != theirs and len(got) == 9
    )  # one word is another file


def test_wrong_prompts_are_one_line(world, tmp_path, run):
    file = tmp_path / "prompts.json"
    flags = ["--judge", "m", "--judge-prompts", str(file)]
    lacking = WORDING | {"detail": "Mark {answer}."}
    for text in (
        "no",
        "[]",
        "{}",
        "3",
        json.dumps(WORDING | {"more": ""}),
        '{"detail": 3}',
        json.dumps(lacking),
    ):
        file.write_text(text)
        status, printed = run(tmp_path / "p", *flags)
        assert status == 2 and printed.err.startswith(f"error: {file}: "), text
        assert printed.err.count("\n") == 1 and not (tmp_path / "p").exists()
    file.unlink()
    assert run(tmp_path / "p", *flags)[0] == 2
    assert run(tmp_path / "p", "--judge-prompts", str(file))[0] == 2  # without --judge


def test_judge_keeps_its_rate_and_waits_as_told(tmp_path, server, monkeypatch):
    plan, got = server
    marked(tmp_path, 2, rate=1200)
    times = [t for t, *_ in got]
    assert times[-1] - times[0] > 5 * 0.05 * 0.8
    (tmp_path / "r").unlink()
    plan += [(429, {"Retry-After": "0.3"})]
    marked(tmp_path, 1, rate=3000)
    assert got[-1][0] - got[6][0] > 0.3
    pace = judge.Pace(1e9)
    pace.hold(0.2)  # as one request is told to wait, all others do
    start = time.monotonic()
    pace.wait()
    assert time.monotonic() - start > 0.15
    held = []
    monkeypatch.setattr(judge.Pace, "hold", lambda _, seconds: held.append(seconds))
    (tmp_path / "r").unlink()
    plan += [(429, {"Retry-After": "0.02"})]
    marked(tmp_path, 1)
    assert held == [0.02]
    assert judge.seconds_until("Wed, 21 Oct 2015 07:28:00 GMT", 5) == 0
    assert judge.seconds_until("soon", 5) == 5
    assert judge.seconds_until("Mon, 01 Jan 99999999999999 00:00:00 GMT", 5) == 5


def test_judge_gives_up_in_one_line(world, tmp_path, server, capfd, monkeypatch):
    plan, got = server
    path = tmp_path / "p"
    written(path, [prediction(i) for i in range(8)])

    def judged(*more):
        capfd.readouterr()
        status = evaluate.main(["--out", str(path), "--judge", "m", "--judge-rate", "1e6", *more])
        return status, capfd.readouterr()

    status, printed = judged("--dry-run")
    assert status == 0 and printed.out.startswith("24 requests to m (0 already answered), about ") and not got
    assert printed.out.endswith("nothing was sent\n") and not (tmp_path / "p.judge.jsonl").exists()
    assert evaluate.main([*options(world, tmp_path / "none"), "--judge", "m", "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("12 requests")  # 5 answers; two of them ask the same twice
    elsewhere = (302, {"Location": "http://127.0.0.1:1/"})
    for answer, word in ((401, "HTTP 401"), (elsewhere, "HTTP 302"), (422, "in a row failed")):
        plan[:] = [answer] * 40
        status, printed = judged()
        errors = [line for line in printed.err.splitlines() if "error:" in line]
        assert status == 2 and len(errors) == 1 and word in errors[0] and "Traceback" not in printed.err
        assert "sk-test" not in printed.err
    assert "file:" in judged("--judge-url", "file:///etc")[1].err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY" in judged("--judge-url", "https://api.openai.com/v1")[1].err
    plan.clear()
    status, printed = judged()
    assert status == 0 and "0.500    0.500    0.500    0.000     4.0       –            8" in printed.out
    assert "judge: m, 0 marks failed" in printed.out
    assert json.loads((tmp_path / "p.scores.json").read_text())["judge"]["model"] == "m"


# ------------------------------------------------------------------------------------------------------------
# Comparison


def test_comparison_of_known_cases(tmp_path, capfd):
    right = [prediction(i, f"Fire {i}." + " smoke" * (i * i % 7), "ab"[i % 2]) for i in range(40)]
    wrong = [p | {"answer": "Nothing at all happens."} for p in right]
    a = written(tmp_path / "a", right)
    b = written(tmp_path / "b", wrong)
    lines, alone = compare.compare([a, a])
    assert alone == 0 and {line["source"] for line in lines} == {"a", "b", "all"} and len(lines) == 18
    assert all(line["difference"] == line["low"] == line["high"] == 0 for line in lines)
    lines, _ = compare.compare([b, a])
    for line in lines[:2] + lines[6:8] + lines[12:14]:
        assert line["low"] > 0 and line["low"] <= line["difference"] <= line["high"]
        of = [i for i, p in enumerate(right) if line["source"] in ("all", p["source"])]
        for predictions, score in ((wrong, line["a"]), (right, line["b"])):
            scores = evaluate.bleu(
                [predictions[i]["answer"] for i in of], [right[i]["reference"] for i in of]
            )
            assert score == pytest.approx(scores[int(line["metric"][-1]) - 1])
        assert line["clips"] == len(of)
    assert compare.compare([b, a])[0] == lines != compare.compare([b, a], seed=1)[0]
    mirrored = compare.compare([a, b])[0]
    assert [line["low"] for line in mirrored] == pytest.approx([-line["high"] for line in lines])
    assert compare.main([b, a]) == 0 and compare.main([b, written(tmp_path / "c", right[:30])]) == 0
    printed = capfd.readouterr()
    assert "describe, all, 40 clips" in printed.out and "]*" in printed.out.replace(" ", "")
    assert "10 predictions" in printed.err
    assert compare.main([a, "nowhere"]) == compare.main([a, written(tmp_path / "d", [prediction(99)])]) == 2
    assert capfd.readouterr().err.count("\n") == 2


def test_interval_of_a_mean():
    """For the mean of one number a clip the interval is known: ±1.96 standard errors; questions of a clip go
    together."""
    x = np.random.default_rng(1).normal(size=400)
    counts = np.stack([x, np.ones(400)], axis=1)
    (a, b), low, high = compare.intervals([counts * [0, 1], counts], np.arange(400), compare.ratio, 2000)
    error = x.std() / 20
    assert (a, b) == (0, pytest.approx(x.mean())) and low == pytest.approx(b - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(b + 1.96 * error, abs=0.2 * error)
    four = np.repeat(counts, 4, 0)
    tied = compare.intervals([four * [0, 1], four], np.repeat(np.arange(400), 4), compare.ratio, 2000)
    assert tied[1] == pytest.approx(low) and tied[2] == pytest.approx(high)
    alone = compare.intervals([counts], np.arange(400), compare.ratio, 2000)  # the other one is always 0
    assert alone[0] == [b] and alone[1] == pytest.approx(low) and alone[2] == pytest.approx(high)


def test_resamples_are_not_held_all_at_once():
    """1000 resamples of 1000 clips are 8 MB, twice; the draws are those of a single call."""
    clips = np.arange(1000)
    rows = np.stack([np.sin(clips), np.ones(1000)], axis=1)
    tracemalloc.start()
    _, low, high = compare.intervals([rows], clips, compare.ratio, 1000, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
    drawn = np.random.default_rng(3).multinomial(1000, np.full(1000, 1 / 1000), 1000)
    expected = np.percentile(drawn @ rows[:, 0] / 1000, [2.5, 97.5])
    assert [*low, *high] == pytest.approx(expected, abs=1e-12)


def test_judges_and_kinds_are_compared(tmp_path):
    ours = [prediction(i, "It turns back." if i < 6 else "Fire.") | {"kind": "turn"} for i in range(8)]
    theirs = [p | {"answer": "Nothing."} for p in ours]
    paths = [written(tmp_path / name, ps) for name, ps in (("a", ours), ("b", theirs))]
    for path, ps, mark in zip(paths, (ours, theirs), (0.75, 0.25), strict=True):
        lines = [
            {"key": judge.key_of("m", c, p), "model": "m", "mark": mark}
            for p in ps[:7]
            for c in scores.CRITERIA
        ]
        written(Path(f"{path}.judge.jsonl"), lines)
    compared, _ = compare.compare(paths, {"turn": "turns back"})
    lines = {line["metric"]: line for line in compared if line["source"] == "all"}
    assert lines["kind named"]["a"] == 0.75 and lines["kind named"]["b"] == 0
    assert lines["kind named"]["high"] < 0
    for criterion in scores.CRITERIA:
        line = lines[f"{criterion} (m)"]
        assert (line["a"], line["b"], line["low"], line["high"]) == (0.75, 0.25, -0.5, -0.5)


def test_detection_is_compared(tmp_path, capfd):
    """The numbers are scikit-learn's, and so are those of each resample."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 2, 40)
    worse = random.random(40).round(1)
    better = np.clip(worse + 0.3 * (2 * labels - 1), 0, 1)
    paths = []
    for name, values in (("a", worse), ("b", better)):
        lines = []
        for i, (label, value) in enumerate(zip(labels.tolist(), values.tolist(), strict=True)):
            line = {"video": f"{i}.mp4", "task": "detect", "question": "?", "answer": "yes", "source": "s"}
            lines.append(line | {"reference": "ny"[label], "score": value, "label": label})
        paths.append(written(tmp_path / name, lines))

    def sklearns(values, y):
        called = values >= 0.5
        areas = [metrics.roc_auc_score(y, values), metrics.average_precision_score(y, values)]
        return np.array([*areas, metrics.accuracy_score(y, called), metrics.f1_score(y, called)])

    drawn = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), 150)
    # np.unique, which numbers the clips, sorts their names
    order = np.argsort([f"{i}.mp4" for i in range(40)])
    resampled = []
    for counts in drawn:
        y = np.repeat(labels[order], counts)
        resampled.append([sklearns(np.repeat(values[order], counts), y) for values in (worse, better)])
    resampled = np.array(resampled)
    found, alone = compare.compare(paths, resamples=150, seed=5)
    of_all = [line for line in found if line["source"] == "all"]
    assert alone == 0 and [line["metric"] for line in of_all] == ["ROC AUC", "av. prec.", "accuracy", "F1"]
    low, high = np.percentile(resampled[:, 1] - resampled[:, 0], [2.5, 97.5], axis=0)
    for i, line in enumerate(of_all):
        assert line["a"] == pytest.approx(sklearns(worse, labels)[i])
        assert line["b"] == pytest.approx(sklearns(better, labels)[i])
        assert (line["low"], line["high"]) == (pytest.approx(low[i]), pytest.approx(high[i]))

    # of one file: its own interval
    found, _ = compare.compare(paths[1:], resamples=150, seed=5)
    low, high = np.percentile(resampled[:, 1], [2.5, 97.5], axis=0)
    assert [line["low"] for line in found[:4]] == pytest.approx(low.tolist())
    assert [line["high"] for line in found[:4]] == pytest.approx(high.tolist())
    assert "b" not in found[0] and "difference" not in found[0]
    assert compare.main(paths) == 0 and "ROC AUC" in capfd.readouterr().out
    assert compare.main(paths[:1]) == 0 and "  accuracy " in capfd.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([*paths, paths[0]])
    assert capfd.readouterr().err.startswith("error: give one or two files")


def test_a_number_that_one_file_lacks_is_left_out(tmp_path):
    """F1 where no video is abnormal, and only one file calls one so."""
    paths = []
    for name, score in (("a", 0.9), ("b", 0.1)):
        line = {"video": "v", "task": "detect", "question": "?", "answer": "no", "reference": "no"}
        paths.append(written(tmp_path / name, [line | {"score": score, "label": 0}]))
    for pair in (paths, paths[::-1]):
        assert {line["metric"] for line in compare.compare(pair)[0]} == {"accuracy"}


def test_marks_of_other_prompts_are_compared_apart(tmp_path):
    paths = []
    for name, mark in (("a", 0.25), ("b", 0.75)):
        made = [prediction(i) for i in range(3)]
        path = written(tmp_path / name, made)
        lines = [
            {"key": judge.key_of("m", "detail", p, digest), "model": "m", "prompts": digest, "mark": value}
            for p in made
            for digest, value in ((None, 0.5), ("d" * 64, mark))
        ]
        written(Path(f"{path}.judge.jsonl"), lines)
        paths.append(path)
    lines, _ = compare.compare(paths)
    found = {line["metric"]: (line["a"], line["b"]) for line in lines if line["source"] == "all"}
    assert found["detail (m)"] == (0.5, 0.5) and found["detail (m, prompts dddddddd)"] == (0.25, 0.75)


def test_the_papers_row_stands_beside_hawks_own_videos_only(capsys):
    bleu = {"bleu": [0.1, 0.1, 0.1, 0.1], "n": 1}
    for source, told in (("DoTA", True), ("mine", False)):
        sources = {source: bleu, "all": bleu}
        lengths = dict.fromkeys(sources, {"words": 1, "tokens": 1})
        scores.print_task("describe", sources, {}, dict.fromkeys(sources, 0.1), lengths)
        assert ("0.043    0.283    0.320    0.218" in capsys.readouterr().out) == told
