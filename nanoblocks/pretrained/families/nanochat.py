"""nanochat: norms without weights, one of them on the embedding; queries and keys rotate backwards."""
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_FLAGS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import renamed
from nanoblocks.pretrained.layouts import qkv_turned
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

NANOCHAT_FLAGS = LLAMA_FLAGS | {'embed_norm': True, 'qk_norm': 'unit', 'ffn': 'relu2'}

FAMILIES['nanochat'] = Family(
    architecture='NanoChatForCausalLM',
    flags=NANOCHAT_FLAGS,
    keys=LLAMA_KEYS | ATTENTION_BIAS | {
        'hidden_act': renamed('ffn', {'relu2': 'relu2'}), 'final_logit_softcapping': 'logit_softcap'},
    defaults={'hidden_act': 'relu2', 'final_logit_softcapping': 15.0},
    tensors=LLAMA_TENSORS | {
        # no file has it: transformers applies the last norm to the embedding too
        'ln_e': 'model.embed_norm',
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_turned),
        'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.fc1', 'h.{f}.ffn.c_proj': 'model.layers.{i}.mlp.fc2'},
    ones=r'norm\.weight$',
    read=read_rope, write=write_rope)

# the names in its own checkpoints
OWN_TENSORS = {
    'wte': 'transformer.wte', 'lm_head': 'lm_head',
    'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.{c_q,c_k,c_v}', qkv_turned),
    'h.{i}.mixer.c_proj': 'transformer.h.{i}.attn.c_proj',
    'h.{i}.ffn.c_fc': 'transformer.h.{i}.mlp.c_fc', 'h.{i}.ffn.c_proj': 'transformer.h.{i}.mlp.c_proj'}
