"""
A message that refuses a command names a remedy, and the remedy works: each mistake below is made, what the
message advises is read from it and run, and that command must succeed.

A new message whose advice has another form needs a row in ADVICE.
"""
import re
import shlex
import shutil

import pytest
import runs
from conftest import ROOT

PLAN_ONLY = 'from nanoblocks.experiments import sweep; sweep.sweep = sweep.make_plan'


def flag_of(message):
    """The flag that a message begins with: norm=batchnorm must ..., --norm=x must ..."""
    return re.match(r'(?:--)?(\w+)', message).group(1)


def set_to(argv, name, value):
    return [*without(argv, name), f'--{name}={value}']


def without(argv, name):
    return [word for word in argv if word.partition('=')[0].replace('-', '_') != f'__{name}']


def other_place(argv):
    """The command with another folder, which does not exist yet."""
    return set_to(argv, 'out_dir', next(runs.names))


# (what a message says, what its reader then does: match m, command a, message t -> commands that must work)
ADVICE = [
    (r'ckpt.pt does not exist: did you mean --(\w+)=(\S+)\?$', lambda m, a, t: [set_to(a, m[1], m[2])]),
    (r'whose runs remember it: write --out_dir=out/llama_small instead$', lambda m, a, t: [
        set_to([word for word in a if not word.startswith('config/')], 'out_dir', runs.trained())]),
    (r'with another tokenizer: prepare it again by (--tokenizer=\S+)$', lambda m, a, t: [
        ['data/text/prepare.py', f'--input={text_file()}', m[1]]]),
    (r'^step=7 must .* \((\d+), .*: choose one of these', lambda m, a, t: [set_to(a, 'step', m[1])]),
    (r'which needs gradient_accumulation_steps=(\d+);', lambda m, a, t: [
        set_to(a, 'gradient_accumulation_steps', m[1])]),
    (r'it has no ckpt.pt, replace it with (--overwrite=True)', lambda m, a, t: [[*a, m[1]]]),
    (r'is no config file; write (--vary=.*) if it belongs to the text$', lambda m, a, t: [
        [*a[:-2], *shlex.split(m[1]), '--n_kv_head=None', '--pos=none']]),
    (r'choose another with (--out)=FOLDER', lambda m, a, t: [set_to(a, 'out', next(runs.names))]),
    (r'the dataset .* is a file, not a prepared folder: run python (.*) --name=', lambda m, a, t: [
        [*shlex.split(m[1]), '--tokenizer=bytes']]),
    (r'download it first$', lambda m, a, t: [set_to(a, 'input', text_file())]),
    (r'did you mean (--[\w]+)\?$', lambda m, a, t: [
        [re.sub(r'^--[\w-]+', m[1], word) if word.startswith(wrong(t)) else word for word in a]]),
    (r'(?<!ckpt.pt does not exist: )did you mean ([\w./]+|--\w+=\S+)\?$', lambda m, a, t: [
        [word.replace(t.split()[0].partition('vary=')[2] or t.split()[0], m[1]) for word in a]]),
    (r'write (--\w+=)VALUE', lambda m, a, t: [[*a[:a.index(m[1][:-1])], f'{m[1]}2']]),
    (r'write (--\w+=(?!VALUE)\S+)$', lambda m, a, t: [[m[1] if word == m[1].partition('=')[0] else word
                                                             for word in a]]),
    (r'must be left out(?! unless .* joined)|leave it out', lambda m, a, t: [
        [word for word in without(a, flag_of(t)) if word != t.split()[0]]]),
    (r'must be (?:one|some) of ([\w,. ]+?)(?:$|:|;)', lambda m, a, t: [
        in_vary(a, word) or set_to(a, flag_of(t), word) for word in re.split(', ?', m[1])[:1]]),
    (r'is unknown: choose one of (\w+)', lambda m, a, t: [set_to(a, flag_of(t), m[1])]),
    (r'must be a topic: choose one of (.*)', lambda m, a, t: [['bench.py', 'cache']] * ('cache' in m[1])),
    (r'choose one of (\w+) with --(\w+)=$', lambda m, a, t: [set_to(a, m[2], m[1])]),
    (r'must be (?:at least|a multiple of|at most|scratch)(?: \w+=| the)? ?([\d.]*)', lambda m, a, t: [
        set_to(a, flag_of(t), m[1].rstrip('.') or 'scratch')]),
    (r'must divide \w+=(\d+)', lambda m, a, t: [set_to(a, flag_of(t), m[1])]),
    (r'must be above 0', lambda m, a, t: [set_to(a, flag_of(t), '0.5')]),
    (r'at least 0 and below 1', lambda m, a, t: [set_to(a, flag_of(t), '0.5')]),
    (r'must be 0 ', lambda m, a, t: [set_to(a, flag_of(t), '0')]),
    (r'or None for all tokens', lambda m, a, t: [set_to(a, flag_of(t), 'None')]),
    (r'must be an int', lambda m, a, t: [set_to(a, flag_of(t), '2')]),
    (r'must be less than|lower it', lambda m, a, t: [set_to(a, flag_of(t), '16')]),
    (r'be used with (\w+)=(\w+)$', lambda m, a, t: [set_to(a, m[1], m[2])]),
    (r'unless (\w+)=(\w+)$', lambda m, a, t: [set_to(a, m[1], m[2])]),
    (r'unless (\w+) has one of (\w)', lambda m, a, t: [set_to(a, m[1], m[2])] * ('ablate.py' not in a)),
    (r"^(\w+)=None must be set", lambda m, a, t: [set_to(a, m[1], '4')]),
    (r'be a multiple of (\w+)=(\d+), or head_dim', lambda m, a, t: [
        set_to(a, flag_of(t), 10 * int(m[2])), set_to(a, 'head_dim', '16')]),
    (r'(?:: |try |with |it with |choose )(--\w+=[^\s,]+)(?=$|,|;)', lambda m, a, t: [
        set_to(a, *m[1][2:].split('='))] if 'PATH' not in m[1] and 'FOLDER' not in m[1] else []),
    (r'choose (kernels)=(auto)', lambda m, a, t: [set_to(a, m[1], m[2])]),
    (r'another (?:out_dir|folder)|or name another', lambda m, a, t: [
        without(other_place(a), 'init_from') if 'resume' in ' '.join(a) else
        set_to(a, 'draft' if 'draft' in ' '.join(a) else 'out_dir', runs.trained())
        if a[0] == 'sample.py' else other_place(a)]),
    (r'\(checkpoint .* by --(\w+)\); leave that out', lambda m, a, t: [without(a, m[1])]),
    (r'replace it with (--\w+=\w+)', lambda m, a, t: [[*a, m[1]]]),
    (r'start it with torchrun', lambda m, a, t: []),
    (r'joined by \+$', lambda m, a, t: [
        [f'{word}+pos=none+n_kv_head=None' if word.startswith('--vary') else word for word in a]]),
    (r'either --base .* or --vary', lambda m, a, t: [
        [*a, '--base=config/gpt2_small.py'], [*a, '--vary=norm=layernorm']]),
    (r'must be flag=value,value or name: flag=value', lambda m, a, t: [
        [*a, '--vary=norm=layernorm,rmsnorm; Name: ffn=gelu']]),
    (r'must be a config file', lambda m, a, t: [[*a, 'config/llama_small.py', '--vary=norm=layernorm']]),
    (r'(?<!a prepared folder): run (python .*)', lambda m, a, t: [given_text(shlex.split(m[1])[1:])]),
    (r'python bench.py plot out/\*$', lambda m, a, t: [['bench.py', 'plot', str(runs.trained())]]),
    (r'--input=PATH', lambda m, a, t: [[*a, f'--input={text_file()}', '--tokenizer=bytes']]),
]


