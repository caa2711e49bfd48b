"""
The comparison's tables and picture, from its log.

    python results/comparison_report.py results/comparison.jsonl        print the tables, draw results/comparison.png
    python results/comparison_report.py out/compare --merge FILE.jsonl  first put the logs of many runs into one file

The log is what train.py writes, with two more fields in each line: `run`, such as lm_conv_16, and `seed`. A run's name
is an objective, a form of the context with its size and, for side runs, a remark:

    reconstruction   lm               trained straight from the reader, to rebuild the context or to predict what follows
    second_stage                      language modelling that starts from a reconstruction run
    no_context  whole_context  last_17  meanpool_8  conv_16  vision_256  frozen_vision_256  perceiver_16  llm_encoder_16
    _4000_steps   _and_last_17        remarks: more steps; with the last 17 bytes as plain tokens beside the memory

A line with `positions` is no report of a run but its final loss at each position of the target.
"""
import argparse
import json
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.patheffects                                 # noqa: E402
import matplotlib.pyplot as plt                               # noqa: E402

T = 128                                                       # bytes of context
OBJECTIVES = ('reconstruction', 'lm', 'second_stage', 'facts')
# What the tables call a form, what the picture calls it, its colour.
FORMS = {
    'last': ('the last {} bytes', 'truncation', '#2b6cb0'),
    'meanpool': ('mean pooling, window {}', 'mean pooling', '#2f855a'),
    'conv': ('convolutions, {} vectors', 'convolutions', '#c05621'),
    'vision': ('vision, {} pixels', 'vision', '#c53030'),
    'frozen_vision': ('vision, {} pixels, encoder frozen', 'vision, encoder frozen', '#f08080'),
    'perceiver': ('perceiver, {} vectors', 'perceiver', '#6b46c1'),
    'llm_encoder': ('decoder layers as encoder, {} vectors', 'decoder layers as encoder', '#1a202c'),
}
# The titles of the picture say what was found, so they belong to these logs.
FOUND = ('Convolutions rebuild the text as well as vision', 'Truncation predicts what follows best')
TITLES = {
    'comparison': FOUND,
    'comparison_held_out': FOUND,
}
GREY = '#555555'


# ---- the log ----

def read_folder(folder):
    """The lines of the runs FOLDER/seed0/lm_conv_16/log.jsonl and so on, and of FOLDER/by_position.jsonl."""
    lines = []
    for path in sorted(folder.glob('seed*/*/log.jsonl')):
        seed = int(path.parts[-3].removeprefix('seed'))
        for line in map(json.loads, path.read_text().splitlines()):
            for speed in ('tokens_per_s', 'minutes_left', 'best_val_loss'):
                line.pop(speed, None)
            lines.append({'run': path.parts[-2], 'seed': seed, **line})
    by_position = folder / 'by_position.jsonl'
    if by_position.exists():
        for line in map(json.loads, by_position.read_text().splitlines()):
            seed = int(line.pop('seed_folder').removeprefix('seed'))
            lines.append({'run': line.pop('run'), 'seed': seed, **line})
    return lines


