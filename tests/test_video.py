"""Reading videos: frames against a plain decode by ffmpeg, times, optical flow and masks against OpenCV,
streams, and files that are no video."""

import os
import pickle
import re
import subprocess
import threading
import time
from contextlib import closing, nullcontext
from pathlib import Path

import bench
import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import data
from data import VideoError, farneback, read_clip, rgb_to_gray

pytestmark = pytest.mark.usefixtures("one_thread")
FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-threads", "1"]
SIZE = 64


def make(path, *options, source="testsrc2=s=96x72:r=10", seconds=4, pixels="yuv420p"):
    inputs = ["-f", "lavfi", "-i", source, "-t", str(seconds), "-pix_fmt", pixels]
    subprocess.run([*FFMPEG, "-y", *inputs, *options, f"file:{path}"], check=True)
    return str(path)


def decode(path, size=SIZE):
    """Every frame, the plain way."""
    scale = ["-vf", f"scale={size}:{size}:flags=bilinear", "-fps_mode", "passthrough"]
    command = [*FFMPEG, "-i", f"file:{path}", *scale, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, size, size, 3)


def motion_of(before, after, kind="hard"):
    before = torch.from_numpy(before)
    after = torch.from_numpy(after)
    flow = farneback(rgb_to_gray(before), rgb_to_gray(after))
    weight = data.moving(torch.hypot(flow[..., :1], flow[..., 1:]), kind)
    return (after * weight).round().to(torch.uint8).numpy()


def check_frames(path, **options):
    frames = decode(path)
    clip = read_clip(path, image_size=SIZE, **options)
    n = min(32, len(frames))
    assert clip.indices.tolist() == np.arange(0, len(frames), len(frames) / n).astype(int).tolist()[:n]
    assert clip.appearance.dtype == clip.motion.dtype == np.uint8
    np.testing.assert_array_equal(clip.appearance, frames[clip.indices])
    if len(frames) > 1:  # computed block by block while frames come; here from all pairs at once
        current = np.maximum(clip.indices, 1)
        np.testing.assert_array_equal(clip.motion, motion_of(frames[current - 1], frames[current]))
    return clip, frames


# ------------------------------------------------------------------------------------------------------------
# Frames

