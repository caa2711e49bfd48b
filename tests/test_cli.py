"""A user's mistake gets one clear line and a non-zero exit code, and costs no checkpoint."""
import json
import os
import platform
import subprocess
import sys
import time

import pytest
import data
import encoders
import eval as evaluation
import load_deepseek
import render
import train
from conftest import ROOT, byte_tokenizer, fork, said
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
    assert message in (line := said(capsys, main, command)), line

@pytest.mark.parametrize('command, message', [
    ('--regime jpeg', "invalid choice: 'jpeg'"),
    ('--regime conv1d_residual --compression_target 33', '[128, 64, 32, 16, 8, 4, 2, 1]'),
    ('--regime conv1d_residual --conv_kernel 4', 'conv_kernel 4'),
    ('--regime meanpool --compression_window_size 129', 'compression_window_size 129'),
    ('--regime meanpool --hybrid_text_tokens 129', '--hybrid_text_tokens 129'),
    ('--regime meanpool --hybrid_text_tokens -1', '--hybrid_text_tokens -1'),
    ('--regime meanpool --compression_target 32', '--compression_target: not a setting of meanpool'),
    ('--regime text --text_context_tokens 129', 'text_context_tokens 129'),
    ('--regime text --text_context_tokens -1', 'text_context_tokens -1'),
    ('--regime meanpool --compression_window_size 0', 'compression_window_size 0'),
    ('--regime meanpool --compression_stride -1', 'compression_stride -1'),
    ('--regime vision --vision_mode huge', 'tiny, small, base, large'),
    ('--regime vision --vision_mode 100', 'vision_mode 100'),
    ('--objective guess', 'invalid choice'),
    ('--wndow 3', 'unrecognized arguments'),
    ('--train_encoder False', 'unrecognized arguments: False'),
    ('--batch_size 0', "--batch_size: invalid positive value: '0'"),
    ('--learning_rate nan', "--learning_rate: invalid rate value: 'nan'"),
    ('--learning_rate inf', "--learning_rate: invalid rate value: 'inf'"),
    ('--learning_rate -1', "--learning_rate: invalid rate value: '-1'"),
    ('--steps x', "--steps: invalid positive value: 'x'"),
    ('--steps 0', "--steps: invalid positive value: '0'"),
    ('--context 0', "--context: invalid positive value: '0'"),
    ('--workers -1', 'num_workers'),
    ('--seed -1', 'non-negative'),
    ('--beta2 2', 'beta'),
    ('--device tpu', '--device tpu'),
    ('--device xpu', '--device xpu'),                        # not cuda, which the machine may have
    ('--output_dir texts/a.txt/run', 'texts/a.txt/run'),
    ('--output_dir texts/a.txt', 'texts/a.txt'),
    ('--data nowhere.txt', 'nowhere.txt: does not exist; --data'),
    ('--data empty.txt', 'too short'),
    ('--data short.txt', 'too short'),
    ('--data binary.txt', '1 unreadable'),
    ('--data texts --context 5000', 'too short'),
    ('--resume out/meanpool', '--resume out/meanpool: no saved run there'),
    ('--resume texts', '--resume texts: no saved run there'),
    ('--model nowhere', 'nowhere: no such folder'),
    ('--model nobody/nothing', 'the hub says'),
    ('--model texts', 'texts/config.json'),
])
def test_train(here, capsys, command, message):
    """No such mistake costs a run of 700 steps, which is what a command without --steps would be."""
    (here / 'empty.txt').write_text('', encoding='utf-8')
    (here / 'short.txt').write_text('Too short.', encoding='utf-8')
    (here / 'binary.txt').write_bytes(bytes(range(256)) * 100)
    command = command if '--data' in command else command + ' --data texts'
    command = command if '--steps' in command else command + ' --steps 1 --batch_size 2'
    refused(capsys, train.main, command, message)
    assert not list(here.glob('out/*/model.safetensors')) and not list(here.glob('corpora/*tmp*'))

