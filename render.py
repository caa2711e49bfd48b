"""
Text to page image: the paper's page, in the largest type at which the whole text fits.

    python render.py FILE --size 640 --out page.png        what the vision encoder sees of a text file

Words are wrapped greedily, and one wider than the page runs off it. White space only separates words: paragraphs do not
survive. Follows data/scripts/prepare_training_data.py of the paper's code, pixel for pixel. That asks Pillow to measure
and draw every line at every type size that is tried; letters in arrays do the same in a twentieth of the time.
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
def measure(font, size, letters):
    """Advance of one letter or two, and where their ink begins and ends if they are set at x = 0, in pixels."""
    left, _, right, _ = load_font(font, size).getbbox(letters)
    return load_font(font, size).getlength(letters), left, right


@lru_cache(maxsize=20_000)
def rasterize(font, size, letter):
    """Columns, rows and coverage (0 to 255) of the pixels that a letter set at (0, 0) touches, each (pixels,)."""
    mask, (x, y) = load_font(font, size).getmask2(letter, mode='L')
    mask = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
    rows, columns = mask.nonzero()
    return columns + x, rows + y, mask[rows, columns].astype(np.int32)


def set_line(text, font, size):
    """Where each letter of a text on one line is set, and where its ink begins and ends, in pixels, each (n,)."""
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
    codes, which = np.unique(codes, return_inverse=True)
    letters = [chr(code) for code in codes]
    advance, left, right = np.array([measure(font, size, letter) for letter in letters]).T[:, which]
    pairs, kind = np.unique(which[:-1] * len(letters) + which[1:], return_inverse=True)
    pairs = [letters[pair // len(letters)] + letters[pair % len(letters)] for pair in pairs]
    lengths = np.array([measure(font, size, pair)[0] for pair in pairs])[kind]     # two advances, unless the pair kerns
    x = np.append(0, np.cumsum(lengths - advance[1:]))
    return x, x + left, x + right


def wrap(text, font, size, width):
    """Fill lines greedily with words that have one space between them, at most `width` pixels of ink to a line -> where
    lines start and stop in the text (lines,), and the x of every letter if all were one line (n,)."""
    x, begin, end = set_line(text, font, size)
    words = np.array([len(word) for word in text.split(' ')])
    stops = np.cumsum(words + 1) - 1
    starts = stops - words
    end[stops[:-1]] = 0                                           # a space has no ink
    begin, end = np.minimum.reduceat(begin, starts), np.maximum.reduceat(end, starts)
    lines, word = [], 0
    while word < len(words):
        # All words that end a pixel before the margin fit; those nearer to it one by one.
        after = max(word + 1, np.searchsorted(end, begin[word] + width - 1, 'right'))
        while after < len(words) and (extent := end[after] - begin[word]) < width + 1:
            if extent % 1:                                        # kerning moves by 1/64 of a pixel, and Pillow rounds
                left, _, right, _ = load_font(font, size).getbbox(text[starts[word]:stops[after]])
                extent = right - left
            if extent > width:
                break
            after += 1
        lines.append((starts[word], stops[after - 1]))
        word = after
    return *np.array(lines).T, x


def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05, ink='black',
                paper='white'):
    """Draw text on a page of size x size pixels -> RGB image, type size, lines drawn, the text that did not fit or ''.

    font_size: in pixels; None is the largest of 4 to 30 at which all fits, or 4. line_spacing: in type sizes. margin: a
    share of the page's side. font: a name or file; SystemExit if there is none. ink, paper: colours as Pillow has them.
    """
    text, edge, page = ' '.join(text.split()), int(margin * size), Image.new('RGB', (size, size), paper)
    room, low, high = size - 2 * edge, font_size or 4, font_size or 30
    if not text:
        return page, high, 0, ''
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(wrap(text, font, middle, room)[0]) * int(line_spacing * middle) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    (starts, stops, x), step = wrap(text, font, low, room), max(int(line_spacing * low), 1)
    drawn = min(len(starts), room // step)
    rest = text[starts[drawn]:] if drawn < len(starts) else ''
    if not drawn:
        return page, low, 0, rest

    text, x = text[:stops[drawn - 1]], x[:stops[drawn - 1]]
    line = np.repeat(np.arange(drawn), np.diff(stops[:drawn], prepend=0))     # of each letter
    left = edge + np.floor(x - x[starts[line]] + 0.5).astype(int)             # Pillow sets letters at whole pixels
    inked = {letter: rasterize(font, low, letter) for letter in set(text)}
    columns, rows, values = zip(*(inked[letter] for letter in text))
    counts = [len(v) for v in values]
    columns = np.repeat(left, counts) + np.concatenate(columns)
    rows, values = np.repeat(edge + line * step, counts) + np.concatenate(rows), np.concatenate(values)
    on = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    pixels, values = (rows * size + columns)[on], values[on]
    coverage, first = np.zeros(size * size, np.int32), np.zeros(size * size, int)
    while len(pixels):                                            # one letter a pixel; where letters overlap, again
        first[pixels[::-1]] = np.arange(len(pixels))[::-1]        # the last assignment is the one that stays
        now = first[pixels] == np.arange(len(pixels))
        over = values[now] * (255 - coverage[pixels[now]]) + 128
        coverage[pixels[now]] += over + (over >> 8) >> 8          # a + b - a b / 255, rounded as Pillow does
        pixels, values = pixels[~now], values[~now]
    page.paste(ink, mask=Image.fromarray(coverage.astype(np.uint8).reshape(size, size)))
    return page, low, drawn, rest


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
