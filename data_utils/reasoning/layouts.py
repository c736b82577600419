"""The layouts in which questions and conversations are published -> pairs of prompt and answer.

prompt + response, completion or chosen (DPO); question + answer, response or answers (SQuAD); instruction, input +
output (Alpaca) or response (Dolly); messages (OpenAI) or conversations (ShareGPT) of turns with role and content, or
from and value. `system`, `history` and `context` beside them come before the question.
"""

import json
import math
import shlex
from pathlib import Path

from data_utils.files import unused

PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("question", "answers"),
    ("question", "response"),
    ("instruction", "response"),
)
TURNS = ("messages", "conversations", "chosen")
BEFORE = ("system", "system_prompt", "history", "context", "passage")  # in the order of the prompt
COLUMNS = {"input", *TURNS, *BEFORE, *(name for pair in PAIRS for name in pair)}
ASSISTANTS = ("assistant", "gpt", "model", "chatgpt", "bing", "bard", "claude", "bot", "ai")
OTHERS = ("user", "human", "system", "developer", "tool", "tool_call", "tool_response")
OTHERS += ("function", "function_call", "function_response", "observation")


def is_missing(value):
    """Return whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def advice(source, row):
    """Return the line of advice for a row (dict) of no known layout: the command that brings its fields into one."""
    texts = {str(name): value for name, value in row.items() if isinstance(value, str) and value.strip()}
    if not texts:
        return "fix: rows with a field of text"
    if len(texts) == 1:
        return f"try: --text-field {shlex.quote(*texts)} --fresh"
    output = shlex.quote(str(unused(f"{Path(source).stem}_qa.jsonl", "")))
    command = f"python prepare_data.py normalize-qa --input {shlex.quote(str(source))} --output {output}"
    pair = _pair_of(texts) or (list(texts) if len(texts) == 2 else None)
    if pair:
        question, answer = map(shlex.quote, pair)
        return f"try: {command} --question-field {question} --answer-field {answer} --skip-missing"
    names = ", ".join(texts)
    pair = f"{command} --question-field NAME --answer-field NAME --skip-missing"
    return f"fix: for the text of one field, --text-field with one of {names}; for questions and answers, {pair}"


def _pair_of(names):
    """Return the one name with "question" and the one with "answer" in it, or another of PAIRS; else None."""
    for pair in PAIRS:
        matches = [[name for name in names if word in name.lower()] for word in pair]
        if all(len(some) == 1 for some in matches) and matches[0] != matches[1]:
            return matches[0] + matches[1]
    return None


def string_of(value, name):
    """Return a value as text, None if it is missing.

    Numbers and booleans are written as in JSON, the items of a list are joined by line ends, a part {"type": "text"}
    is its text, a turn its content. Raises ValueError for any other object; `name` is its field.
    """
    if is_missing(value) or isinstance(value, str):
        return value if isinstance(value, str) else None
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list):
        texts = [string_of(item, name) for item in value]
        return "\n".join(text for text in texts if text is not None)
    if isinstance(value, dict) and value.get("type") in ("text", "input_text", "output_text"):
        return string_of(value.get("text"), name)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return _content(value)
    kind = value["type"] if isinstance(value, dict) and isinstance(value.get("type"), str) else type(value).__name__
    raise ValueError(f"{name} is {kind}, expected a string")


def pairs_of(row, counts):
    """Return [(prompt, answer), ...] of a row, None if it has no layout of questions. Fields may have any case.

    Counts what is left out, by reason, in `counts`. Raises ValueError for an unknown role or a value that is no text.
    """
    if not _has_layout(row):
        row = _lower(row)
    if not _has_layout(row):
        return None
    before = [text for name in BEFORE if (text := string_of(row.get(name), name))]
    for name in TURNS:
        if isinstance(row.get(name), list) and not (name == "chosen" and "prompt" in row):
            return _conversation(row[name], before, counts)
    for question, answer in PAIRS:
        if question in row and answer in row:
            if _are_turns(row[answer]):
                return _conversation(_all_turns(row[question], row[answer]), before, counts)
            prompt = string_of(row[question], question)
            text = string_of(_first(row[answer]) if answer == "answers" else row[answer], answer)
            if prompt is None or text is None:
                counts["no_question" if prompt is None else "no_answer"] += 1
                return []
            more = string_of(row.get("input"), "input") if question == "instruction" else None
            return [("\n".join([*before, prompt, *([more] if more else [])]), text)]
    return None


def has_layout(row):
    """Return whether a row holds questions or a conversation; its fields may have any case."""
    return _has_layout(row) or _has_layout(_lower(row))


def _lower(row):
    return {str(name).lower(): value for name, value in row.items()}


def _has_layout(row):
    return any(name in row for name in TURNS) or any(name in row and other in row for name, other in PAIRS)


def _are_turns(value):
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _all_turns(prompt, answer):
    """Return the turns of an answer with those of the prompt, which some data sets repeat in the answer."""
    if any(turn["role"] == "user" for turn in answer):
        return answer
    return [*(prompt if _are_turns(prompt) else [dict(role="user", content=prompt)]), *answer]


def _first(answers):
    """Return the first of several answers that are all right: ["a", "b"], [{"text": "a"}], {"text": ["a"]}."""
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list):
        return _first(answers[0]) if answers else None
    return answers


def _content(turn):
    """Return the text of a turn, with the calls of tools as JSON; None if there is none."""
    content = next((turn[name] for name in ("content", "value", "text") if turn.get(name) is not None), None)
    texts = [string_of(content, "content")]
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            texts.append(json.dumps(turn[name], ensure_ascii=False))
    return "\n".join(text for text in texts if text is not None) if any(text is not None for text in texts) else None


def _conversation(turns, before, counts):
    """Return a pair for each turn of an assistant: all texts before it, and its own."""
    texts = list(before)
    pairs = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {type(turn).__name__}, expected an object with role and content")
        role = turn.get("role") or turn.get("from")
        speaker = str(role).lower()
        if speaker not in ASSISTANTS + OTHERS:
            raise ValueError(
                f"unknown role: {role}; an answer is of {' '.join(ASSISTANTS)}; others: {' '.join(OTHERS)}"
            )
        text = _content(turn)
        if text is None:
            counts["turns_without_text"] += 1
            continue
        if speaker in ASSISTANTS and turn.get("weight") == 0:
            counts["answers_of_weight_0"] += 1  # OpenAI's mark for: read it, don't learn it
        elif speaker in ASSISTANTS:
            pairs.append(("\n".join(texts), text))
        texts.append(text)
    if not pairs:
        counts["no_answer"] += 1
    return pairs
