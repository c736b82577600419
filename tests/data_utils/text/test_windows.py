"""Domain folders: formats and bad lines, split, windows against a plain reference, cache, order."""

import json
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

from data_utils import documents
from data_utils.errors import DataError, UsageError
from data_utils.text import windows as text
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer


def put(root, domain, texts, name="a", ending="\n"):
    folder = root / "data" / domain
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": t, "source": 3, "id": [None]}, ensure_ascii=False) for t in texts]
    (folder / f"{name}.jsonl").write_bytes("".join(line + ending for line in lines).encode("utf-8"))


def put_bytes(root, content, domain="code"):
    put(root, domain, [])
    (root / "data" / domain / "a.jsonl").write_bytes(content)


def load(root, tokenizer="bytes", lines=None, **changes):
    options = dict(domains=(), val_split=0.2, window=16, cache_dir=root / "checkpoints")
    say = (lambda line: None) if lines is None else lines.append
    return DomainText(root / "data", load_tokenizer(tokenizer), **(options | dict(say=say) | changes))


def sentences(seed, n):
    rng = np.random.default_rng(seed)
    return [f"{seed}.{i} " + "".join(rng.choice(list("abcdé 👍"), rng.integers(1, 60))) for i in range(n)]


def contents(data, split):
    """Return the set of documents of a split, read back from its streams."""
    ids = []
    for stream in data.streams[split]:
        tokens = np.zeros(stream.tokens, int)
        assert stream.copy(0, tokens) == stream.tokens
        ids += tokens.tolist()
    return set(data.tokenizer.decode([i if i != data.tokenizer.eos else 3 for i in ids]).split("\0")) - {""}


def counted(data, split):
    x, y = data.batch(split, range(data.windows(split)))
    return y[y != -100].tolist()


GOOD = b'{"text": "good line", "id": 1}\n'
OTHER = b'{"text": "another"}\n'


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_accepted_lines(tmp_path):
    put_bytes(
        tmp_path, b"\xef\xbb\xbf" + GOOD + b'{"text": "a\\u2028b\xe2\x80\xa8c", "id": {"x": []}}\r\n' + OTHER[:-1]
    )
    path = tmp_path / "data" / "code" / "a.jsonl"
    assert list(documents.read_documents(path)) == ["good line", "a\u2028b\u2028c", "another"]
    assert load(tmp_path).domains == ["code"]


MALFORMED = [
    (b'{"text": "x"\n', "invalid JSON"),
    (b'{"text": "a\nb"}\n', "invalid JSON"),
    (b"[" * 100_000 + b"\n", "invalid JSON"),
    (b'{"text": "x", "id": ' + b"9" * 5000 + b"}\n", "invalid JSON"),
    (b'["text"]\n', "found list"),
    (b"null\n", "found NoneType"),
    (b'{"txt": "x"}\n', "missing"),
    (b'{"text": 5}\n', "is int"),
    (b'{"text": null}\n', "is NoneType"),
    (b'{"text": "\xff"}\n', "invalid UTF-8"),
]


@pytest.mark.parametrize("line, reason", MALFORMED)
def test_malformed_lines_stop_or_are_counted(tmp_path, line, reason):
    put_bytes(tmp_path, GOOD + line + OTHER)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}"):
        load(tmp_path)
    for _ in range(2):  # the second time from the cache
        lines = []
        assert contents(load(tmp_path, lines=lines, skip_bad_lines=True), "train") <= {"good line", "another"}
        assert "a.jsonl:2:" in lines[-1]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}"):  # nor does a cache hide it
        load(tmp_path)


def test_truncated_last_line(tmp_path):
    put_bytes(tmp_path, GOOD + OTHER + b'{"text": "cut he')
    with pytest.raises(DataError, match=r"a\.jsonl:3: truncated last line"):
        load(tmp_path)
    load(tmp_path, skip_bad_lines=True)


