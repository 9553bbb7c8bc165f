"""Text of any origin: shown, never obeyed."""

from __future__ import annotations

import unicodedata

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and formatting characters, halves of pairs, separators of lines


def visible(text: str) -> str:
    """With characters spelled out that would move a cursor, paint, or turn the direction of writing."""
    hidden = {c for c in set(text) - set("\n\t") if unicodedata.category(c) in UNSEEN}
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text) if hidden else text
