"""Domain folders of JSONL documents: <data_dir>/<domain>/*.jsonl, one {"text": "..."} per line."""

import json
import re
from pathlib import Path

from data_utils.errors import DataError

MAX_LINE_BYTES = 256 * 2**20
MALFORMED = ("invalid UTF-8", "invalid JSON", "not an object", 'no string "text"', "truncated last line")


def find_domains(data_dir, say=print):
    """Return {domain: sorted *.jsonl paths}, domains sorted. Raises DataError, showing the layout, if there is none."""
    root = Path(data_dir)
    domains = {}
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if not folder.name.startswith(".") and _stays_inside(folder, root, say) and folder.is_dir():
                paths = (path for path in sorted(folder.glob("*.jsonl")) if _stays_inside(path, root, say))
                domains[folder.name] = [path for path in paths if path.is_file()]
    if any(domains.values()):
        return domains
    message = f"no domain in {root}: expected {root}/<domain>/*.jsonl"
    if loose := sorted(root.glob("*.jsonl")):
        message += f"; {loose[0].name} lies in the root itself\n"
        message += f"try: mkdir -p {root}/my_domain && mv {root}/*.jsonl {root}/my_domain/"
    else:
        message += f"\ntry: python prepare_data.py expert --toy --data_dir {root}"
    raise DataError(message)


def read_documents(path, problems=None, skip_bad_lines=False):
    """Yield the text of each line that has one; count the others in problems {kind: [count, up to 5 examples]}.

    Raises DataError("file:line: reason") at a malformed line, unless skip_bad_lines, and at one above MAX_LINE_BYTES.
    """
    problems = {} if problems is None else problems
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):  # splits at b"\n" only: U+2028 is text
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes\ntry: split the document")
            kind, reason, text = _read_line(line)
            if kind:
                entry = problems.setdefault(kind, [0, []])
                entry[0] += 1
                if len(entry[1]) < 5:
                    entry[1].append(f"{path}:{number}: {reason}")
            if kind in MALFORMED and not skip_bad_lines:
                raise DataError(f"{path}:{number}: {reason}\ntry: mend the line, or --skip_bad_lines")
            if text:
                yield text


def cut(text, limit):
    """Yield pieces of at most `limit` characters whose token ids, concatenated, are those of the full text.

    Byte-level BPE also splits before a single space between two non-spaces, so pieces end there. A piece without such
    a place ends at the limit, which may cost a token but never a character.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        while end > start and not re.match(r"\S \S", text[end - 1 : end + 2]):
            end = text.rfind(" ", start, end)
        end = end if end > start else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def format_problems(problems):
    """Return problems {kind: [count, examples]} as a table."""
    lines = ["lines that are not plain documents:"]
    for kind, (count, examples) in sorted(problems.items()):
        lines += [f"  {count:>8}  {kind}", *(f"            {example}" for example in examples)]
    return "\n".join(lines)


def _stays_inside(path, root, say):
    try:
        inside = not path.is_symlink() or path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop or a broken link
        inside = False
    if not inside:
        say(f"warning: {path} is a link out of {root} or a loop: not followed")
    return inside


def _read_line(line):
    """Return (kind of problem or "", reason, text or "")."""
    if not line.strip():
        return "blank line", "ignored", ""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return "invalid UTF-8", f"invalid UTF-8: {e.reason}", ""
    except (ValueError, RecursionError) as e:  # deep nesting, integers of thousands of digits
        kind = "invalid JSON" if line.endswith(b"\n") else "truncated last line"
        return kind, f"{kind}: {e}", ""
    if not isinstance(row, dict):
        return "not an object", f'expected {{"text": "..."}}, found {type(row).__name__}', ""
    text = row.get("text")
    if not isinstance(text, str):
        return 'no string "text"', f'"text" is {type(text).__name__}' if "text" in row else '"text" is missing', ""
    if not text.strip():
        return "empty text", "skipped", ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate", "replaced by U+FFFD", re.sub("[\ud800-\udfff]", "\ufffd", text)
    return "", "", text
