"""Decide which columns of a user's table are y, x, and the uncertainty of y; say aloud what is left out.

M rows, D columns x. cells.py reads the files.
"""

import difflib
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data_utils.errors import UsageError
from data_utils.formulas.cells import error, read_columns, split_unit

MARKS = 99, 999, 9999, 99999, 999.9, 9999.9  # of missing values, also below 0
COUNTERS = {"index", "idx", "id", "row", "no", "no.", "nr", "nr.", "number", "#"}
ERROR = r"(?:std[ _.]?(?:err|error|dev)?|stdev|err|errors?|sigma|σ|sd|sem|unc|uncert|uncertainty|fehler|±|\+/?-)"
UNCERTAIN = re.compile(rf"(.*?)[ _.-]*{ERROR}|{ERROR}[ _.-]*(.*)|u\((.*)\)")
DIFFERENCE = re.compile(r"(?:d|δ|delta_)(.+)")  # an uncertainty of y; of x it may well be a variable


@dataclass
class Table:
    X: np.ndarray  # (M, D) float64
    y: np.ndarray  # (M,)
    names: list  # of the columns of X, as the file writes them
    target: str = "y"
    sigma: np.ndarray | None = None  # (M,) uncertainty of y
    units: dict = field(default_factory=dict)  # name -> text, where the file says it
    digits_X: np.ndarray | None = None  # (M, D) half a unit of the last digit as written; 0 = unknown
    digits_y: np.ndarray | None = None  # (M,)
    notes: list = field(default_factory=list)  # lines to be said aloud: what is left out, how cells are read

    def __post_init__(self):
        if self.digits_X is None:
            self.digits_X, self.digits_y = np.zeros(self.X.shape), np.zeros(self.y.shape)


def from_arrays(X, y, names=None):
    """Return the Table of an array or DataFrame X (M, D) and y (M,). Names default to those of X, else x1, x2, ..."""
    if names is None:
        names = getattr(X, "columns", None)
    target = getattr(y, "name", None)
    y = np.asarray(y, np.float64).reshape(-1)
    X = np.asarray(X, np.float64).reshape(len(y), -1)
    names = [f"x{j + 1}" for j in range(X.shape[1])] if names is None else [str(name) for name in names]
    return Table(X, y, names, "y" if target is None else str(target))


def read_table(path, target="", columns=(), ignore=(), sigma=""):
    """Return the Table of a file.

    target: the column y, "" = the last one of numbers. columns: those of X, () = all others that vary. sigma: the
    uncertainty of y. Raises UsageError for a flag that no column fits, DataError for a file that can't be read.
    """
    table, lines, notes = read_columns(path)
    chosen = list(dict.fromkeys(_find(path, table, "--columns", name) for name in columns))
    ignored = {_find(path, table, "--ignore", name) for name in ignore}
    sigma = _find(path, table, "--sigma", sigma) if sigma else ""
    if target:
        target = _find(path, table, "--target", target)
    else:
        target = _last_column(path, table, {*chosen, *ignored, sigma} - {""}, notes)
    needed = [target, sigma] if sigma else [target]
    uses = Counter([*chosen, *ignored, *needed])
    if max(uses.values()) > 1:
        remedy = "fix: each column under one of --target, --columns, --ignore, --sigma"
        raise UsageError(f"column {max(uses, key=uses.get)} is named twice (y is {target})\n{remedy}")
    used = chosen or _other_columns(table, target, uses, notes)
    for name in [*used, *needed]:
        if table[name].wrong:
            line, cell = table[name].wrong
            problem = f"line {line}, column {name}: {cell!r} is no number"
            if name in needed or len(used) == 1:
                raise error(path, problem, "fix: correct it or empty the cell")
            remedy = _without(name, chosen)
            if line == lines[-1]:
                remedy = f"fix: delete line {line}, if it sums up the others"
            raise error(path, f"{problem}: correct it or empty the cell", remedy)
    used, rows = _complete_rows(table, used, needed, bool(chosen), notes)
    M = int(rows.sum())
    if M < len(rows):
        gaps = [name for name in [*used, *needed] if not np.isfinite(table[name].values).all()]
        notes.append(f"left out: {len(rows) - M} of {len(rows)} rows, missing or infinite in {', '.join(gaps)}")
    notes += [note for name in [*used, target] for note in _marks(name, table[name].values[rows])]
    if not used:
        message = f"no column of numbers varies beside {target}: expected one x or more"
        times = [name for name, column in table.items() if column.fault.startswith("of dates or times")]
        remedy = f"fix: {times[0]} as numbers, such as seconds since the first row" if times else "fix: --target NAME"
        raise error(path, message, remedy, notes)
    if M < 2:
        remedy = "fix: more complete rows"
        if len(used) > 1:
            remedy = _without(min(used, key=lambda name: np.isfinite(table[name].values).sum()), chosen)
        raise error(path, f"complete rows of numbers: {M}; expected 2 or more", remedy, notes)
    if sigma and (table[sigma].values[rows] <= 0).any():
        line = lines[np.flatnonzero(rows & (table[sigma].values <= 0))[0]]
        remedy = "fix: empty the cell, and the row is left out"
        raise error(path, f"line {line}, column {sigma}: an uncertainty is above 0", remedy)
    return Table(
        X=np.stack([table[name].values[rows] for name in used], 1),
        y=table[target].values[rows],
        names=used,
        target=target,
        sigma=table[sigma].values[rows] if sigma else None,
        units={name: table[name].unit for name in [*used, *needed] if table[name].unit},
        digits_X=np.stack([table[name].digits[rows] for name in used], 1),
        digits_y=table[target].digits[rows],
        notes=notes,
    )


