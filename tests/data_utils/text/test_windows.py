"""Domain folders: formats and bad lines, split, windows against a plain reference, cache, order."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

import prepare_data
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
    (tmp_path / "data" / "a" / "note.pdf").write_bytes(b"not read")
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


def test_links_are_followed_but_no_loops(tmp_path):
    put(tmp_path, "a", sentences(1, 5))
    put(tmp_path / "other", "x", sentences(2, 5))
    root = tmp_path / "data"
    (root / "out").symlink_to(tmp_path / "other" / "data" / "x")
    (root / "a" / "b.jsonl").symlink_to(tmp_path / "other" / "data" / "x" / "a.jsonl")
    (root / "inside").symlink_to("a")
    loops = [root / "loop", root / "up", root / "a" / "down", root / "a" / "broken.jsonl"]
    for link, target in zip(loops, ["loop", tmp_path, root / "a", "nothing"], strict=True):
        link.symlink_to(target)
    domains, ignored = documents.find_domains(root)
    names = {domain: [path.name for path in paths] for domain, paths in domains.items()}
    assert names == dict(a=["a.jsonl", "b.jsonl"], inside=["a.jsonl", "b.jsonl"], out=["a.jsonl"])
    assert set(loops) <= set(ignored)


def test_arguments(tmp_path):
    put(tmp_path, "a", sentences(1, 5))
    for val_split in 0, -0.1, 0.6, float("nan"):
        with pytest.raises(UsageError, match="--val_split"):
            load(tmp_path, val_split=val_split)


# ---- other files than .jsonl -----------------------------------------------------------------------------------------


def test_a_folder_of_jsonl_keeps_its_order_hash_and_cache(tmp_path):
    """Runs and caches from before other files were read go on as they were."""
    for domain in "b", "a":
        for name in "z", "B", "a1", "a":
            put(tmp_path, domain, sentences(len(name), 5), name)
    data = load(tmp_path)
    contents = [
        [
            d,
            *(
                hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted((tmp_path / "data" / d).glob("*.jsonl"))
            ),
        ]
        for d in "ab"
    ]
    assert data.hash == hashlib.sha256(json.dumps([0.2, contents]).encode()).hexdigest()
    cached = {path.name for path in (tmp_path / "data" / ".cache").glob("*.npz")}
    assert cached == {f"{digest}-{data.tokenizer.hash}.npz" for _, *digests in contents for digest in digests}


def kinds(folder, texts):
    """Write the same documents as a file of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dict(text=text, n=1)) + "\n" for text in texts).encode()
    table = io.StringIO()
    csv.writer(table).writerows([["n", "text"], *enumerate(texts)])
    (folder / "a.JSONL").write_bytes(lines)
    (folder / "b.jsonl.GZ").write_bytes(gzip.compress(lines))
    (folder / "c.csv").write_bytes(b"\xef\xbb\xbf" + table.getvalue().encode())
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(dict(text=texts, n=1)).to_parquet(folder / "e.parquet")


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    texts = ['He said "no", or;\nwas it\ta | tab?', "caf\u00e9 \u2028 \U0001f600", "plain", "NA", "-1.5"]
    kinds(tmp_path / "data" / "dom" / "sub" / "deeper", texts)
    (paths,) = documents.find_domains(tmp_path / "data")[0].values()
    assert {path.name for path in paths} == {"a.JSONL", "b.jsonl.GZ", "c.csv", "e.parquet"}
    for path in paths:
        assert list(documents.read_documents(path)) == texts, path.name
    data = load(tmp_path)
    assert data.domains == ["dom"] and contents(data, "train") | contents(data, "val") == set(texts)


