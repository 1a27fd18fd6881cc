"""
Nothing is lost: runs are killed anywhere, checkpoints and data damaged, disks filled, signals sent, numbers
made infinite. Afterwards the run is resumed, and ends in the same bits as an undisturbed one.

Runs that are to be hit hit themselves, with real signals: so each is hit in a place that is known.
"""
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from runs import (
    ENV,
    KILL,
    ROOT,
    WRITTEN,
    assert_refused,
    assert_same_run,
    at_step,
    dataset,
    differences,
    files,
    flags,
    load,
    losses,
    metrics,
    python,
    real_python,
    resume,
    run_copy,
    toy,
    train,
    train_settings,
    trained,
)

from model import GPT, GPTConfig
from nanoblocks.files import Lock
from nanoblocks.training import checkpoint, debug, stopping
from nanoblocks.training.logbook import Logbook
from nanoblocks.training.run_folder import RunFolder
from nanoblocks.training.saving import Saver

# ----------------------------------------------------------------------------------------------------------
# Killed


KILL_AT_EVENT = '''
import os, sys
left = {}
def event(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
sys.setprofile(event)'''
COUNT_EVENTS = '''
import sys
count = 0
def event(*args):
    global count
    count += 1
    if count % 1000 == 0:
        open({!r}, 'w').write(str(count))
sys.setprofile(event)'''


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """
    A moment is a call or a return of any function, of Python or C: in a step, an evaluation, while a
    checkpoint is written, renamed, or read. A run that is started often enough gets to its end.
    """
    settings = dict(max_iters=40, log_interval=3, eval_interval=8, eval_tokens=256, dropout=0.1, n_layer=1,
                    optimizer='muon', ema=0.9)
    whole, rng, kills, steps = trained(**settings), random.Random(0), 0, set()
    count = COUNT_EVENTS.format(str(tmp_path / 'n'))
    python('train.py', *toy(tmp_path / 'counted', **settings), before=count)
    events = int((tmp_path / 'n').read_text())
    for _ in range(200):
        before = KILL_AT_EVENT.format(rng.randrange(1_000, events)) if kills < 20 else ''
        done = python('train.py', *toy(tmp_path / 'run', init_from='auto', **settings), before=before)
        assert done.code in (0, -9), done
        kills += done.code == -9
        if (tmp_path / 'run' / 'ckpt.pt').exists():
            steps.add(load(tmp_path / 'run')['step'])
        if done.code == 0 and kills < 20:
            shutil.rmtree(tmp_path / 'run')
        elif done.code == 0:
            break
    assert kills == 20 and len(steps) > 3, (kills, steps)
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('seed', range(3))
def test_a_kill_in_the_middle_of_writing_a_checkpoint_changes_nothing(tmp_path, seed):
    """At a random byte: the system kills a process whose file grows beyond a limit."""
    settings = dict(log_interval=1)
    size = (trained(**settings) / 'ckpt.pt').stat().st_size
    byte = random.Random(seed).randrange(50_000, size)
    done = python('train.py', *toy(tmp_path / 'run', **settings), before=at_step(25, WRITTEN + f'''
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({byte}, {byte}))''') + at_step(41, WRITTEN))
    assert done.code == -signal.SIGXFSZ
    part, = (tmp_path / 'run').glob('*.part')
    assert part.stat().st_size <= byte and load(tmp_path / 'run')['step'] == 20
    assert metrics(tmp_path / 'run')[-1]['step'] == 40
    resume(tmp_path / 'run')
    assert not list((tmp_path / 'run').glob('*.part'))
    assert_same_run(tmp_path / 'run', trained(**settings))


def test_auto_starts_a_new_run_or_resumes(tmp_path):
    settings = dict(init_from='auto', max_iters=20)
    assert 'resuming' not in train(tmp_path / 'run', **settings)[1]
    assert 'resuming at step 20' in train(tmp_path / 'run', init_from='auto', max_iters=40)[1]
    # killed before its first checkpoint, it leaves no more than this
    os.remove(tmp_path / 'run' / 'ckpt.pt'), os.remove(tmp_path / 'run' / 'ckpt.prev.pt')
    assert 'resuming' not in train(tmp_path / 'run', **settings)[1]
    assert [line['step'] for line in metrics(tmp_path / 'run')] == [0, 5, 10, 15, 20, 20]


