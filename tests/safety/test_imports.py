"""Imports run one way: scripts -> rooms -> flat files, and models know nothing but models.

All imports of models/ and data_utils/ count, also those within functions. They are read from the source; nothing runs.
"""

import ast
import functools
import sys
from graphlib import TopologicalSorter
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

# flat files of data_utils/, each one imports earlier ones alone
ORDER = """advice errors launch files other_names config overrides stop workers progress figures metrics checkpoint
distributed hardware documents tokenizer""".split()
ROOMS = {"text": set(), "reasoning": set(), "formulas": set(), "events": set(), "pages": {"reasoning"}}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "faults", "scripts", "tests"}
MOST_FLAT = 17


class Import(NamedTuple):
    name: str  # of one of FILES, else of a package
    lazy: bool  # within a function

    @property
    def top(self):
        return self.name.split(".")[0]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = "models", "data_utils"
FILES = {module_name(path): path for folder in PACKAGES for path in sorted(ROOT.glob(f"{folder}/**/*.py"))}
MODELS = [name for name in FILES if name.startswith("models")]
FLAT = [name for name in FILES if name.startswith("data_utils.") and FILES[name].parent.name == "data_utils"]
IN_ROOMS = [name for name in FILES if FILES[name].parent.parent.name == "data_utils"]


def imports_of(source):
    """Return every Import of a Python text; `from package import file` is an import of that file."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            files = [f"{base}.{alias.name}" for alias in node.names]
            names = [file if file in FILES else base for file in files]
        else:
            continue
        imports += [Import(name, id(node) in inside) for name in names]
    return imports


@functools.cache
def imports():
    return {name: imports_of(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(name):
    """Return the room of a file of data_utils/; "" for a flat file."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def test_the_reader_of_imports():
    source = "import a.b, c\n"
    source += "from models import trm, x\nfrom data_utils.pages.render import layout\n"
    source += "def f():\n    import d"
    plain = [("a.b", False), ("c", False), ("models.trm", False), ("models", False), ("data_utils.pages.render", False)]
    assert imports_of(source) == [*plain, ("d", True)]
    assert len(MODELS) > 20 and len(FLAT) > 10 and {room(name) for name in IN_ROOMS} == set(ROOMS)


@pytest.mark.parametrize("name", MODELS)
def test_models_import_models_torch_numpy_and_the_standard_library(name):
    for imported in imports()[name]:
        always = {"models", "torch", "numpy"} | sys.stdlib_module_names
        optional = imported.lazy and imported.top not in SCRIPTS | {"data_utils"}  # a package that need not be there
        assert imported.top in always or optional, imported.name


@pytest.mark.parametrize("name", FLAT)
def test_flat_files_import_earlier_flat_files_and_models_lazily(name):
    earlier = {f"data_utils.{file}" for file in ORDER[: ORDER.index(name.split(".")[1])]}
    for imported in imports()[name]:
        if imported.top == "data_utils":
            assert imported.name in earlier, f"{imported.name} is a room, or later in ORDER"
        assert imported.top != "models" or imported.lazy, imported.name


@pytest.mark.parametrize("name", IN_ROOMS)
def test_rooms_import_flat_files_models_and_themselves(name):
    allowed = {"", room(name)} | ROOMS[room(name)]
    for imported in imports()[name]:
        assert imported.top != "data_utils" or room(imported.name) in allowed, imported.name


@pytest.mark.parametrize("name", FILES)
def test_packages_import_no_script(name):
    for imported in imports()[name]:
        assert imported.top not in SCRIPTS and not imported.name.startswith("."), imported.name


def test_no_import_circle():
    graph = {name: {i.name for i in imports()[name] if i.name in FILES} for name in FILES}
    TopologicalSorter(graph).prepare()  # CycleError names the files of a circle


def test_only_figures_import_matplotlib_before_something_is_drawn():
    for name, its_imports in imports().items():
        if not name.endswith(".figures"):
            eager = [
                i.name for i in its_imports if not i.lazy and (i.top == "matplotlib" or i.name.endswith(".figures"))
            ]
            assert not eager, f"{name}: {eager}"


def test_flat_files_are_few():
    assert len(FLAT) <= MOST_FLAT


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_each_package_lists_its_files(name):
    lines = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))).splitlines()
    listed = {line.split()[0] for line in lines if line.split("  ")[0].endswith(".py")}
    assert listed == {path.name for path in FILES[name].parent.glob("*.py")} - {"__init__.py"}
