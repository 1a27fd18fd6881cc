"""OpenWebText, the open copy of GPT-2's training text: 8 million documents, about 9 billion tokens.

Streams for some hours and needs 18 GB of disk. When it is interrupted, the same command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import run
from data.hub import prepare

if __name__ == '__main__':
    run(lambda: prepare(__doc__, Path(__file__).parent, 'Skylion007/openwebtext'))
