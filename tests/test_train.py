"""
Training, as a user runs it: a run learns, reports, resumes bit for bit, refuses bad input in one sentence.
"""
import functools
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from runs import (
    EXIT,
    ROOT,
    WRITTEN,
    assert_refused,
    assert_same_run,
    at_step,
    curve,
    dataset,
    differences,
    documents,
    files,
    flags,
    load,
    losses,
    metrics,
    names,
    pair,
    python,
    real_python,
    resume,
    run_copy,
    toy,
    train,
    trained,
)

from configurator import settings_of
from data.tokenizer import ByteTokenizer
from data.writer import write_dataset
from model import GPT, GPTConfig
from nanoblocks import hardware
from nanoblocks.commandline import warn_of_unread
from nanoblocks.files import ROOT
from nanoblocks.training import checkpoint, logbook, parallel
from nanoblocks.training import settings as rules

# ----------------------------------------------------------------------------------------------------------
# What a run leaves


@functools.cache
def first_run():
    """The toy run, once as a user starts it: the out_dir and the output."""
    out_dir = next(names)
    done = real_python('train.py', *toy(out_dir))
    assert done.code == 0 and not done.err, done
    return out_dir, done.out


def test_a_run_learns():
    val = losses(first_run()[0], 'val_loss')
    # an even guess costs ln 257 = 5.5, knowing how often each letter comes about 2.4
    assert len(val) == 4 and val[-1] < 2.7, val
    assert losses(first_run()[0])[0] > 4.9


def test_forked_runs_equal_real_ones():
    assert_same_run(trained(), first_run()[0])


def test_validation_loss_is_that_of_the_saved_model():
    """Over the windows of val.bin, without dropout."""
    out_dir = trained(dropout=0.5, max_iters=20, eval_tokens=10**9)
    model = checkpoint.build(checkpoint.load(out_dir / 'ckpt.pt'), 'ckpt.pt').eval()
    tokens = torch.from_numpy(np.fromfile(dataset() / 'val.bin', '<u2').astype(np.int64))
    windows = tokens.unfold(0, 33, 32)
    with torch.no_grad():
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    assert losses(out_dir, 'val_loss')[1:] == pytest.approx([loss.item()], rel=1e-5)


