"""Command `energy`: millijoules of an inference, from the power of the module while an engine runs without pause."""

import time

from edgekd_runner.bench import open_models, select_inputs
from edgekd_runner.bundle import job_settings, load_bundle_inputs
from edgekd_runner.child_process import run_task
from edgekd_runner.clocks import hold_clocks
from edgekd_runner.errors import RunnerError
from edgekd_runner.messages import emit
from edgekd_runner.operating_point import find_slowdowns, read_operating_point
from edgekd_runner.power import PowerMeter, joules, mean_watts, open_power_sensor
from edgekd_runner.results import Checkpoint, built_engines, engine_key, engine_spec, load_result

REPEATS = 3  # loops of each engine


def measure_energy(bundle, out, args):
    """Return the energy of an inference of each engine; the reason why not, where there is no sensor."""
    engines, seconds = built_engines(bundle, out), args.seconds
    previous = load_result(bundle, out, "energy")
    key = [[engine_key(engine) for engine in engines], seconds, args.lock_clocks]
    if previous and previous.get("key") == key and not previous["invalid"]:
        emit({"progress": 1, "of": 1, "note": "measured before; remove energy.json to measure again"})
        return previous
    try:
        sensor = open_power_sensor()
    except RunnerError as error:
        emit({"note": error.error})
        return {"reason": error.error, "hint": error.hint}
    checkpoint = Checkpoint(out, "energy", [bundle["sha256"], key])
    with PowerMeter(sensor) as meter, hold_clocks(out, args.lock_clocks):
        meter.wait()
        before = read_operating_point()
        for index, engine in enumerate(engines):
            if engine["name"] not in checkpoint.parts:
                emit({"progress": index, "of": len(engines), "note": "energy %s" % engine["name"]})
                part = measure_engine(bundle, out, engine, meter, seconds, args.lock_clocks)
                checkpoint.save(engine["name"], part)
        after = read_operating_point()
    emit({"progress": len(engines), "of": len(engines)})
    parts = [checkpoint.parts[engine["name"]] for engine in engines]
    return {
        "sensor": {"kind": sensor.kind, "rails": list(sensor.labels), "domain": "module, without carrier board"},
        "engines": parts,
        "before": before,
        "after": after,
        "invalid": ["%s: %s" % (part["name"], text) for part in parts for text in part["invalid"]],
        "locked": args.lock_clocks,
        "key": key,
    }


def measure_engine(bundle, out, engine, meter, seconds, locked):
    """Return the energy of one engine, with the idle power before and after it."""
    before, idle_start = read_operating_point(), time.monotonic()
    time.sleep(seconds / 3.0)
    idle_stop = time.monotonic()
    loops = run_task("energy", bundle, out, dict(engine_spec(engine), seconds=seconds))["loops"]
    busy = read_operating_point()
    rest_start = time.monotonic() + seconds / 6.0  # clocks and voltages take a while to fall
    time.sleep(seconds / 2.0)
    rest_stop = time.monotonic()
    idle_w = [mean_watts(meter.readings, idle_start, idle_stop), mean_watts(meter.readings, rest_start, rest_stop)]
    repeats = [summarize_loop(loop, meter.readings, sum(idle_w) / 2) for loop in loops]
    medians = {key: sorted(r[key] for r in repeats)[len(repeats) // 2] for key in ("mj", "net_mj", "watts")}
    few = [] if min(len(r["power"]) for r in repeats) > 2 else ["too few readings of the sensor"]
    invalid = find_slowdowns(before, busy, locked) + few
    result = {"name": engine["name"], "idle_w": idle_w, "repeats": repeats, "invalid": invalid}
    return dict(result, before=before, busy=busy, inferences_per_joule=1e3 / medians["mj"], **medians)


def summarize_loop(loop, readings, idle_w):
    """Return the energy of a call in one loop, with (`mj`) and without (`net_mj`) what the module draws idle."""
    total_j, seconds = joules(readings, loop["start"], loop["stop"]), loop["stop"] - loop["start"]
    power = [[round(t - loop["start"], 4), w] for t, w in readings if loop["start"] <= t <= loop["stop"]]
    return {
        "calls": loop["calls"],
        "seconds": seconds,
        "mj": 1e3 * total_j / loop["calls"],
        "net_mj": 1e3 * (total_j - idle_w * seconds) / loop["calls"],
        "watts": total_j / seconds,
        "power": power,
    }


def energy_task(bundle, out, spec):
    """Run one engine without pause, in a child: REPEATS times `seconds`, after a third of it to warm up."""
    images = load_bundle_inputs(bundle)
    sessions, _ = open_models(job_settings(bundle), [spec], images)
    inputs, loops = select_inputs(images), []
    run_for(sessions[0], inputs, spec["seconds"] / 3.0)
    for _ in range(REPEATS):
        start = time.monotonic()
        calls = run_for(sessions[0], inputs, spec["seconds"])
        loops.append({"start": start, "stop": time.monotonic(), "calls": calls})
    return {"loops": loops}


def run_for(session, inputs, seconds):
    """Call a model for so many seconds; return the number of calls."""
    stop, calls = time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        session.run(inputs[calls % len(inputs)])
        calls += 1
    return calls
