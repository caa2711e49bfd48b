"""
One run: one regime, one objective.

    python train.py --regime meanpool                               a laptop, two minutes: tiny model, Python's manual
    python train.py --model out/meanpool --objective lm             stage two, from that run
    python data.py finewiki --out fw --model deepseek-ai/DeepSeek-OCR --train_segments 500000 --val_segments 10000
    python train.py --regime meanpool --model deepseek-ai/DeepSeek-OCR --data fw             the paper, on a large GPU
    torchrun --nproc_per_node=8 train.py ...                                                 the same on eight

A run is the folder out/<regime> (out/<regime>_lm): config.json, weights and optimiser as last saved, and log.jsonl, a
line a report. --resume goes on from the last save as if nothing had happened.
"""
import argparse
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import Batches, open_corpus, prepare
from decoder import OBJECTIVES
from encoders import ENCODERS, settings_of
from eval import autocast, evaluate, passage, pick_device, show, to_device
from load_deepseek import PRESETS, fetch, load, read_json, save, tokenizer_of, write_aside

# flag: (its default for the tiny model, that for any other, what it is); the second follows the paper
FLAGS = {
    'context': (128, 1000, 'context tokens a segment'),
    'continuation': (128, 1000, 'continuation tokens a segment'),
    'steps': (700, None, 'optimiser steps; None is one epoch'),
    'batch_size': (8, 8, 'segments in a micro-batch'),
    'gradient_accumulation_steps': (1, 6, 'micro-batches in a step, shared among the processes'),
    'learning_rate': (3e-3, 1e-4, 'peak of the schedule'),
    'encoder_lr': (None, None, "the encoder's; None is 1e-5 for the pretrained vision encoder, else --learning_rate"),
    'weight_decay': (0.01, 0.01, 'on all parameters'),
    'beta2': (0.95, 0.999, "AdamW's second"),
    'warmup_ratio': (0.1, 0.1, 'share of the steps that warm up'),
    'max_grad_norm': (1.0, 1.0, 'clip the gradient to this norm'),
    'log_steps': (20, 10, 'steps between lines of the log'),
    'eval_steps': (200, 500, 'steps between validations'),
    'eval_segments': (64, 1000, 'validation segments in each but the last, which has all'),
    'save_steps': (400, 500, 'steps between saves'),
    'seed': (0, 0, 'of new weights and of the order of the data'),
    'workers': (None, None, 'processes that prepare batches; None is 2 on CUDA or to draw pages, else 0'),
}
PEAK = {'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, '4090': 165, '3090': 71}    # dense bf16 TFLOP/s, vendors'


def encoder_flags():
    """The settings of all encoders: {name: (its inspect.Parameter, the regime)}."""
    return {name: (p, regime) for regime, encoder in ENCODERS.items() for name, p in settings_of(encoder).items()}


def parse_args(argv=None, defaults={}):
    parser = argparse.ArgumentParser(description='Train an encoder and a decoder on one objective.',
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 36, 120))
    add = parser.add_argument_group('what').add_argument
    add('--model', default='tiny', help='tiny, full (random weights), a hub id, a folder or a run (default tiny)')
    add('--regime', help=f'{", ".join(ENCODERS)} (default: that of the run that --model is, else meanpool)')
    add('--objective', choices=OBJECTIVES, default='reconstruction', help='what to predict (default reconstruction)')
    add('--hybrid_text_tokens', type=int, default=0, help='last context tokens, plain behind the memory (default 0)')
    add('--train_encoder', '--train-encoder', action=argparse.BooleanOptionalAction, default=True, help='or freeze it')
    add('--data', default='pydoc', help='a folder that data.py made, or a source for data.py (default pydoc)')
    add('--output_dir', help="the run's folder (default out/<regime>, out/<regime>_lm)")
    add('--resume', action='store_true', help='go on with the run in --output_dir')
    add('--device', default='auto', help='cpu, cuda, mps (default: cuda where there is one)')
    add('--weights', choices=('fp32', 'bf16'), default='fp32', help='as trained; bf16 is the authors\' (default fp32)')
    add('--optimizer', choices=('adamw', 'adafactor'), default='adamw', help='adafactor keeps little (default adamw)')
    add('--grad_checkpoint', action='store_true', help='compute activations twice instead of keeping them')
    add('--compile', action=argparse.BooleanOptionalAction, help='torch.compile (default: on CUDA)')
    add('--wandb', metavar='PROJECT', help='log to Weights & Biases as well')
    add = parser.add_argument_group('settings of the encoder').add_argument
    for name, (p, regime) in encoder_flags().items():
        add(f'--{name}', type=p.annotation, metavar='X', help=f'{regime} (default {p.default!r})')
    add = parser.add_argument_group('how').add_argument
    for name, (tiny, other, text) in FLAGS.items():
        kind = float if isinstance(tiny, float) or name == 'encoder_lr' else int
        default = f'tiny {tiny}, else {other}' if tiny != other else other
        add(f'--{name}', type=kind, metavar='N', help=f'{text} (default {default})')
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def resolve(args):
    """Fill in what the command line left open: from the run that --model is, from the data, from FLAGS."""
    source = PRESETS[args.model] if args.model in PRESETS else read_json(fetch(args.model) / 'config.json')
    run, prepared = source.get('run', {}), Path(args.data, 'meta.json')
    args.regime = args.regime or run.get('regime', 'meanpool')
    if args.regime not in ENCODERS:
        raise SystemExit(f'--regime {args.regime}: not one of {", ".join(ENCODERS)}')
    own = settings_of(ENCODERS[args.regime])
    for name in encoder_flags():
        if getattr(args, name) is not None and name not in own:
            raise SystemExit(f'--{name}: no setting of regime {args.regime}, which has {", ".join(own) or "none"}')
        if getattr(args, name) is None and run.get('regime') == args.regime:       # stage two keeps those of stage one
            setattr(args, name, run['settings'].get(name))
    tiny = source.get('language_config', source).get('hidden_size', 1280) <= 256
    meta = read_json(prepared) if prepared.exists() else {}
    known = {name: meta.get(name) for name in ('context', 'continuation')}
    for name, (for_tiny, for_other, _) in FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, known.get(name) or (for_tiny if tiny else for_other))
        if isinstance(for_tiny, int) and name != 'seed' and getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f'--{name} {getattr(args, name)}: must be at least 1')
    args.output_dir = args.output_dir or f'out/{args.regime}' + '_lm' * (args.objective == 'lm')


