"""
sample.py as a user runs it: the printed text, the settings that decide it, where it ends, what is refused.

Most models here are written by hand: one that repeats a given text for ever shows every lost byte.
"""
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from runs import ENV, assert_refused, dataset, flags, python, real_python, trained  # noqa: E402
from test_reliability import DAMAGES, damage  # noqa: E402

from data.tokenizer import ByteTokenizer, from_meta  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanoblocks.pretrained.convert import tensors_of  # noqa: E402
from nanoblocks.training import checkpoint  # noqa: E402

CHARS = dict(pos='rope', dtype='float32', eval_interval=60)


def chars():
    """The out_dir of a trained model with rotary positions, whose tokens are characters."""
    return trained(dataset=dataset('chars'), **CHARS)


def parrot(folder, *texts, name='best.pt', vocab_size=257, room=None, padding=0.0):
    """
    The out_dir of a model of bytes that continues each text from any of its bytes, which must all differ: the
    first text for ever, the others until the end of the document. room: number of learned positions;
    padding: logit of the vocabulary's unused rows.
    """
    config = GPTConfig(n_layer=1, n_head=1, n_embd=320, vocab_size=vocab_size, block_size=room or 16,
                       pos='learned' if room else 'rope', tie=False, zero_init=True)
    model, following = GPT(config), {}
    for number, text in enumerate(texts):
        data = [*text.encode(), *([] if number == 0 else [ByteTokenizer.eot])]
        pairs = dict(zip(data, data[1:] + data[:1]))
        assert len(pairs) == len(data) and not pairs.keys() & following.keys(), f'{text} repeats a byte'
        following |= pairs
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(vocab_size, 320))
        if room:
            model.wpe.weight.zero_()
        model.lm_head.weight.zero_()
        for byte, after in following.items():
            model.lm_head.weight[after, byte] = 10.0
        model.lm_head.weight[257:] = padding
    folder.mkdir(exist_ok=True)
    meta = json.loads((dataset() / 'meta.json').read_text())
    checkpoint.save(folder / name, checkpoint.contents(model, settings={}, meta=meta, step=1))
    return folder


def sample(out_dir, **settings):
    """[(text, tokens)] of each sample, and everything printed."""
    done = python('sample.py', *flags(out_dir=out_dir, device='cpu', **settings))
    assert done.code == 0 and not done.err, done
    first, _, text = done.out.partition('\n')
    assert first.startswith('model: '), 'the first line names the model'
    parts = re.split(r'\n-{15} (\d+) tokens, .*\n', text)
    return list(zip(parts[:-1:2], map(int, parts[1::2]))), done.out


def text_of(out_dir, **settings):
    """The one text that is sampled."""
    (one,), _ = sample(out_dir, **{'num_samples': 1} | settings)
    return one[0]


# ----------------------------------------------------------------------------------------------------------
# What is printed


def test_prompt_continuation_and_speed():
    samples, out = sample(chars(), start='abc', num_samples=3, max_new_tokens=20)
    assert len(samples) == 3
    for text, count in samples:
        assert text.startswith('abc') and len(text) == 23 and count == 20
        assert set(text) <= set('abcdefghij \n')
    assert len({text for text, _ in samples}) == 3
    assert len(re.findall(r', then [\d.]+ tokens/s', out)) == 3


def test_the_same_in_a_process_of_its_own():
    args = flags(out_dir=chars(), start='abc', num_samples=1, max_new_tokens=20, device='cpu')
    done = real_python('sample.py', *args)
    assert done.code == 0 and not done.err, done
    assert done.out.partition('\n')[2].split('\n---')[0] == text_of(chars(), start='abc', max_new_tokens=20)


