"""The toy world: a small drawn street, filmed by a fixed camera, where something may happen.

    python -m apps.toy --out data/toy --n-train 5000 --n-test 200 --seed 0   # 4 s clips, texts, tokenizer
    python -m apps.toy --out data/long --n-long 50 --seed 7                  # 40 s videos with one event
    python -m apps.toy --out data/bare --n-train 5000 --clutter 0            # no stationary objects

The street crosses the picture in four bands:

    far pavement    walkers, either way      Each clip is about one *actor*, who does what the clip's *kind*
    far lane        vehicles, to the left    says: it drives the wrong way, or falls, or behaves. Up to three
    near lane       vehicles, to the right   others behave as they should. Some kinds happen at a *moment*,
    near pavement   walkers, either way      which the texts name; the others last for the whole clip.

Half of the kinds differ from normal traffic in their motion alone: any single frame of them could come from a
normal clip (but for swerving, where it crosses the centre line). That is what the motion branch is for.
--clutter adds parked vehicles and standing walkers, which look like the actors but never move, and which no
text mentions: who moves is then hard to see in one frame.

In this file: the tables of the world; plan() decides who is where in each frame; describe() puts the plan
into words; draw() makes sprites from simple shapes; render() makes the frames; files and command line.
A clip depends on (seed, split, index) alone, not on how many are made or by how many processes.
"""

import argparse
import io
import json
import os
import re
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from apps import run_program
from data import DESCRIBE_QUESTIONS, Video, clip_of, replace_file, sample_frames
from sample import make_parser, number, print_error

FPS = 8
FRAMES = 32  # in a clip, which lasts 4 s. Times below are in clips: 0 is its first frame, 1 its end
LONG_FRAMES = 320  # in a long video
SIZE = 224  # pixels. Positions below are fractions of the picture, (0, 0) at the top left
SPLITS = ("train", "test", "long")

# ------------------------------------------------------------------------------------------------------------
# The tables of the world

VEHICLES = ("car", "bus", "truck", "motorbike")
WALKERS = ("person", "cyclist", "dog")
OBJECTS = (*VEHICLES, *WALKERS, "bag", "fire", "crash")  # everything that an index row may list
# pixels, before scaling
WIDTH = {"car": 42, "bus": 50, "truck": 46, "motorbike": 38, "person": 14, "cyclist": 30, "dog": 34}
COLOURS = {
    "red": (205, 35, 35),
    "blue": (35, 85, 215),
    "green": (35, 150, 60),
    "yellow": (240, 205, 45),
    "white": (243, 243, 243),
    "purple": (165, 50, 190),
}


@dataclass(frozen=True)
class Band:
    """A strip of the street."""

    place: str  # as the texts say it
    y: float  # of its middle
    scale: float  # of what moves in it: near things look larger
    users: tuple
    direction: int = 0  # of a lane: -1 left, 1 right; 0: a pavement, where both are fine
    wobble: float = 0.02  # how far from the middle its users may be


BANDS = (
    Band("on the far pavement", 0.33, 1.2, WALKERS),
    Band("in the far lane", 0.48, 0.9, VEHICLES, direction=-1, wobble=0.045),
    Band("in the near lane", 0.64, 1.05, VEHICLES, direction=1, wobble=0.045),
    Band("on the near pavement", 0.82, 1.5, WALKERS),
)
FAR_EDGE = 0.28  # y of the edges between the bands, from the back to the front
FAR_KERB = 0.4
CENTRE_LINE = 0.56
NEAR_KERB = 0.73
NEAR_EDGE = 0.91

# Where clutter stands: (users, lowest y, highest y, scale). Vehicles park at the kerbs or, where nobody
# drives, in the lanes.
SPOTS = (
    (WALKERS, 0.30, 0.37, 1.2),
    (VEHICLES, 0.39, 0.42, 0.85),
    (VEHICLES, 0.46, 0.50, 0.9),
    (VEHICLES, 0.62, 0.66, 1.05),
    (VEHICLES, 0.71, 0.75, 1.15),
    (WALKERS, 0.78, 0.87, 1.5),
)

# Where (x) an event may take place, and when it may begin, as the texts say it
SIDES = {"on the left": (0.16, 0.34), "in the middle": (0.43, 0.57), "on the right": (0.66, 0.84)}
MOMENTS = {
    "near the start of the clip": 0.25,
    "halfway through the clip": 0.5,
    "near the end of the clip": 0.75,
}

# Speeds are in picture widths per clip. Walkers must be quick enough for a change of pace to be visible.
WALK = (0.28, 0.4)
DRIVE = (0.38, 0.5)
RACE = (0.95, 1.2)
# The actor's speed during the event, where it differs from that before
PACE = {"sudden_stop": 0, "fire": 0, "falling": 0, "collision": 0, "crossing": 0.02}
# What appears, and how far below the actor's centre
EFFECTS = {"collision": ("crash", 0), "fire": ("fire", -0.06), "left_bag": ("bag", 0.04)}


@dataclass(frozen=True)
class Kind:
    """A kind of clip. Its phrase stands in every description of the kind and in no other's."""

    phrase: str
    actors: tuple
    point: bool = False  # it happens at one moment, which the texts name
    sided: bool = False  # the texts name left, middle or right
    motion_only: bool = False  # any single frame could come from a normal clip (but see "swerving")
    reason: str = ""
    consequences: tuple = ()


