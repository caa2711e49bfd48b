"""Documents to segments: every source, what is hard to read, the split, and what must not be half done."""
import json
import os
import pickle
import re
import time

import numpy as np
import pytest
import torch
import data
import load_deepseek
from conftest import fork
from data import Batches, prepare
from load_deepseek import tokenizer_of

TOKENIZER = tokenizer_of('tiny')
TEXT = 'Each of these lines is as long as the one before it was, or so.\n'

def segments(folder):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    read = lambda side: np.fromfile(folder / f'{side}.bin', np.uint32).reshape(-1, meta['context'] + meta['continuation'])
    return meta, read('train'), read('val')

def texts(source, field='text'):
    return [text for _, text in data.documents(str(source), field)]

def words(seed, n):
    """Text that does not repeat itself: n words."""
    rng = np.random.default_rng(seed)
    return ' '.join(''.join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(n)) + '\n'

def test_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    rows = [{'id': str(i), 'title': 'short', 'text': f'{i} ' + TEXT} for i in range(5)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    expected = [row['text'] for row in rows]
    (tmp_path / 'a.jsonl').write_bytes(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'd.parquet')
    for name in ('a.jsonl', 'd.parquet'):
        assert texts(tmp_path / name) == expected, name
        assert texts(tmp_path / name, field='title') == ['short'] * 5
    for name in ('e.txt', 'f.md', 'G.PY'):
        (tmp_path / name).write_text(name + TEXT, encoding='utf-8')
    for folder in ('h', '.git', '.ipynb_checkpoints', 'h/.venv'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'inside.txt').write_text(folder + TEXT, encoding='utf-8')
    (tmp_path / '.hidden.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'ignored.png').write_bytes(b'\0')
    assert texts(tmp_path) == ['G.PY' + TEXT] + expected * 2 + ['e.txt' + TEXT, 'f.md' + TEXT, 'h' + TEXT]     # what is hidden is left out

def shares(folder):
    """Training and validation segments, and how many of the latter stand in the training text, at any place."""
    meta, train, val = segments(folder)
    text = TOKENIZER.decode_bytes(train.reshape(-1).tolist())
    return len(train), len(val), sum(TOKENIZER.decode_bytes(row.tolist()) in text for row in val)

def test_the_split_of_any_source(tmp_path, capsys):
    """Validation has 5 to 20% of any source of 40 segments or more, whatever its order and sizes, and nothing of it is in training."""
    short, book = words(1, 500), words(2, 40_000)
    articles = [words(10 + i, 60) for i in range(1000)]
    record = lambda text: json.dumps({'text': text}) + '\n'
    sources = {'book.txt': book, 'one_record.jsonl': record(book), 'articles.jsonl': ''.join(map(record, articles)),
               'twice.jsonl': ''.join(map(record, [text for text in articles[:300] for _ in range(2)])),
               'twice_apart.jsonl': ''.join(map(record, articles[:300] * 2)), 'few.jsonl': ''.join(map(record, [words(7, 900), words(8, 900)])),
               'inside.jsonl': ''.join(map(record, [book[:20_000], book, *articles[:50]]))}
    for name, text in sources.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    for name, texts in (('short_first', (short, book)), ('book_first', (book, short))):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f'{i}.txt').write_text(text, encoding='utf-8')
    for name in (*sources, 'short_first', 'book_first'):
        prepare(str(tmp_path / name), tmp_path / f'out_{name}', TOKENIZER, 64, 64)
        n_train, n_val, in_both = shares(tmp_path / f'out_{name}')
        assert in_both == 0 and n_train + n_val >= 40 and 0.05 <= n_val / (n_train + n_val) <= 0.2, (name, n_train, n_val, in_both)
        assert f'{n_train:,} segments for training, {n_val:,} for validation' in capsys.readouterr().out
    assert shares(tmp_path / 'out_twice.jsonl')[0] < 2 * 300                                     # each text counts once
    meta, _, _ = segments(tmp_path / 'out_twice_apart.jsonl')
    assert (meta['documents'], meta['seen before']) == (300, 300)

def test_the_default_corpus_validates_on_text_that_is_not_in_its_training(tmp_path, capsys):
    """Python's manual repeats itself: topics that lie inside another are dropped, and segments that stand in the training text."""
    topics = texts('pydoc')
    assert len(topics) > 50 and all(sum(text.split('***\n')[-1].strip() in other for other in topics) == 1 for text in topics)
    prepare('pydoc', tmp_path / 'out', TOKENIZER, 128, 128)
    n_train, n_val, in_both = shares(tmp_path / 'out')
    assert in_both == 0 and 0.05 < n_val / (n_train + n_val) < 0.2
    assert 'validation segments stand in the training text: left out' in capsys.readouterr().out

def test_repeated_finds_a_segment_at_any_offset():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 9, (40, 50)).astype(np.uint32)
    flat, val = train.reshape(-1), rng.integers(0, 9, (5, 50)).astype(np.uint32)
    val[1], val[3], val[4] = flat[777:827], train[0], np.append(flat[100:149], 9)
    assert data.repeated(val, train).tolist() == [False, True, False, True, False]

