"""
Tokenizers of published checkpoints: ids and texts are those of the `tokenizers` library, bytes are never
lost, prepare.py and sample.py take them. The vocabularies are made here, in the two published styles.
"""
import json
import os
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT, build, toy
from test_data import gpt2  # noqa: F401
from test_train import assert_refused, flags, python

from data.loader import open_dataset
from data.tokenizer import CharTokenizer, HFTokenizer, from_folder, from_meta
from nanoblocks import pretrained
from nanoblocks.decoding.session import Session
from nanoblocks.pretrained import nanogpt

tokenizers = pytest.importorskip('tokenizers', reason='tokenizers runs the vocabularies of checkpoints')
pytest.importorskip('safetensors', reason='checkpoints are safetensors files')
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = ['def main(self):\n    return None', 'the cat sat on the mat, the mat sat on the cat',
          'naïve café, 漢字'] * 20
TEXTS = [*CORPUS[:3], '', ' ', '\n', '  two  blanks  ', 'tab\tand\r\n', 'ünïcödé 漢字かな',
         '👩‍👩‍👧 🏳️‍🌈', 'é̀', '\x00\x7f',
         'Ġ is a letter too', '<0x0A> is text']
END = '<|end|>'


def byte_level():
    """As GPT-2, Llama 3, Qwen: bytes are spelt by characters. Its end is followed by odd added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=['<|begin|>', END]))
    # of characters that spell no bytes
    tokenizer.add_tokens([AddedToken('café☕'), AddedToken('<｜a▁b｜>', special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<|begin|> $A', special_tokens=[('<|begin|>', tokenizer.token_to_id('<|begin|>'))])
    return tokenizer


def byte_fallback():
    """As Llama 2, Mistral, Gemma: blanks are spelt ▁, and characters out of the vocabulary byte by byte."""
    letters = sorted(set('▁abcdefghijklmnoprstuvwé,()_:'))
    vocab = {token: i for i, token in enumerate(
        ['<unk>', '<s>', END, *(f'<0x{byte:02X}>' for byte in range(256)), *letters, 'th', 'the', '▁the'])}
    merges = [('t', 'h'), ('th', 'e'), ('▁', 'the')]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens(['<unk>', '<s>', END])
    tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return tokenizer


KINDS = {'byte_level': byte_level, 'byte_fallback': byte_fallback}
# what the library puts before a text and takes away again
BLANK = {'byte_level': '', 'byte_fallback': ' '}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def written(folder, kind, **files):
    """A folder with the tokenizer.json of that kind, and other JSON files."""
    folder.mkdir(exist_ok=True)
    library = KINDS[kind]()
    library.save(str(folder / 'tokenizer.json'))
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return from_folder(folder), library


def test_ids_and_texts_are_the_librarys(kind, tmp_path):
    ours, library = written(tmp_path / kind, kind)
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.prompt(text) == library.encode(text).ids != ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert ours.vocab_size == library.get_vocab_size()


def test_lone_surrogates_become_replacement_characters(kind, tmp_path):
    ours, _ = written(tmp_path / kind, kind)
    assert ours.encode('a\ud800b') == ours.encode('a\ufffdb')
    assert ours.prompt('\ud800') == ours.prompt('\ufffd')


def test_bytes_are_those_of_the_text_however_it_is_cut(kind, tmp_path):
    ours, _ = written(tmp_path / kind, kind)
    split = 0
    for text in TEXTS:
        ids = ours.encode(text)
        one_by_one = [ours.decode_bytes([i]) for i in ids]
        assert b''.join(one_by_one) == ours.decode_bytes(ids)
        assert ours.decode_bytes(ids).decode() == (BLANK[kind] + text if text else '')
        split += any(piece.decode(errors='ignore').encode() != piece for piece in one_by_one)
    assert split > 2, 'no character was spread over several tokens'


def test_every_single_token_has_the_bytes_that_the_library_writes(kind, tmp_path):
    ours, library = written(tmp_path / kind, kind)
    a = library.encode('a', add_special_tokens=False).ids[-1:]
    for i in range(ours.vocab_size):
        # between two letters, where nothing is stripped
        theirs = library.decode([*a, i, *a], skip_special_tokens=False)
        assert ours.decode_bytes([*a, i, *a]).decode(errors='replace') == theirs, library.id_to_token(i)


def test_gaps_between_ids_are_counted(tmp_path):
    library = byte_fallback()
    described = json.loads(library.to_str())
    last = library.get_vocab_size() - 1
    described['model']['vocab'] |= {'▁the': last + 40}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(described))
    ours = from_folder(tmp_path)
    assert ours.vocab_size == last + 41 and max(ours.encode('the the')) == last + 40


def test_text_never_becomes_a_special_token(kind, tmp_path):
    """A prompt is the library's, which knows the special tokens of a chat; a document is only text."""
    ours, library = written(tmp_path / kind, kind)
    end, text = library.token_to_id(END), f'a{END}b'
    assert end not in ours.encode(text)
    assert ours.decode_bytes(ours.encode(text)).decode() == BLANK[kind] + text
    assert end in ours.prompt(text) == library.encode(text).ids
    library.encode_special_tokens = True
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    if kind == 'byte_level':  # an added token that is not special is a word of the vocabulary
        assert library.token_to_id('café☕') in ours.encode('a café☕ b')