# fmt: off
KINDS = {
    "normal": Kind("nothing unusual happens", VEHICLES + WALKERS,
        reason="all road users behave as they should",
        consequences=("All traffic keeps flowing.", "Everyone gets along safely.", "The road stays calm.")),
    "wrong_way": Kind("drives the wrong way", VEHICLES, motion_only=True,
        reason="traffic in this lane comes the other way",
        consequences=("Oncoming traffic is in danger.", "A head-on accident could follow.",
                      "Oncoming drivers have to get out of the way.")),
    "speeding": Kind("moves far too fast", VEHICLES, motion_only=True,
        reason="nobody can stop in time at this speed",
        consequences=("Nobody has time to react.", "Others could be hit.",
                      "Others have to get out of the way.")),
    "sudden_stop": Kind("stops suddenly", VEHICLES, point=True, sided=True, motion_only=True,
        reason="those behind do not expect it",
        consequences=("Those behind have to brake hard.", "The way is blocked for others.",
                      "From then on the way is blocked.")),
    "turn_back": Kind("turns back", VEHICLES, point=True, sided=True, motion_only=True,
        reason="those behind are in the way",
        consequences=("Those behind have to make room.", "Those behind are surprised.",
                      "Others have to watch out.")),
    "loitering": Kind("loiters", WALKERS, sided=True, motion_only=True,
        reason="nobody knows the reason for it",
        consequences=("Someone should keep an eye on this.", "It looks suspicious.",
                      "There seems to be no goal.")),
    # a single frame shows it only where it crosses the centre line, as nobody else does
    "swerving": Kind("swerves from side to side", VEHICLES, motion_only=True,
        reason="the driver has lost control",
        consequences=("The driver seems to have lost control.", "Others have to keep their distance.",
                      "It could hit someone at any time.")),
    "falling": Kind("falls to the ground", WALKERS, point=True, sided=True,
        reason="someone may be hurt",
        consequences=("Help is needed.", "Someone may be hurt.", "An ambulance may be needed.")),
    "collision": Kind("crashes into", VEHICLES, point=True, sided=True,
        reason="people may be hurt",
        consequences=("Both are damaged and block the lane.", "People may be hurt.",
                      "Both stop and the lane is blocked.")),
    "fire": Kind("catches fire", VEHICLES, point=True, sided=True,
        reason="flames and smoke can hurt people",
        consequences=("Flames and smoke rise.", "The fire brigade is needed.",
                      "It stops and burns, and smoke rises.")),
    "left_bag": Kind("leaves a bag behind", WALKERS, point=True, sided=True,
        reason="nobody knows what is in the bag",
        consequences=("The bag stays there alone.", "Someone should check the bag.",
                      "The owner goes on without it.")),
    "crossing": Kind("cuts across the road", WALKERS, sided=True,
        reason="traffic may not stop in time",
        consequences=("Traffic has to brake.", "An accident could follow.", "Drivers have to watch out.")),
}
# fmt: on

# ------------------------------------------------------------------------------------------------------------
# Plan: who is where in each frame


@dataclass(eq=False)
class Track:
    """A road user or an effect over the n frames of a video."""

    object: str
    colour: str | None  # None: an effect, which has its own colours
    scale: float
    x: np.ndarray  # (n,) centre; nan where it is not there yet
    y: np.ndarray  # (n,)
    pose: np.ndarray  # (n,) degrees it is turned by

    @property
    def name(self):
        return f"{self.colour} {self.object}"

    @property
    def half_width(self):
        return WIDTH.get(self.object, 30) * self.scale / 2 / SIZE  # 30: of an effect


@dataclass
class Event:
    """What the actor does, where, and when. Before and after it (seen in long videos) the actor behaves."""

    kind: str
    band: int
    side: str | None
    moment: str
    forward: int  # the proper direction in this band: -1 left, 1 right
    begin: float = 0.0  # the event lasts for one clip from here
    where: float = 0.5  # x of the actor when it begins if it is sided, and otherwise halfway through it
    speed: float = 0.0

    @property
    def place(self):
        place = "between the two pavements" if self.kind == "crossing" else BANDS[self.band].place
        return f"{place} {self.side}" if self.side else place

    def progress(self, t):
        return np.clip(t - self.begin, 0, 1)

    def lasts(self, t):
        return (t >= self.begin) & (t < self.begin + 1)


@dataclass
class Plan:
    """Everything that describe() and render() need to know."""

    event: Event
    begin: float  # of the event, in clips after the video's first frame
    scene: str  # a key of LOOKS
    zoom: float  # of the camera, which is also moved up or down a little
    down: float
    tracks: list  # road users: the actor, in a collision its victim, then bystanders from far to near
    effects: list = field(default_factory=list)
    clutter: list = field(default_factory=list)  # tracks of what never moves

    @property
    def kind(self):
        return self.event.kind

    @property
    def bystanders(self):
        return self.tracks[2:] if self.kind == "collision" else self.tracks[1:]

    def picture_y(self, y):
        """From the world into the picture, as the camera sees it."""
        return 0.5 + self.zoom * (y - 0.5) + self.down


def plan(rng, kind, t):
    """Decides a video of one kind whose frames are at the times t (n,)."""
    event = choose_event(rng, kind)
    x = choose_path(rng, event, t)
    actor = new_actor(rng, event, x, t)
    scene = rng.choice([*LOOKS])
    zoom = rng.uniform(0.97, 1.04)
    video = Plan(event, event.begin - t[0], scene, zoom, rng.uniform(-3, 3) / SIZE, [actor])
    if kind == "collision":
        video.tracks.append(new_victim(rng, event, actor, t))
        actor.x = x - event.forward * actor.half_width * 0.9  # so that the two touch at `where`
    if kind in EFFECTS:
        video.effects.append(new_effect(event, actor, t))
    add_traffic(rng, video, t)
    for track in video.tracks + video.effects:  # x is planned in the picture, y in the world
        track.y = video.picture_y(track.y)
        track.scale = zoom * track.scale
    return video


def choose_event(rng, kind):
    """Everything about an event that has a name in the texts."""
    spec = KINDS[kind]
    bands = [number for number, band in enumerate(BANDS) if band.users[0] in spec.actors]
    # A normal clip is about its nearest road user, so bystanders are farther away: near bands are likelier.
    odds = [0.15, 0.2, 0.3, 0.35] if kind == "normal" else None
    band = int(rng.choice(bands, p=odds))
    side = rng.choice([*SIDES]) if spec.sided else None
    moment = rng.choice([*MOMENTS]) if spec.point else "throughout the clip"
    forward = BANDS[band].direction or rng.choice([-1, 1])
    return Event(kind, band, side, moment, forward)


