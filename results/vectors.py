"""
What each memory vector holds: how much worse a character is predicted when one vector is another passage's.

    python results/vectors.py results/reader out/grid/seed0/meanpool_8 --data wiki

For each model, a map of the characters of one passage (across) and the vectors of its memory (down). A cell says by how
many nats the loss of that character rises when that vector is replaced by the vector in the same place of another
passage: the mean over 16 others. Each character is predicted from the true ones before it.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Batches
from decoder import Autoencoder
from load_deepseek import load, load_run, read_json
from render import render_page, run_main

TEXT = ('My neighbour paints doors. He has painted one in every village along the river, '
        'and none of them opens on a house. I asked him!?')

class Given(nn.Module):
    """An encoder that returns a memory (B, M, D) which it was given."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, batch, embed):
        return self.memory

@torch.no_grad()
def effect(folder, data, text, others=16):
    """-> nats (M, T): row j is how much worse the characters of the text are predicted without its vector j."""
    is_run = 'run' in read_json(Path(folder, 'config.json'))
    model, tokenizer, _ = load_run(folder) if is_run else load(folder, 'vision', 0)        # results/reader is no run
    model.eval()
    image_size = getattr(model.encoder, 'image_size', None)
    batch = Batches(data, 'val', 1 + others, tokenizer, image_size)[0]
    batch['context'][0] = torch.tensor(tokenizer.encode_ordinary(text))
    if image_size:
        batch['image'][0] = torch.from_numpy(np.array(render_page(text, image_size)[0])).permute(2, 0, 1)
    memory = model.encoder(batch, model.decoder.embed_tokens)                          # (1 + others, M, D)
    own, M = memory[:1], memory.shape[1]

    def losses(memory):
        context = batch['context'][:1].expand(len(memory), -1)
        return Autoencoder(Given(memory), model.decoder, 'reconstruction', model.prompt)({'context': context})[0]

    result = []
    for j in range(M):
        changed = own.repeat(others, 1, 1)
        changed[:, j] = memory[1:, j]
        result.append(losses(changed).mean(dim=0))
    return torch.stack(result) - losses(own)

def main():
    parser = argparse.ArgumentParser(description='Draw what each memory vector holds.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a reconstruction run, or results/reader')
    parser.add_argument('--data', required=True, help='corpus that data.py made, of the context length of the runs')
    parser.add_argument('--text', default=TEXT, help='the passage: 128 bytes')
    parser.add_argument('--out', default='vectors.png')
    args = parser.parse_args()
    import matplotlib.pyplot as plt
    maps = [(folder, effect(folder, args.data, args.text)) for folder in args.runs]
    heights = [0.8 + 0.11 * len(nats) for _, nats in maps]
    figure, axes = plt.subplots(len(maps), 1, figsize=(14, 1 + sum(heights)), height_ratios=heights, squeeze=False,
                                layout='constrained')
    for ax, (folder, nats) in zip(axes[:, 0], maps):
        shown = ax.imshow(nats.clamp(0, 6), aspect='auto', cmap='magma_r', interpolation='nearest')
        ax.set(title=f'{Path(folder).name}: {len(nats)} vectors', ylabel='vector replaced')
        ax.set_yticks(range(0, len(nats), 5))
        ax.set_xticks(range(len(args.text)), args.text, fontsize=6, family='monospace')
        ax.tick_params(axis='x', length=0)
    figure.colorbar(shown, ax=axes, label="rise of the character's loss (nats; 6 and more are alike)", shrink=0.8)
    figure.savefig(args.out, dpi=150)

if __name__ == '__main__':
    run_main(main)
