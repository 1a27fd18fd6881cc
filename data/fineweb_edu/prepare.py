"""FineWeb-Edu, web pages chosen for their educational value (Penedo et al. 2024): 10 billion tokens of it.

Streams for some hours and needs 20 GB of disk. When it is interrupted, the same command goes on where it was.
Larger parts: --config=sample-100BT, --config=sample-350BT, --config=default (1.3 trillion tokens).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import run
from data.hub import prepare

if __name__ == '__main__':
    run(lambda: prepare(__doc__, Path(__file__).parent, 'HuggingFaceFW/fineweb-edu', config='sample-10BT'))
