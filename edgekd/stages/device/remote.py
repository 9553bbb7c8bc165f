"""Stage: measure a bundle on a device over SSH; the job survives a lost connection, and a second call finds it."""

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
from edgekd.stages.device.job_log import HINT_RESUME, JobLog, ProgressBars, parse_message
from edgekd.stages.device.results import DeviceResult, is_result_file, load_result
from edgekd.stages.device.ssh import ConnectionLost, Device, call_agent, run_agent, stdin_of
from edgekd.utils.cpu import RELEVANT_FLAGS
from edgekd.utils.progress import progress_bar

log = logging.getLogger(__name__)
T = TypeVar("T")
SPARE_BYTES = 32 << 20  # that results need beside the bundle
WAITS_S = (1, 2, 4, 8, 15, 30, 30, 30, 30, 30, 30, 30, 30)  # between attempts to reconnect: five minutes in all


@dataclass(frozen=True)
class DeviceInfo:
    """The processor of a device."""

    machine: str  # "aarch64"
    flags: tuple[str, ...] | None  # those that decide INT8 speed; None: they cannot be read


def probe(out: Path, device: Device) -> DeviceInfo:
    """Connect for the first time. Raises TargetUnavailable if the device cannot be used."""
    reply = call_agent(device, "probe", flags=RELEVANT_FLAGS)
    return DeviceInfo(reply["machine"], None if reply["flags"] is None else tuple(reply["flags"]))


def measure(out: Path, bundle: Bundle, device: Device) -> DeviceResult:
    """Copy the missing files of `bundle`, run it on the device with live progress, fetch the results into `out`.

    Raises:
        TargetUnavailable: if the device cannot be reached.
        Busy: if another bundle runs in its folder.
        StaleArtifact: if the results are not of this bundle.
        EdgekdError: with the message of the device.
    """
    state = list_missing(device, bundle)
    if state["finished"]:
        log.info("%s: measured there before", device)
    else:
        start_job(device, bundle, state)
        follow_job(device)
    retry(device, lambda: fetch_results(device, out))
    return load_result(out, bundle)


def list_missing(device: Device, bundle: Bundle) -> dict[str, Any]:
    """Return which files the device lacks, and whether the bundle runs or has ended there."""
    hashes = {name: record["sha256"] for name, record in bundle.read()["files"].items()}
    files = hashes | {MANIFEST: bundle.manifest.sha256}
    request = {"folder": device.folder, "options": device.options, "files": files, "bundle": bundle.manifest.sha256}
    return call_agent(device, "list_missing", **request)


def start_job(device: Device, bundle: Bundle, state: dict[str, Any]) -> None:
    """Send what is missing, and start; a job of this bundle that runs already is left alone."""
    if state["running"] not in (None, bundle.manifest.sha256):
        raise Busy(
            f"{device}: another bundle runs in `{device.folder}` (process {state['pid']})",
            hint="wait until it ends, or name another folder",
        )
    if state["running"] and state["options"] != device.options:
        raise Busy(
            f"{device}: the bundle runs there as `{' '.join(['run.sh', *state['options']])}` (process {state['pid']})",
            hint="wait until it ends, or use the same options",
        )
    if state["running"]:
        log.info("%s: it runs already (process %s)", device, state["pid"])
        return
    if state["missing"]:
        retry(device, lambda: send_files(device, bundle))
    job = {"bundle": bundle.manifest.sha256, "python": device.python, "options": device.options}
    retry(device, lambda: call_agent(device, "start_job", folder=device.folder, **job))


def send_files(device: Device, bundle: Bundle) -> None:
    """Copy the files that are missing or different there; the manifest last."""
    files = bundle.read()["files"]
    state = list_missing(device, bundle)
    names = sorted(set(state["missing"]) - {MANIFEST})
    size = sum(files[name]["bytes"] for name in names)
    if state["free"] < size + SPARE_BYTES:
        raise EdgekdError(
            f"{device}: the disk of `{device.folder}` is full: {state['free'] / 1e6:.0f} MB are free, "
            f"{(size + SPARE_BYTES) / 1e6:.0f} MB are needed",
            hint="free some space there, or name a folder on another disk",
        )
    log.info("%s: sending %d of %d files, %.1f MB", device, len(names), len(files), size / 1e6)
    with (
        progress_bar(f"copy to {device}", len(names) + 1) as advance,
        run_agent(device, "receive_files", folder=device.folder, files=list(files)) as process,
        tarfile.open(fileobj=stdin_of(process), mode="w|") as archive,
    ):
        for name in [*names, MANIFEST]:
            path = bundle.folder / name
            info = archive.gettarinfo(path, name)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            with path.open("rb") as content:
                archive.addfile(info, content)
            advance()


def follow_job(device: Device) -> None:
    """Show the progress of the job until it ends; reconnect when the connection breaks.

    Raises EdgekdError with the messages of the job if it failed.
    """
    job_log = JobLog()
    with ExitStack() as stack:
        show = ProgressBars(str(device), stack)

        def follow() -> None:
            with run_agent(device, "follow_log", folder=device.folder, offset=job_log.offset) as process:
                for line in process.stdout or ():
                    reply = parse_message(line)
                    if "line" in reply:
                        job_log.offset = reply["offset"]
                        show(job_log.add_line(reply["line"]))
                    elif "ended" in reply:
                        job_log.code = reply["code"]

        retry(device, follow, lambda: job_log.offset)
    if job_log.code != 0:
        raise job_log.error(str(device), f"`{device.folder}/job.log` there")


def retry(device: Device, act: Callable[[], T], progress: Callable[[], Any] = lambda: None) -> T:
    """Return `act()`, repeated when the connection breaks; `progress` that changed starts the count again."""
    waits, before = iter(WAITS_S), progress()
    while True:
        try:
            return act()
        except ConnectionLost as error:
            if progress() != before:
                waits, before = iter(WAITS_S), progress()
            wait_s = next(waits, None)
            if wait_s is None:
                raise ConnectionLost(
                    f"{error.what}, and could not for some minutes", hint=f"{error.hint}. {HINT_RESUME}"
                ) from None
            log.warning("%s; trying again in %d s", error.what, wait_s)
            time.sleep(wait_s)


def fetch_results(device: Device, out: Path) -> None:
    """Write the result and its arrays into `out`, and nothing else that a device may send."""
    with tempfile.TemporaryFile(dir=out) as received:
        with run_agent(device, "send_results", folder=device.folder) as process:
            stream = process.stdout or io.BytesIO()
            while (line := stream.readline()) and not parse_message(line).get("tar"):
                pass
            shutil.copyfileobj(stream, received)
        received.seek(0)
        try:
            with tarfile.open(fileobj=received, mode="r") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is None or not is_result_file(member.name):
                        raise StaleArtifact(
                            f"{device} sent `{member.name}`, which is no result", hint="do not trust it"
                        )
                    with (out / member.name).open("wb") as goal:
                        shutil.copyfileobj(content, goal)
        except tarfile.TarError as error:
            raise StaleArtifact(f"the archive from {device} is incomplete: {error}", hint=HINT_RESUME) from error
