"""
Multiple choice, as lm-evaluation-harness scores it: each choice is a continuation of the context, and the
answer of a model is the one that it finds likeliest (https://github.com/EleutherAI/lm-evaluation-harness).

A task is a file of JSON lines:

    {"context": "Question: What is red?\\nAnswer:", "choices": ["grass", "blood"], "answer": 1}

Between context and choice stands a blank, or what "delimiter" of the line says. acc compares the sums of the
log-probabilities of the tokens, acc_norm these sums divided by the number of characters of the choice. Among
equals the first one is taken.
"""
import json
import math
import os
from typing import NamedTuple

import torch

from nanoblocks.decoding.session import check_vocabulary
from nanoblocks.tokenizer import read_text

LIKE = '{"context": "...", "choices": ["...", "..."], "answer": 0}'


class Question(NamedTuple):
    """A line of a file, in tokens."""
    line: int               # its number, from 1
    rows: list              # of each choice: the tokens of context and choice
    starts: list            # of each choice: where in its row the tokens that are scored begin
    lengths: list           # of each choice: its characters, without the delimiter
    answer: int             # which choice is right, from 0


class Task(NamedTuple):
    name: str               # of the file, without its folder and ending
    questions: list


class Accuracy(NamedTuple):
    """The result of a task: shares of right answers among `count` questions."""
    name: str
    count: int
    acc: float
    acc_norm: float

    def error(self, share):
        """The standard error of acc or acc_norm, from the sample variance; NaN for a single question."""
        return math.sqrt(share * (1 - share) / (self.count - 1)) if self.count > 1 else math.nan

    def __str__(self):
        return f'{self.name}: acc {self.acc:.4f}, acc_norm {self.acc_norm:.4f}'


# ----------------------------------------------------------------------------------------------------------
# Reading


def read_tasks(paths, model, tokenizer, setting):
    """
    The Tasks of files, given as paths with commas between them, in the tokens of a model. setting: the one
    that named them. ValueError for a line that is no question, or that the model cannot read.
    """
    config, names = model.config, {}
    if not config.causal or config.n_encoder:
        raise ValueError(f'{setting}={paths} must be left out for a model that is or has an encoder: only a '
                         'decoder says how likely a continuation is')
    limit = min(config.block_size, model.wpe.max_tokens or math.inf)
    for path in map(str.strip, paths.split(',')):
        name = os.path.splitext(os.path.basename(path))[0]
        if not os.path.isfile(path):
            raise ValueError(f'{setting}={paths} must name files with commas between them, but {path!r} is '
                             'none: make one, for example by python data/hellaswag/prepare.py')
        if name in names:
            raise ValueError(f'{setting}={paths} must name each file once, and {name} stands for two of them '
                             'in what is reported: rename one')
        names[name] = read_task(path, model, tokenizer, limit)
    return [Task(*found) for found in names.items()]


def read_task(path, model, tokenizer, limit):
    """The Questions of a file. limit: the most tokens that the model reads."""
    questions = []
    for number, text in enumerate(read_text(path).split('\n'), 1):
        if not text.strip():
            continue
        try:
            question = in_tokens(number, *parsed(text), tokenizer)
            longest = max(map(len, question.rows)) - 1      # the last token is not read
            if longest > limit:
                raise ValueError(f'it has {longest} tokens and must have at most block_size={limit}: shorten '
                                 'its context, leave it out, or take a model with a larger block_size')
            for row in question.rows:
                check_vocabulary(model, tokenizer, row, 'the text')
        except ValueError as error:
            raise ValueError(f'line {number} of {path}: {error}') from None
        questions.append(question)
    if not questions:
        raise ValueError(f'{path} must hold at least one line such as {LIKE}: name another file')
    return questions


