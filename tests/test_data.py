"""Documents to segments: every source, what is hard to read, the split, and what must not be half done."""
import json
import os
import pickle
import time

import numpy as np
import pytest
import torch
import data
from conftest import fork
from data import Batches, prepare
from load_deepseek import tokenizer_of

TOKENIZER = tokenizer_of('tiny')
TEXT = 'Each of these lines is as long as the one before it was, or so.\n'


def segments(folder):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    read = lambda side: np.fromfile(folder / f'{side}.bin', meta['dtype']).reshape(-1, meta['context'] + meta['continuation'])
    return meta, read('train'), read('val')


def texts(source, field=None):
    why = data.Counter()
    found = list(data.documents(str(source), field, lambda where, reason: why.update([reason])))
    return [text for text, _ in found], dict(why)


def test_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    rows = [{'id': str(i), 'title': 'short', 'text': f'{i} ' + TEXT} for i in range(5)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    expected = [row['text'] for row in rows]
    (tmp_path / 'a.jsonl').write_bytes(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'd.parquet')
    for name in ('a.jsonl', 'd.parquet'):
        assert texts(tmp_path / name) == (expected, {}), name
    assert texts(tmp_path / 'a.jsonl', field='title') == (['short'] * 5, {})
    for name in ('e.txt', 'f.md', 'g.py'):
        (tmp_path / name).write_text(name + TEXT, encoding='utf-8')
    (tmp_path / 'h').mkdir()
    (tmp_path / 'h' / 'inside.txt').write_text('h' + TEXT, encoding='utf-8')
    (tmp_path / 'ignored.png').write_bytes(b'\0')
    (tmp_path / 'i.jsonl').write_text(json.dumps({'id': 'short', 'body': 'i' + TEXT}), encoding='utf-8')   # no "text", as others have
    assert texts(tmp_path)[0] == expected * 2 + ['e.txt' + TEXT, 'f.md' + TEXT, 'g.py' + TEXT, 'h' + TEXT, 'i' + TEXT]
    assert len(texts('pydoc')[0]) > 50


def test_finewiki_reads_only_the_shards_it_needs(tmp_path, monkeypatch):
    """The code that a user runs, with a hub of three small shards."""
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    fetched = []

    def download(repo_id, filename, repo_type):
        fetched.append(filename)
        path = tmp_path / filename.replace('/', '_')
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{'text': TEXT * 2500, 'title': 't'}] * 20), path)
        return path

    names = [f'data/enwiki/{i:03}.parquet' for i in range(3)] + ['data/dewiki/000.parquet', 'README.md']
    monkeypatch.setattr(data.huggingface_hub.HfApi, 'list_repo_files', lambda self, repo_id, repo_type: names)
    monkeypatch.setattr(data.huggingface_hub, 'hf_hub_download', download)
    prepare('finewiki', tmp_path / 'out', TOKENIZER, 100, 100, 300, 30)
    meta, train, val = segments(tmp_path / 'out')
    assert (len(train), len(val)) == (300, 30) and fetched == names[:1]
    prepare('finewiki', tmp_path / 'all', TOKENIZER, 100, 100)
    assert fetched[1:] == names[:3]


def test_finewiki_offline_is_one_line(tmp_path):
    with pytest.raises(ValueError, match='finewiki: not found on the hub'):
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
    assert meta['documents'] == 200 and meta['documents too short'] == sum(3 * lengths < 90)
    prepare(str(tmp_path / 'in.jsonl'), tmp_path / 'again', TOKENIZER, 60, 30)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()


def test_text_that_is_hard_to_read(tmp_path):
    """Nothing crashes, nothing is lost without a count."""
    hard = [' ' * 1_000_000, '\x00\x01\x02' * 50_000, '\n' * 300_000, 'x' * 3_000_000, TEXT * 20]
    lines = [json.dumps({'text': t}) for t in hard] + ['{"text": "\\ud800 alone ' + 'a' * 200 + '"}', '', 'not json', '[1]', '{"n": 1}', '{"text": 5}']
    raw = '\n'.join(lines).encode() + b'\n{"text": "\xff\xfe ' + b'b' * 200 + b'"}\n'
    (tmp_path / 'hard.jsonl').write_bytes(raw)
    prepare(str(tmp_path / 'hard.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64)
    meta, train, val = segments(tmp_path / 'out')
    left_out = {key: n for key, n in meta.items() if key.startswith('left out')}
    assert left_out == {'left out, not JSON': 1, 'left out, without text': 3, 'left out, not UTF-8': 1}
    assert meta['documents'] == len(hard) + 1 and meta['documents too short'] == 0
    assert len(train) + len(val) == sum(len(t) // 128 for t in hard) + len('? alone ' + 'a' * 200) // 128
    (tmp_path / 'line.txt').write_bytes(b'y' * 5_000_000)
    prepare(str(tmp_path / 'line.txt'), tmp_path / 'line', TOKENIZER, 64, 64)
    meta, train, val = segments(tmp_path / 'line')
    assert len(train) + len(val) == 50 * (100_000 // 128)                     # the only file is cut, so that there are two sides


def test_one_short_file_has_two_sides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'book.txt').write_text(TEXT * 200, encoding='utf-8')
    (tmp_path / 'notes.md').mkdir()
    for source in ('book.txt', './book.txt', '.'):
        if source == '.':
            (tmp_path / 'book.txt').rename(tmp_path / 'a.txt')
            (tmp_path / 'b.txt').write_text(TEXT * 200, encoding='utf-8')
        prepare(source, tmp_path / f'out_{len(source)}', TOKENIZER, 64, 64, train_segments=50)
        meta, train, val = segments(tmp_path / f'out_{len(source)}')
        assert meta['train'] == 50 and meta['val'] == 6


def test_pieces_join_to_the_text():
    for text in ('', 'a', 'a\n' * 300_000, 'b' * 250_001, TEXT * 5000):
        parts = data.PIECE.findall(text)
        assert all(part.endswith('\n') for part in parts[:-1]) == ('\n' in text or len(parts) < 2)
        assert ''.join(parts) == text and all(0 < len(part) <= 100_000 for part in parts)


def test_killed_or_twice_at_once_nothing_wrong_is_left(tmp_path):
    """kill -9 during preparation leaves no corpus; two that prepare the same one at once leave the whole of it."""
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': TEXT * 50}) for _ in range(1000)), encoding='utf-8')
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
    assert data.open_corpus(tmp_path / 'out', TOKENIZER)['documents'] == 1000 and list(tmp_path.glob('out.tmp*')) == left


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
    assert os.path.getsize(tmp_path / 'out' / 'train.bin') == 50 * 150 * 2


@pytest.mark.parametrize('train, val', [(30, 5), (30, None), (None, 5), (1, 1), (200, 3)])
def test_no_more_segments_than_asked_for(tmp_path, train, val):
    """One document has more segments than either side may take."""
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps({'text': TEXT * 40}) for _ in range(9)), encoding='utf-8')
    prepare(str(tmp_path / 'in.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64, train, val)
    meta, rows, val_rows = segments(tmp_path / 'out')
    assert (len(rows), len(val_rows)) == (meta['train'], meta['val'])
    each = len(TEXT * 40) // 128
    if train:
        assert meta['train'] == min(train, 8 * each if val == 3 else train) and meta['val'] == (val or -(-train // 9))
    else:
        assert meta['val'] == 5 and meta['train'] == 8 * each                 # all that the other documents have
