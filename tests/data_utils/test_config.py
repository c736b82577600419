"""The command line: one field is one flag, bundles are only more flags, a slip is named before torch is imported."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Literal

import pytest

import generate
import plot
import prepare_data
import train_ae
import train_expert
import train_hrm
import train_mla
import train_multimodal
import train_sr
from data_utils.config import at_least, complete, flag, from_cli, one_of
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch
from tests.helpers import ROOT


@dataclass
class Base:
    rate: float = 0.1  # step size, 5% at most
    kind: Literal["one", "two"] = "one"  # which


@dataclass
class Child(Base):
    use_amp: bool = True  # mixed precision
    names: tuple[str, ...] = ()  # domains
    sizes: tuple[int, ...] = (1, 2)  # widths
    max_steps: int = 0  # budget
    resume: str = ""  # where from
    remedy = "a smaller --batch_size"


def refused(capsys, *argv, cls=Child, **more):
    """Return the message of a command line that must exit with 2, in at most three lines."""
    with pytest.raises(SystemExit) as stop:
        from_cli(cls, argv=list(argv), prog="it.py", **more)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[0].startswith("error: ") and len(lines) <= 3
    return "\n".join(lines)


@pytest.mark.parametrize(
    "flags, field, value",
    [
        ([], "use_amp", True),
        (["--use_amp"], "use_amp", True),
        (["--use-amp"], "use_amp", True),
        (["--no-use-amp"], "use_amp", False),
        (["--no-use_amp"], "use_amp", False),
        (["--no_use_amp"], "use_amp", False),
        (["--max_steps", "3"], "max_steps", 3),
        (["--max-steps=3"], "max_steps", 3),
        (["--max_steps", "-1"], "max_steps", -1),
        ([], "names", ()),
        (["--names"], "names", ()),
        (["--names", "a", "b"], "names", ("a", "b")),
        (["--sizes", "7"], "sizes", (7,)),
        (["--sizes", "7", "8", "--kind=two", "--sizes=9"], "sizes", (7, 8, 9)),
        (["--rate=1e-4"], "rate", 1e-4),
        (["--kind", "two"], "kind", "two"),
        ([], "resume", ""),
        (["--resume"], "resume", "latest"),
        (["--resume", "--max_steps", "3"], "resume", "latest"),
        (["--resume", "auto"], "resume", "auto"),
        (["--resume=a b.pt"], "resume", "a b.pt"),
    ],
)
def test_flags(flags, field, value):
    parsed = getattr(from_cli(Child, argv=flags), field)
    assert parsed == value and type(parsed) is type(value)


def test_the_keys_of_a_dictionary_are_choices(capsys):
    parts = {}

    @dataclass
    class Parts:
        kind: str = flag("one", choices=parts)  # which

    parts |= dict(one=1, other=2)
    assert from_cli(Parts, argv=["--kind=other"]).kind == "other"
    message = refused(capsys, "--kind=otter", cls=Parts)
    assert "otter" in message and "one" in message and "other" in message
    with pytest.raises(UsageError, match="kind='otter': expected 'one' or 'other'"):
        complete(Parts("otter"), Parts)
    with pytest.raises(SystemExit):
        from_cli(Parts, argv=["--help"])
    assert "(one, other)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_step", "3"], ["--max_step", "did you mean --max_steps?"]),
        (["--max-setps=3"], ["did you mean --max-steps?"]),
        (["--zzz"], ["unrecognized arguments: --zzz"]),
        (["--rate", "fast"], ["--rate", "fast", "float"]),
        (["--max_steps", "1.5"], ["--max_steps", "1.5", "int"]),
        (["--sizes", "1", "x"], ["--sizes", "x"]),
        (["--kind", "three"], ["--kind", "three", "one", "two"]),
        (["--rate"], ["--rate", "expected one argument"]),
        (["--use_amp=maybe"], ["--use_amp"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_slip_names_the_flag(flags, words, capsys):
    message = refused(capsys, *flags)
    assert all(word in message for word in words) and "try: python it.py --help" in message


# ---- bundles ---------------------------------------------------------------------------------------------------------


def bundle(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(tmp_path / "a.yaml")]


def test_a_stream_that_is_closed_is_written_to_nobody(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["it.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "it.py", raising=False)
    from_cli(plot.Config)
    with sys.stderr as stream:
        assert not stream.isatty()


def test_typed_flags_win_over_the_bundle(tmp_path):
    text = "rate: 1e-4\nuse_amp: false\nmax-steps: 7\nnames: [a, b]\nresume: latest\n"
    cfg = from_cli(Child, argv=["--max_steps", "9", *bundle(tmp_path, text), "--rate", "2"])
    assert cfg == Child(2.0, "one", False, ("a", "b"), (1, 2), 9, "latest")
    assert from_cli(Child, argv=bundle(tmp_path, "")) == Child()
    assert from_cli(Child, argv=[*bundle(tmp_path, "names: [a, b]\nuse_amp: false"), "--names", "c", "--use_amp"]) == (
        Child(names=("c",))
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("rate: x", ["--rate", "x"]),
        ("speed: 1", ["--speed"]),
        ("max_step: 1", ["did you mean --max_steps?"]),
        ("rate: {a: 1}", ["rate", "flat"]),
        ("names: [[a]]", ["names", "flat"]),
        ("names: [a, {b: 1}]", ["names", "flat"]),
        ("kind: three", ["--kind", "three"]),
        ("- 1", ["flat"]),
        ("rate", ["flat"]),
        ("rate:", ["rate", "flat"]),
        ("rate: 1\nrate: 2", ["rate", "each flag once"]),
        ("max_steps: 1\nmax-steps: 2", ["max", "each flag once"]),
        ("a: [", ["a.yaml", "line 1"]),
        ("rate: !!python/object/apply:os.system [ls]", ["a.yaml", "line 1", "python"]),
        ("rate: 2024-13-45", ["a.yaml"]),
        ("max_steps: " + "9" * 5000, ["a.yaml"]),
        ("names: " + "[" * 5000, ["a.yaml"]),
        ("use_amp: 3", ["--use_amp"]),
    ],
)
def test_a_bad_bundle_is_a_usage_error_with_the_file_and_the_key(text, words, tmp_path, capsys):
    message = refused(capsys, *bundle(tmp_path, text))
    assert all(word in message for word in ["a.yaml", *words])


def test_a_bundle_that_is_not_there_or_not_text(tmp_path, capsys):
    (tmp_path / "other.yaml").write_text("rate: 1")
    message = refused(capsys, "--config", str(tmp_path / "none.yaml"))
    assert "none.yaml" in message and "other.yaml" in message
    (tmp_path / "b.yaml").write_bytes(b"rate: \xff\xfe")
    assert "b.yaml" in refused(capsys, "--config", str(tmp_path / "b.yaml"))


def test_bundles_that_come_along_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "configs/expert/smoke.yaml"]
    assert from_cli(train_expert.CONFIGS, argv=words, by="expert").steps == 120
    file = tmp_path / words[1]
    file.parent.mkdir(parents=True)
    file.write_text("expert: transformer\nsteps: 7\n")  # a file of that name in the folder comes first
    assert from_cli(train_expert.CONFIGS, argv=words, by="expert").steps == 7


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "expert").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_bundles_that_come_along_parse(path):
    for expert in train_expert.CONFIGS:
        cfg = from_cli(train_expert.CONFIGS, argv=["--config", str(path), "--expert", expert], by="expert")
        assert type(cfg) is train_expert.CONFIGS[expert]


# ---- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert, cls", train_expert.CONFIGS.items())
def test_the_expert_picks_the_defaults(expert, cls, tmp_path):
    for flags in (["--expert", expert], [f"--expert={expert}"], bundle(tmp_path, f"expert: {expert}")):
        assert from_cli(train_expert.CONFIGS, argv=list(flags), by="expert") == cls()
    assert cls().expert == expert


def test_the_diffuser_has_defaults_of_its_own():
    cfg = from_cli(train_expert.CONFIGS, argv=["--expert", "diffuser"], by="expert")
    assert (cfg.lr, cfg.batch_size, cfg.warmup_steps, cfg.n_layers, cfg.training_steps) == (1e-4, 64, 500, 4, 100)
    cfg = from_cli(train_expert.CONFIGS, argv=["--expert", "transformer"], by="expert")
    assert (cfg.lr, cfg.batch_size, cfg.warmup_steps, cfg.n_layers, cfg.grad_accum_steps) == (3e-4, 32, 1000, 6, 1)


@pytest.mark.parametrize("flags", [[], ["--lr", "1"], ["--expert", "gpt"], ["--expert"]])
def test_the_expert_is_required_and_one_of_three(flags, capsys):
    assert "--expert" in refused(capsys, *flags, cls=train_expert.CONFIGS, by="expert")


def test_a_flag_of_another_variant_is_unknown(capsys):
    argv = "--expert", "transformer", "--d_state", "4"
    assert "unrecognized arguments: --d_state" in refused(capsys, *argv, cls=train_expert.CONFIGS, by="expert")


# ---- help ------------------------------------------------------------------------------------------------------------

COMMANDS = {  # every command line: (class or variants, flags that choose one)
    **{f"train_expert {name}": (train_expert.CONFIGS, ["--expert", name]) for name in train_expert.CONFIGS},
    **{
        f"train_hrm {c.__name__}": (c, [])
        for c in (train_hrm.HrmConfig, train_hrm.SyntheticConfig, train_hrm.SudokuConfig)
    },
    **{f"train_ae {name}": (cls, []) for name, (cls, _) in train_ae.LOOPS.items()},
    "train_mla": (train_mla.Config, []),
    "train_multimodal": (train_multimodal.MultimodalConfig, []),
    "generate": (generate.Config, []),
    "generate answers": (generate.AnswerConfig, []),
    **{f"generate {name}": (cls, []) for name, cls in generate.COMMANDS.items()},
    "plot": (plot.Config, []),
    **{f"prepare_data {name}": (cls, []) for name, (cls, _) in prepare_data.COMMANDS.items()},
}


def help_of(capsys, cls, *argv):
    with pytest.raises(SystemExit) as stop:
        from_cli(cls, "doc\n    example", [*argv, "--help", "all"], by="expert" * isinstance(cls, dict))
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "doc\n    example" in text
    return text


def test_help_shows_inherited_comments(capsys):
    text = " ".join(help_of(capsys, Child).split())
    assert "step size, 5% at most (default: 0.1)" in text and "Base: --rate" in text and "Child: --use_amp" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_default_and_comment(name, capsys):
    cls, flags = COMMANDS[name]
    text = " ".join(help_of(capsys, cls, *flags).split())
    cls = cls[flags[1]] if flags else cls
    for f in fields(cls):
        assert f"--{f.name}" in text and f"--{f.name.replace('_', '-')}" in text
        after = text[text.index(f" --{f.name}") + 1 :]
        assert f"(default: {f.default})" in after, f.name
        assert f.default is not None


def screen_of(capsys, monkeypatch, parse, *argv):
    """The lines of --help in a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


