"""
One run: one encoder, one objective.

    python train.py --regime meanpool                         a laptop, two minutes: the tiny model
    python train.py --model out/meanpool --objective lm       stage two, from that run
    python train.py --resume out/meanpool --steps 1400        continue an interrupted run, or go on
    python data.py finewiki --out fw --model deepseek-ai/DeepSeek-OCR \\
        --train_segments 500000 --val_segments 10000
    python train.py --regime meanpool --model deepseek-ai/DeepSeek-OCR --data fw     on a large GPU
    torchrun --nproc_per_node=6 train.py ...                  the same on six

A run is a folder, out/<regime> or out/<regime>_lm: config.json, the weights and the optimiser as
last saved, and log.jsonl, a line a report. A run that starts from another one (--model) inherits
its flags.
"""
import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel

from data import Batches, open_corpus
from decoder import OBJECTIVES
from encoders import ENCODERS, settings_of
from eval import autocast, evaluate, passages, pick_device, show, to_device
from load_deepseek import (PRESETS, add_flags, fetch, load, positive, read_json, released_tensors,
                           run_main, save, write_atomic)

# ---- flags

def rate(text):
    """A finite number of at least 0, as argparse's type of a flag."""
    if not 0 <= float(text) < math.inf:     # so NaN is refused too
        raise ValueError
    return float(text)

@dataclass(kw_only=True)
class Flags:
    """The flags: their help here, their types and defaults below. The defaults follow the paper.

    model: tiny, full (random weights), a hub id, a folder or a run
    regime: which encoder
    objective: what the decoder predicts from the memory
    hybrid_text_tokens: last context tokens that follow the memory as plain tokens
    train_encoder: train the encoder too; --no-train_encoder freezes its parameters
    data: a corpus made by data.py, or a source for data.py
    context: context tokens in a segment
    continuation: tokens in a segment that follow the context
    output_dir: the run's folder (default: out/<regime> or out/<regime>_lm)
    resume: continue the run in this folder, with its flags
    steps: optimiser steps (default: one epoch)
    batch_size: segments in a micro-batch
    gradient_accumulation_steps: micro-batches in a step, over all processes
    learning_rate: peak of the schedule
    encoder_lr: that of the encoder (default: 1e-5 for pretrained vision, otherwise learning_rate)
    weight_decay: of all parameters
    beta2: of AdamW
    warmup_ratio: share of the steps in which the learning rate rises
    max_grad_norm: clip the gradient to this norm
    low_memory: Adafactor, at a learning rate of 5e-3; activations of the decoder are computed twice
    weights: dtype of the trained weights, fp32 or bf16; the authors use bf16
    seed: of random weights and of the order of the data
    device: cpu, cuda, mps; auto is cuda if there is one
    compile: use torch.compile on CUDA; --no-compile does not
    workers: processes that prepare batches (default: CPU 0, vision 2; CUDA 2, vision 6)
    log_steps: steps between lines of the log
    eval_steps: steps between validations, each with a save; 0 is never
    eval_segments: validation segments, at most"""
    model: str = 'tiny'
    regime: str = 'meanpool'
    objective: str = 'reconstruction'
    hybrid_text_tokens: int = 0
    train_encoder: bool = True
    data: str = 'pydoc'
    context: positive = 1000
    continuation: positive = 1000
    output_dir: str = None
    resume: str = None
    steps: positive = None
    batch_size: positive = 8
    gradient_accumulation_steps: positive = 6
    learning_rate: rate = 1e-4
    encoder_lr: rate = None
    weight_decay: rate = 0.01
    beta2: rate = 0.999
    warmup_ratio: rate = 0.1
    max_grad_norm: rate = 1.0
    low_memory: bool = False
    weights: str = 'fp32'
    seed: int = 0
    device: str = 'auto'
    compile: bool = True
    workers: int = None
    log_steps: positive = 10
    eval_steps: int = 500
    eval_segments: positive = 500

# Where the tiny model departs from these defaults.
TINY = {
    'context': 128,
    'continuation': 128,
    'steps': 700,
    'gradient_accumulation_steps': 1,
    'learning_rate': 3e-3,
    'beta2': 0.95,
    'log_steps': 20,
    'eval_steps': 200,
}
MACHINE = ('device', 'compile', 'workers')                          # no run inherits these
REPORTS = ('log_steps', 'eval_steps', 'eval_segments')              # a resumed run may change these
CHOICES = {'regime': ENCODERS, 'objective': OBJECTIVES, 'weights': ('fp32', 'bf16')}

