"""
Config files and --key=value onto the globals of a script and the fields of a dataclass.

    python train.py config/llama_small.py config/tiny.py --learning_rate=3e-4

    model_args = configure(globals(), GPTConfig)    # in train.py, right below its settings

Settings are the plain globals of the script, model flags the fields of the dataclass: neither is listed here.
Later arguments win. A config file is Python: it may compute, and may read every setting and model flag as it
stands when the file's turn comes. Whatever cannot be meant is refused in one sentence.
"""
import ast
import builtins
import inspect
import io
import math
import operator
import os
import sys
import textwrap
import tokenize
import traceback
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, NoneType
from typing import NamedTuple, get_args, get_type_hints

PLAIN = bool | int | float | str | None
RULES = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a string', tuple: 'a list of numbers',
         NoneType: 'None'}


class Flag(NamedTuple):
    """What a key may be given."""
    kinds: tuple        # the types it takes
    default: object     # MISSING for a field without one


def configure(settings, config_class=None, argv=None, given=None, skip=()):
    """
    Apply the command line to `settings`, the globals() of a script; return the fields of config_class that it
    gave, as a dict. A dict passed as `given` receives {name: the file or flag that had the last word}. Names
    in `skip` are passed over: a config file may be meant for another script too (`names_in`).

    A user's mistake raises SystemExit with one sentence, which Python prints before it exits with code 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    own, model = setting_flags(settings), model_flags(config_class)
    flags, both = own | model, sorted(own.keys() & model.keys())
    assert not both, f'{both} must not be settings and fields of {config_class.__name__}: rename the settings'
    script = Path(settings.get('__file__', 'this script')).name
    if '--help' in argv or '-h' in argv:
        print(help_text(script, settings, config_class, own, model))
        raise SystemExit(0)
    model_args, now = {}, {name: flag.default for name, flag in flags.items() if flag.default is not MISSING}
    for arg in argv:
        is_flag = arg.startswith('--')
        for name, value, place in split_flag(arg) if is_flag else run_file(arg, flags, now):
            label = f'--{name}' if is_flag else f'{place}: {name}'
            if name not in flags and name in skip:
                continue
            if name not in flags:
                kind = f'setting of {script}' + ' and no model flag' * bool(model)
                raise SystemExit(f'{label} is no {kind}; {nearest(name, flags, is_flag)}')
            now[name] = convert(value, flags[name], label, is_flag)
            (settings if name in own else model_args)[name] = now[name]
            if given is not None:
                given[name] = label if is_flag else arg
    return model_args


def names_in(path):
    """Every name that a script assigns."""
    return set(read_comments(Path(path).read_text(encoding='utf-8')))


def plain_settings(settings):
    """{name: value} of a script's settings, as a checkpoint keeps them: ask before it computes more."""
    return {name: value for name, value in settings.items() if name[0] != '_' and isinstance(value, PLAIN)}


@contextmanager
def one_sentence():
    """Within it, a ValueError or a missing file, both refusals, ends the script with its message alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise SystemExit(str(error)) from None
        reason = f'{error.filename} cannot be read or written ({error.strerror}): check the path'
        raise SystemExit(reason) from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


# ----------------------------------------------------------------------------------------------------------
# What can be given, and as which type


def setting_flags(settings):
    # a module made of the globals, because that knows its annotations in every version of Python
    module = ModuleType('settings')
    vars(module).update(settings)
    return make_flags(plain_settings(settings), get_type_hints(module))


def model_flags(config_class):
    if config_class is None:
        return {}
    defaults = {field.name: field.default for field in fields(config_class) if field.init}
    return make_flags(defaults, get_type_hints(config_class))


def make_flags(defaults, hints):
    flags = {}
    for name, default in defaults.items():
        hint = hints.get(name, PLAIN if default is None else type(default))
        kinds = get_args(hint) or (hint,)
        flags[name] = Flag(kinds if default is not None else (*kinds, NoneType), default)
    return flags


def nearest(name, flags, is_flag):
    near = get_close_matches(name, flags, 1)
    if near:
        return f'did you mean {"--" * is_flag}{near[0]}?'
    return 'see --help' if is_flag else f'see --help, or call it _{name} if only this file needs it'


def convert(value, flag, label, is_flag):
    """The value as a type that the flag takes: ints and floats stand in for each other if nothing is lost."""
    kinds, written = flag.kinds, value if is_flag else repr(value)
    if is_flag and value is None:
        raise SystemExit(f'{label} needs a value; write {label}={True if bool in kinds else "VALUE"}')
    if is_flag:
        value = parse(value, kinds)
    # not isinstance, to which True is an int
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    # beyond 2**53 a float no longer tells which integer was written
    if type(value) is float and int in kinds and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    rule = ' or '.join(RULES.get(kind, str(kind)) for kind in dict.fromkeys(kinds))
    default = 'no default' if flag.default is MISSING else f'default {flag.default!r}'
    raise SystemExit(f'{label}={written} must be {rule} ({default})')


def parse(text, kinds):
    """What a config file would say for a flag's text: a string just as it stands, or else a literal."""
    # Python would warn about some texts
    if kinds == (str,):
        return text
    words = {'true': True, 'false': False, 'none': None}
    if bool in kinds and int not in kinds:
        words |= {'1': True, '0': False}
    try:
        value = words[text] if text in words else ast.literal_eval(text)
    except Exception:
        value = text
    return text if str in kinds and (type(value) not in kinds or type(value) is str) else value


