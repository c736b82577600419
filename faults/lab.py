"""What the rows of faults.py are made of: tiny runs of the six scripts, what they leave, and what it should be."""

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

from benchmarks.fault_child import Child
from data_utils import files
from data_utils.checkpoint import by_step, numbered_files, read

torch.set_num_threads(1)
VOLATILE = set(
    """config seconds epoch_seconds run_id throughput epoch_time_s total_time_s max_memory_mib samples_per_s
tokens_per_s data_share peak_mb argv timestamp""".split()
)  # what a clock or a place decides
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
    steps: int  # of the whole run
    go_on: str = ""  # what the same command needs to go on
    named: str = "--resume {}"  # to go on from one checkpoint
    fresh: str = "--fresh"
    snapshot: str = ""  # a file that it may go on from, by number; "" = there are only named ones


SCRIPTS = dict(
    expert=Script("E", "train_expert.py", "expert:transformer", f"--expert transformer --n_layers 1 --ffn_mult 2 "
                  f"--grad_accum_steps 2 --data_dir {{place}}/data --checkpoint_dir run {LANGUAGE}", "run",
                  "run/transformer_expert_metrics.jsonl", 30, "--resume auto",
                  snapshot="transformer_expert_epoch{}.pt"),
    mla=Script("M", "train_mla.py", "expert:mla", f"--n_layers 1 --kv_latent_dim 16 --rope_dim 8 --grad_accum_steps 2 "
               "--data_dir {place}/data --checkpoint_dir run --transformer_ckpt {place}/experts/transformer_expert.pt "
               "--state_space_ckpt {place}/experts/state_space_expert.pt "
               f"--diffuser_ckpt {{place}}/experts/diffuser_expert.pt {LANGUAGE}", "run",
               "run/nanothink_mla_metrics.jsonl", 30, "--resume auto", snapshot="nanothink_mla_epoch{}.pt"),
    hrm=Script("H", "train_hrm.py", "hrm", "--dataset synthetic --run_name run --d_model 32 --n_heads 2 "
               "--batch_size 16 --eval_batch_size 200 --eval_rows 200 --steps 20 --val_every 6 --mixed_precision none "
               "--save_minutes 0.0003 --checkpoint_limit 3 --save_best_model --device cpu", "runs/run/checkpoints",
               "runs/run/metrics.jsonl", 20, snapshot="step_{}.pt"),
    sr=Script("S", "train_sr.py", "sr", "--encoder_dim 32 --decoder_input_dim 32 --decoder_model_dim 32 "
              "--encoder_n_heads 2 --decoder_n_heads 2 --encoder_ffn_hidden_dim 32 --decoder_ffn_hidden_dim 32 "
              "--decoder_n_layers 1 --encoder_n_sab 1 --batch_size 4 --val_size 16 --val_batch_size 8 "
              "--val_problems 2 --val_choices 4 --log_interval 1 --max_operators 3 --dtype float32 --steps 16 -vi 5 "
              "-ci 4 --encoder_dropout 0.1 --save_minutes 0.0005 --device cpu -o run", "run", "run/metrics.jsonl", 16,
              "--resume-from auto", "--resume-from {}", snapshot="checkpoint_{}/training_state.pt"),
    multimodal=Script("V", "train_multimodal.py", "multimodal", "tasks=[continue,sudoku4] text_source=stories "
                      "page_rows=2 page_cols=24 hidden_size=16 num_heads=2 H_cycles=2 L_cycles=1 L_layers=1 "
                      "num_capsules=3 supervision_steps=3 text_supervision_steps=2 latent_num_paths=2 vq_size=64 "
                      "vq_dim=4 vq_groups=2 memory_slots=16 memory_dim=4 memory_top_k=2 memory_min_acc=0.01 "
                      "decoder_layers=1 dqn_batch=4 dqn_buffer_capacity=60 dqn_warmstart_steps=5 train_samples=64 "
                      "test_samples=4 build_batch=1 global_batch_size=8 epochs=2 eval_interval=1 log_interval=2 "
                      "wandb=disabled device=cpu dtype=float32 save_minutes=0.0005 log_file='' "
                      "data_paths={place}/pages checkpoint_path=run", "run", "run/metrics.jsonl", 32, "", "resume={}",
                      "fresh=true"),
    ae=Script("A", "train_ae.py", "ae:ae", "events=200 limit=64 hidden=[8,8] latent_dim=4 codebook_size=8 batch_size=8 "
              "dropout=0.1 epochs=5 make_plots=false save_minutes=0.0005 device=cpu out=run", "run",
              "run/facts/events.jsonl", 40, "", "resume={}", "fresh=true"),
)  # fmt: skip


