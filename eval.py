"""
Runs to evidence: a table, a picture, and text you can read.

    python eval.py out/lab/* --generate 20 --plot table.png              a row and 20 passages for each run
    python eval.py out/vision --data my_texts --font_size 12             another corpus; pages in another type size
    python eval.py --model deepseek-ai/DeepSeek-OCR --image page.png     read a page

PPL is exp of the mean cross-entropy over all target tokens of the validation segments, each predicted from the true
ones before it; accuracy is the share of tokens that argmax predicts correctly. Passages are generated greedily from the
memory alone; CER, for reconstruction and from 16 passages on, is their edit distance to the originals, divided by the
length of the originals, in characters. Positions are those before the target, ratio is the context tokens for each of
them. Not drawn is the share of the text that is not on the page. KV saved: bytes of bf16 cache that a segment saves.
ms: milliseconds to encode a segment, on the CPU with one thread; its page is drawn before.
"""
import argparse
import struct
import sys
from contextlib import suppress
from itertools import islice, takewhile
from math import exp
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.benchmark import Timer
from tqdm import tqdm

from data import Batches, check_numbers, corpus_of, open_corpus
from decoder import OBJECTIVES
from load_deepseek import VISION, fetch, load, load_run, open_tensors, read_json
from render import check, explain, run_main

def pick_device(name, index=0):
    """'auto' is CUDA where there is one, else the CPU. index: which card. Raises ValueError."""
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    with explain(f'--device {name}: not on this machine'):
        return torch.empty(0, device=f'{name}:{index}' if name == 'cuda' else name).device

def autocast(device):
    """bf16 for matrix products on CUDA. Elsewhere everything keeps the dtype of the weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda')

def to_device(batch, device):
    """A batch on the device."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}

@torch.no_grad()
def evaluate(model, batches, device, workers=0, rank=0, world=1, progress=False, mask=None):
    """Means over a Batches, split across `world` processes: {'loss': nats per target token, 'ppl', 'accuracy'}, with
    pages also 'lost', the share of the text that is not on them. mask(batch) -> bool (B, T): the tokens that count."""
    sums = torch.zeros(5, dtype=torch.float64)
    model.eval()
    loader = batches.loader(range(rank, len(batches), world), workers)
    for batch in tqdm(loader, disable=not progress, leave=False):
        with autocast(device):
            losses, hits, _ = model(to_device(batch, device))
        where = mask(batch).to(device) if mask else torch.ones_like(hits)
        lost = batch['lost'].sum() if 'lost' in batch else 0                    # below, .cpu(): MPS has no float64
        sums += torch.tensor([losses[where].cpu().double().sum(), hits[where].sum(), lost, where.sum(), len(hits)])
    if world > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    loss, accuracy, lost = (sums[:3] / sums[[3, 3, 4]]).tolist()
    pages = {'lost': lost} if batches.image_size else {}
    return {'loss': loss, 'ppl': exp(min(loss, 700)), 'accuracy': accuracy, **pages}

def text_of(ids, tokenizer, eos=()):
    """Token ids as text, up to the first id in `eos`; ids outside the vocabulary are dropped."""
    ids = takewhile(lambda i: i not in eos, ids)
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])

def passages(model, batch, tokenizer, device, length=None):
    """For each row of a batch, the target (its first `length` tokens) and what the model generates: [(text, text)]."""
    batch = to_device(batch, device)
    target = batch[OBJECTIVES[model.objective]][:, :length]
    model.eval()
    with autocast(device):
        generated = model.generate(batch, target.shape[1])
    eos = np.atleast_1d(model.decoder.config.eos_token_id)
    return [(text_of(a, tokenizer), text_of(b, tokenizer, eos)) for a, b in zip(target.tolist(), generated.tolist())]

def edit_distance(a, b):
    """The fewest characters to insert, delete or replace that turn a into b (Levenshtein)."""
    letters, column = np.array([*b], dtype=object), np.arange(len(b) + 1)
    row = column
    for i, letter in enumerate(a, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])    # delete or replace
        row = np.minimum.accumulate(row - column) + column                                      # or insert
    return int(row[-1])

def show(original, generated, title, width=110):
    """Print a text and what was generated for it, line under line. ⏎ is a line end."""
    a, b = (text.replace('\n', '⏎') for text in (original, generated))
    print(f'\n--- original, and under it its {title}')
    for i in range(0, max(len(a), len(b)), width):
        print(a[i:i + width], b[i:i + width], sep='\n', end='\n\n')

