"""The device's half of a run over SSH: receive a bundle, start it, follow its log, send the results.

The host sends the text of this module to the device's Python with every command (`python3 -c`), before anything else
of edgekd is there: it needs the standard library only, and nothing of this package. It answers in lines of JSON, and
keeps four files beside a bundle: `job.json` (what was started), `job.log`, `job.code` (its exit code) and `job.lock`,
which is held as long as any process of the job lives.
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

POLL_S = 0.2  # between two reads of the log
FAILED = 3  # exit code, with the reason on stderr
ARRAYS = ("samples.npz", "logits-")  # how names of a result's files begin
JOB = 'sh run.sh "$@"; echo $? >job.code.partial; mv job.code.partial job.code'
LOCK_CLOCKS = "--lock-clocks"  # an option of run.sh


class AgentError(Exception):
    """What cannot be done here, and what helps."""

    def __init__(self, error, hint):
        Exception.__init__(self, error)
        self.error, self.hint = error, hint


def probe(request):
    """Reply with the kind of machine, and which of the processor's `flags` it has; null where they cannot be read."""
    flags = None
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = sorted(set(request["flags"]) & set(values.split()))
                break
    reply(machine=platform.machine(), flags=flags)


def list_missing(request):
    """Reply with the files of a bundle that are missing or differ here, whether it runs or has ended, free space."""
    locked = LOCK_CLOCKS in request["options"]
    if locked and os.geteuid() != 0:
        hint = "log in as root: ssh://root@host/folder; or without %s" % LOCK_CLOCKS
        raise AgentError("only root can lock clocks here", hint)
    os.makedirs(request["folder"], exist_ok=True)
    os.chdir(request["folder"])
    open("job.lock", "a").close()  # fails at once where nothing may be written
    running, job = job_runs(), load_json("job.json")
    result = load_json("results/result.json")
    bench = result.get("bench") or {}
    ended = result.get("bundle") == request["bundle"] and bench.get("invalid") == [] and bench.get("locked") == locked
    disk = os.statvfs(".")
    reply(
        missing=[] if running else [name for name, sha in request["files"].items() if sha256(name) != sha],
        running=job.get("bundle", "unknown") if running else None,
        options=job.get("options", []),
        pid=job.get("pid"),
        finished=ended and not running,
        free=disk.f_bavail * disk.f_frsize,
    )


def receive_files(request):
    """Unpack a tar from stdin, each file whole or not at all; remove files of an earlier bundle."""
    os.chdir(request["folder"])
    with hold_lock():
        earlier = load_json("manifest.json").get("files", {})
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None or not is_inside(member.name):
                    raise AgentError("`%s` does not belong into a bundle" % member.name, "build the bundle again")
                unpack_file(content, member)
        for name in set(earlier) - set(request["files"]):
            if is_inside(name) and os.path.isfile(name):
                os.remove(name)
    reply(received=True)


def unpack_file(content, member):
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


def start_job(request):
    """Start the job in a session of its own, which no lost connection ends. A job that runs already is left alone."""
    os.chdir(request["folder"])
    try:
        with hold_lock() as lock:
            with contextlib.suppress(OSError):
                os.remove("job.code")
            with open("job.log", "wb") as log:
                job = subprocess.Popen(
                    ["sh", "-c", JOB, "sh"] + request["options"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock,),  # which the job and its children keep locked
                    env=dict(os.environ, PYTHON=request["python"]),
                )
            with open("job.json.partial", "w") as stream:
                record = {"bundle": request["bundle"], "options": request["options"], "pid": job.pid}
                json.dump(dict(record, started=time.time()), stream)
            os.replace("job.json.partial", "job.json")
        reply(started=True)
    except AgentError:
        reply(started=False)


def follow_log(request):
    """Reply with the lines of the log from byte `offset` on, as they come, and with the exit code when the job ends."""
    os.chdir(request["folder"])
    with open("job.log", "rb") as log:
        offset, rest = log.seek(request["offset"]), b""
        while True:
            running = job_runs()  # before the log is read: what is written last is not missed
            lines = (rest + log.read()).split(b"\n")
            rest = lines.pop() if running else b""
            for line in lines:
                offset += len(line) + 1
                reply(line=line.decode("utf-8", "replace"), offset=offset)
            if not running:
                break
            time.sleep(POLL_S)
    code = None
    with contextlib.suppress(OSError, ValueError), open("job.code") as stream:
        code = int(stream.read())
    reply(ended=True, code=code)


def send_results(request):
    """Write a tar of the result and its arrays to stdout, after a line that says so."""
    os.chdir(os.path.join(request["folder"], "results"))
    files = load_json("result.json").get("files", {})
    names = [name for name in files if name.startswith(ARRAYS) and os.sep not in name]
    reply(tar=True)
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for name in ["result.json"] + names:
            archive.add(name, recursive=False)


def job_runs():
    """Return whether any process of a job lives: it holds the lock."""
    with open("job.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def hold_lock():
    """Hold the lock, for this process and those that inherit it. Raises AgentError where a job holds it."""
    with open("job.lock", "a") as lock:
        for last in [False] * 9 + [True]:  # `job_runs` of another call holds it for a moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if last:
                    raise AgentError("another run works in the folder", "wait until it ends")
                time.sleep(0.05)
        yield lock.fileno()


def is_inside(name):
    """Return whether a file name stays inside the folder."""
    return not os.path.isabs(name) and ".." not in name.split("/")


def sha256(path):
    """Return the hash of a file, empty where there is none."""
    digest = hashlib.sha256()
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def load_json(path):
    """Return the object in a JSON file; {} if there is no file, or it is incomplete."""
    try:
        with open(path, "rb") as stream:
            content = json.loads(stream.read().decode())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def reply(**fields):
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


COMMANDS = {
    "probe": probe,
    "list_missing": list_missing,
    "receive_files": receive_files,
    "start_job": start_job,
    "follow_log": follow_log,
    "send_results": send_results,
}


def main(command, request):
    """Run one command; return 0, or FAILED with `{"error", "hint", "errno"}` on stderr where it cannot be done."""
    problem = {"hint": "", "errno": None}
    try:
        if sys.version_info < (3, 6):
            fact = "Python %s is too old" % platform.python_version()
            raise AgentError(fact, "edgekd needs Python 3.6 or newer there")
        if "folder" in request:
            request["folder"] = os.path.expanduser(request["folder"])
        COMMANDS[command](request)
        return 0
    except AgentError as error:
        problem.update(error=error.error, hint=error.hint)
    except tarfile.TarError as error:
        problem.update(error="the archive is incomplete: %s" % error, hint="try again")
    except OSError as error:
        text = os.strerror(error.errno).lower() if error.errno else str(error)
        problem.update(error=text + (": `%s`" % error.filename if error.filename else ""), errno=error.errno)
    sys.stderr.write(json.dumps(problem) + "\n")
    return FAILED
