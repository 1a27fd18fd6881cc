"""
Text from a model, one token after the other: what may be drawn (Sampling), the draw, the loop around one step
of static shapes (Decoder), the text that tokens become (Text), and how likely a given text is (logprobs_of).

Shapes: B rows, T tokens of the prompt, V vocabulary, K candidates.

A draw takes its noise from no generator: it is a hash of (seed, row, number of the new token, token). So it
needs no state, runs on the device inside the compiled step, and is the same in every batch.
"""
import codecs
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """What may be drawn, and how likely. ValueError, one sentence, for values that cannot be."""
    temperature: float = 1.0            # 0: the likeliest; 1: as the model says; higher: wilder
    top_k: int | None = None            # the k likeliest only
    top_p: float | None = None          # the fewest that hold this share (nucleus, Holtzman et al. 2019)
    min_p: float | None = None          # at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0     # against tokens that the text holds already (Keskar et al. 2019)

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f'temperature={self.temperature} must be 0 (the likeliest token) or above')
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f'top_k={self.top_k} must be at least 1, or None for all tokens')
        for name, what in (('top_p', 'all tokens'), ('min_p', 'no such limit')):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f'{name}={value} must be above 0 and at most 1, or None for {what}')
        if not self.repetition_penalty > 0:
            raise ValueError(f'repetition_penalty={self.repetition_penalty} must be above 0, where 1 is none')

    def candidates(self, logits, seen=None):
        """
        logits (...,V), seen (...,V) bool: the tokens that the text holds -> (scores (...,K) fp32, -inf for
        what may not be drawn; the tokens (...,K) they are of, None for all of them in order).
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            p = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros(best.shape, device=best.device), best
        scores, tokens = logits / self.temperature, None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, tokens = scores.topk(self.top_k)
        elif self.top_p is not None:
            scores, tokens = scores.sort(descending=True)
        if self.top_p is not None:
            probs = scores.softmax(-1)
            # a token goes when those before it already hold the share: the first always stays
            scores = scores.masked_fill(probs.cumsum(-1) - probs >= self.top_p, -torch.inf)
        if self.min_p is not None:
            least = scores.amax(-1, keepdim=True) + math.log(self.min_p)
            scores = scores.masked_fill(scores < least, -torch.inf)
        return scores, tokens

    def probabilities(self, logits, seen=None):
        """As candidates -> (...,V) fp32: how likely each token is to be drawn."""
        scores, tokens = self.candidates(logits, seen)
        probs = scores.softmax(-1)
        return probs if tokens is None else torch.zeros_like(logits.float()).scatter(-1, tokens, probs)

    def draw(self, logits, keys, seen=None):
        """logits (B,V), keys (B,1) of the noise -> one token a row, (B,1) int64"""
        scores, tokens = self.candidates(logits, seen)
        if self.temperature > 0:
            ids = torch.arange(scores.shape[-1], device=scores.device) if tokens is None else tokens
            scores = scores + gumbel(keys, ids)
        best = scores.argmax(-1, keepdim=True)
        return best if tokens is None else tokens.gather(-1, best)


# ----------------------------------------------------------------------------------------------------------
# Noise


def scramble(x):
    """int64 -> int64, a bijection that looks random: the finaliser of splitmix64 (Steele et al. 2014)."""
    # shifts to the right without the sign, and products that wrap around
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def key(*words):
    """int64 tensors that broadcast -> int64, different for different words in their order."""
    x = torch.zeros((), dtype=torch.int64, device=words[0].device)
    for word in words:
        x = scramble((x ^ word) - 0x61C8864680B583EB)
    return x


def uniform(keys):
    """int64 -> fp32 above 0 and below 1, as fine near 0 as 2^-33"""
    bits = scramble(keys) >> 32 & 0xFFFFFFFF
    return ((bits.float() + 0.5) * 2.0 ** -32).clamp(max=1 - 2.0 ** -24)


def gumbel(keys, tokens):
    """
    keys (B,1), tokens (K,) or (B,K) -> (B,K) fp32. The largest of log p + this noise is distributed as p, and
    changes only where p does: rounding, which differs from batch to batch, hardly ever matters.
    """
    return -torch.log(-torch.log1p(-uniform(keys + tokens * 0x1E3779B97F4A7C15)))


# ----------------------------------------------------------------------------------------------------------
# The loop


def check_room(model, idx, max_new_tokens, lengths=None):
    """ValueError, one sentence, where so many tokens cannot follow prompts (B,T) of these lengths."""
    T, limit, longest = idx.shape[1], model.wpe.max_tokens, model.wpe.longest
    if T == 0 or lengths is not None and min(lengths) < 1:
        raise ValueError('idx must hold at least one token to continue: give a prompt')
    if limit is not None and T + max_new_tokens > limit:
        raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                         f'block_size={limit}, where learned positions end; a model with pos=rope has no '
                         'such end')
    if T + max_new_tokens > longest and lengths is not None and min(lengths) < T:
        raise ValueError(f'prompts of unequal lengths must stay within rope_context={longest} tokens, new '
                         'ones included, as the rotation beyond it depends on the length: run them alone')


def cache_slots(model, total, compiled):
    """For how many tokens a cache is made: few sizes where each is compiled."""
    if not compiled:
        return total
    return min(-(-total // 256) * 256, model.wpe.max_tokens or math.inf, model.wpe.longest)


class Decoder:
    """
    A prompt, its cache, and one step after the other: `stream` yields the new tokens. Rows are the prompts,
    each num_samples times next to each other; a prompt is run once.

    A step reads and writes the same tensors every time and asks the host nothing, so that it compiles to one
    graph (compiled=True), which on a GPU is captured and replayed.
    """

    def __init__(self, model, idx, max_new_tokens, sampling, stop=None, seed=None, *, lengths=None,
                 num_samples=1, first_row=0, chunk=2048, compiled=False, logprobs=False):
        """
        idx (B,T) int64, its prompts of unequal `lengths` (B,) padded on the left with any token. stop: tokens
        that end a row. seed: of the noise, None for another one every time; first_row: the number that it
        knows row 0 by. chunk: tokens of a prompt that are run at once. logprobs: keep self.logprob (B,1), of
        the last token, under the model itself at temperature 1.
        """
        check_room(model, idx, max_new_tokens, lengths)
        if chunk < 1:
            raise ValueError(f'chunk={chunk} must be at least 1 token')
        (B, T), device = idx.shape, idx.device
        total, rows = T + max_new_tokens, B * num_samples
        self.model, self.idx, self.max_new_tokens, self.chunk = model, idx, max_new_tokens, chunk
        self.sampling, self.num_samples, self.compiled = sampling, num_samples, compiled
        # a rotation that depends on the length of the text leaves nothing to reuse when it grows
        slots = cache_slots(model, total, compiled)
        self.cache = model.new_cache(B, slots) if total <= model.wpe.longest else None
        self.padding = None if lengths is None else T - torch.as_tensor(lengths, device=device).view(-1, 1)
        seed = torch.randint(2 ** 62, ()).item() if seed is None else seed
        self.keys = key(torch.tensor(seed % 2 ** 63, device=device),
                        torch.arange(first_row, first_row + rows, device=device)).view(-1, 1)
        self.stop = None if stop is None else torch.as_tensor(stop, device=device).view(-1)
        # of the last token: where it belongs, how many were drawn before the next, and which it is
        self.pos = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.number = torch.zeros_like(self.pos[0])
        self.token, self.done = torch.zeros_like(self.pos), torch.zeros_like(self.pos, dtype=torch.bool)
        self.logprob = torch.zeros(rows, 1, device=device) if logprobs else None
        self.seen = self.in_prompt() if sampling.repetition_penalty != 1 else None

    def in_prompt(self):
        """The tokens of each prompt, (rows,V) bool."""
        V = self.model.lm_head.weight.shape[0]
        T, tokens = self.idx.shape[1], self.idx
        if self.padding is not None:
            tokens = tokens.masked_fill(torch.arange(T, device=tokens.device) < self.padding, V)
        seen = torch.zeros(len(tokens), V + 1, dtype=torch.bool, device=tokens.device)
        return seen.scatter_(1, tokens, True)[:, :V].repeat_interleave(self.num_samples, 0)

    @torch.no_grad()
    def stream(self):
        """(rows,1) int64 as each token is drawn, until all rows are done or max_new_tokens are."""
        # asking a GPU whether all is done would make it wait, so it is asked now and then
        every = 1 if self.idx.device.type == 'cpu' else 16
        training, step = self.model.training, None
        self.model.eval()
        try:
            for n in range(self.max_new_tokens):
                if n == 0:
                    self.prefill()
                else:
                    step = step or self.ready_step()
                    step()
                yield self.token.clone()
                if n % every == every - 1 and self.done.all():
                    return
        finally:
            self.model.train(training)

    def prefill(self):
        """Run the prompt and draw the first token."""
        T = self.idx.shape[1]
        place = torch.arange(T, device=self.idx.device)
        pos = place if self.padding is None else place - self.padding       # (T,) or (B,T)
        if self.cache is None:
            logits, _ = self.model(self.idx, pos=None if self.padding is None else pos, last_only=True)
            self.place = pos.expand(self.idx.shape).repeat_interleave(self.num_samples, 0)
            self.idx = self.idx.repeat_interleave(self.num_samples, 0)
        else:
            for start in range(0, T, self.chunk):
                piece = slice(start, start + self.chunk)
                # without positions the first piece is the training path
                where = None if start == 0 and self.padding is None else pos[..., piece]
                logits, _ = self.model(self.idx[:, piece], cache=self.cache, pos=where, last_only=True)
            if self.num_samples > 1:
                for entry in self.cache:
                    entry.expand(self.num_samples)
        last = pos[..., -1:].expand(len(logits), 1)
        self.pos.copy_(last.repeat_interleave(self.num_samples, 0))
        self.take(logits[:, -1].repeat_interleave(self.num_samples, 0))

    def step(self):
        """Run the last token and draw the next."""
        if self.cache is None:
            self.idx = torch.cat((self.idx, self.token), dim=1)
            self.place = torch.cat((self.place, self.pos), dim=1)
            pos = None if self.padding is None else self.place
            logits, _ = self.model(self.idx, pos=pos, last_only=True)
        else:
            logits, _ = self.model(self.token, cache=self.cache, pos=self.pos, last_only=True)
        self.take(logits[:, -1])

    def take(self, logits):
        """logits (rows,V) -> the next token, its position, and what goes with it"""
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
        """`step`, compiled and on a GPU captured where that was asked for."""
        if not self.compiled or self.cache is None:
            return self.step
        step = torch.compile(self.step, dynamic=False)
        # experts are counted on the host
        if self.idx.device.type != 'cuda' or self.model.moes:
            return step
        return self.captured(step)

    def captured(self, step):
        """A CUDA graph of `step`, and the state as it was: running it to warm up is undone."""
        tensors = [t for t in (self.token, self.pos, self.number, self.done, self.logprob, self.seen)
                   if t is not None]
        before, caches = [t.clone() for t in tensors], [entry.snapshot() for entry in self.cache]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for t, old in zip(tensors, before):
            t.copy_(old)
        for entry, old in zip(self.cache, caches):
            entry.restore(old)
        return graph.replay


def arriving(decoder, late):
    """
    (tokens, log-probabilities or None) of each step of `decoder.stream`, as lists. late: of all but the first
    when the next step is under way, so that a GPU need not wait for whoever reads them.
    """
    def on_host(step):
        return [None if column is None else column[:, 0].tolist() for column in step]
    waiting = None
    for n, tokens in enumerate(decoder.stream()):
        step = tokens, None if decoder.logprob is None else decoder.logprob.clone()
        if n == 0 or not late:
            yield on_host(step)
            continue
        if waiting:
            yield on_host(waiting)
        waiting = step
    if waiting:
        yield on_host(waiting)


def trimmed(new, stop):
    """new (B,N) -> without what follows the end of the last row"""
    if stop is None or new.shape[1] == 0:
        return new
    stop = torch.as_tensor(stop, device=new.device).view(-1)
    ended = torch.isin(new, stop).cumsum(1).bool().all(0)
    return new[:, :new.shape[1] - int(ended.sum()) + 1] if ended.any() else new


def left_padded(prompts, device='cpu'):
    """Lists of tokens -> idx (B,T) int64, the shorter ones with 0 in front, and their lengths."""
    longest = max(map(len, prompts))
    return (torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device),
            [len(p) for p in prompts])


# ----------------------------------------------------------------------------------------------------------
# Text


class Text:
    """The text of one row as it grows: whole characters, nothing from a stop string or an ending token on."""

    def __init__(self, tokenizer, stops=(), ends=()):
        # a character may be spread over several tokens: nothing is told before its last byte
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.tokenizer, self.stops, self.ends = tokenizer, stops, ends
        self.tokens, self.text, self.told, self.done = [], '', 0, False

    def add(self, token):
        """One token more -> the text that is certain now and was not told before."""
        if self.done:
            return ''
        self.tokens.append(token)
        if token in self.ends:
            return self.finish()
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ends = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if ends:
            self.text, self.done = self.text[:min(ends)], True
            return self.tell(len(self.text))
        return self.tell(len(self.text) - self.may_begin_a_stop())

    def may_begin_a_stop(self):
        """How many characters at the end a stop string could begin with."""
        return max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
                   default=0)

    def finish(self):
        """No more tokens -> the rest of the text."""
        if not self.done:
            self.text, self.done = self.text + self.decoder.decode(b'', final=True), True
        return self.tell(len(self.text))

    def tell(self, end):
        told, self.told = self.text[self.told:end], max(self.told, end)
        return told


def special_token(tokenizer, text):
    """The id of a special token, None for ordinary text. ValueError for one that the tokenizer lacks."""
    if tokenizer.eot is not None and text == '<|endoftext|>':
        return tokenizer.eot
    known = getattr(tokenizer, 'tokenizer', None)  # of a published checkpoint
    found = known.token_to_id(text) if known is not None and text.startswith('<') else None
    if found is None and text.startswith('<|') and text.endswith('|>'):
        raise ValueError(f'stop={text} must be a text or a special token that this tokenizer has')
    return found


# ----------------------------------------------------------------------------------------------------------
# How likely a text is


@torch.no_grad()
def logprobs_of(model, tokens, window):
    """
    tokens (N,) int64 -> (N-1,) fp32: the log-probability, in nats, of each but the first given those before
    it. Longer texts are cut into windows that overlap by half: a token sees at least window // 2 before it.
    """
    window, start, scored, training = max(2, window), 0, 1, model.training
    parts = [torch.zeros(0, device=tokens.device)]
    model.eval()
    while scored < len(tokens):
        text = tokens[start:start + window]
        logits = model(text[:-1].unsqueeze(0))[0][0, scored - start - 1:].float()
        chosen = logits.gather(-1, text[scored - start:].unsqueeze(-1)).squeeze(-1)
        parts.append(chosen - logits.logsumexp(-1))
        scored = start + len(text)
        start = scored - window // 2
    model.train(training)
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------------
# What GPT.generate and GPT.stream call


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
           min_p=None, repetition_penalty=1.0, **more):
    """
    Continue idx (B,T) int64 by max_new_tokens, yielding (B,1) int64 as each is drawn. Dropout is off.

    temperature         0: the likeliest token; 1: as the model says
    top_k top_p min_p   draw from the k likeliest, from the fewest that hold a share p, from those at least
                        this share as likely as the likeliest
    repetition_penalty  above 1: tokens that the text holds become less likely
    stop                a token or several that end a row; the row repeats it until all rows have ended
    seed                the same text every time, and in every batch
    more                lengths, num_samples, chunk, compiled: see Decoder

    ValueError when there is nothing to continue, or learned positions would run out.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return Decoder(model, idx, max_new_tokens, sampling, stop, seed, **more).stream()


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
             **more):
    """idx (B,T) int64 with what `stream` yields after it -> (B,T+new) int64, samples side by side."""
    new = list(stream(model, idx, max_new_tokens, temperature, top_k, top_p, stop, seed, **more))
    idx = idx.repeat_interleave(more.get('num_samples', 1), 0)
    return torch.cat((idx, trimmed(torch.cat(new, dim=1), stop)), dim=1) if new else idx