def test_compiled_training_resumes_bit_by_bit(tmp_path):
    """With the real compiler and two threads, which could otherwise add in any order."""
    settings = dict(compile=True, n_layer=1, max_iters=12, log_interval=1, eval_interval=6, eval_tokens=256,
                    lr_decay_iters=12, norm='rmsnorm', pos='none', ffn='relu2', bias=False)
    # the second and third process find in the cache what the first has compiled
    env = ENV | {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), 'TORCHINDUCTOR_COMPILE_THREADS': '1',
                 'OMP_NUM_THREADS': '2'}

    def run(*args):
        done = subprocess.run([sys.executable, 'train.py', *args], cwd=ROOT, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 0, done
        return done.stdout
    out = run(*toy(tmp_path / 'whole', **settings))
    assert ', compiled\n' in out and re.search(r'compiled +in ', out)
    run(*toy(tmp_path / 'parts', **settings | {'max_iters': 6}))
    run(*flags(init_from='resume', out_dir=tmp_path / 'parts', max_iters=12))
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


# ----------------------------------------------------------------------------------------------------------
# Damaged


def broken_save(monkeypatch, how):
    """Make checkpoint.save fail like a full disk, while writing, on flushing or at the end."""
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    def half(state, f):
        f.write(b'half of a checkpoint')
        full()

    if how == 'while writing':
        monkeypatch.setattr(torch, 'save', half)
    else:
        monkeypatch.setattr(os, {'at the end': 'replace', 'on flushing': 'fsync'}[how], full)


@pytest.mark.parametrize('how', ['while writing', 'on flushing', 'at the end'])
def test_a_failed_write_leaves_the_old_checkpoint(monkeypatch, tmp_path, how):
    path = str(tmp_path / 'ckpt.pt')
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5))
    old, new = (checkpoint.contents(model, settings={}, meta={}, step=step) for step in (1, 2))
    checkpoint.save(path, old)
    with monkeypatch.context() as patch:
        broken_save(patch, how)
        with pytest.raises(OSError, match='No space'):
            checkpoint.save(path, new)
    assert checkpoint.load(path)['step'] == 1
    checkpoint.save(path, new)
    assert checkpoint.load(path)['step'] == 2


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='the names of open files are read from it')
def test_what_a_checkpoint_needs_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    """After a power cut, ckpt.pt has all its bytes, and metrics.jsonl the lines of its steps."""
    fsync, replace, done = os.fsync, os.replace, []

    def recorded_fsync(fd):
        done.append('fsync ' + os.path.basename(os.readlink(f'/proc/self/fd/{fd}')))
        fsync(fd)

    def recorded_replace(source, target):
        done.append('name ' + os.path.basename(target))
        replace(source, target)

    folder = RunFolder(tmp_path / 'run')
    folder.create()
    log = Logbook(folder, False, 0, 10)
    monkeypatch.setattr(os, 'fsync', recorded_fsync)
    monkeypatch.setattr(os, 'replace', recorded_replace)
    saver = Saver(folder, log, train_settings())
    for step in (1, 2):
        log.record({'step': step})
        assert saver.save({folder.newest: {'step': step}})
        saver.collect(wait=True)
    first = ['fsync metrics.jsonl', 'fsync ckpt.pt.part', 'name ckpt.pt', 'fsync run']
    assert done == [*first, *first[:2], 'name ckpt.prev.pt', *first[2:]]


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def small_checkpoint(path):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=50))
    state = checkpoint.contents(model, settings={'seed': 1}, meta={'vocab_size': 50}, step=7)
    checkpoint.save(str(path), state)
    return state


def sealed_as_before(data):
    """The bytes of a checkpoint with the seal that older versions wrote: SHA-256 of all bytes before it."""
    data = data[:-73] + bytes(2)
    return data[:-2] + (71).to_bytes(2, 'little') + b'sha256:' + hashlib.sha256(data).hexdigest().encode()


@pytest.mark.parametrize('sealed', [bytes, sealed_as_before])
def test_no_flipped_bit_goes_unseen(tmp_path, sealed):
    """For every bit: the checkpoint is refused, or loads with the values that were written."""
    path = tmp_path / 'ckpt.pt'
    state = small_checkpoint(path)
    path.write_bytes(sealed(path.read_bytes()))
    assert not differences(checkpoint.load(str(path)), state)
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for bit in rng.sample(range(8 * len(data)), 300):
        path.write_bytes(flipped(data, bit))
        try:
            assert not differences(checkpoint.load(str(path)), state), f'bit {bit}'
        except checkpoint.Damaged:
            refused += 1
    assert refused > 250, 'only the seal itself may be hit'


def test_the_seal_is_its_definition(tmp_path):
    """Of pieces of 1 MiB, however the bytes come: of many pieces, of one that is just full, of none."""
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), {'x': torch.arange(700_000)})
    data = path.read_bytes()

    def defined(data):
        crcs = [zlib.crc32(data[at:at + 2**20]) for at in range(0, len(data), 2**20)]
        return hashlib.sha256(b''.join(crc.to_bytes(4, 'little') for crc in crcs)).hexdigest()
    seal = defined(data[:-73] + bytes(2))
    assert data[-73:] == (71).to_bytes(2, 'little') + b'crc32s:' + seal.encode()
    for size in (0, 1, 2**20, 2**20 + 1, 2**22):
        parts = checkpoint.Checksum()
        for at in range(0, size, 99_991):
            parts.update(memoryview(data)[at:min(size, at + 99_991)])
        assert parts.hexdigest() == defined(data[:size])


def test_a_checkpoint_is_hashed_once(tmp_path, monkeypatch):
    """torch.save computes checksums of its own unless it is told not to, and for others it goes on to."""
    save, options = torch.save, torch.serialization.get_crc32_options
    monkeypatch.setattr(torch, 'save', lambda *args: save(*args) if not options() else pytest.fail('twice'))
    small_checkpoint(tmp_path / 'ckpt.pt')
    assert options()


