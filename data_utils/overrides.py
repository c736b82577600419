"""KEY=VALUE beside --flags, bundles that have names, the jobs of a sweep. An override is only one more flag."""

import dataclasses
import difflib
import itertools
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from data_utils.config import Parser, as_flags, default_of, flag_names, parser_of, read_flags, tuples
from data_utils.files import root

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MOST_JOBS = 1000
NEAREST = 5  # keys shown for one that is not there
SWEEP = "sweep.yaml"  # in the folder of a sweep


@dataclass(frozen=True)
class Overrides:
    """What KEY may be besides a field's name, and where bundles lie that a field calls by name.

    prefixes may precede any field's name; aliases: {key: field}; ignored: whole words without effect; folder: of
    bundles, below that of the scripts; bundles: {field: its folder in there}, the first below a --config and the
    others above it; snapshot: the bundle in a run's folder that `resume=FOLDER` starts from.
    """

    prefixes: tuple[str, ...]
    aliases: dict[str, str]
    ignored: tuple[str, ...]
    folder: str
    bundles: dict[str, str]
    snapshot: str

    def name(self, key):
        """Return the name of the field that KEY means, if there is such a field."""
        prefix = next((p for p in self.prefixes if key.startswith(p)), "")
        name = key.removeprefix(prefix).replace("-", "_")
        return self.aliases.get(key) or self.aliases.get(name, name)

    def read(self, variants, doc, argv, prog, by):
        """Return what the module's `read` makes of a command line with this table: config.py does not import it."""
        return read(variants, doc, argv, prog, by, self)


@dataclass
class Item:
    """One setting of a command line: its field, its words as typed, and the value if it is an override."""

    name: str
    words: list[str]
    value: str | None = None

    def text(self):
        """Return what was typed as the value, of a flag too."""
        _, equals, value = self.words[0].partition("=")
        return value if equals else " ".join(self.words[1:])

    def on(self):
        """Return what it says of a bool."""
        return BOOLS.get(self.value.lower(), True) if self.value is not None else not self.words[0].startswith("--no")


@dataclass
class Jobs:
    """What --multirun, or resume=FOLDER of a sweep, asks for: the words of each job and the configuration they make.

    folder, rows: of the sweep that goes on, and its jobs as sweep.yaml has them; "" and [] for a new one.
    """

    words: list[list[str]]
    configs: list
    folder: str = ""
    rows: list[dict] = field(default_factory=list)
    multirun = True


def read(variants, doc, argv, prog, by, table):
    """Return variants[choice]() changed by bundles, flags and overrides; or the Jobs of a sweep.

    Later ones win: the dataclass, the run that `resume` names, the first bundle of the table, --config, the other
    bundles, the command line from left to right. Exits with status 2, naming what was typed and what is nearest to it.
    """
    error = Parser(prog=prog).error
    known = {f.name: f for cls in variants.values() for f in dataclasses.fields(cls)}
    also = {name: f.name for f in known.values() for name in flag_names(f)[1:]}
    table = dataclasses.replace(table, aliases=table.aliases | also)
    try:
        items = split(_full_names(argv, root() / table.folder), table, known)
        layers = _layers(items, table, known, error)
        last = {item.name: item for layer in [*layers.values(), items] for item in layer}
        again = Path(last["resume"].text(), SWEEP) if "resume" in last else Path()
        if again.is_file() or "multirun" in last and last["multirun"].on():
            return _jobs(items, layers, table, again, lambda line: read(variants, doc, line, prog, by, table), error)
        choice = last[by].text() if by in last else next(iter(variants))
        if choice not in variants:
            raise ValueError(f"unknown {by} {choice}{_near(choice, variants)}\nthere are: {', '.join(variants)}")
        for item in items:
            owners = [name for name, cls in variants.items() if hasattr(cls, item.name)]
            if owners and choice not in owners:
                raise ValueError(f"{item.words[0]}: {item.name} is there with {by}={' or '.join(owners)}, not {choice}")
        others = ", ".join(name for name in variants if name != choice)
        doc += f"\nMore flags and other defaults with --{by}: {others}" * bool(others)
        return _one(items, layers, variants[choice], doc, prog)
    except ValueError as e:
        error(str(e))


