"""Look at what the model sees of a video, from the pixels to the first words.

    python -m apps.look --video examples/speeding.mp4 --out look/         # everything below; needs matplotlib
    python -m apps.look --video examples/crossing.mp4 --out motion.png    # only frames, streams and flow
    python -m apps.look --video x.mp4 --out look/ --weights runs/mine/last --question "Who is it?"

The folder receives

    trace.md            every step: name, shape, type, and the function that makes it (printed, too)
    frames.png          what each branch sees, and the optical flow that the masked streams are made of
    queries-BRANCH.png  where in a frame each query of the frame Q-Former looks (-2, -3, …: further queries)
    video-queries.png   which frames each query of the video Q-Former reads
    words.png           the probabilities of the next words, with and without the motion tokens

In this file: flow, the picture of the streams, the trace, attention, words, figures, the command line.
"""

import inspect
import io
import math
import os
import re
import subprocess
import sys
import textwrap
from collections import namedtuple
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch

import data
import hawk
import sample
from apps import run_program
from apps.toy import OBJECTS
from data import (
    MASKS,
    clip_options,
    farneback,
    open_folder,
    read_clip,
    read_files,
    replace_file,
    rgb_to_gray,
    stream_frames,
)
from sample import PROBLEMS, make_parser, note, number, print_error

QUERIES_PER_PAGE = 8
FRAMES_PER_PAGE = 4

# ---- Flow --------------------------------------------------------------------------------------------------


def all_frames(path, image_size, stdin=None, fps=25, log=None):
    """Like data.stream_frames, but also for a folder of pictures, `fps` of them per second."""
    if not os.path.isdir(path):
        yield from stream_frames(path, image_size, stdin=stdin, log=log)
        return
    video = open_folder(path, fps)._replace(log=log)
    for i, frame in read_files(video, image_size, range(len(video.files))):
        yield video.seconds[i].item(), frame


def read_flow(path, indices, image_size=224):
    """Flow to each of these frames (by number) from the one before it -> (T, H, W, 2) float32, in pixels.

    The video is decoded a second time. Raises VideoError."""
    current = np.maximum(indices, 1)  # frame 0 has no frame before it, so frame 1 stands in, as in read_clip
    wanted = {*current.tolist(), *(current - 1).tolist()}
    frames = {}
    if os.path.isdir(path):
        video = open_folder(path, fps=25)
        frames = dict(read_files(video, image_size, sorted(wanted & {*range(len(video.files))})))
    else:
        with closing(all_frames(path, image_size)) as stream:
            for i, (_, frame) in enumerate(stream):
                if i in wanted:
                    frames[i] = frame
    if 1 not in frames and 0 in wanted:  # a lone frame does not move
        return np.zeros((len(indices), image_size, image_size, 2), np.float32)
    before = torch.from_numpy(np.stack([frames[i - 1] for i in current]))  # (T, H, W, 3) uint8
    after = torch.from_numpy(np.stack([frames[i] for i in current]))
    return farneback(rgb_to_gray(before), rgb_to_gray(after)).numpy()


def flow_colours(flow):
    """Flow (…, 2) -> (…, 3) uint8. The hue is the direction: right is red, down green, left cyan, up violet.

    The brightness is the square root of the speed. The fastest pixel of all gets full brightness, unless it
    moves less than a pixel per frame: noise should stay dark."""
    x = flow[..., :1]  # (…, 1)
    y = flow[..., 1:]
    angle = np.arctan2(y, x)
    speed = np.hypot(y, x)
    # red, green and blue are brightest at 0, 120 and 240 degrees
    hue = np.clip(0.5 + np.cos(angle - np.arange(3) * (2 * np.pi / 3)), 0, 1)  # (…, 3)
    brightness = np.sqrt(speed / max(speed.max(), 1))
    return np.rint(255 * hue * brightness).astype(np.uint8)


# ---- The picture of the streams ----------------------------------------------------------------------------


def spread(T, count):
    """Up to `count` of the numbers 0...T-1, evenly spread."""
    return np.unique(np.linspace(0, T - 1, min(count, T)).astype(int))


