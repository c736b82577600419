"""What a person sees of a run: one bar in a terminal or notebook, plain lines elsewhere."""

import os
import sys
import time

from tqdm.auto import tqdm

LINE_SECONDS = 10  # at most one plain line in so many seconds


def say(*words):
    """Print at once; a reader that went away (`| head`) must not end a training run."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def say_and_log(path, name, line):
    """`say`, and add the line, with a name before it, to the file `path` ("": to none)."""
    say(line)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{name}: {line}\n")


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
