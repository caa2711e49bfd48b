"""
The tables and pictures of the comparison, from the logs of grid.py.

    python results/grid_report.py results/grid       from the logs here: prints the tables, draws results/grid*.png
    python results/grid_report.py out/grid           from your own runs: draws out/grid.png and out/grid_curves.png
"""
import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt

T = 128                                                           # context bytes
MEMORIES = ('meanpool_2 conv_64 meanpool_4 conv_32 vision_320 vision_256 frozen_256 meanpool_8 conv_16 vision_192 '
            'meanpool_16 conv_8 meanpool_32 conv_4').split()
TEXTS = [f'last_{n}' for n in (T, 65, 33, 17, 9, 5, 0)]
KINDS = {'meanpool': ('meanpool, window {}', 'Greens'), 'vision': ('vision, {} pixels', 'Reds'),
         'conv': ('conv1d_residual, {}', 'Oranges'), 'last': ('the last {} bytes', 'Blues'),
         'frozen': ('vision, {} pixels, encoder frozen', 'Purples')}
LM, STEPS = 'lm_reader_', 2000                                    # language modelling straight from the reader

def read_logs(folder):
    """{row: {seed: {step: validation perplexity}}} from out/grid/seed1/ROW/log.jsonl or from ROW_s1.jsonl."""
    logs = {}
    for path in sorted([*folder.glob('seed*/*/log.jsonl'), *folder.glob('*.jsonl')]):
        file = f'{path.parts[-2]}_s{path.parts[-3][4:]}' if path.name == 'log.jsonl' else path.stem
        row, seed = re.fullmatch(r'(.*?)(?:_s(\d+))?', file).groups()
        lines = [line for line in map(json.loads, path.read_text().splitlines()) if 'val_ppl' in line]
        values = {line['step']: line['val_ppl'] for line in lines}
        logs.setdefault('last_0' if row == 'none' else row, {})[int(seed or 0)] = values
    return logs

def kind_of(row):
    """'conv_16' -> 'conv', 16"""
    kind, n = row.split('_')
    return kind, int(n)

