"""How the small preset gets its vision encoder and its language: tasks for the loop of train.py.

    python -m apps.towers towers --preset tiny --data data/toy --out runs/stage0 --steps 3000 --lr 1.5e-3
    python -m apps.towers features --weights runs/stage0/last --data data/toy --out runs/features
    python -m apps.towers facts --weights runs/stage0/last --features runs/features --data data/toy \\
        --out runs/facts --train all --stage 1 --facts-only --steps 5000 --lr 3e-3
    torchrun --standalone --nproc_per_node=2 -m apps.towers towers …    # takes the options of train.py, too

Hawk starts from EVA-CLIP, BLIP-2 and LLaMA-2. The task *towers* (stage 0) stands in for them: it teaches the
ViT and the Q-Former what single frames show (which objects, where, in which colour), and LLaMA the language
of the toy world, from text alone. The task *facts* trains what lies between them, as stages 1 and 2 do, but
also asks the soft tokens directly for facts about the clip: through LLaMA alone, the video Q-Formers take
long to learn what matters.

All need the toy world's annotations (apps/toy.py); clips that it wrote without a video are drawn here. The
heads of both tasks are discarded after training.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import prepare
import train
from apps import named_death
from apps.toy import COLOURS, OBJECTS, draw_clip
from data import DESCRIBE_QUESTIONS, IGNORE, HawkDataset, VideoError, clip_options, read_index
from hawk import is_frame_level, require
from sample import PROBLEMS, print_error

COLOUR_NAMES = tuple(COLOURS)
FLICKERING = ("fire", "crash")  # these move without going anywhere
STILL = 0.25  # pixels: an object that moved less than this between two frames is absent from the motion frame
PLACE_CELLS = (12, 24)  # columns and rows of the picture
ANSWERS = (1, 1, sum(PLACE_CELLS), len(COLOURS))  # present, lying, place cells, colours
MOST_THINGS = 12  # in a clip
FACTS = ("kind", "object", "colour", "place", "moment", "scene")  # fields of a toy row


def attention_by_steps(device):
    """A context for attention over few tokens: there, in bfloat16 on a CPU, the backward pass of the fused
    kernel takes twice as long as that of separate operations."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


# ---- Clips -------------------------------------------------------------------------------------------------
class DrawnClips:
    """Mixed into a HawkDataset: a row without a video (apps.toy --no-videos) is drawn when it is needed."""

    def read(self, i, sampling, generator):
        drawn = self.rows[i].get("drawn")
        if drawn is None:
            return super().read(i, sampling, generator)
        clip = draw_clip(drawn, **clip_options(self.config), sampling=sampling, generator=generator)
        streams = {name: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for name, x in clip.streams.items()}
        return streams, clip


class DrawnFeatures(DrawnClips, prepare.FeatureDataset):
    """What `features` reads."""


# ---- Stage 0: samples --------------------------------------------------------------------------------------
class FrameDataset(DrawnClips, HawkDataset):
    """All frames of a clip's two streams, labelled with what is in them, and the row's text, to be learned
    without the video. Raises ValueError for a row that lacks what the toy world writes."""

    def __init__(self, rows, tokenizer, config, seed=0):
        for row in rows:
            objects = row.get("objects")
            if not (isinstance(objects, list) and objects and row.get("description") and row.get("qa")):
                raise ValueError(f'{row["video"]}: its row lacks "objects", "description" or "qa"')
            if len(objects) > MOST_THINGS:
                raise ValueError(f'{row["video"]}: more than {MOST_THINGS} "objects"')
            for entry in objects:
                check_object(entry, row["video"])
        # one Q-Former learns from both streams, whatever branches the model has
        super().__init__(rows, tokenizer, replace(config, branches=("appearance", "motion")), seed=seed)

    def sample(self, i, generator):
        row = self.rows[i]
        streams, clip = self.read(i, "uniform", generator)
        last = max(clip.indices[-1], 1)
        if len(clip.indices) < self.config.n_frames:  # "things" cannot be padded
            raise VideoError(row["video"], f"has fewer than {self.config.n_frames} frames")
        if any(len(entry["x"]) <= last for entry in row["objects"]):
            raise VideoError(row["video"], 'has more frames than positions in "objects"')
        # the text: the description as an answer half of the time, else the annotated questions
        question = DESCRIBE_QUESTIONS[generator.integers(len(DESCRIBE_QUESTIONS))]
        described = [{"q": question, "a": row["description"]}]
        qa = described if generator.random() < 0.5 else row["qa"]
        ids, labels = self.tokenizer.encode_conversation(qa, clip.message, 0)
        return {
            "index": torch.tensor(i),
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "streams": {"both": torch.cat([streams["appearance"], streams["motion"]])},  # (2T, 3, H, W)
            "things": things_of_frames(row["objects"], clip.indices, self.config.image_size),
        }


