"""
When a run saves, what it keeps, how it goes on from there: by intervals, in a thread, with shards, from an
older step, with other micro-batches. On one process and on two, as a user runs it.
"""
import os
import pickle
import re
import shutil
import threading

import pytest
import torch
from runs import (
    EXIT,
    KILL,
    WRITTEN,
    assert_refused,
    assert_same_run,
    at_step,
    curve,
    dataset,
    differences,
    flags,
    load,
    losses,
    metrics,
    pair,
    python,
    real_python,
    resume,
    run_copy,  # noqa: F401
    several,
    toy,
    train,
    train_settings,
    trained,
)
from soak_kill import kills_while_saving

from data.loader import open_dataset
from model import GPT, GPTConfig
from nanoblocks.training import checkpoint, shards
from nanoblocks.training.logbook import Logbook
from nanoblocks.training.run_folder import RunFolder
from nanoblocks.training.saving import Saver

SMALL = dict(gradient_accumulation_steps=2, batch_size=4, max_iters=20, lr_decay_iters=20, eval_interval=10,
             eval_tokens=256, log_interval=2)


def run(world, *args, **kwargs):
    """train.py in one process or several, which must succeed; what the first printed."""
    results = several(world, *args, **kwargs)
    for done in results:
        assert done.code == 0, done
    return results[0].out


def steps_kept(folder):
    return list(RunFolder(folder).kept())


# ----------------------------------------------------------------------------------------------------------
# When, and what is kept


WATCH = '''
from nanoblocks.training.run_folder import RunFolder
write = RunFolder.write
def told(self, path, state):
    write(self, path, state)
    print('wrote', path.split('/')[-1], state['step'])
RunFolder.write = told'''


def written(out, name='ckpt.pt'):
    return [int(step) for step in re.findall(rf'wrote {re.escape(name)} (\d+)', out)]


WORLDS = pytest.mark.parametrize('world, shard', [(1, False), (2, False), (2, True)],
                                 ids=['one', 'two', 'two with shards'])


@WORLDS
def test_checkpoints_have_an_interval_of_their_own(tmp_path, world, shard):
    """Every third step and the last one; 10, an evaluation, is none. Of these 4 and every sixth are kept."""
    settings = SMALL | dict(shard=shard, save_interval=3, keep_newest=2, keep_every=6)
    out = run(world, *toy(tmp_path / 'run', **settings), before=WATCH)
    assert written(out) == [3, 6, 9, 12, 15, 18, 20], out
    assert written(out, 'best.pt') == [10, 20]
    assert steps_kept(tmp_path / 'run') == [6, 12, 18, 20]
    for step in (6, 20):
        assert load(tmp_path / 'run', f'ckpt.{step}.pt')['step'] == step
    # shards of no checkpoint are gone: four are kept, one is the newest too, one the previous, one the best
    assert len(list((tmp_path / 'run').glob('*.shards*'))) == (5 if shard else 0)
    plain = {key: value for key, value in settings.items() if 'save' not in key and 'keep' not in key}
    run(world, *toy(tmp_path / 'plain', **plain))
    assert_same_run(tmp_path / 'run', tmp_path / 'plain')


def test_by_default_checkpoints_are_written_with_evaluations(tmp_path):
    out = run(1, *toy(tmp_path / 'run', **SMALL), before=WATCH)
    assert written(out) == [10, 20] and steps_kept(tmp_path / 'run') == []


@pytest.mark.parametrize('world', [1, 2])
def test_checkpoints_by_the_clock(tmp_path, world):
    """Minutes of a clock that goes a second for each look: a checkpoint about every five steps."""
    clock = '''
from nanoblocks.training import saving
import time as real
class Clock:
    now = 0.0
    sleep = real.sleep
    def monotonic(self):
        Clock.now += 1
        return Clock.now
saving.time = Clock()'''
    settings = SMALL | dict(save_minutes=5 / 60, eval_interval=1000, save_thread=False)
    out = run(world, *toy(tmp_path / 'run', **settings), before=WATCH + clock)
    assert 3 <= len(written(out)) <= 5 and written(out)[-1] == 20, out