def choose_path(rng, event, t):
    """Draws begin, where and speed of an event until its actor stays in view; returns the actor's x (n,)."""
    # reach: how far from the picture's middle the actor may be. One that is not bound to a side may enter or
    # leave during the clip, normal or not; otherwise a cut-off road user would give the answer away.
    if event.kind in ("speeding", "collision"):
        reach = 0.8
    elif event.side:
        reach = 0.46
    else:
        reach = rng.choice([0.46, 0.65])
    in_clip = (t >= 0) & (t < 1)
    while True:
        x = draw_path(rng, event, t)
        if np.abs(x - 0.5)[in_clip].max() <= reach:
            return x


def draw_path(rng, event, t):
    """One attempt: sets the event's begin, where and speed, and returns the x (n,) that follows from them."""
    spec = KINDS[event.kind]
    event.begin = MOMENTS[event.moment] + rng.uniform(-0.04, 0.04) if spec.point else 0
    around = (0.44, 0.56) if event.kind == "speeding" else (0.04, 0.96)
    event.where = rng.uniform(*SIDES.get(event.side, around))
    event.speed = draw_speed(rng, BANDS[event.band], event.kind)

    progress = event.progress(t)
    pace = PACE.get(event.kind, event.speed)
    if event.kind in ("wrong_way", "turn_back"):
        pace = -pace
    way = pace * (progress if event.side else progress - 0.5)
    if event.kind == "loitering":  # to and fro at constant speed: a triangle wave
        swing = rng.uniform(0.07, 0.09)
        cycles = rng.uniform(1.6, 2.2) * progress + rng.uniform()
        way = swing * (np.abs(cycles % 1 * 4 - 2) - 1)
    ordinary = event.speed * (t - event.begin - progress)  # before and after the event; 0 during it
    return event.where + event.forward * way + event.forward * ordinary


def draw_speed(rng, band, kind="normal"):
    if kind == "speeding":
        return rng.uniform(*RACE)
    return rng.uniform(*(DRIVE if band.direction else WALK))


def new_road_user(rng, band, names, x):
    """A road user of a random name and colour that follows x (n,) in a band."""
    y = band.y + rng.uniform(-band.wobble, band.wobble)
    name = rng.choice(names)
    colour = rng.choice([*COLOURS])
    return Track(name, colour, band.scale, x, np.full_like(x, y), np.zeros_like(x))


def new_actor(rng, event, x, t):
    """The road user that an event is about, with what it does besides moving along x."""
    band = BANDS[event.band]
    actor = new_road_user(rng, band, band.users, x)
    progress = event.progress(t)
    if event.kind == "swerving":
        sway = rng.uniform(0.065, 0.08)
        cycles = rng.uniform(1.5, 2.5) * progress + rng.uniform()
        actor.y = band.y + sway * np.sin(2 * np.pi * cycles)
    if event.kind == "crossing":  # to the other pavement, after a short wait
        other_side = BANDS[3 - event.band]
        actor.y = actor.y + (other_side.y - band.y) * np.clip(progress / 0.8 - 0.125, 0, 1)
        actor.scale = 1.35
    if event.kind == "falling":  # lying down takes four frames: a person lies on the side, a dog on its back
        fallen = np.where(event.lasts(t), np.clip(progress * FRAMES / 4, 0, 1), 0)
        actor.y = actor.y + 0.03 * fallen
        actor.pose = fallen * event.forward * (180 if actor.object == "dog" else 90)
    return actor


def new_victim(rng, event, actor, t):
    """The vehicle that the actor hits: it stands, or drives slowly, until they touch at `where`."""
    names = [name for name in VEHICLES if name != actor.object]
    victim = new_road_user(rng, BANDS[event.band], names, actor.x)
    since = t - event.begin
    slow = rng.uniform(0.08, 0.16)
    way = rng.choice([0, slow]) * np.clip(since, -1, 0)
    # until a clip before the crash it drives normally, and from a clip after the crash on it does so again
    way = way + event.speed * (np.maximum(since - 1, 0) + np.minimum(since + 1, 0))
    victim.x = event.where + event.forward * (victim.half_width * 0.9 + way)
    victim.y = actor.y
    return victim


def new_effect(event, actor, t):
    """The flash of a crash, a fire, or a bag, from the moment of the event on."""
    name, down = EFFECTS[event.kind]
    there = event.lasts(t)
    x = np.where(there, event.where, np.nan)
    y = np.where(there, actor.y + down * actor.scale, np.nan)
    return Track(name, None, actor.scale, x, y, np.zeros_like(t))


def add_traffic(rng, video, t):
    """Adds the other road users, who behave."""
    if len(t) == FRAMES:
        # A clip has 0 to 3 others (a victim is one of them), each in view for a quarter of it or more.
        count = int(rng.choice(4, p=[0.2, 0.4, 0.3, 0.1]))
        add_bystanders(rng, video, t, count - (video.kind == "collision"), in_view=-0.25)
    else:
        # In a long video, somebody enters every two clip lengths, and stays in view for two or three of them.
        for shift in range(int(t[0]) - 1, int(t[-1]) + 2, 2):
            add_bystanders(rng, video, t - shift, 1, in_view=1)


def add_bystanders(rng, video, t, count, in_view):
    """Adds `count` road users, or fewer where there is no room: at most one in a band, and of different types
    as long as there are any left.

    in_view: each is in view for at least this long (in clips) before and after the middle of the clip at
    time 0. If it is negative, it may enter that long after the middle, or leave that long before it.
    """
    nearest = video.event.band if video.kind == "normal" else len(BANDS)
    free = [band for band in range(nearest) if band != video.event.band]
    added = []
    for b in rng.permutation(free).tolist():
        band = BANDS[b]
        direction = band.direction or rng.choice([-1, 1])
        speed = draw_speed(rng, band)
        if len(added) >= count:
            continue  # only after the draws above, which must not depend on `count`
        taken = [track.object for track in video.tracks + added]
        names = [name for name in band.users if name not in taken] or band.users
        for _ in range(30):  # attempts to find room
            middle = rng.uniform(speed * in_view, 1 - speed * in_view)
            new = new_road_user(rng, band, names, middle + direction * speed * (t - 0.5))
            if not any(overlap(new, track) for track in video.tracks):
                added.append(new)
                break
    video.tracks += sorted(added, key=lambda track: track.y[0])  # far to near