def test_metrics_say_what_was_measured():
    lines, meta = metrics(first_run()[0]), json.loads((dataset() / 'meta.json').read_text())
    for line in lines:
        known = {'step', 'tokens', 'lr', 'seconds'}
        kind = {'val_loss', 'val_bpb'} if 'val_loss' in line else {
            'train_loss', 'tokens_per_s', 'mfu', 'grad_norm', 'param_norm', 'memory_gb', 'skipped'}
        assert line.keys() == known | kind
        assert line['tokens'] == line['step'] * 8 * 32
        if 'val_loss' in line:
            bits = line['val_loss'] / math.log(2) / meta['val_bytes_per_token']
            assert line['val_bpb'] == pytest.approx(bits, rel=1e-12)
    assert [line['step'] for line in lines if 'train_loss' in line] == list(range(5, 61, 5))
    assert [line['step'] for line in lines if 'val_loss' in line] == [0, 20, 40, 60]
    seconds = [line['seconds'] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0


def training_time(out_dir):
    """Seconds between the first and the last log line, by tokens_per_s and by the clock."""
    lines = [line for line in metrics(out_dir) if 'train_loss' in line]
    by_speed = sum((line['tokens'] - before['tokens']) / line['tokens_per_s']
                   for before, line in zip(lines, lines[1:]))
    return by_speed, lines[-1]['seconds'] - lines[0]['seconds']


def test_speed_is_tokens_by_time():
    by_speed, by_clock = training_time(trained(eval_interval=60, batch_size=16))
    assert 0.8 * by_clock < by_speed < 1.2 * by_clock + 0.01


def test_evaluations_do_not_count_as_training_time(tmp_path):
    done = python('train.py', *toy(tmp_path, max_iters=30, eval_interval=10), before='''
import time, data.loader
get = data.loader.Dataset.eval_batches
def eval_batches(*args, **kwargs):
    time.sleep(0.5)
    return get(*args, **kwargs)
data.loader.Dataset.eval_batches = eval_batches''')
    assert done.code == 0, done
    by_speed, by_clock = training_time(tmp_path)
    # evaluations after steps 10 and 20
    assert by_speed < by_clock - 2 * 0.5 + 0.01


def test_files_of_a_run():
    out_dir = first_run()[0]
    assert {path.name for path in out_dir.iterdir()} == {
        'ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'metrics.jsonl', 'config.json'}
    config = json.loads((out_dir / 'config.json').read_text())
    assert GPTConfig(**config['model']).n_embd == 32
    assert config['settings']['max_iters'] == 60 and config['settings']['learning_rate'] == 3e-3
    newest, best = load(out_dir), load(out_dir, 'best.pt')
    assert newest['step'] == 60 and GPTConfig(**newest['config']) == GPTConfig(**config['model'])
    assert newest['meta'] == json.loads((dataset() / 'meta.json').read_text())
    # every float of an optimizer would have a key
    assert not best.keys() & {'optimizers', 'rng', 'cuda_rng', 'scaler'}
    assert not differences(best['model'], newest['model'])


EXPLODING = dict(warmup_iters=50, learning_rate=3.0, grad_clip=0, eval_interval=5)


def test_best_is_the_lowest_validation_loss():
    """With a learning rate that is far too high in the end, best.pt stays and ckpt.pt is replaced."""
    kept = trained(**EXPLODING)
    val = losses(kept, 'val_loss')[1:]
    best = 5 * (1 + val.index(min(val)))
    assert best < 45 and load(kept, 'best.pt')['step'] == best and load(kept)['step'] == 60
    assert load(kept, 'best.pt')['best_val_loss'] == load(kept)['best_val_loss'] == min(val)
    # nanoGPT's setting for small data
    assert load(trained(always_save_checkpoint=False, **EXPLODING))['step'] == best


def test_start_report():
    out = first_run()[1]
    head, _, tail = out.partition('step 5:')
    # two blocks of 12 x 32 x 32 weights, 9 x 32 biases and two norms; wte, wpe and a last norm
    weights, rest = 2 * 12 * 32 * 32, 257 * 32 + 32 * 32 + 2 * (9 + 4) * 32 + 2 * 32
    assert f'{(weights + rest) / 1e3:.3g}k parameters' in head
    # six for each weight that multiplies, and the scores of 32 keys in each layer
    flops = 6 * (weights + 257 * 32) + 2 * 12 * 32 * 32
    assert f'{flops / 1e3:.3g}k FLOPs per token' in head
    # keys and values of two bytes, and a position of four
    assert f'{2 * 32 * (2 * 32 * 2 + 4) / 1e3:.3g}kB of cache' in head
    assert re.search(r'\b256 tokens\b', head) and '60 steps: 15.4k tokens' in head
    assert 'cpu' in head and 'float32' in head and 'eager' in head
    assert re.search(r'time +about .* for 48 steps', tail)
    assert re.search(r'step 20: val loss \d\.\d{4}, \d\.\d{4} bits per byte', tail)


def test_eval_only_writes_nothing(run_copy, tmp_path):
    before = files(run_copy)
    out = resume(run_copy, eval_only=True)
    assert f'step 60: val loss {losses(run_copy, "val_loss")[-1]:.4f}' in out
    train(run_copy, eval_only=True)
    assert files(run_copy) == before
    assert 'step 0: val loss 5.' in train(tmp_path / 'new', eval_only=True)[1]
    assert not (tmp_path / 'new').exists()


def test_a_run_is_not_overwritten_unasked(run_copy):
    before = files(run_copy)
    done = python('train.py', *toy(run_copy))
    assert_refused(done, str(run_copy), '--init_from=resume', '--overwrite=True')
    assert files(run_copy) == before
    train(run_copy, overwrite=True, max_iters=10, eval_interval=10)
    assert load(run_copy)['step'] == load(run_copy, 'best.pt')['step'] == 10
    assert [line['step'] for line in metrics(run_copy)] == [0, 5, 10, 10]


@pytest.mark.parametrize('flag', ['--n_head=3', '--norm=rmsnrm', '--schedule=sine'])
def test_a_folder_that_exists_does_not_hide_a_wrong_flag(run_copy, flag):
    assert_refused(python('train.py', *toy(run_copy), flag), flag[2:])


def test_progress_is_told_without_a_terminal(tmp_path):
    out = train(tmp_path / 'run')[1]
    assert re.search(r'step 30: loss .*, 50% done, \d+ s left', out), out
    assert re.search(r'step 60: loss .*, 100% done', out), out


def test_a_long_evaluation_shows_how_far_it_is(monkeypatch, capsys):
    """On the bar of a terminal every second, in a log every half minute."""
    now = [0.0]
    monkeypatch.setattr(logbook.time, 'monotonic', lambda: now[0])
    log = logbook.Logbook(None, True, 0, 10)
    for terminal in (False, True):
        if terminal:
            monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
            log = logbook.Logbook(None, True, 0, 10)
        for share in range(1, 100):
            now[0] += 0.5
            log.evaluating(share / 100)
        log.evaluating(1)
        out = capsys.readouterr().out
        if terminal:
            assert 'evaluating: 3%' in out and 'evaluating: 99%' in out and log.bar.desc == ''
        else:
            assert out == 'evaluating: 61%\n'
    log.close()


def test_a_folder_of_a_run_without_a_checkpoint_is_replaced_as_its_message_says(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 1}\n')
    done = python('train.py', *toy(tmp_path / 'run'))
    assert_refused(done, 'no ckpt.pt', '--overwrite=True')
    assert 'resume' not in done.err


# ----------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize('settings', [
    dict(optimizer='adamw'),
    dict(optimizer='muon', dropout=0.1),
    dict(optimizer='adamw', dropout=0.1, dtype='bfloat16'),
    dict(optimizer='muon', dtype='bfloat16', schedule='wsd'),
    dict(optimizer='adamw', dropout=0.1, dtype='float16'),
], ids=lambda settings: '-'.join(map(str, settings.values())))
def test_resume_is_bit_exact_twice(settings):
    whole = trained(**settings)
    parts, _ = train(max_iters=20, **settings)
    assert load(parts)['step'] == 20
    for stop in (40, 60):
        assert f'resuming at step {stop - 20}' in resume(parts, max_iters=stop)
    assert_same_run(parts, whole)


def test_resume_between_log_lines_leaves_the_curve_as_it_was(tmp_path):
    """Log lines are means over the steps since the last: those before the checkpoint count too."""
    settings = dict(log_interval=7, eval_interval=10, max_iters=30)
    done = python('train.py', *toy(tmp_path / 'run', **settings), before=at_step(25, EXIT))
    assert done.code == 9 and load(tmp_path / 'run')['step'] == 20
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(**settings))


def test_resume_keeps_the_best(tmp_path):
    """A run that gets worse: after a resume, worse than the best is no improvement."""
    best = load(trained(**EXPLODING), 'best.pt')['step']
    before = at_step(best + 12, EXIT)
    assert python('train.py', *toy(tmp_path / 'run', **EXPLODING), before=before).code == 9
    assert load(tmp_path / 'run')['step'] > best
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(**EXPLODING))


