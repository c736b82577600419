"""Run every script on a GPU for some minutes and write one report of speed, memory, losses and files.

    bash scripts/gpu_check.sh                              # at most 8 minutes on one card
    bash scripts/gpu_check.sh --minutes 20                 # all rows on a slow card
    bash scripts/gpu_check.sh --only transformer,sr        # the rows whose name holds one of these
    bash scripts/gpu_check.sh --device cpu --tiny          # seconds, without a GPU: only shows that it runs

Three kinds of row, the most useful first:
- SCRIPT PRECISION: some 100 steps at the guide's sizes. Speed, memory and loss are those of the second half.
- SCRIPT: CPU, resume, generate: three steps of a small batch in each precision, the same steps on the CPU, the fp32 run
  resumed on the CPU, and generate.py with it. Losses are compared as |GPU - CPU| / CPU. The row fails when step 1
  differs by more than 0.1 % in fp32 or 2 % else, or a later step of fp32 or of the resumed run by more than 2 %.
- sudoku9 hard: train_hrm.py on 1,000 Sudokus of as few givens as possible, for a fourth of the minutes; the last row.
- nanoGPT, TRM: training steps of ours and of the official code in turn, where its code lies in benchmarks/peers.

"waits for host" is the share of the time in which the GPU had nothing to do: the profiler records ten steps, and the
share is the time that no kernel, copy or fill covers; on a CPU, no operation of torch. "host waits for GPU" is the
share that the host spends in CUDA calls named Synchronize.

Losses of train_ae.py are those of epochs of three steps; train_multimodal.py has half its width and one task there.
Data come from Python's own library, puzzles and formulas, without a network. Runs need some 25 GB below TMPDIR.

Each row has its own process and time limit. A row that fails is a row of the report, the others go on. The report is
written after each row. Rows that the minutes did not allow are listed as not run. The status is 1 then, and when a row
failed; 0 when all rows ran.
"""

import gc
import importlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch


@dataclass
class Config:
    device: str = "cuda"  # or cuda:1, or cpu with --tiny
    tiny: bool = False  # toy sizes and few steps, on a CPU in bf16 alone: only shows that it runs
    precisions: tuple[str, ...] = ("bf16", "fp32", "fp16")  # the first is that of the first rows
    minutes: float = 8.0  # for all rows together
    only: str = ""  # rows whose name holds one of these, comma separated, and the data that all need
    out: str = ""  # report, its table beside it as .md; "" = gpu_check.json in benchmarks/results, --tiny: work
    work: str = ""  # folder of data and runs, not removed at the end; "" = a temporary one
    warm: bool = True  # fork the rows from one process that has imported torch; off, each imports it


INSIDE = "machine", "text", "traced", "nanogpt", "trm"  # functions that this file runs as the process of a row
FILE = str(Path(__file__).resolve())

if __name__ == "__main__" and sys.argv[1:2] not in [[name] for name in INSIDE]:
    cfg = from_cli(Config, __doc__, prog="bash scripts/gpu_check.sh")

import torch

from benchmarks.peers import CLONES, GET
from benchmarks.report import RESULTS, ROOT, WORK, figure, rounded, write_json
from data_utils.events.facts import read_scalars
from data_utils.files import write_atomic
from data_utils.metrics import read_rows

FEW, MORE = 3, 5  # steps of the runs that are compared, and of those that go on
TRACED = 10  # steps that the profiler records
NEAR = dict(fp32=1e-3, bf16=2e-2, fp16=2e-2)  # most that the loss of step 1 may differ from the CPU's
LATER = 2e-2  # the same of a later step, in fp32
LIMIT, COMPILE_LIMIT = 75, 150  # seconds of a row
LEAST = 4  # seconds without which no row is begun
AMP = dict(bf16="--amp_dtype=bf16", fp16="--amp_dtype=fp16", fp32="--no-use_amp")
DTYPE = dict(bf16="--dtype=bfloat16", fp16="--dtype=float16", fp32="--dtype=float32")
MIXED = dict(bf16="--mixed_precision=bf16", fp16="--mixed_precision=fp16", fp32="--mixed_precision=none")


# --- scripts ------------------------------------------------------------------------------------
@dataclass
class System:
    """A script and its flags: {work} is the folder of data and runs, {folder} that of a run, {name} its name."""

    script: str
    flags: str  # the guide's sizes
    tiny: str  # instead of `flags`
    folder: str  # flag that names the folder of a run
    metrics: str  # below that folder
    precisions: dict
    unit: str
    needs: str = ""  # files below {work} that rows before it make
    steps: int = 60  # of a run that is timed
    every: str = "--log_interval={every}"
    compiled: str = "--compile"
    traced: bool = False  # whether its rows say how much of the time waits for the host
    small: str = ""  # added where the CPU takes the same steps; "" = not compared
    few: str = ""  # instead of `flags` there: a fourth of the bytes to save, and short answers
    resume: str = ""  # added to go on; "" = it goes on by itself
    generate: str = ""  # flags of generate.py


