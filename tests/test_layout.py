"""Layout: imports go one way, names that clash do no harm, files stay short, pip can install it."""
import ast
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import own_module  # noqa: E402
from nanoblocks import hardware  # noqa: E402

SKIPPED = {'tests', 'venv', '.venv', 'out', 'build'}
SOURCES = [path for path in sorted(ROOT.rglob('*.py')) if not SKIPPED & set(path.relative_to(ROOT).parts)]
# Each may import those before it while it is itself imported, apart from EXCEPTIONS.
CHAIN = ('configurator', 'kernels', 'model', 'data', 'nanoblocks', 'nanoblocks.training',
         'nanoblocks.pretrained', 'nanoblocks.decoding', 'nanoblocks.experiments', 'train', 'sample',
         'ablate', 'bench', 'config')
COMMANDS = {'train', 'sample', 'ablate', 'bench'}
EXCEPTIONS = {'kernels': {'configurator'}, 'data': {'kernels', 'model'}, 'config': set(CHAIN),
              'sample': COMMANDS, 'ablate': COMMANDS, 'bench': COMMANDS}
MAY_IMPORT = {name: set(CHAIN[:place]) - EXCEPTIONS.get(name, set()) for place, name in enumerate(CHAIN)}


def name_of(path):
    """The module of a file: kernels.rope, and kernels for kernels/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in SOURCES}


def package_of(module):
    """The row of MAY_IMPORT that a module is in; None for a module from elsewhere."""
    parts = module.split('.')
    return next((name for name in ('.'.join(parts[:2]), parts[0]) if name in MAY_IMPORT), None)


def imports(source, module='', is_package=False, lazy=False):
    """
    The modules that a source imports when it is imported, or with lazy=True when its functions run.
    `from a import b` counts as a.b if that is a module of this repository, else as a.
    """
    def walk(node, in_function=False):
        for child in ast.iter_child_nodes(node):
            yield child, in_function
            yield from walk(child, in_function or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    found = set()
    for node, in_function in walk(ast.parse(source)):
        if in_function != lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = module.split('.')
                parents = parts[:len(parts) + is_package - node.level]
                base = '.'.join([*parents, *filter(None, [base])])
            names = {f'{base}.{alias.name}' for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'own_module':
            found.add(node.args[0].value if isinstance(node.args[0], ast.Constant) else '')
    return found


def imports_of(module, lazy=False):
    path = MODULES[module]
    return imports(path.read_text(encoding='utf-8'), module, path.name == '__init__.py', lazy)


def python(code, cwd=ROOT):
    """What a fresh Python prints that runs this code."""
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------------------------
# Imports


def test_importing_the_model_loads_kernels_and_configurator_alone():
    loaded = {name.split('.')[0] for name in python('import sys, model; print(*sys.modules)').split()}
    ours = {name.split('.')[0] for name in MODULES} & loaded
    assert ours == {'model', 'kernels', 'configurator'}
    assert not loaded & {'wandb', 'datasets', 'tiktoken', 'transformers', 'safetensors', 'matplotlib'}


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_one_way(module):
    here = package_of(module)
    wrong = {package_of(name) for name in imports_of(module)} - {None, here} - MAY_IMPORT[here]
    assert not wrong, f'{module} must not import {", ".join(sorted(wrong))}'


def test_the_model_and_the_kernels_have_no_other_doors_than_two():
    doors = {package_of(name) for module in MODULES if package_of(module) in ('model', 'kernels')
             for name in imports_of(module, lazy=True)}
    assert doors <= {None, 'kernels', 'configurator', 'nanoblocks', 'nanoblocks.pretrained',
                     'nanoblocks.decoding'}


def test_kernels_and_data_import_their_neighbours_by_relative_imports():
    """So that they work under another name too (see configurator.own_module)."""
    for module, path in MODULES.items():
        package = module.split('.')[0]
        if package in ('kernels', 'data') and path.name != 'prepare.py':
            text = path.read_text(encoding='utf-8')
            assert not re.search(rf'^ *(from|import) {package}\b', text, re.M), path


LIBRARY = ('nanoblocks', 'nanoblocks.training', 'nanoblocks.decoding', 'nanoblocks.pretrained')


@pytest.mark.parametrize('module', [module for module in MODULES if package_of(module) in LIBRARY])
def test_what_a_notebook_may_import_takes_our_own_data_and_kernels(module):
    text = MODULES[module].read_text(encoding='utf-8')
    assert not re.search(r'^ *(from|import) (data|kernels)\b', text, re.M), (
        f'{module} must say `from nanoblocks.tokenizer import ...` or `from model import ops`')


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imports_of(module) & MODULES.keys() for module in MODULES}
    while free := [module for module, needs in graph.items() if not needs & (graph.keys() - {module})]:
        graph = {module: needs for module, needs in graph.items() if module not in free}
    # a package's __init__.py is run before its modules, which is no circle
    left = {module: sorted(needs & graph.keys()) for module, needs in graph.items()}
    assert not left, f'these import each other: {left}'


def test_a_wrong_import_would_be_seen():
    assert imports('import kernels.rope') == {'kernels.rope'}
    assert imports('from nanoblocks import hardware, nothing') == {'nanoblocks.hardware', 'nanoblocks'}
    assert imports('if x:\n    from model import GPT') == {'model'}
    assert imports('def f():\n    import model') == set()
    assert imports('class A:\n    def f():\n        import model', lazy=True) == {'model'}
    assert imports('from . import rope\nfrom .common import jit', 'kernels', True) == {
        'kernels.rope', 'kernels.common'}
    assert imports('from .common import jit\nfrom . import rope', 'kernels.ssd') == {
        'kernels.rope', 'kernels.common'}
    assert imports('from ..layouts import same', 'nanoblocks.pretrained.families', True) == {
        'nanoblocks.pretrained.layouts'}
    assert imports("tokenizer = own_module('data.tokenizer')") == {'data.tokenizer'}
    assert package_of('nanoblocks.training.optim') == 'nanoblocks.training'
    assert package_of('nanoblocks.files') == 'nanoblocks' and package_of('torch.nn') is None


# ----------------------------------------------------------------------------------------------------------
# Names that clash

FORWARD = '''
import torch
from model import GPT, GPTConfig, ops
model = GPT(GPTConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=64, block_size=16))
x = torch.zeros(1, 4, dtype=torch.long)
assert model(x, x)[1].isfinite() and ops.rms_norm
'''


@pytest.fixture
def theirs(tmp_path):
    """A folder with packages named kernels and data that are not ours, with modules named as ours are."""
    for name in ('kernels', 'data'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('theirs = True\n')
        for module in ('common', 'tokenizer', 'writer', 'rms_norm'):
            (tmp_path / name / f'{module}.py').write_text('theirs = True\n')
    return tmp_path


def test_the_model_runs_beside_another_package_named_kernels_that_came_first(theirs):
    code = f'import sys, kernels, kernels.common\nsys.path.insert(0, {str(ROOT)!r})\n{FORWARD}' + '''
assert kernels.theirs and sys.modules['kernels'] is kernels and sys.modules['kernels.common'].theirs
print(ops.__name__, ops.rms_norm.__wrapped__.__module__)
'''
    assert python(code, theirs) == 'nanoblocks_kernels nanoblocks_kernels.rms_norm'


def test_the_model_runs_where_another_package_named_kernels_is_found_first(theirs):
    code = f'import sys\nsys.path.append({str(ROOT)!r})\n{FORWARD}import kernels\nassert kernels.theirs\n'
    python(code, theirs)


def test_nanoblocks_runs_beside_another_package_named_data(theirs):
    for order in ('insert(0, ', 'append('):
        code = f'import sys, data, data.tokenizer\nsys.path.{order}{str(ROOT)!r})\n' + '''
from nanoblocks import pretrained
from nanoblocks.decoding import session
from nanoblocks.tokenizer import ByteTokenizer, from_meta
from nanoblocks.training import checkpoint, logbook
assert from_meta({'kind': 'bytes'}).decode([104, 105]) == 'hi'
assert data.theirs and sys.modules['data.tokenizer'].theirs
'''
        python(code, theirs)


def test_our_own_packages_are_imported_under_their_own_names():
    import data.tokenizer
    import kernels
    import model
    import nanoblocks.tokenizer
    assert model.ops is kernels is own_module('kernels')
    assert nanoblocks.tokenizer is data.tokenizer is own_module('data.tokenizer')


def test_own_module_takes_a_module_without_a_spec_for_another(tmp_path):
    code = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules['kernels'] = type(sys)('kernels')
from configurator import own_module
print(own_module('kernels').__name__, own_module('kernels').rms_norm.__wrapped__.__module__)
"""
    # in a process of its own: operators registered twice leave the first ones without a schema
    assert python(code, tmp_path) == 'nanoblocks_kernels nanoblocks_kernels.rms_norm'


