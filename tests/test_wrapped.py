"""
The text part of models of images and text: logits equal to `transformers`, whose classes make the files, for
inputs of text alone. Files of Mamba's authors, without model_type.
"""
import functools
import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from checkpoints import (
    CASES,
    GEMMA,
    NEW,
    WINDOW,
    Case,
    T,
    V,
    assert_logits,
    config_of,
    greedy,
    load,
    load_reference,
    logits_of,
    one_sentence,
    published,
    redraw,
    safetensors_torch,
    transformers,
)

from model import GPT
from nanoblocks.pretrained import convert, texts
from nanoblocks.pretrained.families import FAMILIES

EYE = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=16,
           patch_size=8)
QWEN_EYE = dict(hidden_size=16, intermediate_size=20, depth=1, num_heads=2, patch_size=8, out_hidden_size=36,
                num_position_embeddings=16)
LLAMA_EYE = EYE | dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
TIED = {'tie_word_embeddings': True}
UNTIED = {'tie_word_embeddings': False}


class Whole(NamedTuple):
    """A model of images and text, of which the text part is a case."""
    model_type: str
    case: Case
    vision: dict
    more: dict


# of the text part alone, transformers caps the logits too; no Gemma 3 was published with a cap
SCALED = Case('gemma3_text', {**CASES['gemma3-scaled'].flags, 'final_logit_softcapping': None})
WHOLES = {
    'gemma3': Whole('gemma3', Case('gemma3_text', {**GEMMA, 'num_hidden_layers': 7}), EYE,
                    {'mm_tokens_per_image': 4, **TIED}),
    'gemma3-scaled': Whole('gemma3', SCALED, EYE, {'mm_tokens_per_image': 4, **TIED}),
    'mistral3': Whole('mistral3', CASES['mistral-full'], EYE, UNTIED),
    'mistral3-tied': Whole('mistral3', Case('mistral', WINDOW), EYE, TIED),
    'llama4': Whole('llama4', CASES['llama4'], LLAMA_EYE, UNTIED),
    'qwen3_5': Whole('qwen3_5', CASES['qwen3_5'], QWEN_EYE, UNTIED),
    'qwen3_5-tied': Whole('qwen3_5', CASES['qwen3_5'], QWEN_EYE, TIED),
    'qwen3_5_moe': Whole('qwen3_5_moe', CASES['qwen3_5_moe'], QWEN_EYE, UNTIED)}
every_whole = pytest.mark.parametrize('name', WHOLES)


def make(folder, name):
    """Two folders, in the styles of transformers 5 and of what was published, and what transformers says."""
    whole = WHOLES[name]
    config_class = type(transformers.AutoConfig.for_model(whole.model_type))
    config = config_class(text_config=config_of(whole.case).to_dict(), vision_config=dict(whole.vision),
                          **whole.more)
    torch.manual_seed(0)
    model = redraw(transformers.AutoModelForImageTextToText.from_config(config))
    made = SimpleNamespace(case=whole.case, source=None, folder=folder / 'now', old_folder=folder / 'old')
    model.save_pretrained(made.folder, save_original_format=False)
    model.save_pretrained(made.old_folder)
    path = made.old_folder / 'config.json'
    config = json.loads(path.read_text())
    config['text_config'] = published({'dtype': 'float32', **config['text_config']}, whole.case)
    if config_class().tie_word_embeddings == config['tie_word_embeddings']:
        del config['tie_word_embeddings']
    path.write_text(json.dumps(config))
    made.model = load_whole(made.folder)
    for seed in range(40):
        made.idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
        if greedy(made):
            return made
    raise AssertionError(f'{name}: no prompt leads to a clear choice of all {NEW} tokens')


def load_whole(folder):
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', experts_implementation='eager').eval()
    # in transformers 5.24 the whole Llama 4 fails without an image; its text part is a model with a head
    return model.language_model if model.config.model_type == 'llama4' else model


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return functools.cache(lambda name: make(tmp_path_factory.mktemp(name), name))


@every_whole
@torch.no_grad()
def test_the_text_part_equals_transformers(made, name, capsys):
    made, configs = made(name), []
    for folder in (made.folder, made.old_folder):
        capsys.readouterr()
        model = load(folder)
        said = capsys.readouterr().out
        assert said.count('\n') == 1 and 'left out: ' in said
        assert ('visual' if 'qwen' in name else 'multi_modal_projector, vision_') in said
        assert_logits(model, made, f'{name} in {folder.name}')
        tokens = model.generate(made.prompt, NEW, temperature=0)
        assert tokens.tolist() == made.tokens.tolist()
        configs.append(model.config)
    assert configs[0] == configs[1]


@every_whole
@torch.no_grad()
def test_the_published_config_means_the_same(made, name):
    made = made(name)
    assert torch.equal(logits_of(load_whole(made.old_folder), made), made.logits)


@every_whole
@torch.no_grad()
def test_the_export_is_the_text_family(made, name, tmp_path):
    made = made(name)
    model = load(made.old_folder)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert 'text_config' not in config and config['architectures'][0].endswith('ForCausalLM')
    theirs, info = load_reference(tmp_path, made.case, output_loading_info=True)
    assert not any(info.values()), f'{name}: {info}'
    assert_logits(theirs, made, f'{name}, exported')
    assert torch.equal(logits_of(load(tmp_path), made), logits_of(model, made))