def test_truncation_and_padding_of_a_file_are_not_obeyed(kind, tmp_path):
    library = KINDS[kind]()
    library.enable_truncation(4)
    library.enable_padding(length=16, pad_id=0, pad_token=END)
    library.save(str(tmp_path / 'tokenizer.json'))
    ours, library = from_folder(tmp_path), KINDS[kind]()
    for text in ('a', 'the cat ' * 50):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert ours.prompt(text) == library.encode(text).ids
        assert from_meta(ours.meta()).encode(text) == ours.encode(text)


@pytest.mark.parametrize('config', [{'model_type': 'gpt2'}, {'model_type': 'qwen2'}])
def test_a_vocabulary_without_tokenizer_json_is_read_as_transformers_reads_it(config, tmp_path):
    transformers = pytest.importorskip('transformers', reason='reads the older layouts')
    byte_level().model.save(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    ours, theirs = from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert from_meta(ours.meta()).encode(TEXTS[0]) == ours.encode(TEXTS[0])


def test_a_layout_that_cannot_be_read_is_refused_not_guessed(tmp_path):
    pytest.importorskip('transformers', reason='reads the older layouts')
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "vocab_size": 50257}')
    (tmp_path / 'tokenizer.model').write_bytes(b'no sentencepiece')
    with pytest.raises(ValueError, match='tokenizer.model .* put its tokenizer.json there') as error:
        from_folder(tmp_path)
    assert '\n' not in str(error.value)
    (tmp_path / 'tokenizer.model').unlink()
    assert pretrained.tokenizer_of(tmp_path) is None, 'a vocabulary of 50257 need not be the English one'


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = ['[UNK]']
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
    return tokenizer


def word_ends():
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix='</w>', unk_token='[UNK]'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder('</w>')
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=80, end_of_word_suffix='</w>', special_tokens=['[UNK]']))
    return tokenizer


def no_decoder():
    tokenizer = word_pieces()
    tokenizer.decoder = None
    return tokenizer


@pytest.mark.parametrize('library', [word_pieces, word_ends, no_decoder])
def test_tokens_that_are_joined_with_blanks_stream_as_they_decode(library):
    from nanoblocks.decoding.text import Text
    library = library()
    ours = HFTokenizer(library.to_str())
    for text in ('the cat sat, on the mat', 'def main(self):'):
        ids = ours.encode(text)
        for cut in range(len(ids)):
            stream = Text(ours, before=ids[:cut])
            streamed = ''.join(map(stream.add, ids[cut:])) + stream.finish()
            assert (ours.decode(ids[:cut]) if cut else '') + streamed == library.decode(ids)


@pytest.mark.parametrize('files, eot', [
    ({}, None),
    ({'config': {'eos_token_id': 7}}, 7),
    ({'config': {'eos_token_id': [9, 7]}}, 9),
    ({'config': {'eos_token_id': []}}, None),
    ({'config': {'eos_token_id': None}}, None),
    ({'config': {'eos_token_id': 0}}, 0),
    ({'config': {'eos_token_id': 7}, 'generation_config': {'eos_token_id': [8, 7]}}, 8),
    ({'generation_config': {'eos_token_id': 8}, 'tokenizer_config': {'eos_token': END}}, END),
    ({'tokenizer_config': {'eos_token': {'content': END, 'special': True}}}, END),
    ({'tokenizer_config': {'eos_token': None}, 'config': {'eos_token_id': 7}}, 7),
    ({'tokenizer_config': {'eos_token': 'unknown'}, 'config': {'eos_token_id': 7}}, 7),
])
def test_the_end_of_a_text_is_found(kind, files, eot, tmp_path):
    ours, library = written(tmp_path / kind, kind, **files)
    assert ours.eot == (library.token_to_id(END) if eot == END else eot)