def setuptools_reads_pyproject():
    try:
        return int(version('setuptools').split('.')[0]) >= 77 and find_spec('pip')
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not setuptools_reads_pyproject(), reason='needs pip and setuptools>=77')
def test_pip_installs_it_for_every_folder(tmp_path, theirs):
    """pip install -e . without network: into an environment that sees the packages of this one."""
    repo, env = tmp_path / 'repo', tmp_path / 'env'
    left_out = '.git', 'out', 'wandb', 'venv', '.venv', '*.bin', '*.tmp', '__pycache__'
    shutil.copytree(ROOT, repo, ignore=shutil.ignore_patterns(*left_out))
    venv.create(env)
    bin, = [env / name for name in ('bin', 'Scripts') if (env / name).exists()]
    site, = env.rglob('site-packages')
    (site / 'this.pth').write_text('\n'.join(path for path in sys.path if path.endswith('site-packages')))
    pip = [bin / 'python', '-m', 'pip', 'install', '-q', '--no-build-isolation', '--no-deps', '-e', repo]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tests = {tmp_path / 'empty': 'import model, kernels, data.tokenizer, nanoblocks.pretrained, configurator',
             theirs: 'import data, model, nanoblocks.pretrained; assert data.theirs'}
    for folder, code in tests.items():
        folder.mkdir(exist_ok=True)
        code += f'\nassert model.__file__ == {str(repo / "model.py")!r}\n{FORWARD}'
        done = subprocess.run([bin / 'python', '-c', code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------
# Sizes, versions


@pytest.mark.parametrize('script', ['train', 'sample', 'ablate', 'bench', 'data/text/prepare'])
def test_a_script_finds_its_neighbours_under_a_safe_path(script, tmp_path):
    """`python -P` and PYTHONSAFEPATH leave the folder of a script out of sys.path."""
    done = subprocess.run([sys.executable, '-P', ROOT / f'{script}.py', '--help'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage: python'), done.stderr


def test_the_first_reading_of_the_model_is_an_evening():
    """The docstring, Part I and Part III; Part II is read when wanted."""
    lines = (ROOT / 'model.py').read_text(encoding='utf-8').splitlines()
    second, third = (next(n for n, line in enumerate(lines) if line.startswith(f'# {part}:'))
                     for part in ('Part II', 'Part III'))
    assert second < third and second + len(lines) - third <= 850


def test_six_python_files_lie_on_the_ground():
    assert {path.stem for path in ROOT.glob('*.py')} == COMMANDS | {'model', 'configurator'}


@pytest.mark.parametrize('path', [path for path in SOURCES if path.name != 'model.py'],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_but_the_model_needs_much_scrolling(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 560


def project():
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@pytest.mark.parametrize('number, warns', [('2.10.2', True), ('2.11.0', False), ('2.13.0+cpu', False),
                                            ('2.15.1', False), ('2.16.0a0+git', True), ('3.0.0', True)])
def test_a_version_of_torch_that_is_not_tested_gets_one_line_of_warning(monkeypatch, capsys, number, warns):
    monkeypatch.setattr(torch, '__version__', number)
    hardware.warn_of_torch_version()
    monkeypatch.setenv('RANK', '1')
    hardware.warn_of_torch_version()
    err = capsys.readouterr().err
    assert err == (f'warning: torch {number} is not one of 2.11 to 2.15, with which this code is tested\n'
                   if warns else '')
    oldest, newest = hardware.TORCH_VERSIONS
    assert f'torch>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}' in project()['dependencies']


def test_what_is_pinned_is_what_the_project_allows():
    """requirements.txt, the tested set-up, names every dependency of the project and of its extras."""
    def names(lines):
        return {re.match(r'[\w-]+', line)[0] for line in lines if re.match(r'\w', line)}
    pinned = names((ROOT / 'requirements.txt').read_text().splitlines())
    pinned_dev = names((ROOT / 'requirements-dev.txt').read_text().splitlines())
    extras = project()['optional-dependencies']
    assert names(project()['dependencies'] + extras['data'] + extras['wandb']) == pinned
    assert names(extras['dev']) <= pinned_dev
