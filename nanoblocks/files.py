"""The root of this repository and its commit; and how files are written, which data/files.py knows."""
import subprocess
from pathlib import Path

from configurator import own_module

own = own_module('data.files')
Lock, flush_file, flush_folder = own.Lock, own.flush_file, own.flush_folder
replace_file, write_json = own.replace_file, own.write_json

ROOT = Path(__file__).resolve().parents[1]  # the folder of model.py and train.py


def git_commit():
    """The commit of this source, with a + if files have changed since; None outside a repository."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*'],
                                cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
