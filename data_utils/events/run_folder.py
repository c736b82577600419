"""The folder of a run of train_ae.py: its name, and the settings, facts and figures that a run writes there."""

import json
import math
import platform
import shlex
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

NOT_OF_A_RUN = "config env logging out resume fresh multirun sweep_job fail_fast".split()  # not in config.yaml
SHOWN = "train_loss val_loss perplexity accuracy ddim_mse d_loss".split()  # in the line that an epoch prints


def run_folder(cfg):
    """Return the folder of a run: `out`, or the folder that `resume` names, or a new one named by the clock.

    Raises UsageError for a `resume` that does not exist, for a folder with files under resume=none, and for a `name`
    that is a path.
    """
    named = Path(cfg.resume) if cfg.resume not in ("auto", "none") else None
    if named and not (named.is_file() or Path(named, ".hydra").exists() or any(named.glob("*.pt"))):
        raise UsageError(f"--resume {named}: no such run below {cfg.outputs}/runs\ntry: resume=auto")
    if cfg.out or named:
        folder = Path(cfg.out or (named if named.is_dir() else named.parent))
        if cfg.resume == "none" and cfg.save_artifacts and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--resume none: {folder} is not empty; resume=auto goes on in it\ntry: resume=auto")
        return folder
    check_name(cfg, "name")
    first = Path(cfg.outputs, "runs", f"run_{time.strftime('%Y%m%d-%H%M%S')}_{cfg.name}")
    candidates = [first, *(Path(f"{first}_{n}") for n in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def rename_old_flags(config):
    """Give the configuration of an old checkpoint today's names, in place, so that it can be compared."""
    config.setdefault("codebook_decay", config.pop("ema_decay", 0.0))
    config.setdefault("min_lr_ratio", 0.1)  # a constant in old versions


class Recorder:
    """`with Recorder(...) as record: record(moment, ...)` writes facts, and draws the figures of that moment.

    run_dir: None for a run that writes nothing. families: names of the figures that the loop has. state: of the run,
    with step, epoch, histories, seconds and run_id. epochs: of the whole run. new: set aside the files of an older run.
    An exception that leaves the block is recorded, and raised again.
    """

    def __init__(self, run_dir, cfg, families, state, epochs, device, new):
        self.run_dir, self.cfg, self.families, self.state, self.device = run_dir, cfg, families, state, device
        self.epochs = epochs
        self.start = time.monotonic()
        self.seconds_before = state.seconds
        self.write_failed = False
        if run_dir:
            if new:
                names = ["last.pt", "best_val.pt", "facts", ".hydra"]
                if not Path(run_dir, "model.pt").is_symlink():  # as a link it leads to best_val.pt
                    names.append("model.pt")
                set_aside(Path(run_dir, name) for name in names)
            rewind(run_dir, state.epoch)
            origin = dict(
                run_id=state.run_id,
                argv=sys.argv,
                python=platform.python_version(),
                git_commit=commit(),
                torch=str(sys.modules["torch"].__version__),
                sweep_job=cfg.sweep_job,
            )
            settings = {key: value for key, value in asdict(cfg).items() if key not in NOT_OF_A_RUN}
            _write_yaml(Path(run_dir, ".hydra", "config.yaml"), settings)
            _write_yaml(Path(run_dir, ".hydra", "overrides.yaml"), sys.argv[1:])
            _write_yaml(Path(run_dir, ".hydra", "hydra.yaml"), origin)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and issubclass(kind, Exception):
            text = "".join(traceback.format_exception(kind, error, trace))
            self("on_exception", error=f"{kind.__name__}: {error}", traceback=text)

    def __call__(self, moment, figure_data=None, **fields):
        """Record one event, with `fields` as in `build_event_payload`; `figure_data` is for figures alone."""
        state = self.state
        state.seconds = self.seconds_before + time.monotonic() - self.start
        if not self.run_dir:
            return
        fields |= dict(run_id=state.run_id, step=state.step, total_time_s=state.seconds)
        event = build_event_payload(moment=moment, run_dir=self.run_dir, cfg=self.cfg, **fields)
        self._write(append_jsonl_event, event)
        if self.cfg.make_plots and state.histories:
            try:
                from data_utils.events.figures import handle_event
            except ImportError:
                warn("no figures: pip install matplotlib")
                self.cfg.make_plots = False
                return
            epoch = dict(epoch=state.epoch - 1, last=state.epoch == self.epochs, histories=state.histories)
            payload = event | dict(run_dir=self.run_dir) | epoch | (figure_data or {})
            handle_event(self.cfg, self.families, moment, payload)

    def epoch(self, train, val, codes, events, val_seconds):
        """Record the end of an epoch, draw its figures, and return {name: text} of its key numbers.

        train, val: metrics, each with a `loss`. codes: (K,) counts of the codes in validation. events: number of
        events in training. val_seconds: of the validation.
        """
        state, epoch = self.state, self.state.epoch
        losses = dict(train_loss=train.pop("loss"), val_loss=val.pop("loss"))
        speed = dict(epoch_time_s=state.epoch_seconds + val_seconds, throughput=events / max(1e-9, state.epoch_seconds))
        metrics = losses | speed | train | val
        for name in {**state.histories, **metrics}:  # a metric that starts late has None for earlier epochs
            state.histories.setdefault(name, [None] * epoch).append(metrics.get(name))
        state.epoch += 1
        row = dict(epoch=epoch, **losses, **speed, max_memory_mib=peak_mb(self.device) * 1e6 / 2**20)
        if self.run_dir:
            self._write(append_scalars_csv, split="train", metrics=train, **row)
            self._write(append_scalars_csv, split="val", metrics=val, **row)
        self("on_epoch_end", dict(codes=codes), split="val", metrics=train | val, **row)
        return {name: f"{metrics[name]:.4g}" for name in SHOWN if name in metrics}

    def test(self, metrics, codes, rows):
        """Record the end of the test; `rows` (N, 2 + 5 T) before and after are drawn, unless None."""
        row = dict(epoch=self.state.epoch - 1, split="test", train_loss=None, val_loss=None)
        metrics = {("test_loss" if name == "loss" else name): value for name, value in metrics.items()}
        if self.run_dir:
            empty = dict(epoch_time_s=None, throughput=None, max_memory_mib=None)
            self._write(append_scalars_csv, metrics=metrics, **row, **empty)
        self("on_test_end", dict(codes=codes, rows=rows), metrics=metrics, **row)

    def _write(self, append, *args, **fields):
        """Append to a file of the run. A failed write, such as on a full disk, is one warning and never ends a run."""
        try:
            append(self.run_dir, *args, **fields)
        except DataError as e:
            if not self.write_failed:
                warn(f"{e}; training goes on")
            self.write_failed = True

    def summary(self):
        """Return the last line that a run prints: where it is, its best epoch, and the next command."""
        state, cfg = self.state, self.cfg
        criterion = "ddim_mse" if cfg.loop == "diffusion_ae" else "val_loss"
        best = f"best {criterion} {state.best_val_loss:.4f} at epoch {state.best_epoch + 1}"
        if math.isinf(state.best_val_loss):
            best = "not evaluated yet"
        cost = f"{time.monotonic() - self.start:.0f} s, peak {peak_mb(self.device):.0f} MB"
        test_loss = f"test_loss {state.test_loss:.4f}, " if state.tested >= 0 else ""
        line = f"{self.run_dir or cfg.loop}: epoch {state.epoch} of {self.epochs}, {best}, {test_loss}{cost}"
        if not self.run_dir:
            return line
        if state.tested < self.epochs:
            command = f"train_ae.py {shlex.quote(f'resume={self.run_dir}')}"
            command += " max_steps=0" if 0 < cfg.max_steps <= state.step else ""
        elif cfg.loop == "test_mlp":
            command = f"plot.py {shlex.quote(str(self.run_dir))}"
        else:
            command = f"generate.py events {shlex.quote(str(self.run_dir))} --mode sample"
        return f"{line}; next: python {command}"


def _write_yaml(path, content):
    import yaml

    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, width=110)  # tuples become lists
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))
