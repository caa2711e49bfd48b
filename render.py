"""
Text to page image: the paper's page, in the largest type at which the whole text fits.

    python render.py FILE --size 640 --out page.png        what the vision encoder sees of a text file

White page, black DejaVu Sans, a margin of 5% of the height, lines 1.2 times the type size apart, sizes 4 to 30, words wrapped
greedily; a word wider than the page runs off it. White space only separates words: paragraphs do not survive.
The layout engine is asked for by name (BASIC): Pillow's other one draws other pages, where its libraries are installed.
Follows data/scripts/prepare_training_data.py of the paper's code, pixel for pixel.
"""
import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

MIN_SIZE, MAX_SIZE = 4, 30


@lru_cache(maxsize=64)
def load_font(name, size):
    """The font of that name or file at `size` pixels; DejaVu Sans also as matplotlib carries it. Raises SystemExit."""
    try:
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        if name != 'DejaVuSans.ttf':
            raise SystemExit(f'{name}: no such font, or no font file')
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('DejaVuSans.ttf not found: install it (Debian: fonts-dejavu-core), or pip install matplotlib')
    return load_font(str(Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')), size)


@lru_cache(maxsize=200_000)
def measure(font, size, word):
    """Of a word set at x = 0, in pixels: where the next character would go, and where its ink begins and ends."""
    left, _, right, _ = load_font(font, size).getbbox(word)
    return load_font(font, size).getlength(word), left, right


@lru_cache(maxsize=100_000)
def rasterize(font, size, word):
    """The coverage of a word's pixels, 0 to 255 (h, w), and that array's offset (x, y) from where the word is set."""
    mask, offset = load_font(font, size).getmask2(word, mode='L')
    return np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1]), *offset


def wrap(words, font, size, width):
    """Fill lines greedily, each at most `width` pixels of ink; a line is a list of (x, word).

    A space never kerns, so a line's extent follows from those of its words; where rounding could decide, Pillow measures it.
    """
    lines, space = [], measure(font, size, ' ')[0]
    x = begin = end = 0
    for word in words:
        advance, left, right = measure(font, size, word)
        extent = max(end, x + right) - min(begin, x + left)
        if lines and abs(extent - width) < 1 and extent % 1:
            box = load_font(font, size).getbbox(' '.join([w for _, w in lines[-1]] + [word]))
            extent = box[2] - box[0]
        if lines and extent <= width:
            lines[-1].append((x, word))
            begin, end = min(begin, x + left), max(end, x + right)
        else:
            lines.append([(0, word)])
            x, begin, end = 0, left, right
        x += advance + space
    return lines


def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05, ink='black', paper='white'):
    """Draw text on a page of size x size pixels -> RGB image, type size, lines drawn, and the text that did not fit ('' if all).

    font_size fixes the type size; without it, it is the largest that fits, or 4. Raises SystemExit when the font is missing.
    """
    words, edge = text.split(), int(margin * size)
    room = size - 2 * edge
    low, high = (font_size, font_size) if font_size else (MIN_SIZE, MAX_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(wrap(words, font, middle, room)) * int(line_spacing * middle) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    lines, step = wrap(words, font, low, room), int(line_spacing * low)
    drawn = min(len(lines), room // step)

    coverage = np.zeros((size + step, 2 * size), np.uint8)                    # with room for what runs off the page
    for row, line in enumerate(lines[:drawn]):
        fraction = lambda x: abs(x - round(x))                                # Pillow's kerning moves letters by 1/64 pixel each,
        if any(fraction(x) + fraction(measure(font, low, word)[0]) >= 0.5 for x, word in line):     # which can add up to one
            line = [(0, ' '.join(word for _, word in line))]
        for x, word in line:
            pixels, dx, dy = rasterize(font, low, word)
            top, start = edge + row * step + dy, max(edge + round(x) + dx, 0)
            area = coverage[top:top + pixels.shape[0], start:start + pixels.shape[1]]
            pixels = pixels[:area.shape[0], :area.shape[1]]
            if area.any():                                                    # a mark on its neighbour: a + b - a b / 255, rounded
                over = pixels * (255 - area).astype(np.int32) + 128           # as Pillow rounds
                pixels = area + (over + (over >> 8) >> 8)
            area[:] = pixels
    page = Image.new('RGB', (size, size), paper)
    page.paste(ink, mask=Image.fromarray(coverage[:size, :size]))
    return page, low, drawn, ' '.join(word for line in lines[drawn:] for _, word in line)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Draw a text file as the page that the vision encoder sees.')
    parser.add_argument('file', help='UTF-8 text')
    parser.add_argument('--size', type=int, default=640, help='page side in pixels (default 640)')
    parser.add_argument('--out', default='page.png', help='where the image goes (default page.png)')
    args = parser.parse_args(argv)
    try:
        page, font_size, lines, lost = render_page(Path(args.file).read_text(encoding='utf-8'), args.size)
        page.save(args.out)
    except (OSError, ValueError) as e:
        raise SystemExit(f'{args.file} to {args.out}: {e}')
    print(f'{args.out}: {args.size} x {args.size} pixels, type size {font_size}, {lines} lines, {len(lost)} characters lost')


if __name__ == '__main__':
    main()