def corpus(args, tokenizer):
    """The folder of the prepared corpus that --data names; made under out/data where --data is a source."""
    folder = Path(args.data)
    if not (folder / 'meta.json').exists():
        folder = Path('out/data', f'{folder.stem}_{tokenizer.name}_{args.context}_{args.continuation}')
        if not folder.exists():
            prepare(args.data, folder, tokenizer, args.context, args.continuation)
    open_corpus(folder, tokenizer, args.context, args.continuation)
    return str(folder)


def learning_rate_scale(step, steps, warmup_ratio):
    """Share of the peak rate at a step: up in a line from 0.1 to 1 over the warm-up, then down half a cosine to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def training_flops(model, batch, device):
    """FLOPs of training on a segment: 3 times the forward pass, whose encoder is counted as it runs."""
    one = to_device({k: v[:1] for k, v in batch.items()}, device)
    with autocast(device), FlopCounterMode(display=False) as counter:
        positions = model.prefix(one).shape[1]
    targets = one[OBJECTIVES[model.objective]].shape[1]
    return 3 * (counter.get_total_flops() + model.decoder.forward_flops(positions + targets, targets))


def save_run(out, step, model, optimizer, config, source):
    """Write optimiser and weights under new names; the index, renamed last, makes them the run's. Drop the old ones."""
    state = {'optimizer': optimizer.state_dict(), 'rng': torch.get_rng_state()}
    write_aside(out / f'trainer-{step:08d}.pt', lambda path: torch.save(state, path))
    save(model, config, out, step, source)
    for old in [*out.glob('model-*.safetensors'), *out.glob('trainer-*.pt')]:
        if f'-{step:08d}.' not in old.name:
            old.unlink()


