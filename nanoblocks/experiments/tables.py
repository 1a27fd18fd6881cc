"""
The table of docs/models.md, made from config/: the flags that turn GPT-2, or Llama, into each of them. And
that of docs/recipes.md, made from the families of published checkpoints.

    python -m nanoblocks.experiments.tables     # writes the tables
"""
import ast
import re
from dataclasses import fields

import torch

from model import GPT, GPTConfig
from nanoblocks.experiments import recipes
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.files import ROOT
from nanoblocks.formats import format_quantity

SIZES = ('small', 'medium', 'xl', '1b')     # how the names of model configs end
BASES = {'gpt2_small': 'GPT-2', 'llama_small': 'Llama'}
BEGIN, END = '<!-- made by python -m nanoblocks.experiments.tables -->', '<!-- end of the table -->'


def difference(base, name):
    """['flag=value', ...]: the flags in which the config `name` differs from the config `base`."""
    default = {f.name: f.default for f in fields(GPTConfig)}
    before, after = flags_of_config(base), flags_of_config(name)
    values = {flag: after.get(flag, default[flag]) for flag in after | before}
    return [f'{flag}={value}' for flag, value in values.items() if value != before.get(flag, default[flag])]


def recipe(name):
    """'Llama + `flag=value ...`', from the base that needs fewer flags."""
    differences = {base: difference(base, name) for base in BASES}
    if name in BASES:  # no model is its own base; GPT-2 has none
        del differences[name]
    if name == 'gpt2_small':
        return 'the defaults'
    base = min(differences, key=lambda base: len(differences[base]))
    return f'{BASES[base]} + `{" ".join(differences[base])}`'


def row(name):
    """A model's line, and the key that sorts the lines: dense, experts, state spaces; then the year."""
    docstring = ast.get_docstring(ast.parse((ROOT / 'config' / f'{name}.py').read_text(encoding='utf-8')))
    # every docstring begins with the model and where it was published: Mistral 7B (Jiang et al. 2023, ...
    model, year = re.match(r'(.+?) \(\D*?(\d{4})\b', docstring).groups()
    config = GPTConfig(**flags_of_config(name))
    with torch.device('meta'):
        gpt = GPT(config, seed=None)
    total, active = (format_quantity(gpt.num_params(active)).replace('G', 'B') for active in (False, True))
    size = total if total == active else f'{total}, active {active}'
    order = bool(config.mixers() & set('mrkshz')), 'e' in config.ffns(), year, gpt.num_params()
    return order, f'| {model}, {year} | `{name}` | {recipe(name)} | {size} |'


def models_table():
    names = [path.stem for size in SIZES for path in (ROOT / 'config').glob(f'*_{size}.py')]
    return '\n'.join(['| model | config | flags | parameters |', '|---|---|---|---|',
                      *(line for _, line in sorted(map(row, names)))])


def with_table(text, table=None):
    """The text of docs/models.md, or of another page with a `table`, with the table made anew."""
    before, _, rest = text.partition(BEGIN)
    return f'{before}{BEGIN}\n{table or models_table()}\n{END}{rest.partition(END)[2]}'


if __name__ == '__main__':
    for name, table in (('models', models_table()), ('recipes', recipes.page())):
        page = ROOT / 'docs' / f'{name}.md'
        page.write_text(with_table(page.read_text(encoding='utf-8'), table), encoding='utf-8')