class NotRun(Exception):
    """A fault that can't be injected here; the message says why."""


def words_of(line, **places):
    """The words of a command line, '' without its quotes."""
    return [word.format(**places).replace("''", "") for word in line.split()]


def truncated(path, size):
    """Cut a file to `size` bytes; below 0: so many fewer than there are, a fraction: that share."""
    content = path.read_bytes()
    size = len(content) + size if size < 0 else int(size * len(content)) if 0 < size < 1 else size
    path.write_bytes(content[:size])


def candidates(script, folder):
    """Files that a run in `folder` would go on from, in their order; of a folder of files the one with the step."""
    home = folder / script.home
    if script.letter == "H":
        files = by_step(numbered_files(home, r"step_(\d+)\.pt"), home / "final.pt", "hrm")
    elif script.letter == "S":
        files = [path / "training_state.pt" for path in numbered_files(home, r"checkpoint_(\d+)")]
    else:
        stem = Path(script.metrics).name.removesuffix("_metrics.jsonl")
        names = dict(V=["latest.pt", "latest.prev.pt"], A=["last.pt", "best_val.pt", "model.pt"])
        files = [home / name for name in names.get(script.letter, [])]
        if script.letter in "EM":
            snapshots = numbered_files(home, rf"{stem}_epoch(\d+)\.pt")
            files = [home / f"{stem}_interrupted.pt", *snapshots, home / f"{stem}.pt"]
    return [path for path in files if path.exists()]


def newest(script, folder):
    """What the first candidate holds."""
    return read(candidates(script, folder)[0])


def results(script, folder):
    """{name: what was saved} of all that a finished run leaves, and its rows of metrics."""
    home, rows = folder / script.home, []
    if script.letter == "S":
        last = numbered_files(home, r"checkpoint_(\d+)")[0]
        files = [*last.glob("*.pt"), home / "state_dict.pt"]
    elif script.letter == "H":
        files = [home / "final.pt", home.parent / "best-model" / "best.pt"]
    elif script.letter == "V":
        files = [home / name for name in ("latest.pt", "ema_model.pt", "best_model.pt")]
    else:
        files = sorted(home.glob("*.pt"))
    for line in (folder / script.metrics).read_text().splitlines()[script.letter != "A" :]:
        row = json.loads(line)
        started = script.letter == "V" and row["split"] == "train" and row["step"] % 2  # a row three steps after each
        if not started and row.get("moment") not in ("on_start", "on_resume", "on_interrupt", "on_exception"):
            rows.append(row)
    return {path.relative_to(home.parent).as_posix(): read(path) for path in files} | dict(rows=rows)


def flat(x, name=""):
    """Yield (name, bytes) of all that is in nested dicts and lists, but for what is volatile."""
    if isinstance(x, dict):
        for key in sorted(x.keys() - VOLATILE, key=str):
            yield from flat(x[key], f"{name}.{key}")
    elif isinstance(x, (list, tuple)):
        for i, item in enumerate(x):
            yield from flat(item, f"{name}[{i}]")
    else:
        yield name, x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if torch.is_tensor(x) else repr(x)


def digests(x):
    """{name: SHA-256} of each tensor and number."""
    return {name: hashlib.sha256(v if isinstance(v, bytes) else v.encode()).hexdigest() for name, v in flat(x)}


def check(good, what):
    if not good:
        raise AssertionError(what)


def has(text, *words):
    """Raise AssertionError unless all words are in the text."""
    for word in words:
        check(str(word) in text, f"no '{word}' in: {text.strip()[-300:]}")


