"""What there is to choose from: plug-ins of every kind, and recipes, each with one line of what it is."""

from __future__ import annotations

from edgekd.core import plugins
from edgekd.core.config_file import config_text, recipes

Catalogue = dict[str, dict[str, str]]  # kind -> name -> line


def catalogue(kind: str | None) -> Catalogue:
    """Return the plug-ins of one kind, or of all. Raise ConfigError for a kind that does not exist."""
    kinds = (*plugins.FOLDERS, "recipes")
    if kind is not None and kind not in kinds:
        raise plugins.unknown_name(f"there is no kind `{kind}`", kind, list(kinds))
    entries = {folder: {n: plugins.summary(folder, n) for n in plugins.names(folder)} for folder in plugins.FOLDERS}
    entries["recipes"] = {name: config_text(name).partition("\n")[0].lstrip("# ") for name in recipes()}
    return {k: v for k, v in entries.items() if kind in (None, k)}


def format_catalogue(entries: Catalogue) -> str:
    """Return a catalogue as text."""
    width = max(len(name) for v in entries.values() for name in v)
    return "\n".join(
        f"{k}\n" + "\n".join(f"  {name:<{width}} {line}" for name, line in v.items()) for k, v in entries.items()
    )
