"""Train in a separate process, so that time and memory of each training are measured separately."""

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

from edgekd.core.dataset import PreparedDataset
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.step_cache import WORK_DIR
from edgekd.core.target import TargetProbe
from edgekd.errors import EdgekdError, TrainingError
from edgekd.stages.distill.distill import distill
from edgekd.stages.distill.setup import TrainingPlan
from edgekd.training.trained_model import TrainedModel
from edgekd.utils import cpu as cpu_module
from edgekd.utils.stopping import stoppable


@dataclass(frozen=True)
class TrainingRun:
    """The students of one training, and its cost."""

    students: tuple[TrainedModel, ...]
    # of the whole training; None: it was interrupted
    seconds: float | None
    cpu_seconds: float | None  # of all its threads, independent of other load
    memory_bytes: int | None  # at its peak
    processor: str  # or accelerator
    threads: int  # of the training
    jobs: int  # trainings that may have run at the same time


class WorkerPool:
    """Trains in separate processes, up to `jobs` at a time. Leaving the context ends those that still run."""

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self.processes: set[SpawnProcess] = set()
        self.lock, self.closed = threading.Lock(), False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.lock:
            self.closed = True
            for process in self.processes:
                process.terminate()

    def distill(
        self,
        out: Path,
        name: str,
        dataset: PreparedDataset,
        model: Model,
        method: Method,
        plan: TrainingPlan,
        teachers: tuple[TrainedModel, ...],
        probe: TargetProbe | None,
    ) -> TrainingRun:
        """`distill` in a new process. What it raises there is raised here. Raises TrainingError if it was killed."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        # progress bars of several processes would overwrite each other
        level = logging.getLogger("edgekd").getEffectiveLevel() if self.jobs == 1 else logging.ERROR
        arguments = (out, name, dataset, model, method, plan, teachers, probe)
        process = context.Process(target=worker_main, args=(there, self.jobs, self.threads, level, arguments))
        with self.lock:
            if self.closed:
                raise TrainingError(f"{name}: the comparison has ended")
            process.start()
            self.processes.add(process)
        there.close()  # so that the pipe ends with the process
        with here:
            try:
                result = here.recv()
            except EOFError:
                result = None
        process.join()
        with self.lock:
            self.processes.remove(process)
        if isinstance(result, Exception):
            raise result
        if not isinstance(result, TrainingRun):
            raise worker_died(process.exitcode or 0)
        return result


def worker_died(code: int) -> TrainingError:
    """Return the error for a process that ended with an exit code and no result."""
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    short = "if memory was short use fewer --jobs, or a smaller batch; " if code == -signal.SIGKILL else ""
    return TrainingError(
        f"the training process {ended}",
        hint=f"{short}run the same command again to resume",
    )


def worker_main(results: Connection, jobs: int, threads: int, level: int, arguments: tuple[Any, ...]) -> None:
    """Run one training in a worker process, and send its result or its error."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("edgekd").setLevel(level)
    torch.set_num_threads(threads)
    with stoppable(exit_on_signal):
        try:
            results.send(run_training(jobs, threads, *arguments))
        except (EdgekdError, OSError) as error:
            results.send(error)


def exit_on_signal(number: int, frame: object) -> NoReturn:
    """Exit normally on SIGTERM, which also ends the programs that the training started."""
    sys.exit(128 + number)


def end_with_parent() -> None:
    """Exit when the parent is killed: otherwise it would write into the same files as the next comparison."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_training(jobs: int, threads: int, out: Path, *arguments: Any) -> TrainingRun:
    """Run `distill(out, *arguments)` and measure its cost; a resumed training has no time and memory."""
    whole = not (out / WORK_DIR).exists()
    wall, cpu = time.perf_counter(), time.process_time()
    students = distill(out, *arguments)
    wall, cpu = round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_module.name()
    if not whole:
        return TrainingRun(students, None, None, None, device, threads, jobs)
    return TrainingRun(students, wall, cpu, peak_bytes(), device, threads, jobs)


def peak_bytes() -> int:
    """Return the most memory that this process held at any time: of the accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # Linux hands the parent's ru_maxrss down, VmHWM starts again
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
