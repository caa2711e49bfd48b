"""
Draws results/argument.png, the argument in one picture: python results/picture_of_everything.py

One text goes through three encoders into strips of vectors. The same decoder reads them, and has to say the same text,
or the next one. The perplexities are those of the checkpoints that the paper's authors released, from their model card;
the vectors are counted by our encoders.
"""
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoders import ENCODERS                                 # noqa: E402
from load_deepseek import PRESETS, sizes_from                 # noqa: E402
from render import render_page                                # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt                               # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle      # noqa: E402

TEXT = ('The ferry leaves at nine if the fog lifts. Mara has packed two coats, a kettle and the letter that she has not '
        'opened. She locks the house, hides the key under the third flower pot, and walks down to the pier.')
NEXT = 'Nobody else is waiting there.'
PAGE, MEAN, CONV, GREY, PALE = '#c53030', '#2f855a', '#c05621', '#4a5568', '#edf2f7'
# name, what it does, regime and settings of the paper's rows, perplexity per token: the same text, the next text
ROWS = [
    ('page of pixels', 'SAM and CLIP look at\nsquares of the page', PAGE, 'vision', {'vision_mode': 'base'}, 1.03, 5.06),
    ('means of windows', 'of four embeddings each', MEAN, 'meanpool', {'compression_window_size': 4}, 1.04, 5.02),
    ('convolutions', 'each halves the length', CONV, 'conv1d_residual', {'compression_target': 250}, 1.00, 4.96),
]
TRUNCATION = 5.02
WIDTH, HEIGHT = 820, 450                                      # of the picture, in pixels as it is shown


def count(regime, settings):
    """How many vectors the encoder makes of 1,000 tokens."""
    config = sizes_from(PRESETS['tiny'])
    encoder = ENCODERS[regime](config, 1000, **settings)
    embed = torch.nn.Embedding(259, config.hidden_size)
    size = getattr(encoder, 'image_size', None) or 64
    batch = {'context': torch.zeros(1, 1000, dtype=torch.long), 'image': torch.zeros(1, 3, size, size)}
    with torch.no_grad():
        return encoder(batch, embed).shape[1]


def write(x, y, text, size=9.5, color='black', **more):
    settings = {'ha': 'center', 'va': 'center', **more}
    ax.text(x, y, text, fontsize=size, color=color, **settings)


def box(x, y, w, h, edge=GREY, face='white', lw=1.2):
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle='round,pad=0,rounding_size=6', ec=edge, fc=face, lw=lw))


def arrow(start, end, color=GREY, lw=1.4, bend=0):
    style = {'arrowstyle': '-|>,head_width=0.25,head_length=0.5', 'color': color, 'lw': lw, 'shrinkA': 0, 'shrinkB': 0}
    ax.annotate('', end, start, arrowprops={**style, 'connectionstyle': f'arc3,rad={bend}'})


def page(x, y, side, color):
    """The text as the encoder sees it, and the squares that become vectors."""
    drawn = render_page(TEXT, 256)[0]
    ax.imshow(np.asarray(drawn), extent=(x, x + side, y, y + side), interpolation='antialiased', zorder=2)
    for i in range(5):
        ax.plot([x + side * i / 4] * 2, [y, y + side], color=color, lw=0.8, alpha=0.6, zorder=3)
        ax.plot([x, x + side], [y + side * i / 4] * 2, color=color, lw=0.8, alpha=0.6, zorder=3)


def means(x, y, w, color):
    """Four embeddings, their mean, and again."""
    shades = np.random.default_rng(1).uniform(0.15, 0.75, 12)
    size = w / 13
    for i in range(12):
        left = x + i * size + i // 4 * size / 2
        ax.add_patch(Rectangle((left, y + 30), size * 0.85, size * 1.3, fc=plt.get_cmap('Greens')(shades[i]), ec='none'))
    for i in range(3):
        middle = x + i * 4.5 * size + 2 * size
        for k in range(4):
            ax.plot([x + (4.5 * i + k + 0.42) * size, middle], [y + 29, y + 15], color=color, lw=0.7)
        ax.add_patch(Rectangle((middle - size / 2, y), size, size * 1.3, fc=color, ec='none'))


def pyramid(x, y, w, color):
    """Two convolutions, each over the one above."""
    for level, n in enumerate((12, 6, 3)):
        size, top = w / 13, y + 40 - 20 * level
        left = x + (w - n * size) / 2
        for i in range(n):
            ax.add_patch(Rectangle((left + i * size, top), size * 0.85, size * 1.1, ec='none',
                                   fc=plt.get_cmap('Oranges')(0.3 + 0.22 * level) if level < 2 else color))
            if level:
                above = x + (w - 2 * n * size) / 2
                for k in (2 * i, 2 * i + 1):
                    ax.plot([left + (i + 0.42) * size, above + (k + 0.42) * size], [top + size * 1.1, top + 20],
                            color=color, lw=0.6)