SHORT = "--save_minutes=0"
TEXT = f"--data_dir={{work}}/text --max_epochs=1000 --warmup_steps=6 {SHORT}"  # measured beyond the warmup
FULL_TEXT = f"{TEXT} --tokenizer=bpe:{{work}}/bpe.json --eval_windows=64"
TINY_TEXT = f"{TEXT} --tokenizer=bytes --eval_windows=8 --d_model=32 --n_heads=2 --n_layers=1 --max_seq_len=32"
TINY_TEXT += " --batch_size=8"
STEADY = "--batch_size=2 --dropout=0 --min_lr_ratio=1"  # dropout is drawn on the device; rates by no number of steps
WRITE = "--checkpoint={folder}/%s.pt --max_new_tokens=20 --prompt=import"
EXPERTS = "transformer", "state_space", "diffuser"
STORED = {name: f"--{name}_ckpt={{work}}/experts/{name}_expert.pt" for name in EXPERTS}
EVENTS = f"{SHORT} --no-make_plots"
FORMULAS = f"{SHORT} --val_problems=0 --no-verbose --compile_mode=off"  # the bundle says default
TINY_FORMULAS = """--encoder_dim=32 --decoder_input_dim=32 --decoder_model_dim=32 --encoder_n_heads=2
--decoder_n_heads=2 --encoder_ffn_hidden_dim=32 --decoder_ffn_hidden_dim=32 --decoder_n_layers=1 --encoder_n_sab=1
--batch_size=4 --max_operators=3 --holdout_pools none"""
TINY_PAGES = """--train_samples=64 --test_samples=2 --hidden_size=16 --num_heads=2 --L_layers=1 --supervision_steps=2
--global_batch_size=4 --text_supervision_steps=2 --vq_size=64 --vq_dim=4 --vq_groups=2 --memory_slots=16
--decoder_layers=1 --dqn_batch=4 --H_cycles=1 --L_cycles=1"""
PAGES = f"{SHORT} --wandb=disabled --log_file= --epochs=10000 --eval_interval=10000 --grad_monitor_every=0"
PAGES += " --data_paths={work}"


def expert(name, more="", tiny="", **fields):
    return System(
        "train_expert.py",
        f"--expert={name} {FULL_TEXT} {more}",
        f"--expert={name} {TINY_TEXT} {more} {tiny}",
        "--checkpoint_dir={folder}",
        f"{name}_expert_metrics.jsonl",
        AMP,
        "tokens/s",
        needs="text bpe.json",
        **fields,
    )


SYSTEMS = dict(
    transformer=expert("transformer", small=STEADY, resume="--resume", generate=WRITE % "transformer_expert"),
    state_space=expert("state_space", tiny="--d_inner=32 --d_state=4 --dt_rank=4", steps=50),
    diffuser=expert("diffuser", STORED["transformer"], steps=50),
    mla=System(
        "train_mla.py",
        f"{FULL_TEXT} {' '.join(STORED.values())}",
        f"{TINY_TEXT} {' '.join(STORED.values())} --kv_latent_dim=16 --rope_dim=8 --grad_accum_steps=1",
        "--checkpoint_dir={folder}",
        "nanothink_mla_metrics.jsonl",
        AMP,
        "tokens/s",
        needs=" ".join(["text bpe.json", *(f"experts/{name}_expert.pt" for name in EXPERTS)]),
        steps=50,
        small=f"{STEADY} --grad_accum_steps=1",
        resume="--resume",
        generate=WRITE % "nanothink_mla",
    ),
    sr=System(
        "train_sr.py",
        f"--config={{root}}/configs/v23.0-3M/train.yaml {FORMULAS} --val_size=64",
        f"{FORMULAS} --val_size=8 --steps=1000 {TINY_FORMULAS}",
        "--output_dir={folder}",
        "metrics.jsonl",
        DTYPE,
        "samples/s",
        steps=100,
        compiled="--compile_mode=default",
        small="--batch_size=8 --num_workers=0 --pre_encoder_noise_scale=0 --steps=5 --warmup=0 --cooldown=0",
        resume="--resume-from=auto",
        generate="formula --model={folder} --data={work}/points.csv --choices=8",
    ),
    ae=System(
        "train_ae.py",
        f"{EVENTS} --events=8000 --epochs=1000",
        f"{EVENTS} --events=480 --epochs=1000 --hidden 32 32",
        "--out={folder}",
        "facts/scalars.csv",
        DTYPE,
        "samples/s",
        steps=6,  # epochs
        every="",
        small="--events=480 --epochs=5",
        generate="events {folder} --mode=reconstruct --limit=50",
    ),
    hrm=System(
        "train_hrm.py",
        f"--dataset={{work}}/rows {SHORT} --eval_rows=64 --steps=100000",
        f"--dataset=synthetic {SHORT} --eval_rows=16 --steps=100000 --d_model=32 --batch_size=16",
        "--run_name={name}",
        "metrics.jsonl",
        MIXED,
        "tokens/s",
        needs="rows",
        steps=100,
        every="--log_steps={every}",
        small="--batch_size=4",
        generate="--checkpoint={folder}/checkpoints/final.pt --prompt=import --max_new_tokens=10",
    ),
    multimodal=System(
        "train_multimodal.py",
        f"{PAGES}/pages --tasks read continue fill --train_samples=600 --test_samples=8",
        f"{PAGES}/pages --arch=smoke --tasks read continue {TINY_PAGES}",
        "--checkpoint_path={folder}",
        "metrics.jsonl",
        DTYPE,
        "samples/s",
        needs="pages",
        traced=True,
        small="--global_batch_size=4",
        few=f"{PAGES}/words --tasks fill --train_samples=64 --test_samples=2 --hidden_size=512 --num_heads=8",
        generate="multimodal {folder} --task={task} --input={work}/page.txt",
    ),
    sudoku9=System(
        "train_multimodal.py",
        f"{PAGES}/sudoku --arch=sudoku9 --train_samples=1536 --test_samples=64",
        f"{PAGES}/sudoku --arch=sudoku4 {TINY_PAGES}",
        "--checkpoint_path={folder}",
        "metrics.jsonl",
        DTYPE,
        "samples/s",
        needs="sudoku",
        traced=True,
    ),
)
MAIN = "transformer", "mla", "sr", "ae", "hrm", "multimodal"  # one of each script: in every precision
TEXT_VOCABULARY = 50257  # as many ids as GPT-2 has
EPOCH = 3  # steps of an epoch of train_ae.py with 480 events, whose losses are those of epochs
FULL_EPOCH = 50  # the same with 8000 events


