"""
A model, its tokenizer and the settings of sampling in one object, which continues and scores texts.

    session = Session.load(out_dir='out/llama_small', sampling=Sampling(temperature=0.8, top_k=200))
    print(session.sample('def main')[0].text)
    print(session.score('def main():').bits_per_byte)
"""
import itertools
import math
import os
import shlex
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import GPT, check_counts, ops
from nanoblocks import pretrained
from nanoblocks.decoding import quantize
from nanoblocks.decoding.decode import Decoder, Sampling, check_seed, left_padded
from nanoblocks.decoding.generation import Generation, Sample
from nanoblocks.decoding.scoring import Score, token_logprobs
from nanoblocks.decoding.speculative import Speculative
from nanoblocks.decoding.text import Text, special_token, stops_of
from nanoblocks.decoding.unmask import MASK, SPAN, mask_token, pseudo_logprobs, span_marks, unmask
from nanoblocks.formats import format_quantity
from nanoblocks.hardware import bytes_per_step, check_device, gpu_dtype, pick_device
from nanoblocks.objectives import SPANS
from nanoblocks.tokenizer import from_meta
from nanoblocks.training import checkpoint
from nanoblocks.training.run_folder import RunFolder, refuse_misspelt


class Prompt(NamedTuple):
    """A text to continue."""
    tokens: list
    text: str               # the text to print in front of a continuation


class QuantizationCost(NamedTuple):
    """What rounded weights changed, measured on the same tokens before and after."""
    kind: str               # int8 or int4
    n_tokens: int           # that were scored
    dtype: str              # of the weights before
    bpb_before: float       # bits per byte
    bpb: float
    bytes_before: int       # of weights that one decoding step reads
    bytes: int
    bf16_activations: bool  # whether a step rounds activations to bfloat16 (on some CPUs, and with int4)


