"""The picture of what the model sees."""

import os
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from apps import look
from data import read_clip

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
SQUARES = np.random.default_rng(0).integers(0, 256, (7, 7, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)


def sliding(path, n_frames):
    """A video of 56×56 pixels in which everything moves two pixels to the left with each frame"""
    frames = np.stack([np.roll(SQUARES, -2 * k, axis=1) for k in range(n_frames)])
    raw = [*FFMPEG, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "56x56", "-i", "-", "-c:v", "ffv1", path]
    subprocess.run(raw, input=frames.tobytes(), check=True)
    return path


def pixels(picture):
    raw = [*FFMPEG, "-i", picture, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(subprocess.run(raw, capture_output=True).stdout, np.uint8)


def test_flow_colours():
    right, left, down, up = [8, 0], [-8, 0], [0, 4], [0, -8]
    found = look.flow_colours(np.float32([right, left, down, up, [0, 0]]))
    expected = np.array([[255, 0, 0], [0, 255, 255], [90, 180, 0], [128, 0, 255], [0, 0, 0]])
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 1
    assert not look.flow_colours(np.zeros((2, 3, 2))).any()


def test_flow_of_chosen_frames(tmp_path):
    slide = sliding(tmp_path / "slide.mkv", 6)
    flow = look.read_flow(slide, np.array([0, 3, 5]), 56)
    assert flow.shape == (3, 56, 56, 2)
    assert np.median(flow[:, 20:36, 20:36], axis=(1, 2)) == pytest.approx(np.tile([-2, 0], (3, 1)), abs=0.2)
    assert np.array_equal(
        flow[0], look.read_flow(slide, np.array([1]), 56)[0]
    )  # frame 1 stands in for frame 0


def test_a_row_for_each_stream_and_the_flow(world, tmp_path, capsys):
    slide = sliding(tmp_path / "slide.mkv", 6)
    png = tmp_path / "sheet 1.png"
    command = ["--video", str(slide), "--weights", str(world / "weights"), "--out"]
    assert look.main([*command, str(png)]) == 0
    assert "appearance, motion, flow" in capsys.readouterr().err
    rows = pixels(png).reshape(3, 28, 4, 28, 3).swapaxes(1, 2)  # (4, 28, 28, 3) each
    clip = read_clip(slide, 4, 28)
    assert np.array_equal(rows[0], clip.appearance) and np.array_equal(rows[1], clip.motion)
    red, green, blue = rows[2][:, 8:20, 8:20].mean((0, 1, 2))  # cyan: to the left
    assert red < 10 and green > 80 and blue > 80
    assert sorted(os.listdir(tmp_path)) == [png.name, slide.name]


def test_one_stream_and_one_frame(tmp_path):
    still = sliding(tmp_path / "still.mkv", 1)
    sheet = look.motion_sheet(still, read_clip(still, 4, 28, branches=("appearance",)))
    assert sheet.shape == (56, 28, 3) and sheet[:28].any() and not sheet[28:].any()


@pytest.mark.parametrize(
    "video, out",
    [("a b.mp4", "nowhere/x.png"), ("a b.mp4", "a b.mp4"), ("broken.mp4", "x.png"), ("none", "x.png")],
)
def test_errors_are_one_line(world, capsys, video, out):
    before = (world / "a b.mp4").read_bytes()
    command = ["--video", world / video, "--out", world / out, "--weights", world / "weights"]
    assert look.main(list(map(str, command))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert (world / "a b.mp4").read_bytes() == before
