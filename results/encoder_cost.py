"""
What the encoders cost: parameters, and the time to encode a segment of 128 bytes on one CPU thread.

    OMP_NUM_THREADS=1 python results/encoder_cost.py heldout

In each of 50 rounds every encoder is timed in turn, so that other work on the machine slows all of
them alike. The table has medians over the rounds: of milliseconds, and of the ratio to mean pooling
in the same round. A page is drawn before it is encoded; drawing is a row of its own.
"""
import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'examples')]
import llm_encoder                                            # noqa: E402, F401 (it registers)
import perceiver                                              # noqa: E402, F401
from data import Batches                                      # noqa: E402
from load_deepseek import load                                # noqa: E402

ROWS = [
    ('meanpool', {'compression_window_size': 8}),
    ('conv1d_residual', {'compression_target': 32}),
    ('conv1d_residual', {'compression_target': 16}),
    ('conv1d_residual', {'compression_target': 8}),
    ('perceiver', {'queries': 32}),
    ('perceiver', {'queries': 16}),
    ('perceiver', {'queries': 8}),
    ('llm_encoder', {'queries': 32}),
    ('llm_encoder', {'queries': 16}),
    ('llm_encoder', {'queries': 8}),
    ('vision', {'vision_mode': '256'}),
]
CALLS = 5                      # in a round, of which the fastest counts


def milliseconds(call):
    times = []
    for _ in range(CALLS):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return min(times)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description='Parameters and milliseconds of the encoders.')
    parser.add_argument('data', help='a corpus of 128 + 128 bytes a segment')
    parser.add_argument('--rounds', type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)

    calls, parameters = {}, {}
    for regime, settings in ROWS:
        name = f'{regime} {" ".join(str(value) for value in settings.values())}'
        model, tokenizer, _ = load(ROOT / 'results' / 'reader', regime, 128, **settings)
        image_size = getattr(model.encoder, 'image_size', None)
        batches = Batches(args.data, 'val', 1, tokenizer, image_size)
        encoder, embed, batch = model.encoder.eval(), model.decoder.embed_tokens, batches[0]
        calls[name] = lambda encoder=encoder, embed=embed, batch=batch: encoder(batch, embed)
        parameters[name] = sum(p.numel() for p in encoder.parameters())
    # To compare with: the page of the last row, and what the decoder itself does with the context.
    calls['drawing a page'] = lambda: batches[0]
    parameters['drawing a page'] = 0
    calls['decoder, 128 bytes'] = lambda: model.decoder(embed(batch['context']))
    parameters['decoder, 128 bytes'] = sum(p.numel() for p in model.decoder.parameters())

    times = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    means = times['meanpool 8']
    print('| encoder | parameters | ms | times mean pooling |\n|---|---|---|---|')
    for name in calls:
        ratio = median(own / mean for own, mean in zip(times[name], means))
        print(f'| {name} | {parameters[name]:,} | {median(times[name]):.2f} | {ratio:.1f} |')


if __name__ == '__main__':
    main()
