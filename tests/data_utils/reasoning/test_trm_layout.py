"""The training layout of HRM and TRM, against the arithmetic of their builders, both ways."""

import json

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.reasoning import maze, trm_layout
from data_utils.reasoning.arc_tasks import ArcTask
from data_utils.reasoning.dataset import open_dataset
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import read_source
from data_utils.reasoning.sudoku import sudoku
from tests.data_utils.reasoning.test_maze import random_maze

ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


def prepare(source, out, **more):
    prepare_data.main(prepare_data.PuzzlesConfig(source=str(source), out=str(out), num_threads=1, **more))
    return out


def put_table(path, questions, answers, signs):
    lines = ["source,question,answer,rating"]
    for i, pair in enumerate(zip(questions, answers, strict=True)):
        lines.append(",".join(["made up", *("".join(signs[cell] for cell in cells) for cells in pair), str(i)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def arrays_of(folder):
    arrays = {name: np.load(folder / f"all__{name}.npy", allow_pickle=False) for name in ARRAYS}
    return arrays, json.loads((folder / "dataset.json").read_text())


def naive_build(pairs, vocab_size):
    """The arrays and dataset.json of their builders for puzzles of one example each, one loop per line of theirs."""
    results = {name: [] for name in ARRAYS}
    results["puzzle_indices"].append(0)
    results["group_indices"].append(0)
    for number, (tokens, labels) in enumerate(pairs, 1):
        results["inputs"].append(tokens)
        results["labels"].append(labels)
        results["puzzle_identifiers"].append(0)
        results["puzzle_indices"].append(number)
        results["group_indices"].append(number)
    meta = dict(pad_id=0, ignore_label_id=0, blank_identifier_id=0, vocab_size=vocab_size, seq_len=len(pairs[0][0]))
    meta |= dict(num_puzzle_identifiers=1, total_groups=len(pairs), mean_puzzle_examples=1.0)
    return results, meta | dict(total_puzzles=len(pairs), sets=["all"])


def check_equal(folder, expected):
    arrays, meta = arrays_of(folder)
    for name in ARRAYS:
        assert arrays[name].tolist() == [list(x) if name in ("inputs", "labels") else x for x in expected[0][name]], (
            name
        )
        assert arrays[name].dtype == (np.uint8 if name in ("inputs", "labels") else np.int32)
    assert meta == expected[1] and list(meta) == list(expected[1]) and type(meta["mean_puzzle_examples"]) is float


def test_sudokus_are_theirs(tmp_path):
    questions, answers = sudoku(size=9, givens=40, n=6, seed=0)
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        put_table(tmp_path / "csv" / f"{split}.csv", questions[part], answers[part], ".123456789")
    out = prepare(tmp_path / "csv", tmp_path / "trm", format="trm")
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        pairs = []
        for pair in zip(questions[part], answers[part], strict=True):
            texts = ["".join(map(str, cells)) for cells in pair]
            pairs.append([[ord(sign) - ord("0") + 1 for sign in text] for text in texts])
        check_equal(out / split, naive_build(pairs, 11))
    assert json.loads((out / "identifiers.json").read_text()) == ["<blank>"]
    back = prepare(out, tmp_path / "back")
    for split, part in (("train", slice(4)), ("val", slice(4, 6))):
        assert (np.load(back / f"{split}.npy") == np.stack([questions[part], answers[part]], 1)).all()


def test_augmented_versions_follow_their_original_and_are_left_out_again(tmp_path):
    questions, answers = sudoku(size=9, givens=40, n=4, seed=0)
    put_table(tmp_path / "csv" / "train.csv", questions[:3], answers[:3], ".123456789")
    put_table(tmp_path / "csv" / "test.csv", questions[3:], answers[3:], ".123456789")
    out = prepare(tmp_path / "csv", tmp_path / "trm", format="trm", augment=2)
    arrays, meta = arrays_of(out / "train")
    assert arrays["group_indices"].tolist() == [0, 3, 6, 9] and meta["total_groups"] == 3
    assert arrays["puzzle_indices"].tolist() == list(range(10)) and len(arrays["puzzle_identifiers"]) == 9
    assert (arrays["inputs"][::3] == questions[:3] + 1).all()
    assert ((arrays["inputs"] == 1) | (arrays["inputs"] == arrays["labels"])).all()
    assert (np.sort(arrays["labels"][1].reshape(9, 9), 1) == np.arange(2, 11)).all()
    back = prepare(out, tmp_path / "back")
    assert (np.load(back / "train.npy")[:, 0] == questions[:3]).all()


def test_groups_of_different_puzzles_lose_none(tmp_path):
    questions, answers = sudoku(size=4, givens=0, n=30, seed=0)
    order = np.argsort((questions == 0).sum(1), kind="stable")[[0, -1]]  # other numbers of blanks
    arrays = trm_layout.one_each(questions[order] + 1, answers[order] + 1, 2)
    assert trm_layout.originals(arrays).tolist() == [0, 1]


def test_mazes_are_theirs_and_rectangles_come_back(tmp_path):
    rng = np.random.default_rng(0)
    for rows, cols in ((5, 5), (4, 7)):
        questions, answers = [], []
        while len(questions) < 6:
            grid = random_maze(rng, rows, cols)
            answer = maze.solve(grid, cols)
            if answer is not None:
                questions.append(grid)
                answers.append(answer)
        source = tmp_path / f"mazes{rows}"
        if rows == cols:
            for split, part in (("train", slice(4)), ("test", slice(4, 6))):
                put_table(source / f"{split}.csv", questions[part], answers[part], maze.SIGNS)
        else:
            text = ["".join(maze.SIGNS[cell] for cell in grid) for grid in questions]
            blocks = ["\n".join(line[i : i + cols] for i in range(0, rows * cols, cols)) for line in text]
            source = tmp_path / "mazes.txt"
            source.write_text("\n\n".join(blocks).replace(" " * cols, " " * cols) + "\n")
        out = prepare(source, tmp_path / f"trm{rows}", format="trm", val_ratio=0.5)
        arrays, meta = arrays_of(out / "train")
        assert (meta["seq_len"], meta["vocab_size"]) == (rows * cols, 6)
        back = prepare(out, tmp_path / f"back{rows}")
        for split, name in (("train", "train"), ("val", "test")):
            cells = np.load(back / f"{split}.npy")
            token = dict(zip(maze.SIGNS, range(5), strict=True))
            for pair, tokens, labels in zip(cells, *(arrays_of(out / name)[0][a] for a in ARRAYS[:2]), strict=True):
                for ours, theirs in zip(pair, (tokens, labels), strict=True):
                    assert [token["# SGo"[t - 1]] for t in theirs] == ours.tolist()
        if rows == cols:
            pairs = [
                [["# SGo".index(maze.SIGNS[c]) + 1 for c in cells] for cells in p]
                for p in zip(questions, answers, strict=True)
            ]
            check_equal(out / "train", naive_build(pairs[:4], 6))


def naive_grid(grid):
    """Their tokens of a grid in the corner: np.pad of grid + 2, ones below and beside it."""
    page = np.pad(grid + 2, ((0, 30 - len(grid)), (0, 30 - len(grid[0]))))
    if len(grid) < 30:
        page[len(grid), : len(grid[0])] = 1
    if len(grid[0]) < 30:
        page[: len(grid), len(grid[0])] = 1
    return page.reshape(-1)


def test_arc_is_theirs(tmp_path):
    rng = np.random.default_rng(0)

    def grid():
        return rng.integers(0, 10, rng.choice([1, 3, 30], 2)).tolist()

    def pairs(n):
        return [dict(input=grid(), output=grid()) for _ in range(n)]

    tasks = {
        group: {f"{group}{i}": dict(train=pairs(2 + i), test=pairs(2)) for i in range(2)}
        for group in ("training", "evaluation")
    }
    for group, content in tasks.items():
        solutions = {
            name: [pair.pop("output") for pair in task["test"]]
            for name, task in json.loads(json.dumps(content)).items()
        }
        challenges = {
            name: task | dict(test=[dict(input=pair["input"]) for pair in task["test"]])
            for name, task in content.items()
        }
        (tmp_path / f"arc-agi_{group}_solutions.json").write_text(json.dumps(solutions))
        (tmp_path / f"arc-agi_{group}_challenges.json").write_text(json.dumps(challenges))
    out = prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}_trm", format="trm")
    names = json.loads((out / "identifiers.json").read_text())
    order = ["evaluation0", "evaluation1", "training0", "training1"]  # of the files
    assert names == ["<blank>", *order]
    every = tasks["evaluation"] | tasks["training"]
    groups = dict(
        train=[
            (name, every[name]["train"] + (every[name]["test"] if name in tasks["training"] else [])) for name in order
        ],
        test=[(name, every[name]["test"]) for name in order[:2]],
    )
    for split, expected in groups.items():
        arrays, meta = arrays_of(out / split)
        examples = [pair for _, pairs in expected for pair in pairs]
        for array, side in (("inputs", "input"), ("labels", "output")):
            assert (arrays[array] == [naive_grid(np.array(pair[side])) for pair in examples]).all()
        assert arrays["puzzle_identifiers"].tolist() == [names.index(name) for name, _ in expected]
        assert np.diff(arrays["puzzle_indices"]).tolist() == [len(pairs) for _, pairs in expected]
        assert arrays["group_indices"].tolist() == list(range(len(expected) + 1))
        assert meta["num_puzzle_identifiers"] == 5 and meta["mean_puzzle_examples"] == len(examples) / len(expected)
        assert (meta["vocab_size"], meta["seq_len"]) == (12, 900)
        assert meta["total_puzzles"] == meta["total_groups"] == len(expected)
    assert json.loads((out / "test_puzzles.json").read_text()) == tasks["evaluation"]
    _, _, back = read_source(str(out), Problems())
    assert {task.name: task.group for task in back} == {name: name[:-1] for name in order}
    for task in back:
        sides = dict(groups["train"])[task.name], dict(groups["test"]).get(task.name, [])
        for pairs_back, given in zip((task.train, task.test), sides, strict=True):
            assert [[g.tolist() for g in pair] for pair in pairs_back] == [[p["input"], p["output"]] for p in given]


def test_changed_arc_tasks_have_their_names_and_come_back():
    rng = np.random.default_rng(0)
    task = ArcTask("a", "training", ((np.arange(6, dtype=np.uint8).reshape(2, 3),) * 2,) * 2, ())
    other = ArcTask("b", "evaluation", task.train, task.train[:1])
    splits, names, _ = trm_layout.arc_groups([task, other], 3, rng)
    assert len(names) == 9 and names[1] == "a" and names[5] == "b"
    for number in (2, 3, 4):
        name, turn, colours = names[number].split("|||")
        back = np.argsort([int(c) for c in colours])
        for tokens, labels in splits["train"][0][number - 1][1]:
            undone = {0: 0, 1: 3, 2: 2, 3: 1}.get(int(turn[1:]), int(turn[1:]))
            assert name == "a" and (tokens == labels).all()
            grid = trm_layout.turned(back[trm_layout.grid_of(tokens)], undone)
            assert (grid == task.train[0][0]).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a, m: a.update(puzzle_indices=np.array([0, 2, 1, 3, 4], np.int32)), "puzzle_indices"),
        (lambda a, m: a.update(group_indices=np.array([0, 9], np.int32)), "group_indices"),
        (lambda a, m: a.update(inputs=a["inputs"][:, :80]), "inputs"),
        (lambda a, m: a.update(labels=a["labels"].astype(float)), "labels"),
        (lambda a, m: a.update(inputs=a["inputs"] + np.uint8(9)), "vocab_size"),
        (lambda a, m: m.update(vocab_size=50), "neither Sudoku"),
        (lambda a, m: m.update(sets=["../x"]), "sets"),
        (lambda a, m: m.pop("seq_len"), "seq_len"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, words, tmp_path):
    questions, answers = sudoku(size=9, givens=60, n=4, seed=0)
    arrays = trm_layout.one_each(questions + 1, answers + 1, 1)
    meta = trm_layout.metadata(arrays, 11, 1)
    change(arrays, meta)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(meta))
    for name, values in arrays.items():
        np.save(tmp_path / "train" / f"all__{name}.npy", values)
    with pytest.raises(DataError, match=words):
        read_source(str(tmp_path), Problems())


