"""Lay out text, code and grids as pages of symbols, and read them back. models/glyphs.py numbers and draws symbols.

n symbols of a text, R rows and C columns of a page. This file needs no torch, so processes that build pages start fast.
"""

import re

import numpy as np

from models.glyphs import END, HOLE, NEWLINE, PADDING, SYMBOLS

RENDERER_VERSION = 1  # raised when any pixel of models/glyphs.py or any symbol changes: older data then differ
TAB = "    "

FROM_BYTE = np.full(256, ord("?") - 32, np.uint8)
FROM_BYTE[32:127] = np.arange(95)
FROM_BYTE[ord("\n")] = NEWLINE
TO_TEXT = [*map(chr, range(32, 127)), *"0123456789", *[""] * (SYMBOLS - 105)]
TO_TEXT[NEWLINE], TO_TEXT[HOLE] = "\n", "_"


def to_symbols(text):
    """Return text as symbols (n,) uint8. A tab is four spaces; a character that is not printable ASCII is "?"."""
    return FROM_BYTE[np.frombuffer(text.replace("\t", TAB).encode("ascii", "replace"), np.uint8)]


def lost(text):
    """Return how many characters of a text have no symbol and become "?"."""
    return len(re.findall(r"[^ -~\n\t]", text))


def to_text(symbols):
    """Return symbols of any shape, row after row, as text up to the first END or PADDING.

    A hole is "_", a colour its digit. Symbols without a character, such as OUTSIDE, are skipped.
    """
    symbols = np.asarray(symbols).reshape(-1)
    ends = np.flatnonzero((symbols == END) | (symbols == PADDING))
    return "".join([TO_TEXT[symbol] for symbol in symbols[: ends[0] if len(ends) else None].tolist()])


def layout(text, rows, cols, mode="flow"):
    """Return the page (rows, cols) uint8 of a text or its symbols (n,); the rest that does not fit is cut off.

    mode flow: a newline is a cell like any other. END and then PADDING follow the text unless the page is full, so page
    and text determine each other. mode wrap: rows break between words and at newlines, and are filled with spaces.
    """
    symbols = to_symbols(text) if isinstance(text, str) else np.asarray(text, np.uint8)
    if mode == "wrap":
        symbols = _wrapped(symbols.tobytes(), rows, cols)
    page = np.full(rows * cols + 1, PADDING, np.uint8)
    n = min(len(symbols), rows * cols)
    page[:n], page[n] = symbols[:n], END
    return page[:-1].reshape(rows, cols)


def _wrapped(symbols, rows, cols):
    """Break bytes of symbols into at most `rows` rows, all but the last one filled up with spaces (byte 0): (n,)."""
    parts = []
    for line in symbols.split(bytes([NEWLINE])):
        start = 0
        while len(line) - start > cols and len(parts) < rows:
            end = line.rfind(b"\0", start + 1, start + cols + 1)  # the space itself may lie beyond the edge
            parts.append(line[start : end if end > 0 else start + cols])  # a word longer than a row is cut
            start = end + 1 if end > 0 else start + cols
        parts.append(line[start:])
        if len(parts) >= rows:
            break
    return np.frombuffer(b"".join([line.ljust(cols, b"\0") for line in parts[:-1]]) + parts[-1], np.uint8)