def test_metrics_are_rewound_to_the_checkpoint(run_copy):
    whole = curve(run_copy)
    line = (run_copy / 'metrics.jsonl').read_text().splitlines()[-2]
    assert json.loads(line)['step'] == 60
    with open(run_copy / 'metrics.jsonl', 'a') as f:
        # a killed run was further than its checkpoint, and in the middle of a line
        f.write(line.replace('"step": 60', '"step": 65') + '\n')
        f.write(line.replace('"step": 60', '"step": 70')[:30] + '\0\0')
    resume(run_copy)
    assert curve(run_copy) == whole
    resume(run_copy, max_iters=70, eval_interval=5)
    assert [line['step'] for line in metrics(run_copy)][-5:] == [60, 65, 65, 70, 70]


def test_a_torn_line_alone_is_dropped(run_copy):
    text = (run_copy / 'metrics.jsonl').read_text()
    (run_copy / 'metrics.jsonl').write_text(text + '{"step": 60, "tok')
    resume(run_copy, max_iters=65)
    assert (run_copy / 'metrics.jsonl').read_text().startswith(text)
    assert metrics(run_copy)[-1]['step'] == 65


def test_seconds_go_on_after_resume(run_copy):
    before = metrics(run_copy)[-1]['seconds']
    resume(run_copy, max_iters=70)
    assert metrics(run_copy)[-1]['seconds'] > before


def test_resume_of_a_finished_run_changes_nothing(run_copy):
    before = files(run_copy)
    resume(run_copy)
    assert {path: data for path, data in files(run_copy).items() if path.name != 'config.json'} == {
        path: data for path, data in before.items() if path.name != 'config.json'}


def test_resume_says_what_it_changes(run_copy):
    """One line for each setting that gives another result: name, then, now."""
    changed = dict(cautious_decay=False, beta1=0.8, beta2=0.9, grad_clip=0.5, z_loss=1e-4, ema=0.5,
                   min_lr=1e-5, schedule='linear', warmup_iters=6, lr_decay_iters=70, eval_tokens=1024,
                   max_iters=65)
    out = resume(run_copy, **changed)
    lines = dict(re.findall(r'changed +(\w+): was (.*)', out))
    assert lines == {
        'beta1': '0.9, now 0.8', 'beta2': '0.95, now 0.9', 'grad_clip': '1.0, now 0.5',
        'z_loss': '0.0, now 0.0001', 'ema': '0.0, now 0.5', 'min_lr': 'None, now 1e-05',
        'schedule': 'cosine, now linear', 'warmup_iters': '5, now 6', 'lr_decay_iters': '60, now 70',
        'eval_tokens': '2048, now 1024', 'max_iters': '60, now 65'}
    assert 'changed' not in resume(run_copy)


def test_a_later_end_moves_the_schedule_and_says_so(tmp_path):
    run, _ = train(tmp_path / 'run', max_iters=20, lr_decay_iters=None)
    assert 'max_iters: was 20, now 40, which moves the end of the schedule' in resume(run, max_iters=40)


def test_a_finished_run_says_that_it_was_finished(run_copy):
    out = resume(run_copy)
    assert 'the last step, 60, was made' in out and '--max_iters' in out
    assert 'the last step, 60, was made' not in resume(run_copy, max_iters=65)


def test_resume_takes_a_moved_run_and_repeated_flags(run_copy):
    """A flag that repeats the value of the checkpoint is no contradiction, and some settings may change."""
    changed = dict(max_iters=65, eval_interval=65, learning_rate=1e-3)
    done = python('train.py', *toy(run_copy, init_from='resume', **changed))
    assert done.code == 0, done
    assert load(run_copy)['step'] == 65


def test_resume_takes_new_optimizer_settings(run_copy):
    """Loading the state of an optimizer must not restore its old settings."""
    resume(run_copy, max_iters=65, weight_decay=0.5, beta1=0.8, beta2=0.9, learning_rate=1e-3)
    state, = load(run_copy)['optimizers']
    assert {group['weight_decay'] for group in state['param_groups']} == {0.5, 0.0}
    assert {tuple(group['betas']) for group in state['param_groups']} == {(0.8, 0.9)}
    assert metrics(run_copy)[-1]['lr'] == pytest.approx(1e-4, rel=1e-9)
    assert {group['lr'] for group in state['param_groups']} == {metrics(run_copy)[-1]['lr']}


@pytest.mark.parametrize('flag, was, now', [
    ('n_layer', '2', '3'), ('norm', 'layernorm', 'rmsnorm'), ('block_size', '32', '16'), ('dataset', '', ''),
    ('batch_size', '8', '4'), ('gradient_accumulation_steps', '1', '2'), ('seed', '1337', '1'),
    ('optimizer', 'adamw', 'muon'),
])
def test_resume_refuses_contradictions(run_copy, flag, was, now):
    before = files(run_copy)
    if flag == 'dataset':
        was, now = dataset(), dataset('other')
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80, **{flag: now}))
    assert_refused(done, flag, str(was), str(now))
    assert files(run_copy) == before


def test_resume_takes_a_checkpoint_from_before_a_flag_existed(run_copy):
    """The flag then has its default, and cannot change any more than the others can."""
    state = load(run_copy)
    for flag in ('norm_bias', 'logit_softcap'):
        del state['config'][flag]
    checkpoint.save(str(run_copy / 'ckpt.pt'), state)
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, logit_softcap=3.0))
    assert_refused(done, 'logit_softcap (checkpoint None, now 3.0')
    assert 'override' not in resume(run_copy, max_iters=65)
    assert load(run_copy)['step'] == 65


