"""Windows, scores, pictures and agreement of apps/timeline.py, with a small random model."""

import json
import math
import os
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

from apps import timeline, toy
from apps.timeline import Window
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
    monkeypatch.setattr(timeline, "PHRASES_PER_BATCH", 3)
    found = timeline.log_likelihoods(model, encoding, prompt, answers, starts)
    for value, ids, start in zip(found, answers, starts, strict=True):
        x = model.embed(torch.tensor([prompt + ids]), encoding.tokens)
        with torch.no_grad():
            log_p = model.llama.lm_head(model.llama(x))[0].log_softmax(-1)
        expected = sum(log_p[len(prompt) - 1 + t, ids[t]] for t in range(start, len(ids)))
        assert value.item() == pytest.approx(expected.item(), abs=1e-4)


def test_contrast_finds_where_the_phrases_go(loaded, monkeypatch):
    """The score is what comes behind "A red car", not behind another word."""
    monkeypatch.setattr(timeline, "describe", lambda *_: ([1], "A red car moves along and on"))

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

    monkeypatch.setattr(timeline, "log_likelihoods", likelihoods)
    score = timeline.contrast_score(*loaded, None, None, ["drives the wrong way", "is red"])
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


def test_a_score_is_shared_with_the_windows_before_that_it_overlaps(loaded, monkeypatch):
    def scores(raw, stride, length=4.0):
        spans = [(k * stride, k * stride + length, None) for k in range(len(raw))]
        monkeypatch.setattr(timeline, "read_windows", lambda *_: spans)
        monkeypatch.setattr(timeline, "encode_clips", lambda *_: None)
        own = iter(raw)
        return [
            w.score for w in timeline.watch(*loaded, "v", lambda *_: next(own), length, stride, threshold=2)
        ]

    assert scores([0, 0.9, 0, 0, 0.3], 2) == [0, 0.6, 0.3, 0, 0.2]
    assert scores([0.1, 0.9, 0.2], 4) == [0.1, 0.9, 0.2]
    assert scores([1, 0, 0, 0, 0], 1) == [1, 0.4286, 0.2222, 0.1, 0]  # weights 1, 3/4, 1/2, 1/4
    assert scores([0.7] * 9, 0.5) == [0.7] * 9
    lengths = []
    shared_score = timeline.shared_score

    def counted(overlapping):
        lengths.append(len(overlapping))
        return shared_score(overlapping)

    monkeypatch.setattr(timeline, "shared_score", counted)
    scores([0.5] * 100, 1)
    assert max(lengths) == 4  # no more is held


# ---- What is shown -----------------------------------------------------------------------------------------


def test_curve_and_events_by_hand():
    seen = [Window("v", 2.0 * k, 2.0 * k + 4, s, f"d{k}") for k, s in enumerate([0, 0.6, 1, 0.2, 0.5])]
    assert timeline.curve(seen, 6).tolist() == pytest.approx([0, 0.3, 0.8, 0.6, 0.35, 0.5])
    assert [(start, end, top.description) for start, end, top in timeline.events(seen, 0.5)] == [
        (2, 8, "d2"),
        (8, 12, "d4"),
    ]
    assert timeline.events(seen, 1.01) == []


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


def test_only_what_is_needed_is_kept(capsys):
    found = [Window("x", 2.0 * k, 2.0 * k + 4, 0.5, None) for k in range(5)]
    assert timeline.show_video("x", found, timeline.parse_args(["--video", "x", "--json"])) == []
    assert len(timeline.show_video("x", found, timeline.parse_args(["--annotations", "x", "--json"]))) == 5
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_strip():
    strip = timeline.draw_strip([Window("v", 0, 1, 0.0, None), Window("v", 1, 2, 1.0, None)], 0.5, 10, 8)
    assert (
        strip.shape == (8, 10, 3) and (strip[:4, :5] == 24).all() and (strip[:4, 5:] == (255, 50, 60)).all()
    )
    assert (strip[4, ::6] == 160).all()


# ---- Agreement ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_auc_counts_pairs(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert timeline.auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_agreement_by_hand():
    def video(*scores):
        return [Window("v", 2.0 * k, 2.0 * k + 4, score, None) for k, score in enumerate(scores)]

    assert timeline.auc([], [1]) is None
    # windows at 2 and 6 are half in, that at 4 more, that at 0 not
    one = (video(0.1, 0.2, 0.9, 0.3), [(5.0, 9.0)])
    # the windows at 4 and 6 are a quarter in and left out; those at 0 and 2 are not in
    two = (video(0.8, 0.1, 0.2, 0.4), [(7.0, 8.0)])
    normal = (video(0.3), [])
    result = timeline.agreement([one, two, normal])
    pairs = [(p > n) + (p == n) / 2 for p in (0.9, 0.3) for n in (0.1, 0.8, 0.1, 0.3)]
    area = sum(pairs) / len(pairs)
    expected = {"videos": 3, "abnormal": 2, "hits": 1, "chance": (3 / 4 + 2 / 4) / 2, "windows": 6}
    assert {k: pytest.approx(v) for k, v in (expected | {"auc": area}).items()} == result
    both = (
        one[0],
        [(0.0, 2.5), (8.0, 10.0)],
    )  # two events: the window at 4 is on neither, those at 0 and 6 are
    assert timeline.agreement([both])["hits"] == 0 and timeline.agreement([both])["windows"] == 3


