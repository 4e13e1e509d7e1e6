"""On a pretended GPU: what a CPU does there as well, and no tensor is on the wrong device. What a real GPU computes, how fast
and in how much memory, is for tests/bench.py."""

import json
import shutil
from argparse import Namespace

import bench
import pytest
import torch
from pretended_gpu import GPU, compute, pretended_gpu

import train
from data import farneback, motion_mask
from hawk import Hawk
from sample import Int8Linear, ask, encode_clips, load, look, quantize_int8

FRAMES = torch.randint(0, 256, (3, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


def test_the_pretended_gpu_knows_what_is_where(gpu):
    x = torch.arange(3.0, device="cuda")
    assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5] and x.device == torch.tensor([1], device=gpu).device == GPU
    assert x.cpu().numpy().sum() == 3 and x[torch.tensor([2])].item() == 2
    for mistake in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()], lambda: torch.cat([x, torch.ones(1)])):
        with pytest.raises(RuntimeError, match="are on the CPU, others on cuda:0"):
            mistake()
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()


def test_flow(gpu):
    first, second = FRAMES.float().mean(-1), FRAMES.roll(1, 2).float().mean(-1)
    flow = farneback(first.to(gpu), second.to(gpu))
    assert flow.device == GPU
    torch.testing.assert_close(flow.cpu(), farneback(first, second), rtol=0, atol=1e-4)
    for kind in ("hard", "soft"):
        pairs = FRAMES, FRAMES.roll(1, 2)
        assert motion_mask(*(x.to(gpu) for x in pairs), kind).cpu().equal(motion_mask(*pairs, kind))


@pytest.mark.parametrize(
    "options",
    [{}, dict(beams=3), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.3), dict(static=True), dict(int8=True)],
    ids=str,
)
def test_answers(world, gpu, options):
    model, tokenizer = load(world / "weights", "cpu")
    options = dict(options)
    model.static_cache, int8 = options.pop("static", False), options.pop("int8", False)
    if int8:
        quantize_int8(model)
    videos = [world / "a b.mp4", world / "c.mp4"]

    def answers():
        single = [ask(model, tokenizer, video, "What is it?", max_new_tokens=12, **options).answer for video in videos]
        seen = [look(model, video).clip for video in videos]  # of 4 frames and of 3
        prompts = [
            tokenizer.encode_prompt(q, c.message, model.config.n_visual) for q, c in zip("ab", seen, strict=True)
        ]
        return single, model.generate(None, None, prompts, 12, encoding=encode_clips(model, seen), **options)

    expected = answers()
    model.to(gpu)
    assert model.device == GPU and answers() == expected


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_int8_is_the_same_without_torch_s_slow_kernel(gpu, monkeypatch, rows):
    real = torch._C._dispatch_has_kernel_for_dispatch_key
    there = lambda name, key: "int8pack" in name or real(name, key)  # noqa: E731
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", there)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *_: pytest.fail("called"))
    linear = Int8Linear(torch.nn.Linear(32, 48, bias=False).bfloat16())
    x = torch.randn(rows, 1, 32).bfloat16()
    expected = torch.nn.functional.linear(x, linear.weight.bfloat16()) * linear.scale
    multiplied = set()

    def noted(function, args, kwargs):
        if str(function) == "aten.mul.Tensor":
            multiplied.update(x.dtype for x in args)
        return compute(function, args, kwargs)

    monkeypatch.setattr("pretended_gpu.compute", noted)
    y = linear.to(gpu)(x.to(gpu))
    assert multiplied == {torch.bfloat16, torch.float32}  # both bfloat16: torch.compile would put that kernel there
    assert y.dtype == torch.bfloat16 and y.cpu().equal(expected)


@pytest.mark.parametrize("more", ["--train lora --accumulate 2", "--train all --stage 1"])
def test_training(world, tmp_path, monkeypatch, more):
    row = {"description": "A red car.", "motion": "car drives"}
    rows = [json.dumps(row | {"video": str(world / name)}) + "\n" for name in ("a b.mp4", "c.mp4")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))

    def losses(device):
        options = ["--weights", world / "weights", "--data", tmp_path, "--out", tmp_path / "run", "--device", device]
        options += "--steps 2 --batch-size 2 --lr 1e-3 --warmup 1 --workers 0 --dtype float32".split() + more.split()
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, options)])
        train.main()
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        weights = dict(Hawk.from_pretrained(tmp_path / "run/last").named_parameters())
        shutil.rmtree(tmp_path / "run")
        return [line["total"] for line in lines] + [lines[-1]["held_out_total"]], weights

    expected, weights = losses("cpu")
    with pretended_gpu() as gpu:
        found, others = losses(gpu)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-3, msg=name)


def test_the_benchmark_s_gpu_parts_run(gpu, monkeypatch):
    small = bench.SMALL_EYES | dict(llama_dim=64, llama_layers=1, llama_heads=2, llama_mlp=128, vocab_size=500)
    for name, value in dict(SMALL_EYES=small, COPIED=1 << 16, SIDE=64).items():
        monkeypatch.setattr(bench, name, value)
    real = bench.medians
    monkeypatch.setattr(bench, "medians", lambda runs, repeat: real(runs, 1))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = {row["name"]: row for part in ("flow", "int8", "gpu") for row in bench.PARTS[part](Namespace(quick=True))}
    assert {"optical flow, 16 pairs, GPU", "int8, LLaMA 7B, GPU", "7B, bf16, batch 1, --compile"} < set(rows)
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows.values())
