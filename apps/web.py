"""Ask about a video in the browser: upload one, see what the branches see of it, chat.

    python -m apps.web                                    # http://127.0.0.1:7860, this machine only
    python -m apps.web --host 0.0.0.0 --port 8000         # for everyone who can reach the port: no password
    python -m apps.web --weights weights/hawk-7b --max-upload-mb 1000

Needs Gradio (`pip install gradio`; written for version 6). Each user has a chat of their own,
whose video is read and encoded once. One question at a time goes through the model; the others wait. An
uploaded video is removed when its user chooses another one or leaves the page, and at the latest when the
program ends. Nothing is sent anywhere else: no share link, no telemetry, no fonts from other servers.

In this file: what the page does, what it looks like, the command line.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from queue import SimpleQueue

from apps.look import motion_sheet, write_picture
from data import DESCRIBE_QUESTIONS, usable_device
from sample import (
    HELP,
    PROBLEMS,
    TINY,
    TINY_NOTE,
    Seen,
    add_model_options,
    ask,
    encode_video,
    load,
    make_parser,
    note,
    number,
    print_error,
    remarks,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
# those that the small weights know
QUESTIONS = [DESCRIBE_QUESTIONS[0], *re.findall(r"\w[^?:]*\?", " ".join(HELP.splitlines()[1:]))]
MAX_USERS = 32  # whose clips are kept, 10 MB each at the 7B size; beyond that, the oldest user is forgotten
MAX_BEAMS = 8
MAX_CHARACTERS = 4000  # of a question
CSS = (
    "#video button[aria-label^=Trim] {display: none}"  # for trimming, the page would load code from elsewhere
)

# ---- What the page does, without Gradio --------------------------------------------------------------------


class Stopped(Exception):
    """The user does not want to read the rest."""


@dataclass
class User:
    path: str
    folder: str  # of the picture
    seen: Seen | None = None  # the video, read and encoded
    rounds: list = field(default_factory=list)  # [question, answer]
    shown: list = field(default_factory=list)  # messages {"role", "content"}
    stops: set = field(default_factory=set)  # an Event for each question that is waiting or being answered

    def stop(self):
        for stop in list(self.stops):
            stop.set()


def message(role, content):
    return {"role": role, "content": content}


class Page:
    """A chat for each user; any key may identify a user.

    The model works in one thread only: questions are answered one after the other, and CUDA graphs belong to
    the thread that captured them. Files are written and removed in the folder `uploads` only."""

    def __init__(self, model, tokenizer, uploads, max_new_tokens=300):
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.uploads = Path(uploads)
        self.users = {}
        self.thread = ThreadPoolExecutor(1, initializer=usable_device, initargs=[model.device])
        self.work = Future()  # the last work that the thread was given
        self.work.set_result(None)

    def submit(self, function, *args):
        self.work = self.thread.submit(function, *args)
        return self.work

    def open(self, key, path):
        """Another video, or None -> (path of the motion sheet or None, what to say). The chat starts over."""
        self.leave(key, kept=path)
        if path is None:
            return None, ""
        while len(self.users) >= MAX_USERS:
            self.leave(next(iter(self.users)))
        user = User(path, tempfile.mkdtemp(dir=self.uploads))
        self.users[key] = user
        picture = f"{user.folder}/motion.png"
        try:
            self.submit(self.encode, user).result()
            write_picture(motion_sheet(path, user.seen.clip), picture)
        except PROBLEMS as error:
            if self.users.get(key) is user:
                self.leave(key)
            return None, f"error: {error}".replace(f"{Path(path).parent}/", "")
        seconds = user.seen.seconds
        status = f"{Path(path).name}: read {seconds['read']:.2f} s, encode {seconds['encode']:.2f} s"
        return picture, "; ".join([status, *user.seen.clip.notes])

    def encode(self, user):
        """In the model's thread, before any question of this user."""
        user.seen = encode_video(self.model, user.path)

    def ask(self, key, question, beams=1, temperature=0.0):
        """Yields the messages to show as the answer is made; errors are among them."""
        user = self.users.get(key)
        asked = message("user", question)
        if user is None:
            yield [asked, message("assistant", "error: there is no video; upload one or take an example")]
            return
        stop = threading.Event()
        user.stops.add(stop)
        yield [*user.shown, asked, message("assistant", "…" if self.work.done() else "(waiting for others)")]
        texts = SimpleQueue()  # the answer, longer and longer
        said = ""
        notes = []
        work = self.submit(self.answer, user, stop, question, beams, temperature, texts.put, notes.append)
        work.add_done_callback(lambda _: texts.put(None))
        try:
            for said in iter(texts.get, None):
                yield [*user.shown, asked, message("assistant", said)]
        finally:  # also if the browser is gone
            stop.set()
            user.stops.discard(stop)
            wait([work])
        try:
            work.result()
        except (Stopped, CancelledError):
            notes.append("stopped")
        except PROBLEMS as error:
            notes.append(f"error: {error}")
        if self.users.get(key) is user:  # otherwise the user has another video by now, or is gone
            answer = "\n\n".join([said, *notes]).strip()
            user.shown += [asked, message("assistant", answer)]
            yield user.shown

    def answer(self, user, stop, question, beams, temperature, write, tell):
        """One round, in the model's thread. Gives write() the text so far, and tell() the remarks."""
        if beams > 1 and temperature > 0:
            raise ValueError("several beams need temperature 0")
        if len(question) > MAX_CHARACTERS:  # the browser has this limit too, but it can be bypassed
            raise ValueError(f"a question may have {MAX_CHARACTERS} characters, this one has {len(question)}")
        rounds = user.rounds
        turn = [question, ""]
        made = []

        def show(tokens):
            if stop.is_set():
                raise Stopped
            made.extend(tokens)
            turn[1] = self.tokenizer.decode(made).rstrip("\ufffd")  # a character whose bytes are incomplete
            write(turn[1])

        if user.seen is None:
            raise ValueError("the video could not be read")
        if stop.is_set():  # while others were answered
            raise Stopped
        options = {"beams": beams, "temperature": temperature, "max_new_tokens": self.max_new_tokens}
        try:
            answer = ask(self.model, self.tokenizer, user.seen, question, rounds, on_token=show, **options)
            turn[1] = answer.answer
            write(turn[1])  # a beam search shows nothing until it ends
        finally:  # an answer that was stopped counts as far as it got
            if turn[1]:
                rounds.append(turn)
        user.seen = user.seen._replace(seconds={})  # later rounds do not read and encode it again
        tell(remarks(answer))

    def stop(self, key):
        if key in self.users:
            self.users[key].stop()

    def restart(self, key):
        """Forgets the rounds, keeps the video -> messages to show"""
        user = self.users.get(key)
        if user is not None and user.seen is not None:
            user.stop()  # an answer in progress goes to the old rounds
            self.users[key] = User(user.path, user.folder, user.seen)
        return []

    def leave(self, key, kept=None):
        """Forgets a user. Removes the upload unless it is `kept`, or another user's as well."""
        user = self.users.pop(key, None)
        if user is None:
            return
        user.stop()
        shutil.rmtree(user.folder, ignore_errors=True)
        in_use = {other.path for other in list(self.users.values())} | {kept}
        if user.path not in in_use and self.uploads in Path(user.path).parents:
            Path(user.path).unlink(missing_ok=True)

    def close(self):
        """At the end of the program. An answer in progress stops at its next token."""
        for user in list(self.users.values()):
            user.stop()
        self.thread.shutdown(cancel_futures=True)


