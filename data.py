"""
Documents to segments on disk, once; segments to batches, as they are needed.

    python data.py SOURCE --out DIR --model deepseek-ai/DeepSeek-OCR --context 1000 --continuation 1000
    SOURCE: finewiki | pydoc | stdlib | a file or folder of .txt .md .py .jsonl .parquet, the text kinds also as .xz or .gz

    DIR/train.bin, val.bin     token ids, uint16 or uint32, one segment of context + continuation tokens after another
    DIR/meta.json              what they were made from and with, and what was left out

A document gives as many segments as it has whole ones, without overlap, all to the same side of the split. Pages are drawn
when a batch is made: 510,000 segments of 2,000 tokens are 4.1 GB, and their 828 GB of PNGs nothing.
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

from load_deepseek import read_json, tokenizer_of
from render import render_page

KINDS, OPEN = ('.txt', '.md', '.py', '.jsonl', '.parquet'), {'.xz': lzma.open, '.gz': gzip.open}
PIECE = 100_000         # characters that the tokenizer gets at once: a few million alike would overflow its stack


def kind(path):
    """A file's ending, not counting that of its compression."""
    return (path.with_suffix('') if path.suffix in OPEN else path).suffix


def find_files(source):
    """The files of a source, in a fixed order; FineWiki's English shards only as they are asked for. Raises SystemExit."""
    if source == 'finewiki':
        repo = 'HuggingFaceFW/finewiki'
        try:
            for name in sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type='dataset')):
                if 'enwiki' in name and name.endswith('.parquet'):
                    yield Path(huggingface_hub.hf_hub_download(repo, name, repo_type='dataset'))
        except Exception as e:                 # the hub's client raises whatever its transport does
            raise SystemExit(f'finewiki: not to be had from the data hub ({type(e).__name__})')
        return
    root = Path(sysconfig.get_paths()['stdlib'] if source == 'stdlib' else source)
    files = [path for path in ([root] if root.is_file() else sorted(root.rglob('*'))) if kind(path) in KINDS]
    if source == 'stdlib':
        files = [path for path in files if path.suffix == '.py' and 'site-packages' not in path.parts]
    if not files:
        raise SystemExit(f'{source}: nothing to read; give pydoc, stdlib, finewiki, or a file or folder of {" ".join(KINDS)}')
    yield from files


def records(path, counts):
    """The records of a file, dicts if all is well; a text file is one, {'text': ...}. `counts` gets what cannot be read."""
    if kind(path) == '.parquet':
        try:
            import pyarrow.parquet
        except ImportError:
            raise SystemExit(f'{path}: reading Parquet takes pyarrow: pip install pyarrow')
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
        return
    with OPEN.get(path.suffix, open)(path, 'rb') as f:
        if kind(path) == '.jsonl':
            for line in f:
                try:
                    yield json.loads(line.decode('utf-8', errors='replace'))
                except ValueError:
                    counts['lines that are not JSON' if line.strip() else 'empty lines'] += 1
        elif b'\0' in (raw := f.read())[:8192]:
            counts['binary files'] += 1
        else:
            yield {'text': raw.decode('utf-8', errors='replace')}


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
    """The texts of a source, in order. Of a record, `field` is the text, or else what is longest in the first. A text file that
    is the whole source is many documents: its pieces."""
    if source == 'pydoc':
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
        return
    for path in find_files(source):
        for record in records(path, counts):
            texts = {k: v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
            field = field or max(texts, key=lambda k: len(texts[k]), default=None)
            counts['records without text'] += field not in texts
            alone = str(path) == str(source) and kind(path) not in ('.jsonl', '.parquet')
            yield from pieces(texts[field]) if alone else [texts.get(field, '')]


def encode(tokenizer, text):
    """Text to token ids (n,) uint32. What UTF-8 cannot hold (a lone surrogate) becomes '?'."""
    text = text.encode('utf-8', errors='replace').decode('utf-8')
    return np.concatenate([np.zeros(0, np.uint32)] + [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)])


def encode_all(tokenizer, texts):
    """(text, its ids) of each text, in order, tokenised on all cores, a few million characters ahead."""
    with ThreadPool(os.cpu_count()) as pool:
        while True:
            batch, room = [], 2_000_000
            while room > 0 and (text := next(texts, None)) is not None:
                batch.append(text)
                room -= len(text)
            if not batch:
                return
            yield from zip(batch, pool.map(lambda text: encode(tokenizer, text), batch))


def fingerprint(tokenizer):
    """Tells tokenizers apart: the name and a hash of all tokens."""
    return f'{tokenizer.name} {hashlib.sha256(b" ".join(tokenizer.token_byte_values())).hexdigest()[:16]}'


