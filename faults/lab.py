"""Tiny runs of the six scripts, the files that they leave, and the checks of the rows."""

import hashlib
import itertools
import json
import random
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from data_utils import files
from data_utils.checkpoint import by_step, numbered_files, read
from faults.child import Child

torch.set_num_threads(1)
VOLATILE = set(
    """config seconds epoch_seconds run_id throughput epoch_time_s total_time_s max_memory_mib samples_per_s
    tokens_per_s data_share peak_mb argv timestamp""".split()
)  # a clock or a place decides them
LANGUAGE = """--tokenizer bytes --d_model 32 --n_heads 2 --max_seq_len 32 --batch_size 16 --domains code
--lr 3e-3 --max_steps 30 --save_every 1 --save_minutes 0.0003 --log_interval 5 --eval_windows 40 --device cpu"""


@dataclass(frozen=True)
class Script:
    letter: str  # as in the table
    file: str
    kind: str  # of its checkpoints
    flags: str  # of a tiny run; {place} has its data
    home: str  # folder of the checkpoints, in the run's own
    metrics: str
    steps: int  # of the complete run
    go_on: str = ""  # added to the same command to go on
    named: str = "--resume {}"  # goes on from one checkpoint
    snapshot: str = ""  # a file that it may go on from, by number; "" = there are only named ones


SCRIPTS = dict(
    expert=Script(
        letter="E",
        file="train_expert.py",
        kind="expert:transformer",
        flags="--expert transformer --n_layers 1 --ffn_mult 2 --grad_accum_steps 2 --data_dir {place}/data "
        f"--checkpoint_dir run {LANGUAGE}",
        home="run",
        metrics="run/transformer_expert_metrics.jsonl",
        steps=30,
        go_on="--resume auto",
        snapshot="transformer_expert_epoch{}.pt",
    ),
    mla=Script(
        letter="M",
        file="train_mla.py",
        kind="expert:mla",
        flags="""--n_layers 1 --kv_latent_dim 16 --rope_dim 8 --grad_accum_steps 2 --data_dir {place}/data
        --checkpoint_dir run --transformer_ckpt {place}/experts/transformer_expert.pt
        --state_space_ckpt {place}/experts/state_space_expert.pt
        --diffuser_ckpt {place}/experts/diffuser_expert.pt """
        + LANGUAGE,
        home="run",
        metrics="run/nanothink_mla_metrics.jsonl",
        steps=30,
        go_on="--resume auto",
        snapshot="nanothink_mla_epoch{}.pt",
    ),
    hrm=Script(
        letter="H",
        file="train_hrm.py",
        kind="hrm",
        flags="""--dataset synthetic --run_name run --d_model 32 --n_heads 2 --batch_size 16 --eval_batch_size 200
        --eval_rows 200 --steps 20 --val_every 6 --mixed_precision none --save_minutes 0.0003 --checkpoint_limit 3
        --save_best_model --device cpu""",
        home="runs/run/checkpoints",
        metrics="runs/run/metrics.jsonl",
        steps=20,
        snapshot="step_{}.pt",
    ),
    sr=Script(
        letter="S",
        file="train_sr.py",
        kind="sr",
        flags="""--encoder_dim 32 --decoder_input_dim 32 --decoder_model_dim 32 --encoder_n_heads 2 --decoder_n_heads 2
        --encoder_ffn_hidden_dim 32 --decoder_ffn_hidden_dim 32 --decoder_n_layers 1 --encoder_n_sab 1 --batch_size 4
        --val_size 16 --val_batch_size 8 --val_problems 2 --val_choices 4 --log_interval 1 --max_operators 3
        --dtype float32 --steps 16 -vi 5 -ci 4 --encoder_dropout 0.1 --save_minutes 0.0005 --device cpu -o run""",
        home="run",
        metrics="run/metrics.jsonl",
        steps=16,
        go_on="--resume-from auto",
        named="--resume-from {}",
        snapshot="checkpoint_{}/training_state.pt",
    ),
    multimodal=Script(
        letter="V",
        file="train_multimodal.py",
        kind="multimodal",
        flags="""tasks=[continue,sudoku4] text_source=stories page_rows=2 page_cols=24 hidden_size=16 num_heads=2
        H_cycles=2 L_cycles=1 L_layers=1 num_capsules=3 supervision_steps=3 text_supervision_steps=2 latent_num_paths=2
        vq_size=64 vq_dim=4 vq_groups=2 memory_slots=16 memory_dim=4 memory_top_k=2 memory_min_acc=0.01
        decoder_layers=1 dqn_batch=4 dqn_buffer_capacity=60 dqn_warmstart_steps=5 train_samples=64 test_samples=4
        build_batch=1 global_batch_size=8 epochs=2 eval_interval=1 log_interval=2 wandb=disabled device=cpu
        dtype=float32 save_minutes=0.0005 log_file='' data_paths={place}/pages checkpoint_path=run""",
        home="run",
        metrics="run/metrics.jsonl",
        steps=32,
        named="resume={}",
    ),
    ae=Script(
        letter="A",
        file="train_ae.py",
        kind="ae:ae",
        flags="""events=200 limit=64 hidden=[8,8] latent_dim=4 codebook_size=8 batch_size=8 dropout=0.1 epochs=5
        make_plots=false save_minutes=0.0005 device=cpu out=run""",
        home="run",
        metrics="run/facts/events.jsonl",
        steps=40,
        named="resume={}",
    ),
)


