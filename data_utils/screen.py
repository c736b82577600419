"""Format one screen of help: the flags that people change, a line each. `--help all` is argparse's own help."""

import argparse
import shutil
import textwrap

WIDEST = 100  # columns of a screen
LEFT = 38  # most columns of a flag and its default


class Help(argparse.Action):
    """Print one screen of help, or after `--help all` every flag, and exit."""

    def __call__(self, parser, namespace, value, option_string=None):
        print(parser.format_help() if value == "all" else screen(parser), end="")
        parser.exit()


def screen(parser):
    """Return the first two paragraphs of the parser's description and the flags of its `common`, or all without it."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help" and action.metavar != "FILE"}
    common = parser.common or dict(flags=" ".join(actions))
    groups = {title: [actions[name] for name in names.split() if name in actions] for title, names in common.items()}
    shown = [action for group in groups.values() for action in group]
    left = min(LEFT, 2 + max((len(_flag(action)) for action in shown), default=0))
    lines = ["\n\n".join(parser.description.strip("\n").split("\n\n")[:2])]
    for title, group in groups.items():
        lines += ["", title, *(_line(action, left) for action in group)]
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
    if len(text) > LEFT:
        text = textwrap.shorten(text, LEFT // 2, placeholder=" ...")
    return f"  --{action.dest} {text or '...'}"


def _line(action, left):
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
