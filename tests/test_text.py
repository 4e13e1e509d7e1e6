"""Tokens, labels, index files, samples and batches; a small SentencePiece model is trained here, no videos
are read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import DESCRIBE_QUESTIONS, IGNORE, Clip, HawkDataset, Tokenizer, collate, random_crop, read_index
from hawk import HawkConfig

START = "[INST] <<SYS>>\n \n<</SYS>>\n\n<Video>"
MARKERS = [
    "<s>",
    "</s>",
    "<unk>",
    "<ImageHere>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<Video>",
    "</Video>",
]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tokenizer.model with LLaMA's settings: BPE, bytes for unknown letters, no normalisation, spaces
    kept."""
    folder = tmp_path_factory.mktemp("spm")
    corpus = [
        *DESCRIBE_QUESTIONS,
        *MARKERS[4:],
        "a red car hits the bus.",
        "the man in black runs away",
        "[/INST] [INST]",
    ]
    (folder / "text").write_text("\n".join(corpus * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2)  # fmt: skip
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def tok(model_path):
    return Tokenizer(model_path)


# ------------------------------------------------------------------------------------------------------------
# Conversations


def spans(ids, labels):
    """Runs of ids that are learnt, and the rest."""
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    return learnt


def test_one_round_piece_by_piece(tok):
    ids, labels = tok.encode_conversation([{"q": "What?", "a": "A car."}], message="Two frames. ", n_visual=3)
    prompt = [
        1,
        *tok.sp.encode(START),
        *[tok.vocab_size] * 3,
        *tok.sp.encode("</Video> Two frames. What? [/INST]"),
    ]
    whole = tok.sp.encode(
        "</Video> Two frames. What? [/INST] A car. "
    )  # text between control tokens is one piece
    assert ids == prompt[: 1 + len(tok.sp.encode(START)) + 3] + whole + [2]
    assert ids[: len(prompt)] == prompt and labels == [IGNORE] * len(prompt) + ids[len(prompt) :]
    assert (
        tok.sp.id_to_piece(tok.sp.encode("x ")[-1]) == "▁"
    )  # the space before </s> is a token, and it is learnt
    assert labels[-2:] == [tok.sp.piece_to_id("▁"), tok.eos]


def test_later_rounds_and_open_rounds(tok):
    one, two, three = {"q": "One?", "a": "a."}, {"q": "Two?", "a": "b  c\nd"}, {"q": "Three?", "a": ""}
    ids, labels = tok.encode_conversation([one, two, three], n_visual=2)
    first, _ = tok.encode_conversation([one], n_visual=2)
    second = tok.sp.encode("[INST] Two? [/INST] b  c\nd ")
    assert ids == first + [1, *second, 2] + [1, *tok.sp.encode("[INST] Three? [/INST]")]
    assert spans(ids, labels) == tok.sp.encode("a. ") + [2] + tok.sp.encode("b  c\nd ") + [2]


def test_truncation_cuts_ids_and_labels_alike(tok):
    qa = [{"q": "Tell.", "a": "word " * 400}]
    ids, labels = tok.encode_conversation(qa)
    long_ids, long_labels = tok.encode_conversation(qa, max_tokens=9999)
    assert len(ids) == len(labels) == 512 and (ids, labels) == (long_ids[:512], long_labels[:512])
    assert labels[-1] == ids[-1] != tok.eos and ids.count(tok.image_id) == 64


def test_system_text(tok):
    ids = tok.encode_prompt("What?", n_visual=1, system="Be [INST] brief.")
    assert "<<SYS>>\nBe [ INST] brief.\n<</SYS>>" in tok.decode(ids)
    assert tok.encode_prompt("What?", system="") == tok.encode_prompt(
        "What?"
    )  # nothing given: the trained format


texts = st.lists(
    st.one_of(st.sampled_from([*MARKERS, " ", "\n", "[", "/INST]", "é", "🚗"]), st.text(max_size=8)),
    max_size=6,
)
texts = texts.map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_user_text_is_only_text(tok, rounds):
    ids, labels = tok.encode_conversation([{"q": q, "a": a} for q, a in rounds], n_visual=5, max_tokens=None)
    answered = sum(bool(a) for _, a in rounds)
    assert ids.count(tok.bos) == len(rounds) and ids.count(tok.eos) == labels.count(tok.eos) == answered
    assert ids.count(tok.image_id) == 5 and labels.count(tok.image_id) == 0 and max(ids) <= tok.image_id
    said = tok.sp.decode([i for i in ids if i < tok.vocab_size])
    assert said.count("[/INST]") == said.count("[INST]") == len(rounds) and said.count("</Video>") == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=2), texts, texts.filter(bool))
