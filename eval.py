"""
Runs to evidence: a table, a picture, and text you can read.

    python eval.py out/meanpool out/conv1d_residual                      a row a run, and a passage that each makes anew
    python eval.py out/lab/* --generate 20 --csv table.csv --plot table.png
    python eval.py out/vision --data DIR --font_size 12                  another corpus; the page in another type
    python eval.py --model deepseek-ai/DeepSeek-OCR --image page.png     read a page

PPL is exp of the mean cross-entropy over all target tokens of the validation segments, accuracy the share of them that
is the likeliest token, exact the share of segments with all of them; every token predicted from the true ones before
it. Passages are not: they are generated greedily from the memory alone, and CER is their characters' edit distance to
the original over its length. Positions are all before the target; ratio is context tokens over those. Delta is PPL less
that of the run (the best of the runs) with the whole context of the same data. KV saved is in bytes a segment, at bf16;
ms the time to encode one (on one thread of a CPU), its page drawn before.

Facts (factual recall) is the mean loss on the continuation's fact tokens, rest that on its other tokens. A fact is a
word that has a digit, begins with a capital, or is rare (in at most one in a hundred of the contexts); its tokens
count where it first occurs in the continuation, if it occurs in the context but not in the last `--kept` tokens of it:
truncation to those has lost the answer, the whole context has it, and a memory that keeps facts comes near the latter.
"""
import argparse
import csv
import difflib
import math
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Batches, number, open_corpus, outlive_sigterm, positive
from decoder import OBJECTIVES
from load_deepseek import VISION, fetch, load, load_run, open_tensors, optional, writing

# The authors' model card, 1000 context tokens: (objective, regime, positions) to PPL, lm started from reconstruction.
PUBLISHED = {
    ('reconstruction', 'vision', 278): 1.03, ('reconstruction', 'vision', 78): 1.14,
    ('reconstruction', 'meanpool', 252): 1.04, ('reconstruction', 'conv1d_residual', 252): 1.00,
    ('reconstruction', 'conv1d_residual', 65): 1.01, ('lm', 'vision', 278): 5.06, ('lm', 'text', 278): 5.02,
    ('lm', 'meanpool', 252): 5.02, ('lm', 'conv1d_residual', 252): 4.96}


def pick_device(name, index=0):
    """'auto' is CUDA where there is one, else the CPU; mps when asked for. index: which card. Raises SystemExit."""
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    try:
        return torch.empty(0, device=f'{name}:{index}' if name == 'cuda' else name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise SystemExit(f'--device {name}: not on this machine ({str(e).splitlines()[0]})')


def autocast(device):
    """bf16 for the matrix products on CUDA; elsewhere all is in the weights' own dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda')


def to_device(batch, device):
    """A batch's tensors on the device; from pinned memory the host does not wait for the copy."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


# Letters and digits in UTF-8; what begins with C2 or E2 is punctuation and symbols.
WORD = re.compile(rb'(?:[0-9A-Za-z]|[\xc3-\xe1\xe3-\xf4][\x80-\xbf]+)+')


def words(tokenizer, ids):
    """The words among tokens, in order: [(word as bytes, its first token, the token after its last)]."""
    pieces = [tokenizer.decode_single_token_bytes(i) for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])                # in bytes: a segment may begin amid a character
    return [(m[0], int(np.searchsorted(ends, m.start(), 'right')), int(np.searchsorted(ends, m.end())) + 1)
            for m in WORD.finditer(b''.join(pieces))]


def common_words(batches, tokenizer):
    """The words in more than one in a hundred of the contexts."""
    counts = Counter()
    for n in range(len(batches)):
        for ids in batches[n]['context'].tolist():
            counts.update({word for word, *_ in words(tokenizer, ids)})
    return {word for word, n in counts.items() if n > batches.n / 100}


