"""Draws results/pipeline.png: one context of 1000 tokens three ways into one decoder. python results/pipeline.py"""
import sys
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from encoders import ENCODERS                              # noqa: E402
from load_deepseek import PRESETS, sizes_from              # noqa: E402
from render import render_page                             # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt                            # noqa: E402

T, INK, LAST = 1000, '#33658a', '#f26419'
page, font_size, _, lost = render_page(topics['types'][:4300], 640)
assert not lost
config = sizes_from(PRESETS['tiny'])
batch = {'context': torch.zeros(1, T, dtype=torch.long), 'image': torch.from_numpy(np.array(page)).permute(2, 0, 1)[None]}


def vectors(regime, **settings):
    """How many vectors the encoder makes of this context."""
    return ENCODERS[regime](config, T, **settings)(batch, torch.nn.Embedding(259, config.hidden_size)).shape[1]


figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), height_ratios=(5, 2.4), layout='constrained')
for ax in axes.flat:
    ax.axis('off')

ax = axes[0, 0]
ax.imshow(page)
for i in range(0, 641, 64):
    ax.plot([i, i], [0, 640], color=INK, lw=0.6), ax.plot([0, 640], [i, i], color=INK, lw=0.6)
ax.set_title('vision: a page of 640 pixels; SAM, CLIP and a\nprojector turn each square into a vector', size=9)

ax = axes[0, 1]
rng = np.random.default_rng(0)
for i in range(28):
    ax.add_patch(plt.Rectangle((i % 9 * 1.05, -(i // 9) * 2.2), 0.95, 0.95, color=plt.cm.Blues(rng.uniform(0.2, 0.7))))
for row in range(3):
    ax.annotate('', (11.2, -row * 2.2 + 0.5), (9.6, -row * 2.2 + 0.5), arrowprops={'arrowstyle': '->'})
    ax.add_patch(plt.Rectangle((11.4, -row * 2.2), 0.95, 0.95, color=INK))
ax.text(1.4, -6.3, '...')
ax.set(xlim=(-0.5, 13), ylim=(-7.5, 1.5), aspect='equal')
ax.set_title('meanpool: the mean embedding\nof each nine tokens', size=9)

ax = axes[0, 2]
for level, length in enumerate((1000, 500, 250, 125)):
    ax.add_patch(plt.Rectangle((-length / 2, -level * 2), length, 0.9, color=plt.cm.Blues(0.25 + 0.2 * level)))
    ax.text(0, -level * 2 + 0.42, str(length), ha='center', va='center', color='white' if level > 1 else 'black', size=9)
    if level:
        ax.text(0, -level * 2 + 1.4, 'residual convolutions, half the length', ha='center', va='center', size=7)
ax.set(xlim=(-540, 540), ylim=(-8, 2))
ax.set_title('conv1d_residual: blocks of convolutions,\neach of which halves the length', size=9)

memories = (('vision', {'vision_mode': 'small'}), ('meanpool', {'compression_window_size': 9}),
            ('conv1d_residual', {'compression_target': 125}))
for ax, (regime, settings) in zip(axes[1], memories):
    n = vectors(regime, **settings)
    for i in range(n):
        special = i == n - 1 or regime == 'vision' and i % 11 == 10               # a row of the page: 10 and a newline
        ax.add_patch(plt.Rectangle((i % 11, -(i // 11)), 0.8, 0.8, lw=0, color=LAST if special else INK))
    ax.set(xlim=(-0.5, 11.5), ylim=(-11.3, 1.3), aspect='equal')
    ax.set_title(f'{n} vectors' + (', with 10 newlines and a separator' if regime == 'vision' else ', with a separator'), size=9)
figure.suptitle('Three ways from 1000 tokens into the same decoder, which reads:  [BOS] memory | target', size=11)
figure.savefig(Path(__file__).with_suffix('.png'), dpi=100)
