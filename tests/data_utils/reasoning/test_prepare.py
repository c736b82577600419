"""Data preparation: a naive writer as reference, formats, faults, merging, mixing, questions of any shape."""

import gzip
import hashlib
import importlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.reasoning import normalize_qa as qa
from data_utils.reasoning import prepare, sources
from data_utils.reasoning.dataset import open_pairs, open_splits
from data_utils.reasoning.folder import read_row
from data_utils.tokenizer import load_tokenizer
from tests.helpers import SHARED, finish, slow, start

GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"
ODD = ["👨‍👩‍👧 e\u0301", "a\r\nb", "\x00", "two  spaces ", "<pad><bos><eos><unk>", "<|endoftext|>", "\u2028x"]


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    words = ["the", "cat", "sat", " ", "on", "é", "日本", "\n", "mat.", "12"]
    return [f"{seed} {i} " + " ".join(rng.choice(words, rng.integers(1, 80))) for i in range(n)]


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row if isinstance(row, dict) else dict(text=row), ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def config(command, **changes):
    return prepare_data.COMMANDS[command][0](**changes)


def language(source, dest, **changes):
    options = dict(source=str(source), dest=str(dest), vocab_size=300, max_seq_len=16, val_ratio=0.2)
    return prepare.language(config("language", **options | dict(tokenizer_num_threads=1) | changes))


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


def rows_of(folder, split):
    _, splits = open_splits(folder)
    return [[x.tolist() for x in read_row(*splits[split], i)][:2] for i in range(len(splits[split][1]))]


