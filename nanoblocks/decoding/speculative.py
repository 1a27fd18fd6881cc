"""
Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). A small model, the draft,
proposes a few tokens. The large model reads all of them in one pass, which takes hardly longer than reading
one token, and accepts a prefix of them. The text is distributed exactly as if the large model drew it alone:

    A proposed token x ~ q is accepted with probability min(1, p(x) / q(x)). The first rejected token is
    replaced by a draw from the residual distribution, max(0, p - q) normalised to 1. If all tokens are
    accepted, one more is drawn from p.

Rejected tokens are rolled back. In a cache of tokens, the next tokens overwrite their positions (a sliding
window has spare slots for this); a state space is restored from a snapshot.

One row at a time, because rows would accept drafts of different lengths.
Shapes: A tokens of a draft, V vocabulary.
"""
import torch

from model import check_counts
from nanoblocks.decoding.decode import cache_slots, check_ids, check_seed, gumbel, inference, key, uniform


def acceptance(p, q, drafted):
    """
    p (A+1,V) and q (A,V): probabilities under the large model and under the draft, which drew drafted (A,)
    -> the probability that each token is accepted (A,), and the distribution (A+1,V) of the token that
    follows: row n holds if exactly n tokens were accepted.
    """
    drawn = drafted.unsqueeze(-1)
    accept = (p[:-1].gather(-1, drawn) / q.gather(-1, drawn).clamp(min=1e-38)).clamp(max=1).squeeze(-1)
    residual = (p[:-1] - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    # where p = q up to rounding, the residual is zero, and a token is almost never rejected
    residual = torch.where(total > 0, residual / total.clamp(min=1e-38), p[:-1])
    return accept, torch.cat((residual, p[-1:]))


class Noise:
    """Random draws that depend on a seed, the row, and the number of draws so far."""

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
        """probs (V,) -> a token drawn from them, (1,) int64"""
        ids = torch.arange(len(probs), device=probs.device)
        return (probs.log() + gumbel(self.next_key(), ids)).argmax(-1, keepdim=True)


class CachedModel:
    """One of the two models, with its cache."""

    def __init__(self, model, total, spare, compiled=None):
        """
        total: tokens of the longest text; spare: tokens that may be rolled back
        compiled: compile passes of this many tokens, which are nearly all; None compiles none
        """
        self.model, self.compiled = model, compiled
        self.fast = torch.compile(model, dynamic=False) if compiled else None
        self.cache = model.new_cache(1, cache_slots(model, total, compiled), spare=spare)

    def prefill(self, idx, chunk):
        """Read idx (1,T) except its last token, which belongs to the first round."""
        for start in range(0, idx.shape[1] - 1, chunk):
            piece = idx[:, start:min(start + chunk, idx.shape[1] - 1)]
            pos = torch.arange(start, start + piece.shape[1], device=idx.device)
            self.model(piece, cache=self.cache, pos=None if start == 0 else pos, last_only=True)

    def logits(self, tokens, start):
        """Read tokens (N,), the first at position `start` -> (N,V)"""
        pos = torch.arange(start, start + len(tokens), device=tokens.device)
        run = self.fast if len(tokens) == self.compiled else self.model
        return run(tokens.unsqueeze(0), cache=self.cache, pos=pos)[0][0]

    def snapshot(self):
        return [entry.snapshot() for entry in self.cache]

    def restore(self, snapshot):
        for entry, state in zip(self.cache, snapshot):
            entry.restore(state)


def check_pair(model, draft, idx, max_new_tokens):
    """ValueError where `draft` cannot draft for `model` after the prompt idx."""
    for name, m in (('the model', model), ('the draft', draft)):
        if m.encoder is not None or not m.config.causal:
            raise ValueError(f'draft must be left out where {name} is or has an encoder: speculative '
                             'decoding is for decoders alone')
    if idx.dim() != 2 or idx.shape[0] != 1 or idx.shape[1] == 0:
        raise ValueError(f'idx of shape {tuple(idx.shape)} must be one row of at least one token: '
                         'speculative decoding continues one text at a time')
    T, (size, draft_size) = idx.shape[1], [m.lm_head.weight.shape[0] for m in (model, draft)]
    if size != draft_size:
        raise ValueError(f"draft has a vocabulary of {draft_size} tokens and must have the model's {size}: "
                         'take a draft with the same tokenizer')
    for name, m in (('the model', model), ('draft', draft)):
        check_ids(m, idx)
        if m.wpe.max_tokens is not None and T + max_new_tokens > m.wpe.max_tokens:
            raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                             f'block_size={m.wpe.max_tokens} of {name}, where learned positions end: shorten '
                             'one of them')
        if T + max_new_tokens > m.wpe.longest:
            raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within the '
                             f'{m.wpe.longest} tokens for which {name} can reuse its cache: shorten one of '
                             'them, or decode without a draft')


