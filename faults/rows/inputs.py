"""Flags, data, tokenizers and formulas that are wrong or have changed."""

import json
import re
import shutil
import time

from data_utils.documents import MALFORMED
from data_utils.errors import DataError
from data_utils.formulas.pools import COLUMNS, read_formulas
from faults.lab import SCRIPTS, candidates, check, contents, error_lines, has, newest, unchanged


# --- flags ------------------------------------------------------------------------------------
def changed_flags(lab, name):
    """A changed size is refused; a changed rate is taken, and the run says that exact resume is lost."""
    sizes, changes, lr = dict(
        expert=(
            {"--d_model 64": "d_model 32 -> 64"},
            {"--lr 1e-3": "lr 0.003 -> 0.001", "--batch_size 8": "batch_size 16 -> 8", "--seed 5": "seed 0 -> 5"},
            1e-3,
        ),
        ae=(
            {"latent_dim=5": "latent_dim 4 -> 5", "seed=43": "data_hash"},
            {"lr=0.002": "lr 0.001 -> 0.002", "batch_size=4": "batch_size 8 -> 4", "epochs=6": "epochs 5 -> 6"},
            2e-3,
        ),
    )[name]
    folder = lab.half(name)
    before = contents(folder)
    for flag, message in sizes.items():
        _, err = lab.run(name, folder, *flag.split(), status=2)
        has(error_lines(err), message)
        unchanged(before, folder)
    out, _ = lab.run(name, folder, *" ".join(changes).split())
    has(out, "exact resume is lost", *changes.values())
    saved = newest(SCRIPTS[name], folder)["config"]["lr"]
    check(saved == lr, f"lr {saved} was saved")


NAMES = ["../x", "a/b", "/abs", "", ".", "..", "-x", " x", "a b", "a\nb", "x" * 101, "nul", "ü", "a\\b", "~x"]


def path_names(lab, name):
    """Names that can't be a folder's are refused before anything is written."""
    flag = dict(hrm="--run_name={}", ae="name={}")[name]
    bad = [word for word in NAMES if word or name == "ae"]
    flags = [word for word in lab.words(name) if not word.startswith("out=")]
    for word in bad:
        folder = lab.folder()
        child = lab.child(SCRIPTS[name].file, [*flags, flag.format(word)], folder, faults=["figures=0"])
        _, err = lab.end(child, 2)
        has(error_lines(err), "name")
        paths = [path.name for path in folder.rglob("*")]
        check(not paths, f"{word!r} made {paths}")
    return f"{len(bad)} names"


# --- data -------------------------------------------------------------------------------------
def missing_part(lab, name):
    """A missing expert, shard or meta.json: the error names it and the command that makes it."""
    lab.data(name)
    folder = lab.folder()
    if name == "expert":
        flags = ["--data_dir", lab.place / "data", "--transformer_ckpt", folder / "none.pt", "--device", "cpu"]
        child = lab.child("train_expert.py", ["--expert", "diffuser", "--tokenizer", "bytes", *flags], folder)
        _, err = lab.end(child, 1)
        has(error_lines(err), "none.pt is missing", "python train_expert.py --expert transformer")
        return
    if name == "mla":
        flags, words = [f"--state_space_ckpt={folder}/none.pt"], ["none.pt is missing", "train_expert.py --expert"]
    elif name == "multimodal":
        shutil.copytree(lab.place / "pages", folder / "pages")
        next((folder / "pages").glob("consolidated_*.pt")).unlink()
        flags, words = [f"data_paths={folder}/pages"], ["consolidated_", "--rebuild-dataset"]
    else:
        shutil.copytree(prepared_pairs(lab), folder / "text")
        (folder / "text" / "meta.json").unlink()
        flags, words = [f"--dataset={folder}/text"], ["no meta.json", "python prepare_data.py language"]
    _, err = lab.run(name, folder, *flags, status=1)
    has(error_lines(err), *words)
    check(not candidates(SCRIPTS[name], folder), "a checkpoint was written")


