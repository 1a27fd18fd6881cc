"""Files of checkpoints: shards, 16 bits, pickles, damage, memory; and nanoGPT's ckpt.pt."""
import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import (
    BOTH,
    CLASSIC,
    DENSE,
    ENCODERS,
    MIXTURES,
    RECURRENT,
    Marker,
    V,
    answer_of,
    assert_logits,
    copy_of,
    layers,
    load,
    load_reference,
    logits_of,
    made,
    one_sentence,
    ours,
    safetensors_torch,
    shard,
    transformers,
)
from conftest import ROOT

from model import GPT, GPTConfig
from nanoblocks.pretrained.files import TensorFiles


@pytest.mark.parametrize('name', ['gpt2', 'mixtral', 'llama4', 'falcon-new', 'mamba2-groups',
                                  *RECURRENT, *ENCODERS, *BOTH, *CLASSIC, *DENSE, *MIXTURES])
@torch.no_grad()
def test_shards_read_as_one_file(made, ours, name, tmp_path):
    made = made(name)
    made.model.save_pretrained(tmp_path, max_shard_size='40KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    # the vendor's own files lie beside them on the hub
    safetensors_torch.save_file({'other': torch.zeros(1)}, tmp_path / 'consolidated.safetensors')
    assert torch.equal(logits_of(load(tmp_path), made), logits_of(ours(name), made))


def published_bert(config, tensors):
    """The names of the first files of BERT, and all that they hold beside a model of masked tokens."""
    for name in list(tensors):
        old = name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
        tensors[old] = tensors.pop(name)
    other = {'bert.pooler.dense.weight': (36, 36), 'bert.pooler.dense.bias': (36,),
             'cls.seq_relationship.weight': (2, 36), 'cls.seq_relationship.bias': (2,)}
    tensors |= {name: torch.ones(shape) for name, shape in other.items()}
    tensors |= {'bert.embeddings.position_ids': torch.arange(48).unsqueeze(0),
                'cls.predictions.decoder.weight': tensors['bert.embeddings.word_embeddings.weight'].clone()}


def with_decoder_bias(config, tensors):
    """A second bias of the head, which counts."""
    for name in list(tensors):
        if name in ('cls.predictions.bias', 'lm_head.bias'):
            tensors[name.replace('bias', 'decoder.bias')] = tensors[name] + 1


def decoder_bias_alone(config, tensors):
    with_decoder_bias(config, tensors)
    tensors.pop('cls.predictions.bias', None), tensors.pop('lm_head.bias', None)


@pytest.mark.parametrize('name, change', [
    ('bert', published_bert), *((name, change) for name in ('bert', 'roberta', 'nomic_bert')
                                for change in (with_decoder_bias, decoder_bias_alone))])
@torch.no_grad()
def test_published_files_of_encoders_are_read_as_transformers_reads_them(made, name, change, tmp_path):
    made = made(name)
    theirs = load_reference(copy_of(made, tmp_path, change), made.case)
    model = load(tmp_path)
    logits = theirs(made.idx).logits
    assert torch.equal(logits, made.logits) == (change is published_bert)
    assert_logits(model, SimpleNamespace(idx=made.idx, logits=logits), name)
    assert model.config.tie


def copies(config, tensors):
    """The embedding once for each side, and what nothing reads, as the first files of T5 and BART have it."""
    place, shared = ('', 'shared.weight') if 'shared.weight' in tensors else ('model.', 'model.shared.weight')
    for side in ('encoder', 'decoder'):
        tensors[f'{place}{side}.embed_tokens.weight'] = tensors[shared].clone()
        if place:
            tensors[f'{place}{side}.version'] = torch.ones(1)
        else:
            cross = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
            tensors[cross] = torch.ones(8, 6)


def without_logits_bias(config, tensors):
    """A BART without head, as bart-base is: names without their prefix."""
    del tensors['final_logits_bias']
    for name in list(tensors):
        tensors[name.removeprefix('model.')] = tensors.pop(name)


@pytest.mark.parametrize('name, change', [
    ('t5', copies), ('bart', copies), ('bart', without_logits_bias)])
@torch.no_grad()
def test_published_files_of_encoders_with_decoders_are_read(made, name, change, tmp_path):
    made = made(name)
    theirs = load_reference(copy_of(made, tmp_path, change), made.case)
    want, model = answer_of(theirs, made), load(tmp_path)
    assert torch.equal(want.logits, made.logits) == (change is copies)
    assert_logits(model, want, name)
    model.save_pretrained(tmp_path / 'again')
    assert_logits(load_reference(tmp_path / 'again', made.case), want, f'{name}, exported')


# of minimax, transformers rounds the tables of decays as well
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gpt_oss', 'deepseek_v3', 'mamba2', 'jamba', *ENCODERS,
                                  *BOTH, *CLASSIC, *(name for name in RECURRENT if name != 'minimax')])
@torch.no_grad()
def test_sixteen_bit_files_become_fp32(made, name, tmp_path):
    made = made(name)
    copy.deepcopy(made.model).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theirs = load_reference(tmp_path, made.case)
    assert_logits(model, answer_of(theirs, made), name)


@pytest.mark.parametrize('name, prefix', [('gpt2', 'transformer.'), ('bloom', 'transformer.')])
def test_the_prefix_may_be_missing(made, name, prefix, tmp_path):
    def drop(config, tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)
    assert_logits(load(copy_of(made(name), tmp_path, drop)), made(name), name)


