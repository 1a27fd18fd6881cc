"""Generation: sampling, the cached step, speculative decoding, quantisation, scoring."""