def prepared_pairs(lab):
    """Return a folder of questions and answers with its own tokenizer."""

    def make():
        folder = lab.folder()
        rows = [json.dumps(dict(question=f"who is {i}", answer=f"number {i * i}")) for i in range(200)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        flags = "--vocab_size=300 --val_ratio=0.1 --max_seq_len=32 --tokenizer_num_threads=1".split()
        files = [f"--source={folder}/rows.jsonl", f"--dest={folder}/ready"]
        lab.command("prepare_data.py", "language", *files, *flags)
        return folder / "ready"

    return lab.once("pairs", make)


FORMULAS = ["__import__('os').system('touch {}')", "().__class__", "x.real", "x[0]", "9**9**9", "x**65", "1e999",
            "9" * 400, "(" * 5000, "(" * 900 + "x" + ")" * 900, "x" * 2001, "lambda: x", "[x for x in (1,)]",
            "open('{}','w')", "eval('open(\"{}\",\"w\")')", "x if x else x", "x := 1", "f'{{x}}'", "1j", "sin(x, x)",
            "sin(*x)", "x @ x", "x and x", "+".join("x" * 400), "x**(1/0)"]  # fmt: skip


def malicious_formula(lab, name):
    """Formulas that would run code or take for ever are refused with file and line, in under a second."""
    folder = lab.folder()
    canary = folder / "canary"
    cells = dict(name="bad", variables="x", ranges="0:1")

    def write(path, text):
        quoted = '"' + text.replace('"', '""') + '"'
        row = [quoted if column == "formula" else cells.get(column, "") for column in COLUMNS]
        path.write_text(",".join(COLUMNS) + "\n" + ",".join(row) + "\n")

    for number, text in enumerate(text.replace("{}", str(canary)) for text in FORMULAS):
        path, start = folder / f"{number}.csv", time.monotonic()
        write(path, text)
        try:
            read_formulas(path)
            raise AssertionError(f"accepted: {text[:40]}")
        except DataError as error:
            has(str(error), f"{path}:2: ")
        check(time.monotonic() - start < 1, f"{time.monotonic() - start:.1f} s for {text[:40]}")
    write(folder / "bad.csv", FORMULAS[0].replace("{}", str(canary)))
    _, err = lab.run(name, folder, f"--holdout_pools={folder}/bad.csv", status=1)
    has(error_lines(err), "bad.csv:2: ")
    check(not canary.exists(), "the code of a formula ran")
    return f"{len(FORMULAS)} formulas"


LINES = [  # (line, a word of its message; None = it is read)
    (b'{"text": "half', "JSON"), (b"[1, 2]", "found list"), (b"null", "found NoneType"), (b'{"txt": 1}', "text"),
    (b'{"text": NaN}', "text"), (b"9" * 5000, ""), (b"[" * 100_000, ""), (b'{"text": "\xff"}', "UTF-8"),
    (b'{"text": "\\ud800"}', None), (b'\xef\xbb\xbf{"text": "mark in the middle"}', None),
    (b"", None), (b'{"text": "carriage return"}\r', None), (b'{"text": "a\xe2\x80\xa8b"}', None),
]  # fmt: skip


def domain(folder, lines, end=b"\n"):
    """Write lines as the one file of the domain `code` in a folder -> the file."""
    path = folder / "data" / "code" / "a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\n".join(lines) + end)
    return path


def bad_jsonl(lab, name):
    """Each kind of bad line between good ones: its number, and how many there are with --skip_bad_lines."""
    lab.data("expert")
    good = b'{"text": "' + b"a good line of some words " * 8 + b'"}'
    bad = {line: word for line, word in LINES if word is not None}
    harmless = [line for line, word in LINES if word is None]

    def start(lines, *flags, end=b"\n", status=0):
        folder = lab.folder()
        domain(folder, lines, end)
        if name == "expert":
            return lab.run(name, folder, f"--data_dir={folder}/data", "--max_steps=1", *flags, status=status)
        return lab.end(lab.child("prepare_data.py", ["check", f"--data_dir={folder}/data", *flags], folder), status)

    start([b"\xef\xbb\xbf" + good, *[good] * 30, *harmless, good], end=b"")
    if name == "expert":
        for line, word in bad.items():
            _, err = start([good, good, b"", line, good], status=1)
            has(error_lines(err), "code/a.jsonl:4: ", word, "--skip_bad_lines")
        _, err = start([good, good, next(iter(bad))], end=b"", status=1)
        has(error_lines(err), "code/a.jsonl:3: truncated last line")
        out, _ = start([*[good] * 30, *bad], "--skip_bad_lines")
        counts = re.findall(rf"^ +(\d+)  (?:{'|'.join(MALFORMED)})$", out, re.M)
        check(sum(map(int, counts)) == len(bad), f"{' + '.join(counts)} bad lines counted, not {len(bad)}")
    else:
        out, err = start([*[good] * 30, *bad], status=1)
        has(err, f"{len(bad)} malformed")
        has(out + err, "code/a.jsonl")
    return f"{len(bad)} kinds refused, {len(harmless)} read"


