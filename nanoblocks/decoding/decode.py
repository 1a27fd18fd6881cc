"""
Sampling from a model, one token at a time: which tokens may be drawn (Sampling), the random draw, and the
loop of cached steps (Decoder).

Shapes: B prompts, T tokens of a prompt, R rows (every prompt num_samples times), V vocabulary, K candidates.

Random numbers come from no generator: the noise of a draw is a hash of (seed, row, number of the new token,
token id). It needs no state, runs on the device inside the compiled step, and does not depend on which rows
share a batch.
"""
import math
import numbers
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from model import check_counts, ops

# below this temperature the likeliest token is all that can be drawn, and the quotient would overflow
GREEDY = 1e-20


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be drawn, and how likely each is."""
    temperature: float = 1.0            # 0: the likeliest token; 1: as the model says; above 1: flatter
    top_k: int | None = None            # keep the k likeliest tokens
    top_p: float | None = None          # keep the fewest tokens that hold this share (Holtzman et al. 2019)
    min_p: float | None = None          # keep tokens with p >= min_p * the largest p (Nguyen et al. 2024)
    repetition_penalty: float = 1.0     # above 1: against tokens already in the text (Keskar et al. 2019)

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f'temperature={self.temperature} must be at least 0 (the likeliest token) '
                             'and finite')
        if self.top_k is not None:
            check_counts(1, top_k=self.top_k)
        for name in ('top_p', 'min_p'):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f'{name}={value} must be above 0 and at most 1, or None for all tokens')
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f'repetition_penalty={self.repetition_penalty} must be above 0 and '
                             'finite; 1 is no penalty')

    def candidates(self, logits, seen=None):
        """
        logits (...,V); seen (...,V) bool, True for tokens already in the text
        -> scores (...,K) fp32, -inf for tokens that may not be drawn, and their ids (...,K); ids is None
        where the K = V scores are in the order of the vocabulary.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            p = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
        if self.temperature < GREEDY:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros(best.shape, device=best.device), best
        scores, ids = logits / self.temperature, None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, ids = scores.topk(self.top_k)
        elif self.top_p is not None:
            scores, ids = scores.sort(descending=True)
        if self.top_p is not None:
            probs = scores.softmax(-1)
            # drop a token when the likelier ones already hold the share; the likeliest always stays
            scores = scores.masked_fill(probs.cumsum(-1) - probs >= self.top_p, -torch.inf)
        if self.min_p is not None:
            least = scores.amax(-1, keepdim=True) + math.log(self.min_p)
            scores = scores.masked_fill(scores < least, -torch.inf)
        return scores, ids

    def probabilities(self, logits, seen=None):
        """logits (...,V), seen as for candidates -> the probability of drawing each token, (...,V) fp32"""
        scores, ids = self.candidates(logits, seen)
        probs = scores.softmax(-1)
        return probs if ids is None else torch.zeros_like(logits.float()).scatter(-1, ids, probs)

    def draw(self, logits, keys, seen=None):
        """logits (R,V), keys (R,1) that seed the noise -> one token per row, (R,1) int64"""
        scores, ids = self.candidates(logits, seen)
        if self.temperature >= GREEDY:
            noise_ids = torch.arange(scores.shape[-1], device=scores.device) if ids is None else ids
            scores = scores + gumbel(keys, noise_ids)
        best = scores.argmax(-1, keepdim=True)
        return best if ids is None else ids.gather(-1, best)


# ----------------------------------------------------------------------------------------------------------
# Noise


def scramble(x):
    """A bijection of int64 that looks random: the finaliser of splitmix64 (Steele et al. 2014)."""
    # int64 has no logical shift right: the masks clear the copies of the sign bit; products wrap around
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def key(*words):
    """Hash int64 tensors, which broadcast, to one int64 tensor; the order of the words counts."""
    x = torch.zeros((), dtype=torch.int64, device=words[0].device)
    for word in words:
        x = scramble((x ^ word) - 0x61C8864680B583EB)
    return x


def uniform(keys):
    """int64 keys -> fp32 strictly between 0 and 1; the smallest is 2^-33"""
    bits = scramble(keys) >> 32 & 0xFFFFFFFF
    return ((bits.float() + 0.5) * 2.0 ** -32).clamp(max=1 - 2.0 ** -24)


def gumbel(keys, ids):
    """
    keys (R,1), token ids (K,) or (R,K) -> Gumbel noise (R,K) fp32: argmax(log p + noise) is distributed as p.
    Each token has its own noise, so a rounding difference between two batch sizes hardly ever changes a draw.
    """
    return -torch.log(-torch.log1p(-uniform(keys + ids * 0x1E3779B97F4A7C15)))


