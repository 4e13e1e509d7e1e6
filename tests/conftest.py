"""What several test files build on: a small random model with a tokenizer, two short clips and a broken
one."""

import os
import subprocess

# before torch: on the CPU, also where there is a GPU, and whatever the surroundings say
os.environ.update(CUDA_VISIBLE_DEVICES="", NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
os.environ.pop("RANK", None)
os.environ.pop("WORLD_SIZE", None)
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("HF_ENDPOINT", None)
import imageio_ffmpeg
import pytest
import sentencepiece
import torch

import sample
from hawk import PRESETS, Hawk, HawkConfig
from train import init_weights

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # test processes that share the cores must not also split them into threads
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TEXT = (
    "A red car drives the wrong way in the near lane. Nothing unusual happens on the road. "
    "What is it? It is a dog."
)
SMALL = dict(
    n_frames=4, image_size=28, vit_dim=32, vit_depth=1, qformer_dim=32, qformer_layers=1, llama_layers=1
)


def pytest_collection_modifyitems(items):
    """The longest file first, so that its tests do not run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


def in_int8(model):
    """The model with an int8 RowLinear for each linear layer of LLaMA, as `sample.load` makes it."""
    for name, module in list(model.llama.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.llama.set_submodule(name, sample.RowLinear(module, int8=True))
    return model


@pytest.fixture(scope="module")
def one_thread():
    """As in a loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with tokenizer.model, weights/, "a b.mp4" (6 frames), c.mp4 (3, fewer than n_frames) and
    broken.mp4."""
    folder = tmp_path_factory.mktemp("world")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = folder / "tokenizer.model"
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    torch.manual_seed(0)
    model = Hawk(HawkConfig.from_dict(PRESETS["tiny"] | SMALL | {"vocab_size": vocabulary})).apply(
        init_weights
    )
    model.save_pretrained(folder / "weights", tokenizer=tokenizer)
    for name, frames in (("a b", 6), ("c", 3)):
        source = f"testsrc=size=64x48:rate=5:duration={frames / 5}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source]
        subprocess.run([*command, folder / f"{name}.mp4"], check=True)
    (folder / "broken.mp4").write_text("no video")
    return folder
