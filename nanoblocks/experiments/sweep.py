"""
A sweep: plan the arms, train each on several seeds by train.py, check that every compared pair differs in its
flags alone, measure how fast each generates, and write the report. The body of ablate.py.
"""
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from configurator import settings_of
from nanoblocks.experiments import figures, report
from nanoblocks.experiments.arms import (
    MODEL,
    NOT_IDENTIFYING,
    arms_between,
    arms_of_vary,
    config_of,
    files_and_flags,
    read_flags,
    value_of,
)
from nanoblocks.experiments.budget import MATCHES, WIDTHS, match_budgets
from nanoblocks.experiments.runs import check_pair, check_run, progress, read_lines
from nanoblocks.experiments.timing import interleaved
from nanoblocks.experiments.topics import tell
from nanoblocks.files import ROOT
from nanoblocks.formats import counted, format_duration
from nanoblocks.hardware import synchronized_time
from nanoblocks.training import checkpoint
from nanoblocks.training.run_folder import RunFolder
from nanoblocks.training.settings import check_documents, check_objective

try:
    import fcntl
except ImportError:  # Windows has none; there, do not start the same sweep twice
    fcntl = None

RATES = ('learning_rate', 'muon_lr', 'min_lr')
PLACES = ('alone', 'removed', 'ladder')

# ----------------------------------------------------------------------------------------------------------
# The plan


def make_plan(argv):
    """Everything a sweep will do, as plain values that are written to sweep.json."""
    flags, own, given = read_flags(argv)
    files, options = files_and_flags(argv)
    check_settings(files, own, flags)
    name = Path(files[0]).stem
    # a config file names the folder of its single run, which is not the sweep's
    folder = own['out_dir'] if given.get('out_dir', '').startswith('--') else f'out/ablate/{name}'
    shared = shared_settings(flags, own['evals'])
    if own['base']:
        start, reference = read_flags([own['base'], *files[1:], *options])[0] | shared, Path(own['base']).stem
        start |= {key: flags[key] for key in NOT_IDENTIFYING if key in flags}
        places = own['arms'].split(',')
        arms, comparisons, ladder = arms_between(start, flags | shared, reference, name, places)
    else:
        reference, ladder = name, []
        arms, comparisons = arms_of_vary(flags | shared, name, own['vary'])
    for arm, arm_flags in arms.items():
        try:
            check_objective(arm_flags, config_of(arm_flags))
        except ValueError as error:
            raise ValueError(f'{arm}: {error}; all arms of a sweep are trained for one objective') from None
        try:
            check_documents(arm_flags, config_of(arm_flags))
        except ValueError as error:
            raise ValueError(f'{arm}: {error}') from None
    notes = {}
    if own['match'] != 'none':
        arms, notes = match_budgets(arms, reference, own['match'])
    first, half = flags['seed'], (own['lr_sweep'] - 1) / 2
    return {'name': name, 'folder': folder, 'results': own['results'] or folder, 'reference': reference,
            'command': shlex.join(['python', 'ablate.py', *argv]), 'machine': machine(), 'jobs': own['jobs'],
            'match': own['match'], 'notes': notes, 'seeds': list(range(first, first + own['seeds'])),
            'rates': [2.0 ** (i - half) for i in range(own['lr_sweep'])],
            'arms': arms, 'comparisons': comparisons, 'ladder': ladder}


def check_settings(files, own, flags):
    """Refuse a command line that describes no sweep."""
    if not files:
        raise ValueError('the first argument must be a config file, or --report=FOLDER: see --help')
    if bool(own['base']) == bool(own['vary']):
        raise ValueError('either --base (the config to start from) or --vary (flags and their values) must '
                         'be given, and not both')
    if flags['init_from'] != 'scratch':
        raise ValueError(f'init_from={flags["init_from"]} must be scratch: every arm is drawn from its seeds')
    if flags['group_lr'] and own['lr_sweep'] > 1:
        raise ValueError(f'lr_sweep={own["lr_sweep"]} must be 1 with group_lr, whose rates it does not scale')
    if own['match'] not in MATCHES:
        raise ValueError(f'match={own["match"]} must be one of {", ".join(MATCHES)}')
    if set(own['arms'].split(',')) - set(PLACES):
        raise ValueError(f'arms={own["arms"]} must be some of {",".join(PLACES)}')
    for name in ('seeds', 'lr_sweep', 'evals', 'jobs'):
        if own[name] < 1:
            raise ValueError(f'{name}={own[name]} must be at least 1')


