"""What other people's files and consoles do to the program: nothing is lost in silence, and no page is wrong.

Each test is a kind of input on which the program once was wrong, and asserts the right value: ids, pixels, counts.
"""
import datetime
import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, said
from PIL import Image
import data
import eval as evaluation
import render
import train
from data import Batches, prepare
from decoder import Autoencoder
from load_deepseek import load, load_run, read_json, released_tensors, save, sizes_from, tokenizer_of

CPU, TOKENIZER = torch.device('cpu'), tokenizer_of('tiny')
TEXT = 'Each of these lines is as long as the one before it was, or so.\n'


# ---------------------------------------------------------------------------------------------- what is not on the page

CHINESE, ARABIC, THAI, HINDI, EMOJI = '这是一段文字用来测试页面', 'هذا', 'ภาษาไทย', 'हिन्दी', '👍🏽🎉'


@pytest.mark.parametrize('text, lost', [
    ('plain ascii and é ü ß Ж λ €', 0), (CHINESE, len(CHINESE)), (f'in {CHINESE} between', len(CHINESE)), (ARABIC, 0), (THAI, len(THAI)),
    (HINDI, len(HINDI)), (EMOJI, len(EMOJI)), ('a\u0301 \ufb01', 0), ('한국어 日本語 かな', 8), ('\U0010ffff \ue000x', 2)])
def test_letters_that_the_font_lacks_are_lost(text, lost):
    assert render.render_page(text, 640)[3] == lost
    assert render.render_page(f'{TEXT} {text} ' * 3, 640)[3] == 3 * lost


def test_letters_beyond_the_edge_are_lost_and_no_pixel_changes():
    """Of a word wider than the page, the letters that end beyond it; the fourth part of a page is still paper after them."""
    font = render.load_font('DejaVuSans.ttf', 30)
    for word in ('https://example.org/' + 'long/' * 40, 'QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo' * 9, 'W' * 500):
        for before in ('', 'some words before it '):
            page, size, lines, lost = render.render_page(before + word, 512)
            assert (size, lines) == (30, 1 + bool(before))
            ends = np.array([25 + font.getlength(word[:n + 1]) for n in range(len(word))])
            assert lost == (ends > 512).sum() > 0
            assert render.render_page(f'{before}{word} after it', 512)[3] == lost              # counted once, wherever it stands
    narrow = render.render_page('word', 512)
    assert narrow[3] == 0


def test_lines_below_the_end_are_lost():
    """The words that are not drawn, and every letter of them once, be it in the font or not."""
    text = ' '.join(f'word{i}' for i in range(400))
    _, _, lines, lost = render.render_page(text, 128, font_size=12)
    drawn = list(render.wrap(text.split(), render.load_font('DejaVuSans.ttf', 12), 128 - 12))[:lines]
    rest = text.split()[sum(map(len, drawn)):]
    assert lost == len(' '.join(rest)) and rest
    chinese = text.replace('w', '中').split()
    _, _, lines, lost = render.render_page(' '.join(chinese), 128, font_size=12)
    drawn = list(render.wrap(chinese, render.load_font('DejaVuSans.ttf', 12), 128 - 12))[:lines]
    assert lost == len(' '.join(chinese[sum(map(len, drawn)):])) + sum(map(len, drawn))         # a box in each word that is drawn


def saved(out, regime='meanpool', corpus=None, objective='reconstruction', context=32, flags=None, **settings):
    """A run that is not trained, on a corpus."""
    torch.manual_seed(0)
    model, _, config = load('tiny', regime, context, objective, **settings)
    config['run'].update(data=str(corpus), args=flags or {})
    save(released_tensors(model, regime), config, out)
    return str(out)


def test_what_is_not_on_the_pages_is_told_in_training_and_in_the_table(tmp_path, capsys):
    """A corpus of Chinese is nearly all boxes; larger type drops the end of English."""
    (tmp_path / 'zh.txt').write_text((CHINESE * 20 + ' ab cd ') * 40, encoding='utf-8')
    (tmp_path / 'en.txt').write_text(TEXT * 200, encoding='utf-8')
    for name in ('zh', 'en'):
        prepare(str(tmp_path / f'{name}.txt'), tmp_path / name, TOKENIZER, 96, 4)
    shares = {}
    for name in ('zh', 'en'):
        train.main(['--regime', 'vision', '--vision_mode', '128', '--steps', '1', '--batch_size', '8', '--data', str(tmp_path / name), '--workers', '0',
                    '--gradient_accumulation_steps', '1', '--output_dir', str(tmp_path / f'run_{name}')])
        out = capsys.readouterr().out
        pages = Batches(tmp_path / name, 'train', 8, TOKENIZER, 128)
        lost = pages[0]['lost'].mean().item()
        shares[name] = lost
        assert (f'{lost:.1%} of the text is not on the pages' in out) == (lost > 0), out
        log = [json.loads(line) for line in (tmp_path / f'run_{name}' / 'log.jsonl').read_text().splitlines()][-1]
        val = Batches(tmp_path / name, 'val', 999, TOKENIZER, 128)[0]['lost'].mean().item()
        assert log['val_lost'] == pytest.approx(val, abs=1e-6)
    assert shares['zh'] > 0.5 and shares['en'] == 0
    evaluation.main([str(tmp_path / 'run_en'), '--font_size', '30', '--generate', '0'])
    header, _, row = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    expected = []
    for ids in Batches(tmp_path / 'en', 'val', 999, TOKENIZER)[0]['context'].tolist():
        text = ' '.join(TOKENIZER.decode(ids).split())
        expected.append(render.render_page(text, 128, font_size=30)[3] / len(text))
    row = dict(zip(header, row))
    assert float(row['not drawn']) == pytest.approx(np.mean(expected), abs=6e-4) and np.mean(expected) > 0.4
    assert 'font_size 30' in row['setting']


