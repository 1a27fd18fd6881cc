"""
What README.md, docs/ and results/README.md promise and no training is needed to check: commands parse, names
and links exist, tables say what the code says, no machine shows.
"""
import ast
import csv
import functools
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from configurator import configure  # noqa: E402
from model import GPTConfig  # noqa: E402
from nanoblocks.experiments import recipes, sweep, tables  # noqa: E402

PATHS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'results' / 'README.md',
         *sorted((ROOT / 'results').glob('*/README.md'))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in PATHS}
README, RESULTS = PAGES['README.md'], PAGES['results/README.md']
FENCE = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.M | re.S)
PYTHON = ('python', 'python3', 'torchrun')
# one runs the main job and one the tests: others rely on these two lines
SETUP = ('pip install -r requirements.txt && python train.py config/llama_small.py config/tiny.py '
         '&& python sample.py --out_dir=out/llama_small',
         'pip install -r requirements-dev.txt && python -m pytest')


def every_page(test):
    return pytest.mark.parametrize('page', PAGES)(test)


# ----------------------------------------------------------------------------------------------------------
# Commands


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
        if words[0] == '-m' and words[1].startswith('nanoblocks.'):
            return words[1].replace('.', '/') + '.py', words[2:]
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


@functools.cache
def help_of(script):
    done = subprocess.run([sys.executable, script, '--help'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f'{script} --help fails: {done.stderr}'
    return done.stdout


def check(words):
    """AssertionError or SystemExit, with a sentence, when a command of a page cannot be what it says."""
    script, args = script_of(words)
    if script is None:
        assert args[0] in ('pytest', 'venv'), f'python -m {args[0]} is not known to this test'
        return
    path = ROOT / script
    assert path.is_file(), f'{script} does not exist'
    known = None if script.startswith('data/') else settings_of(path)
    if known is None:
        for arg in args:
            flag = arg.partition('=')[0]
            assert not arg.startswith('-') or flag in help_of(script), f'{script} has no {flag}'
        return
    settings, takes_model_flags, topics = known
    if script == 'ablate.py':
        # budgets would need the dataset
        if not sweep.read_flags(args)[1]['report']:
            sweep.make_plan([*args, '--match=none'])
        return
    if topics:
        assert args and args[0] in topics, f'{script} has no topic {args[:1]}'
        # these take folders
        args = [arg for arg in args[1:] if args[0] not in ('plot', 'recipes') or arg.startswith('-')]
    # a script with topics takes the config files of train.py, and the model flags in them
    skip = configurator.settings_of(ROOT / 'train.py') if topics else ()
    model_args = configure(settings, GPTConfig if takes_model_flags else None, args, skip=skip)
    if takes_model_flags and settings.get('init_from') == 'resume':
        # the other flags are those of the run, which is named after its config
        model_args = tables.flags_of_config(Path(settings['out_dir']).name) | model_args
    if takes_model_flags:
        GPTConfig(**model_args)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_readme_has_the_two_commands_of_the_setup():
    lines = [line for _, block in FENCE.findall(README) for line in block.splitlines()]
    assert [line for line in lines if '&&' in line] == list(SETUP)


COMMANDS = {shlex.join(words): words for page in PAGES.values() for words in commands(page)}


@pytest.mark.parametrize('words', COMMANDS.values(), ids=COMMANDS)
def test_command_names_files_that_exist_and_flags_that_are_known(words):
    check(words)


def test_every_table_of_results_has_its_command():
    for title, section in re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', RESULTS, re.M | re.S):
        assert commands(section), f'{title} does not say what made it'


@pytest.mark.parametrize('line', [
    'python trian.py', 'torchrun --standalone trian.py', 'python train.py config/llama_smal.py',
    'python train.py --norn=rmsnorm', 'python train.py --norm=batchnorm', 'python train.py --n_layer=two',
    'python sample.py --n_layer=2', 'python sample.py && python sample.py --temprature=1',
    'X=1 python train.py --unknown=1', 'python data/txt/prepare.py',
    'python data/text/prepare.py --inptu=x --name=mine', 'python bench.py stpe', 'python -m pytst',
    'python ablate.py config/llama_small.py',
    'python ablate.py config/llama_small.py --vary="nrom=layernorm"',
])
def test_a_wrong_command_would_be_seen(line):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        for words in commands(f'```sh\n$ {line}\n```'):
            check(words)


# ----------------------------------------------------------------------------------------------------------
# Names and links


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


@pytest.mark.parametrize('page, name', [(page, name) for page, text in PAGES.items() for name in names(text)])
def test_name_in_backticks_exists(page, name):
    assert exists(name), f'`{name}` in {page} is no file or folder here, and nothing writes it'


def test_a_wrong_name_would_be_seen():
    text = ('`modle.py` `model.py` `config/llama_smal.py` `config/<family>_small.py` `kernels/` `kernel/` '
            '`last.pt` `ckpt.pt` `data/nowhere_at_all` `tokens/s`')
    assert [name for name in names(text) if not exists(name)] == [
        'config/llama_smal.py', 'data/nowhere_at_all', 'kernel/', 'last.pt', 'modle.py']


def anchors(text):
    """The targets that a page's headings make, as GitHub spells them."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', text), re.M)
    return {re.sub(r'[^\w\- ]', '', heading).strip().lower().replace(' ', '-') for heading in headings}


def broken_links(page, text):
    """The links of a page, to files or headings, that lead nowhere."""
    for link in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', text)):
        target, _, anchor = link.partition('#')
        path = (ROOT / page).parent / target
        if re.match(r'https?://', link):
            continue
        if not path.exists() or anchor and anchor not in anchors(path.read_text('utf-8') if target else text):
            yield link


@every_page
def test_links_lead_somewhere(page):
    assert list(broken_links(page, PAGES[page])) == []


def test_a_wrong_link_would_be_seen():
    text = ('# A title, too\n[a](#a-title-too) [b](#b) [c](data.md) [d](date.md) '
            '[e](../README.md#map) [f](../README.md#mop)')
    assert list(broken_links('docs/page.md', text)) == ['#b', 'date.md', '../README.md#mop']


def test_every_page_of_docs_is_in_the_map():
    linked = [page for page in PAGES
              if f']({page})' in README or f']({page.removeprefix("results/")})' in RESULTS]
    assert [page for page in PAGES if page not in linked and page != 'README.md'] == []


# ----------------------------------------------------------------------------------------------------------
# Tables


def test_the_table_of_models_is_made_from_config():
    page = PAGES['docs/models.md']
    assert tables.with_table(page) == page, 'run python -m nanoblocks.experiments.tables'


def test_the_table_of_recipes_is_made_from_the_families():
    page = PAGES['docs/recipes.md']
    assert tables.with_table(page, recipes.page()) == page, 'run python -m nanoblocks.experiments.tables'


def rows(text, heading):
    """The cells of every table row under a heading."""
    section = re.search(rf'^## {heading}\n(.*?)(?=^## |\Z)', text, re.M | re.S)[1]
    return [[cell.strip() for cell in line[1:-1].split('|')] for line in section.splitlines()
            if line.startswith('| ')]


def test_flags_of_a_model_give_what_its_config_does():
    models = rows(PAGES['docs/models.md'], 'Published models as flags')[1:]
    train_settings = configurator.settings_of(ROOT / 'train.py')
    for _, name, recipe, _ in models:
        base, _, flags = recipe.partition(' + ')
        base = {label: base for base, label in tables.BASES.items()}.get(base, 'gpt2_small')
        given = [f'--{flag}' for flag in flags.strip('`').split()]
        made = configure({}, GPTConfig, [f'config/{base}.py', *given], skip=train_settings)
        assert GPTConfig(**made) == GPTConfig(**tables.flags_of_config(name.strip('`'))), name
    assert f'and {len(models) - 6} more' in README


def test_the_table_of_flags_has_every_flag_and_every_word():
    words = {f.name: set(map(str, f.metadata['table'] or ())) for f in fields(GPTConfig)}
    told = {}
    for _, *cells in rows(README, 'Flags')[1:] + rows(PAGES['docs/flags.md'], 'By chapter')[1:]:
        flags, values = (re.findall(r'`([^`]+)`', cell) for cell in cells)
        of_flags = set().union(*(words.get(flag, ()) for flag in flags))
        strange = set(flags + values) - words.keys() - of_flags
        assert not strange, f'{strange} are neither flags nor words of {flags}'
        told |= dict.fromkeys([*flags, *(value for value in values if value not in of_flags)], set(values))
    assert words.keys() == told.keys(), words.keys() ^ told.keys()
    for name in words:
        assert words[name] <= told[name], f'{name} lacks {words[name] - told[name]}'


@pytest.mark.parametrize('study', ['ladder', 'blocks'])
def test_differences_in_results_are_those_of_the_reports(study):
    """Loss, interval, training speed and cache of each comparison."""
    def read(name):
        with open(ROOT / 'results' / study / name, encoding='utf-8') as f:
            return list(csv.DictReader(f))
    arms = {arm['arm']: {key: float(arm[key]) for key in ('tokens_per_s', 'cache_bytes_per_token')}
            for arm in read('report.csv')}
    told = {re.split('[:,]', row[0])[0]: row[1:] for row in rows(RESULTS, 'What a block is worth')}
    for line in read('differences.csv'):
        mean, half = float(line['mean']), float(line['half'])
        speed, cache = (arms[line['with']][key] / arms[line['without']][key] for key in arms[line['with']])
        found = f'{mean:+.3f}', f'{mean - half:+.3f} to {mean + half:+.3f}', f'{speed:.2f}', f'{cache:.2f}'
        difference, *costs = told[line['flag']]
        assert [difference.replace('*', '').removesuffix(': not resolved'), *costs] == [
            f'{found[0]}, {found[1]}', f'x {found[2]}', f'x {found[3]}'], line['flag']
        assert ('not resolved' in difference) == (abs(mean) < half), line['flag']


def test_differences_of_states_are_those_of_the_report():
    told = re.search(r'States in the place of attention.*?\n\n', RESULTS, re.S).group()
    with open(ROOT / 'results' / 'mixers' / 'differences.csv', encoding='utf-8') as f:
        for line in csv.DictReader(f):
            mean, half = float(line['mean']), float(line['half'])
            name = line['flag'] if line['flag'] != 'window' else 'a window of 32 tokens'
            assert f'{name} {mean:+.3f}' in ' '.join(told.split()) and abs(mean) > half, line
    # 3:1 is part of a name
    assert len(re.findall(r' [+-]0\.\d{3}', told)) == 8


def test_the_table_of_caches_is_what_bench_prints(tmp_path):
    done = subprocess.run([sys.executable, 'bench.py', 'cache', f'--figures={tmp_path}'], capture_output=True,
                          text=True)
    printed = [re.findall(r'\d+\.\d{3}', line) for line in done.stdout.splitlines()]
    assert [row[1:] for row in rows(RESULTS, 'What a cache costs')[1:]] == [line for line in printed if line]


# ----------------------------------------------------------------------------------------------------------
# What a reader must not meet


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12 * 1024


@every_page
def test_page_is_short_enough_to_read(page):
    assert len(PAGES[page].splitlines()) <= 200


@every_page
def test_page_holds_no_path_of_a_machine(page):
    absolute = r'(?<![\w.:/])(?:/(?:home|root|Users|work|tmp|mnt|opt|var|usr|workspace)/|[A-Z]:\\)\S*'
    assert re.findall(absolute, PAGES[page]) == []


@every_page
def test_page_holds_nothing_unfinished(page):
    assert not re.findall(r'\b(?:TODO|FIXME|XXX|RESULT_\w+|TBD)\b', PAGES[page])
