"""Turn questions and answers of any shape into one {"prompt": .., "response": ..} per line."""

import json
import re
import tempfile
import time
from array import array
from collections import Counter
from functools import partial
from pathlib import Path

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.files import check_replaceable, lock_run, make_room, warn, write_atomic
from data_utils.reasoning import sources
from data_utils.reasoning.layouts import string_of
from data_utils.stop import Stop
from data_utils.workers import cores, in_order

PROCESS_BYTES = 16 * 2**20  # input per process: starting a process takes as long as reading this much
EACH = "[]"  # the step of a path that makes a record per element
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\", "{{": "{", "}}": "}"}


def parse_path(text, flag):
    """Return the steps of "data[].answers.text[0]": names, numbers, EACH. Raises UsageError."""
    if not re.fullmatch(r"[^.\[\]]+(\[\d*\])*(\.[^.\[\]]+(\[\d*\])*)*", text):
        raise UsageError(f"--{flag} {text}: expected names and [i] like data.answers.text[0], or [] for each element")
    steps = re.findall(r"\[(\d*)\]|([^.\[\]]+)", text)
    return tuple(name or (int(number) if number else EACH) for number, name in steps)


def parse_template(text, flag):
    """Return [literal or (name,), ...] of a template. Raises UsageError.

    A pattern reads it, because str.format would also read attributes.
    """
    parts = []
    for word in re.findall(r"\{\{|\}\}|\{[^{}]*\}|\\[nt\\]|[{}]|[^{}\\]+|\\", text):
        name = word[1:-1] if word[0] == "{" and word[-1] == "}" else None
        if word in "{}" or (name is not None and name not in ("question", "answer", "context")):
            raise UsageError(
                f"--{flag}: {word}: choose {{question}}, {{answer}}, {{context}}; {{{{ and }}}} for braces"
            )
        parts.append((name,) if name else ESCAPES.get(word, word))
    return parts


def records(row, paths):
    """Yield one {name: text} for each element that the EACH steps of paths["question"] reach.

    The other paths start from the same elements, as far as they agree. A list stands for its first element, a list of
    paragraphs of the context for all of them; numbers and booleans become text, and a missing value (null, NaN) "".
    """
    main = paths["question"]
    edges = [i + 1 for i, step in enumerate(main) if step == EACH]  # lengths of the prefixes that end with EACH
    if not edges:
        yield {name: _text(_follow(row, steps), name) for name, steps in paths.items()}
        return

    def walk(bound):
        """Bind the next EACH step to each of its elements; bound: {prefix of the path: element}."""
        if len(bound) == len(edges) + 1:
            yield {name: _text(_resolve(bound, steps), name) for name, steps in paths.items()}
            return
        start = list(bound)[-1]
        elements = _follow(bound[start], main[len(start) : edges[len(bound) - 1] - 1])
        for element in elements if isinstance(elements, list) else []:
            yield from walk(bound | {main[: edges[len(bound) - 1]]: element})

    yield from walk({(): row})


def _resolve(bound, steps):
    """Follow a path from its longest bound prefix."""
    start = max((prefix for prefix in bound if steps[: len(prefix)] == prefix), key=len)
    return _follow(bound[start], steps[len(start) :])


def _follow(value, steps):
    for step in steps:
        if isinstance(value, list):
            number = step if isinstance(step, int) else 0
            value = value[number] if number < len(value) else None
            if not isinstance(step, str) or step == EACH:
                continue
        value = value.get(step) if isinstance(value, dict) and isinstance(step, str) else None
    return value


def _text(value, name):
    while isinstance(value, list) and name != "context":
        value = value[0] if value else None
    return "" if isinstance(value, dict) else string_of(value, name) or ""


def normalize_task(task, *, paths, templates, skip_missing):
    """Return (lines, counts) of one task."""
    lines = []
    counts = Counter()
    quoted = json.JSONEncoder(ensure_ascii=False).encode
    columns = {steps[0] for steps in paths.values()}
    for place, row in sources.rows(task, columns):
        if isinstance(row, ValueError):
            raise DataError(f"{sources.where(task, place)}: {row}\nfix: mend it")
        try:
            row_records = list(records(row, paths))
        except ValueError as e:
            raise DataError(f"{sources.where(task, place)}: {e}\nfix: another field") from None
        for record in row_records:
            counts.update(name for name, text in record.items() if text)
            missing = [name for name in ("question", "answer") if not record[name]]
            if missing and skip_missing:
                counts["skipped"] += 1
                counts[f"skipped without {missing[0]}"] += 1
                continue
            counts["incomplete"] += bool(missing)
            prompt, response = (_fill(template, record) for template in templates)
            line = f'{{"prompt": {quoted(prompt)}, "response": {quoted(response)}}}\n'
            lines.append(line.encode("utf-8", errors="replace"))
            counts["records"] += 1
    return lines, counts


