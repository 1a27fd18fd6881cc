"""
What a run reports: on the console, in metrics.jsonl and to Weights & Biases. A failure here never stops a
run: lines that a full disk refuses are kept and written later, and W&B goes offline if its server is down.
"""
import errno
import json
import math
import os
import shlex
import sys
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from model import kv_cache_bytes
from nanoblocks.files import ROOT, flush_file, git_commit
from nanoblocks.formats import counted, first_line, format_duration, format_quantity
from nanoblocks.training.checkpoint import overrides


class Logbook:
    """
    folder      the RunFolder to write metrics to, or None to write nothing
    prints      whether this process prints
    out_dir     of the run, for commands to copy
    """

    def __init__(self, folder, prints, step, max_iters, out_dir='out'):
        self.folder, self.prints, self.max_iters = folder, prints, max_iters
        self.out_dir = str(out_dir)
        self.resume_command = f'python train.py --init_from=resume --out_dir={shlex.quote(self.out_dir)}'
        self.wandb_run = None
        self.pending = b''  # lines that could not be written yet
        self.told = None    # when the evaluation that is running was last told of
        self.bar = tqdm(total=max_iters, initial=step, disable=not (prints and sys.stdout.isatty()),
                        dynamic_ncols=True, file=sys.stdout)

    def print(self, line):
        """Print a line, above the progress bar if there is one."""
        if self.prints and self.bar.disable:
            print(line, flush=True)
        elif self.prints:
            self.bar.write(line)

    def step(self, step, loss, tokens_per_s, mfu, seconds_left):
        """Print loss, speed, the part of the run that is done, and the time left where they are known."""
        parts = ['no finite loss' if loss is None else f'loss {loss:.4f}']
        if tokens_per_s:
            parts.append(f'{format_quantity(tokens_per_s)} tokens/s')
        if mfu:
            parts.append(f'MFU {mfu:.1%}')
        self.bar.set_postfix_str(', '.join(parts))
        parts.append(f'{100 * step // self.max_iters}% done')
        if seconds_left:
            parts.append(f'{format_duration(seconds_left)} left')
        self.print(f'step {step}: {", ".join(parts)}')

    def evaluating(self, share):
        """Show how far an evaluation is, up to 1: every second on the bar, every half minute in a log."""
        now = time.monotonic()
        self.told, every = self.told or now, 30 if self.bar.disable else 1
        if share < 1 and now < self.told + every:
            return
        self.told = None if share == 1 else now
        words = f'evaluating: {share:.0%}' if share < 1 else ''
        if not self.bar.disable:
            self.bar.set_description_str(words)
        elif words:
            self.print(words)

    def evaluated(self, step, task, loss, bits, each):
        """
        Print the loss and the bits per byte of an evaluation, and where there are several datasets those of
        `each`, {name: (loss, bits)}. task: the objective, which words them. Returns what metrics.jsonl holds
        of them.
        """
        self.print(f'step {step}: val loss {loss:.4f}{task.told.format(bits=bits)}')
        for name, (own, own_bits) in each.items():
            self.print(f'  {name}: val loss {own:.4f}{task.told.format(bits=own_bits)}')
        found = {'val_loss': loss, 'val_bpb': bits}
        if each:
            found |= {key: {name: both[i] for name, both in each.items()}
                      for i, key in enumerate(('val_losses', 'val_bpbs'))}
        return {key: x for key, x in found.items() if task.whole or 'bpb' not in key}

    def record(self, line):
        """Add a dict to metrics.jsonl and to W&B. A number that is not finite becomes null."""
        if self.folder is None:
            return
        line = finite(line)
        self.pending += json.dumps(line).encode() + b'\n'
        try:
            self.flush()
        except OSError:
            pass  # the next checkpoint will fail too, and print why
        # a resumed run logs some steps to W&B again, with the same numbers bit for bit
        if self.wandb_run:
            self.to_wandb(lambda: self.wandb_run.log(line, step=line['step']))

    def flush(self, to_disk=False):
        """Write the pending lines. On OSError metrics.jsonl still ends with a complete line."""
        if self.folder is None:
            return
        with open(self.folder.metrics, 'ab', buffering=0) as f:
            size = f.tell()
            try:
                if f.write(self.pending) < len(self.pending):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if to_disk:
                    flush_file(f)
            except OSError:
                f.truncate(size)
                raise
        self.pending = b''

    def start_wandb(self, project, name, run_id, config):
        """
        Log to W&B too, continuing the run `run_id` unless that is None. An empty name stands for the name of
        the folder. Returns the id of the W&B run, or run_id if wandb fails.
        """
        folder, config = self.folder.path, config | {'git': git_commit()}
        name = name or os.path.basename(os.path.normpath(folder))
        self.wandb_run = start_wandb(project, name, run_id, folder, config, self.print)
        return self.wandb_run.id if self.wandb_run else run_id

    def samples(self, step, texts):
        """Show texts of the model as a table in W&B."""
        if self.wandb_run:
            import wandb
            rows = [[step, text] for text in texts]
            self.to_wandb(lambda: self.wandb_run.log({'samples': wandb.Table(['step', 'text'], rows)},
                                                     step=step))

    def to_wandb(self, action):
        """Call action(), a call of wandb. If it fails, the run continues without W&B."""
        try:
            action()
        except Exception as error:
            self.wandb_run = None
            self.print(f'wandb     stopped working ({type(error).__name__}: {first_line(error)}): training '
                       f'continues without it, all numbers are in {self.folder.metrics}')

    def stopped(self, number, step, saved):
        """Say that a run was stopped, by a signal `number` or, where that is None, to another process."""
        self.print(f'stopped by signal {number or "to another process"} after step {step}'
                   + (f'; resume it with: {self.resume_command}' if saved else ', not saved'))

    def not_saved(self, step):
        self.print(f'step {step}: not saved, because {self.out_dir} could not be written: make room there, '
                   f'then repeat what was lost with: {self.resume_command}')

    def done(self, seconds, steps, writes=True):
        """Say that a run has ended. steps: that this process made; writes: whether sample.py can read it."""
        if steps == 0:
            self.print(f'done      before this start: the last step, {self.max_iters}, was made; for more, '
                       'resume with a larger --max_iters')
        see = f'; to see what it writes: python sample.py --out_dir={shlex.quote(self.out_dir)}'
        self.print(f'done      {format_duration(seconds)}{see if writes else ""}')

    def close(self, exit_code=0):
        self.bar.close()
        if self.wandb_run:
            self.to_wandb(lambda: self.wandb_run.finish(exit_code=exit_code))


