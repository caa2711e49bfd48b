"""
One run: one regime, one objective.

    python train.py --regime meanpool                               a laptop, two minutes: tiny model, Python's manual
    python train.py --model out/meanpool --objective lm             stage two, from that run
    python data.py finewiki --out fw --model deepseek-ai/DeepSeek-OCR --train_segments 500000 --val_segments 10000
    python train.py --regime meanpool --model deepseek-ai/DeepSeek-OCR --data fw             the paper, on a large GPU
    torchrun --nproc_per_node=8 train.py ...                                                 the same on eight

A run is the folder out/<regime> (out/<regime>_lm): config.json, weights and optimiser as last saved, and log.jsonl, a
line a report. --resume goes on from the last save as if nothing had happened. A run's flags are the defaults of those
that go on from it, be it by --resume or by --model.
"""
import argparse
import json
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import Batches, corpus_of, number, open_corpus, outlive_sigterm, positive
from decoder import OBJECTIVES
from encoders import ENCODERS, settings_of
from eval import autocast, evaluate, passage, pick_device, show, to_device
from load_deepseek import (PRESETS, fetch, load, optional, read_json, released_tensors, save, tokenizer_of,
                           write_aside, writing)

# Where the tiny model departs from the defaults, which follow the paper.
TINY = dict(steps=700, gradient_accumulation_steps=1, learning_rate=3e-3, beta2=0.95, log_steps=20, eval_steps=200)
CARD_TFLOPS = {'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, '4090': 165, '3090': 71}     # dense bf16, vendors'


def flags():
    """The parser of the command line, with the settings of every encoder as flags."""
    parser = argparse.ArgumentParser(
        description='Train an encoder and a decoder on one objective.', usage='python train.py [--flag value ...]',
        epilog=f'Other defaults of the tiny model: {TINY}. Those of a run are the flags that it was made with.',
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 36, 120))

    def flag(name, kind, default, text, **options):
        text += '' if default is None or kind is bool else f' (default {default})'
        switch = {'action': argparse.BooleanOptionalAction}
        options = options or (switch if kind is bool else {'type': kind, 'metavar': kind.__name__})
        group.add_argument(f'--{name}', default=default, help=text, **options)

    group = parser.add_argument_group('what to train')
    flag('model', str, 'tiny', 'tiny, full (random weights), a hub id, a folder or a run')
    flag('regime', str, 'meanpool', 'what stands for the context', choices=ENCODERS)
    flag('objective', str, 'reconstruction', 'what to predict from it', choices=OBJECTIVES)
    flag('hybrid_text_tokens', number(int, 0), 0, 'last context tokens, as plain ones behind the memory')
    group.add_argument('--train_encoder', '--train-encoder', default=True, action=argparse.BooleanOptionalAction)
    flag('data', str, 'pydoc', 'a folder that data.py made, or a source for data.py')
    flag('context', positive, None, 'context tokens a segment (default: those of --data; or 1000, for tiny 128)')
    flag('continuation', positive, None, 'continuation tokens a segment (default: likewise)')
    flag('output_dir', str, None, "the run's folder (default: out/<regime>, out/<regime>_lm)")
    flag('resume', bool, False, 'go on with the run in --output_dir', action='store_true')
    known = set()                                                 # encoders may share a setting
    for regime, encoder in ENCODERS.items():
        group = parser.add_argument_group(f'settings of {regime}', encoder.__doc__)
        for name, p in settings_of(encoder).items():
            if name not in known:
                flag(name, p.annotation, None, '' if p.default is None else f'(default {p.default!r})')
            known.add(name)
    group = parser.add_argument_group('how')
    flag('steps', positive, None, 'optimiser steps (default: one epoch)')
    flag('batch_size', positive, 8, 'segments in a micro-batch')
    flag('gradient_accumulation_steps', positive, 6, 'micro-batches in a step, of all processes')
    flag('learning_rate', number(float, 0), 1e-4, 'peak of the schedule')
    flag('encoder_lr', number(float, 0), None, "the encoder's (default: 1e-5 if pretrained vision, else the same)")
    flag('weight_decay', number(float, 0), 0.01, 'on all parameters')
    flag('beta2', number(float, 0, 0.999999), 0.999, "AdamW's second")
    flag('warmup_ratio', number(float, 0, 1), 0.1, 'share of the steps that warm up')
    flag('max_grad_norm', number(float, 1e-9), 1.0, 'clip the gradient to this norm')
    flag('optimizer', str, 'adamw', "adafactor keeps little state; its rate is a share of a weight's size: 5e-3",
         choices=('adamw', 'adafactor'))
    flag('weights', str, 'fp32', "as they are trained; bf16 is the authors'", choices=('fp32', 'bf16'))
    flag('grad_checkpoint', bool, False, 'compute activations twice instead of keeping them')
    flag('fsdp', bool, False, 'shard weights, gradients and optimiser among the processes')
    flag('compile', bool, None, 'torch.compile (default: on CUDA)')
    flag('device', str, 'auto', 'cpu, cuda, mps; auto is cuda where there is one')
    flag('workers', number(int, 0), None, 'processes that prepare batches (default: 0; for pages 2; on CUDA 2 and 6)')
    flag('seed', number(int, 0), 0, 'of new weights and of the order of the data')
    flag('log_steps', positive, 10, 'steps between lines of the log')
    flag('eval_steps', positive, 500, 'steps between validations')
    flag('eval_segments', positive, 500, 'validation segments in each but the last, which has all')
    flag('save_steps', number(int, 0), 500, 'steps between saves; 0: none at all, to measure speed')
    flag('wandb', str, None, 'project of Weights & Biases to log to as well')
    return parser


