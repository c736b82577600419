"""Names say what a thing is: no variable or argument has one of the vague names that once stood everywhere."""

import ast

import pytest

from tests.helpers import ROOT

VAGUE = {"found", "said", "own", "made", "whole", "told", "about"}
FOLDERS = ".", "models", "data_utils", "benchmarks", "faults", "scripts", "tests"
FILES = sorted({path for folder in FOLDERS for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")})


def vague_names(text):
    """Yield (line, name) of the vague names that a program gives to variables and arguments."""
    for node in ast.walk(ast.parse(text)):
        name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", "")
        if name in VAGUE and not isinstance(getattr(node, "ctx", ast.Store()), ast.Load):
            yield node.lineno, name


def test_vague_names_are_noticed():
    assert list(vague_names("def f(found):\n    said, x = found\n    return said")) == [(1, "found"), (2, "said")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_name_is_vague(path):
    if "peers" not in path.parts:  # what benchmarks fetch
        assert not list(vague_names(path.read_text(encoding="utf-8")))
