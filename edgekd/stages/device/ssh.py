"""A device behind SSH: its address, one command on it through the system's OpenSSH, and every failure in words."""

from __future__ import annotations

import base64
import errno
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

from edgekd.errors import ConfigError, EdgekdError, TargetUnavailable
from edgekd.stages.bench.runner import runner_path
from edgekd.stages.device.job_log import heard

CONFIG = "EDGEKD_SSH_CONFIG"  # environment variable: a file that stands in for the user's ssh_config (`ssh -F`)
OPTIONS = {
    "BatchMode": "yes",  # no question that nobody answers; unknown and changed host keys are refused
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",  # those of the user's config would be taken on the second connection
    "RequestTTY": "no",
    "RemoteCommand": "none",
}
REFUSED = 3  # exit code of the porter, its reason is on stderr
AS = "ssh://user@host/folder, or ssh://user@host:port/~/folder below the home there"


class Lost(TargetUnavailable):
    """No connection, or no longer: another try may have one."""


@dataclass(frozen=True)
class Device:
    """Where a bundle is measured; `name` is what OpenSSH calls the machine, which may be one of its config's hosts."""

    name: str  # [user@]host
    port: int | None
    folder: str  # absolute, or below ~
    python: str  # the program that runs the bundle
    lock_clocks: bool = False  # hold a Jetson's clocks at the maximum of its power mode meanwhile; needs root there

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}, port {self.port}"

    @property
    def words(self) -> list[str]:
        """The ssh command up to what runs there."""
        own = os.environ.get(CONFIG)
        words = ["ssh", *(("-F", own) if own else ())]
        for key, value in OPTIONS.items():
            words += ["-o", f"{key}={value}"]
        return [*words, *(() if self.port is None else ("-p", str(self.port))), "--", self.name]

    @property
    def options(self) -> list[str]:
        """What stands behind `run.sh` there."""
        return ["--lock-clocks"] if self.lock_clocks else []

    @property
    def by_hand(self) -> str:
        """What a person types to get there."""
        return shlex.join(["ssh", *(() if self.port is None else ("-p", str(self.port))), self.name])


def asked(address: str | None, lock_clocks: bool) -> Device | None:
    """What the options --device and --lock-clocks ask for; None for neither.

    Raises ConfigError as `device` does, and for clocks without a device.
    """
    if address:
        return replace(device(address), lock_clocks=lock_clocks)
    if lock_clocks:
        raise ConfigError(
            "--lock-clocks is for a device: those of this machine are left as they are",
            hint="name it with --device ssh://root@host/folder; or type `sh run.sh --lock-clocks` in the bundle there",
        )
    return None


def device(address: str) -> Device:
    """The device that `ssh://[user@]host[:port]/folder[?python=PROGRAM]` names.

    Raises ConfigError for anything else.
    """
    try:
        parts = urlsplit(address)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise ConfigError(f"the device `{address}` is no address: {error}", hint=f"write {AS}") from None
    if parts.scheme != "ssh":
        found = f"begins with `{parts.scheme}:`" if parts.scheme else "has no `ssh://`"
        raise ConfigError(
            f"the device `{address}` {found}: devices are reached by SSH only",
            hint=f"write {AS}; without SSH, copy the bundle, and bring the result with `edgekd import-result`",
        )
    user, folder, asked = unquote(parts.username or ""), unquote(parts.path), parse_qs(parts.query)
    if not host or host.startswith("-") or user.startswith("-"):
        raise ConfigError(f"the device `{address}` names no host", hint=f"write {AS}")
    if parts.password is not None:
        raise ConfigError(f"the address of {host} holds a password", hint="use a key: ssh-copy-id puts it there")
    if folder.strip("/") in ("", "~"):
        raise ConfigError(f"the device `{address}` names no folder", hint=f"the bundle needs one of its own: {AS}")
    if parts.fragment or asked.keys() - {"python"}:
        raise ConfigError(f"the device `{address}` has more than an address", hint=f"{AS}; ?python=PROGRAM may follow")
    typed = parts.netloc.rpartition("@")[2]  # urlsplit makes the name lower, which a Host of ssh_config may not be
    spelled = typed[1:].partition("]")[0] if typed.startswith("[") else typed.partition(":")[0]
    folder = folder[1:] if folder.startswith("/~/") else folder
    return Device(f"{user}@{spelled}" if user else spelled, port, folder, asked.get("python", ["python3"])[-1])


def porter_path() -> Path:
    """The program that does the device's half of the work; it stands beside the runner."""
    return runner_path().with_name("edgekd_porter.py")