def test_prompt_is_the_conversation_up_to_the_answer(tok, history, question, answer):
    qa = [{"q": q, "a": a} for q, a in [*history, (question, answer)]]
    ids, labels = tok.encode_conversation(qa, message="m. ", n_visual=4, max_tokens=None)
    prompt = tok.encode_prompt(question, message="m. ", n_visual=4, history=history)
    assert ids[: len(prompt)] == prompt and all(label != IGNORE for label in labels[len(prompt) :])
    assert labels[len(prompt) - 1] == IGNORE and tok.sp.id_to_piece(prompt[-1]).endswith("]")


# ------------------------------------------------------------------------------------------------------------
# Captions, decoding, files


def test_caption_cleaning_and_format(tok):
    ids, labels = tok.encode_caption('A RED  car: "hits" (the bus)!', 3)
    want = tok.sp.encode("a red car hits the bus\n")
    assert ids == [1] + [tok.image_id] * 3 + want and labels == [IGNORE] * 4 + want
    for text, cleaned in (
        ("Wait; no~ #1 * well-known, it's.\n", "wait no 1 well-known, it's"),
        (" ".join(map(str, range(60))), " ".join(map(str, range(50)))),
    ):
        assert tok.encode_caption(text, 0, 999)[0] == [1, *tok.sp.encode(cleaned + "\n")]
    assert len(tok.encode_caption("word " * 50, 7)[0]) == 1 + 7 + 32
    assert tok.encode_caption("", 1)[0] == [1, tok.image_id, *tok.sp.encode("\n")]


def test_decode_leaves_control_tokens_out(tok):
    ids = [tok.bos, tok.image_id, *tok.sp.encode("a café 🚗"), tok.eos, 0, tok.image_id + 5]
    assert tok.decode(ids) == tok.decode(torch.tensor(ids)) == "a café 🚗" and tok.decode([]) == ""


def test_lone_surrogates_become_question_marks(tok):
    assert tok.decode(tok.encode_prompt("a\ud800b", n_visual=0)).endswith("a?b [/INST]")


def test_tokenizer_file_errors(tmp_path):
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, reason in (("pointer", "not a SentencePiece model"), ("absent", "no such tokenizer file")):
        with pytest.raises(ValueError, match=reason):
            Tokenizer(str(tmp_path / name))


def test_questions():
    assert (
        len(set(DESCRIBE_QUESTIONS)) == 20
        and DESCRIBE_QUESTIONS[0] == "Can you describe the anomaly in the video?"
    )


# ------------------------------------------------------------------------------------------------------------
# Index files


