"""Family: the fields of an entry. DEFAULTS and other values that families share."""
from collections.abc import Callable
from dataclasses import dataclass, field

from nanoblocks.pretrained.keys import as_key


@dataclass(kw_only=True)
class Family:
    # the class in transformers
    architecture: str

    # Flags of GPTConfig that are the same in every model of the family.
    flags: dict

    # {key of config.json: a flag, several flags, or a Key that converts the value}
    keys: dict

    # {another name of a key, as older files have it: the key}
    aliases: dict = field(default_factory=dict)

    # {key: its value where a file leaves it out}, beside DEFAULTS
    defaults: dict = field(default_factory=dict)

    # {key: the only value of it that we support}
    only: dict = field(default_factory=dict)

    # {our tensor: theirs, or (theirs, layout)}, or a function (config, config.json) that returns it.
    # In our name {i} is any layer, {a} one with attention, {m} one with a state space, {h} one with both,
    # {z} one with a block that others use, {r} one with a recurrence, {c} one with a short convolution, {f}
    # one with a dense feed-forward, {e} one with experts, {s} one of an encoder beside the decoder. In theirs
    # {i} is the same layer, {n} every expert, {q,k,v} each of the three. A name without .weight or .bias
    # stands for both, unless there is a rule for one of them. Rules for tensors that a model does not have
    # are skipped. Several of ours may be parts of one of theirs.
    tensors: dict | Callable

    # (rules, TensorFiles, config) -> rules: those of `tensors`, changed for files that hold some of them
    # under other names or in other parts
    as_stored: Callable = lambda rules, files, c: rules

    # a regular expression for tensors of files that the model does not use
    unread: str = '$^'

    # a regular expression for tensors that are zero where a file leaves them out
    zeros: str = '$^'

    # a regular expression for tensors that no file has, as they are ones: norms without weights
    ones: str = '$^'

    # whether a tied head is written too, as transformers ties it to nothing, whatever config.json says
    head_stored: bool = False

    # the letters of layer_pattern that its models may have
    mixers: str = 'a'

    # config.json, with defaults filled in and nulls dropped -> more flags
    read: Callable = lambda hf: {}

    # config -> more keys of config.json
    write: Callable = lambda c: {}

    # (model, config.json) -> None: a last change to the weights of a loaded model
    finish: Callable = lambda model, hf: None

    def __post_init__(self):
        self.keys = {key: as_key(flags) for key, flags in self.keys.items()}


# {key: its value where a file leaves it out}, unless the family has another default
DEFAULTS = {
    'tie_word_embeddings': False, 'rope_theta': 10000.0, 'hidden_act': 'silu', 'attention_bias': False,
    'mlp_bias': False, 'rms_norm_eps': 1e-6, 'layer_norm_eps': 1e-5, 'layer_norm_epsilon': 1e-5}
TIED = {'tie_word_embeddings': True}

# flags
LAYERNORM = {'norm': 'layernorm', 'norm_bias': True}
ALL_BIASES = {'qkv_bias': True, 'proj_bias': True, 'ffn_bias': True}
