import json
import math

import numpy as np
import pytest
import torch

from benchmarks import ae_quality, experts, hrm, multimodal, multimodal_quality


def test_every_row_of_the_expert_figures_runs_at_toy_size(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "figures.json"
    for domain in ("code", "verse"):
        (data / domain).mkdir(parents=True)
        lines = [json.dumps(dict(text=f"{domain} number {i}: " + "some words of a text. " * 9)) for i in range(8)]
        (data / domain / "a.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--quick", "--threads", str(torch.get_num_threads()), "--data_dir", str(data), "--out", str(out)]
    experts.main([*flags, "--tokenizer", "bytes"])
    results = json.loads(out.read_text())
    assert set(results) == set(experts.ROWS)
    assert all("ours" in f or f["peer"] for row in results.values() for f in row["figures"])
    assert any("ours seed 0" in key for key in results["loss"]["runs"])
    experts.main([*flags, "--tokenizer", "bytes", "--rows", "loss"])  # from the stored runs
    assert json.loads(out.read_text())["loss"]["figures"] == results["loss"]["figures"]

    readme = tmp_path / "README.md"
    experts.write_readme("table", readme)
    assert not readme.exists() and "lacks" in capsys.readouterr().out
    readme.write_text("a <!-- experts:begin -->old<!-- experts:end --> b")
    experts.write_readme(experts.table(results), readme)
    text = readme.read_text()
    assert text.startswith("a ") and text.endswith(" b") and "old" not in text and "| S6 generation" in text


def test_a_missing_peer_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    def absent(side, args, vocab, real=experts.build):
        if side == "nanoGPT":
            raise ImportError
        return real(side, args, vocab)

    monkeypatch.setattr(experts, "build", absent)
    out = str(tmp_path / "figures.json")
    experts.main(["--quick", "--threads", str(torch.get_num_threads()), "--rows", "speed,memory", "--out", out])
    assert capsys.readouterr().out.count("git clone https://github.com/karpathy/nanoGPT") == 6


def test_speed_of_hrm_runs_at_toy_size(tmp_path):
    out = tmp_path / "figures.json"
    flags = ["--quick", "--times", "1", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    hrm.main([*flags, "--rows", "step,generate"])
    results = json.loads(out.read_text())
    assert set(results) == {"step", "generate"}
    assert all(f["ours"] > 0 for row in results.values() for f in row["figures"])


def test_every_row_of_the_autoencoder_figures_runs_at_toy_size(tmp_path):
    out = tmp_path / "figures.json"
    flags = ["--quick", "--threads", str(torch.get_num_threads()), "--home", str(tmp_path), "--out", str(out)]
    ae_quality.main(flags)
    results = json.loads(out.read_text())
    assert set(results) == set(ae_quality.ROWS)
    assert all("ours" in f and f["spread"] for row in results.values() for f in row["figures"])
    ae_quality.main([*flags, "--rows", "kmeans"])  # from the stored runs
    assert json.loads(out.read_text())["kmeans"]["figures"] == results["kmeans"]["figures"]


def test_scores_of_odd_events():
    x, ids = torch.rand(50, 4, 5), torch.tensor([1, 2, 3, 0]).expand(50, 4)
    columns, rng = dict(x=x * (ids > 0)[..., None], ids=ids, globals=torch.zeros(50, 3)), torch.Generator()
    gone = ae_quality.odd_events(columns, "a particle dropped", rng)
    assert ((gone["ids"] > 0) == torch.tensor([True, True, False, False])).all() and (gone["x"][:, 2:] == 0).all()
    assert (gone["ids"].diff(dim=1)[:, :1] > 0).all()  # the others keep their order
    for old, new in zip(columns["x"], gone["x"], strict=True):
        assert all((new[i] == old).all(1).any() for i in range(2))
    mixed = ae_quality.odd_events(columns, "types permuted", rng)
    assert torch.equal(mixed["ids"].sort(1).values, ids.sort(1).values) and (mixed["ids"] != ids).any()
    assert torch.equal(mixed["ids"] > 0, ids > 0) and torch.equal(mixed["x"], columns["x"])
    assert ae_quality.auroc(torch.tensor([1.0, 2]), torch.tensor([1.5, 3])) == 0.75


def test_speed_of_the_renderer_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    flags = ["--quick", "--threads", str(torch.get_num_threads()), "--out", str(out), "--rows", "render"]
    multimodal.main(flags)
    figures = json.loads(out.read_text())["render"]["figures"]
    assert len(figures) == 5 and all(f["ours"] > 0 for f in figures)
    monkeypatch.setattr(multimodal, "drawn_by_pillow", lambda *about: (None, 0))
    multimodal.main(flags)
    assert capsys.readouterr().out.count("pip install pillow") == 5


def test_speed_of_the_pictures_runs_at_toy_size_and_says_how_to_get_peers(tmp_path, capsys):
    out = tmp_path / "figures.json"
    flags = ["--quick", "--threads", str(torch.get_num_threads()), "--out", str(out), "--official", str(tmp_path)]
    multimodal.main([*flags, "--rows", "optimizer,trm,planning-cost"])
    results = json.loads(out.read_text())
    assert {name: len(row["figures"]) for name, row in results.items()} == {
        "optimizer": 2,
        "trm": 4,
        "planning-cost": 1,
    }
    assert all(f["ours"] > 0 for row in results.values() for f in row["figures"])
    assert capsys.readouterr().out.count("git clone https://github.com/SamsungSAILMontreal") == 4


def test_learning_of_the_pictures_runs_at_toy_size_and_is_read_again(tmp_path):
    out, rows = tmp_path / "figures.json", "sudoku4,halting,continue"
    flags = ["--quick", "--threads", str(torch.get_num_threads()), "--home", str(tmp_path), "--out", str(out)]
    multimodal.main([*flags, "--rows", rows, "--arms", "recursion"])
    results = json.loads(out.read_text())
    assert {name: len(row["figures"]) for name, row in results.items()} == dict(sudoku4=6, halting=2, **{"continue": 2})
    assert all("ours" in f for row in results.values() for f in row["figures"])
    metrics = tmp_path / "quick/sudoku4-recursion-on-pictures-seed-0/metrics.jsonl"
    trained = metrics.read_bytes()
    multimodal.main([*flags, "--rows", "sudoku4", "--arms", "recursion"])
    assert metrics.read_bytes() == trained and json.loads(out.read_text())["sudoku4"] == results["sudoku4"]


def test_numbers_of_the_pictures_figures():
    seconds = [dict(seconds=5.0), dict(), dict(seconds=9.0), dict(seconds=2.0), dict(seconds=3.0)]
    assert multimodal_quality.spent(seconds) == 12.0 and multimodal_quality.spent([]) == 0.0
    better, worse = np.repeat([1.0, 0.0], [60, 40]), np.repeat([1.0, 0.0], [40, 60])
    middle, low, high = multimodal_quality.bootstrap(better, worse, times=500)
    assert middle == pytest.approx(20) and 0 < low < 20 < high < 40
    right, q = torch.tensor([[False, True, True], [False, False, True]]), torch.tensor([[-1.0, 1, 2], [1, 2, 3]])
    assert multimodal_quality.stopped(right, q, 0.0) == (0.5, 1.5)
    assert multimodal_quality.stopped(right, q, math.inf) == (1.0, 3.0)

    model = multimodal_quality.Ngram([[1, 2, 3, 1, 2, 3, 1, 2]])
    chances = [model.chance([1, 2], symbol) for symbol in range(112)]
    assert sum(chances) == pytest.approx(1) and max(range(112), key=chances.__getitem__) == 3
    assert model.nats([1, 2, 3], 2) == [pytest.approx(-math.log(chances[3]))]
    row = {"score": 1.0, "read/characters": 0.5, "read/halt_auc": None, "raw/score": 0.1, "raw/read/characters": 0.4,
           "shuffled/score": 0.0, "maze/optimal": 0.25}  # fmt: skip
    assert multimodal_quality.firsts(row) == "read/characters 50.0, maze/optimal 25.0"
