"""Texts to read, to continue, and with a name to fill in: made-up stories, Python code, the user's files.

A story has a cast (hero, thing, place), drawn first. The first sentence names the cast, and so does the last one, which
only the page tells. Each choice is uniform, so the probability of a story is a product, and no model can fall below the
nats of its end. R x C cells of a page, L symbols of a target.
"""

import bisect
import hashlib
import itertools
import keyword
import math
import os
import re
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from data_utils.documents import MALFORMED, read_documents, read_text
from data_utils.errors import DataError
from data_utils.files import warn
from data_utils.pages.render import TAB, layout, lost, to_symbols, to_text
from models.glyphs import HOLE

WORDS = dict(
    thing="kite drum lamp ring coin boat book cup key hat box bell doll rope stick stone shell flag harp flute mirror "
    "basket candle ladder hammer needle button ribbon pencil letter map spoon bowl knife pot wheel cart saddle pillow "
    "carpet teapot kettle bucket barrel broom shovel rake clock watch glove scarf boot coat belt crown sword shield "
    "mask puzzle",
    place="mill barn hill lake tower bridge forest garden castle cellar harbor market temple tunnel valley desert "
    "river pond cave field meadow shed stable school shop street square port beach cliff swamp hut house lodge church "
    "camp farm yard well mine",
    adjective="big tiny new shiny heavy soft loud brave quiet warm cold funny dusty round flat sweet plain sharp clean "
    "broken wooden golden silver hollow simple pretty",
    animal="cat dog hen goat duck frog bear crow mole rabbit badger lizard parrot monkey turtle pigeon",
    colour="red blue green yellow white black brown grey pink purple",
    number="two three four five six seven eight nine ten twelve",
    time="day night morning evening summer winter spring week",
)
WORDS = {kind: words.split() for kind, words in WORDS.items()}
SOUNDS = "BDFGKLMNPRSTVZ", "aiou", "bdfgklmnprstv", "aeiou", ("", "l", "n", "r")  # of a hero's name
CAST = "hero", "thing", "place"
OPENINGS = """{hero} had a {adjective} {thing} in the {place}.
{hero} found a {thing} by the {place}.
Once {hero} left a {thing} in the {place}.
In the {place}, {hero} saw a {adjective} {thing}.
At the {place} {hero} made a {thing}.
A {adjective} {thing} fell on {hero} in the {place}.
{hero} ran to the {place} with a {thing}.
One {time} {hero} took a {thing} to the {place}.
Near the {place} {hero} hid a {adjective} {thing}.
{hero} lost a {thing} behind the {place}.
Who put a {thing} in the {place}? It was {hero}.
The {place} was dark. {hero} held a {thing}.
{hero} got a {thing} from a {animal} at the {place}.
There was a {thing} at the {place} for {hero}.
{hero} wanted a {thing} for the {place}.
Up in the {place} {hero} kept a {adjective} {thing}.
{hero} painted a {colour} {thing} at the {place}.
A {thing} stood in the {place}. {hero} liked it.
{hero} bought a {thing} at the {place} one {time}.
Long ago {hero} lost a {thing} at the {place}."""
MIDDLES = """It was {adjective}, but not {adjective} enough.
A {colour} {animal} came to look.
{hero} showed it to the {animal}.
The {thing} made a {adjective} sound.
All {time} it rained on the {place}.
There were {number} {animal}s near the {place}.
"What a {adjective} {thing}!" said {hero}.
"May I have it?" asked the {animal}.
{hero} did not know what to do.
The wind blew, and the {thing} shook.
The {animal} and {hero} played until noon.
Nobody came to the {place} that {time}.
{hero} counted to {number} and waited.
"It costs {number} coins," said the {animal}.
The sky turned {colour} over the {place}.
For {number} hours {hero} sang a {adjective} song.
The {animal} ate {number} plums.
{hero} wrapped the {thing} in {colour} cloth.
Was it {adjective}? Yes, it was.
They walked {number} miles and rested.
The {thing} was as {adjective} as a {animal}.
A {adjective} man asked the way to the {place}.
"I am {hero}," said {hero}, and bowed.
Soon the {animal} fell asleep."""
CLOSINGS = """At last {hero} took the {thing} home from the {place}.
Then {hero} left the {thing} at the {place} for good.
So {hero} gave the {thing} to a {animal} of the {place}.
In the end {hero} and the {thing} stayed in the {place}.
Later {hero} sold the {adjective} {thing} near the {place}.
That {time} {hero} broke the {thing} in the {place}.
Now the {thing} of {hero} hangs in the {place}.
Since then {hero} keeps the {thing} far from the {place}.
Today the {place} is where {hero} shows the {thing}.
Finally the {animal} found {hero}, the {thing} and the {place}.
When {time} came, {hero} hid the {thing} in the {place}.
Still the {thing} that {hero} loved lies in the {place}.
Back at the {place} {hero} cleaned the {adjective} {thing}.
No one but {hero} saw the {thing} leave the {place}.
How {adjective} {hero} was to have the {thing} and the {place}!
Ever since, the {place} is full: {hero} has the {thing}."""
TEMPLATES = {
    kind: [re.split(r"{(\w+)}", line) for line in lines.split("\n")]
    for kind, lines in dict(opening=OPENINGS, middle=MIDDLES, closing=CLOSINGS).items()
}
PATTERNS = dict(hero="".join(f"({'|'.join(sounds)})" for sounds in SOUNDS))
PATTERNS |= {kind: "|".join(words) for kind, words in WORDS.items()}
WITHOUT = "test tests idle_test encodings pydoc_data site-packages".split()  # tests, similar tables, other packages
NAME_LENGTHS = range(3, 16)  # of an identifier to fill in
TOKENS = re.compile(  # strings and comments, which may hold words that look like names; then names
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*|\b([A-Za-z_]\w*)', re.ASCII
)
SHOWN = "".join(to_text(to_symbols(chr(byte)))[0] for byte in range(256)).encode()  # the character that a page shows