def restore(out, optimizer):
    """Put a run's optimiser and random state back -> the step it was saved at. Raises SystemExit for a damaged file."""
    step = read_json(out / 'model.safetensors.index.json')['metadata']['step']
    try:
        state = torch.load(out / f'trainer-{step:08d}.pt', weights_only=True)
    except Exception as e:                     # torch.load raises a dozen kinds
        raise SystemExit(f'{out}/trainer-{step:08d}.pt: missing or damaged ({type(e).__name__})')
    optimizer.load_state_dict(state['optimizer'])
    torch.set_rng_state(state['rng'])
    return step


def open_log(args, start):
    """A function log(step, **values): to the screen, to log.jsonl behind step `start`, to Weights & Biases."""
    path, wandb = Path(args.output_dir, 'log.jsonl'), None
    lines = path.read_text(encoding='utf-8').splitlines() if start else []
    last = lambda line: line['step'] == args.steps and 'val_loss' in line              # which will be written again
    kept = [line for line in lines if json.loads(line)['step'] <= start and not last(json.loads(line))]
    path.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
    if args.wandb:
        try:
            import wandb
        except ImportError:
            raise SystemExit('--wandb: pip install wandb')
        wandb.init(project=args.wandb, name=Path(args.output_dir).name, config=vars(args))

    def log(step, **values):
        print(f'step {step:5d}/{args.steps}  ' + '  '.join(f'{k} {v:,.4g}' for k, v in values.items()), flush=True)
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'step': step, **values}) + '\n')
        if wandb:
            wandb.log(values, step=step)
    return log


