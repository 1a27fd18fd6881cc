"""
What does one block contribute? Trains sweeps of arms over several seeds and reports paired differences.

    python ablate.py config/llama_small.py config/tiny.py --base=config/gpt2_small.py --seeds=3
    python ablate.py config/llama_small.py config/tiny.py --vary="norm=layernorm; ffn=gelu" --match=params
    python ablate.py config/llama_small.py config/tiny.py --vary="Mamba: layer_pattern=m+pos=none"
    python ablate.py --report=out/ablate/llama_small

With --base, the sweep leads from that config to the first file given. Each flag in which the two differ is
tried in three places: alone on the base, removed from the first file, and on the ladder from the base to the
first file. All other files and flags hold for both.

With --vary, each value of each flag is an arm, compared with the files as they are. Flags that need each
other are joined by + and change together; an arm may be named in front of a colon.

An arm is an ordinary run of train.py in a folder of its own, and takes train.py's settings and the model's
flags. Give the same command again to continue a sweep that was stopped. The body of this script is
nanoblocks/experiments/sweep.py.
"""
import sys

import torch

from configurator import configure, convert, errors_as_messages, model_flags, plain_settings, setting_flags
from data.loader import ensure_prepared, open_dataset
from model import GPT, GPTConfig
from nanoblocks.experiments import report as reports
from nanoblocks.training import checkpoint
from nanoblocks.training.run_folder import RunFolder

try:
    import fcntl
except ImportError:  # Windows, where the same sweep must not be started twice
    fcntl = None

# ----------------------------------------------------------------------------------------------------------
# Settings. All of train.py's, and the model's flags, may be given as well and hold for every arm.

base = ''                           # config file to start from; the first file given is where to go
vary = ''                           # "flag=value,value; flag=value": arms beside the files as they are
arms = 'alone,removed,ladder'       # with base: which arms to train
seeds = 3                           # runs of each arm, from train.py's seed on
match = 'none'                      # resize the ffn to hold: params, active (of one token), flops, or none
lr_sweep = 1                        # learning rates per arm, each twice the last; the best of each compare
evals = 10                          # evaluations in a run, for the curves; replaces eval_interval
jobs = 1                            # runs at once; on GPUs, one after another on each
out_dir = ''                        # the sweep's folder; empty: out/ablate/<name of the first file>
results = ''                        # where the report goes; empty: into out_dir
report = ''                         # a sweep's folder: write its report again, without training

OWN = plain_settings(globals())
HERE = Path(__file__).resolve().parent
TOLERANCE = 0.01                    # how far a matched budget may be off
# what two runs must share to see the same tokens and be measured alike
PAIRED = ('seed', 'dataset', 'block_size', 'vocab_size', 'batch_size', 'gradient_accumulation_steps',
          'max_iters', 'log_interval', 'eval_interval', 'eval_iters', 'eval_tokens', 'eval_only', 'device',
          'batch_tokens', 'batch_warmup_iters')
# what a run may record differently without being another run
APART = ('out_dir', 'init_from', 'overwrite', 'wandb_log', 'wandb_project', 'wandb_run_name')
RATES = ('learning_rate', 'muon_lr', 'min_lr')
WIDTHS = ('ffn_width', 'expert_width')
# what --match can hold, in words
MATCHES = {'none': '', 'params': 'parameters', 'active': 'active parameters',
           'flops': 'FLOPs per token'}
MODEL = model_flags(GPTConfig)

# ----------------------------------------------------------------------------------------------------------
# Arms. `words` are the model flags and settings of a run in one dict, as its config files give them.


