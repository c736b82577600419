"""Tasks in other processes: when one process dies, the others end too, whatever they were doing."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from data_utils.errors import DataError
from data_utils.formulas import dataset as sr_data
from data_utils.workers import in_order

# kills new processes of multiprocessing before they read their task
DEAD = "import os, sys\nif '--multiprocessing-fork' in sys.orig_argv: os._exit(3)\n"


def die_or_answer_at_length(task):
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)  # until nobody reads answers any more
    return bytes(2**22)  # more than a pipe holds


def test_a_process_that_dies_ends_those_that_write():
    others = multiprocessing.active_children()
    with pytest.raises(DataError, match="a worker process died"):
        list(in_order(die_or_answer_at_length, range(4), 2))
    assert set(multiprocessing.active_children()) <= set(others)


@pytest.fixture
def stillborn(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(DEAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_processes_that_die_at_their_start_are_reported(stillborn):
    with pytest.raises(DataError, match="a worker process died"):
        list(in_order(abs, range(4), 2))
    context, settings = multiprocessing.get_context("spawn"), dict(large=bytes(2**22))  # more than a pipe holds
    worker = sr_data._begin(context, settings, 0, 1, 0, 1)
    with pytest.raises(DataError, match="data worker .* died with status 3"):
        sr_data._take(*worker)


def test_processes_that_cannot_start_are_reported(monkeypatch):
    def start(process):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start)
    with pytest.raises(DataError, match="a worker process can't start: .*\nfix: "):
        list(in_order(abs, range(4), 2))
    with pytest.raises(DataError, match="data worker .* can't start: .*\ntry: --num_workers 0"):
        sr_data._begin(multiprocessing.get_context("spawn"), {}, 0, 1, 0, 1)


def put_half(given, ready, *_):
    """Write a message whose end never comes."""
    os.write(ready._writer.fileno(), (2**20).to_bytes(4, "big") + bytes(1000))
    os._exit(9)


def test_a_process_that_dies_while_it_writes_is_reported(monkeypatch):
    monkeypatch.setattr(sr_data, "_work", put_half)
    worker = sr_data._begin(multiprocessing.get_context("spawn"), {}, 0, 1, 0, 1)
    with pytest.raises(DataError, match="data worker .* died with status 9"):
        sr_data._take(*worker)
