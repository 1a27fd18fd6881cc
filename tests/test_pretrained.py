"""Published families: logits equal to `transformers`, in and out (checkpoints.py makes the checkpoints)."""
import copy
import json
import re
import textwrap
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    BOTH,
    CASES,
    CLASSIC,
    DENSE,
    ENCODERS,
    HYBRIDS,
    MIXTURES,
    NEW,
    RECURRENT,
    TOLERANCE,
    YARN,
    Case,
    T,
    V,
    answer_of,
    assert_logits,
    config_of,
    copy_of,
    every_case,
    every_decoder,
    every_encoder,
    every_pair,
    first_row,
    load,
    load_reference,
    logits_of,
    made,
    one_of_each,
    one_sentence,
    ours,
    read_by,
    redraw,
    transformers,
)
from conftest import ROOT, build, flags_of, shrink, toy

from model import GPT, GPTConfig
from nanoblocks.pretrained import convert, families, keys
from nanoblocks.pretrained.convert import NOT_WEIGHTS
from nanoblocks.pretrained.families import FAMILIES, llama
from nanoblocks.pretrained.families.family import DEFAULTS

# ----------------------------------------------------------------------------------------------------------
# The reference itself


def pieces(name, p):
    """Views of a tensor that a fault could hit on its own: each expert, and of that the gate and the rest."""
    if not re.search(r'experts\.[a-z_]+$', name):
        return [p]
    dim = 0 if p[0].shape[0] > p[0].shape[-1] else -1
    return [half for expert in p for half in (expert.chunk(2, dim) if 'gate_up' in name else [expert])]


@one_of_each
@torch.no_grad()
def test_every_tensor_of_the_reference_matters(made, name):
    made = made(name)
    generator, live = torch.Generator().manual_seed(0), made.idx[0, 0].item()
    one = first_row(made)
    parts = [(f'{key} {number}', part) for key, p in made.model.state_dict().items()
             for number, part in enumerate(pieces(key, p))
             if not re.search(made.case.inert, key) and not NOT_WEIGHTS.search(key)]
    for key, part in parts:
        moved = []
        while len(moved) < 8 and max(moved, default=0) < 5 * TOLERANCE:
            # a few single elements matter to nobody, as the bias of a key that softmax does not see
            at = [torch.randint(size, (), generator=generator).item() for size in part.shape]
            at[0] = live if part.shape[0] == V else at[0]
            kept = part[*at].item()
            part[*at] += 0.5
            moved.append((logits_of(made.model, one) - made.logits[:1]).abs().max().item())
            part[*at] = kept
        assert max(moved) > 5 * TOLERANCE, f'{name}: {key} moves the logits by {max(moved):.1e} only'


@every_case
@torch.no_grad()
def test_the_published_config_means_the_same(made, name):
    made = made(name)
    if made.old_folder:
        logits = logits_of(load_reference(made.old_folder, made.case), made)
        assert torch.equal(logits, made.logits)


# ----------------------------------------------------------------------------------------------------------
# Ours against the reference

every_own_family = pytest.mark.parametrize('name', [
    name for name, case in CASES.items() if case.model_type in (*ENCODERS, *BOTH, *CLASSIC, *DENSE)])
# the exact families that export whatever their size
EXPORTED = ('gpt2', 'llama', 'mistral', 'mixtral', 'qwen3', 'gemma2', 'deepseek_v3', 'mamba2', 'jamba',
            *HYBRIDS, *ENCODERS, *BOTH, *CLASSIC, *DENSE, *MIXTURES)
FLAGS = [field.name for field in fields(GPTConfig)]


@every_case
def test_logits_equal_transformers(made, ours, name):
    assert_logits(ours(name), made(name), name)


@every_case
def test_the_published_config_reads_the_same(made, ours, name):
    made, model = made(name), ours(name)
    if made.old_folder is None:
        pytest.skip('the published style cannot say this')
    old = load(made.old_folder)
    assert_logits(old, made, f'{name}, published style')
    assert old.config == model.config


@every_decoder
@torch.no_grad()
def test_greedy_tokens_equal_transformers(made, ours, name):
    made, model = made(name), ours(name)
    tokens = model.generate(made.prompt, NEW, temperature=0, **read_by(model, made))
    assert tokens.tolist() == made.tokens.tolist()


