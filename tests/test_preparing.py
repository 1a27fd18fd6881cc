"""Preparing data: validation texts of one's own, several processes, and going on after a kill."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, documents, losses, pair, train
from test_data import (  # noqa: F401  some are fixtures
    ENDS,
    contents,
    gpt2,
    prepare,
    random_texts,
    texts_of,
    web,
)

from data.encoding import encoded_parts
from data.loader import read_meta
from data.tokenizer import ByteTokenizer, from_folder
from data.writer import write_dataset