def read_lines(path):
    """The lines of a merged log, or of a folder of runs."""
    if path.is_dir():
        return read_folder(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def name_of(form):
    """no_context and whole_context are truncation to 0 and to all tokens. The rest stays."""
    known = {'no_context': 'last_0', 'none': 'last_0', 'whole_context': f'last_{T}'}
    for name, last in known.items():
        if form == name or form.startswith(name + '_'):
            return last + form.removeprefix(name)
    return re.sub('^frozen_(?=[0-9])', 'frozen_vision_', form)


class Log:
    """val[objective, form] = {seed: {step: validation loss}}; parts[objective, form] = {seed: line with positions}."""

    def __init__(self, lines):
        self.val, self.parts = {}, {}
        for line in lines:
            objective = next(name for name in OBJECTIVES if line['run'].startswith(name + '_'))
            key = objective, name_of(line['run'].removeprefix(objective + '_'))
            if 'positions' in line:
                self.parts.setdefault(key, {})[line['seed']] = line
            elif 'val_loss' in line:
                self.val.setdefault(key, {}).setdefault(line['seed'], {})[line['step']] = line['val_loss']
        self.steps = max(step for (objective, _), seeds in self.val.items() if objective in ('reconstruction', 'lm')
                         for losses in seeds.values() for step in losses
                         if not re.search('_steps', _)) if self.val else 0

    def losses(self, objective, form, step=None):
        """The validation loss of each seed after `step` steps, or at the end."""
        found = []
        for seed, losses in sorted(self.val.get((objective, form), {}).items()):
            last = max(losses)
            measured = self.parts.get((objective, form), {}).get(seed)
            if step is not None and step != last:
                found += [losses[step]] if step in losses else []
            elif measured:
                found.append(measured['all'])
            else:
                found.append(losses[last])
        return found

    def forms(self, *objectives):
        """The forms without a remark that have a run of these objectives, the longest memory first."""
        found = {form for objective, form in self.val if objective in objectives and plain(form)}
        return sorted(found, key=lambda form: (-positions(form), list(FORMS).index(plain(form)[0])))


# ---- the names ----

def plain(form):
    """'conv_16' -> ('conv', 16), and None if a remark follows."""
    match = re.fullmatch('(' + '|'.join(FORMS) + r')_(\d+)', form)
    return match and (match[1], int(match[2]))


def positions(form):
    """Positions before the target: BOS, the memory and, unless it is text, a separator."""
    kind, n = plain(form)
    if kind == 'last':
        return 1 + n
    if kind == 'meanpool':
        return 1 + math.ceil(T / n) + 1
    if kind in ('vision', 'frozen_vision'):
        h = n // 64                                           # h rows of h vectors and a newline
        return 1 + h * (h + 1) + 1
    return 1 + n + 1


def label(form):
    """What the tables call it."""
    kind, n = plain(form)
    special = {'last_0': 'no context', f'last_{T}': 'the whole context'}
    return special.get(form) or FORMS[kind][0].format(n)


# ---- the tables ----

def mean(values):
    return sum(values) / len(values)


def rebuilt(loss):
    """Perplexity of a reconstruction: '1.043', '1.51'"""
    value = math.exp(loss)
    return f'{value:.3f}' if value < 1.2 else f'{value:.2f}'


def predicted(loss):
    """Perplexity at language modelling, where rows differ little: '4.014'"""
    return f'{math.exp(loss):.3f}'


def cell(losses, text=rebuilt):
    """The mean over seeds and, where there are several, their range: '1.100 (1.081 to 1.119)'."""
    if not losses:
        return ''
    values = sorted(losses)
    if len(values) == 1:
        return text(values[0])
    return f'{text(mean(values))} ({text(values[0])} to {text(values[-1])})'


def markdown(heads, rows):
    """The lines of a table without the columns in which no row has anything."""
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    yield '| ' + ' | '.join(heads[i] for i in kept) + ' |'
    yield '|' + '---|' * len(kept)
    for row in rows:
        yield '| ' + ' | '.join(row[i] for i in kept) + ' |'


def known(form):
    return [label(form), str(positions(form)), f'{T / positions(form):.2f}']


def gained(log, form):
    """Mean loss of no context minus the mean loss of this form, at language modelling."""
    losses, without = log.losses('lm', form), log.losses('lm', 'last_0')
    if not losses or not without or form == 'last_0':
        return ''
    return f'{mean(without) - mean(losses):.3f}'


def main_table(log):
    """The table of the README: both objectives, straight from the reader."""
    heads = ['context as', 'positions before the target', 'ratio', 'rebuild the context: perplexity per byte',
             'predict what follows: perplexity per byte', 'nats per byte gained over no context']
    rows = [known(form) + [cell(log.losses('reconstruction', form)), cell(log.losses('lm', form), predicted), gained(log, form)]
            for form in log.forms('reconstruction', 'lm')]
    yield from markdown(heads, rows)


def more_tables(log):
    """Reconstruction half-way, and with twice the steps; the second stage; the loss by position."""
    half, twice = log.steps // 2, 2 * log.steps
    heads = ['rebuild the context, perplexity per byte', 'positions', 'ratio', f'after {half:,} steps',
             f'after {log.steps:,}', f'in {twice:,}']
    rows = [known(form) + [cell(log.losses('reconstruction', form, half)), cell(log.losses('reconstruction', form)),
                           cell(log.losses('reconstruction', f'{form}_{twice}_steps'))]
            for form in log.forms('reconstruction')]
    yield from markdown(heads, rows)

    if log.forms('second_stage'):
        yield ''
        heads = ['predict what follows, perplexity per byte', 'positions', 'ratio', 'straight from the reader',
                 'beside the last 17 bytes', 'second stage', 'second stage, beside the last 17 bytes',
                 'second stage, without the memory']
        columns = [('lm', ''), ('lm', '_and_last_17'), ('second_stage', ''), ('second_stage', '_and_last_17'),
                   ('second_stage', '_without_memory')]
        rows = [known(form) + [cell(log.losses(objective, form + remark), predicted) for objective, remark in columns]
                for form in log.forms('lm', 'second_stage')]
        yield from markdown(heads, rows)

    if log.parts:
        yield ''
        heads = ['predict what follows, nats per byte', 'positions', 'bytes 1 to 16', '17 to 64', '65 to 128', 'all']
        rows = []
        for form in log.forms('lm'):
            seeds = log.parts.get(('lm', form), {}).values()
            parts = [[line[part] for line in seeds] for part in ('first_16', 'next_48', 'rest', 'all')]
            rows.append(known(form)[:2] + [cell(losses, '{:.3f}'.format) for losses in parts])
        yield from markdown(heads, rows)


# ---- the picture ----

def place_labels(ax, labels):
    """Write the values (x, y, text, colour) beside their points. Points that are near each other along x share a column:
    its highest value stands above its point, the others right below theirs, and those of points further left in the
    column left above theirs, pushed apart where they would lie on each other. So they keep off lines that rise."""
    ax.figure.canvas.draw()
    point = ax.figure.dpi / 72                                # in pixels
    white = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground='white')]
    columns = []
    for x, y, text, colour in sorted(labels):
        label = (*ax.transData.transform((x, y)), text, colour)
        if columns and label[0] - columns[-1][0][0] < 22 * point:
            columns[-1].append(label)
        else:
            columns.append([label])

    def write(x, y, text, colour, side):
        place = ax.transAxes.inverted().transform((x, y))
        ax.text(*place, text, transform=ax.transAxes, color=colour, fontsize=8, ha=side, va='center', path_effects=white,
                zorder=5)

    for column in columns:
        column.sort(key=lambda label: -label[1])
        last = max(x for x, *_ in column)
        below, above = math.inf, -math.inf
        for i, (x, y, text, colour) in enumerate(column):
            if x < last - 3 * point:
                continue
            if i == 0:
                write(x - 3 * point, y + 8.5 * point, text, colour, 'center')
            else:
                below = min(y - 5 * point, below - 9 * point)
                write(x + 5 * point, below, text, colour, 'left')
        for x, y, text, colour in reversed(column):
            if x < last - 3 * point:
                above = max(y + 5 * point, above + 9 * point)
                write(x - 4 * point, above, text, colour, 'right')


