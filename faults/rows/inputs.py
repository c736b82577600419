"""Rows of faults.py with faults outside the process: disks, folders, flags, data, names, terminals."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fault_child import ROOT
from benchmarks.fault_lab import (
    SCRIPTS,
    candidates,
    check,
    contents,
    error_lines,
    has,
    newest,
    rewritten,
    unchanged,
)
from data_utils.documents import MALFORMED
from data_utils.errors import DataError
from data_utils.formulas.pools import COLUMNS, read_formulas


# --- disk -------------------------------------------------------------------------------------
def disk_full_later(lab, name):
    """No room for one rolling save, then for the last ones; and a disk that is full of something else."""
    steps = SCRIPTS[name].steps
    folder = lab.folder()
    late = "sleep=7:0.1 sleep=14:0.1"  # so that a save is due after step 7: of one call of backward, or of two
    _, err = lab.go_on(name, folder, faults=f"{late} limit=7:20000 limit=8:-1")
    warned = [line for line in err.splitlines() if "training goes on" in line]
    check(warned and all("was not written" in line for line in warned), f"no warning: {err[-300:]}")
    lab.clean(folder)
    folder = lab.folder()
    _, err = lab.run(name, folder, faults=f"limit={steps - 1}:20000", status=1)
    has(error_lines(err), "was not written", "last good file")
    newest(SCRIPTS[name], folder)
    lab.go_on(name, folder)
    return f"{len(warned)} warnings; " + full_disk(lab, name)


def full_disk(lab, name):
    folder = lab.folder()
    home = folder / SCRIPTS[name].home
    home.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(home)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        return "a small disk: not run, not root"
    try:
        child = lab.start(name, folder, faults="sleep=12:2")
        while not candidates(SCRIPTS[name], folder) and child.status() is None:
            time.sleep(0.01)
        with open(home / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass
        _, err = lab.end(child, 1)
        has(error_lines(err), "No space left")
        (home / "filler").unlink()
        newest(SCRIPTS[name], folder)
        lab.go_on(name, folder)
    finally:
        subprocess.run(["umount", "-l", home])
    return "a disk of 8 MB too"


def disk_full_at_start(lab, name):
    folder = lab.folder()
    _, err = lab.run(name, folder, faults="quota=64000", status=1)
    has(error_lines(err), "was not written")
    check(not candidates(SCRIPTS[name], folder), "a checkpoint was left")
    rows = folder / SCRIPTS[name].metrics
    check(not rows.exists() or '"train"' not in rows.read_text(), "it had trained before")
    lab.clean(folder)


def read_only(lab, name):
    place = lab.folder()
    (place / "file").write_text("")
    (place / "closed").mkdir(mode=0o555)
    others = all(path.stat().st_mode & 1 for path in Path(sys.base_prefix, "lib").parents)  # may use this interpreter
    cases = [("file", "")] + [("closed", "user=65534")] * (os.geteuid() == 0 and others)
    for folder, fault in cases:
        start, target = time.monotonic(), place / folder / "run"
        if name == "prepare_data":
            child = lab.child("prepare_data.py", ["expert", "--toy", f"--data_dir={target}"], place, faults=[fault])
        else:
            child = lab.start(name, place, f"--checkpoint_dir={target}", faults=fault)
        _, err = lab.end(child, 1)
        has(error_lines(err), target)
        took = time.monotonic() - start
        check(took < 5, f"{took:.1f} s")
    return "" if len(cases) > 1 else "0555: not run: not root, or no interpreter for others"


# --- flags ------------------------------------------------------------------------------------
def changed_flags(lab, name):
    width, two = dict(expert=("--d_model 64", "d_model 32 -> 64"), ae=("latent_dim=5", "latent_dim 4 -> 5"))[name]
    folder = lab.half(name)
    before = contents(folder)
    _, err = lab.run(name, folder, *width.split(), status=2)
    has(error_lines(err), two)
    unchanged(before, folder)
    if name == "ae":
        _, err = lab.run(name, folder, "seed=43", status=2)
        has(error_lines(err), "data_hash")
        unchanged(before, folder)
    flags, said = dict(
        expert=("--lr 1e-3 --batch_size 8 --seed 5", ["lr 0.003 -> 0.001", "batch_size 16 -> 8", "seed 0 -> 5"]),
        ae=("lr=0.002 batch_size=4 epochs=6", ["lr 0.001 -> 0.002", "batch_size 8 -> 4", "epochs 5 -> 6"]),
    )[name]
    out, _ = lab.run(name, folder, *flags.split())
    has(out, "exact resume is lost", *said)
    lr = newest(SCRIPTS[name], folder)["config"]["lr"]
    check(lr == dict(expert=1e-3, ae=2e-3)[name], f"lr {lr} was saved")


def prefixes(lab, name):
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        folder = lab.half(name)
        path = candidates(SCRIPTS[name], folder)[0]

        def rename(state, prefix=prefix):
            key = next(key for key in state if key.startswith("model") and "args" not in key)
            state[key] = {prefix + name: weight for name, weight in state[key].items()}

        rewritten(path, path, rename)
        lab.go_on(name, folder)


NAMES = ["../x", "a/b", "/abs", "", ".", "..", "-x", " x", "a b", "a\nb", "x" * 101, "nul", "ü", "a\\b", "~x"]


def path_names(lab, name):
    """Names that are no names: refused before anything is made."""
    key = dict(hrm="--run_name={}", ae="name={}")[name]
    bad = [word for word in NAMES if word != "" or name == "ae"]
    for word in bad:
        folder = lab.folder()
        script = SCRIPTS[name]
        words = [w for w in lab.words(name) if not w.startswith("out=")]
        child = lab.child(script.file, [*words, key.format(word)], folder, faults=["figures=0"])
        _, err = lab.end(child, 2)
        has(error_lines(err), "name")
        there = [path.name for path in folder.rglob("*")]
        check(not there, f"{word!r} made {there}")
    return f"{len(bad)} names"


# --- data -------------------------------------------------------------------------------------
def missing_part(lab, name):
    lab.data(name)
    folder = lab.folder()
    if name == "mla":
        flags, words = [f"--state_space_ckpt={folder}/none.pt"], ["none.pt is missing", "train_expert.py --expert"]
    elif name == "expert":
        flags = ["--data_dir", lab.place / "data", "--transformer_ckpt", folder / "none.pt", "--device", "cpu"]
        child = lab.child("train_expert.py", ["--expert", "diffuser", "--tokenizer", "bytes", *flags], folder)
        _, err = lab.end(child, 1)
        return has(error_lines(err), "none.pt is missing", "python train_expert.py --expert transformer")
    elif name == "multimodal":
        shutil.copytree(lab.place / "pages", folder / "pages")
        next((folder / "pages").glob("consolidated_*.pt")).unlink()
        flags, words = [f"data_paths={folder}/pages"], ["consolidated_", "--rebuild-dataset"]
    else:
        shutil.copytree(pairs(lab), folder / "text")
        (folder / "text" / "meta.json").unlink()
        flags, words = [f"--dataset={folder}/text"], ["no meta.json", "python prepare_data.py language"]
    _, err = lab.run(name, folder, *flags, status=1)
    has(error_lines(err), *words)
    check(not candidates(SCRIPTS[name], folder), "a checkpoint was written")


def pairs(lab):
    """A folder of questions and answers with a tokenizer of its own."""

    def make():
        folder = lab.folder()
        rows = [json.dumps(dict(question=f"who is {i}", answer=f"number {i * i}")) for i in range(200)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        lab.command("prepare_data.py", "language", f"--source={folder}/rows.jsonl", f"--dest={folder}/ready",
                    "--vocab_size=300", "--val_ratio=0.1", "--max_seq_len=32", "--tokenizer_num_threads=1")  # fmt: skip
        return folder / "ready"

    return lab.once("pairs", make)


FORMULAS = ["__import__('os').system('touch {}')", "().__class__", "x.real", "x[0]", "9**9**9", "x**65", "1e999",
            "9" * 400, "(" * 5000, "(" * 900 + "x" + ")" * 900, "x" * 2001, "lambda: x", "[x for x in (1,)]",
            "open('{}','w')", "eval('open(\"{}\",\"w\")')", "x if x else x", "x := 1", "f'{{x}}'", "1j", "sin(x, x)",
            "sin(*x)", "x @ x", "x and x", "+".join("x" * 400), "x**(1/0)"]  # fmt: skip


def malicious_formula(lab, name):
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


LINES = [  # (line, what its message says; "" = it is a document)
    (b'{"text": "half', "JSON"), (b"[1, 2]", "found list"), (b"null", "found NoneType"), (b'{"txt": 1}', "text"),
    (b'{"text": NaN}', "text"), (b"9" * 5000, ""), (b"[" * 100_000, ""), (b'{"text": "\xff"}', "UTF-8"),
    (b'{"text": "\\ud800"}', None), (b'\xef\xbb\xbf{"text": "mark in the middle"}', None),
    (b"", None), (b'{"text": "carriage return"}\r', None), (b'{"text": "a\xe2\x80\xa8b"}', None),
]  # fmt: skip


def bad_jsonl(lab, name):
    """Each kind of bad line between good ones: its number, and how many there are with --skip_bad_lines."""
    lab.data("expert")
    good = b'{"text": "' + b"a good line of some words " * 8 + b'"}'
    bad = [line for line, said in LINES if said is not None]

    def write(*lines, end=b"\n"):
        folder = lab.folder()
        (folder / "data" / "code").mkdir(parents=True)
        (folder / "data" / "code" / "a.jsonl").write_bytes(b"\n".join(lines) + end)
        return folder

    def start(folder, *flags, status):
        if name == "expert":
            return lab.run(name, folder, f"--data_dir={folder}/data", "--max_steps=1", *flags,
                           status=status)  # fmt: skip
        words = ["check", f"--data_dir={folder}/data", *flags]
        return lab.end(lab.child("prepare_data.py", words, folder), status)

    harmless = [line for line, said in LINES if said is None]
    start(write(b"\xef\xbb\xbf" + good, *[good] * 30, *harmless, good, end=b""), status=0)
    if name == "expert":
        for line, said in LINES:
            if said is not None:
                _, err = start(write(*[good] * 2, b"", line, good), status=1)
                has(error_lines(err), "code/a.jsonl:4: ", said, "--skip_bad_lines")
        _, err = start(write(*[good] * 2, bad[0], end=b""), status=1)
        has(error_lines(err), "code/a.jsonl:3: truncated last line")
        out, _ = start(write(*[good] * 30, *bad), "--skip_bad_lines", status=0)
        counts = re.findall(rf"^ +(\d+)  (?:{'|'.join(MALFORMED)})$", out, re.M)
        check(sum(map(int, counts)) == len(bad), f"{' + '.join(counts)} bad lines told, not {len(bad)}")
    else:
        out, err = start(write(*[good] * 30, *bad), status=1)
        has(err, f"{len(bad)} malformed")
        has(out + err, "code/a.jsonl")
    return f"{len(bad)} kinds refused, {len(harmless)} read"


def huge_line(lab, name):
    folder = lab.folder()
    lab.data(name)
    (folder / "data" / "code").mkdir(parents=True)
    path = folder / "data" / "code" / "a.jsonl"
    small = b'{"text": "' + b"a small line of words " * 40 + b'"}\n'
    path.write_bytes(small * 20 + b'{"text": "' + b"a huge line of words " * 2_500_000 + b'"}\n')
    flags = [f"--data_dir={folder}/data", "--max_steps=1"]
    out, _ = lab.run(name, folder, *flags)
    peak = float(re.search(r"peak (\d+) MB", out)[1])
    check(peak < 2000, f"peak {peak} MB")
    path.write_bytes(small * 20 + b'{"text": "' + b"x" * 300_000_000 + b'"}\n')
    _, err = lab.run(name, folder, *flags, "--checkpoint_dir=other", status=1)
    has(error_lines(err), "code/a.jsonl:21: ")
    path.unlink()
    return f"peak {peak:.0f} MB"


def layout(lab, name):
    line = '{"text": "x"}\n'
    cases = [  # files, flags, what is said
        ({}, [], ["<domain>/*.jsonl", "prepare_data.py expert"]),
        ({"a.jsonl": line}, [], ["a.jsonl", "mkdir", "mv "]),
        ({"own/a.jsonl": line * 99}, ["--domains", "law"], ["law", "own"]),
        ({"own/a.jsonl": line}, ["--domains", "own"], ["domain own"]),
    ]
    for files, flags, said in cases:
        folder = lab.folder()
        (folder / "data").mkdir()
        for path, text in files.items():
            (folder / "data" / path).parent.mkdir(exist_ok=True)
            (folder / "data" / path).write_text(text)
        words = [word for word in lab.words(name) if word not in ("--domains", "code")]
        _, err = lab.end(lab.child(SCRIPTS[name].file, [*words, f"--data_dir={folder}/data", *flags], folder), 1)
        has(error_lines(err), *said)


def data_changed(lab, name):
    folder = lab.half(name)
    if name == "ae":
        before = contents(folder)
        _, err = lab.run(name, folder, "limit=63", status=2)
        has(error_lines(err), "data_hash", "limit")
        return unchanged(before, folder)
    shutil.copytree(lab.place / "data", folder / "data", ignore=shutil.ignore_patterns(".cache"))
    with open(next((folder / "data" / "code").glob("*.jsonl")), "a") as file:
        file.write(json.dumps(dict(text="one more document " * 20)) + "\n")
    out, _ = lab.run(name, folder, f"--data_dir={folder}/data")
    has(out, "data_hash", "exact resume is lost")


def tokenizer_changed(lab, name):
    folder = lab.folder()
    lab.data("expert")
    if name == "expert":
        path = folder / "bpe.json"
        lab.command("prepare_data.py", "tokenizer", f"--data_dir={lab.place}/data", "--vocab_size=300", f"--out={path}")
        flags = ["--tokenizer", f"bpe:{path}"]
    else:
        path = shutil.copytree(pairs(lab), folder / "text") / "tokenizer.json"
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


# --- surroundings -----------------------------------------------------------------------------
def pipes(lab, name):
    """A reader that goes away, no error stream, no terminal: it trains on, and writes no codes of a terminal."""
    lab.data(name)
    words = " ".join(map(str, [SCRIPTS[name].file, *lab.words(name)]))
    inject = f"{sys.executable} {ROOT}/benchmarks/faults.py inject figures=0 -- {words}"
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TERM="dumb", LANG="C", LC_ALL="C")
    for pipe in ("| head -1", "2>&-", "2>&1 | cat"):
        folder = lab.folder()
        line = f"set -o pipefail; {inject} {pipe}"
        found = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, timeout=600)
        check(found.returncode == 0, f"status {found.returncode} with {pipe}: {found.stderr[-300:]}")
        check(b"\x1b" not in found.stdout + found.stderr, f"escape codes with {pipe}")
        lab.same(name, folder)


def surroundings(lab, name):
    env = dict(PYTHONHASHSEED="7", TZ="Pacific/Kiritimati", LANG="C")
    folder = lab.folder()
    lab.run(name, folder, faults=f"signal=SIGTERM:{SCRIPTS[name].steps // 2}:0", status=143)
    moved = lab.folder(folder)
    shutil.rmtree(folder)
    lab.go_on(name, moved, faults="clock=-100000000", env=env, warm=False)


def foreign_files(lab, name):
    folder = lab.half(name)
    home = folder / SCRIPTS[name].home
    content = candidates(SCRIPTS[name], folder)[0].read_bytes()
    names = ["notes.txt", "step_x.pt", "epoch3.pt.bak", "step_99999.pt.bak", "transformer_expert_epoch99.pt.old"]
    names += ["xstep_99999.pt", "transformer_expert_epoch٣.pt", "old_transformer_expert_epoch99.pt"]
    stamps = {}
    for foreign in names:
        (home / foreign).write_bytes(content)
        stamps[foreign] = (home / foreign).stat().st_mtime_ns
    out, _ = lab.run(name, folder)
    check(not any(foreign in out for foreign in names), f"a foreign file was resumed: {out[:300]}")
    for foreign in names:
        path = home / foreign
        check(path.exists() and path.read_bytes() == content, f"{foreign} was touched")
        check(path.stat().st_mtime_ns == stamps[foreign], f"{foreign} was written")
        path.unlink()
    lab.same(name, folder)
