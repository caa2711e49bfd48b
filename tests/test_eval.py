"""The table, the picture, the mask, the edit distance, and reading a page."""
import argparse
import math
import random
import time

import pytest
import torch
from matplotlib import pyplot
from PIL import Image
import eval as evaluation
from conftest import ROOT, said
from data import Batches, prepare
from decoder import Autoencoder
from load_deepseek import PRESETS, load, load_run, released_tensors, save, tokenizer_of

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A corpus and five untrained runs on it, two of them lm with the whole context and with none."""
    root = tmp_path_factory.mktemp('runs')
    prepare('pydoc', root / 'data', tokenizer_of('tiny'), 32, 32, 40, 12)
    for name, regime, objective, settings in (
            ('whole', 'text', 'lm', {}), ('none', 'text', 'lm', {'text_context_tokens': 0}), ('pool', 'meanpool', 'lm', {}),
            ('conv', 'conv1d_residual', 'reconstruction', {}), ('page', 'vision', 'reconstruction', {'vision_mode': '128'})):
        model, _, config = load('tiny', regime, 32, objective, **settings)
        config['run']['data'] = str(root / 'data')
        save(released_tensors(model, config['run']['regime']), config, root / name)
    return root


@pytest.mark.parametrize('file', ['nowhere/a.png', 'a.doc'])
def test_a_picture_that_cannot_be_written_costs_no_row(runs, tmp_path, capsys, file):
    with pytest.raises(ValueError, match='cannot be written'):
        evaluation.main([str(runs / 'pool'), '--plot', str(tmp_path / file), '--generate', '0', '--segments', '2'])
    assert f'| {runs / "pool"} |' in capsys.readouterr().out


def table(out):
    """The rows of a Markdown table: {name of the run's folder: {column: text}}."""
    header, _, *lines = [line.strip('| ').split(' | ') for line in out.splitlines() if line.startswith('|')]
    assert all(len(line) == len(header) for line in lines)
    return {line[0].rsplit('/', 1)[1]: dict(zip(header, map(str.strip, line))) for line in lines}


def test_a_regime_has_one_colour(tmp_path):
    row = lambda regime, data, ppl: {'objective': 'lm', 'data': data, 'regime': regime, 'ratio': 2.0, 'PPL': ppl, 'setting': '', 'args': {}, 'positions': 2, 'KV saved': 1}
    evaluation.plot([row('meanpool', 'a', 3.0), row('text', 'a', 2.0), row('text', 'b', 2.0)], tmp_path / 'a.png')
    (pool, _, text, _), (other, _) = (axis.lines for axis in pyplot.gcf().axes)
    assert text.get_label() == other.get_label() == 'truncation'
    assert text.get_color() == other.get_color() != pool.get_color()


def test_the_table(runs, tmp_path, capsys):
    names = ['whole', 'none', 'pool', 'conv', 'page', 'elsewhere']
    prepare(str(ROOT / 'encoders.py'), runs / 'code', tokenizer_of('tiny'), 32, 32, 40, 12)
    model, _, config = load(str(runs / 'whole'), 'text', 32, 'lm')
    config['run']['data'] = str(runs / 'code')
    save(released_tensors(model, 'text'), config, runs / 'elsewhere')
    capsys.readouterr()
    evaluation.main([str(runs / name) for name in names] + ['--plot', str(tmp_path / 'a.png'), '--generate', '3'])
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == names and out.count('--- original') == 18 and 'CER' not in rows['pool']               # too few passages for it
    assert [rows[name]['positions'] for name in names] == ['33', '1', '10', '10', '8', '33']
    assert [rows[name]['ratio'] for name in names] == ['0.97', '32.0', '3.2', '3.2', '4.0', '0.97']
    assert [rows[name]['data'] for name in names] == ['data'] * 5 + ['code']
    assert rows['pool']['setting'] == 'compression_window_size 4' and rows['none']['setting'] == 'text_context_tokens 0'
    pages = Batches(runs / 'data', 'val', 12, tokenizer_of('tiny'), 128)[0]
    assert float(rows['page']['not drawn']) == pytest.approx(pages['lost'].mean().item(), abs=6e-4) and rows['pool']['not drawn'] == ''
    # keys and values of 128 channels in 4 layers at 2 bytes, for each position that the memory is shorter
    assert int(rows['pool']['KV saved']) == (33 - 10) * 2 * 4 * 128 * 2 and float(rows['page']['ms']) > 0
    with torch.no_grad():
        for name in ('pool', 'conv'):
            model = load_run(runs / name)[0].eval()
            losses, hits, _ = model(Batches(runs / 'data', 'val', 12, tokenizer_of('tiny'))[0])
            assert float(rows[name]['PPL']) == pytest.approx(losses.mean().exp().item(), abs=2e-3)
            assert float(rows[name]['accuracy']) == pytest.approx(hits.float().mean().item(), abs=6e-4)
    with Image.open(tmp_path / 'a.png') as image:
        assert image.width > 1000
    prepare('pydoc', tmp_path / 'other', tokenizer_of('tiny'), 64, 32, 10, 2)
    with pytest.raises(ValueError, match='made for context 64, not 32'):
        evaluation.row_of(str(runs / 'pool'), arguments(data=str(tmp_path / 'other')), CPU)
    assert len(evaluation.row_of(str(runs / 'pool'), arguments(segments=6, generate=20), CPU)[1]) == 6
    assert 'only 6 passages' in capsys.readouterr().err
    result = evaluation.row_of(str(runs / 'page'), arguments(font_size=9), CPU)[0]
    assert 'font_size 9' in result['setting'] and str(result['PPL']) != rows['page']['PPL']


def arguments(**changes):
    return argparse.Namespace(**dict(data=None, segments=None, generate=0, font=None, font_size=None, line_spacing=None,
                                     batch_size=5, workers=0) | changes)


def test_positions_and_ratios_of_the_paper(monkeypatch):
    """278 and 78 positions take the prompt of four tokens; 252 and 65 none."""
    monkeypatch.setitem(PRESETS, 'thin', {**PRESETS['tiny'], 'vision_config': {'image_size': 1024, 'width': {
        'sam_vit_b': {'width': 12, 'layers': 1, 'heads': 1, 'global_attn_indexes': []},
        'clip-l-14-224': {'width': 16, 'layers': 1, 'heads': 1}}}})
    batch = {'context': torch.zeros(1, 1000, dtype=torch.long)}
    for regime, settings, positions, ratio in (
            ('vision', {'vision_mode': 'base', 'vision_prompt': 'four'}, 278, 3.60), ('meanpool', {}, 252, 3.97),
            ('vision', {'vision_mode': 'tiny', 'vision_prompt': 'four'}, 78, 12.82),
            ('conv1d_residual', {'compression_target': 250}, 252, 3.97), ('conv1d_residual', {'compression_target': 63}, 65, 15.38),
            ('text', {'text_context_tokens': 277}, 278, 3.60), ('meanpool', {'compression_window_size': 100}, 12, 83.33),
            ('conv1d_residual', {'compression_target': 8}, 10, 100.0)):
        model, _, _ = load('thin', regime, 1000, **settings)
        size = getattr(model.encoder, 'image_size', 64)
        prefix = model.prefix({**batch, 'image': torch.zeros(1, 3, size, size)})
        assert prefix.shape[1] == positions and round(1000 / positions, 2) == ratio and torch.isfinite(prefix).all()


def test_sums_are_over_all_tokens_that_count(runs):
    """Loss, perplexity and accuracy by hand, at any batch size and split among processes, with a mask and without."""
    model, tokenizer, _ = load('tiny', 'meanpool', 32, 'lm')
    third = lambda batch: batch['continuation'] % 3 == 0
    whole = Batches(runs / 'data', 'val', 12, tokenizer)[0]
    with torch.no_grad():
        losses, hits, _ = model.eval()(whole)
    for batch_size in (1, 5, 12):
        batches = Batches(runs / 'data', 'val', batch_size, tokenizer)
        for mask in (None, third):
            result = evaluation.evaluate(model, batches, CPU, mask=mask)
            counted = mask(whole) if mask else torch.ones_like(hits)
            loss = losses[counted].mean().item()
            assert list(result) == ['loss', 'ppl', 'accuracy']
            assert list(result.values()) == pytest.approx([loss, math.exp(loss), hits[counted].float().mean().item()], rel=1e-4, abs=1e-5)
    page, pages = load_run(runs / 'page')[0], Batches(runs / 'data', 'val', 5, tokenizer, 128)
    lost = torch.cat([pages[n]['lost'] for n in range(3)])
    assert 0.1 < lost.mean() and evaluation.evaluate(page, pages, CPU)['lost'] == pytest.approx(lost.mean().item(), abs=1e-6)


def test_edit_distance_and_passages(capsys):
    rng = random.Random(0)

    def by_definition(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0]))
    for _ in range(60):
        a, b = (''.join(rng.choices('abc', k=rng.randrange(6))) for _ in range(2))
        assert evaluation.edit_distance(a, b) == by_definition(a, b), (a, b)
    assert evaluation.edit_distance('kitten', 'sitting') == 3
    evaluation.show('one\ntwo', 'on\ntwos', 'lm')
    assert capsys.readouterr().out == '\n--- original, and under it its lm\none⏎two\non⏎twos\n\n'
    evaluation.show('a' * 12, 'b' * 7, 'lm', width=5)
    assert capsys.readouterr().out.split('lm\n')[1] == 'aaaaa\nbbbbb\n\naaaaa\nbb\n\naa\n\n\n'