def _near(word, words):
    close = difflib.get_close_matches(word, words, 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _full_names(argv, folder):
    """Write -c, -m and --config-name out."""
    words, found = iter(argv), []
    for word in words:
        flag, equals, name = word.partition("=")
        if flag in ("--config-name", "--config_name"):
            name = name if equals else next(words, "")
            word = f"--config={_named(flag, name.removeprefix('phase1/').removesuffix('.yaml'), folder)}"
        found.append({"-c": "--config", "-m": "--multirun"}.get(word, word))
    return found


def _named(key, name, folder):
    """Return the file of the bundle `name`. Raises ValueError, with the nearest and all there."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        pattern = "**/*.yaml" if key.startswith("--") else "*.yaml"
        there = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob(pattern))
        raise ValueError(f"{key}={name}: no such bundle{_near(name, there)}\nbundles there: {', '.join(there)}")
    return path


def split(argv, table, known):
    """Return the Items of a command line. Raises ValueError for a word that is neither flag nor KEY=VALUE."""
    items, room = [], 0  # room: how many words may still be values of the flag before
    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        name = table.name(key)
        if re.match(r"--?[A-Za-z]", word):
            name = key.lstrip("-").replace("-", "_")
            name = name if name in known else name.removeprefix("no_")
            name = table.aliases.get(name, name)
            default = default_of(known[name]) if name in known else ""
            room = 0 if equals or isinstance(default, bool) else math.inf if isinstance(default, tuple) else 1
            items.append(Item(name, [word]))
        elif room and not (equals and name in known and (room > 1 or items[-1].name == "resume")):
            items[-1].words.append(word)
            room -= 1
        elif word in table.ignored:
            continue
        elif equals and name in known:
            items.append(Item(name, [word], value))
            room = 0
        elif name in known:
            following = argv[i + 1] if i + 1 < len(argv) else "VALUE"
            raise ValueError(f"{key} needs =value, as in {key}={following}")
        else:
            raise ValueError(_unknown(key, table, known) if equals else f"{word}: expected KEY=VALUE or --flag")
    return items


def _unknown(key, table, known):
    keys = [prefix + name for prefix in ("", *table.prefixes) for name in known] + list(table.aliases)
    word = table.name(key)
    near = dict.fromkeys([*difflib.get_close_matches(word, known, NEAREST), *(name for name in known if word in name)])
    like = f"\nkeys like it: {', '.join([*near][:NEAREST])}; alone or after {' '.join(table.prefixes)}"
    return f"unknown key {key}{_near(key, keys)}" + like * (len(near) > 1)


def _layers(items, table, known, error):
    """Return {file: its Items} of the bundles that a command line calls for, lowest first."""

    def bundle(path):
        return {path: split(as_flags(path, SimpleNamespace(error=error), None, None), table, known)}

    named = {item.name: item.text() for item in items}
    snapshot = Path(named.get("resume", ""), table.snapshot)
    below = bundle(snapshot) if "resume" in named and snapshot.is_file() else {}
    above = bundle(named["config"]) if named.get("config") else {}
    named = {item.name: item.text() for layer in above.values() for item in layer} | named
    for i, (key, inner) in enumerate(table.bundles.items()):
        name = named.get(key, "" if below else default_of(known[key]))
        layer = bundle(_named(key, name, root() / table.folder / inner)) if name else {}
        above = above | layer if i else layer | above
    return below | above


def _one(items, layers, cls, doc, prog):
    """Return the configuration of one run. Raises ValueError."""
    parser, own = parser_of(cls, doc, prog), {f.name: f for f in dataclasses.fields(cls)}
    error, args, typed = parser.error, None, to_flags(items, own)
    layers = [*layers.items(), ("", items)]
    for i, (path, layer) in enumerate(layers):
        later = {item.name for _, above in layers[i + 1 :] for item in above}  # what is not used may hold a sweep
        flags = [word for item in layer if item.name not in later for word in item.words] if path else typed
        parser.error = lambda message, path=path: error(f"--config {path}: " * bool(path) + _with_nearest(message))
        args = tuples(parser.parse_args(flags, args))
    return cls(**{name: getattr(args, name) for name in own})


def _with_nearest(message):
    found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
    return message + _near(found[1], re.findall(r"[\w.-]+", found[2])) if found else message


def to_flags(items, known):
    """Return the Items as words of flags alone; an override takes the place of what was typed before of its field.

    Raises ValueError for a value that its flag could not have.
    """
    found = []
    for item in items:
        words = item.words
        if item.value is not None:
            found = [other for other in found if other.name != item.name]
            words = _as_words(item, default_of(known[item.name]))
        found.append(Item(item.name, words))
    return [word for item in found for word in item.words]


def _as_words(item, default):
    key, _, value = item.words[0].partition("=")
    if len(values(value)) > 1:
        remedy = f"{key}=[{value}] is one list, " if isinstance(default, tuple) else ""
        raise ValueError(f"{key}={value}: expected one value\ntry: {remedy}--multirun makes a run of each")
    if isinstance(default, bool):
        if value.lower() not in BOOLS:
            raise ValueError(f"{key}={value}: expected true or false")
        return [f"--{item.name}" if BOOLS[value.lower()] else f"--no-{item.name}"]
    if isinstance(default, tuple):
        inner = value[1:-1] if re.fullmatch(r"[\[(].*[\])]", value) else value
        return [f"--{item.name}", *filter(None, (word.strip(" '\"") for word in inner.split(",")))]
    return [f"--{item.name}={value}"]


def values(text):
    """Split at the commas that stand in no brackets."""
    return re.split(r",(?![^\[(]*[\])])", text)


def _jobs(items, layers, table, again, parse, error):
    """Return the Jobs of a sweep, each of them parsed; or the configuration of the one that `sweep_job` picks."""
    typed = {item.name: item.text() for item in items}
    bundled = {item.name: item.text() for layer in layers.values() for item in layer}
    number = typed.get("sweep_job", "-1")  # a bundle that a job of another sweep left may hold one too
    if not re.fullmatch(r"-?\d+", number):
        raise ValueError(f"sweep_job={number}: expected a whole number")
    words, rows, number = [], [], int(number)
    if again.is_file():
        content, _ = read_flags(again, SimpleNamespace(error=error))
        rows = content.get("jobs") if isinstance(content, dict) else None
        rows, needed = rows if isinstance(rows, list) else [], {"overrides", "run_dir", "status"}
        if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
            raise ValueError(f"{again}: expected `jobs`, each with {', '.join(sorted(needed))}")
        new = [word for item in items if item.name not in ("resume", "multirun", "sweep_job") for word in item.words]
        own = [[f"out={row['run_dir']}", "resume=auto"] * (number >= 0) for row in rows]
        words = [[*row["overrides"], *new, *folder] for row, folder in zip(rows, own, strict=True)]
    else:
        words = expand(items, bundled)
    if not number < len(words):
        raise ValueError(f"sweep_job={number}: the sweep has {len(words)} jobs, 0 to {len(words) - 1}")
    if number >= 0:
        return parse([*words[number], "multirun=false", f"sweep_job={number}"])
    if (bundled | typed).get("out"):
        raise ValueError("out: a sweep names the folders of its jobs\ntry: outputs=FOLDER, which is their root")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("--multirun under torchrun: a sweep is one process\ntry: python in place of torchrun")
    return Jobs(words, [parse([*line, "multirun=false"]) for line in words], str(again.parent) * bool(rows), rows)


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
