"""Samples while they are drawn: the rows of one decoder, their texts and their times."""
from nanoblocks.decoding.decode import steps_on_host
from nanoblocks.hardware import synchronized_time


class Sample:
    """One continuation of a prompt. It is complete once its Generation has been streamed."""

    def __init__(self, prompt, text):
        """prompt: the text of the prompt; text: a text.Text, which turns new tokens into characters"""
        self.prompt, self._text = prompt, text
        self.logprobs = []              # of each token, at temperature 1; empty where they are not kept
        self.seconds_to_first = 0.0     # from the start to the first token of the batch
        self.seconds = 0.0              # from the first token to the last

    @property
    def text(self):
        return self._text.text

    @property
    def tokens(self):
        return self._text.tokens

    @property
    def done(self):
        return self._text.done

    @property
    def tokens_per_s(self):
        """Speed after the first token."""
        count = len(self.tokens) - 1
        return count / self.seconds if count > 0 and self.seconds > 0 else 0.0

    def add(self, token, logprob=None):
        """Add one token -> the characters that are certain now and were not returned before."""
        if logprob is not None:
            self.logprobs.append(round(logprob, 5))
        return self._text.add(token)

    def finish(self):
        """End the text -> the characters that were held back."""
        return self._text.finish()


class Generation:
    """The samples that one decoder draws side by side, one per row."""

    def __init__(self, decoder, samples):
        """decoder: a Decoder or a Speculative; samples: a Sample for each of its rows"""
        self.decoder, self.samples = decoder, samples
        self.steps = 0                  # after the first
        self.seconds = 0.0              # that these steps took together

    def stream(self):
        """Run the decoder to its end; yield the characters of the first sample as they become certain."""
        device = self.decoder.idx.device
        began = synchronized_time(device)
        for step, (tokens, logprobs) in enumerate(steps_on_host(self.decoder, device.type == 'cuda')):
            if step == 0:
                first = synchronized_time(device)
            for row, sample in enumerate(self.samples):
                if sample.done:
                    continue
                fresh = sample.add(tokens[row], logprobs[row] if logprobs else None)
                if row == 0:
                    yield fresh
                if sample.done:
                    self.decoder.done[row] = True
                    sample.seconds = synchronized_time(device) - first
            if all(sample.done for sample in self.samples):
                break
        self.steps, self.seconds = step, synchronized_time(device) - first
        for row, sample in enumerate(self.samples):
            sample.seconds_to_first = first - began
            if not sample.done:
                sample.seconds = self.seconds
            rest = sample.finish()
            if row == 0:
                yield rest
