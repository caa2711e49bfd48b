"""Documents to segments: every source, what is hard to read, the split, and what must not be half done."""
import json
import pickle
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import data
import load_deepseek
from conftest import byte_tokenizer, fork
from data import Batches, prepare
from load_deepseek import tokenizer_of

TOKENIZER = tokenizer_of('tiny')
raw = lambda ids: (ids - 3).astype(np.uint8).tobytes()       # the text of its ids, in bytes
# Bytes with ids that take more than 16 bits, as many of DeepSeek's do.
LARGE = byte_tokenizer(lambda byte: 100_000 + byte)
TEXT = 'Each of these lines is as long as the one before it was, or so.\n'

def segments(folder):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    read = lambda side: np.fromfile(folder / f'{side}.bin', np.uint32).reshape(-1, meta['context'] + meta['continuation'])
    return meta, read('train'), read('val')

def shares(folder):
    """Training and validation segments, and how many of the latter stand in the training text, at any place."""
    _, train, val = segments(folder)
    text = raw(train.reshape(-1))
    return len(train), len(val), sum(raw(row) in text for row in val)

def texts(source, field='text'):
    return [text for _, text in data.documents(str(source), field)]

def words(seed, n):
    """n characters of text that does not repeat itself."""
    return bytes(np.random.default_rng(seed).choice(np.frombuffer(b'   abcdefghijklmnopqrstuvwxyz', np.uint8), n)).decode()

def records(path, texts):
    """A file of JSON lines; returns its name."""
    path.write_text('\n'.join(json.dumps({'text': text}) for text in texts), encoding='utf-8')
    return str(path)

def is_page_of(batch, i, text):
    """Whether row i of a batch is the page of a text, with the share that is missing from it."""
    text = ' '.join(text.split())
    page, _, _, missing = data.render_page(text, batch['image'].shape[-1])
    return (batch['image'][i].permute(1, 2, 0).numpy() == np.asarray(page)).all() and batch['lost'][i] == pytest.approx(missing / len(text))

def test_every_kind_of_file(tmp_path):
    """In order, also with a suffix in capitals; what is hidden is left out. Parquet is in test_files.py."""
    expected = [f'{i} {TEXT}' for i in range(5)]
    assert texts(records(tmp_path / 'a.JSONL', expected)) == expected
    left_out = ['i.png', '.hidden.txt', '.git/a.txt', '.ipynb_checkpoints/a.txt', 'h/.venv/lib/a.py']
    for name in ('e.txt', 'f.md', 'G.PY', 'h/a.txt', *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name + TEXT, encoding='utf-8')
    assert texts(tmp_path / 'G.PY') == ['G.PY' + TEXT]
    assert texts(tmp_path) == ['G.PY' + TEXT, *expected, 'e.txt' + TEXT, 'f.md' + TEXT, 'h/a.txt' + TEXT]

def test_the_split_of_any_sizes():
    """Validation has 5 to 20% of any 40 segments or more, in any order; what is no longer than a tenth of them is on one side."""
    for seed in range(600):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 9, rng.integers(1, 60)) if seed % 2 else rng.pareto(0.8, rng.integers(1, 40)) * rng.integers(1, 9)
        sizes = [min(int(size), 3000) for size in sizes] + [int(rng.integers(40))] * 2
        total = sum(sizes)
        if total < 40:
            continue
        sides = []
        for side, first, n in data.split(sizes, np.inf, np.inf, 0.1):
            assert first == len(sides)                                                           # every segment once, in order
            sides += [side] * n
        assert len(sides) == total and 0.05 * total <= sides.count('val') <= 0.2 * total, sizes
        first = 0
        for size in sizes:
            assert size > total // 10 or len(set(sides[first:first + size])) <= 1, sizes
            first += size

