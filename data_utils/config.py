"""One flat dataclass is the whole command line: one field, one flag, one line of help.

Imports no torch, so that --help and typos answer at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import typing
from pathlib import Path

from data_utils.errors import UsageError
from data_utils.launch import share_cores

BARE = {"resume": "latest"}  # flags that may stand alone, and the value they then have
COMPLETE = "_complete"  # attribute of a configuration whose bundles are read and whose types are checked


def flag(default, **metadata):
    """Return a dataclass field. also: a further name of its flag, or a tuple of names; short: one like -o.

    bare: the value of a flag that stands alone.
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = message.partition("unrecognized arguments:")[2]
        if "--fsdp" in unknown.split() and self.prog.startswith("train_"):
            message = f"{self.prog} has no --fsdp; train_expert.py, train_hrm.py and train_sr.py have"
            self.exit(2, f"error: {message}\ntry: torchrun --standalone --nproc-per-node 2 {self.prog}\n")
        for word in re.findall(r"(?<!\S)--?[\w-]+", unknown):
            close = difflib.get_close_matches(word, self._option_string_actions, 1)
            message += f" (did you mean {close[0]}?)" if close else ""
        self.exit(2, f"error: {message}\ntry: python {self.prog} --help\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults; keep the line breaks of the script's docstring, and paths whole."""

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def from_cli(cls, doc="", argv=None, prog=None, by="", flatten=None, load=None, overrides=None):
    """Return cls() changed by --config FILE.yaml, then by the flags.

    The comment that ends a field's line is its help, and the class that has the field its group, inherited fields
    included. A Literal gives choices, a bool --flag/--no-flag, a tuple takes any number of values, at once or flag by
    flag. --snake_case and --kebab-case both work. No default is None: say "", 0 or -1. A field's metadata may hold
    `bare`, the value of a flag that stands alone, `also`, a second name, and `short`, one like -o. `cls` may be
    {choice: class}: then the flag --`by` picks the class, so that each variant has defaults and help of its own; or a
    function of that flag's value ("" if absent) -> class.
    `flatten` turns the keys of a bundle into flags before they are looked at; `load` reads FILE instead (path -> dict,
    ValueError or UsageError). Without it a field `config` of cls is an ordinary one. With a table of `overrides`
    (data_utils/overrides.py), and cls {choice: class}, KEY=VALUE is a flag too, bundles have names, the first class is
    the default, and --multirun returns the Jobs of a sweep. Exits with status 2 on a typo, a wrong type or a bad
    choice, naming the nearest flag. Returns None in a notebook, where sys.argv is the kernel's: there call
    main(Config(...)).
    """
    if argv is None:
        share_cores()
        if not hasattr(sys.modules["__main__"], "__file__"):
            return None
        argv = sys.argv[1:]
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed, as by 2>&-: say it to nobody
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    argv = [re.sub("^--no_", "--no-", word) for word in argv]
    if overrides:
        return _completed(overrides.read(cls, doc, argv, prog, by))
    own = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    short = {f.metadata["short"]: f"--{f.name}" for f in own if "short" in f.metadata}
    argv = [{"-c": "--config", **short}.get(word, word) for word in argv]  # argparse would read -ci as -c i
    plain = any(f.name == "config" for f in own) and not load
    flags, path = ([], "") if plain else _bundle(argv, prog, flatten, load)
    if by:
        cls = _choose(cls, by, doc, flags + argv, prog)
    parser = parser_of(cls, doc, prog)
    error, bundle = parser.error, f"--config {path}: " if path else ""
    parser.error = lambda message: error(bundle + message)  # a bundle is only more flags: same checks, same errors
    args = tuples(parser.parse_args(flags))
    parser.error = error
    args = tuples(parser.parse_args(argv, args))
    return _completed(cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}))


