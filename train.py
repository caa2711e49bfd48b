"""
One run: one regime, one objective.

    python train.py --regime meanpool                               a laptop, two minutes: tiny model, Python's manual
    python train.py --model out/meanpool --objective lm             stage two, from that run
    python data.py finewiki --out fw --model deepseek-ai/DeepSeek-OCR --train_segments 500000 --val_segments 10000
    python train.py --regime meanpool --model deepseek-ai/DeepSeek-OCR --data fw             the paper, on a large GPU
    torchrun --nproc_per_node=6 train.py ...                                                 the same on six

A run is the folder out/<regime> (or out/<regime>_lm): config.json, the weights and the optimiser as last saved, and
log.jsonl, a line per report. A run that continues it (--resume) or starts from it (--model) has its flags as defaults.
"""
import argparse
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel

from data import Batches, check_numbers, corpus_of, open_corpus
from decoder import OBJECTIVES
from encoders import ENCODERS, settings_of
from eval import autocast, evaluate, passages, pick_device, show, to_device
from load_deepseek import PRESETS, fetch, load, read_json, released_tensors, save, tokenizer_of, write_atomic
from render import check, explain, run_main

# Where the tiny model departs from the other defaults, which follow the paper.
TINY = dict(steps=700, gradient_accumulation_steps=1, learning_rate=3e-3, beta2=0.95, log_steps=20, eval_steps=200)

def encoder_flags():
    """Every setting of every encoder is a flag: {name: a class that has it}."""
    return {name: encoder for encoder in ENCODERS.values() for name in settings_of(encoder)}

def flags():
    """The command line, with the settings of every encoder as flags."""
    parser = argparse.ArgumentParser(usage='python train.py [--flag value ...]', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog=f'With --model tiny, these replace the defaults above: {TINY}.')

    def add(name, kind, default, text, choices=None):
        names = [f'--{name}'] + [f'--{name.replace("_", "-")}'] * (kind is bool and '_' in name)   # --no-train-encoder
        how = {'action': argparse.BooleanOptionalAction} if kind is bool else {'type': kind, 'choices': choices}
        parser.add_argument(*names, default=default, help=text, **how)

    add('model', str, 'tiny', 'tiny, full (random weights), a hub id, a folder or a run')
    add('regime', str, 'meanpool', 'how the context is encoded', choices=ENCODERS)
    add('objective', str, 'reconstruction', 'what is predicted from it', choices=OBJECTIVES)
    add('hybrid_text_tokens', int, 0, 'last context tokens that follow the memory as plain tokens')
    add('train_encoder', bool, True, 'train the encoder too, or freeze it')
    add('data', str, 'pydoc', 'a corpus made by data.py, or a source for data.py')
    add('context', int, None, 'context tokens in a segment; None: those of the corpus, else 128 with tiny, 1000')
    add('continuation', int, None, 'continuation tokens in a segment; None: likewise')
    add('output_dir', str, None, "the run's folder; None: out/<regime> or out/<regime>_lm")
    add('resume', bool, False, 'continue the run in --output_dir')
    for name, encoder in encoder_flags().items():
        setting, text = settings_of(encoder)[name], re.search(rf'\b{name}: (.*)|$', encoder.__doc__ or '')[1]
        text = f'{encoder.__name__}: {text}' + f' (default: {setting.default})' * (setting.default not in (None, ''))
        kind = getattr(setting.annotation, '__args__', [setting.annotation])[0]             # of int | None it is int
        add(name, kind, None, text.replace('%', '%%') + '%(default).0s')                    # hide the flag's own None
    add('steps', int, None, 'optimiser steps; None: one epoch')
    add('batch_size', int, 8, 'segments in a micro-batch')
    add('gradient_accumulation_steps', int, 6, 'micro-batches in a step, over all processes')
    add('learning_rate', float, 1e-4, 'peak of the schedule')
    add('encoder_lr', float, None, "the encoder's; None: 1e-5 for pretrained vision, else the same")
    add('weight_decay', float, 0.01, 'of all parameters')
    add('beta2', float, 0.999, 'AdamW beta2')
    add('warmup_ratio', float, 0.1, 'share of the steps in which the rate rises')
    add('max_grad_norm', float, 1.0, 'clip the gradient to this norm')
    add('optimizer', str, 'adamw', 'adafactor stores little; give it a rate of 5e-3', choices=('adamw', 'adafactor'))
    add('weights', str, 'fp32', 'dtype of the trained weights; the authors use bf16', choices=('fp32', 'bf16'))
    add('grad_checkpoint', bool, False, "recompute the decoder's activations in the backward pass, do not store them")
    add('compile', bool, None, 'torch.compile; None: on CUDA')
    add('device', str, 'auto', 'cpu, cuda, mps; auto is cuda if there is one')
    add('workers', int, None, 'processes that prepare batches; None: 0, for pages 2; on CUDA 2 and 6')
    add('seed', int, 0, 'of random weights and of the order of the data')
    add('log_steps', int, 10, 'steps between lines of the log')
    add('eval_steps', int, 500, 'steps between validations')
    add('eval_segments', int, 500, 'validation segments, except at the end, which uses all')
    add('save_steps', int, 500, 'steps between saves; 0 saves nothing, for measuring speed')
    return parser

