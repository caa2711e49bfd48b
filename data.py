"""
Documents to segments on disk, once; segments to batches, as they are needed.

    python data.py SOURCE --out DIR --model deepseek-ai/DeepSeek-OCR --context 1000 --continuation 1000
    SOURCE: finewiki | pydoc | stdlib | a file or folder of .txt .md .py .jsonl .parquet, also as .xz or .gz

    DIR/train.bin, val.bin     token ids, uint16 or uint32, one segment of context + continuation tokens after another
    DIR/meta.json              what they were made from and with, and what was left out

A document gives as many segments as it has whole ones, without overlap; all of them go to the same side of the split.
Pages are drawn when a batch is made, so that a corpus of 510,000 segments takes 4.1 GB and its 828 GB of PNGs none.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sysconfig
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from tqdm import tqdm

from load_deepseek import tokenizer_of
from render import render_page

TEXT, RECORDS, OPEN = ('.txt', '.md', '.py', '.rst'), ('.jsonl', '.parquet'), {'.xz': lzma.open, '.gz': gzip.open}
PIECE = 100_000         # characters that the tokenizer gets at once: a few million alike would overflow its stack


# --------------------------------------------------------------------------------------------------------- documents

def kind(path):
    """A file's ending, not counting that of its compression."""
    return (path.with_suffix('') if path.suffix in OPEN else path).suffix


def find_files(source):
    """The files of a source, in a fixed order. Raises SystemExit when there is none that can be read."""
    root = Path(sysconfig.get_paths()['stdlib'] if source == 'stdlib' else source)
    files = [root] if root.is_file() else [path for path in sorted(root.rglob('*')) if kind(path) in TEXT + RECORDS]
    if source == 'stdlib':
        files = [path for path in files if path.suffix == '.py' and 'site-packages' not in path.parts]
    if not files or kind(files[0]) not in TEXT + RECORDS:
        raise SystemExit(f'{source}: nothing to read; give pydoc, stdlib, finewiki, or a file or folder of {" ".join(TEXT + RECORDS)}')
    return files


def finewiki():
    """The English Parquet shards of HuggingFaceFW/finewiki, each fetched only when those before it were not enough."""
    repo = 'HuggingFaceFW/finewiki'
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, repo_type='dataset')
        for name in sorted(name for name in names if 'enwiki' in name and name.endswith('.parquet')):
            yield Path(huggingface_hub.hf_hub_download(repo, name, repo_type='dataset'))
    except Exception as e:                     # the hub's client raises whatever its transport does
        raise SystemExit(f'finewiki: not to be had from the data hub ({type(e).__name__})')


def rows(path, counts):
    """The records of a .jsonl or .parquet file."""
    if kind(path) == '.parquet':
        try:
            import pyarrow.parquet
        except ImportError:
            raise SystemExit(f'{path}: reading Parquet takes pyarrow: pip install pyarrow')
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    else:
        with OPEN.get(path.suffix, open)(path, 'rt', encoding='utf-8', errors='replace') as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    counts['empty lines' if not line.strip() else 'lines that are not JSON'] += 1


def pieces(text):
    """A text in pieces of at most PIECE characters, cut behind a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind('\n', start, end) + 1 or end
        yield text[start:end]
        start = end


def documents(source, field, counts):
    """The texts of a source, in order; `counts` learns of what could not be read. A single text file is many documents: its pieces."""
    if source == 'pydoc':
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
        return
    files = finewiki() if source == 'finewiki' else find_files(source)
    for path in files:
        if kind(path) in RECORDS:
            for row in rows(path, counts):
                texts = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
                field = field or max(texts, key=lambda k: len(texts[k]), default=None)
                counts['records without text'] += field not in texts
                yield from [texts[field]] if field in texts else []
        else:
            with OPEN.get(path.suffix, open)(path, 'rb') as f:
                raw = f.read()
            counts['binary files'] += b'\0' in raw[:8192]
            text = '' if b'\0' in raw[:8192] else raw.decode('utf-8', errors='replace')
            yield from pieces(text) if files == [path] else [text]


# ----------------------------------------------------------------------------------------------------------- preparation

def fingerprint(tokenizer):
    """Tells tokenizers apart: the name and a hash of all tokens."""
    return f'{tokenizer.name} {hashlib.sha256(b" ".join(tokenizer.token_byte_values())).hexdigest()[:16]}'


def encode(tokenizer, text):
    """Text to token ids (n,) uint32. What UTF-8 cannot hold (a lone surrogate) becomes '?'."""
    text = text.encode('utf-8', errors='replace').decode('utf-8')
    return np.concatenate([tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)] or [np.zeros(0, np.uint32)])


def in_batches(texts, size=2_000_000):
    """Lists of texts of about `size` characters together."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    yield batch