def test_resume_lists_all_contradictions(run_copy):
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, n_layer=3, batch_size=4))
    assert_refused(done, 'n_layer (checkpoint 2, now 3', 'batch_size (checkpoint 8, now 4')


def test_resume_refuses_fewer_steps_than_were_made(run_copy):
    before = files(run_copy)
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=20))
    assert_refused(done, 'max_iters=20', '60')
    assert files(run_copy) == before


def test_resume_refuses_a_dataset_prepared_anew(tmp_path):
    folder, run = tmp_path / 'data', tmp_path / 'run'
    shutil.copytree(dataset(), folder)
    train(run, dataset=folder, max_iters=5)
    write_dataset(folder, documents(seed=2), ByteTokenizer(), 'toy')
    before = files(run)
    done = python('train.py', *flags(init_from='resume', out_dir=run, max_iters=10))
    assert_refused(done, str(folder), 'anew')
    assert files(run) == before


# ----------------------------------------------------------------------------------------------------------
# What must not matter


def test_accumulation_equals_a_larger_batch():
    """The validation loss too, because it is a mean over tokens: seven windows are 7, 4 + 3 or 3 + 3 + 1."""
    settings = dict(eval_tokens=7 * 32 + 5, eval_iters=1, eval_interval=10, max_iters=20, log_interval=1)
    whole = trained(batch_size=12, **settings)
    for batch_size, micro_batches in ((4, 3), (3, 4)):
        parts = trained(batch_size=batch_size, gradient_accumulation_steps=micro_batches, **settings)
        assert curve(parts, 'step', 'tokens') == curve(whole, 'step', 'tokens')
        for key in ('train_loss', 'val_loss'):
            assert losses(parts, key) == pytest.approx(losses(whole, key), rel=1e-5)


def test_evaluation_does_not_change_training():
    settings = dict(max_iters=50, log_interval=1, dropout=0.1)
    often = trained(eval_interval=5, **settings)
    seldom = trained(eval_interval=50, eval_tokens=64, **settings)
    assert len(losses(often)) == 50 and losses(often) == losses(seldom)
    assert not differences(load(often)['model'], load(seldom)['model'])


def test_log_interval_does_not_change_training():
    assert not differences(load(trained())['model'], load(trained(log_interval=7))['model'])


def test_seed_decides_weights_and_batches(tmp_path):
    settings = dict(max_iters=5, log_interval=1, learning_rate=1e-9, min_lr=0.0)
    same, other = trained(**settings), trained(seed=1, **settings)
    # hardly any learning: these are the losses of initial weights on other batches
    assert all(a != b for a, b in zip(losses(same), losses(other)))
    assert losses(train(tmp_path / 'again', **settings)[0]) == losses(same)


SHOW_DRAWS = '''
import torch, torch.nn.functional as F
dropout = F.dropout
def shown(x, p, training=True, inplace=False):
    y = dropout(x, p, training, inplace)
    if training and p:
        print('mask', (y != 0).flatten()[:40].int().tolist())
    return y
F.dropout = torch.nn.functional.dropout = shown'''


def test_dropout_is_drawn_anew_for_every_seed_step_layer_and_process(tmp_path):
    settings = dict(max_iters=3, dropout=0.5, gradient_accumulation_steps=4)
    masks = []
    for seed in (1, 2):
        for done in pair(*toy(tmp_path / str(seed), seed=seed, **settings), before=SHOW_DRAWS):
            masks += re.findall('mask (.*)', done.out)
    # two seeds, two processes, three steps of two micro-batches, and five places to drop
    assert len(masks) == len(set(masks)) == 2 * 2 * 3 * 2 * 5


@pytest.mark.parametrize('seed', [0, -1, 2**31, 2**40, 2**64 - 1])
def test_any_seed_works(tmp_path, seed):
    train(tmp_path, seed=seed, max_iters=2, dropout=0.1)
    assert load(tmp_path)['settings']['seed'] == seed


# ----------------------------------------------------------------------------------------------------------
# Optimization


def cosine(n):
    part = (n - 5) / (30 - 5)
    return 1e-4 + (2e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * part)) if n < 30 else 1e-4


def wsd(n):
    # half of 30 steps go down
    return 2e-3 if n < 15 else 2e-3 + (1e-4 - 2e-3) * (n - 15) / 15 if n < 30 else 1e-4


@pytest.mark.parametrize('after_warmup, settings', [
    (cosine, dict(schedule='cosine')),
    (wsd, dict(schedule='wsd', wsd_decay=0.5)),
    (wsd, dict(schedule='wsd', wsd_decay=0.5, optimizer='muon', muon_lr=0.01)),
    (lambda n: 2e-3, dict(decay_lr=False)),
], ids=['cosine', 'wsd', 'wsd_muon', 'constant'])
def test_learning_rate_schedule(after_warmup, settings):
    out_dir = trained(learning_rate=2e-3, min_lr=1e-4, warmup_iters=5, lr_decay_iters=30, max_iters=34,
                      log_interval=1, eval_interval=17, **settings)
    rates = {line['step']: line['lr'] for line in metrics(out_dir) if 'train_loss' in line}
    # the line of step n tells the rate with which step n was made, the one that nanoGPT calls iteration n - 1
    warmup = 0 if settings.get('decay_lr') is False else 5
    want = {n + 1: 2e-3 * (n + 1) / 6 if n < warmup else after_warmup(n) for n in range(34)}
    assert rates == pytest.approx(want, rel=1e-9)
    groups = [group for state in load(out_dir)['optimizers'] for group in state['param_groups']]
    used = {group['lr'] / group['peak_lr'] for group in groups}
    assert max(used) == pytest.approx(want[34] / 2e-3, rel=1e-9) and max(used) - min(used) < 1e-12
    assert {group['peak_lr'] for group in groups} == ({0.01, 2e-3} if 'optimizer' in settings else {2e-3})


