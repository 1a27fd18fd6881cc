"""
Encoders with a decoder: T5 (v1.0, v1.1, FLAN), mT5, umT5, BART.

Both sides share one embedding. Files may hold copies of it, one for each side, which must be equal.
"""
import torch

from nanoblocks.pretrained.families.bert import Rows
from nanoblocks.pretrained.families.family import ALL_BIASES, LAYERNORM, TIED, Family
from nanoblocks.pretrained.keys import UNGATED_FFN, Key, refuse, renamed
from nanoblocks.pretrained.layouts import halves, piece, qkv, same

FAMILIES = {}
BOTH_SIDES = {'is_encoder_decoder': True, 'is_decoder': False}


def one_embedding(rules, files, c):
    """The rules as they are; ValueError where a side has another embedding than the one that is shared."""
    shared = rules['wte'][0] + '.weight'
    for name in files.where:
        if name.endswith('coder.embed_tokens.weight') and shared in files.where:
            if not torch.equal(files.get(name), files.get(shared)):
                raise ValueError(f'{name} in {files.folder} must be equal to {shared}: encoder and decoder '
                                 'have one embedding here')
    return rules


# ----------------------------------------------------------------------------------------------------------
# T5: positions are a bias on the scores, which are not scaled. v1.0 has ReLU, and scales the input of its
# tied head; v1.1 has a gate and a head of its own


def t5_side(place, letter, ours, ffn):
    """The rules of the blocks of one side. ffn: the number of its branch."""
    layer, block = f'{place}.block.{{i}}.layer.', f'{ours}h.{{{letter}}}.'
    table = '.layer.0.SelfAttention.relative_attention_bias.weight'
    return {
        block + 'ln_1': layer + '0.layer_norm',
        block + 'mixer.c_attn': (layer + '0.SelfAttention.{q,k,v}', qkv),
        block + 'mixer.c_proj': layer + '0.SelfAttention.o',
        # umT5's, one for each layer
        block + 'mixer.scores.relative.table': place + '.block.{i}' + table,
        ours + 'wpe.table': place + '.block.0' + table,
        block + 'ln_2': f'{layer}{ffn}.layer_norm',
        block + 'ffn.c_proj': f'{layer}{ffn}.DenseReluDense.wo',
        ours + 'ln_f': place + '.final_layer_norm'}


def t5_tensors(c, hf):
    wi, layout = ('{wi_0,wi_1}', halves) if 'glu' in c.ffn else ('wi', same)
    cross = 'decoder.block.{i}.layer.1.'
    return t5_side('encoder', 's', 'encoder.', 1) | t5_side('decoder', 'i', '', 2) | {
        'wte': 'shared', 'lm_head': 'lm_head',
        'encoder.h.{s}.ffn.c_fc': ('encoder.block.{i}.layer.1.DenseReluDense.' + wi, layout),
        'h.{i}.ffn.c_fc': ('decoder.block.{i}.layer.2.DenseReluDense.' + wi, layout),
        'h.{i}.ln_x': cross + 'layer_norm',
        'h.{i}.cross.c_q': cross + 'EncDecAttention.q',
        'h.{i}.cross.c_kv': (cross + 'EncDecAttention.{k,v}', halves),
        'h.{i}.cross.c_proj': cross + 'EncDecAttention.o'}


def read_t5(hf):
    """Old files say by tie_word_embeddings whether the head is scaled; whether it is tied, they show."""
    scaled = hf.get('scale_decoder_outputs', hf['tie_word_embeddings'])
    return {'logit_scale': hf['d_model'] ** -0.5 if scaled else 1.0}


def write_t5(c):
    return BOTH_SIDES | {'scale_decoder_outputs': c.logit_scale != 1.0}


T5_FFN = renamed('ffn', {
    'relu': 'relu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gated-gelu': 'geglu', 'gated-silu': 'swiglu',
    'gated-relu': 'reglu', 'gated-gelu_new': 'geglu'})
