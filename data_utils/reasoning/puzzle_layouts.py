"""The layouts in which Sudokus and mazes are published -> texts of puzzles, with file and line.

csv, csv.gz      columns question and answer (sudoku-extreme, maze-30x30-hard), quizzes and solutions, puzzle and
                 solution; a column rating or difficulty beside them
jsonl, parquet   the same columns, as texts or lists
text             a puzzle per line, perhaps behind a name and before its answer and a rating; or grids over several
                 lines, with | and - between boxes
"""

import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.documents import how_to_mend, open_text, read_text, suffix_of
from data_utils.errors import DataError, UsageError
from data_utils.reasoning import maze, sources
from data_utils.reasoning.sudoku import BOXES

QUESTIONS = ("question", "questions", "quizzes", "quiz", "puzzle", "puzzles", "input")
ANSWERS = ("answer", "answers", "solutions", "solution", "output")
RATINGS = ("rating", "difficulty")
BLANKS = "._*xX"  # besides 0, and - where a grid uses it so
RECORDS = (".jsonl", ".parquet", ".arrow")
CELLS = tuple(size * size for size in BOXES)
CHUNK = 100_000  # rows of a table at a time: a published one has millions
SURPLUS = 8  # values that a row may have too many
NAMED = 3  # rows that are named for each reason


@dataclass
class Texts:
    """Puzzles of a file as texts; "" for an absent answer, nan for an absent rating."""

    path: Path
    lines: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    ratings: list = field(default_factory=list)

    def add(self, line, question, answer="", rating=math.nan):
        """Add a puzzle."""
        self.lines.append(line)
        self.questions.append(question)
        self.answers.append(answer)
        self.ratings.append(rating)


class Problems:
    """Rows that can't be used: counted by reason, the first of each named."""

    def __init__(self):
        self.reasons = {}  # {reason: [count, places]}

    def add(self, place, reason, detail=""):
        """Count a row; place: file and line."""
        entry = self.reasons.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < NAMED:
            entry[1].append(f"{place}: {detail}" if detail else str(place))

    @property
    def count(self):
        return sum(count for count, _ in self.reasons.values())

    def lines(self):
        """Return the report, a line per reason."""
        return [
            f"{count} {reason}: {', '.join(places)}{', ...' if count > len(places) else ''}"
            for reason, (count, places) in self.reasons.items()
        ]


