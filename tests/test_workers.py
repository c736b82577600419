"""Tasks done by other processes: when one of them dies, the others end too, whatever they were at."""

import multiprocessing
import os
import signal
import time

import pytest

from data_utils.config import DataError
from data_utils.workers import in_order


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