def train_settings():
    """The settings of train.py with their defaults, and their annotations, read without running it."""
    settings, hints = {}, {}
    for node in ast.parse((HERE / 'train.py').read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if 'configure(' in ast.unparse(node.value):  # where the settings end
                break
            name = (node.targets[0] if isinstance(node, ast.Assign) else node.target).id
            settings[name] = ast.literal_eval(node.value)
            if isinstance(node, ast.AnnAssign):
                hints[name] = eval(ast.unparse(node.annotation))
    return settings | {'__annotations__': hints}


def read_words(argv):
    """(words, this script's settings, {name: the file or flag that set it}) of a command line."""
    given, settings = {}, {'__file__': __file__} | train_settings() | OWN
    model = configure(settings, GPTConfig, argv, given)
    words = {name: value for name, value in plain_settings(settings).items() if name not in OWN} | model
    # flags in the order of the files, which is that of the ladder
    words = {name: words.pop(name) for name in list(words) if name not in given} | {
        name: words[name] for name in given if name in words}
    return words, {name: settings[name] for name in OWN}, given


def split(words):
    """(model flags, settings) of words."""
    return ({name: value for name, value in words.items() if name in MODEL},
            {name: value for name, value in words.items() if name not in MODEL})


def config_of(words):
    return GPTConfig(**split(words)[0])


def legal(words):
    try:
        config_of(words)
    except ValueError:
        return False
    return True


def value_of(words, name):
    return words[name] if name in words else MODEL[name].default


def switched(words, other, names):
    """`words` with the values that `other` has for these names."""
    return words | {name: value_of(other, name) for name in names}


def refuse_unpaired(names, source):
    for name in names:
        if name in PAIRED + APART:
            raise ValueError(f'{name} must not differ between the arms ({source}): they would not be '
                             'trained on the same tokens and measured alike')


def flag_groups(start, end):
    """
    The flags in which two sets of words differ, in groups that can be switched on at `start` and off at
    `end`: a flag that means nothing without another, or is refused without it, goes with it.
    """
    configs = [words | asdict(config_of(words)) for words in (start, end)]
    differ = [name for name in end | start if value_of(start, name) != value_of(end, name)
              and configs[0][name] != configs[1][name]]
    refuse_unpaired(differ, 'by the files given')
    groups = [(name,) for name in differ]

    def works(group):
        return legal(switched(start, end, group)) and legal(switched(end, start, group))

    while not_alone := [group for group in groups if not works(group)]:
        first = not_alone[0]
        others = [group for group in groups if group != first]
        joined = next((first, *more) for size in range(1, len(groups))
                      for more in combinations(others, size) if works(sum(more, first)))
        at = min(groups.index(group) for group in joined)
        names = sum(joined, ())
        groups = [group for group in groups if group not in joined]
        groups.insert(at, tuple(name for name in differ if name in names))
    return groups


def comparison(flag, how, arms, without, with_, names):
    """
    What is compared: two arms that differ in `names`; the effect is the loss of `with` less `without`. A flag
    that is written down in one and comes to the same by default in the other is not named.
    """
    both = [words | asdict(config_of(words)) for words in (arms[without], arms[with_])]
    names = [name for name in names if both[0][name] != both[1][name]]
    change = ', '.join(f'{name} {both[0][name]} -> {both[1][name]}' for name in names)
    return {'flag': flag, 'how': how, 'without': without, 'with': with_, 'names': names, 'change': change}


def arms_between(start, end, start_name, end_name, kinds):
    """({arm: words}, comparisons, names on the ladder) of the arms between one set of words and another."""
    found, comparisons = {start_name: start, end_name: end}, []

    def add(name, words):
        for known, theirs in found.items():
            if config_words(theirs) == config_words(words):
                return known
        found[name] = words
        return name

    def compare(flag, how, without, with_, names):
        # the first rung of the ladder stands alone on the base, and the last beside all others
        if not any(pair['without'] == without and pair['with'] == with_ for pair in comparisons):
            comparisons.append(comparison(flag, how, found, without, with_, names))

    groups = flag_groups(start, end)
    if not groups:
        raise ValueError(f'base={start_name} must differ from {end_name} in some flag')
    everything = sum(groups, ())
    if len(groups) > 1:
        compare('all of them', 'all', start_name, end_name, everything)
    rungs, now, left = [start_name], start, groups
    while left:
        # the next one in order that works here; if none does alone, the rest goes in at once
        group = next((g for g in left if legal(switched(now, end, g))), sum(left, ()))
        left, now = [g for g in left if not set(g) <= set(group)], switched(now, end, group)
        flag = '+'.join(group)
        if 'alone' in kinds:
            name = add(f'{start_name}+{flag}', switched(start, end, group))
            compare(flag, 'alone', start_name, name, group)
        if 'removed' in kinds:
            name = add(f'{end_name}-{flag}', switched(end, start, group))
            compare(flag, 'removed', name, end_name, group)
        if 'ladder' in kinds:
            rungs.append(add(f'ladder{len(rungs)}+{flag}', now))
            compare(flag, 'ladder', *rungs[-2:], group)
    found[end_name] = found.pop(end_name)  # a report goes from one to the other
    return found, comparisons, rungs if len(rungs) > 1 else []


def config_words(words):
    """Words made comparable: the config with everything filled in, and the settings."""
    return asdict(config_of(words)), split(words)[1]


def arms_of_vary(reference, name, text):
    """({arm: words}, comparisons) of a reference and of each value of --vary beside it."""
    found, comparisons = {name: reference}, []
    for part in filter(None, (part.strip() for part in text.split(';'))):
        title, colon, rest = part.rpartition(':')
        flag, equals, values = rest.partition('=')
        values = [value.strip() for value in values.split(',')]
        if not equals or not all(values) or colon and len(values) > 1:
            raise ValueError(f'vary={part} must be flag=value,value or name: flag=value, and further flags '
                             'stand behind a semicolon')
        for value in values:
            # a + begins another flag only where a name and = follow, so 1e+3 stays a number
            pieces = re.split(r'\+(?=[a-z_]\w*=)', f'{flag.strip()}={value}')
            words = {key: typed(key, word) for key, word in (piece.split('=', 1) for piece in pieces)}
            refuse_unpaired(words, f'by vary={part}')
            arm = (title.strip() or '+'.join(pieces)).replace(os.sep, '_')
            try:
                same = config_words(reference | words) == config_words(reference)
            except ValueError as error:
                raise ValueError(f'{arm}: {error}; flags that need each other are joined by +') from None
            if same or arm in found:
                continue
            found[arm] = reference | words
            comparisons.append(comparison(arm, 'varied', found, name, arm, words))
    if not comparisons:
        raise ValueError(f'vary={text} must hold a value that the files given do not have')
    return found, comparisons


def typed(name, text):
    """The value of a flag or setting from its text, refused as train.py would."""
    flags = setting_flags(train_settings()) | MODEL
    if name not in flags:
        raise ValueError(f'vary={name} is no setting of train.py and no model flag; see --help')
    return convert(text, flags[name], f'vary: {name}', True)


# ----------------------------------------------------------------------------------------------------------
# Budgets


@functools.cache
def vocabulary(dataset):
    """Tokens of a dataset, which train.py gives the model: prepared here if that needs no network."""
    folder = Path(dataset) if os.path.dirname(dataset) else HERE / 'data' / dataset
    ensure_prepared(folder)
    return open_dataset(folder, 1, 0).meta['vocab_size']


def cost(words, kind):
    """What --match holds: parameters, those of one token, or floating-point operations per token."""
    config = config_of({'vocab_size': vocabulary(words['dataset'])} | words)
    with torch.device('meta'):
        model = GPT(config, seed=None)
    if kind == 'flops':
        return model.flops_per_token(config.block_size)
    return model.num_params(active=kind == 'active')


def resized(words, width):
    """Words with a dense ffn of this width; experts share it out among those that a token passes through."""
    config, more = config_of(words), {}
    if 'f' in config.ffns():
        more['ffn_width'] = width
    if 'e' in config.ffns():
        more['expert_width'] = max(1, round(width / max(1, config.n_expert_used + config.n_shared)))
    return words | more


def hold_budget(words, budget, kind):
    """
    Words with the ffn as wide as it must be to cost `budget` within TOLERANCE, or as they are if they do.
    ValueError, one sentence, where no width can.
    """
    def off(words):
        return cost(words, kind) / budget - 1
    if abs(off(words)) <= TOLERANCE:
        return words
    if not config_of(words).ffns() - {'-'}:
        raise ValueError(f'match={kind} must have an ffn to resize, and this arm, {off(words):+.1%} off, has '
                         'none: give it one, or --match=none')
    low, high = 1, 64 * config_of(words).n_embd
    while low < high:  # the first width that is not too cheap
        middle = (low + high) // 2
        if off(resized(words, middle)) < 0:
            low = middle + 1
        else:
            high = middle
    best = min((resized(words, width) for width in (max(1, low - 1), low)), key=lambda w: abs(off(w)))
    if abs(off(best)) > TOLERANCE:
        raise ValueError(f'match={kind} must be reached within {TOLERANCE:.0%} by resizing the ffn, and the '
                         f'nearest width is {off(best):+.1%} off: change n_embd, or --match=none')
    return best


def match_budgets(found, reference, kind):
    """({arm: words} of equal budget, {arm: sentence of what was done})"""
    budget, held, notes = cost(found[reference], kind), {}, {}
    for name, words in found.items():
        try:
            held[name] = hold_budget(words, budget, kind)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
        before, after = config_of(words), config_of(held[name])
        changed = [f'{width} {getattr(before, width)} -> {getattr(after, width)}' for width in WIDTHS
                   if getattr(before, width) != getattr(after, width)]
        if changed:
            notes[name] = (f'{", ".join(changed)}: {cost(held[name], kind):,} {MATCHES[kind]} for the '
                           f'{budget:,} of {reference} (without it {cost(words, kind) / budget - 1:+.1%})')
    return held, notes


# ----------------------------------------------------------------------------------------------------------
# The guard: compared runs differ in what the comparison names, and in nothing else


def recorded(folder):
    """(model flags, settings) that a run wrote down. FileNotFoundError or ValueError, one sentence."""
    path = Path(folder) / 'config.json'
    try:
        run = json.loads(path.read_text())
        return run['model'], run['settings']
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist: that run has not begun') from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is no config of a run: remove that folder and train it again') from None


