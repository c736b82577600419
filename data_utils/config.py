"""Turn one flat dataclass into the whole command line: one field, one flag, one line of help.

Imports no torch, so that --help and typos answer at once.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import typing
from pathlib import Path

from data_utils.advice import pasteable
from data_utils.errors import UsageError
from data_utils.files import root
from data_utils.launch import share_cores
from data_utils.other_names import nearest

BARE = {"resume": "latest"}  # flags that may stand alone, and the value they then have
WIDEST = 100  # columns of a screen of help
MOST_LEFT = 38  # of these, for a flag with its default
COMPLETE = "_complete"  # attribute of a configuration whose bundles are read and whose types are checked


def flag(default, **metadata):
    """Return a dataclass field whose flag has more to it than a name and a default.

    also: a second name of the flag, or a tuple of names. short: a name like -o. bare: the value of the flag where it
    stands alone. instead: another field that sets the same thing, so that giving one of the two resets the other to 0.
    choices: the values that it may have, such as the keys of a dictionary; a Literal as its type does the same.
    """
    return dataclasses.field(default=default, metadata=metadata)


def cosmetic(default, **metadata):
    """Return a field, as `flag` does, that a resumed run may change without another result, bit for bit."""
    return flag(default, cosmetic=True, **metadata)


def cosmetic_names(cfg):
    """Return the names of the fields of `cfg` that were made by `cosmetic`."""
    return [f.name for f in dataclasses.fields(cfg) if f.metadata.get("cosmetic")]


def flag_names(field):
    """Return the names of a field's flag, the field's own first."""
    also = field.metadata.get("also", ())
    return [field.name, *([also] if isinstance(also, str) else also)]


def bare_value(field):
    """Return the value of a field's flag where it stands alone; None if it needs a value."""
    return field.metadata.get("bare", BARE.get(field.name))


def choices_of(field):
    """Return the values that a field may have, of a Literal or of its `choices`; () for any."""
    if type_of(field)[1]:
        return ()
    return tuple(field.metadata.get("choices", ())) or typing.get_args(field.type)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help fits a screen and whose errors are two lines: the slip, and a command to try."""

    absent = {}  # {name: why there is no such flag, and what to try}, of the configuration's class
    common = {}  # {purpose: names of the flags that people change}, of that class; {} shows all

    def __init__(self, *, add_help=True, **settings):
        super().__init__(add_help=False, **settings)
        if add_help:
            options = dict(nargs="?", metavar="all", default=argparse.SUPPRESS)
            self.add_argument("-h", "--help", action=_Help, help="one screen; with all: every flag", **options)

    def error(self, message):
        unknown = message.partition("unrecognized arguments:")[2]
        for word in re.findall(r"(?<!\S)--?[\w-]+", unknown):
            name = word.lstrip("-").replace("-", "_")
            if name in self.absent:
                self.exit(2, pasteable(f"error: {self.prog} has no {word}: {self.absent[name]}\n"))
            near = nearest(word.lstrip("-"), [option.lstrip("-") for option in self._option_string_actions])
            message += f" (did you mean --{near}?)" if near else ""
        if "\ntry: " not in message:
            message += f"\ntry: python {self.prog} --help"
        self.exit(2, pasteable(f"error: {message}\n"))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults; keep the line breaks of the script's docstring, and paths in one piece."""

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def from_cli(cls, doc="", argv=None, prog=None, by="", flatten=None, load=None, overrides=None):
    """Return cls() changed by --config FILE.yaml, then by the flags.

    A field is a flag. The comment that ends its line is the help, and the class that has it is the group, inherited
    fields included. A Literal gives choices, a bool --flag/--no-flag, a tuple takes any number of values, at once or
    flag by flag. --snake_case and --kebab-case both work. No default is None: say "", 0 or -1. See `flag` for what a
    field's metadata adds. --help shows one screen, the flags that an attribute `common` of the class lists by purpose;
    --help all shows all.

    `cls` may be {choice: class}: then the flag --`by` picks the class, and each variant has its own defaults and help.
    It may also be a function of that flag's value ("" if absent) -> class.
    `flatten` turns the keys of a bundle into flags before they are checked. `load` reads FILE instead (path -> dict,
    ValueError or UsageError); without it a field `config` of cls is an ordinary one.
    `overrides` (data_utils/overrides.py) makes KEY=VALUE a flag too. If it names a folder of bundles, `cls` is {choice:
    class}, its first class is the default, fields call bundles by name, and --multirun returns the Jobs of a sweep.

    Exits with status 2 on a typo, a wrong type or a bad choice, and names the nearest flag. Returns None in a notebook,
    where sys.argv is the kernel's: there call main(Config(...)).
    """
    if argv is None:
        share_cores()
        if not hasattr(sys.modules["__main__"], "__file__"):
            return None
        argv = sys.argv[1:]
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the shell closed it, as 2>&- does
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    argv = [re.sub("^--no_", "--no-", word) for word in argv]
    if overrides and overrides.folder:
        return _completed(overrides.read(cls, doc, argv, prog, by))

    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    short = {f.metadata["short"]: f"--{f.name}" for f in fields if "short" in f.metadata}
    argv = [{"-c": "--config", **short}.get(word, word) for word in argv]  # argparse would read -ci as -c i
    if overrides:
        argv = overrides.flags(_classes(cls), argv, prog)
    config_is_a_field = any(f.name == "config" for f in fields) and not load
    bundle, path = ([], "") if config_is_a_field else _bundle(argv, prog, flatten, load)
    if by:
        cls = _choose(cls, by, doc, bundle + argv, prog)

    # A bundle is only more flags: it has the same checks and errors, which then name the file.
    parser = parser_of(cls, doc, prog)
    error = parser.error
    if path:
        parser.error = lambda message: error(f"--config {path}: {message}")
    args = parse_layer(parser, cls, bundle)
    parser.error = error
    args = parse_layer(parser, cls, argv, args)
    return _completed(cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}))


