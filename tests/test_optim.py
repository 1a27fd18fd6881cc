"""Muon, groups, schedules, batch sizes, averaged weights, z-loss: each against its definition."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from runs import (
    assert_refused,
    assert_same_run,
    differences,
    load,
    losses,
    metrics,
    python,
    resume,
    toy,
    train,
    trained,
)

import kernels as ops
from kernels.linear_cross_entropy import linear_cross_entropy_reference
from nanoblocks.training import optim
from nanoblocks.training.parallel import MicroBatches

SHAPES = [(8, 8), (24, 8), (8, 24), (24, 8), (8, 8)]


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params, seed):
    for p, g in zip(params, weights(seed)):
        p.grad = g.data


def group(params, **more):
    return [{'params': params, 'names': [str(n) for n in range(len(params))]} | more]


def polar(x):
    """The nearest matrix to x, all of whose singular values are one."""
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def test_muon_is_its_definition():
    """Nesterov momentum, the update orthogonalised exactly, the decay: in float64, one matrix at a time."""
    ours = weights()
    opt = optim.Muon(group(ours), lr=0.02, weight_decay=0.1, dtype=torch.float32)
    want, momenta = [w.detach().double() for w in weights()], [0.0] * len(SHAPES)
    for step in range(1, 6):
        set_gradients(ours, step)
        opt.step()
        for i, g in enumerate(g.detach().double() for g in weights(step)):
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            update = polar(0.95 * momenta[i] + 0.05 * g)
            want[i] = want[i] * (1 - 0.02 * 0.1) - 0.02 * max(1, g.shape[0] / g.shape[1]) ** 0.5 * update
    for p, q, start in zip(ours, want, weights()):
        assert (p - q).norm() < 0.12 * (q - start).norm()


def test_muon_goes_where_that_of_torch_goes():
    """torch.optim.Muon has the iteration of Jordan et al., in bfloat16, one matrix at a time."""
    ours, theirs = weights(), weights()
    a = optim.Muon(group(ours), lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(1, 6):
        set_gradients(ours, step), set_gradients(theirs, step)
        a.step(), b.step()
    for p, q, start in zip(ours, theirs, weights()):
        assert F.cosine_similarity((p - start).flatten(), (q - start).flatten(), dim=0) > 0.97
        assert 0.8 < (p - start).norm() / (q - start).norm() < 1.25


def jordan(x):
    """Five steps of https://kellerjordan.github.io/posts/muon in float64, for x (m,n), m at most n."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def with_values(values, n, aligned=False):
    """A matrix (len(values),n) of these singular values, along the axes or along random directions."""
    generator, m = torch.Generator().manual_seed(0), len(values)
    if aligned:
        return torch.eye(m, n) * values[:, None]
    u, v = (torch.linalg.qr(torch.randn(k, m, generator=generator))[0] for k in (m, n))
    return u * values @ v.T


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(64, 64), (48, 80), (64, 256)])
def test_orthogonalize_is_nearer_to_the_exact_one_than_jordans_iteration(dtype, shape):
    m, n = shape
    for values in (torch.ones(m), 1 / torch.arange(1, m + 1), torch.logspace(0, -2, m),
                   torch.logspace(0, -4, m), torch.arange(1, m + 1) ** -0.5):
        random = with_values(values, n)
        for x in (random, 1e-6 * random, with_values(values, n, aligned=True)):
            exact = polar(x)
            for form in (x, x.mT):
                got = optim.orthogonalize(form[None].to(dtype))[0]
                distance = ((got if form is x else got.mT).double() - exact).norm()
                assert distance < 1.02 * (jordan(x) - exact).norm(), (values[-1], distance)


