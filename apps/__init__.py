"""Optional programs on top of the five files, which import none of them. Run: `python -m apps.NAME`."""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in sample.py, before torch is imported


def run_program(main):
    """Exits with the status of `main`: 130 after ctrl-C, 143 after SIGTERM, which ends it in order too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
