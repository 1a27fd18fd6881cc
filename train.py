"""
Train a model. A flat script: settings, setup, helpers, the loop.

    python train.py config/llama_small.py config/tiny.py              # a size for a laptop, minutes
    python train.py config/llama_small.py --dataset=fineweb_edu       # one GPU
    python train.py --init_from=path/to/checkpoint --dataset=mine     # fine-tune published weights
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

--help lists every setting and model flag. Exit codes: nanoblocks/training/stopping.py.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which `python -P` leaves out

from data import console
from nanoblocks.training import stopping

# from the first line to the last: torch alone takes seconds to import
console.never_fail()
signals = stopping.Signals()

import math
import zlib
from contextlib import nullcontext

import torch

from configurator import configure, errors_as_messages, plain_settings
from data.loader import prefetched, row_of_pairs
from data.mixture import Sources
from data.objectives import objective_of, packed
from kernels import use_attention, use_head_dtype, use_kernels
from model import GPT, GPTConfig
from nanoblocks import hardware, pretrained
from nanoblocks.commandline import refuse_words, warn_of_unread
from nanoblocks.decoding import tasks
from nanoblocks.decoding.preview import sample_texts
from nanoblocks.tokenizer import from_meta
from nanoblocks.training import checkpoint, debug, forecast, optim, parallel
from nanoblocks.training import settings as rules
from nanoblocks.training.logbook import Logbook, describe_run
from nanoblocks.training.meters import Progress
from nanoblocks.training.run_folder import RunFolder
from nanoblocks.training.saving import Saver
from nanoblocks.training.sequence import Sequence

# ----------------------------------------------------------------------------------------------------------
# Settings. The model's flags (n_layer, block_size, norm, ...) are the fields of GPTConfig in model.py.

# run
out_dir = 'out'                     # folder of the run: checkpoints, metrics.jsonl, config.json
init_from = 'scratch'               # scratch, resume (out_dir), auto (resume if possible), or a checkpoint
step: int | None = None             # resume: go on from the kept checkpoint of this step; None: the newest
overwrite = False                   # let a new run replace the one in out_dir
seed = 1337                         # seed of weights, batches and dropout
max_iters = 600000                  # optimizer steps of the run
log_interval = 10                   # steps between log lines
eval_interval = 2000                # steps between evaluations
eval_iters = 200                    # batches per evaluation, unless eval_tokens is set
eval_tokens: int | None = None      # tokens per evaluation at any batch size; None: eval_iters batches
eval_datasets = ''                  # datasets whose validation splits are judged too: NAME,NAME,...
eval_tasks = ''                     # files of multiple choice (JSON lines) to score too: FILE,FILE,...
eval_only = False                   # evaluate once, write nothing and exit
dry = False                         # tell the memory and time of a step, by line, write nothing and exit
always_save_checkpoint = True       # write ckpt.pt at every evaluation; False: only if the loss is a new best
save_interval: int | None = None    # steps between checkpoints, which are then not written at evaluations
save_minutes: float | None = None   # minutes between checkpoints, beside save_interval or instead
save_thread = True                  # a thread writes checkpoints, from a copy in memory; False: the run waits
keep_newest = 0                     # checkpoints to keep as ckpt.STEP.pt too: the newest so many, and
keep_every: int | None = None       # those of every so many steps
bad_step_limit = 20                 # skipped steps in a row (loss or gradient not finite) that end the run
profile = False                     # profile three steps: trace.json for Chrome, a table of slow operators
wandb_log = False                   # log to Weights & Biases as well
wandb_project = 'nanoblocks'        # Weights & Biases: project
wandb_run_name = ''                 # Weights & Biases: name of the run; empty: the last part of out_dir
wandb_samples = 2                   # Weights & Biases: sample texts of 200 tokens at every evaluation
# data
dataset = 'pysource'                # a folder of data/ or a path; several with weights: 'a:0.7,b:0.3'
objective = 'next'                  # next; mask, diffusion (causal=False); prefix, span (n_encoder)
mask_rate = 0.15                    # mask: share of the tokens that are masked and named
doc_mask = False                    # no token sees another document than its own (docs/training.md)
check_data: bool | None = None      # verify the checksums of the token files; None: if they are below 4 GB
batch_size = 12                     # sequences per micro-batch of one process
gradient_accumulation_steps = 40    # micro-batches per step, summed over all processes
batch_tokens: int | None = None     # tokens per step; if set, gradient_accumulation_steps follows from it
batch_warmup_iters = 0              # steps in which the micro-batches per step grow to their full number
prefetch: int | None = None         # micro-batches that a thread loads in advance; None: 4 on a GPU, else 0
# optimizer
optimizer = 'adamw'                 # adamw, or muon (Muon for the matrices in blocks, AdamW for the rest)
learning_rate = 6e-4                # peak learning rate of AdamW
muon_lr = 0.014                     # peak learning rate of Muon
group_lr = ''                       # peak rates by kind or name: 'embedding=3e-3,*.router.weight=1e-4'
weight_decay = 0.1                  # weight decay of matrices and embeddings; vectors never decay
cautious_decay = False              # Muon: decay a weight only where the update moves it towards zero too
beta1 = 0.9                         # AdamW: decay of the first moment
beta2 = 0.95                        # AdamW: decay of the second moment
grad_clip = 1.0                     # largest norm of the gradient; 0: no clipping
z_loss = 0.0                        # penalty on large logits: weight of their squared log-sum-exp
ema = 0.0                           # decay of averaged weights, for evaluations and best.pt; 0: no average
# learning rate schedule
decay_lr = True                     # follow schedule and warmup_iters; False: a constant rate without warmup
schedule = 'cosine'                 # cosine, linear, wsd (constant, then linear decay), constant
warmup_iters = 2000                 # steps of linear warmup
lr_decay_iters: int | None = None   # step at which min_lr is reached; None: max_iters
min_lr: float | None = None         # final rate of AdamW, Muon's in proportion; None: learning_rate / 10
wsd_decay = 0.6                     # wsd: fraction of lr_decay_iters spent in the decay
# machine
device = 'auto'                     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                      # matrix products: auto, float32, bfloat16, float16; weights stay float32
kernels = 'auto'                    # on a GPU: auto, torch (none), triton (all), mamba_ssm (that package's)
attention = 'auto'                  # plain causal attention on a GPU: auto (PyTorch's), fa3, fa4 (packages)
stream_dtype = 'float32'            # the residual stream: float32, or bfloat16 beside dtype=bfloat16
head_dtype = 'auto'                 # products of the head in training: auto (dtype), float8 (of an H100)
compile: bool | None = None         # torch.compile; None: where it pays, on a GPU and in long runs on a CPU
compile_mode = 'default'            # torch.compile's mode: default, or max-autotune-no-cudagraphs
deterministic: bool | None = None   # the same bits in every run; None: on a CPU, where it costs nothing
activation_checkpointing = False    # save memory: recompute a block's activations in the backward pass
shard = False                       # FSDP: shard weights, gradients and moments over the processes
context_parallel = False            # each process holds a part of every row: for texts too long for one
backend = 'nccl'                    # torch.distributed on GPUs: nccl or gloo; CPUs always use gloo

signals.imported()
stopping.answer_out_of_memory('lower --batch_size and raise --gradient_accumulation_steps as much, set '
                              '--activation_checkpointing=True, or train a smaller model')
refuse_words(sys.argv[1:], globals())
given = {}                          # what the command line set: {name: the flag or file that set it}
model_args = configure(globals(), GPTConfig, given=given)
settings = plain_settings(globals())

# ----------------------------------------------------------------------------------------------------------
# Start or resume

rank, world, local_rank = parallel.ranks()
is_main = rank == 0
hardware.warn_of_torch_version()
writes = is_main and not eval_only
if dry and not is_main:
    sys.exit(0)  # the main process tells it for all
folder, resumed, ckpt_path, digest, loaded = RunFolder(out_dir), None, None, None, None
with errors_as_messages():
    if init_from == 'resume' or init_from == 'auto' and folder.resumable():
        resumed, ckpt_path, digest = folder.load(step if init_from == 'resume' else None)
        # a setting that the command line leaves out keeps the value it had in the run
        settings |= {k: v for k, v in resumed['settings'].items()
                     if k in settings and k not in given and k != 'out_dir'}
        globals().update(settings)
    rules.check_settings(settings, world, resumed['step'] if resumed else 0)
    if not dry:
        parallel.check_meeting(world)
    del settings['step']  # it is of this start, and not of the run
    if is_main:
        warn_of_unread(given, rules.unread(settings, world))
    rates = optim.parse_rates(group_lr)
    if not resumed and init_from in rules.STARTS:
        GPTConfig(**model_args)  # a wrong flag is refused before anything that is in the folder
    if init_from not in rules.STARTS:
        loaded = GPT.from_pretrained(init_from, **model_args)
        # training may not have the memory for the context of a published model
        shorter = min(GPTConfig.block_size, loaded.config.block_size)
        loaded.config.block_size = model_args.get('block_size', shorter)
    if not (resumed or eval_only or dry or overwrite or init_from == 'auto'):
        folder.refuse_existing()

# ----------------------------------------------------------------------------------------------------------
# Machine

device = hardware.device_of_process(hardware.pick_device(device), world, local_rank)
device_type = device.split(':')[0]
with errors_as_messages():
    hardware.check_device(device)
    use_kernels(kernels, device)
    use_attention(attention, device)
    use_head_dtype(head_dtype)
if device_type == 'cuda':
    torch.cuda.set_device(device)
failure_watch = parallel.start(device_type, backend) if world > 1 and not dry else None
torch.set_float32_matmul_precision('high')
checkpoint.seed_generators(seed)
pin = device_type == 'cuda'  # batches in pinned memory, which a GPU copies while it computes
prefetch = prefetch if prefetch is not None else 4 if device_type == 'cuda' else 0

# ----------------------------------------------------------------------------------------------------------
# Data and model

with errors_as_messages():
    sources = Sources(dataset, eval_datasets)
    if local_rank == 0:
        sources.ensure_prepared()
    parallel.wait_for_all()
    meta = sources.read_meta()
    task = objective_of(objective, meta, mask_rate)
    n_tokens = meta['vocab_size'] + task.more
    if resumed:
        model = checkpoint.build(resumed, ckpt_path, model_args if eval_only else {})
        config = model.config
    else:
        sizes = {'vocab_size': n_tokens} | ({'block_size': row_of_pairs(meta)} if 'pairs' in meta else {})
        config = loaded.config if loaded else GPTConfig(**(sizes | model_args))
        rules.check_vocabulary(config, n_tokens, dataset, init_from if loaded else None, task.more)
    task = task.read_by(rules.check_objective(settings, config))
    rules.check_context_parallel(settings, config, world)
    rules.check_documents(settings, config)
    if doc_mask:
        task = packed(task, sources.folders.values())
    T = config.block_size
    # among how many processes the rows are dealt, and which of these this process is
    share = (0, 1) if context_parallel else (rank, world)
    data = sources.open(T, seed, task)
    rules.check_lengths(settings, share[1], T)
    if batch_tokens is not None:
        gradient_accumulation_steps = batch_tokens // (batch_size * T)
        settings['gradient_accumulation_steps'] = gradient_accumulation_steps
    if resumed:
        rules.refuse_contradictions(resumed, ckpt_path, model_args, settings, given, meta)
        resumed['micro_done'] = rules.keep_rows(resumed, settings, T)
        eval_tokens = settings['eval_tokens']
    if dry:
        forecast.tell(config, settings, dict(zip(task.names, data.train_batch(0, 1))), device, share[1])
        sys.exit(0)
    if not resumed:
        model = loaded or GPT(config, seed=seed)
    parallel.refuse_differences(checkpoint.loaded_by(resumed, digest, loaded, meta, settings, config))
    optim.refuse_unused(rates, model)
    questions = []
    if eval_tasks:
        questions = tasks.read_tasks(eval_tasks, model, from_meta(meta['tokenizer']), 'eval_tasks')
    if check_data is not False and local_rank == 0:
        sources.check_hashes(None if check_data else 4e9)
    if loaded and is_main:
        rules.warn_of_tokenizer(init_from, dataset, pretrained.tokenizer_of(init_from) is not None,
                                pretrained.same_tokenizer(init_from, meta['tokenizer']))
    if dtype == 'auto':
        dtype = hardware.training_dtype(device, config.n_embd)
    before = resumed.get('compiled', False) if resumed else None
    wanted, why = rules.choose_compile(settings, model, device_type, world, before)
    rules.check_machine(settings, dtype, wanted)
    if writes:
        folder.create()

autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
# around several forward passes, it casts nothing itself but keeps the weights that autocast has cast
casts_kept = nullcontext() if dtype == 'float32' else torch.autocast(device_type, enabled=False)
compile = wanted and hardware.can_compile(device)
if deterministic or deterministic is None and compile and device_type == 'cpu':
    hardware.use_deterministic_algorithms()
# raw_model is the module, fast_model its compiled form, model the DDP or FSDP wrapper
raw_model = model.to(device)
if stream_dtype != 'float32':
    raw_model.stream_dtype = getattr(torch, stream_dtype)
fast_model, model = parallel.wrap(raw_model, dtype, compile and compile_mode, activation_checkpointing, shard)

# ----------------------------------------------------------------------------------------------------------
# Optimizers, and the state of the run

groups = optim.param_groups(raw_model, optimizer, learning_rate, muon_lr, weight_decay, rates)
lr_fraction = optim.schedule_of(settings)
optimizers = optim.Optimizers(raw_model, groups, lr_fraction, betas=(beta1, beta2), grad_clip=grad_clip,
                              ema=ema, cautious=cautious_decay, dtype=dtype, compiled=compile)
micro_batches = parallel.MicroBatches(gradient_accumulation_steps, batch_warmup_iters, *share)
sequence = Sequence(raw_model, T) if context_parallel else None

# steps and micro-batches done, the step of the last evaluation, the lowest loss
step, micro_done, evaluated, best_val_loss, wandb_id = 0, 0, -1, math.inf, None
if resumed:
    step, micro_done, evaluated = resumed['step'], resumed['micro_done'], resumed['evaluated']
    best_val_loss, wandb_id = resumed['best_val_loss'], resumed['wandb_id']
    optimizers.load(resumed)
    checkpoint.restore_generators(resumed['generators'])
if writes:
    with errors_as_messages():
        folder.begin(ckpt_path, resumed, {'model': vars(config), 'settings': settings})
log = Logbook(folder if writes else None, is_main, step, max_iters, out_dir)
if wandb_log and writes:
    wandb_id = log.start_wandb(wandb_project, wandb_run_name, wandb_id, vars(config) | settings)
machine = f'{world} x {hardware.card_name(device)}, {dtype} products, {"compiled" if compile else "eager"}'
describe_run(log, raw_model, meta, settings, optimizers, resumed, machine)
if why and compile == wanted:
    log.print(f'compile   {why}')
first_step, progress = step, Progress(log, device, compile, max_iters, raw_model.flops_per_token(T))
if resumed:
    progress.load(resumed)
    resumed = None  # its weights and moments need not stay in memory
profiler = debug.StepProfiler(device, out_dir, log)
saver = Saver(folder, log, settings, best_val_loss)
signals.open()

# ----------------------------------------------------------------------------------------------------------
# What the loop calls


def micro_batch(number):
    """idx, targets, ... (batch_size,T) each; which rows they are depends on the number alone."""
    return data.train_batch(number * batch_size, batch_size)


def on_device(batch):
    """The tensors of a batch by the names that the model has for them."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in zip(task.names, batch)}
    return sequence.part(batch) if sequence else batch