def complete(cfg, cls, by="", **how):
    """Return `cfg` as flags would have made it, for a configuration that was made in Python, not by from_cli.

    Bundles that its fields name (config, arch, env, logging) are loaded. They apply where `cfg` has its class's
    default. A plain Config whose field `by` picks another class becomes one of that class. Values get the types of
    their fields, see `coerced`. The other arguments are those of from_cli, whose results are returned as they are.
    Raises UsageError, naming the field, for a wrong type or a bundle that is not there.
    """
    if hasattr(cfg, COMPLETE):
        return cfg
    known = {f.name: f for f in dataclasses.fields(cfg)}
    for name in vars(cfg).keys() - known.keys():  # cfg.max_step = 3
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{name}: not a field of {type(cfg).__name__}{hint}")
    values = {name: _value(cfg, f) for name, f in known.items()}
    typed = {name: value for name, value in values.items() if value != default_of(known[name])}
    table = how.get("overrides")
    naming = ("config", "resume", *table.bundles) if table else ("config",)
    words = [f"--{name}={typed[name]}" for name in naming if name in typed]
    if typed.get("multirun"):
        words.append("--multirun")
    variants = _variants(cls, by, type(cfg), values)
    bundle_may_pick = table and by not in typed and type(cfg) is next(iter(variants.values()))
    if by and not bundle_may_pick:
        words.append(f"--{by}={values[by]}")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            base = from_cli(variants, argv=words, by=by, **how)
    except SystemExit:
        error = message.getvalue().removeprefix("error: ").partition("\ntry: ")[0].strip()
        raise UsageError(f"{error}\ntry: help({type(cfg).__name__}), which lists the fields") from None
    if getattr(base, "multirun", False):
        raise UsageError("multirun: a sweep starts from the command line, each of its jobs is a process\n"
                         "try: python train_ae.py --multirun KEY=VALUE,VALUE")  # fmt: skip
    for name, value in typed.items():
        if not hasattr(base, name):
            picked = type(base).__name__
            raise UsageError(f"{name}={value!r}: not a field of {picked}, which {by}={values[by]!r} picks\n"
                             f"try: help({picked}), which lists the fields")  # fmt: skip
    return _completed(dataclasses.replace(base, **typed))


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


def _value(cfg, field):
    """Return the value of a field of `cfg`, coerced.

    `Config.domains = ["x"]` in a notebook changes the class, not what Config() holds: it counts as an edited default.
    """
    value = coerced(field, getattr(cfg, field.name))
    of_class = getattr(type(cfg), field.name, field.default)
    edited = of_class is not field.default and value == default_of(field)
    return coerced(field, of_class) if edited else value


def default_of(field):
    """Return the default of a dataclass's field, coerced: the one in the script may have been edited."""
    return coerced(field, _as_written(field))


def _as_written(field):  # dataclasses want a default_factory in place of a list
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def type_of(field):
    """Return (type of a field, or of each value of a tuple; whether it is a tuple)."""
    default = _as_written(field)
    if isinstance(default, (tuple, list)) or (typing.get_origin(field.type) or field.type) in (tuple, list):
        inner = typing.get_args(field.type) or (str,)
        return inner[0], True
    return field.type if field.type in (bool, int, float, str) else type(default), False


def coerced(field, value):
    """Return `value` as the field holds it.

    A list becomes a tuple, a single value a tuple of one, a whole number a float, numpy's numbers Python's, a Path a
    text, where the field has that type. Raises UsageError, naming the field, for another type or none of its choices.
    """
    kind, several = type_of(field)
    value = value.tolist() if hasattr(value, "tolist") else value
    values = value if several and isinstance(value, (list, tuple)) else [value]
    choices = () if several else typing.get_args(field.type)
    expected = f"a tuple of {kind.__name__}" if several else kind.__name__
    if choices:
        expected = " or ".join(map(repr, choices))
    try:
        values = tuple(_as(kind, one) for one in values)
        if choices and values[0] not in choices:
            raise ValueError
    except ValueError:
        default = _as_written(field)
        hint = "" if value is default else f"\ntry: {field.name}={default!r}"
        raise UsageError(f"{field.name}={value!r}: expected {expected}{hint}") from None
    return values if several else values[0]


def _as(kind, value):
    """Return `value` as a bool, int, float or str. Raises ValueError where that would change what it says."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise ValueError
    return value


def tuples(args):
    return argparse.Namespace(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()})


class _Several(argparse.Action):
    """--flag a --flag b is --flag a b; what stood there before this command line, a tuple, is replaced."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*before, *values] if isinstance(before, list) else list(values))


def at_least(cfg, low, *names):
    """Raise UsageError for the first of the fields `names` that is below `low`."""
    for name in names:
        if not getattr(cfg, name) >= low:  # nan is not
            raise UsageError(f"--{name} {getattr(cfg, name)}: expected {low} or more")


def below_one(cfg, *names):
    """Raise UsageError for the first of the fields `names` that is not at least 0 and below 1, as averages need."""
    for name in names:
        if not 0 <= getattr(cfg, name) < 1:
            raise UsageError(f"--{name} {getattr(cfg, name)}: expected 0 or more, and less than 1\ntry: --{name} 0.9")


