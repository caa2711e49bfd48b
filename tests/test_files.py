"""What other people's files and consoles do to the program: nothing is lost in silence, and no page is wrong.

Each test is a kind of input on which the program once was wrong, and asserts the right value: ids, pixels, counts.
"""
import datetime
import json

import numpy as np
import pytest
import torch
from conftest import said
import data
import eval as evaluation
import render
import train
from data import Batches, prepare
from load_deepseek import load, load_run, read_json, released_tensors, save, sizes_from, tokenizer_of

CPU, TOKENIZER = torch.device('cpu'), tokenizer_of('tiny')
TEXT = 'Each of these lines is as long as the one before it was, or so.\n'

# ---------------------------------------------------------------------------------------------- what is not on the page

CHINESE, ARABIC, THAI, HINDI, EMOJI = '这是一段文字用来测试页面', 'هذا', 'ภาษาไทย', 'हिन्दी', '👍🏽🎉'

@pytest.mark.parametrize('text, lost', [
    ('plain ascii and é ü ß Ж λ €', 0), (CHINESE, len(CHINESE)), (f'in {CHINESE} between', len(CHINESE)), (ARABIC, len(ARABIC)), ('שלום abc', 4), (THAI, len(THAI)),
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

def test_lines_below_the_end_are_lost():
    """The words that are not drawn, and every letter of them once, be it in the font or not."""
    font = render.load_font('DejaVuSans.ttf', 12)
    for letter in 'w中':
        text = ' '.join(f'{letter}ord{i}' for i in range(400))
        _, _, n, lost = render.render_page(text, 128, font_size=12)
        lines = list(render.wrap(text, font, 128 - 12))
        assert lost == len(' '.join(lines[n:])) + ''.join(lines[:n]).count('中') and len(lines) > n       # a box in each word that is drawn

def test_what_is_not_on_the_pages_is_told_in_training_and_in_the_table(tmp_path, capsys):
    """A corpus of Chinese is nearly all boxes; larger type drops the end of English."""
    for name, text, told in (('zh', (CHINESE * 20 + ' ab cd ') * 40, True), ('en', TEXT * 200, False)):
        corpus, run = tmp_path / name, tmp_path / f'run_{name}'
        corpus.with_suffix('.txt').write_text(text, encoding='utf-8')
        prepare(str(corpus.with_suffix('.txt')), corpus, TOKENIZER, 96, 4)
        train.main(['--regime', 'vision', '--vision_mode', '128', '--steps', '1', '--batch_size', '8', '--data', str(corpus), '--workers', '0',
                    '--context', '96', '--continuation', '4', '--gradient_accumulation_steps', '1', '--output_dir', str(run)])
        out = capsys.readouterr().out
        lost, val = (Batches(corpus, side, n, TOKENIZER, 128)[0]['lost'].mean().item() for side, n in (('train', 8), ('val', 999)))
        assert lost > 0.5 if told else lost == 0
        assert (f'{lost:.1%} of the text is missing from the first pages' in out) == told, out
        log = json.loads((run / 'log.jsonl').read_text(encoding='utf-8').splitlines()[-1])
        assert log['val_lost'] == pytest.approx(val, abs=1e-6)
    evaluation.main([str(run), '--font_size', '30', '--generate', '0'])
    header, _, row = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    expected = []
    for ids in Batches(corpus, 'val', 999, TOKENIZER)[0]['context'].tolist():
        text = ' '.join(TOKENIZER.decode(ids).split())
        expected.append(render.render_page(text, 128, font_size=30)[3] / len(text))
    row = dict(zip(header, row))
    assert float(row['not drawn']) == pytest.approx(np.mean(expected), abs=6e-4) and np.mean(expected) > 0.4
    assert 'font_size 30' in row['setting']

# ----------------------------------------------------------------------------------------------------------------- text

def documents(source, field='text'):
    return [text for _, text in data.documents(str(source), field)]

@pytest.mark.parametrize('encoding, text', [('latin-1', "L'été à Noël, où l'île fête"), ('cp1251', 'Съешь ещё этих мягких'), ('gb18030', CHINESE),
                                            ('utf-16', TEXT), ('utf-16-le', TEXT), ('utf-32', TEXT), ('shift-jis', '日本語のテキスト')])
def test_a_text_that_is_not_utf8_is_left_out_counted_and_named(tmp_path, capsys, encoding, text):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        (tmp_path / 'in' / f'{i}.txt').write_bytes((text * 50).encode(encoding))
        (tmp_path / 'in' / f'good{i}.md').write_text(f'{i} {TEXT}' * 50, encoding='utf-8')
    assert documents(tmp_path / 'in') == [None] * 3 + [f'{i} {TEXT}' * 50 for i in range(3)]
    prepare(str(tmp_path / 'in'), tmp_path / 'out', TOKENIZER, 64, 64)
    meta, out = read_json(tmp_path / 'out' / 'meta.json'), capsys.readouterr()
    assert (meta['unreadable'], meta['documents']) == (3, 3)
    assert (out.out + out.err).count('0.txt: left out, as it is neither UTF-8 text nor JSON') == 1 and '3 unreadable' in out.out

def test_a_byte_order_mark_is_not_text(tmp_path):
    for name in ('a.txt', 'b.md', 'c.PY'):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + TEXT.encode())
    lines = [json.dumps({'text': f'{i} {TEXT}'}, ensure_ascii=False).encode() for i in range(4)]
    bom = b'\xef\xbb\xbf'
    assert documents(tmp_path) == [TEXT] * 3
    for raw in (bom + b'\n'.join(lines), b'\n'.join(bom + line for line in lines), bom + b'\r\n'.join(lines) + b'\r\n', bom + b'\n' + b'\n'.join(lines)):
        (tmp_path / 'a.jsonl').write_bytes(raw)
        assert documents(tmp_path / 'a.jsonl') == [f'{i} {TEXT}' for i in range(4)]
    (tmp_path / 'a.jsonl').write_bytes('\n'.join(line.decode() for line in lines).encode('utf-16'))
    assert set(documents(tmp_path / 'a.jsonl')) == {None}

def test_a_record_without_the_field_is_an_error_that_names_what_there_is(tmp_path):
    """Nothing guesses which field has the text: a stub with a long address came first, and a corpus of addresses was the result."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    rows = [{'url': 'https://example.org/' + 'a' * 900, 'body': 'stub'}] + [{'url': f'u{i}', 'body': f'{i} {TEXT}'} for i in range(5)] + [{'url': 'u', 'body': None}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / 'a.PARQUET')
    for name in ('a.jsonl', 'a.PARQUET'):
        with pytest.raises(ValueError, match=f'{name}: .*no field text, only url, body; choose one with data.py --field'):
            documents(tmp_path / name)
        assert documents(tmp_path / name, 'body') == ['stub'] + [f'{i} {TEXT}' for i in range(5)] + [None]

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
    for name, kind in (('plain', pa.string()), ('large', pa.large_string()), ('dictionary', None)):
        column = pa.array(texts).cast(kind) if kind else pa.array(texts).dictionary_encode()
        pyarrow.parquet.write_table(pa.table({**others, 'text': column}), tmp_path / f'{name}.parquet')
        assert documents(tmp_path / f'{name}.parquet') == texts, name
    assert set(documents(tmp_path / 'plain.parquet', 'binary')) == set(documents(tmp_path / 'plain.parquet', 'null')) == {None}
    assert set(documents(tmp_path / 'plain.parquet', 'far')) == {None}                             # beyond Python's dates
    latin = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b'ab\xe9\xff'))
    pyarrow.parquet.write_table(pa.table({'text': latin}), tmp_path / 'latin.parquet')
    assert documents(tmp_path / 'latin.parquet') == ['ab', None]                                 # one that is no UTF-8 costs no other
    whole = (tmp_path / 'plain.parquet').read_bytes()
    group = pyarrow.parquet.ParquetFile(tmp_path / 'plain.parquet').metadata.row_group(0)
    columns = {c.path_in_schema: c.dictionary_page_offset or c.data_page_offset for c in map(group.column, range(group.num_columns))}
    damage = lambda start: whole[:start + 4] + b'\xff' * 30 + whole[start + 34:]
    (tmp_path / 'other.parquet').write_bytes(damage(columns['ns']))
    assert documents(tmp_path / 'other.parquet') == texts                                       # what is not read cannot do harm
    for raw in (whole[:-7], whole[:4], b'', b'PAR1' + b'\0' * 50 + b'PAR1', damage(columns['text'])):
        (tmp_path / 'damaged.parquet').write_bytes(raw)
        with pytest.raises(ValueError, match='damaged.parquet: '):
            documents(tmp_path / 'damaged.parquet')

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
    *(({name: value}, 'do not divide') for name, value in (('num_attention_heads', 5), ('num_attention_heads', 16), ('num_key_value_heads', 4))),
    ({'bos_token_id': -1}, 'bos_token_id'), ({'model_type': 'qwen3'}, 'qwen3'), ({'model_type': 'gemma'}, 'gemma'),
    *(({name: value}, name) for name, value in (('head_dim', 16), ('hidden_act', 'gelu'), ('sliding_window', 4096), ('partial_rotary_factor', 0.5),
      ('scoring_func', 'sigmoid'), ('norm_topk_prob', True), ('routed_scaling_factor', 2.5), ('topk_method', 'noaux_tc'))),
    ({'rope_scaling': {'factor': 2.0}}, 'factor')])
def test_what_the_decoder_does_not_do_is_refused_by_name(change, name):
    for config in ({**LLAMA, **change}, {'language_config': {**LLAMA, **change}}):
        with pytest.raises(ValueError) as e:
            sizes_from(config)
        assert name in str(e.value) and '\n' not in str(e.value)

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

NO_NUMBERS = [{'hidden_size': 'wide'}, {'hidden_size': -1}, {'hidden_size': None}, {'num_attention_heads': 0}, {'num_hidden_layers': 'x'}, {'rope_theta': 'x'},
              {'eos_token_id': 'x'}, {'num_experts_per_tok': 9}, {'aux_loss_alpha': 'x'}, {'rms_norm_eps': 'x'}, {'bos_token_id': 999}]
NO_RUNS = [3, {'settings': {}}, {'settings': 3}, {'regime': 'jpeg', 'context': 32, 'objective': 'lm', 'hybrid': 0, 'settings': {}}]

def test_a_config_that_is_not_a_model_or_a_run_is_one_line(tmp_path, capsys):
    model, _, config = load('tiny', 'meanpool', 32)
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    assert said(capsys, evaluation.main, [str(tmp_path / 'run')]).endswith('run: names no corpus; --data does (DEBUG=1 shows where)')
    config['run'] |= {'data': 'pydoc', 'args': {'continuation': 32}}
    contents = [json.dumps({**config, 'language_config': {**config['language_config'], **change}}) for change in NO_NUMBERS]
    contents += [json.dumps({**config, 'run': run}) for run in NO_RUNS]
    for content in (*contents, '[]', '"x"', '{"language_config": []}', '{"language_config": 3}', '{"vision_config": {}}', '', '[' * 99_999):
        (tmp_path / 'run' / 'config.json').write_text(content, encoding='utf-8')
        assert 'run' in said(capsys, evaluation.main, [str(tmp_path / 'run')]), content