def test_finewiki_reads_only_the_shards_it_needs(tmp_path, monkeypatch):
    """The code that a user runs, with a hub of three small shards."""
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    fetched = []

    def download(repo_id, filename, repo_type):
        fetched.append(filename)
        path = tmp_path / filename.replace('/', '_')
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{'text': words(20 * len(fetched) + i, 9000), 'title': 't'} for i in range(8)]), path)
        return path

    names = [f'data/enwiki/{i:03}.parquet' for i in range(3)] + ['data/dewiki/000.parquet', 'README.md']
    monkeypatch.setattr(data.huggingface_hub.HfApi, 'list_repo_files', lambda self, repo_id, repo_type: names)
    monkeypatch.setattr(data.huggingface_hub, 'hf_hub_download', download)
    prepare('finewiki', tmp_path / 'out', TOKENIZER, 100, 100, 300, 30)
    meta, train, val = segments(tmp_path / 'out')
    assert (len(train), len(val)) == (300, 30) and fetched == names[:1] and train.dtype == np.uint32
    prepare('finewiki', tmp_path / 'all', TOKENIZER, 100, 100)
    assert fetched[1:] == names[:3]

def test_finewiki_offline_is_one_line(tmp_path):
    with pytest.raises(OSError, match='HF_HUB_OFFLINE'):
        prepare('finewiki', tmp_path / 'out', TOKENIZER, 100, 100)