def losses_of(model, batch, number):
    """The loss of a micro-batch and its parts: {'loss', 'cross_entropy', ...}, scalars."""
    # dropout is seeded by the micro-batch: a resumed run draws the same masks
    torch.manual_seed(zlib.crc32(f'{seed} {number}'.encode()))
    with autocast:
        losses = model(**batch, z_loss=z_loss, parts=True)[1]
    return sequence.closed(losses) if sequence else losses


def recomputed_losses():
    """Yields the losses of the last step, computed once more, to find the tensor that is not finite."""
    for number in numbers:
        losses = losses_of(raw_model, on_device(micro_batch(number)), number)
        yield optimizers.scaled(losses['loss'], 1 / len(numbers))


@torch.no_grad()
def evaluate(data):
    """Mean loss over validation windows of a dataset, the same ones every time."""
    raw_model.eval()
    tokens, sums = eval_tokens or eval_iters * batch_size * T, []
    with progress.paused(), optimizers.averaged(), signals.interruptible():
        # batches of one size, or torch.compile would compile again
        batches = data.eval_batches(batch_size, tokens, *share, full=True)
        for batch in map(on_device, prefetched(batches, prefetch, pin)):
            with autocast:
                loss = fast_model(**batch)[1]
            count = ((batch['targets'] >= 0) * batch.get('weights', 1)).sum()
            sums.append(torch.stack([loss.float() * count, count.float()]))
            log.evaluating(min(1, len(sums) * batch_size * T * share[1] / tokens))
            signals.poll()
    log.evaluating(1)
    raw_model.train()
    # in float64, which Apple's GPUs do not have
    loss, count = parallel.summed(list(map(math.fsum, zip(*torch.stack(sums).tolist()))), device_type)
    return loss / count


