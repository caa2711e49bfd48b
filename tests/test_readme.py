"""What the README says about the code is so: files, line counts, flags, links, and the diff that adds a compressor."""
import re
import shutil
import subprocess
import sys

import pytest
import data
import eval as evaluation
import load_deepseek
import render
import train
from conftest import ROOT

README = (ROOT / 'README.md').read_text(encoding='utf-8')
PROGRAMS = {'train.py': train, 'eval.py': evaluation, 'data.py': data, 'render.py': render, 'load_deepseek.py': load_deepseek}


def flags_of(program, capsys):
    with pytest.raises(SystemExit):
        (program.parse_args if program is train else program.main)(['--help'])
    return set(re.findall(r'--[\w-]+', capsys.readouterr().out)) - {'--help', '--flag'}


def test_line_counts():
    rows = re.findall(r'^\| `(\w+\.py)` \| (\d+) \|', README, re.MULTILINE)
    ours = {name: len((ROOT / name).read_text(encoding='utf-8').splitlines()) for name, _ in rows}
    assert {name: int(n) for name, n in rows} == ours and set(ours) == {'encoders.py', 'decoder.py', *PROGRAMS}
    assert f'{sum(ours.values()):,} lines' in README


def test_flags(capsys):
    known = {name: flags_of(program, capsys) for name, program in PROGRAMS.items()}
    table = README[README.index('## The flags'):].split('\n## ')[0]
    asked = {flag for flag in known['train.py'] if not flag.startswith('--no-')} - {'--train-encoder'}
    missing = asked - set(re.findall(r'--[\w-]+', table))
    assert not missing, missing
    assert len({flag for flag in known['train.py'] if not flag.startswith('--no-')}) <= 45
    for line in re.findall(r'^(?:\S+=\S+ )*(?:\.venv/bin/)?(?:python|torchrun)[^\n]*?(\w+\.py)(.*)$', README.replace('\\\n', ' '), re.MULTILINE):
        if line[0] in known:
            unknown = set(re.findall(r'--[\w-]+', line[1].split('#')[0])) - known[line[0]] - {'--keep_every'}
            assert not unknown, line
    everything = set().union(*known.values()) | {'--keep_every', '--nproc_per_node', '--help'}
    assert set(re.findall(r'--[a-z][\w-]+', README)) <= everything


def test_links_and_names():
    for target in re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', README):
        target = ''.join(target)
        assert target.startswith('https://') or (ROOT / target).exists(), target
    for name, symbol in re.findall(r'`(\w+\.py)`, `([\w.]+)`', README):
        source = (ROOT / name).read_text(encoding='utf-8')
        for part in symbol.split('.'):
            assert re.search(rf'(def|class) {part}\b|^{part} = ', source, re.MULTILINE), (name, symbol)


def test_the_diff_that_adds_a_compressor(tmp_path):
    for name in ('encoders.py', 'decoder.py', *PROGRAMS):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / 'a.diff').write_text(re.search(r'```diff\n(.*?)```', README, re.DOTALL)[1], encoding='utf-8')
    subprocess.run(['git', 'apply', 'a.diff'], cwd=tmp_path, check=True)
    command = [sys.executable, 'train.py', '--regime', 'stride', '--keep_every', '8', '--steps', '2', '--context', '32', '--continuation', '32',
               '--data', 'encoders.py']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "stride {'keep_every': 8}" in done.stdout, done.stderr
