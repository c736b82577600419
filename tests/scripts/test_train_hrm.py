"""The script train_hrm.py as a user starts it, at toy size."""

import json
import random
import signal
import time

import pytest
import torch
import yaml

from data_utils.checkpoint import load_checkpoint
from data_utils.config import cosmetic_names
from data_utils.launch import launch
from data_utils.reasoning.nested_config import flatten
from tests.helpers import finish, slow, start, start_cold, start_two
from tests.scripts.test_resume import assert_same
from train_hrm import HrmConfig, SudokuConfig, SyntheticConfig, main, parse, variant

VOLATILE = {"seconds", "tokens_per_s", "peak_mb"}  # of a row of metrics
SIZES = "--d_model 32 --n_heads 2 --batch_size 16 --eval_batch_size 200 --device cpu --mixed_precision none".split()
KINDS = dict(
    sums="--dataset synthetic --eval_rows 200 --steps 40 --val_every 16".split(),
    puzzles="--max_seq_len 16 --core_layers 1 --steps 40 --val_every 16 --segments 3".split(),
)


@pytest.fixture(scope="session")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzles") / "four"
    finish(start("prepare_data.py", "sudoku", f"--out={folder}", "--size=4", "--givens=8", "--train=60", "--val=40"))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of questions and answers with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("text")
    rows = [json.dumps(dict(question=f"who is {i}", answer=f"number {i * i}")) for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    finish(start("prepare_data.py", "language", f"--source={folder}/rows.jsonl", f"--dest={folder}/ready",
                 "--vocab_size=300", "--val_ratio=0.1", "--max_seq_len=32", "--tokenizer_num_threads=1"))  # fmt: skip
    return folder / "ready"


def train(folder, *flags, **more):
    """Start the script in `folder`, where runs/ will be."""
    return start("train_hrm.py", *SIZES, *flags, cwd=folder, **more)


def results(home):
    """All tensors of the checkpoints of a run, and its metrics without what a clock measures."""
    states = {p.name: load_checkpoint(p, "hrm") for p in (home / "checkpoints").glob("*.pt")}
    lines = (home / "metrics.jsonl").read_text().splitlines()[1:]
    return states, [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


def test_commands_of_the_guide(tmp_path):
    out, _ = finish(start("train_hrm.py", "--dry_run", "--d_model=32", cwd=tmp_path))
    assert "dry run: loss" in out and "gradient norm" in out and not list(tmp_path.iterdir())
    guide = """--dataset synthetic --batch_size 4 --learning_rate 2.5e-4 --warmup_steps 20 --steps 80 --val_every 20
               --run_name arithmetic-demo --checkpoint_limit 3 --save_best_model --mixed_precision bf16 --log_steps 20
               --grad_clip 1.0 --eval_rows 40""".split()
    out, _ = finish(start_cold("train_hrm.py", *guide, cwd=tmp_path))
    assert "step 20/80 | loss" in out and "it/s" in out
    home = tmp_path / "runs" / "arithmetic-demo"
    names = {p.name for p in (home / "checkpoints").iterdir() if not p.name.startswith(".")}
    steps = {f"step_{n}.{kind}" for n in (20, 40, 60) for kind in ("pt", "yaml")}
    assert names == steps | {"final.pt", "final.yaml", "tokenizer.json", "meta.json"}
    assert {p.name for p in (home / "best-model").iterdir()} == {"best.pt", "best.yaml", "tokenizer.json", "meta.json"}
    assert (home / "loss.png").exists()
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*.pt")}
    out, _ = finish(start("train_hrm.py", *guide, cwd=tmp_path))
    assert "finished at step 80" in out and before == {p: p.stat().st_mtime_ns for p in home.rglob("*.pt")}
    ask = ["--prompt", "What is 12 + 7?", "--dataset", "synthetic", "--run_name", "arithmetic-demo"]
    out, err = finish(start("generate.py", *ask, cwd=tmp_path))
    assert out.endswith("\n") and "tokens/s" in err
    assert yaml.safe_load((home / "best-model" / "best.yaml").read_text())["steps"] == 80
    config = home / "checkpoints" / "final.yaml"
    out, _ = finish(start("train_hrm.py", f"--config={config}", "--run_name=again", "--steps=2", cwd=tmp_path))
    assert "step 2 of 2" in out


@pytest.mark.parametrize("kind, optimizer", [("puzzles", "muon"), slow("sums", "adamw_8bit"), slow("sums", "adamw")])
def test_interrupted_and_resumed_equals_uninterrupted(kind, optimizer, puzzles, tmp_path):
    flags = [*KINDS[kind], f"--optimizer={optimizer}", "--save_minutes=0.0008", "--checkpoint_limit=2"]
    flags += [f"--dataset={puzzles}"] * (kind == "puzzles")
    names = ("whole", "SIGKILL", "SIGTERM")
    runs = {name: train(tmp_path, *flags, f"--run_name={name}") for name in names}
    for name in names[1:]:
        folder = tmp_path / "runs" / name / "checkpoints"
        while not list(folder.glob("*.pt")) and runs[name].poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(kind + name).random() * 0.3)
        runs[name].send_signal(getattr(signal, name))
    finish(runs["whole"])
    expected, rows = results(tmp_path / "runs" / "whole")
    for name in names[1:]:
        runs[name].communicate()
        assert runs[name].returncode == dict(SIGKILL=-9, SIGTERM=143)[name]
        out, _ = finish(train(tmp_path, *flags, f"--run_name={name}"))
        assert "exact resume is lost" not in out
        files, its_rows = results(tmp_path / "runs" / name)
        ignored = dict(config=None)
        assert_same(files["final.pt"] | ignored, expected["final.pt"] | ignored)
        assert its_rows == rows


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_leaves_the_later_branch(tmp_path):
    """Else the next start would take that one, and new steps would be deleted as older than it."""
    flags = ["--dataset=synthetic", "--steps=8", "--val_every=2", "--eval_rows=40", "--run_name=a"]
    folder = tmp_path / "runs" / "a" / "checkpoints"
    finish(train(tmp_path, *flags))
    expected, rows = results(folder.parent)
    named = ["--resume=runs/a/checkpoints/step_2.pt", "--checkpoint_limit=1", "--max_steps=5"]
    _, err = finish(train(tmp_path, *flags, *named))
    assert "step_6.pt -> step_6.pt.bak" in err and "final.pt -> final.pt.bak" in err
    assert {p.name for p in folder.glob("*.pt")} == {"step_4.pt", "final.pt"}
    out, _ = finish(train(tmp_path, *flags))
    assert "final.pt at step 5" in out
    files, _ = results(folder.parent)
    ignored = dict(config=None, evaluated=8)
    assert_same(files["final.pt"] | ignored, expected["final.pt"] | ignored)


@pytest.mark.slow
def test_the_same_budget_again_trains_nothing(tmp_path):
    flags = ["--dataset=synthetic", "--steps=8", "--eval_rows=40", "--segments=2", "--run_name=a", "--log_steps=1"]
    home = tmp_path / "runs" / "a"
    final = home / "checkpoints" / "final.pt"
    out, _ = finish(train(tmp_path, *flags, "--max_steps=3"))
    assert "step 3 of 3" in out
    content, rows = final.read_bytes(), (home / "metrics.jsonl").read_text()
    for budget in (3, 3, 2):  # also a smaller one
        out, _ = finish(train(tmp_path, *flags, f"--max_steps={budget}"))
        assert "finished at step 3" in out and "a larger --max_steps goes on" in out
        assert final.read_bytes() == content and (home / "metrics.jsonl").read_text() == rows
    expected, _ = results(home)
    torch.save(load_checkpoint(final, "hrm") | dict(evaluated=0, best_step=0, best_val_loss=float("inf")), final)
    out, _ = finish(train(tmp_path, *flags, "--max_steps=3"))  # as after a signal in the evaluation
    assert "step 3 | val" in out and "step 3 of 3" in out
    assert_same(results(home)[0], expected)
    out, _ = finish(train(tmp_path, *flags))
    assert "step 8 of 8" in out
    out, _ = finish(train(tmp_path, *flags))
    assert "finished at step 8" in out and "a larger --steps goes on" in out


@pytest.mark.parametrize("optimizer, apart", [("adamw", 1e-5), ("muon", 1e-4)])  # muon's steps are rounded to bfloat16
def test_two_ranks_equal_one(optimizer, apart, puzzles, tmp_path):
    flags = ["--max_seq_len=16", "--core_layers=1", f"--dataset={puzzles}", "--segments=3", "--no-halting"]
    flags += [f"--optimizer={optimizer}", "--steps=1000", "--max_steps=6"]  # within the warmup, as small steps
    one = train(tmp_path, *flags, "--run_name=one", "--batch_size=16")
    two = start_two("train_hrm.py", *SIZES, *flags, "--run_name=two", "--batch_size=8", cwd=tmp_path)
    for process in (one, *two):
        finish(process)
    states = [load_checkpoint(tmp_path / f"runs/{n}/checkpoints/final.pt", "hrm") for n in ("one", "two")]
    for key, weight in states[0]["model_state"].items():
        torch.testing.assert_close(weight, states[1]["model_state"][key], rtol=0, atol=apart)


def test_puzzles_are_answered(puzzles, tmp_path):
    finish(train(tmp_path, *KINDS["puzzles"], f"--dataset={puzzles}", "--run_name=four"))
    row = results(tmp_path / "runs" / "four")[1][-1]
    assert {"loss", "exact", "cells", "exact_halting", "segments"} <= row.keys()
    ask = ["--run_name=four", "--prompt", "1...3......4..2."]
    out, err = finish(start("generate.py", *ask, cwd=tmp_path), 1)
    assert len(out.split()) == 4 and all(len(line) == 4 for line in out.split()) and "segments" in err
    assert err.startswith("not solved: ")  # after so few steps
    again, _ = finish(start("generate.py", *ask, cwd=tmp_path), 1)
    assert again == out
    (tmp_path / "q.csv").write_text("quizzes,solutions\n1...3......4..2.,\n1100000000000000,\n")
    out, err = finish(start("generate.py", "--run_name=four", "--input=q.csv", "--out=a.csv", cwd=tmp_path), 1)
    assert out == again and "q.csv:3: row 1 has 1 twice" in err
    header, line = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "question,answer,verdict"
    assert line.strip('"').startswith(f"1000300000040020,{''.join(out.split())},")
    _, err = finish(start("generate.py", "--run_name=four", "--prompt", "11.." * 4, cwd=tmp_path), 2)
    assert "contradictory" in err


def test_published_mazes_are_trained_on_and_answered(tmp_path):
    mazes = [f"S{'#' * i}{' ' * (4 - i)}\n     \n    G" for i in range(4)]
    (tmp_path / "mazes.txt").write_text("\n\n".join(mazes))
    finish(start("prepare_data.py", "puzzles", "--source=mazes.txt", "--out=ready", "--val_ratio=0.4", cwd=tmp_path))
    flags = ["--dataset=ready", "--core_layers=1", "--steps=4", "--segments=2", "--run_name=maze"]
    _, err = finish(train(tmp_path, *flags), 2)
    assert "--max_seq_len 15\n" in err
    finish(train(tmp_path, *flags, "--max_seq_len=15"))
    out, err = finish(start("generate.py", "--run_name=maze", "--input=mazes.txt", cwd=tmp_path), 1)
    answers = out.removesuffix("\n").split("\n\n")
    assert [answer.count("\n") for answer in answers] == [2] * 4 and err.count("segments") == 4
    _, err = finish(start("generate.py", "--run_name=maze", "--prompt=S G", cwd=tmp_path), 2)
    assert "expected one maze of 3 x 5 cells" in err


def test_prepared_text(text, tmp_path):
    flags = [f"--dataset={text}", "--max_seq_len=32", "--encoder_layers=1", "--decoder_layers=1", "--steps=6"]
    out, _ = finish(train(tmp_path, *flags, "--run_name=qa"))
    row = results(tmp_path / "runs" / "qa")[1][-1]
    assert row["split"] == "val" and row["bpb"] > 0 and "step 6 of 6" in out
    out, _ = finish(start("generate.py", "--run_name=qa", "--prompt", "who is 3", "--max_new_tokens=4", cwd=tmp_path))
    assert out.endswith("\n")
    out, _ = finish(train(tmp_path, *flags, "--save_dir=here", "--epochs=1", "--steps=0"))
    assert (tmp_path / "here" / "final.pt").exists() and "of 12" in out


ERRORS = [
    ("--dry_run 0", 2, "synthetic, sudoku, or a folder"),
    ("--dataset nowhere", 1, "prepare_data.py"),
    ("--dataset synthetic --steps 0", 2, "--steps 0 --epochs 0"),
    ("--dataset synthetic --batch_size 0", 2, "--batch_size 0: expected 1"),
    ("--dataset synthetic --save_best_model", 2, "needs a --run_name"),
    ("--dataset synthetic --run_name ../up", 2, "--run_name ../up"),
    ("--dataset synthetic --run_name nul", 2, "--run_name nul"),
    ("--dataset synthetic --mixed_precision fp16", 2, "--mixed_precision fp16 needs CUDA"),
    ("--dataset synthetic --dtype float16 --mixed_precision bf16", 2, "--dtype float16 needs CUDA"),
    ("--dataset synthetic --d_model 30 --n_heads 4", 2, "head dim must be whole and even"),
    ("--dataset synthetic --core plain --segments 2", 2, "--segments 2 needs --core recursive"),
    ("--dataset synthetic --core none --halting", 2, "halting needs core recursive"),
    ("--dataset synthetic --optimizer sgd", 2, "invalid choice"),
    ("--dataset synthetic --stepz 3", 2, "did you mean --steps"),
    ("--dataset synthetic --run_name x --resume none.pt", 2, "no such file"),
]


@pytest.mark.parametrize("flags, status, words", ERRORS, ids=[e[0] for e in ERRORS])
def test_user_errors(flags, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        launch(main, parse(["--device=cpu", *flags.split()]))
    out, err = capsys.readouterr()
    assert stopped.value.code == status, err
    assert words in err and "Traceback" not in err and len(err.splitlines()) <= 3 and not list(tmp_path.rglob("*.pt"))


def test_variants():
    assert variant("synthetic") is SyntheticConfig and variant("sudoku") is SudokuConfig and variant("x") is HrmConfig
    cfg = parse(["--dataset", "sudoku", "--lr", "0.1", "--dry_run"])
    assert (cfg.learning_rate, cfg.dry_run, cfg.max_seq_len) == (0.1, "1", 81)
    assert cosmetic_names(HrmConfig()) == cosmetic_names(SyntheticConfig()) == cosmetic_names(SudokuConfig())


ALIASES = dict(learning_rate="lr", lr_min_ratio="min_lr_ratio", epochs="max_epochs", val_every="eval_interval",
               log_steps="log_interval", checkpoint_limit="keep", dataset_workers="num_workers", save_dir="out",
               grad_clip="clip")  # fmt: skip


@pytest.mark.parametrize("dataset", ["sudoku", "nowhere"])
@pytest.mark.parametrize("name, common", ALIASES.items())
def test_the_common_name_of_a_flag_works_too(name, common, dataset):
    assert getattr(parse([f"--dataset={dataset}", f"--{common}=3"]), name) in (3, "3")


def test_nested_and_flat_configurations_agree(tmp_path, capsys):
    nested = dict(
        model=dict(d_model=48, vocab_size=98), encoder=dict(n_layers=3), decoder=dict(n_layers=1), bridge=dict(kind=1),
        hrm=dict(h_layers=2, l_layers=2, h_cycles=3, approx_grad="one_step", h_len=8, use_halting=False),
        optim=dict(lr=0.002, betas=[0.9, 0.99], weight_decay=0.05), train=dict(seq_len=40, tgt_len=40, batch_size=7),
    )  # fmt: skip
    flat = dict(d_model=48, encoder_layers=3, decoder_layers=1, core_layers=2, h_cycles=3, grad="one_step")
    flat |= dict(beta1=0.9, halting=False, learning_rate=0.002, beta2=0.99, weight_decay=0.05, max_seq_len=40)
    flat |= dict(batch_size=7)
    assert flatten(nested) == flat
    assert "bridge.kind" in capsys.readouterr().out
    parsed = []
    for number, content in enumerate((nested, flat)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(content))
        parsed.append(parse(["--config", str(path)]))
    assert parsed[0] == parsed[1]
    with pytest.raises(ValueError, match="core_layers"):
        flatten(dict(hrm=dict(h_layers=1, l_layers=2)))
    (tmp_path / "bad.yaml").write_text("hrm:\n  unknown_key: 3\n")
    _, err = finish(start("train_hrm.py", f"--config={tmp_path}/bad.yaml"), 2)
    assert "unknown_key" in err or "unknown-key" in err
