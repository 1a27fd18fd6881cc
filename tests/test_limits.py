"""bench.py limits and peers: what they count is what a step runs, and who is missing is named."""
import math
import sys

import pytest
import runs
import torch

import bench
from model import GPT
from nanoblocks.experiments import limits, peers, timing

TOY = dict(n_layer=4, n_head=2, n_embd=32, block_size=16, vocab_size=64)
FLAGS = [f'--{name}={value}' for name, value in TOY.items()]


def case(name, dtype='float32', **flags):
    return limits.case_of(name, TOY | flags, '48', 48, dtype)


def counted(name, **options):
    """(step, its products, those within attention) of three sequences of a toy model."""
    step = limits.Step(case(name, n_layer=2, **options), 'cpu')
    attention = limits.attention_runs(step)
    with limits.Products() as within:
        for run in attention:
            run()
    return step, limits.products_of(step, attention), within.found


def sizes(products):
    """{(rows, inner, columns) of a product: how many there are}"""
    return limits.Counter(a.shape[-2:] + b.shape[-1:] for *_, a, b in (
        [arg for arg in product.args if isinstance(arg, limits.Layout)] for product in products))


@pytest.fixture
def settings(monkeypatch):
    """bench.py's settings, which main changes."""
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))


@pytest.mark.parametrize('dtype', limits.DTYPES)
def test_the_products_of_gpt2_are_those_on_paper(dtype):
    step, products, _ = counted('gpt2', dtype=dtype)
    N, C, V = 48, 32, 64  # 3 x 16 tokens
    # each of 4 linear layers of 2 blocks, and the head: forward, gradient of the input, of the weight
    want = limits.Counter()
    for inner, columns, times in ((C, 3 * C, 2), (C, C, 2), (C, 4 * C, 2), (4 * C, C, 2), (C, V, 1)):
        for size in ((N, inner, columns), (N, columns, inner), (columns, N, inner)):
            want[size] += times
    assert sizes(products) == want
    assert sum(product.flops() for product in products) == 6 * N * (2 * 12 * C * C + V * C)
    layouts = [arg for product in products for arg in product.args if isinstance(arg, limits.Layout)]
    assert {arg.dtype for arg in layouts} == {getattr(torch, dtype)}
    for p in step.model.parameters():
        assert p.grad is not None


def test_the_products_of_experts_are_counted_within_our_own_operation():
    step, products, _ = counted('mixtral')
    moe, N, C = step.model.moes[0], 48, 32
    E, used = moe.c.n_expert, moe.c.n_expert_used
    experts = 3 * used * moe.c.expert_width * C          # gate, up and down of each expert of a token
    dense = 4 * C * C + E * C                            # attention with as many keys as queries, router
    assert sum(product.flops() for product in products) == 6 * N * (2 * (experts + dense) + 64 * C)


def test_products_within_attention_count_as_attention():
    step, products, within = counted('gemma2')  # soft-capped scores have no fused attention on a CPU
    c = step.model.config
    assert len(within) == 2 * 6 and all(p.function.overloadpacket is torch.ops.aten.bmm for p in within)
    assert not any(p.function.overloadpacket is torch.ops.aten.bmm for p in products)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * c.ffn_width) + 64 * 32
    assert sum(product.flops() for product in products) == 6 * 48 * matrices


def test_a_replay_runs_every_product_on_numbers_of_the_same_layout():
    _, products, _ = counted('gpt2')
    run = limits.replay(products, 'cpu')
    with limits.Products() as again:
        run()
    assert [p.args for p in again.found] == [p.args for p in products]


def test_attention_alone_gives_the_gradients_it_gave_in_the_step(monkeypatch):
    step, seen = limits.Step(case('llama'), 'cpu'), []
    run, *_ = limits.attention_runs(step)
    monkeypatch.setattr(torch.autograd, 'grad', lambda y, inputs, grad: seen.append((y, inputs, grad)))
    run()
    (y, (q, k, v), grad), = seen
    assert y.shape == grad.shape == q.shape == k.shape == v.shape == (3, 16, 2, 16)
    scores = torch.einsum('bthd,bshd->bhts', q, k) / 4
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
    torch.testing.assert_close(y, torch.einsum('bhts,bshd->bthd', scores.softmax(-1), v))