def cast_of(draw):
    """Draw one of about 57 million casts {hero, thing, place}; return it and its nats."""
    hero = "".join([draw.choice(sounds) for sounds in SOUNDS])
    cast = dict(hero=hero, thing=draw.choice(WORDS["thing"]), place=draw.choice(WORDS["place"]))
    return cast, sum(math.log(len(words)) for words in (*SOUNDS, WORDS["thing"], WORDS["place"]))


def sentence(draw, kind, cast):
    """Draw a sentence of a kind ("opening", "middle", "closing") with this cast; return it and its nats."""
    parts = draw.choice(TEMPLATES[kind])
    words, nats = list(parts), math.log(len(TEMPLATES[kind]))
    for i, slot in enumerate(parts[1::2]):
        words[2 * i + 1] = cast[slot] if slot in cast else draw.choice(WORDS[slot])
        nats += 0 if slot in cast else math.log(len(WORDS[slot]))
    return "".join(words), nats


@cache
def longest(kind):
    """Return the number of characters of the longest sentence of a kind."""
    most = {slot: max(map(len, words)) for slot, words in WORDS.items()} | dict(hero=len(SOUNDS))
    return max(sum(map(len, parts[::2])) + sum(most[slot] for slot in parts[1::2]) for parts in TEMPLATES[kind])


