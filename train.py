"""
Train a model. A flat script: settings, setup, the loop.

    python train.py config/llama_small.py config/tiny.py              # a size for a laptop, minutes
    python train.py config/llama_small.py --dataset=fineweb_edu       # one GPU
    python train.py --init_from=path/to/checkpoint --dataset=mine     # fine-tune published weights
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value are applied in the order given; later wins.
--help lists every setting and model flag. Exit codes: stopping.py.
"""
import math
import os
import random
import sys
import time
import zlib
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from configurator import configure, errors_as_messages, plain_settings
from data.loader import check_hashes, ensure_prepared, open_dataset, prefetched
from kernels import use_kernels
from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks import pretrained
from nanoblocks.files import write_json
from nanoblocks.formats import first_line, format_duration, format_quantity
from nanoblocks.hardware import check_device, gpu_dtype, memory_gb, peak_flops, pick_device
from nanoblocks.training import checkpoint, optim, parallel, stopping
from nanoblocks.training.logbook import Logbook, Spikes, Tally, profile_steps, sample_texts
from nanoblocks.training.settings import STARTS, check_settings

# ----------------------------------------------------------------------------------------------------------
# Settings. The model's flags (n_layer, block_size, norm, ...) are the fields of GPTConfig in model.py.

# run
out_dir = 'out'                     # where checkpoints, metrics.jsonl and config.json go
init_from = 'scratch'               # scratch, resume (out_dir's run), auto (if there is one), or a checkpoint
overwrite = False                   # let a new run replace the one that out_dir holds
seed = 1337                         # of weights, batches and dropout
max_iters = 600000                  # optimizer steps in all
log_interval = 10                   # steps between log lines
eval_interval = 2000                # steps between evaluations, each of which saves a checkpoint
eval_iters = 200                    # batches in an evaluation, unless eval_tokens is set
eval_tokens: int | None = None      # tokens in an evaluation, at any batch size; None: eval_iters batches
eval_only = False                   # evaluate once, write nothing and leave
always_save_checkpoint = True       # write ckpt.pt at every evaluation; False: only at the best loss so far
bad_step_limit = 20                 # steps in a row that may be skipped because a number is not finite
profile = False                     # of three steps: write trace.json for Chrome, print the slowest operators
wandb_log = False                   # log to Weights & Biases as well
wandb_project = 'nanoblocks'        # its project
wandb_run_name = ''                 # its run name; empty: the last part of out_dir
wandb_samples = 2                   # texts of 200 tokens that it gets at every evaluation
# data
dataset = 'pysource'                # a folder of data/, or the path of any prepared folder
check_data: bool | None = None      # compare the token files with their hashes; None: if below 4 GB
batch_size = 12                     # sequences in one micro-batch of one process
gradient_accumulation_steps = 40    # micro-batches in one step, those of all processes together
batch_tokens: int | None = None     # tokens in one step, to work out gradient_accumulation_steps
batch_warmup_iters = 0              # steps in which the number of micro-batches grows to that
prefetch: int | None = None         # micro-batches made in advance by a thread; None: 4 for a GPU, else 0
# optimizer
optimizer = 'adamw'                 # adamw, or muon (Muon for the matrices of the blocks, AdamW for the rest)
learning_rate = 6e-4                # AdamW's peak
muon_lr = 0.02                      # Muon's peak
group_lr = ''                       # other peaks, by kind or name: 'embedding=3e-3,*.router.weight=1e-4'
weight_decay = 0.1                  # of matrices and embeddings, never of vectors
cautious_decay = False              # Muon: decay only what the update moves towards zero as well
beta1 = 0.9                         # AdamW's momentum
beta2 = 0.95                        # AdamW's second moment
grad_clip = 1.0                     # largest norm of the gradient; 0: no clipping
z_loss = 0.0                        # weight of the squared log of the softmax's sum, which keeps logits small
ema = 0.0                           # decay of averaged weights, which evaluations and best.pt take; 0: none
# learning rate schedule
decay_lr = True                     # False: constant, and no warmup
schedule = 'cosine'                 # cosine, linear, wsd (constant, then a straight line down), constant
warmup_iters = 2000                 # steps of linear warmup, when decay_lr
lr_decay_iters: int | None = None   # the step that reaches min_lr; None: max_iters
min_lr: float | None = None         # where AdamW's rate ends, Muon's in proportion; None: learning_rate / 10
wsd_decay = 0.6                     # the share of lr_decay_iters in which wsd goes down
# machine
device = 'auto'                     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # of matrix products: auto, float32, bfloat16, float16; weights: float32
kernels = 'auto'                    # on a GPU: auto, torch (none), triton (all, and compiled or not)
compile: bool | None = None         # torch.compile; None: on a GPU, where the minute it takes pays
deterministic: bool | None = None   # the same bits every time; None: where it costs nothing, on a CPU
activation_checkpointing = False    # compute what is inside a block twice instead of keeping it
shard = False                       # FSDP: cut weights, gradients and moments among the processes
backend = 'nccl'                    # of torch.distributed under torchrun: nccl, or gloo (always on a CPU)

