"""Build the folders that shard_files.py describes, batch by batch: a kill costs one batch and changes no byte.

Imports torch only where files are written: a trainer first starts the builder, then imports torch at the same time.
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

SOURCE_FLAGS = ("page_rows", "page_cols", "text_source", "stories", "code_dir", "arc_set", "arc_side", "puzzles")
SIZE_FLAGS = ("train_samples", "test_samples", "build_batch", "seed")
BATCH = r"batch_(\d{5,})\.pt"
DATA = rf"(manifest\.json|test\.pt|{BATCH}|consolidated_\d{{3,}}\.pt)(\.tmp-\d+)?"  # names of files built here
POLL = 0.5  # seconds between two looks at a manifest or a lock
SIGN_SECONDS = 5  # between two signs of life


def opener(cfg):
    """Return the call that opens the sources, from the flags of prepare_data.py multimodal or train_multimodal.py."""
    from data_utils.pages.tasks import open_tasks

    return functools.partial(open_tasks, tuple(cfg.tasks), **{name: getattr(cfg, name) for name in SOURCE_FLAGS})


def sizes(cfg):
    """Return the flags that `shard_files.describe` and `build` take.

    A trainer keeps the seed of existing pages: its --seed is for weights and order, and needs no pages of its own.
    """
    flags = {name: getattr(cfg, name) for name in SIZE_FLAGS}
    if hasattr(cfg, "data_paths") and not cfg.rebuild_dataset:
        manifest = shard_files.read_manifest(cfg.data_paths[0])
        flags["seed"] = manifest["spec"]["seed"] if manifest else cfg.seed
    return flags


@functools.cache
def _opened(function, arguments, options):
    return function(*arguments, **dict(options))


def _make(call, seed, chunk):
    """Return {field: array} of the samples (split, task, first, count), in any process."""
    split, task, first, count = chunk
    source = _opened(*call)[task]
    samples = [source.make(i, split, seed) for i in range(first, first + count)]
    return dict(
        page=np.stack([sample.page for sample in samples]),
        target=np.stack([sample.target for sample in samples]),
        key=np.frombuffer(b"".join(sample.key for sample in samples), np.uint8).reshape(-1, 16),
        id=np.array([sample.id for sample in samples], np.int32),
    )


# ---- builder ---------------------------------------------------------------------------------------------------------


def build(out, sources, *, workers, rebuild_dataset=False, parent=0, tell=say, **options):
    """Build or finish the folder `out`; return the number of the signal that stopped it, or 0.

    sources: functools.partial of an importable function of task names that returns {task: source} (see `opener`).
    options: of `shard_files.describe`. workers: processes that make samples; the content does not depend on their
    number, nor on stops and kills. rebuild_dataset: the old data stay until the new are complete. parent: process id of
    the trainer with which the builder ends. With a parent, the builder waits while another one works in `out`; without
    one that is a UsageError. Raises DataError when `out` holds other data or can't be written.
    """
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the trainer, which then ends the builder
    out, call = Path(os.path.realpath(out)), (sources.func, sources.args, tuple(sources.keywords.items()))
    opened = _opened(*call)
    spec = shard_files.describe(opened, **options)
    if workers > 1:  # only the tasks that were opened, so that workers do not repeat the message of a skipped one
        call = call[0], (tuple(opened), *call[1][1:]), call[2]
    finish_swap(out)
    target = beside(out, "new") if rebuild_dataset else out
    with Stop() as stop:

        def halt():
            return stop.signal or (signal.SIGTERM if parent and os.getppid() != parent else 0)

        with _lock(out, parent, halt), _lock(target, parent, halt) if rebuild_dataset else nullcontext():
            if not halt():
                _Build(target, spec, rebuild_dataset, halt, tell).fill(call, workers)
            if not halt() and rebuild_dataset:
                _swap(out)
        if halt():
            tell(f"{target}: stopped; the same command goes on")
        return halt()


def _lock(folder, parent, halt):
    """Return the open lock of a folder; with a parent, wait for it until halted."""
    while not halt():
        try:
            return lock_run(folder, "build")
        except UsageError:
            if not parent:
                raise
        time.sleep(POLL)
    return nullcontext()


class _Build:
    """A folder while it is built: its manifest, its missing batches, signs of life."""

    def __init__(self, path, spec, anew, halt, tell):
        self.path, self.spec, self.halt, self.tell = path, spec, halt, tell
        self.manifest = self._sweep(anew)
        if not self.manifest:
            samples = {name: task["train"] for name, task in spec["tasks"].items()}
            self.manifest = dict(format=shard_files.FORMAT, spec=spec, spec_sha256=shard_files.hash_of(spec))
            self.manifest |= dict(samples=samples, shards=[], test={}, complete=False, content="")
        self.start = self.told_at = time.monotonic()
        self.planned = shard_files.batches(self.manifest["samples"], spec["build_batch"])
        self.first = len(self.manifest["shards"]) * shard_files.SHARD

    def _sweep(self, anew):
        """Return the manifest of the folder, None without a usable one; remove files that it does not list."""
        try:
            manifest = shard_files.read_manifest(self.path)
            if manifest:
                shard_files.check_spec(self.path, manifest["spec"], self.spec)
        except DataError:
            if not anew:
                raise
            manifest = None
        paths = sorted(path for path in self.path.iterdir() if re.fullmatch(DATA, path.name))
        foreign = [path.name for path in paths if path.suffix in (".json", ".pt")]
        if foreign and not manifest and not anew:  # the builder writes the manifest before all other files
            raise UsageError(
                f"{self.path} holds {', '.join(foreign[:4])}, not made here, so not replaced\n"
                f"fix: another folder, as {unused(self.path, '_pages')}"
            )
        listed = _listed(manifest)
        first = len(manifest["shards"]) * shard_files.SHARD if manifest else math.inf
        for path in paths:
            batch = re.fullmatch(BATCH, path.name)
            if int(batch[1]) >= first if batch else path.name in listed:
                continue
            if manifest or _is_of_pages(path):
                path.unlink()
            else:
                set_aside([path])
        return manifest

    def fill(self, call, workers):
        """Build the missing files, until halted."""
        if self.manifest["complete"]:
            return self.tell(f"{self.path} is complete")
        adopted, size, n = self._adopted(), self.spec["build_batch"], len(self.planned)
        self.done = self.first + len(adopted)
        self._record()
        tests = {} if self.manifest["test"] else {name: task["test"] for name, task in self.spec["tasks"].items()}
        tests = [("test", *batch) for batch in shard_files.batches(tests, size)]
        # A trainer waits for the first shard. Held-out samples take longer: one draw in 20 gives one.
        parts = range(self.first, min(shard_files.SHARD, n)), range(max(self.first, shard_files.SHARD), n)
        first, rest = ([("train", *self.planned[i]) for i in part if i not in adopted] for part in parts)
        results = in_order(functools.partial(_make, call, self.spec["seed"]), first + tests + rest, workers)
        try:
            done = self._train(parts[0], adopted, results) and self._test(tests, results)
            if done and self._train(parts[1], adopted, results):
                self._finish()
        finally:
            results.close()

    def _adopted(self):
        """Return {number: {field: array}} of the undamaged batches of an earlier builder."""
        batches = {}
        for path in self.path.glob("batch_*.pt"):
            number = int(path.stem[6:])
            try:
                task, _, count = self.planned[number]
                batches[number] = shard_files.check_tasks(read(path), {task: count}, self.spec)[task]
            except (DataError, LookupError, ValueError, TypeError, AttributeError) as e:
                warn(f"{path.name} is made again: {(str(e).splitlines() or [''])[0]}")
                path.unlink()
        return batches

    def _test(self, chunks, results):
        """Write test.pt of the next results; return whether not halted."""
        batches = []
        for _, task, _, _ in chunks:
            batches.append((task, next(results)))
            if self._pause():
                return False
        if chunks:
            self.manifest["test"] = self._write("test.pt", batches)
            self._record()
        return True

    def _train(self, numbers, adopted, results):
        """Write the batches of these numbers, and the shards that they fill; return whether not halted."""
        batches = []
        for number in numbers:
            task = self.planned[number][0]
            if number not in adopted:
                adopted[number] = next(results)
                _put(self.path / f"batch_{number:05d}.pt", _packed({task: adopted[number]}))
            self.done = max(self.done, number + 1)
            batches.append((task, adopted.pop(number)))
            if len(batches) == shard_files.SHARD or number + 1 == len(self.planned):
                self._consolidate(number, batches)
                batches = []
            if self._pause():
                return False
        return True

    def _finish(self):
        shards = self.manifest["shards"]
        contents = [entry["content"] for entry in [self.manifest["test"], *shards]]
        self.manifest |= dict(complete=True, content=shard_files.hash_of(contents))
        self._record()
        samples, seconds = sum(self.manifest["samples"].values()), time.monotonic() - self.start
        self.tell(f"{self.path}: {samples} samples in {len(shards)} shards, {seconds:.0f} s")

    def _consolidate(self, last, batches):
        """Write the shard that ends with batch `last`, then list it, then delete its batches."""
        shards = self.manifest["shards"]
        first = len(shards) * shard_files.SHARD
        entry = self._write(shard_files.shard_name(len(shards)), batches)
        shards.append(entry | dict(first_batch=first, last_batch=last))
        self._record()
        for number in range(first, last + 1):
            (self.path / f"batch_{number:05d}.pt").unlink(missing_ok=True)

    def _write(self, name, batches):
        """Write batches [(task, {field: array})] as one file; return its entry in the manifest."""
        tasks, digest = {}, hashlib.sha256()
        for task in sorted({task for task, _ in batches}):
            parts = [fields for other, fields in batches if other == task]
            tasks[task] = {field: np.concatenate([part[field] for part in parts]) for field in shard_files.FIELDS}
            for field, x in tasks[task].items():
                digest.update(f"{task} {field} {x.dtype} {x.shape} ".encode() + x.tobytes())
        content = _packed(tasks)
        write_atomic(self.path / name, lambda file: file.write(content))
        counts = {task: len(fields["id"]) for task, fields in tasks.items()}
        return dict(file=name, tasks=counts, sha256=hashlib.sha256(content).hexdigest(), content=digest.hexdigest())

    def _record(self):
        """Write the manifest, with a sign of life."""
        self.signed_at = time.monotonic()
        self.manifest["builder"] = dict(pid=os.getpid(), heartbeat=time.time(), batches=self.done)
        content = json.dumps(self.manifest, indent=1, sort_keys=True).encode("utf-8")
        write_atomic(self.path / "manifest.json", lambda file: file.write(content))

    def _pause(self):
        """After a batch, give a sign of life and a line if they are due; return whether to stop."""
        now = time.monotonic()
        if now - self.signed_at >= SIGN_SECONDS:
            self._record()
        if now - self.told_at >= LINE_SECONDS:
            self.told_at = now
            self.tell(f"{self.path}: {self.done} of {len(self.planned)} batches, {now - self.start:.0f} s")
        return self.halt()


def _listed(manifest):
    """Return the names of the files that a manifest lists, itself among them; without a manifest none."""
    if not manifest:
        return set()
    return {"manifest.json", *(entry["file"] for entry in [*manifest["shards"], manifest["test"]] if entry)}


def _is_of_pages(path):
    """Say whether an unlisted file was built here: a torn one by its name, others by their content."""
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

    # The same string objects in each task: pickle then writes equal bytes for equal content.
    tensors = {task: {n: torch.from_numpy(f[n].copy()) for n in shard_files.FIELDS} for task, f in tasks.items()}
    file = io.BytesIO()
    torch.save(dict(format=shard_files.FORMAT, tasks=tensors), file)
    return file.getvalue()


def _put(path, content):
    """Write a complete file or none, without waiting for the disk: a batch torn by a power cut is made again."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} was not written: {e.strerror}") from e


