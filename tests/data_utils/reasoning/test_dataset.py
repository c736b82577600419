"""Rows and batches of train_hrm.py: a plain loop as reference, both formats, bad lines, cache, leaks, orders."""

import json
import os

import numpy as np
import pytest
import torch

from data_utils.errors import DataError, UsageError
from data_utils.reasoning import dataset as pairs
from data_utils.reasoning.arithmetic import build_synthetic_dataset
from data_utils.reasoning.dataset import Pairs, from_rows, open_pairs, open_splits, pad_batch
from data_utils.tokenizer import SimpleTokenizer

META = dict(vocab_size=98, pad_id=0, bos_id=1, eos_id=2, max_seq_len=0)


def naive_batch(rows, pad_id, most):
    rows = [[list(map(int, ids))[: most or None] for ids in row] for row in rows]
    s, t = max(len(row[0]) for row in rows), max(len(row[2]) for row in rows)
    columns = dict(encoder_ids=[], decoder_input_ids=[], labels=[], encoder_mask=[], decoder_mask=[])
    for encoder_ids, inputs, labels in rows:
        columns["encoder_ids"].append(encoder_ids + [pad_id] * (s - len(encoder_ids)))
        columns["decoder_input_ids"].append(inputs + [pad_id] * (t - len(inputs)))
        columns["labels"].append(labels + [-100] * (t - len(labels)))
        columns["encoder_mask"].append([1] * len(encoder_ids) + [0] * (s - len(encoder_ids)))
        columns["decoder_mask"].append([1] * len(labels) + [0] * (t - len(labels)))
    return {name: torch.tensor(x) for name, x in columns.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == torch.int64 and torch.equal(a[k], b[k]) for k in a)


