"""
Write text with a trained model.

    python sample.py --out_dir=out/llama_small --start="def main"
    python sample.py --out_dir=out/llama_small --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
    python sample.py --init_from=gpt2 --start="The meaning of life"    # or a folder in Hugging Face format
"""
import codecs
import os
import sys
import time

import torch

import checkpoint
import pretrained
from configurator import configure, one_sentence
from data.common import read_text
from data.tokenizer import from_meta
from kernels import use_kernels
from model import GPT, check_sampling

# ----------------------------------------------------------------------------------------------------------
# Settings

init_from = 'resume'                # resume (the run in out_dir), or a checkpoint: a folder, file or hub id
out_dir = 'out'                     # the run to read
ckpt = 'best.pt'                    # best.pt (lowest validation loss) or ckpt.pt (newest)
start = ''                          # what to continue: a text, or FILE:path; empty: what the dataset says
num_samples = 3                     # continuations of it
max_new_tokens = 500                # tokens in each; fewer where the document or learned positions end
temperature = 0.6                   # 0: always the likeliest token; 1: as the model says; higher: wilder
top_k: int | None = 200             # draw from the k likeliest tokens only; None: from all
top_p: float | None = 0.9           # draw from the fewest tokens that hold this share; None: all
seed = 1337                         # of the draws
device = 'auto'                     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # of the weights: auto (on a GPU 16 bit), float32, bfloat16, float16
kernels = 'auto'                    # on a GPU: auto, torch (none), triton (all, and compiled or not)
compile = False                     # torch.compile the model: a minute for the first token, faster ones after

configure(globals())
sys.stdout.reconfigure(errors='replace')  # for consoles that cannot print every character

# ----------------------------------------------------------------------------------------------------------
# The model, its tokenizer and the prompt

if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
if dtype == 'auto':
    dtype = 'float32'
    if device.startswith('cuda'):
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'

with one_sentence():
    checkpoint.check_device(device)
    use_kernels(kernels, device)
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'dtype={dtype} must be one of auto, float32, bfloat16, float16')
    for name, value in (('num_samples', num_samples), ('max_new_tokens', max_new_tokens)):
        if value < 1:
            raise ValueError(f'{name}={value} must be at least 1')
    check_sampling(temperature, top_k, top_p)
    if init_from == 'resume':
        path = os.path.join(out_dir, ckpt)
        if ckpt == 'best.pt' and not os.path.exists(path):
            path = os.path.join(out_dir, 'ckpt.pt')
        state = checkpoint.load(path)
        model, tokenizer = checkpoint.build(state, path), from_meta(state['meta']['tokenizer'])
        start = start or state['meta'].get('prompt', '')
    else:
        model, tokenizer = GPT.from_pretrained(init_from), pretrained.tokenizer_of(init_from)
        if tokenizer is None:
            raise ValueError(f'{init_from} must hold tokenizer.json, without which its tokens are no text')
    model = model.eval().to(device, getattr(torch, dtype))
    if start.startswith('FILE:'):
        start = read_text(start.removeprefix('FILE:'))
    new_document = start in ('', '<|endoftext|>') and tokenizer.eot is not None
    start = start or '\n'  # where no token begins a document
    prompt = [tokenizer.eot] if new_document else tokenizer.prompt(start)
    room = max_new_tokens if model.wpe.max_tokens is None else model.wpe.max_tokens - len(prompt)
    if room < 1:
        raise ValueError(f'start has {len(prompt)} tokens and must have fewer than '
                         f'block_size={model.wpe.max_tokens}, where learned positions end: shorten it')
# rows of a vocabulary that was rounded up have no text: without them they cannot be drawn
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:tokenizer.vocab_size])
if compile:
    model.compile()

# ----------------------------------------------------------------------------------------------------------
# Samples, printed as they come

idx, ran_out = torch.tensor([prompt], device=device), False
for n in range(num_samples):
    # a character may be spread over several tokens: nothing is printed before its last byte
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    print('' if new_document else start, end='', flush=True)
    began, count = time.time(), 0
    for token in model.stream(idx, min(room, max_new_tokens), temperature, top_k, top_p, tokenizer.eot,
                              seed + n):
        if count == 0:
            prefilled = time.time()
        count += 1
        if token.item() != tokenizer.eot:
            print(decoder.decode(tokenizer.decode_bytes([token.item()])), end='', flush=True)
    print(decoder.decode(b'', final=True))
    ran_out |= count == room < max_new_tokens
    rate = (count - 1) / (time.time() - prefilled) if count > 1 else 0.0
    print(f'--------------- {count} tokens, the first after {prefilled - began:.3f} s, '
          f'then {rate:.1f} tokens/s')
if ran_out:
    print(f'stopped at block_size={model.wpe.max_tokens}, where learned positions end; '
          'a model with pos=rope goes on')
