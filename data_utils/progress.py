"""Show a run: one bar in a terminal or notebook, plain lines elsewhere; a log file, peak memory."""

import os
import sys
import time
from pathlib import Path

from tqdm.auto import tqdm

from data_utils.advice import pasteable
from data_utils.errors import UsageError
from data_utils.files import warn

LINE_SECONDS = 10  # between two plain lines


def say(*words):
    """Print at once. A closed pipe (`| head`) or a full disk must not end a training run."""
    try:
        print(*(pasteable(str(word)) for word in words), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    except OSError:  # a full disk may have room for the next line
        pass


class Log:
    """`log = Log(path, name); log(line)` prints a line and appends "name: line" to a file; path "" is no file.

    A failed append is one warning: a run is worth more than its log.
    """

    def __init__(self, path, name):
        self.path = path
        self.name = name
        self.failed = False

    def __call__(self, line):
        say(line)
        if not self.path:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{self.name}: {line}\n")
        except OSError as e:
            if not self.failed:
                warn(f"--log_file {self.path} was not written: {e.strerror}; training goes on")
            self.failed = True


def check_log(path):
    """Make the folder of a log file; "" is none. Raises UsageError if the file can't be written."""
    if not path:
        return
    new = not os.path.exists(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            os.unlink(path)
    except OSError as e:
        raise UsageError(
            f"--log_file {path} can't be written: {e.strerror}\n"
            "try: --log_file '' for none, or a file in another folder"
        ) from e


class Progress:
    """`with Progress(total, step) as progress:` call progress(**numbers) once per step: a bar, or a line every 10 s."""

    def __init__(self, total, initial=0, show=True):
        notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
        wanted = show and (notebook or sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=initial, disable=not wanted)
        self.lines = show and self.bar.disable
        self.total = total
        self.step = initial
        self.first = initial
        self.start = time.monotonic()
        self.last = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, **numbers):
        self.step += 1
        if not self.bar.disable:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update()
        now = time.monotonic()
        if self.lines and (now - self.last > LINE_SECONDS or self.step == self.total):
            self.last = now
            remaining = (now - self.start) / (self.step - self.first) * (self.total - self.step)
            words = " ".join(f"{name}={value}" for name, value in numbers.items())
            try:
                print(f"step {self.step}/{self.total} {words} left={remaining:.0f}s", file=sys.stderr, flush=True)
            except BrokenPipeError:
                self.lines = False
            except OSError:  # a full disk
                pass


def peak_mb(device):
    """Return the peak memory of this process in MB: of the GPU if `device` is one, else resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
