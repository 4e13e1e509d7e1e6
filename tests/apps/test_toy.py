"""The toy world keeps its promises: seeded, disjoint, truthful texts, one phrase per kind, one tokenizer."""

import json
import os
import signal
import subprocess
import time
from collections import Counter

import imageio_ffmpeg
import numpy as np
import pytest
import sentencepiece

from apps import toy
from apps.toy import BANDS, EFFECTS, FRAMES, KINDS, LONG_FRAMES, SIDES, VEHICLES, toy_clip


def make(folder, options):
    return toy.main(["--out", str(folder), *options.split()])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same seed twice, with other counts and another number of processes."""
    a = tmp_path_factory.mktemp("a")
    b = tmp_path_factory.mktemp("b")
    assert make(a, "--seed 7 --n-train 30 --n-test 2 --n-long 1 --workers 2") == 0
    assert make(b, "--seed 7 --n-train 3 --workers 1") == 0
    return a, b


@pytest.fixture(scope="module")
def planned():
    """Many clips with their texts; nothing is drawn."""
    return [toy_clip(3, "train", index)[:2] for index in range(2000)]


# ------------------------------------------------------------------------------------------------------------
# What is written


def test_seed_alone_decides(folders):
    a, b = folders
    assert read(a / "train.jsonl")[:3] == read(b / "train.jsonl")
    assert not (b / "test.jsonl").exists()
    videos = [f"videos/train_{index:06d}.mp4" for index in range(3)]
    assert sorted(f"videos/{path.name}" for path in (b / "videos").iterdir()) == videos
    for name in ["tokenizer.model", "kinds.json", *videos]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_splits_and_seeds_share_nothing():
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "test") for index in range(200)]
    paths = {toy_clip(*key)[0].tracks[0].x.tobytes() for key in keys}
    assert len(paths) == len(keys)


def test_index_and_published_format(folders):
    folder = folders[0]
    rows = read(folder / "train.jsonl")
    assert not list(folder.rglob("*.tmp"))
    assert json.loads((folder / "kinds.json").read_text()) == {
        name: kind.phrase for name, kind in KINDS.items()
    }
    assert Counter(row["kind"] for row in rows) == {name: 8 if name == "normal" else 2 for name in KINDS}
    published = json.loads((folder / "all_videos_train.json").read_text())
    assert published == [{"video": r["video"], "QA": r["qa"], "description": r["description"]} for r in rows]
    for row in rows:
        assert row["source"] == "toy" and row["flags"] == [] and len(row["qa"]) == 6
        assert {"motion", "place", "moment", "scene"} <= row.keys()
        actor = row["objects"][0]
        assert (actor["object"], actor["colour"]) == (row["object"], row["colour"])
        assert ("lying" in actor) == (row["kind"] == "falling")
        for thing in row["objects"]:
            assert len(thing["x"]) == len(thing["y"]) == FRAMES
            assert all(v is None or 0 <= v <= 1 for v in thing["x"] + thing["y"])


def test_videos_show_what_the_index_says(folders):
    """224x224, 32 frames at 8 a second, and the actor's colour where the actor is said to be."""
    for row in read(folders[0] / "train.jsonl"):
        path = folders[0] / row["video"]
        assert path.stat().st_size < 60_000
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        done = subprocess.run(command, capture_output=True)
        assert all(word in done.stderr for word in (b"224x224", b"8 fps", b"yuv420p"))
        frames = np.frombuffer(done.stdout, np.uint8).reshape(FRAMES, 224, 224, 3).astype(int)
        x = row["objects"][0]["x"][0]
        y = row["objects"][0]["y"][0]
        if row["colour"] != "white" and x is not None:
            u = int(x * 224)
            v = int(y * 224)
            patch = frames[0, v - 4 : v + 5, u - 4 : u + 5].reshape(-1, 3)
            hue = patch[np.argmax(np.ptp(patch, axis=1))]  # the least grey pixel
            assert np.corrcoef(hue, toy.COLOURS[row["colour"]])[0, 1] > 0.85, (row["video"], hue)


def test_tokenizer(folders):
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "tokenizer.model"))
    assert 512 < tokens.vocab_size() <= 1024
    assert [tokens.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    texts = [
        "[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>",
        "a\nb  c\n",
        "\n",
        " two  spaces ",
        "Überraschung 漢字 7?",
    ]
    texts.append(read(folders[0] / "train.jsonl")[0]["description"])
    for text in texts:
        assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.encode("A red car stops suddenly")) == 5
    assert len(tokens.encode("sampled at 0.0, 0.2, 0.5, 3.8 seconds")) == 7


