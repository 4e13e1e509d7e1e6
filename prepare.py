"""Jobs that run once, one sub-command each, before anything is trained or asked.

    python prepare.py toy --out data/toy --n-train 5000 --n-test 200 --seed 0     # a small drawn world: mp4 clips and annotations
    python prepare.py download --dry-run --out downloads                     # the released files: which, from where, how large
    python prepare.py weights --llama DIR --vit FILE --qformer FILE --hawk FILE --out weights/hawk-7b    # one folder of ours
    python prepare.py hawk --annotations DIR --videos DIR --out data/hawk    # Hawk's annotations -> index files of ours
    python prepare.py webvid --csv FILE --videos DIR --out data/webvid       # the same for WebVid, for stage 1
    python prepare.py features --weights DIR --data data/toy --out FOLDER    # the frozen part, computed once for all clips
    python prepare.py merge --weights runs/x/last --out weights/x         # trained weights, base and LoRA in one

Each section below holds one job: its helpers and a function with the job's name, which main() calls with the parsed arguments.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, make_dataclass
from functools import cache, partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from tqdm import tqdm

import data
from hawk import BRANCHES, Hawk, HawkConfig, LoRALinear, QFormer, ViT, read_chain, replaced_folder, save_tensors


def write(path, content):
    """Writes text or bytes under a temporary name and renames it, so that no half-written file is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


# ---- 1. toy: a small drawn world (clips, annotations in the Hawk format, a tokenizer) --------------------------------
# A fixed camera looks at a road: two pavements and two lanes. In the far lane traffic goes left, in the near one right.
# plan() decides what happens, describe() puts it into words, render() draws it, all from (seed, split, index) alone.

FPS, FRAMES, SIZE, LONG_FRAMES = 8, 32, 224, 320  # a clip lasts 4 s; time below is in clips, 0 to 1
SPLITS = ["train", "test", "long"]
BANDS = ["on the far pavement", "in the far lane", "in the near lane", "on the near pavement"]
BAND_Y, BAND_SCALE, LANES = [0.33, 0.48, 0.64, 0.82], [1.2, 0.9, 1.05, 1.5], {1: -1, 2: 1}  # lane: direction
SIDES = {"on the left": (0.16, 0.34), "in the middle": (0.43, 0.57), "on the right": (0.66, 0.84)}
MOMENTS = {"near the start of the clip": 0.25, "halfway through the clip": 0.5, "near the end of the clip": 0.75}
V, W, no, yes = ["car", "bus", "truck", "motorbike"], ["person", "cyclist", "dog"], False, True
USERS = [W, V, V, W]  # of each band: vehicles or walkers
WIDTH = {"car": 42, "bus": 50, "truck": 46, "motorbike": 38, "person": 14, "cyclist": 30, "dog": 34}  # pixels
COLOURS = {"red": (205, 35, 35), "blue": (35, 85, 215), "green": (35, 150, 60), "yellow": (240, 205, 45)}
COLOURS |= {"white": (243, 243, 243), "purple": (165, 50, 190)}
# picture widths per clip, of walkers and of vehicles; walkers must be quick enough for a change to be seen
SPEEDS = {"normal": [(0.28, 0.4), (0.38, 0.5)], "speeding": [(0.75, 0.95), (0.95, 1.2)]}
PACE = {"sudden_stop": 0, "fire": 0, "falling": 0, "collision": 0, "crossing": 0.02}  # after the event began
EFFECTS = {"collision": ("crash", 0), "fire": ("fire", -0.06), "left_bag": ("bag", 0.04)}  # what, how far down
# The phrase stands in every description of a kind and in no other's. point: it happens at one moment, which is named.
# sided: left, middle or right is named. motion_only: each single frame of it could come from a normal clip.
Kind = make_dataclass("Kind", ["phrase", "actors", "point", "sided", "motion_only", "reason", "consequences"])
KINDS = {
    "normal": Kind("nothing unusual happens", V + W, no, no, no, "all road users behave as they should",
        "All traffic keeps flowing.|Everyone gets along safely.|The road stays calm."),
    "wrong_way": Kind("drives the wrong way", V, no, no, yes, "traffic in this lane comes the other way",
        "Oncoming traffic is in danger.|A head-on accident could follow.|Oncoming drivers have to get out of the way."),
    "speeding": Kind("moves far too fast", V, no, no, yes, "nobody can stop in time at this speed",
        "Nobody has time to react.|Others could be hit.|Others have to get out of the way."),
    "sudden_stop": Kind("stops suddenly", V, yes, yes, yes, "those behind do not expect it",
        "Those behind have to brake hard.|The way is blocked for others.|From then on the way is blocked."),
    "turn_back": Kind("turns back", V, yes, yes, yes, "those behind are in the way",
        "Those behind have to make room.|Those behind are surprised.|Others have to watch out."),
    "loitering": Kind("loiters", W, no, yes, yes, "nobody knows the reason for it",
        "Someone should keep an eye on this.|It looks suspicious.|There seems to be no goal."),
    "swerving": Kind("swerves from side to side", V, no, no, yes, "the driver has lost control",
        "The driver seems to have lost control.|Others have to keep their distance.|It could hit someone at any time."),
    "falling": Kind("falls to the ground", W, yes, yes, no, "someone may be hurt",
        "Help is needed.|Someone may be hurt.|An ambulance may be needed."),
    "collision": Kind("crashes into", V, yes, yes, no, "people may be hurt",
        "Both are damaged and block the lane.|People may be hurt.|Both stop and the lane is blocked."),
    "fire": Kind("catches fire", V, yes, yes, no, "flames and smoke can hurt people",
        "Flames and smoke rise.|The fire brigade is needed.|It stops and burns, and smoke rises."),
    "left_bag": Kind("leaves a bag behind", W, yes, yes, no, "nobody knows what is in the bag",
        "The bag stays there alone.|Someone should check the bag.|The owner goes on without it."),
    "crossing": Kind("cuts across the road", W, no, yes, no, "traffic may not stop in time",
        "Traffic has to brake.|An accident could follow.|Drivers have to watch out."),
}  # fmt: skip
# A thing over the frames: centre x, y in fractions of the picture (nan: not there), pose in degrees.
Track = make_dataclass("Track", ["object", "colour", "scale", "x", "y", "pose"])


def half_width(track):
    return WIDTH[track.object] * track.scale / 2 / SIZE


def new_track(rng, band, names, x):
    """A road user of a random name and colour that follows x in a band."""
    y = BAND_Y[band] + (rng.uniform(-0.045, 0.045) if band in LANES else rng.uniform(-0.02, 0.02))
    return Track(rng.choice(names), rng.choice([*COLOURS]), BAND_SCALE[band], x, y + 0 * x, 0 * x)


def plan(rng, kind, t):
    """Decides a clip with frames at times t: tracks (the actor first), effects, camera, what a description may name."""
    spec, x = KINDS[kind], np.full(len(t), np.inf)
    # a normal clip tells of the nearest road user; more often a near one, because bystanders must then be farther away
    bands = [b for b in range(4) if USERS[b][0] in spec.actors]
    band = int(rng.choice(bands, p=[0.15, 0.2, 0.3, 0.35] if kind == "normal" else None))
    side = rng.choice([*SIDES]) if spec.sided else None
    when = rng.choice([*MOMENTS]) if spec.point else "throughout the clip"
    place = ("between the two pavements" if kind == "crossing" else BANDS[band]) + (f" {side}" if side else "")
    forward = LANES.get(band) or rng.choice([-1, 1])
    # from the middle: who is not bound to one place may come or go during the clip, so that this alone means nothing
    reach = 0.8 if kind in ("speeding", "collision") else 0.46 if spec.sided else rng.choice([0.46, 0.65])
    while np.abs(x - 0.5)[(t >= 0) & (t < 1)].max() > reach:
        begin = MOMENTS[when] + rng.uniform(-0.04, 0.04) if spec.point else 0
        s = np.clip(t - begin, 0, 1)  # an event lasts one clip; before and after it the actor behaves
        where = rng.uniform(*(SIDES[side] if side else (0.44, 0.56) if kind == "speeding" else (0.04, 0.96)))
        speed = rng.uniform(*SPEEDS.get(kind, SPEEDS["normal"])[band in LANES])
        path = PACE.get(kind, -speed if kind == "turn_back" else speed) * (s if spec.sided else s - 0.5)
        if kind == "loitering":  # a triangle wave: to and fro at constant speed
            path = rng.uniform(0.07, 0.09) * (np.abs((rng.uniform(1.6, 2.2) * s + rng.uniform()) % 1 * 4 - 2) - 1)
        x = where + (-forward if kind == "wrong_way" else forward) * path + forward * speed * (t - begin - s)
    actor = new_track(rng, band, USERS[band], x)
    during = (t >= begin) & (t < begin + 1)
    if kind == "swerving":
        reach = rng.uniform(0.065, 0.08)
        actor.y = BAND_Y[band] + reach * np.sin(2 * np.pi * (rng.uniform(1.5, 2.5) * s + rng.uniform()))
    if kind == "crossing":
        actor.y, actor.scale = actor.y + (BAND_Y[3 - band] - BAND_Y[band]) * np.clip(s / 0.8 - 0.125, 0, 1), 1.35
    if kind == "falling":  # lies after four frames: a dog on its back
        fallen = np.where(during, np.clip(s * FRAMES / 4, 0, 1), 0)
        actor.y, actor.pose = actor.y + 0.03 * fallen, fallen * forward * (180 if actor.object == "dog" else 90)
    clip = {"kind": kind, "tracks": [actor], "effects": [], "place": place, "moment": when, "begin": begin - t[0]}
    clip |= {"scene": rng.choice([*LOOKS]), "camera": (rng.uniform(0.97, 1.04), rng.uniform(-3, 3) / SIZE)}
    if kind == "collision":  # with one that stands or is slow; they touch at `where` when the event begins
        other = new_track(rng, band, [name for name in V if name != actor.object], x)
        way = rng.choice([0, rng.uniform(0.08, 0.16)]) * np.clip(t - begin, -1, 0)
        way = way + speed * (np.maximum(t - begin - 1, 0) + np.minimum(t - begin + 1, 0))  # before and after it drives
        other.x, other.y = where + forward * (half_width(other) * 0.9 + way), actor.y
        actor.x = x - forward * half_width(actor) * 0.9
        clip["tracks"].append(other)
    if kind in EFFECTS:
        name, down = EFFECTS[kind]
        x, y = (np.where(during, v, np.nan) for v in (where, actor.y + down * actor.scale))
        clip["effects"].append(Track(name, None, actor.scale, x, y, np.arange(len(t)) % 4))
    if len(t) == FRAMES:  # a clip: 0 to 3 others (who is hit is one), each in view for a quarter of it or more
        add_bystanders(rng, clip, band, t, int(rng.choice(4, p=[0.2, 0.4, 0.3, 0.1])) - (kind == "collision"), -0.25)
    else:  # every second clip somebody passes, who is in view for two or three clips: the road is never empty
        for shift in range(int(t[0]) - 1, int(t[-1]) + 2, 2):
            add_bystanders(rng, clip, band, t - shift, 1, 1)
    zoom, down = clip["camera"]
    for track in clip["tracks"] + clip["effects"]:  # x is planned in the picture, y in the world
        track.y, track.scale = 0.5 + zoom * (track.y - 0.5) + down, zoom * track.scale
    return clip


