"""Two processes, whether each has the weights or half of them, equal one with twice the micro-batches, and each goes on
for the other. test_train_{ae,hrm,multimodal,sr}.py have the two processes of the other scripts.
"""

import importlib

import pytest
import torch

import train_ae
import train_multimodal
from data_utils import distributed
from data_utils.checkpoint import load_checkpoint, read, shared_like, to_plain
from data_utils.config import from_cli
from data_utils.errors import UsageError
from tests.helpers import finish, slow, start, start_two, torchrun, train_flags
from tests.scripts.test_resume import assert_same
from tests.scripts.test_train_hrm import SIZES, results
from tests.scripts.test_train_sr import TINY

HALF, WHOLE = 5, 10  # steps


def begin(way, script, *flags, one=(), two=(), **more):
    """Start a script in one process, or in two (`ddp`), or in two that share the weights (`fsdp`)."""
    if way == "single":
        return [start(script, *flags, *one, **more)]
    return start_two(script, *flags, *two, *["--fsdp"] * (way == "fsdp"), **more)


def finish_all(*runs):
    return [[finish(process) for process in run] for run in runs]


def assert_near(a, b, atol=1e-5):
    """The same names, and tensors that are no further apart."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    "expert, ways",
    [("state_space", ["ddp", "fsdp"]), slow("mla_store", ["ddp"]), slow("diffuser", ["fsdp"])],
)
def test_two_ranks_equal_one(expert, ways, toy, experts, tmp_path):
    """With clipped gradients: the norm of shared ones is summed in another order."""
    script, *common = train_flags(expert, toy, experts)
    common += ["--no-use_amp", *("--entropy_reg=0 --balance_reg=0 --z_reg=0".split() if "mla" in expert else ())]

    def begun(way, folder, *flags):
        more = dict(one=["--grad_accum_steps=4"], two=["--grad_accum_steps=2"])
        return begin(way, script, *common, f"--checkpoint_dir={folder}", *flags, **more)

    finish_all(*(begun(way, tmp_path / way, "--max_steps=8") for way in ("single", *ways)))
    name, kind = ("nanothink_mla", "mla") if "mla" in expert else (f"{expert}_expert", expert)
    one, *others = (load_checkpoint(tmp_path / way / f"{name}.pt", f"expert:{kind}") for way in ("single", *ways))
    for way, two in zip(ways, others, strict=True):
        assert two["best_val_loss"] == pytest.approx(one["best_val_loss"], abs=1e-5)
        assert_near(one["model_state"], two["model_state"])
        (out, _), *_ = finish_all(begun("single", tmp_path / way, "--max_steps=9", "--resume"))[0]
        assert "resumed" in out and "world_size" not in out and "step 9 of 9" in out


@pytest.mark.parametrize("ways", [("single", "fsdp"), slow(("single", "fsdp", "torchrun"))], ids=len)
def test_a_run_moves_between_processes_bit_for_bit(ways, toy, experts, tmp_path):
    """Weights and AdamW after 5 steps of one kind and 5 of another are those after 10 of one process."""
    script, *common = train_flags("transformer", toy, experts)
    common += "--no-use_amp --warmup_steps=1 --min_lr_ratio=1 --grad_clip=0 --n_layers=2 --log_interval=1".split()

    def begun(way, folder, steps, *flags):
        more = [f"--checkpoint_dir={tmp_path / folder}", f"--max_steps={steps}", *flags]
        if way == "torchrun":  # as a user would
            return [torchrun(script, *common, *more)]
        return begin(way, script, *common, *more, one=["--grad_accum_steps=2"])

    first = dict(zip(ways, ways[1:] + ways[:1], strict=True))
    finish_all(begun("single", "straight", WHOLE), *(begun(way, way, HALF) for way in first))
    finish_all(*(begun(second, way, WHOLE, "--resume") for way, second in first.items()))
    straight = load_checkpoint(tmp_path / "straight" / "transformer_expert_interrupted.pt", "expert:transformer")
    for way in first:
        state = load_checkpoint(tmp_path / way / "transformer_expert_interrupted.pt", "expert:transformer")
        assert state["step"] == WHOLE
        assert_same({k: state[k] for k in ("model_state", "optimizer_state")},
                    {k: straight[k] for k in ("model_state", "optimizer_state")}, way)  # fmt: skip


@pytest.mark.slow
def test_shared_weights_of_train_hrm(tmp_path):
    """A decoder's keys, averaged weights, clipped gradients; from shared weights to one process and back."""
    flags = [*SIZES, *"--dataset=synthetic --eval_rows=100 --optimizer=adamw --lr_scheduler=constant".split()]
    flags += "--segments=2 --grad_clip=0.1 --log_steps=1".split()

    def begun(way, name, steps):
        more = [f"--run_name={name}", f"--steps={steps}"]
        return begin(way, "train_hrm.py", *flags, *more, two=["--batch_size=8"], cwd=tmp_path)

    finish_all(begun("single", "straight", 6), begun("fsdp", "moved", 3))
    finish_all(begun("single", "moved", 5))
    finish_all(begun("fsdp", "moved", 6))
    one, two = (load_checkpoint(tmp_path / f"runs/{n}/checkpoints/final.pt", "hrm") for n in ("straight", "moved"))
    for part in ("model_state", "ema"):
        assert_near(one[part], two[part])
    assert two["best_val_loss"] == pytest.approx(one["best_val_loss"], abs=1e-5)
    norms = [[row["grad_norm"] for row in results(tmp_path / "runs" / n)[1] if "grad_norm" in row]
             for n in ("straight", "moved")]  # fmt: skip
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[0]) == 6


