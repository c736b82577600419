"""No input file can run code: a lint over every source file, and hostile files that must be refused.

This is the only file that may build such payloads.
"""

import ast
import io
import json
import pickle
import re
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils.checkpoint import find_checkpoint, first_good, load_checkpoint
from data_utils.config import from_cli
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.text.experts import load_expert
from data_utils.tokenizer import load_tokenizer
from tests.helpers import ROOT
from train_expert import CONFIGS

# ---- lint ------------------------------------------------------------------------------------------------------------

MODULES = (
    "pickle cPickle _pickle dill joblib marshal shelve cloudpickle urllib requests socket http httpx aiohttp".split()
)
BUILTINS = ("eval", "exec", "__import__")
NAMES = """sympify parse_expr lambdify extractall unpack_archive read_pickle
add_safe_globals safe_globals set_crc32_options unsafe_load unsafe_load_all full_load full_load_all""".split()
DOTTED = """tempfile.mktemp os.system os.popen sympy.S torch.jit.load torch.hub torch.package subprocess.getoutput
subprocess.getstatusoutput numpy.lib.format.read_array""".split()
YAML = ("safe_load", "safe_load_all", "safe_dump", "safe_dump_all", "YAMLError", "SafeLoader", "SafeDumper")
KEYWORDS = dict(weights_only=True, allow_pickle=False, shell=False)  # only these literals


def unsafe(source):
    """Return what could run code from data, as ["line 3: torch.load without weights_only=True"]."""
    tree, aliases, findings, good = ast.parse(source), {}, [], set()

    def dotted(node):
        """Return the full name of an expression like np.load, through import aliases and getattr with a literal."""
        if isinstance(node, ast.Name):
            return aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            return f"{dotted(node.args[0])}.{name}"
        return ""

    def report(node, problem):
        findings.append(f"line {node.lineno}: {problem}")

    def check_module(node, name):
        if name.split(".")[0] in MODULES:
            report(node, f"module {name}")

    def literal(node, value):
        return isinstance(node, ast.Constant) and node.value is value

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                check_module(node, name.name)
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            check_module(node, node.module or "")
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                if name.name == "*":
                    report(node, f"all names of {node.module}, unseen")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            if name == "torch.load" and literal(keywords.get("weights_only"), True):
                good.add(node.func)
            if name == "numpy.load" and len(node.args) > 2:
                report(node, "numpy.load with a third argument")
            if name in ("compile", "builtins.compile"):
                report(node, "call of compile")
            if name in ("importlib.import_module", "runpy.run_module"):
                for value in (a.value for a in node.args if isinstance(a, ast.Constant)):
                    check_module(node, value)
            for keyword, value in keywords.items():
                if keyword in KEYWORDS and not literal(value, KEYWORDS[keyword]):
                    report(node, f"{keyword} is not {KEYWORDS[keyword]}")
        elif isinstance(node, ast.Dict):  # keywords on their way to **
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else ""
                if name in KEYWORDS and not literal(value, KEYWORDS[name]):
                    report(node, f"{name} is not {KEYWORDS[name]}")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
            continue
        name = dotted(node)
        head, last = name.split(".")[0], name.split(".")[-1]
        if name == "torch.load" and node not in good:
            report(node, "torch.load without weights_only=True")
        if name in BUILTINS or head in ("builtins", "__builtins__") and last in (*BUILTINS, "compile"):
            report(node, last)
        if last in NAMES or any(name == d or name.startswith(d + ".") for d in DOTTED):
            report(node, name)
        if head == "yaml" and name.count(".") == 1 and last not in YAML:
            report(node, name)
    return findings


