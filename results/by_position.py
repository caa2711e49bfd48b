"""
Where does a memory help? The loss of a run by position in its target, on the validation segments.

    python results/by_position.py out/compare/seed0/lm_conv_16 --log by_position.jsonl

Adds a line to the log for each run: its loss in nats a token in the first 16 tokens of the target,
in the next 48, in the rest and over all, then the mean loss at each position. A small mean can hide
a large effect on the first words.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'examples')]
import llm_encoder                                            # noqa: E402, F401 (it registers)
import perceiver                                              # noqa: E402, F401
from data import Batches                                      # noqa: E402
from eval import autocast, pick_device, to_device             # noqa: E402
from load_deepseek import load_run, run_main                  # noqa: E402

PARTS = {
    'first_16': slice(0, 16),
    'next_48': slice(16, 64),
    'rest': slice(64, None),
    'all': slice(None),
}


@torch.no_grad()
def loss_by_position(folder, device, batch_size):
    """The run's mean loss at each position of the target (T,), and the number of segments."""
    model, tokenizer, config = load_run(folder, device)
    model.eval()
    image_size = getattr(model.encoder, 'image_size', None)
    batches = Batches(config['run']['data'], 'val', batch_size, tokenizer, image_size)
    total, segments = 0.0, 0
    for n in range(len(batches)):
        with autocast(device):
            losses = model(to_device(batches[n], device))[0]            # (B, T)
        total = total + losses.sum(dim=0).double().cpu()
        segments += len(losses)
    return total / segments, segments


def main(argv=None):
    parser = argparse.ArgumentParser(description='The loss of runs by position in the target.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    parser.add_argument('--log', required=True, help='file to which a line is added for each run')
    parser.add_argument('--batch_size', type=int, default=16, help='segments at once')
    args = parser.parse_args(argv)
    device = pick_device('auto')
    for folder in args.runs:
        losses, segments = loss_by_position(folder, device, args.batch_size)
        run = Path(folder).resolve()
        line = {'run': run.name, 'seed_folder': run.parent.name, 'segments': segments}
        for name, part in PARTS.items():
            line[name] = round(losses[part].mean().item(), 5)
        print(json.dumps(line), flush=True)
        line['positions'] = [round(loss, 4) for loss in losses.tolist()]
        with open(args.log, 'a') as file:
            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    run_main(main)
