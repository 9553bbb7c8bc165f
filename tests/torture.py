"""Breaks builds in every way that a machine in CI breaks them, and looks whether anything was lost.

    python -m tests.torture [--kills 30] [--stops 10] [--out runs/torture]      # make torture

Each fault hits a build of the digits recipe with `--smoke`; then the same command is run again, without the fault.
Nothing is lost where it ends well, no finished step was made again, and teacher, students and ONNX files are byte for
byte those of a build that nothing happened to. Ends with a Markdown table; the exit code is 1 if anything was lost.
Full disks and read-only folders are made by mounting, which needs root; without it, they are said to be left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STOP_S = 5.0  # within which a build has to end that was asked to
LEFT = (".partial", ".unreadable")  # of a step: half of it, what another version made
YEAR_S = 365 * 24 * 3600
MODELS = ("teacher", "students", "models")  # of a manifest's provenance: hashes of what was made


@dataclass
class Row:
    """One kind of fault: how often it was tried, what went wrong, how long the next build took."""

    fault: str
    tries: int = 0
    lost: list[str] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    remark: str = ""

    def cells(self) -> list[str]:
        took = f"{statistics.median(self.recovery_s):.1f} s, at most {max(self.recovery_s):.1f} s"
        lost = "nothing" if not self.lost else "; ".join(sorted(set(self.lost)))
        return [self.fault, str(self.tries), lost, took if self.recovery_s else "–", self.remark]


@dataclass(frozen=True)
class Bench:
    """Where builds are broken; `whole` is one that nothing happened to. `words` are further ones of every command."""

    home: Path
    words: tuple[str, ...] = ()
    hashes: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def at(cls, home: Path, *words: str) -> Bench:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        begun = time.monotonic()
        done = cls(home, words).build(home / "whole")
        assert done.returncode == 0, done.stderr
        return cls(home, words, hashes(home / "whole"), time.monotonic() - begun)

    def command(self, out: Path) -> list[str]:
        words = ["build", "digits", "--smoke", "--out", str(out), "--calib-root", str(out / "calib_data"), *self.words]
        return [sys.executable, "-m", "edgekd", *words]

    def build(self, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command(out), *more], capture_output=True, text=True, check=False)

    def started(self, out: Path) -> subprocess.Popen[str]:
        """In a process group of its own, as a container is one."""
        return subprocess.Popen(
            self.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def again(self, row: Row, out: Path, kept: dict[str, int] | None = None) -> None:
        """The same command once more, without the fault."""
        begun = time.monotonic()
        done = self.build(out)
        row.recovery_s.append(time.monotonic() - begun)
        if done.returncode:
            row.lost.append(f"the next build failed: {last(done.stderr)}")
        elif hashes(out) != self.hashes:
            row.lost.append("the next build made other files")
        elif kept is not None and kept != {name: steps(out).get(name) for name in kept}:
            row.lost.append("finished steps were made again")


def hashes(out: Path) -> dict[str, object]:
    told = json.loads((out / "manifest.json").read_text())["provenance"]
    return {key: told[key] for key in MODELS}


def steps(out: Path) -> dict[str, int]:
    """The finished steps of a build, and when they were."""
    found = (path for path in (out / "steps").glob("*/step.json") if path.parent.suffix not in LEFT)
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def last(text: str) -> str:
    return next(iter([line for line in text.strip().splitlines() if line.startswith("error")] or [text[-200:]]))


def gone(group: int, within_s: float) -> bool:
    """Whether no process of the group is left in time."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def killed(bench: Bench, times: int, chance: random.Random) -> Row:
    """Every other time the command alone, as an out-of-memory killer does, and its children are left."""
    row = Row("`kill -9` at a random moment")
    for number in range(times):
        out, child = bench.home / "killed", bench.started(bench.home / "killed")
        time.sleep(chance.uniform(0.1, bench.seconds))
        (os.killpg if number % 2 else os.kill)(child.pid, signal.SIGKILL)
        child.communicate()
        if not gone(child.pid, 10):
            row.lost.append("children went on for 10 s")
            os.killpg(child.pid, signal.SIGKILL)
        row.tries += 1
        bench.again(row, out, steps(out))
        shutil.rmtree(out)
    return row


def stopped(bench: Bench, times: int, chance: random.Random, number: signal.Signals) -> Row:
    row, waited = Row(f"{number.name} at a random moment"), []
    for _ in range(times):
        out, child = bench.home / "stopped", bench.started(bench.home / "stopped")
        time.sleep(chance.uniform(0.5, 0.9 * bench.seconds))
        asked = time.monotonic()
        child.send_signal(number)
        told = child.communicate()[1]
        waited.append(time.monotonic() - asked)
        row.tries += 1
        if child.returncode not in (0, 128 + number):  # 0: it was done before
            row.lost.append(f"ended with {child.returncode}")
        if "Traceback" in told:
            row.lost.append("ended with a traceback")
        if waited[-1] > STOP_S or not gone(child.pid, STOP_S):
            row.lost.append(f"took more than {STOP_S:.0f} s to end")
        bench.again(row, out, steps(out))
        shutil.rmtree(out)
    row.remark = f"ended within {max(waited):.1f} s"
    return row


