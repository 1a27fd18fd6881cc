"""
The text part of models of images and text: its keys in config.json and its tensors.

WRAPPED is the table: a family of it has the keys of a text family in `text_config`, and its tensors under one
of PLACES. Tensors of the parts in OTHERS are left out, which is said in a line. The model is then one of the
text family, and is exported as one.
"""
import re
from typing import NamedTuple

from nanoblocks.pretrained.families.family import TIED
from nanoblocks.pretrained.values import check_values


class Wrapped(NamedTuple):
    # the families that text_config may be; the first is that of a text_config without model_type
    texts: tuple
    # {key: its value where a file leaves it out}, beside the defaults of the text family
    defaults: dict = {}


WRAPPED = {
    # files of Gemma 3 leave out what is the default, sizes too
    'gemma3': Wrapped(('gemma3_text',), TIED | {
        'vocab_size': 262208, 'num_attention_heads': 8, 'num_key_value_heads': 4,
        'max_position_embeddings': 131072}),
    'mistral3': Wrapped(('mistral', 'ministral3'), TIED),
    'llama4': Wrapped(('llama4_text',)),
    'qwen3_5': Wrapped(('qwen3_5_text',)),
    'qwen3_5_moe': Wrapped(('qwen3_5_moe_text',))}
# what the place of the text part is in a text model: as transformers 5 has it in memory, and as published
PLACES = {'model.language_model.': 'model.', 'language_model.model.': 'model.',
          'language_model.lm_head.': 'lm_head.'}
OTHERS = re.compile(r'(?:model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\.')


def text_part(hf, path):
    """config.json of the text part of a model of images and text; any other config.json as it is."""
    kind = hf.get('model_type')
    if kind not in WRAPPED:
        return hf
    text = hf.get('text_config')
    if not isinstance(text, dict):
        raise ValueError(f'text_config in {path} must hold the keys of the text part of a {kind}: fetch the '
                         'file again')
    check_values(text, path)
    texts, defaults = WRAPPED[kind]
    name = text.get('model_type') or texts[0]
    if name not in texts:
        raise ValueError(f'model_type={name} of text_config in {path} must be {" or ".join(texts)}: no other '
                         f'text part of a {kind} is read')
    # whether the head is tied is said beside text_config
    tie = hf.get('tie_word_embeddings', defaults.get('tie_word_embeddings', False))
    return defaults | text | {
        'model_type': name, 'part_of': kind, 'tie_word_embeddings': tie,
        'quantization_config': hf.get('quantization_config') or text.get('quantization_config')}


def text_tensors(files, hf):
    """The files as they are, or the text part of them where config.json is a part."""
    if 'part_of' not in hf:
        return files
    files = TextTensors(files)
    if files.left_out:
        print(f'{files.folder} is a {hf["part_of"]}, of which the text part is read; what is left out: '
              f'{", ".join(files.left_out)}')
    return files


class TextTensors:
    """The tensors of the text part of files, under the names of a text model."""

    def __init__(self, files):
        self.files, self.folder = files, files.folder
        others = {name: found[1] for name in files.where if (found := OTHERS.match(name))}
        self.left_out = sorted(set(others.values()))
        # {name in a text model: name in the files}
        self.stored = {in_text_model(name): name for name in files.where if name not in others}
        self.where = {name: files.where[stored] for name, stored in self.stored.items()}

    def most_weights(self):
        """As many weights as the files can hold."""
        return self.files.most_weights()

    def get(self, name):
        """The tensor, to be copied and dropped."""
        return self.files.get(self.stored[name])


def in_text_model(name):
    """The name that a tensor of the text part has in a text model."""
    for place, ours in PLACES.items():
        if name.startswith(place):
            return ours + name.removeprefix(place)
    return name