# ----------------------------------------------------------------------------------------------------------
# The loop


def check_room(model, idx, max_new_tokens, lengths=None):
    """ValueError where prompts (B,T) of these lengths cannot be continued by max_new_tokens."""
    if idx.dim() != 2 or idx.dtype != torch.int64:
        raise ValueError(f'idx of shape {tuple(idx.shape)} and type {idx.dtype} must be (B,T) in int64')
    if idx.numel() == 0:
        raise ValueError('idx must hold at least one token to continue, in at least one row: give a prompt')
    T, limit, longest = idx.shape[1], model.wpe.max_tokens, model.wpe.longest
    check_ids(model, idx)
    if lengths is not None:
        lengths = torch.as_tensor(lengths).tolist()
        if len(lengths) != len(idx) or not all(type(n) is int and 1 <= n <= T for n in lengths):
            raise ValueError(f'lengths={lengths} must be {len(idx)} whole numbers from 1 to {T}, how many '
                             'tokens at the end of each row are its prompt')
    if limit is not None and T + max_new_tokens > limit:
        raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                         f'block_size={limit}, where learned positions end: shorten one of them, or train '
                         'with pos=rope')
    if T + max_new_tokens > longest and lengths is not None and min(lengths) < T:
        raise ValueError(f'prompts of unequal lengths must stay within rope_context={longest} tokens, new '
                         'tokens included, because the rotation beyond it depends on the length: run them '
                         'one by one')


def check_seed(seed):
    if seed is not None and not isinstance(seed, numbers.Integral):
        raise ValueError(f'seed={seed} must be a whole number, or None for another text every time')


def check_ids(model, idx):
    """ValueError where idx holds an id that the model's vocabulary lacks."""
    size, (low, high) = model.wte.weight.shape[0], torch.aminmax(idx)
    if low < 0 or high >= size:
        raise ValueError(f'token {int(low if low < 0 else high)} must be one of the {size} tokens that the '
                         'model knows: take the tokenizer that it was trained with')


