"""Ask about a video in the browser: upload one, see what the motion branch sees of it, chat.

    python -m apps.web                                        # http://127.0.0.1:7860, for this machine only
    python -m apps.web --host 0.0.0.0 --port 8000             # for everyone who reaches the port: there is no password
    python -m apps.web --weights weights/hawk-7b --max-upload-mb 1000

Needs Gradio (`pip install gradio`; written for version 6). Each user has a chat of their own, sample.py's, whose video is
read and encoded once; one question at a time goes through the model, the others wait. A video that was uploaded is
removed when its user chooses another one or leaves the page, and at the latest when the program ends. Nothing is sent to
anyone else: no share link, no telemetry, no fonts from elsewhere.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from queue import SimpleQueue

from data import DESCRIBE_QUESTIONS, SYSTEM
from sample import (
    PROBLEMS,
    Chat,
    Parser,
    add_model_options,
    complain,
    load_from_options,
    motion_sheet,
    note,
    number,
    small_world,
    write_picture,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_USERS = 32  # whose clips are held, 10 MB each at the real size; then the one who came first is forgotten
MOST_BEAMS, MOST_LETTERS = 8, 4000
CSS = "#video button[aria-label^=Trim] {display: none}"  # for trimming, Gradio's page loads a program from elsewhere

# ----------------------------------------------------------------------------------------------------------------------
# What the page does, without Gradio


class Stopped(Exception):
    """The user does not want to read on."""


@dataclass
class User:
    path: str
    chat: Chat
    folder: str  # of the picture
    shown: list = field(default_factory=list)  # messages {"role", "content"}
    stop: bool = False


def message(role, content):
    return {"role": role, "content": content}


class Page:
    """A chat for each user, known by any key. All that the model does is done in one thread: one thing after the other,
    and CUDA graphs (--compile) belong to the thread that recorded them. Files are written and removed in the folder
    `uploads` only."""

    def __init__(self, model, tokenizer, uploads, max_new_tokens=128):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.uploads, self.users = Path(uploads), {}
        self.thread, self.work = ThreadPoolExecutor(1), Future()  # work: what the thread was last asked to do
        self.work.set_result(None)

    def do(self, function, *args):
        self.work = self.thread.submit(function, *args)
        return self.work

    def open(self, key, path):
        """Another video, or None -> (path of the motion sheet or None, what to say about it). The rounds begin anew."""
        self.leave(key, path)
        if path is None:
            return None, ""
        while len(self.users) >= MOST_USERS:
            self.leave(next(iter(self.users)))
        user = User(path, Chat(self.model, self.tokenizer, SYSTEM, {}), tempfile.mkdtemp(dir=self.uploads))
        self.users[key] = user
        try:
            self.do(user.chat.open, path).result()
            write_picture(motion_sheet(path, user.chat.seen.clip), f"{user.folder}/motion.png")
        except PROBLEMS as error:
            if self.users.get(key) is user:
                self.leave(key)
            return None, f"error: {error}".replace(f"{Path(path).parent}/", "")
        return f"{user.folder}/motion.png", f"{Path(path).name}: {user.chat.waited}"

    def ask(self, key, question, beams=1, temperature=0.0):
        """Yields the messages to show as the words are made; what is wrong is told there too."""
        user, asked = self.users.get(key), message("user", question)
        if user is None:
            yield [asked, message("assistant", "error: there is no video; upload one or take an example")]
            return
        user.stop, pieces, said, notes = False, SimpleQueue(), "", []
        yield [*user.shown, asked, message("assistant", "…" if self.work.done() else "(waiting for others)")]
        work = self.do(self.answer, user, question, beams, temperature, pieces.put, notes.append)
        work.add_done_callback(lambda _: pieces.put(None))
        try:
            for piece in iter(pieces.get, None):
                said += piece
                yield [*user.shown, asked, message("assistant", said)]
        finally:  # also if nobody takes the words any more
            user.stop = True
            wait([work])
        try:
            work.result()
        except (Stopped, CancelledError):
            notes.append("stopped")
        except PROBLEMS as error:
            notes.append(f"error: {error}")
        if self.users.get(key) is user:  # else there is another video or no chat any more
            user.shown += [asked, message("assistant", f"{said.strip()}\n\n{'; '.join(notes)}".strip())]
            yield user.shown

    def answer(self, user, question, beams, temperature, write, tell):
        """One round, in the model's thread."""
        if beams > 1 and temperature > 0:
            raise ValueError("several beams go with temperature 0 only")
        if len(question) > MOST_LETTERS:  # the page's own limit is the browser's
            raise ValueError(f"a question may have {MOST_LETTERS} letters, this has {len(question)}")

        def unless_stopped(text):
            if user.stop:
                raise Stopped
            write(text)

        if user.stop:  # while others were answered
            raise Stopped
        generation = {"beams": beams, "temperature": temperature, "max_new_tokens": self.max_new_tokens}
        user.chat.generation = generation
        user.chat.say(question, unless_stopped, tell)

    def close(self):
        """At the end of the program: what is being said stops at the next word."""
        for user in list(self.users.values()):
            user.stop = True
        self.thread.shutdown(cancel_futures=True)

    def stop(self, key):
        if key in self.users:
            self.users[key].stop = True

    def restart(self, key):
        """Forgets the rounds, keeps the video -> messages to show"""
        if user := self.users.get(key):
            user.stop = True  # what is still being said goes to the old chat
            chat = copy(user.chat)
            chat.history = []
            self.users[key] = User(user.path, chat, user.folder)
        return []

    def leave(self, key, kept=None):
        """Forgets this user, and removes the upload unless it is `kept`, or another user has uploaded the same file."""
        if user := self.users.pop(key, None):
            user.stop = True
            shutil.rmtree(user.folder, ignore_errors=True)
            shared = user.path == kept or any(other.path == user.path for other in list(self.users.values()))
            if not shared and self.uploads in Path(user.path).parents:
                Path(user.path).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# What it looks like


