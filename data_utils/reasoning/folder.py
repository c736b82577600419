"""Prepared folders: rows of ids as JSONL or binary files. A killed command loses seconds of work.

train.jsonl    one {"encoder_ids": [..], "decoder_input_ids": [..], "labels": [..]} per line
train.bin      the ids of the encoder, then the labels, row by row; uint16, or uint32 above 65,536 ids
train.idx.npy  int64 (rows, 2): where the labels of a row start and end in train.bin. A third column is the end of
               decoder inputs, if rows have other ones than bos and the shifted labels
val.*          the same of the held-out rows
tokenizer.json, meta.json; meta.json is written last
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import time
from pathlib import Path

import numpy as np

from data_utils.checkpoint import changed
from data_utils.errors import DataError, UsageError
from data_utils.files import lock_run, set_aside, sweep, unused, write_atomic
from data_utils.reasoning.rows import SPLITS
from data_utils.tokenizer import SimpleTokenizer

FILES = {
    "jsonl": ["train.jsonl", "val.jsonl"],
    "bin": ["train.bin", "train.idx", "val.bin", "val.idx"],
    "both": ["train.jsonl", "val.jsonl", "train.bin", "train.idx", "val.bin", "val.idx"],
}
FINISHED = {name: f"{name}.npy" if name.endswith("idx") else name for name in FILES["both"]}
KNOWN = {*FINISHED.values(), "train.npy", "val.npy", "meta.json", "tokenizer.json", "progress.json", ".prepare.lock"}
KNOWN |= {f"{name}.partial" for name in FILES["both"]}
SUDOKU = ("train.npy", "val.npy")  # data files of the command sudoku
PUZZLES = ("sudoku", "maze", "arc")  # kinds of meta.json whose rows are puzzles
TRM = [f"all__{name}.npy" for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")]
TRM = [f"{split}/{name}" for split in ("train", "test") for name in ("dataset.json", *TRM)]
PUZZLE_FILES = {
    *SUDOKU,
    "train_ratings.npy",
    "val_ratings.npy",
    "arc.json",
    "identifiers.json",
    "test_puzzles.json",
    *TRM,
}
KNOWN |= PUZZLE_FILES  # of the command puzzles
FLAGS = dict(language="--dest", merge="--output_dir", mix="--output_dir", convert="--output_dir")  # others have --out


def write_json(path, state):
    content = _json_bytes(state)
    write_atomic(path, lambda file: file.write(content))


def _json_bytes(state):
    return json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n"


def write_beside(path, config, meta, tokenizer=None):
    """Write the companions of the checkpoint `path`: <name>.yaml with every flag, meta.json, tokenizer.json.

    Also removes step_*.yaml files whose checkpoint is gone.
    """
    import yaml

    path = Path(path)
    write_atomic(path.with_suffix(".yaml"), lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()))
    contents = {"meta.json": _json_bytes(meta)}
    if tokenizer:
        contents["tokenizer.json"] = tokenizer.to_json().encode()
    for name, content in contents.items():
        _write_unless_equal(path.parent / name, content)
    for orphan in path.parent.glob("step_*.yaml"):
        if re.fullmatch(r"step_\d+\.yaml", orphan.name) and not orphan.with_suffix(".pt").exists():
            orphan.unlink()


def _write_unless_equal(path, content):
    """Write a file, and rename an older one with other content to *.bak: it belongs to another run."""
    if path.exists() and path.read_bytes() != content:
        set_aside([path])
    if not path.exists():
        write_atomic(path, lambda file: file.write(content))


def read_meta(folder):
    """Return meta.json of a finished folder with defaults filled in. Raises DataError, listing the files."""
    folder = Path(folder)
    if folder.is_file():
        remedy = "prepare_data.py puzzles makes one of Sudokus, mazes and ARC tasks, prepare_data.py language of text"
        raise DataError(f"{folder} is a file: expected a folder of prepared rows\nfix: {remedy}")
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    if "progress.json" in names and "meta.json" not in names:
        raise DataError(f"{folder} is unfinished: run the same command again")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = dict(kind="pairs", max_seq_len=0, tokenizer_file="tokenizer.json", counts={}, source_files=[]) | meta
        if meta["kind"] in (*PUZZLES, "trm"):
            return meta
        present = [form for form in ("bin", "jsonl") if (folder / f"train.{form}").is_file()]
        meta.setdefault("format", (present or [""])[0])
        if not present or meta["format"] not in FILES:
            raise ValueError("no train.jsonl or train.bin")
        sizes = [meta["vocab_size"], meta["pad_id"], meta["bos_id"], meta["eos_id"]]
        if not all(type(size) is int and 0 <= size < 2**32 for size in sizes) or max(sizes[1:]) >= sizes[0]:
            raise ValueError(f"vocab_size, pad_id, bos_id, eos_id are {sizes}")
        if Path(str(meta["tokenizer_file"])).name != meta["tokenizer_file"]:
            raise ValueError(f"tokenizer_file {meta['tokenizer_file']} is not a name in this folder")
        return meta
    except OSError:
        reason = f"no meta.json in {folder}; there are: {', '.join(names) or 'no files'}"
        if not Path(folder).is_dir():
            reason = f"{folder}: no such folder"
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        reason = f"{folder}: {type(e).__name__}: {e}; there are: {', '.join(names)}"
    raise DataError(f"{reason}\ntry: {_advice(folder)}")


def puzzle_kind(folder):
    """Return which of PUZZLES a prepared folder holds; "" for any other folder."""
    kind = _read_json(Path(folder, "meta.json")).get("kind")
    return kind if kind in PUZZLES else ""


def _advice(folder):
    """Return the command that makes a prepared folder, from the rows in `folder` if there are any."""
    endings = (".jsonl", ".json", ".txt", ".parquet", ".arrow", ".gz")
    if (folder / "train" / "dataset.json").is_file():
        dest = unused(folder, "_prepared")
        return f"python prepare_data.py puzzles --source {shlex.quote(str(folder))} --out {shlex.quote(str(dest))}"
    readable = folder.is_dir() and any(path.suffix in endings for path in folder.rglob("*"))
    if not readable or (folder / "meta.json").exists():
        return "python prepare_data.py language --help"
    dest = folder
    if folder.exists() and any(folder.iterdir()):
        dest = unused(folder, "_prepared")  # never among the user's files
    return f"python prepare_data.py language --source {shlex.quote(str(folder))} --dest {shlex.quote(str(dest))}"


def read_index(folder, split, meta):
    """Return (ids (N,), index (rows, 2 or 3)) of a binary folder as memory maps; DataError if they do not fit."""
    ids, index = np.zeros(0, np.uint16), np.zeros((0, 2), np.int64)
    dtype = np.uint16 if meta["vocab_size"] <= 65536 else np.uint32
    path = Path(folder, f"{split}.idx.npy")
    try:
        if Path(folder, f"{split}.bin").stat().st_size:  # an empty file can't be mapped
            index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain array is indexed faster
            ids = np.asarray(np.memmap(Path(folder, f"{split}.bin"), dtype, "r"))
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: {str(e).splitlines()[0]}") from e
    valid = index.dtype == np.int64 and index.ndim == 2 and index.shape[1] in (2, 3)
    if not valid or (index[-1, -1] if len(index) else 0) != len(ids):
        raise DataError(f"{path} does not fit {split}.bin\nfix: prepare {folder} again with --fresh")
    return ids, index


def read_row(ids, index, i):
    """Return the encoder ids, labels and decoder inputs of row i; empty inputs mean bos and the shifted labels."""
    begin = index[i - 1, -1] if i else 0
    return ids[begin : index[i, 0]], ids[index[i, 0] : index[i, 1]], ids[index[i, 1] : index[i, -1]]


def refuse_complete(folder, fresh):
    """Raise UsageError if the folder is finished, unless `fresh`."""
    if not fresh and Path(folder, "meta.json").exists():
        if "specification" in _read_json(Path(folder, "progress.json")):  # killed before it was removed
            Path(folder, "progress.json").unlink()
        raise UsageError(f"{folder} is complete; --fresh makes it again\ntry: --fresh")


def check_apart(dest, flag, sources):
    """Raise UsageError if `dest` is, contains or lies in one of `sources`; links are followed."""
    target = Path(os.path.realpath(dest))
    for source in sources:
        place = Path(os.path.realpath(source))
        if target == place or target in place.parents or place in target.parents:
            outer = source if place in target.parents else dest
            raise UsageError(
                f"{flag} {dest} and the source {source} overlap: output never goes among the input\n"
                f"try: {flag} {shlex.quote(str(unused(outer, '_prepared')))}"
            )


def clear(folder, fresh, flag):
    """Remove the files that an earlier command of this project wrote into `folder`.

    Raises UsageError for files of the same names from elsewhere; with `fresh` they are renamed to *.bak.
    """
    folder = Path(folder)
    existing = {name for name in KNOWN - {".prepare.lock"} if os.path.lexists(folder / name)}
    proven = written_here(folder) if existing else set()
    foreign = sorted(existing - proven)
    if foreign and not fresh:
        shown = ", ".join(foreign[:4])
        if len(foreign) > 4:
            shown += ", ..."
        raise UsageError(
            f"{folder} holds {shown}: not written by prepare_data.py, so not replaced; --fresh renames them to *.bak\n"
            f"try: {flag} {shlex.quote(str(unused(folder, '_prepared')))}\ntry: --fresh"
        )
    set_aside(folder / name for name in foreign)
    for name in sorted(existing & proven, reverse=True):  # data before the meta.json that proves it
        (folder / name).unlink(missing_ok=True)


def written_here(folder):
    """Return the names of the files in `folder` that its meta.json or its progress.json proves to be written here.

    meta.json proves them by the hashes of data and tokenizer; without hashes it proves nothing.
    """
    folder = Path(folder)
    names = set()
    progress = _read_json(folder / "progress.json")
    meta = _read_json(folder / "meta.json")
    if "specification" in progress:
        sizes = progress.get("sizes", {})
        names |= {"progress.json", *(f"{name}.partial" for name in sizes)}
        if sizes:  # a killed finish may have renamed some files
            renamed = [name for name in sizes if not (folder / f"{name}.partial").exists()]
            names |= {"tokenizer.json", *(FINISHED[name] for name in renamed)}
        elif isinstance(progress["specification"], dict) and progress["specification"].get("command") == "puzzles":
            names |= PUZZLE_FILES
        else:
            names |= set(SUDOKU)
    data = SUDOKU if meta.get("kind") == "sudoku" else FILES.get(meta.get("format"), ())
    data = [FINISHED.get(name, name) for name in data]
    if isinstance(meta.get("files"), list) and PUZZLE_FILES.issuperset(map(str, meta["files"])):
        data = [str(name) for name in meta["files"]]
    if data and all((folder / name).is_file() for name in data):
        if hash_of(folder / name for name in sorted(data)) == meta.get("data_sha256"):
            names |= {"meta.json", *data}
    if "tokenizer_sha256" in meta and _tokenizer_hash(folder / "tokenizer.json") == meta["tokenizer_sha256"]:
        names.add("tokenizer.json")
    return names


def _tokenizer_hash(path):
    """Return the hash of a tokenizer file as meta.json has it; "" if there is none."""
    state = _read_json(path)
    if state.get("kind") != "characters":  # that of `arithmetic` has a hash of its own
        return hash_of([path]) if path.is_file() else ""
    try:
        return SimpleTokenizer.from_dict(state).hash
    except (ValueError, KeyError, TypeError):
        return ""


def hash_of(paths):
    """Return the SHA-256 of the concatenated contents of the files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _read_json(path):
    """Return the JSON object in a file; {} if there is none."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


class Writer:
    """Append parts to the files of a prepared folder; the same command run again continues after the last record.

    specification: {name: value} of everything that decides the bytes. plan: data that a continued command needs again.
    seconds: time between two records. `task` is the number of the next task.
    Raises UsageError if the folder is complete, in use, or was begun with another specification (unless `fresh`), and
    as `clear` does.
    """

    def __init__(self, folder, form, specification, *, fresh=False, plan=None, seconds=5):
        self.folder = Path(folder)
        self.seconds = seconds
        self.files = {}
        self.lock = lock_run(self.folder, "prepare")
        try:
            begun = None if fresh else read_progress(self.folder)
            refuse_complete(folder, fresh)
            specification = json.loads(json.dumps(specification))
            if begun and begun["specification"] != specification:
                differs = changed(begun["specification"], specification) or "another command"
                raise UsageError(f"{folder} was begun with other flags: {differs}; --fresh starts over\ntry: --fresh")
            if not begun and self.folder.name == ".cache":  # a copy of rows in the folder above
                for name in sorted(KNOWN - {".prepare.lock"}):
                    (self.folder / name).unlink(missing_ok=True)
            elif begun:
                self._refuse_others(begun["sizes"])
            else:
                clear(self.folder, fresh, FLAGS.get(specification.get("command"), "--out"))
            sweep(self.folder, f"({'|'.join(map(re.escape, KNOWN))})")
            begin = dict(task=0, sizes=dict.fromkeys(FILES[form], 0), ends=dict.fromkeys(SPLITS, 0), counts={})
            self.state = begun or begin | dict(specification=specification, plan=plan)
            write_json(self.folder / "progress.json", self.state)  # before the files, which it proves to be ours
            for name, size in self.state["sizes"].items():
                self._open(name, size)
            self.record()
        except BaseException:
            self.close(failed=True)
            raise

    def _refuse_others(self, sizes):
        """Raise UsageError for a finished file that a partial one would replace."""
        for name in sizes:
            partial, final = self.folder / f"{name}.partial", self.folder / FINISHED[name]
            if partial.exists() and final.exists() and not name.endswith("idx"):  # an index has both for a moment
                move = f"mv {shlex.quote(str(final))} {shlex.quote(str(unused(final, '_mine')))}"
                raise UsageError(f"{final} is in the way: not written by prepare_data.py, so not replaced\ntry: {move}")

    def _open(self, name, size):
        path = self.folder / f"{name}.partial"
        if not path.exists() and (self.folder / FINISHED[name]).exists():
            return  # killed between two renames
        file = self.files[name] = open(path, "ab")
        if file.tell() < size:
            raise DataError(f"{path} is shorter than progress.json says\ntry: --fresh")
        file.truncate(size)
        file.seek(size)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        refused = kind is not None and issubclass(kind, (DataError, UsageError))
        if refused and not any(self.state["sizes"].values()) and not any(f.tell() for f in self.files.values()):
            for name in sorted(written_here(self.folder), reverse=True):  # progress.json, which proves them, last
                (self.folder / name).unlink(missing_ok=True)
        self.close(failed=kind is not None)

    def close(self, failed=False):
        for file in self.files.values():
            file.close()
        self.lock.release(failed)

    @property
    def task(self):
        return self.state["task"]

    @property
    def counts(self):
        return self.state["counts"]

    def add(self, part):
        """Append the part of the next task; return whether everything was recorded, which happens every few seconds."""
        for name, file in self.files.items():
            content = part.get(name, b"")
            if name.endswith(".idx") and len(content):  # lengths become positions
                split = name[:-4]
                places = self.state["ends"][split] + np.cumsum(content).reshape(content.shape)
                self.state["ends"][split] = int(places[-1, -1])
                content = places.tobytes()
            with self._disk():
                file.write(content)
        for name, n in part["counts"].items():
            if name == "lowest":
                self.counts[name] = min(n, self.counts.get(name, n))
            else:
                self.counts[name] = self.counts.get(name, 0) + n
        self.state["task"] += 1
        due = time.monotonic() - self.recorded >= self.seconds
        if due:
            self.record()
        return due

    def record(self):
        """Flush all files to the disk, then record their sizes in progress.json."""
        for name, file in self.files.items():
            with self._disk():
                file.flush()
                os.fsync(file.fileno())
            self.state["sizes"][name] = file.tell()
        write_json(self.folder / "progress.json", self.state)
        self.recorded = time.monotonic()

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except OSError as e:
            advice = "free some space; the same command goes on from the last record"
            raise DataError(f"{self.folder}: {e.strerror}\nfix: {advice}") from e

    def finish(self, meta, columns=2):
        """Give the files their final names, then write meta.json: `meta`, the counts and the hash of the data."""
        self.record()
        for name in self.files:
            path, final = self.folder / f"{name}.partial", self.folder / FINISHED[name]
            if name.endswith(".idx"):
                _write_index(path, final, columns)
                path.unlink()
            else:
                os.replace(path, final)
        digest = hash_of(self.folder / FINISHED[name] for name in sorted(self.state["sizes"]))
        names = [f"{split}_{unit}" for split in SPLITS for unit in ("samples", "tokens")]
        sizes = {name: self.counts.pop(name, 0) for name in names}
        self.counts.pop("lowest", None)
        meta = meta | sizes | dict(counts=self.counts, data_sha256=digest)
        write_json(self.folder / "meta.json", meta)
        (self.folder / "progress.json").unlink(missing_ok=True)
        return meta


def read_progress(folder):
    """Return the content of progress.json; None if there is none or another program wrote it."""
    try:
        state = json.loads(Path(folder, "progress.json").read_text(encoding="utf-8"))
        return state if isinstance(state, dict) and "specification" in state else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise DataError(f"{folder}/progress.json: {e}\ntry: --fresh") from e


def _write_index(path, final, columns):
    index = np.fromfile(path, np.int64) if not path.stat().st_size else np.memmap(path, np.int64, "r")
    index = index.reshape(-1, columns)
    if columns == 3 and (index[:, 1] == index[:, 2]).all():
        index = index[:, :2]
    write_atomic(final, lambda file: np.save(file, index))
