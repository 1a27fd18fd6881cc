"""
RWKV-4. Each of their blocks is two of ours, which take turns: `r`, whose mixer reads all past tokens, and
`k`, whose mixer is their feed-forward, as that reads the token before.
"""
from nanoblocks.pretrained.families.family import LAYERNORM, Family
from nanoblocks.pretrained.keys import Key, refuse
from nanoblocks.pretrained.layouts import Piece

FAMILIES = {}


class Complement(Piece):
    """What is left of 1: they mix x m + x' (1 - m) of a token and the one before it, we x + mu (x' - x)."""

    def load(self, theirs):
        super().load(1 - theirs.float())

    def save(self, *theirs):
        return 1 - super().save(*theirs)


def mixtures(p, c):
    """The rows of mu, each as a tensor (1,1,C)."""
    return [Complement((1, 1, len(row)), [(row, lambda theirs: theirs)]) for row in p]


def rwkv_tensors(c, hf):
    rules = {'wte': 'rwkv.embeddings', 'ln_e': 'rwkv.blocks.0.pre_ln', 'ln_f': 'rwkv.ln_out',
             'lm_head': 'head'}
    for i in range(c.n_layer // 2):
        block, mix, feed = f'rwkv.blocks.{i}.', f'h.{2 * i}.', f'h.{2 * i + 1}.'
        read, fed = block + 'attention.', block + 'feed_forward.'
        rules |= {
            mix + 'ln_1': block + 'ln1', feed + 'ln_1': block + 'ln2',
            mix + 'mixer.shift.mu': (read + 'time_mix_{key,value,receptance}', mixtures),
            mix + 'mixer.k': read + 'key', mix + 'mixer.v': read + 'value',
            mix + 'mixer.r': read + 'receptance', mix + 'mixer.c_proj': read + 'output',
            mix + 'mixer.decay': read + 'time_decay', mix + 'mixer.bonus': read + 'time_first',
            feed + 'mixer.shift.mu': (fed + 'time_mix_{key,receptance}', mixtures),
            feed + 'mixer.c_fc': fed + 'key', feed + 'mixer.c_proj': fed + 'value',
            feed + 'mixer.gate': fed + 'receptance'}
    return rules


def read_rwkv(hf):
    width = hf['hidden_size']
    if hf.get('attention_hidden_size', width) != width:
        refuse(hf, 'attention_hidden_size', f'be hidden_size={width}')
    return {}


FAMILIES['rwkv'] = Family(
    architecture='RwkvForCausalLM',
    flags=LAYERNORM | {'pos': 'none', 'embed_norm': True, 'layer_pattern': 'rk', 'ffn_pattern': '-',
                       'rnn': 'rwkv4', 'rnn_mix_gate': True},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'intermediate_size': 'rnn_mix_width',
          'num_hidden_layers': Key(('n_layer',), lambda n, hf: 2 * n, lambda c: c.n_layer // 2),
          'context_length': 'block_size', 'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tie'},
    aliases={'max_position_embeddings': 'context_length'},
    defaults={'context_length': 1024},
    only={'layer_norm_epsilon': 1e-5},      # their last norm has no other
    tensors=rwkv_tensors,
    mixers='rk', read=read_rwkv)