def test_no_truncation_goes_unseen(run_copy):
    data, rng = (run_copy / 'ckpt.pt').read_bytes(), random.Random(0)
    for size in [0, 1, len(data) - 1, *rng.sample(range(len(data)), 20)]:
        (run_copy / 'ckpt.pt').write_bytes(data[:size])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.load(str(run_copy / 'ckpt.pt'))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage(path, kind):
    """Replace a checkpoint by a damaged one."""
    data = path.read_bytes()
    if kind == 'missing':
        path.unlink()
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'truncated':
        path.write_bytes(data[:len(data) // 2])
    elif kind == 'one byte short':
        path.write_bytes(data[:-1])
    elif kind == 'garbage':
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == 'text':
        path.write_text('version https://git-lfs.github.com/spec/v1\n')
    elif kind == 'a list':
        torch.save([1, 2], path)
    elif kind == 'another script':
        torch.save({'state_dict': {}}, path)
    elif kind == 'pickle':
        path.write_bytes(pickle.dumps(Bomb(path.parent / 'bomb')))
    elif kind == 'code inside':
        torch.save(torch.load(path, weights_only=True) | {'step': Bomb(path.parent / 'bomb')}, path)
    else:
        state = torch.load(path, weights_only=True)
        if kind == 'weights of another model':
            state['config']['n_layer'] = 3
        elif kind == 'weights of another size':
            state['config']['n_embd'] = 64
        elif kind == 'flags of the future':
            state['config']['flux'] = 1.21
        elif kind == 'flags that cannot be':
            state['config']['n_head'] = 5
        elif kind == 'weights lost':
            del state['model']['ln_f.weight']
        torch.save(state, path)


DAMAGES = ['missing', 'empty', 'truncated', 'one byte short', 'garbage', 'text', 'a list', 'another script',
           'pickle', 'code inside', 'weights of another model', 'weights of another size',
           'flags of the future', 'flags that cannot be', 'weights lost']


DAMAGED = DAMAGES[:6] + ['pickle', 'code inside']


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_copy, kind):
    damage(run_copy / 'ckpt.pt', kind)
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy))
    assert done.code == 0 and 'resuming at step 40' in done.out, done
    warning = done.err.strip().splitlines()
    assert len(warning) == 2 and str(run_copy / 'ckpt.pt') in warning[0] and 'ckpt.prev.pt' in warning[1]
    assert 'weights_only' not in done.err, 'the user must not be told to run the code in the file'
    assert not (run_copy / 'bomb').exists()
    assert_same_run(run_copy, trained())


def test_after_a_fallback_a_kill_still_leaves_a_good_checkpoint(run_copy):
    """A save must not move the damaged checkpoint over the only good one."""
    damage(run_copy / 'ckpt.pt', 'truncated')
    kill = '''
import os
from nanoblocks.training import checkpoint
checkpoint.save = lambda *args, **kwargs: os.kill(os.getpid(), 9)'''
    assert python('train.py', *flags(init_from='resume', out_dir=run_copy), before=kill).code == -9
    assert load(run_copy)['step'] == 40
    resume(run_copy)
    assert_same_run(run_copy, trained())


@pytest.mark.parametrize('kind', DAMAGES)
def test_resume_refuses_a_checkpoint_it_cannot_use(run_copy, kind):
    damage(run_copy / 'ckpt.pt', kind)
    if kind in DAMAGED:
        damage(run_copy / 'ckpt.prev.pt', 'truncated')
    before = files(run_copy)
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80))
    assert_refused(done, 'n_head' if kind == 'flags that cannot be' else str(run_copy / 'ckpt.pt'))
    assert files(run_copy) == before
    assert not (run_copy / 'bomb').exists()


def test_resume_refuses_a_checkpoint_that_is_only_for_sampling(run_copy):
    shutil.copy(run_copy / 'best.pt', run_copy / 'ckpt.pt')
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80))
    assert_refused(done, str(run_copy / 'ckpt.pt'))


def test_a_flipped_bit_in_the_data_is_refused(tmp_path):
    shutil.copytree(dataset(), tmp_path / 'data')
    path = tmp_path / 'data' / 'train.bin'
    path.write_bytes(flipped(path.read_bytes(), 12345))
    args = toy(tmp_path / 'run', dataset=tmp_path / 'data', max_iters=5)
    assert_refused(python('train.py', *args), str(path), 'again')
    assert python('train.py', *args, '--check_data=False').code == 0


def test_a_moved_dataset_is_the_same(tmp_path):
    """A dataset is identified by the contents of meta.json."""
    shutil.copytree(dataset(), tmp_path / 'a')
    run, _ = train(tmp_path / 'run', dataset=tmp_path / 'a', max_iters=40)
    shutil.move(tmp_path / 'a', tmp_path / 'b')
    done = python('train.py', *flags(init_from='resume', out_dir=run, max_iters=60))
    assert_refused(done, str(tmp_path / 'a'))
    resume(run, dataset=tmp_path / 'b', max_iters=60)
    assert_same_run(run, trained())


# ----------------------------------------------------------------------------------------------------------
# A full disk


def test_a_full_disk_costs_nothing_but_the_checkpoints_that_it_refused(tmp_path):
    """From step 25 to 46 no file may grow beyond 60 kB, so the checkpoints of step 40 and 45 fail."""
    before = at_step(25, WRITTEN + '''
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))''') + at_step(41, WRITTEN) + at_step(
        47, WRITTEN + '''
        import resource, shutil
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        shutil.copy({!r}, {!r})'''.format(str(tmp_path / 'run' / 'ckpt.pt'), str(tmp_path / 'meanwhile.pt')))
    done = python('train.py', *toy(tmp_path / 'run', log_interval=5), before=before)
    assert done.code == 0 and 'ckpt.pt could not be written (File too large)' in done.out, done
    assert done.out.count('will try again') == 3  # best.pt and ckpt.pt at step 40, ckpt.pt at step 45
    assert torch.load(tmp_path / 'meanwhile.pt', weights_only=True)['step'] == 20
    # step 50 is a log step, step 46 the one after the last that failed
    assert re.search('step 5[01]: saved', done.out), done.out
    assert_same_run(tmp_path / 'run', trained())


