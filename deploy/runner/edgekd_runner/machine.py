"""The machine: what it is, how much memory is free, and what else it did while something was measured."""

import os
import platform
import re

from edgekd_runner.system_files import find_paths, read_int, read_text, system_path

# flags of the processor that decide INT8 speed
CPU_FLAGS = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16 asimddp i8mm bf16".split()


def describe_machine():
    """Return what this machine is. What cannot be read is null, or `unknown`."""
    fields = {}
    for line in read_text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    board = read_text("/proc/device-tree/model").strip("\0")
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = [line.split()[1] for line in read_text("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    return {
        "processor": fields.get("model name") or board or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": cpu_quota(),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "memory_gib": round(int(memory[0]) / 2.0**20, 1) if memory else 0.0,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_quota():
    """Return how many cores' time the control group allows, or None without a limit."""
    fields = read_text("/sys/fs/cgroup/cpu.max").split()
    if not fields:  # version 1
        fields = [read_text("/sys/fs/cgroup/cpu/cpu.cfs_%s_us" % name) for name in ("quota", "period")]
    return int(fields[0]) / int(fields[1]) if fields[0].isdigit() and int(fields[1]) else None


def read_counters():
    """Return counters of the whole machine and of this process, for `compute_conditions` to subtract."""
    lines = read_text("/proc/stat").splitlines()
    ticks = [int(word) for word in lines[0].split()[1:9]] if lines else [0] * 8
    throttled = read_text("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count")
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "total": sum(ticks),
        "busy": sum(ticks) - ticks[3] - ticks[4] - ticks[7],  # without idle, waiting for disks, stolen
        "steal": ticks[7],
        "process": sum(os.times()[:4]) * (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100),
        "throttled": int(throttled) if throttled.isdigit() else None,
        "hottest": max(read_temperatures().values() or [None]),
        "mhz": clock_mhz(),
    }


def compute_conditions(before, after):
    """Return what else went on between two readings of the counters.

    Percentages are of all processor time; what cannot be read is null.
    """
    elapsed = {key: after[key] - before[key] for key in ("total", "busy", "steal", "process")}
    percent = 100.0 / elapsed["total"] if elapsed["total"] else None
    return {
        "load_before": before["load"],
        "load_after": after["load"],
        "others_percent": percent and max(0.0, percent * (elapsed["busy"] - elapsed["process"])),
        "steal_percent": percent and percent * elapsed["steal"],
        "throttled": None if before["throttled"] is None else after["throttled"] - before["throttled"],
        "temperature_c_before": before["hottest"],
        "temperature_c_after": after["hottest"],
        "clock_mhz_before": before["mhz"],
        "clock_mhz_after": after["mhz"],
    }


def clock_mhz():
    """Return the clock of the fastest core at this moment, or None."""
    clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)", read_text("/proc/cpuinfo"), re.MULTILINE)
    return round(max(map(float, clocks))) if clocks else None


def read_temperatures():
    """Return degrees Celsius by zone. Zones of parts that are off cannot be read."""
    zones = {}
    for path in find_paths("/sys/class/thermal/thermal_zone*"):
        value = read_int(os.path.join(path, "temp"))
        if value is not None:
            zones[read_text(os.path.join(path, "type")) or os.path.basename(path)] = value / 1000.0
    return zones


def memory_gib():
    """Return all memory, what programs can still have, and free swap, in GiB, by the kernel's names."""
    kib = dict(re.findall(r"^(\w+): +(\d+) kB", read_text(system_path("/proc/meminfo")), re.MULTILINE))
    return {name: round(int(kib.get(name, 0)) / 2.0**20, 2) for name in ("MemTotal", "MemAvailable", "SwapFree")}


def available_memory():
    """Return the bytes that programs can still have."""
    return int(memory_gib()["MemAvailable"] * 2**30)
