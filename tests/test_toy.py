"""The toy world keeps its promises: seeded, disjoint, truthful texts, one phrase per kind, a tokenizer that is always the same."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import sentencepiece

import prepare
from prepare import BAND_Y, EFFECTS, FRAMES, KINDS, LANES, LONG_FRAMES, SIDES, V, toy_clip

ROOT = Path(__file__).parent.parent


def make(folder, *options):
    command = [sys.executable, ROOT / "prepare.py", "toy", "--out", folder, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same seed twice: other counts, other number of processes."""
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    for folder, numbers in ((a, "--n-train 26 --n-test 2 --n-long 1 --workers 2"), (b, "--n-train 3 --workers 1")):
        done = make(folder, "--seed", 7, *numbers.split())
        assert done.returncode == 0, done.stderr
    return a, b


@pytest.fixture(scope="module")
def planned():
    """Many clips and their texts; nothing is drawn."""
    return [toy_clip(3, "train", index)[:2] for index in range(2000)]


def test_seed_alone_decides(folders):
    a, b = folders
    assert read(a / "train.jsonl")[:3] == read(b / "train.jsonl") and not (b / "test.jsonl").exists()
    names = sorted(path.name for path in (b / "videos").iterdir())
    assert names == [f"train_{index:06d}.mp4" for index in range(3)]
    for name in ["tokenizer.model", "kinds.json", *(f"videos/{name}" for name in names)]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "test") for index in range(200)]
    assert len({toy_clip(*key)[0]["tracks"][0].x.tobytes() for key in keys}) == len(keys)


def test_index_videos_and_hawk_format(folders):
    """The index is complete; videos are 224x224, 32 frames at 8 a second, the actor's colour where the index says."""
    folder, lines = folders[0], read(folders[0] / "train.jsonl")
    assert not list(folder.rglob("*.tmp"))
    assert json.loads((folder / "kinds.json").read_text()) == {name: kind.phrase for name, kind in KINDS.items()}
    assert Counter(line["kind"] for line in lines) == {name: 4 if name == "normal" else 2 for name in KINDS}
    hawk = json.loads((folder / "all_videos_train.json").read_text())
    assert hawk == [{"video": line["video"], "QA": line["qa"], "description": line["description"]} for line in lines]
    for line in lines:
        assert line["source"] == "toy" and line["flags"] == [] and len(line["qa"]) == 6
        assert set("description motion place moment scene".split()) <= line.keys()
        actor, x, y = line["objects"][0], line["objects"][0]["x"], line["objects"][0]["y"]
        assert (actor["object"], actor["colour"]) == (line["object"], line["colour"])
        assert ("lying" in actor) == (line["kind"] == "falling")
        for thing in line["objects"]:
            assert len(thing["x"]) == len(thing["y"]) == FRAMES
            assert all(v is None or 0 <= v <= 1 for v in thing["x"] + thing["y"])
        assert (folder / line["video"]).stat().st_size < 60_000
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", folder / line["video"], *"-f rawvideo -pix_fmt rgb24 -".split()]
        done = subprocess.run(command, capture_output=True)
        assert all(word in done.stderr for word in (b"224x224", b"8 fps", b"yuv420p"))
        frames = np.frombuffer(done.stdout, np.uint8).reshape(FRAMES, 224, 224, 3).astype(int)
        if line["colour"] != "white" and x[0] is not None:
            u, v = int(x[0] * 224), int(y[0] * 224)
            patch = frames[0, v - 4 : v + 5, u - 4 : u + 5].reshape(-1, 3)
            hue = patch[np.argmax(np.ptp(patch, axis=1))]  # the least grey pixel
            assert np.corrcoef(hue, prepare.COLOURS[line["colour"]])[0, 1] > 0.85, (line["video"], line["colour"], hue)


def test_texts(planned):
    """A kind's phrase stands in each of its descriptions and in no other; the texts name what is there."""
    for clip, texts in planned:
        description, motion, actor, spec = texts["description"], texts["motion"], clip["tracks"][0], KINDS[clip["kind"]]
        assert [name for name, kind in KINDS.items() if kind.phrase in description] == [clip["kind"]]
        assert description.startswith(f"A {actor.colour} {actor.object} ") and clip["place"] in description
        assert not spec.point or clip["moment"] in description
        assert 20 <= len(description.split()) <= 40 and len(motion.split()) <= 12
        answers = " ".join(one["a"] for one in texts["qa"])
        assert clip["place"] in answers and f"{actor.colour} {actor.object}" in answers
        if clip["kind"] == "normal":
            assert all(track.y[0] <= actor.y[0] for track in clip["tracks"])  # the nearest one is described
            assert not any(kind.phrase in answers + motion for name, kind in KINDS.items() if name != "normal")
    assert len({texts["description"] for _, texts in planned}) > 0.9 * len(planned)


