"""Training data of symbolic regression: points (x, y) of random formulas, and the formulas as token sequences.

B samples of a batch, M points, D variables, T tokens of a sequence, N skeletons (rows of L prefix ids, see
skeletons.py), C constants. A sequence is <bos> [<prompt> .. </prompt>] <expression> PREFIX </expression> <eos>.

Batches draw their skeletons from chunks, which CHUNK batches share, and their proposals from blocks of a few batches:
both cost less in bulk. Each random draw has a generator of its own, seeded by (seed, split, stream, index).
"""

import atexit
import itertools
import multiprocessing
import queue
from collections import Counter
from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal

import numpy as np

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.formulas import skeletons
from data_utils.formulas.distributions import parse_distribution
from data_utils.formulas.expressions import Alphabet
from data_utils.formulas.holdout import HoldOut
from data_utils.formulas.prompts import TAGS, make_prompt
from data_utils.formulas.samples import add_noise, make_samples, propose
from data_utils.workers import begin

SPLITS = dict(train=0, val=1, test=2)
STREAMS = dict(chunk=2, points=3, noise=4, prompts=5, block=6)  # numbers that seed the generators
CHUNK = 256  # batches that draw from one chunk of skeletons
DRAWS = 2 * CHUNK  # drawn trees of a chunk, per sample of a batch
MULTIPLE = 8  # T is a multiple of this: few shapes to compile
READY = 8  # batches that each worker keeps ready
IGNORED = -100  # label of a token that is not learned
LONGEST_WAIT = 1.0  # seconds between two checks whether a worker is alive


@dataclass
class DataConfig:
    noise_probability: float = 0.5  # share of samples with noise on y
    noise_level: str = "log(1e-4,0.3)"  # distribution of the noise's standard deviation over that of y
    padding: Literal["zero", "random"] = "zero"  # x of variables that a formula lacks
    n_per_equation: int = 1  # samples per drawn skeleton
    prompt_probability: float = 0.0  # share of samples that begin with a prompt
    complexity_probability: float = 1.0  # share of prompts that give the number of tokens
    allowed_probability: float = 1.0  # share of prompts that list terms that may occur
    include_probability: float = 1.0  # share of prompts that list terms that do occur
    exclude_probability: float = 1.0  # share of prompts that list terms that do not occur
    allowed_actual: str = "int(12,36)"  # distribution of the number of allowed terms that do occur
    allowed_generated: str = "int(0,3)"  # distribution of the number of allowed terms that do not
    include_count: str = "int(0,3)"  # distribution of the number of included terms
    exclude_count: str = "int(0,4)"  # distribution of the number of excluded terms
    term_length: str = "triangular(1,4,10)"  # distribution of the longest length of a term, in tokens
    max_relative_length: float = 0.45  # longest term, as a share of the expression