@pytest.mark.parametrize('files, ends', [
    ({}, []),
    ({'config': {'eos_token_id': [9, 7]}}, [9, 7]),
    ({'config': {'eos_token_id': 7}, 'generation_config': {'eos_token_id': [8, 7]}}, [8, 7]),
    ({'generation_config': {'eos_token_id': [8, 9]}, 'tokenizer_config': {'eos_token': END}}, [END, 8, 9]),
    ({'special_tokens_map': {'eos_token': END}, 'config': {'eos_token_id': 9}}, [END, 9]),
    ({'config': {'eos_token_id': [-1, 99999, 7]}}, [7]),
])
def test_every_end_of_a_text_ends_it(kind, files, ends, tmp_path):
    from nanoblocks.decoding.text import stops_of
    ours, library = written(tmp_path / kind, kind, **files)
    wanted = [library.token_to_id(end) if end == END else end for end in ends]
    for tokenizer in (ours, from_meta(ours.meta())):
        assert list(tokenizer.ends) == wanted
        assert stops_of('', tokenizer) == ([], wanted)
        assert stops_of(END, tokenizer)[1] == [*wanted, library.token_to_id(END)]


def test_an_end_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eos_token_id=\['a'\] in .*generation_config.json must be"):
        written(tmp_path, 'byte_level', generation_config={'eos_token_id': ['a']})


@pytest.mark.parametrize('files, bos, prompt', [
    ({}, 'first', 'first'),                             # what tokenizer.json puts before a text
    ({'config': {'bos_token_id': 7}}, 'first', 'first'),
    ({'plain': True}, None, None),                      # nothing begins a text
    ({'plain': True, 'config': {'eos_token_id': 9}}, 9, None),
    ({'plain': True, 'config': {'bos_token_id': 7, 'eos_token_id': 9}}, 7, None),
    ({'plain': True, 'config': {'bos_token_id': 99999, 'eos_token_id': 9}}, 9, None),
    ({'plain': True, 'generation_config': {'bos_token_id': 8}, 'config': {'bos_token_id': 7}}, 8, None),
    ({'plain': True, 'tokenizer_config': {'bos_token': END, 'add_bos_token': False}}, END, None),
    ({'plain': True, 'tokenizer_config': {'bos_token': END, 'add_bos_token': True}}, END, END),
])
def test_a_text_begins_as_the_checkpoints_do(kind, files, bos, prompt, tmp_path):
    plain = files.pop('plain', False) if (files := dict(files)) else False
    ours, library = written(tmp_path / kind, kind, **files)
    first = library.encode('a').ids[0]
    if plain:
        described = json.loads(library.to_str())
        (tmp_path / kind / 'tokenizer.json').write_text(json.dumps(described | {'post_processor': None}))
        ours = from_folder(tmp_path / kind)
    named = {'first': first, END: library.token_to_id(END)}
    for tokenizer in (ours, from_meta(ours.meta())):
        assert tokenizer.bos == named.get(bos, bos)
        begins = [] if prompt is None else [named[prompt]]
        assert tokenizer.prompt('cat') == begins + tokenizer.encode('cat')


@pytest.mark.parametrize('meta', [
    None, [], {}, {'kind': []}, {'kind': 'chars'}, {'kind': 'chars', 'chars': ['a']},
    {'kind': 'chars', 'chars': 'aa'}, {'kind': 'chars', 'chars': 'ba'}, {'kind': 'tiktoken', 'name': 3},
    {'kind': 'bpe', 'tokens': 'ab', 'split': ''},
    {'kind': 'bpe', 'tokens': ['漢字'], 'split': '.'}, {'kind': 'bpe', 'tokens': ['ab', 'ab'], 'split': '.'},
    {'kind': 'bpe', 'tokens': ['ab'], 'split': '('}, {'kind': 'tokenizers', 'json': 3, 'eot': 1},
    {'kind': 'tokenizers', 'json': 'null', 'eot': 1}, {'kind': 'tokenizers', 'json': '{}', 'eot': '</s>'}])