def test_text_is_what_the_model_generates():
    """With the same settings: none is lost between the command line and the draw."""
    state = checkpoint.load(chars() / 'best.pt')
    model, tokenizer = checkpoint.build(state, 'best.pt'), from_meta(state['meta']['tokenizer'])
    idx = torch.tensor([tokenizer.encode('a b')])
    for settings in (dict(temperature=1.5, top_k=None, top_p=None),
                     dict(temperature=0.5, top_k=4, top_p=None),
                     dict(temperature=1.0, top_k=None, top_p=0.6)):
        new = model.generate(idx, 40, seed=5, **settings)
        text = text_of(chars(), start='a b', max_new_tokens=40, seed=5, **settings)
        assert text == tokenizer.decode(new[0].tolist())


def test_seed_decides_the_text():
    settings = dict(start='a', max_new_tokens=40)
    texts = [text_of(chars(), seed=seed, **settings) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_and_the_likeliest_token_alone_need_no_seed():
    settings = dict(start='a', max_new_tokens=40)
    greedy = text_of(chars(), temperature=0, seed=1, **settings)
    assert greedy == text_of(chars(), temperature=0, seed=2, **settings)
    assert greedy == text_of(chars(), temperature=1.0, top_k=1, seed=3, **settings)
    assert greedy == text_of(chars(), temperature=1.0, top_p=1e-9, seed=4, **settings)
    assert greedy != text_of(chars(), temperature=1.0, seed=4, **settings)


def test_prompt_from_a_file(tmp_path):
    (tmp_path / 'prompt.txt').write_text('fée\n', encoding='utf-8')
    out_dir = parrot(tmp_path / 'run', '\nab')
    assert text_of(out_dir, start=f'FILE:{tmp_path / "prompt.txt"}', max_new_tokens=5) == 'fée\nab\nab'


def test_characters_of_several_tokens_are_complete(tmp_path):
    cycle = 'é漢😀-'
    out_dir = parrot(tmp_path, cycle)
    for tokens in (len(cycle.encode()), 10 * len(cycle.encode())):
        assert text_of(out_dir, start=cycle, max_new_tokens=tokens) == cycle + cycle * (tokens // 10)


def test_bytes_that_are_no_text_do_not_stop_it(tmp_path):
    """A lead byte without its continuation becomes U+FFFD, and the text continues."""
    out_dir = parrot(tmp_path, 'ab')
    state = checkpoint.load(out_dir / 'best.pt')
    state['model']['lm_head.weight'][:, ord('b')] = 0.0
    state['model']['lm_head.weight'][0xC3, ord('b')] = state['model']['lm_head.weight'][ord('a'), 0xC3] = 10.0
    checkpoint.save(out_dir / 'best.pt', state)
    assert text_of(out_dir, start='a', max_new_tokens=6) == 'ab\ufffdab\ufffda'


def test_the_end_of_the_document_ends_the_text(tmp_path):
    out_dir = parrot(tmp_path, '-', 'abc')
    samples, out = sample(out_dir, start='a', num_samples=2, max_new_tokens=50)
    assert samples == [('abc', 3)] * 2 and 'endoftext' not in out


def test_a_limit_that_was_not_reached_is_not_reported(tmp_path):
    out_dir = parrot(tmp_path, '-', 'abc', room=16)
    assert 'block_size' not in sample(out_dir, start='a', max_new_tokens=50)[1]


@pytest.mark.parametrize('start', ['', '<|endoftext|>'])
def test_a_new_document(tmp_path, start):
    out_dir = parrot(tmp_path, '-+')
    state = checkpoint.load(out_dir / 'best.pt')
    state['model']['lm_head.weight'][ord('+'), ByteTokenizer.eot] = 10.0
    checkpoint.save(out_dir / 'best.pt', state)
    assert text_of(out_dir, start=start, max_new_tokens=5) == '+-+-+'


# ----------------------------------------------------------------------------------------------------------
# Many prompts, stops, files


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.mark.parametrize('name', ['prompts.txt', 'prompts.jsonl'])
def test_prompts_of_a_file_are_as_if_alone(tmp_path, name):
    texts = ['abc de', 'j', 'fgh ij ab c']
    lines = texts if name.endswith('txt') else [json.dumps({'prompt': text, 'id': 1}) for text in texts]
    (tmp_path / name).write_text('\n'.join(lines) + '\n\n', encoding='utf-8')
    settings = dict(prompts=tmp_path / name, max_new_tokens=12, num_samples=2, seed=3)
    found = []
    for batch_size in (1, 2, 16):
        printed, _ = sample(chars(), out=tmp_path / 'out.jsonl', batch_size=batch_size, **settings)
        rows = rows_of(tmp_path / 'out.jsonl')
        assert [row['prompt'] for row in rows] == [text for text in texts for _ in range(2)]
        assert [row['prompt'] + row['text'] for row in rows] == [text for text, _ in printed]
        found.append([row['text'] for row in rows])
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 3
    (alone, again), _ = sample(chars(), start=texts[0], max_new_tokens=12, num_samples=2, seed=3)
    assert [alone[0], again[0]] == [texts[0] + text for text in found[0][:2]]


@pytest.mark.parametrize('flags', [
    dict(pos='learned'), dict(rope_scaling='dynamic', rope_factor=4.0, rope_context=16)],
    ids=['room in learned positions', 'a rotation by length'])
def test_limits_of_one_prompt_are_not_those_of_another(tmp_path, flags):
    out_dir, found = parrot(tmp_path, 'abc'), []
    flags = dict(pos='rope') | flags
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=257, block_size=24, **flags)
    meta = checkpoint.load(out_dir / 'best.pt')['meta']
    checkpoint.save(out_dir / 'best.pt', checkpoint.contents(GPT(config), settings={}, meta=meta, step=1))
    (tmp_path / 'prompts').write_text('\n'.join(['abcabcabcabcabcabc', 'b', 'cabca', 'ca', 'bc']))
    for batch_size in (1, 16):
        sample(out_dir, out=tmp_path / 'out.jsonl', prompts=tmp_path / 'prompts', batch_size=batch_size,
               num_samples=2, max_new_tokens=15)
        found.append([(row['prompt'], row['tokens']) for row in rows_of(tmp_path / 'out.jsonl')])
    assert found[0] == found[1] and len(found[0]) == 10
    assert len(found[0][2][1]) > (5 if 'rope_scaling' in flags else 6)


def test_json_lines_hold_tokens_and_their_log_probabilities(tmp_path):
    sample(chars(), start='ab', out=tmp_path / 'out.jsonl', max_new_tokens=9, num_samples=2)
    state = checkpoint.load(chars() / 'best.pt')
    model, tokenizer = checkpoint.build(state, 'best.pt').eval(), from_meta(state['meta']['tokenizer'])
    for row in rows_of(tmp_path / 'out.jsonl'):
        assert tokenizer.decode(row['tokens']) == row['text'] and len(row['logprobs']) == 9
        idx = torch.tensor([tokenizer.encode('ab') + row['tokens']])
        with torch.no_grad():
            logprobs = model(idx[:, :-1])[0].log_softmax(-1).gather(-1, idx[:, 1:, None])[0, 1:, 0]
        assert max(abs(a - b) for a, b in zip(logprobs.tolist(), row['logprobs'])) < 1e-3


def test_a_stop_text_ends_each_sample(tmp_path):
    out_dir = parrot(tmp_path / 'run', 'abcd')
    settings = dict(start='a', max_new_tokens=50, num_samples=2, out=tmp_path / 'out.jsonl')
    for stop in ('da', '["x", "da"]'):
        samples, _ = sample(out_dir, stop=stop, **settings)
        assert samples == [('abc', 4)] * 2
        assert [row['text'] for row in rows_of(tmp_path / 'out.jsonl')] == ['bc'] * 2


def test_a_special_token_is_a_stop(tmp_path):
    out_dir = parrot(tmp_path, '-', 'abc')
    assert sample(out_dir, start='a', stop='<|endoftext|>', num_samples=1)[0] == [('abc', 3)]


def test_typed_prompts_are_continued_one_by_one(tmp_path):
    out_dir = parrot(tmp_path, 'abc')
    done = python('sample.py', *flags(out_dir=out_dir, device='cpu', interactive=True, num_samples=1,
                                      max_new_tokens=4),
                  before="import io, sys; sys.stdin = io.StringIO('a\\nxb\\n')")
    assert done.code == 0 and not done.err, done
    assert re.findall(r'> (\w+)', done.out) == ['abcab', 'xbcabc']


def test_a_text_is_scored(tmp_path):
    """A model that repeats abc finds it likely; the bits per byte agree with the log-probabilities."""
    out_dir, text = parrot(tmp_path / 'run', 'abc'), 'abc' * 20
    (tmp_path / 'text').write_text(text)
    done = python('sample.py', *flags(out_dir=out_dir, device='cpu', score=f'FILE:{tmp_path / "text"}',
                                      out=tmp_path / 'out.jsonl'))
    assert done.code == 0 and not done.err, done
    row, = rows_of(tmp_path / 'out.jsonl')
    count, size, nats, bpb = re.fullmatch(r'model: .*\n(\d+) tokens, (\d+) bytes: log-likelihood '
                                          r'([-\d.]+) nats, '
                                          r'.*, ([\d.]+) bits per byte\n', done.out).groups()
    assert (count, size) == ('60', '60') and row['text'] == text
    assert abs(float(nats) - sum(row['logprobs'])) < 0.01
    assert abs(float(bpb) + float(nats) / 60 / 0.6931472) < 1e-3
    other = python('sample.py', *flags(out_dir=out_dir, device='cpu', score='acb' * 20)).out
    assert float(other.split()[-4]) > 2 * float(bpb)


# ----------------------------------------------------------------------------------------------------------
# Faster


def test_int8_prints_its_cost_before_the_samples():
    settings = dict(start='ab', max_new_tokens=20, temperature=0, num_samples=1)
    (one,), out = sample(chars(), quant='int8', **settings)
    loss, more = map(float, re.search(r'int8: ([\d.]+) bits per byte on 256 tokens of its own text, '
                                     r'([-+][\d.]+) against float32', out).groups())
    assert 0 < loss < 8 and abs(more) < 0.1
    assert one[0].startswith('int8: ') and one[0].splitlines()[1].startswith('ab')


def test_a_draft_changes_speed_and_not_the_text():
    settings = dict(start='ab', max_new_tokens=20, temperature=0, num_samples=1)
    plain = text_of(chars(), **settings)
    smaller = trained(dataset=dataset('chars'), **CHARS | dict(n_layer=1))
    (one,), out = sample(chars(), draft=smaller, ahead=3, **settings)
    assert one[0] == plain
    accepted, speed = re.search(r'draft: (\d+)% of its tokens accepted, .* per round, ([\d.]+)x the speed',
                                out).groups()
    assert 0 < int(accepted) <= 100 and float(speed) > 0
    (again,), out = sample(chars(), draft=chars(), ahead=3, **settings)
    assert again[0] == plain and 'draft: 100% of its tokens accepted, 4.00 tokens per round' in out


def test_the_last_line_compares_the_speed_with_the_memory_bandwidth():
    _, out = sample(chars(), start='ab', max_new_tokens=10, num_samples=2, bandwidth=True)
    assert re.fullmatch(r'2 rows together: 18 tokens in 9 steps of [\d.]+ ms; reading [\d.]+ MB per step '
                        r'uses \d+% of the measured [\d.]+ GB/s', out.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------
# Which model


def test_the_first_line_says_which_checkpoint_is_used():
    state = checkpoint.load(chars() / 'best.pt')
    _, out = sample(chars(), start='a', max_new_tokens=3)
    assert re.fullmatch(rf'model: {chars()}/best\.pt, step {state["step"]}, validation loss '
                        rf'{state["best_val_loss"]:.4f}, \d[\d.]*k parameters', out.splitlines()[0])
    _, out = sample(chars(), start='a', max_new_tokens=3, ckpt='ckpt.pt')
    assert re.match(rf'model: {chars()}/ckpt\.pt, step 60, lowest validation loss [\d.]+, ', out)
    assert 'GB/s' not in out and re.search(r'3 rows together: 6 tokens in 2 steps of [\d.]+ ms\n$', out)


def test_best_pt_is_read_unless_another_is_named(tmp_path):
    parrot(tmp_path, 'ab')
    parrot(tmp_path, 'ac', name='ckpt.pt')
    assert text_of(tmp_path, start='a', max_new_tokens=2) == 'aba'
    assert text_of(tmp_path, start='a', max_new_tokens=2, ckpt='ckpt.pt') == 'aca'
    (tmp_path / 'best.pt').unlink()
    assert text_of(tmp_path, start='a', max_new_tokens=2) == 'aca'


def test_unused_rows_of_the_vocabulary_are_never_drawn(tmp_path):
    out_dir = parrot(tmp_path, 'abc', vocab_size=320, padding=100.0)
    for settings in (dict(temperature=0), dict(temperature=5.0, top_k=None), dict(top_k=3, top_p=0.9)):
        text = text_of(out_dir, start='a', max_new_tokens=30, **settings)
        assert text == 'abc' * 10 + 'a'


def test_a_trained_model_with_a_rounded_vocabulary():
    """At this temperature a fifth of the draws would be tokens without a text."""
    out_dir = trained(vocab_size=320, max_iters=5, eval_interval=5)
    samples, _ = sample(out_dir, start='ab', max_new_tokens=30, temperature=100.0, top_k=None, num_samples=5)
    assert len(samples) == 5 and all(text.startswith('ab') for text, _ in samples)


def test_weights_can_have_another_dtype(tmp_path):
    out_dir = parrot(tmp_path, 'abc')
    for dtype in ('float32', 'bfloat16', 'float16'):
        assert text_of(out_dir, start='a', max_new_tokens=6, dtype=dtype) == 'abcabca'


# ----------------------------------------------------------------------------------------------------------
# How far


def test_rotary_positions_continue_beyond_block_size():
    samples, out = sample(chars(), start='a' * 50, max_new_tokens=50, num_samples=1)
    assert samples[0][1] == 50 and len(samples[0][0]) == 100 and 'block_size' not in out


def test_the_end_of_learned_positions_is_reported(tmp_path):
    out_dir = parrot(tmp_path, 'abc', room=16)
    samples, out = sample(out_dir, start='a', max_new_tokens=50, num_samples=2)
    assert samples == [('abc' * 5 + 'a', 15)] * 2
    assert 'block_size=16' in out.splitlines()[-1]
    samples, out = sample(out_dir, start='a', max_new_tokens=15, num_samples=1)
    assert samples == [('abc' * 5 + 'a', 15)] and 'block_size' not in out


@pytest.mark.parametrize('length', [16, 17, 400])
def test_a_prompt_that_fills_learned_positions_is_refused(tmp_path, length):
    done = python('sample.py', *flags(out_dir=parrot(tmp_path, 'abc', room=16), start='a' * length))
    assert_refused(done, f'{length} tokens', 'block_size=16')
    assert not done.out


# ----------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('settings, words', [
    (dict(start='aXbYZ'), ['XYZ']),
    (dict(start='FILE:no_such_file.txt'), ['no_such_file.txt']),
    (dict(start='FILE:data'), ['data']),
    (dict(temperature=-1), ['temperature=-1']),
    (dict(top_k=0), ['top_k=0']),
    (dict(top_p=2), ['top_p=2']),
    (dict(top_p=0), ['top_p=0']),
    (dict(num_samples=0), ['num_samples=0']),
    (dict(max_new_tokens=0), ['max_new_tokens=0']),
    (dict(max_new_tokens=-5), ['max_new_tokens=-5']),
    (dict(device='cuda:99'), ['device=cuda:99']),
    (dict(device='gpu'), ['device=gpu']),
    (dict(dtype='fp16'), ['dtype=fp16', 'float16']),
    (dict(dtype='int8'), ['dtype=int8', 'float16']),
    (dict(ckpt='newest.pt'), ['newest.pt']),
    (dict(temprature=1), ['--temprature', '--temperature']),
    (dict(min_p=0), ['min_p=0']),
    (dict(repetition_penalty=0), ['repetition_penalty=0']),
    (dict(chunk=0), ['chunk=0']),
    (dict(ahead=0), ['ahead=0']),
    (dict(quant='int2'), ['quant=int2', 'none, int8, int4']),
    (dict(stop='<|im_end|>'), ['stop=<|im_end|>', 'special token']),
    (dict(stop='["x"'), ['stop=["x"', 'JSON list']),
    (dict(prompts='no_such_file.txt', start=''), ['no_such_file.txt']),
    (dict(score='a b'), ['start and score']),
    (dict(start='', score='a'), ['score', 'two tokens']),
    (dict(draft='no_such_run'), ['no_such_run']),
    (dict(out='no_such_folder/a.jsonl'), ['no_such_folder/a.jsonl', 'check the path']),
], ids=lambda value: '-'.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else '')
def test_bad_input_is_refused_with_one_sentence(settings, words):
    usual = dict(out_dir=chars(), start='a', device='cpu')
    usual |= {} if settings.get('start') == '' else dict(max_new_tokens=5)
    done = python('sample.py', *flags(**usual | settings))
    assert_refused(done, *words)
    assert not done.out


