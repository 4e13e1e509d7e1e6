"""Downloads the released files, about 16 GB, from where their authors publish them.

    python -m apps.download --dry-run                  # which files, how large, which are there already
    python -m apps.download                            # LLaMA, vision encoder, Q-Former, Hawk -> downloads/
    python -m apps.download --what llama blip2 hawk    # vision encoder and Q-Former from BLIP-2's shards

A second call resumes where a first one was stopped. `prepare.py weights` then makes one folder of weights of
the files. LLaMA-2 needs an account that has accepted its licence, and `hf auth login`.
"""

import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prepare import read_json
from sample import Parser, print_error

SHARDS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
HUB = {  # repository on the Hugging Face hub, and the pattern of the files that are needed
    "llama": ("meta-llama/Llama-2-7b-chat-hf", r"config\.json|tokenizer\.model|" + SHARDS),
    "hawk": ("Jiaqi-hkust/hawk", r"finetune\.pth"),
    "hawk-pretrained": ("Jiaqi-hkust/hawk", r"pretrained\.pth"),
    "video-llama": ("DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned", r"VL_LLaMA_2_7B_Finetuned\.pth"),
    "blip2": ("Salesforce/blip2-flan-t5-xxl", SHARDS),
}
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
URLS = {"vit": f"{LAVIS}/eva_vit_g.pth", "qformer": f"{LAVIS}/blip2_pretrained_flant5xxl.pth"}
# What to expect without a connection, in GB: computed from the number of parameters and how they are stored
# (Hawk's checkpoint with the two moments of its optimizer), not read from the servers.
ABOUT = {"llama": 13.5, "vit": 2.0, "qformer": 0.4, "hawk": 1.4, "hawk-pretrained": 1.4}
HINTS = {
    "GatedRepoError": "accept its licence at https://huggingface.co/REPO, then run `hf auth login` here",
    "RepositoryNotFoundError": "it is not on the hub (any more), or is private: try `hf auth login`",
}


@dataclass
class Download:
    file: Path
    size: int  # bytes
    fetch: Callable  # downloads the file

    @property
    def done(self):
        return self.file.is_file() and self.file.stat().st_size == self.size


def ask(where, function, *arguments, **options):
    """Calls huggingface-hub; its errors become one line."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # their classes change with the HTTP client that the library uses
        name = type(error).__name__
        hint = HINTS.get(name, f"cannot be reached, or the connection was lost: try again ({name})")
        raise ValueError(f"{where}: {hint.replace('REPO', where)}") from error


def hub_files(name, out):
    """The Downloads of one repository on the hub, as it is today."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, pattern = HUB[name]
    listed = ask(repo, HfApi().model_info, repo, files_metadata=True).siblings
    sizes = {file.rfilename: file.size for file in listed}
    wanted = [file for file in sizes if re.fullmatch(pattern, file)]
    if not wanted:
        raise ValueError(f"{repo}: has no file like {pattern}")
    index = "model.safetensors.index.json"
    if name == "blip2" and index in wanted:
        wanted = [index, *vision_shards(repo, index)]
    folder = out / repo.split("/")[1]
    return [
        Download(
            folder / file, sizes[file], partial(ask, repo, hf_hub_download, repo, file, local_dir=folder)
        )
        for file in wanted
    ]


def vision_shards(repo, index):
    """The shards of a BLIP-2 repository that hold more than its language model."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as scratch:
        file = ask(repo, hf_hub_download, repo, index, local_dir=scratch)
        shard_of = read_json(Path(file), "weight_map")["weight_map"]
    return sorted({shard for name, shard in shard_of.items() if not name.startswith("language_")})


def url_files(name, out):
    """The Download of a file on a plain web server, into FILE.part until it is complete."""
    from huggingface_hub.file_download import get_hf_file_metadata, http_get

    url = URLS[name]
    file = out / url.rpartition("/")[2]
    size = ask(url, get_hf_file_metadata, url, token=False).size

    def fetch():
        part = part_of(file)
        with part.open("ab") as f:  # resumes from what an earlier call has left
            ask(url, http_get, url, f, resume_size=f.tell(), expected_size=size)
        part.rename(file)

    return [Download(file, size, fetch)]


def part_of(file):
    return file.with_name(file.name + ".part")


def check_space(out, missing):
    """ValueError if what is still to be downloaded does not fit on the disk."""
    needed = sum(download.size for download in missing)
    for download in missing:
        part = part_of(download.file)
        if part.is_file():
            needed -= part.stat().st_size
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def download(names, out, dry_run):
    """Lists the files with their sizes, then downloads those that are not there yet."""
    files = []
    for name in names:
        try:
            files += hub_files(name, out) if name in HUB else url_files(name, out)
        except ValueError as error:
            if not dry_run:
                raise
            size = f"about {ABOUT[name]:.1f} GB" if name in ABOUT else "of unknown size"
            address = f"https://huggingface.co/{HUB[name][0]}" if name in HUB else URLS[name]
            print(f"{name}: {size}, {address}\n    (not asked: {error})")
    missing = [file for file in files if not file.done]
    for file in files:
        print(f"{file.size / 1e9:8.3f} GB  {file.file}" + ("" if file in missing else "  (there already)"))
    total = sum(file.size for file in missing)
    print(f"{total / 1e9:8.3f} GB  to download", flush=True)
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        check_space(out, missing)
        for file in missing:
            file.fetch()


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("downloads"),
        metavar="DIR",
        help="folder to fill (default: downloads)",
    )
    add("--what", nargs="+", choices=[*HUB, *URLS], default=["llama", "vit", "qformer", "hawk"],
        help="default: llama vit qformer hawk. blip2 holds vit and qformer in one; video-llama and "
        "hawk-pretrained are other weights to start training from")  # fmt: skip
    add(
        "--dry-run",
        action="store_true",
        help="only list the files and their sizes, without a connection roughly",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        download(args.what, args.out, args.dry_run)
    except (OSError, ValueError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
