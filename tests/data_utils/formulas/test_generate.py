"""`generate.py formula` on tables: flags, answers, files, and what it refuses."""

import csv
import json
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.formulas import forms, generate, search
from data_utils.formulas.expressions import Alphabet
from data_utils.formulas.formats import number_text
from data_utils.formulas.generate import NO_FORMULA, find, knows_prompts
from data_utils.formulas.model_files import PRETRAINED, model_folder
from data_utils.formulas.tables import read_table
from generate import FormulaConfig
from tests.helpers import finish, run_python, slow, start

QUICK = dict(max_seconds=0.0, choices=4, operators=("sqrt",))


@pytest.fixture(scope="module", autouse=True)
def short_search():
    """Rank a few formulas of a few forms: a test needs an answer, not the best one."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((search, "FINAL", 3), (search, "EXTENDED", 1), (forms, "QUANTITIES", 1)):
            patch.setattr(module, name, value)
        yield


def test_residuals_are_compared_with_the_rounding_of_the_table(tmp_path, capsys):
    x = np.linspace(1, 9, 40)
    path = write_table(tmp_path / "a.csv", dict(x=x, y=3 * x**2), digits=4)
    table, alphabet = read_table(path), Alphabet(["*", "pow2", "pow3"], ["x1"])
    square, cube = (SimpleNamespace(prefix=["*", "<constant>", p, "x1"], constants=[3.0]) for p in ("pow2", "pow3"))
    assert 0.5 < generate.roundings(alphabet, square, table) < 1.5 and generate.roundings(alphabet, cube, table) > 100
    table.digits_y[:] = 0  # not known, as of arrays
    assert generate.roundings(alphabet, cube, table) == 0
    find(FormulaConfig(data=path, **QUICK))
    assert "the rounding of" not in capsys.readouterr().err
    noisy = write_table(tmp_path / "b.csv", dict(x=x, y=3 * x**2 + np.sin(40 * x)), digits=4)
    find(FormulaConfig(data=noisy, **QUICK))
    assert "times the rounding of the table: noise, or another law" in capsys.readouterr().err


def write_table(path, columns, digits=6):
    """Write {name: values} as csv."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{v:.{digits}g}" for v in row] for row in zip(*columns.values(), strict=True))
    return str(path)


@pytest.fixture
def pendulum(tmp_path):
    """Periods of pendulums, with 1 % noise, beside a column that says nothing."""
    rng = np.random.default_rng(0)
    length, mass = rng.uniform(0.2, 3, (2, 30))
    period = 2.006 * np.sqrt(length) * (1 + 0.01 * rng.standard_normal(30))
    return write_table(tmp_path / "pendulum.csv", {"length m": length, "mass": mass, "period": period})


def answer(capsys, data, **flags):
    """What find prints for a table: stdout, stderr."""
    capsys.readouterr()
    find(FormulaConfig(**QUICK | dict(data=str(data)) | flags))
    return capsys.readouterr()


def test_a_table_alone_is_enough(pendulum, capsys):
    out, err = answer(capsys, pendulum)
    assert out.startswith("period = ") and out.count("\n") == 1 and "sqrt(length m)" in out and "mass" not in out
    lines = err.splitlines()
    assert "R2" in lines[-3 - len(lines) :][0] or any("R2" in line for line in lines)
    ranked = [line for line in lines if line.startswith(("* ", "  ")) and "R2" not in line]
    assert any(line.startswith("* ") for line in ranked) and out.partition(" = ")[2].strip() in ranked[0]
    assert "30 rows" in lines[-1] and "candidates" in lines[-1]
    bits = [float(line.split()[1 + line.startswith("*")]) for line in ranked]
    assert bits == sorted(bits)


