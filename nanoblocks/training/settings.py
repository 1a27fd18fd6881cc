"""What the settings of train.py have to obey, apart from the model's flags, which check themselves."""
import importlib.util
import os
import re

from nanoblocks.training.optim import SCHEDULES

WORDS = {'optimizer': ('adamw', 'muon'), 'schedule': tuple(SCHEDULES),
         'dtype': ('auto', 'float32', 'bfloat16', 'float16')}
AT_LEAST = dict.fromkeys(
    ('max_iters', 'log_interval', 'eval_interval', 'eval_iters', 'eval_tokens', 'batch_size',
     'gradient_accumulation_steps', 'lr_decay_iters', 'bad_step_limit', 'batch_tokens'), 1) | dict.fromkeys(
    ('weight_decay', 'grad_clip', 'warmup_iters', 'min_lr', 'muon_lr', 'z_loss', 'prefetch',
     'batch_warmup_iters', 'wandb_samples'), 0)
BELOW_ONE = ('beta1', 'beta2', 'ema')
# words of init_from that are no checkpoint
STARTS = ('scratch', 'resume', 'auto')


def is_checkpoint(name):
    """Whether init_from may be the name of weights to begin with (pretrained.py)."""
    return '/' in name or os.path.exists(name) or bool(re.fullmatch('gpt2(-medium|-large|-xl)?', name))


def check_settings(s, world, block_size):
    """ValueError, one sentence, when the settings, a dict, cannot work in `world` processes."""
    def must(name, rule, ok):
        if not ok:
            raise ValueError(f'{name}={s[name]} must {rule}')
    must('init_from', 'be scratch, resume or auto, or a checkpoint: a folder, a file or a repository of the '
         'hub', s['init_from'] in STARTS or is_checkpoint(s['init_from']))
    for name, words in WORDS.items():
        must(name, f'be one of {", ".join(words)}', s[name] in words)
    for name, least in AT_LEAST.items():
        must(name, f'be at least {least}', s[name] is None or s[name] >= least)
    for name in BELOW_ONE:
        must(name, 'be at least 0 and below 1', 0 <= s[name] < 1)
    must('wsd_decay', 'be between 0 and 1', 0 <= s['wsd_decay'] <= 1)
    must('learning_rate', 'be above 0', s['learning_rate'] > 0)
    must('min_lr', f'be at most learning_rate={s["learning_rate"]}',
         not s['decay_lr'] or s['min_lr'] is None or s['min_lr'] <= s['learning_rate'])
    # a block_size of 0 is refused elsewhere
    tokens = max(1, s['batch_size'] * block_size * world)
    must('batch_tokens', f'be a multiple of the {tokens} tokens of one micro-batch (batch_size x block_size) '
         f'in each of {world} processes', not (s['batch_tokens'] or 0) % tokens)
    must('gradient_accumulation_steps',
         f'be a multiple of the {world} processes that share its micro-batches',
         s['batch_tokens'] or s['gradient_accumulation_steps'] % world == 0)
    must('shard', 'have several processes to cut the model among: start it with torchrun',
         world > 1 or not s['shard'])
    must('dtype', 'not be used with shard=True: choose --dtype=bfloat16',
         s['dtype'] != 'float16' or not s['shard'])
    must('cautious_decay', 'be used with optimizer=muon', s['optimizer'] == 'muon' or not s['cautious_decay'])
    must('wandb_log', 'find wandb: pip install wandb, or leave it out',
         not s['wandb_log'] or importlib.util.find_spec('wandb'))
