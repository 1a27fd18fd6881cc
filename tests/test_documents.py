"""Documents in a packed row: each is read as if it stood alone."""
import numpy as np
import pytest
import torch
from conftest import (
    assert_close,
    build,
    every_decoder_alone,
    families,
    fit,
    legal,
    random_flags,
    scaled,
    tokens,
    toy,
)
from runs import TOY as TOY_RUN
from runs import (
    assert_refused,
    assert_same_run,
    assert_survives_a_kill,
    dataset,
    documents,
    losses,
    pair,
    python,
    real_python,
    resume,
    train,
    train_settings,
)
from runs import flags as as_flags
from runs import toy as toy_run
from test_data import prepare
from test_sources import dealt_by_definition

import model as M
from data.loader import open_dataset, read_meta
from data.objectives import Diffusion, Mask, Next, Packed
from data.tokenizer import ByteTokenizer
from data.writer import write_dataset
from kernels import causal_conv
from kernels.causal_conv import conv_within
from model import GPT, GPTConfig, ops

T = 24
# of each row; one document has one token, one begins with the last token of a row
LENGTHS = [[3, 1, 7, 9, 4], [1, 1, 12, 5, 5], [23, 1], [24]]
SEED = train_settings()['seed']


def starts_of(lengths=LENGTHS):
    """(B,T) bool"""
    ends = [torch.tensor(row).cumsum(0) for row in lengths]
    starts = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, end in zip(starts, ends):
        row[torch.cat((end.new_zeros(1), end[:-1]))] = True
    return starts


def texts(x, lengths=LENGTHS):
    """The documents of the rows x (B,T,...), (1,n,...) each, in their order."""
    return [part.unsqueeze(0) for row, sizes in zip(x, lengths) for part in row.split(sizes)]


def double(flags, **more):
    return scaled(build(flags, **more), 3.0).double()


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def same_gradients(got, want, bound):
    assert got.keys() == want.keys()
    # where a gradient is 0 but for rounding, that is measured by the largest of all
    least = 1e-6 * max(g.abs().max().item() for g in want.values())
    for name, g in want.items():
        error = (got[name] - g).abs().max().item()
        assert error <= bound * max(g.abs().max().item(), least), f'{name}: error {error:.2e}'


def compare(model, flags, bound=1e-9):
    """Logits and gradients of packed rows, and of the documents alone."""
    idx, starts = tokens(flags, len(LENGTHS), T), starts_of()
    weight = torch.randn(len(LENGTHS), T, flags['vocab_size'], dtype=torch.float64,
                         generator=torch.Generator().manual_seed(1))
    packed = model(idx, starts=starts)[0]
    (packed * weight).sum().backward()
    grads = gradients(model)
    alone = [model(text)[0] for text in texts(idx)]
    sum((a * w).sum() for a, w in zip(alone, texts(weight))).backward()
    assert_close(packed, torch.cat(alone, 1).view_as(packed), bound, 'logits')
    same_gradients(grads, gradients(model), 10 * bound)


def without_encoder(flags):
    """Models that can read documents: those whose frequencies do not depend on the length of a text."""
    return (not flags.get('n_encoder') and flags.get('pos') != 'alibi_bf16'
            and flags.get('rope_scaling') not in M.ROPE_BY_LENGTH and not flags.get('dropout'))


def every_reader(test):
    found = {name: flags for name, flags in families().items() if without_encoder(flags)}
    return pytest.mark.parametrize('flags', list(found.values()), ids=list(found))(test)


# ----------------------------------------------------------------------------------------------------------
# The model


@every_reader
def test_documents_in_a_row_are_read_as_if_alone(flags):
    compare(double(flags), flags)


@random_flags(40, 5, of=without_encoder)
def test_documents_are_alone_under_any_flags(flags):
    compare(double(flags), flags)


