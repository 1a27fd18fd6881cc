"""
The arms of a sweep: which sets of flags are trained, and which pairs of them are compared.

`flags` are the model flags and train.py's settings of one run in one dict, as its config files give them. An
arm is a name and its flags. A comparison names two arms, `without` and `with`, and the flags in which they
differ.
"""
import os
import re
from dataclasses import asdict
from itertools import combinations

from configurator import configure, convert, model_flags, nearest, settings_of, split_arguments
from model import GPTConfig
from nanoblocks.files import ROOT

MODEL = model_flags(GPTConfig)
# settings that two runs must share to see the same tokens and be measured in the same way
PAIRED = ('seed', 'dataset', 'objective', 'mask_rate', 'block_size', 'vocab_size', 'batch_size',
          'gradient_accumulation_steps', 'max_iters', 'log_interval', 'eval_interval', 'eval_iters',
          'eval_tokens', 'eval_only', 'device', 'batch_tokens', 'batch_warmup_iters')
# settings that do not identify a run
NOT_IDENTIFYING = ('out_dir', 'init_from', 'step', 'overwrite', 'save_interval', 'save_minutes',
                   'save_thread', 'keep_newest', 'keep_every', 'wandb_log', 'wandb_project', 'wandb_run_name')

# ----------------------------------------------------------------------------------------------------------
# Reading


def files_and_flags(argv, without=()):
    """([config file], [--key=value]) of a command line, without some flags."""
    pairs = list(split_arguments(argv))
    return ([text for name, text in pairs if name is None],
            [f'--{name}={text}' for name, text in pairs if name is not None and name not in without])


def read_flags(argv):
    """A command line of ablate.py -> (flags, ablate.py's settings, {name: the file or flag that set it})"""
    own, train = settings_of(ROOT / 'ablate.py'), settings_of(ROOT / 'train.py')
    known, given = train | own, {}
    settings = {name: setting.default for name, setting in known.items()} | {
        '__file__': str(ROOT / 'ablate.py'),
        '__annotations__': {name: setting.type for name, setting in known.items()}}
    flags = configure(settings, GPTConfig, argv, given)
    flags = {name: settings[name] for name in train if name not in own} | flags
    # flags that were given come last, in the order in which they were given: the order of the ladder
    flags = {name: flags[name] for name in flags if name not in given} | {
        name: flags[name] for name in given if name in flags}
    return flags, {name: settings[name] for name in own}, given


def flags_of_config(name):
    """The model flags that config/<name>.py sets."""
    path = str(ROOT / 'config' / f'{name}.py')
    return configure({}, GPTConfig, [path], skip=settings_of(ROOT / 'train.py'))


def read_value(name, text, source='vary'):
    """The value of a flag or setting from its text, refused as train.py would. source: where it was given."""
    known = settings_of(ROOT / 'train.py') | MODEL
    if name not in known:
        raise ValueError(f'{source}={name} is no setting of train.py and no model flag; '
                         f'{nearest(name, known)}')
    return convert(text, known[name], f'{source}: {name}', True)


def split(flags):
    """(model flags, train.py's settings)"""
    return ({name: value for name, value in flags.items() if name in MODEL},
            {name: value for name, value in flags.items() if name not in MODEL})


def config_of(flags):
    return GPTConfig(**split(flags)[0])


def legal(flags):
    """Whether GPTConfig accepts the model flags."""
    try:
        config_of(flags)
    except ValueError:
        return False
    return True


def filled_in(flags):
    """(model flags with every None filled in, settings): equal for two arms that are the same run."""
    return asdict(config_of(flags)), split(flags)[1]


def value_of(flags, name):
    return flags[name] if name in flags else MODEL[name].default


def switched(flags, other, names):
    """`flags` with the values that `other` has for these names."""
    return flags | {name: value_of(other, name) for name in names}


def refuse_unpaired(names, source):
    """ValueError for a name that changes data, seed or measurement. source: where the name was given."""
    for name in names:
        if name in PAIRED + NOT_IDENTIFYING:
            raise ValueError(f'{name} must not differ between the arms ({source}): they would not be '
                             'trained on the same tokens and measured in the same way')


# ----------------------------------------------------------------------------------------------------------
# From one config to another


def flag_groups(start, end):
    """
    The flags in which two arms differ, in groups that can be switched on at `start` and off at `end`. A flag
    that means nothing without another, or is refused without it, is in one group with it.
    """
    configs = [flags | asdict(config_of(flags)) for flags in (start, end)]
    differ = [name for name in end | start if value_of(start, name) != value_of(end, name)
              and configs[0][name] != configs[1][name]]
    refuse_unpaired(differ, 'by the files given')
    groups = [(name,) for name in differ]

    def works(group):
        return legal(switched(start, end, group)) and legal(switched(end, start, group))

    while not_alone := [group for group in groups if not works(group)]:
        # join the first with the fewest others that make it work
        first = not_alone[0]
        others = [group for group in groups if group != first]
        joined = next((first, *more) for size in range(1, len(groups))
                      for more in combinations(others, size) if works(sum(more, first)))
        at = min(groups.index(group) for group in joined)
        names = sum(joined, ())
        groups = [group for group in groups if group not in joined]
        groups.insert(at, tuple(name for name in differ if name in names))
    return groups