def motion_sheet(path, clip, columns=8):
    """A picture (H, W, 3) of up to `columns` frames of a clip: a row for each stream, then their flow.

    Raises VideoError, because the flow decodes the video a second time."""
    chosen = spread(len(clip.indices), columns)
    rows = [stream[chosen] for stream in clip.streams.values()]  # each (columns, H, W, 3)
    image_size = rows[0].shape[1]
    rows.append(flow_colours(read_flow(path, clip.indices[chosen], image_size)))
    # A white line of 2 pixels to the right of each picture but the last, and below each row but the last.
    lines = [np.pad(row, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(line, axis=1) for line in lines])[:-2, :-2]


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


# ---- The trace ---------------------------------------------------------------------------------------------
# Modules whose outputs are listed, by name (BRANCH: one of the branches, N: a number), and what those are.
OUTPUTS = {
    "vit.patch_embed": "patches, a vector each",
    "vit.blocks.N": "after a block of the ViT",
    "vit": "ViT features, class token first",
    "BRANCH.ln_vision": "normalised for the Q-Former",
    "BRANCH.qformer.layers.N": "after a layer of the frame Q-Former",
    "BRANCH.qformer": "frame queries, having read a frame",
    "BRANCH.frame_position": "frame positions",
    "BRANCH.video_qformer.layers.N": "after a layer of the video Q-Former",
    "BRANCH.video_qformer": "video queries, having read the clip",
    "BRANCH.proj_0": "in LLaMA's width",
    "BRANCH.encoder_0": "encoded",
    "BRANCH.encoder_1": "tight features (consistency loss)",
    "BRANCH.decoder_2": "soft tokens of the branch",
    "llama.layers.N": "after a block of LLaMA",
    "llama": "LLaMA's hidden states",
}
# Modules of which an input is listed: its number, its name, what it is, and the function that makes it.
INPUTS = {
    "vit": (0, "images", "frames of all branches, in 0…1, 32 at most", hawk.Hawk.frame_features),
    "BRANCH.qformer": (0, "queries", "frame queries, as learned", hawk.Branch.__init__),
    "BRANCH.video_qformer": (1, "context", "frame queries + positions, in a row", hawk.Branch.video),
    "llama": (0, "x", "embeddings, soft tokens spliced in", hawk.Hawk.embed),
}
Step = namedtuple("Step", "what name shape dtype made_by")
# All that is known of one clip. attention: {name of a cross-attention: (B, h, Sq, Sk)}; prompt, answer: ids.
Look = namedtuple("Look", "clip flow steps attention encoding prompt answer")


def place_of(function):
    """Where a function is, as "file:function"."""
    function = inspect.unwrap(function)
    return f"{Path(function.__code__.co_filename).name}:{function.__qualname__}"


def caller_in_hawk():
    """The function of hawk.py that is running, as "hawk.py:function": it has called a torch module."""
    frame = sys._getframe()
    while frame.f_code.co_filename != hawk.__file__:
        frame = frame.f_back
    return f"{Path(hawk.__file__).name}:{frame.f_code.co_qualname}"


