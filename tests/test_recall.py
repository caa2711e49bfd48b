"""The measure of factual recall in results/."""

import torch
from conftest import ROOT
from data import prepare
from load_deepseek import load, released_tensors, save, tokenizer_of
import factual_recall

def test_fact_tokens():
    tokenizer = tokenizer_of('tiny')
    ids = lambda text: torch.tensor([tokenizer.encode(text).ids])
    context = 'the key Ada is 1815, the word zeugma and the Turing of late'
    continuation = 'so Ada had 1815 the zeugma: Ada, 99 Turing key'
    batch = {'context': ids(context), 'continuation': ids(continuation)}
    mask = factual_recall.fact_tokens(batch, tokenizer, 14, {b'the', b'key', b'so'})
    marked = ''.join(c if m else '_' for c, m in zip(continuation, mask[0]))
    assert marked == '___Ada_____1815_____zeugma____________________'        # known, late and second mentions do not count
    assert factual_recall.words(tokenizer, ids('né a1')[0].tolist()) == [(b'n\xc3\xa9', 0, 3), (b'a1', 4, 6)]

def test_command(tmp_path, capsys):
    """A model that knows nothing has ln 259 nats or so on facts and on the rest."""
    prepare('pydoc', tmp_path / 'data', tokenizer_of('tiny'), 128, 128, 100, 40)
    model, _, config = load('tiny', 'meanpool', 128, 'lm')
    config['run']['data'] = str(tmp_path / 'data')
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    factual_recall.main([str(tmp_path / 'run')])
    run, facts, rest = capsys.readouterr().out.splitlines()[-1].strip('| ').split(' | ')
    assert run == str(tmp_path / 'run') and 5 < float(facts) < 6.5 and 5 < float(rest) < 6.5 and facts != rest
