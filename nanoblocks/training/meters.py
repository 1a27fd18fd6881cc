"""How a run is going: losses, skipped steps, spikes, tokens per second, MFU, time left."""
import statistics
import time
from collections import deque
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nanoblocks.formats import counted, format_duration
from nanoblocks.hardware import card_name, peak_flops, synchronize


class Progress:
    """
    Measures the steps between two log lines and prints the results. Run evaluations and write checkpoints
    within `paused()`, so that they do not count as training time.

    log                 the Logbook that prints
    flops_per_token     of a training step, for MFU
    """

    def __init__(self, log, device, compiled, max_iters, flops_per_token):
        self.log, self.device, self.compiled, self.max_iters = log, device, compiled, max_iters
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops(card_name(device))
        self.meter, self.spikes = StepMeter(device), SpikeDetector()
        self.skipped = self.skipped_in_a_row = 0
        self.seconds_before, self.began, self.seconds_paused = 0.0, time.monotonic(), 0.0
        self.steps = 0  # of this process, not of the run
        self.estimate_began = 0.0
        self.start_interval()

    def state(self):
        """What a checkpoint keeps."""
        return {'tally': self.meter.state(), 'losses': list(self.spikes.history), 'seconds': self.seconds()}

    def load(self, saved):
        """Continue from `saved`, a checkpoint that has the keys of state()."""
        self.meter.load(saved['tally'])
        self.skipped = int(saved['tally']['skipped'])
        self.spikes = SpikeDetector(saved['losses'])
        self.seconds_before = saved['seconds']

    def seconds(self) -> float:
        """Seconds of the run, evaluations and earlier processes included."""
        return self.seconds_before + time.monotonic() - self.began

    def time_now(self) -> float:
        """A clock that never goes back, read when the device has finished its work."""
        synchronize(self.device)
        return time.monotonic()

    def training_seconds(self) -> float:
        """Seconds of training in this process."""
        return self.time_now() - self.began - self.seconds_paused

    def start_interval(self):
        self.interval_began, self.interval_tokens = self.training_seconds(), 0

    @contextmanager
    def paused(self):
        """A context whose seconds do not count as training time."""
        began = self.time_now()  # or a GPU's unfinished steps would count as pause
        try:
            yield
        finally:
            self.seconds_paused += self.time_now() - began

    def add(self, loss, weight):
        """The loss of a micro-batch, and its weight in the loss of the step."""
        self.meter.add(loss, weight)

    def end_step(self, step: int, finite: torch.Tensor, tokens: int) -> None:
        """Count a step of `tokens` tokens; `finite`, a tensor, says whether it changed the weights."""
        self.meter.end_step(finite)
        self.log.bar.update()
        self.steps += 1
        self.interval_tokens += tokens
        if self.steps == 1 and self.compiled:
            self.log.print(f'compiled  in {format_duration(self.training_seconds())}')
            self.start_interval()
        self.estimate(step)

    def estimate(self, step):
        """After twelve steps, print how long the rest will take. The first two allocate and do not count."""
        if self.steps == 2:
            self.estimate_began = self.training_seconds()
        if self.steps == 12:
            self.log.print(f'time      about {format_duration(self.seconds_left(step))} for '
                           f'{counted(self.max_iters - step, "step")}, evaluations not counted')

    def seconds_left(self, step: int) -> float | None:
        """Seconds for the steps after `step`, evaluations not counted; None as long as that is unknown."""
        if self.steps < 12:
            return None
        return (self.max_iters - step) * (self.training_seconds() - self.estimate_began) / (self.steps - 2)

    def read(self, step: int, grad_norm: torch.Tensor) -> dict:
        """
        Print the line of a log step and its warnings. Returns the numbers of the steps since the last one.
        Every process must call it; it waits for the device.
        """
        loss, largest, skipped, self.skipped_in_a_row = self.meter.read()
        seconds = self.training_seconds() - self.interval_began
        # a coarse clock may stand still
        rate = self.interval_tokens / seconds if self.interval_tokens and seconds > 0 else None
        mfu = None
        if rate and self.peak_flops:
            mfu = rate * self.flops_per_token / (self.peak_flops * self.meter.world)
        self.log.step(step, loss, rate, mfu, self.seconds_left(step))
        if skipped > self.skipped:
            self.log.print(f'warning: {counted(skipped - self.skipped, "step")} skipped, because a gradient '
                           'was not finite')
        if loss is not None and self.spikes.is_spike(largest):
            self.log.print(f'warning: the loss jumped to {largest:.4f} since the last log line')
        self.skipped = skipped
        self.start_interval()
        return {'train_loss': loss, 'tokens_per_s': rate and round(rate, 1), 'mfu': mfu,
                'grad_norm': grad_norm.item(), 'skipped': skipped}


class StepMeter:
    """
    Losses and skipped steps, counted on the device so that no step waits for it.

    recent      (3,) of the finite steps since the last log line: sum of losses, number, largest loss
    skipped     (2,) steps that were skipped: in the run, and in a row up to now
    """

    def __init__(self, device):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.loss = torch.zeros((), device=device)
        self.recent, self.skipped = torch.zeros(3, device=device), torch.zeros(2, device=device)

    def add(self, loss, weight):
        self.loss += loss.detach() * weight

    def end_step(self, finite):
        good = torch.where(finite, torch.stack([self.loss, torch.ones_like(self.loss), self.loss]), 0.0)
        self.recent = torch.cat([self.recent[:2] + good[:2], torch.maximum(self.recent[2:], good[2:])])
        bad = 1 - good[1:2]
        self.skipped = torch.cat([self.skipped[:1] + bad, (self.skipped[1:] + 1) * bad])
        self.loss = torch.zeros_like(self.loss)

    def read(self):
        """
        (mean loss, largest loss, steps skipped in the run, steps skipped in a row) of all processes. The mean
        is None if every step since the last call was skipped. Clears the losses.
        """
        recent = self.gathered()
        mean = (recent[:, 0].mean() / recent[0, 1]).item() if recent[0, 1] else None
        self.recent = torch.zeros_like(self.recent)
        return mean, recent[:, 2].max().item(), *map(int, self.skipped.tolist())

    def gathered(self):
        """`recent` of all processes, (world,3)."""
        if self.world == 1:
            return self.recent.unsqueeze(0)
        recent = self.recent.new_empty(self.world, 3)
        dist.all_gather(list(recent), self.recent)
        return recent

    def state(self):
        return {'parts': self.gathered().tolist(), 'skipped': self.skipped[0].item()}

    def load(self, state):
        """With another number of processes than before, each one gets the mean of the parts."""
        parts = torch.tensor(state['parts'], device=self.recent.device)
        mean = torch.cat([parts[:, :2].mean(0), parts[:, 2].max().view(1)])
        self.recent = parts[self.rank] if len(parts) == self.world else mean
        self.skipped[0] = state['skipped']


class SpikeDetector:
    """Finds losses above the median of the last 20 by much more than those usually differ from it."""

    def __init__(self, history=()):
        self.history = deque(history, maxlen=20)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is a spike; if not, it joins the history."""
        if len(self.history) >= 5:
            median = statistics.median(self.history)
            deviation = statistics.median(abs(x - median) for x in self.history)
            if loss > median + max(0.1 * median, 8 * deviation):
                return True
        self.history.append(loss)
        return False
