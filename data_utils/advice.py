"""Make the advice in messages work when it is pasted into a shell.

After `try: ` and `next: ` stands a command, and after `fix: ` a sentence where no command helps.
"""

import os
import re
import shlex
import sys
from pathlib import Path

SCRIPT = r"(?:train_\w+|prepare_data|generate|plot)\.py"
FILE = rf"(?<!\S)(?:{SCRIPT}|scripts/\w+\.sh|requirements-data\.txt)(?!\S)"  # in the folder of the scripts
FLAG = r"--?(?:no[-_])?([A-Za-z][\w-]*)"
KEY = r"(?:\w+\.)*([a-z_]\w*)="  # of KEY=VALUE
EXCLUDED = dict(fresh=("resume", "resume_from"), resume=("fresh",), resume_from=("fresh",))  # by another flag


def pasteable(message):
    """Return a message with whole commands after `try: ` and `next: `.

    In the code an advice may also be flags or KEY=VALUE, which change the command that was typed, `without --flag`, or
    `the same command`. They stay as they are where no script of this project was typed, as in a notebook.
    """
    if not re.fullmatch(SCRIPT, Path(sys.argv[0]).name):
        return message
    return re.sub(r"(?m)\b(try|next): (.+)$", lambda match: f"{match[1]}: {_command(match[2])}", message)


def _command(advice):
    """Return an advice as a command; the scripts in it have the path of the one that was typed."""
    if advice == "the same command":
        return shlex.join(typed())
    if advice.startswith("without "):
        return shlex.join(_without(typed(), _names(advice.split())))
    if re.match(f"{FLAG}|{KEY}", advice):
        changes = shlex.split(advice)
        names = _names(changes)
        names += [other for name in names for other in EXCLUDED.get(name, ())]
        return shlex.join([*_without(typed(), names), *changes])
    place = Path(sys.argv[0]).parent
    return re.sub(FILE, lambda match: shlex.quote(str(place / match[0])), advice)


def typed():
    """Return the words of the command that started this program."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ["python"]
    if ranks > 1:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *sys.argv]


def _names(words):
    """Return the names of the flags and keys among words."""
    matches = [re.match(FLAG, word) or re.match(KEY, word) for word in words]
    return [match[1].replace("-", "_") for match in matches if match]


def _without(words, names):
    """Return words without the flags and keys `names` and their values."""
    kept = []
    dropped = False
    for word in words:
        if _names([word]):
            dropped = _names([word])[0] in names
            if not dropped:
                kept.append(word)
            dropped = dropped and "=" not in word
        elif not dropped:
            kept.append(word)
    return kept
