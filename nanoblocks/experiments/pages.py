"""The page of a topic of bench.py: what it ran, its verdict, figure and tables, in Markdown for results/."""
import shlex
from pathlib import Path

from nanoblocks.experiments.arms import config_of
from nanoblocks.experiments.figures import have_matplotlib
from nanoblocks.experiments.report import step_tokens, table
from nanoblocks.experiments.sweep import machine
from nanoblocks.experiments.timing import print_table
from nanoblocks.formats import counted


def size_of(plan):
    """The size of a sweep's runs in a few words, for those in which all arms agree."""
    flags = plan['arms'][plan['reference']]
    config = config_of(flags)
    tokens = step_tokens(flags, config)
    return (f'{counted(len(plan["seeds"]), "seed")}, {counted(flags["max_iters"], "step")} of '
            f'{counted(tokens, "token")} of {flags["dataset"]}, {config.n_embd} wide')


def signed(e, digits=3):
    """An Effect as a cell: its mean and the half of its 95 % interval, where there is one."""
    return f'{e.mean:+.{digits}f}' + (f' ± {e.half:.{digits}f}' if e.n > 1 else '')


def command_of(topic, argv):
    """The command line of a topic of bench.py, for its page."""
    return shlex.join(['python', 'bench.py', topic, *argv])


def tell(folder, title, argv, about, verdict, tables, limits):
    """
    Print the tables and the verdict, and write all into README.md of `folder`, which is called after its
    topic, beside the figure of that name. about, verdict, limits: lists of sentences; tables: {caption:
    (heads, rows)}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for caption, (heads, rows) in tables.items():
        print(f'\n{caption}')
        print_table(heads, rows)
    print(*verdict, sep='\n')
    lines = [f'# {title}', '', *about, '', '```', command_of(folder.name, argv), '```', '',
             f'Machine: {machine()}.', '', *(f'- {line}' for line in verdict),
             *['', f'![{title}]({folder.name}.png)'] * have_matplotlib()]
    for caption, (heads, rows) in tables.items():
        lines += ['', f'## {caption}', '', *table(heads, rows)]
    lines += ['', '## What this does not show', '', *(f'- {line}' for line in limits), '']
    (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
    print(f'written: {folder / "README.md"}')
