"""What the scripts say of words that are neither flags nor files, and of flags without effect. No torch."""
import os
import shlex
import sys

from configurator import settings_of, split_arguments

# settings that are texts, which a shell splits at blanks unless they are quoted
TEXTS = ('start', 'score', 'stop', 'vary', 'wandb_run_name')
# the setting that a folder belongs to, by the files that it holds
HELD = {'out_dir': {'best.pt', 'ckpt.pt'}, 'report': {'sweep.json'}, 'dataset': {'meta.json', 'prepare.py'},
        'init_from': {'config.json'}}


def refuse_words(argv, settings, foreign=()):
    """
    End the script with a remedy for a folder or checkpoint given without its flag, or a text without its
    quotes.

    settings    names that the script has
    foreign     model flags that it lacks: a config file that sets one is of train.py
    """
    if {'--help', '-h'} & set(argv):
        return
    pairs = list(split_arguments(argv))
    refuse_configs([word for name, word in pairs if name is None], foreign)
    for place, (name, word) in enumerate(pairs):
        if name is not None:
            continue
        flag = flag_of(word, settings)
        if flag:
            raise SystemExit(f'{word} is no config file; did you mean --{flag}={shlex.quote(word)}?')
        name, text = pairs[place - 1] if place else (None, None)
        if name in TEXTS and name in settings and text is not None and not os.path.exists(word):
            rest = [word for key, word in pairs[place:] if key is None]
            value = shlex.quote(' '.join([text, *rest]))
            raise SystemExit(f'{word} is no config file; write --{name}={value} if it belongs to the text')


def refuse_configs(words, foreign):
    """End the script if a config file sets one of the flags `foreign`; name the run that it describes."""
    found, out_dir = [], 'out'
    for word in words:
        try:
            names = settings_of(word) if word.endswith('.py') else {}
        except (OSError, SyntaxError, ValueError):  # which `configure` tells
            continue
        found += [word] * bool(names.keys() & set(foreign))
        out_dir = names['out_dir'].default if 'out_dir' in names else out_dir
    if found:
        raise SystemExit(f'{" ".join(found)} must be left to train.py, whose runs remember it: write '
                         f'--out_dir={shlex.quote(str(out_dir))} instead')


def warn_of_unread(given, rows):
    """
    Print a line for flags of the command line that do nothing. A file may set them for other runs.

    given   {name: the flag or file that set it}
    rows    [(whether the rest applies, why settings are not read, their names)]
    """
    for applies, reason, names in rows:
        flags = [f'--{name}' for name in names if applies and given.get(name) == f'--{name}']
        if flags:
            has = 'has' if len(flags) == 1 else 'have'
            print(f'warning: {" ".join(flags)} {has} no effect {reason}', file=sys.stderr)


def flag_of(word, settings):
    """The setting that a path belongs to: out_dir for a run, init_from for a checkpoint, ...; or None."""
    held = set(os.listdir(word)) if os.path.isdir(word) else set()
    found = [flag for flag, files in HELD.items() if held & files]
    if word.endswith('.pt') and os.path.isfile(word):
        found.append('init_from')
    return next((flag for flag in found if flag in settings), None)
