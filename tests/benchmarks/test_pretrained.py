"""The models that come with the repo load by name, score what their cards say, and stay small."""

import hashlib
import math
import re
import subprocess
import sys

import pytest
import torch

import generate
from benchmarks.quality import pretrained
from benchmarks.report import RESULTS, load
from data_utils.checkpoint import PRETRAINED, by_name, read
from data_utils.errors import DataError
from scripts import pretrained as keep
from tests.helpers import ROOT, finish, slow, start

NAMES = sorted(path.stem for path in PRETRAINED.glob("*.pt"))
OLD = ROOT / "tests" / "old_checkpoints"
QUICK = dict(addition=2000, sudoku4=200, sudoku9=50, sudoku6=20, maze=50, demo=100, codebook=500)  # samples of a test


def card_of(name):
    text = (PRETRAINED / f"{name}.md").read_text(encoding="utf-8")
    return text, dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", text, re.M))


# ---- those that are there --------------------------------------------------------------------------------------------


def test_some_are_there_and_all_together_are_small():
    assert {"addition", "demo"} <= set(NAMES) <= set(pretrained.MODELS)
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) <= 12e6
    assert sorted(path.stem for path in PRETRAINED.glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_where_its_file_comes_from(name):
    path = PRETRAINED / f"{name}.pt"
    text, facts = card_of(name)
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["made by"].startswith("`python train_") and facts["torch"] and facts["data"]
    assert name in text.splitlines()[2] and text.startswith(f"# {name}: ")
    assert not re.search(rb"/(home|root|work|tmp)/", path.read_bytes())


def test_the_network_of_formulas_is_small_and_proposes(tmp_path):
    folder = ROOT / "models" / "ansr-models" / "pretrained"
    weights = folder / "state_dict.pt"
    assert weights.stat().st_size <= 3e6 and all(w.dtype != torch.float32 for w in read(weights).values())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (folder / "README.md").read_text(encoding="utf-8")
    table = tmp_path / "table.csv"
    table.write_text("x,y\n" + "".join(f"{k / 4},{k * math.sin(k / 4)}\n" for k in range(1, 30)), encoding="utf-8")
    flags = "--max_seconds 0 --evolve 0 --choices 128".split()
    out, err = finish(start("generate.py", "formula", "--data", table, "--model", folder, *flags, cwd=tmp_path))
    assert out.strip() == "y = 4*x*sin(x)", err


@pytest.mark.parametrize("name", NAMES)
def test_a_model_holds_weights_and_no_training(name):
    state = read(PRETRAINED / f"{name}.pt")
    assert not state.keys() & set(keep.TRAINING_ONLY)
    assert all(torch.isfinite(w.float()).all() for w in state["model_state"].values())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_scores_what_its_card_says(name):
    try:
        score = pretrained.figure_of(name, count=QUICK[name])
    except DataError as e:
        pytest.skip(str(e))  # the demo's text is collected from packages that are optional
    expected = float(re.search(r": ([\d.]+)", card_of(name)[1]["figure"])[1])
    if pretrained.MODELS[name].unit == "%":
        assert score >= expected - 12  # of few samples
    else:
        assert score == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_results_repeats_the_card(name):
    rows = load(RESULTS / "quality_pretrained.json")
    (figure,) = rows[name]["figures"]
    assert f"{figure['ours']:g}" == re.search(r": ([\d.]+)", card_of(name)[1]["figure"])[1]


@pytest.mark.parametrize("name", [*map(slow, NAMES)])
def test_the_command_of_a_card_works_from_another_folder(name, tmp_path):
    command = card_of(name)[0].splitlines()[2].strip()
    command = command.replace("python generate.py", f"{sys.executable} {ROOT / 'generate.py'}")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_toy_sizes_run_in_a_clone_without_the_text_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained.main(["--quick", "--rows", "demo,codebook", "--out", str(tmp_path / "figures.json")])
    demo, codebook = (row["figures"][0] for row in load(tmp_path / "figures.json").values())
    assert demo["baseline"] == "bash scripts/demo.sh" and "ours" not in demo and codebook["ours"] > 0
    with pytest.raises(DataError, match="data/demo"):
        pretrained.main(["--rows", "demo", "--out", str(tmp_path / "figures.json")])


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert by_name("addition") == str(PRETRAINED / "addition.pt")
    assert by_name("") == "" and by_name("runs/addition") == "runs/addition" and by_name("no_such") == "no_such"
    (tmp_path / "addition").mkdir()
    assert by_name("addition") == "addition"


def test_generate_takes_a_name(tmp_path, capsys):
    assert type(generate.parse(["addition"])) is generate.AnswerConfig
    assert type(generate.parse(["--checkpoint", "demo"])) is generate.Config
    generate.main(generate.parse(["addition", "--prompt", "What is 12 + 7?"]))
    assert capsys.readouterr().out == "19\n"
    with pytest.raises(SystemExit):
        generate.parse(["adition"])
    assert "did you mean addition?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_puzzle_may_come_through_standard_input(tmp_path):
    words = [sys.executable, ROOT / "generate.py", "sudoku4", "--input", "-", "--device=cpu"]
    result = subprocess.run(words, cwd=tmp_path, input="1234341221434.2.", capture_output=True, text=True)
    assert result.returncode == 0 and "4321" in result.stdout, result.stderr


def test_generate_alone_lists_the_models(tmp_path):
    out, _ = finish(start("generate.py", cwd=tmp_path))
    assert all(f"{name}: {pretrained.MODELS[name].does}\n" in out for name in NAMES)
    assert all(card_of(name)[0].splitlines()[2] in out for name in NAMES)


# ---- a model is kept -------------------------------------------------------------------------------------------------


def test_weights_alone_are_the_averaged_ones():
    state = read(OLD / "hrm" / "final.pt")
    kept = keep.weights_alone(state)
    averages = state["ema"]
    assert averages and all(torch.equal(kept["model_state"][name], values) for name, values in averages.items())
    assert "optimizer_state" not in kept and kept["config"] == state["config"] and kept["ema"] == {}
    assert all(w.dtype != torch.float32 for w in keep.halved(kept)["model_state"].values())


@pytest.mark.parametrize("better, dtype", [(0.0, torch.float16), (1.0, torch.float32)])
def test_a_model_is_kept_in_half_precision_if_its_figure_stays(better, dtype, tmp_path, monkeypatch, capsys):
    figures = [50 + better, 50.0]
    monkeypatch.setattr(keep, "PRETRAINED", tmp_path)
    monkeypatch.setattr(keep, "figure_of", lambda name, path: figures.pop(0))
    keep.main(keep.Config("addition", str(OLD / "hrm" / "final.pt"), "python train_hrm.py --dataset synthetic"))
    assert {w.dtype for w in read(tmp_path / "addition.pt")["model_state"].values()} == {dtype}
    text = (tmp_path / "addition.md").read_text()
    assert f"| figure | held-out sums of two-digit numbers right: {50 + better:g} % |" in text
    assert str(dtype).removeprefix("torch.") in text and "`python train_hrm.py --dataset synthetic`" in text
    assert hashlib.sha256((tmp_path / "addition.pt").read_bytes()).hexdigest() in text


def test_an_unknown_name_is_refused():
    with pytest.raises(keep.UsageError, match="expected one of addition"):
        keep.main(keep.Config("sums", "x.pt"))
