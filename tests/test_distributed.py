"""
Several processes do what one does: the same losses and weights, for every number of processes, with DDP and
with FSDP. They stop together, and fail together.
"""
import re
import signal
import subprocess
import sys

import pytest
import torch
from runs import (
    ENV,
    EXIT,
    ROOT,
    assert_refused,
    assert_same_run,
    at_step,
    curve,
    differences,
    files,
    flags,
    free_port,
    load,
    losses,
    pair,
    python,
    real_python,
    resume,
    several,
    toy,
    trained,
)

from model import GPT, GPTConfig
from nanoblocks.training import parallel, stopping


def test_two_processes_equal_one(tmp_path):
    """Three windows: one process evaluates a full batch, the other half of one. And rope has buffers."""
    settings = dict(gradient_accumulation_steps=4, batch_size=2, max_iters=20, log_interval=2,
                    eval_interval=10, eval_tokens=3 * 32 + 5, pos='rope')
    done = real_python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
                       *toy(tmp_path, **settings), seconds=90)
    assert done.code == 0, done
    one = trained(**settings)
    assert curve(tmp_path, 'step', 'tokens', 'lr') == curve(one, 'step', 'tokens', 'lr')
    for key, count in (('train_loss', 10), ('val_loss', 3)):
        assert len(losses(one, key)) == count
        assert losses(tmp_path, key) == pytest.approx(losses(one, key), rel=1e-5)
    # only one of them prints
    assert done.out.count('step 20: val loss') == 1 and '2 x cpu' in done.out
    for name, weight in load(one)['model'].items():
        torch.testing.assert_close(load(tmp_path)['model'][name], weight, rtol=1e-3, atol=1e-4)


def test_two_processes_killed_and_resumed_are_bit_exact(tmp_path):
    """With dropout, and between two log lines."""
    settings = dict(gradient_accumulation_steps=2, batch_size=2, max_iters=20, log_interval=3,
                    eval_interval=10, dropout=0.2)
    for done in pair(*toy(tmp_path / 'whole', **settings)):
        assert done.code == 0, done
    for done in pair(*toy(tmp_path / 'parts', **settings), before=at_step(15, EXIT)):
        assert done.code == 9, done
    assert load(tmp_path / 'parts')['step'] == 10
    for done in pair(*flags(init_from='resume', out_dir=tmp_path / 'parts')):
        assert done.code == 0, done
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_a_refusal_ends_both_processes(tmp_path):
    first, second = pair(*toy(tmp_path / 'run', dataset='never_prepared', gradient_accumulation_steps=2))
    assert_refused(first, 'never_prepared')
    assert second.code > 0, 'a negative one is the time limit'


def test_micro_batches_must_divide_among_processes(tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', gradient_accumulation_steps=3),
                  env={'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'})
    assert_refused(done, 'gradient_accumulation_steps=3', '2')
    assert not (tmp_path / 'run').exists()


SMALL = dict(gradient_accumulation_steps=4, batch_size=2, max_iters=12, lr_decay_iters=12, log_interval=2,
             eval_interval=6, eval_tokens=5 * 32)
EXPERTS = dict(ffn_pattern='fe', n_expert=4, balance='both', bias_rate=0.01, optimizer='muon', norm='rmsnorm')


def assert_close_runs(a, b, weights=2e-4):
    """The same run, up to rounding from another order of sums."""
    assert curve(a, 'step', 'tokens', 'lr', 'skipped') == curve(b, 'step', 'tokens', 'lr', 'skipped')
    for key in ('train_loss', 'val_loss', 'grad_norm'):
        assert losses(a, key) == pytest.approx(losses(b, key), rel=2e-4), key
    for name in ('ckpt.pt', 'best.pt'):
        one, two = load(a, name)['model'], load(b, name)['model']
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(weight, two[key], rtol=0, atol=weights, msg=lambda m: f'{key}: {m}')


def succeed(results):
    for done in results:
        assert done.code == 0, done


@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('settings', [
    dict(dropout=0.1), dict(shard=True, tie=False, ema=0.5), dict(EXPERTS),
    dict(EXPERTS, shard=True, dropout=0.1),
], ids=['ddp', 'fsdp', 'ddp, experts, muon', 'fsdp, experts, muon'])
def test_many_processes_equal_one(tmp_path, settings, world):
    """
    With dropout, which is drawn by the number of the micro-batch; with biases of routers, which count the
    tokens of all; with Muon, whose matrices are dealt out. Five windows to evaluate: not all have as many.
    """
    succeed(several(world, *toy(tmp_path / 'many', **SMALL | settings)))
    one = {key: value for key, value in (SMALL | settings).items() if key != 'shard'}
    assert_close_runs(tmp_path / 'many', trained(**one))
    assert len(losses(tmp_path / 'many', 'val_loss')) == 3