def test_a_setting_without_effect_is_told(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', **SMALL, save_interval=5, always_save_checkpoint=False))
    assert '--always_save_checkpoint has no effect with save_interval' in done.err, done
    for name, value in dict(save_interval=0, save_minutes=0, keep_newest=-1, keep_every=0).items():
        assert_refused(python('train.py', *toy(tmp_path / 'no', **{name: value})), f'{name}={value}')


# ----------------------------------------------------------------------------------------------------------
# From an older step


@WORLDS
def test_a_run_goes_on_from_the_checkpoint_of_a_step(tmp_path, world, shard):
    settings = SMALL | dict(shard=shard, save_interval=4, keep_newest=9)
    run(world, *toy(tmp_path / 'run', **settings))
    shutil.copytree(tmp_path / 'run', tmp_path / 'whole')
    back = flags(init_from='resume', out_dir=tmp_path / 'run', step=8)
    # in the third step after it
    results = several(world, *back, before=at_step(6 // world, EXIT))
    assert [done.code for done in results] == [9] * world, results
    assert 'resuming at step 8' in results[0].out, results
    assert 'keeps the checkpoints of the later steps 12, 16, 20 ' in results[0].out, results
    assert max(line['step'] for line in metrics(tmp_path / 'run')) <= 10
    assert steps_kept(tmp_path / 'run') == [4, 8, 12, 16, 20] and load(tmp_path / 'run')['step'] == 8
    # from there it goes on without the step being named again
    run(world, *flags(init_from='resume', out_dir=tmp_path / 'run'))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    assert steps_kept(tmp_path / 'run') == [4, 8, 12, 16, 20]
    assert 'step' not in load(tmp_path / 'run')['settings']


def test_a_step_that_is_not_kept_is_refused(tmp_path):
    train(tmp_path / 'run', **SMALL, save_interval=4, keep_every=8)
    args = flags(init_from='resume', out_dir=tmp_path / 'run', step=7)
    assert_refused(python('train.py', *args), 'step=7', '(8, 16, 20)')
    for start in ('auto', 'scratch'):
        done = python('train.py', *toy(tmp_path / 'run', init_from=start, step=8))
        assert_refused(done, 'step=8', 'resume')
    # the previous one and the newest are found too
    assert 'resuming at step 16' in resume(tmp_path / 'run', step=16, eval_only=True)
    assert 'resuming at step 20' in resume(tmp_path / 'run', step=20)


def test_a_checkpoint_of_two_names_leaves_no_part(tmp_path):
    """rename() does nothing where both names are those of one file already."""
    out = str(tmp_path)
    folder = RunFolder(out)
    folder.keep_newest = 1
    checkpoint.save(folder.newest, {'step': 4, 'model': {}})
    for _ in range(2):
        folder.keep(4)
    assert os.path.samefile(folder.newest, folder.name_of(4))
    folder.asked = 4
    folder.go_back_to(folder.name_of(4))
    assert sorted(os.listdir(out)) == ['ckpt.4.pt', 'ckpt.pt']


def test_a_new_run_removes_what_was_kept(tmp_path):
    train(tmp_path / 'run', **SMALL, save_interval=4, keep_newest=3)
    (tmp_path / 'run' / 'mine.txt').write_text('stays')
    train(tmp_path / 'run', **SMALL | dict(max_iters=2), overwrite=True)
    assert steps_kept(tmp_path / 'run') == [] and (tmp_path / 'run' / 'mine.txt').exists()


# ----------------------------------------------------------------------------------------------------------
# The thread


def slow_saver(folder, monkeypatch, **settings):
    """A Saver whose writes wait for `go`."""
    go, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda *args, **kwargs: (go.wait(20), save(*args, **kwargs)))
    folder = RunFolder(folder)
    folder.create()
    return Saver(folder, Logbook(folder, True, 0, 10), train_settings(**settings)), go


def small_model():
    """A model, and what could be an average of its weights."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=50))
    return model, {name: p.detach() + 1 for name, p in model.named_parameters()}


def states_of(folder, model, average=None):
    """What a run saves of a model in one step, as it does."""
    state = checkpoint.contents(model, settings={}, meta={}, step=1)
    best = {'model': checkpoint.averaged(state['model'], average), 'best_val_loss': 2.0}
    newest = {'best_val_loss': 2.0, 'ema': average, 'seen': [1]}
    return {folder.best: state | best, folder.newest: state | newest}


@pytest.mark.parametrize('ema', [False, True], ids=['weights', 'average'])
def test_checkpoints_hold_what_was_when_they_were_asked_for(tmp_path, monkeypatch, ema):
    """Those of one step, whose weights change before a byte is written: the files of a run without thread."""
    model, average = small_model()
    tensors = [*model.parameters(), *average.values()]
    average = average if ema else None
    plain = Saver(RunFolder(tmp_path / 'plain'), Logbook(RunFolder(tmp_path / 'plain'), True, 0, 10),
                  train_settings(save_thread=False))
    plain.folder.create()
    assert plain.save(states_of(plain.folder, model, average))
    saver, go = slow_saver(tmp_path / 'run', monkeypatch)
    states = states_of(saver.folder, model, average)
    assert saver.save(states)
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(7)
    states[saver.folder.newest]['seen'].append(2)
    assert not any(job.done() for _, _, job in saver.running.values())
    go.set()
    saver.collect(wait=True)
    for name in ('best.pt', 'ckpt.pt'):
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'plain' / name).read_bytes(), name
    best, newest = load(tmp_path / 'run', 'best.pt')['model'], load(tmp_path / 'run')
    assert newest['seen'] == [1]
    assert not any((w == 7).all() for w in (*best.values(), *newest['model'].values()))
    assert not differences({name: best[name] for name in newest['ema'] or ()}, newest['ema'] or {})
    for weights in (best, newest['model']):
        assert weights['wte.weight'].data_ptr() == weights['lm_head.weight'].data_ptr(), 'tied: saved once'


def test_what_two_checkpoints_share_is_copied_once(tmp_path, monkeypatch):
    model, average = small_model()
    saver, written = slow_saver(tmp_path / 'run', monkeypatch)[0], []
    monkeypatch.setattr(Saver, 'write', lambda self, path, state, *rest: written.append(state))
    for ema, times in ((None, 1), (average, 2)):
        assert saver.save(states_of(saver.folder, model, ema))
        saver.collect(wait=True)
        held = {w.data_ptr() for state in written for part in (state['model'], state.get('ema') or {})
                for w in part.values()}
        assert len(held) == times * len(average)
        assert held.isdisjoint(p.data_ptr() for p in (*model.parameters(), *average.values()))
        written.clear()


SLOW = '''
import shutil, time, data.loader
from nanoblocks.training.run_folder import RunFolder
from nanoblocks.training.saving import Saver
get, write, write_file, begun, held = data.loader.Dataset.train_batch, Saver.write, RunFolder.write, [], []
def train_batch(self, *args):
    begun.append(args)
    return get(self, *args)
def write_late(self, path, state, *args):
    wanted = len(begun) + 3
    while self.thread and state['step'] < self.max_iters and len(begun) < wanted:
        time.sleep(0.001)
    held.append({id(w) for key in ('model', 'ema') if key in state for w in state[key].values()})
    if self.thread and path == self.folder.newest and state['step'] < self.max_iters:
        print('best.pt has no tensor of its own:', held[-2] <= held[-1])
    return write(self, path, state, *args)
def write_and_keep(self, path, state):
    write_file(self, path, state)
    shutil.copy(path, path[:-3] + f'.{state["step"]}.pt')
data.loader.Dataset.train_batch, Saver.write, RunFolder.write = train_batch, write_late, write_and_keep'''


@WORLDS
def test_training_goes_on_before_a_checkpoint_is_written(tmp_path, world, shard):
    """A step at least before the first byte of best.pt, and one more before that of ckpt.pt."""
    settings = SMALL | dict(shard=shard, ema=0.9)
    for name in ('run', 'plain'):
        out = run(world, *toy(tmp_path / name, **settings, save_thread=name == 'run'), before=SLOW)
        assert ('best.pt has no tensor of its own: True' in out) == (name == 'run'), out
    for name in ('best.10.pt', 'ckpt.10.pt'):
        found, wanted = load(tmp_path / 'run', name), load(tmp_path / 'plain', name)
        for key in ('settings', 'seconds'):
            found.pop(key, None), wanted.pop(key, None)
        assert found['step'] == 10 and not differences(found, wanted)
    assert_same_run(tmp_path / 'run', tmp_path / 'plain')


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    saver, go = slow_saver(tmp_path / 'run', monkeypatch)
    saver.save({saver.folder.best: {'step': 1, 'best_val_loss': 2.0}})
    saver.save({saver.folder.newest: {'step': 1}})    # another file: the run need not wait
    saver.collect()
    assert len(saver.running) == 2 and not os.path.exists(saver.folder.newest)
    second = threading.Thread(target=saver.save, args=[{saver.folder.newest: {'step': 2}}])
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    second.join()
    assert saver.best_loss == 2.0
    saver.collect(wait=True)
    assert load(tmp_path / 'run')['step'] == 2 and load(tmp_path / 'run', 'ckpt.prev.pt')['step'] == 1
    assert load(tmp_path / 'run')['best_val_loss'] == 2.0


def test_a_best_that_failed_is_not_what_the_newest_remembers(tmp_path, monkeypatch, capsys):
    saver, go = slow_saver(tmp_path / 'run', monkeypatch)
    go.set()
    save = checkpoint.save

    def full(path, *args, **kwargs):
        if path == saver.folder.best:
            raise OSError(28, 'No space left on device')
        save(path, *args, **kwargs)
    monkeypatch.setattr(checkpoint, 'save', full)
    saver.best_loss = 3.0
    saver.save({saver.folder.best: {'step': 1, 'best_val_loss': 2.0}})
    saver.save({saver.folder.newest: {'step': 1, 'best_val_loss': 3.0}}, say=True)
    saver.collect(wait=True)
    assert saver.best_loss == load(tmp_path / 'run')['best_val_loss'] == 3.0 and not saver.unsaved
    out = capsys.readouterr().out
    assert 'best.pt could not be written (No space left on device)' in out and 'step 1: saved' in out


def test_the_same_run_without_the_thread(tmp_path):
    settings = dict(ema=0.9, optimizer='muon', dropout=0.1)
    train(tmp_path / 'run', save_thread=False, **settings)
    assert_same_run(tmp_path / 'run', trained(**settings))


def test_a_run_that_ends_has_written_everything(tmp_path):
    """Each write takes long, and the last one before the end is by the interval."""
    slow = WATCH + '''
import time
from nanoblocks.training import checkpoint
save = checkpoint.save
def slowly(*args, **kwargs):
    time.sleep(0.5)
    save(*args, **kwargs)
checkpoint.save = slowly'''
    settings = SMALL | dict(save_interval=19, eval_interval=1000)
    assert written(run(1, *toy(tmp_path / 'run', **settings), before=slow)) == [19, 20]
    done = python('train.py', *toy(tmp_path / 'hit', **settings), before=slow + at_step(39, '''
        os.kill(os.getpid(), 15)'''))
    assert done.code == 75 and load(tmp_path / 'hit')['step'] == 19, done


@pytest.mark.parametrize('kind', ['thread', 'shards'])
def test_kills_while_a_checkpoint_is_written_lose_nothing(kind):
    assert kills_while_saving(kind, kills=6, seed=0) == 6


# ----------------------------------------------------------------------------------------------------------
# Shards


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A run of two processes with shards."""
    folder = tmp_path_factory.mktemp('sharded') / 'run'
    run(2, *toy(folder, **SMALL, ema=0.9, shard=True))
    return folder


def test_each_process_writes_a_file_and_the_checkpoint_seals_them(sharded):
    state = torch.load(sharded / 'ckpt.pt', weights_only=True)
    record = state['shards']
    assert record['folder'] == 'ckpt.20.shards' and state['step'] == 20
    folder = sharded / record['folder']
    assert {path.name for path in folder.iterdir()} == record['files'].keys() == {
        '.metadata', '__0_0.distcp', '__1_0.distcp'}
    sizes = [(folder / f'__{rank}_0.distcp').stat().st_size for rank in range(2)]
    assert min(sizes) > 0.8 * max(sizes), 'about a half each'
    assert (sharded / 'ckpt.pt').stat().st_size < min(sizes) / 2


def test_one_file_holds_what_the_shards_hold(sharded, tmp_path):
    """Compared with what PyTorch itself makes of them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    command = ['-m', 'nanoblocks.training.join', f'--ckpt={sharded}/ckpt.pt', f'--out={tmp_path}/one.pt']
    done = real_python(*command)
    assert done.code == 0 and 'wrote' in done.out, done
    state = torch.load(tmp_path / 'one.pt', weights_only=True)
    dcp_to_torch_save(sharded / 'ckpt.20.shards', tmp_path / 'theirs.pt')
    theirs = torch.load(tmp_path / 'theirs.pt', weights_only=True)
    assert 'shards' not in state and len(theirs) > 20
    for path, tensor in theirs.items():
        inside = state
        for name in path.split('/'):
            inside = inside[int(name) if isinstance(inside, list) else name]
        assert torch.equal(inside, tensor), path
    assert_refused(real_python(*command), 'one.pt', 'must not exist')
    # it is a checkpoint as any other
    shutil.copytree(sharded, tmp_path / 'run', ignore=shutil.ignore_patterns('ckpt*', 'best*'))
    shutil.move(tmp_path / 'one.pt', tmp_path / 'run' / 'ckpt.pt')
    assert python('sample.py', f'--out_dir={tmp_path}/run', '--ckpt=ckpt.pt', '--max_new_tokens=4',
                  '--device=cpu').code == 0


def test_a_sharded_run_is_sampled_and_evaluated_by_one_process(sharded):
    done = python('sample.py', f'--out_dir={sharded}', '--max_new_tokens=4', '--device=cpu')
    assert done.code == 0, done
    out = run(1, *flags(init_from='resume', out_dir=sharded, eval_only=True, shard=False))
    assert f'{losses(sharded, "val_loss")[-1]:.4f}' in out, out


def test_a_process_reads_no_more_moments_than_its_own(sharded):
    state = checkpoint.load(str(sharded / 'ckpt.pt'))
    moments = state['optimizers'][0]['state']['wte.weight']
    assert isinstance(moments['exp_avg'], shards.Stored) and torch.is_tensor(state['model']['wte.weight'])
    assert moments['exp_avg'].read().shape == state['model']['wte.weight'].shape


@pytest.mark.parametrize('what', ['a bit', 'a file', 'the folder'])
def test_damaged_shards_are_seen_and_the_previous_checkpoint_used(sharded, tmp_path, what):
    shutil.copytree(sharded, tmp_path / 'run')
    folder = tmp_path / 'run' / 'ckpt.20.shards'
    file = folder / '__1_0.distcp'
    if what == 'a bit':
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif what == 'a file':
        file.unlink()
    else:
        shutil.rmtree(folder)
    results = pair(*flags(init_from='resume', out_dir=tmp_path / 'run'))
    assert [done.code for done in results] == [0, 0] and 'resuming at step 10' in results[0].out, results
    assert 'ckpt.20.shards' in results[0].err and 'ckpt.prev.pt' in results[0].err, results
    assert_same_run(tmp_path / 'run', sharded)


def test_no_code_in_the_description_of_shards_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'bomb'),)
    (tmp_path / '.metadata').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        shards.Reader(tmp_path).read_metadata()
    assert not (tmp_path / 'bomb').exists()


def test_a_disk_that_is_full_for_one_process_is_told_and_tried_again(tmp_path):
    """The second process may not write more than 20 kB at step 10, and has room again at the end."""
    before = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))''' + at_step(16, WRITTEN + '''
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))''')
    settings = SMALL | dict(shard=True)
    results = pair(*toy(tmp_path / 'run', **settings), before_rank={1: before})
    assert [done.code for done in results] == [0, 0], results
    assert 'could not be written (File too large)' in results[0].out, results
    run(2, *toy(tmp_path / 'whole', **settings))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.parametrize('shard', [False, True], ids=['ddp', 'fsdp'])
def test_torchrun_goes_on_after_a_process_was_killed(tmp_path, shard):
    (tmp_path / 'killed_once.py').write_text(f"""
import os, runpy, sys
sys.path.insert(0, '.')
sys.argv[0] = 'train.py'
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':
    exec({at_step(15, KILL)!r})
runpy.run_path('train.py', run_name='__main__')""")
    settings = SMALL | dict(shard=shard, save_interval=4, eval_interval=20)
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1')
    done = real_python(*torchrun, tmp_path / 'killed_once.py',
                       *toy(tmp_path / 'run', init_from='auto', **settings), seconds=150)
    assert done.code == 0 and re.search('resuming at step (4|8|12)', done.out), done
    run(2, *toy(tmp_path / 'whole', **settings))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


# ----------------------------------------------------------------------------------------------------------
# With other micro-batches, on other data


@pytest.mark.parametrize('world, more', [
    (1, dict(batch_size=2, gradient_accumulation_steps=4)),
    (1, dict(batch_size=8, gradient_accumulation_steps=1)),
    (2, dict(batch_size=2, gradient_accumulation_steps=4)),
    (2, dict(batch_tokens=256, batch_size=1))], ids=str)
def test_a_run_goes_on_exactly_with_other_micro_batches(tmp_path, world, more):
    """The same rows in the same steps: the same losses, but for the order of sums."""
    settings = SMALL | dict(eval_tokens=None, eval_iters=3, eval_interval=5, log_interval=1)
    train(tmp_path / 'run', **settings | dict(max_iters=10))
    out = run(world, *flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=20, **more))
    for name in ('batch_size', 'gradient_accumulation_steps', 'eval_tokens', 'batch_tokens'):
        wanted = name in more or name == 'eval_tokens' or name[0] == 'g' and 'batch_tokens' in more
        assert (f'changed   {name}: was ' in out) == wanted, (name, out)
    whole = trained(**settings)
    assert curve(tmp_path / 'run', 'step', 'tokens', 'lr') == curve(whole, 'step', 'tokens', 'lr')
    for key in ('train_loss', 'val_loss'):
        assert losses(tmp_path / 'run', key) == pytest.approx(losses(whole, key), rel=2e-5)
    # and back
    run(1, *flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=24, batch_size=4, batch_tokens=256))
    assert metrics(tmp_path / 'run')[-1]['tokens'] == 24 * 256


@pytest.mark.parametrize('more, words', [
    (dict(batch_size=2), ['8 rows', 'gradient_accumulation_steps=4']),
    (dict(gradient_accumulation_steps=3), ['8 rows', 'gradient_accumulation_steps=2']),
    (dict(batch_size=3), ['which needs a batch_size that divides 8']),
    (dict(batch_tokens=512), ['batch_tokens=256'])], ids=str)
def test_another_number_of_rows_in_a_step_is_refused(tmp_path, more, words):
    run_dir = shutil.copytree(trained(**SMALL), tmp_path / 'run')
    args = flags(init_from='resume', out_dir=run_dir, max_iters=40, **more)
    assert_refused(python('train.py', *args), *words)


def test_other_micro_batches_are_refused_while_their_number_grows(tmp_path):
    train(tmp_path / 'run', **SMALL | dict(max_iters=10, batch_warmup_iters=15))
    args = flags(init_from='resume', out_dir=tmp_path / 'run', batch_size=2, gradient_accumulation_steps=4,
                 max_iters=20)
    assert_refused(python('train.py', *args), 'batch_warmup_iters=15')


def test_a_run_is_evaluated_on_other_data():
    out = resume(trained(), eval_only=True, dataset=dataset('other'))
    assert f'changed   dataset: was {dataset()}, now {dataset("other")}' in out, out
    here = losses(trained(), 'val_loss')[-1]
    assert f'val loss {here:.4f}' not in out and 'step 60: val loss' in out
    # the number is the model's on that data
    model = checkpoint.build(load(trained()), 'ckpt.pt').eval()
    batches = open_dataset(dataset('other'), 32, 1337).eval_batches(8, 2048, full=True)
    with torch.no_grad():
        found = [(model(x, y)[1].item() * (y >= 0).sum().item(), (y >= 0).sum().item()) for x, y in batches]
    assert f'val loss {sum(a for a, _ in found) / sum(n for _, n in found):.4f}' in out


def test_data_of_another_tokenizer_is_no_data_to_evaluate_on(tmp_path):
    done = python('train.py', *flags(init_from='resume', out_dir=trained(), eval_only=True,
                                     dataset=dataset('chars')))
    assert_refused(done, 'another tokenizer', f'--tokenizer={trained()}')


def test_every_setting_that_changed_is_named(run_copy):
    changed = dict(max_iters=65, lr_decay_iters=65, weight_decay=0.2, beta1=0.8, beta2=0.9, grad_clip=0.5,
                   z_loss=1e-4, ema=0.5, learning_rate=1e-3, min_lr=1e-5, schedule='linear', warmup_iters=3,
                   eval_interval=13, eval_tokens=512, log_interval=3, save_interval=7, save_minutes=9.0,
                   save_thread=False, keep_newest=2, keep_every=30, bad_step_limit=5, prefetch=2,
                   check_data=True, deterministic=True, activation_checkpointing=True)
    before = load(run_copy)['settings']
    out = resume(run_copy, **changed)
    said = dict(re.findall(r'^changed   (\w+): was (.*)$', out, re.M))
    assert said.keys() == changed.keys()
    for name, text in said.items():
        assert text.startswith(f'{before[name]}, now {changed[name]}'), (name, text)
