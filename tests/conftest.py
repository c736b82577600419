"""Fixtures that several test files share: toy data, and experts trained on it for a few steps."""

import signal

import pytest
from matplotlib.figure import Figure

from data_utils.workers import cores
from tests.helpers import SIZES, finish, start, train_flags
from tests.warm import leave_blank

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored, and its children
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and with this one what nohup starts
DRAWING = leave_blank()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return cores()  # psutil counts neither the second thread of a core nor what others were given


LONGEST = ("test_simulated_device", "checks_of_scikit_learn", "test_train_sr.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))  # else one is left with them


@pytest.fixture
def full_pictures(monkeypatch):
    """Pictures are drawn, as no other test needs them."""
    for name, method in DRAWING.items():
        monkeypatch.setattr(Figure, name, method)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with five tiny domains."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    finish(start("prepare_data.py", "expert", "--toy", "--data_dir", folder))
    return folder


@pytest.fixture(scope="session")
def experts(toy, tmp_path_factory):
    """A checkpoint folder with the three experts, a few steps old, transformer first."""
    folder = tmp_path_factory.mktemp("experts")
    for expert in SIZES:
        finish(start(*train_flags(expert, toy, folder), f"--checkpoint_dir={folder}", "--steps=12", "--warmup_steps=1"))
    return folder
