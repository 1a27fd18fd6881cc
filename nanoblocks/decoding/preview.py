"""Sample texts of a model in training, to read as well as its loss."""
import torch

from nanoblocks.formats import first_line
from nanoblocks.tokenizer import from_meta


def sample_texts(model, meta, count, max_tokens=200):
    """
    `count` continuations of the prompt in a dataset's `meta`. The seeds are 0, 1, ... every time, so that
    only the weights make a difference between two evaluations. What fails here ends no training: the text
    then says why there is none.
    """
    training = model.training
    try:
        return texts(model, meta, count, max_tokens)
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
    with torch.compiler.set_stance('force_eager'):
        rows = [model.generate(idx, room, 0.8, top_k=200, seed=n)[0].tolist() for n in range(count)]
    # tokens that only round up the vocabulary have no text
    return [tokenizer.decode([t for t in row if t < tokenizer.vocab_size and t not in tokenizer.ends])
            for row in rows]
