"""The table, the passages and the picture of runs."""
import argparse
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, said
import eval as evaluation
from data import Batches, prepare
from decoder import Autoencoder
from load_deepseek import PRESETS, load, load_run, released_tensors, save, tokenizer_of
import plot_runs

CPU, TOKENIZER = torch.device('cpu'), tokenizer_of('tiny')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A corpus and five untrained runs on it, two of them lm with the whole context and with none."""
    root = tmp_path_factory.mktemp('runs')
    prepare('pydoc', root / 'data', TOKENIZER, 32, 32, 40, 12)
    for name, regime, objective, settings in (
            ('whole', 'text', 'lm', {}), ('none', 'text', 'lm', {'text_context_tokens': 0}), ('a|b', 'meanpool', 'lm', {}),
            ('conv', 'conv1d_residual', 'reconstruction', {}), ('page', 'vision', 'reconstruction', {'vision_mode': '128'})):
        torch.manual_seed(0)
        model, _, config = load('tiny', regime, 32, objective, **settings)
        config['run'] |= {'data': str(root / 'data'), 'args': {'continuation': 32, 'model': 'out/s', 'seed': 3, 'log_steps': 7}}
        save(released_tensors(model, config['run']['regime']), config, root / name)
    return root

def arguments(**changes):
    defaults = dict(data=None, segments=None, generate=0, font=None, font_size=None, line_spacing=None, batch_size=5, workers=0)
    return argparse.Namespace(**defaults | changes)

def test_the_table(runs, tmp_path, capsys):
    names = ['whole', 'none', 'a|b', 'conv', 'page']
    evaluation.main([*(str(runs / name) for name in names), '--generate', '3'])
    out = capsys.readouterr().out
    header, *lines = [line[2:-2].replace('\\|', '/').split(' | ') for line in out.splitlines() if line.startswith('|') and '---' not in line]
    assert all(len(line) == len(header) for line in lines)
    rows = {name: dict(zip(header, map(str.strip, line))) for name, line in zip(names, lines)}
    assert out.count('--- original (top)') == 15 and f'| {runs}/a\\|b |' in out
    assert [rows[name]['positions'] for name in names] == ['33', '1', '10', '10', '8']
    assert [rows[name]['ratio'] for name in names] == ['0.97', '32.00', '3.20', '3.20', '4.00']
    assert [rows[name]['segments'] for name in names] == ['12'] * 5
    assert rows['a|b']['setting'] == 'compression_window_size 4' and rows['none']['setting'] == 'text_context_tokens 0'
    pages = Batches(runs / 'data', 'val', 12, TOKENIZER, 128)[0]
    assert float(rows['page']['not drawn']) == pytest.approx(pages['lost'].mean().item(), abs=6e-4) and rows['a|b']['not drawn'] == ''
    with torch.no_grad():
        for name in ('a|b', 'conv'):
            losses, hits, _ = load_run(runs / name)[0].eval()(Batches(runs / 'data', 'val', 12, TOKENIZER)[0])
            assert float(rows[name]['PPL']) == pytest.approx(losses.mean().exp().item(), abs=2e-3)
            assert float(rows[name]['accuracy']) == pytest.approx(hits.float().mean().item(), abs=6e-4)
    prepare('pydoc', tmp_path / 'other', TOKENIZER, 64, 32, 10, 2)
    with pytest.raises(ValueError, match='made for context 64, not 32'):
        evaluation.row_of(str(runs / 'conv'), arguments(data=str(tmp_path / 'other')), CPU)
    row, texts = evaluation.row_of(str(runs / 'conv'), arguments(segments=6, generate=4), CPU)
    every_third = Batches(runs / 'data', 'val', 12, TOKENIZER)[0]['context'][::3]                # evenly from all, not the first
    assert row['segments'] == 6 and [text for text, _ in texts] == [TOKENIZER.decode(ids.tolist()) for ids in every_third]
    result = evaluation.row_of(str(runs / 'page'), arguments(font_size=9), CPU)[0]
    assert 'font_size 9' in result['setting'] and result['PPL'] != rows['page']['PPL']

def test_positions_and_ratios_of_the_paper(monkeypatch):
    """278 and 78 positions take the prompt of four tokens; 252 and 65 none."""
    monkeypatch.setitem(PRESETS, 'thin', {**PRESETS['tiny'], 'vision_config': {'image_size': 1024, 'width': {
        'sam_vit_b': {'width': 12, 'layers': 1, 'heads': 1, 'global_attn_indexes': []},
        'clip-l-14-224': {'width': 16, 'layers': 1, 'heads': 1}}}})
    batch = {'context': torch.zeros(1, 1000, dtype=torch.long)}
    for regime, settings, positions, ratio in (
            ('vision', {'vision_mode': 'base', 'vision_prompt': 'four'}, 278, 3.60), ('meanpool', {}, 252, 3.97),
            ('vision', {'vision_mode': 'tiny', 'vision_prompt': 'four'}, 78, 12.82), ('vision', {'vision_mode': 'tiny'}, 74, 13.51),
            ('conv1d_residual', {'compression_target': 250}, 252, 3.97), ('conv1d_residual', {'compression_target': 63}, 65, 15.38),
            ('text', {'text_context_tokens': 277}, 278, 3.60), ('text', {}, 1001, 1.0), ('meanpool', {'compression_window_size': 100}, 12, 83.33),
            ('meanpool', {'compression_window_size': 1000}, 3, 333.33), ('conv1d_residual', {'compression_target': 1}, 3, 333.33),
            ('conv1d_residual', {'compression_target': 1000}, 1002, 1.0), ('conv1d_residual', {'compression_target': 8}, 10, 100.0)):
        model, _, _ = load('thin', regime, 1000, **settings)
        size = getattr(model.encoder, 'image_size', 64)
        with torch.no_grad():
            prefix = model.sequence({**batch, 'image': torch.zeros(1, 3, size, size)})
        assert prefix.shape[1] == positions and round(1000 / positions, 2) == ratio and torch.isfinite(prefix).all()

def test_evaluation_is_the_mean_over_all_tokens(runs):
    """Loss, perplexity and accuracy by hand, at any batch size; the share of the text that is not on the pages."""
    model, tokenizer, _ = load('tiny', 'meanpool', 32, 'lm')
    with torch.no_grad():
        losses, hits, _ = model.eval()(Batches(runs / 'data', 'val', 12, tokenizer)[0])
    for batch_size in (1, 5, 12):
        result = evaluation.evaluate(model.train(), Batches(runs / 'data', 'val', batch_size, tokenizer), CPU)
        assert not model.training                                            # dropout, say, has to be off
        loss = losses.mean().item()
        assert result == pytest.approx({'loss': loss, 'ppl': math.exp(loss), 'accuracy': hits.float().mean().item()}, rel=1e-4)
    page, pages = load_run(runs / 'page')[0], Batches(runs / 'data', 'val', 5, tokenizer, 128)
    lost = torch.cat([pages[n]['lost'] for n in range(3)])
    assert 0.01 < lost.mean() and evaluation.evaluate(page, pages, CPU)['lost'] == pytest.approx(lost.mean().item(), abs=1e-6)

def test_show(capsys):
    evaluation.show('one\ntwo', 'on\ntwos', 'lm')
    assert capsys.readouterr().out == '\n--- original (top), lm (bottom)\none⏎two\non⏎twos\n\n'
    evaluation.show('a' * 12, 'b' * 7, 'lm', width=5)
    assert capsys.readouterr().out.split('(bottom)\n')[1] == 'aaaaa\nbbbbb\n\naaaaa\nbb\n\naa\n\n\n'

def test_a_row_that_ends_early_is_cut_at_its_first_eos(runs, monkeypatch):
    """EOS and its repetitions do not count in the passage."""
    model, _, _ = load('tiny', 'meanpool', 32)
    batch = Batches(runs / 'data', 'val', 3, TOKENIZER)[0]
    generated = batch['context'].clone()
    generated[0, 10:], generated[1, 0:], generated[2, 5] = 1, 1, 2                              # 2 is PAD, which ends nothing
    monkeypatch.setattr(Autoencoder, 'generate', lambda self, batch, n: generated[:, :n])
    original = [TOKENIZER.decode(row) for row in batch['context'].tolist()]
    pairs = evaluation.passages(model, batch, TOKENIZER, CPU)
    assert [a for a, _ in pairs] == original
    assert pairs[0][1] == original[0][:10] and pairs[1][1] == '' and original[2][:5] == pairs[2][1][:5] and len(pairs[2][1]) > 32
    assert evaluation.passages(model, batch, TOKENIZER, CPU, 7)[2] == (original[2][:7], TOKENIZER.decode(generated[2, :7].tolist()))

@pytest.mark.parametrize('eos, ended', [(1, [[5, 7, 1], [2, 6, 6], [9, 9, 9]]), ([1, 2], [[5, 7, 1], [2, 1, 1], [9, 9, 9]]), ([7, 2], [[5, 7, 7], [2, 7, 7], [9, 9, 9]])])
def test_any_of_several_eos_ends_a_text(eos, ended):
    """And a row that has ended repeats the first of them."""
    model, _, _ = load('tiny', 'text', 8)
    model.decoder.config.eos_token_id = eos
    script = iter([[5, 2, 9], [7, 6, 9], [1, 6, 9]])
    model.decoder.logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor(next(script)), 259).float()
    assert model.generate({'context': torch.full((3, 8), 5)}, 3).tolist() == ended

# -------------------------------------------------------------------------------------------------------------- picture

def point(regime, ratio, ppl, objective='lm', data='c', **flags):
    return {'regime': regime, 'panel': (objective, data), 'ratio': ratio, 'ppl': ppl, 'is_none': False, 'is_whole': False,
            'flags': {'steps': 5, 'hybrid_text_tokens': 0, 'learning_rate': 1e-4, 'data': f'corpora/{data}', **flags}}

def drawn(monkeypatch, tmp_path, points):
    """What plot() draws: {panel: {label of a series: (points, line, style)}}, and the labels of dashed lines."""
    kept = []
    monkeypatch.setattr(plot_runs.Figure, 'savefig', lambda self, path, **options: kept.append(self))
    plot_runs.plot(points, tmp_path / 'a.png')
    panels, dashed = {}, []
    for ax in kept[0].axes:
        lines = [line for line in ax.get_lines() if line.get_linestyle() != '--']
        dashed += [line.get_label() for line in ax.get_lines() if line.get_linestyle() == '--']
        values = lambda line: [(float(x), round(float(y), 6)) for x, y in zip(*line.get_data())]
        panels[ax.get_title()] = {dots.get_label(): (values(dots), values(line), (dots.get_color(), dots.get_marker()))
                                  for dots, line in zip(lines[::2], lines[1::2])}
    return panels, dashed

def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(monkeypatch, tmp_path):
    points = [point('meanpool', 4, 10.0), point('meanpool', 8, 20.0), point('meanpool', 4, 12.0), point('text', 4, 14.0) | {'is_whole': True},
              point('meanpool', 4, 30.0, data='d'), point('meanpool', 4, 40.0, 'reconstruction')]
    panels, dashed = drawn(monkeypatch, tmp_path, points)
    assert panels['lm on c']['meanpool'][:2] == ([(4, 10), (4, 12), (8, 20)], [(4, 11), (8, 20)]) and dashed == ['whole context 14']
    assert panels['lm on c']['truncation'][:2] == ([(4, 14)], [(4, 14)])
    assert panels['lm on d']['meanpool'][1] == [(4, 30)] and panels['reconstruction on c']['meanpool'][1] == [(4, 40)]
    assert panels['lm on d']['meanpool'][2] == panels['lm on c']['meanpool'][2] != panels['lm on c']['truncation'][2]
    points = [point('meanpool', 4, 10.0, model='meanpool_4'), point('meanpool', 8, 20.0, model='meanpool_8')]      # each from its own run
    assert drawn(monkeypatch, tmp_path, points)[0]['lm on c']['meanpool'][1] == [(4, 10), (8, 20)]
    for flag, value in (('steps', 9), ('hybrid_text_tokens', 16), ('conv_kernel', 3)):
        series = drawn(monkeypatch, tmp_path, [point('meanpool', 4, 10.0), point('meanpool', 4, 20.0, **{flag: value})])[0]['lm on c']
        assert sorted(line for _, line, _ in series.values()) == [[(4, 10)], [(4, 20)]], flag
        assert any(flag in label and str(value) in label for label in series), flag
    other = point('meanpool', 4, 20.0)
    other['flags']['data'] = 'elsewhere/c'                                                     # a corpus of the same name
    assert len(drawn(monkeypatch, tmp_path, [point('meanpool', 4, 10.0), other])[0]['lm on c']) == 2
    series = drawn(monkeypatch, tmp_path, [point('meanpool', 4, 10.0, steps=None), point('meanpool', 4, 20.0)])[0]['lm on c']
    assert list(series) == ['meanpool', 'meanpool, steps 5']                                   # an unset flag leaves no empty label

def test_a_regime_has_one_colour_and_no_two_lines_look_alike(monkeypatch, tmp_path):
    points = [point(f'encoder_{i}', 4, 10.0 + i) for i in range(25)] + [point('encoder_0', 4, 40.0 + i, steps=10 + i) for i in range(25)]
    styles = [style for _, _, style in drawn(monkeypatch, tmp_path, points)[0]['lm on c'].values()]
    assert len(styles) == len(set(styles)) == 50                                               # more than there are colours and markers
    assert {color for color, _ in styles} == {f'C{i}' for i in range(10)} and [color for color, _ in styles[25:]] == ['C0'] * 25

def test_the_command_draws_runs(runs, tmp_path, capsys):
    names = [str(runs / name) for name in ('whole', 'none', 'a|b')]
    plot_runs.main([*names, '--out', str(tmp_path / 'a.png'), '--segments', '4'])
    assert (tmp_path / 'a.png').stat().st_size > 10_000 and 'lonely' not in capsys.readouterr().out
    plot_runs.main([names[0], '--out', str(tmp_path / 'b.PDF'), '--segments', '4'])
    assert 'One run makes a lonely dot: a picture takes three' in capsys.readouterr().out and (tmp_path / 'b.PDF').exists()
    shutil.copytree(runs / 'data', tmp_path / 'other')
    for name, data, ends in (('none', 'data', (True, False)), ('whole', 'other', (False, True)), ('a|b', 'other', (False, False))):
        found = plot_runs.point_of(str(runs / name), arguments(data=None if data == 'data' else str(tmp_path / data)), CPU)
        assert found['panel'] == ('lm', data) and (found['is_none'], found['is_whole']) == ends, name
        assert found['flags'].items() >= {'continuation': 32, 'model': 's', 'data': str(runs / 'data')}.items()
        assert not {'seed', 'log_steps'} & found['flags'].keys()

def test_a_wrong_name_costs_no_evaluation(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, 'row_of', None)
    for flags, message in (([str(runs / 'none'), 'nowhere'], 'nowhere: no run'), ([str(runs / 'none'), '--out', str(tmp_path / 'a.doc')], 'a.doc'),
                           ([str(runs / 'none'), '--out', str(tmp_path / 'nowhere' / 'a.png')], 'no such folder')):
        assert message in said(capsys, plot_runs.main, flags)

def test_a_backend_that_is_not_installed_does_not_matter(tmp_path):
    """As a notebook sets it for the commands that it starts. From any folder."""
    command = [sys.executable, str(ROOT / 'examples' / 'plot_runs.py'), '--help']
    subprocess.run(command, cwd=tmp_path, env={**os.environ, 'MPLBACKEND': 'none_such'}, check=True, stdout=subprocess.DEVNULL)
