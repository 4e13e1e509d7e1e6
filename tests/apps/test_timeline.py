"""Windows, scores, pictures and agreement of apps/timeline.py, with a small random model."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from apps import detect, timeline, toy
from apps.timeline import Annotated, Window
from data import VideoError, read_clip
from hawk import PRESETS, Hawk, HawkConfig
from sample import encode_clips, load

TEXT = (
    "A red car drives the wrong way in the near lane. Nothing unusual happens on the road. Yes, no. "
    "0, 1, 2, 3, 4, 5"
)
FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, kinds, a lossless video of 7.3 s at 10 frames/s, a cut one, and a text."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = folder / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    torch.manual_seed(0)
    model = Hawk(HawkConfig.from_dict(PRESETS["tiny"] | SMALL | {"vocab_size": vocabulary}))
    model.save_pretrained(folder / "weights", tokenizer=tokenizer)
    kinds = {"normal": "nothing happens", "way": "drives the wrong way", "red": "is red"}
    (folder / "kinds.json").write_text(json.dumps(kinds))
    video = folder / "a b.mkv"
    source = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=7.3"]
    subprocess.run([*FFMPEG, *source, "-c:v", "ffv1", "-pix_fmt", "yuv420p", video], check=True)
    (folder / "cut.mkv").write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def loaded(world):
    return load(world / "weights", "cpu")


@pytest.fixture
def cli(world, capfd):
    """timeline's main with these options -> (exit status, stdout, lines of stderr)"""

    def run(*options):
        capfd.readouterr()
        weights = ["--weights", world / "weights", "--device", "cpu"]
        if "yes" not in options:
            weights += ["--kinds", world / "kinds.json"]
        try:
            status = timeline.main([str(option) for option in [*weights, *options]])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err.splitlines()

    return run


def read(path, config, length=2.0, stride=1.0):
    return list(timeline.read_windows(str(path), config, length, stride))


# ---- Windows -----------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(1, 40), st.floats(0, 1))
@settings(deadline=None)
def test_windows_of_a_constant_rate(total, frames, share):
    """At 10 frames a second, with whole frames in a window."""
    stride = (1 + share * (frames - 1)) / 10  # at least a frame, at most a window
    found = list(timeline.windows(((i / 10, i) for i in range(total)), frames / 10, stride))
    numbers = [[number for _, number in pairs] for _, pairs in found]
    assert all(run == list(range(run[0], run[-1] + 1)) for run in numbers)
    assert numbers[0][0] == 0 and numbers[-1][-1] == total - 1
    assert all(
        later[0] <= earlier[-1] + 1 and later[-1] > earlier[-1] for earlier, later in pairwise(numbers)
    )
    assert all(end == pytest.approx((run[-1] + 1) / 10) for (end, _), run in zip(found, numbers, strict=True))
    assert all(frames - 1 <= len(run) <= frames + 1 for run in numbers[:-1])
    assert len(numbers[-1]) >= min(frames - 1, total)


@given(st.lists(st.floats(0.001, 30), min_size=1, max_size=60), st.floats(0.05, 20), st.floats(0.05, 1))
@settings(deadline=None)
def test_windows_of_any_times_leave_nothing_out(gaps, length, share):
    times = [0.0, *np.cumsum(gaps).tolist()]
    found = list(timeline.windows(zip(times, times, strict=True), length, length * share))
    assert found[0][1][0][0] == 0 and found[-1][1][-1][0] == times[-1]
    seen = set()
    newest = -1.0
    for end, pairs in found:
        window = [seconds for seconds, _ in pairs]
        first = times.index(window[0])
        assert window == times[first : first + len(window)]  # without holes
        assert window[-1] > newest and end > window[-1]  # each window shows something new
        newest = window[-1]
        seen |= set(window)
    assert seen == set(times)


def test_windows_of_sparse_frames():
    hour = list(timeline.windows(((60.0 * k, k) for k in range(60)), 4, 2))
    assert hour[-1][0] == 3600 and len(hour) >= 59


def test_no_window_spans_a_gap_in_the_recording():
    """A camera that records only while something moves."""
    times = [*np.arange(0, 5, 0.04).tolist(), *np.arange(65, 69.02, 0.04).tolist(), 200.0]
    found = list(timeline.windows(zip(times, times, strict=True), 4, 2))
    spans = [(pairs[0][0], end) for end, pairs in found]
    expected = [(0, 4), (1, 5), (65, 69), (65.04, 69.04), (200, 200.04)]
    assert spans == [pytest.approx(span, abs=0.05) for span in expected]
    times = [0.0, *np.arange(60, 64, 0.125).tolist()]  # it may have recorded one frame before the gap
    spans = [(pairs[0][0], end) for end, pairs in timeline.windows(zip(times, times, strict=True), 4, 2)]
    assert spans == [pytest.approx(span, abs=0.05) for span in [(0, 0), (60, 64)]]


def test_a_window_has_a_length(monkeypatch):
    """Also if all frames bear the same time, as some broken recordings do."""
    for times in ([0.0, 0.0], [0.0, 0.1, 60.0, 60.0]):
        found = [(pairs[0][0], end) for end, pairs in timeline.windows(((t, t) for t in times), 4, 2)]
        assert all(end > start for start, end in found)
        start, end = found[-1]
        assert timeline.shared_score(start, end, [(*span, 0.5) for span in found]) == 0.5