def words_of(system, cfg, name, precision, steps, every, *more, few=False):
    """Return the words that start a run of `system`, called `name`: a path and flags."""
    flags = system.tiny if cfg.tiny else few and system.few or system.flags
    text = f"{flags} {system.folder} {system.precisions[precision]} {system.every}"
    text = text.format(work=cfg.work, root=ROOT, folder=folder_of(system, cfg, name), name=name, every=every)
    more = [word.format(work=cfg.work) for part in more for word in part.split()]
    if system.script == "train_ae.py":
        steps *= EPOCH if cfg.tiny or "--events=480" in more else FULL_EPOCH
    return [str(ROOT / system.script), *text.split(), f"--max_steps={steps}", *more]


def folder_of(system, cfg, name):
    if system.script == "train_hrm.py":
        return Path(cfg.work, "runs", name)
    return Path(cfg.work, "experts" if name in EXPERTS else name)


def rows_of(system, folder):
    """Return the training rows in the metrics of a run: step (of train_ae.py the epoch), loss, peak_mb."""
    path = folder / system.metrics
    if path.suffix != ".csv":
        return [row for row in read_rows(path) if row.get("split") == "train"]
    rows = [row for row in read_scalars(folder) if row["split"] == "train"]
    return [dict(step=int(row["epoch"]) + 1, loss=float(row["train_loss"]), samples_per_s=float(row["throughput"]),
                 peak_mb=float(row["max_memory_mib"]) * 2**20 / 1e6) for row in rows]  # fmt: skip


HARD = "--dataset={work}/hard --run_name=hard --save_minutes=0 --log_steps=5 --lr_scheduler=constant --reveal=0.5"
HARD_FULL = "--d_model=512 --n_heads=8 --batch_size=256 --steps=1000000"
HARD_SCORES = ("solved", "exact"), ("with halting", "exact_halting"), ("cells", "cells")  # of a validation
HARD_TINY = "--max_seq_len=16 --d_model=32 --batch_size=4 --segments=1 --steps=10 --warmup_steps=2"


# --- rows ---------------------------------------------------------------------------------------
@dataclass
class Row:
    """Commands that run one after the other, and `read`, which takes figures from their files: logs -> dict."""

    name: str
    commands: list
    read: object
    alone: bool = True  # nothing runs beside what is timed
    limit: float = LIMIT
    needs: list = field(default_factory=list)
    leaves: list = field(default_factory=list)  # folders that no other row reads
    outcome: str = "not run"
    error: str = ""
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)


def speed(cfg, name, precision, compiled=False):
    """A run that is timed."""
    system = SYSTEMS[name]
    steps, every = (6, 1) if cfg.tiny else (system.steps, 5)
    title = " ".join([name, precision, *["compiled"] * compiled])
    run = name if name in EXPERTS and title == f"{name} {cfg.precisions[0]}" else title.replace(" ", "_")
    folder = folder_of(system, cfg, run)
    words = words_of(system, cfg, run, precision, steps, every, f"--device={cfg.device}", *[system.compiled] * compiled)
    last, trace = steps, Path(cfg.work, f"{run}_trace.json")
    if system.traced:
        last = steps - 1 - (1 if cfg.tiny else TRACED)
        words = [FILE, "traced", str(trace), str(last), str(steps - 1), cfg.device, *words]
    leaves = [] if folder.name == "experts" else [folder]

    def read(logs):
        rows = [row for row in rows_of(system, folder) if steps // 2 <= row["step"] <= last]
        ran = precision_of(logs[0])
        notes = [f"ran in {ran}"] * (ran != precision)
        figures = dict(unit=system.unit, loss=mean(row["loss"] for row in rows), peak_mb=rows[-1]["peak_mb"])
        if "seconds" in rows[0]:
            figures["it_s"] = (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])
        if name in ("multimodal", "sudoku9"):  # whose samples_per_s is the mean since the start
            config = read_rows(folder / system.metrics)[0]["config"]
            figures["speed"] = figures["it_s"] * config["global_batch_size"]
        else:
            key = system.unit.replace("/", "_per_")
            figures["speed"] = statistics.median(row[key] for row in rows[1:])
        if "data_share" in rows[-1]:
            figures["data_share"] = mean(row["data_share"] for row in rows[1:])
            notes.append(f"{figures['data_share']:.0%} of the time draws formulas")
        if skipped := rows[-1].get("skipped"):
            notes.append(f"{skipped} steps skipped")
        if system.traced:
            recorded = json.loads(trace.read_text())
            figures |= {key: recorded[key] for key in ("waits_for_host", "waits_for_gpu") if key in recorded}
            if "error" in recorded:
                notes.append(f"no profile: {recorded['error']}")
        return figures | dict(note=", ".join(notes))

    return Row(title, [words], read, True, COMPILE_LIMIT if compiled else LIMIT, needs(cfg, system), leaves)


