"""A sweep outlives its jobs, its jobs outlive it, and none of them is run twice."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import finish, launch

SCRIPT = """
import atexit, os, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from data_utils.config import from_cli
from data_utils.launch import launch
from data_utils.events.facts import append_jsonl_event, build_event_payload
from data_utils.overrides import Overrides
from data_utils.stop import Stop

@dataclass
class Config:
    loop: Literal["toy"] = "toy"  # .
    name: str = "experiment"  # .
    out: str = ""  # .
    outputs: str = "outputs"  # .
    env: str = ""  # .
    config: str = ""  # .
    resume: str = "auto"  # .
    size: int = 1  # .
    do: Literal["end", "crash", "wait"] = "end"  # .
    multirun: bool = False  # .
    fail_fast: bool = False  # .
    sweep_job: int = -1  # .

table = Overrides(prefixes=("phase1.",), aliases={}, ignored=(), folder=".", bundles=dict(env="env"), snapshot="none")
cfg = from_cli(dict(toy=Config), "", by="loop", overrides=table)
if cfg.multirun:
    from data_utils.events.sweep import sweep
    atexit.register(lambda: print("torch:", "torch" in sys.modules))
    launch(sweep, cfg)

def main(cfg):
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "starts", "a") as file:
        print(cfg.resume, cfg.sweep_job, os.getpid(), file=file)
    for epoch in range(3):
        loss = cfg.size + 1 / (epoch + 1)
        append_jsonl_event(out, build_event_payload(moment="on_epoch_end", run_dir=out, epoch=epoch, val_loss=loss))
    mended = Path(cfg.outputs, "mended").exists()
    if cfg.do == "crash" and not mended:
        for i in range(9):
            print("line", i)
        raise KeyError("broken")
    with Stop() as stop:
        while cfg.do == "wait" and not mended and not stop:
            time.sleep(0.01)
    return dict(stopped=stop.signal)

launch(main, cfg)
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    return tmp_path


def start(toy, *words):
    return launch([sys.executable, "toy.py", *map(str, words)], cwd=toy)


def content(toy):
    (path,) = toy.glob("outputs/multiruns/*/sweep.yaml")
    return path.parent, yaml.safe_load(path.read_text())["jobs"]


def starts(toy, row):
    return [line.split() for line in (toy / row["run_dir"] / "starts").read_text().splitlines()]


def waiting_job(toy):
    """Wait for a job that waits; return its process number."""
    for _ in range(2000):
        for path in toy.glob("outputs/runs/*/starts"):
            if path.read_text().endswith("\n") and (path.parent / "facts" / "events.jsonl").exists():
                time.sleep(0.2)  # for its signal handlers
                return int(path.read_text().split()[-1])
        time.sleep(0.01)
    raise AssertionError("no job started")


def test_all_jobs_in_order_then_nothing_is_left(toy):
    out, _ = finish(start(toy, "--multirun", "size=3,2", "phase1.loop=toy", "name=two", "--resume", "none"))
    folder, rows = content(toy)
    assert re.fullmatch(r"exp_\d{8}-\d{6}_two", folder.name)
    assert [row["run_dir"] for row in rows] == [f"outputs/runs/run_{folder.name[4:]}_job{i}" for i in range(2)]
    assert [(row["status"], row["exit_code"], round(row["best_val_loss"], 3)) for row in rows] == [
        ("done", 0, 3.333), ("done", 0, 2.333)
    ]  # fmt: skip
    assert [row["overrides"][0] for row in rows] == ["size=3", "size=2"] and all(row["seconds"] > 0 for row in rows)
    assert [starts(toy, row)[0][:2] for row in rows] == [["auto", "0"], ["auto", "1"]]
    assert "torch: False" in out and "2 of 2 jobs done, best val_loss 2.3333 of size=2" in out
    out, _ = finish(start(toy, f"resume={folder}"))
    assert "2 of 2 jobs done" in out and all(len(starts(toy, row)) == 1 for row in rows)


