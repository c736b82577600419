"""On several threads a run is the same each time, and a resumed one equals it."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from models.trm import RELATION_SCALE, Core, boxes
from tests.helpers import ROOT, environment, finish, start
from tests.scripts.threads import CASES, Repeats

LANGUAGE = ["transformer", "state_space", "diffuser", "mla"]  # which build on each other
OTHERS = [name for name in CASES if name not in LANGUAGE]


@pytest.mark.slow
@pytest.mark.parametrize("names", [LANGUAGE, OTHERS], ids=["language", "others"])
def test_runs_on_several_threads_equal_resumed_ones(names, toy, tmp_path):
    (tmp_path / "data").symlink_to(toy)
    sizes = "--size=6 --givens=24 --train=48 --val=8".split()
    puzzles = start("prepare_data.py", "sudoku", f"--out={tmp_path}/puzzles", *sizes) if "puzzles" in names else None
    if puzzles:
        finish(puzzles)
    # threads that wait passively: on a busy machine spinning ones take ten times as long
    env = environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
    words = [sys.executable, ROOT / "tests" / "scripts" / "threads.py", ",".join(names), tmp_path, "2,4"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / f"{names[0]}.json").read_text())
    assert list(report) == names
    for name, result in report.items():
        assert result["compared"] > 100 and not result["differ"] and not result["repeats"], (name, result)


def test_what_adds_in_the_order_of_threads_is_noticed():
    table, index = torch.randn(5, 3, requires_grad=True), torch.tensor([1, 4, 1])

    def names(read):
        with Repeats() as repeats:
            read().sum().backward()
        return repeats.names

    assert names(lambda: table[index]) and names(lambda: table.take(index))
    assert not names(lambda: table[index[:2]]) and not names(lambda: table[table > 0])
    assert not names(lambda: F.embedding(index, table)) and not names(lambda: table.index_select(0, index))


def test_a_table_read_in_order_has_the_gradient_of_an_index():
    """Bit for bit, on one thread: F.embedding in models/diffuser.py, gather in models/trm.py."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    k, level = torch.randint(101, (16, 64)), torch.randn(101, 96)
    core = Core(d_model=8, n_heads=4, core="recursive", core_layers=2, share=True, h_cycles=1, l_steps=1, grad="bptt",
                ffn_dim=8, relation=boxes(16, 4), mixer="attention", norm="post", length=None,
                recompute=False)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        table, weight = level.to(dtype).requires_grad_(), torch.randn(16, 64, 96, dtype=dtype)
        result, expected = (torch.autograd.grad(x, table, weight)[0] for x in (F.embedding(k, table), table[k]))
        assert torch.equal(result, expected)
    result, expected = core.biases(None), RELATION_SCALE * core.relation[..., core.relation_class]
    weight = torch.randn_like(result)
    assert torch.equal(result, expected)
    gradients = [torch.autograd.grad(x, core.relation, weight)[0] for x in (result, expected)]
    assert torch.equal(*gradients)
    torch.set_num_threads(threads)