def ladder_order(groups, start, end):
    """The groups in an order in which each can be switched on after those before it."""
    now, left = start, groups
    while left:
        # if none of those left works alone, they go in together
        group = next((g for g in left if legal(switched(now, end, g))), sum(left, ()))
        yield group
        left, now = [g for g in left if not set(g) <= set(group)], switched(now, end, group)


def comparison(flag, how, arms, without, with_, names):
    """
    A pair of arms that differ in `names`; its effect is the loss of `with` minus the loss of `without`. Names
    whose values turn out equal once defaults are filled in are left out.
    """
    both = [flags | asdict(config_of(flags)) for flags in (arms[without], arms[with_])]
    names = [name for name in names if both[0][name] != both[1][name]]
    change = ', '.join(f'{name} {both[0][name]} -> {both[1][name]}' for name in names)
    return {'flag': flag, 'how': how, 'without': without, 'with': with_, 'names': names, 'change': change}


def arms_between(start, end, start_name, end_name, places):
    """
    ({arm: flags}, comparisons, names on the ladder) between two arms. places: in which of these each group is
    tried, `alone` on the start, `removed` from the end, and on the `ladder` from one to the other.
    """
    arms, comparisons = {start_name: start, end_name: end}, []

    def add(name, flags):
        """The name of the arm with these flags, a known one if there is one."""
        for known in arms:
            if filled_in(arms[known]) == filled_in(flags):
                return known
        arms[name] = flags
        return name

    def compare(flag, how, without, with_, names):
        # the ladder's first rung is alone on the start too, and its last is removed from the end
        if not any(pair['without'] == without and pair['with'] == with_ for pair in comparisons):
            comparisons.append(comparison(flag, how, arms, without, with_, names))

    groups = flag_groups(start, end)
    if not groups:
        raise ValueError(f'base={start_name} must differ from {end_name} in some flag')
    if len(groups) > 1:
        compare('all of them', 'all', start_name, end_name, sum(groups, ()))
    rungs, now = [start_name], start
    for group in ladder_order(groups, start, end):
        flag, now = '+'.join(group), switched(now, end, group)
        if 'alone' in places:
            name = add(f'{start_name}+{flag}', switched(start, end, group))
            compare(flag, 'alone', start_name, name, group)
        if 'removed' in places:
            name = add(f'{end_name}-{flag}', switched(end, start, group))
            compare(flag, 'removed', name, end_name, group)
        if 'ladder' in places:
            rungs.append(add(f'ladder{len(rungs)}+{flag}', now))
            compare(flag, 'ladder', *rungs[-2:], group)
    arms[end_name] = arms.pop(end_name)  # the report lists arms from one end to the other
    return arms, comparisons, rungs if len(rungs) > 1 else []


# ----------------------------------------------------------------------------------------------------------
# One config, and other values of its flags


def arms_of_vary(reference, name, text):
    """({arm: flags}, comparisons) of a reference and of each value in the text of --vary."""
    arms, comparisons = {name: reference}, []
    for part in filter(None, (part.strip() for part in text.split(';'))):
        for arm, flags in variants(part):
            refuse_unpaired(flags, f'by vary={part}')
            try:
                same = filled_in(reference | flags) == filled_in(reference)
            except ValueError as error:
                label = '' if str(error).startswith(f'{arm} ') else f'{arm}: '
                raise ValueError(f'{label}{error}' + '; flags that need each other are joined by +'
                                 * bool(re.search('must be (left out|set)', str(error)))) from None
            if same or arm in arms:
                continue
            arms[arm] = reference | flags
            comparisons.append(comparison(arm, 'varied', arms, name, arm, flags))
    if not comparisons:
        raise ValueError(f'vary={text} must hold a value that the files given do not have')
    return arms, comparisons


def variants(part, source='vary'):
    """One part of --vary (flag=value,value or name: flag=value+flag=value) -> (arm, {flag: value}) ..."""
    title, colon, rest = part.rpartition(':')
    flag, equals, values = rest.partition('=')
    values = [value.strip() for value in values.split(',')]
    if not equals or not all(values) or colon and len(values) > 1:
        remedy = ('flag=value,value or name: flag=value; separate further flags with a semicolon'
                  if source == 'vary' else 'flag=value or name: flag=value+flag=value')
        raise ValueError(f'{source}={part} must be {remedy}')
    for value in values:
        # a + begins another flag only where a name and = follow, so 1e+3 stays a number
        pieces = re.split(r'\+(?=[a-z_]\w*=)', f'{flag.strip()}={value}')
        words = (piece.split('=', 1) for piece in pieces)
        flags = {key: read_value(key, word, source) for key, word in words}
        yield (title.strip() or '+'.join(pieces)).replace(os.sep, '_'), flags