def full(bench: Bench) -> Row:
    """The disk is full in the middle of each step, and in the report; then it has room."""
    row = Row("disk full, in the middle of each step and of the report")
    whole = bench.home / "whole"
    order = sorted(steps(whole), key=steps(whole).__getitem__)
    sizes = [sum(p.stat().st_size for p in (whole / "steps" / name).rglob("*") if p.is_file()) for name in order]
    rooms = [sum(sizes[:i]) + size // 2 for i, size in enumerate(sizes)] + [sum(sizes) + 50_000]
    for room in rooms:
        with mounted(bench.home / "disk", f"size={max(room, 16_384)}") as disk:
            done = bench.build(disk / "run")
            if done.returncode == 0:
                continue  # so small a step that it fits into the last page
            row.tries += 1
            if done.returncode != 1 or "free some space" not in done.stderr or "Traceback" in done.stderr:
                row.lost.append(f"not told in words: {last(done.stderr)}")
            kept = steps(disk / "run")
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            bench.again(row, disk / "run", kept)
    return row


def read_only(bench: Bench) -> Row:
    row = Row("a read-only folder")
    with mounted(bench.home / "disk", "size=1g") as disk:
        for before in (False, True):
            if before:
                bench.build(disk / "run")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            done = bench.build(disk / "run", *(["--set", "student.epochs=3"] if before else []))
            row.tries += 1
            if done.returncode != 1 or "Traceback" in done.stderr or "read-only" not in done.stderr.lower():
                row.lost.append(f"not told in words: {last(done.stderr)}")
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            bench.again(row, disk / "run")
    return row


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def together(bench: Bench) -> Row:
    """Into one folder: the second is told. Into two, with one folder of calibration sets: both end well."""
    row = Row("two builds at once")
    out = bench.home / "together"
    first = bench.started(out)
    until = time.monotonic() + 60
    while not (out / "steps" / "lock").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    second = bench.build(out)
    if second.returncode == 0 or "in use by a running build" not in second.stderr:
        row.lost.append(f"the second was not told: {last(second.stderr)}")
    if first.wait():
        row.lost.append("the first one failed")
    row.tries += 1
    bench.again(row, out, steps(out))
    shared = ["--calib-root", str(bench.home / "calib")]
    outs = [bench.home / "one", bench.home / "two"]
    both = [subprocess.Popen([*bench.command(o), *shared], stderr=subprocess.PIPE, text=True) for o in outs]
    for out, child in zip(outs, both, strict=True):
        told = child.communicate()[1]
        if child.returncode or hashes(out) != bench.hashes:
            row.lost.append(f"one beside another failed: {last(told)}")
        shutil.rmtree(out)
    row.tries += 1
    return row


def earlier(bench: Bench, chance: random.Random) -> Row:
    """All files are a year in the future, of a finished and of a killed build."""
    row = Row("clock set back by a year")
    out = bench.home / "earlier"
    for wait_s in (None, chance.uniform(0.3, 0.7) * bench.seconds):
        if wait_s is None:
            shutil.copytree(bench.home / "whole", out)
        else:
            child = bench.started(out)
            time.sleep(wait_s)
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        for path in [out, *out.rglob("*")]:
            os.utime(path, (time.time() + YEAR_S,) * 2)
        row.tries += 1
        bench.again(row, out, steps(out))
        shutil.rmtree(out)
    return row


def older(bench: Bench) -> Row:
    """Folders as other versions leave them: what cannot be read is made again."""
    row = Row("a folder of another version")
    spoilt: dict[str, Callable[[Path], object]] = {
        "step.json": lambda out: [p.write_text('{"output": {}}') for p in out.glob("steps/*/step.json")],
        "no step.json": lambda out: [p.unlink() for p in out.glob("steps/*/step.json")],
        "report.json": lambda out: (out / "report.json").write_text('{"schema": 0}'),
        "manifest.json": lambda out: (out / "manifest.json").write_text('{"schema": 0}'),
        "a step half done": lambda out: [
            (p.rename(p.with_name(f"{p.name}.partial")), (out / "steps" / f"{p.name}.partial" / "old").write_text("?"))
            for p in out.glob("steps/*-*")
        ],
    }
    for what, spoil in spoilt.items():
        out = bench.home / "older"
        shutil.copytree(bench.home / "whole", out)
        spoil(out)
        done = bench.build(out)
        row.tries += 1
        if done.returncode:
            row.lost.append(f"{what}: {last(done.stderr)}")
        bench.again(row, out, steps(out))
        shutil.rmtree(out)
    return row


def rows(home: Path, kills: int, stops: int, seed: int) -> Iterator[Row]:
    """Each fault in its turn."""
    chance, bench = random.Random(seed), Bench.at(home)
    print(f"a build that nothing happens to takes {bench.seconds:.1f} s", flush=True)
    yield killed(bench, kills, chance)
    yield stopped(bench, stops, chance, signal.SIGTERM)
    yield stopped(bench, stops, chance, signal.SIGINT)
    yield together(bench)
    yield earlier(bench, chance)
    yield older(bench)
    if os.geteuid() == 0:
        yield full(bench)
        yield read_only(bench)
    else:
        print("left out, for they need root: a full disk, a read-only folder")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stops", type=int, default=10, help="by SIGTERM, and as many by Ctrl-C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torture"))
    asked = parser.parse_args()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell: builds would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    print("| fault | tries | lost | the next build took | |\n| --- | ---: | --- | --- | --- |", flush=True)
    lost = False
    for row in rows(asked.out, asked.kills, asked.stops, asked.seed):
        print(f"| {' | '.join(row.cells())} |", flush=True)
        lost = lost or bool(row.lost)
    shutil.rmtree(asked.out)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