def parse_args(argv=None):
    """Parse once to see which run --resume or --model names, take its flags for defaults (or those of TINY), and parse
    again: the command line wins. Raises SystemExit where --resume has no run or would make another one of it."""
    parser = flags()
    args = parser.parse_args(argv)
    folder = lambda parsed: parsed.output_dir or f'out/{parsed.regime}' + '_lm' * (parsed.objective == 'lm')
    model = folder(args) if args.resume else args.model
    if args.resume and not Path(model, 'model.safetensors.index.json').exists():
        raise SystemExit(f'--resume: no saved run in {model}')
    run = {} if model in PRESETS else read_json(fetch(model) / 'config.json').get('run', {})
    if args.resume and not run:
        raise SystemExit(f'--resume: {model} has a checkpoint, but not a run of train.py')
    parser.set_defaults(**(TINY if model == 'tiny' else run.get('args', {})))
    if run and parser.parse_args(argv).regime == run['regime']:       # the settings are those of the run's own encoder
        parser.set_defaults(**run['settings'])
    args = parser.parse_args(argv)
    same = 'regime', 'objective', 'hybrid_text_tokens', 'context', 'continuation'
    for name in [*same, *run['settings']] if args.resume else []:
        if getattr(args, name) != (was := {**run['args'], **run['settings']}[name]):
            raise SystemExit(f'--{name} {getattr(args, name)}: the run to --resume has {was}')
    args.model, args.output_dir = model, model if args.resume else folder(args)
    return args


