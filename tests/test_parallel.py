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


def test_a_restarted_group_does_not_meet_the_one_before(toy, tmp_path):
    """torchrun --max-restarts keeps its store, and in it the addresses of ranks that are gone."""
    script, *flags = train_flags("transformer", toy, tmp_path)
    flags += [f"--checkpoint_dir={tmp_path}", "--resume=auto"]
    first = start_two(script, *flags, "--max_steps=2")
    for process in first:
        finish(process)
    told = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(first[0].store.port))
    told |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="1")
    second = [start(script, *flags, "--max_steps=3", RANK=str(r), LOCAL_RANK=str(r), **told) for r in range(2)]
    out, _ = [finish(process) for process in second][0]
    assert "resumed" in out and "step 3 of 3" in out
