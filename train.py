"""
Train a model. A flat script: settings, setup, the loop.

    python train.py config/llama_small.py config/tiny.py              # a size for a laptop, minutes
    python train.py config/llama_small.py --dataset=fineweb_edu       # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value are applied in the order given; later wins.
--help lists every setting and model flag.
"""
import importlib.util
import json
import math
import os
import sys
import time
import zlib
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from configurator import configure, one_sentence, plain_settings
from data.loader import ensure_prepared, open_dataset
from model import GPT, GPTConfig, kv_cache_bytes

# ----------------------------------------------------------------------------------------------------------
# Settings. The model's flags (n_layer, block_size, norm, ...) are the fields of GPTConfig in model.py.

# run
out_dir = 'out'                     # where checkpoints, metrics.jsonl and config.json go
init_from = 'scratch'               # scratch, or resume (go on with out_dir's run from its newest checkpoint)
overwrite = False                   # let a new run replace the one that out_dir holds
seed = 1337                         # of weights, batches and dropout
max_iters = 600000                  # optimizer steps in all
log_interval = 10                   # steps between log lines
eval_interval = 2000                # steps between evaluations, each of which saves a checkpoint
eval_iters = 200                    # batches in an evaluation, unless eval_tokens is set
eval_tokens: int | None = None      # tokens in an evaluation, at any batch size; None: eval_iters batches
eval_only = False                   # evaluate once, write nothing and leave
always_save_checkpoint = True       # write ckpt.pt at every evaluation; False: only at the best loss so far
wandb_log = False                   # log to Weights & Biases as well
wandb_project = 'nanoblocks'        # its project
wandb_run_name = ''                 # its run name; empty: the last part of out_dir
# data
dataset = 'pysource'                # a folder of data/, or the path of any prepared folder
batch_size = 12                     # sequences in one micro-batch of one process
gradient_accumulation_steps = 40    # micro-batches in one step, those of all processes together
# optimizer
optimizer = 'adamw'                 # adamw, or muon (Muon for the matrices of the blocks, AdamW for the rest)
learning_rate = 6e-4                # AdamW's peak
muon_lr = 0.02                      # Muon's peak
weight_decay = 0.1                  # of matrices and embeddings, never of vectors
beta1 = 0.9                         # AdamW's momentum
beta2 = 0.95                        # AdamW's second moment
grad_clip = 1.0                     # largest norm of the gradient; 0: no clipping
# learning rate schedule
decay_lr = True                     # False: constant, and no warmup
schedule = 'cosine'                 # cosine, or wsd (constant, then a straight line down)
warmup_iters = 2000                 # steps of linear warmup, when decay_lr
lr_decay_iters: int | None = None   # the step that reaches min_lr; None: max_iters
min_lr: float | None = None         # where AdamW's rate ends, Muon's in proportion; None: learning_rate / 10
wsd_decay = 0.6                     # the share of lr_decay_iters in which wsd goes down
# machine
device = 'auto'                     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # of matrix products: auto, float32, bfloat16, float16; weights: float32
compile: bool | None = None         # torch.compile; None: on a GPU, where the minute it takes pays
backend = 'nccl'                    # of torch.distributed under torchrun: nccl, or gloo (always on a CPU)

given = {}                          # the names that the command line set, each with the file or flag that did
model_args = configure(globals(), GPTConfig, given=given)
settings = plain_settings(globals())

# ----------------------------------------------------------------------------------------------------------
# This run: a new one, or one that goes on

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master, resumed = rank == 0, None
ckpt_path = os.path.join(out_dir, 'ckpt.pt')

