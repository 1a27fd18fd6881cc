"""
How a run ends before its last step: by a signal, or because another process failed. Exit codes of train.py:

    0        all steps are done
    1        refused with a message, or failed with a traceback; torchrun turns every other code into 1 too
    70       too many steps in a row were not finite; the newest checkpoint is from before them
    74       stopped by a signal, but the checkpoint could not be written
    75       stopped by a signal, and everything is saved: resume with --init_from=resume
    128 + n  signal number n came while an earlier one was being handled: nothing was saved
"""
import atexit
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from nanoblocks.formats import first_line

NOT_FINITE, NOT_SAVED, STOPPED = 70, 74, 75
SIGUSR1 = getattr(signal, 'SIGUSR1', None)  # Windows has none
SIGNALS = [number for number in (signal.SIGTERM, signal.SIGINT, SIGUSR1) if number]


class Stop(BaseException):
    """The run is to save and exit. Not an Exception, so that no `except Exception` on the way catches it."""


class Signals:
    """
    SIGTERM and SIGINT stop the run, SIGUSR1 asks for a checkpoint.

    One process: within `interruptible()` a signal raises Stop at once, even inside a long compilation.
    Outside, where the state of the run is changing, it waits for the next such section.

    Several processes must stop at the same place. Each `poll()` starts an asynchronous all-reduce of the
    pending requests and collects the previous one, so every process sees a request at the same poll, one poll
    late and without blocking. All have to call `poll()` equally often.
    """

    def __init__(self):
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.number = None              # of the signal that stops the run
        self.received_at = 0.0
        self.save_requested = False     # agreed on by all processes
        self.pending = [0, 0]           # requests that this process received: to stop, to save
        self.can_raise = False
        self.sections = 0               # interruptible sections begun; before the second, nothing can be lost
        self.group = dist.new_group(backend='gloo') if self.distributed else None
        self.message = self.exchange = None
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        """The signal handler: remember what is asked for, and raise Stop if nothing is changing."""
        if number == SIGUSR1:
            self.pending[1] = 1
            self.save_requested |= not self.distributed
        elif self.number is None:
            self.number, self.received_at = number, time.monotonic()
            self.pending[0] = 1
            if self.distributed and self.sections < 2:
                # the first step may be a long compilation, and there is nothing to save
                os._exit(STOPPED)
            if self.can_raise:
                raise Stop
        # torchrun forwards a signal that the terminal or the scheduler has already sent to every process
        elif not self.distributed or time.monotonic() > self.received_at + 5:
            os._exit(128 + number)

    @contextmanager
    def interruptible(self):
        """A section that a signal may interrupt, because nothing it has done needs to be saved."""
        self.sections += 1
        self.can_raise = not self.distributed
        if self.number is not None and self.can_raise:
            raise Stop
        yield
        self.can_raise = False

    def poll(self):
        """Exchange requests with the other processes; raises Stop if one of them was told to stop."""
        if not self.distributed:
            return
        if self.exchange is not None:
            self.exchange.wait()
            stop, save = self.message.tolist()
            self.save_requested |= bool(save)
            if stop:
                self.exchange = None
                raise Stop
        self.message = torch.tensor(self.pending)
        self.pending[1] -= int(self.message[1])
        self.exchange = dist.all_reduce(self.message, dist.ReduceOp.MAX, self.group, async_op=True)

    def close(self):
        """Restore the default handlers. Every process must call it."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.distributed:
            if self.exchange is not None:
                self.exchange.wait()
            # if one left now, torchrun would kill the one that is still writing
            dist.barrier(self.group)


class FailureWatch(threading.Thread):
    """
    Ends this process when another one has failed, and names that one; otherwise this process would wait in
    its next collective until the timeout. A process that fails leaves a note in the store through which the
    processes met.
    """

    def __init__(self, store, rank, world):
        super().__init__(daemon=True)
        # a connection of its own: the main thread's may be blocked in a wait
        self.store, self.rank, self.world = store.clone(), rank, world
        self.closed = threading.Event()
        self.print_exception = None
        atexit.register(self.at_exit)
        self.start()

    def catch_exceptions(self):
        """Call this after init_process_group, whose exception hook delays what an earlier hook prints."""
        self.print_exception, sys.excepthook = sys.excepthook, self.failed

    def failed(self, kind, error, trace):
        """Called with an exception that nobody caught: print it and leave the note."""
        self.print_exception(kind, error, trace)
        text = f'rank {self.rank} of {self.world} failed: {kind.__name__}: {first_line(error)}'
        print(text, file=sys.stderr)
        self.leave(text)

    def at_exit(self):
        if not self.closed.is_set():
            self.leave(f'rank {self.rank} of {self.world} exited early')

    def leave(self, text):
        """End this process and print the first note, because later ones are consequences of that failure."""
        try:
            first = self.store.compare_set('failed', '', text).decode()
        except RuntimeError:
            first = 'the process that hosts the store is gone'
        if first != text:
            print(f'rank {self.rank} leaves: {first}', file=sys.stderr)
        try:
            self.store.set(f'{self.rank} knows', '')
            if self.rank == 0:
                # the store may end with this process: let the others read the note first
                self.store.wait([f'{rank} knows' for rank in range(self.world)], timedelta(seconds=5))
        except RuntimeError:
            pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def run(self):
        """Look for a note every second; called in the thread."""
        unreachable = False
        while not self.closed.wait(5 if unreachable else 1):
            try:
                if self.store.check(['failed']):
                    self.leave('')
            except RuntimeError:
                # the first time, give the main thread time to report more, or to end normally
                if unreachable:
                    self.leave('')
                unreachable = True

    def close(self):
        """Stop watching, because this process ends normally."""
        self.closed.set()
