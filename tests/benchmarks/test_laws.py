"""Laws and their judge: each rule by hand, formulas up to constants, one law from its table to a figure."""

import json

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.quality import laws
from data_utils.formulas.tables import read_table

LAWS = {law.name: law for law in laws.read_laws()}


def test_every_law_is_accepted_as_its_own_answer_and_its_table_has_the_digits_of_its_row():
    assert len(LAWS) == 30
    for law in LAWS.values():
        answer = laws.verdict(law, f"y = {law.formula}")
        assert answer["accepted"] and answer["inside"] == answer["outside"] == 0, law.name
        names, cells = laws.make_table(law, 0)
        assert names == [*law.ranges, "y"] and len(cells) == law.rows
        digits = [len(cell.partition("e")[0].replace(".", "").lstrip("-0")) for row in cells for cell in row]
        assert max(digits) <= law.digits
        assert laws.make_table(law, 0)[1] == cells
        assert laws.make_table(law, 1)[1] != cells or not law.noise  # of one variable: on a grid


@pytest.mark.parametrize(
    ("name", "answer", "why"),
    [
        ("ohm_power", "y = 1.015*current**2*resistance", ""),  # 1 % of noise: 2 % inside
        ("ohm_power", "1.03*current**2*resistance", "inside"),  # 3 %, of which 10 % are allowed outside
        ("ohm_power", "1.2*current**2*resistance", "inside, outside"),
        ("ohm_power", "current*current*resistance*1*1", ""),  # 6 parts; 1.5 times 3 and 3 are 7.5
        ("ohm_power", "current*current*resistance*1*1*1", "short"),  # 8 parts
        ("kepler_si", "5.4582e-10*sqrt(a)**3", ""),
        ("kepler_si", "5.6e-10*a**1.5", "inside"),  # no noise: 1 %
        ("celsius_to_fahrenheit", "1.8*c + 32 + exp(c - 99)", "outside"),
        ("sine_tide", "3.1", "inside, outside"),
        ("nernst", "8.617e-5*T*(log(co) - log(ci))", ""),
        ("diode", "1e-12*exp(V/0.02585)", ""),
        ("two_points_line", "x + x", ""),
        ("two_points_line", "x*2*1*1*1*1", "short"),
        ("two_points_line", "2*x + 0/(x - x)", "inside, outside"),
    ],
)
def test_an_answer_is_right_inside_right_outside_and_short(name, answer, why):
    verdict = laws.verdict(LAWS[name], answer)
    assert (verdict["accepted"], verdict["why"]) == (not why, why)


@pytest.mark.parametrize(
    "text", ["", "2*", "other", "__import__('os')", "x.real", "[x][0]", "open('f')", "x if x else 1"]
)
def test_nothing_but_a_formula_is_evaluated(text):
    verdict = laws.verdict(LAWS["two_points_line"], text)
    assert not verdict["accepted"] and verdict["why"].startswith("not a formula")
    with pytest.raises(ValueError, match="not a formula"):
        laws.value(text, dict(x=np.ones(2)))


def test_size_counts_operators_functions_and_numbers():
    assert [laws.size(text) for text in ("x", "-x", "2*x", "exp(-x/3) + 1", "x**1.5")] == [0, 0, 2, 5, 2]


def test_ranges_grow_on_their_side_of_zero():
    law = laws.Law("", "a", dict(a=(1.0, 3.0, False), b=(0.0, 4.0, False), c=(-1.0, 1.0, False), d=(1.0, 100.0, True)),
                   9, 0.0, 4)  # fmt: skip
    columns = laws.draw_columns(law, 20_000, np.random.default_rng(0), widen=0.5)
    spans = {name: (x.min(), x.max()) for name, x in columns.items()}
    for name, span in dict(a=(0.5, 4), b=(0, 6), c=(-2, 2), d=(0.1, 1000)).items():
        assert spans[name] == pytest.approx(span, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("2*x + 3", "1.7*(x + 2e9)", True),
        ("2.4*sqrt(x)**3", "7*x*sqrt(x)", True),
        ("5*exp(-0.4*x)", "3e-9*0.67**x", True),
        ("exp(1 - 0.4*x)", "exp(x)", True),
        ("5/exp(0.4*x)", "exp(-x)", True),
        ("log(a/b)", "log(2e9*a/b)", True),
        ("log(a/b)", "log(a/b) + 4", True),
        ("2*x", "2*x + 1", False),
        ("x**2", "x**3", False),
        ("a*b", "a/b", False),
        ("sin(x)", "cos(x)", False),
    ],
)
def test_formulas_that_differ_in_their_constants_have_the_same_skeleton(one, other, equal):
    assert (laws.skeleton(one) == laws.skeleton(other)) == equal