def test_no_rounding_lets_orthogonalize_grow():
    """Of few and of many directions, alike and of random strengths: values that lie anywhere in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    for m in (1, 2, 8, 64):
        for trial in range(40):
            values = torch.rand(m, generator=generator) ** (trial % 5 + 1)
            values[: trial % 4] = 1.0
            x = torch.stack([with_values(values, n, aligned) for n in (max(m, 8),) for aligned in (0, 1)])
            norms = torch.linalg.matrix_norm(optim.orthogonalize(x.bfloat16()).float(), 2)
            assert norms.max() < 1.3, (m, trial)
    assert not optim.orthogonalize(torch.zeros(2, 8, 16)).any()


def test_the_quintics_bring_singular_values_to_one():
    x = torch.logspace(math.log10(0.0015), 0, 5000, dtype=torch.float64)
    for a, b, c in optim.QUINTICS:
        x = a * x + b * x ** 3 + c * x ** 5
    assert (x - 1).abs().max() < 0.12


def test_cautious_decay_spares_weights_that_the_update_moves_away_from_zero():
    plain, decayed, cautious = weights(), weights(), weights()
    for params, decay, flag in ((plain, 0.0, False), (decayed, 0.5, False), (cautious, 0.5, True)):
        set_gradients(params, 1)
        optim.Muon(group(params), lr=0.1, weight_decay=decay, cautious=flag).step()
    for start, p, d, c in zip(weights(), plain, decayed, cautious):
        away = (p - start) * start > 0
        assert 0.2 < away.float().mean() < 0.8
        torch.testing.assert_close(c[away], p[away])
        torch.testing.assert_close(c[~away], d[~away])
        torch.testing.assert_close(d, p - 0.05 * start)


@pytest.mark.parametrize('make', [
    lambda params: optim.Muon(group(params), lr=0.1, weight_decay=0.5),
    lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
], ids=['muon', 'adamw'])
def test_a_step_with_found_inf_moves_nothing(make):
    params = weights()
    opt = make(params)
    set_gradients(params, 1)
    opt.step()
    before = [p.detach().clone() for p in params], [dict(opt.state[p]) for p in params]
    before = before[0], [{key: value.clone() for key, value in state.items()} for state in before[1]]
    set_gradients(params, 2)
    for p in params:
        p.grad[0, 0], p.grad[1, 1] = torch.nan, torch.inf
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert not differences(before, ([p.detach() for p in params], [dict(opt.state[p]) for p in params]))
    opt.found_inf = torch.tensor(0.0)
    set_gradients(params, 3)
    opt.step()
    assert all(not torch.equal(p, q) for p, q in zip(params, before[0]))


# ----------------------------------------------------------------------------------------------------------
# Groups


def test_rates_by_kind_and_by_name():
    """The last rule that fits wins, and the rates that are printed are those in use."""
    settings = dict(optimizer='muon', group_lr='vector=1e-3, h.1.*=5e-3,h.1.ffn.c_fc.weight=0.04', tie=False,
                    max_iters=5, eval_interval=5, decay_lr=False)
    state = load(trained(**settings))
    rates = {name: group['lr'] for opt in state['optimizers'] for group in opt['param_groups']
             for name in group['names']}
    assert rates.keys() == state['model'].keys()
    for name, rate in rates.items():
        matrix = name.startswith('h.') and name.endswith('weight') and 'ln_' not in name
        outer = name in ('wte.weight', 'wpe.weight', 'lm_head.weight')
        want = (0.04 if name == 'h.1.ffn.c_fc.weight' else 5e-3 if name.startswith('h.1.') else
                0.014 if matrix else 3e-3 if outer else 1e-3)
        assert rate == want, name


def test_groups_are_printed(tmp_path):
    out = train(tmp_path / 'run', optimizer='muon', group_lr='vector=1e-3', max_iters=1)[1]
    row = r'optimizer (\w+) for (\d+) tensors of kind (\w+), \S+ parameters: lr (\S+), weight decay (\S+)'
    rows = re.findall(row, out)
    assert rows == [('Muon', '8', 'matrix', '0.014', '0.1'), ('AdamW', '2', 'embedding', '0.003', '0.1'),
                    ('AdamW', '18', 'vector', '0.001', '0')]


@pytest.mark.parametrize('rule, words', [
    ('vector', ['group_lr=vector', 'embedding=3e-3']), ('vector=fast', ['group_lr=vector=fast']),
    ('vector=-1', ['group_lr=vector=-1']), ('vectors=1e-3', ['vectors', 'vector', 'matrix']),
])
def test_rules_that_fit_nothing_are_refused(tmp_path, rule, words):
    assert_refused(python('train.py', *toy(tmp_path / 'run', group_lr=rule)), *words)
    assert not (tmp_path / 'run').exists()


def test_moments_belong_to_names_not_to_places(tmp_path):
    """Other rates make other groups: each parameter finds its own moments again."""
    out_dir, _ = train(tmp_path / 'run', max_iters=20)
    resume(out_dir, max_iters=21, group_lr='h.0.*=1e-3', learning_rate=1e-12, min_lr=0.0)
    before, after = load(out_dir, 'ckpt.prev.pt'), load(out_dir)
    for name, moments in before['optimizers'][0]['state'].items():
        now = after['optimizers'][0]['state'][name]
        # a twentieth of the second moment is new
        one, two = moments['exp_avg_sq'].flatten(), now['exp_avg_sq'].flatten()
        assert F.cosine_similarity(one, two, dim=0) > 0.8, name
        assert now['step'] == 21


# ----------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize('schedule, want', [
    ('linear', lambda n: 0.1 + 0.9 * (1 - (n - 10) / 90)), ('constant', lambda n: 1.0),
    ('cosine', lambda n: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - 10) / 90))),
    ('wsd', lambda n: 1.0 if n < 80 else 0.1 + 0.9 * (1 - (n - 80) / 20)),
])
def test_schedules(schedule, want):
    for n in range(130):
        share = optim.lr_fraction(n, schedule, warmup=10, last=100, end=0.1, wsd_decay=0.2)
        assert share == pytest.approx((n + 1) / 11 if n < 10 else want(min(n, 100))), n


def test_the_batch_grows_to_its_size():
    for world in (1, 2, 4):
        sizes = [MicroBatches(16, 7, 0, world).count(n) for n in range(12)]
        assert sizes == sorted(sizes) and sizes[7:] == [16] * 5
        assert all(size % world == 0 for size in sizes) and sizes[0] == max(2, world)
    assert [MicroBatches(8, 0, 0, 2).count(n) for n in range(3)] == [8, 8, 8]


def test_batch_warmup_uses_every_window_once(tmp_path):
    """Sizes 1, 2, 3, 4, 4, ... are the first windows of the data, in order; tokens and a resume know it."""
    settings = dict(gradient_accumulation_steps=4, batch_warmup_iters=3, batch_size=2, max_iters=8,
                    log_interval=1, eval_interval=4, dropout=0.1)
    done = python('train.py', *toy(tmp_path / 'run', **settings), before="""
