"""What a person sees of a run: one bar in a terminal or notebook, plain lines elsewhere."""

import os
import sys
import time
from pathlib import Path

from tqdm.auto import tqdm

from data_utils.errors import UsageError
from data_utils.files import warn

LINE_SECONDS = 10  # at most one plain line in so many seconds


def say(*words):
    """Print at once; a reader that went away (`| head`) or a full disk must not end a training run."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    except OSError:  # the next line may find room
        pass


class Log:
    """`log = Log(path, name); log(line)`: say the line, and add it, with the name before it, to a file; "" for none.

    A line that can't be added is a warning, the first time: a run is worth more than its log.
    """

    def __init__(self, path, name):
        self.path, self.name, self.failed = path, name, False

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
    """Make the folder of a log file. Raises UsageError unless lines can be added to the file; "" is none."""
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
        raise UsageError(f"--log_file {path} can't be written: {e.strerror}\n"
                         "try: --log_file '' for none, or a file in another folder") from e  # fmt: skip


class Progress:
    """`with Progress(total, step) as progress: progress(**numbers)` once a step: a bar, or a line every 10 seconds."""

    def __init__(self, total, initial=0, show=True):
        notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
        self.bar = tqdm(total=total, initial=initial, disable=not show or not (notebook or sys.stderr.isatty()))
        self.lines, self.step, self.total = show and self.bar.disable, initial, total
        self.start, self.first, self.last = time.monotonic(), initial, 0.0

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
            left = (now - self.start) / (self.step - self.first) * (self.total - self.step)
            words = " ".join(f"{name}={value}" for name, value in numbers.items())
            try:
                print(f"step {self.step}/{self.total} {words} left={left:.0f}s", file=sys.stderr, flush=True)
            except BrokenPipeError:
                self.lines = False
            except OSError:  # a full disk
                pass


def peak_mb(device):
    """Most memory this process had at once, in MB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