def test_kinds_are_balanced_and_mostly_motion(planned):
    counts = Counter(clip["kind"] for clip, _ in planned)
    assert len(counts) == len(KINDS) >= 10 and min(counts.values()) > 130
    assert 2 * sum(kind.motion_only for kind in KINDS.values()) >= len(KINDS) - 1
    for clip, _ in planned:  # what the eye could tell at once is absent from motion-only kinds
        tracks, spec = clip["tracks"], KINDS[clip["kind"]]
        assert tracks[0].object in spec.actors
        if spec.motion_only or clip["kind"] == "normal":
            assert not clip["effects"] and not any(track.pose.any() for track in tracks)
            assert len({track.object for track in tracks}) == len(tracks) <= 4


def test_tracks_do_what_the_text_says(planned):
    for clip, _ in planned:
        kind, actor, at = clip["kind"], clip["tracks"][0], int(np.ceil(clip["begin"] * FRAMES))
        dx, (zoom, down), way = np.diff(actor.x), clip["camera"], abs(actor.x[-1] - actor.x[0])
        band = np.argmin([abs(0.5 + zoom * (y - 0.5) + down - actor.y[:8].mean()) for y in BAND_Y])
        if actor.object in V and kind != "turn_back":
            assert (dx * LANES[band] < 0).all() if kind == "wrong_way" else (dx * LANES[band] >= -1e-9).all(), kind
        promised = {
            "normal": 0.1 < way < 0.55 and np.ptp(actor.y) == 0,
            "speeding": way > 0.7,
            "turn_back": np.sign(dx[0]) == -np.sign(dx[-1]),
            "loitering": np.ptp(actor.x) < 0.2 and (np.diff(np.sign(dx)) != 0).sum() >= 3,
            "swerving": 0.06 < np.ptp(actor.y) < 0.1,
            "crossing": 0.4 < np.ptp(actor.y) < 0.55,
        }
        promised |= dict.fromkeys(
            ["sudden_stop", "falling", "fire", "collision"],
            np.abs(dx[: at - 1]).min(initial=1) > 0.004 and np.abs(dx[at:]).max() < 1e-9,
        )
        assert promised.get(kind, True), kind
        seen = kind in ("speeding", "collision") or all(0 <= o.x.min() and o.x.max() <= 1 for o in clip["tracks"])
        assert seen and all(0.2 < track.y.min() and track.y.max() < 0.95 for track in clip["tracks"])
        if KINDS[kind].sided:
            low, high = next(SIDES[side] for side in SIDES if clip["place"].endswith(side))
            assert low - 0.1 < (clip["effects"][0].x[at] if kind == "collision" else actor.x[min(at, 31)]) < high + 0.1
        assert [track.object for track in clip["effects"]] == [EFFECTS[kind][0]] * (kind in EFFECTS and 1)
        assert all(np.isnan(track.x[:at]).all() and not np.isnan(track.x[at:]).any() for track in clip["effects"])


def test_long(folders):
    (line,) = read(folders[0] / "long.jsonl")
    start, end = line["abnormal"]
    assert set("video source object colour place".split()) <= line.keys() and line["kind"] in [*KINDS][1:]
    assert 8 <= start < end <= 38 and end - start == pytest.approx(4)
    for index in range(30):
        clip = toy_clip(1, "long", index)[0]
        assert len(clip["tracks"]) > 5 and len(clip["tracks"][0].x) == LONG_FRAMES == 40 * 8
        assert max(np.abs(np.diff(track.x)).max() for track in clip["tracks"]) < 0.045, clip["kind"]  # nothing jumps


def test_tokenizer(folders):
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "tokenizer.model"))
    assert 512 < tokens.vocab_size() <= 1024
    assert [tokens.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "a\nb  c\n", "\n", " two  spaces ", "Überraschung 漢字 7?"]
    for text in texts + [read(folders[0] / "train.jsonl")[0]["description"]]:
        assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.encode("A red car stops suddenly")) == 5
    assert len(tokens.encode("sampled at 0.0, 0.2, 0.5, 3.8 seconds")) == 7


def test_errors(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, options in ((tmp_path / "x", []), (tmp_path / "file", ["--n-train", 1])):
        done = make(folder, *options)
        assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
