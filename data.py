"""
Documents to segments on disk, once; segments to batches, as they are needed.

    python data.py SOURCE --out DIR --model deepseek-ai/DeepSeek-OCR --context 1000 --continuation 1000
    SOURCE: finewiki | pydoc | stdlib | a file or folder of .txt .md .py .jsonl .parquet, the text kinds also .xz

    DIR/train.bin, val.bin     token ids, uint16 or uint32, one segment of context + continuation tokens after another
    DIR/meta.json              what they were made from and with, and what was left out

A document gives as many segments as it has whole ones, without overlap, all to the same side of the split. Pages are
drawn when a batch is made: 510,000 segments of 2,000 tokens are 4.1 GB, and 828 GB of PNGs are never stored.
"""
import argparse
import hashlib
import json
import lzma
import math
import re
import signal
import sysconfig
import tempfile
from collections import Counter
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from tqdm import tqdm

from load_deepseek import optional, read_json, tokenizer_of, writing
from render import render_page

KINDS = re.compile(r'\.parquet$|\.(jsonl|txt|md|py)(\.xz)?$')
# A piece of a text, cut behind a line end where there is one: millions of characters alike, given to the tokenizer at
# once, would overflow its stack.
PIECE = re.compile(r'(?s).{1,100000}(?:(?<=\n)|\Z)|.{1,100000}')


def find_files(source):
    """The files of a source, in a fixed order; those of the hub only as they are asked for. Raises SystemExit."""
    if source == 'finewiki':
        repo = {'repo_id': 'HuggingFaceFW/finewiki', 'repo_type': 'dataset'}
        try:
            for name in sorted(huggingface_hub.HfApi().list_repo_files(**repo)):
                if 'enwiki' in name and name.endswith('.parquet'):
                    yield Path(huggingface_hub.hf_hub_download(filename=name, **repo))
            return
        except Exception as e:                 # the hub's client raises whatever its transport does
            raise SystemExit(f'finewiki: not to be had from the data hub ({type(e).__name__})')
    root = Path(sysconfig.get_paths()['stdlib'] if source == 'stdlib' else source)
    files = [path for path in ([root] if root.is_file() else sorted(root.rglob('*')))
             if KINDS.search(path.name) and path.is_file()]
    if source == 'stdlib':
        files = [path for path in files if path.suffix == '.py' and 'site-packages' not in path.parts]
    if not files:
        raise SystemExit(f'{source}: nothing to read; give finewiki, pydoc, stdlib, or a file or folder of text')
    yield from files