def fact_tokens(batch, tokenizer, kept, common):
    """Which tokens of each continuation belong to a fact, as the top of this file defines it: bool (B, T)."""
    mask = torch.zeros(batch['continuation'].shape, dtype=torch.bool)
    for row, (context, continuation) in enumerate(zip(batch['context'].tolist(), batch['continuation'].tolist())):
        cut = max(len(context) - kept, 0)
        early, known = ({word for word, *_ in words(tokenizer, part)} for part in (context[:cut], context[cut:]))
        for word, first, end in words(tokenizer, continuation):
            if word in early - known and (re.search(rb'[0-9]|^[A-Z]', word) or word not in common):
                mask[row, first:end] = True
            known.add(word)
    return mask


@torch.no_grad()
def evaluate(model, batches, device, workers=0, rank=0, world=1, progress=False, facts=None):
    """Means over a Batches, shared among `world` processes: {'loss': nats a target token, 'ppl', 'accuracy', 'exact'};
    with facts(batch) -> bool (B, T), 'facts' and 'rest' are the losses where it is true and where not."""
    sums = torch.zeros(7, dtype=torch.float64)
    model.eval()
    share = range(rank, rank + world * -(-len(batches) // world), world)      # as many for each: shards work together
    sampler = [min(n, len(batches) - 1) for n in share]
    loader = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers, worker_init_fn=outlive_sigterm)
    for n, batch in zip(share, tqdm(loader, disable=not progress, leave=False)):
        with autocast(device):
            losses, hit, _ = model(to_device(batch, device))
        if n >= len(batches):
            break
        losses, mask = losses.cpu().double(), facts(batch) if facts else torch.zeros(hit.shape, dtype=torch.bool)
        sums += torch.tensor([losses.sum(), hit.sum(), hit.all(dim=1).sum(), losses[mask].sum(), hit.numel(), len(hit),
                              mask.sum()])
    if world > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    loss, hits, exact, fact_loss, tokens, segments, n_facts = sums.tolist()
    result = {'loss': loss / tokens, 'ppl': math.exp(min(loss / tokens, 700)), 'accuracy': hits / tokens,
              'exact': exact / segments}
    if facts:
        result['facts'] = fact_loss / n_facts if n_facts else math.nan
        result['rest'] = (loss - fact_loss) / (tokens - n_facts)
    return result


def text_of(ids, tokenizer):
    """Token ids as text; those that only the model knows are left out."""
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])


def passage(model, batch, tokenizer, device, length=None):
    """The targets of a batch, or their first `length` tokens, and what the model generates: pairs of texts."""
    batch = to_device(batch, device)
    target = batch[OBJECTIVES[model.objective]][:, :length]
    model.eval()
    with autocast(device):
        generated = model.generate(batch, target.shape[1])
    return [[text_of(ids, tokenizer) for ids in pair] for pair in zip(target.tolist(), generated.tolist())]


def edit_distance(a, b):
    """Fewest characters to insert, delete or replace that make b of a (Levenshtein)."""
    letters, column = np.array([*b], dtype=object), np.arange(len(b) + 1)
    row = column
    for i, letter in enumerate(a, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])    # delete or replace
        row = np.minimum.accumulate(row - column) + column                                      # or insert
    return int(row[-1])


def show(original, generated, objective='reconstruction', width=110):
    """Print a text over what was generated for it, aligned, and under it a ^ where they differ. ⏎ is a line end; ·
    stands where only the other text has a character."""
    original, generated = (text.replace('\n', '⏎') for text in (original, generated))
    top, bottom = '', ''
    for _, a, b, c, d in difflib.SequenceMatcher(None, original, generated, autojunk=False).get_opcodes():
        n = max(b - a, d - c)
        top, bottom = top + original[a:b].ljust(n, '·'), bottom + generated[c:d].ljust(n, '·')
    print(f'\n--- original, over its {objective}')
    for i in range(0, len(top), width):
        a, b = top[i:i + width], bottom[i:i + width]
        print(a, b, ''.join(' ' if x == y else '^' for x, y in zip(a, b)).rstrip(), sep='\n')


