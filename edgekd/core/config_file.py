"""Read a configuration: a recipe's name or a YAML file, with single values overridden."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekd.core.plugins import unknown
from edgekd.errors import ConfigError
from edgekd.utils.text import CONTROL, unseen

LARGEST = 64 << 10  # bytes of a configuration; the longest recipe has 1.5 kB
DEEPEST = 30  # levels of lists and tables
LONGEST = 40  # characters of a number
MOST = 20_000  # keys and values, those behind an alias counted as often as it stands
TAG = "tag:yaml.org,2002:"
PLAIN = frozenset(TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))


def recipes() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in files("edgekd.recipes").iterdir() if p.name.endswith(".yaml"))


def text(source: str) -> str:
    """The YAML of a recipe or a file."""
    if Path(source).is_file():
        content = Path(source).read_bytes() if Path(source).stat().st_size <= LARGEST else bytes(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"`{source}` has more than {LARGEST >> 10} kB", hint="name a configuration, not its data")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"`{source}` is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
                hint="save it as UTF-8",
            ) from None
    if source in recipes():
        return files("edgekd.recipes").joinpath(f"{source}.yaml").read_text()
    if source.endswith((".yaml", ".yml")) or "/" in source:
        raise ConfigError(f"there is no file `{source}`", hint="`edgekd init` writes one")
    raise unknown(f"there is no recipe and no file `{source}`", source, recipes())


def read(source: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain data of a configuration. `overrides` are like `distill.epochs=5`, values in YAML."""
    data = parse(text(source), source)
    if not isinstance(data, dict):
        raise ConfigError(f"`{source}` is not a table of keys and values", hint="`edgekd init` writes an example")
    for override in overrides:
        path, sign, value = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set {override} names no value", hint="write --set distill.epochs=5")
        put(data, path.split("."), parse(value, f"--set {override}"), override)
    return data


def put(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    here: Any = data
    for part in path[:-1]:
        here = here.setdefault(part, {}) if isinstance(here, dict) else None
    if not isinstance(here, dict):
        raise ConfigError(f"--set {override}: `{'.'.join(path[:-1])}` holds no keys", hint="check the path")
    here[path[-1]] = value


def parse(source: str, where: str) -> Any:
    """YAML without surprises: no key twice, 1e-3 is a number, 2026-01-31 is a text, and nothing is more than it seems.

    Raises ConfigError with the line of what is not read: tags, texts that cannot be seen, numbers that are none,
    aliases that lead to themselves or stand for more than `MOST` values.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 wants a dot and a sign
    Loader.add_implicit_resolver(f"{TAG}float", number, list("-+0123456789."))
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag in PLAIN]
        for first, known in Loader.yaml_implicit_resolvers.items()
    }
    try:
        loader = Loader(source)
        node = loader.get_single_node()
        if node is None:
            return None
        check(loader, node, where)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{where}{line} is not YAML: {problem[:200]}", hint="check the indentation and colons"
        ) from None
    except RecursionError:
        raise too_deep(where) from None


def check(loader: Any, root: Any, where: str) -> None:
    """Raises ConfigError for what no setting can be, before anything is made of it."""
    sizes: dict[int, tuple[int, int]] = {}  # values and levels of nodes, by identity; none yet where one is in work

    def size(node: Any) -> tuple[int, int]:
        if id(node) not in sizes:
            sizes[id(node)] = (0, 0)
            for problem, hint in problems(loader, node):
                raise ConfigError(f"{where}, line {node.start_mark.line + 1}: {problem}", hint=hint)
            inner = [size(child) for child in children(node)]
            sizes[id(node)] = (1 + sum(n for n, _ in inner), 1 + max((depth for _, depth in inner), default=0))
        elif not sizes[id(node)][0]:
            raise ConfigError(f"{where}, line {node.start_mark.line + 1} holds itself", hint="leave out the alias")
        return sizes[id(node)]

    values, levels = size(root)
    if values > MOST:
        raise ConfigError(f"{where} holds more than {MOST:,} values", hint="leave out the aliases")
    if levels > DEEPEST:
        raise too_deep(where)


def too_deep(where: str) -> ConfigError:
    return ConfigError(f"{where} is nested too deeply", hint=f"no setting lies deeper than {DEEPEST} levels")


def children(node: Any) -> list[Any]:
    if node.id == "mapping":
        return [part for pair in node.value for part in pair]
    return list(node.value) if node.id == "sequence" else []


def problems(loader: Any, node: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with one node, and the fix."""
    text = str(node.value) if node.id == "scalar" else None
    plain = node.tag
    if text is not None and node.tag != f"{TAG}str":
        plain = loader.resolve(type(node), text, (node.style is None, node.style is not None))
    if node.tag not in PLAIN or node.tag != plain:
        yield f"the tag `{node.tag.replace(TAG, '!!')[:60]}` is not read", "write the value as it is"
    if text is not None and (found := unseen(text, CONTROL)):
        yield f"a text holds the character {ascii(min(found))}", "leave it out"
    if node.tag in (f"{TAG}int", f"{TAG}float") and not usual(loader, node):
        yield f"`{node.value[:20]}` is no number that a setting takes", "write it in digits; in quotes, if it is a text"
    if node.id == "mapping":
        keys = [key for key, _ in node.value]
        for key in [key for key in keys if key.tag not in (f"{TAG}str", f"{TAG}merge")][:1]:
            kind, shown = key.tag.replace(TAG, ""), f" `{key.value[:20]}`" if key.id == "scalar" else ""
            yield f"a key is no text, but of the kind {kind}{shown}", "write a word, in quotes if it is read otherwise"
        for name, count in Counter(key.value for key in keys if key.id == "scalar").items():
            if count > 1:
                yield f"`{name[:60]}` is there twice", "keep one of them"


def usual(loader: Any, node: Any) -> bool:
    """Whether a number is finite, and fits into 64 bits."""
    if len(node.value) > LONGEST:
        return False
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError):
        return False
    return math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
