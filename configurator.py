"""
The command line: config files and --key=value, onto the globals of a script and the fields of a dataclass.

    python train.py config/llama_small.py config/tiny.py --learning_rate=3e-4 --compile False

    model_args = configure(globals(), GPTConfig)    # in train.py, right below its settings

A setting is a global of the script, not in CAPITALS, no leading _; a model flag is a field of the dataclass.

Arguments apply in order, and later ones win. `--key value` means `--key=value`, and dashes in a key mean
underscores. After a blank, a word that begins with -- is the next flag and a word that ends in .py a config
file, never a value; write --key=value for those.

A config file is Python. It may compute, and may read every setting and model flag as it stands by then.
"""
import ast
import builtins
import importlib.util
import inspect
import io
import math
import operator
import os
import re
import sys
import textwrap
import tokenize
import traceback
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, NoneType
from typing import NamedTuple, get_args, get_type_hints

HERE = Path(__file__).resolve().parent
PLAIN = bool | int | float | str | None


def configure(settings: dict, config_class: type | None = None, argv: list[str] | None = None,
              given: dict | None = None, skip: Collection[str] = ()) -> dict:
    """
    Apply the command line to `settings`, the globals() of a script. Returns the fields of config_class that
    the command line gave: {name: value}.

    given   a dict that receives {name: the file or flag that set it last}
    skip    names to ignore: a config file may set names of another script too (see settings_of)
    """
    argv = sys.argv[1:] if argv is None else argv
    own, model = setting_flags(settings), model_flags(config_class)
    known, both = own | model, sorted(own.keys() & model.keys())
    assert not both, f'{both} must not be settings and fields of {config_class.__name__}: rename the settings'
    script = script_name(settings)
    if '--help' in argv or '-h' in argv:
        print(help_text(script, settings, config_class, own, model))
        raise SystemExit(0)
    model_args, now = {}, {name: flag.default for name, flag in known.items() if flag.default is not MISSING}
    for key, text in split_arguments(argv):
        is_flag = key is not None
        for name, value, label in [(key, text, f'--{key}')] if is_flag else run_file(text, known, now):
            if name not in known and name in skip:
                continue
            if name not in known:
                kind = f'setting of {script}' + ' and no model flag' * bool(model)
                own_name = '' if is_flag else f', or call it _{name} if only this file needs it'
                remedy = nearest(name, known, '--' * is_flag, f'see --help{own_name}')
                raise SystemExit(f'{label} is no {kind}; {remedy}')
            now[name] = convert(value, known[name], label, is_flag)
            (settings if name in own else model_args)[name] = now[name]
            if given is not None:
                given[name] = label if is_flag else text
    return model_args


@contextmanager
def errors_as_messages():
    """Within it, a ValueError or an OSError ends the script with its message alone, without a traceback."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise SystemExit(str(error)) from None
        reason = f'{error.filename} cannot be read or written ({error.strerror}): check the path'
        raise SystemExit(reason) from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


def nearest(name: str, names: Iterable[str], prefix: str = '', remedy: str = 'see --help') -> str:
    """What to advise for an unknown name: the nearest of `names`, or else the remedy."""
    near = get_close_matches(name, names, 1)
    return f'did you mean {prefix}{near[0]}?' if near else remedy


def own_module(name: str) -> ModuleType:
    """
    import_module(name) for a folder beside this file, even if another package has its name.

    PyPI has a package `kernels`, and many projects have a `data`. Where `import` would find one of those,
    ours is loaded as nanoblocks_kernels or nanoblocks_data, and theirs stays as it is.
    """
    package, dot, module = name.partition('.')
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # somebody put a module without a spec into sys.modules
        found = None
    folders = found and found.submodule_search_locations or ()
    if not any(Path(folder).resolve() == HERE / package for folder in folders):
        package = f'nanoblocks_{package}'
        if package not in sys.modules:
            path = HERE / name.partition('.')[0] / '__init__.py'
            spec = importlib.util.spec_from_file_location(package, path)
            sys.modules[package] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(package + dot + module)


# ----------------------------------------------------------------------------------------------------------
# Declare: what can be set, with which default and type


class Setting(NamedTuple):
    """A setting of a script, or a model flag."""
    default: object         # MISSING for a field without one
    type: object            # a type, or a union of types such as int | None
    meaning: str = ''       # its comment in the source
    group: str = ''         # the heading that it stands under


def settings_of(path: str | os.PathLike) -> dict[str, Setting]:
    """{name: Setting} of a script, read but not run: the plain values that it assigns before `configure`."""
    source, found = Path(path).read_text(encoding='utf-8'), {}
    for name, node, meaning, group in assignments(source):
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue  # computed, so not a setting
        if is_setting(name, default) and name not in found:
            hint = eval(ast.unparse(node.annotation)) if isinstance(node, ast.AnnAssign) else None
            found[name] = make_setting(default, hint, meaning, group)
    return found


def plain_settings(settings: dict) -> dict:
    """{name: value} of the settings among a script's globals; call it before the script computes more."""
    return {name: value for name, value in settings.items() if is_setting(name, value)}


