"""scripts/check.py: its lines, and its status."""

import importlib.util

from tests.helpers import ROOT


def script():
    spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_is_ok(capsys):
    assert script().main() == 0
    lines = capsys.readouterr().out.splitlines()
    parts = "versions device render samples steps save load".split()
    assert [line.split(":")[0] for line in lines] == [f"ok   {part}" for part in parts]
    assert "8 of read, continue, sudoku4, maze" in lines[3]


def test_a_failure_is_named(capsys, monkeypatch):
    monkeypatch.setattr("data_utils.pages.render.to_text", lambda page: "else")
    assert script().main() == 1
    out, err = capsys.readouterr()
    assert [line[:5] for line in out.splitlines()] == ["ok   ", "ok   ", "FAIL "] and "came back as 'else'" in out
    assert err.startswith("try: pip install") and "Traceback" not in err


def test_a_missing_package(capsys, monkeypatch):
    module = script()
    module.PACKAGES.append("no-such-package")
    assert module.main() == 1 and "FAIL versions: PackageNotFoundError" in capsys.readouterr().out
