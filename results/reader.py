"""
How to teach a small model to read: trains a DeepSeek-OCR of 9 million parameters, such as results/reader/, on pages of text.

    python results/reader.py --data enwiki.jsonl                train: a few hours on two CPU cores, into out/reader
    python results/reader.py --data enwiki.jsonl --resume       continue
    python results/reader.py --data enwiki.jsonl --out results/reader --evaluate     error rates on held-out articles

Trained on the next character alone, such a model learns to guess long before it learns to look, and stays there. So
three helpers ask for what reading takes. Each is a linear layer that is thrown away at the end. The page is cut into
cells of 8 x 16 pixels, and the font tells which cell each character stands in.

    patch     SAM's output for a patch of 16 x 16 pixels says which characters stand in its two cells:
              the model learns what the letters look like.
    square    Each memory vector, for a square of 64 x 64 pixels, says which characters stand in its 32 cells:
              it learns to keep them in order.
    where     The decoder's second and third layers say in which row and column of cells the next character stands:
              it learns where to look next.

And most texts cannot be guessed: in half of them the words are in random order, in another tenth even the letters are.
"""
import argparse
import json
import re
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'examples')]
from data import documents                                    # noqa: E402
from decoder import Autoencoder, Decoder                      # noqa: E402
from encoders import Text, Vision                             # noqa: E402
from eval import text_of                                      # noqa: E402
from load_deepseek import (load, released_tensors, run_main, save, sizes_from, tokenizer_of,  # noqa: E402
                           write_atomic)
from read_page import edit_distance                           # noqa: E402
from render import load_font, render_page, wrap               # noqa: E402

