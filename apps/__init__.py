"""Optional programs on top of the five files. Run: `python -m apps.NAME`."""

import os
import signal
import sys
from contextlib import contextmanager, suppress

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in sample.py, before torch is imported


def run_program(main):
    """Exits with the status that `main` returns, or with 130 after ctrl-C, 143 after SIGTERM (which also ends
    it cleanly), or 141 if nobody reads the output any more (`… | head`). `main` lets BrokenPipeError pass."""
    with suppress(AttributeError):  # a notebook's stdout has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # for what a non-UTF-8 terminal cannot show
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what is still in the buffer
        sys.exit(141)


@contextmanager
def named_death():
    """Turns the error that torch raises when a loader worker dies into an OSError. It may come at any point
    of the main process; what has been written by then is kept."""
    try:
        yield
    except (RuntimeError, ConnectionResetError) as error:
        died = isinstance(error, ConnectionResetError) or "DataLoader worker (pid" in str(error)
        if not died:  # an error that a worker raised
            raise
        raise OSError(f"a loader worker died; start the same command again to resume ({error})") from error