def test_a_pickle_is_never_loaded(tmp_path):
    (tmp_path / "train").mkdir()
    arrays = trm_layout.one_each(np.ones((1, 81), np.uint8), np.ones((1, 81), np.uint8), 1)
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(trm_layout.metadata(arrays, 11, 1)))
    for name in ARRAYS:
        np.save(tmp_path / "train" / f"all__{name}.npy", np.array([{}], object))
    with pytest.raises(DataError, match="pickle"):
        read_source(str(tmp_path), Problems())


def test_the_trainer_names_the_command_that_reads_the_layout(tmp_path):
    questions, answers = sudoku(size=4, givens=8, n=6, seed=0)
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        put_table(tmp_path / "csv" / f"{split}.csv", questions[part], answers[part], ".1234")
    out = prepare(tmp_path / "csv", tmp_path / "trm", format="trm")
    options = dict(max_seq_len=16, data_seed=0, reveal=0.0, say=print)
    for _ in range(2):  # with our meta.json, then without one, as published
        with pytest.raises((UsageError, DataError), match="try: python prepare_data.py puzzles --source .*trm --out"):
            open_dataset(str(out), **options)
        (out / "meta.json").unlink(missing_ok=True)
    prepare(out, tmp_path / "back")
    assert open_dataset(str(tmp_path / "back"), **options).rows("train") == 4