def score_tasks():
    """Print and return the accuracy on each file of eval_tasks: {'NAME/acc': ..., 'NAME/acc_norm': ...}"""
    def tell(part):
        log.evaluating(part)
        signals.poll()

    found = {}
    for file in questions:
        with (progress.paused(), optimizers.averaged(), signals.interruptible(),
              torch.compiler.set_stance('force_eager'), autocast):
            result = tasks.accuracy(file, raw_model, batch_size, (rank, world),
                                    lambda sums: parallel.summed(sums, device_type), tell)
        log.print(f'step {step}: {result}')
        found |= {f'{result.name}/acc': result.acc, f'{result.name}/acc_norm': result.acc_norm}
    return found


def record(**numbers):
    """Add a line to metrics.jsonl and to Weights & Biases."""
    log.record({'step': step, 'tokens': micro_done * batch_size * T,
                'lr': lr_fraction(max(0, step - 1)) * learning_rate,
                'seconds': round(progress.seconds(), 3)} | numbers)


def save(newest=True, best_loss=None, last=False, say=False):
    """
    Write ckpt.pt, to resume from, and with `best_loss` best.pt, for sampling: the same weights, or their
    average if there is one. Nothing if eval_only. See Saver.save; False if it failed.
    """
    if eval_only or not newest and best_loss is None:
        return True
    with progress.paused():
        states, learnt = {}, optimizers.state()
        common = checkpoint.contents(raw_model, settings=settings, meta=meta, step=step)
        if best_loss is not None:
            weights = checkpoint.averaged(common['model'], learnt['ema'])
            states[folder.best] = common | {'model': weights, 'best_val_loss': best_loss}
        if newest:
            states[folder.newest] = common | dict(
                best_val_loss=saver.best_loss, micro_done=micro_done, evaluated=evaluated, wandb_id=wandb_id,
                compiled=compile, generators=checkpoint.generator_states(), **learnt, **progress.state())
        return saver.save(states, last or step == max_iters, say)