# --------------------------------------------------------------------------------------------------------------- images

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5                    # (6, 8), no two rows or columns alike


def opened(image, path, **options):
    image.save(path, **options)
    return np.asarray(evaluation.open_image(path))


def test_transparency_is_laid_on_white(tmp_path):
    """RGBA, LA, a palette with a transparent colour or with a table of alphas, a grey or a colour that is transparent."""
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(6, axis=0)
    black = np.zeros((6, 8, 3), np.uint8)
    expected = np.where(alpha[..., None] > 0, 0, 255).repeat(3, axis=2)
    rgba = Image.fromarray(np.dstack([black, alpha]))
    assert (opened(rgba, tmp_path / 'rgba.png') == expected).all()
    assert (opened(rgba, tmp_path / 'rgba.webp', lossless=True, exact=True) == expected).all()
    assert (opened(rgba, tmp_path / 'rgba.tif') == expected).all()
    assert (opened(Image.fromarray(np.dstack([black[..., 0], alpha])), tmp_path / 'la.png') == expected).all()
    indices = Image.fromarray((alpha > 0).astype(np.uint8)).convert('P')
    indices.putpalette([0, 0, 0, 0, 0, 0])
    assert (opened(indices, tmp_path / 'p.png', transparency=0) == expected).all()
    assert (opened(indices, tmp_path / 'p.gif', transparency=0) == expected).all()
    assert (opened(indices, tmp_path / 'alphas.png', transparency=bytes([0, 255])) == expected).all()
    half = opened(Image.fromarray(np.dstack([black, np.full((6, 8), 128, np.uint8)])), tmp_path / 'half.png')
    assert (half == 127).all()
    grey = np.where(alpha > 0, 0, 7).astype(np.uint8)
    assert (opened(Image.fromarray(grey), tmp_path / 'l.png', transparency=7) == expected).all()
    assert (opened(Image.fromarray(grey).convert('RGB'), tmp_path / 'rgb.png', transparency=(7, 7, 7)) == expected).all()


