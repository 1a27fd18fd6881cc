"""train.py --init_from=<checkpoint>: published weights, and nanoGPT's, are what training begins with."""
import json
import math

import pytest
import torch
from conftest import build, toy
from runs import assert_refused, dataset, flags, losses, metrics, python

from data.tokenizer import ByteTokenizer
from model import GPT
from nanoblocks.training.checkpoint import contents, save

pytest.importorskip('safetensors', reason='published checkpoints are safetensors files')

SIZES = dict(vocab_size=300, n_embd=32, n_head=4, block_size=64)
LLAMA = toy(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, tie=False, n_kv_head=2) | SIZES


def settings(tmp_path, **more):
    short = dict(dataset=dataset(), out_dir=tmp_path / 'run', batch_size=4, gradient_accumulation_steps=1,
                 max_iters=12, warmup_iters=0, learning_rate=3e-3, log_interval=1, eval_interval=12,
                 eval_tokens=1024, dtype='float32', device='cpu')
    return flags(**short | more)


def published(folder, config=LLAMA):
    """A checkpoint in Hugging Face format, and its model."""
    model = build(config)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def first_loss(model, T):
    from data.loader import open_dataset
    x, y = open_dataset(str(dataset()), T, 1337).train_batch(0, 4)
    return model(x, y)[1].item()


def test_training_begins_with_the_weights_of_a_folder(tmp_path):
    model = published(tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    mistral = {'model_type': 'mistral', 'architectures': ['MistralForCausalLM'], 'sliding_window': None}
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | mistral))
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', block_size=32))
    assert done.code == 0, done
    run = losses(tmp_path / 'run')
    assert math.isclose(run[0], first_loss(model, 32), rel_tol=1e-5)
    assert run[-1] < run[0] - 0.3, run
    # and continues as any run does
    done = python('train.py', *flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=14))
    assert done.code == 0 and metrics(tmp_path / 'run')[-1]['step'] == 14, done
    # what came of it is still of the same family, and has its tokenizer
    GPT.from_pretrained(tmp_path / 'run').save_pretrained(tmp_path / 'out', dtype='bfloat16')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert mistral.items() <= config.items() and config['dtype'] == 'bfloat16'
    generation = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == config['eos_token_id'] == ByteTokenizer.eot


def test_a_broken_tokenizer_is_answered_with_one_sentence(tmp_path):
    pytest.importorskip('tokenizers', reason='the tokenizers of published checkpoints need it')
    published(tmp_path / 'hf')
    (tmp_path / 'hf' / 'tokenizer.json').write_text('oops')
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', block_size=32))
    assert_refused(done, 'tokenizer.json is not understood')


def test_context_is_not_longer_than_is_asked_for(tmp_path):
    published(tmp_path / 'hf', LLAMA | {'block_size': 4096})
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', max_iters=1, batch_size=1))
    assert done.code == 0, done
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())['model']
    assert config['block_size'] == 1024


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_training_begins_with_a_checkpoint_of_nanogpt(tmp_path, prefix):
    model = build(toy(**SIZES, bias=False))
    names = {name: f'transformer.{name}'.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.')
             for name in dict(model.named_parameters())}
    weights = {prefix + names[name]: p.detach() for name, p in model.named_parameters()}
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=False, vocab_size=300, dropout=0.0)
    torch.save({'model': weights, 'model_args': args, 'iter_num': 3, 'config': {}}, tmp_path / 'ckpt.pt')
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'ckpt.pt'))
    assert done.code == 0, done
    assert math.isclose(losses(tmp_path / 'run')[0], first_loss(model, 64), rel_tol=1e-5)


def test_training_begins_with_a_checkpoint_of_ours(tmp_path):
    model = build(LLAMA)
    meta = {'tokenizer': ByteTokenizer().meta()}
    save(tmp_path / 'best.pt', contents(model, settings={}, meta=meta, step=7))
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'best.pt'))
    assert done.code == 0 and 'warning' not in done.out, done
    assert math.isclose(losses(tmp_path / 'run')[0], first_loss(model, 64), rel_tol=1e-5)


def test_flags_change_the_model_on_the_way(tmp_path):
    published(tmp_path / 'hf')
    more = dict(n_kv_head=1, dropout=0.1, max_iters=2)
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', **more))
    assert done.code == 0 and 'converted' in done.out, done
    state = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)
    assert state['config']['n_kv_head'] == 1 and state['config']['dropout'] == 0.1


def test_vocabulary_that_is_too_small_is_refused(tmp_path):
    published(tmp_path / 'hf', LLAMA | {'vocab_size': 100})
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf'))
    assert_refused(done, 'vocab_size=100', '--tokenizer=')


@pytest.mark.parametrize('name', ['nowhere/at-all', './nowhere', 'resmue'])
def test_checkpoint_that_is_not_there_is_refused(tmp_path, name):
    assert_refused(python('train.py', *settings(tmp_path, init_from=name)), name)
    assert not (tmp_path / 'run').exists()


def test_another_tokenizer_is_warned_of(tmp_path):
    tokenizers = pytest.importorskip('tokenizers', reason='makes a tokenizer.json')
    published(tmp_path / 'hf')
    model = tokenizers.models.BPE(vocab={chr(33 + i): i for i in range(90)}, merges=[])
    tokenizers.Tokenizer(model).save(str(tmp_path / 'hf' / 'tokenizer.json'))
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', max_iters=1))
    assert done.code == 0 and 'warning' in done.out and '--tokenizer=' in done.out, done


def test_a_checkpoint_without_a_tokenizer_is_warned_of(tmp_path):
    published(tmp_path / 'hf')
    done = python('train.py', *settings(tmp_path, init_from=tmp_path / 'hf', max_iters=1, block_size=32))
    assert done.code == 0 and f'warning: init_from={tmp_path}/hf has no tokenizer' in done.out, done
    # what the message advises
    tokenizers = pytest.importorskip('tokenizers', reason='makes a tokenizer.json')
    known = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(33 + i): i for i in range(90)}, merges=[]))
    known.save(str(tmp_path / 'hf' / 'tokenizer.json'))
    again = settings(tmp_path, init_from=tmp_path / 'hf', max_iters=1, block_size=32, overwrite=True)
    assert 'was not prepared with the tokenizer' in python('train.py', *again).out


def test_exported_run_is_the_same_model(tmp_path):
    model = published(tmp_path / 'hf')
    again = GPT.from_pretrained(tmp_path / 'hf')
    idx = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(idx)[0], model(idx)[0])
