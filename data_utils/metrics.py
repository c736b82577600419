"""metrics.jsonl: one strict JSON object a line; the first says what ran, each later one has a step."""

import functools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from data_utils.checkpoint import write_atomic
from data_utils.config import DataError, at_end


def read_rows(path):
    """Return the rows of `path` as dicts, without a torn last line; [] for no file."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError):  # a process was killed while it wrote
                    break
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
    """Add one row; it is in the file when this returns. Raises DataError when the disk is full."""
    line = _line(row)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as e:
        raise DataError(f"{path} was not written: {e.strerror}\ntry: make room, then go on with it") from e


def to_wandb(mode, project, entity, name, config):
    """Return log(row), which also sends a row to Weights & Biases; nothing when disabled or not installed.

    mode auto: as WANDB_MODE says, online where there is a key, else disabled; nobody is asked to log in.
    """
    if mode == "auto":
        netrc = Path.home() / ".netrc"
        keyed = "WANDB_API_KEY" in os.environ or netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
        mode = os.environ.get("WANDB_MODE") or ("online" if keyed else "disabled")
    if mode == "disabled":
        return lambda row: None
    try:
        import wandb
    except ImportError:
        print(f"wandb_mode {mode}: not installed, training goes on without it; try: pip install wandb", file=sys.stderr)
        return lambda row: None
    run = wandb.init(mode=mode, project=project, entity=entity or None, name=name or None, config=config)
    at_end(lambda failed: run.finish(exit_code=int(failed)))
    return run.log


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
