"""Read KEY=VALUE beside --flags, bundles by their name, and the jobs of a sweep. An override is only one more flag."""

import dataclasses
import difflib
import itertools
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.config import (
    Parser,
    as_flags,
    bare_value,
    choices_of,
    default_of,
    flag_names,
    parse_layer,
    parser_of,
    read_flags,
)
from data_utils.files import root
from data_utils.other_names import ELSEWHERE, nearest

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MOST_JOBS = 1000
NEAREST = 5  # keys shown for one that is not there
SWEEP = "sweep.yaml"  # in the folder of a sweep


@dataclass
class _File:
    config: str = ""  # --config FILE, which is a flag of every script and a field of few


@dataclass(frozen=True)
class Overrides:
    """The keys that KEY=VALUE may have besides the names of fields, and the folder of bundles that have names.

    prefixes may precede any field's name. aliases: {key: field}. ignored: words without effect. absent: {key: why there
    is none}. folder: of bundles, below that of the scripts; without one there are neither named bundles nor sweeps.
    bundles: {field: its folder in there}, the first below a --config and the others above it. optional: fields whose
    values may have a bundle, FIELD/VALUE.yaml, which lies just below a --config. snapshot: the bundle in a run's folder
    that `resume=FOLDER` starts from.
    """

    prefixes: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    folder: str = ""
    bundles: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    snapshot: str = ""

    def name(self, key):
        """Return the name of the field that KEY means, if there is such a field."""
        prefix = next((p for p in self.prefixes if key.startswith(p)), "")
        name = key.removeprefix(prefix).replace("-", "_")
        return self.aliases.get(key) or self.aliases.get(name, name)

    def of(self, classes):
        """Return (this table with the aliases of the dataclasses' flags, {name: field} of all their fields)."""
        fields = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
        also = {name: f.name for f in fields.values() for name in flag_names(f)[1:]}
        absent = {name: reason for cls in classes for name, reason in getattr(cls, "absent", {}).items()}
        return dataclasses.replace(self, aliases=self.aliases | also, absent=absent), fields

    def flags(self, classes, argv, prog):
        """Return the words of a command line with each KEY=VALUE as a flag. Exits with status 2, naming the nearest."""
        table, fields = self.of([_File, *classes])
        try:
            return to_flags(split(argv, table, fields), fields)
        except ValueError as e:
            return Parser(prog=prog).error(str(e))

    def read(self, variants, doc, argv, prog, by):
        """Return the configuration, or the Jobs, of a command line: config.py does not import this module."""
        return read(variants, doc, argv, prog, by, self)


@dataclass
class Item:
    """One setting of a command line: its field, its words as typed, and the value if it is an override."""

    name: str
    words: list[str]
    value: str | None = None

    def text(self):
        """Return the text that was typed as the value, of a flag too."""
        _, equals, value = self.words[0].partition("=")
        return value if equals else " ".join(self.words[1:])

    def on(self):
        """Return whether it switches a bool on."""
        if self.value is None:
            return not self.words[0].startswith("--no")
        return BOOLS.get(self.value.lower(), True)


@dataclass
class Jobs:
    """The jobs that --multirun, or resume=FOLDER of a sweep, asks for: the words of each and its configuration.

    folder, rows: of the sweep that goes on, and its jobs as sweep.yaml has them; "" and [] for a new one.
    """

    words: list[list[str]]
    configs: list
    folder: str = ""
    rows: list[dict] = field(default_factory=list)
    multirun = True


def read(variants, doc, argv, prog, by, table):
    """Return variants[choice]() changed by bundles, flags and overrides; or the Jobs of a sweep.

    Later ones win: the dataclass, the run that `resume` names, the first bundle of the table, those of its `optional`
    fields, --config, the other bundles, the command line from left to right. Exits with status 2, naming the slip and
    the nearest key to it.
    """
    error = Parser(prog=prog).error
    table, fields = table.of(variants.values())
    try:
        items = split(_full_names(argv, root() / table.folder), table, fields)
        layers = _layers(items, table, fields, error)
        last = {item.name: item for layer in [*layers.values(), items] for item in layer}
        earlier = Path(last["resume"].text(), SWEEP) if "resume" in last else Path()
        if earlier.is_file() or "multirun" in last and last["multirun"].on():
            return _jobs(items, layers, earlier, lambda line: read(variants, doc, line, prog, by, table), error)
        choice = last[by].text() if by in last else next(iter(variants))
        if choice not in variants:
            raise ValueError(f"unknown {by} {choice}{_near(choice, variants)}\nthere are: {', '.join(variants)}")
        for item in items:
            owners = [name for name, cls in variants.items() if hasattr(cls, item.name)]
            if owners and choice not in owners:
                raise ValueError(f"{item.words[0]}: {item.name} is there with {by}={' or '.join(owners)}, not {choice}")
        others = ", ".join(name for name in variants if name != choice)
        more = f"More flags and other defaults with --{by}: {others}" if others else ""
        return _one(items, layers, variants[choice], doc, prog, more)
    except ValueError as e:
        error(str(e))