# ------------------------------------------------------------------------------------------------------------
# What is planned and said


def test_a_phrase_names_its_kind_alone(planned):
    counts = Counter(video.kind for video, _ in planned)
    assert len(counts) == len(KINDS) >= 10 and min(counts.values()) > 130
    assert 2 * sum(kind.motion_only for kind in KINDS.values()) >= len(KINDS) - 1
    assert len({texts["description"] for _, texts in planned}) > 0.9 * len(planned)
    for video, texts in planned:
        assert [name for name, kind in KINDS.items() if kind.phrase in texts["description"]] == [video.kind]


def test_texts_are_true(planned):
    for video, texts in planned:
        description = texts["description"]
        motion = texts["motion"]
        spec = KINDS[video.kind]
        actor = video.tracks[0]
        answers = " ".join(turn["a"] for turn in texts["qa"])
        assert description.startswith(f"A {actor.name} ") and actor.name in answers
        assert actor.object in spec.actors
        assert video.event.place in description and video.event.place in answers
        assert not spec.point or video.event.moment in description
        assert 20 <= len(description.split()) <= 40 and len(motion.split()) <= 12
        if video.kind == "normal":
            assert all(track.y[0] <= actor.y[0] for track in video.tracks)  # the nearest one is described
            others = [kind.phrase for name, kind in KINDS.items() if name != "normal"]
            assert not any(phrase in answers + motion for phrase in others)
        if spec.motion_only or video.kind == "normal":  # nothing that a single frame could show
            assert not video.effects and not any(track.pose.any() for track in video.tracks)
            assert len({track.object for track in video.tracks}) == len(video.tracks) <= 4


def band_of(video, y):
    return BANDS[np.argmin([abs(video.picture_y(band.y) - y) for band in BANDS])]


def test_actors_do_what_the_text_says(planned):
    for video, _ in planned:
        actor = video.tracks[0]
        begin = int(np.ceil(video.begin * FRAMES))
        dx = np.diff(actor.x)
        dy = np.ptp(actor.y)
        stops = abs(dx[: max(begin - 1, 0)]).min(initial=1) > 0.004 and abs(dx[begin:]).max() < 1e-9
        promised = {
            "normal": 0.1 < abs(dx.sum()) < 0.55 and dy == 0,
            "speeding": abs(dx.sum()) > 0.7,
            "turn_back": np.sign(dx[0]) == -np.sign(dx[-1]),
            "loitering": np.ptp(actor.x) < 0.2 and (np.diff(np.sign(dx)) != 0).sum() >= 3,
            "swerving": 0.12 < dy < 0.17,
            "crossing": 0.4 < dy < 0.55,
            "sudden_stop": stops,
            "falling": stops,
            "fire": stops,
            "collision": stops,
        }
        assert promised.get(video.kind, True), video.kind
        if actor.object in VEHICLES and video.kind != "turn_back":
            along = dx * band_of(video, actor.y[:8].mean()).direction
            assert (along < 0).all() if video.kind == "wrong_way" else (along >= -1e-9).all(), video.kind


def test_everyone_is_where_the_text_says(planned):
    for video, _ in planned:
        sided = KINDS[video.kind].sided
        actor = video.tracks[0]
        begin = int(np.ceil(video.begin * FRAMES))
        for track in video.tracks:
            in_view = np.mean((track.x >= 0) & (track.x <= 1))
            if sided and video.kind != "collision" and track is actor:
                assert in_view == 1
            assert in_view >= 0.25, video.kind
            assert 0.2 < track.y.min() <= track.y.max() < 0.95
        if sided:
            low, high = SIDES[video.event.side]
            x = video.effects[0].x[begin] if video.kind == "collision" else actor.x[min(begin, FRAMES - 1)]
            assert video.event.place.endswith(video.event.side) and low - 0.1 < x < high + 0.1
        expected = [EFFECTS[video.kind][0]] if video.kind in EFFECTS else []
        assert [effect.object for effect in video.effects] == expected
        for effect in video.effects:  # there from the event on
            assert (np.isnan(effect.x) == (np.arange(FRAMES) < begin)).all()


def test_road_users_enter_and_leave(planned):
    """Otherwise somebody at the picture's edge would be a sign of an event, or of none."""
    for normal in (True, False):
        videos = [video for video, _ in planned if (video.kind == "normal") == normal]
        others = [track for video in videos for track in video.tracks[1:]]
        partly = np.mean([np.any((track.x < 0) | (track.x > 1)) for track in others])
        assert 0.3 < partly < 0.7
        assert 0.5 < len(others) / len(videos) < 1.6