def kinds():
    """{name: flags} of every letter of layer_pattern, every attention, recurrence, state space, ..."""
    patterns = {'-': '-a', 'n': 'an', 'v': 'av'}    # letters that stand beside another alone
    found = {f'letter {letter}': {'layer_pattern': patterns.get(letter, letter)} for letter in M.MIXERS}
    found |= {f'attn {attn} {pattern}': {'attn': attn, 'layer_pattern': pattern}
              for attn in M.ATTN for pattern in ('a', 'w', 'c', 'an', 'av')}
    found |= {f'rnn {rnn}': {'layer_pattern': 'r', 'rnn': rnn} for rnn in M.RNN}
    found |= {f'decay {decay} {erase}': {'layer_pattern': 'r', 'rnn_decay': decay, 'rnn_erase': erase}
              for decay in M.RNN_DECAY for erase in M.RNN_ERASE}
    found |= {f'input {word}': {'layer_pattern': 'r', 'rnn_input': word, 'rnn_erase': 'none',
                                'rnn_feature': 'elu1', 'rnn_unit': False} for word in M.RNN_INPUT}
    found |= {f'ssm {ssm}': {'layer_pattern': 'm', 'ssm': ssm} for ssm in M.SSM}
    found |= {f'pos {pos} {pattern}': {'pos': pos, 'layer_pattern': pattern}
              for pos in M.POSITIONS if pos != 'alibi_bf16' for pattern in ('a', 'w')}
    found |= {f'residual {residual}': {'residual': residual} for residual in M.RESIDUAL}
    found |= {'shift': {'layer_pattern': 'r', 'rnn_shift': True, 'rnn_conv': 0},
              'rotated': {'layer_pattern': 'r', 'rnn_rope': True, 'rnn_decay': 'retnet', 'rnn_erase': 'none'},
              'temperature': {'layer_pattern': 'an', 'temp_scale': 0.5, 'temp_floor': 3},
              'stride': {'layer_pattern': 'w', 'window_stride': 4, 'window_dilation': 2},
              'global tokens': {'layer_pattern': 'w', 'global_tokens': 2},
              'global, both sides': {'layer_pattern': 'w', 'global_tokens': 2, 'causal': False}}
    made = {}
    for name, flags in found.items():
        for rotates in ({}, {'pos': 'rope'}, {'pos': 'none'}):
            if legal(whole := fit(toy(**rotates | flags))):
                made[name] = whole
                break
    return made


KINDS = kinds()


def test_every_mixer_is_among_the_kinds():
    assert {letter for flags in KINDS.values() for letter in flags.get('layer_pattern', 'a')} >= set(M.MIXERS)
    for flag, table in (('attn', M.ATTN), ('rnn', M.RNN), ('ssm', M.SSM), ('rnn_decay', M.RNN_DECAY),
                        ('rnn_erase', M.RNN_ERASE), ('residual', M.RESIDUAL)):
        default = getattr(GPTConfig, flag)
        assert {flags.get(flag, default) for flags in KINDS.values()} >= set(table), flag


@pytest.mark.parametrize('flags', list(KINDS.values()), ids=list(KINDS))
def test_every_mixer_reads_documents_alone(flags):
    compare(double(flags), flags)


@every_decoder_alone
def test_decoding_goes_on_in_the_last_document(flags):
    """A first call with document starts, then single tokens: as the last document alone, in each row."""
    model, idx = double(flags), tokens(flags, 3, T)
    lengths = [[3, 1, 7, 9, 4], [1, 1, 12, 5, 5], [23, 1]]
    new = tokens(flags, 3, 4, seed=1)
    with torch.no_grad():
        cache = model.new_cache(3, 40)
        got = [model(idx, cache=cache, starts=starts_of(lengths))[0]]
        last = torch.tensor([[row[-1]] for row in lengths])
        got += [model(new[:, i:i + 1], cache=cache, pos=last + i)[0] for i in range(4)]
        assert_close(got[0], model(idx, starts=starts_of(lengths))[0], 1e-9, 'first call')
        for row, length in enumerate([4, 5, 1]):
            whole = torch.cat((idx[row:row + 1, T - length:], new[row:row + 1]), 1)
            want = model(whole)[0][0, length - 1:]
            assert_close(torch.cat([x[row, -1:] for x in got]), want, 1e-9, f'row {row}')
        cache = model.new_cache(3, 40)
        alone = model(idx, cache=cache, starts=starts_of(lengths), last_only=True)[0]
        assert_close(alone, got[0][:, -1:], 1e-9, 'the last token alone')


