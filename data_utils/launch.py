"""How a program starts and ends: threads that share the cores, errors as a status, what main must let go."""

import contextlib
import contextvars
import functools
import os
import re
import signal
import sys
import time

from data_utils.errors import DataError, UsageError

_endings = contextvars.ContextVar("endings", default=None)  # the calls that the main under way makes when it ends
WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"  # each says how OpenMP's threads wait


def share_cores():
    """Let torch's threads wait without spinning long where other processes want the cores. To be called before torch.

    A thread that spins at a barrier keeps the core from the one it waits for. Nothing is changed where the user has
    chosen, and numbers never change. benchmarks/speed/busy.py measured the counts.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    cores = os.cpu_count() or 1
    asked = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(asked[0]) if asked else cores
    if others_running() > cores - threads + 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "1000"
    else:  # a neighbour may still come
        os.environ["GOMP_SPINCOUNT"] = "10000"


def others_running(samples=10, seconds=0.02):
    """Return how many other threads of the machine run or wait for a core, on average over `seconds`."""
    try:
        counts = []
        for _ in range(samples):
            time.sleep(seconds / samples)
            with open("/proc/loadavg", encoding="ascii") as file:  # 0.20 0.18 0.12 1/80 11206
                counts.append(int(file.read().split()[3].split("/")[0]) - 1)  # this process itself runs
        return sum(counts) / samples
    except (OSError, ValueError, IndexError):  # no Linux
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


TORCHRUN = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # set beside WORLD_SIZE


def check_torchrun(device):
    """Raise UsageError for a WORLD_SIZE without its neighbours, and for one GPU that all processes would share."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in TORCHRUN if name not in os.environ]
    if world > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} not set: left over from another job?\n"
            "try: unset WORLD_SIZE, or start with torchrun"
        )
    if world > 1 and device.startswith("cuda:"):
        raise UsageError(f"--device {device} puts all {world} processes on one GPU\ntry: --device cuda")


def ends_cleanly(main):
    """Decorate main: what it holds (locks, its W&B run, processes) is let go when it ends, however it ends.

    A notebook's kernel lives on, and keeps the traceback of an error with all that main's variables refer to.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        with contextlib.ExitStack() as endings:
            before = _endings.set(endings)
            endings.callback(_endings.reset, before)
            return main(*args, **kwargs)

    return run


def at_end(call):
    """Have call(failed) made when the main under way ends, `failed` if by an exception; never where there is none."""
    endings = _endings.get()
    if endings is not None:
        endings.push(lambda kind, error, trace: call(kind is not None) and None)


def launch(main, cfg, leave=True):
    """Run main(cfg) as a program: a short message and a status instead of a traceback for what a user can mend.

    0 done, 1 data or run, 2 usage, 128 + signal when stopped. leave=False: what comes before the program; it leaves
    only if that fails, else returns what it returned. Does nothing with the None that from_cli returns in a notebook:
    call main(Config(...)) there.
    """
    if cfg is None:
        return None
    # under torchrun a stopped rank leaves with 0: it would take 143 for a failure and start the ranks again
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    status = 0
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # while there is nothing to save
        made = main(cfg)
        if not leave:
            return made
        stopped = made.get("stopped", 0)
        status = 0 if not stopped else 130 if stopped == signal.SIGINT else 143
    except (UsageError, DataError) as e:
        status = 2 if isinstance(e, UsageError) else 1
        print(f"error: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except (RuntimeError, MemoryError) as e:
        text = f"{type(e).__name__} {e}"
        reason = (str(e).splitlines() or ["no reason given"])[0][:300]
        if re.search("out of memory|OutOfMemory|MemoryError|can't allocate memory", text):
            print(f"error: out of memory: {reason}\ntry: {_remedy(cfg)}", file=sys.stderr)
        elif re.search("InvalidCxxCompiler|No working C\\+\\+ compiler|Failed to find C compiler", text):
            print("error: --compile needs a C++ compiler, and there is none\n"
                  "try: the same command without --compile", file=sys.stderr)  # fmt: skip
        else:
            raise
        status = 1
    status = 0 if torchrun and status > 128 else status
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # see distributed.close
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _remedy(cfg):
    """Return what takes less memory than a run with this configuration: its `remedy`, if its class has one."""
    remedy = getattr(cfg, "remedy", "")
    if remedy:
        return remedy() if callable(remedy) else remedy
    shared = ", or --fsdp" * (not getattr(cfg, "fsdp", True) and int(os.environ.get("WORLD_SIZE", 1)) > 1)
    return "a smaller --batch_size with a larger --grad_accum_steps" + shared
