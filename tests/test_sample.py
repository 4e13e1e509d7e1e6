"""Asking with a small random model: what goes where, exit status, determinism, chat."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import sentencepiece
from conftest import TEXT

import sample
from data import read_clip

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
    assert answer("--temperature", 1.5, "--top-p", 1e-6) == answer("--temperature", 1e-41) == answer()
    assert answer("--beams", 3) == answer("--beams", 3)
    assert answer("--system", "Be brief.") != answer("--repetition-penalty", 5) != answer()


@pytest.mark.parametrize(
    "options",
    ["", "--video x --beams 0", "--video x --top-p nan", "--video x --beams 2 --temperature 1", "--chat --json",
     "--video x --device nowhere", "--video x --weights nowhere", "--video x --max-new-tokens many", "--nonsense",
     "--video x --temperature inf", "--video x --show-motion ./x"],
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


def test_flow_colours():
    right, left, down, up = [8, 0], [-8, 0], [0, 4], [0, -8]
    found = sample.flow_colours(np.float32([right, left, down, up, [0, 0]]))
    expected = np.array([[255, 0, 0], [0, 255, 255], [90, 180, 0], [128, 0, 255], [0, 0, 0]])
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 1
    assert not sample.flow_colours(np.zeros((2, 3, 2))).any()


def test_sheet_of_frames_motion_and_flow(world, cli, tmp_path):
    """Of a picture that slides to the left, all of it: frames, the same frames, and cyan."""
    picture = np.random.default_rng(0).integers(0, 256, (7, 7, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    slide, still, png = tmp_path / "slide.mkv", tmp_path / "still.mkv", tmp_path / "sheet 1.png"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    for path, n_frames in ((slide, 6), (still, 1)):
        frames = np.stack([np.roll(picture, -2 * k, axis=1) for k in range(n_frames)])
        raw = [*ffmpeg, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "56x56", "-i", "-", "-c:v", "ffv1", path]
        subprocess.run(raw, input=frames.tobytes(), check=True)
    assert cli("--video", slide, "--show-motion", png, "--max-new-tokens", 1)[0] == 0
    shown = subprocess.run([*ffmpeg, "-i", png, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True).stdout
    frames, motion, flow = np.frombuffer(shown, np.uint8).reshape(3, 28, 4, 28, 3).swapaxes(1, 2)  # (4, 28, 28, 3) each
    clip = read_clip(slide, 4, 28)
    assert np.array_equal(frames, clip.appearance) and np.array_equal(motion, clip.motion)
    red, green, blue = flow[:, 8:20, 8:20].mean((0, 1, 2))
    assert red < 10 and green > 80 and blue > 80
    assert sorted(os.listdir(tmp_path)) == [png.name, slide.name, still.name]
    alone = sample.motion_sheet(still, read_clip(still, 4, 28))
    assert alone.shape == (84, 28, 3) and alone[:28].any() and not alone[28:].any()
    status, out, err = cli("--video", slide, "--show-motion", tmp_path / "nowhere" / "x.png")
    assert status == 2 and out == "" and "x.png: cannot be written" in err[-1]


def test_the_example_of_the_readme(capsys, monkeypatch):
    """README.md's Python block, run as it stands, prints what sample.py answers."""
    blocks = re.findall("^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1, f"README.md has {len(blocks)} ```python blocks, and should have one"
    monkeypatch.chdir(ROOT)
    exec(compile(blocks[0], "README.md", "exec"), {})
    expected = sample.ask(*sample.load(ROOT / "weights" / "tiny", "cpu"), "examples/falling.mp4").answer
    assert capsys.readouterr().out == expected + "\n" and len(expected) > 20


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


def test_words_are_written_as_they_are_made(world, loaded, monkeypatch):
    generate, made, written = loaded[0].generate, [], []

    def counted(*args, on_token, **kwargs):
        return generate(*args, on_token=lambda tokens: (made.append(tokens), on_token(tokens))[1], **kwargs)

    monkeypatch.setattr(loaded[0], "generate", counted)
    c = chat(loaded)
    c.open(world / "c.mp4")
    c.say("What?", lambda text: written.append(len(made)))
    assert written[0] < 5 and len(set(written)) > 10  # not all at the end


class Terminal:
    """sample.py --chat at a terminal; each token takes 20 ms more."""

    SLOW = """if True:
        import sys, time, sample
        generate = sample.Hawk.generate
        def slow(*args, on_token, **kwargs):
            return generate(*args, on_token=lambda tokens: (time.sleep(0.02), on_token(tokens))[1], **kwargs)
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
        except OSError:  # so ends a terminal
            data = b""
        self.seen += data.decode(errors="replace")
        return data

    def type(self, text):
        """A terminal echoes what is typed: who does not read on blocks it."""
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
        self.seen, shown = self.seen[found.end() :], self.seen[: found.end()]
        return shown

    def end(self):
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_at_a_terminal(world):
    options = ["--weights", world / "weights", "--video", world / "a b.mp4", "--max-new-tokens", 40]
    terminal, saved = Terminal(*options, "--question", "What is it?"), world / "terminal.jsonl"
    first = terminal.until(r"first word \S+ s.* whole answer \S+ s\r\n.*> ")
    assert "read " in first
    terminal.type("Wer fährt da? 火事\n")
    second = terminal.until(r"first word \S+ s.* whole answer \S+ s\r\n.*> ")
    waits = [sum(map(float, re.findall(r"(?:word|read|encode) (\S+) s", shown))) for shown in (first, second)]
    assert "read " not in second and waits[1] < waits[0]
    terminal.type("half a question")
    terminal.until("question")
    time.sleep(1)  # Python misses a ctrl-C between the echo of a letter and the wait for the next
    terminal.type("\x03")
    terminal.until(r"\(stopped; ctrl-D ends\)\r\n.*> ")
    terminal.type("Why?\n")
    terminal.until(r"2004l\r\s*\S")  # the end of the pasting, and the first of the answer
    terminal.type("\x03")
    assert "whole answer" not in terminal.until(r"\(stopped; ctrl-D ends\)\r\n.*> ")
    terminal.type("why " * 1000 + "\n")
    terminal.until(r"error: the question is too long: \d+ tokens with the video[^\n]*\n.*> ")
    terminal.type("\x1b[200~Is it\na dog?\x1b[201~\n")  # pasted
    terminal.until(r"whole answer \S+ s\r\n.*> ")
    terminal.type(f"/save {saved}\n")
    terminal.until(r"1 video\(s\)\r\n.*> ")
    terminal.type("\x04")  # ctrl-D
    assert terminal.end() == 2  # as there was an error
    rounds = json.loads(saved.read_text(encoding="utf-8"))["qa"]
    assert [turn["q"] for turn in rounds] == ["What is it?", "Wer fährt da? 火事", "Why?", "Is it\na dog?"]
    assert len(rounds[2]["a"]) < len(rounds[0]["a"])


def test_typed_lines_survive_bad_bytes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\nb"), encoding="utf-8"))
    assert list(sample.typed_lines()) == ["a\ufffd\n", "b"]
