"""Messages on stdout: one JSON object a line, with progress, a warning, an error or a child's result."""

import json
import sys


def emit(message):
    """Print one message at once."""
    print(json.dumps(message))
    sys.stdout.flush()


def forward(line):
    """Return the last message of a child, its result or its error; pass its progress on and return {} for it."""
    try:
        message = json.loads(line) if line.startswith("{") else {}  # a runtime may print too
    except ValueError:
        return {}
    if "result" in message or "error" in message:
        return message
    if message:
        emit(message)
    return {}