def test_other_modes(tmp_path):
    """CMYK, one bit and grey as they look; 16 bits scaled to 8; what has no range of its own is refused."""
    grey = np.dstack([GREY] * 3)
    assert (opened(Image.fromarray(GREY), tmp_path / 'l.png') == grey).all()
    bits = Image.fromarray((GREY > 100).astype(np.uint8) * 255).convert('1')
    assert (opened(bits, tmp_path / 'bits.png') == np.where(grey > 100, 255, 0)).all()
    assert (opened(bits, tmp_path / 'bits.tif') == np.where(grey > 100, 255, 0)).all()
    cmyk = opened(Image.fromarray(grey).convert('CMYK'), tmp_path / 'cmyk.tif')
    assert abs(cmyk.astype(int) - grey).max() <= 1
    for name in ('a.png', 'a.tif'):
        assert (opened(Image.fromarray(GREY.astype(np.uint16) * 257), tmp_path / name) == grey).all(), name
    deep = np.array([[0, 128, 129, 255, 256, 40_000, 65_279, 65_535]], np.uint16)
    assert opened(Image.fromarray(deep), tmp_path / 'b.png')[0, :, 0].tolist() == [round(v / 257) for v in deep[0].tolist()]
    big = Image.frombytes('I;16B', (8, 1), deep.astype('>u2').tobytes())
    assert opened(big, tmp_path / 'big.tif')[0, :, 0].tolist() == [round(v / 257) for v in deep[0].tolist()]
    for mode, dtype in (('I', np.int32), ('F', np.float32)):
        Image.fromarray(GREY.astype(dtype)).save(tmp_path / f'{mode}.tif')
        with pytest.raises(ValueError, match=f'{mode}.tif: not an image that can be read .*mode {mode}') as e:
            evaluation.open_image(tmp_path / f'{mode}.tif')
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp', 'a.tif'])
def test_the_orientation_is_obeyed(tmp_path, name):
    """All eight, in each format: what is opened looks as the picture that was turned."""
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
             6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x)}
    picture = np.dstack([np.kron(GREY, np.ones((16, 16), np.uint8))] * 3)
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {'a.webp': {'lossless': True}, 'a.jpg': {'quality': 100}}.get(name, {})
        found = opened(Image.fromarray(picture), tmp_path / name, exif=exif, **options).astype(int)
        assert found.shape == turn(picture).shape and abs(found - turn(picture)).max() <= (3 if name == 'a.jpg' else 0), orientation
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    exif[0x112] = 6
    if name in ('a.png', 'a.tif'):
        assert (opened(deep, tmp_path / name, exif=exif)[..., 0] == np.rot90(GREY, -1)).all()


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def test_damaged_metadata_costs_no_pixel(tmp_path):
    """Bad chunks behind a PNG's pixels, an EXIF that is cut short: the pixels are those of the file without it."""
    picture = np.dstack([GREY] * 3)
    Image.fromarray(picture).save(tmp_path / 'a.png')
    raw = (tmp_path / 'a.png').read_bytes()
    end = raw.index(b'IEND') - 4
    for bad in (chunk(b'tRNS', b'\0'), chunk(b'tEXt', b''), chunk(b'eXIf', b'Exif\0\0II*\0\xff\xff'), chunk(b'zTXt', b'a\0\0broken'),
                chunk(b'pHYs', b'\0'), chunk(b'gAMA', b''), chunk(b'acTL', b'\0')):
        (tmp_path / 'b.png').write_bytes(raw[:end] + bad + raw[end:])
        assert (np.asarray(evaluation.open_image(tmp_path / 'b.png')) == picture).all(), bad
    Image.fromarray(picture).save(tmp_path / 'a.jpg', quality=100)
    expected, raw = np.asarray(Image.open(tmp_path / 'a.jpg')), (tmp_path / 'a.jpg').read_bytes()
    rational = b'II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x1a\x01\x0a\0\x01\0\0\0\x32\0\0\0\0\0\0\0'      # points beyond the end
    for exif in (b'', b'II', b'II*\0\x08\0\0\0\xff\xff', rational, b'MM\0*' + b'\xff' * 30):
        body = b'Exif\0\0' + exif
        (tmp_path / 'b.jpg').write_bytes(raw[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + raw[2:])
        assert (np.asarray(evaluation.open_image(tmp_path / 'b.jpg')) == expected).all(), exif


def test_pixels_that_are_not_there_are_refused(tmp_path):
    """A page that is cut short, or damaged, is not read as if it were grey or black."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ('a.png', 'a.jpg', 'a.tif', 'a.webp', 'a.gif', 'a.bmp'):
        picture.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for share in (0.02, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[:int(share * len(whole))])
            with pytest.raises(ValueError, match=f'{name}: not an image that can be read') as e:
                evaluation.open_image(tmp_path / name)
            assert '\n' not in str(e.value)
    picture.save(tmp_path / 'a.png')
    whole = bytearray((tmp_path / 'a.png').read_bytes())
    whole[whole.index(b'IDAT') + 3000] ^= 255
    (tmp_path / 'a.png').write_bytes(whole)
    with pytest.raises(ValueError, match='a.png: not an image'):
        evaluation.open_image(tmp_path / 'a.png')


@pytest.mark.parametrize('name', ['a.gif', 'a.tif', 'a.png', 'a.webp'])
def test_of_several_frames_the_first_is_read_and_one_line_says_so(tmp_path, capsys, name):
    frames = [Image.new('RGB', (64, 64), color) for color in ('red', 'lime', 'blue')]
    options = {'a.webp': {'lossless': True}}.get(name, {})
    page = opened(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (page == [255, 0, 0]).all()
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{name}: read only the first of 3 images' in error
    assert opened(frames[1], tmp_path / name).shape == (64, 64, 3) and not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- reading a page

def read_page(released, tmp_path, monkeypatch, ids=(5, 6, 1), *flags, mode=('--vision_mode', 'tiny')):
    """What eval.py --image does with a model that generates these ids; returns the prompt's ids and the tokens asked for."""
    seen = {}

    def generate(self, batch, max_new_tokens):
        seen.update(prompt=self.prompt, tokens=max_new_tokens, image=batch['image'])
        return torch.tensor([list(ids)[:max_new_tokens]])
    monkeypatch.setattr(Autoencoder, 'generate', generate)
    if not (tmp_path / 'page.png').exists():
        Image.new('RGB', (30, 30), 'white').save(tmp_path / 'page.png')
    evaluation.main(['--model', str(released), '--image', str(tmp_path / 'page.png'), *mode, *flags])
    return seen


@pytest.mark.parametrize('prompt', ['Free OCR.', '<image>\nFree OCR. ', '<image>Free OCR.', 'Free OCR.<image>'])
def test_the_page_takes_the_place_of_the_image_tag(released, tmp_path, monkeypatch, prompt):
    seen = read_page(released, tmp_path, monkeypatch, (5, 6, 1), '--prompt', prompt)
    assert seen['prompt'] == tokenizer_of(str(released)).encode_ordinary('\nFree OCR.')


def test_a_run_reads_pages_of_its_own_size_with_its_own_prompt(tmp_path, monkeypatch):
    run = saved(tmp_path / 'run', 'vision', vision_mode='128', vision_prompt='Read.')
    for flags, side, prompt in (((), 128, 'Read.'), (('--vision_mode', '64', '--prompt', ''), 64, '')):
        seen = read_page(run, tmp_path, monkeypatch, (5, 6, 1), *flags, mode=())
        assert seen['image'].shape == (1, 3, side, side) and seen['prompt'] == TOKENIZER.encode_ordinary(prompt)


def test_a_text_that_ends_at_max_new_tokens_says_so(released, tmp_path, monkeypatch, capsys):
    tokenizer = tokenizer_of(str(released))
    ids = tokenizer.encode_ordinary('abcdef')
    assert read_page(released, tmp_path, monkeypatch, ids + [1])['tokens'] == 8192              # as the original does
    found = capsys.readouterr()
    assert found.out == 'abcdef\n' and found.err == ''
    read_page(released, tmp_path, monkeypatch, ids + [1], '--max_new_tokens', '4')
    found = capsys.readouterr()
    assert found.out == 'abcd\n' and found.err.count('\n') == 1 and '--max_new_tokens 4' in found.err
    read_page(released, tmp_path, monkeypatch, ids[:3] + [1], '--max_new_tokens', '4')           # ends just there
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('encoding, shown', [('cp1252', 'caf\xe9 ???'), ('ascii', 'caf? ???'), ('utf-8', 'caf\xe9 \u4e2d\u6587\u2192')])
def test_a_console_that_cannot_show_a_letter_shows_a_question_mark(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
    render.run_main(lambda: print('caf\xe9 \u4e2d\u6587\u2192'))
    sys.stdout.flush()
    assert raw.getvalue() == (shown + '\n').encode(encoding)


# ---------------------------------------------------------------------------------------------------------- generations

def test_a_row_that_ends_early_is_cut_at_its_first_eos(tmp_path, monkeypatch):
    """EOS and its repetitions count neither in the passage nor in CER."""
    prepare('pydoc', tmp_path / 'data', TOKENIZER, 32, 32, 40, 12)
    model, _, _ = load('tiny', 'meanpool', 32)
    batch = Batches(tmp_path / 'data', 'val', 3, TOKENIZER)[0]
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
    model, _, _ = load('tiny', 'text', 8)
    model.decoder.config.eos_token_id = eos
    script = iter([[5, 2, 9], [7, 6, 9], [1, 6, 9]])
    model.decoder.logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor(next(script)), 259).float()
    assert model.generate({'context': torch.full((3, 8), 5)}, 3).tolist() == ended


def test_cer_is_of_at_least_sixteen_passages_and_of_reconstruction(tmp_path, monkeypatch):
    prepare('pydoc', tmp_path / 'data', TOKENIZER, 32, 32, 60, 20)
    batch = Batches(tmp_path / 'data', 'val', 20, TOKENIZER)[0]
    for objective in ('reconstruction', 'lm'):
        run = saved(tmp_path / objective, corpus=tmp_path / 'data', objective=objective)
        for n in (0, 1, 15, 16, 18):
            args = evaluation_arguments(generate=n)
            row, texts = evaluation.row_of(run, args, CPU)
            assert len(texts) == n and (row['CER'] is None) == (n < 16 or objective == 'lm')
            if row['CER'] is not None:
                errors = [evaluation.edit_distance(*pair) for pair in texts]
                assert [a for a, _ in texts] == [TOKENIZER.decode(ids) for ids in batch['context'][:n].tolist()]
                assert row['CER'] == round(sum(errors) / sum(len(a) for a, _ in texts), 3)


def evaluation_arguments(**changes):
    import argparse
    return argparse.Namespace(**dict(data=None, segments=None, generate=0, font=None, font_size=None, line_spacing=None, batch_size=5, workers=0) | changes)


# -------------------------------------------------------------------------------------------------------------- picture

def drawn(monkeypatch, tmp_path, rows):
    """What plot() draws: {panel: {label of a series: (points, line)}} and the labels of dashed lines."""
    pytest.importorskip('matplotlib').use('Agg')
    from matplotlib.figure import Figure
    kept = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **options: kept.append(self))
    evaluation.plot(rows, tmp_path / 'a.png')
    panels = {}
    for ax in kept[0].axes:
        lines = [line for line in ax.get_lines() if line.get_linestyle() != '--']
        points = lambda line: [(float(x), round(float(y), 6)) for x, y in zip(*line.get_data())]
        panels[ax.get_title()] = {dots.get_label(): (points(dots), points(line)) for dots, line in zip(lines[::2], lines[1::2])}
    return panels


