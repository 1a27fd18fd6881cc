"""Console output that never ends a run, though a pipe breaks or the disk of a log is full."""
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
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # no file: a notebook has its own streams
            file = io.BufferedWriter(Unfailing(stream.fileno(), 'w', closefd=False))
            stream.flush()
            # a character that the encoding lacks is printed as its number
            setattr(sys, name, io.TextIOWrapper(
                file, stream.encoding, 'backslashreplace', line_buffering=stream.line_buffering,
                write_through=stream.write_through))