@pytest.mark.parametrize('name, strays', [
    ('gpt2', {'transformer.h.0.attn.bias': (1, 1, 48, 48), 'transformer.h.0.attn.masked_bias': ()}),
    ('gpt_neox', {'gpt_neox.layers.1.attention.bias': (1, 1, 32, 32),
                  'gpt_neox.layers.1.attention.masked_bias': (),
                  'gpt_neox.layers.1.attention.rotary_emb.inv_freq': (3,)}),
    ('llama', {'model.layers.2.self_attn.rotary_emb.inv_freq': (5,)}),
    ('gpt_neo', {'transformer.h.0.attn.attention.bias': (1, 1, 48, 48),
                 'transformer.h.0.attn.attention.masked_bias': ()}),
    # the layer after the last predicts a second token
    ('deepseek_v3', {'model.layers.4.eh_proj.weight': (36, 72), 'model.layers.4.enorm.weight': (36,),
                     'model.layers.4.shared_head.head.weight': (V, 36),
                     'model.layers.4.embed_tokens.weight': (V, 36),
                     'model.layers.4.self_attn.o_proj.weight': (36, 54)}),
    ('glm4_moe', {'model.layers.3.eh_proj.weight': (36, 72), 'model.layers.3.enorm.weight': (36,)}),
    ('ernie4_5_moe', {'model.mtp_block.0.mlp.up_proj.weight': (51, 36), 'model.mtp_emb.weight': (36,)}),
    ('qwen3_next', {'mtp.fc.weight': (36, 72), 'mtp.layers.0.input_layernorm.weight': (36,)}),
])
def test_what_is_not_a_weight_is_ignored(made, name, strays, tmp_path):
    def add(config, tensors):
        tensors |= {key: torch.ones(shape) for key, shape in strays.items()}
    assert_logits(load(copy_of(made(name), tmp_path, add)), made(name), name)


@pytest.mark.parametrize('name', ['falcon-new', 'llama-mha-tied'])
@pytest.mark.parametrize('factor', [1.0, 2.0])
def test_a_head_in_the_file_is_used_though_the_config_ties_it(made, name, factor, tmp_path):
    made = made(name)

    def add(config, tensors):
        embedding = next(p for key, p in tensors.items() if 'embed' in key and p.shape[0] == V)
        tensors['lm_head.weight'] = factor * embedding
    theirs = load_reference(copy_of(made, tmp_path, add), made.case)
    assert_logits(load(tmp_path), answer_of(theirs, made), name)