def overlap(one, other, height=0.07):
    """Whether two road users are in each other's way in any frame."""
    close = abs(one.x - other.x) < one.half_width + other.half_width + 0.01
    return np.any(close & (abs(one.y - other.y) < height))


def add_clutter(rng, video, count):
    """Adds `count` things that stand still in all frames, or fewer where there is no room."""
    for _ in range(40 * count):  # attempts to find room
        if len(video.clutter) == count:
            break
        users, low, high, scale = SPOTS[rng.integers(len(SPOTS))]
        place = np.ones_like(video.tracks[0].x)
        x = rng.uniform(0.04, 0.96) * place
        y = video.picture_y(rng.uniform(low, high)) * place
        new = Track(rng.choice(users), rng.choice([*COLOURS]), video.zoom * scale, x, y, 0 * place)
        others = video.tracks + video.effects + video.clutter
        if not any(overlap(new, other, 0.05) for other in others):
            video.clutter.append(new)


# ------------------------------------------------------------------------------------------------------------
# Describe: the texts of a plan


def describe(video, rng):
    """The texts of an index row: a description, six questions with answers, a motion caption."""
    return {
        "description": description(video, rng),
        "qa": questions(video, rng),
        "motion": motion_caption(video),
    }


def what_happens(video):
    phrase = KINDS[video.kind].phrase
    return f"{phrase} a {video.tracks[1].name}" if video.kind == "collision" else phrase


def movement(track):
    dx = track.x[-1] - track.x[0]
    if abs(dx) < 0.01:
        return "stands still"
    return "moves right" if dx > 0 else "moves left"


def description(video, rng):
    """What happens, where and when; what follows from it; then the scene or a bystander."""
    place = video.event.place
    when = video.event.moment
    what = what_happens(video)
    if video.kind == "normal":
        openings = [
            f"moves along {place} and {what}",
            f"moves along {place} as it should, and {what}",
            f"moves along and {what} {place}",
        ]
    else:
        openings = [f"{what} {place}, {when}", f"{what} {when}, {place}"]
        openings.append(f"{what}. It happens {place}, {when}")
    opening = rng.choice(openings)
    scene = rng.choice([f"The scene is {video.scene}.", f"The camera looks at {video.scene}."])
    others = "Nobody else is near."
    if video.bystanders:
        first = video.bystanders[0]
        others = f"A {first.name} {movement(first)}."
    consequence = rng.choice(KINDS[video.kind].consequences)
    return f"A {video.tracks[0].name} {opening}. {consequence} {rng.choice([scene, others])}"


def questions(video, rng):
    """Who, what, where, when, how many, why: in random order, so that each may begin a conversation."""
    who = video.tracks[0].name
    what = what_happens(video)
    count = ["is one road user", "are two road users", "are three road users", "are four road users"]
    count = count[len(video.tracks) - 1]
    # stationary objects do not count
    how_many = ("How many road users take part in the traffic?", "How many road users are on their way?")
    involved = f"A {who}"
    why = "Because"
    if video.kind == "collision":
        involved = f"A {who} and a {video.tracks[1].name}"
    if video.kind == "normal":
        what = f"moves along and {what}"
        why = "It is not, because"
    rounds = [
        (("Who is involved?", "Who is it about?"), involved),
        (("What happens?", "What does the video show?", "What is going on?"), f"The {who} {what}"),
        (("Where does it happen?", "Where is it?"), f"It happens {video.event.place}"),
        (("When does it happen?", "At what time does it happen?"), f"It happens {video.event.moment}"),
        (how_many, f"There {count}"),
        (("Why is it dangerous?", "Why is it a problem?"), f"{why} {KINDS[video.kind].reason}"),
    ]
    qa = []
    for i in rng.permutation(len(rounds)):
        wordings, answer = rounds[i]
        qa.append({"q": rng.choice(wordings), "a": answer + "."})
    return qa


def motion_caption(video):
    """What the motion tokens alone are asked to say in stage 1: "red car stops suddenly, dog moves left"."""
    actor = video.tracks[0]
    does = movement(actor) if video.kind == "normal" else KINDS[video.kind].phrase
    caption = f"{actor.name} {does}"
    if video.kind == "collision":
        caption += f" {video.tracks[1].name}"
    if video.bystanders:
        first = video.bystanders[0]
        caption += f", {first.object} {movement(first)}"
    return caption


# ------------------------------------------------------------------------------------------------------------
# Draw: sprites of simple shapes


class Shape(NamedTuple):
    """A form around (u, v) in pixels; u points right and v down."""

    form: str  # box, disc, star
    u: float
    v: float
    half_width: float
    half_height: float
    fill: tuple | str  # RGB, or BODY: the colour of the road user
    slope: float = 0  # by how much a box widens downwards; the number of points of a star


box = partial(Shape, "box")
disc = partial(Shape, "disc")
star = partial(Shape, "star")
BODY = "body"
DARK = (38, 38, 42)
GLASS = (150, 185, 205)
SKIN = (222, 180, 150)
METAL = (120, 122, 128)
PAINT = (200, 200, 192)


def wheels(v, radius, *centres, hub=0.45):
    shapes = []
    for u in centres:
        shapes.append(disc(u, v, radius, radius, DARK))
        shapes.append(disc(u, v, radius * hub, radius * hub, METAL))
    return shapes