def parse_args(argv=None):
    """Parse to see which run --resume or --model names, take its flags (or TINY) as defaults, and parse again, so that
    the command line wins. Raises ValueError for values out of range, or a --resume that would change the model."""
    parser = flags()
    args = parser.parse_args(argv)
    folder = lambda args: args.output_dir or f'out/{args.regime}' + '_lm' * (args.objective == 'lm')
    source = folder(args) if args.resume else args.model
    no_config = source in PRESETS or args.resume and not Path(source, 'config.json').exists()
    run = {} if no_config else read_json(fetch(source) / 'config.json').get('run', {})
    check('args' in run or not args.resume, f'--resume: no saved run in {source}')
    parser.set_defaults(**(TINY if source == 'tiny' else run.get('args', {})))
    if run and parser.parse_args(argv).regime == run['regime']:       # the settings belong to the run's own encoder
        parser.set_defaults(**run['settings'])
    args = parser.parse_args(argv)
    check_numbers({name: value for name, value in vars(args).items() if name not in encoder_flags()},
                  'hybrid_text_tokens learning_rate encoder_lr weight_decay beta2 warmup_ratio workers seed save_steps')
    check(args.warmup_ratio <= 1 and args.beta2 < 1, '--warmup_ratio must be at most 1, --beta2 below 1')
    check(args.seed < 2 ** 63, f'--seed {args.seed}: must be below 2^63')
    if args.resume:
        was = {**run['args'], **run['settings']}
        for name in ['regime', 'objective', 'hybrid_text_tokens', 'train_encoder', 'context', 'continuation',
                     *run['settings']]:
            value = getattr(args, name)
            check(value == was[name], f'--{name} {value}: the run to --resume has {was[name]}')
        if args.steps != was['steps']:
            print(f'--steps {args.steps}: the learning rate now follows the schedule of that many steps')
    args.output_dir = folder(args)
    return args