def precision_of(log):
    """Return the precision that a run took, as the first line of its log says."""
    line = re.search(r"^\S+, (bfloat16|float16|float32)\b", log.read_text(errors="replace"), re.M)
    names = dict(bfloat16="bf16", float16="fp16", float32="fp32")
    return names[line[1]] if line else "an unknown precision"


def needs(cfg, system):
    return [Path(cfg.work, path) for path in system.needs.split() if not cfg.tiny or path not in ("bpe.json", "rows")]


def compared(cfg, name):
    """The same few steps here and on the CPU; a run from here goes on there; generate.py with it."""
    system = SYSTEMS[name]
    precisions = ["fp32", *(key for key in cfg.precisions if key != "fp32" and not on_cpu(cfg))]
    runs = {precision: f"{name}_small_{precision}" for precision in (*precisions, "cpu")}

    def words(run, precision, device, steps, *more):
        more = system.small, f"--device={device}", *more
        return words_of(system, cfg, run, precision, steps, 1, *more, few=True)

    def generate(folder):
        flags = system.generate.format(folder=folder, work=cfg.work, task="read" if cfg.tiny else "fill").split()
        return [str(ROOT / "generate.py"), *flags, f"--device={cfg.device}"]

    commands = [words(runs[precision], precision, cfg.device, FEW) for precision in precisions]
    commands.append(words(runs["cpu"], "fp32", "cpu", MORE))
    folder = folder_of(system, cfg, runs["fp32"])
    commands.append(words(runs["fp32"], "fp32", "cpu", MORE, system.resume))
    commands.append(generate(folder))

    def read(logs):
        losses = {key: {row["step"]: row["loss"] for row in rows_of(system, folder_of(system, cfg, run))}
                  for key, run in runs.items()}  # fmt: skip
        cpu = losses.pop("cpu")
        apart = {key: {step: abs(loss - cpu[step]) / abs(cpu[step]) for step, loss in steps.items()}
                 for key, steps in losses.items()}  # fmt: skip
        first = {key: steps[1] for key, steps in apart.items()}
        later = max(apart["fp32"][step] for step in range(2, FEW + 1))
        resumed = max(apart["fp32"][step] for step in range(FEW + 1, MORE + 1))
        parts = [f"{key} {value:.1e}" for key, value in first.items()]
        note = f"step 1: {', '.join(parts)}; fp32 to step {FEW}: {later:.1e}; resumed to step {MORE}: {resumed:.1e}"
        figures = dict(compared=first | dict(later=later, resumed=resumed), note=note)
        if "resumed " not in logs[-2].read_text(errors="replace"):
            raise DataError("the run on the CPU did not go on from the file that was there")
        far = [key for key, value in first.items() if not value <= NEAR[key]]
        far += [key for key, value in dict(later=later, resumed=resumed).items() if not value <= LATER]
        if far:
            raise DataError(f"losses differ from the CPU's ({', '.join(far)}): {note}")
        return figures

    leaves = [folder_of(system, cfg, run) for run in runs.values()]
    return Row(f"{name}: CPU, resume, generate", commands, read, False, 2 * LIMIT, needs(cfg, system), leaves)


def beside(cfg, name):
    """Training steps of ours and of official code in turn."""
    path = Path(cfg.work, f"{name}.json")
    words = [FILE, name.lower(), str(path), cfg.device, "tiny" if cfg.tiny else "full"]
    return Row(f"{name} beside ours", [words], lambda logs: json.loads(path.read_text()))


def hard(cfg):
    """Train on Sudokus of as few givens as possible for a fourth of the minutes; held-out ones are the figure."""
    seconds = 15 * cfg.minutes
    flags = f"{HARD} {HARD_TINY if cfg.tiny else HARD_FULL} {MIXED[chosen(cfg)[0]]}".format(work=cfg.work)
    words = [str(ROOT / "train_hrm.py"), *flags.split(), f"--max_seconds={seconds:g}", f"--device={cfg.device}"]
    folder = Path(cfg.work, "runs", "hard")

    def read(logs):
        rows = read_rows(folder / "metrics.jsonl")
        train, (*_, val) = ([row for row in rows if row.get("split") == split] for split in ("train", "val"))
        shares = [f"{name} {100 * val[key]:.1f} %" for name, key in HARD_SCORES]
        return dict(unit="tokens/s", speed=statistics.median(row["tokens_per_s"] for row in train),
                    loss=train[-1]["loss"], peak_mb=train[-1]["peak_mb"],
                    note=f"held out after {val['step']} steps: {', '.join(shares)}")  # fmt: skip

    return Row("sudoku9 hard", [words], read, True, seconds + LIMIT, [Path(cfg.work, "hard", "meta.json")], [folder])


