"""Jobs that run once, one sub-command each, before anything is trained or asked.

    python prepare.py toy --out data/toy --n-train 5000 --n-test 200 --seed 0     # a small drawn world: mp4 clips and annotations
    python prepare.py download --dry-run                       # the released files: which, from where, how large
    python prepare.py weights --llama DIR --vit FILE --qformer FILE --hawk FILE --out weights/hawk-7b    # one folder of ours
    python prepare.py merge --weights runs/lora/last --out weights/merged        # a LoRA added to what it was trained on

Each section below holds one job: its helpers and a function with the job's name, which main() calls with the parsed arguments.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    DESCRIBE_QUESTIONS,
    ClipDataset,
    VideoError,
    clip_generator,
    frozen_fingerprint,
    random_crop,
    read_index,
    videos_digest,
)  # fmt: skip
from hawk import BRANCHES, Hawk, HawkConfig, LoRALinear, read_chain, replaced_folder, save_tensors


def write(path, content):
    """Writes text or bytes under a temporary name and renames it, so that no half-written file is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------------------
# 1. toy: a small drawn world (clips, annotations in the Hawk format, a tokenizer)
#
# A fixed camera looks at a road. Two pavements and two lanes are four horizontal bands; in the far lane traffic goes left, in
# the near lane right. plan() decides what happens, describe() puts it into words, render() draws it. All that is random about
# a clip is a function of (seed, split, index): it depends neither on how many clips are made nor on the number of processes.

FPS, FRAMES, SIZE, LONG_FRAMES = 8, 32, 224, 320  # a clip lasts 4 s; time below is in clips, 0 to 1
BANDS = ["on the far pavement", "in the far lane", "in the near lane", "on the near pavement"]
BAND_Y, BAND_SCALE, LANES = [0.34, 0.48, 0.64, 0.82], [0.88, 0.9, 1.05, 1.12], {1: -1, 2: 1}  # lane -> direction
SIDES = {"on the left": (0.16, 0.34), "in the middle": (0.43, 0.57), "on the right": (0.66, 0.84)}
MOMENTS = {"near the start of the clip": 0.25, "halfway through the clip": 0.5, "near the end of the clip": 0.75}
VEHICLES, WALKERS = ["car", "bus", "truck", "motorbike"], ["person", "cyclist", "dog"]
# pixels at scale 1
WIDTH = {"car": 42, "bus": 50, "truck": 46, "motorbike": 38, "person": 14, "cyclist": 30, "dog": 34}
COLOURS = {"red": (205, 35, 35), "blue": (35, 85, 215), "green": (35, 150, 60), "yellow": (240, 205, 45)}
COLOURS |= {"white": (243, 243, 243), "purple": (165, 50, 190)}


@dataclass
class Kind:
    phrase: str  # stands in every description of this kind and in no other's
    actors: list  # who can do it
    point: bool  # it happens at one moment, which the description names
    sided: bool  # the description names left, middle or right
    motion_only: bool  # each single frame of it could come from a normal clip
    reason: str
    consequences: list


# fmt: off
V, W, no, yes = VEHICLES, WALKERS, False, True
KINDS = {  #                   phrase                     actors point sided motion_only reason, consequences
    "normal": Kind(            "nothing unusual happens", V + W, no, no, no, "all road users behave as they should",
        ["All traffic keeps flowing.", "Everyone gets along safely.", "The road stays calm."]),
    "wrong_way": Kind(         "drives the wrong way", V, no, no, yes, "traffic in this lane comes the other way",
        ["Oncoming traffic is in danger.", "A head-on accident could follow.", "Oncoming drivers have to get out of the way."]),
    "speeding": Kind(          "moves far too fast", V + W, no, no, yes, "nobody can stop in time at this speed",
        ["Nobody has time to react.", "Others could be hit.", "Others have to get out of the way."]),
    "sudden_stop": Kind(       "stops suddenly", V + W, yes, yes, yes, "those behind do not expect it",
        ["Those behind have to brake hard.", "The way is blocked for others.", "From then on the way is blocked."]),
    "turn_back": Kind(         "turns back", V + W, yes, yes, yes, "those behind are in the way",
        ["Those behind have to make room.", "Those behind are surprised.", "Others have to watch out."]),
    "loitering": Kind(         "loiters", W, no, yes, yes, "nobody knows the reason for it",
        ["Someone should keep an eye on this.", "It looks suspicious.", "There seems to be no goal."]),
    "swerving": Kind(          "swerves from side to side", V, no, no, yes, "the driver has lost control",
        ["The driver seems to have lost control.", "Others have to keep their distance.", "It could hit someone at any time."]),
    "falling": Kind(           "falls to the ground", W, yes, yes, no, "someone may be hurt",
        ["Help is needed.", "Someone may be hurt.", "An ambulance may be needed."]),
    "collision": Kind(         "crashes into", V, yes, yes, no, "people may be hurt",
        ["Both are damaged and block the lane.", "People may be hurt.", "Both stop and the lane is blocked."]),
    "fire": Kind(              "catches fire", V, yes, yes, no, "flames and smoke can hurt people",
        ["Flames and smoke rise.", "The fire brigade is needed.", "It stops and burns, and smoke rises."]),
    "left_bag": Kind(          "leaves a bag behind", W, yes, yes, no, "nobody knows what is in the bag",
        ["The bag stays there alone.", "Someone should check the bag.", "The owner goes on without it."]),
    "crossing": Kind(          "cuts across the road", W, no, yes, no, "traffic may not stop in time",
        ["Traffic has to brake.", "An accident could follow.", "Drivers have to watch out."]),
}
# fmt: on


@dataclass
class Track:
    """One thing over the frames: centre x, y in fractions of the picture (nan: not there), pose in degrees."""

    object: str
    colour: str | None
    scale: float
    x: np.ndarray
    y: np.ndarray
    pose: np.ndarray

    @property
    def half_width(self):
        return WIDTH[self.object] * self.scale / 2 / SIZE

    def clear_of(self, other):
        near = np.abs(self.x - other.x) < self.half_width + other.half_width + 0.01
        return not (near & (np.abs(self.y - other.y) < 0.07)).any()


def new_track(rng, band, names, x):
    """A road user of a random name and colour that follows x in a band."""
    y = BAND_Y[band] + (rng.uniform(-0.045, 0.045) if band in LANES else rng.uniform(-0.02, 0.02))
    return Track(str(rng.choice(names)), str(rng.choice(list(COLOURS))), BAND_SCALE[band], x, y + 0 * x, 0 * x)


def draw_speed(rng, kind, vehicle):
    """Picture widths per clip."""
    if kind == "speeding":
        return rng.uniform(0.95, 1.2) if vehicle else rng.uniform(0.75, 0.95)
    if kind in ("sudden_stop", "turn_back", "falling") and not vehicle:
        return rng.uniform(0.22, 0.3)  # the quicker half of normal, so that the change can be seen
    return rng.uniform(0.35, 0.5) if vehicle else rng.uniform(0.15, 0.3)


