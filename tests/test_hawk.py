"""The model: its parts against transformers', branches, generation, losses, what trains, and its files."""

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

import hawk
from data import recover_folder, replaced_folder
from hawk import COMPARED, Encoding, Hawk, HawkConfig, LoRALinear, QFormer, choose
from sample import beam_search, generate

SMALL = dict(
    n_frames=4, image_size=28, patch_size=14, vit_dim=32, vit_depth=2, vit_heads=2, vit_mlp=48,
    qformer_dim=24, qformer_layers=3, qformer_heads=3, qformer_mlp=40, n_queries=3, n_video_queries=2,
    tight_dim=5, llama_dim=32, llama_layers=2, llama_heads=4, llama_mlp=48, vocab_size=30, dropout=0.0,
)  # fmt: skip
ROOT = Path(hawk.__file__).parent
SOURCE = (ROOT / "hawk.py").read_text()
IMAGE, N = 30, 4  # the placeholder, and the soft tokens of a clip
few = settings(deadline=None, max_examples=15, derandomize=True, phases=[Phase.generate, Phase.shrink])


def build(seed=0, **changes):
    """A small model in eval mode whose every tensor is random: norms and biases too."""
    model = Hawk(HawkConfig(**SMALL | changes))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.2, generator=generator)
        p.data += "norm" in name and name.endswith("weight")
    return model.eval()


def random(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def clips(batch=1, frames=3, seed=1, branches=COMPARED):
    return {name: random(batch, frames, 3, 28, 28, seed=seed + i) for i, name in enumerate(branches)}


def prompt(length, seed=1, visual=N):
    text = torch.randint(3, IMAGE, (length,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor([1]), torch.full((visual,), IMAGE), text])


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), f"{(ours - theirs).norm() / theirs.norm():.1e}"


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def close_gradients(ours, theirs):
    """Some are zero except for rounding (the bias of keys): these are measured by the largest one."""
    largest = max(g.norm() for g in theirs.values())
    for name, grad in ours.items():
        error = (grad - theirs[name]).norm()
        assert error <= 1e-5 * max(theirs[name].norm(), 0.01 * largest), (
            f"{name}: {error:.1e}, largest {largest:.1e}"
        )


# ----------------------------------------------------------------------------------------------------------
# The published models, with the weights of ours


def as_llama(tensors):
    return {n if n.startswith("lm_head") else f"model.{n}": t for n, t in tensors.items()}


