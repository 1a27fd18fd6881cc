"""
Session as a notebook uses it, and the Console that sample.py puts around it; no process is started.

Most models here are parrots (see test_sample): they repeat a given text for ever.
"""
import math

import pytest
import torch
from conftest import build, scaled, toy
from test_sample import parrot, rows_of

from data.tokenizer import ByteTokenizer
from nanoblocks.decoding.console import Console
from nanoblocks.decoding.decode import Decoder, Sampling
from nanoblocks.decoding.session import Session
from nanoblocks.training import checkpoint

GREEDY = Sampling(temperature=0)


def session_of(model_seed=1, draft_seed=None, **settings):
    """A Session of a random model of bytes, with a random draft if there is a seed for it."""
    flags = toy(pos='rope', vocab_size=257)
    draft = None if draft_seed is None else scaled(build(flags, seed=draft_seed), 10)
    return Session(scaled(build(flags, seed=model_seed), 10), ByteTokenizer(), draft=draft,
                   **dict(max_new_tokens=12) | settings)


def texts_of(samples):
    return [sample.text for sample in samples]


# ----------------------------------------------------------------------------------------------------------
# Continuing texts


def test_a_run_is_loaded_and_continues_a_text(tmp_path):
    session = Session.load(out_dir=parrot(tmp_path, 'abc'), device='cpu', max_new_tokens=5)
    one, = session.sample('xa')
    assert (one.prompt, one.text, one.tokens, one.done) == ('xa', 'bcabc', [*b'bcabc'], True)
    assert len(one.logprobs) == 5 and max(one.logprobs) <= 0
    assert one.seconds_to_first > 0 and one.tokens_per_s > 0


def test_a_sample_has_the_tokens_of_the_plain_loop():
    session = session_of(sampling=Sampling(0.9, top_k=50), num_samples=3, seed=5)
    idx = torch.tensor([[*b'ab']])
    plain = Decoder(session.model, idx, 12, session.sampling, [256], 5, num_samples=3, logprobs=True)
    rows = torch.cat(list(plain.stream()), 1).tolist()
    samples = session.sample('ab')
    assert [s.tokens for s in samples] == [row[:len(s.tokens)] for s, row in zip(samples, rows)]
    assert len({tuple(s.tokens) for s in samples}) == 3


def test_texts_do_not_depend_on_their_batch():
    texts, found = ['ab', 'c', 'a longer one', 'x'], []
    for batch_size in (1, 3, 16):
        found.append(texts_of(session_of(batch_size=batch_size, num_samples=2).sample(texts)))
    assert found[0] == found[1] == found[2] and len(found[0]) == 8
    assert texts_of(session_of(num_samples=2).sample('ab')) == found[0][:2]


def test_batches_hold_neighbours_with_the_same_room(tmp_path):
    session = Session.load(out_dir=parrot(tmp_path, 'abc', room=16), device='cpu', max_new_tokens=12,
                           batch_size=2)
    assert session.position_limit == 16
    prompts = [session.encode(text) for text in ('a', 'ab', 'abc', 'abcabcabc', 'abcabcabc', 'abcabc')]
    lengths = [[len(prompt.tokens) for prompt in batch] for batch in session.batches(prompts)]
    assert lengths == [[1, 2], [3], [9, 9], [6]]
    assert [len(s.tokens) for s in session.sample([p.text for p in prompts])] == [12, 12, 12, 7, 7, 10]
    with pytest.raises(ValueError, match='^prompt has 16 tokens and must have fewer than block_size=16'):
        session.sample('a' * 16)


def test_settings_may_change_between_calls():
    session = session_of(sampling=GREEDY)
    greedy, = session.sample('ab')
    session.sampling, session.num_samples = Sampling(), 4
    assert len({s.text for s in session.sample('ab')} - {greedy.text}) > 1
    session.sampling, session.num_samples, session.max_new_tokens = GREEDY, 1, 5
    assert session.sample('ab')[0].tokens == greedy.tokens[:5]


def test_two_sessions_do_not_know_of_each_other():
    alone = texts_of(session_of(1).sample('ab'))
    one, other = session_of(1), session_of(2)
    other.sample('ab')
    assert texts_of(one.sample('ab')) == alone != texts_of(other.sample('ab'))


