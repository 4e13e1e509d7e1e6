"""What the model sees: the picture of the streams, the trace, attention, and the words without motion."""

import importlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from pretended_gpu import pretended_gpu

import data
import sample
from apps import look
from apps.toy import OBJECTS
from data import read_clip, read_index
from hawk import Hawk, HawkConfig, QFormerAttention, split_heads
from train import init_weights

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
SQUARES = np.random.default_rng(0).integers(0, 256, (7, 7, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)


def sliding(path, n_frames):
    """A video of 56×56 pixels in which everything moves two pixels to the left with each frame"""
    frames = np.stack([np.roll(SQUARES, -2 * k, axis=1) for k in range(n_frames)])
    raw = [*FFMPEG, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "56x56", "-i", "-", "-c:v", "ffv1", path]
    subprocess.run(raw, input=frames.tobytes(), check=True)
    return path


def pixels(picture):
    raw = [*FFMPEG, "-i", picture, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(subprocess.run(raw, capture_output=True).stdout, np.uint8)


def test_flow_colours():
    right, left, down, up = [8, 0], [-8, 0], [0, 4], [0, -8]
    found = look.flow_colours(np.float32([right, left, down, up, [0, 0]]))
    expected = np.array([[255, 0, 0], [0, 255, 255], [90, 180, 0], [128, 0, 255], [0, 0, 0]])
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 1
    assert not look.flow_colours(np.zeros((2, 3, 2))).any()


def test_flow_of_chosen_frames(tmp_path):
    slide = sliding(tmp_path / "slide.mkv", 6)
    flow = look.read_flow(slide, np.array([0, 3, 5]), 56)
    assert flow.shape == (3, 56, 56, 2)
    assert np.median(flow[:, 20:36, 20:36], axis=(1, 2)) == pytest.approx(np.tile([-2, 0], (3, 1)), abs=0.2)
    assert np.array_equal(
        flow[0], look.read_flow(slide, np.array([1]), 56)[0]
    )  # frame 1 stands in for frame 0
    (tmp_path / "pictures").mkdir()
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, "-i", slide, tmp_path / "pictures/%d.bmp"], check=True)
    expected = look.read_flow(tmp_path / "pictures", np.array([0, 3]), 56)
    (tmp_path / "pictures/6.bmp").write_bytes(b"BM, and no more")  # which is not wanted
    assert np.array_equal(look.read_flow(tmp_path / "pictures", np.array([0, 3]), 56), expected)
    assert np.abs(expected - flow[:2]).max() < 0.5


def test_a_row_for_each_stream_and_the_flow(world, tmp_path, capsys):
    slide = sliding(tmp_path / "slide.mkv", 6)
    png = tmp_path / "sheet 1.png"
    command = ["--video", str(slide), "--weights", str(world / "weights"), "--out"]
    assert look.main([*command, str(png)]) == 0
    assert "appearance, motion, flow" in capsys.readouterr().err
    sheet = pixels(png).reshape(88, 118, 3)
    assert (sheet[28:30] == 255).all() and (sheet[:, 58:60] == 255).all()  # white between the pictures
    whole = np.pad(sheet, ((0, 2), (0, 2), (0, 0))).reshape(3, 30, 4, 30, 3)
    rows = whole[:, :28, :, :28].swapaxes(1, 2)  # (4, 28, 28, 3) each
    clip = read_clip(slide, 4, 28)
    assert np.array_equal(rows[0], clip.appearance) and np.array_equal(rows[1], clip.motion)
    red, green, blue = rows[2][:, 8:20, 8:20].mean((0, 1, 2))  # cyan: to the left
    assert red < 10 and green > 80 and blue > 80
    assert sorted(os.listdir(tmp_path)) == [png.name, slide.name]


def test_one_stream_and_one_frame(tmp_path):
    still = sliding(tmp_path / "still.mkv", 1)
    sheet = look.motion_sheet(still, read_clip(still, 4, 28, branches=("appearance",)))
    assert sheet.shape == (58, 28, 3) and sheet[:28].any() and not sheet[30:].any()


