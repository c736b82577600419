"""Interrupted and resumed equals uninterrupted, bit for bit."""

import json
import random
import signal
import time

import pytest
import torch

from data_utils.checkpoint import load_checkpoint
from tests.helpers import finish, start, train_flags

VOLATILE = {"seconds", "tokens_per_s", "peak_mb"}  # of a row of metrics
ENDS = dict(transformer=["SIGKILL", "SIGTERM"], state_space=["SIGKILL", "SIGINT"], diffuser=["SIGKILL", "SIGTERM"],
            mla_store=["SIGKILL", "SIGINT"])  # fmt: skip
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


@pytest.mark.parametrize("expert", ENDS)
def test_interrupted_and_resumed_equals_uninterrupted(expert, toy, experts, tmp_path):
    whole = run(expert, toy, experts, tmp_path / "whole")
    cut = {end: run(expert, toy, experts, tmp_path / end) for end in ENDS[expert]}
    for end, process in cut.items():
        while not (tmp_path / end / f"{stem(expert)}_interrupted.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(expert + end).random() * 0.2)
        process.send_signal(getattr(signal, end))
    finish(whole)
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
