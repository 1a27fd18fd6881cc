"""What sample.py prints and writes: samples as they arrive, scores, and how fast it went."""
import itertools
import json
from contextlib import contextmanager, nullcontext

from nanoblocks.decoding.session import Prompt
from nanoblocks.decoding.tasks import accuracy, read_tasks
from nanoblocks.formats import counted
from nanoblocks.hardware import bytes_per_step, read_bandwidth, synchronized_time


class Console:
    """Runs a Session for a terminal: one method per mode of sample.py."""

    def __init__(self, session, out='', quant='none', bandwidth=False):
        """
        out: a file for JSON lines, one per sample; quant: none, or int8 or int4 to round the weights
        beforehand; bandwidth: compare a step with the time of reading its bytes from memory
        """
        self.session, self.out, self.quant, self.bandwidth = session, out, quant, bandwidth
        self.file = None                # the open file, while `running`
        self.last = None                # the Generation shown last
        self.hit_limit = False          # whether learned positions ended a sample

    def samples(self, texts, path=None):
        """Continue each text. path: the file that holds the texts; None: there is one, the setting start."""
        fills = self.session.fills
        prompts = {n: self.session.encode(text, f'prompt {n + 1} of {path}' if path else 'start')
                   for n, text in enumerate(texts) if not fills(text)}
        with self.running():
            if fills() and texts:
                print(f'trained with objective={self.session.objective}: it fills each [MASK], or continues '
                      'a text without one')
            # neighbours that are continued run together
            for missing, group in itertools.groupby(range(len(texts)), lambda n: fills(texts[n])):
                group = list(group)
                if missing:
                    self.fill(texts, group)
                    continue
                first = group[0] * self.session.num_samples
                for generation in self.session.generations([prompts[n] for n in group], first):
                    self.show(generation)

    def fill(self, texts, numbers):
        """The texts of these numbers with what is missing in the place of [MASK]."""
        for n in numbers:
            for filled, tokens in self.session.fill(texts[n], n * self.session.num_samples):
                print(f'{filled}\n---------------')
                self.write(prompt=texts[n], text=filled, tokens=tokens)

    def interactive(self):
        """Continue each line that is typed, until the end of the input. Ctrl-C ends a sample."""
        with self.running():
            for n, line in enumerate(typed_lines()):
                try:
                    if self.session.fills(line):
                        print(*(text for text, _ in self.session.fill(line)), sep='\n')
                        continue
                    prompts = [self.session.encode(line)]
                    for generation in self.session.generations(prompts, n * self.session.num_samples):
                        self.show(generation)
                except ValueError as error:
                    print(error)
                except KeyboardInterrupt:
                    print()

    def score(self, text):
        """Print how likely a text is."""
        tokens = self.session.tokens_to_score(text)
        with self.running(tokens):
            score = self.session.score_tokens(tokens)
            kind = '' if self.session.model.config.causal else 'pseudo-'  # each token given all others
            print(f'{counted(len(score.logprobs), "token")}, {counted(score.bytes, "byte")}: '
                  f'{kind}log-likelihood {score.nats:.3f} nats, perplexity {score.perplexity:.3f} per token, '
                  f'{score.bits_per_byte:.4f} bits per byte')
            self.write(text=text, tokens=tokens, logprobs=score.logprobs, bits_per_byte=score.bits_per_byte)

    def tasks(self, paths):
        """Print how many questions of files of multiple choice are answered right."""
        session = self.session
        found = read_tasks(paths, session.model, session.tokenizer, 'tasks')
        width = max(len('task'), *(len(task.name) for task in found))
        with self.running():
            print(f'{"task":{width}}  questions     acc  +- error  acc_norm  +- error')
            for task in found:
                result = accuracy(task, session.model, session.batch_size, on_answer=self.write)
                print(f'{task.name:{width}}  {result.count:9,}  {result.acc:6.4f}  '
                      f'{result.error(result.acc):8.4f}  {result.acc_norm:8.4f}  '
                      f'{result.error(result.acc_norm):8.4f}', flush=True)

    @contextmanager
    def running(self, tokens=None):
        """Open the file, name the model, round its weights; then print the summary. tokens: for the cost."""
        with open(self.out, 'w', encoding='utf-8') if self.out else nullcontext() as self.file:
            if self.session.source:
                print(self.session.source)
            if self.quant != 'none':
                cost = self.session.quantize(tokens, self.quant)
                print(cost_line(cost, 'the text' if tokens else 'its own text'))
            self.session.pack()
            yield
        if self.last and self.last.steps and self.last.decoder.cache is not None:
            print(draft_line(self.session, self.last) if self.session.draft else
                  step_line(self.last, self.bandwidth))
        if self.hit_limit:
            print(f'stopped at block_size={self.session.position_limit}, where learned positions end; '
                  'a model with pos=rope has no such limit')

    def show(self, generation):
        """Draw the samples of a Generation; print the first as it arrives, the others when all are done."""
        print(generation.samples[0].prompt, end='', flush=True)
        for characters in generation.stream():
            print(characters, end='', flush=True)
        print()
        for n, sample in enumerate(generation.samples):
            if n > 0:
                print(sample.prompt + sample.text)
            print(f'--------------- {counted(len(sample.tokens), "token")}, the first after '
                  f'{sample.seconds_to_first:.3f} s, then {sample.tokens_per_s:.1f} tokens/s')
            self.write(prompt=sample.prompt, text=sample.text, tokens=sample.tokens, logprobs=sample.logprobs)
        self.last = generation
        room = generation.decoder.max_new_tokens
        self.hit_limit |= generation.steps + 1 == room < self.session.max_new_tokens

    def write(self, **row):
        if self.file:
            self.file.write(json.dumps(row, ensure_ascii=False) + '\n')
            self.file.flush()