def test_the_split_of_any_source(tmp_path, capsys):
    """Both sides have something, nothing of validation is in training, and texts that come twice count once."""
    note, book = words(1, 3000), words(2, 200_000)
    articles = [words(10 + i, 300) for i in range(1000)]
    sources = {'one_record': [book], 'articles': articles, 'two': [words(7, 5000), words(8, 5000)], 'forty': [words(9, 40 * 128)],
               'twice': [text + end for text in articles[:300] for end in ('', '\n')], 'twice_apart': articles[:300] + [text + '\n' for text in articles[:300]],
               'inside': [book[:20_000], book, *articles[:50]], 'half_inside': [book[:100_000], book, *articles[:50]],
               'revisions': [book[:60_000 + 20 * i] for i in range(5)] + articles[:400]}
    names = [records(tmp_path / f'{name}.jsonl', sources[name]) for name in sources]
    for first, second in ((note, book), (book, note)):
        names.append(str(tmp_path / f'folder_{len(first)}'))
        Path(names[-1]).mkdir()
        Path(names[-1], '0.txt').write_text(first, encoding='utf-8')
        Path(names[-1], '1.txt').write_text(second, encoding='utf-8')
    for name in (*names, names[-1] + '/0.txt'):
        prepare(name, name + '.out', TOKENIZER, 64, 64)
        n_train, n_val, in_both = shares(Path(name + '.out'))
        assert in_both == 0 and n_train + n_val >= 40 and 0.05 <= n_val / (n_train + n_val) <= 0.2, (name, n_train, n_val, in_both)
        assert f'{n_train:,} segments for training, {n_val:,} for validation' in capsys.readouterr().out
    for name in ('twice', 'twice_apart'):
        meta, train, val = segments(tmp_path / f'{name}.jsonl.out')
        assert (meta['documents'], meta['seen before'], len(train) + len(val)) == (300, 300, 2 * 300)

def test_a_repeated_segment_may_lie_across_two():
    train = np.arange(40, dtype=np.uint32).reshape(5, 8)
    val = np.stack([train.ravel()[12:20], train[3], train[3] + 1000])
    in_val, in_train = data.repeated(val, train)
    assert in_val.tolist() == [True, True, False] and in_train.tolist() == [False, True, True, True, False]

def test_the_default_corpus_validates_on_text_that_is_not_in_its_training(tmp_path, capsys):
    """Python's manual repeats itself: topics that lie inside another are dropped, and segments that stand in the training text."""
    topics = texts('pydoc')
    assert len(topics) > 50 and all(sum(text.split('***\n')[-1].strip() in other for other in topics) == 1 for text in topics)
    prepare('pydoc', tmp_path / 'out', TOKENIZER, 128, 128)
    n_train, n_val, in_both = shares(tmp_path / 'out')
    assert in_both == 0 and 0.05 < n_val / (n_train + n_val) < 0.2
    assert 'validation segments stand in the training text: left out' in capsys.readouterr().out

def test_finewiki_reads_only_the_shards_it_needs(tmp_path, monkeypatch):
    """The code that a user runs, with a hub of three small shards; another version there is another corpus here."""
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    with pytest.raises(OSError, match='HF_HUB_OFFLINE'):
        prepare('finewiki', tmp_path / 'out', TOKENIZER, 100, 100)
    fetched = []

    def download(repo_id, filename, repo_type):
        fetched.append(filename)
        path = tmp_path / filename.replace('/', '_')
        table = {'title': ['t'] * 8, 'text': [words(20 * len(fetched) + i, 50_000) for i in range(8)]}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        return path

    hub = data.huggingface_hub
    names = [f'data/enwiki/{i:03}.parquet' for i in range(3)] + ['data/dewiki/000.parquet', 'README.md']
    monkeypatch.setattr(hub.HfApi, 'list_repo_files', lambda self, repo_id, repo_type: names)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    prepare('finewiki', tmp_path / 'out', TOKENIZER, 100, 100, 300, 30)
    assert shares(tmp_path / 'out')[:2] == (300, 30) and fetched == names[:1]
    monkeypatch.chdir(tmp_path)
    for version in 'aab':
        monkeypatch.setattr(hub.HfApi, 'dataset_info', lambda self, repo_id: SimpleNamespace(sha=version))
        data.open_corpus('finewiki', TOKENIZER, 100, 100)
    assert fetched[1:] == names[:3] * 2                                                          # all of it, for a and for b

