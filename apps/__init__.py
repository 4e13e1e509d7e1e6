"""Optional programs on top of the five files, which import none of them. Run: `python -m apps.NAME`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in sample.py, before torch is imported
