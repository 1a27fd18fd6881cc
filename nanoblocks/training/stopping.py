"""
How a run ends before its last step: by a signal, by another process that failed, by numbers that went wrong.

Exit codes of train.py:

    0        all steps are done
    1        refused in a sentence, or failed with a traceback; also what torchrun makes of any other code
    70       too many steps in a row were not finite; the newest checkpoint is from before
    74       stopped by a signal, but the checkpoint could not be written
    75       stopped by a signal, and all is saved: the same run goes on with --init_from=resume
    128 + n  a second signal, number n, came: nothing was saved
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
    """Raised in the loop when the run is to stop; no Exception, so nobody in between takes it for one."""


class Signals:
    """
    SIGTERM and SIGINT stop the run, SIGUSR1 asks for a checkpoint.

    In a single process Stop is raised at once, wherever the loop is, be it in the middle of a compilation;
    only what must not be torn is done within `held()`. Several processes have to stop at the same place: each
    call of `poll()`, which all make equally often, sends what this process was asked, and raises Stop in all
    when the call before told of one. It is a few bytes between CPUs, and nobody waits for it on the way.
    """

    def __init__(self):
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        self.number = None              # of the signal that stops the run
        self.save = False               # whether all have agreed on a checkpoint
        self.asked = [0, 0]             # what this process was asked: to stop, to save
        # until open() nothing can be stopped
        self.holding, self.progress = True, False
        self.group = dist.new_group(backend='gloo') if self.several else None
        self.message = self.sent = None
        self.at = 0.0
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if number == SIGUSR1:
            self.ask_for_save()
        elif self.number is None:
            self.number, self.at = number, time.monotonic()
            self.asked[0] = 1
            if self.several and not self.progress:
                # nothing is lost, and the first step may be a long compilation
                os._exit(STOPPED)
            if not self.several and not self.holding:
                raise Stop
        # torchrun passes on what the terminal or the scheduler has sent to all already
        elif not self.several or time.monotonic() > self.at + 5:
            os._exit(128 + number)

    def ask_for_save(self):
        self.asked[1] = 1
        self.save |= not self.several

    def open(self):
        """From here on Stop may be raised."""
        self.holding = False
        if self.number is not None and not self.several:
            raise Stop

    @contextmanager
    def held(self):
        """What is done within it is done whole."""
        self.holding = True
        yield
        self.progress = True
        self.open()

    def poll(self):
        if not self.several:
            return
        if self.sent is not None:
            self.sent.wait()
            stop, save = self.message.tolist()
            self.save |= bool(save)
            if stop:
                self.sent = None
                raise Stop
        self.message = torch.tensor(self.asked)
        self.asked[1] -= int(self.message[1])
        self.sent = dist.all_reduce(self.message, dist.ReduceOp.MAX, self.group, async_op=True)

    def close(self):
        """From here on a signal is not waited for; all have to come."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.several:
            if self.sent is not None:
                self.sent.wait()
            # whoever left early would be missed, and torchrun would end the one that is still writing
            dist.barrier(self.group)


class Watch(threading.Thread):
    """
    Ends this process when another one has failed, and says which: otherwise it would wait for it in the next
    exchange until that times out. Who fails leaves a note in the store that brought the processes together.
    """

    def __init__(self, store, rank, world):
        super().__init__(daemon=True)
        # a connection of its own: the other one may be busy waiting
        self.store, self.rank, self.world = store.clone(), rank, world
        self.over = threading.Event()
        self.hook = None
        atexit.register(self.left)
        self.start()

    def catch(self):
        """Called when torch has set its own hook for exceptions, which holds back what is printed in it."""
        self.hook, sys.excepthook = sys.excepthook, self.failed

    def failed(self, kind, error, trace):
        """What is done with an exception that nobody caught, and the note."""
        self.hook(kind, error, trace)
        text = f'rank {self.rank} of {self.world} failed: {kind.__name__}: {first_line(error)}'
        print(text, file=sys.stderr)
        self.leave(text)

    def left(self):
        if not self.over.is_set():
            self.leave(f'rank {self.rank} of {self.world} left early')

    def leave(self, text):
        """End this process, saying who began. Only the first note stays, later ones are consequences."""
        try:
            first = self.store.compare_set('failed', '', text).decode()
        except RuntimeError:
            first = 'the process that brought them together is gone'
        if first != text:
            print(f'rank {self.rank} leaves: {first}', file=sys.stderr)
        try:
            self.store.set(f'{self.rank} knows', '')
            if self.rank == 0:
                # the store may end with this process: let the others read it
                self.store.wait([f'{rank} knows' for rank in range(self.world)], timedelta(seconds=5))
        except RuntimeError:
            pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def run(self):
        lost = False
        while not self.over.wait(5 if lost else 1):
            try:
                if self.store.check(['failed']):
                    self.leave('')
            except RuntimeError:
                # at first the main thread may know more, or be about to end in peace
                if lost:
                    self.leave('')
                lost = True

    def close(self):
        self.over.set()


# ----------------------------------------------------------------------------------------------------------
# Numbers that went wrong


def first_not_finite(model, losses):
    """
    The name of the first tensor of a step that is not finite: a weight, what a module computes, the loss or a
    gradient, in the order in which they are made. `losses` yields those of the step, computing each when it
    is asked for. None if all are finite.
    """
    def bad(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all())

    for kind, named in (('weight', model.named_parameters()), ('buffer', model.named_buffers())):
        for name, tensor in named:
            if bad(tensor.detach()):
                return f'the {kind} {name}'
    found, hooks = [], []
    for name, module in model.named_modules():
        def after(module, args, output, name=name):
            if any(map(bad, output if isinstance(output, tuple) else (output,))):
                found.append(f'the output of {name or "the model"}')
        hooks.append(module.register_forward_hook(after))
    for name, p in model.named_parameters():
        def made(p, name=name):
            if bad(p.grad):
                found.append(f'the gradient of {name}')
        hooks.append(p.register_post_accumulate_grad_hook(made))
    with torch.compiler.set_stance('force_eager'):
        for loss in losses:
            if bad(loss):
                found.append('the loss')
            loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return found[0] if found else None
