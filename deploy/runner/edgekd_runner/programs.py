"""Other programs: find them, run them with a time limit, and end them."""

import ctypes
import shutil
import signal
import subprocess
import sys

from edgekd_runner.errors import first_line

TEXT = {"encoding": "utf-8", "errors": "replace"}  # of other programs; shells over SSH often have no locale
PATIENCE_S = 3  # how long a process has to end after SIGTERM


def find_program(names):
    """Return the path of the first that can be started: shells over SSH often search fewer folders than a person's."""
    paths = (shutil.which(name) for name in names)
    return next((path for path in paths if path), None)


def run_program(command, seconds):
    """Return output and exit code of a program that is ended after `seconds`; it gets no input, and cannot ask."""
    options = dict(TEXT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with subprocess.Popen(command, **options) as process:
            try:
                return process.communicate(timeout=seconds)[0], process.returncode
            except subprocess.TimeoutExpired:
                return "no answer within %d s" % seconds, 124
            finally:
                end_process(process)
    except OSError as error:
        return first_line(error), 127


def end_process(process):
    """End a process that was started here, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def die_with_parent():
    """End this process when its parent ends: a child whose parent was killed would disturb the next run."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
