"""Downloads the released files, about 17 GB, from where their authors publish them.

    python -m apps.download --dry-run                  # which files, how large, which are there already
    python -m apps.download                            # LLaMA, vision encoder, Q-Former, Hawk -> downloads/
    python -m apps.download --what llama blip2 hawk    # vision encoder and Q-Former from BLIP-2's shards

The servers are asked for names and sizes. Without a connection, or before LLaMA-2's licence is accepted,
--dry-run lists what is known without asking (`KNOWN`), with URLs to download from by other means. A second
run resumes an interrupted one. `prepare.py weights` then converts the files into one folder of weights.
LLaMA-2 needs an account that has accepted its licence, and `hf auth login`.
"""

import errno
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apps import run_program
from apps.scores import lock
from data import read_json, replace_file
from sample import make_parser, note, print_error

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
KNOWN = {  # what --dry-run lists without asking: files, and their sizes in bytes, if known
    "llama": {"config.json": 1_000, "tokenizer.model": 500_000, "model-*.safetensors": 13_476_831_232},
    "vit": {"eva_vit_g.pth": 2_030_000_000},
    "qformer": {"blip2_pretrained_flant5xxl.pth": 433_000_000},
    "hawk": {"finetune.pth": 1_361_000_000},
    "hawk-pretrained": {"pretrained.pth": 1_361_000_000},
    "video-llama": {"VL_LLaMA_2_7B_Finetuned.pth": None},
    "blip2": {"model-*.safetensors": None},
}
HOW_KNOWN = """LLaMA: two bytes a parameter. Vision encoder, Q-Former: from logs of other people's downloads.
Hawk: four bytes for each trained parameter and for each of the optimizer's two moments."""
HINTS = {
    "GatedRepoError": "accept its licence at https://huggingface.co/REPO, then run `hf auth login` here",
    "RepositoryNotFoundError": "it is not on the hub (any more), or is private: try `hf auth login`",
}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@dataclass
class Download:
    file: Path
    size: int | None  # bytes, if the server gives them
    fetch: Callable  # downloads the file

    @property
    def done(self):
        return self.file.is_file() and self.size in (None, self.file.stat().st_size)


def ask(where, function, *arguments, **options):
    """Calls huggingface-hub; its errors become one line. Disk errors are left to `writing`."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # their classes change with the HTTP client that the library uses
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        name = type(error).__name__
        hint = HINTS.get(name, f"cannot be reached, or the connection was lost: try again ({name})")
        raise ValueError(f"{where}: {hint.replace('REPO', where)}") from error


@contextmanager
def writing(path):
    """A disk error becomes one line that names the file or folder, which the error itself does not."""
    try:
        yield
    except OSError as error:
        hint = "make room, or choose a folder on another disk, then run this again"
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); {hint}") from error


def hub_files(name, out):
    """The Downloads of one repository on the hub, as it is today."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    repo, pattern = HUB[name]
    listed = ask(repo, HfApi().model_info, repo, files_metadata=True).siblings
    listed = {file.rfilename: file for file in listed}
    wanted = [file for file in listed if re.fullmatch(pattern, file)]
    if not wanted:
        raise ValueError(f"{repo}: has no file like {pattern}")
    index = "model.safetensors.index.json"
    if name == "blip2" and index in wanted:
        wanted = [index, *vision_shards(repo, index)]
        if absent := [file for file in wanted if file not in listed]:
            raise ValueError(f"{repo}: its {index} names {absent[0]}, which is not there; try again later")
    folder = out / repo.split("/")[1]
    headers = build_hf_headers()  # with the user's token, if there is one
    downloads = []
    for file in wanted:
        lfs = listed[file].lfs  # None for small files
        options = {"headers": headers, "sha256": lfs and lfs.sha256}
        downloads.append(in_parts(repo, hf_hub_url(repo, file), folder / file, listed[file].size, **options))
    return downloads


