"""
Write text with a trained model, or say how likely a text is.

    python sample.py --out_dir=out/llama_small --start="def main"
    python sample.py --out_dir=out/llama_small --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
    python sample.py --init_from=gpt2 --start="The meaning of life"    # or a folder in Hugging Face format
    python sample.py --out_dir=out/llama_small --prompts=prompts.txt --out=samples.jsonl
    python sample.py --out_dir=out/llama_small --score=FILE:text.txt
    python sample.py --out_dir=out/llama_small --draft=out/tiny        # speculative decoding
"""
import itertools
import json
import math
import os
import sys

import torch

from configurator import configure, errors_as_messages
from data.common import read_text
from data.tokenizer import from_meta
from kernels import use_kernels
from model import GPT
from nanoblocks import pretrained
from nanoblocks.decoding import quantize as quantization
from nanoblocks.decoding.decode import (
    Decoder,
    Sampling,
    Text,
    arriving,
    left_padded,
    logprobs_of,
    special_token,
)
from nanoblocks.decoding.speculative import Speculative
from nanoblocks.hardware import (
    bytes_per_step,
    check_device,
    gpu_dtype,
    pick_device,
    read_bandwidth,
    synchronized_time,
)
from nanoblocks.training import checkpoint

# ----------------------------------------------------------------------------------------------------------
# Settings

# the model
init_from = 'resume'                # resume (the run in out_dir), or a checkpoint: a folder, file or hub id
out_dir = 'out'                     # the run to read
ckpt = 'best.pt'                    # best.pt (lowest validation loss) or ckpt.pt (newest)
# what to continue
start = ''                          # a text, or FILE:path; empty: what the dataset says
prompts = ''                        # or a file of prompts: one a line, or JSON lines with a "prompt" each
interactive = False                 # or each line that is typed
score = ''                          # or nothing: say how likely this text is, or FILE:path
# what may be drawn
num_samples = 3                     # continuations of each prompt, which is run once
max_new_tokens = 500                # tokens in each; fewer where the document or learned positions end
temperature = 0.6                   # 0: always the likeliest token; 1: as the model says; higher: wilder
top_k: int | None = 200             # draw from the k likeliest tokens only; None: from all
top_p: float | None = 0.9           # draw from the fewest tokens that hold this share; None: all
min_p: float | None = None          # draw from tokens this share as likely as the likeliest; None: all
repetition_penalty = 1.0            # above 1: tokens that the text holds already become less likely
stop = ''                           # a text or special token that ends a sample, or a JSON list of them
seed = 1337                         # of the draws
# how
batch_size = 16                     # prompts: as many of them at once
chunk = 2048                        # tokens of a prompt that are run at once
draft = ''                          # out_dir of a smaller model that drafts (speculative decoding)
ahead = 4                           # draft: tokens it runs ahead
quant = 'none'                      # none, int8 (of the weights)
out = ''                            # a file for prompt, text, tokens and log-probabilities, as JSON lines
device = 'auto'                     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # of the weights: auto (on a GPU 16 bit), float32, bfloat16, float16
kernels = 'auto'                    # on a GPU: auto, torch (none), triton (all, and compiled or not)
compile = False                     # torch.compile the step: a minute for the first token, faster ones after

configure(globals())
sys.stdout.reconfigure(errors='replace')  # for consoles that cannot print every character

# ----------------------------------------------------------------------------------------------------------
# The model, its tokenizer and the prompts

device = pick_device(device)
if dtype == 'auto':
    dtype = gpu_dtype() if device.startswith('cuda') else 'float32'


def load_run(folder):
    """The model, tokenizer and meta of a run."""
    path = os.path.join(folder, ckpt)
    if ckpt == 'best.pt' and not os.path.exists(path):
        path = os.path.join(folder, 'ckpt.pt')
    state = checkpoint.load(path)
    return checkpoint.build(state, path), from_meta(state['meta']['tokenizer']), state['meta']


def prepared(model):
    """The model on its device, without the rows of a rounded-up vocabulary: they have no text."""
    model = model.eval().to(device, getattr(torch, dtype))
    head = model.lm_head.weight[:tokenizer.vocab_size]
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return model


