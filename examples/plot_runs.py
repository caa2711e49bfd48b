"""
Draw runs: perplexity against compression ratio, a panel for each objective and corpus.

    python examples/plot_runs.py out/a out/b out/c --out runs.png

A dot is a run, its colour the regime; a line joins the means over seeds. Runs of one regime that
differ in another flag at the same ratio have lines of their own, whose markers and labels say in
what. Dashed lines are no context and the whole context. One run makes a lonely dot: a picture takes
three.
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
from load_deepseek import add_flags, positive, read_json, run_main

# Flags in which runs may differ and still share a line: seeds, what the machine decides, reports.
NOT_COMPARED = ('seed', 'regime', 'objective', 'log_steps', 'eval_steps', 'eval_segments')
MARKERS = 'os^Dv*P<X>dphH8'

def point_of(folder, args, device):
    """Evaluate a run -> a dict of where its dot goes and of all the flags it was trained with."""
    row, _ = evaluation.row_of(folder, args, device)
    run = read_json(Path(folder, 'config.json'))['run']
    args_of_run = run.get('args', {})
    flags = {name: value for name, value in args_of_run.items() if name not in NOT_COMPARED}
    flags['model'] = Path(flags.get('model', '')).name
    return {
        'regime': row['regime'],
        'panel': (row['objective'], Path(args.data or run['data']).name),
        'ratio': float(row['ratio']),
        'ppl': float(row['PPL']),
        'is_none': row['regime'] == 'text' and row['positions'] == 1,
        'is_whole': row['regime'] == 'text' and row['positions'] == 1 + run['context'],
        'flags': {**flags, **run['settings'], 'data': run.get('data')},
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
        for name in names:
            value = point['flags'].get(name)
            if value not in (None, ''):     # of a flag that is not set
                parts.append(f'{name} {value}')
        point['label'] = ', '.join(parts)

def styles_of(points):
    """{label: colour and marker of its line}: a colour for each regime, and no two lines alike."""
    regimes = list(dict.fromkeys(point['regime'] for point in points))
    styles = {}
    for point in points:
        if point['label'] not in styles:
            color = f'C{regimes.index(point["regime"]) % 10}'       # matplotlib has ten
            used = [style['color'] for style in styles.values()].count(color)
            marker = MARKERS[used] if used < len(MARKERS) else f'${used}$'      # then numbers
            styles[point['label']] = {'color': color, 'marker': marker}
    return styles

def plot(points, path):
    """Draw the points of point_of() to a file. A line has the same colour and marker in all panels.
    Raises OSError or ValueError."""
    label_points(points)
    styles = styles_of(points)
    panels = list(dict.fromkeys(point['panel'] for point in points))
    # A Figure of its own needs no window, whatever backend a notebook has set.
    figure = Figure(figsize=(6 * len(panels), 4.5), layout='constrained')
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels):
        here = [point for point in points if point['panel'] == panel]
        for i, (label, style) in enumerate(styles.items()):
            line = [point for point in here if point['label'] == label]
            if not line:
                continue
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
        ax.set(title=' on '.join(panel), ylabel='perplexity per token of the model',
               xlabel='ratio: context tokens / positions before the target')
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)

@dataclass(kw_only=True)
class Flags:
    """out: picture to write
    data: another corpus, or a source for data.py (default: that of each run)
    segments: validation segments (default: all)
    batch_size: segments at once
    workers: processes that draw pages
    device: cpu, cuda, mps; auto is cuda if there is one"""
    out: str = 'runs.png'
    data: str = None
    segments: positive = None
    batch_size: positive = 16
    workers: int = 0
    device: str = 'auto'

def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw perplexity against ratio.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run')
    add_flags(parser, Flags)
    # row_of() wants these too: no passages, and pages as in training
    parser.set_defaults(generate=0, font=None, font_size=None, line_spacing=None)
    args = parser.parse_args(argv)
    # a wrong name should not cost an evaluation
    for folder in args.runs:
        if not Path(folder, 'model.safetensors').exists():
            raise ValueError(f'{folder}: no run with a save there')
    kinds = Figure().canvas.get_supported_filetypes()
    ending = Path(args.out).suffix[1:].lower()
    if ending not in kinds or not Path(args.out).parent.is_dir():
        raise ValueError(f'--out {args.out}: no such folder, or the ending is none of {[*kinds]}')
    if len(args.runs) < 3:
        print('One run makes a lonely dot: a picture takes three')
    device = evaluation.pick_device(args.device)
    plot([point_of(folder, args, device) for folder in args.runs], args.out)
    print(f'{args.out}: written')

if __name__ == '__main__':
    run_main(main)
