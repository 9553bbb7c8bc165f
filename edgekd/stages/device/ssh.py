"""A device behind SSH: its address, one command on it through the system's OpenSSH, and an error for every failure."""

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
from edgekd.stages.device.job_log import parse_message

CONFIG_VARIABLE = "EDGEKD_SSH_CONFIG"  # environment variable: a file instead of the user's ssh_config (`ssh -F`)
OPTIONS = {
    "BatchMode": "yes",  # no question that nobody answers; unknown and changed host keys are refused
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",  # the second connection could not open those of the user's config again
    "RequestTTY": "no",
    "RemoteCommand": "none",
}
AGENT_FAILED = 3  # exit code of the agent, its reason is on stderr
ADDRESS_FORMAT = "ssh://user@host/folder, or ssh://user@host:port/~/folder below the home there"


class ConnectionLost(TargetUnavailable):
    """There is no connection, or no longer: another attempt may succeed."""


@dataclass(frozen=True)
class Device:
    """Where a bundle is measured; `name` is OpenSSH's name of the machine, which may be a Host of its config."""

    name: str  # [user@]host
    port: int | None
    folder: str  # absolute, or below ~
    python: str  # the program that runs the bundle
    lock_clocks: bool = False  # hold a Jetson's clocks at the maximum of its power mode meanwhile; needs root there

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}, port {self.port}"

    @property
    def command(self) -> list[str]:
        """The ssh command, up to what runs there."""
        config = os.environ.get(CONFIG_VARIABLE)
        command = ["ssh", *(("-F", config) if config else ())]
        for key, value in OPTIONS.items():
            command += ["-o", f"{key}={value}"]
        return [*command, *(() if self.port is None else ("-p", str(self.port))), "--", self.name]

    @property
    def options(self) -> list[str]:
        """The options of `run.sh` there."""
        return ["--lock-clocks"] if self.lock_clocks else []

    @property
    def manual_command(self) -> str:
        """The command that a person types to connect."""
        return shlex.join(["ssh", *(() if self.port is None else ("-p", str(self.port))), self.name])


def select_device(address: str | None, lock_clocks: bool) -> Device | None:
    """Return the device of the options --device and --lock-clocks; None for neither.

    Raises ConfigError as `parse_address` does, and for clocks without a device.
    """
    if address:
        return replace(parse_address(address), lock_clocks=lock_clocks)
    if lock_clocks:
        raise ConfigError(
            "--lock-clocks is for a device: edgekd does not change the clocks of this machine",
            hint="name it with --device ssh://root@host/folder; or type `sh run.sh --lock-clocks` in the bundle there",
        )
    return None


def parse_address(address: str) -> Device:
    """Return the device of `ssh://[user@]host[:port]/folder[?python=PROGRAM]`. Raises ConfigError for anything else."""
    try:
        parts = urlsplit(address)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise ConfigError(f"the device `{address}` is no address: {error}", hint=f"write {ADDRESS_FORMAT}") from None
    if parts.scheme != "ssh":
        start = f"begins with `{parts.scheme}:`" if parts.scheme else "has no `ssh://`"
        raise ConfigError(
            f"the device `{address}` {start}: devices are reached by SSH only",
            hint=f"write {ADDRESS_FORMAT}; without SSH, copy the bundle, and import the result with "
            "`edgekd import-result`",
        )
    user, folder, query = unquote(parts.username or ""), unquote(parts.path), parse_qs(parts.query)
    if not host or host.startswith("-") or user.startswith("-"):
        raise ConfigError(f"the device `{address}` names no host", hint=f"write {ADDRESS_FORMAT}")
    if parts.password is not None:
        raise ConfigError(f"the address of {host} holds a password", hint="use a key: ssh-copy-id puts it there")
    if folder.strip("/") in ("", "~"):
        raise ConfigError(f"the device `{address}` names no folder", hint=f"a bundle needs a folder: {ADDRESS_FORMAT}")
    if parts.fragment or query.keys() - {"python"}:
        raise ConfigError(
            f"the device `{address}` has more than an address", hint=f"{ADDRESS_FORMAT}; ?python=PROGRAM may follow"
        )
    host_port = parts.netloc.rpartition("@")[2]  # `hostname` is lower case, which a Host of ssh_config may not be
    host = host_port[1:].partition("]")[0] if host_port.startswith("[") else host_port.partition(":")[0]
    folder = folder[1:] if folder.startswith("/~/") else folder
    return Device(f"{user}@{host}" if user else host, port, folder, query.get("python", ["python3"])[-1])


def agent_path() -> Path:
    """Return the runner's module that does the device's half of the work; its text is sent there."""
    return runner_path() / "ssh_agent.py"