def main(argv=None):
    args = parse_args(argv)
    if args.resume:
        out = Path(args.output_dir or f'out/{args.regime or "meanpool"}' + '_lm' * (args.objective == 'lm'))
        if not (out / 'model.safetensors.index.json').exists():
            raise SystemExit(f'--resume: no saved run in {out}')
        args = parse_args(argv, defaults=read_json(out / 'config.json')['run']['args'])   # the command line goes first
        args.model = args.output_dir = str(out)
    resolve(args)
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))      # torchrun sets them
    out, device = Path(args.output_dir), pick_device(args.device, int(os.environ.get('LOCAL_RANK', 0)))
    G, on_cuda = args.gradient_accumulation_steps, device.type == 'cuda'
    if (out / 'config.json').exists() and not args.resume:
        raise SystemExit(f'{out}: holds a run; --resume goes on with it, --output_dir puts this one elsewhere')
    if G % world:
        raise SystemExit(f'--gradient_accumulation_steps {G}: not a multiple of {world} processes')

    # ---- data, model, optimiser
    torch.manual_seed(args.seed)
    tokenizer = tokenizer_of(args.model)
    if world > 1:
        dist.init_process_group('nccl' if on_cuda else 'gloo')
        if rank > 0:
            dist.barrier()                                        # until rank 0 has prepared the corpus
    args.data = corpus(args, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    settings = {name: getattr(args, name) for name in settings_of(ENCODERS[args.regime])}
    dtype = torch.bfloat16 if args.weights == 'bf16' else torch.float32
    model, _, config = load(args.model, args.regime, args.context, args.objective, args.hybrid_text_tokens, device,
                            dtype, **settings)
    model.decoder.grad_checkpoint = args.grad_checkpoint
    if not args.train_encoder:
        model.encoder.requires_grad_(False)
    image_size = getattr(model.encoder, 'image_size', None)
    side = lambda name, limit=None: Batches(args.data, name, args.batch_size, tokenizer, image_size, args.seed, limit)
    train, some, val = side('train'), side('val', args.eval_segments), side('val')
    workers = (2 if image_size or on_cuda else 0) if args.workers is None else args.workers
    args.steps = args.steps or -(-len(train) // G)
    if args.encoder_lr is None:
        pretrained_vision = args.regime == 'vision' and config['run']['pretrained_encoder']
        args.encoder_lr = 1e-5 if pretrained_vision else args.learning_rate
    groups = [{'params': [p for p in part.parameters() if p.requires_grad], 'peak': rate}
              for part, rate in ((model.encoder, args.encoder_lr), (model.decoder, args.learning_rate))]
    groups = [group for group in groups if group['params']]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True) \
        if args.optimizer == 'adamw' else torch.optim.Adafactor(groups, weight_decay=args.weight_decay)
    start = restore(out, optimizer) if args.resume else 0
    config['run'].update(data=args.data, args={k: v for k, v in vars(args).items() if k != 'resume'})
    out.mkdir(parents=True, exist_ok=True)
    log = open_log(args, start) if rank == 0 else lambda *_, **__: None
    step_flops = args.batch_size * G * training_flops(model, train[0], device)
    if rank == 0:
        count = lambda part: sum(p.numel() for p in part.parameters())
        print(f'{out}: {args.regime} {config["run"]["settings"]}, {args.objective}; encoder {count(model.encoder):,}, '
              f'decoder {count(model.decoder):,} parameters; {train.n:,} segments; '
              f'{step_flops / 1e12:.3g} TFLOP a step; on {world} x {device.type}')

    # ---- training: batch n is a function of seed and n alone, so a step number is all that there is to resume from
    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(True))         # finish the step, save, leave
    mine = range(start * G + rank, args.steps * G, world)         # each process has its share of the micro-batches
    batches = iter(DataLoader(train, batch_size=None, sampler=mine, num_workers=workers, pin_memory=on_cuda))
    forward = torch.compile(model, dynamic=False) if (on_cuda if args.compile is None else args.compile) else model
    forward = DistributedDataParallel(forward) if world > 1 else forward
    clock, clock_step, skipped = time.time(), start, torch.zeros((), device=device)
    peak = next((peak for name, peak in PEAK.items() if on_cuda and name in torch.cuda.get_device_name(device)), None)
    model.train()
    for step in range(start + 1, args.steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = group['peak'] * learning_rate_scale(step - 1, args.steps, args.warmup_ratio)
        loss = 0.0
        for micro in range(G // world):
            forward.require_backward_grad_sync = micro == G // world - 1                    # of DistributedDataParallel
            with autocast(device):
                losses, _, balance_loss = forward(to_device(next(batches), device))
            ((losses.mean() + balance_loss) / (G // world)).backward()
            loss = loss + losses.detach().mean() / (G // world)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        finite = torch.isfinite(norm)
        skipped = torch.where(finite, 0.0, skipped + 1)           # steps in a row without an update; read with the log
        if args.optimizer == 'adamw':
            optimizer.found_inf = (~finite).float()               # where it is 1, fused AdamW leaves all as it was
        if args.optimizer == 'adamw' or finite:                   # asking Adafactor's question makes the host wait
            optimizer.step()
        optimizer.zero_grad()

        if step % args.log_steps == 0 or step == 1:
            seconds, clock, clock_step = (time.time() - clock) / (step - clock_step), time.time(), step
            if skipped >= 5:
                raise SystemExit(f'step {step}: gradient not finite {int(skipped)} times in a row; last save: {out}')
            if world > 1:
                dist.all_reduce(loss.div_(world))
            tflops = step_flops / seconds / 1e12                  # of the model: what is computed twice counts once
            card = {'gib': torch.cuda.max_memory_allocated(device) / 2 ** 30} if on_cuda else {}
            card.update({'mfu': tflops / peak / world} if peak else {})
            log(step, loss=loss.item(), ppl=math.exp(min(loss.item(), 700)), lr=group['lr'], grad_norm=norm.item(),
                tokens_per_s=args.batch_size * G * losses.shape[1] / seconds, tflops=tflops, **card,
                minutes_left=seconds * (args.steps - step) / 60)
        if step % args.eval_steps == 0 and step < args.steps and not stop:
            log(step, **{f'val_{k}': v for k, v in evaluate(model, some, device, workers, rank, world).items()})
        if rank == 0 and (step % args.save_steps == 0 or step == args.steps or stop):
            from_scratch = args.model in PRESETS or args.resume
            save_run(out, step, model, optimizer, config, None if from_scratch else fetch(args.model))
        if stop:
            print(f'stopped and saved at step {step}; --resume goes on')
            return
    log(args.steps, **{f'val_{k}': v for k, v in evaluate(model, val, device, workers, rank, world).items()})
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        show(*passage(model, val[0], tokenizer, device), args.objective)
        print(f'saved in {out}: python eval.py {out}. For the real model, with DIR from data.py:\n    python train.py '
              f'--regime {args.regime} --objective {args.objective} --data DIR --model deepseek-ai/DeepSeek-OCR')


if __name__ == '__main__':
    main()