def data_rows(cfg):
    """Return the rows that make the data of the others, without a network."""

    def row(name, *commands):
        return Row(f"data: {name}", [[str(word) for word in words] for words in commands], lambda logs: {}, False)

    def pages(name, folder):
        system = SYSTEMS[name]
        words = words_of(system, cfg, f"{name}_data", "fp32", 1, 1, "--dataset_only --device=cpu")
        return row(folder, words)

    work = Path(cfg.work)
    rows = [row("text", [FILE, "text", work / "text", 0.01 if cfg.tiny else 10])]
    if not cfg.tiny:
        sizes = [f"--vocab_size={TEXT_VOCABULARY}", f"--out={work}/bpe.json"]
        learn = [ROOT / "prepare_data.py", "tokenizer", f"--data_dir={work}/corpus", *sizes]
        rows.append(row("tokenizer", [FILE, "text", work / "corpus", 10], learn))
        source = [f"--source={work}/rows_text", f"--dest={work}/rows", "--vocab_size=8192", "--format=bin"]
        write = [ROOT / "prepare_data.py", "language", *source, "--max_chars=4000000"]
        rows.append(row("rows", [FILE, "text", work / "rows_text", 3], write))
    sizes = ["--train=1000", "--val=200"]
    if cfg.tiny:
        sizes = ["--size=4", "--train=8", "--val=4", "--num_threads=1"]
    rows.append(row("hard", [ROOT / "prepare_data.py", "sudoku", "--givens=0", *sizes, f"--out={work}/hard"]))
    return [*rows, pages("multimodal", "pages"), pages("sudoku9", "sudoku")]


def on_cpu(cfg):
    return torch.device(cfg.device).type == "cpu"


def chosen(cfg):
    return cfg.precisions[:1] if on_cpu(cfg) else cfg.precisions  # a CPU has no fp16, and compiles for minutes


def all_rows(cfg):
    """Return every row, the most useful first."""
    precisions = chosen(cfg)
    first = precisions[0]  # its experts are those of train_mla.py
    rows = data_rows(cfg)
    rows += [speed(cfg, name, first) for name in SYSTEMS]
    rows += [compared(cfg, name) for name in MAIN]
    rows += [beside(cfg, name) for name in ("nanoGPT", "TRM")]
    rows += [speed(cfg, name, precision) for precision in precisions[1:] for name in MAIN]
    for precision in () if on_cpu(cfg) else precisions:
        rows += [speed(cfg, name, precision, compiled=True) for name in MAIN]
        rows += [speed(cfg, "sudoku9", precision, compiled=True)] * (precision == first)
    rows.append(hard(cfg))
    parts = cfg.only.split(",")
    return [row for row in rows if row.name.startswith("data:") or any(part in row.name for part in parts)]


def mean(numbers):
    return statistics.fmean(numbers)


# --- processes of rows --------------------------------------------------------------------------
def machine(path, device):
    """Write the facts of the device."""
    from benchmarks.run import processor

    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    facts = dict(name=processor(), capability="", memory_gb=0.0, driver="", cuda=torch.version.cuda or "")
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= dict(name=properties.name, capability=f"{properties.major}.{properties.minor}", driver=driver(),
                      memory_gb=round(properties.total_memory / 1e9, 1))  # fmt: skip
    cpu = [torch.backends.cpu.get_cpu_capability()]
    facts |= dict(device=device, torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"), processor=processor(),
                  cores=os.cpu_count(), threads=torch.get_num_threads(), cpu=cpu)  # fmt: skip
    write_atomic(Path(path), lambda file: file.write(json.dumps(facts).encode()))


