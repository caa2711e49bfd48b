"""What the README says about the code is so: its size, the flags in its commands, its links."""
import ast
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter

import pytest
import data
import eval as evaluation
import render
import train
from conftest import ROOT
from encoders import ENCODERS, settings_of

README = (ROOT / 'README.md').read_text(encoding='utf-8')
FILES = ('render.py', 'encoders.py', 'decoder.py', 'data.py', 'load_deepseek.py', 'train.py', 'eval.py')
PROGRAMS = {'train.py': train, 'eval.py': evaluation, 'data.py': data, 'render.py': render}
FORK = set(ENCODERS) != {'text', 'meanpool', 'conv1d_residual', 'vision'}   # with a compressor of its own, the size is its own affair
TOKENS, A_LINE, A_LINE_IN_A_FILE, ABOVE_20, CODE_LINES, LINES, README_LINES = 16_645, 10.0, 12.0, 0.10, 1_760, 2_410, 150

def density(source):
    """Tokens of each line of code: names, operators, numbers and strings; docstrings and comments do not count."""
    counts, docstrings, depth = Counter(), set(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]                  # from Python 3.12 on an f-string comes in pieces, and counts as one
        if token.start[0] not in docstrings and depth == 0 and kind in ('NAME', 'OP', 'NUMBER', 'STRING', 'FSTRING_START'):
            counts[token.start[0]] += 1
        depth += (kind == 'FSTRING_START') - (kind == 'FSTRING_END')
    return list(counts.values())

def test_density_counts_as_it_should():
    assert density('"""A module\n\nof lines."""\nimport a   # why\n\n# no\ndef f():\n    """Doc."""\n    return a.b(\n        f"{1 + 1}")\n') == [2, 5, 5, 2]

@pytest.mark.skipif(FORK, reason='a fork')
def test_one_thought_a_line():
    sources = {name: (ROOT / name).read_text(encoding='utf-8') for name in FILES}
    tokens = {name: density(source) for name, source in sources.items()}
    every = [n for counts in tokens.values() for n in counts]
    lines = [line for source in sources.values() for line in source.splitlines()]
    assert f'{len(every):,} lines of code, {len(lines):,} in all, {sum(every) / len(every):.1f} tokens a line' in ' '.join(README.split()), 'update README.md'
    assert sum(every) <= TOKENS and len(every) <= CODE_LINES and len(lines) <= LINES
    assert sum(every) / len(every) <= A_LINE and sum(n > 20 for n in every) / len(every) <= ABOVE_20
    assert {name for name, counts in tokens.items() if sum(counts) / len(counts) > A_LINE_IN_A_FILE} == set()
    assert [line for line in lines if len(line) > 100] == []
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name != 'main':
                assert node.end_lineno - node.lineno < 80, node.name

def test_the_readme_is_short():
    assert len(README.splitlines()) <= README_LINES

def flags_of(program, capsys):
    with pytest.raises(SystemExit):
        (program.parse_args if program is train else program.main)(['--help'])
    return set(re.findall(r'--[\w-]+', capsys.readouterr().out)) - {'--help', '--flag'}

def test_flags(capsys):
    """Every flag in a command of the README or of a file's docstring exists; every setting of an encoder is a flag with a help text."""
    known = {name: flags_of(program, capsys) for name, program in PROGRAMS.items()}
    settings = {name for encoder in ENCODERS.values() for name in settings_of(encoder)}
    assert {f'--{name}' for name in settings} <= known['train.py']
    for encoder in ENCODERS.values():
        for name in settings_of(encoder):
            assert re.search(rf'\b{name}: \w', encoder.__doc__), (encoder, name)
    texts = [README] + [(ROOT / name).read_text(encoding='utf-8').split('"""')[1] for name in PROGRAMS]
    own = set(re.findall(r'\*, (\w+): ', README))                           # the setting of the compressor that the README adds
    for text in texts:
        for name, rest in re.findall(r'(?:python3?|uv run|torchrun)[^\n]*? (\w+\.py)([^\n]*)', text.replace('\\\n', ' ')):
            if name in known:
                unknown = set(re.findall(r'(?<!\w)--[a-z][\w-]+', rest.split('#')[0])) - known[name] - {f'--{setting}' for setting in own}
                assert not unknown, (name, rest)