@contextmanager
def run_agent(device: Device, command: str, **request: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run one command of the agent on the device; its stdin and stdout are the process's.

    The output is complete only when the block has ended without an error.

    Raises:
        ConnectionLost: if the connection fails.
        TargetUnavailable: if it is refused.
        EdgekdError: if the device cannot do it.
    """
    program = f"{agent_path().read_text()}\nsys.exit(main(*json.loads({json.dumps([command, request])!r})))\n"
    packed = base64.b64encode(program.encode()).decode()  # for any shell
    remote_command = f"{shlex.quote(device.python)} -c \"import base64; exec(base64.b64decode('{packed}'))\""
    environment = os.environ | {"LC_ALL": "C"}  # `explain_connection` searches for its messages
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [*device.command, remote_command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )
        except FileNotFoundError:
            raise TargetUnavailable(
                "there is no program `ssh` on this machine", hint="install OpenSSH: sudo apt install openssh-client"
            ) from None
        with process:
            try:
                with suppress(BrokenPipeError):  # the exit code and stderr say why
                    yield process
                with suppress(BrokenPipeError):
                    stdin_of(process).close()
            except BaseException:
                process.kill()
                raise
            code = process.wait()
        stderr.seek(0)
        errors = stderr.read().decode("utf-8", "replace").strip()
    if code:
        raise explain_exit(device, code, errors)


def stdin_of(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin
    return process.stdin


def call_agent(device: Device, command: str, **request: Any) -> dict[str, Any]:
    """Return the agent's reply of one line. Raises as `run_agent`."""
    reply: dict[str, Any] = {}
    with run_agent(device, command, **request) as process:
        for line in process.stdout or ():
            reply = parse_message(line) or reply
    return reply


def explain_exit(device: Device, code: int, stderr: str) -> EdgekdError:
    """Return the error of a command that failed, from its exit code and its stderr."""
    last = stderr.splitlines()[-1] if stderr else f"exit code {code}"
    if code == AGENT_FAILED and (problem := parse_message(last.encode())):
        return explain_refusal(device, problem)
    if code in (126, 127):
        return TargetUnavailable(
            f"there is no `{device.python}` on {device}",
            hint="install it (sudo apt install python3 python3-numpy), or name another: ...?python=/path/to/python3",
        )
    if code == 255 or code < 0:
        return explain_connection(device, stderr)
    return EdgekdError(f"{device}: {last}", hint=f"see what `{device.manual_command}` prints")


def explain_refusal(device: Device, problem: dict[str, Any]) -> EdgekdError:
    """Return the error of what the agent could not do."""
    hints = {
        errno.ENOSPC: "free some space there; files that were copied are not copied again",
        errno.EDQUOT: "free some space there; files that were copied are not copied again",
        errno.EACCES: "name a folder that you may write to, such as ssh://user@host/~/edgekd",
        errno.EPERM: "name a folder that you may write to, such as ssh://user@host/~/edgekd",
        errno.EROFS: "name a folder that can be written to, such as ssh://user@host/~/edgekd",
    }
    return EdgekdError(
        f"{device}: {problem['error']}", hint=problem["hint"] or hints.get(problem["errno"], "check the folder there")
    )


def explain_connection(device: Device, stderr: str) -> EdgekdError:
    """Return the error of an OpenSSH that ended with 255."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = (lines[-1] if lines else "the connection was closed").rstrip(".")
    host = device.name.rpartition("@")[2]
    if "HOST IDENTIFICATION HAS CHANGED" in stderr or "REVOKED HOST KEY" in stderr:
        entry = host if device.port is None else f"[{host}]:{device.port}"
        return TargetUnavailable(
            f"the host key of {device} is not the one that is known: nothing was sent",
            hint="if the device was reinstalled, remove its old key and connect once by hand: "
            f"ssh-keygen -R {shlex.quote(entry)}; {device.manual_command}. Otherwise another machine answers",
        )
    if "Host key verification failed" in stderr or "host key is known" in stderr:
        return TargetUnavailable(
            f"the host key of {device} is not known: nothing was sent",
            hint=f"connect once by hand, compare the fingerprint, and accept it: {device.manual_command}",
        )
    if "Permission denied" in stderr or "Too many authentication failures" in stderr:
        return TargetUnavailable(
            f"{device} does not let you in: {last}",
            hint=f"put your key there, `{device.manual_command.replace('ssh', 'ssh-copy-id', 1)}`; a key with a "
            "passphrase needs ssh-agent (`ssh-add`), as no question is asked",
        )
    if "configuration option" in stderr or "No such file or directory" in stderr:
        return ConfigError(f"ssh does not start: {last}", hint=f"check ~/.ssh/config, or the file in {CONFIG_VARIABLE}")
    return ConnectionLost(
        f"{device} cannot be reached: {last}",
        hint=f"is it on, and in this network? This must work without a question: {device.manual_command} true",
    )
