"""How the report writes values: few significant digits, with units; and text that Markdown shows but does not obey."""

from __future__ import annotations

import io
import math
from typing import Any

from edgekd.core.bench_result import Interval
from edgekd.utils.text import escape_control_chars

LONGEST = 160  # letters of the notes of a lesson


def figures(value: float) -> str:
    """Three significant digits, in full: 0.213, 12.3, 1,230; what is no number is said to be nan or inf."""
    if not math.isfinite(value):
        return str(value)
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def count(value: float) -> str:
    """12.5 M, 84.2 k, 640."""
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return figures(value / limit) + letter
    return f"{value:,}"


def file_size(value: int | None) -> str:
    if value is None:
        return "size unknown"
    return f"{count(value)}B" if value >= 1000 else f"{value} B"


def decimals(images: int) -> int:
    """Of a percentage of so many images: one image must show, much less than one must not."""
    return 2 if images >= 2000 else 1


def percent(value: float, images: int) -> str:
    return f"{value:.{decimals(images)}f} %"


def points(value: float, images: int) -> str:
    """A difference of percentages, with its sign."""
    text = f"{abs(value):.{decimals(images)}f}"
    sign = "±" if float(text) == 0 else "+" if value > 0 else "−"
    return sign + text


def ratio(value: float) -> str:
    return f"{figures(value)}×"


def interval(value: Interval) -> str:
    """4.13× (4.02–4.24): the estimate and its 95 % interval."""
    return f"{ratio(value.estimate)} ({figures(value.low)}–{figures(value.high)})"


def near_one(value: Interval) -> str:
    """1.0004 (0.9981–1.0023): a ratio whose distance from 1 is what matters."""
    return f"{value.estimate:.4f} ({value.low:.4f}–{value.high:.4f})"


def duration(seconds: float) -> str:
    """3.2 s, 12 min 5 s, 2 h 4 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def when(moment: str) -> str:
    """2026-11-20 10:15 UTC, of ISO 8601 in UTC."""
    return f"{moment[:16].replace('T', ' ')} UTC"


def label(name: str) -> str:
    """calls per block; warmup, s: a recorded name with its unit set apart."""
    head, _, unit = name.rpartition("_")
    return f"{head.replace('_', ' ')}, {unit}" if head and unit in ("s", "ms", "ns") else name.replace("_", " ")


def setting(value: Any) -> str:
    """A recorded value of any kind."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    if isinstance(value, dict):
        return ", ".join(f"{label(name)} {setting(member)}" for name, member in value.items())
    return str(value)


def format_notes(notes: dict[str, Any]) -> str:
    """stage2.4 > stage2.1, of 3 routes; or names and values."""
    routes = notes.get("routes", [])
    won = [f"{route['teacher']} > {route['student']}" for route in routes if route.get("won")]
    if won:
        return f"{', '.join(won)}, of {len(routes)} route{'s' * (len(routes) > 1)}"
    text = setting(notes)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (all is in compare.json)"


def flatten_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values for a reader; a group of settings gives one line for each of its members."""
    lines = []
    for name, value in settings.items():
        members = value.items() if isinstance(value, dict) else [("", value)]
        lines += [(label(name) + (f": {label(key)}" if key else ""), setting(member)) for key, member in members]
    return lines


def unmeasured(reason: str) -> str:
    """Why there are no numbers; reasons that say so themselves stay as they are."""
    return reason if reason.startswith("not measured") else f"not measured: {reason}"


def seen(value: Any) -> Any:
    """For a page that escapes by itself: text with what cannot be seen spelled out; all else as it is, markup too."""
    return escape_control_chars(value) if type(value) is str else value


def markdown(value: Any) -> str:
    """`value` with everything replaced that would make a table cell, tag, link or emphasis of it; a space without width
    behind @ and # keeps hosts of code from telling people and issues of that name."""
    text = escape_control_chars(" ".join(str(value).split()))
    shown = {c: f"&#{ord(c)};" for c in "&<>|`*_[]~\\"} | {c: f"&#{ord(c)};&#8203;" for c in "@#"}
    return "".join(shown.get(c, c) for c in text)


def code(value: Any) -> str:
    """`value` to be copied: nothing is added that cannot be seen."""
    import markupsafe

    return markupsafe.Markup(f"<code>{markdown(value).replace('&#8203;', '')}</code>")


def yaml(value: Any) -> str:
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 100, False
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()
