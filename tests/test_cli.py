"""A user's mistake gets one clear line and a non-zero exit code, and costs no checkpoint."""
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
import data
import eval as evaluation
import load_deepseek
import render
import train
from conftest import ROOT, fork, said
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
    ('--regime meanpool --compression_window_size 129', 'window 129'),
    ('--regime meanpool --compression_window_size 0', 'window 0'),
    ('--regime meanpool --hybrid_text_tokens 129', '--hybrid_text_tokens 129'),
    ('--regime meanpool --hybrid_text_tokens -1', '--hybrid_text_tokens -1'),
    ('--regime meanpool --compression_target 32', '--compression_target: not a setting of meanpool'),
    ('--regime text --text_context_tokens 129', 'text_context_tokens 129'),
    ('--regime vision --vision_mode 100', 'vision_mode 100'),
    ('--regime vision --vision_prompt <|nothing|>', '<|nothing|>'),
    ('--objective guess', 'invalid choice'),
    ('--wndow 3', 'unrecognized arguments'),
    ('--batch_size 0', '--batch_size 0: must be above 0'),
    ('--learning_rate nan', '--learning_rate nan: must be at least 0'),
    ('--steps x', "--steps: invalid int value: 'x'"),
    ('--steps 0', '--steps 0: must be above 0'),
    ('--workers -1', '--workers -1: must be at least 0'),
    ('--beta2 2', '--beta2'),
    ('--warmup_ratio 1.1', '--warmup_ratio'),
    ('--learning_rate -1', '--learning_rate -1.0: must be at least 0'),
    ('--max_grad_norm 0', '--max_grad_norm 0.0: must be above 0'),
    ('--device tpu', '--device tpu'),
    ('--device xpu', '--device xpu'),                        # not cuda, which the machine may have
    ('--compile', '--compile: on the CPU'),
    ('--output_dir texts/a.txt/run --steps 1 --batch_size 2', 'texts/a.txt/run'),
    ('--data nowhere.txt', 'nowhere.txt: does not exist'),
    ('--data empty.txt', 'empty.txt'),
    ('--data short.txt', 'too short'),
    ('--data binary.txt', 'left out, not UTF-8'),
    ('--data texts --context 5000', 'too short'),
    ('--data texts --context 0', '--context 0: must be above 0'),
    ('--resume', 'out/meanpool'),
    ('--resume --output_dir texts', '--resume: no saved run in texts'),
    ('--model nowhere', 'nowhere'),
    ('--model nobody/nothing', 'not found on the hub'),
    ('--model texts', 'texts/config.json'),
])
def test_train(here, capsys, command, message):
    (here / 'empty.txt').write_text('', encoding='utf-8')
    (here / 'short.txt').write_text('Too short.', encoding='utf-8')
    (here / 'binary.txt').write_bytes(bytes(range(256)) * 100)
    refused(capsys, train.main, command if '--data' in command else command + ' --data texts', message)
    assert not (here / 'out').exists() and not list(here.glob('corpora/*tmp*'))


