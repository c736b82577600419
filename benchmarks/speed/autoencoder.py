"""Speed of the autoencoder's parts, each against a public package that is called in turn in the same process.

    python -m benchmarks.speed.autoencoder                                # all rows; two minutes on two cores
    python -m benchmarks.speed.autoencoder --rows quantizer --threads 1

Ours and the baseline get the same inputs and weights, and their results are compared first.
"""

import torch

from benchmarks import peers
from benchmarks.report import changed_flags, command_line, measure, timed
from models.codebook import Codebook
from models.messages import MessageLayer, message_weights

SIZES = dict(vectors=32_768, dim=64, codes=512, batch=256, slots=18, width=64)
QUICK = dict(vectors=512, dim=8, codes=64, batch=4, slots=6, width=8, times=1)


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

    variants = (  # id, what is added to the title, options of the package, target
        ("straight_through", "", dict(rotation_trick=False), ">= 8"),
        ("rotation", ", as it comes, with its rotation trick", {}, ""),
    )
    for id, more, options, target in variants:
        ours.load_state_dict(start)
        sides, equal = [lambda: step(ours)], ""
        package = peers.optional(peers.vector_quantize, args.codes, args.dim, 0.25, **options)
        if package:
            package._codebook.embed.copy_(ours.codes[None])
            package._codebook.embed_avg.copy_(ours.codes[None])
            (index, grad), (package_index, package_grad) = step(ours), step(package)
            equal = f"{(index == package_index).double().mean().item():.6f} of the indices identical"
            if options:
                torch.testing.assert_close(grad, package_grad, rtol=0, atol=1e-5)
            sides.append(lambda package=package: step(package))
        title = f"quantizer forward + backward, {args.vectors} x {args.dim}, K {args.codes}"
        yield timed(id, f"{title}, against vector-quantize-pytorch{more}", args, sides, [args.vectors] * 2, target,
                    unit="vectors/s", spread=equal, get=peers.GET["vector-quantize-pytorch"])  # fmt: skip


def messages(args):
    """Messages between 6 to 18 particles of an event, itself included, forward and backward; edges exist before."""
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

    sides, equal = [lambda: step(ours)], ""
    baseline = peers.optional(peers.geometric, layer, args.width, mask)
    if baseline:
        difference = max((a - b).abs().max().item() for a, b in zip(step(ours), step(baseline), strict=True))
        assert difference < 1e-5, difference
        sides.append(lambda: step(baseline))
        equal = f"largest difference {difference:.1e}"
    title = f"message layer forward + backward, B {args.batch}, T {args.slots}, width {args.width}"
    yield timed("layer", f"{title}, against PyTorch Geometric", args, sides, [args.batch] * 2, ">= 2.5",
                unit="events/s", spread=equal, get=peers.GET["PyTorch Geometric"])  # fmt: skip


ROWS = dict(quantizer=quantizer, messages=messages)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "speed.autoencoder", times=25, threads=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    flags = changed_flags(parser, args, ["threads"])
    vars(args).update(QUICK if args.quick else SIZES)
    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