def test_min_lr_is_a_tenth_unless_said():
    assert metrics(trained(max_iters=61))[-1]['lr'] == pytest.approx(3e-4, rel=1e-9)


def test_gradients_are_clipped():
    """AdamW divides by the size of the gradient plus 1e-8: only gradients clipped below that move little."""
    settings = dict(max_iters=20, weight_decay=0.0, log_interval=1)
    assert losses(trained(grad_clip=1e-12, **settings))[-1] > 5.3
    without = losses(trained(grad_clip=0, **settings))
    assert without[-1] < 4.5
    assert without == losses(trained(grad_clip=1e9, **settings))
    assert without != losses(trained(grad_clip=0.1, **settings))


def test_number_types_learn_equally_well():
    """With clipping, which must happen to the gradients, not to the scaled gradients of float16."""
    exact = losses(trained(log_interval=20))
    for dtype in ('bfloat16', 'float16'):
        assert losses(trained(log_interval=20, dtype=dtype)) == pytest.approx(exact, abs=0.02)


def test_a_stream_of_16_bits_learns_equally_well():
    settings = dict(log_interval=20, dtype='bfloat16')
    wide, narrow = losses(trained(**settings)), losses(trained(**settings, stream_dtype='bfloat16'))
    assert narrow == pytest.approx(wide, abs=0.02) and narrow != wide


def test_a_head_of_8_bits_learns_nearly_as_well():
    settings = dict(log_interval=20, dtype='bfloat16')
    wide, narrow = losses(trained(**settings)), losses(trained(**settings, head_dtype='float8'))
    assert narrow == pytest.approx(wide, abs=0.02) and narrow != wide


def test_every_block_reads_the_stream_in_its_dtype():
    model, seen = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=61)), []
    for block in model.h:
        block.register_forward_hook(lambda block, args, out: seen.append((args[0].dtype, out.dtype)))
    idx = torch.randint(61, (2, 8))
    model.stream_dtype = torch.bfloat16
    model(idx, idx)
    assert seen == 2 * [(torch.float32, torch.float32)], 'without autocast, products need fp32'
    with torch.autocast('cpu', torch.bfloat16):
        model(idx, idx)[1].backward()
    assert seen[2:] == 2 * [(torch.bfloat16, torch.bfloat16)]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_weights_are_cast_once_a_step(tmp_path):
    settings = dict(max_iters=2, gradient_accumulation_steps=4, eval_interval=2, eval_tokens=256)
    done = python('train.py', *toy(tmp_path / 'run', dtype='bfloat16', **settings), before='''
import atexit, torch
from torch.utils._python_dispatch import TorchDispatchMode
class Casts(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = 'to_copy' in str(function) and kwargs.get('dtype') == torch.bfloat16
        self.count += cast and args[0].shape == (96, 32)
        return function(*args, **(kwargs or {}))
casts = Casts().__enter__()
import nanoblocks.training.parallel as parallel
end = parallel.end
parallel.end = lambda watch: (print('casts', casts.count), end(watch))''')
    assert done.code == 0, done
    # c_attn of two layers: in two steps of four micro-batches, and in a batch of each of two evaluations
    assert 'casts 8\n' in done.out, done.out


@pytest.mark.parametrize('tie', [True, False])
def test_every_parameter_has_one_kind(tie):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=61, qk_norm=True, tie=tie))
    kinds, named = model.param_kinds(), dict(model.named_parameters())
    assert kinds.keys() == named.keys()
    for name, p in named.items():
        outer = name in ('wte.weight', 'wpe.weight', 'lm_head.weight')
        assert kinds[name] == ('vector' if p.dim() == 1 else 'embedding' if outer else 'matrix'), name


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_every_parameter_is_optimized_once_and_vectors_do_not_decay(optimizer):
    state = load(trained(optimizer=optimizer, tie=False, max_iters=5, weight_decay=0.3))
    shapes = {0.0: [], 0.3: []}
    for opt in state['optimizers']:
        for group in opt['param_groups']:
            for name in group['names']:
                momentum = opt['state'][name].get('exp_avg', opt['state'][name].get('momentum_buffer'))
                assert momentum.shape == state['model'][name].shape
                shapes[group['weight_decay']].append(tuple(momentum.shape))
    weights = [tuple(w.shape) for w in state['model'].values()]
    assert sorted(shapes[0.0]) == sorted(s for s in weights if len(s) == 1)
    assert sorted(shapes[0.3]) == sorted(s for s in weights if len(s) == 2)
    if optimizer == 'muon':
        muon = [tuple(m['momentum_buffer'].shape) for m in state['optimizers'][0]['state'].values()]
        assert sorted(muon) == sorted(2 * [(96, 32), (32, 32), (128, 32), (32, 128)])


def test_weight_decay_shrinks_matrices_alone():
    """With the gradient clipped to nothing, a step multiplies matrices by 1 - rate * decay, vectors by 1."""
    settings = dict(max_iters=20, grad_clip=1e-20, decay_lr=False, warmup_iters=0, learning_rate=0.01)
    still = load(trained(weight_decay=0.0, **settings))['model']
    decayed = load(trained(weight_decay=1.0, **settings))['model']
    for name, weight in still.items():
        factor = 1.0 if weight.dim() == 1 else 0.99 ** 20
        torch.testing.assert_close(decayed[name], factor * weight, rtol=1e-3, atol=1e-6, msg=name)


# ----------------------------------------------------------------------------------------------------------
# Compilation


