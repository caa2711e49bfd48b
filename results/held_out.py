"""
A corpus whose validation text neither results/reader nor any run on the corpus was trained on.

    python results/held_out.py enwiki.jsonl heldout 2>&1 | tee heldout.txt

enwiki.jsonl has an article a line, as {"text": ...}. It is what results/reader.py trained on,
except for every twentieth article. Here, too, the runs train on the others and validate on these.

A segment is 128 bytes of context and the 128 bytes of continuation that follow. A validation
segment is dropped if its context or its continuation occurs anywhere in a training article, also
across two segments, or if another validation segment has the same text. The counts are printed.
The last ones are of what was written, and must be 0.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import identity_of                                    # noqa: E402
from load_deepseek import tokenizer_of                        # noqa: E402

CONTEXT = 128
LENGTH = 256                   # bytes of context and continuation together
FIRST_BYTE = 3                 # byte b is token 3 + b: BOS, EOS and PAD come before


def read_articles(path):
    """The texts of training and of held-out articles, as bytes, each text once. A text that both
    sides have is for training."""
    training, held_out = {}, {}                               # dicts keep the order, and a key once
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file):
            text = json.loads(line)['text'].encode('utf-8', errors='replace')
            if number % 20 == 0:                              # as in results/reader.py
                held_out[text] = number
            else:
                training[text] = number
    print(f'{number + 1:,} articles')
    print(f'{len(training):,} different ones for training, {sum(map(len, training)):,} bytes')
    both = len(training.keys() & held_out.keys())
    print(f'{len(held_out):,} different ones held out, {both} of them dropped: training has them')
    return list(training), [text for text in held_out if text not in training]


def segments_of(text):
    """A text cut into segments of LENGTH bytes. What is left at the end is not used."""
    return [text[i:i + LENGTH] for i in range(0, len(text) - LENGTH + 1, LENGTH)]


def spread(items, n):
    """n of the items, evenly from the whole list, or all if there are fewer."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def occurs(segment, haystack):
    """Whether the context or the continuation is in the haystack. If all of it is, both are."""
    return segment[:CONTEXT] in haystack or segment[CONTEXT:] in haystack


def validation_segments(articles, haystack, n):
    """n segments spread evenly over the articles. None stands in the haystack, no two are equal."""
    each = -(-n // len(articles)) + 2                         # two to spare
    candidates = [segment for text in articles for segment in spread(segments_of(text), each)]
    kept, in_training, twice = {}, 0, 0
    for segment in candidates:
        if segment in kept:
            twice += 1
        elif occurs(segment, haystack):
            in_training += 1
        else:
            kept[segment] = True
    print(f'{len(candidates):,} candidates for validation, {each} or fewer from an article')
    print(f'{twice} dropped because another candidate has the same text')
    print(f'{in_training} dropped because context or continuation is in a training article')
    if len(kept) < n:
        raise ValueError(f'only {len(kept)} segments are left, fewer than {n}')
    return spread(list(kept), n)


def write(path, segments):
    """The segments as token ids, uint32, one after another."""
    ids = np.frombuffer(b''.join(segments), dtype=np.uint8).astype(np.uint32) + FIRST_BYTE
    ids.tofile(path)


def main():
    parser = argparse.ArgumentParser(description='A corpus with every twentieth article held out.')
    parser.add_argument('source', help='the .jsonl file of articles')
    parser.add_argument('out', help='folder to make')
    parser.add_argument('--val_segments', type=int, default=2000)
    args = parser.parse_args()
    out, tokenizer = Path(args.out), tokenizer_of('tiny')

    training, held_out = read_articles(args.source)
    haystack = b'\0'.join(training)
    train = [segment for text in training for segment in segments_of(text)]
    val = validation_segments(held_out, haystack, args.val_segments)

    out.mkdir(parents=True)
    write(out / 'train.bin', train)
    write(out / 'val.bin', val)
    meta = {
        **identity_of(tokenizer, CONTEXT, LENGTH - CONTEXT),
        'source': Path(args.source).name,
        'train': len(train),
        'val': len(val),
        'documents': len(training) + len(held_out),
    }
    (out / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')

    # Counted once more, in what was written.
    ids = np.fromfile(out / 'val.bin', dtype=np.uint32) - FIRST_BYTE
    val = segments_of(ids.astype(np.uint8).tobytes())
    whole = sum(segment in haystack for segment in val)
    half = sum(occurs(segment, haystack) for segment in val)
    print(f'{out}: {len(train):,} segments for training, {len(val):,} for validation')
    print(f'{len(val) - len(set(val))} validation segments have the text of another one')
    print(f'{half} have a context or a continuation that is in a training article')
    print(f'{whole} validation segments are in a training article')


if __name__ == '__main__':
    main()
