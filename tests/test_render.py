"""The page, pixel for pixel: the authors' renderer as hashes, and Pillow drawing whole lines."""
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS, ROOT
from PIL import Image, ImageDraw
import render

GOLDEN = json.loads((GOLDENS / 'render_goldens.json').read_text(encoding='utf-8'))
FONT = 'DejaVuSans.ttf'

@pytest.mark.parametrize('size', [512, 640, 1024, 1280])
@pytest.mark.parametrize('name', GOLDEN['render_basic_layout'])
def test_page(name, size):
    expected = GOLDEN['render_basic_layout'][name][str(size)]
    page, font_size, lines, lost = render.render_page(GOLDEN['texts'][name], size)
    assert hashlib.sha256(page.tobytes()).hexdigest() == expected['sha256_rgb']
    assert (font_size, lines) == (expected['font_size'], expected['rendered_lines'])
    assert lost or not expected['is_truncated']                             # boxes and what runs off the edge are lost as well

STOCK = ('AVAVAV To Tokyo WAVE. P. "quoted" e\u0301a\u0308 \u0301x fi ffl j\u0327 naïve 中文 العربية ÅÇ LT. Yo, W. Ta T\u00e4 r. 1111 @ _ '
         + GOLDEN['texts']['accents'][:400]).split()

def pillow_lines(text, font, width):
    """The lines of a text, every one measured whole."""
    lines, line = [], ''
    for word in text.split():
        box = font.getbbox(f'{line} {word}' if line else word)
        if line and box[2] - box[0] > width:
            lines.append(line)
            line = word
        else:
            line = f'{line} {word}' if line else word
    return lines + [line]

@pytest.mark.parametrize('stock', [STOCK, ['ToToToToToTo'], ['Yo,Ta', 'To']])              # kerning adds up to pixels in the last two
@pytest.mark.parametrize('size', [4, 9, 17, 27, 30])
def test_lines_are_those_that_pillow_would_draw(size, stock):
    """Wrapping by measuring whole lines, and drawing them whole, gives the same: also where letters kern and marks combine."""
    rng = np.random.default_rng(size)
    text = ' '.join(stock[i] for i in rng.integers(len(stock), size=600))
    font = render.load_font(FONT, size)
    page, _, drawn, _ = render.render_page(text, 1024, font_size=size)
    whole, edge = Image.new('RGB', (1024, 1024), 'white'), int(0.05 * 1024)
    for i, line in enumerate(pillow_lines(text, font, 1024 - 2 * edge)[:drawn]):
        ImageDraw.Draw(whole).text((edge, edge + i * int(1.2 * size)), line, fill='black', font=font)
    assert (np.asarray(page) == np.asarray(whole)).all()
    text = ' '.join(text.split()[:60])
    for width in range(400, 424):                                                              # some are met to the pixel
        assert list(render.wrap(text, font, width)) == pillow_lines(text, font, width)

def test_the_knobs():
    text = GOLDEN['texts']['prose_1000tok']
    page, size, lines, lost = render.render_page(text, 640, font_size=20)
    assert size == 20 and lines == (640 - 64) // 24 
    shown = pillow_lines(text, render.load_font(FONT, 20), 640 - 64)[:lines]
    assert lost == len(' '.join(text.split())) - len(' '.join(shown)) - 1
    assert render.render_page(text, 640, line_spacing=2.0)[1] < render.render_page(text, 640)[1]
    assert np.asarray(render.render_page(text, 640, margin=0.25)[0])[:160].min() == 255
    assert render.render_page(' \n ', 128)[1:] == (30, 0, 0)
    assert render.render_page('a b', 64, font_size=1, line_spacing=0.5)[2] == 1
    with pytest.raises(ValueError, match='nofont.ttf: no such font file'):
        render.render_page('a', 128, font='nofont.ttf')

def test_a_notebooks_backend_costs_nothing():
    """A notebook sets MPLBACKEND for all that it starts, and matplotlib refuses to be imported where that backend is missing."""
    code = "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/examples']; import render, plot_runs; render.render_page('a', 64)"
    env = {**os.environ, 'MPLBACKEND': 'module://no_such.backend'}
    done = subprocess.run([sys.executable, '-c', code, str(ROOT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_a_damaged_font_file(tmp_path):
    (tmp_path / 'a.ttf').write_bytes(b'no font')
    with pytest.raises(ValueError, match='a.ttf: this font cannot be read'):
        render.render_page('a', 128, font=str(tmp_path / 'a.ttf'))

def test_command(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text(GOLDEN['texts']['prose_1000tok'], encoding='utf-8')
    render.main([str(tmp_path / 'a.txt'), '--size', '640', '--out', str(tmp_path / 'a.png')])
    assert 'font size 10, 38 lines, 0 of 4305 characters are missing from the page' in capsys.readouterr().out
    with Image.open(tmp_path / 'a.png') as page:
        assert hashlib.sha256(page.convert('RGB').tobytes()).hexdigest() == GOLDEN['render_basic_layout']['prose_1000tok']['640']['sha256_rgb']
