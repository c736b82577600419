import json

import torch

from benchmarks import experts, hrm


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
