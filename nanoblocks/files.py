"""Atomic writing of small files, the root of this repository and its commit."""
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the folder of model.py and train.py


def write_json(path, value):
    """Replace a file in one step: a kill leaves the old file or the new one, never half of one."""
    with open(f'{path}.part', 'w') as f:
        json.dump(value, f, indent=1)
    os.replace(f'{path}.part', path)


def flush_folder(folder):
    """fsync a folder: file names reach the disk separately from file contents."""
    if os.name == 'posix':
        fd = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def git_commit():
    """The commit of this source, with a + if files have changed since; None outside a repository."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*'],
                                cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