# Every sprite is its own mirror image: a single frame must not tell which way a road user faces.
# fmt: off
SPRITES = {
    "car": [
        *wheels(6, 4.8, -12, 12), box(0, 0.5, 21, 5, BODY), box(0, -7, 10.5, 4.5, BODY, slope=0.6),
        box(-4.8, -6, 3.6, 2.6, GLASS, slope=0.3), box(4.8, -6, 3.6, 2.6, GLASS, slope=0.3),
    ],
    "bus": [
        *wheels(10, 4.8, -15, 15), box(0, -2, 25, 11, BODY),
        *[box(u, -6, 4, 3.6, GLASS) for u in (-18.5, -6.2, 6.2, 18.5)],
    ],
    "truck": [
        *wheels(8.5, 4.5, -16, -6, 6, 16), box(0, 4.5, 22, 2, DARK), box(0, -5, 18, 8, BODY, slope=-0.6),
    ],
    "motorbike": [
        *wheels(6, 6, -13, 13), box(0, 2, 11, 3.4, BODY, slope=0.5), box(0, -5, 4.5, 5, BODY, slope=0.2),
        disc(0, -12, 3.8, 3.8, DARK),
    ],
    "person": [
        box(-2.6, 10, 2, 5.5, DARK), box(2.6, 10, 2, 5.5, DARK), box(0, -1, 6.3, 7, BODY, slope=-0.15),
        disc(0, -11.5, 3.7, 3.7, SKIN),
    ],
    "cyclist": [
        *wheels(8.5, 6.3, -9, 9, hub=0.73), box(0, 7, 9, 1.2, DARK), box(0, -3, 5.2, 7.5, BODY, slope=-0.1),
        disc(0, -13, 3.4, 3.4, SKIN),
    ],
    "dog": [
        *[box(u, 7, 1.6, 5, DARK) for u in (-9, -5, 5, 9)], disc(0, 0, 12, 5.5, BODY),
        disc(-12.5, -4.5, 4.6, 4.2, BODY), disc(12.5, -4.5, 4.6, 4.2, BODY),
    ],
    "bag": [
        disc(0, -5, 5.5, 5.5, DARK), box(0, 2, 10, 6.5, (95, 60, 35)), box(0, 0, 10, 1.3, (225, 200, 150)),
    ],
    "crash": [
        star(0, 0, 17, 17, (250, 150, 30), slope=9), star(0, 0, 11, 11, (255, 245, 170), slope=7),
        *[box(u, 13, 2.2, 1.4, DARK) for u in (-17, -9, 9, 17)],
    ],
    "arrow": [box(0, 4, 1.1, 7, PAINT), box(0, -6, 3, 4, PAINT, slope=0.75)],
    "boat": [box(0, -12, 4, 6, (238, 234, 224), slope=0.6), box(0, -3, 9, 2.5, (130, 86, 60), slope=-1)],
    "pine": [box(0, -7 - 7 * k, 5, 5, (60 + 2 * k, 100 + 8 * k, 80 + 4 * k), slope=0.9) for k in range(3)],
}
# fmt: on


def draw(shapes, scale, body=None, degrees=0.0):
    """Shapes -> a sprite: premultiplied RGBA, float32 (h, w, 4), h and w odd, turned clockwise by `degrees`.

    body: the RGB to use for BODY. Bodies and skin get a dark outline, so that they stand out on any ground.
    """
    reach = int(max(extent(shape) for shape in shapes) * scale) + 4
    ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32) / np.float32(scale)
    cos = np.float32(np.cos(np.radians(degrees)))
    sin = np.float32(np.sin(np.radians(degrees)))
    u = cos * xs + sin * ys  # where each pixel lies in the coordinates of the shapes
    v = cos * ys - sin * xs

    picture = np.zeros((*u.shape, 4), np.float32)

    def paint(shape, colour, margin=0):
        distance = signed_distance(shape, u, v) - margin
        alpha = np.clip(0.5 - distance * np.float32(scale), 0, 1)  # edges are one pixel wide
        picture[:] += alpha[..., None] * (np.float32([*colour, 1]) - picture)

    for shape in shapes:  # outlines first, so that they only show around the whole
        if shape.fill in (BODY, SKIN):
            paint(shape, DARK, margin=1.3)
    for shape in shapes:
        paint(shape, body if shape.fill == BODY else shape.fill)
    return trim(picture)


def extent(shape):
    """How far from the centre a shape may reach, in pixels."""
    across = abs(shape.u) + shape.half_width + abs(shape.slope) * shape.half_height
    return max(across, abs(shape.v) + shape.half_height)


def signed_distance(shape, u, v):
    """Roughly how far the points (u, v) lie outside a shape; negative inside it."""
    du = np.abs(u - shape.u)
    dv = v - shape.v
    if shape.form == "box":
        return np.maximum(du - shape.half_width - shape.slope * dv, np.abs(dv) - shape.half_height)
    if shape.form == "disc":
        across = np.hypot(du / shape.half_width, dv / shape.half_height)
        return (across - 1) * min(shape.half_width, shape.half_height)
    angle = np.arctan2(du, -dv)
    return np.hypot(du, dv) - shape.half_width * (0.7 + 0.3 * np.cos(shape.slope * angle))


def trim(picture):
    """Cuts off empty margins, equally on opposite sides, but for the rim of one pixel that blend() needs."""
    centre = picture.shape[0] // 2
    covered = picture[..., 3]
    h = np.abs(np.flatnonzero(covered.any(1)) - centre).max() + 1
    w = np.abs(np.flatnonzero(covered.any(0)) - centre).max() + 1
    return picture[centre - h : centre + h + 1, centre - w : centre + w + 1]


def blend(image, sprite, x, y):
    """Puts a sprite onto image (SIZE, SIZE, 3) in place, its centre at pixel (x, y).

    Bilinear between pixels, so that slow road users move smoothly, as optical flow expects.
    """
    left = x - sprite.shape[1] // 2 + 1
    top = y - sprite.shape[0] // 2 + 1
    column = int(np.floor(left))
    row = int(np.floor(top))
    fx = np.float32(left - column)
    fy = np.float32(top - row)
    sprite = sprite[:, 1:] * (1 - fx) + sprite[:, :-1] * fx
    sprite = sprite[1:] * (1 - fy) + sprite[:-1] * fy
    # only what is in view
    sprite = sprite[max(0, -row) : max(0, SIZE - row), max(0, -column) : max(0, SIZE - column)]
    row = max(0, row)
    column = max(0, column)
    target = image[row : row + sprite.shape[0], column : column + sprite.shape[1]]
    target *= 1 - sprite[..., 3:]
    target += sprite[..., :3]


