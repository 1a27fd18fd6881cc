"""
Write text with a trained model, or say how likely a text is.

    python sample.py --out_dir=out/llama_small --start="def main"
    python sample.py --out_dir=out/llama_small --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
    python sample.py --init_from=gpt2 --start="The meaning of life"    # or a folder in Hugging Face format
    python sample.py --out_dir=out/llama_small --prompts=prompts.txt --out=samples.jsonl
    python sample.py --out_dir=out/llama_small --score=FILE:text.txt
    python sample.py --out_dir=out/llama_small --tasks=data/hellaswag/hellaswag.jsonl    # multiple choice
    python sample.py --out_dir=out/llama_small --draft=out/tiny        # speculative decoding

In Python: nanoblocks/decoding/session.py.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which `python -P` leaves out

from data import console
from nanoblocks.commandline import refuse_words, warn_of_unread

# from the first line on: torch alone takes seconds to import
console.never_fail()
console.answer_ctrl_c()

from configurator import configure, errors_as_messages, model_flags
from model import GPTConfig, check_counts
from nanoblocks.decoding.console import Console
from nanoblocks.decoding.decode import Sampling
from nanoblocks.decoding.quantize import check_kind
from nanoblocks.decoding.session import Session
from nanoblocks.decoding.text import read_prompts, refuse_to_overwrite, text_or_file
from nanoblocks.hardware import pick_device, warn_of_torch_version
from nanoblocks.training.stopping import answer_out_of_memory

# ----------------------------------------------------------------------------------------------------------
# Settings

# the model
init_from = 'resume'                # resume: the run in out_dir; else a checkpoint's folder, file or hub id
out_dir = 'out'                     # folder of the run to sample from
ckpt = 'best.pt'                    # file of the run: best.pt (lowest validation loss) or ckpt.pt (newest)
# what to do: at most one of these five
start = ''                          # prompt, or FILE:path; empty: the usual prompt of the run's dataset
prompts = ''                        # file of prompts: one per line, or .jsonl with a "prompt" per line
interactive = False                 # continue each line that is typed
score = ''                          # print how likely this text is; FILE:path for the text of a file
tasks = ''                          # score these files of multiple choice (JSON lines): FILE,FILE,...
# what may be drawn
num_samples = 3                     # samples of each prompt
max_new_tokens = 500                # longest sample; shorter where the document or learned positions end
temperature = 0.6                   # 0: the likeliest token; 1: the model's distribution; above 1: flatter
top_k: int | None = 200             # draw from this many of the likeliest tokens; None: from all
top_p: float | None = 0.9           # draw from the fewest tokens with this total probability; None: from all
min_p: float | None = None          # draw from tokens with p >= min_p * (largest p); None: from all
repetition_penalty = 1.0            # above 1: tokens that are already in the text become less likely
stop = ''                           # text or special token that ends a sample, or a JSON list of them
seed = 1337                         # seed of the random draws: the same seed gives the same samples
# how
batch_size = 16                     # prompts or choices that run together; results do not depend on it
chunk = 2048                        # prompt tokens per forward pass
draft = ''                          # a smaller model that drafts (speculative decoding): a run or checkpoint
ahead = 4                           # tokens that the draft proposes in each round
quant = 'none'                      # none, or round the weights: int8, or int4 (on a CPU)
out = ''                            # file to write: prompt, text, tokens, log-probabilities, as JSON lines
device = 'auto'                     # where to run: auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # type of the weights: float32, bfloat16, float16; auto: 16 bits on a GPU
kernels = 'auto'                    # on a GPU: auto, torch (none), triton (all), mamba_ssm (that package's)
attention = 'auto'                  # plain causal attention on a GPU: auto (PyTorch's), fa3, fa4 (packages)
bandwidth = False                   # say what share of the memory's bandwidth a step used
compile = False                     # torch.compile the step: a minute to the first token, faster afterwards

refuse_words(sys.argv[1:], globals(), model_flags(GPTConfig))
answer_out_of_memory('lower --batch_size, --num_samples, --max_new_tokens or --chunk')
given = {}                          # what the command line set: {name: the flag or file that set it}
configure(globals(), given=given)
warn_of_torch_version()

# ----------------------------------------------------------------------------------------------------------

with errors_as_messages():
    check_counts(1, num_samples=num_samples, max_new_tokens=max_new_tokens, ahead=ahead,
                 batch_size=batch_size, chunk=chunk)
    check_kind(quant, pick_device(device))
    modes = {'start': start, 'prompts': prompts, 'interactive': interactive, 'score': score,
             'tasks': tasks}
    if sum(map(bool, modes.values())) > 1:
        given = ' and '.join(name for name in modes if modes[name])
        raise ValueError(f'{given} must not be set together: each says what to do')

    warn_of_unread(given, [
        (init_from != 'resume', f'with init_from={init_from}', ['out_dir'] + ['ckpt'] * (not draft)),
        (score, 'with score', ['num_samples', 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p',
                               'repetition_penalty', 'stop', 'draft']),
        (tasks, 'with tasks', ['num_samples', 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p',
                               'repetition_penalty', 'stop', 'draft']),
        (draft, 'with a draft', ['bandwidth']), (not draft, 'without a draft', ['ahead'])])

    # read before the model is loaded, so that a wrong path is refused at once
    refuse_to_overwrite(out, prompts, *tasks.split(','),
                         *(text for text in (start, score) if text.startswith('FILE:')))
    text = text_or_file(score or start)
    texts = read_prompts(prompts) if prompts else []
    session = Session.load(
        init_from, out_dir, ckpt, draft=draft, device=device, dtype=dtype, kernels=kernels,
        attention=attention, sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        stop=stop, seed=seed,
        num_samples=num_samples, max_new_tokens=max_new_tokens, batch_size=batch_size, chunk=chunk,
        draft_length=ahead, compiled=compile, logprobs=bool(out))
    shown = Console(session, out, quant, bandwidth)

    if score:
        shown.score(text)
    elif tasks:
        shown.tasks(tasks)
    elif interactive:
        shown.interactive()
    elif prompts:
        shown.samples(texts, prompts)
    else:
        shown.samples([text or session.default_prompt])