def driver():
    """Return the version of the GPU's driver, "" if it can't be read."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def text(folder, megabytes):
    """Write so much of Python's own library as a domain of text."""
    import sysconfig

    size, lines = int(float(megabytes) * 1e6), []
    piece = min(8000, size // 20)  # of a document, so that there are some to hold out
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & {*path.parts}:
            continue
        content = path.read_text(encoding="utf-8", errors="ignore")[:size]
        size -= len(content)
        lines += [json.dumps(dict(text=content[i : i + piece])) + "\n" for i in range(0, len(content), piece)]
        if not size:
            break
    write_atomic(Path(folder, "code", "library.jsonl"), lambda file: file.write("".join(lines).encode()))


def traced(path, first, last, device, script, *flags):
    """Run a script; write the idle share of its time from the end of one optimizer step to that of another."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.device(device).type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    seen, result = dict(steps=0, begun=0.0, optimizer=None), {}

    def finish_work():
        if cuda:
            torch.cuda.synchronize()

    def after(optimizer, *_):
        seen["optimizer"] = seen["optimizer"] or optimizer  # the first one, where there are several
        if optimizer is not seen["optimizer"] or result:
            return
        seen["steps"] += 1
        try:
            if seen["steps"] == int(first):
                finish_work()
                profiler.start()
                seen["begun"] = time.perf_counter()
            elif seen["steps"] == int(last):
                finish_work()
                seconds = time.perf_counter() - seen["begun"]
                profiler.stop()
                profiler.export_chrome_trace(f"{path}.events")
                events = json.loads(Path(f"{path}.events").read_text())["traceEvents"]
                result.update(shares(events, seconds))
        except Exception as e:  # the run is worth more than its profile
            result["error"] = f"{type(e).__name__}: {e}".splitlines()[0]

    register_optimizer_step_post_hook(after)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        result = result or dict(error=f"only {seen['steps']} steps")
        write_atomic(Path(path), lambda file: file.write(json.dumps(result).encode()))


def shares(events, seconds):
    """Return the shares of `seconds` in which the device has no work, and in which the host waits for it.

    events: of a trace. On a CPU torch's operations are the work, and nothing waits.
    """
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    waits = [event for event in events if event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]]
    work = work or [event for event in events if event.get("cat") == "cpu_op"]
    if not work:
        return dict(error="the profiler saw no work")
    return dict(waits_for_host=max(0.0, 1 - covered(work) / seconds), waits_for_gpu=covered(waits) / seconds)


def covered(events):
    """Return the seconds that at least one of the events covers; their ts and dur are in microseconds."""
    total, end = 0.0, -math.inf
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def in_turn(path, ours, baseline, units, unit, install, tiny):
    """Time steps of ours and of a baseline, None without it, in turn; write how many units per second each does."""
    sides = [step for step in (ours, baseline) if step]
    repeats, rounds = 1 if tiny else 8, []
    for _ in range(2 if tiny else 5):
        rounds.append([])
        for step in sides:
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            rounds[-1].append(units * repeats / (time.perf_counter() - start))
    rates = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up
    figures = dict(unit=unit, speed=rates[0], baseline=install, note=f"baseline missing: {install}")
    if baseline:
        ratio = rounded(rates[0] / rates[1], 3)
        figures |= dict(baseline=rounded(rates[1]), ratio=ratio, note=f"baseline {rates[1]:.5g}, ratio {ratio}")
    write_json(Path(path), figures)


def nanogpt(path, device, size):
    """Training steps of nanoGPT and of a transformer with as many parameters, in bf16."""
    from benchmarks.speed import experts
    from benchmarks.training import update

    sizes = dict(width=384, layers=6, length=512, batch=32) if size == "full" else experts.QUICK
    args, vocabulary = SimpleNamespace(**sizes), TEXT_VOCABULARY if size == "full" else 64
    x, y = torch.randint(vocabulary, (2, args.batch, args.length)).to(device)

    def stepper(side):
        torch.manual_seed(0)
        try:
            model = experts.build(side, args, vocabulary).to(device)
        except ImportError:
            return None
        optimizer = experts.adamw(model, 3e-4)

        def step():
            loss = experts.loss_in(model, x, y, "bf16")
            update(model, optimizer, loss)
            return loss.item()  # waits for the device

        return step

    units = args.batch * args.length
    in_turn(path, stepper("ours"), stepper("nanoGPT"), units, "tokens/s", GET["nanoGPT"], size == "tiny")


def trm(path, device, size):
    """Training steps of the plain recursion and of the official code on 9 x 9 grids, from the same weights, in bf16."""
    from benchmarks.speed import pictures

    flags = ["--arch=sudoku9", "--mixer=attention", "--bottleneck=tokens", "--no-relation_bias"]
    cfg, build = pictures.configured(*flags, *(pictures.TINY if size == "tiny" else ()))
    torch.manual_seed(0)
    model = build()
    batch = pictures.grids(model, cfg.global_batch_size)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    official = None
    with torch.device(device), suppress(ImportError):  # where the official code makes its tensors
        folder = CLONES / "TinyRecursiveModels"
        official = pictures.official_stepper(folder, cfg, model, batch, "bf16")[0]
    step = pictures.stepper(model.to(device), batch, "fp32")[0]  # its own autocast is of the CPU

    def ours():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            step()

    in_turn(path, ours, official, len(batch["page"]), "samples/s", GET["TRM"], size == "tiny")


# --- run ----------------------------------------------------------------------------------------
class Fork:
    """A command in a fork of this process, which has imported torch; used like subprocess.Popen."""

    def __init__(self, words, log, folder, environment):
        self.returncode = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                status = run_here(words, log, folder, environment)
            finally:
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def run_here(words, log, folder, environment):
    """Run a script in this process, a fork, like `python WORDS` -> its status."""
    os.setsid()
    for number, path in enumerate([os.devnull, log, log]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = words
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def start(words, log, cfg, threads):
    """Start a command in its own session; its output goes to `log`."""
    environment = dict(OMP_NUM_THREADS=str(threads), WANDB_MODE="disabled", PYTHONPATH=str(ROOT),
                       TORCHINDUCTOR_CACHE_DIR=f"{cfg.work}/inductor")  # fmt: skip
    if cfg.warm:
        return Fork(words, log, cfg.work, environment)
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                cwd=cfg.work, env=os.environ | environment, start_new_session=True)  # fmt: skip


def threads_of(cfg):
    """Return the threads of a command that runs alone: toy tensors are too small for more than one."""
    return 1 if cfg.tiny else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def kill(process):
    """End a command and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.01)


