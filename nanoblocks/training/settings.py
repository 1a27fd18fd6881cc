"""Rules for the settings of train.py. The model's flags check themselves, in GPTConfig."""
import importlib.util
import os
import re
from dataclasses import asdict

from model import GPTConfig
from nanoblocks.training.optim import SCHEDULES

CHOICES = {'optimizer': ('adamw', 'muon'), 'schedule': tuple(SCHEDULES),
           'dtype': ('auto', 'float32', 'bfloat16', 'float16')}
TESTS = {'at least': lambda x, limit: x >= limit, 'above': lambda x, limit: x > limit,
         'below': lambda x, limit: x < limit, 'at most': lambda x, limit: x <= limit}
LIMITS = {
    'max_iters': {'at least': 1}, 'bad_step_limit': {'at least': 1},
    'log_interval': {'at least': 1}, 'eval_interval': {'at least': 1},
    'eval_iters': {'at least': 1}, 'eval_tokens': {'at least': 1},
    'batch_size': {'at least': 1}, 'gradient_accumulation_steps': {'at least': 1},
    'batch_tokens': {'at least': 1}, 'batch_warmup_iters': {'at least': 0},
    'learning_rate': {'above': 0}, 'muon_lr': {'at least': 0}, 'min_lr': {'at least': 0},
    'warmup_iters': {'at least': 0}, 'lr_decay_iters': {'at least': 1},
    'wsd_decay': {'at least': 0, 'at most': 1},
    'weight_decay': {'at least': 0}, 'grad_clip': {'at least': 0}, 'z_loss': {'at least': 0},
    'beta1': {'at least': 0, 'below': 1}, 'beta2': {'at least': 0, 'below': 1},
    'ema': {'at least': 0, 'below': 1},
    'prefetch': {'at least': 0}, 'wandb_samples': {'at least': 0},
}
# values of init_from that do not name a checkpoint
STARTS = ('scratch', 'resume', 'auto')
# settings that a resumed run must keep, as it must keep the model's flags
FIXED = ('seed', 'batch_size', 'gradient_accumulation_steps', 'batch_tokens', 'batch_warmup_iters',
         'optimizer')


def check_settings(s, world, done=0):
    """ValueError if the settings s, a dict, cannot work in `world` processes, after `done` steps."""
    must = rule_of(s)
    must('init_from', 'be scratch, resume or auto, or a checkpoint: a folder, a file or a repository of the '
         'hub', s['init_from'] in STARTS or is_checkpoint(s['init_from']))
    for name, words in CHOICES.items():
        must(name, f'be one of {", ".join(words)}', s[name] in words)
    for name, limits in LIMITS.items():
        must(name, 'be ' + ' and '.join(f'{word} {limit}' for word, limit in limits.items()),
             s[name] is None or all(TESTS[word](s[name], limit) for word, limit in limits.items()))
    must('max_iters', f'be at least {done}, the steps that the run has made', s['max_iters'] >= done)
    must('min_lr', f'be at most learning_rate={s["learning_rate"]}',
         not s['decay_lr'] or s['min_lr'] is None or s['min_lr'] <= s['learning_rate'])
    must('gradient_accumulation_steps',
         f'be a multiple of the {world} processes that share the micro-batches',
         s['batch_tokens'] or s['gradient_accumulation_steps'] % world == 0)
    must('shard', 'have several processes to shard over: start it with torchrun', world > 1 or not s['shard'])
    must('dtype', 'not be used with shard=True: choose --dtype=bfloat16',
         s['dtype'] != 'float16' or not s['shard'])
    must('cautious_decay', 'be used with optimizer=muon', s['optimizer'] == 'muon' or not s['cautious_decay'])
    must('wandb_log', 'find wandb: pip install wandb, or leave it out',
         not s['wandb_log'] or importlib.util.find_spec('wandb'))


def check_lengths(s, world, block_size):
    """ValueError if the settings s do not fit the model's context."""
    must = rule_of(s)
    must('eval_tokens', f'be at least block_size={block_size}',
         s['eval_tokens'] is None or s['eval_tokens'] >= block_size)
    tokens = s['batch_size'] * block_size * world
    must('batch_tokens', f'be a multiple of {tokens}: batch_size * block_size tokens in each of {world} '
         'processes', s['eval_only'] or not (s['batch_tokens'] or 0) % tokens)


def rule_of(settings):
    def must(name, rule, ok):
        if not ok:
            raise ValueError(f'{name}={settings[name]} must {rule}')
    return must


def is_checkpoint(name):
    """Whether init_from may name published weights (see nanoblocks/pretrained)."""
    return '/' in name or os.path.exists(name) or bool(re.fullmatch('gpt2(-medium|-large|-xl)?', name))


def refuse_contradictions(resumed, path, model_args, settings, given, meta):
    """
    ValueError if a resumed run would have other data, or other model flags or FIXED settings. An evaluation
    (eval_only) may have other flags.

    resumed     the checkpoint, read from path
    model_args  model flags of the command line
    settings    all settings
    given       {name: the flag or file that set it}
    meta        of the dataset
    """
    before = {name: resumed['settings'].get(name) for name in FIXED} | resumed['config']
    flags = resumed['config'] | model_args
    try:
        flags = asdict(GPTConfig(**flags))
    except ValueError:
        pass  # flags that do not fit together contradict the checkpoint, which the message below says
    now = {name: settings[name] for name in FIXED} | flags
    changed = [f'{name} (checkpoint {before[name]!r}, now {now[name]!r} by {given[name]})'
               for name in now if name in given and name in before and now[name] != before[name]]
    if changed and not settings['eval_only']:
        raise ValueError(f'a resumed run must keep its model, seed, batches and optimizer: '
                         f'{"; ".join(changed)}; leave that out, or start a new run in another out_dir')
    if meta != resumed['meta']:
        raise ValueError(f'dataset={settings["dataset"]} must hold the data that {path} was trained on '
                         f'({resumed["settings"]["dataset"]}), but its meta.json differs, so it is another '
                         'dataset or was prepared anew: name the old one, or start a new run')
