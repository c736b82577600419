"""Text files of every kind, opened and decoded in one place, and the domain folders: <data_dir>/<domain>/**.

.jsonl     one document per line, {"text": "..."}
.txt .md   one document per file
.csv       one document per row, in the column "text"; these four may also end in .gz
.parquet   likewise; needs pyarrow

Endings may have any case. Text is UTF-8, with or without a byte order mark; UTF-16 and others are refused.
"""

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import re
import shlex
import sys
import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path

from data_utils.errors import DataError, UsageError

MAX_LINE_BYTES = 256 * 2**20
HEAD_BYTES = 2**16  # of a file, in which its encoding shows
MALFORMED = ("invalid UTF-8", "invalid JSON", "not an object", 'no string "text"', "truncated last line", "bad row")
WHOLE = (".txt", ".md")  # a file is one document
READ = (".jsonl", *WHOLE, ".csv", ".parquet")
TABLES = (".parquet", ".arrow")
BESIDE = ("readme", "license", "licence", "copying", "notice", "sources", "changelog")


# ---- one file --------------------------------------------------------------------------------------------------------


def suffix_of(path):
    """Return the ending that says how a file is read, in lower case and without .gz; "" for a compressed table."""
    path = Path(path)
    if path.suffix.lower() != ".gz":
        return path.suffix.lower()
    suffix = Path(path.stem).suffix.lower()
    return "" if suffix in TABLES else suffix


def describes(path):
    """Return whether a file describes the data beside it and holds none, by its name."""
    path = Path(path)
    return path.stem.lower() in BESIDE and path.suffix.lower() in WHOLE


@contextmanager
def open_text(path):
    """Open a text file, plain or .gz, for reading bytes of UTF-8.

    Raises DataError for UTF-16, UTF-32 and a damaged .gz file, OSError if the file can't be opened.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            check_encoding(path, file.read(HEAD_BYTES))
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path}: damaged .gz file: {e}") from e


def check_encoding(path, head):
    """Raise DataError if the mark or the NULs in the first bytes of a file show another encoding than UTF-8."""
    encoding = ""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "UTF-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "UTF-16"
    else:
        # Half of the bytes of Western text are NULs, always the same half. Spaces and line ends suffice.
        even, odd = head[::2].count(0), head[1::2].count(0)
        most = max(even, odd)
        if most > 1 and most * 40 > len(head) and most > 10 * min(even, odd):
            encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    if encoding:
        raise DataError(f"{path}: {encoding[:6]}, convert it: {iconv(path, encoding)}")


def iconv(path, encoding):
    """Return "iconv ..." and the line to type, which converts a file to UTF-8 and keeps the old one."""
    old, new = shlex.quote(f"{path}.{encoding}"), shlex.quote(str(path))
    command = f"iconv -f {encoding} -t UTF-8"
    if str(path) == "-":
        return command
    if Path(path).suffix.lower() == ".gz":
        return f"{command}\ntry: mv {new} {old} && gzip -dc < {old} | {command} | gzip > {new}"
    return f"{command}\ntry: mv {new} {old} && {command} {old} > {new}"


def how_to_mend(path, content):
    """Return the end of a message about bytes that are not UTF-8.

    The advice is to convert the file, unless part of `content` is UTF-8 beyond ASCII, which iconv would spoil.
    """
    if b"\0" not in content and content.decode("utf-8", errors="ignore").isascii():
        return f", perhaps CP1252, convert it: {iconv(path, 'CP1252')}"
    return "\nfix: mend the line"


def decode(content):
    """Return bytes of UTF-8 as text, without a byte order mark. Raises ValueError with the reason."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"invalid UTF-8: {e.reason}") from None
    if "\0" in text:
        raise ValueError("invalid text: a NUL byte")
    return text


