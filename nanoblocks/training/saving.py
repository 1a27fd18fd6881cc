"""When a run saves, and how: from a copy, in a thread, so that training waits for no disk."""
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from nanoblocks.training import checkpoint, parallel


class Saver:
    """
    Writes the checkpoints of a run. It copies the state, and a thread brings the copy to the disk while
    training goes on. Every process makes the same calls; the main one writes, or each its shards.

    folder      the RunFolder
    log         the Logbook, whose lines must be on the disk before a checkpoint of their steps
    settings    of train.py
    best_loss   the validation loss of best.pt, as it is on the disk
    """
    waits = (1, 2, 4)  # seconds before each further attempt to write the last checkpoint

    def __init__(self, folder, log, settings, best_loss=math.inf):
        self.folder, self.log, self.best_loss = folder, log, best_loss
        self.interval, self.minutes = settings['save_interval'], settings['save_minutes']
        self.always, self.max_iters = settings['always_save_checkpoint'], settings['max_iters']
        self.is_main = parallel.ranks()[0] == 0
        # collectives of the thread must not meet those of training
        self.group = dist.new_group(backend='gloo') if settings['shard'] else None
        self.writes = self.is_main or self.group is not None
        self.thread = ThreadPoolExecutor(1) if settings['save_thread'] else None
        self.running = {}       # {path: (step, whether to say that it is saved, what the thread makes)}
        self.unsaved = set()    # paths that could not be written: of the newest, and of the last best.pt
        self.began = time.monotonic()

    def with_evaluation(self, step, improved):
        """Whether a checkpoint is written with the evaluation of a step."""
        if self.interval is None and self.minutes is None:
            return improved or self.always
        return step == self.max_iters

    def due(self, step):
        """Whether the interval between two checkpoints ends with this step; of the last one, see above."""
        return self.interval is not None and step % self.interval == 0 and step < self.max_iters

    def late(self):
        """Whether it is time for a checkpoint by the clock of the main process; True once for each."""
        now = time.monotonic()
        if not self.is_main or self.minutes is None or now < self.began + 60 * self.minutes:
            return False
        self.began = now
        return True

    def save(self, states: dict, last: bool = False, say: bool = False) -> bool:
        """
        Write the checkpoints of one step, {path: state}, in this order; what they share is copied once. With
        `last` that ends within this call, and is tried again if it fails; else it is done in the thread, and
        `collect` tells how it went. False if it is known to have failed. `say`: tell of each that is saved.
        """
        if last or not self.thread:
            self.collect(wait=True)
            return all([self.write_now(path, state, last, say) for path, state in states.items()])
        if states.keys() & self.running.keys():     # no more than one copy of each in memory
            self.collect(wait=True)
        # all that training waits for comes before the first write, which would slow it down
        refused = self.flush_log()
        if self.writes:
            states = checkpoint.copied(states)
        for path, state in states.items():
            shards, job = self.new_shards(path, state), None
            if self.writes:
                job = self.thread.submit(self.write, path, state, shards, refused)
            self.running[path] = state['step'], say, job
        return True

    def write_now(self, path, state, last, say):
        for wait in (*self.waits, None) if last else (None,):
            refused, shards = self.flush_log(), self.new_shards(path, state)
            error = self.write(path, state, shards, refused) if self.writes else None
            error, self.best_loss = parallel.from_main((error, self.best_loss))
            then = (f'will be tried again in {wait} s' if wait else 'was tried for the last time' if last
                    else None)
            self.tell(path, state['step'], error, say, then)
            if error is None:
                break
            time.sleep(wait or 0)
        self.note(path, error, last)
        return error is None

    def collect(self, wait: bool = False) -> None:
        """Tell how the writes went that have ended, or with `wait` all. Every process must call it."""
        if not self.running:
            return
        ended = {path: job.result() for path, (_, _, job) in self.running.items()
                 if self.is_main and (wait or job.done())}
        ended, self.best_loss = parallel.from_main((ended, self.best_loss))
        for path, error in ended.items():
            step, say, job = self.running.pop(path)
            if job:
                job.result()
            self.tell(path, step, error, say)
            self.note(path, error)

    def note(self, path, error, last=False):
        """Remember what is not saved. A best.pt that failed in between is made up for by a better one."""
        self.unsaved.discard(path)
        if error is not None and (last or path == self.folder.newest):
            self.unsaved.add(path)

    def tell(self, path, step, error, say, then=None):
        if error is not None:
            self.log.print(f'warning: {path} could not be written ({error}): the old file is kept; '
                           + (then or 'training continues, and will try again'))
        elif say:
            self.log.print(f'step {step}: saved')

    def flush_log(self):
        """Bring the lines of the log to the disk; the error that prevents it, or None."""
        try:
            self.log.flush(to_disk=True)
        except OSError as error:
            return error

    def new_shards(self, path, state):
        """The folder for the shards of a checkpoint, the same in every process; None if there are none."""
        if self.group is None:
            return None
        name = os.path.basename(path).removesuffix('.pt')
        return parallel.from_main(self.folder.free_name(f'{name}.{state["step"]}.shards'))

    def write(self, path, state, shards, refused):
        """
        Write a checkpoint; in the thread, if there is one. Returns why that failed, in words, or None.
        shards: the folder for them; refused: an error that keeps the main process from writing its file.
        """
        try:
            if shards:
                from nanoblocks.training.shards import write
                state = write(shards, state, self.group)
            if self.is_main:
                if refused:
                    raise refused
                if path == self.folder.newest:
                    # best.pt of the same step was written just before, or not
                    state = state | {'best_val_loss': self.best_loss}
                self.folder.write(path, state)
                if path == self.folder.best:
                    self.best_loss = state['best_val_loss']
        except OSError as error:
            return error.strerror