def event_path(rng, kind, speed, s):
    """Distance along the heading, s clips after the event began, relative to where the description says that it happens."""
    if kind in ("sudden_stop", "fire", "falling", "collision"):
        return 0 * s
    if kind == "turn_back":
        return -speed * s
    if kind == "loitering":  # a triangle wave: to and fro at constant speed
        return rng.uniform(0.05, 0.09) * (np.abs((rng.uniform(2, 3) * s + rng.uniform()) % 1 * 4 - 2) - 1)
    if kind == "crossing":
        return 0.02 * s
    return speed * (s if KINDS[kind].point else s - 0.5)


def plan(rng, kind, frames=FRAMES, start=0):
    """Decides a clip: tracks (the actor first), effects, camera, and all that a description may name. A longer video is the same
    with ordinary traffic before frame `start` and from one clip's time after the event began."""
    spec, t = KINDS[kind], (np.arange(frames) - start) / FRAMES
    bands = [b for b in range(4) if (V if b in LANES else W)[0] in spec.actors]
    # a normal clip tells of the nearest road user; more often a near one, because bystanders must then be farther away
    band = int(rng.choice(bands, p=[0.15, 0.2, 0.3, 0.35] if kind == "normal" else None))
    side = str(rng.choice(list(SIDES))) if spec.sided else None
    when = str(rng.choice(list(MOMENTS))) if spec.point else "throughout the clip"
    forward = LANES.get(band) or int(rng.choice([-1, 1]))
    heading = -forward if kind == "wrong_way" else forward
    longer = frames > FRAMES
    leaves = kind in ("speeding", "collision") or (longer and kind == "turn_back")  # may be out of view for a while
    room = -0.3 if leaves else 0.04
    while True:
        begin = MOMENTS[when] + rng.uniform(-0.04, 0.04) if spec.point else 0
        s = np.clip(t - begin, 0, 1)
        where = rng.uniform(*(SIDES[side] if side else (0.44, 0.56) if kind == "speeding" else (0.04, 0.96)))
        speed = draw_speed(rng, kind, band in LANES)
        x = where + heading * event_path(rng, kind, speed, s) + forward * speed * (t - begin - s)
        clip_x = x[(t >= (begin if longer else 0)) & (t <= begin + 1)]
        if room <= clip_x.min() and clip_x.max() <= 1 - room:
            break
    actor = new_track(rng, band, V if band in LANES else W, x)
    during = (t >= begin) & (t < begin + 1)
    if kind == "swerving":
        actor.y = BAND_Y[band] + rng.uniform(0.035, 0.045) * np.sin(2 * np.pi * (rng.uniform(2, 4) * s + rng.uniform()))
    if kind == "crossing":
        actor.y, actor.scale = actor.y + (BAND_Y[3 - band] - BAND_Y[band]) * np.clip(s / 0.8 - 0.125, 0, 1), 1.0
    if kind == "falling":  # lies after four frames: a dog on its back
        fallen = np.where(during, np.clip(s * FRAMES / 4, 0, 1), 0)
        actor.y, actor.pose = actor.y + 0.03 * fallen, fallen * heading * (180 if actor.object == "dog" else 90)
    place = ("between the two pavements" if kind == "crossing" else BANDS[band]) + (f" {side}" if side else "")
    clip = {"kind": kind, "actor": actor, "tracks": [actor], "effects": [], "place": place, "when": when}
    clip |= {"scene": str(rng.choice(list(LOOKS))), "camera": (rng.uniform(0.97, 1.04), rng.uniform(-3, 3) / SIZE)}
    clip["begin"] = begin
    if kind == "collision":
        add_victim(rng, clip, where, forward, speed, t)
    add_effect(clip, where, during)
    if longer:
        add_traffic(rng, clip, t)
    else:
        add_bystanders(rng, clip, band, t)
    zoom, shift = clip["camera"]
    for track in clip["tracks"] + clip["effects"]:  # x is planned in the picture, y in the world
        track.y, track.scale = 0.5 + zoom * (track.y - 0.5) + shift, zoom * track.scale
    return clip


def add_victim(rng, clip, where, forward, speed, t):
    """The vehicle that is hit, standing or slow; the two touch at `where` when the event begins."""
    actor, after = clip["actor"], t - clip["begin"]
    other = new_track(rng, 1, [name for name in V if name != actor.object], actor.x)
    other.scale, other.y = actor.scale, actor.y
    way = rng.choice([0, rng.uniform(0.08, 0.16)]) * np.clip(after, -1, 0)
    way += speed * (np.minimum(after + 1, 0) + np.maximum(after - 1, 0))  # long before and after it moves as others do
    other.x = where + forward * (other.half_width * 0.9 + way)
    actor.x = actor.x - forward * actor.half_width * 0.9
    clip["tracks"].append(other)


def add_effect(clip, where, during):
    """What an event leaves to be seen: a burst, flames, a bag."""
    name = {"collision": "crash", "fire": "fire", "left_bag": "bag"}.get(clip["kind"])
    if name:
        actor = clip["actor"]
        y = actor.y + {"bag": 0.045, "fire": -0.06, "crash": 0}[name] * actor.scale
        x, y = np.where(during, where, np.nan), np.where(during, y, np.nan)
        clip["effects"].append(Track(name, None, actor.scale, x, y, np.arange(len(x)) % 4))


def add_bystanders(rng, clip, band, t):
    """Up to three road users that behave; each type and each band at most once."""
    free = [b for b in range(4) if b != band and (clip["kind"] != "normal" or b < band)]
    count = int(rng.choice(4, p=[0.2, 0.35, 0.3, 0.15])) - (clip["kind"] == "collision")
    for b in sorted(rng.permutation(free)[: max(count, 0)].tolist()):
        names = [name for name in (V if b in LANES else W) if name not in [track.object for track in clip["tracks"]]]
        direction = LANES.get(b) or int(rng.choice([-1, 1]))
        speed = 0.0 if b in LANES and rng.uniform() < 0.15 else draw_speed(rng, "normal", b in LANES)
        for _ in range(30):
            x = rng.uniform(0.06 + speed / 2, 0.94 - speed / 2) + direction * speed * (t - 0.5)
            track = new_track(rng, b, names, x)
            if all(track.clear_of(other) for other in clip["tracks"]):
                clip["tracks"].append(track)
                break


def add_traffic(rng, clip, t):
    """For long videos: road users that pass through, at one speed per lane."""
    for b in range(4):
        speed = draw_speed(rng, "normal", b in LANES)
        at = t[0] - rng.uniform(0, 1.5) / speed
        while at < t[-1]:
            direction = LANES.get(b) or int(rng.choice([-1, 1]))
            track = new_track(rng, b, V if b in LANES else W, 0.5 + direction * (speed * (t - at) - 0.65))
            if all(track.clear_of(other) for other in clip["tracks"]):
                clip["tracks"].append(track)
            at += rng.uniform(0.8, 2.2) / speed