def test_segments_are_the_documents_in_order_and_never_on_both_sides(tmp_path):
    """Every token of a document is its number, so that each segment tells where it is from."""
    lengths = np.random.default_rng(0).integers(1, 400, size=200).tolist()
    source = records(tmp_path / 'in.jsonl', [chr(0x4e00 + i) * n for i, n in enumerate(lengths)])
    for name in ('out', 'again'):
        prepare(source, tmp_path / name, LARGE, 60, 30)
    meta, *rows = segments(tmp_path / 'out')
    decoded = [[LARGE.decode(row.tolist()) for row in side] for side in rows]
    assert not set(''.join(decoded[0])) & set(''.join(decoded[1]))
    found = decoded[0] + decoded[1]
    assert all(len(set(text)) == 1 for text in found)                                            # no segment of two documents
    assert sorted(text[0] for text in found) == [chr(0x4e00 + i) for i, n in enumerate(lengths) for _ in range(3 * n // 90)]
    assert 0.09 < len(rows[1]) / len(found) < 0.11
    assert meta['documents'] == 200
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()

def test_text_that_is_hard_to_read(tmp_path, capsys):
    """Nothing crashes, nothing is lost without a count, and the first that is left out is named."""
    hard = [' ' * 150_000, '\x01\x02' * 75_000, '\n' * 300_000, 'x' * 200_000, TEXT * 20]
    lines = [json.dumps({'text': t}) for t in hard] + ['{"text": "\\ud800' + 'a' * 127 + '"}']         # a lone surrogate is one character
    lines += ['', 'not json', '[1]', '{"text": 5}', '{"text": null}', '[' * 99_999]
    (tmp_path / 'hard.jsonl').write_bytes('\n'.join(lines).encode() + b'\n{"text": "\xff\xfe ' + b'b' * 200 + b'"}\n')
    prepare(str(tmp_path / 'hard.jsonl'), tmp_path / 'out', TOKENIZER, 64, 64)
    meta, train, val = segments(tmp_path / 'out')
    out = capsys.readouterr()
    del hard[2]                                               # to a reader the white space of the first one again
    assert (meta['documents'], meta['seen before'], meta['unreadable']) == (len(hard) + 1, 1, 6) and (out.out + out.err).count('hard.jsonl: left out') == 1
    told = re.search(r'([\d,]+) validation segments stand in the training text: (.*)', out.out)
    dropped = int(told[1].replace(',', '')) * (told[2] == 'left out')
    assert len(train) + len(val) + dropped == sum(len(t) // 128 for t in hard) + 1
    (tmp_path / 'line.txt').write_bytes(b'y' * 128 * 500)
    prepare(str(tmp_path / 'line.txt'), tmp_path / 'line', TOKENIZER, 64, 64)
    assert 'stand in the training text: kept, as there are no others' in capsys.readouterr().out
    assert sum(shares(tmp_path / 'line')[:2]) == 500

def test_killed_or_twice_at_once_nothing_wrong_is_left(tmp_path):
    """kill -9 during preparation leaves no corpus; two that make the same one at once both end well, and the whole of it is there."""
    source = records(tmp_path / 'in.jsonl', [f'{i} ' + TEXT * 50 for i in range(500)])
    command = [source, '--out', str(tmp_path / 'out'), '--context', '64', '--continuation', '64']
    process = fork(data.main, command)
    until = time.time() + 60
    while not (left := list(tmp_path.glob('out.tmp*'))) and time.time() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert left[0].exists() and not (tmp_path / 'out').exists()
    both = [fork(prepare, source, tmp_path / 'out', TOKENIZER, 64, 64) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert data.open_corpus(tmp_path / 'out', TOKENIZER, 64, 64)[1]['documents'] == 500 and list(tmp_path.glob('out.tmp*')) == left

def test_batches_are_pages_and_ids(tmp_path):
    prepare('pydoc', tmp_path / 'out', LARGE, 100, 50, 50, 10)
    batches = Batches(tmp_path / 'out', 'val', 4, LARGE, image_size=128)
    batch = batches[0]
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        'context': ((4, 100), torch.int64), 'continuation': ((4, 50), torch.int64), 'image': ((4, 3, 128, 128), torch.uint8),
        'lost': ((4,), torch.float32)}
    ids = torch.cat([batch['context'], batch['continuation']], 1)
    assert ids.tolist() == segments(tmp_path / 'out')[2][:4].tolist()
    assert is_page_of(batch, 1, LARGE.decode(ids[1, :100].tolist()))
    assert [len(batches[i]['context']) for i in range(len(batches))] == [4, 4, 2]
    again = pickle.loads(pickle.dumps(batches))[0]                            # as workers get it where processes are spawned
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    few = Batches(tmp_path / 'out', 'val', 4, LARGE, limit=5)
    assert [i for n in range(len(few)) for i in few.rows(n)] == [0, 2, 4, 6, 8]
    assert len(Batches(tmp_path / 'out', 'val', 4, LARGE, limit=500)) == 3
    train = Batches(tmp_path / 'out', 'train', 10, LARGE)
    epochs = [[i for n in range(start, start + 5) for i in train.rows(n)] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
    assert Batches(tmp_path / 'out', 'train', 10, LARGE, seed=1).rows(0) != epochs[0][:10]

@pytest.mark.parametrize('train, val', [(30, 5), (30, None), (None, 5), (1, 1), (200, 3)])
def test_no_more_segments_than_asked_for(tmp_path, train, val):
    """One document has more segments than validation may take."""
    source = records(tmp_path / 'in.jsonl', [words(i, 2600) for i in range(9)])
    prepare(source, tmp_path / 'out', TOKENIZER, 64, 64, train, val)
    meta, rows, val_rows = segments(tmp_path / 'out')
    assert (len(rows), len(val_rows)) == (meta['train'], meta['val'])
    assert meta['val'] == (val or -(-train // 9))
    total = 9 * (2600 // 128)
    assert meta['train'] == train if train and train < 100 else 0.9 * total < meta['train'] + meta['val'] <= total

def test_only_what_is_needed_is_fetched_and_once(tmp_path, monkeypatch, released):
    """data.py asks the hub for JSON files, not for 6.7 GB of weights; a program asks once."""
    asked, cache = [], tmp_path / 'cache'

    def download(source, allow_patterns):
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for path in released.glob(allow_patterns):
            shutil.copy(path, cache)
        return str(cache)
    monkeypatch.setattr(load_deepseek.huggingface_hub, 'snapshot_download', download)
    (tmp_path / 'a.txt').write_text(words(1, 3000), encoding='utf-8')
    data.main([str(tmp_path / 'a.txt'), '--out', str(tmp_path / 'out'), '--model', 'some/model', '--context', '8', '--continuation', '8'])
    assert asked == ['*.json']
    for _ in range(2):
        load_deepseek.load('some/model', 'text', 8)
    assert asked == ['*.json', '*.safetensors']
    load_deepseek.fetch.cache_clear()
    shutil.rmtree(cache)
    assert load_deepseek.open_tensors('some/other')             # first of all, as read_page.py does: it needs the index

def test_a_character_cut_at_the_edge_is_left_out_of_the_page(tmp_path):
    """Contexts of Cyrillic in bytes begin and end inside a character: half of one is no replacement character on the page."""
    (tmp_path / 'a.txt').write_text(''.join(f'{i}дом стоит ' for i in range(3000)), encoding='utf-8')
    prepare(str(tmp_path / 'a.txt'), tmp_path / 'out', TOKENIZER, 33, 32)
    batch = Batches(tmp_path / 'out', 'train', 16, TOKENIZER, image_size=128)[0]
    cut = 0
    for i, ids in enumerate(batch['context'].tolist()):
        found = raw(np.array(ids))
        cut += '\ufffd' in found.decode('utf-8', errors='replace')
        assert is_page_of(batch, i, found.decode('utf-8', errors='ignore'))
    assert cut > 4