@dataclass(eq=False, repr=False)
class FlashANSRDataset:
    """An endless stream of batches; batch(index) depends on (seed, split, index) and the settings only.

    `index` counts steps, micro-batches and ranks: two ranks together see what one sees with an accumulation of 2.
    Raises UsageError for settings that can't be, DataError where too few skeletons can be used.

    | entry of a batch | shape | type | is |
    | --- | --- | --- | --- |
    | x_tensors, y_tensors | (B, M, D), (B, M, 1) | float32 | points |
    | data_attn_mask | (B, M) | bool | True |
    | input_ids | (B, T) | int64 | sequences, padded with 0 |
    | labels | (B, T - 1) | int64 | the next tokens, IGNORED where nothing is learned |
    | prompt_mask | (B, T) | bool | whether a token belongs to the prompt |
    | input_num | (B, T, 1) | float32 | numbers of the prompt, else 0 |
    | skeletons, constants | (B, L) | uint8, float32 | formulas, for checks |
    | y_clean | (B, M, 1) | float32 | y without noise, for checks |
    """

    alphabet: Alphabet
    pool: skeletons.PoolConfig  # or anything with its fields
    data: DataConfig  # likewise
    _: KW_ONLY
    seed: int
    split: Literal["train", "val", "test"]
    batch_size: int
    rank: int = 0
    world: int = 1  # ranks
    accumulation: int = 1  # batches per step and rank
    num_workers: int = 0  # processes that make batches; 0 = this one
    max_seq_len: int = 64  # longer sequences are replaced, and counted in `skipped`
    saved: skeletons.Pool = None  # skeletons to draw from, in ids of `alphabet`; None = new ones are drawn
    held: HoldOut = None  # skeletons that are never drawn

    def __post_init__(self):
        _check(self.alphabet, self.pool, self.data)
        self.sizes = skeletons.point_counts(self.pool)
        self.share = self.batch_size + self.batch_size // 8 + 2  # proposals for a batch: some fail on more points
        self.block = 2 ** max(0, min(4, (1024 // self.batch_size).bit_length() - 1))  # batches of a block
        self.skipped = Counter()
        self.workers = []
        self.chunks = {}
        self.blocks = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()

    def _rng(self, stream, index):
        return np.random.default_rng((self.seed, SPLITS[self.split], STREAMS[stream], index))

    # Skeletons and proposals

    def chunk(self, j):
        """Return the Pool for the batches CHUNK j to CHUNK (j + 1) - 1: the saved one, or new draws."""
        if self.saved is not None:
            return _remember(self.chunks, 0, lambda: self._short_enough(self.saved))
        return _remember(self.chunks, j, lambda: self._draw_chunk(j))

    def _draw_chunk(self, j):
        draws = DRAWS * self.batch_size
        drawn, rejected = skeletons.make_chunk(self._rng("chunk", j), draws, self.alphabet, self.pool, self.held)
        return self._short_enough(drawn, rejected, draws)

    def _short_enough(self, pool, rejected=(), draws=0):
        """Return the skeletons of a Pool that fit into a sequence. Raises DataError when hardly any remain."""
        fits = (pool.tokens > 0).sum(1) + 4 <= self.max_seq_len
        rejected = Counter(rejected) + Counter({"longer than max_seq_len": int((~fits).sum())})
        self.skipped += rejected
        if fits.sum() < max(1, draws / 1e4):
            reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
            raise DataError(
                f"of {draws or len(fits)} skeletons only {fits.sum()} can be used: {reasons}\n"
                "fix: fewer holdout_pools, a larger max_length, other operators"
            )
        return skeletons.Pool(pool.tokens[fits], pool.counts[fits])

    def _propose(self, rng, count, pool):
        """Propose `count` samples of skeletons, drawn in proportion to the root of how often these came."""
        repeats = self.data.n_per_equation
        ends = np.sqrt(pool.counts).cumsum()
        places = rng.random(-(-count // repeats)) * ends[-1]
        chosen = np.searchsorted(ends, places, "right").clip(max=len(ends) - 1)
        return propose(rng, pool.tokens[chosen].repeat(repeats, 0), self.alphabet, self.pool)

    def _block(self, j):
        """Return the proposals for the batches of block j."""
        count = self.block * self.share
        pool = self.chunk(j * self.block // CHUNK)
        return _remember(self.blocks, j, lambda: self._propose(self._rng("block", j), count + count // 3, pool))

    # Batches

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Return batch `index` as numpy arrays."""
        B = self.batch_size
        pool = self.chunk(index // CHUNK)
        point_rng = self._rng("points", index)
        prompt_rng = self._rng("prompts", index)
        M = int(point_rng.choice(self.sizes))
        sequences = []

        def select(rows):
            """Add the sequences of rows until there are B -> indices of the rows that were taken."""
            taken = []
            for i, row in enumerate(rows.tolist()):
                if len(sequences) < B:
                    sequence = self._sequence(prompt_rng, [t for t in row if t], pool)
                    if len(sequence[0]) > self.max_seq_len:
                        self.skipped["with a prompt longer than max_seq_len"] += 1
                    else:
                        sequences.append(sequence)
                        taken.append(i)
            return taken

        # The batch's share of its block; then more, while samples are missing.
        first = index % self.block * self.share
        proposed = [part[first : first + self.share] for part in self._block(index // self.block)]
        parts = []
        tried = 0
        while True:
            samples = make_samples(point_rng, proposed, M, self.alphabet, self.pool, self.data.padding, select)
            parts.append(samples)
            if len(sequences) == B:
                break
            count = (B - len(sequences)) * 3 // 2 + 4
            proposed = self._propose(point_rng, count, pool)
            tried += count
            if tried > skeletons.PATIENCE * (B + 4) and len(sequences) < tried / 100:
                raise DataError(
                    f"batch {index}: of {tried} skeletons only {len(sequences)} gave usable samples\n"
                    f"skipped: {dict(self.skipped)}\nfix: a larger y_limit, other priors"
                )
        batch = parts[0]
        if len(parts) > 1:
            batch = {name: np.concatenate([part[name] for part in parts]) for name in batch}
        batch["y_clean"] = batch["y_tensors"]
        batch["y_tensors"] = add_noise(self._rng("noise", index), batch["y_clean"], self.data)
        return batch | dict(data_attn_mask=np.ones((B, M), bool)) | _pad(sequences)

    def _sequence(self, rng, prefix, pool):
        """Return (ids, length of the prompt, {place: number}) of one sample."""
        ids = self.alphabet.ids
        prompt, numbers = [], {}
        if self.data.prompt_probability and rng.random() < self.data.prompt_probability:
            prompt, numbers = make_prompt(rng, prefix, pool.tokens, self.alphabet, self.data)
        sequence = [ids["<bos>"], *prompt, ids["<expression>"], *prefix, ids["</expression>"], ids["<eos>"]]
        return sequence, len(prompt), {place + 1: number for place, number in numbers.items()}

    def batch(self, index: int) -> dict:
        """Return batch `index` as a dict of tensors."""
        return self.collate(self.arrays(index))

    @staticmethod
    def collate(arrays):
        """Return the numpy arrays of a batch as tensors, without a copy."""
        import torch

        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    # The stream

    def indices(self, start, steps):
        """Yield the indices of this rank's batches for `steps` steps from `start` on, `accumulation` per step."""
        for micro in range(start * self.accumulation, (start + steps) * self.accumulation):
            yield micro * self.world + self.rank

    def iterate(self, start, steps):
        """Yield the batches of `steps` steps from `start` on. They are the same for any number of workers.

        Worker i makes those of chunks i, i + num_workers, ... Raises DataError when a worker died.
        """
        if not self.num_workers:
            for index in self.indices(start, steps):
                yield self.batch(index)
            return
        self.shutdown()
        context = multiprocessing.get_context("spawn")  # a fork would keep locks, and break after torch
        settings = {f.name: getattr(self, f.name) for f in fields(self)} | dict(num_workers=0)
        workers = self.workers = []
        atexit.register(self.shutdown)
        try:
            for i in range(self.num_workers):
                workers.append(_begin(context, settings, i, self.num_workers, start, steps))
            for index in self.indices(start, steps):
                arrays, skipped = _take(*workers[index // CHUNK % self.num_workers])
                self.skipped += skipped
                yield self.collate(arrays)
        finally:
            if self.workers is workers:  # else another stream has begun, and ended these
                self.shutdown()

    def shutdown(self):
        """End the workers, if there are any. It may be called again: `with`, errors and the program's exit do so."""
        atexit.unregister(self.shutdown)
        workers, self.workers = self.workers, []
        for process, _ in workers:
            process.kill()  # they hold nothing that could be lost, and answer no other signal
        for process, ready in workers:
            process.join()
            ready.close()


def _check(alphabet, pool, data):
    """Raise UsageError for settings that no dataset can have."""
    skeletons.check_pool(pool)
    missing = [name for name in (*pool.operators, *pool.variables) if name not in alphabet.ids]
    if missing:
        raise UsageError(f"the tokenizer lacks {' '.join(missing)}, which the skeleton pool may draw")
    tags = [f"<{slash}{word}>" for word in ("complexity", *TAGS.values()) for slash in ("", "/")]
    missing = [name for name in ("<float>", "<prompt>", "</prompt>", *tags) if name not in alphabet.ids]
    if data.prompt_probability and missing:
        raise UsageError(
            f"the tokenizer lacks {' '.join(missing)}: add them to special_tokens\ntry: --prompt_probability 0"
        )
    at_least(data, 1, "n_per_equation")
    for name in ("noise", "prompt", "complexity", "allowed", "include", "exclude"):
        probability = getattr(data, f"{name}_probability")
        if not 0 <= probability <= 1:
            raise UsageError(f"--{name}_probability {probability}: expected 0 to 1")
    for name in ("noise_level", "allowed_actual", "allowed_generated", "include_count", "exclude_count", "term_length"):
        parse_distribution(getattr(data, name))


def _remember(cache, key, make):
    """Return cache[key], made by make() if it is absent. The cache keeps the two newest."""
    if key not in cache:
        while len(cache) > 1:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]


def _pad(sequences):
    """Return input_ids, labels, prompt_mask and input_num of sequences (ids, length of the prompt, {place: number})."""
    ids, prompt_lengths, numbers = zip(*sequences, strict=True)
    B = len(ids)
    lengths = np.array([*map(len, ids)])[:, None]
    prompt_lengths = np.array(prompt_lengths)[:, None]
    T = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    place = np.arange(T)
    inside = place < lengths
    tokens = np.zeros((B, T), np.int64)
    tokens[inside] = np.fromiter(itertools.chain(*ids), np.int64, int(lengths.sum()))
    learned = (place > prompt_lengths + 1) & inside  # all that follows <expression>
    labels = np.where(learned, tokens, IGNORED)[:, 1:]
    prompt_mask = (place > 0) & (place <= prompt_lengths)
    input_num = np.zeros((B, T, 1), np.float32)
    for i, at in enumerate(numbers):
        for k, number in at.items():
            input_num[i, k] = number
    return dict(input_ids=tokens, labels=labels, prompt_mask=prompt_mask, input_num=input_num)


# Worker processes


def _begin(context, settings, i, workers, start, steps):
    """Start worker i -> (process, queue of its batches). Raises DataError when it can't be started."""
    given = context.Queue()
    ready = context.Queue(READY)
    process = context.Process(target=_work, args=(given, ready, i, workers, start, steps), daemon=True)
    try:
        process.start()
    except OSError as e:
        raise DataError(f"data worker {process.name} can't start: {e.strerror}\ntry: --num_workers 0") from e
    # Not among the arguments: `start` waits for ever when a process dies before it has read more than a pipe holds.
    given.put(settings)
    given.cancel_join_thread()
    process.given = given  # the queue must live as long as the process, which opens it by its name
    # The worker alone holds this end: when it dies, even in the middle of a batch, reading ends.
    ready._writer.close()
    return process, ready


def _work(given, ready, i, workers, start, steps):
    """In a worker: put its batches into the queue, or the error that ended it."""
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
    """Return (arrays, skipped) of the next batch of a worker. Raises its error, and DataError when it died."""
    while True:
        try:
            arrays, skipped = ready.get(timeout=LONGEST_WAIT)
            break
        except queue.Empty:
            if process.is_alive():
                continue
        except (EOFError, OSError):
            process.join(LONGEST_WAIT)
        raise DataError(
            f"data worker {process.name} died with status {process.exitcode}, perhaps of too little memory\n"
            "try: --num_workers 0"
        ) from None
    if isinstance(arrays, Exception):
        raise arrays
    return arrays, skipped
