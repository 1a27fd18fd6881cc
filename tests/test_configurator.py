"""The command line: which arguments are accepted, the words in which others are refused, and --help."""
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType
from typing import NamedTuple, Optional

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import (  # noqa: E402
    SET,
    Flags,
    configure,
    errors_as_messages,
    flag,
    flags,
    model_flags,
    nearest,
    plain_settings,
    settings_of,
    types_of,
)


@dataclass
class Toy:
    vocab: int                      # tokens known
    # ------------------------------
    # size
    n_layer: int = 12               # blocks
    # the hidden width,
    # of every layer
    width: int | None = None
    window: int | None = None    # tokens seen, # included
    untold: int = None

    # regularisation
    dropout: float = 0.0            # share of activations that are dropped
    cap: float | None = 30.0        # of the logits
    norm: str = 'layernorm'         # layernorm, rmsnorm
    bias: bool = True               # in linear layers
    flash: bool | None = None       # None: where it pays
    made: int = field(default=0, init=False)


SCRIPT = '''"""
Train a toy. Nothing more.

    python toy.py a.py --max_iters=3    # an example

And a last word.
"""
import os
import sys
sys.path.insert(0, ROOT)
from dataclasses import dataclass
from configurator import configure, errors_as_messages, plain_settings

# ------------------------------------------------------------
# Settings

# run
out_dir = 'out'             # where the run goes, with = and # in it
seed = 1337                 # of the weights
# why this one has
# a long explanation
max_iters = 600             # steps
# optimizer
learning_rate = 6e-4        # peak
# smallest rate,
# at the end
min_lr = 6e-5
betas = (0.9,
         0.95)              # not plain, so no setting
name = ('a'
        'b')                # in two lines
resume = None               # checkpoint to go on from
compile: bool | None = None # None: on a GPU
_private = 3                # not a setting
URL = 'https://...'         # not one either


@dataclass
class Model:
    """Flags."""
    n_layer: int = 12       # blocks
    norm: str = 'layernorm' # layernorm, rmsnorm


given = {}
model_args = configure(globals(), Model, given=given)
settings = plain_settings(globals())
later = 3
seed = 0                    # a remark on the second assignment
print(settings | model_args | {'given': given})
'''


def defaults():
    """The globals of a script: seven that are no settings, then eight that are."""
    return {'__file__': '/somewhere/train.py', '_hidden': 1, 'os': sys, 'table': {}, 'run': print,
            'URL': 'https://...',
            '__annotations__': {'compile': bool | None, 'steps': Optional[int], 'ratio': float},  # noqa: UP045
            'learning_rate': 6e-4, 'max_iters': 600, 'start': '\n', 'overwrite': False, 'resume': None,
            'compile': None, 'steps': None, 'ratio': 1}


def ask(*argv, config_class=Toy):
    """{name: value} of the settings that changed and of the model flags that were given."""
    settings, before = defaults(), defaults()
    model_args = configure(settings, config_class, list(argv))
    return {k: v for k, v in settings.items() if k not in before or v != before[k]} | model_args


def refusal(*argv, config_class=Toy):
    """The message with which argv is refused; it must be one sentence."""
    with pytest.raises(SystemExit) as caught:
        configure(defaults(), config_class, list(argv))
    return sentence(caught.value.code)


def sentence(text):
    assert isinstance(text, str), f'{text!r} is no message'
    assert text == text.strip() and '\n' not in text and 'Traceback' not in text, text
    assert not re.search(r'[.?!] +[A-Z]', text), f'more than one sentence: {text}'
    return text


def same(got, want):
    """Equal, and of the same types: 1, 1.0 and True are three values here."""
    assert got == want and [type(v) for v in got.values()] == [type(want[k]) for k in got], (got, want)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Runs the test in an empty folder with config/, and writes config files there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config').mkdir()

    def write(**texts):
        for name, text in texts.items():
            Path(f'config/{name}.py').write_text(text)
    return write


def script(tmp_path, *argv, text=SCRIPT):
    path = tmp_path / 'toy.py'
    path.write_text(text.replace('ROOT', repr(str(ROOT))))
    command = [sys.executable, str(path), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)


