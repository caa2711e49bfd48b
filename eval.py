"""
Runs to evidence: a table, and text you can read.

    python eval.py out/meanpool out/conv1d_residual       a row a run, then a passage beside what each run makes of it

PPL is exp of the mean cross-entropy over all target tokens of the validation segments, accuracy the share of them that
is the likeliest token; both with every token predicted from the true ones before it. The passage is not: it is
generated greedily from the memory alone. Positions are all before the target; ratio is context tokens over those.
"""
import argparse
import math

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Batches
from decoder import OBJECTIVES
from load_deepseek import load_run


def pick_device(name, index=0):
    """'auto' is CUDA where there is one, else the CPU; mps when asked for. index: which card. Raises SystemExit."""
    name = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    try:
        return torch.empty(0, device=f'{name}:{index}' if name == 'cuda' else name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise SystemExit(f'--device {name}: not on this machine ({str(e).splitlines()[0]})')


def autocast(device):
    """bf16 for the matrix products on CUDA; elsewhere all is in the weights' own dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda')


def to_device(batch, device):
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


@torch.no_grad()
def evaluate(model, batches, device, workers=0, rank=0, world=1, progress=False):
    """Loss over a Batches, shared among `world` processes -> {'loss': nats a target token, 'ppl', 'accuracy'}."""
    sums, training = torch.zeros(3, dtype=torch.float64), model.training               # loss, hits, tokens
    model.eval()
    loader = DataLoader(batches, batch_size=None, sampler=range(rank, len(batches), world), num_workers=workers)
    for batch in tqdm(loader, disable=not progress, leave=False):
        with autocast(device):
            losses, hit, _ = model(to_device(batch, device))
        sums += torch.tensor([losses.double().sum(), hit.sum(), hit.numel()])
    model.train(training)
    if world > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return {'loss': loss, 'ppl': math.exp(min(loss, 700)), 'accuracy': accuracy}


def passage(model, batch, tokenizer, device):
    """The target of a batch's first segment and what the model generates in its place, as text."""
    training, first = model.training, to_device({name: x[:1] for name, x in batch.items()}, device)
    target = first[OBJECTIVES[model.objective]]
    model.eval()
    with autocast(device):
        generated = model.generate(first, target.shape[1])
    model.train(training)
    return tokenizer.decode(target[0].tolist()), tokenizer.decode(generated[0].tolist())


def show(original, generated, objective):
    """Print the two under each other."""
    made = 'reconstruction' if objective == 'reconstruction' else 'continuation'
    print(f'\n--- original\n{original}\n--- {made}\n{generated}\n---')


def main(argv=None):
    parser = argparse.ArgumentParser(description='Evaluate runs: a table, and a passage that each makes anew.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    parser.add_argument('--data', help='another prepared corpus (default: the one that the run was trained on)')
    parser.add_argument('--batch_size', type=int, default=16, help='segments at once (default 16)')
    parser.add_argument('--segments', type=int, help='validation segments (default: all)')
    parser.add_argument('--workers', type=int, default=0, help='processes that draw pages (default 0)')
    parser.add_argument('--device', default='auto', help='cpu, cuda, mps (default: cuda where there is one)')
    args = parser.parse_args(argv)
    device, passages = pick_device(args.device), []
    print('| run | objective | setting | positions | ratio | PPL | accuracy | encoder parameters |\n|' + '---|' * 8)
    for folder in args.runs:
        model, tokenizer, config = load_run(folder, device)
        run, image_size = config['run'], getattr(model.encoder, 'image_size', None)
        batches = Batches(args.data or run['data'], 'val', args.batch_size, tokenizer, image_size, limit=args.segments)
        result = evaluate(model, batches, device, args.workers, progress=True)
        with torch.no_grad():
            positions = model.prefix(to_device({k: x[:1] for k, x in batches[0].items()}, device)).shape[1]
        labels = {**run['settings'], **({'hybrid': run['hybrid']} if run['hybrid'] else {})}
        setting = ', '.join(f'{name} {value}' for name, value in labels.items() if value != '')
        parameters = sum(p.numel() for p in model.encoder.parameters())
        print(f'| {folder} | {run["objective"]} | {setting} | {positions} | {run["context"] / positions:.2f} | '
              f'{result["ppl"]:.3f} | {result["accuracy"]:.3f} | {parameters:,} |', flush=True)
        passages.append((folder, *passage(model, batches[0], tokenizer, device), run['objective']))
    for folder, original, generated, objective in passages:
        print(f'\n{folder}', end='')
        show(original, generated, objective)


if __name__ == '__main__':
    main()
