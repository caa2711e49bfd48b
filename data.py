"""
Documents to token segments on disk, once; segments to batches, as they are needed.

    python data.py SOURCE --out DIR --model deepseek-ai/DeepSeek-OCR --context 1000 --continuation 1000
    SOURCE: finewiki | pydoc | a file or folder of .txt .md .py .jsonl .parquet

    DIR/train.bin, val.bin     token ids, uint16 or uint32, one segment of context + continuation tokens after another
    DIR/meta.json              the source, the tokenizer, the lengths, and counts of what was used and left out

The segments of a document do not overlap and are all on the same side of the split. Pages are drawn when a batch is
made: 510,000 segments of 2,000 tokens take 4.1 GB on disk, their pages as PNG 828 GB.
"""
import argparse
import hashlib
import json
import re
import signal
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from tqdm import tqdm

from load_deepseek import read_json, tokenizer_of
from render import check, explain, read_text, render_page, run_main

KINDS = {'.txt', '.md', '.py', '.jsonl', '.parquet'}
# Pieces of a text, cut after a line end where there is one: a tokenizer overflows its stack on a million equal letters.
PIECE = re.compile(r'(?s).{1,100000}(?:(?<=\n)|\Z)|.{1,100000}')

def find_files(source):
    """Yield the files of a source in a fixed order; those of the hub are downloaded one by one. Raises ValueError."""
    if source == 'finewiki':
        hub = {'repo_id': 'HuggingFaceFW/finewiki', 'repo_type': 'dataset'}
        with explain('finewiki: not found on the hub'):
            names = huggingface_hub.HfApi().list_repo_files(**hub)
            for name in sorted(name for name in names if re.search(r'enwiki.*\.parquet$', name)):
                yield Path(huggingface_hub.hf_hub_download(filename=name, **hub))
        return
    root = Path(source)
    paths = [path for path in [root, *sorted(root.rglob('*'))] if path.suffix.lower() in KINDS and path.is_file()]
    check(paths, f'{source}: ' + (f'no {" ".join(sorted(KINDS))} files' if root.exists() else 'does not exist'))
    yield from paths