def test_a_meta_that_describes_no_tokenizer_is_refused_in_a_sentence(meta):
    with pytest.raises(ValueError, match='tokenizer') as error:
        from_meta(meta)
    assert '\n' not in str(error.value)


def test_meta_builds_the_same_tokenizer(kind, tmp_path):
    ours, _ = written(tmp_path / kind, kind, config={'eos_token_id': 7})
    again = from_meta(json.loads(json.dumps(ours.meta())))
    assert (again.vocab_size, again.eot) == (ours.vocab_size, 7)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) and again.prompt(text) == ours.prompt(text)
        assert again.decode_bytes(ours.encode(text)) == ours.decode_bytes(ours.encode(text))


def test_a_folder_without_or_with_a_damaged_tokenizer(tmp_path):
    assert from_folder(tmp_path) is None
    (tmp_path / 'tokenizer.json').write_text('{"model": 1')
    with pytest.raises(ValueError, match='tokenizer.json') as error:
        from_folder(tmp_path)
    assert '\n' not in str(error.value)


def prepare(monkeypatch, *arguments):
    """Run data/text/prepare.py; the sentence it exits with, or None."""
    script = ROOT / 'data' / 'text' / 'prepare.py'
    monkeypatch.setattr(sys, 'argv', [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name='__main__')
    except SystemExit as stop:
        return stop.code


def test_text_is_prepared_with_the_tokenizer_of_a_checkpoint(kind, tmp_path, monkeypatch):
    ours, _ = written(tmp_path / kind, kind, tokenizer_config={'eos_token': END})
    (tmp_path / 'in.txt').write_text('the cat sat on the mat\n' * 50)
    arguments = [f'--input={tmp_path / "in.txt"}', f'--out={tmp_path / "out"}',
                 f'--tokenizer={tmp_path / kind}']
    assert prepare(monkeypatch, *arguments) is None
    data = open_dataset(tmp_path / 'out', 8, 0)
    assert data.meta['vocab_size'] == ours.vocab_size
    again = from_meta(data.meta['tokenizer'])
    train, val = (torch.frombuffer(bytearray((tmp_path / 'out' / f'{split}.bin').read_bytes()),
                                   dtype=torch.uint16).tolist() for split in ('train', 'val'))
    # the training part is the begin of the one document, which ends in the validation part
    assert val[-1] == ours.eot == again.eot and ours.eot not in train + val[:-1]
    assert again.decode(train) == ('the cat sat on the mat\n' * 50)[:len(again.decode(train))]
    (tmp_path / 'empty').mkdir()
    arguments[2] = f'--tokenizer={tmp_path / "empty"}'
    assert 'must hold tokenizer.json' in prepare(monkeypatch, *arguments, '--overwrite=True')


def test_text_is_prepared_with_the_tokenizer_of_a_run_or_a_dataset(tmp_path, monkeypatch):
    from data.tokenizer import BPETokenizer
    tokenizer = BPETokenizer.train(['the cat sat on the mat'] * 3, 280)
    (tmp_path / 'run').mkdir(), (tmp_path / 'data').mkdir(), (tmp_path / 'nano').mkdir()
    torch.save({'meta': {'tokenizer': tokenizer.meta()}}, tmp_path / 'run' / 'ckpt.pt')
    (tmp_path / 'data' / 'meta.json').write_text(json.dumps({'tokenizer': tokenizer.meta()}))
    (tmp_path / 'in.txt').write_text('the cat sat on the mat\n' * 50)
    for source in ('run', 'run/ckpt.pt', 'data'):
        out = tmp_path / source.replace('/', '-').replace('.', '-') / 'out'
        assert prepare(monkeypatch, f'--input={tmp_path / "in.txt"}', f'--out={out}',
                       f'--tokenizer={tmp_path / source}') is None
        assert json.loads((out / 'meta.json').read_text())['tokenizer'] == tokenizer.meta()
    torch.save({'model': {}, 'model_args': {}}, tmp_path / 'nano' / 'ckpt.pt')
    (tmp_path / 'damaged.pt').write_text('no zip')
    for source in ('nano', 'nano/ckpt.pt', 'damaged.pt'):
        words = prepare(monkeypatch, f'--input={tmp_path / "in.txt"}', f'--out={tmp_path / "no"}',
                        f'--tokenizer={tmp_path / source}')
        assert str(tmp_path / source) in words and '\n' not in words


# ----------------------------------------------------------------------------------------------------------
# sample.py --init_from


def checkpoint_folder(folder, vocab_size, **changes):
    llama = dict(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, vocab_size=vocab_size)
    build(toy(**llama | changes)).save_pretrained(folder)
    return folder


def sampled(**settings):
    return python('sample.py', *flags(num_samples=1, max_new_tokens=12, device='cpu', temperature=0,
                                      **settings))


@torch.no_grad()
def test_a_checkpoint_is_sampled_with_its_own_tokenizer(kind, tmp_path):
    library = KINDS[kind]()
    folder = checkpoint_folder(tmp_path / 'model', library.get_vocab_size() + 5)
    tokenizer, _ = written(folder, kind)
    done = sampled(init_from=folder, start='the cat')
    assert done.code == 0 and not done.err, done
    model = pretrained.from_pretrained(folder)
    # rows of a vocabulary that was rounded up are never drawn
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:tokenizer.vocab_size])
    idx = torch.tensor([tokenizer.prompt('the cat')])
    new = model.generate(idx, 12, temperature=0)[0, idx.shape[1]:].tolist()
    text = tokenizer.decode_bytes(new).decode(errors='replace')
    first, _, rest = done.out.partition('\n')
    assert first.startswith('model: ') and rest.startswith('the cat' + text), done.out
    assert '12 tokens' in done.out