def test_the_file_to_write_is_not_one_that_is_read(tmp_path):
    (tmp_path / 'a.txt').write_text('a\n')
    (tmp_path / 'b.txt').symlink_to(tmp_path / 'a.txt')
    for settings in (dict(prompts=tmp_path / 'b.txt'), dict(start=f'FILE:{tmp_path / "b.txt"}'),
                     dict(score=f'FILE:{tmp_path / "b.txt"}')):
        done = python('sample.py', *flags(out_dir=chars(), out=tmp_path / 'a.txt', **settings))
        assert_refused(done, f'out={tmp_path / "a.txt"} must not be a file that is read')
        assert (tmp_path / 'a.txt').read_text() == 'a\n'


@pytest.mark.parametrize('settings, line', [
    (dict(start='ab', ahead=3), '--ahead has no effect without a draft'),
    (dict(score='abc', temperature=1, draft=True), '--temperature --draft have no effect with score'),
    (dict(start='ab', draft=True, bandwidth=True), '--bandwidth has no effect with a draft'),
    (dict(start='ab', init_from=True), '--out_dir --ckpt have no effect with init_from=')])
def test_flags_without_effect_are_said(settings, line):
    settings |= {name: chars() / 'ckpt.pt' for name in ('init_from', 'draft') if settings.get(name) is True}
    usual = dict(out_dir=chars(), ckpt='ckpt.pt', device='cpu')
    short = {} if 'score' in settings else dict(max_new_tokens=2)
    done = python('sample.py', *flags(**usual | short | settings))
    assert done.code == 0 and done.err.startswith(f'warning: {line}') and done.err.count('\n') == 1, done