def test_a_pickled_checkpoint_loads_and_runs_no_code(made, tmp_path):
    made = made('llama')
    tensors = safetensors_torch.load_file(copy_of(made, tmp_path) / 'model.safetensors')
    (tmp_path / 'model.safetensors').unlink()
    torch.save(tensors, tmp_path / 'pytorch_model.bin')
    assert_logits(load(tmp_path), made, 'pytorch_model.bin')
    torch.save(tensors | {'model.norm.weight': Marker(tmp_path / 'ran')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pytorch_model.bin') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('pickled', [False, True])
def test_want_of_memory_is_no_damage(made, pickled, tmp_path, monkeypatch):
    """Whoever is told so downloads gigabytes again, for nothing."""
    def fails(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    tensors = safetensors_torch.load_file(copy_of(made('llama'), tmp_path) / 'model.safetensors')
    if pickled:
        (tmp_path / 'model.safetensors').unlink()
        torch.save(tensors, tmp_path / 'pytorch_model.bin')
    monkeypatch.setattr(*(torch, 'load') if pickled else ('safetensors.safe_open',), fails)
    with pytest.raises(ValueError, match='needs more memory than is free') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


@pytest.mark.parametrize('legacy', [False, True])
def test_pickled_shards_and_their_index_are_read(made, legacy, tmp_path):
    made = made('gpt2')
    tensors = list(safetensors_torch.load_file(copy_of(made, tmp_path) / 'model.safetensors').items())
    (tmp_path / 'model.safetensors').unlink()
    half, where = len(tensors) // 2, {}
    for number, part in enumerate((tensors[:half], tensors[half:]), 1):
        file = f'pytorch_model-0000{number}-of-00002.bin'
        torch.save(dict(part), tmp_path / file, _use_new_zipfile_serialization=not legacy)
        where |= {name: file for name, _ in part}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': where}))
    assert_logits(load(tmp_path), made, 'sharded .bin')
    torch.save(dict(tensors[half:]) | {'x': Marker(tmp_path / 'ran')}, tmp_path / file)
    with pytest.raises(ValueError, match='00002-of-00002.bin must hold tensors'):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['mixtral', 'qwen2_moe', 'qwen3_moe', 'deepseek_v2', 'deepseek_v3', 'jamba',
                                  'gpt_neox', 'gpt_oss', 'llama4', *MIXTURES, *RECURRENT, *ENCODERS, *BOTH])
@torch.no_grad()
def test_names_that_transformers_has_in_memory_are_read(made, ours, name, tmp_path):
    made = made(name)
    made.model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(logits_of(load(tmp_path), made), logits_of(ours(name), made))


def test_kimi_k2_is_read_as_deepseek_v3_under_another_name(made, ours, tmp_path):
    """Its YaRN has no ramp; transformers does not know the name, and what is exported is a deepseek_v3."""
    def rename(config, tensors):
        config |= {'model_type': 'kimi_k2', 'auto_map': {'AutoConfig': 'configuration_deepseek.Config'},
                   'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'ep_size': 1, 'moe_layer_freq': 1}
    made = made('deepseek_v3-yarn-step')
    model = load(copy_of(made, tmp_path, rename))
    assert model.config == ours('deepseek_v3-yarn-step').config
    assert_logits(model, made, 'kimi_k2')
    model.save_pretrained(tmp_path / 'again')
    assert_logits(load_reference(tmp_path / 'again', made.case), made, 'kimi_k2, exported')


def test_an_adapter_is_called_one(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / 'adapter_model.safetensors').write_text('')
    for config in (False, True):
        if config:
            (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
        with pytest.raises(ValueError, match=r'adapter \(LoRA\).* org/base with merge_and_unload') as error:
            GPT.from_pretrained(tmp_path)
        one_sentence(error.value)


@pytest.mark.parametrize('flags', [
    dict(ssm='mamba2', layer_pattern='m', ffn_pattern='-', pos='none', ssm_dt_max=1, ssm_groups=1,
         ssm_head_dim=8, ssm_state=8, norm_eps=1),
    dict(pos='rope', ffn='swiglu', norm_eps=1, rope_theta=1000, rope_scaling='linear', rope_factor=2),
    dict(pos='rope', ffn='swiglu', attn='mla', head_dim=1, rope_head_dim=2, kv_rank=8, latent_eps=1e-6)])
@torch.no_grad()
def test_whole_numbers_and_small_heads_are_exported_for_transformers(flags, tmp_path):
    import transformers
    sizes = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=V, block_size=24, norm='rmsnorm', bias=False)
    model = GPT(GPTConfig(**sizes, **flags), seed=1).eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(0))
    assert_logits(model, SimpleNamespace(idx=idx, logits=theirs(idx).logits), str(flags))
    assert torch.equal(load(tmp_path)(idx)[0], model(idx)[0])


def test_what_a_config_became_can_be_given_again():
    config = GPTConfig(attn='mla', pos='none', head_dim=1, kv_rank=8)
    assert GPTConfig(**asdict(config)) == config


MEMORY = """
import re, sys
import safetensors.torch, torch
from model import GPT
def peak():
    # not ru_maxrss, which begins with what the parent had
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
model = GPT.from_pretrained(sys.argv[1], sys.argv[2])
loaded = peak()
model.save_pretrained(sys.argv[1] + '/again', dtype=sys.argv[3])
print(loaded - before, peak() - loaded)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='counts memory as Linux does')
@pytest.mark.parametrize('shards, dtype, other', [
    (1, 'float32', 'float32'), (3, 'float32', 'float32'), (1, 'bfloat16', 'bfloat16'),
    (3, 'bfloat16', 'float32')])
def test_loading_and_exporting_hold_the_model_and_one_tensor(tmp_path, shards, dtype, other):
    sizes = dict(n_layer=6, n_embd=512, n_head=8, vocab_size=16000, tie=False, block_size=64)
    model = GPT(GPTConfig(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, **sizes), seed=None)
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    if shards > 1:
        shard(tmp_path, shards)
    done = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path), dtype, other], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loading, exporting = (n / 2 ** 20 for n in map(int, done.stdout.split()))
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize / 2 ** 20
    # MiB: the largest tensor, in the fp32 of the files, and what was read before they were opened anew
    largest, pages, rest = 16000 * 512 * 4 / 2 ** 20, TensorFiles.REOPEN / 2 ** 20, 24
    assert weights > 60 and loading < weights + largest + pages + rest, (loading, weights)
    # its copy in the other dtype
    largest *= 1 if other == 'float32' else 1.5
    assert exporting < largest + rest, (exporting, weights)


# ----------------------------------------------------------------------------------------------------------
# Bad input: one sentence with the name at fault


def setting(**keys):
    return lambda config, tensors: config.update(keys)


REFUSING = """
import re, sys
import safetensors.torch, torch
from model import GPT
def peak():
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
before = peak()
for folder in sys.argv[1:]:
    try:
        GPT.from_pretrained(folder)
    except ValueError as error:
        print(error)
    assert peak() - before < 100, (folder, peak() - before)
"""
# a range, buffers of zeros, a list
HUGE = {'llama': 'head_dim', 'lfm2_moe': 'num_experts', 'minimax': 'num_attention_heads'}


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='counts memory as Linux does')
def test_a_size_that_no_memory_holds_is_refused_without_taking_any(made, tmp_path):
    for name, key in HUGE.items():
        (tmp_path / name).mkdir()
        copy_of(made(name), tmp_path / name, setting(**{key: 2 * 10 ** 8}))
    done = subprocess.run([sys.executable, '-c', REFUSING, *(str(tmp_path / name) for name in HUGE)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('must describe a model of at most') == len(HUGE), done.stdout


def rope_setting(**keys):
    return lambda config, tensors: config['rope_parameters'].update(keys)


def tensor(key, value):
    return lambda config, tensors: tensors.pop(key) if value is None else tensors.update({key: value})


def after(change):
    """A change to the files themselves, after they are written."""
    return SimpleNamespace(files=change)


UP = 'model.layers.1.mlp.up_proj.weight'
BAD = {
    'no text part': ('gemma3', setting(model_type='gemma3'), 'text_config'),
    'no config': ('llama', after(lambda folder: (folder / 'config.json').unlink()), 'config.json'),
    'config not json': ('llama', after(lambda folder: (folder / 'config.json').write_text('{"a":')),
                        'config.json'),
    'config a list': ('llama', after(lambda folder: (folder / 'config.json').write_text('[1]')),
                      'config.json'),
    'size of another type': ('llama', setting(hidden_size='36'), 'hidden_size|n_embd'),
    'no weights': ('llama', after(lambda folder: (folder / 'model.safetensors').unlink()), 'safetensors'),
    'layers of another type': ('llama', setting(num_hidden_layers=3.0), 'num_hidden_layers=3.0'),
    'too many layers': ('llama', setting(num_hidden_layers=10 ** 9), 'num_hidden_layers=1000000000'),
    'no layers': ('llama', setting(num_hidden_layers=0), 'num_hidden_layers=0'),
    'a vocabulary that no memory holds': ('llama', setting(vocab_size=2 * 10 ** 9), 'config.json'),
    'truncated': ('llama', after(lambda folder: os.truncate(folder / 'model.safetensors', 50000)),
                  'model.safetensors'),
    'truncated header': ('llama', after(lambda folder: os.truncate(folder / 'model.safetensors', 40)),
                         'model.safetensors'),
    'not safetensors': ('llama', after(lambda folder: (folder / 'model.safetensors').write_text('version')),
                        'model.safetensors'),
    'missing shard': ('llama', after(lambda folder: shard(folder).unlink()), 'model-2.safetensors'),
    'truncated shard': ('llama', after(lambda folder: os.truncate(shard(folder), 5000)),
                        'model-2.safetensors'),
    'index not json': ('llama', after(lambda folder: index(folder, '{"weight_map":')), 'index.json'),
    'index without map': ('llama', after(lambda folder: index(folder, '{"metadata": {}}')), 'index.json'),
    'no model_type': ('llama', lambda config, tensors: config.pop('model_type'), 'model_type'),
    'unknown model_type': ('llama', setting(model_type='whisper'), 'whisper'),
    'another shape': ('llama', tensor(UP, torch.zeros(51, 35)), UP),
    'more dimensions': ('llama', tensor(UP, torch.zeros(1, 51, 36)), UP),
    'shape of fused heads': ('phi3', tensor('model.layers.0.self_attn.qkv_proj.weight', torch.zeros(59, 36)),
                             'model.layers.0.self_attn.qkv_proj.weight'),
    'other vocabulary': ('llama', setting(vocab_size=62), 'embed_tokens'),
    'missing tensor': ('llama', tensor(UP, None), UP),
    'missing norm': ('llama', tensor('model.norm.weight', None), 'model.norm.weight'),
    'missing head': ('llama', tensor('lm_head.weight', None), 'lm_head.weight'),
    'missing expert': ('mixtral', tensor('model.layers.1.block_sparse_moe.experts.3.w3.weight', None),
                       'model.layers.1.block_sparse_moe.experts.3.w3.weight'),
    'missing bias': ('qwen2', tensor('model.layers.1.self_attn.k_proj.bias', None),
                     'model.layers.1.self_attn.k_proj.bias'),
    'extra tensor': ('llama', tensor('model.layers.0.mlp.extra.weight', torch.zeros(3)),
                     'model.layers.0.mlp.extra.weight'),
    'extra bias': ('llama', tensor('model.layers.0.mlp.up_proj.bias', torch.zeros(51)),
                   'model.layers.0.mlp.up_proj.bias'),
    'extra layer': ('llama', setting(num_hidden_layers=2), r'model.layers.2.'),
    'extra expert': ('mixtral', setting(num_local_experts=4), r'block_sparse_moe'),
    'quantised': ('llama', setting(quantization_config={'quant_method': 'hqq'}), 'quant_method=hqq'),
    'multimodal llava': ('llama', lambda config, tensors: config.update(
        {'model_type': 'llava', 'text_config': dict(config)}), 'text_config.*llava'),
    'unknown activation': ('llama', setting(hidden_act='mish'), 'hidden_act'),
    'unknown activation of gpt2': ('gpt2', setting(activation_function='mish'), 'activation_function'),
    'unknown rope': ('llama', rope_setting(rope_type='spiral'), 'spiral|rope_type'),
    'unknown published rope': ('llama', lambda config, tensors: (
        config.pop('rope_parameters'), config.update(rope_scaling={'type': 'spiral', 'factor': 2.0})),
        'spiral|rope_scaling'),
    'bidirectional': ('gemma3', setting(use_bidirectional_attention=True), 'use_bidirectional_attention'),
    'not causal': ('llama', setting(is_causal=False), 'is_causal'),
    'whole numbers for weights': ('llama', tensor(UP, torch.zeros(51, 36, dtype=torch.int8)), 'int8'),
    'unknown router': ('deepseek_v2', setting(topk_method='noaux_tc'), 'topk_method'),
    'missing key': ('llama', lambda config, tensors: config.pop('hidden_size'), 'hidden_size'),
    'missing layers': ('mamba', lambda config, tensors: config.pop('num_hidden_layers'), 'num_hidden_layers'),
    'no number of heads': ('llama-mha-tied', lambda config, tensors: (
        config.pop('num_attention_heads'), config.pop('head_dim')), 'num_attention_heads'),
    'no number of chosen experts': ('dots1', setting(num_experts_per_tok=None), 'num_experts_per_tok'),
    'null size': ('llama', setting(hidden_size=None), 'hidden_size'),
    'heads of another type': ('granite', setting(num_attention_heads='six'), 'config.json'),
    'unknown layer type': ('qwen3', setting(layer_types=['full_attention', 'linear_attention',
                                                         'full_attention']), 'layer_types'),
    'too few layer types': ('gemma2', setting(layer_types=['full_attention']), 'layer_types'),
    'no chunk': ('llama4', setting(attention_chunk_size=0), 'attention_chunk_size'),
    'windows in llama4': ('llama4', setting(layer_types=layers('fsfff')), 'layer_types'),
    'temperature without a layer': ('llama4', setting(no_rope_layers=[0] * 5, layer_types=layers('fffff')),
                                    'no_rope_layers'),
    'scaled local rope': ('gemma3', lambda config, tensors: config['rope_parameters'].update(
        sliding_attention={'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 2.0}), 'sliding_attention'),
    'phi3 by yarn': ('phi3', rope_setting(rope_type='yarn', factor=2.0), 'short_factor'),
    'phi3 by llama3': ('phi3', rope_setting(rope_type='llama3', factor=2.0), 'rope_type'),
    **{f'{kind} without a factor': ('llama', rope_setting(rope_type=kind), 'factor.* must be set')
       for kind in ('linear', 'dynamic', 'yarn', 'llama3')},
    'a factor without a type': ('llama', lambda config, tensors: (
        config.pop('rope_parameters'), config.update(rope_scaling={'factor': 2.0})), 'rope_type must be set'),
    'llama3 without its factors': ('llama', rope_setting(rope_type='llama3', factor=2.0), 'low_freq_factor'),
    'shortened context': ('llama', rope_setting(rope_type='yarn', factor=0.5), 'factor'),
    'sharpened unscaled': ('llama', rope_setting(rope_type='yarn', factor=1.0, attention_factor=1.2),
                           'attention_factor'),
    'a factor of zero': ('llama', rope_setting(rope_type='yarn', factor=0), 'factor=0'),
    'a context of nothing': ('llama', rope_setting(
        rope_type='yarn', factor=2.0, original_max_position_embeddings=0), 'original_max_position_emb.*=0'),
    'a base of zero': ('llama', rope_setting(rope_theta=0), 'rope_theta'),
    'a window of nothing': ('mistral', setting(sliding_window=0), 'sliding_window'),
    'a window of nothing in dots1': ('dots1', setting(layer_types=None, sliding_window=0), 'sliding_window'),
    'no part of a head': ('phi3', rope_setting(partial_rotary_factor=0), 'partial_rotary_factor=0'),
    'limits in a table': ('mamba2', setting(time_step_limit={'0': 0.1, '1': 1.0}), 'time_step_limit'),
    'odd part of a head': ('phi3', lambda config, tensors: (
        config.update(partial_rotary_factor=0.5, num_attention_heads=6),
        config['rope_parameters'].update(partial_rotary_factor=0.5)), 'partial_rotary_factor'),
    'slow but exact': ('bloom', setting(slow_but_exact=True), 'slow_but_exact'),
    'activation of a state space': ('jamba', setting(hidden_act='gelu'), 'hidden_act'),
    'activation of mamba': ('mamba2', setting(hidden_act='gelu'), 'hidden_act'),
    'half an expansion': ('mamba', setting(expand=1.5), 'expand'),
    'other heads of a state space': ('mamba2', setting(num_heads=8), 'num_heads'),
    'heads that cannot be shared': ('llama', setting(num_key_value_heads=4), 'num_key_value_heads'),
    'biases of xlstm': ('xlstm', setting(use_bias=True), 'use_bias'),
    'odd heads of xlstm': ('xlstm', setting(qk_dim_factor=0.6), 'qk_dim_factor'),
    'biases of bailing': ('bailing_hybrid', setting(attention_bias=True), 'attention_bias'),
    'activation of a recurrence': ('qwen3_5', setting(hidden_act='gelu'), 'hidden_act'),
    'windows in qwen3_next': ('qwen3_next', setting(layer_types=layers('rrsf')), 'layer_types'),
    'clipped olmoe': ('olmoe', setting(clip_qkv=8.0), 'clip_qkv'),
    'biases of ernie': ('ernie4_5_moe', setting(use_bias=True), 'use_bias.*linear layers but the experts'),
    'a floor under the sum of weights': ('ernie4_5_moe', setting(moe_norm_min=0.1), 'moe_norm_min'),
    'experts in no layer at all': ('ernie4_5_moe', setting(moe_layer_interval=0), 'config.json'),
    'groups that do not divide': ('dots1-null-window-groups', setting(n_group=4), 'n_group=4'),
    'more groups than there are': ('glm4_moe-biased-groups', setting(n_group=3, topk_group=9), 'topk_group'),
    'experts by layer': ('hunyuan_v1_moe', setting(moe_topk=[2, 3, 2]), 'moe_topk.*a list of the same one'),
    'two numbers of experts': ('hunyuan_v1_moe', setting(num_experts_per_tok=3), 'num_experts_per_tok=3'),
    'experts in a word': ('hunyuan_v1_moe', setting(moe_topk=['a', 'a', 'a']), 'moe_topk'),
    'mimo': ('dots1', setting(model_type='mimo_v2_flash'), 'mimo_v2_flash.*twice the key/value heads'),
    'unknown experts': ('kimi_linear', setting(mlp_layer_types=['dense', 'moe', 'moe', 'moe', 'moe']),
                        'mlp_layer_types'),
    **{f'{key} of {kind}': (kind, setting(**{key: value}), key)
       for kind in ('bert', 'roberta', 'electra', 'nomic_bert')
       for key, value in {'position_embedding_type': 'relative_key', 'is_decoder': True,
                          'add_cross_attention': True, 'type_vocab_size': 0, 'hidden_act': 'mish'}.items()},
    'activation of the head of bert': ('bert', setting(hidden_act='gelu_new'), 'hidden_act'),
    'activation of the head of distilbert': ('distilbert', setting(activation='relu'), 'activation'),
    'activation of the head of modernbert': ('modernbert', setting(classifier_activation='relu'),
                                             'classifier_activation'),
    'activation of the head of nomic_bert': ('nomic_bert', setting(hidden_act='relu'), 'hidden_act'),
    'padding of roberta': ('roberta', setting(pad_token_id=0), 'pad_token_id'),
    'positions of roberta': ('roberta', setting(max_position_embeddings=2), 'max_position_embeddings'),
    'more positions than in the table': ('roberta', setting(max_position_embeddings=51),
                                         'position_embeddings'),
    'more types than in the table': ('bert', setting(type_vocab_size=3), 'token_type_embeddings'),
    'another embedding_size': ('electra', setting(embedding_size=29), 'electra'),
    'scaled rope of modernbert': ('modernbert', setting(rope_scaling={'type': 'linear', 'factor': 2.0}),
                                  'rope_scaling'),
    'scaled windows of modernbert': ('modernbert', lambda config, tensors: config['rope_parameters'].update(
        sliding_attention={'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 2.0}), 'sliding_attention'),
    'layer types of modernbert': ('modernbert', setting(layer_types=['full_attention'] * 3), 'layer_types'),
    'the discriminator of electra': ('electra', lambda config, tensors: tensors.pop(
        'generator_predictions.dense.weight'), 'generator_predictions'),
    'no head of bert': ('bert', lambda config, tensors: [
        tensors.pop(name) for name in list(tensors) if name.startswith('cls.')], 'cls.predictions'),
    't5gemma': ('t5', setting(model_type='t5gemma'), 't5gemma.*embedding of its own'),
    'no encoder': ('t5', setting(num_layers=0), 'num_layers=0'),
    'too many layers of an encoder': ('t5', setting(num_layers=10 ** 9), 'num_layers=1000000000'),
    'too many layers of a decoder': ('bart', setting(decoder_layers=10 ** 9), 'decoder_layers=1000000000'),
    'an encoder alone': ('t5', setting(is_encoder_decoder=False), 'is_encoder_decoder'),
    'a llama with an encoder': ('llama', setting(is_encoder_decoder=True), 'is_encoder_decoder'),
    'activation of t5': ('t5', setting(feed_forward_proj='gated-mish'), 'feed_forward_proj'),
    'buckets of t5': ('t5', setting(relative_attention_num_buckets=6), 'relative_attention_num_buckets'),
    'distance of t5': ('t5', setting(relative_attention_max_distance=4), 'relative_attention_max_distance'),
    'another embedding of an encoder': ('t5', tensor('encoder.embed_tokens.weight', torch.ones(V, 36)),
                                        'encoder.embed_tokens'),
    'no embedding of t5': ('t5', tensor('shared.weight', None), 'shared.weight'),
    'no table of distances': ('umt5', tensor(
        'decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight', None), 'decoder.block.1'),
    'other heads in a decoder': ('bart', setting(decoder_attention_heads=4), 'decoder_attention_heads'),
    'another width in a decoder': ('bart', setting(decoder_ffn_dim=50), 'decoder_ffn_dim'),
    'bart with norms before': ('bart', setting(normalize_before=True), 'normalize_before'),
    'bart with a last norm': ('bart', setting(add_final_layer_norm=True), 'add_final_layer_norm'),
    'an untied bart': ('bart', setting(tie_word_embeddings=False), 'tie_word_embeddings'),
    'layers of gpt_neo': ('gpt_neo', setting(attention_types=[[['global', 'local'], 3]]), 'attention_types'),
    'other words in gpt_neo': ('gpt_neo', setting(attention_types=[[['all'], 4]]), 'attention_types'),
    'no pairs in attention_types': ('gpt_neo', setting(attention_types=[['global', 'local']]),
                                    'attention_types'),
    'a narrow opt': ('opt', setting(word_embed_proj_dim=30), 'word_embed_proj_dim'),
    'an opt with norms without weights': ('opt', setting(layer_norm_elementwise_affine=False),
                                          'layer_norm_elementwise_affine'),
    'an opt without the last norm': ('opt', setting(_remove_final_layer_norm=True),
                                     '_remove_final_layer_norm'),
    'an odd rotary_dim': ('gptj', setting(rotary_dim=7), 'rotary_dim'),
    'more than a head rotates': ('gptj', setting(rotary_dim=14), 'rotary_dim'),
    'a gptj without rotary_dim': ('gptj', setting(rotary_dim=None), 'rotary_dim'),
    'heads of codegen': ('codegen', setting(n_head=5), 'n_head'),
    'norms of queries that a phi lacks': ('phi', setting(qk_layernorm=True), 'q_layernorm'),
    'weights in the norms of olmo': ('olmo', tensor('model.norm.weight', torch.ones(36)),
                                     'model.norm.weight'),
    'scaled local rope of olmo3': ('olmo3', lambda config, tensors: config['rope_parameters'].update(
        sliding_attention={'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 2.0}), 'sliding_attention'),
    'other letters of exaone4': ('exaone4', setting(sliding_window_pattern='LLX'), 'sliding_window_pattern'),
    'no letters of exaone4': ('exaone4', setting(sliding_window_pattern=''), 'sliding_window_pattern'),
    'ministral3': ('ministral', setting(model_type='ministral3'), 'ministral3.*queries grow'),
    'apertus': ('arcee', setting(model_type='apertus'), 'apertus.*xIELU'),
    'letters of gemma3': ('gemma3', setting(sliding_window_pattern='LLG', layer_types=None), 'gemma3'),
    'a bidirectional gemma': ('gemma', setting(use_bidirectional_attention=True),
                              'use_bidirectional_attention'),
    'a gate in arcee': ('arcee', setting(hidden_act='silu'), 'hidden_act'),
    'odd part of a head of glm': ('glm', rope_setting(partial_rotary_factor=0.25), 'partial_rotary_factor'),
    'a head too few of stablelm': ('stablelm-parallel-norms', tensor(
        'model.layers.1.self_attn.q_layernorm.norms.1.weight', None), 'q_layernorm.norms.1'),
    'no norm of experts': ('qwen3_moe', setting(num_experts_per_tok=9, num_local_experts=5),
                           'num_experts_per_tok'),
}


WRONG = ['x', 1.5, 10 ** 9, 10 ** 30, -1, 0, True, [], {}, ['x'], {'a': 1}, math.nan, math.inf]


@pytest.mark.parametrize('name', ['llama-yarn', 'gpt2', 'mixtral', 'gemma3', 'deepseek_v3', 'llama4',
                                  'mamba2', 'jamba', 'falcon-new', 'mpt', 'phi3-long', *RECURRENT, *ENCODERS,
                                  *BOTH, *CLASSIC, *DENSE, *MIXTURES])
def test_any_value_in_any_key_is_answered(made, name, tmp_path):
    """A model, or one sentence, and at once; 13 wrong values for each key."""
    folder = copy_of(made(name), tmp_path)
    config = json.loads((folder / 'config.json').read_text())
    rope = config.get('rope_parameters') or {}
    for number, key in enumerate([*config, *(('rope_parameters', key) for key in rope)]):
        # a few of them each: all of them took minutes, once
        for value in WRONG[number % 4::4]:
            changed = config | ({'rope_parameters': rope | {key[1]: value}} if isinstance(key, tuple)
                                else {key: value})
            (folder / 'config.json').write_text(json.dumps(changed))
            try:
                GPT.from_pretrained(folder)
            except (ValueError, FileNotFoundError) as error:
                one_sentence(error)


@pytest.mark.parametrize('where, word', [
    ({'model.norm.weight': 3}, 'weight_map'), ({'model.norm.weight': None}, 'weight_map'),
    ({'model.norm.weight': ['a']}, 'weight_map'), ([], 'weight_map'), ('a', 'weight_map'),
    ({'model.norm.weight': '../x.safetensors'}, r'\.\./x\.safetensors'),
    ({'model.norm.weight': '/etc/x.safetensors'}, 'beside it'), ({'model.norm.weight': '..'}, 'beside it'),
    ({'model.norm.weight': 'a\\x.safetensors'}, 'beside it'), ({'model.norm.weight': ''}, 'beside it'),
    ({'model.norm.weight': 'config.json'}, 'beside it'), ({}, 'num_hidden_layers')])
def test_an_index_names_files_beside_it(made, where, word, tmp_path):
    folder = tmp_path / 'inside'
    folder.mkdir()
    copy_of(made('llama'), folder)
    (folder / 'model.safetensors').rename(tmp_path / 'x.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(folder)
    one_sentence(error.value)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors', 'model.safetensors.index.json',
                                  'pytorch_model.bin', 'adapter_config.json'])
def test_a_folder_in_place_of_a_file_is_named(made, file, tmp_path):
    copy_of(made('llama'), tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).mkdir()
    word = 'model.safetensors' if file.startswith('adapter') else re.escape(file)
    with pytest.raises((ValueError, FileNotFoundError), match=word) as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


@pytest.mark.parametrize('text', ['[' * 100000, '{"a":' * 100000, '\udcff', ''])
def test_json_that_is_none_is_refused(made, text, tmp_path):
    copy_of(made('llama'), tmp_path)
    (tmp_path / 'config.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match='config.json') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


def index(folder, text):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(text)


@pytest.mark.parametrize('name, change, word', BAD.values(), ids=BAD)
def test_bad_checkpoints_are_refused_in_a_sentence(made, name, change, word, tmp_path):
    if isinstance(change, SimpleNamespace):
        change.files(copy_of(made(name), tmp_path))
    else:
        copy_of(made(name), tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        GPT.from_pretrained(tmp_path)
    assert re.search(word, one_sentence(error.value)), f'{word} is not in: {error.value}'


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match='nowhere') as error:
        GPT.from_pretrained(tmp_path / 'nowhere')
    one_sentence(error.value)


# ----------------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


def nanogpt(bias, seed=0):
    """A checkpoint as nanoGPT's train.py writes it, with random weights."""
    args = dict(n_layer=3, n_head=3, n_embd=36, block_size=32, bias=bias, vocab_size=V, dropout=0.1)
    generator, C = torch.Generator().manual_seed(seed), 36
    shapes = {'transformer.wte.weight': (V, C), 'transformer.wpe.weight': (32, C),
              'transformer.ln_f.weight': (C,)}
    for i in range(3):
        shapes |= {f'transformer.h.{i}.{key}.weight': shape for key, shape in {
            'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C), 'ln_2': (C,),
            'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}.items()}
    if bias:
        shapes |= {key.replace('weight', 'bias'): shape[:1] for key, shape in shapes.items()
                   if not re.search('wte|wpe', key)}
    weights = {key: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.1)
               + ('ln_' in key and 'weight' in key) for key, shape in shapes.items()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return {'model': weights, 'optimizer': {'state': {}, 'param_groups': []}, 'model_args': args,
            'iter_num': 5, 'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'openwebtext'}}


def nanogpt_logits(weights, idx, n_head=3):
    """Logits of every position, by nanoGPT's definition."""
    def linear(x, key):
        return F.linear(x, weights[key + '.weight'], weights.get(key + '.bias'))

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], weights[key + '.weight'], weights.get(key + '.bias'), 1e-5)

    B, T = idx.shape
    x = weights['transformer.wte.weight'][idx] + weights['transformer.wpe.weight'][:T]
    mask = torch.ones(T, T).tril().bool()
    for i in range(3):
        at = f'transformer.h.{i}.'
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2)
                   for part in linear(norm(x, at + 'ln_1'), at + 'attn.c_attn').chunk(3, dim=-1))
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, at + 'attn.c_proj')
        hidden = linear(norm(x, at + 'ln_2'), at + 'mlp.c_fc')
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, at + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ weights['lm_head.weight'].T


