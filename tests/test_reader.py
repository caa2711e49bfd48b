"""results/reader/, the small DeepSeek-OCR that was trained to read: what it reads, words and not noise."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT
from safetensors.torch import load_file

import train as training
from data import prepare
from eval import text_of
from load_deepseek import load, released_tensors, save
from render import load_font, render_page, wrap
import read_page
import reader as lesson
from read_page import edit_distance

READER = str(ROOT / 'results' / 'reader')
# None is from Wikipedia, which it was taught on.
SENTENCES = ['A blue kite hung over the harbour.', 'Seven clocks, and not one of them agrees with another!',
             'Please water the ferns (twice a week) while Zoe is away.', 'Order 66 boxes at $4.25 each, said Quentin.']
PARAGRAPH = 'My neighbour paints doors. He has painted one in every village along the river, and none of them leads to a house.'

def pages(texts, side=256):
    return torch.from_numpy(np.stack([np.asarray(render_page(text, side)[0]) for text in texts])).permute(0, 3, 1, 2)

@pytest.fixture(scope='module')
def reader():
    model, tokenizer, config = load(READER, 'vision', 0)
    return model.eval(), tokenizer, config

def read(reader, image, prompt, n):
    model, tokenizer, _ = reader
    model.prompt = tokenizer.encode(prompt).ids
    batch = {'context': torch.empty(len(image), 0, dtype=torch.long), 'image': image}
    ids = model.generate(batch, n).tolist()
    assert all(1 in row for row in ids), 'it has to end with EOS'
    return [text_of(row, tokenizer, [1]) for row in ids]

@pytest.mark.parametrize('prompt', ['', '\nFree OCR.'])
def test_it_reads_sentences_that_it_has_never_seen(reader, prompt):
    texts = read(reader, pages(SENTENCES), prompt, 100)
    errors = sum(edit_distance(a, b) for a, b in zip(SENTENCES, texts))
    assert errors <= 2, texts                                                  # of 188 characters
    assert all(word in texts[0] for word in ('kite', 'harbour')) and '66 boxes' in texts[3]

def test_it_reads_a_paragraph(reader):
    text, = read(reader, pages([PARAGRAPH]), '', 160)
    assert edit_distance(PARAGRAPH, text) <= 4, text                           # of 118 characters

def test_the_command_reads_a_page_of_any_size(tmp_path, monkeypatch, capsys):
    """The page is brought to the model's 256 pixels; twice as large, with twice the type, it says the same."""
    text = SENTENCES[0]
    page, size, _, _ = render_page(text, 256)
    page.save(tmp_path / 'page.png')
    render_page(text, 512, font_size=2 * size)[0].save(tmp_path / 'large.png')
    for name in ('page', 'large'):
        read_page.main([str(tmp_path / f'{name}.png'), '--model', READER])
        assert capsys.readouterr().out == f'{text}\n'

def test_it_looks_at_the_page(reader):
    """Its loss on another passage's page is more than 3 nats a character higher."""
    model, tokenizer, _ = reader
    model.prompt = []
    texts = [text[:32] for text in SENTENCES]
    context = torch.tensor([tokenizer.encode(text).ids for text in texts])
    with torch.no_grad():
        own, other = (model({'context': context, 'image': pages(texts).roll(shift, 0)})[0].mean() for shift in (0, 1))
    assert own < 0.3 and other > own + 3, (own, other)

def test_its_folder_is_in_the_released_format(reader, tmp_path):
    model, _, config = reader
    stored = load_file(f'{READER}/model.safetensors')
    shape_of = lambda name: re.sub(r'\d+', 'N', name)                          # without numbers of layers and experts
    theirs = json.loads((GOLDENS / 'deepseek_ocr_tensors.json').read_text())['tensors']
    assert {shape_of(name) for name in stored} == {shape_of(name) for name in theirs}
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in (ROOT / 'results' / 'reader').iterdir()) < 18e6
    tensors = {name: t.bfloat16() for name, t in released_tensors(model, 'vision').items()}
    save(tensors, config, tmp_path / 'again')
    again = load_file(tmp_path / 'again' / 'model.safetensors')
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)

def test_every_regime_starts_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text').mkdir()
    for i in range(20):
        (tmp_path / 'text' / f'{i}.txt').write_text(f'{i} ' + SENTENCES[i % 4] * 3)
    prepare('text', 'corpus', lesson.TOKENIZER, 32, 32)
    capsys.readouterr()
    flags = ['--model', READER, '--data', 'corpus', '--steps', '1', '--batch_size', '4', '--workers', '0', '--device', 'cpu',
             '--gradient_accumulation_steps', '1', '--eval_steps', '1', '--context', '32', '--continuation', '32']
    for regime, rate in (('meanpool', '0.0001'), ('vision', '1e-05')):
        training.main([*flags, '--regime', regime])
        out = capsys.readouterr().out
        assert re.search(rf'encoder [\d,]+ parameters at {rate}, decoder [\d,]+ at 0.0001', out), out
        assert ('starts from random weights' in out) == (regime == 'meanpool')
    assert float(re.search(r'val_ppl ([\d.]+)', out)[1]) < 1.5                 # it reads the pages before it has learned

@pytest.mark.parametrize('more', [[], ['--steps', '5']])
def test_the_lesson_does_not_overwrite_a_model(tmp_path, monkeypatch, more):
    (tmp_path / 'model.safetensors').write_bytes(b'weights')
    monkeypatch.setattr(sys, 'argv', ['reader.py', '--data', 'none', '--out', str(tmp_path), *more])
    with pytest.raises(ValueError, match='holds a model already'):
        lesson.main()
    assert (tmp_path / 'model.safetensors').read_bytes() == b'weights'

def test_the_lesson_knows_where_each_letter_stands():
    """The middle of letter i lies between the widths of the line's first i and i + 1 letters."""
    text, edge, expected = 'wide open, ill', 12, []
    _, size, _, _ = render_page(text, 256)
    font = load_font('DejaVuSans.ttf', size)
    for i, line in enumerate(wrap(text, font, 256 - 2 * edge)):
        widths = [font.getlength(line[:n]) for n in range(len(line) + 1)]
        row = (edge + i * int(1.2 * size) + 0.6 * size) // 16
        expected += [(row, (edge + (a + b) / 2) // 8) for a, b in zip(widths, widths[1:])] + [None]      # the line's end
    cells = [tuple(cell) for cell in lesson.draw(text)[1]]
    assert len(cells) == len(expected) == len(text) + 1
    assert all(found == right for found, right, letter in zip(cells, expected, text) if letter != ' ')