def test_a_published_checkpoint_drafts(tmp_path):
    """Here one of nanoGPT, in a file and in a folder beside nothing else."""
    meta = {'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}, 'prompt': 'a'}
    args = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, bias=True, vocab_size=50304, dropout=0.0)
    model = GPT(GPTConfig(**args))
    (tmp_path / 'run').mkdir()
    checkpoint.save(tmp_path / 'run' / 'best.pt', checkpoint.contents(model, settings={}, meta=meta, step=1))
    theirs = {'transformer.' + name.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.'): p.detach()
              for name, p in tensors_of(model).items()}
    (tmp_path / 'nano').mkdir()
    nano = {'model': theirs, 'model_args': args, 'iter_num': 1, 'config': {}}
    torch.save(nano, tmp_path / 'nano' / 'ckpt.pt')
    _, out = sample(tmp_path / 'run', start='a', draft=tmp_path / 'nano' / 'ckpt.pt', max_new_tokens=8)
    assert 'draft: 100% of its tokens accepted' in out
    done = python('sample.py', *flags(out_dir=tmp_path / 'run', draft=tmp_path / 'nano'))
    assert_refused(done, f'draft={tmp_path}/nano must hold', f'use --draft={tmp_path}/nano/ckpt.pt')
    done = python('sample.py', *flags(out_dir=tmp_path / 'nano'))
    remedy = re.search(r'use (--init_from=\S+)', done.err)[1]
    assert python('sample.py', remedy, '--device=cpu', '--max_new_tokens=3', '--start=a').code == 0
    done = python('sample.py', *flags(out_dir=chars(), device='cpu', draft=tmp_path / 'nano' / 'ckpt.pt'))
    assert_refused(done, 'draft=', 'another tokenizer')


