"""What several test files build on: a small random model with a tokenizer, two short clips and a file that is none."""

import os
import subprocess

import imageio_ffmpeg
import pytest
import sentencepiece
import torch

from hawk import PRESETS, Hawk, HawkConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side must not share the cores among their threads as well
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TEXT = "A red car drives the wrong way in the near lane. Nothing unusual happens on the road. What is it? It is a dog."
SMALL = dict(n_frames=4, image_size=28, vit_dim=32, vit_depth=1, qformer_dim=32, qformer_layers=1, llama_layers=1)


def pytest_collection_modifyitems(items):
    """The longest file first, so that its tests do not run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


@pytest.fixture(scope="module")
def one_thread():
    """As in a loader process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, two clips and a broken one."""
    folder = tmp_path_factory.mktemp("world")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    model = Hawk(HawkConfig.from_dict(PRESETS["tiny"] | SMALL | {"vocab_size": vocabulary}))
    model.save_pretrained(folder / "weights", tokenizer=folder / "tokenizer.model")
    for name, frames in (("a b", 6), ("c", 3)):  # one is shorter than n_frames
        source = f"testsrc=size=64x48:rate=5:duration={frames / 5}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, folder / f"{name}.mp4"]
        subprocess.run(command, check=True)
    (folder / "broken.mp4").write_text("no video")
    return folder