class NotRun(Exception):
    """A fault that can't be injected here; the message says why."""


# --- files of a run ---------------------------------------------------------------------------
def words_of(line, **places):
    """Split a command line, '' without its quotes."""
    return [word.format(**places).replace("''", "") for word in line.split()]


def named_words(script, path):
    """Return the flags that resume one checkpoint; for train_sr.py it is a folder."""
    return words_of(script.named.format(path.parent if script.letter == "S" else path))


def truncate(path, size):
    """Cut a file to `size` bytes; below 0: so many fewer than there are, a fraction: that share."""
    content = path.read_bytes()
    if size < 0:
        size += len(content)
    elif 0 < size < 1:
        size = int(size * len(content))
    path.write_bytes(content[:size])


def rewrite(path, change):
    """Let change(state) edit a checkpoint."""
    state = read(path)
    change(state)
    files.write_atomic(path, lambda file: torch.save(state, file))


def candidates(script, folder):
    """Return the files that a run in `folder` would go on from, in their order; of a folder the one with the step."""
    home = folder / script.home
    stem = Path(script.metrics).name.removesuffix("_metrics.jsonl")
    if script.letter == "H":
        paths = by_step(numbered_files(home, r"step_(\d+)\.pt"), home / "final.pt", "hrm")
    elif script.letter == "S":
        paths = [path / "training_state.pt" for path in numbered_files(home, r"checkpoint_(\d+)")]
    elif script.letter == "V":
        paths = [home / name for name in ("latest.pt", "latest.prev.pt")]
    elif script.letter == "A":
        paths = [home / name for name in ("last.pt", "best_val.pt", "model.pt")]
    else:
        snapshots = numbered_files(home, rf"{stem}_epoch(\d+)\.pt")
        paths = [home / f"{stem}_interrupted.pt", *snapshots, home / f"{stem}.pt"]
    return [path for path in paths if path.exists()]


def newest(script, folder):
    """Read the first candidate."""
    return read(candidates(script, folder)[0])


def results(script, folder):
    """Return {name: content} of the files that a finished run leaves, and its rows of metrics."""
    home, rows = folder / script.home, []
    if script.letter == "S":
        last = numbered_files(home, r"checkpoint_(\d+)")[0]
        paths = [*last.glob("*.pt"), home / "state_dict.pt"]
    elif script.letter == "H":
        paths = [home / "final.pt", home.parent / "best-model" / "best.pt"]
    elif script.letter == "V":
        paths = [home / name for name in ("latest.pt", "ema_model.pt", "best_model.pt")]
    else:
        paths = sorted(home.glob("*.pt"))
    for line in (folder / script.metrics).read_text().splitlines()[script.letter != "A" :]:
        row = json.loads(line)
        started = script.letter == "V" and row["split"] == "train" and row["step"] % 2  # three steps after each start
        if not started and row.get("moment") not in ("on_start", "on_resume", "on_interrupt", "on_exception"):
            rows.append(row)
    return {path.relative_to(home.parent).as_posix(): read(path) for path in paths} | dict(rows=rows)


def flat(x, name=""):
    """Yield (name, bytes) of everything in nested dicts and lists that is not volatile."""
    if isinstance(x, dict):
        for key in sorted(x.keys() - VOLATILE, key=str):
            yield from flat(x[key], f"{name}.{key}")
    elif isinstance(x, (list, tuple)):
        for i, item in enumerate(x):
            yield from flat(item, f"{name}[{i}]")
    elif torch.is_tensor(x):
        yield name, x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield name, repr(x).encode()


def digests(x):
    """Return {name: SHA-256} of each tensor and number."""
    return {name: hashlib.sha256(value).hexdigest() for name, value in flat(x)}


# --- checks -----------------------------------------------------------------------------------
def check(good, message):
    if not good:
        raise AssertionError(message)


def has(text, *words):
    """Raise AssertionError unless all words are in the text."""
    for word in words:
        check(str(word) in text, f"no '{word}' in: {text.strip()[-300:]}")


def error_lines(err):
    """Return the message of an error, at most three lines from `error:` on."""
    parts = re.split(r"^error: ", err, flags=re.M)
    check(len(parts) == 2 and len(parts[1].splitlines()) <= 3, f"not one message of three lines: {err.strip()[-300:]}")
    return parts[1]