def cache_slots(model, total, compiled):
    """Cache size for texts of `total` tokens; a multiple of 256 if compiled, to recompile for few sizes."""
    if not compiled:
        return total
    return min(-(-total // 256) * 256, model.wpe.max_tokens or math.inf, model.wpe.longest)


@contextmanager
def inference(*models):
    """
    No gradients and no dropout. Around a step, not around the loop of steps: a generator whose caller drops
    it half-way has then nothing to undo, which it could not do while Python exits.
    """
    training = [model for model in models if model.training]
    try:
        for model in training:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model in training:
            model.train()


class Decoder:
    """
    The loop of generation: `stream` runs the prompts once, then yields new tokens step by step. Rows are the
    prompts, each repeated num_samples times in a row.

    A step reads and writes the same tensors every time and never waits for the host. So it compiles to one
    graph (compiled=True), and on a GPU it is captured as a CUDA graph, compiled or not, and replayed.
    """

    def __init__(self, model, idx: torch.Tensor, max_new_tokens: int, sampling: Sampling, stop=None,
                 seed: int | None = None, *, lengths=None, num_samples: int = 1, first_row: int = 0,
                 chunk: int = 2048, compiled: bool = False, logprobs: bool = False, source=None):
        """
        idx: prompts (B,T) int64; with `lengths` (B,), row b is padded on the left to T by any tokens
        stop: a token, or several, that end a row
        seed: seeds the noise; None draws a seed
        first_row: row r of this Decoder takes the noise of row first_row + r
        chunk: tokens of the prompt in one forward pass
        logprobs: keep the log-probability of the last token, at temperature 1, in self.logprob (R,1)
        source: what an encoder reads, (B,S) int64, -1 for padding at the end of a row
        """
        check_counts(0, max_new_tokens=max_new_tokens, first_row=first_row)
        check_counts(1, num_samples=num_samples, chunk=chunk)
        check_seed(seed)
        check_room(model, idx, max_new_tokens, lengths)
        (B, T), device = idx.shape, idx.device
        total, rows = T + max_new_tokens, B * num_samples
        self.model, self.idx, self.max_new_tokens, self.chunk = model, idx, max_new_tokens, chunk
        self.sampling, self.num_samples, self.compiled = sampling, num_samples, compiled
        self.source = {} if source is None else {'source': source}
        # where the rotation depends on the length of the text, a longer text invalidates every cached key
        slots = cache_slots(model, total, compiled)
        self.cache = model.new_cache(B, slots) if total <= model.wpe.longest else None
        self.padding = None if lengths is None else T - torch.as_tensor(lengths, device=device).view(-1, 1)
        seed = torch.randint(2 ** 62, ()).item() if seed is None else seed
        self.keys = key(torch.tensor(seed % 2 ** 63, device=device),
                        torch.arange(first_row, first_row + rows, device=device)).view(-1, 1)
        self.stop = None if stop is None else torch.as_tensor(stop, device=device).view(-1)
        self.allocate(rows, logprobs)

    def allocate(self, rows, logprobs):
        """The tensors that every step reads and writes in place, beside the cache."""
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=self.idx.device)    # last token of a row
        self.pos = torch.zeros_like(self.token)                                         # its position
        self.number = torch.zeros_like(self.token[0])                                   # tokens drawn so far
        self.done = torch.zeros_like(self.token, dtype=torch.bool)
        self.logprob = torch.zeros(rows, 1, device=self.idx.device) if logprobs else None
        self.seen = self.tokens_of_prompts() if self.sampling.repetition_penalty != 1 else None

    def tokens_of_prompts(self):
        """(R,V) bool: True for the tokens of each row's prompt."""
        V = self.model.lm_head.weight.shape[0]
        T, tokens = self.idx.shape[1], self.idx
        if self.padding is not None:
            tokens = tokens.masked_fill(torch.arange(T, device=tokens.device) < self.padding, V)
        seen = torch.zeros(len(tokens), V + 1, dtype=torch.bool, device=tokens.device)
        return seen.scatter_(1, tokens, True)[:, :V].repeat_interleave(self.num_samples, 0)

    def stream(self):
        """Yield the new tokens (R,1) int64 of each step, until every row is done or has max_new_tokens."""
        # reading `done` synchronises the GPU, so it is read every 16 steps there
        every, step = 1 if self.idx.device.type == 'cpu' else 16, None
        for n in range(self.max_new_tokens):
            with inference(self.model):
                if n == 0:
                    self.prefill()
                else:
                    step = step or self.ready_step()
                    step()
            yield self.token.clone()
            if n % every == every - 1 and self.done.all():
                return

    def prefill(self):
        """Run the prompts and draw the first token of each row."""
        T = self.idx.shape[1]
        pos = torch.arange(T, device=self.idx.device)
        pos = pos if self.padding is None else pos - self.padding           # (T,) or (B,T)
        if self.cache is None:
            logits, _ = self.model(self.idx, pos=None if self.padding is None else pos, last_only=True,
                                   **self.source)
            self.source = {name: x.repeat_interleave(self.num_samples, 0) for name, x in self.source.items()}
            self.all_pos = pos.expand(self.idx.shape).repeat_interleave(self.num_samples, 0)
            self.idx = self.idx.repeat_interleave(self.num_samples, 0)
        else:
            for start in range(0, T, self.chunk):
                piece = slice(start, start + self.chunk)
                # without pos, the first piece takes the fast path of training
                where = None if start == 0 and self.padding is None else pos[..., piece]
                logits, _ = self.model(self.idx[:, piece], cache=self.cache, pos=where, last_only=True,
                                       **self.source if start == 0 else {})
            if self.num_samples > 1:
                for entry in self.cache:
                    entry.expand(self.num_samples)
        last = pos[..., -1:].expand(len(logits), 1)
        self.pos.copy_(last.repeat_interleave(self.num_samples, 0))
        self.append(logits[:, -1].repeat_interleave(self.num_samples, 0))

    def step(self):
        """Run the last token and draw the next."""
        if self.cache is None:
            self.idx = torch.cat((self.idx, self.token), dim=1)
            self.all_pos = torch.cat((self.all_pos, self.pos), dim=1)
            pos = None if self.padding is None else self.all_pos
            logits, _ = self.model(self.idx, pos=pos, last_only=True, **self.source)
        else:
            logits, _ = self.model(self.token, cache=self.cache, pos=self.pos, last_only=True)
        self.append(logits[:, -1])

    def append(self, logits):
        """Draw the next token of each row from logits (R,V), and advance the state of the rows."""
        drawn = self.sampling.draw(logits, key(self.keys, self.number), self.seen)
        if self.logprob is not None:
            self.logprob.copy_(logits.float().log_softmax(-1).gather(-1, drawn))
        self.token.copy_(torch.where(self.done, self.token, drawn))
        self.pos.add_(1)
        self.number.add_(1)
        if self.stop is not None:
            self.done.logical_or_((self.token == self.stop).any(-1, keepdim=True))
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)

    def ready_step(self):
        """`step` itself, or its compiled form; on a GPU the replay of its CUDA graph."""
        if self.cache is None:
            return self.step
        step = torch.compile(self.step, dynamic=False) if self.compiled else self.step
        # a capture takes as long as a few steps
        if self.idx.device.type != 'cuda' or self.max_new_tokens < 16 or counts_on_host(self.model):
            return step
        try:
            return self.captured(step)
        except RuntimeError as error:
            warnings.warn(f'decoding more slowly, without a CUDA graph, which failed: {error}',
                          stacklevel=2)
            return step

    def captured(self, step):
        """The replay of a CUDA graph of `step`."""
        tensors = [t for t in (self.token, self.pos, self.number, self.done, self.logprob, self.seen)
                   if t is not None]
        before, snapshots = [t.clone() for t in tensors], [entry.snapshot() for entry in self.cache]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
                # undone at once: a second step would overwrite a key in the ring buffer of a window that the
                # first one sees, and might lie beyond the last learned position
                for t, old in zip(tensors, before):
                    t.copy_(old)
                for entry, old in zip(self.cache, snapshots):
                    entry.restore(old)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()  # recorded, not run
        return graph.replay