class Speculative:
    """The loop of decode.Decoder, for one row: each round decides 1 to draft_length + 1 tokens."""

    def __init__(self, model, draft, idx: torch.Tensor, max_new_tokens: int, sampling, stop=None,
                 seed: int | None = None, *, first_row: int = 0, draft_length: int = 4, chunk: int = 2048,
                 compiled: bool = False):
        """Arguments as for decode.Decoder, with idx (1,T); draft_length: tokens proposed in each round."""
        check_counts(1, draft_length=draft_length, chunk=chunk)
        check_counts(0, max_new_tokens=max_new_tokens, first_row=first_row)
        check_seed(seed)
        check_pair(model, draft, idx, max_new_tokens)
        self.idx, self.max_new_tokens, self.sampling, self.chunk = idx, max_new_tokens, sampling, chunk
        self.draft_length = draft_length
        self.stop = set() if stop is None else set(torch.as_tensor(stop).view(-1).tolist())
        seed = torch.randint(2 ** 62, ()).item() if seed is None else seed
        self.noise = Noise(seed, first_row, idx.device)
        total = idx.shape[1] + max_new_tokens
        self.model = CachedModel(model, total, draft_length, draft_length + 1 if compiled else None)
        self.draft = CachedModel(draft, total, draft_length, 1 if compiled else None)
        self.cache, self.logprob = self.model.cache, None
        self.done = torch.zeros(1, 1, dtype=torch.bool)         # a reader of the stream may set it to end it
        self.proposed = self.accepted = self.rounds = 0
        self.first_round = 0                                    # tokens of the first round
        self.seen = None
        if sampling.repetition_penalty != 1:
            V = model.lm_head.weight.shape[0]
            self.seen = torch.zeros(1, V, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)

    def stream(self):
        """Yield each new token, (1,1) int64, until a stop token or max_new_tokens."""
        both, T = (self.model, self.draft), self.idx.shape[1]
        models = [cached.model for cached in both]
        with inference(*models):
            for cached in both:
                cached.prefill(self.idx, self.chunk)
        token, unread, pos, made = self.idx[0, -1:], self.idx[0, -1:], T - 1, 0
        while made < self.max_new_tokens:
            length = min(self.draft_length, self.max_new_tokens - made - 1)
            with inference(*models):
                new, logprobs, unread = self.round(token, unread, pos, length)
            for n, one in enumerate(new.tolist()):
                self.logprob = logprobs[n].view(1, 1)
                yield new[n].view(1, 1)
                made += 1
                if one in self.stop or self.done:
                    return
            token, pos = new[-1:], pos + len(new)

    def round(self, token, unread, pos, length):
        """
        token (1,): the last token of the text, at position `pos`, which the model has not read
        unread (1,) or (2,): the last tokens of the text, which the draft has not read
        -> the next tokens (1 to length + 1,), their log-probabilities, and the new `unread`
        """
        # 1. the draft proposes
        drafted, q, snapshots = self.propose(unread, pos, length)
        # 2. the model reads all proposed tokens at once
        before = self.model.snapshot()
        logits = self.model.logits(torch.cat((token, drafted)), pos)                    # (A+1,V)
        p = self.probabilities(logits, drafted)
        # 3. accept a prefix, and draw the token after it
        accepted, following = 0, p
        if length:
            accept, following = acceptance(p, torch.cat(q), drafted)
            accepted = int(self.noise.coins(accept).long().cumprod(0).sum())            # synchronises the GPU
        new = torch.cat((drafted[:accepted], self.noise.pick(following[accepted])))
        # 4. roll back; the model reads the accepted tokens again where its states were restored
        if accepted < length:
            self.draft.restore(snapshots[accepted])
            if any(state is not None for state in before):
                self.model.restore(before)
                self.model.logits(torch.cat((token, drafted[:accepted])), pos)
        if self.seen is not None:
            self.seen[0, new] = True
        self.rounds, self.proposed = self.rounds + 1, self.proposed + length
        self.accepted += accepted
        self.first_round = self.first_round or len(new)
        logprobs = logits[:accepted + 1].float().log_softmax(-1).gather(-1, new.unsqueeze(-1))
        # the draft never reads its own last token, which matters if all were accepted
        return new, logprobs, new[-1:] if accepted < length or not length else new[-2:]

    def propose(self, unread, pos, length):
        """Draw `length` tokens from the draft -> them, [probabilities (1,V)] and [its snapshot] for each."""
        drafted, q, snapshots = unread[:0], [], []
        for n in range(length):
            logits = self.draft.logits(unread, pos + 1 + n - len(unread))[-1:]
            snapshots.append(self.draft.snapshot())
            q.append(self.probabilities(logits, drafted))
            unread = self.noise.pick(q[-1][0])
            drafted = torch.cat((drafted, unread))
        return drafted, q, snapshots

    def probabilities(self, logits, drafted):
        """
        logits (N,V) at the last N places of text and drafted tokens -> probabilities of the next token (N,V).
        Only the repetition penalty needs drafted: row n has seen all drafted tokens but the last N - 1 - n.
        """
        if self.seen is None:
            return self.sampling.probabilities(logits)
        N, size = len(logits), len(drafted)
        seen = self.seen.repeat(N, 1)
        for n in range(N):
            seen[n, drafted[:size - (N - 1 - n)]] = True
        return self.sampling.probabilities(logits, seen)
