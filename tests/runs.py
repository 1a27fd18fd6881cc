"""
What the tests of training share: running scripts, toy datasets and runs, comparing two of them.

Importing torch takes longer than these runs. So most of them are forked from one process that has imported it
(class Forks). A few are started as a user would, and one test checks that both give the same.
"""
import atexit
import functools
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from data.tokenizer import ByteTokenizer, CharTokenizer  # noqa: E402
from data.writer import write_dataset  # noqa: E402

TMP = Path(tempfile.mkdtemp(prefix='test_train_'))
atexit.register(shutil.rmtree, TMP, ignore_errors=True)
ENV = os.environ | {'OMP_NUM_THREADS': '1'}
names = (TMP / f'run_{n}' for n in itertools.count())

# ----------------------------------------------------------------------------------------------------------
# Running scripts

SERVER = '''
import faulthandler, json, os, runpy, signal, sys, traceback
sys.path.insert(0, os.getcwd())
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.profiler, tqdm
import configurator, data.loader, data.tokenizer, kernels, model
from nanoblocks.training import checkpoint, logbook, meters, parallel

def child(job):
    signal.alarm(job['seconds'])
    for number, path in enumerate((os.devnull, job['out'], job['err'])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    faulthandler.dump_traceback_later(job['seconds'] - 5, file=sys.__stderr__)  # where it hangs
    os.environ.update(job['env'])
    sys.argv, code = job['argv'], 0
    try:
        exec(job['before'], {})
        runpy.run_path(job['argv'][0], run_name='__main__')
    except SystemExit as end:
        code = end.code if type(end.code) is int else int(end.code is not None)
        if type(end.code) is str:
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    if sys.modules.get('wandb'):  # it writes its last records at exit, which os._exit leaves out
        sys.modules['wandb'].teardown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    pids = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            child(job)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
'''


class Forks:
    """`python SCRIPT ARGUMENTS` without the seconds that Python and torch take to start."""
    process = None

    @classmethod
    def run(cls, *jobs):
        """jobs: (argv, environment, Python to run first) -> a Result for each; they run side by side."""
        if cls.process is None:
            cls.process = subprocess.Popen([sys.executable, '-c', SERVER], cwd=ROOT, env=ENV, text=True,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(cls.process.wait)
            atexit.register(cls.process.stdin.close)
        outs = [str(next(names)) for _ in jobs]
        sent = [{'argv': argv, 'env': env, 'before': before, 'out': f'{out}.out', 'err': f'{out}.err',
                 'seconds': 200} for (argv, env, before), out in zip(jobs, outs)]
        print(json.dumps(sent), file=cls.process.stdin, flush=True)
        codes = json.loads(cls.process.stdout.readline())
        return [Result(code, Path(f'{out}.out').read_text(), Path(f'{out}.err').read_text())
                for code, out in zip(codes, outs)]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def python(script, *args, env=None, before=''):
    return Forks.run(([script, *map(str, args)], env or {}, before))[0]


def real_python(*args, env=None, seconds=300):
    """The same in a new Python process, as a user starts it."""
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, text=True,
                               env=ENV | {name: str(value) for name, value in (env or {}).items()},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes, which SIGKILL would leave behind
        process.terminate()
        out, err = process.communicate()
    return Result(process.returncode, out, err)


def flags(**settings):
    return [f'--{name}={value}' for name, value in settings.items()]


# ----------------------------------------------------------------------------------------------------------
# Toys

TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, gradient_accumulation_steps=1,
           max_iters=60, lr_decay_iters=60, warmup_iters=5, learning_rate=3e-3, log_interval=5,
           eval_interval=20, eval_tokens=2048, device='cpu')


def documents(n=100, words=60, seed=0):
    """Texts from a small vocabulary of made-up words, every tenth for validation."""
    rng = np.random.default_rng(seed)
    known = [''.join(rng.choice(list('abcdefghij'), size)) for size in rng.integers(2, 6, 30)]
    return [('val' if i % 10 == 0 else 'train', ' '.join(rng.choice(known, words)) + '\n') for i in range(n)]


@functools.cache
def dataset(name='bytes'):
    """The folder of a prepared toy dataset: bytes, chars, or other, which has the bytes of other texts."""
    folder, texts = TMP / 'data' / name, documents(seed=name == 'other')
    tokenizer = CharTokenizer(''.join(text for _, text in texts)) if name == 'chars' else ByteTokenizer()
    write_dataset(folder, texts, tokenizer, 'toy')
    return folder


def toy(out_dir, **settings):
    """Arguments of train.py; those set here come last, so they win."""
    data = {} if 'dataset' in settings else {'dataset': dataset()}
    return flags(**TOY | data | {'out_dir': out_dir} | settings)


def sentences(done):
    """The lines on stderr, without warnings of flags that others leave without effect: a toy sets many."""
    return [line for line in done.err.strip().splitlines() if not re.match('warning: --.* no effect ', line)]


