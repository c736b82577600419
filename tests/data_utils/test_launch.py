"""Environments that a run refuses, and how its threads wait."""

import errno
import sys
from types import SimpleNamespace

import pytest

from data_utils import launch
from data_utils.errors import UsageError
from data_utils.launch import check_torchrun, share_cores

TORCHRUN = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.fixture
def no_policy(monkeypatch):
    """Remove every policy of waiting threads from the environment, and torch from the modules."""
    for name in launch.WAITING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 4)
    return monkeypatch


def test_a_world_size_left_over_from_another_job_is_refused(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="RANK.*not set.*\ntry: unset WORLD_SIZE"):
        check_torchrun("cpu")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cuda:1.*one GPU\ntry: --device cuda"):
        check_torchrun("cuda:1")


def test_a_file_that_the_machine_refuses_is_named_without_a_traceback(capsys):
    def run(error):
        def main(cfg):
            raise error

        launch.launch(main, SimpleNamespace())

    with pytest.raises(SystemExit) as end:
        run(PermissionError(errno.EACCES, "Permission denied", "a.txt"))
    assert end.value.code == 1 and capsys.readouterr().err == "error: a.txt: Permission denied\n"
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), OSError(errno.EIO, "no name")):
        with pytest.raises(type(error)):  # a fault of ours, and one that names no file
            run(error)


@pytest.mark.parametrize("threads, others, count", [("", 0, "10000"), ("", 1, "1000"), ("2", 1, "10000"),
                                                    ("2,1", 3, "1000")])  # fmt: skip
def test_threads_spin_less_where_others_want_the_cores(no_policy, threads, others, count):
    no_policy.setenv("OMP_NUM_THREADS", threads)
    no_policy.setattr(launch, "others_running", lambda: others)
    share_cores()
    assert launch.os.environ["GOMP_SPINCOUNT"] == count


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5"), ("KMP_BLOCKTIME", "0")]
)
def test_a_policy_that_the_user_set_stays(no_policy, name, value):
    no_policy.setenv(name, value)
    no_policy.setattr(launch, "others_running", lambda: 9)
    share_cores()
    assert {n: launch.os.environ[n] for n in launch.WAITING if n in launch.os.environ} == {name: value}


def test_other_threads_are_counted_with_and_without_proc(monkeypatch):
    assert launch.others_running(samples=2, seconds=0) >= 0
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(launch.os, "getloadavg", lambda: (1.5, 0, 0))
    assert launch.others_running(samples=1, seconds=0) == 1.5
