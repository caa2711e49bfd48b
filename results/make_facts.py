"""A corpus that asks for facts: python results/make_facts.py FILE.jsonl, then data.py with --context 128 --continuation 128.

Each document is 256 bytes: words that mean nothing, but for two pairs like "K=27" in its first half, which come back in the second.
Who has the whole context can copy them, who has the end of it cannot; and as the words between are as hard for both, their
perplexities differ much less than their losses on the pairs.
"""
import json
import random
import sys

FILLER = 'the red sun sets on an old wall and no one goes by while rain falls over it'.split()


def filler(rng, length):
    text = ''
    while len(text) < length:
        text += rng.choice(FILLER) + ' '
    return text[:length - 1] + ' '


if __name__ == '__main__':
    rng = random.Random(0)
    with open(sys.argv[1], 'w', encoding='utf-8') as f:
        for _ in range(10_000):
            pairs = ''.join(f'{name}={rng.randrange(10, 100)} ' for name in rng.sample('ABCDEFGHIJKLMNOPQRSTUVWXYZ', 2))
            halves = [filler(rng, 20) + pairs + filler(rng, 108 - len(pairs)) for _ in range(2)]
            f.write(json.dumps({'text': ''.join(halves)}) + '\n')
