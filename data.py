"""
Documents to token segments on disk, once; segments to batches, as they are needed.

    python data.py SOURCE --out DIR --model deepseek-ai/DeepSeek-OCR --context 1000
    SOURCE: finewiki | pydoc | a file or folder of .txt .md .py .jsonl .parquet

    DIR/train.bin, val.bin     token ids, uint32; a segment is context + continuation tokens
    DIR/meta.json              the tokenizer, the lengths, and counts of what is in it

About a tenth of the segments is for validation. All segments of a document are on the same side,
unless it is more than a tenth of the corpus. A text that comes again is dropped. Pages are drawn
when a batch is made: 510,000 segments of 2,000 tokens take 4.1 GB on disk, their pages 828 GB.
"""
import argparse
import hashlib
import json
import math
import platform
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from load_deepseek import add_flags, positive, read_json, run_main, tokenizer_of
from render import render_page

KINDS = ('.txt', '.md', '.py', '.jsonl', '.parquet')
FINEWIKI = 'HuggingFaceFW/finewiki'
FORMAT = 'readback corpus, 2'

# ---- documents

def find_files(source):
    """Yield the files of a source in a fixed order, without hidden ones; those of the hub are
    downloaded one by one. Raises ValueError or OSError."""
    if source == 'finewiki':
        names = huggingface_hub.HfApi().list_repo_files(FINEWIKI, repo_type='dataset')
        for name in sorted(names):
            if 'enwiki' in name and name.endswith('.parquet'):
                yield Path(huggingface_hub.hf_hub_download(FINEWIKI, name, repo_type='dataset'))
        return
    root = Path(source)
    if not root.exists():
        raise ValueError(f'{source}: does not exist; --data names the text')
    files = []
    for path in [root, *sorted(root.rglob('*'))]:                   # root may be a file itself
        is_hidden = any(part.startswith('.') for part in path.relative_to(root).parts)
        if path.suffix.lower() in KINDS and path.is_file() and not is_hidden:
            files.append(path)
    if not files:
        raise ValueError(f'{source}: no {" ".join(KINDS)} files')
    yield from files

def texts_of(path, field):
    """Yield the texts of a file, None for one that cannot be read. Raises ValueError for records
    without the field."""
    kind = path.suffix.lower()
    if kind == '.parquet':
        import pyarrow.parquet
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise ValueError(f'no field {field}, only {", ".join(file.schema_arrow.names)}; '
                             'choose one with data.py --field')
        for batch in file.iter_batches(256, columns=[field]):
            for value in batch.column(0):
                try:
                    yield value.as_py()
                except (ValueError, OverflowError):         # no UTF-8, a date beyond Python's
                    yield None
    elif kind == '.jsonl':
        for line in open(path, 'rb'):
            line = line.strip(b'\xef\xbb\xbf \t\r\n')       # a byte-order mark, white space
            if not line:
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and field not in record:
                raise ValueError(f'a record has no field {field}, only {", ".join(record)}; '
                                 'choose one with data.py --field')
            yield record[field] if isinstance(record, dict) else None
    else:
        try:
            text = path.read_bytes().decode('utf-8-sig')
        except UnicodeDecodeError:
            text = None
        yield text

def documents(source, field='text'):
    """Yield (where it is from, text) for the documents of a source, None for a text that cannot be
    read. Raises ValueError or OSError."""
    if source == 'pydoc':
        from pydoc_data.topics import topics
        kept = []                           # the manual's topics repeat each other
        for text in sorted(topics.values(), key=len, reverse=True):
            body = text.split('***\n')[-1].strip()          # without its title
            if not any(body in longer for longer in kept):
                kept.append(text)
                yield source, text
        return
    for path in find_files(source):
        try:
            for text in texts_of(path, field):
                # UTF-16 may pass for UTF-8, but it is full of null characters.
                is_text = isinstance(text, str) and '\0' not in text
                yield path, text if is_text else None
        except (ValueError, OSError) as e:
            raise ValueError(f'{path}: {e}') from e

# ---- tokens