import data.loader
get = data.loader.Dataset.train_batch
def train_batch(self, first, count):
    print('rows', first, count)
    return get(self, first, count)
data.loader.Dataset.train_batch = train_batch""")
    rows = [tuple(map(int, pair)) for pair in re.findall(r'rows (\d+) (\d+)', done.out)]
    assert rows == [(2 * n, 2) for n in range(1 + 2 + 3 + 5 * 4)]
    tokens = [line['tokens'] for line in metrics(tmp_path / 'run') if 'train_loss' in line]
    assert tokens == [64 * n for n in (1, 3, 6, 10, 14, 18, 22, 26)]
    # the steps are as large as their number says, so the same curve comes in two parts
    parts, _ = train(tmp_path / 'parts', **settings | {'max_iters': 4, 'lr_decay_iters': 60})
    resume(parts, max_iters=8)
    assert_same_run(parts, tmp_path / 'run')


def test_batch_tokens_works_out_the_accumulation(tmp_path):
    run, out = train(tmp_path / 'run', batch_tokens=4 * 8 * 32, max_iters=5)
    assert '4 micro-batches of 8 x 32: 1,024 tokens' in out
    assert_same_run(run, trained(gradient_accumulation_steps=4, max_iters=5))
    assert_refused(python('train.py', *toy(tmp_path / 'no', batch_tokens=1000)), 'batch_tokens=1000', '256')
    assert_refused(python('train.py', *toy(tmp_path / 'no', batch_tokens=-256)), 'batch_tokens=-256')
    done = python('train.py', f'--out_dir={run}', '--init_from=resume', '--batch_tokens=512')
    assert_refused(done, 'gradient_accumulation_steps (checkpoint 4, now 2)', 'batch_tokens=1024')


# ----------------------------------------------------------------------------------------------------------
# z-loss and averages


@pytest.mark.parametrize('softcap', [None, 3.0])
def test_z_loss_and_its_gradient(softcap):
    """Against autograd through all logits, and against the definition."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 11))
    targets = torch.randint(-1, 11, (20,), generator=generator)
    grads = []
    for op in (ops.linear_cross_entropy, linear_cross_entropy_reference):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = op(a, b, targets, softcap, 0.1)
        (3 * loss).backward()
        grads.append((loss.detach(), a.grad, b.grad))
    for ours, want in zip(*grads):
        torch.testing.assert_close(ours, want)
    logits = x @ w.T if softcap is None else softcap * torch.tanh(x @ w.T / softcap)
    z = logits.logsumexp(-1)[targets >= 0].square().mean()
    torch.testing.assert_close(grads[0][0] - ops.linear_cross_entropy(x, w, targets, softcap), 0.1 * z)


