"""apps.download against a small server on this machine that speaks the part of the hub's protocol it needs.

The real hub is not asked, so this shows that the requests fit the installed huggingface-hub, not that the
published repositories still hold these files.
"""

import errno
import json
import re
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from apps import download, scores
from hawk import Hawk, HawkConfig

INDEX = {
    "vision_model.a": "model-00001-of-00003.safetensors",
    "language_model.b": "model-00002-of-00003.safetensors",
}
INDEX |= {
    "language_model.c": "model-00003-of-00003.safetensors",
    "qformer.d": "model-00001-of-00003.safetensors",
}
REPOSITORIES = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "config.json": b"{}",
        "tokenizer.model": b"pieces",
        "model-00001-of-00001.safetensors": b"weights" * 1000,
        "model.safetensors.index.json": b"{}",
        "pytorch_model-00001-of-00001.bin": b"the same again",
        "README.md": b"read me",
    },
    "Jiaqi-hkust/hawk": {"finetune.pth": b"hawk" * 1000, "pretrained.pth": b"webvid" * 10},
    "Salesforce/blip2-flan-t5-xxl": {shard: shard.encode() for shard in INDEX.values()}
    | {"model.safetensors.index.json": json.dumps({"weight_map": INDEX}).encode()},
}
FILES = {"/eva_vit_g.pth": bytes(range(256)) * 40, "/blip2.pth": b"qformer" * 50}


def large(name, body):
    """What the hub says in addition of large files."""
    about = {"size": len(body), "sha256": sha256(body).hexdigest(), "pointerSize": 134}
    return {"lfs": about} if name.endswith((".pth", ".safetensors")) else {}