def check_name(cfg, field):
    """Raise UsageError unless that field, which becomes part of a path, is a plain name on every system."""
    name = getattr(cfg, field)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII):
        raise UsageError(f"--{field} {name}: letters, digits, dots, _ and -, at most 100, the first no sign")
    if re.fullmatch(r"(con|nul|aux|prn|com\d|lpt\d)(\..*)?", name, re.I):
        raise UsageError(f"--{field} {name}: a device of Windows\ntry: another name")


def parser_of(cls, doc, prog):
    parser = Parser(prog=prog, description=doc, formatter_class=_Formatter, allow_abbrev=False)
    if "config" not in (f.name for f in dataclasses.fields(cls)):
        parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML file of flags; typed flags win")
    groups = {}
    for f in dataclasses.fields(cls):
        owner, comment = _origin(cls, f.name)
        group = groups.setdefault(owner, parser.add_argument_group(owner) if owner not in groups else None)
        try:
            kind = dict(default=default_of(f), help=comment.replace("%", "%%"))
        except UsageError as e:  # it was edited
            parser.error(f"the default of {e}")
        value_type, several = type_of(f)
        if value_type is bool:
            kind |= dict(action=argparse.BooleanOptionalAction)
        elif several:
            kind |= dict(type=value_type, nargs="*", action=_Several)
        else:
            kind |= dict(type=value_type, choices=typing.get_args(f.type) or None)
        if bare := f.metadata.get("bare", BARE.get(f.name)):
            kind |= dict(nargs="?", const=bare)
        flags = [*filter(None, [f.metadata.get("short")])]
        flags += dict.fromkeys("--" + n for name in flag_names(f) for n in (name, name.replace("_", "-")))
        group.add_argument(*flags, **kind)
    return parser


def _origin(cls, name):
    """Return (class whose body has the field, its trailing comment); no comment for a class typed into a notebook."""
    owner, comment = cls.__name__, " "
    for base in reversed(cls.__mro__[:-1]):
        try:
            found = re.search(rf"^\s+{name}\s*:.*?#\s*(.+?)\s*$", _source(base), re.M)
        except (OSError, TypeError):
            found = None
        owner = base.__name__ if name in base.__dict__.get("__annotations__", {}) else owner
        comment = found[1] if found else comment
    return owner, comment


_source = functools.cache(inspect.getsource)  # which parses the whole file each time


def _choose(variants, by, doc, argv, prog):
    """Return the class that flag `by` names; --help without that flag shows what all variants share."""
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
    parser = parser_of(shared, f"{doc}\nMore flags and other defaults: --{by} {next(iter(variants))} --help", prog)
    parser.add_argument("--" + by, choices=variants, required=True)
    parser.parse_args(argv)


def _bundle(argv, prog, flatten, load):
    """Return (the flags of --config FILE, FILE); ([], "") without one."""
    probe = Parser(prog=prog, add_help=False, allow_abbrev=False)
    probe.add_argument("--config", default="")
    path = probe.parse_known_args(argv)[0].config
    return (as_flags(path, probe, flatten, load), path) if path else ([], "")


def read_flags(path, parser):
    """Return (what the YAML file holds, the keys as they stand there, also those that stand there twice)."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        bundle = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:  # a date of month 13, 5000 digits, deep nesting
        there = ", ".join(map(str, sorted(Path(path).parent.glob("*.yaml")))) if isinstance(e, OSError) else ""
        parser.error(f"--config {path}: {' '.join(str(e).split())}" + f"\nbundles there: {there}" * bool(there))
    return bundle, [key.replace("-", "_") for key in re.findall(r"^([\w-]+)\s*:", text, re.M)]


def as_flags(path, parser, flatten, load):
    keys = []
    if load:
        try:
            bundle = load(path)
        except (ValueError, UsageError) as e:
            parser.error(f"--config {path}: {e}")
    else:
        bundle, keys = read_flags(path, parser)
    if flatten and isinstance(bundle, dict):
        try:
            bundle = flatten(bundle)
        except ValueError as e:
            parser.error(f"--config {path}: {e}")
    flags = []
    for key, value in bundle.items() if isinstance(bundle, dict) else [("", bundle)]:
        flag = "--" + str(key)
        nested = any(isinstance(v, (dict, list)) for v in (value if isinstance(value, list) else [value]))
        if value is None or nested or not key or keys.count(str(key).replace("-", "_")) > 1:
            parser.error(f"--config {path}: {key or 'content'}: expected flat 'flag: value' lines, each flag once")
        elif isinstance(value, bool):
            flags += [flag if value else "--no-" + flag[2:]]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [f"{flag}={value}"]
    return flags