given = {}                          # the names that the command line set, each with the file or flag that did
model_args = configure(globals(), GPTConfig, given=given)
settings = plain_settings(globals())

# ----------------------------------------------------------------------------------------------------------
# This run: a new one, or one that goes on

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master, resumed = rank == 0, None

with errors_as_messages():
    if init_from == 'resume' or init_from == 'auto' and checkpoint.can_resume(out_dir):
        resumed, ckpt_path = checkpoint.load_newest(out_dir)
        # what the command line leaves open is as it was
        settings |= {k: v for k, v in resumed['settings'].items() if k in settings and k not in given}
        settings |= {'out_dir': out_dir, 'init_from': init_from}
        globals().update(settings)
    T = (resumed['config'] if resumed else {'block_size': GPTConfig.block_size} | model_args)['block_size']
    check_settings(settings, world, T)
    loaded = None
    if init_from not in STARTS:
        loaded = GPT.from_pretrained(init_from, **model_args)
        # what a model was made for may be far more than there is memory to train on
        T = loaded.config.block_size = model_args.get('block_size', min(T, loaded.config.block_size))
    rates = optim.parse_rates(group_lr)
    if batch_tokens is not None:
        gradient_accumulation_steps = batch_tokens // (batch_size * T)
        settings['gradient_accumulation_steps'] = gradient_accumulation_steps
    if resumed and max_iters < resumed['step']:
        raise ValueError(f'max_iters={max_iters} must be at least the {resumed["step"]} steps that '
                         f'{ckpt_path} has behind it')
    if not (resumed or eval_only or overwrite or init_from == 'auto') and checkpoint.found(out_dir):
        raise ValueError(f'{out_dir} holds a run already: go on with it by --init_from=resume, replace it by '
                         '--overwrite=True, or choose another --out_dir')

# ----------------------------------------------------------------------------------------------------------
# Machine

device = pick_device(device)
if world > 1 and device.startswith('cuda'):
    device = f'cuda:{os.environ["LOCAL_RANK"]}'
device_type = device.split(':')[0]
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
with errors_as_messages():
    check_device(device)
    use_kernels(kernels, device)
if device_type == 'cuda':
    torch.cuda.set_device(device)
watch = parallel.start(device_type, backend) if world > 1 else None
torch.set_float32_matmul_precision('high')
torch.manual_seed(zlib.crc32(f'{seed}'.encode()))
np.random.seed(zlib.crc32(f'{seed}'.encode()))
random.seed(seed)

# ----------------------------------------------------------------------------------------------------------
# Data and model

