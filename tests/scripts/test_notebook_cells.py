"""main() in a notebook: nothing stays behind however it ends, and a Config means what the same flags would mean."""

import signal
import sys
import threading
from code import InteractiveInterpreter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

import train_ae
import train_expert
import train_hrm
import train_mla
import train_multimodal
import train_sr
from data_utils import files
from data_utils.config import complete, from_cli
from data_utils.errors import UsageError
from data_utils.launch import at_end, ends_cleanly
from data_utils.metrics import to_wandb
from data_utils.stop import Stop
from data_utils.workers import in_order
from tests.helpers import ROOT, finish, slow, start

ROWS = [train_expert, train_ae, train_hrm, *map(slow, (train_mla, train_sr, train_multimodal))]
TEXT = dict(tokenizer="bytes", d_model=32, n_heads=2, n_layers=1, max_seq_len=32, batch_size=8, max_steps=2,
            eval_windows=16, device="cpu")  # fmt: skip
PAGES = dict(arch="smoke", tasks=["sudoku4"], enable_mtp=False, train_samples=24, test_samples=4, global_batch_size=8,
             max_steps=1, wandb="disabled", log_file="", device="cpu", dtype="float32")  # fmt: skip
FORMULAS = dict(encoder_dim=16, encoder_n_heads=2, encoder_ffn_hidden_dim=16, encoder_n_seeds=2, decoder_input_dim=16,
                decoder_model_dim=16, decoder_n_heads=2, decoder_n_layers=1, decoder_ffn_hidden_dim=16, batch_size=1,
                val_size=2, val_problems=0, steps=2, device="cpu", verbose=False)  # fmt: skip


def completed(module, cfg):
    """What main makes of a configuration first."""
    cls = dict(train_expert=train_expert.CONFIGS, train_ae=train_ae.CONFIGS, train_hrm=train_hrm.variant,
               train_multimodal=train_multimodal.CONFIGS)  # fmt: skip
    settings = dict(train_expert=dict(by="expert"), train_ae=dict(by="loop", overrides=train_ae.GUIDE),
               train_hrm=dict(by="dataset"), train_sr=dict(load=train_sr.load_flags),
               train_multimodal=dict(overrides=train_multimodal.PICTURES))  # fmt: skip
    return complete(cfg, cls.get(module.__name__, module.Config), **settings.get(module.__name__, {}))


def small(module, folder, toy, experts):
    """A run of a step or two, and the folder whose lock it takes."""
    files = {f"{name}_ckpt": str(experts / f"{name}_expert.pt") for name in ("transformer", "state_space", "diffuser")}
    more = dict(
        train_expert=TEXT | dict(data_dir=toy, checkpoint_dir=folder),
        train_mla=TEXT | files | dict(data_dir=toy, checkpoint_dir=folder, kv_latent_dim=16, rope_dim=8),
        train_sr=FORMULAS | dict(output_dir=folder / "run"),
        train_ae=dict(out=folder, events=300, epochs=1, hidden=[8], codebook_size=8, make_plots=False, device="cpu"),
        train_hrm=dict(dataset="synthetic", save_dir=folder, batch_size=8, steps=2, eval_rows=8, device="cpu"),
        train_multimodal=PAGES | dict(data_paths=[folder / "pages"], checkpoint_path=folder),
    )
    return module.Config(**more[module.__name__])


def locks(folder):
    """The lock files of the runs in a folder: an open one is held by a run."""
    return [path for path in folder.rglob(".*.lock") if path.name not in (".build.lock",)]


def held(path):
    try:
        files.lock_run(path.parent, path.name[1:-5]).close()
    except UsageError:
        return True
    return False


# ---- whatever happens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ROWS, ids=lambda m: m.__name__)
def test_after_an_error_or_an_interrupt_the_next_cell_runs(module, tmp_path, toy, experts, monkeypatch, capsys):
    monkeypatch.setattr(train_mla, "EM_TOKENS", 1000)
    cfg = small(module, tmp_path, toy, experts)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    tracebacks = []  # as a notebook keeps them
    for error in (RuntimeError("a bug"), KeyboardInterrupt()):
        seen = []

        def fail(*args, seen=seen, error=error, **kwargs):
            seen.extend(held(path) for path in locks(tmp_path))
            raise error

        with monkeypatch.context() as patched, pytest.raises(type(error)) as failed:
            patched.setattr(module, "Progress", fail)
            module.main(cfg)
        tracebacks.append(failed)
        assert seen and all(seen)  # another start was refused then
        assert not any(map(held, locks(tmp_path)))
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    result = module.main(replace(cfg, fresh=True))
    assert result["step"] and not result["stopped"] and not any(map(held, locks(tmp_path)))


