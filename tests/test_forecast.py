"""What --dry=True tells of a run: memory against what is measured, every family, the command line."""
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import runs  # noqa: E402
from runs import run_copy  # noqa: E402, F401
from test_data import VOCABULARIES  # noqa: E402

import configurator  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanoblocks.experiments.arms import flags_of_config  # noqa: E402
from nanoblocks.training import forecast, ledger, parallel  # noqa: E402

SETTINGS = {name: setting.default for name, setting in configurator.settings_of(ROOT / 'train.py').items()}
SIZE = {'n_layer': 2, 'n_head': 4, 'n_embd': 256, 'head_dim': None, 'ffn_width': None, 'block_size': 256,
        'vocab_size': 2048}
# (config, rows, micro-batches, dtype, model flags, settings)
CASES = {
    'gpt2': ('gpt2', 8, 2, 'float32', {'n_layer': 6}, {}),
    'llama': ('llama', 8, 1, 'float32', {'n_layer': 6}, {}),
    'mixtral': ('mixtral', 8, 2, 'float32', {}, {}),
    'gemma2': ('gemma2', 8, 2, 'float32', {'n_layer': 4}, {}),
    'mamba2': ('mamba2', 8, 2, 'float32', {}, {}),
    'jamba': ('jamba', 2, 2, 'float32', {'n_layer': 8}, {}),
    'deepseek': ('deepseek', 8, 2, 'float32', {'n_layer': 3}, {}),
    'gated_deltanet': ('gated_deltanet', 6, 2, 'float32', {'n_layer': 4}, {}),
    'retnet': ('retnet', 8, 2, 'float32', {'n_layer': 4}, {}),
    't5': ('t5', 8, 2, 'float32', {'n_encoder': 2}, {}),
    'bert': ('bert', 8, 2, 'float32', {'n_layer': 4}, {}),
    'checkpointed': ('llama', 16, 2, 'float32', {'n_layer': 6}, {'activation_checkpointing': True}),
    'bfloat16': ('llama', 16, 2, 'bfloat16', {'n_layer': 4}, {'ema': 0.99}),
    'muon': ('gpt2', 1, 2, 'float32', {'n_embd': 512, 'n_layer': 6}, {'optimizer': 'muon', 'ema': 0.99}),
}


def case(name, **less):
    """(config, rows, Step) of a case, with flags that make it smaller."""
    family, rows, micro_batches, dtype, flags, settings = CASES[name]
    config = GPTConfig(**flags_of_config(f'{family}_small') | SIZE | flags | less)
    return config, rows, step_of(config, micro_batches, dtype, **settings)


def step_of(config, micro_batches=2, dtype='float32', **settings):
    names = ('idx', 'targets', 'source') if config.n_encoder else ('idx', 'targets')
    batch = {name: torch.zeros(1, config.block_size, dtype=torch.int64) for name in names}
    return ledger.Step(batch, dtype, SETTINGS | settings, micro_batches)


def train(config, rows, step, steps=2):
    """What train.py does in two steps, the first of which is only there to make the moments."""
    model = GPT(config)
    optimizers = step.optimizers(model)
    if step.settings['activation_checkpointing']:
        parallel.recompute_blocks(model)
    for n in range(steps):
        with step.autocast(enabled=False):
            for _ in range(step.micro_batches if n else 1):
                batch = {name: torch.randint(config.vocab_size, (rows if n else 1, x.shape[1]))
                         for name, x in step.batch.items()}
                with step.autocast():
                    losses = model(**batch, parts=True)[1]
                optimizers.scaled(losses['loss'], 1 / step.micro_batches).backward()
        optimizers.step(n)


# a process for each case, forked where torch is imported; it warms up, as what libraries keep does not count
MEASURE = """
import json, os, sys
sys.path.insert(0, 'tests')
import torch
import test_forecast as here
from model import GPTConfig
from nanoblocks.experiments.memory import peak_bytes
torch.set_num_threads(1)
for name in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    here.train(*here.case(name, n_embd=64, block_size=32))
    config, rows, step = here.case(name)
    print(json.dumps([name, peak_bytes(lambda: here.train(config, rows, step), 'cpu')]), flush=True)
    os._exit(0)
"""