def check_object(entry, video):
    """An entry of "objects": name, colour, and its position in each frame of the video, None where absent."""
    try:
        known = entry["object"] in OBJECTS and entry["colour"] in (None, *COLOURS)
        for x, y in zip(entry["x"], entry["y"], strict=True):
            absent = x is None and y is None
            known &= absent or {type(x), type(y)} <= {int, float}
        known &= len(entry.get("lying") or entry["x"]) == len(entry["x"])
    except (AttributeError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        fields = '{"object", "colour", "x", "y"}'
        raise ValueError(f'{video}: each entry of "objects" must be {fields}, as the toy world writes them')


def things_of_frames(objects, indices, image_size):
    """-> float (2T, MOST_THINGS, 5): object (number in OBJECTS, -1: none), x, y, lying, colour (-1: none).
    First the T appearance frames, then the T motion frames.

    The motion frame of index i shows the step from frame i - 1 to i (from 0 to 1 for i = 0), so only what
    moved counts as present."""
    frames = [(int(i), False) for i in indices] + [(max(int(i), 1), True) for i in indices]
    things = torch.full((len(frames), MOST_THINGS, 5), -1.0)
    for number, entry in enumerate(objects):
        slot = OBJECTS.index(entry["object"])
        colour = -1 if entry["colour"] is None else COLOUR_NAMES.index(entry["colour"])
        lying = entry.get("lying") or [False] * len(entry["x"])
        for row, (j, motion) in enumerate(frames):
            x = entry["x"][j]
            if x is not None and not (motion and not moved(entry, j, image_size)):
                things[row, number] = torch.tensor([slot, x, entry["y"][j], lying[j], colour])
    return things


def moved(entry, j, image_size):
    """Whether an object that is in frame j moved since frame j - 1. What just came into view counts."""
    x = entry["x"]
    y = entry["y"]
    if entry["object"] in FLICKERING or x[j - 1] is None:
        return True
    return image_size * np.hypot(x[j] - x[j - 1], y[j] - y[j - 1]) > STILL


# ---- Stage 0: losses ---------------------------------------------------------------------------------------
def leave_out_model(module, state, prefix, metadata):
    """A hook of state_dict(): train.py saves the model separately, so only the heads belong here."""
    for name in [name for name in state if name.startswith(f"{prefix}hawk.")]:
        del state[name]


class Pretraining(nn.Module):
    """What a frame shows: is there an object of kind k, where, in which colour, and is it lying down?

    Query k of the Q-Former has to answer for all objects of kind k together, and each ViT patch that contains
    an object, for that one: patches learn fast, and a query can only pass on what a patch knows. LLaMA learns
    at the same time, from text alone."""

    def __init__(self, hawk, branch):
        super().__init__()
        self.hawk = hawk
        self.branch = branch  # the name of the one whose Q-Former learns
        self.register_state_dict_pre_hook(lambda *_: self.copy_to_others())  # train.py calls it to save
        self.register_state_dict_post_hook(leave_out_model)
        c = hawk.config
        n_answers = sum(ANSWERS)
        self.query_head = nn.Linear(c.qformer_dim, n_answers)
        self.query_presence = nn.Parameter(torch.zeros(len(OBJECTS), c.qformer_dim))  # "is my object here?"
        self.patch_head = nn.Linear(c.vit_dim, n_answers)
        self.patch_kind = nn.Linear(c.vit_dim, len(OBJECTS))

    def forward(self, streams, things, input_ids, labels, **_):
        """{"both": frames (B, n, 3, H, W)}, things (B, n, MOST_THINGS, 5), ids and labels (B, S) -> losses by
        name"""
        things = things.flatten(0, 1)  # (N, M, 5)
        there = things[..., 0] >= 0
        branch = self.hawk.branch(self.branch)
        with attention_by_steps(things.device):
            features = self.hawk.vit(streams["both"].flatten(0, 1))  # (N, 1 + patches, vit_dim)
            queries = branch.frames(features)[:, : len(OBJECTS)]  # (N, objects, C)
        targets = answers_of(things)  # (N, M, answers)
        # asked of the queries
        answers = self.query_head(queries).float()
        presence = answers[..., 0] + (queries * self.query_presence).sum(-1).float()
        answers = torch.cat([presence[..., None], answers[..., 1:]], dim=-1)
        losses = answer_losses(answers, all_of_a_kind(things, targets))
        # asked of the patches that hold the objects
        patch = self.patch_of(features, things)  # (N, M)
        index = patch[..., None].expand(-1, -1, features.shape[-1])
        patches = branch.ln_vision(features).gather(1, index)[there]  # (present, vit_dim)
        losses["patches"] = sum(answer_losses(self.patch_head(patches).float(), targets[there]).values())
        losses["patches"] += F.cross_entropy(self.patch_kind(patches).float(), things[there][:, 0].long())
        losses["pointing"] = self.pointing_loss(branch, features, things, patch)
        # language modelling: the texts of half of the clips are enough
        llama = self.hawk.llama
        n = (len(input_ids) + 1) // 2
        logits = llama.lm_head(llama(llama.embed_tokens(input_ids[:n]))[:, :-1]).float()
        losses["language"] = F.cross_entropy(
            logits.flatten(0, 1), labels[:n, 1:].flatten(), ignore_index=IGNORE
        )
        losses["total"] = sum(losses.values())
        return losses

    @torch.no_grad()
    def copy_to_others(self):
        """Gives the other branches what the first one has learned."""
        learned = dict(self.hawk.branch(self.branch).named_parameters())
        for branch in self.hawk.config.branches:
            for name, p in self.hawk.branch(branch).named_parameters():
                if is_frame_level(f"{branch}.{name}"):
                    p.copy_(learned[name])

    def patch_of(self, features, things):
        """Index (N, M) of the ViT's token that holds each thing; 0, the class token, if there is none."""
        side = math.isqrt(features.shape[1] - 1)
        column, row = (things[..., 1:3].clamp(0, 0.999) * side).long().unbind(-1)
        return (1 + row * side + column) * (things[..., 0] >= 0)

    def pointing_loss(self, branch, features, things, patch):
        """-log of the weight that the first cross-attention of query k gives to the patches with objects of
        kind k, or to the class token. Without it, attention takes very long to find its object."""
        layer = branch.qformer.layers[0]
        heads = layer.cross_attention.heads
        x = branch.qformer.norm(branch.queries)
        q = layer.cross_attention.query(layer.self_attention(x, x))[0, : len(OBJECTS)]  # for all frames
        k = layer.cross_attention.key(branch.ln_vision(features))
        q = q.unflatten(-1, (heads, -1)).float()  # (objects, h, d)
        k = k.unflatten(-1, (heads, -1)).float()  # (N, 1 + patches, h, d)
        weights = torch.einsum("shd,nphd->nhsp", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        right = torch.zeros(len(things), len(OBJECTS), features.shape[1], device=features.device)
        frame, number = (things[..., 0] >= 0).nonzero().unbind(-1)
        right[frame, things[frame, number, 0].long(), patch[frame, number]] = 1
        right[..., 0] = right.sum(-1) == 0
        return -(weights * right[:, None]).sum(-1).clamp(min=1e-6).log().mean()


def place_cells(xy):
    """Positions (…, 2) in 0 to 1 -> (…, 36): how near each of 12 columns and 24 rows is, 1 at the object.

    Trained on x and y themselves, a query learns a code whose average over the frames is the mean position,
    in which all movement is lost. The average of place cells is a histogram of where an object has been."""
    distances = []
    for z, n in zip(xy.split(1, dim=-1), PLACE_CELLS, strict=True):
        distances.append((z - torch.linspace(0, 1, n, device=xy.device)) * (n - 1))  # in cells
    return torch.exp(-((torch.cat(distances, dim=-1) / 0.7) ** 2))


def answers_of(things):
    """The right answers (…, answers) about each thing (…, 5): present, lying, place cells, one of the
    colours; all 0 where there is none."""
    there = (things[..., :1] >= 0).float()
    colours = things[..., 4:] == torch.arange(len(COLOURS), device=things.device)
    answers = torch.cat([there, things[..., 3:4], place_cells(things[..., 1:3]), colours.float()], dim=-1)
    return answers * there


def all_of_a_kind(things, answers):
    """Answers about M things (N, M, answers) -> about all objects of each kind together, the largest of each
    number (N, objects, answers)."""
    kind = things[..., :1].long().clamp(min=0).expand_as(answers)  # what is not there answers 0
    together = torch.zeros(len(things), len(OBJECTS), answers.shape[-1], device=things.device)
    return together.scatter_reduce(1, kind, answers, "amax")


def answer_losses(answers, targets):
    """Losses of answers (…, answers); those after presence only for what is present. Of several colours each
    is equally right."""
    there = targets[..., 0] > 0
    presence, lying, places, colour = answers.split(ANSWERS, dim=-1)
    right = dict(zip(("presence", "lying", "places", "colour"), targets.split(ANSWERS, dim=-1), strict=True))
    coloured = right["colour"].sum(-1) > 0
    colours = right["colour"][coloured]
    return {
        "presence": F.binary_cross_entropy_with_logits(presence, right["presence"]),
        "position": (places - right["places"])[there].square().sum(-1).mean(),
        "lying": F.binary_cross_entropy_with_logits(lying[there], right["lying"][there]),
        "colour": F.cross_entropy(colour[coloured], colours / colours.sum(-1, keepdim=True)),
    }


class TowersTask(train.HawkTask):
    """Stage 0. The first branch's Q-Former learns, the others get a copy: in the paper all are BLIP-2's."""

    def add_options(self, parser):
        parser.description = __doc__
        parser.set_defaults(stage=0, train="all")

    def dataset(self, args, model, tokenizer, split):
        rows = read_index(Path(args.data) / f"{split}.jsonl")
        return FrameDataset(rows, tokenizer, model.config, args.seed)

    def objective(self, args, model, train_set):
        first = model.config.branches[0]
        for name, p in model.named_parameters():
            p.requires_grad_(
                name.startswith(("vit.", "llama.")) or name.startswith(first) and is_frame_level(name)
            )
        return Pretraining(model, first)


# ---- Facts -------------------------------------------------------------------------------------------------
class WithFacts(torch.utils.data.Dataset):
    """Samples of a HawkDataset with "facts": for each of FACTS the number of its word, -100 if unknown."""

    def __init__(self, dataset, words):
        self.dataset = dataset
        self.rows = dataset.rows  # required of every dataset: train.load counts their videos
        self.words = words  # {fact: the words that the training rows have for it}
        self.facts = []
        for row in dataset.rows:
            missing = [fact for fact in FACTS if not isinstance(row.get(fact), str)]
            if missing:
                raise ValueError(f"{row['video']}: its row lacks {', '.join(missing)}, which toy rows have")
            known = [words[fact].index(row[fact]) if row[fact] in words[fact] else IGNORE for fact in FACTS]
            self.facts.append(known)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        sample = self.dataset[number]
        if "error" not in sample:
            sample["facts"] = torch.tensor(self.facts[sample["index"]])
        return sample


class ClipFacts(nn.Module):
    """Hawk's losses, and those of the facts: each is predicted from a share of every branch's soft tokens."""

    def __init__(self, hawk, words, weight, alone):
        super().__init__()
        self.hawk = hawk
        self.weight = weight
        self.alone = alone  # the facts and nothing else: no text, and many times faster
        self.register_state_dict_post_hook(leave_out_model)
        width = len(hawk.config.branches) * hawk.config.llama_dim
        self.heads = nn.ModuleList(nn.Linear(width, len(words[fact])) for fact in FACTS)

    def forward(self, streams, facts, counts=None, **texts):
        with attention_by_steps(facts.device):
            encoding = self.hawk.encode(streams, counts)
        losses = {"total": 0.0} if self.alone else self.hawk.losses(encoding, **texts)
        if not self.alone and encoding.tight and self.hawk.config.consistency == "cosine":
            # for the log: what the loss would be without the biases
            tight = {name: x - self.hawk.branch(name).encoder_1.bias for name, x in encoding.tight.items()}
            debiased = self.hawk.consistency_loss(encoding._replace(tight=tight))
            losses["consistency_debiased"] = debiased.detach()
        tokens = encoding.tokens.unflatten(1, (len(self.hawk.config.branches), -1))  # (B, branches, 32, D)
        shares = tokens.tensor_split(len(FACTS), dim=2)
        for i, (fact, head, share) in enumerate(zip(FACTS, self.heads, shares, strict=True)):
            answer = head(share.mean(2).flatten(1)).float()  # of (B, branches · D)
            known = (facts[:, i] != IGNORE).sum().clamp(min=1)  # if none is, the loss is 0
            losses[fact] = F.cross_entropy(answer, facts[:, i], ignore_index=IGNORE, reduction="sum") / known
            losses["total"] = losses["total"] + self.weight * losses[fact]
        return losses


class FactsTask(train.HawkTask):
    """Stages 1 and 2 with the facts."""

    def add_options(self, parser):
        parser.description = __doc__
        super().add_options(parser)
        add = parser.add_argument_group("facts").add_argument
        add("--ask-facts", type=float, default=1.0, metavar="WEIGHT", help="of the facts' losses (default 1)")
        add("--facts-only", action="store_true", help="only the facts, no text: many times faster")

    def dataset(self, args, model, tokenizer, split):
        rows = read_index(Path(args.data) / "train.jsonl")
        words = {}
        for fact in FACTS:
            words[fact] = sorted({str(row.get(fact)) for row in rows})
        return WithFacts(super().dataset(args, model, tokenizer, split), words)

    def objective(self, args, model, train_set):
        require(
            not (args.facts_only and args.train == "lora"), "--facts-only reaches no LoRA: use --train paper"
        )
        super().objective(args, model, train_set)
        for name, p in model.named_parameters():
            if args.facts_only and (name.startswith("llama.") or ".encoder_1." in name):
                p.requires_grad_(False)  # no loss of the facts reaches it
        return ClipFacts(model, train_set.words, args.ask_facts, args.facts_only)


def features(argv):
    """`prepare.py features` in bfloat16, for a world whose training clips are drawn."""
    p = argparse.ArgumentParser(description=features.__doc__)
    for name, about in {"weights": "folder", "data": "toy world", "out": "folder to write"}.items():
        p.add_argument(f"--{name}", type=Path, required=True, help=about)
    p.add_argument("--workers", type=int, default=2, help="processes that draw or read (default 2)")
    p.set_defaults(crops=1, dtype="float16", bfloat16=True, device=None)
    prepare.features(p.parse_args(argv), DrawnFeatures)
    return 0


TASKS = {"towers": TowersTask(), "facts": FactsTask()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = [*TASKS, "features"]
    p.add_argument("task", choices=tasks, help="`python -m apps.towers TASK --help` lists its options")
    args = p.parse_args(argv[:1])
    if args.task in TASKS:
        return train.run(argv[1:], TASKS[args.task])
    try:
        with named_death():
            return features(argv[1:])
    except PROBLEMS as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