def read_text(path):
    """Return the text of a whole file, of standard input for "-", with "\n" at the line ends.

    Raises DataError ("file:line: reason") for another encoding and for a file above MAX_LINE_BYTES, OSError if it
    can't be opened.
    """
    with nullcontext(sys.stdin.buffer) if str(path) == "-" else open_text(path) as file:
        content = file.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        raise DataError(f"{path}: text longer than {MAX_LINE_BYTES} bytes\ntry: split -C 200m {shlex.quote(str(path))}")
    check_encoding(path, content[:HEAD_BYTES])
    try:
        text = decode(content)
    except ValueError as e:
        line = next(number for number, line in enumerate(content.split(b"\n"), 1) if not _is_text(line))
        raise DataError(f"{path}:{line}: {e}{how_to_mend(path, content)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_text(line):
    try:
        decode(line)
    except ValueError:
        return False
    return True


def csv_rows(path):
    """Yield (line, {column: text}) of a .csv file, plain or .gz; a row with too many values is a ValueError instead.

    The header tells whether comma, semicolon, tab or bar separates. Raises DataError ("file:line: reason").
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_text(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        number = 1
        try:
            header = lines.readline()
            separator = max(",;\t|", key=header.count)
            reader = csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)
            for row in reader:
                number = reader.line_num
                if None in row:
                    row = ValueError(f"bad row: more values than the {len(reader.fieldnames)} columns: quote them")
                yield number, row
        except UnicodeDecodeError as e:
            message = f"invalid UTF-8: {e.reason}"
            raise DataError(f"{path}: after line {number}: {message}{how_to_mend(path, e.object)}") from e
        except csv.Error as e:
            raise DataError(f"{path}:{number + 1}: {e}\nfix: mend the quotes") from e


def import_pyarrow():
    """Return pyarrow with what reads tables. Raises UsageError."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UsageError("parquet and arrow need pyarrow\ntry: pip install pyarrow") from None
    return pyarrow


def open_parquet(path):
    """Return an open pyarrow.parquet.ParquetFile. Raises DataError, UsageError without pyarrow."""
    try:
        return import_pyarrow().parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # pyarrow raises both
        raise DataError(f"{path}: {str(e).splitlines()[0]}") from e


# ---- domain folders --------------------------------------------------------------------------------------------------


def find_domains(data_dir, names=()):
    """Return ({domain: paths in sorted order}, ignored paths); the domain is the name of the first folder.

    `names`: the domains to use, as --domains has them, with commas or without; () for all. Nested folders and links
    are followed. Hidden files are passed over in silence, others that are not read are returned as ignored. Raises
    DataError, showing the layout, if there is no file to read.
    """
    root = Path(data_dir)
    domains, loose, ignored = {}, [], []
    if root.is_file():
        remedy = f"a folder of domains, such as data with the file as data/my_domain/{root.name}"
        raise DataError(f"{root} is a file\nfix: {remedy}")
    if root.is_dir():
        around = {root.resolve(), *root.resolve().parents}  # a link to one of these is a loop
        for path in sorted(root.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and path.resolve() not in around:
                domains[path.name] = list(_files_below(path, around, ignored))
            elif path.is_symlink() and not path.is_file():
                ignored.append(path)
            elif suffix_of(path) in READ and path.name != "SOURCES.md":
                loose.append(path)
    if any(domains.values()):
        return _choose(domains, names, root), loose + ignored
    message = f"no domain in {root}: expected {root}/<domain>/*.jsonl (or {' '.join(READ[1:])})"
    if loose:
        folder = shlex.quote(str(root))
        ending = loose[0].name.partition(".")[2]
        message += f"; {loose[0].name} lies in the root itself\n"
        message += f"try: mkdir -p {folder}/my_domain && mv {folder}/*.{ending} {folder}/my_domain/"
    elif ignored:
        message += f"; {format_ignored(ignored)}"
        if ignored[0].suffix.lower() == ".json":
            old, new = (shlex.quote(str(path)) for path in (ignored[0], ignored[0].with_suffix(".jsonl")))
            message += f"\ntry: mv {old} {new}"
    else:
        message += f"\ntry: python prepare_data.py expert --toy --data_dir {shlex.quote(str(root))}"
    raise DataError(message)


def _choose(domains, names, root):
    names = sorted({name for words in names for name in words.split(",") if name})
    for name in names:
        if "/" in name or "\\" in name:
            raise UsageError(f"--domains {name}: a folder name of {root}, not a path")
        if name not in domains:
            above = root.parent
            remedy = f"\ntry: --data_dir {shlex.quote(str(above))}" if (above / name).is_dir() else ""
            raise DataError(f"no domain {name} in {root}; there are: {', '.join(domains)}{remedy}")
    return {name: domains[name] for name in names or domains}


def format_ignored(paths):
    """Return one line about the files of a data folder that are not read."""
    names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    return f"ignored: {files}: {names}; only {' '.join(READ)} in domain folders are read"


def _files_below(folder, around, ignored):
    """Yield the files of a folder that are read, and add the others to `ignored`; `around`: the folders around it."""
    around = around | {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.resolve() not in around:
            yield from _files_below(path, around, ignored)
        elif path.is_file() and suffix_of(path) in READ:
            yield path
        else:  # a loop or a broken link, too
            ignored.append(path)


def read_documents(path, problems=None, skip_bad_lines=False, text_field="text"):
    """Yield the text of each document in a file; count the others in problems {kind: [count, up to 5 examples]}.

    Raises DataError("file:line: reason") at a malformed line, unless skip_bad_lines, and at one above MAX_LINE_BYTES.
    """
    problems = {} if problems is None else problems
    texts = 0
    for place, kind, reason, text in _records(Path(path), text_field):
        if kind:
            entry = problems.setdefault(kind, [0, []])
            entry[0] += 1
            if len(entry[1]) < 5:
                entry[1].append(f"{path}{place}: {reason}")
        if kind in MALFORMED and not skip_bad_lines:
            if kind == "invalid UTF-8":
                reason += "; iconv -f CP1252 -t UTF-8 converts a file from Windows"
            advice = "--skip_bad_lines"
            if "--text_field" in reason and not texts:
                advice = reason[reason.index("--text_field") :]
            raise DataError(f"{path}{place}: {reason}\ntry: {advice}")
        if text:
            texts += 1
            yield text


def _records(path, text_field):
    """Yield (":line" or the like, kind of problem or "", reason, text or "") of each document of a file."""
    suffix = suffix_of(path)
    if suffix in WHOLE:
        yield "", *_checked_text(read_text(path))
    elif suffix == ".csv":
        for number, row in csv_rows(path):
            if isinstance(row, ValueError):
                yield f":{number}", "bad row", str(row), ""
            else:
                _check_column(path, row, text_field)
                yield f":{number}", *_checked_text(row[text_field] or "")
    elif suffix == ".parquet":
        table = open_parquet(path)
        try:
            if text_field not in table.schema_arrow.names:
                first = next(table.iter_batches(1), None)
                row = first.to_pylist()[0] if first else dict.fromkeys(table.schema_arrow.names)
                _check_column(path, row, text_field)
            batches = table.iter_batches(512, columns=[text_field], use_threads=False)
            values = (row[text_field] for batch in batches for row in batch.to_pylist())
            for number, value in enumerate(values):
                yield f": row {number}", *_checked_text("" if value is None else value)
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: {str(e).splitlines()[0]}") from e
    else:
        with open_text(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):  # splits at b"\n" only: U+2028 is text
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes\nfix: split the document"
                    )
                parts = [line]
                if b"\r" in line.rstrip(b"\r\n"):  # the line ends of an old Mac: a string of JSON holds none
                    parts = line.rstrip(b"\r\n").split(b"\r")
                for part in parts:
                    yield f":{number}", *_read_line(part, text_field)


def _check_column(path, columns, name):
    if name not in columns:
        near = difflib.get_close_matches(name, columns, 1)
        remedy = f"try: --text_field {shlex.quote(near[0] if near else _longest(columns))}"
        if name != "text" and not near:  # another file has it
            remedy = "fix: one name for --text_field that all files have"
        raise DataError(f"{path}: no column {name}; there are: {', '.join(columns)}\n{remedy}")


def _longest(row):
    """Return the field of a row whose text is the longest."""
    return max(row, key=lambda name: len(row[name]) if isinstance(row[name], str) else -1)


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


def _read_line(line, text_field):
    """Return (kind of problem or "", reason, text or "") of a line of JSON."""
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
        return "not an object", f'expected {{"{text_field}": "..."}}, found {type(row).__name__}', ""
    if text_field not in row:
        fields = ", ".join(row) or "none"
        hint = f"; one is read with --text_field {shlex.quote(_longest(row))}" if row else ""
        return 'no string "text"', f'"{text_field}" is missing; fields: {fields}{hint}', ""
    return _checked_text(row[text_field])


def _checked_text(text):
    """Return (kind of problem or "", reason, text or "") of a document."""
    if not isinstance(text, str):
        return 'no string "text"', f"the text is {type(text).__name__}, expected a string", ""
    if not text.strip():
        return "empty text", "skipped", ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate", "replaced by U+FFFD", re.sub("[\ud800-\udfff]", "\ufffd", text)
    return "", "", text
