"""Asking with a small random model: what goes where, exit status, determinism, chat."""

import io
import json
import os
import pty
import re
import readline
import select
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import pairwise
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


# ---- Answers -----------------------------------------------------------------------------------------------


def test_one_answer_on_stdout(world, cli):
    clip = world / "a b.mp4"
    status, out, err = cli(clip, "--max-new-tokens", 12)
    assert status == 0 and len(err) == 2
    assert err[0].startswith(f"{clip}: the answer was cut after 12 tokens; --max-new-tokens ")
    assert err[1].startswith(f"{clip}: read ") and "(12 tokens, " in err[1]
    assert cli("--video", clip, "--max-new-tokens", 12)[1] == out  # greedy: same input, same words
    assert json.loads(cli("--video", clip, "--max-new-tokens", 12, "--json")[1])["answer"] + "\n" == out


def test_an_answer_that_fills_the_context(world, loaded, monkeypatch):
    seen = sample.encode_video(loaded[0], world / "a b.mp4")
    length = len(loaded[1].encode_prompt("Who?", seen.clip.message, loaded[0].config.n_visual))
    monkeypatch.setattr(loaded[0].config, "context_length", length + 7)
    answer = sample.ask(*loaded, seen, "Who?")
    assert answer.notes == ["the answer was cut after 7 tokens; the context is full"]


def test_json_and_broken_videos(world, cli):
    paths = [str(world / name) for name in ("a b.mp4", "broken.mp4", "missing.mp4", "c.mp4")]
    status, out, err = cli("--video", *paths[:2], "--question", "Who?", "--json", *paths[2:])
    objects = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [o["video"] for o in objects] == [paths[0], paths[3]]
    for o in objects:
        assert list(o) == ["video", "question", "answer", "seconds", "tokens", "peak_memory_mb", "notes"]
        assert list(o["seconds"]) == ["read", "encode", "generate"] and min(o["seconds"].values()) > 0
        assert o["question"] == "Who?" and 0 < o["tokens"] <= 300 and o["peak_memory_mb"] > 50
        assert o["notes"] == ["the answer was cut after 300 tokens; --max-new-tokens sets the limit"]
    assert [line.split(".mp4")[0] for line in err] == [f"error: {path[:-4]}" for path in paths[1:3]]
    assert cli("--video", paths[0], paths[3])[1].splitlines()[1].startswith(f"{paths[3]}: ")


def test_notes_on_a_clip_are_shown(world, cli, monkeypatch):
    read_clip = sample.data.read_clip

    def noted(*args, **options):
        clip = read_clip(*args, **options)
        clip.notes.append("one frame is damaged")
        return clip

    monkeypatch.setattr(sample.data, "read_clip", noted)
    options = ["--video", world / "c.mp4", "--max-new-tokens", 2]
    assert cli(*options)[2][0] == f"{world / 'c.mp4'}: one frame is damaged"
    assert json.loads(cli(*options, "--json")[1])["notes"][:-1] == ["one frame is damaged"]


def test_only_the_bundled_weights_are_introduced(world, capsys):
    bundled = ROOT / "weights" / "tiny"
    command = ["--video", str(world / "c.mp4"), "--max-new-tokens", "1", "--device", "cpu"]
    for folder, count in ((bundled, 1), (world / "weights", 0)):
        assert sample.main([*command, "--weights", str(folder)]) == 0
        assert capsys.readouterr().err.count("knows the toy world only") == count


@pytest.mark.parametrize(
    ("n", "last", "note"),
    [(1, 0, "few frames"), (2, 1, "few frames"), (3, 60, None), (4, 81, "apps.timeline"),
     (32, 601, "apps.timeline"), (32, 600, None)],
)  # fmt: skip
def test_notes_on_what_the_frames_cannot_show(loaded, world, monkeypatch, n, last, note):
    clip = sample.data.read_clip(world / "c.mp4", **sample.data.clip_options(loaded[0].config))
    clip.seconds = [last * i / max(n - 1, 1) for i in range(n)]
    monkeypatch.setattr(sample.data, "read_clip", lambda *_, **__: clip)
    notes = sample.ask(*loaded, world / "c.mp4", max_new_tokens=1).notes[:-1]
    assert len(notes) == bool(note) and all(note in text for text in notes)


def test_an_answer_that_ends_by_itself_has_no_note(loaded, world, monkeypatch):
    monkeypatch.setattr(loaded[0], "generate", lambda *_, **__: [[5, loaded[1].eos]])
    assert sample.ask(*loaded, world / "c.mp4").notes == []