# ----------------------------------------------------------------------------------------------------------
# Where values go, and which one wins


def test_no_arguments_change_nothing():
    same(ask(), {})


def test_settings_are_assigned_and_model_flags_returned():
    settings = defaults()
    assert configure(settings, Toy, ['--max_iters=7', '--n_layer=3']) == {'n_layer': 3}
    assert settings == defaults() | {'max_iters': 7}


def test_a_default_that_is_given_is_returned_all_the_same():
    same(ask('--n_layer=12', '--width=None'), {'n_layer': 12, 'width': None})


def test_argv_is_that_of_the_process_unless_given(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--n_layer=3'])
    assert configure(defaults(), Toy) == {'n_layer': 3}
    assert configure(defaults(), Toy, []) == {}


def test_later_arguments_win_in_every_order(files):
    files(a='max_iters = 1; n_layer = 1', b='max_iters = 2')
    same(ask('config/a.py', 'config/b.py'), {'max_iters': 2, 'n_layer': 1})
    same(ask('config/b.py', 'config/a.py'), {'max_iters': 1, 'n_layer': 1})
    same(ask('config/a.py', '--max_iters=3'), {'max_iters': 3, 'n_layer': 1})
    same(ask('--max_iters=3', 'config/a.py'), {'max_iters': 1, 'n_layer': 1})
    same(ask('--n_layer=3', '--n_layer=4'), {'n_layer': 4})


def test_given_names_the_file_or_flag_that_had_the_last_word(files):
    files(a='max_iters = 1; n_layer = 1; dropout = 0.1')
    given = {}
    configure(defaults(), Toy, ['--dropout=0.2', 'config/a.py', '--n_layer=2'], given)
    assert given == {'dropout': 'config/a.py', 'max_iters': 'config/a.py', 'n_layer': '--n_layer'}


def test_plain_settings_are_the_settings_with_their_values():
    settings = defaults()
    model_args = configure(settings, Toy, ['--max_iters=7', '--n_layer=3'])
    settings['model_args'] = model_args
    assert plain_settings(settings) == {
        'learning_rate': 6e-4, 'max_iters': 7, 'start': '\n', 'overwrite': False, 'resume': None,
        'compile': None, 'steps': None, 'ratio': 1}


def test_a_script_without_a_model_has_settings_only():
    same(ask('--max_iters=7', config_class=None), {'max_iters': 7})
    assert refusal('--n_layer=3', config_class=None) == '--n_layer is no setting of train.py; see --help'


def test_flags_alone_can_be_read_without_a_script():
    assert configure({}, Toy, ['--norm=rmsnorm']) == {'norm': 'rmsnorm'}


def test_a_name_cannot_be_setting_and_model_flag():
    with pytest.raises(AssertionError, match="'n_layer', 'width'.* must not be .*Toy: rename") as caught:
        configure(defaults() | {'width': 1, 'n_layer': 2}, Toy, [])
    sentence(str(caught.value).split('\n')[0])


# ----------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize('flag, value', [
    ('n_layer=6', 6), ('n_layer=-1', -1), ('n_layer=1_000', 1000), ('n_layer=1e5', 100000),
    ('n_layer=6.0', 6), ('vocab=9007199254740993', 2**53 + 1),
    ('dropout=0.1', 0.1), ('dropout=1', 1.0), ('dropout=1e-4', 1e-4), ('dropout=.5', 0.5),
    ('dropout=-3E2', -300.0), ('learning_rate=3e-4', 3e-4), ('learning_rate=1', 1.0), ('ratio=2', 2.0),
    ('cap=15', 15.0),
    ('norm=rmsnorm', 'rmsnorm'), ('norm=None', 'None'), ('norm=True', 'True'), ('norm=123', '123'),
    ('norm=', ''), ('start=a=b', 'a=b'), ('start=--x', '--x'), ('start=123', '123'), ("start=it's", "it's"),
    ('start=', ''), ("start='quoted'", "'quoted'"), ('start=two\nlines', 'two\nlines'), ('start= x ', ' x '),
    ('bias=True', True), ('bias=true', True), ('bias=1', True), ('overwrite=1', True), ('flash=1', True),
    ('bias=False', False), ('bias=false', False), ('bias=0', False), ('flash=False', False),
    ('width=None', None), ('width=none', None), ('width=64', 64), ('window=None', None), ('window=1e3', 1000),
    ('untold=None', None), ('untold=4', 4), ('cap=None', None), ('flash=None', None),
    ('compile=True', True), ('compile=0', False), ('compile=None', None), ('steps=7', 7),
    ('resume=None', None), ('resume=3', 3), ('resume=3e-4', 3e-4), ('resume=true', True), ('resume=1', 1),
    ('resume=out/x.pt', 'out/x.pt'), ("resume='x'", "'x'"), ('resume=(1, 2)', '(1, 2)'), ('resume=', ''),
])
def test_a_flag_takes_the_type_of_its_default(flag, value):
    name, _, _ = flag.partition('=')
    settings = defaults()
    got = configure(settings, Toy, [f'--{flag}'])
    got = got[name] if name in got else settings[name]
    assert got == value and type(got) is type(value), f'--{flag} became {got!r}, not {value!r}'