def is_setting(name, value):
    return name[0] != '_' and not name.isupper() and isinstance(value, PLAIN)


def setting_flags(settings):
    """{name: Setting} of a script's globals."""
    # a module made of the globals, because a module knows its annotations in every version of Python
    module = ModuleType('settings')
    vars(module).update(settings)
    hints = get_type_hints(module)
    return {name: make_setting(value, hints.get(name)) for name, value in plain_settings(settings).items()}


def model_flags(config_class):
    """{name: Setting} of the fields of a dataclass."""
    if config_class is None:
        return {}
    hints = get_type_hints(config_class)
    return {f.name: make_setting(f.default, hints[f.name]) for f in fields(config_class) if f.init}


def make_setting(default, hint=None, meaning='', group=''):
    hint = hint or (PLAIN if default is None else type(default))
    return Setting(default, hint | None if default is None else hint, meaning, group)


# ----------------------------------------------------------------------------------------------------------
# Parse: the words of a command line, and the names that a config file sets


def split_arguments(argv):
    """Yields (name, text) for a flag, with text None if it has no value; (None, path) for a config file."""
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith('--'):
            yield None, word
            continue
        name, equals, text = word[2:].partition('=')
        name = name.replace('-', '_')
        if not equals and words and words[0].endswith('.py'):
            raise SystemExit(f'--{name} needs a value, and {words[0]} is a config file; write --{name}=VALUE')
        if not equals:
            text = None if not words or words[0].startswith('--') else words.popleft()
        yield name, text


def run_file(path, known, now):
    """[(name, value, place)] of a config file. Modules, functions and names that begin with _ are its own."""
    if 'input' in known or not os.path.isfile(path):  # data/*/prepare.py read files of other kinds
        raise SystemExit(no_file(path, known))
    # as builtins, the current values can be read by the file and are not mistaken for its assignments
    names = {'__file__': path, '__builtins__': vars(builtins) | now}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        for n in tree.body:  # to Python, n_layer: 2 is an annotation and n_layer == 2 a comparison
            if getattr(n, 'value', 0) is None or type(n) is ast.Expr and type(n.value) in IDLE:
                raise SyntaxError(f'{ast.unparse(n):.60} sets nothing: write NAME = VALUE',
                                  ('', n.lineno, 0, ''))
        exec(compile(tree, path, 'exec'), names)
    except Exception as error:
        rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        row = rows[-1] if rows else getattr(error, 'lineno', 1)
        reason = ' '.join(str(getattr(error, 'msg', error)).split())
        raise SystemExit(f'{path}, line {row} does not run: {type(error).__name__}: {reason}') from None
    lines = {node.id: f', line {node.lineno}' for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    # a function under the name of a flag is a mistake, not a helper: convert refuses it
    return [(name, value, f'{path}{lines.get(name, "")}: {name}') for name, value in names.items()
            if name[0] != '_' and (name in known or not (callable(value) or isinstance(value, ModuleType)))]


def no_file(word, known):
    """The message for a word that is neither a flag nor a config file."""
    kind = 'flag' if 'input' in known else 'config file'
    key = word.strip('-–—').split('=')[0].replace('-', '_')
    if key in known or kind == 'flag':
        return f'{word} is no {kind}; did you mean --{"" if key in known else "input="}{word.lstrip("-–—")}?'
    place = Path('config') if os.path.isdir('config') else HERE / 'config'
    files = {p.stem: p for p in sorted([*Path(word).parent.glob('*.py'), *place.glob('*.py')])}
    near = [] if os.path.isdir(word) else get_close_matches(Path(word).stem, files, 1)
    remedy = f'did you mean {files[near[0]]}?' if near else f'give a file of {place} or a flag; see --help'
    return f'{word} {"is a folder" if os.path.isdir(word) else "does not exist"}; {remedy}'


# ----------------------------------------------------------------------------------------------------------
# Convert: the text of a flag, or the value in a config file, to a type that the setting takes

RULES = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a string', tuple: 'a list of numbers',
         NoneType: 'None'}
