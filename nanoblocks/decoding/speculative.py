"""
Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192): a small model drafts a few
tokens, the large one reads them all in one pass, which takes hardly longer than one token, and keeps those it
agrees with. What comes out is distributed exactly as if the large model had drawn it alone:

    x ~ q is kept with probability min(1, p(x) / q(x)); at the first that is not, the token is drawn from
    what is left of p, max(0, p - q) / sum of it; when all are kept, one more is drawn from p.

Tokens that are not kept are taken back: caches of tokens by writing their positions anew (a window has as
many slots more as may be taken back), states of state spaces from a copy.

One row at a time: rows would agree with their drafts at different places.
Shapes: A tokens ahead, V vocabulary.
"""
import torch

from nanoblocks.decoding.decode import cache_slots, gumbel, key, uniform


def verdict(p, q, draft):
    """
    p (A+1,V) and q (A,V): probabilities of the large model and of the small one, which drew draft (A,) -> how
    likely each is to be kept (A,), and what to draw from if only so many are kept as the row says, (A+1,V).
    """
    drawn = draft.unsqueeze(-1)
    keep = (p[:-1].gather(-1, drawn) / q.gather(-1, drawn).clamp(min=1e-38)).clamp(max=1).squeeze(-1)
    left = (p[:-1] - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    # nothing is left where p and q are the same up to rounding, and then all are kept
    left = torch.where(total > 0, left / total.clamp(min=1e-38), p[:-1])
    return keep, torch.cat((left, p[-1:]))


class Chance:
    """All that is left to chance, from a seed."""

    def __init__(self, seed, row, device):
        self.key = key(torch.tensor(seed % 2 ** 63, device=device), torch.tensor(row, device=device))
        self.count = 0

    def next_key(self):
        self.count += 1
        return key(self.key, torch.tensor(self.count, device=self.key.device))

    def coins(self, probs):
        """probs (A,) -> (A,) bool, each True with its probability"""
        return uniform(self.next_key() + torch.arange(len(probs), device=probs.device)) < probs

    def pick(self, probs):
        """probs (V,) -> (1,) int64, distributed so"""
        ids = torch.arange(len(probs), device=probs.device)
        return (probs.log() + gumbel(self.next_key(), ids)).argmax(-1, keepdim=True)


class Side:
    """One of the two models, its cache, and how much of the text it has read."""

    def __init__(self, model, total, ahead, compiled=None):
        """compiled: passes over so many tokens are compiled, None for none; the rare others are not."""
        self.model, self.compiled = model, compiled
        self.fast = torch.compile(model, dynamic=False) if compiled else None
        self.cache = model.new_cache(1, cache_slots(model, total, compiled), spare=ahead)

    def prefill(self, idx, chunk):
        """Read all of idx (1,T) but its last token, which comes with what follows it."""
        for start in range(0, idx.shape[1] - 1, chunk):
            piece = idx[:, start:min(start + chunk, idx.shape[1] - 1)]
            pos = torch.arange(start, start + piece.shape[1], device=idx.device)
            self.model(piece, cache=self.cache, pos=None if start == 0 else pos, last_only=True)

    def logits(self, tokens, start):
        """Read tokens (N,) that belong from position `start` on -> (N,V)"""
        pos = torch.arange(start, start + len(tokens), device=tokens.device)
        run = self.fast if len(tokens) == self.compiled else self.model
        return run(tokens.unsqueeze(0), cache=self.cache, pos=pos)[0][0]

    def snapshot(self):
        return [entry.snapshot() for entry in self.cache]

    def restore(self, snapshot):
        for entry, state in zip(self.cache, snapshot):
            entry.restore(state)


class Speculative:
    """As decode.Decoder, for one row, with a draft `ahead` tokens long in each round."""

    def __init__(self, model, draft, idx, max_new_tokens, sampling, stop=None, seed=None, *, first_row=0,
                 ahead=4, chunk=2048, compiled=False):
        T = idx.shape[1]
        sizes = [m.lm_head.weight.shape[0] for m in (model, draft)]
        if idx.shape[0] != 1 or T == 0:
            raise ValueError(f'idx of shape {tuple(idx.shape)} must be one row of at least one token, as '
                             'a draft is for one text at a time')
        if sizes[0] != sizes[1]:
            raise ValueError(f'draft has a vocabulary of {sizes[1]} tokens and must have that of the model, '
                             f'{sizes[0]}: take a draft with the same tokenizer')
        if ahead < 1:
            raise ValueError(f'ahead={ahead} must be at least 1 token')
        for name, m in (('the model', model), ('draft', draft)):
            if m.wpe.max_tokens is not None and T + max_new_tokens > m.wpe.max_tokens:
                raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                                 f'block_size={m.wpe.max_tokens} of {name}, where learned positions end')
            if T + max_new_tokens > m.wpe.longest:
                raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                                 f'the {m.wpe.longest} tokens up to which {name} can reuse its cache')
        self.idx, self.max_new_tokens, self.sampling, self.ahead, self.chunk = (
            idx, max_new_tokens, sampling, ahead, chunk)
        self.stop = set() if stop is None else set(torch.as_tensor(stop).view(-1).tolist())
        seed = torch.randint(2 ** 62, ()).item() if seed is None else seed
        self.chance = Chance(seed, first_row, idx.device)
        self.model = Side(model, T + max_new_tokens, ahead, ahead + 1 if compiled else None)
        self.draft = Side(draft, T + max_new_tokens, ahead, 1 if compiled else None)
        self.cache, self.logprob = self.model.cache, None
        self.done = torch.zeros(1, 1, dtype=torch.bool)     # whoever reads the stream may end it
        self.proposed = self.kept = self.rounds = self.first_round = 0  # tokens, rounds, tokens of the first
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(1, sizes[0], dtype=torch.bool, device=idx.device).scatter_(1, idx, True)

    def probabilities(self, logits, drafted):
        """
        logits (N,V) -> (N,V) of what may be drawn there. drafted: tokens behind the text, of which row n has
        seen all but the last N - 1 - n.
        """
        if self.seen is None:
            return self.sampling.probabilities(logits)
        N, size = len(logits), len(drafted)
        seen = self.seen.repeat(N, 1)
        for n in range(N):
            seen[n, drafted[:size - (N - 1 - n)]] = True
        return self.sampling.probabilities(logits, seen)

    @torch.no_grad()
    def stream(self):
        """(1,1) int64 as each token is decided."""
        model, draft, T = self.model, self.draft, self.idx.shape[1]
        training = [side.model.training for side in (model, draft)]
        try:
            for side in (model, draft):
                side.model.eval()
                side.prefill(self.idx, self.chunk)
            token, unread, place, made = self.idx[0, -1:], self.idx[0, -1:], T - 1, 0
            while made < self.max_new_tokens:
                ahead = min(self.ahead, self.max_new_tokens - made - 1)
                new, logprobs, unread = self.round(token, unread, place, ahead)
                for n, one in enumerate(new.tolist()):
                    self.logprob = logprobs[n].view(1, 1)
                    yield new[n].view(1, 1)
                    made += 1
                    if one in self.stop or self.done:
                        return
                token, place = new[-1:], place + len(new)
        finally:
            for side, mode in zip((model, draft), training):
                side.model.train(mode)

    def round(self, token, unread, place, ahead):
        """
        token (1,) at `place`, which the model has not read; unread: the tokens up to it that the draft has
        not -> the next tokens (1 to ahead + 1,), their log-probabilities, those that the draft has not read.
        """
        drafted, q, states = token[:0], [], []
        read = unread
        for n in range(ahead):
            logits = self.draft.logits(read, place + 1 + n - len(read))[-1:]
            states.append(self.draft.snapshot())
            q.append(self.probabilities(logits, drafted))
            read = self.chance.pick(q[-1][0])
            drafted = torch.cat((drafted, read))
        before = self.model.snapshot()
        logits = self.model.logits(torch.cat((token, drafted)), place)               # (A+1,V)
        p = self.probabilities(logits, drafted)
        if ahead:
            keep, then = verdict(p, torch.cat(q), drafted)
            kept = int(self.chance.coins(keep).long().cumprod(0).sum())              # waits for the device
        else:
            kept, then = 0, p
        new = torch.cat((drafted[:kept], self.chance.pick(then[kept])))
        if kept < ahead:
            self.draft.restore(states[kept])
            if any(state is not None for state in before):
                self.model.restore(before)
                self.model.logits(torch.cat((token, drafted[:kept])), place)
        if self.seen is not None:
            self.seen[0, new] = True
        self.rounds, self.proposed, self.kept = self.rounds + 1, self.proposed + ahead, self.kept + kept
        self.first_round = self.first_round or len(new)
        logprobs = logits[:kept + 1].float().log_softmax(-1).gather(-1, new.unsqueeze(-1))
        # the last draft was never read by the one who made it
        return new, logprobs, new[-1:] if kept < ahead or not ahead else new[-2:]