def add_bystanders(rng, clip, band, t, count, inside):
    """Adds `count` road users that behave (0 to 3, fewer where there is no room); each band at most once, and each type too,
    while there are others. They are in view from `inside` clips before the middle of the clip at time 0 to as many after
    it at least; if that is negative, they may come so much after it or leave so much before it."""
    tracks, added = clip["tracks"], []
    free = [b for b in range(4) if b != band and (clip["kind"] != "normal" or b < band)]
    for b in rng.permutation(free).tolist():
        names = [name for name in USERS[b] if name not in [track.object for track in tracks + added]] or USERS[b]
        direction = LANES.get(b) or rng.choice([-1, 1])
        speed = rng.uniform(*SPEEDS["normal"][b in LANES])
        for _ in range(30 if len(added) < count else 0):  # tries
            x = rng.uniform(speed * inside, 1 - speed * inside) + direction * speed * (t - 0.5)
            new = new_track(rng, b, names, x)
            near = [(abs(x - o.x) < half_width(new) + half_width(o) + 0.01) & (abs(new.y - o.y) < 0.07) for o in tracks]
            if not np.any(near):
                added.append(new)
                break
    tracks += sorted(added, key=lambda track: track.y[0])  # far to near


def describe(clip, rng):
    """The texts of a planned clip, as in the index. A description starts "A red car", then has the phrase."""
    spec, place, when, tracks = KINDS[clip["kind"]], clip["place"], clip["moment"], clip["tracks"]
    normal, hit = clip["kind"] == "normal", clip["kind"] == "collision"
    who, *others = [f"{track.colour} {track.object}" for track in tracks]
    steps = [track.x[-1] - track.x[0] for track in tracks]
    moves = ["stands still" if abs(dx) < 0.01 else "moves right" if dx > 0 else "moves left" for dx in steps]
    clause = f"{spec.phrase} a {others[0]}" if hit else spec.phrase
    does = f"moves along and {clause}" if normal else clause
    first = [f"{clause} {place}, {when}", f"{clause} {when}, {place}", f"{clause}. It happens {place}, {when}"]
    if normal:
        first = [f"moves along {place} {link} {clause}" for link in ("and", "as it should, and")] + [f"{does} {place}"]
    first = rng.choice(first)
    more = [rng.choice([f"The scene is {clip['scene']}.", f"The camera looks at {clip['scene']}."])]
    more.append(f"A {others[hit]} {moves[1 + hit]}." if others[hit:] else "Nobody else is near.")
    description = f"A {who} {first}. {rng.choice(spec.consequences.split('|'))} {rng.choice(more)}"
    count = ["is one road user", "are two road users", "are three road users", "are four road users"][len(others)]
    rounds = {
        "Who is involved?|Who is it about?": f"A {who} and a {others[0]}" if hit else f"A {who}",
        "What happens?|What does the video show?|What is going on?": f"The {who} {does}",
        "Where does it happen?|Where is it?": f"It happens {place}",
        "When does it happen?|At what time does it happen?": f"It happens {when}",
        "How many road users are there?|How many road users can be seen?": f"There {count}",
        "Why is it dangerous?|Why is it a problem?": f"{'It is not, because' if normal else 'Because'} {spec.reason}",
    }
    rounds = [[*rounds.items()][i] for i in rng.permutation(len(rounds))]  # any of them may be asked first
    qa = [{"q": rng.choice(questions.split("|")), "a": answer + "."} for questions, answer in rounds]
    motion = " ".join([who, moves[0] if normal else spec.phrase, *others[:hit]])
    motion += f", {tracks[1 + hit].object} {moves[1 + hit]}" if others[hit:] else ""
    return {"description": description, "qa": qa, "motion": motion}


def wheels(v, r, *centres, hub=0.45):
    return [("disc", u, v, k, k, 0, fill) for u in centres for k, fill in ((r, DARK), (r * hub, METAL))]


# A shape is (form, centre u, v, half width, half height, slope, fill): pixels, v points down, and a slope widens a box
# downwards. Every sprite is its own mirror image: a single frame must not tell which way it goes.
DARK, GLASS, SKIN, METAL, BODY = (38, 38, 42), (150, 185, 205), (222, 180, 150), (120, 122, 128), "body"
LOOKS = {  # from top to bottom: sky, ground, pavement, road, pavement, foreground; what stands behind
    "a town street": "96b4d7 968478 a8a39c 56565a a8a39c 76767c house house",
    "a park road": "a0c3dc 5c8c4a baa884 62605c baa884 52803e tree tree",
    "a seaside road": "a5cde6 3e7aa8 ccbc96 6a6662 ccbc96 d6c292 boat tree",
    "a factory road": "acaaa4 80766a 88827c 4a4a4e 88827c 706050 hall hall",
    "a snowy village": "c4cdd8 dee4ea c8ced6 70737a c8ced6 e2e6eb cabin pine",
}
SPRITES = {
    "car": [*wheels(6, 4.8, -12, 12), ("box", 0, 0.5, 21, 5, 0, BODY), ("box", 0, -7, 10.5, 4.5, 0.6, BODY),
            ("box", -4.8, -6, 3.6, 2.6, 0.3, GLASS), ("box", 4.8, -6, 3.6, 2.6, 0.3, GLASS)],
    "bus": [*wheels(10, 4.8, -15, 15), ("box", 0, -2, 25, 11, 0, BODY),
            *[("box", u, -6, 4, 3.6, 0, GLASS) for u in (-18.5, -6.2, 6.2, 18.5)]],
    "truck": [*wheels(8.5, 4.5, -16, -6, 6, 16), ("box", 0, 4.5, 22, 2, 0, DARK), ("box", 0, -5, 18, 8, -0.6, BODY)],
    "motorbike": [*wheels(6, 6, -13, 13), ("box", 0, 2, 11, 3.4, 0.5, BODY), ("box", 0, -5, 4.5, 5, 0.2, BODY),
                  ("disc", 0, -12, 3.8, 3.8, 0, DARK)],
    "person": [("box", -2.6, 10, 2, 5.5, 0, DARK), ("box", 2.6, 10, 2, 5.5, 0, DARK),
               ("box", 0, -1, 6.3, 7, -0.15, BODY), ("disc", 0, -11.5, 3.7, 3.7, 0, SKIN)],
    "cyclist": [*wheels(8.5, 6.3, -9, 9, hub=0.73), ("box", 0, 7, 9, 1.2, 0, DARK),
                ("box", 0, -3, 5.2, 7.5, -0.1, BODY), ("disc", 0, -13, 3.4, 3.4, 0, SKIN)],
    "dog": [*[("box", u, 7, 1.6, 5, 0, DARK) for u in (-9, -5, 5, 9)], ("disc", 0, 0, 12, 5.5, 0, BODY),
            ("disc", -12.5, -4.5, 4.6, 4.2, 0, BODY), ("disc", 12.5, -4.5, 4.6, 4.2, 0, BODY)],
    "bag": [("disc", 0, -5, 5.5, 5.5, 0, DARK), ("box", 0, 2, 10, 6.5, 0, (95, 60, 35)),
            ("box", 0, 0, 10, 1.3, 0, (225, 200, 150))],
    "crash": [("star", 0, 0, 17, 17, 9, (250, 150, 30)), ("star", 0, 0, 11, 11, 7, (255, 245, 170)),
              *[("box", u, 13, 2.2, 1.4, 0, DARK) for u in (-17, -9, 9, 17)]],
    "arrow": [("box", 0, 4, 1.1, 7, 0, (200, 200, 192)), ("box", 0, -6, 3, 4, 0.75, (200, 200, 192))],
    "boat": [("box", 0, -12, 4, 6, 0.6, (238, 234, 224)), ("box", 0, -3, 9, 2.5, -1, (130, 86, 60))],
    "pine": [("box", 0, -7 - 7 * k, 5, 5, 0.9, (60 + 2 * k, 100 + 8 * k, 80 + 4 * k)) for k in range(3)],
}  # fmt: skip


