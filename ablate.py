"""
What does one block contribute? Trains sweeps of arms over several seeds and reports paired differences.

    python ablate.py config/llama_small.py config/tiny.py --base=config/gpt2_small.py --seeds=3
    python ablate.py config/llama_small.py config/tiny.py --vary="norm=layernorm; ffn=gelu" --match=params
    python ablate.py config/llama_small.py config/tiny.py --vary="Mamba: layer_pattern=m+pos=none"
    python ablate.py config/llama_small.py config/study.py --vary=ffn=gelu --sizes="n_embd=64, n_embd=128"
    python ablate.py --report=out/ablate/llama_small

With --base, the sweep leads from that config to the first file given. Each flag in which the two differ is
tried in three places: alone on the base, removed from the first file, and on the ladder from the base to the
first file. All other files and flags hold for both.

With --vary, each value of each flag is an arm, compared with the files as they are. Flags that need each
other are joined by + and change together; an arm may be named in front of a colon.

With --sizes, the sweep is trained at each of several sizes, and the report shows how differences change with
them.

An arm is an ordinary run of train.py in a folder of its own, and takes train.py's settings and the model's
flags. Give the same command again to continue a sweep that was stopped. The body of this script is
nanoblocks/experiments/sweep.py, and for several sizes scaling.py beside it.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which `python -P` leaves out

from data import console

if __name__ == '__main__':
    # from the first line on: torch alone takes seconds to import
    console.never_fail()
    console.answer_ctrl_c('stopped by Ctrl-C; the same command continues the sweep')

from configurator import configure, errors_as_messages
from model import GPTConfig
from nanoblocks.commandline import refuse_words
from nanoblocks.experiments import scaling

# ----------------------------------------------------------------------------------------------------------
# Settings. train.py's settings and the model's flags may be given too, and hold for every arm.

base = ''                           # config file to start from; the first file given is the target
vary = ''                           # values to try: "flag=value,value; name: flag=value+flag=value"
arms = 'alone,removed,ladder'       # with --base, the places in which each flag is tried
seeds = 3                           # runs of each arm, with train.py's seed, the next one and so on
match = 'none'                      # resize the ffn to equal params, active (of one token) or flops
lr_sweep = 1                        # learning rates per arm, each twice the last; the best one counts
sizes = ''                          # repeat all at these: "n_layer=2+n_embd=64, n_layer=4+n_embd=128"
evals = 10                          # evaluations per run, for the curves; replaces eval_interval
jobs = 1                            # runs at the same time; on GPUs, spread over them
out_dir = ''                        # folder of the sweep; empty: out/ablate/<name of the first file>
results = ''                        # folder of the report; empty: the same as out_dir
report = ''                         # folder of a trained sweep: only write its report again

if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv:
        configure(globals(), GPTConfig, ['--help'])
    refuse_words(sys.argv[1:], ('report', 'dataset', 'vary', 'sizes'))
    with errors_as_messages():
        scaling.main(sys.argv[1:])