@pytest.mark.parametrize('log', sorted((ROOT / 'results').glob('comparison*.jsonl')), ids=lambda path: path.stem)
def test_the_tables_of_a_comparison_are_those_of_its_log(log):
    import comparison_report
    told = [line for name in ('README.md', 'LOG.md') for line in (ROOT / 'results' / name).read_text(encoding='utf-8').splitlines()]
    log = comparison_report.Log(comparison_report.read_lines(log))
    lines = [*comparison_report.main_table(log), *comparison_report.more_tables(log)]
    assert len(lines) > 5 and not [line for line in lines if line not in told]

def test_a_merged_log_is_read_as_the_folder_of_its_runs(monkeypatch, tmp_path, capsys):
    """Two seeds of two rows, with the loss by position; a perplexity is the mean over seeds, with their range."""
    import comparison_report
    for seed, name, losses in ((0, 'lm_perceiver_16', [1.5, 1.4]), (1, 'lm_perceiver_16', [1.5, 1.2]), (0, 'lm_no_context', [1.6, 1.5]),
                               (0, 'reconstruction_frozen_vision_256', [1.5, 0.1])):
        run = tmp_path / 'out' / f'seed{seed}' / name
        run.mkdir(parents=True)
        lines = [{'step': step, 'val_loss': loss, 'tokens_per_s': 1.0} for step, loss in zip((1000, 2000), losses)]
        (run / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    by_position = {'run': 'lm_no_context', 'seed_folder': 'seed0', 'first_16': 2.0, 'next_48': 1.5, 'rest': 1.4, 'all': 1.5, 'positions': [1.5]}
    (tmp_path / 'out' / 'by_position.jsonl').write_text(json.dumps(by_position) + '\n')
    merged = tmp_path / 'own.jsonl'
    monkeypatch.setattr(sys, 'argv', ['comparison_report.py', str(tmp_path / 'out'), '--merge', str(merged)])
    comparison_report.main()
    printed = capsys.readouterr().out
    assert '| perceiver, 16 vectors | 18 | 7.11 |  | 3.669 (3.320 to 4.055) | 0.200 |' in printed
    assert '| vision, 256 pixels, encoder frozen | 22 | 5.82 | 1.105 |  |  |' in printed
    assert '| no context | 1 | 2.000 | 1.500 | 1.400 | 1.500 |' in printed
    assert 'tokens_per_s' not in merged.read_text() and (tmp_path / 'own.png').exists()
    monkeypatch.setattr(sys, 'argv', ['comparison_report.py', str(merged)])
    comparison_report.main()
    assert capsys.readouterr().out == printed

@pytest.mark.parametrize('file', ['README.md', 'results/README.md', 'results/LOG.md', 'results/reader/README.md'])
def test_links(file):
    text = (ROOT / file).read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text):
        path, _, heading = ''.join(target).partition('#')
        if path.startswith('https://'):
            continue
        path = (ROOT / file).parent / path if path else ROOT / file
        assert path.exists(), target
        if heading:
            headings = [re.sub(r'[^\w -]', '', line.lstrip('# ').lower()).replace(' ', '-') for line in path.read_text().splitlines() if line.startswith('#')]
            assert heading in headings, target

@pytest.mark.parametrize('script', sorted([*(ROOT / 'results').glob('*.py'), *(ROOT / 'examples').glob('*.py')]), ids=lambda path: path.stem)
def test_every_script_still_imports_what_it_needs(monkeypatch, script):
    monkeypatch.setattr('sys.argv', ['x'])
    importlib.import_module(script.stem)

def test_results_are_few_files():
    files = [path for path in (ROOT / 'results').rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    assert len(files) <= 40

@pytest.mark.skipif(FORK, reason='a fork')
def test_the_diff_that_adds_a_compressor(tmp_path):
    diff = re.search(r'```diff\n(.*?)```', README, re.DOTALL)[1]
    regime = re.search(r"^\+.*'(\w+)': \w+", diff, re.MULTILINE)[1]
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / 'a.diff').write_text(diff, encoding='utf-8')
    subprocess.run(['git', 'apply', 'a.diff'], cwd=tmp_path, check=True)
    command = [sys.executable, 'train.py', '--regime', regime, '--steps', '2', '--context', '32', '--continuation', '32', '--data', 'encoders.py']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f'out/{regime}: {regime}' in done.stdout, done.stderr