with errors_as_messages():
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
        T = config.block_size
        data = open_dataset(folder, T, seed)
        if data.meta != resumed['meta']:
            raise ValueError(f'dataset={dataset} must hold what {ckpt_path} was trained on '
                             f'({resumed["settings"]["dataset"]}), wherever it is now: its meta.json '
                             'differs, so it is another one or was prepared anew; start a new run')
    else:
        vocab_size = open_dataset(folder, 1, seed).meta['vocab_size']
        config = loaded.config if loaded else GPTConfig(**({'vocab_size': vocab_size} | model_args))
        if config.vocab_size < vocab_size:
            raise ValueError(f'vocab_size={config.vocab_size} must be at least the {vocab_size} tokens of '
                             f'dataset={dataset}: ' + (f'prepare it with --tokenizer={init_from}' if loaded
                                                       else 'leave it out and it is set'))
        data = open_dataset(folder, T, seed)
        model = loaded or GPT(config, seed=seed)
        if loaded and master and not pretrained.same_tokenizer(init_from, data.meta['tokenizer']):
            print(f'warning: dataset={dataset} was not prepared with the tokenizer of {init_from}, so its '
                  f'tokens mean something else: prepare it with --tokenizer={init_from}')
    if eval_tokens is not None and eval_tokens < T:
        raise ValueError(f'eval_tokens={eval_tokens} must be at least block_size={T}')
    optim.refuse_unused(rates, model)
    if check_data is not False and os.environ.get('LOCAL_RANK', '0') == '0':
        check_hashes(folder, None if check_data else 4e9)
    if master and not eval_only:
        checkpoint.claim(out_dir)
# one model under three names: itself, compiled, and as what exchanges gradients between processes
raw_model = fast_model = model.to(device)

if dtype == 'auto':
    # processors with bf16 matrix instructions gain from the width on where products outweigh the conversions
    cpu_bf16 = torch.cpu._is_avx512_bf16_supported() and config.n_embd >= 256
    dtype = 'bfloat16' if device_type == 'cpu' and cpu_bf16 else 'float32'
    if device_type == 'cuda':
        dtype = gpu_dtype()
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

if compile is None:
    compile = device_type == 'cuda'
if compile:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))  # is there a compiler at all?
    except Exception as error:
        compile = False
        print(f'torch.compile does not work here ({type(error).__name__}: {first_line(error)}): '
              'training eagerly, which is slower')
if deterministic or deterministic is None and compile and device_type == 'cpu':
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
if compile and not (shard or activation_checkpointing):
    fast_model = torch.compile(raw_model)
elif compile:
    # what is done around a block is left to PyTorch
    for block in (*raw_model.h, *raw_model.further):
        block.forward = torch.compile(block.forward)
if activation_checkpointing:
    parallel.recompute_blocks(raw_model)
model = fast_model
if shard:
    model = parallel.shard(raw_model, device_type, dtype)
elif world > 1:
    model = parallel.copies(fast_model)

# ----------------------------------------------------------------------------------------------------------
# Optimizers: every parameter is in one group, by the kind of module that owns it

groups = optim.param_groups(raw_model, optimizer, learning_rate, muon_lr, weight_decay, rates)
# fused: one pass over memory in place of a dozen, and faster than what torch.compile makes of it
fused = device_type in ('cuda', 'cpu')
optimizers = [torch.optim.AdamW(groups['adamw'], lr=learning_rate, betas=(beta1, beta2), fused=fused)]
if groups['muon']:
    # its products are as exact as the model's
    optimizers.insert(0, optim.Muon(groups['muon'], muon_lr, cautious=cautious_decay, compiled=compile,
                                    dtype=torch.bfloat16 if dtype == 'bfloat16' else torch.float32))
params = list(raw_model.parameters())
average = optim.Average(raw_model, ema) if ema else None
lr_share = partial(optim.lr_share, schedule=schedule if decay_lr else 'constant',
                   warmup=warmup_iters if decay_lr else 0, last=lr_decay_iters or max_iters,
                   end=0.1 if min_lr is None else min_lr / learning_rate, wsd_decay=wsd_decay)

# ----------------------------------------------------------------------------------------------------------
# State of the run, and how it is saved

