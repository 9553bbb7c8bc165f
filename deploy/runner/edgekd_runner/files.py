"""Files of jobs, bundles and results: hashes, and writes that are whole or not there."""

import hashlib
import json
import os


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def write_atomic(path, write):
    """Write a file whole or not at all; `write` is called with the open stream."""
    with open(path + ".tmp", "wb") as stream:
        write(stream)
    os.replace(path + ".tmp", path)


def save_json(path, value):
    text = json.dumps(value, indent=2, sort_keys=True).encode()
    write_atomic(path, lambda stream: stream.write(text))


def load_json(path):
    """Return the content of a JSON file, or None where there is none."""
    try:
        with open(path, "rb") as stream:
            return json.loads(stream.read().decode())
    except (OSError, ValueError):
        return None