def flags():
    """The command line: the flags and all encoders' settings. Two encoders may share a setting's
    name. What is not given is left out, as parse_args() knows the defaults."""
    parser = argparse.ArgumentParser(
        usage='python train.py [--flag value ...]', allow_abbrev=False, conflict_handler='resolve',
        epilog=f'With --model tiny, these replace the defaults above: {TINY}.')
    add_flags(parser, Flags, CHOICES, default=argparse.SUPPRESS)
    for name, encoder in ENCODERS.items():
        for setting in settings_of(encoder):
            if setting in settings_of(Flags):
                raise ValueError(f'{name}: its setting {setting} has the name of a flag')
        group = parser.add_argument_group(f'--regime {name}')
        add_flags(group, encoder, default=argparse.SUPPRESS)
    return parser

def parse_args(argv=None):
    """The flags and settings of a run, as a namespace. Values come in layers, the weakest first:
    Flags, TINY, the run that it resumes or starts from, the command line. Raises ValueError or
    OSError."""
    given = vars(flags().parse_args(argv))
    resume = given.get('resume')
    source = resume or given.get('model', Flags.model)
    if resume and not Path(resume, 'model.safetensors').exists():
        raise ValueError(f'--resume {resume}: no saved run there')
    args = vars(Flags())
    run = {}
    if source == 'tiny':
        args |= TINY
    elif source not in PRESETS:
        run = read_json(fetch(source, '*.json') / 'config.json').get('run', {})
    inherited = run.get('args', {})
    if resume and not inherited:
        raise ValueError(f'--resume {resume}: a model, but no run of train.py')
    args |= inherited
    low_memory = given.get('low_memory', args['low_memory'])
    if low_memory != args['low_memory']:    # another optimiser needs another rate
        args['learning_rate'] = 5e-3 if low_memory else Flags.learning_rate
    if given.get('regime', args['regime']) == run.get('regime'):
        args |= run['settings']

    if resume:
        stored = {**run['args'], **run['settings'], 'output_dir': resume}
        for name, value in given.items():
            was = stored.get(name, value)
            if name not in ('steps', *REPORTS) and value != was:
                raise ValueError(f'--{name} {value}: the run to resume has {was}')
        args['output_dir'] = resume
    args = argparse.Namespace(**{**args, **given})
    if args.output_dir is None:
        args.output_dir = f'out/{args.regime}'
        if args.objective != 'reconstruction':
            args.output_dir += f'_{args.objective}'
    return args

# ---- one step

def learning_rate_scale(step, steps, warmup_ratio):
    """Share of the peak rate at a step: linear from 0.1 to 1, then half a cosine down to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

def make_optimizer(model, encoder_lr, args):
    """AdamW or, with little memory, Adafactor; a group for the encoder, one for the decoder."""
    groups = []
    for part, peak in ((model.encoder, encoder_lr), (model.decoder, args.learning_rate)):
        trained = [p for p in part.parameters() if p.requires_grad]
        groups.append({'params': trained, 'peak_lr': peak})
    if args.low_memory:
        # torch's defaults suit fp32. Its eps is larger than most squared gradients in bf16, and
        # its average of them becomes too slow for bf16: at step t ours keeps 1 - t ** -0.5 of it.
        return torch.optim.Adafactor(groups, weight_decay=args.weight_decay, eps=(1e-15, 1e-3),
                                     beta2_decay=-0.5)
    return torch.optim.AdamW(groups, betas=(0.9, args.beta2), weight_decay=args.weight_decay,
                             fused=True)

def train_step(model, optimizer, batches, scale, max_grad_norm, device):
    """One optimiser step over a list of micro-batches, at `scale` times the peak rates -> a dict of
    mean losses and the norm of the gradient before clipping, on the device. 'loss' is the
    cross-entropy in nats; the other losses are added to it."""
    model.train()
    for group in optimizer.param_groups:
        group['lr'] = group['peak_lr'] * scale
    report = {}
    for i, batch in enumerate(batches, 1):
        model.require_backward_grad_sync = i == len(batches)        # for DDP: send gradients once
        with autocast(device):
            losses, _, extra = model(to_device(batch, device))
        parts = {'loss': losses.mean(), **extra}
        (sum(parts.values()) / len(batches)).backward()
        for name, part in parts.items():
            report[name] = report.get(name, 0.0) + part.detach() / len(batches)
    report['grad_norm'] = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    # DDP keeps gradients in buffers of its own, which must stay.
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return report

# ---- the run's folder

def lock(folder):
    """Keep other runs out of a folder until this process ends, in any way. Raises ValueError."""
    file = open(folder / 'lock', 'w')
    if os.name == 'posix':
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f'{folder}: another run is being trained there') from e
    return file                             # closing it would end the lock

def save_run(out, step, model, optimizer, config, source):
    """Write the optimiser, then the weights: these make the save valid. source: as in save()."""
    path = out / f'optimizer-{step:08d}.pt'
    state = optimizer.state_dict()
    write_atomic(path, lambda temporary: torch.save(state, temporary))
    save(released_tensors(model, config['run']['regime']), config, out, step, source)
    for old in out.glob('optimizer-*.pt'):
        if old != path:
            old.unlink()

def restore(out, optimizer):
    """Load the optimiser of a run's last save -> its step. Raises ValueError."""
    step = int(safe_open(out / 'model.safetensors', 'pt').metadata()['step'])
    path = out / f'optimizer-{step:08d}.pt'
    try:
        optimizer.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    except Exception as e:                  # whatever unpickling a damaged file may raise
        raise ValueError(f'{path}: missing or damaged') from e
    return step

