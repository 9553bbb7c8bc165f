"""Start the runner: `python3 runner.pyz ...`, `python3 PATH/edgekd_runner ...` or `python3 -m edgekd_runner ...`."""

import os
import sys

if not __package__:  # started by its path: the package is found beside its own folder, its modules only through it
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from edgekd_runner.cli import main  # noqa: E402

sys.exit(main())
