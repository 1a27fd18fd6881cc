"""
Multiple choice: log-likelihoods and accuracies are those of transformers on the export, in one process and in
several; what a file may hold; what the prepare.py's write.
"""
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import build, every_decoder_alone, scaled
from conftest import toy as toy_flags
from runs import assert_refused, assert_same_run, dataset, flags, metrics, pair, python, toy, train, trained
from test_data import prepare
from test_logging import OFFLINE, history, wandb_files
from test_pretrained_texts import TOKENIZERS
from test_tokenizers import CORPUS, KINDS, written

from data.tokenizer import ByteTokenizer, HFTokenizer
from model import GPT
from nanoblocks.decoding.session import Session
from nanoblocks.decoding.tasks import Accuracy, Question, Task, accuracy, log_likelihoods, read_tasks
from nanoblocks.training.checkpoint import contents, save

LLAMA = dict(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, block_size=64)


def lines_of(count, seed=0, empty=True):
    """Questions of words of CORPUS, in which blanks, bytes and lengths decide between ways of counting."""
    rng, words = np.random.default_rng(seed), ' '.join(CORPUS[1:3]).replace(',', '').split()
    lines = []
    for n in range(count):
        context = ' '.join(rng.choice(words, rng.integers(1, 6))) + ['', ' ', '\n', '  ', ''][n % 5]
        choices = [' '.join(rng.choice(words, rng.integers(1, 4))) for _ in range(rng.integers(2, 5))]
        line = {'context': context, 'choices': choices, 'answer': int(rng.integers(len(choices)))}
        lines.append(line | ({'delimiter': ''} if n % 4 == 1 else {}))
    if empty:
        lines += [line | {'context': ''} for line in lines[:3]] + [lines[0] | {'context': '  '}]
    return lines


def file_of(folder, lines, name='words'):
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n\n' for line in lines), encoding='utf-8')
    return path


@torch.no_grad()
def by_transformers(folder, lines):
    """[(log-likelihoods, acc, acc_norm)] of a folder's model and tokenizer, one by one, in float64."""
    transformers = pytest.importorskip('transformers', reason='loads the export')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), []
    for line in lines:
        sums = []
        for choice in line['choices']:
            context, rest = line['context'], line.get('delimiter', ' ') + choice
            while context and context[-1].isspace():
                context, rest = context[:-1], context[-1] + rest
            if context:
                before, tokens = tokenizer(context).input_ids, tokenizer(context + rest).input_ids
            else:
                before = [tokenizer.bos_token_id]
                tokens = before + tokenizer(rest, add_special_tokens=False).input_ids
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[t - 1, tokens[t]].item() for t in range(len(before), len(tokens))))
        means = np.array(sums) / [len(choice) for choice in line['choices']]
        found.append((sums, np.argmax(sums) == line['answer'], np.argmax(means) == line['answer']))
    return found


def exported(folder, kind):
    """A folder in Hugging Face format of a tiny model with this kind of tokenizer: published, or of a run."""
    if kind in KINDS:
        ours, library = written(folder, kind, tokenizer_config={'bos_token': '<s>' if kind == 'byte_fallback'
                                                                else '<|begin|>', 'eos_token': '<|end|>'})
        model = scaled(build(toy_flags(**LLAMA, vocab_size=library.get_vocab_size())), 8)
        tokenizer = HFTokenizer((folder / 'tokenizer.json').read_text(), ours.eot, ours.ends, ours.bos)
    else:
        tokenizer = TOKENIZERS[kind]()
        model = scaled(build(toy_flags(**LLAMA, vocab_size=tokenizer.vocab_size)), 8)
    run = folder.with_name('run')
    run.mkdir()
    save(str(run / 'ckpt.pt'), contents(model, settings={}, meta={'tokenizer': tokenizer.meta()}, step=3))
    GPT.from_pretrained(run).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize('kind', [*KINDS, *TOKENIZERS])
def test_every_log_likelihood_is_that_of_transformers(kind, tmp_path):
    folder = exported(tmp_path / 'hf', kind)
    lines = lines_of(24, empty=kind != 'chars')     # of which no token begins a text
    want = by_transformers(folder, lines)
    path, rows = file_of(tmp_path, lines), []
    for place in dict(init_from=folder), dict(out_dir=tmp_path / 'run'):
        session = Session.load(**place, device='cpu', dtype='float32')
        task, = read_tasks(str(path), session.model, session.tokenizer, 'tasks')
        result = accuracy(task, session.model, 7, on_answer=lambda **row: rows.append(row))
        assert (result.name, result.count) == ('words', len(lines))
        assert [row['line'] for row in rows] == list(range(1, 2 * len(lines), 2))
        for row, (sums, *_) in zip(rows, want):
            assert row['logprobs'] == pytest.approx(sums, abs=2e-3, rel=1e-5)
        assert result.acc == np.mean([right for _, right, _ in want])
        assert result.acc_norm == np.mean([right for *_, right in want])
        assert any(row['acc_choice'] != row['acc_norm_choice'] for row in rows)
        rows.clear()


