"""Speed of the autoencoder's parts, each against a public peer that is called in turn in the same process.

    python benchmarks/ae_speed.py                                # all rows; two minutes on two cores
    python benchmarks/ae_speed.py --rows quantizer --threads 1
    python benchmarks/ae_speed.py --rows "" --readme             # only write the table into README.md

Peers are never required; a figure without its peer says how to get it. What ours and the peer give is compared first.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import command_line, measure, timed
from models.codebook import Codebook
from models.messages import MessageLayer, message_weights

HERE = Path(__file__).resolve().parent
GET = dict(quantizer="pip install vector-quantize-pytorch==1.32.0", messages="pip install torch_geometric==2.8.1")
SIZES = dict(vectors=32_768, dim=64, codes=512, batch=256, slots=18, width=64)
QUICK = dict(vectors=512, dim=8, codes=64, batch=4, slots=6, width=8)


def quantizer(args):
    """Assignment, straight-through gradient and moving averages, forward and backward, from the same codes."""
    torch.manual_seed(0)
    x, pull = torch.randn(2, args.vectors, args.dim)
    ours = Codebook(size=args.codes, dim=args.dim, beta=0.25, decay=0.99, revive=0.025, eps=1e-5)
    start = {name: b.clone() for name, b in ours.state_dict().items()}

    def step(quantize):
        leaf = x.clone().requires_grad_()
        z, index, commit = quantize(leaf[None])
        ((z[0] * pull).sum() + commit.sum()).backward()
        return index[0], leaf.grad

    for name, options in (("", dict(rotation_trick=False)), (", as it comes, with its rotation trick", {})):
        ours.load_state_dict(start)
        try:
            from vector_quantize_pytorch import VectorQuantize

            peer = VectorQuantize(dim=args.dim, codebook_size=args.codes, decay=0.99, commitment_weight=0.25, **options)
            peer._codebook.embed.copy_(ours.codes[None])
            peer._codebook.embed_avg.copy_(ours.codes[None])
            (index, grad), (same, same_grad) = step(ours), step(peer)
            found = f"{(index == same).double().mean().item():.6f} of the indices identical"
            if options:
                torch.testing.assert_close(grad, same_grad, rtol=0, atol=1e-5)
            sides = [lambda: step(ours), lambda peer=peer: step(peer)]
        except ImportError:
            sides, found = [lambda: step(ours)], ""
        title = f"quantizer forward + backward, vectors/s, {args.vectors} x {args.dim}, K {args.codes}, against "
        title += f"vector-quantize-pytorch{name}"
        row = timed(title, ">= 8" if options else "", args, sides, [args.vectors] * 2, GET["quantizer"])
        yield row | dict(spread="; ".join(filter(None, [row["spread"], found])))


def edge_list(layer, args, mask):
    """The messages of `layer` with the same weights in PyTorch Geometric: x (B, T, C) -> (B, T, C); or ImportError."""
    from torch_geometric.nn import MessagePassing

    class Edges(MessagePassing):
        def __init__(self):
            super().__init__(aggr="mean")
            self.first = nn.Linear(2 * args.width, args.width)
            self.last = layer.message

        def forward(self, x, edges):
            return self.propagate(edges, x=x)

        def message(self, x_i, x_j):
            return self.last(F.relu(self.first(torch.cat([x_i, x_j], -1))))

    net = Edges()
    with torch.no_grad():
        net.first.weight.copy_(torch.cat([layer.receiver.weight, layer.sender.weight], 1))
        net.first.bias.copy_(layer.receiver.bias)
    event, to, source = (mask[:, :, None] & mask[:, None]).nonzero(as_tuple=True)
    edges = torch.stack([event * args.slots + source, event * args.slots + to])
    return lambda x: net(x.flatten(0, 1), edges).view_as(x)


def messages(args):
    """Messages between 6 to 18 particles of an event, itself included, forward and backward; edges are made before."""
    torch.manual_seed(0)
    x0 = torch.randn(args.batch, args.slots, args.width)
    mask = torch.arange(args.slots) < torch.randint(args.slots // 3, args.slots + 1, (args.batch, 1))
    layer, weight, real = MessageLayer(args.width), message_weights(mask), mask[..., None]

    def step(run):
        x = x0.clone().requires_grad_()
        m = run(x)
        (m * real).square().mean().backward()
        return m.detach() * real, x.grad

    def ours(x):
        return layer.messages(x, weight)

    try:
        peer = edge_list(layer, args, mask)
        difference = max((a - b).abs().max().item() for a, b in zip(step(ours), step(peer), strict=True))
        assert difference < 1e-5, difference
        sides, found = [lambda: step(ours), lambda: step(peer)], f"largest difference {difference:.1e}"
    except ImportError:
        sides, found = [lambda: step(ours)], ""
    title = f"message layer forward + backward, events/s, B {args.batch}, T {args.slots}, width {args.width}, against "
    row = timed(title + "PyTorch Geometric", ">= 2.5", args, sides, [args.batch] * 2, GET["messages"])
    yield row | dict(spread="; ".join(filter(None, [row["spread"], found])))


ROWS = dict(quantizer=quantizer, messages=messages)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "ae_speed")
    add = parser.add_argument
    add("--quick", action="store_true", help="toy sizes, one round: only to see that it runs")
    for name, default in dict(times=25, threads=2).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    said = f" --threads {args.threads}" * (args.threads != 2)
    vars(args).update(QUICK | dict(times=1) if args.quick else SIZES)
    measure(args, ROWS, lambda row: said)


if __name__ == "__main__":
    main()