# as it was published for the model of 4 billion weights
GEMMA_3_4B = {
    'architectures': ['Gemma3ForConditionalGeneration'], 'boi_token_index': 255999,
    'eoi_token_index': 256000, 'eos_token_id': [1, 106], 'image_token_index': 262144,
    'initializer_range': 0.02, 'mm_tokens_per_image': 256, 'model_type': 'gemma3',
    'text_config': {'hidden_size': 2560, 'intermediate_size': 10240, 'model_type': 'gemma3_text',
                    'num_hidden_layers': 34, 'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
                    'sliding_window': 1024},
    'torch_dtype': 'bfloat16', 'transformers_version': '4.50.0.dev0', 'vision_config': {}}


def test_sizes_that_a_text_part_leaves_out_are_those_of_transformers(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(GEMMA_3_4B))
    hf = convert.read_config(tmp_path)
    config, theirs = convert.config_of(hf, FAMILIES['gemma3_text']), transformers.Gemma3Config(**GEMMA_3_4B)
    theirs = theirs.text_config
    for key in ('vocab_size', 'num_attention_heads', 'num_key_value_heads', 'head_dim', 'rms_norm_eps',
                'max_position_embeddings', 'hidden_size', 'query_pre_attn_scalar'):
        assert hf[key] == getattr(theirs, key), key
    assert config.layer_pattern == 'wwwwwa' and config.rope_factor == 8 and config.rope_local_theta == 10000
    assert config.tie and texts.of_folder(tmp_path).ids == {'eos_token_id': [1, 106]}


@pytest.mark.parametrize('change, word', [
    (lambda config: config.pop('text_config'), 'text_config'),
    (lambda config: config.update(text_config='x'), 'text_config'),
    (lambda config: config['text_config'].update(model_type='llama'), 'model_type=llama of text_config'),
    (lambda config: config['text_config'].update(model_type=['x']), 'model_type'),
    (lambda config: config['text_config'].update(hidden_size='x'), 'hidden_size'),
    (lambda config: config.update(model_type='llava'), 'vision_config')])
def test_a_text_part_that_is_not_read_is_refused(made, change, word, tmp_path):
    folder = made('gemma3').folder
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


def test_a_tensor_of_no_known_part_is_refused(made, tmp_path):
    folder = made('gemma3').folder
    tensors = safetensors_torch.load_file(folder / 'model.safetensors')
    safetensors_torch.save_file(tensors | {'model.ear.weight': torch.ones(3)}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    with pytest.raises(ValueError, match='model.ear.weight'):
        GPT.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Mamba's authors


def of_authors(folder, name, reference, **change):
    """The weights of a mamba or mamba2 of transformers in the files of its authors."""
    c = reference.config
    ssm = {'d_state': c.state_size, 'd_conv': c.conv_kernel}
    if name.startswith('mamba2'):
        ssm |= {'layer': 'Mamba2', 'headdim': c.head_dim}
        ssm |= {'ngroups': c.n_groups} if c.n_groups > 1 else {}
    config = {'d_model': c.hidden_size, 'n_layer': c.num_hidden_layers, 'vocab_size': V - 4, 'ssm_cfg': ssm,
              'rms_norm': True, 'residual_in_fp32': True, 'fused_add_norm': True,
              'pad_vocab_size_multiple': 16}
    (folder / 'config.json').write_text(json.dumps(config | change))
    tensors = {key.replace('backbone.embeddings', 'backbone.embedding'): p
               for key, p in reference.state_dict().items()}
    tensors['lm_head.weight'] = tensors['backbone.embedding.weight']
    torch.save(tensors, folder / 'pytorch_model.bin')
    return folder


def reference_of(name):
    flags = dict(vocab_size=64, layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    case = Case(name.partition('-')[0], {**CASES[name].flags, **flags})
    torch.manual_seed(0)
    return redraw(transformers.AutoModelForCausalLM.from_config(config_of(case))).eval()


@pytest.mark.parametrize('name', ['mamba', 'mamba2', 'mamba2-groups'])
@torch.no_grad()
def test_files_of_mambas_authors_are_read(name, tmp_path):
    theirs = reference_of(name)
    model = load(of_authors(tmp_path, name, theirs))
    idx = torch.randint(64, (2, T), generator=torch.Generator().manual_seed(0))
    assert_logits(model, SimpleNamespace(idx=idx, logits=theirs(idx).logits), name)
    assert model.config.tie and model.config.vocab_size == 64
    tokens = model.generate(idx[:, :9], 8, temperature=0)
    assert torch.equal(model(tokens)[0][:, 8:-1].argmax(-1), tokens[:, 9:])
    model.save_pretrained(tmp_path / 'again')
    again, info = load_reference(tmp_path / 'again', Case(name), output_loading_info=True)
    assert again.config.model_type == theirs.config.model_type and not any(info.values())
    assert_logits(again, SimpleNamespace(idx=idx, logits=theirs(idx).logits), f'{name}, exported')


@pytest.mark.parametrize('change, word', [
    ({'attn_layer_idx': [1]}, 'attn_layer_idx'), ({'rms_norm': False}, 'rms_norm'),
    ({'d_intermediate': 64}, 'd_intermediate'),
    ({'ssm_cfg': {'layer': 'Mamba3'}}, 'Mamba3'), ({'ssm_cfg': {'rmsnorm': False}}, 'rmsnorm'),
    ({'ssm_cfg': 3}, 'ssm_cfg'), ({'ssm_cfg': {'layer': []}}, 'ssm_cfg'), ({'d_model': 'x'}, 'd_model'),
    ({'vocab_size': None}, 'vocab_size'), ({'pad_vocab_size_multiple': 0}, 'pad_vocab_size_multiple'),
    ({'ssm_cfg': {'d_state': 'x'}}, 'state_size'), ({'n_layer': 9}, 'backbone.layers.3')])
def test_other_files_of_mambas_authors_are_refused(change, word, tmp_path):
    of_authors(tmp_path, 'mamba', reference_of('mamba'), **change)
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)