CONFIG = {'tokenizer': 'bytes', 'language_config': dict(
    vocab_size=259, hidden_size=256, intermediate_size=640, moe_intermediate_size=128, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    'vision_config': {'image_size': 256, 'width': {       # every SAM layer sees the whole page, as it is so small
        'sam_vit_b': {'width': 128, 'layers': 4, 'heads': 4, 'global_attn_indexes': [0, 1, 2, 3]},
        'clip-l-14-224': {'width': 256, 'layers': 2, 'heads': 4}}}}
TOKENIZER, EOS, PAD = tokenizer_of('tiny'), 1, 2              # bytes
PROMPT = TOKENIZER.encode('\nFree OCR.').ids
SIDE, CELL_W, CELL_H = 256, 8, 16                             # pixels
CLASSES = 96                                                  # of a cell: empty, printable ASCII, any other character
LENGTHS = 16, 32, 64, 96, 128, 128, 136, 144                  # bytes in the texts of a batch, one of these

def articles(source, held_out):
    """The texts of at most 50,000 documents of a source of data.py. Every 20th is held out."""
    texts = (text for _, text in documents(source) if text is not None)
    return [text for i, text in enumerate(islice(texts, 50_000)) if (i % 20 == 0) == held_out]

def passage(texts, rng, length, scramble):
    """Whole words, at most `length` bytes of them, from a random place; with `scramble`, not to be guessed."""
    while True:
        text = texts[rng.integers(len(texts))]
        start = rng.integers(max(1, len(text) - length))
        words, kind = text[start:start + 2 * length + 40].split()[1:-1], rng.random()
        if scramble and kind > 0.4:
            words = [words[i] for i in rng.permutation(len(words))]
        if scramble and kind > 0.9:
            words = [''.join(map(chr, rng.integers(33, 127, len(word)))) for word in words]
        ends = np.cumsum([len(word.encode('utf-8', 'replace')) + 1 for word in words]) - 1
        text = ' '.join(words[:np.searchsorted(ends, length, 'right')])
        if text and text.encode('cp1252', 'ignore').decode('cp1252') == text:         # Western European letters
            return text

def draw(text):
    """A page (S, S) and the cell (row, column) of each character and of the text's end (n + 1, 2); None if a part of
    the text is not on the page."""
    page, size, _, missing = render_page(text, SIDE)
    if missing:
        return None
    font = load_font('DejaVuSans.ttf', size)
    edge = int(0.05 * SIDE)
    cells = []
    for i, line in enumerate(wrap(text, font, SIDE - 2 * edge)):
        row = (edge + i * int(1.2 * size) + 0.6 * size) // CELL_H
        pen = [edge + font.getlength(line[:n]) for n in range(len(line) + 1)]
        for letter, left, right in zip(line, pen, pen[1:]):
            middle = left if letter == ' ' else (left + right) / 2
            cells.append((row, min(middle, SIDE - 1) // CELL_W))
        cells.append((row, min(pen[-1], SIDE - 1) // CELL_W))       # of the space that the line's end stands for
    return np.asarray(page)[..., 0], np.array(cells, int)

def padded(rows):
    return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])

class Batches(torch.utils.data.Dataset):
    """Batch n, a function of the seed and n alone, so a run that was killed continues as if nothing had happened."""

    def __init__(self, texts, seed, batch_size):
        self.texts, self.seed, self.batch_size = texts, seed, batch_size

    def __getitem__(self, n):
        rng, rows, pages, cells, where = np.random.default_rng([self.seed, n]), [], [], [], []
        if n % 5 == 4:                         # a fifth is plain text: the decoder is to be a language model as well
            while len(rows) < self.batch_size // 2:
                text = self.texts[rng.integers(len(self.texts))]
                start = rng.integers(max(1, len(text) - 256))
                rows.append(TOKENIZER.encode(text[start:start + 256]).ids[:256])
            return {'context': padded(rows)}
        length = rng.choice(LENGTHS)
        while len(rows) < self.batch_size:     # of about one length, so that little is padding
            text = passage(self.texts, rng, rng.integers(3 * length // 4, length + 1), True)
            if drawn := draw(text):
                page, places = drawn
                cell = np.zeros((SIDE // CELL_H, SIDE // CELL_W), int)
                for letter, (row, column) in zip(text, places):
                    if letter != ' ':
                        cell[row, column] = ord(letter) - 32 if letter < '\x7f' else CLASSES - 1
                rows.append(TOKENIZER.encode(text).ids + [EOS])
                where.append([place for letter, place in zip(text, places) for _ in letter.encode()] + [places[-1]])
                pages.append(page)
                cells.append(cell)
        where = [np.pad(w, ((0, max(map(len, where)) - len(w)), (0, 0))) for w in where]
        image, cell, where = (torch.from_numpy(np.stack(x)) for x in (pages, cells, where))
        return {'context': padded(rows), 'image': image[:, None].expand(-1, 3, -1, -1), 'cell': cell, 'where': where}

def attention(q, k, v, is_causal=False, scale=None, **_):
    """F.scaled_dot_product_attention as plain products: a step takes 430 ms instead of 735 on two CPU cores."""
    q, k, v = (x.bfloat16() for x in (q, k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], float('-inf'), dtype=scores.dtype).triu(1)
    return scores.softmax(dim=-1) @ v

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw, but also for convolutions and for stacks of experts: momentum, whose
    matrices are made orthogonal. After 4 minutes the patch helper's loss is 1.1, with AdamW 3.1."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group['params'] if p.grad is not None):
                m = self.state[p].setdefault('momentum', torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(m, 0.95).bfloat16()
                x = x.flatten(1) if x.dim() == 4 else x
                tall, size = x.shape[-2] > x.shape[-1], 0.2 * max(x.shape[-2:]) ** 0.5
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):             # each brings the singular values nearer to 1
                    a = x @ x.mT
                    x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
                x = (x.mT if tall else x).reshape(p.shape).float()
                p.mul_(1 - 0.01 * group['lr']).add_(x, alpha=-group['lr'] * size)

class Teacher(nn.Module):
    """The model, its helpers, and their losses."""

    def __init__(self):
        super().__init__()
        sizes = sizes_from(CONFIG)
        self.model = Autoencoder(Vision(sizes, 128), Decoder(sizes), 'reconstruction')
        self.lm = Autoencoder(Text(sizes, 256, text_context_tokens=0), self.model.decoder)    # no memory at all
        D, neck = sizes.hidden_size, self.model.encoder.sam_model.neck
        self.patch, self.square = nn.Linear(neck[0].out_channels, 2 * CLASSES), nn.Linear(D, 32 * CLASSES)
        self.row, self.column = nn.Linear(D, 64), nn.Linear(D, 64)
        self.seen = {}                         # what the helpers look at
        watched = {'patch': neck, 'square': self.model.encoder.projector.layers,
                   'where_1': self.model.decoder.layers[1], 'where_2': self.model.decoder.layers[2]}
        for name, module in watched.items():
            module.register_forward_hook(lambda module, x, y, name=name: self.seen.update({name: y}))

    def forward(self, batch, prompt):
        """{name: loss in nats per byte of text}: of the next byte ('nats', or 'lm' without a page) and the helpers."""
        context, losses = batch['context'], {}
        real = context != PAD
        mean = lambda x: (x * real).sum() / real.sum()
        self.model.prompt = prompt
        model = self.model if 'image' in batch else self.lm
        loss, _, extra = model(batch)
        losses['balance'] = extra['balance_loss']
        losses['nats' if 'image' in batch else 'lm'] = mean(loss)
        if 'image' in batch:
            cells = batch['cell']                                                      # (B, S / 16, S / 8)
            squares = cells.unflatten(1, (-1, 4)).unflatten(3, (-1, 8)).transpose(2, 3)     # (B, h, h, 4, 8)
            for name, head, x, answer in (('patch', self.patch, self.seen['patch'].permute(0, 2, 3, 1), cells),
                                          ('square', self.square, self.seen['square'], squares)):
                logits = head(x).float().view(-1, CLASSES)
                losses[name] = F.cross_entropy(logits, answer.flatten(), reduction='sum') / real.sum()
            for name in ('where_1', 'where_2'):
                hidden = self.seen[name][0][:, -context.shape[1] - 1:-1]              # where the next byte is predicted
                row, column = (F.cross_entropy(head(hidden).float().mT, batch['where'][..., i], reduction='none')
                               for i, head in enumerate((self.row, self.column)))
                losses[name] = mean(row + column)
        return losses

def train(args):
    if (Path(args.out) / 'model.safetensors').exists() and not args.resume:
        raise ValueError(f'{args.out}: holds a model already; --evaluate measures it, --resume trains it further, '
                         'and another --out leaves it alone')
    torch.manual_seed(args.seed)
    F.scaled_dot_product_attention = attention
    teacher, out = Teacher(), Path(args.out)
    tables = re.compile('embed_tokens|lm_head|pos_embed|rel_pos|position_embedding|^(patch|square|row|column)')  # rows
    trained = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.dim() > 1 and not tables.search(name)]
    rest = [p for name, p in trained.items() if p.dim() == 1 or tables.search(name)]
    optimizers = [Muon(matrices, {'lr': 2e-3}),
                  torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    parts, peaks, start, minutes = [teacher, *optimizers], [2e-3, 1e-3], 0, 0.0
    if args.resume:
        state = torch.load(out / 'state.pt', weights_only=True)
        start, minutes = state['step'], state['minutes']
        for part, saved in zip(parts, state['parts']):
            part.load_state_dict(saved)
    batches = Batches(articles(args.data, False), args.seed, args.batch_size)
    sums, pages, last = {}, 0, time.time()

    for n, batch in enumerate(DataLoader(batches, None, sampler=range(start, args.steps), num_workers=1), start + 1):
        fade = min(1, (args.steps - n + 1) / args.decay)          # of the rates and of the helpers, at the end
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]['lr'] = peak * fade * min(1, n / 100)
        with torch.autocast('cpu', torch.bfloat16):
            losses = teacher(batch, PROMPT if n % 2 else [])      # it learns to read with the prompt and without
        weights = {'patch': 0.5 * fade, 'square': 0.5 * fade, 'where_1': 0.2 * fade, 'where_2': 0.4 * fade}
        sum(weights.get(name, 1) * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in losses.items():
            sums.setdefault(name, []).append(loss.item())
        pages += len(batch['context']) * ('image' in batch)

        if n % 50 == 0 or n == args.steps:
            seconds, last = time.time() - last, time.time()
            minutes += seconds / 60
            line = {'step': n, **{name: round(np.mean(x), 4) for name, x in sums.items()}, 'minutes': round(minutes, 1),
                    'pages_per_second': round(pages / seconds, 1), 'lr': optimizers[0].param_groups[0]['lr']}
            print(json.dumps(line), flush=True)
            out.mkdir(parents=True, exist_ok=True)
            with open(out / 'log.jsonl', 'a') as log:
                print(json.dumps(line), file=log)
            state = {'step': n, 'minutes': minutes, 'parts': [part.state_dict() for part in parts]}
            write_atomic(out / 'state.pt', lambda path: torch.save(state, path))
            tensors = released_tensors(teacher.model, 'vision')
            save({name: tensor.detach().bfloat16() for name, tensor in tensors.items()}, CONFIG, out, n)
            sums, pages = {}, 0

@torch.no_grad()
def evaluate(args):
    """The model card's table on held-out documents: greedy character error rate by length, and what the losses say."""
    model, rng = load(args.out, 'vision', 128)[0].eval(), np.random.default_rng(1)
    texts = articles(args.data, True)
    for length in (16, 32, 64, 128):
        rows = []
        while len(rows) < args.pages:
            text = passage(texts, rng, length, False)
            if length - 12 <= len(text.encode()) and (drawn := draw(text)):
                rows.append((text, drawn[0]))
        line = {'length': length}
        for name, model.prompt in (('', []), ('_prompt', PROMPT)):
            errors, stopped, losses = 0, 0, {0: [], 1: []}
            for i in range(0, args.pages, 50):
                text, page = zip(*rows[i:i + 50])
                context = padded([TOKENIZER.encode(t).ids + [EOS] for t in text])
                image = torch.from_numpy(np.stack(page))[:, None].expand(-1, 3, -1, -1)
                for shift in losses:           # 1: with another passage's page
                    loss = model({'context': context, 'image': image.roll(shift, 0)})[0]
                    losses[shift] += loss[context != PAD].tolist()
                ids = model.generate({'context': context, 'image': image}, length + 40).tolist()
                errors += sum(edit_distance(t, text_of(row, TOKENIZER, [EOS])) for t, row in zip(text, ids))
                stopped += sum(EOS in row for row in ids)
            line |= {f'cer{name}': round(errors / sum(len(text) for text, _ in rows), 4),
                     f'stopped{name}': stopped / args.pages, f'nats{name}': round(np.mean(losses[0]), 4),
                     f'nats_other_page{name}': round(np.mean(losses[1]), 2)}
        print(json.dumps(line), flush=True)
    lm = Autoencoder(Text(model.decoder.config, 256, text_context_tokens=0), model.decoder)
    rows = [TOKENIZER.encode(text[:256]).ids[:256] for text in texts if len(text) >= 256][:500]
    losses = [lm({'context': torch.tensor(rows[i:i + 50])})[0] for i in range(0, len(rows), 50)]
    print(json.dumps({'nats_lm': round(torch.cat(losses).mean().item(), 4)}))

def main():
    parser = argparse.ArgumentParser(description='Train a small DeepSeek-OCR that reads, or measure how well it does.')
    parser.add_argument('--data', required=True, help='finewiki, or a file or folder of .txt .md .py .jsonl .parquet')
    parser.add_argument('--out', default='out/reader', help='folder for the weights, the log and the state (default out/reader)')
    parser.add_argument('--steps', type=int, default=10700)
    parser.add_argument('--decay', type=int, default=3500, help='the last steps, in which rates and helpers fade')
    parser.add_argument('--batch_size', type=int, default=32, help='pages in a step')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--resume', action='store_true', help='continue from the state in --out')
    parser.add_argument('--evaluate', action='store_true', help='measure the weights in --out instead')
    parser.add_argument('--pages', type=int, default=500, help='pages of each length to evaluate')
    args = parser.parse_args()
    evaluate(args) if args.evaluate else train(args)

if __name__ == '__main__':
    run_main(main)
