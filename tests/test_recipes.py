"""bench.py recipes: what a folder is in flags, what is refused, and the table of families."""
import json
import re
import shlex

import pytest
from checkpoints import ABSENT, CASES, config_of, published
from conftest import ROOT

from configurator import configure, settings_of
from model import GPTConfig
from nanoblocks.experiments import recipes
from nanoblocks.pretrained import convert
from nanoblocks.pretrained.families import FAMILIES, REFUSED
from nanoblocks.pretrained.wrapped import WRAPPED


def write(folder, **changes):
    """config.json of a small Llama."""
    config = dict(model_type='llama', vocab_size=61, hidden_size=36, num_hidden_layers=3,
                  num_attention_heads=6, num_key_value_heads=2, intermediate_size=51) | changes
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)


def test_a_folder_is_a_command_line_of_train(tmp_path):
    """Its flags, read as train.py reads them, are the model's."""
    skip, read = settings_of(ROOT / 'train.py'), 0
    for name, case in CASES.items():
        config = json.loads(config_of(case).to_json_string(use_diff=False))
        if case.old is not None:
            config = published({'dtype': None} | config, case)
        (tmp_path / 'config.json').write_text(json.dumps(config))
        try:
            hf = convert.read_config(tmp_path)
            want = convert.config_of(hf, FAMILIES[hf['model_type']])
        except ValueError:
            continue
        title, command = recipes.recipe_of(str(tmp_path / 'config.json'))
        program, script, *given = shlex.split(command)
        assert (program, script) == ('python', 'train.py') and f' is a {hf["model_type"]}:' in title
        flags = configure({}, GPTConfig, given, skip=skip)
        assert GPTConfig(**flags) == want, name
        assert len(given) == len(flags), name
        read += 1
    assert read > 0.8 * len(CASES)


def test_defaults_and_what_follows_are_left_out(tmp_path):
    _, command = recipes.recipe_of(write(tmp_path, head_dim=6, rope_theta=10000.0, hidden_act='silu',
                                         vocab_size=recipes.DEFAULTS['vocab_size']))
    assert set(command.split()) == {
        'python', 'train.py', '--n_layer=3', '--n_head=6', '--n_embd=36', '--bias=False', '--pos=rope',
        '--norm=rmsnorm', '--norm_eps=1e-06', '--n_kv_head=2', '--ffn=swiglu', '--ffn_width=51',
        '--tie=False'}


@pytest.mark.parametrize('changes, refused, model', [
    (dict(hidden_act='mish'), ['hidden_act=mish'], True),
    (dict(hidden_act='mish', rms_norm_eps='small'), ['rms_norm_eps', 'hidden_act=mish'], True),
    (dict(hidden_size=ABSENT), ['hidden_size'], False),
    (dict(model_type='mixtral9'), ['model_type=mixtral9'], False),
    (dict(model_type='t5gemma'), [f'model_type=t5gemma .*{REFUSED["t5gemma"]}'], False)])
def test_each_key_that_is_refused_is_named(changes, refused, model, tmp_path):
    first, *lines = recipes.recipe_of(write(tmp_path, **changes))
    assert (lines[0].startswith('python train.py --')) == model
    assert ('but for what is refused' in first) == model
    lines = lines[model:]
    assert len(lines) == len(refused)
    for line, words in zip(lines, refused):
        assert re.match(f'refused: .*{words}', line) and '/tmp' not in line.replace(str(tmp_path), ''), line


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='must hold config.json'):
        recipes.recipes([str(tmp_path)])


def test_every_family_has_a_row_with_its_checkpoints():
    rows = {re.match(r'\| `(\w+)`', line)[1]: line for line in recipes.families_table().splitlines()[2:]}
    assert rows.keys() == FAMILIES.keys()
    of_type = {}
    for name, case in CASES.items():
        of_type.setdefault(case.model_type, []).append(name)
    for kind in FAMILIES:
        # a config class has another name than the model type in a few
        assert len(recipes.tested(kind)) == len(of_type.get(kind, ())), kind
        assert all(f'{flag}={value}' in rows[kind] for flag, value in FAMILIES[kind].flags.items()
                   if value != recipes.DEFAULTS[flag])
    assert all(why in recipes.refused_table() for why in REFUSED.values())


def test_pages_count_the_families_and_name_each():
    page = (ROOT / 'docs' / 'checkpoints.md').read_text(encoding='utf-8')
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    kinds = {case.model_type for case in CASES.values()}
    words = ' '.join(page.split())
    assert f'{len(FAMILIES)} families are read' in words and f'[{len(FAMILIES)} families' in readme
    assert f'compares {len(CASES)} small checkpoints of {len(kinds)} families' in words
    assert FAMILIES.keys() - kinds == {'kimi_k2'}
    assert {kind for kind in [*FAMILIES, *REFUSED, *WRAPPED] if f'`{kind}`' not in page} == set()