def test_without_a_text_the_usual_prompt_of_the_dataset_is_continued(tmp_path):
    state = checkpoint.load(parrot(tmp_path, 'abc') / 'best.pt')
    state['meta']['prompt'] = 'bc'
    checkpoint.save(tmp_path / 'best.pt', state)
    session = Session.load(out_dir=tmp_path, device='cpu', max_new_tokens=4)
    assert [(s.prompt, s.text) for s in session.sample()] == [('bc', 'abca')]


@pytest.mark.parametrize('stop', ['ca', ['x', 'ca'], '["x", "ca"]'], ids=str)
def test_stops_are_a_text_or_a_list(tmp_path, stop):
    session = Session.load(out_dir=parrot(tmp_path, 'abc'), device='cpu', stop=stop)
    assert texts_of(session.sample('a')) == ['b']


def test_characters_are_streamed_as_they_become_certain(tmp_path):
    session = Session.load(out_dir=parrot(tmp_path, 'é-'), device='cpu', max_new_tokens=6, num_samples=2)
    generation, = session.generations([session.encode('é')])
    assert list(generation.stream()) == ['-', '', 'é', '-', '', 'é', '']
    assert texts_of(generation.samples) == ['-é-é'] * 2 and generation.steps == 5


def test_a_draft_does_not_change_the_greedy_text():
    plain = session_of(sampling=GREEDY, num_samples=2)
    drafted = session_of(sampling=GREEDY, num_samples=2, draft_seed=3, draft_length=3)
    assert texts_of(drafted.sample(['ab', 'c'])) == texts_of(plain.sample(['ab', 'c']))
    generation, *others = drafted.generations([drafted.encode('ab')])
    list(generation.stream())
    assert generation.decoder.proposed > 0 and len(others) == 1


@pytest.mark.parametrize('settings, sentence', [
    (dict(num_samples=0), 'num_samples=0 must be at least 1'),
    (dict(draft_length=0), 'draft_length=0 must be at least 1'),
    (dict(stop='<|im_end|>'), r'stop=<\|im_end\|> must be a text or a special token'),
    (dict(stop='["x"'), 'must be a text, or a JSON list')], ids=str)
