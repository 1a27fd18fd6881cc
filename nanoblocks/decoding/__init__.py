"""
Generation. session.py is the way in; below it:

    decode        which tokens may be drawn, and the loop of cached steps
    speculative   the same loop with a small model that drafts
    generation    samples while they are drawn
    text          tokens to text, stops, prompts from files
    scoring       how likely a text is
    quantize      weights of 8 or 4 bits, or packed for a CPU
    console       what sample.py prints and writes
"""