class Hub(BaseHTTPRequestHandler):
    asked, tokens, gated = [], [], ()
    lengths, etag = True, {}

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers if Hub.lengths else headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        Hub.asked.append((self.command, path, wanted))
        Hub.tokens.append((path, self.headers.get("Authorization")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/main)?", path):
            if found[1] in Hub.gated:
                return self.reply(403, X_Error_Code="GatedRepo")
            if found[1] not in REPOSITORIES:
                return self.reply(404, X_Error_Code="RepoNotFound")
            siblings = [
                {"rfilename": n, "size": len(b), "blobId": "0"} | large(n, b)
                for n, b in REPOSITORIES[found[1]].items()
            ]
            body = json.dumps({"id": found[1], "sha": "0" * 40, "siblings": siblings}).encode()
            return self.reply(200, body, Content_Type="application/json")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            body = REPOSITORIES[found[1]][found[2]]
            if found[2].endswith((".pth", ".safetensors")):  # large files are on another server
                place = f"http://localhost:{self.server.server_port}/cdn/{found[1]}/{found[2]}"
                about = {"X_Linked_Size": len(body), "X_Repo_Commit": "0" * 40, "ETag": '"0"'}
                return self.reply(302, Location=place, **about)
            return self.send(body, wanted, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit="0" * 40)
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.send(REPOSITORIES[found[1]][found[2]], wanted)
        return self.send(FILES[path], wanted, **Hub.etag) if path in FILES else self.reply(404)

    def send(self, body, wanted, **headers):
        if start := int((wanted or "bytes=0-").removeprefix("bytes=").partition("-")[0]):
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.reply(206, body[start:], **headers)
        self.reply(200, body, Accept_Ranges="bytes", **headers)

    do_GET = do_HEAD = answer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that the library asks instead of the hub. Returns a function: arguments -> exit status."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # looks often for its shutdown
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.asked, Hub.tokens, Hub.gated = [], [], ()
    Hub.lengths, Hub.etag = True, {}
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(
        download, "URLS", {"vit": f"{address}/eva_vit_g.pth", "qformer": f"{address}/blip2.pth"}
    )
    monkeypatch.chdir(tmp_path)

    yield lambda *arguments: download.main(list(arguments))
    server.shutdown()
    server.server_close()


def gets():
    return [path for command, path, _ in Hub.asked if command == "GET" and not path.startswith("/api/")]


def test_dry_run_lists_and_fetches_nothing(hub, tmp_path, capsys):
    assert hub("--dry-run") == 0
    listed = capsys.readouterr().out
    assert "Llama-2-7b-chat-hf/model-00001-of-00001.safetensors" in listed and "GB  to download\n" in listed
    assert not any(name in listed for name in ("README", "pytorch_model", "pretrained.pth"))
    assert gets() == [] and list(tmp_path.iterdir()) == []


def test_dry_run_without_a_connection(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    gone = {name: f"http://127.0.0.1:9/{Path(url).name}" for name, url in download.URLS.items()}
    monkeypatch.setattr(download, "URLS", gone)
    assert hub("--dry-run") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    names = ["config.json", "tokenizer.model", "model-*.safetensors", "eva_vit_g.pth"]
    names += ["blip2_pretrained_flant5xxl.pth", "finetune.pth"]
    assert [Path(line.split()[2]).name for line in lines[:-1]] == names
    assert lines[2].startswith("  13.477 GB  downloads/") and "https://huggingface.co/meta-llama/" in lines[2]
    assert lines[3].endswith(gone["vit"]) and lines[-1].split()[0] == "17.301" and "about" in lines[-1]
    assert err.count("cannot be reached") == 4 and list(tmp_path.iterdir()) == []
    # files that are there; what nobody knows; and without --dry-run it is an error
    (tmp_path / "d").mkdir()
    (tmp_path / "d/eva_vit_g.pth").write_text("")
    assert hub("--dry-run", "--out", "d", "--what", "vit", "video-llama") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(there already)" in lines[0] and "unknown" in lines[1] and lines[2].split()[0] == "0.000"
    assert hub("--out", "d", "--what", "hawk") == 2


def test_dry_run_before_the_licence_is_accepted(hub, capsys):
    Hub.gated = ("meta-llama/Llama-2-7b-chat-hf",)
    assert hub("--dry-run") == 0
    out, err = capsys.readouterr()
    assert "model-*.safetensors" in out and "finetune.pth" in out and "accept its licence" in err


def test_what_is_known_fits_what_is_asked_for():
    """The table of --dry-run names the files that a download looks for; sizes that can be computed are."""
    assert download.KNOWN.keys() == download.HUB.keys() | download.URLS.keys()
    for name, files in download.KNOWN.items():
        for file in files:
            example = file.replace("*", "00001-of-00002")
            if name in download.HUB:
                assert re.fullmatch(download.HUB[name][1], example)
            else:
                assert download.URLS[name].endswith("/" + file)
    with torch.device("meta"):
        model = Hawk(HawkConfig.preset("7b"))
    model.set_trainable("paper")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    llama = sum(p.numel() for p in model.llama.parameters())
    assert 2 * llama == download.KNOWN["llama"]["model-*.safetensors"]
    assert 3 * 4 * trained == pytest.approx(download.KNOWN["hawk"]["finetune.pth"], rel=0.001)


def test_everything_is_downloaded_once(hub, tmp_path, capsys):
    assert hub("--out", "d") == 0
    assert (tmp_path / "d/hawk/finetune.pth").read_bytes() == REPOSITORIES["Jiaqi-hkust/hawk"]["finetune.pth"]
    assert (tmp_path / "d/Llama-2-7b-chat-hf/tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "d/eva_vit_g.pth").read_bytes() == FILES["/eva_vit_g.pth"]
    before = len(gets())
    assert hub("--out", "d") == 0
    assert len(gets()) == before and "there already" in capsys.readouterr().out


@pytest.fixture
def part(tmp_path):
    """What an earlier call has left: half of a file."""
    path = tmp_path / "d/eva_vit_g.pth.part"
    path.parent.mkdir()
    path.write_bytes(FILES["/eva_vit_g.pth"][:5000])
    return path


def test_a_stopped_download_resumes(hub, tmp_path, part):
    assert hub("--out", "d", "--what", "vit") == 0
    assert ("GET", "/eva_vit_g.pth", "bytes=5000-") in Hub.asked
    assert (tmp_path / "d/eva_vit_g.pth").read_bytes() == FILES["/eva_vit_g.pth"]
    assert not part.exists()


def test_a_stopped_download_from_the_hub_resumes(hub, tmp_path):
    """The user's token goes to the hub, and not to the server to which the hub sends for the file."""
    weights = REPOSITORIES["Jiaqi-hkust/hawk"]["finetune.pth"]
    part = tmp_path / "d/hawk/finetune.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights[:3000])
    assert hub("--out", "d", "--what", "hawk") == 0
    assert ("GET", "/cdn/Jiaqi-hkust/hawk/finetune.pth", "bytes=3000-") in Hub.asked
    assert [path.read_bytes() for path in part.parent.iterdir()] == [weights]
    assert all((token == "Bearer hf_test") != path.startswith("/cdn/") for path, token in Hub.tokens)


def test_only_what_is_missing_needs_space(hub, part, monkeypatch, capsys):
    missing = len(FILES["/eva_vit_g.pth"]) - 5000
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=missing - 1))
    assert hub("--out", "d", "--what", "vit") == 2
    assert "only 0.0 GB are free" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=missing))
    assert hub("--out", "d", "--what", "vit") == 0


def test_only_the_shards_that_are_needed(hub, tmp_path):
    assert hub("--out", "d", "--what", "blip2") == 0
    names = sorted(path.name for path in (tmp_path / "d/blip2-flan-t5-xxl").iterdir() if path.is_file())
    assert names == ["model-00001-of-00003.safetensors", "model.safetensors.index.json"]