def counts_on_host(model):
    """Whether an expert's rows are counted on the host, for which a CUDA graph cannot wait."""
    def fused(linear):
        weight = getattr(linear, 'weight', None)     # experts of quantize.py have none of their own
        return (weight is not None and ops.runs_triton(weight)
                and ops.OPS['grouped_linear'].ok(weight, weight, None, None))
    return not all(fused(moe.c_fc) and fused(moe.c_proj) for moe in model.moes)


def steps_on_host(decoder, overlap):
    """
    Yield (tokens, log-probabilities or None) of each step of decoder.stream(), as lists with one number per
    row. overlap=True delays every step but the first by one, so that copying it to the host overlaps with
    the next step on the GPU.
    """
    def to_lists(step):
        return [None if column is None else column[:, 0].tolist() for column in step]
    delayed = None
    for n, tokens in enumerate(decoder.stream()):
        step = tokens, None if decoder.logprob is None else decoder.logprob.clone()
        if n == 0 or not overlap:
            yield to_lists(step)
            continue
        if delayed:
            yield to_lists(delayed)
        delayed = step
    if delayed:
        yield to_lists(delayed)


def trimmed(new, stop):
    """new (R,N) without the columns after the step in which the last row stopped"""
    if stop is None or new.shape[1] == 0:
        return new
    stop = torch.as_tensor(stop, device=new.device).view(-1)
    ended = torch.isin(new, stop).cumsum(1).bool().all(0)
    return new[:, :new.shape[1] - int(ended.sum()) + 1] if ended.any() else new


def left_padded(prompts, device='cpu'):
    """Lists of tokens -> idx (B,T) int64, shorter prompts padded on the left with 0, and their lengths"""
    longest = max(map(len, prompts))
    return (torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device),
            [len(p) for p in prompts])


# ----------------------------------------------------------------------------------------------------------
# What GPT.stream and GPT.generate call


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
           min_p=None, repetition_penalty=1.0, **more):
    """
    Continue the prompts idx (B,T) int64: yield the new tokens (R,1) int64 of each step. Dropout is off.

    temperature         0: the likeliest token; 1: the model's distribution; above 1: flatter
    top_k top_p min_p   draw from the k likeliest tokens, from the fewest tokens that hold the share top_p,
                        from tokens with p >= min_p * (largest p)
    repetition_penalty  above 1: tokens that are already in the text become less likely
    stop                a token, or several, that end a row; the row repeats it until all rows have ended
    seed                the same seed gives the same text, in every batch; None: another text every time
    more                lengths, num_samples, first_row, chunk, compiled: see Decoder

    ValueError where idx is empty or holds other ids, or where learned positions leave too little room.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return Decoder(model, idx, max_new_tokens, sampling, stop, seed, **more).stream()


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
             **more):
    """Options as for `stream` -> prompts with their new tokens, (R,T+new) int64."""
    new = list(stream(model, idx, max_new_tokens, temperature, top_k, top_p, stop, seed, **more))
    idx = idx.repeat_interleave(more.get('num_samples', 1), 0)
    return torch.cat((idx, trimmed(torch.cat(new, dim=1), stop)), dim=1) if new else idx
