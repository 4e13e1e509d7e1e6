"""The ablation: what is run and what is shared, resuming, the tables; and one run of it with real
training."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

import prepare
from apps import ablate
from apps.scores import kind_scores
from hawk import read_chain

ROOT = Path(__file__).resolve().parents[2]
CAR = {"kind": "wrong_way", "object": "car", "place": "near lane", "motion": "car drives"}
DOG = {"kind": "normal", "object": "dog", "place": "road", "motion": "nothing happens"}
TEXTS = [
    ("a b.mp4", CAR, "A red car drives the wrong way in the near lane.", "It is a car."),
    ("c.mp4", DOG, "Nothing unusual happens on the road.", "It is a dog."),
]


@pytest.fixture(scope="module")
def world(world):
    """The folder of weights and clips, with an index of them, as the toy world has it, and their cache."""
    rows = []
    for video, facts, description, answer in TEXTS:
        row = {"video": video, "description": description, "qa": [{"q": "What is it?", "a": answer}]}
        rows.append(row | facts | {"colour": "red", "moment": "throughout the clip", "scene": "a park road"})
    for split in ("train", "test"):
        (world / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "examples" / "kinds.json", world)
    command = ["features", "--weights", world / "weights", "--data", world, "--out", world / "features"]
    prepare.main([*map(str, command), "--device", "cpu", "--dtype", "float32", "--workers", "0"])
    return world


def options(world, out, *more):
    paths = ["--weights", world / "weights", "--features", world / "features", "--data", world, "--out", out]
    return [*map(str, paths), "--dtype", "float32", "--batch-size", "2", "--limit", "2", *more]


def value_of(command, option):
    return command[command.index(option) + 1]


class Launches:
    """Stands in for `launch`: remembers the commands, leaves the files behind that they would write."""

    def __init__(self, fail_at=None):
        self.commands = []
        self.fail_at = fail_at

    def __call__(self, log, *command, threads):
        command = [str(x) for x in command]
        if len(self.commands) == self.fail_at:
            raise ValueError("stopped")
        self.commands.append(command)
        out = Path(value_of(command, "--out"))
        if "prepare.py" in command:
            out.mkdir()
            return
        if "apps.towers" in command:
            (out / "last").mkdir(parents=True)
            cosine = None if "without-motion/" in str(out) else 0.5
            line = {"step": 1, "bias_cosine": cosine, "held_out_video_language": 1.0}
            (out / "log.jsonl").write_text(json.dumps(line) + "\n")
            return
        right = (2 if "without-motion/" in str(out) else 8) + int(re.search(r"seed(\d)", str(out))[1])
        kinds = {"normal": [10, 10], "speeding": [right, 10], "fire": [5, 10]}
        scores = {"kinds": {"kinds": kinds}, "facts": {fact: [3, 4] for fact in ablate.FACTS}}
        scores["bleu"] = {"describe": {"all": {"bleu": [0.4, 0.3, 0.2, 0.1 * right]}}}
        Path(f"{out}.scores.json").write_text(json.dumps(scores))


def test_five_variants_that_differ_in_what_they_should(world, tmp_path, monkeypatch, capsys):
    launches = Launches()
    monkeypatch.setattr(ablate, "launch", launches)
    assert (
        ablate.main(options(world, tmp_path, "--seeds", "2", "--jobs", "3", "--steps", "30", "5", "6")) == 0
    )
    merged = [command for command in launches.commands if "prepare.py" in command]
    trained = [command for command in launches.commands if "apps.towers" in command]
    assert len(trained) == 2 * (2 + 5 * 2) and len(launches.commands) == len(merged) + len(trained) + 2 * 5
    assert len(merged) == 1 and value_of(merged[0], "--set") == "branches=appearance"
    blind_towers = value_of(merged[0], "--out")
    starts = [value_of(command, "--weights") for command in trained if "--facts-only" in command]
    assert sorted(starts) == sorted([blind_towers, str(world / "weights")] * 2)
    plain = set()  # the commands without what may differ: all of a step and seed are the same
    for command in trained:
        settings = {command[i + 1] for i, word in enumerate(command) if word == "--set"}
        folder = value_of(command, "--out")
        blind = "without-motion/" in folder
        assert ("consistency=debiased" in settings) == ("debiased" in folder)
        assert ("consistency_weight=0" in settings) == (blind or "without-consistency/" in folder)
        assert ("motion_language_weight=0" in settings) == (blind or "without-motion-language/" in folder)
        if folder.endswith("captions"):
            start = value_of(command, "--weights")
            assert f"/branches-{'appearance' if blind else 'all'}/facts/last" in start
            assert re.search(r"seed\d", start)[0] == re.search(r"seed\d", folder)[0]
        paths = {"--out", "--weights", "--set"}
        plain.add(" ".join(word for i, word in enumerate(command) if not {word, command[i - 1]} & paths))
    assert len(plain) == 2 * 3
    sizes = {re.search(r"--steps (\d+) .*--batch-size (\d+)", command).groups() for command in plain}
    assert sizes == {("30", "8"), ("5", "2"), ("6", "2")}

    table, kinds = capsys.readouterr().out.split("\n\n")
    assert table + "\n\n" + kinds == (tmp_path / "table.md").read_text()
    rows = {row.split(" | ")[0].strip("| "): row.strip("|").split(" | ") for row in table.splitlines()}
    assert list(rows)[2:] == list(ablate.VARIANTS)
    named = dict(zip(map(str.strip, rows["variant"]), map(str.strip, rows["without motion"]), strict=True))
    assert named["motion-only kinds"] == "0.350 ± 0.071" and named["other kinds"] == "0.750 ± 0.000"
    assert named["all kinds"] == f"{18.5 / 30:.3f} ± {statistics.stdev([18 / 30, 19 / 30]):.3f}"
    assert named["BLEU-4"] == "0.350 ± 0.071" and named["bias cosine"] == "–" and named["seeds"] == "2"
    assert "| 0.500 ± 0.000 | 2 |" in table
    assert "| speeding † | 19/20 | 7/20 | 19/20 | 19/20 | 19/20 |" in kinds and "| fire | 10/20 |" in kinds
    assert (tmp_path / "ablation.png").stat().st_size > 5000


def test_it_resumes_where_it_stopped(world, tmp_path, monkeypatch, capsys):
    """Stopped before each launch in turn: what was done is not done again, and the table is that of an
    undisturbed run."""
    chosen = ["--seeds", "1", "--jobs", "1", "--variants", "full", "without motion"]
    whole = Launches()
    monkeypatch.setattr(ablate, "launch", whole)
    assert ablate.main(options(world, tmp_path / "whole", *chosen)) == 0
    table = capsys.readouterr().out
    done = []
    for _ in whole.commands:
        launches = Launches(fail_at=1)
        monkeypatch.setattr(ablate, "launch", launches)
        status = ablate.main(options(world, tmp_path / "stopped", *chosen))
        done += launches.commands
        assert status == (0 if len(done) == len(whole.commands) else 2)
    steps = []
    for folder, commands in (("whole", whole.commands), ("stopped", done)):
        written = [value_of(command, "--out") for command in commands]
        steps.append([out.removeprefix(str(tmp_path / folder)) for out in written])
    assert steps[0] == steps[1] and len(set(steps[0])) == len(steps[0]) == 9
    assert capsys.readouterr().out == table
    results = tmp_path / "stopped" / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])  # killed while writing the last line: scored again
    launches = Launches()
    monkeypatch.setattr(ablate, "launch", launches)
    assert ablate.main(options(world, tmp_path / "stopped", *chosen)) == 0
    assert capsys.readouterr().out == table
    assert [command[:2] for command in launches.commands] == [["-m", "apps.evaluate"]]


def test_other_options_do_not_share_a_table(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ablate, "launch", Launches())
    chosen = ["--seeds", "1", "--variants", "full"]
    assert ablate.main(options(world, tmp_path, *chosen)) == 0
    assert ablate.main(options(world, tmp_path, *chosen, "--steps", "1", "2", "3")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "another steps" in error
    nowhere = ["--weights", str(tmp_path / "nowhere")]
    assert ablate.main(options(world, tmp_path / "other", *chosen, *nowhere)) == 2
    assert "nowhere" in capfd.readouterr().err.splitlines()[-1]


def test_a_real_run(world, tmp_path, capfd):
    """Two steps of everything, without motion: apps.towers and apps.evaluate write what the table needs."""
    chosen = ["--seeds", "1", "--variants", "without motion", "--jobs", "1", "--steps", "2", "2", "2"]
    assert ablate.main(options(world, tmp_path, *chosen)) == 0, capfd.readouterr().err
    assert "| without motion |" in capfd.readouterr().out
    run = tmp_path / "seed1" / "without-motion"
    config = read_chain(run / "questions" / "last")[0]
    assert config.branches == ("appearance",)
    assert config.motion_language_weight == config.consistency_weight == 0
    result = json.loads((tmp_path / "results.jsonl").read_text())
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    kinds = json.loads((world / "kinds.json").read_text())
    assert len(predictions) == 2 and result["kinds"] == kind_scores(predictions, kinds)["kinds"]
    assert result["held_out_loss"] > 0 and result["bias_cosine"] is None


def test_a_step_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"log\.txt: `-c` ended with status 1: error: no towers$"):
        ablate.launch(
            tmp_path / "log.txt", "-c", "print('working'); raise SystemExit('error: no towers')", threads=1
        )
    ablate.launch(
        tmp_path / "log.txt", "-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '3'", threads=3
    )
