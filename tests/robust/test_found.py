"""Videos as people have them: folders of numbered pictures, recorders' formats, and damaged files, which are
said to be damaged."""

import os
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from test_video import FFMPEG, SIZE, X264, decode, make, motion_of

import data
from apps.look import all_frames
from data import VideoError, read_clip
from hawk import HawkConfig

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Folders of pictures -----------------------------------------------------------------------------------
def pictures(folder, ending, count=12, name="frame_%03d", start=0):
    folder.mkdir()
    options = ["-frames:v", str(count), "-start_number", str(start)]
    make(folder / f"{name}.{ending}", *options, pixels="yuvj420p" if ending == "jpg" else "rgb24")
    return folder


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "bmp"])
def test_a_folder_of_numbered_pictures_is_a_video(tmp_path, ending):
    folder = pictures(tmp_path / "it's 01_0014", ending)
    (folder / "Thumbs.db").write_text("no picture")
    frames = np.concatenate([decode(file) for file in sorted(folder.glob("frame*"))])
    clip = read_clip(folder, 5, SIZE)
    assert clip.indices.tolist() == [0, 2, 4, 7, 9] and clip.notes == []
    assert clip.seconds == [0.0, 0.1, 0.2, 0.3, 0.4]  # 25 a second
    np.testing.assert_array_equal(clip.appearance, frames[clip.indices])
    current = np.maximum(clip.indices, 1)
    np.testing.assert_array_equal(clip.motion, motion_of(frames[current - 1], frames[current]))
    assert read_clip(folder, 5, SIZE, fps=2).seconds == [0.0, 1.0, 2.0, 3.5, 4.5]
    seconds, shown = zip(*all_frames(folder, SIZE, fps=2), strict=True)
    assert list(seconds) == [i / 2 for i in range(12)]
    np.testing.assert_array_equal(np.stack(shown), frames)


def test_pictures_are_in_the_order_of_their_last_number(tmp_path):
    folder = pictures(tmp_path / "frames", "png", name="cam2 (%d)", start=8)  # 8, 9, 10 …
    frames = np.concatenate([decode(folder / f"cam2 ({n}).png") for n in range(8, 20)])
    np.testing.assert_array_equal(read_clip(folder, 12, SIZE).appearance, frames)


def test_gaps_and_other_sizes_are_named(tmp_path):
    folder = pictures(tmp_path / "frames", "png")
    (folder / "frame_004.png").unlink()
    (folder / "frame_005.png").unlink()
    make(folder / "frame_007.png", "-frames:v", "1", source="testsrc2=s=40x30", pixels="rgb24")
    clip = read_clip(folder, 32, SIZE)
    assert len(clip.indices) == 10 and len(clip.notes) == 2
    assert "1 gap" in clip.notes[0] and "4 to 5" in clip.notes[0]
    assert "96x72" in clip.notes[1] and "40x30" in clip.notes[1]


def test_pictures_named_by_date_and_time(tmp_path):
    """The last number alone would put what came after midnight first. Exports may add a hash."""
    folder = pictures(tmp_path / "frames", "png", 4)
    frames = np.concatenate([decode(file) for file in sorted(folder.iterdir())])
    times = ("cam9_20240131_235958", "cam9_20240131_235959", "cam9_20240201_000000", "cam9_20240201_000001")
    files = sorted(folder.iterdir())
    hashed = ("v_8_rf.9a", "v_9_rf.b7", "v_10_rf.3c", "v_11_rf.1d")
    for names in (times, hashed, ("9_0", "8_1", "7_2", "6_3")):
        files = [file.rename(folder / f"{name}.png") for file, name in zip(files, names, strict=True)]
        np.testing.assert_array_equal(read_clip(folder, 4, SIZE).appearance, frames)


def test_each_picture_is_scaled_in_one_go(tmp_path):
    """Regardless of the colours in which the picture before it is stored."""
    folder = pictures(tmp_path / "frames", "png", 4)
    for number, pixels in {0: "gray", 2: "pal8"}.items():
        file = str(folder / f"frame_00{number}.png")
        subprocess.run([*FFMPEG, "-i", file, "-pix_fmt", pixels, file + ".png"], check=True)
        (folder / f"frame_00{number}.png.png").rename(file)
    frames = np.concatenate([decode(file) for file in sorted(folder.iterdir())])
    np.testing.assert_array_equal(read_clip(folder, 4, SIZE).appearance, frames)


