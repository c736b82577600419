"""The script train_sr.py and `generate.py formula` as a user starts them, at toy size."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils.checkpoint import read
from data_utils.launch import launch
from tests.helpers import ROOT, finish, slow, start, start_two
from tests.scripts.test_resume import assert_same
from train_sr import main, parse, schedule

TINY = """--encoder_dim 32 --decoder_input_dim 32 --decoder_model_dim 32 --encoder_n_heads 2 --decoder_n_heads 2
--encoder_ffn_hidden_dim 32 --decoder_ffn_hidden_dim 32 --decoder_n_layers 1 --encoder_n_sab 1 --batch_size 4
--val_size 16 --val_batch_size 8 --val_problems 2 --val_choices 4 --log_interval 1 --device cpu --max_operators 3
--dtype float32 --holdout_pools none""".split()
VOLATILE = {"seconds", "samples_per_s", "data_share", "peak_mb"}


def train(folder, *flags, **more):
    return start("train_sr.py", *TINY, *flags, cwd=folder, **more)


def results(out):
    """Tensors of the newest checkpoint and of the model, and metrics without what a clock measures."""
    newest = max(out.glob("checkpoint_*[0-9]"), key=lambda p: int(p.name.split("_")[1]))
    parts = {p.name: read(p) for p in newest.glob("*.pt")}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return parts, [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a model that took a few steps."""
    folder = tmp_path_factory.mktemp("sr")
    finish(train(folder, "--steps=4", "-vi", "2", "-o", "model"))
    return folder / "model"


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 33])
def test_the_rate_of_a_short_run_stays_below_its_peak(steps, tmp_path, monkeypatch):
    """A warmup of 5 % is part of a step, which is one step then."""
    monkeypatch.chdir(tmp_path)
    main(parse([*TINY, f"--steps={steps}", "-o", "short", "--val_problems=0", "--lr=1"]))
    rates = [row["lr"] for row in results(Path("short"))[1] if row["split"] == "train"]
    assert len(rates) == steps and max(rates) <= 1 and min(rates) >= 0


def test_the_rate_falls_to_its_floor():
    flags = ["--steps=100", "--lr=2", "--warmup_share=0.1", "--cooldown=0.5"]
    assert schedule(parse(flags)) == [(0, 0.0), (10.0, 2.0), (50.0, 2.0), (100, 0.0)]
    assert schedule(parse([*flags, "--min_lr_ratio=0.25"]))[-1] == (100, 0.5)


def test_common_names_of_flags():
    """The names that other scripts have for the same idea are second names of a flag here."""
    same = """lr=1 learning_rate=1 | min_lr_ratio=1 lr_min_ratio=1 | warmup=1 warmup_share=1
    clip=1 grad_clip=1 gradient_clip=1 | gradient_accumulation_steps=2 grad_accum_steps=2 accumulate=2
    num_workers=2 dataset_workers=2 workers=2 | validate_interval=3 eval_interval=3 val_every=3
    log_interval=3 log_steps=3 | output_dir=a out=a | resume_from=a resume=a | wandb_mode=offline mode=offline"""
    for group in same.replace("\n", "|").split("|"):
        first, *others = ([f"--{word}"] for word in group.split())
        assert parse(first) != parse([])
        assert all(parse(other) == parse(first) for other in others), group
    assert parse(["--resume"]) == parse(["--resume-from", "auto"]) == parse(["--resume-from"])
    assert parse(["--compile"]).compile and not parse([]).compile