T5 = dict(
    flags={'causal': True, 'pos': 'relative', 'rel_shared': True, 'norm': 'rmsnorm', 'bias': False,
           'attn_scale': 1.0},
    keys={'vocab_size': 'vocab_size', 'd_model': 'n_embd', 'num_heads': 'n_head', 'd_kv': 'head_dim',
          'd_ff': 'ffn_width', 'num_layers': 'n_encoder', 'num_decoder_layers': 'n_layer',
          'relative_attention_num_buckets': 'rel_buckets',
          'relative_attention_max_distance': 'rel_distance', 'layer_norm_epsilon': 'norm_eps',
          'feed_forward_proj': T5_FFN, 'tie_word_embeddings': 'tie'},
    # where the decoder's is absent, both sides have as many
    aliases={'num_layers': 'num_decoder_layers'},
    defaults=TIED | {'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'gated-gelu',
                     'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128},
    only=BOTH_SIDES,
    tensors=t5_tensors,
    as_stored=one_embedding,
    # copies of the embedding, and a table that the first files have though nothing reads it
    unread=r'coder\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$',
    read=read_t5, write=write_t5)

FAMILIES['t5'] = Family(architecture='T5ForConditionalGeneration', **T5 | {
    'defaults': T5['defaults'] | {'feed_forward_proj': 'relu'}})
# v1.1 in many languages. It never scales the input of its head
FAMILIES['mt5'] = Family(architecture='MT5ForConditionalGeneration', **T5 | {
    'flags': T5['flags'] | {'logit_scale': 1.0}, 'read': lambda hf: {}, 'write': lambda c: BOTH_SIDES})
# each layer has a table of distances of its own
FAMILIES['umt5'] = Family(architecture='UMT5ForConditionalGeneration', **T5 | {
    'flags': T5['flags'] | {'rel_shared': False}})


# ----------------------------------------------------------------------------------------------------------
# BART: post-norm and biases everywhere, learned positions, and a bias of the logits that is no parameter

FIRST = 2       # its tables of positions begin with two rows that no token reads


def positions(p, c):
    return [Rows((FIRST + len(p), p.shape[1]), [(p, lambda theirs: theirs[FIRST:])])]


def one_row(p, c):
    return [piece(p, (1, len(p)))]


def bart_side(place, letter, ours):
    layer, block = f'model.{place}.layers.{{i}}.', f'{ours}h.{{{letter}}}.'
    return {
        ours + 'wpe': (f'model.{place}.embed_positions', positions),
        ours + 'ln_e': f'model.{place}.layernorm_embedding',
        block + 'mixer.c_attn': (layer + 'self_attn.{q,k,v}_proj', qkv),
        block + 'mixer.c_proj': layer + 'self_attn.out_proj',
        block + 'ln_1_sum': layer + 'self_attn_layer_norm',
        block + 'ffn.c_fc': layer + 'fc1', block + 'ffn.c_proj': layer + 'fc2',
        block + 'ln_2_sum': layer + 'final_layer_norm'}


CROSS = 'model.decoder.layers.{i}.encoder_attn'
BART_TENSORS = bart_side('encoder', 's', 'encoder.') | bart_side('decoder', 'i', '') | {
    'wte': 'model.shared', 'lm_head': 'lm_head', 'lm_head.bias': ('final_logits_bias', one_row),
    'h.{i}.cross.c_q': CROSS + '.q_proj', 'h.{i}.cross.c_kv': (CROSS + '.{k,v}_proj', halves),
    'h.{i}.cross.c_proj': CROSS + '.out_proj', 'h.{i}.ln_x_sum': CROSS + '_layer_norm'}


def read_bart(hf):
    """No flag; ValueError where encoder and decoder have blocks of different sizes."""
    for key in ('attention_heads', 'ffn_dim'):
        if hf['encoder_' + key] != hf['decoder_' + key]:
            refuse(hf, 'decoder_' + key, f'be encoder_{key}={hf["encoder_" + key]}: encoder and decoder have '
                                         'the same blocks here')
    return {}


FAMILIES['bart'] = Family(
    architecture='BartForConditionalGeneration',
    flags=LAYERNORM | ALL_BIASES | {
        'causal': True, 'pos': 'learned', 'norm_at': 'post', 'norm_eps': 1e-5, 'embed_norm': True,
        'head_bias': True, 'tie': True},
    keys={'vocab_size': 'vocab_size', 'd_model': 'n_embd', 'encoder_layers': 'n_encoder',
          'decoder_layers': 'n_layer', 'encoder_attention_heads': 'n_head',
          'decoder_attention_heads': 'n_head', 'encoder_ffn_dim': 'ffn_width', 'decoder_ffn_dim': 'ffn_width',
          'max_position_embeddings': 'block_size', 'activation_function': UNGATED_FFN,
          'scale_embedding': Key(('embed_scale',), lambda value, hf: value, lambda c: bool(c.embed_scale))},
    defaults=TIED | {'activation_function': 'gelu', 'scale_embedding': False},
    only=BOTH_SIDES | {'tie_word_embeddings': True, 'normalize_before': False,
                       'add_final_layer_norm': False},
    tensors=BART_TENSORS,
    as_stored=one_embedding,
    unread=r'coder\.(embed_tokens\.weight|version)$', zeros='^final_logits_bias$',
    read=read_bart, write=lambda c: BOTH_SIDES | TIED)

# families that are not read, and why
REFUSED = {'t5gemma': 'its encoder has an embedding of its own, and a window that is one token wider'}