class Trace:
    """Steps, in the order in which they ran. Consecutive equal layers share a line."""

    def __init__(self):
        self.steps = []

    def add(self, what, name, x, made_by):
        """x: a tensor or an array. made_by: a function, or its place as text."""
        place = made_by if isinstance(made_by, str) else place_of(made_by)
        dtype = str(x.dtype).removeprefix("torch.")
        step = Step(what, name, tuple(x.shape), dtype, place)
        if self.steps and self.steps[-1]._replace(name="") == step._replace(name=""):
            first = self.steps.pop().name.partition("…")[0]
            step = step._replace(name=f"{first}…{name.rpartition('.')[2]}")
        self.steps.append(step)

    def table(self):
        """The steps as a Markdown table."""
        rows = [Step("what", "name", "shape", "type", "made by")]
        for step in self.steps:
            shape = " × ".join(map(str, step.shape))
            rows.append(step._replace(name=f"`{step.name}`", shape=shape, made_by=f"`{step.made_by}`"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(f"| {' | '.join(cells)} |\n")
        return "".join(lines)


@contextmanager
def traced(model, trace):
    """While this is open, outputs of the modules in OUTPUTS and inputs of those in INPUTS are added."""
    branches = "|".join(map(re.escape, model.config.branches))

    def before(what, name, argument, made_by, module, inputs):
        trace.add(what, name, inputs[argument], made_by)

    def after(what, name, module, inputs, output):
        ours = type(module).__module__ == hawk.__name__  # else it is torch's, called by a function of ours
        made_by = type(module).forward if ours else caller_in_hawk()
        trace.add(what, name, output, made_by)

    hooks = []
    for name, module in model.named_modules():
        kind = re.sub(rf"^({branches})\.", "BRANCH.", name)
        kind = re.sub(r"\.\d+$", ".N", kind)
        if kind in INPUTS:
            argument, argument_name, what, made_by = INPUTS[kind]
            hook = partial(before, what, f"{name}({argument_name})", argument, made_by)
            hooks.append(module.register_forward_pre_hook(hook))
        if kind in OUTPUTS:
            hooks.append(module.register_forward_hook(partial(after, OUTPUTS[kind], name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trace_streams(trace, clip, flow, config):
    """Adds the steps from the file to the streams. flow: of all frames, computed a second time."""
    trace.add("numbers of the sampled frames", "clip.indices", clip.indices, data.sample_frames)
    trace.add("frames, RGB", 'clip.streams["appearance"]', clip.appearance, data.decode)
    trace.add("optical flow, pixels a frame", "flow", flow, data.farneback)
    speed = torch.from_numpy(np.hypot(flow[..., :1], flow[..., 1:]))  # (T, H, W, 1)
    for branch in config.branches:
        if MASKS[branch]:
            weight = MASKS[branch](speed, config.motion_mask)
            trace.add(f"weight of each pixel, {branch}", f"MASKS[{branch!r}]", weight, MASKS[branch])
            stream = clip.streams[branch]
            trace.add(f"stream of the branch {branch}", f'clip.streams["{branch}"]', stream, data.clip_of)


@torch.no_grad()
def look_at(model, tokenizer, path, question=data.DESCRIBE_QUESTIONS[0], max_new_tokens=16):
    """Reads a video, sends it through the model and answers -> Look. Raises VideoError."""
    config = model.config
    # the plain frames are wanted even for a model that has no branch for them
    branches = tuple(dict.fromkeys(("appearance", *config.branches)))
    clip = read_clip(path, **clip_options(config) | {"branches": branches})
    flow = read_flow(path, clip.indices, config.image_size)
    trace = Trace()
    trace_streams(trace, clip, flow, config)
    with traced(model, trace), recorded_attention(model) as attention:
        encoding = sample.encode_clips(model, [clip])
        trace.add("soft tokens of all branches", "encoding.tokens", encoding.tokens, model.encode)
        prompt = tokenizer.encode_prompt(question, clip.message, config.n_visual)
        ids = torch.tensor([prompt], device=model.device)  # (1, S)
        trace.add("prompt, with placeholders", "ids", ids, tokenizer.encode_prompt)
        hidden = model.llama(model.embed(ids, encoding.tokens))  # (1, S, D)
        logits = model.llama.lm_head(hidden[:, -1])
        trace.add("logits of the next token", "logits", logits, hawk.DecodingStep.read)
    room = min(max_new_tokens, config.context_length - len(prompt))
    hawk.require(room > 0, f"the question is too long: {len(prompt)} tokens with the video")
    options = {"max_new_tokens": room, "eos_id": tokenizer.eos}
    (answer,) = sample.generate(model, encoding, [prompt], **options)
    trace.add("first words", "answer", np.array(answer), model.generate)
    return Look(clip, flow, trace.steps, attention, encoding, prompt, answer)


# ---- Attention ---------------------------------------------------------------------------------------------


def attention_weights(module, x, context):
    """How much each query of a QFormerAttention attends to each token of its context: softmax(q kᵀ / √d),
    by the module's own layers. x (B, Sq, C), context (B, Sk, context_dim) -> (B, h, Sq, Sk) float32."""
    q = hawk.split_heads(module.query(x), module.heads).float()
    k = hawk.split_heads(module.key(context), module.heads).float()
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


@contextmanager
def recorded_attention(model):
    """Yields a dict that receives, while this is open, the weights of each cross-attention that runs."""
    weights = {}

    def record(name, module, inputs, output):
        weights[name] = attention_weights(module, *inputs).cpu()

    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".cross_attention"):
            hooks.append(module.register_forward_hook(partial(record, name)))
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(attention, tower):
    """The recorded weights of a tower, such as "motion.qformer", a tensor for each layer."""
    return [weights for name, weights in attention.items() if name.startswith(f"{tower}.")]


def patch_maps(weights):
    """Weights (T, h, Q, 1 + patches) -> maps (T, Q, side, side), and the class token's share (T, Q).

    Mean over the heads. The class token is not a place in the frame: it is left out, and the weights of the
    patches are scaled to sum to 1."""
    mean = weights.mean(1)  # (T, Q, 1 + patches)
    patches = mean[..., 1:]
    patches = patches / patches.sum(-1, keepdim=True).clamp(min=1e-12)
    side = math.isqrt(patches.shape[-1])
    return patches.unflatten(-1, (side, side)), mean[..., 0]


def frame_shares(weights, T):
    """Weights (1, h, queries, T·Q) of a video Q-Former -> (queries, T): sums over the tokens of a frame."""
    return weights[0].mean(0).unflatten(-1, (T, -1)).sum(-1)


# ---- The next words, with and without the motion tokens ----------------------------------------------------


def still_clip(clip, motion_mask):
    """The clip with the motion stream of a video in which nothing moves: black, under both masks."""
    weight = MASKS["motion"](torch.zeros(len(clip.indices), 1, 1, 1), motion_mask)
    still = (torch.from_numpy(clip.appearance) * weight).round().to(torch.uint8).numpy()
    return replace(clip, streams=clip.streams | {"motion": still})


def without_motion(model, look):
    """The soft tokens (1, N, D) of a clip, but with those of the motion branch for a clip that stands still.

    Zeros instead would be something that LLaMA has never seen; these are what it gets for any video in which
    nothing moves. The tokens of other branches stay."""
    n = model.config.n_video_queries
    start = model.config.branches.index("motion") * n
    still = sample.encode_clips(model, [still_clip(look.clip, model.config.motion_mask)])
    tokens = look.encoding.tokens.clone()
    tokens[:, start : start + n] = still.tokens[:, start : start + n]
    return tokens


@torch.no_grad()
def word_probabilities(model, look, tokens):
    """Probabilities (n, V) of each word of the answer, given the soft tokens and the answer so far."""
    ids = torch.tensor([[*look.prompt, *look.answer]], device=model.device)
    hidden = model.llama(model.embed(ids, tokens))[0, len(look.prompt) - 1 : -1]
    return model.llama.lm_head(hidden).float().softmax(-1).cpu()


# ---- Figures -----------------------------------------------------------------------------------------------


def new_figure(width, height, title, caption):
    """A matplotlib figure of this size, in inches, with a title above and a caption below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=15, x=0.01, ha="left")
    text = textwrap.fill(caption, round(width * 12.5))
    figure.supxlabel(text, fontsize=10.5, x=0.01, ha="left", color="0.2")
    return figure


def save(figure, path, coarse=False):
    """Writes a PNG with 256 colours: a fifth of the size, with hardly any visible difference.

    coarse: a palette that is good enough for frames and halves the size again."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer)
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.FASTOCTREE if coarse else Image.Quantize.MEDIANCUT)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    replace_file(path, buffer.getvalue())


def bare(axes):
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def draw_streams(look, branches):
    """What each branch sees, and the flow: a row each."""
    chosen = spread(len(look.clip.indices), 8)
    rows = {name: look.clip.streams[name][chosen] for name in branches}
    rows["optical flow"] = flow_colours(look.flow[chosen])
    fastest = np.hypot(*look.flow[chosen].reshape(-1, 2).T).max()
    title = "What each branch sees, and the optical flow"
    caption = (
        "Optical flow: how far each pixel has moved since the frame before. The wheel shows the colour of "
        f"each direction; the faster, the brighter, up to {max(fastest, 1):.1f} pixels a frame at its edge."
    )
    figure = new_figure(max(6.5, 1.35 * len(chosen) + 2.2), 1.35 * len(rows) + 1.2, title, caption)
    grid = figure.subplots(len(rows), len(chosen) + 1, squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axes in line:
            bare(axes)
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(picture)
    for axes, i in zip(grid[0], chosen, strict=False):
        axes.set_title(f"{look.clip.seconds[i]:g} s", fontsize=11)
    draw_wheel(grid[-1, -1], max(fastest, 1))
    return figure


def draw_wheel(axes, fastest):
    """The colours of flow_colours as a disc: the direction of a pixel is that of its motion, its distance the
    speed. In 12 flat sectors of 3 rings, which a palette of few colours can show."""
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    angle = np.round(np.arctan2(y, x) / (np.pi / 6)) * (np.pi / 6)
    speed = np.ceil(np.hypot(x, y) * 3) / 3 * (np.hypot(x, y) <= 1)
    motion = np.stack([speed * np.cos(angle), speed * np.sin(angle)], axis=-1)
    disc = flow_colours(motion * fastest)
    axes.imshow(np.where(speed[..., None] > 0, disc, 255))
    title = axes.text(0.5, 1.05, "direction", transform=axes.transAxes, ha="center")
    title.set_in_layout(False)  # else it would push the row down


def draw_queries(look, branch, layer, queries, trained):
    """Where these queries of a frame Q-Former look: a row for each of a few frames, a column for a query.

    layer: which of the layers that read the frame, from 0. trained: for the queries, what each was trained to
    point at, or ""."""
    weights = layers_of(look.attention, f"{branch}.qformer")[layer]
    maps, class_share = patch_maps(weights)
    side = maps.shape[-1]
    chosen = spread(len(maps), FRAMES_PER_PAGE)
    title = f"Where the queries of the {branch} branch look"
    caption = (
        f"Frame Q-Former, layer {layer + 1} of those that read the frame: cross-attention over the {side} × "
        f"{side} patches and the class token, mean over the heads. The class token is left out and the rest "
        "scaled to the sum 1; the number is the class token's share. Red: patches that get more than an even "
        "share. Dark: the class token has more than half, so the query looks at no place in particular."
    )
    if any(trained[k] for k in queries):
        caption += (
            " Stage 0 trained query k to point at the kind of object named above it, and at the class token "
            "where there is none; queries without a name were left free."
        )
    figure = new_figure(1.35 * (len(queries) + 1), max(3.2, 1.45 * len(chosen) + 1.5), title, caption)
    grid = figure.subplots(len(chosen), 1 + len(queries), squeeze=False)
    for line, t in zip(grid, chosen, strict=True):
        frame = look.clip.streams[branch][t]
        line[0].imshow(frame)
        line[0].set_ylabel(f"{look.clip.seconds[t]:g} s", fontsize=11)
        for axes, k in zip(line[1:], queries, strict=True):
            draw_map(axes, frame, maps[t, k].numpy(), class_share[t, k].item())
        for axes in line:
            bare(axes)
    grid[0, 0].set_title("frame", fontsize=11)
    for axes, k in zip(grid[0, 1:], queries, strict=True):
        axes.set_title(f"query {k}\n{trained[k]}".strip(), fontsize=11)
    return figure


def draw_map(axes, frame, weights, class_share):
    """A grey frame overlaid with weights (side, side), a square per patch; and the class token's share. If
    that is more than half, the frame is dark and no patch is drawn."""
    height, width, _ = frame.shape
    grey = frame.mean(-1, keepdims=True).repeat(3, -1) / 255
    grey = (grey * 16).round() / 16  # without the finest texture the file is half as large
    looks = class_share < 0.5
    axes.imshow((0.15 + 0.6 * grey) * (1 if looks else 0.5), extent=(0, width, height, 0), vmin=0, vmax=1)
    if looks:
        colour = np.full((*weights.shape, 4), (1, 0.25, 0.1, 0))
        even = 1 / weights.size
        above = np.maximum(weights - even, 0) / max(weights.max() - even, 4 * even)
        colour[..., 3] = 0.85 * above
        axes.imshow(colour, extent=(0, width, height, 0), interpolation="nearest")
    share = f"{100 * class_share:.0f}%"
    box = {"facecolor": "black", "alpha": 0.6, "lw": 0, "pad": 1.5}
    axes.text(0.95, 0.06, share, transform=axes.transAxes, ha="right", color="white", fontsize=10, bbox=box)


def draw_video_queries(look, branches):
    """Which frames the video queries read: a column for each branch, a row for each layer."""
    T = len(look.clip.indices)
    ticks = spread(T, 8)
    seconds = [f"{look.clip.seconds[t]:g}" for t in ticks]
    towers = [layers_of(look.attention, f"{branch}.video_qformer") for branch in branches]
    depth = len(towers[0])
    title = "Which frames the queries of the video Q-Formers read"
    caption = (
        "Cross-attention, mean over the heads, summed over the tokens of a frame. Each row of a map is a "
        "query; its sum is 1."
    )
    width = max(8, 4 * len(branches) + 1)
    figure = new_figure(width, 2.9 * depth + 1.1, title, caption)
    grid = figure.subplots(depth, len(branches), squeeze=False, sharex=True, sharey=True)
    highest = max(frame_shares(weights, T).max().item() for tower in towers for weights in tower)
    for column, (branch, tower) in enumerate(zip(branches, towers, strict=True)):
        for layer, weights in enumerate(tower):
            axes = grid[layer, column]
            picture = axes.imshow(frame_shares(weights, T).numpy(), aspect="auto", vmin=0, vmax=highest)
            axes.set_title(f"{branch}, layer {layer + 1} of {depth}")
            axes.set_xticks(ticks, seconds, fontsize=10)
    figure.colorbar(picture, ax=grid, shrink=0.7, label="share of a query's attention")
    for axes in grid[:, 0]:
        axes.set_ylabel("video query")
    for axes in grid[-1]:
        axes.set_xlabel("frame at second")
    return figure


def draw_words(look, tokenizer, moving, still):
    """Two charts: the probability of each word of the answer with and without motion, and the likeliest words
    where the two differ most. moving, still: probabilities (n, V)."""
    answer = torch.tensor(look.answer)[:, None]
    with_motion = moving.gather(1, answer)[:, 0].numpy()
    without = still.gather(1, answer)[:, 0].numpy()
    place = abs(with_motion - without).argmax()
    title = "The words of the answer, with and without the motion tokens"
    caption = (
        "Without: the motion tokens are those of the same clip standing still, whose motion stream is black. "
        "Zeros in their place would be something that LLaMA has never read."
    )
    figure = new_figure(12.5, 5.2, title, caption)
    words, candidates = figure.subplots(1, 2, width_ratios=(2.6, 1))
    labels = [piece(tokenizer, token) for token in look.answer]
    draw_bars(words, labels, with_motion, without)
    words.set_title("how likely each word is, given those before it")
    figure.legend(*words.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    likely = (moving[place] + still[place]).topk(min(4, moving.shape[1])).indices
    labels = [piece(tokenizer, token) for token in likely.tolist()]
    draw_bars(candidates, labels, moving[place][likely].numpy(), still[place][likely].numpy())
    before = tokenizer.decode(look.answer[:place])
    short = before if len(before) < 22 else "…" + before[-20:]
    before = f"after “{short}”" if before else "the first word"
    candidates.set_title(f"where the two differ most:\n{before}")
    words.set_ylabel("probability")
    return figure


def draw_bars(axes, labels, moving, still):
    """A pair of bars for each label: with motion, and without."""
    x = np.arange(len(labels))
    axes.bar(x - 0.2, moving, 0.4, label="with the motion tokens", color="tab:blue")
    axes.bar(x + 0.2, still, 0.4, label="without the motion tokens", color="tab:orange")
    axes.set_xticks(x, labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set(ylim=(0, 1.02), xlim=(-0.6, len(labels) - 0.4))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def piece(tokenizer, token):
    """A token as text, without the mark of a leading space."""
    return tokenizer.sp.id_to_piece(int(token)).lstrip("▁") or "␣"


# ---- Command line ------------------------------------------------------------------------------------------


def draw_all(model, tokenizer, look, layer, bundled):
    """{name: figure}. layer: see draw_queries. bundled: whether the weights are those of this repository."""
    config = model.config
    names = list(OBJECTS) if bundled else []
    trained = names + [""] * (config.n_queries - len(names))
    figures = {"frames": draw_streams(look, config.branches)}
    for branch in config.branches:
        for page, start in enumerate(range(0, config.n_queries, QUERIES_PER_PAGE)):
            queries = range(start, min(start + QUERIES_PER_PAGE, config.n_queries))
            name = f"queries-{branch}" + f"-{page + 1}" * (page > 0)
            figures[name] = draw_queries(look, branch, layer, queries, trained)
    figures["video-queries"] = draw_video_queries(look, config.branches)
    if "motion" in config.branches:
        moving = word_probabilities(model, look, look.encoding.tokens)
        still = word_probabilities(model, look, without_motion(model, look))
        figures["words"] = draw_words(look, tokenizer, moving, still)
    return figures


def write_pictures(folder, *drawn):
    """Draws all figures (`drawn`: see draw_all) and writes them -> their file names."""
    import matplotlib

    # A dollar sign is a dollar sign; letters are large enough for a slide.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 11, "axes.titlesize": 12}):
        figures = draw_all(*drawn)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png", coarse=name.startswith(("frames", "queries")))
    return [f"{name}.png" for name in figures]


def look_into_folder(args):
    """Writes the trace of one clip and its pictures into the folder --out."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        told = "pip install matplotlib (--out FILE.png draws frames and flow without it)"
        raise ValueError(f"the pictures need matplotlib: {told}") from None
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; name a folder, or a picture FILE.png")
    model, tokenizer = sample.load(args.weights, args.device, args.dtype, args.int8, args.compile)
    depth = -(-model.config.qformer_layers // model.config.cross_every)
    if args.layer > depth:
        raise ValueError(f"--layer {args.layer}: only {depth} layers of the frame Q-Former read the frame")
    seen = look_at(model, tokenizer, args.video, args.question, args.words)
    bundled = args.weights.resolve() == sample.TINY
    names = write_pictures(folder, model, tokenizer, seen, args.layer - 1, bundled)
    trace = Trace()
    trace.steps = seen.steps
    answer = tokenizer.decode(seen.answer)
    text = f"# {args.video}\n\n{args.question}\n\n> {answer}\n\n{trace.table()}"
    replace_file(folder / "trace.md", text)
    print(trace.table(), end="")
    print(f"\n{answer}")
    for remark in seen.clip.notes:
        note(remark)
    if "motion" not in model.config.branches:
        note("no words.png: the model has no motion branch")
    note(f"{folder}: trace.md, {', '.join(names)}")


def look_into_picture(args):
    """Writes the streams of a clip and its flow as one picture, the file --out."""
    config, _ = hawk.read_chain(args.weights)
    clip = read_clip(args.video, **clip_options(config))
    write_picture(motion_sheet(args.video, clip), args.out)
    for remark in clip.notes:
        note(f"{args.video}: {remark}")
    note(f"{args.out}: from top to bottom {', '.join(clip.streams)}, flow")


def main(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("path", nargs="?", metavar="VIDEO", help="a video file, or a folder of numbered pictures")
    add("--video", metavar="VIDEO", help="the same")
    add("--out", required=True, help="folder to write to, or FILE.png for frames, streams and flow only")
    add("--question", default=data.DESCRIBE_QUESTIONS[0], help=f"default: {data.DESCRIBE_QUESTIONS[0]}")
    add("--words", type=number(int, 1, 100), default=16, help="words of the answer to look at (default: 16)")
    told = "which of the frame Q-Former's cross-attention layers to draw (default: 1)"
    add("--layer", type=number(int, 1), default=1, help=told)
    sample.add_model_options(p)
    args = p.parse_args(argv)
    if bool(args.path) == bool(args.video):
        p.error("give the path of one video")
    args.video = args.video or args.path
    out = Path(args.out)
    try:
        if out.resolve() == Path(args.video).resolve():
            raise ValueError(f"--out {out} is the video itself")
        if re.fullmatch(r"\.(jpe?g|gif|webp|bmp|tiff?|svg|pdf)", out.suffix, re.IGNORECASE):
            raise ValueError(f"--out {out}: a picture is written as PNG; give a name that ends in .png")
        if out.suffix.lower() == ".png" and not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        if out.suffix.lower() == ".png":
            look_into_picture(args)
        else:
            look_into_folder(args)
    except BrokenPipeError:  # run_program ends it quietly
        raise
    except PROBLEMS as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
