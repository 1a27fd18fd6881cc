"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the momentum of each matrix, with its
singular values pushed towards one by five Newton-Schulz steps of matrix products,

    X <- a X + (b X X^T + c (X X^T)^2) X        on the smaller side

torch.optim.Muon does this one matrix after the other. The blocks of a model repeat a few shapes: here all
matrices of one shape are one batch, so that a dozen small products become a large one. Not measured on a GPU
yet.
"""
import math
from collections import defaultdict

import torch

# matrices stacked at once take this many numbers, so that a large model needs little memory beside itself
BATCH_NUMEL = 2**27


def newton_schulz(x, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7):
    """x (K,M,N) -> its orthogonalised matrices, (K,M,N) in bf16 as in the original, in fp64 for fp64."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x if x.dtype == torch.float64 else x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, same arguments, state and steps, with the matrices of one shape in one batch."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group['params']:
                if p.grad is not None:
                    shapes[p.shape, p.dtype, p.device].append(p)
            for (shape, *_), params in shapes.items():
                n = max(1, BATCH_NUMEL // shape.numel())
                for start in range(0, len(params), n):
                    self.step_batch(group, params[start:start + n])
        return loss

    def step_batch(self, group, params):
        """One step of some matrices of one shape."""
        momentum, (rows, columns) = group['momentum'], params[0].shape
        grads = [p.grad for p in params]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
        buffers = [self.state[p]['momentum_buffer'] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group['nesterov'] else buffers
        updates = newton_schulz(torch.stack(updates), group['ns_coefficients'], group['ns_steps'],
                                group['eps'])
        if group['adjust_lr_fn'] == 'match_rms_adamw':
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1, rows / columns))
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-group['lr'] * ratio)