@pytest.mark.parametrize(
    "style, words",
    [
        ("python", "def period(length_m):"),
        ("latex", "\\mathrm{period} ="),
        ("sympy", "sp.Symbol('length m', real=True)"),
    ],
)
def test_formats(pendulum, capsys, style, words):
    out, _ = answer(capsys, pendulum, format=style, columns=("length m",))
    assert words in out
    if style == "python":
        table = read_table(pendulum, columns=("length m",))
        left = table.y - np.array(run_python(out, "period", table.X[:, 0]))
        assert np.std(left / table.y) < 0.02


@pytest.mark.slow
def test_the_network_of_the_repo_proposes_for_up_to_three_columns(tmp_path, capsys, monkeypatch):
    calls = []
    draw = search.Network.__call__
    monkeypatch.setattr(
        search.Network, "__call__", lambda self, *args: calls.append(self.X.shape[1]) or draw(self, *args)
    )
    columns = dict(zip("abcd", np.random.default_rng(0).uniform(1, 2, (4, 20)), strict=True))
    table = write_table(tmp_path / "t.csv", columns | dict(y=columns["a"] * columns["b"]))
    for names, flags, expected in (
        ("abc", {}, 3),
        ("abcd", {}, None),
        ("abc", dict(model=""), None),
        ("abc", dict(method="prior"), None),
        ("ab", dict(method="beam", beam_width=2), 2),
    ):
        assert answer(capsys, table, columns=tuple(names), **flags).out == "y = a*b\n"
        assert set(calls) == ({expected} if expected else set())
        calls.clear()
    for flags in (dict(method="sampling"), dict(model=str(model_folder(PRETRAINED)))):
        with pytest.raises(UsageError, match="4 columns, but the network reads at most 3"):
            answer(capsys, table, **flags)


def test_columns_and_the_column_of_errors(tmp_path, capsys):
    x = np.linspace(1, 3, 20)
    columns = dict(a=x, b=x[::-1] ** 2, y=3 * x, err=np.full(20, 0.1))
    table = write_table(tmp_path / "t.csv", columns)
    assert answer(capsys, table, target="y", ignore=("b",), sigma="err").out == "y = 3*a\n"
    assert answer(capsys, table, target="b", columns=("a",)).out.startswith("b = ")
    with pytest.raises(UsageError, match="--target z"):
        answer(capsys, table, target="z")


def test_excluded_terms_and_lengths_are_obeyed_by_every_formula(pendulum, tmp_path, capsys):
    out = str(tmp_path / "all.csv")
    answer(capsys, pendulum, exclude_terms=("sqrt", "mass"), operators=(), out=out, max_length=5)
    rows = list(csv.DictReader(open(out, encoding="utf-8")))
    assert rows and all(int(row["length"]) <= 5 for row in rows)
    assert not any("sqrt" in row["formula"] or "mass" in row["formula"] or "**0.5" in row["formula"] for row in rows)
    answer(capsys, pendulum, operators=("log",), out=out)
    rows = list(csv.DictReader(open(out, encoding="utf-8")))
    assert not any(name in row["formula"] for row in rows for name in ("sqrt", "exp", "sin", "**"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(exclude_terms=("sinus",)), "--exclude_terms sinus"),
        (dict(operators=("sinus",)), "--operators sinus"),
        (dict(include_terms=("mass",)), "--include_terms needs a network that was trained with prompts"),
        (dict(allowed_terms=("mass",)), "--allowed_terms needs a network"),
        (dict(complexity=5), "--complexity needs a network"),
        (dict(method="beam", model=""), "--method beam: --model FOLDER is missing"),
        (dict(choices=0), "--choices 0"),
        (dict(max_length=-1), "--max_length -1"),
        (dict(suite=("nguyen",)), "give --data FILE.csv, or --suite"),
    ],
)
def test_flags_that_cannot_be_obeyed_are_errors(pendulum, capsys, flags, words):
    with pytest.raises(UsageError, match=f"^{words}"):
        answer(capsys, pendulum, **flags)


