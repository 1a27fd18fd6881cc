"""
Published encoders with a decoder are sampled as `transformers` samples them: what the decoder begins with,
and spans that T5 fills. Their logits are compared in test_pretrained.py.
"""
import json
import re

import pytest
import torch
from runs import python

from model import GPT, GPTConfig
from nanoblocks.decoding.decode import Sampling
from nanoblocks.decoding.session import Session
from nanoblocks.training.settings import check_vocabulary

transformers = pytest.importorskip('transformers', reason='made the checkpoints')
tokenizers = pytest.importorskip('tokenizers', reason='runs the vocabularies of checkpoints')
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

WORDS = 'one two three four five six seven eight'.split()
SPECIAL = ['<pad>', '</s>', '<unk>']
MARKS = [f'<extra_id_{n}>' for n in range(12)]
GREEDY = Sampling(temperature=0)
T5 = dict(d_model=32, d_kv=9, d_ff=40, num_layers=2, num_decoder_layers=1, num_heads=4, pad_token_id=0,
          eos_token_id=1, decoder_start_token_id=0)
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=20,
            decoder_start_token_id=2, forced_eos_token_id=None, pad_token_id=0, bos_token_id=None,
            eos_token_id=1)


def vocabulary(folder):
    """A tokenizer.json as T5's: blanks are spelt ▁, </s> behind a text, and marks whose ids go down."""
    names = [*SPECIAL, *(f'▁{word}' for word in WORDS), '▁', *reversed(MARKS)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token='<unk>'))
    cut = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(cut), decoders.Metaspace()
    tokenizer.add_special_tokens([*SPECIAL, *MARKS])
    tokenizer.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps(
        {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>', 'pad_token': '<pad>'}))
    return len(names)


@pytest.fixture(scope='module', params=['t5', 'bart'])
def published(request, tmp_path_factory):
    """A folder with a random model and its tokenizer, and both as transformers loads them."""
    folder = tmp_path_factory.mktemp(request.param)
    size = vocabulary(folder) + 9       # rows of the table that stand for no token
    config = transformers.AutoConfig.for_model(request.param, vocab_size=size,
                                               **T5 if request.param == 't5' else BART)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.state_dict().values():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    model.get_input_embeddings().weight.data[size - 9 - 3:size - 9 - 1] *= 2    # marks after the first
    model.save_pretrained(folder)
    return folder, model, transformers.AutoTokenizer.from_pretrained(folder)


def tokens_of_transformers(published, text, begin, new):
    """Greedy tokens without those of the vocabulary's padding, after `begin`."""
    _, model, tokenizer = published
    source = tokenizer(text, return_tensors='pt').input_ids
    assert source[0, -1] == tokenizer.eos_token_id
    never = torch.zeros(model.config.vocab_size)
    never[len(tokenizer):] = -torch.inf
    out = model.generate(source, decoder_input_ids=torch.tensor([begin]), max_new_tokens=new, do_sample=False,
                         logits_processor=[lambda idx, logits: logits + never])
    return out[0, len(begin):].tolist()


def test_a_text_is_continued_as_transformers_does(published):
    folder, model, _ = published
    session = Session.load(init_from=folder, device='cpu', sampling=GREEDY, max_new_tokens=12)
    texts = 'one two three', 'four', 'five six seven eight one two'
    for text, sample in zip(texts, session.sample([*texts])):     # in one batch, padded
        want = tokens_of_transformers(published, text, [model.config.decoder_start_token_id], 12)
        assert sample.tokens == want, text
    assert session.begin == model.config.decoder_start_token_id


def test_a_long_source_leaves_the_decoder_its_room(published):
    folder, model, _ = published
    session = Session.load(init_from=folder, device='cpu', sampling=GREEDY, max_new_tokens=15, stop='')
    text = ' '.join(WORDS * 2)
    assert len(session.encode(text).tokens) == 17
    assert session.room(session.encode(text).tokens) == 15
    want = tokens_of_transformers(published, text, [model.config.decoder_start_token_id], 15)
    assert session.sample(text)[0].tokens == want


def filled_by_hand(text, written):
    """The text with the spans that a T5 wrote in the place of its marks."""
    spans = dict(re.findall(r'<extra_id_(\d+)>([^<]*)', written))
    return re.sub(r'\s*<extra_id_(\d+)>\s*', lambda mark: f' {spans.get(mark[1], "").strip()} ', text)


def test_t5_fills_spans_behind_its_own_marks(published):
    folder, model, tokenizer = published
    if model.config.model_type != 't5':
        pytest.skip('BART fills no spans')
    found = []
    session = Session.load(init_from=folder, device='cpu', sampling=GREEDY, max_new_tokens=20)
    for first in WORDS:
        masked = f'{first} [MASK] three four [MASK] six'
        text = masked.replace('[MASK]', '<extra_id_0>', 1).replace('[MASK]', '<extra_id_1>')
        mark = tokenizer.convert_tokens_to_ids('<extra_id_0>')
        new = tokens_of_transformers(published, text, [0, mark], 20)
        ends = [new.index(end) for end in (1, mark - 2) if end in new]
        new = new[:min(ends, default=20)]
        want = filled_by_hand(text, tokenizer.decode([mark, *new]))
        assert session.fill(masked)[0][0].split() == want.split()
        found.append(mark - 1 in new)
    assert any(found)
    with pytest.raises(ValueError, match='must have fewer than 12'):
        session.fill('[MASK] ' * 12)
    with pytest.raises(ValueError, match='must be mask, diffusion or span'):
        session.fill('one two')


def test_a_terminal_fills_and_continues(published):
    folder, *_ = published
    session = Session.load(init_from=folder, device='cpu', sampling=GREEDY, max_new_tokens=6)
    for start in ('one two [MASK] six', 'one two'):
        done = python('sample.py', f'--init_from={folder}', f'--start={start}', '--temperature=0',
                      '--device=cpu', '--num_samples=1', '--max_new_tokens=6')
        fills = '[MASK]' in start       # as the vocabulary has marks
        want = session.fill(start)[0][0] if fills else start + session.sample(start)[0].text
        assert done.code == 0 and f'\n{want}\n---------------' in done.out, done


def test_prompts_with_something_missing_and_without_are_told_apart(published, tmp_path):
    folder, model, _ = published
    if model.config.model_type != 't5':
        pytest.skip('BART fills no spans')
    texts = 'one two', 'one [MASK] six', 'four five'
    (tmp_path / 'prompts.txt').write_text('\n'.join(texts))
    session = Session.load(init_from=folder, device='cpu', sampling=GREEDY, max_new_tokens=6)
    done = python('sample.py', f'--init_from={folder}', f'--prompts={tmp_path / "prompts.txt"}',
                  '--temperature=0', '--device=cpu', '--num_samples=1', '--max_new_tokens=6')
    at = 0
    for text in texts:
        want = session.fill(text)[0][0] if '[MASK]' in text else text + session.sample(text)[0].text
        at = done.out.index(f'\n{want}\n---------------', at) + 1
    assert done.code == 0


def test_bert_fills_between_its_own_tokens(tmp_path):
    """What transformers names at [MASK] of [CLS] a text [SEP]; a run that goes on has the same mask."""
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    names = [*special, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=24, initializer_range=0.5)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    session, found = Session.load(init_from=tmp_path, device='cpu', sampling=GREEDY), set()
    for text in (f'{a} [MASK] {b}' for a in ('', *WORDS) for b in ('', *WORDS)):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 2 and ids[-1] == 3
        logits = model(torch.tensor([ids])).logits[0, ids.index(4)]
        (told, row), = session.fill(text)
        assert row == [logits.argmax().item() if i == 4 else i for i in ids]
        assert told.split() == [names[i] for i in row if i not in (2, 3)]
        found.add(told)
    assert len(found) > 9
    (told, row), = session.fill('one two')      # without one it goes on, up to what its positions allow
    assert row[:3] == [2, 5, 6] and row[-1] == 3 and len(row) == 24 and told.startswith('one two')
    (tmp_path / 'text.txt').write_text(' '.join(WORDS * 40))
    for script, *flags in (('data/text/prepare.py', f'--input={tmp_path / "text.txt"}',
                            f'--tokenizer={tmp_path}', f'--out={tmp_path / "data"}'),
                           ('train.py', f'--init_from={tmp_path}', f'--dataset={tmp_path / "data"}',
                            '--objective=mask', '--max_iters=1', '--batch_size=2', '--eval_iters=1',
                            '--gradient_accumulation_steps=1', '--device=cpu', '--compile=False',
                            f'--out_dir={tmp_path / "run"}'),
                           ('sample.py', f'--out_dir={tmp_path / "run"}', '--start=one [MASK]')):
        done = python(script, *flags)
        assert done.code == 0, done


def test_a_published_vocabulary_without_room_for_marks_says_so():
    config = GPTConfig(vocab_size=628)
    check_vocabulary(config, 628, 'x', 'y', 100)
    with pytest.raises(ValueError, match='must be at least 700, the tokens of dataset=x and 100 marks'):
        check_vocabulary(config, 700, 'x', 'y', 100)
    with pytest.raises(ValueError, match='prepare it with --tokenizer=y'):
        check_vocabulary(config, 800, 'x', 'y', 100)


def test_what_begins_is_exported_again(published, tmp_path):
    folder, model, _ = published
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.config.decoder_start_token_id == model.config.decoder_start_token_id
    source = torch.tensor([[3, 4, 5, 1]])
    kept, exported = (m.generate(source, max_new_tokens=9, do_sample=False) for m in (model, again))
    assert torch.equal(kept, exported)