@pytest.mark.parametrize('mode, vectors', [('tiny', 73), ('small', 111), ('base', 273), ('large', 421)])
def test_reading_a_page(released, tmp_path, monkeypatch, capsys, mode, vectors):
    """[BOS], the image's vectors, the prompt's tokens; the small squares stretch the page, the large ones pad it with grey."""
    Image.new('RGB', (200, 100), (255, 0, 0)).save(tmp_path / 'page.png')
    seen = {}
    prefix = Autoencoder.prefix

    def spy(self, batch):
        x = prefix(self, batch)
        seen.update(batch=batch, prompt=self.prompt, positions=x.shape[1])
        return x
    monkeypatch.setattr(Autoencoder, 'prefix', spy)
    evaluation.main(['--model', str(released), '--image', str(tmp_path / 'page.png'), '--vision_mode', mode, '--max_new_tokens', '5',
                     '--prompt', 'Free OCR. '])
    S = {'tiny': 512, 'small': 640, 'base': 1024, 'large': 1280}[mode]
    image = seen['batch']['image'][0].permute(1, 2, 0)
    assert image.shape == (S, S, 3) and seen['batch']['context'].shape == (1, 0)
    assert seen['prompt'] == tokenizer_of(str(released)).encode_ordinary('\nFree OCR.') and seen['positions'] == 1 + vectors + len(seen['prompt'])
    assert image[S // 2, S // 2].tolist() == [255, 0, 0]
    assert image[2, S // 2].tolist() == ([255, 0, 0] if S <= 640 else [127, 127, 127])


def test_a_page_that_cannot_be_read(released, tmp_path, capsys):
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'text.png').write_text('no image')
    Image.new('1', (30_000, 30_000)).save(tmp_path / 'huge.png')
    Image.new('1', (30, 30)).save(tmp_path / 'good.png')
    for flags in (['--image', 'empty.png'], ['--image', 'text.png'], ['--image', 'huge.png'], ['--image', 'missing.png'],
                  ['--image', 'good.png', '--prompt', '<|nothing|>Read.'], ['--image', 'good.png', '--vision_mode', '100']):
        line = said(capsys, evaluation.main, ['--model', str(released), *flags[:1], str(tmp_path / flags[1]), *flags[2:]])
        assert any(word in line for word in (f'{flags[1]}: not an image', '<|nothing|>', 'vision_mode 100')), line


def test_generation_is_fast_in_the_length_and_alike_in_any_batch():
    """1000 tokens with the cache are those without, at least 5 times as fast, and take about 4 times as long as 250."""
    model, _, _ = load('tiny', 'meanpool', 32)
    model.eval()
    model.decoder.config.eos_token_id = -1                                    # no row may end early
    batch = {'context': torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(0))}
    one = {'context': batch['context'][:1]}

    def seconds(n):
        start = time.process_time()
        ids = model.generate(one, n)
        return time.process_time() - start, ids
    seconds(20)
    (short, _), (long, ids) = seconds(250), seconds(1000)
    assert long < 8 * short
    with torch.no_grad():
        x = torch.cat([model.prefix(one), model.decoder.embed_tokens(ids[:, :-1])], dim=1)
        assert model.decoder.logits(model.decoder(x)[0][:, -1000:]).argmax(dim=-1).tolist() == ids.tolist()
        start = time.process_time()
        for n in (100, 300, 500, 700, 900):                                   # what a step would cost without a cache
            model.decoder(x[:, :n])
    assert 1000 * (time.process_time() - start) / 5 > 5 * long
    texts = model.generate(batch, 20)
    assert all(torch.equal(texts[i], model.generate({'context': batch['context'][i:i + 1]}, 20)[0]) for i in range(8))
