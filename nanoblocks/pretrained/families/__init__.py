"""
The families of published checkpoints: what their config.json and their tensors are in our words.

To add a family, write one entry in the file of its nearest relative, or in a new file that is listed below.
An entry (family.py has its fields) works in both directions: what it reads, it also writes. This one, at the
end of llama.py, would do for Arcee's AFM, a Llama whose feed-forward has no gate:

    FAMILIES['arcee'] = Family(
        architecture='ArceeForCausalLM',
        flags=LLAMA_FLAGS,
        keys=LLAMA_KEYS | BIAS_KEYS | {'hidden_act': renamed('ffn', {'relu2': 'relu2'})},
        defaults={'rms_norm_eps': 1e-5, 'hidden_act': 'relu2'},
        tensors=LLAMA_TENSORS | {'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.up_proj'},
        read=read_rope, write=write_rope)

Then add cases to tests/checkpoints.py: small random checkpoints made by `transformers`, with which our logits
must agree; `python -m nanoblocks.experiments.tables` adds the row to docs/recipes.md. The facts here are
taken from published checkpoints and from `transformers`.
"""
from nanoblocks.pretrained.families import (
    bert,
    cohere,
    deepseek,
    encdec,
    experts,
    gemma,
    gpt,
    gptj,
    hybrid,
    interleaved,
    kimi,
    llama,
    mixtures,
    nanochat,
    no_rope,
    olmo,
    qwen,
    recurrent,
    relatives,
    rwkv,
    short_conv,
    state_space,
    zamba,
)

# {model_type: Family}. A model is exported as the first family that its flags fit.
FAMILIES = (llama.FAMILIES | cohere.FAMILIES | gemma.FAMILIES | qwen.FAMILIES | experts.FAMILIES
            | no_rope.FAMILIES | deepseek.FAMILIES | gpt.FAMILIES | state_space.FAMILIES
            | recurrent.FAMILIES | kimi.FAMILIES | rwkv.FAMILIES | hybrid.FAMILIES
            | short_conv.FAMILIES | zamba.FAMILIES | bert.FAMILIES | encdec.FAMILIES
            | relatives.FAMILIES | interleaved.FAMILIES | olmo.FAMILIES
            | mixtures.FAMILIES | gptj.FAMILIES | nanochat.FAMILIES)
# {model_type: why it is none of them}
REFUSED = encdec.REFUSED | mixtures.REFUSED | relatives.REFUSED