@pytest.mark.parametrize("module", ROWS, ids=lambda m: m.__name__)
def test_a_run_that_is_stopped_at_once_names_no_best_loss(module, tmp_path, toy, experts, monkeypatch, capsys):
    cfg, step = small(module, tmp_path, toy, experts), module.Progress.__enter__

    def interrupt(progress):
        signal.raise_signal(signal.SIGINT)
        return step(progress)

    monkeypatch.setattr(train_mla, "EM_TOKENS", 1000)
    monkeypatch.setattr(module.Progress, "__enter__", interrupt)
    assert module.main(cfg)["stopped"] == signal.SIGINT
    last = capsys.readouterr().out.splitlines()[-1]
    assert ", not evaluated yet, " in last and "test_loss" not in last


@pytest.mark.slow
def test_a_last_evaluation_that_is_cut_is_still_to_come(tmp_path, toy, experts, monkeypatch, capsys):
    cfg = small(train_multimodal, tmp_path, toy, experts)

    def cut(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(train_multimodal, "report", cut)
        assert train_multimodal.main(cfg)["stopped"] == signal.SIGINT
    assert capsys.readouterr().out.splitlines()[-1].endswith("; next: without --fresh")
    assert train_multimodal.main(cfg)["best_score"] >= 0


def test_a_run_in_another_process_is_refused_while_main_runs(tmp_path, toy):
    flags = [f"--{name}={value}" for name, value in TEXT.items()]
    flags += [f"--data_dir={toy}", f"--checkpoint_dir={tmp_path}"]

    @ends_cleanly
    def main():
        files.lock_run(tmp_path, "transformer_expert")
        return finish(start("train_expert.py", "--expert=transformer", *flags), 2)[1]

    assert "run transformer_expert is in use by process" in main()
    finish(start("train_expert.py", "--expert=transformer", *flags))


def test_locks_are_those_of_the_call_that_took_them(tmp_path):
    outside = files.lock_run(tmp_path, "outside")

    @ends_cleanly
    def main(depth):
        files.lock_run(tmp_path, f"run{depth}")
        if depth:
            main(depth - 1)
        return [held(tmp_path / f".{name}.lock") for name in ("outside", "run0", "run1")]

    assert main(1) == [True, False, True] and main(0) == [True, True, False]
    assert held(tmp_path / ".outside.lock")
    outside.close()


def test_the_builder_of_pages_ends_with_an_error(tmp_path, monkeypatch):
    begun = []
    original = train_multimodal.begin
    monkeypatch.setattr(train_multimodal, "begin", lambda cfg: begun.append(original(cfg)) or begun[0])
    monkeypatch.setattr(train_multimodal, "check_torchrun", lambda device: 1 / 0)
    more = dict(train_samples=4000, data_paths=[tmp_path / "pages"], checkpoint_path=tmp_path)
    with pytest.raises(ZeroDivisionError):
        train_multimodal.main(train_multimodal.Config(**PAGES | more))
    assert begun[0].builder.process.poll() is not None


def test_processes_of_a_generator_that_an_error_leaves_as_it_is_end_with_main():
    results = []

    @ends_cleanly
    def main():
        results.append(in_order(abs, range(-9, 0), 2))
        assert next(results[0]) == 9
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main()
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(results[0])


@pytest.mark.parametrize("failed", [False, True])
def test_a_wandb_run_is_finished_with_main(failed, monkeypatch):
    codes = []
    run = SimpleNamespace(log=print, finish=lambda exit_code: codes.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))

    @ends_cleanly
    def main():
        to_wandb("offline", "project", "", "name", {})
        assert not codes
        return 1 / (not failed)

    if failed:
        with pytest.raises(ZeroDivisionError):
            main()
    else:
        assert main() == 1
    assert codes == [int(failed)]


def test_without_a_main_under_way_nothing_is_called_at_the_end():
    calls = []
    at_end(calls.append)
    thread = threading.Thread(target=ends_cleanly(lambda: at_end(calls.append)))
    thread.start()
    thread.join()
    assert calls == [False]


