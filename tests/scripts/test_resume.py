"""Interrupted and resumed equals uninterrupted, bit for bit."""

import json
import random
import signal
import time

import pytest
import torch

from data_utils.checkpoint import load_checkpoint
from tests.helpers import finish, slow, start, train_flags

VOLATILE = {"seconds", "tokens_per_s", "peak_mb"}  # of a row of metrics
ENDS = dict(transformer=["SIGKILL", "SIGTERM"], mla_store=["SIGINT"], state_space=["SIGKILL", "SIGINT"],
            diffuser=["SIGKILL", "SIGTERM"])  # fmt: skip
STATUS = dict(SIGKILL=-9, SIGTERM=143, SIGINT=130)


def run(name, toy, experts, folder, *flags):
    """A run of 60 steps in three epochs, each step of two micro-batches, that saves about every 20 ms."""
    return start(
        *train_flags(name, toy, experts), f"--checkpoint_dir={folder}", "--max_steps=60", "--batch_size=16",
        "--domains", "code", "general", "--grad_accum_steps=2", "--save_every=2", "--save_minutes=0.0003", *flags,
    )  # fmt: skip


def stem(name):
    return "nanothink_mla" if name.startswith("mla") else f"{name}_expert"


def results(name, folder):
    """All tensors of the checkpoints that a run leaves, and its metrics without what a clock measures."""
    paths = sorted(folder.glob(f"{stem(name)}*.pt"))
    states = {p.name: load_checkpoint(p, f"expert:{name.removesuffix('_store')}") for p in paths}
    lines = (folder / f"{stem(name)}_metrics.jsonl").read_text().splitlines()[1:]
    return states, [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"config"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("expert", ["transformer", slow("mla_store"), slow("state_space"), slow("diffuser")])
def test_interrupted_and_resumed_equals_uninterrupted(expert, toy, experts, tmp_path):
    uninterrupted = run(expert, toy, experts, tmp_path / "whole")
    cut = {end: run(expert, toy, experts, tmp_path / end) for end in ENDS[expert]}
    for end, process in cut.items():
        while not (tmp_path / end / f"{stem(expert)}_interrupted.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(expert + end).random() * 0.2)
        process.send_signal(getattr(signal, end))
    finish(uninterrupted)
    expected = results(expert, tmp_path / "whole")
    assert f"{stem(expert)}.pt" in expected[0] and len(expected[0]) >= 3
    for end, process in cut.items():
        _, err = process.communicate()
        assert process.returncode == STATUS[end], err
    again = {end: run(expert, toy, experts, tmp_path / end, "--resume") for end in ENDS[expert]}
    for end, process in again.items():
        out, _ = finish(process)
        assert "resumed" in out and "exact resume is lost" not in out
        assert_same(results(expert, tmp_path / end), expected)
        assert not list((tmp_path / end).glob("*.tmp-*"))


@pytest.mark.parametrize("expert", ["transformer", slow("mla_store")])
def test_a_budget_that_is_raised_changes_no_step(expert, toy, experts, tmp_path):
    """--max_steps stops early on the same schedule, so that the rest is what one command would have done."""
    flags = ["--steps=40", "--warmup_steps=10"]
    one = run(expert, toy, experts, tmp_path / "one", *flags, "--max_steps=0")
    finish(run(expert, toy, experts, tmp_path / "two", *flags, "--max_steps=13"))
    out, _ = finish(run(expert, toy, experts, tmp_path / "two", *flags, "--max_steps=13", "--resume"))
    assert "finished at step 13" in out and "a larger --max_steps goes on" in out
    out, _ = finish(run(expert, toy, experts, tmp_path / "two", *flags, "--max_steps=99", "--resume"))
    assert "resumed" in out and "exact resume is lost" not in out and "step 40 of 40" in out
    finish(one)
    (states, rows), (expected, expected_rows) = results(expert, tmp_path / "two"), results(expert, tmp_path / "one")
    last, expected_last = (next(s for s in each.values() if s["step"] == 40) for each in (states, expected))
    for part in ("model_state", "optimizer_state"):
        assert_same(last[part], expected_last[part])
    trained, expected_trained = ([row for row in each if row["split"] == "train"] for each in (rows, expected_rows))
    assert trained == expected_trained and trained[0]["lr"] == pytest.approx(3e-3)


def test_a_warmup_of_more_than_a_tenth_of_the_schedule_is_cut_aloud(toy, experts, tmp_path):
    out, _ = finish(run("transformer", toy, experts, tmp_path, "--max_steps=0", "--steps=4", "--log_interval=1"))
    assert "warmup cut from 1000 to 1 steps, a tenth of the schedule" in out
    rates = [row["lr"] for row in results("transformer", tmp_path)[1] if row["split"] == "train"]
    assert rates[:2] == pytest.approx([3e-3, 3e-3]) and rates[2] < rates[1]


def test_order_of_candidates_and_rewinding(toy, experts, tmp_path):
    def train(*flags, status=0):
        return finish(run("transformer", toy, experts, tmp_path, "--max_steps=0", "--save_every=1", *flags), status)

    train("--max_epochs=4")
    names = {p.name for p in tmp_path.glob("*.pt")}
    assert names == {"transformer_expert.pt", *(f"transformer_expert_epoch{n}.pt" for n in (1, 2, 3, 4))}
    (tmp_path / "transformer_expert_epoch4.pt").write_bytes(b"cut")
    out, err = train("--max_epochs=4", "--resume")
    assert "epoch4.pt can't be read" in err and "epoch3.pt at step" in out
    train("--max_epochs=4", "--resume", tmp_path / "transformer_expert_epoch1.pt", "--max_steps=1")
    assert not (tmp_path / "transformer_expert_epoch3.pt").exists()
    assert (tmp_path / "transformer_expert_epoch3.pt.bak").exists()
    out, _ = train("--max_epochs=1", "--resume")
    assert "finished" in out
    _, err = train("--max_epochs=1")
    assert "transformer_expert.pt.bak" in err
    _, err = train("--resume", tmp_path / "transformer_expert_epoch9.pt", status=2)
    assert "no such file" in err and "transformer_expert.pt" in err
