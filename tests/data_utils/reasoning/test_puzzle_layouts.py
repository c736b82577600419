"""Published Sudokus and mazes in tables and texts of every layout."""

import gzip
import json
import math

import pytest

from data_utils.errors import DataError
from data_utils.reasoning.puzzle_layouts import Problems, read_puzzles
from tests.helpers import SHARED

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
ROWS = [PUZZLE[i : i + 9] for i in range(0, 81, 9)]
PIPES = [f"|{row[:3]}|{row[3:6]}|{row[6:]}|" for row in ROWS]
BORDER = "+---+---+---+"
MAZE = ["#####", "#S  #", "### #", "#G  #", "#####"]


def read(tmp_path, text, name="puzzles.txt", problems=None):
    """(layout, [(line, question, answer, rating)]) of a file with this text."""
    path = tmp_path / name
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    layout, parts = read_puzzles(path, Problems() if problems is None else problems)
    rows = [row for p in parts for row in zip(p.lines, p.questions, p.answers, p.ratings, strict=True)]
    return layout, rows


TABLES = {
    "sudoku-extreme": f"source,question,answer,rating\nx,{PUZZLE},{SOLUTION},7\n",
    "kaggle": f"quizzes,solutions\n{PUZZLE.replace('.', '0')},{SOLUTION}\n",
    "kaggle 4m": f"puzzle,solution\n{PUZZLE},{SOLUTION}\n",
    "semicolons, capitals, mark": f"\ufeffPuzzle;Solution;Difficulty\n{PUZZLE};{SOLUTION};2.5\n",
    "windows": f"id,puzzle,solution\r\n1,{PUZZLE},{SOLUTION}\r\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tmp_path):
    for file in ("train.csv", "train.csv.gz"):
        layout, [(line, question, answer, rating)] = read(tmp_path, TABLES[name], file)
        assert layout.startswith("table of ") and line == 2 and question.replace("0", ".") == PUZZLE
        assert answer == SOLUTION and (rating in (7, 2.5)) == ("ating" in name or rating == rating)


def test_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lists = [[int(sign) for sign in row.replace(".", "0")] for row in ROWS]
    rows = [dict(Puzzle=PUZZLE, solution=SOLUTION, rating=7), dict(Puzzle=lists, solution=[*SOLUTION], rating=None)]
    problems = Problems()
    text = "\n".join([json.dumps(rows[0]), "{", json.dumps(rows[1])])
    layout, expected = read(tmp_path, text, "a.jsonl", problems)
    assert layout == "records of puzzle, solution, rating" and [row[0] for row in expected] == [1, 3]
    assert [row[1].replace("0", ".") for row in expected] == [PUZZLE] * 2
    assert [row[2] for row in expected] == [SOLUTION] * 2
    assert expected[0][3] == 7 and math.isnan(expected[1][3]) and f"{tmp_path}/a.jsonl:2" in problems.lines()[0]
    assert read(tmp_path, json.dumps([rows[0]]), "b.jsonl")[1] == expected[:1]
    for i, row in enumerate(rows):
        path = tmp_path / f"{i}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        _, parts = read_puzzles(path, Problems())
        assert [(t.questions, t.answers) for t in parts] == [([expected[i][1]], [SOLUTION])]
    with pytest.raises(DataError, match="no puzzles among text"):
        read(tmp_path, '{"text": "x"}\n', "c.jsonl")
    with pytest.raises(DataError, match="no puzzles among nothing"):
        read(tmp_path, "", "d.jsonl")


GRIDS = {
    "a line": PUZZLE,
    "zeros": PUZZLE.replace(".", "0"),
    "dashes": PUZZLE.replace(".", "-"),
    "underscores": PUZZLE.replace(".", "_"),
    "stars": PUZZLE.replace(".", "*"),
    "nine lines": "\n".join(ROWS),
    "title": "Grid 01\n" + "\n".join(ROWS),
    "empty lines between": "\n\n".join(ROWS),
    "boxes": "\n".join([BORDER, *PIPES[:3], BORDER, *PIPES[3:6], BORDER, *PIPES[6:], BORDER]),
    "thin boxes": "\n".join([*(p[1:-1] for p in PIPES[:3]), "---+---+---", *PIPES[3:6], "===+===+===", *PIPES[6:]]),
    "wide": "\n".join(" ".join(row[:3] + "|" + row[3:6] + "|" + row[6:]) for row in ROWS),
    "commas": "\n".join(",".join(row) for row in ROWS),
    "empty values": "\n".join(",".join(row).replace(".", "") for row in ROWS),
    "spaces are blanks": "\n".join(row.replace(".", " ") for row in ROWS),
    "spaces cut off": "\n".join(row.replace(".", " ").rstrip() for row in ROWS),
    "dashes in lines": "\n".join(row.replace(".", "-") for row in ROWS),
    "tabs": "\n".join("\t".join(row) for row in ROWS),
    "windows": "\r\n".join(ROWS) + "\r\n",
    "json": str([[int(sign) for sign in row.replace(".", "0")] for row in ROWS]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_texts_of_one_puzzle(name, tmp_path):
    problems = Problems()
    _, [(_, question, answer, _)] = read(tmp_path, GRIDS[name], problems=problems)
    for blank in "0-_*":
        question = question.replace(blank, ".")
    assert question == PUZZLE and not answer and not problems.count


def test_several_puzzles_in_a_text(tmp_path):
    text = f"{PUZZLE}\n\n{PUZZLE},{SOLUTION}\n{PUZZLE} {SOLUTION}\n"
    _, rows = read(tmp_path, text)
    assert [row[0] for row in rows] == [1, 3, 4] and [row[2] for row in rows] == ["", SOLUTION, SOLUTION]
    bank = f"# of a bank\n0000183b305c {PUZZLE} 1.2\n0123456789abcdef {PUZZLE}  {SOLUTION} 7\n"
    assert read(tmp_path, bank)[1] == [(2, PUZZLE, "", 1.2), (3, PUZZLE, SOLUTION, 7.0)]
    layout, rows = read(tmp_path, "Grid 01\n" + "\n".join(ROWS) + "\nGrid 02\n" + "\n".join(ROWS))
    assert layout == "Sudokus over several lines; 2 lines of other text" and [row[0] for row in rows] == [2, 12]
    assert [row[1] for row in rows] == [PUZZLE] * 2


def test_a_wrong_line_is_named_and_costs_no_other(tmp_path):
    problems = Problems()
    text = "\n".join([PUZZLE, PUZZLE + ".", *ROWS[:4], "53..7...", PUZZLE, *ROWS, "..."])
    _, rows = read(tmp_path, text, problems=problems)
    assert [row[0] for row in rows] == [1, 8, 9]
    (report,) = problems.lines()
    assert report.startswith("3 that are no puzzle") and f"{tmp_path}/puzzles.txt:2: 82 signs" in report
    problems = Problems()
    table = f"puzzle,solution\n{PUZZLE},{SOLUTION}\n{PUZZLE},{SOLUTION},more\n\n,\n{PUZZLE},{SOLUTION}\n{PUZZLE}\n"
    _, rows = read(tmp_path, table, "a.csv", problems)
    assert [row[0] for row in rows] == [2, 6, 7] and rows[2][2] == ""
    assert problems.lines() == [f"1 with more values than the 2 columns: {tmp_path}/a.csv:3"]


def test_mazes(tmp_path):
    flat = "".join(MAZE)
    assert read(tmp_path, f"{flat}\n{flat}\n") == ("a maze per line", read(tmp_path, f"{flat}\n{flat}")[1])
    layout, rows = read(tmp_path, "\n".join([*MAZE, "", *MAZE]) + "\n")
    assert layout == "mazes over several lines" and [row[:2] for row in rows] == [
        (1, "\n".join(MAZE)),
        (7, "\n".join(MAZE)),
    ]
    layout, [row] = read(tmp_path, f"question,answer\n{flat},{flat.replace('  #', 'oo#')}\n")
    assert row[1] == flat and "oo" in row[2]


def test_another_encoding_is_refused(tmp_path):
    for text in (PUZZLE.encode("utf-16"), "puzzle,solution\n\xe9,\n".encode("latin-1")):
        with pytest.raises(DataError, match="UTF"):
            read(tmp_path, text)


@pytest.mark.skipif(not SHARED.is_dir(), reason="cases of developers")
def test_cases():
    few = {"short", "long", "empty", "arabic", "fullwidth", "superscript", "nul"}
    for path in sorted((SHARED / "cases" / "pictures" / "sudoku").iterdir()):
        try:
            problems = Problems()
            _, parts = read_puzzles(path, problems)
            count = sum(len(texts.lines) for texts in parts)
        except DataError:
            count = 0
        assert count == (2 if path.name == "two" else 1) or path.name in few, path