@dataclass
class Session:
    """
    Continues and scores texts with one model. Settings may change between calls, for example
    session.sampling = Sampling(temperature=0). A sample depends on the seed and on its number among the
    samples of the call, but not on the other prompts or on batch_size.
    """
    model: GPT
    tokenizer: object                   # of data.tokenizer
    sampling: Sampling = Sampling()
    stop: str | list = ''               # texts or special tokens that end a sample
    num_samples: int = 1                # continuations of each prompt
    max_new_tokens: int = 500           # fewer where the document or learned positions end
    seed: int | None = 1337             # None: another text every time
    batch_size: int = 16                # prompts that run together
    chunk: int = 2048                   # tokens of a prompt in one forward pass
    draft: GPT | None = None            # a smaller model, for speculative decoding
    draft_length: int = 4               # tokens that the draft proposes in each round
    compiled: bool = False              # torch.compile the step
    logprobs: bool = True               # keep the log-probability of every token
    default_prompt: str = ''            # what `sample` continues when it is given nothing
    source: str = ''                    # the model in words: its file, step, validation loss and size
    objective: str = 'next'             # what it was trained for: objectives.OBJECTIVES
    begin: int | None = None            # first token of a decoder with an encoder; None: the source's last
    answers: bool = False               # each prompt is the source of a pair, which `begin` ends (data/pairs)

    def __post_init__(self):
        check_counts(1, num_samples=self.num_samples, max_new_tokens=self.max_new_tokens, chunk=self.chunk,
                     batch_size=self.batch_size, draft_length=self.draft_length)
        check_seed(self.seed)
        stops_of(self.stop, self.tokenizer)         # refuses a special token that the tokenizer lacks

    @classmethod
    def load(cls, init_from='resume', out_dir='out', ckpt='best.pt', *, draft='', device='auto', dtype='auto',
             kernels='auto', attention='auto', **settings) -> 'Session':
        """
        init_from: 'resume' for the checkpoint `ckpt` of the run in out_dir; else a folder, file or hub id
        draft: the out_dir of a run that drafts, or another checkpoint as for init_from; '' for none
        device, dtype, kernels, attention: as the settings of sample.py
        settings: fields of Session
        """
        device = pick_device(device)
        check_device(device)
        ops.use_kernels(kernels, device)
        ops.use_attention(attention, device)
        if dtype == 'auto':
            dtype = gpu_dtype() if device.startswith('cuda') else 'float32'
        if dtype not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f'dtype={dtype} must be one of auto, float32, bfloat16, float16')
        if init_from == 'resume':
            model, tokenizer, meta, source = load_run(out_dir, ckpt)
        else:
            model, tokenizer, meta, source = *load_published(init_from, dtype), {}, init_from
        source = f'model: {source}, {format_quantity(model.num_params())} parameters'
        draft_model = load_draft(draft, ckpt, tokenizer, dtype) if draft else None
        objective = meta.get('objective', 'next' if model.config.causal else 'mask')
        for m in (model, draft_model):
            if m is not None:
                marks = SPANS if objective == 'span' else 0
                prepare(m, tokenizer.vocab_size + marks, device, getattr(torch, dtype))
        begin = meta['pairs']['eot'] if 'pairs' in meta else model.texts.ids.get('decoder_start_token_id')
        return cls(model, tokenizer, draft=draft_model, default_prompt=meta.get('prompt', ''), source=source,
                   objective=objective, begin=begin, answers='pairs' in meta, **settings)

    @property
    def device(self):
        return self.model.lm_head.weight.device

    # -- continuing texts

    def sample(self, texts: str | list | None = None) -> list[Sample]:
        """
        Continue a text, or each of a list of texts, or the default prompt. Returns num_samples samples for
        each text, in order.
        """
        texts = self.default_prompt if texts is None else texts
        texts, samples = [texts] if isinstance(texts, str) else texts, []
        for generation in self.generations([self.encode(text) for text in texts]):
            for _ in generation.stream():
                pass
            samples += generation.samples
        return samples

    def encode(self, text: str, name='prompt') -> Prompt:
        """A text as a Prompt; '' begins a document. `name`: what an error about its length calls it."""
        begins = self.tokenizer.bos if text == '' else None
        if text == '<|endoftext|>' and self.tokenizer.eot is not None:
            begins = special_token(self.tokenizer, text)
        if begins is not None:
            prompt = Prompt([begins], '')
        else:
            # where no token begins a document, a line end does
            prompt = Prompt(self.tokenizer.prompt(text or '\n'), text or '\n')
        if self.answers:
            after = [self.begin] if self.model.encoder is None else []
            prompt = Prompt(self.tokenizer.encode(text or '\n') + after, f'{text}\n')
        check_vocabulary(self.model, self.tokenizer, prompt.tokens, name)
        self.room(prompt.tokens, name)
        return prompt

    def room(self, tokens, name='prompt'):
        """How many new tokens may follow these."""
        limit = self.position_limit
        if limit is None:
            return self.max_new_tokens
        if len(tokens) >= limit:
            raise ValueError(f'{name} has {len(tokens)} tokens and must have fewer than block_size={limit}, '
                             'where learned positions end: shorten it')
        read = len(tokens) if self.model.encoder is None else 1     # by the decoder
        return min(self.max_new_tokens, limit - read)

    @property
    def position_limit(self):
        """The longest text for which the model and its draft have learned positions; None: no limit."""
        return min((m.wpe.max_tokens for m in (self.model, self.draft)
                    if m is not None and m.wpe.max_tokens is not None), default=None)

    def generations(self, prompts: list[Prompt], first_row: int = 0):
        """
        Yield a Generation for each batch of prompts; stream it to draw its samples. first_row: number of the
        first sample, which seeds its noise.
        """
        if not self.model.config.causal:
            raise ValueError(f'objective={self.objective} must be mask, diffusion or span for an encoder to '
                             'write a text: train one of those, or a decoder, which writes token by token')
        if self.draft is None:
            for batch in self.batches(prompts):
                rows = [prompt for prompt in batch for _ in range(self.num_samples)]
                decoder = self.decoder(batch, self.room(batch[0].tokens), self.num_samples, first_row)
                yield Generation(decoder, [self.new_sample(prompt) for prompt in rows])
                first_row += len(rows)
            return
        rows = [prompt for prompt in prompts for _ in range(self.num_samples)]
        for row, prompt in enumerate(rows, first_row):
            yield Generation(self.speculative(prompt, row), [self.new_sample(prompt)])

    def batches(self, prompts):
        """
        Yield lists of neighbouring prompts that give the same text together as alone: they have the same room
        for new tokens, and the same length where the rotation may depend on the length of the text.
        """
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)

        def kind(prompt):
            room = self.room(prompt.tokens)
            return room, len(prompt.tokens) if longest + room > self.model.wpe.longest else None
        for _, group in itertools.groupby(prompts, kind):
            group = list(group)
            for begin in range(0, len(group), self.batch_size):
                yield group[begin:begin + self.batch_size]

    def decoder(self, prompts, max_new_tokens, num_samples=1, first_row=0):
        """A Decoder for a batch of prompts, without the draft."""
        tokens, source = [prompt.tokens for prompt in prompts], None
        if self.model.encoder is not None:
            source = right_padded(tokens, self.device)
            # of ours without pairs, with the last token that the encoder reads (objectives.Prefix)
            tokens = [row[-1:] if self.begin is None else [self.begin] for row in tokens]
        idx, lengths = left_padded(tokens, self.device)
        lengths = None if min(lengths) == max(lengths) else lengths
        return Decoder(self.model, idx, max_new_tokens, self.sampling, self.stops[1] or None, self.seed,
                       lengths=lengths, num_samples=num_samples, first_row=first_row, chunk=self.chunk,
                       compiled=self.compiled, logprobs=self.logprobs, source=source)

    def speculative(self, prompt, row):
        """A Speculative decoder for one sample of a prompt."""
        idx = torch.tensor([prompt.tokens], device=self.device)
        return Speculative(self.model, self.draft, idx, self.room(prompt.tokens), self.sampling,
                           self.stops[1] or None, self.seed, first_row=row, draft_length=self.draft_length,
                           chunk=self.chunk, compiled=self.compiled)

    def new_sample(self, prompt):
        before = prompt.tokens if self.begin is None else []    # a target is a text of its own
        return Sample(prompt.text, Text(self.tokenizer, *self.stops, before=before))

    @property
    def stops(self):
        """(stop strings, stop tokens)"""
        return stops_of(self.stop, self.tokenizer)

    # -- filling in what is missing

    def fills(self, *texts):
        """Whether the model fills [MASK] in texts, and does not continue them. A published T5 does both."""
        return (self.objective in ('mask', 'diffusion', 'span')
                or bool(self.marks) and any(MASK in text for text in texts))

    @property
    def marks(self):
        """The tokens that stand for missing spans: those of objectives.Span, or of a published T5."""
        if self.objective == 'span':
            return range(self.tokenizer.vocab_size, self.tokenizer.vocab_size + SPANS)
        return [] if self.begin is None else span_marks(self.tokenizer)

    def fill(self, text: str, first_row: int = 0) -> list[tuple[str, list[int]]]:
        """
        num_samples times (the text, its tokens), with what is missing in the place of each [MASK]: a token,
        or of a model of spans any number of them. A text without one is continued by at most max_new_tokens.
        first_row: number of the first, which seeds its draws.
        """
        if not self.fills(text):
            raise ValueError(f'objective={self.objective} must be mask, diffusion or span to fill [MASK]: '
                             'this model continues a text')
        if self.draft is not None or self.sampling.repetition_penalty != 1:
            raise ValueError(f'objective={self.objective} must have no draft and repetition_penalty=1: leave '
                             'them out')
        if self.marks and self.model.config.causal:
            return self.fill_spans(text if MASK in text else text + MASK, first_row)
        mask, limit = mask_token(self.model, self.tokenizer), self.model.config.block_size
        pieces = text.split(MASK)
        tokens, whole = self.masked(pieces, mask), len(pieces) > 1
        if len(tokens) + (not whole) > limit:
            raise ValueError(f'the text has {len(tokens)} tokens and must have at most block_size={limit}, '
                             'and a missing one among them: shorten it')
        if not whole:
            tokens = self.masked([text, *[''] * min(self.max_new_tokens, limit - len(tokens))], mask)
        idx = torch.tensor([tokens] * self.num_samples, device=self.device)
        *_, filled = unmask(self.model, idx, mask, self.sampling, self.seed, first_row=first_row)
        around = self.tokenizer.prompt('')      # what a vocabulary puts around every text
        return [(self.tokenizer.decode([token for token in row if token not in around]), row)
                for row in filled.tolist()]

    def masked(self, pieces, mask):
        """The tokens of the pieces of a text, with `mask` between them."""
        if mask < self.tokenizer.vocab_size:    # of a published vocabulary, which knows it in a text
            return self.tokenizer.prompt(self.tokenizer.tokenizer.id_to_token(mask).join(pieces))
        first, *others = pieces
        tokens = self.tokenizer.prompt(first) if first else []
        return tokens + [token for piece in others for token in (mask, *self.tokenizer.encode(piece))]

    def fill_spans(self, text, first_row):
        pieces, marks = text.split(MASK), self.marks
        if len(pieces) > len(marks):
            raise ValueError(f'the text has {len(pieces) - 1} times {MASK} and must have fewer than '
                             f'{len(marks)}')
        source, parts = self.marked(pieces)
        source = torch.tensor([source], device=self.device)
        first = torch.tensor([[*([] if self.begin is None else [self.begin]), marks[0]]], device=self.device)
        given = {'source': source} if self.model.encoder is not None else {}
        idx = first if given else torch.cat((source, first), 1)
        # the first mark that the text has not ends it
        ends = [marks[len(pieces) - 1], *self.stops[1]]
        room = self.max_new_tokens if self.position_limit is None else self.position_limit - idx.shape[1]
        decoder = Decoder(self.model, idx, min(room, self.max_new_tokens), self.sampling, ends, self.seed,
                          num_samples=self.num_samples, first_row=first_row, chunk=self.chunk,
                          compiled=self.compiled, **given)
        filled, number = [], {mark: n for n, mark in enumerate(marks)}
        for row in torch.cat(list(decoder.stream()), 1).tolist():
            spans, at = [[] for _ in parts], 0
            for token in row:
                if token in ends:
                    break
                if token in number:
                    at = min(number[token], len(parts) - 1)
                else:
                    spans[at].append(token)
            tokens = [token for part, span in zip(parts, spans) for token in (*part, *span)]
            filled.append((self.tokenizer.decode(tokens), tokens))
        return filled

    def marked(self, pieces):
        """Pieces of a text -> (what is read: them with marks between, the tokens of each)"""
        if self.begin is None:
            parts = [self.tokenizer.encode(piece) for piece in pieces]
            return [token for mark, part in zip(self.marks, parts) for token in (*part, mark)][:-1], parts
        names = [*map(SPAN.format, range(len(pieces) - 1)), '']
        source, parts = self.tokenizer.prompt(''.join(map(''.join, zip(pieces, names)))), [[]]
        between = self.marks[:len(pieces) - 1]
        for token in source:
            if token in between:
                parts.append([])
            elif token not in self.tokenizer.ends:
                parts[-1].append(token)
        return source, parts

    # -- scoring, rounded weights

    def score(self, text: str) -> Score:
        """How likely a text is."""
        return self.score_tokens(self.tokens_to_score(text))

    def tokens_to_score(self, text: str) -> list[int]:
        """The tokens of a text, after the token that begins a document; ValueError for fewer than two."""
        tokens = self.tokenizer.encode(text)
        if self.tokenizer.bos is not None:          # so that the first token of the text is scored too
            tokens = [self.tokenizer.bos, *tokens]
        if len(tokens) < 2:
            raise ValueError(f'score={text} must have at least two tokens: the first is given, not scored; '
                             'give a longer text')
        check_vocabulary(self.model, self.tokenizer, tokens, 'score')
        return tokens

    def score_tokens(self, tokens: list[int], step: int | None = None) -> Score:
        """
        How likely the tokens are, each but the first given those before it within block_size. step: tokens of
        one forward pass, through a cache as in sampling; None: all. With an encoder: each given all others.
        """
        window = min(self.model.config.block_size, self.model.wpe.max_tokens or math.inf)
        idx = torch.tensor(tokens, device=self.device)
        if self.model.encoder is not None:
            raise ValueError('score must be left out for a model with an encoder: it says how likely a text '
                             'is after a source, not how likely a text is')
        if self.model.config.causal:
            logprobs = token_logprobs(self.model, idx, window, step)
        else:
            logprobs = pseudo_logprobs(self.model, idx, mask_token(self.model, self.tokenizer), window)[1:]
        return Score(tokens, logprobs.tolist(), logprobs.sum().item(),
                     len(self.tokenizer.decode_bytes(tokens[1:])))

    def pack(self):
        """On a CPU, keep the weights in the order in which it reads them fastest; call `quantize` before."""
        for model in (self.model, self.draft):
            if model is not None:
                quantize.quantize(model, 'none')

    def quantize(self, tokens: list[int] | None = None, kind: str = 'int8') -> QuantizationCost:
        """
        Round the weights to int8 or int4, in place, and measure the cost on these tokens, in the steps of
        sampling. Without tokens, on a text that the model draws beforehand.
        """
        quantize.check_kind(kind, self.device.type)
        tokens = tokens or self.own_tokens()
        dtype = str(self.model.wte.weight.dtype).removeprefix('torch.')
        before, size = self.score_tokens(tokens).bits_per_byte, bytes_per_step(self.model, None)
        quantize.quantize(self.model, kind)
        # a pass of more rows would not round the activations as a step of sampling does
        rounds = quantize.rounds_activations(self.model)
        step = quantize.MAX_KERNEL_ROWS if rounds else None
        return QuantizationCost(kind, len(tokens) - 1, dtype, before,
                                self.score_tokens(tokens, step).bits_per_byte, size,
                                bytes_per_step(self.model, None), rounds and dtype != 'bfloat16')

    def own_tokens(self):
        """About 256 tokens drawn from the model's own distribution."""
        if self.model.encoder is not None or not self.model.config.causal:
            raise ValueError('quant must be none where a model is or has an encoder: what rounding costs is '
                             'measured on a text that a decoder writes; leave it out')
        bos = self.tokenizer.bos
        first = [bos] if bos is not None else self.tokenizer.prompt(self.default_prompt or '\n')[:1]
        new = min(256, (self.model.wpe.max_tokens or 257) - 1)
        return self.model.generate(torch.tensor([first], device=self.device), new, seed=self.seed)[0].tolist()


