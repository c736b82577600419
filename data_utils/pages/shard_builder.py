"""Makes the folders that shard_files.py reads: batch by batch, so that a kill costs one batch and changes no byte.

Imports torch only where files are written: a trainer starts the builder first, then imports it beside it.
"""

import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from data_utils.checkpoint import read
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import lock_run, set_aside, unused, warn, write_atomic
from data_utils.pages import shard_files
from data_utils.progress import LINE_SECONDS, say
from data_utils.stop import Stop
from data_utils.workers import in_order

SOURCE_FLAGS = ("page_rows", "page_cols", "text_source", "stories", "code_dir", "arc_set", "arc_side")
SIZE_FLAGS = ("train_samples", "test_samples", "build_batch", "seed")
DATA = r"(manifest\.json|test\.pt|batch_\d{5,}\.pt|consolidated_\d{3,}\.pt)(\.tmp-\d+)?"  # names of files made here
POLL = 0.5  # seconds between two looks at a manifest or a lock
SIGN_SECONDS = 5  # between two signs of life


def opener(cfg):
    """Return the call that opens the sources, from the flags of prepare_data.py multimodal or train_multimodal.py."""
    from data_utils.pages.tasks import open_tasks

    return functools.partial(open_tasks, tuple(cfg.tasks), **{name: getattr(cfg, name) for name in SOURCE_FLAGS})


def sizes(cfg):
    """Return the flags that `shard_files.describe` and `build` take."""
    return {name: getattr(cfg, name) for name in SIZE_FLAGS} | dict(seed=page_seed(cfg))


def page_seed(cfg):
    """Return the seed of the pages: --seed, but for a trainer that of the pages that are there.

    All tasks draw their samples with it, and hold out the same for every seed. So a run with another --seed, for its
    weights and its order, needs no pages of its own.
    """
    if not hasattr(cfg, "data_paths") or cfg.rebuild_dataset:
        return cfg.seed
    manifest = shard_files.read_manifest(cfg.data_paths[0])
    return manifest["spec"]["seed"] if manifest else cfg.seed


@functools.cache
def _opened(function, arguments, options):
    return function(*arguments, **dict(options))


def _make(call, seed, chunk):
    """Return {field: array} of the samples (split, task, first, count), in whatever process."""
    split, task, first, count = chunk
    source = _opened(*call)[task]
    made = [source.make(i, split, seed) for i in range(first, first + count)]
    key = np.frombuffer(b"".join(sample.key for sample in made), np.uint8).reshape(-1, 16)
    pages, targets = (np.stack([getattr(sample, name) for sample in made]) for name in ("page", "target"))
    return dict(page=pages, target=targets, key=key, id=np.array([sample.id for sample in made], np.int32))


# ---- builder ---------------------------------------------------------------------------------------------------------


def build(out, sources, *, train_samples, test_samples, build_batch, seed, workers, rebuild_dataset=False, parent=0,
          tell=say):  # fmt: skip
    """Make or finish the folder `out`; return the number of the signal that stopped it, or 0.

    sources: functools.partial(f, names, ..) of an importable f -> {task: source} (`opener`). workers: processes that
    make samples. The content is the same for any number of them, and however often this was stopped or killed.
    rebuild_dataset: what is there stands until the new is whole. parent: process id of the trainer that this ends with,
    and for which it waits while another builder is at work in `out`; without one that is a UsageError. Raises DataError
    when `out` holds other data or can't be written.
    """
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the trainer, which then ends this
    out, call = Path(os.path.realpath(out)), (sources.func, sources.args, tuple(sources.keywords.items()))
    options = dict(train_samples=train_samples, test_samples=test_samples, build_batch=build_batch, seed=seed)
    opened = _opened(*call)
    spec = shard_files.describe(opened, **options)
    if workers > 1:  # which need not say again what is left out
        call = call[0], (tuple(opened), *call[1][1:]), call[2]
    finish_swap(out)
    target = beside(out, "new") if rebuild_dataset else out
    with Stop() as stop:

        def halt():
            return stop.signal or (signal.SIGTERM if parent and os.getppid() != parent else 0)

        with _lock(out, parent, halt), _lock(target, parent, halt) if rebuild_dataset else nullcontext():
            if not halt():
                _Folder(target, spec, rebuild_dataset, halt, tell).fill(call, workers)
            if not halt() and rebuild_dataset:
                _swap(out)
        if halt():
            tell(f"{target}: stopped; the same command goes on")
        return halt()


def _lock(folder, parent, halt):
    """Return the open lock of a folder; for a parent, wait for it until halted."""
    while not halt():
        try:
            return lock_run(folder, "build")
        except UsageError:
            if not parent:
                raise
        time.sleep(POLL)
    return nullcontext()