@pytest.mark.parametrize('name', [*RECURRENT, *CLASSIC, *DENSE, *MIXTURES])
@torch.no_grad()
def test_a_row_behind_padding_equals_transformers(made, ours, name):
    made, pad = made(name), 5
    got = ours(name)(made.idx, pos=torch.arange(T) - torch.tensor([[pad], [0]]))[0]
    # alone, as xlstm of transformers does not look at a mask
    assert (got[:1, pad:] - made.model(made.idx[:1, pad:]).logits).abs().max() <= TOLERANCE
    assert (got[1:] - made.logits[1:]).abs().max() <= TOLERANCE


@torch.no_grad()
def assert_padded(model, made, what):
    """Logits of all tokens of rows of which one is padded at its end."""
    if isinstance(model, GPT):
        pos = torch.arange(T).expand(2, T).masked_fill(made.padding, -1)
        logits = model(made.padded, pos=pos)[0]
    else:
        logits = model(made.padded, attention_mask=(~made.padding).long()).logits
    error = (logits - made.padded_logits).abs()[~made.padding]
    assert error.max() <= TOLERANCE, f'{what}: error {error.max():.1e} must be at most {TOLERANCE:.0e}'


@every_encoder
def test_padded_rows_equal_transformers(made, ours, name):
    made, model = made(name), ours(name)
    # what is padding would be seen otherwise
    assert (made.padded_logits - made.logits).abs()[~made.padding].max() > 50 * TOLERANCE
    assert_padded(model, made, name)


@every_pair
@torch.no_grad()
def test_padding_of_a_source_is_seen_by_none(made, ours, name):
    made, model = made(name), ours(name)
    # what is padding would be seen otherwise
    source = made.source.clamp(min=0)
    seen = made.model(input_ids=source, decoder_input_ids=made.idx).logits
    assert (seen - made.logits)[1].abs().max() > 50 * TOLERANCE
    alone = model(made.idx[1:], source=made.source[1:, :21])[0]
    assert (alone - made.logits[1:]).abs().max() <= TOLERANCE


@every_own_family
@torch.no_grad()
def test_models_export_as_their_own_family(made, ours, name, tmp_path, monkeypatch):
    """Also where another family comes first: a RoBERTa may be a BERT."""
    made, model = made(name), ours(name)
    kind = made.case.model_type
    monkeypatch.setattr(convert, 'FAMILIES', {kind: FAMILIES[kind]})
    model.save_pretrained(tmp_path)
    theirs, info = load_reference(tmp_path, made.case, output_loading_info=True)
    assert theirs.config.model_type == kind and not any(info.values()), f'{name}: {info}'
    assert_logits(theirs, made, f'{name}, exported')
    if kind in ENCODERS:
        assert_padded(theirs, made, f'{name}, exported and padded')
    again = load(tmp_path)
    assert again.config == model.config
    assert torch.equal(logits_of(again, made), logits_of(model, made))


@every_case
@torch.no_grad()
def test_round_trip(made, ours, name, tmp_path):
    made, model = made(name), ours(name)
    try:
        model.save_pretrained(tmp_path)
    except ValueError as error:
        message = one_sentence(error)
        assert made.case.rare or made.case.model_type not in EXPORTED, message
        assert any(re.search(rf'\b{flag}\b', message) for flag in FLAGS), f'no flag is named: {message}'
        assert not list(tmp_path.iterdir()), f'refused and wrote {list(tmp_path.iterdir())}'
        return
    # transformers only warns of tensors that it misses or does not know
    theirs, info = load_reference(tmp_path, made.case, output_loading_info=True)
    # tables that transformers works out where a file has none
    info['missing_keys'] = {key for key in info['missing_keys'] if not NOT_WEIGHTS.search(key)}
    assert not any(info.values()), f'{name}: {info}'
    assert theirs.config.model_type == made.model.config.model_type, 'it must stay in its family'
    assert_logits(theirs, made, f'{name}, exported')
    again = load(tmp_path)
    assert again.config == model.config
    same = torch.equal(logits_of(again, made), logits_of(model, made))
    assert same, f'{name}: what is read again is not the same'


