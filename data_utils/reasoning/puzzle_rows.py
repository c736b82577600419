"""Sudokus and mazes of any published layout as checked rows of cells; what is wrong with a row is named and counted.

n puzzles of N cells.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_utils.documents import describes, suffix_of
from data_utils.errors import DataError, UsageError
from data_utils.files import begins, make_room, warn, write_atomic
from data_utils.reasoning import arc_tasks, maze, sudoku, trm_layout
from data_utils.reasoning import folder as prepared
from data_utils.reasoning.puzzle_layouts import BLANKS, RECORDS, Problems, read_lines, read_puzzles
from data_utils.workers import in_order

SPLIT_NAMES = dict(train="train", training="train", val="val", valid="val", validation="val", test="val")
TABLES = (".csv", ".txt", *RECORDS)  # of puzzles in a folder
LARGEST_MAZE = 40  # rows and columns
BLOCK = 50  # puzzles that a process solves at a time
SHOWN = 3  # places that a message names


@dataclass(frozen=True)
class Form:
    """The form of puzzles: Sudokus or mazes of rows x cols cells."""

    kind: str  # sudoku, maze
    rows: int
    cols: int

    @property
    def cells(self):
        return self.rows * self.cols

    @property
    def task(self):
        """The task of train_multimodal.py."""
        return f"sudoku{self.rows}" if self.kind == "sudoku" else "maze"

    @property
    def ids(self):
        """The number of different cells."""
        return self.rows + 1 if self.kind == "sudoku" else len(maze.SIGNS)

    def show(self, cells):
        """Return cells (N,) as lines of signs."""
        text = self.line(cells)
        return "\n".join(text[start : start + self.cols] for start in range(0, self.cells, self.cols))

    def line(self, cells):
        """Return cells (N,) as signs in one line."""
        signs = "0123456789" if self.kind == "sudoku" else maze.SIGNS
        return "".join(signs[cell] for cell in cells.tolist())

    def parse(self, text):
        """Return the cells (N,) of the one puzzle in a text of any layout. Raises UsageError."""
        problems = Problems()
        _, questions = read_questions("puzzle", self, problems, text)
        if len(questions) == 1 and not problems.count:
            return questions[0][2]
        if self.kind == "sudoku" and not questions:
            sudoku.parse_puzzle(text)  # says what is wrong
        reasons = "; ".join(problems.lines()) or f"{len(questions)} puzzles"
        raise UsageError(f"expected one {self.task} of {self.rows} x {self.cols} cells, found {reasons}")

    def verdict(self, question, answer):
        """Return (whether an answer (N,) follows the rules, words on that)."""
        if self.kind == "sudoku":
            return sudoku.verdict(question, answer, self.rows)
        return maze.verdict(question, answer, self.cols)

    def disguises(self, questions, answers):
        """Return bytes (n,) that are the same for puzzles which are one puzzle in disguise.

        Sudokus are compared by their solutions; those of 4 x 4 cells have too few different ones.
        """
        if self.kind == "sudoku":
            return sudoku.disguises(questions if self.rows == 4 else answers, self.rows)
        return maze.disguises(questions, self.rows, self.cols)


def form_of(meta):
    """Return the Form of the meta.json of a prepared folder. Raises DataError for sizes that none has."""
    size = meta.get("size", 0)
    rows, cols = meta.get("rows", size), meta.get("cols", size)
    sizes = range(1, LARGEST_MAZE + 1) if meta["kind"] == "maze" else sudoku.BOXES
    if not all(type(side) is int and side in sizes for side in (rows, cols)):
        raise DataError(f"meta.json: a {meta['kind']} of {rows} x {cols} cells")
    return Form(meta["kind"], rows, cols)


@dataclass
class Rows:
    """Checked puzzles: questions and answers (n, N) uint8, ratings (n,), the place of each in its file."""

    questions: np.ndarray
    answers: np.ndarray
    ratings: np.ndarray
    places: list

    def pick(self, index):
        """Return the rows of an index or mask."""
        index = np.arange(len(self.places))[index]
        places = [self.places[i] for i in index.tolist()]
        return Rows(self.questions[index], self.answers[index], self.ratings[index], places)


def joined(parts, cells):
    """Return several Rows as one."""
    none = np.zeros((0, cells), np.uint8)
    return Rows(
        np.concatenate([none, *(part.questions for part in parts)]),
        np.concatenate([none, *(part.answers for part in parts)]),
        np.concatenate([np.zeros(0), *(part.ratings for part in parts)]),
        [place for part in parts for place in part.places],
    )


# ---- texts to cells --------------------------------------------------------------------------------------------------


def guess_form(texts):
    """Return the Form that most of the questions have. Raises DataError if none has one."""
    forms = Counter(form for text in texts.questions if (form := _form_of_text(text)))
    if not forms:
        first = f": {texts.questions[0][:20]!r} in line {texts.lines[0]}" if texts.questions else ""
        raise DataError(
            f"{texts.path}: neither Sudokus nor mazes{first}\n"
            "expected: 81 (16, 36) digits with . for blanks, or mazes of # space S G"
        )
    return forms.most_common(1)[0][0]


def _form_of_text(text):
    """Return the Form of a question; None if its length has none."""
    if set(text) & set("#SG"):
        lines = text.split("\n")
        rows, cols = len(lines), len(lines[0])
        if rows == 1:
            rows = cols = math.isqrt(len(text))
        fits = rows * cols == len(text.replace("\n", "")) and 3 <= min(rows, cols) and max(rows, cols) <= LARGEST_MAZE
        return Form("maze", rows, cols) if fits else None
    size = math.isqrt(len("".join(text.split())))
    return Form("sudoku", size, size) if size in sudoku.BOXES and size * size == len("".join(text.split())) else None


def to_cells(texts, form):
    """Return (cells (n, N) uint8, whether each text has N signs (n,) bool); 255 is a sign that stands for no cell."""
    table = np.full(256, 255, np.uint8)
    if form.kind == "sudoku":
        table[[ord(sign) for sign in BLANKS + "0-"]] = 0
        table[ord("1") : ord("1") + form.rows] = np.arange(1, form.rows + 1)
        texts = ["".join(text.split()) for text in texts]
    else:
        table[[ord(sign) for sign in maze.SIGNS]] = np.arange(len(maze.SIGNS))
        texts = [text.replace("\n", "") for text in texts]
    fits = np.array([len(text) == form.cells for text in texts], bool)
    padded = "".join(text.ljust(form.cells)[: form.cells] for text in texts)
    signs = np.frombuffer(padded.encode("latin-1", "replace"), np.uint8)
    return table[signs].reshape(len(texts), form.cells), fits


class _Check:
    """The puzzles of some Texts while they are checked: the good ones, and the reasons against the others."""

    def __init__(self, places, problems):
        self.places, self.problems = places, problems
        self.good = np.ones(len(places), bool)

    def reject(self, bad, reason, detail=lambda i: ""):
        """Leave out the rows of the mask `bad`; detail(i) tells more about row i."""
        for i in np.flatnonzero(self.good & bad).tolist():
            self.problems.add(self.places[i], reason, detail(i))
        self.good &= ~bad


def check_questions(texts, form, check):
    """Return the questions (n, N) of Texts; `check` leaves out those that are none."""
    cells, fits = to_cells(texts.questions, form)

    def odd_sign(i):
        place = int((cells[i] == 255).argmax())
        row, column = divmod(place, form.cols)
        text = texts.questions[i]
        sign = ("".join(text.split()) if form.kind == "sudoku" else text.replace("\n", ""))[place]
        return f"{sign!r} in row {row + 1}, column {column + 1}"

    def length(i):
        text = texts.questions[i].replace("\n", "")
        return f"{len(text)} signs, expected {form.cells}"

    check.reject(~fits, "of another size", length)
    check.reject((cells == 255).any(1), "with another sign", odd_sign)
    check_rules(cells, form, check)
    return cells


def check_rules(cells, form, check):
    """Leave out questions (n, N) that contradict themselves."""
    cells = np.where(check.good[:, None], cells, 0)
    if form.kind == "sudoku":
        check.reject(sudoku.repeats(cells, form.rows), "contradictory", lambda i: _contradiction(cells[i]))
        return
    reasons = [maze.problem_of(row) if good else "" for row, good in zip(cells, check.good, strict=True)]
    check.reject(np.array([bool(reason) for reason in reasons], bool), "no maze", lambda i: reasons[i])


def _contradiction(cells):
    try:
        sudoku.parse_puzzle("".join(map(str, cells.tolist())))
    except UsageError as e:
        return str(e).removeprefix("contradictory puzzle: ")
    return ""


def check_answers(questions, answers, given, form, check, unique, processes):
    """Return the answers (n, N) of questions; `given` (n,) says where there is one, the others are solved.

    unique: so many Sudokus with an answer are searched for a second solution.
    """
    if form.kind == "maze":
        return _check_ways(questions, answers.copy(), given, form, check)
    return _check_solutions(questions, answers.copy(), given, form.rows, check, unique, processes)


def _check_ways(questions, answers, given, form, check):
    """Return the answers of mazes."""
    blocked = np.zeros(len(questions), bool)
    faults = [""] * len(questions)
    for i in np.flatnonzero(check.good).tolist():
        shortest = maze.solve(questions[i], form.cols)
        if shortest is None:
            blocked[i] = True
        elif given[i]:
            faults[i] = maze.fault(questions[i], answers[i], form.cols)
        else:
            answers[i] = shortest
    check.reject(blocked, "without a way from S to G")
    wrong = np.array([bool(fault) for fault in faults], bool)
    check.reject(wrong, "whose answer does not belong to it", lambda i: faults[i])
    return answers


def _check_solutions(questions, answers, given, size, check, unique, processes):
    """Return the answers of Sudokus."""
    belongs = ((questions == 0) | (questions == answers)).all(1)
    solves = (answers <= size).all(1)
    solves[solves] = sudoku.solved(answers[solves], size)
    detail = partial(_fault, questions, answers, size)
    check.reject(given & ~belongs, "whose answer does not belong to it", detail)
    check.reject(given & ~solves, "whose answer breaks the rules", detail)
    searched = np.concatenate(
        [np.flatnonzero(check.good & ~given), np.flatnonzero(check.good & given)[: max(0, unique)]]
    )
    blocks = [questions[searched[start : start + BLOCK]] for start in range(0, len(searched), BLOCK)]
    solved_blocks = in_order(partial(_solve, size), blocks, processes if len(blocks) > 4 else 1)
    counts = np.ones(len(questions), int)
    results = [result for block in solved_blocks for result in block]
    for i, (count, solution) in zip(searched.tolist(), results, strict=True):
        counts[i] = -1 if count is None else count
        if not given[i] and solution is not None:
            answers[i] = solution
    check.reject(counts == 0, "without a solution")
    check.reject(counts == 2, "with several solutions")
    check.reject((counts < 0) & ~given, "without an answer, and too hard for the solver")
    return answers


def _fault(questions, answers, size, i):
    return sudoku.fault(questions[i], answers[i], size)


def _solve(size, block):
    return [sudoku.solve(puzzle, size) for puzzle in block]


def check_texts(texts, form, problems, unique, processes):
    """Return the Rows of Texts."""
    places = [f"{texts.path}:{line}" for line in texts.lines]
    check = _Check(places, problems)
    questions = check_questions(texts, form, check)
    answers, fits = to_cells(texts.answers, form)
    given = np.array([bool(answer.strip()) for answer in texts.answers], bool)
    check.reject(given & ~fits, "whose answer has another size")
    answers = check_answers(questions, answers, given, form, check, unique, processes)
    return Rows(questions, answers, np.array(texts.ratings, float), places).pick(check.good)


# ---- sources ---------------------------------------------------------------------------------------------------------


def read_source(source, problems, *, unique=0, processes=1):
    """Return (layout in words, Form or None for ARC, {split: Rows} or {"": Rows} without splits, or [ArcTask]).

    Raises DataError, UsageError for a source without puzzles.
    """
    path = Path(source)
    if not source or not path.exists():
        raise UsageError(f"--source {source}: no such file or folder\nfix: --source FILE, such as sudoku.csv")
    if trm_layout.is_here(path):
        return _read_trm(path, problems, unique, processes)
    if path.is_dir() and prepared.puzzle_kind(path):
        return _read_prepared(path)
    files = _split_files(path)
    if not files:
        layout, tasks = arc_tasks.read_tasks(path, problems)
        return layout, None, tasks
    form = None
    splits = {}
    for split, paths in files.items():
        parts = []
        for file in paths:
            layout, parts_of_file = read_puzzles(file, problems)
            for texts in parts_of_file:
                form = form or guess_form(texts)
                parts.append(check_texts(texts, form, problems, unique - sum(len(p.places) for p in parts), processes))
        splits[split] = joined(parts, form.cells)
    return layout, form, splits


def _split_files(path):
    """Return {split: [paths]} of the tables and texts of a source, {"": [paths]} without splits; {} for JSON."""
    if path.is_file():
        return {} if path.suffix.lower() == ".json" else {"": [path]}
    tables, named = [], {}
    for file in sorted(path.iterdir()):
        stem = re.split(r"\.|-\d", file.name)[0].lower()  # Hugging Face has train-00000-of-00001.parquet
        if suffix_of(file) not in TABLES or describes(file) or not file.is_file():
            continue
        tables.append(file)
        if stem in SPLIT_NAMES:
            named.setdefault(SPLIT_NAMES[stem], []).append(file)
    if named:
        return dict(sorted(named.items()))
    return {"": tables} if tables else {}


def _read_prepared(folder):
    """Return what read_source returns of a folder that prepare_data.py made."""
    meta = prepared.read_meta(folder)
    if meta["kind"] == "arc":
        layout, tasks = arc_tasks.read_tasks(folder / "arc.json", Problems())
        return "a prepared folder of ARC", None, tasks
    form = form_of(meta)
    splits = {}
    for split, (questions, answers) in sudoku.load_puzzles(folder, form.cells).items():
        path = folder / f"{split}_ratings.npy"
        ratings = np.load(path, allow_pickle=False) if path.is_file() else np.full(len(questions), np.nan)
        places = [f"{folder}/{split}.npy: row {i}" for i in range(len(questions))]
        splits[split] = Rows(np.asarray(questions), np.asarray(answers), ratings, places)
    return f"a prepared folder of {form.task}", form, splits


def _read_trm(folder, problems, unique, processes):
    """Return what read_source returns of a folder in the layout of HRM and TRM."""
    metas, splits = {}, {}
    for name in trm_layout.SPLITS:
        if Path(folder, name, "dataset.json").is_file():
            metas[name], splits[name] = trm_layout.read_split(folder / name)
    kinds = {trm_layout.kind_of(meta) for meta in metas.values()}
    if len(kinds) > 1:
        raise DataError(f"{folder}: train/ and test/ hold different puzzles: {kinds}")
    kind, size = kinds.pop()
    layout = "the training layout of HRM and TRM"
    if kind == "arc":
        return layout, None, trm_layout.read_arc(folder, splits, problems)
    form = Form(kind, size, size)
    if kind == "maze":
        form = Form(kind, *_maze_shape(folder, size))
    rows = {}
    for name, arrays in splits.items():
        index = trm_layout.originals(arrays)
        left_out = len(arrays["inputs"]) - len(index)
        if left_out:
            print(f"{folder}/{name}: {left_out} augmented versions left out: the trainers make their own")
        questions, answers = (trm_layout.cells_of(arrays[array][index], kind) for array in ("inputs", "labels"))
        places = [f"{folder}/{name}: row {i}" for i in index.tolist()]
        check = _Check(places, problems)
        check.reject((questions == 255).any(1), "with a token that stands for no cell")
        check_rules(questions, form, check)
        given = np.ones(len(index), bool)
        answers = check_answers(questions, answers, given, form, check, unique, processes)
        ratings = np.full(len(index), np.nan)
        rows[trm_layout.SPLITS[name]] = Rows(questions, answers, ratings, places).pick(check.good)
    return layout, form, rows


def _maze_shape(folder, cells):
    """Return rows and columns of the mazes of a folder: those of its meta.json, else a square."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
        if meta["rows"] * meta["cols"] == cells:
            return meta["rows"], meta["cols"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    side = math.isqrt(cells)
    if side * side != cells:
        raise DataError(f"{folder}: mazes of {cells} cells are no squares, and no meta.json tells rows and cols")
    return side, side


def read_questions(path, form, problems, text=None):
    """Return (layout, [(place, text, cells (N,))]) of the puzzles in a file, or in `text`, without their answers."""
    if text is None:
        layout, parts = read_puzzles(path, problems)
    else:
        layout, parts = read_lines(path, text, problems)
    questions = []
    for texts in parts:
        check = _Check([f"{texts.path}:{line}" for line in texts.lines], problems)
        cells = check_questions(texts, form, check)
        questions += [(check.places[i], texts.questions[i], cells[i]) for i in np.flatnonzero(check.good).tolist()]
    return layout, questions


# ---- answers of models -----------------------------------------------------------------------------------------------

COLUMNS = ("question", "answer", "verdict")


def is_answers(path):
    """Return whether a file is a table of `write_answers`."""
    return begins(path, ",".join(COLUMNS).encode() + b"\n")


def write_answers(path, rows):
    """Write rows of COLUMNS as a csv file."""
    import pandas

    content = pandas.DataFrame(rows, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode()
    make_room(path, is_answers)
    write_atomic(path, lambda file: file.write(content))
    print(f"{path}: {len(rows)} answers", file=sys.stderr)


def result_of(wrong, count, problems, source):
    """Return the result of generate.py: status 1 if answers break the rules or rows had none; warn of both.

    wrong: places of the puzzles whose answers break the rules, of `count`. Raises DataError if none was answered.
    """
    if problems.count and not count:
        raise DataError(f"{source}: no puzzle that this model reads: {'; '.join(problems.lines())}")
    for line in problems.lines():
        warn(f"{source}: not answered: {line}")
    if wrong and count > 1:
        places = ", ".join(wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
        warn(f"{len(wrong)} of {count} answers break the rules of their puzzles: {places}")
    return dict(status=1) if wrong or problems.count else {}