def preview():
    """Sample texts. Every process draws them: FSDP needs all of them, and with DDP the others would wait."""
    rows = None  # of the prompt; for other objectives than next, validation rows
    if objective != 'next':
        rows = on_device(next(data.eval_batches(wandb_samples, wandb_samples * T)))
    with progress.paused(), optimizers.averaged():
        return sample_texts(raw_model, meta, wandb_samples, rows=rows)


# ----------------------------------------------------------------------------------------------------------
# The loop

stream = prefetched(map(micro_batch, micro_batches.mine_until(max_iters, step, micro_done)), prefetch, pin)
exit_code = 0

try:
    while True:
        # evaluate, first as a base line; save the best weights and the newest
        if eval_only or step > evaluated and (step % eval_interval == 0 or step == max_iters):
            val_loss, bits, each = data.judged([evaluate(part) for part in data.parts])
            record(**log.evaluated(step, task, val_loss, bits, each), **score_tasks())
            if eval_only:
                break
            saver.collect(wait=True)
            evaluated, improved = step, step > 0 and val_loss < saver.best_loss
            if wandb_log and wandb_samples:
                log.samples(step, preview())
            save(newest=saver.with_evaluation(step, improved) and step and math.isfinite(val_loss),
                 best_loss=val_loss if improved else None)
        if step >= max_iters:
            break

        # forward and backward; a signal may interrupt here, because no weight has changed yet
        numbers, count = micro_batches.mine(step, micro_done), micro_batches.count(step)
        with signals.interruptible(trains=True), casts_kept:
            for number in numbers:
                batch = on_device(next(stream))
                # processes exchange their gradients once a step, with the last micro-batch
                parallel.exchange_gradients(model, number == numbers[-1])
                losses = losses_of(model, batch, number)
                optimizers.scaled(losses['loss'], 1 / len(numbers)).backward()
                progress.add(losses['cross_entropy'], 1 / len(numbers))
                signals.poll()

        # update the weights, unless a gradient is not finite: the device decides, nothing waits for it
        grad_norm = optimizers.step(step)
        balance = raw_model.balance_experts(grad_norm.isfinite())
        step, micro_done = step + 1, micro_done + count
        progress.end_step(step, grad_norm.isfinite(), tokens=count * batch_size * T)
        if profile:
            profiler.step()

        # log; reading the numbers waits for the device
        is_log_step = step % log_interval == 0 or step == max_iters
        if is_log_step:
            record(**progress.read(step, grad_norm), param_norm=optim.total_norm(optimizers.params).item(),
                   memory_gb=hardware.memory_gb(device), **{k: v.tolist() for k, v in balance.items()})
            if progress.skipped_in_a_row >= bad_step_limit:
                debug.report_bad_steps(raw_model, recomputed_losses(), bad_step_limit, out_dir)
                exit_code = stopping.NOT_FINITE
                break
            saver.collect()

        # save when it is time, when SIGUSR1 asked for it, or again if the disk was full
        if saver.late():
            signals.request_save()
        if signals.save_requested or saver.due(step) or is_log_step and saver.unsaved:
            signals.save_requested = False
            save(say=True)
except stopping.Stop:
    saved = save(last=True)
    exit_code = stopping.STOPPED if saved else stopping.NOT_SAVED
    log.stopped(signals.number, step, saved)

saver.collect(wait=True)
if exit_code == 0 and saver.unsaved:
    exit_code = stopping.NOT_SAVED
    log.not_saved(step)
signals.close(exit_code)
log.close(exit_code)
if exit_code == 0 and not eval_only:
    log.done(progress.seconds(), step - first_step, writes=config.causal or objective != 'prefix')
parallel.end(failure_watch)
folder.release()
sys.exit(exit_code)
