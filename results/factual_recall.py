"""
Factual recall: does a memory still hold the fact that the continuation needs?

    python results/factual_recall.py out/meanpool_lm out/text_lm --kept 64

A fact is a word that has a digit, begins with a capital, or is rare (in at most one in a hundred of the contexts). Its
tokens count where it first occurs in the continuation, if it occurs in the context but not in the last `--kept` tokens
of it. Truncation to those tokens has lost the answer; the whole context still has it. For languages with spaces between words.
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'examples')]
import llm_encoder                                            # noqa: E402, F401 (it registers)
import perceiver                                              # noqa: E402, F401
from data import Batches                                      # noqa: E402
from eval import autocast, pick_device, to_device             # noqa: E402
from load_deepseek import load_run, run_main                  # noqa: E402

# Letters and digits in UTF-8. What begins with C2 or E2 is punctuation and symbols.
WORD = re.compile(rb'(?:[0-9A-Za-z]|[\xc3-\xe1\xe3-\xf4][\x80-\xbf]+)+')

# Byte-level BPE writes a byte as a character: a printable one as itself, the others from U+0100 on.
ALPHABET = ByteLevel.alphabet()
OTHERS = [byte for byte in range(256) if chr(byte) not in ALPHABET]
BYTES = {character: ord(character) if ord(character) < 256 else OTHERS[ord(character) - 256] for character in ALPHABET}

def token_bytes(token):
    """The bytes of a token."""
    return bytes(BYTES[character] for character in token)

def words(tokenizer, ids):
    """The words among tokens, in order: [(word as bytes, its first token, the token after its last)]."""
    pieces = [token_bytes(tokenizer.id_to_token(i)) for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])        # in bytes, as a segment may begin inside a character
    return [(match[0], int(np.searchsorted(ends, match.start(), 'right')), int(np.searchsorted(ends, match.end())) + 1)
            for match in WORD.finditer(b''.join(pieces))]

def common_words(batches, tokenizer):
    """The words in more than one in a hundred of the contexts."""
    counts = Counter()
    for n in range(len(batches)):
        for ids in batches[n]['context'].tolist():
            counts.update({word for word, *_ in words(tokenizer, ids)})
    return {word for word, n in counts.items() if n > batches.n / 100}

def fact_tokens(batch, tokenizer, kept, common):
    """Which tokens of each continuation belong to a fact: bool (B, T)."""
    mask = torch.zeros(batch['continuation'].shape, dtype=torch.bool)
    for row, (context, continuation) in enumerate(zip(batch['context'].tolist(), batch['continuation'].tolist())):
        cut = max(len(context) - kept, 0)
        early, known = ({word for word, *_ in words(tokenizer, part)} for part in (context[:cut], context[cut:]))
        for word, first, end in words(tokenizer, continuation):
            if word in early - known and (re.search(rb'[0-9]|^[A-Z]', word) or word not in common):
                mask[row, first:end] = True
            known.add(word)
    return mask

def main(argv=None):
    """The command line: a line for each run."""
    parser = argparse.ArgumentParser(description='Loss on fact tokens and on the rest, for language-modelling runs.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run with --objective lm')
    parser.add_argument('--data', help='another corpus (default: what the run was trained on)')
    parser.add_argument('--kept', type=int, help='last context tokens that hold no fact (default: a quarter)')
    parser.add_argument('--batch_size', type=int, default=16, help='segments at once (default 16)')
    args = parser.parse_args(argv)
    device = pick_device('auto')
    print('| run | loss on fact tokens | on the rest |\n|---|---|---|')
    for folder in args.runs:
        model, tokenizer, config = load_run(folder, device)
        run = config['run']
        if run['objective'] != 'lm':
            raise ValueError(f'{folder}: its objective is {run["objective"]}, not lm')
        data, size = args.data or run['data'], getattr(model.encoder, 'image_size', None)
        kept = run['context'] // 4 if args.kept is None else args.kept
        common = common_words(Batches(data, 'val', 1, tokenizer, limit=1000), tokenizer)
        batches = Batches(data, 'val', args.batch_size, tokenizer, size)
        on_facts, on_rest = [], []
        for n in range(len(batches)):
            batch = batches[n]
            with torch.no_grad(), autocast(device):
                losses = model.eval()(to_device(batch, device))[0].cpu()
            is_fact = fact_tokens(batch, tokenizer, kept, common)
            on_facts.append(losses[is_fact])
            on_rest.append(losses[~is_fact])
        losses = [torch.cat(parts).mean().item() for parts in (on_facts, on_rest)]
        print(f'| {folder} | ' + ' | '.join(f'{loss:.3f}' for loss in losses) + ' |')

if __name__ == '__main__':
    run_main(main)
