"""
Measurements. Each topic prints a table; variants that are compared run interleaved, in one process.

    python bench.py step config/llama_small.py config/tiny.py
    python bench.py step --nanogpt=../nanoGPT --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
    python bench.py families config/tiny.py --max_iters=100
    python bench.py kernels --aot=True
    python bench.py gpu --out=bench/results --parts=train
    python bench.py optimizers config/gpt2_small.py
    python bench.py limits --models=gpt2,llama
    python bench.py peers --nanogpt=../nanoGPT
    python bench.py cache config/llama_1b.py --tokens=2048,32768
    python bench.py rope --rope_theta=5e5
    python bench.py plot out/* --figure=curves.png
    python bench.py recipes path/to/checkpoint
    python bench.py heads out/run               # and specialists, of a mixture of experts

The first argument is the topic; config files and flags follow. `python bench.py --help` lists the topics,
whose bodies are in nanoblocks/experiments. A topic refuses the flags that it does not read.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which `python -P` leaves out

from data import console

if __name__ == '__main__':
    # from the first line on: torch alone takes seconds to import
    console.never_fail()
    console.answer_ctrl_c()

import platform
import shlex
from dataclasses import fields
from inspect import signature

import torch

from configurator import (
    configure,
    errors_as_messages,
    nearest,
    plain_settings,
    settings_of,
    split_arguments,
    within,
)
from model import GPTConfig
from nanoblocks.experiments import (
    architectures,
    attention,
    curves,
    decoding,
    extrapolate,
    gpu,
    heads,
    limits,
    peers,
    placement,
    recall,
    recipes,
    ring,
    scaling,
    specialists,
    speed,
    studies,
    throughput,
)
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.files import ROOT
from nanoblocks.hardware import check_device, pick_device

# ----------------------------------------------------------------------------------------------------------
# Settings

batch_size = 12                     # step, families: sequences in a training step
rounds: int | None = None           # how often each variant is timed; None: 30, in limits and peers 3
tokens = ''                         # lengths, such as 1024,4096; limits, peers: of a step; empty: its own
models = ''                         # limits, peers, throughput: families, such as gpt2,llama; empty: all
width = ''                          # ffns, lengths: width of a layer; norms: widths, such as 256,512
layers = ''                         # placement: depths of its models, such as 4,12
limit_s = 60.0                      # lengths, throughput: seconds for each layer or model, which end its row
nanogpt = ''                        # step, peers: folder of a nanoGPT checkout to time as well, same flags
device = 'cpu'                      # auto, cpu, cuda or mps
aot = False                         # kernels: compile for GPUs that this machine lacks, instead of timing
out = 'out/bench'                   # gpu, kernels: folder for gpu.json
parts = ''                          # gpu: some of checks,decode,curve,train,kernels,optimizer; empty: all
seconds = 510                       # gpu, kernels: time limit; what does not fit is skipped and named
dry = False                         # gpu, kernels: everything at toy size on a CPU, to test that it runs
dtype = 'bfloat16'                  # families: number type of matrix products, float32 or bfloat16
figures = 'out/bench'               # folder for a topic's figures, and for the runs it trains
reuse = False                       # families: keep the runs in out/families, train only those missing
figure = 'curves.png'               # plot: file for the figure

# ----------------------------------------------------------------------------------------------------------
# Topics. A topic is a function; its parameters are the settings it reads, and `flags` (the model's),
# `argv` (everything after the topic), `folders` (the arguments that are not flags) and `command` (the whole
# line).

TOPICS = {
    'step': speed.step, 'window': speed.window, 'optimizers': speed.optimizers, 'families': speed.families,
    'decode': decoding.decode, 'cache': attention.cache, 'gqa': attention.gqa, 'rope': attention.rope,
    'reach': attention.reach, 'norms': studies.norms, 'ffns': studies.ffns,
    'extrapolate': extrapolate.extrapolate, 'placement': placement.placement,
    'lengths': throughput.lengths, 'throughput': throughput.throughput, 'router': studies.router,
    'ablations': studies.ablations, 'mixers': studies.mixers, 'kvheads': studies.kvheads,
    'tricks': studies.tricks, 'scaling': scaling.scaling, 'architectures': architectures.architectures,
    'plot': curves.plot,
    'kernels': gpu.kernel_table, 'gpu': gpu.gpu,
    'limits': limits.limits, 'peers': peers.peers, 'ring': ring.ring, 'recipes': recipes.recipes,
    'heads': heads.heads, 'specialists': specialists.specialists, 'recall': recall.recall,
}
ROUNDS = {'limits': 3, 'peers': 3}  # of topics whose runs are long


def topics():
    """A line for each topic, the first of its function's docstring."""
    about = {name: topic.__doc__.strip().splitlines()[0] for name, topic in TOPICS.items()}
    return '\n'.join(f'    {name:<12} {line}' for name, line in about.items())


