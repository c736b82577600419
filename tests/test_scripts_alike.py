"""The train scripts repeat themselves on purpose; this keeps the repeats from drifting apart."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[1].glob("train_*.py"))
SECTIONS = ["hardware", "data", "model and optimizer", "resume", "schedule, evaluation, stop", "train", "summary"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_shape_of_script(path):
    text = path.read_text()
    assert re.findall(r"^    # --- (.+?) -+$", text, flags=re.M) == SECTIONS
    assert len(text.splitlines()) <= 410
    assert text.index("from_cli(") < text.index("import torch")


def test_shared_fields_agree():
    seen = {}
    for path in SCRIPTS:
        for f in fields(importlib.import_module(path.stem).Config):
            if (path.stem, f.name) == ("train_multimodal", "ema"):
                continue  # on or off in its guide, the decay in that of train_hrm.py
            assert seen.setdefault(f.name, f.type) == f.type, f"{path.stem}: {f.name}"
