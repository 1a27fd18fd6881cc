"""Zamba 2: Mamba-2 in every layer; before some, a block of attention and feed-forward that they share."""
from model import ssm_inner
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.families.state_space import mixer_tensors, read_least, write_least
from nanoblocks.pretrained.keys import mixer_letters, refuse, shortest_pattern, whole_number, without
from nanoblocks.pretrained.layouts import qkv
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

LETTERS = {'linear_attention': 'm', 'mamba': 'm', 'hybrid': 'z'}


def read_zamba2(hf):
    if hf['use_shared_attention_adapter']:
        refuse(hf, 'use_shared_attention_adapter', 'be false: here layers add to the shared feed-forward, '
               'not to the shared attention')
    letters = mixer_letters(hf | {'layer_types': hf.get('layers_block_type') or hf.get('layer_types')},
                            lambda i: 'z' if i in hf.get('hybrid_layer_ids', ()) else 'm', LETTERS)
    rope = {'pos': 'rope'} | read_rope(hf) if hf['use_mem_rope'] and 'z' in letters else {'pos': 'none'}
    heads, inner = hf['n_mamba_heads'], int(hf['mamba_expand']) * hf['hidden_size']
    width = hf.get('attention_head_dim') or 2 * hf['hidden_size'] // hf['num_attention_heads']
    if inner % heads:
        refuse(hf, 'n_mamba_heads', f'divide the inner width {inner}')
    return rope | read_least(hf) | {
        'ssm_head_dim': inner // heads, 'layer_pattern': shortest_pattern(letters),
        'head_dim': width, 'attn_scale': (width / 2) ** -0.5,
        'tied_width': hf.get('intermediate_size') or 4 * hf['hidden_size']}


def write_zamba2(c):
    names = {'m': 'linear_attention', 'z': 'hybrid'}
    return write_rope(c) | write_least(c) | {
        'tie_word_embeddings': True, 'hidden_act': 'gelu', 'use_mem_rope': c.pos == 'rope',
        'layers_block_type': [names[mixer] for mixer, _ in c.plan()],
        'n_mamba_heads': ssm_inner(c) // c.ssm_head_dim,
        'intermediate_size': c.tied_width, 'attention_head_dim': c.head_dim}


def zamba2_tensors(c, hf):
    """Their files hold a shared block once, in the first layer that uses it, with what all layers add."""
    rules = LLAMA_TENSORS | mixer_tensors('model.layers.{i}.mamba.') | {
        'ln_f': 'model.final_layernorm', 'h.{z}.mixer.c_proj': 'model.layers.{i}.linear',
        'h.{z}.mixer.norm': 'model.layers.{i}.mamba_decoder.input_layernorm'}
    rules |= mixer_tensors('model.layers.{i}.mamba_decoder.mamba.', 'h.{z}.mixer.ssm.')
    uses = [i for i, (mixer, _) in enumerate(c.plan()) if mixer == 'z']
    for use, layer in enumerate(uses):
        number = use % c.tied_blocks
        block = f'model.layers.{uses[number]}.shared_transformer.'
        adapter = f'{block}feed_forward.gate_up_proj_adapter_list.{use}.'
        rules |= {f'h.{layer}.mixer.more.{part}': f'{adapter}{part}' for part in (0, 1)}
        rules |= {
            f'tied.{number}.ln_1': block + 'input_layernorm',
            f'tied.{number}.attn.c_attn': (block + 'self_attn.{q,k,v}_proj', qkv),
            f'tied.{number}.attn.c_proj': block + 'self_attn.o_proj',
            f'tied.{number}.ln_2': block + 'pre_ff_layernorm',
            f'tied.{number}.ffn.c_fc': block + 'feed_forward.gate_up_proj',
            f'tied.{number}.ffn.c_proj': block + 'feed_forward.down_proj'}
    return rules


FAMILIES['zamba2'] = Family(
    architecture='Zamba2ForCausalLM',
    flags={'norm': 'rmsnorm', 'bias': False, 'ffn_pattern': '-', 'ssm': 'mamba2', 'ssm_eps': 1e-5,
           'conv_bias': True, 'ssm_bias': False, 'qkv_bias': False, 'proj_bias': False, 'tie': True},
    keys=without(LLAMA_KEYS, 'head_dim', 'intermediate_size', 'hidden_act', 'tie_word_embeddings') | {
        'mamba_d_state': 'ssm_state', 'mamba_d_conv': 'ssm_conv', 'mamba_ngroups': 'ssm_groups',
        'mamba_expand': whole_number('ssm_expand'), 'num_mem_blocks': 'tied_blocks',
        'adapter_rank': 'tied_rank'},
    defaults=TIED | {
        'rms_norm_eps': 1e-5, 'mamba_d_state': 64, 'mamba_d_conv': 4, 'mamba_ngroups': 1, 'mamba_expand': 2,
        'n_mamba_heads': 8, 'num_mem_blocks': 1, 'adapter_rank': 128, 'use_mem_rope': False,
        'use_shared_attention_adapter': False, 'time_step_min': 0.001, 'hidden_act': 'gelu'},
    # transformers shares no block where it ties no head
    only={'tie_word_embeddings': True, 'hidden_act': 'gelu', 'add_bias_linear': False,
          'use_long_context': False},
    tensors=zamba2_tensors,
    mixers='mz', read=read_zamba2, write=write_zamba2)