def test_compile_equals_eager(tmp_path):
    """The graphs are traced, forward and backward, but run by PyTorch: C++ would take a minute to compile."""
    settings = dict(max_iters=4, n_layer=1, log_interval=2, eval_interval=2, eval_tokens=11 * 32)
    done = python('train.py', *toy(tmp_path / 'run', compile=True, **settings), before='''
import torch
torch_compile = torch.compile
def compile(what, mode=None):
    return torch_compile(what, backend='aot_eager' if isinstance(what, torch.nn.Module) else 'eager')
torch.compile = compile''')
    assert done.code == 0 and ', compiled' in done.out, done
    eager = trained(**settings)
    for key in ('train_loss', 'val_loss'):
        assert losses(tmp_path / 'run', key) == pytest.approx(losses(eager, key), rel=1e-4)
    # a compiled model's names have a prefix that a checkpoint must not
    assert load(tmp_path / 'run')['model'].keys() == load(eager)['model'].keys()


def test_the_mode_of_compilation_reaches_the_compiler(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda what, mode: calls.append(mode) or what)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=61))
    mode = 'max-autotune-no-cudagraphs'
    assert parallel.wrap(model, 'float32', False, False, False) == (model, model) and calls == []
    parallel.wrap(model, 'float32', mode, False, False)
    assert calls == [mode]
    parallel.wrap(model, 'float32', mode, True, False)
    assert calls == [mode] * 3, 'the model, and then each of its two blocks'


@pytest.mark.parametrize('flags, settings, device, compiled, words', [
    (dict(norm='rmsnorm'), dict(), 'cpu', True, ['compiled', '1.1e+14 FLOPs']),
    (dict(norm='rmsnorm'), dict(max_iters=10), 'cpu', False, ['eager', 'FLOPs']),
    (dict(), dict(), 'cpu', False, ['eager', 'narrow']),
    (dict(norm='rmsnorm', dropout=0.1), dict(), 'cpu', False, ['eager', 'dropout']),
    (dict(n_embd=512), dict(), 'cpu', True, ['compiled']),
    (dict(norm='rmsnorm'), dict(eval_only=True), 'cpu', False, ['eager', 'evaluation']),
    (dict(norm='rmsnorm'), dict(world=2), 'cpu', False, ['eager', 'processes']),
    (dict(norm='rmsnorm'), dict(before=False), 'cpu', False, ['eager', 'so far']),
    (dict(norm='rmsnorm'), dict(before=True, max_iters=10), 'cpu', True, ['compiled', 'so far']),
    (dict(norm='rmsnorm'), dict(compile=False), 'cpu', False, []),
    (dict(), dict(compile=True, max_iters=10), 'cpu', True, []),
    (dict(), dict(max_iters=10), 'cuda', True, []), (dict(norm='rmsnorm'), dict(), 'mps', False, []),
])
def test_a_long_run_on_a_cpu_compiles(flags, settings, device, compiled, words):
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64) | flags))
    flops = 8 * 4 * 32 * model.flops_per_token(32)
    s = dict(compile=None, eval_only=False, max_iters=int(1.1e14 / flops), batch_size=8,
             gradient_accumulation_steps=4, world=1, before=None, context_parallel=False) | settings
    choice, why = rules.choose_compile(s, model, device, s.pop('world'), s.pop('before'))
    assert choice is compiled and bool(why) == bool(words) and all(word in why for word in words)


def test_readme_s_first_run_is_eager_and_a_long_one_compiles():
    """config/tiny.py takes minutes, of which compiling would be one or two."""
    sizes = runpy.run_path(ROOT / 'config/llama_small.py') | runpy.run_path(ROOT / 'config/tiny.py')
    flags = {name: value for name, value in sizes.items() if name in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**flags | {'vocab_size': 2048}))
    for steps, compiled in (sizes['max_iters'], False), (4 * sizes['max_iters'], True):
        s = sizes | {'max_iters': steps, 'compile': None, 'eval_only': False, 'context_parallel': False}
        assert rules.choose_compile(s, model, 'cpu', 1)[0] is compiled, steps


FAKE_COMPILER = '''
import torch
from nanoblocks.training import settings
torch.compile = lambda what, **more: what
'''


def test_a_resumed_run_compiles_if_the_run_did(tmp_path):
    """Killed, and whatever is left: the bits depend on it. Old checkpoints do not say, and were eager."""
    settings = dict(norm='rmsnorm', max_iters=20, eval_interval=10, log_interval=5)
    long = FAKE_COMPILER + 'settings.PAYS_AFTER = 1e6\n'
    done = python('train.py', *toy(tmp_path / 'whole', **settings), before=long)
    assert ', compiled\n' in done.out and 'compile   compiled, which takes' in done.out, done
    part = toy(tmp_path / 'part', **settings)
    done = python('train.py', *part, before=long + at_step(15, EXIT))
    assert done.code == 9, done
    again = dict(init_from='resume', out_dir=tmp_path / 'part')
    done = python('train.py', *flags(**again), before=FAKE_COMPILER)
    assert done.code == 0 and 'compile   compiled, as the run was so far' in done.out, done
    assert_same_run(tmp_path / 'part', tmp_path / 'whole')
    # and one that began eagerly stays so, however long it becomes
    done = python('train.py', *toy(tmp_path / 'short', **settings), before=FAKE_COMPILER)
    assert ', eager\n' in done.out and 'compiling pays from 1e+14 on' in done.out
    for lost in False, True:
        if lost:
            state = load(tmp_path / 'short')
            del state['compiled']
            torch.save(state, tmp_path / 'short' / 'ckpt.pt')
        more = dict(out_dir=tmp_path / 'short', max_iters=40 + 20 * lost)
        done = python('train.py', *flags(**again | more), before=long)
        assert done.code == 0 and ', eager\n' in done.out and 'eager, as the run was so far' in done.out, done