def contents(folder):
    """Return {path: bytes} of all files but locks, logs and caches."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path: path.read_bytes() for path in paths if path.suffix != ".lock" and path.name != "train.log"}


def unchanged(before, folder):
    after = contents(folder)
    differ = [path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    check(not differ, f"files were touched: {', '.join(sorted(differ)[:5])}")


# --- lab --------------------------------------------------------------------------------------
class Lab:
    """A place with the data of all scripts, complete runs to compare with, and half of each to begin with."""

    def __init__(self, place, seed=0, threads=1):
        self.place, self.seed, self.numbers = Path(place), seed, itertools.count()
        self.threads = threads  # of each run
        self.locks, self.lock, self.cache = {}, threading.Lock(), {}

    def draw(self, *key):
        """Return random.Random of a key."""
        return random.Random(f"{self.seed} {key}")

    def once(self, key, make):
        """Return make(), called once even when several threads ask."""
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.cache:
                self.cache[key] = make()
            return self.cache[key]

    def folder(self, like=None):
        """Return a new folder, a copy of `like`."""
        path = self.place / f"run-{next(self.numbers)}"
        if like:
            shutil.copytree(like, path, symlinks=True)
        else:
            path.mkdir()
        return path

    def data(self, name):
        """Make what the script reads, once."""
        if name in ("expert", "mla"):
            flags = ["expert", "--toy", f"--data_dir={self.place}/data"]
            self.once("data", lambda: self.command("prepare_data.py", *flags))
        if name == "mla":
            self.once("experts", self._experts)
        if name == "multimodal":
            flags = [*self.words(name), "dataset_only=true", "checkpoint_path=none"]
            self.once("pages", lambda: self.command("train_multimodal.py", *flags))

    def _experts(self):
        sizes = dict(transformer="--ffn_mult 2", state_space="--d_inner 32 --d_state 4 --dt_rank 4", diffuser="")
        for expert, size in sizes.items():
            flags = f"--expert {expert} --n_layers 1 {size} {LANGUAGE} --max_steps 6 --save_minutes 0 "
            flags += "--data_dir {place}/data --checkpoint_dir {place}/experts "
            flags += "--transformer_ckpt {place}/experts/transformer_expert.pt"
            self.command("train_expert.py", *words_of(flags, place=self.place))

    def words(self, name):
        return words_of(SCRIPTS[name].flags, place=self.place)

    def command(self, file, *words, status=0, seconds=600, **options):
        """Run a script of the repo to its end in a new folder -> stdout, stderr."""
        return self.end(self.child(file, words, self.folder(), **options), status, seconds)

    def child(self, file, words, folder, env=None, **options):
        env = dict(OMP_NUM_THREADS=str(self.threads)) | (env or {})
        logs = [self.place / f"log-{next(self.numbers)}.{end}" for end in ("out", "err")]
        return Child(file, words, folder, logs, env=env, **options)

    def start(self, name, folder, *flags, faults="", go_on=True, **options):
        """Start a script on its tiny run in `folder`."""
        self.data(name)
        script = SCRIPTS[name]
        words = [*self.words(name), *(words_of(script.go_on) if go_on else ()), *map(str, flags)]
        return self.child(script.file, words, folder, faults=["figures=0", *faults.split()], **options)

    def end(self, child, status=0, seconds=600):
        """Wait for a child that must leave with `status` (or one of them) -> stdout, stderr."""
        ended, out, err = child.wait(seconds)
        expected = status if isinstance(status, tuple) else (status,)
        last = " | ".join((err.strip() or out.strip()).splitlines()[-4:])[-400:]
        check(ended in expected, f"status {ended}, not {' or '.join(map(str, expected))}: {last}")
        check("Traceback" not in err, f"a traceback: {last}")
        return out, err

    def run(self, name, folder, *flags, status=0, **options):
        return self.end(self.start(name, folder, *flags, **options), status)

    def killed(self, name, folder, faults, *flags):
        """Run with faults that may kill it -> whether they did; else it was finished before."""
        child = self.start(name, folder, *flags, faults=faults)
        self.end(child, (-9, 0))
        return child.status() == -9

    def complete(self, name, *flags):
        """Return the folder of an uninterrupted run, and the digests of its results."""

        def make():
            folder = self.folder()
            self.run(name, folder, *flags, go_on=False)
            return folder, digests(results(SCRIPTS[name], folder))

        return self.once(("complete", name, flags), make)

    def half(self, name):
        """Return a copy of the folder of a run that was stopped after half of its steps."""

        def make():
            folder = self.folder()
            self.run(name, folder, faults=f"signal=SIGTERM:{SCRIPTS[name].steps // 2}:0", status=143)
            return folder

        return self.folder(self.once(("half", name), make))

    def same(self, name, folder, *flags):
        """Raise AssertionError unless the run in `folder` left the results of an uninterrupted one, bit for bit."""
        expected, actual = self.complete(name, *flags)[1], digests(results(SCRIPTS[name], folder))
        differ = [key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)]
        check(not differ, f"{len(differ)} of {len(expected)} values differ: {', '.join(sorted(differ)[:4])}")

    def go_on(self, name, folder, *flags, **options):
        """Run the same command to the end, which must be that of an uninterrupted run -> stdout, stderr."""
        out, err = self.run(name, folder, *flags, **options)
        check("exact resume is lost" not in out, "exact resume is lost")
        self.same(name, folder, *flags)
        return out, err

    def clean(self, folder):
        """Raise AssertionError if there is a temporary file."""
        paths = [path.name for path in folder.rglob("*") if ".tmp-" in path.name]
        check(not paths, f"temporary files were not removed: {', '.join(paths)}")
