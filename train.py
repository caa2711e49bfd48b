"""
One run: one regime, one objective.

    python train.py --regime meanpool                                  a laptop, two minutes: tiny model, bytes, Python's manual
    python train.py --regime conv1d_residual --objective lm --model out/conv1d_residual          stage two, from that run
    python data.py finewiki --out fw --model deepseek-ai/DeepSeek-OCR --train_segments 500000 --val_segments 10000
    python train.py --regime meanpool --model deepseek-ai/DeepSeek-OCR --data fw                 the paper, on one large GPU

A run is the folder out/<regime>: config.json, weights and optimiser state of the last save, and log.jsonl, one line a
report. --resume goes on from the last save as if nothing had happened.
"""
import argparse
import json
import math
import signal
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data import Batches, open_corpus, prepare
from decoder import OBJECTIVES
from encoders import ENCODERS, settings_of
from eval import autocast, evaluate, passage, pick_device, show, to_device
from load_deepseek import PRESETS, fetch, load, read_json, save, tokenizer_of, write_aside

# What suits the tiny model and the paper's recipe, where they differ: (tiny, any other)
DEFAULTS = {'context': (128, 1000), 'continuation': (128, 1000), 'steps': (500, None), 'batch_size': (16, 8),
            'gradient_accumulation_steps': (1, 6), 'learning_rate': (3e-3, 1e-4), 'beta2': (0.95, 0.999),
            'eval_steps': (100, 500), 'eval_segments': (64, 1000)}