@one_of_each
def test_twenty_steps_of_fine_tuning_lower_the_loss(made, name):
    made = made(name)
    model = load(made.folder)
    inputs, targets = made.idx[:, :-1], made.idx[:, 1:].contiguous()
    more = read_by(model, made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def loss():
        return model.eval()(inputs, targets, **more)[1].item()

    before = loss()
    for _ in range(20):
        optimizer.zero_grad()
        model.train()(inputs, targets, **more)[1].backward()
        optimizer.step()
    assert loss() < before - 0.5, f'{name}: {before:.2f} became {loss():.2f}'


# keys that files leave out where they have the value that transformers means then
OPTIONAL = """
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon hidden_act hidden_activation
    activation_function activation rope_parameters attention_bias mlp_bias qkv_bias use_bias bias
    tie_word_embeddings use_sliding_window max_window_layers layer_types _sliding_window_pattern
    max_position_embeddings original_max_position_embeddings max_seq_len norm_topk_prob topk_method
    routed_scaling_factor rope_interleave decoder_sparse_step mlp_only_layers query_pre_attn_scalar
    attn_logit_softcapping final_logit_softcapping expert_layer_period mamba_expand mamba_conv_bias
    mamba_proj_bias expand conv_kernel use_conv_bias time_step_limit time_step_rank
    do_layer_norm_before enable_bias window_size
    new_decoder_architecture multi_query parallel_attn alibi num_kv_heads num_ln_in_parallel_attn
    ffn_hidden_size apply_residual_connection_post_layernorm attn_config use_parallel_residual
    no_rope_layers no_rope_layer_interval moe_layers use_qk_norm attn_temperature_tuning floor_scale
    attn_scale attention_chunk_size swiglu_limit swiglu_alpha embedding_multiplier residual_multiplier
    logits_scaling attention_multiplier logit_scale scale_attn_weights scale_attn_by_inverse_layer_idx
    n_inner norm_eps norm_bias local_attention decoder_bias classifier_bias
    classifier_activation is_decoder add_cross_attention is_encoder_decoder feed_forward_proj scale_embedding
    scale_decoder_outputs conv_L_cache conv_bias use_expert_bias mixer_rms_eps time_step_min
    position_embedding_type attention_in_multiplier attention_out_multiplier key_multiplier ssm_in_multiplier
    ssm_out_multiplier lm_head_multiplier ssm_multipliers mlp_multipliers mamba_rms_norm projectors_bias
    clip_qkv attention_out_bias use_qkv_bias qk_layernorm
""".split()


LEARNED = re.compile(r'position_embeddings|embed_positions|\.wpe\.')


@one_of_each
@torch.no_grad()
def test_keys_that_are_left_out_mean_their_defaults(made, name, tmp_path):
    def drop(config, tensors):
        sizes = {'max_position_embeddings'} if any(map(LEARNED.search, tensors)) else set()
        # nothing else says which layers these have
        kinds = {'layer_types'} if config['model_type'] in ('lfm2', 'lfm2_moe', 'granitemoehybrid') else set()
        for key in set(OPTIONAL).difference(sizes, kinds):
            config.pop(key, None)
    made = made(name)
    theirs, info = load_reference(copy_of(made, tmp_path, drop), made.case, output_loading_info=True)
    assert not any(info.values()), f'{name}: {info}'
    assert_logits(load(tmp_path), answer_of(theirs, made), name)


@one_of_each
@torch.no_grad()
def test_absent_keys_mean_what_they_mean_in_transformers(name):
    """The defaults of an entry equal the config class's, where the class has a plain one."""
    config_class = type(transformers.AutoConfig.for_model(CASES[name].model_type))
    plain = {field.name: field.default for field in fields(config_class) if field.default is not MISSING}
    theta = plain.get('rope_theta', config_class.default_theta)
    entry = FAMILIES[CASES[name].model_type]
    ours = DEFAULTS | entry.defaults
    if isinstance(theta, dict):
        assert (ours['rope_theta'], ours['rope_local_base_freq']) == (theta['global'], theta['local'])
    else:
        assert ours['rope_theta'] == theta or 'rope_parameters' not in plain
    # null stands for these
    worked_out = {'mlp_only_layers': None, 'rope_parameters': None, 'n_group': None, 'topk_group': None,
                  'attention_types': None}
    for key, value in ours.items():
        if key in plain and plain[key] != worked_out.get(key, ...):
            assert plain[key] == value, f'{key}: {value} here and {plain[key]} there'
    # what is not stated at all has no default there either, or is a size, which a file always says
    sizes = re.compile('size|hidden|layers|heads|dim|inner|position|seq_len|num_experts$|num_local_experts|'
                       'n_routed_experts|d_kv|d_ff|n_embd|n_layer|n_head|d_model|kv_lora_rank|layer_types')
    unsaid = {key for key in entry.keys if plain.get(key) is not None and key not in ours}
    assert not {key for key in unsaid if not sizes.search(key)}


def test_null_and_other_words_for_a_key_are_understood(made, ours, tmp_path):
    """As in files of all ages: no head_dim, several ends of a text, settings of training, other names."""
    def change(config, tensors):
        config |= dict.fromkeys(('rope_scaling', 'head_dim', 'quantization_config', 'pretraining_tp'))
        config |= {'eos_token_id': [3, 5], 'torch_dtype': 'bfloat16', 'attention_dropout': 0.5}
        config['num_experts'] = config.pop('num_local_experts')
    (tmp_path / 'mixtral').mkdir()
    assert load(copy_of(made('mixtral-plain-head'), tmp_path / 'mixtral', change)).config == \
        ours('mixtral-plain-head').config

    def older(config, tensors):
        config['rope_scaling'] = config.pop('rope_parameters') | {'type': 'su'}
        del config['rope_scaling']['rope_type']
    (tmp_path / 'phi3').mkdir()
    assert load(copy_of(made('phi3-long'), tmp_path / 'phi3', older)).config == ours('phi3-long').config

    def null_is_no(config, tensors):
        config['rope_parameters']['truncate'] = None
    (tmp_path / 'yarn').mkdir()
    folder = copy_of(made('llama-yarn'), tmp_path / 'yarn', null_is_no)
    model = load(folder)
    assert model.config.rope_truncate is False
    with torch.no_grad():
        want = load_reference(folder, CASES['llama-yarn'])(made('llama-yarn').idx).logits
        assert_logits(model, SimpleNamespace(idx=made('llama-yarn').idx, logits=want), 'null truncate')


@pytest.mark.parametrize('name', DENSE[:12])
def test_what_no_other_family_can_be_is_exported_as_it_was(ours, name, tmp_path):
    ours(name).save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == CASES[name].model_type


def test_letters_of_a_pattern_are_understood(made, tmp_path):
    """EXAONE 4 as published: the last layer sees all, whatever its letter."""
    def change(config, tensors):
        config |= {'layer_types': None, 'sliding_window_pattern': 'LLLG'}
    assert load(copy_of(made('exaone4'), tmp_path, change)).config.layer_pattern == 'wwwnn'


@torch.no_grad()
def test_norms_without_weights_are_exported_as_long_as_these_are_ones(ours, tmp_path):
    model = copy.deepcopy(ours('olmo'))
    model.h[1].ln_2.weight[3] = 1.1
    with pytest.raises(ValueError, match=r'h\.1\.ln_2\.weight=trained must be all ones.* olmo') as error:
        model.save_pretrained(tmp_path)
    one_sentence(error.value)


def test_adding_a_family_is_what_the_docstring_shows(tmp_path, monkeypatch):
    example = ''.join(re.findall(r'^    .*\n', families.__doc__, re.M))
    names = {**vars(keys), **vars(llama), 'FAMILIES': {}}
    exec(textwrap.dedent(example), names)
    monkeypatch.setitem(FAMILIES, 'arcee', names['FAMILIES']['arcee'])
    case = Case('arcee', {**YARN, 'attention_bias': True})
    reference = redraw(transformers.AutoModelForCausalLM.from_config(config_of(case)))
    reference.save_pretrained(tmp_path)
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = SimpleNamespace(idx=idx, logits=load_reference(tmp_path, case)(idx).logits)
        model = load(tmp_path)
        assert_logits(model, want, 'arcee')
        model.save_pretrained(tmp_path / 'again')
        assert_logits(load_reference(tmp_path / 'again', case), want, 'arcee, exported')


# ----------------------------------------------------------------------------------------------------------
# Export of what was made here


def redraw_ours(model):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.1 * noise if p.dim() < 2 or 'A_log' in name else 0.2 * noise)
    return model


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'mixtral', 'qwen3', 'gemma2', 'deepseek',
                                    'mamba2', 'jamba', 'bert', 'falcon_h1', 'lfm2', 'nemotron_h', 'zamba2'])
