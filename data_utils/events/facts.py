"""What a run of train_ae.py leaves for other programs: facts/events.jsonl and facts/scalars.csv in its folder.

A reader may come at any time and a process be killed at any time: an event is one line, a torn last one is ignored by
readers and cut by the next writer, and a table whose columns change is rewritten atomically.
"""

import csv
import io
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

from data_utils.errors import DataError
from data_utils.files import write_atomic
from data_utils.metrics import commit

SCHEMA_VERSION = 2
MOMENTS = "on_start on_resume on_epoch_end on_train_end on_test_end on_interrupt on_exception".split()
COLUMNS = "epoch split train_loss val_loss epoch_time_s throughput max_memory_mib".split()


def build_event_payload(
    *, moment, run_dir, cfg=None, run_id="", epoch=None, step=None, split=None, train_loss=None, val_loss=None,
    metrics=None, epoch_time_s=None, total_time_s=None, throughput=None, max_memory_mib=None, histories=None,
    error=None, traceback=None,
):  # fmt: skip
    """Return one event as a dict: what is not given is None, which means unknown.

    cfg, with the fields seed, loop and sweep_job, and run_id go into `meta`, with time, host, commit and GPU. histories
    {name: [value of epoch 0, ...]} are for figures at every moment, and in the file only of on_train_end. Raises
    ValueError for an unknown moment.
    """
    if moment not in MOMENTS:
        raise ValueError(f"moment {moment}: expected one of {', '.join(MOMENTS)}")
    here = Path(run_dir).resolve()
    payload = dict(
        schema_version=SCHEMA_VERSION, moment=moment, epoch=epoch, step=step, split=split, train_loss=train_loss,
        run_dir=here.relative_to(Path.cwd()).as_posix() if here.is_relative_to(Path.cwd()) else str(here),
        val_loss=val_loss, metrics=dict(metrics or {}), epoch_time_s=epoch_time_s, total_time_s=total_time_s,
        throughput=throughput, max_memory_mib=max_memory_mib, histories=histories, meta=_meta(cfg, run_id),
    )  # fmt: skip
    return payload | (dict(error=error, traceback=traceback) if moment == "on_exception" else {})


def _meta(cfg, run_id):
    torch = sys.modules.get("torch")  # a program without it has no GPU either
    available = bool(torch and torch.cuda.is_available())
    number = torch.cuda.current_device() if available else None
    cuda = dict(
        available=available, device_count=torch.cuda.device_count() if available else 0, current_device=number,
        device_name=torch.cuda.get_device_name(number) if available else None,
    )  # fmt: skip
    return dict(
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), run_id=run_id, git_commit=commit(),
        hostname=platform.node(), cuda_info=cuda, seed=getattr(cfg, "seed", None), loop=getattr(cfg, "loop", None),
        job=getattr(cfg, "sweep_job", None),
    )  # fmt: skip


def append_jsonl_event(run_dir, payload):
    """Add one event as a line of strict JSON; it is in the file when this returns, and on the disk unless an epoch's.

    NaN and infinity become null, and their names are listed under `nonfinite`. Raises DataError if it can't be written.
    """
    bad, moment = {}, payload["moment"]
    told = {name: value for name, value in payload.items() if name != "histories" or moment == "on_train_end"}
    line = _strict(told, "", bad)
    text = json.dumps(line | dict(nonfinite=list(bad)), allow_nan=False) + "\n"
    _append(_events(run_dir), text, sync=moment != "on_epoch_end")


def _strict(value, name, bad):
    """Return plain Python that strict JSON can hold; `bad` gets the names of what is not finite, in order."""
    if isinstance(value, dict):
        return {key: _strict(inner, key, bad) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner, name, bad) for inner in value]
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    if isinstance(value, float) and not math.isfinite(value):
        bad[name] = True
        return None
    return value


def append_scalars_csv(
    run_dir, *, epoch, split, train_loss, val_loss, metrics, epoch_time_s, throughput, max_memory_mib
):
    """Add one row; metrics {name: number} are the columns metric_<name>. None, NaN and infinity are empty cells.

    A metric that was not there before makes the table new under all names. Raises DataError if it can't be written.
    """
    path = _scalars(run_dir)
    numbers = epoch, split, train_loss, val_loss, epoch_time_s, throughput, max_memory_mib
    row = dict(zip(COLUMNS, numbers, strict=True)) | {f"metric_{name}": value for name, value in metrics.items()}
    row = {name: _cell(value) for name, value in row.items()}
    header = _header(path)
    if row.keys() <= set(header):
        return _append(path, _table([row], header, False))
    header = COLUMNS + sorted({*header, *row} - {*COLUMNS})
    _replace(path, _table([*read_scalars(run_dir), row], header, True))


def _cell(value):
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.8g}" if math.isfinite(value) else ""


def _header(path):
    """The columns of a table; [] without a whole first line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            line = file.readline()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return line.strip().split(",") if line.endswith("\n") else []


def _table(rows, header, with_header):
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_events(run_dir):
    """Return the events of a run as dicts, oldest first, without a torn last line; [] for none."""
    events = []
    for line in _whole_lines(_events(run_dir)).splitlines():
        try:
            events.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # bytes that a disk lost
            continue
    return events


def read_scalars(run_dir):
    """Return the rows of the table as dicts of texts, without a torn last line; [] for none."""
    return list(csv.DictReader(io.StringIO(_whole_lines(_scalars(run_dir)))))


def read_histories(run_dir):
    """Return {name: [value of epoch 0, 1, ...]} rebuilt from the events; None where an epoch lacks the value.

    Names are train_loss, val_loss, epoch_time_s, throughput and those of the metrics. An epoch that was repeated counts
    as it was the last time.
    """
    epochs = {event["epoch"]: event for event in read_events(run_dir) if event.get("moment") == "on_epoch_end"}
    rows = [epochs.get(epoch, {}) for epoch in range(max(epochs, default=-1) + 1)]
    names = {name: True for row in rows for name in row.get("metrics", {})}
    own = "train_loss", "val_loss", "epoch_time_s", "throughput"
    histories = {name: [row.get(name) for row in rows] for name in own}
    return histories | {name: [row.get("metrics", {}).get(name) for row in rows] for name in names}


def best_val_loss(run_dir):
    """Return the lowest validation loss in the events of a run; None without one."""
    return min((loss for loss in read_histories(run_dir)["val_loss"] if loss is not None), default=None)


def rewind(run_dir, epoch):
    """Drop what a run that goes on will write again: epochs from `epoch` on, and the end. Interruptions stay."""

    def kept(event):
        moment = event.get("moment")
        return moment not in MOMENTS[2:5] or moment == "on_epoch_end" and event["epoch"] < epoch

    if _events(run_dir).exists():
        lines = [json.dumps(event, allow_nan=False) + "\n" for event in read_events(run_dir) if kept(event)]
        _replace(_events(run_dir), "".join(lines))
    rows = [row for row in read_scalars(run_dir) if row["split"] != "test" and int(row["epoch"]) < epoch]
    path = _scalars(run_dir)
    if header := _header(path):
        _replace(path, _table(rows, header, True))


def _events(run_dir):
    return Path(run_dir, "facts", "events.jsonl")


def _scalars(run_dir):
    return Path(run_dir, "facts", "scalars.csv")


def _whole_lines(path):
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")


def _append(path, text, sync=False):
    """Add whole lines behind the last whole line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":  # a process was killed, or a disk full, while it wrote
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as e:
        raise DataError(f"{path} was not written: {e.strerror or e}") from e


def _replace(path, text):
    write_atomic(path, lambda file: file.write(text.encode()))