def test_segments_are_the_documents_in_order_and_never_on_both_sides(tmp_path):
    """Every token of a document is its number, so that each segment tells where it is from."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, size=200)
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': chr(0x4e00 + i) * int(n)}) for i, n in enumerate(lengths)),
                                       encoding='utf-8')
    prepare(str(tmp_path / 'in.jsonl'), tmp_path / 'out', TOKENIZER, 60, 30)
    meta, train, val = segments(tmp_path / 'out')
    whole = lambda rows: [TOKENIZER.decode_bytes(row.tolist()).decode('utf-8') for row in rows]
    sides = [{ord(c) - 0x4e00 for text in whole(rows) for c in text} for rows in (train, val)]
    assert not sides[0] & sides[1]
    assert all(len(set(text)) == 1 for rows in (train, val) for text in whole(rows))             # no segment of two documents
    from_document = {d: sum(ord(text[0]) - 0x4e00 == d for rows in (train, val) for text in whole(rows)) for d in range(200)}
    assert from_document == {d: 3 * int(n) // 90 for d, n in enumerate(lengths)}                 # every whole segment of each
    assert 0.05 < len(val) / (len(val) + len(train)) < 0.15
    assert meta['documents'] == 200
    prepare(str(tmp_path / 'in.jsonl'), tmp_path / 'again', TOKENIZER, 60, 30)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()

def test_text_that_is_hard_to_read(tmp_path, capsys):
    """Nothing crashes, nothing is lost without a count, and the first that is left out is named."""
    hard = [' ' * 1_000_000, '\x01\x02' * 75_000, '\n' * 300_000, 'x' * 3_000_000, TEXT * 20]
    lines = [json.dumps({'text': t}) for t in hard] + ['{"text": "\\ud800 alone ' + 'a' * 200 + '"}', '', 'not json', '[1]', '{"text": 5}', '{"text": null}']
    raw = '\n'.join(lines).encode() + b'\n{"text": "\xff\xfe ' + b'b' * 200 + b'"}\n'
    (tmp_path / 'hard.jsonl').write_bytes(raw)
    prepare(str(tmp_path / 'hard.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64)
    meta, train, val = segments(tmp_path / 'out')
    out = capsys.readouterr()
    del hard[2]                                               # to a reader the white space of the first one again
    assert (meta['documents'], meta['seen before'], meta['unreadable']) == (len(hard) + 1, 1, 5) and (out.out + out.err).count('hard.jsonl: left out') == 1
    told = re.search(r'([\d,]+) validation segments stand in the training text: (.*)', out.out)
    dropped = int(told[1].replace(',', '')) * (told[2] == 'left out')
    assert len(train) + len(val) + dropped == sum(len(t) // 128 for t in hard) + len('? alone ' + 'a' * 200) // 128
    (tmp_path / 'line.txt').write_bytes(b'y' * 5_000_000)
    prepare(str(tmp_path / 'line.txt'), tmp_path / 'line', TOKENIZER, 64, 64)
    assert 'stand in the training text: kept, as all do' in capsys.readouterr().out
    meta, train, val = segments(tmp_path / 'line')
    assert len(train) + len(val) == 5_000_000 // 128

def test_killed_or_twice_at_once_nothing_wrong_is_left(tmp_path):
    """kill -9 during preparation leaves no corpus; two that prepare the same one at once leave the whole of it."""
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': f'{i} ' + TEXT * 50}) for i in range(1000)), encoding='utf-8')
    command = [str(tmp_path / 'in.jsonl'), '--out', str(tmp_path / 'out'), '--context', '64', '--continuation', '64']
    process = fork(data.main, command)
    until = time.time() + 60
    while not (left := list(tmp_path.glob('out.tmp*'))) and time.time() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert left[0].exists() and not (tmp_path / 'out').exists()
    both = [fork(data.main, command) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert data.open_corpus(tmp_path / 'out', TOKENIZER, 64, 64)[1]['documents'] == 1000 and list(tmp_path.glob('out.tmp*')) == left

def test_batches_are_pages_and_ids(tmp_path):
    prepare('pydoc', tmp_path / 'out', TOKENIZER, 100, 50, 50, 10)
    batches = Batches(tmp_path / 'out', 'val', 4, TOKENIZER, image_size=128)
    batch = batches[0]
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        'context': ((4, 100), torch.int64), 'continuation': ((4, 50), torch.int64), 'image': ((4, 3, 128, 128), torch.uint8),
        'lost': ((4,), torch.float32)}
    text = ' '.join(TOKENIZER.decode(batch['context'][1].tolist()).split())
    page, _, _, lost = data.render_page(text, 128)
    assert batch['lost'][1] == pytest.approx(lost / len(text))
    assert (batch['image'][1].permute(1, 2, 0).numpy() == np.asarray(page)).all()
    assert [len(batches[i]['context']) for i in range(len(batches))] == [4, 4, 2]
    again = pickle.loads(pickle.dumps(batches))[0]                            # as workers get it where processes are spawned
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    few = Batches(tmp_path / 'out', 'val', 4, TOKENIZER, limit=5)
    assert [i for n in range(len(few)) for i in few.rows(n)] == [0, 2, 4, 6, 8]
    assert len(Batches(tmp_path / 'out', 'val', 4, TOKENIZER, limit=500)) == 3
    assert os.path.getsize(tmp_path / 'out' / 'train.bin') == 50 * 150 * 4

@pytest.mark.parametrize('train, val', [(30, 5), (30, None), (None, 5), (1, 1), (200, 3)])
def test_no_more_segments_than_asked_for(tmp_path, train, val):
    """One document has more segments than validation may take."""
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': words(i, 450)}) for i in range(9)), encoding='utf-8')
    prepare(str(tmp_path / 'in.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64, train, val)
    meta, rows, val_rows = segments(tmp_path / 'out')
    assert (len(rows), len(val_rows)) == (meta['train'], meta['val'])
    total = sum(len(words(i, 450)) // 128 for i in range(9))
    assert meta['val'] == (val or -(-train // 9))
    assert meta['train'] == train if train and train < 100 else 0.9 * total < meta['train'] + meta['val'] <= total

def test_only_what_is_needed_is_fetched_and_once(tmp_path, monkeypatch, released):
    """data.py asks the hub for JSON files, not for 6.7 GB of weights; a program asks once."""
    asked = []
    monkeypatch.setattr(load_deepseek.huggingface_hub, 'snapshot_download', lambda source, allow_patterns: asked.append(allow_patterns) or str(released))
    load_deepseek.fetch.cache_clear()
    (tmp_path / 'a.txt').write_text(words(1, 3000), encoding='utf-8')
    data.main([str(tmp_path / 'a.txt'), '--out', str(tmp_path / 'out'), '--model', 'some/model', '--context', '8', '--continuation', '8'])
    assert asked == ['*.json']
    for _ in range(2):
        load_deepseek.load('some/model', 'text', 8)
    assert asked == ['*.json', '*.safetensors']
    load_deepseek.fetch.cache_clear()

def test_a_character_cut_at_the_edge_is_left_out_of_the_page(tmp_path):
    """Contexts of Cyrillic in bytes begin and end inside a character: half of one is no replacement character on the page."""
    (tmp_path / 'a.txt').write_text(''.join(f'{i}дом стоит ' for i in range(3000)), encoding='utf-8')
    prepare(str(tmp_path / 'a.txt'), tmp_path / 'out', TOKENIZER, 33, 32)
    batch = Batches(tmp_path / 'out', 'train', 16, TOKENIZER, image_size=128)[0]
    cut = 0
    for i, ids in enumerate(batch['context'].tolist()):
        raw = TOKENIZER.decode_bytes(ids)
        cut += '\ufffd' in raw.decode('utf-8', errors='replace')
        text = ' '.join(raw.decode('utf-8', errors='ignore').split())
        page, _, _, missing = data.render_page(text, 128)
        assert (batch['image'][i].permute(1, 2, 0).numpy() == np.asarray(page)).all()
        assert batch['lost'][i] == pytest.approx(missing / len(text))
    assert cut > 4