def parse_args(argv=None, defaults={}):
    parser = argparse.ArgumentParser(description='Train an encoder and a decoder on one objective.',
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120))
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='tiny', help='tiny, full (random weights), a hub id, a checkpoint folder, or a run (default tiny)')
    group.add_argument('--regime', help=f'the encoder: {", ".join(ENCODERS)} (default: that of the run that --model is, else meanpool)')
    group.add_argument('--objective', choices=OBJECTIVES, default='reconstruction', help='what to predict (default reconstruction)')
    group.add_argument('--hybrid_text_tokens', type=int, default=0, help='last context tokens that follow the memory as plain ones (default 0)')
    group = parser.add_argument_group('settings of the encoders')
    for regime, encoder in ENCODERS.items():
        for name, p in settings_of(encoder).items():
            if f'--{name}' not in parser._option_string_actions:
                group.add_argument(f'--{name}', type=p.annotation, help=f'{regime} (default {p.default!r})')
    group = parser.add_argument_group('data')
    group.add_argument('--data', default='pydoc', help='a folder that data.py made, or what data.py can read (default pydoc)')
    group.add_argument('--context', type=int, help='context tokens a segment (default: as in the data; tiny 128, else 1000)')
    group.add_argument('--continuation', type=int, help='continuation tokens a segment (default: likewise)')
    group.add_argument('--workers', type=int, help='processes that prepare batches (default: 2 to draw pages, else 0)')
    group = parser.add_argument_group('optimisation')
    group.add_argument('--steps', type=int, help='optimiser steps (default: tiny 500, else one epoch)')
    group.add_argument('--batch_size', type=int, help='segments in a micro-batch (default: tiny 16, else 8)')
    group.add_argument('--gradient_accumulation_steps', type=int, help='micro-batches a step (default: tiny 1, else 6)')
    group.add_argument('--learning_rate', type=float, help='peak of the schedule (default: tiny 3e-3, else 1e-4)')
    group.add_argument('--encoder_lr', type=float, help="the encoder's (default: 1e-5 for the pretrained vision encoder, else --learning_rate)")
    group.add_argument('--train_encoder', action=argparse.BooleanOptionalAction, default=True, help='or leave the encoder as it is')
    group.add_argument('--weight_decay', type=float, default=0.01, help='on all parameters (default 0.01)')
    group.add_argument('--beta2', type=float, help="Adam's second (default: tiny 0.95, else 0.999)")
    group.add_argument('--warmup_ratio', type=float, default=0.1, help='share of the steps that warm up (default 0.1)')
    group.add_argument('--max_grad_norm', type=float, default=1.0, help='clip the gradient to this norm (default 1.0)')
    group = parser.add_argument_group('the run')
    group.add_argument('--output_dir', help='its folder (default out/<regime>, and _lm behind that for lm)')
    group.add_argument('--resume', action='store_true', help='go on with the run in --output_dir')
    group.add_argument('--eval_steps', type=int, help='steps between validations (default: tiny 100, else 500)')
    group.add_argument('--eval_segments', type=int, help='segments of each but the last (default: tiny 64, else 1000)')
    group.add_argument('--save_steps', type=int, default=500, help='steps between saves (default 500)')
    group.add_argument('--log_steps', type=int, default=10, help='steps between lines of the log (default 10)')
    group.add_argument('--seed', type=int, default=0, help='of weights and data order (default 0)')
    group.add_argument('--device', default='auto', help='cpu, cuda, mps (default: cuda where there is one)')
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def learning_rate_scale(step, steps, warmup_ratio):
    """Share of the peak rate at a step: up in a line from 0.1 to 1 over the warm-up, then down half a cosine to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def resolve(args, source):
    """Fill in what the command line left open: from the run that --model is, from the data, from DEFAULTS. source: its config.json."""
    run = source.get('run', {})
    args.regime = args.regime or run.get('regime', 'meanpool')
    if args.regime not in ENCODERS:
        raise SystemExit(f'--regime {args.regime}: not one of {", ".join(ENCODERS)}')
    own = settings_of(ENCODERS[args.regime])
    for name in {name for encoder in ENCODERS.values() for name in settings_of(encoder)} - set(own):
        if getattr(args, name) is not None:
            raise SystemExit(f'--{name}: no setting of regime {args.regime}, which has {", ".join(own) or "none"}')
    if run.get('regime') == args.regime:                          # stage two keeps the settings of stage one
        for name, value in run['settings'].items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    prepared = Path(args.data, 'meta.json')
    meta = json.loads(prepared.read_text(encoding='utf-8')) if prepared.exists() else {}
    tiny = source.get('language_config', source).get('hidden_size', 1280) <= 256
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, meta.get(name, values[not tiny]))
    for name in ('context', 'batch_size', 'gradient_accumulation_steps', 'eval_steps', 'save_steps', 'log_steps'):
        if getattr(args, name) < 1:
            raise SystemExit(f'--{name} {getattr(args, name)}: must be at least 1')
    args.output_dir = args.output_dir or f'out/{args.regime}' + '_lm' * (args.objective == 'lm')
    args.workers = (2 if args.regime == 'vision' else 0) if args.workers is None else args.workers


def corpus(args, tokenizer):
    """The folder of the prepared corpus that --data names; made under out/data when it is something to prepare."""
    folder = Path(args.data)
    if not (folder / 'meta.json').exists():
        folder = Path('out/data', f'{Path(args.data).stem}_{tokenizer.name}_{args.context}_{args.continuation}')
        if not folder.exists():
            prepare(args.data, folder, tokenizer, args.context, args.continuation)
    open_corpus(folder, tokenizer, args.context, args.continuation)
    return str(folder)


def main(argv=None):
    args = parse_args(argv)
    if args.resume:
        folder = args.output_dir or f'out/{args.regime or "meanpool"}' + '_lm' * (args.objective == 'lm')
        if not Path(folder, 'model.safetensors.index.json').exists():
            raise SystemExit(f'--resume: no saved run in {folder}')
        args = parse_args(argv, defaults=read_json(Path(folder, 'config.json'))['run']['args'])          # what is on the command line goes first
        args.model = args.output_dir = folder
    source = PRESETS[args.model] if args.model in PRESETS else read_json(fetch(args.model) / 'config.json')
    resolve(args, source)
    out, device = Path(args.output_dir), pick_device(args.device)
    if (out / 'config.json').exists() and not args.resume:
        raise SystemExit(f'{out}: holds a run; --resume goes on with it, --output_dir puts this one elsewhere')

    # ---- model and data
    torch.manual_seed(args.seed)
    tokenizer = tokenizer_of(args.model)
    args.data = corpus(args, tokenizer)
    settings = {name: getattr(args, name) for name in settings_of(ENCODERS[args.regime])}
    model, _, config = load(args.model, args.regime, args.context, args.objective, args.hybrid_text_tokens, device, **settings)
    model.encoder.requires_grad_(args.train_encoder)
    train = Batches(args.data, 'train', args.batch_size, tokenizer, model.encoder.image_size, args.seed)
    val = Batches(args.data, 'val', args.batch_size, tokenizer, model.encoder.image_size)
    some = Batches(args.data, 'val', args.batch_size, tokenizer, model.encoder.image_size, limit=args.eval_segments)
    args.steps = args.steps or -(-len(train) // args.gradient_accumulation_steps)
    if args.encoder_lr is None:
        args.encoder_lr = 1e-5 if config['run']['pretrained_encoder'] and args.regime == 'vision' else args.learning_rate
    config['run'].update(data=args.data, args={k: v for k, v in vars(args).items() if k != 'resume'})
    groups = [{'params': [p for p in part.parameters() if p.requires_grad], 'peak': rate}
              for part, rate in ((model.encoder, args.encoder_lr), (model.decoder, args.learning_rate))]
    optimizer = torch.optim.AdamW([g for g in groups if g['params']], betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    start = 0
    if args.resume:
        start = json.loads((out / 'model.safetensors.index.json').read_text(encoding='utf-8'))['metadata']['step']
        try:
            state = torch.load(out / f'trainer-{start:08d}.pt', weights_only=True)
        except Exception as e:                 # torch.load raises a dozen kinds
            raise SystemExit(f'{out}/trainer-{start:08d}.pt: missing or damaged ({type(e).__name__})')
        optimizer.load_state_dict(state['optimizer'])
        torch.set_rng_state(state['rng'])
    else:
        out.mkdir(parents=True, exist_ok=True)
    count = lambda part: sum(p.numel() for p in part.parameters())
    print(f'{out}: {args.regime} {settings}, {args.objective}; encoder {count(model.encoder):,} and decoder {count(model.decoder):,} '
          f'parameters; {train.n:,} segments of {args.context} + {args.continuation} tokens; steps {start} to {args.steps} on {device}')

    def checkpoint(step):
        """Write weights and optimiser under new names; the index names both, and is the last to be renamed."""
        state = {'optimizer': optimizer.state_dict(), 'rng': torch.get_rng_state()}
        write_aside(out / f'trainer-{step:08d}.pt', lambda path: torch.save(state, path))
        save(model, config, out, step, source=None if args.model in PRESETS or args.resume else fetch(args.model))
        for old in [*out.glob('model-*.safetensors'), *out.glob('trainer-*.pt')]:
            if f'-{step:08d}' not in old.name:
                old.unlink()

    log_path = out / 'log.jsonl'
    lines = log_path.read_text(encoding='utf-8').splitlines() if args.resume else []
    log_path.write_text(''.join(line + '\n' for line in lines if json.loads(line)['step'] <= start), encoding='utf-8')

    def log(step, **values):
        """One line on the screen and one in log.jsonl."""
        print(f'step {step:5d}  ' + '  '.join(f'{k} {v:,.4g}' for k, v in values.items()), flush=True)
        with open(log_path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'step': step, **values}) + '\n')

    # ---- training: batch n is a function of seed and n alone, so a step number is all there is to resume from
    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(True))         # finish the step, save, leave
    G = args.gradient_accumulation_steps
    loader = DataLoader(train, batch_size=None, sampler=range(start * G, args.steps * G), num_workers=args.workers,
                        pin_memory=device.type == 'cuda', persistent_workers=False)
    batches, clock, clock_step = iter(loader), time.time(), start
    model.train()
    for step in range(start + 1, args.steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = group['peak'] * learning_rate_scale(step - 1, args.steps, args.warmup_ratio)
        loss = 0.0
        for _ in range(G):
            with autocast(device):
                losses, _, balance_loss = model(to_device(next(batches), device))
            ((losses.mean() + balance_loss) / G).backward()
            loss = loss + losses.detach().mean() / G
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % args.log_steps == 0 or step == 1:
            now = time.time()
            seconds = (now - clock) / (step - clock_step)
            clock, clock_step = now, step
            tokens = args.batch_size * G * losses.shape[1]
            log(step, loss=loss.item(), ppl=math.exp(min(loss.item(), 700)), lr=optimizer.param_groups[-1]['lr'], grad_norm=norm.item(),
                tokens_per_s=tokens / seconds, minutes_left=seconds * (args.steps - step) / 60)
        if step % args.eval_steps == 0 and step < args.steps and not stop:
            log(step, **{f'val_{k}': v for k, v in evaluate(model, some, device, args.workers).items()})
        if step % args.save_steps == 0 or step == args.steps or stop:
            checkpoint(step)
        if stop:
            print(f'stopped after step {step} and saved; --resume goes on')
            return
    log(args.steps, **{f'val_{k}': v for k, v in evaluate(model, val, device, args.workers).items()})
    show(*passage(model, val[0], tokenizer, device), args.objective)
    print(f'saved in {out}; `python eval.py {out}` tells more. The real model: python train.py --regime {args.regime} '
          f'--model deepseek-ai/DeepSeek-OCR --data DIR, with a DIR from data.py')


if __name__ == '__main__':
    main()