with one_sentence():
    if init_from == 'resume':
        resumed = checkpoint.load(ckpt_path, checkpoint.TO_RESUME)
        # what the command line leaves open is as it was
        settings |= {k: v for k, v in resumed['settings'].items() if k in settings and k not in given}
        settings |= {'out_dir': out_dir, 'init_from': init_from}
        globals().update(settings)
    for name, words in (('init_from', ('scratch', 'resume')), ('optimizer', ('adamw', 'muon')),
                        ('schedule', ('cosine', 'wsd')),
                        ('dtype', ('auto', 'float32', 'bfloat16', 'float16'))):
        if settings[name] not in words:
            raise ValueError(f'{name}={settings[name]} must be one of {", ".join(words)}')
    for name in ('max_iters', 'log_interval', 'eval_interval', 'eval_iters', 'eval_tokens', 'batch_size',
                 'gradient_accumulation_steps', 'lr_decay_iters'):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f'{name}={settings[name]} must be at least 1')
    for name in ('weight_decay', 'grad_clip', 'warmup_iters', 'min_lr', 'muon_lr'):
        if settings[name] is not None and settings[name] < 0:
            raise ValueError(f'{name}={settings[name]} must be at least 0')
    for name in ('beta1', 'beta2'):
        if not 0 <= settings[name] < 1:
            raise ValueError(f'{name}={settings[name]} must be at least 0 and below 1')
    if not 0 <= wsd_decay <= 1:
        raise ValueError(f'wsd_decay={wsd_decay} must be between 0 and 1')
    if learning_rate <= 0:
        raise ValueError(f'learning_rate={learning_rate} must be above 0')
    if decay_lr and min_lr is not None and min_lr > learning_rate:
        raise ValueError(f'min_lr={min_lr} must be at most learning_rate={learning_rate}')
    if gradient_accumulation_steps % world:
        raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of '
                         f'the {world} processes that share its micro-batches')
    if resumed and max_iters < resumed['step']:
        raise ValueError(f'max_iters={max_iters} must be at least the {resumed["step"]} steps that '
                         f'{ckpt_path} has behind it')
    if not (resumed or eval_only or overwrite) and checkpoint.found(out_dir):
        raise ValueError(f'{out_dir} holds a run already: go on with it by --init_from=resume, replace it by '
                         '--overwrite=True, or choose another --out_dir')
    if wandb_log and importlib.util.find_spec('wandb') is None:
        raise ValueError('wandb_log=True needs wandb: pip install wandb, or leave it out')

# ----------------------------------------------------------------------------------------------------------
# Machine

if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
if world > 1 and device.startswith('cuda'):
    device = f'cuda:{os.environ["LOCAL_RANK"]}'
device_type = device.split(':')[0]
with one_sentence():
    checkpoint.check_device(device)
if device_type == 'cuda':
    torch.cuda.set_device(device)
if world > 1:
    dist.init_process_group('gloo' if device_type == 'cpu' else backend)
torch.set_float32_matmul_precision('high')

# ----------------------------------------------------------------------------------------------------------
# Data and model

with one_sentence():
    here = os.path.dirname(os.path.abspath(__file__))
    folder = dataset if os.path.dirname(dataset) else os.path.join(here, 'data', dataset)
    if os.environ.get('LOCAL_RANK', '0') == '0':
        ensure_prepared(folder)
    if world > 1:
        dist.barrier()
    if resumed:
        if eval_only:
            model = checkpoint.build(resumed, ckpt_path, model_args)
        else:
            model = checkpoint.build(resumed, ckpt_path)
            checkpoint.refuse_contradictions(resumed, model_args, settings, given)
        config, trained_config = model.config, resumed['config']
        data = open_dataset(folder, config.block_size, seed)
        if data.meta != resumed['meta']:
            raise ValueError(f'dataset={dataset} must be the one that {ckpt_path} was trained on: it has '
                             'been prepared anew since; start a new run')
    else:
        vocab_size = open_dataset(folder, 1, seed).meta['vocab_size']
        config = GPTConfig(**({'vocab_size': vocab_size} | model_args))
        if config.vocab_size < vocab_size:
            raise ValueError(f'vocab_size={config.vocab_size} must be at least the {vocab_size} tokens of '
                             f'dataset={dataset}: leave it out and it is set')
        data = open_dataset(folder, config.block_size, seed)
        model = GPT(config, seed=seed)
    T = config.block_size
    if eval_tokens is not None and eval_tokens < T:
        raise ValueError(f'eval_tokens={eval_tokens} must be at least block_size={T}')
    if master and not eval_only:
        checkpoint.claim(out_dir)