def test_a_string_is_not_read_as_python(recwarn):
    same(ask(r"--start='\d'"), {'start': r"'\d'"})
    assert not recwarn.list, recwarn.list


@pytest.mark.parametrize('flag, rule', [
    *[(f'n_layer={text}', 'an int (default 12)')
      for text in ('six', '', '6.5', 'None', 'True', 'inf', '1e400', '1e23', '[6]', '2*3', 'print()')],
    ('vocab=x', 'an int (no default)'), ('width=x', 'an int or None (default None)'),
    ('untold=x', 'an int or None (default None)'), ('steps=x', 'an int or None (default None)'),
    ('dropout=None', 'a float (default 0.0)'), ('dropout=False', 'a float (default 0.0)'),
    ('dropout=0,1', 'a float (default 0.0)'), ('cap=big', 'a float or None (default 30.0)'),
    ('max_iters=None', 'an int (default 600)'), ('learning_rate=fast', 'a float (default 0.0006)'),
    ('bias=yes', 'True or False (default True)'), ('bias=2', 'True or False (default True)'),
    ('bias=None', 'True or False (default True)'), ('bias=', 'True or False (default True)'),
    ('overwrite=0.0', 'True or False (default False)'), ('compile=2', 'True or False or None (default None)'),
    *[(f'learning_rate={text}', 'a finite number (default 0.0006)')
      for text in ('nan', 'NaN', '-nan', 'inf', '-inf', '+Infinity', '1e400', '-1e400', '1' + '0' * 400)],
    ('dropout=inf', 'a finite number (default 0.0)'), ('cap=nan', 'a finite number (default 30.0)'),
    ('resume=1e400', 'a finite number (default None)'),
])
def test_a_flag_of_the_wrong_type_is_refused(flag, rule):
    assert refusal(f'--{flag}') == f'--{flag} must be {rule}'


def test_files_follow_the_same_rules(files):
    files(a="n_layer = 1e3; dropout = 1; width = None; norm = '5'; bias = False; max_iters = 7; steps = 4")
    same(ask('config/a.py'), {'n_layer': 1000, 'dropout': 1.0, 'width': None, 'norm': '5', 'bias': False,
                              'max_iters': 7, 'steps': 4})