def test_operators_are_grouped_and_their_shares_add_up():
    found = limits.Found(1000, step=10.0, passes=8.0, products=4.0, attention=1.0, llama=math.nan,
                         operators=limits.Counter({'mm': 3.0, 'copy_': 1.0, 'mul': 2.0, 'nobody knows': 2.0}))
    shares = limits.shares_row(found)
    assert shares == ['30%', '0%', '10%', '20%', '0%', '20%', '20%', 'mul 20%, nobody knows 20%, copy_ 10%']
    assert limits.times_row(found)[1:] == ['10.0', '4.0', '1.0', '2.50', '1.60', '-']
    names = [name for group in limits.GROUPS.values() for name in group]
    assert len(names) == len(set(names))


def test_the_default_is_every_family_at_tiny_and_two_at_the_size_of_gpt2():
    found = limits.cases({}, '', '', large=('gpt2', 'llama'))
    assert [c.label() for c in found if c.name == 'gpt2'] == [
        ('gpt2', '8 x 256', 'float32'), ('gpt2', '8 x 256', 'bfloat16'),
        ('gpt2', '2 x 512', 'float32'), ('gpt2', '2 x 512', 'bfloat16')]
    assert len(found) == 2 * len(limits.families()) + 4
    assert {(c.config.n_embd, c.config.vocab_size) for c in found} == {(256, 2048), (768, 50257)}
    given, = {c.name for c in limits.cases(TOY | {'norm': 'rmsnorm'}, '', '64', large=())}
    assert given == 'as given'


@pytest.mark.parametrize('models', ['', 'llama,mixtral'])
def test_limits_prints_a_row_for_each_model_and_number_type(models, settings, capsys):
    bench.main('limits', [*FLAGS, f'--models={models}', '--tokens=32', '--rounds=1'])
    printed = capsys.readouterr()
    rows = [line.strip('| ').split(' | ') for line in printed.out.splitlines() if line.startswith('| ')]
    names = models.split(',') if models else ['as given']
    want = [(name, '2 x 16', dtype) for name in names for dtype in limits.DTYPES]
    times, shares = rows[2:2 + len(want)], rows[4 + len(want):]
    assert [tuple(row[:3]) for row in times] == [tuple(row[:3]) for row in shares] == want
    for row in times:
        assert float(row[7]) > 1 and all(float(cell) > 0 for cell in row[4:9])
        assert row[9] == '-' if not models else float(row[9]) > 0
    for row in shares:
        assert 95 <= sum(int(cell.rstrip('%')) for cell in row[3:10]) <= 105
    assert f'[{len(want)}/{len(want)}]' in printed.err


@pytest.mark.parametrize('topic, options, words', [
    ('limits', ['--models=lama'], 'models=lama must be families, separated by commas: did you mean llama?'),
    ('limits', [*FLAGS, '--tokens=8'], 'tokens=8 must be at least block_size=16'),
    ('limits', ['--batch_size=4'], 'batch_size=4 must be left out: bench.py limits reads'),
    ('peers', ['--models=gemma2'], 'choose from gpt2, llama, mixtral, mamba, mamba2, gated_deltanet'),
    ('peers', ['--norm=rmsnorm'], 'norm=rmsnorm must be left out: the peers have these models as they are'),
    ('peers', ['--nanogpt=nowhere', *FLAGS, '--models=gpt2'], 'nanogpt=nowhere must be the folder of a'),
])
def test_what_cannot_be_measured_is_refused(topic, options, words, settings):
    with pytest.raises(SystemExit) as refusal:
        bench.main(topic, options)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------
# Peers


def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(settings, monkeypatch, capsys):
    for peer in peers.PEERS.values():
        monkeypatch.setitem(sys.modules, peer.module, None)
    monkeypatch.setattr(peers, 'find_spec', lambda name: None)
    bench.main('peers', [*FLAGS, '--models=gpt2', '--tokens=32', '--rounds=1'])
    printed = capsys.readouterr().out
    for name, remedy in (('nanoGPT', 'name the folder of a checkout with --nanogpt=FOLDER'),
                         ('litgpt', 'pip install litgpt'), ('x-transformers', 'pip install x-transformers'),
                         ('transformers', 'pip install transformers'), ('mamba.py', 'pip install mambapy')):
        assert f'{name} is left out: {remedy}\n' in printed
    assert 'with a cache' not in printed and '| gpt2 ' not in printed


NANOGPT = '''
from dataclasses import dataclass
import torch, torch.nn as nn, torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.wte = config, nn.Embedding(config.vocab_size, config.n_embd)
    def forward(self, x, y):
        logits = F.linear(self.wte(x), self.wte.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten()) * SCALE
'''


