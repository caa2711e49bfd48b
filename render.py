"""
Text to page image: the paper's page, in the largest type at which the whole text fits.

    python render.py FILE --size 640 --out page.png        what the vision encoder sees of a text file

White page, black DejaVu Sans, a margin of 5% of the height, lines 1.2 times the type size apart, sizes 4 to 30, words wrapped
greedily; a word wider than the page runs off it. White space only separates words: paragraphs do not survive.
The layout engine is asked for by name (BASIC): Pillow's other one gives different pages where its libraries are installed.
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
    """The font at `size` pixels: a file or a name the system knows, else DejaVu Sans as matplotlib carries it."""
    try:
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        if name != 'DejaVuSans.ttf':
            raise SystemExit(f'{name}: no such font, or not a font file')
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('DejaVuSans.ttf not found: install it (Debian: fonts-dejavu-core), or `pip install matplotlib`')
    return load_font(str(Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')), size)


@lru_cache(maxsize=200_000)
def measure(font, size, word):
    """Of a word set at x = 0, in pixels: where the next character would go, and where its ink begins and ends."""
    left, _, right, _ = load_font(font, size).getbbox(word)
    return load_font(font, size).getlength(word), left, right


@lru_cache(maxsize=100_000)
def rasterize(font, size, word):
    """The coverage of a word's pixels, 0 to 255 (h, w), and its offset (x, y) from the top left of the line."""
    mask, (x, y) = load_font(font, size).getmask2(word, mode='L')
    return np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[1], mask.size[0]), x, y


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
            line = ' '.join([w for _, w in lines[-1]] + [word])
            extent = (lambda box: box[2] - box[0])(load_font(font, size).getbbox(line))
        if lines and extent <= width:
            lines[-1].append((x, word))
            begin, end = min(begin, x + left), max(end, x + right)
        else:
            lines.append([(0, word)])
            x, begin, end = 0, left, right
        x += advance + space
    return lines


def draw(coverage, glyphs, dx, dy, x, y):
    """Lay a word's coverage at (x + dx, y + dy) over the page's; what falls off the page is cut."""
    top, start = max(y + dy, 0), max(x + dx, 0)
    part = glyphs[top - y - dy:, start - x - dx:]
    target = coverage[top:top + part.shape[0], start:start + part.shape[1]]
    np.maximum(target, part[:target.shape[0], :target.shape[1]], out=target)


def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05, ink='black', paper='white'):
    """Draw text on a page of size x size pixels -> RGB image, type size, lines drawn, and the text that did not fit ('' if all).

    font_size fixes the type size instead of searching for the largest that fits. Raises SystemExit when the font is missing.
    """
    words, edge = text.split(), int(margin * size)
    room = size - 2 * edge
    layouts = {}

    def fits(s):
        layouts[s] = wrap(words, font, s, room)
        return len(layouts[s]) * int(line_spacing * s) <= room

    low, high = (font_size, font_size) if font_size else (MIN_SIZE, MAX_SIZE)
    while low < high:                                            # the largest size that fits, or the smallest if none does
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    lines = layouts.get(low) or wrap(words, font, low, room)

    coverage, y, step, drawn = np.zeros((size, size), np.uint8), edge, int(line_spacing * low), 0
    while drawn < len(lines) and y + step <= size - edge:
        for x, word in lines[drawn]:
            draw(coverage, *rasterize(font, low, word), edge + round(x), y)
        y, drawn = y + step, drawn + 1
    page = Image.new('RGB', (size, size), paper)
    page.paste(ink, mask=Image.fromarray(coverage))
    return page, low, drawn, ' '.join(word for line in lines[drawn:] for _, word in line)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Draw a text file as the page that the vision encoder sees.')
    parser.add_argument('file', help='UTF-8 text')
    parser.add_argument('--size', type=int, default=640, help='page side in pixels (default 640)')
    parser.add_argument('--out', default='page.png', help='where the image goes (default page.png)')
    args = parser.parse_args(argv)
    try:
        text = Path(args.file).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f'{args.file}: {e}')
    page, font_size, lines, lost = render_page(text, args.size)
    page.save(args.out)
    print(f'{args.out}: {args.size} x {args.size} pixels, type size {font_size}, {lines} lines, {len(lost)} characters lost')


if __name__ == '__main__':
    main()
