"""Memory and time of training on a long text that lies on several processes: the topic `ring` of bench.py."""
import os
import statistics
import tempfile

import torch.distributed.run

from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.runs import read_lines, run_script
from nanoblocks.experiments.topics import each, in_short, sizes
from nanoblocks.files import ROOT

STEPS = 4
SIZE = ['config/llama_small.py', 'config/tiny.py']


def ring(argv, tokens, device):
    """Memory and time of a step on one long text, by one process and by 2 and 4 (context_parallel)."""
    files, flags = files_and_flags(argv, without=('device', 'tokens'))
    lengths = sizes('tokens', tokens, 4096, 16384)
    jobs = [(T, n) for T in lengths for n in (1, 2, 4)]
    for T, n in each(jobs, lambda job: f'{in_short(job[0])} tokens, {job[1]} processes'):
        memory, seconds = measured(T, n, [*SIZE, *files, f'--device={device}', *flags])
        # at once, as one of them takes minutes
        print(f'{in_short(T)} tokens, {n} processes: {memory:.2f} GB of a process, {seconds:.2f} s a step',
              flush=True)


def measured(T, n, words):
    """(peak memory of the first process in GB, seconds of a step) of a run of a few steps"""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, f'--block_size={T}', '--batch_size=1', '--gradient_accumulation_steps=1',
                 f'--max_iters={STEPS}', '--log_interval=1', f'--eval_interval={STEPS}', f'--eval_tokens={T}',
                 '--compile=False', f'--out_dir={folder}/run', '--always_save_checkpoint=False']
        if n > 1:
            torchrun = [torch.distributed.run.__file__, '--standalone', f'--nproc_per_node={n}']
            run_script(*torchrun, ROOT / 'train.py', *words, '--context_parallel=True')
        else:
            run_script('train.py', *words)
        lines = [line for line in read_lines(os.path.join(folder, 'run', 'metrics.jsonl'))
                 if 'tokens_per_s' in line]
    return lines[-1]['memory_gb'], T / statistics.median(line['tokens_per_s'] for line in lines[1:])