SCRIPTS = (train_expert, train_mla, train_hrm, train_sr, train_ae, train_multimodal)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_is_one_screen_of_flags_that_exist(script, capsys, monkeypatch):
    lines = screen_of(capsys, monkeypatch, script.parse)
    shown = [line.split()[0].lstrip("-") for line in lines if line.startswith("  --")]
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert 12 <= len(shown) <= 15
    assert set(" ".join(script.Config.common.values()).split()) <= {f.name for f in fields(script.Config)}
    assert script.__doc__.splitlines()[0] in lines and script.__doc__.splitlines()[2] in lines
    assert any(re.search(r" --help all lists \d+ more flags\.$", line) for line in lines)


@pytest.mark.parametrize("argv", [["formula"], ["events"], ["multimodal"], [], ["--run_name", "x"]])
def test_help_of_generate_is_one_screen(argv, capsys, monkeypatch):
    lines = screen_of(capsys, monkeypatch, generate.parse, *argv)
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    cls = generate.COMMANDS.get((argv or [""])[0], generate.Config)
    names = " ".join(getattr(cls, "common", dict(flags="device")).values()).split()
    assert all(any(line.startswith(f"  --{name}") for line in lines) for name in names)


@pytest.mark.parametrize("name", prepare_data.COMMANDS)
def test_help_of_prepare_data_is_one_screen(name, capsys, monkeypatch):
    cls, function = prepare_data.COMMANDS[name]
    lines = screen_of(capsys, monkeypatch, lambda argv: from_cli(cls, function.__doc__, argv))
    assert len(lines) <= 45
    assert all(any(line.startswith(f"  --{f.name}") for line in lines) for f in fields(cls))