def shared_settings(flags, evals):
    """Settings of every run that follow from the others."""
    # evaluations are spread evenly, and the last is at the end
    shared = {'eval_interval': max(1, -(-flags['max_iters'] // evals))}
    if flags['batch_tokens'] is not None:  # train.py computes and records it like this
        row = flags['batch_size'] * config_of(flags).block_size
        shared['gradient_accumulation_steps'] = flags['batch_tokens'] // row
    return shared


def machine():
    """The hardware and the version of torch, in one line."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
        cpu = names[0] if names else cpu
    cards = torch.cuda.device_count()
    card = f'{cards} x {torch.cuda.get_device_name()}, ' if cards else ''
    return f'{card}{os.cpu_count()} cores ({cpu}), torch {torch.__version__}'


def runs_on(device):
    """Words of ablate.py: the device, and how many runs at once: one of study size leaves a GPU idle."""
    cores = os.cpu_count() or 1
    jobs = min(8 * torch.cuda.device_count(), cores) if device.startswith('cuda') else min(2, cores)
    return f'--device={device}', f'--jobs={jobs}'


def runs_of(plan):
    """Every run of a plan, seeds outermost: a sweep cut short has compared all arms on some seeds."""
    runs = []
    for seed in plan['seeds']:
        for arm, flags in plan['arms'].items():
            for rate in plan['rates']:
                path = os.path.join(arm, f'seed{seed}' + (f'_lr{rate:g}' if len(plan['rates']) > 1 else ''))
                scaled = {name: flags[name] * rate for name in RATES if flags[name] is not None}
                runs.append({'arm': arm, 'seed': seed, 'rate': rate, 'path': path,
                             'flags': flags | scaled | {'seed': seed}})
    return runs


def guard(plan, folder):
    """Check that every run that has begun is the planned one, and every compared pair differs as named."""
    for run in runs_of(plan):
        if (Path(folder) / run['path'] / 'config.json').exists():
            check_run(Path(folder) / run['path'], run['flags'])
    free = WIDTHS * (plan['match'] != 'none') + RATES * (len(plan['rates']) > 1)
    paths = {(run['arm'], run['rate'], run['seed']): Path(folder) / run['path'] for run in runs_of(plan)}
    for pair in plan['comparisons']:
        for rate in plan['rates']:
            for seed in plan['seeds']:
                first, second = (paths[pair[side], rate, seed] for side in ('without', 'with'))
                if (first / 'config.json').exists() and (second / 'config.json').exists():
                    check_pair(first, second, pair['names'], free)


# ----------------------------------------------------------------------------------------------------------
# Training


def command_of(run, folder):
    """The command line that starts or resumes a run."""
    out = os.path.join(folder, run['path'])
    start = [sys.executable, str(ROOT / 'train.py'), f'--out_dir={out}']
    if RunFolder(out).resumable():
        return [*start, '--init_from=resume']
    known = settings_of(ROOT / 'train.py') | MODEL
    flags = run['flags'] | {'wandb_run_name': run['path'].replace(os.sep, ' '), 'overwrite': True}
    return start + [f'--{name}={value}' for name, value in flags.items()
                    if value != known[name].default and name != 'out_dir']


def environment(plan, slot):
    """Environment variables of a run: the sweep's group in W&B, and the run's share of the machine."""
    env = os.environ | {'WANDB_RUN_GROUP': os.path.basename(os.path.normpath(plan['folder']))}
    if torch.cuda.is_available():
        cards = env.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count())))
        env['CUDA_VISIBLE_DEVICES'] = cards.split(',')[slot % len(cards.split(','))]
    elif plan['jobs'] > 1:
        env['OMP_NUM_THREADS'] = str(threads(plan))
    return env


def threads(plan):
    """CPU threads of each run, when several are trained at once."""
    return int(os.environ.get('OMP_NUM_THREADS') or max(1, (os.cpu_count() or 1) // plan['jobs']))


def start_run(plan, run, slot, lock):
    """
    Start or resume a run as a process that writes to log.txt in its folder. slot: its number among the jobs.
    """
    out = os.path.join(plan['folder'], run['path'])
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, 'log.txt'), 'a') as log:
        return subprocess.Popen(command_of(run, plan['folder']), stdout=log, stderr=log,
                                stdin=subprocess.DEVNULL, env=environment(plan, slot),
                                pass_fds=() if lock is None else (lock,),
                                # or Ctrl-C would reach it twice, and a second signal ends it unsaved
                                start_new_session=True)


def train_all(plan, lock=None):
    """Train every run that is not finished, `jobs` at a time -> [a sentence for each that failed]"""
    runs, folder, began = runs_of(plan), Path(plan['folder']), time.monotonic()
    todo = deque(run for run in runs if progress(folder / run['path'])[0] < run['flags']['max_iters'])
    total, ended, failed, running = len(todo), 0, [], {}
    print(f'{counted(len(plan["arms"]), "arm")}, {counted(len(plan["seeds"]), "seed")}, '
          f'{counted(len(plan["rates"]), "learning rate")}: {counted(len(runs), "run")}, '
          f'{len(runs) - total} of them finished', flush=True)
    try:
        while todo or running:
            while todo and len(running) < plan['jobs']:
                run, slot = todo.popleft(), min(set(range(plan['jobs'])) - {r[1] for r in running.values()})
                process = start_run(plan, run, slot, lock)
                running[process.pid] = run, slot, process
                tell(f'[{ended + len(running)}/{total}] {run["path"]} begins')
            run, _, process = running.pop(wait_for_one(running, folder))
            ended += 1
            step, loss = progress(folder / run['path'])
            failure = close_run(plan, run, process.returncode)
            left = (time.monotonic() - began) / ended * (total - ended)
            print(f'[{ended}/{total}] ' + (failure or f'{run["path"]}: val loss {loss:.4f}, about '
                                           f'{format_duration(left)} left'), flush=True)
            failed += [failure] if failure else []
            if failure and ended == 1 and step == 0:
                raise ValueError(f'the first run failed early, as the others would: {failure}')
    finally:
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()  # until it has saved
    return failed


def wait_for_one(running, folder, every=15.0):
    """The pid of the first of the running processes to end; every few seconds, says how far they all are."""
    told = time.monotonic()
    while True:
        for pid, (_, _, process) in running.items():
            if process.poll() is not None:
                return pid
        time.sleep(0.1)
        if time.monotonic() - told > every:
            told = time.monotonic()
            for run, _, _ in running.values():
                tell(f'{run["path"]}: step {last_step(folder / run["path"])} of {run["flags"]["max_iters"]}')


def last_step(folder):
    """The step of the last line of a run's metrics."""
    path = folder / 'metrics.jsonl'
    lines = read_lines(path) if path.exists() else []
    return lines[-1]['step'] if lines else 0


def close_run(plan, run, code):
    """None when a run reached its last step, else how it failed, in one sentence."""
    out, steps = Path(plan['folder']) / run['path'], run['flags']['max_iters']
    step = progress(out)[0]
    if code == 0 and step == steps:
        check_run(out, run['flags'])  # now, before others are trained in vain
        return None
    lines = (out / 'log.txt').read_text().strip().splitlines() or ['']
    return f'{run["path"]} ended at step {step} of {steps} with exit code {code}: {lines[-1]}'


# ----------------------------------------------------------------------------------------------------------
# Generating


def measure_decoding(plan, folder, rounds=5, prompt=16, new_tokens=48):
    """{arm: {'decode': tokens per second at batch size 1}}: of the first seed's checkpoints."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and plan['jobs'] > 1:
        torch.set_num_threads(threads(plan))  # the number that each run had
    paths = {}
    for run in runs_of(plan):
        path = Path(folder) / run['path'] / 'ckpt.pt'
        if path.exists() and value_of(run['flags'], 'causal'):
            paths.setdefault(run['arm'], path)

    def tokens_per_s(path):
        # one model in memory at a time
        model = checkpoint.build(checkpoint.load(path), str(path)).to(device)
        length = max(1, min(prompt, model.config.block_size // 4))
        new = min(new_tokens, model.config.block_size - length)
        idx = torch.zeros(1, length, dtype=torch.int64, device=device)
        given = {'temperature': 0} | ({'source': idx} if model.encoder is not None else {})
        model.generate(idx, min(4, new), **given)  # the first tokens allocate
        began = synchronized_time(device)
        model.generate(idx, new, **given)
        return new / (synchronized_time(device) - began)
    rates = interleaved({arm: lambda path=path: tokens_per_s(path) for arm, path in paths.items()}, rounds, 0)
    return {arm: {'decode': statistics.median(found)} for arm, found in rates.items()}


# ----------------------------------------------------------------------------------------------------------


def lock_folder(folder):
    """
    Lock a sweep's folder; its runs inherit the lock. ValueError when it is taken by another sweep, or by a
    run that outlived its sweep: both would write the same files.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f'out_dir={folder} must be a folder that can be made ({error.strerror}): choose '
                         'another') from None
    if fcntl is None:
        return None
    lock = os.open(os.path.join(folder, 'lock'), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f'{folder} must not be used by two sweeps at once: another sweep, or a run of one '
                         'that was killed, still writes there; wait for it, end it, or choose another '
                         '--out_dir') from None
    return lock


def check_same_sweep(old, new):
    """ValueError when a folder holds a sweep whose arms have the same names and other flags."""
    for arm in old['arms'].keys() & new['arms'].keys():
        before = {name: flag.default for name, flag in MODEL.items()} | old['arms'][arm]
        differ = [name for name, value in new['arms'][arm].items()
                  if name not in NOT_IDENTIFYING and before.get(name) != value]
        if differ:
            raise ValueError(f'{new["folder"]} holds a sweep in which {arm} has other values of '
                             f'{", ".join(differ)}: choose another --out_dir, or remove that folder')


def sweep(argv):
    """Train what is missing of the sweep that a command line of ablate.py describes, and write its report."""
    plan = make_plan(argv)
    folder = Path(plan['folder'])
    for arm, note in plan['notes'].items():
        print(f'match={plan["match"]}: {arm}: {note}')
    lock = lock_folder(folder)
    if (folder / 'sweep.json').exists():
        check_same_sweep(report.read_plan(folder), plan)
    guard(plan, folder)
    (folder / 'sweep.json').write_text(json.dumps(plan, indent=1))
    for name in {'SIGTERM', 'SIGHUP'} & set(dir(signal)):  # so that the runs are ended too
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    failed = train_all(plan, lock)
    guard(plan, folder)
    (folder / 'measured.json').write_text(json.dumps(measure_decoding(plan, folder), indent=1))
    print(report.write(plan, runs_of(plan), folder, plan['results']))
    if failed:
        raise ValueError('\n'.join(failed))


def report_again(folder, results):
    """Write the report of a trained sweep again; where only its tables are left, draw their figures again."""
    if not (Path(folder) / 'sweep.json').exists() and (Path(folder) / 'differences.csv').exists():
        print(f'drawn again from the tables in {folder}: {", ".join(figures.redraw(folder))}')
        return
    plan = report.read_plan(folder)
    guard(plan, folder)
    print(report.write(plan, runs_of(plan), folder, results or plan['results']))


def main(argv):
    """A command line of ablate.py."""
    own = read_flags(argv)[1]
    if own['report']:
        report_again(own['report'], own['results'])
    else:
        sweep(argv)
