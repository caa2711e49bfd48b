"""
A language model as the compressor: the decoder's own first layers read the context and sum it up.

    python examples/llm_encoder.py train --model results/reader --queries 16 --data DIR
    python examples/llm_encoder.py eval out/llm_encoder

    [ context (B, T, D)   queries (B, K, D) ]       one sequence, causal attention
        -> a copy of the decoder's first layers, which trains on its own
        -> queries + outputs at the queries         memory (B, K, D), then a separator

The queries come last, so each of them sees the whole context. And the layers know the language
when training starts, so they can tell what is easy to guess from what has to be kept.

This is the idea of ICAE (arXiv 2307.06945), whose encoder is the decoder with LoRA, and of C3
(arXiv 2511.15244), whose encoder is another, smaller language model. What is simplified here:
  * only the first layers, trained in full, in one stage, and on 16,000 segments;
  * a query is not a learned vector alone: the mean of its part of the context is added to it, and
    the outputs start at zero, so that training starts from mean pooling. With learned vectors
    alone the decoder had not begun to use its memory after 400 steps
    (results/compare_tries.txt);
  * a query's position is the end of its part, so that it first looks there (arXiv 2409.14364).

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
from decoder import Block, rotary                                       # noqa: E402
from encoders import ENCODERS, append, learned                          # noqa: E402
from load_deepseek import run_main                                      # noqa: E402

class LLMEncoder(nn.Module):
    """memory = queries + what the decoder's first layers make of them after the context, and a
    separator.

    queries: number of vectors, K
    encoder_layers: how many of the decoder's layers are copied"""

    def __init__(self, config, context_length, *, queries: int = 16, encoder_layers: int = 2):
        super().__init__()
        if not 1 <= queries <= context_length:
            raise ValueError(f'queries {queries} is not between 1 and {context_length}')
        if not 1 <= encoder_layers <= config.num_hidden_layers:
            raise ValueError(f'encoder_layers {encoder_layers} is not between 1 and '
                             f'{config.num_hidden_layers}')
        self.config = config
        self.queries = queries
        D = config.hidden_size
        self.query = nn.Parameter(torch.zeros(queries, D))
        self.separator = learned(D)
        self.layers = nn.ModuleList(Block(config, i) for i in range(encoder_layers))
        # Vectors grow from layer to layer, to a hundred times the length of an embedding. So they
        # are normalised before they go among embeddings again, at first to zero.
        self.norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        nn.init.zeros_(self.norm.weight)

    def start_from(self, decoder):
        """Copy the layers: called once, when a run starts from a model without this encoder."""
        for own, original in zip(self.layers, decoder.layers):
            own.load_state_dict(original.state_dict())

    def forward(self, batch, embed):
        context = embed(batch['context'])                                   # (B, T, D)
        T, K = context.shape[1], self.queries
        means = F.adaptive_avg_pool1d(context.transpose(1, 2), K)           # (B, D, K)
        queries = means.transpose(1, 2) + self.query                        # (B, K, D)
        x = torch.cat([context, queries], dim=1)                            # (B, T + K, D)

        # the rotary angles of positions 0 to T - 1, then of the last position of each of K parts
        last = (torch.arange(K, device=x.device) + 1) * T // K - 1          # (K,)
        cos, sin = rotary(context, self.config)                             # (T, d / 2)
        cos = torch.cat([cos, cos[last]])                                   # (T + K, d / 2)
        sin = torch.cat([sin, sin[last]])

        self.loss = 0.0                     # of balancing the experts' load: train.py adds it
        for layer in self.layers:
            x, balance_loss = layer(x, cos, sin, cache=None)
            self.loss = self.loss + balance_loss
        memory = queries + self.norm(x[:, T:])                              # (B, K, D)
        return append(memory, self.separator)                               # (B, K + 1, D)

ENCODERS['llm_encoder'] = LLMEncoder

if __name__ == '__main__':
    command, *rest = sys.argv[1:] or ['']
    if command == 'train':
        run_main(lambda: train.main(['--regime', 'llm_encoder', *rest]))
    elif command == 'eval':
        run_main(lambda: eval.main(rest))
    else:
        sys.exit('usage: python examples/llm_encoder.py train|eval ...')
