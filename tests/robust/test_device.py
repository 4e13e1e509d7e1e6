"""On a pretended GPU: the results of the CPU, and no tensor on the wrong device. What a real GPU computes,
how fast and in how much memory, is for tests/bench.py."""

import json
import shutil
from argparse import Namespace

import bench
import pytest
import torch
from pretended_gpu import GPU, Graph, compute, pretended_gpu, record

import train
from data import farneback, usable_device
from hawk import Hawk
from sample import RowLinear, ask, encode_clips, encode_video, generate, load

FRAMES = torch.randint(0, 256, (3, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


def test_the_pretended_gpu_knows_where_tensors_are(gpu):
    x = torch.arange(3.0, device="cuda")
    assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5]
    assert x.device == torch.tensor([1], device=gpu).device == GPU
    assert x.cpu().numpy().sum() == 3 and x[torch.tensor([2])].item() == 2
    for mistake in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3)[x.long()],
        lambda: torch.cat([x, torch.ones(1)]),
    ):
        with pytest.raises(RuntimeError, match="are on the CPU, others on cuda:0"):
            mistake()
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()


def test_the_pretended_gpu_replays_what_it_recorded(gpu):
    x = torch.arange(3.0, device=gpu)
    graph = Graph()
    with record(graph):
        y = (x * 2)[1:]
        x.add_(1)
        for look in (x.tolist, x.cpu, lambda: x[0].item()):
            with pytest.raises(RuntimeError, match="while a CUDA graph is recorded"):
                look()
    assert y.tolist() == [2, 4] and x.tolist() == [1, 2, 3]
    graph.replay()
    assert y.tolist() == [4, 6] and x.tolist() == [2, 3, 4]


def test_flow(gpu):
    first = FRAMES.float().mean(-1)
    second = FRAMES.roll(1, 2).float().mean(-1)
    flow = farneback(first.to(gpu), second.to(gpu))
    assert flow.device == GPU
    torch.testing.assert_close(flow.cpu(), farneback(first, second), rtol=0, atol=1e-4)


