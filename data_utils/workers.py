"""Run tasks in other processes and take their results in order. Memory stays flat, and no process outlives a kill."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_utils.errors import DataError
from data_utils.launch import at_end


def in_order(function, tasks, processes):
    """Yield function(task) of each task, in order. At most two tasks per process are pending.

    With processes < 2 the tasks run in this process. `function` must belong to an importable module. Raises what
    `function` raises, and DataError if a process can't start or dies.
    """
    if processes < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks, and fails after torch or tokenizers
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, begin)
    at_end(lambda failed: pool.shutdown(cancel_futures=True))  # an error elsewhere does not end this generator

    def submit(*call):
        with _empty_main():
            try:
                return pool.submit(*call)
            except OSError as e:
                raise DataError(f"a worker process can't start: {e.strerror}\nfix: one process") from e

    try:
        for _ in range(processes):  # start all processes now: they import while the first tasks are prepared
            submit(callable, function)
        pending = deque()
        for task in tasks:
            pending.append(submit(function, task))
            if len(pending) == 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as e:
        # The pool sends SIGTERM, which they ignore, and waits: one may block on a result that nobody reads.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise DataError("a worker process died, perhaps of too little memory\nfix: fewer processes") from e
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _empty_main():
    """Keep new processes from importing the running program and, with it, torch: that takes seconds."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin():
    """Prepare a new process: it ignores signals, which the parent answers, and ends with the parent."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process uses one core
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
