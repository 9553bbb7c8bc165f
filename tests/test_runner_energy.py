"""Power, clocks and throttling as the runner reads them, on a made-up /sys and with made-up programs of a Jetson."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from edgekd.stages.bench.runner import runner_path
from edgekd_runner import power, system_files
from edgekd_runner.bundle_bench import Watch
from edgekd_runner.cli import run_bundle_command
from edgekd_runner.clocks import hold_clocks
from edgekd_runner.errors import RunnerError
from edgekd_runner.operating_point import find_slowdowns, read_operating_point
from tests.standins.bundles import PROTOCOL, engine, make_bundle, read_result, run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine without sensors and without programs of NVIDIA."""
    made = tmp_path / "root"
    made.mkdir()
    monkeypatch.setattr(system_files, "ROOT", str(made))
    return made


def write(root: Path, **files: object) -> None:
    """Files of `root`; in names, two underscores stand for a slash."""
    for name, text in files.items():
        put(root, name.replace("__", "/"), text)


def put(root: Path, name: str, text: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{text}\n")


def hwmon(root: Path, rails: dict[str, tuple[int, int]], chip: str = "1-0040") -> None:
    """JetPack 5 and newer: millivolts and milliamperes; the fourth input is a sum without current."""
    folder = f"sys/bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon3"
    for index, (label, (mv, ma)) in enumerate(rails.items(), 1):
        put(root, f"{folder}/in{index}_label", label)
        put(root, f"{folder}/in{index}_input", mv)
        put(root, f"{folder}/curr{index}_input", ma)
    put(root, f"{folder}/in4_label", "sum of shunt voltages")


def iio(root: Path, rails: dict[str, int], chip: str = "6-0040") -> None:
    """JetPack 4: milliwatts."""
    for index, (label, mw) in enumerate(rails.items()):
        put(root, f"sys/bus/i2c/devices/{chip}/iio:device0/rail_name_{index}", label)
        put(root, f"sys/bus/i2c/devices/{chip}/iio:device0/in_power{index}_input", mw)


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return path


# --- rails ---


def test_rails_of_new_and_old_jetpacks_are_read(root: Path) -> None:
    hwmon(root, {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 400)})
    iio(root, {"POM_5V_IN": 3187})
    rails = power.list_sysfs_rails()
    assert {label: read() for label, read in rails.items()} == pytest.approx(
        {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 2.0, "POM_5V_IN": 3.187}
    )
    put(root, "sys/bus/i2c/devices/6-0040/iio:device0/in_power0_input", "")
    assert rails["POM_5V_IN"]() is None, "a rail that is off says nothing"


