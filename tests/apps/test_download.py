"""apps.download against a small server on this machine that speaks the part of the hub's protocol it needs.

The real hub is not asked, so this shows that the requests fit the installed huggingface-hub, not that the
published repositories still hold these files.
"""

import json
import re
import subprocess
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from apps import download

ROOT = Path(__file__).parents[2]
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


class Hub(BaseHTTPRequestHandler):
    asked, gated = [], ()

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        Hub.asked.append((self.command, path, wanted))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/main)?", path):
            if found[1] in Hub.gated:
                return self.reply(403, X_Error_Code="GatedRepo")
            if found[1] not in REPOSITORIES:
                return self.reply(404, X_Error_Code="RepoNotFound")
            siblings = [
                {"rfilename": n, "size": len(b), "blobId": "0"} for n, b in REPOSITORIES[found[1]].items()
            ]
            body = json.dumps({"id": found[1], "sha": "0" * 40, "siblings": siblings}).encode()
            return self.reply(200, body, Content_Type="application/json")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            body = REPOSITORIES[found[1]][found[2]]
            return self.send(body, wanted, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit="0" * 40)
        return self.send(FILES[path], wanted) if path in FILES else self.reply(404)

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
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.asked, Hub.gated = [], ()
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
    assert "Llama-2-7b-chat-hf/model-00001-of-00001.safetensors" in listed and "to download" in listed
    assert not any(name in listed for name in ("README", "pytorch_model", "pretrained.pth"))
    assert gets() == [] and list(tmp_path.iterdir()) == []


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


def test_dry_run_without_a_connection_says_roughly_what_to_expect(monkeypatch, tmp_path, capsys):
    def offline(name, out):
        raise ValueError(f"{name}: cannot be reached, or the connection was lost: try again (OSError)")

    monkeypatch.setattr(download, "hub_files", offline)
    monkeypatch.setattr(download, "url_files", offline)
    assert download.main(["--dry-run", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("about ") == 4 and "13.5 GB" in told and "eva_vit_g.pth" in told
    assert download.main(["--out", str(tmp_path)]) == 2


def test_the_card_of_the_published_weights_names_options_that_exist():
    """docs/PUBLISHED.md: five commands, and a fine-tune."""
    text = (ROOT / "docs" / "PUBLISHED.md").read_text()
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 8
    helps = {}
    for _, *words in commands:
        program = words[: 2 if words[0] in ("-m", "prepare.py") else 1]
        if tuple(program) not in helps:
            done = subprocess.run(
                [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
            )
            helps[tuple(program)] = re.findall(r"--[\w-]+", done.stdout)
        used = [word for word in words if word.startswith("--")]
        assert set(used) <= set(helps[tuple(program)]), (program, used)
