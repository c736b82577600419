"""Two processes equal one with twice the micro-batches, and one goes on for two: pytest tests/test_parallel.py"""

import pytest
import torch
from conftest import finish, start, start_two, torchrun, train_flags

from data_utils.checkpoint import load_checkpoint


@pytest.mark.parametrize("expert", ["transformer", "state_space", "mla_store"])
def test_two_ranks_equal_one(expert, toy, experts, tmp_path):
    script, *common = train_flags(expert, toy, experts)
    common += ["--no-use_amp", *("--entropy_reg=0 --balance_reg=0 --z_reg=0".split() if "mla" in expert else ())]

    def one(folder, *flags):
        return start(script, *common, f"--checkpoint_dir={folder}", "--grad_accum_steps=2", *flags)

    single = one(tmp_path / "one", "--max_steps=12")
    flags = [script, *common, f"--checkpoint_dir={tmp_path / 'two'}", "--max_steps=12"]
    for process in [single, *([torchrun(*flags)] if expert == "transformer" else start_two(*flags))]:
        finish(process)
    name, kind = ("nanothink_mla", "mla") if "mla" in expert else (f"{expert}_expert", expert)
    states = [load_checkpoint(tmp_path / n / f"{name}.pt", f"expert:{kind}") for n in ("one", "two")]
    assert states[0]["best_val_loss"] == pytest.approx(states[1]["best_val_loss"], abs=1e-5)
    for key, weight in states[0]["model_state"].items():
        torch.testing.assert_close(weight, states[1]["model_state"][key], rtol=0, atol=1e-5)
    out, _ = finish(one(tmp_path / "two", "--max_steps=16", "--resume"))
    assert "world_size 2 -> 1" in out and "resumed" in out