@pytest.mark.parametrize(
    ("labels", "rails"),
    [
        (["POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"], ["POM_5V_IN"]),
        (["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], ["VDD_IN"]),
        (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"], ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]),
        (["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"]),
        (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN"], ["VIN"]),
        (["VDD_GPU", "VDD_CPU"], None),
    ],
)
def test_no_board_counts_a_rail_twice(labels: list[str], rails: list[str] | None) -> None:
    chosen = power.choose_module_rails(labels)
    assert (list(chosen) if chosen else None) == rails


def test_rails_without_a_known_sum_are_not_added_up(root: Path) -> None:
    hwmon(root, {"VDD_GPU": (5000, 1000), "VDD_CPU": (5000, 1000)})
    with pytest.raises(RunnerError, match="of the rails VDD_CPU, VDD_GPU no sum is known"):
        power.open_power_sensor()


TEGRASTATS = {
    "RAM 1531/3964MB (lfb 2x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [35%@729,0%@729,off,2%@729] "
    "EMC_FREQ 0% GR3D_FREQ 45%@921 PLL@32C CPU@34.5C PMIC@100C GPU@34C AO@41C thermal@34.25C POM_5V_IN 3187/3190 "
    "POM_5V_GPU 450/451 POM_5V_CPU 490/500": (
        {"POM_5V_IN": 3187, "POM_5V_GPU": 450, "POM_5V_CPU": 490},
        {"PLL": 32, "CPU": 34.5, "PMIC": 100, "GPU": 34, "AO": 41, "thermal": 34.25},
        (45, 921),
    ),
    "11-05-2024 10:00:00 RAM 2456/7620MB (lfb 4x4MB) SWAP 0/3810MB CPU [2%@1510,1%@1510] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 10%@[1300] NVDEC off cpu@45.5C soc2@44.1C gpu@47.1C tj@47.1C VDD_IN 4968mW/4968mW "
    "VDD_CPU_GPU_CV 1039mW/1039mW VDD_SOC NC/NC": (
        {"VDD_IN": 4968, "VDD_CPU_GPU_CV": 1039},
        {"cpu": 45.5, "soc2": 44.1, "gpu": 47.1, "tj": 47.1},
        (10, 1300),
    ),
    "2026-01-05T10:00:00 RAM 5/61MB GR3D_FREQ 12%@[1300,1300] gpu@47.1C/47.3C cpu@-5C "
    "VDD_GPU_SOC 5139mW/5100mW/9000mW VDD_CPU_CV 10mW/10mW/10mW VIN_SYS_5V0 20mW/20mW/20mW": (
        {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 10, "VIN_SYS_5V0": 20},
        {"gpu": 47.1, "cpu": -5},
        (12, 1300),
    ),
    "RAM 5/122000MB GR3D_FREQ @[1000,1000,1000] gpu@40C VDD_GPU 3000mW/3000mW VIN 30000mW/30000mW": (
        {"VDD_GPU": 3000, "VIN": 30000},
        {"gpu": 40},
        (None, 1000),
    ),
    "GR3D_FREQ 0% GPU 0/0 CPU 311/311 SOC 934/934 CV 0/0 VDDRQ 155/155 SYS5V 1554/1554": (
        {"GPU": 0, "CPU": 311, "SOC": 934, "CV": 0, "VDDRQ": 155, "SYS5V": 1554},
        {},
        (0, None),
    ),
}


@pytest.mark.parametrize("line", TEGRASTATS)
def test_every_dialect_of_tegrastats_is_read(line: str) -> None:
    rails, temperatures, gpu = TEGRASTATS[line]
    told = power.parse_tegrastats(line)
    assert told["rails_mw"] == rails and told["temperatures_c"] == temperatures
    assert (told["gpu_percent"], told["gpu_mhz"]) == gpu


# --- energy ---


def test_energy_is_the_integral_of_power_over_time() -> None:
    ramp = [(0.0, 0.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0)]  # 2 t watts: t * t joules
    assert power.joules(ramp, 0.0, 4.0) == pytest.approx(16)
    assert power.joules(ramp, 0.5, 3.0) == pytest.approx(9 - 0.25), "between the samples, at both ends"
    assert power.joules(ramp, 1.2, 1.4) == pytest.approx(1.4**2 - 1.2**2), "between two samples"
    assert power.joules([(1.0, 5.0)], 0.0, 2.0) == pytest.approx(10), "beyond the samples their last value holds"
    assert power.mean_watts([(0.0, 5.0), (9.0, 5.0)], 2.0, 7.0) == pytest.approx(5)


def measure(home: Path, seconds: float, lock: bool = False) -> dict[str, Any]:
    command = Namespace(command="energy", bundle=str(home), out=None, seconds=seconds, lock_clocks=lock)
    assert run_bundle_command(command) == 0
    result: dict[str, Any] = read_result(home, "energy")
    return result


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", [str(runner_path())])  # by which its children are started
    made = make_bundle(tmp_path / "bundle", engines=[engine("student fp32", "student", "student.onnx")])
    assert run("build", made)[0] == 0
    return made


def test_millijoules_are_taken_from_the_module_rail(home: Path, root: Path) -> None:
    hwmon(root, {"VDD_IN": (5000, 1000), "VDD_SOC": (5000, 300)})
    energy = measure(home, 0.6)
    assert energy["sensor"] == {
        "kind": "ina3221 through sysfs",
        "rails": ["VDD_IN"],
        "domain": "module, without carrier board",
    }
    one = energy["engines"][0]
    assert energy["invalid"] == [] and one["watts"] == pytest.approx(5) and one["idle_w"] == pytest.approx([5, 5])
    assert len(one["repeats"]) == 3
    for repeat in one["repeats"]:
        assert repeat["seconds"] >= 0.6 and len(repeat["power"]) >= 3
        assert repeat["mj"] == pytest.approx(5e3 * repeat["seconds"] / repeat["calls"])
        assert repeat["net_mj"] == pytest.approx(0, abs=1e-9), "the idle power is all that there is"
    assert one["mj"] == sorted(repeat["mj"] for repeat in one["repeats"])[1]
    assert one["inferences_per_joule"] == pytest.approx(1e3 / one["mj"])
    before = (home / "results" / "energy.json").stat().st_mtime
    assert measure(home, 0.6)["engines"] == energy["engines"], "not measured twice"
    assert (home / "results" / "energy.json").stat().st_mtime >= before


def test_without_sysfs_tegrastats_is_asked_and_ended(
    home: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import time\nwhile True:\n    print('VDD_IN 4000mW/4000mW', flush=True); time.sleep(0.1)\n"
    path = program(tmp_path / "bin", "tegrastats", text, monkeypatch)
    energy = measure(home, 0.45)
    assert energy["sensor"]["kind"] == "tegrastats" and energy["engines"][0]["watts"] == pytest.approx(4)
    listed = subprocess.run(["sh", "-c", "cat /proc/[0-9]*/cmdline"], capture_output=True, check=False).stdout
    assert b"pytest" in listed and str(path).encode() not in listed


def test_too_few_readings_make_a_run_invalid(home: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hwmon(root, {"VDD_IN": (5000, 1000)})
    monkeypatch.setattr(power, "SAMPLE_S", 0.3)
    energy = measure(home, 0.1)
    assert energy["invalid"] == ["student fp32: too few readings of the sensor"]


def test_a_sensor_without_readings_is_told(home: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hwmon(root, {"VDD_IN": (5000, 1000)})
    put(root, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr1_input", "")
    monkeypatch.setattr(power, "PATIENCE_S", 0.3)
    with pytest.raises(RunnerError, match="the power sensor gives no reading"):
        measure(home, 0.1)


# --- the operating point ---


def test_the_operating_point_is_read_from_the_system(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devfreq = "sys/devices/platform/17000000.gpu/devfreq/17000000.gpu"
    put(root, f"{devfreq}/cur_freq", 1300500000)
    (root / "sys/class/devfreq").mkdir(parents=True)
    (root / "sys/class/devfreq/17000000.gpu").symlink_to(root / devfreq)
    write(root, sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq=1510400)
    write(root, sys__class__thermal__thermal_zone0__type="gpu-thermal", sys__class__thermal__thermal_zone0__temp=47125)
    write(root, sys__class__thermal__thermal_zone1__type="cv0-thermal", sys__class__thermal__thermal_zone1__temp="")
    write(root, sys__class__hwmon__hwmon1__name="soctherm_oc", sys__class__hwmon__hwmon1__oc3_event_cnt=4)
    write(root, sys__class__thermal__cooling_device0__type="pwm-fan", sys__class__thermal__cooling_device0__cur_state=3)
    write(root, sys__class__thermal__cooling_device1__type="gpu-throttle-alert")
    write(root, sys__class__thermal__cooling_device1__cur_state=0)
    text = "import sys\nassert sys.argv[1:] == ['-q']\nprint('NV Fan Mode:quiet\\nNV Power Mode: MAXN_SUPER\\n2')"
    program(tmp_path / "bin", "nvpmodel", text, monkeypatch)
    assert read_operating_point() == {
        "power_mode": {"name": "MAXN_SUPER", "id": 2},
        "gpu_hz": {"17000000.gpu": 1300500000},
        "cpu_khz": [1510400],
        "temperatures_c": {"gpu-thermal": 47.125},
        "throttle_events": {"oc3": 4},
        "cooling": {"cooling_device1 gpu-throttle-alert": 0},
    }


def point(**changes: Any) -> dict[str, Any]:
    same = {"power_mode": None, "gpu_hz": {"gpu": 10**9}, "throttle_events": {"oc3": 4}, "cooling": {"gpu-alert": 0}}
    return same | changes


@pytest.mark.parametrize(
    ("after", "locked", "words"),
    [
        (point(), True, None),
        (point(throttle_events={"oc3": 6}), False, "the over-current alarm oc3 went off 2 times"),
        (point(cooling={"gpu-alert": 1}), False, "gpu-alert slows the machine because of its heat"),
        (point(gpu_hz={"gpu": 9 * 10**8}), True, "the locked clock of gpu fell from 1000 to 900 MHz"),
        (point(gpu_hz={"gpu": 98 * 10**7}), True, None),
        (point(gpu_hz={"gpu": 10**8}), False, None),
        (point(power_mode={"name": "15W", "id": 0}), False, "the power mode was changed meanwhile"),
    ],
)
def test_a_throttled_run_is_invalid(after: dict[str, Any], locked: bool, words: str | None) -> None:
    assert find_slowdowns(point(), after, locked) == ([words] if words else [])


def test_a_bench_that_was_slowed_is_invalid_and_done_again(home: Path, root: Path) -> None:
    write(root, sys__class__hwmon__hwmon1__name="soctherm_oc", sys__class__hwmon__hwmon1__oc3_event_cnt=4)
    watch = Watch(str(home), ["key"])
    watch.sample()
    write(root, sys__class__hwmon__hwmon1__oc3_event_cnt=5)
    watch.sample()
    assert watch.find_slowdowns(False) == ["the over-current alarm oc3 went off 1 times"]
    killed = Watch(str(home), ["key"])
    assert killed.find_slowdowns(False) == ["the over-current alarm oc3 went off 1 times"], (
        "also of a process that was killed"
    )


def test_a_locked_clock_that_falls_for_one_round_is_seen(home: Path, root: Path) -> None:
    clock = "sys/devices/platform/17000000.gpu/devfreq/17000000.gpu/cur_freq"
    put(root, clock, 10**9)
    watch = Watch(str(home), ["key"])
    for hz in (10**9, 5 * 10**8, 10**9):
        put(root, clock, hz)
        watch.sample()
    watch.finish()
    assert watch.find_slowdowns(True) == ["the locked clock of 17000000.gpu fell to 500 MHz in a round"]
    assert watch.find_slowdowns(False) == []


# --- clocks ---

JETSON_CLOCKS = """
import sys, pathlib
log = pathlib.Path(__file__).with_name("log")
log.open("a").write(" ".join(pathlib.Path(word).name for word in sys.argv[1:]) + ";")
if sys.argv[1:2] == ["--store"]:
    pathlib.Path(sys.argv[2]).write_text("stored")
"""


def log_of(path: Path) -> str:
    return path.with_name("log").read_text()


def test_clocks_change_only_when_asked_and_are_put_back(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path / "bin", "jetson_clocks", JETSON_CLOCKS, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with hold_clocks(str(tmp_path), False):
        assert not path.with_name("log").exists()
    with pytest.raises(ZeroDivisionError), hold_clocks(str(tmp_path), True):
        assert log_of(path) == "--store clocks.saved;;" and (tmp_path / "clocks.saved").exists()
        raise ZeroDivisionError
    assert log_of(path) == "--store clocks.saved;;--restore clocks.saved;" and not (tmp_path / "clocks.saved").exists()


def test_clocks_that_a_killed_run_left_locked_are_put_back(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path / "bin", "jetson_clocks", JETSON_CLOCKS, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "clocks.saved").write_text("stored")
    with hold_clocks(str(tmp_path), False):
        assert log_of(path) == "--restore clocks.saved;"


def test_locking_clocks_needs_root_and_the_program(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunnerError, match="no jetson_clocks"), hold_clocks(str(tmp_path), True):
        pass
    program(tmp_path / "bin", "jetson_clocks", JETSON_CLOCKS, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RunnerError, match="only root can change clocks"), hold_clocks(str(tmp_path), True):
        pass


def test_a_signal_puts_the_clocks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path / "bin", "jetson_clocks", JETSON_CLOCKS, monkeypatch)
    home = make_bundle(tmp_path / "bundle", protocol=PROTOCOL | {"rounds": 40, "calls_per_round": 2000})
    assert run("build", home)[0] == 0
    code = "import os, runpy, sys; os.geteuid = lambda: 0; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    words = [sys.executable, "-c", code, str(runner_path()), "bench", "--bundle", str(home), "--lock-clocks"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if json.loads(line).get("progress"):
                break
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert time.monotonic() - asked < 5
    assert log_of(path) == "--store clocks.saved;;--restore clocks.saved;"
