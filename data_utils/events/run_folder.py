"""The folder of a run of train_ae.py, and what is written there while it runs: settings, facts, figures."""

import json
import platform
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from data_utils.config import check_name
from data_utils.errors import DataError, UsageError
from data_utils.events.facts import append_jsonl_event, append_scalars_csv, build_event_payload, rewind
from data_utils.files import set_aside, warn, write_atomic
from data_utils.metrics import commit
from data_utils.progress import peak_mb

NOT_OF_A_RUN = "config env logging out resume fresh multirun sweep_job fail_fast".split()  # left out of config.yaml
SHOWN = "train_loss val_loss perplexity accuracy ddim_mse d_loss".split()  # of an epoch, to a person


def run_folder(cfg):
    """Return the folder of a run: `out`, or that of what `resume` names, or a new one named by the clock.

    Raises UsageError for a `resume` that is not there, where resume=none finds files, and for a `name` that is a path.
    """
    named = Path(cfg.resume) if cfg.resume not in ("auto", "none") else None
    if named and not (named.is_file() or Path(named, ".hydra").exists() or any(named.glob("*.pt"))):
        raise UsageError(f"--resume {named}: no such run\ntry: auto, none, or a folder below {cfg.outputs}/runs")
    if cfg.out or named:
        folder = Path(cfg.out or (named if named.is_dir() else named.parent))
        if cfg.resume == "none" and cfg.save_artifacts and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--resume none: {folder} is not empty\ntry: resume=auto, which goes on, or another out=")
        return folder
    check_name(cfg, "name")
    first = Path(cfg.outputs, "runs", f"run_{time.strftime('%Y%m%d-%H%M%S')}_{cfg.name}")
    return next(path for path in (first, *(Path(f"{first}_{n}") for n in range(2, 1000))) if not path.exists())


def renew(config):
    """Give the configuration in an old checkpoint the names of today, in place, so that it can be compared."""
    config.setdefault("codebook_decay", config.pop("ema_decay", 0.0))
    config.setdefault("min_lr_ratio", 0.1)  # it was fixed