def test_a_small_disk_that_is_really_full(tmp_path):
    """metrics.jsonl has no room either: its lines are kept in memory and written later."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('this user may not mount a tmpfs')
    try:
        fill, empty = (at_step(step, action) for step, action in (
            (25, WRITTEN + f'''
        with open('{disk}/other', 'wb', buffering=0) as f:
            while True:
                try:
                    f.write(bytes(4096))
                except OSError:
                    break'''), (52, WRITTEN + f'''
        kept = open('{disk}/run/metrics.jsonl').read()
        open('{tmp_path}/meanwhile', 'w').write(kept)
        os.remove('{disk}/other')''')))
        done = python('train.py', *toy(disk / 'run', log_interval=1), before=fill + empty)
        assert done.code == 0 and 'could not be written (No space left on device)' in done.out, done
        kept = (tmp_path / 'meanwhile').read_text()
        assert kept.endswith('\n') and json.loads(kept.splitlines()[-1])['step'] < 51
        assert 'saved' in done.out
        assert_same_run(disk / 'run', trained(log_interval=1))
    finally:
        subprocess.run(['umount', disk])


# ----------------------------------------------------------------------------------------------------------
# Signals


def hit(number):
    return f'os.kill(os.getpid(), {number})'


MICRO = dict(gradient_accumulation_steps=4, batch_size=2, log_interval=3)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_within_a_micro_batch(tmp_path, number):
    """The 98th micro-batch is the second of step 25, which the resumed run repeats; a 99th is never read."""
    count = at_step(99, "print('one more')")
    done = python('train.py', *toy(tmp_path / 'run', **MICRO), before=at_step(98, hit(number)) + count)
    assert done.code == stopping.STOPPED and not done.err, done
    assert f'stopped by signal {number} after step 24' in done.out and 'one more' not in done.out
    assert load(tmp_path / 'run')['step'] == 24 and metrics(tmp_path / 'run')[-1]['step'] == 24
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(**MICRO))


IN_EVALUATION = '''
import os, data.loader
get, calls = data.loader.Dataset.eval_batches, []
def eval_batches(self, *args, **kwargs):
    for number, batch in enumerate(get(self, *args, **kwargs)):
        calls.append(number)
        if len(calls) == 2 * 8 + 3:
            os.kill(os.getpid(), 15)
            print('after the signal')
        yield batch
data.loader.Dataset.eval_batches = eval_batches'''


def test_a_signal_in_an_evaluation_saves_and_leaves_at_once(tmp_path):
    """In the evaluation after step 40, which the resumed run repeats."""
    done = python('train.py', *toy(tmp_path / 'run', ema=0.9), before=IN_EVALUATION)
    assert done.code == stopping.STOPPED and 'after the signal' not in done.out, done
    state = load(tmp_path / 'run')
    assert (state['step'], state['evaluated']) == (40, 20)
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(ema=0.9))


IN_SWAP = '''
import os
from nanoblocks.training import optim
local, swap, calls, swaps = optim.local, optim.Average.swap, [], []
def hit(x):
    calls.append(x)
    if len(calls) == 5:
        os.kill(os.getpid(), 15)
    return local(x)
def hit_swap(self):
    swaps.append(1)
    optim.local = hit if len(swaps) == 3 else local  # in the second evaluation
    swap(self)
    optim.local = local
optim.Average.swap = hit_swap'''


def test_a_signal_waits_until_the_averaged_weights_are_in_place(tmp_path):
    """Otherwise the checkpoint would mix averaged weights with others."""
    done = python('train.py', *toy(tmp_path / 'run', ema=0.9), before=IN_SWAP)
    assert done.code == stopping.STOPPED and load(tmp_path / 'run')['step'] == 20, done
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(ema=0.9))


IN_COMPILATION = '''
import os, signal, torch
torch_compile = torch.compile
def compiler(graph, inputs):
    os.kill(os.getpid(), 15)
    signal.pause()  # a compilation without an end
def compile(what, mode=None):
    return torch_compile(what, backend=compiler if isinstance(what, torch.nn.Module) else 'eager')
torch.compile = compile'''


def test_a_signal_in_a_compilation_saves_and_leaves_at_once(tmp_path):
    train(tmp_path / 'run', max_iters=20)
    more = flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=60, compile=True)
    done = python('train.py', *more, before=IN_COMPILATION)
    assert done.code == stopping.STOPPED and not done.err, done
    assert load(tmp_path / 'run')['step'] == 20
    resume(tmp_path / 'run', compile=False)
    assert_same_run(tmp_path / 'run', trained())


def test_a_signal_while_saving_waits_for_it_and_a_second_one_does_not(tmp_path):
    """After one signal the checkpoint is complete; after two, the one before it is still there."""
    while_saving = '''
import gc, os, time, torch
from nanoblocks.training.stopping import Signals
save = torch.save
hits = [15] * {0}
def hit(state, f):
    while hits:
        os.kill(os.getpid(), hits.pop())
        # in the thread, while the main one answers, which a second signal ends
        while not any(isinstance(found, Signals) and found.number for found in gc.get_objects()):
            time.sleep(0.1)
        if not hits and {0} == 2:
            time.sleep(60)
    save(state, f)
torch.save = hit'''
    done = python('train.py', *toy(tmp_path / 'run'), before=while_saving.format(1))
    assert done.code == stopping.STOPPED, done
    stopped = load(tmp_path / 'run')['step']
    assert stopped >= 20
    again = flags(init_from='resume', out_dir=tmp_path / 'run', save_interval=1)
    done = python('train.py', *again, before=while_saving.format(2))
    assert done.code == 128 + signal.SIGTERM, done
    assert load(tmp_path / 'run')['step'] == stopped
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained())


def test_a_signal_in_an_update_waits_for_its_end(tmp_path):
    """The signal comes when the weights are updated and the number of steps is not."""
    done = python('train.py', *toy(tmp_path / 'run', ema=0.9), before='''
import os, model
balance, calls = model.GPT.balance_experts, []
def hit(self, *args):
    calls.append(1)
    if len(calls) == 25:
        os.kill(os.getpid(), 15)
    return balance(self, *args)
model.GPT.balance_experts = hit''')
    assert done.code == stopping.STOPPED and load(tmp_path / 'run')['step'] == 25, done
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(ema=0.9))


def test_sigusr1_saves_and_training_continues(tmp_path):
    keep = at_step(36, f"import shutil; shutil.copy('{tmp_path}/run/ckpt.pt', '{tmp_path}/then.pt')")
    args = toy(tmp_path / 'run', save_thread=False)
    done = python('train.py', *args, before=at_step(34, hit(signal.SIGUSR1)) + keep)
    assert done.code == 0 and 'step 34: saved' in done.out, done
    assert torch.load(tmp_path / 'then.pt', weights_only=True)['step'] == 34
    assert_same_run(tmp_path / 'run', trained())


def test_a_signal_from_outside(tmp_path):
    """To a separate process, as a scheduler sends it, once the run has printed its first step."""
    args = toy(tmp_path / 'run', max_iters=10**6, eval_interval=10**6)
    process = subprocess.Popen([sys.executable, 'train.py', *args], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith('step 5:'):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == stopping.STOPPED and not err
    assert load(tmp_path / 'run')['step'] >= 5
    assert '--init_from=resume' in out


def test_a_signal_that_cannot_be_obeyed_for_a_full_disk_says_so(run_copy):
    kept = (run_copy / 'ckpt.pt').read_bytes()
    before = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))''' + at_step(5, hit(signal.SIGTERM))
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80), before=before)
    assert done.code == stopping.NOT_SAVED and 'not saved' in done.out, done
    assert (run_copy / 'ckpt.pt').read_bytes() == kept


# ----------------------------------------------------------------------------------------------------------
# Numbers that go wrong


def poisoned(*steps, value='nan'):
    """The loss of these steps times a number, or plus infinity, which leaves gradients finite."""
    return f'''
import model, torch
nan, inf, losses, calls = torch.nan, torch.inf, model.GPT.losses, []
def bad(self, *args):
    parts = losses(self, *args)
    calls.append(self.training)
    if self.training and sum(calls) in {steps!r}:
        for name in ('loss', 'cross_entropy'):
            parts[name] = parts[name] + inf if {value} == inf else parts[name] * {value}
    return parts
model.GPT.losses = bad'''


@pytest.mark.parametrize('settings', [dict(), dict(optimizer='muon'), dict(dtype='float16'), dict(ema=0.9),
                                      dict(ffn_pattern='fe', n_expert=4, balance='bias')], ids=str)
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(tmp_path, settings, value):
    settings = dict(max_iters=30, lr_decay_iters=40, eval_interval=30) | settings
    done = python('train.py', *toy(tmp_path / 'run', **settings), before=poisoned(30, value=value))
    assert done.code == 0 and 'warning: 1 step skipped' in done.out, done
    bad, before = load(tmp_path / 'run'), load(trained(**settings | {'max_iters': 29}))
    assert not differences(bad['model'], before['model'])
    for one, two in zip(bad['optimizers'], before['optimizers']):
        assert not differences(one['state'], two['state'])
    assert metrics(tmp_path / 'run')[-2]['skipped'] == 1


def test_skipped_steps_are_counted_across_a_resume(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', max_iters=40), before=poisoned(3, 17, 18))
    assert done.code == 0
    python('train.py', *flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=60), before=poisoned(2))
    counts = [line['skipped'] for line in metrics(tmp_path / 'run') if 'skipped' in line]
    assert counts == [1] * 3 + [3] * 5 + [4] * 4
    assert all(np.isfinite(losses(tmp_path / 'run')))


def test_too_many_bad_steps_end_the_run_and_name_the_first_tensor(tmp_path):
    """The test makes the gradient of one weight infinite; ckpt.pt stays the one from before that."""
    before = '''
import torch, model
forward = model.MLP.forward
calls = []
def bad(self, x, ctx):
    y = forward(self, x, ctx)
    calls.append(self.training)
    return y / 0 if sum(calls) > 2 * 30 and calls[-1] else y
model.MLP.forward = bad'''
    settings = dict(bad_step_limit=4, eval_interval=25, log_interval=2)
    done = python('train.py', *toy(tmp_path / 'run', **settings), before=before)
    assert done.code == stopping.NOT_FINITE, done
    sentences = done.err.strip().splitlines()
    assert len(sentences) == 1 and 'the output of h.0.ffn was' in done.err and 'bad_step_limit=4' in done.err
    state = load(tmp_path / 'run')
    assert state['step'] == 25 and all(w.isfinite().all() for w in state['model'].values())
    assert metrics(tmp_path / 'run')[-1]['step'] == 34
    assert metrics(tmp_path / 'run')[-1]['train_loss'] is None


def test_the_first_tensor_that_is_not_finite_is_found():
    """It is a weight, an output of finite weights, or a gradient where all else is finite."""
    x = torch.arange(8).view(1, 8)

    def model():
        return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16, bias=False))

    def first(m):
        return debug.first_not_finite(m, (m(x, x)[1] for _ in range(1)))
    assert first(model()) is None
    bad = model()
    bad.h[1].mixer.c_proj.weight.data[0, 0] = torch.nan
    assert first(bad) == 'the weight h.1.mixer.c_proj.weight'
    bad = model()
    bad.h[1].ffn.c_fc.weight.data[:] = 3e38
    assert first(bad) == 'the output of h.1.ffn.c_fc'
    bad = model()
    bad.h[1].ffn.c_proj.weight.register_hook(lambda grad: grad * torch.inf)
    assert first(bad) == 'the gradient of h.1.ffn.c_proj.weight'


def test_a_loss_spike_is_said(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', log_interval=2),
                  before=poisoned(50, value='3'))
    assert done.code == 0
    assert re.findall(r'warning: the loss jumped to (\d)', done.out) == ['7'], done.out
    assert 'jumped' not in train(tmp_path / 'calm', log_interval=2)[1]

# ----------------------------------------------------------------------------------------------------------
# Signals before the loop and after it


def hit_where(tmp_path, module, number):
    """An environment in which a process gets a signal when it imports `module`."""
    (tmp_path / 'sitecustomize.py').write_text(f'''
import builtins, os
real, hit = builtins.__import__, []
def imported(name, *args, **kwargs):
    if name == {module!r} and not hit:
        hit.append(name)
        os.kill(os.getpid(), {int(number)})
    return real(name, *args, **kwargs)
builtins.__import__ = imported''')
    return {'PYTHONPATH': str(tmp_path)}


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGHUP, 75),
                                          (signal.SIGUSR1, 0)])
def test_a_signal_while_torch_is_imported_ends_or_changes_nothing(tmp_path, number, code):
    env = hit_where(tmp_path, 'torch', number)
    done = real_python('train.py', *toy(tmp_path / 'run', max_iters=2), env=env)
    assert done.code == code and not done.err, done
    assert (f'stopped by signal {number} before the first step' in done.out) == (code == 75)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_run_starts(tmp_path, number):
    before = f'''
import os
from nanoblocks.training import logbook
describe = logbook.describe_run
def hit(*args):
    os.kill(os.getpid(), {int(number)})
    describe(*args)
logbook.describe_run = hit'''
    done = python('train.py', *toy(tmp_path / 'run', max_iters=2), before=before)
    assert (done.code, done.err) == (0 if number == signal.SIGUSR1 else stopping.STOPPED, ''), done


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_the_run_closes_changes_nothing(tmp_path, number):
    before = f'''
import os
from nanoblocks.training.logbook import Logbook
close = Logbook.close
def hit(self, code):
    os.kill(os.getpid(), {int(number)})
    close(self, code)
Logbook.close = hit'''
    done = python('train.py', *toy(tmp_path / 'run'), before=before)
    assert (done.code, done.err) == (0, ''), done
    assert_same_run(tmp_path / 'run', trained())


def test_a_terminal_that_closes_saves_though_it_says_so_twice(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run'),
                  before=at_step(25, f'{hit(signal.SIGHUP)}; {hit(signal.SIGHUP)}'))
    assert done.code == stopping.STOPPED and load(tmp_path / 'run')['step'] == 24, done
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained())


def test_nohup_survives_its_terminal(tmp_path):
    before = 'import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)' + at_step(25, hit(signal.SIGHUP))
    assert python('train.py', *toy(tmp_path / 'run'), before=before).code == 0
    assert_same_run(tmp_path / 'run', trained())


def test_a_signal_ends_a_preparation_of_the_data_too(tmp_path):
    (tmp_path / 'pysource').mkdir()
    (tmp_path / 'pysource' / 'prepare.py').write_text(f'''
import os, signal, time
open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)''')
    done = python('train.py', *toy(tmp_path / 'run', dataset=tmp_path / 'pysource'))
    assert done.code == stopping.STOPPED and not done.err, done
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


# ----------------------------------------------------------------------------------------------------------
# The last checkpoint


IMPATIENT = '''
from nanoblocks.training.saving import Saver
Saver.waits = (0.1, 0.1)'''


@pytest.mark.parametrize('fault', [
    'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))',
    "os.rename({run!r}, {run!r} + '.moved')",
], ids=['full', 'gone'])
def test_a_last_checkpoint_that_cannot_be_written_is_no_success(tmp_path, fault):
    run = str(tmp_path / 'run')
    done = python('train.py', *toy(run), before=IMPATIENT + at_step(
        45, WRITTEN + ' ' * 8 + fault.format(run=run)))
    assert done.code == stopping.NOT_SAVED and 'done ' not in done.out, done
    assert 'tried again' in done.out and 'step 60: not saved' in done.out and '--init_from=resume' in done.out
    if fault[:2] == 'os':
        os.rename(run + '.moved', run)
    resume(tmp_path / 'run')  # as the message says
    assert_same_run(tmp_path / 'run', trained())


@pytest.mark.parametrize('name', ['ckpt.pt', 'best.pt'])
def test_a_last_checkpoint_is_tried_again_until_it_can_be_written(tmp_path, name):
    done = python('train.py', *toy(tmp_path / 'run'), before=IMPATIENT + f'''
from nanoblocks.training import checkpoint
save, calls = checkpoint.save, []
def fails_twice(path, state, previous=None):
    if state['step'] == 60 and path.endswith({name!r}):
        calls.append(path)
        if len(calls) < 3:
            raise OSError(28, 'No space left on device')
    save(path, state, previous)
checkpoint.save = fails_twice''')
    assert done.code == 0 and done.out.count('tried again') == 2, done
    assert_same_run(tmp_path / 'run', trained())


@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='needs the files of Linux')
def test_a_folder_that_cannot_be_flushed_is_no_failed_save(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run'), before='''
import errno, os, stat
flush = os.fsync
def fsync(fd):
    fd = fd if isinstance(fd, int) else fd.fileno()
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    flush(fd)
os.fsync = fsync''')
    assert done.code == 0 and 'could not be written' not in done.out, done
    assert_same_run(tmp_path / 'run', trained())


# ----------------------------------------------------------------------------------------------------------
# The console


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    """`train.py | head -1`: what is printed later goes nowhere."""
    process = subprocess.Popen([sys.executable, 'train.py', *toy(tmp_path / 'run')], cwd=ROOT, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert_same_run(tmp_path / 'run', trained())


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is always full')
def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path):
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, 'train.py', *toy(tmp_path / 'run')], cwd=ROOT, env=ENV,
                              stdout=full, stderr=full, timeout=60)
    assert done.returncode == 0
    assert_same_run(tmp_path / 'run', trained())


@pytest.mark.parametrize('script', ['train', 'bench', 'ablate', 'sample', 'prepare'])
@pytest.mark.parametrize('console', ['closed', 'full'])
def test_no_console_ends_a_script(tmp_path, script, console):
    """All streams closed at the start, as by `>&-`, or on a full disk."""
    if console == 'full' and not os.path.exists('/dev/full'):
        pytest.skip('a disk that is always full')
    (tmp_path / 'a.txt').write_text('hello there ' * 99)
    out = tmp_path / 'out'
    words = {'train': ['train.py', *toy(out, max_iters=2)],
             'bench': ['bench.py', 'cache', f'--figures={out}'],
             'sample': ['sample.py', f'--out_dir={trained()}', '--max_new_tokens=4', f'--out={out}'],
             'ablate': ['ablate.py', '--help'],
             'prepare': ['data/text/prepare.py', f'--input={tmp_path / "a.txt"}', '--tokenizer=bytes',
                         f'--out={out}']}[script]
    redirect = '<&- >&- 2>&-' if console == 'closed' else '> /dev/full 2> /dev/full'
    line = f'{shlex.join(map(str, [sys.executable, *words]))} {redirect}'
    done = subprocess.run(line, shell=True, cwd=ROOT, env=ENV, timeout=120)
    assert done.returncode == 0
    if script == 'train':
        assert [line['step'] for line in metrics(out)] == [0, 2, 2]
        assert_same_run(out, train(tmp_path / 'other', max_iters=2)[0])
    elif script != 'ablate':
        assert out.exists()


def test_a_console_without_a_character_does_not_end_the_run(tmp_path):
    run = tmp_path / 'läuft 漢'
    done = real_python('train.py', *toy(run), env={'PYTHONIOENCODING': 'ascii'})
    assert done.code == 0 and 'l\\xe4uft' in done.out, done
    assert_same_run(run, trained())


def test_too_little_memory_is_one_sentence(tmp_path):
    done = real_python('train.py', *toy(tmp_path / 'run', n_embd=2**20))
    assert_refused(done, 'out of memory', 'lower --batch_size')
    done = real_python('sample.py', f'--out_dir={trained(pos="rope")}', f'--max_new_tokens={2**45}')
    assert_refused(done, 'out of memory', 'lower')
    # what is left of the failed start keeps nobody from the next
    train(tmp_path / 'run', max_iters=1)


# ----------------------------------------------------------------------------------------------------------
# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    """The first one starts the second, with the same command line, as a scheduler does."""
    args = toy(tmp_path / 'run', init_from='auto')
    second = f'''
import subprocess, sys
done = subprocess.run([sys.executable, 'train.py', *{args!r}], capture_output=True, text=True)
print('second', done.returncode, done.stderr)'''
    done = python('train.py', *args, before=at_step(30, second))
    assert done.code == 0, done
    refusal = re.search(r'second 1 (out_dir=.*in use by another run.*)', done.out)
    assert refusal and str(tmp_path / 'run') in refusal[1], done
    assert_same_run(tmp_path / 'run', trained())
    assert python('train.py', *args).code == 0


def test_a_lock_dies_with_its_process_and_a_run_removes_its_own(tmp_path):
    kill = at_step(30, KILL)
    assert python('train.py', *toy(tmp_path / 'run'), before=kill).code == -9
    resume(tmp_path / 'run')
    assert not (tmp_path / 'run' / '.lock').exists()
    first = Lock(tmp_path / 'lock')
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / 'lock')
    first.release()
    Lock(tmp_path / 'lock').release()
    assert not (tmp_path / 'lock').exists()


def test_a_folder_that_changes_while_a_run_starts_is_refused(run_copy):
    before = f'''
from nanoblocks.training import checkpoint
build = checkpoint.build
def hit(*args):
    open({str(run_copy / 'ckpt.pt')!r}, 'ab').close()
    import os
    os.utime({str(run_copy / 'ckpt.pt')!r}, (1, 1))
    return build(*args)
checkpoint.build = hit'''
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80), before=before)
    assert_refused(done, str(run_copy), 'another run wrote there')


# ----------------------------------------------------------------------------------------------------------
# What is not damage


@pytest.mark.parametrize('error, words', [
    ("MemoryError()", ['more memory']),
    ("RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", ['memory']),
    ("OSError(5, 'Input/output error', path)", ['Input/output error']),
    ("ValueError('an unknown protocol')", ['this version of torch', 'an unknown protocol']),
])
def test_what_is_no_damage_is_refused_and_the_newest_checkpoint_stays(run_copy, error, words):
    before = files(run_copy)
    done = python('train.py', *flags(init_from='auto', out_dir=run_copy, max_iters=80), before=f'''
import torch
load = torch.load
def broken(path, *args, **kwargs):
    raise {error}
torch.load = broken''')
    assert_refused(done, str(run_copy / 'ckpt.pt'), *words)
    assert files(run_copy) == before


def test_a_checkpoint_that_is_thought_damaged_is_kept(run_copy):
    damage(run_copy / 'ckpt.pt', 'truncated')
    damaged = (run_copy / 'ckpt.pt').read_bytes()
    for name in ('ckpt.damaged.pt', 'ckpt.damaged2.pt'):
        done = python('train.py', *flags(init_from='resume', out_dir=run_copy))
        assert done.code == 0 and name in done.out and 'best.pt is of step 60' in done.out, done
        assert (run_copy / name).read_bytes() == damaged
        (run_copy / 'ckpt.pt').write_bytes(damaged)


# ----------------------------------------------------------------------------------------------------------
# Resuming on a bad disk, with a bad curve, by a bad clock


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
def test_resuming_where_nothing_can_be_written_is_one_sentence(run_copy, number):
    before = files(run_copy)
    done = python('train.py', *flags(init_from='resume', out_dir=run_copy, max_iters=80), before=f'''
import builtins, os
real = open
def refuse(path, mode='r', *args, **kwargs):
    if str(path).startswith({str(run_copy)!r}) and mode[0] in 'wa':
        raise OSError({number}, os.strerror({number}), path)
    return real(path, mode, *args, **kwargs)
builtins.open = refuse''')
    assert_refused(done, f'out_dir={run_copy}', os.strerror(number), 'make room')
    assert files(run_copy) == before


def test_a_full_disk_does_not_keep_a_run_from_going_on(tmp_path):
    """Nothing can be written when it resumes; there is room again at step 45."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('this user may not mount a tmpfs')
    try:
        train(disk / 'run', max_iters=20, lr_decay_iters=60)
        # of a step that the checkpoint does not have
        with open(disk / 'run' / 'metrics.jsonl', 'a') as f:
            f.write('{"step": 25, "train_loss": 1.0}\n')
        with open(disk / 'other', 'wb', buffering=0) as f, pytest.raises(OSError):
            while True:
                f.write(bytes(4096))
        room = at_step(26, f"""
        import os
        os.remove('{disk}/other')""")
        done = python('train.py', *flags(init_from='resume', out_dir=disk / 'run', max_iters=60), before=room)
        assert done.code == 0 and 'make room there; training continues' in done.out, done
        assert_same_run(disk / 'run', trained())
    finally:
        subprocess.run(['umount', disk])


