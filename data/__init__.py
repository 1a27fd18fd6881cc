"""From text to batches: tokenizers, the writer and the loader of token files, and one folder per dataset."""
import os
import sys

from . import console

if os.path.basename(sys.argv[0]) == 'prepare.py':
    # from the first import on
    console.never_fail()
    console.answer_ctrl_c('interrupted: nothing has been prepared')