def as_vision(tensors):
    """ViT names -> Blip2VisionModel's. Both have one qkv; there it has one bias, whose key third is zero."""
    out = {}
    for name, tensor in tensors.items():
        for a, b in (("patch_embed", "embeddings.patch_embedding"),
                     ("cls_token", "embeddings.class_embedding"),
                     ("pos_embed", "embeddings.position_embedding"), ("blocks", "encoder.layers"),
                     ("norm", "layer_norm"), ("attn", "self_attn"), ("proj", "projection")):  # fmt: skip
            name = name.replace(a, b)
        out[name] = tensor
    for name in [n for n in out if n.endswith("q_bias")]:
        q, v = out.pop(name), out.pop(name.replace("q_bias", "v_bias"))
        out[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return out


def as_qformer(tensors):
    out = {}
    for name, tensor in tensors.items():
        name = name.replace("mlp.fc1", "intermediate_query.dense").replace("mlp.fc2", "output_query.dense")
        name = name.replace("mlp.norm", "output_query.LayerNorm").replace("layers.", "encoder.layer.")
        name = re.sub(r"_attention\.(query|key|value)", r"_attention.attention.\1", name)
        name = name.replace("_attention.output", "_attention.output.dense")
        name = name.replace("_attention.norm", "_attention.output.LayerNorm")
        name = name.replace("self_attention", "attention").replace("cross_attention", "crossattention")
        out["layernorm" + name[4:] if name.startswith("norm") else name] = tensor
    return out


def filled(reference, tensors):
    reference.load_state_dict(tensors, strict=True)
    return reference.eval()


def llama_of(model):
    c = model.config
    sizes = dict(hidden_size=c.llama_dim, intermediate_size=c.llama_mlp, num_hidden_layers=c.llama_layers)
    reference = LlamaForCausalLM(LlamaConfig(
        **sizes, num_attention_heads=c.llama_heads, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False, attn_implementation="eager",
    ))  # fmt: skip
    return filled(reference, as_llama(model.llama.state_dict()))


def vision_of(model, branch="appearance"):
    c = model.config
    sizes = dict(hidden_size=c.vit_dim, intermediate_size=c.vit_mlp, num_hidden_layers=c.vit_depth)
    reference = Blip2VisionModel(Blip2VisionConfig(
        **sizes, num_attention_heads=c.vit_heads, image_size=c.image_size, attn_implementation="eager",
    ))  # fmt: skip
    reference.post_layernorm.eps = 1e-5  # as BLIP-2's ln_vision has it
    ln = {f"post_layernorm.{n}": t for n, t in getattr(model, branch).ln_vision.state_dict().items()}
    return filled(reference, as_vision(model.vit.state_dict()) | ln)


def qformer_of(config, qformer, layers, context_dim, cross_every):
    sizes = dict(
        hidden_size=config.qformer_dim, intermediate_size=config.qformer_mlp, num_hidden_layers=layers
    )
    reference = Blip2QFormerModel(Blip2QFormerConfig(
        **sizes, num_attention_heads=config.qformer_heads, encoder_hidden_size=context_dim,
        cross_attention_frequency=cross_every, attn_implementation="eager",
    ))  # fmt: skip
    return filled(reference, as_qformer(qformer.state_dict()))


# ----------------------------------------------------------------------------------------------------------
# Each part equals the published one


@few
@given(batch=st.integers(1, 3), length=st.integers(2, 12))
def test_llama(batch, length):
    model = build()
    reference = llama_of(model)
    ours, theirs = (random(batch, length, 32).sub(0.5).requires_grad_() for _ in range(2))
    labels = torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(length))
    labels[:, : length // 2] = -100
    logits = model.llama.lm_head(model.llama(ours))
    wanted = reference(inputs_embeds=theirs, labels=labels)
    close(logits, wanted.logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(loss, wanted.loss)
    loss.backward(), wanted.loss.backward()
    close(ours.grad, theirs.grad)
    close_gradients(as_llama(gradients(model.llama)), gradients(reference))


@few
@given(st.integers(1, 4))
def test_vit(images):
    model, (ours, theirs) = build(), (random(images, 3, 28, 28).requires_grad_() for _ in range(2))
    reference, target = vision_of(model), random(images, 5, 32)
    features = model.appearance.ln_vision(model.vit(ours))
    wanted = reference(theirs).last_hidden_state
    close(features, wanted)
    (features * target).sum().backward(), (wanted * target).sum().backward()
    close(ours.grad, theirs.grad)
    for block in reference.encoder.layers:
        block.self_attn.qkv.bias.grad[32:64] = 0.0  # keys have no bias here
    close_gradients(as_vision(gradients(model.vit)), gradients(reference))


@pytest.mark.parametrize(
    "name, layers, context_dim, cross_every", [("qformer", 3, 32, 2), ("video_qformer", 2, 24, 1)]
)
@few
@given(batch=st.integers(1, 3), length=st.integers(1, 9), queries=st.integers(1, 5))
def test_qformer(name, layers, context_dim, cross_every, batch, length, queries):
    model = build()
    qformer = getattr(model.motion, name)
    reference = qformer_of(model.config, qformer, layers, context_dim, cross_every)
    ours, theirs = (random(1, queries, 24).requires_grad_() for _ in range(2))
    context, target = random(batch, length, context_dim, seed=2), random(batch, queries, 24, seed=3)
    out = qformer(ours, context)
    wanted = reference(theirs.expand(batch, -1, -1), encoder_hidden_states=context).last_hidden_state
    close(out, wanted)
    (out * target).sum().backward(), (wanted * target).sum().backward()
    close(ours.grad, theirs.grad)
    close_gradients(as_qformer(gradients(qformer)), gradients(reference))


@pytest.mark.parametrize("branch", COMPARED)
def test_branch_written_out(branch):
    """Frame by frame with the published modules, then the chain of linear layers by hand."""
    model, frames = build(), clips(batch=2)
    c, part = model.config, getattr(model, branch)
    vision = vision_of(model, branch)
    look = qformer_of(c, part.qformer, 3, 32, 2)
    watch = qformer_of(c, part.video_qformer, 2, 24, 1)
    encoding = model.encode(frames)
    for b, clip in enumerate(frames[branch]):
        seen = []
        for t, frame in enumerate(clip):
            features = vision(frame[None]).last_hidden_state
            frame_tokens = look(part.queries, encoder_hidden_states=features).last_hidden_state
            seen.append(frame_tokens + part.frame_position.weight[t])
        x = watch(part.video_queries, encoder_hidden_states=torch.cat(seen, dim=1)).last_hidden_state[0]
        for layer in (part.proj_0, part.encoder_0):
            x = x @ layer.weight.T + layer.bias
        start = 2 * COMPARED.index(branch)  # appearance first
        close(encoding.tokens[b, start : start + 2], x @ part.decoder_2.weight.T + part.decoder_2.bias)
        close(encoding.tight[branch][b], x @ part.encoder_1.weight.T + part.encoder_1.bias)


def test_cached_features_give_the_same():
    model, frames = build(), clips(batch=2)
    cached = model.frame_features(frames)
    assert cached["motion"].shape == (2, 3, 3, 24)
    assert torch.equal(model.encode(cached).tokens, model.encode(frames).tokens)
    with pytest.raises(ValueError, match="5 frames.*positions"):
        model.encode(clips(frames=5))


def test_padding_changes_nothing():
    """Clips of other lengths in a batch: each is encoded as if it were alone."""
    model, frames = build(), clips(batch=3)
    padded = {name: torch.cat([x[:, :2], torch.rand_like(x[:, :1])], dim=1) for name, x in frames.items()}
    padded = {name: torch.stack([x[0], frames[name][1], x[2]]) for name, x in padded.items()}
    both = {name: x[[0, 2]] for name, x in padded.items()}  # one number of frames, and padding all the same
    alone = model.encode({name: x[:, :2] for name, x in both.items()})
    close(model.encode(both, counts=torch.tensor([2, 2])).tokens, alone.tokens)
    encoding = model.encode(padded, counts=torch.tensor([2, 3, 2]))
    for b, n in enumerate((2, 3, 2)):
        alone = model.encode({name: x[b : b + 1, :n] for name, x in frames.items()})
        close(encoding.tokens[b : b + 1], alone.tokens)
        for name in COMPARED:
            close(encoding.tight[name][b : b + 1], alone.tight[name])


def test_branches_by_name():
    """Another order, one branch, three: each is computed by itself, and two of them have tight features."""
    model = build(branches=("motion", "background", "appearance"))
    frames = clips(branches=model.config.branches)
    encoding = model.encode(frames)
    assert encoding.tokens.shape == (1, 6, 32) and list(encoding.tight) == ["motion", "appearance"]
    assert model.background.encoder_1 is None and model.config.n_visual == 6
    tokens = model.branch("background").video(model.frame_features(frames)["background"])[0]
    assert torch.equal(encoding.tokens[:, 2:4], tokens)
    with pytest.raises(ValueError, match="no stream.*background.*appearance"):
        model.encode(clips())
    alone = build(branches=("appearance",))
    assert alone.encode(clips()).tight == {}  # a stream too many is ignored
    ids = prompt(5, visual=2)[None]
    labels = ids.masked_fill(ids == IMAGE, -100)
    losses = alone(clips(), ids, labels, motion_input_ids=ids, motion_labels=labels)
    assert losses["consistency"] == 0 and losses["motion_language"] == losses["video_language"]
    for names in ((), ("appearance", "appearance"), ("vit",), ("a b",), ("training",), ("compile_step",)):
        with pytest.raises(ValueError, match="branches"):
            HawkConfig(branches=names)


def test_a_checkpoint_without_a_branch_says_how_to_make_one(tmp_path):
    build().save_pretrained(tmp_path / "two")
    for branches in (("appearance", "motion", "background"), ("appearance",)):
        config = HawkConfig(**SMALL, branches=branches)
        with pytest.raises(ValueError, match="prepare.py merge --weights .*two --set branches="):
            Hawk.from_pretrained(tmp_path / "two", config=config)


def test_counts_of_the_published_model():
    with torch.device("meta"):
        model = Hawk(HawkConfig.preset("7b"))

    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    m = model.motion
    assert count(model.vit) == 985_894_528 and count(m.qformer) == 105_137_664
    assert count(m.video_qformer) == 18_905_088 and count(m.proj_0) == 3_149_824
    assert count(m.encoder_0, m.encoder_1, m.decoder_2) == 34_611_456 and count(model.llama) == 6_738_415_616
    assert model.config.n_visual == 64 and model.config.image_id == 32000
    with torch.device("meta"):
        assert 4e6 < count(Hawk(HawkConfig.preset("tiny"))) < 6e6


def test_the_table_of_shapes_and_parameters():
    """The one above HawkConfig, computed on the meta device; weights/tiny has the tiny preset's sizes."""

    def tensors(part):
        return part.parameters() if isinstance(part, torch.nn.Module) else [part]

    for preset, column in (("7b", 0), ("tiny", 1)):
        with torch.device("meta"):
            c = HawkConfig.preset(preset)
            model = Hawk(c)
            images = torch.zeros(c.n_frames, 3, c.image_size, c.image_size)
            seen = model.vit(images)
            frames = model.motion.frames(seen)
            x = model.motion.video_qformer(model.motion.video_queries, frames[None].flatten(1, 2))
        m = model.motion
        parts = [model.vit], [m.ln_vision, m.queries, m.qformer], [m.frame_position]
        parts += [m.video_qformer, m.video_queries], [m.proj_0, m.encoder_0, m.encoder_1, m.decoder_2]
        counts = [sum(y.numel() for part in row for y in tensors(part)) for row in (*parts, [model.llama])]
        passed = (seen, frames, frames.flatten(0, 1), x[0], m.video(frames[None])[0][0])
        rows = re.findall(r"^# .*?  (\(.+?\)) +([\d,]+)   (\(.+?\)) +([\d,]+)$", SOURCE, re.M)
        assert [int(row[2 * column + 1].replace(",", "")) for row in rows] == counts
        shapes = [str(tuple(y.shape)) for y in passed] + [f"(S, {c.llama_dim})"]
        assert [row[2 * column] for row in rows] == shapes
    stored = HawkConfig.from_dict(json.loads((ROOT / "weights/tiny/config.json").read_text()))
    assert stored == HawkConfig.preset("tiny")


# ----------------------------------------------------------------------------------------------------------
# From soft tokens to words


@few
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_soft_tokens_take_the_slots_in_order(lengths):
    model, soft = build(), random(len(lengths), N, 32)
    rows = [prompt(length) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    x = model.embed(ids, soft)
    for row in range(len(lengths)):
        assert torch.equal(x[row][ids[row] == IMAGE], soft[row])
        words = ids[row] != IMAGE
        assert torch.equal(x[row][words], model.llama.embed_tokens(ids[row][words]))
    with pytest.raises(ValueError, match=r"\[3\] placeholders.* 4 soft"):
        model.embed(prompt(2, visual=3)[None], soft[:1])


@torch.no_grad()
def generate_naive(model, streams, input_ids, max_new_tokens, eos_id=2):
    """Greedy without a cache, the whole sequence again for every token."""
    x = model.embed(input_ids, model.encode(streams).tokens)
    new = []
    for _ in range(max_new_tokens):
        new.append(model.llama.lm_head(model.llama(x)[:, -1]).argmax(-1).item())
        if new[-1] == eos_id:
            break
        x = torch.cat([x, model.llama.embed_tokens(torch.tensor([new[-1:]]))], dim=1)
    return new


@few
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_generation_equals_naive_in_any_batch(lengths, seed):
    model, frames = build(seed), clips(len(lengths))
    rows = [prompt(length, seed=i + seed) for i, length in enumerate(lengths)]
    naive = []
    for i, row in enumerate(rows):
        alone = {name: x[i : i + 1] for name, x in frames.items()}
        naive.append(generate_naive(model, alone, row[None], max_new_tokens=8))
    encoding = model.encode(frames)
    assert model.generate(encoding, [row.tolist() for row in rows], max_new_tokens=8) == naive
    assert model.generate(encoding, rows, max_new_tokens=8) == naive  # the step's cache is used again
    assert model.generate(encoding, rows, max_new_tokens=0) == [[] for _ in rows]


def log_probability(model, encoding, ids, words):
    x = model.embed(torch.cat([ids, torch.tensor(words)])[None], encoding.tokens)
    log_p = model.llama.lm_head(model.llama(x))[0, len(ids) - 1 : -1].log_softmax(-1)
    return log_p.gather(1, torch.tensor(words)[:, None]).sum().item()


@few
@given(seed=st.integers(0, 99), beams=st.integers(2, 5))
def test_beam_search_equals_transformers(seed, beams):
    model, ids = build(seed), prompt(3, seed)
    encoding = model.encode(clips())
    x = model.embed(ids[None], encoding.tokens)
    options = dict(num_beams=beams, max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = llama_of(model).generate(
        inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), eos_token_id=None, **options
    )
    words = generate(model, encoding, [ids], max_new_tokens=6, beams=beams, eos_id=-1)[0]
    assert words == wanted[0].tolist()


@few
@given(seed=st.integers(0, 99))
def test_beam_search_as_wide_as_the_vocabulary_finds_the_best(seed):
    """Two words, so that everything can be tried: [eos], or a word and any second one."""
    model, ids = build(seed, vocab_size=8), torch.tensor([1, 8, 8, 8, 8, 5])
    encoding = model.encode(clips())
    tried = [[2]] + [[a, b] for a in range(8) if a != 2 for b in range(8)]
    best = max(tried, key=lambda words: log_probability(model, encoding, ids, words) / len(words))
    assert generate(model, encoding, [ids], max_new_tokens=2, beams=8) == [best]


@few
@given(seed=st.integers(0, 99), beams=st.integers(1, 4))
def test_beam_search_with_ends_equals_a_naive_one(seed, beams):
    """Answers end at 2. Each candidate's probability is computed anew, and the best mean per word counts."""
    model, ids = build(seed, vocab_size=8), torch.tensor([1, 8, 8, 8, 8, 5])
    encoding = model.encode(clips())
    # the logits vary more than those of a random model, so that some answers end early
    model.llama.lm_head.weight.data *= 20
    open_ones = [[]]
    finished = []
    for length in range(1, 6):
        scored = [
            (log_probability(model, encoding, ids, [*words, i]), [*words, i])
            for words in open_ones
            for i in range(8)
        ]
        scored = sorted(scored, reverse=True)[: 2 * beams]
        finished += [(p / length, words) for p, words in scored[:beams] if words[-1] == 2]
        alive = [(p, words) for p, words in scored if words[-1] != 2][:beams]
        open_ones = [words for _, words in alive]
        if len(finished) >= beams and sorted(finished)[-beams][0] >= alive[0][0] / length:
            break
    best = max([*finished, (alive[0][0] / length, alive[0][1])])[1]
    assert beam_search(model, encoding.tokens, ids, beams, max_new_tokens=5) == best


def test_beam_search_is_no_worse_than_greedy_and_takes_batches():
    model, frames, rows = build(), clips(2), [prompt(2), prompt(5, seed=2)]
    encoding = model.encode(frames)
    greedy, wide = (generate(model, encoding, rows, max_new_tokens=6, beams=k, eos_id=-1) for k in (1, 6))
    for b, row in enumerate(rows):
        one = Encoding(encoding.tokens[[b]], {})
        assert wide[b] == generate(model, one, [row], max_new_tokens=6, beams=6, eos_id=-1)[0]
        p, q = (log_probability(model, one, row, words[b]) for words in (wide, greedy))
        assert p >= q - 1e-4


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_bad_clip_leaves_nothing_in_the_cache():
    model = build()
    good = model.encode(clips())
    expected = model.generate(good, [prompt(3)], max_new_tokens=5, eos_id=-1)
    model.generate(Encoding(good.tokens * torch.nan, {}), [prompt(9)], max_new_tokens=5, eos_id=-1)
    assert model.generate(good, [prompt(3)], max_new_tokens=5, eos_id=-1) == expected


def test_a_step_is_made_anew_when_the_model_changes():
    model = build()
    encoding = model.encode(clips())

    def step():
        model.generate(encoding, [prompt(3)], max_new_tokens=2)
        return next(iter(model.steps.values()))

    first = step()
    assert step() is first
    model.compile_step = True
    model.decoding_step(torch.zeros(1, 8, 32), 2)
    model.compile_step = False
    second = step()
    model.set_trainable("lora")
    third = step()
    model.llama.embed_tokens.weight.data = model.llama.embed_tokens.weight.data.clone()  # as .to(device) does
    fourth = step()
    model.llama.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32))
    assert len({first, second, third, fourth, step()}) == 5


def test_a_step_that_is_replaced_leaves_no_memory():
    model = build()
    encoding = model.encode(clips())
    model.generate(encoding, [prompt(3)], max_new_tokens=2)
    old = weakref.ref(next(iter(model.steps.values())))
    gc.disable()
    try:
        model.generate(encoding, [prompt(3)], 100, on_token=lambda _: False)
        assert old() is None
    finally:
        gc.enable()


def test_inference_mode_may_come_and_go():
    model = build()
    encoding = model.encode(clips())
    words = model.generate(encoding, [prompt(3)], max_new_tokens=5)
    with torch.inference_mode():
        assert model.generate(encoding, [prompt(3)], max_new_tokens=5) == words
    assert model.generate(encoding, [prompt(3)], max_new_tokens=5) == words


def test_sampling():
    model, rows = build(), [prompt(2), prompt(4)]
    make = dict(input_ids=rows, max_new_tokens=12, eos_id=-1, encoding=model.encode(clips(2)))
    greedy = model.generate(**make)
    draws = [model.generate(temperature=2.0, seed=seed, **make) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert model.generate(temperature=2.0, top_p=1e-6, **make) == greedy
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    nothing = torch.empty(4000, 0, dtype=torch.long)
    halved = torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365  # at half the temperature p becomes p²
    for temperature, top_p, p in (
        (1.0, 0.6, torch.tensor([0.625, 0.375, 0, 0])),  # 0.5 and 0.3, and nothing more, reach 0.6
        (0.5, 1.0, halved),
    ):
        generator = torch.Generator().manual_seed(0)
        drawn = choose(logits, nothing, temperature, top_p, 1.0, generator).bincount(minlength=4) / 4000
        assert (drawn - p).abs().max() < 0.03


@few
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    st.floats(0.5, 3),
    st.sampled_from([2, 6]),
)
def test_repetition_penalty_equals_transformers(new, penalty, lower):
    new = torch.tensor(new)
    logits = random(len(new), 10) * 4 - lower  # of both signs, or all negative
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(new, logits.clone())
    assert torch.equal(choose(logits, new, 0.0, 1.0, penalty, None), wanted.argmax(-1))


def test_repetition_penalty_is_used():
    model = build()
    words = model.generate(model.encode(clips()), [prompt(2)], 8, repetition_penalty=1e9)[0]
    assert len(set(words)) == len(words)


def test_stopping():
    model, rows, said = build(), [prompt(2), prompt(4)], []
    make = dict(input_ids=rows, encoding=model.encode(clips(2)))
    whole = model.generate(max_new_tokens=9, eos_id=-1, **make)

    def three(tokens):
        said.append(tokens)
        return len(said) < 3

    assert model.generate(on_token=three, max_new_tokens=9, eos_id=-1, **make) == [w[:3] for w in whole]
    assert said == [list(pair) for pair in zip(*(w[:3] for w in whole), strict=True)]
    for eos in set(whole[0]):  # each row ends with its first eos
        wanted = [w[: w.index(eos) + 1] if eos in w else w for w in whole]
        assert model.generate(max_new_tokens=9, eos_id=eos, **make) == wanted


# ----------------------------------------------------------------------------------------------------------
# Losses


def batch(model, **motion):
    """Two rows with right padding; the second has a longer answer than the first."""
    ids = torch.stack([F.pad(prompt(5), (0, 2)), prompt(7, seed=4)])
    labels = ids.masked_fill((ids == IMAGE) | (ids == 0) | (torch.arange(12) < 8), -100)
    return dict(streams=clips(2), input_ids=ids, labels=labels) | motion


def test_losses_by_hand():
    model, reference = build(), llama_of(build())
    b = batch(model)
    losses, e = model(**b), model.encode(b["streams"])
    wanted = reference(inputs_embeds=model.embed(b["input_ids"], e.tokens), labels=b["labels"]).loss
    close(losses["video_language"], wanted)
    assert torch.equal(losses["motion_language"], losses["video_language"])  # no target of its own
    a, m = (e.tight[name].flatten(1) for name in COMPARED)
    cosine = (a * m).sum(1) / (a.norm(dim=1) * m.norm(dim=1))
    close(losses["consistency"], (1 - cosine).mean())
    close(losses["total"], 1.1 * wanted + 0.1 * (1 - cosine).mean())
    assert list(losses) == ["video_language", "motion_language", "consistency", "total"]

    ids = torch.stack([prompt(4, visual=2), prompt(4, seed=2, visual=2)])
    labels = ids.masked_fill((ids == IMAGE) | (torch.arange(7) < 4), -100)
    losses = model(**b, motion_input_ids=ids, motion_labels=labels)
    own = reference(inputs_embeds=model.embed(ids, e.tokens[:, 2:]), labels=labels).loss
    close(losses["motion_language"], own)
    assert model(*b.values(), ids, labels) == losses  # by position, too
    close(losses["total"], wanted + 0.1 * own + 0.1 * losses["consistency"])
    with pytest.raises(ValueError, match="without a single supervised token"):
        model(**b | {"labels": torch.full_like(b["labels"], -100)})


def test_debiased_consistency():
    model = build(consistency="debiased", consistency_weight=3.0, motion_language_weight=0.0)
    a, m = model.appearance.encoder_1, model.motion.encoder_1
    features = random(2, 2, 2, 32) - 0.5
    plain = Encoding(None, {"appearance": a(features[0]), "motion": m(features[1])})
    before = model.consistency_loss(plain)
    x, y = (features[0] @ a.weight.T).flatten(1), (features[1] @ m.weight.T).flatten(1)
    close(before, (1 - F.cosine_similarity(x, y)).mean())
    a.bias.data.fill_(100), m.bias.data.fill_(50)
    biased = Encoding(None, {"appearance": a(features[0]), "motion": m(features[1])})
    assert model.consistency_loss(biased).item() == pytest.approx(before.item(), rel=1e-3)
    model.config.consistency = "cosine"
    assert model.consistency_loss(biased) < 1e-3  # the biases alone satisfy it
    model.config.consistency = "debiased"
    losses = model(**batch(model))
    close(losses["total"], losses["video_language"] + 3 * losses["consistency"])


# ----------------------------------------------------------------------------------------------------------
# What trains

PAPER = r"(appearance|motion)\.(frame_position|video_queries|video_qformer|proj_0|encoder_.|decoder_2)\b.*"
LORA = r"llama\.layers\.\d\.self_attn\.[qv]_proj\.lora_[AB]"
TRAINS = {"paper": PAPER, "released": rf"{PAPER}|motion\.queries", "lora": f"{PAPER}|{LORA}", "all": ".*"}


@pytest.mark.parametrize("mode", TRAINS)
def test_exactly_the_right_parameters_train(mode):
    model = build()
    model.set_trainable("all" if mode != "all" else "paper")  # what was chosen before does not matter
    model.set_trainable(mode)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if re.fullmatch(TRAINS[mode], n)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(**batch(model))["total"].backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {
        n for n in trained if re.search(r"lora_A|frame_position|key\.bias|embed_tokens", n)
    }  # may have no gradient
    assert trained - still <= moved <= trained
    with pytest.raises(ValueError, match="'papers'"):
        model.set_trainable("papers")


def test_dropout_only_where_something_trains():
    model = build(dropout=0.5)
    model.set_trainable("released")
    assert not any(m.training for m in model.modules())  # still in eval mode
    model.train()
    for name in COMPARED:
        part = getattr(model, name)
        assert all(m.training for m in part.video_qformer.modules()) and not any(
            m.training for m in part.qformer.modules()
        )
    assert not any(m.training for tower in (model.vit, model.llama) for m in tower.modules())
    features = model.frame_features(clips())
    assert all(torch.equal(x, features[name]) for name, x in model.frame_features(clips()).items())
    assert not torch.equal(model.encode(features).tokens, model.encode(features).tokens)
    queries = QFormer(model.config, 0, 24, 1).train()(model.motion.queries, torch.zeros(2, 1, 24))
    assert not torch.equal(*queries)  # each clip of a batch loses other numbers
    model.set_trainable("all")
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())