def run(topic, given):
    """Call a topic with its parameters; without matplotlib, it ends after its table."""
    try:
        topic(**{name: given[name] for name in signature(topic).parameters if name in given})
    except ModuleNotFoundError as error:
        if error.name != 'matplotlib':
            raise
        print('no figure without matplotlib: pip install -r requirements-dev.txt')


def refuse_ignored(name, options):
    """ValueError for a flag or a config file that the topic would ignore."""
    reads = signature(TOPICS[name]).parameters
    trains = settings_of(ROOT / 'train.py')
    if 'argv' in reads:  # train.py's settings and the model's flags too, which train.py checks
        foreign = {setting: '' for setting in plain_settings(globals())
                   if setting not in reads and setting not in trains}
        for key, text in split_arguments(options):
            if key in foreign:
                raise ValueError(f'{key}={text} must be left out: bench.py {name} does not read it')
        return
    model = {f.name for f in fields(GPTConfig)}
    own = [f'--{setting}' for setting in plain_settings(globals()) if setting in reads]
    what = ', '.join(own + ['the model flags'] * ('flags' in reads)) or 'no flags'
    for key, text in split_arguments(options):
        if key is None and 'flags' not in reads:
            raise ValueError(f'{text} must be left out: bench.py {name} takes no config file, and reads '
                             f'{what}')
        known = key in plain_settings(globals()) or key in model or key in trains
        if known and key not in reads and not (key in model and 'flags' in reads):
            raise ValueError(f'{key}={text} must be left out: bench.py {name} reads {what}')


def check_settings(name):
    """ValueError for a value with which the topic cannot work."""
    reads = signature(TOPICS[name]).parameters
    if 'dtype' in reads and dtype not in ('float32', 'bfloat16'):
        raise ValueError(f'dtype={dtype} must be float32 or bfloat16')
    for setting, limit in (('batch_size', {'least': 1}), ('rounds', {'least': 1}), ('seconds', {'least': 1}),
                           ('limit_s', {'above': 0})):
        if setting not in reads or globals()[setting] is None:
            continue
        ok, rule = within(globals()[setting], limit)
        if not ok:
            raise ValueError(f'{setting}={globals()[setting]} must {rule}')


def folders_of(name, argv):
    """(folders of runs, all other arguments): a topic that reads runs takes words that are no config file."""
    words, flags = files_and_flags(argv)
    if 'folders' not in signature(TOPICS[name]).parameters or {'--help', '-h'} & set(argv):
        return [], argv
    files = [word for word in words if word.endswith('.py')]
    return [word for word in words if word not in files], files + flags


def main(name, argv):
    if name in ('--help', '-h'):
        configure(globals() | {'__doc__': f'{__doc__}\ntopics:\n\n{topics()}'}, GPTConfig, ['--help'])
    if name not in TOPICS:
        remedy = nearest(name, TOPICS, remedy=f'choose one of {", ".join(TOPICS)}')
        raise SystemExit(f'{name or "the first argument"} must be a topic: {remedy}')
    folders, options = folders_of(name, argv)
    # a config file is train.py's as well: pass over the settings that are only train.py's
    flags = configure(globals(), GPTConfig, options, skip=settings_of(ROOT / 'train.py'))
    with errors_as_messages():
        refuse_ignored(name, options)
        check_settings(name)
        if 'figures' in signature(TOPICS[name]).parameters:
            os.makedirs(figures, exist_ok=True)  # refused here, not after minutes of measuring
        globals().update(device=pick_device(device), rounds=rounds or ROUNDS.get(name, 30))
        check_device(device)
        card = torch.cuda.get_device_name() if device.startswith('cuda') else device
        print(f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {card}')
        run(TOPICS[name], plain_settings(globals()) | {
            'flags': flags, 'argv': options, 'folders': folders,
            'command': shlex.join(['python', 'bench.py', name, *argv])})


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else '', sys.argv[2:])
