"""Surgery: flags that change a block of a published checkpoint on the way in."""
import functools
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoints import assert_logits, copy_of, load, load_reference, made, one_sentence

from model import GPT


def averaged(groups, config, tensors):
    """Key and value heads as the mean of each group (Ainslie et al. 2023), worked out on the file."""
    size = config['head_dim']
    for key, p in tensors.items():
        if 'k_proj' in key or 'v_proj' in key:
            heads = p.view(groups, -1, size, *p.shape[1:])
            tensors[key] = heads.mean(1).reshape(-1, *p.shape[1:]).contiguous()
    config['num_key_value_heads'] = groups


@pytest.mark.parametrize('name', ['llama-mha-tied', 'llama-mha-biased'])
@pytest.mark.parametrize('groups', [1, 2, 3])
def test_fewer_kv_heads_are_means_of_groups(made, name, groups, tmp_path, capsys):
    made = made(name)
    theirs = load_reference(copy_of(made, tmp_path, functools.partial(averaged, groups)), made.case)
    idx = made.idx
    model = load(made.folder, n_kv_head=groups)
    assert model.config.n_kv_head == groups
    assert_logits(model, SimpleNamespace(idx=idx, logits=theirs(idx).logits), f'n_kv_head={groups}')
    printed = capsys.readouterr().out.lower()
    assert 'copied' in printed and 'converted' in printed, printed


def test_the_window_can_be_changed(made, tmp_path):
    def window(config, tensors):
        config.update(model_type='mistral', architectures=['MistralForCausalLM'], sliding_window=7)
    made = made('llama')
    theirs = load_reference(copy_of(made, tmp_path, window), made.case)
    model = load(made.folder, layer_pattern='w', window=7)
    logits = theirs(made.idx).logits
    assert (logits - made.logits).abs().max() > 0.1
    assert_logits(model, SimpleNamespace(idx=made.idx, logits=logits), 'window=7')


@torch.no_grad()
def test_upcycled_experts_start_as_the_dense_ffn(made, capsys):
    made = made('llama')
    model = load(made.folder, ffn_pattern='e', n_expert=4, n_expert_used=2, expert_width=51)
    assert model.num_params() > 2 * sum(p.numel() for p in made.model.parameters()) * 0.9
    # the weights of the chosen experts sum to one, so that any choice is the dense ffn
    assert_logits(model, made, 'upcycled')
    printed = capsys.readouterr().out.lower()
    assert 'copied' in printed and re.search('newly initiali[sz]ed', printed) and 'router' in printed, printed


def test_upcycling_some_layers_keeps_the_others(made):
    model = load(made('llama').folder, ffn_pattern='fef', n_expert=4, n_expert_used=3, expert_width=51)
    assert model.config.plan() == [('a', 'f'), ('a', 'e'), ('a', 'f')]
    assert_logits(model, made('llama'), 'upcycled in one layer')


def test_a_plain_load_says_that_nothing_is_new(made, capsys):
    load(made('llama').folder)
    printed = capsys.readouterr().out.lower()
    assert not re.search(r'[1-9]\d* [\w ]*newly', printed), printed


def test_a_setting_of_training_can_be_changed(made):
    model = load(made('llama').folder, dropout=0.1)
    assert model.config.dropout == 0.1
    assert_logits(model, made('llama'), 'dropout=0.1')


@pytest.mark.parametrize('overrides, word', [
    ({'attn': 'mla'}, 'attn'),
    ({'n_head': 3, 'head_dim': 10}, 'n_head|head_dim'),
    ({'n_embd': 48}, 'n_embd'),
    ({'n_kv_head': 4}, 'n_kv_head'),
    ({'no_such_flag': 1}, 'no_such_flag'),
    ({'layer_pattern': 'w'}, 'window'),
])
def test_surgery_that_cannot_be_done_is_refused(made, overrides, word):
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(made('llama-mha-tied').folder, **overrides)
    one_sentence(error.value)