@pytest.mark.slow
def test_shared_weights_of_train_sr(tmp_path):
    flags = [*TINY, *"-vi 3 --optimizer=adamw --encoder_n_isab=1 --use_checkpointing --encoder_dropout=0.1".split()]
    flags += "--lr_schedule=0:1e-3".split()

    def begun(way, name, steps, *more):
        more = ["-o", name, f"--steps={steps}", *more]
        return begin(way, "train_sr.py", *flags, *more, one=["--gradient_accumulation_steps=2"], cwd=tmp_path)

    finish_all(begun("single", "straight", 6), begun("fsdp", "moved", 3))
    final, last = (read(tmp_path / "moved" / name / "state_dict.pt") for name in (".", "checkpoint_3"))
    assert_near(final, last, 0)
    finish_all(begun("single", "moved", 6, "--resume-from=auto"))
    one, two = (tmp_path / name / "checkpoint_6" for name in ("straight", "moved"))
    assert_near(read(one / "state_dict.pt"), read(two / "state_dict.pt"))
    slots = [read(path / "optimizer.pt")["state"] for path in (one, two)]
    for i, slot in slots[0].items():
        assert_near(slot, slots[1][i])


@pytest.mark.parametrize("script", ["train_expert", "train_hrm", "train_sr"])
def test_one_process_has_nobody_to_share_with(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(UsageError, match="torchrun --standalone --nproc-per-node 2"):
        module.main(module.Config(fsdp=True, device="cpu"))
    assert not list(tmp_path.iterdir())


SCRIPTS = [
    ("train_mla", "", None),
    ("train_ae", "loop", train_ae.GUIDE),
    ("train_multimodal", "arch", train_multimodal.PICTURES),
]


@pytest.mark.parametrize("script, by, overrides", SCRIPTS)
def test_scripts_without_shared_weights_say_so(script, by, overrides, capsys):
    cls = importlib.import_module(script).Config
    with pytest.raises(SystemExit) as stopped:
        from_cli(dict(only=cls) if by else cls, "", ["--fsdp"], f"{script}.py", by, overrides=overrides)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "has no --fsdp" in err and f"nproc-per-node 2 {script}.py" in err


@pytest.mark.parametrize("optimizer", ["muon", "adamw_8bit"])
def test_optimizers_of_whole_weights_are_refused(optimizer):
    with pytest.raises(UsageError, match=f"{optimizer}.*\ntry: --optimizer adamw"):
        distributed.shard(torch.nn.Linear(2, 2), optimizer)


def test_without_sharing_nothing_changes():
    model = torch.nn.Linear(2, 2)
    tensor = torch.arange(3.0)
    with distributed.full_weights(model) as full_model:
        assert full_model is model and not model.training
    assert model.training and shared_like(tensor, model.weight) is tensor
    assert to_plain(dict(a=[tensor, 1]), keep=False) == dict(a=[None, 1])


def test_a_restarted_group_does_not_meet_the_one_before(toy, tmp_path):
    """torchrun --max-restarts keeps its store, and in it the addresses of ranks that are gone."""
    script, *flags = train_flags("transformer", toy, tmp_path)
    flags += [f"--checkpoint_dir={tmp_path}", "--resume=auto"]
    first = start_two(script, *flags, "--max_steps=2")
    for process in first:
        finish(process)
    variables = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(first[0].store.port))
    variables |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="1")
    second = [start(script, *flags, "--max_steps=3", RANK=str(r), LOCAL_RANK=str(r), **variables) for r in range(2)]
    out, _ = [finish(process) for process in second][0]
    assert "resumed" in out and "step 3 of 3" in out