@pytest.mark.parametrize('residual', ['attnres', 'mhc'])
def test_a_wide_stream_passes_between_shards(tmp_path, residual):
    settings = SMALL | dict(residual=residual, n_layer=3, norm='rmsnorm')
    succeed(pair(*toy(tmp_path / 'many', **settings, shard=True, activation_checkpointing=True)))
    assert_close_runs(tmp_path / 'many', trained(**settings))


def test_gradients_are_views_of_what_is_sent(monkeypatch):
    def ddp(model, broadcast_buffers=True, gradient_as_bucket_view=False):
        return broadcast_buffers, gradient_as_bucket_view
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', ddp)
    assert parallel.replicate(None) == (False, True)


@pytest.mark.parametrize('shard', [False, True], ids=['ddp', 'fsdp'])
def test_a_run_of_two_processes_resumes_with_four_and_then_with_one(tmp_path, shard):
    """Checkpoints have the same form whether the model was sharded or not."""
    settings = dict(EXPERTS, ema=0.5)
    first = SMALL | settings | dict(max_iters=4, shard=shard, eval_interval=4)
    succeed(several(2, *toy(tmp_path / 'run', **first)))
    succeed(several(4, *flags(init_from='resume', out_dir=tmp_path / 'run', max_iters=8, shard=True)))
    resume(tmp_path / 'run', max_iters=12, shard=False)
    assert_close_runs(tmp_path / 'run', trained(**SMALL | settings | dict(eval_interval=4)))


def test_two_shards_killed_and_resumed_are_bit_exact(tmp_path):
    settings = SMALL | dict(shard=True, dropout=0.2, optimizer='muon', log_interval=5)
    succeed(pair(*toy(tmp_path / 'whole', **settings)))
    for done in pair(*toy(tmp_path / 'parts', **settings), before=at_step(2 * 9, EXIT)):
        assert done.code == 9, done
    assert load(tmp_path / 'parts')['step'] == 6
    succeed(pair(*flags(init_from='resume', out_dir=tmp_path / 'parts')))
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_shards_in_16_bits_keep_the_losses_of_routers(tmp_path):
    """Tensors and containers among a block's arguments are copied by FSDP where it casts them."""
    settings = SMALL | EXPERTS | dict(aux_weight=3.0, max_iters=1, eval_interval=1)
    found = [float(line.split()[1]) for result in pair(*toy(
        tmp_path / 'run', **settings, shard=True, dtype='bfloat16'), before='''
import model
whole = model.GPT.losses
def losses(self, *args):
    found = whole(self, *args)
    if self.training:
        print('router', float(found['router']))
    return found
model.GPT.losses = losses''') for line in result.out.splitlines() if line.startswith('router ')]
    # balanced experts have an auxiliary loss of 1, times its weight
    assert len(found) == 4 and min(found) > 2.9, found


def test_shards_in_16_bits_learn_equally_well(tmp_path):
    settings = SMALL | dict(max_iters=20, lr_decay_iters=20)
    succeed(pair(*toy(tmp_path / 'run', **settings, shard=True, dtype='bfloat16')))
    assert losses(tmp_path / 'run') == pytest.approx(losses(trained(**settings)), abs=0.03)


@pytest.mark.parametrize('settings', [dict(), dict(shard=True, activation_checkpointing=True)],
                         ids=['ddp', 'fsdp, activations computed again'])
def test_compiled_processes_learn_as_one_eager_process_does(tmp_path, settings):
    succeed(pair(*toy(tmp_path / 'run', **SMALL, **settings, compile=True)))
    assert_close_runs(tmp_path / 'run', trained(**SMALL))


@pytest.mark.parametrize('settings', [dict(), dict(EXPERTS, dropout=0.2), dict(shard=True)], ids=str)
def test_recomputing_activations_changes_nothing(tmp_path, settings):
    """Nor does it change the experts' token counts or the masks of dropout."""
    run = pair if 'shard' in settings else lambda *args: [python('train.py', *args)]
    for name, flag in (('with', True), ('without', False)):
        succeed(run(*toy(tmp_path / name, **SMALL, **settings, activation_checkpointing=flag)))
    assert_same_run(tmp_path / 'with', tmp_path / 'without')


def test_experts_count_their_tokens_once_when_activations_are_recomputed():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, ffn_pattern='e',
                       n_expert=4)
    x, loads, grads = torch.arange(16).view(2, 8) % 11, [], []
    for again in (False, True):
        model = GPT(config)
        if again:
            parallel.recompute_blocks(model)
        model(x, x)[1].backward()
        loads.append([moe.load.clone() for moe in model.moes])
        grads.append([p.grad for p in model.parameters()])
    assert not differences(*loads) and not differences(*grads)
    assert loads[0][0].sum() == 16 * 2