def test_lora():
    model, x = build(), random(2, 5, 32)
    before = model.llama(x)
    model.set_trainable("lora")
    assert torch.equal(model.llama(x), before)  # step 0
    model.set_trainable("lora")  # once is enough
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 4 and layers[0].lora_A.shape == (8, 32) and layers[0].scale == 2
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    model.eval()
    after = model.llama(x)
    assert (after - before).norm() > 0.1 * before.norm()
    model.train()
    assert not torch.equal(model.llama(x), model.llama(x))  # dropout
    model.eval()
    for layer in layers:  # W + 2 B A does the same as one matrix
        layer.weight.data += layer.scale * (layer.lora_B @ layer.lora_A)
        layer.lora_B.data.zero_()
    close(model.llama(x), after)


# ----------------------------------------------------------------------------------------------------------
# Files


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(tmp_path):
    model = build(consistency="debiased", motion_mask="soft")
    (tmp_path / "pieces").write_bytes(b"words")
    model.save_pretrained(tmp_path / "a", tokenizer=tmp_path / "pieces")
    again = Hawk.from_pretrained(tmp_path / "a")
    assert same(model, again) and again.config == model.config and not again.training
    assert (tmp_path / "a/tokenizer.model").read_bytes() == b"words"
    ids = [prompt(3)]
    assert again.generate(again.encode(clips()), ids, 9) == model.generate(model.encode(clips()), ids, 9)
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = Hawk.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert same(half, model.half()) and half.llama.lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize("mode", ["paper", "lora"])
def test_only_what_trains_is_saved_beside_a_base(tmp_path, mode):
    base = build()
    base.save_pretrained(tmp_path / "base")
    tuned = Hawk.from_pretrained(tmp_path / "base")
    tuned.set_trainable(mode)
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 1
    tuned.save_pretrained(tmp_path / "tuned", base=tmp_path / "base")
    assert load_file(tmp_path / "tuned/model.safetensors").keys() == trained.keys()
    again = Hawk.from_pretrained(tmp_path / "tuned")
    assert same(again, tuned) and again.config == tuned.config
    again.set_trainable("paper")  # a second stage on top of the first
    again.motion.proj_0.weight.data += 1
    again.save_pretrained(tmp_path / "second", base=tmp_path / "tuned")
    assert same(again, Hawk.from_pretrained(tmp_path / "second"))


