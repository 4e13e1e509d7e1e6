"""The toy world keeps its promises: seeded, disjoint, truthful texts, one phrase per kind, always the same tokenizer."""

import json
import subprocess
import sys
from collections import Counter

import imageio_ffmpeg
import numpy as np
import pytest
import sentencepiece

import prepare
from prepare import BAND_Y, EFFECTS, FRAMES, KINDS, LANES, LONG_FRAMES, SIDES, V, toy_clip


def make(folder, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", "toy", "--out", str(folder), *options.split()])
        prepare.main()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same seed twice: other counts, other number of processes."""
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    make(a, "--seed 7 --n-train 30 --n-test 2 --n-long 1 --workers 2")
    make(b, "--seed 7 --n-train 3 --workers 1")
    return a, b


@pytest.fixture(scope="module")
def planned():
    """Many clips and their texts; nothing is drawn."""
    return [toy_clip(3, "train", index)[:2] for index in range(2000)]


def test_seed_alone_decides(folders):
    a, b = folders
    assert read(a / "train.jsonl")[:3] == read(b / "train.jsonl") and not (b / "test.jsonl").exists()
    names = [f"videos/train_{index:06d}.mp4" for index in range(3)]
    assert sorted(f"videos/{path.name}" for path in (b / "videos").iterdir()) == names
    for name in ["tokenizer.model", "kinds.json", *names]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "test") for index in range(200)]
    assert len({toy_clip(*key)[0]["tracks"][0].x.tobytes() for key in keys}) == len(keys)


def test_index_videos_and_hawk_format(folders):
    """The index is complete; videos are 224x224, 32 frames at 8 a second, the actor's colour where the index says."""
    folder, lines = folders[0], read(folders[0] / "train.jsonl")
    assert not list(folder.rglob("*.tmp"))
    assert json.loads((folder / "kinds.json").read_text()) == {name: kind.phrase for name, kind in KINDS.items()}
    assert Counter(line["kind"] for line in lines) == {name: 8 if name == "normal" else 2 for name in KINDS}
    hawk = json.loads((folder / "all_videos_train.json").read_text())
    assert hawk == [{"video": line["video"], "QA": line["qa"], "description": line["description"]} for line in lines]
    for line in lines:
        assert line["source"] == "toy" and line["flags"] == [] and len(line["qa"]) == 6
        assert {"motion", "place", "moment", "scene"} <= line.keys()
        actor, x, y = line["objects"][0], line["objects"][0]["x"], line["objects"][0]["y"]
        assert (actor["object"], actor["colour"]) == (line["object"], line["colour"])
        assert ("lying" in actor) == (line["kind"] == "falling")
        for thing in line["objects"]:
            assert len(thing["x"]) == len(thing["y"]) == FRAMES
            assert all(v is None or 0 <= v <= 1 for v in thing["x"] + thing["y"])
        assert (folder / line["video"]).stat().st_size < 60_000
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(folder / line["video"])]
        done = subprocess.run([*command, *"-f rawvideo -pix_fmt rgb24 -".split()], capture_output=True)
        assert all(word in done.stderr for word in (b"224x224", b"8 fps", b"yuv420p"))
        frames = np.frombuffer(done.stdout, np.uint8).reshape(FRAMES, 224, 224, 3).astype(int)
        if line["colour"] != "white" and x[0] is not None:
            u, v = int(x[0] * 224), int(y[0] * 224)
            patch = frames[0, v - 4 : v + 5, u - 4 : u + 5].reshape(-1, 3)
            hue = patch[np.argmax(np.ptp(patch, axis=1))]  # the least grey pixel
            assert np.corrcoef(hue, prepare.COLOURS[line["colour"]])[0, 1] > 0.85, (line["video"], line["colour"], hue)


def test_texts_and_kinds(planned):
    """A kind's phrase stands in each of its descriptions and in no other; the texts are true; kinds are balanced."""
    counts = Counter(clip["kind"] for clip, _ in planned)
    assert len(counts) == len(KINDS) >= 10 and min(counts.values()) > 130
    assert 2 * sum(kind.motion_only for kind in KINDS.values()) >= len(KINDS) - 1
    assert len({texts["description"] for _, texts in planned}) > 0.9 * len(planned)
    for clip, texts in planned:
        description, motion, tracks, spec = texts["description"], texts["motion"], clip["tracks"], KINDS[clip["kind"]]
        answers, who = " ".join(one["a"] for one in texts["qa"]), f"{tracks[0].colour} {tracks[0].object}"
        assert [name for name, kind in KINDS.items() if kind.phrase in description] == [clip["kind"]]
        assert description.startswith(f"A {who} ") and who in answers and tracks[0].object in spec.actors
        assert clip["place"] in description and clip["place"] in answers
        assert not spec.point or clip["moment"] in description
        assert 20 <= len(description.split()) <= 40 and len(motion.split()) <= 12
        if clip["kind"] == "normal":
            assert all(track.y[0] <= tracks[0].y[0] for track in tracks)  # the nearest one is described
            assert not any(kind.phrase in answers + motion for name, kind in KINDS.items() if name != "normal")
        if spec.motion_only or clip["kind"] == "normal":  # what the eye could tell at once is absent
            assert not clip["effects"] and not any(track.pose.any() for track in tracks)
            assert len({track.object for track in tracks}) == len(tracks) <= 4


