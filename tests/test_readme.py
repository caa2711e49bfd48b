"""What the README says about the code is so: its size, the flags in its commands, its links."""
import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize

import pytest
import data
import eval as evaluation
import load_deepseek
import render
import train
from conftest import ROOT
from encoders import ENCODERS, settings_of

README = (ROOT / 'README.md').read_text(encoding='utf-8')
FILES = ('render.py', 'encoders.py', 'decoder.py', 'data.py', 'load_deepseek.py', 'train.py', 'eval.py')
PROGRAMS = {'train.py': train, 'eval.py': evaluation, 'data.py': data, 'render.py': render, 'load_deepseek.py': load_deepseek}
FORK = set(ENCODERS) != {'text', 'meanpool', 'conv1d_residual', 'vision'}   # with a compressor of its own, the size is its own affair
CODE_LINES, LINES, README_LINES = 1_256, 1_675, 180


def code_lines(source):
    """Lines that are not blank, not comment and not docstring."""
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_code_lines_are_counted_as_they_should():
    assert code_lines('"""A module\n\nof lines."""\nimport a   # why\n\n# no\ndef f():\n    """Doc."""\n    x = """not\n    doc"""\n    return (\n        1)\n') == 6


@pytest.mark.skipif(FORK, reason='a fork')
def test_size():
    sources = [(ROOT / name).read_text(encoding='utf-8') for name in FILES]
    code, lines = sum(map(code_lines, sources)), sum(len(source.splitlines()) for source in sources)
    told = f'{code:,} lines of code, {lines:,} lines in all'
    assert told in README and code <= CODE_LINES and lines <= LINES, f'{told}: update README.md'
    assert not [line for source in sources for line in source.splitlines() if len(line) > 120]
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name != 'main':
                assert node.end_lineno - node.lineno < 50, node.name


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


def test_the_tables_of_the_comparison_are_those_of_its_logs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'results')
    import grid_report
    text = (ROOT / 'results' / 'README.md').read_text(encoding='utf-8').splitlines()
    lines = list(grid_report.tables(grid_report.read_logs(ROOT / 'results' / 'grid')))
    assert len(lines) > 20 and not [line for line in lines if line not in text]


def test_links():
    for target in re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', README):
        target = ''.join(target)
        assert target.startswith('https://') or (ROOT / target).exists(), target


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
