"""prepare.py features: what is frozen in training, computed once and read by data.CachedFeatures."""

import json
import shutil
import subprocess

import imageio_ffmpeg
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import prepare
from hawk import Hawk


@pytest.fixture
def folder(world, tmp_path):
    """Videos of one's own and their indexes, one row of which names a broken file."""
    for name in ("a b", "c", "broken"):
        shutil.copy(world / f"{name}.mp4", tmp_path)
    rows = [{"video": f"{name}.mp4", "description": "A dog."} for name in ("a b", "broken", "c")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return tmp_path


def features(world, folder, *more):
    command = ["features", "--weights", world / "weights", "--data", folder, "--out", folder / "cache"]
    prepare.main([*map(str, command), "--workers", "0", "--device", "cpu", *more])


def cache(world, folder, split="train"):
    rows = data.read_index(folder / f"{split}.jsonl")
    model = Hawk.from_pretrained(world / "weights")
    print = data.frozen_fingerprint(model)
    return model, data.CachedFeatures(folder / "cache" / split, rows, model.config, print)


def test_cached_features_are_those_of_the_model(world, folder, capsys):
    features(world, folder, "--crops", "2", "--dtype", "float32")
    model, cached = cache(world, folder)
    assert cached.choices == 2 and cache(world, folder, "test")[1].choices == 1
    dataset = data.HawkDataset(data.read_index(folder / "train.jsonl"), None, model.config)
    for row in (0, 2):
        frames, clip = dataset.read(row, "uniform", None)
        cropped = data.random_crop(frames, data.clip_generator(42, 1, row))
        for choice, streams in enumerate((frames, cropped)):
            with torch.no_grad():
                expected = model.frame_features({name: x[None] / 255 for name, x in streams.items()})
            found = cached.load(row, choice)
            assert found.message == clip.message and found.streams.keys() == set(model.config.branches)
            for name, x in found.streams.items():
                torch.testing.assert_close(x, expected[name][0], atol=1e-5, rtol=1e-5)
    with pytest.raises(data.VideoError, match="broken.mp4"):
        cached.load(1, 0)
    assert "note: " in capsys.readouterr().err


def test_the_same_command_gives_the_same_bytes(world, folder):
    features(world, folder)
    files = {file: file.read_bytes() for file in (folder / "cache").rglob("*.*")}
    shutil.rmtree(folder / "cache")
    features(world, folder)
    assert {file: file.read_bytes() for file in (folder / "cache").rglob("*.*")} == files


def test_caches_used_to_have_their_texts_apart(world, folder):
    features(world, folder)
    file = folder / "cache/train/0.safetensors"
    expected = cache(world, folder)[1].load(0, 0)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["about"])
    save_file(load_file(file), file, about)
    assert cache(world, folder)[1].load(0, 0).message == expected.message
    for metadata in ({}, about | {"bytes": 5}, about | {"indices": "["}, {"about": "[]"}, {"about": "{"}):
        save_file(load_file(file), file, {key: str(value) for key, value in metadata.items()})
        with pytest.raises(data.VideoError, match="a b.mp4: (damaged features|is another).*remove .*/0.safe"):
            cache(world, folder)[1].load(0, 0)


def test_what_is_there_is_done(world, folder):
    features(world, folder)
    files = {file: file.stat().st_mtime_ns for file in (folder / "cache/train").glob("*.safetensors")}
    missing = folder / "cache/train/2.safetensors"
    missing.unlink()
    shutil.copy(folder / "c.mp4", folder / "broken.mp4")  # which can be read from now on
    with pytest.raises(ValueError, match="1 clips are missing"):
        cache(world, folder)
    features(world, folder)
    assert missing.exists() and all(
        file.stat().st_mtime_ns == t for file, t in files.items() if file != missing
    )
    assert cache(world, folder)[1].load(1, 0).message
    assert not (folder / "cache/train/bad_videos.jsonl").read_text()


def test_a_folder_of_pictures_may_be_moved(world, folder):
    """Its own size, unlike that of a file, says nothing about what it holds."""
    features(world, folder)
    (folder / "a b.mp4").unlink()
    (folder / "a b.mp4").mkdir()
    assert cache(world, folder)[1].load(0, 0).message


