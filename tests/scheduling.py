"""Scheduling: which test worker runs which file, also after one of them died."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class FileScheduling(LoadFileScheduling):
    """Each file on one worker at a time; the test that kills a worker fails, and another worker goes on after it.

    pytest-xdist 3.8 itself starts such a test again on each new worker, hands files to workers that still look for
    their tests, which is an internal error, and leaves a worker for ever with one test when it has no other for it.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """Take a worker out, which ended or died. Returns the test that it died of, if it did."""
        work = self.assigned_work.pop(node)
        waiting = [(file, test) for file, tests in work.items() for test, ended in tests.items() if not ended]
        if not waiting:
            return None
        (_, deadly), *rest = waiting
        for file, test in rest:
            self.workqueue.setdefault(file, {})[test] = False
        for other in self.nodes:
            self._reschedule(other)
        return deadly

    def _reschedule(self, node: WorkerController) -> None:
        """Give a worker the next file, until it has two tests: it keeps the last one until it knows what follows."""
        if node not in self.registered_collections or node.shutting_down:
            return
        super()._reschedule(node)
        if self._pending_of(self.assigned_work[node]) < 2:
            self._reschedule(node)