def test_noise_is_not_explained(tmp_path, capsys):
    rng = np.random.default_rng(5)
    table = write_table(tmp_path / "t.csv", dict(x=rng.normal(size=12), y=rng.normal(10, 1, 12)))
    out, err = answer(capsys, table)
    assert out.startswith(f"{NO_FORMULA} (y = ") and len(out.splitlines()) == 1
    assert float(out.partition(" = ")[2].rstrip(")\n")) == pytest.approx(read_table(table).y.mean(), rel=0.01)
    assert 1 <= len([line for line in err.splitlines() if line.startswith(("* ", "  ")) and "R2" not in line]) <= 4


def test_a_constant_column_is_its_value(tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", dict(x=[1, 2, 3, 4], y=[2.5] * 4))
    assert answer(capsys, table).out == "y = 2.5\n"


def test_printed_constants_of_a_julian_date(tmp_path, capsys):
    x = np.linspace(2455000, 2455100, 60)
    table = write_table(tmp_path / "t.csv", dict(jd=x, y=3 * np.sin(0.8 * (x - 2455000.37))), 12)
    out, _ = answer(capsys, table, operators=("sin", "cos"))
    text = out.partition(" = ")[2]
    y = np.array(run_python(f"from numpy import *\ndef y(jd):\n    return {text}", "y", x))
    r2 = float([line for line in _.splitlines() if text.strip() in line][0].lstrip("* ").split()[0])
    data = read_table(table).y
    assert 1 - np.mean((y - data) ** 2) / np.var(data) == pytest.approx(r2, abs=1e-6)


def test_all_formulas_go_into_a_file(pendulum, tmp_path, capsys):
    out = tmp_path / "front.jsonl"
    printed = answer(capsys, pendulum, out=str(out)).out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["rank"] == 1 and printed == f"period = {rows[0]['formula']}\n"
    assert [row["bits"] for row in rows] == sorted(row["bits"] for row in rows)
    assert list(rows[0]) == "rank formula prefix constants length bits fvu r2 front seconds".split()
    front = sorted((row["length"], row["fvu"]) for row in rows if row["front"])
    assert len({length for length, _ in front}) == len(front) >= 2
    assert [fvu for _, fvu in front] == sorted((fvu for _, fvu in front), reverse=True)
    answer(capsys, pendulum, out=str(out))  # its own
    out.write_text("mine\n")
    with pytest.raises(UsageError, match="--fresh"):
        answer(capsys, pendulum, out=str(out))


def test_the_figure(pendulum, tmp_path, capsys, full_pictures):
    pytest.importorskip("matplotlib")
    answer(capsys, pendulum, plot=str(tmp_path / "fit.png"), columns=("length m",))
    assert (tmp_path / "fit.png").stat().st_size > 20_000
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UsageError, match="--plot"):
        answer(capsys, pendulum, plot=str(tmp_path / "mine.png"))


def test_predictions_stand_beside_the_rows_of_another_table(pendulum, tmp_path, capsys):
    new = tmp_path / "new.csv"
    new.write_text("name,mass,length m\na,1,0.25\nb,2,\nc,3,4\n")
    answer(capsys, pendulum, predict=str(new), columns=("length m",))
    predicted = tmp_path / "new.predicted.csv"
    rows = list(csv.reader(predicted.open()))
    assert rows[0] == ["name", "mass", "length m", "period_predicted"]
    assert rows[2] == ["b", "2", "", ""] and [row[:3] for row in rows[1:]] == [["a", "1", "0.25"], ["b", "2", ""],
                                                                               ["c", "3", "4"]]  # fmt: skip
    assert float(rows[1][3]) == pytest.approx(1.003, rel=0.02) and float(rows[3][3]) == pytest.approx(4.012, rel=0.02)
    answer(capsys, pendulum, predict=str(new), columns=("length m",))  # its own is replaced
    predicted.write_text("mine\n")
    with pytest.raises(UsageError, match="new.predicted.csv exists.*--fresh"):
        answer(capsys, pendulum, predict=str(new), columns=("length m",))
    answer(capsys, pendulum, predict=str(new), columns=("length m",), fresh=True)
    assert (tmp_path / "new.predicted.csv.bak").read_text() == "mine\n" and len(list(csv.reader(predicted.open()))) == 4
    new.write_text("mass\n1\n2\n")
    with pytest.raises(DataError, match="no column length m"):
        answer(capsys, pendulum, predict=str(new), columns=("length m",))