def last_error(log):
    """Return the line of a log that says why a command failed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(error|Error|Exception|Interrupt)\b.*", line)]
    return (errors or lines or ["no output"])[-1][:300]


class Job:
    """A row under way: its commands one after the other."""

    def __init__(self, row, cfg, threads):
        self.row, self.cfg, self.threads, self.logs = row, cfg, threads, []
        self.begun = time.monotonic()
        self.next()

    def next(self):
        """Start the next command."""
        name = re.sub(r"\W+", "_", self.row.name)
        self.logs.append(Path(self.cfg.work, f"{name}_{len(self.logs)}.log"))
        self.process = start(self.row.commands[len(self.logs) - 1], self.logs[-1], self.cfg, self.threads)

    def ended(self, deadline):
        """Poll the command -> whether the row is over; it then has its outcome."""
        row, now = self.row, time.monotonic()
        row.seconds = now - self.begun
        status = self.process.poll()
        if status is None and now > min(self.begun + row.limit, deadline):
            kill(self.process)
            if now > deadline:
                row.error = f"cut by the budget after {row.seconds:.0f} s"
            else:
                row.outcome, row.error = "failed", f"no end after {row.limit:.0f} s: {last_error(self.logs[-1])}"
            return True
        if status is None:
            return False
        if status:
            row.outcome, row.error = "failed", f"status {status}: {last_error(self.logs[-1])}"
            return True
        if len(self.logs) < len(row.commands):
            self.next()
            return False
        try:
            row.figures = row.read(self.logs)
            row.outcome = "ok"
        except Exception as e:  # files that are not as they should be are a failure of the row
            row.outcome, row.error = "failed", f"{type(e).__name__}: {e}".splitlines()[0]
        return True


def work_through(rows, cfg, deadline, done):
    """Run the rows in their order, those that are not timed several at once; done(row) after each."""
    cores = threads_of(cfg)
    at_once = max(1, min(4, cores // 4))
    waiting, running = list(rows), []
    try:
        while waiting or running:
            while waiting:
                row = waiting[0]
                if running and (row.alone or running[0].row.alone or len(running) == at_once):
                    break
                waiting.pop(0)
                lacking = [path for path in row.needs if not path.exists()]
                if lacking and any(other.row.name.startswith("data:") for other in running):
                    waiting.insert(0, row)  # it is being made
                    break
                remaining = deadline - time.monotonic()
                if lacking or remaining < LEAST:
                    row.error = "the minutes were over"
                    if remaining >= LEAST:
                        row.error = f"needs {lacking[0].name}, which is not there"
                    done(row)
                    continue
                running.append(Job(row, cfg, cores if row.alone else max(1, cores // at_once)))
            for job in [job for job in running if job.ended(deadline)]:
                running.remove(job)
                done(job.row)
            time.sleep(0.02)
    finally:
        for job in running:
            kill(job.process)


# --- report -------------------------------------------------------------------------------------
def results_of(facts, rows, cfg):
    """Return the report: the machine, then each row with its figures as in the JSON of other benchmarks."""
    results = dict(machine=facts)
    for row in rows:
        entry = dict(outcome=row.outcome, error=row.error, seconds=round(row.seconds, 1), **row.figures)
        if "speed" in row.figures:
            get = row.figures.get
            entry["figures"] = [
                figure(
                    f"gpu_check.{re.sub(r'[^a-zA-Z0-9]+', '_', row.name).lower()}",
                    row.name,
                    rounded(get("speed")),
                    unit=get("unit"),
                    baseline=get("baseline"),
                    ratio=get("ratio"),
                    spread=", ".join(shown(row)),
                    command=f"bash scripts/gpu_check.sh --only '{row.name}'",
                )  # fmt: skip
            ]
        entry["commands"] = [readable(words, cfg) for words in row.commands]
        results[row.name] = entry
    return results


def shown(row):
    """Return 'column text' of the numbers in the middle of a row."""
    return [f"{name} {text}" for name, text in cells(row)[2:7] if text]


def readable(words, cfg):
    """Return a command as a person would type it in the folder of the repo."""
    text = shlex.join(["python", *words])
    return text.replace(f"{cfg.work}/", "WORK/").replace(f"{ROOT}/", "")


def cells(row):
    """Return (column, text) of a row of the table."""
    get = row.figures.get
    shares = [f"{get(key):.0%}" if get(key) is not None else "" for key in ("waits_for_host", "waits_for_gpu")]
    return [
        ("row", row.name),
        ("speed", f"{rounded(get('speed')):,.6g} {get('unit')}" if get("speed") else ""),
        ("it/s", f"{get('it_s'):.3g}" if get("it_s") else ""),
        ("peak MB", f"{get('peak_mb'):.0f}" if get("peak_mb") else ""),
        ("loss", f"{get('loss'):.4f}" if get("loss") is not None else ""),
        ("waits for host", shares[0]),
        ("host waits for GPU", shares[1]),
        ("seconds", f"{row.seconds:.0f}" if row.seconds else ""),
        ("outcome", ": ".join(filter(None, [row.outcome, get("note", ""), row.error]))),
    ]


def table(facts, rows, summary):
    """Return the report as Markdown."""
    head = [name for name, _ in cells(rows[0])]
    lines = [described(facts), "", summary, "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        texts = [text.replace("|", "\\|").replace("\n", " ") for _, text in cells(row)]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def described(facts):
    """Return one line about the machine."""
    parts = [f"{facts['device']}: {facts['name']}"]
    if facts["capability"]:
        parts.append(f"capability {facts['capability']}, {facts['memory_gb']:g} GB")
        parts.append(f"driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}")
    parts.append(f"torch {facts['torch']}")
    parts.append(f"{facts['cores']} cores of {facts['processor']}")
    return "; ".join([*parts, facts["date"]])


def summary_of(rows):
    """Return one line: how many rows ran, and the names of those that did not."""
    names = {outcome: [row.name for row in rows if row.outcome == outcome] for outcome in ("ok", "failed", "not run")}
    parts = [f"{len(names['ok'])} of {len(rows)} rows ran"]
    parts += [f"{len(names[key])} {key} ({', '.join(names[key])})" for key in ("failed", "not run") if names[key]]
    return "; ".join(parts)


def import_ahead():
    """Import the modules that every row needs; nothing here starts a thread or touches the GPU."""
    for name in ("torch._dynamo", "matplotlib.pyplot", "tokenizers"):
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # else each fork copies most of it


def look_at(cfg):
    """Return the facts of the device, from a new process; cfg.warm is off afterwards if forks can't use it."""
    path, log = Path(cfg.work, "machine.json"), Path(cfg.work, "machine.log")
    for warm in [True, False] if cfg.warm and hasattr(os, "fork") else [False]:
        cfg.warm = warm
        process = start([FILE, "machine", str(path), cfg.device], log, cfg, threads_of(cfg))
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        kill(process)
        if process.poll() == 0 and path.exists():
            return json.loads(path.read_text())
    raise UsageError(f"--device {cfg.device} can't be used: {last_error(log)}\n"
                     "try: bash scripts/gpu_check.sh --device cpu --tiny")  # fmt: skip


