"""
Text to page image: the paper's page, in the largest font at which the whole text fits.

    python render.py FILE --size 640 --out page.png       what the vision encoder sees of a text

Words are wrapped greedily, and a word wider than the page runs off its right edge. White space of
any kind counts as one space. Pages equal those of data/scripts/prepare_training_data.py in the
paper's code, pixel for pixel, with Pillow's BASIC layout.
"""
import argparse
import importlib.util
import sys
import unicodedata
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

@lru_cache(maxsize=64)
def load_font(name, size):
    """The font in a file, or the one of that name that matplotlib brings, at `size` pixels.
    Raises ValueError if there is none or if it cannot be read."""
    path = Path(name)
    if not path.exists():
        # Not imported: that is slow, and fails where a notebook has set a backend.
        matplotlib = importlib.util.find_spec('matplotlib')
        path = Path(matplotlib.origin).parent / 'mpl-data/fonts/ttf' / name
    if not path.exists():
        raise ValueError(f'{name}: no such font file')
    try:
        # Pillow's other layout engine draws different pages where it is installed.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as e:
        raise ValueError(f'{name}: this font cannot be read') from e

@lru_cache(maxsize=200_000)
def advance(font, word):
    """How far a word moves the pen, in pixels."""
    return font.getlength(word)

@lru_cache(maxsize=200_000)
def extent(font, word):
    """Where the ink of a word begins and ends, in pixels from the pen."""
    left, _, right, _ = font.getbbox(word)
    return left, right

def ink_width(font, line, pen, word, limit):
    """Pixels of ink in a line and one more word, which begins at `pen`: measured as a whole near
    the limit, where it matters, and elsewhere the sum of the words."""
    left, _ = extent(font, line.split(' ', 1)[0])
    _, right = extent(font, word)
    ink = (pen + right) - left              # from the first word's left edge to the last's right
    # Kerning moves the pen by fractions of a pixel, which Pillow rounds.
    if abs(ink - limit) < 2:
        left, right = extent(font, f'{line} {word}')
        ink = right - left
    return ink

def wrap(text, font, width):
    """Yield the lines of a text, broken greedily, with at most `width` pixels of ink in each."""
    line, pen = '', 0
    space = advance(font, ' ')
    for word in text.split():
        end = pen + advance(font, word)
        is_wider = end > width
        # Ink ends within a letter of `end`: measure it only where `end` is near the edge.
        if abs(end - width) < font.size and line:
            is_wider = ink_width(font, line, pen, word, width) > width
        if line and is_wider:
            yield line
            line = ''
            end = advance(font, word)
        line = f'{line} {word}' if line else word
        pen = end + space
    if line:
        yield line

def largest(low, high, fits):
    """The largest n from low to high with fits(n), found by halving; low if there is none."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low

@lru_cache(maxsize=100_000)
def can_draw(font, character):
    """Whether the font has a character, and draws it correctly. Pillow's BASIC layout neither joins
    Arabic letters nor reverses Hebrew."""
    ink, corner = font.getmask2(character, 'L')
    # A font draws a box for a character that it lacks. All fonts lack U+10FFFF.
    box, box_corner = font.getmask2('\U0010ffff', 'L')
    is_box = (bytes(ink), ink.size, corner) == (bytes(box), box.size, box_corner)
    return not is_box and unicodedata.bidirectional(character) not in ('R', 'AL')

def letters_drawn(font, line, width, drawable):
    """How many letters of a line are on the page: within `width` pixels, and in `drawable`."""
    # Only a single word can be too long: wrap() has broken all other lines.
    if ' ' not in line and advance(font, line) > width:
        end = largest(0, len(line), lambda n: font.getlength(line[:n]) <= width)
        line = line[:end]
    return sum(character in drawable for character in line)

def render_page(text, size, font='DejaVuSans.ttf', font_size=None, line_spacing=1.2, margin=0.05):
    """Draw a text on a white page of size x size pixels.

    font: a name or a file. font_size: in pixels; None is the largest of 4 to 30 at which all lines
    fit, and 4 if there is none. line_spacing: in font sizes. margin: a share of the page.
    Returns the RGB image, the font size, the number of lines on it, and how many characters of the
    text are missing from it: lines below its end, letters beyond its right edge, and characters
    that the font cannot draw. Raises ValueError if there is no such font."""
    edge = int(margin * size)
    room = size - 2 * edge

    def step(font_size):
        """Pixels from one line to the next."""
        return max(int(line_spacing * font_size), 1)

    def fits(font_size):
        lines = wrap(text, load_font(font, font_size), room)
        most = room // step(font_size)
        first = list(islice(lines, most + 1))                       # stops at one line too many
        return len(first) <= most

    if font_size is None:
        font_size = largest(4, 30, fits)
    face = load_font(font, font_size)
    lines = list(wrap(text, face, room))
    most = room // step(font_size)
    drawable = {character for character in set(text) if can_draw(face, character)}
    drawable.add(' ')                       # wrap() puts it between words

    page = Image.new('L', (size, size), 'white')
    draw = ImageDraw.Draw(page)
    missing = len(' '.join(lines[most:]))
    for i, line in enumerate(lines[:most]):
        draw.text((edge, edge + i * step(font_size)), line, fill='black', font=face)
        # A word too long for its line runs through the right margin, to the end of the page.
        to_page_end = size - edge
        missing += len(line) - letters_drawn(face, line, to_page_end, drawable)
    return page.convert('RGB'), font_size, len(lines[:most]), missing

def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Draw a text file as the page that the vision encoder sees.')
    parser.add_argument('file', help='UTF-8 text')
    parser.add_argument('--size', type=int, default=640, help='page side in pixels (default 640)')
    parser.add_argument('--out', default='page.png', help='PNG file to write (default page.png)')
    args = parser.parse_args(argv)
    if not 0 < args.size <= 10_000:
        parser.error(f'--size {args.size}: must be above 0 and at most 10000')
    try:
        text = Path(args.file).read_text(encoding='utf-8-sig')
        page, font_size, n_lines, missing = render_page(text, args.size)
        page.save(args.out, 'PNG')
    except (OSError, ValueError) as e:
        sys.exit(f'{args.file}: {e}')
    n_characters = len(' '.join(text.split()))
    print(f'{args.out}: font size {font_size}, {n_lines} lines, '
          f'{missing} of {n_characters} characters are missing from the page')

if __name__ == '__main__':
    main()