@functools.cache
def measured(*names, **env):
    """{case: bytes of resident memory at its peak}, with these environment variables."""
    done = subprocess.run([sys.executable, '-c', MEASURE, *names], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'} | env)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


# ----------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the peak of memory from /proc')
@pytest.mark.parametrize('name', CASES)
def test_memory_is_foretold_within_15_percent(name):
    # freed memory goes back to the system at once
    found = ledger.simulated(*case(name)).peak
    real = measured(*CASES, MALLOC_MMAP_THRESHOLD_='131072')[name]
    assert real > 150e6, 'too little to be told from noise'
    assert abs(found / real - 1) < 0.15, f'foretold {found / 1e6:.0f} MB, measured {real / 1e6:.0f} MB'


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the peak of memory from /proc')
@pytest.mark.parametrize('name', KEEPERS := ['llama', 't5', 'checkpointed'])
def test_the_allowance_covers_what_glibc_keeps(name):
    """Of the models at the ends of its range."""
    found, real = ledger.simulated(*case(name)).peak, measured(*KEEPERS)[name]
    assert -0.15 * found < real - found < 1e9 * forecast.KEPT, f'{(real - found) / 1e6:.0f} MB more'


@pytest.mark.parametrize('name', ['gpt2', 'mixtral', 't5'])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(name):
    config, rows, step = case(name)
    memory, model = ledger.simulated(config, rows, step), GPT(config)
    batch = {key: torch.randint(config.vocab_size, (rows, x.shape[1])) for key, x in step.batch.items()}
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)[1]    # alive, or a freed storage would lend its address to another
    assert loss.isfinite() and abs(memory.activations / sum(saved.values()) - 1) < 0.03
    assert len(memory.blocks) == len(parallel.blocks_of(model))


def test_weights_gradients_and_moments_are_counted_exactly():
    config, rows, step = case('muon')
    memory, model = ledger.simulated(config, 1, step), GPT(config)
    numel = {kind: sum(p.numel() for name, p in model.named_parameters() if found[name] == kind)
             for found in [model.param_kinds()] for kind in set(found.values())}
    total = sum(numel.values())
    assert memory.parameters == 4 * total + sum(b.nbytes for b in model.buffers())
    assert memory.gradients == memory.average == 4 * total
    assert memory.moments['Muon'] == 4 * numel['matrix']
    steps = 4 * sum(1 for kind in model.param_kinds().values() if kind != 'matrix')
    assert memory.moments['AdamW'] == 8 * (total - numel['matrix']) + steps


def test_a_flag_changes_its_line():
    config, rows, step = case('llama')
    plain = ledger.simulated(config, rows, step)
    less = ledger.simulated(config, rows, step_of(config, activation_checkpointing=True))
    assert less.blocks == [rows * config.block_size * config.n_embd * 4] * config.n_layer
    assert less.backward_peak < plain.backward_peak / 2
    narrow = ledger.simulated(config, rows, step_of(config, dtype='bfloat16'))
    matrices = sum(p.numel() for name, p in GPT(config).h.named_parameters() if p.dim() == 2)
    assert narrow.casts == 2 * matrices and plain.casts == 0
    assert sum(narrow.blocks) < 0.8 * sum(plain.blocks)


def test_float16_whose_gradients_are_scaled_has_a_forecast():
    config, rows, _ = case('llama', n_layer=1)
    step = step_of(config, dtype='float16', batch_size=rows)
    plain = ledger.simulated(config, rows, step_of(config, dtype='bfloat16'))
    assert ledger.simulated(config, rows, step).peak == pytest.approx(plain.peak, rel=0.05)
    assert forecast.timed_layers(config, step, 'cpu').update > 0


def test_shards_are_cut_and_what_is_gathered_is_added():
    config, rows, step = case('gpt2')
    memory, counts = ledger.simulated(config, rows, step), forecast.counted_in(config)
    whole, cut = (forecast.peak_by(memory, counts, step, n, 'backward_peak') for n in (1, 4))
    weights = memory.parameters + memory.gradients + sum(memory.moments.values())
    assert whole - cut == pytest.approx(0.75 * weights - forecast.gathered(counts, step))


# the second is at its peak in the update, where no row counts, until there are many
@pytest.mark.parametrize('name, rows, card, flags', [('gemma2', 8, 1.5, {}),
                                                     ('muon', 1, 0.6, {'block_size': 16})])
def test_the_largest_batch_fills_a_card(name, rows, card, flags, monkeypatch):
    config, _, _ = case(name, **flags)
    step = step_of(config, batch_size=rows, **CASES[name][-1])
    monkeypatch.setattr(forecast, 'CARDS', (0.01, card))
    told = list(forecast.memory_lines(config, step, forecast.counted_in(config), 1, 'cpu'))[-1]
    found = re.fullmatch(rf' *0.01 GB: none, {card} GB: (\d+)', told)
    assert found, told
    most, room = int(found[1]), card * 1e9 * (1 - forecast.FREE)
    assert most > 20 and ledger.simulated(config, most, step).peak <= room
    assert ledger.simulated(config, math.ceil(1.05 * most), step).peak > room