def row(regime, ratio, ppl, objective='lm', data='c', **flags):
    return {'regime': regime, 'objective': objective, 'data': data, 'ratio': ratio, 'PPL': ppl, 'positions': 10, 'KV saved': 1,
            'setting': '', 'run': '', 'args': {'steps': 5, 'hybrid_text_tokens': 0, 'learning_rate': 1e-4, 'data': f'corpora/{data}', **flags}}


def test_the_whole_context_is_text_and_no_page_of_as_many_positions(monkeypatch, tmp_path):
    from matplotlib.axes import Axes
    lines = []
    monkeypatch.setattr(Axes, 'axhline', lambda self, y, **options: lines.append(options['label']))
    drawn(monkeypatch, tmp_path, [row('vision', 1, 5.0) | {'KV saved': 0}, row('text', 1, 4.0) | {'KV saved': 0}, row('text', 9, 6.0)])
    assert lines == ['whole context 4']
    drawn(monkeypatch, tmp_path, [row('vision', 1, 5.0) | {'KV saved': 0}, row('text', 9, 6.0)])
    assert lines == ['whole context 4']


def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(monkeypatch, tmp_path):
    rows = [row('meanpool', 4, 10.0), row('meanpool', 4, 12.0), row('meanpool', 8, 20.0), row('text', 4, 14.0), row('meanpool', 4, 30.0, data='d'),
            row('meanpool', 4, 40.0, 'reconstruction')]
    panels = drawn(monkeypatch, tmp_path, rows)
    assert panels['lm on c'] == {'meanpool': ([(4, 10), (4, 12), (8, 20)], [(4, 11), (8, 20)]), 'truncation': ([(4, 14)], [(4, 14)])}
    rows = [row('meanpool', 4, 10.0, model='meanpool_4'), row('meanpool', 8, 20.0, model='meanpool_8')]      # each from its own run
    assert drawn(monkeypatch, tmp_path, rows)['lm on c'] == {'meanpool': ([(4, 10), (8, 20)], [(4, 10), (8, 20)])}
    assert panels['lm on d'] == {'meanpool': ([(4, 30)], [(4, 30)])} and panels['reconstruction on c'] == {'meanpool': ([(4, 40)], [(4, 40)])}
    for flag, value in (('steps', 9), ('hybrid_text_tokens', 16), ('learning_rate', 1e-5)):
        rows = [row('meanpool', 4, 10.0), row('meanpool', 4, 20.0, **{flag: value})]
        series = drawn(monkeypatch, tmp_path, rows)['lm on c']
        assert sorted(line for _, line in series.values()) == [[(4, 10)], [(4, 20)]], flag
        assert any(flag in label and str(value) in label for label in series), flag


