"""The train scripts repeat themselves on purpose; this keeps the repeats from drifting apart."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import settings

from data_utils.config import UsageError

SCRIPTS = sorted(Path(__file__).parents[1].glob("train_*.py"))
SECTIONS = ["hardware", "data", "model and optimizer", "resume", "schedule, evaluation, stop", "train", "summary"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_shape_of_script(path):
    text = path.read_text()
    assert re.findall(r"^    # --- (.+?) -+$", text, flags=re.M) == SECTIONS
    assert len(text.splitlines()) <= 600
    assert text.index("from_cli(") < text.index("import torch")
    assert "import plot_losses" not in text, "a figure that fails must not end a run: metrics.draw_losses"


def test_shared_fields_agree():
    seen = {}
    for path in SCRIPTS:
        for f in fields(importlib.import_module(path.stem).Config):
            if (path.stem, f.name) == ("train_multimodal", "ema"):
                continue  # on or off in its guide, the decay in that of train_hrm.py
            assert seen.setdefault(f.name, f.type) == f.type, f"{path.stem}: {f.name}"


@pytest.mark.parametrize("flag", ["--beta1=1", "--beta1=-0.1", "--beta2=1", "--beta2=1.5", "--beta2=nan"])
@pytest.mark.parametrize("script", ["train_hrm", "train_multimodal", "train_sr"])
def test_betas_that_no_average_can_have_are_refused(script, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(UsageError, match=f"{flag.split('=')[0]} .*: expected 0 or more"):
        module.main(settings(module, [flag, "--device=cpu"]))
    assert not list(tmp_path.iterdir())


def test_every_script_with_betas_is_in_the_test_above():
    having = [path.stem for path in SCRIPTS if "beta2" in path.read_text()]
    assert having == ["train_hrm", "train_multimodal", "train_sr"]