@pytest.mark.parametrize('line, rule', [
    ("n_layer = 'six'", "n_layer='six' must be an int (default 12)"),
    ("n_layer = '6'", "n_layer='6' must be an int (default 12)"),
    ('n_layer = 6.5', 'n_layer=6.5 must be an int (default 12)'),
    ('n_layer = True', 'n_layer=True must be an int (default 12)'),
    ('n_layer = None', 'n_layer=None must be an int (default 12)'),
    ("dropout = '0.1'", "dropout='0.1' must be a float (default 0.0)"),
    ('norm = 5', "norm=5 must be a string (default 'layernorm')"),
    ('bias = 1', 'bias=1 must be True or False (default True)'),
    ("bias = 'False'", "bias='False' must be True or False (default True)"),
    ("dropout = float('nan')", 'dropout=nan must be a finite number (default 0.0)'),
    ('learning_rate = 1e300 * 1e300', 'learning_rate=inf must be a finite number (default 0.0006)'),
    ('n_layer = 1e300 * 1e300', 'n_layer=inf must be an int (default 12)'),
    ('n_layer = [6]', 'n_layer=[6] must be an int (default 12)'),
    ('norm = str', "norm=<class 'str'> must be a string (default 'layernorm')"),
    ('resume = (1, 2)',
     'resume=(1, 2) must be True or False or an int or a float or a string or None (default None)'),
])
def test_a_wrong_type_in_a_file_is_refused_with_its_line(files, line, rule):
    files(a=f'# a comment\nmax_iters = 1\n{line}\n')
    assert refusal('config/a.py') == f'config/a.py, line 3: {rule}'


# ----------------------------------------------------------------------------------------------------------
# Config files


def test_files_compute(files):
    files(a='''
import math
from os import path as _path

_scale = 2

def helper(x):
    y = 2 * x
    return y

n_layer = helper(3) * _scale
width = n_layer * 2**3
if width > 5:
    dropout = 1 / 8
max_iters = math.prod(range(1, 4)); norm = "".join("ab" for _ in range(n_layer // 6))
''')
    same(ask('config/a.py'), {'n_layer': 12, 'width': 96, 'dropout': 0.125, 'max_iters': 6, 'norm': 'abab'})


def test_files_read_what_holds_when_their_turn_comes(files):
    files(a='n_layer *= 2\nsteps = max_iters // 2', b='width = n_layer + 1')
    same(ask('config/a.py'), {'n_layer': 24, 'steps': 300})
    same(ask('--n_layer=3', '--max_iters=10', 'config/a.py', 'config/b.py', '--n_layer=1'),
         {'n_layer': 1, 'max_iters': 10, 'steps': 5, 'width': 7})


def test_reading_a_setting_does_not_give_it(files):
    files(a='width = n_layer')
    given = {}
    assert configure(defaults(), Toy, ['config/a.py'], given) == {'width': 12} and list(given) == ['width']


def test_a_file_that_mistakes_a_function_for_a_value_is_not_ignored(files):
    files(a='def n_layer():\n    return 3\n')
    words = refusal('config/a.py')
    assert re.fullmatch(r'config/a.py: n_layer=<function .*> must be an int \(default 12\)', words), words


def test_a_file_that_imports_a_setting_gives_it(files):
    files(a='from math import pi as dropout', b='from math import pi')
    same(ask('config/a.py'), {'dropout': 3.141592653589793})
    assert refusal('config/b.py') == ('config/b.py: pi is no setting of train.py and no model flag; '
                                      'see --help, or call it _pi if only this file needs it')


@pytest.mark.parametrize('text, message', [
    ('n_layer = 2\nnorm = = 3', 'line 2 does not run: SyntaxError: invalid syntax'),
    ('n_layer = 2\n\nwidth = n_haed * 3', "line 3 does not run: NameError: name 'n_haed' is not defined"),
    ('width = vocab', "line 1 does not run: NameError: name 'vocab' is not defined"),
    ('def f():\n    1 / 0\n\nn_layer = f()', 'line 2 does not run: ZeroDivisionError: division by zero'),
    ('n_layer = 1\nimport nowhere', "line 2 does not run: ModuleNotFoundError: No module named 'nowhere'"),
    ('import ast\nast.parse("= 3")', 'line 2 does not run: SyntaxError: invalid syntax'),
    ('raise ValueError("two\\nlines")', 'line 1 does not run: ValueError: two lines'),
    ('# YAML\nn_layer: 2', 'line 2 does not run: SyntaxError: n_layer: 2 sets nothing: write NAME = VALUE'),
    ('x = 3\nnorm: rms', 'line 2 does not run: SyntaxError: norm: rms sets nothing: write NAME = VALUE'),
    ('n_layer == 2', 'line 1 does not run: SyntaxError: n_layer == 2 sets nothing: write NAME = VALUE'),
])
def test_a_broken_file_is_one_sentence_with_its_line(files, text, message):
    files(a=text)
    assert refusal('config/a.py') == f'config/a.py, {message}'