def plot(rows, path):
    """Draw PPL against ratio, a panel for each objective and corpus, a dot for each run, lines through the means over
    seeds. Where runs of one regime at the same ratio differ in another setting, each value of it has its own line, with
    a label. Dashed lines are no context and the whole context."""
    import matplotlib.pyplot as plt
    place = lambda row: (row['objective'], row['data'], row['regime'], row['ratio'])
    fields = lambda row: {'setting': row['setting'], **row['args']}
    differ = {(a['regime'], key) for a in rows for b in rows if place(a) == place(b)
              for key, x in fields(a).items() if x != fields(b).get(key)}
    label = lambda row: ', '.join([{'text': 'truncation'}.get(row['regime'], row['regime']), *(
        f'{key} {x}' for key, x in fields(row).items() if (row['regime'], key) in differ)])
    panels, labels = list(dict.fromkeys(place(row)[:2] for row in rows)), list(dict.fromkeys(map(label, rows)))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout='constrained')
    for ax, panel in zip(axes[0], panels):
        points = [row for row in rows if place(row)[:2] == panel]
        for name in dict.fromkeys(map(label, points)):
            i = labels.index(name)                                # of its colour, the same in all panels
            x, y = np.array([(row['ratio'], row['PPL']) for row in points if label(row) == name]).T
            means = [(ratio, y[x == ratio].mean()) for ratio in np.unique(x)]
            ax.plot(x, y, 'o', color=f'C{i}', label=name)
            ax.plot(*zip(*means), color=f'C{i}')
            for point in means:
                ax.annotate(f'{point[1]:.3g}', point, (4, -10 if i % 2 else 4), textcoords='offset points', fontsize=8)
        for name, column, value in (('no context', 'positions', 1), ('whole context', 'KV saved', 0)):
            if ends := [row['PPL'] for row in points if row['regime'] == 'text' and row[column] == value]:
                ax.axhline(min(ends), color='grey', ls='--', lw=1, label=f'{name} {min(ends):.3g}')
        ax.set(title=' on '.join(panel), xlabel='context tokens / positions before the target', ylabel='perplexity')
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.legend(frameon=False, fontsize=8)
    with explain(f'{path}: cannot be written'):
        figure.savefig(path, dpi=150)

def open_image(path):
    """Any image file as RGB: upright, transparency on white, 16 bits scaled to 8. Raises ValueError."""
    # Opened by its name, Pillow turns an uncompressed grey TIFF into noise.
    with explain(f'{path}: not an image that can be read'), open(path, 'rb') as file:
        image = Image.open(file)
        if getattr(image, 'n_frames', 1) > 1:
            print(f'{path}: read only the first of {image.n_frames} images', file=sys.stderr)
        with suppress(ValueError, SyntaxError, struct.error):     # metadata behind the pixels; no pixels is an OSError
            image.load()
        with suppress(Exception):              # damaged metadata does not make the pixels unreadable
            image = ImageOps.exif_transpose(image)
        check(image.mode not in ('I', 'F'), f'mode {image.mode} has no fixed range; convert it to 8 bits')
        if image.mode.startswith('I;16'):
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA')).convert('RGB')

def read_page(args, device):
    """Print what DeepSeek-OCR reads in an image, which is preprocessed as in the original. Raises ValueError."""
    image, dtype = open_image(args.image), torch.bfloat16 if device.type == 'cuda' else torch.float32
    can_read = any(name.startswith(VISION) for name in open_tensors(fetch(args.model)))
    check(can_read, f'{args.model}: has no vision encoder, so it cannot read')
    own = read_json(fetch(args.model) / 'config.json').get('run', {}).get('settings', {'vision_prompt': '\nFree OCR.'})
    prompt = args.prompt and ('\n' + args.prompt.replace('<image>', '').strip()).rstrip()   # the page replaces the tag
    model, tokenizer, _ = load(args.model, 'vision', 0, device=device, dtype=dtype,
                               vision_mode=args.vision_mode or own.get('vision_mode'),
                               vision_prompt=own['vision_prompt'] if prompt is None else prompt)
    size = (model.encoder.image_size,) * 2
    image = image.resize(size) if size[0] <= 640 else ImageOps.pad(image, size, color=(127, 127, 127))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]         # (1, 3, S, S) uint8
    batch = {'context': torch.empty(1, 0, dtype=torch.long), 'image': pixels}
    ids = model.eval().generate(to_device(batch, device), args.max_new_tokens)[0].tolist()
    eos = np.atleast_1d(model.decoder.config.eos_token_id)
    print(text_of(ids, tokenizer, eos))
    if ids[-1] not in eos:
        print(f'stopped at --max_new_tokens {len(ids)}, before the end of the text', file=sys.stderr)

