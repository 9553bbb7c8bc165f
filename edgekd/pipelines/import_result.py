"""A result that a person brought from a device: find the build that its bundle is of, and tell its report again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekd.config import BuildConfig
from edgekd.core import serialization
from edgekd.core.artifact import File, replace_files
from edgekd.core.build_record import Record
from edgekd.core.step_cache import Ledger
from edgekd.errors import ConfigError, StaleArtifact
from edgekd.pipelines.deploy import named, read_off, shipped
from edgekd.stages.bench.gates import decide
from edgekd.stages.device.bundle import MANIFEST, Bundle
from edgekd.stages.device.results import RESULT, Returned, read, taken
from edgekd.stages.report import provenance
from edgekd.stages.report.publish import Rendered, publish, rendered, templates
from edgekd.stages.report.report import read as read_report

RUNS = Path("runs")  # where builds go that are not told otherwise


def import_result(path: Path, out: Path | None) -> tuple[Record, Path]:
    """The record of the build in `out` with the measurements of a result.json, and its folder; its report is new.

    Without `out`, the build is looked for in `runs` and around the result. The result is kept in the bundle's folder
    there, where the next build finds it. Raises ConfigError where no build made its bundle, or it is not as the device
    wrote it, EdgekdError where nothing valid was measured.
    """
    made = origin(path, out)
    try:
        return added(path, made, taken(path.parent, made))
    except StaleArtifact as error:  # of a file that the user named
        raise ConfigError(error.what, hint=error.hint) from None


def added(path: Path, made: Bundle, returned: Returned) -> tuple[Record, Path]:
    """The record with what came back from the device at `path`, its folder; its report is written anew."""
    folder, name = made.folder.parent, str(made.read()["target"])
    ledger = Ledger(folder / "steps")
    with ledger.locked():
        record = read_report(folder / "report.json")
        config = serialization.load(BuildConfig, record.config)
        bench = read_off(ledger, name, made, returned, config.bench)
        target = named(config.targets).get(name)
        if target is None:
            raise ConfigError(f"the build in `{folder}` has no target `{name}`", hint="build again: it was changed")
        bench = shipped(bench, target, record.students)
        others = [old for old in record.benches if old.target != name or not old.scenario]  # those were of this machine
        benches = tuple(bench if old.target == name else old for old in others)
        record = replace(
            record,
            benches=benches,
            gates=decide(config.gates, benches),
            created=max(record.created, ledger.latest),
            step_seconds=record.step_seconds | ledger.seconds,
        )
        home = made.folder / "results"
        if path.parent.resolve() != home.resolve():
            replace_files((*returned.arrays, returned.result), home)
        told = ledger.given(templates()).step("report", Rendered, rendered, record)
        publish(told, folder)
        before = provenance.read(folder)["steps"] if (folder / provenance.NAME).exists() else {}
        provenance.certify(record, folder, told.files, before | ledger.written)
    return record, folder


def origin(path: Path, out: Path | None) -> Bundle:
    """The bundle that a result is of, in the folder of its build. Raises ConfigError where none is it."""
    wanted = str(read(path)["bundle"])
    around = [path.resolve().parent.parent.parent] if path.name == RESULT else []
    places = [out] if out else [*sorted(RUNS.glob("*")), *around]
    found = [File.of(p) for place in places for p in sorted(place.glob(f"bundle-*/{MANIFEST}"))]
    for listing in found:
        if listing.sha256 == wanted and (listing.path.parent.parent / "report.json").is_file():
            return whole(Bundle(listing))
    known = ", ".join(f"`{m.path.parent}` is {m.sha256[:12]}" for m in found) or "there is no bundle"
    where = f"`{out}`" if out else f"`{RUNS}`"
    raise ConfigError(
        f"`{path}` is a result of the bundle {wanted[:12]}, which no build in {where} has made: {known}",
        hint="a result counts for the files that were measured only; name the folder of their build with --out, or "
        "copy the bundle of this build to the device and run it there",
    )


def whole(made: Bundle) -> Bundle:
    """The bundle. Raises ConfigError where its manifest is none, StaleArtifact where a file of it was changed."""
    told = made.read()
    names = [engine[key] for engine in told["engines"] for key in ("model", "expected")]
    for name in filter(None, [*names, told["inputs"], told["labels"]]):
        File.checked(made.folder / name, told["files"][name]["sha256"])
    return made
