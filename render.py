"""
Text to page image: the paper's page, in the largest type at which the whole text fits.

    python render.py FILE --size 640 --out page.png        what the vision encoder sees of a text file

Words are wrapped greedily, and one that is wider than the page runs off its right edge. White space only separates
words. Pages equal those of data/scripts/prepare_training_data.py in the paper's code, pixel for pixel. Each word is
measured and drawn once and then reused: that takes less than a twentieth of the time.
"""
import argparse
import os
import sys
import traceback
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

@lru_cache(maxsize=64)
def load_font(name, size):
    """The font with this name or file at `size` pixels, or matplotlib's copy of it. Raises ValueError."""
    basic = ImageFont.Layout.BASIC          # Pillow's other layout engine draws different pages where it is installed
    with explain(f'{name}: no such font file; pip install matplotlib brings DejaVuSans.ttf'):
        try:
            return ImageFont.truetype(name, size, layout_engine=basic)
        except OSError:
            import matplotlib
            return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/{name}', size, layout_engine=basic)

# Of a font and a word: how far the pen moves; left, top, right and bottom of the ink; the ink and where it lies.
advance = lru_cache(maxsize=200_000)(ImageFont.FreeTypeFont.getlength)
extent = lru_cache(maxsize=200_000)(ImageFont.FreeTypeFont.getbbox)
rasterize = lru_cache(maxsize=100_000)(ImageFont.FreeTypeFont.getmask2)

@lru_cache(maxsize=100_000)
def lacks(font, character):
    """Whether the font lacks a character: then it draws the same box as for U+10FFFF, which no font has."""
    (ink, corner), (box, box_corner) = (font.getmask2(c, 'L') for c in (character, '\U0010ffff'))
    return (bytes(ink), ink.size, corner) == (bytes(box), box.size, box_corner)

def ink_width(font, line):
    """Pixels from the first ink to the last of a line of (x, word)."""
    (_, first), (x, last) = line[0], line[-1]
    if x % 1:                                                     # kerning moves by 1/64 of a pixel, and Pillow rounds
        left, _, right, _ = font.getbbox(' '.join(word for _, word in line))
        return right - left
    return x + extent(font, last)[2] - extent(font, first)[0]

def wrap(words, font, width):
    """Yield lines as lists of (x, word) with the pen at x: greedy, at most `width` pixels of ink in each."""
    line, x, space, near = [], 0, advance(font, ' '), font.size     # the ink ends near the pen
    for word in words:
        end = x + advance(font, word)
        if line and end > width - near and (end > width + near or ink_width(font, [*line, (x, word)]) > width):
            yield line
            line, x, end = [], 0, advance(font, word)
        line.append((x, word))
        x = end + space
    if line:
        yield line

def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05):
    """Draw text on a page of size x size pixels -> RGB image, type size, lines drawn, characters that are not on it:
    lines below its end, letters that run off its edge, characters that the font lacks. font_size: in pixels; None is
    the largest of 4 to 30 at which all lines fit, or 4. line_spacing: in type sizes. margin: as a share of the page.
    font: a name or file; ValueError if there is none."""
    words, edge = text.split(), int(margin * size)
    room = size - 2 * edge
    step = lambda type_size: max(int(line_spacing * type_size), 1)
    rows = lambda type_size: room // step(type_size)
    fits = lambda type_size: not any(islice(wrap(words, load_font(font, type_size), room), rows(type_size), None))
    font_size = font_size or 30 - bisect_left(range(30, 4, -1), True, key=fits)
    face = load_font(font, font_size)
    lines = list(islice(wrap(words, face, room), rows(font_size)))
    lost, boxes = len(' '.join(words[sum(map(len, lines)):])), {c for c in set(text) if lacks(face, c)}
    page = Image.new('L', (size, size), 'white')
    draw = ImageDraw.Draw(page).draw                              # as ImageDraw.text() does, but a word is drawn once
    for i, line in enumerate(lines):
        for x, word in line:
            ink, (left, top) = rasterize(face, word, 'L', start=(x % 1, 0))
            draw.draw_bitmap((edge + int(x) + left, edge + i * step(font_size) + top), ink, 0)
            inside = len(word)
            if edge + x + advance(face, word) > size:
                inside = bisect_right(range(inside), size - edge - x, key=lambda n: face.getlength(word[:n + 1]))
            lost += len(word) - inside + (sum(c in boxes for c in word[:inside]) if boxes else 0)
    return page.convert('RGB'), font_size, len(lines), lost

def check(condition, message):
    """Raise ValueError with this message, which names the file or flag, unless the condition holds."""
    if not condition:
        raise ValueError(message)

@contextmanager
def explain(message):
    """Raise any exception of the block as a ValueError: this message and the cause."""
    try:
        yield
    except Exception as e:
        raise ValueError(f'{message} ({(str(e) or type(e).__name__).splitlines()[0]})') from e

def read_text(path):
    """The text of a UTF-8 file, without a byte-order mark. Raises ValueError for other encodings and binary files."""
    with explain(f'{path}: cannot be read as UTF-8 text'):
        text = Path(path).read_bytes().decode('utf-8-sig')
        check('\0' not in text, 'it has null characters')
        return text

def run_main(main):
    """Call main(). OSError, ImportError and a ValueError of this folder are a user's mistakes: one line on stderr, exit
    code 1. Anything else is a bug and keeps its traceback; DEBUG=1 shows all of them."""
    sys.stdout.reconfigure(errors='replace')                      # '?' for what a console cannot show
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        ours = Path(traceback.extract_tb(e.__traceback__)[-1].filename).parent == Path(__file__).parent
        if os.environ.get('DEBUG') or not (isinstance(e, (OSError, ImportError)) or isinstance(e, ValueError) and ours):
            # Raised again, it would keep a data loader alive and wait forever for workers, which ignore SIGTERM.
            sys.exit(traceback.format_exc())
        package = (getattr(e, 'name', None) or '').split('.')[0]
        sys.exit(' '.join(f'{e}'.split()) + (f'; pip install {package}' if package else ''))

def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw a text file as the page that the vision encoder sees.')
    parser.add_argument('file', help='UTF-8 text')
    parser.add_argument('--size', type=int, default=640, help='page side in pixels (default 640)')
    parser.add_argument('--out', default='page.png', help='PNG file to write (default page.png)')
    args = parser.parse_args(argv)
    check(0 < args.size <= 10_000, f'--size {args.size}: must be above 0 and at most 10000')
    text = ' '.join(read_text(args.file).split())
    page, font_size, lines, lost = render_page(text, args.size)
    page.save(args.out, 'PNG')
    print(f'{args.out}: type size {font_size}, {lines} lines, {lost} of {len(text)} characters are not on it')

if __name__ == '__main__':
    run_main(main)