def plot(rows, path):
    """Draw PPL against ratio, a panel an objective, a line a regime through the means; published values are hollow."""
    plt = optional('matplotlib.pyplot')
    panels = [objective for objective in OBJECTIVES if any(row['objective'] == objective for row in rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout='constrained')
    legend = {}
    for ax, objective in zip(axes[0], panels):
        for color, regime in enumerate(dict.fromkeys(row['regime'] for row in rows)):
            points = [row for row in rows if (row['objective'], row['regime']) == (objective, regime)]
            ratios = sorted({row['ratio'] for row in points})
            means = [np.mean([row['PPL'] for row in points if row['ratio'] == ratio]) for ratio in ratios]
            name, style = ('truncation', '--') if regime == 'text' else (regime, '-')
            if len(ratios) > 2:                                               # two points are no curve
                ax.plot(ratios, means, style, color=f'C{color}')
            xy = [row['ratio'] for row in points], [row['PPL'] for row in points]
            legend[name], = ax.plot(*xy, 'o', color=f'C{color}', label=name)
            hollow = [(row['ratio'], row['published']) for row in points if row['published']]
            ax.plot(*zip(*hollow) if hollow else ([], []), 'o', mfc='none', color=f'C{color}', ms=9)
        ax.set(title='language modelling' if objective == 'lm' else objective, ylabel='perplexity',
               xlabel='compression: context tokens / positions before the target')
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
    figure.legend(handles=list(legend.values()), loc='outside lower center', ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=150)


def read_page(args, device):
    """Print what DeepSeek-OCR reads on an image, preprocessed as the original does. Raises SystemExit."""
    try:
        image = ImageOps.exif_transpose(Image.open(args.image)).convert('RGB')
    except (OSError, Image.DecompressionBombError) as e:
        raise SystemExit(f'{args.image}: no image that can be read ({e})')
    if not any(name.startswith(VISION) for name in open_tensors(fetch(args.model))):
        raise SystemExit(f'{args.model}: has no vision encoder, so it cannot read')
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    model, tokenizer, _ = load(args.model, 'vision', 0, device=device, dtype=dtype, vision_mode=args.vision_mode,
                               vision_prompt='\n' + args.prompt.strip())
    size = (model.encoder.image_size,) * 2
    image = image.resize(size) if size[0] <= 640 else ImageOps.pad(image, size, color=(127, 127, 127))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]         # (1, 3, S, S) uint8
    ids = model.eval().generate({'context': torch.empty(1, 0, dtype=torch.long, device=device),
                                 'image': pixels.to(device)}, args.max_new_tokens)[0].tolist()
    print(text_of([i for i in ids if i != model.decoder.config.eos_token_id], tokenizer))


def row_of(folder, args, device):
    """Evaluate a run -> its row of the table as a dict, and [(original, generated)]."""
    model, tokenizer, config = load_run(folder, device)
    run, image_size = config['run'], getattr(model.encoder, 'image_size', None)
    data = args.data or run['data']
    page = {k: v for k in ('font', 'font_size', 'line_spacing') if image_size and (v := getattr(args, k))}
    open_corpus(data, tokenizer, run['context'])
    batches = Batches(data, 'val', args.batch_size, tokenizer, image_size, limit=args.segments, **page)
    one = to_device({name: x[:1] for name, x in batches[0].items()}, device)
    kept, facts = run['context'] // 4 if args.kept is None else args.kept, None
    if run['objective'] == 'lm':
        common = common_words(Batches(data, 'val', 1, tokenizer, limit=1000), tokenizer)
        facts = lambda batch: fact_tokens(batch, tokenizer, kept, common)
    result = evaluate(model, batches, device, args.workers, progress=True, facts=facts)
    with torch.no_grad(), autocast(device):
        positions, c = model.prefix(one).shape[1], model.decoder.config
        timer = Timer('model.prefix(one)', globals={'model': model, 'one': one}).blocked_autorange()
    kv_bytes = 4 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads   # a position
    pairs = (pair for n in range(len(batches)) for pair in passage(model, batches[n], tokenizer, device))
    texts = list(islice(pairs, args.generate))
    errors, length = sum(edit_distance(*pair) for pair in texts), sum(len(original) for original, _ in texts)
    labels = {**run['settings'], 'hybrid': run['hybrid'] or '', **page}
    published = PUBLISHED.get((run['objective'], run['regime'], positions)) if run['context'] == 1000 else None
    return {
        'run': folder, 'regime': run['regime'], 'objective': run['objective'], 'data': Path(data).name,
        'setting': ', '.join(f'{name} {value}' for name, value in labels.items() if value not in ('', None)),
        'positions': positions, 'ratio': round(run['context'] / positions, 2), 'PPL': round(result['ppl'], 3),
        'delta': None, 'published': published, 'accuracy': round(result['accuracy'], 3),
        'exact': round(result['exact'], 3), 'CER': round(errors / length, 3) if length else None,
        'facts': round(result['facts'], 3) if facts else None, 'rest': round(result['rest'], 3) if facts else None,
        'encoder parameters': sum(p.numel() for p in model.encoder.parameters()), 'KV saved':
        kv_bytes * (run['context'] + 1 - positions), 'ms': round(1e3 * timer.median, 2)}, texts


