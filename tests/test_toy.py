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
from prepare import BAND_Y, FRAMES, KINDS, LANES, SIDES, VEHICLES, toy_clip

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
    for folder, options in ((a, (26, 4, 1, 2)), (b, (5, 0, 0, 1))):
        flags = ["--n-train", "--n-test", "--n-long", "--workers"]
        done = make(folder, "--seed", 7, *[part for pair in zip(flags, options, strict=True) for part in pair])
        assert done.returncode == 0, done.stderr
    return a, b


@pytest.fixture(scope="module")
def planned():
    """A few thousand clips and their texts; nothing is drawn."""
    return [toy_clip(3, "train", index)[:2] for index in range(3000)]


def test_seed_alone_decides(folders):
    a, b = folders
    assert read(a / "train.jsonl")[:5] == read(b / "train.jsonl")
    names = sorted(path.name for path in (b / "videos").iterdir())
    assert names == [f"train_{index:06d}.mp4" for index in range(5)]
    for name in ["tokenizer.model", "kinds.json", *(f"videos/{name}" for name in names)]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_splits_and_seeds_differ():
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "test") for index in range(200)]
    assert len({toy_clip(*key)[0]["actor"].x.tobytes() for key in keys}) == len(keys)


def test_index_and_hawk_format(folders):
    folder = folders[0]
    assert not list(folder.rglob("*.tmp")) and not (folders[1] / "test.jsonl").exists()
    lines = read(folder / "train.jsonl")
    assert json.loads((folder / "kinds.json").read_text()) == {name: kind.phrase for name, kind in KINDS.items()}
    assert Counter(line["kind"] for line in lines) == {name: 4 if name == "normal" else 2 for name in KINDS}
    for line in lines:
        assert line["source"] == "toy" and line["flags"] == [] and len(line["qa"]) == 6
        assert set("video description motion object colour place moment scene objects".split()) <= line.keys()
        assert (folder / line["video"]).stat().st_size < 60_000
        assert (line["objects"][0]["object"], line["objects"][0]["colour"]) == (line["object"], line["colour"])
        assert ("lying" in line["objects"][0]) == (line["kind"] == "falling")
        for thing in line["objects"]:
            assert len(thing["x"]) == len(thing["y"]) == FRAMES
            assert all(v is None or 0 <= v <= 1 for v in thing["x"] + thing["y"])
    hawk = json.loads((folder / "all_videos_train.json").read_text())
    assert hawk == [{"video": line["video"], "QA": line["qa"], "description": line["description"]} for line in lines]


def test_phrases(planned):
    """A kind's phrase stands in each of its descriptions and in no other; the texts name what is there."""
    for clip, (description, qa, motion) in planned:
        assert [name for name, kind in KINDS.items() if kind.phrase in description] == [clip["kind"]]
        actor = clip["actor"]
        assert description.startswith(f"A {actor.colour} {actor.object} ") and clip["place"] in description
        assert not KINDS[clip["kind"]].point or clip["when"] in description
        assert 20 <= len(description.split()) <= 40 and len(motion.split()) <= 12
        answers = " ".join(one["a"] for one in qa)
        assert clip["place"] in answers and f"{actor.colour} {actor.object}" in answers
        if clip["kind"] == "normal":
            assert all(track.y[0] <= actor.y[0] for track in clip["tracks"])  # the nearest one is described
            others = [kind.phrase for name, kind in KINDS.items() if name != "normal"]
            assert not any(phrase in answers + motion for phrase in others)
    assert len({text for _, (text, _, _) in planned}) > 0.9 * len(planned)


def test_kinds_are_balanced_and_mostly_motion(planned):
    counts = Counter(clip["kind"] for clip, _ in planned)
    assert len(counts) == len(KINDS) >= 10 and min(counts.values()) > 200
    abnormal = [kind for name, kind in KINDS.items() if name != "normal"]
    assert 2 * sum(kind.motion_only for kind in abnormal) >= len(abnormal)
    for clip, _ in planned:  # what the eye could tell at once is absent from motion-only kinds
        spec = KINDS[clip["kind"]]
        assert clip["actor"].object in spec.actors
        if spec.motion_only or clip["kind"] == "normal":
            assert not clip["effects"] and all(np.abs(track.pose).max() == 0 for track in clip["tracks"])
            assert len({track.object for track in clip["tracks"]}) == len(clip["tracks"]) <= 4


