"""
Against other repositories: the same model, trained by each in turns, and read and continued with a cache.

A peer's model has the sizes of ours, its head is tied to its embedding as ours is, and the numbers of
parameters are compared. The loss is nanoGPT's own, and for others PyTorch's cross entropy of their logits.
transformers runs our model, exported with its weights, so its losses and logits must be ours.
"""
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT
from nanoblocks.decoding.decode import Decoder, Sampling
from nanoblocks.experiments.limits import LABEL, Case, cases
from nanoblocks.experiments.speed import nanogpt_model, training_step
from nanoblocks.experiments.timing import interleaved, print_markdown, timed, times
from nanoblocks.experiments.topics import each
from nanoblocks.hardware import synchronized_time

FAMILIES = ['gpt2', 'llama', 'mixtral', 'mamba', 'mamba2', 'gated_deltanet']
SIZES = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'ffn_width', 'block_size', 'vocab_size')


def peers(flags, models, tokens, nanogpt, rounds, device):
    """The same models trained by nanoGPT, litgpt, x-transformers, transformers and mamba.py, in turns."""
    for name in flags:
        if name not in SIZES:
            raise ValueError(f'{name}={flags[name]} must be left out: the peers have these models as they '
                             f'are, and only sizes are free: {", ".join(SIZES)}')
    everything = cases(flags, models, tokens, ('gpt2', 'llama'), FAMILIES, large_dtypes=('bfloat16',))
    missing = {peer: remedy for peer in PEERS if (remedy := remedy_for(peer, nanogpt))}
    for peer, remedy in missing.items():
        print(f'{peer} is left out: {remedy}')
    here = [peer for peer in PEERS if peer not in missing]
    print('\na training step; above 1: ours is faster')
    print_markdown([*LABEL, 'peer', 'ours ms', 'theirs ms', 'theirs / ours', 'parameters',
                    'loss at first, ours and theirs'],
                   (row for case in each(everything, Case.title)
                    for row in train(case, here, nanogpt, rounds, device)))
    if 'transformers' in here:
        print('\none row with a cache, against transformers; above 1: ours is faster')
        print_markdown(['model', 'weights in', 'what', 'ours ms', 'theirs ms', 'theirs / ours'],
                       (row for case in each(cached(everything), Case.title)
                        for row in generate(case, flags, rounds, device)))


# ----------------------------------------------------------------------------------------------------------
# The peers' models. Each builder: (a model of ours, nanoGPT's folder) -> a model with the call of ours


class Theirs(nn.Module):
    """A peer's model with the call of ours: (x, targets) -> (None, loss)."""

    def __init__(self, model, config, read=lambda output: output):
        super().__init__()
        self.model, self.config, self.read = model, config, read

    def forward(self, x, targets):
        logits = self.read(self.model(x))
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt_gpt2(ours, folder):
    with redirect_stdout(sys.stderr):  # it says how many parameters it has
        return nanogpt_model(folder, ours.config)


def litgpt_decoder(ours, folder):
    """litgpt's GPT, with Llama's blocks or Mixtral's."""
    c, litgpt, experts = ours.config, import_module('litgpt.model'), {}
    width = dict(mlp_class_name='LLaMAMLP', intermediate_size=c.ffn_width)
    if ours.moes:
        experts = dict(n_expert=c.n_expert, n_expert_per_token=c.n_expert_used)
        width = dict(mlp_class_name='LLaMAMoE', moe_intermediate_size=c.expert_width, intermediate_size=1)
    model = litgpt.GPT(litgpt.Config(
        block_size=c.block_size, n_layer=c.n_layer, n_embd=c.n_embd, vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size, n_head=c.n_head, n_query_groups=c.n_kv_head, head_size=c.head_dim,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name='RMSNorm', **width,
        **experts))
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    return Theirs(model, c)


def x_transformers_llama(ours, folder):
    c, x_transformers = ours.config, import_module('x_transformers')
    layers = x_transformers.Decoder(
        dim=c.n_embd, depth=c.n_layer, heads=c.n_head, attn_dim_head=c.head_dim, attn_kv_heads=c.n_kv_head,
        attn_flash=True, rotary_pos_emb=True, rotary_emb_dim=c.head_dim, use_rmsnorm=True, ff_glu=True,
        ff_swish=True, ff_no_bias=True, ff_mult=(c.ffn_width + 0.5) / c.n_embd, verbose=False)
    return Theirs(x_transformers.TransformerWrapper(
        num_tokens=c.vocab_size, max_seq_len=c.block_size, attn_layers=layers, tie_embedding=True), c)