# Words. Every description starts "A red car ", goes on with the phrase, and varies after that.


def moves(track):
    dx = track.x[-1] - track.x[0]
    return "stands still" if abs(dx) < 0.01 else "moves right" if dx > 0 else "moves left"


def describe(clip, rng):
    """Returns (description, QA rounds, motion caption) of a planned clip."""

    def pick(*options):
        return options[rng.integers(len(options))]

    kind, spec, place, when = clip["kind"], KINDS[clip["kind"]], clip["place"], clip["when"]
    who, *others = [f"{track.colour} {track.object}" for track in clip["tracks"]]
    victim, bystanders = others[: kind == "collision"], clip["tracks"][1 + (kind == "collision") :]
    clause = " a ".join([spec.phrase, *victim])
    if kind == "normal":
        first = pick(
            f"moves along {place} and {clause}",
            f"moves along {place} as it should, and {clause}",
            f"moves along and {clause} {place}",
        )
    else:
        first = pick(f"{clause} {place}, {when}", f"{clause} {when}, {place}", f"{clause}. It happens {place}, {when}")
    more = [pick(f"The scene is {clip['scene']}.", f"The camera looks at {clip['scene']}.")]
    more += [f"A {track.colour} {track.object} {moves(track)}." for track in bystanders[:1]] or ["Nobody else is near."]
    description = f"A {who} {first}. {pick(*spec.consequences)} {pick(*more)}"
    count = ["is one road user", "are two road users", "are three road users", "are four road users"][len(others)]
    qa = {
        pick("Who is involved?", "Who is it about?"): " and a ".join([f"A {who}", *victim]) + ".",
        pick("What happens?", "What does the video show?", "What is going on?"): (
            f"The {who} {'moves along and ' if kind == 'normal' else ''}{clause}."
        ),
        pick("Where does it happen?", "Where is it?"): f"It happens {place}.",
        pick("When does it happen?", "At what time does it happen?"): f"It happens {when}.",
        pick("How many road users are there?", "How many road users can be seen?"): f"There {count}.",
        pick("Why is it dangerous?", "Why is it a problem?"): (
            f"{'It is not, because' if kind == 'normal' else 'Because'} {spec.reason}."
        ),
    }
    motion = " ".join([who, moves(clip["actor"]) if kind == "normal" else spec.phrase, *victim])
    motion += "".join(f", {track.object} {moves(track)}" for track in bystanders[:1])
    return description, [{"q": q, "a": a} for q, a in qa.items()], motion


# Pictures. A shape is (form, centre u, v, half width, half height, slope, fill): pixels at scale 1, v points down, and a slope
# widens a box downwards. Every sprite is its own mirror image: a single frame must not tell which way it goes.

# fmt: off
DARK, GLASS, SKIN, METAL, BODY = (38, 38, 42), (150, 185, 205), (222, 180, 150), (120, 122, 128), "body"
LOOKS = {  # sky, ground behind, pavement, road, pavement, foreground, what stands behind
    "a town street": ((150, 180, 215), (150, 132, 120), (168, 163, 156), (86, 86, 90), (118, 118, 124), ("house", "house")),
    "a park road": ((160, 195, 220), (92, 140, 74), (186, 168, 132), (98, 96, 92), (82, 128, 62), ("tree", "tree")),
    "a seaside road": ((165, 205, 230), (62, 122, 168), (204, 188, 150), (106, 102, 98), (214, 194, 146), ("boat", "tree")),
    "a factory road": ((172, 170, 164), (128, 118, 106), (136, 130, 124), (74, 74, 78), (112, 96, 80), ("hall", "hall")),
    "a snowy village": ((196, 205, 216), (222, 228, 234), (200, 206, 214), (112, 115, 122), (226, 230, 235), ("cabin", "pine")),
}


def wheels(*centres, v, r, hub=METAL, hub_size=0.45):
    return [("disc", u, v, k, k, 0, fill) for u in centres for k, fill in ((r, DARK), (r * hub_size, hub))]


SPRITES = {
    "car": [*wheels(-12, 12, v=6, r=4.8), ("box", 0, 0.5, 21, 5, 0, BODY), ("box", 0, -7, 10.5, 4.5, 0.6, BODY),
            *[("box", u, -6, 3.6, 2.6, 0.3, GLASS) for u in (-4.8, 4.8)]],
    "bus": [*wheels(-15, 15, v=10, r=4.8), ("box", 0, -2, 25, 11, 0, BODY),
            *[("box", u, -6, 4, 3.6, 0, GLASS) for u in (-18.5, -6.2, 6.2, 18.5)]],
    "truck": [*wheels(-16, -6, 6, 16, v=8.5, r=4.5), ("box", 0, 4.5, 22, 2, 0, DARK), ("box", 0, -5, 18, 8, -0.6, BODY)],
    "motorbike": [*wheels(-13, 13, v=6, r=6), ("box", 0, 2, 11, 3.4, 0.5, BODY), ("box", 0, -5, 4.5, 5, 0.2, BODY),
                  ("disc", 0, -12, 3.8, 3.8, 0, DARK)],
    "person": [*[("box", u, 10, 2, 5.5, 0, DARK) for u in (-2.6, 2.6)], ("box", 0, -1, 6.3, 7, -0.15, BODY),
               ("disc", 0, -11.5, 3.7, 3.7, 0, SKIN)],
    "cyclist": [*wheels(-9, 9, v=8.5, r=6.3, hub_size=0.73), ("box", 0, 7, 9, 1.2, 0, DARK), ("box", 0, -3, 5.2, 7.5, -0.1, BODY),
                ("disc", 0, -13, 3.4, 3.4, 0, SKIN)],
    "dog": [*[("box", u, 7, 1.6, 5, 0, DARK) for u in (-9, -5, 5, 9)], ("disc", 0, 0, 12, 5.5, 0, BODY),
            *[("disc", u, -4.5, 4.6, 4.2, 0, BODY) for u in (-12.5, 12.5)]],
    "bag": [("disc", 0, -4, 4, 4, 0, DARK), ("box", 0, 1.5, 7.5, 5, 0, (95, 60, 35)), ("box", 0, 0, 7.5, 1, 0, (225, 200, 150))],
    "crash": [("star", 0, 0, 17, 17, 9, (250, 150, 30)), ("star", 0, 0, 11, 11, 7, (255, 245, 170)),
              *[("box", u, 13, 2.2, 1.4, 0, DARK) for u in (-17, -9, 9, 17)]],
}
# fmt: on


def flames(rng):
    """Flames and smoke of one moment."""
    smoke = [("disc", rng.normal(0, 4), -15 - 7 * k, 7 + k, 6 + k, 0, (75 + 12 * k,) * 3) for k in range(4)]
    fire = [("disc", u, rng.uniform(-6, 1), 4.5, rng.uniform(7, 11), 0, (235, 90, 20)) for u in (-11, -4, 4, 11)]
    return smoke + fire + [("disc", u, rng.uniform(0, 4), 3, rng.uniform(4, 7), 0, (255, 215, 70)) for u in (-8, 0, 8)]