# ---- What it looks like ------------------------------------------------------------------------------------


def build(gr, page, examples):
    """The page in Gradio's terms. Each browser tab is a user, with its session's name as the key. examples:
    videos that the small weights can describe; none for other weights."""

    def open_video(path, request: gr.Request):
        return *page.open(request.session_hash, path), []

    def ask(question, beams, temperature, request: gr.Request):
        for shown in page.ask(request.session_hash, question, beams, temperature):
            # Gradio treats messages as HTML
            yield [m | {"content": escape(m["content"], quote=False)} for m in shown], ""

    def stop(request: gr.Request):
        page.stop(request.session_hash)

    def restart(request: gr.Request):
        return page.restart(request.session_hash)

    def leave(request: gr.Request):
        page.leave(request.session_hash)

    rows = ", ".join(f"what the {name} branch sees" for name in page.model.config.branches)
    with gr.Blocks(title="Hawk", analytics_enabled=False, delete_cache=(600, 7200)) as blocks:
        gr.Markdown("# Hawk\nWhat is abnormal in this video? Upload one, or take an example, and ask.")
        if examples:
            gr.Markdown(f"Note: {TINY_NOTE}.", elem_id="note")
        with gr.Row():
            with gr.Column(scale=2):
                video = gr.Video(label="Video", sources=["upload"], buttons=[], height=270, elem_id="video")
                status = gr.Textbox(show_label=False, interactive=False, container=False, elem_id="status")
                names = [path.stem for path in examples]
                gr.Examples([[str(path)] for path in examples], video, example_labels=names)
                beams = gr.Slider(1, MAX_BEAMS, 1, step=1, label="Beams")
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest word)")
            with gr.Column(scale=3):
                sheet = gr.Image(
                    show_label=False, interactive=False, buttons=["fullscreen"], height=270, elem_id="sheet"
                )
                gr.Markdown(f"From top to bottom: {rows}, optical flow (right is red, left is cyan).")
                chatbot = gr.Chatbot(
                    label="Chat", render_markdown=False, height=320, buttons=["copy"], feedback_options=None,
                    elem_id="chat",
                )  # fmt: skip
                question = gr.Textbox(
                    DESCRIBE_QUESTIONS[0], label="Question", max_length=MAX_CHARACTERS, submit_btn=True,
                    elem_id="question",
                )  # fmt: skip
                if examples:
                    gr.Examples([[text] for text in QUESTIONS], question, label="What these weights know")
                with gr.Row():
                    stop_button = gr.Button("Stop")
                    restart_button = gr.Button("Restart")
        private = {"api_visibility": "private", "show_progress": "hidden"}
        unlimited = {"concurrency_limit": None}  # the page decides who waits
        video.change(open_video, video, [sheet, status, chatbot], **private, **unlimited)
        question.submit(ask, [question, beams, temperature], [chatbot, question], **private, **unlimited)
        stop_button.click(stop, **private, queue=False)
        gr.on([restart_button.click, chatbot.clear], restart, None, chatbot, **private, queue=False)
        blocks.unload(leave)
    return blocks


