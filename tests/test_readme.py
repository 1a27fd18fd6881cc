"""What the README promises and no run is needed to check: commands parse, names exist, no machine shows."""
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from configurator import configure  # noqa: E402
from model import GPTConfig  # noqa: E402
from nanoblocks.experiments import sweep  # noqa: E402

README = ROOT / 'README.md'
TEXT = README.read_text(encoding='utf-8') if README.exists() else ''
FENCE = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.M | re.S)
PYTHON = ('python', 'python3', 'torchrun')


def commands(text):
    """Every command of every fenced block that starts with python or torchrun, as a list of words."""
    found = []
    for language, block in FENCE.findall(text):
        if language not in ('', 'sh', 'bash', 'shell', 'console'):
            continue
        for line in re.sub(r'\\\n', ' ', block).splitlines():
            parts = [[]]
            lexer = shlex.shlex(re.sub(r'^\s*[$>] ', '', line), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for word in lexer:
                parts = parts + [[]] if set(word) <= set('&|;') else [*parts[:-1], parts[-1] + [word]]
            for words in parts:
                # VARIABLE=value in front of a command
                while words and re.match(r'[A-Z_]+=', words[0]):
                    words = words[1:]
                if words and words[0] in PYTHON:
                    found.append(words)
    return found


def script_of(words):
    """(script, its arguments) of a command; script is None for python -m or -c."""
    words = words[1:]
    while words and words[0].startswith('-'):
        if words[0] in ('-m', '-c'):
            return None, words[1:]
        words = words[1:]
    return words[0], words[1:]


def settings_of(path):
    """({setting: default}, whether it takes model flags, its topics); None if it does not call configure."""
    settings, topics = {}, []
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == 'configure':
                return settings, 'GPTConfig' in ast.unparse(call), topics
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if target == 'TOPICS':
                topics = [key.value for key in node.value.keys]
            try:
                settings[target] = ast.literal_eval(node.value)
            except ValueError:
                pass  # no plain value, so no setting
    return None


def check(words):
    """AssertionError or SystemExit, with a sentence, when a command of the README cannot be what it says."""
    script, args = script_of(words)
    if script is None:
        assert args[0] in ('pytest', 'venv'), f'python -m {args[0]} is not known to this test'
        return
    path = ROOT / script
    assert path.is_file(), f'{script} does not exist'
    known = None if script.startswith('data/') else settings_of(path)
    if known is None:
        done = subprocess.run([sys.executable, script, '--help'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f'{script} --help fails: {done.stderr}'
        for arg in args:
            flag = arg.partition('=')[0]
            assert not arg.startswith('-') or flag in done.stdout, f'{script} has no {flag}'
        return
    settings, takes_model_flags, topics = known
    if script == 'ablate.py':
        # budgets would need the dataset
        if not sweep.read_flags(args)[1]['report']:
            sweep.make_plan([*args, '--match=none'])
        return
    if topics:
        assert args and args[0] in topics, f'{script} has no topic {args[:1]}'
        # plot takes the folders of runs
        args = [arg for arg in args[1:] if args[0] != 'plot' or arg.startswith('-')]
    # a script with topics takes the config files of train.py, and the model flags in them
    skip = configurator.settings_of(ROOT / 'train.py') if topics else ()
    model_args = configure(settings, GPTConfig if takes_model_flags else None, args, skip=skip)
    if takes_model_flags:
        GPTConfig(**model_args)


def names(text):
    """Names of files and folders in backticks, outside of fenced blocks."""
    spans = re.findall(r'`([^`\n]+)`', FENCE.sub('', text))
    return sorted({span for span in spans if looks_like_a_path(span)})


def looks_like_a_path(span):
    if not re.fullmatch(r'[\w.<>*-]+(/[\w.<>*-]+)*/?', span) or re.fullmatch(r'\.\w+', span):
        return False
    top, slash, below = span.partition('/')
    ending = re.search(r'\.(py|md|txt|json|jsonl|pt|bin|toml|yml|png|svg)$', span)
    return bool(ending or slash and (below == '' or (ROOT / top).exists()))


def sources():
    apart = {'venv', '.venv', 'tests'}
    return [path for path in ROOT.rglob('*.py') if not apart & set(path.relative_to(ROOT).parts)]


def exists(name):
    """In the repository, or a file that a source writes, which then has its name as a string."""
    pattern = re.sub(r'<[^>]*>', '*', name).rstrip('/')
    if any(ROOT.glob(pattern)):
        return True
    made = not name.endswith(('.py', '.md', '/')) and name.rpartition('/')[2]
    return bool(made) and any(re.search(rf'''['"/]{re.escape(made)}['"]''', path.read_text(encoding='utf-8'))
                              for path in sources())


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_readme_has_commands():
    scripts = {script_of(words)[0] for words in commands(TEXT)}
    assert {'train.py', 'sample.py'} <= scripts, f'README.md shows {scripts}'


@pytest.mark.parametrize('words', commands(TEXT), ids=' '.join)
def test_command_names_files_that_exist_and_flags_that_are_known(words):
    check(words)


@pytest.mark.parametrize('name', names(TEXT))
def test_name_in_backticks_exists(name):
    assert exists(name), f'`{name}` is no file or folder here, and nothing writes it'


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r'\]\(([^)\s#]+)', TEXT) if not re.match(r'https?://', target)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_holds_no_path_of_a_machine():
    absolute = r'(?<![\w.:/])(?:/(?:home|root|Users|work|tmp|mnt|opt|var|usr|workspace)/|[A-Z]:\\)\S*'
    assert re.findall(absolute, TEXT) == []


def test_readme_holds_nothing_unfinished():
    assert not re.findall(r'\b(?:TODO|FIXME|XXX|RESULT_\w+|TBD)\b', TEXT)


@pytest.mark.parametrize('line', [
    'python trian.py', 'torchrun --standalone trian.py', 'python train.py config/llama_smal.py',
    'python train.py --norn=rmsnorm', 'python train.py --norm=batchnorm', 'python train.py --n_layer=two',
    'python sample.py --n_layer=2', 'python sample.py && python sample.py --temprature=1',
    'X=1 python train.py --unknown=1', 'python data/txt/prepare.py',
    'python data/text/prepare.py --inptu=x --name=mine', 'python bench.py stpe', 'python -m pytst',
    'python ablate.py config/llama_small.py', 'python ablate.py config/llama_small.py --vary="nrom=layernorm"',
])
def test_a_wrong_command_would_be_seen(line):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        for words in commands(f'```sh\n$ {line}\n```'):
            check(words)


def test_a_wrong_name_would_be_seen():
    text = ('`modle.py` `model.py` `config/llama_smal.py` `config/<family>_small.py` `kernels/` `kernel/` '
            '`last.pt` `ckpt.pt` `data/nothing` `tokens/s`')
    assert [name for name in names(text) if not exists(name)] == [
        'config/llama_smal.py', 'data/nothing', 'kernel/', 'last.pt', 'modle.py']