def story(draw, cells, cast):
    """Draw a story of at most `cells` characters; return (text, nats, end, end_nats).

    text is the story without its last sentence, which is `end` and begins with a space. nats: -log of the probability
    of `text`, given the cast and `cells`; end_nats: that of `end`, given `text`. The number of middle sentences is
    between half of those that surely fit and all of them.
    """
    text, nats = sentence(draw, "opening", cast)
    most = (cells - longest("opening")) // (longest("middle") + 1)
    for _ in range(draw.randint(most // 2, most)):
        more, choices = sentence(draw, "middle", cast)
        text, nats = f"{text} {more}", nats + choices
    end, end_nats = sentence(draw, "closing", cast)
    return text, nats + math.log(most - most // 2 + 1), f" {end}", end_nats


@cache
def _closings():
    """Return [(pattern, nats)] of the closing sentences."""
    closings = []
    for parts in TEMPLATES["closing"]:
        slots = {slot: f"(?P<{slot}>{PATTERNS[slot]})" for slot in parts[1::2]}
        pattern = "".join(slots[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
        nats = sum(math.log(len(WORDS[slot])) for slot in slots if slot not in CAST)
        closings.append((re.compile(f" ?{pattern}"), math.log(len(TEMPLATES["closing"])) + nats))
    return closings


def ending(text):
    """Return the cast and the nats of the last sentence of a story; None for other text."""
    for pattern, nats in _closings():
        if match := pattern.fullmatch(text):
            return {name: match[name] for name in CAST}, nats
    return None


def floor(targets):
    """Return -log of the probability of targets (n, L) of `continue`, nats (n,) float64; NaN unless from a story.

    Divide by the scored symbols and by ln 2 for the bits per character that no model can fall below.
    """
    endings = [ending(to_text(target)) for target in np.asarray(targets)]
    return np.array([end[1] if end else math.nan for end in endings])


def words(text):
    """Return the words of a text, or the possible names in code, in order."""
    return re.findall(r"\b[A-Za-z_]\w*", text)


class Stories:
    """Made-up stories for `read` and `continue`; the cast must not leak."""

    label = "made-up stories"

    def __init__(self, task):
        self.task = task
        tables = repr((WORDS, SOUNDS, OPENINGS, MIDDLES, CLOSINGS)).encode()
        self.spec = dict(name="stories", version=1, tables=_hash(tables))

    def subject(self, draw):
        """Return a cast, as bytes and as a dict."""
        cast, _ = cast_of(draw)
        return " ".join(cast.values()).encode(), cast

    def sample(self, draw, cast):
        """Return page (R, C) and target (L,): for `read` a piece that fills the page, for `continue` story and end."""
        task = self.task
        cells = task.rows * task.cols
        if task.name == "continue":
            text, _, end, _ = story(draw, cells, cast)
            return layout(text, task.rows, task.cols), layout(end, 1, task.length)[0]
        text, _ = sentence(draw, "opening", cast)
        while len(text) < cells:
            text += " " + sentence(draw, "middle", cast)[0]
        text += " " + sentence(draw, "closing", cast)[0]
        return _read(text[draw.randint(0, len(text) - cells) :], task)


class Passages:
    """Pieces of given texts {name: text} for `read`, `continue` and `fill`; a text must not leak.

    by_lines: a piece starts at the start of a line. Texts shorter than a page and its answer are skipped.
    """

    def __init__(self, task, texts, by_lines):
        self.task, self.by_lines = task, by_lines
        self.size = task.rows * task.cols + (task.length if task.name == "continue" else 0)
        texts, total = {name: text for name, text in texts.items() if len(text) >= self.size}, len(texts)
        self.label = f"{len(texts)} texts of {self.size} or more characters, of {total}"
        if not texts:
            raise DataError(f"{task.name}: {self.label}\nfix: more or longer text, or smaller pages")
        self.texts, self.name_spans = list(texts.values()), {}
        self.hashes = [_hash(text.encode()) for text in self.texts]
        self.ends = list(itertools.accumulate(len(text) - self.size + 1 for text in self.texts))
        if by_lines:
            self.spec = dict(name="files", version=1, files=dict(zip(texts, self.hashes, strict=True)))
        else:
            self.spec = dict(name="rows", version=1, rows=len(texts), hash=_hash("".join(self.hashes).encode()))

    def subject(self, draw):
        """Draw a text, as its hash and as its number; a long text holds more pieces, so it comes more often."""
        number = bisect.bisect(self.ends, draw.randrange(self.ends[-1]))
        return self.hashes[number].encode(), number

    def sample(self, draw, number):
        """Return page (R, C) and target (L,); None for `fill` if no name occurs twice in the piece."""
        task, text = self.task, self.texts[number]
        start = draw.randint(0, len(text) - self.size)
        start = text.rfind("\n", 0, start) + 1 if self.by_lines else start
        if task.name == "fill":
            return self._fill(draw, number, start)
        page, target = _read(text[start:], task)
        if task.name == "continue":
            target = to_symbols(text[start : start + self.size][-task.length :])
        return page, target

    def _fill(self, draw, number, start):
        task, text = self.task, self.texts[number]
        begins, ends = self._names(number)
        inside = slice(begins.searchsorted(start), ends.searchsorted(start + self.size, "right"))
        places = {}
        for begin, end in zip(begins[inside].tolist(), ends[inside].tolist(), strict=True):
            places.setdefault(text[begin:end], []).append(begin - start)
        repeated = [name for name, offsets in places.items() if len(offsets) > 1]
        if not repeated:
            return None
        name = draw.choice(repeated)
        offset = draw.choice(places[name])
        symbols = to_symbols(text[start : start + self.size])
        symbols[offset : offset + len(name)] = HOLE
        return layout(symbols, task.rows, task.cols), layout(name, 1, task.length)[0]

    def _names(self, number):
        """Return begin and end (last character + 1) of each name in a text, two rows of int32."""
        if number not in self.name_spans:
            spans = [match.span(1) for match in TOKENS.finditer(self.texts[number]) if _is_name(match[1])]
            self.name_spans[number] = np.array(spans, np.int32).reshape(-1, 2).T.copy()
        return self.name_spans[number]


def _is_name(word):
    return word and len(word) in NAME_LENGTHS and not keyword.iskeyword(word)


def _read(text, task):
    page = layout(text[: task.rows * task.cols], task.rows, task.cols)
    return page, page.reshape(-1)


def _hash(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _plain(text):
    """Return the text as a page shows it, one character per symbol."""
    return text.replace("\t", TAB).encode("ascii", "replace").translate(SHOWN).decode()


def code_files(folder=""):
    """Return {name: text} of the .py files in a folder, or for "" of the interpreter's library without its tests.

    Nothing is executed. Raises DataError for a folder without such files, and ("file:line") one that is not UTF-8.
    """
    root, texts = Path(folder or sysconfig.get_path("stdlib")), {}
    for path in sorted(_python_files(root, () if folder else WITHOUT)):
        name = path.relative_to(root).as_posix()
        if folder or not name.startswith(("config-", "_sysconfigdata")):
            if folder:
                texts[name] = read_text(path)
            else:
                texts[name] = path.read_bytes().replace(b"\r\n", b"\n").decode("utf-8-sig", "replace")
    if not any(texts.values()):
        raise DataError(f"--code_dir {root}: no .py file with text in it\nfix: another folder")
    if folder:
        _check_characters(f"--code_dir {root}", texts.values())
    return {name: _plain(text) for name, text in texts.items()}


def _check_characters(source, texts):
    """Warn of characters that a page does not show. Raises DataError if they are more than half of all."""
    count, total = sum(map(lost, texts)), sum(map(len, texts))
    if 2 * count > total:
        raise DataError(
            f"{source}: {count} of {total} characters ({count / total:.0%}) have no sign on a page, which "
            "shows printable ASCII\nfix: a text in ASCII letters"
        )
    if count:
        warn(f"{source}: {count} of {total} characters ({count / total:.2%}) have no sign on a page and become ?")


def _python_files(root, without):
    """Yield paths of .py files below `root`, skipping names that begin with a dot and folders in `without`."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in without]
        paths = (Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("."))
        yield from filter(Path.is_file, paths)


def story_rows(path):
    """Read {number: text} from a .txt file, one story per line, or a .jsonl file, {"text": "..."} per line.

    Raises DataError for a file that is missing, empty, or ("file:line") malformed.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".jsonl":
            problems = {}
            texts = list(read_documents(path, problems, skip_bad_lines=True))
            for kind in problems:
                if kind in MALFORMED:
                    raise DataError(f"--stories {problems[kind][1][0]}\nfix: mend the line")
        elif path.suffix.lower() == ".txt":
            texts = read_text(path).split("\n")
        else:
            raise DataError(f"--stories {path}: expected a .txt or .jsonl file")
    except OSError as e:
        raise DataError(f"--stories {path}: {e.strerror}\nfix: an existing .txt or .jsonl file") from e
    stories = {number: text for number, row in enumerate(texts) if (text := row.strip())}
    if not stories:
        raise DataError(f"--stories {path}: no text in it")
    _check_characters(f"--stories {path}", stories.values())
    return {number: _plain(text) for number, text in stories.items()}