def sources():
    """Yield every Python file of the repo, without environments and downloads of benchmarks."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if path != Path(__file__).resolve() and not parts[0].startswith(".") and parts[:2] != ("benchmarks", "peers"):
            yield path


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_unsafe_call(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


BAD = """
import torch; torch.load(p)
import torch; torch.load(p, weights_only=False)
import torch; torch.load(p, weights_only=flag)
import torch as t; t.load(p)
from torch import load; load(p)
from torch import load as read; read(p, map_location="cpu")
import torch; f = torch.load
import torch; torch.load(p, **options)
import torch; torch.load(p, **{"weights_only": False})
import torch; torch.load(p, **dict(weights_only=False))
from torch import *
import pickle
import pickle as p
from pickle import loads
import dill
import joblib
import marshal
import shelve
import cloudpickle
import importlib; importlib.import_module("pickle")
eval("1")
f = eval
exec(code)
compile(text, "f", "exec")
__import__("os")
import builtins; builtins.eval(x)
import numpy as np; np.load(p, allow_pickle=True)
import numpy as np; np.load(p, allow_pickle=flag)
import numpy as np; np.load(p, None, True)
import yaml; yaml.load(x)
import yaml; yaml.load(x, Loader=yaml.Loader)
import yaml; yaml.full_load(x)
from yaml import UnsafeLoader; UnsafeLoader(x)
import sympy; sympy.sympify(x)
from sympy.parsing.sympy_parser import parse_expr; parse_expr(x)
from sympy import lambdify; lambdify(x, y)
from sympy import S; S("x")
import os; os.system("ls")
import os; os.popen("ls")
import os; getattr(os, "system")("ls")
from os import system; system("ls")
import subprocess; subprocess.run("ls", shell=True)
import subprocess; subprocess.getoutput("ls")
archive.extractall(folder)
import shutil; shutil.unpack_archive(p)
import tempfile; tempfile.mktemp()
from tempfile import mktemp; mktemp()
import pandas as pd; pd.read_pickle(p)
import torch; torch.jit.load(p)
import torch; torch.hub.load("a", "b")
from torch.hub import load; load("a")
from urllib.request import urlopen
import requests
import socket
import torch; torch.serialization.add_safe_globals([x])
""".strip().splitlines()

GOOD = """
import torch; torch.load(p, map_location="cpu", weights_only=True)
from torch import load; load(p, weights_only=True)
model.eval(); torch.compile(model)
import re; re.compile("x"); cfg.compile
def wrap(model, compile=False): return compile
import yaml; yaml.safe_load(x); yaml.safe_dump(x); yaml.YAMLError
import numpy as np; np.load(p); np.load(p, "r", allow_pickle=False); np.save(p, x, False)
import json; json.load(f); json.loads(x)
import subprocess; subprocess.run(["ls"], shell=False)
# pickle.loads(x), eval(x)
x = "import pickle; eval(y)"
import os; os.path.join(a, b); os.environ
factory.mktemp("x")
""".strip().splitlines()


@pytest.mark.parametrize("source", BAD)
def test_the_lint_flags(source):
    findings = unsafe(f"'''doc'''\n{source}")
    assert findings and all(finding.startswith("line 2: ") for finding in findings)


@pytest.mark.parametrize("source", GOOD)
def test_the_lint_lets_pass(source):
    assert unsafe(source) == []


# ---- hostile checkpoints ---------------------------------------------------------------------------------------------


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def touch(canary):
    return Call(__import__("os").system, f"touch '{canary}'")


def good():
    return dict(kind="it", step=1, model_state=dict(w=torch.arange(12345.0)), optimizer_state={})


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path, contents, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def reduce_to_system(path, canary):
    torch.save(good() | dict(step=touch(canary)), path)


def reduce_to_eval(path, canary):
    torch.save(good() | dict(step=Call(eval, f"open({str(canary)!r}, 'w')")), path)


def getattr_chain(path, canary):
    torch.save(good() | dict(step=Call(getattr, Call(__import__, "os"), "system")), path)


def legacy(path, canary):
    torch.save(good() | dict(step=touch(canary)), path, _use_new_zipfile_serialization=False)


def raw_pickle(path, canary):
    path.write_bytes(pickle.dumps(touch(canary)))


def inside_the_optimizer(path, canary):
    torch.save(good() | dict(optimizer_state=dict(state={0: dict(exp_avg=[touch(canary)])})), path)


def instead_of_a_tensor(path, canary):
    torch.save(good() | dict(model_state=dict(w=touch(canary))), path)


def legacy_tar(path, canary):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(touch(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def torchscript(path, canary):
    torch.save(good() | dict(step=touch(canary)), path)
    contents = {name.replace("data.pkl", "constants.pkl"): content for name, content in entries(path).items()}
    code = f"def forward(self): torch.save(1, '{canary}')".encode()
    write_entries(path, contents | {"run/code/__torch__.py": code, "run/data.pkl": pickle.dumps(touch(canary))})


def object_array(path, canary):
    torch.save(good() | dict(step=np.array([touch(canary)], dtype=object)), path)


def deflated(path, canary):
    torch.save(good(), path)
    contents = {n: b"\0" * 2**28 if n.endswith("data/0") else c for n, c in entries(path).items()}
    write_entries(path, contents, zipfile.ZIP_DEFLATED)


def names_outside(path, canary):
    torch.save(good(), path)
    up = "../" * 20 + str(canary).lstrip("/")
    contents = {n.replace("data/0", up): c for n, c in entries(path).items()}
    write_entries(path, contents | {up: b"out", str(canary): b"out"})


def absurd_sizes(path, canary):
    torch.save(good(), path)
    number, absurd = b"M" + (12345).to_bytes(2, "little"), b"\x8a\x06" + (2**44).to_bytes(6, "little")
    contents = {n: c.replace(number, absurd) if n.endswith("data.pkl") else c for n, c in entries(path).items()}
    assert contents != entries(path)
    write_entries(path, contents)


def deep_nesting(path, canary):
    torch.save(good(), path)
    contents = {n: b"\x80\x02" + b"(" * 10**5 if n.endswith("data.pkl") else c for n, c in entries(path).items()}
    write_entries(path, contents)


PAYLOADS = [reduce_to_system, reduce_to_eval, getattr_chain, legacy, raw_pickle, inside_the_optimizer]
PAYLOADS += [instead_of_a_tensor, legacy_tar, torchscript, object_array, deflated, names_outside, absurd_sizes]
PAYLOADS += [deep_nesting]


def memory_mb():
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("make", PAYLOADS, ids=lambda f: f.__name__)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(make, forced, tmp_path, monkeypatch):
    if forced:  # this variable turns weights_only off where a call does not set it
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    make(path, canary)
    ways = [
        lambda: load_checkpoint(path, "it"),
        lambda: first_good([path], lambda path: load_checkpoint(path, "it")),
        lambda: find_checkpoint(str(path), False, [path], "it"),
        lambda: load_expert(path),
    ]
    for way in ways:
        memory, start = memory_mb(), time.process_time()
        with pytest.raises((CheckpointError, UsageError)) as error:
            way()
        assert time.process_time() - start < 2 and memory_mb() - memory < 200
        assert len(str(error.value).splitlines()) <= 3
        assert not canary.exists() and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_payloads_run_when_loaded_unsafely(tmp_path):
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    for make in (reduce_to_system, reduce_to_eval, legacy, inside_the_optimizer, instead_of_a_tensor, object_array):
        make(path, canary)
        torch.load(path, weights_only=False)
        assert canary.exists(), make.__name__
        canary.unlink()


# ---- hostile tokenizers and bundles ----------------------------------------------------------------------------------


def bpe(**changes):
    import tokenizers

    alphabet = ["<eos>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    model = dict(type="BPE", vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    return dict(pre_tokenizer=dict(type="ByteLevel")) | dict(model=model | changes)


def with_id(number):
    state = bpe()
    state["model"]["vocab"]["a"] = number
    return json.dumps(state)


TOKENIZERS = dict(
    id_beyond_the_vocabulary=lambda: with_id(10**6),
    negative_id=lambda: with_id(-1),
    id_that_is_no_number=lambda: with_id("7"),
    id_of_5000_digits=lambda: with_id(0).replace('"a": 0', '"a": ' + "9" * 5000),
    merge_of_unknown_tokens=lambda: json.dumps(bpe(merges=[["zz", "qq"]])),
    merge_of_three=lambda: json.dumps(bpe(merges=["a b c"])),
    nested=lambda: "[" * 10**5,
    hostile_pattern=lambda: json.dumps(bpe() | dict(pre_tokenizer=dict(type="Split", pattern=dict(Regex="(a+)+$")))),
    bytes_missing=lambda: json.dumps(bpe(vocab={"<eos>": 0, "a": 1})),
    list_of_nothing=lambda: "[]",
    not_json=lambda: "cos\nsystem\n(S'ls'\ntR.",
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(name, tmp_path):
    path, start = tmp_path / "bpe.json", time.process_time()
    path.write_text(TOKENIZERS[name]())
    with pytest.raises(DataError, match=re.escape(str(path))) as error:
        load_tokenizer(f"bpe:{path}")
    assert time.process_time() - start < 2 and len(str(error.value).splitlines()) <= 3


def test_the_tokenizer_without_changes_is_accepted(tmp_path):
    (tmp_path / "bpe.json").write_text(json.dumps(bpe()))
    assert load_tokenizer(f"bpe:{tmp_path / 'bpe.json'}").vocab_size == 257


def test_a_huge_tokenizer_is_refused_unread(tmp_path):
    with open(tmp_path / "bpe.json", "wb") as file:
        file.truncate(2**36)
    with pytest.raises(DataError, match="larger than 64 MB"):
        load_tokenizer(f"bpe:{tmp_path / 'bpe.json'}")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
BUNDLES = dict(
    apply="lr: !!python/object/apply:os.system ['touch CANARY']",
    new="lr: !!python/object/new:os.system ['touch CANARY']",
    name="lr: !!python/name:os.system",
    module="lr: !!python/module:os",
    laughs=LAUGHS,
)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_hostile_bundle_is_refused(name, tmp_path, capsys):
    canary, start = tmp_path / "canary", time.process_time()
    (tmp_path / "a.yaml").write_text(BUNDLES[name].replace("CANARY", str(canary)))
    with pytest.raises(SystemExit) as stop:
        from_cli(CONFIGS, argv=["--expert", "transformer", "--config", str(tmp_path / "a.yaml")], by="expert")
    assert stop.value.code == 2 and time.process_time() - start < 2 and not canary.exists()
    assert len(capsys.readouterr().err.splitlines()) <= 3