def text_or_file(value):
    return read_text(value.removeprefix('FILE:')) if value.startswith('FILE:') else value


def read_prompts(path):
    """The prompts of a file, one a line or as JSON lines."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f'prompts={path} must hold at least one line that is not empty')
    try:
        return [str(json.loads(line)['prompt']) for line in lines] if path.endswith('.jsonl') else lines
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'prompts={path} must hold JSON lines with a "prompt" each') from None


def stops():
    """The texts and the tokens that end a sample."""
    try:
        wanted = json.loads(stop) if stop.startswith('[') else [stop] if stop else []
    except ValueError:
        raise ValueError(f'stop={stop} must be a text, or a JSON list as ["\\n\\n", "END"]') from None
    special = {text: special_token(tokenizer, text) for text in map(str, wanted)}
    ends = [token for token in (tokenizer.eot, *special.values()) if token is not None]
    return [text for text, token in special.items() if text and token is None], ends or None


def encoded(text):
    """(the tokens of a prompt, what is printed of it)"""
    if text in ('', '<|endoftext|>') and tokenizer.eot is not None:
        return [tokenizer.eot], ''
    text = text or '\n'  # where no token begins a document
    return tokenizer.prompt(text), text


def room_behind(tokens, name):
    """How many tokens may follow these. ValueError where learned positions leave none."""
    limits = [m.wpe.max_tokens for m in (model, draft_model) if m and m.wpe.max_tokens is not None]
    if limits and len(tokens) >= min(limits):
        raise ValueError(f'{name} has {len(tokens)} tokens and must have fewer than '
                         f'block_size={min(limits)}, where learned positions end: shorten it')
    return min([max_new_tokens, *(limit - len(tokens) for limit in limits)])


with errors_as_messages():
    check_device(device)
    use_kernels(kernels, device)
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'dtype={dtype} must be one of auto, float32, bfloat16, float16')
    if quant not in ('none', 'int8'):
        raise ValueError(f'quant={quant} must be one of none, int8')
    for name, value in (('num_samples', num_samples), ('max_new_tokens', max_new_tokens), ('ahead', ahead),
                        ('batch_size', batch_size), ('chunk', chunk)):
        if value < 1:
            raise ValueError(f'{name}={value} must be at least 1')
    modes = {'start': start, 'prompts': prompts, 'interactive': interactive, 'score': score}
    if sum(map(bool, modes.values())) > 1:
        given = ' and '.join(name for name in modes if modes[name])
        raise ValueError(f'{given} must not be set together: each says what to do')
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    draft_model, meta = None, {}
    if init_from == 'resume':
        model, tokenizer, meta = load_run(out_dir)
    else:
        model, tokenizer = GPT.from_pretrained(init_from), pretrained.tokenizer_of(init_from)
        if tokenizer is None:
            raise ValueError(f'{init_from} must hold tokenizer.json, without which its tokens are no text')
    model = prepared(model)
    if draft:
        draft_model, its_tokenizer, _ = load_run(draft)
        if its_tokenizer.meta() != tokenizer.meta():
            raise ValueError(f'draft={draft} has a vocabulary of {its_tokenizer.vocab_size} tokens that is '
                             'not that of the model and must be: take a draft trained on the same dataset')
        draft_model = prepared(draft_model)
    stop_texts, stop_tokens = stops()
    if prompts:
        texts = read_prompts(prompts)
    else:
        texts = [text_or_file(start) or meta.get('prompt', '')]
    texts = [] if interactive or score else [encoded(text) for text in texts]
    for n, (tokens, _) in enumerate(texts):
        room_behind(tokens, f'prompt {n + 1} of {prompts}' if prompts else 'start')
    scored_text = text_or_file(score) if score else ''
    sink = open(out, 'w', encoding='utf-8') if out else None

# ----------------------------------------------------------------------------------------------------------
# How likely a text is


def text_logprobs(tokens):
    window = min(model.config.block_size, model.wpe.max_tokens or math.inf)
    return logprobs_of(model, torch.tensor(tokens, device=device), window)


def bits_per_byte(tokens):
    """Of all but the first of these tokens: nats, bytes, bits per byte."""
    nats, size = text_logprobs(tokens).sum().item(), len(tokenizer.decode_bytes(tokens[1:]))
    return nats, size, -nats / math.log(2) / max(1, size)


def write_line(**row):
    if sink:
        sink.write(json.dumps(row, ensure_ascii=False) + '\n')
        sink.flush()


def own_text():
    """Tokens that the model draws as it is: what they lose in a copy is how far the copy is from it."""
    first = [tokenizer.eot] if tokenizer.eot is not None else encoded(meta.get('prompt', ''))[0][:1]
    size = min(256, (model.wpe.max_tokens or 257) - 1)
    return model.generate(torch.tensor([first], device=device), size, seed=seed)[0].tolist()


with errors_as_messages():
    to_score = None
    if score:
        to_score = tokenizer.encode(scored_text)
        if tokenizer.eot is not None:  # so that the first token counts as well
            to_score = [tokenizer.eot, *to_score]
        if len(to_score) < 2:
            raise ValueError('score must be a text of at least two tokens, the first of which is given')
    if quant == 'int8':
        sample_text = to_score or own_text()
        before, size = bits_per_byte(sample_text)[2], bytes_per_step(model, None)
        model = quantization.quantize(model)
        after = bits_per_byte(sample_text)[2]
        print(f'int8: {after:.4f} bits per byte, {after - before:+.4f} of {dtype}, on '
              f'{len(sample_text) - 1} tokens of {"the text" if score else "its own"}; '
              f'{bytes_per_step(model, None) / 1e6:.1f} MB of weights a token in place of {size / 1e6:.1f}')
if score:
    nats, size, bpb = bits_per_byte(to_score)
    count = len(to_score) - 1
    print(f'{count} tokens, {size} bytes: log-likelihood {nats:.3f} nats, perplexity a token '
          f'{math.exp(-nats / count):.3f}, {bpb:.4f} bits per byte')
    write_line(text=scored_text, tokens=to_score, logprobs=text_logprobs(to_score).tolist(),
               bits_per_byte=bpb)

# ----------------------------------------------------------------------------------------------------------
# Samples, the first of a batch printed as it comes


def decoders(batch, first_row):
    """[(what draws, the prompts of its rows)] for prompts [(tokens, text)]."""
    room = room_behind(max((tokens for tokens, _ in batch), key=len), 'start')
    if draft_model:
        rows = [prompt for prompt in batch for _ in range(num_samples)]
        return [(Speculative(model, draft_model, torch.tensor([prompt[0]], device=device), room, sampling,
                             stop_tokens, seed, first_row=first_row + n, ahead=ahead, chunk=chunk,
                             compiled=compile), [prompt]) for n, prompt in enumerate(rows)]
    return [(plain_decoder(batch, room, first_row), [prompt for prompt in batch for _ in range(num_samples)])]


def plain_decoder(batch, room, first_row=0, samples=None):
    idx, lengths = left_padded([tokens for tokens, _ in batch], device)
    lengths = None if min(lengths) == max(lengths) else lengths
    return Decoder(model, idx, room, sampling, stop_tokens, seed, num_samples=samples or num_samples,
                   lengths=lengths, first_row=first_row, chunk=chunk, compiled=compile, logprobs=bool(out))


def play(decoder, rows):
    """Run it to its end, print and write what it says -> (tokens, steps after the first, their seconds)"""
    said = [Text(tokenizer, stop_texts, stop_tokens or ()) for _ in rows]
    logprobs, ends = [[] for _ in rows], [0.0] * len(rows)
    print(rows[0][1], end='', flush=True)
    began = prefilled = synchronized_time(device)
    for step, (values, likely) in enumerate(arriving(decoder, device.startswith('cuda'))):
        if step == 0:
            prefilled = synchronized_time(device)
        for n, (text, value) in enumerate(zip(said, values)):
            if text.done:
                continue
            if out:
                logprobs[n].append(round(likely[n], 5))
            fresh = text.add(value)
            if n == 0:
                print(fresh, end='', flush=True)
            if text.done:
                decoder.done[n], ends[n] = True, synchronized_time(device)
        if all(text.done for text in said):
            break
    over = synchronized_time(device)
    for n, (text, (prompt, shown)) in enumerate(zip(said, rows)):
        rest = text.finish()
        print(rest if n == 0 else shown + text.text)
        count, seconds = len(text.tokens), (ends[n] or over) - prefilled
        rate = (count - 1) / seconds if count > 1 and seconds > 0 else 0.0
        print(f'--------------- {count} tokens, the first after {prefilled - began:.3f} s, '
              f'then {rate:.1f} tokens/s')
        write_line(prompt=shown, text=text.text, tokens=text.tokens, logprobs=logprobs[n])
    return sum(len(text.tokens) for text in said), step, over - prefilled


def report(decoder, total, steps, seconds):
    """What the last steps took, against what this machine can do."""
    if steps == 0 or decoder.cache is None:
        return
    if draft_model:
        return report_draft(decoder, steps, seconds)
    rows, size = len(decoder.done), bytes_per_step(model, decoder.cache, len(decoder.done))
    bandwidth = read_bandwidth(min(size, 2 ** 29), device, rounds=2)
    print(f'{rows} {"row" if rows == 1 else "rows"} together: {total - rows:.0f} tokens in {steps} steps of '
          f'{seconds / steps * 1e3:.2f} ms, each of which reads {size / 1e6:.2f} MB: '
          f'{size * steps / seconds / bandwidth:.0%} of the measured {bandwidth / 1e9:.1f} GB/s')


def report_draft(decoder, steps, seconds):
    """How much of the draft was kept, and the speed against a few steps without it."""
    print(f'draft: {decoder.kept / max(1, decoder.proposed):.0%} of its tokens kept, '
          f'{(steps + 1) / decoder.rounds:.2f} tokens a round', end='')
    plain = plain_decoder([(decoder.idx[0].tolist(), '')], min(64, decoder.max_new_tokens), samples=1)
    stamps = [synchronized_time(device) for _ in plain.stream()]
    # the first round, and without a draft the first step after the prompt, warm up
    if decoder.rounds > 1 and len(stamps) > 2:
        rate = (steps + 1 - decoder.first_round) / seconds
        print(f'; {rate * (stamps[-1] - stamps[1]) / (len(stamps) - 2):.2f}x the speed without it', end='')
    print()


def typed():
    """Prompts as they are typed, until the end of the file."""
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def batches():
    """
    [(number of the first, prompts)]: neighbours that no text can tell from being alone. Learned positions
    leave all of them the same room, and a rotation that depends on the length is that of one length.
    """
    def kind(item):
        tokens = item[1][0]
        room = room_behind(tokens, 'start')
        return room, len(tokens) if max_length + room > model.wpe.longest else None
    max_length = max((len(tokens) for tokens, _ in texts), default=0)
    for _, group in itertools.groupby(enumerate(texts), kind):
        group = list(group)
        for begin in range(0, len(group), batch_size):
            some = group[begin:begin + batch_size]
            yield some[0][0], [prompt for _, prompt in some]


ran_out = False


def sample_all(batch, first_row):
    global ran_out
    for decoder, rows in decoders(batch, first_row):
        total, steps, seconds = play(decoder, rows)
        ran_out |= steps + 1 == decoder.max_new_tokens < max_new_tokens
    return decoder, total, steps, seconds


with errors_as_messages():
    last, row = None, 0
    for line in typed() if interactive else ():
        try:
            last = sample_all([encoded(line)], row)
        except ValueError as error:  # the next line may be better
            print(error)
        except KeyboardInterrupt:  # enough of this text
            print()
        row += num_samples
    for begin, batch in batches():
        last = sample_all(batch, begin * num_samples)
    if last:
        report(*last)
if sink:
    sink.close()
if ran_out:
    limits = [m.wpe.max_tokens for m in (model, draft_model) if m and m.wpe.max_tokens is not None]
    print(f'stopped at block_size={min(limits)}, where learned positions end; '
          'a model with pos=rope goes on')
