"""
The comparison: every row starts from results/reader, and trains and is validated on text apart.

    python results/held_out.py enwiki.jsonl heldout
    python results/compare.py heldout out/compare --workers 2        start it again to go on
    python results/compare.py heldout out/compare --seeds 0 --rows lm_conv_16 lm_last_17

A row is one form of the context and one objective. "reconstruction_conv_16" rebuilds the context
from the 16 vectors of a pyramid of convolutions. "lm_conv_16" predicts from them what follows,
straight from the reader. "lm_last_17" keeps the last 17 bytes, which take as many positions as 16
vectors and their separator. With one seed all rows see the same 16,000 segments in the same order,
none of them twice. Convolutions, queries and language models all start as mean pooling: started
from random weights, they had not begun to use their memory after 400 to 800 steps.

    OUT/seed0/lm_conv_16        the run; lm_conv_16.txt beside it is what it printed
    OUT/by_position.jsonl       the final loss of each run by position in the target
    OUT/commands.txt            the command of each run
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
SHARED = ('--batch_size 8 --gradient_accumulation_steps 1 --beta2 0.95 --log_steps 20 '
          '--eval_steps 200 --eval_segments 250 --context 128 --continuation 128')

# What trains each form of the context: a script, the decoder's rate for reconstruction, and flags,
# the last of which takes the row's number. For language modelling all decoders have LM_RATE. The
# rates of the last two forms: results/compare_tries.txt; of the others: results/tries.txt.
LM_RATE = '3e-4'
CONV = '--regime conv1d_residual --encoder_lr 3e-4 --conv_gain 0 --compression_target'
VISION = '--regime vision --workers 1 --encoder_lr 1e-4 --vision_mode'
FROZEN_VISION = '--regime vision --workers 1 --no-train_encoder --vision_mode'
FORMS = {
    'last': ('train.py', '1e-3', '--regime text --text_context_tokens'),
    'meanpool': ('train.py', '3e-3', '--regime meanpool --compression_window_size'),
    'conv': ('train.py', '3e-3', CONV),
    'vision': ('train.py', '3e-4', VISION),
    'frozen_vision': ('train.py', '3e-4', FROZEN_VISION),
    'perceiver': ('examples/perceiver.py train', '3e-3', '--encoder_lr 1e-4 --queries'),
    'llm_encoder': ('examples/llm_encoder.py train', '3e-3', '--encoder_lr 1e-3 --queries'),
}

# Rows with all seeds, then rows with the first seed only: (objective, form, number).
EVERY_SEED = [
    ('reconstruction', 'last', 0),             # no context at all
    ('reconstruction', 'conv', 16),
    ('reconstruction', 'perceiver', 16),
    ('reconstruction', 'llm_encoder', 16),
    ('reconstruction', 'meanpool', 8),
    ('reconstruction', 'vision', 256),
    ('lm', 'last', 0),
    ('lm', 'last', 17),
    ('lm', 'conv', 16),
    ('lm', 'perceiver', 16),
    ('lm', 'llm_encoder', 16),
    ('lm', 'meanpool', 8),
    ('lm', 'vision', 256),
    ('lm', 'last', 128),                       # the whole context
]
FIRST_SEED = [
    ('reconstruction', 'perceiver', 8),
    ('reconstruction', 'llm_encoder', 8),
    ('reconstruction', 'conv', 8),
    ('reconstruction', 'perceiver', 32),
    ('reconstruction', 'llm_encoder', 32),
    ('reconstruction', 'conv', 32),
    ('reconstruction', 'meanpool', 4),
    ('reconstruction', 'frozen_vision', 256),
    ('lm', 'last', 9),
    ('lm', 'last', 33),
    ('lm', 'perceiver', 8),
    ('lm', 'llm_encoder', 8),
    ('lm', 'conv', 8),
    ('lm', 'perceiver', 32),
    ('lm', 'llm_encoder', 32),
    ('lm', 'conv', 32),
    ('lm', 'meanpool', 4),
    ('lm', 'frozen_vision', 256),
]


def name_of(row):
    """(lm, last, 0) -> lm_no_context, (lm, conv, 16) -> lm_conv_16"""
    objective, form, number = row
    if form == 'last' and number in (0, 128):
        return f'{objective}_{"whole" if number else "no"}_context'
    return f'{objective}_{form}_{number}'


def command_of(row, seed, args, out):
    """The command line of a row, from its beginning or from its last save."""
    objective, form, number = row
    script, rate, flags = FORMS[form]
    if objective == 'lm':
        rate = LM_RATE
    if (out / 'model.safetensors').exists():
        flags = f'--resume {out} --steps {args.steps}'
    else:
        flags = (f'--model results/reader --data {args.data} --output_dir {out} '
                 f'--objective {objective} --steps {args.steps} --seed {seed} {SHARED} '
                 f'--learning_rate {rate} {flags} {number}')
    return f'{script} {flags}'.split()


def ended(out, steps):
    """Whether a run has all its steps: the weights are saved last."""
    weights = out / 'model.safetensors'
    return weights.exists() and int(safe_open(weights, 'pt').metadata()['step']) >= steps


def run(row, seed, args):
    """Train one row and measure its loss by position. Does nothing if that was done before."""
    name = name_of(row)
    out = args.out / f'seed{seed}' / name
    console = out.with_suffix('.txt')
    measured = out / 'measured'
    if measured.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    commands = []
    if not ended(out, args.steps):
        commands.append(command_of(row, seed, args, out))
    log = args.out / 'by_position.jsonl'
    commands.append(['results/by_position.py', str(out), '--log', str(log)])
    for command in commands:
        line = 'python ' + ' '.join(command)
        print(line, flush=True)
        with open(args.out / 'commands.txt', 'a') as file:
            file.write(line + '\n')
        with open(console, 'a') as file:
            one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}
            done = subprocess.run(PYTHON + command, cwd=ROOT, env=one_thread,
                                  stdout=file, stderr=file)
        if done.returncode:
            print(f'{out}: stopped; {console} says why', flush=True)
            return
    measured.touch()
    for optimizer in out.glob('optimizer-*.pt'):      # 45 MB or more, which a finished run does not need
        optimizer.unlink()


def main():
    parser = argparse.ArgumentParser(description='Train every row of the comparison.')
    parser.add_argument('data', help='the corpus that results/held_out.py has made')
    parser.add_argument('out', help='folder for the runs')
    add = parser.add_argument
    add('--steps', type=int, default=2000, help='of each run (default 2000, of 8 segments)')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default 0 1 2')
    add('--workers', type=int, default=1, help='runs at a time, one thread each')
    add('--rows', nargs='+', help='only these, such as lm_conv_16 (default: all)')
    args = parser.parse_args()
    args.data = Path(args.data).resolve()
    args.out = Path(args.out).resolve()
    jobs = [(row, seed) for seed in args.seeds for row in EVERY_SEED]
    jobs += [(row, args.seeds[0]) for row in FIRST_SEED]
    if args.rows:
        known = {name_of(row) for row, _ in jobs}
        for name in args.rows:
            if name not in known:
                raise SystemExit(f'no row {name}; there are {", ".join(sorted(known))}')
        jobs = [(row, seed) for row, seed in jobs if name_of(row) in args.rows]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: run(*job, args), jobs))


if __name__ == '__main__':
    main()
