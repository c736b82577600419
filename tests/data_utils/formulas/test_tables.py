"""Tables in the shapes in which people's files come: each is read right, or refused with the line and the remedy."""

import gzip
import io
import re
import time

import numpy as np
import pandas as pd
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.formulas.tables import from_arrays, read_table
from tests.helpers import SHARED

M = np.array([2.904, 3.96, 6.006, 1.105, 3.0, 8.965])
V = np.array([3.177, 3.416, 1.262, 4.35, 1.937, 2.881])
RHO = np.array([2.2852, 2.8981, 11.8978, 0.6351, 3.9688, 7.7794])
ROWS = list(zip(M.tolist(), V.tolist(), RHO.tolist(), strict=True))


def table(separator=",", header=("m", "V", "rho"), end="\n", cell=str, line=lambda i, text: text):
    """Return m, V, rho as text. cell: writes a number; line: changes row i."""
    lines = [separator.join(header)] if header else []
    lines += [line(i, separator.join(map(cell, row))) for i, row in enumerate(ROWS)]
    return end.join(lines) + end


def comma(number):
    return str(number).replace(".", ",")


def zip_of_arrays():
    file = io.BytesIO()
    np.savez(file, m=M)
    return file.getvalue()


def insert(text, line, at):
    lines = text.split("\n")
    return "\n".join([*lines[:at], line, *lines[at:]])


WEIGH = table()
READ = {  # kind -> content of the file: all of these hold m, V and rho as above
    "comma": WEIGH,
    "semicolon": table(";"),
    "tab": table("\t"),
    "pipe": table("|"),
    "blanks": table(" "),
    "several blanks": "m  V   rho\n" + table("   ", (), line=lambda i, text: " " + text),
    "markdown": insert(table(" | ", line=lambda i, text: f"| {text} |").replace("m | V | rho", "| m | V | rho |"),
                       "|---|---|---|", 1),  # fmt: skip
    "blank behind commas": table(", "),
    "Windows line ends": table(end="\r\n"),
    "old Mac line ends": table(end="\r"),
    "decimal comma": table(";", cell=comma),
    "decimal comma, tab": table("\t", cell=comma),
    "decimal comma, quoted": table(cell=lambda x: f'"{comma(x)}"'),
    "decimal comma, blanks": table(" ", cell=comma),
    "Excel's hint": "sep=;\n" + table(";"),
    "byte order mark": "\ufeff" + WEIGH,
    "UTF-16": WEIGH.encode("utf-16"),
    "UTF-16 without mark": WEIGH.encode("utf-16-le"),
    "UTF-16 of the other order": WEIGH.encode("utf-16-be"),
    "gzip": gzip.compress(WEIGH.encode()),
    "comments": "# bench 2\n#\n# temperature: 21 C, air\n" + insert(WEIGH, "# broken off", 3),
    "remarks": table(line=lambda i, text: text + "  # again" * (i == 2)),
    "names in a comment": "# bench 2\n# m V rho\n" + table(" ", ()),
    "names in a comment, commas": "#m,V,rho\n" + table(header=()),
    "title": "Bench 2\n\nJuly\n" + WEIGH,
    "title with commas": "Bench 2,,\n,,\n" + WEIGH,
    "empty lines": insert(insert(WEIGH, "", 2), ",,", 4) + "\n\n,,\n",
    "header again": insert(WEIGH, "m,V,rho", 3),
    "comma at the end": table(line=lambda i, text: text + ",").replace("rho", "rho,"),
    "comma at the end of rows": table(line=lambda i, text: text + ","),
    "quoted": table(cell=lambda x: f'" {x} "', header=('"m"', '"V"', '" rho "')),
    "no-break spaces": table(cell="\u00a0{}".format),
    "Fortran": table(cell=lambda x: f"{x:.5e}".replace("e", "D")),
    "exponents": table(cell="{:.5E}".format),
    "plus": table(cell="+{}".format),
}  # fmt: skip


