"""Training data of symbolic regression: points (x, y) of random formulas, and the formulas as token sequences.

B samples of a batch, M points, D variables, T tokens of a sequence, N skeletons (rows of prefix ids, see skeletons.py).
A sequence is <bos> [<prompt> .. </prompt>] <expression> PREFIX </expression> <eos>.
"""

import atexit
import itertools
import multiprocessing
import queue
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.formulas import skeletons
from data_utils.formulas.distributions import parse_distribution
from data_utils.formulas.expressions import Program, structure
from data_utils.workers import begin

SPLITS = dict(train=0, val=1, test=2)
CHUNK = 256  # batches that draw from one chunk of skeletons
DRAWS = 2 * CHUNK  # drawn trees of a chunk, per sample of a batch
SCREEN = 16  # points on which most samples that won't do are found out
MULTIPLE = 8  # of T: few shapes to compile
READY = 8  # batches that each worker keeps ready
IGNORED = -100  # label of a token that is not learned
LONGEST_WAIT = 1.0  # seconds between two looks whether a worker still lives
TAGS = dict(allowed="allowed_term", include="include_term", exclude="exclude_term")


@dataclass
class DataConfig:
    noise_probability: float = 0.5  # that the y of a sample get noise
    noise_level: str = "log(1e-4,0.3)"  # distribution of its standard deviation over that of y
    padding: Literal["zero", "random"] = "zero"  # x of variables that a formula lacks
    n_per_equation: int = 1  # samples for each drawn skeleton
    prompt_probability: float = 0.0  # that a sample begins with a prompt
    complexity_probability: float = 1.0  # that a prompt tells the number of tokens
    allowed_probability: float = 1.0  # that it lists terms that may occur
    include_probability: float = 1.0  # that it lists terms that do occur
    exclude_probability: float = 1.0  # that it lists terms that do not
    allowed_actual: str = "int(12,36)"  # distribution of the number of allowed terms that do occur
    allowed_generated: str = "int(0,3)"  # and of those that do not
    include_count: str = "int(0,3)"  # distribution of the number of included terms
    exclude_count: str = "int(0,4)"  # and of the excluded
    term_length: str = "triangular(1,4,10)"  # distribution of the longest length of a term, in tokens
    max_relative_length: float = 0.45  # of a term, as a share of the expression