# one model under three names: itself, compiled, and as what exchanges gradients between processes
raw_model = fast_model = model.to(device)

if dtype == 'auto':
    # processors with bf16 matrix instructions gain from the width on where products outweigh the conversions
    cpu_bf16 = torch.cpu._is_avx512_bf16_supported() and config.n_embd >= 256
    dtype = 'bfloat16' if device_type == 'cpu' and cpu_bf16 else 'float32'
    if device_type == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
if dtype == 'float16' and optimizer == 'muon':
    # its scaler would skip one optimizer's step and not the other's
    sys.exit('dtype=float16 must not be used with optimizer=muon: choose --dtype=float32 or '
             '--optimizer=adamw')
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

if compile is None:
    compile = device_type == 'cuda'
if compile:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))  # is there a compiler at all?
        fast_model = torch.compile(raw_model)
    except Exception as error:
        compile, reason = False, str(error).strip().splitlines()[0]
        print(f'torch.compile does not work here ({type(error).__name__}: {reason}): training eagerly, '
              'which is slower')
model = fast_model
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(fast_model, broadcast_buffers=False)

# ----------------------------------------------------------------------------------------------------------
# Optimizers: every parameter is in one group, by the kind of module that owns it

params = {'matrix': [], 'experts': [], 'embedding': [], 'vector': []}
kinds = raw_model.param_kinds()
for name, p in raw_model.named_parameters():
    params[kinds[name]].append(p)
optimizers, decayed = [], params['embedding'] + params['experts']
if optimizer == 'muon':
    optimizers.append(torch.optim.Muon(params['matrix'], lr=muon_lr, weight_decay=weight_decay))
else:
    decayed = decayed + params['matrix']
groups = [{'params': decayed, 'weight_decay': weight_decay},
          {'params': params['vector'], 'weight_decay': 0.0}]
# fused: one pass over memory in place of a dozen
optimizers.append(torch.optim.AdamW([group for group in groups if group['params']], lr=learning_rate,
                                    betas=(beta1, beta2), fused=device_type in ('cuda', 'cpu')))
for opt in optimizers:
    for group in opt.param_groups:
        group['peak_lr'] = group['lr']


def lr_scale(step):
    """The learning rate of a step as a share of its peak; the first step is 0."""
    if not decay_lr:
        return 1.0
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    end = (learning_rate / 10 if min_lr is None else min_lr) / learning_rate
    last = max_iters if lr_decay_iters is None else lr_decay_iters
    start = warmup_iters if schedule == 'cosine' else max(warmup_iters, (1 - wsd_decay) * last)
    part = min(1.0, max(0.0, (step - start) / max(1, last - start)))  # of the way down
    return end + (1 - end) * (0.5 * (1 + math.cos(math.pi * part)) if schedule == 'cosine' else 1 - part)


# ----------------------------------------------------------------------------------------------------------
# State of the run, and how it is saved

step, best_val_loss, seconds_before = 0, math.inf, 0.0
if resumed:
    step, best_val_loss, seconds_before = resumed['step'], resumed['best_val_loss'], resumed['seconds']
    for opt, state in zip(optimizers, resumed['optimizers']):
        # the moments are restored; rates and decay are what this command line says
        options = [{k: v for k, v in group.items() if k != 'params'} for group in opt.param_groups]
        opt.load_state_dict(state)
        for group, option in zip(opt.param_groups, options):
            group.update(option)
    if resumed['scaler']:
        scaler.load_state_dict(resumed['scaler'])
first_step, tokens_per_step = step, gradient_accumulation_steps * batch_size * T
metrics_path = os.path.join(out_dir, 'metrics.jsonl')
if master and not eval_only:
    if resumed:
        checkpoint.rewind_metrics(metrics_path, step)
    else:
        checkpoint.clear(out_dir)
    with open(os.path.join(out_dir, 'config.json'), 'w') as f:
        json.dump({'model': vars(config), 'settings': settings}, f, indent=1)