# evaluated: the last step at which that was done; micro_done: micro-batches behind us
step, evaluated, micro_done, best_val_loss, seconds_before = 0, -1 if eval_only else 0, 0, math.inf, 0.0
tally, spikes, wandb_id = Tally(device), Spikes(), None
if resumed:
    step, micro_done, best_val_loss = resumed['step'], resumed['micro_done'], resumed['best_val_loss']
    evaluated = -1 if eval_only else resumed['evaluated']
    seconds_before, wandb_id = resumed['seconds'], resumed['wandb_id']
    optim.load_state(optimizers, resumed['optimizers'])
    checkpoint.set_generators(resumed['generators'])
    if resumed['scaler']:
        scaler.load_state_dict(resumed['scaler'])
    if average and resumed['ema']:
        average.load(resumed['ema'])
    tally.load(resumed['tally'])
    spikes = Spikes(resumed['losses'])
    resumed = True  # its weights and moments need not stay in memory
first_step = step
tokens_per_step = gradient_accumulation_steps * batch_size * T
metrics_path = os.path.join(out_dir, 'metrics.jsonl')
writes = master and not eval_only
if writes:
    if resumed:
        checkpoint.settle(out_dir, ckpt_path)
        checkpoint.rewind_metrics(metrics_path, step)
    else:
        checkpoint.clear(out_dir)
    write_json(os.path.join(out_dir, 'config.json'), {'model': vars(config), 'settings': settings})
log = Logbook(out_dir if writes else None, master, step, max_iters)
if wandb_log and writes:
    name = wandb_run_name or os.path.basename(os.path.normpath(out_dir))
    wandb_id = log.start_wandb(wandb_project, name, wandb_id, vars(config) | settings)
say = log.say


def record(**numbers):
    """Add a line to metrics.jsonl, and to Weights & Biases."""
    log.record({'step': step, 'tokens': micro_done * batch_size * T,
                'lr': lr_share(max(0, step - 1)) * learning_rate,
                'seconds': round(seconds_before + time.time() - start_time, 3)} | numbers)


def save(name, **more):
    """
    Write a checkpoint: all that decides how a run goes on, or with no `more` only what sampling needs.
    Returns whether that could be done, to every process; each has to call it.
    """
    if eval_only:
        return True
    state = checkpoint.contents(raw_model, keep=master, settings=settings, meta=data.meta, step=step,
                                best_val_loss=best_val_loss, **more)
    path, done = os.path.join(out_dir, name), torch.ones((), device=device)
    try:
        if master:
            log.flush(to_disk=True)  # its lines before its checkpoint, or they could be missing
            checkpoint.save(path, state, keep=os.path.join(out_dir, checkpoint.PREVIOUS) if more else None)
    except OSError as error:
        say(f'warning: {path} could not be written ({error.strerror}): what was there is kept; going on, and '
            'trying again')
        done.zero_()
    if world > 1:
        dist.broadcast(done, 0)
    return bool(done)


def save_newest():
    return save(checkpoint.NEWEST, micro_done=micro_done, evaluated=evaluated,
                optimizers=optim.state_of(optimizers, keep=master), scaler=scaler.state_dict(),
                ema=average.state() if average else None, generators=checkpoint.generators(),
                tally=tally.state(), losses=list(spikes.history),
                seconds=seconds_before + time.time() - start_time, wandb_id=wandb_id)


@torch.no_grad()
def evaluate():
    """Mean loss over the validation windows, which are the same ones every time."""
    raw_model.eval()
    sums = []
    with average.in_place() if average else nullcontext():
        tokens = eval_tokens or eval_iters * batch_size * T
        # all of one size, or a compiled model would be compiled again
        for x, y in prefetched(data.eval_batches(batch_size, tokens, rank, world, full=True), prefetch, pin):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with autocast:
                _, loss = fast_model(x, y)
            count = (y >= 0).sum()
            sums.append(torch.stack([loss.float() * count, count.float()]))
            signals.poll()
    raw_model.train()
    total = torch.stack(sums).double().sum(0)
    if world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def batches():
    """This process's micro-batches from here on: which they are depends on their number alone."""
    before = micro_done
    for number in range(step, max_iters):
        count = optim.micro_batches(number, gradient_accumulation_steps, batch_warmup_iters, world)
        for micro in range(before + rank, before + count, world):
            yield data.train_batch(micro * batch_size, batch_size)
        before += count