def test_another_folder_of_pictures_is_another_video(world, folder):
    """The folders of UCSD's Ped1 and Ped2 have the same names, and all of DoTA's are called images."""
    rows = []
    for number, name in enumerate(("a b", "c")):
        pictures = folder / f"{number}/images"
        pictures.mkdir(parents=True)
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        video = [ffmpeg, "-v", "error", "-i", folder / f"{name}.mp4", "-frames:v", "6", pictures / "%d.bmp"]
        subprocess.run(video, check=True)
        rows.append({"video": f"{number}/images", "description": "A dog."})
    index = folder / "train.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    features(world, folder)
    (folder / "0").rename(folder / "moved")
    rows[0]["video"] = "moved/images"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cache(world, folder)[1].load(0, 0).message
    for picture in (folder / "moved/images").iterdir():
        picture.rename(folder / picture.name)
    assert cache(world, folder)[1].load(0, 0).message  # its pictures are not needed
    for number in range(1, 7):
        (folder / f"{number}.bmp").rename(folder / f"moved/images/{number}.bmp")
    index.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    features(world, folder)  # it has all files already
    for i in range(2):
        with pytest.raises(data.VideoError, match=f"images: is another video now; remove .*{i}.safetensors"):
            cache(world, folder)[1].load(i, 0)


def test_damage_is_said(world, folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "damage", lambda video: ["is damaged"] * video.path.endswith("c.mp4"))
    features(world, folder)
    said = capsys.readouterr().err
    assert said.count(f"note: {folder}/c.mp4: is damaged\n") == 1 and said.count("is damaged") == 1


def test_another_cache_is_refused(world, folder):
    features(world, folder)
    with pytest.raises(SystemExit, match="error: .*train: has dtype 'float16', not 'float32'; use another"):
        features(world, folder, "--dtype", "float32")
    with pytest.raises(SystemExit, match="has choices 1, not 2"):
        features(world, folder, "--crops", "2")
    with pytest.raises(SystemExit, match="--crops must be at least 1"):
        features(world, folder, "--crops", "0")
    shutil.copy(folder / "c.mp4", folder / "a b.mp4")
    with pytest.raises(data.VideoError, match="a b.mp4: is another video now; remove .*0.safetensors"):
        cache(world, folder)[1].load(0, 0)
    rows = [json.loads(line) | {"fps": 10} for line in (folder / "train.jsonl").open()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="has videos .*; use another --out"):  # other times of its pictures
        features(world, folder)
    with pytest.raises(SystemExit, match="holds neither train.jsonl nor test.jsonl"):
        features(world, folder / "cache")


def test_videos_none_of_which_can_be_read(world, folder):
    for name in ("a b", "c"):
        shutil.copy(folder / "broken.mp4", folder / f"{name}.mp4")
    with pytest.raises(SystemExit, match="error: .*train: none of the 3 videos can be read"):
        features(world, folder)
    assert len((folder / "cache/train/bad_videos.jsonl").read_text().splitlines()) == 3


class Elsewhere(str):
    """The CPU, by the name of a GPU."""

    type = "cuda"


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_threads_read_for_a_gpu(world, folder, monkeypatch, capsys):
    features(world, folder)
    expected = cache(world, folder)[1]
    shutil.move(folder / "cache", folder / "before")
    devices = []
    read_clip = data.read_clip

    def seen(*paths, device, **options):
        devices.append(device)
        return read_clip(*paths, device=device, **options)

    monkeypatch.setattr(data, "read_clip", seen)
    monkeypatch.setattr(data, "usable_device", lambda name: Elsewhere("cpu"))
    monkeypatch.setattr(torch.utils.data, "DataLoader", None)
    features(world, folder)
    found = cache(world, folder)[1]
    assert {*map(type, devices)} == {Elsewhere} and len(devices) == 4
    expected.folder = folder / "before/train"
    for i in (0, 2):
        for name, stream in found.load(i, 0).streams.items():
            assert torch.equal(stream, expected.load(i, 0).streams[name])
    assert found.bad == expected.bad and [*found.bad] == [1]


def test_threads_work_only_a_little_ahead():
    begun = []

    def work(i):
        begun.append(i)
        return i * i

    results = prepare.read_ahead(work, range(100), 2)
    assert [next(results) for _ in range(10)] == [i * i for i in range(10)]
    assert max(begun) <= 10 + 2 * 2
    assert [*results] == [i * i for i in range(10, 100)]
    with pytest.raises(ZeroDivisionError):
        list(prepare.read_ahead(lambda i: 1 // i, [1, 0], 2))
