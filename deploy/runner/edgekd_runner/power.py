"""Power: the sensors of a Jetson, readings of them in the background, and the energy between two times."""

import os
import re
import subprocess
import threading
import time

from edgekd_runner.errors import RunnerError
from edgekd_runner.programs import PATIENCE_S, TEXT, end_process, find_program
from edgekd_runner.system_files import find_paths, read_int, read_text

# rails that together are what the module takes, nothing twice; the first row whose rails are all there
MODULE_RAILS = (
    ("VDD_IN",),  # TX2, Xavier NX, Orin Nano, Orin NX
    ("POM_5V_IN",),  # Nano
    ("VIN",),  # Thor
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is behind the last
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
TEGRASTATS = ("tegrastats", "/usr/bin/tegrastats")
SAMPLE_S = 0.1  # the INA3221 averages; 5 to 10 readings a second are what can be trusted
RAIL = re.compile(r"(?<![\w@%/])([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?:/(\d+)(?:mW)?)?(?![\w/])")
TEMPERATURE = re.compile(r"(\w+)@(-?\d+(?:\.\d+)?)C")
GPU_LOAD = re.compile(r"GR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+)?)?")


def list_sysfs_rails():
    """Return every rail of the INA3221 sensors: label -> function that reads watts, or None."""
    rails = {}
    for path in find_paths("/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[1-4]_label"):  # JetPack 5 and newer
        folder, index = os.path.dirname(path), os.path.basename(path)[2]
        if os.path.exists(os.path.join(folder, "curr%s_input" % index)):
            sources = [os.path.join(folder, "%s%s_input" % (kind, index)) for kind in ("in", "curr")]
            rails[read_text(path)] = watts_reader(*sources)
    for path in find_paths("/sys/bus/i2c/devices/*/iio:device*/rail_name_*"):  # JetPack 4
        index = path.rpartition("_")[2]
        rails[read_text(path)] = watts_reader(os.path.join(os.path.dirname(path), "in_power%s_input" % index))
    return rails


def watts_reader(*paths):
    """Return a function that reads watts from a file of milliwatts, or from two, of millivolts and milliamperes."""

    def read_watts():
        values = [read_int(path) for path in paths]
        if None in values:
            return None
        return values[0] / 1e3 if len(values) == 1 else values[0] * values[1] / 1e6

    return read_watts


def choose_module_rails(labels):
    """Return the rails that together are what the module takes, or None."""
    return next((rails for rails in MODULE_RAILS if set(rails) <= set(labels)), None)


def parse_tegrastats(line):
    """Return one line of any JetPack: rails in milliwatts as they are now, temperatures, load and clock of the GPU."""
    load = GPU_LOAD.search(line)
    skipped = ("RAM", "SWAP", "IRAM")
    return {
        "rails_mw": {m.group(1): int(m.group(2)) for m in RAIL.finditer(line) if m.group(1) not in skipped},
        "temperatures_c": {m.group(1): float(m.group(2)) for m in TEMPERATURE.finditer(line)},
        "gpu_percent": int(load.group(1)) if load and load.group(1) else None,
        "gpu_mhz": int(load.group(2)) if load and load.group(2) else None,
    }


class SysfsSensor:
    """The INA3221 sensors, read from /sys."""

    def __init__(self, labels):
        self.kind, self.labels = "ina3221 through sysfs", labels
        rails = list_sysfs_rails()
        self.readers = [rails[label] for label in labels]

    def samples(self, stopped):
        """Yield pairs of seconds (monotonic) and watts, until `stopped` is set."""
        while not stopped.wait(SAMPLE_S):
            watts = [read_watts() for read_watts in self.readers]
            if None not in watts:
                yield time.monotonic(), sum(watts)

    def close(self):
        pass


class Tegrastats:
    """What NVIDIA's program tegrastats prints."""

    def __init__(self, program):
        command = [program, "--interval", str(int(1000 * SAMPLE_S))]
        options = dict(TEXT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, **options)
        self.kind = "tegrastats"
        self.labels = choose_module_rails(parse_tegrastats(self.process.stdout.readline())["rails_mw"])

    def samples(self, stopped):
        """Yield pairs of seconds (monotonic) and watts, until `stopped` is set."""
        with self.process.stdout as lines:
            for line in lines:
                rails = parse_tegrastats(line)["rails_mw"]
                if stopped.is_set():
                    return
                if set(self.labels) <= set(rails):
                    yield time.monotonic(), sum(rails[label] for label in self.labels) / 1e3

    def close(self):
        end_process(self.process)


def open_power_sensor():
    """Return the first sensor that measures what the module takes. Raises RunnerError where there is none."""
    rails = list_sysfs_rails()
    if choose_module_rails(rails):
        return SysfsSensor(choose_module_rails(rails))
    program = find_program(TEGRASTATS)
    if program:
        sensor = Tegrastats(program)
        if sensor.labels:
            return sensor
        sensor.close()
    hint = "measure at the plug"
    if rails:
        labels = ", ".join(sorted(rails))
        raise RunnerError("of the rails %s no sum is known that counts nothing twice" % labels, hint, 1)
    raise RunnerError("this machine has no power sensor that the runner knows", hint, 1)


class PowerMeter:
    """Collects (seconds, watts) in a thread as long as it is open."""

    def __init__(self, sensor):
        self.sensor, self.readings, self.stopped = sensor, [], threading.Event()
        self.thread = threading.Thread(target=self.collect)
        self.thread.daemon = True

    def collect(self):
        for reading in self.sensor.samples(self.stopped):
            self.readings.append(reading)

    def __enter__(self):
        self.thread.start()
        return self

    def wait(self):
        """Wait until the first reading. Raises RunnerError if none comes."""
        for _ in range(100):
            if self.readings:
                return
            time.sleep(PATIENCE_S / 100.0)
        hint = "look at it with `tegrastats`; or measure at the plug"
        raise RunnerError("the power sensor gives no reading", hint, 1)

    def __exit__(self, *error):
        self.stopped.set()
        self.sensor.close()
        self.thread.join(PATIENCE_S)


def joules(readings, start, stop):
    """Return the integral of watts by trapezoids between two times; at both ends between the nearest readings."""
    inside = [(t, w) for t, w in readings if start < t < stop]
    corners = [(start, watts_at(readings, start))] + inside + [(stop, watts_at(readings, stop))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(corners, corners[1:]))


def watts_at(readings, when):
    """Return the watts at a time, on the line between the two nearest readings."""
    before = [reading for reading in readings if reading[0] <= when]
    after = [reading for reading in readings if reading[0] > when]
    if not before or not after:
        return (before or after[:1])[-1][1]
    (t0, w0), (t1, w1) = before[-1], after[0]
    return w0 + (w1 - w0) * (when - t0) / (t1 - t0)


def mean_watts(readings, start, stop):
    return joules(readings, start, stop) / (stop - start)
