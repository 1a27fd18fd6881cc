"""
What must never change: the weights that a seed draws, which depend on parameter names and on nothing else,
and the logits they give; and that checkpoints of earlier versions resume. Otherwise old runs could not be
reproduced.

promises.json holds one line per config file at toy size. A failure that is meant needs a new seed, not a new
line; only a new config adds one, and the failure prints it.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build, families, tokens
from runs import dataset, losses, python, resume

PROMISES = Path(__file__).with_name('promises.json')


@torch.no_grad()
def fingerprint(flags):
    """A number that depends on every weight and its name, and the first logits: alike on all machines."""
    model, total = build(flags), 0.0
    for name, p in sorted(model.named_parameters()):
        wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64) + sum(name.encode()))
        total += (p.double().flatten() * wave).sum().item()
    return {'weights': total, 'logits': model(tokens(flags, 1, 9))[0][0, -1, :4].tolist()}


@pytest.mark.parametrize('name', families())
def test_a_seed_draws_the_weights_it_always_drew(name):
    got = fingerprint(families()[name])
    want = json.loads(PROMISES.read_text())
    assert name in want, f'a new config: add "{name}": {json.dumps(got)}'
    assert got['weights'] == pytest.approx(want[name]['weights'], rel=1e-6, abs=1e-6)
    assert got['logits'] == pytest.approx(want[name]['logits'], rel=1e-3, abs=1e-5)


def test_no_promise_is_dropped():
    assert json.loads(PROMISES.read_text()).keys() == families().keys()


@pytest.fixture
def old_run(tmp_path):
    """The out_dir of a run that stopped at step 20, written before nanoblocks/ was a package."""
    (tmp_path / 'run').mkdir()
    shutil.copy(Path(__file__).with_name('old_run.pt'), tmp_path / 'run' / 'ckpt.pt')
    return tmp_path / 'run'


def test_a_checkpoint_of_an_earlier_version_resumes_as_it_did_then(old_run):
    resume(old_run, dataset=dataset('chars'), max_iters=40)
    want = [2.390711545944214, 2.3796916007995605, 2.3753457069396973, 2.3740243911743164]
    # Muon's polynomials have come nearer to the exact update since then
    assert losses(old_run) == pytest.approx(want, rel=3e-4)
    assert losses(old_run, 'val_loss') == pytest.approx([2.3724807500839233, 2.3604495525360107], rel=3e-4)


def test_a_checkpoint_of_an_earlier_version_is_sampled(old_run):
    done = python('sample.py', f'--out_dir={old_run}', '--ckpt=ckpt.pt', '--num_samples=1',
                  '--max_new_tokens=8')
    assert done.code == 0 and '8 tokens' in done.out, done