class _Folder:
    """A folder in the making: what it holds, what it lacks, signs of life."""

    def __init__(self, path, spec, anew, halt, tell):
        self.path, self.spec, self.halt, self.tell = path, spec, halt, tell
        samples = {name: task["train"] for name, task in spec["tasks"].items()}
        begin = dict(format=shard_files.FORMAT, spec=spec, spec_sha256=shard_files.hash_of(spec), samples=samples)
        self.manifest = self._begun(anew) or begin | dict(shards=[], test={}, complete=False, content="")
        self.start = self.said = time.monotonic()
        self.planned = shard_files.batches(self.manifest["samples"], spec["build_batch"])
        self.first = len(self.manifest["shards"]) * shard_files.SHARD

    def _begun(self, anew):
        """Return the manifest that is there, None if there is nothing to use; files that it does not list are swept."""
        try:
            manifest = shard_files.read_manifest(self.path)
            if manifest:
                shard_files.check_spec(self.path, manifest["spec"], self.spec)
        except DataError:
            if not anew:
                raise
            manifest = None
        names = sorted(path.name for path in self.path.iterdir() if re.fullmatch(DATA, path.name))
        others = [name for name in names if manifest is None and not re.search(r"\.tmp-\d+$", name)]
        if others and not anew:  # the manifest is written before all else
            raise UsageError(f"{self.path} holds {', '.join(others[:4])}, not made here, so not replaced\n"
                             f"try: another folder, as {unused(self.path, '_pages')}")  # fmt: skip
        listed = {"manifest.json"} if manifest else set()
        listed |= {entry["file"] for entry in [*manifest["shards"], manifest["test"]] if entry} if manifest else set()
        first = len(manifest["shards"]) * shard_files.SHARD if manifest else math.inf
        for path in self.path.iterdir():
            batch = re.fullmatch(r"batch_(\d{5,})\.pt", path.name)
            if int(batch[1]) < first if batch else re.fullmatch(DATA, path.name) and path.name not in listed:
                path.unlink() if manifest or _is_of_pages(path) else set_aside([path])
        return manifest

    def fill(self, call, workers):
        """Make what is missing, until halted."""
        if self.manifest["complete"]:
            return self.tell(f"{self.path} is complete")
        adopted, size, n = self._adopted(), self.spec["build_batch"], len(self.planned)
        self.done = self.first + len(adopted)
        self._record()
        tests = {} if self.manifest["test"] else {name: task["test"] for name, task in self.spec["tasks"].items()}
        # one draw in 20 is held out, so that these take longer than a whole shard, for which a trainer waits
        first_shard, rest = range(self.first, min(shard_files.SHARD, n)), range(max(self.first, shard_files.SHARD), n)
        tests = [("test", *batch) for batch in shard_files.batches(tests, size)]
        chunks = [[("train", *self.planned[i]) for i in some if i not in adopted] for some in (first_shard, rest)]
        made = in_order(functools.partial(_make, call, self.spec["seed"]), chunks[0] + tests + chunks[1], workers)
        try:
            if self._train(first_shard, adopted, made) and self._test(tests, made) and self._train(rest, adopted, made):
                self._finish()
        finally:
            made.close()

    def _adopted(self):
        """Return {number: {field: array}} of the batches that an earlier builder left whole."""
        found = {}
        for path in self.path.glob("batch_*.pt"):
            number = int(path.stem[6:])
            try:
                task, _, count = self.planned[number]
                found[number] = shard_files.check_tasks(read(path), {task: count}, self.spec)[task]
            except (DataError, LookupError, ValueError, TypeError, AttributeError) as e:
                warn(f"{path.name} is made again: {(str(e).splitlines() or [''])[0]}")
                path.unlink()
        return found

    def _test(self, chunks, made):
        """Make test.pt of the next of `made`; return whether not halted."""
        batches = []
        for _, task, _, _ in chunks:
            batches.append((task, next(made)))
            if self._pause():
                return False
        if chunks:
            self.manifest["test"] = self._write("test.pt", batches)
            self._record()
        return True

    def _train(self, numbers, adopted, made):
        """Write the batches of these numbers, and a shard where they fill one; return whether not halted."""
        batches = []
        for number in numbers:
            task, path = self.planned[number][0], self.path / f"batch_{number:05d}.pt"
            if number not in adopted:
                adopted[number] = next(made)
                _put(path, _packed({task: adopted[number]}))
            self.done = max(self.done, number + 1)
            batches.append((task, adopted.pop(number)))
            if len(batches) == shard_files.SHARD or number + 1 == len(self.planned):
                self._consolidate(number, batches)
                batches = []
            if self._pause():
                return False
        return True

    def _finish(self):
        listed = self.manifest["shards"]
        contents = [entry["content"] for entry in [self.manifest["test"], *listed]]
        self.manifest |= dict(complete=True, content=shard_files.hash_of(contents))
        self._record()
        samples, seconds = sum(self.manifest["samples"].values()), time.monotonic() - self.start
        self.tell(f"{self.path}: {samples} samples in {len(listed)} shards, {seconds:.0f} s")

    def _consolidate(self, last, batches):
        """Write the shard that ends with batch `last`, then list it, then delete its batches."""
        listed = self.manifest["shards"]
        entry = self._write(shard_files.shard_name(len(listed)), batches)
        first = len(listed) * shard_files.SHARD
        listed.append(entry | dict(first_batch=first, last_batch=last))
        self._record()
        for number in range(first, last + 1):
            (self.path / f"batch_{number:05d}.pt").unlink(missing_ok=True)

    def _write(self, name, batches):
        """Write batches [(task, {field: array})] as one file; return its entry in the manifest."""
        parts, tasks = {}, {}
        for task, fields in batches:
            parts.setdefault(task, []).append(fields)
        for task, some in sorted(parts.items()):
            tasks[task] = {field: np.concatenate([fields[field] for fields in some]) for field in shard_files.FIELDS}
        content, digest = _packed(tasks), hashlib.sha256()
        for task, fields in tasks.items():
            for field, x in fields.items():
                digest.update(f"{task} {field} {x.dtype} {x.shape} ".encode() + x.tobytes())
        write_atomic(self.path / name, lambda file: file.write(content))
        counts = {task: len(fields["id"]) for task, fields in tasks.items()}
        return dict(file=name, tasks=counts, sha256=hashlib.sha256(content).hexdigest(), content=digest.hexdigest())

    def _record(self):
        self.signed = time.monotonic()
        self.manifest["builder"] = dict(pid=os.getpid(), heartbeat=time.time(), batches=self.done)
        content = json.dumps(self.manifest, indent=1, sort_keys=True).encode("utf-8")
        write_atomic(self.path / "manifest.json", lambda file: file.write(content))

    def _pause(self):
        """After a batch: a sign of life, a line, whether to stop."""
        now = time.monotonic()
        if now - self.signed >= SIGN_SECONDS:
            self._record()
        if now - self.said >= LINE_SECONDS:
            self.said = now
            self.tell(f"{self.path}: {self.done} of {len(self.planned)} batches, {now - self.start:.0f} s")
        return self.halt()