def check_run(folder, words):
    """ValueError, one sentence, when the run in a folder is not the one that these words ask for."""
    model, settings = recorded(folder)
    wanted_model, wanted = split(words)
    # the vocabulary is that of the dataset, which is a setting
    wanted_model = asdict(GPTConfig(**({'vocab_size': model.get('vocab_size')} | wanted_model)))
    for wish, is_ in ((wanted_model, model), (wanted, settings)):
        for name in wish:
            if name not in APART and (name not in is_ or is_[name] != wish[name]):
                raise ValueError(f'{folder} must hold a run with {name}={wish[name]}, and its config.json '
                                 f'says {is_.get(name)}: remove that folder, or choose another --out_dir')


def check_pair(first, second, names, free=()):
    """
    ValueError, one sentence, unless the runs in two folders differ in all of `names` and in nothing else but
    what GPTConfig works out from them. `free`: what may differ too, as --match and --lr_sweep change it.
    """
    runs = [recorded(folder) for folder in (first, second)]
    both = [model | {name: value for name, value in settings.items() if name not in APART}
            for model, settings in runs]
    differ = [name for name in both[0] | both[1] if both[0].get(name) != both[1].get(name)]
    for name in names:
        if name not in differ:
            raise ValueError(f'{name} must differ between {first} and {second}, and is '
                             f'{both[0].get(name)} in both: the flag was not applied')
    extra = [name for name in differ if name not in names and name not in free]
    derived = [name for name in extra if name in MODEL and MODEL[name].default is None]
    for name in extra:
        if name not in derived:
            raise ValueError(f'{first} and {second} must differ in {", ".join(names)} alone, and differ in '
                             f'{name} too ({both[0].get(name)}, {both[1].get(name)})')
    # what is left open follows from the rest, and must follow to the same numbers
    for folder, (model, _) in zip((first, second), runs):
        follows = asdict(GPTConfig(**(model | dict.fromkeys(derived))))
        odd = [name for name in derived if follows[name] != model[name]]
        if odd:
            raise ValueError(f'{first} and {second} must differ in {", ".join(names)} alone, and '
                             f'{odd[0]}={model[odd[0]]} in {folder} does not follow from that')


