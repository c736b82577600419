"""prepare_data.py puzzles: checks of rows, splits, disguises, choice of rows, files."""

import json

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.reasoning import maze, sudoku
from data_utils.reasoning.dataset import open_dataset
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import Form, read_source
from data_utils.reasoning.puzzles import parse_rating
from tests.data_utils.reasoning.test_maze import random_maze
from tests.data_utils.reasoning.test_sudoku import naive_solutions


def prepare(source, out, **more):
    options = dict(source=str(source), out=str(out), num_threads=1) | more
    prepare_data.main(prepare_data.PuzzlesConfig(**options))
    return {split: np.load(out / f"{split}.npy") for split in ("train", "val")}


def table(path, pairs, ratings=None):
    """Write pairs (question, answer) of cells as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join("".join(map(str, cells)) for cells in pair) for pair in pairs]
    ratings = [0] * len(rows) if ratings is None else ratings
    lines = [f"{row},{rating}" for row, rating in zip(rows, ratings, strict=True)]
    path.write_text("\n".join(["question,answer,rating", *lines]) + "\n")
    return path


def puzzles(n, size=9, seed=0, givens=0):
    questions, answers = sudoku.sudoku(size=size, givens=givens or {4: 6, 6: 14, 9: 40}[size], n=n, seed=seed)
    return list(zip(questions, answers, strict=True))


def test_published_splits_stay_and_the_trainer_reads_them(tmp_path, capsys):
    train, test = puzzles(6), puzzles(4, seed=1)
    table(tmp_path / "data" / "train.csv", train, range(6))
    table(tmp_path / "data" / "test.csv", test, range(4))
    (tmp_path / "data" / "README.md").write_text("# sudoku")
    splits = prepare(tmp_path / "data", tmp_path / "out")
    assert (splits["train"] == np.array(train)).all() and (splits["val"] == np.array(test)).all()
    assert np.load(tmp_path / "out" / "val_ratings.npy").tolist() == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert "table of question, answer, rating" in out and "6 train, 4 val, 0 left out" in out
    assert f"python train_hrm.py --dataset {tmp_path}/out --run_name out" in out
    data = open_dataset(str(tmp_path / "out"), max_seq_len=81, data_seed=0, reveal=0.1, say=print)
    batch = data.batch("val", np.arange(4))
    assert (batch["encoder_ids"].numpy() == [pair[0] for pair in test]).all() and data.meta["vocab_size"] == 10
    assert (data.batch("train", np.arange(4), 0)["labels"] > 0).all()


def test_the_example_of_a_maze_is_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_text("#####\n#S G#\n#####\n\n" * 2)
    prepare(tmp_path / "a.txt", tmp_path / "out", val_ratio=0)
    prompt = open_dataset(str(tmp_path / "out"), max_seq_len=15, data_seed=0, reveal=0, say=print).example()
    assert prompt == "######S G######" and Form("maze", 3, 5).parse(prompt).tolist().count(1) == 12


def test_texts_beside_the_data_are_no_puzzles(tmp_path):
    table(tmp_path / "data" / "b.csv", puzzles(3))
    (tmp_path / "data" / "README.txt").write_text("three puzzles\n")
    (tmp_path / "data" / "LICENSE.txt").write_text("MIT\n")
    assert len(prepare(tmp_path / "data", tmp_path / "out", val_ratio=0)["train"]) == 3
    table(tmp_path / "data" / "train-00000-of-00002.csv", puzzles(2))
    table(tmp_path / "data" / "train-00001-of-00002.csv", puzzles(2, seed=1))
    table(tmp_path / "data" / "validation-00000-of-00001.csv", puzzles(1, seed=2))
    splits = prepare(tmp_path / "data", tmp_path / "named")
    assert [len(splits[name]) for name in ("train", "val")] == [4, 1]
    arc = tmp_path / "arc"
    arc.mkdir()
    (arc / "LICENSE.txt").write_text("Apache\n")
    grid = dict(input=[[1, 2], [3, 4]], output=[[0]])
    (arc / "a.json").write_text(json.dumps(dict(train=[grid], test=[dict(input=[[5]], output=[[6]])])))
    assert read_source(arc, Problems())[0] == "ARC tasks, a file each"


def test_wrong_rows_are_named_and_cost_no_other(tmp_path, capsys):
    pairs = puzzles(8, size=4, givens=5)
    good = [pairs[i] for i in (0, 7)]
    lines = ["puzzle,solution"]
    lines += [",".join("".join(map(str, cells)) for cells in pair) for pair in pairs]
    question, answer = lines[1].split(",")
    first = next(i for i, sign in enumerate(question) if sign != "0")
    other = "1234".replace(question[first], "")[0]
    same_row = [i for i in range(first // 4 * 4, first // 4 * 4 + 4) if i != first]
    twice = question[: same_row[0]] + question[first] + question[same_row[0] + 1 :]
    lines[2] = f"{question[:-1]},{answer}"  # another size
    lines[3] = f"{question[:-1]}?,{answer}"  # another sign
    lines[4] = f"{twice},{answer}"
    lines[5] = f"{question},{answer[:first]}{other}{answer[first + 1 :]}"
    swapped = answer.translate(str.maketrans("12", "21"))
    lines[6] = f"{'0' * 16},{swapped[:-1]}{answer[0]}"
    lines[7] = f"{'0' * 16},{answer}"
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    splits = prepare(tmp_path / "a.csv", tmp_path / "out", val_ratio=0)
    assert (splits["train"] == np.array(good)).all()
    out, err = capsys.readouterr()
    assert "2 train, 0 val, 6 left out" in out
    for line, words in enumerate(
        "another size|another sign|contradictory|belong|breaks the rules|several".split("|"), 3
    ):
        (report,) = [text for text in err.splitlines() if words in text]
        assert report.startswith("warning: left out: 1 ") and f"a.csv:{line}" in report, report
    assert "15 signs, expected 16" in err and "'?' in row 4, column 4" in err
    assert sum(json.loads((tmp_path / "out" / "meta.json").read_text())["counts"].values()) == 6


def test_puzzles_without_answers_are_solved_when_they_have_one(tmp_path, capsys):
    pairs = puzzles(5, size=6)
    rng = np.random.default_rng(0)
    texts = ["".join(map(str, pair[0])) for pair in pairs]
    unsolvable = next(
        text
        for cell in rng.permutation(36).tolist()
        for digit in "123456"
        if (text := texts[0][:cell] + digit + texts[0][cell + 1 :]) != texts[0]
        and texts[0][cell] == "0"
        and not sudoku.repeats(np.array([[int(sign) for sign in text]], np.uint8), 6)[0]
        and not naive_solutions([int(sign) for sign in text], 6)
    )
    (tmp_path / "a.txt").write_text("\n".join([*texts, unsolvable, "." * 36]))
    splits = prepare(tmp_path / "a.txt", tmp_path / "out", val_ratio=0)
    assert (splits["train"] == np.array(pairs)).all()
    err = capsys.readouterr().err
    assert "1 without a solution" in err and "a.txt:6" in err and "1 with several solutions" in err and "a.txt:7" in err


@pytest.mark.parametrize("size", [4, 6, 9])
def test_the_solver_counts_as_a_naive_search_does(size):
    for question, answer in puzzles(4, size=size):
        assert sudoku.solve(question, size)[0] == 1 and (sudoku.solve(question, size)[1] == answer).all()
        fewer = question.copy()
        fewer[np.flatnonzero(question)[: size // 2]] = 0
        count = len(naive_solutions(fewer.tolist(), size)) if size < 9 else sudoku.solve(fewer, size)[0]
        assert sudoku.solve(fewer, size)[0] == min(2, count)
    assert sudoku.solve(np.zeros(size * size, np.uint8), size, most=2) == (None, None)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_disguises_of_a_grid(size):
    rng = np.random.default_rng(0)
    (question, answer), *others = puzzles(5, size=size)
    names = np.concatenate([[0], rng.permutation(size) + 1]).astype(np.uint8)
    turns = range(4) if size != 6 else (0, 2)
    versions = []
    for cells in (question, answer):
        square = names[cells].reshape(size, size)
        versions.append([f(np.rot90(square, turn)).reshape(-1) for turn in turns for f in (np.array, np.fliplr)])
    for kind, cells in zip(versions, (question, answer), strict=True):
        assert len(set(sudoku.disguises(np.stack([cells, *kind]), size).tolist())) == 1
    questions = np.stack([question, *(pair[0] for pair in others)])
    assert len(set(sudoku.disguises(questions, size).tolist())) == 5
    if size > 4:
        form = Form("sudoku", size, size)
        assert (form.disguises(questions[:1], answer[None]) == sudoku.disguises(answer[None], size)).all()


def test_held_out_puzzles_in_the_training_set_are_reported(tmp_path, capsys):
    train, test = puzzles(5), puzzles(3, seed=1)
    names = np.array([0, 3, 1, 2, 9, 8, 7, 6, 5, 4], np.uint8)
    hidden = [np.rot90(names[cells].reshape(9, 9)).reshape(-1) for cells in test[1]]
    table(tmp_path / "data" / "train.csv", [*train[:2], hidden, train[0], *train[2:]])
    table(tmp_path / "data" / "test.csv", test)
    assert len(prepare(tmp_path / "data", tmp_path / "kept")["train"]) == 7
    err = capsys.readouterr().err
    assert "1 training puzzles are held-out ones" in err and "train.csv:4: kept as published" in err
    assert "train: 1 puzzles stand there more than once" in err
    splits = prepare(tmp_path / "data", tmp_path / "out", drop_disguises=True)
    assert (splits["train"] == np.array([*train[:2], train[0], *train[2:]])).all() and len(splits["val"]) == 3


def test_a_file_without_splits_is_split_by_what_does_not_change_in_disguise(tmp_path):
    pairs = puzzles(60, size=6)
    names = np.array([0, 3, 1, 2, 6, 5, 4], np.uint8)
    both = [*pairs, *([names[cells] for cells in pair] for pair in pairs)]
    splits = prepare(table(tmp_path / "a.csv", both), tmp_path / "out", val_ratio=0.3)
    assert len(splits["train"]) + len(splits["val"]) == 120 and 10 < len(splits["val"]) < 70
    labels = [set(sudoku.disguises(rows[:, 1], 6).tolist()) for rows in splits.values()]
    assert not labels[0] & labels[1]
    again = prepare(tmp_path / "a.csv", tmp_path / "again", val_ratio=0.3)
    assert all((again[split] == splits[split]).all() for split in splits)


def test_limit_and_rating_choose_rows(tmp_path):
    pairs = puzzles(20, size=4)
    source = table(tmp_path / "data" / "train.csv", pairs, range(20)).parent
    table(tmp_path / "data" / "test.csv", puzzles(9, size=4, seed=1), range(9))
    splits = prepare(source, tmp_path / "a", rating="5:7")
    assert (splits["train"] == np.array(pairs[5:8])).all() and len(splits["val"]) == 3
    splits = prepare(source, tmp_path / "b", rating="12:", limit=4)
    assert len(splits["train"]) == 4 and len(splits["val"]) == 0
    places = [next(i for i, pair in enumerate(pairs) if (pair == row).all()) for row in splits["train"]]
    assert places == sorted(places) and places[0] >= 12 and len(set(places)) == 4
    assert parse_rating(":3") == (-np.inf, 3) and parse_rating("3") == (3, 3)
    for more, words in (
        (dict(rating="x:"), "range"),
        (dict(rating="99:"), "no puzzle is left"),
        (dict(limit=-1), "limit"),
    ):
        with pytest.raises((UsageError, DataError), match=words):
            prepare(source, tmp_path / "c", **more)
    (tmp_path / "d.txt").write_text("".join(map(str, pairs[0][0])))
    with pytest.raises(UsageError, match="no ratings"):
        prepare(tmp_path / "d.txt", tmp_path / "d", rating="3:")


def test_mazes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows, cols = 5, 8
    grids, blocked = [], None
    while len(grids) < 12 or blocked is None:
        grid = random_maze(rng, rows, cols)
        if maze.solve(grid, cols) is None:
            blocked = grid
        else:
            grids.append(grid)
    two_starts = grids[0].copy()
    two_starts[np.flatnonzero(grids[0] == maze.OPEN)[0]] = maze.START
    form = Form("maze", rows, cols)
    texts = [form.show(grid) for grid in (*grids, blocked, two_starts)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n")
    splits = prepare(tmp_path / "a.txt", tmp_path / "out", val_ratio=0.4)
    every = np.concatenate(list(splits.values()))
    assert len(every) == len(grids) and all(maze.verdict(*pair, cols)[1] == "shortest path" for pair in every)
    out, err = capsys.readouterr()
    assert "train_hrm.py --dataset" in out and " --max_seq_len 40 --run_name" in out
    assert "1 without a way from S to G" in err and "1 no maze: " in err and "2 S, expected 1" in err
    data = open_dataset(str(tmp_path / "out"), max_seq_len=40, data_seed=0, reveal=0.1, say=print)
    batch = data.batch("train", np.arange(4), 0)
    for question, answer in zip(batch["encoder_ids"].numpy(), batch["labels"].numpy(), strict=True):
        assert maze.fault(question.astype(np.uint8), answer.astype(np.uint8), cols) == ""
    with pytest.raises(UsageError, match="--max_seq_len 40"):
        open_dataset(str(tmp_path / "out"), max_seq_len=900, data_seed=0, reveal=0.1, say=print)


def test_an_answer_of_another_maze_is_left_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    grids = [grid for _ in range(60) if maze.solve(grid := random_maze(rng, 5, 5), 5) is not None][:4]
    answers = [maze.solve(grid, 5) for grid in grids]
    text = ["".join(maze.SIGNS[cell] for cell in cells) for cells in (*grids, *answers)]
    rows = [f"{text[0]},{text[4]}", f"{text[1]},{text[6]}", f"{text[2]},{text[6]}", f"{text[3]},{text[3]}"]
    (tmp_path / "a.csv").write_text("\n".join(["question,answer", *rows]) + "\n")
    short = (answers[3] == maze.PATH).sum() == 0
    assert len(prepare(tmp_path / "a.csv", tmp_path / "out", val_ratio=0)["train"]) == 2 + short
    assert "whose answer does not belong to it" in capsys.readouterr().err


def test_our_own_folders_are_read_and_files_of_others_stay(tmp_path):
    folder = tmp_path / "made"
    prepare_data.main(prepare_data.SudokuConfig(out=str(folder), size=4, givens=6, train=12, val=6, num_threads=1))
    splits = prepare(folder, tmp_path / "copy")
    assert all((splits[split] == np.load(folder / f"{split}.npy")).all() for split in splits)
    with pytest.raises(UsageError, match="is complete"):
        prepare(folder, tmp_path / "copy")
    prepare(folder, tmp_path / "copy", fresh=True)
    assert not list((tmp_path / "copy").glob("*.bak"))
    options = dict(source=str(folder), out=str(tmp_path / "trm"), format="trm", fresh=True)
    for _ in range(2):
        prepare_data.main(prepare_data.PuzzlesConfig(**options))
    assert not list((tmp_path / "trm").rglob("*.bak"))
    mine = tmp_path / "mine"
    (mine / "train").mkdir(parents=True)
    (mine / "train" / "dataset.json").write_text("{}")
    with pytest.raises(UsageError, match="not written by prepare_data.py"):
        prepare(folder, mine, format="trm")
    with pytest.raises(UsageError, match="overlap"):
        prepare(folder, folder / "inside")


@pytest.mark.parametrize(
    "source, words",
    [("", "no such file"), ("none.csv", "no such file"), ("empty", "no ARC task"), ("text.txt", "neither Sudokus nor")],
)
def test_a_source_without_puzzles(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello\nworld\n")
    with pytest.raises((UsageError, DataError), match=words):
        prepare(source, tmp_path / "out")
