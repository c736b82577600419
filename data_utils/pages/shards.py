"""Read pages with their answers from folders, the first of which another process may still be building."""

import functools
import itertools
import os
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data_utils.errors import DataError
from data_utils.files import lock_run, root
from data_utils.pages import shard_builder, shard_files
from data_utils.pages.published import adopt
from data_utils.progress import LINE_SECONDS, say

STALE = 60  # seconds without a sign of the builder before the reader gives up
GRACE = 20  # seconds that a builder has to finish its batch before it is killed


class Stopped(Exception):
    """A signal to this process ended the wait for data."""


class _Folder:
    """One folder: its manifest, the number of samples in each shard, the files opened so far."""

    def __init__(self, path):
        self.path, self.manifest, self._open = Path(path), None, {}

    def refresh(self):
        """Read the manifest again; return it, or None without one."""
        old, self.manifest = self.manifest, shard_files.read_manifest(self.path)
        if old and (not self.manifest or self.manifest["spec_sha256"] != old["spec_sha256"]):
            raise DataError(f"{self.path} was replaced by other data while it was read\ntry: the same command")
        return self.manifest

    @functools.cached_property
    def counts(self):
        """{task: (S,) samples in each of S planned shards}."""
        planned = shard_files.batches(self.manifest["samples"], self.manifest["spec"]["build_batch"])
        counts = {task: np.zeros(-(-len(planned) // shard_files.SHARD), np.int64) for task in self.manifest["samples"]}
        for i, (task, _, count) in enumerate(planned):
            counts[task][i // shard_files.SHARD] += count
        return counts

    def file(self, shard):
        """Return {task: {field: array}} of a shard, by its number, or of "test"."""
        if shard not in self._open:
            spec = self.manifest["spec"]
            if shard == "test":
                entry, counts = self.manifest["test"], {name: task["test"] for name, task in spec["tasks"].items()}
            else:
                entry = self.manifest["shards"][shard]
                counts = {task: int(n[shard]) for task, n in self.counts.items() if n[shard]}
            self._open[shard] = shard_files.open_file(self.path, entry, counts, spec)
        return self._open[shard]

    def nothing(self):
        """Return the error of a folder without the data that are needed."""
        problem = f"No consolidated files found in {self.path}"
        if self.manifest and self.manifest["shards"]:
            problem = f"{self.path} is unfinished"
        return DataError(f"{problem}\ntry: --dataset-only --data_paths {shlex.quote(str(self.path))}")


class Shards:
    """Samples of the tasks `names` from one or more folders, the first of which may still be under construction.

    Sample i of a task has the same content, however much of the data exists when it is read. spec: the expected
    specification of the first folder, as of `describe`; None accepts any. seed: of the order. Reading waits for missing
    data at most wait_timeout seconds without a new batch. While it waits, `alive()` raises DataError if the builder has
    failed, and a true `stop` raises Stopped. incremental=False first waits for all data. Raises DataError when data are
    absent, damaged, of another specification, or do not come.
    """

    def __init__(
        self, folders, names, *, seed, spec=None, wait_timeout=0, incremental=True, alive=None, stop=(), tell=say
    ):
        self.names, self.seed, self.wait_timeout = tuple(names), seed, wait_timeout
        self.alive, self.stop, self.tell = alive or (lambda: None), stop, tell
        self._orders = {}
        self.folders = [_Folder(path) for path in folders]
        first, *others = self.folders
        self._wait(lambda manifest: manifest)
        if spec:
            shard_files.check_spec(first.path, first.manifest["spec"], spec)
        self._wait(lambda manifest: manifest["shards"] if incremental else manifest["complete"])
        for folder in others:
            if not (folder.refresh() or {}).get("complete"):
                raise folder.nothing()
        self._places = {task: self._table(task) for task in self.names}
        hashes = [folder.manifest["spec_sha256"] for folder in self.folders]
        self.hash = shard_files.hash_of(hashes) if others else hashes[0]

    def _table(self, task):
        """Return ([(folder, shard)] that hold the task, (n + 1,) number of the first sample in each)."""
        having = [folder for folder in self.folders if task in folder.counts]
        if not having:
            names = ", ".join(sorted({name for folder in self.folders for name in folder.counts}))
            raise DataError(f"no task {task} in {', '.join(str(f.path) for f in self.folders)}: there are {names}")
        first, *others = [folder.manifest["spec"]["tasks"][task]["task"] for folder in having]
        for folder, form in zip(having[1:], others, strict=True):
            shard_files.check_spec(folder.path, form, first)
        places = [(folder, s) for folder in having for s in np.flatnonzero(folder.counts[task]).tolist()]
        return places, np.cumsum([0, *(folder.counts[task][s] for folder, s in places)])

    def rows(self, task):
        """Return the planned number of training samples, which does not change while data come."""
        return int(self._places[task][1][-1])

    def order(self, task, epoch):
        """Return the permutation (n,) of the samples in an epoch, a function of (seed, task, epoch, plan).

        Epoch 0 goes shard by shard, in the order of their construction, shuffled within each.
        """
        if (task, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.names):  # a batch rarely spans more than two epochs
                self._orders.pop(next(iter(self._orders)))
            draw = np.random.default_rng((self.seed, zlib.crc32(task.encode()), epoch))
            starts = self._places[task][1]
            pieces = [(0, starts[-1])] if epoch else itertools.pairwise(starts)
            self._orders[task, epoch] = np.concatenate([a + draw.permutation(b - a) for a, b in pieces])
        return self._orders[task, epoch]

    def at(self, task, positions):
        """Return the samples (n,) at `positions` (n,) of the endless stream of a task: position j is in epoch j // n.

        Slot i of B takes its k-th sample from position i + k B.
        """
        epochs, places = np.divmod(np.asarray(positions), self.rows(task))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            samples[rows] = self.order(task, epoch)[places[rows]]
        return samples

    def _locate(self, task, indices):
        """Return the index (n,) in the table of the task for samples (n,), and the last shard of the first folder."""
        places, starts = self._places[task]
        if len(indices) and not (0 <= indices.min() and indices.max() < starts[-1]):
            raise IndexError(f"{task}: samples are 0 to {starts[-1] - 1}")
        parts = starts.searchsorted(indices, "right") - 1
        shards = [places[part][1] for part in np.unique(parts).tolist() if places[part][0] is self.folders[0]]
        return parts, max(shards, default=-1)

    def ready(self, task, indices):
        """Say whether `samples` would answer without waiting. Raises DataError if the builder has failed."""
        _, last = self._locate(task, np.asarray(indices))
        if last < len(self.folders[0].manifest["shards"]):
            return True
        self.alive()
        return last < len(self.folders[0].refresh()["shards"])

    def samples(self, task, indices):
        """Return {page (n, R, C) uint8, target (n, L) uint8, id (n,) int64}, torch, of samples (n,); wait for them."""
        indices = np.asarray(indices)
        parts, last = self._locate(task, indices)
        if not self.ready(task, indices):
            self._wait(lambda manifest: len(manifest["shards"]) > last)
        places, starts = self._places[task]
        arrays = {}
        for part in np.unique(parts).tolist():
            rows, (folder, shard) = parts == part, places[part]
            fields = folder.file(shard)[task]
            for name in ("page", "target", "id"):
                if name not in arrays:
                    arrays[name] = np.empty((len(indices), *fields[name].shape[1:]), fields[name].dtype)
                arrays[name][rows] = fields[name][indices[rows] - starts[part]]
        return _tensors(arrays)

    def held_out(self, task, split):
        """Return the same of all held-out samples with even numbers ("val", they select) or odd ones ("test")."""
        self._wait(lambda manifest: manifest["test"])
        tests = [folder.file("test")[task] for folder in self.folders if task in folder.counts]
        every = slice(("val", "test").index(split), None, 2)
        return _tensors({name: np.concatenate([t[name][every] for t in tests]) for name in ("page", "target", "id")})

    def _wait(self, done):
        """Read the manifest of the first folder until done(manifest)."""
        folder, start = self.folders[0], time.monotonic()
        heartbeat = batches = None
        seen = progressed = line_time = start  # times of the last heartbeat, batch and line
        while not done(manifest := folder.refresh()):
            self.alive()
            if self.stop:
                raise Stopped
            now, builder = time.monotonic(), (manifest or {}).get("builder", {})
            if heartbeat != builder.get("heartbeat"):  # timed by this clock: other machines' clocks may disagree
                heartbeat, seen = builder.get("heartbeat"), now
            if batches != builder.get("batches"):
                batches, progressed = builder.get("batches"), now
            if not self.wait_timeout:
                raise folder.nothing()
            problem = ""
            if now - progressed >= self.wait_timeout:
                problem = f"no new batch in {self.wait_timeout} s"
            elif heartbeat and now - seen >= STALE:
                problem = f"its builder, process {builder['pid']}, gave no sign in {STALE} s"
            if problem:
                raise DataError(f"{folder.path}: {problem}; see {folder.path}/build.log\ntry: the same command")
            if now - line_time >= LINE_SECONDS:
                line_time = now
                self.tell(f"waiting for {folder.path}: {batches or 0} batches, {now - start:.0f} s")
            time.sleep(shard_builder.POLL)


def _tensors(arrays):
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | dict(id=tensors["id"].long())


# ---- the builder as a child process ----------------------------------------------------------------------------------


class Builder:
    """`with start_builder(..) as builder:` the process that builds; none if there is nothing to build."""

    def __init__(self, folder, process):
        self.folder, self.process = Path(folder), process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Let the process finish its batch, then end it."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def check(self):
        """Raise DataError, with the end of its log, if the process failed."""
        status = self.process.poll() if self.process else 0
        if status:
            log = self.folder / "build.log"  # absent after its folder took the place of old data
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
            if errors:  # its own words, advice included
                problem, *more = lines[errors[-1] :]
                raise DataError("\n".join([f"{self.folder}: {problem.removeprefix('error: ')}; see {log}", *more]))
            raise DataError(
                f"{self.folder}: the builder ended with status {status}: {' | '.join(lines[-3:])}; see {log}\n"
                "try: the same command"
            )

    def wait(self, stop=(), tell=say):
        """Return when the process is done. Raises DataError if it failed, Stopped if `stop` becomes true."""
        start = line_time = time.monotonic()
        while self.process and self.process.poll() is None:
            if stop:
                raise Stopped
            if time.monotonic() - line_time >= LINE_SECONDS:
                line_time = time.monotonic()
                tell(f"{self.folder} is under construction, {line_time - start:.0f} s")
            time.sleep(shard_builder.POLL)
        self.check()


def start_builder(out, cfg, *, rebuild_dataset=False):
    """Start prepare_data.py multimodal for `out` unless that is complete; return the Builder.

    cfg has the flags of that command. The process has its own group, ends with this one, and logs to <out>/build.log
    (rebuild_dataset: in <out>.new until that is complete). It needs no torch: start it before importing torch, so that
    both run at the same time. Raises DataError when `out` can't be read or written.
    """
    shard_builder.finish_swap(out)
    if not rebuild_dataset and (shard_files.read_manifest(out) or {}).get("complete"):
        return Builder(out, None)
    folder = shard_builder.beside(Path(os.path.realpath(out)), "new") if rebuild_dataset else Path(out)
    command = [sys.executable, str(root() / "prepare_data.py"), "multimodal", f"--out={out}", f"--parent={os.getpid()}"]
    if rebuild_dataset:
        command.append("--rebuild_dataset")
    flags = {name: getattr(cfg, name) for name in ("workers", *shard_builder.SOURCE_FLAGS)} | shard_builder.sizes(cfg)
    command += [*(f"--{name}={value}" for name, value in flags.items()), "--tasks", *cfg.tasks]
    # The variables of a rank would make the builder one, see launch.launch.
    ranked = ("TORCHELASTIC", "WORLD_SIZE", "RANK", "LOCAL_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ranked)} | dict(OMP_NUM_THREADS="1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "build.log", "ab")
    except OSError as e:
        raise DataError(f"{folder} can't be written: {e.strerror}") from e
    with log:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            return Builder(folder, subprocess.Popen(command, env=env, start_new_session=True, **pipes))
        except OSError as e:
            advice = (
                f"try: python prepare_data.py multimodal --out {shlex.quote(str(out))} --tasks {' '.join(cfg.tasks)}"
            )
            raise DataError(f"{folder}: its builder can't start: {e.strerror}\n{advice}") from e


def build_pages(cfg, tell):
    """Build the first of cfg.data_paths in this process; return the number of the signal that stopped it, or 0."""
    options = dict(workers=cfg.workers, rebuild_dataset=cfg.rebuild_dataset, tell=tell) | shard_builder.sizes(cfg)
    return shard_builder.build(cfg.data_paths[0], shard_builder.opener(cfg), **options)


class Begun(NamedTuple):
    """The pages of a run before it imports torch. Its folder stays locked as long as this lives."""

    sources: dict  # {task: source}
    spec: dict
    builder: Builder
    lock: IO | None


def begin_pages(cfg):
    """Return Begun, by the flags of train_multimodal.py.

    Rank 0 locks cfg.checkpoint_path and starts a builder if data are missing, unless dataset_only. Raises UsageError
    and DataError for unusable flags and files before it writes anything.
    """
    adopt(cfg)
    folder = cfg.data_paths[0]
    begun = Begun({}, {}, Builder(folder, None), None)
    if cfg.dataset_only:
        return begun
    sources = shard_builder.opener(cfg)()
    begun = begun._replace(sources=sources, spec=shard_files.describe(sources, **shard_builder.sizes(cfg)))
    if int(os.environ.get("RANK", 0)):
        return begun
    lock = lock_run(cfg.checkpoint_path, "multimodal", cfg.checkpoint_path)
    return begun._replace(builder=start_builder(folder, cfg, rebuild_dataset=cfg.rebuild_dataset), lock=lock)


def open_pages(cfg, begun, stop, tell):
    """Return ({task: source}, Shards) of the result of begin_pages.

    Raises DataError, and Stopped if `stop` becomes true during the wait for the first data.
    """
    if cfg.rebuild_dataset:
        begun.builder.wait(stop, tell)
    page_seed = begun.spec["seed"]
    if page_seed != cfg.seed:
        tell(f"{cfg.data_paths[0]} was made with seed {page_seed}; --seed {cfg.seed} is of weights and order")
    options = dict(seed=cfg.seed, spec=begun.spec, alive=begun.builder.check, stop=stop, tell=tell)
    options |= dict(wait_timeout=cfg.wait_timeout, incremental=cfg.incremental)
    return begun.sources, Shards(cfg.data_paths, begun.sources, **options)