def guard(plan, folder):
    """Every run that has begun is the one planned, and every compared pair differs in what is named."""
    for run in runs_of(plan):
        if (Path(folder) / run['path'] / 'config.json').exists():
            check_run(Path(folder) / run['path'], run['words'])
    free = WIDTHS * (plan['match'] != 'none') + RATES * (len(plan['rates']) > 1)
    paths = {(run['arm'], run['rate'], run['seed']): Path(folder) / run['path'] for run in runs_of(plan)}
    for pair in plan['comparisons']:
        for rate in plan['rates']:
            for seed in plan['seeds']:
                first, second = (paths[pair[side], rate, seed] for side in ('without', 'with'))
                if (first / 'config.json').exists() and (second / 'config.json').exists():
                    check_pair(first, second, pair['names'], free)


# ----------------------------------------------------------------------------------------------------------
# The plan


def make_plan(argv):
    """All that a sweep will do, as plain values: arms, comparisons, seeds, rates."""
    words, own, given = read_words(argv)
    files, flags = ([arg for arg in argv if arg.startswith('--') == is_flag] for is_flag in (False, True))
    check_settings(files, own, words)
    name = Path(files[0]).stem
    # a config file names a folder too, that of its single run
    folder = own['out_dir'] if given.get('out_dir', '').startswith('--') else f'out/ablate/{name}'
    # evaluations are spread over the run, the last one at its end
    spread = {'eval_interval': max(1, -(-words['max_iters'] // own['evals']))}
    if words['batch_tokens'] is not None:  # as train.py works it out, and records it
        row = words['batch_size'] * config_of(words).block_size
        spread['gradient_accumulation_steps'] = words['batch_tokens'] // row
    if own['base']:
        start, reference = read_words([own['base'], *files[1:], *flags])[0] | spread, Path(own['base']).stem
        start |= {key: words[key] for key in APART if key in words}
        found, comparisons, ladder = arms_between(start, words | spread, reference, name,
                                                  own['arms'].split(','))
    else:
        reference, ladder = name, []
        found, comparisons = arms_of_vary(words | spread, name, own['vary'])
    notes = {}
    if own['match'] != 'none':
        found, notes = match_budgets(found, reference, own['match'])
    first, half = words['seed'], (own['lr_sweep'] - 1) / 2
    return {'name': name, 'folder': folder, 'results': own['results'] or folder, 'reference': reference,
            'command': shlex.join(['python', 'ablate.py', *argv]), 'machine': machine(), 'jobs': own['jobs'],
            'match': own['match'], 'notes': notes, 'seeds': list(range(first, first + own['seeds'])),
            'rates': [2.0 ** (i - half) for i in range(own['lr_sweep'])],
            'arms': found, 'comparisons': comparisons, 'ladder': ladder}


def check_settings(files, own, words):
    if not files:
        raise ValueError('the first word must be a config file, or --report=FOLDER: see --help')
    if bool(own['base']) == bool(own['vary']):
        raise ValueError('either --base (a config to come from) or --vary (flags and their values) must be '
                         'given, and not both')
    if words['init_from'] != 'scratch':
        raise ValueError(f'init_from={words["init_from"]} must be scratch: every arm is drawn from its seeds')
    if words['group_lr'] and own['lr_sweep'] > 1:
        raise ValueError(f'lr_sweep={own["lr_sweep"]} must be 1 with group_lr, whose rates it does not scale')
    if own['match'] not in MATCHES:
        raise ValueError(f'match={own["match"]} must be one of {", ".join(MATCHES)}')
    if set(own['arms'].split(',')) - {'alone', 'removed', 'ladder'}:
        raise ValueError(f'arms={own["arms"]} must be some of alone,removed,ladder')
    for name in ('seeds', 'lr_sweep', 'evals', 'jobs'):
        if own[name] < 1:
            raise ValueError(f'{name}={own[name]} must be at least 1')


def runs_of(plan):
    """Every run of a plan: seeds outermost, so that a sweep cut short has compared all arms on some seeds."""
    found = []
    for seed in plan['seeds']:
        for arm, words in plan['arms'].items():
            for rate in plan['rates']:
                path = os.path.join(arm, f'seed{seed}' + (f'_lr{rate:g}' if len(plan['rates']) > 1 else ''))
                scaled = {name: words[name] * rate for name in RATES if words[name] is not None}
                found.append({'arm': arm, 'seed': seed, 'rate': rate, 'path': path,
                              'words': words | scaled | {'seed': seed}})
    return found


def machine():
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
        cpu = names[0] if names else cpu
    cards = torch.cuda.device_count()
    card = f'{cards} x {torch.cuda.get_device_name()}, ' if cards else ''
    return f'{card}{os.cpu_count()} cores ({cpu}), torch {torch.__version__}'


# ----------------------------------------------------------------------------------------------------------
# The runs


def progress(folder):
    """(steps evaluated last, loss then) of a run, (0, None) when it has none."""
    path, last = Path(folder) / 'metrics.jsonl', (0, None)
    if path.exists():
        for line in reports.read_lines(path):
            if 'val_loss' in line:
                last = line['step'], line['val_loss']
    return last


def command_of(run, folder):
    """The command line that begins a run, or goes on with it."""
    out = os.path.join(folder, run['path'])
    start = [sys.executable, str(HERE / 'train.py'), f'--out_dir={out}']
    if RunFolder(out).resumable():
        return [*start, '--init_from=resume']
    defaults = {name: flag.default for name, flag in (setting_flags(train_settings()) | MODEL).items()}
    words = run['words'] | {'wandb_run_name': run['path'].replace(os.sep, ' '), 'overwrite': True}
    return start + [f'--{name}={value}' for name, value in words.items()
                    if value != defaults[name] and name != 'out_dir']


def environment(plan, slot):
    """What a run is started with: its share of the machine, and the group of a sweep's runs in W&B."""
    env = os.environ | {'WANDB_RUN_GROUP': os.path.basename(os.path.normpath(plan['folder']))}
    if torch.cuda.is_available():
        cards = env.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count())))
        env['CUDA_VISIBLE_DEVICES'] = cards.split(',')[slot % len(cards.split(','))]
    elif plan['jobs'] > 1:
        env['OMP_NUM_THREADS'] = str(threads(plan))
    return env