def loss_of(x, y, model, share, micro):
    """The loss of a micro-batch, and what its gradients are made of."""
    # dropout draws from (seed, number of the micro-batch): there is no generator that could be lost
    torch.manual_seed(zlib.crc32(f'{seed} {micro}'.encode()))
    with autocast:
        _, losses = model(x, y, z_loss=z_loss, parts=True)
    # what is logged is the cross entropy alone, whatever a flag adds;
    # 0 * loss makes every gradient NaN if the loss is, on every rank, so that all skip the step together
    loss = losses['loss']
    return losses['cross_entropy'].detach() * share, scaler.scale(loss * (share + 0 * loss.detach()))


def losses_of_last_step():
    for micro in range(micro_done - count + rank, micro_done, world):
        x, y = data.train_batch(micro * batch_size, batch_size)
        yield loss_of(x.to(device), y.to(device), raw_model, 1 / micro_steps, micro)[1]


# ----------------------------------------------------------------------------------------------------------
# What is about to happen

card = torch.cuda.get_device_name(device) if device_type == 'cuda' else device_type
peak = peak_flops(card)
flops = raw_model.flops_per_token(T)

say(f'model     {format_quantity(raw_model.num_params())} parameters, '
    f'{format_quantity(raw_model.num_params(active=True))} active, {format_quantity(flops)} FLOPs per token, '
    f'{format_quantity(kv_cache_bytes(config, T, 1, 2))}B of cache at {T} tokens in 16 bit')
say(f'data      {dataset}: {format_quantity(data.meta["train_tokens"])} tokens to train on, '
    f'vocabulary {data.meta["vocab_size"]}')
say(f'step      {gradient_accumulation_steps} micro-batches of {batch_size} x {T}: '
    f'{tokens_per_step:,} tokens; {max_iters} steps: {format_quantity(max_iters * tokens_per_step)} tokens')
say(f'machine   {world} x {card}, {dtype} products, {"compiled" if compile else "eager"}')
for opt, group in ((opt, group) for opt in optimizers for group in opt.param_groups):
    say(f'optimizer {type(opt).__name__} for {len(group["params"])} of kind {group["kind"]}, '
        f'{format_quantity(sum(p.numel() for p in group["params"]))} parameters: lr {group["peak_lr"]:g}, '
        f'weight decay {group["weight_decay"]:g}')
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
saved, exit_code, profiler, bad_steps = True, 0, None, int(tally.skips[0])
if prefetch is None:
    prefetch = 4 if device_type == 'cuda' else 0
pin = device_type == 'cuda'
stream = prefetched(batches(), prefetch, pin)
signals = stopping.Signals()