NOT_FINITE, IDLE = ('nan', 'inf', 'infinity'), (ast.Compare, ast.Dict, ast.List, ast.Tuple, ast.Name)


def convert(value, setting, label, is_flag):
    """
    The value as a type that the setting takes. Ints and floats stand in for each other where nothing is lost.
    is_flag: the value is text from the command line, None if there was none.
    """
    types, written = types_of(setting), value if is_flag else repr(value)
    if is_flag and value is None:
        raise SystemExit(f'{label} needs a value; write {label}={True if bool in types else "VALUE"}')
    if is_flag:
        value = parse(value, types)
    # type(value), because isinstance takes True for an int
    value = int_as_float(value, types)
    if type(value) is float and float not in types and int in types:
        # beyond 2**53 a float no longer tells which integer was written
        value = int(value) if value.is_integer() and abs(value) <= 2**53 else value
    rule = ' or '.join(RULES.get(kind, str(kind)) for kind in dict.fromkeys(types))
    if type(value) is float and float in types and not math.isfinite(value):
        rule = 'a finite number'
    elif type(value) in types:
        return value
    default = 'no default' if setting.default is MISSING else f'default {setting.default!r}'
    raise SystemExit(f'{label}={written} must be {rule} ({default})')


def int_as_float(value, types):
    """An int where only a float is taken, as a float: inf if it is too large for one."""
    if type(value) is int and int not in types and float in types:
        return float(value) if abs(value) <= sys.float_info.max else math.inf
    return value


def parse(text, types):
    """The value that a config file would give for the text of a flag: the text itself, or a literal."""
    # literal_eval would warn about some texts
    if types == (str,):
        return text
    words = {'true': True, 'false': False, 'none': None}
    if bool in types and int not in types:
        words |= {'1': True, '0': False}
    if float in types and str not in types and text.lstrip('+-').lower() in NOT_FINITE:
        return math.nan
    try:
        value = words[text] if text in words else ast.literal_eval(text)
    except Exception:
        value = text
    return text if str in types and (type(value) not in types or type(value) is str) else value


# ----------------------------------------------------------------------------------------------------------
# Help: the script's docstring, then its settings and the model flags with the comments of the source

WIDTH = 110


def help_text(script, settings, config_class, own, model):
    about = (settings.get('__doc__') or '').strip()
    lines = [f'usage: python {script}{"" if "input" in own else " [config/FILE.py ...]"} [--key=value ...]',
             '       --key value means --key=value; arguments apply in order, and later ones win']
    lines += ['', about] if about else []
    if '__file__' in settings:
        own = describe(own, Path(settings['__file__']).read_text(encoding='utf-8'))
    lines += section(f'settings of {script}:', own)
    lines += section('model flags:', describe_model(config_class, model)) if model else []
    return '\n'.join(lines)


def script_name(settings):
    """A script as a user of this repository would type it."""
    path = Path(settings.get('__file__', 'this script'))
    path = path.resolve() if path.exists() else path
    return path.relative_to(HERE).as_posix() if HERE in path.parents else path.name


def section(title, settings):
    lines, group = ['', title], ''
    for name, setting in settings.items():
        if setting.group != group:
            lines += ['', f'  {setting.group}']
        group = setting.group
        default = '' if setting.default is MISSING else repr(setting.default)
        first, *more = textwrap.wrap(setting.meaning, WIDTH - 41, break_on_hyphens=False) or ['']
        lines.append(f'    {f"--{name}={default}":<36} {first}'.rstrip())
        lines += [' ' * 41 + line for line in more]
    return lines