def main(argv=None):
    """The run, from top to bottom. Under torchrun each process runs it."""
    # setup
    args = parse_args(argv)
    world = int(os.environ.get('WORLD_SIZE', 1))                    # torchrun sets these three
    rank = int(os.environ.get('RANK', 0))
    device = pick_device(args.device, int(os.environ.get('LOCAL_RANK', 0)))
    on_cuda = device.type == 'cuda'
    out = Path(args.output_dir)
    G = args.gradient_accumulation_steps
    if rank >= world:
        raise ValueError(f'RANK {rank} is not below WORLD_SIZE {world}')
    if G % world != 0:
        raise ValueError(f'--gradient_accumulation_steps {G} is not a multiple of WORLD_SIZE '
                         f'{world}')
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        locked = lock(out)                  # until this process ends; taken before we read `out`
    if not args.resume and (out / 'model.safetensors').exists():
        raise ValueError(f'{out}: holds a run; --resume {out} continues it, and --output_dir '
                         'names another folder')
    if on_cuda:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group('nccl' if on_cuda else 'gloo')
    torch.manual_seed(args.seed)

    # model; before the data, as a setting that does not fit should not cost an hour of tokenising
    source = args.resume or args.model
    flag_names = settings_of(Flags)         # what is not one of them is a setting of an encoder
    settings = {name: x for name, x in vars(args).items() if name not in flag_names}
    dtype = torch.bfloat16 if args.weights == 'bf16' else torch.float32
    model, tokenizer, config = load(source, args.regime, args.context, args.objective,
                                    args.hybrid_text_tokens, device, dtype, **settings)
    model.decoder.grad_checkpoint = args.low_memory
    if not args.train_encoder:
        model.encoder.requires_grad_(False)

    # data
    folder, meta = open_corpus(args.data, tokenizer, args.context, args.continuation)
    args.data = str(folder)
    image_size = getattr(model.encoder, 'image_size', None)
    train = Batches(folder, 'train', args.batch_size, tokenizer, image_size, args.seed)
    val = Batches(folder, 'val', args.batch_size, tokenizer, image_size, limit=args.eval_segments)
    workers = args.workers
    if workers is None:
        workers = 2 if on_cuda else 0
        if image_size:
            workers = 6 if on_cuda else 2   # pages take a core's time

    # optimiser; an encoder of random weights needs the full rate (even then the decoder may ignore
    # its memory for hundreds of steps), at which a pretrained one would forget
    steps = args.steps or math.ceil(len(train) / G)
    encoder_lr = args.encoder_lr
    if encoder_lr is None:
        is_pretrained = args.regime == 'vision' and config['run']['pretrained_encoder']
        encoder_lr = 1e-5 if is_pretrained else args.learning_rate
    optimizer = make_optimizer(model, encoder_lr, args)
    start = restore(out, optimizer) if args.resume else 0
    if start >= steps:
        print(f'{out}: has its {start} steps; set more with --steps')
        return
    tokenizer_folder = None if source in PRESETS else fetch(source, '*.json')
    not_stored = (*settings, *MACHINE, 'output_dir', 'resume')
    stored = {name: x for name, x in vars(args).items() if name not in not_stored}
    config['run'] |= {'args': stored, 'data': args.data}

    # the log: of a resumed run keep the lines up to its last save; the rest is written again
    log_path = out / 'log.jsonl'
    if rank == 0:
        lines = []
        if start and log_path.exists():
            for line in log_path.read_text().splitlines():
                is_whole = line.endswith('}')                       # a kill may cut the last one
                if is_whole and json.loads(line)['step'] <= start:
                    lines.append(line + '\n')
        write_atomic(log_path, lambda path: path.write_text(''.join(lines)))
        n_encoder = sum(p.numel() for p in model.encoder.parameters())
        n_decoder = sum(p.numel() for p in model.decoder.parameters())
        print(f'{out}: {args.regime} {config["run"]["settings"]}, {args.objective}; {train.n:,} '
              f'segments; encoder {n_encoder:,} parameters at {encoder_lr:g}, decoder '
              f'{n_decoder:,} at {args.learning_rate:g}; {world} x {device.type}')
        if image_size:
            lost = train[0]['lost'].mean()
            if lost > 0:
                print(f'{lost:.1%} of the text is missing from the first pages: the font lacks it, '
                      'or it does not fit')

    def log(step, values):
        if rank == 0:
            shown = '  '.join(f'{name} {value:,.4g}' for name, value in values.items())
            print(f'step {step:5d}/{steps}  {shown}', flush=True)
            with open(log_path, 'a') as file:
                file.write(json.dumps({'step': step, **values}) + '\n')

    # training: batch n is a function of seed and n, so a run resumes from the number of its step
    mine = range(start * G + rank, steps * G, world)                # its share of them
    batches = iter(train.loader(mine, workers))
    forward = model
    if on_cuda and args.compile:
        # Otherwise the router's backward pass is traced under autocast, in bf16 (pytorch 179804).
        torch._functorch.config.backward_pass_autocast = 'off'
        forward = torch.compile(model, dynamic=False)
    if world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    clock, clock_step = time.time(), start
    for step in range(start + 1, steps + 1):
        # for encoders that draw random numbers
        seed = np.random.SeedSequence((args.seed, step, rank)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        scale = learning_rate_scale(step - 1, steps, args.warmup_ratio)
        micro_batches = [next(batches) for _ in range(G // world)]
        report = train_step(forward, optimizer, micro_batches, scale, args.max_grad_norm, device)
        is_last = step == steps
        eval_now = args.eval_steps > 0 and (step % args.eval_steps == 0 or is_last)
        log_now = step == 1 or step % args.log_steps == 0 or is_last or eval_now
        if not log_now:
            continue

        # the report: the only place where the host waits for the device
        values = torch.stack(list(report.values()))
        if world > 1:
            torch.distributed.all_reduce(values)
        means = (values / world).tolist()
        report = dict(zip(report.keys(), means))
        seconds = (time.time() - clock) / (step - clock_step)
        tokens = args.batch_size * G * meta[OBJECTIVES[args.objective]]     # target tokens
        report['ppl'] = math.exp(min(report['loss'], 700))
        report['lr'] = optimizer.param_groups[-1]['lr']             # of the decoder
        report['tokens_per_s'] = tokens / seconds
        report['minutes_left'] = seconds * (steps - step) / 60
        if on_cuda:
            report['gib'] = torch.cuda.max_memory_allocated(device) / 2 ** 30
        log(step, report)
        if not math.isfinite(report['grad_norm']):
            raise ValueError(f'step {step}: the gradient is not finite; the last save in {out} is '
                             'from before that')
        if eval_now:
            result = evaluate(model, val, device, workers, rank, world)
            log(step, {f'val_{name}': value for name, value in result.items()})
            if rank == 0:
                save_run(out, step, model, optimizer, config, tokenizer_folder)
        clock, clock_step = time.time(), step                       # the speed of training alone

    # the end
    if world > 1:
        torch.distributed.barrier()                                 # until rank 0 has saved
        # Without a pause this may hang: DDP's destructor holds Python's lock and waits for gloo's
        # threads, which need it to end.
        time.sleep(1)
        torch.distributed.destroy_process_group()
    if rank == 0:
        one = {name: x[:1] for name, x in val[0].items()}
        original, generated = passages(model, one, tokenizer, device, 256)[0]
        show(original, generated, f'{args.objective} by {out}')
        if args.eval_steps > 0:
            print(f'{out}: python eval.py {out} --generate 5 shows more')
        if args.model == 'tiny':
            print(f'The real model: python train.py --regime {args.regime} --data DIR '
                  '--model deepseek-ai/DeepSeek-OCR')

if __name__ == '__main__':
    run_main(main)