try:
    signals.open()
    while True:
        if (eval_only or step == max_iters or step % eval_interval == 0) and step > evaluated:
            paused, val_loss = time.time(), evaluate()
            with signals.held():
                evaluated = step
                bits = val_loss / math.log(2) / data.meta['val_bytes_per_token']
                say(f'step {step}: val loss {val_loss:.4f}, {bits:.4f} bits per byte')
                record(val_loss=val_loss, val_bpb=bits)
                improved, before = val_loss < best_val_loss, best_val_loss
                with average.in_place() if average else nullcontext():
                    if improved:
                        best_val_loss = val_loss
                        best_val_loss = val_loss if save('best.pt') else before
                    if wandb_log and wandb_samples and not eval_only and (master or shard):
                        log.samples(step, sample_texts(raw_model, data.meta, wandb_samples))
                if improved or always_save_checkpoint and math.isfinite(val_loss):
                    saved = save_newest()
                interval_start += time.time() - paused
                pauses += time.time() - paused
        if eval_only or step >= max_iters:
            break

        count = optim.micro_batches(step, gradient_accumulation_steps, batch_warmup_iters, world)
        micro_steps, step_loss = count // world, torch.zeros((), device=device)
        for opt in optimizers:
            for group in opt.param_groups:
                group['lr'] = group['peak_lr'] * lr_share(step)
        for micro in range(micro_steps):
            x, y = (tensor.to(device, non_blocking=True) for tensor in next(stream))
            # gradients are exchanged once a step, with the last micro-batch
            with parallel.gradients_exchanged(model, micro == micro_steps - 1):
                loss, scaled = loss_of(x, y, model, 1 / micro_steps, micro_done + micro * world + rank)
                scaled.backward()
            step_loss += loss
            signals.poll()

        with signals.held():
            for opt in optimizers:
                scaler.unscale_(opt)
            grad_norm = optim.norm([p.grad for p in params if p.grad is not None])
            if grad_clip:
                torch.nn.utils.clip_grads_with_norm_(params, grad_clip, grad_norm)
            finite = torch.isfinite(grad_norm)
            for opt in optimizers:
                opt.found_inf = 1 - finite.float() if fused else None
                if fused or finite:
                    opt.step()
                opt.zero_grad(set_to_none=True)
            scaler.update()
            if average:
                average.update(step)
            balance = raw_model.balance_experts(finite)
            tally.add(step_loss, finite)
            step, micro_done = step + 1, micro_done + count
            timed_steps += 1
            log.bar.update()

            if step == first_step + 1 and compile:
                tally.skips.tolist()        # wait for the device
                say(f'compiled  in {format_duration(time.time() - start_time)}')
                interval_start, timed_steps = time.time(), 0
            if step == first_step + 2:  # the first ones allocate
                tally.skips.tolist()
                timed = time.time() - pauses
            if step == first_step + 12:
                tally.skips.tolist()
                to_go = (max_iters - step) * (time.time() - pauses - timed) / 10
                say(f'time      about {format_duration(to_go)} for {max_iters - step} steps, evaluations not counted')
            if profile and step in (first_step + 3, first_step + 6):
                profiler = profile_steps(profiler, device, out_dir, say)

            if step % log_interval == 0 or step == max_iters:
                before = bad_steps
                train_loss, most, bad_steps, in_a_row, norm = tally.read(grad_norm)
                seconds = time.time() - interval_start
                rate = timed_steps * count * batch_size * T / seconds if timed_steps else None
                mfu = rate * flops / (peak * world) if peak and rate else None
                record(train_loss=train_loss, tokens_per_s=rate and round(rate, 1), mfu=mfu, grad_norm=norm,
                       param_norm=optim.norm(params).item(), memory_gb=memory_gb(device), skipped=bad_steps,
                       **{name: value.tolist() for name, value in balance.items()})
                log.show(step, train_loss, rate, mfu)
                if bad_steps > before:
                    say(f'warning: {bad_steps - before} steps were skipped, as a gradient was not finite')
                if train_loss is not None and spikes.notice(most):
                    say(f'warning: the loss jumped to {most:.4f} in one of the last {log_interval} steps')
                interval_start, timed_steps = time.time(), 0
                if in_a_row >= bad_step_limit:
                    name = stopping.first_not_finite(raw_model, losses_of_last_step())
                    sys.stdout.flush()
                    print(f'{in_a_row} steps in a row were not finite (bad_step_limit={bad_step_limit}): '
                          f'{name or "nothing when tried again"} was the first tensor to be so; go on from '
                          f'the checkpoint in {out_dir}, which is from before, with a lower rate or other '
                          'data', file=sys.stderr)
                    exit_code = stopping.NOT_FINITE
                    break
                if not saved:
                    signals.ask_for_save()
            if signals.save:
                signals.save = False
                saved = save_newest()
                say(f'step {step}: saved' if saved else f'step {step}: not saved')
    signals.close()
except stopping.Stop:
    saved = save_newest()
    exit_code = stopping.STOPPED if saved else stopping.NOT_SAVED
    say(f'stopped by signal {signals.number or "to another process"} after step {step}'
        + (f'; go on: python train.py --init_from=resume --out_dir={out_dir}' if saved else ', not saved'))
    signals.close()

log.close(exit_code)
if exit_code == 0 and not eval_only:
    say(f'done      {format_duration(time.time() - start_time)}; read it with: python sample.py --out_dir={out_dir}')
if world > 1:
    parallel.end(watch)
sys.exit(exit_code)