def _is_of_pages(path):
    """Return whether a file was made here, though no manifest lists it: a torn one by its name, others by content."""
    if re.search(r"\.tmp-\d+$", path.name):
        return True
    try:
        state = read(path)
    except CheckpointError:
        return False
    return isinstance(state, dict) and state.keys() == {"format", "tasks"}


def _packed(tasks):
    """Return the bytes of a file that holds {task: {field: array}}."""
    import torch

    # names of one identity: pickle writes a string once, and what else is equal again
    tensors = {task: {n: torch.from_numpy(f[n].copy()) for n in shard_files.FIELDS} for task, f in tasks.items()}
    file = io.BytesIO()
    torch.save(dict(format=shard_files.FORMAT, tasks=tensors), file)
    return file.getvalue()


def _put(path, content):
    """Write a whole file or none, but do not wait for the disk: a batch torn by a power cut is found and made again."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} was not written: {e.strerror}") from e


# ---- old data for new ------------------------------------------------------------------------------------------------


def beside(out, word):
    return out.with_name(f"{out.name}.{word}")


def _swap(out):
    """Put the whole <out>.new in the place of `out`; between the two renames <out>.replaced holds the old data."""
    new, old = beside(out, "new"), beside(out, "replaced")
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
    except OSError as e:
        raise DataError(f"{new} can't take the place of {out}: {e.strerror}\ntry: move {old} away") from e
    _remove(old)


def finish_swap(out):
    """Finish what a kill left half done."""
    out = Path(os.path.realpath(out))
    new, old, there = beside(out, "new"), beside(out, "replaced"), (out / "manifest.json").exists()
    if old.exists() and there:
        _remove(old)
    elif old.exists() and (shard_files.read_manifest(new) or {}).get("complete"):
        _remove(out)
        _swap(out)


def _remove(folder):
    """Delete the files that were made here, and the folder unless it holds others."""
    if not folder.is_dir():
        return
    accounted = _accounted(folder)
    for path in folder.iterdir():
        if path.name in accounted or re.fullmatch(DATA, path.name) and _is_of_pages(path):
            path.unlink()
    if any(folder.iterdir()):
        warn(f"{folder} stays: it holds other files")
    else:
        folder.rmdir()


def _accounted(folder):
    """Return the names of the files that the manifest of a folder accounts for, itself among them."""
    try:
        manifest = shard_files.read_manifest(folder)
    except DataError:
        manifest = None
    if manifest:
        names = {entry["file"] for entry in [*manifest["shards"], manifest["test"]] if entry}
        names |= {path.name for path in folder.glob("batch_*.pt") if re.fullmatch(DATA, path.name)}  # torn ones too
    else:  # a damaged one
        names = {path.name for path in folder.glob("*.pt") if re.fullmatch(DATA, path.name) and _is_of_pages(path)}
    return names | {".build.lock"} | ({"manifest.json", "build.log"} if manifest or names else set())