def encode(tokenizer, text):
    """Text to token ids (n,) uint32. A lone surrogate, which UTF-8 cannot hold, becomes '?'. A byte
    that the tokenizer lacks is dropped, as by the library itself."""
    tokenizer.encode_special_tokens = True  # their names in a text are text
    text = text.encode('utf-8', errors='replace').decode('utf-8')
    ids = []
    # In pieces, since the library takes 700 bytes a token while it works. A word may be cut.
    for start in range(0, len(text), 100_000):
        piece = text[start:start + 100_000]
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return np.array(ids, np.uint32)

def fingerprint(tokenizer):
    """Identifies a tokenizer: a hash of all that tokenizer.json says."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]

# ---- a corpus

def split(sizes, train_limit, val_limit, share):
    """Assign documents to training and validation. sizes: how many segments each document has.
    Returns [(side, first segment, how many)]. A document goes to validation whenever that side has
    less than its share of what has been assigned."""
    book = sum(sizes) // 10                 # longer ones are cut into pieces, for both sides
    piece = max(sum(sizes) // 40, 1)
    counts = {'train': 0, 'val': 0}
    pieces = []
    first = 0
    for size in sizes:
        step = piece if size > book else max(size, 1)               # range() takes no step of 0
        for start in range(0, size, step):
            side = 'train'
            wanted = min(val_limit, share * (counts['train'] + counts['val']))
            if counts['val'] < wanted:
                side = 'val'
            limit = train_limit if side == 'train' else val_limit
            n = int(min(step, size - start, limit - counts[side]))      # the limit may be inf
            pieces.append((side, first + start, n))
            counts[side] += n
        first += size
    return pieces

def repeated(val, train):
    """Which segments of val (n, length) occur in train (m, length), at any offset: bool (n,). And
    which segments of train they overlap there: bool (m,)."""
    train_bytes = train.tobytes()
    segments = [row.tobytes() for row in val]
    size = len(segments[0])                 # bytes in a segment
    # Compare short beginnings first. Only where they agree, look at the whole segment.
    probe = min(64, size)
    beginnings = {segment[:probe] for segment in segments}
    wanted = set(segments)
    found = set()
    in_train = np.zeros(len(train), bool)
    for i in range(0, len(train_bytes), train.itemsize):
        if train_bytes[i:i + probe] in beginnings:
            segment = train_bytes[i:i + size]
            if segment in wanted:
                found.add(segment)
                in_train[i // size] = True  # the row where it begins, and that where it ends
                in_train[(i + size - 1) // size] = True
    in_val = np.array([segment in found for segment in segments])
    return in_val, in_train

def write_segments(source, field, tokenizer, length, limit, path):
    """Write the segments of a source to a file, document by document, until there are more than
    `limit` -> how many each document has, and what became of the documents: a dict of counts."""
    sizes, total, seen = [], 0, set()
    counts = {'documents': 0, 'seen before': 0, 'unreadable': 0}
    with open(path, 'wb') as file:
        for place, text in tqdm(documents(source, field), desc=source, unit=' documents'):
            if text is None:
                counts['unreadable'] += 1
                if counts['unreadable'] == 1:
                    tqdm.write(f'{place}: left out, as it is neither UTF-8 text nor JSON; any more '
                               'are only counted')
                continue
            words = hash(' '.join(text.split()))        # copies may differ in white space
            if words in seen:
                counts['seen before'] += 1
                continue
            seen.add(words)
            counts['documents'] += 1
            ids = encode(tokenizer, text)
            n = len(ids) // length
            file.write(ids[:n * length].tobytes())
            sizes.append(n)
            total += n
            if total > limit:
                break
    return sizes, counts

def prepare(source, out, tokenizer, context, continuation, train_segments=None, val_segments=None,
            field='text'):
    """Make the corpus folder `out`, which gets its name only when it is complete. Without numbers
    of segments it has all there are. Raises ValueError or OSError."""
    out = Path(out)
    length = context + continuation
    train_limit = train_segments or np.inf
    val_limit = val_segments or np.inf
    share = 0.1
    if train_segments is not None:
        val_limit = val_segments or math.ceil(train_segments / 9)   # a tenth of the two together
        share = val_limit / (train_limit + val_limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{out.name}.tmp', dir=out.parent) as temporary:
        folder = Path(temporary, 'corpus')
        folder.mkdir()
        everything = Path(temporary, 'all.bin')
        some_more = 1.2 * (train_limit + val_limit)     # split() does not take every last segment
        sizes, counts = write_segments(source, field, tokenizer, length, some_more, everything)
        total = sum(sizes)
        report = ', '.join(f'{n:,} {name}' for name, n in counts.items())
        if total < 2:
            raise ValueError(f'{source}: too short for two segments of {length} tokens ({report})')

        # the two sides
        segments = np.memmap(everything, np.uint32).reshape(total, length)
        rows = {'train': [], 'val': []}
        for side, first, n in split(sizes, train_limit, val_limit, share):
            rows[side].extend(range(first, first + n))
        train = segments[rows['train']]
        val = segments[rows['val']]
        # Validation drops what is on both sides. If that is most of it, training drops it instead,
        # unless too little of it would be left. If it is all of validation, both keep it.
        in_val, in_train = repeated(val, train)
        most_of_val = in_val.sum() > len(val) / 2
        enough_left = (~in_train).sum() >= 4 * len(val)
        if most_of_val and enough_left:
            train = train[~in_train]
            fate = f'{in_train.sum():,} of training that overlap them are left out'
        elif not in_val.all():
            val = val[~in_val]
            fate = 'left out'
        else:
            fate = 'kept, as there are no others'
        train.tofile(folder / 'train.bin')
        val.tofile(folder / 'val.bin')
        meta = identity_of(tokenizer, context, continuation)
        meta |= {'source': source, 'train': len(train), 'val': len(val), **counts}
        (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
        try:
            folder.replace(out)
        except OSError:
            if not out.exists():            # if it does, another process was faster
                raise
    print(f'{out}: {len(train):,} segments for training, {len(val):,} for validation; {report}')
    if in_val.any():
        print(f'{in_val.sum():,} validation segments stand in the training text: {fate}')

def identity_of(tokenizer, context, continuation):
    """What makes a corpus fit: meta.json has to say the same of the tokenizer and the lengths."""
    return {
        'format': FORMAT,
        'tokenizer': fingerprint(tokenizer),
        'context': context,
        'continuation': continuation,
    }

def version_of(source):
    """A value that changes when a source's texts change: a version, or the files' times."""
    if source == 'pydoc':
        return platform.python_version()
    if source == 'finewiki':
        return huggingface_hub.HfApi().dataset_info(FINEWIKI).sha
    return [(str(path), path.stat().st_mtime_ns) for path in find_files(source)]

def open_corpus(source, tokenizer, context, continuation):
    """The folder and the meta.json of a corpus. `source` is a corpus that data.py made, or a source
    of text, whose corpus is under corpora/ and is made if it is not there. Raises ValueError or
    OSError."""
    wanted = identity_of(tokenizer, context, continuation)
    folder = Path(source)
    meta_path = folder / 'meta.json'
    is_corpus = meta_path.exists() and 'format' in read_json(meta_path)
    if not is_corpus:
        version = version_of(source)
        key = hashlib.sha256(json.dumps([wanted, version]).encode()).hexdigest()[:8]
        name = folder.resolve().name
        if source == 'pydoc':
            name = f'python_{version}_manual'
        folder = Path('corpora', f'{name}-{key}')
        if not folder.exists():
            prepare(source, folder, tokenizer, context, continuation)
    meta = read_json(folder / 'meta.json')
    for name, value in wanted.items():
        if meta.get(name) != value:
            raise ValueError(f'{folder}: made for {name} {meta.get(name)}, not {value}')
    for side in ('train', 'val'):
        path = folder / f'{side}.bin'
        n_bytes = meta[side] * (context + continuation) * 4
        if not path.exists() or path.stat().st_size != n_bytes:
            raise ValueError(f'{path}: missing or damaged (should have {n_bytes} bytes)')
    return folder, meta

# ---- batches

@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """The order of n segments in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)

