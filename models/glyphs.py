"""Pages of symbols, drawn as pixels and patches.

B pages, R rows and C columns of cells, P patches of n cells side by side. A page is stored as symbols, uint8 (R, C),
and drawn where it is used: 14 x 8 pixels per cell, ink 255 on 0.

Symbols: 0 to 94 printable ASCII (code - 32), 95 to 104 the ten colours of a grid, then the names below; 110 is unused.
BEGIN, PADDING and 110 are blank like the space; all others look different.

Only functions that draw import torch, so that processes that only build pages start seconds sooner.
"""

from functools import cache

import numpy as np

SYMBOLS = 112
COLOUR = 95  # first of the ten colours
NEWLINE, HOLE, OUTSIDE, END, BEGIN, PADDING = 105, 106, 107, 108, 109, 111
CELL_HEIGHT, CELL_WIDTH = 14, 8
CACHED = 2048  # cells that a CPU draws at once: their 230 kB stay in the cache until they are copied

# Rows 1 to 11 of each cell, one byte per row: Courier bold 8 (notice in LICENSE), then four marks of this repo.
GLYPHS = (
    "000000000000000000000000000030303030003000000000002828280000000000000028287c28287c28280000103c64783c0c6c781000"
    "0000705478103c541c00000000003860307c587c0000000018102000000000000000000810303030301008000000201018181818102000"
    "000010783048000000000000000010107c1010000000000000000000000018102000000000007c00000000000000000000000000300000"
    "00000404080810102020000000386c6c6c6c6c38000000001878181818187e00000000386c0c18306c7c00000000386c0c380c6c380000"
    "00000c1c2c6c7e0c0c000000007c60786c0c4c7800000000386c60786c6c38000000007c6c0c1818303000000000386c6c386c6c380000"
    "0000386c6c3c0c6c3800000000000000300000300000000000000030000030204000000018306030180000000000000078007800000000"
    "00000030180c1830000000000000384c183000300000000038644c54544e6038000000007838287c6c6e0000000000786c786c6c780000"
    "0000003c6c60606c380000000000786c6c6c6c7800000000007c6078606c7c00000000007c60786060700000000000386c607c6c3c0000"
    "0000006e6c7c6c6c6e000000000078303030307800000000003c181858587000000000006c6870786c760000000000706060606c7c0000"
    "000000446c6c7c545400000000006e74746c6c640000000000386c6c6c6c380000000000786c6c7860700000000000386c6c6c6c380c00"
    "000000786c6c786c7600000000003c64781c4c7800000000007c343030307800000000006e6c6c6c6c3800000000006e6c283838100000"
    "0000005654547c38280000000000663c18183c66000000000066663c18183c00000000007c6c18306c7c00000000383030303030303800"
    "00004040202010100808000000381818181818183800000010386c000000000000000000000000000000007e0000301008000000000000"
    "00000000386c3c6c7e000000006060786c6c6c78000000000000386c606c38000000001c0c3c6c6c6c3e000000000000386c7c603c0000"
    "00001c307c3030307c000000000000366c6c6c3c0c7800006060786c6c6c6c000000001800781818187e00000000180078181818181870"
    "000060606c7870786e000000007818181818187e000000000000787c545454000000000000586c6c6c6c000000000000386c6c6c380000"
    "00000000786c6c6c78607000000000366c6c6c3c0c1e000000006e3a3030780000000000003c703c0e7c0000000030307c3030361c0000"
    "000000006c6c6c6c3e0000000000006c6c38381000000000000056547c3c28000000000000763c183c6e0000000000006e6c6c28383060"
    "000000007c58306c7c000000000c1818301818180c00000000101010101010100000006030301830303060000000000034580000000000"
)
MARKS = (
    "0002020212227e20100000"  # newline, an arrow
    "7e4242424242424242427e"  # hole, a frame
    "0810224408102244081022"  # outside, hatched
    "7e7e7e7e7e7e7e7e7e7e7e"  # end, a block
)