def panel(ax, log, objective, digits):
    """Perplexity at the end against ratio: a dot for each seed, a line through the means, hollow with twice the steps."""
    labels = []
    number = f'{{:.{digits}f}}'.format
    for kind, (_, name, colour) in FORMS.items():
        forms = [form for form in log.forms(objective) if plain(form)[0] == kind and form not in ('last_0', f'last_{T}')]
        if not forms:
            continue
        means = [mean(log.losses(objective, form)) for form in forms]
        ax.plot([T / positions(form) for form in forms], [math.exp(loss) for loss in means], color=colour, lw=1.5)
        for form, loss in zip(forms, means):
            x = T / positions(form)
            for y in log.losses(objective, form):
                ax.plot(x, math.exp(y), 'o', color=colour, ms=5)
            labels.append((x, math.exp(loss), number(math.exp(loss)), colour))
            for y in log.losses(objective, f'{form}_{2 * log.steps}_steps'):
                ax.plot(x, math.exp(y), 'o', color=colour, mfc='white', ms=5)
                labels.append((x, math.exp(y), number(math.exp(y)), colour))
    for name, form, offset in (('no context', 'last_0', 4), ('whole context', f'last_{T}', -11)):
        if losses := log.losses(objective, form):
            y = math.exp(mean(losses))
            ax.axhline(y, color=GREY, ls='--', lw=1)
            side = (0, 4, 'left') if objective == 'reconstruction' else (1, -2, 'right')
            ax.annotate(f'{name} {number(y)}', (side[0], y), xytext=(side[1], offset), ha=side[2], color=GREY, fontsize=8,
                        xycoords=('axes fraction', 'data'), textcoords='offset points')
    ax.set(xscale='log', yscale='log', xlabel='ratio: bytes of context / positions before the target')
    ax.set_xlim(1.6, 34)
    ax.set_xticks([2, 4, 8, 16, 32], labels=[2, 4, 8, 16, 32])
    ax.minorticks_off()
    ax.margins(y=0.12)
    ax.spines[['top', 'right']].set_visible(False)
    return labels


