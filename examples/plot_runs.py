"""
Draw runs: perplexity against compression ratio, a panel for each objective and corpus.

    python examples/plot_runs.py out/a out/b out/c --out runs.png

A dot is a run; a line joins the means over seeds. Runs of one encoder that differ in another flag
at the same ratio have lines of their own, whose labels say in what. Dashed lines are no context and
the whole context. One run makes a lonely dot: a picture takes three.
"""
import argparse
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# A notebook sets a backend for all that it starts, and importing matplotlib fails where that
# backend is not installed. A file needs none.
os.environ.pop('MPLBACKEND', None)
from matplotlib.figure import Figure                                    # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation
from load_deepseek import add_flags, read_json, run_main

# Flags in which runs may differ and still share a line: seeds, what the machine decides, reports.
NOT_COMPARED = ('seed', 'regime', 'objective', 'log_steps', 'eval_steps', 'eval_segments')
MARKERS = 'os^Dv*'

def point_of(folder, args, device):
    """Evaluate a run -> a dict of where its dot goes and of all the flags it was trained with."""
    row, _ = evaluation.row_of(folder, args, device)
    run = read_json(Path(folder, 'config.json'))['run']
    flags = {name: value for name, value in run['args'].items() if name not in NOT_COMPARED}
    flags['model'] = Path(flags['model']).name
    return {
        'regime': row['regime'],
        'panel': (row['objective'], Path(run['data']).name),
        'ratio': float(row['ratio']),
        'ppl': float(row['PPL']),
        'is_none': row['regime'] == 'text' and row['positions'] == 1,
        'is_whole': row['regime'] == 'text' and row['positions'] == 1 + run['context'],
        'flags': {**flags, **run['settings'], 'data': run['data']},
    }

def label_points(points):
    """Give each point the label of its line: its regime, and the flags in which it differs from
    another run of that regime at the same ratio."""
    for point in points:
        differing = []
        for other in points:
            place = ('regime', 'panel', 'ratio')
            if any(point[name] != other[name] for name in place):
                continue
            for name, value in point['flags'].items():
                if other['flags'].get(name) != value and name not in differing:
                    differing.append(name)
        point['differing'] = differing
    for point in points:
        names = []                          # of flags that differ anywhere on this regime's lines
        for other in points:
            if other['regime'] == point['regime']:
                names += [name for name in other['differing'] if name not in names]
        parts = ['truncation' if point['regime'] == 'text' else point['regime']]
        parts += [f'{name} {point["flags"].get(name)}' for name in names]
        point['label'] = ', '.join(parts)

def plot(points, path):
    """Draw the points of point_of() to a file. A line has the same colour and marker in all panels.
    Raises OSError or ValueError."""
    label_points(points)
    panels = list(dict.fromkeys(point['panel'] for point in points))
    labels = list(dict.fromkeys(point['label'] for point in points))
    # A Figure of its own needs no window, whatever backend a notebook has set.
    figure = Figure(figsize=(6 * len(panels), 4.5), layout='constrained')
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels):
        here = [point for point in points if point['panel'] == panel]
        for label in labels:
            line = [point for point in here if point['label'] == label]
            if not line:
                continue
            i = labels.index(label)
            style = {'color': f'C{i % 10}', 'marker': MARKERS[i // 10 % len(MARKERS)]}
            line.sort(key=lambda point: point['ratio'])
            x = [point['ratio'] for point in line]
            y = [point['ppl'] for point in line]
            ax.plot(x, y, ls='', label=label, **style)
            means = []
            for ratio, group in itertools.groupby(line, key=lambda point: point['ratio']):
                values = [point['ppl'] for point in group]
                means.append((ratio, sum(values) / len(values)))
            ax.plot(*zip(*means), color=style['color'])
            for ratio, mean in means:
                offset = (4, -10 if i % 2 else 4)
                ax.annotate(f'{mean:.3g}', (ratio, mean), offset, textcoords='offset points',
                            fontsize=8)
        for name, key in (('no context', 'is_none'), ('whole context', 'is_whole')):
            values = [point['ppl'] for point in here if point[key]]
            if values:
                label = f'{name} {min(values):.3g}'
                ax.axhline(min(values), color='grey', ls='--', lw=1, label=label)
        ax.set(title=' on '.join(panel), ylabel='perplexity',
               xlabel='ratio: context tokens / positions before the target')
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)

@dataclass(kw_only=True)
class Flags(evaluation.Flags):
    """out: picture to write
    data: another corpus, or a source for data.py (default: that of each run)
    segments: validation segments (default: all)
    batch_size: segments at once
    device: cpu, cuda, mps; auto is cuda if there is one"""
    out: str = 'runs.png'
    generate: int = 0

def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw perplexity against ratio.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    add_flags(parser, Flags)
    args = parser.parse_args(argv)
    if len(args.runs) < 3:
        print(f'{len(args.runs)} of them make lonely dots: a picture takes three runs or more')
    device = evaluation.pick_device(args.device)
    plot([point_of(folder, args, device) for folder in args.runs], args.out)
    print(f'{args.out}: written')

if __name__ == '__main__':
    run_main(main)
