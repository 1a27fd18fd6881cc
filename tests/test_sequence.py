"""One long text on several processes: attention in a ring and states that are passed on equal one process."""
import pytest
import torch
from conftest import assert_close
from parts_of_a_text import CASES, model_and_batch
from runs import (
    EXIT,
    Forks,
    assert_refused,
    assert_same_run,
    at_step,
    curve,
    flags,
    free_port,
    losses,
    pair,
    python,
    several,
    toy,
    trained,
)


@pytest.fixture(scope='module', params=[2, 4], ids='{} processes'.format)
def found(request, tmp_path_factory):
    """{case: (loss, gradients)} of several processes."""
    out = tmp_path_factory.mktemp('parts') / 'found.pt'
    env = {'WORLD_SIZE': str(request.param), 'MASTER_ADDR': 'localhost', 'MASTER_PORT': free_port()}
    for done in Forks.run(*((['tests/parts_of_a_text.py', str(out)], env | {'RANK': str(rank)}, '')
                            for rank in range(request.param))):
        assert done.code == 0, done
    return torch.load(out)


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradients_are_those_of_one_process(found, case):
    model, batch = model_and_batch(CASES[case])
    loss = model(**batch)[1]
    loss.backward()
    assert_close(found[case][0], loss.detach(), 1e-12, 'loss')
    for name, p in model.named_parameters():
        assert_close(found[case][1][name], p.grad, 1e-11, f'gradient of {name}')


SETTINGS = dict(gradient_accumulation_steps=3, batch_size=2, max_iters=12, log_interval=2, eval_interval=6,
                eval_tokens=100, block_size=32, pos='rope', layer_pattern='ra', n_layer=2)


@pytest.mark.parametrize('more', [{}, {'shard': True}, {'activation_checkpointing': True}],
                         ids=['replicated', 'sharded', 'recomputed'])
def test_a_run_is_that_of_one_process(more, tmp_path):
    for done in several(2, *toy(tmp_path, context_parallel=True, **SETTINGS, **more)):
        assert done.code == 0, done
    one = trained(**SETTINGS)
    assert curve(tmp_path, 'step', 'tokens', 'lr') == curve(one, 'step', 'tokens', 'lr')
    for key, count in (('train_loss', 6), ('val_loss', 3)):
        assert len(losses(one, key)) == count
        assert losses(tmp_path, key) == pytest.approx(losses(one, key), rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    settings = SETTINGS | dict(context_parallel=True)
    for done in pair(*toy(tmp_path / 'whole', **settings)):
        assert done.code == 0, done
    for done in pair(*toy(tmp_path / 'parts', **settings), before=at_step(25, EXIT)):
        assert done.code == 9, done
    for done in pair(*flags(init_from='resume', out_dir=tmp_path / 'parts')):
        assert done.code == 0, done
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


@pytest.mark.parametrize('settings, words', [
    (dict(block_size=31), 'block_size=31 must be a multiple of 2, the number of processes, when'),
    (dict(dropout=0.1), 'dropout=0.1 must be 0 when context_parallel=True'),
    (dict(compile=True), 'compile=True must be False when context_parallel=True'),
    (dict(objective='prefix'), 'objective=prefix must be next when context_parallel=True'),
    (dict(n_predict=2), 'n_predict=2 must be 1 when context_parallel=True'),
    (dict(attn='gau', pos='rope'), 'attn=gau must not be gau, which has no softmax whose parts could be'),
])
def test_what_cannot_be_parted_is_refused(settings, words, tmp_path):
    for done in pair(*toy(tmp_path / 'run', context_parallel=True, **settings)):
        assert_refused(done, words)


def test_one_process_has_nothing_to_share(tmp_path):
    assert_refused(python('train.py', *toy(tmp_path / 'run', context_parallel=True)),
                   'context_parallel=True must have several processes to share with: start it with torchrun, '
                   'or set --context_parallel=False')
