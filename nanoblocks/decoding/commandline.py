"""What sample.py says of Ctrl-C, and of a word that is neither a flag nor a config file. Needs no torch."""
import os
import shlex
import sys

from configurator import split_arguments

# settings that are texts, which a shell splits at blanks unless they are quoted
TEXTS = ('start', 'score', 'stop')


def answer_ctrl_c():
    """From now on, Ctrl-C ends Python with a line instead of a traceback."""
    others = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print('\nstopped by Ctrl-C', file=sys.stderr)
        else:
            others(kind, error, trace)
    sys.excepthook = hook


def refuse_words(argv):
    """End the script with a remedy for a checkpoint given without its flag, or a text without its quotes."""
    if {'--help', '-h'} & set(argv):
        return
    pairs = list(split_arguments(argv))
    for place, (name, word) in enumerate(pairs):
        if name is not None:
            continue
        flag = flag_of(word)
        if flag:
            raise SystemExit(f'{word} is no config file; did you mean --{flag}={shlex.quote(word)}?')
        name, text = pairs[place - 1] if place else (None, None)
        if name in TEXTS and text is not None and not os.path.exists(word):
            rest = [word for key, word in pairs[place:] if key is None]
            value = shlex.quote(' '.join([text, *rest]))
            raise SystemExit(f'{word} is no config file; write --{name}={value} if it belongs to the text')


def flag_of(word):
    """The setting that a path belongs to: out_dir for a run, init_from for another checkpoint; or None."""
    held = set(os.listdir(word)) if os.path.isdir(word) else set()
    if held & {'best.pt', 'ckpt.pt'}:
        return 'out_dir'
    return 'init_from' if 'config.json' in held or word.endswith('.pt') and os.path.isfile(word) else None
