"""Asking and scoring with a small random model: what goes where, exit status, determinism, chat, BLEU, resuming."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import sacrebleu
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from apps import evaluate
from hawk import PRESETS, Hawk, HawkConfig

ROOT = Path(__file__).parent.parent
TEXT = "A red car drives the wrong way in the near lane. Nothing unusual happens on the road. What is it? It is a dog."
SMALL = dict(n_frames=4, image_size=28, vit_dim=32, vit_depth=1, qformer_dim=32, qformer_layers=1, llama_layers=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, two clips, a broken one, an index and its kinds."""
    folder = tmp_path_factory.mktemp("world")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    model = Hawk(HawkConfig.from_dict(PRESETS["tiny"] | SMALL | {"vocab_size": vocabulary}))
    model.save_pretrained(folder / "weights", tokenizer=folder / "tokenizer.model")
    for name, frames in (("a b", 6), ("c", 3)):  # one is shorter than n_frames
        source = f"testsrc=size=64x48:rate=5:duration={frames / 5}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, folder / f"{name}.mp4"]
        subprocess.run(command, check=True)
    (folder / "broken.mp4").write_text("no video")
    rows = [
        {"video": "a b.mp4", "source": "toy", "description": "A car turns back.", "kind": "turn", "colour": "red"},
        {"video": "broken.mp4", "source": "toy", "description": "A car turns back.", "kind": "turn"},
        {"video": "c.mp4", "source": "web", "description": "Fire.", "qa": [{"q": "Who?", "a": "A dog."}] * 2},
        {"video": "a b.mp4", "source": "web", "qa": [{"q": "Where is it?", "a": "In the near lane."}]},
    ]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "kinds.json").write_text(json.dumps({"turn": "turns back", "fire": "catches fire"}))
    return folder


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


# ----------------------------------------------------------------------------------------------------------------------
# apps/evaluate.py

sentences = st.lists(st.sampled_from("a red Car, 1.5 3,x it's 2-3 well-made (so) …! . é".split()), max_size=8).map(
    " ".join
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4))
def test_bleu_equals_sacrebleu(pairs):
    hypotheses, references = map(list, zip(*pairs, strict=True))
    for n, ours in enumerate(evaluate.bleu(hypotheses, references), 1):
        metric = sacrebleu.BLEU(lowercase=True, smooth_method="none", max_ngram_order=n)
        assert ours == pytest.approx(metric.corpus_score(hypotheses, [references]).score / 100, abs=1e-9)


def test_bleu_by_hand():
    assert evaluate.bleu(["", ""], ["a b c", "d"]) == evaluate.bleu([], []) == [0, 0, 0, 0]
    assert evaluate.bleu(["The cat sat down."], ["the cat sat down ."]) == [1, 1, 1, 1]
    assert evaluate.bleu(["a b c"], ["a b d"]) == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5, 0, 0])
    with pytest.raises(ValueError):
        evaluate.bleu(["a"], [])


def test_kinds_and_facts():
    kinds = {"turn": "turns back", "fire": "catches fire", "normal": "nothing unusual happens"}
    answers = [("turn", "A red car Turns back."), ("turn", "It turns back and catches fire."), ("fire", "It turns back."),
               ("fire", ""), ("normal", "Nothing unusual happens in the far lane.")]  # fmt: skip
    rows = [
        {"video": str(i), "kind": k, "colour": "red", "place": "in the far lane"} for i, (k, _) in enumerate(answers)
    ]
    predictions = [dict(row, task="describe", answer=a) for row, (_, a) in zip(rows, answers, strict=True)]
    predictions.append({"video": "0", "task": "answer", "kind": "turn", "answer": "A car."})
    scores = evaluate.kind_scores(predictions, kinds)
    assert scores["kinds"] == {"turn": [1, 2], "fire": [0, 2], "normal": [1, 1]} and scores["overall"] == 2 / 5
    assert sorted(scores["confusions"]) == [["fire", "none", 1], ["fire", "turn", 1], ["turn", "turn and fire", 1]]
    facts = evaluate.fact_scores(predictions, rows, [row["video"] for row in rows])
    assert facts == {"colour": [1, 5], "object": [0, 0], "place": [1, 5]}  # "ca(tches fi)red" is no colour


def test_evaluate_resumes_to_the_same_file(world, tmp_path, capfd):
    def run(out, *options):
        command = ["--annotations", str(world / "index.jsonl"), "--weights", str(world / "weights"), "--out", str(out)]
        status = evaluate.main([*command, "--device", "cpu", "--workers", "0", "--batch-size", "2", *options])
        return status, capfd.readouterr()

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    status, printed = run(whole)
    assert status == 0 and "error: " in printed.err and "broken.mp4" in printed.err
    predictions = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(p["video"], p["task"]) for p in predictions] == [
        ("a b.mp4", "describe"), ("c.mp4", "describe"), ("c.mp4", "answer"), ("c.mp4", "answer"), ("a b.mp4", "answer"),
    ]  # fmt: skip
    assert list(predictions[0]) == ["video", "task", "question", "answer", "reference", "source", "kind"]
    assert predictions[2]["reference"] == "A dog." and "kind" not in predictions[2]
    scores = json.loads((tmp_path / "whole.jsonl.scores.json").read_text())
    assert scores["unreadable"] == ["broken.mp4"] and scores["kinds"]["kinds"]["turn"][1] == 1
    assert scores["bleu"]["describe"]["all"]["n"] == 2 and list(scores["bleu"]["answer"]) == ["web", "all"]
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, 10, *ends, ends[2] + 20):
        part.write_bytes(data[:cut])
        status, printed = run(part)
        assert status == 0 and part.read_bytes() == data, cut
    assert run(part, "--workers", "1")[1].out == printed.out and part.read_bytes() == data
    part.write_text("not a prediction\n")
    status, printed = run(part)
    assert status == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