@pytest.mark.parametrize("separator", ",;\t|")
def test_csv(tmp_path, separator):
    path = tmp_path / "a.csv"
    path.write_text(separator.join(["id", "body"]) + f"\r\n1{separator}one\r\n2{separator}\r\n3{separator}three\r\n")
    problems = {}
    assert list(documents.read_documents(path, problems, text_field="body")) == ["one", "three"]
    assert problems == {"empty text": [1, [f"{path}:3: skipped"]]}
    with pytest.raises(DataError, match="no column text; there are: id, body(?s:.*)--text_field"):
        list(documents.read_documents(path))
    with pytest.raises(DataError, match="no column extract; (?s:.*)\nfix: one name for --text_field that all files"):
        list(documents.read_documents(path, text_field="extract"))
    with pytest.raises(DataError, match="no column bodi; (?s:.*)\ntry: --text_field body"):
        list(documents.read_documents(path, text_field="bodi"))
    path.write_text(f"text\nsun, moon{separator}stars\nrain\n" if separator == "," else "text\na,b\nrain\n")
    with pytest.raises(DataError, match="a.csv:2: bad row: more values than the 1 columns"):
        list(documents.read_documents(path))
    assert list(documents.read_documents(path, skip_bad_lines=True)) == ["rain"]
    path.write_text('text\n"open\n')
    with pytest.raises(DataError, match="a.csv:.*(?s:.*)mend the quotes"):
        list(documents.read_documents(path))


def test_a_text_file_is_one_document(tmp_path):
    folder = tmp_path / "data" / "books"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r")
    (folder / "b.MD").write_bytes("# Caf\u00e9\n".encode())
    (folder / "c.txt").write_bytes(b"\n")
    data = load(tmp_path)
    assert contents(data, "train") | contents(data, "val") == {"One.\n\nTwo.\n", "# Caf\u00e9\n"}
    same = load(tmp_path).hash
    (folder / "b.MD").rename(folder / "b.jsonl")  # the same bytes, read in another way
    with pytest.raises(DataError, match="b.jsonl:1: invalid JSON"):
        load(tmp_path)
    (folder / "b.jsonl").rename(folder / "b.txt")
    assert load(tmp_path).hash == same


def test_text_field(tmp_path):
    put_bytes(tmp_path, b'{"content": "c1", "text": "t1"}\n{"content": "c2", "text": "t2"}\n')
    first, second = load(tmp_path), load(tmp_path, text_field="content")
    assert contents(first, "train") | contents(first, "val") == {"t1", "t2"}
    assert contents(second, "train") | contents(second, "val") == {"c1", "c2"} and first.hash != second.hash
    with pytest.raises(DataError, match='a.jsonl:1: "body" is missing; fields: content, text; .*--text_field'):
        load(tmp_path, text_field="body")


def test_ignored_files_are_named_in_one_line(tmp_path):
    put(tmp_path, "a", sentences(1, 5))
    lines = []
    load(tmp_path, lines=lines)
    assert not any("ignored:" in line for line in lines)
    root = tmp_path / "data"
    for name in "loose.txt", "SOURCES.md", "a/b.pdf", "a/sub/c.json", "a/.hidden.pdf", "a/d.jsonl.bak":
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    lines = []
    load(tmp_path, lines=lines)
    (line,) = [line for line in lines if "ignored:" in line]
    assert line.startswith("ignored: 4 files: ") and "loose.txt" in line
    assert "only .jsonl .txt .md .csv .parquet in domain folders" in line
    with pytest.raises(DataError, match="loose.txt is a file\nfix: a folder of domains"):
        documents.find_domains(root / "loose.txt")
    (root / "a" / "a.jsonl").unlink()
    (root / "loose.txt").unlink()
    with pytest.raises(DataError, match="no domain in .*b.pdf"):
        load(tmp_path)