def main(argv=None):
    """The command line: a row a run, then picture and passages; or a page read. Raises SystemExit."""
    parser = argparse.ArgumentParser(description='Evaluate runs: a table, a picture, passages that each makes anew.')
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='folder of a run')
    add('--data', help='another prepared corpus (default: the one that the run was trained on)')
    add('--segments', type=positive, help='validation segments (default: all)')
    add('--generate', type=number(int, 0), default=1, metavar='N', help='passages a run makes anew (default 1)')
    add('--kept', type=number(int, 0), help='last context tokens that hold no fact (default: a quarter of the context)')
    add('--csv', metavar='FILE', help='write the table there as well')
    add('--plot', metavar='FILE', help='draw it there as well')
    add('--font', help='font file of the pages (default DejaVuSans.ttf)')
    add('--font_size', type=positive, help='in pixels (default: the largest of 4 to 30 at which the text fits)')
    add('--line_spacing', type=number(float, 0.5), help='in type sizes (default 1.2)')
    add('--batch_size', type=positive, default=16, help='segments at once (default 16)')
    add('--workers', type=number(int, 0), default=0, help='processes that draw pages (default 0)')
    add('--device', default='auto', help='cpu, cuda, mps (default: cuda where there is one)')
    add('--image', metavar='FILE', help='read this page instead; the other flags say how')
    add('--model', default='deepseek-ai/DeepSeek-OCR', help='that reads it (default deepseek-ai/DeepSeek-OCR)')
    add('--vision_mode', help='tiny, small, base, large: pixels of the page (default: base for the released model)')
    add('--prompt', default='Free OCR.', help='what to do with it (default "Free OCR.")')
    add('--max_new_tokens', type=positive, default=1000, help='to read at most (default 1000)')
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.image:
        return read_page(args, device)
    if not args.runs:
        parser.error('give a RUN or an --image')
    for folder in args.runs:
        if not Path(folder, 'config.json').exists():
            raise SystemExit(f'{folder}: no such run')
    rows, passages = zip(*(row_of(folder, args, device) for folder in args.runs))
    for row in rows:
        whole = [other['PPL'] for other in rows if other['regime'] == 'text' and other['KV saved'] == 0
                 and (other['objective'], other['data']) == (row['objective'], row['data'])]
        row['delta'] = round(row['PPL'] - min(whole), 3) if whole else None
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    print('| ' + ' | '.join(columns) + ' |\n|' + '---|' * len(columns))
    for row in rows:
        print('| ' + ' | '.join('' if row[name] is None else str(row[name]) for name in columns) + ' |')
    if args.csv:
        with writing(args.csv), open(args.csv, 'w', newline='', encoding='utf-8') as f:
            csv.DictWriter(f, rows[0]).writeheader()
            csv.DictWriter(f, rows[0]).writerows(rows)
    if args.plot:
        with writing(args.plot):
            plot(rows, args.plot)
    for row, texts in zip(rows, passages):
        for pair in texts:
            show(*pair, f'{row["objective"]} by {row["run"]}')


if __name__ == '__main__':
    main()
