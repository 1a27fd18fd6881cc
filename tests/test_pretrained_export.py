"""What save_pretrained writes: the family a model came from, dtype, shards; and dtype= of loading."""
import copy
import json
import re

import pytest
import torch
from checkpoints import (
    Case,
    answer_of,
    assert_logits,
    load,
    load_reference,
    made,
    one_sentence,
    ours,
    safetensors_torch,
    transformers,
)
from conftest import build, toy

from model import GPT
from nanoblocks.pretrained.convert import family_for
from nanoblocks.training.checkpoint import contents, save

LLAMA = toy(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False)


def config_in(folder):
    return json.loads((folder / 'config.json').read_text())


# ----------------------------------------------------------------------------------------------------------
# The family


def test_a_model_goes_out_as_the_family_it_came_from(made, tmp_path, capsys):
    """Also through a checkpoint of a run, and with flags that the family has too."""
    model = load(made('mistral-full').folder)
    assert family_for(build(LLAMA))[0] == 'llama', 'the first that fits'
    save(str(tmp_path / 'ckpt.pt'), contents(model, settings={}, meta={}, step=3))
    for name, flags in ((made('mistral-full').folder, {}), (tmp_path / 'ckpt.pt', {}),
                        (made('mistral-full').folder, dict(layer_pattern='w', window=9))):
        GPT.from_pretrained(name, **flags).save_pretrained(tmp_path / 'out')
        config = config_in(tmp_path / 'out')
        assert config['model_type'] == 'mistral' and config['sliding_window'] == flags.get('window')
    assert 'exported as' not in capsys.readouterr().out


def test_a_model_that_left_its_family_goes_out_as_another_which_is_said(made, tmp_path, capsys):
    model = GPT.from_pretrained(made('llama').folder, layer_pattern='w', window=9)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)['model_type'] == 'mistral'
    assert 'exported as mistral and no longer as llama, which was loaded: layer_pattern=w must be letters ' \
        'of a\n' in capsys.readouterr().out
    theirs, info = load_reference(tmp_path, made('llama').case, output_loading_info=True)
    assert theirs.config.sliding_window == 9 and not any(info.values())


# ----------------------------------------------------------------------------------------------------------
# 16 bits