def test_tracks_do_what_the_text_says(planned):
    for clip, _ in planned:
        kind, (actor, *_), at = clip["kind"], clip["tracks"], int(np.ceil(clip["begin"] * FRAMES))
        dx, dy, (zoom, down) = np.diff(actor.x), np.ptp(actor.y), clip["camera"]
        band = np.argmin([abs(0.5 + zoom * (y - 0.5) + down - actor.y[:8].mean()) for y in BAND_Y])
        if actor.object in V and kind != "turn_back":
            assert (dx * LANES[band] < 0).all() if kind == "wrong_way" else (dx * LANES[band] >= -1e-9).all(), kind
        promised = {
            "normal": 0.1 < abs(dx.sum()) < 0.55 and dy == 0,
            "speeding": abs(dx.sum()) > 0.7,
            "turn_back": np.sign(dx[0]) == -np.sign(dx[-1]),
            "loitering": np.ptp(actor.x) < 0.2 and (np.diff(np.sign(dx)) != 0).sum() >= 3,
            "swerving": 0.12 < dy < 0.17,
            "crossing": 0.4 < dy < 0.55,
        }
        stops = abs(dx[: max(at - 1, 0)]).min(initial=1) > 0.004 and abs(dx[at:]).max() < 1e-9
        promised |= dict.fromkeys(["sudden_stop", "falling", "fire", "collision"], stops)
        assert promised.get(kind, True), kind
        for track in clip["tracks"]:
            inside = np.mean((track.x >= 0) & (track.x <= 1))  # some come or go
            assert inside == 1 if KINDS[kind].sided and kind != "collision" and track is actor else inside >= 0.25, kind
            assert 0.2 < track.y.min() <= track.y.max() < 0.95
        if KINDS[kind].sided:
            low, high = next(SIDES[side] for side in SIDES if clip["place"].endswith(side))
            x = clip["effects"][0].x[at] if kind == "collision" else actor.x[min(at, FRAMES - 1)]
            assert low - 0.1 < x < high + 0.1
        assert [track.object for track in clip["effects"]] == ([EFFECTS[kind][0]] if kind in EFFECTS else [])
        assert all((np.isnan(track.x) == (np.arange(FRAMES) < at)).all() for track in clip["effects"])


def test_long(folders):
    (line,) = read(folders[0] / "long.jsonl")
    start, end = line["abnormal"]
    assert {"video", "source", "object", "colour", "place"} <= line.keys() and line["kind"] in [*KINDS][1:]
    assert 8 <= start < end <= 38 and end - start == pytest.approx(4)
    for index in range(30):
        clip = toy_clip(1, "long", index)[0]
        assert len(clip["tracks"]) > 3 and len(clip["tracks"][0].x) == LONG_FRAMES == 40 * 8
        assert max(np.abs(np.diff(track.x)).max() for track in clip["tracks"]) < 0.045, clip["kind"]  # nothing jumps
        x, begin = np.array([track.x for track in clip["tracks"]]), int(np.ceil(clip["begin"] * FRAMES))
        seen = ((x > 0) & (x < 1)).any(0)
        assert all(seen[first : first + FRAMES].any() for first in range(0, LONG_FRAMES - FRAMES + 1, 4)), index
        moving = np.abs(np.diff(x)) > 1e-4  # outside the event only who is hit may stand, for the clip before it
        assert moving[:, : begin - FRAMES - 1].all() and moving[:, begin + FRAMES + 1 :].all(), clip["kind"]


def test_road_users_come_and_go(planned):
    """Else a thing at the picture's edge would be a sign of an event, or of none."""
    for normal in (True, False):
        clips = [clip for clip, _ in planned if (clip["kind"] == "normal") == normal]
        tracks = [track for clip in clips for track in clip["tracks"][1:]]
        partly = np.mean([np.any((track.x < 0) | (track.x > 1)) for track in tracks])
        assert 0.3 < partly < 0.7 and 0.5 < len(tracks) / len(clips) < 1.6


def test_tokenizer(folders):
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "tokenizer.model"))
    assert 512 < tokens.vocab_size() <= 1024
    assert [tokens.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "a\nb  c\n", "\n", " two  spaces ", "Überraschung 漢字 7?"]
    for text in texts + [read(folders[0] / "train.jsonl")[0]["description"]]:
        assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.encode("A red car stops suddenly")) == 5
    assert len(tokens.encode("sampled at 0.0, 0.2, 0.5, 3.8 seconds")) == 7


def test_an_index_never_stands_beside_other_clips(tmp_path):
    (tmp_path / "train.jsonl").write_text("of another seed")
    (tmp_path / "videos/train_000000.mp4").mkdir(parents=True)  # so that the clip cannot be written
    with pytest.raises(SystemExit, match="^error: [^\n]+$"):
        make(tmp_path, "--n-train 1")
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize("options", ["", "--n-train 1"])
def test_errors(tmp_path, options):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: [^\n]+$"):
        make(tmp_path / "file", options)