def test_every_end_of_generation_config_ends_a_sample(tmp_path):
    library = byte_level()
    folder, out = checkpoint_folder(tmp_path / 'model', library.get_vocab_size()), tmp_path / 'out.jsonl'
    written(folder, 'byte_level', tokenizer_config={'eos_token': END})
    sampled(init_from=folder, start='the', out=out)
    first, *others = json.loads(out.read_text())['tokens']
    assert others
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [0, first]}))
    sampled(init_from=folder, start='the', out=out)
    assert json.loads(out.read_text())['tokens'] == [first]


def test_score_and_an_empty_start_begin_with_bos(tmp_path):
    library = byte_level()
    folder = checkpoint_folder(tmp_path / 'model', library.get_vocab_size())
    ours, _ = written(folder, 'byte_level', tokenizer_config={'eos_token': END})
    assert ours.bos == 0 != ours.eot
    out = tmp_path / 'out.jsonl'
    assert python('sample.py', *flags(init_from=folder, score='the cat', device='cpu', out=out)).code == 0
    assert json.loads(out.read_text())['tokens'] == [0, *ours.encode('the cat')]
    session = Session.load(folder, device='cpu')
    assert session.encode('').tokens == [0] and session.encode('<|endoftext|>').tokens == [ours.eot]


def test_a_published_checkpoint_drafts_for_another(tmp_path):
    library = byte_level()
    folders = [checkpoint_folder(tmp_path / name, library.get_vocab_size(), n_layer=n)
               for name, n in (('model', 3), ('draft', 1), ('other', 1))]
    for folder in folders[:2]:
        written(folder, 'byte_level')
    written(folders[2], 'byte_fallback')
    alone, drafted = (sampled(init_from=folders[0], start='the cat', **draft)
                      for draft in ({}, {'draft': folders[1]}))
    assert drafted.code == 0 and 'of its tokens accepted' in drafted.out, drafted
    assert drafted.out.split('-----')[0] == alone.out.split('-----')[0]
    assert_refused(sampled(init_from=folders[0], start='a', draft=folders[2]), 'another tokenizer')


def test_endoftext_is_the_token_of_that_name_where_there_is_one(tmp_path):
    from nanoblocks.decoding.text import stops_of
    library = byte_level()
    library.add_special_tokens(['<|endoftext|>'])
    library.save(str(tmp_path / 'tokenizer.json'))
    end, other = library.token_to_id(END), library.token_to_id('<|endoftext|>')
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': end}))
    ours = from_folder(tmp_path)
    assert stops_of('<|endoftext|>', ours) == ([], [end, other])
    session = Session(build(toy(vocab_size=ours.vocab_size, pos='rope')), ours)
    assert session.encode('<|endoftext|>').tokens == [other]
    (tmp_path / 'tokenizer.json').write_text(byte_level().to_str())
    assert stops_of('<|endoftext|>', from_folder(tmp_path)) == ([], [end, end])