def main(cfg):
    begun = time.monotonic()
    deadline = begun + 60 * cfg.minutes
    if cfg.minutes <= 0:
        raise UsageError(f"--minutes {cfg.minutes:g}: expected more than 0")
    if not cfg.precisions or set(cfg.precisions) - {*NEAR}:
        raise UsageError(f"--precisions {' '.join(cfg.precisions)}: some of {' '.join(NEAR)}")
    if on_cpu(cfg) and not cfg.tiny:
        raise UsageError("--device cpu: full sizes are for a GPU\ntry: bash scripts/gpu_check.sh --device cpu --tiny")
    out = Path(cfg.out) if cfg.out else (WORK if cfg.tiny else RESULTS) / "gpu_check.json"
    with ExitStack() as stack:
        cfg.work = str(Path(cfg.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check"))).resolve())
        Path(cfg.work).mkdir(parents=True, exist_ok=True)
        Path(cfg.work, "points.csv").write_text("".join(["x1,y\n", *(f"{x},{x * x + x}\n" for x in range(1, 33))]))
        Path(cfg.work, "page.txt").write_text("return ____\n")
        if cfg.warm:
            import_ahead()
        facts = look_at(cfg)
        print(described(facts), flush=True)
        if facts["capability"] and float(facts["capability"]) < 8 and "bf16" in cfg.precisions:
            cfg.precisions = tuple(dict.fromkeys(key.replace("bf16", "fp16") for key in cfg.precisions))
            print(f"no rows in bf16: capability {facts['capability']} takes fp16 for it", flush=True)
        rows = all_rows(cfg)
        finished = []

        def report():
            write_json(out, results_of(facts, rows, cfg))
            page = table(facts, rows, summary_of(rows))
            write_atomic(out.with_suffix(".md"), lambda file: file.write(page.encode()))

        def done(row):
            finished.append(row)
            for folder in row.leaves:  # some gigabytes each
                shutil.rmtree(folder, ignore_errors=True)
            texts = [text for _, text in (*cells(row)[:2], cells(row)[-1]) if text] + shown(row)
            print(f"[{len(finished)}/{len(rows)}] {' | '.join(texts)} | {row.seconds:.0f} s", flush=True)
            report()

        report()
        work_through(rows, cfg, deadline, done)
    print(f"{out.with_suffix('.md')}: {time.monotonic() - begun:.0f} s", flush=True)
    if any(row.outcome != "ok" for row in rows):
        raise DataError(summary_of(rows))
    print(summary_of(rows), flush=True)
    return {}


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in INSIDE:
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        launch(main, cfg)
