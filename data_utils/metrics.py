"""metrics.jsonl: one strict JSON object a line; the first says what ran, each later one has a step."""

import contextlib
import errno
import functools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from data_utils.files import warn, write_atomic
from data_utils.launch import at_end


def read_rows(path):
    """Return the rows of `path` as dicts, without lines that are torn or no rows; [] for no file."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError, RecursionError):  # a process was killed while it wrote
                    continue
    return rows


def start_rows(path, step, evaluated, config, device):
    """Begin the file with what runs; or, on a resume at `step`, drop the rows beyond it so that no step comes twice.

    `evaluated` is the last step whose evaluation the checkpoint knows of.
    """
    rows = read_rows(path) if step else []
    kept = [row for row in rows if row.get("step", 0) <= (evaluated if row.get("split") == "val" else step)]
    import torch

    versions = dict(python=platform.python_version(), torch=str(torch.__version__))
    about = dict(config=config, argv=sys.argv, versions=versions, commit=commit(), device=str(device))
    text = "".join(_line(row) for row in (kept or [about]))
    write_atomic(path, lambda file: file.write(text.encode()))


def averages(sums):
    """{name: sum over tokens, tokens, bytes} -> mean of each in nats a token, perplexity, bits per byte (bpb).

    nll holds the nats of the targets, whose UTF-8 bytes are counted: bits per byte compare over tokenizers.
    """
    tokens, octets = sums.pop("tokens"), sums.pop("bytes")
    means = {name: value / max(1, tokens) for name, value in sums.items()}
    bpb = means["nll"] * tokens / math.log(2) / max(1, octets)
    return means | dict(perplexity=math.exp(min(700, means["nll"])), bpb=bpb, tokens=int(tokens))


def add(sums, more):
    """Add {name: (sum, count)} to `sums`, as plain numbers."""
    for name, pair in more.items():
        sums[name] = [old + (new.item() if hasattr(new, "item") else new)
                      for old, new in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]  # fmt: skip


def means(sums):
    """{name: (sum, count)} -> {name: mean}, without those that nothing was counted for."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def append_row(path, row):
    """Add one row, whole; it is in the file when this returns. A disk that does not take it is a warning, once a file.

    The file is there, `start_rows` has written it: what fails now is no mistake of the command, and a run is worth more
    than a row.
    """
    line = _line(row).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)  # half a line would hide the rows after it
                raise
    except OSError as e:
        if str(path) not in _unwritten:
            warn(f"{path} was not written: {e.strerror}; training goes on, rows are missing until there is room")
        _unwritten.add(str(path))


_unwritten = set()  # files that lack rows


def draw_losses(paths, out, tell):
    """Draw the losses of a finished run. A failure is one line of text: a figure is never worth a run."""
    try:
        from data_utils.figures import plot_losses

        plot_losses([(path, read_rows(path)) for path in paths], out)
    except ImportError:
        tell("no loss curve: pip install matplotlib")
    except Exception as e:
        tell(f"no loss curve: {(str(e).splitlines() or [type(e).__name__])[0]}")


INIT_SECONDS = 30  # that W&B has to begin


def to_wandb(mode, project, entity, name, config):
    """Return log(row), which also sends a row to Weights & Biases; nothing when disabled or not installed.

    mode auto: as WANDB_MODE says, online where there is a key, else disabled; nobody is asked to log in. When W&B can't
    begin or fails later, as without a network, that is a warning and training goes on without it.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "disabled")
    if mode == "disabled":
        return lambda row: None
    try:
        import wandb

        how = dict(mode=mode, project=project, entity=entity or None, name=name or None, config=config)
        if hasattr(wandb, "Settings"):
            how["settings"] = wandb.Settings(init_timeout=INIT_SECONDS)
        run = wandb.init(**how)
        send = run.log
    except ImportError:
        warn(f"wandb_mode {mode}: not installed, training goes on without it; try: pip install wandb")
        return lambda row: None
    except Exception as e:  # wandb has a dozen types, and raises those of others
        warn(f"wandb_mode {mode}: {_reason(e)}; training goes on without it; try: WANDB_MODE=offline")
        return lambda row: None

    def finish(failed):
        try:
            run.finish(exit_code=int(failed))
        except Exception as e:
            warn(f"W&B did not finish: {_reason(e)}")

    def log(row):
        nonlocal send
        try:
            send(row)
        except Exception as e:
            warn(f"W&B took no row: {_reason(e)}; training goes on without it")
            send = len  # of a row, which does nothing

    at_end(finish)
    return log


def _has_key():
    """Whether there is a key for W&B; a home folder that can't be found or read has none."""
    if "WANDB_API_KEY" in os.environ:
        return True
    try:
        netrc = Path.home() / ".netrc"
        return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    except (OSError, RuntimeError):
        return False


def _reason(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _line(row):
    return json.dumps(_strict(row), allow_nan=False) + "\n"


def _strict(x):
    if isinstance(x, dict):
        return {k: _strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_strict(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@functools.cache
def commit():
    """Return the commit of the working folder's repository; "" for none."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
