"""Data as people have it: token files of nanoGPT and llm.c, several datasets with weights."""
import json
import os
import pickle
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    assert_refused,
    assert_same_run,
    assert_survives_a_kill,
    curve,
    dataset,
    documents,
    losses,
    metrics,
    pair,
    python,
    resume,
    toy,
    train,
)
from test_data import VOCABULARIES, gpt2  # noqa: F401  a fixture
from test_logging import OFFLINE, history, wandb_files

from data.foreign import read_foreign
from data.loader import check_hashes, open_dataset, read_meta
from data.mixture import Sources, deal, shares_of, weights_of
from data.objectives import objective_of
from data.tokenizer import ByteTokenizer, CharTokenizer, from_meta
from data.writer import write_dataset
from model import GPT, GPTConfig

CACHE = {'TIKTOKEN_CACHE_DIR': str(VOCABULARIES)}
SPLITS = 'train', 'val'
SHORT = dict(max_iters=6, eval_interval=3, log_interval=1, lr_decay_iters=6, n_embd=16)

# ----------------------------------------------------------------------------------------------------------
# Token files of other repositories


@pytest.fixture(scope='module')
def ours(gpt2, tmp_path_factory):  # noqa: F811
    """A dataset prepared here with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp('ours')
    write_dataset(folder, documents(200), gpt2, 'toy')
    return folder


def nanogpt(ours, folder, chars=None):
    """The same tokens as nanoGPT writes them; with chars, it says which they are."""
    folder.mkdir()
    for split in 'train', 'val':
        shutil.copy(ours / f'{split}.bin', folder)
    if chars:
        meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                'stoi': {char: i for i, char in enumerate(chars)}}
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def llmc(ours, folder, magic=20240520, version=1, dtype='<u2', parts=1):
    """The same tokens as llm.c writes them, the training split in so many files."""
    folder.mkdir()
    for split, count in ('train', parts), ('val', 1):
        tokens = np.fromfile(ours / f'{split}.bin', '<u2').astype(dtype)
        for number, piece in enumerate(np.array_split(tokens, count)):
            header = np.zeros(256, '<i4')
            header[:3] = magic, version, len(piece)
            name = f'fineweb_{split}_{number:06d}.bin' if count > 1 else f'tiny_{split}.bin'
            if parts > 1 and count == 1:
                name = f'fineweb_{split}_000000.bin'
            (folder / name).write_bytes(header.tobytes() + piece.tobytes())
    return folder


@pytest.mark.parametrize('kind', ['nanogpt', 'llmc', 'shards'])
def test_token_files_of_others_give_the_run_that_our_own_give(ours, kind, tmp_path):
    make = {'nanogpt': nanogpt, 'llmc': llmc, 'shards': partial(llmc, parts=3)}[kind]
    theirs = make(ours, tmp_path / 'data')
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    runs = {}
    for name, folder in ('ours', ours), ('theirs', theirs):
        done = python('train.py', *toy(tmp_path / name, dataset=folder, **SHORT), env=CACHE)
        assert done.code == 0, done
        runs[name] = curve(tmp_path / name)
        told = [line for line in done.out.splitlines() if 'token files of' in line]
        who = 'nanoGPT' if kind == 'nanogpt' else 'llm.c'
        assert told == ([f'{theirs} holds token files of {who}, read as tokens of gpt2, uint16']
                        if name == 'theirs' else [])
    assert runs['ours'] == runs['theirs'] and runs['ours'][0]['val_bpb'] > 1
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before
    halves = SHORT | {'batch_size': 4, 'gradient_accumulation_steps': 2}
    two = pair(*toy(tmp_path / 'two', dataset=theirs, **halves),
               before=f'import os; os.environ.update({CACHE})\n')
    assert [done.code for done in two] == [0, 0], two
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'ours'), abs=1e-5)
    resume_out = python('train.py', '--init_from=resume', f'--out_dir={tmp_path / "theirs"}', '--max_iters=8',
                        env=CACHE)
    assert resume_out.code == 0, resume_out
    done = python('sample.py', f'--out_dir={tmp_path / "theirs"}', '--num_samples=1', '--max_new_tokens=3',
                  env=CACHE)
    assert done.code == 0, done


def test_characters_of_nanogpt_are_read_from_its_pickle(tmp_path):
    ours = dataset('chars')
    chars = read_meta(ours)['tokenizer']['chars']
    theirs = nanogpt(ours, tmp_path / 'data', chars)
    out, printed = train(tmp_path / 'run', dataset=theirs, **SHORT)
    assert 'token files of nanoGPT, read as the characters of its meta.pkl, uint16' in printed
    assert curve(out) == curve(train(tmp_path / 'own', dataset=ours, **SHORT)[0])
    done = python('sample.py', f'--out_dir={out}', '--num_samples=1', '--max_new_tokens=20')
    text = done.out.split('---')[0].split('\n', 2)[-1]
    assert done.code == 0 and text.strip() and set(text) <= set(chars), done


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    folder = nanogpt(dataset('chars'), tmp_path / 'data', 'abc')
    Evil.path = str(tmp_path / 'made')
    for evil in (Evil(), {'itos': Evil()}, {'itos': {0: 'a', 1: Evil()}}):
        (folder / 'meta.pkl').write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match=r'must hold the characters .*\(it calls \w+.mkdir\)'):
            read_foreign(folder)
        assert not (tmp_path / 'made').exists()
    assert pickle.loads(pickle.dumps(Evil())) is None and (tmp_path / 'made').exists()  # the pickle works
    values = [{'itos': x} for x in (3, {0: 'b', 1: 'a'}, {0: 'ab'}, {'a': 0}, {1: 'a'})]
    for number, wrong in enumerate([b'', b'x', *map(pickle.dumps, values)]):
        (folder / 'meta.pkl').write_bytes(wrong + b' ' * number)     # of another size: time may stand still
        with pytest.raises(ValueError, match='must hold the characters'):
            read_foreign(folder)


def small_bpe(folder):
    """A tokenizer.json of GPT-2's kind, with 70,000 tokens so that 16 bits do not do."""
    tokenizers = pytest.importorskip('tokenizers')
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    coder.train_from_iterator([text for _, text in documents(20)], trainer)
    coder.add_special_tokens(['<|begin_of_text|>', *(f'<|{i}|>' for i in range(70_000))])
    coder.save(str(folder / 'tokenizer.json'))
    (folder / 'config.json').write_text(json.dumps(
        {'bos_token_id': coder.token_to_id('<|begin_of_text|>'), 'eos_token_id': coder.token_to_id('<|0|>')}))
    return coder