def right_padded(rows, device):
    """Lists of tokens -> (B,S) int64, -1 behind the shorter ones"""
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)


def check_vocabulary(model, tokenizer, tokens, name):
    """ValueError for a token that the model has no embedding of: its tokenizer came from elsewhere."""
    rows = model.wte.weight.shape[0]
    beyond = [token for token in tokens if token >= rows]
    if beyond:
        text = tokenizer.decode_bytes(beyond[:1]).decode(errors='replace')
        raise ValueError(f'{name} has the token {beyond[0]} ({text!r}) and must have tokens below '
                         f"vocab_size={rows}, the model's: leave {text!r} out; if the text has none, name "
                         'another bos_token in tokenizer_config.json')


# ----------------------------------------------------------------------------------------------------------
# Loading


def load_run(out_dir, ckpt, setting='out_dir'):
    """
    The model, tokenizer and dataset description (meta) of a run, and its checkpoint in words. ckpt.pt is read
    where there is no best.pt yet. setting: the one that named out_dir.
    """
    path = os.path.join(out_dir, ckpt)
    if ckpt == 'best.pt' and not os.path.exists(path):
        path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.exists(path):
        refuse_misspelt(out_dir, setting)
        if ckpt not in ('best.pt', 'ckpt.pt') and RunFolder(out_dir).exists():
            raise FileNotFoundError(f'ckpt={ckpt} must be one of best.pt, ckpt.pt: {path} does not exist')
    try:
        state = checkpoint.load(path)
    except checkpoint.Damaged:
        raise
    except ValueError:
        if 'model_args' in checkpoint.load(path, needed=()):
            remedy = 'init_from' if setting == 'out_dir' else setting
            raise ValueError(f'{setting}={out_dir} must hold a run of train.py, and {path} is a checkpoint '
                             f'of nanoGPT: use --{remedy}={shlex.quote(path)}') from None
        raise
    model, tokenizer = checkpoint.build(state, path), from_meta(state['meta']['tokenizer'])
    model.texts = pretrained.texts.Texts(meta=tokenizer.meta())
    meta = state['meta'] | {'objective': state['settings'].get('objective', 'next')}
    return model, tokenizer, meta, in_words(state, path)


