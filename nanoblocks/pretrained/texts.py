"""
The text side of a model: its tokenizer, and the tokens that begin and end a text, as files for an export.

A model that was loaded remembers it in its attribute `texts`. Files of a published checkpoint are copied as
they are; a tokenizer of ours is written as a tokenizer.json, which is plain JSON.
"""
import json
import os
import re
from typing import NamedTuple

from nanoblocks.tokenizer import EOT_BYTES, OTHER_LAYOUTS, byte_alphabet, from_folder, from_meta, read_json

COPIED = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
          'chat_template.jinja', 'generation_config.json', 'merges.txt', *OTHER_LAYOUTS)
IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')


class Texts(NamedTuple):
    files: dict = {}        # {name: bytes}, of a published checkpoint
    ids: dict = {}          # {key: its value in config.json}
    meta: dict = {}         # of a tokenizer of ours, in place of files


def of_folder(folder):
    """Texts of a folder in Hugging Face format."""
    files = {}
    for name in COPIED:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, 'rb') as f:
                files[name] = f.read()
    config = read_json(os.path.join(folder, 'config.json'))
    # a model of images and text says it in either place
    text = config.get('text_config')
    known = [config, text if isinstance(text, dict) else {}]
    return Texts(files, {key: table[key] for table in reversed(known) for key in IDS
                         if table.get(key) is not None})


def save(texts, folder):
    """Write the files of `texts` -> {key of config.json: value} for the tokens that are known."""
    tokenizer, files = None, texts.files
    if texts.meta:
        try:
            tokenizer = from_meta(texts.meta)
        except (OSError, ValueError) as error:  # no network, or a package is missing
            print(f'the tokenizer is not exported: {error}')
            return texts.ids
        files = {name: json.dumps(content, ensure_ascii=False, indent=1).encode()
                 for name, content in files_of(tokenizer).items()}
    for name, content in files.items():
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(content)
    if files and tokenizer is None and not {'bos_token_id', 'eos_token_id'} <= texts.ids.keys():
        try:
            tokenizer = from_folder(folder)
        except ValueError:  # a package is missing, or the checkpoint's own files are damaged
            pass
    found = {}
    if tokenizer is not None:
        eot, *others = [*tokenizer.ends] or [None]
        found = {'bos_token_id': bos_of(tokenizer), 'eos_token_id': [eot, *others] if others else eot}
    found |= texts.ids
    told = {key: value for key, value in found.items() if value is not None}
    if told and 'generation_config.json' not in files:
        with open(os.path.join(folder, 'generation_config.json'), 'w') as f:
            json.dump(told, f, indent=1)
    return found


def bos_of(tokenizer):
    """bos; None where a published checkpoint names none, though ours begins its texts with their end."""
    meta = tokenizer.meta()
    return meta['bos'] if meta['kind'] == 'tokenizers' else tokenizer.bos


# ----------------------------------------------------------------------------------------------------------
# Tokenizers of ours as tokenizer.json


def files_of(tokenizer):
    """{name: content} of the files with which transformers has the same tokenizer."""
    meta, settings = tokenizer.meta(), {'tokenizer_class': 'PreTrainedTokenizerFast',
                                        'clean_up_tokenization_spaces': False}
    if meta['kind'] == 'tokenizers':
        content, name_of = json.loads(tokenizer.json), tokenizer.tokenizer.id_to_token
        settings |= {'add_bos_token': True} if tokenizer.add_bos else {}
    else:
        content = json_of(tokenizer, meta['kind'])
        names = {token['id']: token['content'] for token in content['added_tokens']}
        name_of = names.get
    for key, token in (('bos_token', bos_of(tokenizer)), ('eos_token', tokenizer.eot)):
        if token is not None:
            settings[key] = name_of(token)
    return {'tokenizer.json': content, 'tokenizer_config.json': settings}


def json_of(tokenizer, kind):
    """tokenizer.json of bytes, characters, or byte pairs run by tiktoken."""
    spelt = {byte: char for char, byte in byte_alphabet().items()}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    if kind == 'chars':
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'}  # unknown characters are refused
        return document(model, split(r'[\s\S]'), {'type': 'Fuse'}, {})
    if kind == 'bytes':
        ranks, cut, special = {bytes([i]): i for i in range(256)}, byte_level, {EOT_BYTES.decode(): 256}
    else:
        encoding = tokenizer.encoding
        ranks, special = encoding._mergeable_ranks, encoding._special_tokens
        # in the library's regular expressions the + of {1,3}+ repeats, and is not possessive
        pattern = re.sub(r'(\{\d+,\d*\})\+', r'\1', encoding._pat_str)
        cut = {'type': 'Sequence', 'pretokenizers': [split(pattern), byte_level]}
    vocab = {''.join(map(spelt.get, token)): rank for token, rank in ranks.items()}
    model = {'type': 'BPE', 'vocab': vocab, 'merges': merges_of(vocab), 'ignore_merges': True,
             'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False}
    return document(model, cut, byte_level, special)


def merges_of(vocab):
    """
    The pairs that become a token, in the order in which they merge: tiktoken merges the neighbours whose
    token has the lowest id, whichever two tokens they are.
    """
    merges = [(rank, vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
              for token, rank in vocab.items() for cut in range(1, len(token))
              if token[:cut] in vocab and token[cut:] in vocab]
    return [[left, right] for *_, left, right in sorted(merges)]


def split(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def document(model, cut, decoder, special):
    added = [{'id': i, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': True} for text, i in special.items()]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
            'pre_tokenizer': cut, 'post_processor': None, 'decoder': decoder, 'model': model}
