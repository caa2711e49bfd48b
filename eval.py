"""
Turns runs into evidence: a table, and text that you can read.

    python eval.py out/meanpool out/vision --generate 5            a row and 5 passages for each run
    python eval.py out/vision --data my_texts --font_size 12       another corpus; another font size

PPL is exp of the mean cross-entropy over all target tokens of the validation segments, each
predicted from the true ones before it; its unit is that of the tokenizer, a byte or a token.
Accuracy is the share of tokens that argmax predicts correctly. Positions: the length of the
sequence before the target, BOS included. Ratio: context tokens / positions. Not drawn is the share
of the text that is missing from the pages. Passages are spread over the validation segments and
generated greedily from the memory alone.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Batches, open_corpus
from decoder import OBJECTIVES
from load_deepseek import add_flags, load_run, positive, run_main

def pick_device(name, index=0):
    """'auto' is CUDA if there is one, otherwise the CPU; index: which card. Raises ValueError."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda':
        name = f'cuda:{index}'
    try:
        return torch.empty(0, device=name).device
    except Exception as e:                  # each backend has its own
        raise ValueError(f'--device {name}: not on this machine') from e

def autocast(device):
    """bf16 for matrix products on CUDA. Elsewhere everything keeps the dtype of the weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda')

def to_device(batch, device):
    """A batch on the device."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}

@torch.no_grad()
def evaluate(model, batches, device, workers=0, rank=0, world=1):
    """Means over a Batches, shared among `world` processes: a dict of 'loss' in nats per target
    token, 'ppl', 'accuracy' and, with pages, 'lost', the share of the text that is not on them."""
    loss = hits = tokens = lost = segments = 0.0
    model.eval()
    order = range(rank, len(batches), world)
    for batch in tqdm(batches.loader(order, workers), disable=rank > 0, leave=False):
        with autocast(device):
            token_losses, hit, _ = model(to_device(batch, device))
        loss += token_losses.sum().item()
        hits += hit.sum().item()
        tokens += hit.numel()
        segments += len(hit)
        if 'lost' in batch:
            lost += batch['lost'].sum().item()
    sums = [loss, hits, tokens, lost, segments]
    if world > 1:
        sums = torch.tensor(sums, device=device)
        torch.distributed.all_reduce(sums)
        sums = sums.tolist()
    loss, hits, tokens, lost, segments = sums
    means = {'loss': loss / tokens, 'accuracy': hits / tokens}
    means['ppl'] = math.exp(min(means['loss'], 700))
    if batches.image_size:
        means['lost'] = lost / segments
    return means

def text_of(ids, tokenizer, eos=()):
    """Token ids as text, up to the first id in `eos`. Ids without a token are dropped."""
    kept = []
    for i in ids:
        if i in eos:
            break
        kept.append(i)
    return tokenizer.decode(kept, skip_special_tokens=False)

def passages(model, batch, tokenizer, device, length=None):
    """For each row of a batch, the target (its first `length` tokens) and what the model generates:
    [(text, text)]."""
    batch = to_device(batch, device)
    target = batch[OBJECTIVES[model.objective]][:, :length]
    model.eval()
    with autocast(device):
        generated = model.generate(batch, target.shape[1])
    eos = np.atleast_1d(model.decoder.config.eos_token_id)
    pairs = []
    for original, ids in zip(target.tolist(), generated.tolist()):
        pairs.append((text_of(original, tokenizer), text_of(ids, tokenizer, eos)))
    return pairs

def show(original, generated, title, width=100):
    """Print a text and what was generated for it, line under line. ⏎ is a line end."""
    original = original.replace('\n', '⏎')
    generated = generated.replace('\n', '⏎')
    print(f'\n--- original (top), {title} (bottom)')
    for i in range(0, max(len(original), len(generated)), width):
        print(original[i:i + width])
        print(generated[i:i + width])
        print()

def row_of(folder, args, device):
    """Evaluate a run -> its row of the table, a dict, and [(original, generated)]."""
    model, tokenizer, config = load_run(folder, device)
    run = config['run']
    T = run['context']
    image_size = getattr(model.encoder, 'image_size', None)
    continuation = run.get('args', {}).get('continuation', T)       # other code saves no args
    source = args.data or run.get('data')
    if source is None:
        raise ValueError(f'{folder}: names no corpus; --data does')
    data, _ = open_corpus(source, tokenizer, T, continuation)
    page = {}
    if image_size:
        for name in ('font', 'font_size', 'line_spacing'):
            if getattr(args, name) is not None:
                page[name] = getattr(args, name)

    def batches(limit):
        return Batches(data, 'val', args.batch_size, tokenizer, image_size, limit=limit, **page)

    val = batches(args.segments)
    result = evaluate(model, val, device, args.workers)
    texts = []
    chosen = batches(args.generate)
    for i in range(len(chosen)):
        texts += passages(model, chosen[i], tokenizer, device)
    with torch.no_grad(), autocast(device):
        positions = model.sequence(to_device(val[0], device)).shape[1]
    shown = {**run['settings'], **page}
    if run['hybrid'] > 0:
        shown['hybrid'] = run['hybrid']
    labels = [f'{name} {value}' for name, value in shown.items() if value not in (None, '')]
    row = {
        'run': folder,
        'regime': run['regime'],
        'objective': run['objective'],
        'setting': ', '.join(labels),
        'positions': positions,
        'ratio': f'{T / positions:.2f}',
        'PPL': f'{result["ppl"]:.3f}',
        'accuracy': f'{result["accuracy"]:.3f}',
        'segments': val.n,
    }
    if image_size:
        row['not drawn'] = f'{result["lost"]:.3f}'
    return row, texts

@dataclass(kw_only=True)
class Flags:
    """data: another corpus, or a source for data.py (default: that of the run)
    segments: validation segments (default: all)
    generate: passages for each run
    font: font file of the pages (default: DejaVuSans.ttf)
    font_size: in pixels (default: the largest of 4 to 30 that fits)
    line_spacing: in font sizes (default: 1.2)
    batch_size: segments at once
    workers: processes that draw pages
    device: cpu, cuda, mps; auto is cuda if there is one"""
    data: str = None
    segments: positive = None
    generate: int = 1
    font: str = None
    font_size: positive = None
    line_spacing: float = None
    batch_size: positive = 16
    workers: int = 0
    device: str = 'auto'

def main(argv=None):
    """The command line: a row for each run, then passages."""
    parser = argparse.ArgumentParser(description='Evaluate runs: a table and passages.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    add_flags(parser, Flags)
    args = parser.parse_args(argv)
    for folder in args.runs:                # before any is evaluated
        if not Path(folder, 'model.safetensors').exists():
            raise ValueError(f'{folder}: no run with a save there')
    device = pick_device(args.device)
    rows, texts = [], []
    for folder in args.runs:
        row, pairs = row_of(folder, args, device)
        rows.append(row)
        texts += [(*pair, f'{row["objective"]} by {folder}') for pair in pairs]

    columns = list(max(rows, key=len))      # only rows with pages have the column 'not drawn'
    print('|', ' | '.join(columns), '|')
    print('|' + '---|' * len(columns))
    for row in rows:
        cells = [str(row.get(name, '')).replace('|', '\\|') for name in columns]
        print('|', ' | '.join(cells), '|')
    for text in texts:
        show(*text)

if __name__ == '__main__':
    run_main(main)