def test_a_base_that_moved_or_changed(tmp_path):
    """Trained tensors on top of another base would make garbage of every word."""
    build().save_pretrained(tmp_path / "base")
    tuned = Hawk.from_pretrained(tmp_path / "base")
    tuned.set_trainable("paper")
    with pytest.raises(ValueError, match="base: is itself the base"):
        tuned.save_pretrained(tmp_path / "base", base=tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", base=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"tuned/config.json: its base {tmp_path}/base is not there.*--base"):
        Hawk.from_pretrained(tmp_path / "tuned")
    assert same(Hawk.from_pretrained(tmp_path / "tuned", base=tmp_path / "elsewhere"), tuned)
    build(seed=1).save_pretrained(tmp_path / "base")  # another model of the same shapes
    with pytest.raises(ValueError, match="base: is not what .*tuned was trained on"):
        Hawk.from_pretrained(tmp_path / "tuned")
    edit(tmp_path / "elsewhere", lambda t: t.update({NAME: t[NAME] + 1}))
    with pytest.raises(ValueError, match="elsewhere: is not what .*tuned was trained on"):
        Hawk.from_pretrained(tmp_path / "tuned", base=tmp_path / "elsewhere")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


NAME = "motion.queries"
BAD = {
    "unknown key": (lambda d: configure(d, vit_deepth=2), ["config.json", "'vit_deepth'"]),
    "wrong type": (lambda d: configure(d, vit_depth="2"), ["config.json", "vit_depth must be int", "'2'"]),
    "bool for int": (lambda d: configure(d, vit_depth=True), ["config.json", "vit_depth must be int"]),
    "wrong choice": (
        lambda d: configure(d, consistency="cosinus"),
        ["config.json", "consistency", "cosinus"],
    ),
    "heads": (lambda d: configure(d, vit_heads=5), ["config.json", "vit_dim 32", "5 vit_heads"]),
    "odd heads": (lambda d: configure(d, llama_heads=32), ["32 llama_heads", "evenly"]),
    "a part": (lambda d: configure(d, branches=["steps"]), ["config.json", "distinct words"]),
    "a method": (lambda d: configure(d, branches=["train"]), ["config.json", "distinct words"]),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "no object": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "cannot be read"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "cannot be read"]),
    "missing tensor": (lambda d: edit(d, lambda t: t.pop(NAME)), ["/model", "1 tensors are missing", NAME]),
    "wrong shape": (
        lambda d: edit(d, lambda t: t.update({NAME: torch.zeros(1, 3, 7)})),
        ["model.safetensors", NAME, "(1, 3, 7)", "(1, 3, 24)"],
    ),
    "unknown tensor": (
        lambda d: edit(d, lambda t: t.update(extra=torch.zeros(2))),
        ["model.safetensors", "extra", "(2,)"],
    ),
    "no rotation": (lambda d: configure(d, rope_theta=0.0), ["config.json", "rope_theta is 0.0"]),
    "cut header": (lambda d: cut(d / "model.safetensors", 100), ["model.safetensors", "cannot be read"]),
    "cut file": (lambda d: cut(d / "model.safetensors", -100), ["model.safetensors", "cannot be read"]),
    "empty file": (lambda d: cut(d / "model.safetensors", 0), ["model.safetensors", "cannot be read"]),
    "no file": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors", "cannot be read"]),
    "no base": (lambda d: configure(d, base="nowhere"), ["its base nowhere is not there", "--base"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_by_name(tmp_path, name):
    spoil, words = BAD[name]
    build().save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ValueError) as error:
        Hawk.from_pretrained(tmp_path / "model")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_a_folder_on_another_disk_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk").mkdir()
    build(1).save_pretrained(tmp_path / "disk/model")
    (tmp_path / "model").symlink_to("disk/model")
    for _ in range(2):
        with replaced_folder(tmp_path / "model") as new:
            build(2).save_pretrained(new)
    assert (tmp_path / "model").is_symlink() and same(build(2), Hawk.from_pretrained(tmp_path / "model"))
    (tmp_path / "disk/model").rename(tmp_path / "disk/model.being-replaced")  # killed between the renames
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and same(build(2), Hawk.from_pretrained(tmp_path / "model"))


def test_a_save_that_was_killed_can_be_undone(tmp_path):
    folder = tmp_path / "model"
    recover_folder(folder)  # nothing to do
    build(1).save_pretrained(folder)
    folder.rename(tmp_path / "model.being-replaced")  # killed here, between the two renames
    with (
        pytest.raises(OSError),
        replaced_folder(folder),
    ):  # the next attempt fails, and must not cost what there was
        raise OSError("No space left on device")
    assert same(build(1), Hawk.from_pretrained(folder))
    folder.rename(tmp_path / "model.being-replaced")
    recover_folder(folder)
    assert same(build(1), Hawk.from_pretrained(folder))
    (tmp_path / "model.being-written").mkdir()  # killed while writing
    (tmp_path / "model.old").mkdir()  # a user's copy
    with replaced_folder(folder) as new:
        (new / "file").touch()
    (tmp_path / "model.old").rmdir()
    assert [f.name for f in tmp_path.iterdir()] == ["model"] and [f.name for f in folder.iterdir()] == [
        "file"
    ]
