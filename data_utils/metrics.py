"""metrics.jsonl: one strict JSON object per line. The first describes the run, each later one has a step."""

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
    """Return the rows of `path` as dicts, skipping lines that are no JSON object; [] if there is no file."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError, RecursionError):  # the process was killed while writing
                    continue
    return rows


def start_rows(path, step, evaluated, config, device):
    """Write the first row of a new run; on a resume at `step`, drop the later rows so that no step comes twice.

    evaluated: the last step whose evaluation the checkpoint contains.
    """
    import torch

    rows = read_rows(path) if step else []
    rows = [row for row in rows if row.get("step", 0) <= (evaluated if row.get("split") == "val" else step)]
    if not rows:
        versions = dict(python=platform.python_version(), torch=str(torch.__version__))
        rows = [dict(config=config, argv=sys.argv, versions=versions, commit=commit(), device=str(device))]
    text = "".join(_line(row) for row in rows)
    write_atomic(path, lambda file: file.write(text.encode()))


def averages(sums):
    """Turn {name: sum over tokens, "tokens": count, "bytes": count} into means, perplexity and bits per byte (bpb).

    "nll" is in nats per token; "bytes" are the UTF-8 bytes of the targets. Bits per byte compare over tokenizers.
    """
    tokens = sums.pop("tokens")
    n_bytes = sums.pop("bytes")
    row = {name: value / max(1, tokens) for name, value in sums.items()}
    bpb = row["nll"] * tokens / math.log(2) / max(1, n_bytes)
    return row | dict(perplexity=math.exp(min(700, row["nll"])), bpb=bpb, tokens=int(tokens))


def add(sums, more):
    """Add {name: (sum, count)}, tensors or numbers, to the plain numbers in `sums`."""
    for name, pair in more.items():
        numbers = [x.item() if hasattr(x, "item") else x for x in pair]
        sums[name] = [old + new for old, new in zip(sums.get(name, (0.0, 0.0)), numbers, strict=True)]


def means(sums):
    """Return {name: mean} of {name: (sum, count)}, without the names whose count is 0."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def append_row(path, row):
    """Append one row, complete or not at all. A failure is one warning per file.

    `start_rows` has written the file, so a failure now is no mistake of the user, and a run is worth more than a row.
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
                    file.truncate(before)  # half a line would spoil the next row
                raise
    except OSError as e:
        if str(path) not in _unwritten:
            warn(f"{path} was not written: {e.strerror}; training goes on, rows are missing until there is room")
        _unwritten.add(str(path))


_unwritten = set()  # files that lack rows, already warned about


def draw_losses(paths, out, log):
    """Draw the losses of a finished run. A failure is one line passed to `log`: no run may fail by its figure."""
    try:
        from data_utils.figures import plot_losses

        plot_losses([(path, read_rows(path)) for path in paths], out)
    except ImportError:
        log("no loss curve: pip install matplotlib")
    except Exception as e:
        log(f"no loss curve: {(str(e).splitlines() or [type(e).__name__])[0]}")


INIT_SECONDS = 30  # for W&B to start


def to_wandb(mode, project, entity, name, config):
    """Return log(row), which sends a row to Weights & Biases; it does nothing if W&B is disabled or not installed.

    mode auto: WANDB_MODE if set, else online if there is a key, else disabled. Nobody is asked to log in. If W&B can't
    start or fails later, for example without a network, one warning is printed and training goes on without it.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "disabled")
    if mode == "disabled":
        return lambda row: None
    try:
        import wandb

        options = dict(mode=mode, project=project, entity=entity or None, name=name or None, config=config)
        if hasattr(wandb, "Settings"):
            options["settings"] = wandb.Settings(init_timeout=INIT_SECONDS)
        run = wandb.init(**options)
        send = run.log
    except ImportError:
        warn(f"wandb_mode {mode}: not installed, training goes on without it; try: pip install wandb")
        return lambda row: None
    except Exception as e:  # wandb raises a dozen types of its own, and others
        warn(f"wandb_mode {mode}: {_reason(e)}; training goes on without it; try: export WANDB_MODE=offline")
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
            send = len  # does nothing with a row

    at_end(finish)
    return log


def _has_key():
    """Return whether there is a key for W&B; a home folder that can't be read has none."""
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
    """Return the commit of the git repository in the working folder; "" if there is none."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return git.stdout.strip()
