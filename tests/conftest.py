"""Toy data and tiny runs that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = """--tokenizer bytes --d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 32 --batch_size 8 --lr 3e-3 --device cpu
--log_interval 5 --eval_windows 40""".split()
SIZES = dict(transformer=["--ffn_mult=2"], state_space=["--d_inner=32", "--d_state=4", "--dt_rank=4"], diffuser=[])


def start(script, *flags, **more):
    """Start a script of the repo as a user would, from another folder, with its output caught."""
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    words = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def finish(process, status=0):
    """Wait, check the exit status, return (stdout, stderr)."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err or out
    return out, err


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with five tiny domains."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    finish(start("prepare_data.py", "expert", "--toy", "--data_dir", folder))
    return folder


@pytest.fixture(scope="session")
def experts(toy, tmp_path_factory):
    """A checkpoint folder with the three experts, a few steps old, transformer first."""
    folder = tmp_path_factory.mktemp("experts")
    places = [f"--checkpoint_dir={folder}", f"--transformer_ckpt={folder}/transformer_expert.pt", f"--data_dir={toy}"]
    for expert, sizes in SIZES.items():
        finish(start("train_expert.py", f"--expert={expert}", "--max_steps=12", *TINY, *sizes, *places))
    return folder