# ----------------------------------------------------------------------------------------------------------
# Words without a flag, consoles that cannot print


@pytest.mark.parametrize('words, remedy', [
    (['RUN'], '--out_dir=RUN'), (['RUN/best.pt'], '--init_from=RUN/best.pt'),
    (['--out_dir=RUN', '--start=def', 'main'], "--start='def main'"),
    (['--out_dir=RUN', '--start', 'abc', 'de', 'f', '--device=cpu'], "--start='abc de f'"),
    (['--out_dir=RUN', '--score=a', 'b'], "--score='a b'")], ids=str)
def test_a_word_without_its_flag_gets_a_remedy_that_works(words, remedy):
    words, remedy = [word.replace('RUN', str(chars())) for word in words], remedy.replace('RUN', str(chars()))
    done = python('sample.py', *words)
    assert_refused(done, 'is no config file', remedy)
    done = python('sample.py', *[word for word in words if word.startswith('--out_dir')],
                  *shlex.split(remedy.replace('def main', 'a b')), '--device=cpu', '--max_new_tokens=3')
    assert done.code == 0, done.err


def test_a_stream_without_reconfigure_is_printed_to():
    """As in a notebook."""
    before = """
import sys
class Cell:
    encoding = 'UTF-8'
    def __init__(self, to): self.to = to
    def write(self, text): return self.to.write(text)
    def flush(self): self.to.flush()
sys.stdout = Cell(sys.stdout)
"""
    settings = dict(out_dir=chars(), start='a', device='cpu', max_new_tokens=3)
    done = python('sample.py', *flags(**settings), before=before)
    assert done.code == 0 and done.out.startswith('model: ') and not done.err, done