def typed_lines():
    """Lines as they are typed, without empty ones, until the end of the input or Ctrl-C."""
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def cost_line(cost, text):
    """What rounded weights cost and save."""
    rounded = ', activations rounded to bfloat16' if cost.bf16_activations else ''
    return (f'{cost.kind}: {cost.bpb:.4f} bits per byte on {counted(cost.n_tokens, "token")} of {text}, '
            f'{cost.bpb - cost.bpb_before:+.4f} against {cost.dtype}{rounded}; a step reads '
            f'{cost.bytes / 1e6:.1f} MB of weights instead of {cost.bytes_before / 1e6:.1f} MB')


def step_line(generation, with_bandwidth):
    """How long a step took; with_bandwidth: against the time of reading its bytes from memory."""
    decoder, steps, rows = generation.decoder, generation.steps, len(generation.samples)
    tokens = sum(len(sample.tokens) for sample in generation.samples) - rows
    line = (f'{counted(rows, "row")} together: {counted(tokens, "token")} in {counted(steps, "step")} of '
            f'{generation.seconds / steps * 1e3:.2f} ms')
    if not with_bandwidth:
        return line
    size = bytes_per_step(decoder.model, decoder.cache, rows)
    bandwidth = read_bandwidth(min(size, 2 ** 29), decoder.idx.device, rounds=2)
    return (f'{line}; reading {size / 1e6:.2f} MB per step uses '
            f'{size * steps / generation.seconds / bandwidth:.0%} of the measured {bandwidth / 1e9:.1f} GB/s')


def draft_line(session, generation):
    """How much of the draft was accepted, and the speed compared with a few steps without a draft."""
    decoder, steps = generation.decoder, generation.steps
    line = (f'draft: {decoder.accepted / max(1, decoder.proposed):.0%} of its tokens accepted, '
            f'{(steps + 1) / decoder.rounds:.2f} tokens per round')
    plain = session.decoder([Prompt(decoder.idx[0].tolist(), '')], min(64, decoder.max_new_tokens))
    stamps = [synchronized_time(session.device) for _ in plain.stream()]
    # the first round, and without a draft the first step after the prompt, only warm up
    if decoder.rounds > 1 and len(stamps) > 2:
        rate = (steps + 1 - decoder.first_round) / generation.seconds
        line += f', {rate * (stamps[-1] - stamps[1]) / (len(stamps) - 2):.2f}x the speed without a draft'
    return line