def test_bad_settings_are_refused_at_once(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        session_of(**settings)


# ----------------------------------------------------------------------------------------------------------
# Scoring, 8-bit weights


@torch.no_grad()
def test_a_score_is_the_loss_of_the_model():
    session, text = session_of(), 'not likely, é'
    score = session.score(text)
    tokens = torch.tensor([256, *text.encode()])
    _, loss = session.model(tokens[None, :-1], tokens[None, 1:])
    assert score.tokens == tokens.tolist() and len(score.logprobs) == score.bytes == 14
    assert abs(score.nats + 14 * loss.item()) < 1e-3
    assert abs(score.perplexity / math.exp(loss.item()) - 1) < 1e-4
    assert abs(score.bits_per_byte - loss.item() / math.log(2)) < 1e-4


def test_a_text_without_a_scored_token_is_refused():
    with pytest.raises(ValueError, match='^score= must have at least two tokens'):
        session_of().score('')


@pytest.mark.parametrize('tokens', [None, [*range(30)]], ids=['own text', 'given text'])
def test_quantizing_measures_its_cost(tokens):
    session = session_of()
    before = session.score_tokens([*range(30)]).bits_per_byte
    cost = session.quantize(tokens)
    assert cost.n_tokens == (29 if tokens else 256) and cost.dtype == 'float32'
    assert cost.bytes < 0.5 * cost.bytes_before
    assert 0 < abs(cost.bpb - cost.bpb_before) < 0.5
    if tokens:
        assert cost.bpb_before == before
        assert cost.bpb == pytest.approx(session.score_tokens(tokens).bits_per_byte, rel=1e-3)
    assert cost.kind == 'int8' and cost.bf16_activations == (not torch.cpu._is_vnni_supported())
    assert len(session.sample('ab')[0].tokens) > 0


def test_the_cost_of_int4_is_printed_and_larger(capsys):
    lines = {}
    for kind in ('int8', 'int4'):
        session = session_of()
        session.model = scaled(build(toy(pos='rope', vocab_size=257, n_embd=64)), 10)
        Console(session, quant=kind).score('a text to measure on')
        lines[kind] = capsys.readouterr().out.splitlines()[0]
        assert lines[kind].startswith(f'{kind}: ') and ' bits per byte on 20 tokens of the ' in lines[kind]
    changed = {kind: abs(float(line.split('the text, ')[1].split(' ')[0])) for kind, line in lines.items()}
    assert changed['int4'] > 5 * changed['int8']
    assert 'activations rounded to bfloat16' in lines['int4']


def test_packed_weights_are_the_same_model():
    session = session_of(sampling=GREEDY, num_samples=2)
    plain, score = texts_of(session.sample('ab')), session.score('a text')
    session.pack()
    assert any(hasattr(module, 'packed') for module in session.model.modules())
    assert texts_of(session.sample('ab')) == plain
    assert session.score('a text').nats == pytest.approx(score.nats, rel=1e-5)


def test_scores_in_steps_are_those_of_one_pass():
    session, tokens = session_of(), [*range(70)]
    whole = session.score_tokens(tokens)
    for step in (1, 16):
        score = session.score_tokens(tokens, step)
        assert max(abs(a - b) for a, b in zip(score.logprobs, whole.logprobs, strict=True)) < 1e-4


# ----------------------------------------------------------------------------------------------------------
# The console


def test_the_console_prints_and_writes_every_sample(tmp_path, capsys):
    session = Session.load(out_dir=parrot(tmp_path, 'abc'), device='cpu', max_new_tokens=4, num_samples=2)
    Console(session, tmp_path / 'out.jsonl').samples(['a', 'xb'])
    printed = capsys.readouterr().out.splitlines()
    assert printed.pop(0) == f'model: {tmp_path}/best.pt, step 1, 1.4M parameters'
    assert printed[0::2][:4] == ['abcab', 'abcab', 'xbcabc', 'xbcabc']
    assert all(line.startswith('--------------- 4 tokens, ') for line in printed[1::2][:4])
    assert printed[8].startswith('4 rows together: 12 tokens in 3 steps of ')
    assert printed[8].endswith(' ms') and len(printed) == 9
    rows = rows_of(tmp_path / 'out.jsonl')
    assert [(row['prompt'], row['text'], len(row['logprobs'])) for row in rows] == [
        ('a', 'bcab', 4), ('a', 'bcab', 4), ('xb', 'cabc', 4), ('xb', 'cabc', 4)]


def test_a_refused_prompt_leaves_the_file_as_it_was(tmp_path, capsys):
    session = Session.load(out_dir=parrot(tmp_path, 'abc', room=16), device='cpu', max_new_tokens=4)
    (tmp_path / 'out.jsonl').write_text('{}\n')
    with pytest.raises(ValueError, match='^prompt 2 of {list} has 17 tokens'):
        Console(session, tmp_path / 'out.jsonl', 'int8').samples(['a', 'b' * 17], '{list}')
    assert (tmp_path / 'out.jsonl').read_text() == '{}\n' and capsys.readouterr().out == ''


def test_the_console_says_where_learned_positions_end(tmp_path, capsys):
    session = Session.load(out_dir=parrot(tmp_path, 'abc', room=16), device='cpu', max_new_tokens=50)
    Console(session).samples(['a'])
    assert capsys.readouterr().out.splitlines()[-1].startswith('stopped at block_size=16')


def test_typed_lines_survive_a_refusal_and_ctrl_c(tmp_path, capsys, monkeypatch):
    session = Session.load(out_dir=parrot(tmp_path, 'abc', room=16), device='cpu', max_new_tokens=3)
    lines = iter(['a', '', 'b' * 16, 'interrupted', 'xb'])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def interrupted(self, text):
        if text == 'interrupted':
            raise KeyboardInterrupt
        return encode(self, text)
    encode = Session.encode
    monkeypatch.setattr('builtins.input', typed)
    monkeypatch.setattr(Session, 'encode', interrupted)
    Console(session, tmp_path / 'out.jsonl').interactive()
    out = capsys.readouterr().out
    assert '\nabca\n' in out and '\nxbcab\n' in out and 'prompt has 16 tokens' in out
    assert [row['prompt'] for row in rows_of(tmp_path / 'out.jsonl')] == ['a', 'xb']


def test_the_console_scores_with_8_bit_weights(tmp_path, capsys):
    Console(session_of(), tmp_path / 'out.jsonl', 'int8').score('abc')
    cost, score = capsys.readouterr().out.splitlines()
    assert cost.startswith('int8: ') and ' on 3 tokens of the text, ' in cost and 'against float32' in cost
    assert score.startswith('3 tokens, 3 bytes: log-likelihood -') and score.endswith(' bits per byte')
    row, = rows_of(tmp_path / 'out.jsonl')
    assert row['text'] == 'abc' and row['tokens'] == [256, *b'abc'] and len(row['logprobs']) == 3
