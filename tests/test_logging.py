"""What a run tells: Weights & Biases without a network, figures, profiles. None of it changes the run."""
import json
import socket
import struct
import subprocess

import pytest
from runs import ROOT, assert_same_run, at_step, flags, load, losses, metrics, python, toy, train, trained

from nanoblocks.training.logbook import Logbook
from nanoblocks.training.meters import SpikeDetector
from nanoblocks.training.run_folder import RunFolder

OFFLINE = {'WANDB_MODE': 'offline'}


def records(path):
    """The records of a .wandb file: protocol buffers in blocks of 32 KiB (the log format of LevelDB)."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack('<IHB', data[at:at + 7])
        parts += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b''
            yield record


def history(path):
    """[{key: value}] of everything that was logged."""
    rows = []
    for record in records(path):
        if record.HasField('history'):
            rows.append({item.key or '.'.join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item})
    return rows


def wandb_files(out_dir):
    """The .wandb files of a run, oldest first."""
    return sorted((out_dir / 'wandb').glob('offline-run-*/*.wandb'), key=lambda path: path.stat().st_mtime_ns)


def test_a_run_and_its_resume_are_one_run_of_wandb(tmp_path):
    """A scheduler stops the run in step 36, and starts it again."""
    settings = dict(wandb_log=True, wandb_run_name='mine', wandb_samples=1, ffn_pattern='e', n_expert=2)
    hit = at_step(36, 'os.kill(os.getpid(), 15)')
    done = python('train.py', *toy(tmp_path / 'run', **settings), env=OFFLINE, before=hit)
    assert done.code == 75 and not done.err, done
    done = python('train.py', *flags(init_from='resume', out_dir=tmp_path / 'run'), env=OFFLINE)
    assert done.code == 0 and not done.err, done
    first, second = wandb_files(tmp_path / 'run')
    begun, resumed = ([record.run for record in records(path) if record.HasField('run')][0]
                      for path in (first, second))
    assert begun.run_id == resumed.run_id == load(tmp_path / 'run')['wandb_id']
    assert begun.display_name == 'mine' and begun.project == 'nanoblocks'
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config['n_embd'] == 32 and config['learning_rate'] == 3e-3
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    assert head.returncode or config['git'].startswith(head.stdout.strip())
    rows = history(first) + history(second)
    steps = [row['_step'] for row in rows]
    assert steps == sorted(steps) and set(steps) == set(range(0, 61, 5)), steps
    logged = {key.split('.')[0] for row in rows for key in row}
    assert {'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'param_norm', 'tokens_per_s', 'memory_gb',
            'expert_max', 'expert_entropy', 'tokens', 'samples'} <= logged
    # nothing of it is felt by the run
    assert_same_run(tmp_path / 'run', trained(ffn_pattern='e', n_expert=2))
    # and the source is there
    assert any((tmp_path / 'run').glob('wandb/offline-run-*/**/train.py')) or any(
        record.HasField('artifact') for record in records(first))


@pytest.mark.parametrize('env', [{'WANDB_BASE_URL': 'http://127.0.0.1:{port}', 'WANDB_API_KEY': 'x' * 40},
                                 {'WANDB_BASE_URL': 'http://nowhere.invalid'}], ids=['refused', 'unknown'])
def test_a_server_out_of_reach_is_done_without(tmp_path, env):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))  # and does not listen
        env = {key: value.format(port=s.getsockname()[1]) for key, value in env.items()}
        done = python('train.py', *toy(tmp_path / 'run', wandb_log=True, wandb_samples=0), env=env)
    assert done.code == 0 and not done.err, done
    assert 'cannot be reached' in done.out and 'logging offline' in done.out and 'wandb sync' in done.out
    assert history(wandb_files(tmp_path / 'run')[0])[-1]['_step'] == 60
    assert_same_run(tmp_path / 'run', trained())


def test_a_wandb_that_breaks_does_not_stop_training(tmp_path):
    """When the run begins, or later."""
    for name, fault in (('begin', 'wandb.init = broken'), ('middle', 'wandb.sdk.wandb_run.Run.log = broken')):
        done = python('train.py', *toy(tmp_path / name, wandb_log=True), env=OFFLINE, before=f'''
import wandb
def broken(*args, **kwargs):
    raise RuntimeError('it is down')
{fault}''')
        assert done.code == 0 and 'it is down' in done.out and 'without it' in done.out, done
        assert_same_run(tmp_path / name, trained())


def test_a_wandb_that_cannot_be_imported_does_not_stop_training(tmp_path):
    (tmp_path / 'site' / 'wandb').mkdir(parents=True)
    (tmp_path / 'site' / 'wandb' / '__init__.py').write_text('raise RuntimeError("half installed")')
    done = python('train.py', *toy(tmp_path / 'run', wandb_log=True), before=f"""
