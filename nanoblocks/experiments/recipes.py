"""Published models as flags: which flags a folder is, and which the families read (docs/recipes.md)."""
import json
import os
import re
import shlex
from collections import Counter
from dataclasses import fields
from tempfile import TemporaryDirectory

from model import GPTConfig
from nanoblocks.files import ROOT
from nanoblocks.pretrained import convert
from nanoblocks.pretrained.families import FAMILIES, REFUSED
from nanoblocks.tokenizer import read_json

DEFAULTS = {field.name: field.default for field in fields(GPTConfig)}


def recipes(folders):
    """The flags that a folder in Hugging Face format stands for; without a folder, those of every family."""
    for folder in folders:
        print('\n'.join(recipe_of(folder)))
    if not folders:
        print(f'{shared_in_words()}\n\n{families_table()}')


# ----------------------------------------------------------------------------------------------------------
# One folder, of which only config.json is read


def recipe_of(folder):
    """Lines: the model as a command line of train.py, and the keys that are refused."""
    kind, flags, refused = flags_of_folder(folder)
    yield f'{folder} is a {kind}' + (', but for what is refused' if refused and flags else '') + ':'
    if flags is not None:
        yield ' '.join(['python train.py', *(as_flag(*item) for item in flags.items())])
    for sentence in refused:
        yield f'refused: {sentence}'


def as_flag(name, value):
    value = tuple(value) if isinstance(value, list) else value
    return f'--{name}={shlex.quote(str(value))}'


def flags_of_folder(folder):
    """
    (model_type, the flags of a folder that differ from GPT-2's, why keys are refused). The flags are those of
    what is left without these keys, None where nothing that can be built is left.
    """
    folder = os.path.dirname(folder) if os.path.basename(folder) == 'config.json' else folder
    hf, refused = read_json(os.path.join(folder, 'config.json')), []
    if not hf:
        convert.read_config(folder)     # says what is missing
    with TemporaryDirectory() as copy:
        while True:
            with open(os.path.join(copy, 'config.json'), 'w', encoding='utf-8') as f:
                json.dump(hf, f)
            try:
                read = convert.read_config(copy)
                config = convert.config_of(read, FAMILIES[read['model_type']])
                return read['model_type'], needed(config, read), refused
            except ValueError as error:
                refused.append(str(error).replace(copy, folder))
                key = re.match(r'\w*', str(error)).group()
                if key not in hf or key == 'model_type':
                    return hf.get('model_type'), None, refused
                del hf[key]


def needed(config, hf):
    """The flags without which the config would be another: no defaults, and none that follow from others."""
    flags = convert.flags_of(hf, FAMILIES[hf['model_type']])
    flags = {name: flags[name] for name in DEFAULTS if name in flags and flags[name] != DEFAULTS[name]}
    for name in list(flags):
        rest = {other: value for other, value in flags.items() if other != name}
        try:
            flags = rest if GPTConfig(**rest) == config else flags
        except ValueError:
            continue
    return flags


# ----------------------------------------------------------------------------------------------------------
# All families


def families_table():
    """A line for each model_type."""
    return '\n'.join(['| model_type | its flags | keys that become flags | tested |', '|---|---|---|---|',
                      *(row(kind, family) for kind, family in FAMILIES.items())])


def row(kind, family):
    fixed = [f'{flag}={value}' for flag, value in family.flags.items() if value != DEFAULTS[flag]]
    shared = shared_keys()
    own = [in_words(name, key.flags) for name, key in family.keys.items() if (name, key.flags) not in shared]
    return f'| `{kind}` | `{" ".join(fixed) or "GPT-2"}` | {", ".join(own)} | {", ".join(tested(kind))} |'


def shared_keys():
    """[(key, flags)] of what at least half of the families read alike: told once, above the table."""
    count = Counter((name, key.flags) for family in FAMILIES.values() for name, key in family.keys.items())
    return [pair for pair, n in count.items() if n >= len(FAMILIES) / 2]


def shared_in_words():
    return 'In at least half of the families: ' + ', '.join(in_words(*pair) for pair in shared_keys()) + '.'


def in_words(name, flags):
    return f'`{name}`' if flags == (name,) else f'`{name}`: {" ".join(flags)}'


def tested(kind):
    """In short what each checkpoint of this family is that tests/checkpoints.py compares."""
    path = ROOT / 'tests' / 'checkpoints.py'
    if not path.exists():   # installed without the tests
        return []
    cases = re.findall(r"^    '([^']+)': Case\(\s*'(\w+)'", path.read_text(encoding='utf-8'), re.M)
    return [name.partition('-')[2].replace('-', ' ') or 'plain' for name, model_type in cases
            if model_type == kind]


def refused_table():
    return '\n'.join(['| model_type | why it is refused |', '|---|---|',
                      *(f'| `{kind}` | {why} |' for kind, why in REFUSED.items())])


def page():
    """What docs/recipes.md says between its marks."""
    return f'{shared_in_words()}\n\n{families_table()}\n\n{refused_table()}'