def test_several_processes(here, capsys, monkeypatch):
    """They share the micro-batches, and a corpus that is made beforehand."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    refused(capsys, train.main, '--data texts --gradient_accumulation_steps 3', '--gradient_accumulation_steps 3')


def test_speed_without_a_checkpoint(here, capsys):
    for _ in range(2):                                                        # nothing that a second run would overwrite
        train.main('--data texts --steps 1 --batch_size 2 --save_steps 0'.split())
    assert [p.name for p in (here / 'out' / 'meanpool').iterdir()] == ['log.jsonl']
    assert 'nothing saved' in capsys.readouterr().out


def test_a_run_is_not_overwritten(here, capsys):
    train.main('--data texts --steps 1 --batch_size 2'.split())
    run = here / 'out' / 'meanpool'
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert sorted(before) == ['AdamW-00000001.pt', 'config.json', 'log.jsonl', 'model.safetensors']
    refused(capsys, train.main, '--data texts --steps 1', 'holds a run')
    refused(capsys, train.main, '--resume --compression_window_size 500', 'the run to --resume has 4')
    refused(capsys, train.main, '--resume --objective lm --output_dir out/meanpool', '--objective lm')
    refused(capsys, train.main, '--resume --context 64', '--context 64: the run to --resume has 128')
    refused(capsys, train.main, '--resume --steps 2 --optimizer adafactor', 'Adafactor-00000001.pt')
    (here / 'file').write_text('')
    refused(capsys, train.main, '--data texts --output_dir file', 'file')
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}
    for damaged in (b'damaged', b'', before['AdamW-00000001.pt'][:-500]):
        (run / 'AdamW-00000001.pt').write_bytes(damaged)
        refused(capsys, train.main, '--resume --steps 2', 'AdamW-00000001.pt')
    (run / 'AdamW-00000001.pt').unlink()
    refused(capsys, train.main, '--resume --steps 2', 'AdamW-00000001.pt')
    (run / 'model.safetensors').write_bytes(before['model.safetensors'][:-1])
    refused(capsys, train.main, '--resume --steps 2', 'model.safetensors')
    (run / 'config.json').write_text('{"run": ')
    refused(capsys, train.main, '--resume --steps 2', 'config.json')


def test_corpora(here, capsys):
    refused(capsys, data.main, 'nowhere --out x', 'nowhere: does not exist')
    refused(capsys, data.main, 'texts --out texts/a.txt/x', 'texts/a.txt')
    (here / 'records.jsonl').write_text('{"title": "a"}\n' * 20, encoding='utf-8')
    refused(capsys, data.main, 'records.jsonl --out x --field tilte', '20 left out, without tilte')
    (here / 'pictures').mkdir()
    refused(capsys, data.main, 'pictures --out x', 'no .jsonl .md .parquet .py .txt files')
    refused(capsys, data.main, 'texts --out x --context -5', '--context -5: must be above 0')
    assert not list(here.glob('x*'))
    data.main('texts --out made --context 100 --continuation 20'.split())
    refused(capsys, data.main, 'texts --out made', 'exists already')
    refused(capsys, train.main, '--data made --context 50', 'made for context 100, not 50')
    refused(capsys, train.main, '--data made --continuation 50', 'made for continuation 20, not 50')
    meta = json.loads((here / 'made' / 'meta.json').read_text(encoding='utf-8'))
    (here / 'made' / 'meta.json').write_text(json.dumps({**meta, 'tokenizer': 'deepseek 0'}), encoding='utf-8')
    refused(capsys, train.main, '--data made', 'made for tokenizer deepseek 0')
    (here / 'made' / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    with open(here / 'made' / 'train.bin', 'rb+') as f:
        f.truncate(10)
    refused(capsys, train.main, '--data made', 'train.bin: missing or damaged')
    (here / 'made' / 'train.bin').unlink()
    refused(capsys, train.main, '--data made', 'train.bin: missing or damaged')


def test_a_source_has_a_corpus_for_its_files_as_they_are_now(here):
    """Another text, other lengths and another file name are another corpus; the same again is found, not made."""
    made = lambda source, *lengths: data.corpus_of(source, load_deepseek.tokenizer_of('tiny'), *lengths)
    first = made('texts', 100, 20)
    stamp = (here / first / 'train.bin').stat().st_mtime_ns
    assert made('texts', 100, 20) == made('./texts', 100, 20) == first and made(first, 9, 9) == first      # made by data.py: as it is
    assert (here / first / 'train.bin').stat().st_mtime_ns == stamp
    others = {first, made('texts', 100, 30), made('texts/a.txt', 100, 20)}
    (here / 'texts' / 'a.txt').write_text(LONG + 'more', encoding='utf-8')
    assert len(others | {made('texts', 100, 20)}) == 4


def test_eval_and_render(here, capsys):
    refused(capsys, evaluation.main, 'nowhere', 'nowhere: no such folder')
    model, _, config = load('tiny', 'meanpool', 128)
    save(released_tensors(model, 'meanpool'), config, here / 'run')
    (here / 'binary').write_bytes(b'\xff\xfe\x00')
    refused(capsys, load_deepseek.main, 'run --export binary/x', 'binary')
    refused(capsys, load_deepseek.main, 'nowhere --export x', 'nowhere: no such folder')
    Image.new('1', (30, 30)).save(here / 'page.png')
    refused(capsys, evaluation.main, 'run --model run --image page.png', 'run: has no vision encoder')
    refused(capsys, evaluation.main, 'run --segments 0', '--segments 0: must be above 0')
    refused(capsys, render.main, 'page.txt --size 0', '--size 0: must be above 0')
    refused(capsys, render.main, 'page.txt --size 1000000', 'at most 10000')
    refused(capsys, train.main, f'--data texts --seed {2 ** 63}', 'must be below 2^63')
    refused(capsys, evaluation.main, 'run --generate -1', '--generate -1: must be at least 0')
    refused(capsys, evaluation.main, '', 'give a RUN or an --image')
    (here / 'no_save').mkdir()
    refused(capsys, evaluation.main, 'run no_save', 'no_save/config.json: cannot be read')                    # before run is evaluated
    (here / 'run' / 'config.json').write_text(json.dumps({**config, 'run': {**config['run'], 'regime': 'jpeg'}}), encoding='utf-8')
    refused(capsys, evaluation.main, 'run', 'its encoder, jpeg, is not registered')
    (here / 'run' / 'config.json').write_text(json.dumps({'language_config': {}}), encoding='utf-8')
    refused(capsys, evaluation.main, 'run', 'not a run')
    refused(capsys, render.main, 'nowhere.txt', 'nowhere.txt')
    refused(capsys, render.main, 'binary', 'binary')
    refused(capsys, render.main, 'texts/a.txt --out nowhere/page.png', 'nowhere/page.png')


def test_no_traceback_on_the_command_line(capfd):
    process = fork(train.main, ['--regime', 'jpeg'])
    process.join()
    usage, error, end = capfd.readouterr().err.split('\n')
    assert process.exitcode == 2 and usage.startswith('usage') and 'jpeg' in error and not end


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(here, capsys, monkeypatch):
    """ValueErrors of our own files and of the system are mistakes; those raised elsewhere are bugs, and DEBUG=1 shows all."""
    def raised(error):
        def main(argv):
            raise error
        return main
    assert said(capsys, raised(OSError(28, 'No space left on device', 'x.bin')), '') == "[Errno 28] No space left on device: 'x.bin'"
    assert said(capsys, raised(ModuleNotFoundError("No module named 'pyarrow'", name='pyarrow.parquet')), '') \
        == "No module named 'pyarrow'; pip install pyarrow"
    assert said(capsys, lambda argv: render.render_page('a', 64, font='no\nfont'), '').startswith('no font: no such font')
    for error in (ValueError('of a test, which is not one of our own files'), TypeError('a bug'), KeyError('another')):
        with pytest.raises(SystemExit, match=f'(?s)Traceback.*{type(error).__name__}'):
            render.run_main(lambda: raised(error)(None))
    with pytest.raises(SystemExit, match='(?s)Traceback.*JSONDecodeError'):
        render.run_main(lambda: json.loads('{'))
    monkeypatch.setenv('DEBUG', '1')
    with pytest.raises(SystemExit, match='(?s)Traceback.*nofont'):
        render.run_main(lambda: render.render_page('a', 64, font='nofont'))


def test_a_bug_ends_the_process_while_workers_draw_pages(here):
    """Workers ignore SIGTERM, so whatever waits for them at exit must let go of the loader first."""
    script = """if True:
        import render, train
        def step(*args):
            raise RuntimeError('out of memory')
        train.train_step = step
        render.run_main(lambda: train.main('--regime vision --vision_mode 64 --data texts --context 32 --workers 1'.split()))"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=60)
    assert done.returncode == 1 and 'Traceback' in done.stderr and done.stderr.rstrip().endswith('RuntimeError: out of memory')


def test_the_entry_point(here):
    """What a shell sees: exit code 1 and one line on stderr."""
    done = subprocess.run([sys.executable, ROOT / 'render.py', 'nowhere.txt'], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != 'DEBUG'})
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'nowhere.txt' in done.stderr and not done.stdout
    for name in ('data', 'load_deepseek', 'train', 'eval'):
        assert (ROOT / f'{name}.py').read_text(encoding='utf-8').endswith("\nif __name__ == '__main__':\n    run_main(main)\n"), name