def test_check_and_tokenizer_read_the_same_files(tmp_path, capsys):
    put_bytes(tmp_path, b'{"body": "some words, some words"}\n')
    folder = tmp_path / "data" / "code"
    (folder / "sub").mkdir()
    (folder / "sub" / "b.csv").write_text("body,n\nsome more words,1\n")
    ignored = [folder / name for name in ("a.pdf", "b.json", "c.png", "sub/d.html")]
    for path in ignored:
        path.write_text("x")
    prepare_data.main(prepare_data.CheckConfig(data_dir=str(tmp_path / "data"), text_field="body"))
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split() == ["code", "2", "0.00"]
    assert [line for line in shown.splitlines() if "ignored" in line] == [f"ignored: {path}" for path in ignored]
    out = str(tmp_path / "tokenizer.json")
    options = dict(data_dir=str(tmp_path / "data"), text_field="body", vocab_size=260, out=out)
    prepare_data.main(prepare_data.TokenizerConfig(**options))
    shown = capsys.readouterr().out
    assert "ignored: 4 files" in shown and "trained on 2 files" in shown
    put_bytes(tmp_path, b'{"text": "of another field"}\n', "other")
    prepare_data.main(prepare_data.CheckConfig(data_dir=options["data_dir"], domains=("code",), text_field="body"))
    prepare_data.main(prepare_data.TokenizerConfig(**options, domains=("code",)))
    shown = capsys.readouterr().out
    assert "other" not in shown and "trained on 2 files" in shown and "--domains code --tokenizer" in shown
    with pytest.raises(DataError, match="no domain cod in .*; there are: code, other"):
        prepare_data.main(prepare_data.CheckConfig(data_dir=options["data_dir"], domains=("cod",)))
    with pytest.raises(UsageError, match="--domains: folders of --data_dir, which --source replaces"):
        prepare_data.main(prepare_data.TokenizerConfig(**options | dict(source=out), domains=("code",)))
    assert documents.find_domains(options["data_dir"], (",",)) == documents.find_domains(options["data_dir"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_other_encodings_are_refused_and_the_advice_mends_them(tmp_path, name, encoding):
    document = "\u00fcber die Stra\u00dfe, caf\u00e9"
    text = {"a.txt": document, "a.csv": f'text\n"{document}"\n'}.get(name, f'{{"text": "{document}"}}\n')
    path = tmp_path / "my data" / "dom" / name
    path.parent.mkdir(parents=True)
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    word = "CP1252" if encoding == "cp1252" else "UTF-16, convert it: iconv"
    with pytest.raises(DataError, match=word) as error:
        list(documents.read_documents(path))
    command = str(error.value).split("\ntry: ")[1]
    if command == "--skip_bad_lines":  # only this line has been read
        command = documents.iconv(path, "CP1252").split("\ntry: ")[1]
    subprocess.run(["sh", "-c", command], check=True)
    assert list(documents.read_documents(path)) == [document]
    domains, ignored = documents.find_domains(tmp_path / "my data")
    assert domains == {"dom": [path]} and len(ignored) == 1


@pytest.mark.parametrize("language", ["\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, ", "word "])
def test_utf16_without_a_mark_is_seen_by_its_nuls_and_none_reaches_a_document(tmp_path, language):
    path = tmp_path / "a.txt"
    for encoding in "utf-16-le", "utf-16-be":
        path.write_bytes((language * 9).encode(encoding))
        with pytest.raises(DataError, match="UTF-16, convert it"):
            list(documents.read_documents(path))
    path.write_bytes(b"much text \n" * 90 + b"one \0 byte\n")
    with pytest.raises(DataError, match="a.txt:91: .*NUL"):
        list(documents.read_documents(path))
    path.write_bytes("\u00e9t\u00e9\n".encode() * 9 + b"\xff\n")
    with pytest.raises(DataError, match="a.txt:10: invalid UTF-8(?s:.*)mend the line"):  # iconv would spoil the others
        list(documents.read_documents(path))


def test_a_damaged_gz_file_is_an_error(tmp_path):
    content = gzip.compress((GOOD * 1000) + bytes(range(256)) * 9)
    for damaged in content[: len(content) // 2], b"no gzip", content[:30] + b"xxxx" + content[34:]:
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="a.jsonl.gz: damaged"):
            list(documents.read_documents(tmp_path / "a.jsonl.gz", skip_bad_lines=True))


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


def test_a_folder_of_many_files_is_tokenized_in_one_line(tmp_path):
    put(tmp_path, "few", sentences(1, 9))
    for number in range(9):
        (tmp_path / "data" / "many").mkdir(exist_ok=True)
        (tmp_path / "data" / "many" / f"{number}.txt").write_text(f"Text number {number} has a few words. " * 9)
    lines = []
    load(tmp_path, lines=lines)
    tokenized = [line for line in lines if "tokenizing" in line]
    assert len(tokenized) == 2 and "the 9 files of" in tokenized[1] and "many" in tokenized[1]


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