@pytest.mark.parametrize('name', ['llama_small', 'mamba2_small', 'mamba_small', 'gated_deltanet_small',
                                  'rwkv7_small', 's4d_small', 'streaming_small', 'lfm2_small'])
def test_documents_compile_to_one_graph(name):
    flags = next(flags for key, flags in families().items() if name in key.split('+'))
    model, idx, starts = build(flags).train(), tokens(flags, 4, T), starts_of()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    for forward in (compiled, model):
        forward(idx, idx, starts=starts)[1].backward()
        if forward is compiled:
            got = gradients(model)
    same_gradients(got, gradients(model), 1e-4)


def test_inductor_compiles_documents():
    flags = fit(toy(layer_pattern='ma', ffn_pattern='-', pos='rope'))
    model, idx, starts = build(flags), tokens(flags, 4, T), starts_of()
    torch._dynamo.reset()
    assert_close(torch.compile(model)(idx, starts=starts)[0], model(idx, starts=starts)[0], 1e-4, 'logits')


@pytest.mark.parametrize('ssm', ['mamba1', 'mamba2'])
@pytest.mark.parametrize('dtype, bound', [
    (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_state_spaces_forget_in_16_bits(ssm, dtype, bound):
    """To within the rounding of the numbers; steps as small as they are at first."""
    flags = fit(toy(layer_pattern='m', ssm=ssm, pos='none'))
    model, idx = build(flags).to(dtype), tokens(flags, len(LENGTHS), T)
    with torch.no_grad():
        packed = model(idx, starts=starts_of())[0]
        alone = torch.cat([model(text)[0] for text in texts(idx)], 1).view_as(packed)
    assert packed.dtype == dtype
    assert_close(packed, alone, bound, 'logits')


def test_a_step_that_forgets_writes_the_same_bits():
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, [0, 4, 5]] = True
    ctx = M.context_of_documents(build(toy()), starts, None)
    x, rate = torch.randn(1, 9, 3, 4).bfloat16(), torch.tensor([0.01, 1.0, 16.0])
    dt = torch.tensor([1e-3, 0.1, 3.0]).expand(1, 9, 3)
    fresh, longer = M.forget_by_step(ctx, x, dt, rate)
    assert torch.equal(fresh.float() * longer.unsqueeze(-1), x.float() * dt.unsqueeze(-1))
    forgotten = torch.exp(-longer * rate)
    assert forgotten[starts].max() <= 1e-60 and torch.equal(longer[~starts], dt[~starts])
    # a step that has underflowed forgets as well
    assert torch.exp(-M.forget_by_step(ctx, x, 0 * dt, rate)[1] * rate)[starts].max() <= 1e-60


@pytest.mark.parametrize('W, bias', [(4, True), (1, True), (3, False), (30, False)])
def test_taps_stay_in_their_documents(W, bias):
    x, weight, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                    for shape in ((4, T, 6), (6, W), (6,)))
    b = b if bias else None
    y = conv_within(x, weight, b, M.places(starts_of()))
    want = torch.cat([causal_conv(text, weight, b)[0] for text in texts(x)], 1).view_as(y)
    assert_close(y, want, 1e-12, 'y')
    dy, inputs = torch.randn_like(y), [v for v in (x, weight, b) if v is not None]
    for got, exact in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)):
        assert_close(got, exact, 1e-12, 'gradient')


