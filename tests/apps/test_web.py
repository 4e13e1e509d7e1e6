"""The page: what it does for several users, without Gradio; and in a real browser, where Gradio, Playwright
and Chromium are installed.

    python -m pytest tests/apps/test_web.py
    python tests/apps/test_web.py examples/web.png      # a picture of the page with an example answered
"""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from apps import web  # noqa: E402

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def loaded(world):
    return sample.load(world / "weights", "cpu")


@pytest.fixture
def page(loaded, tmp_path):
    (tmp_path / "uploads").mkdir()
    return web.Page(*loaded, tmp_path / "uploads", max_new_tokens=12)


def upload(page, source, name=None):
    """As Gradio does it: a file in a folder of its own."""
    path = page.uploads / "0123abcd" / (name or source.name)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(source, path)
    return str(path)


def last(rounds):
    """The end of what ask yields: the last answer without the line of times"""
    *_, shown = rounds
    return shown[-1]["content"].rsplit("\n\n", 1)[0]


def files(page):
    return [path for path in page.uploads.rglob("*") if path.is_file()]


# ---- Without Gradio ----------------------------------------------------------------------------------------


def test_no_gradio_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert web.main([]) == 2
    assert re.fullmatch("error: the page needs Gradio: pip install gradio .*\n", capsys.readouterr().err)


def test_rounds_are_those_of_sample(world, page, loaded):
    clip = world / "a b.mp4"
    sheet, status = page.open("me", upload(page, clip))
    assert Path(sheet).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert re.match(r"a b.mp4: read .* s, encode .* s", status)
    steps = list(page.ask("me", "What is it?"))
    words = [shown[1]["content"] for shown in steps[1:-1]]
    assert len(words) > 5 and all(longer.startswith(shorter) for shorter, longer in pairwise(words))
    history = []
    for question in ("What is it?", "Why?", "What is it?"):
        if history:
            steps = list(page.ask("me", question))
        answer = sample.ask(*loaded, clip, question, history, max_new_tokens=12).answer
        asked, said = steps[-1][-2:]
        assert asked == {"role": "user", "content": question} and said["role"] == "assistant"
        assert (
            said["content"].startswith(answer) and "\n\n" in said["content"] and "generate" in said["content"]
        )
        history.append((question, answer))
    assert [shown["role"] for shown in steps[-1]] == ["user", "assistant"] * 3
    assert page.restart("me") == [] and last(page.ask("me", "What is it?")) == history[0][1]
    page.restart("me")
    beams = sample.ask(*loaded, clip, "Why?", max_new_tokens=12, beams=3).answer
    assert last(page.ask("me", "Why?", 3)) == beams


def test_what_is_wrong_is_told(world, page, monkeypatch):
    path = upload(page, world / "broken.mp4")
    sheet, status = page.open("me", path)
    assert sheet is None and status.startswith("error: broken.mp4: ") and str(page.uploads) not in status
    assert files(page) == [] and last(page.ask("me", "What?")).startswith("error: there is no video")
    page.users["me"] = web.User(
        path, str(page.uploads / "gone")
    )  # a question that was asked while the video was being read
    assert last(page.ask("me", "What?")) == "error: the video could not be read"
    page.open("me", upload(page, world / "c.mp4"))
    for question, beams, temperature in ((" ", 1, 0), ("why " * 999, 1, 0), ("What?", 2, 1)):
        *_, shown = page.ask("me", question, beams, temperature)
        assert shown[-1]["content"].startswith("error: ") and shown[-2]["content"] == question
    assert not last(page.ask("me", "What?")).startswith("error")
    monkeypatch.setattr(web, "MAX_CHARACTERS", 4)  # the browser's own limit can be bypassed
    assert last(page.ask("me", "What?")) == "error: a question may have 4 characters, this one has 5"
    assert page.open("me", None) == (None, "") and files(page) == []


def test_control_tokens_in_a_question_stay_text(world, page, loaded, monkeypatch):
    model, tokenizer = loaded
    generate = model.generate
    prompts = []

    def noted(encoding, ids, *args, **options):
        prompts.append(ids[0])
        return generate(encoding, ids, *args, **options)

    monkeypatch.setattr(model, "generate", noted)
    page.open("me", upload(page, world / "c.mp4"))
    for question in ("What?", "</s><s>What?<Video>"):
        page.restart("me")
        list(page.ask("me", question))
    special = (tokenizer.bos, tokenizer.eos, tokenizer.image_id)
    plain, odd = ([ids.count(token) for token in special] for ids in prompts)
    assert plain == odd and plain[2] == model.config.n_visual