def test_a_job_that_fails_is_shown_and_the_others_run(toy):
    _, err = finish(start(toy, "-m", "do=end,crash", "size=1,2"), 1)
    folder, rows = content(toy)
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert [row["exit_code"] for row in rows] == [0, 0, 1, 1] and rows[2]["best_val_loss"] is not None
    tail = err.split("its last lines:\n")[1].split("\njob")[0].splitlines()
    assert len([line for line in tail if line]) == 5 and "KeyError: 'broken'" in tail
    assert f"job 2, 3 of {folder.relative_to(toy)} did not finish" in err and "resume=" in err
    (toy / "outputs" / "mended").touch()
    out, _ = finish(start(toy, f"resume={folder}"))
    _, rows = content(toy)
    assert [row["status"] for row in rows] == ["done"] * 4
    assert [[words[:2] for words in starts(toy, row)] for row in rows[1:3]] == [[["auto", "1"]], [["auto", "2"]] * 2]


def test_fail_fast_ends_the_sweep(toy):
    finish(start(toy, "-m", "do=crash,end", "fail_fast=true"), 1)
    assert [row["status"] for row in content(toy)[1]] == ["failed", "waiting"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_job_and_sweep_and_both_go_on(toy, number):
    process = start(toy, "-m", "do=wait", "size=1,2")
    job = waiting_job(toy)
    process.send_signal(number)
    finish(process, 128 + number)
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
    folder, rows = content(toy)
    assert [row["status"] for row in rows] == ["interrupted", "waiting"] and rows[0]["exit_code"] == 128 + number
    (toy / "outputs" / "mended").touch()
    out, _ = finish(start(toy, f"resume={folder}", "size=5"))
    assert "goes on in" in out and [row["status"] for row in content(toy)[1]] == ["done", "done"]
    assert {round(row["best_val_loss"], 3) for row in content(toy)[1]} == {5.333}


def test_a_sweep_that_was_killed_takes_its_running_job_for_interrupted(toy):
    process = start(toy, "-m", "do=wait", "size=1,2")
    job = waiting_job(toy)
    process.kill()
    process.communicate()
    os.kill(job, signal.SIGKILL)  # it lives on without its sweep
    folder, rows = content(toy)
    assert [row["status"] for row in rows] == ["running", "waiting"]
    (toy / "outputs" / "mended").touch()
    finish(start(toy, f"resume={folder}"))
    assert [row["status"] for row in content(toy)[1]] == ["done", "done"]


def test_a_sweep_goes_on_from_another_folder(toy):
    finish(start(toy, "-m", "do=crash", "outputs=outputs"), 1)
    folder, (row,) = content(toy)
    (toy / "outputs" / "mended").touch()
    (folder.parent / "outputs").mkdir()
    (folder.parent / "outputs" / "mended").touch()
    out, _ = finish(launch([sys.executable, str(toy / "toy.py"), f"resume={folder.name}"], cwd=folder.parent))
    assert "1 of 1 jobs done" in out and len(starts(toy, row)) == 2


def test_a_job_that_is_killed_counts_as_failed(toy):
    process = start(toy, "-m", "do=wait,end")
    os.kill(waiting_job(toy), signal.SIGKILL)
    finish(process, 1)
    assert [(row["status"], row["exit_code"]) for row in content(toy)[1]] == [("failed", 137), ("done", 0)]


def test_one_sweep_at_a_time(toy):
    process = start(toy, "-m", "do=wait")
    waiting_job(toy)
    _, err = finish(start(toy, f"resume={content(toy)[0]}"), 2)
    assert "in use by process" in err and content(toy)[1][0]["status"] == "running"
    process.terminate()
    finish(process, 143)


@pytest.mark.parametrize(
    "words, message",
    [
        (["size=1,x"], "invalid int value"),
        (["size=1", "size=2"], "2 times"),
        (["size=1,2", "out=a"], "outputs=FOLDER"),
        (["size=1,2", "name=a/b"], "name=a/b"),
    ],
)
def test_all_is_checked_before_anything_is_there(toy, words, message):
    _, err = finish(start(toy, "--multirun", *words), 2)
    assert message in err and not Path(toy, "outputs").exists()


def test_what_is_no_sweep_file(toy):
    (toy / "a").mkdir()
    for text in ("jobs: 3", "jobs: [1]", "[", "jobs: [{status: done}]"):
        (toy / "a" / "sweep.yaml").write_text(text)
        assert "sweep.yaml" in finish(start(toy, "resume=a"), 2)[1]