def test_tokens_of_llama_3_are_read_with_the_vocabulary_beside_them(tmp_path):
    (tmp_path / 'made').mkdir()
    coder = small_bpe(tmp_path / 'made')
    text, begin = documents(3)[1][1], coder.token_to_id('<|begin_of_text|>')
    ids = [begin, *coder.encode(text).ids] * 9
    for split in 'train', 'val':
        np.array(ids, '<u2').tofile(tmp_path / 'made' / f'{split}.bin')
    folder = llmc(tmp_path / 'made', tmp_path / 'data', 20240801, 7, '<u4')
    with pytest.raises(ValueError, match='holds tokens of Llama 3 and must hold its vocabulary as well: put'):
        read_meta(folder)
    for name in 'tokenizer.json', 'config.json':
        shutil.copy(tmp_path / 'made' / name, folder)
    meta = read_meta(folder)
    assert (meta['dtype'], meta['header'], meta['val_tokens']) == ('uint32', 1024, len(ids))
    assert meta['val_bytes'] == 9 * len(text.encode()) and meta['vocab_size'] > 70_000
    data = open_dataset(folder, len(ids) - 1, 0)
    assert data.train_batch(0, 1)[0][0].tolist() == ids[:-1]
    assert from_meta(meta['tokenizer']).decode(ids[1:len(ids) // 9]) == text
    # the vocabulary alone says which tokens are marks, but not which of them parts documents
    (folder / 'config.json').unlink()
    alone = read_meta(folder)
    assert alone['val_bytes'] == meta['val_bytes'] and from_meta(alone['tokenizer']).eot is None
    shutil.copy(tmp_path / 'made' / 'config.json', folder)
    # raw files beside such a vocabulary have 32 bits a token too
    for path in folder.glob('*.bin'):
        (folder / path.name.removeprefix('tiny_')).write_bytes(path.read_bytes()[1024:])
        path.unlink()
    assert open_dataset(folder, len(ids) - 1, 0).train_batch(0, 1)[0][0].tolist() == ids[:-1]


def test_documents_of_others_are_read_alone(ours, tmp_path):
    """Behind a header too: the files of llm.c give the run that our own give."""
    runs = {}
    for name, folder in ('ours', ours), ('theirs', llmc(ours, tmp_path / 'data')):
        done = python('train.py', *toy(tmp_path / name, dataset=folder, doc_mask=True, **SHORT), env=CACHE)
        assert done.code == 0, done
        runs[name] = curve(tmp_path / name)
    assert runs['ours'] == runs['theirs'] != curve(train(tmp_path / 'plain', dataset=ours, **SHORT)[0])


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize('make, damage, words', [
    (nanogpt, lambda folder: cut(folder / 'train.bin'), 'train.bin is damaged'),
    (llmc, lambda folder: cut(folder / 'tiny_train.bin'), 'tiny_train.bin is damaged'),
    (llmc, lambda folder: os.truncate(folder / 'tiny_val.bin', 1024 + 10), 'tiny_val.bin is damaged'),
    (llmc, lambda folder: os.truncate(folder / 'tiny_val.bin', 100), 'tiny_val.bin is damaged'),
    (nanogpt, lambda folder: os.truncate(folder / 'val.bin', 0), 'val.bin is damaged'),
    (llmc, lambda folder: [shutil.copy(folder / f'tiny_{x}.bin', folder / f'b_{x}.bin') for x in SPLITS],
     'must hold the token files of one dataset, and b_train.bin and tiny_train.bin are of several'),
    (nanogpt, lambda folder: np.full(99, 60_000, '<u2').tofile(folder / 'val.bin'),
     'val.bin holds token 60000, and its vocabulary has 50257'),
    (nanogpt, lambda folder: (folder / 'val.bin').unlink(), 'has not been prepared'),
    (nanogpt, lambda folder: (folder / 'meta.json.tmp').touch(), 'has not been prepared'),
    (nanogpt, lambda folder: (folder / 'prepare.lock').touch(), 'has not been prepared')])
def test_token_files_that_are_none_are_refused_in_a_sentence(ours, make, damage, words, tmp_path):
    folder = make(ours, tmp_path / 'data')
    read_meta(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        read_meta(folder)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def test_every_token_of_others_is_checked(ours, tmp_path):
    folder = llmc(ours, tmp_path / 'data')
    check_hashes(folder)
    tokens = np.memmap(folder / 'tiny_train.bin', '<u2', 'r+', 1024)
    tokens[5] = 60_000
    tokens.flush()
    with pytest.raises(ValueError, match='vocab_size=50257 in .* holds 60000'):
        check_hashes(folder)


def test_a_preparation_that_is_killed_while_it_renames_leaves_no_dataset(tmp_path, monkeypatch):
    """Its files have no .tmp any more then, and would be taken for nanoGPT's."""
    import data.writer
    replace, calls = os.replace, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 4:      # progress and meta.json.tmp come first, then train.bin and val.bin
            raise KeyboardInterrupt
        return replace(*args)
    monkeypatch.setattr(data.writer.os, 'replace', dying)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, documents(), ByteTokenizer(), 'toy')
    assert {'train.bin', 'val.bin'} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError, match='has not been prepared'):
        read_meta(tmp_path)
    monkeypatch.undo()
    write_dataset(tmp_path, documents(), ByteTokenizer(), 'toy')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


# ----------------------------------------------------------------------------------------------------------
# Several datasets


def mixed(*weights):
    return ','.join(f'{dataset(name)}:{weight}' for name, weight in zip(('bytes', 'other', 'third'), weights))


def dealt_by_definition(weights, n):
    """[(dataset, number of the row there)] of rows 0 to n - 1, one after the other, with exact fractions."""
    shares = [Fraction(share, 2**30) for share in shares_of(weights)]
    counts, seen, found = [0] * len(weights), [0] * len(shares), []
    for _ in range(n):
        which = len(shares)
        for i, share in enumerate(shares):
            seen[i] += 1
            if (seen[i] * share + Fraction(1, 2)).__floor__() > counts[i]:
                which = i
                break
        found.append((which, counts[which]))
        counts[which] += 1
    return found


@pytest.mark.parametrize('weights', [(0.7, 0.3), (0.5, 0.5), (0.2, 0.3, 0.5), (1e-12, 1 - 1e-12),
                                     (0.1, 0.6, 0.25, 0.05), (1 - 1e-12, 1e-12)])
def test_rows_are_dealt_as_counting_deals_them(weights):
    n = 5000
    wanted = dealt_by_definition(weights, n)
    which, own = deal(np.arange(n, dtype=np.uint64), shares_of(weights))
    assert list(zip(which.tolist(), own.tolist())) == wanted
    for i, weight in enumerate(weights):
        counts = np.cumsum(which == i) - weight * np.arange(1, n + 1)
        assert np.abs(counts).max() < len(weights)
    # far from the start, the numbers of a dataset still follow each other
    far = 10**15
    which, own = deal(np.arange(far, far + n, dtype=np.uint64), shares_of(weights))
    for i in range(len(weights)):
        assert (np.diff(own[which == i].astype(np.int64)) == 1).all()
    assert (deal(np.array([far + 7], np.uint64), shares_of(weights))[1] == own[7]).all()


@pytest.mark.parametrize('objective', ['next', 'mask', 'prefix'])
def test_each_dataset_gives_the_rows_that_it_gives_alone(objective):
    sources = Sources(mixed(0.7, 0.3))
    task = objective_of(objective, sources.read_meta(), 0.15).read_by(
        'encoder' if objective == 'mask' else 'decoder')
    data = sources.open(16, 5, task)
    alone = [open_dataset(folder, 16, 5, task) for folder in sources.folders.values()]
    batches = data.train_batch(40, 100)
    for n, (which, own) in enumerate(dealt_by_definition((0.7, 0.3), 140)[40:]):
        for whole, row in zip(batches, alone[which].train_batch(own, 1), strict=True):
            assert torch.equal(whole[n:n + 1], row)
    parts = [torch.cat(x) for x in zip(*(data.train_batch(40 + n, 10) for n in range(0, 100, 10)))]
    assert all(map(torch.equal, parts, batches))


def test_a_mixture_is_evaluated_dataset_by_dataset_and_as_their_mean(tmp_path):
    out, printed = train(tmp_path / 'run', dataset=mixed(3, 1))
    lines = [line for line in metrics(out) if 'val_loss' in line]
    names = [str(dataset(name)) for name in ('bytes', 'other')]
    for line in lines:
        for mean, each in ('val_loss', 'val_losses'), ('val_bpb', 'val_bpbs'):
            assert list(line[each]) == names
            a, b = line[each].values()
            assert a != b and line[mean] == pytest.approx(0.75 * a + 0.25 * b, abs=1e-12)
    # each is what an evaluation of that dataset alone gives
    for name in names:
        done = python('train.py', f'--init_from={out / "ckpt.pt"}', f'--dataset={name}', '--eval_only=True',
                      '--batch_size=8', '--eval_tokens=2048', '--device=cpu')
        loss, bits = (lines[-1][key][name] for key in ('val_losses', 'val_bpbs'))
        told = f'val loss {loss:.4f}, {bits:.4f} bits per byte'
        assert done.code == 0 and told in done.out, done
        assert f'  {name}: {told}' in printed
    assert load_meta(out)['weights'] == [0.75, 0.25]


def load_meta(out):
    return torch.load(out / 'ckpt.pt', weights_only=True)['meta']


def test_a_mixture_survives_a_kill_and_any_number_of_processes(tmp_path):
    flags = dict(dataset=mixed(0.7, 0.3), gradient_accumulation_steps=2,
                 batch_size=5)
    whole, _ = train(tmp_path / 'whole', **flags)
    assert_survives_a_kill(whole, tmp_path / 'killed', 73, toy(tmp_path / 'killed', **flags))
    two = pair(*toy(tmp_path / 'two', **flags))
    assert [done.code for done in two] == [0, 0], two
    assert losses(tmp_path / 'two') == pytest.approx(losses(whole), abs=1e-4)
    for key in 'val_loss', 'val_bpb':
        assert losses(tmp_path / 'two', key) == pytest.approx(losses(whole, key), abs=1e-4)
    one = python('train.py', '--init_from=resume', f'--out_dir={whole}', '--max_iters=70',
                 f'--dataset={mixed(0.6, 0.4)}')
    assert_refused(one, 'must hold the data that', mixed(0.7, 0.3))


def test_a_mixture_that_cannot_be_is_refused(tmp_path):
    a, b, chars = dataset(), dataset('other'), dataset('chars')
    for value, words in (
            *[(value, 'must give each dataset a weight above 0')
              for value in (f'{a}:0.7,{b}', f'{a}:1,{b}:0', f'{a}:1,{b}:nan', f'{a}:1,', ',')],
            (f'{a}:1,{a}:2', 'must name each dataset once'), (f'{a}:1,{a}/:2', 'must name each dataset once'),
            (f'{a}:1,{chars}:1', f'must have one tokenizer, and {a} and {chars} have two: prepare {chars} '
             f'again with --tokenizer={a}'),
            (f'{a}:1,{tmp_path / "none"}:1', 'does not exist')):
        done = python('train.py', *toy(tmp_path / 'run', dataset=value))
        assert_refused(done, words)
    with pytest.raises(ValueError, match='a weight above 0'):
        weights_of('a:0.5,b:inf')
    assert weights_of('x:/a:3, b:1') == {'x:/a': 0.75, 'b': 0.25} and weights_of('a:b') == {'a:b': 1}


def test_a_second_dataset_is_prepared_with_the_tokenizer_of_the_first(tmp_path, monkeypatch):
    """The remedy of the refusal above: with a dataset's, nanoGPT's and a run's own tokenizer."""
    from test_data import prepare
    chars = read_meta(dataset('chars'))['tokenizer']['chars']
    theirs = nanogpt(dataset('chars'), tmp_path / 'theirs', chars)
    run, _ = train(tmp_path / 'run', dataset=dataset('chars'), **SHORT)
    (tmp_path / 'more.txt').write_text(''.join(text for _, text in documents(seed=9)))
    for number, name in enumerate((dataset('chars'), theirs, run, run / 'ckpt.pt')):
        more = tmp_path / f'more{number}'
        assert prepare(monkeypatch, 'text', f'--input={tmp_path / "more.txt"}', f'--out={more}',
                       f'--tokenizer={name}') is None
        assert Sources(f'{more}:1,{theirs}:1').read_meta()['tokenizer'] == CharTokenizer(chars).meta()
    train(tmp_path / 'both', dataset=f'{more}:1,{theirs}:1', **SHORT)


# ----------------------------------------------------------------------------------------------------------
# Several validation sets


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    """Bytes of texts whose characters have three bytes, so that its tokens stand for other bytes."""
    folder = tmp_path_factory.mktemp('wide') / 'held'
    write_dataset(folder, [(split, text.translate({ord('a'): '\u3042', ord('b'): '\u3044'}))
                           for split, text in documents(60, seed=4)], ByteTokenizer(), 'toy')
    return folder


def by_definition(out, folder, name='ckpt.pt'):
    """(loss, bits per byte) of every validation window of a folder, one after the other."""
    state = torch.load(out / name, weights_only=True)
    model = GPT(GPTConfig(**state['config'])).eval()
    model.load_state_dict(state['model'])
    tokens, sums = np.fromfile(folder / 'val.bin', '<u2').astype(np.int64), []
    for i in range(0, len(tokens) - 32, 32):
        row = torch.from_numpy(tokens[None, i:i + 33])
        with torch.no_grad():
            sums.append(model(row[:, :-1], row[:, 1:])[1].item())
    text = ByteTokenizer().decode([int(token) for token in tokens if token != 256])
    return np.mean(sums), np.mean(sums) * len(tokens) / len(text.encode()) / np.log(2)


EVERY = dict(eval_tokens=10**6, max_iters=6, eval_interval=3, log_interval=1)


@pytest.mark.parametrize('several', [False, True])
def test_several_validation_sets_are_judged_each_with_its_bits_per_byte(several, wide, tmp_path):
    trained = mixed(0.7, 0.3) if several else dataset()
    held = dataset('third') if several else dataset('other')
    settings = EVERY | dict(dataset=trained, gradient_accumulation_steps=2, batch_size=4)
    out, printed = train(tmp_path / 'run', **settings, eval_datasets=f'{held}, {wide}')
    plain, _ = train(tmp_path / 'plain', **settings)
    assert_same_run(out, plain)     # nothing of it is felt by the run
    names = [str(dataset(name)) for name in (('bytes', 'other') if several else ('bytes',))]
    lines = [line for line in metrics(out) if 'val_loss' in line]
    assert len(lines) == 3
    for line in lines:
        assert list(line['val_losses']) == list(line['val_bpbs']) == [*names, str(held), str(wide)]
        for mean, each in ('val_loss', 'val_losses'), ('val_bpb', 'val_bpbs'):
            weights = (0.7, 0.3) if several else (1.0,)
            assert line[mean] == pytest.approx(np.dot(weights, list(line[each].values())[:len(weights)]))
    for folder in (*names, held, wide):
        loss, bits = by_definition(out, Path(folder))
        assert lines[-1]['val_losses'][str(folder)] == pytest.approx(loss, rel=1e-5)
        assert lines[-1]['val_bpbs'][str(folder)] == pytest.approx(bits, rel=1e-5)
        assert f'  {folder}: val loss {loss:.4f}, {bits:.4f} bits per byte' in printed
    two = pair(*toy(tmp_path / 'two', **settings, eval_datasets=f'{held},{wide}'))
    assert [done.code for done in two] == [0, 0], two
    for one, other in zip(lines, (line for line in metrics(tmp_path / 'two') if 'val_loss' in line)):
        for key in 'val_losses', 'val_bpbs':
            assert other[key] == pytest.approx(one[key], rel=1e-4)


def test_a_resumed_run_keeps_its_validation_sets_or_takes_others(wide, tmp_path):
    out, _ = train(tmp_path / 'run', **EVERY, eval_datasets=dataset('other'), gradient_accumulation_steps=2,
                   batch_size=4)
    names = [str(dataset()), str(dataset('other')), str(wide)]
    printed = resume(out, max_iters=9)
    assert list(metrics(out)[-1]['val_losses']) == names[:2] and f'  {names[1]}: val loss' in printed
    printed = resume(out, max_iters=12, eval_datasets=wide)
    assert f'changed   eval_datasets: was {names[1]}, now {wide}' in printed
    assert list(metrics(out)[-1]['val_losses']) == [names[0], names[2]]
    # one command for a trained run, on one process and on two
    before = (out / 'metrics.jsonl').read_bytes()
    command = [f'--out_dir={out}', '--init_from=resume', '--eval_only=True']
    command += [f'--eval_datasets={names[1]},{wide}']
    results = python('train.py', *command), pair(*command)[0]
    for folder in map(Path, names):
        loss, bits = by_definition(out, folder)
        for done in results:
            assert done.code == 0, done
            assert f'  {folder}: val loss {loss:.4f}, {bits:.4f} bits per byte' in done.out
    assert (out / 'metrics.jsonl').read_bytes() == before


def test_validation_sets_reach_wandb(wide, tmp_path):
    done = python('train.py', *toy(tmp_path / 'run', **EVERY, eval_datasets=wide, wandb_log=True,
                                   wandb_samples=0), env=OFFLINE)
    assert done.code == 0, done
    rows = [row for path in wandb_files(tmp_path / 'run') for row in history(path) if 'val_loss' in row]
    lines = [line for line in metrics(tmp_path / 'run') if 'val_loss' in line]
    assert len(rows) == len(lines) == 3
    for row, line in zip(rows, lines):
        for key in 'val_losses', 'val_bpbs':
            assert row[f'{key}.{wide}'] == line[key][str(wide)]


def test_validation_sets_that_cannot_be_are_refused(tmp_path):
    a, other, chars = dataset(), dataset('other'), dataset('chars')
    for value, words in ((f'{other},{other}', f'eval_datasets={other},{other} must be names with commas'),
                         (f'{other},', 'must be names with commas between them'),
                         (f'{a}/', f'each of another dataset than dataset={a}, which is evaluated anyway'),
                         (chars, f'eval_datasets={chars} must have one tokenizer, and {a} and {chars} have '
                          f'two: prepare {chars} again with --tokenizer={a}'),
                         (tmp_path / 'none', 'does not exist')):
        assert_refused(python('train.py', *toy(tmp_path / 'run', eval_datasets=value)), words)
        assert not (tmp_path / 'run').exists()
