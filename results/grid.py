"""
The paper's comparison at laptop scale: every regime from results/reader, reconstruction and then language modelling.

    python data.py finewiki --out wiki --context 128 --continuation 128 --train_segments 200000 --val_segments 2000
    python results/grid.py wiki out/grid --workers 2               a night on two CPU cores; start it again to go on
    python results/grid.py wiki out/grid --workers 2 --seed 1      the same rows with another seed, in out/grid/seed1
    python results/grid_report.py out/grid                         the tables and the pictures, from the logs

Each row is one run of train.py. All rows see the same number of segments, none of them twice. "lm_reader_" is language
modelling straight from the reader. "lm_" is language modelling from the reconstruction run of its row, so that every
decoder has had two stages; truncation and no context start from the run that had to predict the context without seeing
it ("none"). "last_17" keeps 17 tokens, as many as the 16 convolution vectors or means of the same wave with their
separator. "_hybrid" adds as many of the last tokens to the memory. "_off" takes the memory away from the second stage
of its row: what the first stage did to the decoder as a language model. Convolutions start as mean pooling (--conv_gain
0): started as in the paper, they had not begun to use their memory after 200 to 800 steps at seven pairs of rates
(results/grid/tries.txt).
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
SHARED = ('--batch_size 8 --gradient_accumulation_steps 1 --beta2 0.95 --log_steps 20 --eval_steps 200 '
          '--eval_segments 250 --save_steps 200')
# Peak learning rate of the decoder for reconstruction and for language modelling (results/grid/tries.txt), other flags.
REGIMES = {
    'text': ('1e-3', '1e-3', '--regime text --text_context_tokens'),
    'meanpool': ('3e-3', '1e-3', '--regime meanpool --compression_window_size'),
    'conv': ('3e-3', '1e-3', '--regime conv1d_residual --encoder_lr 3e-4 --conv_gain 0 --compression_target'),
    'vision': ('3e-4', '3e-4', '--regime vision --encoder_lr 1e-4 --vision_mode'),
    'frozen': ('3e-4', '3e-4', '--regime vision --no-train-encoder --vision_mode')}

def rows():
    """Yield waves, the most important ones first: lists of (name, folder to start from, flags)."""
    memories = [[('meanpool', 8), ('vision', 256), ('conv', 16)], [('meanpool', 4), ('vision', 320), ('conv', 32)],
                [('meanpool', 16), ('vision', 192), ('conv', 8)], [('meanpool', 2), ('frozen', 256), ('conv', 64)],
                [('meanpool', 32), ('conv', 4)]]

    def flags(regime, value, rate):
        return f'--learning_rate {rate} {REGIMES[regime][2]} {value}'

    def lm(regime, value, rate=None):
        return flags(regime, value, rate or REGIMES[regime][1]) + ' --objective lm'

    for first, wave in enumerate(memories):
        kept = {8: 17, 4: 33, 16: 9, 2: 65, 32: 5}[wave[0][1]]
        yield ([('none', None, flags('text', 0, '1e-3'))] if first == 0 else []) + [
            (f'{regime}_{value}', None, flags(regime, value, REGIMES[regime][0])) for regime, value in wave]
        second = [(f'lm_{regime}_{value}', f'{regime}_{value}', lm(regime, value)) for regime, value in wave]
        lengths = [kept] + ([0, 128] if first == 0 else [])
        second += [(f'lm_last_{n}', 'none', lm('text', n)) for n in lengths]
        second += [(f'lm_reader_last_{n}', None, lm('text', n, '3e-4')) for n in lengths]
        for regime, value in wave:
            name, hybrid = f'{regime}_{value}', f' --hybrid_text_tokens {kept}'
            second += [(f'lm_reader_{name}', None, lm(regime, value, '3e-4')),
                       (f'lm_reader_{name}_hybrid', None, lm(regime, value, '3e-4') + hybrid),
                       (f'lm_{name}_off', name, lm('text', 0, REGIMES[regime][1])),
                       (f'lm_{name}_hybrid', name, lm(regime, value) + hybrid)]
        yield second

def run(args, folder, row):
    """One row, from its last save if there is one."""
    name, start, flags = row
    out = folder / name

    def ended():               # the weights are saved last
        weights = out / 'model.safetensors'
        return weights.exists() and int(safe_open(weights, 'pt').metadata()['step']) >= args.steps
    if ended():
        return
    model = folder / start if start else ROOT / 'results' / 'reader'
    command = ['--resume', '--steps', str(args.steps)] if (out / 'model.safetensors').exists() else [
        '--model', str(model), '--data', args.data, '--steps', str(args.steps), '--seed', str(args.seed),
        *SHARED.split(), *flags.split()]
    command = [sys.executable, 'train.py', '--output_dir', str(out), *command]
    print(' '.join(command), flush=True)
    with open(f'{out}.txt', 'a') as console:
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=console,
                              stderr=console).returncode
    if code or not ended():
        raise SystemExit(f'{name}: stopped; {out}.txt says why')
    for optimizer in out.glob('Ada*.pt'):                     # 45 MB that a finished run does not need
        optimizer.unlink()

def main():
    parser = argparse.ArgumentParser(description='Train every row of the comparison.')
    parser.add_argument('data', help='corpus of 128 + 128 bytes a segment, made by data.py')
    parser.add_argument('out', help='folder for the runs')
    parser.add_argument('--steps', type=int, default=2000, help='of each run (default 2000, 16,000 segments)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=1, help='runs at a time, one thread each')
    parser.add_argument('--rows', nargs='+', help='only these, such as meanpool_8 lm_meanpool_8 (default: all)')
    args = parser.parse_args()
    args.data, folder = str(Path(args.data).resolve()), Path(args.out).resolve() / f'seed{args.seed}'
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool:
        for wave in rows():
            list(pool.map(lambda row: run(args, folder, row),
                          [row for row in wave if not args.rows or row[0] in args.rows]))

if __name__ == '__main__':
    main()