def test_windows_of_a_rate_that_drops():
    times = [*np.arange(0, 4, 0.04).tolist(), 64.0, 124.0, 184.0]
    found = [(pairs[0][0], end) for end, pairs in timeline.windows(((t, t) for t in times), 4, 2)]
    assert found == [(0, 4), (64, 184), (184, 244)]


def test_windows_close_at_once_and_hold_no_more_than_one():
    class Frame:
        alive = 0

        def __init__(self):
            Frame.alive += 1

        def __del__(self):
            Frame.alive -= 1

    made = 0
    most = 0

    def frames():
        nonlocal made, most
        for k in range(1000):
            made += 1
            most = max(most, Frame.alive)
            yield k / 10, Frame()

    for end, pairs in timeline.windows(frames(), 0.8, 0.4):
        assert end == pytest.approx(made / 10)  # no frame beyond the window was asked for
        del pairs
    assert most <= 10


def test_a_window_is_the_clip_that_is_cut_out_there(world, loaded, tmp_path):
    config = loaded[0].config
    found = read(world / "a b.mkv", config)
    assert [(start, end) for start, end, _ in found] == [(k, k + 2) for k in range(6)] + [(5.3, 7.3)]
    for start, end, clip in [found[0], found[3], found[-1]]:
        cut = tmp_path / "cut.mkv"
        trim = f"trim=start_frame={round(start * 10)}:end_frame={round(end * 10)},setpts=PTS-STARTPTS"
        subprocess.run([*FFMPEG, "-i", world / "a b.mkv", "-vf", trim, "-c:v", "ffv1", cut], check=True)
        expected = read_clip(cut, config.n_frames, config.image_size)
        assert clip.message == expected.message and clip.motion.any()
        assert np.array_equal(clip.appearance, expected.appearance)
        assert np.array_equal(clip.motion, expected.motion)
    (start, end, clip), *none = read(world / "a b.mkv", config, length=60)
    expected = read_clip(world / "a b.mkv", config.n_frames, config.image_size)
    assert (start, end, none) == (0, 7.3, []) and np.array_equal(clip.motion, expected.motion)


def test_times_of_a_varying_rate(world, loaded, tmp_path):
    """4 s at one frame a second, then 1 s at ten: windows are seconds long, not frames."""
    video = tmp_path / "varying.mkv"
    source = "testsrc2=s=64x48:r=10:d=5,select='not(mod(n\\,10))+gte(n\\,40)'"
    subprocess.run(
        [*FFMPEG, "-f", "lavfi", "-i", source, "-fps_mode", "vfr", "-c:v", "ffv1", video], check=True
    )
    found = [(start, end) for start, end, _ in read(video, loaded[0].config, 2, 1)]
    assert found[:3] == [(0, 2), (1, 3), (2, 4)] and found[-1] == (3, 5)


def test_a_window_too_large_to_hold_is_refused(world, loaded, monkeypatch):
    monkeypatch.setattr(timeline, "MAX_BYTES", 19 * 28 * 28 * 3)
    with pytest.raises(VideoError, match="too many frames to hold, more than 19 frames in 2.0 s"):
        read(world / "a b.mkv", loaded[0].config)


# ---- Scores ------------------------------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_the_whole_sequence(world, loaded, monkeypatch):
    model, tokenizer = loaded
    clip = read_clip(world / "a b.mkv", 4, 28)
    encoding = encode_clips(model, [clip])
    prompt = tokenizer.encode_prompt("What?", clip.message, model.config.n_visual)
    answers = [
        tokenizer.sp.encode(text) for text in ("A red car", "A red", "no", "A red car drives the wrong way")
    ]
    starts = [2, 0, 0, 3]
    monkeypatch.setattr(detect, "PHRASES_PER_BATCH", 3)
    found = detect.log_likelihoods(model, encoding, prompt, answers, starts)
    for value, ids, start in zip(found, answers, starts, strict=True):
        x = model.embed(torch.tensor([prompt + ids]), encoding.tokens)
        with torch.no_grad():
            log_p = model.llama.lm_head(model.llama(x))[0].log_softmax(-1)
        expected = sum(log_p[len(prompt) - 1 + t, ids[t]] for t in range(start, len(ids)))
        assert value.item() == pytest.approx(expected.item(), abs=1e-4)


def test_contrast_finds_where_the_phrases_go(loaded, monkeypatch):
    """The score is what comes behind "A red car", not behind another word."""
    monkeypatch.setattr(detect, "describe", lambda *_: ([1], "A red car moves along and on"))

    def likelihoods(model, encoding, prompt, answers, starts):
        told = [
            (loaded[1].decode(ids[:start]), loaded[1].decode(ids[start:]))
            for ids, start in zip(answers, starts, strict=True)
        ]
        p = {
            ("A red car", "drives the wrong way"): 0.5,
            ("A red car", "is red"): 0.25,
            ("A red", "is red"): 0.6,
        }
        assert len(told) == 12  # after 0 … 5 words
        return torch.tensor([math.log(p.get(pair, 1e-6)) for pair in told])

    monkeypatch.setattr(detect, "log_likelihoods", likelihoods)
    score = detect.contrast_score(*loaded, None, None, ["drives the wrong way", "is red"])
    assert score == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize("how", ["contrast", "yes"])
