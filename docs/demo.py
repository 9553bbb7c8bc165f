"""Run the commands that README.md and docs/quickstart.md show, write their output below them, and take the picture.

python docs/demo.py [FOLDER]    runs them in FOLDER (the repository); needs Chromium, and an otherwise idle machine
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
PICTURE = ROOT / "docs" / "images" / "report.png"
BLOCK = re.compile(r"^```console\n\$ (edgekd .+)\n(?:.*\n)*?```$", re.MULTILINE)


def output_of(command: str, folder: Path) -> str:
    """Run a command line in `folder`; return what it prints on stdout. Gates and findings may end it with 1, 3 or 4."""
    script = f'edgekd() {{ {shlex.quote(sys.executable)} -m edgekd "$@"; }}\n{command}'
    done = subprocess.run(["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        sys.exit(f"`{command}` is wrong")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def take_picture(report: Path) -> None:
    """Save the first screen of a report."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        sys.exit("no Chromium; on a Debian: apt install chromium")
    options = ("--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,800", f"--screenshot={PICTURE}")
    subprocess.run([browser, *options, report.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    commands = dict.fromkeys(command for text in texts.values() for command in BLOCK.findall(text))
    outputs = {command: output_of(command, folder) for command in commands}
    for page, text in texts.items():
        filled = BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{outputs[match[1]]}```", text)
        page.write_text(filled, encoding="utf-8")
    take_picture(folder / "runs" / "digits" / "report.html")