def positions(row):
    """Positions before the target: BOS, the memory and, unless it is text, a separator."""
    kind, n = kind_of(row)
    if kind == 'last':
        return 1 + n
    h = n // 64                                                   # a page has h rows of h vectors and a newline
    return 2 + (T // n if kind == 'meanpool' else n if kind == 'conv' else h * (h + 1))

def label(row):
    """What the table calls it."""
    kind, n = kind_of(row)
    return {'last_0': 'nothing', f'last_{T}': 'all of it'}.get(row) or KINDS[kind][0].format(n)

def table(logs, rows, columns):
    """A Markdown table of perplexities, those of all seeds in a cell. columns: [(heading, name of a log, step)]."""
    yield f'| context as | positions | ratio | {" | ".join(heading for heading, _, _ in columns)} |'
    yield '|' + '---|' * (3 + len(columns))
    for row in sorted(rows, key=positions, reverse=True):
        cells = [[f'{x:.3f}' if x < 1.2 else f'{x:.2f}' for _, seed in sorted(logs.get(log.format(row), {}).items())
                  if (x := seed.get(step))] for _, log, step in columns]
        if any(cells):
            known = [label(row), str(positions(row)), f'{T / positions(row):.2f}']
            yield f'| {" | ".join(known + [", ".join(values) for values in cells])} |'

def tables(logs):
    """The lines of both tables."""
    yield from table(logs, [*MEMORIES, 'last_0'], [
        ('reconstruction after 1,000 steps', '{}', 1000), ('after 2,000', '{}', STEPS),
        ('in 4,000', '{}_4000', 2 * STEPS)])
    yield ''
    yield from table(logs, [*MEMORIES, *TEXTS], [
        ('language modelling, straight from the reader', LM + '{}', STEPS),
        ('beside the last 17 bytes', LM + '{}_hybrid', STEPS), ('second stage', 'lm_{}', STEPS),
        ('second stage, beside the last 17 bytes', 'lm_{}_hybrid', STEPS),
        ('second stage, without the memory', 'lm_{}_off', STEPS)])

def picture(logs, path):
    """Perplexity at the end against ratio; a dot for each seed, lines through the means over seeds, and beside them,
    hollow, the runs with twice the steps. Vision's encoder is trained."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout='constrained')
    final = lambda row: [[*seed.values()][-1] for seed in logs.get(row, {}).values()]
    mean = lambda values: sum(values) / len(values)
    text = dict(textcoords='offset points', fontsize=9)
    for ax, prefix, title, ticks in ((axes[0], '', 'reconstruction', (1, 1.5, 2, 3, 4)),
                                     (axes[1], LM, 'language modelling, straight from the reader',
                                      (3.85, 3.9, 3.95, 4, 4.05, 4.1, 4.15))):
        number = '{:.3f}'.format if prefix else '{:.2f}'.format
        for kind, name in (('meanpool', 'mean pooling'), ('vision', 'vision'), ('conv', 'convolutions'),
                           ('last', 'truncation')):
            color = plt.get_cmap(KINDS[kind][1])(0.65)
            rows = [row for row in [*MEMORIES, *TEXTS[1:-1]] if kind_of(row)[0] == kind and final(prefix + row)]
            ax.plot([T / positions(row) for row in rows], [mean(final(prefix + row)) for row in rows], color=color,
                    label=name if prefix else None)
            for row in rows:
                x, values, longer = T / positions(row), final(prefix + row), final(f'{prefix}{row}_{2 * STEPS}')
                ax.plot([x] * len(values), values, 'o', color=color)
                where = (0, 6) if kind != 'conv' else (20, -4) if longer else (0, -15)
                ax.annotate(number(mean(values)), (x, mean(values)), xytext=where, **text, ha='center', color=color)
                for y in longer:
                    ax.plot(x, y, 'o', color=color, mfc='none')
                    ax.annotate(number(y), (x, y), xytext=(20, -4), **text, ha='center', color=color)
        for name, row, side in (('no context', 'last_0', 4), ('whole context', f'last_{T}', -13)):
            if values := final(prefix + row):
                ax.axhline(mean(values), color='grey', ls='--', lw=1)
                ax.annotate(f'{name} {number(mean(values))}', (0, mean(values)), xytext=(4, side), **text, color='grey',
                            xycoords=('axes fraction', 'data'))
        ax.set(title=title, xlabel='ratio: context bytes / positions before the target', xscale='log', yscale='log')
        ax.set_xlim(1.6, 26)
        ax.set_xticks([2, 4, 8, 16], labels=[2, 4, 8, 16])
        ax.set_yticks(ticks, labels=ticks)
        ax.minorticks_off()
        ax.margins(y=0.12)
    axes[0].set_ylabel('perplexity of held-out text')
    axes[1].plot([], [], 'o', color='grey', mfc='none', label='twice the steps')
    figure.legend(frameon=False, loc='outside lower center', ncols=5)
    figure.savefig(path, dpi=150)

def curves(logs, path):
    """Validation perplexity against steps, each regime in shades of a colour: the more positions, the darker."""
    figure, axes = plt.subplots(1, 3, figsize=(20, 5.5), layout='constrained')
    for ax, prefix, title in ((axes[0], '', 'reconstruction'), (axes[1], LM, 'language modelling from the reader'),
                              (axes[2], 'lm_', 'language modelling, second stage')):
        for kind in KINDS:
            rows = [row for row in sorted([*MEMORIES, *TEXTS], key=positions)
                    if kind_of(row)[0] == kind and prefix + row in logs]
            for row, shade in zip(rows, (0.4, 0.55, 0.7, 0.8, 0.9, 0.95, 1.0)):
                color = plt.get_cmap(KINDS[kind][1])(shade)
                for seed, values in logs[prefix + row].items():
                    points = list(values.items())[:-1]            # the last is of other passages, all 2,000
                    ax.plot(*zip(*points), marker='.', lw=1, color=color, label=None if seed else label(row))
        ax.set(title=title, yscale='log', xlabel='steps')
        for axis in ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter:
            axis('{x:.3g}')
        ax.legend(frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    axes[0].set_ylabel('perplexity of 250 held-out passages')
    figure.savefig(path, dpi=150)

def main():
    parser = argparse.ArgumentParser(description='Print the tables and draw the pictures of the comparison.')
    parser.add_argument('folder', type=Path, help='results/grid, or the folder that grid.py trained into')
    folder = parser.parse_args().folder
    logs = read_logs(folder)
    print(*tables(logs), sep='\n')
    picture(logs, f'{folder}.png')
    curves(logs, f'{folder}_curves.png')

if __name__ == '__main__':
    main()
