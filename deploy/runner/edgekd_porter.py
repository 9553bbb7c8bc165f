"""The half of a run over SSH that the device does: receives a bundle, starts it, tells how far it is, gives the result.

Its text is sent to the device's Python, 3.6 or newer, with every command; it needs nothing but the standard library.
It answers in lines of JSON, and keeps four files beside a bundle: `job.json` (what was started), `job.log`, `job.code`
(how it ended) and `job.lock`, which is held as long as anything of the job lives.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import time

POLL_S = 0.2  # between two looks at the log
FAILED = 3  # exit code, with the reason on stderr
ARRAYS = ("samples.npz", "logits-")  # how names of a result's files begin
JOB = 'sh run.sh "$@"; echo $? >job.code.partial; mv job.code.partial job.code'
LOCK = "--lock-clocks"  # of the words behind run.sh


class Refused(Exception):
    """What cannot be done here, and what helps."""

    def __init__(self, error, hint):
        Exception.__init__(self, error)
        self.error, self.hint = error, hint


def look(asked):
    """What this machine is, and which of the processor's `flags` it has; null where they cannot be read."""
    known = None
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                known = sorted(set(asked["flags"]) & set(words.split()))
                break
    tell(machine=platform.machine(), flags=known)


def survey(asked):
    """What of a bundle is here already, whether it runs or has ended, and the room that is left."""
    locked = LOCK in asked["words"]
    if locked and os.geteuid() != 0:
        raise Refused("only root can lock clocks here", "log in as root: ssh://root@host/folder; or without %s" % LOCK)
    os.makedirs(asked["folder"], exist_ok=True)
    os.chdir(asked["folder"])
    open("job.lock", "a").close()  # says at once where nothing may be written
    working, known = running(), load("job.json")
    found = load("results/result.json")
    bench = found.get("bench") or {}
    ended = found.get("bundle") == asked["bundle"] and bench.get("invalid") == [] and bench.get("locked") == locked
    disk = os.statvfs(".")
    tell(
        differing=[] if working else [name for name, sha in asked["files"].items() if sha256(name) != sha],
        running=known.get("bundle", "unknown") if working else None,
        words=known.get("words", []),
        pid=known.get("pid"),
        finished=ended and not working,
        free=disk.f_bavail * disk.f_frsize,
    )


def receive(asked):
    """Unpack a tar from stdin, each file whole or not at all; files of an earlier bundle go."""
    os.chdir(asked["folder"])
    with held():
        old = load("manifest.json").get("files", {})
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None or not inside(member.name):
                    raise Refused("`%s` does not belong into a bundle" % member.name, "make the bundle again")
                unpack(content, member)
        for name in set(old) - set(asked["files"]):
            if inside(name) and os.path.isfile(name):
                os.remove(name)
    tell(received=True)


def unpack(content, member):
    os.makedirs(os.path.dirname(member.name) or ".", exist_ok=True)
    partial = member.name + ".partial"
    try:
        with open(partial, "wb") as stream:
            for part in iter(lambda: content.read(1 << 20), b""):
                stream.write(part)
        os.chmod(partial, member.mode & 0o755)
        os.replace(partial, member.name)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)  # half a file would fill a full disk


def start(asked):
    """Begin the job in a session of its own, which no lost connection ends. What runs already is left alone."""
    os.chdir(asked["folder"])
    try:
        with held() as lock:
            with contextlib.suppress(OSError):
                os.remove("job.code")
            with open("job.log", "wb") as log:
                job = subprocess.Popen(
                    ["sh", "-c", JOB, "sh"] + asked["words"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock,),  # which the job and its children keep locked
                    env=dict(os.environ, PYTHON=asked["python"]),
                )
            with open("job.json.partial", "w") as stream:
                told = {"bundle": asked["bundle"], "words": asked["words"], "pid": job.pid, "started": time.time()}
                json.dump(told, stream)
            os.replace("job.json.partial", "job.json")
        tell(started=True)
    except Refused:
        tell(started=False)


def follow(asked):
    """The lines of the log from byte `offset` on, as they come, until the job has ended; then how."""
    os.chdir(asked["folder"])
    with open("job.log", "rb") as log:
        at, rest = log.seek(asked["offset"]), b""
        while True:
            working = running()  # before the log is read: what is written last is not missed
            lines = (rest + log.read()).split(b"\n")
            rest = lines.pop() if working else b""
            for line in lines:
                at += len(line) + 1
                tell(line=line.decode("utf-8", "replace"), at=at)
            if not working:
                break
            time.sleep(POLL_S)
    code = None
    with contextlib.suppress(OSError, ValueError), open("job.code") as stream:
        code = int(stream.read())
    tell(ended=True, code=code)


def fetch(asked):
    """A tar of the result and its arrays on stdout, after a line that says so."""
    os.chdir(os.path.join(asked["folder"], "results"))
    names = [name for name in load("result.json").get("files", {}) if name.startswith(ARRAYS) and os.sep not in name]
    tell(tar=True)
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for name in ["result.json"] + names:
            archive.add(name, recursive=False)


def running():
    """Whether anything of a job lives: it holds the lock."""
    with open("job.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def held():
    """The lock, for this process and those that it hands it to."""
    with open("job.lock", "a") as lock:
        for last in [False] * 9 + [True]:  # a look of another call lasts a moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if last:
                    raise Refused("another run works in the folder", "wait until it ends")
                time.sleep(0.05)
        yield lock.fileno()


def inside(name):
    return not os.path.isabs(name) and ".." not in name.split("/")


def sha256(path):
    """Empty where there is no such file."""
    digest = hashlib.sha256()
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def load(path):
    """What the file holds; nothing where it is not there, or not whole."""
    try:
        with open(path, "rb") as stream:
            found = json.loads(stream.read().decode())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def tell(**facts):
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


COMMANDS = {"look": look, "survey": survey, "receive": receive, "start": start, "follow": follow, "fetch": fetch}


def main(command, asked):
    """Exit code 3 where it cannot be done, with `{"error", "hint", "errno"}` on stderr."""
    problem = {"hint": "", "errno": None}
    try:
        if sys.version_info < (3, 6):
            raise Refused("Python %s is too old" % platform.python_version(), "edgekd needs Python 3.6 or newer there")
        if "folder" in asked:
            asked["folder"] = os.path.expanduser(asked["folder"])
        COMMANDS[command](asked)
        return 0
    except Refused as refused:
        problem.update(error=refused.error, hint=refused.hint)
    except tarfile.TarError as error:
        problem.update(error="what was sent is not whole: %s" % error, hint="try again")
    except OSError as error:
        words = os.strerror(error.errno).lower() if error.errno else str(error)
        problem.update(error=words + (": `%s`" % error.filename if error.filename else ""), errno=error.errno)
    sys.stderr.write(json.dumps(problem) + "\n")
    return FAILED