def test_a_second_interrupt_leaves_a_notebook_alive(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        stop._since -= 2
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) != stop._note


# ---- bundles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, values, flags",
    [
        (train_multimodal, dict(), ""),
        (train_multimodal, dict(arch="sudoku4"), "--arch sudoku4"),
        (train_multimodal, dict(arch="sudoku4", lr=5e-4, tasks=["maze"]), "arch=sudoku4 lr=5e-4 tasks=maze"),
        (train_multimodal, dict(config=f"{ROOT}/configs/multimodal/low_memory.yaml", arch="read"),
         f"arch=read config={ROOT}/configs/multimodal/low_memory.yaml"),
        (train_ae, dict(), ""),
        (train_ae, dict(logging="plots_full"), "logging=plots_full"),
        (train_ae, dict(env="cluster", epochs=3), "env=cluster epochs=3"),
        (train_ae, dict(config=f"{ROOT}/configs/ae/smoke.yaml", hidden=[4, 5]),
         f"config={ROOT}/configs/ae/smoke.yaml hidden=[4,5]"),
        (train_ae, dict(loop="gan_ae"), "loop=gan_ae"),
        (train_sr, dict(config=f"{ROOT}/configs/test/train.yaml", steps=7),
         f"--config {ROOT}/configs/test/train.yaml --steps 7"),
        (train_hrm, dict(), ""),
        (train_hrm, dict(dataset="sudoku", steps=7), "--dataset sudoku --steps 7"),
        (train_expert, dict(), "--expert transformer"),
        (train_expert, dict(expert="diffuser", domains=["a"]), "--expert diffuser --domains a"),
        (train_mla, dict(max_seconds=60, domains="a"), "--max_seconds 60 --domains a"),
    ],
)  # fmt: skip
def test_a_configuration_made_in_python_is_what_its_flags_would_make(module, values, flags):
    expected = module.parse(flags.split())
    parsed = completed(module, module.Config(**values))
    assert parsed == expected and type(parsed) is type(expected)


def test_what_the_command_line_made_is_not_touched():
    cfg = train_multimodal.parse(["--arch=sudoku4", "--hidden_size=1024"])
    assert cfg.hidden_size == 1024 and completed(train_multimodal, cfg) is cfg
    cfg = completed(train_ae, train_ae.Config())
    assert completed(train_ae, cfg) is cfg


@pytest.mark.parametrize(
    "module, values, flags",
    [
        (train_multimodal, dict(arch="sudoku5"), "--arch=sudoku5"),
        (train_multimodal, dict(config="none.yaml"), "--config=none.yaml"),
        (train_ae, dict(logging="plots"), "--logging=plots"),
        (train_ae, dict(env="mars"), "--env=mars"),
        (train_ae, dict(config="none.yaml"), "--config=none.yaml"),
        (train_sr, dict(config="none.yaml"), "--config=none.yaml"),
    ],
)
def test_a_bundle_that_is_not_there_is_the_same_error_as_on_the_command_line(module, values, flags, capsys):
    with pytest.raises(SystemExit):
        module.parse([flags])
    typed = capsys.readouterr().err
    with pytest.raises(UsageError) as error:
        completed(module, module.Config(**values))
    message = str(error.value).split("\ntry: ")[0]
    assert message in typed and list(values.values())[0] in message
    assert capsys.readouterr().err == ""