@pytest.mark.parametrize(
    "video, out",
    [("a b.mp4", "nowhere/x.png"), ("a b.mp4", "a b.mp4"), ("broken.mp4", "x.png"), ("none", "x.png"),
     ("a b.mp4", "x.jpg"), ("a b.mp4", "x.PDF")],
)  # fmt: skip
def test_errors_are_one_line(world, capsys, video, out):
    before = (world / "a b.mp4").read_bytes()
    command = ["--video", world / video, "--out", world / out, "--weights", world / "weights"]
    assert look.main(list(map(str, command))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "tmp" not in err.replace(str(world), "") and not (world / "x.jpg").exists()
    assert (world / "a b.mp4").read_bytes() == before


@pytest.mark.parametrize("videos", [[], ["x", "--video", "y"]])
def test_one_video_is_looked_at(videos, capsys):
    with pytest.raises(SystemExit):
        look.main([*videos, "--out", "x.png"])
    assert "give the path of one video" in capsys.readouterr().err


# ---- The folder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(world):
    """(model, tokenizer, Look) of the small random model and a clip of six frames."""
    model, tokenizer = sample.load(world / "weights", "cpu")
    return model, tokenizer, look.look_at(model, tokenizer, world / "a b.mp4", max_new_tokens=5)


@pytest.fixture(scope="module")
def bundled():
    return sample.load(sample.TINY, "cpu")


def test_every_step_is_traced(seen):
    model, _, found = seen
    names = [step.name for step in found.steps]
    kinds = {re.sub(r"^(appearance|motion)\.", "BRANCH.", name) for name in names}
    kinds = {re.sub(r"\.\d+(…\d+)?$", ".N", kind) for kind in kinds}
    assert look.OUTPUTS.keys() <= kinds
    assert {f"{module}({argument[1]})" for module, argument in look.INPUTS.items()} <= kinds
    wanted = ["clip.indices", "flow", "vit(images)", "vit", "motion.qformer", "motion.video_qformer(context)"]
    wanted += ["motion.decoder_2", "encoding.tokens", "ids", "llama(x)", "llama", "logits", "answer"]
    assert [name for name in names if name in wanted] == wanted
    assert len(names) == len(set(names))
    shapes = {step.name: step.shape for step in found.steps}
    assert shapes["flow"] == (4, 28, 28, 2)
    assert shapes["vit(images)"] == (8, 3, 28, 28)
    assert shapes["vit"] == (8, 5, 32)
    assert shapes["motion.video_qformer(context)"] == (1, 4 * 16, 32)
    assert shapes["llama(x)"] == (1, len(found.prompt), 192)
    assert shapes["logits"] == (1, model.config.vocab_size)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_makers_are_there(seen):
    """Each "file:function" of the trace can be looked up, and those of layers are the functions that ran."""
    makers = {step.name: step.made_by for step in seen[2].steps}
    for maker in makers.values():
        file, _, function = maker.partition(":")
        assert callable(attrgetter(function)(importlib.import_module(file.removesuffix(".py")))), maker
    assert makers["flow"] == "data.py:farneback"
    assert makers["vit.patch_embed"] == "hawk.py:ViT.forward"  # a torch module, called there
    assert makers["vit"] == "hawk.py:ViT.forward"
    assert makers["motion.proj_0"] == "hawk.py:Branch.video"
    assert makers["llama(x)"] == "hawk.py:Hawk.embed"
    assert makers["answer"] == "hawk.py:Hawk.generate"


def test_equal_layers_share_a_line():
    trace = look.Trace()
    for i in range(3):
        trace.add("a layer", f"x.layers.{i}", torch.zeros(2, 3), look.spread)
    trace.add("a layer", "x.layers.3", torch.zeros(2, 4), look.spread)
    assert [step.name for step in trace.steps] == ["x.layers.0…2", "x.layers.3"]
    lines = trace.table().splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[3:] == [" 2 × 3 ", " float32 ", " `look.py:spread` ", ""]


def test_attention_is_the_modules_own():
    """The recomputed weights times the values give the module's own output."""
    torch.manual_seed(0)
    module = QFormerAttention(dim=24, heads=3, context_dim=40, dropout=0.5).apply(init_weights).eval()
    x = torch.randn(2, 5, 24)
    context = torch.randn(2, 7, 40)
    weights = look.attention_weights(module, x, context)
    assert weights.shape == (2, 3, 5, 7)
    assert weights.std(-1).min() > 1e-3  # not uniform, which any values would forgive
    y = (weights @ split_heads(module.value(context), 3)).transpose(1, 2).flatten(2)
    assert torch.allclose(module.norm(x + module.output(y)), module(x, context), atol=1e-5)


def test_attention_of_a_whole_model(bundled):
    """As the model runs: from the recorded weights follows what each cross-attention gave."""
    model, tokenizer = bundled
    made = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, QFormerAttention) and name.endswith("cross_attention"):

            def keep(module, inputs, output, name=name):
                made[name] = (module, *inputs, output)

            hooks.append(module.register_forward_hook(keep))
    found = look.look_at(model, tokenizer, EXAMPLES / "speeding.mp4", max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    assert made.keys() == found.attention.keys() and len(made) == 8
    with torch.no_grad():
        for name, (module, x, context, output) in made.items():
            values = split_heads(module.value(context), module.heads)
            y = (found.attention[name] @ values).transpose(1, 2).flatten(2)
            assert torch.allclose(module.norm(x + module.output(y)), output, atol=1e-4), name


def test_class_token_is_left_out():
    weights = torch.full((1, 2, 1, 5), 0.0)
    weights[0, 0, 0] = torch.tensor([0.6, 0.0, 0.4, 0.0, 0.0])
    weights[0, 1, 0] = torch.tensor([0.2, 0.0, 0.4, 0.4, 0.0])
    maps, class_share = look.patch_maps(weights)  # mean over both heads: 0.4, 0, 0.4, 0.2, 0
    assert torch.allclose(maps, torch.tensor([[[[0, 2 / 3], [1 / 3, 0]]]]))  # upper right, lower left
    assert class_share.item() == pytest.approx(0.4)


def test_shares_of_frames():
    weights = torch.tensor([0.1, 0.2, 0.0, 0.0, 0.3, 0.4]).view(1, 1, 1, 6)  # three frames of two tokens
    assert torch.allclose(look.frame_shares(weights, 3), torch.tensor([[0.3, 0.0, 0.7]]))


def test_bundled_queries_point_at_their_objects(bundled):
    """In both streams, query k looks at a patch with an object of kind k, or at most one beside it. At
    frame 8 of `speeding.mp4` a car and a truck move; trucks, a motorbike and a person stand; no bus."""
    found = look.look_at(*bundled, EXAMPLES / "speeding.mp4", max_new_tokens=1)
    (row,) = [row for row in read_index(EXAMPLES / "index.jsonl") if row["video"].endswith("speeding.mp4")]
    t = found.clip.indices.tolist().index(8)
    for branch, kinds in (("appearance", {"car", "truck", "person"}), ("motion", {"car", "truck"})):
        maps, class_share = look.patch_maps(look.layers_of(found.attention, f"{branch}.qformer")[0])
        for kind in kinds:
            k = OBJECTS.index(kind)
            y, x = divmod(maps[t, k].argmax().item(), 8)
            those = [entry for entry in row["objects"] if entry["object"] == kind]
            if branch == "motion":
                those = [entry for entry in those if not entry.get("parked")]
            far = [max(abs(x + 0.5 - 8 * e["x"][8]), abs(y + 0.5 - 8 * e["y"][8])) for e in those]
            assert min(far) < 1.5 and class_share[t, k] < 0.2, (branch, kind)
        assert class_share[t, OBJECTS.index("bus")] > 0.8
    assert class_share[t, OBJECTS.index("person")] > 0.8  # in the motion stream, nobody stands


def test_titles_say_what_a_query_was_trained_for(bundled):
    pytest.importorskip("matplotlib")
    found = look.look_at(*bundled, EXAMPLES / "normal.mp4", max_new_tokens=1)
    trained = [*OBJECTS, *[""] * 6]
    figure = look.draw_queries(found, "motion", 0, range(8, 12), trained)
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles == ["frame", "query 8\nfire", "query 9\ncrash", "query 10", "query 11"]
    caption = figure._supxlabel.get_text().replace("\n", " ")
    assert "Stage 0 trained query k" in caption and "class token is left out" in caption
    figure = look.draw_queries(found, "motion", 0, range(2), [""] * 16)
    assert "Stage 0" not in figure._supxlabel.get_text()


def test_words_are_those_that_were_said(seen):
    model, _, found = seen
    probabilities = look.word_probabilities(model, found, found.encoding.tokens)
    assert probabilities.shape == (len(found.answer), model.config.vocab_size)
    assert torch.allclose(probabilities.sum(-1), torch.ones(len(found.answer)))
    assert probabilities.argmax(-1).tolist() == found.answer  # greedy


def test_without_motion_only_the_motion_tokens_change(seen, world, tmp_path):
    model, tokenizer, found = seen
    without = look.without_motion(model, found)
    assert torch.equal(without[:, :32], found.encoding.tokens[:, :32])
    assert not torch.allclose(without[:, 32:], found.encoding.tokens[:, 32:], atol=1e-3)
    # a video that stands still already is what it is
    still = look.look_at(model, tokenizer, sliding(tmp_path / "still.mkv", 1), max_new_tokens=2)
    assert torch.allclose(look.without_motion(model, still), still.encoding.tokens, atol=1e-5)


def test_on_a_gpu(seen, world):
    """The same on a (pretended) GPU as on the CPU."""
    _, tokenizer, expected = seen
    with pretended_gpu() as device:
        model = Hawk.from_pretrained(world / "weights").to(device)
        found = look.look_at(model, tokenizer, world / "a b.mp4", max_new_tokens=5)
        assert found.steps == expected.steps and found.answer == expected.answer
        for name, weights in expected.attention.items():
            assert torch.allclose(found.attention[name], weights, atol=1e-5)
        probabilities = look.word_probabilities(model, found, look.without_motion(model, found))
        assert probabilities.numpy().shape == (len(found.answer), model.config.vocab_size)


def test_motion_decides_the_word(bundled):
    """The bundled model says "moves far too fast"; of the clip standing still, "moves along"."""
    model, tokenizer = bundled
    found = look.look_at(model, tokenizer, EXAMPLES / "speeding.mp4")
    place = [look.piece(tokenizer, token) for token in found.answer].index("far")
    still = look.word_probabilities(model, found, look.without_motion(model, found))[place]
    assert look.piece(tokenizer, still.argmax()) == "along"


def test_folder(world, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "look"
    command = ["--video", world / "a b.mp4", "--weights", world / "weights", "--out", out, "--words", 3]
    assert look.main([*map(str, command), "--question", "What costs $5 or $6?"]) == 0
    written = ["frames", "queries-appearance", "queries-appearance-2", "queries-motion", "queries-motion-2"]
    written = [f"{name}.png" for name in (*written, "video-queries", "words")]
    assert sorted(os.listdir(out)) == sorted([*written, "trace.md"])
    stdout, stderr = capsys.readouterr()
    text = (out / "trace.md").read_text()
    assert "What costs $5" in text and "| `llama(x)` " in text and stdout.startswith("| what")
    assert "words.png" in stderr
    for name in written:
        assert pixels(out / name).std() > 5  # something is drawn


def test_a_dollar_sign_is_no_formula(seen, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(look, "piece", lambda tokenizer, token: "$\\frac$")  # as a formula it is an error
    monkeypatch.setattr(look, "QUERIES_PER_PAGE", 1000)
    assert "words.png" in look.write_pictures(tmp_path, *seen, 0, False)


def test_three_branches_and_16_by_16_patches(world, tmp_path, monkeypatch, capsys):
    """The proportions of the 7B model: 16 × 16 patches, and only every second layer reads them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(data.MASKS, "background", lambda speed, kind: speed <= 0.2)
    sizes = dict(n_frames=5, image_size=224, vit_dim=16, vit_depth=2, vit_heads=2, vit_mlp=16, n_queries=11)
    sizes |= dict(qformer_dim=16, qformer_layers=3, qformer_heads=2, qformer_mlp=16, cross_every=2)
    sizes |= dict(llama_dim=16, llama_heads=2, llama_layers=1, llama_mlp=16, vocab_size=320, video_layers=1)
    vocabulary = data.Tokenizer(world / "tokenizer.model").vocab_size
    sizes |= dict(branches=("appearance", "motion", "background"), vocab_size=vocabulary)
    torch.manual_seed(0)
    model = Hawk(HawkConfig(**sizes)).apply(init_weights)
    model.save_pretrained(tmp_path / "weights", tokenizer=world / "tokenizer.model")
    out = tmp_path / "look"
    command = ["--video", world / "c.mp4", "--weights", tmp_path / "weights", "--out", out, "--words", 2]
    assert look.main([*map(str, command), "--layer", "2"]) == 0
    assert {"queries-background-2.png", "words.png"} <= set(os.listdir(out))
    text = (out / "trace.md").read_text()
    assert "`background.qformer.layers.0…2`" in text and "`test_look.py:" in text
    found = look.look_at(model.eval(), data.Tokenizer(world / "tokenizer.model"), world / "c.mp4")
    layers = look.layers_of(found.attention, "background.qformer")
    maps, _ = look.patch_maps(layers[1])
    assert len(layers) == 2 and maps.shape == (3, 11, 16, 16)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, 11), atol=1e-5)
    # --layer beyond those that read the frame
    capsys.readouterr()
    assert look.main([*map(str, command), "--layer", "3"]) == 2
    assert capsys.readouterr().err == "error: --layer 3: only 2 layers of the frame Q-Former read the frame\n"


def small(world, *branches):
    """A random model of the sizes of `world` with these branches."""
    stored = Hawk.from_pretrained(world / "weights").config
    torch.manual_seed(0)
    return Hawk(HawkConfig.from_dict(vars(stored) | {"branches": branches})).apply(init_weights).eval()


def test_appearance_alone_has_no_words_without_motion(world, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    small(world, "appearance").save_pretrained(tmp_path / "weights", tokenizer=world / "tokenizer.model")
    out = tmp_path / "look"
    command = ["--video", world / "c.mp4", "--weights", tmp_path / "weights", "--out", out, "--words", 2]
    assert look.main(list(map(str, command))) == 0
    assert (out / "video-queries.png").exists() and not (out / "words.png").exists()
    assert "no words.png: the model has no motion branch" in capsys.readouterr().err


def test_motion_alone(world):
    model = small(world, "motion")
    tokenizer = data.Tokenizer(world / "tokenizer.model")
    found = look.look_at(model, tokenizer, world / "c.mp4", max_new_tokens=2)
    assert found.clip.appearance.any() and len(found.attention) == 3
    assert not torch.allclose(look.without_motion(model, found), found.encoding.tokens, atol=1e-3)


@pytest.mark.parametrize("file", ["a b.mp4", "weights/config.json"])
def test_a_file_is_no_folder(world, tmp_path, capsys, file):
    shutil.copytree(world, tmp_path / "w")
    before = (tmp_path / "w" / file).read_bytes()
    command = [
        "--video",
        tmp_path / "w/c.mp4",
        "--weights",
        tmp_path / "w/weights",
        "--out",
        tmp_path / "w" / file,
    ]
    assert look.main(list(map(str, command))) == 2
    assert capsys.readouterr().err.startswith("error: --out ")
    assert (tmp_path / "w" / file).read_bytes() == before


def test_without_matplotlib(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["--video", world / "c.mp4", "--weights", world / "weights", "--out", tmp_path / "look"]
    assert look.main(list(map(str, command))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the pictures need matplotlib") and err.count("\n") == 1
    assert not (tmp_path / "look").exists()
    command[-1] = tmp_path / "sheet.png"  # needs none
    assert look.main(list(map(str, command))) == 0


def test_nobody_reads_what_is_printed(tmp_path, monkeypatch, capfd):
    """`… | true` ends quietly, as the other programs do."""
    pytest.importorskip("matplotlib")

    def load(*_):  # in the place of all that follows, and prints
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sample, "load", load)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # not of pytest's own output
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["look", "--video", "v.mp4", "--out", str(tmp_path / "out")])
    monkeypatch.delitem(sys.modules, "apps.look")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("apps.look", run_name="__main__")
    assert stop.value.code == 141 and "error" not in capfd.readouterr().err
