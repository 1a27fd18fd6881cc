"""From text to batches: tokenizers, the writer and the loader of token files, and one folder per dataset."""