def draw(shapes, scale, body=None, degrees=0.0):
    """Shapes as a premultiplied RGBA picture with smooth edges, (h, w, 4) float32 with odd h and w, turned about its centre."""
    reach = int(max(max(abs(s[1]) + s[3] + abs(s[5]) * s[4], abs(s[2]) + s[4]) for s in shapes) * scale) + 4
    ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32) / np.float32(scale)
    cos, sin = np.float32(np.cos(np.radians(degrees))), np.float32(np.sin(np.radians(degrees)))
    u, v = cos * xs + sin * ys, cos * ys - sin * xs
    picture = np.zeros((*u.shape, 4), np.float32)
    for outline in (1.3, 0.0):  # first a dark outline around body and skin, then everything
        for form, cu, cv, hw, hh, slope, fill in shapes:
            if outline and fill not in (BODY, SKIN):
                continue
            du, dv = np.abs(u - cu), v - cv
            if form == "box":
                distance = np.maximum(du - hw - slope * dv, np.abs(dv) - hh)
            elif form == "disc":
                distance = (np.hypot(du / hw, dv / hh) - 1) * min(hw, hh)
            else:  # a star of `slope` points
                distance = np.hypot(du, dv) - hw * (0.7 + 0.3 * np.cos(slope * np.arctan2(du, -dv)))
            alpha = np.clip(0.5 - (distance - outline) * np.float32(scale), 0, 1)[..., None]
            colour = DARK if outline else body if fill == BODY else fill
            picture += alpha * (np.float32([*colour, 1]) - picture)
    ends = [np.abs(np.flatnonzero(picture[..., 3].any(axis)) - reach).max() + 1 for axis in (1, 0)]  # keep an empty rim
    return picture[reach - ends[0] : reach + ends[0] + 1, reach - ends[1] : reach + ends[1] + 1]


def blend(image, sprite, x, y):
    """Puts a sprite onto image (SIZE, SIZE, 3) in place, centred at pixel (x, y), bilinear between pixels, cut at the edges."""
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
    w, h, shade = rng.uniform(11, 17), rng.uniform(8, 13), rng.uniform(0.8, 1.15)
    if name in ("house", "cabin"):
        wall = tuple(rng.uniform((150, 120, 90), (205, 170, 145))) if name == "house" else (125, 88, 62)
        roof = ("box", 0, -2 * h - 5, w / 2 + 1, 5, w / 10 + 0.2, (130, 62, 50) if name == "house" else (236, 240, 244))
        shapes = [("box", 0, -h, w, h, 0, wall), roof] + [("box", u * w, -h, 2, 3, 0, GLASS) for u in (-0.55, 0, 0.55)]
    elif name == "hall":
        shapes = [("box", rng.uniform(-8, 8), -2 * h - 6, 2.6, 10, 0.08, (122, 76, 62))]
        shapes += [("box", 0, -h, w + 4, h, 0, (118 * shade, 126 * shade, 134 * shade)), ("box", 0, -h, w, 2, 0, DARK)]
    elif name == "boat":
        shapes = [("box", 0, -12, 4, 6, 0.6, (238, 234, 224)), ("box", 0, -3, 9, 2.5, -1, (130, 86, 60))]
    elif name == "pine":
        shapes = [("box", 0, v, 5, 5, 0.9, (60 + 2 * k, 100 + 8 * k, 80 + 4 * k)) for k, v in enumerate((-7, -14, -21))]
    else:  # a tree
        greens = [(55 * shade, 110 * shade + 10 * k, 50 * shade) for k in range(3)]
        shapes = [("box", 0, -6, 2, 7, 0, (92, 66, 46))]
        shapes += [("disc", *rng.normal((0, -19), 3), 8, 7, 0, green) for green in greens]
    return draw(shapes, rng.uniform(0.9, 1.3))


@cache
def arrow(sign):
    shapes = [("box", 0, 4, 1.1, 7, 0, (200, 200, 192)), ("box", 0, -6, 3, 4, 0.75, (200, 200, 192))]
    return draw(shapes, 0.8, degrees=90 * sign)


def enlarge(values):
    """Values (n, n) as (SIZE, SIZE), linearly between them."""
    at = np.linspace(0, len(values) - 1.001, SIZE, dtype=np.float32)
    low, part = at.astype(int), at % 1
    for _ in range(2):  # each round enlarges one axis and swaps the two
        values = values[low].T * (1 - part) + values[low + 1].T * part
    return values


def background(scene, camera, rng):
    """The empty scene as the camera sees it, (SIZE, SIZE, 3) float32."""
    sky, behind, pavement, road, foreground, things = LOOKS[scene]
    image = np.zeros((SIZE, SIZE, 3), np.float32)

    def row(y):
        return int(round((0.5 + camera[0] * (y - 0.5) + camera[1]) * SIZE))

    tops = [-1, rng.uniform(0.15, 0.24), 0.28, 0.4, 0.73, 0.91]
    for y, colour in zip(tops, [sky, behind, pavement, road, pavement, foreground], strict=True):
        image[max(row(y), 0) :] = np.float32(colour) * np.float32(rng.uniform(0.93, 1.06))
    x = rng.uniform(-0.05, 0.05)
    while x < 1.05:
        blend(image, scenery(things[rng.integers(2)], int(rng.integers(12))), x * SIZE, row(0.28))
        x += rng.uniform(0.11, 0.22)
    for y0, y1 in ((0.28, 0.4), (0.73, 0.91)):  # paving stones and kerb
        image[row(y0) : row(y1), rng.integers(16) :: 16] *= 0.88
        image[row((y0 + y1) / 2)] *= 0.9
    for y in (0.4, 0.73):
        image[row(y) - 1 : row(y) + 1] *= 0.7
    image[row(0.56) - 1 : row(0.56) + 1, (np.arange(SIZE) + rng.integers(28)) % 28 < 16] = (215, 215, 205)
    for lane, sign in LANES.items():
        for x in (np.arange(3) + rng.uniform()) / 3:
            blend(image, arrow(sign), x * SIZE, row(BAND_Y[lane]))
    for cells, strength in ((9, 7), (45, 5), (112, 6)):  # texture, coarse to fine
        image += strength * enlarge(rng.normal(0, 1, (cells, cells)).astype(np.float32))[..., None]
    return image


@cache
def noise_pool():
    return np.random.default_rng(0).normal(0, 1, (16, SIZE, SIZE, 1)).astype(np.float32)


