"""Pages and pictures: cell by cell, patches against unfolded images, text and back, glyphs against Pillow's."""

import string
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_utils.pages import render
from models import glyphs
from models.glyphs import CELL_HEIGHT, CELL_WIDTH, COLOUR, END, HOLE, NEWLINE, OUTSIDE, PADDING, SYMBOLS

ASCII = "".join(map(chr, range(32, 127))) + "\n"
BLANK = {0, glyphs.BEGIN, 110, PADDING}


def pages(*shape, seed=0):
    return torch.randint(SYMBOLS, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def naive_images(pages, face):
    B, R, C = pages.shape
    images = np.zeros((B, R * CELL_HEIGHT, C * CELL_WIDTH), np.uint8)
    for b in range(B):
        for r in range(R):
            for c in range(C):
                y, x = r * CELL_HEIGHT, c * CELL_WIDTH
                images[b, y : y + CELL_HEIGHT, x : x + CELL_WIDTH] = glyphs.atlas()[face[b], int(pages[b, r, c])]
    return images


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [1, 9, 2048])
def test_images_equal_a_loop_over_cells(monkeypatch, cached):
    monkeypatch.setattr(glyphs, "CACHED", cached)
    some = pages(3, 5, 4)
    for face in (0, 1, torch.tensor([1, 0, 1])):
        faces = face.tolist() if torch.is_tensor(face) else [face] * 3
        images = glyphs.to_images(some, face)
        assert images.dtype == torch.uint8 and images.device == some.device
        assert np.array_equal(images.numpy(), naive_images(some, faces))
    assert torch.equal(glyphs.to_images(some.mT), glyphs.to_images(some.mT.contiguous()))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_patches_equal_unfolded_images(n):
    some = pages(2, 3, 4)
    images = glyphs.to_images(some, 1)[:, None].float()
    images = F.pad(images, (0, -4 % n * CELL_WIDTH))
    kernel = CELL_HEIGHT, CELL_WIDTH * n
    unfolded = F.unfold(images, kernel, stride=kernel).mT  # (B, P, pixels)
    patches = glyphs.to_patches(some, n, 1)
    assert patches.shape == (2, 3 * -(-4 // n), CELL_HEIGHT * CELL_WIDTH * n) and torch.equal(patches.float(), unfolded)
    assert torch.allclose(glyphs.to_float(patches), unfolded / 255)


def test_all_symbols_look_different():
    assert glyphs.atlas().shape == (2, SYMBOLS, CELL_HEIGHT, CELL_WIDTH)
    for face in glyphs.atlas().numpy():
        drawn = {face[symbol].tobytes() for symbol in set(range(SYMBOLS)) - BLANK}
        assert len(drawn) == SYMBOLS - len(BLANK) and not any(face[symbol].any() for symbol in BLANK)


def test_colours_are_greys_in_a_frame():
    for k, colour in enumerate(glyphs.atlas()[0, COLOUR : COLOUR + 10].numpy()):
        assert (colour[1:-1, 1:-1] == 25 * k).all() and (colour == 255).sum() == 2 * CELL_HEIGHT + 2 * CELL_WIDTH - 4


def test_glyphs_are_those_of_pillow():
    image_font, image, draw = (pytest.importorskip(f"PIL.{name}") for name in ("ImageFont", "Image", "ImageDraw"))
    if not hasattr(image_font, "load_default_imagefont"):
        pytest.skip("a Pillow older than 10.3")
    font = image_font.load_default_imagefont()
    for symbol, glyph in enumerate(glyphs.atlas()[0, :95].numpy()):
        cell = image.new("L", (CELL_WIDTH, CELL_HEIGHT), 0)
        draw.Draw(cell).text((1, 1), chr(32 + symbol), fill=255, font=font)
        assert np.array_equal(np.asarray(cell), glyph), chr(32 + symbol)


def test_bold_grows_to_the_right_and_closes_no_gap():
    plain, bold = glyphs.atlas().numpy()
    for old, new in zip(plain[:95], bold[:95], strict=True):
        for row, thick in zip(old > 0, new > 0, strict=True):
            for x in range(CELL_WIDTH):
                left, right = x > 0 and row[x - 1], x + 1 < CELL_WIDTH and row[x + 1]
                assert thick[x] == (row[x] or (left and not right))
    assert np.array_equal(plain[COLOUR : COLOUR + 10], bold[COLOUR : COLOUR + 10])


# ---- augmented -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_augmented_page_is_the_page_somewhere_on_its_canvas(n):
    B, R, C = 40, 2, 4
    some, columns = pages(B, R, C), -(-5 // n) * n
    patches = glyphs.augmented_patches(some, n, torch.Generator().manual_seed(1))
    assert patches.shape == (B, 3 * columns // n, CELL_HEIGHT * CELL_WIDTH * n) and patches.dtype == torch.float32
    assert patches.min() == 0 and patches.max() == 1
    canvases = patches.view(B, 3, columns // n, CELL_HEIGHT, n * CELL_WIDTH).transpose(2, 3).flatten(1, 2).flatten(2)
    places, faces, inverses, inks = set(), set(), set(), []
    for canvas, page in zip(canvases, some, strict=True):
        inverse = int(canvas.median() > 0.5)
        shown, best = (1 - canvas if inverse else canvas), (-1.0,)
        for face in (0, 1):
            image = glyphs.to_images(page[None], face)[0].double() / 255
            fit = F.conv2d(shown[None, None].double(), (image - image.mean())[None, None] / image.std())[0, 0]
            best = max(best, (fit.max().item(), face, divmod(fit.argmax().item(), fit.shape[1]), image))
        _, face, (y, x), image = best
        inside = shown[y : y + image.shape[0], x : x + image.shape[1]]
        inks.append(inside[image == 1].mean().item())
        rest = shown.clone()
        rest[y : y + image.shape[0], x : x + image.shape[1]] -= (image * inks[-1]).float()
        assert rest.abs().max() < 0.35 and 0.025 < rest.std() < 0.055  # noise of 0.05, cut at 0 and 1
        places.add((y, x)), faces.add(face), inverses.add(inverse)
    assert len(places) > 20 and max(y for y, _ in places) < CELL_HEIGHT and max(x for _, x in places) < CELL_WIDTH
    assert faces == inverses == {0, 1} and 0.49 < min(inks) < 0.6 and max(inks) > 0.9


def test_augmenting_is_a_function_of_the_generator():
    seeds = map(torch.Generator().manual_seed, (1, 1, 2))
    first, again, other = (glyphs.augmented_patches(pages(2, 2, 3), 2, seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_symbols_of_text():
    assert render.to_symbols(ASCII).tolist() == [*range(95), NEWLINE]
    assert render.to_text(render.to_symbols("a\tb é\r\x7f\u4e2d\ud800")) == "a    b ?????"
    assert render.to_symbols("").tolist() == [] and render.to_symbols("").dtype == np.uint8


def test_text_of_symbols():
    marks = [COLOUR, COLOUR + 9, HOLE, OUTSIDE, glyphs.BEGIN, 110, NEWLINE, 1]
    assert render.to_text(np.array([*marks, END, 1], np.uint8)) == render.to_text(torch.tensor(marks)) == "09_\n!"
    assert render.to_text(np.array([[33, PADDING], [34, 35]])) == "A" and render.to_text(np.array([])) == ""


@pytest.mark.parametrize("seed", range(20))
def test_flow_is_reversible(seed):
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, 9, 2)
    text = "".join(rng.permutation(list(ASCII * 2))[: rng.integers(0, rows * cols + 1)])
    page = render.layout(text, rows, cols)
    assert page.shape == (rows, cols) and page.dtype == np.uint8 and render.to_text(page) == text
    rest = page.reshape(-1)[len(text) :].tolist()
    assert rest == ([END] + [PADDING] * rows * cols)[: len(rest)]
    assert np.array_equal(page, render.layout(render.to_symbols(text), rows, cols))


def test_what_does_not_fit_is_cut_off():
    assert render.to_text(render.layout("abcdefg", 2, 3)) == "abcdef"
    assert render.to_text(render.layout("ab cd ef gh", 2, 3, "wrap")) == "ab cd "


@pytest.mark.parametrize("seed", range(10))
def test_words_are_wrapped(seed):
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list(string.ascii_letters), n)) for n in rng.integers(1, 9, 60)]
    text = "".join(word + rng.choice([" ", " ", "\n", "\n\n"]) for word in words) + "end"
    expected = [row for line in text.split("\n") for row in textwrap.wrap(line, 8) or [""]][:40]
    page = render.layout(text, 40, 8, "wrap")
    assert [render.to_text(row).rstrip() for row in page][: len(expected)] == expected


def test_long_words_and_indents_are_wrapped():
    def wrapped(text):
        return [render.to_text(row).rstrip() for row in render.layout(text, 6, 4, "wrap")]

    assert wrapped("abcdefghij kl") == ["abcd", "efgh", "ij", "kl", "", ""]
    assert wrapped("  if x:\n    y") == ["  if", "x:", "", "y", "", ""]
    assert wrapped("abcd efgh") == ["abcd", "efgh", "", "", "", ""]
    page = render.layout("ab cd", 3, 4, "wrap")
    assert page.tolist()[1:] == [[67, 68, END, PADDING], [PADDING] * 4] and page[0, 2:].tolist() == [0, 0]