VIDEOS = {  # name: (make's options, other arguments)
    "bframes.mp4": (["-c:v", "libx264", "-bf", "3", "-g", "12"], {}),
    "bframes.mkv": (["-c:v", "libx264", "-bf", "3", "-g", "12"], {}),
    "yuv444.mp4": (["-c:v", "libx264"], {"pixels": "yuv444p"}),
    "hevc.mp4": (["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"], {}),
    "mpeg4.avi": (["-c:v", "mpeg4"], {}),
    "mpeg2.ts": (["-c:v", "mpeg2video", "-r", "25", "-bf", "2"], {"seconds": 2}),
    "vp9.webm": (["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"], {}),
    "animated.gif": ([], {"pixels": "rgb24"}),
    "mjpeg.mov": (["-c:v", "mjpeg"], {"pixels": "yuvj420p"}),
    "variable.mp4": (["-vf", "select='mod(n,3)',setpts='PTS+mod(N,4)/40/TB'", "-fps_mode", "vfr"], {}),
    "odd.mkv": (["-c:v", "ffv1"], {"source": "testsrc2=s=33x57:r=7"}),
    "short.mp4": ([], {"seconds": 0.7}),
    "one.mp4": (["-frames:v", "1"], {}),
    "-dash first.mp4": ([], {}),
    'it\'s "100%d" : ünïcode.mp4': ([], {}),
    "rotated.mp4": (["-vf", "scale=96:48"], {}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_a_plain_decode(tmp_path, monkeypatch, name):
    options, others = VIDEOS[name]
    path = make(tmp_path / name, *options, **others)
    if name == "rotated.mp4":
        upright, path = path, str(tmp_path / "turned.mp4")
        subprocess.run([*FFMPEG, "-display_rotation", "90", "-i", upright, "-c", "copy", path], check=True)
    monkeypatch.chdir(tmp_path)
    clip, frames = check_frames(os.path.basename(path))
    monkeypatch.setattr(data, "SMALL_FILE", 0)  # as if it were large
    again, _ = check_frames(os.path.basename(path))
    assert again.message == clip.message and again.seconds == clip.seconds
    expected = {"short.mp4": 7, "one.mp4": 1}.get(name, 32 if name != "variable.mp4" else 26)
    assert len(clip.indices) == min(expected, len(frames))


X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-g", "30"]
VARIABLE = ["-vf", "select='mod(n,7)',setpts='PTS+mod(N,4)/40/TB'", "-fps_mode", "vfr"]


@pytest.mark.parametrize(
    "ending, options, seeks",
    [
        ("mp4", [*X264, "-bf", "2"], True),
        ("mkv", [*X264], True),
        ("mp4", [*X264, "-x264-params", "open-gop=1:bframes=3"], False),
        ("mp4", [*X264, *VARIABLE], True),
        (
            "mp4",
            [*X264, "-x264-params", "intra-refresh=1"],
            False,
        ),  # its keyframes are whole only some frames later
        ("mp4", ["-c:v", "mpeg4", "-bf", "2", "-g", "30"], False),
        ("ts", [*X264, "-bf", "2"], False),  # its keyframes are not to be relied on
    ],
)
def test_long_videos(tmp_path, monkeypatch, ending, options, seeks):
    """Seeks where that is exact, else one decode that only the chosen frames leave."""
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    path = make(tmp_path / f"long.{ending}", *options, seconds=400, source="testsrc2=s=48x32:r=10")
    sought = []
    real = data.seek
    monkeypatch.setattr(data, "seek", lambda *arguments: sought.append(1) or real(*arguments))
    check_frames(path)
    assert bool(sought) is seeks


def test_edit_list_and_false_packet_counts(tmp_path, monkeypatch):
    """Frames that the container says to leave out are left out, in short videos and in long ones."""
    whole = make(tmp_path / "whole.mp4", "-g", "40", seconds=20)
    path = str(tmp_path / "cut.mp4")
    subprocess.run([*FFMPEG, "-ss", "2.5", "-i", whole, "-c", "copy", path], check=True)
    _, frames = check_frames(path)
    assert len(frames) < 200
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    check_frames(path)


def test_size_and_pixels_that_change_on_the_way(tmp_path, monkeypatch):
    first = make(tmp_path / "first.ts", *X264, seconds=6)
    second = make(tmp_path / "second.ts", *X264, source="testsrc=s=64x80:r=10", pixels="yuv444p", seconds=6)
    path = tmp_path / "both.ts"
    path.write_bytes(open(first, "rb").read() + open(second, "rb").read())
    check_frames(path)
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    check_frames(path)


@pytest.mark.parametrize("lost", ["sought", "decoded"])
def test_packets_that_promise_other_frames(tmp_path, monkeypatch, lost):
    """Then all frames are counted, and the clip is that of what can be decoded."""
    monkeypatch.setattr(data, "SMALL_FILE", 0)
    path = make(tmp_path / "long.mp4", *X264, seconds=400 if lost == "sought" else 8)
    real = data.open_video

    def one_too_many(path, size, fps):
        video = real(path, size, fps)
        stamps = np.append(video.stamps, 2 * video.stamps[-1] - video.stamps[-2])
        return video._replace(seconds=np.append(video.seconds, 1e3), stamps=stamps)

    monkeypatch.setattr(data, "open_video", one_too_many)
    monkeypatch.setattr(data, "sample_frames", lambda total, n: np.array([0, total // 2, total - 1]))
    clip = read_clip(path, image_size=SIZE)
    frames = decode(path)
    assert clip.indices.tolist() == [0, len(frames) // 2, len(frames) - 1]
    np.testing.assert_array_equal(clip.appearance, frames[clip.indices])


def test_times_and_message(tmp_path):
    path = make(tmp_path / "ntsc.mp4", source="testsrc2=s=48x32:r=30000/1001", seconds=10)
    clip = read_clip(path, 8, SIZE)
    assert clip.seconds == [round(int(i) * 1001 / 30000, 1) for i in clip.indices] and clip.notes == []
    path = make(tmp_path / "film.mp4", source="testsrc2=s=48x32:r=24", seconds=3)
    film = read_clip(path, image_size=SIZE)
    assert (
        film.seconds == [round(int(i) / 24, 1) for i in film.indices] and 0.2 in film.seconds
    )  # 0.25 is a tie
    times = "0.0, 1.2, 2.5, 3.7, 5.0, 6.2, 7.5, 8.7"
    assert clip.message == f"The video contains 8 frames sampled at {times} seconds. "


def test_times_without_a_constant_rate_are_the_frames_own(tmp_path, monkeypatch):
    """Ten seconds at one frame a second, then two at ten, and a constant rate in a container of
    milliseconds."""
    slow_then_fast = "if(lt(N,10),N,10+(N-10)/10)/TB"
    options = ["-vf", f"setpts='{slow_then_fast}'", "-fps_mode", "vfr", "-video_track_timescale", "1000"]
    path = make(tmp_path / "drops.mp4", *options, source="testsrc2=s=48x32:r=10:d=3", seconds=60)
    for small in (1 << 20, 0):
        monkeypatch.setattr(data, "SMALL_FILE", small)
        assert read_clip(path, 6, SIZE).seconds == [0.0, 5.0, 10.0, 10.5, 11.0, 11.5]
        film = read_clip(make(tmp_path / "film.mkv", source="testsrc2=s=48x32:r=24000/1001"), 32, SIZE)
        assert film.seconds == [round(int(i) * 1001 / 24000, 1) for i in film.indices]


def test_frames_that_arrive_in_a_burst_share_their_time(tmp_path):
    """A network that stalls for three seconds: then five frames at a time have the same stamp."""
    late = "if(lt(N,20),N*0.1,if(lt(N,40),5+floor((N-20)/5)*0.001,5+(N-39)*0.1))/TB"
    even = make(tmp_path / "even.mp4", *X264, "-bf", "0", seconds=6)
    path = str(tmp_path / "burst.mkv")
    subprocess.run([*FFMPEG, "-i", even, "-c", "copy", "-bsf:v", f"setts=ts='{late}'", path], check=True)
    seconds = [second for second, _ in data.stream_frames(path, SIZE)]
    expected = [
        i / 10 if i < 20 else 5 + (i - 20) // 5 / 1000 if i < 40 else 5 + (i - 39) / 10 for i in range(60)
    ]
    np.testing.assert_allclose(seconds, expected, atol=1e-6)
    assert read_clip(path, 6, SIZE).seconds == [0.0, 1.0, 5.0, 5.0, 5.1, 6.1]


def test_two_recordings_in_one_file_run_on(tmp_path):
    """The second one's clock starts anew."""
    part = make(tmp_path / "part.ts", *X264, seconds=3)
    with open(part, "rb") as file:
        (tmp_path / "both.ts").write_bytes(file.read() * 2)
    assert read_clip(tmp_path / "both.ts", 6, SIZE).seconds == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    later = make(
        tmp_path / "later.ts", *X264, "-output_ts_offset", "100", seconds=3
    )  # then the clock goes back
    (tmp_path / "both.ts").write_bytes(Path(later).read_bytes() + Path(part).read_bytes())
    assert read_clip(tmp_path / "both.ts", 6, SIZE).seconds == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_stream_that_nobody_finishes_does_not_keep_python_from_ending(tmp_path):
    with closing(data.stream_frames(make(tmp_path / "clip.mp4", *X264), SIZE)) as stream:
        next(stream)
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert timers and all(thread.daemon for thread in timers)


def test_a_stream_of_all_frames(tmp_path):
    path = make(tmp_path / "clip.ts", *X264, seconds=2)
    frames = decode(path)
    with open(path, "rb") as file:
        for stdin in (None, file):
            with closing(data.stream_frames(path, SIZE, stdin)) as stream:
                seconds, shown = zip(*stream, strict=True)
            np.testing.assert_array_equal(np.stack(shown), frames)
            np.testing.assert_allclose(seconds, np.arange(20) / 10)
    video = data.Video("", np.array(seconds), [], frames=shown)
    clip = data.clip_of(video, None, np.array([0, 5, 19]), ("appearance", "motion"), "hard")
    np.testing.assert_array_equal(clip.appearance, frames[[0, 5, 19]])
    np.testing.assert_array_equal(clip.motion, motion_of(frames[[0, 4, 18]], frames[[1, 5, 19]]))
    assert clip.seconds == [0.0, 0.5, 1.9]


def test_uniform_and_headtail(tmp_path):
    for total in [*range(1, 300), 976503]:
        for n in (1, 8, 32):
            frames = data.sample_frames(total, n)
            assert len(frames) == min(n, total) and frames[0] == 0 and frames[-1] < total
            drawn = data.sample_frames(total, n, "headtail", np.random.default_rng(total))
            assert len(set(drawn)) == min(n, total) and (np.diff(drawn) > 0).all()
            assert (drawn < total // 2).sum() == min(n, total) // 2
    path = make(tmp_path / "clip.mp4")
    clips = [
        read_clip(path, 8, SIZE, sampling="headtail", generator=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]
    assert (clips[0].indices == clips[1].indices).all() and (clips[0].indices != clips[2].indices).any()
    np.testing.assert_array_equal(clips[0].appearance, decode(path)[clips[0].indices])


# ------------------------------------------------------------------------------------------------------------
# Motion


def opencv(previous, current):
    flow = [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 10, 3, 5, 1.2, 0)
        for a, b in zip(previous, current, strict=True)
    ]
    return np.stack(flow)


def texture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height + 40, width + 40)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


@pytest.mark.parametrize("height, width", [(224, 224), (112, 112), (57, 33), (64, 181)])
def test_flow_of_moving_textures(height, width):
    image = texture(height, width)
    shifts = [(0, 0), (1, 0), (-2, 3), (6, -5), (0, 11)]
    previous = np.stack([image[20 : 20 + height, 20 : 20 + width]] * len(shifts))
    current = np.stack([image[20 - y : 20 - y + height, 20 - x : 20 - x + width] for x, y in shifts])
    flow = farneback(torch.from_numpy(previous), torch.from_numpy(current))
    assert flow.shape == (len(shifts), height, width, 2) and flow.dtype == torch.float32
    assert np.abs(flow.numpy() - opencv(previous, current)).mean(axis=(1, 2, 3)).max() < 2e-4
    if height == 224:
        found = flow[:4, 60:-60, 60:-60].mean((1, 2)).numpy()
        np.testing.assert_allclose(found, shifts[:4], atol=0.1)


def test_flow_of_noise_and_of_still_images():
    noise = np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8)
    flow = farneback(noise[:2], noise[1:]).numpy()
    assert np.abs(flow - opencv(noise[:2], noise[1:])).mean() < 0.01
    still = farneback(
        noise, noise
    ).numpy()  # not all zero: at the right and lower borders OpenCV finds motion, too
    assert np.abs(still - opencv(noise, noise)).mean() < 1e-3 and np.median(np.abs(still)) < 1e-6
    flat = torch.full((1, 224, 224), 77, dtype=torch.uint8)
    assert farneback(flat, flat).abs().max() == 0


def test_flow_shapes_types_and_threads():
    a, b = (torch.from_numpy(texture(80, 64, seed)) for seed in (0, 1))
    flow = farneback(a, b)
    assert torch.equal(flow, farneback(a.float(), b.double()))
    many = farneback(a.expand(2, 9, -1, -1), b.expand(2, 9, -1, -1))
    assert many.shape == (2, 9, *a.shape, 2)
    torch.testing.assert_close(many[1, 4], flow, rtol=0, atol=1e-4)
    frames = torch.stack([a, b] * 20)
    alone = farneback(frames[:-1], frames[1:])
    torch.set_num_threads(2)
    try:
        assert torch.equal(alone, farneback(frames[:-1], frames[1:]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_gray_is_opencv_gray():
    values = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), -1).reshape(1, -1, 3)
    np.testing.assert_array_equal(
        rgb_to_gray(torch.from_numpy(colours)).numpy(), cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)
    )


def released_motion(frames, indices):
    """What the released pipeline computes, with OpenCV."""
    result, flows = [], []
    for i in np.maximum(indices, 1):
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[i - 1 : i + 1]]
        flows.append(opencv(gray[:1], gray[1:])[0])
        result.append(frames[i] * (np.hypot(*np.moveaxis(flows[-1], -1, 0)) > 0.2)[..., None])
    return np.stack(result), np.hypot(*np.moveaxis(np.stack(flows), -1, 0))


@pytest.mark.parametrize(
    "source", ["testsrc2=s=160x120:r=10", "mandelbrot=s=128x96:r=10", "life=s=80x80:r=10:ratio=.2"]
)
def test_motion_is_the_released_motion(tmp_path, source):
    path = make(tmp_path / "clip.mp4", source=source)
    clip = read_clip(path, 6, 224)
    frames = decode(path, 224)
    expected, length = released_motion(frames, clip.indices)
    ours, theirs = clip.motion.any(-1), expected.any(-1)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.995
    both = ours & theirs
    np.testing.assert_array_equal(clip.motion[both], expected[both])
    soft = read_clip(path, 6, 224, motion_mask="soft").motion
    weight = length / length.max((1, 2), keepdims=True)
    difference = soft - frames[np.maximum(clip.indices, 1)] * weight[..., None]
    assert np.abs(difference).mean() < 0.5 and soft.dtype == np.uint8


def test_one_frame_and_still_videos_have_no_motion(tmp_path):
    one = read_clip(make(tmp_path / "one.mp4", "-frames:v", "1"), image_size=SIZE)
    assert one.appearance.shape == one.motion.shape == (1, SIZE, SIZE, 3) and not one.motion.any()
    assert one.message == "The video contains 1 frames sampled at 0.0 seconds. "
    still = read_clip(
        make(tmp_path / "still.mkv", "-c:v", "ffv1", source="color=teal:s=48x32:r=5"), image_size=SIZE
    )
    assert still.appearance.any() and not still.motion.any()
    assert not motion_of(still.appearance, still.appearance, "soft").any()


def test_a_stream_is_one_more_mask(tmp_path, monkeypatch):
    """What a branch sees is the current frame times its mask; without a masked branch no flow is computed."""
    monkeypatch.setitem(data.MASKS, "background", lambda speed, kind: ~data.moving(speed, "hard"))
    path = make(tmp_path / "clip.mp4")
    clip = read_clip(path, 6, SIZE, ("background", "motion", "appearance"))
    assert list(clip.streams) == ["background", "motion", "appearance"]
    shown = decode(path)[np.maximum(clip.indices, 1)]
    np.testing.assert_array_equal(clip.streams["background"] + clip.motion, shown)
    assert clip.motion.any() and clip.streams["background"].any()
    np.testing.assert_array_equal(clip.appearance[0], decode(path)[0])
    monkeypatch.setattr(data, "farneback", None)
    assert list(read_clip(path, 6, SIZE, ("appearance",)).streams) == ["appearance"]
    with pytest.raises(ValueError, match="'sky'.*appearance, motion, background"):
        read_clip(path, 6, SIZE, ("appearance", "sky"))


def test_an_unknown_kind_of_mask(tmp_path):
    with pytest.raises(ValueError, match="'loud'"):
        read_clip(make(tmp_path / "clip.mp4"), 6, SIZE, motion_mask="loud")


# ------------------------------------------------------------------------------------------------------------
# Files that are no video


def test_an_error_comes_whole_from_another_process():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert type(error) is VideoError and str(error) == "a.mp4: is empty"


def refused(path, pattern):
    with pytest.raises(VideoError) as caught:
        read_clip(path, image_size=SIZE)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and re.search(pattern, message), message


def test_files_that_are_no_video(tmp_path):
    refused(tmp_path / "missing.mp4", "No such file")
    refused(tmp_path, "folder")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")
    (tmp_path / "text.mp4").write_text("This is no video.\n" * 50)
    refused(tmp_path / "text.mp4", "cannot be read")
    (tmp_path / "noise.avi").write_bytes(np.random.default_rng(0).bytes(20000))
    refused(tmp_path / "noise.avi", "cannot be read")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(str(tmp_path / "pipe.mp4"), "not a regular file")
    with pytest.raises(VideoError):
        read_clip("a\0b.mp4")
    subprocess.run([*FFMPEG, "-f", "lavfi", "-i", "sine", "-t", "1", tmp_path / "sound.mp4"], check=True)
    refused(tmp_path / "sound.mp4", "no video stream")


def test_a_file_without_permission(tmp_path, monkeypatch):
    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    make(tmp_path / "secret.mp4")
    monkeypatch.setattr(data, "open", deny, raising=False)
    refused(tmp_path / "secret.mp4", "Permission denied")


def test_files_that_are_cut(tmp_path):
    whole = make(tmp_path / "whole.mp4", seconds=3)
    (tmp_path / "head.mp4").write_bytes(open(whole, "rb").read()[:8000])  # its index was at the end
    refused(tmp_path / "head.mp4", "moov atom not found")
    make(tmp_path / "fast.mp4", "-movflags", "+faststart", seconds=3)
    content = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "half.mp4", "cut short")


@pytest.mark.parametrize(
    "line", ["[mov @ 0x1] [error] stream 0, offset 0x24ba: partial file", "File ended prematurely"]
)
@pytest.mark.parametrize("begun", ["", "[info]   Stream #1:0(und): Video: rawvideo, "])
def test_a_cut_file_is_known_when_threads_share_a_line(line, begun):
    header = "[info] Input #0, mov, from 'x':\n[info]   Stream #0:0: Video: h264, 96x72\n"
    for text, raised in (("[verbose] EOF\n", False), (f"{begun}{line}\n[verbose] EOF\n", True)):
        with pytest.raises(VideoError, match="cut short") if raised else nullcontext():
            data.check_run("x.mp4", 0, header + text, 3)


@pytest.mark.parametrize("kind", ["hls", "concat", "pattern"])
def test_playlists_are_not_followed(tmp_path, kind):
    target = make(tmp_path / "target.ts", "-c:v", "libx264")
    path = tmp_path / f"{kind}.mp4"
    if kind == "hls":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\nfile://{target}\n#EXT-X-ENDLIST\n")
    elif kind == "concat":
        path.write_text("ffconcat version 1.0\nfile target.ts\n")
    else:
        make(tmp_path / "picture1.png", "-frames:v", "1", pixels="rgb24")
        path = tmp_path / "picture%d.png"
    refused(path, "cannot be read" if kind != "pattern" else "No such file")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts the open files in /proc")
def test_reading_leaves_no_file_and_no_thread_behind(tmp_path, monkeypatch):
    clip = make(tmp_path / "clip.mp4", *X264, "-g", "1", seconds=0.4)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder/%d.bmp", "-frames:v", "2", pixels="rgb24")
    (tmp_path / "text.mp4").write_text("This is no video.\n")
    sought = []
    real = data.seek
    monkeypatch.setattr(data, "seek", lambda *arguments: sought.append(1) or real(*arguments))

    def read():
        for path, small in ((clip, 1 << 18), (clip, 0), (tmp_path / "folder", 0)):
            monkeypatch.setattr(data, "SMALL_FILE", small)
            read_clip(path, 2, SIZE)
        refused(tmp_path / "text.mp4", "cannot be read")

    def held():
        timers = sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())
        return len(os.listdir("/proc/self/fd")), threading.active_count() - timers, timers

    def settled():  # a clock that was stopped takes a moment to end
        until = time.monotonic() + 10
        while held()[2] and time.monotonic() < until:
            time.sleep(0.001)
        return held()

    read()
    before = settled()
    for _ in range(5):
        read()
    after = settled()  # what other tests have left may end meanwhile
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    assert after[2] == 0 and len(sought) == 6


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="only Linux tells the peak of one process"
)
def test_reading_takes_little_memory_on_few_cores_and_many(tmp_path):
    bench.make_video(tmp_path / "x.mp4", 6)
    _, base = bench.measured("", tmp_path / "x.mp4")
    for threads in (2, 8):
        read = f"import torch; torch.set_num_threads({threads}); "
        read += "[data.read_clip(sys.argv[3]) for _ in range(2)]"
        _, peak = bench.measured(read, tmp_path / "x.mp4")
        assert peak - base < 300, threads
