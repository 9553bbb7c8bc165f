"""The board: which Jetson this is, and the version of its system."""

import re

from edgekd_runner.programs import run_program
from edgekd_runner.system_files import read_text, system_path

# the part numbers of modules, as in /proc/device-tree/compatible, and edgekd's names of the boards
MODULES = {
    "p3448": "nano",
    "p3310": "tx2",
    "p3489": "tx2",
    "p3636": "tx2",
    "p3668": "xavier-nx",
    "p2888": "agx-xavier",
    "p3767-0000": "orin-nx-16gb",
    "p3767-0001": "orin-nx-8gb",
    "p3767-0003": "orin-nano",
    "p3767-0004": "orin-nano",
    "p3767-0005": "orin-nano",
    "p3701": "agx-orin",
    "p3834": "thor",
}


def identify_board():
    """Return a Jetson's model and edgekd's name for it; null on other machines."""
    compatible = read_text(system_path("/proc/device-tree/compatible")).split("\0")
    model = read_text(system_path("/proc/device-tree/model")).strip("\0")
    names = [name for part, name in MODULES.items() if any(part in entry for entry in compatible)]
    return {"model": model or None, "name": names[0] if names else None}


def l4t_version():
    """Return the version of a Jetson's system (L4T), such as 36.4.3; None elsewhere."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read_text(system_path("/etc/nv_tegra_release")))
    if release:
        return "%s.%s" % release.groups()
    version, code = run_program(["dpkg-query", "-W", "-f", "${Version}", "nvidia-l4t-core"], 10)
    return version.partition("-")[0] if not code and version else None