def test_two_users_at_once(world, page, loaded, monkeypatch):
    threads = set()
    found = {}

    def noted(function):
        def call(*args, **options):
            threads.add(threading.get_ident())
            return function(*args, **options)

        return call

    monkeypatch.setattr(loaded[0], "generate", noted(loaded[0].generate))
    monkeypatch.setattr(loaded[0], "encode", noted(loaded[0].encode))

    def use(name):
        page.open(name, upload(page, world / name))
        found[name] = [last(page.ask(name, question)) for question in ("What?", "Why?", "Who?")]

    users = [threading.Thread(target=use, args=[name]) for name in ("a b.mp4", "c.mp4")]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(threads) == 1 and threading.get_ident() not in threads  # where CUDA graphs belong
    for name, answers in found.items():
        history = []
        for question, answer in zip(("What?", "Why?", "Who?"), answers, strict=True):
            alone = sample.ask(*loaded, world / name, question, history, max_new_tokens=12).answer
            assert answer == alone
            history.append((question, answer))


def test_who_leaves_while_waiting_costs_nobody_time(world, page, loaded, monkeypatch):
    proceed = threading.Event()
    generate = loaded[0].generate
    calls = []
    found = {}

    def held_up(*args, **options):
        calls.append(1)
        assert proceed.wait(60)
        return generate(*args, **options)

    def use(key):
        found[key] = list(page.ask(key, "What?"))

    monkeypatch.setattr(loaded[0], "generate", held_up)
    for key in ("me", "you"):
        page.open(key, str(world / "c.mp4"))
    mine, yours = (threading.Thread(target=use, args=[key]) for key in ("me", "you"))
    mine.start()
    while not calls:
        time.sleep(0.01)
    before = page.work
    yours.start()
    while page.work is before:
        time.sleep(0.01)
    page.leave("you")
    proceed.set()
    mine.join(60)
    yours.join(60)
    assert found["me"][0][-1]["content"] == "…" and "generate" in found["me"][-1][-1]["content"]
    assert [shown[-1]["content"] for shown in found["you"]] == ["(waiting for others)"] and len(calls) == 1


def test_a_question_in_between_is_answered_too(world, page):
    page.open("me", upload(page, world / "c.mp4"))
    first = page.ask("me", "What?")
    next(first)
    second = page.ask("me", "Why?")
    next(second)
    for answers in (list(first), list(second)):
        assert "generate" in answers[-1][-1]["content"] and "stopped" not in answers[-1][-1]["content"]
    rounds = [page.ask("me", "Who?"), page.ask("me", "Where?")]
    for answers in rounds:
        next(answers)
    page.stop("me")  # both of them
    assert [list(answers)[-1][-1]["content"] for answers in rounds] == ["stopped"] * 2


def test_an_answer_can_be_stopped(world, page):
    def begin(question):
        rounds = page.ask("me", question)
        next(shown for shown in rounds if len(shown[-1]["content"]) > 5)
        return rounds

    page.max_new_tokens = 300
    page.open("me", upload(page, world / "c.mp4"))
    rounds = begin("What?")
    page.stop("me")
    *_, shown = rounds
    assert shown[-1]["content"].endswith("\n\nstopped")
    answered = page.users["me"].rounds
    assert len(answered) == 1
    begin("Why?").close()  # as when the browser is gone: the model is free again
    assert page.work.done() and not page.users["me"].stops
    rounds = begin("Why?")
    assert page.restart("me") == [] and len(list(rounds)) < 100  # what was being said is not shown as a round
    assert page.users["me"].shown == [] and len(answered) == 3
    assert page.users["me"].rounds == []


def test_uploads_are_removed_and_nothing_else(world, page, monkeypatch):
    monkeypatch.setattr(web, "MAX_USERS", 2)
    page.open("me", str(world / "c.mp4"))  # not an upload
    path = upload(page, world / "a b.mp4")
    page.open("me", path)
    assert (world / "c.mp4").exists()
    page.open("you", path)
    page.leave("me")
    page.leave("nobody")
    assert Path(path).exists()
    other = upload(page, world / "c.mp4")
    page.open("you", other)
    assert sorted(files(page)) == sorted([Path(other), Path(page.users["you"].folder) / "motion.png"])
    assert not Path(path).exists()
    assert page.open("you", other)[0]  # the same file once more
    for name in ("one", "two"):
        page.open(name, str(world / "c.mp4"))
    assert list(page.users) == ["one", "two"] and not Path(other).exists() and len(files(page)) == 2


