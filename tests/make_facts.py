"""A corpus that asks for facts: python tests/make_facts.py FILE.jsonl, then data.py with --context 128 --continuation 128.

Each document is 256 bytes. It begins with four pairs like "Kal=274", goes on with words that mean nothing, and in its second
half two of the pairs come back. Who has the whole context can copy them; who has its end cannot; and since the words between
are as hard for both, perplexity hardly tells the two apart.
"""
import json
import random
import sys

FILLER = 'the red sun sets on an old wall and no one goes by while rain falls over it'.split()


def text(rng, length, pairs):
    """Filler of `length` characters, with the pairs strewn in."""
    parts = []
    while len(' '.join(parts)) + sum(len(pair) + 1 for pair in pairs) < length:
        parts.append(rng.choice(FILLER))
    for pair in pairs:
        parts.insert(rng.randrange(1, len(parts)), pair)
    return ' '.join(parts)[:length - 1] + '\n'


def document(rng):
    names = [rng.choice('BDFGKLMNPRSTVZ') + rng.choice('aeiou') + rng.choice('lmnrst') for _ in range(4)]
    pairs = [f'{name}={rng.randrange(100, 1000)}' for name in names]
    start = ' '.join(pairs) + ' '
    return start + text(rng, 128 - len(start), []) + text(rng, 128, rng.sample(pairs, 2))


if __name__ == '__main__':
    rng = random.Random(0)
    with open(sys.argv[1], 'w', encoding='utf-8') as f:
        for _ in range(20_000):
            f.write(json.dumps({'text': document(rng)}) + '\n')
