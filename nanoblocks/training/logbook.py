"""
What a run says of itself: on the console, in metrics.jsonl, and in Weights & Biases. None of these may stop
it: lines that a full disk refuses are kept and written later, a server out of reach is done without.
"""
import errno
import json
import math
import os
import statistics
import sys
import urllib.error
import urllib.request
from collections import deque

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanoblocks.files import ROOT, git_commit
from nanoblocks.formats import first_line, format_quantity
from nanoblocks.tokenizer import from_meta


class Logbook:
    """
    out_dir     where metrics.jsonl is, or None to write nothing
    speaks      whether this process prints
    run         the run of W&B, or None
    """

    def __init__(self, out_dir, speaks, step, max_iters):
        self.path = out_dir and os.path.join(out_dir, 'metrics.jsonl')
        self.run, self.speaks = None, speaks
        self.pending = b''  # lines that could not be written yet
        self.bar = tqdm(total=max_iters, initial=step, disable=not (speaks and sys.stdout.isatty()),
                        dynamic_ncols=True, file=sys.stdout)

    def say(self, line):
        """Print a line, above the progress bar when there is one."""
        if self.speaks and self.bar.disable:
            print(line, flush=True)
        elif self.speaks:
            self.bar.write(line)

    def show(self, step, loss, rate, mfu):
        """How training goes: behind the bar, or as a line of its own."""
        line = ', '.join(filter(None, ('no finite loss' if loss is None else f'loss {loss:.4f}',
                                       rate and f'{format_quantity(rate)} tokens/s', mfu and f'MFU {mfu:.1%}')))
        if self.bar.disable:
            self.say(f'step {step}: {line}')
        self.bar.set_postfix_str(line)

    def record(self, line):
        """Add a dict to metrics.jsonl, where null is what was not finite, and to W&B."""
        if self.path is None:
            return
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        self.pending += json.dumps(line).encode() + b'\n'
        try:
            self.flush()
        except OSError:
            pass  # the checkpoint that cannot be written either will say so
        # steps that it has already are the same again, bit by bit
        if self.run:
            self.to_wandb(lambda: self.run.log(line, step=line['step']))

    def flush(self, to_disk=False):
        """Write what waits. OSError if that cannot be; then metrics.jsonl ends with a whole line."""
        if self.path is None:
            return
        with open(self.path, 'ab', buffering=0) as f:
            size = f.tell()
            try:
                if f.write(self.pending) < len(self.pending):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if to_disk:
                    os.fsync(f.fileno())
            except OSError:
                f.truncate(size)
                raise
        self.pending = b''

    def start_wandb(self, project, name, run_id, config):
        """Begin to log to W&B as well, or go on with the run of this id; returns its id, if there is one."""
        config = config | {'git': git_commit()}
        self.run = start_wandb(project, name, run_id, os.path.dirname(self.path), config, self.say)
        return self.run.id if self.run else run_id

    def samples(self, step, texts):
        """Texts of the model, as a table of W&B."""
        if self.run:
            import wandb
            rows = [[step, text] for text in texts]
            self.to_wandb(lambda: self.run.log({'samples': wandb.Table(['step', 'text'], rows)}, step=step))

    def to_wandb(self, action):
        try:
            action()
        except Exception as error:
            self.run = None
            self.say(f'wandb     does not work any more ({type(error).__name__}: {first_line(error)}): '
                     f'training goes on without it, all numbers are in {self.path}')

    def close(self, exit_code=0):
        self.bar.close()
        if self.run:
            self.to_wandb(lambda: self.run.finish(exit_code=exit_code))


class Spikes:
    """Tells a loss that jumps: higher than the median of the last ones by far more than they usually are."""

    def __init__(self, history=()):
        self.history = deque(history, maxlen=20)

    def notice(self, loss):
        """Whether this one does; it counts among the last ones only if not."""
        if len(self.history) >= 5:
            middle = statistics.median(self.history)
            usual = statistics.median(abs(x - middle) for x in self.history)
            if loss > middle + max(0.1 * middle, 8 * usual):
                return True
        self.history.append(loss)
        return False