def complete(cfg, cls, by="", **settings):
    """Return `cfg` as flags would have made it, for a configuration that was made in Python, not by from_cli.

    Bundles that its fields name (config, arch, env, logging) are loaded. They apply where `cfg` has its class's
    default. A plain Config whose field `by` picks another class becomes one of that class. Values get the types of
    their fields, see `coerced`. The other arguments are those of from_cli, whose results are returned as they are.
    Raises UsageError, naming the field, for a wrong type or a bundle that is not there.
    """
    if hasattr(cfg, COMPLETE):
        return cfg
    fields = {f.name: f for f in dataclasses.fields(cfg)}
    for name in vars(cfg).keys() - fields.keys():  # cfg.max_step = 3
        near = nearest(name, fields)
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(f"{name}: not a field of {type(cfg).__name__}{hint}")
    values = {name: _value(cfg, f) for name, f in fields.items()}
    changes = {name: value for name, value in values.items() if value != default_of(fields[name])}
    table = settings.get("overrides")
    naming = ("config", "resume", *table.bundles, *table.optional) if table else ("config",)
    words = [f"--{name}={changes[name]}" for name in naming if name in changes]
    if changes.get("multirun"):
        words.append("--multirun")
    variants = _variants(cls, by, type(cfg), values)
    bundle_may_pick = table and by not in changes and type(cfg) is next(iter(variants.values()))
    if by and not bundle_may_pick:
        words.append(f"--{by}={values[by]}")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            base = from_cli(variants, argv=words, by=by, **settings)
    except SystemExit:
        error = message.getvalue().removeprefix("error: ").partition("\ntry: ")[0].strip()
        raise UsageError(f"{error}\ntry: help({type(cfg).__name__})") from None
    if getattr(base, "multirun", False):
        raise UsageError(
            "multirun: a sweep starts from the command line, each of its jobs is a process\n"
            "try: python train_ae.py --multirun seed=0,1"
        )
    for name, value in changes.items():
        if not hasattr(base, name):
            picked = type(base).__name__
            raise UsageError(
                f"{name}={value!r}: not a field of {picked}, which {by}={values[by]!r} picks\ntry: help({picked})"
            )
    return _completed(dataclasses.replace(base, **_resets(fields.values(), changes), **changes))


def _classes(cls):
    """Return the dataclasses that the first argument of from_cli stands for."""
    if isinstance(cls, dict):
        return list(cls.values())
    return [cls if dataclasses.is_dataclass(cls) else cls("")]


def _variants(cls, by, kind, values):
    """Return the first argument of from_cli for a configuration of class `kind`; a class of the user's own stays."""
    if isinstance(cls, dict):
        return cls if kind in cls.values() else dict.fromkeys(cls, kind)
    if not by:
        return kind
    picked = cls(values[by])
    return lambda _: picked if issubclass(picked, kind) else kind


def _completed(cfg):
    setattr(cfg, COMPLETE, True)
    return cfg


# ---- values and types ------------------------------------------------------------------------------------------------