def test_no_more_rows_are_told_than_lie_below_the_chord():
    peaks = [(1, 10e9), (2, 10e9), (102, 110e9)]
    assert [forecast.largest_batch(card, peaks) for card in (10, 24, 80, 141)] == [0, 14, 65, 102]


FAMILIES = sorted(path.stem for path in (ROOT / 'config').glob('*_small.py'))


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_can_be_foretold(family):
    config = GPTConfig(**flags_of_config(family) | SIZE | {'n_layer': 8, 'n_embd': 64, 'block_size': 64})
    step = step_of(config, batch_size=2)
    memory, counts = ledger.simulated(config, 2, step), forecast.counted_in(config)
    assert memory.peak > memory.parameters + memory.activations > memory.activations > 0
    times = forecast.timed_layers(config, step, 'cpu')
    assert times.layers.keys() == set(counts.kinds) and len(counts.kinds) == len(memory.blocks)
    assert min(times.layers.values()) > 0 and times.update > 0


# ----------------------------------------------------------------------------------------------------------
# Command line


def test_a_dry_run_tells_and_stops_without_a_folder(tmp_path):
    done = runs.python('train.py', *runs.toy(tmp_path / 'run', dry=True))
    assert done.code == 0 and not runs.sentences(done), done
    assert not (tmp_path / 'run').exists()
    for word in ('parameters', 'gradients', 'moments of AdamW', 'head at work', 'peak', '141 GB',
                 'a layer a f', 'tokens/s', 'H100'):
        assert word in done.out, word
    assert 'val loss' not in done.out


def test_a_dry_run_leaves_a_run_as_it_is(run_copy):  # noqa: F811
    before = runs.files(run_copy)
    for settings in ({}, {'init_from': 'resume'}):
        done = runs.python('train.py', *runs.toy(run_copy, dry=True, **settings))
        assert done.code == 0 and 'peak' in done.out, done
    assert runs.files(run_copy) == before


def test_one_process_tells_it_for_many(tmp_path):
    settings = runs.toy(tmp_path / 'run', dry=True, shard=True, gradient_accumulation_steps=8)
    def peak(**env):
        done = runs.python('train.py', *settings, env=env)
        assert done.code == 0, done
        return done.out
    told = peak(WORLD_SIZE='8', RANK='0')
    assert 'of a process of 8' in told and 'gathered' in told and 'on 8 GPUs' in told
    assert float(re.search(r'parameters +([\d.]+)', told)[1]) < 0.001
    assert peak(WORLD_SIZE='8', RANK='3') == ''
    done = runs.python('train.py', *settings, '--dry=False', env={'WORLD_SIZE': '8'})
    runs.assert_refused(done, 'WORLD_SIZE=8 must', 'RANK and MASTER_ADDR', 'torchrun')
    done = runs.python('train.py', *settings, env={'WORLD_SIZE': 'two'})
    runs.assert_refused(done, 'WORLD_SIZE=two must be a whole number', 'unset it')


@pytest.mark.parametrize('refused', [{'group_lr': 'nonsense=1e-3'}, {'stream_dtype': 'bfloat16'},
                                     {'compile_mode': 'max-autotune-no-cudagraphs', 'compile': False}])
def test_what_the_run_would_be_refused_for_is_refused(refused, tmp_path):
    done = runs.python('train.py', *runs.toy(tmp_path / 'run', dry=True, dtype='float32', **refused))
    runs.assert_refused(done, *refused)


def test_context_parallel_is_refused(tmp_path):
    done = runs.python('train.py', *runs.toy(tmp_path / 'run', dry=True, context_parallel=True),
                       env={'WORLD_SIZE': '2', 'RANK': '0'})
    runs.assert_refused(done, 'dry=True', 'context_parallel')


# ----------------------------------------------------------------------------------------------------------
# docs/own_data.md

PAGE = (ROOT / 'docs' / 'own_data.md').read_text(encoding='utf-8')
UNTIMED = """
import collections
from nanoblocks.training import forecast
forecast.timed_layers = lambda *args: forecast.Times(collections.defaultdict(float), 1.0, 0.0, 'nothing')
"""
# at the end of a command they win; a checkpoint keeps the sizes
SIZES = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, batch_size=2)
SMALL = dict(gradient_accumulation_steps=8, eval_tokens=128, eval_interval=2, log_interval=1, device='cpu')
needs_gpt2 = pytest.mark.skipif(not VOCABULARIES.exists(), reason=f'no {VOCABULARIES}')