def parsed(text):
    """The context, choices, answer and delimiter of a line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise ValueError(f'it is no JSON object and must be one such as {LIKE}: correct it')
    for key in ('context', 'choices', 'answer'):
        if key not in line:
            raise ValueError(f'it lacks "{key}" and must have it, as in {LIKE}: add it')
    context, choices, answer = line['context'], line['choices'], line['answer']
    delimiter = line.get('delimiter', ' ')
    for key, value in ('context', context), ('delimiter', delimiter):
        if not isinstance(value, str):
            raise ValueError(f'{key}={json.dumps(value)} must be a text: correct it')
    if not (isinstance(choices, list) and len(choices) > 1
            and all(isinstance(choice, str) and choice for choice in choices)):
        raise ValueError(f'choices={json.dumps(choices)[:60]} must be a list of at least two texts, none of '
                         'them empty: correct it or leave the line out')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f'answer={json.dumps(answer)} must be a whole number from 0 to {len(choices) - 1}, '
                         'the place of the right choice: correct it')
    return context, choices, answer, delimiter


def in_tokens(number, context, choices, answer, delimiter, tokenizer):
    """A Question. The errors are sentences about the line."""
    rows, starts = zip(*(row_of(context, delimiter + choice, tokenizer) for choice in choices))
    if not all(0 < start < len(row) for row, start in zip(rows, starts)):
        raise ValueError('its context and each choice must have a token of their own, and a vocabulary joins '
                         'them: give it another "delimiter"')
    return Question(number, list(rows), list(starts), list(map(len, choices)), answer)


def row_of(context, continuation, tokenizer):
    """
    (tokens of context and continuation, where those of the continuation begin). The two are tokenised as one
    text, so that the tokens are those of training; white space that ends the context belongs to the first
    word of the continuation.
    """
    kept = context.rstrip()
    if kept:
        return tokenizer.prompt(context + continuation), len(tokenizer.prompt(kept))
    continuation = context + continuation
    if tokenizer.bos is None:
        raise ValueError('its context is empty and must have a text, as no token of this vocabulary begins '
                         'one: add it')
    tokens = tokenizer.encode(continuation)
    return (tokens if tokens[:1] == [tokenizer.bos] else [tokenizer.bos, *tokens]), 1


# ----------------------------------------------------------------------------------------------------------
# Scoring


def nothing(*args, **kwargs):
    """Where nobody asked to be told."""


def accuracy(task, model, batch_size, share=(0, 1), summed=list, tell=nothing, on_answer=nothing):
    """
    The Accuracy on a Task. share: (which process this is, of how many), each of which takes every so-manieth
    question; summed: the sums of a list of numbers over them; on_answer: called with what was found of each
    question. The rest is for log_likelihoods.
    """
    rank, world = share
    if max(len(row) - 1 for q in task.questions for row in q.rows) > model.wpe.longest:
        batch_size = 1      # where the rotation depends on the length, padding would change it
    shares = [task.questions[r::world] for r in range(world)]
    # with shards, a forward pass is one of all processes
    passes = max(-(-sum(len(q.rows) for q in part) // batch_size) for part in shares)
    found = log_likelihoods(model, shares[rank], batch_size, passes, tell)
    right = [0.0, 0.0]
    for question, sums in zip(shares[rank], found):
        means = [nats / length for nats, length in zip(sums, question.lengths)]
        right = [count + (chosen(scores) == question.answer) for count, scores in zip(right, (sums, means))]
        on_answer(task=task.name, line=question.line, logprobs=sums, acc_choice=chosen(sums),
                  acc_norm_choice=chosen(means), answer=question.answer)
    return Accuracy(task.name, len(task.questions), *(count / len(task.questions) for count in summed(right)))


def chosen(scores):
    """The number of the largest score, the first among equals."""
    return max(range(len(scores)), key=scores.__getitem__)


@torch.no_grad()
def log_likelihoods(model, questions, batch_size, passes=0, tell=nothing):
    """
    Of each question, the log-likelihood of each choice given the context, in nats.

    batch_size      choices that run together; the shorter are padded at their end, which no token before it
                    sees; of about the same length, so that little is padded
    passes          forward passes to make at least: those beyond the questions count for nothing
    tell            called after each of them, with the part that is done
    """
    places = [(n, c) for n, question in enumerate(questions) for c in range(len(question.rows))]
    places.sort(key=lambda place: len(questions[place[0]].rows[place[1]]), reverse=True)
    found = [[0.0] * len(question.rows) for question in questions]
    passes, training = max(passes, -(-len(places) // batch_size)), model.training
    model.eval()
    for number in range(passes):
        batch = places[number * batch_size:(number + 1) * batch_size]
        rows = [questions[n].rows[c] for n, c in batch] or [[0, 0]]
        starts = [questions[n].starts[c] for n, c in batch] or [1]
        for (n, c), nats in zip(batch, scores_of(model, rows, starts)):
            found[n][c] = nats
        tell((number + 1) / passes)
    model.train(training)
    return found


def scores_of(model, rows, starts):
    """Lists of tokens, and where in each the scored ones begin -> the sum of their log-probabilities."""
    device, width = model.lm_head.weight.device, max(map(len, rows)) - 1
    idx = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in rows], device=device)
    logits = model(idx)[0]
    # where the token before each scored one stands; only these logits are needed in fp32
    place = torch.tensor([(b, t - 1) for b, row in enumerate(rows) for t in range(starts[b], len(row))])
    wanted = torch.tensor([token for row, start in zip(rows, starts) for token in row[start:]], device=device)
    logits = logits[tuple(place.T.to(device))].float()
    logprobs = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    counts = [len(row) - start for row, start in zip(rows, starts)]
    return [math.fsum(part.tolist()) for part in logprobs.cpu().split(counts)]
