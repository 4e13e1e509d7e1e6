"""Look at what the model sees of a video.

    python -m apps.look --video examples/wrong_way.mp4 --out motion.png
    python -m apps.look --video x.mp4 --out motion.png --weights runs/mine/last    # the streams of this model

The picture has a row for each stream of the clip (what the appearance branch sees, then what the motion
branch sees, …) and below them the optical flow that the masked streams are made of.

In this file: the flow of a clip, pictures, the command line.
"""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch

from data import clip_options, farneback, read_clip, replace_file, rgb_to_gray, stream_frames
from hawk import read_chain
from sample import PROBLEMS, WEIGHTS, Parser, note, print_error

# ---- Flow --------------------------------------------------------------------------------------------------


def read_flow(path, indices, image_size=224):
    """Flow from the frame before to each of the frames with these numbers -> (T, H, W, 2) float32, in pixels.

    The video is decoded once more. Raises VideoError."""
    current = np.maximum(indices, 1)  # frame 0 has no frame before it, so frame 1 stands in, as in read_clip
    wanted = {*current.tolist(), *(current - 1).tolist()}
    frames = {}
    with closing(stream_frames(path, image_size)) as stream:
        for number, (_, frame) in enumerate(stream):
            if number in wanted:
                frames[number] = frame
    if 1 not in frames and 0 in wanted:  # a lone frame does not move
        return np.zeros((len(indices), image_size, image_size, 2), np.float32)
    before = torch.from_numpy(np.stack([frames[i - 1] for i in current]))  # (T, H, W, 3) uint8
    after = torch.from_numpy(np.stack([frames[i] for i in current]))
    return farneback(rgb_to_gray(before), rgb_to_gray(after)).numpy()


def flow_colours(flow):
    """Flow (…, 2) -> (…, 3) uint8. The hue is the direction: right is red, down green, left cyan, up violet.

    The brightness is the square root of the speed. The fastest pixel of all gets full brightness, unless it
    moves less than a pixel a frame: noise should stay dark."""
    x = flow[..., :1]  # (…, 1)
    y = flow[..., 1:]
    angle = np.arctan2(y, x)
    speed = np.hypot(y, x)
    # red, green and blue are brightest at 0, 120 and 240 degrees
    hue = np.clip(0.5 + np.cos(angle - np.arange(3) * (2 * np.pi / 3)), 0, 1)  # (…, 3)
    brightness = np.sqrt(speed / max(speed.max(), 1))
    return np.rint(255 * hue * brightness).astype(np.uint8)


# ---- Pictures ----------------------------------------------------------------------------------------------


def motion_sheet(path, clip, columns=8):
    """A picture (H, W, 3) of up to `columns` frames of a clip: a row for each stream, then their flow.

    Raises VideoError, because the flow needs the video once more."""
    T = len(clip.indices)
    chosen = np.unique(np.linspace(0, T - 1, min(columns, T)).astype(int))
    rows = [stream[chosen] for stream in clip.streams.values()]  # each (columns, H, W, 3)
    image_size = rows[0].shape[1]
    rows.append(flow_colours(read_flow(path, clip.indices[chosen], image_size)))
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def write_picture(picture, path):
    """(H, W, 3) uint8 -> PNG file"""
    height, width, _ = picture.shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -i pipe:0"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source.split()]
    command += "-frames:v 1 -c:v png -f image2pipe pipe:1".split()
    done = subprocess.run(command, input=picture.tobytes(), capture_output=True)
    if done.returncode:
        raise ValueError(f"{path}: cannot be drawn ({done.stderr.decode(errors='replace').strip()})")
    replace_file(path, done.stdout)


# ---- Command line ------------------------------------------------------------------------------------------


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--video", required=True, metavar="PATH", help="the video file")
    p.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    text = "folder of weights whose streams are shown (default: as in sample.py)"
    p.add_argument("--weights", default=WEIGHTS, help=text)
    args = p.parse_args(argv)
    try:
        if Path(args.out).resolve() == Path(args.video).resolve():
            raise ValueError(f"--out {args.out} is the video itself")
        config, _ = read_chain(args.weights)
        clip = read_clip(args.video, **clip_options(config))
        write_picture(motion_sheet(args.video, clip), args.out)
    except PROBLEMS as error:
        return print_error(error)
    note(f"{args.out}: from top to bottom {', '.join(clip.streams)}, flow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