def learning_rate_scale(step, steps, warmup_ratio):
    """Share of the peak rate at a step: up in a line from 0.1 to 1 over the warm-up, then down half a cosine to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(model, encoder_lr, args):
    """AdamW or Adafactor with a group for encoder and decoder each, unless it is frozen, and their rates as peak_lr."""
    groups = [{'params': [p for p in part.parameters() if p.requires_grad], 'peak_lr': rate}
              for part, rate in ((model.encoder, encoder_lr), (model.decoder, args.learning_rate))]
    groups = [group for group in groups if group['params']]
    if args.optimizer == 'adamw':
        return torch.optim.AdamW(groups, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    # Adafactor's own constants are for fp32: in bf16, eps hides the gradients' squares, slow averages round to a halt.
    return torch.optim.Adafactor(groups, weight_decay=args.weight_decay, eps=(1e-15, 1e-3), beta2_decay=-0.5)


def save_run(out, step, model, optimizer, config, best, source, write):
    """Write optimiser and weights under new names; the index, renamed last, makes them the run's. Drop the old ones.
    All processes call it, as shards must be put together; the one that is to `write` does. SystemExit if it cannot."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)          # shards joined, in the host's memory
    state = {'best': best, 'optimizer': get_optimizer_state_dict(model, optimizer, options=whole)}
    tensors = released_tensors(model, config['run']['regime'])
    if not write:
        return
    write_aside(out / f'trainer-{step:08d}.pt', lambda path: torch.save(state, path))
    save(tensors, config, out, step, source)
    for old in [*out.glob('model-*.safetensors'), *out.glob('trainer-*.pt')]:
        if f'-{step:08d}.' not in old.name:
            old.unlink()


def restore(out, model, optimizer):
    """Put a run's optimiser back -> its step and best loss. Raises SystemExit for a damaged file."""
    step = read_json(out / 'model.safetensors.index.json')['metadata']['step']
    try:
        state = torch.load(out / f'trainer-{step:08d}.pt', weights_only=True)
        now = [dict(group) for group in optimizer.param_groups]
        whole = StateDictOptions(full_state_dict=True)            # to the device: the host has a copy already
        set_optimizer_state_dict(model, optimizer, state['optimizer'], options=whole)
    except Exception as e:                     # torch raises a dozen kinds
        raise SystemExit(f'{out}/trainer-{step:08d}.pt: missing, damaged or of other flags ({type(e).__name__})')
    for group, given in zip(optimizer.param_groups, now):
        group.update(given)                    # what the command line says goes before what was saved
    return step, state['best']


def open_log(args, start):
    """A function log(step, **values): to the screen, to log.jsonl behind step `start`, to Weights & Biases. It raises
    SystemExit where it cannot write."""
    path, wandb = Path(args.output_dir, 'log.jsonl'), optional('wandb') if args.wandb else None
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if start and path.exists() else []
    kept = [line for line in lines if line.endswith('}\n') and json.loads(line)['step'] <= start]
    path.write_text(''.join(kept), encoding='utf-8')
    if wandb:
        wandb.init(project=args.wandb, name=Path(args.output_dir).name, config=vars(args))

    def log(step, **values):
        print(f'step {step:5d}/{args.steps}  ' + '  '.join(f'{k} {v:,.4g}' for k, v in values.items()), flush=True)
        with writing(path), open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'step': step, **values}) + '\n')
        if wandb:
            wandb.log(values, step=step)
    return log


