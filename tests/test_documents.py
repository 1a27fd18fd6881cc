"""Documents in a packed row: each is read as if it stood alone."""
import pytest
import torch
from conftest import assert_close, build, every_decoder_alone, families, fit, scaled, tokens, toy

T = 24
# of each row; one document has one token, one begins with the last token of a row
LENGTHS = [[3, 1, 7, 9, 4], [1, 1, 12, 5, 5], [23, 1], [24]]


def starts_of(lengths=LENGTHS):
    """(B,T) bool"""
    ends = [torch.tensor(row).cumsum(0) for row in lengths]
    starts = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, end in zip(starts, ends):
        row[torch.cat((end.new_zeros(1), end[:-1]))] = True
    return starts


def texts(idx, lengths=LENGTHS):
    """The documents of the rows, (1,n) each, in their order."""
    return [part.unsqueeze(0) for row, sizes in zip(idx, lengths) for part in row.split(sizes)]


def double(flags, **more):
    return scaled(build(flags, **more), 3.0).double()


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def compare(model, flags, bound):
    """Logits and gradients of packed rows and of the documents alone."""
    idx, starts = tokens(flags, len(LENGTHS), T), starts_of()
    weight = torch.randn(len(LENGTHS), T, flags['vocab_size'], dtype=torch.float64,
                         generator=torch.Generator().manual_seed(1))
    packed = model(idx, starts=starts)[0]
    (packed * weight).sum().backward()
    grads = gradients(model)
    alone = [model(text)[0] for text in texts(idx)]
    sum((a * w).sum() for a, w in zip(alone, texts(weight))).backward()
    whole = torch.cat(alone, 1).view_as(packed)
    assert_close(packed, whole, bound, 'logits')
    for name, want in gradients(model).items():
        assert_close(grads[name], want, 10 * bound, name)
    return whole


def readers(test):
    """The test once for each config file at toy size that has no encoder beside a decoder."""
    found = {name: flags for name, flags in families().items() if not flags.get('n_encoder')}
    return pytest.mark.parametrize('flags', list(found.values()), ids=list(found))(test)


@readers
def test_documents_in_a_row_are_read_as_if_alone(flags):
    compare(double(flags), flags, 1e-9)
