"""The data sets of train_hrm.py behind one interface: sums, puzzles, prepared folders, or one random batch.

Each has meta (vocab_size ...), hash, tokenizer, rows(split), order(seed, epoch), batch(split, index, number) -> dict of
(B, ...) tensors, and about(split, index) -> what `answers.summarize` needs to know of each row.
"""

import hashlib
from types import SimpleNamespace

import numpy as np
import torch

from data_utils.errors import UsageError
from data_utils.reasoning.arithmetic import build_synthetic_dataset
from data_utils.reasoning.dataset import from_rows, open_pairs
from data_utils.reasoning.folder import read_meta, write_beside
from data_utils.reasoning.sudoku import augment, load_puzzles, make
from data_utils.workers import cores

BUILT_IN = dict(size=9, givens=40, train=2000, val=1000)  # of --dataset sudoku


class Puzzles:
    """Sudokus {split: (puzzles, solutions)}, uint8 (n, N) each; training rows are turned around anew in each batch."""

    tokenizer = SimpleNamespace(name="digits", hash="")

    def __init__(self, grids, meta, *, seed, reveal):
        self.grids, self.meta, self.seed, self.reveal = grids, meta, seed, reveal
        content = b"".join(np.ascontiguousarray(grid).tobytes() for split in grids.values() for grid in split)
        self.hash = hashlib.sha256(content).hexdigest()

    def rows(self, split):
        """Return the number of puzzles."""
        return len(self.grids[split][0])

    def order(self, seed, epoch):
        """Return the rows of "train" in the order of an epoch, (n,) int64."""
        return np.random.default_rng((seed, epoch)).permutation(self.rows("train"))

    def batch(self, split, index, number=None):
        """Return encoder_ids and labels (B, N) int64; those of training batch `number` are augmented for it."""
        puzzles, solutions = (grid[index] for grid in self.grids[split])
        if number is not None:
            rng = np.random.default_rng((self.seed, number))
            puzzles, solutions = augment(puzzles, solutions, size=self.meta["size"], rng=rng, reveal=self.reveal)
        return dict(encoder_ids=torch.from_numpy(puzzles).long(), labels=torch.from_numpy(solutions).long())

    def write_beside(self, path, config):
        """Write config.yaml and meta.json for the checkpoint `path`."""
        write_beside(path, config, self.meta)

    def about(self, split, index):
        """Return {labels, asked}, (B,) each: cells, and blank ones."""
        blank = torch.from_numpy(self.grids[split][0][index] == 0).sum(1)
        return dict(labels=torch.full_like(blank, self.meta["size"] ** 2), asked=blank)


def open_questions(dataset, *, max_seq_len, data_seed, reveal, say, **reading):
    """Return the data set `synthetic`, `sudoku`, or that of a prepared folder; **reading as in pairs.open_pairs."""
    if dataset == "synthetic":
        pairs = from_rows(*build_synthetic_dataset(seed=data_seed), max_seq_len=max_seq_len)
        pairs.short = len("What is 12 + 34?") + 2  # ids of a prompt with two operands of two digits
        return pairs
    meta = dict(kind="sudoku", vocab_size=10, size=9) if dataset == "sudoku" else read_meta(dataset)
    if meta["kind"] == "sudoku":
        if max_seq_len != meta["size"] ** 2:
            raise UsageError(f"--max_seq_len {max_seq_len}: the puzzles have {meta['size'] ** 2} cells")
        if dataset == "sudoku":
            say(f"making {BUILT_IN['train']} + {BUILT_IN['val']} puzzles")
        grids = make(**BUILT_IN, seed=data_seed, processes=cores()) if dataset == "sudoku" else load_puzzles(dataset)
        return Puzzles(grids, meta, seed=data_seed, reveal=reveal)
    return open_pairs(dataset, max_seq_len=max_seq_len, say=say, **reading)


def random_batch(n, length, vocab_size):
    """Return a batch of random ids, n rows of prompts and answers of `length`."""
    ids = torch.randint(vocab_size, (3, n, length))
    return dict(zip(("encoder_ids", "decoder_input_ids", "labels"), ids, strict=True))
