"""
How a run ends before its last step: by a signal, for want of memory, or because another process failed.
train.py imports this first, so nothing here may import torch, which takes seconds. Exit codes of train.py:

    0        all steps are done
    1        refused with a message, or failed with a traceback; torchrun turns every other code into 1 too
    70       too many steps in a row were not finite; the newest checkpoint is from before them
    74       the last checkpoint could not be written, after a signal or after the last step
    75       stopped by a signal, and everything is saved: resume with --init_from=resume
    128 + n  signal number n came while an earlier one was being handled: nothing was saved
"""
import atexit
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

from nanoblocks.formats import first_line

NOT_FINITE, NOT_SAVED, STOPPED = 70, 74, 75
# Windows has neither SIGUSR1 nor SIGHUP
SIGUSR1, SIGHUP = getattr(signal, 'SIGUSR1', None), getattr(signal, 'SIGHUP', None)
SIGNALS = [number for number in (signal.SIGTERM, signal.SIGINT, SIGHUP, SIGUSR1) if number]
IMPORTING, STARTING, RUNNING, CLOSING = range(4)


class Stop(BaseException):
    """The run is to save and exit. Not an Exception, so that no `except Exception` on the way catches it."""


class Signals:
    """
    SIGTERM, SIGINT and SIGHUP stop the run, SIGUSR1 asks for a checkpoint. This holds from the first line of
    train.py to the end of Python:

        importing   leave at once: nothing is lost, and the same command starts the run again
        starting    the same by SystemExit, which ends a preparation of the data too; from `imported()` on
        running     save and leave, or save; from `open()` on
        closing     leave at once with the exit code of the run, for all is saved; from `close()` on

    One process: within `interruptible()` a signal raises Stop at once, even inside a long compilation.
    Outside, where the state of the run is changing, it waits for the next such section.

    Several processes must stop at the same place. Each `poll()` starts an asynchronous all-reduce of the
    pending requests and collects the previous one, so every process sees a request at the same poll, one poll
    late and without blocking. All have to call `poll()` equally often.
    """

    def __init__(self):
        self.distributed = os.environ.get('WORLD_SIZE', '1') != '1'
        self.phase = IMPORTING
        self.number = None              # of the signal that stops the run
        self.received_at = 0.0
        self.save_requested = False     # agreed on by all processes
        self.pending = [0, 0]           # requests that this process received: to stop, to save
        self.can_raise = False
        self.steps = 0                  # of training that were begun; before the second, nothing can be lost
        self.exit_code = 0              # of a run that is closing
        self.group = self.message = self.exchange = None
        for number in SIGNALS:
            # nohup starts a process that ignores SIGHUP: then it is to survive the end of its terminal
            if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)
        # the first one registered is the last one called: Python then takes the handlers away
        atexit.register(ignore_signals)

    def imported(self):
        """From here on, an exception may be raised anywhere."""
        self.phase = STARTING

    def open(self):
        """The loop begins. Every process must call it."""
        import torch.distributed as dist
        if self.distributed:
            self.group = dist.new_group(backend='gloo')
        self.phase = RUNNING

    def handle(self, number, frame):
        """The signal handler: remember what is asked for, and raise Stop if nothing is changing."""
        if number == SIGUSR1:
            if self.phase == RUNNING:
                self.request_save()
        elif self.phase == CLOSING:
            leave(self.exit_code)
        elif self.number is None:
            self.number, self.received_at = number, time.monotonic()
            self.pending[0] = 1
            if self.phase < RUNNING:
                self.stop_starting()
            if self.distributed and self.steps < 2:
                # the first step may be a long compilation, and there is nothing to save
                leave(STOPPED)
            if self.can_raise:
                raise Stop
        # torchrun forwards a signal that the terminal or the scheduler has already sent to every process, and
        # a terminal that closes sends SIGHUP twice, once itself and once by its shell
        elif number != SIGHUP and (not self.distributed or time.monotonic() > self.received_at + 5):
            os._exit(128 + number)

    def request_save(self):
        """Ask all processes for a checkpoint; one of them is enough to ask."""
        self.pending[1] = 1
        self.save_requested |= not self.distributed

    def stop_starting(self):
        with suppress(OSError):
            os.write(1, f'stopped by signal {self.number} before the first step\n'.encode())
        if self.phase == IMPORTING or self.distributed:
            leave(STOPPED)
        raise SystemExit(STOPPED)

    @contextmanager
    def interruptible(self, trains=False):
        """A section that a signal may interrupt, because nothing it has done needs to be saved."""
        self.steps += trains
        self.can_raise = not self.distributed
        if self.number is not None and self.can_raise:
            raise Stop
        yield
        self.can_raise = False

    def poll(self):
        """Exchange requests with the other processes; raises Stop if one of them was told to stop."""
        if not self.distributed:
            return
        import torch
        import torch.distributed as dist
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

    def close(self, exit_code):
        """Everything is saved: from here on, a signal leaves at once. Every process must call it."""
        if self.distributed:
            if self.exchange is not None:
                self.exchange.wait()
            # if one left now, torchrun would kill the one that is still writing
            import torch.distributed as dist
            dist.barrier(self.group)
        self.exit_code, self.phase = exit_code, CLOSING


def leave(exit_code):
    """End this process at once, from within a signal handler."""
    with suppress(Exception):  # the signal may have come in the middle of a print
        sys.stdout.flush()
    os._exit(exit_code)


def ignore_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def answer_out_of_memory(remedy):
    """From now on, an allocation that fails ends Python with a sentence instead of a traceback."""
    others = sys.excepthook

    def hook(kind, error, trace):
        from nanoblocks.training.checkpoint import out_of_memory
        if out_of_memory(error):
            print(f'out of memory ({first_line(error)}): {remedy}', file=sys.stderr)
        else:
            others(kind, error, trace)
    sys.excepthook = hook


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
        self.store.add(f'{rank} lives', 1)
        self.start()

    def catch_exceptions(self):
        """Call this after init_process_group, whose exception hook delays what an earlier hook prints."""
        self.print_exception, sys.excepthook = sys.excepthook, self.failed

    def failed(self, kind, error, trace):
        """Called with an exception that nobody caught: print it and leave the note."""
        self.print_exception(kind, error, trace)
        text = f'rank {self.rank} of {self.world} failed: {kind.__name__}: {first_line(error)}'
        silent = self.silent_ranks() if 'onnection' in str(error) else []
        if silent:  # the error is a consequence
            text = (f'rank {", ".join(map(str, silent))} of {self.world} no longer answers: it was killed, '
                    'for instance for want of memory')
        print(text, file=sys.stderr)
        self.leave(text)

    def silent_ranks(self):
        """The ranks whose watch has stopped: their processes have ended without a note."""
        names = [f'{rank} lives' for rank in range(self.world)]
        try:
            before = self.store.multi_get(names)
            time.sleep(2.5)
            after = self.store.multi_get(names)
        except RuntimeError:
            return [0]  # it hosts the store, or the machine of it is gone
        return [rank for rank in range(self.world) if before[rank] == after[rank]]

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
                self.store.wait([f'{rank} knows' for rank in range(self.world)],
                                timedelta(seconds=5))
        except RuntimeError:
            pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def run(self):
        """Look for a note every second, and leave a sign of life; called in the thread."""
        unreachable = False
        while not self.closed.wait(5 if unreachable else 1):
            try:
                self.store.add(f'{self.rank} lives', 1)
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
