"""The clocks of a Jetson: held at their maximum while something is measured, and always put back."""

import contextlib
import os

from edgekd_runner.errors import RunnerError
from edgekd_runner.programs import find_program, run_program

JETSON_CLOCKS = ("jetson_clocks", "/usr/bin/jetson_clocks")


@contextlib.contextmanager
def hold_clocks(out, lock):
    """Hold the clocks at the maximum of the power mode if `lock`; they are put back whatever happens."""
    backup = os.path.join(out, "clocks.saved")
    if not lock and not os.path.exists(backup):
        yield
        return
    program = find_program(JETSON_CLOCKS)
    if not program:
        raise RunnerError("there is no jetson_clocks on this machine", "leave out --lock-clocks", 1)
    left_locked = os.path.exists(backup)  # an earlier run was killed before it could put them back
    if os.geteuid() != 0:
        fact = "only root can change clocks" + (", and an earlier run left them locked" if left_locked else "")
        hint = "sudo sh run.sh --lock-clocks, once" if left_locked else "use sudo, or no --lock-clocks"
        raise RunnerError(fact, hint, 1)
    if left_locked:
        restore_clocks(program, backup)
    if not lock:
        yield
        return
    run_jetson_clocks(program, "--store", backup)
    try:
        run_jetson_clocks(program)
        yield
    finally:
        restore_clocks(program, backup)


def run_jetson_clocks(program, *arguments):
    output, code = run_program([program] + list(arguments), 60)
    if code:
        raise RunnerError("jetson_clocks failed: %s" % output.strip()[-200:], "leave out --lock-clocks", 1)


def restore_clocks(program, backup):
    run_jetson_clocks(program, "--restore", backup)
    os.remove(backup)