class FlashANSRDataset:
    """An endless stream of batches; batch(index) depends on (seed, split, index) and the settings only.

    `index` counts steps, micro-batches and ranks, so that two ranks see what one sees with an accumulation of 2. A
    batch is a dict of tensors: x_tensors (B, M, D) and y_tensors (B, M, 1) float32, data_attn_mask (B, M) bool,
    input_ids (B, T) and labels (B, T - 1) int64, IGNORED where nothing is learned, prompt_mask (B, T) bool, input_num
    (B, T, 1) float32, 0 where there is no number; besides what a check needs: skeletons (B, L) uint8, constants
    (B, C) float32, y_clean (B, M, 1).

    pool, data: have the fields of PoolConfig and DataConfig. saved: a Pool in the ids of `alphabet`, else skeletons are
    drawn; held: HoldOut that they keep off; max_seq_len: longer sequences are replaced and counted in `skipped`.
    """

    def __init__(self, alphabet, pool, data, *, seed, split, batch_size, rank=0, world=1, accumulation=1, num_workers=0,
                 max_seq_len=64, saved=None, held=None):  # fmt: skip
        self.settings = dict(alphabet=alphabet, pool=pool, data=data, seed=seed, split=split, batch_size=batch_size,
                             rank=rank, world=world, accumulation=accumulation, max_seq_len=max_seq_len, saved=saved,
                             held=held)  # fmt: skip
        for name, value in self.settings.items():
            setattr(self, name, value)
        _check(alphabet, pool, data)
        self.number, self.num_workers = SPLITS[split], num_workers
        self.sizes = skeletons.point_counts(pool)
        self.share = batch_size + batch_size // 8 + 2  # proposals for a batch: some fail on more points
        self.block = 2 ** max(0, min(4, (1024 // batch_size).bit_length() - 1))
        self.skipped, self.workers, self.chunks, self.blocks = Counter(), [], OrderedDict(), OrderedDict()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()

    def chunk(self, j):
        """Return the Pool that batches CHUNK j to CHUNK (j + 1) - 1 draw from: that saved, or new draws."""
        j = j if self.saved is None else 0
        if j not in self.chunks:
            while len(self.chunks) > 1:
                self.chunks.popitem(last=False)
            self.chunks[j] = self._made(j) if self.saved is None else self._short(self.saved)
        return self.chunks[j]

    def _made(self, j):
        rng = np.random.default_rng((self.seed, self.number, 2, j))
        draws = DRAWS * self.batch_size
        return self._short(*skeletons.make_chunk(rng, draws, self.alphabet, self.pool, self.held), draws)

    def _short(self, found, rejected=(), draws=0):
        """Leave out what is too long for a sequence; DataError when hardly anything is left of the draws."""
        fits = (found.tokens > 0).sum(1) + 4 <= self.max_seq_len
        rejected = Counter(rejected) + Counter({"longer than max_seq_len": int((~fits).sum())})
        self.skipped += rejected
        if fits.sum() < max(1, draws / 1e4):
            reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
            raise DataError(f"of {draws or len(fits)} skeletons only {fits.sum()} can be used: {reasons}\n"
                            "try: fewer holdout_pools, a larger max_length, other operators")  # fmt: skip
        return skeletons.Pool(found.tokens[fits], found.counts[fits])

    def _propose(self, rng, count, pool):
        """Draw skeletons for `count` samples by the root of how often they came, and propose samples of them."""
        ends, each = np.sqrt(pool.counts).cumsum(), self.data.n_per_equation
        chosen = np.searchsorted(ends, rng.random(-(-count // each)) * ends[-1], "right").clip(max=len(ends) - 1)
        return propose(rng, pool.tokens[chosen].repeat(each, 0), self.alphabet, self.pool)

    def _block(self, j):
        """Return what `_propose` found for the batches of block j."""
        if j not in self.blocks:
            while len(self.blocks) > 1:
                self.blocks.popitem(last=False)
            rng, count = np.random.default_rng((self.seed, self.number, 6, j)), self.block * self.share
            self.blocks[j] = self._propose(rng, count + count // 3, self.chunk(j * self.block // CHUNK))
        return self.blocks[j]

    def arrays(self, index):
        """Return batch `index` as numpy arrays."""
        draw, noise, words = (np.random.default_rng((self.seed, self.number, k, index)) for k in (3, 4, 5))
        pool, B = self.chunk(index // CHUNK), self.batch_size
        M = int(draw.choice(self.sizes))
        first = index % self.block * self.share
        proposed = [part[first : first + self.share] for part in self._block(index // self.block)]
        parts, sequences, tried = [], [], 0

        def wanted(rows):
            kept = []
            for i, row in enumerate(rows.tolist()):
                if len(sequences) < B:
                    sequence = self._sequence(words, [t for t in row if t], pool)
                    if len(sequence[0]) > self.max_seq_len:
                        self.skipped["with a prompt longer than max_seq_len"] += 1
                    else:
                        sequences.append(sequence)
                        kept.append(i)
            return kept

        while True:
            parts.append(make_samples(draw, proposed, M, self.alphabet, self.pool, self.data.padding, wanted))
            if len(sequences) == B:
                break
            count = (B - len(sequences)) * 3 // 2 + 4
            proposed, tried = self._propose(draw, count, pool), tried + count
            if tried > skeletons.PATIENCE * (B + 4) and len(sequences) < tried / 100:
                raise DataError(f"batch {index}: of {tried} skeletons only {len(sequences)} gave usable samples\n"
                                f"skipped: {dict(self.skipped)}\ntry: a larger y_limit, other priors")  # fmt: skip
        batch = parts[0]
        if len(parts) > 1:
            batch = {name: np.concatenate([part[name] for part in parts]) for name in batch}
        batch["y_clean"] = batch["y_tensors"]
        batch["y_tensors"] = add_noise(noise, batch["y_clean"], self.data)
        return batch | dict(data_attn_mask=np.ones((B, M), bool)) | _padded(sequences, self.alphabet)

    def _sequence(self, rng, prefix, pool):
        """Return (ids, length of the prompt with <bos>, {place: number}) of one sample."""
        ids, numbers, prompt = self.alphabet.ids, {}, []
        if self.data.prompt_probability and rng.random() < self.data.prompt_probability:
            prompt, numbers = make_prompt(rng, prefix, pool.tokens, self.alphabet, self.data)
        whole = [ids["<bos>"], *prompt, ids["<expression>"], *prefix, ids["</expression>"], ids["<eos>"]]
        return whole, len(prompt), {place + 1: number for place, number in numbers.items()}

    def batch(self, index):
        """Return batch `index` as a dict of tensors."""
        return self.collate(self.arrays(index))

    @staticmethod
    def collate(arrays):
        """Return the numpy arrays of a batch as tensors, without a copy."""
        import torch

        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def indices(self, start, steps):
        """Yield the indices of this rank's batches of `steps` steps from `start` on, `accumulation` a step."""
        for micro in range(start * self.accumulation, (start + steps) * self.accumulation):
            yield micro * self.world + self.rank

    def iterate(self, start, steps):
        """Yield the batches of `steps` steps from `start` on; the same for any number of workers.

        Worker i makes those of chunks i, i + num_workers, ... Raises DataError when a worker died.
        """
        if not self.num_workers:
            for index in self.indices(start, steps):
                yield self.batch(index)
            return
        self.shutdown()
        context = multiprocessing.get_context("spawn")  # a fork would keep locks, and break after torch
        workers, self.workers = [], []
        atexit.register(self.shutdown)
        try:
            for i in range(self.num_workers):
                workers.append(_begin(context, self.settings, i, self.num_workers, start, steps))
                self.workers = workers
            for index in self.indices(start, steps):
                arrays, skipped = _take(*workers[index // CHUNK % self.num_workers])
                self.skipped += skipped
                yield self.collate(arrays)
        finally:
            if self.workers is workers:
                self.shutdown()

    def shutdown(self):
        """End the workers, if there are any. May be called again, and is by `with`, on errors and at exit."""
        atexit.unregister(self.shutdown)
        workers, self.workers = self.workers, []
        for process, _ in workers:
            process.kill()  # they hold nothing that could be lost, and answer no other signal
        for process, ready in workers:
            process.join()
            ready.close()


def _check(alphabet, pool, data):
    skeletons.check_pool(pool)
    missing = [name for name in (*pool.operators, *pool.variables) if name not in alphabet.ids]
    if missing:
        raise UsageError(f"the tokenizer lacks {' '.join(missing)}, which the skeleton pool may draw")
    words = ["complexity", *TAGS.values()]
    needed = ["<float>", "<prompt>", "</prompt>", *(f"<{slash}{word}>" for word in words for slash in ("", "/"))]
    missing = [name for name in needed if name not in alphabet.ids]
    if data.prompt_probability and missing:
        raise UsageError(f"the tokenizer lacks {' '.join(missing)}\ntry: add them to special_tokens, "
                         "or --prompt_probability 0")  # fmt: skip
    at_least(data, 1, "n_per_equation")
    for name in ("noise", "prompt", "complexity", "allowed", "include", "exclude"):
        if not 0 <= getattr(data, f"{name}_probability") <= 1:
            raise UsageError(f"--{name}_probability {getattr(data, f'{name}_probability')}: expected 0 to 1")
    for name in ("noise_level", "allowed_actual", "allowed_generated", "include_count", "exclude_count", "term_length"):
        parse_distribution(getattr(data, name))


def _begin(context, settings, i, workers, start, steps):
    """Start worker i -> (process, queue of its batches). Raises DataError when it can't be started."""
    given, ready = context.Queue(), context.Queue(READY)
    process = context.Process(target=_work, args=(given, ready, i, workers, start, steps), daemon=True)
    try:
        process.start()
    except OSError as e:
        raise DataError(f"data worker {process.name} can't start: {e.strerror}\ntry: --num_workers 0") from e
    # not among the arguments: `start` waits for ever when a process dies before it has read more than a pipe holds
    given.put(settings)
    given.cancel_join_thread()
    process.given = given  # lives as long: the worker opens it by its name
    ready._writer.close()  # the worker alone holds this end: when it dies, even in the middle of a batch, reading ends
    return process, ready


def _work(given, ready, i, workers, start, steps):
    """In a worker: put its batches, or what went wrong, into the queue."""
    begin()
    try:
        dataset = FlashANSRDataset(**given.get())
        for index in dataset.indices(start, steps):
            if index // CHUNK % workers == i:
                arrays = dataset.arrays(index)
                ready.put((arrays, dataset.skipped))
                dataset.skipped = Counter()
    except Exception as e:  # of any kind: the trainer raises it
        ready.put((e, None))


def _take(process, ready):
    """Return the next batch of a worker. Raises what it raised, and DataError when it died."""
    while True:
        try:
            arrays, skipped = ready.get(timeout=LONGEST_WAIT)
            break
        except queue.Empty:
            if process.is_alive():
                continue
        except (EOFError, OSError):
            process.join(LONGEST_WAIT)
        raise DataError(f"data worker {process.name} died with status {process.exitcode}, perhaps of too little "
                        "memory\ntry: fewer --num_workers") from None  # fmt: skip
    if isinstance(arrays, Exception):
        raise arrays
    return arrays, skipped


# one batch


def propose(rng, rows, alphabet, pool):
    """Give skeletons (N, L) constants and intervals with which y is usable on SCREEN points.

    Returns rows (n, L), constants (n, L) float32, supports (n, D, 3) and the `structure` of the rows, n <= N, in the
    order of the rows; each has max_tries tries.
    """
    literals, supports = parse_distribution(pool.literal_prior), parse_distribution(pool.support_prior, support=True)
    N, D = len(rows), len(alphabet.variables)
    constants, intervals = np.zeros(rows.shape, np.float32), np.zeros((N, D, 3))
    pending, width = np.arange(N), int((rows == alphabet.constant).sum(1).max(initial=0))
    size, height = structure(alphabet.arity[rows])
    for _ in range(pool.max_tries):
        program = Program(alphabet, rows[pending], shape=(size[pending], height[pending]))
        row, variable = program.uses
        drawn = supports(rng, len(row)) if pool.independent_dimensions else supports(rng, len(pending))[row]
        constants[pending, :width] = literals(rng, (len(pending), width))
        intervals[pending[row], variable] = drawn
        good = usable(program(constants[pending], points(rng, drawn, SCREEN)), pool)
        pending = pending[~good]
        if not len(pending):
            break
    kept = np.delete(np.arange(N), pending)
    return rows[kept], constants[kept], intervals[kept], size[kept], height[kept]


def make_samples(rng, proposed, M, alphabet, pool, padding="zero", wanted=lambda rows: slice(None)):
    """Draw M points in the proposed intervals -> arrays of the samples whose y are usable, n of them.

    proposed: as `propose` returns it; wanted(rows): which of those that are usable. Dict of skeletons (n, L),
    constants (n, L), x_tensors (n, M, D), y_tensors (n, M, 1).
    """
    rows, constants, intervals, *shape = proposed
    program = Program(alphabet, rows, shape=shape)
    values = points(rng, intervals[program.uses], M)
    y = program(constants, values)
    x = np.zeros((len(rows), len(alphabet.variables), M), np.float32)
    if padding == "random":
        supports = parse_distribution(pool.support_prior, support=True)
        x[:] = points(rng, supports(rng, x.shape[0] * x.shape[1]), M).reshape(x.shape)
    x[program.uses] = values
    good = np.flatnonzero(usable(y, pool))
    good = good[wanted(rows[good])]
    turned = np.empty((len(good), M, x.shape[1]), np.float32)
    for i in range(x.shape[1]):  # three times as fast as one copy of the transposed array
        turned[:, :, i] = x[good, i]
    return dict(skeletons=rows[good], constants=constants[good], x_tensors=turned, y_tensors=y[good][:, :, None])


def points(rng, supports, M):
    """M numbers drawn in each of the supports (P, 3) -> (P, M) float32."""
    low, high, kind = supports.T[:, :, None]
    logs = np.flatnonzero(kind)
    out = uniform(rng, (len(supports), M))
    with np.errstate(divide="ignore"):
        width, start = high - low, low.copy()
        width[logs], start[logs] = np.log(high[logs] / low[logs]), np.log(low[logs])
    out *= width.astype(np.float32)
    out += start.astype(np.float32)
    if len(logs):
        part = np.exp(out[logs])
        either = rng.choice(np.array([-1, 1], np.float32), part.shape)
        out[logs] = part * np.where(kind[logs] == 2, either, kind[logs].astype(np.float32))
    return out


def uniform(rng, shape):
    """Numbers in [0, 1), float32, of 23 random bits: twice as fast as rng.random."""
    size = int(np.prod(shape))
    bits = rng.bit_generator.random_raw((size + 1) // 2).view(np.uint32)[:size].reshape(shape)
    bits >>= 9
    bits |= 0x3F800000  # the exponent of [1, 2)
    found = bits.view(np.float32)
    found -= 1
    return found


def usable(y, pool):
    """Return (N,) bool: y (N, M) finite, below y_limit, and not (nearly) constant."""
    with np.errstate(invalid="ignore"):
        if pool.allow_nan:
            finite = np.isfinite(y)
            low, high = np.where(finite, y, np.inf).min(1), np.where(finite, y, -np.inf).max(1)
        else:
            low, high = y.min(1), y.max(1)
        inside = (low < high) & (high <= pool.y_limit) & (low >= -pool.y_limit)
        return inside & (high - low >= 1e-4 * np.maximum(high, -low))


def add_noise(rng, y, data):
    """Add normal noise to a share of y (B, M, 1), its standard deviation a multiple of theirs."""
    level = parse_distribution(data.noise_level)(rng, len(y)) * (rng.random(len(y)) < data.noise_probability)
    noise, noisy, found = rng.standard_normal(y.shape, np.float32), np.flatnonzero(level), y.copy()
    clean = y[noisy, :, 0].astype(np.float64)
    finite = np.isfinite(clean)
    clean = clean if finite.all() else np.where(finite, clean, np.nan)
    spread = (np.std if finite.all() else np.nanstd)(clean, 1)
    found[noisy] += noise[noisy] * (spread * level[noisy]).astype(np.float32)[:, None, None]
    return found


def _padded(sequences, alphabet):
    parts, prompts, numbers = zip(*sequences, strict=True)
    lengths, prompts = (np.array(column)[:, None] for column in ([*map(len, parts)], prompts))
    T = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    place, num = np.arange(T), np.zeros((len(parts), T, 1), np.float32)
    tokens, inside = np.zeros((len(parts), T), np.int64), place < lengths
    tokens[inside] = np.fromiter(itertools.chain(*parts), np.int64, int(lengths.sum()))
    learned = (place > prompts + 1) & inside  # from <expression> on the next token is learned
    labels = np.where(learned, tokens, IGNORED)[:, 1:]
    for i, found in enumerate(numbers):
        for k, number in found.items():
            num[i, k] = number
    return dict(input_ids=tokens, labels=labels, prompt_mask=(place > 0) & (place <= prompts), input_num=num)


# prompts


def make_prompt(rng, prefix, others, alphabet, data):
    """Return the ids of a prompt for the ids `prefix`, and {place in it: number}.

    Terms that the formula lacks are sub-expressions of `others`, skeletons (N, L).
    """
    ids, prompt, numbers = alphabet.ids, [alphabet.ids["<prompt>"]], {}
    if rng.random() < data.complexity_probability:
        numbers[len(prompt) + 1] = float(len(prefix))
        prompt += [ids["<complexity>"], ids["<float>"], ids["</complexity>"]]
    own = subtrees(prefix, alphabet)
    longest = max(1, int(data.max_relative_length * len(prefix)))
    terms = dict(allowed=[], include=[], exclude=[])
    actual = _terms(rng, own, max(1, _count(rng, data.allowed_actual)), longest, data) or [min(own, key=len)]
    if rng.random() < data.allowed_probability:
        terms["allowed"] = actual + _foreign(
            rng, own, others, _count(rng, data.allowed_generated), longest, alphabet, data
        )
    if rng.random() < data.include_probability:
        terms["include"] = [actual[i] for i in rng.permutation(len(actual))[: _count(rng, data.include_count)]]
    if rng.random() < data.exclude_probability:
        terms["exclude"] = _foreign(rng, own, others, _count(rng, data.exclude_count), longest, alphabet, data)
        terms["exclude"] = [term for term in terms["exclude"] if term not in terms["allowed"]]
    for name, found in terms.items():
        for i in rng.permutation(len(found)):
            prompt += [ids[f"<{TAGS[name]}>"], *found[i], ids[f"</{TAGS[name]}>"]]
    return [*prompt, ids["</prompt>"]], numbers


def _count(rng, text):
    return int(parse_distribution(text)(rng, ()))


def subtrees(prefix, alphabet):
    """Return the distinct sub-expressions of the ids `prefix`, itself included, as tuples in their order."""
    stack, found = [], []
    for i in range(len(prefix) - 1, -1, -1):
        end = i + 1
        for _ in range(alphabet.arity[prefix[i]]):
            end = stack.pop()
        stack.append(end)
        found.append(tuple(prefix[i:end]))
    return list(dict.fromkeys(reversed(found)))


def _terms(rng, found, count, longest, data):
    """Draw up to `count` different terms, each no longer than `longest` and a draw of its own."""
    limits = np.minimum(parse_distribution(data.term_length)(rng, count), longest)
    chosen, left = [], [found[i] for i in rng.permutation(len(found))]
    for limit in limits:
        term = next((term for term in left if len(term) <= limit), None)
        if term:
            left.remove(term)
            chosen.append(term)
    return chosen


def _foreign(rng, own, others, count, longest, alphabet, data):
    """Terms of other skeletons that are not among `own`."""
    if not count:
        return []
    rows = others[rng.integers(0, len(others), 2 * count)].tolist()
    found = dict.fromkeys(term for row in rows for term in subtrees([t for t in row if t], alphabet))
    return _terms(rng, [term for term in found if term not in own], count, longest, data)
