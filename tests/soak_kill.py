"""
Kill runs again and again, and compare what they become with a run that nobody disturbed: metrics and
checkpoints have to be the same bit for bit.

    python tests/soak_kill.py --minutes=60 --seed=0

Each round takes one kind of run and starts it with init_from=auto until it is done, sending it a random
signal at a random moment. It stops at the first difference, and names the seed that shows it again.
"""
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import assert_same_run, names, python, toy, trained  # noqa: E402

from configurator import configure  # noqa: E402

minutes = 60.0      # how long to go on
seed = 0            # seed of the moments and the signals

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


if __name__ == '__main__':
    configure(globals())
    print('{} runs, ended {} times on the way, are as if nothing had happened'.format(
        *soak(60 * minutes, seed)))
