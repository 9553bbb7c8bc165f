"""The operating point: power mode, clocks, temperatures and throttling at one moment, and what slowed the machine."""

import os
import re

from edgekd_runner.machine import read_temperatures
from edgekd_runner.programs import find_program, run_program
from edgekd_runner.system_files import find_paths, read_int, read_text

GPU_CLOCKS = ("/sys/class/devfreq/*", "/sys/devices/*gpu*/devfreq/*", "/sys/devices/platform/*gpu*/devfreq/*")
GPU_NAMES = ("gpu", "gp10b", "gv11b", "ga10b", "gb10b")
NVPMODEL = ("nvpmodel", "/usr/sbin/nvpmodel")
CLOCK_DROP = 0.97  # of a locked clock: below, something holds it down


def read_operating_point():
    """Return what the machine runs at now; what cannot be read is empty or null."""
    cpu_clocks = find_paths("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    return {
        "power_mode": read_power_mode(),
        "gpu_hz": read_gpu_clocks(),
        "cpu_khz": [read_int(path) for path in cpu_clocks],
        "temperatures_c": read_temperatures(),
        "throttle_events": read_throttle_events(),
        "cooling": read_cooling(),
    }


def read_power_mode():
    """Return name and number as `nvpmodel -q` has them; None where there is no nvpmodel."""
    program = find_program(NVPMODEL)
    text = run_program([program, "-q"], 10)[0] if program else ""
    name = re.search(r"NV Power Mode: *(\S+)", text)
    index = re.search(r"^(\d+)$", text, re.MULTILINE)
    return {"name": name.group(1), "id": int(index.group(1)) if index else None} if name else None


def read_gpu_clocks():
    """Return Hz by device; a device can be listed in several places."""
    clocks = {}
    for pattern in GPU_CLOCKS:
        for path in find_paths(pattern):
            name = os.path.basename(os.path.realpath(path))
            if any(part in name for part in GPU_NAMES):
                clocks[name] = read_int(os.path.join(path, "cur_freq"))
    return clocks


def read_throttle_events():
    """Return how often each over-current alarm went off since boot: oc1 is under-voltage, oc2 average, oc3 instant."""
    events = {}
    for path in find_paths("/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        if read_text(os.path.join(os.path.dirname(path), "name")) == "soctherm_oc":
            events[os.path.basename(path)[: -len("_event_cnt")]] = read_int(path)
    return events


def read_cooling():
    """Return how far each device that slows the machine because of heat is on, 0 for off; fans do not slow it."""
    states = {}
    for path in find_paths("/sys/class/thermal/cooling_device*"):
        kind = read_text(os.path.join(path, "type"))
        if "fan" not in kind:
            states["%s %s" % (os.path.basename(path), kind)] = read_int(os.path.join(path, "cur_state"))
    return states


def find_slowdowns(before, after, locked):
    """Return a sentence on each thing that slowed the machine between two operating points: its times do not count.

    `locked` says whether the clocks were held, and must not have fallen.
    """
    sentences = []
    for name, count in after["throttle_events"].items():
        alarms = (count or 0) - (before["throttle_events"].get(name) or 0)
        if alarms > 0:
            sentences.append("the over-current alarm %s went off %d times" % (name, alarms))
    for name, state in after["cooling"].items():
        if (state or 0) > max(0, before["cooling"].get(name) or 0):
            sentences.append("%s slows the machine because of its heat" % name)
    for name, clock in after["gpu_hz"].items():
        first = before["gpu_hz"].get(name)
        if locked and clock and first and clock < CLOCK_DROP * first:
            mhz = (name, first // 10**6, clock // 10**6)
            sentences.append("the locked clock of %s fell from %d to %d MHz" % mhz)
    if before["power_mode"] != after["power_mode"]:
        sentences.append("the power mode was changed meanwhile")
    return sentences