@every_decoder_alone
def test_a_choice_has_the_score_that_it_has_alone(flags):
    model, rng = scaled(build(flags), 3), np.random.default_rng(1)
    rows = [rng.integers(0, flags['vocab_size'], n).tolist() for n in (12, 3, 7, 5, 8, 2)]
    questions = [Question(1, rows[:4], [5, 1, 6, 4], [1] * 4, 0), Question(2, rows[4:], [3, 1], [1] * 2, 1)]
    together = log_likelihoods(model, questions, 4)
    for question, sums in zip(questions, together):
        for row, start, nats in zip(question.rows, question.starts, sums):
            logprobs = model(torch.tensor([row]))[0][0].log_softmax(-1)
            alone = sum(logprobs[t - 1, row[t]].item() for t in range(start, len(row)))
            assert nats == pytest.approx(alone, rel=2e-4, abs=2e-4)


def test_where_the_rotation_depends_on_the_length_nothing_is_padded():
    model = scaled(build(toy_flags(**LLAMA | dict(rope_scaling='dynamic', rope_factor=4.0, rope_context=6),
                                   vocab_size=20)), 8)
    rows = [list(range(12)), [3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14]]
    question, found = Question(1, rows, [1, 1, 1], [1] * 3, 0), []
    accuracy(Task('one', [question]), model, 3, on_answer=lambda **row: found.extend(row['logprobs']))
    alone = [log_likelihoods(model, [Question(1, [row], [1], [1], 0)], 1)[0][0] for row in rows]
    assert found == pytest.approx(alone, rel=1e-5)
    assert log_likelihoods(model, [question], 3)[0] != pytest.approx(alone, rel=1e-4)


def test_the_first_of_equals_is_taken_and_length_is_in_characters():
    class Sums(GPT):
        """Every token has the same probability, so that a choice's sum is a matter of its length."""
        def forward(self, idx, *args, **kwargs):
            return torch.zeros(*idx.shape, 257), None
    model = build(toy_flags(vocab_size=257))
    model.__class__ = Sums
    def right(choices, answer):
        line = {'context': 'a', 'choices': choices, 'answer': answer, 'delimiter': ''}
        questions = Question(1, [[97, *choice.encode()] for choice in choices], [1] * len(choices),
                             list(map(len, choices)), line['answer'])
        result = accuracy(Task('one', [questions]), model, 2)
        return result.acc, result.acc_norm
    assert right(['bc', 'de'], 0) == (1, 1) and right(['bc', 'de'], 1) == (0, 0)
    # the longer in characters has as many bytes to the character, or more
    assert right(['bcd', 'de'], 1) == (1, 0) and right(['bcd', 'de'], 0) == (0, 1)
    assert right(['é', 'bc'], 1) == (0, 1) and right(['é', 'bc'], 0) == (1, 0)


@pytest.mark.parametrize('right', [[1, 0, 0, 1, 1], [0, 0, 1], [1, 1]])
def test_the_standard_error_is_that_of_a_mean(right):
    result = Accuracy('a', len(right), sum(right) / len(right), 0.0)
    assert result.error(result.acc) == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert math.isnan(Accuracy('a', 1, 1.0, 1.0).error(1.0))


# ----------------------------------------------------------------------------------------------------------
# The commands


SHORT = dict(max_iters=4, lr_decay_iters=4, eval_interval=2, eval_tokens=64, block_size=64, log_interval=2,
             batch_size=4, dtype='float32', gradient_accumulation_steps=2)


def accuracies(out_dir, name='words'):
    return [(line[f'{name}/acc'], line[f'{name}/acc_norm']) for line in metrics(out_dir)
            if 'val_loss' in line]


@pytest.fixture(scope='module')
def questions(tmp_path_factory):
    """Two files, one with a single question; the words of the toy dataset are not those of the first."""
    folder = tmp_path_factory.mktemp('tasks')
    one = [{'context': 'a', 'choices': ['b', 'c', 'd'], 'answer': 1}]
    return f'{file_of(folder, lines_of(23))},{file_of(folder, one, "one")}'


