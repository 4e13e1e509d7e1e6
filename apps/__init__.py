"""Optional programs on top of the five files, which import none of them. Run: `python -m apps.NAME`."""