# ---- Command line ------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=number(int, 1, 65535), default=7860, help="default: 7860")
    add(
        "--max-upload-mb",
        type=number(float, 0.001),
        default=200,
        help="largest accepted video (default: 200)",
    )
    add("--max-new-tokens", type=number(int, 1), default=300, help="longest answer (default: 300)")
    add_model_options(p)
    return p.parse_args(argv)


def serve(gr, page, args):
    """Until ctrl-C or SIGTERM."""
    examples = []
    if args.weights.resolve() == TINY:  # the examples show the toy world
        examples = sorted(EXAMPLES.glob("*.mp4"))
    gr.set_static_paths([str(path) for path in examples])  # served from where they are, not copied
    blocks = build(gr, page, examples)
    try:
        _, url, _ = blocks.queue(api_open=False).launch(
            server_name=args.host, server_port=args.port, max_file_size=int(args.max_upload_mb * 1e6),
            share=False, prevent_thread_lock=True, quiet=True, footer_links=[], ssr_mode=False,
            mcp_server=False, css=CSS, theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError:  # its message is about settings that this program does not have
        text = f"cannot listen at {args.host}, port {args.port}; if it is in use, choose another --port"
        raise OSError(text) from None
    note(f"{url}  (ctrl-C ends)")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
        page.close()


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hawk-web-") as uploads:
        # Gradio reads these when it is imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        try:
            import gradio
        except ImportError as error:
            return print_error(f"the page needs Gradio: pip install gradio ({error})")
        try:
            model, tokenizer = load(args.weights, args.device, args.dtype, args.int8, args.compile)
            serve(gradio, Page(model, tokenizer, uploads, args.max_new_tokens), args)
        except PROBLEMS as error:
            return print_error(error)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that the uploads are removed
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