def _value(cfg, field):
    """Return the value of a field of `cfg`, coerced.

    `Config.domains = ["x"]` in a notebook changes the class, not the value that Config() has: it counts as an edited
    default.
    """
    value = coerced(field, getattr(cfg, field.name))
    class_value = getattr(type(cfg), field.name, field.default)
    edited = class_value is not field.default and value == default_of(field)
    return coerced(field, class_value) if edited else value


def default_of(field):
    """Return the default of a dataclass's field, coerced: the one in the script may have been edited."""
    return coerced(field, _as_written(field))


def _as_written(field):
    """Return the default as the script writes it; dataclasses want a default_factory in place of a list."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def type_of(field):
    """Return (type of a field, or of each value of a tuple; whether it is a tuple)."""
    default = _as_written(field)
    if isinstance(default, (tuple, list)) or (typing.get_origin(field.type) or field.type) in (tuple, list):
        inner = typing.get_args(field.type) or (str,)
        return inner[0], True
    return field.type if field.type in (bool, int, float, str) else type(default), False


def coerced(field, value):
    """Return `value` with the type of its field.

    A list becomes a tuple, a single value a tuple of one, a whole number a float, numpy's numbers Python's, a Path a
    text, where the field has that type. Raises UsageError, naming the field, for another type or none of its choices.
    """
    kind, several = type_of(field)
    value = value.tolist() if hasattr(value, "tolist") else value
    values = value if several and isinstance(value, (list, tuple)) else [value]
    choices = choices_of(field)
    expected = f"a tuple of {kind.__name__}" if several else kind.__name__
    if choices:
        expected = " or ".join(map(repr, choices))
    try:
        values = tuple(_as(kind, one) for one in values)
        if choices and values[0] not in choices:
            raise ValueError
    except ValueError:
        default = _as_written(field)
        if value is True and bare_value(field) is not None:
            default = bare_value(field)
        hint = "" if value is default else f"\ntry: {field.name}={default!r}"
        raise UsageError(f"{field.name}={value!r}: expected {expected}{hint}") from None
    return values if several else values[0]


def _as(kind, value):
    """Return `value` as a bool, int, float or str. Raises ValueError where that would change its meaning."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise ValueError
    return value


def at_least(cfg, low, *names):
    """Raise UsageError for the first of the fields `names` that is below `low`."""
    for name in names:
        if not getattr(cfg, name) >= low:  # nan is not
            raise UsageError(f"--{name} {getattr(cfg, name)}: expected {low} or more")


def one_of(cfg, *names):
    """Raise UsageError unless one of the fields `names`, which set the same thing, is above 0 and the others are 0."""
    at_least(cfg, 0, *names)
    if sum(getattr(cfg, name) > 0 for name in names) != 1:
        flags = " ".join(f"--{name} {getattr(cfg, name)}" for name in names)
        raise UsageError(f"{flags}: expected one of them, with 1 or more")


def below_one(cfg, *names):
    """Raise UsageError for the first of the fields `names` that is not at least 0 and below 1, as averages need."""
    for name in names:
        if not 0 <= getattr(cfg, name) < 1:
            raise UsageError(f"--{name} {getattr(cfg, name)}: expected 0 or more, and less than 1\ntry: --{name} 0.9")


def check_unicode(cfg, field):
    """Raise UsageError if a text of that field has bytes that are not UTF-8; Python keeps those as surrogates."""
    texts = getattr(cfg, field)
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            byte = ord(text[e.start]) & 0xFF
            raise UsageError(f"--{field}: character {e.start + 1} is the byte {byte:#x}, which is not UTF-8") from e


def check_name(cfg, field):
    """Raise UsageError unless that field, which becomes part of a path, is a plain name on every system."""
    name = getattr(cfg, field)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII):
        raise UsageError(f"--{field} {name}: letters, digits, dots, _ and -, at most 100, the first no sign")
    if re.fullmatch(r"(con|nul|aux|prn|com\d|lpt\d)(\..*)?", name, re.I):
        raise UsageError(f"--{field} {name}: a device of Windows\nfix: another name")


# ---- parsers ---------------------------------------------------------------------------------------------------------


