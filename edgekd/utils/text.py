"""Show text of any origin without its control characters having an effect."""

from __future__ import annotations

import unicodedata

CONTROL = ("Cc", "Cs")  # control characters, halves of pairs: in no text that a person means
UNSEEN = (*CONTROL, "Cf", "Zl", "Zp")  # and formatting characters, which some scripts need, and separators of lines


def hidden_chars(text: str, kinds: tuple[str, ...] = UNSEEN, allowed: str = "\n\t") -> set[str]:
    """Return the characters of `text` that are of some categories of Unicode."""
    return {c for c in set(text) - set(allowed) if unicodedata.category(c) in kinds}


def escape_control_chars(text: str) -> str:
    """Return text with those characters escaped that would move a cursor, paint, or change the writing direction."""
    hidden = hidden_chars(text)
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text) if hidden else text
