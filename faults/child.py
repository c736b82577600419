"""The side of the faults that runs in the child: it injects them, and starts children.

A fault is a word WHAT=A:B:...; faults are patches made before the script is run by its name, so that no script knows
of them. Steps are counted from the start of the process, by the optimizer; calls of `backward` and saves from 1.

    signal=NAME:STEP:MS[:group]   send a signal to itself (to its group) MS milliseconds after a step
    bad=nan|inf:CALL:TIMES        gradients that are not finite, in so many calls of backward from CALL on
    sleep=CALL:SECONDS            a slow call of backward
    die=half|before|after:N       SIGKILL in the middle of the N-th file that is saved, before or after the N-th rename
    die=delete:N                  the same before the N-th checkpoint is deleted
    limit=STEP:BYTES              after a step no file may be longer; -1 lifts that
    quota=BYTES                   no file may be longer from the start
    slow=PATH[:ARGUMENT]          a slow function, where it gets that argument; SIGTERM comes in its first wait
    clock=SECONDS                 time.time() is so much ahead
    user=NUMBER                   another user than root
    scaler=1                      loss scaling, which the product has on CUDA only
    word=FLAG                     one more word of the command line
    once=FILE                     the faults after it only if FILE is not there; makes it
    figures=0                     no figures: drawing them would take most of the time

1@ before a fault: in rank 1 only.
"""

import atexit
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM = ["torch", "torch._dynamo", "tokenizers", "faiss", "pandas", "tqdm.auto"]  # none starts a thread

# a child that is killed or leaves by os._exit still held semaphores
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
LOCK = threading.Lock()  # a start of multiprocessing polls all children, and a status can be read only once


# --- faults -----------------------------------------------------------------------------------
def inject(words):
    """Patch this process as the words say."""
    at_steps, at_calls, moves = {}, {}, []
    for word in words:
        rank, at, word = word.rpartition("@")
        if at and rank != os.environ.get("RANK"):
            continue
        fault, _, value = word.partition("=")
        values = value.split(":")
        match fault:
            case "signal":
                action = partial(send, values[0], float(values[2]) / 1e3, len(values) > 3)
                at_steps.setdefault(int(values[1]), []).append(action)
            case "limit":
                at_steps.setdefault(int(values[0]), []).append(partial(limit, int(values[1])))
            case "bad":
                first, count = map(int, values[1:])
                at_calls |= dict.fromkeys(range(first, first + count), (float(values[0]), 0.0))
            case "sleep":
                at_calls[int(values[0])] = (1.0, float(values[1]))
            case "die":
                moves.append((values[0], int(values[1])))
            case "quota":
                limit(int(values[0]))
            case "slow":
                slow_down(*values)
            case "clock":
                time.time = lambda now=time.time, ahead=float(values[0]): now() + ahead
            case "user":
                os.setuid(int(value))
            case "scaler":
                scale_losses()
            case "word":
                sys.argv.append(value)
            case "once":
                if os.path.exists(value):
                    break
                Path(value).touch()
            case "figures":
                sys.modules["data_utils.figures"] = None
            case _:
                raise SystemExit(f"unknown fault {word}")
    if at_steps:
        count_steps(at_steps)
    if at_calls:
        spoil_backward(at_calls)
    if moves:
        die_in_saves(*moves[0])


def announce(fault):
    print(f"injected {fault} at {time.monotonic()}", file=sys.stderr, flush=True)


def send(name, seconds, group):
    """Send a signal to this process, or its group, after so many seconds."""

    def now():
        announce(name)
        if group:
            os.killpg(os.getpgrp(), getattr(signal, name))
        else:
            os.kill(os.getpid(), getattr(signal, name))

    if seconds:
        timer = threading.Timer(seconds, now)
        timer.daemon = True
        timer.start()
    else:
        now()