def test_generation_options(world, loaded, cli, monkeypatch):
    searched = []
    search = sample.beam_search

    def noted(model, soft, ids, beams, **options):
        searched.append(beams)
        return search(model, soft, ids, beams, **options)

    def answer(*options):
        status, out, _ = cli("--video", world / "c.mp4", "--max-new-tokens", 10, *options)
        assert status == 0
        return out

    warm = [answer("--temperature", 1.5, "--top-p", 0.95, "--seed", seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert answer("--temperature", 1.5, "--top-p", 1e-6) == answer("--temperature", 1e-41) == answer()
    expected = sample.ask(*loaded, world / "c.mp4", max_new_tokens=10, beams=3).answer
    monkeypatch.setattr(sample, "beam_search", noted)
    assert answer("--beams", 3) == answer("--beams", 3) == expected + "\n"
    assert searched == [3, 3]
    assert answer("--system", "Be brief.") != answer()
    long = ("--max-new-tokens", 60)
    assert answer(*long, "--repetition-penalty", 5) != answer(*long)


@pytest.mark.parametrize(
    "options",
    ["", "x --beams 0", "--video x --top-p nan", "--video x --beams 2 --temperature 1", "--chat",
     "--video x --chat --json", "--video x y --chat", "--video x --device nowhere",
     "--video x --weights nowhere", "--video x --max-new-tokens many", "--nonsense",
     "--video x --temperature inf"],
)  # fmt: skip
def test_wrong_options_are_one_line(cli, options):
    status, out, err = cli(*options.split())
    assert status == 2 and out == "" and len(err) == 1 and err[0].startswith("error: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("https://host/a.mp4", "download"),
        ("*.mp4", "quotes"),
        ("x --weights nowhere", "prepare.py weights makes one"),
    ],
)
def test_the_way_out_is_named(cli, options, words):
    status, _, err = cli(*options.split())
    assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and words in err[0]


def test_wrong_questions(world, cli):
    for question in (" ", "", "why " * 1000):
        status, out, err = cli("--video", world / "c.mp4", "--question", question)
        assert status == 2 and out == "" and err[-1].startswith("error: the question is ")


def test_weights_and_tokenizer_must_fit(world, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(world / "weights" / name)
    with pytest.raises(ValueError, match="no such tokenizer file"):
        sample.load(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="has 30 pieces"):
        sample.load(tmp_path)


def test_an_error_of_a_loader_worker_is_one_line(capsys):
    error = ValueError(
        "Caught ValueError in worker 0.\nTraceback (most recent call last):\n…\nValueError: x.mp4: cut"
    )
    assert sample.print_error(error) == 2
    assert capsys.readouterr().err == "error: ValueError: x.mp4: cut\n"


def test_the_example_of_the_readme(capsys, monkeypatch):
    """README.md's first Python block, run as it stands, prints what sample.py answers, as quoted there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search("^```python\n(.*?)^```$", readme, re.M | re.S)[1]
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    expected = sample.ask(*sample.load(ROOT / "weights" / "tiny", "cpu"), "examples/crossing.mp4").answer
    assert capsys.readouterr().out == expected + "\n" and len(expected) > 20
    assert " ".join(re.findall("^> (.*)$", readme, re.M)) == expected


def test_threads_wait_without_spinning():
    """OpenMP shows what it found when torch loaded it. A user's own setting wins."""
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key}
    command = [sys.executable, "-c", "import sample"]
    for setting in ({}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment |= {"OMP_DISPLAY_ENV": "true"} | setting
        shown = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        found = re.search("OMP_WAIT_POLICY *= *'(.*)'", shown.stderr)
        assert found[1] == setting.get("OMP_WAIT_POLICY", "PASSIVE")


@pytest.mark.parametrize("name", "train prepare apps.evaluate apps.timeline apps.towers apps.look".split())
def test_that_is_set_before_torch_is_imported(tmp_path, name):
    """By each program. Here "torch" is a file that shows the environment in which it is imported."""
    (tmp_path / "torch.py").write_text("import os; raise SystemExit(os.environ.get('OMP_WAIT_POLICY'))")
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    shown = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.stderr == "passive\n"


def test_an_answer_does_not_load_the_compiler(world):
    """torch imports it, which takes longer than a short answer, for some calls that look harmless."""
    code = "import sample, sys; sample.ask(*sample.load(sys.argv[1], 'cpu'), sys.argv[2], max_new_tokens=2)"
    code += "; sys.exit('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, world / "weights", world / "a b.mp4"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


# ---- Chat --------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(world, loaded, monkeypatch):
    """A chat about a video in which these lines are typed -> (exit status, [what is written at a time])"""

    def chat(*lines, pieces=None, **options):
        pieces = [] if pieces is None else pieces
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), "utf-8"))
        with redirect_stdout(io.StringIO()) as stdout:
            stdout.write = lambda text: text and pieces.append(text)
            seen = sample.encode_video(loaded[0], world / "a b.mp4")
            return sample.chat(*loaded, seen, [], max_new_tokens=20, **options), pieces

    return chat


