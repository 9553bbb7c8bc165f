"""The documentation is current: generated pages, links, the commands and settings that it shows."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from edgekd.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md")) + [ROOT / name for name in ("README.md", "SECURITY.md", "DECISIONS.md")]
PAGES += [
    page for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if page.exists()
]  # not all are in the image
PAGES += sorted((ROOT / "deploy").rglob("*.md"))
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def page_id(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return SNIPPET.sub(lambda match: (ROOT / match[1]).read_text(), page.read_text())


def anchors(page):
    """Return the anchors of the headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles} | {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles
    }


def commands():
    """Return every command line of edgekd in a fenced or indented block, with its page."""
    for page in PAGES:
        text = text_of(page).replace("\\\n", " ")
        blocks = [*FENCE.findall(text), *re.findall(r"^ {4,8}edgekd .*$", text, re.MULTILINE)]
        for line in re.findall(r"^ *(?:\$ )?(edgekd [a-z].*)$", "\n".join(blocks), re.MULTILINE):
            if page.name != "cli.md":
                yield pytest.param(line, id=f"{page_id(page)}: {line[:60]}")


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


def test_generated_pages_are_current():
    assert not load_generator().stale(), "run `python docs/generate.py`"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target} is no heading"


@pytest.mark.parametrize("line", list(commands()))
def test_commands_have_the_options_that_are_shown(line):
    import typer

    words = shlex.split(line.split(" | ")[0], comments=True)
    command = typer.main.get_command(app).commands[words[1]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    shown = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert shown <= options | {"--help"}


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    assert [p for p in PAGES if "docs" in p.parts and str(p.relative_to(ROOT / "docs")) not in contents] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
