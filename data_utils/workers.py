"""Tasks done by other processes, their results taken in order; memory stays flat, and none outlives a kill."""

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
    """Yield function(task) of each task in order; `processes` below 2: here. At most 2 a process are under way.

    Raises what `function`, of an importable module, raises, and DataError when a process can't start or died.
    """
    if processes < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would keep locks, and break after torch or tokenizers
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, begin)
    at_end(lambda failed: pool.shutdown(cancel_futures=True))  # an error elsewhere leaves this generator as it is

    def submit(*call):
        with _bare():
            try:
                return pool.submit(*call)
            except OSError as e:
                raise DataError(f"a worker process can't start: {e.strerror}\ntry: one process") from e

    try:
        for _ in range(processes):  # each starts a process, which imports what it needs while tasks are looked for
            submit(callable, function)
        under_way = deque()
        for task in tasks:
            under_way.append(submit(function, task))
            if len(under_way) == 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as e:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # the pool sends SIGTERM, which they ignore, and waits: one may write what nobody reads
        raise DataError("a worker process died, perhaps of too little memory\ntry: fewer processes") from e
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _bare():
    """Let new processes not import the running program, and with it torch: seconds for nothing."""
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
    """In a new process: the parent alone answers signals, and when it is gone so is this one."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_follow, daemon=True).start()


def _follow():
    multiprocessing.parent_process().join()
    os._exit(1)