def page_commands(folder):
    """The commands of the page, their files and folders in `folder`: [(environment, words)]."""
    places = {'--name=': '--out=', '--dataset=': '--dataset=', '--out_dir=out/': '--out_dir=',
              '--input=': '--input=', '--val_input=': '--val_input=', '--eval_datasets=': '--eval_datasets='}
    for block in re.findall(r'^```\n(.*?)^```', PAGE, re.M | re.S):
        for line in block.splitlines():
            words = [next((word.replace(old, f'{new}{folder}/') for old, new in places.items()
                           if word.startswith(old)), word) for word in shlex.split(line)]
            env = dict(word.split('=') for word in words if word.isupper() or word.startswith('WORLD_SIZE='))
            yield env, words[len(env):]


@needs_gpt2
def test_the_commands_of_the_page_work_in_its_order_at_toy_size(tmp_path):
    """Two processes stand for the 8 and the 16 of torchrun; each of those lines starts a run of its own."""
    (tmp_path / 'my_folder').mkdir()
    for name in 'my_folder/a.txt', 'my_folder/b.txt', 'wiki.txt':
        (tmp_path / name).write_text(' '.join(text for _, text in runs.documents(40, seed=len(name))))
    told, cache = [], {'TIKTOKEN_CACHE_DIR': str(VOCABULARIES)}
    for env, words in page_commands(tmp_path):
        script = next(word for word in words if word.endswith('.py'))
        args = words[words.index(script) + 1:]
        if any(word.startswith('config/') for word in args):
            out = [tmp_path / word.split('/')[-1] for word in args if word.startswith('--out_dir=')]
            if out and '--init_from=auto' not in args:
                shutil.rmtree(out[0], ignore_errors=True)
            more = {'ffn_width': 64} if 'config/llama_1b.py' in args else {}
            args += runs.flags(**SIZES | SMALL | more, max_iters=4 if '--init_from=auto' in args else 2)
        args += ['--max_new_tokens=3'] * (script == 'sample.py')
        if words[0] == 'torchrun':
            done = runs.several(2, *args, before=f'import os; os.environ.update({cache})\n')[0]
        else:
            done = runs.python(script, *args, env=cache | env | ({'RANK': '0'} if env else {}))
        assert done.code == 0, (words, done)
        told.append(done.out)
    assert len(told) == 12 and ['  peak ' in out for out in told].count(True) == 2
    assert 'of a process of 8' in told[2] and 'resuming at step 2' in told[7]
    assert f'  {tmp_path / "wiki"}: val loss' in told[10]
    code = re.search(r'^```python\n(.*?)^```', PAGE, re.M | re.S)[1].replace('out/', f'{tmp_path}/')
    exec(code, {})
    assert (tmp_path / 'exported' / 'model.safetensors').exists()


@needs_gpt2
@pytest.mark.parametrize('model, which', [('124M, 1', 0), ('1B, 8', 1)])
def test_the_table_of_the_page_is_what_its_commands_print(model, which, tmp_path):
    """The two rows that are the page's own commands, without the time on this machine."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f'| {model} |'))
    _, flags, tokens, peak, cards, *seconds = [cell.strip() for cell in row.strip('|').split('|')]
    env, words = [found for found in page_commands(tmp_path) if '--dry=True' in found[1]][which]
    assert set(flags.strip('`').split()) <= {*words, *(f'{name}={value}' for name, value in env.items())}
    script, *args = [word for word in words[1:] if not word.startswith('--dataset=')]
    done = runs.python(script, *args, *runs.flags(dataset=runs.dataset(), vocab_size=50257),
                       env=env | {'RANK': '0'} if env else {}, before=UNTIMED)
    assert done.code == 0, done
    assert f': {tokens} tokens,' in done.out
    assert float(re.search(r'\n  peak +([\d.]+)', done.out)[1]) == pytest.approx(float(peak), abs=0.051)
    assert re.search(r' 24 GB: (\w+),.* 80 GB: (\w+)', done.out).groups() == tuple(cards.split(', '))
    for name, wanted in zip(('A100', 'H100'), map(float, seconds)):
        assert float(re.search(rf'{name}: ([\d.]+) s', done.out)[1]) == pytest.approx(wanted, rel=0.006)
