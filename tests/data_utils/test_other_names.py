"""Names that other projects give to flags lead to the flags here, in every script that has the idea."""

import importlib

import pytest

import generate
from data_utils.config import flag_names
from data_utils.other_names import ELSEWHERE, nearest

TRAINERS = ["expert", "mla", "sr", "ae", "hrm", "multimodal"]
MODULES = {name: importlib.import_module(f"train_{name}") for name in TRAINERS}
PARSERS = {  # a configuration that a command line gives, and how
    "expert": (
        MODULES["expert"].CONFIGS["transformer"],
        lambda words: MODULES["expert"].parse(["--expert=transformer", *words]),
    ),
    "mla": (MODULES["mla"].Config, MODULES["mla"].parse),
    "sr": (MODULES["sr"].Config, MODULES["sr"].parse),
    "ae": (MODULES["ae"].AeConfig, MODULES["ae"].parse),
    "hrm": (MODULES["hrm"].HrmConfig, MODULES["hrm"].parse),
    "multimodal": (MODULES["multimodal"].Config, MODULES["multimodal"].parse),
    "generate": (generate.Config, generate.parse),
    "formula": (generate.FormulaConfig, lambda words: generate.parse(["formula", *words])),
}


def names_of(cls):
    return {name for field in cls.__dataclass_fields__.values() for name in flag_names(field)}


def meant(name, cls):
    """Return the flag of a configuration that a name of another project means there; "" for none."""
    names = names_of(cls)
    return "" if name in names else next((flag for flag in ELSEWHERE[name] if flag in names), "")


@pytest.mark.parametrize("script", PARSERS)
def test_a_name_of_another_project_is_an_error_that_names_the_flag(script, capsys):
    cls, parse = PARSERS[script]
    for name in ELSEWHERE:
        flag = meant(name, cls)
        if not flag or name in getattr(cls, "absent", ()):
            continue
        words = [[f"--{name}", "1"], [f"--{name.replace('_', '-')}=1"]]
        if script not in ("generate", "formula"):
            words.append([f"{name}=1"])
        for typed in words:
            with pytest.raises(SystemExit) as stopped:
                parse(typed)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and f"did you mean {'--' * (typed[0][0] == '-')}{flag}?" in error, error


def test_every_name_is_one_of_some_script_and_every_flag_exists():
    flags = set().union(*(names_of(cls) for cls, _ in PARSERS.values()))
    assert all(any(meant(name, cls) for cls, _ in PARSERS.values()) for name in ELSEWHERE)
    assert not [flag for values in ELSEWHERE.values() for flag in values if flag not in flags]


def test_other_words_get_the_flag_that_is_spelt_like_them():
    assert nearest("batchsize", ["batch_size", "lr"]) == "batch_size"
    assert nearest("block_size", ["batch_size", "max_seq_len"]) == "max_seq_len"
    assert nearest("block_size", ["batch_size", "lr"]) == "batch_size"
    assert nearest("xyzzy", ["batch_size", "lr"]) == ""