def write(folder, content, name="weigh.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", READ)
def test_the_same_table_in_many_spellings(kind, tmp_path):
    read = read_table(write(tmp_path, READ[kind]))
    assert (read.names, read.target, read.sigma) == (["m", "V"], "rho", None)
    np.testing.assert_array_equal(read.X, np.stack([M, V], 1))
    np.testing.assert_array_equal(read.y, RHO)
    scientific = kind in ("Fortran", "exponents")
    np.testing.assert_allclose(read.digits_y, 0.5e-5 * 10 ** np.floor(np.log10(RHO)) if scientific else [0.5e-4] * 6)


ROWWISE = {  # kind -> content, names of x, first row of x, a part of a note
    "index of pandas": (",a,y\n0,5,1\n1,3,2\n2,4,4\n", ["a"], [5], "a name; to use it try: --columns a index"),
    "index written twice": (",Unnamed: 0,a,y\n0,0,5,1\n1,1,3,2\n2,2,4,4\n", ["a"], [5], "left out: Unnamed: 0"),
    "index after shuffling": (",a,y\n7,5,1\n0,3,2\n3,4,4\n", ["a"], [5], "left out: index"),
    "index of R": ('"a" "y"\n"1" 5 1\n"2" 3 2\n"3" 4 4\n', ["a"], [5], "left out: index"),
    "index alone": (",y\n0,1\n1,2\n2,4\n", ["index"], [0], "x is index"),
    "index beside a constant": (",g,y\n0,9,1\n1,9,2\n2,9,4\n", ["index"], [0], "x is index"),
    "names of rows": (",a,y\nfirst,5,1\nsecond,3,2\nthird,4,4\n", ["a"], [5], "of text as 'first'"),
    "counter with a name": ("id,a,y\n1,5,1\n2,3,2\n3,4,4\n", ["id", "a"], [1, 5], "try: --ignore id"),
    "n is no counter": ("n,y\n1,1\n2,3\n3,6\n", ["n"], [1], ""),
    "text": ("a,kind,y\n5,steel,1\n3,wood,2\n4,steel,4\n", ["a"], [5], "left out: kind, of text as 'steel'"),
    "text in the end": ("a,y,remark\n5,1,\n3,2,good\n4,4,\n", ["a"], [5], "left out: remark"),
    "truth": ("a,ok,y\n5,True,1\n3,False,2\n4,,4\n", ["a"], [5], "left out: ok, of truth values"),
    "numbers 0 and 1": ("a,ok,y\n5,1,1\n3,0,2\n4,1,4\n", ["a", "ok"], [5, 1], ""),
    "dates": ("day,a,y\n2024-01-01,5,1\n2024-01-02,3,2\n2024-01-03,4,4\n", ["a"], [5], "left out: day, of dates"),
    "German dates": ("day;a;y\n31.01.2024;5,1;1\n01.02.2024;3,0;2\n02.02.2024;4;4\n", ["a"], [5.1], "of dates"),
    "months": ("day,a,y\n1 Mar 2024,5,1\n2 Mar 2024,3,2\n3 Mar 2024,4,4\n", ["a"], [5], "of dates"),
    "times": ("t,a,y\n10:30,5,1\n10:31,3,2\n10:32:05,4,4\n", ["a"], [5], "of dates or times"),
    "constant": ("a,g,y\n5,9.81,1\n3,9.81,2\n4,9.81,4\n", ["a"], [5], "left out: g, which is the same"),
    "empty column": ("a,b,y\n5,,1\n3,NA,2\n4,n/a,4\n", ["a"], [5], "left out: b, which is empty"),
    "mostly missing": ("a,b,y\n5,,1\n3,,2\n4,1,4\n1,2,5\n2,,6\n", ["a"], [5], "left out: b, missing in 3 of 5 rows"),
    "units below": ("a,b,y\nkg,m^3,-\n5,2,1\n3,1,2\n4,1,4\n", ["a", "b"], [5, 2], "line 2 is read as units: kg, m^3"),
    "percent": ("a,y\n5%,1\n3.5%,2\n4%,4\n", ["a"], [5], "5% is read as 5 with the unit %"),
    "units in cells": ("a,y\n5 kg,1\n3.5 kg,2\n,3\n4 kg,4\n", ["a"], [5], "with the unit kg"),
    "thousands": ('a,y\n"1,200",1.5\n"3,000,000",2\n"4,500",4\n', ["a"], [1200], "mark of thousands"),
    "thousands, blanks": ("a;y\n1 234,5;1\n3 000;2\n20;4\n", ["a"], [1234.5], "decimal mark"),
    "thousands, points": ("a;y\n1.234,5;1\n3.000;2\n20;4\n", ["a"], [1234.5], "decimal mark"),
    "thousands, no-break": ("a,y\n1\u202f234.5,1\n3\u00a0000,2\n20,4\n", ["a"], [1234.5], ""),
    "thousands, Swiss": ("a,y\n1'234.5,1\n3’000,2\n20,4\n", ["a"], [1234.5], ""),
    "minus": ("a,y\n−5,1\n–3.5,2\n-4,4\n", ["a"], [-5], ""),
    "latin-1": ("m_µg,y\n5,1\n3,2\n4,4\n".encode("cp1252"), ["m_µg"], [5], "read as cp1252"),
    "underscores": ("a,b,y\n5,1_0,1\n3,1_0,2\n4,2_0,4\n", ["a"], [5], "left out: b, of text as '1_0'"),
    "names as they are": (
        'x1,pi,lambda,cost_$,$\\frac{T}{T_0,T-T0,"a, b",Δm,y\n1,2,3,4,5,6,7,8,1\n2,1,5,2,3,1,2,9,2\n',
        ["x1", "pi", "lambda", "cost_$", "$\\frac{T}{T_0", "T-T0", "a, b", "Δm"], range(1, 9), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWWISE)
def test_what_is_left_out_is_said(kind, tmp_path):
    content, names, first, note = ROWWISE[kind]
    read = read_table(write(tmp_path, content))
    assert (read.names, read.target) == (names, "y")
    assert read.X.dtype == read.y.dtype == np.float64 and read.y[0] == 1 + 0.5 * (kind == "thousands")
    assert read.X[0].tolist() == list(first)
    assert any(note in line for line in read.notes) if note else read.notes == []


def test_a_currency_stands_before_numbers(tmp_path):
    text = 'a,b,y\n1,$5.10,€ 4\n2,$10.15,€ 3.5\n3,"$1,020.25",€2\n'
    table = read_table(write(tmp_path, text))
    assert table.X[:, 1].tolist() == [5.1, 10.15, 1020.25] and table.y.tolist() == [4, 3.5, 2]


@pytest.mark.parametrize("word", ["", "NA", "na", "NaN", "n/a", "null", "None", "-", "--", "?", "#N/A", "#DIV/0!", " "])
def test_rows_are_dropped_for_used_columns_only(word, tmp_path):
    path = write(tmp_path, f"a,b,note,y\n1,5,,2\n2,{word},,3\n3,6,,{word}\n4,8,,4\n5,1,x,5\n")
    read = read_table(path)
    assert read.X[:, 0].tolist() == [1, 4, 5]
    assert "left out: 2 of 5 rows, missing or infinite in b, y" in read.notes
    assert read_table(path, columns=["a"]).X[:, 0].tolist() == [1, 2, 4, 5]
    assert read_table(path, ignore=["b"]).X[:, 0].tolist() == [1, 2, 4, 5]
    assert read_table(write(tmp_path, "a,y\n1,inf\n2,3\n3,5\n")).y.tolist() == [3, 5]


REFUSED = {  # kind -> content, what the error says, what it advises
    "empty": ("", "rows below a header: 0; expected the names", "a table with more rows"),
    "blank": ("\n \n", "rows below a header: 0", ""),
    "header only": ("m,V,rho\n", "rows below a header: 0", ""),
    "one row": ("m,V,rho\n1,2,3\n", "rows below a header: 1", ""),
    "one column": ("rho\n1\n2\n3\n", "no column of numbers varies beside rho", "--target"),
    "constant x": ("m,V,y\n1,2,3\n1,2,4\n1,2,5\n", "left out: m, which is the same in all rows", "--target"),
    "text alone": ("name,formula\nohm,R*I\nkepler,a**1.5\n", "formula, of text as 'R*I'", "two columns of numbers"),
    "no header": (table(header=()), "the first line holds values", "(echo x1,x2,y; cat "),
    "no header, text": ("steel,1,2\nwood,3,4\nsteel,5,7\n", "the first line holds values", "echo x1,x2,y"),
    "no header, semicolons": (table(";", ()), "the first line holds values", "(echo 'x1;x2;y'; cat "),
    "no header, other text": ("steel,1,2\nwood,3,4\noak,5,7\n", "the first line holds values", "echo x1,x2,y"),
    "two names": ("m,m,rho\n1,2,3\n2,3,4\n", "several columns are named m: m, m, rho", "its own name"),
    "no name": ("m,,rho\n1,2.5,3\n2,3.5,4\n", "a column has no name", "first line"),
    "short row": ("m,V,rho\n1,2,3\n\n1,2\n2,3,4\n", "line 4 has 2 cells, the header 3: m, V, rho", "correct the line"),
    "long row": ("m,V,rho\n1,2,3\n2,3,4\n1,2,3,4\n", "line 4 has 4 cells, the header 3", "correct the line"),
    "commas twice": (table(cell=comma), "line 2 has 6 cells, the header 3", "semicolons"),
    "a word": ("a,y\n1,2\n2,3\n3,bad\n4,4\n", "line 4, column y: 'bad' is no number", "empty the cell"),
    "below the limit": ("a,y\n1,2\n<2,3\n3,5\n4,4\n", "line 3, column a: '<2' is no number", "empty the cell"),
    "a unit once": ("a,y\n1,2\n2,3\n3 kg,5\n4,4\n", "line 4, column a: '3 kg' is no number", ""),
    "two marks": ("a;y\n1,5;2\n2.25;3\n4;5\n", "the decimal mark can't be told from 1,5 and 2.25", "decimal point"),
    "either mark": ("a\ty\n1,500\t2\n2,250\t3\n4\t5\n", "decimals or thousands", "without separators"),
    "binary": (b"\x89PNG\r\n\x00\x01\x02\x00\x00\x00\x03", "found other bytes", "csv"),
    "torn gzip": (gzip.compress(WEIGH.encode())[:40], "end-of-stream", ""),
    "not Excel": (b"PK\x03\x04 nothing", "weigh.csv", "save the table as csv"),
    "a zip of arrays": (zip_of_arrays(), "expected a table as text, Excel or parquet", "save it as csv"),
    "json": ('[{"a": 1, "y": 2},\n {"a": 2, "y": 3}]', "found JSON", "lines=False).to_csv("),
    "json lines": ('{"a": 1, "y": 2}\n{"a": 2, "y": 3}', "found JSON", "lines=True).to_csv("),
    "a sum below": ("a,b,y\n1,2,3\n2,3,5\nTotal,5,8\n", "line 4, column a: 'Total'", "delete line 4, if it sums up"),
    "gaps": ("a,y\n1,\n,2\n3,4\n", "complete rows of numbers: 1", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_are_refused_say_what_to_do(kind, tmp_path):
    content, message, remedy = REFUSED[kind]
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert remedy in re.split("\n(?:try|fix): ", str(error.value))[1]


def test_a_table_comes_through_standard_input(tmp_path, monkeypatch):
    content = gzip.compress(b"a,b\n1,2\n2,4\n3,7\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    read = read_table("-")
    assert read.X[:, 0].tolist() == [1, 2, 3] and read.y.tolist() == [2, 4, 7]


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, WEIGH)
    with pytest.raises(DataError, match=r"No such file(.|\n)*try: --data .*weigh.csv"):
        read_table(tmp_path / "wiegh.csv")


@pytest.mark.parametrize("flags, expected", [
    (dict(target="roh"), "--target roh: the columns of .* are m, V, rho, kind\ntry: --target rho"),
    (dict(columns=["M"]), "--columns M: .*\ntry: --columns m"),
    (dict(ignore=["W"]), "--ignore W: .*\ntry: --ignore V"),
    (dict(sigma="err"), "--sigma err: .*\ntry: --sigma rho"),
    (dict(target="kind"), "--target kind: expected a column of numbers, found one of text as 'a'\ntry: --target rho"),
    (dict(columns=["kind"]), "--columns kind: expected a column of numbers"),
    (dict(target="m", columns=["m"]), "column m is named twice"),
    (dict(target="m", ignore=["m"]), "column m is named twice"),
])  # fmt: skip
def test_flags_that_no_column_fits(flags, expected, tmp_path):
    path = write(tmp_path, "m,V,rho,kind\n1,2,3,a\n2,3,4,b\n3,1,5,a\n")
    with pytest.raises(UsageError, match=f"(?s){expected}"):
        read_table(path, **flags)


def test_flags_choose_columns(tmp_path):
    path = write(tmp_path, "index,m,V [m^3],rho\n0,2,3,4\n1,5,1,2\n2,1,1,7\n")
    read = read_table(path, target="m", columns=["V", "rho", "V"])
    assert (read.names, read.target, read.units) == (["V [m^3]", "rho"], "m", {"V [m^3]": "m^3"})
    assert read_table(path, columns=["rho"]).target == "V [m^3]"
    assert read_table(path, ignore=["rho", "index"]).names == ["m"]
    path = write(tmp_path, ",t,y\n0,0.3,1\n1,0.1,3\n2,0.2,5\n")  # y follows the index
    assert read_table(path, columns=["index", "t"]).X[:, 0].tolist() == [0, 1, 2]


UNCERTAINTIES = ["yerr", "y_err", "y_error", "err_y", "sigma_y", "sigma", "Error", "±", "u(y)", "y_std", "y std dev"]
UNCERTAINTIES += ["dy", "y unc [V]", "uncertainty", "σ_y", "+/-", "SEM"]


@pytest.mark.parametrize("name", UNCERTAINTIES)
def test_an_uncertainty_is_not_used_silently(name, tmp_path):
    path = write(tmp_path, f"a,b,y,{name}\n1,5,2,0.1\n2,3,4,0.2\n3,4,6,0.1\n4,3,6,\n")
    read = read_table(path)
    assert (read.names, read.target, read.sigma, len(read.y)) == (["a", "b"], "y", None, 4)
    assert any("left out: " + name in note and "try: --sigma " in note for note in read.notes)
    read = read_table(path, sigma=name)
    assert read.sigma.tolist() == [0.1, 0.2, 0.1] and read.names == ["a", "b"] and len(read.y) == 3
    assert read_table(path, columns=["a", name]).names == ["a", name]


def test_what_is_no_uncertainty_is_used(tmp_path):
    assert read_table(write(tmp_path, "epsilon,sigma\n1,2\n2,4\n3,7\n")).target == "sigma"
    assert read_table(write(tmp_path, "T,dT,Q\n1,2,3\n2,1,5\n3,4,4\n")).names == ["T", "dT"]
    assert read_table(write(tmp_path, "error,t,y\n-1,2,3\n2,1,5\n3,4,4\n")).names == ["error", "t"]
    with pytest.raises(DataError, match="line 3, column s: an uncertainty is above 0"):
        read_table(write(tmp_path, "a,y,s\n1,2,1\n2,1,0\n3,4,1\n"), sigma="s")


def test_many_columns_stay(tmp_path):
    numbers = np.arange(31) ** 2 % 11 * np.arange(1, 9)[:, None] + 1
    names = [f"f{j}" for j in range(1, 31)]
    rows = [",".join(map(str, row)) for row in [["y", *names], *numbers.tolist()]]
    read = read_table(write(tmp_path, "\n".join(rows)), target="f1")
    assert read.names == [name for name, column in zip(names, numbers.T[1:], strict=True) if np.ptp(column)][1:]


def test_units_are_kept_for_labels(tmp_path):
    read = read_table(write(tmp_path, '"Mass (kg)","Volume [m^3]","T / K","Density, kg/m3"\n1,2,3,4\n2,1,5,6\n'))
    assert list(read.units.values()) == ["kg", "m^3", "K", "kg/m3"] and read.target == "Density, kg/m3"
    read = read_table(write(tmp_path, "mass (kg)  T (K)\n1.5        2.5\n3          4\n"))
    assert read.units == {"mass (kg)": "kg", "T (K)": "K"}
    read = read_table(write(tmp_path, "t,y\n(s),[m]\n1,2\n2,4\n"))
    assert read.units == dict(t="s", y="m")


def test_digits_are_those_of_the_file(tmp_path):
    read = read_table(write(tmp_path, "a,b,y\n1200,1.5e-3,0.25\n2000,2.5e-3,1.50\n15,1e-3,3.25\n"))
    np.testing.assert_allclose(read.digits_X, [[0.5, 0.5e-4]] * 3)
    np.testing.assert_allclose(read.digits_y, [0.5e-2] * 3)
    read = read_table(write(tmp_path, "a,y\n1,0.103508\n2,1.1604\n3,0.0739109\n4,12.3456\n"))  # %g drops zeros
    np.testing.assert_allclose(read.digits_y, [0.5e-6, 0.5e-5, 0.5e-7, 0.5e-4])
    read = read_table(write(tmp_path, "a;y\n1;1.234,50\n2;0,25\n3;7,00\n"))
    np.testing.assert_allclose(read.digits_y, [0.5e-2] * 3)


def test_excel_and_parquet(tmp_path):
    frame = pd.DataFrame(dict(m=M, V=V, kind=["a", None] * 3, rho=RHO))
    frame.to_parquet(tmp_path / "weigh.parquet")
    paths = [tmp_path / "weigh.parquet"]
    try:
        frame.to_excel(tmp_path / "weigh.xlsx")
        paths.append(tmp_path / "weigh.xlsx")
    except ImportError:  # openpyxl is optional
        (tmp_path / "weigh.xlsx").write_bytes(b"PK\x03\x04")
    for path in paths:
        read = read_table(path)
        assert read.names == ["m", "V"] and (read.y == RHO).all() and (read.X[:, 0] == M).all()
        assert not read.digits_y.any() and not read.digits_X.any()
        assert "left out: kind, of text as 'a'" in read.notes


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Missing optional dependency 'openpyxl'.  Use pip or conda to install openpyxl.")

    monkeypatch.setattr(pd, "read_excel", missing)
    with pytest.raises(DataError, match="openpyxl is missing.*\ntry: pip install openpyxl"):
        read_table(write(tmp_path, b"PK\x03\x04", "weigh.xlsx"))


def test_arrays_and_frames():
    table = from_arrays([[1, 2], [3, 4]], [5, 6])
    assert (table.names, table.target, table.notes, table.units) == (["x1", "x2"], "y", [], {})
    assert table.X.dtype == np.float64 and table.digits_X.shape == (2, 2) and not table.digits_y.any()
    frame = pd.DataFrame(dict(m=M, V=V, rho=RHO))
    table = from_arrays(frame[["m", "V"]], frame.rho)
    assert (table.names, table.target) == (["m", "V"], "rho")
    assert from_arrays(M, RHO, names=["mass"]).X.shape == (6, 1)


def test_a_large_table_takes_about_a_second(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(100_000, 6)).round(5)
    text = io.StringIO()
    pd.DataFrame(numbers, columns=list("abcdey")).to_csv(text, index=False)
    path = write(tmp_path, text.getvalue())
    start = time.process_time()
    read = read_table(path)
    assert time.process_time() - start < 5  # about 1 on an idle core
    assert (read.X == numbers[:, :5]).all() and (read.y == numbers[:, 5]).all()


REFUSALS = dict(
    dup_header="several columns are named m",
    empty="below a header: 0",
    events="below a header: 1",
    header_only="below a header: 0",
    my_formulas="no column of numbers",
    my_formulas2="no column of numbers",
    no_header="first line",
    one_column="beside rho",
    one_row="below a header: 1",
    ragged="line 7",
    x_const="beside rho",
)


@pytest.mark.skipif(not (SHARED / "cases/formulas").is_dir(), reason="inputs that only developers have")
def test_cases_are_read_or_refused():
    for path in sorted((SHARED / "cases/formulas").iterdir()):
        refusal = REFUSALS.get(path.name.split(".")[0])
        if refusal:
            with pytest.raises(DataError, match=f"{refusal}(.|\n)*\n(try|fix): "):
                read_table(path)
            continue
        read = read_table(path)
        assert np.isfinite(read.X).all() and np.isfinite(read.y).all() and len(read.X) == len(read.y) > 1, path
        dropped = sum(int(note.split()[2]) for note in read.notes if re.match(r"left out: \d+ of", note))
        assert dropped == 2 * path.name.startswith("missing_"), path
        assert not {"", "index", "yerr", "rho_err"} & set(read.names), path


@pytest.mark.parametrize("name", ["B_err", "B_unc", "err_B", "B_uT_err", "Fehler"])
def test_an_uncertainty_may_leave_out_the_unit_of_its_column(name, tmp_path):
    rows = [f"r_cm,B_uT,{name}", *(f"{r},{100 / r:.2f},0.1" for r in range(1, 9))]
    table_of = read_table(write(tmp_path, "\n".join(rows) + "\n"))
    assert table_of.names == ["r_cm"] and table_of.target == "B_uT"


def test_the_sheet_with_the_numbers_is_read(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "lab.xlsx"
    with pd.ExcelWriter(path) as book:
        pd.DataFrame([["measured by", "A. B."], ["on", "a Monday"]]).to_excel(book, sheet_name="Info", index=False)
        pd.DataFrame(dict(m=M, V=V, rho=RHO)).to_excel(book, sheet_name="Data", index=False)
    read = read_table(path)
    assert read.names == ["m", "V"] and (read.y == RHO).all()
    assert "sheet Data is read, one of Info, Data" in "\n".join(read.notes)


def test_marks_of_missing_values_are_pointed_out(tmp_path):
    rows = ["k,y", *(f"{k},{-999 if k in (3, 7) else 4 * k * k}" for k in range(1, 12)), "999,990"]
    notes = "\n".join(read_table(write(tmp_path, "\n".join(rows) + "\n")).notes)
    assert "y: -999 in 2 rows, far from the others" in notes and "k: 999 in 1 rows" in notes
    rows = ["k,y", *(f"{k},{k / 10}" for k in range(900, 1100, 9))]
    assert "far from" not in "\n".join(read_table(write(tmp_path, "\n".join(rows) + "\n")).notes)


def test_a_table_of_times_says_how_to_write_them(tmp_path):
    rows = ["when,T", *(f"2024-05-01 10:0{i}:00,{20 + i}" for i in range(8))]
    with pytest.raises(DataError, match="fix: when as numbers, such as seconds since the first row"):
        read_table(write(tmp_path, "\n".join(rows) + "\n"))