def test_a_state_of_any_size_is_forgotten():
    """A document whose inputs are a million times as large as those of the next leaves nothing of itself."""
    plain = dict(rnn_unit=False, rnn_erase='none', rnn_feature='none', rnn_norm='none')
    for flags in (dict(ssm='mamba2'), dict(ssm='mamba1'), plain, dict(rnn='s4d'), dict(rnn='rwkv4')):
        letter = 'm' if 'ssm' in flags else 'r'
        model = double(fit(toy(pos='none', layer_pattern=letter, **flags)))
        ctx = M.context_of_documents(model, starts_of([[10, 14]]), None)
        mixer, x = model.h[0].mixer, torch.randn(1, T, 32, dtype=torch.float64)
        big = torch.cat((1e6 * x[:, :10], x[:, 10:]), 1)
        assert_close(mixer(big, ctx)[:, 10:], mixer(x, ctx)[:, 10:], 1e-9, str(flags))


def test_further_predictions_are_those_of_documents_alone():
    flags = toy(n_predict=2, layer_pattern='ar', pos='rope')
    model, idx = double(flags).train(), tokens(flags, len(LENGTHS), T + 1)
    x, y = idx[:, :-1], idx[:, 1:]
    packed = model(x, y, parts=True, starts=starts_of())[1]
    total, count = 0.0, 0
    for text, named in zip(texts(x), texts(y)):
        if text.shape[1] > 1:   # a mean of so many targets, for the last token has none
            total = total + model(text, named, parts=True)[1]['mtp'] * (text.shape[1] - 1)
            count += text.shape[1] - 1
    assert_close(packed['mtp'], total / count, 1e-9, 'loss')


def test_targets_of_further_predictions(monkeypatch):
    """Those that would lie in the next document are left out."""
    flags = toy(n_predict=3)
    model, idx, seen = build(flags).train(), tokens(flags, 1, 8), []
    monkeypatch.setattr(GPT, 'cross_entropy', lambda self, x, targets, *args: seen.append(targets) or x.sum())
    model(idx, torch.arange(1, 9).view(1, 8), starts=starts_of([[3, 1, 4]]))
    assert [row.tolist()[0] for row in seen] == [
        [1, 2, 3, 4, 5, 6, 7, 8], [2, 3, -1, -1, 6, 7, 8, -1], [3, -1, -1, -1, 7, 8, -1, -1]]


def test_places_gaps_and_the_first_token_of_a_row():
    starts = torch.tensor([[False, False, True, False, True], [True, True, True, False, False]])
    assert M.places(starts).tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 2]]
    ctx = M.context_of_documents(build(toy(layer_pattern='c', window=4, pos='rope')), starts, None)
    assert ctx.documents.gap == 12 and ctx.documents.starts[:, 0].all()
    assert ctx.pos.tolist() == [[0, 1, 12, 13, 24], [0, 12, 24, 25, 26]]


@pytest.mark.parametrize('flags, args, words', [
    ({}, dict(pos=torch.arange(T)), 'pos must be left out'),
    (dict(n_encoder=1), {}, 'n_encoder must be 0'),
    (dict(pos='alibi_bf16'), {}, 'pos must not be alibi_bf16'),
])
def test_what_cannot_be_packed_is_refused(flags, args, words):
    model = GPT(GPTConfig(**toy(**flags)))
    with pytest.raises(ValueError, match=words):
        model(tokens(toy(), 4, T), starts=starts_of(), **args)
    with pytest.raises(ValueError, match=words):
        model(tokens(toy(), 4, T), cache=model.new_cache(4, T), starts=starts_of(), **args)