def row_of(folder, args, device):
    """Evaluate a run -> its row of the table, a dict, and [(original, generated)]."""
    model, tokenizer, config = load_run(folder, device)
    run, image_size, c = config['run'], getattr(model.encoder, 'image_size', None), model.decoder.config
    flags, T, objective = run.get('args', {}), run['context'], run['objective']
    data = corpus_of(args.data or run['data'], tokenizer, T, flags.get('continuation', T))
    open_corpus(data, tokenizer, T)
    page = {k: v for k in ('font', 'font_size', 'line_spacing') if image_size and (v := getattr(args, k))}
    batches = Batches(data, 'val', args.batch_size, tokenizer, image_size, limit=args.segments, **page)
    result = evaluate(model, batches, device, args.workers, progress=True)
    parts = ({name: x[:args.generate] for name, x in batches[n].items()} for n in range(len(batches)))
    texts = list(islice((pair for part in parts for pair in passages(model, part, tokenizer, device)), args.generate))
    if len(texts) < args.generate:
        print(f'{folder}: only {len(texts)} passages, as there are no more segments', file=sys.stderr)
    cer = sum(edit_distance(*pair) for pair in texts) / max(sum(len(original) for original, _ in texts), 1)
    one = to_device({name: x[:1] for name, x in batches[0].items()}, device)
    with torch.no_grad(), autocast(device):
        positions = model.prefix(one).shape[1]
        ms = 1e3 * Timer('model.prefix(one)', globals={'model': model, 'one': one}).blocked_autorange().median
    kv_bytes = 4 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads   # a position
    labels = {**run['settings'], 'hybrid': run['hybrid'] or '', **page}
    return {
        'run': folder, 'regime': run['regime'], 'objective': objective, 'data': Path(data).name,
        'setting': ', '.join(f'{name} {value}' for name, value in labels.items() if value not in ('', None)),
        'positions': positions, 'ratio': round(T / positions, 2), 'PPL': round(result['ppl'], 3),
        'accuracy': round(result['accuracy'], 3),
        'CER': round(cer, 3) if len(texts) >= 16 and objective == 'reconstruction' else None,
        'not drawn': round(result['lost'], 3) if image_size else None,
        'KV saved': kv_bytes * (T + 1 - positions), 'ms': round(ms, 2),
        'args': {**flags, 'model': Path(flags.get('model', '')).name, 'data': data, **dict.fromkeys(  # not compared:
            'regime seed workers device compile log_steps eval_steps eval_segments save_steps'.split())}}, texts

def main(argv=None):
    """The command line: a row for each run, then picture and passages; or a page read."""
    parser = argparse.ArgumentParser(description='Evaluate runs: a table, a picture, and passages.', allow_abbrev=False)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='folder of a run')
    add('--data', help='another corpus, or a source for data.py (default: what the run was trained on)')
    add('--segments', type=int, help='validation segments (default: all)')
    add('--generate', type=int, default=1, metavar='N', help='passages to generate and show for each run (default 1)')
    add('--plot', metavar='FILE', help='picture to draw')
    add('--font', help='font file of the pages (default DejaVuSans.ttf)')
    add('--font_size', type=int, help='in pixels (default: the largest of 4 to 30 at which the text fits)')
    add('--line_spacing', type=float, help='in type sizes (default 1.2)')
    add('--batch_size', type=int, default=16, help='segments at once (default 16)')
    add('--workers', type=int, default=0, help='processes that draw pages (default 0)')
    add('--device', default='auto', help='cpu, cuda, mps (default: cuda if there is one)')
    add('--image', metavar='FILE', help='read this page; only the flags below and --device apply')
    add('--model', default='deepseek-ai/DeepSeek-OCR', help='what reads it (default deepseek-ai/DeepSeek-OCR)')
    add('--vision_mode', help="tiny, small, base, large or pixels (default: the model's page size)")
    add('--prompt', help='what to do with the page (default "Free OCR."; of a run, its own prompt)')
    add('--max_new_tokens', type=int, default=8192, help='tokens to read at most (default 8192)')
    args = parser.parse_args(argv)
    check_numbers(vars(args), 'generate workers')
    device = pick_device(args.device)
    if args.image:
        return read_page(args, device)
    check(args.runs, 'give a RUN or an --image')
    for folder in args.runs:
        read_json(fetch(folder) / 'config.json')              # reports a misspelt folder before evaluating any
    rows, texts = zip(*(row_of(folder, args, device) for folder in args.runs))
    columns = [name for name in rows[0] if name != 'args' and any(row[name] is not None for row in rows)]
    print('| ' + ' | '.join(columns) + ' |\n|' + '---|' * len(columns))
    for row in rows:
        print('| ' + ' | '.join('' if row[name] is None else str(row[name]) for name in columns) + ' |')
    for row, pairs in zip(rows, texts):
        for pair in pairs:
            show(*pair, f'{row["objective"]} by {row["run"]}')
    if args.plot:
        plot(rows, args.plot)

if __name__ == '__main__':
    run_main(main)