def test_without_a_compiler_training_is_eager(tmp_path):
    env = {'PATH': tmp_path, 'CXX': tmp_path / 'no_compiler', 'TORCHINDUCTOR_CACHE_DIR': tmp_path / 'cache'}
    done = real_python('train.py', *toy(tmp_path / 'run', compile=True, max_iters=2), env=env)
    assert done.code == 0 and 'Traceback' not in done.err, done
    assert 'torch.compile does not work here' in done.out and ', eager\n' in done.out
    assert load(tmp_path / 'run')['step'] == 2


# ----------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('arg, words', [
    ('--n_layers=3', ['--n_layers', '--n_layer?']),
    ('config/llama_smal.py', ['config/llama_smal.py', 'config/llama_small.py']),
    ('--n_layer=two', ['--n_layer=two', 'int']),
    ('--learning_rate=fast', ['--learning_rate=fast', 'float']),
    ('--n_head=3', ['n_embd=32', 'n_head=3']),
    ('--n_layer=0', ['n_layer=0']),
    ('--block_size=0', ['block_size=0']),
    ('--dropout=1.0', ['dropout=1.0']),
    ('--dataset=never_prepared', ['never_prepared', 'python data/text/prepare.py', '--name=never_prepared']),
    ('--vocab_size=100', ['vocab_size=100', '257']),
    ('--block_size=100000', ['block_size=100000', 'train']),
    ('--block_size=4000', ['block_size=4000', 'val']),
    ('--device=cuda:99', ['device=cuda:99']),
    ('--device=gpu', ['device=gpu']),
    ('--init_from=resmue', ['init_from=resmue', 'scratch', 'resume']),
    ('--optimizer=adam', ['optimizer=adam', 'adamw', 'muon']),
    ('--schedule=sine', ['schedule=sine', 'cosine', 'linear', 'wsd', 'constant']),
    ('--dtype=fp16', ['dtype=fp16', 'float16']),
    ('--stream_dtype=bfloat16', ['stream_dtype=bfloat16', 'dtype=float32', '--dtype=bfloat16']),
    ('--stream_dtype=float16', ['stream_dtype=float16', 'float32', 'bfloat16']),
    ('--head_dtype=float8', ['head_dtype=float8', 'dtype=float32', '--dtype=bfloat16']),
    ('--head_dtype=fp8', ['head_dtype=fp8', 'auto', 'float8']),
    ('--compile_mode=max-autotune-no-cudagraphs', ['max-autotune-no-cudagraphs', '--compile=True']),
    ('--compile_mode=reduce-overhead', ['compile_mode=reduce-overhead', 'max-autotune-no-cudagraphs']),
    ('--batch_size=0', ['batch_size=0']),
    ('--batch_size=-8', ['batch_size=-8']),
    ('--gradient_accumulation_steps=0', ['gradient_accumulation_steps=0']),
    ('--max_iters=0', ['max_iters=0']),
    ('--max_iters=-1', ['max_iters=-1']),
    ('--log_interval=0', ['log_interval=0']),
    ('--eval_interval=0', ['eval_interval=0']),
    ('--eval_iters=0', ['eval_iters=0']),
    ('--eval_tokens=31', ['eval_tokens=31', '32']),
    ('--eval_tokens=0', ['eval_tokens=0']),
    ('--eval_tokens=-5', ['eval_tokens=-5']),
    ('--learning_rate=0', ['learning_rate=0']),
    ('--learning_rate=-0.1', ['learning_rate=-0.1']),
    ('--muon_lr=-0.1', ['muon_lr=-0.1']),
    ('--min_lr=0.1', ['min_lr=0.1', 'learning_rate=0.003']),
    ('--min_lr=-0.1', ['min_lr=-0.1']),
    ('--warmup_iters=-1', ['warmup_iters=-1']),
    ('--lr_decay_iters=0', ['lr_decay_iters=0']),
    ('--wsd_decay=-0.1', ['wsd_decay=-0.1']),
    ('--wsd_decay=1.5', ['wsd_decay=1.5']),
    ('--weight_decay=-0.1', ['weight_decay=-0.1']),
    ('--grad_clip=-1', ['grad_clip=-1']),
    ('--beta1=1.0', ['beta1=1.0']),
    ('--beta2=-0.5', ['beta2=-0.5']),
])
def test_bad_input_is_refused_in_a_sentence(arg, words, tmp_path):
    done = python('train.py', *toy(tmp_path / 'run'), arg)
    assert_refused(done, *words)
    assert not (tmp_path / 'run').exists()


def test_refusals_are_the_same_in_a_process_of_their_own(tmp_path):
    assert_refused(real_python('train.py', *toy(tmp_path / 'run'), '--n_head=3'), 'n_embd=32', 'n_head=3')
    assert not (tmp_path / 'run').exists()


def test_dataset_that_has_a_script_names_it(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'prepare.py').write_text('raise SystemExit(1)')
    done = python('train.py', *toy(tmp_path / 'run', dataset=tmp_path / 'mine'))
    assert_refused(done, 'python data/mine/prepare.py')


def test_a_preparation_that_fails_is_no_traceback(tmp_path):
    """pysource needs no network, so the first run prepares it; here that goes wrong."""
    (tmp_path / 'pysource').mkdir()
    (tmp_path / 'pysource' / 'prepare.py').write_text('raise SystemExit("no sources on this machine")')
    done = python('train.py', *toy(tmp_path / 'run', dataset=tmp_path / 'pysource'))
    assert done.code == 1 and 'Traceback' not in done.err, done.err
    assert 'no sources on this machine' in done.err and 'pysource' in done.err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_truncated_dataset_is_refused(tmp_path, name):
    folder = tmp_path / 'cut'
    shutil.copytree(dataset(), folder)
    os.truncate(folder / name, (folder / name).stat().st_size - 2)
    done = python('train.py', *toy(tmp_path / 'run', dataset=folder))
    assert_refused(done, str(folder / name), 'again')
    assert not (tmp_path / 'run').exists()