def some_rows(n, with_inputs=False, seed=0):
    """Return rows of random ids, pad_id among them; with_inputs: some have other decoder inputs than usual."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        encoder_ids, labels = (rng.integers(0, 98, rng.integers(1, 12)).tolist() for _ in range(2))
        inputs = [1, *labels[:-1]]
        rows.append((encoder_ids, inputs[::-1] if with_inputs and i % 3 else inputs, labels))
    return rows


def write(folder, train, val=(), meta=META):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in dict(train=train, val=val).items():
        names = ("encoder_ids", "decoder_input_ids", "labels")
        lines = [json.dumps(dict(zip(names, row, strict=True))) if isinstance(row, tuple) else row for row in rows]
        lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / "tokenizer.json").write_text(json.dumps(SimpleTokenizer().to_dict()))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def quiet(*words):
    pass


@pytest.mark.parametrize("most", [0, 5])
def test_pad_batch_is_a_loop(most):
    rows = some_rows(20, with_inputs=True)
    assert equal(pad_batch(rows, pad_id=0, max_seq_len=most), naive_batch(rows, 0, most))
    mask = pad_batch([([0, 0], [1, 0], [0, 2])], pad_id=0)["encoder_mask"]
    assert mask.tolist() == [[1, 1]]  # a real id that equals pad_id


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("most", [0, 6])
def test_batches_of_a_folder_and_of_memory_are_those_of_a_loop(tmp_path, with_inputs, most, capsys):
    train, val = some_rows(40, with_inputs), some_rows(9, with_inputs, seed=1)
    folder = write(tmp_path / "data", train, val)
    data = open_pairs(folder, max_seq_len=most)
    long = sum(max(len(row[0]), len(row[2])) > 6 for row in train + val)
    assert (f"{long} rows are longer" in capsys.readouterr().out) == bool(most)
    index = np.random.default_rng(1).permutation(40)[:16]
    for opened in [data] if with_inputs else [data, from_rows(train, val, SimpleTokenizer(), max_seq_len=most)]:
        assert opened.rows("train") == 40 and opened.rows("val") == 9 and not opened.leak
        assert equal(opened.batch("train", index), naive_batch([train[i] for i in index], 0, most))
        assert equal(opened.batch("val", range(9)), naive_batch(val, 0, most))
    columns = np.load(folder / ".cache" / "train.idx.npy").shape[1]
    assert columns == (3 if with_inputs else 2)


def test_old_names_and_absent_decoder_inputs(tmp_path):
    lines = ['{"input_ids": [5, 6], "targets": [7, 2]}', '{"encoder_ids": [5], "labels": [2]}']
    data = open_pairs(write(tmp_path / "data", lines), say=quiet)
    expected = [([5, 6], [1, 7], [7, 2]), ([5], [1], [2])]
    assert equal(data.batch("train", [0, 1]), naive_batch(expected, 0, 0)) and data.rows("val") == 0


def test_every_way_to_write_a_line_gives_the_same_row(tmp_path):
    row = dict(encoder_ids=[5, 0, 97], decoder_input_ids=[1, 40, 0], labels=[40, 0, 2])
    one = dict(encoder_ids=[0], decoder_input_ids=[1], labels=[10])
    lines = []
    for line in [json.dumps(row), json.dumps(one)]:
        compact = line.replace(" ", "")
        lines += [line, compact, line + "\r", compact + " ", line.replace(",", " ,"), compact.replace(",", ",\t")]
    data = open_pairs(write(tmp_path / "data", lines), say=quiet)
    expected = [tuple(row.values())] * 6 + [tuple(one.values())] * 6
    assert equal(data.batch("train", range(12)), naive_batch(expected, 0, 0))


def test_order_is_a_permutation_of_seed_and_epoch():
    data = from_rows(some_rows(50), some_rows(5), SimpleTokenizer())
    first = data.order(3, 0)
    assert sorted(first) == list(range(50)) and (first == data.order(3, 0)).all()
    assert (first != data.order(3, 1)).any() and (first != data.order(4, 0)).any()
    assert data.hash != from_rows(some_rows(51), some_rows(5), SimpleTokenizer()).hash


BAD = [
    ('{"encoder_ids": [1, 98], "labels": [2]}', r"id 98 is not in \[0, 98\)"),
    ('{"encoder_ids": [1, -1], "labels": [2]}', "id -1"),
    ('{"encoder_ids": [1.5], "labels": [2]}', "expected integers"),
    ('{"encoder_ids": ["1"], "labels": [2]}', "expected integers"),
    ('{"encoder_ids": [[1], [2, 3]], "labels": [2]}', ""),
    ('{"encoder_ids": 3, "labels": {}}', "expected integers"),
    ('{"encoder_ids": [99999999999999999999999], "labels": [2]}', "expected integers"),
    ('{"encoder_ids": [1], "labels": []}', "no labels"),
    ('{"encoder_ids": [1]}', "no labels"),
    ('{"labels": [1]}', "no encoder_ids"),
    ('{"encoder_ids": [1], "decoder_input_ids": [1], "labels": [3, 2]}', "1 decoder_input_ids, 2 labels"),
    ("[1]", "expected an object, found list"),
    ("{", "invalid JSON"),
    ("[" * 100_000, "invalid JSON"),
    (b'{"encoder_ids": "\xff"}', "invalid UTF-8"),
    ('{"encoder_ids":[5],"decoder_input_ids":[1,98],"labels":[98,2]}', r"id 98 is not in \[0, 98\)"),
    ('{"encoder_ids":[5],"decoder_input_ids":[1,2],"labels":[3]}', "2 decoder_input_ids, 1 labels"),
    *[(json.dumps(dict(encoder_ids=[5], decoder_input_ids=[1, 7], labels=[7, 2])).replace("[5]", f"[{ids}]"), reason)
      for ids, reason in [("1,,2", "invalid JSON"), ("1,", "invalid JSON"), (",1", "invalid JSON"), ("01", "JSON"),
                          ("1,02", "invalid JSON"), ("1 2", "invalid JSON"), ("", "no encoder_ids"), ("1,-2", "id -2"),
                          ("9" * 19, "is not in"), ("9" * 20, "expected integers|is not in")]],
]  # fmt: skip


@pytest.mark.parametrize("line, reason", BAD, ids=range(len(BAD)))
def test_bad_lines_are_named_or_counted(tmp_path, line, reason):
    folder = write(tmp_path / "data", [*some_rows(3), line, *some_rows(2)])
    with pytest.raises(DataError, match=f"train.jsonl:4: .*{reason}.*(?s:.*)skip_bad_lines"):
        open_pairs(folder, say=quiet)
    lines = []
    data = open_pairs(folder, skip_bad_lines=True, say=lines.append)
    assert data.rows("train") == 5 and any("1 bad lines" in words for words in lines)
    with pytest.raises(DataError, match="train.jsonl:4:"):  # a cache made with --skip_bad_lines hides nothing
        open_pairs(folder, say=quiet)


def test_the_cache_is_used_until_the_file_changes_and_falls_back(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", some_rows(10), some_rows(2))
    first = open_pairs(folder, say=quiet)
    monkeypatch.setattr(pairs, "in_order", None)  # reading again would fail
    assert open_pairs(folder, say=quiet).hash == first.hash
    assert open_pairs(folder, say=quiet, rank=1).hash == first.hash
    monkeypatch.undo()
    write(folder, some_rows(12), some_rows(2))
    second = open_pairs(folder, say=quiet)
    assert second.rows("train") == 12 and second.hash != first.hash
    monkeypatch.setattr(pairs, "_writable", lambda place: place.parent == tmp_path / "run")
    write(folder, some_rows(13), some_rows(2))
    assert open_pairs(folder, cache_dir=tmp_path / "run", say=quiet).rows("train") == 13
    assert (tmp_path / "run" / ".cache" / "meta.json").exists()


def test_workers_read_the_same_bytes_and_print_heartbeats(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", some_rows(300), some_rows(30))
    split, lines = pairs.sources.split_tasks, []
    monkeypatch.setattr(pairs.sources, "split_tasks", lambda files: split(files, 2000))  # many tasks
    monkeypatch.setattr(pairs, "HEARTBEAT", 100)
    open_splits(folder, say=lines.append)
    alone = {p.name: p.read_bytes() for p in (folder / ".cache").glob("*.[bn]*")}
    assert [words.split(": ")[1].split()[1] for words in lines] == ["rows,"] * 3
    (folder / ".cache" / "meta.json").unlink()
    open_splits(folder, workers=2, say=quiet)
    assert {p.name: p.read_bytes() for p in (folder / ".cache").glob("*.[bn]*")} == alone and len(alone) == 4
    meta, _ = open_splits(folder, say=quiet)
    assert meta["train_samples"] == 300 and meta["val_samples"] == 30


def leaking(n):
    rng = np.random.default_rng(0)
    chunks = [rng.integers(3, 98, rng.integers(1, 10)).tolist() for _ in range(n)]
    return [([1, *c], [1, *c], [*c, 2]) for c in chunks]


def test_leak_guard(tmp_path):
    lines, rows = [], [*some_rows(10), *leaking(10)]
    data = open_pairs(write(tmp_path / "data", rows), say=lines.append)
    assert "50% of the rows show the encoder" in lines[-1] and "cut in half" in lines[-1] and not data.leak
    expected = []
    for encoder_ids, inputs, labels in rows:
        if encoder_ids == inputs and len(labels) > 1:
            half = len(labels) // 2
            text = [*encoder_ids, labels[-1]]
            encoder_ids, inputs, labels = text[:half], [1, *text[half:-1]], text[half:]
        expected.append((encoder_ids, inputs, labels))
    assert equal(data.batch("train", range(20)), naive_batch(expected, 0, 0))
    leaky = open_pairs(tmp_path / "data", allow_leak=True, say=quiet)
    assert leaky.leak and equal(leaky.batch("train", range(20)), naive_batch(rows, 0, 0))
    few = Pairs(*[from_rows([*some_rows(200), *leaking(1)], [], SimpleTokenizer()).splits, dict(META)], None)
    assert not few.leak and not few.cut_leaks


def test_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder(?s:.*)prepare_data.py language"):
        open_splits(tmp_path / "none")
    (tmp_path / "puzzles.csv").write_text("question,answer\n")
    with pytest.raises(DataError, match="puzzles.csv is a file: (?s:.*)fix: prepare_data.py puzzles"):
        open_splits(tmp_path / "puzzles.csv")
    folder = write(tmp_path / "data", some_rows(3))
    for meta, reason in [({"vocab_size": 98}, "pad_id"), (META | dict(pad_id=98), "vocab_size"), ([], "Error"),
                         (META | dict(vocab_size="98"), "vocab_size"),
                         (META | dict(tokenizer_file="../tokenizer.json"), "not a name")]:  # fmt: skip
        write(folder, some_rows(3), meta=meta)
        with pytest.raises(DataError, match=reason):
            open_pairs(folder, say=quiet)
    write(folder, some_rows(3), meta=META | dict(vocab_size=97))
    with pytest.raises(DataError, match="98 ids, vocab_size of meta.json is 97|is not in"):
        open_pairs(folder, say=quiet)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "meta.json").write_text(json.dumps(META))
    with pytest.raises(DataError, match="tokenizer.json"):
        open_pairs(folder, say=quiet)
    os.unlink(folder / "train.jsonl")
    with pytest.raises(DataError, match="no train.jsonl or train.bin; there are: "):
        open_pairs(folder, say=quiet)
    os.rename(folder / "meta.json", folder / "progress.json")
    with pytest.raises(DataError, match="unfinished: run the same command again"):
        open_pairs(folder, say=quiet)
    with pytest.raises(DataError, match="no training row"):
        open_pairs(write(tmp_path / "empty", []), say=quiet)


def test_built_in_rows():
    train, val, tokenizer = build_synthetic_dataset()
    data = from_rows(train, val, tokenizer, max_seq_len=32)
    batch = data.batch("val", [0, 1999])
    assert equal(batch, naive_batch([val[0], val[1999]], 0, 32)) and data.rows("train") == 8000


def test_simple_tokenizer():
    tokenizer = SimpleTokenizer()
    text = "".join(map(chr, range(32, 127)))
    assert tokenizer.encode(text)[0] == 1 and tokenizer.encode(text)[-1] == 2
    assert tokenizer.encode(text, add_specials=False) == list(range(3, 98)) and tokenizer.vocab_size == 98
    assert tokenizer.decode(tokenizer.encode(text)) == text == tokenizer.decode([0, *tokenizer.encode(text), 0])
    assert SimpleTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))).hash == tokenizer.hash
    for bad in ("é", "a\nb", "\x7f"):
        with pytest.raises(UsageError, match="character [12]"):
            tokenizer.encode(bad)
    with pytest.raises(ValueError):
        SimpleTokenizer.from_dict(tokenizer.to_dict() | dict(pad_id=1))