# ----------------------------------------------------------------------------------------------------------
# Arguments: (name, value, place) of everything that one of them sets


def split_flag(arg):
    name, equals, text = arg[2:].partition('=')
    return [(name, text if equals else None, arg)]


def run_file(path, flags, now):
    """Modules, functions and names with a leading _ are the file's own; all else has to be known."""
    if not os.path.isfile(path):
        raise SystemExit(no_file(path, flags))
    # what is known so far goes to the builtins: the file can read it, and what it assigns stays apart
    names = {'__file__': path, '__builtins__': vars(builtins) | now}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        exec(compile(tree, path, 'exec'), names)
    except Exception as error:
        rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        row = rows[-1] if rows else getattr(error, 'lineno', 1)
        reason = ' '.join(str(getattr(error, 'msg', error)).split())
        raise SystemExit(f'{path}, line {row} does not run: {type(error).__name__}: {reason}') from None
    places = {node.id: f'{path}, line {node.lineno}' for node in ast.walk(tree)
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    # a function under the name of a flag is no helper but a mistake, left for convert to refuse
    return [(name, value, places.get(name, path)) for name, value in names.items() if name[0] != '_'
            and (name in flags or not (callable(value) or isinstance(value, ModuleType)))]


def no_file(arg, flags):
    flag = arg.lstrip('-')
    if flag.partition('=')[0] in flags:
        return f'{arg} is no config file; did you mean --{flag}?'
    folders = (Path(arg).parent, Path('config'))
    files = {path.stem: path for folder in folders for path in sorted(folder.glob('*.py'))}
    near = get_close_matches(Path(arg).stem, files, 1)
    remedy = f'did you mean {files[near[0]]}?' if near else 'give a config file or --key=value, or see --help'
    return f'{arg} {"is a folder" if os.path.isdir(arg) else "does not exist"}; {remedy}'


# ----------------------------------------------------------------------------------------------------------
# Help: what the comments in the sources say


def help_text(script, settings, config_class, own, model):
    files = 'config/llama_small.py config/tiny.py ' if model else ''
    flag = '--learning_rate=3e-4' if 'learning_rate' in own else '--key=value'
    about = (settings.get('__doc__') or '').strip().split('\n')[0]
    lines = [f'usage: python {script} {files}{flag}', '', about]
    source = Path(settings['__file__']).read_text(encoding='utf-8') if '__file__' in settings else ''
    groups = [(f'settings of {script}:', own, source)]
    if model:
        groups.append(('model flags:', model, textwrap.dedent(inspect.getsource(config_class))))
    for title, flags, source in groups:
        lines += ['', title]
        comments = read_comments(source)
        for name, flag in flags.items():
            heading, meaning = comments.get(name, ('', ''))
            lines += ['', f'  {heading}'] if heading else []
            default = '' if flag.default is MISSING else repr(flag.default)
            lines.append(f'    {f"--{name}={default}":<36} {meaning}'.rstrip())
    return '\n'.join(lines)


def read_comments(source):
    """
    {name: (heading, meaning)} of what a script or a class assigns. The meaning is the comment behind it, and
    one line above is then the heading of a group; with nothing behind, the meaning is the lines right above.
    """
    lines, texts, comments = source.split('\n'), {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            texts[token.start[0]] = token.string.strip('# ')
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            top = node.lineno
            while top > 1 and lines[top - 2].startswith(' ' * node.col_offset + '#'):
                top -= 1
            above = [texts[row] for row in range(top, node.lineno) if texts[row].strip('-')]
            heading = above[0] if node.end_lineno in texts and len(above) == 1 else ''
            meaning = texts.get(node.end_lineno, ' '.join(above))
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        comments.setdefault(name.id, (heading, meaning))
    return comments


# ----------------------------------------------------------------------------------------------------------
# Flags in groups. A group is a dataclass that stands in the chapter of its block. One line of it says all
# about a flag: its default, its meaning (the comment), its range, its table of words, and the other flags
# beside which it means anything. The config inherits the groups, and refuses what cannot be meant.
#
#     @flags(attn='mla')                                 # the group means something only when attn is mla
#     class LatentFlags:
#         kv_rank: int | None = None                     # an int is at least 1 and a float above 0,
#         z_weight: float = flag(0.0, least=0)           # unless the flag says otherwise
#         v_head_dim: int | None = flag(None, like='head_dim')   # None stands for the value of head_dim
#         ffn_limit: float = flag(7.0, ffn='swiglu_clip')       # means something only when ffn is swiglu_clip
#
#         def fill(c): ...        # returns {flag: the value that its None stands for}
#         def rules(c): ...       # yields (flag, whether all is well, what it must)

LIMITS = {'least': ('at least', operator.ge), 'above': ('above', operator.gt),
          'below': ('below', operator.lt), 'most': ('at most', operator.le)}
SET = ...           # the condition that a flag differs from its default


def flag(default, table=None, like=None, **more):
    """
    A field of a group. table: the words (of a pattern: the letters) that may stand there. like: the flag
    whose value a None stands for. more: its limits (least, above, below, most), and the conditions under
    which it means anything, each another flag with the value it must have, a tuple of values, SET, or letters
    of which a pattern must have one.
    """
    limits = {name: more.pop(name) for name in LIMITS if name in more}
    return field(default=default, metadata={'table': table, 'like': like, 'limits': limits, 'when': more})


def flags(**when):
    """The decorator of a group that means something only beside these values of other flags."""
    def group(cls):
        for name in cls.__annotations__:
            f = vars(cls).get(name)
            if not hasattr(f, 'metadata'):
                f = flag(f)
                setattr(cls, name, f)
            f.metadata = {**f.metadata, 'when': (when, f.metadata['when'])}
        cls.when = when
        return dataclass(cls)
    return group


class Flags:
    """What a config inherits after its groups, whose fill and rules are called in their order."""

    def __post_init__(self):
        for f in fields(self):
            self._check_value(f)
        for f in fields(self):
            if getattr(self, f.name) != f.default and (missing := self.missing(f.name)):
                self._must(f.name, False, f'be left out unless {missing}')
        for group in type(self).__mro__:
            self._fill(group)
        for group in type(self).__mro__:
            for name, ok, must in vars(group)['rules'](self) if 'rules' in vars(group) else ():
                self._must(name, ok, must)

    @classmethod
    def unchecked(cls, **values):
        """A config as it is given, nothing checked or filled in: to ask `missing` of it."""
        config = object.__new__(cls)
        vars(config).update({f.name: f.default for f in fields(cls)} | values)
        return config

    def missing(self, name):
        """What `name` needs beside it and has not, in words; '' where it means something."""
        for when in self.__dataclass_fields__[name].metadata['when']:
            for other, wanted in when.items():
                ok, words = self._condition(other, wanted)
                missing = self.missing(other) if ok else words
                if missing:
                    return missing
        return ''

    def _condition(self, other, wanted):
        """Whether a condition holds, and the condition in words."""
        value = getattr(self, other)
        if other.endswith('_pattern'):
            return set(value[:self.n_layer]) & set(wanted), in_words(other, wanted)
        if wanted is SET:
            return value != self.__dataclass_fields__[other].default, in_words(other, wanted)
        return value in (wanted if isinstance(wanted, tuple) else (wanted,)), in_words(other, wanted)

    def _fill(self, group):
        """Replace the Nones that stand for a value, where the flag means something."""
        values = vars(group)['fill'](self) if 'fill' in vars(group) else {}
        for name in vars(group).get('__annotations__', ()):
            f = self.__dataclass_fields__[name]
            if f.metadata['like'] and not self.missing(name):
                values[name] = getattr(self, f.metadata['like'])
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _must(self, name, ok, rule):
        if not ok:
            raise ValueError(f'{name}={getattr(self, name)} must {rule}')

    def _check_value(self, f):
        """The type of a flag, its words and its range. An int given for a float is stored as a float."""
        value, types, table = getattr(self, f.name), types_of(f), f.metadata['table']
        if tuple in types and type(value) is list:  # as JSON has them
            value = tuple(value)
        if type(value) is int and int not in types and float in types:
            value = float(value)
        self._must(f.name, type(value) in types, f'be {" or ".join(RULES.get(t, t.__name__) for t in types)}')
        if tuple in types and type(value) is tuple:
            self._must(f.name, all(type(x) in (int, float) for x in value), 'hold numbers')
            value = tuple(map(float, value))
        setattr(self, f.name, value)
        if f.name.endswith('_pattern'):
            self._must(f.name, value and set(value) <= table.keys(), f"be letters of {''.join(table)}")
        elif table:
            self._must(f.name, value in table, f"be one of {', '.join(map(str, table))}")
        for x in value if type(value) is tuple else (value,):
            if type(x) in (int, float):
                self._check_range(f, x)

    def _check_range(self, f, x):
        self._must(f.name, math.isfinite(x), 'be a finite number')
        a_count = type(x) is int and float not in types_of(f)
        limits = f.metadata['limits'] or ({'least': 1} if a_count else {'above': 0})
        self._must(f.name, all(LIMITS[name][1](x, limit) for name, limit in limits.items()),
                   'be ' + ' and '.join(f'{LIMITS[name][0]} {limit}' for name, limit in limits.items()))


def types_of(f):
    return get_args(f.type) or (f.type,)


def in_words(other, wanted):
    """A condition as a sentence says it."""
    if wanted is SET:
        return f'{other} is set'
    if other.endswith('_pattern'):
        article = 'an' if wanted[0] in 'aefmn' else 'a'
        return f'{other} has {article} ' + ' or '.join(map(repr, wanted))
    return f'{other} is {" or ".join(wanted)}' if isinstance(wanted, tuple) else f'{other}={wanted}'
