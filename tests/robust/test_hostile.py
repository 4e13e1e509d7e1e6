"""Hostile input: videos that are damaged, odd or no videos; files that point elsewhere; hostile texts,
indexes and weights.

fuzz.py tries the first kind by the thousand, and lends its measure of a sound outcome.
"""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data
import train
from data import HawkDataset, Tokenizer, read_clip, read_index
from hawk import PRESETS, Hawk, HawkConfig
from sample import main as sample_main

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-threads", "1"]
X264 = ["-c:v", "libx264", "-preset", "ultrafast"]
SECONDS, MEGABYTES = 30, 600  # what one file may take; most take 0.1 s and 35 MB


def make(path, *options, source="testsrc2=s=48x32:r=10", seconds=1.2, inputs=()):
    inputs = inputs or ["-f", "lavfi", "-i", source, "-t", str(seconds)]
    subprocess.run([*FFMPEG, *inputs, *options, f"file:{path}"], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Sound clips of 12 frames, to be damaged and copied: name -> bytes."""
    folder = tmp_path_factory.mktemp("clips")
    made = {
        "mp4": make(folder / "a.mp4", *X264), "fast": make(folder / "fast.mp4", *X264, "-movflags",
        "+faststart"),
        "mkv": make(folder / "a.mkv", *X264), "ts": make(folder / "a.ts", *X264),
        "gif": make(folder / "a.gif"),
    }  # fmt: skip
    return {name: path.read_bytes() for name, path in made.items()}


@pytest.fixture
def tried(monkeypatch):
    """Function: the outcome for a file, which must be sound, in time and in little memory -> (kind, what was
    said)."""
    monkeypatch.setattr(subprocess, "Popen", fuzz.Watched)

    def tried(path, **options):
        monkeypatch.setattr(fuzz.Watched, "peak_mb", 0.0)
        with fuzz.limited(SECONDS):
            kind, said = fuzz.outcome(path, **options)
        assert kind != "wrong", (path, said)
        assert fuzz.Watched.peak_mb < MEGABYTES, (path, said, fuzz.Watched.peak_mb)
        return kind, said

    return tried


# ------------------------------------------------------------------------------------------------------------
# Videos

PICTURES = ["-f", "lavfi", "-i", "testsrc2=s=48x32:r=10"]
HUGE_TIMES = ["-bsf:v", "setts=pts=PTS+4611686018427387904:dts=DTS+4611686018427387904"]
ODD = {  # videos that are unusual but sound: how ffmpeg makes them, and how many frames of four come out
    "one frame.mp4": ([*X264, "-frames:v", "1"], {}, 1),
    "two frames.mp4": ([*X264, "-frames:v", "2"], {}, 2),
    "33x1001.mkv": (["-c:v", "ffv1"], {"source": "testsrc2=s=33x1001:r=10", "seconds": 0.5}, 4),
    "4096x64.mp4": (X264, {"source": "testsrc2=s=4096x64:r=10", "seconds": 0.5}, 4),
    "1x1.mkv": (["-c:v", "ffv1"], {"source": "color=red:s=1x1:r=10"}, 4),
    "10-bit.mkv": ([*X264, "-pix_fmt", "yuv420p10le"], {}, 4),
    "gray.mkv": (["-c:v", "ffv1", "-pix_fmt", "gray"], {}, 4),
    "16-bit with alpha.mkv": (["-c:v", "ffv1", "-pix_fmt", "yuva444p16le"], {}, 4),
    "palette.avi": (["-c:v", "rawvideo", "-pix_fmt", "pal8"], {}, 4),
    "interlaced.mp4": ([*X264, "-flags", "+ildct+ilme", "-x264-params", "interlaced=1"], {}, 4),
    "variable.mkv": (
        [*X264, "-vf", "select='mod(n,3)',setpts='PTS+mod(N,4)/40/TB'", "-fps_mode", "vfr"],
        {},
        4,
    ),
    "negative start.mkv": ([*X264, "-bf", "2", "-output_ts_offset", "-3"], {}, 4),
    "hours later.ts": ([*X264, "-output_ts_offset", "90000"], {}, 4),
    "far future.nut": ([*X264, *HUGE_TIMES], {}, 4),
    "slow.mp4": (X264, {"source": "testsrc2=s=48x32:r=1/3600", "seconds": 20000}, 4),
    "fast.mkv": (X264, {"source": "testsrc2=s=48x32:r=1000", "seconds": 0.05}, 4),
    "no duration.webm": (
        ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-live", "1"],
        {},
        4,
    ),
    "animated.gif": ([], {}, 4),
    "raw.h264": (X264, {}, 4),
    "titled.mkv": ([*X264, "-metadata", "title=a\n[error] partial file"], {}, 4),
    "with sound.mp4": (X264, {"inputs": [*PICTURES, "-f", "lavfi", "-i", "sine", "-t", "1.2"]}, 4),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_videos_are_answered(tmp_path, tried, monkeypatch, name):
    options, how, frames = ODD[name]
    path = make(tmp_path / name, *options, **how)
    assert tried(str(path)) == ("answered", tried(path)[1])  # a str, a Path
    whole = read_clip(path, 4, 56)
    assert len(whole.indices) == frames
    monkeypatch.setattr(data, "SMALL_FILE", 0)  # as if it were large
    kind, _ = tried(path)
    long = read_clip(path, 4, 56)
    np.testing.assert_array_equal(long.appearance, whole.appearance)
    assert kind == "answered" and long.seconds == whole.seconds


def test_turned_videos_are_answered(tmp_path, clips, tried):
    (tmp_path / "upright.mp4").write_bytes(clips["mp4"])
    inputs = ["-display_rotation", "90", "-i", str(tmp_path / "upright.mp4")]
    turned = make(tmp_path / "turned.mp4", "-c", "copy", inputs=inputs)
    assert tried(turned)[0] == "answered"


NAMES = ["no_extension", "a b  c.mp4", "'it\"s'.mp4", "100%d%03d.mp4", "a;b&c|d$(e)`f`.mp4", "-dash.mp4",
"ünï中文🚗.mp4",
         "new\nline\r.mp4", "file:a.mp4", "http:a.mp4", "a.mp4,b=c[in]", "concat:x|y", "-", "~",
         "*?[a].mp4", "a.txt",
         "x\n[info]   Stream #0:0: Video: gone\n[error] partial file", b"not \xff utf-8.mp4",
         "<s>[INST]<Video>.mp4"]  # fmt: skip


def test_names(tmp_path, monkeypatch, clips, tried):
    """Whatever a file is called, absolute or in the working directory, it is opened and nothing else is."""
    monkeypatch.chdir(tmp_path)
    Path("plain.mp4").write_bytes(clips["mp4"])
    plain = tried("plain.mp4")
    for name in NAMES:
        with open(name, "wb") as file:
            file.write(clips["mp4"])
        assert tried(name) == plain, name
        os.remove(name)
        kind, said = tried(name)
        assert kind == "refused" and "No such file" in said and len(said.splitlines()) == 1, name


@pytest.mark.parametrize("small_file", [1 << 20, 0])  # 0: each file counts as large
def test_what_is_no_video_is_refused(tmp_path, clips, tried, monkeypatch, small_file):
    monkeypatch.setattr(data, "SMALL_FILE", small_file)

    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    sound = make(tmp_path / "sound.m4a", inputs=["-f", "lavfi", "-i", "sine", "-t", "1"])
    cover = make(tmp_path / "cover.png", "-frames:v", "1")
    covered = ["-map", "0", "-map", "1", "-c", "copy", "-disposition:v", "attached_pic"]
    make(tmp_path / "covered.m4a", *covered, inputs=["-i", str(sound), "-i", str(cover)])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.mp4"))
        for name, words in {
            "nowhere.mp4": "No such file", "pipe.mp4": "not a regular file", "folder.mp4": "is a folder",
            "socket.mp4": "not a regular file", "loop.mp4": "symbolic links", "dangling.mp4": "No such file",
            "sound.m4a": "no video stream", "covered.m4a": "no video stream", "cover.png": "cannot be read",
        }.items():  # fmt: skip
            kind, said = tried(tmp_path / name)
            assert kind == "refused" and words in said, (name, said)
    for device in ("/dev/zero", "/dev/null", "/dev/tty"):
        assert tried(device)[0] == "refused"
    head = clips["mp4"][:40]
    for name, content in {
        "empty.mp4": b"", "byte.mp4": b"\0", "text.mp4": b"No video.\n" * 99,
        "noise.mp4": np.random.default_rng(0).bytes(9999),
        "head.mp4": head, "zeros.mp4": head + bytes(50_000),
        "page.mp4": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer.mp4": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    }.items():  # fmt: skip
        kind, said = tried(write(name, content))
        assert kind == "refused", (name, said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; test_video.py pretends instead")
def test_no_permission(tmp_path, clips, tried):
    path = tmp_path / "secret.mp4"
    path.write_bytes(clips["mp4"])
    path.chmod(0)
    assert tried(path) == ("refused", f"{path}: Permission denied")


@pytest.mark.parametrize("name", ["mp4", "fast", "mkv", "ts", "gif"])
def test_cut_at_every_tenth(tmp_path, clips, tried, name):
    """Refused, or what is there is shown: then in the same pictures as the whole clip, and fewer of them."""
    content, path = clips[name], tmp_path / f"cut.{name}"
    path.write_bytes(content)
    whole = read_clip(path, 12, 56, branches=("appearance",))
    for tenth in range(1, 10):
        path.write_bytes(content[: len(content) * tenth // 10])
        kind, said = tried(path)
        if kind == "answered":
            assert name in ("ts", "gif", "mkv"), (
                said
            )  # formats that do not say how long they are, or tell only at the end
            clip = read_clip(path, 12, 56, branches=("appearance",))
            assert (
                len(clip.indices) < 12
                and (clip.appearance[:-1] == whole.appearance[: len(clip.indices) - 1]).all()
            )


def test_flipped_bytes(tmp_path, clips, tried):
    generator, path, kinds = np.random.default_rng(0), tmp_path / "flipped.mp4", []
    for content in clips.values():
        for _ in range(4):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[generator.integers(len(damaged), size=20)] ^= generator.integers(
                1, 256, 20, dtype=np.uint8
            )
            path.write_bytes(damaged.tobytes())
            kinds.append(tried(path)[0])
    assert {"answered", "refused"} == set(kinds)


def test_a_kilobyte_cannot_ask_for_gigabytes(tmp_path, clips, tried):
    """An mp4 that claims 67 million samples, and a GIF that claims 98 million pixels."""
    content = bytearray(clips["mp4"])
    sizes, chunks = content.index(b"stsz") + 8, content.index(b"stsc") + 8
    content[sizes : sizes + 8] = struct.pack(">II", 1, 2**26)  # each of one byte
    content[chunks : chunks + 16] = struct.pack(">IIII", 1, 1, 2**26, 1)  # all in one chunk
    (tmp_path / "samples.mp4").write_bytes(content)
    assert tried(tmp_path / "samples.mp4")[0] == "refused"
    gif = clips["gif"]
    (tmp_path / "pixels.gif").write_bytes(gif[:6] + struct.pack("<HH", 9900, 9900) + gif[10:])
    assert tried(tmp_path / "pixels.gif")[0] == "refused"


@pytest.mark.skipif(
    not hasattr(data.resource, "prlimit"), reason="only Linux can limit the memory of a child"
)
def test_the_memory_of_ffmpeg_is_limited(tmp_path, clips, tried, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(clips["mp4"])
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1 << 20)
    assert tried(tmp_path / "a.mp4")[0] == "refused"


def test_threads_do_not_change_a_byte(tmp_path, clips, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(clips["mp4"])
    for small_file in (1 << 20, 0):
        monkeypatch.setattr(data, "SMALL_FILE", small_file)
        made = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(read_clip(tmp_path / "a.mp4", 12, 112))
        torch.set_num_threads(1)
        assert (made[0].appearance == made[1].appearance).all() and (made[0].motion == made[1].motion).all()
        assert made[0].motion.any() and made[0].message == made[1].message


def test_time_is_limited(tmp_path, clips, tried, monkeypatch):
    """A decoder that does not end is stopped, and that is said."""
    (tmp_path / "a.mp4").write_bytes(clips["mp4"])
    timer = threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda seconds, function: timer(min(seconds, 0.3), function))
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    kind, said = tried(tmp_path / "a.mp4")
    assert kind == "refused" and "time or memory limit" in said and "signal 9" in said


def test_a_video_that_disappears_while_it_is_read(tmp_path, clips, tried, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips["mp4"])
    real = data.open_video

    def open_and_remove(path, size, fps):
        video = real(path, size, fps)
        path.unlink()
        return video

    monkeypatch.setattr(data, "SMALL_FILE", 0)
    monkeypatch.setattr(data, "open_video", open_and_remove)
    assert tried(path) == ("refused", f"{path}: No such file or directory")


# ------------------------------------------------------------------------------------------------------------
# Nothing is followed elsewhere


def boxes_around(content, at):
    """Starts of the mp4 boxes that hold the byte `at`, the outermost first."""
    start, end, found = 0, len(content), []
    while start < end:
        size, kind = struct.unpack_from(">I4s", content, start)
        if start <= at < start + size:
            found.append(start)
            start, end = start + (16 if kind == b"dref" else 8), start + size
            if kind not in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
                return found
        else:
            start += size


def pointing_elsewhere(content, target):
    """An mp4 whose pictures are said to lie in another file: its data reference becomes an alias of the
    Macintosh."""
    content = bytearray(content)
    at = content.index(b"dref") - 4
    name = os.path.basename(target).encode()
    # volume, folder and file in the old fixed fields; the whole path as record 18, which ffmpeg reads
    alias = (
        bytes(10)
        + bytes([3])
        + b"vol".ljust(27, b"\0")
        + bytes(12)
        + bytes([len(name)])
        + name.ljust(63, b"\0")
        + bytes(16)
    )
    alias += struct.pack(">hh", 0, 0) + bytes(16) + struct.pack(">hh", 2, len(target)) + target.encode()
    alias += (
        b"\0" * (len(target) % 2)
        + struct.pack(">hh", 18, len(target))
        + target.encode()
        + b"\0" * (len(target) % 2)
    )
    alias += struct.pack(">hh", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    parents = boxes_around(content, at)
    old = struct.unpack_from(">I", content, at)[0]
    content[at + 16 : at + old] = entry
    for start in parents:
        struct.pack_into(
            ">I", content, start, struct.unpack_from(">I", content, start)[0] + 16 + len(entry) - old
        )
    return bytes(content)


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A video that is nothing but pure magenta, and a port that notes who connects."""
    folder = tmp_path_factory.mktemp("canary")
    path = make(folder / "canary.mp4", *X264, "-pix_fmt", "yuv444p", source="color=magenta:s=48x32:r=10")
    make(folder / "canary.ts", "-c", "copy", inputs=["-i", str(path)])
    make(folder / "picture1.png", "-frames:v", "1", source="color=magenta:s=48x32")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.05)
        yield folder, listening


