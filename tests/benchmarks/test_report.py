import json
import math

import numpy as np
import pytest
import torch

from benchmarks import ae_quality, experts, hrm, multimodal, multimodal_quality, report, run
from data_utils.errors import DataError, UsageError


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
    report.write_readme("table", "experts", readme)
    assert not readme.exists() and "lacks" in capsys.readouterr().out
    readme.write_text("a <!-- experts:begin -->old<!-- experts:end --> b")
    report.write_readme(report.table(results), "experts", readme)
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
    multimodal.main([*flags, "--rows", rows, "--arms", "recursion,every patch"])
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


@pytest.mark.parametrize(
    ("target", "figure", "met", "times"),
    [
        (">= 2", dict(ours=9.0, peer=6.0, ratio=1.5), False, 0.75),
        ("ours <= 400", dict(ours=200.0, peer=600.0, ratio=0.33), True, 2.0),
        ("ours <= 400, ratio 0.9 to 1.1", dict(ours=200.0, peer=100.0, ratio=2.0), False, 0.1),
        (">= 50; >= 150 x", dict(ours=100.0, peer=1.0, ratio=100.0), False, 2 / 3),
        ("<= 160 / 768", dict(ours=640.0, peer=3072.0, ratio=0.208), True, 160 / 768 / 0.208),
        ("<= -0.05", dict(ours=4.1, peer=4.2, ratio=-0.1), True, 2.0),
        ("<= -0.05", dict(ours=4.3, peer=4.2, ratio=0.1), False, 0.0),
        ("<= 0.02", dict(ours=4.1, peer=4.2, ratio=-0.1), True, math.inf),
        ("within 5 %", dict(ours=1.1, peer=1.0, ratio=1.1), False, 0.5),
        ("lower by >= 0.05", dict(ours=0.5, peer=0.6, ratio=0.8), True, 2.0),
        ("above", dict(ours=0.5, peer=0.6), False, 0.0),
        ("> 1", dict(ours=1.0), False, 1.0),
        ("100", dict(ours="97.5 (98.0, 97.0)"), False, 0.975),
        ("0", dict(ours=0.0), True, 1.0),
        ("rising", dict(ours=1.0), None, None),
        (">= 40 at <= 1 point", dict(ours=50.0), None, None),
        (">= 1", dict(peer="pip install peer"), None, None),
        (">= 1", dict(ours=2000.0, peer="pip install peer"), None, None),
        (">= 97", dict(ours="98.0", peer="60.5 (60.0, 61.0)"), True, 98 / 97),
        ("ours <= 400", dict(ours=200.0, peer="pip install peer"), True, 2.0),
        ("", dict(ours=1.0), None, None),
    ],
)
def test_what_meets_a_target(target, figure, met, times):
    assert run.judged(figure | dict(target=target)) == (met, times if times is None else pytest.approx(times))


def test_a_page_of_all_figures_and_its_picture(tmp_path, monkeypatch):
    home = tmp_path / "benchmarks"
    home.mkdir()
    about = dict(threads=1, torch="2.13", date="2026-01-02", cpu=["AVX2"], spread="1 to 3", command="python it.py")
    figures = [dict(figure="speed | of it", ours=3.0, peer=1.5, ratio=2.0, target=">= 1"), dict(
        figure="memory", ours=7.0, peer="pip install peer", target="")]  # fmt: skip
    text = dict(temperature=1.0, trigram=3.0, distinct_2=0.5)
    made = dict(seconds=600.0, sampler="ancestral", steps=10)
    found = dict(
        experts=dict(speed=about | dict(figures=[about | figure for figure in figures])),
        mla=dict(mla=about | dict(alone=dict(a=4.0, b=5.0), runs={"router seed 0": dict(val=3.9),
                                                                  "router seed 1": dict(val=3.8),
                                                                  "store seed 0": dict(val=3.89)})),
        diffuser=[text | dict(name="real text", nll=4.0, entropy=6.0),
                  text | dict(name="unigram", nll=8.0, entropy=6.0),
                  text | made | dict(name="ce_warm", nll=7.0, entropy=6.2),
                  text | made | dict(name="masked_warm", nll=6.9, entropy=6.0)],
        faults=dict(table=about | dict(rows=[
            dict(row=9, fault="bad", script=name, outcome="pass", note="") for name in ("sr", "ae", "hrm")
        ])),
    )  # fmt: skip
    for name, rows in found.items():
        (home / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.setattr(run, "HERE", home)
    run.main(run.Config(only=""))
    page = (home / "results.md").read_text()
    assert "| speed \\| of it | 3.0 | 1.5 | 2.0 | 1 to 3 | >= 1 | yes | `python it.py` |" in page
    assert "| memory | 7.0 | not there |" in page and "A peer of 1 of these figures was not there: `pip install" in page
    assert "the best expert, difference | 3.85 | 4.0 | -0.15 | -0.2000 to -0.1000, 2 seeds | <= -0.05 | yes |" in page
    assert "store, against the router without, difference | 3.89 | 3.9 | -0.01 |" in page and "5 of 7 targets" in page
    assert "10 steps T 1, minus masked control | 7.0 | 6.9 | 0.1 |" in page and "| 3 | yes |" in page
    assert "Measured 2026-01-02 with torch 2.13, 1 thread, AVX2. 1 of 1 targets met." in page
    assert "Nothing measured yet: `python benchmarks/multimodal.py`" in page
    assert (home / "results.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="no such benchmark"):
        run.main(run.Config(only="expert"))


def test_a_benchmark_that_fails_is_a_line_and_the_others_go_on(tmp_path, monkeypatch):
    home, found = tmp_path / "benchmarks", dict(row=dict(figures=[dict(figure="it", ours=2.0, command="it")]))
    home.mkdir()
    (home / "bad.py").write_text("raise SystemExit('needs a GPU')")
    (home / "good.py").write_text(f"import sys; open(sys.argv[-1], 'w').write({json.dumps(found)!r})")
    (home / "experts.json").write_text("{}")
    monkeypatch.setattr(run, "HERE", home)
    monkeypatch.setattr(run, "PREPARED", [])
    commands = dict(mla=("Bad", ["bad.py --all"], ["bad.py"]), experts=("Good", ["good.py FILE"], ["good.py"]))
    monkeypatch.setattr(run, "BENCHMARKS", commands)
    for quick, folder in ((True, home / "work" / "quick"), (False, home)):
        with pytest.raises(DataError, match="mla failed"):
            run.main(run.Config(only="mla,experts", quick=quick))
        page = (folder / "results.md").read_text()
        command = (
            "python benchmarks/bad.py --out benchmarks/work/quick/mla.json" if quick else "benchmarks/bad.py --all"
        )
        assert "**Failed** with status 1" in page and f"{command}`: needs a GPU" in page
        assert ("| it | 2.0 |" in page) == quick == ("Toy sizes" in page)  # FILE of the root in the second turn
        assert (home / "experts.json").read_text() == "{}" and (tmp_path / "FILE").exists() != quick
