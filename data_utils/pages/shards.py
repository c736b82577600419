"""Pages with their answers out of folders, the first of which another process may still be filling."""

import itertools
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data_utils.errors import DataError
from data_utils.files import lock_run, root
from data_utils.pages import shard_files
from data_utils.pages.shard_builder import (
    POLL,
    SIZE_FLAGS,
    SOURCE_FLAGS,
    beside,
    build,
    finish_swap,
    opener,
    page_seed,
    sizes,
)
from data_utils.progress import LINE_SECONDS, say

STALE = 60  # seconds without a sign of the builder before it is given up
GRACE = 20  # seconds that a builder has to finish its batch before it is killed


class Stopped(Exception):
    """Waiting for data was ended by a signal to this process."""


class _Folder:
    """One folder: its manifest, how many samples of each task each shard will hold, the files opened so far."""

    def __init__(self, path):
        self.path, self.manifest, self._stamp, self._open, self.counts = Path(path), None, None, {}, {}

    def refresh(self):
        """Read the manifest again if it has changed; return it, None if there is none."""
        try:
            about = (self.path / "manifest.json").stat()
            stamp = about.st_mtime_ns, about.st_ino, about.st_size
        except OSError:
            stamp = None
        if stamp != self._stamp:
            old, self.manifest = self.manifest, shard_files.read_manifest(self.path)
            if old and (not self.manifest or self.manifest["spec_sha256"] != old["spec_sha256"]):
                raise DataError(f"{self.path} was replaced by other data while it was read\ntry: the same command")
            self._stamp = stamp
        return self.manifest

    def plan(self):
        """Fill in counts: {task: (S,) samples in each shard}."""
        planned = shard_files.batches(self.manifest["samples"], self.manifest["spec"]["build_batch"])
        shards = -(-len(planned) // shard_files.SHARD)
        self.counts = {task: np.zeros(shards, np.int64) for task in self.manifest["samples"]}
        for i, (task, _, count) in enumerate(planned):
            self.counts[task][i // shard_files.SHARD] += count

    def shard(self, number):
        if number not in self._open:
            counts = {task: int(n[number]) for task, n in self.counts.items() if n[number]}
            entry = self.manifest["shards"][number]
            self._open[number] = shard_files.open_file(self.path, entry, counts, self.manifest["spec"])
        return self._open[number]

    def test(self):
        if "test" not in self._open:
            spec = self.manifest["spec"]
            counts = {name: task["test"] for name, task in spec["tasks"].items()}
            self._open["test"] = shard_files.open_file(self.path, self.manifest["test"], counts, spec)
        return self._open["test"]


class Shards:
    """Samples of the tasks `names` out of one or more folders, the first of which may still be in the making.

    spec: of the first folder, as `describe` gives it; None takes what is there. seed: of the order. What is not there
    yet is waited for: `alive()` raises DataError when the builder failed, `stop` is true when a signal came (Stopped is
    raised), `wait_timeout` is the most seconds without a new batch. incremental=False waits for everything first.
    Sample i of a task has the same content however much was there when it was asked for.
    Raises DataError when data are absent, damaged, of another specification, or do not come.
    """

    def __init__(self, folders, names, *, seed, spec=None, wait_timeout=0, incremental=True, alive=None, stop=(),
                 tell=say):  # fmt: skip
        self.names, self.seed, self.wait_timeout = tuple(names), seed, wait_timeout
        self.alive, self.stop, self.tell, self._orders = alive, stop, tell, {}
        self.folders = [_Folder(path) for path in folders]
        first, *others = self.folders
        self._wait(lambda manifest: manifest)
        if spec:
            shard_files.check_spec(first.path, first.manifest["spec"], spec)
        self._wait(lambda manifest: manifest["shards"] if incremental else manifest["complete"])
        for folder in others:
            if not (folder.refresh() or {}).get("complete"):
                raise DataError(_nothing(folder))
        for folder in self.folders:
            folder.plan()
        self._places = {task: self._table(task) for task in self.names}
        hashes = [folder.manifest["spec_sha256"] for folder in self.folders]
        self.hash = shard_files.hash_of(hashes) if others else hashes[0]

    def _table(self, task):
        """Return ([(folder, shard)] that hold the task, (n + 1,) number of its first sample in each)."""
        having = [folder for folder in self.folders if task in folder.counts]
        if not having:
            there = ", ".join(sorted({name for folder in self.folders for name in folder.counts}))
            raise DataError(f"no task {task} in {', '.join(str(f.path) for f in self.folders)}: there are {there}")
        about = [folder.manifest["spec"]["tasks"][task]["task"] for folder in having]
        for folder, other in zip(having[1:], about[1:], strict=True):
            shard_files.check_spec(folder.path, other, about[0])
        places = [(folder, s) for folder in having for s in np.flatnonzero(folder.counts[task]).tolist()]
        return places, np.cumsum([0, *(folder.counts[task][s] for folder, s in places)])

    @property
    def complete(self):
        """Whether the first folder is finished (the others are)."""
        return self.folders[0].refresh()["complete"]

    def rows(self, task):
        """Return the number of training samples, planned: it does not grow while data come."""
        return int(self._places[task][1][-1])

    def order(self, task, epoch):
        """Return the permutation (n,) in which an epoch takes the samples, a function of (seed, task, epoch, plan).

        Epoch 0 goes shard by shard, as they come, shuffled inside each.
        """
        if (task, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.names):  # slots of a batch are in two epochs at most, mostly
                self._orders.pop(next(iter(self._orders)))
            draw = np.random.default_rng((self.seed, zlib.crc32(task.encode()), epoch))
            starts = self._places[task][1]
            pieces = itertools.pairwise(starts) if not epoch else [(0, starts[-1])]
            self._orders[task, epoch] = np.concatenate([a + draw.permutation(b - a) for a, b in pieces])
        return self._orders[task, epoch]

    def at(self, task, positions):
        """Return the samples (n,) at `positions` (n,) of the endless stream of a task: position j is in epoch j // n.

        Slot i of B takes its k-th sample from position i + k B.
        """
        epochs, places = np.divmod(np.asarray(positions), self.rows(task))
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self.order(task, epoch)[places[here]]
        return found

    def ready(self, task, indices):
        """Return whether `samples` would answer without waiting. Raises DataError when the builder failed."""
        number = max((s for folder, s in self._parts(task, indices) if folder is self.folders[0]), default=-1)
        if number < len(self.folders[0].manifest["shards"]):
            return True
        if self.alive:
            self.alive()
        return number < len(self.folders[0].refresh()["shards"])

    def _parts(self, task, indices):
        places, starts = self._places[task]
        indices = np.asarray(indices)
        if len(indices) and not (0 <= indices.min() and indices.max() < starts[-1]):
            raise IndexError(f"{task}: samples are 0 to {starts[-1] - 1}")
        return [places[i] for i in np.unique(starts.searchsorted(indices, "right") - 1).tolist()]

    def samples(self, task, indices):
        """Return {page (n, R, C) uint8, target (n, L) uint8, id (n,) int64}, torch, of samples (n,); waits for them."""
        if not self.ready(task, indices):
            last = max(s for folder, s in self._parts(task, indices) if folder is self.folders[0])
            self._wait(lambda manifest: len(manifest["shards"]) > last)
        places, starts = self._places[task]
        indices = np.asarray(indices)
        part = starts.searchsorted(indices, "right") - 1
        found = {}
        for number in np.unique(part).tolist():
            here, (folder, shard) = part == number, places[number]
            fields, rows = folder.shard(shard)[task], indices[here] - starts[number]
            for name in ("page", "target", "id"):
                if name not in found:
                    found[name] = np.empty((len(indices), *fields[name].shape[1:]), fields[name].dtype)
                found[name][here] = fields[name][rows]
        return _tensors(found)

    def held_out(self, task, split):
        """Return the same of all held-out samples of even number (split "val": they select) or odd ("test")."""
        self._wait(lambda manifest: manifest["test"])
        tests = [folder.test()[task] for folder in self.folders if task in folder.counts]
        every = slice(("val", "test").index(split), None, 2)
        return _tensors({name: np.concatenate([t[name][every] for t in tests]) for name in ("page", "target", "id")})

    def _wait(self, done):
        """Look at the first folder's manifest until `done` of it."""
        folder, start = self.folders[0], time.monotonic()
        sign, signed, made, moved, said = None, start, None, start, start
        while not done(manifest := folder.refresh()):
            if self.alive:
                self.alive()
            if self.stop:
                raise Stopped
            now, builder = time.monotonic(), (manifest or {}).get("builder", {})
            if sign != builder.get("heartbeat"):  # by this clock: machines sleep, and clocks of two disagree
                sign, signed = builder.get("heartbeat"), now
            if made != builder.get("batches"):
                made, moved = builder.get("batches"), now
            if not self.wait_timeout:
                raise DataError(_nothing(folder))
            advice = f"try: see {folder.path}/build.log; the same command goes on"
            if now - moved >= self.wait_timeout:
                raise DataError(f"{folder.path}: no new batch in {self.wait_timeout} s\n{advice}")
            if sign and now - signed >= STALE:
                found = f"its builder, process {builder['pid']}, gave no sign in {STALE} s"
                raise DataError(f"{folder.path}: {found}\n{advice}")
            if now - said >= LINE_SECONDS:
                said = now
                self.tell(f"waiting for {folder.path}: {made or 0} batches, {now - start:.0f} s")
            time.sleep(POLL)


def _tensors(arrays):
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | dict(id=tensors["id"].long())


def _nothing(folder):
    shards = folder.manifest and folder.manifest["shards"]
    found = f"{folder.path} is unfinished" if shards else f"No consolidated files found in {folder.path}"
    return f"{found}\ntry: python train_multimodal.py --dataset-only --data_paths {folder.path}"


# ---- the builder as a child ------------------------------------------------------------------------------------------


class Builder:
    """`with start_builder(..) as builder:` the process that builds; none where there was nothing to build."""

    def __init__(self, folder, process):
        self.folder, self.process = Path(folder), process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def check(self):
        """Raise DataError, with the end of its log, if it failed."""
        status = self.process.poll() if self.process else 0
        if status:
            log = self.folder / "build.log"  # gone with its folder when new data took the place of old
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:] if log.exists() else []
            raise DataError(f"{self.folder}: the builder ended with status {status}: {' | '.join(lines)}\n"
                            f"try: see {self.folder}/build.log; the same command goes on")  # fmt: skip

    def wait(self, stop=(), tell=say):
        """Return once it is done. Raises DataError if it failed, Stopped when `stop` becomes true."""
        start = said = time.monotonic()
        while self.process and self.process.poll() is None:
            if stop:
                raise Stopped
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                tell(f"{self.folder} is being made, {said - start:.0f} s")
            time.sleep(POLL)
        self.check()

    def stop(self):
        """Let it finish its batch, then end it."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_builder(out, cfg, *, rebuild_dataset=False):
    """Start prepare_data.py multimodal for `out` unless it is complete; return the Builder.

    cfg has the flags of that command. The process is in a group of its own, ends with this one, and says what it does
    in <out>/build.log (rebuild_dataset: in <out>.new, until that is whole). Needs no torch here: start it before that
    is imported, so that both get ready at once. Raises DataError when `out` can't be read or written.
    """
    finish_swap(out)
    if not rebuild_dataset and (shard_files.read_manifest(out) or {}).get("complete"):
        return Builder(out, None)
    folder = beside(Path(os.path.realpath(out)), "new") if rebuild_dataset else Path(out)
    command = [sys.executable, str(root() / "prepare_data.py"), "multimodal", f"--out={out}", f"--parent={os.getpid()}"]
    command += ["--rebuild_dataset"] * rebuild_dataset
    flags = {name: getattr(cfg, name) for name in ("workers", *SIZE_FLAGS, *SOURCE_FLAGS)} | dict(seed=page_seed(cfg))
    command += [f"--{name}={value}" for name, value in flags.items()]
    command += ["--tasks", *cfg.tasks]
    # a rank's variables would make it one: see launch.launch
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "WORLD_SIZE", "RANK", "LOCAL_"))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "build.log", "ab")
    except OSError as e:
        raise DataError(f"{folder} can't be written: {e.strerror}") from e
    pipes = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with log:
        try:
            process = subprocess.Popen(command, env=env | dict(OMP_NUM_THREADS="1"), start_new_session=True, **pipes)
        except OSError as e:
            tasks = " ".join(cfg.tasks)
            raise DataError(f"{folder}: its builder can't start: {e.strerror}\n"
                            f"try: python prepare_data.py multimodal --out {out} --tasks {tasks}") from e  # fmt: skip
    return Builder(folder, process)


def build_pages(cfg, tell):
    """Make the first of cfg.data_paths here and now; return the number of the signal that stopped it, or 0."""
    how = dict(workers=cfg.workers, rebuild_dataset=cfg.rebuild_dataset, tell=tell)
    return build(cfg.data_paths[0], opener(cfg), **how, **sizes(cfg))


class Begun(NamedTuple):
    """What a run has of its pages before it imports torch; the lock of its folder is held as long as this."""

    sources: dict  # {task: source}
    spec: dict
    builder: Builder
    lock: IO | None


def begin_pages(cfg):
    """Return what is Begun, as train_multimodal.py's flags say.

    Rank 0 locks cfg.checkpoint_path and starts a builder if data are missing, unless dataset_only. Raises UsageError
    and DataError, for flags and files that can't be before anything is written.
    """
    folder = cfg.data_paths[0]
    if cfg.dataset_only:
        return Begun({}, {}, Builder(folder, None), None)
    sources = opener(cfg)()
    spec = shard_files.describe(sources, **sizes(cfg))
    if int(os.environ.get("RANK", 0)):
        return Begun(sources, spec, Builder(folder, None), None)
    lock = lock_run(cfg.checkpoint_path, "multimodal", cfg.checkpoint_path)
    return Begun(sources, spec, start_builder(folder, cfg, rebuild_dataset=cfg.rebuild_dataset), lock)


def open_pages(cfg, begun, stop, tell):
    """Return ({task: source}, Shards) of what begin_pages began.

    Raises DataError, and Stopped if `stop` becomes true while it waits for the first data.
    """
    if cfg.rebuild_dataset:
        begun.builder.wait(stop, tell)
    how = dict(wait_timeout=cfg.wait_timeout, incremental=cfg.incremental, alive=begun.builder.check)
    how |= dict(seed=cfg.seed, spec=begun.spec, stop=stop, tell=tell)
    if begun.spec["seed"] != cfg.seed:
        tell(f"{cfg.data_paths[0]} was made with seed {begun.spec['seed']}; --seed {cfg.seed} is of weights and order")
    return begun.sources, Shards(cfg.data_paths, begun.sources, **how)
