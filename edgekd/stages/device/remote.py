"""Stage: measure a bundle on a device over SSH; the job there outlives the connection, a second call picks it up."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgekd.errors import Busy, EdgekdError, StaleArtifact
from edgekd.stages.device.bundle import MANIFEST, Bundle
from edgekd.stages.device.job_log import AGAIN, Seen, Shown, heard
from edgekd.stages.device.results import Returned, named_file, taken
from edgekd.stages.device.ssh import Device, Lost, answer, sink, talk
from edgekd.utils.cpu import TELLING
from edgekd.utils.progress import bar

log = logging.getLogger(__name__)
T = TypeVar("T")
SPARE = 32 << 20  # bytes that results need beside the bundle
WAITS_S = (1, 2, 4, 8, 15, 30, 30, 30, 30, 30, 30, 30, 30)  # between tries to connect again: five minutes in all


@dataclass(frozen=True)
class Place:
    """What a device is."""

    machine: str  # "aarch64"
    flags: tuple[str, ...] | None  # those of its processor that decide INT8 speed; None: it does not tell


def look(out: Path, to: Device) -> Place:
    """Connect for the first time. Raises TargetUnavailable where the device cannot be used."""
    told = answer(to, "look", flags=TELLING)
    return Place(told["machine"], None if told["flags"] is None else tuple(told["flags"]))


def measure(out: Path, bundle: Bundle, to: Device) -> Returned:
    """Copy what of `bundle` is not there yet, run it on the device with live progress, bring the results to `out`.

    Raises TargetUnavailable where the device cannot be reached, Busy where another bundle runs in its folder,
    StaleArtifact where what comes back is not of this bundle, EdgekdError with the device's own words.
    """
    found = survey(to, bundle)
    if found["finished"]:
        log.info("%s: measured there before", to)
    else:
        begin(to, bundle, found)
        watch(to)
    patiently(to, lambda: bring(to, out))
    return taken(out, bundle)


def survey(to: Device, bundle: Bundle) -> dict[str, Any]:
    files = {name: facts["sha256"] for name, facts in bundle.read()["files"].items()}
    wanted = {"files": files | {MANIFEST: bundle.manifest.sha256}, "bundle": bundle.manifest.sha256}
    return answer(to, "survey", folder=to.folder, words=to.options, **wanted)


def begin(to: Device, bundle: Bundle, found: dict[str, Any]) -> None:
    """Send what is missing, and start; a job of this bundle that runs already is left alone."""
    if found["running"] not in (None, bundle.manifest.sha256):
        raise Busy(
            f"{to}: another bundle runs in `{to.folder}` (process {found['pid']})",
            hint="wait until it ends, or name another folder",
        )
    if found["running"] and found["words"] != to.options:
        raise Busy(
            f"{to}: the bundle runs there as `{' '.join(['run.sh', *found['words']])}` (process {found['pid']})",
            hint="wait until it ends, or ask for the same",
        )
    if found["running"]:
        log.info("%s: it runs already (process %s)", to, found["pid"])
        return
    if found["differing"]:
        patiently(to, lambda: send(to, bundle))
    job = {"bundle": bundle.manifest.sha256, "python": to.python, "words": to.options}
    patiently(to, lambda: answer(to, "start", folder=to.folder, **job))


def send(to: Device, bundle: Bundle) -> None:
    """Copy the files that are not there, or are others there; the manifest last."""
    files = bundle.read()["files"]
    found = survey(to, bundle)
    names = sorted(set(found["differing"]) - {MANIFEST})
    size = sum(files[name]["bytes"] for name in names)
    if found["free"] < size + SPARE:
        raise EdgekdError(
            f"{to}: the disk of `{to.folder}` is full: {found['free'] / 1e6:.0f} MB are free, "
            f"{(size + SPARE) / 1e6:.0f} MB are needed",
            hint="free some space there, or name a folder on another disk",
        )
    log.info("%s: sending %d of %d files, %.1f MB", to, len(names), len(files), size / 1e6)
    with (
        bar(f"copy to {to}", len(names) + 1) as advance,
        talk(to, "receive", folder=to.folder, files=list(files)) as process,
        tarfile.open(fileobj=sink(process), mode="w|") as archive,
    ):
        for name in [*names, MANIFEST]:
            path = bundle.folder / name
            facts = archive.gettarinfo(path, name)
            facts.uid = facts.gid = 0
            facts.uname = facts.gname = ""
            with path.open("rb") as content:
                archive.addfile(facts, content)
            advance()


def watch(to: Device) -> None:
    """Show how far the job is until it ends; connects again when the connection breaks.

    Raises EdgekdError with what the job said if it did not end well.
    """
    seen = Seen()
    with ExitStack() as stack:
        show = Shown(str(to), stack)

        def listen() -> None:
            with talk(to, "follow", folder=to.folder, offset=seen.offset) as process:
                for line in process.stdout or ():
                    told = heard(line)
                    if "line" in told:
                        seen.offset = told["at"]
                        show(seen.take(told["line"]))
                    elif "ended" in told:
                        seen.code = told["code"]

        patiently(to, listen, lambda: seen.offset)
    if seen.code != 0:
        raise seen.failure(str(to), f"`{to.folder}/job.log` there")


def patiently(to: Device, act: Callable[[], T], progress: Callable[[], Any] = lambda: None) -> T:
    """`act()`, tried again where the connection breaks; as often anew once there was `progress`."""
    tries, before = iter(WAITS_S), progress()
    while True:
        try:
            return act()
        except Lost as lost:
            if progress() != before:
                tries, before = iter(WAITS_S), progress()
            wait_s = next(tries, None)
            if wait_s is None:
                raise Lost(f"{lost.what}, and could not for some minutes", hint=f"{lost.hint}. {AGAIN}") from None
            log.warning("%s; trying again in %d s", lost.what, wait_s)
            time.sleep(wait_s)


def bring(to: Device, out: Path) -> None:
    """The result and its arrays into `out`, and nothing else that a device may send."""
    with tempfile.TemporaryFile(dir=out) as kept:
        with talk(to, "fetch", folder=to.folder) as process:
            stream = process.stdout or io.BytesIO()
            while (line := stream.readline()) and not heard(line).get("tar"):
                pass
            shutil.copyfileobj(stream, kept)
        kept.seek(0)
        try:
            with tarfile.open(fileobj=kept, mode="r") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is None or not named_file(member.name):
                        raise StaleArtifact(f"{to} sent `{member.name}`, which is no result", hint="do not trust it")
                    with (out / member.name).open("wb") as goal:
                        shutil.copyfileobj(content, goal)
        except tarfile.TarError as error:
            raise StaleArtifact(f"what {to} sent is not whole: {error}", hint=AGAIN) from error
