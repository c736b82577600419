"""The quickstart runs from its first cell to its last; `python -m tests.scripts.test_notebook` renews its outputs."""

import importlib
import json
import re
import runpy
import shutil

import pytest

from tests.helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
NotebookClient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt").NotebookClient

QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
SCRIPTS = "generate train_ae train_expert train_hrm train_mla train_multimodal train_sr".split()
WORK = 'WORK = "notebooks/work"'
MEASURED = [  # what another machine, or another minute, would say otherwise
    (r" \(cpu with[^)]*\)", ""),
    (r", \d+ s, peak \d+ MB", ""),
    (r" \| eta [\d:]+ \| [\d.]+ it/s", ""),
    (r"(\d+ candidates), [\d.]+ s", r"\1"),
]


SHORTER = dict(pair.split(" -> ") for pair in """
n_layers=2, steps=60 -> n_layers=2, steps=10
n_layers=2, steps=30 -> n_layers=2, steps=3
grad_accum_steps=1, steps=30 -> grad_accum_steps=1, steps=3
steps=700 -> steps=10
eval_rows=500 -> eval_rows=100
batch_size=16, steps=40, encoder -> batch_size=4, steps=4, encoder
import train_mla -> import train_mla; train_mla.EM_TOKENS = 1000
max_seconds=5 -> max_seconds=0
events=3000 -> events=300
train_samples=4000 -> train_samples=400
max_steps=120 -> max_steps=8
""".strip().splitlines())  # fmt: skip


def run(work=None, changes=()):
    """Return the notebook, executed as by a person who opens it in its folder.

    work: folder for its files. changes: {text: another} in the cells.
    """
    notebook = nbformat.read(QUICKSTART, as_version=4)
    changes = dict(changes) | ({WORK: f"WORK = {str(work)!r}"} if work else {})
    for text, other in changes.items():
        assert sum(text in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, other)
    where = dict(metadata=dict(path=str(QUICKSTART.parent)))
    return NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()


def scrubbed(notebook):
    """Return the notebook without what tells of the machine: timings, warnings, times of execution."""
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number + 1
        cell.metadata.pop("execution", None)
        cell.outputs = [
            out for out in cell.outputs if out.get("name") != "stderr" and out.output_type != "execute_result"
        ]
        cell.outputs = merged(cell.outputs)
        for out in cell.outputs:
            for pattern, text in MEASURED if out.output_type == "stream" else ():
                out.text = re.sub(pattern, text, out.text)
    return notebook


def merged(outputs):
    """Return outputs with the text between two pictures as one, however it came."""
    joined = []
    for out in outputs:
        if joined and out.output_type == joined[-1].output_type == "stream":
            joined[-1].text += out.text
        else:
            joined.append(out)
    return joined


def pictures(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return [out for out in outputs if "image/png" in out.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("length", ["short", "whole"])
def test_the_quickstart_runs_and_shows_its_pictures(length, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = run(tmp_path, SHORTER if length == "short" else {})  # raises on an error in a cell
    assert len(pictures(notebook)) == 6
    text = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    steps = (10, 3, 10, 4, 8) if length == "short" else (60, 30, 700, 40, 120)
    names = "transformer_expert: step", "nanothink_mla: step", "sums: step", "formulas: step", "sudoku4: step"
    for line in [f"{name} {n} " for name, n in zip(names, steps, strict=True)]:
        assert line in text
    assert "events: epoch 5 " in text


def test_each_cell_of_the_quickstart_calls_scripts_with_flags_that_they_have(tmp_path, monkeypatch):
    calls = []
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "main", calls.append)
    _, *cells = [cell.source for cell in nbformat.read(QUICKSTART, as_version=4).cells if cell.cell_type == "code"]
    source = "\n".join(cells).replace(WORK, f"WORK = {str(tmp_path)!r}")
    source = re.sub(r"^(!|show\().*", "", source, flags=re.M)  # there are no pictures
    (tmp_path / "cells.py").write_text(source)
    runpy.run_path(str(tmp_path / "cells.py"))
    assert len(calls) == 14 and {type(cfg).__module__ for cfg in calls} == {*SCRIPTS}


def test_the_quickstart_as_it_is_kept_is_small_has_pictures_and_tells_of_no_machine():
    text = QUICKSTART.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    assert len(text) < 300_000 and len(pictures(notebook)) == 6
    assert scrubbed(nbformat.reads(text, as_version=4)) == notebook
    assert not re.search(r"(?<!notebooks)/(home|root|tmp|work|Users|content)/", json.dumps(notebook))


def test_each_code_cell_of_the_quickstart_follows_a_line_of_explanation():
    kinds = [cell.cell_type for cell in nbformat.read(QUICKSTART, as_version=4).cells]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) + ["markdown"]


if __name__ == "__main__":
    shutil.rmtree(QUICKSTART.parent / "work", ignore_errors=True)
    nbformat.write(scrubbed(run()), QUICKSTART)