def render(clip, rng):
    """The frames of a planned clip, (n, SIZE, SIZE, 3) uint8. Light, tint, texture and noise come from rng."""
    gain = (rng.uniform(0.8, 1.15) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    scene = background(clip["scene"], clip["camera"], rng) * gain
    body = {name: np.minimum(np.multiply(rgb, rng.uniform(0.92, 1.06)), 255) for name, rgb in COLOURS.items()}
    fires, level, sprites = [flames(rng) for _ in range(4)], np.float32(rng.uniform(0.8, 1.6)), {}
    frames, image = np.empty((len(clip["actor"].x), SIZE, SIZE, 3), np.uint8), np.empty_like(scene)
    for i, frame in enumerate(frames):
        image[:] = scene
        tracks = sorted(clip["tracks"], key=lambda track: track.y[i]) + clip["effects"]  # near ones cover far ones
        for track in tracks:
            if not -0.2 < track.x[i] < 1.2:  # out of view, or nan: not there yet
                continue
            pose = track.pose[i]
            if (id(track), pose) not in sprites:
                shapes = fires[pose] if track.object == "fire" else SPRITES[track.object]
                sprite = draw(shapes, track.scale, body.get(track.colour), 0 if track in clip["effects"] else pose)
                sprites[id(track), pose] = sprite * np.append(gain, np.float32(1))
            blend(image, sprites[id(track), pose], track.x[i] * SIZE - 0.5, track.y[i] * SIZE - 0.5)
        image += noise_pool()[rng.integers(16)] * level
        frame[:] = np.clip(image, 0, 255, out=image)
    return frames


def encode(frames, path):
    """Writes frames as H.264; the bytes depend on nothing but the frames."""
    temporary = path.with_name(path.name + ".tmp")
    source = f"-f rawvideo -pix_fmt rgb24 -s {SIZE}x{SIZE} -r {FPS} -i -"
    target = "-c:v libx264 -preset veryfast -crf 20 -pix_fmt yuv420p -threads 1 -flags bitexact -fflags bitexact -f mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *f"-loglevel error -y {source} {target}".split(), f"file:{temporary}"]
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if done.returncode:
        raise OSError(f"{path}: ffmpeg could not write it: {done.stderr.decode(errors='replace').strip()[-200:]}")
    os.replace(temporary, path)


# Files.

SPLITS = ["train", "test", "long"]


def kind_of(seed, split, index):
    """Kinds come in shuffled rounds (normal twice in each, but never in long videos), so that small sets hold all of them."""
    kinds = [*KINDS][1:] if split == "long" else ["normal", *KINDS]
    turn, place = divmod(index, len(kinds))
    return kinds[np.random.default_rng((seed, SPLITS.index(split), turn, 1)).permutation(len(kinds))[place]]


def toy_clip(seed, split, index):
    """Plans one clip and returns (clip, texts, rng to render it with). Nothing is drawn yet."""
    streams = np.random.SeedSequence((seed, SPLITS.index(split), index)).spawn(3)
    plan_rng, text_rng, render_rng = map(np.random.default_rng, streams)
    longer = {"frames": LONG_FRAMES, "start": int(plan_rng.integers(64, 224))} if split == "long" else {}
    clip = plan(plan_rng, kind_of(seed, split, index), **longer)
    if longer:
        begin = longer["start"] / FPS + clip["begin"] * FRAMES / FPS
        clip["abnormal"] = [round(begin, 2), round(begin + FRAMES / FPS, 2)]
        return clip, None, render_rng
    return clip, describe(clip, text_rng), render_rng


def positions(track):
    """One entry of "objects": centres as fractions of the picture, null where they are out of view."""
    inside = (track.x >= 0) & (track.x <= 1)  # false for nan
    x = [round(float(v), 3) if here else None for v, here in zip(track.x, inside, strict=True)]
    y = [round(float(v), 3) if here else None for v, here in zip(track.y, inside, strict=True)]
    lying = {"lying": (np.abs(track.pose) > 45).tolist()} if np.abs(track.pose).max() > 45 else {}
    return {"object": track.object, "colour": track.colour, "x": x, "y": y} | lying


def make_toy_clip(job):
    """Renders one clip into folder/videos and returns its index line."""
    folder, seed, split, index = job
    clip, texts, rng = toy_clip(seed, split, index)
    line, actor = {"video": f"videos/{split}_{index:06d}.mp4", "source": "toy"}, clip["actor"]
    encode(render(clip, rng), folder / line["video"])
    facts = {"kind": clip["kind"], "object": actor.object, "colour": actor.colour, "place": clip["place"]}
    if split == "long":
        return line | facts | {"abnormal": clip["abnormal"], "scene": clip["scene"]}
    line |= dict(zip(("description", "qa", "motion"), texts, strict=True)) | {"flags": []}
    objects = [positions(track) for track in clip["tracks"] + clip["effects"]]
    return line | facts | {"moment": clip["when"], "scene": clip["scene"], "objects": objects}


def toy_tokenizer():
    """A SentencePiece model of the toy language, the same bytes every time; ids 0, 1, 2 are <unk>, <s>, </s> as LLaMA's."""
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "</Video> ", " [/INST] ", *DESCRIBE_QUESTIONS] * 20
    texts += [chr(code) for code in range(32, 127)]
    for index in range(1500):
        description, qa, motion = toy_clip(2024, "train", index)[1]
        texts += [description, motion + "\n"] + [text for one in qa for text in one.values()]
    for n in [8, 16, 32] * 100:
        times = ", ".join(str(round(i / FPS, 1)) for i in range(0, FRAMES, FRAMES // n))
        texts.append(f"</Video> The video contains {n} frames sampled at {times} seconds. ")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=1024, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, split_by_number=False, num_threads=1, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    return model.getvalue()


def toy(args):
    """Writes the toy world into args.out; what was there under the same names is replaced."""
    counts = [args.n_train, args.n_test, args.n_long]
    if min(counts) < 0 or max(counts) == 0:
        raise ValueError("nothing to make: give --n-train, --n-test or --n-long a number above 0")
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    write(args.out / "kinds.json", json.dumps({name: kind.phrase for name, kind in KINDS.items()}, indent=2))
    write(args.out / "tokenizer.model", toy_tokenizer())
    with ProcessPoolExecutor(args.workers) as pool:
        for split, n in zip(SPLITS, counts, strict=True):
            jobs = [(args.out, args.seed, split, index) for index in range(n)]
            if not jobs:
                continue
            chunk = 1 if split == "long" else 8
            lines = list(tqdm(pool.map(make_toy_clip, jobs, chunksize=chunk), total=n, desc=split, unit="clip"))
            write(args.out / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            if split != "long":
                rows = [{"video": row["video"], "QA": row["qa"], "description": row["description"]} for row in lines]
                write(args.out / f"all_videos_{split}.json", json.dumps(rows, indent=1))


# ----------------------------------------------------------------------------------------------------------------------
# features: everything before the frame positions is frozen in training, so it is computed once


def features(args):
    """Writes OUT/train and OUT/test: for each clip (and each of --crops variants of it) the frame features of both
    branches. Goes on where an interrupted run stopped; a folder made with other weights or settings is refused."""
    model = Hawk.from_pretrained(args.weights, device=args.device)
    expected = {"weights": frozen_fingerprint(model), "seed": args.seed, "bfloat16": args.bfloat16}
    for split in ("train", "test"):
        if not (args.data / f"{split}.jsonl").exists():
            continue
        rows, c = read_index(args.data / f"{split}.jsonl"), model.config
        crops = args.crops if split == "train" else 1
        meta = expected | {"choices": crops, "videos": videos_digest(rows), "motion": c.motion}
        shape = (len(rows), crops, c.n_frames, c.n_queries, c.qformer_dim)
        streams, done, record = open_cache(args.out / split, meta, shape, args.dtype)
        todo = [(i, k) for i in range(len(rows)) for k in range(crops) if (i, k) not in done]
        clips = Crops(rows, c.n_frames, c.image_size, todo, args.seed, c.motion)
        loader = DataLoader(clips, args.batch_size, num_workers=args.workers, collate_fn=list)
        with record, tqdm(total=len(rows) * crops, initial=len(done), desc=split, unit="clip") as bar:
            for batch in loader:
                with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bfloat16):
                    write_features(model, [clip for clip in batch if "error" not in clip], streams)
                record.write("".join(json.dumps({k: v for k, v in clip.items() if k != "frames"}) + "\n" for clip in batch))
                record.flush()
                bar.update(len(batch))


class Crops(ClipDataset):
    """The clips to cache: sample n is row and variant todo[n]; variant 0 is the whole picture."""

    def __init__(self, rows, n_frames, image_size, todo, seed, motion):
        super().__init__(rows, n_frames, image_size, seed, motion=motion)
        self.todo = todo

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, n):
        i, k = self.todo[n]
        line = {"row": i, "choice": k, "video": os.path.basename(self.rows[i]["video"])}
        try:
            appearance, motion, clip = self.read(i, "uniform", None)
        except VideoError as error:
            return line | {"error": str(error)}
        if k:
            appearance, motion = random_crop(appearance, motion, clip_generator(self.seed, k, i))
        frames = torch.stack([appearance, motion])  # (2, T, 3, H, W)
        return line | {"frames": frames, "message": clip.message, "indices": clip.indices.tolist()}


@torch.no_grad()
def write_features(model, clips, streams):
    """Encodes the clips of equal length together and puts their features into the two arrays."""
    for T in {clip["frames"].shape[1] for clip in clips}:
        same = [clip for clip in clips if clip["frames"].shape[1] == T]
        frames = torch.stack([clip["frames"] for clip in same], dim=1).to(model.device).float() / 255  # (2, B, T, 3, H, W)
        for array, seen in zip(streams, model.frame_features(*frames), strict=True):
            for clip, x in zip(same, seen.float().cpu().numpy(), strict=True):
                array[clip["row"], clip["choice"], :T] = x
    for array in streams:
        array.flush()


def open_cache(folder, meta, shape, dtype):
    """(arrays, what is done already, record to append to); ValueError if the folder holds another cache."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = meta | {"shape": list(shape), "dtype": dtype}
    names, clips = [folder / f"{name}.npy" for name in BRANCHES], folder / "clips.jsonl"
    if (folder / "meta.json").exists():
        old = json.loads((folder / "meta.json").read_text())
        if old != meta:
            key = next(k for k in meta if old.get(k) != meta[k])
            raise ValueError(f"{folder}: a cache with {key} {old.get(key)!r}, not {meta[key]!r}; choose another --out")
        lines = [line for line in clips.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write(clips, "".join(lines))
        done = {(clip["row"], clip["choice"]) for clip in map(json.loads, lines)}
        return [np.load(name, mmap_mode="r+") for name in names], done, clips.open("a")
    arrays = [np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=shape) for name in names]
    clips.write_text("")
    write(folder / "meta.json", json.dumps(meta, indent=1))
    return arrays, set(), clips.open("a")


# ----------------------------------------------------------------------------------------------------------------------
# 2. weights: the released files -> one folder of ours

# Where each tensor of ours comes from: a pattern of our name (a dot is a dot), and its name in the released .pth files |
# in Hugging Face's BLIP-2. {m} is "_motion" or nothing, [q] and [v] are thirds of a bias [queries, keys, values].
NAMES = {
    "vit.cls_token": "cls_token | vision_model.embeddings.class_embedding",
    "vit.pos_embed": "pos_embed | vision_model.embeddings.position_embedding",
    "vit.patch_embed.(.+)": "patch_embed.proj.{0} | vision_model.embeddings.patch_embedding.{0}",
    "vit.blocks.(.+).norm(.+)": "blocks.{0}.norm{1} | vision_model.encoder.layers.{0}.layer_norm{1}",
    "vit.blocks.(.+).attn.qkv.(.+)": "blocks.{0}.attn.qkv.{1} | vision_model.encoder.layers.{0}.self_attn.qkv.{1}",
    "vit.blocks.(.+).attn.(.)_bias": "blocks.{0}.attn.{1}_bias | vision_model.encoder.layers.{0}.self_attn.qkv.bias[{1}]",
    "vit.blocks.(.+).attn.proj.(.+)": "blocks.{0}.attn.proj.{1} | vision_model.encoder.layers.{0}.self_attn.projection.{1}",
    "vit.blocks.(.+).mlp.(.+)": "blocks.{0}.mlp.{1} | vision_model.encoder.layers.{0}.mlp.{1}",
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
SHARD_BYTES = 2 * 10**9


def released_names(part, suffix=""):
    """What a tensor of ours may be called in the released files. `part`: its name, without a branch in front."""
    for ours, released in NAMES.items():
        if found := re.fullmatch(ours.replace("LAYER", r"(video_|)qformer.layers.(\d+)"), part):
            released = released.replace("LAYER", "{0}Qformer{m}.bert.encoder.layer.{1}")
            names = released.format(*found.groups(""), m=suffix).split(" | ")
            other = names[0].replace("Qformer.bert", "qformer").replace("attention.self", "attention.attention")
            return [*names, other]  # the last: Q-Former layers in Hugging Face's BLIP-2


@cache
def open_tensors(file):
    """{name: tensor} of a .pth, .bin or .safetensors file, mapped, not read; {"model": …} checkpoints give their model."""
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
        content = json.loads(file.read_text())
        return content | {key: content[key] for key in needed}
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file}: is missing, or not the JSON that belongs here ({type(e).__name__}: {e})") from e


class Source:
    """The tensors of a file, of a Hugging Face folder, or `made` here. `held`: {name: its file, or the tensor}."""

    def __init__(self, path, made=None):
        self.path, self.used, self.held = path, set(), {} if made is None else made
        if made is None:
            shards = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
            for listing in path.glob(f"*{shards[0].suffix}.index.json") if shards else ():  # knows of missing files, too
                files = read_json(listing, "weight_map")["weight_map"]
                self.held |= {name: path / Path(file).name for name, file in files.items()}
            for file in shards if path.is_dir() else [path]:
                self.held |= dict.fromkeys(open_tensors(file), file)

    def get(self, name):
        """A tensor. "x[q]" and "x[v]" are thirds of a bias of [queries, keys, values], whose keys must be zero."""
        name, _, third = name.partition("[")
        tensor = file = self.held[name]
        self.used.add(name)
        if isinstance(file, Path):
            try:
                tensor = open_tensors(file)[name]
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
            unused[name] = next((why for pattern, why in reasons if re.fullmatch(pattern, name)), None)
            if unused[name] is None:
                raise ValueError(f"{self.held[name]}: unknown tensor {name} {tuple(self.get(name).shape)}: it has no place")
        return unused


def locate(name, sources, motion):
    """(source, released name) of tensor `name` of ours; ValueError if it is missing. `motion`: which source has the frozen
    part of the motion branch: "hawk", "made" or "qformer"."""
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
        if released.partition("[")[0] in sources[role].held:
            return sources[role], released
    raise ValueError(f"{sources[role].path}: the tensor {' or '.join(names)} is missing (it becomes {name})")


def infer_config(sources, overrides):
    """HawkConfig of the released files: LLaMA's sizes from its config.json, the others from shapes, head counts from
    the published widths of a head. `overrides` wins over all of them."""

    def size(name, axis):
        source, released = locate(name, sources, "qformer")
        if axis >= (tensor := source.get(released)).ndim:
            raise ValueError(f"{source.path}: {released} has too few dimensions: {tuple(tensor.shape)}")
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


def vit_draws(config):
    """How many uniform numbers the released code draws for one ViT: torch's default initialisers of every layer (weight
    and bias), then a truncated normal (one uniform each) for positions, class token and all Linear weights again."""
    dim, mlp, patches = config.vit_dim, config.vit_mlp, (config.image_size // config.patch_size) ** 2
    weights = config.vit_depth * (4 * dim * dim + 2 * dim * mlp)  # qkv, proj, fc1 and fc2
    biases = config.vit_depth * (dim + mlp + dim)  # of proj, fc1 and fc2; q_bias and v_bias are zeros, not drawn
    return dim * 3 * config.patch_size**2 + dim + weights + biases + (patches + 1) * dim + dim + weights


def bert_linears(config):
    """(name, outputs, inputs) of the Linears in the released Q-Former's layers, in the order of their construction."""
    dim, mlp = config.qformer_dim, config.qformer_mlp
    for i in range(config.qformer_layers):
        for kind, width in (("attention", dim), ("crossattention", config.vit_dim)):
            if kind == "attention" or i % config.cross_every == 0:
                yield f"encoder.layer.{i}.{kind}.self.query", dim, dim
                yield f"encoder.layer.{i}.{kind}.self.key", dim, width
                yield f"encoder.layer.{i}.{kind}.self.value", dim, width
                yield f"encoder.layer.{i}.{kind}.output.dense", dim, dim
        for half in ("", "_query"):  # the MLP for text, which is thrown away, and the one for queries
            yield f"encoder.layer.{i}.intermediate{half}.dense", mlp, dim
            yield f"encoder.layer.{i}.output{half}.dense", dim, mlp


