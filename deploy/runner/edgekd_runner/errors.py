"""The error that ends a command, and the hints that several modules give with it."""

HINT_COPY_AGAIN = "copy the bundle again, whole; results on this machine stay valid"
HINT_NEW_BUNDLE = "build the bundle again for this device's JetPack: `edgekd build --jetpack ...`"
HINT_MEMORY = "close other programs, stop the desktop (`sudo init 3`), add 4 to 8 GB of swap; it continues"
HINT_BUILD_AGAIN = "an engine runs only where it was built: run `build` again on this machine"
HINT_CHECK_MODEL = "check the file with `onnx.checker`; a newer opset or IR than the runtime knows needs a new export"


class RunnerError(Exception):
    """A sentence and a hint for the caller. Exit code 2: the job or bundle is wrong; 1: it could not be done."""

    def __init__(self, error, hint, code=2):
        Exception.__init__(self, error)
        self.error, self.hint, self.code = error, hint, code


def first_line(error):
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