def mamba_py(ours, folder):
    """mamba.py's layers, whose last norm and tied head are put around them as its own LM does."""
    c, mamba = ours.config, import_module('mambapy.mamba')
    sizes = mamba.MambaConfig(d_model=c.n_embd, n_layers=c.n_layer, d_state=c.ssm_state,
                              expand_factor=c.ssm_expand, d_conv=c.ssm_conv)
    embedding, head = nn.Embedding(c.vocab_size, c.n_embd), nn.Linear(c.n_embd, c.vocab_size, bias=False)
    head.weight = embedding.weight
    nn.init.normal_(embedding.weight, std=sizes.base_std)
    return Theirs(nn.Sequential(embedding, mamba.Mamba(sizes), mamba.RMSNorm(c.n_embd), head), c)


def transformers_any(ours, folder):
    return Theirs(in_transformers(ours), ours.config, read=lambda output: output.logits)


def in_transformers(ours):
    """Our model as transformers loads it, with the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings('ignore', '.past_key_values. is deprecated')  # older versions have no other name
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the default of GPT-2 in transformers is 0.1
    return model


class Peer(NamedTuple):
    module: str                         # what is imported; empty for nanoGPT, which is a folder
    package: str                        # what pip installs
    builds: dict[str, Callable]         # for each family that it has, the builder


PEERS = {
    'nanoGPT': Peer('', '', {'gpt2': nanogpt_gpt2}),
    'litgpt': Peer('litgpt', 'litgpt', {'llama': litgpt_decoder, 'mixtral': litgpt_decoder}),
    'x-transformers': Peer('x_transformers', 'x-transformers', {'llama': x_transformers_llama}),
    'transformers': Peer('transformers', 'transformers', dict.fromkeys(FAMILIES, transformers_any)),
    'mamba.py': Peer('mambapy', 'mambapy', {'mamba': mamba_py}),
}


def remedy_for(peer, nanogpt):
    """How to get a peer that is not here; None for one that is."""
    if peer == 'nanoGPT':
        return None if nanogpt else 'name the folder of a checkout with --nanogpt=FOLDER'
    found = find_spec(PEERS[peer].module)
    return None if found and found.origin else f'pip install {PEERS[peer].package}'


# ----------------------------------------------------------------------------------------------------------
# Training


def train(case, available, nanogpt, rounds, device):
    """The rows of a case: a step of ours and of each peer that has the model, in turns."""
    models = {'ours': GPT(case.config)}
    for peer in available:
        if case.name in PEERS[peer].builds:
            models[peer] = PEERS[peer].builds[case.name](models['ours'], nanogpt)
    losses = {name: first_loss(model.to(device), name, case) for name, model in models.items()}
    if abs(losses.get('transformers', losses['ours']) - losses['ours']) > 1e-3:
        raise ValueError(f'the loss of {case.name} must be {losses["ours"]:.4f} in transformers too, not '
                         f'{losses["transformers"]:.4f}: they cannot be compared')
    steps = {name: training_step(model, case.dtype, case.sequences, device) for name, model in models.items()}
    first = {name: timed(step, device)() for name, step in steps.items()}
    # what takes twenty times as long as ours may take minutes: its first step is enough
    found = {name: ms for name, ms in first.items() if ms > 20 * first['ours']}
    again = {name: step for name, step in steps.items() if name not in found}
    found |= {name: statistics.median(ms) for name, ms in times(again, rounds, device, warmup=0).items()}
    rows = []
    for peer in list(models)[1:]:
        rows.append([*case.label(), peer, f'{found["ours"]:.1f}', f'{found[peer]:.1f}',
                     f'{found[peer] / found["ours"]:.2f}', parameters(models['ours'], models[peer]),
                     f'{losses["ours"]:.4f} {losses[peer]:.4f}'])
    return rows


@torch.no_grad()
def first_loss(model, name, case):
    """The loss of a model before training, in fp32 on the same tokens for all; ValueError if not finite."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(case.config.vocab_size, (2, 1, case.config.block_size), generator=generator)
    device = next(model.parameters()).device
    loss = model.eval()(x.to(device), y.to(device))[1].item()
    model.train()
    if not math.isfinite(loss):
        raise ValueError(f'the loss of {name} must be finite, not {loss}: leave {case.name} out of --models')
    return loss


