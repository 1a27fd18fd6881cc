"""From text to batches: tokenizers, the writer and the loader of token files, and one folder per dataset."""
import os
import sys


def say_interrupted(kind, error, traceback):
    """sys.excepthook of the prepare.py scripts: Ctrl-C is answered by a sentence from the first import on."""
    if kind is KeyboardInterrupt:
        print('\ninterrupted: nothing has been prepared', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if os.path.basename(sys.argv[0]) == 'prepare.py':
    sys.excepthook = say_interrupted
