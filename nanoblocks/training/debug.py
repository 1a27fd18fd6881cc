"""Looking into a run: the first tensor that is not finite, and where the time of a step goes."""
import os
import sys

import torch

from nanoblocks.formats import first_line


def first_not_finite(model, losses):
    """
    The name of the first tensor of a step that is not finite: a weight, a buffer, the output of a module, the
    loss or a gradient, in the order in which they are computed. None if all are finite. `losses` yields the
    losses of the step's micro-batches, each computed when it is asked for.
    """
    for kind, named in (('weight', model.named_parameters()), ('buffer', model.named_buffers())):
        for name, tensor in named:
            if not is_finite(tensor):
                return f'the {kind} {name}'
    found, hooks = [], []
    for name, module in model.named_modules():
        def check_output(module, args, output, name=name):
            if not all(map(is_finite, output if isinstance(output, tuple) else (output,))):
                found.append(f'the output of {name or "the model"}')
        hooks.append(module.register_forward_hook(check_output))
    for name, p in model.named_parameters():
        def check_gradient(p, name=name):
            if not is_finite(p.grad):
                found.append(f'the gradient of {name}')
        hooks.append(p.register_post_accumulate_grad_hook(check_gradient))
    with torch.compiler.set_stance('force_eager'):
        for loss in losses:
            if not is_finite(loss):
                found.append('the loss')
            loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return found[0] if found else None


def report_bad_steps(model, losses, limit, out_dir):
    """Print on stderr why `limit` steps in a row were skipped; `losses`: see first_not_finite."""
    name = first_not_finite(model, losses)
    reason = f'{name} was not finite' if name else 'a gradient was not finite, but only then'
    sys.stdout.flush()
    print(f'{limit} steps in a row were skipped (bad_step_limit={limit}), because {reason}: resume from the '
          f'checkpoint in {out_dir}, which is older, with a lower learning rate or other data',
          file=sys.stderr)


def is_finite(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return True
    return bool(torch.isfinite(x.detach()).all())


class StepProfiler:
    """Profiles three steps, the fourth to the sixth after a start: the first ones compile and allocate."""

    def __init__(self, device, folder, log):
        self.device, self.folder, self.log = device, folder, log
        self.steps, self.profiler = 0, None

    def step(self):
        """To be called after every step. What fails here ends no training."""
        self.steps += 1
        try:
            self.advance()
        except Exception as error:  # another profiler runs, or the machine forbids it
            self.steps = 6
            self.log.print(f'profile   does not work ({first_line(error)}): training continues without it')

    def advance(self):
        if self.steps == 3:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.startswith('cuda'):
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        if self.steps == 6:
            self.profiler.stop()
            self.report()

    def report(self):
        """Write trace.json, and print the slowest operators."""
        order = 'self_cuda_time_total' if self.device.startswith('cuda') else 'self_cpu_time_total'
        table = self.profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40)
        self.log.print(table)
        path = os.path.join(self.folder, 'trace.json')
        try:
            self.profiler.export_chrome_trace(path)
            self.log.print(f'profile   {path}: open it in chrome://tracing or ui.perfetto.dev')
        except (OSError, RuntimeError) as error:  # a full disk, for instance
            self.log.print(f'profile   {path} could not be written ({first_line(error)})')