def test_several_processes(here, capsys, monkeypatch):
    """They share the micro-batches; a rank without its world is a mistake."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    refused(capsys, train.main, '--data texts --gradient_accumulation_steps 3', '--gradient_accumulation_steps 3')
    monkeypatch.delenv('WORLD_SIZE')
    monkeypatch.setenv('RANK', '1')
    refused(capsys, train.main, '--data texts', 'RANK 1 is not below WORLD_SIZE 1')

def test_speed_without_a_checkpoint(here, capsys):
    for _ in range(2):                                                        # nothing that a second run would overwrite
        train.main('--data texts --steps 1 --batch_size 2 --eval_steps 0'.split())
    assert sorted(p.name for p in (here / 'out' / 'meanpool').iterdir()) == ['lock', 'log.jsonl']
    assert 'shows more' not in capsys.readouterr().out

def test_a_run_is_not_overwritten(here, capsys):
    train.main('--data texts --steps 1 --batch_size 2'.split())
    run = here / 'out' / 'meanpool'
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert sorted(before) == ['config.json', 'lock', 'log.jsonl', 'model.safetensors', 'optimizer-00000001.pt']
    refused(capsys, train.main, '--data texts --steps 1', 'holds a run; --resume out/meanpool continues it')
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}
    for damaged in (b'damaged', b'', before['optimizer-00000001.pt'][:-500], None):
        (run / 'optimizer-00000001.pt').unlink() if damaged is None else (run / 'optimizer-00000001.pt').write_bytes(damaged)
        refused(capsys, train.main, '--resume out/meanpool --steps 2', 'optimizer-00000001.pt: missing or damaged')
    (run / 'model.safetensors').write_bytes(before['model.safetensors'][:-1])
    refused(capsys, train.main, '--resume out/meanpool --steps 2', 'model.safetensors')
    (run / 'config.json').write_text('{"run": ')
    refused(capsys, train.main, '--resume out/meanpool --steps 2', 'config.json')

def test_a_first_save_that_was_cut_short_bars_nothing(here, capsys):
    """config.json and the optimiser are there, the weights are not."""
    train.main('--data texts --steps 1 --batch_size 2'.split())
    (here / 'out' / 'meanpool' / 'model.safetensors').unlink()
    refused(capsys, train.main, '--resume out/meanpool', 'no saved run there')
    train.main('--data texts --steps 1 --batch_size 2'.split())
    assert (here / 'out' / 'meanpool' / 'model.safetensors').exists()

def test_two_runs_never_share_a_folder(here, capsys):
    """The second is refused at its start, also before the first save; a killed run does not bar its folder."""
    first = fork(train.main, '--data texts --steps 100000 --batch_size 2 --eval_steps 0'.split())
    until = time.time() + 60
    while not (here / 'out' / 'meanpool' / 'log.jsonl').exists() and time.time() < until:
        time.sleep(0.02)
    refused(capsys, train.main, '--data texts --steps 1 --batch_size 2 --seed 1', 'out/meanpool: another run is being trained there')
    first.kill()
    first.join()
    train.main('--data texts --steps 1 --batch_size 2'.split())

def test_the_lock_comes_before_anything_is_read(here, monkeypatch):
    """Otherwise a second run, still loading when the first one saves and ends, would overwrite it."""
    command, seen, load_model = '--data texts --steps 1 --batch_size 2'.split(), [], train.load

    def second():
        train.load = load_model
        train.main(command)

    def loading(*args, **settings):
        other = fork(second)
        other.join()
        seen.append(other.exitcode)
        return load_model(*args, **settings)
    monkeypatch.setattr(train, 'load', loading)
    train.main(command)
    assert seen == [1]

def test_a_run_whose_corpus_or_encoder_is_gone(here, capsys, monkeypatch):
    train.main('--data texts --steps 1 --batch_size 2'.split())
    (here / 'corpora').rename(here / 'elsewhere')
    refused(capsys, evaluation.main, 'out/meanpool', 'does not exist; --data')
    monkeypatch.delitem(encoders.ENCODERS, 'meanpool')
    refused(capsys, evaluation.main, 'out/meanpool --data texts', 'its encoder, meanpool, is not registered')
    for command in ('--model out/meanpool --data texts', '--resume out/meanpool'):
        refused(capsys, train.main, command, 'meanpool')

def test_corpora(here, capsys):
    refused(capsys, data.main, 'nowhere --out x', 'nowhere: does not exist')
    refused(capsys, data.main, 'texts --out texts/a.txt/x', 'texts/a.txt')
    (here / 'records.jsonl').write_text('{"title": "a"}\n' * 20, encoding='utf-8')
    refused(capsys, data.main, 'records.jsonl --out x --field tilte', 'no field tilte, only title; choose one with data.py --field')
    (here / 'pictures').mkdir()
    refused(capsys, data.main, 'pictures --out x', 'no .txt .md .py .jsonl .parquet files')
    refused(capsys, data.main, 'texts --out x --context -5', "--context: invalid positive value: '-5'")
    refused(capsys, data.main, 'texts', '--out None: name a folder')
    assert not list(here.glob('x*'))
    data.main('texts --out made --context 100 --continuation 20'.split())
    refused(capsys, data.main, 'texts --out made', '--out made: name a folder that does not exist yet')
    lengths = ' --context 100 --continuation 20 --steps 1'
    refused(capsys, train.main, '--data made --context 50', 'made for context 100, not 50')
    refused(capsys, train.main, '--data made --context 100 --continuation 50', 'made for continuation 20, not 50')
    meta = json.loads((here / 'made' / 'meta.json').read_text(encoding='utf-8'))
    (here / 'made' / 'meta.json').write_text(json.dumps({**meta, 'tokenizer': 'deepseek 0'}), encoding='utf-8')
    refused(capsys, train.main, '--data made' + lengths, 'made for tokenizer deepseek 0')
    (here / 'made' / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    with open(here / 'made' / 'train.bin', 'rb+') as f:
        f.truncate(10)
    refused(capsys, train.main, '--data made' + lengths, 'train.bin: missing or damaged')
    (here / 'made' / 'train.bin').unlink()
    refused(capsys, train.main, '--data made' + lengths, 'train.bin: missing or damaged')

def test_a_source_has_a_corpus_for_its_files_as_they_are_now(here):
    """Another text, other lengths, another tokenizer and another file name are another corpus; the same again is found, not made."""
    tiny = load_deepseek.tokenizer_of('tiny')
    made = lambda source, *lengths, tokenizer=tiny: data.open_corpus(source, tokenizer, *lengths)[0]
    first = made('texts', 100, 20)
    stamp = (here / first / 'train.bin').stat().st_mtime_ns
    assert made('texts', 100, 20) == made('./texts', 100, 20) == made(first, 100, 20) == first
    assert (here / first / 'train.bin').stat().st_mtime_ns == stamp
    turned = byte_tokenizer(lambda byte: 258 - byte)
    others = {first, made('texts', 100, 30), made('texts/a.txt', 100, 20), made('texts', 100, 20, tokenizer=turned)}
    (here / 'texts' / 'a.txt').write_text(LONG + 'more', encoding='utf-8')
    assert len(others | {made('texts', 100, 20)}) == 5
    manual = made('pydoc', 100, 20)
    assert platform.python_version() in manual.name
    (here / 'texts' / 'meta.json').write_text('{"made": "by hand"}', encoding='utf-8')                      # of the texts' own
    assert made('texts', 100, 20).parent.name == 'corpora'

def test_eval_and_render(here, capsys):
    refused(capsys, evaluation.main, 'nowhere', 'nowhere: no run with a save there')
    model, _, config = load('tiny', 'meanpool', 128)
    config['run'] |= {'data': 'texts', 'args': {'continuation': 128}}
    save(released_tensors(model, 'meanpool'), config, here / 'run')
    (here / 'binary').write_bytes(b'\xff\xfe\x00')
    refused(capsys, evaluation.main, 'run --segments 0', "--segments: invalid positive value: '0'")
    refused(capsys, render.main, 'page.txt --size 0', '--size 0: must be above 0')
    refused(capsys, render.main, 'page.txt --size 1000000', 'at most 10000')
    refused(capsys, evaluation.main, '', 'the following arguments are required: RUN')
    (here / 'no_save').mkdir()
    refused(capsys, evaluation.main, 'run no_save', 'no_save: no run with a save there')                    # before run is evaluated
    (here / 'run' / 'config.json').write_text(json.dumps({**config, 'run': {**config['run'], 'regime': 'jpeg'}}), encoding='utf-8')
    refused(capsys, evaluation.main, 'run', 'its encoder, jpeg, is not registered')
    (here / 'run' / 'config.json').write_text(json.dumps({'language_config': {}}), encoding='utf-8')
    refused(capsys, evaluation.main, 'run', 'no run of train.py')
    refused(capsys, render.main, 'nowhere.txt', 'nowhere.txt')
    refused(capsys, render.main, 'binary', 'binary')
    refused(capsys, render.main, 'texts/a.txt --out nowhere/page.png', 'nowhere/page.png')

def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(here, capsys, monkeypatch):
    def raised(error):
        def main(argv=None):
            raise error
        return main
    end = ' (DEBUG=1 shows where)'
    assert said(capsys, raised(OSError(28, 'No space left on device', 'x.bin')), '') == "[Errno 28] No space left on device: 'x.bin'" + end
    assert said(capsys, raised(ModuleNotFoundError("No module named 'pyarrow'")), '') == "No module named 'pyarrow'" + end
    assert said(capsys, raised(ValueError('of two\nlines')), '') == 'of two lines' + end
    assert said(capsys, raised(KeyboardInterrupt()), '') == 'KeyboardInterrupt' + end
    for error in (TypeError('a bug'), KeyError('another')):
        with pytest.raises(type(error)):
            load_deepseek.run_main(raised(error))
    monkeypatch.setenv('DEBUG', '1')
    with pytest.raises(ValueError, match='nofont'):
        load_deepseek.run_main(lambda: render.render_page('a', 64, font='nofont'))

def test_the_entry_point(here):
    """What a shell sees: exit code 1 and one line on stderr."""
    done = subprocess.run([sys.executable, ROOT / 'render.py', 'nowhere.txt'], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != 'DEBUG'})
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'nowhere.txt' in done.stderr and not done.stdout
    for name in ('data', 'train', 'eval'):
        assert (ROOT / f'{name}.py').read_text(encoding='utf-8').endswith("\nif __name__ == '__main__':\n    run_main(main)\n"), name
