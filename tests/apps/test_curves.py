"""The curves of log.jsonl: what is read, drawn and refused."""

import json
import sys

import pytest

from apps import curves

LINES = [
    {"step": 1, "total": 2.0, "lr": 0.1, "skipped": 1},
    {"step": 2, "total": 1.0, "lr": 0.2, "grad_norm": 3.0, "skipped": 0, "held_out_total": 1.5},
]


@pytest.fixture
def run(tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 3, "to')  # still being written
    return tmp_path


def test_reading(run):
    found = curves.read_curves(run)
    assert found["total"] == [(1, 2.0), (2, 1.0)] and found["held_out_total"] == [(2, 1.5)]
    assert found["grad_norm"] == [(2, 3.0)]


def test_drawing(run):
    pytest.importorskip("matplotlib")
    assert curves.main([str(run), str(run), "--out", str(run / "curves.png")]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_picture_says(run, tmp_path, monkeypatch):
    """Powers of ten are set as such, names are not; a loss has one colour in all runs, a run one style."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, _: drawn.append(figure))
    other = tmp_path / r"r$\foo$"
    other.mkdir()
    (other / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes())
    assert curves.main([str(run), str(other), "--out", "x.png"]) == 0
    losses, rate = drawn[0].axes
    assert all(label.get_parse_math() for label in losses.get_yticklabels())
    legends = [*drawn[0].legends[0].get_texts(), *rate.get_legend().get_texts()]
    assert not any(text.get_parse_math() for text in legends)
    assert [text.get_text() for text in rate.get_legend().get_texts()] == [str(run), str(other)]
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in losses.lines}
    assert len(looks) == 4 and len({colour for colour, _ in looks.values()}) == 1
    assert {style for label, (_, style) in looks.items() if label.startswith(str(other))} == {"--"}


def test_a_name_is_no_formula_and_a_log_may_lack_the_learning_rate(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / r"r$\foo$"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "total": 2.0}\n')
    assert curves.main([str(folder), str(folder), "--out", str(tmp_path / "curves.png")]) == 0


def test_cosines_of_runs_one_after_the_other(run, tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    seen = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda _, x, y, label, **__: seen.update({label: (x, y)})
    )
    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    assert curves.main([str(run), "--cosines", "--out", str(run / "c.png")]) == 2
    assert "logs no consistency" in capsys.readouterr().err
    cosines = {"consistency": 0.25, "consistency_debiased": 1.0, "bias_cosine": 0.5, "lr": 0.1}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": n} | cosines) + "\n" for n in (1, 2)))
    assert curves.main([str(tmp_path), f"{tmp_path}/.", "--cosines", "--out", str(run / "c.png")]) == 0
    assert [y[0] for _, y in seen.values()] == [0.75, 0.0, 0.5]
    assert all(x == [1, 2, 3, 4] for x, _ in seen.values())


def test_tensorboard(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert curves.main([str(run), "--tensorboard", str(run / "board")]) == 0
    [folder] = (run / "board").iterdir()
    events = reader.EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("total")] == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize(("text", "words"), [("{}\n", "line 1"), ("x\n", "line 1"), ("", "no step yet")])
def test_a_damaged_log_is_refused_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / "log.jsonl").write_text(text)
    assert curves.main([str(tmp_path), "--out", "x.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and "log.jsonl" in said and said.count("\n") == 1
    assert curves.main([str(tmp_path / "nowhere"), "--out", "x.png"]) == 2


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.main([str(run), "--out", str(run / "x.png")]) == 2
    assert "matplotlib" in capsys.readouterr().err
