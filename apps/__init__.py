"""Optional programs on top of the five files, each run as `python -m apps.NAME`; nothing in the five imports them."""
