"""
Attention over a text that lies on several processes, each with the next T tokens of every row (ring
attention: Liu et al. 2023, https://arxiv.org/abs/2310.01889).

Keys and values go round: in step s, process r holds those of process r - s, attends to them, and passes them
on. No process ever holds more than two pieces. The parts of the softmax are joined by their sums (the
log-sum-exp of the scores), so that the result is that of one process but for rounding. In the backward pass
the pieces go round again and are computed again, and the gradients of keys and values travel with them until
they are home.
"""
import torch
import torch.distributed as dist

from .common import at_least_fp32


class Ring:
    """
    The processes of `group`, in order, that hold a text. In the place of key_pos in `attention`, it says that
    k and v are this process's piece.
    """

    def __init__(self, pos, group=None):
        """pos (T,) int64: the positions of this process's tokens"""
        self.pos, self.group = pos, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def steps(self, scoring):
        """How many pieces a query may see part of: under a window, those that it reaches."""
        if scoring.window is None or scoring.pattern is not None or not scoring.causal:
            return self.size
        return min(self.size, 1 + -(-(scoring.window - 1) // len(self.pos)))

    def blocks(self, step, scoring, size=512):
        """The queries, in slices, that attend to the piece that is here in this step: none if it is later."""
        sees = not scoring.causal or step <= self.rank
        return [slice(at, at + size) for at in range(0, len(self.pos) * sees, size)]

    def shift(self, tensors, by=1):
        """The tensors of the process `by` places before this one; ours go to the one `by` places after it."""
        to, of = ((self.rank + sign * by) % self.size for sign in (1, -1))
        to, of = (self.global_rank(rank) for rank in (to, of))
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        jobs = [dist.P2POp(dist.isend, x.contiguous(), to, self.group) for x in tensors]
        jobs += [dist.P2POp(dist.irecv, x, of, self.group) for x in found]
        for job in dist.batch_isend_irecv(jobs):
            job.wait()
        return found

    def global_rank(self, rank):
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def ring_attention(q, k, v, pos, ring, scoring, part):
    """
    q (B,T,H,D), k (B,T,K,D), v (B,T,K,Dv), all of this process -> (B,T,H,Dv).
    part(q, k, v, pos, key_pos, scoring) gives y (B,T,H,Dv) and the log-sum-exp (B,T,H) of the scores of some
    keys.
    """
    sinks, table = scoring.sinks, scoring.relative[0] if scoring.relative else None
    y, total = Round.apply(q, k, v, table, pos, ring, scoring._replace(sinks=None), part)
    if sinks is not None:
        y = y * torch.sigmoid(total - at_least_fp32(sinks)).unsqueeze(-1)
    return y.to(q.dtype)


class Round(torch.autograd.Function):
    """The pieces of keys and values, once round the ring. -> y (B,T,H,Dv) and the log-sum-exp (B,T,H)"""

    @staticmethod
    def forward(ctx, q, k, v, table, pos, ring, scoring, part):
        ctx.given = pos, ring, scoring, part
        scoring, held = with_table(scoring, table), (k, v, ring.pos)
        y = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=at_least_fp32(q).dtype)
        total = y.new_full(q.shape[:3], -torch.inf)
        for step in range(ring.steps(scoring)):
            held = ring.shift(held) if step else held
            for rows in ring.blocks(step, scoring):
                more, sums = part(q[:, rows], held[0], held[1], pos[rows], held[2], scoring)
                joined = torch.logaddexp(total[:, rows], sums)
                y[:, rows] = more * share(sums, joined) + y[:, rows] * share(total[:, rows], joined)
                total[:, rows] = joined
        ctx.save_for_backward(q, k, v, table, y, total)
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        (pos, ring, scoring, part), (q, k, v, table, y, total) = ctx.given, ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(at_least_fp32(x)) for x in (q, k, v))
        dtable, last = None if table is None else torch.zeros_like(table), ring.steps(scoring) - 1
        held = k, v, ring.pos
        for step in range(last + 1):
            if step:
                *held, dk, dv = ring.shift((*held, dk, dv))
            for rows in ring.blocks(step, scoring):
                with torch.enable_grad():
                    own = [x if x is None else x.detach().requires_grad_()
                           for x in (q[:, rows], *held[:2], table)]
                    more, sums = part(*own[:3], pos[rows], held[2], with_table(scoring, own[3]))
                of_part = share(sums.detach(), total[:, rows])
                # how much this part counts depends on all of them
                dsums = (dy[:, rows] * (more.detach() - y[:, rows])).sum(-1) + dtotal[:, rows]
                found = torch.autograd.grad((more, sums), [x for x in own if x is not None],
                                            (of_part * dy[:, rows], of_part.squeeze(-1) * dsums))
                dq[:, rows] += found[0]
                dk += found[1]
                dv += found[2]
                if table is not None:
                    dtable += found[3]
        if last:    # home
            dk, dv = ring.shift((dk, dv), -last)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtable, None, None, None, None


def share(sums, total):
    """The share (B,T,H,1) of keys with this log-sum-exp in all of them."""
    return (sums - total).exp().unsqueeze(-1)


def with_table(scoring, table):
    return scoring if table is None else scoring._replace(relative=(table, scoring.relative[1]))
