"""
What a model learns to say about a row of text: which tokens it reads, and which it must name.

    next        each token's next one                       a decoder
    mask        the tokens that were masked (BERT)          an encoder: causal=False
    diffusion   the same, of any share of them (LLaDA)      an encoder: causal=False

An objective is called with rows (n,T+1) and a key for each row, from which all its draws are hashed: a row is
masked alike in every run that has the seed, whatever its other flags, and in a run that is resumed.
"""
import numpy as np
import torch

from .loader import inputs_and_targets, mix


def noise(keys, columns, purpose):
    """Pseudo-random 64-bit integers, uint64 (n,columns), of keys (n,) and a number for what they decide."""
    return mix(mix(keys + np.uint64(purpose))[:, None] + np.arange(columns, dtype=np.uint64))


def uniform(keys, columns, purpose):
    """The same as numbers in [0, 1)."""
    return (noise(keys, columns, purpose) >> 11) * 2.0 ** -53


class Next:
    names = 'idx', 'targets'    # of the tensors that a batch has, as the model calls them
    more = 0                    # tokens beside those of the dataset
    causal = True               # the model that it needs
    whole = True                # the loss is of every token, so that it is bits per byte as well
    told = ', {bits:.4f} bits per byte'     # behind a validation loss

    def __init__(self, vocab_size, mask_rate):
        self.vocab_size, self.mask_rate = vocab_size, mask_rate

    def __call__(self, rows, keys):
        return inputs_and_targets(rows)


class Mask(Next):
    """
    A share mask_rate of each row's tokens is to be named: 80 % of them are replaced by the mask, 10 % by any
    token, and 10 % stay (Devlin et al. 2018, https://arxiv.org/abs/1810.04805). The mask is the token after
    the dataset's last.
    """
    more, causal, whole, told = 1, False, False, ' of masked tokens'

    def __call__(self, rows, keys):
        x = rows[:, :-1]
        n, T = x.shape
        chosen = self.ranks(keys, T) < max(1, round(self.mask_rate * T))
        kind = uniform(keys, T, 2)
        other = np.where(kind < 0.8, self.vocab_size, noise(keys, T, 3) % self.vocab_size)
        seen = np.where(chosen & (kind < 0.9), other.astype(np.int64), x)
        return torch.from_numpy(seen), torch.from_numpy(np.where(chosen, x, -1))

    def ranks(self, keys, T):
        """A random order of each row's tokens, (n,T): those below m are m tokens at random."""
        return noise(keys, T, 1).argsort(-1).argsort(-1)


class Diffusion(Mask):
    """
    Any number m of a row's T tokens, 1 to T alike, is masked, and each of them weighs T / m: a bound on the
    loss of the whole row (LLaDA: Nie et al. 2025, https://arxiv.org/abs/2502.09992).
    """
    names = 'idx', 'targets', 'weights'
    whole, told = True, ', at most {bits:.4f} bits per byte'

    def __call__(self, rows, keys):
        x = rows[:, :-1]
        n, T = x.shape
        m = 1 + (noise(keys, 1, 2) % np.uint64(T)).astype(np.int64)                 # (n,1)
        chosen = self.ranks(keys, T) < m
        weights = np.broadcast_to(T / m, x.shape).astype(np.float32)
        return (torch.from_numpy(np.where(chosen, self.vocab_size, x)),
                torch.from_numpy(np.where(chosen, x, -1)), torch.from_numpy(weights))


OBJECTIVES = {'next': Next, 'mask': Mask, 'diffusion': Diffusion}