# ------------------------------------------------------------------------------------------------------------
# Render: the frames of a plan


@dataclass(frozen=True)
class Look:
    """How a scene looks: colours from the back to the front, and what stands behind the street."""

    sky: str
    ground: str
    pavement: str
    road: str
    foreground: str
    behind: tuple


LOOKS = {
    "a town street": Look("96b4d7", "968478", "a8a39c", "56565a", "76767c", ("house", "house")),
    "a park road": Look("a0c3dc", "5c8c4a", "baa884", "62605c", "52803e", ("tree", "tree")),
    "a seaside road": Look("a5cde6", "3e7aa8", "ccbc96", "6a6662", "d6c292", ("boat", "tree")),
    "a factory road": Look("acaaa4", "80766a", "88827c", "4a4a4e", "706050", ("hall", "hall")),
    "a snowy village": Look("c4cdd8", "dee4ea", "c8ced6", "70737a", "e2e6eb", ("cabin", "pine")),
}


def render(video, rng, numbers=None):
    """The frames of a plan, or the numbered ones, uint8 (n, SIZE, SIZE, 3). Light, tint, texture and noise
    are drawn from rng."""
    brightness = rng.uniform(0.8, 1.15)
    light = (brightness * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    scene = paint_scene(video, rng) * light
    shades = {name: shade(rgb, rng) for name, rgb in COLOURS.items()}
    fires = [fire_shapes(rng) for _ in range(4)]
    strength = np.float32(rng.uniform(0.8, 1.6))
    noise = camera_noise()

    @cache  # most road users look the same in all frames
    def sprite(track, pose, flicker):
        shapes = fires[flicker] if track.object == "fire" else SPRITES[track.object]
        return draw(shapes, track.scale, shades.get(track.colour), pose) * np.append(light, np.float32(1))

    grain = rng.integers(len(noise), size=len(video.tracks[0].x))
    numbers = range(len(grain)) if numbers is None else numbers
    frames = np.empty((len(numbers), SIZE, SIZE, 3), np.uint8)
    for frame, i in zip(frames, numbers, strict=True):
        image = scene.copy()
        far_to_near = sorted(video.tracks + video.clutter, key=lambda track: track.y[i])
        for track in far_to_near + video.effects:
            if -0.2 < track.x[i] < 1.2:  # else out of view; nan (not there yet) is not between either
                flicker = i % len(fires) if track.object == "fire" else 0
                picture = sprite(track, track.pose[i], flicker)
                blend(image, picture, track.x[i] * SIZE - 0.5, track.y[i] * SIZE - 0.5)
        image += noise[grain[i]] * strength
        frame[:] = image.clip(0, 255, out=image)
    return frames


@cache
def camera_noise():
    """16 images of noise, (16, SIZE, SIZE, 1), the same for all videos."""
    return np.random.default_rng(0).standard_normal((16, SIZE, SIZE, 1)).astype(np.float32)


def shade(rgb, rng):
    return np.minimum(np.multiply(rgb, rng.uniform(0.92, 1.06)), 255)


def paint_scene(video, rng):
    """The empty street, float32 (SIZE, SIZE, 3)."""

    def row(y):
        return int(round(video.picture_y(y) * SIZE))

    look = LOOKS[video.scene]
    scene = np.zeros((SIZE, SIZE, 3), np.float32)
    paint_strips(scene, look, row, rng)
    x = rng.uniform(-0.05, 0.05)
    while x < 1.05:  # what stands behind the street
        name = rng.choice(look.behind)
        blend(scene, scenery(name, int(rng.integers(12))), x * SIZE, row(FAR_EDGE))
        x += rng.uniform(0.11, 0.22)
    paint_markings(scene, row, rng)
    add_texture(scene, rng)
    return scene


def paint_strips(scene, look, row, rng):
    """Sky, ground, pavement, road, pavement, foreground: each from its upper edge to the bottom."""
    horizon = rng.uniform(0.15, 0.24)
    tops = (-1, horizon, FAR_EDGE, FAR_KERB, NEAR_KERB, NEAR_EDGE)
    colours = (look.sky, look.ground, look.pavement, look.road, look.pavement, look.foreground)
    for top, colour in zip(tops, colours, strict=True):
        rgb = np.float32([*bytes.fromhex(colour)])
        scene[max(row(top), 0) :] = rgb * np.float32(rng.uniform(0.93, 1.06))


def paint_markings(scene, row, rng):
    """Paving stones, kerbs, the dashed line between the lanes, and arrows for the direction of each lane."""
    for top, bottom, kerb in ((FAR_EDGE, FAR_KERB, FAR_KERB), (NEAR_KERB, NEAR_EDGE, NEAR_KERB)):
        scene[row(top) : row(bottom), rng.integers(16) :: 16] *= 0.88
        scene[row((top + bottom) / 2)] *= 0.9
        scene[row(kerb) - 1 : row(kerb) + 1] *= 0.7
    dashes = (np.arange(SIZE) + rng.integers(28)) % 28 < 16
    scene[row(CENTRE_LINE) - 1 : row(CENTRE_LINE) + 1, dashes] = (215, 215, 205)
    for band in BANDS:
        if band.direction:
            arrow = draw(SPRITES["arrow"], 0.8, degrees=90 * band.direction)
            for x in (np.arange(3) + rng.uniform()) / 3:
                blend(scene, arrow, x * SIZE, row(band.y))


def add_texture(scene, rng):
    """Adds random brightness on three grids, coarse to fine, interpolated linearly between grid points."""
    for cells, strength in ((9, 7), (45, 5), (112, 6)):
        values = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        at = np.linspace(0, cells - 1.001, SIZE, dtype=np.float32)
        low = at.astype(int)
        part = at % 1
        for _ in range(2):  # each round enlarges one axis and swaps the two
            values = values[low].T * (1 - part) + values[low + 1].T * part
        scene += strength * values[..., None]


@cache
def scenery(name, variant):
    """The sprite of one thing behind the street, foot at the centre. Variants differ in size and colour."""
    rng = np.random.default_rng((variant, len(name)))
    w = rng.uniform(11, 17)
    h = rng.uniform(8, 13)
    brightness = rng.uniform(0.8, 1.15)
    if name == "house":
        wall = tuple(rng.uniform((150, 120, 90), (205, 170, 145)))
        shapes = house_shapes(w, h, wall, roof=(130, 62, 50))
    elif name == "cabin":
        shapes = house_shapes(w, h, wall=(125, 88, 62), roof=(236, 240, 244))
    elif name == "hall":  # a chimney, walls, a gap of windows
        walls = (118 * brightness, 126 * brightness, 134 * brightness)
        chimney = box(rng.uniform(-8, 8), -2 * h - 6, 2.6, 10, (122, 76, 62), slope=0.08)
        shapes = [chimney, box(0, -h, w + 4, h, walls), box(0, -h, w, 2, DARK)]
    elif name == "tree":
        green = np.multiply((55, 110, 50), brightness)
        shapes = [box(0, -6, 2, 7, (92, 66, 46))]
        shapes += [disc(*rng.normal((0, -19), 3), 8, 7, tuple(green + (0, 10 * k, 0))) for k in range(3)]
    else:
        shapes = SPRITES[name]
    return draw(shapes, rng.uniform(0.9, 1.3))


def house_shapes(w, h, wall, roof):
    windows = [box(u * w, -h, 2, 3, GLASS) for u in (-0.55, 0, 0.55)]
    return [box(0, -h, w, h, wall), box(0, -2 * h - 5, w / 2 + 1, 5, roof, slope=w / 10 + 0.2), *windows]


def fire_shapes(rng):
    """One picture of a flickering fire: smoke, flames, their bright cores."""
    smoke = [disc(rng.normal(0, 4), -15 - 7 * k, 7 + k, 6 + k, (75 + 12 * k,) * 3) for k in range(4)]
    flames = [disc(u, rng.uniform(-6, 1), 4.5, rng.uniform(7, 11), (235, 90, 20)) for u in (-11, -4, 4, 11)]
    cores = [disc(u, rng.uniform(0, 4), 3, rng.uniform(4, 7), (255, 215, 70)) for u in (-8, 0, 8)]
    return smoke + flames + cores


# ------------------------------------------------------------------------------------------------------------
# Files


def toy_clip(seed, split, index, clutter=(0, 0)):
    """(plan, texts, generator to render it with) of one video. A long video has no texts. clutter: the least
    and the greatest number of stationary objects; they change nothing else.

    Kinds are drawn in shuffled rounds, so that even a small set has them all. In training, 4 of the 15 clips
    of a round are normal: an anomaly is only recognised by someone who knows normal traffic well.
    """
    normal = {"train": 4, "test": 2, "long": 0}[split]
    kinds = ["normal"] * normal + [kind for kind in KINDS if kind != "normal"]
    number = SPLITS.index(split)  # part of every seed, so that splits share no random numbers
    turn, place = divmod(index, len(kinds))
    order = np.random.default_rng((seed, number, turn, 1)).permutation(len(kinds))
    kind = kinds[order[place]]
    plan_rng, text_rng, render_rng, clutter_rng = np.random.default_rng((seed, number, index)).spawn(4)
    t = np.arange(FRAMES) / FRAMES
    if split == "long":  # a clip's plan, with ordinary traffic before and after
        start = plan_rng.integers(64, 224)
        t = (np.arange(LONG_FRAMES) - start) / FRAMES
    video = plan(plan_rng, kind, t)
    add_clutter(clutter_rng, video, clutter_rng.integers(clutter[0], clutter[1] + 1))
    return video, None if split == "long" else describe(video, text_rng), render_rng


def draw_clip(drawn, n_frames, image_size, branches, motion_mask, **sampling):
    """The Clip of an index row that --no-videos wrote, from its "drawn": what `data.read_clip` would read
    from the video, except for compression losses. Only the frames that are needed are drawn."""
    video, _, rng = toy_clip(*drawn)
    indices = sample_frames(FRAMES, n_frames, **sampling)
    current = np.maximum(indices, 1)  # motion is seen between a frame and the one before it
    numbers = np.unique([indices, current, current - 1])
    pictures = torch.from_numpy(render(video, rng, numbers)).permute(0, 3, 1, 2)
    pictures = F.interpolate(pictures, size=(image_size, image_size), mode="bilinear", antialias=True)
    pictures = pictures.permute(0, 2, 3, 1).numpy()
    frames = [None] * FRAMES
    for i, picture in zip(numbers, pictures, strict=True):
        frames[i] = picture
    video = Video("", np.arange(FRAMES) / FPS, [], frames=frames)
    return clip_of(video, None, indices, branches, motion_mask)


def make_toy_clip(folder, seed, split, index, clutter=(0, 0), drawn=False):
    """Writes one video into a folder and returns its index row. drawn: only the row, for `draw_clip`."""
    video, texts, rng = toy_clip(seed, split, index, clutter)
    actor = video.tracks[0]
    row = {"video": f"videos/{split}_{index:06d}.mp4", "source": "toy"}
    if drawn:  # its name contains all that determines it: a feature cache identifies clips by name
        row["drawn"] = [seed, split, index, clutter]
        row["video"] = f"drawn/{split}_{index:06d}_seed{seed}_clutter{clutter[0]}-{clutter[1]}"
    else:
        write_video(folder / row["video"], render(video, rng))
    facts = {"kind": video.kind, "object": actor.object, "colour": actor.colour, "place": video.event.place}
    facts["clutter"] = len(video.clutter)
    if split == "long":
        seconds = [round((video.begin + clips) * FRAMES / FPS, 2) for clips in (0, 1)]
        return row | facts | {"abnormal": seconds}
    facts |= {"moment": video.event.moment, "scene": video.scene}
    facts["objects"] = [object_facts(track) for track in video.tracks + video.effects]
    facts["objects"] += [object_facts(track) | {"parked": True} for track in video.clutter]
    return row | texts | {"flags": []} | facts


def object_facts(track):
    """Where a track is in each frame (None: out of view), and when it lies on the ground if it ever does."""
    in_view = (track.x >= 0) & (track.x <= 1)  # not where x is nan
    x = np.where(in_view, track.x.round(3), None).tolist()
    y = np.where(in_view, track.y.round(3), None).tolist()
    facts = {"object": track.object, "colour": track.colour, "x": x, "y": y}
    lying = np.abs(track.pose) > 45
    if lying.any():
        facts["lying"] = lying.tolist()
    return facts


def write_video(path, frames):
    """Writes H.264 whose bytes depend on the frames alone, atomically; OSError if ffmpeg fails."""
    temporary = path.with_name(path.name + ".tmp")
    source = f"-f rawvideo -pix_fmt rgb24 -s {SIZE}x{SIZE} -r {FPS} -i -"
    codec = "-c:v libx264 -preset veryfast -crf 20 -pix_fmt yuv420p -threads 1"
    target = f"{codec} -flags bitexact -fflags bitexact -f mp4"
    options = f"-loglevel error -y {source} {target}".split()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options, f"file:{temporary}"]
    # in a session of its own, so that ctrl-C does not spoil the video
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True, start_new_session=True)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        reason = done.stderr.decode(errors="replace").strip()[-200:]
        raise OSError(f"{path}: ffmpeg could not write it: {reason}")
    os.replace(temporary, path)


