"""Choosing tokens, and writing beyond the window of the model."""

import pytest
import torch

import generate
from data_utils.errors import DataError, UsageError
from data_utils.text.generate import size_of, stream, write
from models.sampling import choose
from models.state_space import StateSpace
from models.transformer import Transformer


def models():
    torch.manual_seed(0)
    shared = dict(vocab_size=31, d_model=16, max_seq_len=12, n_layers=2, dropout=0.0)
    yield Transformer(**shared, n_heads=2, rope_base=1e4, ffn_mult=2).eval()
    yield StateSpace(**shared, d_state=4, d_inner=32, d_conv=4, dt_rank=2).eval()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("prompt", [1, 5, 12, 20])
def test_written_tokens_are_those_of_full_forwards(which, prompt):
    model = list(models())[which]
    for p in model.parameters():
        p.data.mul_(4)  # far from ties
    x = torch.randint(31, (1, prompt), generator=torch.Generator().manual_seed(1))
    tokens = [token for token, _ in write(model, x, 30, 0.0, 0, 1.0, None)]
    ids, read = x[:, -12:], min(prompt, 12)
    for token in tokens:
        with torch.no_grad():  # a full window goes on from its later half; a state of fixed size never does
            if which == 0:
                logits = model(ids[:, -read:])[:, -1]
            else:
                logits, _ = model.step(ids, model.init_state(1))
        assert logits.argmax().item() == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        read = 6 if read == 12 else read + 1


def test_choose_keeps_to_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(500, 1)
    g = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, 2, 1.0, g).flatten().tolist()) == {0, 1}
    assert set(choose(logits, 1.0, 0, 0.7, g).flatten().tolist()) == {0, 1}
    assert set(choose(logits, 1.0, 0, 0.4, g).flatten().tolist()) == {0}
    assert set(choose(logits, 1.0, 0, 0.0, g).flatten().tolist()) == {0}
    for temperature in (0.0, 1e-40, 1e-6):
        assert set(choose(logits, temperature, 0, 1.0, g).flatten().tolist()) == {0}
    share = (choose(logits, 1.0, 0, 1.0, g) == 0).float().mean()
    assert abs(share - 0.5) < 0.08


def test_size_of_counts_the_used_part_of_a_state():
    transformer, state_space = models()
    _, state = transformer.step(torch.zeros(1, 3, dtype=torch.long), transformer.init_state(1))
    assert size_of(state) == 2 * 2 * 3 * 16 * 4  # layers, keys and values, positions, width, bytes
    assert size_of(state_space.init_state(1)) == 2 * (32 * 3 + 32 * 4) * 4


def test_characters_of_several_tokens_come_whole(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    count, size = stream(Bytes(), ((byte, 7) for byte in "añ€😀".encode()))
    assert capsys.readouterr().out == "añ€😀\n" and (count, size) == (10, 7)


def test_main_takes_a_configuration_made_in_python(tmp_path):
    with pytest.raises(DataError, match="none.pt is missing"):
        generate.main(generate.Config(checkpoint=tmp_path / "none.pt"))
    with pytest.raises(UsageError, match="sampler='x'"):
        generate.main(generate.Config(sampler="x"))