def test_samples_of_training_begin_with_a_token_of_number_0(tmp_path):
    from nanoblocks.decoding.preview import sample_texts
    library = byte_level()
    (tmp_path / 'tokenizer.json').write_text(library.to_str())
    ours = HFTokenizer(library.to_str(), 0)
    model = build(toy(vocab_size=ours.vocab_size, pos='rope'))
    began = []
    model.generate = lambda idx, *_, **__: began.append(idx.tolist()) or idx
    assert sample_texts(model, {'tokenizer': ours.meta()}, 1) == [''] and began == [[[0]]]


def test_a_tokenizer_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip('huggingface_hub', reason='downloads from the hub')
    from data.common import make_tokenizer
    ours, _ = written(tmp_path / 'got', 'byte_level')
    monkeypatch.setattr(hub, 'snapshot_download', lambda name, **_: str(tmp_path / 'got'))
    assert make_tokenizer('openai-community/gpt2', [], None).meta() == ours.meta()

    def fail(name, **_):
        raise ConnectionError('no network\nat all')
    monkeypatch.setattr(hub, 'snapshot_download', fail)
    with pytest.raises(OSError, match=r'tokenizer=no/where .*\(no network\): name a folder') as error:
        make_tokenizer('no/where', [], None)
    assert '\n' not in str(error.value)


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    library = byte_level()
    folder = checkpoint_folder(tmp_path / 'model', library.token_to_id('café☕'))
    written(folder, 'byte_level', config=json.loads((folder / 'config.json').read_text()))
    assert_refused(sampled(init_from=folder, start='a café☕'), 'start has the token', 'café☕', 'vocab_size')
    scored = python('sample.py', *flags(init_from=folder, score='a café☕'))
    assert_refused(scored, 'score has the token', 'café☕')
    assert sampled(init_from=folder, start='a cat').code == 0


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    assert_refused(sampled(init_from=checkpoint_folder(tmp_path / 'model', 61), start='a'), 'tokenizer.json')


def test_a_name_that_is_nothing_is_refused(tmp_path):
    assert_refused(sampled(init_from=tmp_path / 'nowhere', start='a'), 'nowhere')


def nanogpt_file(folder, vocab_size, **config):
    """A checkpoint as nanoGPT writes it, of a tiny model."""
    model = build(toy(vocab_size=vocab_size, ffn='gelu', n_embd=8, n_head=2, block_size=32))
    names = {name: name.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.') for name in model.state_dict()}
    weights = {f'_orig_mod.transformer.{names[name]}' if name != 'lm_head.weight' else f'_orig_mod.{name}': p
               for name, p in model.state_dict().items()}
    args = {name: getattr(model.config, name) for name in nanogpt.SETTINGS}
    folder.mkdir()
    torch.save({'model': weights, 'model_args': args, 'config': config, 'iter_num': 1}, folder / 'ckpt.pt')
    return folder


def test_a_checkpoint_of_nanogpt_is_sampled_with_gpt2s_tokens(gpt2, tmp_path):  # noqa: F811
    folder = nanogpt_file(tmp_path / 'nano', 50304, dataset='openwebtext')
    words = flags(init_from=folder, start='Hello', num_samples=1, max_new_tokens=8, device='cpu')
    done = python('sample.py', *words, env={'TIKTOKEN_CACHE_DIR': os.environ['TIKTOKEN_CACHE_DIR']})
    assert done.code == 0 and not done.err, done
    assert done.out.split('\n')[1].startswith('Hello') and re.search(r'\d tokens', done.out)


def test_characters_of_a_nanogpt_checkpoint_are_those_of_its_dataset(tmp_path, monkeypatch):
    """They are beside the data, prepared here under the same name; another vocabulary is not taken for it."""
    tokenizer = CharTokenizer('abc\n')
    (tmp_path / 'data' / 'letters').mkdir(parents=True)
    (tmp_path / 'data' / 'letters' / 'meta.json').write_text(
        json.dumps({'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.meta()}))
    monkeypatch.setattr(nanogpt, 'ROOT', tmp_path)
    folder = nanogpt_file(tmp_path / 'nano', 4, dataset='letters')
    assert pretrained.tokenizer_of(folder).encode('cab') == tokenizer.encode('cab')
    assert pretrained.tokenizer_of(nanogpt_file(tmp_path / 'other', 5, dataset='letters')) is None
    assert pretrained.tokenizer_of(nanogpt_file(tmp_path / 'none', 4, dataset='nowhere')) is None
    assert_refused(sampled(init_from=tmp_path / 'none', start='a'), 'tokenizer.json')
