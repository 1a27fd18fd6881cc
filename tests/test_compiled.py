"""
What torch.compile makes of a training step: one graph, and the gradients of the same step without it. The
graphs are traced forward and backward and run by PyTorch, in place of a minute of C++ for each.
"""
import conftest
import pytest
import torch
from conftest import assert_close, build, every_family, scaled, tokens, toy

import model as model_file
from nanoblocks.training import parallel

BF16 = torch.bfloat16
LLAMA = toy(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False)


def loss_and_gradients(model, step, flags, autocast):
    """The loss of step(idx, targets), and {name: gradient} of the model."""
    idx = tokens(flags, 3, 17)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of dropout
    with torch.autocast('cpu', BF16, enabled=autocast):
        loss = step(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_family
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'autocast'])
def test_compiled_gradients_are_those_of_the_eager_step(flags, autocast):
    torch._dynamo.reset()
    model = scaled(build(flags), 2).train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    want_loss, want = loss_and_gradients(model, model, flags, autocast)
    got_loss, got = loss_and_gradients(model, compiled, flags, autocast)
    rounding = 2 ** -7 if autocast else 1e-5
    assert_close(got_loss, want_loss, rounding, 'loss')
    assert want.keys() == got.keys()
    largest = max(g.abs().max() for g in want.values())
    for name, g in want.items():
        # beside a gradient that all but cancels, what it is summed from is the measure of its rounding
        error, bound = (got[name] - g).norm(), rounding * (10 * g.norm() + largest / 10)
        assert error <= bound, f'gradient of {name}: error {error:.2e} must be at most {bound:.2e}'


class Graphs:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


# {name: (flags, graphs, graphs where the backward pass computes blocks again)}; a block with experts that is
# computed again meets the losses of its first time, which are one graph more
DEEP = {
    'gpt2': (toy(), 1, 1),
    'llama': (LLAMA, 1, 1),
    # layers with a window and layers without
    'two kinds of attention': (LLAMA | dict(layer_pattern='wa', window=5, rope_local_theta=50.0), 2, 2),
    'experts': (LLAMA | dict(ffn_pattern='e', n_expert=4), 1, 2),
    'experts in every other layer': (LLAMA | dict(ffn_pattern='fe', n_expert=4), 2, 3),
}


@pytest.mark.parametrize('recompute', [False, True], ids=['plainly', 'recomputed'])
@pytest.mark.parametrize('kind', DEEP)
def test_blocks_that_are_compiled_one_by_one_share_a_graph_for_each_kind(kind, recompute, monkeypatch):
    flags, *kinds = DEEP[kind]
    torch._dynamo.reset()
    graphs, compiler = Graphs(), torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, mode: compiler(f, backend=graphs, fullgraph=True))
    model = build(flags, n_layer=12).train()
    monkeypatch.setattr(parallel, 'shard', lambda model, dtype: model)
    parallel.wrap(model, 'float32', compile_mode='default', recompute=recompute, sharded=not recompute)
    loss_and_gradients(model, model, flags, autocast=False)
    assert graphs.count == kinds[recompute], f'12 blocks made {graphs.count} graphs of {kinds[recompute]}'


EXTRAS = {'value embeddings': toy(pos='rope', layer_pattern='w', window=5, value_embed=True),
          'norms of heads': toy(pos='rope', layer_pattern='w', window=5, qk_norm='heads'),
          'a temperature': toy(pos='rope', layer_pattern='wn', window=5, temp_scale=0.5)}
NARROW = {**conftest.families(), **EXTRAS}


@pytest.mark.parametrize('flags', NARROW.values(), ids=NARROW)
def test_queries_keys_and_values_are_of_one_dtype_under_autocast(flags, monkeypatch):
    # the kernels refuse a mixture, and a mask of T x T numbers takes their place
    seen, attention = [], model_file.ops.attention

    def watched(q, k, v, *rest, **more):
        seen.append({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v, *rest, **more)
    monkeypatch.setattr(model_file.ops, 'attention', watched)
    model, idx = build(flags).train(), tokens(flags, 2, 12)
    with torch.autocast('cpu', BF16):
        model(idx, idx)
    softmax = model.config.attends() and model.config.attn != 'gau'
    assert all(dtypes == {BF16} for dtypes in seen) and bool(seen) == softmax, seen