def learning_rate_scale(step, steps, warmup_ratio):
    """Share of the peak rate at a step: linear from 0.1 to 1 during the warm-up, then half a cosine down to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

def make_optimizer(model, encoder_lr, args):
    """AdamW or Adafactor with a group for the encoder, which is empty if that is frozen, and one for the decoder."""
    groups = [{'params': [p for p in part.parameters() if p.requires_grad], 'peak_lr': rate}
              for part, rate in ((model.encoder, encoder_lr), (model.decoder, args.learning_rate))]
    if args.optimizer == 'adamw':
        return torch.optim.AdamW(groups, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    # Adafactor's own constants are for fp32: in bf16, eps hides small gradients and slow averages stop changing.
    return torch.optim.Adafactor(groups, weight_decay=args.weight_decay, eps=(1e-15, 1e-3), beta2_decay=-0.5)

def train_step(model, optimizer, batches, scale, max_grad_norm, device):
    """One optimiser step over a list of micro-batches, at `scale` times the peak rates -> mean cross-entropy in nats
    and norm of the gradient before clipping, both on the device. The load-balancing loss is trained on as well."""
    model.train()
    for group in optimizer.param_groups:
        group['lr'] = group['peak_lr'] * scale
    total = 0.0
    for i, batch in enumerate(batches, 1):
        model.require_backward_grad_sync = i == len(batches)     # DistributedDataParallel sends gradients once
        with autocast(device):
            losses, _, balance_loss = model(to_device(batch, device))
        ((losses.mean() + balance_loss) / len(batches)).backward()
        total = total + losses.detach().mean() / len(batches)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))       # its gradients are buffers
    return total, norm

def save_run(out, step, model, optimizer, config, source):
    """Write the optimiser, then the weights: the save is valid once these are renamed. Raises ValueError."""
    path = out / f'{type(optimizer).__name__}-{step:08d}.pt'
    write_atomic(path, lambda temporary: torch.save(optimizer.state_dict()['state'], temporary))
    save(released_tensors(model, config['run']['regime']), config, out, step, source)
    for old in {*out.glob('Ada*-*.pt')} - {path}:
        old.unlink()

def restore(out, optimizer):
    """Load the optimiser of a run's last save -> its step. Raises ValueError."""
    with explain(f'{out}/model.safetensors: no save to resume from'):
        step = int(safe_open(out / 'model.safetensors', 'pt').metadata()['step'])
    path = out / f'{type(optimizer).__name__}-{step:08d}.pt'
    with explain(f'{path}: missing or damaged, or the run has another --optimizer'):
        state = torch.load(path, map_location='cpu', weights_only=True)
        optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})
    return step