def threads(plan):
    """Threads of one of several runs at once on a CPU."""
    return int(os.environ.get('OMP_NUM_THREADS') or max(1, (os.cpu_count() or 1) // plan['jobs']))


def start_run(plan, run, slot, lock):
    folder = plan['folder']
    out = os.path.join(folder, run['path'])
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, 'log.txt'), 'a') as log:
        return subprocess.Popen(command_of(run, folder), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                env=environment(plan, slot), pass_fds=() if lock is None else (lock,))


def train_all(plan, lock=None):
    """Train what is not finished, `jobs` at once; a sentence for each run that failed."""
    runs, folder, began = runs_of(plan), Path(plan['folder']), time.time()
    todo = deque(run for run in runs if progress(folder / run['path'])[0] < steps_of(run))
    total, ended, failed, running = len(todo), 0, [], {}
    print(f'{len(plan["arms"])} arms, {len(plan["seeds"])} seeds, {len(plan["rates"])} learning rates: '
          f'{len(runs)} runs, {len(runs) - total} of them finished', flush=True)
    try:
        while todo or running:
            while todo and len(running) < plan['jobs']:
                run, slot = todo.popleft(), min(set(range(plan['jobs'])) - {r[1] for r in running.values()})
                process = start_run(plan, run, slot, lock)
                running[process.pid] = run, slot, process
            pid, status = os.wait()
            run, _, process = running.pop(pid)
            process.returncode, ended = os.waitstatus_to_exitcode(status), ended + 1
            sentence = close_run(plan, run, process.returncode)
            left = (time.time() - began) / ended * (total - ended)
            step, loss = progress(folder / run['path'])
            print(f'[{ended}/{total}] {run["path"]}: ' + (sentence or f'val loss {loss:.4f}')
                  + f', about {left / 60:.0f} min left', flush=True)
            failed += [sentence] if sentence else []
            if sentence and ended == 1 and step == 0:
                raise ValueError(f'the first run did not begin, and the others would not either: {sentence}')
    finally:
        for _, _, process in running.values():
            process.terminate()
    return failed