# a norm of 1 + w, weights times factors, experts and a bias that is a buffer, and what is left of 1
@pytest.mark.parametrize('name', ['llama', 'gemma2', 'falcon_h1', 'deepseek_v3', 'gpt_oss', 'rwkv', 'jamba'])
@torch.no_grad()
def test_loading_in_16_bits_rounds_as_casting_does(made, ours, name, tmp_path):
    made = made(name)
    want = load(made.folder, dtype='bfloat16').state_dict()
    for key, p in load(made.folder).to(torch.bfloat16).state_dict().items():
        assert p.dtype == want[key].dtype and torch.equal(p, want[key]), key
    assert want['wte.weight'].dtype == torch.bfloat16
    # of files that are of 16 bits too, nothing is lost
    copy.deepcopy(made.model).to(torch.bfloat16).save_pretrained(tmp_path)
    again = load(tmp_path)
    for key, p in load(tmp_path, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(p, again.state_dict()[key].to(p.dtype)), key


@pytest.mark.parametrize('name', ['gpt2', 'gemma2', 'deepseek_v3', 'mamba2-groups', 'bert', 'zamba2'])
@torch.no_grad()
def test_an_export_in_16_bits_is_that_of_the_rounded_model(made, ours, name, tmp_path):
    made = made(name)
    ours(name).save_pretrained(tmp_path, dtype='bfloat16', max_shard_size='20KB')
    assert config_in(tmp_path)['dtype'] == 'bfloat16'
    for file in tmp_path.glob('*.safetensors'):
        for key, p in safetensors_torch.load_file(file).items():
            kept = key.endswith('e_score_correction_bias')
            assert p.dtype == (torch.float32 if kept else torch.bfloat16), key
    theirs, info = load_reference(tmp_path, made.case, output_loading_info=True)
    assert not any(info.values()), info
    assert_logits(load(tmp_path), answer_of(theirs, made), name)


def test_a_model_of_16_bits_is_exported_as_it_is(made, tmp_path):
    model = load(made('qwen3').folder, dtype='float16')
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)['dtype'] == 'float16'
    again = load(tmp_path, dtype='float16').state_dict()
    assert all(torch.equal(p, again[key]) for key, p in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize('name', ['llama', 'mixtral', 'mamba2-groups', 'qwen2-tied-yarn'])
@torch.no_grad()
def test_shards_are_like_those_of_transformers(made, ours, name, tmp_path):
    made = made(name)
    made.model.save_pretrained(tmp_path / 'theirs', max_shard_size='50KB')
    ours(name).save_pretrained(tmp_path / 'ours', max_shard_size='50KB')
    indices = [json.loads((tmp_path / side / 'model.safetensors.index.json').read_text())
               for side in ('theirs', 'ours')]
    assert indices[0]['metadata'] == indices[1]['metadata']
    assert indices[0]['weight_map'].keys() == indices[1]['weight_map'].keys()
    for n, index in enumerate(indices):
        files = set(index['weight_map'].values())
        assert files == {f'model-{i:05}-of-{len(files):05}.safetensors' for i in range(1, len(files) + 1)}
        assert files == {path.name for path in (tmp_path / ('theirs', 'ours')[n]).glob('*.safetensors')}
        assert len(files) > 2
    for file in files:
        tensors = safetensors_torch.load_file(tmp_path / 'ours' / file)
        assert sum(p.nbytes for p in tensors.values()) <= 50e3 or len(tensors) == 1
        assert {key for key, at in index['weight_map'].items() if at == file} == tensors.keys()
    theirs, info = load_reference(tmp_path / 'ours', made.case, output_loading_info=True)
    assert not any(info.values()), info
    assert_logits(theirs, made, name)
    assert_logits(load(tmp_path / 'ours'), made, name)


def test_an_export_replaces_the_one_before(tmp_path):
    """Or what is read would be a part of each."""
    old, new = build(LLAMA, seed=1), build(LLAMA, seed=2)
    (tmp_path / 'other.safetensors').write_text('')
    for size, n in (('20KB', 7), ('50GB', 1), (40_000, 4)):
        old.save_pretrained(tmp_path, max_shard_size='10KB')
        new.save_pretrained(tmp_path, max_shard_size=size)
        files = list(tmp_path.glob('model*.safetensors'))
        assert (len(files) > 1) == (n > 1) == (tmp_path / 'model.safetensors.index.json').exists()
        assert all(torch.equal(p, load(tmp_path).state_dict()[key]) for key, p in new.state_dict().items())
    assert (tmp_path / 'other.safetensors').exists()


def test_the_files_are_what_the_library_writes(tmp_path):
    model = build(LLAMA)
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file(tensors, tmp_path / 'again', metadata={'format': 'pt'})
    first, again = path.read_bytes(), (tmp_path / 'again').read_bytes()
    sizes = [8 + int.from_bytes(data[:8], 'little') for data in (first, again)]
    headers = [json.loads(data[8:size]) for data, size in zip((first, again), sizes)]
    told = [{key: (value['dtype'], value['shape']) for key, value in header.items() if 'dtype' in value}
            for header in headers]
    assert told[0] == told[1] and headers[0]['__metadata__'] == headers[1]['__metadata__']
    assert sizes[0] % 8 == 0 and len(first) - sizes[0] == len(again) - sizes[1]


def test_generation_is_configured_as_transformers_configures_it(made, tmp_path):
    """From the tokens in config.json, where a checkpoint has no generation_config.json."""
    folder = made('llama').folder
    model = load(folder)
    model.texts = model.texts._replace(files={}, ids={'bos_token_id': 1, 'eos_token_id': [2, 5]})
    model.save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, [2, 5])
    assert load_reference(tmp_path, Case('llama')).generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize('options, words', [
    (dict(dtype='int8'), 'dtype=int8 must be one of float32, bfloat16, float16'),
    (dict(dtype='half a byte'), 'dtype=half a byte must be one of'),
    (dict(dtype=['float32']), 'must be one of float32'),
    (dict(max_shard_size='5 potatoes'), 'max_shard_size=5 potatoes must be a number of bytes, or a text'),
    (dict(max_shard_size=0), 'max_shard_size=0 must be'), (dict(max_shard_size='0GB'), 'max_shard_size=0GB'),
    (dict(max_shard_size=1.5), 'max_shard_size=1.5 must')])
def test_wrong_options_are_refused_before_anything_is_written(options, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        build(LLAMA).save_pretrained(tmp_path / 'out', **options)
    one_sentence(error.value)
    assert not (tmp_path / 'out').exists()
    if 'dtype' in options:
        with pytest.raises(ValueError, match=re.escape(words)):
            GPT.from_pretrained(tmp_path, **options)