def test_predictions_keep_the_separator_and_the_decimal_mark(tmp_path, capsys):
    x = np.linspace(1, 3, 20)
    table = write_table(tmp_path / "t.csv", dict(x=x, y=2.5 * x))
    (tmp_path / "new.csv").write_text("x;note\n1,5;a\n3,0;b\n")
    answer(capsys, table, predict=str(tmp_path / "new.csv"))
    assert (tmp_path / "new.predicted.csv").read_text().splitlines() == ["x;note;y_predicted", "1,5;a;3,75",
                                                                         "3,0;b;7,5"]  # fmt: skip


def test_the_bar_shows_seconds_r2_and_the_formula(pendulum, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate, "TICK", 0.05)
    _, err = answer(capsys, pendulum, max_seconds=1.5, columns=("length m",))
    assert " s |" in err and "R2 0.9" in err and "period = " in err
    _, err = answer(capsys, pendulum, choices=16)
    assert "R2 0.9" in err


def test_prompts_of_a_network(tmp_path):
    alphabet = Alphabet(["+"], ["x1"])
    assert knows_prompts(tmp_path, alphabet) and not knows_prompts(
        tmp_path, Alphabet(["+"], ["x1"], ["<pad>", "<constant>"])
    )
    (tmp_path / "dataset_train.yaml").write_text("prompt_probability: 0.0\n")
    assert not knows_prompts(tmp_path, alphabet)
    (tmp_path / "dataset_train.yaml").write_text("prompt_probability: 0.5\n")
    assert knows_prompts(tmp_path, alphabet)


@pytest.mark.parametrize("n", [slow(25), 100_000])
def test_the_deadline_holds(n, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 5, (2, n))
    y = 3 * x[0] ** 2 / x[1] + 0.1 * rng.standard_normal(n)
    table = write_table(tmp_path / "t.csv", dict(a=x[0], b=x[1], y=y))
    begin = time.process_time()  # of one thread: other programs that share the cores don't count
    answer(capsys, table, max_seconds=4.0)
    assert time.process_time() - begin < 5


def test_as_a_user_starts_it(pendulum, tmp_path):
    out, err = finish(start("generate.py", "formula", "--data", pendulum, "--max_seconds", "0", cwd=tmp_path))
    assert out.startswith("period = ") and "sqrt" in out and "\r" not in err
    flags = ["--data", pendulum, "--max_seconds=0", "--choices=16", "--exclude-terms", "sqrt", "pow", "--format=latex"]
    out, _ = finish(start("generate.py", "formula", *flags, cwd=tmp_path))
    assert out.startswith("\\mathrm{period} = ") and "sqrt" not in out
    _, err = finish(start("generate.py", "formula", "--data", pendulum, "--exclude_terms", "sine", cwd=tmp_path), 2)
    assert "error: --exclude_terms sine" in err and "sin" in err.splitlines()[1]


def test_ctrl_c_prints_the_best_so_far(pendulum, tmp_path):
    process = start("generate.py", "formula", "--data", pendulum, "--max_seconds", "60", cwd=tmp_path)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, err = finish(process)
    assert out.startswith(("period = ", NO_FORMULA)) and "30 rows" in err and time.monotonic() - begin < 20


def test_a_number_has_as_many_digits_as_asked_for(pendulum, capsys):
    out, _ = answer(capsys, pendulum, precision=3, columns=("length m",), exclude_terms=("pow",))
    numbers = [float(text) for text in out.replace("*", " ").replace("(", " ").split() if text[0].isdigit()]
    assert all(number_text(number, 3) == number_text(number) for number in numbers)