def prepare(source, out, tokenizer, context, continuation, train_segments=None, val_segments=None, field=None):
    """Make the folder `out` from a source, as above. Without numbers of segments: all there are, a tenth for validation.

    Nothing stands under that name before all is done. Raises SystemExit when the source is missing or too short.
    """
    out, length, dtype = Path(out), context + continuation, 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'
    folder, counts = out.with_name(out.name + '.tmp'), Counter()
    limit = {'train': train_segments or float('inf'), 'val': val_segments or float('inf')}
    share = val_segments / (train_segments + val_segments) if train_segments and val_segments else 0.1
    if folder.exists():
        print(f'{folder}: left by a preparation that was cut short; starting again')
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val, \
            tqdm(desc=str(source), unit='B', unit_scale=True) as bar:
        for text, ids in encode_all(tokenizer, documents(source, field, counts)):
            # A document goes to validation whenever that has less than its share.
            full = {side: counts[side] >= limit[side] for side in limit}
            side = 'val' if not full['val'] and (full['train'] or counts['val'] < share * (counts['train'] + counts['val'])) else 'train'
            n = int(min(len(ids) // length, limit[side] - counts[side]))
            (val if side == 'val' else train).write(ids[:n * length].astype(dtype).tobytes())
            counts.update({side: n, 'documents': 1, 'characters': len(text), 'documents too short': len(ids) < length,
                           'tokens left over': len(ids) - n * length})
            bar.update(len(text))
            bar.set_postfix(documents=counts['documents'], segments=counts['train'] + counts['val'], refresh=False)
            if all(full.values()):
                break
    if not counts['train'] or not counts['val']:
        shutil.rmtree(folder)
        raise SystemExit(f'{source}: too short: {counts["train"]} segments of {length} tokens to train on and {counts["val"]} to validate, '
                         f'from {counts["documents"]} documents (' + ', '.join(f'{v} {k}' for k, v in counts.items()) + ')')
    meta = {'source': str(source), 'tokenizer': fingerprint(tokenizer), 'context': context, 'continuation': continuation, 'dtype': dtype, **counts}
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    os.replace(folder, out)
    print(f'{out}: ' + ', '.join(f'{value:,} {key}' for key, value in counts.items()))


def open_corpus(folder, tokenizer, context=None, continuation=None):
    """meta.json of a prepared corpus, once it is sure that it fits. Raises SystemExit with the reason when it does not."""
    meta = read_json(Path(folder, 'meta.json'))
    for name, value in (('tokenizer', fingerprint(tokenizer)), ('context', context), ('continuation', continuation)):
        if value not in (None, meta[name]):
            raise SystemExit(f'{folder}: made for {name} {meta[name]}, not {value}')
    for side in ('train', 'val'):
        path, size = Path(folder, f'{side}.bin'), meta[side] * (meta['context'] + meta['continuation']) * np.dtype(meta['dtype']).itemsize
        if not path.exists() or path.stat().st_size != size:
            raise SystemExit(f'{path}: missing or damaged (should have {size} bytes)')
    return meta


class Batches(torch.utils.data.Dataset):
    """Batch n of one side of a corpus, which is a function of the seed and n alone; item n is a whole batch.

    {'context': (B, T), 'continuation': (B, T)} token ids, int64, and with an image_size 'image' (B, 3, S, S) uint8: each context as a
    page. Training batches go through a new permutation of the segments in every epoch; validation is in order, ends, and with a
    limit takes segments evenly from the whole.
    """

    def __init__(self, folder, side, batch_size, tokenizer, image_size=None, seed=0, limit=None):
        self.folder, self.side, self.batch_size, self.seed = Path(folder), side, batch_size, seed
        self.tokenizer, self.image_size, self.meta = tokenizer, image_size, open_corpus(folder, tokenizer)
        self.n = min(limit or self.meta[side], self.meta[side])
        self.epoch = self.order = None

    def __len__(self):
        return -(-self.n // self.batch_size)

    def segment(self, i):
        """Which segment is the i-th of the endless row of epochs."""
        if self.side == 'val':
            return i * self.meta['val'] // self.n
        if self.epoch != i // self.n:
            self.epoch = i // self.n
            self.order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        return self.order[i % self.n]

    def __getitem__(self, n):
        T, first = self.meta['context'], n * self.batch_size
        tokens = np.memmap(self.folder / f'{self.side}.bin', self.meta['dtype'], 'r').reshape(-1, T + self.meta['continuation'])
        end = first + self.batch_size if self.side == 'train' else min(first + self.batch_size, self.n)
        ids = torch.from_numpy(tokens[[self.segment(i) for i in range(first, end)]].astype(np.int64))
        batch = {'context': ids[:, :T].contiguous(), 'continuation': ids[:, T:].contiguous()}
        if self.image_size:
            pages = [np.asarray(render_page(self.tokenizer.decode(row), self.image_size)[0]) for row in batch['context'].tolist()]
            batch['image'] = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2).contiguous()
        return batch


def main(argv=None):
    parser = argparse.ArgumentParser(description='Tokenise documents to segments on disk.')
    parser.add_argument('source', help='finewiki, pydoc, stdlib, or a file or folder')
    parser.add_argument('--out', required=True, help='folder to make')
    parser.add_argument('--model', default='tiny', help='whose tokenizer: tiny or full (bytes), a hub id, a folder (default tiny)')
    parser.add_argument('--context', type=int, default=1000, help='context tokens a segment (default 1000)')
    parser.add_argument('--continuation', type=int, default=1000, help='continuation tokens a segment (default 1000)')
    parser.add_argument('--train_segments', type=int, help='at most this many (default: all; the paper: 500000)')
    parser.add_argument('--val_segments', type=int, help='at most this many (default: a tenth; the paper: 10000)')
    parser.add_argument('--field', help='field of a record that holds the text (default: the longest of the first record)')
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise SystemExit(f'{args.out}: exists already')
    prepare(args.source, args.out, tokenizer_of(args.model), args.context, args.continuation, args.train_segments, args.val_segments, args.field)


if __name__ == '__main__':
    main()