def test_an_evaluation_scores_tasks_and_changes_nothing_else(tmp_path, questions):
    out_dir, printed = train(tmp_path / 'run', **SHORT, eval_tasks=questions)
    found = accuracies(out_dir)
    assert len(found) == 3 and len(accuracies(out_dir, 'one')) == 3
    for step, (acc, norm) in zip((0, 2, 4), found):
        assert f'step {step}: words: acc {acc:.4f}, acc_norm {norm:.4f}\n' in printed
    assert all(acc in (0, 1) for acc, _ in accuracies(out_dir, 'one'))
    assert_same_run(trained(**SHORT), out_dir)
    # what sample.py finds in the same weights, and writes
    done = python('sample.py', *flags(out_dir=out_dir, ckpt='ckpt.pt', tasks=questions, device='cpu',
                                      dtype='float32', out=tmp_path / 'out.jsonl', batch_size=3))
    assert done.code == 0 and not done.err, done
    table = {row[0]: row[1:] for row in map(str.split, done.out.splitlines()[2:])}
    acc, norm = found[-1]
    error, error_norm = (math.sqrt(share * (1 - share) / 26) for share in (acc, norm))
    assert table['words'] == ['27', *(f'{x:.4f}' for x in (acc, error, norm, error_norm))]
    assert table['one'][0] == '1' and table['one'][2] == 'nan'
    rows = list(map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines()))
    assert len(rows) == 28 and acc == np.mean([row['acc_choice'] == row['answer'] for row in rows[:-1]])
    # and what is evaluated alone
    done = python('train.py', *flags(out_dir=out_dir, init_from='resume', eval_only=True,
                                     eval_tasks=questions))
    assert done.code == 0 and f'step 4: words: acc {acc:.4f}, acc_norm {norm:.4f}\n' in done.out, done


def test_accuracies_go_to_weights_and_biases(tmp_path, questions):
    pytest.importorskip('wandb')
    done = python('train.py', *toy(tmp_path / 'run', **SHORT, eval_tasks=questions, wandb_log=True,
                                   wandb_samples=0), env=OFFLINE)
    assert done.code == 0, done
    rows = [row for row in history(wandb_files(tmp_path / 'run')[0]) if 'words/acc' in row]
    assert [(row['words/acc'], row['words/acc_norm']) for row in rows] == accuracies(tmp_path / 'run')


@pytest.mark.parametrize('settings', [{}, dict(shard=True), dict(context_parallel=True, pos='rope')],
                         ids=['ddp', 'fsdp', 'ring'])
def test_two_processes_score_as_one_does(tmp_path, questions, settings):
    """Of the file with a single question, one process has none."""
    done = pair(*toy(tmp_path / 'two', **SHORT | settings, eval_tasks=questions))
    assert [result.code for result in done] == [0, 0], done
    settings.pop('shard', None), settings.pop('context_parallel', None)
    one, _ = train(tmp_path / 'one', **SHORT | settings, eval_tasks=questions)
    for name in 'words', 'one':
        assert accuracies(tmp_path / 'two', name) == accuracies(one, name)
    assert done[0].out.count('step 4: words: acc') == 1 and 'words' not in done[1].out


