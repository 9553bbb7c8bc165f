"""Import the result of a bundle from a device into the build that wrote the bundle, and write its report again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekd.config import BuildConfig
from edgekd.core import serialization
from edgekd.core.artifact import File, replace_files
from edgekd.core.build_record import BuildRecord
from edgekd.core.step_cache import StepCache
from edgekd.errors import ConfigError, StaleArtifact
from edgekd.pipelines.deploy import label_targets, read_bench, with_selection
from edgekd.pipelines.run import Run
from edgekd.stages.bench.gates import decide
from edgekd.stages.device.bundle import MANIFEST, Bundle
from edgekd.stages.device.results import RESULT, DeviceResult, load_result, read_result
from edgekd.stages.report import provenance
from edgekd.stages.report.publish import publish, rendered, templates
from edgekd.stages.report.report import read as read_report

RUNS = Path("runs")  # where builds are without --out


def import_result(path: Path, out: Path | None) -> tuple[BuildRecord, Path]:
    """Return the record of a build with the measurements of a result.json, and the folder of the build.

    Its report is written again. The result is kept in the folder of the bundle, where the next build finds it.

    Args:
        path: the result.json, its arrays beside it.
        out: the folder of the build; None: it is searched for in `runs` and around the result.

    Raises:
        ConfigError: if no build wrote the bundle, or the result is not as the device wrote it.
        EdgekdError: if nothing valid was measured.
    """
    bundle = find_bundle(path, out)
    try:
        return add_result(path, bundle, load_result(path.parent, bundle))
    except StaleArtifact as error:  # of a file that the user named
        raise ConfigError(error.what, hint=error.hint) from None


def add_result(path: Path, bundle: Bundle, returned: DeviceResult) -> tuple[BuildRecord, Path]:
    """Add a result to the record of its build; return the record, and the folder of the build."""
    folder, name = bundle.folder.parent, str(bundle.read()["target"])
    cache = StepCache(folder / "steps")
    with cache.locked():
        record = read_report(folder / "report.json")
        config = serialization.from_json(BuildConfig, record.config)
        target = label_targets(config.targets).get(name)
        if target is None:
            raise ConfigError(f"the build in `{folder}` has no target `{name}`", hint="build again: it was changed")
        bench = read_bench(Run(config, cache).on(name, target), bundle, returned)
        bench = with_selection(bench, target, record.students)
        # other scenarios of the target were measured on this machine
        others = [old for old in record.benches if old.target != name or not old.scenario]
        benches = tuple(bench if old.target == name else old for old in others)
        record = replace(
            record,
            benches=benches,
            gates=decide(config.gates, benches),
            created=max(record.created, cache.latest),
            step_seconds=record.step_seconds | cache.seconds,
        )
        home = bundle.folder / "results"
        if path.parent.resolve() != home.resolve():
            replace_files((*returned.arrays, returned.result), home)
        report = cache.depends_on(templates()).step("report", rendered, record)
        publish(report, folder)
        steps = provenance.read(folder)["steps"] if (folder / provenance.NAME).exists() else {}
        provenance.write_manifest(record, folder, report.files, steps | cache.written)
    return record, folder


def find_bundle(path: Path, out: Path | None) -> Bundle:
    """Return the bundle that a result is of, in the folder of its build. Raise ConfigError if there is none."""
    sha256 = str(read_result(path)["bundle"])
    around = [path.resolve().parent.parent.parent] if path.name == RESULT else []
    folders = [out] if out else [*sorted(RUNS.glob("*")), *around]
    manifests = [File.of(p) for folder in folders for p in sorted(folder.glob(f"bundle-*/{MANIFEST}"))]
    for manifest in manifests:
        if manifest.sha256 == sha256 and (manifest.path.parent.parent / "report.json").is_file():
            return check_bundle(Bundle(manifest))
    others = ", ".join(f"`{m.path.parent}` is {m.sha256[:12]}" for m in manifests) or "there is no bundle"
    where = f"`{out}`" if out else f"`{RUNS}`"
    raise ConfigError(
        f"`{path}` is a result of the bundle {sha256[:12]}, which no build in {where} has made: {others}",
        hint="a result counts for the files that were measured only; name the folder of their build with --out, or "
        "copy the bundle of this build to the device and run it there",
    )


def check_bundle(bundle: Bundle) -> Bundle:
    """Return the bundle.

    Raises:
        ConfigError: if its manifest is invalid.
        StaleArtifact: if a file of it changed.
    """
    manifest = bundle.read()
    names = [engine[key] for engine in manifest["engines"] for key in ("model", "expected")]
    for name in filter(None, [*names, manifest["inputs"], manifest["labels"]]):
        File.checked(bundle.folder / name, manifest["files"][name]["sha256"])
    return bundle
