"""The worked example of CONTRIBUTING.md: its code, put into a copy of the repository, works as it says."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)
COPIED = ('model.py', 'configurator.py', 'train.py', 'kernels', 'config', 'data', 'nanoblocks', 'tests')


def edit(path, before, after):
    """Replace the one place where a file has this text."""
    text = path.read_text(encoding='utf-8')
    assert text.count(before) == 1, f'{path.name} has {text.count(before)} places with {before!r}'
    path.write_text(text.replace(before, after), encoding='utf-8')


@pytest.fixture
def copy(tmp_path):
    """The repository with the block that CONTRIBUTING.md adds."""
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns('*.bin', '*.tmp', '__pycache__'))
        else:
            shutil.copy(source, target)
    chapter, word, parents, config, row = BLOCKS
    model, conftest = tmp_path / 'model.py', tmp_path / 'tests' / 'conftest.py'
    rule = '# ' + '=' * 106
    edit(model, f'{rule}\n# Part III', f'{chapter}\n\n{rule}\n# Part III')
    edit(model, '\nFFN = {\n', f'\nFFN = {{\n{word}')
    group = re.search(r'(\w+), Flags\):', parents)[1]
    edit(model, ', Flags):\n', f', {group}, Flags):\n')
    (tmp_path / 'config' / 'polyrelu_small.py').write_text(config, encoding='utf-8')
    edit(conftest, "    'ffn': Field((", f"{row}    'ffn': Field(('polyrelu', ")
    return tmp_path


def python(folder, *args):
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_the_worked_example_passes_the_tests_that_it_names(copy):
    tests = [f'tests/test_{name}.py' for name in ('flags', 'cache', 'promises')]
    _, out = python(copy, '-m', 'pytest', '-q', '-k', 'poly or values_for', *tests)
    failed = re.findall(r'^FAILED \S+::(\S+)', out, re.M)
    assert failed == ['test_a_seed_draws_the_weights_it_always_drew[polyrelu_small]'], out
    assert 'a new config: add "polyrelu_small": {"weights"' in out
    assert int(re.search(r'(\d+) passed', out)[1]) > 10, out


def test_the_worked_example_shows_in_help_and_refuses_in_a_sentence(copy):
    code, out = python(copy, 'train.py', '--help')
    assert code == 0 and 'PolyReLU (only when ffn=polyrelu and' in out
    assert re.search(r'--poly_order=3 +highest power of the activation', out)
    for flags, message in (('poly_order=2', 'poly_order=2 must be left out unless ffn=polyrelu'),
                           ('ffn="polyrelu", poly_order=0', 'poly_order=0 must be at least 1')):
        code, out = python(copy, '-c', f'from model import GPTConfig; GPTConfig({flags})')
        assert code == 1 and out.strip().endswith(f'ValueError: {message}'), out


def test_the_worked_example_equals_its_formula(copy):
    code, out = python(copy, '-c', '''
import torch
from model import GPT, GPTConfig
act = GPT(GPTConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=64, ffn='polyrelu', poly_order=3)).h[0].ffn.act
assert torch.equal(act.weight, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))
act.weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
x = torch.linspace(-2, 2, 9)
r = x.relu()
torch.testing.assert_close(act(x), 0.1 + 0.2 * r + 0.3 * r ** 2 + 0.4 * r ** 3)
''')
    assert code == 0, out