def test_the_device_becomes_the_current_one(gpu, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert usable_device("cuda:0") == gpu and chosen == [gpu]
    assert usable_device("cpu") == torch.device("cpu") and chosen == [gpu]


OPTIONS = [{}, dict(beams=3), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.3), dict(int8=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers(world, gpu, options):
    model, tokenizer = load(world / "weights", "cpu", int8=options.get("int8", False))
    options = {name: value for name, value in options.items() if name != "int8"}
    videos = [world / "a b.mp4", world / "c.mp4"]

    def answers():
        single = [
            ask(model, tokenizer, video, "What is it?", max_new_tokens=12, **options).answer
            for video in videos
        ]
        clips = [encode_video(model, video).clip for video in videos]  # of 4 frames and of 3
        prompts = [
            tokenizer.encode_prompt(question, clip.message, model.config.n_visual)
            for question, clip in zip("ab", clips, strict=True)
        ]
        return single, generate(model, encode_clips(model, clips), prompts, max_new_tokens=12, **options)

    expected = answers()
    model.to(gpu)
    assert model.device == GPU and answers() == expected
    recorded = [isinstance(getattr(step.run, "__self__", None), Graph) for step in model.steps.values()]
    assert any(recorded) or "beams" in options


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_int8_without_torch_s_slow_kernel(gpu, monkeypatch, rows):
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *_: pytest.fail("called"))
    linear = RowLinear(torch.nn.Linear(32, 48, bias=False).bfloat16(), int8=True)
    x = torch.randn(rows, 1, 32).bfloat16()
    expected = torch.nn.functional.linear(x, linear.weight.bfloat16()) * linear.scale
    multiplied = set()

    def noted(function, args, kwargs):
        if str(function) == "aten.mul.Tensor":
            multiplied.update(x.dtype for x in args)
        return compute(function, args, kwargs)

    monkeypatch.setattr("pretended_gpu.compute", noted)
    y = linear.to(gpu)(x.to(gpu))
    assert multiplied == {
        torch.bfloat16,
        torch.float32,
    }  # were both bfloat16, torch.compile would use that kernel
    assert y.dtype == torch.bfloat16 and y.cpu().equal(expected)


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_goes_through_the_triton_kernel(gpu, monkeypatch, int8):
    calls = []

    class Kernel:
        def __class_getitem__(cls, grid):
            def launch(x, weight, scale, y, N, K, **sizes):
                calls.append((grid, N, K, sizes))
                y.copy_(torch.nn.functional.linear(x, weight.float()) * (1 if scale is None else scale))

            return launch

    monkeypatch.setattr("sample.triton", True)
    monkeypatch.setattr("sample.row_product", Kernel, raising=False)
    linear = RowLinear(torch.nn.Linear(32, 50, bias=False), int8)
    x = torch.randn(3, 1, 32)
    expected = linear(x)
    linear.to(gpu)
    with torch.no_grad():
        rows = torch.cat([linear(row.to(gpu)[None]) for row in x])
    assert calls == [((7,), 50, 32, {"ROWS": 8, "BLOCK": 1024})] * 3
    assert rows.shape == (3, 1, 50)
    torch.testing.assert_close(rows.cpu(), expected)
    linear(x.to(gpu))  # a batch is left to the plain product
    assert len(calls) == 3
    with torch.enable_grad():  # the kernel has no backward pass
        linear(x[:1].to(gpu))
    assert len(calls) == 3


@pytest.mark.parametrize("lora", [False, True])
def test_what_loading_puts_in_place(world, tmp_path, lora):
    """--compile and --int8 multiply single rows by a kernel, which needs a C compiler. By default nothing
    does, and a LoRA stays what it is."""
    model = Hawk.from_pretrained(world / "weights")
    if lora:
        model.set_trainable("lora")
    model.save_pretrained(tmp_path, tokenizer=world / "weights/tokenizer.model")

    def kinds(**options):
        llama = load(tmp_path, "cpu", **options)[0].llama
        attention = llama.layers[0].self_attn
        parts = (attention.q_proj, attention.o_proj, llama.layers[0].mlp.down_proj, llama.lm_head)
        return [type(part).__name__ for part in parts]

    q = "LoRALinear" if lora else "Linear"
    assert kinds() == [q, "Linear", "Linear", "Linear"]
    assert kinds(compile=True) == [q, "Linear", "RowLinear", "RowLinear"]
    if not lora:
        assert kinds(int8=True) == ["RowLinear"] * 4


@pytest.mark.parametrize("more", ["--train lora --accumulate 2", "--train all --stage 1"])
def test_training(world, tmp_path, more):
    row = {"description": "A red car.", "motion": "car drives"}
    rows = [json.dumps(row | {"video": str(world / name)}) + "\n" for name in ("a b.mp4", "c.mp4")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))

    def losses(device):
        options = [
            "--weights",
            world / "weights",
            "--data",
            tmp_path,
            "--out",
            tmp_path / "run",
            "--device",
            device,
        ]
        options += (
            "--steps 2 --batch-size 2 --lr 1e-3 --warmup 1 --workers 0 --dtype float32".split() + more.split()
        )
        train.main([*map(str, options)])
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        weights = dict(Hawk.from_pretrained(tmp_path / "run/last").named_parameters())
        shutil.rmtree(tmp_path / "run")
        return [line["total"] for line in lines] + [lines[-1]["held_out_total"]], weights

    expected, weights = losses("cpu")
    with pretended_gpu():
        found, others = losses("cuda")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-3, msg=name)


def test_the_benchmark_s_gpu_parts_run(gpu, monkeypatch):
    small = bench.SMALL_TOWERS | dict(
        llama_dim=64, llama_layers=1, llama_heads=2, llama_mlp=128, vocab_size=500
    )
    for name, value in dict(SMALL_TOWERS=small, REAL_TOWERS=small, COPIED=1 << 16, SIDE=64).items():
        monkeypatch.setattr(bench, name, value)
    real = bench.medians
    monkeypatch.setattr(bench, "medians", lambda runs, repeat: real(runs, 1))
    monkeypatch.setattr(bench, "peer_generation", lambda new: ({1: 1.0, 8: 1.0}, {1: 1.0, 8: 1.0}))
    full = Hawk.generate
    monkeypatch.setattr(Hawk, "generate", lambda *inputs, **more: full(*inputs[:3], 4, **more))  # 4 words
    tiny = "testsrc2=size=64x48:rate=5:duration=2"
    monkeypatch.setattr(bench, "make_video", lambda path, _: bench.ffmpeg("-f", "lavfi", "-i", tiny, path))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = {
        row["name"]: row
        for part in ("flow", "decoding", "answer", "gpu")
        for row in bench.PARTS[part](Namespace(quick=True))
    }
    assert rows.keys() > {"optical flow, 16 pairs, GPU", "7B, batch 8", "7B, batch 1, --int8 --compile"}
    answers = [rows.pop(f"video to 64 words, 7B, GPU{how}") for how in ("", ", --int8")]
    assert all(row["ours"] > 0 for row in answers)
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows.values())