def test_a_file_that_is_not_text_is_one_sentence(files):
    Path('config/a.py').write_bytes(b'n_layer = 2\nnorm = "\xff"\n')
    assert refusal('config/a.py').startswith('config/a.py, line 2 does not run: SyntaxError: ')


def test_a_missing_file_is_refused_with_the_nearest_one(files):
    files(llama_small='', tiny='')
    assert refusal('config/llama_smal.py') == \
        'config/llama_smal.py does not exist; did you mean config/llama_small.py?'
    assert refusal('llama_small') == 'llama_small does not exist; did you mean config/llama_small.py?'
    assert refusal('confg/tiny.py') == 'confg/tiny.py does not exist; did you mean config/tiny.py?'
    assert refusal('config/gpt9.py') == \
        'config/gpt9.py does not exist; give a file of config or a flag; see --help'
    assert refusal('config') == 'config is a folder; give a file of config or a flag; see --help'


# ----------------------------------------------------------------------------------------------------------
# Names


def test_an_unknown_flag_is_refused_with_the_nearest_name():
    known = 'is no setting of train.py and no model flag'
    assert refusal('--learning_rat=1') == f'--learning_rat {known}; did you mean --learning_rate?'
    assert refusal('--learning-rat=1') == f'--learning_rat {known}; did you mean --learning_rate?'
    assert refusal('--learning-rat', '1') == f'--learning_rat {known}; did you mean --learning_rate?'
    assert refusal('--n_layers') == f'--n_layers {known}; did you mean --n_layer?'
    assert refusal('--zzz=1') == f'--zzz {known}; see --help'
    assert refusal('--=1') == f'-- {known}; see --help'


@pytest.mark.parametrize('name', ['_hidden', 'URL', 'os', 'table', 'run', 'made', '__file__'])
def test_what_is_not_a_setting_cannot_be_set(name):
    assert refusal(f'--{name}=1').startswith(f'--{name} is no setting of train.py and no model flag; ')


def test_an_unknown_name_in_a_file_is_refused_with_the_nearest_name(files):
    files(a='n_layer = 2\n\nlearning_rat = 3e-4\n', b='helper_width = 3')
    known = 'is no setting of train.py and no model flag'
    assert refusal('config/a.py') == f'config/a.py, line 3: learning_rat {known}; did you mean learning_rate?'
    assert refusal('config/b.py') == (f'config/b.py, line 1: helper_width {known}; '
                                      'see --help, or call it _helper_width if only this file needs it')


def test_a_file_for_another_script_is_refused(files):
    files(a='max_iters = 3\nn_layer = 2\n')
    assert refusal('config/a.py', config_class=None).startswith(
        'config/a.py, line 2: n_layer is no setting of train.py; see --help')


def test_a_flag_needs_a_value():
    assert refusal('--overwrite') == '--overwrite needs a value; write --overwrite=True'
    assert refusal('--compile') == '--compile needs a value; write --compile=True'
    assert refusal('--n_layer') == '--n_layer needs a value; write --n_layer=VALUE'
    assert refusal('--start') == '--start needs a value; write --start=VALUE'
    assert refusal('--start', '--n_layer=3') == '--start needs a value; write --start=VALUE'
    assert refusal('--overwrite', '--n_layer', '3') == '--overwrite needs a value; write --overwrite=True'