def test_pictures_that_are_turned_are_named(tmp_path):
    folder = pictures(tmp_path / "frames", "jpg", 3)
    upright = (folder / "frame_001.jpg").read_bytes()
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, 6, 0)  # lies on its side
    turned = upright[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + upright[2:]
    (folder / "frame_001.jpg").write_bytes(turned)
    (note,) = read_clip(folder, 3, SIZE).notes
    assert "orientations (without EXIF: as the one before)" in note
    frames = read_clip(folder, 3, SIZE).appearance.astype(int)
    assert np.abs(frames[2] - frames[0]).mean() > 20  # frame_002 is turned as frame_001 is: so it is said


def test_folders_that_are_no_video(tmp_path):
    def refused(words):
        with pytest.raises(VideoError, match=words):
            read_clip(tmp_path / "a", image_size=SIZE)

    (tmp_path / "a").mkdir()
    refused("without numbered pictures")
    (tmp_path / "secret_1.png").write_bytes(b"outside")
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "secret_1.png")  # links may lead out of the folder
    refused("without numbered pictures")
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a").rmdir()
    pictures(tmp_path / "a", "png")
    (tmp_path / "a" / "mask 3.png").write_bytes((tmp_path / "a" / "frame_003.png").read_bytes())
    refused("the same number")
    (tmp_path / "a" / "mask 3.png").unlink()
    (tmp_path / "a" / "frame_005.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    refused("frame_005.png.*cannot be decoded")
    (tmp_path / "a" / "frame_000.png").write_bytes(b"RIFF\0\0\0\0WEBP, not a .png")
    with pytest.raises(VideoError, match="frame_000.png.*cannot be decoded") as kept:
        read_clip(tmp_path / "a", image_size=SIZE)
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join(20)  # no limit of ffmpeg's time runs on, though the error is kept
        assert kept and not timer.is_alive()


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.os, "scandir", deny)
    with pytest.raises(VideoError, match="Permission denied"):
        read_clip(tmp_path, image_size=SIZE)


def test_pictures_lead_nowhere(tmp_path):
    """Neither a list of pictures that is called a picture, nor lines of such a list in a name."""
    folder = pictures(tmp_path / "frames", "png", 3)
    (tmp_path / "secret.png").write_bytes((folder / "frame_000.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "frame_001.png").write_text("ffconcat version 1.0\nfile link.png\nduration 1\n")
    with pytest.raises(VideoError, match="frame_001.png: cannot be decoded"):
        read_clip(folder, 3, SIZE)
    (folder / "frame_001.png").unlink()
    for line_break in "\n\r":
        (folder / "frame_002.png").rename(folder / f"frame_002{line_break}file link.png")
        with pytest.raises(VideoError, match="frame_002 file link.png: has a line break"):
            read_clip(folder, 3, SIZE)
        (folder / f"frame_002{line_break}file link.png").rename(folder / "frame_002.png")


def test_names_of_pictures_are_no_patterns(tmp_path):
    for name, colour in {"x%d_1": "red", "x*_2": "blue", "x7_3": "lime"}.items():
        make(tmp_path / "a.png", "-frames:v", "1", source=f"color={colour}:s=32x32", pixels="rgb24")
        (tmp_path / "frames").mkdir(exist_ok=True)
        (tmp_path / "a.png").rename(tmp_path / "frames" / f"{name}.png")
    clip = read_clip(tmp_path / "frames", 3, SIZE)
    assert clip.appearance.mean((1, 2)).argmax(-1).tolist() == [0, 2, 1]  # red, blue, green


def test_an_index_line_says_how_many_pictures_a_second(tmp_path):
    pictures(tmp_path / "frames", "jpg")
    line = '{"video": "frames", "description": "Nothing.", "fps": %s}\n'
    (tmp_path / "a.jsonl").write_text(line % "4")
    dataset = data.HawkDataset(data.read_index(tmp_path / "a.jsonl"), None, HawkConfig.preset("tiny"))
    _, clip = dataset.read(0, "uniform", None)
    assert clip.seconds == [0.0, 0.2, 0.8, 1.0, 1.5, 1.8, 2.2, 2.5]
    for wrong in ("0", '"4"', "true", "-1", "1e999", "1" + "0" * 400):
        (tmp_path / "a.jsonl").write_text(line % wrong)
        with pytest.raises(ValueError, match='line 1: "fps"'):
            data.read_index(tmp_path / "a.jsonl")


# ---- Pictures that change their size -----------------------------------------------------------------------
@pytest.mark.parametrize("held", [0, 96 << 20])
def test_a_recording_that_changes_its_size(tmp_path, monkeypatch, held):
    """ffmpeg then begins anew to count the frames: what comes must still be those that were asked for."""
    make(tmp_path / "a.ts", *X264, seconds=2)  # ten frames a second
    make(tmp_path / "b.ts", *X264, "-output_ts_offset", "2", source="testsrc2=s=160x120:r=10", seconds=6)
    (tmp_path / "ab.ts").write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("a.ts", "b.ts")))
    copied = ["-i", tmp_path / "ab.ts", "-c", "copy", tmp_path / "c.ts"]
    subprocess.run([*FFMPEG, *copied], check=True)
    frames = decode(tmp_path / "c.ts")
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    monkeypatch.setattr(data, "HELD_BYTES", held)
    clip = read_clip(tmp_path / "c.ts", 8, SIZE)
    assert len(frames) == 80 and clip.indices.tolist() == list(range(0, 80, 10)) and clip.notes == []
    np.testing.assert_array_equal(clip.appearance, frames[clip.indices])
    monkeypatch.setattr(data, "decode_all", None)  # which others do not need
    clip = read_clip(tmp_path / "b.ts", 8, SIZE)
    np.testing.assert_array_equal(clip.appearance, decode(tmp_path / "b.ts")[clip.indices])


