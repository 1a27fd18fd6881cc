"""
Gated activations (Shazeer 2020, https://arxiv.org/abs/2002.05202) on one buffer that holds gate and up side
by side, as one matrix product leaves them: y = act(gate) * up.
"""
import torch.nn.functional as F


def swiglu(gate_up):
    """gate_up (..., 2I), the gate first -> silu(gate) * up, (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up):
    """gate_up (..., 2I), the gate first -> gelu(gate) * up, (..., I), with GELU's tanh form as in Gemma."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate='tanh') * up
