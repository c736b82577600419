"""Several processes of one run, below torchrun or as warm children."""

import os
import signal
import time
from pathlib import Path

import torch

from faults.lab import SCRIPTS, candidates, check, digests, has, results, words_of
from faults.rows.crashes import alive, children_of


def torchrun(lab, name, folder, *flags, faults=(), more=()):
    """Start two ranks of a script below torchrun, all cold."""
    lab.data(name)
    words = [*lab.words(name), *words_of(SCRIPTS[name].go_on), *map(str, flags)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *more]
    return lab.child(SCRIPTS[name].file, words, folder, faults=["figures=0", *faults], warm=False, launcher=launcher)


def warm_ranks(lab, name, folder, world, *flags, **options):
    """Start warm children that are the ranks of one run."""
    lab.data(name)
    if world == 1:
        return [lab.start(name, folder, *flags, **options)]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    env |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
    ranks = []
    for rank in range(2):
        ranks.append(lab.start(name, folder, *flags, env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)), **options))
    ranks[0].store = store  # lives as long as they do
    return ranks


def finish(lab, name, folder, *flags):
    """Run two warm ranks to their end."""
    for child in warm_ranks(lab, name, folder, 2, *flags):
        lab.end(child)


def pair_digests(lab, name):
    """Return the digests of a complete run on two ranks."""

    def make():
        folder = lab.folder()
        finish(lab, name, folder)
        return digests(results(SCRIPTS[name], folder))

    return lab.once(("pair", name), make)


def descendants(pid):
    """Return all processes below `pid`."""
    return [process for child in children_of(pid) for process in (child, *descendants(child))]


def signalled_ranks(lab, name):
    """torchrun and its ranks get signals: the run then ends as two ranks do without any."""
    expected, statuses = pair_digests(lab, name), []
    cases = [  # fault in rank 1, signal to the agent, signal to its ranks, torchrun's status
        ("", signal.SIGTERM, None, 1),
        ("", signal.SIGTERM, signal.SIGTERM, 1),
        ("", signal.SIGINT, None, 1),
        ("signal=SIGTERM:6:0", None, None, 0),
        ("signal=SIGUSR1:6:0", None, None, 0),
        ("signal=SIGKILL:6:0", None, None, 1),
        ("", signal.SIGKILL, signal.SIGKILL, -9),
    ]
    for fault, to_agent, to_ranks, expected_status in cases:
        folder, processes = lab.folder(), []
        child = torchrun(lab, name, folder, faults=[f"1@{fault}"] if fault else [])
        if to_agent:
            while not candidates(SCRIPTS[name], folder) and child.status() is None:
                time.sleep(0.01)
            processes = descendants(child.pid)
            if to_agent == signal.SIGKILL:
                child.kill()
            else:
                os.kill(child.pid, to_agent)
            for process in processes if to_ranks else ():
                os.kill(process, to_ranks)
        status, _, err = child.wait(600)
        case = f"{fault} {to_agent} {to_ranks}"
        check(status == expected_status, f"status {status}, not {expected_status}: {case}: {err[-300:]}")
        deadline = time.monotonic() + 60
        while any(map(alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
        check(not any(map(alive, processes)), "a process outlived torchrun")
        finish(lab, name, folder)
        check(digests(results(SCRIPTS[name], folder)) == expected, f"not identical after {case}")
        statuses.append(status)
    return f"statuses {statuses}"


def one_rank_fails(lab, name):
    """All ranks are gone half a minute after the message of the one that fails, with one message."""
    child = torchrun(lab, name, lab.folder(), faults=["1@word=--data_dir=none"])
    while "error: " not in Path(child.logs[1]).read_text() and child.status() is None:
        time.sleep(0.05)
    start = time.monotonic()
    status, _, err = child.wait(600)
    check(status == 1, f"status {status}")
    took = child.ended - start
    check(took < 30, f"{took:.0f} s")
    check(err.count("error: ") == 1, f"{err.count('error: ')} messages: {err[-300:]}")
    check(not descendants(child.pid), "a process outlived torchrun")
    return f"gone in {took:.0f} s"


def elastic(lab, name):
    """torchrun restarts after a killed rank, but not after one that was told to stop."""
    folder, restarts = lab.folder(), ["--max-restarts=2"]
    faults = [f"1@once={folder}/once", "1@signal=SIGKILL:6:0"]
    status, out, err = torchrun(lab, name, folder, faults=faults, more=restarts).wait(600)
    check(status == 0, f"status {status}: {err[-300:]}")
    has(out, "resumed")
    check(digests(results(SCRIPTS[name], folder)) == pair_digests(lab, name), "not identical")
    child = torchrun(lab, name, lab.folder(), faults=["1@signal=SIGTERM:6:0"], more=restarts)
    status, out, err = child.wait(600)
    check(status == 0 and out.count("next: ") == 1, f"status {status}, started {out.count('next: ')} times")


def other_world(lab, name):
    """Two ranks, one, two again, with as many windows per step, end like two ranks all the way."""
    flags = dict(
        expert={1: ["--grad_accum_steps=2"], 2: ["--grad_accum_steps=1"]},
        hrm={1: ["--batch_size=32"], 2: ["--batch_size=16"]},
    )[name]
    folder, complete = lab.folder(), lab.folder()
    for world in (2, 1, 2):
        for child in warm_ranks(lab, name, folder, world, *flags[world], faults="signal=SIGTERM:5:0"):
            lab.end(child, (143, 0))
    finish(lab, name, folder, *flags[2])
    finish(lab, name, complete, *flags[2])
    ours, expected = (results(SCRIPTS[name], place) for place in (folder, complete))
    if name == "hrm":  # without accumulation sums come in another order
        weights = [result["checkpoints/final.pt"]["model_state"] for result in (ours, expected)]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-4)
        return "to 1e-4"
    resumed = digests(ours)
    differ = [key for key, value in digests(expected).items() if resumed.get(key) != value]
    check(not differ, f"{len(differ)} values differ: {', '.join(sorted(differ)[:3])}")
