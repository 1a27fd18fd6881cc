"""How likely a given text is: log-probability of each token, perplexity, bits per byte."""
import math
from typing import NamedTuple

import torch


@torch.no_grad()
def token_logprobs(model, tokens, window, step=None):
    """
    tokens (N,) int64 -> (N-1,) fp32: log-probability, in nats, of every token but the first, given the tokens
    before it. A text longer than `window` tokens is cut into windows that overlap by half, so that every
    token is predicted from at least window // 2 tokens. step: tokens of one forward pass, through a cache as
    in sampling; None: a window.
    """
    window, start, scored, training = max(2, window), 0, 1, model.training
    parts = [torch.zeros(0, device=tokens.device)]
    model.eval()
    while scored < len(tokens):
        piece = tokens[start:start + window]
        logits = logits_of(model, piece[:-1].unsqueeze(0), step)[0, scored - start - 1:].float()
        chosen = logits.gather(-1, piece[scored - start:].unsqueeze(-1)).squeeze(-1)
        parts.append(chosen - logits.logsumexp(-1))
        scored = start + len(piece)
        start = scored - window // 2
    model.train(training)
    return torch.cat(parts)


def logits_of(model, idx, step):
    """idx (1,T) -> (1,T,V), in passes of `step` tokens"""
    if step is None:
        return model(idx)[0]
    pos, cache = torch.arange(idx.shape[1], device=idx.device), model.new_cache(1, idx.shape[1])
    pieces = zip(idx.split(step, 1), pos.split(step))
    return torch.cat([model(piece, cache=cache, pos=where)[0] for piece, where in pieces], 1)


class Score(NamedTuple):
    """How likely the tokens of a text are, each given the tokens before it."""
    tokens: list            # the first one is given, not scored
    logprobs: list          # of all tokens but the first, in nats
    nats: float             # the sum of logprobs
    bytes: int              # length of the scored text in UTF-8

    @property
    def perplexity(self):
        return math.exp(-self.nats / len(self.logprobs))

    @property
    def bits_per_byte(self):
        return -self.nats / math.log(2) / max(1, self.bytes)