if wandb_log and master and not eval_only:
    import wandb
    name = wandb_run_name or os.path.basename(os.path.normpath(out_dir))
    wandb.init(project=wandb_project, name=name, config=vars(config) | settings)

bar = tqdm(total=max_iters, initial=step, disable=not (master and sys.stdout.isatty()), dynamic_ncols=True,
           file=sys.stdout)


def say(line):
    """Print a line, above the progress bar when there is one."""
    if master and bar.disable:
        print(line, flush=True)
    elif master:
        bar.write(line)


def record(**numbers):
    """Add a line to metrics.jsonl, and to Weights & Biases."""
    if not master or eval_only:
        return
    line = {'step': step, 'tokens': step * tokens_per_step, 'lr': lr_scale(max(0, step - 1)) * learning_rate,
            'seconds': round(seconds_before + time.time() - start_time, 3)} | numbers
    with open(metrics_path, 'a') as f:
        f.write(json.dumps(line) + '\n')
    if wandb_log:
        wandb.log(line, step=step)


def save(name, **more):
    """Write a checkpoint: all that decides how a run goes on, or with no `more` only what sampling needs."""
    if master and not eval_only:
        state = checkpoint.contents(raw_model, settings=settings, meta=data.meta, step=step,
                                    best_val_loss=best_val_loss, **more)
        checkpoint.save(os.path.join(out_dir, name), state)


@torch.no_grad()
def evaluate():
    """Mean loss over the validation windows, which are the same ones every time."""
    raw_model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in data.eval_batches(batch_size, eval_tokens or eval_iters * batch_size * T, rank, world):
        with autocast:
            # a smaller last batch would make a compiled model compile again
            _, loss = (fast_model if len(x) == batch_size else raw_model)(x.to(device), y.to(device))
        sums += torch.tensor([loss.item() * y.numel(), y.numel()], dtype=torch.float64)
    raw_model.train()
    if world > 1:
        sums = sums.float().to(device)
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def batch(micro):
    """The tokens of this process's micro-batch `micro` of this step, on the device."""
    number = step * gradient_accumulation_steps + micro * world + rank
    x, y = data.train_batch(number * batch_size, batch_size)
    if device_type == 'cuda':
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


# ----------------------------------------------------------------------------------------------------------
# What is about to happen

# dense bf16 FLOP/s of the cards that people train on, from their data sheets; first match wins
PEAKS = {'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'GH200': 989e12,
         'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12,
         'A10': 125e12, 'V100': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}
card = torch.cuda.get_device_name(device) if device_type == 'cuda' else device_type
peak = next((flops for name, flops in PEAKS.items() if name in card), None)
flops = raw_model.flops_per_token(T)


def human(number):
    """1234567 -> 1.23M"""
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if number >= size:
            return f'{number / size:.3g}{unit}'
    return f'{number:.3g}'


def clock(seconds):
    """3723 -> 1 h 2 min"""
    h, m, s = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f'{h} h {m} min' if h else f'{m} min {s} s' if m else f'{s} s'


say(f'model     {human(raw_model.num_params())} parameters, '
    f'{human(raw_model.num_params(active=True))} active, {human(flops)} FLOPs per token, '
    f'{human(kv_cache_bytes(config, T, 1, 2))}B of cache at {T} tokens in 16 bit')
say(f'data      {dataset}: {human(data.meta["train_tokens"])} tokens to train on, '
    f'vocabulary {data.meta["vocab_size"]}')
say(f'step      {gradient_accumulation_steps} micro-batches of {batch_size} x {T}: '
    f'{tokens_per_step:,} tokens; {max_iters} steps: {human(max_iters * tokens_per_step)} tokens')
say(f'machine   {world} x {card}, {dtype} products, {"compiled" if compile else "eager"}')
say(f'run       {out_dir}' + (f', going on at step {step}' if resumed else ''))
if resumed and eval_only:
    for name, value in checkpoint.overrides(trained_config, config).items():
        say(f'override  {name}={value}, trained with {trained_config[name]}')