def _marks(name, values):
    """Yield a note for each number far from the others that often stands for a missing value, such as -999."""
    marks = np.isin(np.abs(values), MARKS)
    rest = values[~marks]
    for mark in np.unique(values[marks]) if len(rest) > 1 else ():
        if not 2 * rest.min() - rest.max() <= mark <= 2 * rest.max() - rest.min():
            count = (values == mark).sum()
            yield f"{name}: {mark:g} in {count} rows, far from the others; if that means missing, empty those cells"


def _without(name, chosen):
    """Return the advice to leave a column out; chosen: those under --columns."""
    others = [other for other in chosen if other != name]
    if chosen and not others:
        return "fix: another column"
    return f"try: {shlex.join(['--columns', *others] if chosen else ['--ignore', name])}"


def _find(path, table, flag, name):
    """Return the column that a flag names, with its unit or without. All but --ignore need numbers."""
    matches = [name] if name in table else [other for other in table if split_unit(other)[0] == name]
    if len(matches) != 1:
        folded = {other.casefold(): other for other in table}
        near = difflib.get_close_matches(name.casefold(), folded, 1, 0)
        remedy = f"try: {flag} {shlex.quote(folded[near[0]])}"
        raise UsageError(f"{flag} {name}: the columns of {path} are {', '.join(table)}\n{remedy}")
    fault = table[matches[0]].fault
    if fault and flag != "--ignore":
        usable = [other for other in table if not table[other].fault]
        remedy = f"\ntry: {flag} {shlex.quote(usable[-1])}" if usable else ""
        raise UsageError(f"{flag} {name}: expected a column of numbers, found one {fault}{remedy}")
    return matches[0]


def _uncertainty_of(name, table, target=""):
    """Return the column whose uncertainty `name` looks to be, "" for none. target "": y is not chosen yet."""
    if (table[name].values < 0).any():
        return ""
    by_name = {split_unit(other)[0].casefold(): other for other in table}
    folded = split_unit(name)[0].casefold()
    match, difference = UNCERTAIN.fullmatch(folded), DIFFERENCE.fullmatch(folded)
    if match:
        base = next(filter(None, match.groups()), "").strip(" _.-")
        longer = [
            other for key, other in by_name.items() if key.startswith(f"{base}_") and other != name
        ]  # B_uT, B_err
        if base in by_name or base and len(longer) == 1:
            return by_name.get(base) or longer[0]
        return (target or "y") if base in ("", "y") else ""
    of = by_name.get(difference[1].strip(" _"), "") if difference else ""
    return of if target in ("", of) else ""


def _last_column(path, table, taken, notes):
    """Return the last column of numbers that is no uncertainty: y where no flag says otherwise."""
    free = [name for name in table if not table[name].fault and name not in taken]
    if not free:
        faults = [f"{name}, {column.fault}" for name, column in table.items() if column.fault]
        raise error(path, "no column of numbers for y", "fix: a table with two columns of numbers or more", faults)
    plain = [name for name in free if not table[name].index and not _uncertainty_of(name, table)]
    if len(free) == 2 and not taken and plain == free[:1] and _uncertainty_of(free[1], table) != free[0]:
        plain = free  # h, error: nothing else is left for x
    target = (plain or free)[-1]
    if target != list(table)[-1]:
        others = [name for name in free if name != target]
        another = f"; for another try: --target {shlex.quote(others[-1])}" if others else ""
        notes.append(f"y is {target}, the last column of numbers{another}")
    return target


def _other_columns(table, target, uses, notes):
    """Return the columns that may be x and that no flag names; note those that are left out."""
    used, spare = [], {}
    for name, column in table.items():
        if name in uses:
            continue
        if column.fault:
            notes.append(f"left out: {name}, {column.fault}")
        elif column.index:
            spare[name] = "an index without a name"
        elif of := _uncertainty_of(name, table, target):
            spare[name] = f"which looks like the uncertainty of {of}"
        else:
            used.append(name)
    if spare and not any(table[name].wrong or table[name].varies() for name in used):
        name = max(spare, key=lambda name: table[name].index)
        notes.append(f"x is {name}, {spare.pop(name)}: no other column varies")
        used.append(name)
    for name, reason in spare.items():
        flags = ["--sigma", name] if reason.endswith(f"uncertainty of {target}") else ["--columns", *used, name]
        notes.append(f"left out: {name}, {reason}; to use it try: {shlex.join(flags)}")
    for name in used if len(used) > 1 else ():
        if name.casefold() in COUNTERS and (np.diff(table[name].values) == 1).all():
            notes.append(f"{name} numbers the rows and is used as x; to leave it out try: --ignore {shlex.quote(name)}")
    return used


def _complete_rows(table, used, needed, explicit, notes):
    """Return the columns x that vary and the rows (M,) in which all of them and `needed` are finite.

    Unless the columns are explicit, those are left out whose gaps would cost more than half of the rows.
    """
    used = list(used)
    base = np.all([np.isfinite(table[name].values) for name in needed], 0)
    while True:
        rows = np.all([base, *(np.isfinite(table[name].values) for name in used)], 0)
        constant = [name for name in used if not table[name].varies(base)]
        if not constant and not explicit and len(used) > 1 and rows.sum() < base.sum() / 2:
            name = max(used, key=lambda name: (~np.isfinite(table[name].values[base])).sum())
            gaps = int((~np.isfinite(table[name].values)).sum())
            reason = f"missing in {gaps} of {len(rows)} rows"
            if rows.sum() > 1:
                reason += f"; to use it try: {shlex.join(['--columns', *used])}"
        else:
            constant = constant or [name for name in used if not table[name].varies(rows)]
            if not constant:
                return used, rows
            name, reason = constant[0], "which is the same in all rows"
        used.remove(name)
        notes.append(f"left out: {name}, {reason}")