def test_json_lines(world, cli, how):
    path = world / "a b.mkv"
    status, out, err = cli(
        "--video", path, "--window", 3, "--stride", 1.5, "--json", "--score", how, "--threshold", 1
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and err == []
    assert [(o["start"], o["end"]) for o in lines] == [(0, 3), (1.5, 4.5), (3, 6), (4.3, 7.3)]
    for o in lines:
        assert list(o) == ["video", "start", "end", "score", "description"]
        assert o["video"] == str(path) and 0 <= o["score"] < 1 and o["description"] is None
    assert how == "contrast" or all(o["score"] > 0 for o in lines)
    out = cli("--video", path, "--window", 60, "--json", "--score", how, "--threshold", 0)[1]
    assert isinstance(json.loads(out)["description"], str)


def test_stdin_is_the_same(world, cli, monkeypatch):
    options = ["--window", "3", "--json", "--threshold", "1"]
    expected = [json.loads(line) for line in cli("--video", world / "a b.mkv", *options)[1].splitlines()]
    cat = subprocess.Popen(["cat", world / "a b.mkv"], stdout=subprocess.PIPE)
    monkeypatch.setattr(sys, "stdin", cat.stdout)
    status, out, _ = cli("--video", "-", *options)
    assert status == 0 and cat.wait() == 0
    assert [json.loads(line) for line in out.splitlines()] == [o | {"video": "-"} for o in expected]


def test_a_stream_is_answered_while_it_runs(loaded, monkeypatch):
    encode = [*FFMPEG, "-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=30", "-g", "10", "-f", "mpegts", "-"]
    data = subprocess.run(encode, capture_output=True, check=True).stdout
    source, sink = os.pipe()
    with os.fdopen(source, "rb") as stdin, os.fdopen(sink, "wb") as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        writer = threading.Thread(target=lambda: (pipe.write(data), pipe.flush()))
        writer.start()  # and the pipe stays open
        reader = timeline.read_windows("-", loaded[0].config, 4, 2)
        assert [next(reader)[0] for _ in range(8)] == list(range(0, 16, 2))
        writer.join()
        pipe.close()
        assert [start for start, _, _ in reader] == list(range(16, 28, 2))


def watched(loaded, monkeypatch, raw, stride, length=4.0, threshold=2):
    """Windows of these own scores; a number of windows, then a VideoError, if the last score is None."""

    def closing():
        for k, own in enumerate(raw):
            if own is None:
                raise VideoError("v", "is cut short")
            yield k * stride, k * stride + length, own

    monkeypatch.setattr(timeline, "read_windows", lambda *_: closing())
    monkeypatch.setattr(timeline, "encode_clips", lambda _, clips: clips[0])
    monkeypatch.setattr(timeline, "describe", lambda *given: (None, given[3]))
    return timeline.watch(*loaded, "v", lambda *given: given[2], length, stride, threshold)


def test_a_score_is_shared_with_the_windows_around_it(loaded, monkeypatch):
    def scores(*given):
        return [window.score for window in watched(loaded, monkeypatch, *given)]

    # stride 2: weights 1, and 1/2 for the window before and the one behind
    assert scores([0, 0.9, 0, 0, 0.3], 2) == [0.3, 0.45, 0.225, 0.075, 0.2]
    assert scores([0.1, 0.9, 0.2], 4) == [0.1, 0.9, 0.2]
    # stride 1: 1, and 3/4, 1/2, 1/4 for the windows before, 3/4 for the one behind
    assert scores([1, 0, 0, 0, 0], 1) == [0.5714, 0.3, 0.1667, 0.0769, 0]
    assert scores([0.7] * 9, 0.5) == [0.7] * 9 and scores([0.4], 1) == [0.4] and scores([], 1) == []
    lengths = []
    shared_score = timeline.shared_score

    def counted(start, end, owns):
        lengths.append(len(owns))
        return shared_score(start, end, owns)

    monkeypatch.setattr(timeline, "shared_score", counted)
    scores([0.5] * 100, 1)
    assert max(lengths) == 5  # no more is held


def test_a_window_is_told_when_the_next_one_closes(loaded, monkeypatch):
    raw = []

    def growing():
        for own in (0.1, 0.2, 0.3):
            raw.append(own)
            yield own

    seen = watched(loaded, monkeypatch, growing(), 4, threshold=0.2)
    assert next(seen) == Window("v", 0.0, 4.0, 0.1, None) and raw == [0.1, 0.2]
    assert next(seen) == Window("v", 4.0, 8.0, 0.2, 0.2) and raw == [0.1, 0.2, 0.3]  # its own clip's words
    assert [*seen] == [Window("v", 8.0, 12.0, 0.3, 0.3)]
    cut = watched(loaded, monkeypatch, [0.1, 0.2, None], 4)
    assert [next(cut).score, next(cut).score] == [0.1, 0.2]  # also the last whole one, before the error
    with pytest.raises(VideoError, match="is cut short"):
        next(cut)


# ---- What is shown -----------------------------------------------------------------------------------------


def test_curve_and_events_by_hand():
    seen = [Window("v", 2.0 * k, 2.0 * k + 4, s, f"d{k}") for k, s in enumerate([0, 0.6, 1, 0.2, 0.5])]
    assert timeline.curve(seen, 6).tolist() == pytest.approx([0, 0.3, 0.8, 0.6, 0.35, 0.5])
    assert [(start, end, top.description) for start, end, top in timeline.events(seen, 0.5)] == [
        (2, 8, "d2"),
        (8, 12, "d4"),
    ]
    assert timeline.events(seen, 1.01) == []
    seen = [Window("v", 0.0, 4.0, 1, "a"), Window("v", 5.0, 9.0, 1, "b"), Window("v", 60.0, 64.0, 1, "c")]
    assert [event[:2] for event in timeline.events(seen, 0.5)] == [(0, 9), (60, 64)]


def test_a_curve_and_what_stands_out(world, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "46")
    monkeypatch.setattr(timeline, "describe", lambda *_: ([], "A red car."))
    path = world / "a b.mkv"
    status, out, err = cli("--video", path, path, "--window", 3, "--threshold", 0, "--score", "yes")
    lines = out.splitlines()
    assert status == 0 and lines[0] == lines[len(lines) // 2] == str(path)
    assert all(len(line) == 43 for line in lines[1:5]) and lines[5] == f"   0{'7.3 s':>39}"
    assert lines[6].startswith("0.0-7.3 s  0.") and lines[6].endswith("  A red car.")
    assert any("s of video" in line for line in err)
    out = cli("--video", path, "--threshold", 1, "--score", "yes")[1]
    assert "nothing stands out; the highest score is 0." in out


def test_plot_and_video(world, cli, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timeline, "describe", lambda *_: ([], "A red car."))
    plot, video = tmp_path / "curve 1.png", tmp_path / "with curve.mp4"
    options = ["--window", 3, "--threshold", 0, "--score", "yes", "--plot", plot, "--out-video", video]
    status, _, err = cli("--video", world / "a b.mkv", *options)
    assert status == 0, err
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and sorted(os.listdir(tmp_path)) == [
        plot.name,
        video.name,
    ]
    shown = subprocess.run(
        [*FFMPEG, "-i", video, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True
    ).stdout
    frames = np.frombuffer(shown, np.uint8).reshape(-1, 360 + 96, 640)
    assert len(frames) == 73 and frames[0, :360].std() > 30
    lines = (frames[:, 365:375] > 200).all(1).argmax(1)  # the white line walks from left to right
    assert lines[0] == 0 and (np.diff(lines) >= 0).all() and 620 < lines[-1] < 640


def test_a_name_is_no_formula(tmp_path):
    pytest.importorskip("matplotlib")
    timeline.write_plot([Window("a$x^$.mp4", 0, 4, 0.3, None)], 0.5, tmp_path / "plot.png")
    assert os.listdir(tmp_path) == ["plot.png"]


def test_ctrl_c_ends_a_stream_and_shows_it(capsys):
    def interrupted():
        yield Window("-", 0.0, 4.0, 0.25, None)
        raise KeyboardInterrupt

    args = timeline.parse_args(["--video", "x"])
    assert len(timeline.show_video("-", interrupted(), args)) == 1
    assert "the highest score is 0.25 at 0.0-4.0 s" in capsys.readouterr().out
    for path, options in (("x", []), ("-", ["--json"])):
        with pytest.raises(KeyboardInterrupt):
            timeline.show_video(path, interrupted(), timeline.parse_args(["--video", "x", *options]))


def test_what_was_seen_of_a_cut_recording_is_shown(capsys, monkeypatch):
    def cut(windows):
        for _ in range(windows):
            yield Window("x", 0.0, 4.0, 0.25, None)
        raise VideoError("x", "is cut short")

    drawn = []
    monkeypatch.setattr(timeline, "write_video", lambda seen, *_: drawn.extend(seen))
    args = timeline.parse_args(["--video", "x", "--out-video", "v.mp4"])
    for windows in (0, 1):
        with pytest.raises(VideoError, match="x: is cut short"):
            timeline.show_video("x", cut(windows), args)
        shown = "the highest score is 0.25 at 0.0-4.0 s" in capsys.readouterr().out
        assert shown == bool(windows) and len(drawn) == windows


def test_only_what_is_needed_is_kept(capsys, monkeypatch):
    found = [Window("x", 2.0 * k, 2.0 * k + 4, 0.5, None) for k in range(5)]
    assert timeline.show_video("x", found, timeline.parse_args(["--video", "x", "--json"])) == []
    plot = timeline.parse_args(["--video", "x", "--json"])
    plot.out_video = "v.mp4"
    monkeypatch.setattr(timeline, "write_video", lambda *_: None)
    assert len(timeline.show_video("x", found, plot)) == 5
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_strip():
    strip = timeline.draw_strip([Window("v", 0, 1, 0.0, None), Window("v", 1, 2, 1.0, None)], 0.5, 10, 8)
    assert (
        strip.shape == (8, 10, 3) and (strip[:4, :5] == 24).all() and (strip[:4, 5:] == (255, 50, 60)).all()
    )
    assert (strip[4, ::6] == 160).all()


# ---- Agreement ---------------------------------------------------------------------------------------------


def windows_of(*scores, length=4.0, stride=2.0):
    return [Window("v", stride * k, stride * k + length, score, None) for k, score in enumerate(scores)]


def scored(windows, intervals, times=()):
    return Annotated("v", intervals, np.array(times), windows)


def test_agreement_of_windows_by_hand():
    # windows at 2 and 6 are half in, that at 4 more, that at 0 not
    one = scored(windows_of(0.1, 0.2, 0.9, 0.3), [(5.0, 9.0)])
    # the windows at 4 and 6 are a quarter in and left out; those at 0 and 2 are not in
    two = scored(windows_of(0.8, 0.1, 0.2, 0.4), [(7.0, 8.0)])
    normal = scored(windows_of(0.3), [])
    pairs = [(p > n) + (p == n) / 2 for p in (0.9, 0.3) for n in (0.1, 0.8, 0.1, 0.3)]
    expected = {"videos": 3, "abnormal": 2, "normal": 1, "hits": 1, "chance": (3 / 4 + 2 / 4) / 2}
    expected |= {"windows": 6, "auc": sum(pairs) / len(pairs)}
    found = timeline.window_agreement([one, two, normal])
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    # two events: the window at 4 is on neither, those at 0 and 6 are
    both = timeline.window_agreement([scored(one.windows, [(0.0, 2.5), (8.0, 10.0)])])
    assert both["hits"] == 0 and both["windows"] == 3
    alone = timeline.window_agreement([normal])
    assert alone["abnormal"] == 0 and alone["chance"] is None and alone["auc"] is None


def test_frames_by_hand():
    seen = windows_of(0.2, 0.8, 0.5)
    times = [0.0, 1.999, 2.0, 3.999, 4.0, 5.0, 6.0, 7.9]
    # a window is open from its start until before its end
    scores = timeline.frame_scores(seen, np.array(times))
    assert scores.dtype == np.float32
    assert scores == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.65, 0.65, 0.5, 0.5])
    video = scored(seen, [(2.0, 4.0), (7.0, 8.0)], times)
    normal = scored(windows_of(0.6), [], [0.0, 1.0])
    found = timeline.frame_agreement([video, normal])
    # abnormal: the frames at 2, 3.999 and 7.9 s, all 0.5; normal: 0.2, 0.2, 0.65, 0.65, 0.5, 0.6, 0.6
    assert found == {
        "frames": 10,
        "abnormal_frames": 3,
        "frame_auc": pytest.approx((2 + 1 / 2) / 7),
        "frame_ap": pytest.approx(3 / 8),
    }
    nothing = timeline.frame_agreement([normal])
    assert nothing["frame_auc"] is None and nothing["frame_ap"] is None


def test_every_frame_is_in_a_window_and_long_videos_fit():
    # 1001 frames 1/2400 s apart: window bounds are rounded to milliseconds, so two frames share one
    times = np.arange(1001) / 2400
    found = timeline.windows(((t, t) for t in times.tolist()), 0.05, 0.05)
    seen = [Window("v", round(pairs[0][0], 3), round(end, 3), 0.5, None) for end, pairs in found]
    assert (timeline.frame_scores(seen, times) == 0.5).all()
    hours = windows_of(*[0.5] * 5400)
    assert (timeline.frame_scores(hours, np.arange(270_000) / 25) == 0.5).all()


@settings(deadline=None)
@given(st.data())
def test_frame_scores_are_means_of_the_open_windows(data):
    gaps = data.draw(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
    times = np.cumsum([0, *gaps]) / 1000
    length = data.draw(st.integers(50, 5000)) / 1000
    stride = length * data.draw(st.integers(1, 4)) / 4
    seen = []
    for end, pairs in timeline.windows(((t, t) for t in times.tolist()), length, stride):
        score = data.draw(st.integers(0, 100)) / 100
        seen.append(Window("v", round(pairs[0][0], 3), round(end, 3), score, None))
    for t, score in zip(times, timeline.frame_scores(seen, times), strict=True):
        open_scores = [w.score for w in seen if w.start <= t < w.end]
        assert score == pytest.approx(np.mean(open_scores))


def test_forms_of_annotations(tmp_path):
    index = tmp_path / "index.jsonl"
    rows = [
        {"video": "a.mp4", "abnormal": [1, 2]},
        {"video": "b.mp4", "abnormal": [[4, 5.5], [4.5, 5], [1, 2], [1.5, 3]]},
        {"video": "c.mp4", "abnormal": [], "description": "A line\u2028separator."},
        {"video": "d.mp4", "kind": "normal"},
        {"video": "e.mp4", "kind": " Normal"},
        {"video": "a.mp4", "abnormal": [6, 7]},  # a second event of the first video
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    index.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # with a BOM
    found = {video.path: video.intervals for video in timeline.read_annotations(index)}
    assert found == {
        str(tmp_path / "a.mp4"): [(1, 2), (6, 7)],
        str(tmp_path / "b.mp4"): [(1, 3), (4, 5.5)],
        str(tmp_path / "c.mp4"): [],
        str(tmp_path / "d.mp4"): [],
        str(tmp_path / "e.mp4"): [],
    }


@pytest.mark.parametrize("abnormal", [
    [2, 1], [3, 3], [1], [1, 2, 3], ["1", "2"], [[1, 2], 3], [1, [2, 3]], [[]], 5, None, "12", "", {}, False,
    [-1, 2], [-1, -1], [True, 2], [1, 1e999], [1, 10**400], [1, math.nan],
])  # fmt: skip
def test_wrong_intervals_are_refused(tmp_path, abnormal):
    index = tmp_path / "index.jsonl"
    index.write_text("\n" + json.dumps({"video": "x", "abnormal": abnormal}) + "\n")
    with pytest.raises(ValueError, match=r'^\S+index.jsonl, line 2: needs "abnormal": \[start, end\] in sec'):
        timeline.read_annotations(index)


@pytest.mark.parametrize("line, reason", [
    (b"{", "not JSON"), (b"[]", "not a JSON object"), (b'{"abnormal": []}', '"video" must be the path'),
    (b'{"video": "", "abnormal": []}', '"video" must be'), (b'{"video": 3, "abnormal": []}', '"video" must'),
    (b'{"video": "x"}', 'needs "abnormal"'), (b'{"video": "x", "kind": "fire"}', 'needs "abnormal"'),
    (b'{"video": "x", "kind": ""}', 'needs "abnormal"'),
    (b"\xff", "can't decode"), (b"[" * 100_000, "recursion"),
    (b'{"video": "\\u0000", "abnormal": []}', "path of a file"),
])  # fmt: skip
def test_wrong_rows_are_refused(tmp_path, line, reason):
    index = tmp_path / "index.jsonl"
    index.write_bytes(b'{"video": "x", "abnormal": []}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"index.jsonl, line 2: .*{reason}") as error:
        timeline.read_annotations(index)
    assert "\n" not in str(error.value)


def test_intervals_beyond_the_end():
    times = np.arange(60) / 10  # 6 s
    timeline.check_intervals(Annotated("v.mp4", [(0, 2), (5.5, 6.9)], times))  # people round
    for interval in ((120, 180), (5, 7.1), (6.2, 6.8)):
        with pytest.raises(ValueError) as error:
            timeline.check_intervals(Annotated("v.mp4", [(0, 2), interval], times))
        wanted = (
            f"v.mp4: [{interval[0]}, {interval[1]}] is beyond the end of the video at 6.00 s; give seconds"
        )
        assert str(error.value).startswith(wanted)


def test_names_of_scores(tmp_path):
    def names(*paths):
        return timeline.score_names([str(tmp_path / path) for path in paths])

    assert names("a/one.mp4") == ["one"]
    assert names("a/one.mp4", "b/two.x.avi") == ["one", "two.x"]
    assert names("a/1.mp4", "b/1.mp4", "b/2.mp4") == ["a_1.mp4", "b_1.mp4", "2"]
    assert names("1.mp4", "1.avi", "x/y/1.avi") == ["1.mp4", "1.avi", "x_y_1.avi"]
    assert names("A.mp4", "a.mkv") == ["A.mp4", "a.mkv"]  # for file systems without case
    awkward = names("a/1.mp4", "b/1.mp4", "a_1.mp4.avi", "c/a_1.mp4")
    assert len({name.casefold() for name in awkward}) == 4
    assert timeline.score_names(["1.mp4", "./b/1.mp4"]) == ["1.mp4", "b_1.mp4"]


def write_index(tmp_path, *rows):
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return index


def test_annotations(world, cli, tmp_path):
    video = str(world / "a b.mkv")
    shutil.copy(video, tmp_path / "normal.mkv")
    rows = [{"video": video, "abnormal": [[1, 2], [3, 5]]}, {"video": "normal.mkv", "abnormal": []}]
    rows.append({"video": str(world / "text.mp4"), "abnormal": [2, 5]})
    shutil.copy(video, tmp_path / "frames.mkv")
    rows.append({"video": "frames.mkv", "abnormal": [20, 50]})
    index = write_index(tmp_path, *rows)
    options = ["--annotations", index, "--window", 3, "--stride", 2, "--threshold", 0]
    options += ["--scores", tmp_path / "scores"]
    status, out, err = cli(*options)  # windows: 0-3, 2-5, 4-7 and 4.3-7.3 s
    errors = [line for line in err if "error: " in line]
    assert status == 2 and len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert f"{world / 'text.mp4'}: cannot be read" in errors[0]
    assert f"{tmp_path / 'frames.mkv'}: [20, 50] is beyond the end of the video at 7.30 s" in errors[1]
    first, second, third, fourth, last = out.splitlines()
    assert first.startswith("highest window on an event") and first.endswith(
        "videos with an event: 1 (by chance 100%); normal, left out: 1"
    )
    assert second.startswith("AUC of the windows") and second.endswith(" windows")
    assert third.startswith("frame-level AUC") and third.endswith("146 frames, 30 of them abnormal")
    assert fourth.startswith("frame-level average precision")
    assert last == "2 of 4 videos failed and count nowhere"
    assert any("video" in line and "%" in line for line in err)  # a bar over videos

    # the files hold what was measured
    assert sorted(os.listdir(tmp_path / "scores")) == ["a b.json", "a b.npy", "normal.json", "normal.npy"]
    abnormal = np.load(tmp_path / "scores" / "a b.npy")
    normal = np.load(tmp_path / "scores" / "normal.npy")
    times = np.arange(73) / 10
    inside = (1 <= times) & (times < 2) | (3 <= times) & (times < 5)
    labels = np.concatenate([inside, np.zeros(73, bool)])
    area = roc_auc_score(labels, np.concatenate([abnormal, normal]))
    assert f"{area:.3f}" in third and np.array_equal(abnormal, normal)

    (tmp_path / "scores" / "a b.npy").unlink()
    status, out, err = cli(*options, "--json")
    assert np.array_equal(np.load(tmp_path / "scores" / "a b.npy"), abnormal)
    result = json.loads(err[-1])
    assert status == 2 and result["frame_auc"] == pytest.approx(area) and result["failed"] == 2
    assert {name: result[name] for name in ("videos", "abnormal", "normal", "frames", "abnormal_frames")} == {
        "videos": 2, "abnormal": 1, "normal": 1, "frames": 146, "abnormal_frames": 30
    }  # fmt: skip
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(o["video"], o["start"]) for o in lines] == [
        (path, start) for path in (video, str(tmp_path / "normal.mkv")) for start in (0, 2, 4, 4.3)
    ]
    assert all(o["description"] is None for o in lines)
    assert cli("--annotations", write_index(tmp_path))[2] == [f"error: {index}: no rows"]


def test_all_intervals_are_checked_before_the_model_runs(world, cli, tmp_path, monkeypatch):
    rows = [{"video": str(world / "a b.mkv"), "abnormal": [2, 5]}]
    for name in ("b.mkv", "c.mkv"):
        shutil.copy(world / "a b.mkv", tmp_path / name)
        rows.append({"video": name, "abnormal": [120, 180]})

    def no_model(*_):
        raise ValueError("the model is loaded")

    monkeypatch.setattr(timeline, "load", no_model)
    status, out, err = cli("--annotations", write_index(tmp_path, *rows))
    errors = [line for line in err if line.startswith("error: ")]
    assert status == 2 and out == "" and ["[120, 180]" in line for line in errors] == [True, True, False]
    assert "give seconds" in errors[0] and errors[2] == "error: the model is loaded"


def test_a_killed_run_resumes(world, cli, tmp_path, monkeypatch):
    rows = []
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        shutil.copy(world / "a b.mkv", tmp_path / name)
        rows.append({"video": name, "abnormal": [2, 5]})
    scores = tmp_path / "scores"
    options = ["--annotations", write_index(tmp_path, *rows), "--score", "yes", "--json"]
    watch = timeline.watch
    watched = []

    def counted(model, tokenizer, path, *rest, **options):
        for window in watch(model, tokenizer, path, *rest, **options):
            if not watched or watched[-1] != os.path.basename(path):
                watched.append(os.path.basename(path))
            if watched == ["a.mkv", "b.mkv"] and not resumed:
                raise KeyboardInterrupt
            yield window

    resumed = False
    monkeypatch.setattr(timeline, "watch", counted)
    with pytest.raises(KeyboardInterrupt):
        cli(*options, "--scores", scores)
    assert sorted(os.listdir(scores)) == ["a.json", "a.npy"]
    resumed = True
    watched.clear()
    (scores / "a.npy").unlink()  # made again from the windows
    status, out, err = cli(*options, "--scores", scores)
    assert status == 0 and watched == ["b.mkv", "c.mkv"]
    undisturbed = cli(*options, "--scores", tmp_path / "other")
    assert (out, err[-1]) == (undisturbed[1], undisturbed[2][-1])
    for name in os.listdir(scores):
        assert (scores / name).read_bytes() == (tmp_path / "other" / name).read_bytes()

    # other options, another video and a foreign file are refused by name, before the model is loaded
    monkeypatch.setattr(timeline, "load", None)
    assert cli(*options, "--scores", scores)[1] == out  # all is done
    status, _, err = cli(*options, "--scores", scores, "--window", 3)
    changed = "stride was 1.0, is 0.75; window was 4.0, is 3.0"  # a quarter of the window
    message = f"made with other options ({changed}); give another --scores"
    assert status == 2 and err[-1] == f"error: {scores / 'a.json'}: {message}"
    (scores / "a.json").write_text("{}")
    status, _, err = cli(*options, "--scores", scores)
    assert err[-1] == f"error: {scores / 'a.json'}: not what this program writes; give another --scores"
    (scores / "a.json").unlink()
    with open(tmp_path / "b.mkv", "ab") as file:
        file.write(b"longer")
    status, _, err = cli(*options, "--scores", scores)
    assert status == 2 and err[-1].startswith(
        f"error: {scores / 'b.json'}: made with other options (video_bytes"
    )


def test_processes_share_the_videos(world, tmp_path, cli, one_thread):
    rows = []
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        shutil.copy(world / "a b.mkv", tmp_path / name)
        rows.append({"video": name, "abnormal": [2, 5] if name != "b.mkv" else []})
    options = ["--annotations", write_index(tmp_path, *rows), "--score", "yes", "--scores"]
    status, alone, _ = cli(*options, tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += ["-m", "apps.timeline", "--weights", world / "weights", "--device", "cpu"]
    shared = subprocess.run(
        [*torchrun, *options, tmp_path / "shared"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert status == shared.returncode == 0, shared.stderr
    assert alone == shared.stdout and "with an event: 2 (by" in alone
    for name in ("a", "b", "c"):
        files = [tmp_path / scores / f"{name}.npy" for scores in ("alone", "shared")]
        assert np.array_equal(*map(np.load, files))


# ---- Errors ------------------------------------------------------------------------------------------------


def test_bad_videos_do_not_stop_the_others(world, cli):
    paths = [world / name for name in ("missing.mkv", "text.mp4", "cut.mkv", "a b.mkv")]
    status, out, err = cli("--video", *paths, "--json", "--window", 2)
    errors = [line for line in err if line.startswith("error: ")]
    assert (
        status == 2 and len(errors) == 3 and all(f"{p}: " in e for p, e in zip(paths, errors, strict=False))
    )
    assert "is cut short" in errors[2]
    assert {json.loads(line)["video"] for line in out.splitlines()} == {str(paths[2]), str(paths[3])}


def test_bad_streams(world, cli, monkeypatch):
    with open(world / "text.mp4", "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        status, out, err = cli("--video", "-")
    assert status == 2 and out == "" and err[-1].startswith("error: -: ") and "faststart" in err[-1]


@pytest.mark.parametrize(
    "options",
    ["", "--video x --annotations y", "--video x --stride 5", "--video x --window 0",
     "--video x y --plot p.png", "--video - --out-video v.mp4", "--video x --plot nowhere/p.png",
     "--video x --threshold 2", "--annotations nowhere", "--video x --out-video ./x", "--video x --scores d",
     "--video x --window inf", "x --video y --plot p.png", "x --plot p.pdf", "x --out-video v.webm",
     "--video x --kinds nowhere", "--video x --kinds {world}/text.mp4", "--video x --weights nowhere"],
)  # fmt: skip
def test_wrong_options_are_one_line(world, cli, options):
    status, out, err = cli(*options.format(world=world).split())
    assert status == 2 and out == "" and err[-1].startswith("error: ") and len(err) <= 2


@pytest.mark.parametrize("content", ["x", '{"seconds": 0.0}', "[]"])
def test_a_wrong_length_of_the_clips_is_one_line(world, cli, tmp_path, content):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    (weights / "clips.json").write_text(content)
    status, out, err = cli("--video", world / "a b.mkv", "--weights", weights)
    assert status == 2 and out == "" and len(err) == 1 and "clips.json: not what apps.index writes" in err[0]
    assert cli("--video", world / "a b.mkv", "--weights", weights, "--window", 60)[0] == 0


def test_a_video_needs_no_option(world, cli):
    options = ["--window", 60, "--json", "--threshold", 1]
    expected = cli("--video", world / "a b.mkv", *options)[1]
    assert cli(*options, world / "a b.mkv")[1] == expected != ""


def test_phrases_without_contrast_are_refused(world, cli):
    status, _, err = cli("--video", world / "a b.mkv", "--kinds", world / "kinds.json", "--score", "yes")
    assert status == 2 and err[-1].startswith("error: --kinds is for --score contrast")


def test_the_bundled_weights_find_the_event(tmp_path, capfd):
    """In six long videos, among nothing that stands still."""
    (tmp_path / "videos").mkdir()
    rows = [toy.make_toy_clip(tmp_path, 7, "long", index) for index in range(6)]
    index = tmp_path / "long.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = Path(__file__).parents[2] / "weights" / "tiny"
    options = ["--annotations", str(index), "--weights", str(weights)]
    assert timeline.main([*options, "--stride", "2"]) == 0  # twice as fast as by default
    out = capfd.readouterr().out.splitlines()
    assert out[0].split()[:6] == "highest window on an event 100%".split()
    assert out[2].startswith("frame-level AUC") and float(out[2].split()[2]) > 0.9


def test_a_window_begins_every_quarter_of_a_window_but_at_least_every_two_seconds():
    for window, stride in (("0.4", 0.1), ("8", 2), ("60", 2)):
        assert timeline.parse_args(["--video", "x", "--window", window]).stride == pytest.approx(stride)
    assert timeline.parse_args(["--video", "x", "--stride", "3"]).stride == 3


def test_which_score_is_the_default():
    def chosen(*options):
        args = timeline.parse_args(["--video", "x", *options])
        return detect.choose_score(args.score, detect.find_kinds(args))

    assert len(chosen().keywords["phrases"]) == 11  # the toy world's kinds
    assert chosen("--weights", "mine") is detect.yes_score and chosen("--score", "yes") is detect.yes_score
    with pytest.raises(ValueError, match="--kinds FILE, or a kinds.json"):
        chosen("--weights", "mine", "--score", "contrast")


def test_no_matplotlib_is_one_line(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli("--video", "x", "--plot", "p.png")[2] == [
        "error: --plot needs matplotlib: pip install matplotlib (see --help)"
    ]


def test_phrases(tmp_path):
    file = Path(tmp_path / "kinds.json")
    file.write_text('{"normal": "all well", "fire": "burns"}')
    assert detect.read_phrases(file) == ["burns"]
    for text in ("[]", "{}", '{"normal": "all well"}', '{"fire": 3}', "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match="kinds.json: must be JSON like"):
            detect.read_phrases(file)