def test_minimal_example_of_the_guide(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "peers", "work", "runs", "checkpoints", "data"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | dict(OMP_NUM_THREADS="1", PATH=path)
    done = subprocess.run(
        ["bash", "./scripts/train.sh", "configs/test"], cwd=clone, env=env, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    out = clone / "models" / "ansr-models" / "test"
    bundle = {
        f"{n}.yaml"
        for n in "train model tokenizer dataset_train dataset_val skeleton_pool_train skeleton_pool_val".split()
    }
    assert bundle | {"state_dict.pt", "metrics.jsonl", "loss.png"} <= {p.name for p in out.iterdir()}
    parts = {f"{n}.pt" for n in "state_dict optimizer lr_scheduler scaler training_state".split()}
    assert parts | bundle == {p.name for p in (out / "checkpoint_2").iterdir()}
    env["PATH"] = f"{clone}/scripts:{path}"
    for word, status in (("train", 0), ("find", 2)):
        done = subprocess.run(["flash_ansr", word, "--help"], env=env, capture_output=True, text=True)
        assert done.returncode == status and (status or "Train symbolic regression" in done.stdout), done


@pytest.mark.slow
def test_the_copied_bundle_of_a_run_trains_again(model, tmp_path):
    finish(start("train_sr.py", "-c", model / "train.yaml", *"-o again -v -ci 1 -vi 2".split(), cwd=tmp_path))
    assert (tmp_path / "again" / "checkpoint_1").exists() and (tmp_path / "again" / "state_dict.pt").exists()


@pytest.mark.parametrize("names", [("whole", "SIGTERM"), slow(("whole", "SIGKILL", "SIGTERM"))], ids=len)
def test_interrupted_and_resumed_equals_uninterrupted(names, tmp_path):
    flags = [
        "--steps=14",
        "-vi",
        "8",
        "--gradient_accumulation_steps=2",
        "--encoder_dropout=0.1",
        "--save_minutes=0.0005",
    ]
    runs = {name: train(tmp_path, *flags, "-o", name) for name in names}
    for name in names[1:]:
        while (
            not [p for p in (tmp_path / name).glob("checkpoint_*") if ".tmp" not in p.name]
            and runs[name].poll() is None
        ):
            time.sleep(0.01)
        time.sleep(random.Random(name).random() * 0.2)
        runs[name].send_signal(getattr(signal, name))
    finish(runs["whole"])
    expected, rows = results(tmp_path / "whole")
    for name in names[1:]:
        runs[name].communicate()
        assert runs[name].returncode == dict(SIGKILL=-9, SIGTERM=143)[name]
        _, err = finish(train(tmp_path, *flags, "-o", name), 2)
        assert "--resume-from auto" in err and "--fresh" in err
        workers = ["-w", "1"] if name == "SIGTERM" else []
        out, _ = finish(train(tmp_path, *flags, "-o", name, "--resume-from", "auto", *workers))
        assert "exact resume is lost" not in out
        parts, its_rows = results(tmp_path / name)
        assert_same(parts, expected)
        assert its_rows == rows


@pytest.mark.slow
def test_saved_pools_wandb_and_starting_over(tmp_path):
    """Saved pools train and validate; without wandb it goes on; a second --fresh keeps both earlier folders."""
    pool = tmp_path / "pool"
    finish(start("prepare_data.py", "generate-skeleton-pool", "-c", ROOT / "configs/test/skeleton_pool_val.yaml",
                 "-o", pool, "-s", "40"))  # fmt: skip
    bundle = tmp_path / "mine"
    shutil.copytree(ROOT / "configs" / "test", bundle)
    text = (bundle / "dataset_val.yaml").read_text().replace("./skeleton_pool_val.yaml", str(pool))
    (bundle / "dataset_val.yaml").write_text(text)
    small = [flag for flag in TINY if flag not in ("--max_operators", "3")]
    flags = [*small, "-c", bundle / "train.yaml", "--skeleton_pool", pool, "--holdout_pools", "none"]
    (tmp_path / "wandb.py").write_text("raise ImportError\n")
    words = ["train_sr.py", *flags, "-o", "out", "--mode", "offline"]
    for more in (["--optimizer=adamw"], ["--fresh", "--optimizer=adamw_8bit"], ["--fresh"]):
        _, err = finish(start(*words, *more, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"))
        assert "pip install wandb" in err
    assert all((tmp_path / name / "state_dict.pt").exists() for name in ("out", "out.bak", "out.bak2"))


def test_two_ranks_equal_an_accumulation_of_two(tmp_path):
    flags = [*TINY, "--steps=4", "-vi", "4"]
    one = train(tmp_path, "--steps=4", "-vi", "4", "--gradient_accumulation_steps=2", "-o", "one")
    for process in (one, *start_two("train_sr.py", *flags, "-o", "two", cwd=tmp_path)):
        finish(process)
    a, b = (read(tmp_path / name / "state_dict.pt") for name in ("one", "two"))
    for key, weight in a.items():
        torch.testing.assert_close(weight, b[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "missing", "mixed", "renamed"])
def test_damaged_checkpoints(damage, model, tmp_path):
    shutil.copytree(model, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint_4"
    flags = ["--steps=6", "-vi", "2", "-o", "run"]
    if damage == "renamed":
        (folder / "training_state.pt").unlink()
        folder = folder.rename(tmp_path / "run" / "mine")
        _, err = finish(train(tmp_path, *flags, "--resume-from", folder), 2)
        assert "--resume-step" in err
        out, _ = finish(train(tmp_path, *flags, "--resume-from", folder, "--resume-step", "4"))
        assert "step 6 of 6" in out
        return
    if damage == "cut":
        (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-100])
    elif damage == "missing":
        (folder / "optimizer.pt").unlink()
    else:
        shutil.copy(model / "state_dict.pt", folder / "optimizer.pt")
    _, err = finish(train(tmp_path, *flags, "--resume-from", folder), 2)
    assert "optimizer.pt" in err and len(err.splitlines()) <= 3


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_leaves_the_later_branch(tmp_path):
    """Else the next start would take that one, and new steps would be deleted as older than it."""
    flags = ["--steps=6", "-vi", "6", "-ci", "2", "--val_problems=0", "-o", "run"]
    finish(train(tmp_path, *flags))
    expected, _ = results(tmp_path / "run")
    _, err = finish(train(tmp_path, *flags, "--resume-from", "run/checkpoint_2", "--max_steps=5"))
    assert "checkpoint_6 -> checkpoint_6.bak" in err and "checkpoint_4 -> checkpoint_4.bak" in err
    out, _ = finish(train(tmp_path, *flags, "--resume-from", "auto"))
    assert "checkpoint_5 at step 5" in out
    parts, _ = results(tmp_path / "run")
    for name in ("state_dict.pt", "optimizer.pt"):
        assert_same(parts[name], expected[name])
    # a newest one that is damaged is passed over, and what is saved next is kept
    (tmp_path / "run" / "checkpoint_6" / "optimizer.pt").write_bytes(b"cut")
    (tmp_path / "run" / "state_dict.pt").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint_5", ignore_errors=True)
    finish(train(tmp_path, *flags, "--resume-from", "auto", "--max_steps=5"))
    assert (tmp_path / "run" / "checkpoint_5").exists() and (tmp_path / "run" / "checkpoint_6.bak").exists()


def test_a_resume_without_an_interval_keeps_what_an_earlier_run_was_asked_to_keep(tmp_path):
    flags = ["-vi", "9", "--val_problems=0", "-o", "run"]
    finish(train(tmp_path, *flags, "--steps=5", "-ci", "2"))
    finish(train(tmp_path, *flags, "--steps=6", "--resume-from", "auto"))
    folders = {path.name for path in (tmp_path / "run").glob("checkpoint_*")}
    assert folders == {"checkpoint_2", "checkpoint_4", "checkpoint_6"}  # 5 was the end, but not asked for
    assert (tmp_path / "run" / "state_dict.pt.bak").exists()  # the model of the run that was finished before


def test_a_run_that_was_killed_before_its_model_was_written_writes_it(model, tmp_path, monkeypatch):
    """Its last checkpoint is there, with the last evaluation: no step is left to take."""
    shutil.copytree(model, tmp_path / "run")
    (tmp_path / "run" / "state_dict.pt").unlink()
    monkeypatch.chdir(tmp_path)
    result = main(parse([*TINY, "--steps=4", "-vi=2", "-o", "run", "--resume"]))
    assert result["step"] == 4 and result["stopped"] == 0
    assert_same(*(read(folder / "state_dict.pt") for folder in (tmp_path / "run", model)))
    assert_same(results(tmp_path / "run")[0], results(model)[0])


def test_no_room_for_a_checkpoint_is_found_before_the_first_step(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        launch(main, parse([*TINY, "-o", "run"]))
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and "was not written" in err and len(err.splitlines()) <= 3
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not list((tmp_path / "run").glob("*.tmp-*"))


@pytest.mark.parametrize("method", ["default", slow("each")])
def test_formula_of_a_table(method, model, tmp_path):
    x = np.linspace(-2, 2, 30)
    lines = ["t,u,height", *(f"{a},{b},{3 * a * a + 1.5}" for a, b in zip(x, x[::-1] ** 2, strict=True))]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    flags = "--data points.csv --max_seconds 0 --choices 32 --out all.jsonl --plot fit.png".split()
    methods = [["--model", model], ["--method=prior"], ["--model", model, "--method=beam", "--beam_width=4"]]
    for more in methods if method == "each" else methods[:1]:
        out, err = finish(start("generate.py", "formula", *flags, *more, cwd=tmp_path))
        assert out.startswith("height = ") and "candidates" in err and (tmp_path / "fit.png").exists()
        best = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])
        assert best["rank"] == 1 and best["r2"] > 0.5
    out, _ = finish(start("generate.py", "formula", *flags[:4], "--suite", "nguyen", cwd=tmp_path), 2)


@pytest.mark.slow
def test_formulas_of_a_suite(tmp_path):
    few = ["--suite", "nguyen", "--max_seconds=0", "--choices=4", "--max_variables=1", "--out=rows.csv"]
    out, _ = finish(start("generate.py", "formula", *few, cwd=tmp_path))
    assert "nguyen, 8 runs: vNRR" in out and len((tmp_path / "rows.csv").read_text().splitlines()) == 9


ERRORS = [
    ("--steps 0", 2, "--steps 0: expected 1"),
    ("--warmup 0.7 --cooldown 0.5", 2, "together at most 1"),
    ("--lr_schedule 0:1,x", 2, "STEP:RATE"),
    ("--lr 1 --min_lr_ratio -0.1", 2, "--min_lr_ratio -0.1"),
    ("--resume-from nowhere", 2, "no such folder"),
    ("--resume nowhere", 2, "no such folder"),
    ("--resume latest", 1, "no checkpoint in"),
    ("--resume-from nowhere --fresh", 2, "--fresh starts over, --resume-from nowhere goes on"),
    ("--encoder_dim 31", 2, "--encoder_dim 31"),
    ("--literal_prior normal(0,", 2, "normal"),
    ("--min_operators 5 --max_operators 3", 2, "--min_operators 5"),
    ("--holdout_pools nowhere.csv", 1, "nowhere.csv"),
    ("--device cuda", 2, "--device cuda"),
    ("--stepz 3", 2, "did you mean --steps"),
    ("-c nowhere/train.yaml", 2, "nowhere/train.yaml"),
]


@pytest.mark.parametrize("flags, status, words", ERRORS, ids=[e[0] for e in ERRORS])
def test_user_errors(flags, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        launch(main, parse([*TINY, *flags.split()]))
    err = capsys.readouterr().err
    assert stopped.value.code == status, err
    assert words in err and "Traceback" not in err and len(err.splitlines()) <= 3


def test_a_table_belongs_to_another_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--data", "table.csv"])
    assert stopped.value.code == 2 and "generate.py formula --data" in capsys.readouterr().err