if decay_lr and warmup_iters >= max_iters:
    say(f'warmup_iters={warmup_iters} is not over after max_iters={max_iters}: '
        'learning_rate is never reached')
if device_type == 'cpu' and flops * tokens_per_step * max_iters > 1e16:
    say('this is a large model for a CPU and may take days: add config/tiny.py for a size that takes minutes')

# ----------------------------------------------------------------------------------------------------------
# The loop

start_time = interval_start = time.time()
pauses, timed_steps = 0.0, 0  # seconds spent in evaluations; steps since interval_start
interval_loss, interval_steps = torch.zeros((), device=device), 0  # since the last log line
if resumed:
    interval_loss += resumed['interval'][0]
    interval_steps = resumed['interval'][1]
    resumed = True  # its weights and moments need not stay in memory

while True:
    if eval_only or step == max_iters or (step % eval_interval == 0 and step > first_step):
        paused, val_loss = time.time(), evaluate()
        bits = val_loss / math.log(2) / data.meta['val_bytes_per_token']
        say(f'step {step}: val loss {val_loss:.4f}, {bits:.4f} bits per byte')
        improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
        if step > first_step:
            record(val_loss=val_loss, val_bpb=bits)
            if improved:
                save('best.pt')
            if improved or always_save_checkpoint:
                so_far = interval_loss.clone()
                if world > 1:
                    dist.all_reduce(so_far)
                so_far /= world
                save('ckpt.pt', optimizers=[opt.state_dict() for opt in optimizers],
                     scaler=scaler.state_dict(), interval=(so_far.item(), interval_steps),
                     seconds=seconds_before + time.time() - start_time)
        interval_start += time.time() - paused
        pauses += time.time() - paused
    if eval_only or step >= max_iters:
        break

    # dropout draws from (seed, step, rank): there is no generator to save
    torch.manual_seed(zlib.crc32(f'{seed} {step} {rank}'.encode()))
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = group['peak_lr'] * lr_scale(step)
    micro_steps = gradient_accumulation_steps // world
    for micro in range(micro_steps):
        # gradients are exchanged once a step, with the last micro-batch
        last = world == 1 or micro == micro_steps - 1
        with nullcontext() if last else model.no_sync():
            x, y = batch(micro)
            with autocast:
                _, loss = model(x, y)
            scaler.scale(loss / micro_steps).backward()
        interval_loss += loss.detach() / micro_steps
    for opt in optimizers:
        scaler.unscale_(opt)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip)
    for opt in optimizers:
        scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    balance = raw_model.balance_experts()
    step += 1
    interval_steps += 1
    timed_steps += 1
    bar.update()

    if step == first_step + 2:  # the first ones allocate and compile
        interval_loss.item()        # wait for the device
        timed = time.time() - pauses
    if step == first_step + 12:
        interval_loss.item()
        to_go = (max_iters - step) * (time.time() - pauses - timed) / 10
        say(f'time      about {clock(to_go)} for {max_iters - step} steps, evaluations not counted')
    if step % log_interval == 0 or step == max_iters:
        if world > 1:
            dist.all_reduce(interval_loss)
        train_loss = interval_loss.item() / interval_steps / world  # waits for the device
        rate = timed_steps * tokens_per_step / (time.time() - interval_start)
        mfu = rate * flops / (peak * world) if peak else None
        record(train_loss=train_loss, tokens_per_s=round(rate, 1), mfu=mfu,
               **{name: value.tolist() for name, value in balance.items()})
        line = f'loss {train_loss:.4f}, {human(rate)} tokens/s' + (f', MFU {mfu:.1%}' if mfu else '')
        if bar.disable:
            say(f'step {step}: {line}')
        bar.set_postfix_str(line)
        interval_start, interval_steps, timed_steps = time.time(), 0, 0
        interval_loss.zero_()

bar.close()
if not eval_only:
    say(f'done      {clock(time.time() - start_time)}; read it with: python sample.py --out_dir={out_dir}')
if world > 1:
    dist.destroy_process_group()