def test_clear_messages(hub, monkeypatch, capsys):
    def error_of(what):
        assert hub("--what", what) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    Hub.gated = ("meta-llama/Llama-2-7b-chat-hf",)
    assert "accept its licence at https://huggingface.co/meta-llama/" in error_of("llama")
    assert "not on the hub" in error_of("video-llama")
    monkeypatch.setitem(download.URLS, "vit", download.URLS["vit"] + ".gone")
    assert "eva_vit_g.pth.gone: cannot be reached" in error_of("vit")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in error_of("hawk")


def only_error(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("what", ["vit", "blip2"])  # blip2: its index is read before the download
def test_a_full_disk_is_not_called_a_lost_connection(hub, part, monkeypatch, capsys, what, number):
    def write(*_, **__):
        raise OSError(number, "the disk says no")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", write)
    assert hub("--out", "d", "--what", what) == 2
    error = only_error(capsys)
    assert "cannot be written (the disk says no); make room" in error and "connection" not in error
    assert what == "blip2" or "d/eva_vit_g.pth.part: " in error
    assert part.stat().st_size == 5000  # to resume from


def test_a_part_longer_than_the_file_begins_again(hub, tmp_path, part):
    part.write_bytes(b"x" * (len(FILES["/eva_vit_g.pth"]) + 1))
    assert hub("--out", "d", "--what", "vit") == 0
    assert (tmp_path / "d/eva_vit_g.pth").read_bytes() == FILES["/eva_vit_g.pth"] and not part.exists()


def test_two_downloads_at_once(hub, tmp_path, part, monkeypatch, capsys):
    monkeypatch.setattr(scores, "LOCK_SECONDS", 0)
    with part.open("ab") as f:
        scores.lock(f)
        assert hub("--out", "d", "--what", "vit") == 2
        assert "another process is writing to it" in only_error(capsys) and part.stat().st_size == 5000
        # the other one ends while this one waits
        end = tmp_path / "d/eva_vit_g.pth"
        monkeypatch.setattr(download, "lock", lambda _: end.write_bytes(FILES["/eva_vit_g.pth"]))
        assert hub("--out", "d", "--what", "vit") == 0 and [*end.parent.iterdir()] == [end]


def test_a_server_that_gives_no_length(hub, tmp_path, part, capsys):
    """Nobody can tell how much of a part is missing, so it is not resumed."""
    Hub.lengths = False
    assert hub("--dry-run", "--out", "d", "--what", "vit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["unknown", "d/eva_vit_g.pth"] and lines[1].split()[0] == "0.000"
    assert hub("--out", "d", "--what", "vit") == 0
    assert (tmp_path / "d/eva_vit_g.pth").read_bytes() == FILES["/eva_vit_g.pth"] and not part.exists()
    asked = len(gets())
    assert hub("--out", "d", "--what", "vit") == 0 and len(gets()) == asked
    assert "(there already)" in capsys.readouterr().out


def test_a_part_of_an_older_upload_to_the_hub_is_found_out(hub, tmp_path, capsys):
    weights = REPOSITORIES["Jiaqi-hkust/hawk"]["finetune.pth"]
    part = tmp_path / "d/hawk/finetune.pth.part"
    part.parent.mkdir(parents=True)
    for length in (3000, len(weights)):  # of the same size when it is complete
        part.write_bytes(b"x" * length)
        assert hub("--out", "d", "--what", "hawk") == 2
        error = only_error(capsys)
        assert "finetune.pth.part: its SHA-256 is not the one" in error and "it was removed" in error
        assert [*part.parent.iterdir()] == []
    assert hub("--out", "d", "--what", "hawk") == 0
    assert [path.read_bytes() for path in part.parent.iterdir()] == [weights]


def test_a_part_of_another_etag_is_not_resumed(hub, tmp_path, part, monkeypatch):
    """The same one is, also if another download was stopped since."""
    whole = FILES["/eva_vit_g.pth"]

    def stop(url, f, **_):
        f.write(whole[f.tell() :][:1000])
        raise KeyboardInterrupt

    def stopped():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("huggingface_hub.file_download.http_get", stop)
            hub("--out", "d", "--what", "vit")
        return part.stat().st_size

    Hub.etag = {"ETag": '"one"'}
    assert stopped() == 1000  # nobody knows what the 5000 bytes that were there are of
    assert stopped() == 2000
    Hub.etag = {"ETag": '"two"'}
    assert stopped() == 1000
    Hub.etag = {}
    assert stopped() == 1000
    Hub.etag = {"ETag": '"two"'}
    assert stopped() == 1000
    assert hub("--out", "d", "--what", "vit") == 0
    assert ("GET", "/eva_vit_g.pth", "bytes=1000-") in Hub.asked
    assert [path.read_bytes() for path in part.parent.iterdir()] == [whole]
