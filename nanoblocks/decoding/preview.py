"""Sample texts of a model in training, to read as well as its loss."""
import torch

from nanoblocks.decoding.decode import Sampling
from nanoblocks.decoding.unmask import MASK, mask_token, unmask
from nanoblocks.formats import first_line
from nanoblocks.tokenizer import from_meta

STEPS = 16      # in which missing tokens are filled in


def sample_texts(model, meta, count, max_tokens=200, rows=None):
    """
    `count` continuations of the prompt in a dataset's `meta`; or, with rows {idx, targets, ...} of the
    validation split as an objective makes them, what the model says about the first `count`. The seeds are
    0, 1, ... every time, so that only the weights make a difference between two evaluations. What fails here
    ends no training: the text then says why there is none.
    """
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            if rows is None:
                return texts(model, meta, count, max_tokens)
            said = answered if model.config.causal else filled
            return [said(model, from_meta(meta['tokenizer']), n, max_tokens,
                         **{name: x[n:n + 1] for name, x in rows.items()})
                    for n in range(min(count, len(rows['idx'])))]
    except Exception as error:  # such as a tokenizer that needs a network, or a prompt that is too long
        return [f'no text: {first_line(error)}'] * count
    finally:
        model.train(training)


def texts(model, meta, count, max_tokens):
    tokenizer = from_meta(meta['tokenizer'])
    first = tokenizer.encode('\n') if tokenizer.bos is None else [tokenizer.bos]
    prompt = tokenizer.encode(meta.get('prompt', '')) or first
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    room = max_tokens
    if model.wpe.max_tokens is not None:
        room = min(room, model.wpe.max_tokens - len(prompt))
    rows = [model.generate(idx, room, 0.8, top_k=200, seed=n)[0].tolist() for n in range(count)]
    # tokens that only round up the vocabulary have no text
    return [tokenizer.decode([t for t in row if t < tokenizer.vocab_size and t not in tokenizer.ends])
            for row in rows]


def answered(model, tokenizer, seed, max_tokens, idx, targets, source=None):
    """What is given in a row (1,T), an arrow, and what the model says next: of objectives prefix and span."""
    first = (targets[0] >= 0).nonzero()[0, 0].item()
    prompt, room = idx[:, :first + 1], min(max_tokens, idx.shape[1] - first - 1)
    given = {} if source is None else {'source': source}
    new = model.generate(prompt, room, 0.8, top_k=200, stop=list(tokenizer.ends) or None, seed=seed, **given)
    told = prompt if source is None else source
    return f'{readable(tokenizer, told[0])} => {readable(tokenizer, new[0, first + 1:])}'


def filled(model, tokenizer, seed, max_tokens, idx, targets, weights=None, starts=None):
    """A row (1,T) with what is missing, an arrow, and the row filled in: of objectives mask and diffusion."""
    idx = idx[:, :max_tokens]
    mask = mask_token(model, tokenizer)
    *_, whole = idx, *unmask(model, idx, mask, Sampling(0.8, 200), seed, STEPS)
    return f'{readable(tokenizer, idx[0], MASK)} => {readable(tokenizer, whole[0])}'


def readable(tokenizer, tokens, mark='<{}>'):
    """
    tokens (T,) as text, without those that end one, and without padding. Tokens beyond the vocabulary, which
    are marks, are shown as `mark` with their number.
    """
    pieces, text = [], []
    for token in [*tokens.tolist(), None]:
        if token is None or token >= tokenizer.vocab_size:
            pieces.append(tokenizer.decode(text))
            pieces += [] if token is None else [mark.format(token - tokenizer.vocab_size)]
            text = []
        elif token >= 0 and token not in tokenizer.ends:
            text.append(token)
    return ''.join(pieces)