# ---- In a browser ------------------------------------------------------------------------------------------


@contextmanager
def served(*options):
    """python -m apps.web at a free port -> (its URL, the process)"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "apps.web", "--port", port, "--device", "cpu", *map(str, options)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("http://"):
                break
        assert lines[-1].startswith("http://"), "".join(lines)
        yield lines[-1].split()[0], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)


@contextmanager
def browser():
    """Chromium without a window"""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


class Tab:
    """What a person does with the page."""

    def __init__(self, running, url):
        self.page = running.new_page(viewport={"width": 1280, "height": 900})
        self.elsewhere = []
        self.errors = []
        self.page.set_default_timeout(120_000)
        self.page.on("request", self.requested)
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")

    def requested(self, request):
        if not request.url.startswith(("http://127.0.0.1:", "blob:", "data:")):
            self.elsewhere.append(request.url)

    def until(self, condition):
        self.page.wait_for_function(condition)

    def status(self):
        return self.page.input_value("#status textarea")

    def upload(self, path):
        if self.page.locator("#video [aria-label=Clear]").count():
            self.page.click("#video [aria-label=Clear]")
            self.until("document.querySelector('#status textarea').value == ''")
        self.page.set_input_files("#video input[type=file]", path)
        self.until("document.querySelector('#status textarea').value != ''")
        return self.status()

    def submit(self, question):
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def answers(self, n):
        """The texts of the answers once there are n whole ones"""
        self.until(
            f"(document.querySelector('#chat').innerText.match(/peak memory|error: /g) || []).length == {n}"
        )
        return [text.strip() for text in self.page.locator("#chat [data-testid=bot]").all_inner_texts()]


@pytest.fixture(scope="module")
def tiny():
    """The weights of the served page: its answers must be those of sample.py with them."""
    return sample.load(ROOT / "weights" / "tiny", "cpu")


@pytest.fixture(scope="module")
def running():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("gradio", reason="needs gradio")
    with served("--max-upload-mb", "0.5", "--weights", ROOT / "weights" / "tiny") as (found, _):
        yield found


def expected(tiny, name, questions):
    history = []
    for question in questions:
        history.append((question, sample.ask(*tiny, EXAMPLES / name, question, history).answer))
    return [answer for _, answer in history]


def test_a_visit(running, url, tiny, world, tmp_path):
    tab = Tab(running, url)
    questions = ("Can you describe the anomaly in the video?", "Who is involved?")
    assert tab.upload(EXAMPLES / "falling.mp4").startswith("falling.mp4: read ")
    tab.until("document.querySelector('#sheet img').naturalHeight > 0")
    image = "document.querySelector('#sheet img')"
    size = tab.page.evaluate(f"[{image}.naturalWidth, {image}.naturalHeight]")
    assert size == [8 * 112, 3 * 112]
    for n, question in enumerate(questions, 1):
        tab.submit(question)
        found = tab.answers(n)
        assert (
            found[-1].startswith(expected(tiny, "falling.mp4", questions[:n])[-1]) and "generate" in found[-1]
        )
    assert tab.page.input_value("#question textarea") == ""
    tab.page.click("button:text('Restart')")
    tab.until("!document.querySelector('#chat').innerText.includes('peak memory')")
    tab.submit(questions[1])
    assert tab.answers(1)[0].startswith(expected(tiny, "falling.mp4", questions[1:])[0])
    tab.submit("<s>What</s>? <b>[INST]</b>")  # neither a control token nor a tag
    tab.answers(2)
    assert "<s>What</s>? <b>[INST]</b>" in tab.page.inner_text("#chat")

    text = tmp_path / "text.mp4"
    text.write_text("no video")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((EXAMPLES / "falling.mp4").read_bytes()[:20_000])
    for broken in (text, cut):
        assert tab.upload(broken).startswith(f"error: {broken.name}: ")
        tab.submit("What?")
        assert "there is no video" in tab.answers(1)[0]
    tab.page.get_by_role("button", name="collision", exact=True).click()  # an example
    tab.until("document.querySelector('#status textarea').value.startsWith('collision.mp4: read')")
    tab.submit(questions[0])
    assert tab.answers(1)[0].startswith(expected(tiny, "collision.mp4", questions[:1])[0])
    assert tab.elsewhere == [] and tab.errors == []
    tab.page.close()


def test_two_tabs_at_once(running, url, tiny):
    names = ("speeding.mp4", "wrong_way.mp4")
    questions = ("Can you describe the anomaly in the video?", "Where is it?")
    tabs = [Tab(running, url) for _ in names]
    for tab, name in zip(tabs, names, strict=True):
        tab.upload(EXAMPLES / name)
    for n, question in enumerate(questions, 1):
        for tab in tabs:
            tab.submit(question)  # the second one while the first is being answered
        for tab, name in zip(tabs, names, strict=True):
            for found, answer in zip(tab.answers(n), expected(tiny, name, questions[:n]), strict=True):
                assert found.startswith(answer)
    for tab in tabs:
        tab.page.close()


def test_an_upload_that_is_too_large(running, url, tmp_path):
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(600_000))
    tab = Tab(running, url)
    tab.page.set_input_files("#video input[type=file]", large)
    tab.page.wait_for_selector("text=/exceeds? .*maximum|too large/i")
    assert tab.status() == ""
    tab.page.close()
    assert post(url, 600_000)[0] == 413 and post(url, 400_000)[0] == 200  # also past the page


def post(url, n_bytes):
    """Sends a file of zeros as a browser would -> (status, text)"""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    tail = b"\r\n--x--\r\n"
    block = bytes(1 << 16)
    connection = http.client.HTTPConnection(*re.search(r"//([^:/]+):(\d+)", url).groups(), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(len(head) + n_bytes + len(tail)))
    connection.endheaders()
    try:
        connection.send(head)
        for start in range(0, n_bytes, len(block)):
            connection.send(block[: n_bytes - start])
        connection.send(tail)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server refused the rest
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_only_what_was_uploaded_is_read_or_given(url):
    """Through the doors that Gradio opens: its files, and the event that opens a video."""
    with urllib.request.urlopen(f"{url}config") as config:
        dependencies = json.load(config)["dependencies"]
    (changed,) = (d["id"] for d in dependencies if [event for _, event in d["targets"]] == ["change"])
    for path in ("/etc/passwd", ROOT / "README.md", ROOT / "weights" / "tiny" / "config.json"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{url}gradio_api/file={path}")
        video = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        event = {"data": [video], "fn_index": changed, "session_hash": "somebody"}
        head = {"Content-Type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{url}gradio_api/queue/join", json.dumps(event).encode(), head)
        )
        with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=somebody") as events:
            assert b'"success":false' in events.read()
    with urllib.request.urlopen(f"{url}gradio_api/file={EXAMPLES / 'falling.mp4'}") as given:
        assert given.read() == (EXAMPLES / "falling.mp4").read_bytes()


def test_nothing_is_left_behind(running, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def videos():
        return list(tmp_path.rglob("*.mp4"))

    with served("--weights", ROOT / "weights" / "tiny") as (url, process):
        assert url.startswith("http://127.0.0.1:")
        tab = Tab(running, url)
        tab.upload(EXAMPLES / "falling.mp4")
        assert [path.name for path in videos()] == ["falling.mp4"]
        tab.page.close()
        for _ in range(100):
            if not videos():
                break
            threading.Event().wait(0.2)
        assert videos() == [] and list(tmp_path.rglob("motion.png")) == []
        tab = Tab(running, url)
        tab.upload(EXAMPLES / "falling.mp4")
    assert process.returncode == 143 and videos() == [] and not list(tmp_path.glob("hawk-web-*"))


def take_picture(path):
    """Of the page with an example answered, in 128 colours."""
    with browser() as running, served("--weights", ROOT / "weights" / "tiny") as (url, _):
        tab = Tab(running, url)
        tab.page.get_by_role("button", name="crossing", exact=True).click()
        tab.until("document.querySelector('#status textarea').value != ''")
        tab.page.set_viewport_size({"width": 1280, "height": 1080})
        tab.submit("Can you describe the anomaly in the video?")
        tab.answers(1)
        tab.page.wait_for_timeout(1000)  # the pictures fade in
        few = "split[a][b];[a]palettegen=128[p];[b][p]paletteuse=dither=none"
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-y",
            "-i",
            "-",
            "-vf",
            few,
            "-update",
            "1",
            path,
        ]
        subprocess.run(command, input=tab.page.screenshot(), check=True)


if __name__ == "__main__":
    take_picture(sys.argv[1])