def parser_of(cls, doc, prog, more=""):
    """Return a Parser with a flag for each field of the dataclass `cls`; `more` ends its help."""
    parser = Parser(prog=prog, description=doc, epilog=more, formatter_class=_Formatter, allow_abbrev=False)
    parser.absent = getattr(cls, "absent", {})
    parser.common = getattr(cls, "common", {})
    if "config" not in (f.name for f in dataclasses.fields(cls)):
        parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML file of flags; typed flags win")
    groups = {}
    for f in dataclasses.fields(cls):
        owner, comment = _origin(cls, f.name)
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner)
        try:
            options = dict(default=default_of(f), help=comment.replace("%", "%%"))
        except UsageError as e:  # someone edited it
            parser.error(f"the default of {e}")
        value_type, several = type_of(f)
        if value_type is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif several:
            options |= dict(type=value_type, nargs="*", action=_Several)
        else:
            options |= dict(type=value_type, choices=choices_of(f) or None)
        if bare_value(f):
            options |= dict(nargs="?", const=bare_value(f))
        flags = [f.metadata["short"]] if "short" in f.metadata else []
        flags += dict.fromkeys("--" + n for name in flag_names(f) for n in (name, name.replace("_", "-")))
        groups[owner].add_argument(*flags, **options)
    return parser


class _Several(argparse.Action):
    """Let --flag a --flag b mean --flag a b. A value from a lower layer, which is a tuple, is replaced."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*before, *values] if isinstance(before, list) else list(values))


def parse_layer(parser, cls, words, below=None):
    """Return the values of `words` above the namespace `below`; without one, above the defaults of the class `cls`.

    A flag of this layer resets its partner (see `instead` in `flag`), unless the layer gives both.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    paired = {name for f in fields.values() if "instead" in f.metadata for name in (f.name, f.metadata["instead"])}
    start = argparse.Namespace(**vars(below) if below else {})
    for name in paired:  # argparse leaves an attribute as it is, so that None means: not in this layer
        setattr(start, name, None)
    args = parser.parse_args(words, start)
    given = {name: getattr(args, name) for name in paired if getattr(args, name) is not None}
    resets = _resets(fields.values(), given)
    for name in paired - given.keys():
        setattr(args, name, resets.get(name, getattr(below, name) if below else default_of(fields[name])))
    return argparse.Namespace(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()})


def _resets(fields, given):
    """Return {name: 0} of the fields whose partner `given` sets, and not themselves."""
    fields = {f.name: f for f in fields}
    resets = {}
    pairs = [(f.name, f.metadata["instead"]) for f in fields.values() if "instead" in f.metadata]
    for pair in pairs:
        for name, partner in (pair, pair[::-1]):
            if given.get(partner, 0) > 0 and name not in given:
                resets[name] = type_of(fields[name])[0]()  # 0 or 0.0
    return resets


def _origin(cls, name):
    """Return (class whose body has the field, its trailing comment); no comment for a class typed into a notebook."""
    owner, comment = cls.__name__, " "
    for base in reversed(cls.__mro__[:-1]):
        try:
            match = re.search(rf"^\s+{name}\s*:.*?#\s*(.+?)\s*$", _source(base), re.M)
        except (OSError, TypeError):
            match = None
        owner = base.__name__ if name in base.__dict__.get("__annotations__", {}) else owner
        comment = match[1] if match else comment
    return owner, comment


_source = functools.cache(inspect.getsource)  # which parses the whole file each time


def _choose(variants, by, doc, argv, prog):
    """Return the class that flag `by` names; --help without that flag shows the flags that all variants share."""
    probe = Parser(prog=prog, add_help=False, allow_abbrev=False)
    probe.add_argument("--" + by, choices=variants if isinstance(variants, dict) else None, default="")
    name = getattr(probe.parse_known_args(argv)[0], by)
    if not isinstance(variants, dict):
        return variants(name)
    if name:
        return variants[name]
    first = next(iter(variants.values()))
    bases = tuple(c for c in first.__mro__[:-1] if all(issubclass(v, c) for v in variants.values()))
    shared = dataclasses.make_dataclass("Shared", [], bases=bases)
    parser = parser_of(shared, doc, prog, f"More flags and other defaults: --{by} {next(iter(variants))} --help")
    parser.add_argument("--" + by, choices=variants, required=True, help="which kind of model")
    parser.parse_args(argv)


# ---- one screen of help ---------------------------------------------------------------------------------------------


class _Help(argparse.Action):
    """Print one screen of help, or after `--help all` every flag, and exit."""

    def __call__(self, parser, namespace, value, option_string=None):
        print(parser.format_help() if value == "all" else _screen(parser), end="")
        parser.exit()