def read_puzzles(path, problems):
    """Return (layout in words, iterator of Texts) of a file; a table gives CHUNK rows at a time.

    Rows without a puzzle are added to `problems`. Raises DataError, UsageError.
    """
    path = Path(path)
    if suffix_of(path) in RECORDS:
        return read_records(path, problems)
    try:
        with open_text(path) as file:
            header = file.readline(10_000).decode("utf-8-sig", errors="replace").strip()
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from e
    separator = max(",;\t", key=header.count)
    columns = [name.strip(" \"'").lower() for name in header.split(separator)]
    if any(name in QUESTIONS for name in columns):
        return f"table of {', '.join(columns)}", read_table(path, columns, separator, problems)
    return read_lines(path, read_text(path), problems)


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_table(path, columns, separator, problems):
    """Yield the Texts of a csv file with these columns."""
    import pandas

    surplus = [f"surplus {i}" for i in range(SURPLUS)]  # a row with too many values is named, and stops nothing
    options = dict(sep=separator, names=[*columns, *surplus], header=None, skiprows=1, index_col=False)
    options |= dict(chunksize=CHUNK, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    question, answer, rating = _chosen(columns)
    first = 2  # line of the first row
    try:
        for table in pandas.read_csv(path, **options):
            table = table.fillna("")
            absent = [""] * len(table)
            texts = Texts(path)
            rows = zip(
                table[question].tolist(),
                table[answer].tolist() if answer else absent,
                table[rating].tolist() if rating else absent,
                table[surplus[0]].tolist(),
                strict=True,
            )
            for line, (text, solution, difficulty, more) in enumerate(rows, first):
                if more:
                    problems.add(f"{path}:{line}", f"with more values than the {len(columns)} columns")
                elif text.strip() or solution.strip():
                    texts.add(line, text, solution, _number(difficulty))
            first += len(table)
            yield texts
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: invalid UTF-8: {e.reason}{how_to_mend(path, e.object)}") from e
    except (OSError, ValueError) as e:  # pandas' errors are ValueErrors
        raise DataError(f"{path}: {str(e).splitlines()[0]}\nfix: mend the line") from e


def read_records(path, problems):
    """Return (layout in words, iterator of Texts) of a file of JSON lines or of a table of pyarrow."""
    try:
        records = (row for task in sources.split_tasks([path]) for _, row in sources.rows(task))
        columns = [str(name).lower() for name in next((row for row in records if isinstance(row, dict)), {})]
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from e
    if not any(name in QUESTIONS for name in columns):
        names = ", ".join(columns) or "nothing"
        raise DataError(f"{path}: no puzzles among {names}\nexpected: one of {' '.join(QUESTIONS)}")
    return f"records of {', '.join(columns)}", _records(path, columns, problems)


def _records(path, columns, problems):
    names = _chosen(columns)
    numbers = itertools.count(1)
    for task in sources.split_tasks([path]):
        texts = Texts(path)
        for place, row in sources.rows(task):
            line = next(numbers)
            if isinstance(row, ValueError):
                problems.add(sources.where(task, place), "that are no record", str(row))
                continue
            row = {str(name).lower(): _signs(value) for name, value in row.items()}
            question, answer, rating = (row.get(name, "") for name in names)
            if question.strip() or answer.strip():
                texts.add(line, question, answer, _number(rating))
        yield texts


def _chosen(columns):
    """Return the columns of questions, answers and ratings, "" for those that are absent."""
    return [next((name for name in names if name in columns), "") for names in (QUESTIONS, ANSWERS, RATINGS)]


def _signs(value):
    """Return a text or number as text, a list, also of lists, as the signs of its items in a row."""
    if isinstance(value, list):
        return "".join(map(_signs, value))
    return "" if value is None else str(value)


def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---- text ------------------------------------------------------------------------------------------------------------


def read_lines(path, text, problems):
    """Return (layout in words, [Texts]) of a text of mazes or Sudokus."""
    lines = text.removeprefix("\ufeff").replace("\u00a0", " ").split("\n")
    if _is_maze(lines):
        return _mazes(path, lines, problems)
    return _sudokus(path, lines, problems)


def _is_maze(lines):
    """Say whether the first line with a sign is one of a maze."""
    first = next((line for line in lines if line.strip()), "")
    return set(first) <= set(maze.SIGNS) and bool(set(first) & set("#SG"))


def _mazes(path, lines, problems):
    """Return the Texts of mazes, one per line or each over several lines, with an empty line between two."""
    texts = Texts(path)
    filled = [line for line in lines if line]
    if all("S" in line and "G" in line for line in filled):
        for number, line in enumerate(lines, 1):
            if line:
                texts.add(number, line)
        return "a maze per line", [texts]
    rows, first = [], 0
    for number, line in enumerate([*lines, ""], 1):
        if line:
            first = first if rows else number
            rows.append(line)
        elif rows:
            width = max(map(len, rows))
            texts.add(first, "\n".join(row.ljust(width) for row in rows))
            rows = []
    return "mazes over several lines", [texts]


def _sudokus(path, lines, problems):
    """Return the Texts of Sudokus, one per line or each over as many lines as it has rows."""
    texts = Texts(path)
    dashes = any(re.search(r"\d-|-\d", line) and "+" not in line for line in lines)  # they are blanks, not borders
    blanks = BLANKS + "0" + "-" * dashes
    spaced = not any(sign in line for line in lines for sign in blanks + ",")  # spaces are the blanks
    spaced = spaced and any(re.search(r"\d  ?\d", line) for line in lines)
    width = max((len(line.replace("|", "").rstrip()) for line in lines if re.search(r"\d", line)), default=0)
    layout = "a Sudoku per line"
    rows, first, titles = [], 0, 0
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        words = [word for word in re.split(r"[,;\s]+", line) if word]
        compact = re.sub(r"[\s,;|\[\]]", "", line)
        grids = [word for word in words if len(word) in CELLS and not word.strip("0123456789-" + BLANKS)]
        size = max(map(len, grids or words[:1]), default=0)  # a puzzle may stand behind a name
        if size in CELLS:
            question, answer = [*(word for word in grids or words if len(word) == size), ""][:2]
            texts.add(number, question, answer, _number(words[-1]) if len(words[-1]) < size else math.nan)
            continue
        if len(compact) in CELLS and not (spaced and rows):
            texts.add(number, compact)
            continue
        if not compact and not (spaced and rows and len(line) == width):
            continue
        if re.fullmatch(r"[-+=|\s]*", line) and not (dashes and len(compact) in BOXES and "+" not in line):
            continue  # a border between boxes
        row = _row(line, compact, width if spaced else 0)
        signs = len(re.findall(rf"[\d{re.escape(blanks)}]", compact)) if not spaced else len(row)
        is_title = not rows and 2 * signs <= len(compact)
        if is_title:
            titles += 1
            continue
        if len(row) not in BOXES or (rows and len(row) != len(rows[0])):
            problems.add(place, "that are no puzzle", f"{len(compact)} signs")
            rows = []
            continue
        first = first if rows else number
        rows.append(row)
        if len(rows) == len(row):
            layout = "Sudokus over several lines"
            texts.add(first, "".join(rows))
            rows = []
    if rows:
        problems.add(f"{path}:{first}", "that are no puzzle", f"{len(rows)} rows of {len(rows[0])} signs")
    if titles:
        layout += f"; {titles} lines of other text"
    return layout, [texts]


def _row(line, compact, width):
    """Return the signs of a row of a grid; width: of rows whose blanks are spaces, else 0."""
    if width:
        return line.replace("|", "").rstrip().ljust(width).replace(" ", ".")
    if "," in line or ";" in line:
        values = re.split("[,;]", line.strip("[] |\t").rstrip(",;") if line.strip().startswith("[") else line)
        return "".join(value.strip() or "." for value in values)
    return compact
