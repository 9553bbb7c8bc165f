"""Text of any origin: shown, never obeyed."""

from __future__ import annotations

import unicodedata

CONTROL = ("Cc", "Cs")  # control characters, halves of pairs: in no text that a person means
UNSEEN = (*CONTROL, "Cf", "Zl", "Zp")  # and formatting characters, which some scripts need, and separators of lines


def unseen(text: str, kinds: tuple[str, ...] = UNSEEN, allowed: str = "\n\t") -> set[str]:
    """The characters of `text` that are of these categories of Unicode."""
    return {c for c in set(text) - set(allowed) if unicodedata.category(c) in kinds}


def visible(text: str) -> str:
    """With characters spelled out that would move a cursor, paint, or turn the direction of writing."""
    hidden = unseen(text)
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text) if hidden else text