def close_run(plan, run, code):
    """A sentence when a run did not end at its last step, else None."""
    out = Path(plan['folder']) / run['path']
    step = progress(out)[0]
    if code == 0 and step == steps_of(run):
        check_run(out, run['words'])  # at once, before more are trained in vain
        return None
    lines = (out / 'log.txt').read_text().strip().splitlines() or ['']
    return f'{run["path"]} ended at step {step} of {steps_of(run)} with exit code {code}: {lines[-1]}'


def steps_of(run):
    return run['words']['max_iters']


# ----------------------------------------------------------------------------------------------------------
# What only a model can say: how fast it generates


def measure(plan, folder, rounds=5, prompt=16, new_tokens=48):
    """
    {arm: {'decode': tokens/s at batch 1}} of the first seed's checkpoints. The arms are taken in turns, and
    the median of the rounds is kept.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and plan['jobs'] > 1:
        torch.set_num_threads(threads(plan))  # as many as each run had
    paths = {}
    for run in runs_of(plan):
        path = Path(folder) / run['path'] / 'ckpt.pt'
        if path.exists():
            paths.setdefault(run['arm'], path)
    rates = {arm: [] for arm in paths}
    for _ in range(rounds):
        for arm, path in paths.items():
            model = checkpoint.build(checkpoint.load(path), str(path)).to(device)
            length = max(1, min(prompt, model.config.block_size // 4))
            new = min(new_tokens, model.config.block_size - length)
            idx = torch.zeros(1, length, dtype=torch.int64, device=device)
            model.generate(idx, min(4, new), temperature=0)  # the first ones allocate
            began = time.perf_counter()
            model.generate(idx, new, temperature=0)[0, -1].item()
            rates[arm].append(new / (time.perf_counter() - began))
    return {arm: {'decode': statistics.median(found)} for arm, found in rates.items()}


# ----------------------------------------------------------------------------------------------------------


def take(folder):
    """
    The lock of a sweep's folder, which its runs inherit: two sweeps in one folder, or a run that outlived the
    sweep that was killed, would write over each other. ValueError, one sentence, when it is taken.
    """
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        return None
    lock = os.open(os.path.join(folder, 'lock'), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f'{folder} must not be at work twice: a sweep, or a run of one that was killed, '
                         'still writes there; wait for it, end it, or choose another --out_dir') from None
    return lock


def same_sweep(old, new):
    """The new plan, in the folder of an old one. ValueError, one sentence, when arms of one name differ."""
    for arm in old['arms'].keys() & new['arms'].keys():
        odd = [name for name, value in new['arms'][arm].items()
               if name not in APART and old['arms'][arm].get(name, MODEL[name].default if name in MODEL
                                                             else None) != value]
        if odd:
            raise ValueError(f'{new["folder"]} holds a sweep in which {arm} has other values of '
                             f'{", ".join(odd)}: choose another --out_dir, or remove that folder')


def main(argv):
    plan = make_plan(argv)
    folder = Path(plan['folder'])
    for arm, note in plan['notes'].items():
        print(f'match={plan["match"]}: {arm}: {note}')
    lock = take(folder)
    if (folder / 'sweep.json').exists():
        same_sweep(reports.read_plan(folder), plan)
    guard(plan, folder)
    (folder / 'sweep.json').write_text(json.dumps(plan, indent=1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too
    failed = train_all(plan, lock)
    guard(plan, folder)
    (folder / 'measured.json').write_text(json.dumps(measure(plan, folder), indent=1))
    print(reports.write(plan, runs_of(plan), folder, plan['results']))
    if failed:
        raise ValueError('\n'.join(failed))


def report_again(folder, results):
    plan = reports.read_plan(folder)
    guard(plan, folder)
    print(reports.write(plan, runs_of(plan), folder, results or plan['results']))


if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv:
        configure(globals(), GPTConfig, ['--help'])
    with errors_as_messages():
        sweep.main(sys.argv[1:])
