"""No byte leaves: a whole build with all its children opens no connection, though a user has agreed to everything."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd._environment import TELEMETRY_OFF

ROOT = Path(__file__).parent.parent
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
SENDER = any(Path(place, "openvino_telemetry").is_dir() for place in sys.path)  # of its messages
# how Linux numbers an architecture, and its calls connect and sendto
CALLS = {"x86_64": (0xC000003E, 42, 44), "aarch64": (0xC00000B7, 203, 206)}
# a kernel that takes filters looks for one where none is, and says that the address is bad (14)
PROBE = "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.prctl(22, 2, None); assert ctypes.get_errno() == 14"
FILTERS = platform.machine() in CALLS and subprocess.run([sys.executable, "-c", PROBE], check=False).returncode == 0

# Put before every Python of a build. What Python code tries is written down and refused; what code in C tries, which
# no hook of Python sees, ends the process with a trace: the kernel's filter holds for its threads and children, too. It
# cannot read an address, but knows those of the internet by their lengths: 16 bytes, 28 in version 6.
SITE = """
import ctypes, faulthandler, signal, struct, sys

def hook(event, arguments):
    inner = event == "socket.connect" and arguments[0].family not in (2, 10)
    if event.startswith(("socket.connect", "socket.get", "socket.send", "urllib.", "http.client.")) and not inner:
        with open({log!r}, "a") as log:
            log.write(event + " " + repr(arguments[1:]) + "\\n")
        raise OSError("not here")

def forbid(architecture, connect, sendto):
    load, equal, go, end = 0x20, 0x15, 0x05, 0x06
    steps = [(load, 0, 0, 4), (equal, 0, 8, architecture)]
    steps += [(load, 0, 0, 0), (equal, 1, 0, connect), (equal, 2, 5, sendto)]
    steps += [(load, 0, 0, 32), (go, 0, 0, 1), (load, 0, 0, 56), (equal, 2, 0, 16), (equal, 1, 0, 28)]
    steps += [(end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00030000)]  # allow, trap
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(head)), 0, 0) == 0

if {native!r}:
    faulthandler.register(signal.SIGSYS, open({log!r}, "a"), all_threads=True, chain=True)
    forbid(*{native!r})
sys.addaudithook(hook)
"""


class Watch:
    """An environment in which nobody can connect, and somebody who agreed to be watched."""

    def __init__(self, home: Path, native: bool) -> None:
        self.log = home / "tried.txt"
        (home / "site").mkdir()
        kind = CALLS[platform.machine()] if native and FILTERS else None
        (home / "site" / "sitecustomize.py").write_text(SITE.format(log=str(self.log), native=kind))
        consent = home / "user" / "intel" / "openvino_telemetry"
        consent.parent.mkdir(parents=True)
        consent.write_text("1")
        quiet = ("CI", "TF_BUILD", "JENKINS_URL", *TELEMETRY_OFF)  # what would keep packages quiet anyway
        self.environment = {k: v for k, v in os.environ.items() if k not in quiet}
        self.environment |= {"HOME": str(home / "user"), "PYTHONPATH": f"{home / 'site'}{os.pathsep}{ROOT}"}

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess:
        program = [sys.executable, *words]
        return subprocess.run(program, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)

    def tried(self) -> str:
        """What Python code asked for, and the traces of what code in C did."""
        return self.log.read_text() if self.log.exists() else ""


CONNECT = "import socket; socket.create_connection(('192.0.2.1', 443), 1)"


def test_the_trap_catches_what_python_and_what_the_kernel_is_asked(tmp_path):
    (tmp_path / "a").mkdir()
    watch = Watch(tmp_path / "a", native=False)
    done = watch.run("-c", CONNECT, cwd=tmp_path)
    assert done.returncode == 1 and "socket.getaddrinfo" in watch.tried()
    if FILTERS:
        (tmp_path / "b").mkdir()
        watch = Watch(tmp_path / "b", native=True)
        around = (
            "import ctypes; c = ctypes.CDLL(None); c.connect(c.socket(2, 1, 0), bytes(16), 16)"  # as code in C would
        )
        assert watch.run("-c", around, cwd=tmp_path).returncode == -31 and "most recent call" in watch.tried()  # SIGSYS
        nested = (
            f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {around!r}]).returncode == -31)"
        )
        assert watch.run("-c", nested, cwd=tmp_path).returncode == 1


@pytest.mark.skipif(not SENDER, reason="openvino_telemetry is not installed (pip install openvino)")
def test_openvino_would_send_and_does_not_once_edgekd_is_imported(tmp_path):
    for name, code, sends in (("a", "import openvino", True), ("b", "import edgekd.api, openvino", False)):
        (tmp_path / name).mkdir()
        watch = Watch(tmp_path / name, native=False)
        assert watch.run("-c", code, cwd=tmp_path).returncode == 0
        assert bool(watch.tried()) is sends


def test_every_switch_is_off_before_anything_else_is_imported():
    values = f"*(os.environ[k] for k in {list(TELEMETRY_OFF)}), sys.modules['openvino_telemetry']"
    contrary = os.environ | dict.fromkeys(TELEMETRY_OFF, "0")
    for use in (
        "import edgekd.api",
        "import edgekd; edgekd.build",
        "import edgekd; edgekd.methods",
        "import edgekd.cli.main",
    ):
        code = f"import os, sys; {use}; print({values})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=contrary, capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert done.stdout.split() == ["1"] * len(TELEMETRY_OFF) + ["None"]


@pytest.mark.slow
@pytest.mark.skipif(not FILTERS, reason="this kernel takes no filter of calls, so C code would not be seen")
def test_a_build_for_both_runtimes_opens_no_connection(tmp_path):
    """ONNX Runtime 1.31, not told otherwise, connects within 8 seconds; a build lasts longer."""
    watch = Watch(tmp_path, native=True)
    targets = ["-t", "cpu", *(["-t", "openvino"] if HAS_OPENVINO else [])]
    small = ["teacher.model.width=4", "student.baselines=[]", "student.epochs=1", "images_per_class=10"]
    words = ["-m", "edgekd", "build", "digits", "--smoke", *targets, *(w for s in small for w in ("--set", s))]
    done = watch.run(*words, cwd=tmp_path)
    assert not watch.tried(), watch.tried()
    assert done.returncode == 0, done.stderr
    left = {str(p.relative_to(tmp_path / "user")) for p in (tmp_path / "user").rglob("*") if p.is_file()}
    assert not {name for name in left if "elemetry" in name.replace("intel/openvino_telemetry", "")}, left