class Recorder:
    """`with Recorder(...) as record: record(moment, ...)` writes facts, and draws the figures of that moment.

    run_dir: None for a run that writes nothing. families: of figures that its loop has. at: where the run is, with
    step, epoch, histories, seconds and run_id. epochs: of the whole run. new: what lies there is set aside. An
    exception that leaves the block is recorded, and goes on.
    """

    def __init__(self, run_dir, cfg, families, at, epochs, device, new):
        self.run_dir, self.cfg, self.families, self.at, self.device = run_dir, cfg, families, at, device
        self.epochs = epochs
        self.start, self.before = time.monotonic(), at.seconds
        self.failed = False  # to write a row of facts
        if run_dir:
            if new:
                names = ["last.pt", "best_val.pt", "facts", ".hydra"]
                if not Path(run_dir, "model.pt").is_symlink():  # a link of a run leads to its best_val.pt
                    names.append("model.pt")
                set_aside(Path(run_dir, name) for name in names)
            rewind(run_dir, at.epoch)
            about = dict(run_id=at.run_id, argv=sys.argv, python=platform.python_version(), git_commit=commit(),
                         torch=str(sys.modules["torch"].__version__), sweep_job=cfg.sweep_job)  # fmt: skip
            settings = {key: value for key, value in asdict(cfg).items() if key not in NOT_OF_A_RUN}
            _write_yaml(Path(run_dir, ".hydra", "config.yaml"), settings)
            _write_yaml(Path(run_dir, ".hydra", "overrides.yaml"), sys.argv[1:])
            _write_yaml(Path(run_dir, ".hydra", "hydra.yaml"), about)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and issubclass(kind, Exception):
            text = "".join(traceback.format_exception(kind, error, trace))
            self("on_exception", error=f"{kind.__name__}: {error}", traceback=text)

    def __call__(self, moment, shown=None, **said):
        """Add one event; `shown` holds what only figures need."""
        self.at.seconds = self.before + time.monotonic() - self.start
        if not self.run_dir:
            return
        event = build_event_payload(moment=moment, run_dir=self.run_dir, cfg=self.cfg, run_id=self.at.run_id,
                                    step=self.at.step, total_time_s=self.at.seconds, **said)  # fmt: skip
        self._write(append_jsonl_event, event)
        if self.cfg.make_plots and self.at.histories:
            try:
                from data_utils.events.figures import handle_event
            except ImportError:
                warn("no figures: pip install matplotlib")
                self.cfg.make_plots = False
                return
            last = dict(epoch=self.at.epoch - 1, last=self.at.epoch == self.epochs, histories=self.at.histories)
            handle_event(self.cfg, self.families, moment, event | dict(run_dir=self.run_dir) | last | (shown or {}))

    def epoch(self, train, val, codes, events, val_seconds):
        """Record the end of an epoch -> {name: text} of its key numbers, and the figures.

        train, val: metrics with a `loss` each; codes: counts of each code in validation; events: trained on.
        """
        at, epoch = self.at, self.at.epoch
        losses = dict(train_loss=train.pop("loss"), val_loss=val.pop("loss"))
        speed = dict(epoch_time_s=at.epoch_seconds + val_seconds, throughput=events / max(1e-9, at.epoch_seconds))
        found = losses | speed | train | val
        for name in {**at.histories, **found}:  # one that comes late is None before
            at.histories.setdefault(name, [None] * epoch).append(found.get(name))
        at.epoch += 1
        row = dict(epoch=epoch, **losses, **speed, max_memory_mib=peak_mb(self.device) * 1e6 / 2**20)
        if self.run_dir:
            self._write(append_scalars_csv, split="train", metrics=train, **row)
            self._write(append_scalars_csv, split="val", metrics=val, **row)
        self("on_epoch_end", dict(codes=codes), split="val", metrics=train | val, **row)
        return {name: f"{found[name]:.4g}" for name in SHOWN if name in found}

    def test(self, metrics, codes, rows):
        """Record the end of the test, `rows`: (N, 2 + 5T) before and after, if they are to be drawn."""
        row = dict(epoch=self.at.epoch - 1, split="test", train_loss=None, val_loss=None)
        named = {("test_loss" if name == "loss" else name): value for name, value in metrics.items()}
        if self.run_dir:
            nothing = dict(epoch_time_s=None, throughput=None, max_memory_mib=None)
            self._write(append_scalars_csv, metrics=named, **row, **nothing)
        self("on_test_end", dict(codes=codes, rows=rows), metrics=named, **row)

    def _write(self, append, *what, **named):
        """Append to a file of the run. What a full disk does not take is a warning, once: a run is worth more."""
        try:
            append(self.run_dir, *what, **named)
        except DataError as e:
            if not self.failed:
                warn(f"{e}; training goes on")
            self.failed = True

    def summary(self):
        """The last line of a run."""
        at, cfg = self.at, self.cfg
        then = f"generate.py events {self.run_dir} --mode sample"
        then = f"plot.py {self.run_dir}" if cfg.loop == "test_mlp" else then
        then = then if at.tested >= self.epochs else f"train_ae.py resume={self.run_dir}"
        best = f"best val_loss {at.best_val_loss:.4f} at epoch {at.best_epoch + 1}, test_loss {at.test_loss:.4f}"
        took = f"{time.monotonic() - self.start:.0f} s, peak {peak_mb(self.device):.0f} MB"
        line = f"{self.run_dir or cfg.loop}: epoch {at.epoch} of {self.epochs}, {best}, {took}"
        return line + f"; next: python {then}" * bool(self.run_dir)


def _write_yaml(path, content):
    import yaml

    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, width=110)  # tuples become lists
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))
