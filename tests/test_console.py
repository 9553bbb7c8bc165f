"""How a command ends that is asked to end."""

import signal
import subprocess
import sys
import time

import pytest

LOST = """
import os, signal, sys, time
import typer
from edgekd.cli.console import run

app = typer.Typer()

class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)  # the handler raises here, where Python has to swallow it

@app.command()
def work():
    thing = Thing()
    del thing
    time.sleep(20)
    print("went on")

sys.exit(run(app))
"""


@pytest.mark.parametrize(("name", "code", "told"), [("SIGTERM", 143, "stopped by SIGTERM"), ("SIGINT", 130, "")])
def test_a_signal_that_comes_within_a_destructor_ends_the_command_nevertheless(name, code, told):
    done = subprocess.run(
        [sys.executable, "-c", LOST.format(name=name)], capture_output=True, text=True, check=False, timeout=19
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr and "Traceback" not in done.stderr


def test_sigterm_after_the_end_of_a_command_changes_nothing():
    """The interpreter takes its time to end; a build that is done must not look like one that was stopped."""
    code = (
        "import atexit, os, signal, sys; sys.argv = ['edgekd', 'list', 'recipes'];"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM); from edgekd.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "digits" in done.stdout and not done.stderr


DEAF = """
import ctypes, logging, sys
from multiprocessing import Pipe
import typer
from edgekd.cli import console
from edgekd.stages.distill import worker

def hang(*asked):
    print("begins", flush=True)
    lock = ctypes.CDLL(None).pthread_mutex_lock  # unlike a pause it does not come back to Python at a signal
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)

def command():
    app = typer.Typer()
    app.command()(lambda: hang())
    sys.exit(console.run(app))

def lesson():
    worker.run_training, worker.end_with_parent = hang, lambda: None
    worker.worker_main(Pipe()[1], 1, 1, logging.ERROR, ())

{what}()
"""


@pytest.mark.parametrize(("what", "told"), [("command", "error: stopped by SIGTERM\n\nhint: the same"), ("lesson", "")])
def test_a_process_that_hangs_in_a_library_ends_at_sigterm_within_five_seconds(what, told):
    with subprocess.Popen(
        [sys.executable, "-c", DEAF.format(what=what)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "begins\n"
            time.sleep(0.5)  # until it hangs
            asked = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
            assert time.perf_counter() - asked < 5
        finally:
            process.kill()
    assert process.returncode == 143
    assert err.startswith(told) and "Traceback" not in err
