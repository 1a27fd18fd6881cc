"""
Encoders with a head for masked tokens: EuroBERT, BERT, ELECTRA, RoBERTa, DistilBERT, ModernBERT, nomic BERT.

Here all tokens are of type 0: its vector is added to every position, or to every token where there are no
learned positions. An export has zeros for all types whose vectors are already part of the positions.
"""
from functools import partial

import torch

from nanoblocks.pretrained.families.family import ALL_BIASES, LAYERNORM, TIED, Family
from nanoblocks.pretrained.families.gemma import read_two_bases, write_two_bases
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    BIAS_KEYS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
)
from nanoblocks.pretrained.families.recurrent import stored
from nanoblocks.pretrained.keys import (
    GATED_FFN,
    UNGATED_FFN,
    Key,
    mixer_letters,
    refuse,
    renamed,
    without,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import Piece, gate_up, piece, qkv, same
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

# ----------------------------------------------------------------------------------------------------------
# EuroBERT: Llama in both directions. Where its feed-forwards have biases, so has its head

FAMILIES['eurobert'] = Family(
    architecture='EuroBertForMaskedLM',
    flags=LLAMA_FLAGS | {'causal': False},
    keys=LLAMA_KEYS | ATTENTION_BIAS | {'mlp_bias': ('ffn_bias', 'head_bias')},
    defaults={'rms_norm_eps': 1e-5},
    tensors=LLAMA_TENSORS,
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Tables of which ours are a part


class Rows(Piece):
    """A part of a table; the rows that no token reads are written as zeros."""

    def save(self, theirs=None):
        return super().save(torch.zeros(self.shape))


class Folded(Piece):
    """A part of a table that is added to what ours already hold; the table is written as zeros."""

    def load(self, theirs):
        for ours, part in self.parts:
            ours.add_(part(theirs))

    def save(self, theirs=None):
        return torch.zeros(self.shape)


def row_0(theirs):
    return theirs[0]


def positions(p, c, types, first=0):
    """Two tables: of positions, which begin at row `first`, and of types of tokens."""
    return [Rows((first + len(p), p.shape[1]), [(p, lambda theirs: theirs[first:])]),
            Folded((types, p.shape[1]), [(p, row_0)])]


def type_0(p, c, types):
    return [Rows((types, len(p)), [(p, row_0)])]


def read_types(hf):
    """No flag; ValueError for a table of types without rows."""
    if not hf['type_vocab_size']:
        refuse(hf, 'type_vocab_size', 'be at least 1, as every token has a type')
    return {}


# Heads. Their bias has two names in memory. transformers writes one of them where the weight is tied; where
# it is not it writes both, and the decoder's counts.


def both(p, c):
    return [piece(p), piece(p)]


def head_tensors(c, place):
    """The rules of a head at `place`, such as cls.predictions."""
    bias = (place + '.{decoder.bias,bias}', both)
    return {'lm_head': place + '.decoder', 'lm_head.bias': place + '.bias' if c.tie else bias}


def bias_as_stored(rules, files, c):
    decoder = rules['lm_head'][0]
    names = [decoder + '.bias', decoder.removesuffix('.decoder') + '.bias']
    return rules | {'lm_head.bias': (names[names[0] not in files.where], same)}


# ----------------------------------------------------------------------------------------------------------
# BERT

GELU = renamed('ffn', {'gelu': 'gelu'})     # the head's too
BERT_FLAGS = LAYERNORM | ALL_BIASES | {
    'causal': False, 'pos': 'learned', 'norm_at': 'post', 'embed_norm': True, 'head_mlp': True,
    'head_mlp_bias': True, 'head_act': 'gelu', 'head_bias': True}
BERT_KEYS = without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim', 'rms_norm_eps') | {
    'layer_norm_eps': 'norm_eps', 'hidden_act': GELU}
BERT_DEFAULTS = TIED | {'layer_norm_eps': 1e-12, 'hidden_act': 'gelu', 'type_vocab_size': 2}
BERT_ONLY = {'position_embedding_type': 'absolute', 'is_decoder': False, 'add_cross_attention': False}
# the head for the next sentence, and what it reads
BERT_UNREAD = r'\.pooler\.|^cls\.seq_relationship\.|\.position_ids$|^(cls\.predictions|lm_head)\.bias$'


def encoder_tensors(hf, place, first=0):
    """The rules of what precedes the head, under this prefix."""
    layer = place + '.encoder.layer.{i}.'
    return {
        'wte': place + '.embeddings.word_embeddings',
        'wpe': (place + '.embeddings.{position,token_type}_embeddings',
                partial(positions, types=hf['type_vocab_size'], first=first)),
        'ln_e': place + '.embeddings.LayerNorm',
        'h.{i}.mixer.c_attn': (layer + 'attention.self.{query,key,value}', qkv),
        'h.{i}.mixer.c_proj': layer + 'attention.output.dense',
        'h.{i}.ln_1_sum': layer + 'attention.output.LayerNorm',
        'h.{i}.ffn.c_fc': layer + 'intermediate.dense',
        'h.{i}.ffn.c_proj': layer + 'output.dense',
        'h.{i}.ln_2_sum': layer + 'output.LayerNorm'}


def bert_tensors(c, hf):
    return encoder_tensors(hf, 'bert') | head_tensors(c, 'cls.predictions') | {
        'head_mlp.c_fc': 'cls.predictions.transform.dense',
        'head_mlp.norm': 'cls.predictions.transform.LayerNorm'}


FAMILIES['bert'] = Family(
    architecture='BertForMaskedLM',
    flags=BERT_FLAGS,
    keys=BERT_KEYS,
    defaults=BERT_DEFAULTS,
    only=BERT_ONLY,
    tensors=bert_tensors,
    as_stored=bias_as_stored, unread=BERT_UNREAD,
    read=read_types, write=lambda c: {'type_vocab_size': 2})


# ----------------------------------------------------------------------------------------------------------
# ELECTRA, its generator: embedding and head may be narrower than the stream; the head has GELU whatever
# hidden_act is


def electra_tensors(c, hf):
    return encoder_tensors(hf, 'electra') | {
        'embed_proj': 'electra.embeddings_project', 'lm_head': 'generator_lm_head',
        'head_mlp.c_fc': 'generator_predictions.dense', 'head_mlp.norm': 'generator_predictions.LayerNorm'}


FAMILIES['electra'] = Family(
    architecture='ElectraForMaskedLM',
    flags=BERT_FLAGS,
    keys=BERT_KEYS | {'embedding_size': 'embed_width', 'hidden_act': UNGATED_FFN},
    defaults=BERT_DEFAULTS | {'embedding_size': 128},
    only=BERT_ONLY,
    tensors=electra_tensors,
    unread=BERT_UNREAD,
    read=read_types, write=lambda c: {'type_vocab_size': 2})


# ----------------------------------------------------------------------------------------------------------
# RoBERTa: positions begin after that of the padding token, the head has GELU whatever hidden_act is.
# It takes every token 1 for padding, so ELECTRA comes first where both fit what was made here

FIRST = 2       # its table of positions begins with two rows that no token reads


def roberta_tensors(c, hf):
    return encoder_tensors(hf, 'roberta', FIRST) | head_tensors(c, 'lm_head') | {
        'head_mlp.c_fc': 'lm_head.dense', 'head_mlp.norm': 'lm_head.layer_norm'}


FAMILIES['roberta'] = Family(
    architecture='RobertaForMaskedLM',
    flags=BERT_FLAGS,
    keys=BERT_KEYS | {
        'max_position_embeddings': Key(
            ('block_size',), lambda n, hf: n - FIRST, lambda c: c.block_size + FIRST),
        'hidden_act': UNGATED_FFN},
    defaults=BERT_DEFAULTS | {'pad_token_id': 1},
    only=BERT_ONLY | {'pad_token_id': FIRST - 1},
    tensors=roberta_tensors,
    as_stored=bias_as_stored, unread=BERT_UNREAD,
    read=read_types, write=lambda c: {'type_vocab_size': 1, 'pad_token_id': FIRST - 1})


# ----------------------------------------------------------------------------------------------------------
# DistilBERT: BERT without types of tokens, under other names

LAYER = 'distilbert.transformer.layer.{i}.'

FAMILIES['distilbert'] = Family(
    architecture='DistilBertForMaskedLM',
    flags=BERT_FLAGS | {'norm_eps': 1e-12},
    keys={'vocab_size': 'vocab_size', 'dim': 'n_embd', 'n_layers': 'n_layer', 'n_heads': 'n_head',
          'hidden_dim': 'ffn_width', 'max_position_embeddings': 'block_size', 'activation': GELU,
          'tie_word_embeddings': 'tie'},
    aliases={'hidden_size': 'dim', 'num_hidden_layers': 'n_layers', 'num_attention_heads': 'n_heads'},
    defaults=TIED | {'activation': 'gelu'},
    tensors={
        'wte': 'distilbert.embeddings.word_embeddings', 'wpe': 'distilbert.embeddings.position_embeddings',
        'ln_e': 'distilbert.embeddings.LayerNorm',
        'h.{i}.mixer.c_attn': (LAYER + 'attention.{q,k,v}_lin', qkv),
        'h.{i}.mixer.c_proj': LAYER + 'attention.out_lin',
        'h.{i}.ln_1_sum': LAYER + 'sa_layer_norm',
        'h.{i}.ffn.c_fc': LAYER + 'ffn.lin1', 'h.{i}.ffn.c_proj': LAYER + 'ffn.lin2',
        'h.{i}.ln_2_sum': LAYER + 'output_layer_norm',
        'head_mlp.c_fc': 'vocab_transform', 'head_mlp.norm': 'vocab_layer_norm',
        'lm_head': 'vocab_projector'},
    unread=BERT_UNREAD)


# ----------------------------------------------------------------------------------------------------------
# ModernBERT: windows in two of three layers, which rotate at a base of their own; no norm before the first
# attention, as the embedding has one


def read_modernbert(hf):
    every = hf['global_attn_every_n_layers']
    return read_two_bases(hf, mixer_letters(hf, lambda i: 'w' if i % every else 'a'))


def write_modernbert(c):
    return write_two_bases(c) | write_layer_types(c)


# a token sees half of local_attention to each side, and itself
HALVES = Key(('window',), lambda n, hf: n // 2 + 1, lambda c: c.window and 2 * (c.window - 1))
HEAD_ACT = renamed('head_act', {'gelu': 'gelu', 'silu': 'silu'})

FAMILIES['modernbert'] = Family(
    architecture='ModernBertForMaskedLM',
    flags={'causal': False, 'pos': 'rope', 'norm': 'layernorm', 'bias': False, 'embed_norm': True,
           'first_norm': False, 'head_mlp': True},
    keys=without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'hidden_act') | BIAS_KEYS | {
        'norm_eps': 'norm_eps', 'norm_bias': 'norm_bias', 'hidden_activation': GATED_FFN,
        'local_attention': HALVES, 'classifier_activation': HEAD_ACT, 'classifier_bias': 'head_mlp_bias',
        'decoder_bias': 'head_bias'},
    aliases={'global_rope_theta': 'rope_theta', 'local_rope_theta': 'rope_local_base_freq'},
    defaults=TIED | {
        'rope_theta': 160000.0, 'rope_local_base_freq': 10000.0, 'norm_eps': 1e-5, 'norm_bias': False,
        'hidden_activation': 'gelu', 'local_attention': 128, 'global_attn_every_n_layers': 3,
        'classifier_activation': 'gelu', 'classifier_bias': False, 'decoder_bias': True},
    only={'rope_scaling': None},
    tensors={
        'wte': 'model.embeddings.tok_embeddings', 'ln_e': 'model.embeddings.norm',
        'h.{i}.ln_1': 'model.layers.{i}.attn_norm', 'h.{i}.ln_2': 'model.layers.{i}.mlp_norm',
        'h.{i}.mixer.c_attn': 'model.layers.{i}.attn.Wqkv', 'h.{i}.mixer.c_proj': 'model.layers.{i}.attn.Wo',
        'h.{i}.ffn.c_fc': 'model.layers.{i}.mlp.Wi', 'h.{i}.ffn.c_proj': 'model.layers.{i}.mlp.Wo',
        'ln_f': 'model.final_norm', 'head_mlp.c_fc': 'head.dense', 'head_mlp.norm': 'head.norm',
        'lm_head': 'decoder'},
    mixers='aw', read=read_modernbert, write=write_modernbert)


# ----------------------------------------------------------------------------------------------------------
# nomic BERT: rotary positions and a gate; the vector of type 0 is embed_bias, as a tied head does not have it


def nomic_tensors(c, hf):
    layer = 'nomic_bert.encoder.layers.{i}.'
    return head_tensors(c, 'cls.predictions') | {
        'wte': 'nomic_bert.embeddings.word_embeddings',
        'wte.bias': ('nomic_bert.embeddings.token_type_embeddings.weight',
                     partial(type_0, types=hf['type_vocab_size'])),
        'ln_e': 'nomic_bert.emb_ln',
        'h.{i}.mixer.c_attn': layer + 'attn.Wqkv', 'h.{i}.mixer.c_proj': layer + 'attn.out_proj',
        'h.{i}.ln_1_sum': layer + 'norm1',
        'h.{i}.ffn.c_fc': (layer + 'mlp.{fc12,fc11}', gate_up), 'h.{i}.ffn.c_proj': layer + 'mlp.fc2',
        'h.{i}.ln_2_sum': layer + 'norm2',
        'head_mlp.c_fc': 'cls.predictions.transform.dense',
        'head_mlp.norm': 'cls.predictions.transform.layer_norm'}


def nomic_as_stored(rules, files, c):
    """In memory, transformers has names like those of Llama."""
    rules = bias_as_stored(rules, files, c)
    return rules | NOMIC_IN_MEMORY if stored(files, '.self_attn.o_proj.weight') else rules


BLOCK = 'nomic_bert.layers.{i}.'
NOMIC_IN_MEMORY = {
    'ln_e': 'nomic_bert.embeddings.LayerNorm',
    'h.{i}.mixer.c_attn': (BLOCK + 'self_attn.{q,k,v}_proj', qkv),
    'h.{i}.mixer.c_proj': BLOCK + 'self_attn.o_proj',
    'h.{i}.ln_1_sum': BLOCK + 'post_attention_layernorm',
    'h.{i}.ffn.c_fc': (BLOCK + 'mlp.{gate,up}_proj', gate_up), 'h.{i}.ffn.c_proj': BLOCK + 'mlp.down_proj',
    'h.{i}.ln_2_sum': BLOCK + 'post_mlp_layernorm'}


def read_nomic(hf):
    return read_types(hf) | read_rope(hf) | {'head_act': hf['hidden_act']}


FAMILIES['nomic_bert'] = Family(
    architecture='NomicBertForMaskedLM',
    flags=without(BERT_FLAGS, *ALL_BIASES, 'head_act') | {'pos': 'rope', 'bias': False, 'embed_bias': True},
    keys=BERT_KEYS | {'head_dim': 'head_dim',
                      'hidden_act': renamed('ffn', {'silu': 'swiglu', 'gelu': 'geglu_erf'})},
    defaults=BERT_DEFAULTS | {'hidden_act': 'silu', 'rope_theta': 1000.0},
    only=BERT_ONLY,
    tensors=nomic_tensors,
    as_stored=nomic_as_stored, unread=BERT_UNREAD,
    read=read_nomic, write=lambda c: write_rope(c) | {'type_vocab_size': 2, 'pad_token_id': 0})