def picture(log, path):
    """Both objectives side by side, 820 pixels wide at half of its resolution."""
    plt.rcParams.update({'font.size': 9, 'axes.titlesize': 10, 'axes.titleweight': 'bold', 'axes.labelsize': 8.5})
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.9), layout='constrained', facecolor='white')
    titles = TITLES.get(Path(path).stem, ('Rebuild the context', 'Predict what follows'))
    labels = [panel(axes[0], log, 'reconstruction', 2), panel(axes[1], log, 'lm', 3)]
    axes[0].set_yticks([1, 1.5, 2, 3, 4], labels=[1, 1.5, 2, 3, 4])
    low, high = (math.exp(loss) for loss in sorted(mean(log.losses('lm', form)) for form in log.forms('lm'))[::
                 max(1, len(log.forms('lm')) - 1)][:2])
    ticks = [round(0.05 * n, 2) for n in range(math.floor(low / 0.05), math.ceil(high / 0.05) + 1)]
    axes[1].set_yticks(ticks, labels=ticks)
    axes[0].set(title=titles[0], ylabel='rebuild the context: perplexity per byte')
    axes[1].set(title=titles[1], ylabel='predict what follows: perplexity per byte (zoomed)')
    axes[1].set_ylim(low * 0.994, high * 1.006)

    without, vision = log.losses('lm', 'last_0'), log.losses('lm', 'vision_256')
    if without and vision and abs(mean(vision) - mean(without)) < 0.005:
        x, y = T / positions('vision_256'), math.exp(mean(vision))
        axes[1].annotate('vision lies on the\nno-context line', (x, y), xytext=(-10, 26), textcoords='offset points',
                         color=FORMS['vision'][2], fontsize=8.5, ha='left', va='bottom',
                         arrowprops={'arrowstyle': '-', 'color': FORMS['vision'][2], 'lw': 0.8})
        axes[1].set_ylim(low * 0.994, high * 1.016)

    shown = {plain(form)[0] for form in log.forms('reconstruction', 'lm')}
    handles = [plt.Line2D([], [], color=colour, marker='o', ms=5, label=name)
               for kind, (_, name, colour) in FORMS.items() if kind in shown]
    if any(form.endswith(f'_{2 * log.steps}_steps') for _, form in log.val):
        handles.append(plt.Line2D([], [], color=GREY, marker='o', mfc='white', ms=5, lw=0, label='twice the steps'))
    handles.append(plt.Line2D([], [], lw=0, label='dot: one seed; line and number: mean'))
    figure.legend(handles=handles, frameon=False, loc='outside lower center', ncols=min(4, len(handles)), fontsize=8.5)
    for ax, wanted in zip(axes, labels):
        place_labels(ax, wanted)
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description='Print the tables of the comparison and draw its picture.')
    parser.add_argument('log', type=Path, help='merged log, or the folder that results/compare.py trained into')
    parser.add_argument('--merge', type=Path, metavar='FILE', help='write the merged log to this .jsonl file first')
    args = parser.parse_args()
    lines, path = read_lines(args.log), args.log
    if args.merge:
        args.merge.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        path = args.merge
    log = Log(lines)
    print(*main_table(log), '', *more_tables(log), sep='\n')
    picture(log, path.with_suffix('.png') if path.suffix else f'{path}.png')


if __name__ == '__main__':
    main()
