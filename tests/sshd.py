"""A real OpenSSH server on loopback, with port, keys and configuration of its own: a device for tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}") or ""
PRIVILEGE_SEPARATION = Path("/run/sshd")  # which sshd wants, if root starts it

SERVER = """
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host_key
AuthorizedKeysFile {home}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
LogLevel ERROR
"""
CLIENT = """
Host *
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {home}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {home}/known_hosts
    GlobalKnownHostsFile /dev/null
"""


def lacking() -> str:
    """Why no server can be started here; empty if one can."""
    if not SSHD or not shutil.which("ssh-keygen"):
        return "there is no OpenSSH server (apt install openssh-server)"
    if os.geteuid() == 0 and not PRIVILEGE_SEPARATION.is_dir():
        try:
            PRIVILEGE_SEPARATION.mkdir(mode=0o755)
        except OSError as error:
            return f"sshd of root needs {PRIVILEGE_SEPARATION}: {error}"
    return ""


@dataclass
class Server:
    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """For `ssh -F`."""
        return self.home / "config"

    def start(self) -> None:
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.home / "sshd_config")])
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    def stop(self) -> None:
        """Once or twice."""
        if self.process:
            self.cut()
            self.process.terminate()
            self.process.wait(timeout=10)
            self.process = None

    def cut(self) -> int:
        """End all connections at once, as a cable that is pulled; how many they were."""
        found = self.connections()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def connections(self) -> list[int]:
        """The processes that serve them."""
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def steady(self, count: int) -> bool:
        """Whether so many connections stay for a while."""
        found = self.connections()
        time.sleep(0.5)
        return len(found) >= count and self.connections() == found


def key(path: Path) -> str:
    """A new key pair; its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip()


def make(home: Path) -> Server:
    """Keys and configurations of a server and its client; it is not started yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {"home": home, "port": port, "user": getpass.getuser()}
    host = key(home / "host_key")
    key(home / "user_key")
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(host.split()[:2])}\n")
    (home / "sshd_config").write_text(SERVER.format(**words))
    (home / "config").write_text(CLIENT.format(**words))
    return Server(home, port)