def test_a_cell_is_shifted_by_decades_exactly():
    assert [float(laws.shift(cell, k)) for cell, k in (("1.234", -9), ("5e+06", 9), ("-0.07", 2))] == [
        1.234e-9,
        5e15,
        -7.0,
    ]


def test_the_regression_of_logarithms_finds_a_product_of_powers():
    names, cells = laws.make_table(LAWS["gravitation"], 0)
    ((text, predict),) = laws.log_regression(*laws.columns_of(cells), 0, 1)
    assert laws.verdict(LAWS["gravitation"], text, lambda c: predict(np.stack(list(c.values()), 1)))["accepted"]
    assert laws.log_regression(np.ones((3, 1)), np.array([1.0, -1, 2]), 0, 1) == []


def test_every_copy_of_a_table_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(laws, "CASES", tmp_path / "none")
    out = tmp_path / "figures.json"
    laws.main(["--quick", "--rows", "tables", "--out", str(out)])
    (figure,) = json.loads(out.read_text())["tables"]["figures"]
    assert figure["ours"] == 100.0 and figure["spread"] == "8 read, 3 refused"


def test_a_law_from_its_table_to_its_figures(tmp_path, monkeypatch):
    def absent(*_):
        raise ImportError

    def answer(args, path, seconds):
        table = read_table(str(path))
        assert table.names == ["current", "resistance"] and table.target == "y" and seconds == 1
        rows = [("current**2*resistance", False), ("5*current", True)]
        return [dict(formula=text, front=front) for text, front in rows], dict(seconds=1.0, cpu_seconds=0.5)

    monkeypatch.setattr(laws, "command", answer)
    monkeypatch.setattr(laws, "PACKAGES", laws.PACKAGES | dict(pyoperon=absent, gplearn=absent))
    monkeypatch.setattr(laws, "WORK", tmp_path)
    out = tmp_path / "figures.json"
    laws.main(["--quick", "--rows", "laws", "--out", str(out)])
    results = json.loads(out.read_text())["laws"]
    figures = {f["id"].removeprefix("laws.laws."): f for f in results["figures"]}
    assert figures["ours"]["ours"] == figures["logs"]["ours"] == "100.0" and figures["never"]["ours"] == 0
    assert "1 of 1 runs starved" in figures["ours"]["spread"]
    assert [figures[name]["baseline"] for name in ("pyoperon", "gplearn")] == [
        peers.GET["pyoperon"],
        peers.GET["gplearn"],
    ]
    assert results["misses"] == [] and "| ohm_power | 1 | 1 | 1 |" in (tmp_path / "laws.md").read_text()
    monkeypatch.setattr(laws, "command", absent)  # from the stored runs
    laws.main(["--quick", "--rows", "laws", "--out", str(out)])
    assert json.loads(out.read_text())["laws"]["figures"] == results["figures"]


@pytest.mark.slow
def test_a_line_of_four_rows_is_found_by_the_search(tmp_path):
    out = tmp_path / "figures.json"
    path = tmp_path / "line.csv"
    path.write_text("x,y\n1,2\n2,4\n3,6.1\n4,8\n")
    args = type("Args", (), dict(work=tmp_path))
    answers, spent = laws.command(args, path, 1)
    assert laws.skeleton(answers[0]["formula"]) == "x" and spent["cpu_seconds"] > 0 and not out.exists()