def test_a_screen_shows_defaults_choices_and_how_to_switch_off(capsys, monkeypatch):
    lines = screen_of(capsys, monkeypatch, lambda argv: from_cli(Child, "Do it.\n\n    example", argv))
    text = "\n".join(" ".join(line.split()) for line in lines)
    for line in ("--rate 0.1 step size, 5% at most", "--kind one which (one, two)", "--sizes 1 2 widths",
                 "--use_amp mixed precision (--no-use_amp: off)", "--resume ... where from"):  # fmt: skip
        assert line in text
    assert "every spelling" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_a_comment(name):
    from data_utils.config import _origin

    cls, flags = COMMANDS[name]
    cls = cls[flags[1]] if flags else cls
    assert [f.name for f in fields(cls) if not _origin(cls, f.name)[1].strip()] == []


def test_help_without_the_expert_shows_what_all_share(capsys):
    text = " ".join(help_of(capsys, train_expert.CONFIGS).split())
    assert "--lr" in text and "--d_state" not in text and "--expert transformer --help" in text


# ---- notebooks, statuses ---------------------------------------------------------------------------------------------


def test_a_notebook_has_no_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    assert from_cli(Child) is None and launch(None, None) is None


def fails(error):
    def main(cfg):
        raise error

    return main


@pytest.mark.parametrize(
    "main, status, words",
    [
        (lambda cfg: {}, 0, []),
        (lambda cfg: dict(stopped=0), 0, []),
        (lambda cfg: dict(stopped=2), 130, []),
        (lambda cfg: dict(stopped=15), 143, []),
        (lambda cfg: dict(stopped=10), 143, []),
        (fails(UsageError("no such thing\ntry: another")), 2, ["error: no such thing", "try: another"]),
        (fails(DataError("a.jsonl:3: bad")), 1, ["error: a.jsonl:3: bad"]),
        (fails(KeyboardInterrupt()), 130, []),
        (fails(MemoryError()), 1, ["out of memory", "--batch_size"]),
        (fails(RuntimeError("CUDA out of memory. Tried\nto allocate")), 1, ["out of memory", "--batch_size"]),
        (fails(RuntimeError("InvalidCxxCompiler: No working C++ compiler found in\nall")), 1, ["without --compile"]),
        (fails(RuntimeError("Failed to find C compiler. Please")), 1, ["without --compile"]),
    ],
)
@pytest.mark.parametrize("torchrun", [False, True])
def test_launch_maps_what_happened_to_a_status(main, status, words, torchrun, capsys, monkeypatch):
    if torchrun:  # a stopped rank leaves with 0 there, else it would be started again
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        status = 0 if status > 128 else status
    with pytest.raises(SystemExit) as stop:
        launch(main, Child())
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == status and len(lines) <= 3
    assert all(word in "\n".join(lines) for word in words) and bool(words) == bool(lines)


