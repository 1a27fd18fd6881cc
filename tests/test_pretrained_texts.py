"""What save_pretrained writes beside the weights: the tokenizer, and the tokens that begin and end a text."""
import json

import pytest
import torch
from conftest import build, toy
from test_data import gpt2  # noqa: F401
from test_tokenizers import END, TEXTS, byte_level, checkpoint_folder, sampled, written

from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, from_folder
from model import GPT
from nanoblocks.training.checkpoint import contents, save

pytest.importorskip('tokenizers', reason='runs the vocabularies of checkpoints')

LLAMA = dict(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False)


def run_of(folder, tokenizer):
    """A run's checkpoint of a tiny model with this tokenizer."""
    folder.mkdir()
    model = build(toy(**LLAMA, vocab_size=tokenizer.vocab_size))
    save(str(folder / 'ckpt.pt'), contents(model, settings={}, meta={'tokenizer': tokenizer.meta()}, step=3))
    return folder


TOKENIZERS = {
    'bytes': ByteTokenizer, 'chars': lambda: CharTokenizer(''.join(TEXTS) + '▁'),
    'bpe': lambda: BPETokenizer.train(['the cat sat on the mat, the mat on the cat', 'aaaa aaaaaa'] * 9, 300)}


def assert_same(ours, again, theirs):
    """The tokenizer of a run, of its export, and transformers' of the export."""
    more = 'x<|endoftext|>y', "a  b\n\n\n  c 12345 they'll THEY'LL", 'aaaaaaaaaaa', '漢字漢字', 'a▁b'
    for text in (*TEXTS, *more):
        try:
            ids = ours.encode(text)
        except ValueError:
            with pytest.raises(ValueError, match='vocabulary'):
                again.encode(text)
            continue
        assert again.encode(text) == ids
        assert again.decode_bytes(ids) == ours.decode_bytes(ids)
        if '<|' not in text:
            assert theirs.encode(text) == ids and theirs.decode(ids) == text
    assert (again.vocab_size, again.eot, again.bos) == (ours.vocab_size, ours.eot, ours.bos)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eot, ours.eot)


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_a_run_is_exported_with_its_tokenizer(kind, tmp_path):
    transformers = pytest.importorskip('transformers', reason='loads the export')
    ours = TOKENIZERS[kind]()
    GPT.from_pretrained(run_of(tmp_path / 'run', ours)).save_pretrained(tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert (config['bos_token_id'], config['eos_token_id']) == (ours.eot, ours.eot)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert_same(ours, from_folder(tmp_path / 'hf'), theirs)
    start = 'the cat'
    # behind the line that names the checkpoint
    first, second = (sampled(init_from=tmp_path / name, start=start).out.split('-----')[0].partition('\n')[2]
                     for name in ('run', 'hf'))
    assert first == second and first.startswith(start)


def test_a_vocabulary_of_tiktoken_is_exported(gpt2, tmp_path):  # noqa: F811
    transformers = pytest.importorskip('transformers', reason='loads the export')
    GPT.from_pretrained(run_of(tmp_path / 'run', gpt2)).save_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert_same(gpt2, from_folder(tmp_path / 'hf'), theirs)


def test_a_tokenizer_that_cannot_be_fetched_does_not_stop_an_export(tmp_path, monkeypatch, capsys):
    model = build(toy(**LLAMA, vocab_size=61))
    meta = {'tokenizer': {'kind': 'tiktoken', 'name': 'gpt9'}}
    save(str(tmp_path / 'ckpt.pt'), contents(model, settings={}, meta=meta, step=3))
    GPT.from_pretrained(tmp_path / 'ckpt.pt').save_pretrained(tmp_path / 'hf')
    assert 'the tokenizer is not exported: ' in capsys.readouterr().out
    assert (tmp_path / 'hf' / 'model.safetensors').exists()


def test_the_files_of_a_checkpoint_are_exported_as_they_are(tmp_path):
    folder = checkpoint_folder(tmp_path / 'hf', byte_level().get_vocab_size())
    files = dict(tokenizer_config={'eos_token': END, 'chat_template': '{{ messages }}'},
                 generation_config={'eos_token_id': [1, 7], 'temperature': 0.6})
    written(folder, 'byte_level', **files)
    for changes in ({}, {'block_size': 12}):
        GPT.from_pretrained(folder, **changes).save_pretrained(tmp_path / 'out')
        for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
            assert (tmp_path / 'out' / name).read_bytes() == (folder / name).read_bytes()
        config = json.loads((tmp_path / 'out' / 'config.json').read_text())
        assert (config['bos_token_id'], config['eos_token_id']) == (0, [1, 7])
    assert from_folder(tmp_path / 'out').meta() == from_folder(folder).meta()


def test_tokens_of_config_json_are_kept_without_a_tokenizer(tmp_path):
    folder = checkpoint_folder(tmp_path / 'hf', 61)
    config = json.loads((folder / 'config.json').read_text()) | {'bos_token_id': 3, 'eos_token_id': [3, 5]}
    (folder / 'config.json').write_text(json.dumps(config))
    GPT.from_pretrained(folder).save_pretrained(tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == config


def test_a_model_of_transformers_stops_where_a_run_does(tmp_path):
    transformers = pytest.importorskip('transformers', reason='loads the export')
    GPT.from_pretrained(run_of(tmp_path / 'run', ByteTokenizer())).save_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert theirs.generation_config.eos_token_id == ByteTokenizer.eot
    never, always = torch.full((1, 257), -1e9), ByteTokenizer.eot
    never[:, always] = 0
    new = theirs.generate(torch.tensor([[65, 66]]), max_new_tokens=5, do_sample=False,
                          logits_processor=[lambda idx, logits: never])
    assert new[0].tolist() == [65, 66, always]