def describe(settings, source, heading=''):
    """The settings that a source assigns, with its meanings and groups; heading: the first group's."""
    found = {}
    for name, _, meaning, group in assignments(source):
        if name in settings and name not in found:
            found[name] = settings[name]._replace(meaning=meaning, group=group or heading)
    return found


def describe_model(config_class, model):
    """The model flags, class by class where the config inherits groups (last section of this file)."""
    classes = [cls for cls in config_class.__mro__ if inspect.get_annotations(cls).keys() & model.keys()]
    found = {}
    for cls in classes:
        heading = heading_of(cls) if len(classes) > 1 else ''
        found |= describe(model, textwrap.dedent(inspect.getsource(cls)), heading)
    for name, f in config_class.__dataclass_fields__.items():
        if f.metadata:
            found[name] = found[name]._replace(meaning=full_meaning(f, found[name].meaning))
    return found


def full_meaning(f, meaning):
    """A flag's comment, with the words of its table where the comment leaves some out, and its condition."""
    table, (_, own) = f.metadata['table'], f.metadata['when']
    parts = [meaning] if meaning else []
    if table and f.name.endswith('_pattern'):
        parts.append(legend(table))
    elif table and not all(str(word) in meaning for word in table):
        parts.append(f'one of {", ".join(map(str, table))}')
    if own:
        parts.append(only_when(own))
    return '; '.join(parts)


def only_when(conditions):
    return 'only when ' + ' and '.join(in_words(*condition) for condition in conditions.items())


def heading_of(cls):
    """The first line of a group's docstring, or its class name in words; then its condition."""
    heading = inspect.cleandoc(cls.__doc__).split('\n')[0].rstrip('.')
    if heading.startswith(f'{cls.__name__}('):  # @dataclass wrote it
        heading = re.sub('(?<=[a-z])(?=[A-Z][a-z])', ' ', cls.__name__.removesuffix('Flags'))
    when = getattr(cls, 'when', {})
    return f'{heading} ({only_when(when)})' if when else heading


def assignments(source):
    """
    Yields (name, node, meaning, group) of what a script assigns at its top level, up to its call of
    `configure`, or of what a class assigns.

    The meaning is the comment behind the value; a single comment line above is then the heading of a group,
    which holds for what follows as well. With no comment behind, the meaning is the lines above.
    """
    tree, lines, comments, group = ast.parse(source), source.split('\n'), {}, ''
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.strip('# ')
    body = tree.body[0].body if [type(node) for node in tree.body] == [ast.ClassDef] else tree.body
    for node in body:
        calls = (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))
        if 'configure' in calls:
            return
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(target, ast.Name):
            continue
        top = node.lineno
        while top > 1 and lines[top - 2].startswith(' ' * node.col_offset + '#'):
            top -= 1
        above = [comments[row] for row in range(top, node.lineno) if comments[row].strip('-')]
        if node.end_lineno in comments and len(above) == 1:
            group = above[0]
        yield target.id, node, comments.get(node.end_lineno, ' '.join(above)), group


# ----------------------------------------------------------------------------------------------------------
# Flags in groups. A group is a dataclass in the chapter of its block. One line says everything about a flag:
# default, meaning (the comment), range, table of words, and the other flags beside which it means anything.
# The config inherits the groups, and refuses a flag that would be ignored.
#
#     @flags(attn='mla')                                 # the group means something only when attn is mla
#     class LatentFlags:
#         kv_rank: int | None = None                     # an int is at least 1 and a float above 0,
#         z_weight: float = flag(0.0, least=0)           # unless the flag says otherwise
#         v_head_dim: int | None = flag(None, like='head_dim')   # None stands for the value of head_dim
#         ffn_limit: float = flag(7.0, ffn='swiglu_clip')       # means something only when ffn is swiglu_clip
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
            f = f if hasattr(f, 'metadata') else flag(f)
            setattr(cls, name, f)
            f.metadata = {**f.metadata, 'when': (when, f.metadata['when'])}
        cls.when = when
        return dataclass(kw_only=True)(cls)
    return group