import sys
sys.path.insert(1, {str(tmp_path / 'site')!r})""")
    assert done.code == 0 and 'wandb     does not work (half installed)' in done.out, done
    assert_same_run(tmp_path / 'run', trained())


def test_a_preview_that_fails_ends_no_run(tmp_path):
    """Its model is left in training mode, so the run goes on as if there had been none."""
    done = python('train.py', *toy(tmp_path / 'run', wandb_log=True, dropout=0.1), env=OFFLINE, before="""
import model
def generate(self, *args, **kwargs):
    self.eval()
    raise RuntimeError('no room')
model.GPT.generate = generate""")
    assert done.code == 0, done
    assert_same_run(tmp_path / 'run', trained(dropout=0.1))


@pytest.mark.parametrize('fault', ['profile.start', 'profile.stop', 'profile.export_chrome_trace'])
def test_a_profile_that_fails_ends_no_run(tmp_path, fault):
    done = python('train.py', *toy(tmp_path / 'run', profile=True), before=f"""
import torch
def broken(*args, **kwargs):
    raise RuntimeError('it is down')
torch.profiler.{fault} = broken""")
    assert done.code == 0 and 'it is down' in done.out, done
    assert_same_run(tmp_path / 'run', trained())


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    """Each line once, complete and in order; half a line is removed again."""
    log = Logbook(RunFolder(tmp_path), False, 0, 10)
    log.record({'step': 1, 'loss': float('nan')})
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()
    monkeypatch.setattr('builtins.open', lambda *args, **kwargs: Full(real(*args, **kwargs)))
    log.record({'step': 2})
    log.record({'step': 3})
    with pytest.raises(OSError):
        log.flush()
    monkeypatch.undo()
    assert metrics(tmp_path) == [{'step': 1, 'loss': None}]
    log.record({'step': 4})
    assert [line['step'] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def test_spikes_stand_out():
    calm = SpikeDetector()
    assert not any(calm.is_spike(3 + 0.05 * (n % 3)) for n in range(30))
    assert calm.is_spike(4.0) and not calm.is_spike(3.1)
    falling = SpikeDetector()
    assert not any(falling.is_spike(10 - 0.3 * n) for n in range(20))
    # it is the same one after a resume
    assert SpikeDetector(list(calm.history)).is_spike(4.0) and not SpikeDetector().is_spike(4.0)


def test_curves_of_several_runs_in_one_figure(tmp_path):
    pytest.importorskip('matplotlib')
    runs = [trained(), trained(max_iters=20)]
    done = python('bench.py', 'plot', *runs, tmp_path, f'--figure={tmp_path}/curves.png')
    assert done.code == 0 and not done.err, done
    assert (tmp_path / 'curves.png').read_bytes()[1:4] == b'PNG'
    for run in runs:
        best = min(losses(run, 'val_loss'))
        assert f'{run.name:30} best validation loss {best:.4f}' in done.out
    assert f'{tmp_path} holds no metrics.jsonl' in done.out
    done = python('bench.py', 'plot', tmp_path)
    assert done.code == 1 and done.err.count('\n') == 1 and 'out/*' in done.err


def test_profile_shows_where_the_time_goes(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', profile=True))
    assert done.code == 0 and 'aten::addmm' in done.out and 'Self CPU' in done.out, done
    events = json.loads((tmp_path / 'run' / 'trace.json').read_text())['traceEvents']
    assert sum(event.get('name') == 'Optimizer.step#AdamW.step' for event in events) == 3
    assert_same_run(tmp_path / 'run', trained())


def test_batches_made_in_advance_are_the_same(tmp_path):
    settings = dict(gradient_accumulation_steps=2, batch_warmup_iters=10)
    train(tmp_path / 'run', prefetch=3, **settings)
    assert_same_run(tmp_path / 'run', trained(**settings))


def test_an_error_on_the_thread_is_an_error_of_the_run(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', prefetch=3),
                  before=at_step(30, "raise OSError('the disk is gone')"))
    assert done.code == 1 and 'the disk is gone' in done.err