def records(path, counts, alone):
    """The records of a file, in order: dicts if all is well, {'text': ...} for what is only text. A text file that is
    `alone` is cut into ten documents or more, so that there are two sides. `counts` gets what cannot be read."""
    if path.suffix == '.parquet':
        for batch in optional('pyarrow.parquet').ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
        return
    with (lzma.open if path.suffix == '.xz' else open)(path, 'rb') as f:
        if '.jsonl' in path.suffixes:
            for line in f:
                try:
                    yield json.loads(line.decode('utf-8', errors='replace'))
                except (ValueError, RecursionError):
                    counts['lines that are not JSON' if line.strip() else 'empty lines'] += 1
        elif b'\0' in (raw := f.read())[:8192]:
            counts['binary files'] += 1
        else:
            text = raw.decode('utf-8', errors='replace')
            size = min(100_000, len(text) // 10 + 1) if alone else len(text) + 1
            yield from ({'text': text[i:i + size]} for i in range(0, len(text), size))


def documents(source, field, counts):
    """The texts of a source, in order. The text of a record is its `field`: by default "text", or the one that is the
    longest in the file's first record. Raises SystemExit for a damaged file."""
    if source == 'pydoc':
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
        return
    for path in find_files(source):
        name = field
        try:
            for record in records(path, counts, alone=path == Path(source)):
                texts = {k: v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
                name = name or ('text' if 'text' in texts else max(texts, key=lambda k: len(texts[k]), default=None))
                counts[f'records without {name or "text"}'] += name not in texts
                yield texts.get(name, '')
        except (OSError, EOFError, ValueError, lzma.LZMAError) as e:
            raise SystemExit(f'{path}: cannot be read ({e})')


@lru_cache
def bytes_without_token(tokenizer):
    """A vocabulary need not have all bytes; tiktoken panics at what it cannot spell."""
    return bytes(set(range(256)) - {token[0] for token in tokenizer.token_byte_values() if len(token) == 1})


def encode(tokenizer, text):
    """Text to token ids (n,) uint32. What UTF-8 cannot hold (a lone surrogate) becomes '?'. Raises ValueError."""
    raw = text.encode('utf-8', errors='replace')
    lacking = bytes_without_token(tokenizer)
    if len(raw.translate(None, lacking)) < len(raw):
        raise ValueError(f'a text has bytes that the tokenizer {tokenizer.name} has no token for, some of {lacking}')
    pieces = PIECE.findall(raw.decode('utf-8')) or ['']
    return np.concatenate([tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])


def encode_all(tokenizer, texts):
    """(text, its ids) of each text, in order, tokenised on all cores, a few million characters ahead."""
    with ThreadPool() as pool:
        while True:
            batch, room = [], 2_000_000
            while room > 0 and (text := next(texts, None)) is not None:
                batch.append(text)
                room -= len(text)
            if not batch:
                return
            try:
                yield from zip(batch, pool.map(lambda text: encode(tokenizer, text), batch))
            except ValueError as e:
                raise SystemExit(str(e))


def fingerprint(tokenizer):
    """Tells tokenizers apart: the name and a hash of all tokens."""
    return f'{tokenizer.name} {hashlib.sha256(b" ".join(tokenizer.token_byte_values())).hexdigest()[:16]}'


def prepare(source, out, tokenizer, context, continuation, train_segments=None, val_segments=None, field=None):
    """Make the folder `out`, which has that name only once all is done. Without numbers of segments: all there are, a
    tenth for validation, as near as whole documents come to it. Raises SystemExit when the source is missing or too
    short, or `out` cannot be written."""
    out, length, counts = Path(out), context + continuation, Counter(train=0, val=0)
    dtype = 'uint16' if tokenizer.n_vocab <= 2 ** 16 else 'uint32'
    if train_segments and not val_segments:
        val_segments = -(-train_segments // 9)                    # a tenth of all is a ninth of the others
    limit = {'train': train_segments or math.inf, 'val': val_segments or math.inf}
    wanted = sum(limit.values())
    share = limit['val'] / wanted if wanted < math.inf else 0.1
    for left in out.parent.glob(f'{out.name}.tmp*'):
        print(f'{left}: another preparation is under way, or was cut short and left this; starting afresh')
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out), tempfile.TemporaryDirectory(prefix=f'{out.name}.tmp', dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        with open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val, \
                tqdm(desc=str(source), total=wanted, unit=' segments') as bar:      # a total of inf: no time left
            for text, ids in encode_all(tokenizer, documents(source, field, counts)):
                # A document goes to validation whenever that has less than its share.
                short = counts['val'] < limit['val'] and counts['val'] < share * (counts['train'] + counts['val'])
                side = 'val' if short or counts['train'] >= limit['train'] else 'train'
                n = int(min(len(ids) // length, limit[side] - counts[side]))
                (val if side == 'val' else train).write(ids[:n * length].astype(dtype).tobytes())
                counts.update({side: n, 'documents': 1, 'characters': len(text), 'documents too short':
                               len(ids) < length, 'tokens left over': len(ids) - n * length})
                rate = counts['characters'] / 1e6 / (bar.format_dict['elapsed'] + 1e-9)
                bar.set_postfix(documents=counts['documents'], MB_per_s=rate, refresh=False)
                bar.update(n)
                if counts['train'] + counts['val'] == wanted:
                    break
        told = ', '.join(f'{value:,} {key}' for key, value in counts.items())
        if not counts['train'] or not counts['val']:
            raise SystemExit(f'{source}: too short: both sides need a segment of {length} tokens; it gave {told}')
        meta = {'source': str(source), 'tokenizer': fingerprint(tokenizer), 'context': context,
                'continuation': continuation, 'dtype': dtype, **counts}
        (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
        if not out.exists():                   # unless another process was faster, with the same result
            folder.replace(out)
    print(f'{out}: {told}')


def corpus_of(source, tokenizer, context, continuation, prepares=True):
    """The folder of a source's segments: the source itself if data.py made it, else one under corpora/ for so many
    context and continuation tokens. If that is not there yet, a process that `prepares` makes it. Raises SystemExit as
    prepare() does, and if the folder was made from another source."""
    if Path(source, 'meta.json').exists():
        return source
    name = '_'.join([re.sub(r'\W+', '_', source), tokenizer.name, str(context), str(continuation)])
    folder = Path('corpora', name)
    if folder.exists() and (other := read_json(folder / 'meta.json')['source']) != source:
        raise SystemExit(f'{folder}: made from {other}; prepare {source} by data.py, under another name')
    if folder.exists() and prepares:
        print(f'{folder}: made before; delete it if {source} is no longer the same')
    elif prepares:
        prepare(source, folder, tokenizer, context, continuation)
    return str(folder)


def open_corpus(folder, tokenizer, context=None, continuation=None):
    """meta.json of a prepared corpus. Raises SystemExit with the reason when the corpus does not fit."""
    meta = read_json(Path(folder, 'meta.json'))
    for name, value in (('tokenizer', fingerprint(tokenizer)), ('context', context), ('continuation', continuation)):
        if value not in (None, meta[name]):
            raise SystemExit(f'{folder}: made for {name} {meta[name]}, not {value}')
    for side in ('train', 'val'):
        path, length = Path(folder, f'{side}.bin'), meta['context'] + meta['continuation']
        size = meta[side] * length * np.dtype(meta['dtype']).itemsize
        if not path.exists() or path.stat().st_size != size:
            raise SystemExit(f'{path}: missing or damaged (should have {size} bytes)')
    return meta


class Batches(torch.utils.data.Dataset):
    """Batch n of one side of a corpus, which is a function of the seed and n alone; item n is a whole batch.

    {'context': (B, T), 'continuation': (B, T)} token ids, int64; with an image_size 'image' (B, 3, S, S) uint8, each
    context as a page, `page` being keywords of render_page. Training takes a new permutation of the segments each
    epoch; validation is in order, ends, and with a limit takes segments evenly from the whole.
    """

    def __init__(self, folder, side, batch_size, tokenizer, image_size=None, seed=0, limit=None, **page):
        self.folder, self.side, self.batch_size, self.seed = Path(folder), side, batch_size, seed
        self.tokenizer, self.image_size, self.page = tokenizer, image_size, page
        self.meta = open_corpus(folder, tokenizer)
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
        T, first, end = self.meta['context'], n * self.batch_size, (n + 1) * self.batch_size
        tokens = np.memmap(self.folder / f'{self.side}.bin', self.meta['dtype'], 'r')
        tokens = tokens.reshape(-1, T + self.meta['continuation'])                           # (segments, tokens)
        rows = [self.segment(i) for i in range(first, end if self.side == 'train' else min(end, self.n))]
        ids = torch.from_numpy(tokens[rows].astype(np.int64))
        batch = {'context': ids[:, :T].contiguous(), 'continuation': ids[:, T:].contiguous()}
        if self.image_size:
            texts = map(self.tokenizer.decode, batch['context'].tolist())
            pages = [np.asarray(render_page(text, self.image_size, **self.page)[0]) for text in texts]
            batch['image'] = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2).contiguous()
        return batch


def outlive_sigterm(_):
    """In a worker: the first SIGTERM, which torchrun sends to all processes of a run, is for the run to obey."""
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))


def number(kind, least, most=math.inf):
    """The type of a flag for argparse: a number of that kind, from `least` to `most`; another is a usage error."""
    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f'{text} is not from {least} to {most}')
        return kind(text)
    parse.__name__ = kind.__name__                                # as argparse calls it in its messages and help
    return parse


positive = number(int, 1)


def main(argv=None):
    """The command line: prepare() into a folder that must not exist yet. Raises SystemExit."""
    parser = argparse.ArgumentParser(description='Tokenise documents to segments on disk.')
    parser.add_argument('source', help='finewiki, pydoc, stdlib, or a file or folder')
    parser.add_argument('--out', required=True, help='folder to make')
    parser.add_argument('--model', default='tiny', help='whose tokenizer: a hub id or folder; tiny: bytes (default)')
    parser.add_argument('--context', type=positive, default=1000, help='context tokens a segment (default 1000)')
    parser.add_argument('--continuation', type=positive, default=1000, help='tokens that follow it (default 1000)')
    parser.add_argument('--train_segments', type=positive, help='at most this many (default: all; the paper: 500000)')
    parser.add_argument('--val_segments', type=positive, help='at most this many (default: a tenth; the paper: 10000)')
    parser.add_argument('--field', help='which of a record is the text (default: text, or the longest in the first)')
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise SystemExit(f'{args.out}: exists already')
    args.tokenizer = tokenizer_of(vars(args).pop('model'))
    prepare(**vars(args))


if __name__ == '__main__':
    main()
