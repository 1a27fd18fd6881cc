"""
Quantised checkpoints: what each method stands for, element by element as it is defined, and as the code of
`transformers` and of bitsandbytes has it where that runs here.
"""
import functools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    CASES,
    NEW,
    Case,
    T,
    V,
    assert_logits,
    config_of,
    greedy,
    load,
    load_reference,
    one_sentence,
    redraw,
    rope,
    safetensors_torch,
    transformers,
)
from conftest import ROOT

from model import GPT, GPTConfig
from nanoblocks.pretrained.quantised import AWQ_ORDER, METHODS

# whole numbers are packed by eights
LLAMA = Case('llama', {**rope(), 'hidden_size': 48, 'intermediate_size': 64, 'head_dim': 8})
OSS = Case('gpt_oss', {**CASES['gpt_oss'].flags, 'hidden_size': 64, 'intermediate_size': 32})


def by_element(shape, value):
    """The matrix of value(row, column), in float64."""
    rows, columns = shape
    return torch.tensor([[value(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------
# Random files of each method: (name of a weight, its shape, generator) -> ({tensor in the file}, the weight)


def random(shape, generator):
    return torch.rand(shape, generator=generator)


def whole(shape, most, generator):
    return torch.randint(most, shape, generator=generator)


def packed(numbers, bits, order=None):
    """Whole numbers, the first of each 32 bits lowest, along the last dimension -> int32."""
    order, table = order or range(32 // bits), []
    for row in numbers.tolist():
        words = [sum(row[at + place] << bits * n for n, place in enumerate(order))
                 for at in range(0, len(row), len(order))]
        table.append([word - 2 ** 32 if word >= 2 ** 31 else word for word in words])
    return torch.tensor(table, dtype=torch.int32)


def fp8(name, shape, generator, block=(16, 24)):
    size = math.sqrt(shape[1])
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = (0.5 + random((-(-shape[0] // block[0]), -(-shape[1] // block[1])), generator)) / size
    values = weight.float().tolist()
    return {name: weight, f'{name}_scale_inv': scale}, by_element(
        shape, lambda i, j: values[i][j] * scale[i // block[0], j // block[1]].item())


def fp8_of_all(name, shape, generator):
    """One factor for the whole matrix, and one for activations that nothing is made of."""
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = (0.5 + random((), generator)) / math.sqrt(shape[1])
    activations = name.replace('weight', 'activation_scale')
    return {name: weight, f'{name}_scale_inv': scale, activations: torch.tensor(7.0)}, \
        weight.double() * scale.double()


def int8(name, shape, generator):
    numbers = whole(shape, 255, generator) - 127
    largest = (1 + random(shape[0], generator)) * 2 / math.sqrt(shape[1])
    stored = {name: numbers.to(torch.int8), name.replace('weight', 'SCB'): largest,
              name.replace('weight', 'weight_format'): torch.tensor(0, dtype=torch.uint8)}
    return stored, by_element(shape, lambda i, j: numbers[i, j].item() * largest[i].item() / 127)


def four_bits(name, shape, generator, nested=False, kind='nf4'):
    """Blocks of 64 numbers, the last one shorter."""
    count, blocks = shape[0] * shape[1], -(-shape[0] * shape[1] // 64)
    numbers = whole((count,), 16, generator).tolist()
    values = torch.linspace(-1, 1, 16) ** 3
    state = {'quant_type': kind, 'blocksize': 64, 'dtype': 'float32', 'shape': list(shape)}
    stored = {f'{name}.quant_map': values}
    if nested:
        codes = whole((blocks,), 256, generator).to(torch.uint8)
        table, outer = torch.linspace(-1, 1, 256), random((-(-blocks // 16),), generator)
        state |= {'nested_blocksize': 16, 'nested_offset': 0.3, 'nested_dtype': 'float32'}
        stored |= {f'{name}.absmax': codes, f'{name}.nested_absmax': outer, f'{name}.nested_quant_map': table}
        largest = [table[code].item() * outer[n // 16].item() + 0.3 for n, code in enumerate(codes.tolist())]
    else:
        stored[f'{name}.absmax'] = 0.4 * random((blocks,), generator)
        largest = stored[f'{name}.absmax'].tolist()
    pairs = [16 * first + second for first, second in zip(numbers[::2], numbers[1::2], strict=True)]
    stored[name] = torch.tensor(pairs, dtype=torch.uint8).unsqueeze(1)
    text = json.dumps(state).encode()
    stored[f'{name}.quant_state.bitsandbytes__{kind}'] = torch.tensor(list(text), dtype=torch.uint8)
    width = shape[1]
    return stored, by_element(shape, lambda i, j: (
        values[numbers[i * width + j]].item() * largest[(i * width + j) // 64]))


def gptq(name, shape, generator, bits=4, minus=1, ordered=True, size=16, index=True):
    out, inputs = shape
    size = inputs if size == -1 else size
    numbers = whole((inputs, out), 2 ** bits, generator)
    # zeros minus one, where 0 becomes the largest
    zeros = whole((inputs // size, out), 2 ** bits, generator)
    scales = ((0.5 + random(zeros.shape, generator)) / 2 ** bits * 4 / math.sqrt(inputs)).half()
    group = torch.arange(inputs) // size
    group = group if ordered else group[torch.randperm(inputs, generator=generator)]
    base = name.removesuffix('weight')
    stored = {f'{base}qweight': packed(numbers.t(), bits).t().contiguous(), f'{base}scales': scales,
              f'{base}qzeros': packed((zeros - minus) % 2 ** bits, bits),
              **({f'{base}g_idx': group.int()} if index else {})}
    return stored, by_element(shape, lambda i, j: scales[group[j], i].item() * (
        numbers[j, i].item() - zeros[group[j], i].item()))


def awq(name, shape, generator):
    out, inputs = shape
    numbers, zeros = (whole((n, out), 16, generator) for n in (inputs, inputs // 16))
    scales = ((0.5 + random(zeros.shape, generator)) / 4 / math.sqrt(inputs)).half()
    base, order = name.removesuffix('weight'), (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {f'{base}qweight': packed(numbers, 4, order), f'{base}qzeros': packed(zeros, 4, order),
              f'{base}scales': scales}
    return stored, by_element(shape, lambda i, j: scales[j // 16, i].item() * (
        numbers[j, i].item() - zeros[j // 16, i].item()))


def bits_and_bytes(bits):
    return {'quant_method': 'bitsandbytes', f'load_in_{bits}bit': True, f'load_in_{12 - bits}bit': False}


GROUPS = {'group_size': 16, 'bits': 4}
FILES = {
    'fp8': (CASES['deepseek_v3'], fp8, {'quant_method': 'fp8', 'weight_block_size': [16, 24]}),
    'fp8-of-all': (LLAMA, fp8_of_all, {'quant_method': 'fp8', 'weight_block_size': None,
                                       'activation_scheme': 'static'}),
    'int8': (LLAMA, int8, bits_and_bytes(8)),
    'nf4': (LLAMA, four_bits, bits_and_bytes(4)),
    'fp4': (LLAMA, functools.partial(four_bits, kind='fp4'), {'load_in_4bit': True}),
    'nf4-nested': (LLAMA, functools.partial(four_bits, nested=True), bits_and_bytes(4)),
    'gptq': (LLAMA, gptq, {'quant_method': 'gptq', **GROUPS}),
    'gptq-8': (LLAMA, functools.partial(gptq, bits=8), {'quant_method': 'gptq', **GROUPS, 'bits': 8}),
    'gptq-any-order': (LLAMA, functools.partial(gptq, ordered=False),
                       {'quant_method': 'gptq', **GROUPS, 'desc_act': True}),
    'gptq-no-index': (LLAMA, functools.partial(gptq, index=False), {'quant_method': 'gptq', **GROUPS}),
    'gptq-one-group': (LLAMA, functools.partial(gptq, index=False, size=-1),
                       {'quant_method': 'gptq', **GROUPS, 'group_size': -1}),
    'gptq-v2': (LLAMA, functools.partial(gptq, minus=0),
                {'quant_method': 'gptq', **GROUPS, 'checkpoint_format': 'gptq_v2'}),
    'awq': (LLAMA, awq, {'quant_method': 'awq', **GROUPS, 'version': 'gemm', 'zero_point': True}),
    # one of the packed experts of a layer after the other
    'awq-experts': (Case('mixtral', {**LLAMA.flags, 'num_local_experts': 4}), awq,
                    {'quant_method': 'awq', **GROUPS, 'zero_point': True})}


def make(folder, name):
    """A quantised checkpoint, and a model of transformers with the weights that it stands for."""
    case, method, settings = FILES[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    redraw(transformers.AutoModelForCausalLM.from_config(config_of(case))).save_pretrained(folder / 'plain')
    tensors = safetensors_torch.load_file(folder / 'plain' / 'model.safetensors')
    stored, plain = {}, {}
    for key, p in tensors.items():
        quantised = p.dim() == 2 and '_proj' in key or '.experts.' in key
        parts, weight = method(key, tuple(p.shape), generator) if quantised else ({key: p}, p)
        stored, plain[key] = stored | parts, weight.float().contiguous()
    assert len(stored) > len(plain)
    safetensors_torch.save_file(plain, folder / 'plain' / 'model.safetensors', {'format': 'pt'})
    safetensors_torch.save_file(stored, folder / 'model.safetensors', {'format': 'pt'})
    config = json.loads((folder / 'plain' / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'quantization_config': settings}))
    made = SimpleNamespace(case=case, source=None, folder=folder, stored=stored)
    made.model = load_reference(folder / 'plain', case).eval()
    return with_text(made)


def with_text(made):
    for seed in range(40):
        made.idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
        if greedy(made):
            return made
    raise AssertionError(f'no prompt leads to a clear choice of all {NEW} tokens')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return functools.cache(lambda name: make(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize('name', FILES)
@torch.no_grad()
def test_quantised_weights_are_what_they_stand_for(made, name, tmp_path):
    made = made(name)
    model, plain = load(made.folder), load(made.folder / 'plain')
    for (key, p), q in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert q.dtype == torch.float32 and (p - q).abs().max() <= 1e-6 * p.abs().max(), key
    assert_logits(model, made, name)
    assert model.generate(made.prompt, NEW, temperature=0).tolist() == made.tokens.tolist()
    model.save_pretrained(tmp_path)
    assert 'quantization_config' not in json.loads((tmp_path / 'config.json').read_text())
    assert_logits(load_reference(tmp_path, made.case), made, f'{name}, exported')


# ----------------------------------------------------------------------------------------------------------
# mxfp4, with the code of transformers


def make_mxfp4(folder):
    """A gpt-oss in mxfp4, which transformers loads by itself."""
    torch.manual_seed(0)
    redraw(transformers.AutoModelForCausalLM.from_config(config_of(OSS))).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = safetensors_torch.load_file(folder / 'model.safetensors')
    for key in [key for key in tensors if key.endswith('_proj') and '.experts.' in key]:
        experts, inputs, out = tensors.pop(key).shape
        tensors[f'{key}_blocks'] = whole((experts, out, inputs // 32, 16), 256, generator).to(torch.uint8)
        tensors[f'{key}_scales'] = (121 + whole((experts, out, inputs // 32), 4, generator)).to(torch.uint8)
    safetensors_torch.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    config = json.loads((folder / 'config.json').read_text())
    config['quantization_config'] = {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}
    (folder / 'config.json').write_text(json.dumps(config))
    made = SimpleNamespace(case=OSS, source=None, folder=folder, stored=tensors)
    settings = transformers.Mxfp4Config(dequantize=True)
    made.model = load_reference(folder, OSS, quantization_config=settings).eval()
    return with_text(made)


@torch.no_grad()
def test_mxfp4_equals_transformers(tmp_path):
    made = make_mxfp4(tmp_path)
    model = load(tmp_path)
    assert_logits(model, made, 'mxfp4')
    assert model.generate(made.prompt, NEW, temperature=0).tolist() == made.tokens.tolist()
    key = 'model.layers.1.mlp.experts.down_proj'
    ours = METHODS['mxfp4'].read({}, made.stored[f'{key}_blocks'], made.stored[f'{key}_scales'])
    assert torch.equal(ours, made.model.state_dict()[key].to(ours.dtype))
    assert torch.equal(ours.float(), made.model.state_dict()[key].float())


def test_mxfp4_of_every_byte_and_exponent_equals_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 254, 1)
    scales = torch.arange(1, 253, dtype=torch.uint8).expand(1, 16, 252)
    want = convert_moe_packed_tensors(blocks[:, :, :252], scales)
    assert torch.equal(METHODS['mxfp4'].read({}, blocks[:, :, :252], scales), want)


# ----------------------------------------------------------------------------------------------------------
# fp8 and bitsandbytes, with the code of others


@pytest.mark.parametrize('shape, grid', [((64, 96), (4, 3)), ((5, 32, 48), (5, 2, 2))])
def test_fp8_equals_transformers(shape, grid):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = random(grid, generator)
    block = [shape[-2] // grid[-2], shape[-1] // grid[-1]]
    ours = METHODS['fp8'].read({'weight_block_size': block}, weight, scale)
    assert torch.equal(ours, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
def test_four_bits_equal_bitsandbytes(kind, nested):
    """Also its own names of the parts. Rows are whole blocks: of others its CPU code mistakes the blocks."""
    bnb = pytest.importorskip('bitsandbytes', reason='what 4 bits stand for is compared with it')
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    numbers, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    want = bnb.functional.dequantize_4bit(numbers, state)
    parts = {'': numbers} | {f'.{key}': p for key, p in state.as_dict(packed=True).items()}
    method = METHODS['bitsandbytes in 4 bits']
    assert set(parts) <= set(method.parts)
    ours = method.read({}, *map(parts.get, method.parts))
    assert (ours - want).abs().max() <= 1e-6


def test_eight_bits_equal_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes', reason='what 8 bits stand for is compared with it')
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    numbers, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    want = bnb.functional.int8_vectorwise_dequant(numbers, largest)
    assert (METHODS['bitsandbytes in 8 bits'].read({}, numbers, largest) - want).abs().max() <= 1e-6


# ----------------------------------------------------------------------------------------------------------
# What is not read, and memory


def change_config(**keys):
    return lambda config, tensors: config['quantization_config'].update(keys)


def without(word):
    return lambda config, tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(word)]


def cut(word):
    return lambda config, tensors: tensors.update({
        key: p[..., :-1].contiguous() for key, p in tensors.items() if key.endswith(word)})


@pytest.mark.parametrize('name, change, word', [
    ('awq', change_config(quant_method='hqq'), 'quant_method=hqq'),
    ('awq', change_config(quant_method=None), 'quant_method=None'),
    ('awq', change_config(quant_method=['awq']), 'quant_method'),
    ('awq', lambda config, tensors: config.update(quantization_config='awq'), 'quantization_config'),
    ('awq', change_config(version='gemv'), "version='gemv'"), ('awq', change_config(bits=3), 'bits=3'),
    ('awq', change_config(zero_point=False), 'zero_point=False'),
    ('awq', lambda config, tensors: config['quantization_config'].pop('group_size'), 'group_size'),
    ('awq', change_config(group_size=8), 'proj'), ('awq', change_config(group_size=0), 'proj'),
    ('gptq', change_config(bits=3), 'bits=3'), ('gptq', change_config(bits='4'), "bits='4'"),
    ('gptq', change_config(bits=8), 'proj'),
    ('gptq', change_config(checkpoint_format='marlin'), "checkpoint_format='marlin'"),
    ('gptq', change_config(dynamic={'-:x': {}}), 'dynamic'),
    ('gptq', without('.scales'), 'scales'), ('gptq', without('.qzeros'), 'proj.weight'),
    ('gptq', cut('.scales'), 'proj'), ('gptq', cut('.g_idx'), 'proj'),
    ('fp8', change_config(weight_block_size=[8, 24]), 'scales for'),
    ('fp8', change_config(weight_block_size='x'), 'proj'),
    ('fp8', without('_scale_inv'), 'scale_inv beside it'),
    ('fp8', cut('_scale_inv'), 'scales for'),
    ('int8', without('.SCB'), 'proj.weight'), ('int8', cut('.SCB'), 'proj'),
    ('nf4', without('__nf4'), 'proj'), ('nf4', cut('__nf4'), 'proj'), ('nf4', cut('.absmax'), 'proj'),
    ('nf4', without('.quant_map'), 'quant_map'),
    ('int8', change_config(load_in_8bit=False, load_in_4bit=True), 'proj')])
def test_quantised_files_that_do_not_fit_together_are_refused(made, name, change, word, tmp_path):
    made = made(name)
    config, tensors = json.loads((made.folder / 'config.json').read_text()), dict(made.stored)
    change(config, tensors)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    safetensors_torch.save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


def test_quantised_matrices_that_are_turned_are_refused(tmp_path):
    redraw(transformers.AutoModelForCausalLM.from_config(config_of(CASES['gpt2']))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['quantization_config'] = bits_and_bytes(8)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='gpt2.* other way round') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)


def test_the_order_of_awq_is_that_of_its_kernel():
    """Number n of a word is column AWQ_ORDER[n] of eight."""
    word = packed(torch.arange(8).unsqueeze(0), 4, AWQ_ORDER).item()
    assert [word >> 4 * n & 15 for n in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


LOADING = """
import re, sys
import safetensors.torch, torch
from model import GPT
def peak():
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='counts memory as Linux does')
def test_loading_holds_one_quantised_weight_at_a_time(tmp_path):
    sizes = dict(n_layer=6, n_embd=512, n_head=8, vocab_size=8192, ffn_width=2048, tie=False, block_size=64)
    model = GPT(GPTConfig(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, **sizes), seed=None)
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    stored = {}
    for key, p in safetensors_torch.load_file(tmp_path / 'model.safetensors').items():
        if '_proj' in key:
            grid = [-(-size // 128) for size in p.shape]
            stored |= {key: p.to(torch.float8_e4m3fn), f'{key}_scale_inv': torch.ones(grid)}
        else:
            stored[key] = p
    safetensors_torch.save_file(stored, tmp_path / 'model.safetensors')
    config = json.loads((tmp_path / 'config.json').read_text())
    config['quantization_config'] = {'quant_method': 'fp8', 'weight_block_size': [128, 128]}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    done = subprocess.run([sys.executable, '-c', LOADING, str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    more, count = int(done.stdout), sum(p.numel() for p in model.parameters())
    assert count > 20e6
    # pages of the file, half as large, may count too; with all weights held twice there would be two times
    assert more < 1.7 * 4 * count, f'{more / 4 / count:.2f} times the weights'