def draw(shapes, scale, body=None, degrees=0.0):
    """Shapes as a premultiplied RGBA picture, smooth edges, (h, w, 4) float32, h and w odd, turned about its centre."""
    reach = int(max(max(abs(s[1]) + s[3] + abs(s[5]) * s[4], abs(s[2]) + s[4]) for s in shapes) * scale) + 4
    ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32) / np.float32(scale)
    cos, sin = np.float32([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    u, v = cos * xs + sin * ys, cos * ys - sin * xs
    picture = np.zeros((*u.shape, 4), np.float32)
    outlines = [(1.3, DARK, shape) for shape in shapes if shape[-1] in (BODY, SKIN)]  # they come first, around the rest
    layers = outlines + [(0, body if shape[-1] == BODY else shape[-1], shape) for shape in shapes]
    for outline, colour, (form, cu, cv, hw, hh, slope, _) in layers:
        du, dv = np.abs(u - cu), v - cv
        if form == "box":
            distance = np.maximum(du - hw - slope * dv, np.abs(dv) - hh)
        elif form == "disc":
            distance = (np.hypot(du / hw, dv / hh) - 1) * min(hw, hh)
        else:  # a star of `slope` points
            distance = np.hypot(du, dv) - hw * (0.7 + 0.3 * np.cos(slope * np.arctan2(du, -dv)))
        alpha = np.clip(0.5 - (distance - outline) * np.float32(scale), 0, 1)[..., None]
        picture += alpha * (np.float32([*colour, 1]) - picture)
    h, w = (np.abs(np.flatnonzero(picture[..., 3].any(axis)) - reach).max() + 1 for axis in (1, 0))  # keep an empty rim
    return picture[reach - h : reach + h + 1, reach - w : reach + w + 1]


def blend(image, sprite, x, y):
    """Puts a sprite onto image (SIZE, SIZE, 3) in place, centred at pixel (x, y), bilinear between pixels."""
    left, top = x - sprite.shape[1] // 2 + 1, y - sprite.shape[0] // 2 + 1
    column, row = int(np.floor(left)), int(np.floor(top))
    fx, fy = np.float32(left - column), np.float32(top - row)
    sprite = sprite[:, 1:] * (1 - fx) + sprite[:, :-1] * fx
    sprite = sprite[1:] * (1 - fy) + sprite[:-1] * fy
    sprite = sprite[max(0, -row) : max(0, SIZE - row), max(0, -column) : max(0, SIZE - column)]
    target = image[max(0, row) : max(0, row) + sprite.shape[0], max(0, column) : max(0, column) + sprite.shape[1]]
    target *= 1 - sprite[..., 3:]
    target += sprite[..., :3]


@cache
def scenery(name, variant):
    """The picture of one thing at the back, its foot at the centre."""
    rng = np.random.default_rng((variant, len(name)))
    shapes, w, h, shade = SPRITES.get(name), rng.uniform(11, 17), rng.uniform(8, 13), rng.uniform(0.8, 1.15)
    if name in ("house", "cabin"):
        wall = tuple(rng.uniform((150, 120, 90), (205, 170, 145))) if name == "house" else (125, 88, 62)
        roof = ("box", 0, -2 * h - 5, w / 2 + 1, 5, w / 10 + 0.2, (130, 62, 50) if name == "house" else (236, 240, 244))
        shapes = [("box", 0, -h, w, h, 0, wall), roof] + [("box", u * w, -h, 2, 3, 0, GLASS) for u in (-0.55, 0, 0.55)]
    elif name == "hall":
        shapes = [("box", rng.uniform(-8, 8), -2 * h - 6, 2.6, 10, 0.08, (122, 76, 62))]
        shapes += [("box", 0, -h, w + 4, h, 0, (118 * shade, 126 * shade, 134 * shade)), ("box", 0, -h, w, 2, 0, DARK)]
    elif name == "tree":
        green, shapes = np.multiply((55, 110, 50), shade), [("box", 0, -6, 2, 7, 0, (92, 66, 46))]
        shapes += [("disc", *rng.normal((0, -19), 3), 8, 7, 0, tuple(green + (0, 10 * k, 0))) for k in range(3)]
    return draw(shapes, rng.uniform(0.9, 1.3))


def render(clip, rng):
    """The frames of a planned clip, (n, SIZE, SIZE, 3) uint8. Light, tint, texture and noise come from rng."""

    def row(y):
        return int(round((0.5 + clip["camera"][0] * (y - 0.5) + clip["camera"][1]) * SIZE))

    gain = (rng.uniform(0.8, 1.15) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    scene, look = np.zeros((SIZE, SIZE, 3), np.float32), LOOKS[clip["scene"]].split()
    for y, colour in zip([-1, rng.uniform(0.15, 0.24), 0.28, 0.4, 0.73, 0.91], look[:6], strict=True):
        scene[max(row(y), 0) :] = np.float32([*bytes.fromhex(colour)]) * np.float32(rng.uniform(0.93, 1.06))
    x = rng.uniform(-0.05, 0.05)
    while x < 1.05:
        blend(scene, scenery(rng.choice(look[6:]), int(rng.integers(12))), x * SIZE, row(0.28))
        x += rng.uniform(0.11, 0.22)
    for top, bottom, kerb in ((0.28, 0.4, 0.4), (0.73, 0.91, 0.73)):  # paving stones
        scene[row(top) : row(bottom), rng.integers(16) :: 16] *= 0.88
        scene[row((top + bottom) / 2)] *= 0.9
        scene[row(kerb) - 1 : row(kerb) + 1] *= 0.7
    scene[row(0.56) - 1 : row(0.56) + 1, (np.arange(SIZE) + rng.integers(28)) % 28 < 16] = (215, 215, 205)
    for lane, sign in LANES.items():
        for x in (np.arange(3) + rng.uniform()) / 3:
            blend(scene, draw(SPRITES["arrow"], 0.8, degrees=90 * sign), x * SIZE, row(BAND_Y[lane]))
    for cells, strength in ((9, 7), (45, 5), (112, 6)):  # texture, coarse to fine: random values, linearly between them
        values = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        at = np.linspace(0, cells - 1.001, SIZE, dtype=np.float32)
        low, part = at.astype(int), at % 1
        for _ in range(2):  # each round enlarges one axis and swaps the two
            values = values[low].T * (1 - part) + values[low + 1].T * part
        scene += strength * values[..., None]
    scene *= gain
    body = {name: np.minimum(np.multiply(rgb, rng.uniform(0.92, 1.06)), 255) for name, rgb in COLOURS.items()}
    fires, sprites = [], {}
    for _ in range(4):  # smoke, flames and their bright cores
        fire = [("disc", rng.normal(0, 4), -15 - 7 * k, 7 + k, 6 + k, 0, (75 + 12 * k,) * 3) for k in range(4)]
        fire += [("disc", u, rng.uniform(-6, 1), 4.5, rng.uniform(7, 11), 0, (235, 90, 20)) for u in (-11, -4, 4, 11)]
        fire += [("disc", u, rng.uniform(0, 4), 3, rng.uniform(4, 7), 0, (255, 215, 70)) for u in (-8, 0, 8)]
        fires.append(fire)
    noise = np.random.default_rng(0).standard_normal((16, SIZE, SIZE, 1)).astype(np.float32) * rng.uniform(0.8, 1.6)
    frames = np.empty((len(clip["tracks"][0].x), SIZE, SIZE, 3), np.uint8)
    for i, frame in enumerate(frames):
        image = scene.copy()
        for track in sorted(clip["tracks"], key=lambda track: track.y[i]) + clip["effects"]:  # near ones cover far ones
            x, y, pose = track.x[i], track.y[i], track.pose[i]
            if -0.2 < x < 1.2:  # else out of view, or nan: not there yet
                if (id(track), pose) not in sprites:
                    shapes = fires[pose] if track.object == "fire" else SPRITES[track.object]
                    sprite = draw(shapes, track.scale, body.get(track.colour), pose if track.colour else 0)
                    sprites[id(track), pose] = sprite * np.append(gain, np.float32(1))
                blend(image, sprites[id(track), pose], x * SIZE - 0.5, y * SIZE - 0.5)
        frame[:] = np.clip(image + noise[rng.integers(16)], 0, 255)
    return frames


def toy_clip(seed, split, index):
    """(plan, texts, rng to render it with) of one clip. Kinds come in shuffled rounds: small sets have them all."""
    normal = {"train": 4, "test": 2, "long": 0}[split]  # in a round; traffic without an event has most to learn from
    kinds, number = ["normal"] * normal + [kind for kind in KINDS if kind != "normal"], SPLITS.index(split)
    turn, place = divmod(index, len(kinds))
    kind = kinds[np.random.default_rng((seed, number, turn, 1)).permutation(len(kinds))[place]]
    plan_rng, text_rng, render_rng = np.random.default_rng((seed, number, index)).spawn(3)
    if split == "long":  # a clip's plan, with ordinary traffic before and after
        return plan(plan_rng, kind, (np.arange(LONG_FRAMES) - plan_rng.integers(64, 224)) / FRAMES), None, render_rng
    clip = plan(plan_rng, kind, np.arange(FRAMES) / FRAMES)
    return clip, describe(clip, text_rng), render_rng


def make_toy_clip(folder, seed, split, index):
    """Writes one clip as H.264, whose bytes depend on the frames alone, and returns its index line."""
    clip, texts, rng = toy_clip(seed, split, index)
    line, actor = {"video": f"videos/{split}_{index:06d}.mp4", "source": "toy"}, clip["tracks"][0]
    path, temporary = folder / line["video"], folder / (line["video"] + ".tmp")
    source = f"-f rawvideo -pix_fmt rgb24 -s {SIZE}x{SIZE} -r {FPS} -i -"
    target = "-c:v libx264 -preset veryfast -crf 20 -pix_fmt yuv420p -threads 1 -flags bitexact -fflags bitexact -f mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *f"-loglevel error -y {source} {target}".split(), f"file:{temporary}"]
    done = subprocess.run(command, input=render(clip, rng).tobytes(), capture_output=True)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: ffmpeg could not write it: {done.stderr.decode(errors='replace').strip()[-200:]}")
    os.replace(temporary, path)
    facts = {"kind": clip["kind"], "object": actor.object, "colour": actor.colour, "place": clip["place"]}
    if split == "long":
        return line | facts | {"abnormal": [round((clip["begin"] + clips) * FRAMES / FPS, 2) for clips in (0, 1)]}
    facts |= {"moment": clip["moment"], "scene": clip["scene"], "objects": []}
    for track in clip["tracks"] + clip["effects"]:
        inside, lying = (track.x >= 0) & (track.x <= 1), np.abs(track.pose) > 45  # nan is not inside
        x, y = (np.where(inside, v.round(3), None).tolist() for v in (track.x, track.y))
        entry = {"object": track.object, "colour": track.colour, "x": x, "y": y}
        facts["objects"].append(entry | ({"lying": lying.tolist()} if lying.any() else {}))
    return line | texts | {"flags": []} | facts


def toy_tokenizer():
    """A SentencePiece model of the toy language, always the same; ids 0, 1, 2 are <unk>, <s>, </s> as LLaMA's."""
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "</Video> ", " [/INST] ", *data.DESCRIBE_QUESTIONS] * 20
    texts += [chr(code) for code in range(32, 127)]
    for index in range(1500):
        clip = toy_clip(2024, "train", index)[1]
        texts += [clip["description"], clip["motion"] + "\n", *(text for qa in clip["qa"] for text in qa.values())]
    for n in [8, 16, 32] * 100:
        times = ", ".join(str(round(i / FPS, 1)) for i in range(0, FRAMES, FRAMES // n))
        texts.append(f"</Video> The video contains {n} frames sampled at {times} seconds. ")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=1024, character_coverage=1.0,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, split_by_number=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def toy(args):
    """Writes the toy world into OUT; what was there under the same names is replaced."""
    counts = [args.n_train, args.n_test, args.n_long]
    if min(counts) < 0 or max(counts) == 0:
        raise ValueError("nothing to make: give --n-train, --n-test or --n-long a number above 0")
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    write(args.out / "kinds.json", json.dumps({name: kind.phrase for name, kind in KINDS.items()}, indent=2))
    write(args.out / "tokenizer.model", toy_tokenizer())
    ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # ctrl-C is for this process
    with ProcessPoolExecutor(args.workers, **ignore) as pool:
        for split, n in [(split, n) for split, n in zip(SPLITS, counts, strict=True) if n]:
            make = partial(make_toy_clip, args.out, args.seed, split)
            (args.out / f"{split}.jsonl").unlink(missing_ok=True)  # it must not stand beside clips of another seed
            lines = list(tqdm(pool.map(make, range(n)), total=n, desc=split, unit="clip"))
            write(args.out / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            if split != "long":
                rows = [{"video": row["video"], "QA": row["qa"], "description": row["description"]} for row in lines]
                write(args.out / f"all_videos_{split}.json", json.dumps(rows, indent=1))


# ---- 2. features: everything before the frame positions is frozen in training, so it is computed once ----------------
def features(args):
    """Writes OUT/train and OUT/test: for each clip (and each of --crops variants of it) the frame features of both
    branches. Goes on where an interrupted run stopped; a folder made with other weights or settings is refused."""
    splits = [split for split in SPLITS[:2] if (args.data / f"{split}.jsonl").exists()]
    if not splits:
        raise ValueError(f"{args.data}: holds neither train.jsonl nor test.jsonl")
    model = Hawk.from_pretrained(args.weights, device=data.usable_device(args.device))
    expected = {"weights": data.frozen_fingerprint(model), "seed": args.seed, "bfloat16": args.bfloat16}
    for split in splits:
        rows, c = data.read_index(args.data / f"{split}.jsonl"), model.config
        crops = args.crops if split == "train" else 1
        meta = expected | {"choices": crops, "videos": data.videos_digest(rows), "motion": c.motion}
        meta |= {"shape": [len(rows), crops, c.n_frames, c.n_queries, c.qformer_dim], "dtype": args.dtype}
        streams, done, record = open_cache(args.out / split, meta, rows)
        todo = [k * len(rows) + i for i in range(len(rows)) for k in range(crops) if (i, k) not in done]
        clips = Crops(rows, c.n_frames, c.image_size, args.seed, motion=c.motion)
        order = BatchSampler(todo, args.batch_size, drop_last=False)
        with record, tqdm(total=len(rows) * crops, initial=len(done), desc=split, unit="clip") as bar:
            for batch in data.load_batches(clips, order, args.workers, collate_fn=list):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bfloat16):
                    write_features(model, [clip for clip in batch if "error" not in clip], streams)
                for clip in batch:
                    clip.pop("frames", None)
                    if "error" in clip:
                        tqdm.write(f"note: {clip['error']}", file=sys.stderr)
                record.write("".join(json.dumps(clip) + "\n" for clip in batch))
                record.flush()
                bar.update(len(batch))


class Crops(data.ClipDataset):
    """Samples run on over the variants of the rows' clips; variant 0 is the whole picture."""

    def __getitem__(self, number):
        k, i = divmod(number, len(self.rows))
        line = {"row": i, "choice": k, "video": os.path.basename(self.rows[i]["video"])}
        try:
            appearance, motion, clip = self.read(i, "uniform", None)
        except data.VideoError as error:
            return line | {"error": str(error)}
        line["bytes"] = os.path.getsize(self.rows[i]["video"])
        if k:
            appearance, motion = data.random_crop(appearance, motion, data.clip_generator(self.seed, k, i))
        frames = torch.stack([appearance, motion])  # (2, T, 3, H, W)
        return line | {"frames": frames, "message": clip.message, "indices": clip.indices.tolist()}


@torch.no_grad()
def write_features(model, clips, streams):
    """Encodes the clips of equal length together and puts their features into the two arrays."""
    for T in {clip["frames"].shape[1] for clip in clips}:
        same = [clip for clip in clips if clip["frames"].shape[1] == T]
        frames = torch.stack([clip["frames"] for clip in same], 1).to(model.device) / 255  # (2, B, T, 3, H, W)
        for array, seen in zip(streams, model.frame_features(*frames), strict=True):
            for clip, x in zip(same, seen.float().cpu().numpy(), strict=True):
                array[clip["row"], clip["choice"], :T] = x
    for array in streams:
        array.flush()


def new_arrays(files, dtype, shape):
    """Files of zeros, to be mapped, that have their room on the disk: a write to one without would kill the process."""
    try:
        for file in files:
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=tuple(shape))
            with file.open("r+b") as opened:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        for file in files:
            file.unlink(missing_ok=True)
        raise OSError(error.errno, f"no room for the cache ({error.strerror})", str(files[0].parent)) from error


def open_cache(folder, meta, rows):
    """(arrays, what is done already, record to append to); ValueError if the folder holds another cache."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, clips, file = [folder / f"{name}.npy" for name in BRANCHES], folder / "clips.jsonl", folder / "meta.json"
    if not file.exists():
        new_arrays(arrays, meta["dtype"], meta["shape"])
        clips.write_text("")
        write(file, json.dumps(meta, indent=1))
    if (old := read_json(file, "shape")) != meta:
        key = next(k for k in meta if old.get(k) != meta[k])
        raise ValueError(f"{folder}: a cache with {key} {old.get(key)!r}, not {meta[key]!r}; choose another --out")
    lines = [line for line in clips.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write(clips, "".join(lines))
    seen = [clip for clip in map(json.loads, lines) if "error" not in clip]
    data.refuse_changed(folder, rows, seen)
    done = {(clip["row"], clip["choice"]) for clip in seen}
    return [np.load(file, mmap_mode="r+") for file in arrays], done, clips.open("a")


# ---- 3. weights: the released files -> one folder of ours ------------------------------------------------------------
# Where each tensor of ours comes from: a pattern of our name, and its name in the released .pth files | in
# Hugging Face's BLIP-2. {m} is "_motion" or nothing, [q] and [v] are thirds of a bias [queries, keys, values].
NAMES = {
    "vit.cls_token": "cls_token | vision_model.embeddings.class_embedding",
    "vit.pos_embed": "pos_embed | vision_model.embeddings.position_embedding",
    "vit.patch_embed.(.+)": "patch_embed.proj.{0} | vision_model.embeddings.patch_embedding.{0}",
    "vit.blocks.(.+).norm(.+)": "blocks.{0}.norm{1} | ENCODER.{0}.layer_norm{1}",
    "vit.blocks.(.+).attn.qkv.(.+)": "blocks.{0}.attn.qkv.{1} | ENCODER.{0}.self_attn.qkv.{1}",
    "vit.blocks.(.+).attn.(.)_bias": "blocks.{0}.attn.{1}_bias | ENCODER.{0}.self_attn.qkv.bias[{1}]",
    "vit.blocks.(.+).attn.proj.(.+)": "blocks.{0}.attn.proj.{1} | ENCODER.{0}.self_attn.projection.{1}",
    "vit.blocks.(.+).mlp.(.+)": "blocks.{0}.mlp.{1} | ENCODER.{0}.mlp.{1}",
    "ln_vision.(.+)": "ln_vision{m}.{0} | vision_model.post_layernorm.{0}",
    "(video_|)queries": "{0}query_tokens{m}",
    "(video_|)qformer.norm.(.+)": "{0}Qformer{m}.bert.embeddings.LayerNorm.{1} | {0}qformer.layernorm.{1}",
    "LAYER.(?:self|(cross))_attention.output.(.+)": "LAYER.{2}attention.output.dense.{3}",
    "LAYER.(?:self|(cross))_attention.norm.(.+)": "LAYER.{2}attention.output.LayerNorm.{3}",
    "LAYER.(?:self|(cross))_attention.(.+)": "LAYER.{2}attention.self.{3}",
    "LAYER.mlp.fc1.(.+)": "LAYER.intermediate_query.dense.{2}",
    "LAYER.mlp.fc2.(.+)": "LAYER.output_query.dense.{2}",
    "LAYER.mlp.norm.(.+)": "LAYER.output_query.LayerNorm.{2}",
    "frame_position.weight": "video_frame_position_embedding{m}.weight",
    "proj_0.(.+)": "llama_proj{m}_0.{0}",
    "(encoder_.+|decoder_.+)": "llama_proj{m}_last.{0}",
    "llama.lm_head.weight": "lm_head.weight",
    "llama.(.+)": "model.{0}",
}
HEAD = r"(norm|head)\..+"
LEFT_OUT = [  # (kinds of file, what they may hold beyond that, why it is left out); anything else is an error
    ("vit", HEAD, "the end of EVA's own classifier, behind the features"),
    ("vit", r"qformer\..+|query_tokens|vision_model\.post_layernorm\..+", "read as --qformer"),
    ("qformer", r"vision_model\.(embeddings|encoder)\..+", "read as --vit"),
    ("vit qformer", r"(t5_proj|language_projection|language_model)\..+", "BLIP-2's own language model"),
    ("llama qformer hawk video_llama", r".+\.(position_ids|inv_freq)", "a table of positions, computed here"),
    ("video_llama", r"llama_proj\..+", "Video-LLaMA's projection, of another shape than Hawk's"),
]
FROZEN = ("ln_vision", "queries", "qformer")  # the parts of a branch that the published training meant to freeze
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 10**9


def released_names(part, suffix=""):
    """What a tensor of ours may be called in the released files. `part`: its name, without a branch in front."""
    for ours, released in NAMES.items():
        if found := re.fullmatch(ours.replace("LAYER", r"(video_|)qformer.layers.(\d+)"), part):
            released = released.replace("LAYER", "{0}Qformer{m}.bert.encoder.layer.{1}")
            released = released.replace("ENCODER", "vision_model.encoder.layers")
            names = released.format(*found.groups(""), m=suffix).split(" | ")
            other = names[0].replace("Qformer.bert", "qformer").replace("attention.self", "attention.attention")
            return [*names, other]  # the last: Q-Former layers in Hugging Face's BLIP-2


@cache
def open_tensors(file):
    """{name: tensor} of a .pth, .bin or .safetensors file, mapped, not read; of a checkpoint, its "model"."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # files older than torch 1.6 are no zip files and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: tensor.detach() for name, tensor in content.get("model", content).items()}
    except Exception as e:  # these readers raise almost anything at a damaged file
        reason = re.split(r"\n|\. ", str(e))[0]
        raise ValueError(f"{file}: is missing, cut short, or holds other than tensors ({reason})") from e


def read_json(file, *needed):
    try:
        content = json.loads(file.read_bytes())
        return content | {key: content[key] for key in needed} if needed else content
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"{file}: is missing, or not the JSON that belongs here ({type(e).__name__}: {e})") from e


class Source:
    """The tensors of a file, of a Hugging Face folder, or `made` here. `held`: {name: its file}."""

    def __init__(self, path, made=None):
        self.path, self.made, self.used, self.held = path, made, set(), dict.fromkeys(made or (), path)
        if made is None:
            shards = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
            for listing in path.glob(f"*{shards[0].suffix}.index.json") if shards else ():
                files = read_json(listing, "weight_map")["weight_map"]  # knows of missing files, too
                self.held |= {name: path / Path(file).name for name, file in files.items()}
            for file in shards if path.is_dir() else [path]:
                self.held |= dict.fromkeys(open_tensors(file), file)

    def get(self, name):
        """A tensor. "x[q]" and "x[v]" are thirds of a bias of [queries, keys, values], whose keys must be zero."""
        name, _, third = name.partition("[")
        file = self.held[name]
        self.used.add(name)
        try:
            tensor = (self.made or open_tensors(file))[name]
        except (ValueError, KeyError) as e:
            raise ValueError(f"{file}: the tensor {name}, which its index places here, is missing") from e
        if not third:
            return tensor
        if tensor.ndim != 1 or len(tensor) % 3 or tensor.chunk(3)[1].any():
            raise ValueError(f"{file}: {name} {tuple(tensor.shape)} must be [queries, zeros, values]")
        return tensor.chunk(3)["qkv".index(third[0])]

    def unused(self, reasons):
        """{tensor: why it is left out}; ValueError for one that `reasons` [(pattern, why)] does not know."""
        unused = {}
        for name in sorted(self.held.keys() - self.used):
            if not (whys := [why for pattern, why in reasons if re.fullmatch(pattern, name)]):
                shape = tuple(self.get(name).shape)
                raise ValueError(f"{self.held[name]}: unknown tensor {name} {shape}: the model has no place for it")
            unused[name] = whys[0]
        return unused


def locate(name, sources, motion):
    """(function that reads it, "file: released name") of tensor `name` of ours; ValueError if it is missing. `motion`:
    which source has the frozen part of the motion branch: "hawk", "made" or "qformer"."""
    tower, _, part = name.partition(".")
    role, frozen = "hawk" if "hawk" in sources else "made", part.startswith(FROZEN)
    if tower not in BRANCHES:
        role, part = tower, name
    elif frozen and tower == "appearance":
        role = "qformer"
    elif frozen and (part != "queries" or role == "made"):  # the published training trained the queries too, by mistake
        no_ln = motion == "hawk" and part.startswith("ln_") and "ln_vision_motion.bias" not in sources["hawk"].held
        role = "made" if no_ln else motion
    elif "video_llama" in sources and part.startswith(("video_", "frame_position")):
        role = "video_llama"
    suffix = "_motion" if tower == "motion" and role in ("hawk", "made") else ""  # the other files serve both branches
    names = released_names(part, suffix)
    for released in names:
        if file := sources[role].held.get(released.partition("[")[0]):
            return partial(sources[role].get, released), f"{file}: {released}"
    raise ValueError(f"{sources[role].path}: the tensor {' or '.join(names)} is missing (it becomes {name})")


def infer_config(sources, overrides):
    """HawkConfig of the released files: LLaMA's sizes from its config.json, the others from shapes, head counts from
    the published widths of a head. `overrides` wins over all of them."""

    def size(name, axis):
        read, origin = locate(name, sources, "qformer")
        if axis >= (tensor := read()).ndim:
            raise ValueError(f"{origin} has too few dimensions: {tuple(tensor.shape)}")
        return tensor.shape[axis]

    def layers(role, pattern):
        numbers = [int(found[1]) for name in sources[role].held if (found := re.match(pattern, name))]
        return 1 + max(numbers, default=0)

    file = sources["llama"].path / "config.json"
    names = {"hidden_size": "llama_dim", "num_hidden_layers": "llama_layers", "num_attention_heads": "llama_heads"}
    names |= {"intermediate_size": "llama_mlp", "vocab_size": "vocab_size", "rms_norm_eps": "norm_eps"}
    llama = read_json(file, *names)
    for key, value in ("num_key_value_heads", llama["num_attention_heads"]), ("rope_scaling", None):
        if llama.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {llama[key]}; Hawk's LLaMA can only do {value}")
    c = {ours: llama[theirs] for theirs, ours in names.items()} | {"rope_theta": llama.get("rope_theta", 10000.0)}
    c["vit_dim"], c["patch_size"] = size("vit.patch_embed.weight", 0), size("vit.patch_embed.weight", 2)
    c["image_size"] = math.isqrt(size("vit.pos_embed", 1) - 1) * c["patch_size"]
    c["vit_mlp"] = size("vit.blocks.0.mlp.fc1.weight", 0)
    whole = any(re.fullmatch(HEAD, name) for name in sources["vit"].held)  # a whole EVA: its last block is not used
    c["vit_depth"] = layers("vit", r"(?:blocks|vision_model\.encoder\.layers)\.(\d+)\.") - whole
    c["vit_depth"] = 39 if c["vit_dim"] == 1408 else c["vit_depth"]
    c["n_queries"], c["qformer_dim"] = size("appearance.queries", 1), size("appearance.queries", 2)
    c["qformer_mlp"] = size("appearance.qformer.layers.0.mlp.fc1.weight", 0)
    c["qformer_layers"] = layers("qformer", r"(?:Qformer\.bert|qformer)\.encoder\.layer\.(\d+)\.")
    for role in sources.keys() & {"hawk", "video_llama"}:
        c["n_frames"] = size("appearance.frame_position.weight", 0)
        c["n_video_queries"] = size("appearance.video_queries", 1)
        c["video_layers"] = layers(role, r"video_Qformer\.bert\.encoder\.layer\.(\d+)\.")
    c["tight_dim"] = size("appearance.encoder_1.weight", 0) if "hawk" in sources else c["llama_dim"] // 16
    for tower, head in ("vit", 88), ("qformer", 64):  # head counts leave no trace in the shapes
        dim = c[f"{tower}_dim"]
        c[f"{tower}_heads"] = f"{dim} / {head}" if dim % head else dim // head  # a string is refused: it needs --set
    return HawkConfig.from_dict(c | overrides, "the released files and --set")


# What no file holds: the motion Q-Former of the published training
BERT_WORDS, BERT_POSITIONS = 30522, 512  # bert-base-uncased, whose text half the released code builds and throws away


def replay_motion_qformer(config, seed=42):
    """The motion Q-Former that the released training used and no file holds: {released name: tensor}, bit for bit.

    The released code builds it at random and freezes it; checkpoints leave frozen parts out. But training began with
    torch.manual_seed(42), so its weights follow from that seed and from everything drawn before them: two ViTs and the
    appearance Q-Former. This draws the same numbers in the same order and keeps the last Q-Former's. Uniform numbers
    can be thrown away in portions of any size; normal ones are drawn tensor by tensor, because torch draws 16 more for
    a tensor whose size is not a multiple of 16, and two at a time for one of fewer than 16."""
    generator, scratch = torch.Generator().manual_seed(seed), torch.empty(1 << 16)
    with torch.device("meta"):  # ours, which name their parameters in the order in which the released ones are built
        vit, qformer = ViT(config), QFormer(config, config.qformer_layers, config.vit_dim, config.cross_every)
    shapes = {name: p.shape for name, p in qformer.named_parameters(prefix="qformer")}

    def skip_uniform(count):
        for start in range(0, count, len(scratch)):
            scratch[: count - start].uniform_(generator=generator)

    def normal(*shape):
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)

    # A ViT draws torch's default initialisers of every layer (weight and bias; q_bias and v_bias are zeros), and then a
    # truncated normal (one uniform number each) for positions, class token and all weights of its Linears again.
    drawn = [p for name, p in vit.named_parameters() if not re.search(r"norm|[qv]_bias", name)]
    for _ in range(2):
        skip_uniform(sum(p.numel() * (2 if p.ndim == 2 else 1) for p in drawn))
    dim, mlp = config.qformer_dim, config.qformer_mlp
    linears = sum(shape.numel() for name, shape in shapes.items() if "norm" not in name)
    linears += config.qformer_layers * (2 * dim * mlp + mlp + dim)  # each layer has a second MLP, for text
    for _ in range(2):
        # BertModel is built (torch's default initialisers), and initialised: Embeddings and Linears normal, biases zero
        made = {}
        normal(BERT_WORDS, dim), normal(BERT_POSITIONS, dim)
        skip_uniform(linears)
        normal(BERT_WORDS, dim), normal(BERT_POSITIONS, dim)
        for name, shape in shapes.items():
            if name.endswith("mlp.fc1.weight"):  # the MLP for text comes first
                normal(mlp, dim), normal(dim, mlp)
            tensor = normal(*shape) if len(shape) == 2 else torch.full(shape, float(name.endswith("norm.weight")))
            made[released_names(name, "_motion")[0]] = tensor
        # the head for words is built and initialised; what BertModel has initialised is skipped this time
        skip_uniform(dim * dim + dim + BERT_WORDS * dim)
        normal(dim, dim), normal(BERT_WORDS, dim)
        made["query_tokens_motion"] = normal(1, config.n_queries, dim)
    return made


def fresh_weights(wanted):
    """What training from BLIP-2 (and Video-LLaMA) begins with at random, spread as in the released code: {released name:
    tensor}. `wanted`: our parameters by name, of which only the shapes count."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, like in wanted.items():
        tower, _, part = name.partition(".")
        if tower in BRANCHES and not part.startswith(FROZEN):
            tensor = torch.full(like.shape, float(name.endswith("norm.weight")))  # biases and norms
            if like.ndim > 1:
                std = 1.0 if "frame_position" in name else 0.02 if ".video_" in name else (3 * like.shape[1]) ** -0.5
                tensor.normal_(0.0, std, generator=generator)
            made[released_names(part, "_motion" * (tower == "motion"))[0]] = tensor
    return made


def choose_motion(choice, hawk):
    """(source, one line that says it) of the motion branch's Q-Former. `hawk`: Source or None."""
    held = hawk is not None and any(name.startswith("Qformer_motion.bert.encoder.") for name in hawk.held)
    if choice == "auto":
        choice = "blip2" if hawk is None else "checkpoint" if held else "replay"
    if choice == "checkpoint" and not held:
        raise ValueError(f"{hawk.path if hawk else '--hawk'}: holds no Qformer_motion to take")
    why = "" if held or hawk is None else f" ({hawk.path} does not hold it)"
    lines = {"checkpoint": "from the checkpoint", "replay": f"rebuilt from seed 42{why}", "blip2": "a copy of BLIP-2's"}
    return {"checkpoint": "hawk", "replay": "made", "blip2": "qformer"}[choice], lines[choice]


def weights(args):
    """Reads the released files, writes one folder that Hawk.from_pretrained opens."""
    open_tensors.cache_clear()
    roles = [role for role in ("llama", "vit", "qformer", "hawk", "video_llama") if getattr(args, role)]
    sources, entries, origins = {role: Source(getattr(args, role)) for role in roles}, [], {}
    overrides = data.settings(args.set)
    motion, motion_line = choose_motion(args.motion_qformer, sources.get("hawk"))
    config = infer_config(sources, overrides)
    with torch.device("meta"):
        wanted = dict(Hawk(config).named_parameters())
    print("motion Q-Former:", motion_line, flush=True)
    made = {"ln_vision_motion.weight": torch.ones(config.vit_dim), "ln_vision_motion.bias": torch.zeros(config.vit_dim)}
    made |= replay_motion_qformer(config) if motion == "made" else {}
    made |= {} if args.hawk else fresh_weights(wanted)
    sources["made"] = Source("made from a fixed seed", made)
    for name, like in wanted.items():
        read, origins[name] = locate(name, sources, motion)
        shape, dtype = read().shape, read().dtype
        if shape != like.shape or not dtype.is_floating_point:
            found = f"{origins[name]} is {tuple(shape)} {dtype}"
            raise ValueError(f"{found}, but {name} needs {tuple(like.shape)} of floating point")
        if name.startswith(("vit.", "llama.")):  # the big frozen towers; the rest stays as it was trained
            llama = args.dtype == "released" and name.startswith("llama.")  # which the released code rounds
            dtype = torch.bfloat16 if llama else DTYPES.get(args.dtype, dtype)
        entries.append((name, like.numel(), dtype, read))
    known = [*LEFT_OUT, ("vit", rf"blocks\.{config.vit_depth}\..+", "EVA's last block, which BLIP-2 leaves out")]
    if motion != "hawk":
        known.append(("hawk", r"(Qformer|ln_vision)_motion\..+", "replaced, as --motion-qformer asks"))
    left_out = {}
    for role in roles:
        left_out[role] = sources[role].unused([(names, why) for kinds, names, why in known if role in kinds.split()])
    record = {"motion_qformer": motion_line, "set": overrides, "left_out": left_out, "tensors": origins}
    files = sorted({sources[role].held[name] for role in roles for name in sources[role].used})
    write_folder(args.out, config, args.llama / "tokenizer.model", entries, record, files)


def write_folder(out, config, tokenizer, entries, record=None, files=()):
    """Writes a folder of ours, whole or not at all. `entries`: (name, size, dtype, function that reads the tensor). One
    shard is in memory at a time; before each, the mapped files are closed: what was read of them counts as our memory.
    `record` becomes provenance.json, with the SHA-256 of `files`."""
    shards, total, weight_map = defaultdict(dict), 0, {}
    for name, size, dtype, read in entries:
        shards[total // SHARD_BYTES][name] = dtype, read
        total += size * dtype.itemsize
    with replaced_folder(out) as folder, tqdm(total=len(entries), unit="tensor", desc="writing") as bar:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        write(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        for i, shard in enumerate(shards.values(), 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            open_tensors.cache_clear()
            tensors = {name: read().to(dtype, copy=True).contiguous() for name, (dtype, read) in shard.items()}
            for name in (n for n, tensor in tensors.items() if not math.isfinite(sum(torch.aminmax(tensor)))):
                origin = f"{record['tensors'][name]}, our {name}" if record else name
                raise ValueError(f"{origin}: holds NaN, or a number too large for {tensors[name].dtype}")
            save_tensors(tensors, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            bar.update(len(shard))
        open_tensors.cache_clear()
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        if record:
            record["sha256"] = {}
            for file in tqdm(files, desc="SHA-256", unit="file"):
                with file.open("rb") as f:
                    record["sha256"][str(file)] = hashlib.file_digest(f, "sha256").hexdigest()
            write(folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}: {total / 1e9:.2f} GB")


# ---- 4. merge: trained weights, what they are based on and their LoRA -> one folder that stands alone ----------------
def merge(args):
    """Reads the weights with all that they are based on (mapped, as stored), and adds each LoRA correction to its
    weight. Unless --dtype says otherwise the sum is written in float32, so that merging rounds nothing away."""
    model, entries = Hawk.from_pretrained(args.weights, dtype=None), []
    corrected = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, LoRALinear)}

    def merged(name, weight):
        if m := corrected.get(name):
            weight = weight.float() + m.scale * (m.lora_B.float() @ m.lora_A.float())
        return weight.detach()

    for name, weight in model.named_parameters():
        dtype = DTYPES.get(args.dtype, torch.float32 if name in corrected else weight.dtype)
        if "lora_" not in name:
            entries.append((name, weight.numel(), dtype, partial(merged, name, weight)))
    tokenizers = [folder / "tokenizer.model" for folder in reversed(read_chain(args.weights)[1])]
    tokenizer = next(filter(Path.exists, tokenizers), tokenizers[0])
    config = HawkConfig.from_dict(asdict(model.config) | {"lora_rank": 0} | data.settings(args.set), "--set")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Hawk(config).named_parameters()}
    if shapes != {name: p.shape for name, p in model.named_parameters() if "lora_" not in name}:
        raise ValueError(f"--set {' '.join(args.set)}: is not how these weights are shaped")
    write_folder(args.out, config, tokenizer, entries)


# ---- 5. download: the released files, from where their authors publish them ------------------------------------------
SHARDS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
HUB = {  # repository on the Hugging Face hub, and which of its files
    "llama": ("meta-llama/Llama-2-7b-chat-hf", r"config\.json|tokenizer\.model|" + SHARDS),
    "hawk": ("Jiaqi-hkust/hawk", r"finetune\.pth"),
    "hawk-pretrained": ("Jiaqi-hkust/hawk", r"pretrained\.pth"),
    "video-llama": ("DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned", r"VL_LLaMA_2_7B_Finetuned\.pth"),
    "blip2": ("Salesforce/blip2-flan-t5-xxl", SHARDS),  # instead of URLS
}
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
URLS = {"vit": f"{LAVIS}/eva_vit_g.pth", "qformer": f"{LAVIS}/blip2_pretrained_flant5xxl.pth"}
HINTS = {"GatedRepoError": "its licence must be accepted at https://huggingface.co/REPO, then run `hf auth login` here"}
HINTS["RepositoryNotFoundError"] = "it is not on the hub (any more), or is private: try `hf auth login`"


def download(args):
    """Lists the files with their sizes, then fetches those that are not there yet; a second call goes on where a first
    one was stopped."""
    files = [entry for name in args.what for entry in (hub_files if name in HUB else url_files)(name, args.out)]
    missing = [entry for entry in files if not entry[0].is_file() or entry[0].stat().st_size != entry[1]]
    for entry in files:
        print(f"{entry[1] / 1e9:8.3f} GB  {entry[0]}" + ("" if entry in missing else "  (there already)"))
    total = sum(size for _, size, _ in missing)
    print(f"{total / 1e9:8.3f} GB  to download", flush=True)
    if args.dry_run:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [file.with_name(file.name + ".part") for file, *_ in missing]
    total -= sum(part.stat().st_size for part in parts if part.is_file())  # what is there already needs no room
    if total > (free := shutil.disk_usage(args.out).free):
        raise ValueError(f"{args.out}: only {free / 1e9:.1f} GB are free")
    for _, _, fetch in missing:
        fetch()


def ask(where, function, *arguments, **options):
    """Calls huggingface-hub; its errors become one line."""
    try:
        return function(*arguments, **options)
    except Exception as e:  # which HTTP client the library uses, and so its errors, change between versions
        hint = HINTS.get(type(e).__name__, f"cannot be reached, or stopped: try again ({type(e).__name__})")
        raise ValueError(f"{where}: {hint.replace('REPO', where)}") from e


def hub_files(name, out):
    """[(file, bytes, function that fetches it)] of one repository on the hub, as it is today."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, pattern = HUB[name]
    folder, listing = out / repo.split("/")[1], "model.safetensors.index.json"
    sizes = {s.rfilename: s.size for s in ask(repo, HfApi().model_info, repo, files_metadata=True).siblings}
    if not (wanted := [file for file in sizes if re.fullmatch(pattern, file)]):
        raise ValueError(f"{repo}: has no file like {pattern}")
    if name == "blip2" and listing in wanted:  # leave out the shards that hold nothing but the language model
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(ask(repo, hf_hub_download, repo, listing, local_dir=scratch))
            shards = read_json(file, "weight_map")["weight_map"].items()
        wanted = [listing, *sorted({shard for held, shard in shards if not held.startswith("language_")})]
    return [(folder / f, sizes[f], partial(ask, repo, hf_hub_download, repo, f, local_dir=folder)) for f in wanted]


def url_files(name, out):
    """The same for a file on a plain web server: downloaded into FILE.part, from where an earlier attempt stopped."""
    from huggingface_hub.file_download import get_hf_file_metadata, http_get

    url, file = URLS[name], out / URLS[name].rpartition("/")[2]
    size, part = ask(url, get_hf_file_metadata, url, token=False).size, file.with_name(file.name + ".part")

    def fetch():
        with part.open("ab") as f:
            ask(url, http_get, url, f, resume_size=f.tell(), expected_size=size)
        part.rename(file)

    return [(file, size, fetch)]


# ---- 6. motion captions: what stage 1's motion-language loss wants the motion tokens alone to say --------------------
# The verbs of a description with their subjects and objects: "car swerves lane, collides SUV". They come from spaCy, as
# in the released code, where it and its small English model are installed, else from the rules of built_in_motion().

GRAMMAR = {  # kinds of words that are neither verb nor head of a noun phrase; "noun": nouns that end like a verb
    "determiner": "a an the this these those his her its their each every both some any no another several many few "
    "two three four five six all other",
    "pronoun": "he she it they him them we us someone everyone nobody nothing something himself herself themselves",
    "preposition": "in on at into onto to from with without by of off out over under through across along around near "
    "behind beside between against toward towards past down up for during inside outside above below among about like",
    "link": "and or but then , who which that",
    "break": "while as when because after before so until since although though if whereas where . ; : ! ?",
    "auxiliary": "is are was were be been being am has have had do does did will would can could may might must should",
    "adverb": "not just still almost also very too there here apart away aside ahead back left forward backward "
    "backwards sideways together again",
    "noun": "building morning evening railing ceiling clothing anything everything thing ring string parking oncoming "
    "bed red",
}  # fmt: skip
KIND_OF = {word: kind for kind, words in GRAMMAR.items() for word in words.split()}
PAST = set("""began begun bent bit broke broken brought burst came caught cut drew drawn drove driven ate fell fallen
    fled flew fought gave got went gone grew held hid hit hurt kept laid lay led left lost made met put ran rang rode
    ridden rose sat saw seen shook shot slept slid spun stole stolen stood struck stuck swung took taken threw thrown
    tore torn wore wove""".split())  # fmt: skip
BASE = set("""aim appear approach argue arrive attack attempt avoid beat begin bend block brake break bring bump burn
    carry catch cause change chase climb close collapse collide come continue crash crawl cross cut cycle damage dance
    dash disappear drag draw drift drive drop eat emerge enter erupt escape exit explode fail fall fight flee flip fly
    follow force gather get give go grab happen help hide hit hold hurt jump keep kick knock lean leave lie lift
    linger loiter look lose make merge move narrow occur open overtake overturn park pass pick pin play point pull
    punch push put raise react reach remain reverse ride rise roll run rush scatter see seem shatter shoot shout shove
    show sit skate skid slam slide slip slow speed spill spin spray sprint stagger stand start stay steal step stop
    strike struggle stumble surround swerve swing take talk throw tip topple touch travel trip try turn use veer wait
    walk watch wave yield""".split())  # fmt: skip


def is_verb(word, before, came, follows, noun, finite, many):
    """Whether a word is a verb where it stands. noun: its subject, perhaps; came, follows: kinds of its neighbours."""
    if before == "to":
        return word in BASE or follows in ("determiner", "pronoun")
    if word in PAST or word.endswith("ed"):
        return came != "preposition" and bool(noun or came in ("auxiliary", "link", "verb"))
    if word.endswith("s"):
        return finite and bool({word[:-1], word[:-2], word[:-3] + "y"} & BASE or follows in ("determiner", "pronoun"))
    return word.endswith("ing") or word in BASE and (came == "auxiliary" or finite and many)


def built_in_motion(text):
    """A clause is a subject, a verb, objects. A noun phrase ends at a verb or a word of GRAMMAR, and its last word
    counts, as `role` says: "aside" is what belongs to another noun or stands before the subject, "complement" follows "is"."""
    words = [*re.findall(r"\w[\w'’-]*|[.,;:!?]", text), "."]
    groups, subject, head, role, came, before = [], "", "", "subject", "break", "."
    opened = joined = fresh = False  # the clause has its verb; it began with "and"; a determiner stands before the word
    for word, after in zip(words, [*words[1:], "."], strict=True):
        low, noun = word.lower(), (head or subject).lower()
        kind, follows = (KIND_OF.get(w, "adverb" if w.endswith("ly") else None) for w in (low, after.lower()))
        finite = role != "object" and follows != "auxiliary" and bool(noun or came == "link")
        many = joined or noun.endswith(("s", "people", "men", "police", "children", "they"))
        if not fresh and (not kind or (low, follows) == ("left", "determiner")):
            kind = "verb" if is_verb(low, before, came, follows, noun, finite, many) else None
        if kind in (None, "noun") or kind == "adverb" and fresh:  # inside a noun phrase
            head, fresh = head if came == "pronoun" else word, fresh and low.endswith(("ed", "ing"))
        elif kind != "adverb":
            if head and role == "object":
                groups[-1].append(head)
            elif head and role == "aside":
                role = role if subject or opened else "subject"
            elif head:
                subject = (subject or head) if role == "subject" else head if kind == "verb" else ""
            head, fresh = word if kind == "pronoun" else "", kind == "determiner"
            if kind == "verb":
                groups.append([subject, word] if subject else [word])
                subject, role, opened, joined = "", "object", True, False
            elif kind == "preposition":
                role = "object" if opened and (low != "of" or came == kind) else "aside"
            elif kind == "auxiliary":
                role = "complement"
            elif kind == "break" or kind == "link" and (opened or low == ","):
                subject, role, opened = subject if kind == "link" and not opened else "", "subject", False
            joined = low == "and" or joined and kind not in ("link", "break")
        before, came = low, kind
    return ", ".join(map(" ".join, groups))


def spacy_motion(parse):
    """The same from spaCy's parse, as in the released code; an object may also stand behind a preposition."""

    def objects(word):
        for child in word.children:
            if child.dep_ in ("dobj", "obj", "pobj"):
                yield child.text
            elif child.dep_ in ("prep", "agent", "dative"):
                yield from objects(child)

    groups = []
    for verb in parse:
        if verb.pos_ == "VERB" and verb.dep_ not in ("amod", "compound"):
            subjects = [child.text for child in verb.children if child.dep_ in ("nsubj", "nsubjpass")]
            groups.append(" ".join([*subjects, verb.text, *objects(verb)]))
    return ", ".join(groups)


@cache
def spacy_model():
    """spaCy's small English model, or None where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None


def motion_caption(text):
    return spacy_motion(spacy_model()(text)) if spacy_model() else built_in_motion(text)


# ---- 7. hawk and webvid: published annotations, and videos as they lie on this disk -> index files of ours -----------
FOLDERS = {  # in the annotations, which hold paths on their authors' machine: in the published videos
    "UCF-Crime": "UCF_Crime", "ShanghaiTechDataset": "ShanghaiTech", "avenue/avenue": "CUHK_Avenue",
    "ped1/ped1": "Ped1", "ped2/ped2": "Ped2", "DoTA": "DoTA", "UBnormal": "UBnormal",
}  # fmt: skip
FOLDERS |= {new: new for new in FOLDERS.values()}
PUBLISHED = re.compile(f"(?:^|/)({'|'.join(FOLDERS)})/(.+)", re.DOTALL)
REFUSAL = re.compile(r"\bas (an ai\b(?!-)|a language model)|^\W*((i['’]m|i am) (sorry|unable)|sorry,|i apolog)", re.I)


def video_path(videos, name):
    """The path of a video in a folder; ValueError for a name that leads out, by "..", the disk's root, or a link."""
    path = videos.resolve() / name
    if ".." in Path(name).parts or not path.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"{str(name)!r} leads out of the folder of videos")
    return path


def index_row(path, source, description, qa=()):
    qa = [{"q": turn["q"], "a": turn["a"]} for turn in qa]
    motion = motion_caption(next(filter(None, [description, *(turn["a"] for turn in qa)])))
    row = {"video": str(path), "source": source, "description": description, "qa": qa, "motion": motion}
    row["motion_by"] = "spacy" if spacy_model() else "rules"
    return row | {"flags": ["refusal"] * bool(REFUSAL.search(description))}


def write_splits(out, splits):
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        if rows:
            write(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:  # what reads the folder understands an index that is not there, and refuses an empty one
            (out / f"{split}.jsonl").unlink(missing_ok=True)
            print(f"note: no row for {split}.jsonl, so there is none", file=sys.stderr)


def hawk(args):
    """Reads all_videos_train.json and all_videos_test.json as Hawk publishes them, finds each video, whose folder may
    have been renamed, and writes OUT/train.jsonl and OUT/test.jsonl with the rows whose video is there, and
    OUT/report.json with those that are missing or broken, and why. Rows in which the language model that wrote them
    refused ("As an AI …") get the flag "refusal". Prints a table by source. The originals stay as they are."""
    table, report, splits = defaultdict(Counter), {"missing": [], "broken": []}, {}
    for split in SPLITS[:2]:
        name, folders = f"all_videos_{split}.json", ("", "Annotation/All_Mix", "All_Mix")
        if file := next(filter(Path.is_file, (args.annotations / folder / name for folder in folders)), None):
            splits[split] = list(hawk_rows(file, args.videos, table, report))
        else:
            print(f"note: {args.annotations}: no {name}, nor in Annotation/All_Mix or All_Mix", file=sys.stderr)
    total = sum(table.values(), Counter())
    if not total["found"]:
        first = next(iter(report["missing"] + report["broken"]), "no annotations")
        raise ValueError(f"{args.videos}: no video of {total['rows']} annotated ones; first: {json.dumps(first)}")
    write_splits(args.out, splits)
    write(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    for row in report["broken"][:10]:
        print(f"{row['file']}, row {row['number']}: {row['reason']}", file=sys.stderr)
    print(f"missing and broken rows, and why: {args.out / 'report.json'}", file=sys.stderr)
    columns = ["rows", "found", "missing", "refusals", "broken"]
    print(f"{'source':14}" + "".join(f"{column:>10}" for column in columns))
    for source, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{source:14}" + "".join(f"{counts[column]:10}" for column in columns))


def hawk_rows(file, videos, table, report):
    """Yields the index rows of one annotation file whose videos are there; counts and reports the others."""
    if not isinstance(entries := read_json(file), list):
        raise ValueError(f"{file}: must be a list of objects with video, QA and description")
    for number, entry in enumerate(tqdm(entries, desc=file.stem, unit="row"), 1):
        name = entry.get("video") if isinstance(entry, dict) else None
        found = PUBLISHED.search(name) if isinstance(name, str) else None
        source = FOLDERS[found[1]] if found else "other"
        try:
            row = data.check_row({"video": entry["video"], "description": entry["description"], "qa": entry["QA"]})
            if None in row.values():
                raise KeyError("null")
            path = video_path(videos, Path(source, found[2]) if found else name)
            state = "found" if path.is_file() and path.stat().st_size > 0 else "missing"
            facts = {"video": str(path)}
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as e:  # RuntimeError: links in a circle
            lacking = isinstance(e, KeyError | TypeError)
            state, facts = "broken", {"reason": f"needs video, QA and description ({e})" if lacking else str(e)}
        table[source].update(["rows", state])
        if state == "found":
            row = index_row(path, source, row["description"], row["qa"])
            table[source]["refusals"] += len(row["flags"])
            yield row
        else:
            report[state].append({"file": str(file), "number": number} | facts)


def webvid(args):
    """Reads a WebVid CSV (columns videoid, name, page_dir, others are allowed), and writes OUT/train.jsonl with the
    rows whose video is there and not empty, at VIDEOS/<page_dir>/<videoid>.mp4. Some go to OUT/test.jsonl instead:
    always the same ones, chosen by the SHA-256 of the file's name."""
    rows, counts = {}, Counter()
    with args.csv.open("rb") as lines:
        reader = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
        try:
            if lacking := {"videoid", "name", "page_dir"} - set(reader.fieldnames or ()):
                raise ValueError(f"has no column {', '.join(sorted(lacking))}")
            for entry in reader:  # all columns are text: 000001_000050 is a folder
                if None in entry or None in entry.values() or not entry["videoid"]:
                    raise ValueError("has more or fewer fields than the first line, or no videoid")
                path = video_path(args.videos, Path(entry["page_dir"], entry["videoid"] + ".mp4"))
                caption = entry["name"].strip()
                state = "absent" if not path.is_file() else "empty" if not path.stat().st_size else "found"
                state = "without a caption" if not caption else "repeated" if path in rows else state
                counts[state] += 1
                if state == "found":
                    rows[path] = index_row(path, "webvid", caption)
        except (csv.Error, ValueError, OSError, RuntimeError) as e:
            number = reader.reader.line_num + isinstance(e, UnicodeDecodeError)  # which the reader has not seen
            raise ValueError(f"{args.csv}, line {number}: {e}") from None
    print(f"{args.csv}: {counts.total()} rows, " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    n_test = min(500, len(rows) // 10) if args.n_test is None else args.n_test
    if not 0 <= n_test < len(rows):
        raise ValueError(f"{args.videos}: {len(rows)} usable videos, {n_test} of them to hold out: none to train on")
    order = sorted(rows, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    write_splits(args.out, {"train": [rows[p] for p in order[n_test:]], "test": [rows[p] for p in order[:n_test]]})


# ---- Command line ----------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    def add_job(run, what, **out):
        job = jobs.add_parser(run.__name__, help=what, description=run.__doc__)
        job.set_defaults(run=run)
        job.add_argument("--out", type=Path, help="folder to write", **out or {"required": True})
        return job

    add = add_job(toy, "make the toy world: clips, index files, tokenizer").add_argument
    add("--n-train", type=int, default=0, help="clips in train.jsonl")
    add("--n-test", type=int, default=0, help="clips in test.jsonl")
    add("--n-long", type=int, default=0, help="40-second videos with one event each, in long.jsonl")
    add("--seed", type=int, default=0, help="the splits never share random numbers, whatever the seed")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result does not depend on it")

    add = add_job(features, "compute the frozen part once for all clips, for training without videos").add_argument
    add("--weights", type=Path, required=True, help="folder of weights whose ViT and Q-Formers look at the clips")
    add("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    add("--crops", type=int, default=1, help="variants of each training clip; all but the first are cropped")
    add("--dtype", choices=["float16", "float32"], default="float16", help="float16: half the size")
    add("--bfloat16", action="store_true", help="compute in bfloat16: about twice as fast")
    add("--batch-size", type=int, default=8)
    add("--workers", type=int, default=2)
    add("--device", default="cpu")
    add("--seed", type=int, default=42, help="of the crops")

    job = add_job(weights, "turn the released files into one folder of ours")
    add, add_trained = job.add_argument, job.add_mutually_exclusive_group().add_argument
    add("--llama", type=Path, required=True, help="Hugging Face folder of llama-2-7b-chat-hf")
    add("--vit", type=Path, required=True, help="eva_vit_g.pth, or a Hugging Face blip2 folder")
    add("--qformer", type=Path, required=True, help="blip2_pretrained_flant5xxl.pth, or that same folder")
    add_trained("--hawk", type=Path, help="finetune.pth or pretrained.pth; without it: a start for training")
    add_trained("--video-llama", type=Path, help="VL_LLaMA_2_7B_Finetuned.pth, a better start for training")
    add("--motion-qformer", choices=["auto", "checkpoint", "replay", "blip2"], default="auto",
        help="the motion branch's Q-Former: as the checkpoint has it, rebuilt from the released training's seed, or "
        "BLIP-2's; auto: checkpoint if it is there, else replay with --hawk, else blip2")  # fmt: skip
    add("--dtype", choices=["released", "keep", *DTYPES], default="released",
        help="of ViT and LLaMA; released: LLaMA in bfloat16, as the released code loads it; keep: as stored")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the config")

    add = add_job(merge, "make one folder of trained weights, what they are based on and their LoRA").add_argument
    add("--weights", type=Path, required=True, help="folder that train.py wrote")
    add("--dtype", choices=["keep", *DTYPES], default="keep", help="keep: as stored, merged in float32")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the config")

    add = add_job(hawk, "index files from Hawk's annotations and videos").add_argument
    add("--annotations", type=Path, required=True,
        help="folder with all_videos_{train,test}.json, in it or in its Annotation/All_Mix or All_Mix")  # fmt: skip
    add("--videos", type=Path, required=True, help=f"folder that holds {', '.join(sorted(set(FOLDERS.values())))}")

    add = add_job(webvid, "the same from WebVid's CSV").add_argument
    add("--csv", type=Path, required=True, help="such as results_2M_train.csv")
    add("--videos", type=Path, required=True, help="folder that holds <page_dir>/<videoid>.mp4")
    add("--n-test", type=int, help="videos to hold out; default: every tenth, at most 500")

    add = add_job(download, "fetch the released files, about 16 GB", default=Path("downloads")).add_argument
    add("--what", nargs="+", choices=[*HUB, *URLS], default=["llama", "vit", "qformer", "hawk"],
        help="blip2 holds vit and qformer in one; video-llama and hawk-pretrained are other starts for training")  # fmt: skip
    add("--dry-run", action="store_true", help="only say what there is, and how large")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        if args.run in (weights, merge) and args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out}: is not empty; choose another name, or delete it first")
        args.run(args)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit("error: " + str(error).strip().split("\n")[-1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is removed
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