def test_read_index(tmp_path):
    rows = [{"video": "a b.mp4", "description": "d"}, {"video": "/x/ü.mp4", "qa": [{"q": "q", "a": "a"}]}]
    lines = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    (tmp_path / "i.jsonl").write_bytes(lines.encode())
    assert [row["video"] for row in read_index(tmp_path / "i.jsonl")] == [
        str(tmp_path / "a b.mp4"),
        "/x/ü.mp4",
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b'"\xff"', "'utf-8' codec"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "not a JSON object"),
        (b'{"description": "d"}', '"video" must be'),
        (b'{"video": 3, "description": "d"}', '"video" must be'),
        (b'{"video": "v"}', 'needs a "description"'),
        (b'{"video": "v", "description": "", "qa": [{"q": "x", "a": ""}]}', 'needs a "description"'),
        (b'{"video": "v", "description": " \\n", "qa": [{"q": "x", "a": " "}]}', 'needs a "description"'),
        (b'{"video": "v", "description": ["d"]}', '"description" must be a text'),
        (b'{"video": "v", "qa": {"q": "x", "a": "y"}}', '"qa" must be a list'),
        (b'{"video": "v", "qa": [{"q": "x"}]}', 'each entry of "qa"'),
    ],
)
def test_read_index_names_the_bad_line(tmp_path, line, reason):
    (tmp_path / "i.jsonl").write_bytes(b'{"video": "v", "description": "d"}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        read_index(tmp_path / "i.jsonl")
    message = str(error.value)
    assert reason in message and f"{tmp_path / 'i.jsonl'}, line 2: " in message and "\n" not in message


def test_read_index_refuses_an_empty_file(tmp_path):
    (tmp_path / "i.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_index(tmp_path / "i.jsonl")


# ------------------------------------------------------------------------------------------------------------
# Samples


ROWS = [
    {"video": f"{i}.mp4", "description": f"A car number {i}.", "motion": f"car {i}",
     "qa": [{"q": "Who?", "a": "A car."}, {"q": "Why?", "a": "Ice."}]} for i in range(6)
]  # fmt: skip


def fake_clip(path, n_frames, image_size, branches, motion_mask, sampling="uniform", generator=None,
              fps=25, device="cpu"):  # fmt: skip
    """Frames drawn from the path, indices from the generator: what read_clip does, without a video."""
    if path.startswith("bad"):
        raise data.VideoError(path, "no frames")
    drawn = np.random.default_rng(path.encode()[0])
    size = (n_frames, image_size, image_size, 3)
    streams = {name: drawn.integers(0, 256, size, np.uint8) for name in branches}
    indices = np.arange(n_frames)
    if sampling == "headtail":
        indices = np.sort(generator.choice(30, n_frames, replace=False))
    return Clip(streams, [], f"{n_frames} frames. ", indices)


CONFIG = HawkConfig.from_dict({"n_frames": 4, "image_size": 16, "patch_size": 14, "n_video_queries": 3})


@pytest.fixture
def make(tok, monkeypatch):
    monkeypatch.setattr(data, "read_clip", fake_clip)
    return lambda rows=ROWS, config=CONFIG, stage=2, **options: HawkDataset(
        rows, tok, config, stage, **options
    )


def equal(a, b):
    """Whether two samples or batches hold the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("stage", [1, 2])
def test_samples_depend_on_seed_epoch_and_index_alone(make, stage):
    dataset = make(stage=stage, seed=3)
    one, other = ([dataset[i] for i in order] for order in (range(6), (5, 3, 1, 0, 2, 4)))
    assert all(equal(one[i], other[k]) for k, i in enumerate((5, 3, 1, 0, 2, 4)))

    def load(workers):
        return torch.utils.data.DataLoader(dataset, 3, collate_fn=collate, num_workers=workers)

    assert all(map(equal, load(0), load(2)))
    assert not all(equal(dataset[6 + i], one[i]) for i in range(6))  # the next epoch
    assert all(equal(make(stage=stage, seed=3)[i], one[i]) for i in range(6))


def test_evaluation_is_plain(make, tok):
    sample = make(train=False)[2]
    ids, labels = tok.encode_conversation(
        [{"q": DESCRIBE_QUESTIONS[0], "a": "A car number 2."}], "4 frames. ", n_visual=6
    )
    assert sample["input_ids"].tolist() == ids and sample["labels"].tolist() == labels
    clip = fake_clip("2.mp4", **data.clip_options(CONFIG))
    assert list(sample["streams"]) == ["appearance", "motion"]
    for name, frames in sample["streams"].items():
        assert torch.equal(frames, torch.from_numpy(clip.streams[name]).permute(0, 3, 1, 2))
    assert sample["indices"].tolist() == [0, 1, 2, 3] and sample["index"] == 2


def test_rows_with_only_one_kind_of_text(make, tok):
    bare = [{"video": "a", "description": "A dog."}, {"video": "b", "qa": [{"q": "Who?", "a": "A cat."}]}]
    for train in (True, False):
        for row, want in enumerate(("A dog.", "A cat.")):
            sample = make(bare, train=train)[row]
            assert tok.decode(spans(sample["input_ids"].tolist(), sample["labels"].tolist())) == want
    with pytest.raises(ValueError, match='2 rows have no "motion" caption .*python -m apps.captions'):
        make(bare, stage=1)
    no_motion = HawkConfig.from_dict(vars(CONFIG) | {"branches": "appearance"})  # whose loss no one needs
    assert "motion_labels" not in make(bare, no_motion, stage=1)[0]
    sample = make([bare[1] | {"motion": "cat runs"}], stage=1)[0]
    assert tok.decode(sample["labels"].clamp(min=0)) == "a cat"
    assert tok.decode(sample["motion_labels"].clamp(min=0)) == "cat runs"
    assert (sample["motion_input_ids"] == tok.image_id).sum() == 3


def test_a_question_that_leaves_no_room_is_reported(make):
    bad = make([{"video": "a", "qa": [{"q": "why " * 600, "a": "So."}]}])[0]
    assert "no room for an answer in 512 tokens" in bad["error"] and bad["video"] == "a" and bad["index"] == 0


def cached(i, choice):
    """As CachedFeatures.load: the row and the choice are in every feature."""
    features = torch.full((4, 2, 5), float(i)), torch.full((4, 2, 5), float(choice))
    return Clip(dict(zip(CONFIG.branches, features, strict=True)), [], "", np.arange(4))


def test_features_stand_in_for_the_video(make):
    features = SimpleNamespace(choices=3, load=cached)
    choices = [int(make(features=features)[i]["streams"]["motion"][0, 0, 0]) for i in range(6)]
    assert set(choices) <= {0, 1, 2} and len(set(choices)) > 1
    batch = collate([make(features=features, train=False)[i] for i in (0, 4)])
    assert batch["streams"]["appearance"].shape == (2, 4, 2, 5)
    assert batch["streams"]["appearance"][1, 0, 0, 0] == 4 and not batch["streams"]["motion"].any()
    plain = make(augment=False)[3]
    assert torch.equal(plain["labels"][-4:], make(features=features)[3]["labels"][-4:])  # the same question


def test_random_crop_is_one_rectangle_and_clamped():
    frames = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    frames[..., ::4, :] = 255  # hard edges: bicubic overshoots on both sides
    crop = lambda seed: random_crop({"a": frames, "b": frames[:1]}, np.random.default_rng(seed))  # noqa: E731
    for seed in range(20):
        cropped = crop(seed)
        assert torch.equal(cropped["a"][:1], cropped["b"])
        assert cropped["a"].shape == frames.shape and cropped["a"].dtype == torch.uint8
        assert torch.equal(crop(seed)["a"], cropped["a"])
    assert not torch.equal(crop(0)["a"], crop(1)["a"])
    step = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    step[..., 16:] = 255
    for seed in range(20):  # brightness never falls from left to right: nothing wrapped around
        cropped = random_crop({"a": step}, np.random.default_rng(seed))["a"]
        assert (cropped.int().diff(dim=-1) >= 0).all()
    whole = random_crop({"a": step}, np.random.default_rng(0), scale=(4.0, 4.0))  # cut off at the frame
    assert torch.equal(whole["a"], step)


# ------------------------------------------------------------------------------------------------------------
# Batches


def test_collate_pads_and_keeps_errors_apart(make):
    rows = [
        ROWS[0],
        {"video": "bad.mp4", "description": "d"},
        ROWS[1] | {"description": "A much longer text, it is."},
    ]
    samples = [make(rows, train=False)[i] for i in range(3)]
    samples[0]["counts"] = torch.tensor(2)
    samples[0]["streams"] = {name: frames[:2] for name, frames in samples[0]["streams"].items()}
    batch = collate(samples, pad_id=9)
    assert [(error["video"], error["index"]) for error in batch["errors"]] == [("bad.mp4", 1)]
    assert "no frames" in batch["errors"][0]["error"]
    appearance = batch["streams"]["appearance"]
    assert appearance.shape == (2, 4, 3, 16, 16) and appearance.dtype == torch.uint8
    assert torch.equal(batch["streams"]["motion"][0, :2], samples[0]["streams"]["motion"])
    assert batch["counts"].tolist() == [2, 4] and batch["index"].tolist() == [0, 2]
    n = len(samples[0]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] > n
    assert (batch["input_ids"][0, n:] == 9).all() and (batch["labels"][0, n:] == IGNORE).all()
    assert collate([samples[1]]) == {"errors": [samples[1]]}


def test_a_third_stream_is_carried_through(make):
    config = HawkConfig.from_dict(
        {"n_frames": 4, "image_size": 16, "branches": "appearance,motion,background", "n_video_queries": 3}
    )
    sample = make(config=config)[0]
    assert list(sample["streams"]) == ["appearance", "motion", "background"]
    assert (sample["input_ids"] == make().tokenizer.image_id).sum() == 9
    assert list(collate([sample])["streams"]) == list(sample["streams"])
