"""What every script does about its console: printing that never ends it, and a line in answer to Ctrl-C."""
import errno
import io
import os
import sys
from contextlib import suppress

LOST = (errno.EPIPE, errno.EIO)  # the reader of the pipe, or the terminal, is gone for good


class Unfailing(io.FileIO):
    """An open file descriptor. What cannot be written to it is dropped."""

    def write(self, data):
        try:
            written = super().write(data)
        except OSError as error:
            written = None
            if error.errno in LOST:
                # the processes that this one starts inherit the descriptor: they must not fail either
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return len(data) if written is None else written


def never_fail():
    """From now on, printing to stdout and stderr raises nothing, whoever prints, up to the end of Python."""
    with suppress(OSError):
        open_closed_ones()
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # no file: a notebook has its own streams
            file = io.BufferedWriter(Unfailing(stream.fileno(), 'w', closefd=False))
            stream.flush()
            # a character that the encoding lacks is printed as its number
            setattr(sys, name, io.TextIOWrapper(
                file, stream.encoding, 'backslashreplace', line_buffering=stream.line_buffering,
                write_through=stream.write_through))


def open_closed_ones():
    """
    Open what was closed at the start (`>&-`): Python has no stream then, and the next file that is opened
    would get the descriptor, and whatever is printed by a library or by another process.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'r' if name == 'stdin' else 'w', encoding='utf-8'))


def answer_ctrl_c(line='stopped by Ctrl-C'):
    """From now on, Ctrl-C ends Python with this line instead of a traceback."""
    others = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print(f'\n{line}', file=sys.stderr)
        else:
            others(kind, error, trace)
    sys.excepthook = hook
