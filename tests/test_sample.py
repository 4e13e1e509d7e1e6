"""Asking with a small random model: what goes where, exit status, determinism, chat."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from conftest import TEXT

import sample

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def loaded(world):
    return sample.load(world / "weights", "cpu")


@pytest.fixture
def cli(world, capfd):
    """sample.py's main with these options -> (exit status, stdout, lines of stderr)"""

    def run(*options):
        capfd.readouterr()
        try:
            status = sample.main(["--weights", str(world / "weights"), "--device", "cpu", *map(str, options)])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err.splitlines()

    return run


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


def test_one_answer_on_stdout(world, cli):
    clip = world / "a b.mp4"
    status, out, err = cli("--video", clip, "--max-new-tokens", 12)
    assert status == 0 and len(err) == 2
    assert "toy world only" in err[0] and err[1].startswith(f"{clip}: read ") and "(12 tokens, " in err[1]
    assert cli("--video", clip, "--max-new-tokens", 12)[1] == out  # greedy: same input, same words
    assert json.loads(cli("--video", clip, "--max-new-tokens", 12, "--json")[1])["answer"] + "\n" == out


def test_json_and_broken_videos(world, cli):
    paths = [str(world / name) for name in ("a b.mp4", "broken.mp4", "missing.mp4", "c.mp4")]
    status, out, err = cli("--video", *paths[:2], "--video", *paths[2:], "--question", "Who?", "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [o["video"] for o in objects] == [paths[0], paths[3]]
    for o in objects:
        assert list(o) == ["video", "question", "answer", "seconds", "tokens", "peak_memory_mb"]
        assert list(o["seconds"]) == ["read", "encode", "generate"] and min(o["seconds"].values()) > 0
        assert o["question"] == "Who?" and 0 < o["tokens"] <= 128 and o["peak_memory_mb"] > 50
    assert len(err) == 3 and [line.split(".mp4")[0] for line in err[1:]] == [f"error: {p[:-4]}" for p in paths[1:3]]
    assert cli("--video", paths[0], paths[3])[1].splitlines()[1].startswith(f"{paths[3]}: ")


def test_generation_options(world, cli):
    def answer(*options):
        status, out, _ = cli("--video", world / "c.mp4", "--max-new-tokens", 10, *options)
        assert status == 0
        return out

    warm = [answer("--temperature", 1.5, "--top-p", 0.95, "--seed", seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert answer("--temperature", 1.5, "--top-p", 1e-6) == answer()
    assert answer("--beams", 3) == answer("--beams", 3)
    assert answer("--system", "Be brief.") != answer("--repetition-penalty", 5) != answer()


@pytest.mark.parametrize(
    "options",
    ["", "--video x --beams 0", "--video x --top-p nan", "--video x --beams 2 --temperature 1", "--chat --json",
     "--video x --device nowhere", "--video x --weights nowhere", "--video x --max-new-tokens many", "--nonsense"],
)  # fmt: skip
def test_wrong_options_are_one_line(cli, options):
    status, out, err = cli(*options.split())
    assert status == 2 and out == "" and len(err) == 1 and err[0].startswith("error: ")


def test_wrong_questions(world, cli):
    for question in (" ", "why " * 1000):
        status, out, err = cli("--video", world / "c.mp4", "--question", question)
        assert status == 2 and out == "" and err[-1].startswith("error: the question is ")


def test_weights_and_tokenizer_must_fit(world, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(world / "weights" / name)
    with pytest.raises(ValueError, match="no such tokenizer file"):
        sample.load(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, minloglevel=2
    )
    with pytest.raises(ValueError, match="has 30 pieces"):
        sample.load(tmp_path)


def test_words_appear_whole(world, loaded, monkeypatch):
    """Letters of several byte tokens reach on_text only when complete, and the pieces join to the answer."""
    model, tokenizer = loaded
    made, pieces = tokenizer.sp.encode("Ein rüder Käfer: 火事 ") + [tokenizer.eos], []

    def generate(*_, on_token, **__):
        for token in made:
            on_token([token])
        return [made]

    monkeypatch.setattr(model, "generate", generate)
    answer = sample.ask(model, tokenizer, world / "c.mp4", on_text=pieces.append).answer
    assert "".join(pieces) == answer == "Ein rüder Käfer: 火事"
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 10


# ----------------------------------------------------------------------------------------------------------------------
# Chat


def chat(loaded, **generation):
    return sample.Chat(*loaded, " ", {"max_new_tokens": 20, **generation})


def test_chat_through_a_pipe(world):
    clip, saved = world / "a b.mp4", world / "saved.jsonl"
    lines = ["What?", "", "/save", "/bogus", "/video nowhere.mp4", "Wer fährt?", f"/save {saved}"]
    command = [sys.executable, ROOT / "sample.py", "--weights", world / "weights", "--chat", "--video", clip]
    options = {"input": "\n".join(lines), "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run([*command, "--device", "cpu"], env=os.environ | {"PYTHONIOENCODING": "utf-8"}, **options)
    err = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in err if line.startswith("error:")] == [
        "error: /save needs a path",
        "error: no command /bogus; /help lists them",
        next(line for line in err if "nowhere.mp4" in line),
    ]
    times = [line for line in err if line.startswith("first word ")]
    assert len(times) == 2 and "read" in times[0] and "read" not in times[1]
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    assert row["video"] == str(clip) and [turn["q"] for turn in row["qa"]] == ["What?", "Wer fährt?"]
    assert done.stdout.split() == " ".join(turn["a"] for turn in row["qa"]).split()


def test_chat_remembers_and_forgets(world, loaded, capsys, monkeypatch):
    prompts, generate = [], loaded[0].generate
    monkeypatch.setattr(
        loaded[0], "generate", lambda a, m, ids, *r, **k: prompts.append(ids[0]) or generate(a, m, ids, *r, **k)
    )
    c = chat(loaded)
    assert c.run(["What is it?"]) == 2  # no video yet
    c.open(world / "a b.mp4")
    assert c.run(["What is it?"] * 20) == 0
    encode, first = loaded[1].encode_prompt, (c.transcript[0]["qa"][0]["q"], c.transcript[0]["qa"][0]["a"])
    message = c.seen.clip.message
    assert prompts[0] == encode("What is it?", message) and prompts[1] == encode(
        "What is it?", message, history=[first]
    )
    assert all(len(p) + 20 <= 512 for p in prompts) and len(c.history) < 20 == len(c.transcript[0]["qa"])
    assert "forgot the 1 oldest round(s)" in capsys.readouterr().err
    c.obey("/new")
    assert c.history == []
    c.obey("What is it?")
    assert prompts[-1] == prompts[0]


def test_ctrl_c_stops_the_answer_only(world, loaded, capsys, monkeypatch):
    generate = loaded[0].generate

    def interrupted(*args, on_token, **kwargs):
        def stop(tokens):
            on_token(tokens)
            raise KeyboardInterrupt

        return generate(*args, on_token=stop, **kwargs)

    c = chat(loaded)
    c.open(world / "c.mp4")
    monkeypatch.setattr(loaded[0], "generate", interrupted)
    lines = iter(["What?", "/new"])
    c.history = [("Who?", "A dog.")]
    assert c.run(lines) == 0 and c.history == []  # it went on to /new
    assert "stopped" in capsys.readouterr().err


def test_typed_lines_survive_bad_bytes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\nb"), encoding="utf-8"))
    assert list(sample.typed_lines()) == ["a\ufffd\n", "b"]
