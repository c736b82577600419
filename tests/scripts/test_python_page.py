"""Every block of code in docs/python.md runs, with small models in the places that the page names."""

import re
import runpy
import shutil

import pytest

from tests.helpers import ROOT

OLD = ROOT / "tests" / "old_checkpoints"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)
PLACES = {  # small models: where the page has them
    "text/transformer_expert_interrupted.pt": "checkpoints/transformer_expert.pt",
    "text/nanothink_mla_interrupted.pt": "checkpoints/nanothink_mla.pt",
    "hrm": "runs/addition",
    "formulas/checkpoint_4": "models/ansr-models/sr-cpu",
    "events": "outputs/runs/run_a",
    "pages": "checkpoints/multimodal-sudoku4",
}
SMALLER = {"max_steps=100": "max_steps=1, d_model=16, n_heads=2, max_seq_len=16, batch_size=4, device='cpu'",
           "max_seconds=20": "max_seconds=0.5"}  # fmt: skip


def test_all_six_are_there():
    loads = [line for block in BLOCKS for line in block.splitlines() if " load(" in line or "= load(" in line]
    assert len(loads) == 6  # text twice: an expert and the router


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs(block, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy, "data/toy")
    for source, place in PLACES.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (OLD / source).is_dir() else shutil.copy
        copy(OLD / source, place)
    (tmp_path / "checkpoints" / "transformer_expert_metrics.jsonl").write_text(
        '{"step": 1, "split": "val", "loss": 2.0}\n'
    )
    sweep = tmp_path / "outputs" / "multiruns" / "exp_20251103-140953_experiment"
    sweep.mkdir(parents=True)
    (sweep / "summary.csv").write_text("overrides,best_val_loss,seconds\nlr=1,2.0,3\n")
    for words, fewer in SMALLER.items():
        block = block.replace(words, fewer)
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    runpy.run_path(str(tmp_path / "block.py"))