NANOCHAT = dict(sequence_len=32, vocab_size=61, n_layer=2, n_head=3, n_kv_head=1, n_embd=36)


def nanochat_weights():
    """Tensors of a nanochat, with three rows more than tokens."""
    shapes = {'transformer.wte.weight': (64, 36), 'lm_head.weight': (64, 36)}
    for i in range(2):
        h = f'transformer.h.{i}.'
        shapes |= {h + 'attn.c_q.weight': (36, 36), h + 'attn.c_k.weight': (12, 36),
                   h + 'attn.c_v.weight': (12, 36), h + 'attn.c_proj.weight': (36, 36),
                   h + 'mlp.c_fc.weight': (144, 36), h + 'mlp.c_proj.weight': (36, 144)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def nanochat_logits(w, idx):
    """What nanochat computes, one head after the other."""
    def norm(x):
        return x * (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()

    def rotated(x):
        angle = torch.arange(len(x)).double()[:, None] / 10000 ** (torch.arange(6).double() / 6)
        a, b = x.split(6, -1)
        return norm(torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1))
    w, T = {name: p.double() for name, p in w.items()}, len(idx)
    x = norm(w['transformer.wte.weight'][idx])
    for i in range(2):
        q, k, v, proj = (w[f'transformer.h.{i}.attn.c_{part}.weight'] for part in ('q', 'k', 'v', 'proj'))
        n = norm(x)
        key = rotated(n @ k.T)
        scores = [rotated(n @ head.T) @ key.T / 12 ** 0.5 for head in q.split(12)]
        seen = torch.ones(T, T).tril() > 0
        y = [s.masked_fill(~seen, -torch.inf).softmax(-1) @ (n @ v.T) for s in scores]
        x = x + torch.cat(y, -1) @ proj.T
        hidden = norm(x) @ w[f'transformer.h.{i}.mlp.c_fc.weight'].T
        x = x + hidden.relu() ** 2 @ w[f'transformer.h.{i}.mlp.c_proj.weight'].T
    logits = norm(x) @ w['lm_head.weight'].T
    return (15 * torch.tanh(logits / 15))[:, :61].float()


def write_nanochat(folder, step=7, weights=None, **changed):
    torch.save(nanochat_weights() if weights is None else weights, folder / f'model_{step:06d}.pt')
    meta = {'step': step, 'val_bpb': 0.9, 'model_config': NANOCHAT | changed, 'user_config': {'depth': 2}}
    (folder / f'meta_{step:06d}.json').write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize('file', ['', 'model_000007.pt'])
@torch.no_grad()
def test_nanochats_own_checkpoints_load(file, tmp_path):
    write_nanochat(tmp_path, step=3, weights={'of an earlier step': torch.ones(1)})
    write_nanochat(tmp_path, weights={'_orig_mod.' + name: p for name, p in nanochat_weights().items()})
    model = GPT.from_pretrained(tmp_path / file if file else tmp_path)
    idx = torch.randint(61, (21,), generator=torch.Generator().manual_seed(0))
    error = (model(idx[None])[0][0] - nanochat_logits(nanochat_weights(), idx)).abs().max()
    assert error < 1e-4, error
    model.save_pretrained(tmp_path / 'exported')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
    assert theirs.config.model_type == 'nanochat'
    assert GPT.from_pretrained(tmp_path, n_kv_head=3).family == 'nanochat'
    assert (theirs(idx[None]).logits[0] - nanochat_logits(nanochat_weights(), idx)).abs().max() < 1e-4


@pytest.mark.parametrize('change, word', [
    (dict(weights=nanochat_weights() | {'resid_lambdas': torch.ones(2)}), 'resid_lambdas'),
    (dict(weights={}), 'n_layer'), (dict(n_head=0), 'n_head=0'), (dict(n_kv_head=2), 'n_kv_head'),
    (dict(n_embd=48), 'transformer.wte.weight'), (dict(vocab_size='x'), 'vocab_size=x'),
    (dict(n_layer=10 ** 9), 'n_layer')])
def test_a_strange_checkpoint_of_nanochat_is_refused(change, word, tmp_path):
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(write_nanochat(tmp_path, **change))
    one_sentence(error.value)


def test_a_checkpoint_of_nanochat_without_settings_is_refused(tmp_path):
    (write_nanochat(tmp_path) / 'meta_000007.json').unlink()
    with pytest.raises(FileNotFoundError, match='meta_000007.json'):
        GPT.from_pretrained(tmp_path / 'model_000007.pt')


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@torch.no_grad()
def test_nanogpt_checkpoints_load(bias, prefix, tmp_path):
    checkpoint = nanogpt(bias)
    idx = torch.randint(V, (2, 32), generator=torch.Generator().manual_seed(3))
    want = SimpleNamespace(idx=idx, logits=nanogpt_logits(checkpoint['model'], idx))
    if not bias:  # a mask that nanoGPT keeps where torch has no fused attention
        checkpoint['model']['transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32)
    checkpoint['model'] = {prefix + key: p for key, p in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for path in (tmp_path / 'ckpt.pt', tmp_path, str(tmp_path)):
        model = load(path)
        assert_logits(model, want, f'nanoGPT bias={bias} {prefix}')
    assert model.generate(idx[:, :5], 4, temperature=0).shape == (2, 9)
    assert model.config.block_size == 32 and model.config.tie


def test_a_nanogpt_checkpoint_with_strange_weights_is_refused(tmp_path):
    for key, p in (('transformer.h.1.mlp.c_fc.weight', torch.zeros(144, 35)), ('transformer.h.3.ln_1.weight',
                   torch.ones(36)), ('transformer.h.1.mlp.c_fc.weight', None)):
        checkpoint = nanogpt(True)
        checkpoint['model'][key] = p
        if p is None:
            del checkpoint['model'][key]
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        with pytest.raises(ValueError, match=key) as error:
            GPT.from_pretrained(tmp_path)
        one_sentence(error.value)


@pytest.mark.parametrize('change', [
    {'model_args': [1]}, {'model_args': {'n_layer': 'x'}}, {'model_args': {'n_layer': 10 ** 9}},
    {'model_args': {'n_layer': 3.5}}, {'model_args': {3: 4}}, {'model': [1]}, {'model': {'a': 1}},
    {'model_args': {'n_head': True}}])
def test_a_nanogpt_checkpoint_with_values_of_other_types_is_refused(change, tmp_path):
    path, checkpoint = tmp_path / 'ckpt.pt', nanogpt(True)
    if isinstance(change.get('model_args'), dict):
        change = {'model_args': checkpoint['model_args'] | change['model_args']}
    torch.save(checkpoint | change, path)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


@pytest.mark.parametrize('fault', ['truncated', 'not torch', 'code', 'no model'])
def test_a_damaged_nanogpt_checkpoint_is_refused(fault, tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint = nanogpt(True)
    if fault == 'code':
        checkpoint['model']['transformer.ln_f.weight'] = Marker(tmp_path / 'ran')
    if fault == 'no model':
        del checkpoint['model']
    torch.save(checkpoint, path)
    if fault == 'truncated':
        os.truncate(path, 9000)
    if fault == 'not torch':
        path.write_text('version')
    with pytest.raises(ValueError, match='ckpt.pt') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)
    assert not (tmp_path / 'ran').exists()