def contents(folder):
    """{path: bytes} of all files but locks, logs and caches."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path: path.read_bytes() for path in files if path.suffix != ".lock" and path.name != "train.log"}


def unchanged(before, folder):
    after = contents(folder)
    differ = [path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    check(not differ, f"files were touched: {', '.join(sorted(differ)[:5])}")


class Lab:
    """A place with data of all scripts, whole runs to compare with, and half of each to begin with."""

    def __init__(self, place, seed=0, threads=1):
        self.place, self.seed, self.numbers = Path(place), seed, itertools.count()
        self.threads = threads  # of each run
        self.locks, self.lock, self.made = {}, threading.Lock(), {}

    def draw(self, *key):
        """Return random.Random of a key."""
        return random.Random(f"{self.seed} {key}")

    def once(self, key, make):
        """Return make(), made once even when several threads ask."""
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.made:
                self.made[key] = make()
            return self.made[key]

    def folder(self, like=None):
        """Return a new folder, a copy of `like`."""
        path = self.place / f"run-{next(self.numbers)}"
        shutil.copytree(like, path, symlinks=True) if like else path.mkdir()
        return path

    def data(self, name):
        """Make what the script reads, once."""
        prepare = {
            "data": lambda: self.command("prepare_data.py", "expert", "--toy", f"--data_dir={self.place}/data"),
            "pages": lambda: self.command(
                "train_multimodal.py", *self.words("multimodal"), "dataset_only=true", "checkpoint_path=none"
            ),
            "experts": self._experts,
        }
        for needed in dict(expert=["data"], mla=["data", "experts"], multimodal=["pages"]).get(name, []):
            self.once(needed, prepare[needed])

    def _experts(self):
        sizes = dict(transformer="--ffn_mult 2", state_space="--d_inner 32 --d_state 4 --dt_rank 4", diffuser="")
        for expert, size in sizes.items():
            more = f"--expert {expert} --n_layers 1 {size} {LANGUAGE} --max_steps 6 --save_minutes 0 --data_dir "
            more += "{place}/data --checkpoint_dir {place}/experts "
            more += "--transformer_ckpt {place}/experts/transformer_expert.pt"
            self.command("train_expert.py", *words_of(more, place=self.place))

    def words(self, name):
        return words_of(SCRIPTS[name].flags, place=self.place)

    def command(self, file, *words, status=0, seconds=600, **how):
        """Run a script of the repo to its end in a folder of its own -> stdout, stderr."""
        return self.end(self.child(file, words, self.folder(), **how), status, seconds)

    def child(self, file, words, folder, env=None, **how):
        env = dict(OMP_NUM_THREADS=str(self.threads)) | (env or {})
        logs = [self.place / f"log-{next(self.numbers)}.{end}" for end in ("out", "err")]
        return Child(file, words, folder, logs, env=env, **how)

    def start(self, name, folder, *flags, faults="", go_on=True, **how):
        """Start a script on its tiny run in `folder`."""
        self.data(name)
        script = SCRIPTS[name]
        words = [*self.words(name), *(words_of(script.go_on) if go_on else ()), *map(str, flags)]
        return self.child(script.file, words, folder, faults=["figures=0", *faults.split()], **how)

    def end(self, child, status=0, seconds=600):
        """Wait for a child that must leave with `status` (or one of them) -> stdout, stderr."""
        found, out, err = child.wait(seconds)
        expected = status if isinstance(status, tuple) else (status,)
        said = (err.strip() or out.strip()).splitlines()[-4:]
        check(found in expected, f"status {found}, not {' or '.join(map(str, expected))}: {' | '.join(said)[-400:]}")
        check("Traceback" not in err, f"a traceback: {' | '.join(said)[-400:]}")
        return out, err

    def run(self, name, folder, *flags, status=0, **how):
        return self.end(self.start(name, folder, *flags, **how), status)

    def whole(self, name, *flags):
        """Return the folder of an uninterrupted run, and the digests of what it left."""

        def make():
            folder = self.folder()
            self.run(name, folder, *flags, go_on=False)
            return folder, digests(results(SCRIPTS[name], folder))

        return self.once(("whole", name, flags), make)

    def half(self, name):
        """Return a copy of the folder of a run that was stopped after half of its steps."""

        def make():
            folder = self.folder()
            self.run(name, folder, faults=f"signal=SIGTERM:{SCRIPTS[name].steps // 2}:0", status=143)
            return folder

        return self.folder(self.once(("half", name), make))

    def same(self, name, folder, *flags):
        """Raise AssertionError unless the run in `folder` left what an uninterrupted one leaves, bit for bit."""
        expected, found = self.whole(name, *flags)[1], digests(results(SCRIPTS[name], folder))
        differ = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        check(not differ, f"{len(differ)} of {len(expected)} values differ: {', '.join(sorted(differ)[:4])}")

    def go_on(self, name, folder, *flags, **how):
        """The same command to the end, which must be that of an uninterrupted run -> stdout, stderr."""
        said = self.run(name, folder, *flags, **how)
        check("exact resume is lost" not in said[0], "exact resume is lost")
        self.same(name, folder, *flags)
        return said

    def clean(self, folder):
        """Raise AssertionError if there is a temporary file."""
        torn = [path.name for path in folder.rglob("*") if ".tmp-" in path.name]
        check(not torn, f"temporary files were left: {', '.join(torn)}")


def rewritten(path, out, change):
    """Write what `path` holds, changed, as a checkpoint `out`."""
    state = read(path)
    change(state)
    files.write_atomic(out, lambda file: torch.save(state, file))
    return out


def error_lines(err):
    """The message of an error, at most three lines from `error:` on."""
    lines = re.split(r"^error: ", err, flags=re.M)
    check(len(lines) == 2 and len(lines[1].splitlines()) <= 3, f"not one message of three lines: {err.strip()[-300:]}")
    return lines[1]