@cache
def atlas():
    """Return all symbols as pixels (2, SYMBOLS, CELL_HEIGHT, CELL_WIDTH) uint8, plain and bold.

    Colour k is drawn as grey 25 k in a frame of ink.
    """
    import torch

    rows = np.zeros((2, SYMBOLS, CELL_HEIGHT), np.uint8)  # one byte per row, whose first bit is the leftmost pixel
    drawn = [*range(95), NEWLINE, HOLE, OUTSIDE, END]
    rows[0, drawn, 1:12] = np.frombuffer(bytes.fromhex(GLYPHS + MARKS), np.uint8).reshape(-1, 11)
    rows[1] = rows[0] | rows[0] >> 1 & ~(rows[0] << 1)  # thicker, without closing gaps, which would turn m into n
    pixels = np.unpackbits(rows[..., None], axis=-1) * np.uint8(255)
    pixels[:, COLOUR : COLOUR + 10] = 255
    pixels[:, COLOUR : COLOUR + 10, 1:-1, 1:-1] = 25 * np.arange(10, dtype=np.uint8)[:, None, None]
    return torch.from_numpy(pixels)


@cache
def _rows(device):
    """Return the atlas as rows of eight pixels, (2 * SYMBOLS, CELL_HEIGHT) int64, to copy one number instead of 8."""
    import torch

    return atlas().view(torch.int64).view(-1, CELL_HEIGHT).to(device)


def to_images(pages, face=0):
    """Draw pages (B, R, C) uint8 -> (B, 14 R, 8 C) uint8 on their device. face: 0 plain, 1 bold, or (B,) of them."""
    import torch

    B, R, C = pages.shape
    face = face.view(-1, 1, 1) if torch.is_tensor(face) else face
    index = (pages.int() + SYMBOLS * face).reshape(B * R, C)
    table = _rows(pages.device)
    drawn = torch.empty(B * R, CELL_HEIGHT, C, dtype=torch.int64, device=pages.device)
    part = B * R if pages.is_cuda else max(1, CACHED // C)
    for cells, out in zip(index.split(part), drawn.split(part), strict=True):
        out.copy_(table.index_select(0, cells.flatten()).view(-1, C, CELL_HEIGHT).transpose(1, 2))
    return drawn.view(torch.uint8).view(B, R * CELL_HEIGHT, C * CELL_WIDTH)


def to_patches(pages, n, face=0):
    """Draw pages (B, R, C) uint8 as patches (B, P, 14 * 8 n) uint8, P = R ceil(C / n), row by row. face as above.

    A patch holds the pixels of n cells side by side, row by row. The last patch of a row is filled with PADDING.
    """
    import torch.nn.functional as F

    B, R, C = pages.shape
    pages = F.pad(pages, (0, -C % n), value=PADDING) if C % n else pages
    images = to_images(pages.reshape(B, -1, n), face)  # in a page n cells wide patches lie below each other
    return images.view(B, -1, CELL_HEIGHT * CELL_WIDTH * n)


def to_float(patches):
    """Convert pixels from uint8 to float32 in [0, 1]."""
    return patches.float() / 255


def augmented_patches(pages, n, generator):
    """Draw each page (B, R, C) uint8 at random -> patches (B, P, 14 * 8 n) float32 in [0, 1].

    A page stands at a random pixel of a canvas one cell larger, P = (R + 1) ceil((C + 1) / n), so that characters cross
    the borders of patches. It is plain or bold, with ink of 0.5 to 1 on 0 or inverted, and Gaussian noise of 0.05.
    generator: on the CPU, which gives the same pages on every device, or on the device of the pages.
    """
    import torch
    import torch.nn.functional as F

    B, R, C = pages.shape
    columns = -(-(C + 1) // n) * n
    height, width = (R + 1) * CELL_HEIGHT, columns * CELL_WIDTH
    drawing = dict(generator=generator, device=generator.device)
    down, right, face, inverse = (
        torch.randint(n_values, (B,), **drawing) for n_values in (CELL_HEIGHT, CELL_WIDTH, 2, 2)
    )
    ink = (0.5 + 0.5 * torch.rand(B, **drawing)) * (1 - 2 * inverse) / 255
    noise = torch.randn(B, height, width, **drawing)
    noise, ink, face, inverse = (x.to(pages.device) for x in (noise, ink, face, inverse))
    images = to_images(F.pad(pages, (1, columns - C, 1, 1), value=PADDING), face)
    tops, lefts = (CELL_HEIGHT - down).tolist(), (CELL_WIDTH - right).tolist()
    images = [image[y : y + height, x : x + width] for image, y, x in zip(images, tops, lefts, strict=True)]
    pixels = noise.mul_(0.05).add_(inverse[:, None, None])
    pixels.addcmul_(torch.stack(images).float(), ink[:, None, None]).clamp_(0, 1)
    patches = pixels.view(B, R + 1, CELL_HEIGHT, columns // n, n * CELL_WIDTH).transpose(2, 3)
    return patches.reshape(B, -1, CELL_HEIGHT * CELL_WIDTH * n)