def test_long(folders):
    (row,) = read(folders[0] / "long.jsonl")
    start, end = row["abnormal"]
    assert {"video", "source", "object", "colour", "place"} <= row.keys()
    assert row["kind"] in KINDS and row["kind"] != "normal"
    assert 8 <= start < end <= 38 and end - start == pytest.approx(4)
    for index in range(30):
        video = toy_clip(1, "long", index)[0]
        x = np.array([track.x for track in video.tracks])
        assert len(x) > 3 and x.shape[1] == LONG_FRAMES == 40 * 8
        assert np.abs(np.diff(x)).max() < 0.045, video.kind  # nothing jumps
        seen = ((x > 0) & (x < 1)).any(0)
        assert all(seen[first : first + FRAMES].any() for first in range(0, LONG_FRAMES - FRAMES + 1, 4)), (
            index
        )
        # outside the event everybody moves, but for the one that is hit: it may stand in the clip before
        moving = np.abs(np.diff(x)) > 1e-4
        begin = int(np.ceil(video.begin * FRAMES))
        assert moving[:, : begin - FRAMES - 1].all() and moving[:, begin + FRAMES + 1 :].all(), video.kind


# ------------------------------------------------------------------------------------------------------------
# Errors


def test_an_index_never_stands_beside_other_clips(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("of another seed")
    (tmp_path / "videos/train_000000.mp4").mkdir(parents=True)  # so that the clip cannot be written
    assert make(tmp_path, "--n-train 1 --workers 1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize("options", ["", "--n-train 1"])
def test_errors(tmp_path, options, capsys):
    (tmp_path / "file").write_text("")
    assert make(tmp_path / "file", options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


# ---- Clutter -----------------------------------------------------------------------------------------------


def test_clutter_stands_still_and_changes_nothing_else():
    counts = set()
    for index in range(60):
        bare, texts, _ = toy_clip(11, "test", index)
        full, told, _ = toy_clip(11, "test", index, (0, 6))
        counts.add(len(full.clutter))
        assert not bare.clutter and len(full.tracks) == len(bare.tracks)
        for one, other in zip(full.tracks + full.effects, bare.tracks + bare.effects, strict=True):
            np.testing.assert_array_equal(one.x, other.x)
        assert told == texts
        for thing in full.clutter:
            assert np.ptp(thing.x) == np.ptp(thing.y) == 0 and 0 < thing.x[0] < 1
            assert thing.object in (*toy.VEHICLES, *toy.WALKERS)
            others = [track for track in full.tracks + full.clutter if track is not thing]
            assert not any(toy.overlap(thing, other, 0.05) for other in others)
    assert counts == set(range(7))


def test_clutter_is_drawn_and_counted(tmp_path):
    bare, full = (toy_clip(3, "test", 0, clutter) for clutter in ((0, 0), (5, 5)))
    frames = [toy.render(video, rng).astype(int) for video, _, rng in (bare, full)]
    changed = np.abs(frames[0] - frames[1]).max(-1) > 60
    assert changed.mean() > 0.02 and (changed[0] & changed[-1]).sum() > 0.7 * changed[0].sum()
    toy.main(["--out", str(tmp_path), "--n-test", "2", "--n-long", "1", "--clutter", "2-3"])
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for row in rows:
        parked = [thing for thing in row["objects"] if thing.get("parked")]
        assert len(parked) == row["clutter"] in (2, 3)
    assert json.loads((tmp_path / "long.jsonl").read_text())["clutter"] in range(4)
    for wrong in ("7", "3-2", "-1", "many"):
        with pytest.raises(SystemExit):
            toy.main(["--out", str(tmp_path), "--n-test", "1", "--clutter", wrong])


def test_a_ctrl_c_waits_for_its_turn():
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), toy.ctrl_c_waits():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(True)
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_text_of_another_seed_stays_beside_the_videos(tmp_path):
    class Pool:
        def map(self, *_, **__):
            raise KeyboardInterrupt

    for name in ("test.jsonl", "all_videos_test.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(KeyboardInterrupt):
        toy.write_split(Pool(), tmp_path, 9, "test", 3, (0, 6), False)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_killed_is_one_line(tmp_path, capsys, monkeypatch):
    def killed(pool, *given):
        pool.submit(os.kill, os.getpid(), 0).result()  # there is a worker
        next(iter(pool._processes.values())).kill()
        pool.submit(time.sleep, 60).result()

    monkeypatch.setattr(toy, "write_split", killed)
    assert toy.main(["--out", str(tmp_path), "--n-test", "1", "--workers", "2"]) == 2
    said = capsys.readouterr().err
    assert said == "error: a worker was killed, perhaps for want of memory; try fewer --workers\n"
