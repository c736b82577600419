"""Start scripts, wait for them, and the sizes of tiny runs: what several test files share."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).parents[1]  # of the repo
SHARED = ROOT.parent / "shared"  # inputs that only developers have; a test that wants them is skipped without
TINY = """--tokenizer bytes --d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 32 --batch_size 8 --lr 3e-3 --device cpu
--log_interval 5 --eval_windows 40""".split()
MLA = ["--n_layers=2", "--kv_latent_dim=16", "--rope_dim=8", "--grad_accum_steps=1", "--max_vectors=1500"]
SIZES = dict(transformer=["--ffn_mult=2"], state_space=["--d_inner=32", "--d_state=4", "--dt_rank=4"], diffuser=[])


THREADS = os.environ.get("PETRI_TEST_THREADS", "1")  # of each script under test
PARENTS = []  # of warm processes; sets are in another order in each, so that no result may depend on it


def slow(*values):
    """Return a row for pytest.mark.parametrize that only `-m slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def letters(figure):
    """Return the height in pixels of a figure's smallest letters, where a page shows it with 800 pixels."""
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    return min(text.get_fontsize() for text in texts) * 800 / 72 / figure.get_figwidth()


def environment(**more):
    return os.environ | dict(OMP_NUM_THREADS=THREADS, PYTHONPATH=str(ROOT), PYTHONFAULTHANDLER="1") | more


def start(script, *flags, cwd=".", **env):
    """Start a script of the repo as a user would, with its output caught, but warm: see warm.py."""
    if not PARENTS:
        PARENTS.extend(warm.parent(environment(PYTHONHASHSEED=seed)) for seed in "12")
    PARENTS.reverse()
    return warm.Warm(PARENTS[0], [str(ROOT / script), *map(str, flags)], Path(cwd).absolute(), environment(**env))


def start_two(script, *flags, **more):
    """The same on two processes, with what torchrun tells them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    variables = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    variables |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
    ranks = [start(script, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **variables, **more) for rank in range(2)]
    ranks[0].store = store  # lives as long as they do
    return ranks


def start_cold(script, *flags, **more):
    """Start a script in an interpreter of its own, as one test of each script does."""
    return launch([sys.executable, str(ROOT / script), *map(str, flags)], **more)


def torchrun(script, *flags, **more):
    """The same on two processes, by torchrun."""
    launcher = "import sys, torch.distributed.run as r; r.main(sys.argv[1:])"
    words = [sys.executable, "-c", launcher, "--standalone", "--nproc-per-node=2", str(ROOT / script)]
    return launch([*words, *map(str, flags)], **more)


def launch(words, **more):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, env=environment(), start_new_session=True, **pipes, **more)


def finish(process, status=0, seconds=200):
    """Wait, check the exit status, return (stdout, stderr). What hangs says where."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # on which each Python writes its stacks
        out, err = process.communicate(timeout=20)
        raise AssertionError(f"no end after {seconds} s\n{out}\n{err}") from None
    assert process.returncode == status, err or out
    return out, err


INTERPRETER = """
import json, sys
for line in sys.stdin:
    code, name, columns = json.loads(line)
    import numpy as np
    names = {}
    exec(code, names)
    print(json.dumps(np.asarray(names[name](*map(np.array, columns))).tolist()), flush=True)
"""


@functools.cache
def interpreter():
    return subprocess.Popen(
        [sys.executable, "-c", INTERPRETER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_python(code, name, *columns):
    """Run printed code, which sees nothing of ours, in another interpreter -> what its function `name` gives."""
    print(json.dumps([code, name, [column.tolist() for column in columns]]), file=interpreter().stdin, flush=True)
    return json.loads(interpreter().stdout.readline())


def train_flags(name, toy, experts):
    """Script and flags of a tiny run on toy data: an expert, mla, or mla_store."""
    flags = [f"--data_dir={toy}", f"--transformer_ckpt={experts}/transformer_expert.pt", *TINY]
    if name in SIZES:
        return ["train_expert.py", f"--expert={name}", *flags, *SIZES[name]]
    flags += [f"--{other}_ckpt={experts}/{other}_expert.pt" for other in ("state_space", "diffuser")]
    return ["train_mla.py", *flags, *MLA, *["--use_vector_store"] * (name == "mla_store")]