def replay_motion_qformer(config, seed=42):
    """The motion Q-Former that the released training used and no file holds: {released name: tensor}, bit for bit.

    The released code builds it at random and freezes it; checkpoints leave frozen parts out. But training began with
    torch.manual_seed(42), so its weights follow from that seed and from everything drawn before them: two ViTs and the
    appearance Q-Former. This draws the same numbers in the same order and keeps the last Q-Former's. Uniform numbers
    can be thrown away in portions of any size; normal ones are drawn tensor by tensor, because torch draws 16 more for
    a tensor whose size is not a multiple of 16, and two at a time for one of fewer than 16."""
    generator, scratch = torch.Generator().manual_seed(seed), torch.empty(1 << 16)
    dim, linears = config.qformer_dim, list(bert_linears(config))

    def skip_uniform(count):
        for start in range(0, count, len(scratch)):
            scratch[: count - start].uniform_(generator=generator)

    def normal(*shape):
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)

    skip_uniform(2 * vit_draws(config))
    for name in ("Qformer", "Qformer_motion"):
        made, norms = {}, [f"{name}.bert.embeddings.LayerNorm"]
        # BertModel is built (torch's default initialisers), then initialised: Embeddings and Linears normal, biases zero
        normal(BERT_WORDS, dim), normal(BERT_POSITIONS, dim)
        skip_uniform(sum(outputs * inputs + outputs for _, outputs, inputs in linears))
        normal(BERT_WORDS, dim), normal(BERT_POSITIONS, dim)
        for linear, outputs, inputs in linears:
            module, weight = f"{name}.bert.{linear}", normal(outputs, inputs)
            if not re.search(r"\d\.(intermediate|output)\.", linear):  # the text MLP is not kept
                made |= {f"{module}.weight": weight, f"{module}.bias": torch.zeros(outputs)}
                norms += [module.replace("dense", "LayerNorm")] if "output" in linear else []
        # the head for words is built and initialised; what BertModel has initialised is skipped this time
        skip_uniform(dim * dim + dim + BERT_WORDS * dim)
        normal(dim, dim), normal(BERT_WORDS, dim)
        made[name.replace("Qformer", "query_tokens")] = normal(1, config.n_queries, dim)
        made |= {f"{norm}.weight": torch.ones(dim) for norm in norms}
        made |= {f"{norm}.bias": torch.zeros(dim) for norm in norms}
    return made