def wrong(text):
    """The flag that a message calls unknown, up to where its dashes and underscores may differ."""
    return re.match(r'--[a-z]+', text)[0]


def in_vary(argv, word):
    """The command with another value in --vary=norm=VALUE; None where it has no such flag."""
    return [re.sub(r'^(--vary=\w+=)\w+$', rf'\g<1>{word}', arg) for arg in argv] if any(
        re.match(r'--vary=norm=batchnorm', arg) for arg in argv) else None


def given_text(argv):
    """A command that names YOUR_TEXT, with a text."""
    return [word.replace('YOUR_TEXT', str(text_file())) for word in argv] + ['--tokenizer=bytes']


def text_file(name='a.txt', line='hello there\n'):
    path = runs.TMP / name
    path.write_text(300 * line)
    return path


SHORT = dict(max_iters=1, lr_decay_iters=1, warmup_iters=0, eval_tokens=64, batch_size=2, n_layer=1)


def train(*words):
    return lambda: ['train.py', *runs.toy(next(runs.names), **SHORT), *words]


def again(*words):
    """A run that is there, trained by another command."""
    return lambda: ['train.py', *runs.toy(runs.trained(), max_iters=60), *words]


def sample(*words):
    return lambda: ['sample.py', f'--out_dir={runs.trained()}', '--max_new_tokens=4', '--num_samples=1',
                    *words]