def test_z_loss_is_for_training_alone():
    """The training loss includes it, and the validation loss does not."""
    plain, kept = trained(max_iters=20), trained(max_iters=20, z_loss=0.1)
    assert losses(kept)[0] > losses(plain)[0] + 1
    assert abs(losses(kept, 'val_loss')[-1] - losses(plain, 'val_loss')[-1]) < 0.5
    still = dict(learning_rate=1e-12, min_lr=0.0, max_iters=5, eval_interval=5)
    assert losses(trained(z_loss=0.1, **still), 'val_loss') == losses(trained(**still), 'val_loss')


def test_averaged_weights_are_the_average_and_become_the_best(tmp_path):
    """The average of the weights after each step, all saved here; ckpt.pt holds both."""
    settings = dict(max_iters=12, eval_interval=1, ema=0.8)
    done = python('train.py', *toy(tmp_path / 'run', **settings), before="""
import shutil
from nanoblocks.training import checkpoint
save = checkpoint.save
def kept(path, state, **more):
    save(path, state, **more)
    shutil.copy(path, path.replace('.pt', '.' + str(state['step'])))
checkpoint.save = kept""")
    assert done.code == 0, done
    steps = [torch.load(tmp_path / 'run' / f'ckpt.{n}', weights_only=True) for n in range(1, 13)]
    start = trained(max_iters=1, learning_rate=1e-30, min_lr=0.0, weight_decay=0.0)
    average = {name: w.double() for name, w in load(start)['model'].items()}
    for n, state in enumerate(steps):
        decay = min(0.8, (n + 1) / (n + 10))
        average = {name: decay * w + (1 - decay) * state['model'][name] for name, w in average.items()}
        for name, w in state['ema'].items():
            torch.testing.assert_close(w.double(), average[name], rtol=1e-4, atol=1e-6, msg=name)
    # training itself does not feel it
    assert losses(tmp_path / 'run') == losses(trained(**settings | {'ema': 0.0}))
    best = load(tmp_path / 'run', 'best.pt')
    newest = steps[best['step'] - 1]
    for name, w in best['model'].items():
        if name in newest['ema']:
            assert torch.equal(w, newest['ema'][name]) and not torch.equal(w, newest['model'][name])
    assert 'ema' not in best


def test_constant_reaches_no_min_lr():
    rates = {line['lr'] for line in metrics(trained(schedule='constant', warmup_iters=0, max_iters=20))}
    assert rates == {3e-3}