def test_words_appear_whole(loaded, chat, monkeypatch):
    """Characters of several byte tokens are written only when complete, and the pieces join to the answer."""
    model, tokenizer = loaded
    made = tokenizer.sp.encode("Ein rüder Käfer: 火事 ") + [tokenizer.eos]
    prompts = []

    def generate(_, ids, on_token, **__):
        prompts.append(ids[0])
        for token in made:
            on_token([token])
        return [made]

    monkeypatch.setattr(model, "generate", generate)
    status, pieces = chat("What?", "Why?")
    assert status == 0 and "".join(pieces) == "Ein rüder Käfer: 火事\n" * 2 and len(pieces) > 20
    assert "\ufffd" not in "".join(pieces)
    said = tokenizer.sp.encode("Ein rüder Käfer: 火事")
    assert any(prompts[1][i : i + len(said)] == said for i in range(len(prompts[1])))


def test_words_are_written_as_they_are_made(loaded, chat, monkeypatch):
    generate = loaded[0].generate
    pieces = []
    written = []

    def watched(*args, on_token, **options):
        def count(tokens):
            on_token(tokens)
            written.append("".join(pieces))

        return generate(*args, on_token=count, **options)

    monkeypatch.setattr(loaded[0], "generate", watched)
    chat("What?", pieces=pieces)
    assert len(written) == 20 and len(set(written)) > 5  # not all at the end
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(written))


def test_beams_are_written_at_the_end(world, loaded, chat):
    status, pieces = chat("What?", beams=2)
    expected = sample.ask(*loaded, world / "a b.mp4", "What?", beams=2, max_new_tokens=20).answer
    assert status == 0 and pieces == [expected, "\n"]


def test_chat_through_a_pipe(world, loaded):
    clip = world / "a b.mp4"
    command = [sys.executable, ROOT / "sample.py", "--weights", world / "weights", "--device", "cpu"]
    lines = ["", "/help", "Wer fährt?", "/bogus", "why " * 1000, "/quit", "What is it?"]
    options = {"input": "\n".join(lines), "capture_output": True, "encoding": "utf-8"}
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, "--question", "What?", "--chat", clip], env=environment, **options)
    err = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (error,) = [line for line in err if line.startswith("error:")]
    assert "too long" in error
    assert "/help" in err[0] and done.stderr.count(sample.HELP) == 2  # asked for, and for an unknown command
    assert ["read" in line for line in err if "generate" in line] == [True, False]
    first = sample.ask(*loaded, clip, "What?").answer
    second = sample.ask(*loaded, clip, "Wer fährt?", [("What?", first)]).answer
    assert done.stdout.split() == f"{first} {second}".split()


@pytest.mark.parametrize("word", ["/quit", "quit", "exit", " exit "])
def test_words_that_end_a_chat(chat, word):
    assert chat(word, "What?") == (0, [])


def test_chat_remembers_and_forgets(world, loaded, chat, capsys, monkeypatch):
    generate = loaded[0].generate
    prompts = []

    def noted(encoding, ids, *args, **options):
        prompts.append(ids[0])
        return generate(encoding, ids, *args, **options)

    monkeypatch.setattr(loaded[0], "generate", noted)
    questions = [f"What is it? {n}" for n in range(20)]
    status, pieces = chat(*questions, "/new", questions[0])
    message = sample.encode_video(loaded[0], world / "a b.mp4").clip.message
    encode = loaded[1].encode_prompt
    rounds = list(zip(questions, "".join(pieces).split("\n"), strict=False))
    assert status == 0 and prompts[0] == prompts[-1] == encode(questions[0], message)
    assert prompts[1] == encode(questions[1], message, history=rounds[:1])
    assert len(prompts) == 21 and all(len(prompt) + 20 <= 512 for prompt in prompts)
    assert "left out the 1 oldest round(s)" in capsys.readouterr().err
    latest = [encode(questions[19], message, history=rounds[k:19]) for k in range(20)]
    assert latest.index(prompts[19]) > 0  # the oldest ones were left out


def test_an_answer_of_several_lines_is_one_line_a_video(world, loaded, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *_: loaded)
    monkeypatch.setattr(type(loaded[1]), "decode", lambda *_: "It falls.\n\nx.mp4: a \x1b[2J car")
    video = str(world / "c.mp4")
    assert sample.main([video]) == 0
    assert capsys.readouterr().out == "It falls.\n\nx.mp4: a \x1b[2J car\n"
    assert sample.main([video, video, str(world / "no\x1b[2J.mp4")]) == 2
    out, err = capsys.readouterr()
    assert out == f"{video}: It falls. x.mp4: a \x1b[2J car\n" * 2 and "\x1b" not in err


