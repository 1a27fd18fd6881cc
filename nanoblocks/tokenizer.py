"""data/tokenizer.py, also where a user has a package of his own that is named data."""
import sys

from configurator import own_module

sys.modules[__name__] = own_module('data.tokenizer')