def test_out_dir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / 'file').write_text('mine')
    for out_dir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        assert_refused(python('train.py', *toy(out_dir)), str(out_dir))
    assert (tmp_path / 'file').read_text() == 'mine'


def test_wandb_that_is_missing_is_refused_before_anything_is_lost(run_copy):
    before = files(run_copy)
    done = python('train.py', *toy(run_copy, overwrite=True, wandb_log=True), before='''
import sys
sys.modules['wandb'] = None''')
    assert_refused(done, 'wandb', 'pip install wandb')
    assert files(run_copy) == before


def test_a_wandb_that_is_only_a_folder_is_refused(tmp_path):
    """Runs of W&B leave a folder wandb/, which Python takes for a package without files."""
    (tmp_path / 'wandb').mkdir()
    done = python('train.py', *toy(tmp_path / 'run', wandb_log=True), before=f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: find(
    name, [{str(tmp_path)!r}] if name == 'wandb' and path is None else path, target))""")
    assert_refused(done, 'wandb', 'pip install wandb')


@pytest.mark.parametrize('settings, line', [
    (dict(optimizer='adamw', muon_lr=0.1), '--muon_lr has no effect with optimizer=adamw'),
    (dict(optimizer='muon', muon_lr=0.1), ''),
    (dict(decay_lr=False, schedule='wsd', min_lr=0),
     '--schedule --min_lr have no effect with decay_lr=False'),
    (dict(schedule='constant', min_lr=0), '--min_lr has no effect with schedule=constant'),
    (dict(schedule='linear', wsd_decay=0.1), '--wsd_decay has no effect with schedule=linear'),
    (dict(schedule='wsd', wsd_decay=0.1), ''),
    (dict(eval_tokens=320, eval_iters=7), '--eval_iters has no effect with eval_tokens=320'),
    (dict(batch_tokens=256, gradient_accumulation_steps=7),
     '--gradient_accumulation_steps has no effect with batch_tokens=256'),
    (dict(wandb_project='x'), '--wandb_project has no effect with wandb_log=False'),
    (dict(backend='gloo'), '--backend has no effect in one process')])
def test_flags_without_effect_are_said(settings, line):
    """Those of the command line: a file may set them for other runs."""
    given = {name: f'--{name}' for name in settings}
    defaults = {name: setting.default for name, setting in settings_of(ROOT / 'train.py').items()}
    found = rules.unread(defaults | settings, world=1)
    for by, shown in (given, line and f'warning: {line}\n'), (dict.fromkeys(given, 'config/a.py'), ''):
        with redirect_stderr(io.StringIO()) as err:
            warn_of_unread(by, found)
        assert err.getvalue() == shown


def test_a_run_says_which_flags_have_no_effect(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', max_iters=1, muon_lr=0.1))
    assert done.code == 0 and '--muon_lr has no effect with optimizer=adamw\n' in done.err, done


def test_warmup_longer_than_the_run_is_said(tmp_path):
    """nanoGPT's command lines cut short by --max_iters must run, but the rate never gets where it was set."""
    out = train(tmp_path / 'run', max_iters=10, warmup_iters=100)[1]
    assert '; set --warmup_iters=1\n' in out
    assert 'warning' not in train(tmp_path / 'other', max_iters=10, warmup_iters=1)[1]
    assert metrics(tmp_path / 'run')[-1]['lr'] == pytest.approx(3e-3 * 10 / 101, rel=1e-9)
    assert 'warmup_iters=' not in first_run()[1]


# ----------------------------------------------------------------------------------------------------------
# nanoGPT's command lines

CUT = ['--max_iters=2', '--eval_interval=2', '--eval_iters=2']


@pytest.mark.parametrize('line', [
    'config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 '
    '--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 '
    '--lr_decay_iters=2000 --dropout=0.0',
    'config/train_shakespeare_char.py --n_layer=2 --n_embd=48 --block_size=32 --batch_size=4 --device=cpu',
    'config/train_gpt2.py --batch_size=2 --gradient_accumulation_steps=2 --compile=False --device=cpu '
    '--wandb_log=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --vocab_size=304',
    '--batch_size=2 --compile=False --device=cpu --eval_only=True --n_layer=2 --n_head=2 --n_embd=32 '
    '--block_size=32',
])
def test_command_lines_of_nanogpt_run(line, tmp_path):
    data = dataset('chars' if 'shakespeare' in line else 'bytes')
    done = python('train.py', *line.split(), f'--dataset={data}', f'--out_dir={tmp_path / "out"}', *CUT)
    assert done.code == 0 and not done.err, done
    if 'eval_only' in line:
        assert not (tmp_path / 'out').exists()
    else:
        assert load(tmp_path / 'out')['step'] == 2


@pytest.mark.parametrize('device, world, local_rank, own', [
    # torch.cuda.set_device refuses a device without a number
    ('cuda', 1, 0, 'cuda:0'), ('cuda', 2, 1, 'cuda:1'), ('cuda:0', 2, 1, 'cuda:1'),
    ('cuda:3', 1, 0, 'cuda:3'), ('cpu', 2, 1, 'cpu'), ('mps', 1, 0, 'mps')])
def test_a_process_has_a_gpu_by_its_number(device, world, local_rank, own):
    assert hardware.device_of_process(device, world, local_rank) == own
