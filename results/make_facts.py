"""
A corpus that asks for facts.

    python results/make_facts.py facts.jsonl
    python data.py facts.jsonl --out facts --model results/reader --context 128 --continuation 128

Each document is 256 bytes of words that mean nothing, with two pairs such as "K=27" in its first half that come back in
its second half. A model that sees the whole context can copy them; one that sees only its end cannot. The words between
are equally hard for both, so their perplexities differ much less than their losses on the pairs.
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