def shows_canary(frames):
    red, green, blue = frames.reshape(-1, 3).T.astype(int)
    return bool(((red > 200) & (green < 60) & (blue > 200)).mean() > 0.9)


def test_the_canary_can_be_seen(canary):
    assert shows_canary(read_clip(canary[0] / "canary.mp4", 4, 56, branches=("appearance",)).appearance)


def disguises(folder, port):
    """{name of a file: what is in it}: things that make ffmpeg open something else, dressed as videos."""
    target, url = folder / "canary.mp4", f"http://127.0.0.1:{port}/canary.ts"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n"
    key = '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{}"\n#EXT-X-TARGETDURATION:9\n'
    key += "#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n"
    dash = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    dash += 'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4">'
    dash += '<Representation id="1" bandwidth="9"><BaseURL>{}</BaseURL>'
    dash += "</Representation></AdaptationSet></Period></MPD>"
    sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n"
    made = {}
    for name, goal in (
        ("file", f"file://{folder}/canary.ts"),
        ("path", str(folder / "canary.ts")),
        ("url", url),
    ):
        made |= {
            f"hls {name}.mp4": hls.format(goal),
            f"hls {name}.ts": hls.format(goal),
            f"key {name}.mp4": key.format(goal, goal),
        }
        made |= {
            f"concat {name}.mp4": f"ffconcat version 1.0\nfile '{goal}'\n",
            f"dash {name}.mp4": dash.format(goal),
        }
        made |= {f"smil {name}.mp4": f'<smil><body><video src="{goal}"/></body></smil>'}
        made |= {f"asx {name}.asf": f'<ASX version="3.0"><ENTRY><REF HREF="{goal}"/></ENTRY></ASX>'}
        made |= {f"reference {name}.asf": f"[Reference]\nRef1={goal}\n", f"ram {name}.rm": goal + "\n"}
        made |= {f"svg {name}.mp4": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{goal}"/></svg>'}
        made |= {
            f"sdp {name}.mp4": sdp,
        }
        made |= {
            f"redirect {name}.mov": f"RTSPtext\nrtsp://127.0.0.1:{port}/a\n",
            f"swf {name}.avi": f"XBIN {goal}",
        }
    made["filter.mp4"] = f"movie=filename={target}"
    made["graph.mp4"] = f"[in]movie='{target}'[out]"
    made["text.srt.mp4"] = f"1\n00:00:00,000 --> 00:00:09,000\n{target}\n"
    return {name: text.encode() for name, text in made.items()}


def test_files_that_point_elsewhere_are_refused(canary, tried):
    folder, listening = canary
    for name, content in disguises(folder, listening.getsockname()[1]).items():
        path = folder / name  # beside what it points to
        path.write_bytes(content)
        kind, said = tried(path, branches=("appearance",))
        assert kind == "refused", (name, said)
        path.unlink()
    with pytest.raises(TimeoutError):
        listening.accept()


def test_an_mp4_whose_data_lie_in_another_file(canary, clips, tried):
    """ffmpeg would open the other file if it were asked to (-enable_drefs), which shows that the disguise is
    a good one."""
    folder, _ = canary
    path = folder / "alias.mp4"
    path.write_bytes(pointing_elsewhere(clips["mp4"], "canary.mp4"))
    log = subprocess.run(
        [*FFMPEG[:2], "-v", "verbose", "-i", path, "-f", "null", "-"], capture_output=True, text=True
    ).stderr
    assert "canary.mp4" in log, log
    kind, said = tried(path, branches=("appearance",))
    assert kind == "refused" or not shows_canary(
        read_clip(path, 4, 56, branches=("appearance",)).appearance
    ), said


def test_names_that_are_addresses_patterns_or_filters(canary, tried, monkeypatch):
    folder, listening = canary
    monkeypatch.chdir(folder)
    port = listening.getsockname()[1]
    for name in ("picture%d.png", "picture%01d.png", "pic*.png", f"http://127.0.0.1:{port}/canary.ts",
    f"tcp://127.0.0.1:{port}",
                 "concat:canary.ts", "concat:canary.ts|canary.ts", "file:canary.mp4",
                 f"file://{folder}/canary.mp4", "crypto:canary.mp4",
                 "cache:canary.mp4", "async:canary.mp4", "subfile,,start,0,end,0,,:canary.mp4",
                 "data:video/mp4;base64,AAAA",
                 "movie=canary.mp4", "testsrc2", "color=red", "pipe:0", "fd:0", "-i", "/dev/video0",
                 "canary.mp4?a=b", "canary.mp4#t=1",
                 "canary.mp4\0.txt", "canary.mp4 ", " canary.mp4", "", "canary.mp4/."):  # fmt: skip
        kind, said = tried(name, branches=("appearance",))
        assert kind == "refused", (name, said)
    with pytest.raises(TimeoutError):
        listening.accept()


# ------------------------------------------------------------------------------------------------------------
# Texts and index files

CONTROL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<Video>",
    "</Video>",
    "<ImageHere>",
]