def test_main_itself_loads_the_bundle(monkeypatch):
    seen = []
    monkeypatch.setattr(train_multimodal, "begin", lambda cfg: seen.append(cfg) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_multimodal.main(train_multimodal.Config(arch="sudoku4"))
    assert seen[0].data_paths == ("datasets/sudoku4",) and seen[0].hidden_size == 128


def test_a_sweep_is_refused():
    with pytest.raises(UsageError, match="sweep"):
        completed(train_ae, train_ae.Config(multirun=True))


def test_a_class_of_the_users_own_stays():
    @dataclass
    class Mine(train_ae.AeConfig):
        epochs: int = 3

    assert type(completed(train_ae, Mine())) is Mine and completed(train_ae, Mine()).epochs == 3
    cfg = train_hrm.SudokuConfig(dataset="datasets/mine")
    assert completed(train_hrm, cfg) == cfg
    with pytest.raises(UsageError, match="d_state=4: not a field of TrainDiffuserConfig"):
        completed(train_expert, train_expert.TrainStateSpaceConfig(expert="diffuser", d_state=4))


# ---- types -----------------------------------------------------------------------------------------------------------


@dataclass
class Edited:
    domains: tuple[str, ...] = "my_domain"  # as people edit defaults
    folders: list = field(default_factory=lambda: ["a", "b"])  # what dataclasses ask for in place of a list
    lr: float = 1  # rate
    steps: int = 3  # steps
    kind: Literal["one", "two"] = "one"  # which
    use_amp: bool = True  # precision
    widths: tuple[int, ...] = (1, 2)  # of layers


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("domains", ["a"], ("a",)),
        ("domains", "a", ("a",)),
        ("domains", Path("a"), ("a",)),
        ("domains", np.array(["a", "b"]), ("a", "b")),
        ("folders", ["c"], ("c",)),
        ("lr", 2, 2.0),
        ("lr", np.float32(0.5), 0.5),
        ("steps", np.int64(4), 4),
        ("use_amp", np.bool_(False), False),
        ("widths", 5, (5,)),
        ("widths", torch.tensor([5, 6]), (5, 6)),
        ("widths", [np.int64(5)], (5,)),
    ],
)
def test_what_is_meant_gets_the_type_of_its_field(name, value, expected):
    parsed = getattr(complete(Edited(**{name: value}), Edited), name)
    assert parsed == expected and type(parsed) is type(expected)
    assert not isinstance(parsed, tuple) or [type(x) for x in parsed] == [type(x) for x in expected]


def test_edited_defaults_count_on_the_command_line_too():
    for cfg in (from_cli(Edited, argv=[]), complete(Edited(), Edited)):
        assert (cfg.domains, cfg.folders, cfg.lr) == (("my_domain",), ("a", "b"), 1.0)
    cfg = from_cli(Edited, argv="--lr 0.5 --domains x y --folders z".split())
    assert (cfg.domains, cfg.folders, cfg.lr) == (("x", "y"), ("z",), 0.5)


def test_a_default_that_is_changed_on_the_class_counts(monkeypatch):
    monkeypatch.setattr(train_expert.DataConfig, "domains", ["my_domain"])
    assert completed(train_expert, train_expert.Config()).domains == ("my_domain",)
    assert completed(train_expert, train_expert.Config(domains=["a"])).domains == ("a",)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(domains=3), ["domains=3", "a tuple of str"]),
        (dict(widths=["x"]), ["widths=['x']", "a tuple of int"]),
        (dict(lr="fast"), ["lr='fast'", "float"]),
        (dict(lr=None), ["lr=None", "float"]),
        (dict(steps=1.5), ["steps=1.5", "int", "try: steps=3"]),
        (dict(steps=True), ["steps=True", "int"]),
        (dict(use_amp="no"), ["use_amp='no'", "bool"]),
        (dict(kind="three"), ["kind='three'", "'one' or 'two'", "try: kind='one'"]),
    ],
)
def test_a_wrong_type_names_the_field(values, words):
    with pytest.raises(UsageError) as error:
        complete(Edited(**values), Edited)
    assert all(word in str(error.value) for word in words)


def test_a_field_that_is_not_there_is_refused_with_the_nearest():
    cfg = Edited()
    cfg.step = 5
    with pytest.raises(UsageError, match=r"step: not a field of Edited \(did you mean steps\?\)"):
        complete(cfg, Edited)


# ---- a script in a cell ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ROWS, ids=lambda m: m.__name__)
def test_a_whole_script_pasted_into_a_cell_runs_nothing_and_its_main_works(module, tmp_path, toy, experts, monkeypatch):
    cell = ModuleType("__main__")  # of a kernel, without __file__
    monkeypatch.setitem(sys.modules, "__main__", cell)
    source = Path(module.__file__).read_text(encoding="utf-8")
    for _ in range(2):  # also again: the classes are then others
        InteractiveInterpreter(cell.__dict__).runsource(source, "<cell>", "exec")
    assert cell.cfg is None and cell.Config is not module.Config
    if module in (train_expert, train_multimodal, train_ae):
        cfg = small(SimpleNamespace(__name__=module.__name__, Config=cell.Config), tmp_path, toy, experts)
        assert cell.main(cfg)["step"]