def records(path, wanted, lone, skip):
    """Yield the records of a file as dicts; one that cannot be read goes to skip(where, why) and is None. A text file
    is {'text': ...}; the `lone` one is cut into ten or more, as the split has two sides. Raises ValueError."""
    if path.suffix.lower() == '.parquet':
        import pyarrow.parquet
        with explain(f'{path}: cannot be read'):
            file = pyarrow.parquet.ParquetFile(path)
            names = [f.name for f in file.schema_arrow if re.match('(large_)?string|dict.*=string', str(f.type))]
            if not names:                      # pyarrow may abort when it is asked for no column of a damaged file
                yield from ({} for _ in range(file.metadata.num_rows))
                return
            for batch in file.iter_batches(256, columns=[wanted] if wanted in names else names):     # not images
                yield from batch.to_pylist()
    elif path.suffix.lower() == '.jsonl':
        with open(path, 'rb') as file:
            for number, line in enumerate((line for line in file if line.strip(b'\xef\xbb\xbf \t\r\n')), 1):
                try:
                    record = json.loads(line.decode('utf-8-sig'))
                    yield record if isinstance(record, dict) else {}
                except (ValueError, RecursionError) as e:
                    why = 'not UTF-8' if isinstance(e, UnicodeDecodeError) else 'not JSON'
                    yield skip(f'{path}, record {number}', why)               # None, so that the next has its number
    else:
        try:
            text = read_text(path)
        except ValueError:
            return skip(path, 'not UTF-8')
        size = min(100_000, len(text) // 10 + 1) if lone else len(text) + 1
        yield from ({'text': text[i:i + size]} for i in range(0, len(text), size))

def documents(source, field, skip):
    """Yield (text, name of its field) for the documents of a source. The field is `field`, or "text", or the one with
    most text in the first hundred records of the file. skip: see records()."""
    if source == 'pydoc':
        from pydoc_data.topics import topics
        yield from ((topics[name], 'text') for name in sorted(topics))
        return
    for path in find_files(source):
        rows = records(path, field or 'text', path == Path(source), skip)
        head = list(islice(rows, 100))
        found = [row for row in head if row]
        size = lambda name: sum(len(row[name]) for row in found if isinstance(row.get(name), str))
        name = field or ('text' if size('text') else max(dict.fromkeys(['text', *chain(*found)]), key=size))
        for number, row in enumerate(chain(head, rows), 1):
            if row and isinstance(row.get(name), str):
                yield row[name], name
            elif row is not None:
                skip(f'{path}, record {number}', f'without {name}')

def encode(tokenizer, text):
    """Text to token ids (n,) uint32. A lone surrogate, which UTF-8 cannot hold, becomes '?'. Raises ValueError."""
    raw = text.encode('utf-8', errors='replace')
    with explain(f'a text has a byte that tokenizer {tokenizer.name} has no token for'):     # tiktoken would crash
        for byte in set(raw):
            tokenizer.encode_single_token(bytes([byte]))
    pieces = PIECE.findall(raw.decode('utf-8')) or ['']
    return np.concatenate([tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

def fingerprint(tokenizer):
    """Identifies a tokenizer: its name and a hash of all its tokens."""
    return f'{tokenizer.name} {hashlib.sha256(b" ".join(tokenizer.token_byte_values())).hexdigest()[:16]}'

def prepare(source, out, tokenizer, context, continuation, train_segments=None, val_segments=None, field=None):
    """Make the corpus folder `out`, which gets its name only when it is complete. Without numbers of segments it has
    all there are, about a tenth for validation, in whole documents. Raises ValueError or OSError."""
    out, length, counts = Path(out), context + continuation, Counter(train=0, val=0)
    dtype = 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'
    ninth = -(-train_segments // 9) if train_segments else np.inf             # of training, so a tenth of the total
    limit = {'train': train_segments or np.inf, 'val': val_segments or ninth}
    share = limit['val'] / sum(limit.values()) if train_segments else 0.1

    def skip(where, why):
        counts[f'left out, {why}'] += 1
        if counts[f'left out, {why}'] == 1:
            tqdm.write(f'{where}: left out, {why}; any more are counted')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{out.name}.tmp', dir=out.parent) as temporary:
        folder = Path(temporary, 'corpus')
        folder.mkdir()
        with open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val:
            for text, name in tqdm(documents(source, field, skip), desc=str(source), unit=' documents'):
                ids, done = encode(tokenizer, text), counts['train'] + counts['val']
                # A document goes to validation whenever that side has less than its share.
                wants_val = counts['val'] < min(limit['val'], share * done) or counts['train'] >= limit['train']
                side, file = ('val', val) if wants_val else ('train', train)
                n = int(min(len(ids) // length, limit[side] - counts[side]))
                file.write(ids[:n * length].astype(dtype).tobytes())
                name = 'documents' if name == 'text' else f'documents from the field {name}'
                counts.update({side: n, name: 1, 'documents too short': len(ids) < length})
                if done + n == sum(limit.values()):
                    break
        report = ', '.join(f'{value:,} {key}' for key, value in counts.items())
        check(counts['train'] and counts['val'], f'{source}: too short for segments of {length} tokens; found {report}')
        meta = {'source': str(source), 'tokenizer': fingerprint(tokenizer), 'context': context,
                'continuation': continuation, 'dtype': dtype, **counts}
        (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
        try:
            folder.replace(out)
        except OSError:
            if not out.exists():               # if it does, another process was faster, with the same result
                raise
    print(f'{out}: {report}')

def corpus_of(source, tokenizer, context, continuation):
    """The corpus folder of a source: itself if data.py made it, else one under corpora/, made if need be, for its files
    as they are now, the tokenizer and the lengths. Raises ValueError or OSError."""
    if Path(source, 'meta.json').exists():
        return source
    files = [] if source in ('finewiki', 'pydoc') else find_files(source)
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps([files, fingerprint(tokenizer), context, continuation])
    folder = Path('corpora', f'{Path(source).resolve().name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}')
    if not folder.exists():
        prepare(source, folder, tokenizer, context, continuation)
    return str(folder)

def open_corpus(folder, tokenizer, context=None, continuation=None):
    """meta.json of a corpus folder. Raises ValueError if the corpus is damaged or made for something else."""
    meta = read_json(Path(folder, 'meta.json'))
    for name, value in (('tokenizer', fingerprint(tokenizer)), ('context', context), ('continuation', continuation)):
        check(value in (None, meta.get(name)), f'{folder}: made for {name} {meta.get(name)}, not {value}; see --data')
    for side in ('train', 'val'):
        path, length = Path(folder, f'{side}.bin'), meta['context'] + meta['continuation']
        size = meta[side] * length * np.dtype(meta['dtype']).itemsize
        check(path.exists() and path.stat().st_size == size, f'{path}: missing or damaged (should have {size} bytes)')
    return meta

def keep_running(_):
    """In a worker: leave Ctrl-C and SIGTERM, which reach all processes of a run, to the run itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Batches(torch.utils.data.Dataset):
    """Item n is batch n of one side of a corpus, a function of seed and n alone: {'context': (B, T), 'continuation':
    (B, T)} token ids, int64. With an image_size also 'image' (B, 3, S, S) uint8, each context as a page, and 'lost'
    (B,), the share of its characters that is not on the page; `page` are keywords of render_page. Training takes a new
    permutation each epoch. Validation is in order; with a limit it takes segments evenly from the whole."""

    def __init__(self, folder, side, batch_size, tokenizer, image_size=None, seed=0, limit=None, **page):
        self.folder, self.side, self.batch_size, self.seed = Path(folder), side, batch_size, seed
        self.tokenizer, self.image_size, self.page = tokenizer, image_size, page
        self.meta = open_corpus(folder, tokenizer)
        self.n = min(limit or self.meta[side], self.meta[side])

    def __len__(self):
        return -(-self.n // self.batch_size)

    def rows(self, n):
        """The segments of batch n; in training, of the infinite sequence of epochs."""
        i = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        if self.side == 'val':
            return i[i < self.n] * self.meta['val'] // self.n
        orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n) for epoch in set(i // self.n)}
        return [orders[epoch][k] for epoch, k in zip(i // self.n, i % self.n)]

    def __getitem__(self, n):
        T = self.meta['context']
        tokens = np.memmap(self.folder / f'{self.side}.bin', self.meta['dtype'], 'r').reshape(self.meta[self.side], -1)
        ids = torch.from_numpy(tokens[self.rows(n)].astype(np.int64))                        # (B, segment)
        batch = {'context': ids[:, :T].contiguous(), 'continuation': ids[:, T:].contiguous()}
        if self.image_size:
            texts = [' '.join(self.tokenizer.decode(row).split()) for row in batch['context'].tolist()]
            pages, _, _, lost = zip(*(render_page(text, self.image_size, **self.page) for text in texts))
            batch['image'] = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2).contiguous()
            batch['lost'] = torch.tensor([n / max(len(text), 1) for n, text in zip(lost, texts)])
        return batch

    def loader(self, order, workers):
        """A DataLoader of the batches with the numbers in `order`."""
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=order, num_workers=workers,
                                           pin_memory=torch.cuda.is_available(), worker_init_fn=keep_running)

def check_numbers(flags, may_be_0=''):
    """Raises ValueError for a flag, {name: value}, that is negative, NaN, or 0 if it is not named in `may_be_0`."""
    for name, value in flags.items():
        if type(value) in (int, float) and (not value >= 0 or value == 0 and name not in may_be_0.split()):
            raise ValueError(f'--{name} {value}: must be {"at least" if name in may_be_0.split() else "above"} 0')

def main(argv=None):
    """The command line: prepare() into a folder that does not exist yet."""
    parser = argparse.ArgumentParser(description='Tokenise documents to segments on disk.', allow_abbrev=False)
    add = parser.add_argument
    add('source', help='finewiki, pydoc, or a file or folder of .txt .md .py .jsonl .parquet')
    add('--out', required=True, help='folder to make')
    add('--model', default='tiny', help='whose tokenizer: a hub id or folder; tiny: bytes (default)')
    add('--context', type=int, default=1000, help='context tokens in a segment (default 1000)')
    add('--continuation', type=int, default=1000, help='tokens that follow it (default 1000)')
    add('--train_segments', type=int, help='at most this many (default: all; the paper: 500000)')
    add('--val_segments', type=int, help='at most this many (default: a tenth; the paper: 10000)')
    add('--field', help='the field of a record with its text (default: text, or the one with most text)')
    args = parser.parse_args(argv)
    check_numbers(vars(args))
    check(not Path(args.out).exists(), f'{args.out}: exists already')
    args.tokenizer = tokenizer_of(vars(args).pop('model'))
    prepare(**vars(args))

if __name__ == '__main__':
    run_main(main)