@pytest.mark.parametrize('bad', [b'{"step": 1, \n', b'\xff\xfe\0\n', b'[]\n', b'{}\n'])
def test_one_bad_line_of_metrics_does_not_drop_the_rest(run_copy, bad):
    path = run_copy / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:3], bad, *lines[3:]]))
    out = resume(run_copy, max_iters=65, eval_interval=65)
    assert path.read_bytes().startswith(b''.join(lines)) and metrics(run_copy)[-1]['step'] == 65
    assert re.search(r'warning: .*metrics.jsonl .*dropped: 4\n', out), out


def test_the_line_of_an_evaluation_is_not_doubled(tmp_path):
    """SIGTERM in the evaluation of step 40, then a kill in the save after it was repeated."""
    assert python('train.py', *toy(tmp_path / 'run'), before=IN_EVALUATION).code == stopping.STOPPED
    kill = '''
import os
from nanoblocks.training import checkpoint
checkpoint.save = lambda *args, **kwargs: os.kill(os.getpid(), 9)''' + at_step(1, WRITTEN)
    done = python('train.py', *flags(init_from='resume', out_dir=tmp_path / 'run'), before=kill)
    assert done.code == -9 and metrics(tmp_path / 'run')[-1]['step'] == 40
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained())


def test_a_signal_in_the_last_evaluation_leaves_no_step_to_do_and_the_same_checkpoint(tmp_path):
    short = dict(max_iters=40, lr_decay_iters=40, always_save_checkpoint=False)
    done = python('train.py', *toy(tmp_path / 'run', **short), before=IN_EVALUATION)
    assert done.code == stopping.STOPPED and load(tmp_path / 'run')['step'] == 40, done
    resume(tmp_path / 'run')
    assert_same_run(tmp_path / 'run', trained(**short))


@pytest.mark.parametrize('clock', ['lambda: 1.0', 'lambda: next(ticks)'], ids=['stands still', 'goes back'])
def test_a_bad_clock_does_not_end_the_run(tmp_path, clock):
    done = python('train.py', *toy(tmp_path / 'run'), before=f'''
import itertools, time
ticks = itertools.count(1e6, -1)
time.monotonic = time.perf_counter = time.time = {clock}''')
    assert done.code == 0, done
    assert all(line.get('tokens_per_s') is None for line in metrics(tmp_path / 'run'))
    assert_same_run(tmp_path / 'run', trained())


def test_a_device_without_float64_is_enough(tmp_path):
    """Apple's GPU; here, an operation that makes float64 raises once the loop runs."""
    done = python('train.py', *toy(tmp_path / 'run', max_iters=20, pos='rope', ema=0.9), before='''
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from nanoblocks.training import stopping
class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f'{func} makes {x.dtype}')
        return out
begin = stopping.Signals.open
def then(self):
    begin(self)
    NoFloat64().__enter__()
stopping.Signals.open = then''')
    assert done.code == 0, done
    assert_same_run(tmp_path / 'run', trained(max_iters=20, pos='rope', ema=0.9))
