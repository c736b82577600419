import json

import torch

from benchmarks import ae_quality, experts, hrm, multimodal


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