def ablate(*words):
    return lambda: ['ablate.py', *words]


def llama(*words):
    return ablate('config/llama_small.py', 'config/tiny.py', *words)


def bench(*words):
    return lambda: ['bench.py', *words]


def prepare(*words, file='a.txt', line='hello there\n'):
    return lambda: ['data/text/prepare.py', f'--input={text_file(file, line)}', '--tokenizer=bytes', *words]


def misspelt():
    """The path of a run with a letter too many."""
    return f'{runs.trained()}x'


def copied():
    """A copy of a run, to resume."""
    return shutil.copytree(runs.trained(), next(runs.names))


def metrics_alone():
    """A folder in which a run was stopped before its first checkpoint."""
    path = next(runs.names)
    path.mkdir()
    (path / 'metrics.jsonl').write_text('{"step": 1}\n')
    return path


SMALL = '--tokens=8', '--width=8', '--rounds=1'
MISTAKES = [
    train('--norn=rmsnorm'), train('--learning-rte=1e-3'), train('config/llama_smal.py', '--n_kv_head=1'),
    train('norm=rmsnorm'), train('--norm=batchnorm'), train('--n_kv_head=3'), train('--window=4'),
    train('--layer_pattern=w'), train('--decay_lr'), train('--max_iters=0'),
    train('--max_iters=ten'),
    train('--eval_tokens=5'), train('--batch_tokens=100'), train('--optimizer=adam'),
    train('--cautious_decay=True'), train('--vocab_size=10'), train('--init_from=nothing'),
        train('--min_lr=1'),
    train('--n_embd=33'), train('--dropout=1.5'), train('--schedule=cos'), train('--ffn_pattern=e'),
    train('--n_expert=4'), train('--device=gpu'), train('--dtype=fp16'), train('--block_size=100000'),
    train('--beta1=1'), train('--rope_theta=5e5'), train('--kernels=triton'), train('--n_layer'),
    train('--n_layer=2.5'), train('--n_layer', 'config/tiny.py'),
    again(), again('--init_from=resume', '--n_layer=3'), again('--init_from=resume', '--max_iters=3'),
    lambda: ['train.py', *runs.toy(next(runs.names), dataset=runs.TMP / 'new', **SHORT)],
    sample('--top_k=0'), sample('--temperature=-1'), sample('--num_samples=0'), sample('--quant=int2'),
    sample('--out_dir=nothing'), sample('--strat=x'), sample('--device=gpu'), sample('--dtype=fp16'),
    sample('--top_p=2'), sample('--draft=nothing'), sample('--kernels=all'), sample('--repetition_penalty=0'),
    llama('--vary=norm=batchnorm'), llama('--vary=nrom=layernorm'), llama('--vary=norm'), llama(),
    llama('--vary=norm=layernorm', '--match=size'), llama('--base=config/gpt2_small.py', '--arms=all'),
    llama('--vary=norm=layernorm', '--sedes=3'), llama('--vary=layer_pattern=m'), ablate(),
    llama('--vary=norm=layernorm', '--seeds=0'), llama('--vary=norm=layernorm', '--init_from=resume'),
    bench(), bench('norm', *SMALL), bench('rope', '--pos=learned'), bench('norms', '--n_layer=2', *SMALL),
    bench('norms', 'config/tiny.py', *SMALL), bench('norms', '--max_iters=2', *SMALL),
    bench('reach', '--block_size=32'), bench('reach', '--layer_pattern=wa'), bench('plot'),
    bench('norms', '--tokens=8', '--width=8', '--rounds=0'), bench('norms', '--width=x', '--rounds=1'),
    bench('norms', '--width=8', '--rounds=1', '--tokens=1,2'), bench('norms', '--device=cuda', *SMALL),
    prepare('--val_fraction=2'), lambda: ['data/text/prepare.py', f'--inptu={text_file()}',
        '--tokenizer=bytes'], prepare('--tokenizer=gtp2'),
    prepare('--tokenizer=bpe', '--vocab_size=3'), prepare(file='rows.jsonl',
        line='{"body": "hello there"}\n'),
    train('—n_layer=2'), train('--dataset='), train('--backend=mpi'),
    lambda: ['train.py', f'--out_dir={misspelt()}', '--init_from=resume'],
    lambda: train(f'--dataset={text_file("b.txt")}')(), lambda: train(str(runs.trained()))(),
    lambda: train(str(runs.dataset()))(), lambda: train()()[:1] + ['llama_small', *train()()[1:]],
    lambda: ['train.py', *runs.toy(metrics_alone(), **SHORT)],
    lambda: ['train.py', f'--out_dir={runs.trained()}', '--init_from=resume', '--eval_only=True',
             f'--dataset={runs.dataset("chars")}'],
    lambda: ['train.py', f'--out_dir={runs.trained()}', '--init_from=resume', '--step=7', '--eval_only=True'],
    lambda: ['train.py', *runs.toy(copied(), init_from='resume', batch_size=4)],
    sample('config/llama_small.py', 'config/tiny.py'), sample('--ckpt=newest.pt'),
    lambda: sample(f'--out_dir={misspelt()}')(), lambda: sample(f'--draft={misspelt()}')(),
    lambda: ['sample.py', str(runs.trained()), '--max_new_tokens=4'],
    llama('--vary=Mamba:', 'layer_pattern=m'),
    prepare('--input=https://example.com/a.txt'),
    lambda: ['data/text/prepare.py', f'--input={text_file()}', '--tokenizer=bytes', f'--out={text_file()}'],
    lambda: ['data/text/prepare.py'], lambda: ['data/text/prepare.py', str(text_file())],
]


