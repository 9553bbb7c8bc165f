"""What there is to choose from: plug-ins of every kind, and recipes, each with one line of what it is."""

from __future__ import annotations

from edgekd.core import plugins
from edgekd.core.config_file import recipes, text

Catalogue = dict[str, dict[str, str]]  # kind -> name -> line


def catalogue(kind: str | None) -> Catalogue:
    """Of one kind, or of all. Raises ConfigError for a kind that does not exist."""
    kinds = (*plugins.FOLDERS, "recipes")
    if kind is not None and kind not in kinds:
        raise plugins.unknown(f"there is no kind `{kind}`", kind, list(kinds))
    found = {folder: {n: plugins.summary(folder, n) for n in plugins.names(folder)} for folder in plugins.FOLDERS}
    found["recipes"] = {name: text(name).partition("\n")[0].lstrip("# ") for name in recipes()}
    return {k: v for k, v in found.items() if kind in (None, k)}


def described(found: Catalogue) -> str:
    """For a terminal."""
    width = max(len(name) for v in found.values() for name in v)
    return "\n".join(
        f"{k}\n" + "\n".join(f"  {name:<{width}} {line}" for name, line in v.items()) for k, v in found.items()
    )
