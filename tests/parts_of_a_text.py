"""
Run by tests/test_sequence.py in several processes: loss and gradients of models whose text lies on all of
them. Process 0 saves {name of the case: (loss, {parameter: gradient})}, the means over processes.

    RANK=0 WORLD_SIZE=2 ... python tests/parts_of_a_text.py OUT
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from conftest import scaled, tokens, toy  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from nanoblocks.training.sequence import Sequence  # noqa: E402

CASES = {
    'GPT-2': toy(),
    'GQA, rope, QK norm': toy(pos='rope', n_kv_head=2, norm='rmsnorm', ffn='swiglu', qk_norm=True),
    'windows': toy(pos='rope', layer_pattern='aw', window=5),
    'a window within two parts': toy(pos='rope', layer_pattern='w', window=3),
    'a window, the first tokens and a stride': toy(pos='rope', layer_pattern='w', window=4, global_tokens=2,
                                                   window_stride=6),
    'chunks': toy(pos='rope', layer_pattern='ac', window=5),
    'latents': toy(pos='rope', attn='mla'),
    'two maps': toy(pos='rope', attn='diff'),
    'ALiBi, soft cap, sinks': toy(pos='alibi', softcap=3.0, sinks=True),
    'a table of distances': toy(pos='relative', rel_buckets=8),
    'a table for each layer': toy(pos='relative', rel_shared=False),
    'embeddings mixed in': toy(embed_skip=True, value_embed=True),
    'experts': toy(ffn_pattern='e', n_expert=4, balance='bias'),
    'Mamba': toy(layer_pattern='m', pos='none', ssm='mamba1'),
    'Mamba-2 and attention': toy(layer_pattern='ma', pos='none', ssm_head_dim=8),
    'gated DeltaNet and attention': toy(layer_pattern='ra', pos='rope'),
    'a decay for each key': toy(layer_pattern='r', pos='none', rnn_decay='key'),
    'no convolution': toy(layer_pattern='r', pos='none', rnn_conv=0),
    'RWKV-7': toy(layer_pattern='rk', pos='none', rnn='rwkv7', ffn_pattern='-'),
    'RWKV-6': toy(layer_pattern='rk', pos='none', rnn='rwkv6', ffn_pattern='-'),
    'RWKV-4': toy(layer_pattern='rk', pos='none', rnn='rwkv4', ffn_pattern='-'),
    'in parallel, a short convolution, no mixer': toy(pos='rope', layer_pattern='hs-', n_layer=3,
                                                      ssm_head_dim=8),
    'wide streams': toy(residual='hyper', pos='rope'),
    'S4D': toy(layer_pattern='r', pos='none', rnn='s4d'),
}


def model_and_batch(flags):
    idx = tokens(flags, 2, flags['block_size'] + 1)
    return scaled(GPT(GPTConfig(**flags)), 3).double(), {'idx': idx[:, :-1], 'targets': idx[:, 1:]}


def of_parts(flags):
    """(loss, {parameter: gradient}) where each process has a part of the text."""
    model, batch = model_and_batch(flags)
    sequence = Sequence(model, flags['block_size'])
    losses = sequence.closed(model(**sequence.part(batch), parts=True)[1])
    losses['loss'].backward()
    return means(losses['loss'].detach(), {name: p.grad for name, p in model.named_parameters()})


def means(loss, grads):
    for x in (loss, *grads.values()):
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return loss, grads


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    found = {name: of_parts(flags) for name, flags in CASES.items()}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