def test_gradients_are_exchanged_once_a_step(tmp_path):
    """The collectives of gradients are counted, for two numbers of micro-batches."""
    count = '''
import atexit, torch.distributed as dist, torch, sys
from torch.profiler import profile
from nanoblocks.training import parallel
end, calls = parallel.end, []
start = parallel.start
def counted(*args):
    watch = start(*args)
    counted.profiler = profile()
    counted.profiler.start()
    return watch
def stop(watch):
    counted.profiler.stop()
    for event in counted.profiler.key_averages():
        if event.key.startswith(('gloo:', 'c10d::')):
            print('exchange', event.key, event.count)
    end(watch)
parallel.start, parallel.end = counted, stop'''
    counts = []
    for micro in (2, 8):
        per_mode = []
        for shard in (False, True):
            results = pair(*toy(tmp_path / f'{micro}{shard}', **SMALL | dict(
                shard=shard, gradient_accumulation_steps=micro, max_iters=2, eval_interval=2)), before=count)
            succeed(results)
            kinds = dict(re.findall(r'exchange (\S+) (\d+)', results[0].out))
            assert kinds, results[0].out
            per_mode.append({key: int(value) for key, value in kinds.items() if 'reduce_scatter' in key
                             or not shard and 'allreduce' in key and 'c10d' not in key})
        counts.append(per_mode)
    assert counts[0] == counts[1], counts


FULL_DISK = '''
from nanoblocks.training import checkpoint
save, calls = checkpoint.save, []
def fails_twice(*args, **kwargs):
    calls.append(args)
    if len(calls) < 3:
        raise OSError(28, 'No space left on device')
    save(*args, **kwargs)
checkpoint.save = fails_twice'''


@pytest.mark.parametrize('shard', [False, True], ids=['ddp', 'fsdp'])
def test_all_processes_repeat_a_save_that_failed_in_the_first(tmp_path, shard):
    """Saving needs all of them: a process that took the save for done would not take part in the next one."""
    settings = SMALL | dict(shard=shard, save_thread=False)
    results = pair(*toy(tmp_path / 'run', **settings), before_rank={0: FULL_DISK})
    succeed(results)
    assert results[0].out.count('could not be written (No space left on device)') == 2, results
    assert 'step 8: saved' in results[0].out, results
    succeed(pair(*toy(tmp_path / 'undisturbed', **settings)))
    assert_same_run(tmp_path / 'run', tmp_path / 'undisturbed')


# ----------------------------------------------------------------------------------------------------------
# Stopping together


@pytest.mark.parametrize('shard', [False, True], ids=['ddp', 'fsdp'])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, shard):
    """It comes in the middle of step 8, when 7 are done; two micro-batches later all processes know."""
    settings = SMALL | dict(gradient_accumulation_steps=8, shard=shard)
    hit = at_step(4 * 7 + 1, 'os.kill(os.getpid(), 15)')
    results = pair(*toy(tmp_path / 'run', **settings), before_rank={1: hit})
    assert [done.code for done in results] == [stopping.STOPPED] * 2, results
    assert load(tmp_path / 'run')['step'] == 7
    succeed(pair(*flags(init_from='resume', out_dir=tmp_path / 'run')))
    succeed(pair(*toy(tmp_path / 'whole', **settings)))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_a_signal_in_an_evaluation_stops_all(tmp_path):
    """Even one that has no windows left to evaluate."""
    hit = '''
import os, data.loader
get, calls = data.loader.Dataset.eval_batches, []
def eval_batches(self, *args, **kwargs):
    calls.append(args)
    for number, batch in enumerate(get(self, *args, **kwargs)):
        if number == 1 and len(calls) == 2:
            os.kill(os.getpid(), 15)
        yield batch
data.loader.Dataset.eval_batches = eval_batches'''
    settings = SMALL | dict(eval_tokens=15 * 32)
    results = pair(*toy(tmp_path / 'run', **settings), before_rank={1: hit})
    assert [done.code for done in results] == [stopping.STOPPED] * 2, results
    state = load(tmp_path / 'run')
    assert (state['step'], state['evaluated']) == (6, 0)
    succeed(pair(*flags(init_from='resume', out_dir=tmp_path / 'run')))
    succeed(pair(*toy(tmp_path / 'whole', **settings)))
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_torchrun_that_is_stopped_leaves_a_checkpoint(tmp_path):
    """torchrun forwards the signal to all of its processes, and waits for them."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
         *toy(tmp_path / 'run', **SMALL | dict(max_iters=10**6, lr_decay_iters=12, eval_interval=10**6))],
        cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith('step 4:'):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and 'stopped by signal' in out, (out, err)
    assert load(tmp_path / 'run')['step'] >= 4
    assert not list((tmp_path / 'run').glob('*.part'))


# ----------------------------------------------------------------------------------------------------------
# Failing together

FAIL = at_step(5, "raise RuntimeError('a planted fault')")


def by_hand(tmp_path, rank, fault):
    """(exit codes, stderr) of two processes without torchrun, one of which runs the Python `fault` first."""
    (tmp_path / 'run.py').write_text(f"""