def test_runs_of_other_settings_corpora_or_models_are_not_averaged(monkeypatch, tmp_path):
    """From runs on disk: settings that leave the ratio, corpora in folders of the same name, and the model that a run began from."""
    (tmp_path / 'x').mkdir()
    prepare('pydoc', tmp_path / 'x' / 'data', TOKENIZER, 32, 32, 40, 12)
    prepare(str(ROOT / 'encoders.py'), tmp_path / 'data', TOKENIZER, 32, 32, 40, 12)
    base = ['--steps', '1', '--batch_size', '2', '--workers', '0', '--regime', 'conv1d_residual']

    def runs(name, *changes):
        rows = []
        for i, change in enumerate(changes):
            out = tmp_path / f'{name}{i}'
            flags = {'data': str(tmp_path / 'data'), **{k: v for k, v in change.items()}}
            train.main([*base, '--output_dir', str(out), *(x for k, v in flags.items() for x in (f'--{k}', v))])
            rows.append(evaluation.row_of(str(out), evaluation_arguments(segments=2), CPU)[0])
        return [line for panel in drawn(monkeypatch, tmp_path, rows).values() for _, line in panel.values()]
    assert len(runs('seed', {'seed': '1'}, {'seed': '2', 'device': 'cpu', 'log_steps': '3'})) == 1
    assert len(runs('corpus', {'data': str(tmp_path / 'x' / 'data')}, {})) == 2
    assert len(runs('kernel', {'conv_kernel': '3'}, {'conv_kernel': '5'})) == 2
    assert len(runs('model', {'model': str(tmp_path / 'seed0')}, {})) == 2


# ----------------------------------------------------------------------------------------------------------------- text

def documents(source, field=None):
    """Texts, names of their fields, and what was left out, with its place."""
    left_out = []
    found = list(data.documents(str(source), field, lambda where, why: left_out.append((str(where), why))))
    return [text for text, _ in found], {name for _, name in found}, left_out


@pytest.mark.parametrize('encoding, text', [('latin-1', 'L’été à Noël, où l’île fête'.replace('’', "'")), ('cp1251', 'Съешь ещё этих мягких'), ('gb18030', CHINESE),
                                            ('utf-16', TEXT), ('utf-16-le', TEXT), ('utf-32', TEXT), ('shift-jis', '日本語のテキスト')])