def huge_line(lab, name):
    """A line of 55 MB is read in bounded memory; one of 300 MB is refused with its number."""
    folder = lab.folder()
    lab.data(name)
    small = [b'{"text": "' + b"a small line of words " * 40 + b'"}'] * 20
    path = domain(folder, [*small, b'{"text": "' + b"a huge line of words " * 2_500_000 + b'"}'])
    flags = [f"--data_dir={folder}/data", "--max_steps=1"]
    out, _ = lab.run(name, folder, *flags)
    peak = float(re.search(r"peak (\d+) MB", out)[1])
    check(peak < 2000, f"peak {peak} MB")
    path.write_bytes(b"\n".join([*small, b'{"text": "' + b"x" * 300_000_000 + b'"}', b""]))
    _, err = lab.run(name, folder, *flags, "--checkpoint_dir=other", status=1)
    has(error_lines(err), "code/a.jsonl:21: ")
    path.unlink()
    return f"peak {peak:.0f} MB"


def layout(lab, name):
    """Files at the wrong place: the error names the layout, or the command that mends it."""
    line = '{"text": "x"}\n'
    cases = [  # files, flags, words of the message
        ({}, [], ["<domain>/*.jsonl", "prepare_data.py expert"]),
        ({"a.jsonl": line}, [], ["a.jsonl", "mkdir", "mv "]),
        ({"own/a.jsonl": line * 99}, ["--domains", "law"], ["law", "own"]),
        ({"own/a.jsonl": line}, ["--domains", "own"], ["domain own"]),
    ]
    words = [word for word in lab.words(name) if word not in ("--domains", "code")]
    for files, flags, message in cases:
        folder = lab.folder()
        (folder / "data").mkdir()
        for path, text in files.items():
            (folder / "data" / path).parent.mkdir(exist_ok=True)
            (folder / "data" / path).write_text(text)
        child = lab.child(SCRIPTS[name].file, [*words, f"--data_dir={folder}/data", *flags], folder)
        _, err = lab.end(child, 1)
        has(error_lines(err), *message)


def data_changed(lab, name):
    """Other events are refused; another document is taken, and the run says that exact resume is lost."""
    folder = lab.half(name)
    if name == "ae":
        before = contents(folder)
        _, err = lab.run(name, folder, "limit=63", status=2)
        has(error_lines(err), "data_hash", "limit")
        unchanged(before, folder)
        return
    shutil.copytree(lab.place / "data", folder / "data", ignore=shutil.ignore_patterns(".cache"))
    with open(next((folder / "data" / "code").glob("*.jsonl")), "a") as file:
        file.write(json.dumps(dict(text="one more document " * 20)) + "\n")
    out, _ = lab.run(name, folder, f"--data_dir={folder}/data")
    has(out, "data_hash", "exact resume is lost")


def tokenizer_changed(lab, name):
    """Two swapped tokens, then an id outside the vocabulary: both are refused, and the old file still works."""
    folder = lab.folder()
    lab.data("expert")
    if name == "expert":
        path = folder / "bpe.json"
        lab.command("prepare_data.py", "tokenizer", f"--data_dir={lab.place}/data", "--vocab_size=300", f"--out={path}")
        flags = ["--tokenizer", f"bpe:{path}"]
    else:
        path = shutil.copytree(prepared_pairs(lab), folder / "text") / "tokenizer.json"
        flags = [f"--dataset={folder}/text", "--max_seq_len=32"]
    lab.run(name, folder, *flags, "--max_steps=4")
    text = path.read_text()
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    first, second = [token for token in vocab if len(token) > 1 and token.isalpha()][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    _, err = lab.run(name, folder, *flags, status=2 if name == "expert" else (1, 2))
    has(error_lines(err), "tokenizer")
    vocab[first] = 10**6
    path.write_text(json.dumps(content))
    _, err = lab.run(name, folder, *flags, status=1)
    has(error_lines(err), path.name)
    path.write_text(text)
    lab.run(name, folder, *flags, "--max_steps=5")
