"""
Text to page image: the paper's page, in the largest type at which the whole text fits.

    python render.py FILE --size 640 --out page.png        what the vision encoder sees of a text file

Words are wrapped greedily, and one wider than the page runs off it. White space only separates words: paragraphs do not
survive. Follows data/scripts/prepare_training_data.py of the paper's code, pixel for pixel.
"""
import argparse
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont


@lru_cache(maxsize=64)
def load_font(name, size):
    """The font of that name or file at `size` pixels; DejaVu Sans also as matplotlib carries it. Raises SystemExit."""
    try:                                    # Pillow's other layout engine, where it is installed, draws other pages
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        if name == 'DejaVuSans.ttf' and find_spec('matplotlib'):
            import matplotlib
            return load_font(f'{matplotlib.get_data_path()}/fonts/ttf/{name}', size)
        raise SystemExit(f'{name}: no such font file; pip install matplotlib brings DejaVuSans.ttf')


@lru_cache(maxsize=100_000)
def kerning(font, size, pair):
    """How much further apart two letters stand than each by itself, in pixels."""
    face = load_font(font, size)
    return face.getlength(pair) - face.getlength(pair[0]) - face.getlength(pair[1])


@lru_cache(maxsize=200_000)
def measure(font, size, word):
    """Of a word set at x = 0, in pixels: where the next character would go, and where its ink begins and ends."""
    if len(word) == 1:
        left, _, right, _ = load_font(font, size).getbbox(word)
        return load_font(font, size).getlength(word), left, right
    x, begin, end = measure(font, size, word[0])                              # letter by letter: asking Pillow is slow
    for before, letter in zip(word, word[1:]):
        x += kerning(font, size, before + letter)
        advance, left, right = measure(font, size, letter)
        x, begin, end = x + advance, min(begin, x + left), max(end, x + right)
    return x, begin, end


@lru_cache(maxsize=100_000)
def rasterize(font, size, word):
    """The coverage of a word's pixels, 0 to 255 (h, w), and that array's offset (x, y) from where the word is set."""
    mask, offset = load_font(font, size).getmask2(word, mode='L')
    return np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1]), *offset


def wrap(words, font, size, width):
    """Fill lines greedily, each at most `width` pixels of ink; a line is a list of (x, word). A space never kerns, so a
    line's extent follows from those of its words; where rounding could decide, Pillow measures it."""
    lines, space = [], measure(font, size, ' ')[0]
    x = begin = end = 0
    for word in words:
        advance, left, right = measure(font, size, word)
        begin, end = min(begin, x + left), max(end, x + right)
        extent = end - begin
        if lines and abs(extent - width) < 1 and extent % 1:
            box = load_font(font, size).getbbox(' '.join([w for _, w in lines[-1]] + [word]))
            extent = box[2] - box[0]
        if not lines or extent > width:
            lines.append([])
            x, begin, end = 0, left, right
        lines[-1].append((x, word))
        x += advance + space
    return lines


def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05, ink='black',
                paper='white'):
    """Draw text on a page of size x size pixels -> RGB image, type size, lines drawn, the text that did not fit or ''.
    The type size is font_size, else the largest of 4 to 30 at which all fits, or 4. Raises SystemExit for a font."""
    words, edge = text.split(), int(margin * size)
    room = size - 2 * edge
    low, high = font_size or 4, font_size or 30
    while low < high:
        middle = (low + high + 1) // 2
        advance = sum(min(measure(font, middle, word)[0], room) for word in words)    # more than full lines hold?
        fits = advance <= (room + middle) * (room // int(line_spacing * middle)) and \
            len(wrap(words, font, middle, room)) * int(line_spacing * middle) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    lines, step = wrap(words, font, low, room), int(line_spacing * low)
    drawn = min(len(lines), room // step)

    fraction = lambda x: abs(x - round(x))
    coverage = np.zeros((size + 2 * step, 2 * size), np.uint8)                # with room for what runs off the page
    for row, line in enumerate(lines[:drawn]):
        # Pillow's kerning moves letters by 1/64 pixel each, which can add up to one: draw such a line whole.
        if any(fraction(x) + fraction(measure(font, low, word)[0]) >= 0.5 for x, word in line):
            line = [(0, ' '.join(word for _, word in line))]
        for x, word in line:
            pixels, dx, dy = rasterize(font, low, word)
            top, start = edge + row * step + dy, max(edge + round(x) + dx, 0)
            area = coverage[top:top + pixels.shape[0], start:start + pixels.shape[1]]
            pixels = pixels[:area.shape[0], :area.shape[1]]
            if area.any():                                          # a mark on a neighbour: a + b - a b / 255, which
                over = pixels * (255 - area).astype(np.int32) + 128           # Pillow rounds like this
                pixels = area + (over + (over >> 8) >> 8)
            area[:] = pixels
    page = Image.new('RGB', (size, size), paper)
    page.paste(ink, mask=Image.fromarray(coverage[:size, :size]))
    return page, low, drawn, ' '.join(word for line in lines[drawn:] for _, word in line)


def main(argv=None):
    """The command line. Raises SystemExit for a file that cannot be read, drawn or written."""
    parser = argparse.ArgumentParser(description='Draw a text file as the page that the vision encoder sees.')
    parser.add_argument('file', help='UTF-8 text')
    parser.add_argument('--size', type=int, default=640, help='page side in pixels (default 640)')
    parser.add_argument('--out', default='page.png', help='where the image goes (default page.png)')
    args = parser.parse_args(argv)
    try:
        text = Path(args.file).read_text(encoding='utf-8')
        page, font_size, lines, lost = render_page(text, args.size)
        page.save(args.out)
    except (OSError, ValueError) as e:
        raise SystemExit(f'{args.file} to {args.out}: {e}')
    print(f'{args.out}: {args.size} pixels a side, type size {font_size}, {lines} lines, {len(lost)} characters lost')


if __name__ == '__main__':
    main()