def test_a_text_that_is_not_utf8_is_left_out_counted_and_named(tmp_path, capsys, encoding, text):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        (tmp_path / 'in' / f'{i}.txt').write_bytes((text * 50).encode(encoding))
        (tmp_path / 'in' / f'good{i}.md').write_text(TEXT * 50, encoding='utf-8')
    found, _, left_out = documents(tmp_path / 'in')
    assert found == [TEXT * 50] * 3 and left_out == [(str(tmp_path / 'in' / f'{i}.txt'), 'not UTF-8') for i in range(3)]
    prepare(str(tmp_path / 'in'), tmp_path / 'out', TOKENIZER, 64, 64)
    meta = read_json(tmp_path / 'out' / 'meta.json')
    assert meta['left out, not UTF-8'] == 3 and meta['documents'] == 3
    out = capsys.readouterr()
    assert (out.out + out.err).count('0.txt: left out, not UTF-8') == 1 and '3 left out, not UTF-8' in out.out
    for side in ('train', 'val'):
        ids = np.fromfile(tmp_path / 'out' / f'{side}.bin', 'uint16').reshape(-1, 128)
        assert len(ids) and all(TOKENIZER.decode(row.tolist()) in TEXT * 50 for row in ids)


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name in ('a.txt', 'b.md', 'c.PY'):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + TEXT.encode())
    assert documents(tmp_path) == ([TEXT] * 3, {'text'}, [])
    assert render.read_text(tmp_path / 'a.txt') == TEXT


def test_jsonl_with_byte_order_marks_is_read(tmp_path):
    lines = [json.dumps({'text': f'{i} {TEXT}'}, ensure_ascii=False).encode() for i in range(4)]
    bom = b'\xef\xbb\xbf'
    for name, raw in (('a', bom + b'\n'.join(lines)), ('b', b'\n'.join(bom + line for line in lines)), ('c', bom + b'\r\n'.join(lines) + b'\r\n'),
                      ('blank', bom + b'\n' + b'\n'.join(lines))):
        (tmp_path / f'{name}.jsonl').write_bytes(raw)
        assert documents(tmp_path / f'{name}.jsonl') == ([f'{i} {TEXT}' for i in range(4)], {'text'}, []), name
    (tmp_path / 'd.jsonl').write_bytes('\n'.join(line.decode() for line in lines).encode('utf-16'))
    assert documents(tmp_path / 'd.jsonl')[0] == [] and {why for _, why in documents(tmp_path / 'd.jsonl')[2]} <= {'not UTF-8', 'not JSON'}


