"""
Queries as the compressor: K vectors look at the context and take from it what they need.

    python examples/perceiver.py train --model results/reader --queries 16 --data DIR
    python examples/perceiver.py eval out/perceiver

    embeddings of the context (B, T, D)     each has a learned place, and so has each query
    queries (B, K, D)                       look at them twice: cross-attention and an MLP
        -> memory (B, K, D), then a separator

A mean belongs to its own tokens, and a convolution to its neighbourhood. A query can look
anywhere, and what is easy to guess it can leave out. There are K vectors however long the context
is, and no attention among its T tokens. This is the cross-attention of Perceiver (arXiv
2103.03206) and of the Q-Former (arXiv 2301.12597). What is different here:
  * queries do not attend to each other;
  * places are added where queries and keys are compared, and are no part of what is read, as in
    DETR (arXiv 2005.12872);
  * a query is not a learned vector: it starts as the mean of its part of the context, and the
    change that its looks make to it starts at zero, so training starts from mean pooling. From
    learned vectors the decoder had not begun to use its memory after 400 steps
    (results/compare_tries.txt). What a query looks for depends on its learned place.

What follows the word train or eval goes to train.py or eval.py, which have the settings as flags.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval                                                             # noqa: E402
import train                                                            # noqa: E402
from encoders import ENCODERS, append, learned                          # noqa: E402
from load_deepseek import run_main                                      # noqa: E402

def waves(places, d, n_head):
    """Places in a text (n,) to sines and cosines of d / 2 wavelengths, from 4 to 256 tokens. Each
    head gets all of them, so that each can tell places apart: (n, n_head * d)."""
    wavelength = 4 * 64 ** torch.linspace(0, 1, d // 2)
    angle = 2 * torch.pi * places[:, None] / wavelength                     # (n, d / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).repeat(1, n_head)

class Look(nn.Module):
    """q + attention(q + its place, x + its place, x), then q + mlp(q), with norms in front."""

    def __init__(self, D, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm_q = nn.LayerNorm(D)
        self.norm_k = nn.LayerNorm(D)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.norm_mlp = nn.LayerNorm(D)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D, bias=False)
        # With q_proj = k_proj a query finds what resembles itself: the tokens around its place.
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.k_proj.weight)
        nn.init.eye_(self.v_proj.weight)
        nn.init.constant_(self.norm_q.weight, 1.5)                          # at 1 it sees too far
        # At first a look changes nothing.
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.down.weight)

    def heads(self, x):
        """(B, n, D) -> (B, H, n, d)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(self, q, q_place, x, x_place):
        query = self.heads(self.q_proj(self.norm_q(q + q_place)))           # (B, H, K, d)
        key = self.heads(self.k_proj(self.norm_k(x + x_place)))             # (B, H, T, d)
        value = self.heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(query, key, value)               # (B, H, K, d)
        q = q + self.o_proj(y.transpose(1, 2).flatten(2))                   # (B, K, D)
        return q + self.down(F.gelu(self.up(self.norm_mlp(q))))

class Perceiver(nn.Module):
    """memory = queries that have looked at the context, then a separator.

    queries: number of vectors, K
    looks: how often each query looks at the context
    look_heads: attention heads of a look"""

    def __init__(self, config, context_length, *, queries: int = 16, looks: int = 2,
                 look_heads: int = 8):
        super().__init__()
        D, T, K = config.hidden_size, context_length, queries
        if not 1 <= K <= T:
            raise ValueError(f'queries {K} is not between 1 and {T}')
        if D % (2 * look_heads):
            raise ValueError(f'look_heads {look_heads}: no even share of a width of {D}')
        self.queries = queries
        # Embeddings do not say where they stand. A query's place is the middle of its part. All
        # places are learned; at first they weigh more than what stands there.
        x_place = torch.arange(T).float()
        q_place = (torch.arange(K) + 0.5) * T / K - 0.5
        scale = 4 * D ** -0.5
        self.x_place = nn.Parameter(waves(x_place, D // look_heads, look_heads) * scale)    # (T, D)
        self.q_place = nn.Parameter(waves(q_place, D // look_heads, look_heads) * scale)    # (K, D)
        self.looks = nn.ModuleList(Look(D, look_heads) for _ in range(looks))
        self.separator = learned(D)

    def forward(self, batch, embed):
        x = embed(batch['context'])                                         # (B, T, D)
        means = F.adaptive_avg_pool1d(x.transpose(1, 2), self.queries)      # (B, D, K)
        q = means.transpose(1, 2)                                           # (B, K, D)
        for look in self.looks:
            q = look(q, self.q_place, x, self.x_place)
        return append(q, self.separator)                                    # (B, K + 1, D)

ENCODERS['perceiver'] = Perceiver

if __name__ == '__main__':
    command, *rest = sys.argv[1:] or ['']
    if command == 'train':
        run_main(lambda: train.main(['--regime', 'perceiver', *rest]))
    elif command == 'eval':
        run_main(lambda: eval.main(rest))
    else:
        sys.exit('usage: python examples/perceiver.py train|eval ...')