def main(argv=None):
    """The run, from top to bottom. Under torchrun each process runs it."""
    # ---- setup
    args = parse_args(argv)
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))      # torchrun sets them
    out, device = Path(args.output_dir), pick_device(args.device, int(os.environ.get('LOCAL_RANK', 0)))
    G, on_cuda = args.gradient_accumulation_steps, device.type == 'cuda'
    check(args.resume or not (out / 'config.json').exists(),
          f'{out}: holds a run; continue it with --resume, or choose another --output_dir')
    check(G % world == 0, f'--gradient_accumulation_steps {G}: not a multiple of {world} processes')
    if on_cuda:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group('nccl' if on_cuda else 'gloo')
    torch.manual_seed(args.seed)

    # ---- data, model, optimiser
    source, length = out if args.resume else args.model, 128 if args.model == 'tiny' else 1000
    tokenizer = tokenizer_of(source)
    args.data = corpus_of(args.data, tokenizer, args.context or length, args.continuation or length)
    meta = open_corpus(args.data, tokenizer, args.context, args.continuation)
    args.context, args.continuation = meta['context'], meta['continuation']
    settings = {name: getattr(args, name) for name in encoder_flags()}
    model, _, config = load(source, args.regime, args.context, args.objective, args.hybrid_text_tokens, device,
                            torch.bfloat16 if args.weights == 'bf16' else torch.float32, **settings)
    config['run'].update(data=args.data, args={
        name: value for name, value in vars(args).items() if name not in (*settings, 'output_dir', 'resume')})
    cannot_compile = device.type == 'cpu' and args.weights == 'fp32' and model.decoder.config.n_routed_experts
    check(not (args.compile and cannot_compile), '--compile: on the CPU, experts compile only with --weights bf16')
    model.decoder.grad_checkpoint = args.grad_checkpoint
    if not args.train_encoder:
        model.encoder.requires_grad_(False)
    image_size = getattr(model.encoder, 'image_size', None)
    train, val_part, val = (Batches(args.data, side, args.batch_size, tokenizer, image_size, args.seed, limit)
                            for side, limit in (('train', None), ('val', args.eval_segments), ('val', None)))
    workers = args.workers if args.workers is not None else (6 if on_cuda else 2) if image_size else 2 * on_cuda
    steps, targets = args.steps or -(-len(train) // G), meta[OBJECTIVES[args.objective]]
    pretrained_vision = args.regime == 'vision' and config['run']['pretrained_encoder']
    encoder_lr = args.encoder_lr if args.encoder_lr is not None else 1e-5 if pretrained_vision else args.learning_rate
    optimizer = make_optimizer(model, encoder_lr, args)
    start = restore(out, optimizer) if args.resume else 0
    if start >= steps:
        return print(f'{out}: has its {start} steps; set more with --steps')

    # ---- the log
    log_path, best = out / 'log.jsonl', math.inf
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lines = [line for line in log_path.read_text().splitlines() if line.endswith('}')] if start else []
        lines = [line for line in map(json.loads, lines) if line['step'] <= start]      # the run writes the rest again
        best = min(line.get('val_loss', best) for line in [{}, *lines])
        log_path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
        print(f'{out}: {args.regime} {config["run"]["settings"]}, {args.objective}; {train.n:,} segments; encoder '
              f'{sizes[0]:,} parameters at {encoder_lr:g}, decoder {sizes[1]:,} at {args.learning_rate:g}; '
              f'{world} x {device.type}')
        if image_size and (lost := train[0]['lost'].mean()):
            print(f'{lost:.1%} of the text is not on the pages: the font lacks it, or it does not fit')

    def log(step, **values):
        if rank == 0:
            print(f'step {step:5d}/{steps}  ' + '  '.join(f'{k} {v:,.4g}' for k, v in values.items()), flush=True)
            with open(log_path, 'a') as file:
                file.write(json.dumps({'step': step, **values}) + '\n')

    # ---- training: batch n is a function of seed and n, so a run resumes from the number of its step
    signals = []                               # SIGINT and SIGTERM end the run at the next report; a second one at once
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: signals.append(signal.signal(signum, signal.SIG_DFL)))
    batches = iter(train.loader(range(start * G + rank, steps * G, world), workers))         # each process its share
    forward = torch.compile(model, dynamic=False) if (on_cuda if args.compile is None else args.compile) else model
    if world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    clock, clock_step = time.time(), start
    for step in range(start + 1, steps + 1):
        torch.manual_seed(args.seed + world * step + rank)        # for encoders that draw random numbers
        scale = learning_rate_scale(step - 1, steps, args.warmup_ratio)
        micro_batches = [next(batches) for _ in range(G // world)]
        loss, norm = train_step(forward, optimizer, micro_batches, scale, args.max_grad_norm, device)
        last = step == steps
        due = lambda every: every and (step % every == 0 or last)
        if not (step == 1 or due(args.log_steps) or due(args.eval_steps) or due(args.save_steps)):
            continue

        # ---- report: the only place where the host waits for the device
        report = torch.stack([loss / world, norm / world, torch.tensor(float(len(signals)), device=device)])
        if world > 1:
            torch.distributed.all_reduce(report)
        loss, norm, stop = report.tolist()
        seconds, clock_step = (time.time() - clock) / (step - clock_step), step
        memory = {'gib': torch.cuda.max_memory_allocated(device) / 2 ** 30} if on_cuda else {}
        log(step, loss=loss, ppl=math.exp(min(loss, 700)), lr=optimizer.param_groups[-1]['lr'], grad_norm=norm,
            tokens_per_s=args.batch_size * G * targets / seconds, minutes_left=seconds * (steps - step) / 60, **memory)
        check(math.isfinite(norm), f'step {step}: the gradient is not finite; any save in {out} is from before')
        if due(args.eval_steps):
            result = evaluate(model, val if last else val_part, device, workers, rank, world)
            best = min(best, result['loss'])
            log(step, **{f'val_{k}': v for k, v in result.items()}, best_val_loss=best)
        if rank == 0 and args.save_steps and (due(args.save_steps) or stop):
            save_run(out, step, model, optimizer, config, None if args.resume or source in PRESETS else fetch(source))
        clock = time.time()                                       # the reported speed is that of training alone
        if stop:
            break

    # ---- the end
    if world > 1:
        torch.distributed.barrier()                               # until rank 0 has saved
        time.sleep(1)          # gloo's threads need Python's lock to end; DDP's destructor holds it and waits for them
        torch.distributed.destroy_process_group()
    if rank == 0 and not last:
        print(f'stopped at step {step}' + '; continue with --resume' * bool(args.save_steps))
    elif rank == 0:
        show(*passages(model, {name: x[:1] for name, x in val[0].items()}, tokenizer, device, 256)[0], args.objective)
        print(f'{out}: python eval.py {out} shows more' if args.save_steps else 'nothing saved, as --save_steps is 0')
        if args.model == 'tiny':
            print(f'The real model: python train.py --regime {args.regime} --data DIR --model deepseek-ai/DeepSeek-OCR')

if __name__ == '__main__':
    run_main(main)