def test_many_records_decide_which_field_has_the_text(tmp_path, capsys):
    """Not the first alone, which may be a stub with a long address; the report names the field."""
    rows = [{'url': 'https://example.org/' + 'a' * 900, 'body': 'stub'}] + [{'url': f'u{i}', 'body': f'{i} {TEXT * 5}'} for i in range(30)]
    rows += [{'url': 'u', 'body': None}, {'url': 'u'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    found, names, left_out = documents(tmp_path / 'a.jsonl')
    assert found == ['stub'] + [f'{i} {TEXT * 5}' for i in range(30)] and names == {'body'}
    assert left_out == [(f'{tmp_path / "a.jsonl"}, record {n}', 'without body') for n in (32, 33)]
    prepare(str(tmp_path / 'a.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64)
    assert '31 documents from the field body, ' in capsys.readouterr().out
    assert documents(tmp_path / 'a.jsonl', 'url')[0] == [row['url'] for row in rows]             # unless one is asked for
    for i in range(40):
        rows[i % 33].setdefault('text', 'a field of this name wins')
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    assert documents(tmp_path / 'a.jsonl') == (['a field of this name wins'] * 33, {'text'}, [])
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps({'text': '', 'content': TEXT}) for _ in range(5)), encoding='utf-8')
    assert documents(tmp_path / 'b.jsonl')[:2] == ([TEXT] * 5, {'content'})                      # an empty "text" does not


def test_a_record_that_cannot_be_read_has_a_number_of_its_own(tmp_path):
    (tmp_path / 'a.jsonl').write_text('not json\n{"n": 1}\n\n{"text": "one"}\n[]\nnot json', encoding='utf-8')
    assert documents(tmp_path / 'a.jsonl') == (['one'], {'text'}, [(f'{tmp_path / "a.jsonl"}, record {n}', why) for n, why in (
        (1, 'not JSON'), (5, 'not JSON'), (2, 'without text'), (4, 'without text'))])


def test_a_damaged_parquet_file_without_text_does_not_end_the_process(tmp_path):
    """A byte of the row group's number of rows is damaged, which makes it negative: pyarrow aborts when it is asked for no column."""
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow
    parquet.write_table(pyarrow.table({'n': pyarrow.array([None] * 12)}), tmp_path / 'a.parquet')
    raw = bytearray((tmp_path / 'a.parquet').read_bytes())
    raw[raw.index(b'\x16\x18\x26\x08') + 1] = 0xe7                            # a zigzag varint: 12 becomes -2484
    (tmp_path / 'a.parquet').write_bytes(raw)
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import data; left = []\n'
            'print(list(data.documents(sys.argv[2], None, lambda where, why: left.append(why))), set(left))')
    run = subprocess.run([sys.executable, '-c', code, str(ROOT), str(tmp_path / 'a.parquet')], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "[] {'without text'}\n", run.stderr


def test_only_the_text_column_of_parquet_is_read(tmp_path):
    """Whatever the other columns hold: times that only pandas can show, far dates, pictures, lists, records, nulls."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    n, texts = 300, [f'{i} {TEXT}' for i in range(300)]
    others = {
        'ns': pa.array([2 ** 62 + 1] * n, pa.timestamp('ns')), 'duration': pa.array([2 ** 62 + 1] * n, pa.duration('us')),
        'far': pa.array([2 ** 31 - 1] * n, pa.date32()), 'us': pa.array([-2 ** 62] * n, pa.timestamp('us', tz='UTC')), 'null': pa.nulls(n),
        'image': pa.array([{'bytes': b'\xff' * 9, 'path': 'p'}] * n), 'list': pa.array([['x', 'y']] * n), 'binary': pa.array([b'\xff\xfe'] * n),
        'decimal': pa.array([1] * n, pa.decimal128(20, 3)), 'time': pa.array([datetime.time(1, 2)] * n)}
    for name, kind in (('plain', pa.string()), ('large', pa.large_string()), ('dictionary', pa.dictionary(pa.int32(), pa.string()))):
        column = pa.array(texts, pa.string()).cast(kind) if name != 'dictionary' else pa.array(texts).dictionary_encode()
        pyarrow.parquet.write_table(pa.table({**others, 'text': column}), tmp_path / f'{name}.parquet')
        assert documents(tmp_path / f'{name}.parquet') == (texts, {'text'}, []), name
    table = {**others, 'title': pa.array(['short'] * n), 'body': pa.array(texts)}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / 'body.parquet')
    assert documents(tmp_path / 'body.parquet') == (texts, {'body'}, [])
    assert documents(tmp_path / 'body.parquet', 'title') == (['short'] * n, {'title'}, [])
    holes = [None if i % 3 == 0 else text for i, text in enumerate(texts)]
    pyarrow.parquet.write_table(pa.table({'text': pa.array(holes), **others}), tmp_path / 'holes.parquet')
    found, _, left_out = documents(tmp_path / 'holes.parquet')
    assert found == [text for text in holes if text] and len(left_out) == 100 and left_out[0][1] == 'without text'
    pyarrow.parquet.write_table(pa.table(others), tmp_path / 'none.parquet')                     # no text at all is not silence
    found, _, left_out = documents(tmp_path / 'none.parquet')
    assert not found and len(left_out) == n
    whole = (tmp_path / 'plain.parquet').read_bytes()
    group = pyarrow.parquet.ParquetFile(tmp_path / 'plain.parquet').metadata.row_group(0)
    start = next(c.dictionary_page_offset or c.data_page_offset for c in map(group.column, range(group.num_columns)) if c.path_in_schema == 'text')
    for raw in (whole[:-7], whole[:4], b'', b'PAR1' + b'\0' * 50 + b'PAR1', whole[:start + 4] + b'\xff' * 90 + whole[start + 94:]):
        (tmp_path / 'damaged.parquet').write_bytes(raw)
        with pytest.raises(ValueError, match='damaged.parquet: cannot be read') as e:
            documents(tmp_path / 'damaged.parquet')
        assert '\n' not in str(e.value)


# --------------------------------------------------------------------------------------------------------------- config

LLAMA = dict(model_type='llama', hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64, vocab_size=259)


@pytest.mark.parametrize('change, theta', [
    ({}, 10000.0), ({'rope_theta': 5e5}, 5e5), ({'rope_parameters': {'rope_theta': 1e5, 'rope_type': 'default'}}, 1e5),
    ({'rope_parameters': {'rope_theta': 1e5}}, 1e5), ({'rope_parameters': {'rope_theta': 1e5}, 'rope_theta': 1e4}, 1e5), ({'rope_scaling': None, 'rope_theta': 7.0}, 7.0),
    ({'rope_parameters': {'rope_type': 'default'}, 'rope_theta': 5e5}, 5e5), ({'rope_parameters': None}, 10000.0)])
def test_the_rope_theta_of_either_place(change, theta):
    sizes = sizes_from({**LLAMA, **change})
    assert sizes.rope_theta == theta
    assert sizes_from({'language_config': {**LLAMA, **change}}).rope_theta == theta


@pytest.mark.parametrize('change, name', [
    ({'rope_parameters': {'rope_theta': 1e5, 'rope_type': 'yarn', 'factor': 4.0}}, 'yarn'),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}}, 'llama3'),
    ({'rope_parameters': {'rope_theta': 1e5}, 'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 'yarn'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'linear'),
    ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}, 'dynamic'),
    ({'rope_scaling': {'factor': 2.0}}, 'factor'), ({'attention_bias': True}, 'attention_bias'),
    ({'mlp_bias': True}, 'mlp_bias'), ({'head_dim': 16}, 'head_dim'), ({'hidden_act': 'gelu'}, 'hidden_act'),
    ({'sliding_window': 4096}, 'sliding_window'), ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
    ({'model_type': 'qwen3'}, 'qwen3'), ({'model_type': 'gemma'}, 'gemma'), ({'use_mla': True}, 'use_mla'),
    ({'scoring_func': 'sigmoid'}, 'scoring_func'), ({'norm_topk_prob': True}, 'norm_topk_prob'),
    ({'routed_scaling_factor': 2.5}, 'routed_scaling_factor'), ({'topk_method': 'noaux_tc'}, 'topk_method'),
    ({'moe_layer_freq': 2}, 'moe_layer_freq')])
def test_what_the_decoder_does_not_do_is_refused_by_name(change, name):
    for config in ({**LLAMA, **change}, {'language_config': {**LLAMA, **change}}):
        with pytest.raises(ValueError) as e:
            sizes_from(config)
        assert name in str(e.value) and 'config.json' in str(e.value) and '\n' not in str(e.value)


def test_what_a_config_may_say_besides():
    """Values that ask for nothing else, and those that only concern training or saving."""
    plain = sizes_from(LLAMA)
    for change in ({'head_dim': 8}, {'attention_bias': False}, {'hidden_act': 'silu'}, {'rope_scaling': None}, {'torch_dtype': 'float16'}, {'use_cache': True},
                   {'attention_dropout': 0.0}, {'pretraining_tp': 1}, {'sliding_window': None}, {'transformers_version': '5.0.0'}, {'partial_rotary_factor': 1.0}):
        assert sizes_from({**LLAMA, **change}) == plain, change


def test_a_config_with_a_list_of_eos_generates(tmp_path):
    model, _, config = load('tiny', 'meanpool', 32)
    config['language_config']['eos_token_id'] = [1, 2]
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    model, tokenizer, _ = load_run(tmp_path / 'run')
    model.decoder.logits = lambda hidden: torch.nn.functional.one_hot(torch.full((len(hidden),), 2), 259).float()
    assert model.generate({'context': torch.full((2, 32), 5)}, 9).tolist() == [[2], [2]]
    assert evaluation.passages(model, {'context': torch.full((2, 32), 5)}, tokenizer, CPU) == [('\x02' * 32, '')] * 2


def test_a_config_that_is_not_a_model_is_one_line(tmp_path, capsys):
    model, _, config = load('tiny', 'meanpool', 32)
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    config['run']['data'] = 'pydoc'
    for change in ({'hidden_size': 'wide'}, {'hidden_size': -1}, {'num_attention_heads': 0}, {'hidden_size': None}, {'num_hidden_layers': 'x'}):
        (tmp_path / 'run' / 'config.json').write_text(json.dumps({**config, 'language_config': {**config['language_config'], **change}}))
        assert 'run' in said(capsys, evaluation.main, [str(tmp_path / 'run')]), change
    for content in ('[]', '"x"', '{"language_config": []}', '{"language_config": 3}', '{"vision_config": {}}', ''):
        (tmp_path / 'run' / 'config.json').write_text(content)
        assert 'run' in said(capsys, evaluation.main, [str(tmp_path / 'run')]), content


@pytest.mark.parametrize('change', [{'rope_theta': 'x'}, {'eos_token_id': 'x'}, {'num_experts_per_tok': 9}, {'aux_loss_alpha': 'x'}, {'rms_norm_eps': 'x'}, {'bos_token_id': 999}])
def test_a_number_that_is_none_in_a_config_is_one_line(tmp_path, capsys, change):
    model, _, config = load('tiny', 'meanpool', 32)
    config['run']['data'] = 'pydoc'
    config['language_config'].update(change)
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    assert 'run' in said(capsys, evaluation.main, [str(tmp_path / 'run')])


@pytest.mark.parametrize('run', [3, {'settings': {}}, {'settings': 3}, {'regime': 'jpeg', 'context': 32, 'objective': 'lm', 'hybrid': 0, 'settings': {}}])
def test_a_run_that_is_none_in_a_config_is_one_line(tmp_path, capsys, run):
    model, _, config = load('tiny', 'meanpool', 32)
    save(released_tensors(model, 'meanpool'), {**config, 'run': run}, tmp_path / 'run')
    assert 'run' in said(capsys, evaluation.main, [str(tmp_path / 'run')])
