"""Processes that start warm: forks of one that has imported torch and what else takes its 4 seconds, but none of ours.

A fork then runs a script as `python script flags` would: with a session, folder, environment, random state, signals
and exit of its own. Only its pictures are blank, for 0.3 s each; `full_pictures` draws those of a test. Run as a
program this file is the parent, which reads commands from its standard input.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Warm:
    """What subprocess.Popen(words, ...) would be, `words` without the interpreter; output is kept in files."""

    def __init__(self, parent, words, cwd, env):
        self.parent, self.returncode, self.files = parent, None, [tempfile.NamedTemporaryFile() for _ in range(2)]
        self.pid = self._ask(dict(words=words, cwd=str(cwd), env=env, files=[file.name for file in self.files]))

    def _ask(self, what):
        print(json.dumps(what), file=self.parent.stdin, flush=True)
        return json.loads(self.parent.stdout.readline())

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask(self.pid)
        return self.returncode

    def communicate(self, timeout=float("inf")):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.pid, timeout)
            time.sleep(0.01)
        return [Path(file.name).read_text() for file in self.files]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def parent(env):
    """Start the process that Warm forks from."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, __file__], env=env, **pipes)


def leave_blank():
    """Let matplotlib write pictures of nothing: figures are built, and none of it is laid out and drawn.

    Returns the methods that did, {name: method}.
    """
    from matplotlib.figure import Figure

    methods = dict(savefig=Figure.savefig, findobj=Figure.findobj)
    Figure.savefig = lambda figure, file, **options: methods["savefig"](Figure((1, 1)), file, **options)
    Figure.findobj = lambda *_, **__: []  # it makes each tick, to look for texts
    return methods


def serve():
    """Answer a command with the number of a fork, and that number with its status; return the command in the fork."""
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            ended, status = os.waitpid(asked, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if not answer:
                return asked
        print(json.dumps(answer), flush=True)
    sys.exit()


if __name__ == "__main__":
    modules = "torch._dynamo torch.distributed.fsdp matplotlib.pyplot tokenizers faiss yaml tqdm"  # none has a thread
    for name in modules.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import numpy
    import torch

    with contextlib.suppress(ImportError):
        leave_blank()
    gc.freeze()  # else each fork copies most of it
    command = serve()
    os.setsid()
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for number, path in enumerate([os.devnull, *command["files"]]):
        os.dup2(os.open(path, os.O_RDWR), number)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which OpenMP has read in the parent
    random.seed()
    numpy.random.seed()
    sys.argv = command["words"]
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *command["env"]["PYTHONPATH"].split(os.pathsep)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # to free all that was imported takes 0.4 s