@pytest.mark.parametrize('argv, values', [
    (['--max_iters', '7'], {'max_iters': 7}), (['--max-iters=7'], {'max_iters': 7}),
    (['--max-iters', '7', '--n-layer', '3'], {'max_iters': 7, 'n_layer': 3}),
    (['--compile', 'False', '--bias', 'true'], {'compile': False, 'bias': True}),
    (['--dropout', '-0.5'], {'dropout': -0.5}), (['--start', '-x'], {'start': '-x'}),
    (['--start', ''], {'start': ''}), (['--start', 'a=b'], {'start': 'a=b'}),
    (['--start', 'a-b.pt'], {'start': 'a-b.pt'}), (['--start=--n-layer'], {'start': '--n-layer'}),
    (['--max_iters', '1', '--max_iters', '2'], {'max_iters': 2}),
])
def test_a_blank_stands_for_the_equals_sign_and_dashes_for_underscores(argv, values):
    same(ask(*argv), values)


def test_given_holds_the_name_of_the_setting_however_it_was_written():
    given = {}
    configure(defaults(), Toy, ['--max-iters', '7', '--n-layer=3'], given)
    assert given == {'max_iters': '--max_iters', 'n_layer': '--n_layer'}


def test_a_config_file_is_no_value_unless_an_equals_sign_says_so(files):
    files(a='n_layer = 1')
    for name in ('start', 'overwrite', 'n_layer'):
        assert refusal(f'--{name}', 'config/a.py') == (
            f'--{name} needs a value, and config/a.py is a config file; '
            f'write --{name}=VALUE')
    same(ask('--start=config/a.py', 'config/a.py'), {'start': 'config/a.py', 'n_layer': 1})
    same(ask('--max_iters', '7', 'config/a.py'), {'max_iters': 7, 'n_layer': 1})


def test_names_to_skip_are_passed_over_with_their_values(files):
    files(a='n_layer = 1; other = 2')
    assert configure(defaults(), Toy, ['config/a.py', '--other', '3', '--other=4'], skip={'other': 0}) == {
        'n_layer': 1}
    with pytest.raises(SystemExit, match='--another is no setting'):
        configure(defaults(), Toy, ['--another', '3'], skip={'other': 0})


def test_stray_words_are_refused():
    assert refusal('-n_layer=3') == '-n_layer=3 is no config file; did you mean --n_layer=3?'
    assert refusal('n_layer=3') == 'n_layer=3 is no config file; did you mean --n_layer=3?'
    assert refusal('n-layer=3') == 'n-layer=3 is no config file; did you mean --n-layer=3?'
    remedy = 'give a file of config or a flag; see --help'
    assert refusal('-x') == f'-x does not exist; {remedy}'
    assert refusal('--start=hello', 'world') == f'world does not exist; {remedy}'


# ----------------------------------------------------------------------------------------------------------
# Help, and a script as a user runs it


