"""Changes files as somebody would who should not."""

import json
from pathlib import Path
from typing import Any


def edit(place: Path, path: tuple[Any, ...], value: Any) -> None:
    """Put another value somewhere in a JSON file; none at all for `...`."""
    data = json.loads(place.read_text())
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    place.write_text(json.dumps(data))  # NaN and Infinity as Python writes them