def strip(x, y, n, color):
    """Seven of the n vectors."""
    for i in range(9):
        if i in (6, 7):
            ax.add_patch(plt.Circle((x + 5 + i * 10, y + 9), 1.4, fc=color, ec='none'))
        else:
            ax.add_patch(Rectangle((x + i * 10, y), 8, 18, fc=color, ec='none'))
    write(x + 44, y - 11, f'{n} vectors', 9, color)


def bars(x, low, values, floor, scale, names):
    """A bar for each encoder from the line at `floor`: up is worse. Returns the height of the line in pixels."""
    for i, ((_, _, color, *_), value, name) in enumerate(zip(ROWS, values, names)):
        height = scale * (value - floor)
        left = x + 74 * i
        ax.add_patch(Rectangle((left, low), 44, height or 1.5, fc=color, ec='none'))
        write(left + 22, low + height + (8 if height >= 0 else -9), f'{value:.2f}', 10, color, weight='bold')
        write(left + 22, low - 12 if height >= 0 and floor == 0 else low + (-9 if height >= 0 else 9), name, 8.5, color)


figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor='white')
ax = figure.add_axes((0, 0, 1, 1))
ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect='equal')
ax.axis('off')

# the text
write(62, HEIGHT - 14, 'a text', 10.5, weight='bold')
box(6, 46, 112, 374)
write(14, 410, textwrap.fill(TEXT, 16), 8.1, ha='left', va='top', linespacing=1.4)
write(62, 116, '...', 12, GREY)
write(62, 64, '1,000 tokens\nin the paper', 8, GREY)

# three encoders
write(214, HEIGHT - 14, 'three encoders', 10.5, weight='bold')
write(372, HEIGHT - 14, 'vectors', 10.5, weight='bold')
for k, (name, how, color, regime, settings, _, _) in enumerate(ROWS):
    low = 304 - 129 * k
    middle = low + 58
    box(140, low, 150, 116, color)
    write(215, low + 103, name, 9.3, color, weight='bold')
    if k == 0:
        page(146, low + 6, 88, color)
        write(261, low + 50, 'SAM\nand\nCLIP\nlook\nat it', 8, GREY, linespacing=1.3)
    else:
        write(215, low + 88, how, 7.8, GREY)
        (means, pyramid)[k - 1](152, low + 17, 126, color)
    arrow((118, middle), (139, middle))
    arrow((291, middle), (322, middle), color)
    strip(326, middle - 9, count(regime, settings), color)
    arrow((420, middle), (444, 233 + 22 * (1 - k)), color)

# one decoder, two tasks
write(487, HEIGHT - 14, 'one decoder', 10.5, weight='bold')
box(446, 46, 82, 374, face=PALE)
write(487, 233, 'DeepSeek-\nOCR\u2019s\nlanguage\nmodel', 9, linespacing=1.5)
arrow((529, 325), (553, 325), lw=2)
arrow((529, 135), (553, 135), lw=2)

box(556, 244, 258, 176)
write(685, HEIGHT - 14, 'two tasks', 10.5, weight='bold')
write(566, 406, 'the same text', 9.5, ha='left', weight='bold')
write(566, 390, f'\u201c{TEXT[:38]}...\u201d', 8.3, GREY, ha='left', style='italic')
names = ('page', 'means', 'convolutions')
bars(588, 290, [row[5] for row in ROWS], 0, 66, names)
ax.plot([572, 798], [290 + 66] * 2, color='black', lw=0.9, ls='--')
write(806, 406, 'dashed: perfect, 1.00', 7.8, ha='right')
write(685, 257, 'All three store the text.', 9.2, weight='bold')

box(556, 46, 258, 188)
write(566, 220, 'the next text', 9.5, ha='left', weight='bold')
write(566, 204, f'\u201c{NEXT}\u201d', 8.3, GREY, ha='left', style='italic')
bars(588, 132, [row[6] for row in ROWS], TRUNCATION, 700, names)
ax.plot([562, 808], [132, 132], color='black', lw=0.9, ls='--')
write(806, 220, f'dashed: truncation, {TRUNCATION}', 7.8, ha='right')
write(563, 140, 'worse', 7.5, GREY, ha='left', va='bottom', rotation=90)
write(563, 124, 'better', 7.5, GREY, ha='left', va='top', rotation=90)
write(685, 59, 'Page: no better than forgetting.', 8.9, weight='bold')

write(6, 30, 'Bars: perplexity per token (lower is better) of the checkpoints that the paper\u2019s authors released. '
      'Next text: distance from truncation.', 7.8, GREY, ha='left')
write(6, 15, 'Truncation: the decoder gets the last 277 tokens as they are, at 278 positions like the page, and nothing of '
      'the rest. It is the bar to beat.', 7.8, GREY, ha='left')

figure.savefig(Path(__file__).with_name('argument.png'), dpi=200)