@torch.no_grad()
def test_models_trained_here_export(family, tmp_path):
    flags = shrink(flags_of(ROOT / 'config' / f'{family}_small.py'))
    flags |= {'attn_scale': (flags['head_dim'] / 2) ** -0.5} if family == 'zamba2' else {}
    model = redraw_ours(build(flags))
    idx = torch.randint(model.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    theirs, info = load_reference(tmp_path, Case(family), output_loading_info=True)
    assert not any(info.values()), f'{family}: {info}'
    want = SimpleNamespace(idx=idx, logits=model(idx)[0])
    assert_logits(theirs, want, family)
    assert torch.equal(load(tmp_path)(idx)[0], want.logits)


RELATIVE = dict(n_encoder=2, pos='relative', norm='rmsnorm', ffn='relu', bias=False)
T5 = RELATIVE | dict(attn_scale=1.0)


@pytest.mark.parametrize('family, flags', [
    ('t5', flags_of(ROOT / 'config' / 't5_small.py')),
    ('t5', T5 | dict(n_layer=3, tie=False, ffn='geglu', head_dim=7)), ('umt5', T5 | dict(rel_shared=False)),
    ('bart', dict(n_encoder=3, norm_at='post', embed_norm=True, head_bias=True, embed_scale=True))])
@torch.no_grad()
def test_an_encoder_and_a_decoder_trained_here_export(family, flags, tmp_path):
    model = redraw_ours(build(shrink(flags)))
    generator = torch.Generator().manual_seed(0)
    V, made = model.config.vocab_size, SimpleNamespace()
    made.idx, made.source = (torch.randint(V, (2, n), generator=generator) for n in (21, 17))
    made.source[1, 9:] = -1
    model.save_pretrained(tmp_path)
    theirs, info = load_reference(tmp_path, Case(family), output_loading_info=True)
    assert not any(info.values()) and theirs.config.model_type == family, f'{family}: {info}'
    want = answer_of(model, made)
    assert_logits(theirs, want, family)
    assert torch.equal(logits_of(load(tmp_path), made), want.logits)


@pytest.mark.parametrize('flags, word', [
    (RELATIVE, 'attn_scale=None must be 1.0'), (T5 | dict(n_encoder=0), 'pos'),
    (T5 | dict(n_kv_head=2), 'n_kv_head'), (T5 | dict(logit_scale=0.3), 'logit_scale'),
    (T5 | dict(embed_scale=True), 'embed_scale'), (T5 | dict(layer_pattern='aw', window=4), 'layer_pattern'),
    (dict(n_encoder=2), 'pos=learned must be relative'),
    (dict(n_encoder=2, pos='rope', norm='rmsnorm', bias=False), 'pos=rope must be relative'),
    (dict(n_encoder=3, norm_at='post', embed_norm=True, head_bias=True, tie=False), 'tie'),
    (dict(pos='rope', attn='diff', n_kv_head=2, norm='rmsnorm', bias=False), 'attn'),
    (dict(pos='rope', attn='gau', norm='rmsnorm', ffn='swiglu', bias=False), 'attn'),
    (dict(pos='rope', residual='mhc', norm='rmsnorm', ffn='swiglu', bias=False), 'residual'),
    (dict(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, value_embed=True), 'value_embed'),
    (dict(embed_skip=True), 'embed_skip'),
    (dict(pos='sinusoidal'), 'pos'),
    (dict(norm_at='sandwich'), 'norm_at'),
    (dict(ffn='relu2'), 'ffn'),
    (dict(layer_pattern='am', ssm_head_dim=8), 'norm'),     # to be a bamba
])
def test_flags_of_no_family_do_not_export(flags, word, tmp_path):
    with pytest.raises(ValueError, match=rf'\b({word})\b') as error:
        build(toy(**flags)).save_pretrained(tmp_path)
    one_sentence(error.value)
    assert not list(tmp_path.iterdir())