def run(argv):
    """A Result of the command, which writes into a folder of the tests."""
    place = {'bench.py': 'figures', 'data/text/prepare.py': 'out'}.get(argv[0])
    given = any(word.startswith(f'--{place}=') for word in argv)
    if place and not given and not {'plot', 'cache'} & set(argv[1:2]):
        argv = set_to(argv, place, next(runs.names))
    if 'plot' in argv:
        argv = set_to(argv, 'figure', next(runs.names))
    return runs.python(*argv, before=PLAN_ONLY if argv[0] == 'ablate.py' else '')


def remedies(message, argv):
    return [[str(word) for word in cure] for pattern, cures in ADVICE for found in [re.search(pattern,
        message)]
            if found for cure in cures(found, argv, message)]


@pytest.mark.parametrize('mistake', MISTAKES, ids=lambda mistake: '')
def test_what_a_message_advises_works(mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = [str(word) for word in mistake()]
    new = f'--out_dir={runs.trained()}' not in argv
    refused = run(argv)
    runs.assert_refused(refused)
    message, = runs.sentences(refused)
    cures = remedies(message, argv)
    assert cures, f'{message!r} names no remedy that this test knows'
    for cure in cures:
        assert cure != argv, message
        if cure[0] == 'train.py' and new and '--init_from=resume' not in cure:
            cure = other_place(cure)  # each remedy is a run of its own
        done = run(cure)
        assert done.code == 0, f'{message}\n{shlex.join(cure)}\n{done.err}'
