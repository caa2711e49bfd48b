"""A user's mistake gets one clear line and a non-zero exit, and costs no checkpoint."""
import json
import shutil

import pytest
from PIL import Image
import data
import eval as evaluation
import load_deepseek
import render
import train
from conftest import fork
from load_deepseek import load, released_tensors, save

LONG = 'A line of text that is there to be cut into segments.\n' * 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with two documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'texts').mkdir()
    for name in 'ab':
        (tmp_path / 'texts' / f'{name}.txt').write_text(LONG, encoding='utf-8')
    return tmp_path


def refused(capsys, main, command, message):
    with pytest.raises(SystemExit) as e:
        main(command.split())
    said = capsys.readouterr().err.strip().split('\n')[-1] if isinstance(e.value.code, int) else str(e.value.code)
    assert e.value.code != 0 and message in said and '\n' not in said, said


@pytest.mark.parametrize('command, message', [
    ('--regime jpeg', "invalid choice: 'jpeg'"),
    ('--regime conv1d_residual --compression_target 33', '[128, 64, 32, 16, 8, 4, 2, 1]'),
    ('--regime meanpool --compression_window_size 129', 'window 129'),
    ('--regime meanpool --hybrid_text_tokens 129', '--hybrid_text_tokens 129'),
    ('--regime meanpool --compression_target 32', '--compression_target: no setting of regime meanpool'),
    ('--regime text --text_context_tokens 129', 'text_context_tokens 129'),
    ('--regime vision --vision_mode 100', 'vision_mode 100'),
    ('--objective guess', 'invalid choice'),
    ('--wndow 3', 'unrecognized arguments'),
    ('--batch_size 0', '--batch_size: 0 is not from 1 to inf'),
    ('--steps x', "--steps: invalid int value: 'x'"),
    ('--workers -1', '--workers: -1 is not from 0'),
    ('--beta2 2', '--beta2: 2 is not from 0'),
    ('--max_grad_norm 0', '--max_grad_norm: 0 is not from'),
    ('--device tpu', '--device tpu'),
    ('--compile', '--compile: on the CPU'),
    ('--output_dir texts/a.txt/run --steps 1 --batch_size 2', 'run: cannot be written'),
    ('--data nowhere.txt', 'nowhere.txt'),
    ('--data empty.txt', 'empty.txt'),
    ('--data short.txt', 'too short'),
    ('--data binary.txt', 'binary'),
    ('--data texts --context 5000', 'too short'),
    ('--resume', '--resume: no saved run in out/meanpool'),
    ('--model nowhere', 'nowhere'),
    ('--model nobody/nothing', 'model hub'),
    ('--model texts', 'config.json'),
])
def test_train(here, capsys, command, message):
    (here / 'empty.txt').write_text('', encoding='utf-8')
    (here / 'short.txt').write_text('Too short.', encoding='utf-8')
    (here / 'binary.txt').write_bytes(bytes(range(256)) * 100)
    refused(capsys, train.main, command if '--data' in command else command + ' --data texts', message)


def test_speed_without_a_checkpoint(here, capsys):
    for _ in range(2):                                                        # nothing that a second run would overwrite
        train.main('--data texts --steps 1 --batch_size 2 --save_steps 0'.split())
    assert [p.name for p in (here / 'out' / 'meanpool').iterdir()] == ['log.jsonl'] and 'saved in' not in capsys.readouterr().out


def test_a_run_is_not_overwritten(here, capsys):
    train.main('--data texts --steps 1 --batch_size 2'.split())
    before = {p.name: p.read_bytes() for p in (here / 'out' / 'meanpool').iterdir()}
    refused(capsys, train.main, '--data texts --steps 1', 'holds a run')
    refused(capsys, train.main, '--resume --compression_window_size 500', 'the run to --resume has 4')
    refused(capsys, train.main, '--resume --objective lm --output_dir out/meanpool', '--objective lm')
    refused(capsys, train.main, '--resume --context 64', '--context 64: the run to --resume has 128')
    (here / 'file').write_text('')
    refused(capsys, train.main, '--data texts --output_dir file', 'file: cannot be written')
    assert before == {p.name: p.read_bytes() for p in (here / 'out' / 'meanpool').iterdir()}
    (here / 'out' / 'meanpool' / 'trainer-00000001.pt').write_bytes(b'damaged')
    refused(capsys, train.main, '--resume --steps 2', 'trainer-00000001.pt')


def test_corpora(here, capsys):
    refused(capsys, data.main, 'nowhere --out x', 'nowhere')
    refused(capsys, data.main, 'texts --out texts/a.txt/x', 'x: cannot be written')
    (here / 'records.jsonl').write_text('{"title": "a"}\n' * 20, encoding='utf-8')
    refused(capsys, data.main, 'records.jsonl --out x --field tilte', '20 records without tilte')
    assert not list(here.glob('x*'))
    data.main('texts --out made --context 100 --continuation 20'.split())
    refused(capsys, data.main, 'texts --out made', 'exists already')
    (here / 'corpora').mkdir(exist_ok=True)
    shutil.copytree(here / 'made', here / 'corpora' / 'te_xts_bytes_100_20')
    refused(capsys, train.main, '--data te.xts --context 100 --continuation 20', 'made from texts')
    refused(capsys, train.main, '--data made --context 50', 'made for context 100, not 50')
    meta = json.loads((here / 'made' / 'meta.json').read_text(encoding='utf-8'))
    (here / 'made' / 'meta.json').write_text(json.dumps({**meta, 'tokenizer': 'deepseek 0'}), encoding='utf-8')
    refused(capsys, train.main, '--data made', 'made for tokenizer deepseek 0')
    (here / 'made' / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    with open(here / 'made' / 'train.bin', 'rb+') as f:
        f.truncate(10)
    refused(capsys, train.main, '--data made', 'train.bin: missing or damaged')


def test_eval_and_render(here, capsys):
    refused(capsys, evaluation.main, 'nowhere', 'nowhere: no such run')
    model, _, config = load('tiny', 'meanpool', 128)
    save(released_tensors(model, 'meanpool'), config, here / 'run')
    (here / 'binary').write_bytes(b'\xff\xfe\x00')
    refused(capsys, load_deepseek.main, 'run --export binary/x', 'x: cannot be written')
    Image.new('1', (30, 30)).save(here / 'page.png')
    refused(capsys, evaluation.main, 'run --model run --image page.png', 'run: has no vision encoder')
    (here / 'run' / 'config.json').write_text(json.dumps({'language_config': {}}), encoding='utf-8')
    refused(capsys, evaluation.main, 'run', 'not a run')
    refused(capsys, evaluation.main, 'run --kept -1', '--kept')
    refused(capsys, render.main, 'nowhere.txt', 'nowhere.txt')
    refused(capsys, render.main, 'binary', 'binary')


def test_no_traceback_on_the_command_line(capfd):
    process = fork(train.main, ['--regime', 'jpeg'])
    process.join()
    usage, error, end = capfd.readouterr().err.split('\n')
    assert process.exitcode == 2 and usage.startswith('usage') and 'jpeg' in error and not end