def _near(word, words):
    close = difflib.get_close_matches(word, words, 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _full_names(argv, folder):
    """Return the words with -c, -m and --config-name written out."""
    words, full = iter(argv), []
    for word in words:
        flag, equals, name = word.partition("=")
        if flag in ("--config-name", "--config_name"):
            name = name if equals else next(words, "")
            word = f"--config={_named(flag, name.removeprefix('phase1/').removesuffix('.yaml'), folder)}"
        full.append({"-c": "--config", "-m": "--multirun"}.get(word, word))
    return full


def _named(key, name, folder):
    """Return the file of the bundle `name`. Raises ValueError, with the nearest and all there."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        pattern = "**/*.yaml" if key.startswith("--") else "*.yaml"
        names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob(pattern))
        raise ValueError(f"{key}={name}: no such bundle{_near(name, names)}\nbundles there: {', '.join(names)}")
    return path


def split(argv, table, fields):
    """Return the Items of a command line. Raises ValueError for a word that is neither flag nor KEY=VALUE."""
    items, room = [], 0  # room: how many words may still be values of the flag before
    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        name = table.name(key)
        if re.match(r"--?[A-Za-z]", word):
            name = key.lstrip("-").replace("-", "_")
            name = name if name in fields else name.removeprefix("no_")
            name = table.aliases.get(name, name)
            default = default_of(fields[name]) if name in fields else ""
            room = 0 if equals or isinstance(default, bool) else math.inf if isinstance(default, tuple) else 1
            items.append(Item(name, [word]))
        elif room and not (equals and name in fields and (room > 1 or _may_stand_alone(items[-1], fields))):
            items[-1].words.append(word)
            room -= 1
        elif word in table.ignored:
            continue
        elif equals and name in fields:
            items.append(Item(name, [word], value))
            room = 0
        elif name in fields:
            following = argv[i + 1] if i + 1 < len(argv) else "VALUE"
            raise ValueError(f"{key} needs =value, as in {key}={following}")
        elif name in table.absent:
            raise ValueError(f"there is no {key}: {table.absent[name]}")
        else:
            raise ValueError(_unknown(key, table, fields) if equals else f"{word}: expected KEY=VALUE or --flag")
    return items


def _may_stand_alone(item, fields):
    return item.name in fields and bare_value(fields[item.name]) is not None


def _unknown(key, table, fields):
    """Return the message for a KEY that is no field: the nearest keys, and the prefixes that may precede them."""
    keys = [prefix + name for prefix in ("", *table.prefixes) for name in fields] + list(table.aliases)
    word = table.name(key)
    near = [*difflib.get_close_matches(word, fields, NEAREST), *(name for name in fields if word in name)]
    near = [*dict.fromkeys(near)][:NEAREST]
    meant = nearest(word, [*fields, *table.aliases])
    hint = f" (did you mean {meant}?)" if meant and word.lower() in ELSEWHERE else _near(key, keys)
    message = f"unknown key {key}{hint}"
    if len(near) > 1:
        message += f"\nkeys like it: {', '.join(near)}"
        if table.prefixes:
            message += f"; alone or after {' '.join(table.prefixes)}"
    return message


def _layers(items, table, fields, error):
    """Return {file: its Items} of the bundles that a command line calls for, lowest first."""

    def bundle(path):
        return {path: split(as_flags(path, error), table, fields)}

    named = {item.name: item.text() for item in items}
    snapshot = Path(named.get("resume", ""), table.snapshot)
    below = bundle(snapshot) if "resume" in named and snapshot.is_file() else {}
    above = bundle(named["config"]) if named.get("config") else {}
    named = {item.name: item.text() for layer in above.values() for item in layer} | named
    for key in table.optional:
        path = root() / table.folder / key / f"{named.get(key)}.yaml"
        if named.get(key) in choices_of(fields[key]) and path.is_file():
            above = bundle(path) | above
    for i, (key, inner) in enumerate(table.bundles.items()):
        name = named.get(key, "" if below else default_of(fields[key]))
        layer = bundle(_named(key, name, root() / table.folder / inner)) if name else {}
        above = above | layer if i else layer | above
    return below | above


def _one(items, layers, cls, doc, prog, more):
    """Return the configuration of one run. Raises ValueError."""
    parser = parser_of(cls, doc, prog, more)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    error = parser.error
    typed = to_flags(items, fields, sweeps=True)
    args = None
    layers = [*layers.items(), ("", items)]
    for i, (path, layer) in enumerate(layers):
        later = {item.name for _, above in layers[i + 1 :] for item in above}  # an unused value may hold a sweep
        words = [word for item in layer if item.name not in later for word in item.words] if path else typed
        place = f"--config {path}: " if path else ""
        parser.error = lambda message, place=place: error(place + _with_nearest(message))
        args = parse_layer(parser, cls, words, args)
    return cls(**{name: getattr(args, name) for name in fields})


def _with_nearest(message):
    match = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
    return message + _near(match[1], re.findall(r"[\w.-]+", match[2])) if match else message


def to_flags(items, fields, sweeps=False):
    """Return the Items as words of flags alone; an override replaces earlier words of its field.

    sweeps: whether commas outside of brackets separate the values of a sweep. Raises ValueError for a value that its
    flag could not have.
    """
    flags = []
    for item in items:
        words = item.words
        if item.value is not None:
            flags = [other for other in flags if other.name != item.name]
            words = _as_words(item, default_of(fields[item.name]), sweeps)
        flags.append(Item(item.name, words))
    return [word for item in flags for word in item.words]


def _as_words(item, default, sweeps):
    """Return the words of the flag that an override stands for; `default` tells the type of its field."""
    key, _, value = item.words[0].partition("=")
    is_list = isinstance(default, tuple)
    if len(values(value)) > 1 and (sweeps or is_list):
        remedies = []
        if is_list:
            remedies.append(f"try: {shlex.quote(f'{key}=[{value}]')}")
        if sweeps:
            remedies.append("try: --multirun")
        raise ValueError("\n".join([f"{key}={value}: expected one value; --multirun makes a run of each", *remedies]))
    if isinstance(default, bool):
        if value.lower() not in BOOLS:
            raise ValueError(f"{key}={value}: expected true or false")
        return [f"--{item.name}" if BOOLS[value.lower()] else f"--no-{item.name}"]
    if is_list:
        inner = value[1:-1] if re.fullmatch(r"[\[(].*[\])]", value) else value
        return [f"--{item.name}", *filter(None, (word.strip(" '\"") for word in inner.split(",")))]
    return [f"--{item.name}={value}"]


def values(text):
    """Split at the commas that stand in no brackets."""
    return re.split(r",(?![^\[(]*[\])])", text)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def _jobs(items, layers, earlier, parse, error):
    """Return the Jobs of a sweep, each of them parsed; or the configuration of the one that `sweep_job` picks.

    earlier: the sweep.yaml of a sweep that goes on; no file for a new sweep.
    """
    typed = {item.name: item.text() for item in items}
    bundled = {item.name: item.text() for layer in layers.values() for item in layer}
    number = typed.get("sweep_job", "-1")  # a bundle that a job of another sweep left may hold one too
    if not re.fullmatch(r"-?\d+", number):
        raise ValueError(f"sweep_job={number}: expected a whole number")
    number = int(number)
    rows = []
    if earlier.is_file():
        rows = _rows(earlier, error)
        new = [word for item in items if item.name not in ("resume", "multirun", "sweep_job") for word in item.words]
        words = [[*row["overrides"], *new] for row in rows]
        if number >= 0:
            words = [[*line, f"out={row['run_dir']}", "resume=auto"] for line, row in zip(words, rows, strict=True)]
    else:
        words = expand(items, bundled)
    if not number < len(words):
        raise ValueError(f"sweep_job={number}: the sweep has {len(words)} jobs, 0 to {len(words) - 1}")
    if number >= 0:
        return parse([*words[number], "multirun=false", f"sweep_job={number}"])
    if (bundled | typed).get("out"):
        raise ValueError("out: a sweep names the folders of its jobs; outputs=FOLDER is their root\ntry: without --out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("--multirun under torchrun: a sweep is one process\nfix: python in place of torchrun")
    configs = [parse([*line, "multirun=false"]) for line in words]
    return Jobs(words, configs, str(earlier.parent) if rows else "", rows)


def _rows(path, error):
    """Return the jobs that a sweep.yaml lists. Raises ValueError where it lists none, or one without its keys."""
    content, _ = read_flags(path, error)
    rows = content.get("jobs") if isinstance(content, dict) else None
    needed = {"overrides", "run_dir", "status"}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise ValueError(f"{path}: expected `jobs`, each with {', '.join(sorted(needed))}")
    return rows


def expand(items, bundled):
    """Return the words of each job of a sweep, the last swept key changing fastest.

    items: of the command line; bundled: {field: its value as text} of the bundles that it names. Raises ValueError
    for a key that is there twice and for too many jobs.
    """
    typed = [item for item in items if item.name not in ("multirun", "sweep_job")]
    names = [item.name for item in typed]
    for item in typed:
        if item.value is not None and names.count(item.name) > 1:
            raise ValueError(f"{item.words[0]}: {item.name} stands there {names.count(item.name)} times")
    choices = [[[f"{n}={v}"] for v in values(text)] for n, text in bundled.items() if n not in names]
    choices = [choice for choice in choices if len(choice) > 1]
    for item in typed:
        key = item.words[0].partition("=")[0]
        choices.append([item.words] if item.value is None else [[f"{key}={value}"] for value in values(item.value)])
    count = math.prod(map(len, choices))
    if count > MOST_JOBS:
        raise ValueError(f"{count} jobs: a sweep has at most {MOST_JOBS}")
    return [list(itertools.chain(*job)) for job in itertools.product(*choices)]