def test_what_comes_before_a_program_leaves_only_if_it_fails(capsys):
    assert launch(lambda cfg: [cfg], Child(), leave=False) == [Child()] and launch(None, None, leave=False) is None
    with pytest.raises(SystemExit) as stop:
        launch(fails(DataError("a.txt: bad")), Child(), leave=False)
    assert stop.value.code == 1 and capsys.readouterr().err == "error: a.txt: bad\n"


@pytest.mark.parametrize(
    "changes, cures",
    [
        ({}, "global_batch_size=8 enable_memory=false enable_latent_planning=false enable_gradient_checkpointing=true"),
        (
            dict(enable_memory=False, global_batch_size=4),
            "enable_latent_planning=false enable_gradient_checkpointing=true",
        ),
        (None, "hidden_size=512"),
    ],
)
def test_out_of_memory_names_the_cures_that_are_not_yet_on(changes, cures, capsys):
    table = dict(cls={"multimodal": train_multimodal.MultimodalConfig}, overrides=train_multimodal.PICTURES)
    words = ["--config", str(ROOT / "configs" / "multimodal" / "low_memory.yaml")]
    cfg = from_cli(**table, argv=words) if changes is None else train_multimodal.MultimodalConfig(**changes)
    with pytest.raises(SystemExit):
        launch(fails(MemoryError()), cfg)
    assert capsys.readouterr().err.splitlines()[1] == f"try: {cures}"
    from_cli(**table, argv=cures.split())  # they can be typed