def _fill(template, record):
    return "".join(record.get(part[0], "") if isinstance(part, tuple) else part for part in template)


def _is_normalized(path):
    """Return whether each line of a file has the form that is written here."""

    def fits(line):
        return line.startswith(b'{"prompt": "') and b'", "response": "' in line and line.endswith(b'"}\n')

    with open(path, "rb") as file:
        return all(map(fits, file))


def normalize(cfg):
    """Write the records of a file of questions as JSONL; cfg: NormalizeConfig of prepare_data.py."""
    started = time.monotonic()
    output = Path(cfg.output)
    if not (cfg.input and cfg.output and cfg.question_field and cfg.answer_field):
        raise UsageError("--input FILE --output FILE --question-field NAME --answer-field NAME: all are needed")
    at_least(cfg, 0, "num_threads", "max_records")
    fields = dict(question=cfg.question_field, answer=cfg.answer_field, context=cfg.context_field)
    paths = {name: parse_path(path, f"{name}_field") for name, path in fields.items() if path}
    templates = [parse_template(getattr(cfg, name), name) for name in ("prompt_template", "response_template")]
    uses_context = any(("context",) in template for template in templates)
    if uses_context and not cfg.context_field:
        raise UsageError("a template holds {context}, and no field is named for it\nfix: --context-field NAME")
    if cfg.context_field and not uses_context:
        message = f"--context_field {cfg.context_field}: no template holds {{context}}"
        raise UsageError(f"{message}\ntry: --prompt-template '{{context}}\\n{{question}}'")
    files = sources.find_files(cfg.input)
    check_replaceable(output, True, lambda path: True, flag="--output", inputs=files)
    share = max(1, sum(path.stat().st_size for path in files) // PROCESS_BYTES)
    processes = min(cfg.num_threads or cores(), cores(), share)
    function = partial(normalize_task, paths=paths, templates=templates, skip_missing=cfg.skip_missing)
    counts = Counter()
    stop = Stop()

    def write(file):
        """Write the lines in order; return where each one begins, for a shuffle."""
        offsets = array("q", [0])
        for lines, task_counts in in_order(function, sources.split_tasks(files), processes):
            room = cfg.max_records - counts["records"] if cfg.max_records else len(lines)
            counts.update(task_counts)
            file.write(b"".join(lines[:room]))
            for line in lines[:room] if cfg.shuffle else ():
                offsets.append(offsets[-1] + len(line))
            if cfg.max_records and counts["records"] >= cfg.max_records:
                counts["records"] = cfg.max_records
                break
            if stop:
                raise _Stopped
        return offsets

    def write_shuffled(file):
        import numpy as np

        with tempfile.TemporaryFile(dir=output.parent) as ordered:
            edges = np.array(write(ordered))
            for i in np.random.default_rng(cfg.seed).permutation(len(edges) - 1):
                ordered.seek(edges[i])
                file.write(ordered.read(edges[i + 1] - edges[i]))

    def write_checked(file):
        if cfg.shuffle:
            write_shuffled(file)
        else:
            write(file)
        lacking = [name for name in paths if not counts[name]]
        if not counts["records"] or lacking:
            first = next((row for task in sources.split_tasks(files) for _, row in sources.rows(task)), {})
            names = ", ".join(map(str, first)) or "none" if isinstance(first, dict) else first
            flags = ", ".join(f"--{name}-field" for name in lacking or ("question", "answer"))
            raise DataError(
                f"no {' and no '.join(lacking) or 'record'} in {cfg.input}: fields of the first row: {names}\n"
                f"fix: other {flags}"
            )
        make_room(output, _is_normalized)  # last, so that a failure changes nothing

    with lock_run(output.parent, output.name):
        if output.exists() and not cfg.fresh:
            raise UsageError(f"{output} is complete; --fresh makes it again\ntry: --fresh")
        try:
            with stop:
                write_atomic(output, write_checked)
        except _Stopped:
            print("stopped: nothing was written")
            return dict(stopped=stop.signal)
    megabytes = output.stat().st_size / 1e6
    reasons = [f"{counts[f'skipped without {name}']} without {name}" for name in ("question", "answer")]
    reasons = f" ({', '.join(reasons)})" if counts["skipped"] else ""
    seconds = time.monotonic() - started
    if counts["incomplete"]:
        warn(f"{counts['incomplete']} records have no question or no answer\ntry: --skip-missing --fresh")
    print(
        f"{output}: {counts['records']} records, {counts['question']} with a question, {counts['answer']} with an "
        f"answer, {counts['skipped']} skipped{reasons}; {megabytes:.1f} MB, {seconds:.1f} s"
    )
    return {}


class _Stopped(Exception):
    """A signal asked for a stop while the file was written."""