@pytest.fixture(scope="module")
def tok(world):
    return Tokenizer(world / "tokenizer.model")


words = st.lists(
    st.one_of(st.sampled_from([*CONTROL, " ", "\n", "\t", "\0", "é", "🚗", "\ud800"]), st.text(max_size=6)),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(words.map("".join))
def test_tokens_round_trip(tok, text):
    """Everything that can be said in UTF-8 comes back but for spaces at the ends, spaces in markers, and what
    SentencePiece itself normalises (this small tokenizer has its default rules); nothing comes back as a
    control token."""
    ids = tok.sp.encode(data.plain_text(text))
    assert not {tok.bos, tok.eos, tok.image_id} & set(ids) and max(ids, default=0) < tok.vocab_size
    again = tok.sp.encode(tok.decode(ids))
    assert tok.decode(again) == tok.decode(ids)


@settings(max_examples=30, deadline=None)
@given(words.map("".join), words.map("".join).filter(str.strip), st.integers(1, 8))
def test_captions_are_only_text(tok, text, motion, n_visual):
    ids, labels = tok.encode_caption(text + motion, n_visual)
    assert ids[: n_visual + 1] == [tok.bos] + [tok.image_id] * n_visual and labels[: n_visual + 1] == [
        data.IGNORE
    ] * (n_visual + 1)
    assert ids[n_visual + 1 :] == labels[n_visual + 1 :] and not {tok.bos, tok.eos, tok.image_id} & set(
        ids[n_visual + 1 :]
    )


def test_control_tokens_everywhere_stay_text(world, tok, clips, tmp_path, monkeypatch, capsys):
    """In names, descriptions, questions, answers and the system text, through a dataset and through
    sample.py."""
    name = "".join(CONTROL).replace("/", "|") + ".mp4"
    (tmp_path / name).write_bytes(clips["mp4"])
    said = " ".join(CONTROL)
    row = {"video": name, "description": said, "motion": said, "qa": [{"q": said, "a": said}] * 2}
    (tmp_path / "i.jsonl").write_text(json.dumps(row))
    config = HawkConfig.from_dict(PRESETS["tiny"] | {"n_frames": 4, "image_size": 28, "n_video_queries": 4})
    for learning in (False, True):
        dataset = HawkDataset(
            read_index(tmp_path / "i.jsonl"), tok, config, 2, train=learning, augment=False, max_tokens=None
        )
        sample = dataset[0]
        ids, turns = sample["input_ids"].tolist(), 1 + learning
        assert ids.count(tok.image_id) == 8 and ids.count(tok.bos) == ids.count(tok.eos) == turns
        learnt = sample["labels"][sample["labels"] != data.IGNORE].tolist()
        assert learnt.count(tok.eos) == turns and tok.image_id not in learnt and tok.bos not in learnt
    options = [
        "--weights",
        str(world / "weights"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
        "--system",
        said,
    ]
    assert sample_main([*options, "--video", str(tmp_path / name), "--question", said]) == 0
    assert "error" not in capsys.readouterr().err


GOOD = b'{"video": "v", "description": "d"}'
BAD_LINES = {
    "trailing garbage": (GOOD + b" garbage", "not JSON (Extra data)"),
    "two on a line": (GOOD + GOOD, "not JSON (Extra data)"),
    "cut": (GOOD[:-5], "not JSON"),
    "a byte that is no UTF-8": (GOOD.replace(b'"d"', b'"\xe9"'), "'utf-8' codec"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "'utf-8' codec"),
    "a second BOM": (b"\xef\xbb\xbf" + GOOD, "not JSON"),
    "NaN": (b'{"video": "v", "description": "d", "score": NaN}', "NaN"),
    "Infinity": (b'{"video": "v", "description": "d", "score": -Infinity}', "Infinity"),
    "a long number": (b'{"video": "v", "n": ' + b"9" * 5000 + b"}", "digits"),
    "a huge text": (b'{"video": "v", "description": "' + b"a" * 200_000 + b'"}', "100,000 characters"),
    "huge questions": (
        b'{"video": "v", "qa": [{"q": "' + b"a" * 200_000 + b'", "a": "b"}]}',
        "100,000 characters",
    ),
    "NUL": (b'{"video": "a\\u0000b", "description": "d"}', '"video" must be'),
    "source": (b'{"video": "v", "description": "d", "source": 5}', '"source" must be a text'),
    "kind": (b'{"video": "v", "description": "d", "kind": ["a"]}', '"kind" must be a text'),
    "flags": (b'{"video": "v", "description": "d", "flags": "refusal"}', '"flags" must be a list'),
    "answer": (b'{"video": "v", "qa": [{"q": "x", "a": null}]}', 'each entry of "qa"'),
    "turn": (b'{"video": "v", "qa": ["x"]}', 'each entry of "qa"'),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_bad_lines_are_named(tmp_path, name, end):
    line, reason = BAD_LINES[name]
    line = line.encode() if isinstance(line, str) else line
    path = tmp_path / "i.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + end + end + line + end + GOOD)
    with pytest.raises(ValueError) as error:
        read_index(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ") and reason in message and len(message.splitlines()) == 1
    assert len(message) < 500


def test_rows_that_are_there_twice_are_two_rows(tmp_path):
    (tmp_path / "i.jsonl").write_bytes(b"\n".join([GOOD] * 3))
    assert len(read_index(tmp_path / "i.jsonl")) == 3


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_in_an_index_give_rows_or_a_line(tmp_path_factory, junk, start, length):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(GOOD[:start] + junk + GOOD[start + length :])
    try:
        assert all(isinstance(row["video"], str) for row in read_index(path))
    except ValueError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Weights and configs


def spoiled(world, folder, **changes):
    """The weights of the small world with another config.json; the tensors are linked."""
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).symlink_to(world / "weights" / name)
    (folder / "config.json").write_text(
        json.dumps(json.loads((world / "weights/config.json").read_text()) | changes)
    )
    return folder


def refusal(folder):
    """The one line in which a folder is refused, quickly and without memory for what it asks for."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with fuzz.limited(SECONDS), pytest.raises(ValueError) as error:
        Hawk.from_pretrained(folder)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
        and time.monotonic() - start < 20
    )
    message = str(error.value)
    assert len(message.splitlines()) == 1 and (str(folder) in message or "/config.json" in message)
    return message


@pytest.mark.parametrize(
    "change",
    [{"llama_layers": 10**9}, {"vit_depth": 201}, {"vit_dim": 2**40}, {"vocab_size": 2**31},
    {"image_size": 10**6},
     {"patch_size": 2**18, "vit_dim": 2**18}, {"patch_size": 0}, {"n_frames": 10**12}, {"lora_rank": 10**9},
     {"lora_rank": -1},
     {"norm_eps": float("nan")}, {"norm_eps": float("inf")}, {"rope_theta": 10**400}, {"dropout": -0.5},
     {"llama_heads": 64},
     {"qformer_heads": 0}, {"base": 5}, {"base": None}, {"base": ["x"]}, {"base": "\0"},
     {"base": "x" * 5000}, {"motion_mask": "loud"},
     {"trust_remote_code": True}, {"n_queries": 17}, {"n_queries": 17.0}, {"llama_dim": "192"}],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_absurd_configs_are_refused(world, tmp_path, change):
    refusal(spoiled(world, tmp_path / "w", **change))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "5", '"a"', "[" * 100_000, '{"vit_dim": 1' + "0" * 5000 + "}", "\udcff", "{}"]
)
def test_configs_that_are_none(world, tmp_path, text):
    spoiled(world, tmp_path / "w")
    (tmp_path / "w/config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refusal(tmp_path / "w")


def test_bases_in_a_circle(world, tmp_path):
    spoiled(world, tmp_path / "a", base=str(tmp_path / "b"))
    spoiled(world, tmp_path / "b", base=str(tmp_path / "a"))
    with fuzz.limited(SECONDS):
        Hawk.from_pretrained(tmp_path / "a")  # each has all tensors


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_tensors_as(change):
    def spoil(file, tensors):
        change(tensors)
        save_file(tensors, file)

    return spoil


HEAD, TAIL = "llama.lm_head.weight", "vit.cls_token"
BAD_TENSORS = {
    "NaN in half": (save_tensors_as(lambda t: t.update({TAIL: (t[TAIL] * torch.nan).half()})), TAIL),
    "integers": (save_tensors_as(lambda t: t.update({TAIL: t[TAIL].long()})), TAIL),
    "bytes": (save_tensors_as(lambda t: t.update({TAIL: t[TAIL].to(torch.float8_e4m3fn)})), TAIL),
    "turned": (save_tensors_as(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})), HEAD),
    "swapped names": (save_tensors_as(lambda t: t.update({HEAD: t[TAIL], TAIL: t[HEAD]})), "has shape"),
    "a pickle": (lambda file, t: torch.save({HEAD: Evil(file.parent / "ran")}, file), "safetensors"),
    "a huge header": (lambda file, t: file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "safetensors"),
    "a lie about the size": (
        lambda file, t: file.write_bytes(struct.pack("<Q",
        77) + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}'),
        "safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(world, tmp_path, name):
    spoil, words = BAD_TENSORS[name]
    file = spoiled(world, tmp_path / "w") / "model.safetensors"
    file.unlink()
    spoil(file, load_file(world / "weights/model.safetensors"))
    assert words in refusal(tmp_path / "w") and not (tmp_path / "w/ran").exists()


def test_weights_cut_at_every_tenth(world, tmp_path):
    file = spoiled(world, tmp_path / "w") / "model.safetensors"
    file.unlink()
    content = (world / "weights/model.safetensors").read_bytes()
    for tenth in (0, 1, 5, 9):
        file.write_bytes(content[: len(content) * tenth // 10])
        assert "safetensors" in refusal(tmp_path / "w")


def test_shards_swapped_or_from_elsewhere(world, tmp_path):
    """Which shard holds a tensor does not matter; a shard that is missing or holds too little does."""
    folder, tensors = spoiled(world, tmp_path / "w"), load_file(world / "weights/model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({name: tensors[name] for name in names[::2]}, second)
    assert "tensors are missing" in refusal(folder)
    save_file({name: tensors[name] for name in names[1::2]}, first)
    model = Hawk.from_pretrained(folder)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("content", ["code", "cut", "empty", "other"])
def test_a_hostile_state_is_not_resumed_from(world, tmp_path, content):
    row = {"video": str(world / "a b.mp4"), "description": "A dog."}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--weights", world / "weights", "--data", tmp_path, "--out", tmp_path / "run", "--device", "cpu"]
    flags = [*map(str, flags), "--workers", "0", "--batch-size", "1", "--steps", "1"]
    handler = signal.getsignal(signal.SIGTERM)
    train.main(flags)
    signal.signal(signal.SIGTERM, handler)
    file = tmp_path / "run/last/state.pt"
    state = torch.load(file, weights_only=True)
    assert state["step"] == 1
    if content == "code":
        torch.save(state | {"objective": Evil(tmp_path / "ran")}, file)
    elif content == "other":
        torch.save({"model": 5}, file)
    else:
        file.write_bytes(file.read_bytes()[: 300 * (content == "cut")])
    with pytest.raises(ValueError) as error:
        train.main([*flags, "--resume"])
    assert (
        str(file) in str(error.value)
        and len(str(error.value).splitlines()) == 1
        and not (tmp_path / "ran").exists()
    )
    options = file.with_name("args.json")
    for damaged in ("", "[1]", "{}", options.read_text()[:40]):
        options.write_text(damaged)
        with pytest.raises(ValueError, match=r"^\S*args.json: is missing, or not the JSON expected .*$"):
            train.main([*flags, "--resume"])