def fresh_weight(name, like, generator):
    """A start for what training from BLIP-2 (and Video-LLaMA) begins with at random, spread as in the released code."""
    if like.ndim == 1:  # biases and norms
        return torch.full(like.shape, float(name.endswith("norm.weight")))
    std = 1.0 if "frame_position" in name else 0.02 if ".video_" in name else (3 * like.shape[1]) ** -0.5
    return torch.empty(like.shape).normal_(0.0, std, generator=generator)


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
    """`prepare.py weights`: reads the released files, writes one folder that Hawk.from_pretrained opens."""
    roles = [role for role in ("llama", "vit", "qformer", "hawk", "video_llama") if getattr(args, role)]
    sources, entries, origin = {role: Source(getattr(args, role)) for role in roles}, [], {}
    overrides = {key: value for key, _, value in (pair.partition("=") for pair in args.set)}
    overrides = {k: json.loads(v) if re.match(r"-?\d|(true|false)$", v) else v for k, v in overrides.items()}
    motion, motion_line = choose_motion(args.motion_qformer, sources.get("hawk"))
    config = infer_config(sources, overrides)
    with torch.device("meta"):
        wanted = dict(Hawk(config).named_parameters())
    print("motion Q-Former:", motion_line, flush=True)
    made = {"ln_vision_motion.weight": torch.ones(config.vit_dim), "ln_vision_motion.bias": torch.zeros(config.vit_dim)}
    made |= replay_motion_qformer(config) if motion == "made" else {}
    sources["made"], generator = Source("made from a fixed seed", made), torch.Generator().manual_seed(0)
    for name, like in wanted.items():
        tower, _, part = name.partition(".")
        if tower in BRANCHES and not args.hawk and not part.startswith(FROZEN):
            made[released_names(part, "_motion" * (tower == "motion"))[0]] = fresh_weight(name, like, generator)
        source, released = locate(name, sources, motion)
        tensor, dtype = source.get(released), source.get(released).dtype
        if tensor.shape != like.shape or not dtype.is_floating_point:
            found = f"{source.path}: {released} is {tuple(tensor.shape)} {dtype}"
            raise ValueError(f"{found}, but {name} needs {tuple(like.shape)} of floating point")
        if name.startswith(("vit.", "llama.")):  # the big frozen towers; the rest stays as it was trained
            llama = args.dtype == "released" and name.startswith("llama.")  # which the released code rounds
            dtype = torch.bfloat16 if llama else DTYPES.get(args.dtype, dtype)
        entries.append((name, like.numel(), dtype, partial(source.get, released)))
        origin[name] = f"{source.path}: {released}"
    known = [*LEFT_OUT, ("vit", rf"blocks\.{config.vit_depth}\..+", "EVA's last block, which BLIP-2 leaves out")]
    if motion != "hawk":
        known.append(("hawk", r"(Qformer|ln_vision)_motion\..+", "replaced, as --motion-qformer asks"))
    left_out = {}
    for role in roles:
        left_out[role] = sources[role].unused([(names, why) for kinds, names, why in known if role in kinds.split()])
    record = {"motion_qformer": motion_line, "set": overrides, "left_out": left_out, "tensors": origin}
    files = {file for source in sources.values() for name in source.used if isinstance(file := source.held[name], Path)}
    write_folder(args.out, config, args.llama / "tokenizer.model", entries, record, sorted(files))


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