def parameters(ours, theirs):
    """'equal', or how many parameters each has."""
    a, b = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    return 'equal' if a == b else f'{a:,} against {b:,}'


# ----------------------------------------------------------------------------------------------------------
# Reading a prompt and continuing it


def cached(everything):
    """The cases whose prompts and tokens are timed: each model with a cache of keys, at its largest size."""
    largest = {case.name: case for case in sorted(everything, key=lambda case: case.config.n_embd)}
    return [largest[name] for name in ('gpt2', 'llama') if name in largest]


def generate(case, flags, rounds, device, prompt=2048, new=64):
    """The rows of a model of transformers: a prompt in one piece and in four, and tokens after it."""
    if flags:  # a context that is given is the whole text
        new = max(1, case.config.block_size // 8)
        prompt = case.config.block_size - new
    length = prompt + new
    config, rows = type(case.config)(**(vars(case.config) | {'block_size': length})), []
    ours = GPT(config).eval().to(device)
    theirs = in_transformers(ours).eval().to(device)
    idx = torch.randint(config.vocab_size, (1, prompt), device=device)
    apart = (last_logits(ours, idx) - theirs_prefill(theirs, idx, prompt)[0]).abs().max().item()
    if not apart < 1e-2:
        raise ValueError(f'the logits of {case.name} must be those of transformers, not {apart:.1e} apart: '
                         'they cannot be compared')
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        rows += generate_in(case, str(dtype).removeprefix('torch.'), ours, theirs, idx, new, rounds, device)
    return rows


def last_logits(model, idx):
    with torch.no_grad():
        return model(idx, last_only=True)[0][:, -1].float()


@torch.no_grad()
def theirs_prefill(model, idx, piece):
    """-> the logits after the last token of idx (1,T), read in pieces, and the cache"""
    cache = None
    for part in idx.split(piece, dim=1):
        output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return output.logits[:, -1].float(), cache


def theirs_seconds(model, idx, new, piece, device):
    """Milliseconds of the prompt, and of each of `new` - 1 likeliest tokens after its first."""
    began = synchronized_time(device)
    logits, cache = theirs_prefill(model, idx, piece)
    stamps = [synchronized_time(device)]
    with torch.no_grad():
        for _ in range(new - 1):
            output = model(logits.argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1], output.past_key_values
            stamps.append(synchronized_time(device))
    return (stamps[0] - began) * 1e3, (stamps[-1] - stamps[0]) * 1e3 / max(1, new - 1)


def our_seconds(model, idx, new, piece, device):
    """The same with our Decoder."""
    decoder = Decoder(model, idx, new, Sampling(temperature=0.0), seed=0, chunk=piece)
    began = synchronized_time(device)
    stamps = [synchronized_time(device) for _ in decoder.stream()]
    return (stamps[0] - began) * 1e3, (stamps[-1] - stamps[0]) * 1e3 / max(1, new - 1)


def generate_in(case, dtype, ours, theirs, idx, new, rounds, device):
    """The rows of one number type of the weights."""
    whole, part = idx.shape[1], -(-idx.shape[1] // 4)
    runs = {(who, piece): partial(run, model, idx, new if piece == whole else 1, piece, device)
            for who, run, model in (('ours', our_seconds, ours), ('theirs', theirs_seconds, theirs))
            for piece in (whole, part)}
    found = interleaved(runs, rounds, warmup=1)

    def row(what, piece, which):
        a, b = (statistics.median(ms[which] for ms in found[who, piece]) for who in ('ours', 'theirs'))
        return [case.name, dtype, what, f'{a:.1f}', f'{b:.1f}', f'{b / a:.2f}']
    return [row(f'{whole} tokens of a prompt', whole, 0), row(f'the same in pieces of {part}', part, 0),
            row('a token after them', whole, 1)]