# ----------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(project, name, run_id, folder, config, say):
    """
    The run with this id, begun or gone on with; None where wandb cannot do even that. Offline if WANDB_MODE
    says so, or if its server does not answer: then say(sentence), and `wandb sync` can send it later.
    """
    import wandb
    mode = os.environ.get('WANDB_MODE', 'online')
    url = os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')
    reason = unreachable(url) if mode == 'online' else None
    settings = {'silent': True, 'init_timeout': 30, 'finish_timeout': 60, 'finish_timeout_raises': False}
    known = {key: value for key, value in settings.items() if hasattr(wandb.Settings(), key)}
    os.makedirs(folder, exist_ok=True)
    for mode in ([mode] if reason is None else []) + ['offline'] * (mode == 'online'):
        if reason:
            say(f'wandb     cannot be reached ({reason}): logging offline; send it later with wandb sync '
                f'{folder}/wandb/offline-*')
        try:
            run = wandb.init(project=project, name=name, id=run_id, resume='allow', mode=mode, dir=folder,
                             config=config, settings=wandb.Settings(**known))
            run.log_code(ROOT, include_fn=is_source)
            return run
        except Exception as error:
            reason = first_line(error)
    say(f'wandb     does not work ({reason}): training goes on without it')
    return None


def is_source(path, root=None):
    parts = os.path.relpath(path, root).split(os.sep)
    return path.endswith('.py') and not {'out', 'venv', '.venv', 'tests'} & set(parts)


def unreachable(url, seconds=5):
    """Why nothing answers at this address, or None when something does."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only that there is nothing here
    except (OSError, ValueError) as error:
        return first_line(getattr(error, 'reason', error))
    return None


# ----------------------------------------------------------------------------------------------------------
# Numbers of a run


class Tally:
    """
    Of the steps since the last log line: the sum of their losses, how many they were and the largest; of the
    run: the steps that were skipped, in all and without a break up to now. On the device, so no step waits.
    """

    def __init__(self, device):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.recent, self.skips = torch.zeros(3, device=device), torch.zeros(2, device=device)

    def add(self, loss, finite):
        """A step: its loss in this process, and whether it was made."""
        good = torch.where(finite, torch.stack([loss, torch.ones_like(loss), loss]), 0.0)
        self.recent = torch.cat([self.recent[:2] + good[:2], torch.maximum(self.recent[2:], good[2:])])
        bad = 1 - good[1:2]
        self.skips = torch.cat([self.skips[:1] + bad, (self.skips[1:] + 1) * bad])

    def read(self, *more):
        """
        [mean loss or None, largest loss, steps skipped, without a break], then the tensors given as numbers;
        the next line begins. Waits for the device, and for the other processes.
        """
        parts, skips = self.parts(), self.skips.tolist()
        mean = parts[:, 0].mean() / parts[0, 1] if parts[0, 1] else None
        self.recent = torch.zeros_like(self.recent)
        return [mean and mean.item(), parts[:, 2].max().item(), *map(int, skips), *(x.item() for x in more)]

    def parts(self):
        """The recent numbers of all processes, (world,3)."""
        parts = self.recent.new_empty(self.world, 3)
        if self.world == 1:
            return self.recent.unsqueeze(0)
        dist.all_gather(list(parts), self.recent)
        return parts

    def state(self):
        return {'parts': self.parts().tolist(), 'skipped': self.skips[0].item()}

    def load(self, state):
        """With another number of processes than before, the mean is everybody's part."""
        parts = torch.tensor(state['parts'], device=self.recent.device)
        mean = torch.cat([parts[:, :2].mean(0), parts[:, 2].max().view(1)])
        self.recent = parts[self.rank] if len(parts) == self.world else mean
        self.skips[0] = state['skipped']


def sample_texts(model, meta, count, max_tokens=200):
    """`count` texts that a model continues its dataset's prompt with; the same seeds every time."""
    tokenizer = from_meta(meta['tokenizer'])
    prompt = tokenizer.encode(meta.get('prompt', '')) or [tokenizer.eot or tokenizer.encode('\n')[0]]
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    room = max_tokens if model.wpe.max_tokens is None else min(max_tokens, model.wpe.max_tokens - len(prompt))
    with torch.compiler.set_stance('force_eager'):
        rows = [model.generate(idx, room, 0.8, top_k=200, seed=n)[0].tolist() for n in range(count)]
    # what was added to round a vocabulary up has no text
    return [tokenizer.decode([t for t in row if t < tokenizer.vocab_size and t != tokenizer.eot])
            for row in rows]


def profile_steps(profiler, device, folder, say):
    """The first call begins to record, the second writes trace.json and prints where the time went."""
    if profiler is None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.startswith('cuda'):
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=kinds)
        profiler.start()
        return profiler
    profiler.stop()
    path = os.path.join(folder, 'trace.json')
    profiler.export_chrome_trace(path)
    order = 'self_cuda_time_total' if device.startswith('cuda') else 'self_cpu_time_total'
    say(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    say(f'profile   {path}: open it in chrome://tracing or ui.perfetto.dev')