def naive_language(rows, tokenizer, *, size=16, ratio=0.2, seed=1337, prefix=0.5):
    """{split: [(encoder ids, labels)]} of rows of text or (prompt, answer), one id at a time."""
    sides, (bos, eos) = dict(train=[], val=[]), (tokenizer.bos_id, tokenizer.eos_id)
    for row in rows:
        parts = [row] if isinstance(row, str) else list(row)
        fraction = int(hashlib.sha256("\n".join([str(seed), *parts]).encode()).hexdigest()[:16], 16) / 2**64
        side = sides["val" if fraction < ratio else "train"]
        if isinstance(row, str):
            ids = tokenizer.encode(row)
            while ids:
                chunk, ids = ids[: size - 2], ids[size - 2 :]
                middle = int(len(chunk) * prefix)
                side.append([[bos, *chunk[:middle]], chunk[middle:] + ([] if ids else [eos])])
        else:
            prompt, answer = (tokenizer.encode(text) for text in parts)
            while len(prompt) > size - 2:
                prompt.pop(0)
            side.append([[bos, *prompt, eos], [*answer, eos][:size]])
    return sides


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(source folder of three files, the folder prepared from it in both formats, documents)."""
    root = tmp_path_factory.mktemp("prepared")
    documents = [texts(60, 1), [*texts(40, 2), *ODD, *texts(3, 1)], texts(50, 3)]
    for i, part in enumerate(documents):
        put(root / "source" / f"{i}.jsonl", part)
    language(root / "source", root / "dest", format="both")
    return root / "source", root / "dest", sum(documents, [])


def test_text_is_that_of_a_naive_writer_and_lossless(prepared):
    _, dest, documents = prepared
    tokenizer = load_tokenizer(f"bpe:{dest}/tokenizer.json")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    expected = naive_language(documents, tokenizer)
    meta = json.loads((dest / "meta.json").read_text())
    back = []
    for split, rows in expected.items():
        assert rows_of(dest, split) == rows and meta[f"{split}_samples"] == len(rows)
        assert meta[f"{split}_tokens"] == sum(len(ids) for row in rows for ids in row)
        lines = [dict(encoder_ids=e, decoder_input_ids=[1, *labels[:-1]], labels=labels) for e, labels in rows]
        assert (dest / f"{split}.jsonl").read_text() == "".join(json.dumps(x).replace(" ", "") + "\n" for x in lines)
        assert all(len(row[0]) <= 16 and len(row[1]) <= 16 for row in rows)
        ids = []
        for encoder_ids, labels in rows:
            ids += encoder_ids[1:] + labels
            if labels[-1] == tokenizer.eos_id:
                back.append(tokenizer.decode(ids))
                ids = []
    assert sorted(back) == sorted(documents) and set(ODD) <= set(back)
    assert meta["source_files"] == ["0.jsonl", "1.jsonl", "2.jsonl"] and meta["kind"] == "text"
    train, val = ({tuple(map(tuple, row)) for row in rows} for rows in expected.values())
    assert len(val) > 20 and not {r for r in train & val if len(r[0]) > 6}


def test_processes_tasks_and_batches_change_no_byte(prepared, tmp_path, monkeypatch):
    source, dest, _ = prepared
    monkeypatch.setattr(sources.split_tasks, "__defaults__", (700,))
    language(source, tmp_path / "small", format="both", tokenizer_batch_size=3)
    assert content(tmp_path / "small") == content(dest)
    monkeypatch.setattr(prepare, "cores", lambda: 3)
    language(source, tmp_path / "three", format="both", tokenizer_num_threads=3)
    assert content(tmp_path / "three") == content(dest)


def test_complete_other_flags_fresh(prepared, tmp_path):
    source, dest, _ = prepared
    with pytest.raises(UsageError, match="complete.*(?s:.*)--fresh"):
        language(source, dest, format="both")
    shutil.copytree(dest, tmp_path / "dest")
    language(source, tmp_path / "dest", format="both", fresh=True)
    assert content(tmp_path / "dest") == content(dest)
    language(source, tmp_path / "dest", fresh=True, tokenizer=str(tmp_path / "dest" / "tokenizer.json"))
    assert not (tmp_path / "dest" / "train.bin").exists()
    assert content(tmp_path / "dest")["tokenizer.json"] == content(dest)["tokenizer.json"]


def test_questions_and_conversations(tmp_path):
    long = " ".join(texts(3))
    put(tmp_path / "qa.jsonl", [
        dict(prompt="a", response="b"), dict(question=long, answer=long),
        dict(instruction="do", input="it", output="c"),
        dict(instruction="do", input="", output="d"),
        dict(messages=[dict(role="user", content="x"), dict(role="assistant", content="y"),
                       dict(role="user", content="z"), dict(role="assistant", content="w")]),
        dict(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]),
    ])  # fmt: skip
    language(tmp_path / "qa.jsonl", tmp_path / "out", val_ratio=0.0)
    tokenizer = load_tokenizer(f"bpe:{tmp_path}/out/tokenizer.json")
    expected = [("a", "b"), (long, long), ("do\nit", "c"), ("do", "d"), ("x", "y"), ("x\ny\nz", "w"), ("q", "r")]
    assert rows_of(tmp_path / "out", "train") == naive_language(expected, tokenizer, ratio=0)["train"]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["kind"] == "pairs" and meta["counts"]["prompts_cut"] == meta["counts"]["answers_cut"] == 1


def test_every_format_gives_the_same_rows(prepared, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet")

    documents = [t.replace("\n", " ").replace("\r", " ") for t in prepared[2] if t.strip("\x00")]
    table = pyarrow.table(dict(text=documents, score=range(len(documents))))
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=17)
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    with pyarrow.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    lines = put(tmp_path / "x.jsonl", documents).read_bytes()
    (tmp_path / "a.json").write_text(json.dumps([dict(text=t) for t in documents], indent=2))
    (tmp_path / "l.json").write_bytes(lines.rstrip())
    (tmp_path / "x.txt").write_text("\n\n".join(documents))
    for name in ("x.jsonl", "a.json", "x.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    options = dict(tokenizer=str(prepared[1] / "tokenizer.json"), format="bin")
    language(tmp_path / "x.jsonl", tmp_path / "expected", **options)
    expected = content(tmp_path / "expected")
    for name in ("x.parquet", "x.arrow", "f.arrow", "a.json", "l.json", "x.txt", "x.jsonl.gz", "a.json.gz", "x.txt.gz"):
        language(tmp_path / name, tmp_path / f"to-{name}", **options)
        written = content(tmp_path / f"to-{name}")
        assert all(written[key] == expected[key] for key in expected if key != "meta.json"), name
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="x.parquet: "):
        language(tmp_path / "x.parquet", tmp_path / "broken")


BAD = [(b'{"text": {"a": 3}}', "text is dict"), (b'{"title": "x"}', "fields title(?s:.*)--text-field title"),
       (b"{", "invalid JSON"), (b'{"text": "\xff"}', "invalid UTF-8"), (b"[]", "found list"),
       (b'{"prompt": "x", "response": {}}', "response is dict")]  # fmt: skip


@pytest.mark.parametrize("line, reason", BAD)
def test_bad_rows_are_named_or_counted(tmp_path, line, reason, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good one"}\n\n' + line + b'\n{"text": " "}\n{"text": "\\ud800"}\n')
    monkeypatch.setattr(sources.split_tasks, "__defaults__", (8,))  # lines are counted from the start of the file
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{reason}"):
        language(tmp_path / "a.jsonl", tmp_path / "out")
    language(tmp_path / "a.jsonl", tmp_path / "out", skip_bad_lines=True, fresh=True)
    counts = json.loads((tmp_path / "out" / "meta.json").read_text())["counts"]
    assert counts["bad_rows"] == counts["empty_rows"] == counts["surrogates_replaced"] == 1
    assert counts["documents"] == 2


def test_sources_that_give_nothing(tmp_path, capsys):
    with pytest.raises(DataError, match="none: no such file or folder"):
        language(tmp_path / "none", tmp_path / "out")
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(DataError, match="zstd -d"):
        language(tmp_path, tmp_path / "out")
    put(tmp_path / "b.jsonl", [dict(title="x", body="y")])
    with pytest.raises(DataError, match="the first row has title, body"):
        language(tmp_path / "b.jsonl", tmp_path / "out", skip_bad_lines=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json"):
        language(put(tmp_path / "c.jsonl", texts(9)), tmp_path / "out2", tokenizer=str(tmp_path / "tokenizer.json"))
    for changes, named in [(dict(source=""), "--source"), (dict(val_ratio=1.0), "--val_ratio"),
                           (dict(max_seq_len=2), "--max_seq_len"),
                           (dict(prefix_ratio=1.0), "--prefix_ratio")]:  # fmt: skip
        with pytest.raises(UsageError, match=named):
            prepare.language(config("language", **dict(source=str(tmp_path / "c.jsonl"), dest="x") | changes))
    language(tmp_path / "c.jsonl", tmp_path / "out4", val_ratio=1e-9, tokenizer=str(tmp_path / "absent.json"))
    shown = capsys.readouterr()
    ratio = shown.err.split("--val_ratio ")[1].split()[0]
    assert "absent.json: no such file" in shown.out
    language(tmp_path / "c.jsonl", tmp_path / "out5", val_ratio=float(ratio))
    assert len({tuple(row[0]) for row in rows_of(tmp_path / "out5", "val")}) >= 1


def test_lang_text_field_whitespace_and_files(tmp_path):
    put(tmp_path / "s" / "a.jsonl", [dict(body="one  two", language="en"), dict(body="drei", language="de")])
    put(tmp_path / "s" / "b.jsonl", [dict(body="never", language="en")])
    options = dict(text_field=("body",), lang="en", collapse_whitespace=True, max_files=1, val_ratio=0.0)
    language(tmp_path / "s", tmp_path / "out", **options)
    tokenizer = load_tokenizer(f"bpe:{tmp_path}/out/tokenizer.json")
    assert rows_of(tmp_path / "out", "train") == naive_language(["one two"], tokenizer, ratio=0)["train"]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["counts"]["other_language"] == 1


# ---- faults ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_now_and_then(monkeypatch, draw):
    """Make writes, renames and removals raise Killed at random, before or after they act."""

    def hit(function):
        def wrapped(*arguments, **more):
            if draw.random() < 0.02:
                raise Killed
            result = function(*arguments, **more)
            if draw.random() < 0.01:
                raise Killed
            return result

        return wrapped

    for name in ("replace", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, hit(getattr(os, name)))
    monkeypatch.setattr(prepare.Writer, "add", hit(prepare.Writer.add))


@pytest.mark.parametrize("seed", range(4))
def test_killed_language_ends_with_the_same_bytes(prepared, tmp_path, monkeypatch, seed):
    source, dest, _ = prepared
    monkeypatch.setattr(sources.split_tasks, "__defaults__", (900,))
    monkeypatch.setattr(prepare.Writer.__init__, "__kwdefaults__", dict(fresh=False, plan=None, seconds=0))
    kills = until_done(monkeypatch, seed, lambda: language(source, tmp_path / "out", format="both"))
    assert kills and content(tmp_path / "out") == content(dest)


def until_done(monkeypatch, seed, command):
    """Run `command` again after each kill; return how many there were."""
    draw, kills = np.random.default_rng(seed), 0
    while True:
        with monkeypatch.context() as patched:
            killed_now_and_then(patched, draw)
            try:
                command()
                return kills
            except Killed:
                kills += 1
            except UsageError as e:
                assert "is complete" in str(e)
                return kills


@pytest.mark.parametrize("seed", range(4))
def test_killed_merge_loses_nothing(prepared, chunks, tmp_path, monkeypatch, seed):
    shutil.copytree(chunks, tmp_path / "chunks")
    options = dict(batches=str(tmp_path / "chunks"), output_dir=str(tmp_path / "out"), keep_chunks=seed > 2)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1600)
    kills = until_done(monkeypatch, seed, lambda: prepare.merge(config("merge", **options)))
    assert kills and content(tmp_path / "out") == content(prepared[1])
    assert (len(list((tmp_path / "chunks").iterdir())) == 3) == (seed > 2) or kills


def test_merge_deletes_no_chunk_that_another_program_wrote(chunks, tmp_path, capsys):
    shutil.copytree(chunks, tmp_path / "chunks")
    meta = tmp_path / "chunks" / "1" / "meta.json"
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "data_sha256"}))
    (tmp_path / "chunks" / ".cache").mkdir()
    before = content(meta.parent)
    prepare.merge(config("merge", batches=str(tmp_path / "chunks"), output_dir=str(tmp_path / "out")))
    assert content(meta.parent) == before and "chunks/1 stays: it was not written" in capsys.readouterr().err
    assert not (tmp_path / "chunks" / "0").exists()
    with pytest.raises(DataError, match="out is itself a prepared folder"):
        prepare.merge(config("merge", batches=str(tmp_path / "out"), output_dir=str(tmp_path / "other")))


@pytest.fixture(scope="module")
def many_tasks(prepared, tmp_path_factory):
    """(source of 60 tasks, the folder prepared from it, the tokenizer)."""
    root, tokenizer = tmp_path_factory.mktemp("many"), prepared[1] / "tokenizer.json"
    for i in range(60):
        put(root / "source" / f"{i:02}.jsonl", [t * 9 for t in texts(30, i)])
    language(root / "source", root / "clean", tokenizer=str(tokenizer), max_seq_len=256, val_ratio=0.02)
    return root / "source", root / "clean", tokenizer


@pytest.mark.parametrize("processes, hit", [(1, "SIGKILL"), slow(2, "SIGKILL"), (2, "SIGTERM")])
def test_signals_through_the_command_line(many_tasks, tmp_path, processes, hit):
    source, clean, tokenizer = many_tasks
    flags = ["language", "--source", source, "--dest", tmp_path / "out", "--tokenizer", tokenizer,
             "--tokenizer-num-threads", processes]  # fmt: skip
    child, partial = start("prepare_data.py", *flags), tmp_path / "out" / "train.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(getattr(signal, hit))
    _, err = child.communicate(timeout=60)
    assert child.returncode in (dict(SIGKILL=-9, SIGTERM=143)[hit], 0) and "Traceback" not in err, err
    if child.returncode:
        assert "progress.json" in content(tmp_path / "out")
        options = dict(max_seq_len=256, val_ratio=0.02, vocab_size=8192)
        language(source, tmp_path / "out", tokenizer=str(tokenizer), **options)
    assert content(tmp_path / "out") == content(clean)


def test_other_flags_and_another_writer_are_refused(prepared, tmp_path):
    out = tmp_path / "out"
    with (
        prepare.Writer(out, "jsonl", dict(seed=1)),
        pytest.raises(UsageError, match=f"in use by process {os.getpid()}"),
    ):
        prepare.Writer(out, "jsonl", dict(seed=1))
    with pytest.raises(UsageError, match="seed 1 -> 2(?s:.*)--fresh"):
        prepare.Writer(out, "jsonl", dict(seed=2))
    with pytest.raises(DataError, match="unfinished: run the same command again"):
        open_splits(out)


def test_full_disk_says_that_the_record_stands(tmp_path, monkeypatch):
    def full(self, part, add=prepare.Writer.add):
        self.files["train.jsonl"].close()
        self.files["train.jsonl"] = open("/dev/full", "wb", buffering=0)
        return add(self, part)

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr(prepare.Writer, "add", full)
    with pytest.raises(DataError, match="No space left.*(?s:.*)goes on from the last record"):
        language(put(tmp_path / "a.jsonl", texts(20)), tmp_path / "out")


# ---- merge, mix, convert ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunks(prepared, tmp_path_factory):
    source, dest, _ = prepared
    root = tmp_path_factory.mktemp("chunks")
    for path in sorted(source.iterdir()):
        language(path, root / path.stem, format="both", tokenizer=str(dest / "tokenizer.json"))
    return root


def test_merge_is_one_run_over_all_sources(prepared, chunks, tmp_path, capsys):
    shutil.copytree(chunks, tmp_path / "chunks")
    (tmp_path / "chunks" / "1" / "mine.txt").write_text("not of prepare_data.py")
    open_splits(tmp_path / "chunks" / "0")
    prepare.merge(config("merge", batches=str(tmp_path / "chunks"), output_dir=str(tmp_path / "out")))
    assert content(tmp_path / "out") == content(prepared[1])
    assert [p.as_posix() for p in (tmp_path / "chunks").rglob("*")] == [
        f"{tmp_path}/chunks/1", f"{tmp_path}/chunks/1/mine.txt"]  # fmt: skip
    assert "chunks/1 stays: it holds other files" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "chunks")
    with pytest.raises(UsageError, match="complete"):
        prepare.merge(config("merge", batches=str(tmp_path / "chunks"), output_dir=str(tmp_path / "out")))


def test_chunks_that_differ_are_refused_before_a_byte_is_written(chunks, tmp_path):
    for changes, reason in [(dict(pad_id=7), "pad_id 0 -> 7"), (dict(tokenizer_sha256="x"), "tokenizer_sha256"),
                            (dict(format="jsonl"), "format both -> jsonl"),
                            (None, "unfinished|no meta.json")]:  # fmt: skip
        shutil.rmtree(tmp_path / "chunks", ignore_errors=True)
        shutil.copytree(chunks, tmp_path / "chunks")
        path = tmp_path / "chunks" / "2" / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes)) if changes else path.unlink()
        with pytest.raises(DataError, match=reason):
            prepare.merge(config("merge", batches=str(tmp_path / "chunks"), output_dir=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists() and len(list((tmp_path / "chunks").iterdir())) == 3
    with pytest.raises(DataError, match="no chunk"):
        prepare.merge(config("merge", batches=str(tmp_path / "none"), output_dir=str(tmp_path / "out")))


def test_mixture_follows_its_shares():
    source, row = prepare.mixture((0.7, 0.2, 0.1), (100, 5, 50), 99, seed=0)
    quotas = [69, 20, 10]
    assert np.bincount(source).tolist() == quotas
    taken = np.cumsum(source[:, None] == np.arange(3), axis=0)
    assert np.abs(taken - np.arange(1, 100)[:, None] * np.array(quotas) / 99).max() < 1.2
    assert len(set(row[source == 0])) == 69 and np.bincount(row[source == 1]).tolist() == [4] * 5
    assert all(sorted(row[source == 1][i : i + 5]) == list(range(5)) for i in range(0, 20, 5))


def test_mix(chunks, tmp_path):
    folders = (str(chunks / "0"), str(chunks / "1"))
    options = dict(sources=folders, weights=(0.75, 0.25), train_samples=40, val_samples=8)
    prepare.merge(config("merge", output_dir=str(tmp_path / "out"), **options))
    rows = rows_of(tmp_path / "out", "train")
    kinds = [any(row in rows_of(folder, "train") for row in rows) for folder in folders]
    first = sum(row in rows_of(folders[0], "train") for row in rows)
    assert len(rows) == 40 and all(kinds) and first >= 30 and len(rows_of(tmp_path / "out", "val")) == 8
    for changes in (dict(weights=(1.0,)), dict(weights=(1.0, 0.0)), dict(batches="x")):
        with pytest.raises(UsageError, match="--sources"):
            prepare.merge(config("merge", output_dir=str(tmp_path / "no"), **options | changes))


def test_convert_there_and_back(prepared, tmp_path):
    _, dest, _ = prepared
    (tmp_path / "jsonl").mkdir()
    for name in ("train.jsonl", "val.jsonl", "tokenizer.json"):
        shutil.copy(dest / name, tmp_path / "jsonl" / name)
    meta = json.loads((dest / "meta.json").read_text()) | dict(format="jsonl")
    (tmp_path / "jsonl" / "meta.json").write_text(json.dumps(meta))
    for source, form, target in (("jsonl", "bin", "bin"), ("bin", "jsonl", "back")):
        options = dict(dataset=str(tmp_path / source), format=form, output_dir=str(tmp_path / target))
        prepare.convert(config("convert", **options))
    for name in ("train.bin", "train.idx.npy", "val.bin", "val.idx.npy"):
        assert (tmp_path / "bin" / name).read_bytes() == (dest / name).read_bytes()
    for name in ("train.jsonl", "val.jsonl", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (dest / name).read_bytes()
    line = json.dumps(dict(encoder_ids=[5], decoder_input_ids=[7, 8], labels=[5, 2]))
    with open(tmp_path / "jsonl" / "train.jsonl", "a") as file:
        file.write(line + "\n")
    for form in ("jsonl", "bin"):
        options = dict(dataset=str(tmp_path / "jsonl"), format=form, output_dir=str(tmp_path / f"inputs-{form}"))
        if form == "jsonl":
            prepare.convert(config("convert", **options))
            last = (tmp_path / "inputs-jsonl" / "train.jsonl").read_text().splitlines()[-1]
            assert json.loads(last) == json.loads(line)
            continue
        with pytest.raises(DataError, match="only --format jsonl"):
            prepare.convert(config("convert", **options))


# ---- normalize-qa ----------------------------------------------------------------------------------------------------


def normalized(tmp_path, rows, name="in.jsonl", **changes):
    path = tmp_path / name
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        put(path, rows)
    options = dict(
        input=str(path), output=str(tmp_path / "out.jsonl"), question_field="q", answer_field="a", num_threads=1
    )
    qa.normalize(config("normalize-qa", fresh=True, **options | changes))
    return [tuple(json.loads(line).values()) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


SQUAD = dict(version="1", data=[
    dict(paragraphs=[dict(context="c1", qas=[dict(question="q1", answers=[dict(text="a1"), dict(text="no")]),
                                             dict(question="q2", answers=[])]),
                     dict(context="c2", qas=[dict(question="q3", answers=[dict(text="a3")])])]),
    dict(paragraphs=[]),
    dict(paragraphs=[dict(context="c3", qas=[dict(question="é👍", answers=[dict(text=4)])])]),
])  # fmt: skip


def test_raw_squad(tmp_path):
    fields = dict(question_field="data[].paragraphs[].qas[].question", context_field="data[].paragraphs[].context",
                  answer_field="data[].paragraphs[].qas[].answers[0].text",
                  prompt_template=r"{question}\nContext: {context}")  # fmt: skip
    expected = [
        ("q1\nContext: c1", "a1"),
        ("q2\nContext: c1", ""),
        ("q3\nContext: c2", "a3"),
        ("é👍\nContext: c3", "4"),
    ]
    squad = json.dumps(SQUAD, indent=1).encode()
    assert normalized(tmp_path, squad, "x.json", **fields) == expected
    assert normalized(tmp_path, gzip.compress(squad), "x.json.gz", **fields) == expected
    assert normalized(tmp_path, squad, "x.json", skip_missing=True, **fields) == expected[:1] + expected[2:]
    rows = [{"data": {"question": "q", "answers": {"text": ["a", "b"]}}}]
    fields = dict(question_field="data.question", answer_field="data.answers.text[0]")
    assert normalized(tmp_path, rows, **fields) == [("q", "a")]


def test_paths_lists_numbers_and_what_is_missing(tmp_path):
    rows = [dict(q="x", a=[[1, 2.5], [3]]), dict(q=["y", "z"], a=[[]]), dict(a=[[0, True]]), dict(q=dict(k=1), a=None)]
    expected = [("x", "2.5"), ("y", ""), ("", "true"), ("", "")]
    assert normalized(tmp_path, rows, answer_field="a[0][1]") == expected
    assert normalized(tmp_path, rows, answer_field="a[0][1]", max_records=1) == expected[:1]
    for bad in ("a.", "a[b]", "a[-1]", "[0]", "a b]"):
        with pytest.raises(UsageError, match="--answer_field"):
            normalized(tmp_path, rows, answer_field=bad)
    with pytest.raises(DataError, match="fields of the first row: q, a(?s:.*)--question-field"):
        normalized(tmp_path, rows, question_field="nothing")
    with pytest.raises(DataError, match="in.jsonl:1: invalid JSON"):
        normalized(tmp_path, b"{\n")


def test_templates(tmp_path):
    options = dict(prompt_template=r"{{{question}}}\t\\{context}", response_template=r"\x: {answer}", context_field="c")
    rows = [dict(q="{answer}\\n", a="b", c="{c}")]
    assert normalized(tmp_path, rows, **options) == [("{{answer}\\n}\t\\{c}", r"\x: b")]
    for bad in ("{question.__class__}", "{0}", "{question!r}", "{", "}", "{other}", "{question[0]}"):
        with pytest.raises(UsageError, match="--prompt_template"):
            normalized(tmp_path, [dict(q="x", a="b")], prompt_template=bad)


def test_shuffle_and_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.split_tasks, "__defaults__", (300,))
    monkeypatch.setattr(qa, "PROCESS_BYTES", 100)
    rows = [dict(q=f"question {i}", a=str(i)) for i in range(200)]
    plain = normalized(tmp_path, rows)
    assert plain == [(row["q"], row["a"]) for row in rows] == normalized(tmp_path, rows, num_threads=2)
    shuffled = normalized(tmp_path, rows, shuffle=True)
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    assert shuffled == normalized(tmp_path, rows, shuffle=True) != normalized(tmp_path, rows, shuffle=True, seed=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.jsonl.lock", "in.jsonl", "out.jsonl"]
    with pytest.raises(UsageError, match="complete"):
        qa.normalize(
            config("normalize-qa", input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"),
                   question_field="q", answer_field="a"))  # fmt: skip


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_guide(tmp_path):
    """normalize-qa, language, training rows; both spellings of flags."""
    put(
        tmp_path / "raw.jsonl",
        [{"data": {"question": f"What is {i}?", "answers": {"text": [str(i)]}}} for i in range(99)],
    )
    finish(start("prepare_data.py", "normalize-qa", "--input", tmp_path / "raw.jsonl",
                 "--output", tmp_path / "qa.jsonl",
                 "--question-field", "data.question", "--answer-field", "data.answers.text[0]"))  # fmt: skip
    flags = "--vocab-size 128000 --max-seq-len 256 --val-ratio 0.02".split()
    out, _ = finish(
        start("prepare_data.py", "language", "--source", tmp_path / "qa.jsonl", "--dest", tmp_path / "p", *flags)
    )
    assert "99 train rows" not in out and "ids, not 128000" in out and "train rows" in out
    assert open_pairs(tmp_path / "p").rows("train") > 90
    _, err = finish(
        start("prepare_data.py", "language", "--source", tmp_path / "qa.jsonl", "--dest", tmp_path / "p"), 2
    )
    assert err.startswith("error: ") and "--fresh" in err
    prepare_data.tokenizer(
        config("tokenizer", source=str(tmp_path / "qa.jsonl"), vocab_size=300, out=f"{tmp_path}/t.json")
    )
    assert load_tokenizer(f"bpe:{tmp_path}/t.json").bos_id == 1


def test_generators_write_prepared_folders(tmp_path):
    for out in ("a", "b"):
        prepare.arithmetic(config("arithmetic", out=str(tmp_path / out)))
        options = dict(out=str(tmp_path / f"sudoku-{out}"), size=4, givens=8, train=30, val=10)
        prepare.sudoku(config("sudoku", num_threads=1 + (out == "b"), **options))
    assert content(tmp_path / "a") == content(tmp_path / "b") and open_pairs(tmp_path / "a").rows("val") == 2000
    assert content(tmp_path / "sudoku-a") == content(tmp_path / "sudoku-b")
    splits = prepare.puzzles.load_puzzles(tmp_path / "sudoku-a")
    assert splits["train"][0].shape == (30, 16) and prepare.puzzles.solved(splits["val"][1], 4).all()
    with pytest.raises(UsageError, match="Sudokus, not pairs"):
        open_splits(tmp_path / "sudoku-a")
    for command, out in (("arithmetic", "a"), ("sudoku", "sudoku-a")):
        with pytest.raises(UsageError, match="complete"):
            prepare_data.COMMANDS[command][1](config(command, out=str(tmp_path / out)))


def test_main_takes_a_configuration_made_in_python(tmp_path):
    prepare_data.main(prepare_data.ArithmeticConfig(out=tmp_path / "sums", digits=1))
    assert open_pairs(tmp_path / "sums").rows("val") == 20
    with pytest.raises(UsageError, match="size=5"):
        prepare_data.main(prepare_data.SudokuConfig(size=5))


@pytest.mark.skipif(not GSM8K.exists(), reason="no shared data")
def test_gsm8k(tmp_path):
    options = dict(
        input=str(GSM8K), output=str(tmp_path / "qa.jsonl"), question_field="question", answer_field="answer"
    )
    qa.normalize(config("normalize-qa", **options, max_records=500, num_threads=1))
    language(tmp_path / "qa.jsonl", tmp_path / "out", max_seq_len=256, val_ratio=0.1)
    data = open_pairs(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "qa.jsonl").read_text().splitlines()]
    batch = data.batch("val", range(data.rows("val")))
    shown = {data.tokenizer.decode(ids[ids >= 0].numpy()) for ids in batch["labels"]}
    assert data.rows("train") + data.rows("val") == 500 and shown & {row["response"] for row in rows}