def finite(x):
    """Numbers in a dict, and in the dicts in it, with null for those that are not finite."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def describe_run(log, model, meta, settings, optimizers, resumed, machine):
    """Print what a run is about to do. `resumed`: the checkpoint or None; `machine`: a line about it."""
    T, s, quantity = model.config.block_size, settings, format_quantity
    flops, tokens = model.flops_per_token(T), s['gradient_accumulation_steps'] * s['batch_size'] * T
    cache = 'no cache, as it is an encoder'
    if model.config.causal:
        cache = f'{quantity(kv_cache_bytes(model.config, T, 1, 2))}B of cache at {T} tokens in 16 bits'
    log.print(f'model     {quantity(model.num_params())} parameters, '
              f'{quantity(model.num_params(active=True))} active, {quantity(flops)} FLOPs per token, {cache}')
    log.print(f'data      {s["dataset"]}: {quantity(meta["train_tokens"])} tokens to train on, '
              f'vocabulary {meta["vocab_size"]}')
    if not s['eval_only']:
        number = counted(s['gradient_accumulation_steps'], 'micro-batch')
        log.print(f'step      {number} of {s["batch_size"]} x {T}: {tokens:,} tokens; '
                  f'{counted(s["max_iters"], "step")}: {quantity(s["max_iters"] * tokens)} tokens')
    log.print(f'machine   {machine}')
    for line in () if s['eval_only'] else optimizers.lines():
        log.print(f'optimizer {line}')
    log.print(f'run       {s["out_dir"]}' + (f', resuming at step {resumed["step"]}' if resumed else ''))
    for name, (old, new) in overrides(resumed['config'], model.config).items() if resumed else ():
        log.print(f'override  {name}={new}, trained with {old}')
    for line in changes(resumed['settings'], s) if resumed else ():
        log.print(f'changed   {line}')
    if s['decay_lr'] and s['warmup_iters'] >= s['max_iters']:
        log.print(f'warning: warmup_iters={s["warmup_iters"]} is not below max_iters={s["max_iters"]}: '
                  f'learning_rate is never reached; set --warmup_iters={s["max_iters"] // 10}')
    on_cpu, steps = model.wte.weight.device.type == 'cpu', 0 if s['eval_only'] else s['max_iters']
    if on_cpu and flops * tokens * steps > 1e15:
        log.print('warning: this is much for a CPU and may take hours or days: add config/tiny.py for a size '
                  'that takes minutes')


def changes(before, now):
    """Yields a line for each setting that a resumed run has changed, with both values."""
    for name, value in now.items():
        # these say how this process was started, not what it computes
        if name in ('out_dir', 'init_from', 'overwrite', 'eval_only') or before.get(name, value) == value:
            continue
        moves = name == 'max_iters' and now['decay_lr'] and now['lr_decay_iters'] is None
        yield f'{name}: was {before[name]}, now {value}' + ', which moves the end of the schedule' * moves


# ----------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(project, name, run_id, folder, config, log):
    """
    A new W&B run, or the run `run_id` continued; None if wandb fails. Offline if WANDB_MODE says so, or if
    the server cannot be reached; log(line) prints such a failure.
    """
    try:
        import wandb
    except Exception as error:  # installed, but broken
        log(f'wandb     does not work ({first_line(error)}): training continues without it')
        return None
    mode = os.environ.get('WANDB_MODE', 'online')
    url = os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')
    reason = unreachable(url) if mode == 'online' else None
    settings = {'silent': True, 'init_timeout': 30, 'finish_timeout': 60, 'finish_timeout_raises': False}
    # versions of wandb differ in the settings they know
    known = {key: value for key, value in settings.items() if hasattr(wandb.Settings(), key)}
    os.makedirs(folder, exist_ok=True)
    modes = ['offline'] if reason else ['online', 'offline'] if mode == 'online' else [mode]
    for mode in modes:
        if reason:
            log(f'wandb     cannot be reached ({reason}): logging offline; to upload later: wandb sync '
                f'{folder}/wandb/offline-*')
        try:
            run = wandb.init(project=project, name=name, id=run_id, resume='allow', mode=mode, dir=folder,
                             config=config, settings=wandb.Settings(**known))
            run.log_code(ROOT, include_fn=is_source)
            return run
        except Exception as error:
            reason = first_line(error)
    log(f'wandb     does not work ({reason}): training continues without it')
    return None


def is_source(path, root=None):
    parts = os.path.relpath(path, root).split(os.sep)
    return path.endswith('.py') and not {'out', 'venv', '.venv', 'tests'} & set(parts)


def unreachable(url, seconds=5):
    """Why no server answers at this address; None if one does."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # the server answers, only this page does not exist
    except (OSError, ValueError) as error:
        return first_line(getattr(error, 'reason', error))
    return None
