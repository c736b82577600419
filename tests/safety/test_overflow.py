"""fp16 on two ranks, of which one overflows: all skip that step together, and their weights stay equal and finite.

The scripts run on CPUs with what an older GPU has, see overflow.py
"""

import json

import pytest

from tests.helpers import finish, start, start_two
from tests.safety.test_simulated_device import AE, EXPERTS, HRM, PAGES, SR, TEXT

EXPERT = f"train_expert.py --expert transformer {TEXT} {EXPERTS['transformer']} --max_steps 5".replace("128", "8")
AGAINST_JUDGES = f"{AE} loop=gan_ae latent_space=linear out=gan max_steps=5 batch_size=4 dtype=bfloat16"
SCRIPTS = dict(
    expert=EXPERT,
    hrm=f"{HRM} --dataset synthetic --run_name sums --steps 5",
    sr=f"{SR} --steps 5",
    ae=AGAINST_JUDGES,
    multimodal=f"{PAGES} --max_steps 5",
)


@pytest.fixture(scope="session")
def data(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflow")
    (folder / "toy").symlink_to(toy)
    (folder / "code").mkdir()
    finish(start(*PAGES.format(data=folder).split(), "--dataset_only", "--device=cpu", cwd=folder))
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_overflow_of_one_rank_is_one_of_all(script, data, tmp_path):
    words = SCRIPTS[script].format(data=data).split()
    words.append("device=cpu" if script == "ae" else "--device=cpu")
    for process in start_two("tests/safety/overflow.py", *words, cwd=tmp_path):
        finish(process)
    ranks = [
        [json.loads(line) for line in (tmp_path / f"weights-{rank}.jsonl").read_text().splitlines()]
        for rank in range(2)
    ]
    assert ranks[0] == ranks[1]
    assert all(step["finite"] for step in ranks[0])
    before, overflow, after = ranks[0][1:4]
    assert overflow == before | dict(scale=before["scale"] / 2)  # skipped, and with half the scale from then on
    assert after["sum"] != overflow["sum"]