def prepare(source, out, tokenizer, context, continuation, train_segments=None, val_segments=None, seed=0, field=None):
    """Make the folder `out` from a source, see above. Without numbers of segments: all there are, a tenth for validation.

    Nothing stands under that name before all is done. Raises SystemExit when the source is missing or too short.
    """
    out, length, dtype = Path(out), context + continuation, np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
    folder = out.with_name(out.name + '.tmp')
    if folder.exists():
        print(f'{folder}: left by a preparation that was cut short; starting again')
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    counts, sizes, wanted = Counter(), [], (train_segments or 1e18) + (val_segments or 0)
    bar = tqdm(desc=f'{source}', unit='B', unit_scale=True, mininterval=1)
    with ThreadPool(os.cpu_count()) as pool, open(folder / 'segments.bin', 'wb') as f:
        for texts in in_batches(documents(source, field, counts)):
            for text, ids in zip(texts, pool.map(lambda text: encode(tokenizer, text), texts)):
                sizes.append(len(ids) // length)
                f.write(ids[:sizes[-1] * length].astype(dtype).tobytes())
                counts['characters'] += len(text)
                counts['documents too short'] += sizes[-1] == 0
                counts['tokens left over'] += len(ids) % length
            bar.update(sum(len(text.encode('utf-8', errors='replace')) for text in texts))
            bar.set_postfix(documents=len(sizes), segments=sum(sizes))
            if sum(sizes) >= wanted:
                break
    bar.close()

    # Whole documents go to validation, in random order, until it has enough; the segments of both sides are then shuffled.
    ends, rng = np.cumsum(sizes), np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    enough = min(val_segments or 10 ** 18, max(1, sum(sizes) // 10))
    split = int(np.searchsorted(np.cumsum(np.array(sizes)[order]), enough)) + 1
    segments = {name: np.concatenate([np.arange(ends[d] - sizes[d], ends[d]) for d in docs] or [[]]).astype(int)
                for name, docs in (('val', order[:split]), ('train', order[split:]))}
    if min(map(len, segments.values())) == 0:
        shutil.rmtree(folder)
        raise SystemExit(f'{source}: too short: {sum(sizes)} segments of {length} tokens in {len(sizes)} documents; training and '
                         f'validation need at least one each, from different documents')
    kept = {'train': train_segments, 'val': val_segments}
    with open(folder / 'segments.bin', 'rb') as f:
        for name, which in segments.items():
            which = rng.permutation(which)[:kept[name]]
            kept[name] = len(which)
            with open(folder / f'{name}.bin', 'wb') as g:
                for i in which:
                    f.seek(int(i) * length * dtype().itemsize)
                    g.write(f.read(length * dtype().itemsize))
    os.remove(folder / 'segments.bin')
    meta = {'source': source, 'tokenizer': fingerprint(tokenizer), 'context': context, 'continuation': continuation, 'seed': seed,
            'dtype': dtype.__name__, 'train': kept['train'], 'val': kept['val'], 'documents': len(sizes), **counts}
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    os.replace(folder, out)
    print(f'{out}: ' + ', '.join(f'{value:,} {key}' for key, value in meta.items() if isinstance(value, int)))


# --------------------------------------------------------------------------------------------------------------- batches

def open_corpus(folder, tokenizer, context=None, continuation=None):
    """meta.json of a prepared corpus, once it is sure that it fits. Raises SystemExit with the reason when it does not."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise SystemExit(f'{folder}: not a prepared corpus ({e})')
    if meta['tokenizer'] != fingerprint(tokenizer):
        raise SystemExit(f'{folder}: made with another tokenizer ({meta["tokenizer"]}, not {fingerprint(tokenizer)})')
    if (context or meta['context'], continuation or meta['continuation']) != (meta['context'], meta['continuation']):
        raise SystemExit(f'{folder}: has segments of {meta["context"]} + {meta["continuation"]} tokens, not {context} + {continuation}')
    for name in ('train', 'val'):
        size = meta[name] * (meta['context'] + meta['continuation']) * np.dtype(meta['dtype']).itemsize
        found = os.path.getsize(folder / f'{name}.bin') if (folder / f'{name}.bin').exists() else 0
        if found != size:
            raise SystemExit(f'{folder / name}.bin: damaged: {found} bytes, not {size}')
    return meta


class Batches(torch.utils.data.Dataset):
    """Batch n of one side of a corpus, which is a function of the seed and n alone; item n is a whole batch.

    {'context': (B, T), 'continuation': (B, T)} token ids, int64, and with an image_size 'image' (B, 3, S, S) uint8: each context as a
    page. Training batches run through a new permutation of the segments in every epoch; validation is in order, and ends.
    """

    def __init__(self, folder, split, batch_size, tokenizer, image_size=None, seed=0, limit=None):
        self.folder, self.split, self.batch_size, self.seed = Path(folder), split, batch_size, seed
        self.tokenizer, self.image_size, self.meta = tokenizer, image_size, open_corpus(folder, tokenizer)
        self.n = min(limit or self.meta[split], self.meta[split])
        self.epoch = self.permutation = None

    def __len__(self):
        return -(-self.n // self.batch_size)

    def order(self, i):
        """Which segment is the i-th of the endless row of epochs."""
        if self.split == 'val':
            return i
        if self.epoch != i // self.n:
            self.epoch = i // self.n
            self.permutation = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        return self.permutation[i % self.n]

    def __getitem__(self, n):
        meta, first = self.meta, n * self.batch_size
        tokens = np.memmap(self.folder / f'{self.split}.bin', meta['dtype'], 'r').reshape(-1, meta['context'] + meta['continuation'])
        last = min(first + self.batch_size, self.n) if self.split == 'val' else first + self.batch_size
        ids = tokens[[self.order(i) for i in range(first, last)]].astype(np.int64)
        batch = {'context': ids[:, :meta['context']], 'continuation': ids[:, meta['context']:]}
        if self.image_size:
            pages = [np.asarray(render_page(self.tokenizer.decode(row), self.image_size)[0]) for row in batch['context'].tolist()]
            batch['image'] = np.stack(pages).transpose(0, 3, 1, 2)
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}


def main():
    parser = argparse.ArgumentParser(description='Tokenise documents to segments on disk.')
    parser.add_argument('source', help='finewiki, pydoc, stdlib, or a file or folder')
    parser.add_argument('--out', required=True, help='folder to make')
    parser.add_argument('--model', default='tiny', help='whose tokenizer: tiny or full (bytes), a hub id, a folder (default tiny)')
    parser.add_argument('--context', type=int, default=1000, help='context tokens a segment (default 1000)')
    parser.add_argument('--continuation', type=int, default=1000, help='continuation tokens a segment (default 1000)')
    parser.add_argument('--train_segments', type=int, help='at most this many (default: all; the paper: 500000)')
    parser.add_argument('--val_segments', type=int, help='at most this many (default: a tenth; the paper: 10000)')
    parser.add_argument('--field', help='which field of a record holds the text (default: the longest of the first record)')
    parser.add_argument('--seed', type=int, default=0, help='of the split and the shuffle (default 0)')
    args = parser.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f'{args.out}: exists already')
    prepare(args.source, args.out, tokenizer_of(args.model), args.context, args.continuation, args.train_segments, args.val_segments, args.seed, args.field)


if __name__ == '__main__':
    main()