def test_a_round_without_an_answer_is_forgotten(loaded, chat, capsys, monkeypatch):
    generate = loaded[0].generate
    prompts = []

    def failing(encoding, ids, *args, **options):
        prompts.append(ids[0])
        if len(prompts) == 1:
            raise ValueError("no luck")
        return generate(encoding, ids, *args, **options)

    monkeypatch.setattr(loaded[0], "generate", failing)
    status, _ = chat("What?", "What?")
    assert status == 2 and prompts[0] == prompts[1] and "error: no luck" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_only(loaded, chat, capsys, monkeypatch):
    generate = loaded[0].generate
    prompts = []

    def interrupted(encoding, ids, on_token, **options):
        def stop(tokens):
            on_token(tokens)
            if len(prompts) < 3:
                raise KeyboardInterrupt

        prompts.append(ids[0])
        return generate(encoding, ids, on_token=stop, **options)

    monkeypatch.setattr(loaded[0], "generate", interrupted)
    status, pieces = chat("What?", "What?", "What?")
    assert status == 0 and capsys.readouterr().err.count("stopped") == 2
    assert pieces[0] and len(prompts[0]) < len(prompts[1]) < len(prompts[2])  # what was said is remembered


class Terminal:
    """sample.py --chat at a terminal; each token takes 20 ms more."""

    SLOW = """if True:
        import sys, time, sample
        generate = sample.Hawk.generate

        def slow(*args, on_token, **options):
            def wait(tokens):
                time.sleep(0.02)
                on_token(tokens)

            return generate(*args, on_token=wait, **options)

        sample.Hawk.generate = slow
        sys.exit(sample.main())"""

    def __init__(self, *options):
        command = [sys.executable, "-c", self.SLOW, "--device", "cpu", "--chat", *map(str, options)]
        self.seen = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
            os.execv(command[0], command)

    def read(self):
        try:
            data = os.read(self.file, 65536)
        except OSError:  # the end of a terminal
            data = b""
        self.seen += data.decode(errors="replace")
        return data

    def type(self, text):
        """A terminal echoes what is typed, and blocks while the echo is not read."""
        data = text.encode()
        while data:
            readable, writable, _ = select.select([self.file], [self.file], [], 60)
            if readable:
                self.read()
            if writable:
                data = data[os.write(self.file, data[:256]) :]

    def until(self, pattern, seconds=120):
        """What is shown up to the pattern's end"""
        limit = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < limit, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.file], [], [], 1)[0]:
                assert self.read(), f"ended without {pattern!r}: {self.seen!r}"
        shown = self.seen[: found.end()]
        self.seen = self.seen[found.end() :]
        return shown

    def end(self):
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit has no bracketed paste")
def test_chat_at_a_terminal(world):
    options = ["--weights", world / "weights", "--video", world / "a b.mp4", "--max-new-tokens", 40]
    terminal = Terminal(*options, "--question", "What is it?")
    answered = r"generate \S+ s [^\n]*peak memory[^\n]*\r\n.*> "
    assert "read " in terminal.until(answered)
    terminal.type("Wer fährt da? 火事\n")
    assert "read " not in terminal.until(answered)
    terminal.type("half a question")
    terminal.until("question")
    time.sleep(1)  # Python misses a ctrl-C between the echo of a character and the wait for the next
    terminal.type("\x03")
    terminal.until(r"\(stopped; ctrl-D ends\)\r\n.*> ")
    terminal.type("Why?\n")
    terminal.until(r"2004l\r\s*\S")  # readline has returned the line, and the answer begins
    terminal.type("\x03")
    assert "generate" not in terminal.until(r"\(stopped; ctrl-D ends\)\r\n.*> ")
    terminal.type("why " * 1000 + "\n")
    terminal.until(r"error: the question is too long: \d+ tokens with the video[^\n]*\n.*> ")
    terminal.type("\x1b[200~Is it\na dog?\x1b[201~\n")  # pasted
    terminal.until(answered)
    terminal.type("/new\n")
    terminal.until("> ")
    terminal.type("\x04")  # ctrl-D
    assert terminal.end() == 2  # because there was an error


def test_bad_bytes_in_a_question_do_not_end_the_chat(world):
    command = [
        sys.executable,
        ROOT / "sample.py",
        "--weights",
        world / "weights",
        "--device",
        "cpu",
        "--chat",
    ]
    command += ["--video", world / "c.mp4", "--max-new-tokens", "2"]
    done = subprocess.run(command, input=b"a\xff\nb", capture_output=True)
    assert done.returncode == 0 and done.stderr.count(b"generate") == 2
