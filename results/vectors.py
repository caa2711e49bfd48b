"""
What each vector of a memory holds: how much worse a character is predicted when one vector is another passage's.

    python results/vectors.py results/reader MEANPOOL_RUN CONVOLUTIONS_RUN --data heldout --out results/vectors.png

Each model gets a map: the first characters of a passage across, the vectors of its memory down. A cell says by how many
nats the loss of that character rises when that vector is replaced by the vector in the same place of another passage,
the mean over 16 others. Each character is predicted from the true ones before it. If a model reads pages, its page is
drawn beside its map, with the square that one of the vectors stands for.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Batches                                      # noqa: E402
from decoder import Autoencoder                               # noqa: E402
from load_deepseek import load, load_run, read_json, run_main  # noqa: E402
from render import render_page                                # noqa: E402

TEXT = ('My neighbour paints doors. He has painted one in every village along the river, '
        'and none of them opens on a house. I asked him!?')
NATS = 6                                                      # the darkest colour: this much or more
OUTLINE = '#1e88e5'


class Given(nn.Module):
    """An encoder that returns a memory (B, M, D) which it was given."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, batch, embed):
        return self.memory


@torch.no_grad()
def effect(model, tokenizer, data, text, others=16):
    """-> nats (M, T): row j is how much worse the characters of the text are predicted without its vector j."""
    image_size = getattr(model.encoder, 'image_size', None)
    batch = Batches(data, 'val', 1 + others, tokenizer, image_size)[0]
    batch['context'][0] = torch.tensor(tokenizer.encode(text).ids)
    if image_size:
        page = np.array(render_page(text, image_size)[0])
        batch['image'][0] = torch.from_numpy(page).permute(2, 0, 1)
    memory = model.encoder(batch, model.decoder.embed_tokens)                              # (1 + others, M, D)
    own = memory[:1]

    def losses(memory):
        context = batch['context'][:1].expand(len(memory), -1)
        given = Autoencoder(Given(memory), model.decoder, 'reconstruction', model.prompt)
        return given({'context': context})[0]

    rows = []
    for j in range(memory.shape[1]):
        changed = own.repeat(others, 1, 1)
        changed[:, j] = memory[1:, j]
        rows.append(losses(changed).mean(dim=0))
    return torch.stack(rows) - losses(own)


def title_of(model):
    """page, mean of 8, convolutions"""
    encoder = model.encoder
    if getattr(encoder, 'image_size', None):
        return 'page'
    if hasattr(encoder, 'pyramid'):
        return 'convolutions'
    return f'mean of {encoder.window}'


def draw(maps, text, characters, square, path):
    """maps: (title, pixels a side of its page or None, nats (M, T)) for each model."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    shown = []                                                # of each map, up to the last vector that matters here
    for _, _, nats in maps:
        matters = (nats[:, :characters] > 0.5).any(dim=1).nonzero()
        shown.append(1 + int(matters.max()) if len(matters) else len(nats))
    heights = [0.55 + 0.155 * n for n in shown]
    figure, axes = plt.subplots(len(maps), 2, figsize=(8.2, 0.6 + sum(heights)), squeeze=False, width_ratios=(1, 4.4),
                                height_ratios=heights, layout='constrained', facecolor='white')
    for (beside, ax), (title, image_size, nats), n in zip(axes, maps, shown):
        colours = ax.imshow(nats[:n, :characters].clamp(0, NATS), vmin=0, vmax=NATS, aspect='auto', cmap='magma_r',
                            interpolation='nearest')
        ax.set_title(f'{title}: the first {n} of {len(nats)} vectors', fontsize=10, fontweight='bold')
        ax.set_ylabel('vector', fontsize=9)
        ax.set_yticks(range(0, n, 2))
        ax.set_xticks(range(characters), text[:characters], fontsize=8, family='monospace')
        ax.tick_params(axis='x', length=0)
        ax.tick_params(axis='y', labelsize=8)
        beside.axis('off')
        if not image_size:
            continue
        beside.imshow(np.asarray(render_page(text, image_size)[0]))
        for edge in range(0, image_size + 1, 64):
            beside.plot([edge, edge], [0, image_size], color='#aaaaaa', lw=0.6)
            beside.plot([0, image_size], [edge, edge], color='#aaaaaa', lw=0.6)
        row, column = divmod(square, image_size // 64 + 1)    # a row of squares ends with a newline
        outline = {'fill': False, 'ec': OUTLINE, 'lw': 2, 'zorder': 5, 'clip_on': False}
        beside.add_patch(Rectangle((column * 64, row * 64), 64, 64, **outline))
        beside.set_title(f'square {square} of the page', fontsize=9, color=OUTLINE)
        ax.add_patch(Rectangle((-0.5, square - 0.5), characters, 1, **outline))
    bar = figure.colorbar(colours, ax=axes, location='bottom', shrink=0.5, aspect=40, pad=0.02)
    bar.set_label(f"rise of the character's loss without the vector, in nats ({NATS} or more: black)", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description='Draw what each vector of a memory holds.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a reconstruction run, or results/reader')
    parser.add_argument('--data', required=True, help='corpus that data.py made, of the context length of the runs')
    parser.add_argument('--text', default=TEXT, help='the passage: as many bytes as the context')
    parser.add_argument('--characters', type=int, default=60, help='how many of them to show (default 60)')
    parser.add_argument('--square', type=int, default=1, help='the vector whose square of the page is outlined')
    parser.add_argument('--out', default='vectors.png', help='PNG file to write (default vectors.png)')
    args = parser.parse_args()
    maps = []
    for folder in args.runs:
        is_run = 'run' in read_json(Path(folder, 'config.json'))                           # results/reader is no run
        model, tokenizer, _ = load_run(folder) if is_run else load(folder, 'vision', 0)
        nats = effect(model.eval(), tokenizer, args.data, args.text)
        maps.append((title_of(model), getattr(model.encoder, 'image_size', None), nats))
    draw(maps, args.text, args.characters, args.square, args.out)


if __name__ == '__main__':
    run_main(main)
