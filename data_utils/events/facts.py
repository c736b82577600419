"""Write and read the facts of a run of train_ae.py: facts/events.jsonl and facts/scalars.csv in its folder.

Other programs may read at any time, and the run may be killed at any time. So an event is one line. Readers ignore a
torn last line, and the next writer cuts it. A table whose columns change is rewritten atomically.
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
    """Return one event as a dict. An argument that is not given is None in it, which means unknown.

    moment: one of MOMENTS. run_dir: a path, written relative to the working directory where it lies below that.
    epoch, step: int, counted from 0. split: train, val or test. train_loss, val_loss: float. metrics: {name: number}.
    epoch_time_s, total_time_s: seconds. throughput: events per second in training. max_memory_mib: MiB. histories:
    {name: list of one float or None per epoch}; figures get them at every moment, the file only at on_train_end.
    error, traceback: text, of on_exception only. cfg (its seed, loop and sweep_job) and run_id go into `meta`, beside
    time, host, commit and GPU. Numbers may be scalars of numpy or torch. Raises ValueError for an unknown moment.
    """
    if moment not in MOMENTS:
        raise ValueError(f"moment {moment}: expected one of {', '.join(MOMENTS)}")
    folder = Path(run_dir).resolve()
    payload = dict(
        schema_version=SCHEMA_VERSION,
        moment=moment,
        epoch=epoch,
        step=step,
        split=split,
        train_loss=train_loss,
        run_dir=folder.relative_to(Path.cwd()).as_posix() if folder.is_relative_to(Path.cwd()) else str(folder),
        val_loss=val_loss,
        metrics=dict(metrics or {}),
        epoch_time_s=epoch_time_s,
        total_time_s=total_time_s,
        throughput=throughput,
        max_memory_mib=max_memory_mib,
        histories=histories,
        meta=_meta(cfg, run_id),
    )
    if moment == "on_exception":
        payload |= dict(error=error, traceback=traceback)
    return payload


def _meta(cfg, run_id):
    torch = sys.modules.get("torch")  # a program without torch has no GPU either
    cuda = dict(available=False, device_count=0, current_device=None, device_name=None)
    if torch and torch.cuda.is_available():
        number = torch.cuda.current_device()
        cuda = dict(available=True, device_count=torch.cuda.device_count(), current_device=number)
        cuda["device_name"] = torch.cuda.get_device_name(number)
    return dict(
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        run_id=run_id,
        git_commit=commit(),
        hostname=platform.node(),
        cuda_info=cuda,
        seed=getattr(cfg, "seed", None),
        loop=getattr(cfg, "loop", None),
        job=getattr(cfg, "sweep_job", None),
    )


def append_jsonl_event(run_dir, payload):
    """Append one event as a line of strict JSON; on return it is in the file, and on the disk unless an epoch's.

    NaN and infinity become null, and `nonfinite` lists their names. Raises DataError if it can't be written.
    """
    nonfinite, moment = {}, payload["moment"]
    event = {name: value for name, value in payload.items() if name != "histories" or moment == "on_train_end"}
    line = _strict(event, "", nonfinite)
    text = json.dumps(line | dict(nonfinite=list(nonfinite)), allow_nan=False) + "\n"
    _append(_events(run_dir), text, sync=moment != "on_epoch_end")


def _strict(value, name, nonfinite):
    """Return plain Python that strict JSON can hold; add the names of values that are not finite to `nonfinite`."""
    if isinstance(value, dict):
        return {key: _strict(inner, key, nonfinite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner, name, nonfinite) for inner in value]
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = True
        return None
    return value


def append_scalars_csv(
    run_dir, *, epoch, split, train_loss, val_loss, metrics, epoch_time_s, throughput, max_memory_mib
):
    """Append one row; metrics {name: number} are the columns metric_<name>. None, NaN and infinity are empty cells.

    The first row with a new metric rewrites the table with all columns. Raises DataError if it can't be written.
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
    """Return the columns of a table; [] without a complete first line."""
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
    for line in _complete_lines(_events(run_dir)).splitlines():
        try:
            events.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # bytes that a disk lost
            continue
    return events


def read_scalars(run_dir):
    """Return the rows of the table as dicts of texts, without a torn last line; [] for none."""
    return list(csv.DictReader(io.StringIO(_complete_lines(_scalars(run_dir)))))


def read_histories(run_dir):
    """Rebuild {name: [value of epoch 0, 1, ...]} from the events; None where an epoch lacks the value.

    Names are train_loss, val_loss, epoch_time_s, throughput and those of the metrics. The last event of a repeated
    epoch counts.
    """
    epochs = {event["epoch"]: event for event in read_events(run_dir) if event.get("moment") == "on_epoch_end"}
    rows = [epochs.get(epoch, {}) for epoch in range(max(epochs, default=-1) + 1)]
    names = {name: True for row in rows for name in row.get("metrics", {})}
    fields = "train_loss", "val_loss", "epoch_time_s", "throughput"
    histories = {name: [row.get(name) for row in rows] for name in fields}
    return histories | {name: [row.get("metrics", {}).get(name) for row in rows] for name in names}


def best_val_loss(run_dir):
    """Return the lowest validation loss in the events of a run; None without one."""
    return min((loss for loss in read_histories(run_dir)["val_loss"] if loss is not None), default=None)


def rewind(run_dir, epoch):
    """Drop facts that a resumed run writes again: epochs from `epoch` on, and the end. Interruptions stay."""

    def stays(event):
        moment = event.get("moment")
        return moment not in MOMENTS[2:5] or moment == "on_epoch_end" and event["epoch"] < epoch

    if _events(run_dir).exists():
        lines = [json.dumps(event, allow_nan=False) + "\n" for event in read_events(run_dir) if stays(event)]
        _replace(_events(run_dir), "".join(lines))
    rows = [row for row in read_scalars(run_dir) if row["split"] != "test" and int(row["epoch"]) < epoch]
    path = _scalars(run_dir)
    if header := _header(path):
        _replace(path, _table(rows, header, True))


def _events(run_dir):
    return Path(run_dir, "facts", "events.jsonl")


def _scalars(run_dir):
    return Path(run_dir, "facts", "scalars.csv")


def _complete_lines(path):
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")


def _append(path, text, sync=False):
    """Append complete lines behind the last complete line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":  # the process was killed, or the disk full, during a write
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