def test_starts_belong_to_the_first_call():
    model = build(toy())
    cache = model.new_cache(4, 30)
    model(tokens(toy(), 4, T), cache=cache, starts=starts_of())
    with pytest.raises(ValueError, match='starts must be given on the first call'):
        model(tokens(toy(), 4, 2), cache=cache, starts=torch.ones(4, 2, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------
# Planted faults: each is one reason for the tests above


FAULTS = {
    'a tap crosses': ('s', lambda m: m.setattr(ops, 'conv_within', lambda x, w, b, place: ops.causal_conv(
        x, w, b)[0])),
    'a state leaks': ('r', lambda m: m.setattr(M, 'forget', lambda ctx, g: g)),
    'a state space leaks': ('m', lambda m: m.setattr(M, 'forget_by_step', lambda ctx, x, dt, rate: (x, dt))),
    'no window': ('a', lambda m: m.setattr(M, 'limits', lambda span, ctx: {
        'window': span.window, 'chunked': span.chunked, 'pattern': span.pattern})),
    'places of the row': ('a', lambda m: m.setattr(
        M, 'place_of', lambda ctx: ctx.pos if ctx.documents is None else torch.arange(T).expand(4, T))),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_seen(name, monkeypatch):
    letter, plant = FAULTS[name]
    flags = fit(toy(layer_pattern=letter, pos='learned'))
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        compare(double(flags), flags)


# ----------------------------------------------------------------------------------------------------------
# Data


def test_a_document_begins_with_the_token_that_ended_the_one_before():
    rows = np.array([[9, 1, 2, 9, 3, 9, 9, 4]])
    x, y, starts = Packed(Next(10, 0.15), 9)(rows, np.zeros(1, np.uint64))
    assert x.tolist() == [[9, 1, 2, 9, 3, 9, 9]] and y.tolist() == [[1, 2, 9, 3, 9, 9, 4]]
    assert starts.tolist() == [[True, False, False, True, False, True, True]]


@pytest.mark.parametrize('objective', [Mask, Diffusion])
def test_documents_begin_where_a_mask_hides_it_too(objective):
    rows, keys = np.full((50, 9), 9), np.arange(50, dtype=np.uint64)
    idx, *_, starts = Packed(objective(10, 0.5), 9)(rows, keys)
    assert starts.all() and (idx == 10).any()


def test_batches_say_where_documents_begin():
    data = open_dataset(dataset(), 32, 1, Packed(Next(257, 0.15), 256))
    x, y, starts = data.train_batch(0, 40)
    assert torch.equal(starts, x == 256) and starts.any() and starts.dtype == torch.bool
    plain = open_dataset(dataset(), 32, 1)
    assert all(torch.equal(a, b) for a, b in zip((x, y), plain.train_batch(0, 40)))
    *_, (x, y, starts) = data.eval_batches(7, None, full=True)
    assert len(x) == len(starts) == 7 and not starts[y.amax(1) < 0].any()


# ----------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope='module')
def short_texts(tmp_path_factory):
    """A dataset whose rows hold several documents, of odd lengths."""
    folder, rng = tmp_path_factory.mktemp('data') / 'short', np.random.default_rng(0)
    split = [(name, text[:rng.integers(3, 40)]) for name, text in documents(800)]
    write_dataset(folder, split, ByteTokenizer(), 'toy')
    return folder


def val_loss(out_dir, folder, packed):
    """The mean over the validation rows, of the documents of each row alone or of the rows as they are."""
    state = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    model = GPT(GPTConfig(**state['config'])).eval()
    model.load_state_dict(state['model'])
    return mean_loss(model, open_dataset(folder, 32, 1).eval_batches(8, 2048), packed)


@torch.no_grad()
def mean_loss(model, batches, packed):
    """The same for a model and batches of rows of 32 bytes, idx and targets (B,32)."""
    total, count = 0.0, 0
    for x, y in batches:
        for row, named in zip(x, y):
            cuts = (row == 256).nonzero().flatten().tolist() if packed else []
            cuts = [0, *(cut for cut in cuts if cut), 32]
            for a, b in zip(cuts, cuts[1:]):
                total += model(row[None, a:b], named[None, a:b])[1].item() * (b - a)
                count += b - a
    return total / count


@pytest.mark.parametrize('flags', [{}, {'layer_pattern': 'mr', 'pos': 'none', 'ssm_head_dim': 8}])
def test_training_reads_documents_alone(short_texts, flags):
    out, said = train(dataset=short_texts, doc_mask=True, **flags)
    plain, _ = train(dataset=short_texts, **flags)
    assert losses(out, 'val_loss')[-1] == pytest.approx(val_loss(out, short_texts, True), rel=1e-5)
    assert losses(plain, 'val_loss')[-1] == pytest.approx(val_loss(plain, short_texts, False), rel=1e-5)
    assert losses(out) != losses(plain) and 'bits per byte' in said


def test_resumed_and_shared_runs_are_the_same(short_texts, tmp_path):
    settings = dict(dataset=short_texts, doc_mask=True, gradient_accumulation_steps=2, batch_size=4)
    whole, _ = train(**settings)
    part, _ = train(tmp_path / 'part', **settings, max_iters=20)
    resume(part, max_iters=60)
    assert_same_run(whole, part)
    two = [done for done in pair(*toy_run(tmp_path / 'two', **settings))]
    assert all(done.code == 0 for done in two), two
    assert np.allclose(losses(tmp_path / 'two', 'val_loss'), losses(whole, 'val_loss'), rtol=1e-4)
    resumed = pair(*as_flags(init_from='resume', out_dir=tmp_path / 'two', max_iters=80, lr_decay_iters=80))
    assert all(done.code == 0 for done in resumed), resumed
    assert len(losses(tmp_path / 'two', 'val_loss')) > len(losses(whole, 'val_loss'))


def test_a_mixture_reads_documents_alone(short_texts, tmp_path):
    """The first step of training, the evaluations of both datasets, a resume after a kill, two processes."""
    other = dataset('other')
    settings = dict(dataset=f'{short_texts}:0.7,{other}:0.3', doc_mask=True, gradient_accumulation_steps=2,
                    batch_size=4, log_interval=1, eval_interval=5, max_iters=10)
    whole, said = train(tmp_path / 'whole', **settings)
    state = torch.load(whole / 'ckpt.pt', weights_only=True)
    rows = [open_dataset(folder, 32, SEED) for folder in (short_texts, other)]
    batches = [rows[which].train_batch(own, 1) for which, own in dealt_by_definition((0.7, 0.3), 8)]
    assert {which for which, _ in dealt_by_definition((0.7, 0.3), 8)} == {0, 1}
    untrained = GPT(GPTConfig(**state['config']), seed=SEED)
    assert losses(whole)[0] == pytest.approx(mean_loss(untrained, batches, True), rel=1e-5)
    assert losses(whole)[0] != pytest.approx(mean_loss(untrained, batches, False), rel=1e-5)
    for folder in short_texts, other:
        wanted = val_loss(whole, folder, True)
        assert losses(whole, 'val_losses')[-1][str(folder)] == pytest.approx(wanted, rel=1e-5)
        assert f'  {folder}: val loss {wanted:.4f}' in said
    assert_survives_a_kill(whole, tmp_path / 'part', 15, toy_run(tmp_path / 'part', **settings))
    two = pair(*toy_run(tmp_path / 'two', **settings))
    assert all(done.code == 0 for done in two), two
    for key in 'train_loss', 'val_loss':
        assert np.allclose(losses(tmp_path / 'two', key), losses(whole, key), rtol=1e-4)


def test_a_run_keeps_its_doc_mask(short_texts, tmp_path):
    run, _ = train(tmp_path / 'run', dataset=short_texts, doc_mask=True, max_iters=20)
    again = python('train.py', *as_flags(init_from='resume', out_dir=run, max_iters=40, doc_mask=False))
    assert_refused(again, 'doc_mask (checkpoint True, now False')
    done = python('train.py', *as_flags(init_from='resume', out_dir=run, eval_only=True, doc_mask=False))
    assert done.code == 0
    assert f'val loss {val_loss(run, short_texts, False):.4f}' in done.out


def test_an_encoder_reads_documents_alone(short_texts):
    out, _ = train(dataset=short_texts, doc_mask=True, objective='mask', causal=False, wandb_log=False)
    assert losses(out)[-1] < losses(out)[0]


@pytest.mark.parametrize('settings, words', [
    (dict(objective='prefix'), 'doc_mask=True must be False when objective=prefix'),
    (dict(objective='span', n_encoder=1), 'doc_mask=True must be False when objective=span'),
    (dict(pos='alibi_bf16'), 'doc_mask=True must be False when pos=alibi_bf16'),
    (dict(dataset='chars'), 'no end-of-text token parts documents'),
])
def test_what_has_no_documents_is_refused(settings, words, tmp_path):
    if settings.get('dataset') == 'chars':
        settings = dict(dataset=dataset('chars'))
    assert_refused(python('train.py', *toy_run(tmp_path / 'run', doc_mask=True, **settings)), words)


def test_one_text_on_several_processes_is_refused(tmp_path):
    done = pair(*toy_run(tmp_path / 'run', doc_mask=True, context_parallel=True))
    assert_refused(done[0], 'doc_mask=True must be False when context_parallel=True')


@pytest.mark.parametrize('n, flags', [(12, ['--val_input=held']), (100, []), (20, ['--val_fraction=0.5'])])
def test_the_remedy_for_documents_that_were_cut_works(n, flags, tmp_path, monkeypatch):
    """Few documents are cut, and no end follows there; each way that the refusal names keeps them whole."""
    for name, count in ('texts', n), ('held', 3):
        (tmp_path / name).mkdir()
        for i, (_, text) in enumerate(documents(count, seed=3)):
            (tmp_path / name / f'{i:03}.txt').write_text(text)

    def prepared(name, *more):
        command = 'text', '--input=texts', f'--out={tmp_path / name}', '--tokenizer=bytes', *more
        monkeypatch.chdir(tmp_path)
        assert prepare(monkeypatch, *command) is None
        return tmp_path / name
    if n < 100:
        refusal = python('train.py', *toy_run(tmp_path / 'run', dataset=prepared('cut'), doc_mask=True))
        assert_refused(refusal, 'doc_mask=True must be False for', '--val_input=, or 10 / val_fraction of')
    whole = prepared('whole', *flags)
    documents_in = [read_meta(whole)[f'{split}_documents'] for split in ('train', 'val')]
    ends = [int((np.fromfile(whole / f'{split}.bin', '<u2') == 256).sum()) for split in ('train', 'val')]
    assert ends == documents_in and sum(ends) == n + 3 * (flags == ['--val_input=held'])
    out, _ = train(dataset=whole, doc_mask=True, max_iters=2, eval_interval=1)
    assert losses(out, 'val_loss')[-1] == pytest.approx(val_loss(out, whole, True), rel=1e-5)


def test_a_sweep_may_vary_it_or_share_it(short_texts, tmp_path):
    """--doc_mask=True is for all arms but one that says otherwise; one that cannot have it is refused."""
    small = {name: x for name, x in TOY_RUN.items() if name not in ('eval_interval', 'lr_decay_iters')}
    sweep = ['ablate.py', 'config/llama_small.py', *as_flags(
        **small | dict(n_kv_head=1, max_iters=2, log_interval=1, dataset=short_texts, doc_mask=True, seeds=1,
                       evals=1, out_dir=tmp_path / 'sweep'))]
    refused = real_python(*sweep, '--vary=pos=alibi_bf16')
    assert_refused(refused, 'pos=alibi_bf16: doc_mask=True must be False when pos=alibi_bf16')
    done = real_python(*sweep, '--vary=doc_mask=False')
    assert done.code == 0 and 'doc_mask True -> False' in done.out, done
    for arm, packed in ('llama_small', True), ('doc_mask=False', False):
        out = tmp_path / 'sweep' / arm / 'seed1337'
        wanted, other = (val_loss(out, short_texts, flag) for flag in (packed, not packed))
        found = losses(out, 'val_loss')[-1]
        assert found == pytest.approx(wanted, rel=1e-6) and found != pytest.approx(other, rel=1e-6)
