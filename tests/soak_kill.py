"""
Kill runs again and again, and compare what they become with a run that nobody disturbed: metrics and
checkpoints have to be the same bit for bit.

    python tests/soak_kill.py --minutes=60 --seed=0
    python tests/soak_kill.py --kills=100               # in the middle of saves, of a thread and of shards

Each round takes one kind of run and starts it with init_from=auto until it is done, sending it a random
signal at a random moment. It stops at the first difference, and names the seed that shows it again.
"""
import functools
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import assert_same_run, names, python, several, toy, trained  # noqa: E402

from configurator import configure  # noqa: E402
from nanoblocks.training import checkpoint  # noqa: E402
from nanoblocks.training.run_folder import RunFolder  # noqa: E402

minutes = 60.0      # how long to go on
seed = 0            # seed of the moments and the signals
kills = 0           # if above 0: so many kills while a checkpoint is written, of each kind, and no signals

SHORT = dict(max_iters=24, lr_decay_iters=24, eval_interval=6, log_interval=1, eval_tokens=256)
EXPERTS = dict(ffn_pattern='e', n_expert=4, balance='bias')
KINDS = [SHORT | more for more in (
    dict(dropout=0.2),
    dict(optimizer='muon', ema=0.9, pos='rope', norm='rmsnorm', ffn='swiglu', bias=False),
    dict(gradient_accumulation_steps=4, batch_warmup_iters=10, schedule='wsd'),
    dict(EXPERTS, n_predict=2, z_loss=1e-4),
    dict(layer_pattern='m', ffn_pattern='-', pos='none', ssm_head_dim=16, always_save_checkpoint=False))]
SIGNALS = [signal.SIGKILL] * 3 + [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1')
                                  if hasattr(signal, name)]
SEND = '''
import os, signal, threading, time
def send():
    time.sleep({seconds})
    # Ctrl-C before train.py's first line is Python's to answer
    while {number} != signal.SIGKILL and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.01)
    os.kill(os.getpid(), {number})
threading.Thread(target=send, daemon=True).start()
'''


def disturbed(settings, rng, out_dir):
    """Start a run until it is done, sending signals; returns how many it got."""
    sent = 0
    # once in a while it is let alone, or a run that loses its progress every time would never end
    for attempt in range(200):
        before, number = '', rng.choice(SIGNALS)
        if attempt % 4 < 3:
            before = SEND.format(seconds=rng.uniform(0.0, 0.5), number=int(number))
        done = python('train.py', *toy(out_dir, init_from='auto', **settings), before=before)
        assert 'Traceback' not in done.err, done.err
        sent += done.code != 0
        if done.code == 0:
            return sent
    raise AssertionError(f'{settings} was not done after 200 attempts: {done}')


def soak(seconds, seed):
    """Rounds until the time is over -> (rounds, signals that ended a run). AssertionError at a difference."""
    over, rounds, sent = time.monotonic() + seconds, 0, 0
    while rounds == 0 or time.monotonic() < over:
        rng, settings = random.Random(f'{seed} {rounds}'), KINDS[rounds % len(KINDS)]
        out_dir = next(names)
        sent += disturbed(settings, rng, out_dir)
        try:
            assert_same_run(trained(**settings), out_dir)
        except AssertionError as error:
            raise AssertionError(f'round {rounds} of seed {seed} differs, {settings}: {error}') from None
        rounds += 1
    return rounds, sent


# ----------------------------------------------------------------------------------------------------------
# While a checkpoint is written


SAVING = dict(max_iters=24, lr_decay_iters=24, eval_interval=12, eval_tokens=256, log_interval=4,
              batch_size=4, gradient_accumulation_steps=2, n_layer=1, dropout=0.1, save_interval=1,
              keep_newest=2, keep_every=8)
WRITERS = {'thread': (1, SAVING), 'shards': (2, SAVING | dict(shard=True, save_interval=2, ema=0.9))}
# after so many calls and returns of functions, of Python or C, in writes of checkpoints
KILL = '''
import os, sys
from nanoblocks.training.saving import Saver
left, write = {events}, Saver.write
def event(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
def watched(self, *args):
    sys.setprofile(event)
    try:
        return write(self, *args)
    finally:
        sys.setprofile(None)
Saver.write = watched'''


@functools.cache
def undisturbed(kind):
    world, settings = WRITERS[kind]
    out_dir = next(names)
    for done in several(world, *toy(out_dir, **settings)):
        assert done.code == 0, done
    return out_dir


def kills_while_saving(kind, kills, seed):
    """
    Kill a run, or one or both of its processes, so often while it writes a checkpoint. Each time the newest
    one must be whole and no older than before; in the end the run must be as one that nobody killed.
    """
    (world, settings), rng, killed, step = WRITERS[kind], random.Random(f'{kind} {seed}'), 0, 0
    out_dir, whole = next(names), undisturbed(kind)
    folder = RunFolder(out_dir)
    while True:
        hit = [rank for rank in range(world) if rng.random() < 0.7] if killed < kills else []
        results = several(world, *toy(out_dir, init_from='auto', **settings), before_rank={
            rank: KILL.format(events=rng.randrange(1, 4000)) for rank in hit})
        killed += any(done.code == -signal.SIGKILL for done in results)
        assert all('Traceback' not in done.err or world > 1 for done in results), results
        for path in (folder.newest, *folder.kept().values()):
            if path != folder.newest or folder.resumable():
                state = checkpoint.load(path, checkpoint.RESUME_KEYS)
                assert path != folder.newest or state['step'] >= step, (state['step'], step)
        step = checkpoint.step_of(folder.newest) or 0
        if all(done.code == 0 for done in results):
            assert_same_run(out_dir, whole)
            assert folder.kept().keys() == RunFolder(whole).kept().keys()
            left, right = (sorted(re.sub(r'shards\d+$', 'shards', path.name) for path in place.iterdir())
                           for place in (out_dir, whole))
            assert left == right, (left, right)
            if killed >= kills:
                return killed
            shutil.rmtree(out_dir)
            step = 0


if __name__ == '__main__':
    configure(globals())
    for kind in WRITERS if kills else ():
        print(f'{kind}: {kills_while_saving(kind, kills, seed)} kills in the middle of a save lost nothing')
    if not kills:
        print('{} runs, ended {} times on the way, are as if nothing had happened'.format(
            *soak(60 * minutes, seed)))