def test_peers_trains_them_in_turns_and_compares_parameters_and_losses(settings, tmp_path, capsys):
    pytest.importorskip('transformers')
    (tmp_path / 'model.py').write_text(NANOGPT.replace('SCALE', '1'))
    bench.main('peers', [*FLAGS, '--models=gpt2,mamba2', '--n_embd=64', '--tokens=32', '--rounds=1',
                         f'--nanogpt={tmp_path}'])
    printed = capsys.readouterr().out
    rows = [line.strip('| ').split(' | ') for line in printed.splitlines() if line.startswith('| ')]
    steps = {(row[0], row[2], row[3]): row for row in rows if len(row) == 9}
    assert len(steps) >= 2 + 3 * 2  # two rows of heads
    for dtype in limits.DTYPES:
        for name in ('gpt2', 'mamba2'):
            row = steps[name, dtype, 'transformers']
            ours, theirs = row[8].split()
            assert row[7] == 'equal' and abs(float(ours) - float(theirs)) <= 2e-4 and float(row[6]) > 0
        assert steps['gpt2', dtype, 'nanoGPT'][7].endswith(f' against {64 * 64:,}')
    cached = [row for row in rows if len(row) == 6 and row[0] == 'gpt2']
    assert [row[2] for row in cached] == 2 * ['14 tokens of a prompt', 'the same in pieces of 4',
                                              'a token after them']


def test_a_loss_that_is_not_finite_ends_the_comparison(settings, tmp_path):
    (tmp_path / 'model.py').write_text(NANOGPT.replace('SCALE', 'float("nan")'))
    with pytest.raises(SystemExit) as refusal:
        bench.main('peers', [*FLAGS, '--models=gpt2', '--tokens=32', '--rounds=1', f'--nanogpt={tmp_path}'])
    assert 'the loss of nanoGPT must be finite, not nan' in str(refusal.value)


def test_dropout_of_transformers_is_off_in_its_training_too():
    pytest.importorskip('transformers')
    theirs = peers.transformers_any(GPT(case('gpt2').config), '').train()
    x = torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert torch.equal(theirs(x, x)[1], theirs(x, x)[1])


@pytest.mark.parametrize('peer, name', [(peer, name) for peer, entry in peers.PEERS.items() if entry.module
                                        for name in entry.builds])
def test_a_peer_has_the_parameters_of_ours(peer, name):
    if peers.remedy_for(peer, ''):
        pytest.skip(peers.remedy_for(peer, ''))
    ours = GPT(case(name, n_embd=64).config)
    theirs = peers.PEERS[peer].builds[name](ours, '')
    if peer == 'x-transformers':  # its gated feed-forwards have a bias whatever is asked for
        bias = 2 * 2 * ours.config.ffn_width
        assert peers.parameters(ours, theirs) == f'{ours.num_params():,} against {ours.num_params() + bias:,}'
    else:
        assert peers.parameters(ours, theirs) == 'equal'
    assert math.isfinite(peers.first_loss(theirs, peer, case(name)))


# ----------------------------------------------------------------------------------------------------------


def test_rows_are_printed_as_they_come(capsys):
    def rows():
        yield 'a', 1
        assert capsys.readouterr().out.splitlines() == ['| x | y |', '| --- | --- |', '| a | 1 |']
        yield 'b', 2
    timing.print_markdown(['x', 'y'], rows())
    assert capsys.readouterr().out == '| b | 2 |\n'


def test_rounds_are_few_where_each_is_long(settings, monkeypatch):
    seen = {}
    for topic in ('limits', 'norms'):
        monkeypatch.setitem(bench.TOPICS, topic,
                            lambda rounds, device, topic=topic: seen.update({topic: rounds}))
        bench.main(topic, [])
        monkeypatch.setattr(bench, 'rounds', None)
    assert seen == {'limits': 3, 'norms': 30}


def test_the_laptop_config_trains_three_steps(tmp_path):
    done = runs.python('train.py', 'config/shakespeare_char_laptop.py', '--compile=False', '--max_iters=3',
                       '--batch_size=2', '--eval_tokens=512', f'--dataset={runs.dataset("chars")}',
                       f'--out_dir={tmp_path / "run"}')
    assert done.code == 0 and not done.err, done
    assert runs.load(tmp_path / 'run')['step'] == 3
