"""The image, built by buildah without a Docker engine, and used as CI uses it: any user, a read-only root.

    EDGEKD_IMAGE_TEST=1 pytest tests/test_image.py      # make image-test

Where buildah and debootstrap are there and pytest runs as root, this belongs to `make test`, too. Packages come from
where this machine's pip has them from. EDGEKD_IMAGE_FLAGS are further words for `buildah build`, such as --pull=always
with --build-arg PYTHON=... for a base out of a registry. EDGEKD_IMAGE_STORE is a folder that keeps the base and all
layers for the next run. EDGEKD_IMAGE_CHECK=1 also builds the stage that runs all other tests in the image.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edgekd.stages.bench.runner import pack_runner
from edgekd.stages.device.bundle_readme import RUN_SCRIPT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BASE = "localhost/python:3.11-slim-bookworm"  # where the name in the Dockerfile is looked for first
NEEDS = ("buildah", "debootstrap", "unshare", "chroot")
UID = 12345  # nobody's
PLAY = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount --bind "$JOB" "$ROOT/job"
mount -o remount,bind,ro "$ROOT"
exec chroot --userspec=UID:UID "$ROOT" /usr/bin/env -i "$@"
""".replace("UID", str(UID))


def missing() -> str:
    path = os.environ["PATH"] + ":/usr/sbin"
    absent = [name for name in NEEDS if shutil.which(name, path=path) is None]
    if absent:
        return f"the image is built with {', '.join(NEEDS)}; here is no {', '.join(absent)}"
    return "the image is built and entered as root" if os.geteuid() else ""


def unable(reason: str) -> NoReturn:
    """Skips what a machine lacks the parts for; where the image was asked for, that is a failure."""
    if os.environ.get("EDGEKD_IMAGE_TEST"):
        pytest.fail(reason)
    pytest.skip(reason)


def pip_flags(home: Path) -> list[str]:
    """Words for `buildah build` by which pip in it is set as here, with the files that its settings name."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = (line.partition("=")[::2] for line in told.stdout.splitlines())
    values = {key.rpartition(".")[2]: ast.literal_eval(value) for key, value in pairs}
    if not values:
        return []
    lines = [f"{key} = {value.replace(chr(10), ' ')}" for key, value in values.items()]
    home.mkdir(parents=True, exist_ok=True)
    (home / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    named = [Path(word.removeprefix("file://")) for value in values.values() for word in value.split()]
    # the pages of an index lie beside its files
    places = sorted({p.parent if p.name == "simple" else p for p in named if p.is_absolute() and p.exists()})
    volumes = [word for place in places for word in ("--volume", f"{place}:{place}:ro")]
    # an index of one's own is instead of the Dockerfile's, which may be out of reach
    own = ["--build-arg", "PIP_FLAGS="] if {"index-url", "extra-index-url", "find-links"} & values.keys() else []
    return ["--secret", f"id=pip,src={home / 'pip.conf'}", *volumes, *own]


def driver(home: Path) -> str:
    """What holds the layers: overlay where it works, for vfs copies all files into each of them."""
    probe = ["buildah", "--root", f"{home}/probe", "--runroot", f"{home}/run", "--storage-driver", "overlay", "images"]
    works = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return os.environ.get("STORAGE_DRIVER") or ("overlay" if works else "vfs")


@dataclass(frozen=True)
class Image:
    name: str
    root: Path  # its files
    config: dict[str, Any]
    tools: Buildah

    def run(self, job: Path, *words: str, entry: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        """What a container of it does with these words, `job` mounted as the work folder."""
        job.mkdir(exist_ok=True)
        os.chown(job, UID, UID)
        called = [*(self.config["Entrypoint"] if entry is None else entry), *words]
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', self.config["WorkingDir"], *called]
        return subprocess.run(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", PLAY, "play", *self.config["Env"], *inside],
            env=os.environ | {"ROOT": str(self.root), "JOB": str(job)},
            capture_output=True,
            text=True,
            check=False,
        )


@dataclass(frozen=True)
class Buildah:
    words: list[str]
    told: list[str]

    def __call__(self, *words: str) -> str:
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def build(self, name: str, context: Path, *more: str) -> str:
        words = ["build", "--isolation", "chroot", "--layers", "--pull=never", "-t", name, *self.told, *more]
        return self(*words, str(context))

    def image(self, name: str) -> Image:
        box = self("from", "--pull=never", name).strip().splitlines()[-1]
        told = json.loads(self("inspect", "--type", "image", name))
        return Image(name, Path(self("mount", box).strip()), told["OCIv1"]["config"], self)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if reason := missing():
        unable(reason)
    kept = os.environ.get("EDGEKD_IMAGE_STORE")
    home = Path(kept) if kept else tmp_path_factory.mktemp("buildah")
    words = ["buildah", "--root", f"{home}/root", "--runroot", f"{home}/run", "--storage-driver", driver(home)]
    made = Buildah(words, pip_flags(home) + shlex.split(os.environ.get("EDGEKD_IMAGE_FLAGS", "")))
    if "--pull=always" not in made.told and BASE not in made("images", "--format", "{{.Name}}:{{.Tag}}").split():
        env = os.environ | {"BUILDAH": shlex.join(words)}
        base = ["sh", str(ROOT / "tests" / "image_base.sh"), BASE, str(home / "base")]
        if subprocess.run(base, env=env, check=False).returncode:
            unable("no base image could be made out of Debian's packages")
    yield made
    made("unmount", "--all")
    made("rm", "--all")
    if not kept:
        made("rmi", "--all", "--force")
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, to change in it."""
    place = tmp_path_factory.mktemp("context") / "edgekd"
    kept = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, place, ignore=kept)
    return place