# ---- replace old data ------------------------------------------------------------------------------------------------


def beside(out, word):
    return out.with_name(f"{out.name}.{word}")


def _swap(out):
    """Rename the complete <out>.new to `out`; between the two renames <out>.replaced holds the old data."""
    new, old = beside(out, "new"), beside(out, "replaced")
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
    except OSError as e:
        raise DataError(f"{new} can't take the place of {out}: {e.strerror}\nfix: move {old} away") from e
    _remove(old)


def finish_swap(out):
    """Finish a replacement that was killed halfway."""
    out = Path(os.path.realpath(out))
    new, old = beside(out, "new"), beside(out, "replaced")
    if old.exists() and (out / "manifest.json").exists():
        _remove(old)
    elif old.exists() and (shard_files.read_manifest(new) or {}).get("complete"):
        _remove(out)
        _swap(out)


def _remove(folder):
    """Delete the files that were built here, and the folder unless it holds others."""
    if not folder.is_dir():
        return
    try:
        manifest = shard_files.read_manifest(folder)
    except DataError:  # a damaged one
        manifest = None
    listed, data = _listed(manifest), [path for path in folder.iterdir() if re.fullmatch(DATA, path.name)]
    built = [path for path in data if path.name in listed or manifest and re.fullmatch(BATCH, path.name)]
    built += [path for path in data if path not in built and _is_of_pages(path)]
    names = [".build.lock"]
    if manifest or any(path.suffix == ".pt" for path in built):
        names += ["manifest.json", "build.log"]
    for path in [*built, *(folder / name for name in names)]:
        path.unlink(missing_ok=True)
    if any(folder.iterdir()):
        warn(f"{folder} stays: it holds other files")
    else:
        folder.rmdir()