def test_a_character_that_the_console_lacks_is_printed_as_its_number(tmp_path):
    out_dir = parrot(tmp_path, 'é-')
    done = real_python('sample.py', *flags(out_dir=out_dir, start='é', device='cpu', max_new_tokens=3),
                       env={'PYTHONIOENCODING': 'ascii'})
    assert done.code == 0 and not done.err and r'\xe9-\xe9' in done.out, done


def test_a_closed_pipe_is_no_traceback():
    command = shlex.join([sys.executable, 'sample.py', *flags(
        out_dir=chars(), start='a', device='cpu', max_new_tokens=200, num_samples=2)])
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {command} | head -n 1'], cwd=ROOT, env=ENV,
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith('model: ') and not done.stderr, done


@pytest.mark.parametrize('line', ['importing', 'model: '], ids=['while importing', 'while sampling'])
def test_ctrl_c_ends_with_a_sentence(line, tmp_path):
    env = ENV
    if line == 'importing':
        (tmp_path / 'torch.py').write_text('import time\nprint("importing", flush=True)\ntime.sleep(20)')
        env = ENV | {'PYTHONPATH': str(tmp_path)}
    args = flags(out_dir=chars(), start='a', device='cpu', max_new_tokens=10 ** 6)
    # a shell that starts the tests in the background ignores SIGINT
    process = subprocess.Popen([sys.executable, 'sample.py', *args], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline().startswith(line)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # where it does not listen, it would go on for hours
    assert err.strip() == 'stopped by Ctrl-C' and process.returncode in (-signal.SIGINT, 130)


def test_a_draft_of_another_vocabulary_is_refused():
    done = python('sample.py', *flags(out_dir=chars(), start='a', device='cpu', draft=trained()))
    assert_refused(done, 'draft=', '257 tokens', 'same dataset')
    assert not done.out


@pytest.mark.parametrize('name, text', [
    ('a.txt', ' \n\n'), ('a.jsonl', '{"text": "a"}\n'), ('a.jsonl', 'abc\n')])
def test_a_file_without_prompts_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    done = python('sample.py', *flags(out_dir=chars(), device='cpu', prompts=tmp_path / name))
    assert_refused(done, 'prompts=', name)
    assert not done.out


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    (tmp_path / 'prompt').write_bytes(b'ab\xff\xfe')
    done = python('sample.py', *flags(out_dir=chars(), start=f'FILE:{tmp_path / "prompt"}'))
    assert_refused(done, str(tmp_path / 'prompt'), 'UTF-8')


@pytest.mark.parametrize('setting', ['prompts=', 'start=FILE:', 'score=FILE:'])
def test_a_text_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path, setting):
    done = python('sample.py', f'--out_dir={tmp_path / "no run"}', f'--{setting}{tmp_path / "no text"}')
    assert_refused(done, str(tmp_path / 'no text'))