def test_processes_with_fewer_choices_make_as_many_passes(tmp_path):
    """As shards need; and the sums of the shares are those of the whole."""
    model, passes = scaled(build(toy_flags(**LLAMA, vocab_size=257)), 8), {}
    task, = read_tasks(str(file_of(tmp_path, lines_of(11))), model, ByteTokenizer(), 'tasks')
    whole, sums = accuracy(task, model, 2), np.zeros(2)
    for rank in range(4):
        def summed(right):
            nonlocal sums
            sums += right
            return right
        done = []
        accuracy(task, model, 2, (rank, 4), summed, done.append)
        passes[rank] = len(done)
        assert done[-1] == 1
    rows = [sum(len(question.rows) for question in task.questions[rank::4]) for rank in range(4)]
    assert set(passes.values()) == {-(-max(rows) // 2)} and -(-min(rows) // 2) not in passes.values()
    assert tuple(sums / len(task.questions)) == (whole.acc, whole.acc_norm)


# ----------------------------------------------------------------------------------------------------------
# What is refused

GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 0}'


@pytest.mark.parametrize('line, sentence', [
    ('oops', 'line 3 of FILE: it is no JSON object and must be one such as {"context": "...", "choices"'),
    ('[1]', 'line 3 of FILE: it is no JSON object'),
    ('{"context": "a", "answer": 0}', 'line 3 of FILE: it lacks "choices" and must have it'),
    ('{"choices": ["a", "b"], "answer": 0}', 'line 3 of FILE: it lacks "context"'),
    ('{"context": "a", "choices": ["b", "c"]}', 'line 3 of FILE: it lacks "answer"'),
    ('{"context": 3, "choices": ["b", "c"], "answer": 0}', 'line 3 of FILE: context=3 must be a text'),
    (GOOD[:-1] + ', "delimiter": null}', 'line 3 of FILE: delimiter=null must be a text'),
    (GOOD.replace('["b", "c"]', '[]'), 'line 3 of FILE: choices=[] must be a list of at least two texts'),
    (GOOD.replace('"c"', '""'), 'line 3 of FILE: choices=["b", ""] must be a list of at least two texts'),
    (GOOD.replace('"c"', '4'), 'line 3 of FILE: choices=["b", 4] must be'),
    (GOOD.replace('["b", "c"]', '"bc"'), 'line 3 of FILE: choices="bc" must be'),
    (GOOD.replace('0', '2'), 'line 3 of FILE: answer=2 must be a whole number from 0 to 1'),
    (GOOD.replace('0', '-1'), 'answer=-1 must be'), (GOOD.replace('0', '"0"'), 'answer="0" must be'),
    (GOOD.replace('0', 'true'), 'answer=true must be'),
    (GOOD.replace('"a"', f'"{"a" * 30}"'), 'line 3 of FILE: it has 31 tokens and must have at most '
     'block_size=30: shorten its context'),
    (GOOD.replace('"b"', f'"{"b" * 99}"'), 'it has 100 tokens and must have at most block_size=30'),
])
def test_a_line_that_is_no_question_is_named(tmp_path, line, sentence):
    model, path = build(toy_flags(vocab_size=257, block_size=30)), tmp_path / 'some.jsonl'
    path.write_text(f'{GOOD}\n\n{line}\n')
    with pytest.raises(ValueError) as refused:
        read_tasks(str(path), model, ByteTokenizer(), 'tasks')
    message = str(refused.value)
    assert sentence.replace('FILE', str(path)) in message and '\n' not in message


def test_the_longest_question_fits_exactly(tmp_path):
    """Its last token is scored, and not read."""
    model = scaled(build(toy_flags(vocab_size=257, block_size=30, pos='learned')), 3)
    for length, fits in (28, True), (29, False):
        path = file_of(tmp_path, [json.loads(GOOD) | {'context': 'a' * length, 'choices': ['b', 'cc'][:2],
                                                      'delimiter': ''}])
        if fits:
            task, = read_tasks(str(path), model, ByteTokenizer(), 'tasks')
            assert max(map(len, task.questions[0].rows)) == 30
            assert accuracy(task, model, 2).count == 1
    path = file_of(tmp_path, [json.loads(GOOD) | {'context': 'a' * 29, 'choices': ['bb', 'cc'],
                                                  'delimiter': ''}])
    task, = read_tasks(str(path), model, ByteTokenizer(), 'tasks')
    assert len(task.questions[0].rows[0]) == 31 and accuracy(task, model, 2).count == 1


def test_files_that_cannot_be_scored_are_refused_before_the_first_step(tmp_path, questions):
    (tmp_path / 'empty.jsonl').write_text('\n')
    (tmp_path / 'bad.jsonl').write_text(f'{GOOD}\n{GOOD.replace("0", "7")}\n')
    for value, words in [(tmp_path / 'none.jsonl', ['none.jsonl', 'data/hellaswag/prepare.py']),
                         (f'{questions},', ["'' is none"]), (tmp_path / 'empty.jsonl', ['at least one line']),
                         (f'{tmp_path / "bad.jsonl"}', [f'line 2 of {tmp_path / "bad.jsonl"}', 'answer=7']),
                         (f'{questions},{questions}', ['words stands for two'])]:
        assert_refused(python('train.py', *toy(tmp_path / 'run', **SHORT, eval_tasks=value)), *words)
        assert_refused(python('sample.py', *flags(out_dir=trained(**SHORT), tasks=value)), *words)
    done = python('train.py', *toy(tmp_path / 'run', **SHORT | dict(causal=False, objective='mask'),
                                   eval_tasks=questions))
    assert_refused(done, 'eval_tasks=', 'only a decoder')
    done = python('sample.py', *flags(out_dir=trained(**SHORT), tasks=questions, start='a'))
    assert_refused(done, 'start and tasks must not be set together')
    path = questions.split(',')[0]
    assert_refused(python('sample.py', *flags(out_dir=trained(**SHORT), tasks=path, out=path)), 'must not be')


def test_letters_that_a_vocabulary_lacks_and_texts_without_a_beginning_are_named(tmp_path):
    out_dir = trained(dataset=dataset('chars'), max_iters=1, lr_decay_iters=1, warmup_iters=0, eval_tokens=64)
    for line, words in ({'context': 'a', 'choices': ['b', '漢']}, ['漢', 'line 1 of']), (
            {'context': '', 'choices': ['b', 'a']}, ['its context is empty', 'line 1 of']):
        path = file_of(tmp_path, [line | {'answer': 0}])
        assert_refused(python('sample.py', *flags(out_dir=out_dir, tasks=path, device='cpu')), *words)


# ----------------------------------------------------------------------------------------------------------
# Preparing

ROWS = {
    'hellaswag': (
        {'ind': 24, 'activity_label': 'Roof shingle removal', 'ctx_a': 'A man is [header] on a roof.',
         'ctx_b': 'he [step] starts', 'endings': ['to  pull. [title] Up', 'b', 'c', 'd'], 'label': '3'},
        {'context': 'Roof shingle removal: A man is on a roof. He starts',
         'choices': ['to pull.. Up', 'b', 'c', 'd'], 'answer': 3}),
    'arc': (
        {'id': 'x', 'question': 'Which is red?', 'choices': {'text': ['grass', 'blood'], 'label': ['1', '2']},
         'answerKey': '2'},
        {'context': 'Question: Which is red?\nAnswer:', 'choices': ['grass', 'blood'], 'answer': 1}),
    'piqa': ({'goal': 'Boil an egg', 'sol1': 'in water', 'sol2': 'in é', 'label': 0},
             {'context': 'Question: Boil an egg\nAnswer:', 'choices': ['in water', 'in é'], 'answer': 0})}
NAMES = {'hellaswag': 'hellaswag', 'arc': 'arc_easy', 'piqa': 'piqa'}


@pytest.mark.parametrize('name', ROWS)
def test_rows_of_the_hub_become_lines(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip('datasets')
    row, line = ROWS[name]
    unanswered = {'hellaswag': row | {'label': ''}, 'piqa': row | {'label': -1}}.get(name)
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(x) for x in (row, unanswered, row) if x))
    given = f'--input={tmp_path / "rows.jsonl"}', f'--out={tmp_path / "out"}'
    assert prepare(monkeypatch, name, *given) is None
    path = tmp_path / 'out' / f'{NAMES[name]}.jsonl'
    assert list(map(json.loads, path.read_text(encoding='utf-8').splitlines())) == [line] * 2
    printed = capsys.readouterr().out
    assert f'2 questions in {path}' in printed
    assert ('passed over: 1 row without an answer' in printed) == (unanswered is not None)
    task, = read_tasks(str(path), build(toy_flags(vocab_size=257, block_size=99)), ByteTokenizer(), 'tasks')
    assert task.name == NAMES[name] and len(task.questions) == 2
    message = prepare(monkeypatch, name, *given)
    assert f'overwrite=False must be True to replace {path}' in message and '\n' not in message
    assert prepare(monkeypatch, name, *given, '--overwrite=True') is None


def test_the_hub_is_asked_for_the_split(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    asked = []
    def load(repo, config, revision, split, streaming):
        asked.append((repo, config, split))
        return [ROWS['arc'][0]]
    monkeypatch.setattr('datasets.load_dataset', load)
    for more in [], ['--config=ARC-Challenge', '--split=validation']:
        assert prepare(monkeypatch, 'arc', f'--out={tmp_path}', *more) is None
    assert asked == [('allenai/ai2_arc', 'ARC-Easy', 'test'),
                     ('allenai/ai2_arc', 'ARC-Challenge', 'validation')]
    assert {path.name for path in tmp_path.glob('*.jsonl')} == {'arc_easy.jsonl', 'arc_challenge.jsonl'}


def test_rows_of_another_dataset_are_named(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    (tmp_path / 'rows.jsonl').write_text(json.dumps(ROWS['piqa'][0]))
    message = prepare(monkeypatch, 'hellaswag', f'--input={tmp_path / "rows.jsonl"}', f'--out={tmp_path}')
    assert re.search(r"row 1 .*'activity_label'.* columns goal, sol1, sol2, label: pass", message)