def _screen(parser):
    """Return the first two paragraphs of the parser's description and the flags of its `common`, or all without it."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help" and action.metavar != "FILE"}
    common = parser.common or dict(flags=" ".join(actions))
    groups = {title: [actions[name] for name in names.split() if name in actions] for title, names in common.items()}
    shown = [action for group in groups.values() for action in group]
    left = min(MOST_LEFT, 2 + max((len(_flag(action)) for action in shown), default=0))
    lines = ["\n\n".join(parser.description.strip("\n").split("\n\n")[:2])]
    for title, group in groups.items():
        lines += ["", title, *(_line_of(action, left) for action in group)]
    hidden = len(actions) - len(shown)
    rest = f"{hidden} more flags" if hidden else "every spelling of the flags"
    lines += ["", f"--help all lists {rest}."]
    if not any(action.dest == "config" for action in shown):
        lines[-1] = f"--config FILE.yaml reads flags from a file. {lines[-1]}"
    return "\n".join([*lines, *filter(None, [parser.epilog]), ""])


def _flag(action):
    """Return a flag with its default as it would be typed, or ... where that is no text."""
    default = action.default
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"  --{action.dest}"
    values = default if isinstance(default, (list, tuple)) else [default]
    text = " ".join(str(value) for value in values if value is not None)
    if len(text) > MOST_LEFT:
        text = textwrap.shorten(text, MOST_LEFT // 2, placeholder=" ...")
    return f"  --{action.dest} {text or '...'}"


def _line_of(action, left):
    """Return a flag, and in a column of its own the comment, on one or more lines."""
    comment = (action.help or "").replace("%%", "%")
    if action.choices:
        comment += f" ({', '.join(map(str, action.choices))})"
    elif action.default is True:
        comment += f" (--no-{action.dest}: off)"
    width = min(WIDEST, shutil.get_terminal_size().columns) - left
    lines = textwrap.wrap(" ".join(comment.split()), max(20, width), break_on_hyphens=False)
    flag = _flag(action)
    if len(flag) >= left:
        lines = ["", *lines]
    return f"\n{' ' * left}".join([flag.ljust(left) + (lines or [""])[0], *lines[1:]]).rstrip()


# ---- bundles ---------------------------------------------------------------------------------------------------------


def _bundle(argv, prog, flatten, load):
    """Return (the flags of --config FILE, FILE); ([], "") without one."""
    probe = Parser(prog=prog, add_help=False, allow_abbrev=False)
    probe.add_argument("--config", default="")
    path = probe.parse_known_args(argv)[0].config
    return (as_flags(path, probe.error, flatten, load), path) if path else ([], "")


def read_flags(path, error):
    """Return (content of the YAML file, its keys in order, duplicates included); `error` is called with a message."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        bundle = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:  # a date of month 13, 5000 digits, deep nesting
        message = f"--config {path}: {' '.join(str(e).split())}"
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        neighbours = sorted(folder.glob("*.yaml")) if isinstance(e, OSError) else []
        if neighbours:
            message += f"\nbundles there: {', '.join(map(str, neighbours))}"
        error(message)
    return bundle, [key.replace("-", "_") for key in re.findall(r"^([\w-]+)\s*:", text, re.M)]


def as_flags(path, error, flatten=None, load=None):
    """Return the words of flags that the YAML file at `path` stands for; `error` is called with a message.

    A file that is not there is looked for beside the scripts, which may be called from another folder.
    """
    keys = []
    if not Path(path).exists() and (root() / path).is_file():
        path = root() / path
    try:
        if load:
            bundle = load(path)
        else:
            bundle, keys = read_flags(path, error)
        if flatten and isinstance(bundle, dict):
            bundle = flatten(bundle)
    except (ValueError, UsageError) as e:
        error(f"--config {path}: {e}")
    words = []
    for key, value in bundle.items() if isinstance(bundle, dict) else [("", bundle)]:
        name = "--" + str(key)
        if isinstance(value, str):
            value = with_variables(value, lambda message, key=key: error(f"--config {path}: {key}: {message}"))
        nested = any(isinstance(v, (dict, list)) for v in (value if isinstance(value, list) else [value]))
        if value is None or nested or not key or keys.count(str(key).replace("-", "_")) > 1:
            error(f"--config {path}: {key or 'content'}: expected flat 'flag: value' lines, each flag once")
        elif isinstance(value, bool):
            words += [name if value else "--no-" + name[2:]]
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words += [f"{name}={value}"]
    return words


def with_variables(text, error):
    """Return a text with ${NAME:-default} replaced by the environment; `error` is called where it has no NAME."""

    def value(match):
        name, default = match.groups()
        if default is None and name not in os.environ:
            error(f"the environment has no {name}\nfix: export {name}=VALUE")
        return os.environ.get(name) or default or ""

    return re.sub(r"\$\{(\w+)(?::-([^{}]*))?\}", value, text)
