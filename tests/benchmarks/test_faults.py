"""The fault table: every row is there, and some of it runs as `python -m faults` would."""

import json
import subprocess
import sys

import pytest

from data_utils.errors import UsageError
from faults import __main__ as faults
from faults.lab import SCRIPTS, digests
from faults.rows import ROWS
from tests.helpers import ROOT, environment


def test_the_table_is_whole():
    assert list(ROWS) == list(range(1, 41)) and set(SCRIPTS) == {path.stem[6:] for path in ROOT.glob("train_*.py")}
    for fault, function, scripts, ci in ROWS.values():
        assert fault and callable(function) and set(ci) <= set(scripts) <= set("EMHSVAP")


def test_rows_and_scripts_are_chosen():
    assert faults.chosen(faults.Config(rows="7", scripts="sr,hrm"))[0] == [(7, "hrm"), (7, "sr")]
    assert faults.chosen(faults.Config(rows="1,2", ci=True))[0] == [(1, "expert"), (2, "expert")]
    for wrong in (dict(rows="41"), dict(rows="x"), dict(scripts="exprt")):
        with pytest.raises(UsageError, match="expected some of"):
            faults.chosen(faults.Config(**wrong))


def test_a_changed_value_has_another_digest():
    import torch

    state = dict(w=torch.ones(2), rows=[dict(loss=1.0, seconds=3.0)])
    assert digests(state) == digests(dict(w=torch.ones(2), rows=[dict(loss=1.0, seconds=4.0)]))
    assert digests(state) != digests(dict(w=torch.ones(2) + 1e-6, rows=[dict(loss=1.0)]))
    assert digests(state) != digests(dict(w=torch.ones(2), rows=[dict(loss=1.5)]))


@pytest.mark.slow
def test_some_rows_run_and_those_that_were_there_stay(tmp_path):
    out = tmp_path / "faults.json"
    old = dict(row=1, fault="crash", script="ae", seconds=9.0, outcome="pass", note="")
    out.write_text(json.dumps(dict(table=dict(rows=[old]))))
    words = ["--rows", "2,9,30", "--scripts", "expert", "--threads", "2", "--out", out]
    words = [sys.executable, "-m", "faults", *words]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(out.read_text())["table"]
    assert table["threads"] == 2
    rows = [(row["row"], row["script"], row["outcome"]) for row in table["rows"]]
    assert rows == [(1, "ae", "pass"), (2, "expert", "pass"), (9, "expert", "pass"), (30, "expert", "pass")]
    first, *others = table["figures"]
    assert (first["id"], first["ours"], first["target"]) == ("faults.table", 4, "4")
    assert [f["id"] for f in others] == [f"faults.table.{number}" for number in (1, 2, 9, 30)]
