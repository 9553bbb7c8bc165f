"""How a command ends that is asked to end."""

import subprocess
import sys

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
