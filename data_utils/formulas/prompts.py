"""Prompts in front of a formula: its complexity, and terms that may, do or don't occur in it.

A prompt is <prompt> [<complexity> <float> </complexity>] [<allowed_term> PREFIX </allowed_term>] ... </prompt>, with
<include_term> and <exclude_term> alike. `data` is a DataConfig. A term is a tuple of ids.
"""

import numpy as np

from data_utils.formulas.distributions import parse_distribution

TAGS = dict(allowed="allowed_term", include="include_term", exclude="exclude_term")


def make_prompt(rng, prefix, others, alphabet, data):
    """Return the ids of a prompt for the ids `prefix`, and {place in the prompt: number}.

    others: skeletons (N, L), the source of terms that the formula lacks.
    """
    ids = alphabet.ids
    prompt = [ids["<prompt>"]]
    numbers = {}
    if rng.random() < data.complexity_probability:
        numbers[len(prompt) + 1] = float(len(prefix))
        prompt += [ids["<complexity>"], ids["<float>"], ids["</complexity>"]]
    present = subtrees(prefix, alphabet)
    longest = max(1, int(data.max_relative_length * len(prefix)))
    terms = dict(allowed=[], include=[], exclude=[])
    count = max(1, _draw_count(rng, data.allowed_actual))
    actual = _draw_terms(rng, present, count, longest, data) or [min(present, key=len)]
    if rng.random() < data.allowed_probability:
        count = _draw_count(rng, data.allowed_generated)
        terms["allowed"] = actual + _draw_absent(rng, present, others, count, longest, alphabet, data)
    if rng.random() < data.include_probability:
        order = rng.permutation(len(actual))
        terms["include"] = [actual[i] for i in order[: _draw_count(rng, data.include_count)]]
    if rng.random() < data.exclude_probability:
        count = _draw_count(rng, data.exclude_count)
        absent = _draw_absent(rng, present, others, count, longest, alphabet, data)
        terms["exclude"] = [term for term in absent if term not in terms["allowed"]]
    for name, drawn in terms.items():
        for i in rng.permutation(len(drawn)):
            prompt += [ids[f"<{TAGS[name]}>"], *drawn[i], ids[f"</{TAGS[name]}>"]]
    return [*prompt, ids["</prompt>"]], numbers


def subtrees(prefix, alphabet) -> list[tuple[int, ...]]:
    """Return the distinct sub-expressions of the ids `prefix`, itself included, as tuples in their order."""
    ends = []  # of the sub-expressions to the right, the nearest last
    terms = []
    for i in range(len(prefix) - 1, -1, -1):
        end = i + 1
        for _ in range(alphabet.arity[prefix[i]]):
            end = ends.pop()
        ends.append(end)
        terms.append(tuple(prefix[i:end]))
    return list(dict.fromkeys(reversed(terms)))


def _draw_count(rng, text):
    return int(parse_distribution(text)(rng, ()))


def _draw_terms(rng, terms, count, longest, data):
    """Draw up to `count` different terms. Each has a limit of its length, drawn from term_length, at most `longest`."""
    limits = np.minimum(parse_distribution(data.term_length)(rng, count), longest)
    remaining = [terms[i] for i in rng.permutation(len(terms))]
    chosen = []
    for limit in limits:
        term = next((term for term in remaining if len(term) <= limit), None)
        if term:
            remaining.remove(term)
            chosen.append(term)
    return chosen


def _draw_absent(rng, present, others, count, longest, alphabet, data):
    """Draw up to `count` terms of other skeletons that are not among `present`."""
    if not count:
        return []
    rows = others[rng.integers(0, len(others), 2 * count)].tolist()
    terms = dict.fromkeys(term for row in rows for term in subtrees([t for t in row if t], alphabet))
    return _draw_terms(rng, [term for term in terms if term not in present], count, longest, data)
