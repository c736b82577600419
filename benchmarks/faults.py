"""Interrupt real runs at random moments, resume them, compare every bit with an uninterrupted run.

    python benchmarks/faults.py                                   # 20 trials for each expert and signal
    python benchmarks/faults.py --trials 2 --signals SIGKILL      # a quick look

A trial is a run that is hit twice, each time at a random moment, and goes on by the same command with --resume auto.
Children are forked from a process that has imported torch but computed nothing, so that a trial takes seconds.
Writes benchmarks/faults.json; exits with status 1 if any trial ends otherwise than the uninterrupted run.
"""

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"  # a fork keeps no thread but its own

from data_utils.config import from_cli, launch


@dataclass
class Config:
    trials: int = 20  # for each expert and signal
    signals: tuple[str, ...] = ("SIGKILL", "SIGTERM", "SIGINT")  # what hits
    experts: tuple[str, ...] = ("transformer", "state_space", "diffuser")  # what is hit
    seed: int = 0  # of the moments
    out: str = "benchmarks/faults.json"  # results


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

import train_expert
from data_utils.checkpoint import load_checkpoint

sys.modules["plot"] = None  # no loss curve: drawing it would take most of a trial's time

VOLATILE = {"seconds", "tokens_per_s", "peak_mb"}  # of a row of metrics
TINY = dict(tokenizer="bytes", d_model=32, n_heads=2, n_layers=1, max_seq_len=32, batch_size=24, grad_accum_steps=2,
            lr=3e-3, max_steps=60, save_every=1, save_minutes=0.0005, log_interval=5, eval_windows=40, device="cpu",
            resume="auto")  # fmt: skip
SIZES = dict(transformer=dict(ffn_mult=2), state_space=dict(d_inner=32, d_state=4, dt_rank=4), diffuser={})


def start(cfg, log):
    """Fork a process that runs main(cfg) as the script would; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        launch(train_expert.main, cfg)
    except SystemExit as e:
        os._exit(e.code or 0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(folder, expert):
    """Hash of all that a finished run leaves: every tensor and number of its checkpoints, every row of its metrics."""
    found = hashlib.sha256()

    def add(x, name):
        if isinstance(x, dict):
            for key in sorted(x, key=str):
                if key != "config":  # of which folder and resume differ
                    add(x[key], f"{name}.{key}")
        elif isinstance(x, (list, tuple)):
            for i, item in enumerate(x):
                add(item, f"{name}[{i}]")
        else:
            found.update(name.encode())
            found.update(x.contiguous().numpy().tobytes() if hasattr(x, "numpy") else repr(x).encode())

    for path in sorted(Path(folder).glob("*.pt")):
        add(load_checkpoint(path, f"expert:{expert}"), path.name)
    for line in (Path(folder) / f"{expert}_expert_metrics.jsonl").read_text().splitlines()[1:]:
        add({k: v for k, v in json.loads(line).items() if k not in VOLATILE}, "row")
    return found.hexdigest()


def trial(cfg, log, name, seconds, draw):
    """Run `cfg` with two hits of signal `name`; return how many found it running. Raises AssertionError on a crash."""
    hits = 0
    for last in (False, False, True):
        child = start(cfg, log)
        if not last:
            time.sleep(draw.uniform(0.02, 0.9 * seconds))
            os.kill(child, getattr(signal, name))
        code = status(child)
        expected = dict(SIGKILL=-9, SIGTERM=143, SIGINT=130)[name]
        assert code in ((0,) if last else (0, expected)), f"status {code}: {Path(log).read_text()[-500:]}"
        hits += code == expected
    return hits


def main(cfg):
    import prepare_data

    prepare, draw, rows = prepare_data.COMMANDS["expert"], random.Random(cfg.seed), []
    with tempfile.TemporaryDirectory() as place:
        data = f"{place}/data"
        if not (child := os.fork()):
            prepare[1](prepare[0](toy=True, data_dir=data))
            os._exit(0)
        assert status(child) == 0
        log, base = f"{place}/log", dict(data_dir=data, transformer_ckpt=f"{place}/transformer/transformer_expert.pt")
        for expert in dict.fromkeys(["transformer", *cfg.experts]):  # the diffuser starts from the transformer's run
            whole = train_expert.CONFIGS[expert](checkpoint_dir=f"{place}/{expert}", **base, **TINY | SIZES[expert])
            moment = time.monotonic()
            assert status(start(whole, log)) == 0, Path(log).read_text()[-500:]
            seconds = time.monotonic() - moment
            expected = hashed(whole.checkpoint_dir, expert)
            for name in cfg.signals if expert in cfg.experts else ():
                same = hits = 0
                for number in range(cfg.trials):
                    run = replace(whole, checkpoint_dir=f"{place}/{expert}-{name}-{number}")
                    hits += trial(run, log, name, seconds, draw)
                    same += hashed(run.checkpoint_dir, expert) == expected
                rows.append(dict(expert=expert, signal=name, trials=cfg.trials, hits=hits, identical=same))
                print(f"{expert:12} {name:8} {same} of {cfg.trials} identical, {hits} hits", flush=True)
    Path(cfg.out).write_text(json.dumps(dict(config=asdict(cfg), rows=rows), indent=1) + "\n")
    if any(row["identical"] < row["trials"] for row in rows):
        sys.exit(1)
    return {}


def hashed(folder, expert):
    """fingerprint() in a process of its own: this one must not compute with torch before it forks."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, fingerprint(folder, expert).encode())
        os._exit(0)
    os.close(write)
    assert status(child) == 0
    with os.fdopen(read) as file:
        return file.read()


if __name__ == "__main__":
    launch(main, cfg)