class Flags:
    """The last parent of a config, after its groups: checks each flag, then calls their fill and rules."""

    def __post_init__(self):
        flags = [f for f in fields(self) if f.metadata]  # a subclass may have plain fields beside them
        for f in flags:
            self._check_value(f)
        for f in flags:
            missing = getattr(self, f.name) != f.default and self.missing(f.name)
            self._must(f.name, not missing, f'be left out unless {missing}')
        groups = [group for group in type(self).__mro__ if self._applies(group)]
        for group in groups:
            self._fill(group)
        for group in groups:
            for name, ok, must in vars(group)['rules'](self) if 'rules' in vars(group) else ():
                self._must(name, ok, must)

    @classmethod
    def unchecked(cls, **values):
        """A config of these values, neither checked nor filled in; `missing` can be asked of it."""
        config = object.__new__(cls)
        vars(config).update({f.name: f.default for f in fields(cls)} | values)
        return config

    def missing(self, name):
        """What the flag `name` lacks beside it, in words; '' where it means something."""
        for when in self.__dataclass_fields__[name].metadata.get('when', ()):
            for other, wanted in when.items():
                missing = self.missing(other) if self._holds(other, wanted) else in_words(other, wanted)
                if missing:
                    return missing
        return ''

    def _holds(self, other, wanted):
        """Whether the flag `other` has a value that a condition wants."""
        value = getattr(self, other)
        if other.endswith('_pattern'):
            return bool(set(value[:self.n_layer]) & set(wanted))
        if wanted is SET:
            return value != self.__dataclass_fields__[other].default
        return value in (wanted if isinstance(wanted, tuple) else (wanted,))

    def _applies(self, group):
        """Whether the flags of a group mean anything beside the others."""
        return all(self._holds(*condition) for condition in vars(group).get('when', {}).items())

    def _fill(self, group):
        """Replace the Nones that stand for a value, where the flag means something."""
        values = vars(group)['fill'](self) if 'fill' in vars(group) else {}
        for name in vars(group).get('__annotations__', ()):
            f = self.__dataclass_fields__[name]
            if f.metadata.get('like') and not self.missing(name):
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
        value = int_as_float(value, types)
        self._must(f.name, type(value) in types, f'be {" or ".join(RULES.get(t, t.__name__) for t in types)}')
        if tuple in types and type(value) is tuple:
            self._must(f.name, all(type(x) in (int, float) for x in value), 'hold numbers')
            value = tuple(int_as_float(x, (float,)) for x in value)
        setattr(self, f.name, value)
        if f.name.endswith('_pattern'):
            self._must(f.name, value and set(value) <= table.keys(), f'be letters of {legend(table)}')
        elif table:
            self._must(f.name, value in table, f"be one of {', '.join(map(str, table))}")
        for x in value if type(value) is tuple else (value,):
            if type(x) in (int, float):
                self._check_range(f, x)

    def _check_range(self, f, x):
        self._must(f.name, type(x) is int or math.isfinite(x), 'be a finite number')
        a_count = type(x) is int and float not in types_of(f)
        limits = f.metadata['limits'] or ({'least': 1} if a_count else {'above': 0})
        self._must(f.name, *within(x, limits))


def within(x, limits):
    """Whether x keeps its limits, such as {'least': 0, 'below': 1}, and the rule in words."""
    ok = all(LIMITS[name][1](x, limit) for name, limit in limits.items())
    return ok, 'be ' + ' and '.join(f'{LIMITS[name][0]} {limit}' for name, limit in limits.items())


def types_of(f):
    return get_args(f.type) or (f.type,)


def legend(table):
    """The letters of a pattern and what they stand for."""
    return ', '.join(f'{letter} ({entry.meaning})' if hasattr(entry, 'meaning') else letter
                     for letter, entry in table.items())


def in_words(other, wanted):
    """A condition as a sentence says it."""
    if wanted is SET:
        return f'{other} is set'
    if other.endswith('_pattern'):
        article = 'an' if wanted in 'aefhmnrs' else 'a'
        return f'{other} has ' + (f'one of {", ".join(wanted)}' if wanted[1:] else f'{article} {wanted!r}')
    return f'{other} is {" or ".join(wanted)}' if isinstance(wanted, tuple) else f'{other}={wanted}'