def test_a_changed_size_is_the_same_for_seeks(tmp_path, monkeypatch):
    """ffmpeg scales what comes after a change in two goes, but not if it begins there."""
    for name, source in {"a": "testsrc2=s=96x72:r=10", "b": "testsrc2=s=160x120:r=10"}.items():
        make(tmp_path / f"{name}.ts", *X264, "-g", "5", source=source, seconds=4)
    listing = tmp_path / "list.txt"
    listing.write_text("file a.ts\nfile b.ts\n")
    subprocess.run([*FFMPEG, "-f", "concat", "-i", listing, "-c", "copy", tmp_path / "ab.mp4"], check=True)
    frames = decode(tmp_path / "ab.mp4")
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    for n in (8, 32):  # fewer than the keyframes, and more
        clip = read_clip(tmp_path / "ab.mp4", n, SIZE)
        np.testing.assert_array_equal(clip.appearance, frames[clip.indices])
        assert len(frames) == 80 and clip.notes == []


# ---- Formats that hold the video in themselves -------------------------------------------------------------
def as_dav(path, frames, fps):
    """Dahua's container around H.264 pictures: header, extension with the rate, picture, size."""
    with open(path, "wb") as file:
        for number, payload in enumerate(frames):
            extension = bytes([0x81, 0, 8, fps, 0x82, 0, 0, 0]) + struct.pack("<HH", 96, 72)
            size = 24 + len(extension) + len(payload) + 8
            kind = 0xFD if number == 0 else 0xFC
            milliseconds = number * 1000 // fps
            date = (24 << 26) | (5 << 22) | (7 << 17) | (milliseconds // 1000)
            header = struct.pack("<4sBBBBIIIHBB", b"DHAV", kind, 0, 0, 0, number, size, date,
                                 milliseconds % 65536, len(extension), 0)  # fmt: skip
            file.write(header + extension + payload + b"dhav" + struct.pack("<I", size))


def test_raw_formats(tmp_path, monkeypatch):
    for small in (1 << 18, 0):
        monkeypatch.setattr(data, "SMALL_FILE", small)
        for name, options in {
            "a.y4m": [], "a.mjpeg": ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"], "a.h264": ["-c:v", "libx264"]
        }.items():  # fmt: skip
            path = make(tmp_path / name, *options)
            clip = read_clip(path, 6, SIZE)
            np.testing.assert_array_equal(clip.appearance, decode(path)[clip.indices])
            assert clip.notes == []
    raw = open(make(tmp_path / "b.h264", "-c:v", "libx264", "-bf", "0", "-x264-params", "aud=1"), "rb").read()
    units = raw.split(b"\0\0\0\1\x09")[1:]  # each begins with an access unit delimiter
    as_dav(tmp_path / "a.dav", [b"\0\0\0\1\x09" + unit for unit in units], 10)
    clip = read_clip(tmp_path / "a.dav", 4, SIZE)
    np.testing.assert_array_equal(clip.appearance, decode(tmp_path / "b.h264")[clip.indices])
    assert clip.seconds == [0.0, 1.0, 2.0, 3.0]


def test_a_single_picture_is_no_video(tmp_path):
    for ending in ("jpg", "png"):
        make(tmp_path / f"a.{ending}", "-frames:v", "1", pixels="yuvj420p" if ending == "jpg" else "rgb24")
        with pytest.raises(VideoError, match="supported are mp4.*folders of numbered pictures"):
            read_clip(tmp_path / f"a.{ending}", image_size=SIZE)


# ---- Damage ------------------------------------------------------------------------------------------------
CODECS = {
    "h264": [*X264, "-bf", "0"], "bframes": ["-c:v", "libx264", "-bf", "3", "-g", "12"],
    "mpeg4": ["-c:v", "mpeg4", "-g", "12"],
    "vp9": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"],
}  # fmt: skip


def damage(path, first, last):
    """Noise in place of what the packets `first` to `last` (excluded) hold, less their first bytes."""
    listing = subprocess.run([*FFMPEG, "-i", path, "-c", "copy", "-f", "framecrc", "-"], capture_output=True)
    lines = listing.stdout.decode().splitlines()
    sizes = [int(line.split(",")[4]) for line in lines if not line.startswith("#")]
    content = bytearray(open(path, "rb").read())
    position = content.index(b"mdat") + 4  # where the packets are, one behind the other
    for number, size in enumerate(sizes):
        if first <= number < last:
            noise = np.random.default_rng(number).bytes(max(size - 8, 0))
            content[position + size - len(noise) : position + size] = noise
        position += size
    open(path, "wb").write(content)


@pytest.mark.parametrize("small", [1 << 18, 0])
@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_said(tmp_path, monkeypatch, codec, small):
    monkeypatch.setattr(data, "SMALL_FILE", small)
    path = make(tmp_path / "a.mp4", *CODECS[codec], source="testsrc2=s=96x72:r=10,noise=alls=9", seconds=5)
    assert read_clip(path, 8, SIZE).notes == []
    damage(path, 20, 23)
    (note,) = read_clip(path, 8, SIZE).notes
    assert int(note.split()[0]) in range(1, 16)
    assert "did not decode without errors" in note
    damage(path, 8, 50)  # as if encrypted, after a clear start
    with pytest.raises(VideoError, match="frames are damaged or encrypted|none of its"):
        read_clip(path, 8, SIZE)


@pytest.mark.parametrize("name", ["a.gif", "a.avi", "a.ogv"])
def test_errors_that_cost_no_frame_are_said(tmp_path, name):
    options = ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"] if name == "a.avi" else []
    path = make(tmp_path / name, *options, pixels="rgb24" if name == "a.gif" else "yuv420p")
    assert read_clip(path, 8, SIZE).notes == []
    content = bytearray(open(path, "rb").read())
    middle = len(content) // 2
    content[middle : middle + 300] = np.random.default_rng(1).bytes(300)
    open(path, "wb").write(content)
    (note,) = read_clip(path, 8, SIZE).notes
    assert "damaged" in note and "\n" not in note


def test_damage_in_a_long_video_that_is_sought(tmp_path, monkeypatch):
    path = make(
        tmp_path / "long.mp4", *X264, "-bf", "0", source="testsrc2=s=96x72:r=10,noise=alls=9", seconds=400
    )
    ran = []
    real = data.seek
    monkeypatch.setattr(data, "seek", lambda *arguments: ran.append(1) or real(*arguments))
    assert read_clip(path, 8, SIZE).notes == [] and ran
    damage(path, 1500, 4000)
    with pytest.raises(VideoError, match="frames are damaged or encrypted"):
        read_clip(path, 8, SIZE)


def test_a_video_whose_frames_are_all_encrypted(tmp_path):
    path = make(tmp_path / "a.mp4", *CODECS["vp9"])
    damage(path, 0, 50)
    with pytest.raises(VideoError, match="none of its 40 frames can be decoded; it is damaged or encrypted"):
        read_clip(path, 8, SIZE)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_open_groups_and_cover_art_are_no_damage(tmp_path, ending):
    whole = make(
        tmp_path / f"whole.{ending}", "-c:v", "libx264", "-x264-params", "open-gop=1:keyint=10:bframes=3"
    )
    cover = make(tmp_path / "cover.png", "-frames:v", "1", pixels="rgb24")
    path = str(tmp_path / f"part.{ending}")
    options = ["-c", "copy"]
    if ending == "mp4":
        options = ["-i", cover, "-map", "0", "-map", "1", *options, "-disposition:v:1", "attached_pic"]
    subprocess.run([*FFMPEG, "-ss", "1", "-i", whole, *options, path], check=True)
    assert read_clip(path, 8, SIZE).notes == []


def test_a_recording_that_begins_between_keyframes_is_no_damage(tmp_path):
    whole = make(tmp_path / "whole.ts", *X264, "-g", "10", seconds=4)
    content = Path(whole).read_bytes()
    (tmp_path / "part.ts").write_bytes(content[len(content) // 3 // 188 * 188 :])
    assert read_clip(tmp_path / "part.ts", 8, SIZE).notes == []


def test_hevc_that_begins_between_keyframes_is_no_damage(tmp_path):
    hevc = ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:keyint=10"]
    content = Path(make(tmp_path / "whole.ts", *hevc, seconds=4)).read_bytes()
    (tmp_path / "part.ts").write_bytes(content[len(content) // 3 // 188 * 188 :])
    assert read_clip(tmp_path / "part.ts", 8, SIZE).notes == []
    lost = content[: len(content) // 2 // 188 * 188] + content[len(content) * 2 // 3 // 188 * 188 :]
    (tmp_path / "lost.ts").write_bytes(lost)
    assert read_clip(tmp_path / "lost.ts", 8, SIZE).notes


def test_damaged_sound_is_no_damage(tmp_path):
    whole = str(tmp_path / "whole.ts")
    sources = ["-f", "lavfi", "-i", "testsrc2=s=96x72:r=10:d=4", "-f", "lavfi", "-i", "sine=d=4"]
    subprocess.run([*FFMPEG, *sources, *X264, "-c:a", "mp2", whole], check=True)
    noisy = str(tmp_path / "noisy.ts")
    subprocess.run([*FFMPEG, "-i", whole, "-c", "copy", "-bsf:a", "noise=amount=3", noisy], check=True)
    packets = [Path(whole).read_bytes()[i : i + 188] for i in range(0, os.path.getsize(whole), 188)]
    of_sound = [i for i, packet in enumerate(packets) if (packet[1] & 31) << 8 | packet[2] == 257]
    for i in (of_sound[len(of_sound) // 2], of_sound[len(of_sound) // 3]):
        packets[i] = b""
    (tmp_path / "cut.ts").write_bytes(b"".join(packets))
    for path in (noisy, tmp_path / "cut.ts"):
        assert read_clip(path, 8, SIZE).notes == []


def test_pictures_that_lack_their_second_half_are_damaged(tmp_path):
    folder = pictures(tmp_path / "frames", "jpg", 4)
    first, *others = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[: os.path.getsize(first) // 2])
    assert read_clip(folder, 4, SIZE).notes[0].startswith("1 of 4 frames did not decode without errors")
    for file in others:
        file.write_bytes(file.read_bytes()[: os.path.getsize(file) // 2])
    with pytest.raises(VideoError, match="4 of 4 frames are damaged"):
        read_clip(folder, 4, SIZE)


def test_what_macos_puts_beside_pictures_and_kinds_that_differ(tmp_path):
    folder = pictures(tmp_path / "frames", "jpg", 3)
    (folder / "._frame_001.jpg").write_bytes(b"\0\5\x16\7")
    assert len(read_clip(folder, 3, SIZE).indices) == 3
    pictures(tmp_path / "other", "png", 5)
    (tmp_path / "other/frame_004.png").rename(folder / "frame_004.png")
    with pytest.raises(VideoError, match="frame_004.png: cannot be decoded, or not as the first one"):
        read_clip(folder, 4, SIZE)


@pytest.mark.parametrize("small", [1 << 18, 0])
def test_titles_and_names_are_no_damage(tmp_path, monkeypatch, small):
    monkeypatch.setattr(data, "SMALL_FILE", small)
    for title in (
        "a [error] b\n[error] c",
        "corrupt decoded frame\n",
        "Packet corrupt",
        "File ended prematurely",
    ):
        path = make(tmp_path / "a [error] Packet corrupt.mkv", "-metadata", f"title={title}")
        assert read_clip(path, 8, SIZE).notes == []


def test_frames_that_a_container_hides_are_not_damaged(tmp_path):
    whole = make(
        tmp_path / "whole.mp4", *X264, "-bf", "0", source="testsrc2=s=96x72:r=10,noise=alls=9", seconds=3
    )
    path = str(tmp_path / "cut.mp4")
    subprocess.run([*FFMPEG, "-ss", "2", "-i", whole, "-c", "copy", path], check=True)  # 20 of 30 are hidden
    damage(path, 25, 26)
    (note,) = read_clip(path, 8, SIZE).notes
    assert int(note.split()[0]) == 1