def test_help_shows_every_setting_and_flag_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        configure({k: v for k, v in defaults().items() if k != '__file__'}, Toy, ['--n_layer=bad', '--help'])
    assert caught.value.code == 0
    lines = [re.sub(' {2,}', '  ', line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == 'usage: python this script [config/FILE.py ...] [--key=value ...]'
    assert lines[lines.index('settings of this script:'):] == [
        'settings of this script:',
        '--learning_rate=0.0006', '--max_iters=600', r"--start='\n'", '--overwrite=False', '--resume=None',
        '--compile=None', '--steps=None', '--ratio=1', '',
        'model flags:',
        '--vocab=  tokens known', '',
        'size', '--n_layer=12  blocks', '--width=None  the hidden width, of every layer',
        '--window=None  tokens seen, # included', '--untold=None', '',
        'regularisation', '--dropout=0.0  share of activations that are dropped', '--cap=30.0  of the logits',
        "--norm='layernorm'  layernorm, rmsnorm", '--bias=True  in linear layers',
        '--flash=None  None: where it pays']


def test_help_reads_a_class_that_is_indented(capsys):
    @dataclass
    class Local:
        depth: int = 3  # of the tree
    with pytest.raises(SystemExit):
        configure({}, Local, ['--help'])
    assert re.search('--depth=3 +of the tree', capsys.readouterr().out)


HELP = '''usage: python toy.py [config/FILE.py ...] [--key=value ...]
       --key value means --key=value; arguments apply in order, and later ones win

Train a toy. Nothing more.

    python toy.py a.py --max_iters=3    # an example

And a last word.

settings of toy.py:

  run
    --out_dir='out'                      where the run goes, with = and # in it
    --seed=1337                          of the weights
    --max_iters=600                      steps

  optimizer
    --learning_rate=0.0006               peak
    --min_lr=6e-05                       smallest rate, at the end
    --name='ab'                          in two lines
    --resume=None                        checkpoint to go on from
    --compile=None                       None: on a GPU

model flags:
    --n_layer=12                         blocks
    --norm='layernorm'                   layernorm, rmsnorm
'''


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_of_a_script(tmp_path, flag):
    done = script(tmp_path, flag)
    assert (done.returncode, done.stderr, done.stdout) == (0, '', HELP)


def test_help_wraps_long_meanings(capsys):
    @dataclass
    class Long:
        width: int = 4  # a sentence too long for one line of the help, and which therefore goes on below it
    with pytest.raises(SystemExit):
        configure({}, Long, ['--help'])
    *_, first, second = capsys.readouterr().out.rstrip().split('\n')
    assert len(first) <= 110 and second == ' ' * 41 + 'goes on below it'


# words of the tables of Grouped
ATTN, BALANCE = ('standard', 'mla'), ('none', 'aux', 'both')


class Letter(NamedTuple):
    meaning: str


MIXERS = {'a': Letter('attention'), 'm': Letter('state space'), 'w': Letter('window')}


@flags()
class SizeFlags:
    n_layer: int = 12                               # blocks
    layer_pattern: str = flag('a', MIXERS)          # one letter per layer


@flags(layer_pattern='aw')
class AttentionFlags:
    """Attention: which tokens see which.

    A second paragraph.
    """
    attn: str = flag('standard', ATTN)              # standard, mla
    # windows
    window: int | None = flag(None, layer_pattern='w')  # tokens that are seen
    sinks: bool = False


@flags(attn='mla')
class LatentAttentionFlags:
    kv_rank: int | None = None                      # width of the latent
    z_weight: float = flag(0.0, least=0, kv_rank=SET)
    balance: str = flag('none', BALANCE)            # keeps experts busy
    aux_weight: float = flag(0.1, balance=('aux', 'both'))  # of the loss


@flags()
class Grouped(SizeFlags, AttentionFlags, LatentAttentionFlags, Flags):
    """Choices."""
    bias: bool = True                               # in linear layers


GROUPED = '''
model flags:

  Choices
    --bias=True                          in linear layers

  Size
    --n_layer=12                         blocks
    --layer_pattern='a'                  one letter per layer; a (attention), m (state space), w (window)

  Attention: which tokens see which (only when layer_pattern has one of a, w)
    --attn='standard'                    standard, mla

  windows
    --window=None                        tokens that are seen; only when layer_pattern has a 'w'
    --sinks=False

  Latent Attention (only when attn=mla)
    --kv_rank=None                       width of the latent
    --z_weight=0.0                       only when kv_rank is set
    --balance='none'                     keeps experts busy; one of none, aux, both
    --aux_weight=0.1                     of the loss; only when balance is aux or both
'''


def test_help_shows_flags_in_groups_with_their_conditions(capsys):
    with pytest.raises(SystemExit):
        configure({}, Grouped, ['--help'])
    out = capsys.readouterr().out
    assert out[out.index('\nmodel flags:'):] == GROUPED


# ----------------------------------------------------------------------------------------------------------
# The settings of a script, read without running it


def test_settings_of_a_script_are_read_and_not_run(tmp_path):
    path = tmp_path / 'toy.py'
    path.write_text(SCRIPT.replace('import os\n', 'raise SystemExit(1)\n'))
    found = settings_of(path)
    assert {name: setting.default for name, setting in found.items()} == {
        'out_dir': 'out', 'seed': 1337, 'max_iters': 600, 'learning_rate': 6e-4, 'min_lr': 6e-5, 'name': 'ab',
        'resume': None, 'compile': None}
    assert found['seed'] == (1337, int, 'of the weights', 'run')
    assert found['min_lr'] == (6e-5, float, 'smallest rate, at the end', 'optimizer')
    assert types_of(found['compile']) == (bool, NoneType) and set(types_of(found['resume'])) == {
        bool, int, float, str, NoneType}


@pytest.mark.parametrize('name', ['train.py', 'sample.py'])
def test_settings_of_a_script_are_those_that_its_help_shows(name):
    text = subprocess.run([sys.executable, name, '--help'], cwd=ROOT, capture_output=True, text=True).stdout
    shown = re.findall(r'^    --(\w+)=(\S*)', text.split('model flags:')[0], re.M)
    assert [name for name, _ in shown] == list(settings_of(ROOT / name))
    assert len(shown) > 20


def test_settings_of_a_script_that_configures_in_a_function_end_where_it_is(tmp_path):
    path = tmp_path / 'toy.py'
    path.write_text('a = 1\nTOP = 2\nif a:\n    inside = 3\ndef main():\n    configure(globals())\nb = 4\n')
    assert list(settings_of(path)) == ['a']


def test_model_flags_are_the_fields_with_their_types():
    found = model_flags(Toy)
    assert list(found) == ['vocab', 'n_layer', 'width', 'window', 'untold', 'dropout', 'cap', 'norm', 'bias',
                           'flash']
    assert found['vocab'].default is MISSING and types_of(found['untold']) == (int, NoneType)


def test_the_nearest_name_is_advised():
    assert nearest('stpe', ['step', 'cache']) == 'did you mean step?'
    assert nearest('zzz', ['step'], remedy='choose step') == 'choose step'


def test_a_script_runs_as_configured(tmp_path):
    (tmp_path / 'a.py').write_text('n_layer = 2\nlearning_rate = 1\n')
    done = script(tmp_path, 'a.py', '--compile=true', '--out_dir=a=b')
    assert (done.returncode, done.stderr) == (0, '')
    assert eval(done.stdout) == {
        'out_dir': 'a=b', 'seed': 1337, 'max_iters': 600, 'learning_rate': 1.0, 'min_lr': 6e-5, 'name': 'ab',
        'resume': None, 'compile': True, 'n_layer': 2,
        'given': {'n_layer': 'a.py', 'learning_rate': 'a.py', 'compile': '--compile', 'out_dir': '--out_dir'}}


@pytest.mark.parametrize('argv, words', [
    (['--learning_rat=1'],
     '--learning_rat is no setting of toy.py and no model flag; did you mean --learning_rate?'),
    (['--compile=2'], '--compile=2 must be True or False or None (default None)'),
    (["gone.py"], f"gone.py does not exist; give a file of {ROOT / 'config'} or a flag; see --help"),
    (['bad.py'], 'bad.py, line 2 does not run: ZeroDivisionError: division by zero'),
])
def test_a_script_that_refuses_says_one_sentence_and_fails(tmp_path, argv, words):
    (tmp_path / 'bad.py').write_text('n_layer = 2\nn_layer = 1 / 0\n')
    done = script(tmp_path, *argv)
    assert (done.returncode, done.stdout, done.stderr) == (1, '', words + '\n')


@pytest.mark.parametrize('header, compiles', [('', True), ('from __future__ import annotations\n', True)])
def test_annotations_of_a_script_count_even_as_text(tmp_path, header, compiles):
    text = SCRIPT.replace('import os\n', header, 1)
    assert eval(script(tmp_path, '--compile=1', text=text).stdout)['compile'] is compiles


def test_an_error_that_a_user_can_mend_shows_its_message_alone():
    for refused in (ValueError('window=0 must be above 0'), FileNotFoundError('out/ckpt.pt does not exist')):
        with pytest.raises(SystemExit) as caught, errors_as_messages():
            raise refused
        assert sentence(caught.value.code) == str(refused) and caught.value.__suppress_context__
    with pytest.raises(SystemExit, match='^nowhere/x cannot be read or written .*: check the path$'):
        with errors_as_messages():
            open('nowhere/x')
    with pytest.raises(KeyError), errors_as_messages():
        raise KeyError('a mistake of the code keeps its traceback')