def main(argv=None):
    """The run, from top to bottom; under torchrun each process runs it. Raises SystemExit for a user's mistake."""
    args = parse_args(argv)
    names = {name for encoder in ENCODERS.values() for name in settings_of(encoder)}
    settings = {name: vars(args).pop(name) for name in names}
    kept = {name: value for name, value in vars(args).items() if name not in ('model', 'output_dir', 'resume')}
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))      # torchrun sets them
    out, device = Path(args.output_dir), pick_device(args.device, int(os.environ.get('LOCAL_RANK', 0)))
    G, on_cuda, fsdp = args.gradient_accumulation_steps, device.type == 'cuda', args.fsdp and world > 1
    if on_cuda:
        torch.cuda.set_device(device)
    if args.optimizer == 'adafactor' and fsdp:
        raise SystemExit('--optimizer adafactor: does not work on the shards of --fsdp')
    if (out / 'config.json').exists() and not args.resume:
        raise SystemExit(f'{out}: holds a run; --resume goes on with it, --output_dir puts this one elsewhere')
    if G % world:
        raise SystemExit(f'--gradient_accumulation_steps {G}: not a multiple of {world} processes')

    # ---- data, model, optimiser
    torch.manual_seed(args.seed)
    tokenizer = tokenizer_of(args.model)
    if world > 1:
        dist.init_process_group('nccl' if on_cuda else 'gloo', timeout=timedelta(hours=3))      # rank 0 may prepare
    length = 128 if args.model == 'tiny' else 1000
    data = corpus_of(args.data, tokenizer, args.context or length, args.continuation or length, prepares=rank == 0)
    if world > 1:
        dist.barrier()                                            # until rank 0 has prepared it
    meta = open_corpus(data, tokenizer, args.context, args.continuation)
    model, _, config = load(args.model, args.regime, meta['context'], args.objective, args.hybrid_text_tokens, device,
                            torch.bfloat16 if args.weights == 'bf16' else torch.float32, **settings)
    kept.update(data=data, context=meta['context'], continuation=meta['continuation'])
    config['run'].update(data=data, args=kept)
    model.decoder.grad_checkpoint = args.grad_checkpoint
    if args.compile and device.type == 'cpu' and args.weights == 'fp32' and model.decoder.config.n_routed_experts:
        raise SystemExit('--compile: on the CPU, experts can be compiled with --weights bf16 only')
    if not args.train_encoder:
        model.encoder.requires_grad_(False)
    image_size = getattr(model.encoder, 'image_size', None)
    side = lambda name, limit=None: Batches(data, name, args.batch_size, tokenizer, image_size, args.seed, limit)
    train, val_part, val = side('train'), side('val', args.eval_segments), side('val')
    workers = args.workers if args.workers is not None else (6 if on_cuda else 2) if image_size else 2 * on_cuda
    args.steps = args.steps or -(-len(train) // G)
    with torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter:
        B, positions, _ = model.prefix(to_device(train[0], device)).shape
    targets = meta[OBJECTIVES[args.objective]]                    # training is three times the forward pass
    step_flops = 3 * G * (counter.get_total_flops() + B * model.decoder.forward_flops(positions + targets, targets))
    count = lambda part: sum(p.numel() for p in part.parameters())
    if fsdp:
        for layer in [*model.decoder.layers, model]:
            fully_shard(layer, reshard_after_forward=True)
        register_fsdp_forward_method(model, 'generate')
    pretrained_vision = args.regime == 'vision' and config['run']['pretrained_encoder']
    encoder_lr = args.encoder_lr if args.encoder_lr is not None else 1e-5 if pretrained_vision else args.learning_rate
    optimizer = make_optimizer(model, encoder_lr, args)
    start, best = restore(out, model, optimizer) if args.resume else (0, math.inf)
    if start >= args.steps:
        return print(f'{out}: has its {start} steps; --steps sets more')
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(args, start) if rank == 0 else lambda *_, **__: None
    if rank == 0:
        print(f'{out}: {args.regime} {config["run"]["settings"]}, {args.objective}; encoder {count(model.encoder):,} '
              f'parameters at {encoder_lr:g}, decoder {count(model.decoder):,} at {args.learning_rate:g}; '
              f'{train.n:,} segments; {step_flops / 1e12:.3g} TFLOP a step; on {world} x {device.type}')

    # ---- training: batch n is a function of seed and n alone, so a step number is all that there is to resume from
    stop = []

    def ask_to_stop(signum, _):
        """Finish the step (several processes: go on to the next report), save, leave. Asked again: leave at once."""
        stop.append(signum)
        signal.signal(signum, signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)
    mine = range(start * G + rank, args.steps * G, world)         # each process has its share of the micro-batches
    batches = iter(DataLoader(train, batch_size=None, sampler=mine, num_workers=workers, pin_memory=on_cuda,
                              worker_init_fn=outlive_sigterm))
    forward = torch.compile(model, dynamic=False) if (on_cuda if args.compile is None else args.compile) else model
    ddp = world > 1 and not fsdp
    forward = DistributedDataParallel(forward, gradient_as_bucket_view=True) if ddp else forward
    by_itself = args.optimizer == 'adamw' and not fsdp
    clock, clock_step, skipped = time.time(), start, torch.zeros((), device=device)
    card = torch.cuda.get_device_name(device) if on_cuda else ''
    card_tflops = next((tflops for name, tflops in CARD_TFLOPS.items() if name in card), None)
    for step in range(start + 1, args.steps + 1):
        model.train()
        torch.manual_seed(args.seed + world * step + rank)        # what an encoder draws, too, follows from the step
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * learning_rate_scale(step - 1, args.steps, args.warmup_ratio)
        loss = 0.0
        for micro in range(G // world):
            forward.require_backward_grad_sync = micro == G // world - 1                    # of DistributedDataParallel
            with autocast(device):
                losses, _, balance_loss = forward(to_device(next(batches), device))
            ((losses.mean() + balance_loss) / (G // world)).backward()
            loss = loss + losses.detach().mean() / (G // world)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        norm = norm.full_tensor() if fsdp else norm
        finite = torch.isfinite(norm)
        skipped = torch.where(finite, 0.0, skipped + 1)           # steps in a row without an update; read with the log
        if by_itself:
            optimizer.found_inf = (~finite).float()               # where it is 1, fused AdamW leaves all as it was
        if by_itself or finite:                                   # what others must be told makes the host wait
            optimizer.step()
        optimizer.zero_grad(set_to_none=not ddp)                  # DDP's gradients are views of what it sends

        halt = bool(stop) and world == 1
        if step % args.log_steps == 0 or step == 1:
            seconds, clock, clock_step = (time.time() - clock) / (step - clock_step), time.time(), step
            if skipped >= 5:
                raise SystemExit(f'step {step}: gradient not finite {int(skipped)} times in a row; last save: {out}')
            if world > 1:
                dist.all_reduce(loss.div_(world))
                dist.all_reduce(wish := torch.tensor(float(len(stop)), device=device))      # all must leave together
                halt = bool(wish)
            tflops = step_flops / seconds / 1e12                  # of the model: what is computed twice counts once
            usage = {'gib': torch.cuda.max_memory_allocated(device) / 2 ** 30} if on_cuda else {}
            usage.update({'mfu': tflops / card_tflops / world} if card_tflops else {})
            log(step, loss=loss.item(), ppl=math.exp(min(loss.item(), 700)), lr=group['lr'], grad_norm=norm.item(),
                tokens_per_s=args.batch_size * G * losses.shape[1] / seconds, tflops=tflops, **usage,
                minutes_left=seconds * (args.steps - step) / 60)
        last, paused = step == args.steps, time.time()
        if step % args.eval_steps == 0 or last:
            result = evaluate(model, val if last else val_part, device, workers, rank, world)
            best = min(best, result['loss'])
            log(step, **{f'val_{k}': v for k, v in result.items()}, best_val_loss=best)
        if args.save_steps and (step % args.save_steps == 0 or last or halt):
            source = None if args.model in PRESETS or args.resume else fetch(args.model)
            save_run(out, step, model, optimizer, config, best, source, write=rank == 0)
        clock += time.time() - paused                             # what is reported as speed is the training's
        if halt and not last:
            return print(f'stopped at step {step}' + '; --resume goes on from the last save' * bool(args.save_steps))
    texts = passage(model, {name: x[:1] for name, x in val[0].items()}, tokenizer, device, length=256)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        show(*texts[0], args.objective)
    if rank == 0 and args.save_steps:
        print(f'saved in {out}: python eval.py {out}')
        if args.model == 'tiny':
            print('The same with the real model, and DIR from data.py:\n'
                  f'    python train.py --regime {args.regime} --data DIR --model deepseek-ai/DeepSeek-OCR')


if __name__ == '__main__':
    main()