def test_harmless_lines_are_counted_in_one_table(tmp_path):
    put_bytes(tmp_path, GOOD + b"\n  \n" * 4 + b'{"text": " \\n"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    put(tmp_path, "b", ["x", "y", "", ""])
    lines = []
    data = load(tmp_path, lines=lines)
    table = [line.split() for line in lines[-1].splitlines()]
    assert ["8", "blank", "line"] in table and ["3", "empty", "text"] in table and ["1", "lone", "surrogate"] in table
    assert lines[-1].count("ignored") == 5
    documents_read = contents(data, "train") | contents(data, "val")
    assert documents_read == {"good line", "a\ufffdb", "\U0001f600", "x", "y"}


def test_huge_line_in_bounded_memory_and_limit(tmp_path, monkeypatch):
    large = "word 1234 " * 500_000
    put_bytes(tmp_path, json.dumps({"text": large}).encode() + b"\n" + OTHER)
    tracemalloc.start()
    data = load(tmp_path, val_split=0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(stream.tokens for streams in data.streams.values() for stream in streams) >= 5_000_000
    assert peak < 80 * 2**20
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    put_bytes(tmp_path, OTHER + json.dumps({"text": large}).encode())
    with pytest.raises(DataError, match=r"a\.jsonl:2: line longer than 1000"):
        load(tmp_path, skip_bad_lines=True)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_layout(tmp_path):
    for domain in "b", "a", ".hidden":
        put(tmp_path, domain, sentences(1, 5))
    put(tmp_path, "a", sentences(2, 5), "z")
    (tmp_path / "data" / "root.jsonl").write_bytes(b"not read")
    (tmp_path / "data" / "a" / "note.txt").write_bytes(b"not read")
    assert load(tmp_path).domains == ["a", "b"]
    assert load(tmp_path, domains=("b",)).domains == ["b"]
    for both in ("b,a",), ("b", "a"), ("a,", "b", "a"):
        assert load(tmp_path, domains=both).domains == ["a", "b"]
    with pytest.raises(DataError, match="no domain c .*there are: a, b"):
        load(tmp_path, domains=("a", "c"))
    for name in "../data/a", "a/", "a\\b":
        with pytest.raises(UsageError, match="not a path"):
            load(tmp_path, domains=(name,))


def test_empty_domains(tmp_path):
    put(tmp_path, "full", sentences(1, 5))
    put(tmp_path, "empty", [])
    (tmp_path / "data" / "bare").mkdir()
    lines = []
    assert load(tmp_path, lines=lines).domains == ["full"]
    assert sum("holds no document" in line for line in lines) == 2
    for name in "empty", "bare":
        with pytest.raises(DataError, match=f"domain {name} .*holds no document"):
            load(tmp_path, domains=(name,))


def test_no_domain_shows_what_to_type(tmp_path):
    with pytest.raises(DataError, match="(?s)<domain>/.*jsonl.*prepare_data.py expert"):
        load(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match="(?s)mine.jsonl.*mkdir.*mv"):
        load(tmp_path)


def test_links_out_of_the_root_and_loops_are_not_followed(tmp_path):
    put(tmp_path, "a", sentences(1, 5))
    put(tmp_path / "other", "x", sentences(2, 5))
    root = tmp_path / "data"
    (root / "out").symlink_to(tmp_path / "other" / "data" / "x")
    (root / "loop").symlink_to("loop")
    (root / "a" / "b.jsonl").symlink_to(tmp_path / "other" / "data" / "x" / "a.jsonl")
    (root / "inside").symlink_to("a")
    lines = []
    assert load(tmp_path, lines=lines).domains == ["a", "inside"]
    assert sum("not followed" in line for line in lines) >= 3


def test_arguments(tmp_path):
    put(tmp_path, "a", sentences(1, 5))
    for val_split in 0, -0.1, 0.6, float("nan"):
        with pytest.raises(UsageError, match="--val_split"):
            load(tmp_path, val_split=val_split)


# ---- split -----------------------------------------------------------------------------------------------------------


def test_split_is_by_document_and_domain(tmp_path):
    texts = sentences(1, 50)
    put(tmp_path, "a", texts[:30] + texts[:7])
    put(tmp_path, "a", texts[30:], "b")
    first = load(tmp_path)
    train, val = contents(first, "train"), contents(first, "val")
    assert not train & val and train | val == set(texts) and len(val) == 10
    put(tmp_path, "new", sentences(2, 9))
    put(tmp_path, "a", texts[::-1])
    put(tmp_path, "a", texts[5:9], "b")
    changed = load(tmp_path)
    assert changed.hash != first.hash
    assert contents(load(tmp_path, domains=("a",)), "val") == val
    put(tmp_path / "few", "a", ["x", "y", "z"])
    assert len(contents(load(tmp_path / "few", val_split=0.01), "val")) == 1


def test_hash_names_the_data(tmp_path):
    put(tmp_path, "a", sentences(1, 9))
    put(tmp_path, "b", sentences(2, 9))
    first = load(tmp_path).hash
    assert first == load(tmp_path, window=8).hash
    assert len({first, load(tmp_path, val_split=0.3).hash, load(tmp_path, domains=("a",)).hash}) == 3


def test_single_document(tmp_path):
    one = "".join(chr(97 + i % 26) for i in range(199))  # 200 tokens with the end
    put(tmp_path, "a", [one, one])
    lines = []
    data = load(tmp_path, lines=lines, val_split=0.1)
    assert any("one document" in line for line in lines)
    train, val = counted(data, "train"), counted(data, "val")
    assert data.tokenizer.decode(val) == one[180:] and len(val) == 20
    assert data.streams["train"][0].tokens == 200 - 20 - 16 and set(train) <= {ord(c) + 3 for c in one}
    put(tmp_path, "a", ["short"])
    with pytest.raises(DataError, match="one document of 6 tokens, needed for train and val: 19"):
        load(tmp_path, val_split=0.1)
    put(tmp_path, "a", ["x" * 18])
    load(tmp_path, val_split=0.1)


# ---- windows ---------------------------------------------------------------------------------------------------------


def reference(data, sequence, split):
    """Windows of a list of tokens the slow way: [(inputs, targets)]."""
    size, end, rows = data.window, data.tokenizer.eos, []
    for wanted in range(0, len(sequence), size):
        start = max(0, min(wanted, len(sequence) - size))
        inputs = ([end] + sequence)[start : start + size]
        targets = sequence[start : start + size]
        if split == "val":
            targets = [-100 if start + i < wanted else t for i, t in enumerate(targets)]
        rows.append((inputs, targets + [-100] * (size - len(targets)), len(targets)))
    return rows


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("window", [1, 7, 16, 100_000])
def test_windows_are_those_of_a_plain_reference(tmp_path, tokenizer, window):
    texts = {"a": sentences(1, 40), "b": sentences(2, 3), "c": sentences(3, 12)}
    put(tmp_path, "a", texts["a"][:25])
    put(tmp_path, "a", texts["a"][25:], "b")
    put(tmp_path, "b", texts["b"], ending="\r\n")
    put(tmp_path, "c", texts["c"])
    data = load(tmp_path, tokenizer, window=window)
    chosen = contents(load(tmp_path, window=7), "val")
    encode, end = data.tokenizer.encode, data.tokenizer.eos
    for split in "train", "val":
        rows, owners = [], []
        for number, domain in enumerate(data.domains):
            documents_in = [t for t in texts[domain] if (t in chosen) == (split == "val")]
            expected = reference(data, [i for t in documents_in for i in [*encode(t), end]], split)
            rows, owners = rows + expected, owners + [number] * len(expected)
        assert data.windows(split) == len(rows)
        x, y = data.batch(split, range(len(rows)))
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(rows), window)
        for (inputs, targets, n), found_x, found_y in zip(rows, x.tolist(), y.tolist(), strict=True):
            assert found_y == targets and found_x[: min(n, len(inputs))] == inputs[:n]
            assert set(found_x[n:]) <= {end}
        assert data.domain(split, range(len(rows))).tolist() == owners
        pick = np.random.default_rng(0).integers(0, len(rows), 9)
        assert torch.equal(data.batch(split, pick)[0], x[pick]) and torch.equal(data.batch(split, pick)[1], y[pick])


def test_every_val_token_counts_once(tmp_path):
    texts = sentences(1, 60)
    put(tmp_path, "a", texts)
    for window in 5, 16, 33:
        data = load(tmp_path, window=window)
        stream = counted(data, "val")
        val = contents(data, "val")
        assert sorted(stream) == sorted(i for t in val for i in [*data.tokenizer.encode(t), data.tokenizer.eos])
        assert data.tokenizer.token_bytes[stream].sum() == sum(len(t.encode()) for t in val)


def test_domains_are_drawn_equally_often(tmp_path):
    for domain, n in ("a", 10), ("b", 60), ("c", 300):
        put(tmp_path, domain, sentences(n, n))
    data = load(tmp_path)
    order = data.order(0, 1, 20_000)
    assert order.shape == (20_000,) and order.dtype == np.int64 and order.max() < data.windows("train")
    shares = np.bincount(data.domain("train", order).numpy()) / 20_000
    assert abs(shares - 1 / 3).max() < 0.02
    assert (order == data.order(0, 1, 20_000)).all()
    for other in data.order(0, 2, 20_000), data.order(1, 1, 20_000):
        assert (order != other).any()


def test_describe_names_every_domain(tmp_path):
    put(tmp_path, "a", sentences(1, 9))
    put(tmp_path, "b", sentences(2, 9))
    rows = [line.split() for line in load(tmp_path).describe().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["a", "9"], ["b", "9"]]


# ---- cache -----------------------------------------------------------------------------------------------------------


def refuse(*_):
    raise AssertionError("tokenized again")


def test_second_start_tokenizes_nothing(tmp_path, monkeypatch):
    put(tmp_path, "a", sentences(1, 9))
    put(tmp_path, "b", sentences(2, 9))
    first = load(tmp_path)
    monkeypatch.setattr(text, "_tokenize", refuse)
    again = load(tmp_path)
    assert torch.equal(again.batch("train", [0, 1])[0], first.batch("train", [0, 1])[0])
    load(tmp_path, domains=("a",), val_split=0.4, window=8)
    put(tmp_path, "a", sentences(1, 10))
    with pytest.raises(AssertionError, match="tokenized again"):
        load(tmp_path)


def test_damaged_or_partial_cache_is_built_again(tmp_path):
    put(tmp_path, "a", sentences(1, 9))
    x = load(tmp_path).batch("train", [0, 1])[0]
    for kind in "bin", "npz":
        for damage in (lambda path: path.unlink()), (lambda path: os.truncate(path, path.stat().st_size // 2)):
            damage(next((tmp_path / "data" / ".cache").glob(f"*.{kind}")))
            lines = []
            assert torch.equal(load(tmp_path, lines=lines).batch("train", [0, 1])[0], x)
            assert any("tokenizing" in line for line in lines)
    assert not list((tmp_path / "data" / ".cache").glob("*.tmp-*"))


def test_unwritable_data_folder_puts_the_cache_elsewhere(tmp_path):
    put(tmp_path, "a", sentences(1, 9))
    (tmp_path / "data" / ".cache").write_text("a file where a folder should be")
    load(tmp_path)
    assert list((tmp_path / "checkpoints" / ".cache").glob("*.npz"))


def test_other_ranks_wait_for_rank_0_and_are_silent(tmp_path, monkeypatch):
    put(tmp_path, "a", sentences(1, 9))
    lines, loaded = [], []
    waiting = threading.Thread(target=lambda: loaded.append(load(tmp_path, rank=1, lines=lines)))
    waiting.start()
    time.sleep(0.3)
    assert not loaded
    first = load(tmp_path)
    waiting.join(10)
    assert loaded[0].hash == first.hash and not lines