def in_words(state, path):
    """A checkpoint's file, step and validation loss. ckpt.pt has the lowest loss up to its step."""
    loss, which = state.get('best_val_loss', math.inf), '' if path.endswith('best.pt') else 'lowest '
    loss = f', {which}validation loss {loss:.4f}' if loss < math.inf else ''
    return f'{path}, step {state["step"]}{loss}'


def load_published(name, dtype):
    """The model and tokenizer of what GPT.from_pretrained(name) loads."""
    model, tokenizer = GPT.from_pretrained(name, dtype), pretrained.tokenizer_of(name)
    if tokenizer is None:
        raise ValueError(f'init_from={name} must hold tokenizer.json, to turn text into tokens: add the file '
                         'of the checkpoint that the weights are from')
    return model, tokenizer


def holds_run(name):
    """Whether `name` is the out_dir of a run, or nothing that GPT.from_pretrained could load either."""
    if any(os.path.exists(os.path.join(name, file)) for file in ('best.pt', 'ckpt.pt')):
        return True
    published = os.path.exists(os.path.join(name, 'config.json')) or name.endswith('.pt')
    return not published and (os.path.isdir(name) or '/' not in name and not name.startswith('gpt2'))


def load_draft(out_dir, ckpt, tokenizer, dtype):
    """The model of a run or of another checkpoint, to draft for a model with this tokenizer."""
    if '/' in out_dir and not os.path.exists(out_dir):
        refuse_misspelt(out_dir, 'draft')
    if not holds_run(out_dir):
        if not pretrained.same_tokenizer(out_dir, tokenizer.meta()):
            raise ValueError(f"draft={out_dir} has another tokenizer and must have the model's: take a "
                             'smaller model of the same family')
        return GPT.from_pretrained(out_dir, dtype)
    model, its_tokenizer, *_ = load_run(out_dir, ckpt, 'draft')
    if vocabulary(its_tokenizer) != vocabulary(tokenizer):
        raise ValueError(f'draft={out_dir} has another vocabulary ({its_tokenizer.vocab_size} tokens) and '
                         "must have the model's: take a draft trained on the same dataset")
    return model


def vocabulary(tokenizer):
    """A tokenizer's meta without the tokens that begin and end a text, which a draft need not share."""
    return {key: value for key, value in tokenizer.meta().items() if key not in ('ends', 'bos', 'add_bos')}


def prepare(model, n_tokens, device, dtype):
    """Move the model to its device, and drop the rows of the head that only round up the vocabulary."""
    model.eval().to(device, dtype)
    head = model.lm_head.weight[:n_tokens]
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    if model.lm_head.bias is not None:
        bias = model.lm_head.bias[:n_tokens]
        model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