def test_launch_shows_a_bug_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"):
        launch(fails(RuntimeError("shapes differ")), Child())


@dataclass
class Length:
    steps: int = 0  # of the schedule
    epochs: int = flag(10, instead="steps")  # passes
    share: float = 0.5  # of the steps
    count: int = flag(0, instead="share")  # of steps


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        ("", "", (0, 10, 0.5, 0)),
        ("", "--steps 5", (5, 0, 0.5, 0)),
        ("", "--epochs 5", (0, 5, 0.5, 0)),
        ("", "--steps 5 --epochs 6", (5, 6, 0.5, 0)),
        ("", "--steps 0", (0, 10, 0.5, 0)),
        ("", "--count 3", (0, 10, 0.0, 3)),
        ("steps: 5\ncount: 2", "", (5, 0, 0.0, 2)),
        ("steps: 5\ncount: 2", "--epochs 6 --share 0.1", (0, 6, 0.1, 0)),
        ("steps: 0\nepochs: 4", "--steps 3", (3, 0, 0.5, 0)),
    ],
)
def test_of_two_fields_that_set_the_same_thing_the_upper_layer_takes_one(text, flags, expected, tmp_path):
    cfg = from_cli(Length, argv=[*bundle(tmp_path, text), *flags.split()])
    assert (cfg.steps, cfg.epochs, cfg.share, cfg.count) == expected


def test_the_same_in_python():
    assert complete(Length(steps=5), Length) == Length(5, 0, 0.5, 0)
    assert complete(Length(count=3), Length) == Length(0, 10, 0.0, 3)
    assert complete(Length(steps=5, epochs=6), Length) == Length(5, 6, 0.5, 0)
    one_of(Length(), "steps", "epochs")
    for both in (Length(5, 6), Length(0, 0)):
        with pytest.raises(UsageError, match=f"--steps {both.steps} --epochs {both.epochs}: expected one of them"):
            one_of(both, "steps", "epochs")


def test_at_least():
    at_least(Child(), 0, "rate", "max_steps")
    with pytest.raises(UsageError, match="--max_steps -1: expected 0 or more"):
        at_least(Child(max_steps=-1), 0, "rate", "max_steps")


# ---- systems ---------------------------------------------------------------------------------------------------------

WINDOWS = """
import signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1, signal.SIGHUP
import generate, plot, prepare_data, train_expert
from data_utils.files import lock_run
from data_utils.progress import peak_mb
from data_utils.stop import Stop
with Stop() as stop:
    signal.raise_signal(signal.SIGTERM)
assert stop.signal == signal.SIGTERM
lock_run(sys.argv[1], "it")
import torch
assert peak_mb(torch.device("cpu")) == 0
"""


def test_everything_imports_and_stops_without_fcntl_sigusr1_and_sighup(tmp_path):
    done = subprocess.run([sys.executable, "-c", WINDOWS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can't be locked" in done.stderr


@pytest.mark.parametrize("script", ["train_expert", "generate"])
def test_the_command_line_is_read_before_torch_is_imported(script):
    code = (
        "import runpy, sys; sys.argv = ['x', '--nothing', '--expert', 'transformer']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'yaml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False False\n", done.stderr
