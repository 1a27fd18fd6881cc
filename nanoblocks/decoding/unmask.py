"""
What an encoder can say: which tokens are missing, and how well each token fits among all others.

A text is completed in steps. In each, all missing tokens are drawn, and the surest of them stay, so many that
every step fills as many (LLaDA: Nie et al. 2025, https://arxiv.org/abs/2502.09992). One step for each missing
token is the slowest and the best; one step for all of them draws each without knowing the others.
"""
import itertools

import torch

from nanoblocks.decoding.decode import check_seed, key
from nanoblocks.tokenizer import mask_of

MASK = '[MASK]'     # how a text says that a token is missing


def mask_token(model, tokenizer):
    """The id of the token that stands for a missing one; ValueError if the model has none."""
    own = mask_of(tokenizer.meta())     # as objectives.objective_of
    if own is not None:
        return own
    if tokenizer.vocab_size < model.wte.weight.shape[0]:
        return tokenizer.vocab_size     # objectives.Mask
    raise ValueError(f'vocab_size={tokenizer.vocab_size} must leave a token for {MASK}: train with '
                     '--objective=mask or diffusion')


SPAN = '<extra_id_{}>'      # the names that T5 gives to missing spans, from 0 on


def span_marks(tokenizer):
    """The ids of those names in the vocabulary of a checkpoint, in their order; [] where it has none."""
    published = getattr(tokenizer, 'tokenizer', None)
    ids = (published.token_to_id(SPAN.format(n)) for n in itertools.count()) if published is not None else ()
    return list(itertools.takewhile(lambda i: i is not None, ids))


@torch.no_grad()
def unmask(model, idx, mask, sampling, seed, steps=None, first_row=0):
    """
    idx (R,T) int64, as many missing tokens in each row -> yields idx after each of `steps` steps (None: one
    for each missing token), the last without any. first_row: number of the first row, which seeds its draws.
    """
    check_seed(seed)
    device, missing = idx.device, idx == mask
    rows = torch.arange(first_row, first_row + len(idx), device=device).unsqueeze(-1)
    keys = key(torch.tensor(seed, device=device), rows, torch.arange(idx.shape[1], device=device))  # (R,T)
    left = missing.sum(-1).max().item()
    steps = min(left, steps or left)
    for step in range(steps):
        logits = model(idx)[0]
        drawn = sampling.draw(logits.flatten(0, 1), keys.flatten().unsqueeze(-1)).view_as(idx)
        sure = logits.float().log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        stays = -(-left // (steps - step))
        best = sure.masked_fill(~missing, -torch.inf).topk(stays, -1).indices
        now = torch.zeros_like(missing).scatter(-1, best, True) & missing
        idx, missing, left = torch.where(now, drawn, idx), missing & ~now, left - stays
        yield idx


@torch.no_grad()
def pseudo_logprobs(model, tokens, mask, window, rows=16):
    """
    tokens (N,) int64 -> (N,) fp32: log-probability, in nats, of each token where it alone is missing, given
    up to `window` tokens around it (Salazar et al. 2020, https://arxiv.org/abs/1910.14659).
    """
    N, window = len(tokens), min(window, len(tokens))
    at = torch.arange(N, device=tokens.device)
    starts = (at - window // 2).clamp(0, N - window)
    found = []
    for at_rows, begins in zip(at.split(rows), starts.split(rows)):
        idx = tokens[begins.unsqueeze(-1) + at[:window]]
        place = (at_rows - begins).unsqueeze(-1)
        logits = model(idx.scatter(-1, place, mask))[0]
        logits = logits.gather(1, place.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).squeeze(1).float()
        found.append(logits.log_softmax(-1).gather(-1, tokens[at_rows].unsqueeze(-1)).squeeze(-1))
    return torch.cat(found)
