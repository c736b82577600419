"""Start and end a program: cores shared with others, exit status instead of a traceback, resources released."""

import contextlib
import contextvars
import errno
import functools
import os
import re
import select
import signal
import sys
import time

from data_utils.advice import pasteable
from data_utils.errors import DataError, UsageError

_endings = contextvars.ContextVar("endings", default=None)  # calls that the running main makes at its end
WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"  # each sets how OpenMP's threads wait
OF_THE_MACHINE = errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG  # no fault of ours
TORCHRUN = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # set beside WORLD_SIZE


def share_cores():
    """Make torch's idle threads spin for a shorter time if other processes need the cores.

    A thread that spins at a barrier keeps the core from the thread that it waits for. Call this before torch is
    imported. It changes no result, and nothing if the user has set a policy. benchmarks/speed/busy.py measured the
    counts.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    cores = os.cpu_count() or 1
    setting = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(setting[0]) if setting else cores
    if others_running() > cores - threads + 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "1000"
    else:  # another process may still start
        os.environ["GOMP_SPINCOUNT"] = "10000"


def others_running(samples=10, seconds=0.02):
    """Return how many other threads of the machine run or wait for a core, on average over `seconds`."""
    try:
        counts = []
        for _ in range(samples):
            time.sleep(seconds / samples)
            with open("/proc/loadavg", encoding="ascii") as file:  # 0.20 0.18 0.12 1/80 11206
                counts.append(int(file.read().split()[3].split("/")[0]) - 1)  # without this process
        return sum(counts) / samples
    except (OSError, ValueError, IndexError):  # not Linux
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def check_torchrun(device):
    """Raise UsageError for a WORLD_SIZE without torchrun's other variables, and if all ranks would share one GPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in TORCHRUN if name not in os.environ]
    if world > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} not set: left over from another job?\n"
            "try: unset WORLD_SIZE"
        )
    if world > 1 and device.startswith("cuda:"):
        raise UsageError(f"--device {device} puts all {world} processes on one GPU\ntry: --device cuda")


def ends_cleanly(main):
    """Decorate main so that its locks, its W&B run and its processes are released however it ends.

    A notebook needs this: its kernel lives on, and keeps the traceback of an error with all of main's variables.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        with contextlib.ExitStack() as endings:
            before = _endings.set(endings)
            endings.callback(_endings.reset, before)
            return main(*args, **kwargs)

    return run


def at_end(call):
    """Register call(failed) for the end of the running main; failed: whether by an exception. No main, no call."""
    endings = _endings.get()
    if endings is not None:
        endings.push(lambda kind, error, trace: call(kind is not None) and None)


def reader_left():
    """Return whether nothing reads standard output any more, as after `| head`; then it goes to the null device.

    A BrokenPipeError may come from another pipe, such as that of a process that was killed.
    """
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # an error of the pipe is reported in any case
        if not poll.poll(0):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def launch(main, cfg, leave=True):
    """Run main(cfg) as a program and exit: 0 done, 1 bad data or failed run, 2 usage, 128 + signal when stopped.

    main returns a dict: `stopped` is the number of that signal, `status` the exit status of a main that did not fail.

    An error that the user can fix prints a short message instead of a traceback. leave=False: return the result of
    main, and exit only if it fails. Does nothing if cfg is None, which from_cli returns in a notebook: there call
    main(Config(...)). cfg.remedy, if there is one, are flags that need less memory.
    """
    if cfg is None:
        return None
    status = 0
    if hasattr(sys.stdout, "reconfigure") and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # an old code page lacks most characters
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # until there is a state to save
        result = main(cfg)
        if not leave:
            return result
        status = result.get("status", 0)
        stopped = result.get("stopped", 0)
        if stopped:
            status = 130 if stopped == signal.SIGINT else 143
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_left():
            raise
        status = 141  # as of any program that SIGPIPE ends
    except (UsageError, DataError) as e:
        status = 2 if isinstance(e, UsageError) else 1
        print(pasteable(f"error: {e}"), file=sys.stderr)
    except OSError as e:
        if e.errno not in OF_THE_MACHINE or not e.filename:
            raise
        status = 1
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except (RuntimeError, MemoryError) as e:
        status = 1
        text = f"{type(e).__name__} {e}"
        if re.search("out of memory|OutOfMemory|MemoryError|can't allocate memory", text):
            reason = (str(e).splitlines() or ["no reason given"])[0][:300]
            print(f"error: out of memory: {reason}", file=sys.stderr)
            if getattr(cfg, "remedy", ""):
                print(pasteable(f"try: {cfg.remedy}"), file=sys.stderr)
        elif re.search("InvalidCxxCompiler|No working C\\+\\+ compiler|Failed to find C compiler", text):
            print("error: --compile needs a C++ compiler, and there is none", file=sys.stderr)
            print(pasteable("try: without --compile"), file=sys.stderr)
        else:
            raise
    if "TORCHELASTIC_RUN_ID" in os.environ and status > 128:
        status = 0  # torchrun takes another status for a failure and restarts the ranks
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # see distributed.close
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
