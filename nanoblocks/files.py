"""Files that are written whole or not at all, and where the project stands."""
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the folder of model.py and train.py


def write_json(path, value):
    with open(f'{path}.part', 'w') as f:
        json.dump(value, f, indent=1)
    os.replace(f'{path}.part', path)


def flush_folder(folder):
    """fsync a folder: the names in it reach the disk apart from the files."""
    if os.name == 'posix':
        fd = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def git_commit():
    """The commit of this source, with a + when files differ from it; None outside of a repository."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*'],
                                cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