@contextmanager
def talk(to: Device, command: str, **asked: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run one command of the porter on the device; its stdin and stdout are the process's.

    What the block reads is whole only once it has ended well. Raises Lost where the connection fails,
    TargetUnavailable where it is refused, EdgekdError where the device cannot do it.
    """
    program = f"{porter_path().read_text()}\nsys.exit(main(*json.loads({json.dumps([command, asked])!r})))\n"
    packed = base64.b64encode(program.encode()).decode()  # for any shell
    there = f"{shlex.quote(to.python)} -c \"import base64; exec(base64.b64decode('{packed}'))\""
    environment = os.environ | {"LC_ALL": "C"}  # its messages are looked for
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                [*to.words, there], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment
            )
        except FileNotFoundError:
            raise TargetUnavailable(
                "there is no program `ssh` on this machine", hint="install OpenSSH: sudo apt install openssh-client"
            ) from None
        with process:
            try:
                with suppress(BrokenPipeError):  # its end says why
                    yield process
                with suppress(BrokenPipeError):
                    sink(process).close()
            except BaseException:
                process.kill()
                raise
            code = process.wait()
        complaints.seek(0)
        said = complaints.read().decode("utf-8", "replace").strip()
    if code:
        raise failure(to, code, said)


def sink(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin
    return process.stdin


def answer(to: Device, command: str, **asked: Any) -> dict[str, Any]:
    """What the porter tells in one line. Raises as `talk`."""
    told: dict[str, Any] = {}
    with talk(to, command, **asked) as process:
        for line in process.stdout or ():
            told = heard(line) or told
    return told


def failure(to: Device, code: int, said: str) -> EdgekdError:
    """What the end of a command means, from its exit code and its stderr."""
    last = said.splitlines()[-1] if said else f"exit code {code}"
    if code == REFUSED and (told := heard(last.encode())):
        return refusal(to, told)
    if code in (126, 127):
        return TargetUnavailable(
            f"there is no `{to.python}` on {to}",
            hint="install it (sudo apt install python3 python3-numpy), or name another: ...?python=/path/to/python3",
        )
    if code == 255 or code < 0:
        return unreachable(to, said)
    return EdgekdError(f"{to}: {last}", hint=f"see what `{to.by_hand}` says")


def refusal(to: Device, told: dict[str, Any]) -> EdgekdError:
    """What the porter could not do."""
    hints = {
        errno.ENOSPC: "free some space there; what is there already is not copied again",
        errno.EDQUOT: "free some space there; what is there already is not copied again",
        errno.EACCES: "name a folder that you may write to, such as ssh://user@host/~/edgekd",
        errno.EPERM: "name a folder that you may write to, such as ssh://user@host/~/edgekd",
        errno.EROFS: "name a folder that can be written to, such as ssh://user@host/~/edgekd",
    }
    return EdgekdError(
        f"{to}: {told['error']}", hint=told["hint"] or hints.get(told["errno"], "check the folder there")
    )


def unreachable(to: Device, said: str) -> EdgekdError:
    """What OpenSSH says when it ends with 255, and what helps."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = (lines[-1] if lines else "the connection was closed").rstrip(".")
    host = to.name.rpartition("@")[2]
    if "HOST IDENTIFICATION HAS CHANGED" in said or "REVOKED HOST KEY" in said:
        entry = host if to.port is None else f"[{host}]:{to.port}"
        return TargetUnavailable(
            f"the host key of {to} is not the one that is known: nothing was sent",
            hint="if the device was installed anew, forget its old key and connect once by hand: "
            f"ssh-keygen -R {shlex.quote(entry)}; {to.by_hand}. Otherwise something stands between",
        )
    if "Host key verification failed" in said or "host key is known" in said:
        return TargetUnavailable(
            f"the host key of {to} is not known: nothing was sent",
            hint=f"connect once by hand, compare the fingerprint, and say yes: {to.by_hand}",
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        return TargetUnavailable(
            f"{to} does not let you in: {last}",
            hint=f"put your key there, `{to.by_hand.replace('ssh', 'ssh-copy-id', 1)}`; a key with a passphrase needs "
            "ssh-agent (`ssh-add`), as no question is asked",
        )
    if "configuration option" in said or "No such file or directory" in said:
        return ConfigError(f"ssh does not start: {last}", hint=f"check ~/.ssh/config, or what {CONFIG} names")
    return Lost(
        f"{to} cannot be reached: {last}",
        hint=f"is it on, and in this network? This must work without a question: {to.by_hand} true",
    )