def vision_shards(repo, index):
    """The shards of a BLIP-2 repository that hold more than its language model."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as scratch, writing(scratch):
        file = ask(repo, hf_hub_download, repo, index, local_dir=scratch)
        shard_of = read_json(Path(file), "weight_map")["weight_map"]
    return sorted({shard for name, shard in shard_of.items() if not name.startswith("language_")})


def url_files(name, out):
    """The Download of a file on a plain web server."""
    from huggingface_hub.file_download import get_hf_file_metadata

    url = URLS[name]
    about = ask(url, get_hf_file_metadata, url, token=False)
    return [in_parts(url, url, out / url.rpartition("/")[2], about.size, {}, etag=about.etag)]


def in_parts(where, url, file, size, headers, sha256=None, etag=None):
    """The Download of a file into FILE.part until it is complete. (hf_hub_download would start over, as it
    removes partial files.) where: what errors name. sha256, etag: None if the server gives none; they show
    whether a part belongs to the server's current file."""
    from huggingface_hub.file_download import http_get

    options = {"expected_size": size, "headers": headers | {"Accept-Encoding": "identity"}}

    def fetch():
        part = part_of(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        with writing(part), part.open("ab") as f:
            lock(f)  # two runs must not append to the same part
            if download.done:  # by another run, while this one waited
                part.unlink(missing_ok=True)
                return
            resume(f, size, etag)
            ask(where, http_get, url, f, resume_size=f.tell(), **options)
            f.flush()
            check_sum(part, where, sha256)
            part.rename(file)
            etag_of(part).unlink(missing_ok=True)

    download = Download(file, size, fetch)
    return download


def resume(f, size, etag):
    """Seeks to the end of what an earlier run left, or empties the part if it cannot belong to this file."""
    kept = etag_of(Path(f.name))
    known = kept.read_text() if kept.exists() else None
    f.seek(0, 2)
    # if the size is unknown, so is how much is missing
    if size is None or f.tell() > size or known != etag:
        f.seek(0)
        f.truncate()
        kept.unlink(missing_ok=True)
        if etag:
            replace_file(kept, etag)


def check_sum(part, where, sha256):
    """Removes a complete part that is not what the hub has, and raises ValueError."""
    if not sha256:
        return
    with part.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        hint = "perhaps of an older upload; it was removed: run this again"
        raise ValueError(f"{part}: its SHA-256 is not the one that {where} gives, {hint}")


def part_of(file):
    return file.with_name(file.name + ".part")


def etag_of(part):
    """The file that keeps the ETag of the file that a part belongs to."""
    return part.with_name(part.name + ".etag")


def sum_sizes(downloads):
    """In bytes, of those whose sizes the servers give."""
    return sum(download.size or 0 for download in downloads)


def check_space(out, missing):
    """ValueError if what is still to be downloaded does not fit on the disk."""
    needed = sum_sizes(missing)
    for download in missing:
        part = part_of(download.file)
        if part.is_file() and download.size is not None:
            needed -= part.stat().st_size
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def list_files(names, out):
    """Prints which files would be fetched, their sizes, and URLs where the server could not be asked."""
    total = 0
    guessed = False
    for name in names:
        try:
            files = find_files(name, out)
            sizes = {file.file: file.size for file in files}
            total += sum_sizes([file for file in files if not file.done])
            show(sizes, {file.file for file in files if file.done})
        except ValueError as error:
            note(f"note: {error}; this is what is known without asking")
            guessed = True
            total += list_known(name, out)
    print(f"{total / 1e9:8.3f} GB  to download" + (", about" if guessed else ""))
    if guessed:
        note(HOW_KNOWN)


def show(sizes, there, addresses=None):
    """One line per file. sizes: {file: bytes or None}; there: the downloaded ones; addresses: {file: URL}."""
    for file, size in sizes.items():
        amount = "unknown" if size is None else f"{size / 1e9:8.3f} GB"
        address = f"  {addresses[file]}" if addresses else ""
        print(f"{amount:>11}  {file}{address}" + ("  (there already)" if file in there else ""))


def list_known(name, out):
    """Prints the same for one name, from KNOWN -> bytes to download. Shards share one line: how many there
    are is not known."""
    repo, _ = HUB.get(name, ("", ""))
    folder = out / repo.split("/")[1] if repo else out
    sizes = {folder / file: size for file, size in KNOWN[name].items()}
    there = {file for file in sizes if any(folder.glob(file.name))}
    page = f"https://huggingface.co/{repo}/tree/main"
    show(sizes, there, dict.fromkeys(sizes, page if repo else URLS.get(name)))
    return sum(size or 0 for file, size in sizes.items() if file not in there)


def find_files(name, out):
    return hub_files(name, out) if name in HUB else url_files(name, out)


def download(names, out):
    """Lists the files with their sizes, then downloads those that are not there yet."""
    files = [file for name in names for file in find_files(name, out)]
    missing = [file for file in files if not file.done]
    show({file.file: file.size for file in files}, {file.file for file in files if file.done})
    print(f"{sum_sizes(missing) / 1e9:8.3f} GB  to download", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    check_space(out, missing)
    for file in missing:
        file.fetch()


def parse_args(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    told = "folder to fill (default: downloads)"
    add("--out", type=Path, default=Path("downloads"), metavar="DIR", help=told)
    add("--what", nargs="+", choices=[*HUB, *URLS], default=["llama", "vit", "qformer", "hawk"],
        help="default: llama vit qformer hawk. blip2 holds vit and qformer in one; video-llama and "
        "hawk-pretrained are other weights to start training from")  # fmt: skip
    add("--dry-run", action="store_true", help="only list files and sizes (approximate if offline)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.dry_run:
            list_files(args.what, args.out)
        else:
            download(args.what, args.out)
    except (OSError, ValueError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