import os, runpy, sys
sys.path.insert(0, '.')
if os.environ['RANK'] == '{rank}':
    exec({fault!r})
sys.argv[0] = 'train.py'
runpy.run_path('train.py', run_name='__main__')""")
    env = ENV | {'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': free_port()}
    command = [sys.executable, tmp_path / 'run.py', *toy(tmp_path / 'run', **SMALL)]
    processes = [subprocess.Popen(command, cwd=ROOT, text=True,
                                  env=env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.mark.parametrize('failing', [0, 1])
def test_when_one_process_fails_all_leave_and_say_which(tmp_path, failing):
    """Without torchrun, as by hand or under SLURM: the processes have to end each other."""
    codes, errors = by_hand(tmp_path, failing, FAIL)
    assert codes == [1, 1], errors
    assert f'rank {failing} of 2 failed: RuntimeError: a planted fault' in errors[failing], errors
    assert f'rank {1 - failing} leaves: rank {failing} of 2 failed: RuntimeError' in errors[1 - failing]


@pytest.mark.parametrize('killed', [0, 1])
def test_a_process_that_was_killed_is_named(tmp_path, killed):
    """Not the one that notices it, because its connection is closed."""
    codes, errors = by_hand(tmp_path, killed, at_step(5, 'os.kill(os.getpid(), 9)'))
    assert codes[killed] == -9 and codes[1 - killed] == 1, errors
    said = [line for line in errors[1 - killed].splitlines() if line.startswith('rank ')]
    assert said and said[0].startswith(f'rank {killed} of 2 no longer answers: it was killed'), errors
    assert f'rank {1 - killed} of 2' not in errors[1 - killed]


def test_shards_need_several_processes(tmp_path):
    assert_refused(python('train.py', *toy(tmp_path / 'run', shard=True)), 'shard=True', 'torchrun')


# ----------------------------------------------------------------------------------------------------------
# Beginning together

ELSEWHERE = "import sys; sys.argv = [arg.replace('/run', '/elsewhere') for arg in sys.argv]"


@pytest.mark.parametrize('steps', [None, 6, 12], ids=['none', 'an older one', 'another of the same step'])
def test_processes_that_see_different_checkpoints_are_refused(tmp_path, steps):
    """An out_dir that is not shared, or a file system that lags."""
    settings = SMALL | dict(eval_interval=6, init_from='auto')
    python('train.py', *toy(tmp_path / 'run', **settings))
    if steps:
        python('train.py', *toy(tmp_path / 'elsewhere', **settings | dict(max_iters=steps)))
    before = files(tmp_path)
    results = pair(*toy(tmp_path / 'run', **settings | dict(max_iters=20)), before_rank={1: ELSEWHERE})
    for done in results:
        assert_refused(done, 'checkpoint=', 'of step 12', f'of step {steps}' if steps else 'None', 'share')
    assert files(tmp_path) == before


@pytest.mark.parametrize('flag', ['--learning_rate=0.1', '--n_layer=1', '--eval_interval=3'])
def test_processes_with_different_command_lines_are_refused(tmp_path, flag):
    results = pair(*toy(tmp_path / 'run', **SMALL), before_rank={1: f'import sys; sys.argv.append({flag!r})'})
    name, value = flag[2:].split('=')
    for done in results:
        assert_refused(done, name, value, 'same command line')
    assert not (tmp_path / 'run').exists()


def test_torchrun_starts_the_processes_again_after_a_failure(tmp_path):
    """The note of the first failure must not end the second attempt."""
    (tmp_path / 'fails_once.py').write_text(f"""
import os, runpy, sys
sys.path.insert(0, '.')
sys.argv[0] = 'train.py'
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':
    exec({at_step(15, "raise RuntimeError('a planted fault')")!r})
runpy.run_path('train.py', run_name='__main__')""")
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1')
    done = real_python(*torchrun, tmp_path / 'fails_once.py',
                       *toy(tmp_path / 'run', init_from='auto', **SMALL), seconds=90)
    assert done.code == 0 and 'rank 1 of 2 failed: RuntimeError: a planted fault' in done.err, done
    assert load(tmp_path / 'run')['step'] == 12