def count_steps(actions):
    """Call the actions {step: functions} after the optimizer has made that step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def after(optimizer, *_):
        nonlocal steps
        if type(optimizer).__name__ != "SignRows":  # a second optimizer of the same step
            steps += 1
            for act in actions.get(steps, ()):
                act()

    register_optimizer_step_post_hook(after)


def spoil_backward(changes):
    """changes: {call: (factor of all gradients, seconds to sleep)}."""
    import torch

    backward, calls = torch.Tensor.backward, 0

    def spoilt(tensor, *arguments, **options):
        nonlocal calls
        calls += 1
        factor, seconds = changes.get(calls, (1.0, 0.0))
        time.sleep(seconds)
        return backward(tensor if factor == 1 else tensor * factor, *arguments, **options)

    torch.Tensor.backward = spoilt


def die_in_saves(moment, number):
    """SIGKILL with half of the number-th checkpoint written, before or after its rename, or before one is deleted."""
    import torch

    save, counts = torch.save, dict(half=0, move=0, delete=0)

    def die():
        announce(moment)
        os.kill(os.getpid(), signal.SIGKILL)

    def half(state, file, *arguments, **options):
        counts["half"] += "rehearsal" not in str(getattr(file, "name", file))
        if moment != "half" or counts["half"] != number:
            return save(state, file, *arguments, **options)
        content = io.BytesIO()
        save(state, content)
        file.write(content.getvalue()[: content.tell() // 2])
        file.flush()
        die()

    def counted(move):
        def moved(source, target, **options):
            is_checkpoint = any(word in f"{source}" for word in (".pt", "checkpoint_"))
            is_checkpoint = is_checkpoint and "rehearsal" not in str(source)
            counts["move"] += is_checkpoint
            due = is_checkpoint and counts["move"] == number
            if due and moment == "before":
                die()
            move(source, target, **options)
            if due and moment == "after":
                die()

        return moved

    def deleted(path, unlink=os.unlink, **options):
        counts["delete"] += str(path).endswith(".pt")
        if moment == "delete" and counts["delete"] == number:
            die()
        unlink(path, **options)

    torch.save = half
    os.replace, os.rename = counted(os.replace), counted(os.rename)
    os.unlink = deleted


def limit(size):
    """Fill the disk for files that would be longer."""
    import resource

    announce(f"limit {size}")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def slow_down(path, argument=""):
    """Make the function or method at `path` wait 0.1 s where `argument` is given; SIGTERM comes in the first wait."""
    place, name = path.rsplit(".", 1)
    try:
        owner = importlib.import_module(place)
    except ImportError:
        module, cls = place.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), cls)
    function, first = getattr(owner, name), True

    def slow(*arguments, **options):
        nonlocal first
        if not argument or any(isinstance(a, str) and a == argument for a in arguments):
            if first:
                first = False
                send("SIGTERM", 0, False)
            time.sleep(0.1)
        return function(*arguments, **options)

    setattr(owner, name, slow)


def scale_losses():
    import torch

    class Scaler(torch.amp.GradScaler):
        def __init__(self, *_, **__):
            super().__init__("cpu")

    torch.amp.GradScaler = Scaler


# --- children ---------------------------------------------------------------------------------
def run(faults, script, words):
    """Run `python script words` in this process, with faults."""
    sys.argv = [script, *words]
    sys.path.insert(0, str(ROOT))
    inject([fault for fault in faults if fault])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _forked(faults, script, words, folder, logs, env):
    os.setsid()
    os.chdir(folder)
    os.environ.update(env)
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # OpenMP has read it before the fork
    for number, path in enumerate([os.devnull, *logs]):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        run(faults, script, words)
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # freeing all imports takes long


class Child:
    """A script of the repo as a process with its own session, like subprocess.Popen.

    warm: a fork of a process that has imported torch, but computed nothing and imported nothing of the repo; else a new
    interpreter. launcher: torchrun's words, before the script.
    """

    def __init__(self, script, words, folder, logs, faults=(), warm=True, env=None, launcher=()):
        self.logs, words = [str(log) for log in logs], [str(word) for word in words]
        env = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | (env or {})
        for log in self.logs:
            open(log, "wb").close()
        if warm:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(WARM)
            self.process = context.Process(target=_forked, args=(faults, script, words, folder, self.logs, env))
            with LOCK:
                self.process.start()
        else:
            line = [sys.executable, *launcher, "-m", "faults", "inject", *faults, "--", script]
            out, err = (open(log, "wb") for log in self.logs)
            self.process = subprocess.Popen([*line, *words], cwd=folder, env=os.environ | env, stdout=out, stderr=err,
                                            stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self.pid = self.process.pid

    def status(self):
        """Return the exit status, negative for a signal; None while it runs."""
        with LOCK:
            return self.process.exitcode if hasattr(self.process, "exitcode") else self.process.poll()

    def wait(self, seconds=60):
        """Return (status, stdout, stderr). Raises AssertionError, and ends the child, when it takes longer."""
        end = time.monotonic() + seconds
        while self.status() is None and time.monotonic() < end:
            time.sleep(0.005)
        self.ended = time.monotonic()
        if (status := self.status()) is None:
            self.kill()
            raise AssertionError(f"no end after {seconds} s")
        return status, *(Path(log).read_text(errors="replace") for log in self.logs)

    def kill(self, number=signal.SIGKILL):
        """Send a signal to its group."""
        os.killpg(self.pid, number)