@pytest.mark.parametrize('before, words', [
    ("import sys; sys.modules['tiktoken'] = None", ['pip install tiktoken']),
    ('''
import tiktoken
def get_encoding(name):
    raise OSError('no network')
tiktoken.get_encoding = get_encoding''', ['gpt2', 'TIKTOKEN_CACHE_DIR']),
], ids=['not_installed', 'offline'])
def test_a_vocabulary_that_cannot_be_loaded_is_refused(tmp_path, before, words):
    out_dir = parrot(tmp_path, 'ab')
    state = checkpoint.load(out_dir / 'best.pt')
    state['meta']['tokenizer'] = {'kind': 'tiktoken', 'name': 'gpt2'}
    checkpoint.save(out_dir / 'best.pt', state)
    done = python('sample.py', *flags(out_dir=out_dir), before=before)
    assert_refused(done, *words)
    assert not done.out


@pytest.mark.parametrize('kind', DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path, kind):
    shutil.copy(chars() / 'ckpt.pt', tmp_path / 'ckpt.pt')
    damage(tmp_path / 'ckpt.pt', kind)
    done = python('sample.py', *flags(out_dir=tmp_path))
    assert_refused(done, 'n_head' if kind == 'flags that cannot be' else str(tmp_path / 'ckpt.pt'))
    assert not done.out and not (tmp_path / 'bomb').exists()


def test_an_empty_prompt_is_the_one_of_the_dataset(tmp_path):
    out_dir = parrot(tmp_path, 'abc')
    state = checkpoint.load(out_dir / 'best.pt')
    state['meta']['prompt'] = 'bc'
    checkpoint.save(out_dir / 'best.pt', state)
    assert text_of(out_dir, start='', max_new_tokens=4) == text_of(out_dir, start='bc', max_new_tokens=4)