def train(out_dir=None, **settings):
    """Train a toy; the out_dir, and what the run printed."""
    out_dir = out_dir or next(names)
    done = python('train.py', *toy(out_dir, **settings))
    assert done.code == 0 and not sentences(done), done
    return Path(out_dir), done.out


def resume(out_dir, **settings):
    """Resume a run with these new settings; what it printed."""
    done = python('train.py', *flags(init_from='resume', out_dir=out_dir, **settings))
    assert done.code == 0 and not done.err, done
    return done.out


@functools.cache
def trained(**settings):
    """The out_dir of a run that no test changes."""
    return train(**settings)[0]


@pytest.fixture
def run_copy(tmp_path):
    """A copy of a toy run, for a test that changes it."""
    shutil.copytree(trained(), tmp_path / 'run')
    return tmp_path / 'run'


def load(out_dir, name='ckpt.pt'):
    """A checkpoint, its shards put together if it has any."""
    state = torch.load(out_dir / name, weights_only=True)
    if 'shards' in state:
        from nanoblocks.training import checkpoint, shards
        state = shards.whole(checkpoint.load(str(out_dir / name)))
    return state


def train_settings(**changed):
    """The settings of train.py, by default."""
    found = configurator.settings_of(ROOT / 'train.py')
    return {name: flag.default for name, flag in found.items()} | changed


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]


def curve(out_dir, *keys):
    """The metrics that do not depend on time."""
    keys = keys or ('step', 'tokens', 'lr', 'train_loss', 'val_loss', 'val_bpb')
    return [{key: line[key] for key in keys if key in line} for line in metrics(out_dir)]


def losses(out_dir, key='train_loss'):
    return [line[key] for line in metrics(out_dir) if key in line]


def files(folder):
    """Everything in a folder: {path: bytes}."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def differences(a, b, path=''):
    """Paths at which two nested structures of tensors and plain values are not the same, bit for bit."""
    if type(a) is not type(b):
        return [f'{path}: {type(a).__name__} and {type(b).__name__}']
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f'{path}: {sorted(map(str, a.keys() ^ b.keys()))}']
        return [d for key in a for d in differences(a[key], b[key], f'{path}/{key}')]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f'{path}: {len(a)} and {len(b)} entries']
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f'{path}/{i}')]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f'{path}: {(a.double() - b.double()).abs().max()} apart']
    return [] if a == b else [f'{path}: {a!r} and {b!r}']


def assert_same_run(a, b):
    """Two runs have the same metrics and the same checkpoints."""
    assert curve(a) == curve(b), 'metrics.jsonl'
    for name in ('ckpt.pt', 'best.pt'):
        one, two = load(a, name), load(b, name)
        for key in ('settings', 'seconds', 'wandb_id'):
            one.pop(key, None), two.pop(key, None)
        found = differences(one, two)
        assert not found, f'{name}: {found}'


def assert_refused(done, *words):
    """It failed with one sentence that contains these words."""
    assert done.code == 1 and len(sentences(done)) == 1 and 'Traceback' not in done.err, done.err or done.out
    for word in words:
        assert word in done.err, f'{word!r} is not in: {done.err}'


def at_step(number, action):
    """Python for a child: `action` happens when it asks for its micro-batch `number`, the first being 1."""
    return f'''
def plant():
    import os, data.loader
    get, calls = data.loader.Dataset.train_batch, []
    def train_batch(self, *args):
        calls.append(args)
        if len(calls) == {number}:
{textwrap.indent(textwrap.dedent(action), ' ' * 12)}
        return get(self, *args)
    data.loader.Dataset.train_batch = train_batch
plant()
'''


# an action of at_step: wait until the thread has written every checkpoint it was given
WRITTEN = '''
        import gc
        from nanoblocks.training.saving import Saver
        for saver in gc.get_objects():
            if isinstance(saver, Saver) and saver.thread:
                saver.thread.submit(int).result()
'''
# the same, and then an end as that of a kill
EXIT = WRITTEN + '        os._exit(9)'
KILL = WRITTEN + '        os.kill(os.getpid(), 9)'


def assert_survives_a_kill(whole, folder, step, arguments):
    """A run of train.py in a folder, killed at a micro-batch and resumed, is the same as a whole run."""
    done = python('train.py', *arguments, before=at_step(step, KILL))
    assert done.code == -9, done
    resume(folder)
    assert_same_run(whole, folder)


# ----------------------------------------------------------------------------------------------------------
# Several processes


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return str(s.getsockname()[1])


def several(world, *args, before='', before_rank=None):
    """
    train.py in `world` processes, as torchrun starts them; their Results. before_rank: {rank: Python to run
    first in that process}.
    """
    before_rank = before_rank or {}
    env = {'WORLD_SIZE': str(world), 'MASTER_ADDR': 'localhost', 'MASTER_PORT': free_port()}
    return Forks.run(*((['train.py', *map(str, args)], env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
                        before + before_rank.get(rank, '')) for rank in range(world)))


def pair(*args, **kwargs):
    return several(2, *args, **kwargs)