def write_split(pool, folder, seed, split, count, clutter, drawn):
    """Makes the videos of one split, then its index, and for clips annotations in Hawk's own format."""
    index = folder / f"{split}.jsonl"
    published = folder / f"all_videos_{split}.json"
    for file in (index, published):
        file.unlink(missing_ok=True)  # an old index must not stand beside videos of another seed
    make = partial(make_toy_clip, folder, seed, split, clutter=clutter, drawn=drawn and split == "train")
    rows = pool.map(make, range(count), chunksize=8)
    rows = list(tqdm(rows, total=count, desc=split, unit="clip"))
    replace_file(index, "".join(json.dumps(row) + "\n" for row in rows))
    if split != "long":
        entries = [{"video": r["video"], "QA": r["qa"], "description": r["description"]} for r in rows]
        replace_file(published, json.dumps(entries, indent=1))


@contextmanager
def ctrl_c_waits():
    """Delays ctrl-C where it must not strike: while workers have not called set_signals yet, and during calls
    from C++ or around a fork, in which the exception would get lost."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def toy_tokenizer():
    """A tokenizer of the toy language, always the same. Ids 0, 1, 2 are <unk>, <s>, </s>, as in LLaMA."""
    texts = ["[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>", "</Video> ", " [/INST] ", *DESCRIBE_QUESTIONS] * 20
    texts += [chr(code) for code in range(32, 127)]
    for index in range(1500):
        _, clip, _ = toy_clip(2024, "train", index, (0, 6))
        texts += [clip["description"], clip["motion"] + "\n"]
        for turn in clip["qa"]:
            texts += [turn["q"], turn["a"]]
    for n in [8, 16, 32] * 100:
        times = ", ".join(str(round(i / FPS, 1)) for i in range(0, FRAMES, FRAMES // n))
        texts.append(f"</Video> The video contains {n} frames sampled at {times} seconds. ")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=1024,
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        split_by_number=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def set_signals():
    """In a worker: ctrl-C is for the main process, which then ends its workers; SIGTERM ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_world(folder, seed, counts, workers, clutter, drawn=False):
    """Writes the splits (counts: {split: videos}), kinds.json and tokenizer.model, replacing older ones."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    phrases = {name: kind.phrase for name, kind in KINDS.items()}
    replace_file(folder / "kinds.json", json.dumps(phrases, indent=2))
    with ctrl_c_waits():
        replace_file(folder / "tokenizer.model", toy_tokenizer())
    with ProcessPoolExecutor(workers, initializer=set_signals) as pool:
        try:
            with ctrl_c_waits():
                pool.submit(os.getpid)  # with fork, starts all workers
            for split, count in counts.items():
                if count:
                    write_split(pool, folder, seed, split, count, clutter, drawn)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def span(text):
    """An argparse type: "3" -> (3, 3), "0-6" -> (0, 6)."""
    found = re.fullmatch("([0-6])(?:-([0-6]))?", text)
    if not found or found[1] > (found[2] or found[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 6, or a range such as 0-3")
    return int(found[1]), int(found[2] or found[1])


def parse_args(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; files of the same names in it are replaced")
    add("--n-train", type=number(int, 0), default=0, metavar="N", help="clips in train.jsonl (default: 0)")
    add("--n-test", type=number(int, 0), default=0, metavar="N", help="clips in test.jsonl (default: 0)")
    add(
        "--n-long", type=number(int, 0), default=0, metavar="N", help="40 s videos in long.jsonl (default: 0)"
    )
    add("--clutter", type=span, default=(0, 6), metavar="N or N-M",
        help="parked vehicles and standing walkers in each video (default: 0-6)")  # fmt: skip
    add("--no-videos", action="store_true",
        help="train.jsonl without its videos: apps.towers draws their frames when it needs them")  # fmt: skip
    add(
        "--seed",
        type=number(int, 0),
        default=0,
        help="random seed; splits share no random numbers (default: 0)",
    )
    add("--workers", type=number(int, 1), default=os.cpu_count(), metavar="N",
        help="processes; they do not change the result (default: one per core)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    counts = dict(zip(SPLITS, (args.n_train, args.n_test, args.n_long), strict=True))
    try:
        if not any(counts.values()):
            raise ValueError("nothing to make: give --n-train, --n-test or --n-long a number above 0")
        write_world(args.out, args.seed, counts, args.workers, args.clutter, args.no_videos)
    except BrokenProcessPool:
        return print_error("a worker was killed, perhaps for want of memory; try fewer --workers")
    except (OSError, ValueError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