def build(gr, page, examples):
    """The page in Gradio's terms. Each browser tab is a user: its session's name is the key."""
    private = {"api_visibility": "private", "show_progress": "hidden"}
    model = {"concurrency_limit": None}  # the page decides who waits

    def open_video(path, request: gr.Request):
        return *page.open(request.session_hash, path), []

    def ask(question, beams, temperature, request: gr.Request):
        for shown in page.ask(request.session_hash, question, beams, temperature):
            yield [m | {"content": escape(m["content"], quote=False)} for m in shown], ""  # Gradio takes it for HTML

    def stop(request: gr.Request):
        page.stop(request.session_hash)

    def restart(request: gr.Request):
        return page.restart(request.session_hash)

    def leave(request: gr.Request):
        page.leave(request.session_hash)

    with gr.Blocks(title="Hawk", analytics_enabled=False, delete_cache=(600, 7200)) as blocks:
        gr.Markdown("# Hawk\nWhat is abnormal in this video? Upload one, or take an example, and ask.")
        with gr.Row():
            with gr.Column(scale=2):
                video = gr.Video(label="Video", sources=["upload"], buttons=[], height=270, elem_id="video")
                status = gr.Textbox(show_label=False, interactive=False, container=False, elem_id="status")
                gr.Examples([[str(path)] for path in examples], video, example_labels=[path.stem for path in examples])
                beams = gr.Slider(1, MOST_BEAMS, 1, step=1, label="Beams")
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest word)")
            with gr.Column(scale=3):
                sheet = gr.Image(
                    show_label=False, interactive=False, buttons=["fullscreen"], height=270, elem_id="sheet"
                )
                gr.Markdown("Frames; what the motion branch sees of them; optical flow (right is red, left cyan).")
                chatbot = gr.Chatbot(
                    label="Chat", render_markdown=False, height=320, buttons=["copy"], feedback_options=None,
                    elem_id="chat",
                )  # fmt: skip
                question = gr.Textbox(
                    DESCRIBE_QUESTIONS[0],
                    label="Question",
                    max_length=MOST_LETTERS,
                    submit_btn=True,
                    elem_id="question",
                )
                with gr.Row():
                    stopping, restarting = gr.Button("Stop"), gr.Button("Restart")
        video.change(open_video, video, [sheet, status, chatbot], **private, **model)
        question.submit(ask, [question, beams, temperature], [chatbot, question], **private, **model)
        stopping.click(stop, **private, queue=False)
        gr.on([restarting.click, chatbot.clear], restart, None, chatbot, **private, queue=False)
        blocks.unload(leave)
    return blocks


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=number(int, 1, 65535), default=7860, help="default: 7860")
    add("--max-upload-mb", type=number(float, 0.001), default=200, help="largest video that is taken (default: 200)")
    add("--max-new-tokens", type=number(int, 1), default=128, help="longest answer (default: 128)")
    add_model_options(p)
    return p.parse_args(argv)


def serve(gr, page, args):
    """Until ctrl-C or SIGTERM."""
    examples = sorted(EXAMPLES.glob("*.mp4")) if small_world(page.model.config) else []
    gr.set_static_paths([str(path) for path in examples])  # served from where they are, not copied
    blocks = build(gr, page, examples)
    try:
        _, url, _ = blocks.queue(api_open=False).launch(
            server_name=args.host, server_port=args.port, max_file_size=int(args.max_upload_mb * 1e6), share=False,
            prevent_thread_lock=True, quiet=True, footer_links=[], ssr_mode=False, mcp_server=False,
            css=CSS, theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError:  # which speaks of settings that this program does not have
        raise OSError(f"cannot listen at {args.host}, port {args.port}; if it is in use, take another --port") from None
    note(f"{url}  (ctrl-C ends)")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
        page.close()


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hawk-web-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}  # read when it is imported
        try:
            import gradio
        except ImportError as error:
            complain(f"the page needs Gradio: pip install gradio ({error})")
            return 2
        try:
            serve(gradio, Page(*load_from_options(args), uploads, args.max_new_tokens), args)
        except PROBLEMS as error:
            complain(error)
            return 2


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that the uploads are removed
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
