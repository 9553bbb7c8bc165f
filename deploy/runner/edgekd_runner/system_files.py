"""Files in which the kernel shows the machine: /proc, /sys and their like."""

import glob
import os
import re

ROOT = "/"  # another folder in tests


def system_path(path):
    return os.path.join(ROOT, path.lstrip("/"))


def find_paths(pattern):
    """Return the paths that fit a pattern such as /sys/class/thermal/thermal_zone*, sorted."""
    return sorted(glob.glob(system_path(pattern)))


def read_text(path):
    """Return the text of a file, or nothing where there is none."""
    try:
        with open(path) as stream:
            return stream.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_int(path):
    """Return the whole number in a file, or None."""
    text = read_text(path)
    return int(text) if re.match(r"-?\d+$", text) else None
