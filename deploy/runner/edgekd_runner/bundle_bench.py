"""Command `bench` on a bundle: all engines timed in one child, with the machine watched meanwhile."""

import os

from edgekd_runner.bundle_collect import medians_of, recommend_engine
from edgekd_runner.child_process import run_task
from edgekd_runner.clocks import hold_clocks
from edgekd_runner.messages import emit
from edgekd_runner.operating_point import (
    CLOCK_DROP,
    find_slowdowns,
    read_cooling,
    read_gpu_clocks,
    read_operating_point,
    read_throttle_events,
)
from edgekd_runner.results import Checkpoint, built_engines, engine_key, engine_spec, load_result
from edgekd_runner.trtexec import time_with_trtexec


def bench_bundle(bundle, out, args):
    """Time all engines, the first teacher twice as the A/A control; what was measured before is not measured again."""
    engines, lock = built_engines(bundle, out), args.lock_clocks
    keys, previous = [engine_key(engine) for engine in engines], load_result(bundle, out, "bench")
    if previous and previous["engine_keys"] == keys and previous["locked"] == lock and not previous["invalid"]:
        rounds = bundle["protocol"]["rounds"]
        emit({"progress": rounds, "of": rounds, "note": "measured before; remove bench.json to measure again"})
        result = previous
    else:
        result = measure_engines(bundle, out, engines, keys, lock)
    verified = load_result(bundle, out, "verify")
    return dict(result, recommended=recommend_engine(bundle, verified, medians_of(result)))


def measure_engines(bundle, out, engines, keys, lock):
    """Return what `bench` records of the engines; `keys` are theirs, `lock` holds the clocks meanwhile."""
    control = next((engine for engine in engines if engine["role"] == "teacher"), engines[0])
    models = [engine_spec(engine) for engine in engines]
    models.append(dict(engine_spec(control), name="%s again" % control["name"]))  # the A/A control
    with hold_clocks(out, lock):
        watch = Watch(out, [bundle["sha256"], keys, lock])
        spec = {"models": models, "locked": lock, "power_mode": watch.current["before"]["power_mode"]}
        result = run_task("bench", bundle, out, spec, watch.sample)
        watch.finish()
        if bundle["runtime"] == "tensorrt":
            result["trtexec"] = time_with_trtexec(engines, out)
    record = {"engine_keys": keys, "locked": lock, "operating_points": watch.points}
    return dict(result, invalid=watch.find_slowdowns(lock), **record)


class Watch:
    """The operating points of a bench: at its start, after every round, at its end; of all processes that shared it."""

    def __init__(self, out, key):
        before = read_operating_point()
        self.checkpoint = Checkpoint(out, "watch", key + [before["power_mode"]])
        self.current = {"before": before, "after": before, "gpu_hz": []}

    @property
    def points(self):
        return list(self.checkpoint.parts.values())

    def sample(self):
        """Read what changes quickly and costs little."""
        clocks = read_gpu_clocks()
        self.current["gpu_hz"].append(clocks)
        light = {"gpu_hz": clocks, "throttle_events": read_throttle_events(), "cooling": read_cooling()}
        self.save(dict(self.current["before"], **light))

    def finish(self):
        self.save(read_operating_point())

    def save(self, after):
        self.current["after"] = after
        self.checkpoint.save("%d" % os.getpid(), self.current)

    def find_slowdowns(self, locked):
        """Return sentences on what slowed the machine in the meantime."""
        sentences = [text for p in self.points for text in find_slowdowns(p["before"], p["after"], locked)]
        for point in self.points:
            for name, clock in point["before"]["gpu_hz"].items():
                clocks = [hz[name] for hz in point["gpu_hz"] if hz.get(name)]
                if locked and clock and clocks and min(clocks) < CLOCK_DROP * clock:
                    lowest = min(clocks) // 10**6
                    sentences.append("the locked clock of %s fell to %d MHz in a round" % (name, lowest))
        return sentences