@pytest.fixture(scope="module")
def image(tools: Buildah, context: Path) -> Image:
    started = time.monotonic()
    tools.build("edgekd", context, "--build-arg", "VERSION=1.2.3")
    made = tools.image("edgekd")
    size = sum(path.lstat().st_size for path in made.root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"\nimage: built in {time.monotonic() - started:.0f} s, {size / 1e9:.2f} GB")
    return made


@pytest.mark.parametrize(("target", "more"), [("cpu", []), ("jetson", ["--bundle"])])
def test_builds_a_recipe_as_any_user_with_a_read_only_root(
    image: Image, tmp_path: Path, target: str, more: list[str]
) -> None:
    job = tmp_path / "job"
    done = image.run(job, "build", "digits", "--smoke", "--target", target, *more, "--out", "runs/it")
    assert done.returncode == 0, done.stderr
    assert (job / "runs" / "it" / "report.html").stat().st_uid == UID
    assert image.run(job, "verify", "runs/it").returncode == 0


def test_a_mistake_in_the_command_ends_the_container_with_2(image: Image, tmp_path: Path) -> None:
    done = image.run(tmp_path / "job", "build", "digits", "--target", "jetsun")
    assert done.returncode == 2 and "did you mean `jetson`" in done.stderr


def test_a_folder_that_cannot_be_written_is_told_in_words(image: Image, tmp_path: Path) -> None:
    done = image.run(tmp_path / "job", "build", "digits", "--smoke", "--out", "/opt/out")
    assert done.returncode in (1, 2) and "/opt" in done.stderr and "Traceback" not in done.stderr


def test_says_what_it_is_and_runs_as_nobody_in_particular(image: Image) -> None:
    assert image.config["User"] == "1000" and image.config["Entrypoint"] == ["edgekd"]
    labels = {key.rpartition(".")[2]: value for key, value in image.config["Labels"].items()}
    assert labels["title"] == "edgekd" and labels["version"] == "1.2.3" and labels["licenses"] == "Apache-2.0"


def test_holds_neither_compiler_nor_pip_nor_cache(image: Image) -> None:
    for name in ("gcc", "cc", "g++", "clang", "ld"):
        assert not list(image.root.glob(f"usr/bin/{name}")), name
    assert not list(image.root.glob("opt/edgekd/bin/pip*"))
    assert not list(image.root.glob("root/.cache/*"))


def test_lists_what_it_holds_with_licences(image: Image) -> None:
    place = image.root / "usr" / "share" / "doc" / "edgekd"
    bill = json.loads((place / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {part["name"].lower().replace("_", "-") for part in bill["components"]}
    found = {
        path.name.split("-")[0].lower().replace("_", "-")
        for path in image.root.glob("opt/edgekd/lib/*/site-packages/*.dist-info")
    }
    assert found and found <= listed
    licences = (place / "licences.md").read_text().lower().replace("_", "-")
    assert all(f"| {name} " in licences for name in found - {"edgekd"})
    assert "libc6 " in (place / "debian.txt").read_text()


def test_a_change_of_code_does_not_install_torch_again(tools: Buildah, image: Image, context: Path) -> None:
    with (context / "edgekd" / "__init__.py").open("a") as file:
        file.write(f"# {time.time()}\n")
    started = time.monotonic()
    told = tools.build("edgekd-changed", context, "--build-arg", "VERSION=1.2.3")
    print(f"\nimage: built again after a change of code in {time.monotonic() - started:.0f} s")
    assert "Collecting torch" not in told and "Processing /src" in told


def test_the_boards_image_holds_the_runner_and_says_what_it_lacks(
    tools: Buildah, context: Path, tmp_path: Path
) -> None:
    tools.build("edgekd-runner", context, "--target", "runner", "--build-arg", f"BOARD={BASE}")
    board, job = tools.image("edgekd-runner"), tmp_path / "job"
    done = board.run(job, "doctor")
    assert done.returncode == 1, done.stderr  # something is missing: the runtimes, which an L4T base has
    told = json.loads(done.stdout)
    assert "numpy" in told["versions"] and "numpy" not in [lack["package"] for lack in told["missing"]]
    (job / "run.sh").write_text(RUN_SCRIPT)  # a bundle that lacks all else
    pack_runner(job / "runner.pyz")
    done = board.run(job, "run.sh", entry=["sh"])
    assert done.returncode == 2 and "manifest.json" in done.stdout + done.stderr


def test_the_projects_own_tests_pass_in_it(tools: Buildah, context: Path) -> None:
    if "EDGEKD_IMAGE_CHECK" not in os.environ:
        pytest.skip("EDGEKD_IMAGE_CHECK is not set: all tests would run once more")
    told = tools.build("edgekd-check", context, "--target", "check")
    print("\nimage: its own tests:", *re.findall(r"\d+ passed.*", told))
