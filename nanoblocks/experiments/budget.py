"""
Equal budgets (--match): the feed-forward of every arm is made wider or narrower until the arm has as many
parameters, or as many FLOPs per token, as the reference.
"""
import functools

import torch

from data.mixture import Sources
from model import GPT
from nanoblocks.experiments.arms import config_of

TOLERANCE = 0.01                    # largest relative difference between two matched budgets
WIDTHS = ('ffn_width', 'expert_width')
MATCHES = {'none': '', 'params': 'parameters', 'active': 'active parameters', 'flops': 'FLOPs per token'}


@functools.cache
def vocabulary(dataset):
    """The vocabulary size of a dataset, which train.py gives to the model. Prepares the dataset if needed."""
    sources = Sources(dataset)
    sources.ensure_prepared()
    return sources.read_meta()['vocab_size']


def cost(flags, match):
    """The parameters, the active parameters (used by one token) or the FLOPs per token of an arm."""
    config = config_of({'vocab_size': vocabulary(flags['dataset'])} | flags)
    with torch.device('meta'):
        model = GPT(config, seed=None)
    if match == 'flops':
        return model.flops_per_token(config.block_size)
    return model.num_params(active=match == 'active')


def resized(flags, width):
    """Flags with a dense ffn of this width; the experts that a token uses split the same width among them."""
    config, more = config_of(flags), {}
    if 'f' in config.ffns():
        more['ffn_width'] = width
    if 'e' in config.ffns():
        more['expert_width'] = max(1, round(width / max(1, config.n_expert_used + config.n_shared)))
    return flags | more


def hold_budget(flags, budget, match):
    """Flags whose cost is within TOLERANCE of the budget: unchanged, or with another ffn width."""
    def off(flags):
        return cost(flags, match) / budget - 1
    if abs(off(flags)) <= TOLERANCE:
        return flags
    if not config_of(flags).ffns() - {'-'}:
        raise ValueError(f'match={match} must have an ffn to resize, and this arm, {off(flags):+.1%} off, '
                         'has none: give it one, or use --match=none')
    low, high = 1, 64 * config_of(flags).n_embd
    while low < high:  # bisect for the first width that is not too cheap
        middle = (low + high) // 2
        if off(resized(flags, middle)) < 0:
            low = middle + 1
        else:
            high = middle
    best = min((resized(flags, width) for width in (max(1, low - 1), low)), key=lambda f: abs(off(f)))
    if abs(off(best)) > TOLERANCE:
        raise ValueError(f'match={match} must be reached within {TOLERANCE:.0%} by resizing the ffn, and the '
                         f'nearest width is {off(best):+.1%} off: change n_embd, or use --match=none')
    return best


def match_budgets(arms, reference, match):
    """({arm: flags with the budget of the reference}, {arm: how its widths changed, in words})"""
    budget, matched, notes = cost(arms[reference], match), {}, {}
    for name, flags in arms.items():
        try:
            matched[name] = hold_budget(flags, budget, match)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
        before, after = config_of(flags), config_of(matched[name])
        changed = [f'{width} {getattr(before, width)} -> {getattr(after, width)}' for width in WIDTHS
                   if getattr(before, width) != getattr(after, width)]
        if changed:
            off = cost(flags, match) / budget - 1
            notes[name] = (f'{", ".join(changed)}; {cost(matched[name], match):,} {MATCHES[match]}, '
                           f'{reference} has {budget:,} (without resizing {off:+.1%})')
    return matched, notes
