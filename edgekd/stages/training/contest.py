"""Teach one contender of a comparison in a process of its own, so that its seconds and its memory are its alone."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from edgekd.core import processor
from edgekd.core.errors import EdgekdError, TrainingError
from edgekd.core.ledger import KEEP
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.stopping import stoppable
from edgekd.core.target import Pricing
from edgekd.core.task import Task
from edgekd.stages.training.distill import Trained, distill
from edgekd.stages.training.lesson import Course


@dataclass(frozen=True)
class Taught:
    """What one contender made with one seed, and what that took."""

    students: tuple[Trained, ...]
    # of the whole lesson; None: it was interrupted
    seconds: float | None
    cpu_seconds: float | None  # of all its threads: what it took however busy the machine was
    memory_bytes: int | None  # at its peak
    processor: str  # or accelerator, on which it was taught
    threads: int  # of the lesson
    jobs: int  # lessons that may have run at the same time


class Classroom:
    """Holds lessons in processes of their own, up to `jobs` at a time. To leave it is to end those that still run."""

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self.lessons: set[SpawnProcess] = set()
        self.lock, self.closed = threading.Lock(), False

    def __enter__(self) -> Classroom:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.lock:
            self.closed = True
            for process in self.lessons:
                process.terminate()

    def teach(
        self,
        out: Path,
        name: str,
        task: Task,
        model: Model,
        method: Method,
        course: Course,
        teachers: tuple[Trained, ...],
        pricing: Pricing | None,
    ) -> Taught:
        """`distill` in a new process. What it raises there is raised here. Raises TrainingError if it was killed."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        # bars of several lessons would write over each other
        level = logging.getLogger("edgekd").getEffectiveLevel() if self.jobs == 1 else logging.ERROR
        asked = (out, name, task, model, method, course, teachers, pricing)
        process = context.Process(target=hold, args=(there, self.jobs, self.threads, level, asked))
        with self.lock:
            if self.closed:
                raise TrainingError(f"{name}: the comparison has ended")
            process.start()
            self.lessons.add(process)
        there.close()  # so that the end of the process is the end of the pipe
        with here:
            try:
                answer = here.recv()
            except EOFError:
                answer = None
        process.join()
        with self.lock:
            self.lessons.remove(process)
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, Taught):
            raise lost(process.exitcode or 0)
        return answer


def lost(code: int) -> TrainingError:
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    short = "if memory was short use fewer --jobs, or a smaller batch; " if code == -signal.SIGKILL else ""
    return TrainingError(
        f"the process of the lesson {ended}",
        hint=f"{short}the same command again goes on where this one stopped",
    )


def hold(answer: Connection, jobs: int, threads: int, level: int, asked: tuple[Any, ...]) -> None:
    """The life of a lesson's process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("edgekd").setLevel(level)
    torch.set_num_threads(threads)
    with stoppable(leave):
        try:
            answer.send(taught(jobs, threads, *asked))
        except (EdgekdError, OSError) as error:
            answer.send(error)


def leave(number: int, frame: object) -> NoReturn:
    """Unlike a plain death by SIGTERM, this ends the programs that the lesson started, too."""
    sys.exit(128 + number)


def end_with_parent() -> None:
    """A lesson whose parent was killed would write into the same files as the next comparison."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def taught(jobs: int, threads: int, out: Path, *asked: Any) -> Taught:
    """`distill(out, *asked)`, with what it took; an interrupted one is not known to the end."""
    whole = not (out / KEEP).exists()
    wall, cpu = time.perf_counter(), time.process_time()
    students = distill(out, *asked)
    wall, cpu = round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor.name()
    if not whole:
        return Taught(students, None, None, None, device, threads, jobs)
    return Taught(students, wall, cpu, peak_bytes(), device, threads, jobs)


def peak_bytes() -> int:
    """The most memory that this process held at any time: of the accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # Linux hands the parent's ru_maxrss down, VmHWM starts anew
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
