"""Stories: one way to tell each, names that the page gives away; code and rows: pieces as they stand in the files."""

import itertools
import math
import random
import re
import sys

import numpy as np
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.pages import passages as texts
from data_utils.pages import tasks
from data_utils.pages.render import to_symbols, to_text
from models.glyphs import END, HOLE, PADDING

SMALL = dict(page_rows=2, page_cols=24, text_source="stories", stories="", code_dir="", arc_set="agi1", arc_side=10)
CODE = '''"""Counts words; "count" is in a string."""

import collections


def count(words, most):
    # most words come once
    counter = collections.Counter(words)
    return counter.most_common(most), len(words)
'''


def opened(*names, **more):
    return tasks.open_tasks(names, **SMALL | more)


def pattern(parts):
    """A template as a pattern, written without the module's own."""
    words = texts.WORDS | dict(hero=["[A-Z][a-z]{3,4}"])
    return re.compile("".join(f"({'|'.join(words[p])})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def test_a_sentence_is_told_in_one_way_only():
    """Else its probability would be a sum, and the floor too high."""
    assert sum(map(len, texts.TEMPLATES.values())) == 60
    patterns = [(kind, parts, pattern(parts)) for kind in texts.TEMPLATES for parts in texts.TEMPLATES[kind]]
    draw = random.Random(0)
    for kind in texts.TEMPLATES:
        for _ in range(400):
            text, nats = texts.sentence(draw, kind, texts.cast_of(draw)[0])
            fitting = [(kind, parts) for kind, parts, shape in patterns if shape.fullmatch(text)]
            assert len(fitting) == 1 and fitting[0][0] == kind
            slots = [slot for slot in fitting[0][1][1::2] if slot not in texts.CAST]
            combinations = math.prod(len(texts.WORDS[slot]) for slot in slots) * len(texts.TEMPLATES[kind])
            assert nats == pytest.approx(math.log(combinations)) and len(text) <= texts.longest(kind)
    assert all(len(set(words)) == len(words) for words in texts.WORDS.values())


@pytest.mark.parametrize("cells", [48, 200, 448])
def test_stories_fit_and_end_with_the_cast(cells):
    draw, lengths = random.Random(1), set()
    for _ in range(200):
        cast, cast_nats = texts.cast_of(draw)
        text, nats, end, end_nats = texts.story(draw, cells, cast)
        assert len(text) <= cells and len(end) < tasks.CONTINUED and nats > math.log(20) - 1e-9
        assert all(name in text and name in end for name in cast.values())
        assert texts.ending(end) == (cast, pytest.approx(end_nats))
        assert cast_nats == pytest.approx(math.log(14 * 4 * 13 * 5 * 4 * 59 * 42), abs=0.1)
        lengths.add(text.count("."))
    assert (max(lengths) > 8) == (cells == 448) and (max(lengths) < 3) == (cells == 48)


def test_the_probabilities_of_stories_sum_to_one():
    """Of last sentences, of which there are few."""
    draw, cast = random.Random(2), dict(hero="Bola", thing="kite", place="mill")
    closings = [texts.sentence(draw, "closing", cast) for _ in range(4000)]
    assert sum(math.exp(-nats) for nats in dict(closings).values()) == pytest.approx(1, abs=0.02)


def test_what_kind_of_name_comes_next_is_known():
    """Two endings never agree up to a name of one and not of the other: else no reader could copy it surely."""
    shapes = []
    for parts in texts.TEMPLATES["closing"]:
        assert sorted(slot for slot in parts[1::2] if slot in texts.CAST) == sorted(texts.CAST)
        shapes.append(parts[0])
    for a, b in itertools.permutations(shapes, 2):
        assert not b.startswith(a), (a, b)


def test_pages_of_stories():
    sources = opened("read", "continue")
    nats = texts.floor([sources["continue"].make(i, "test", 0).target for i in range(50)])
    assert (nats > math.log(16) - 1e-9).all() and np.isnan(texts.floor([sources["read"].make(0, "train", 0).target]))[0]
    for i in range(50):
        sample = sources["continue"].make(i, "test", 0)
        page, end = to_text(sample.page), to_text(sample.target)
        assert all(name in page for name in texts.ending(end)[0].values())
        assert sample.target[len(end)] == END and (sample.target[len(end) + 1 :] == PADDING).all()
        read = sources["read"].make(i, "test", 0)
        assert (read.target == read.page.reshape(-1)).all() and len(to_text(read.page)) == 48


def test_code_as_it_stands_in_the_files(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(CODE.replace("count", f"count{i}"))
    (tmp_path / "short.py").write_text("x = 1\n")
    sources = opened("read", "continue", "fill", text_source="code", code_dir=str(tmp_path), page_rows=4)
    files = texts.code_files(tmp_path)
    assert len(files) == 61 and len(sources["read"].spec["sources"][0]["files"]) == 60
    for i in range(40):
        sample = sources["continue"].make(i, "train", 0)
        piece = to_text(sample.page) + to_text(sample.target)
        assert len(piece) == 96 + 64 and any(piece in text for text in files.values())
        sample = sources["fill"].make(i, "train", 0)
        page, name = to_text(sample.page), to_text(sample.target)
        filled = page.replace("_" * len(name), name, 1) if (sample.page == HOLE).sum() == len(name) else ""
        assert any("\n" + filled in "\n" + text for text in files.values())
        assert re.search(rf"\b{name}\b", page) and name not in ("string", "come", "import", "return")


def test_names_are_not_looked_for_in_strings_and_comments(tmp_path):
    (tmp_path / "m.py").write_text(CODE)
    task = opened("fill", text_source="code", code_dir=str(tmp_path), page_rows=1)["fill"].task
    passages = texts.Passages(task, texts.code_files(tmp_path), by_lines=True)
    first, last = passages._names(0)
    names = [CODE[a:b] for a, b in zip(first, last, strict=True)]
    expected = "collections count words most counter collections Counter words counter most_common most len words"
    assert names == expected.split()
    assert texts.words("a1 = _b(c.d) # 2x") == ["a1", "_b", "c", "d"]


def test_the_library_is_read_without_its_tests():
    files = texts.code_files()
    assert len(files) > 300 and "json/decoder.py" in files
    assert not [name for name in files if "/test" in name or "encodings" in name or "site-packages" in name]
    for text in list(files.values())[:50]:
        assert to_text(to_symbols(text)) == text
    assert "test" not in sys.modules


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_stories_of_your_own(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    rows = [f"Story {i} has {i * i} words, of which {i + 7} are long and the others are short." for i in range(90)]
    lines = [f'{{"text": "{row}"}}' for row in rows] if suffix == ".jsonl" else rows
    path.write_text("\n".join([*lines, ""]))
    assert list(texts.story_rows(path).values()) == rows
    source = opened("read", stories=str(path))["read"]
    for split in ("train", "test"):
        assert any(to_text(source.make(3, split, 0).page) in row for row in rows)
    assert source.spec["sources"][0]["rows"] == 90


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_signs_that_no_page_shows_are_counted(tmp_path, suffix, capfd):
    path, letters = tmp_path / f"mine{suffix}", "\u0436" * 20

    def texts_of(text):
        lines = [f'{{"text": "{text}"}}' if suffix == ".jsonl" else text] * 2
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
        return list(texts.story_rows(path).values())

    assert texts_of("a" * 60) == ["a" * 60] * 2 and not capfd.readouterr().err
    assert texts_of("a" * 60 + letters) == ["a" * 60 + "?" * 20] * 2
    assert "40 of 160 characters (25.00%) have no sign on a page and become ?" in capfd.readouterr().err
    assert texts_of("a" * 20 + letters)
    with pytest.raises(DataError, match=r"40 of 78 characters \(51%\) have no sign on a page"):
        texts_of("a" * 19 + letters)
    for number, text in enumerate(("x = 1\n", f"# {letters}\n")):
        (tmp_path / f"m{number}.py").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="--code_dir .*20 of 29 characters"):
        texts.code_files(tmp_path)


def test_errors_of_files(tmp_path):
    def refused(match, error=DataError, names=("read",), **more):
        with pytest.raises(error, match=match) as caught:
            opened(*names, **more)["read"].make(0, "test", 0)
        assert len(str(caught.value).split("\n")) <= 3

    empty, bad, broken, short = (tmp_path / name for name in ("empty.txt", "bad.txt", "broken.jsonl", "short.txt"))
    empty.write_text("\n\n")
    bad.write_bytes(b"fine\n\xff\n")
    broken.write_text('{"text": "fine"}\n{"text": \n')
    short.write_text("too short\n" * 3)
    refused("no text in it", stories=str(empty))
    refused("bad.txt:2: invalid UTF-8", stories=str(bad))
    refused("broken.jsonl:2: invalid JSON", stories=str(broken))
    refused("0 texts of 48 or more characters, of 3", stories=str(short))
    refused("No such file", stories=str(tmp_path / "none.txt"))
    refused("expected a .txt or .jsonl", stories=str(tmp_path / "some.csv"))
    refused("no .py file", text_source="code", code_dir=str(tmp_path))
    (tmp_path / "m.py").write_text("x = 2\n" * 20)
    refused("20000 of them of the other split,\nfrom 1 texts", text_source="code", code_dir=str(tmp_path))
    (tmp_path / "n.py").write_bytes(b"x = 1\n# \xff\n")
    refused("n.py:2: invalid UTF-8", text_source="code", code_dir=str(tmp_path))
    refused("40 cells, stories need 48", UsageError, page_cols=20)