class Batches(Dataset):
    """Item i is batch i of one side of a corpus, a function of seed and i alone:

        'context', 'continuation'    (B, T) token ids, int64
        'image'                      (B, 3, S, S) uint8, the contexts as pages, if image_size is S
        'lost'                       (B,) the share of their characters that is not on the pages

    page: keywords of render_page(). Training takes a new permutation each epoch. Validation is in
    order; with a limit it takes segments evenly from the whole."""

    def __init__(self, folder, side, batch_size, tokenizer, image_size=None, seed=0, limit=None,
                 **page):
        self.path = Path(folder, f'{side}.bin')
        self.meta = read_json(Path(folder, 'meta.json'))
        self.side = side
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.page = page
        self.n = self.meta[side]
        if limit is not None:
            self.n = min(limit, self.n)

    def __len__(self):
        return math.ceil(self.n / self.batch_size)

    def rows(self, i):
        """The numbers of the segments of batch i."""
        rows = []
        for position in range(i * self.batch_size, (i + 1) * self.batch_size):
            epoch, k = divmod(position, self.n)
            if self.side == 'train':
                rows.append(permutation(self.n, self.seed, epoch)[k])
            elif epoch == 0:                # validation ends after one pass
                rows.append(k * self.meta['val'] // self.n)             # self.n rows, evenly spaced
        return rows

    def __getitem__(self, i):
        T = self.meta['context']
        shape = (self.meta[self.side], T + self.meta['continuation'])
        segments = np.memmap(self.path, np.uint32, 'r', shape=shape)
        ids = torch.from_numpy(segments[self.rows(i)].astype(np.int64))     # (B, T + continuation)
        batch = {'context': ids[:, :T].contiguous(), 'continuation': ids[:, T:].contiguous()}
        if self.image_size is None:
            return batch
        pages, lost = [], []
        for row in batch['context'].tolist():
            text = self.tokenizer.decode(row, skip_special_tokens=False)
            # The context may begin or end inside a character, of which the rest is left out.
            text = ' '.join(text.strip('\ufffd').split())
            page, _, _, missing = render_page(text, self.image_size, **self.page)
            pages.append(np.asarray(page))                                  # (S, S, 3)
            lost.append(missing / max(len(text), 1))
        batch['image'] = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2).contiguous()
        batch['lost'] = torch.tensor(lost)
        return batch

    def loader(self, order, workers):
        """A DataLoader of the batches with the numbers in `order`."""
        return DataLoader(self, batch_size=None, sampler=order, num_workers=workers,
                          pin_memory=torch.cuda.is_available())

@dataclass(kw_only=True)
class Flags:
    """out: folder to make
    model: the model whose tokenizer is used: a hub id, a folder, or tiny (bytes)
    context: context tokens in a segment
    continuation: tokens in a segment that follow the context
    train_segments: at most this many (default: all; the paper has 500000)
    val_segments: at most this many (default: a tenth of all; the paper has 10000)
    field: the field of a record that has its text"""
    out: str = None
    model: str = 'tiny'
    context: positive = 1000
    continuation: positive = 1000
    train_segments: positive = None
    val_segments: positive = None
    field: str = 'text'

def main(argv=None):
    """The command line: prepare() into a folder that does not exist yet."""
    parser = argparse.ArgumentParser(description='Tokenise documents to segments on disk.')
    parser.add_argument('source', help=f'finewiki, pydoc, or a file or folder of {" ".join(KINDS)}')
    add_flags(parser, Flags)
    args = vars(parser.parse_args(argv))
    if args['out'] is None or Path(args['out']).exists():
        parser.error(f'--out {args["out"]}: name a folder that does not exist yet')
    tokenizer = tokenizer_of(args.pop('model'))
    prepare(tokenizer=tokenizer, **args)

if __name__ == '__main__':
    run_main(main)