def test_tracks_do_what_the_text_says(planned):
    for clip, _ in planned:
        kind, actor, at = clip["kind"], clip["actor"], int(np.ceil(clip["begin"] * FRAMES))
        dx, zoom = np.diff(actor.x), clip["camera"][0]
        band = np.argmin([abs(0.5 + zoom * (y - 0.5) + clip["camera"][1] - actor.y[:8].mean()) for y in BAND_Y])
        way = LANES[band] if actor.object in VEHICLES and kind not in ("wrong_way", "turn_back") else None
        if way:
            assert (dx * way >= -1e-9).all(), kind
        if kind == "wrong_way":
            assert (dx * LANES[band] < 0).all()
        if kind == "normal":
            assert 0.1 < abs(actor.x[-1] - actor.x[0]) < 0.55 and np.ptp(actor.y) == 0
        if kind == "speeding":
            assert abs(actor.x[-1] - actor.x[0]) > 0.7
        if kind in ("sudden_stop", "falling", "fire", "collision"):
            assert np.abs(dx[: at - 1]).min() > 0.004 and np.abs(dx[at:]).max() < 1e-9
        if kind == "turn_back":
            assert np.sign(dx[0]) == -np.sign(dx[-1])
        if kind == "loitering":
            assert np.ptp(actor.x) < 0.2 and (np.diff(np.sign(dx)) != 0).sum() >= 3
        if kind in ("swerving", "crossing"):
            assert (0.06 if kind == "swerving" else 0.4) < np.ptp(actor.y) < (0.1 if kind == "swerving" else 0.55)
        if kind not in ("speeding", "collision"):
            assert all(0 <= track.x.min() and track.x.max() <= 1 for track in clip["tracks"])
        assert all(0.2 < track.y.min() and track.y.max() < 0.95 for track in clip["tracks"])
        if KINDS[kind].sided:
            side = next(side for side in SIDES if clip["place"].endswith(side))
            at_event = clip["effects"][0].x[at] if kind == "collision" else actor.x[min(at, FRAMES - 1)]
            low, high = SIDES[side]
            assert low - 0.1 < at_event < high + 0.1
        effect = {"collision": "crash", "fire": "fire", "left_bag": "bag"}.get(kind)
        assert [track.object for track in clip["effects"]] == ([effect] if effect else [])
        for track in clip["effects"]:
            assert np.isnan(track.x[:at]).all() and not np.isnan(track.x[at:]).any()


def test_videos(folders):
    """224x224, 32 frames at 8 a second; the actor's colour is where the index says."""
    folder = folders[0]
    for line in read(folder / "train.jsonl"):
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-i",
            folder / line["video"],
            *"-f rawvideo -pix_fmt rgb24 -".split(),
        ]
        done = subprocess.run(command, capture_output=True)
        assert b"224x224" in done.stderr and b"8 fps" in done.stderr and b"yuv420p" in done.stderr
        frames = np.frombuffer(done.stdout, np.uint8).reshape(FRAMES, 224, 224, 3).astype(int)
        thing = line["objects"][0]
        if line["colour"] == "white" or thing["x"][0] is None:
            continue
        x, y = int(thing["x"][0] * 224), int(thing["y"][0] * 224)
        patch = frames[0, y - 4 : y + 5, x - 4 : x + 5].reshape(-1, 3)
        hue = patch[np.argmax(np.ptp(patch, axis=1))]  # the least grey pixel
        assert np.corrcoef(hue, prepare.COLOURS[line["colour"]])[0, 1] > 0.85, (line["video"], line["colour"], hue)


def test_long(folders):
    (line,) = read(folders[0] / "long.jsonl")
    start, end = line["abnormal"]
    assert line["kind"] in KINDS and line["kind"] != "normal"
    assert 8 <= start < end <= 38 and end - start == pytest.approx(4)
    assert len(toy_clip(7, "long", 0)[0]["actor"].x) == prepare.LONG_FRAMES
    for index in range(60):
        clip = toy_clip(1, "long", index)[0]
        steps = [np.abs(np.diff(track.x)).max() for track in clip["tracks"]]
        assert max(steps) < 0.045, (clip["kind"], steps)  # nothing jumps


def test_tokenizer(folders):
    model = (folders[0] / "tokenizer.model").read_bytes()
    assert model == prepare.toy_tokenizer()
    tokens = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert 512 < tokens.vocab_size() <= 1024
    assert [tokens.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "a\nb  c\n", "\n", " two  spaces ", "Überraschung 漢字 7?"]
    for text in texts + [read(folders[0] / "train.jsonl")[0]["description"]]:
        assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.encode("A red car stops suddenly")) == 5
    assert len(tokens.encode("sampled at 0.0, 0.2, 0.5, 3.8 seconds")) == 7


def test_errors(tmp_path):
    done = make(tmp_path / "x")
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    done = make(tmp_path / "file", "--n-train", 1)
    assert done.returncode and done.stderr.startswith("error: ") and "file" in done.stderr