# ----------------------------------------------------------------------------------------------------------------------
# 3. merge: trained weights, what they are based on and their LoRA -> one folder that stands alone


def merge(args):
    """Reads the weights with all that they are based on (mapped, as stored) and adds each LoRA correction to its weight.
    Unless --dtype says otherwise the sum is written in float32, so that merging rounds nothing away."""
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
    write_folder(args.out, replace(model.config, lora_rank=0), tokenizer, entries)


# ----------------------------------------------------------------------------------------------------------------------
# 4. download: the released files, from where their authors publish them

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
    if total > (free := shutil.disk_usage(args.out).free):
        raise ValueError(f"{args.out}: only {free / 1e9:.1f} GB are free")
    for file, size, fetch in missing:
        fetch()
        if file.stat().st_size != size:
            raise ValueError(f"{file}: has {file.stat().st_size} bytes, not {size}; delete it and download it again")


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
    wanted = [file for file in sizes if re.fullmatch(pattern, file)]
    if not wanted:
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


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    job = jobs.add_parser("toy", help="make the toy world: clips, index files, tokenizer")
    job.set_defaults(run=toy)
    job.add_argument("--out", type=Path, required=True, help="folder to write")
    job.add_argument("--n-train", type=int, default=0, help="clips in train.jsonl")
    job.add_argument("--n-test", type=int, default=0, help="clips in test.jsonl")
    job.add_argument("--n-long", type=int, default=0, help="40-second videos with one event each, in long.jsonl")
    job.add_argument("--seed", type=int, default=0, help="the splits never share random numbers, whatever the seed")
    job.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; the result does not depend on it")

    job = jobs.add_parser("features", help="compute the frozen part once for all clips, for training without videos")
    job.set_defaults(run=features)
    job.add_argument("--weights", type=Path, required=True, help="folder of weights whose ViT and Q-Formers look at the clips")
    job.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    job.add_argument("--out", type=Path, required=True, help="folder to write; an interrupted run goes on there")
    job.add_argument("--crops", type=int, default=1, help="variants of each training clip; all but the first are cropped")
    job.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="float16: half the size")
    job.add_argument("--bfloat16", action="store_true", help="compute in bfloat16: about twice as fast")
    job.add_argument("--batch-size", type=int, default=8)
    job.add_argument("--workers", type=int, default=2)
    job.add_argument("--device", default="cpu")
    job.add_argument("--seed", type=int, default=42, help="of the crops")

    job = jobs.add_parser("weights", help="turn the released files into one folder of ours")
    job.set_defaults(run=weights)
    job.add_argument("--llama", type=Path, required=True, help="Hugging Face folder of llama-2-7b-chat-hf")
    job.add_argument("--vit", type=Path, required=True, help="eva_vit_g.pth, or a Hugging Face blip2 folder")
    job.add_argument("--qformer", type=Path, required=True, help="blip2_pretrained_flant5xxl.pth, or that same folder")
    trained = job.add_mutually_exclusive_group()
    trained.add_argument("--hawk", type=Path, help="finetune.pth or pretrained.pth; without it: a start for training")
    trained.add_argument("--video-llama", type=Path, help="VL_LLaMA_2_7B_Finetuned.pth, a better start for training")
    job.add_argument("--out", type=Path, required=True, help="folder to write")
    job.add_argument(
        "--motion-qformer", choices=["auto", "checkpoint", "replay", "blip2"], default="auto",
        help="the motion branch's Q-Former: as the checkpoint has it, rebuilt from the released training's seed, or "
        "BLIP-2's; auto: checkpoint if it is there, else replay with --hawk, else blip2",
    )  # fmt: skip
    job.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the config")
    job.add_argument(
        "--dtype", choices=["released", "keep", *DTYPES], default="released",
        help="of ViT and LLaMA; released: LLaMA in bfloat16, as the released code loads it; keep: as stored",
    )  # fmt: skip

    job = jobs.add_parser("merge", help="make one folder of trained weights, what they are based on and their LoRA")
    job.set_defaults(run=merge)
    job.add_argument("--weights", type=Path, required=True, help="folder that train.py wrote")
    job.add_argument("--out", type=Path, required=True, help="folder to write")
    job.add_argument("--dtype", choices=["keep", *DTYPES], default="keep", help="keep: as stored, merged in float32")

    job = jobs.add_parser("download", help="fetch the released files, about 16 GB")
    job.set_defaults(run=download)
    job.add_argument("--out", type=Path, default=Path("downloads"), help="folder to write")
    job.add_argument(
        "--what", nargs="+", choices=[*HUB, *URLS], default=["llama", "vit", "qformer", "hawk"],
        help="blip2 holds vit and qformer in one; video-llama and hawk-pretrained are other starts for training",
    )  # fmt: skip
    job.add_argument("--dry-run", action="store_true", help="only say what there is, and how large")

    args = parser.parse_args()
    try:
        if args.run in (weights, merge) and args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out}: is not empty; choose another name, or delete it first")
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