def test_frame_scores_and_auc_by_hand():
    seen = [Window("v", 0.0, 4.0, 0.2, None), Window("v", 2.0, 6.0, 0.8, None)]
    times = np.array([0.0, 1.0, 3.0, 5.0, 5.9])
    scores = timeline.frame_scores(seen, times)
    assert scores == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    # abnormal: 3 s and 5 s (0.5, 0.8); normal: 0.2, 0.2, 0.8 here and 0.5 in a normal video
    area = timeline.frame_auc([(scores, times, [(3.0, 5.5)]), (np.array([0.5]), np.array([0.0]), [])])
    pairs = [(p > n) + (p == n) / 2 for p in (0.5, 0.8) for n in (0.2, 0.2, 0.8, 0.5)]
    assert area == pytest.approx(sum(pairs) / len(pairs))
    assert timeline.frame_auc([(scores, times, [])]) is None


def test_forms_of_annotations(tmp_path):
    index = tmp_path / "index.jsonl"
    rows = [{"video": "a.mp4", "abnormal": [1, 2]}, {"video": "b.mp4", "abnormal": [[1, 2], [4, 5.5]]}]
    rows += [{"video": "c.mp4", "abnormal": [], "description": "A line\u2028separator."}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    index.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # with a BOM
    found = timeline.read_annotations(index)
    assert [intervals for _, intervals in found] == [[(1.0, 2.0)], [(1.0, 2.0), (4.0, 5.5)], []]
    for bad in ([2, 1], [1], ["a", 2], [[1, 2], 3], 5, None, [-1, 2], [1, 1e999]):
        index.write_text("\n" + json.dumps({"video": "x", "abnormal": bad}) + "\n")
        with pytest.raises(ValueError, match='index.jsonl, line 2: needs "video" and "abnormal"'):
            timeline.read_annotations(index)


def test_frame_numbers_in_place_of_seconds_are_refused(world, cli, tmp_path):
    index = tmp_path / "index.jsonl"
    row = {"video": str(world / "a b.mkv"), "abnormal": [120, 180]}
    index.write_text(json.dumps(row) + "\n")
    status, out, err = cli("--annotations", index, "--window", 3)
    assert status == 2 and out == ""
    assert any("[120, 180] is beyond its end" in line and "give seconds" in line for line in err)


def test_annotations(world, cli, tmp_path):
    rows = [
        {"video": str(world / name), "abnormal": [2, 5], "kind": "way"} for name in ("a b.mkv", "text.mp4")
    ]
    index = tmp_path / "long.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = cli(
        "--annotations", index, "--window", 3, "--threshold", 0
    )  # 0-3, 2-5, 4-7 and 4.3-7.3 s
    assert status == 2 and [line.split(": ")[1] for line in err if line.startswith("error: ")] == [
        rows[1]["video"]
    ]
    first, second, third = out.splitlines()
    assert first == "highest window on the event: 100% of 1 videos (by chance 100%)"
    assert second == "AUC of window scores: undefined (1 windows)"
    assert third.startswith("AUC of frame scores: ")
    scores = tmp_path / "scores"
    _, out, err = cli("--annotations", index, "--window", 3, "--json", "--threshold", 0, "--scores", scores)
    result = json.loads([line for line in err if line.startswith("{")][-1])
    assert len(np.load(scores / "a b.npy")) == result["frames"] and result["videos"] == 1
    assert all(json.loads(line)["description"] is None for line in out.splitlines())
    index.write_text("\n")
    assert cli("--annotations", index)[2] == [f"error: {index}: no rows"]
    index.write_text('\n{"video": "x", "abnormal": [3, 3]}\n')
    assert cli("--annotations", index)[2] == [
        f'error: {index}, line 2: needs "video" and "abnormal": [start, end], a list of such, or []'
    ]


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
     "--video x --window inf",
     "--video x --kinds nowhere", "--video x --kinds {world}/text.mp4", "--video x --weights nowhere"],
)  # fmt: skip
def test_wrong_options_are_one_line(world, cli, options):
    status, out, err = cli(*options.format(world=world).split())
    assert status == 2 and out == "" and err[-1].startswith("error: ") and len(err) <= 2


def test_phrases_without_contrast_are_refused(world, cli):
    status, _, err = cli("--video", world / "a b.mkv", "--kinds", world / "kinds.json", "--score", "yes")
    assert status == 2 and err[-1].startswith("error: --kinds is for --score contrast")


def test_the_bundled_weights_find_the_event(tmp_path, capfd):
    """Two videos of the three times fifty whose figures the documentation gives."""
    (tmp_path / "videos").mkdir()
    rows = [toy.make_toy_clip(tmp_path, 7, "long", index) for index in range(2)]
    index = tmp_path / "long.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = Path(__file__).parents[2] / "weights" / "tiny"
    assert timeline.main(["--annotations", str(index), "--weights", str(weights)]) == 0
    assert "100% of 2 videos" in capfd.readouterr().out


def test_which_score_is_the_default():
    def chosen(vocabulary, *options):
        args = timeline.parse_args(["--video", "x", *options])
        return timeline.choose_score(args, HawkConfig(vocab_size=vocabulary))

    assert len(chosen(1024).keywords["phrases"]) == 11  # the toy world's kinds
    assert chosen(32000) is timeline.yes_score and chosen(1024, "--score", "yes") is timeline.yes_score
    with pytest.raises(ValueError, match="needs --kinds"):
        chosen(32000, "--score", "contrast")


def test_no_matplotlib_is_one_line(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli("--video", "x", "--plot", "p.png")[2] == [
        "error: --plot needs matplotlib: pip install matplotlib (see --help)"
    ]


def test_phrases(tmp_path):
    file = Path(tmp_path / "kinds.json")
    file.write_text('{"normal": "all well", "fire": "burns"}')
    assert timeline.read_phrases(file) == ["burns"]
    for text in ("[]", "{}", '{"normal": "all well"}', '{"fire": 3}', "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match="kinds.json: must be JSON like"):
            timeline.read_phrases(file)
