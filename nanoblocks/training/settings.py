"""Rules for the settings of train.py. The model's flags check themselves, in GPTConfig."""
import importlib.util
import os
import re
import shlex
from dataclasses import asdict

from configurator import within
from model import GPTConfig
from nanoblocks.formats import counted
from nanoblocks.objectives import OBJECTIVES
from nanoblocks.training.optim import SCHEDULES

CHOICES = {'optimizer': ('adamw', 'muon'), 'objective': tuple(OBJECTIVES), 'schedule': tuple(SCHEDULES),
           'backend': ('nccl', 'gloo'),
           'dtype': ('auto', 'float32', 'bfloat16', 'float16'), 'stream_dtype': ('float32', 'bfloat16'),
           # modes with CUDA graphs would write over the losses of earlier micro-batches
           'compile_mode': ('default', 'max-autotune-no-cudagraphs')}
LIMITS = {
    'max_iters': {'least': 1}, 'bad_step_limit': {'least': 1},
    'log_interval': {'least': 1}, 'eval_interval': {'least': 1},
    'save_interval': {'least': 1}, 'save_minutes': {'above': 0}, 'keep_newest': {'least': 0},
    'keep_every': {'least': 1}, 'step': {'least': 0},
    'eval_iters': {'least': 1}, 'eval_tokens': {'least': 1},
    'batch_size': {'least': 1}, 'gradient_accumulation_steps': {'least': 1},
    'batch_tokens': {'least': 1}, 'batch_warmup_iters': {'least': 0},
    'learning_rate': {'above': 0}, 'muon_lr': {'least': 0}, 'min_lr': {'least': 0},
    'warmup_iters': {'least': 0}, 'lr_decay_iters': {'least': 1},
    'wsd_decay': {'least': 0, 'most': 1},
    'weight_decay': {'least': 0}, 'grad_clip': {'least': 0}, 'z_loss': {'least': 0},
    'mask_rate': {'above': 0, 'most': 1},
    'beta1': {'least': 0, 'below': 1}, 'beta2': {'least': 0, 'below': 1},
    'ema': {'least': 0, 'below': 1},
    'prefetch': {'least': 0}, 'wandb_samples': {'least': 0},
}
# values of init_from that do not name a checkpoint
STARTS = ('scratch', 'resume', 'auto')
# settings that a resumed run must keep, as it must keep the model's flags and the rows of a step
FIXED = ('seed', 'objective', 'mask_rate', 'doc_mask', 'batch_warmup_iters', 'optimizer')

# When torch.compile pays on a CPU. The first step then takes 33 to 97 seconds longer, and the others 1 / 1.26
# to 1 / 1.95 of their time, which makes up for it after 1e13 (Gemma 2, Mamba-2) to 3.5e13 FLOPs (Llama of 5M
# and of 124M parameters). GPT-2's blocks gain nothing when they are narrow: 0.93 at width 256, 1.30 at 768.
# Measured with two runs for each of several architectures, which print tokens/s and `compiled in`:
#     python train.py config/llama_small.py config/tiny.py --max_iters=60 --compile=True     # and False
PAYS_AFTER = 1e14   # FLOPs of a run: a few times those above, as machines differ
NARROW = 512        # width


def check_settings(s, world, done=0):
    """ValueError if the settings s, a dict, cannot work in `world` processes, after `done` steps."""
    must = rule_of(s)
    must('init_from', s['init_from'] in STARTS or is_checkpoint(s['init_from']),
         'be scratch, resume or auto, or a checkpoint: a folder, a file or a repository of the hub')
    for name, words in CHOICES.items():
        must(name, s[name] in words, f'be one of {", ".join(words)}')
    for name, limits in LIMITS.items():
        if s[name] is not None:
            must(name, *within(s[name], limits))
    must('dataset', s['dataset'], 'be a folder of data/, or a path: --dataset=pysource')
    must('step', s['step'] is None or s['init_from'] == 'resume',
         'be used with --init_from=resume, which goes on from the checkpoint of that step')
    must('max_iters', s['max_iters'] >= done, f'be at least {done}, the steps that the run has made')
    must('min_lr', not s['decay_lr'] or s['min_lr'] is None or s['min_lr'] <= s['learning_rate'],
         f'be at most learning_rate={s["learning_rate"]}')
    shares = 1 if s['context_parallel'] else world
    must('gradient_accumulation_steps', s['batch_tokens'] or s['gradient_accumulation_steps'] % shares == 0,
         f'be a multiple of {world}, the number of processes')
    for name in ('shard', 'context_parallel'):
        must(name, world > 1 or not s[name],
             f'have several processes to share with: start it with torchrun, or set --{name}=False')
    must('dtype', s['dtype'] != 'float16' or not s['shard'],
         'not be used with shard=True: choose --dtype=bfloat16')
    must('cautious_decay', s['optimizer'] == 'muon' or not s['cautious_decay'], 'be used with optimizer=muon')
    must('dry', not (s['dry'] and s['context_parallel']), 'be left out with context_parallel=True')
    must('wandb_log', not s['wandb_log'] or has_wandb(),
         'find wandb: pip install wandb, or leave it out')


def check_machine(s, dtype, compiled):
    """ValueError for settings s that would be ignored with the dtype and compilation that were chosen."""
    must = rule_of(s)
    narrow = s['stream_dtype'] != 'float32'
    must('stream_dtype', dtype == 'bfloat16' or not narrow,
         f'be float32 when dtype={dtype}: add --dtype=bfloat16')
    must('stream_dtype', not (s['shard'] and narrow),
         'be float32 when shard=True, where the stream is bfloat16 already')
    must('head_dtype', dtype == 'bfloat16' or s['head_dtype'] == 'auto',
         f'be auto when dtype={dtype}: add --dtype=bfloat16')
    must('compile_mode', compiled or s['compile_mode'] == 'default',
         'be default when nothing is compiled: add --compile=True')


def has_wandb():
    """Whether wandb is installed; a folder of that name, as its runs leave, is found too but has no file."""
    found = importlib.util.find_spec('wandb')
    return found is not None and found.origin is not None


def check_lengths(s, world, block_size):
    """ValueError if the settings s do not fit the model's context."""
    must = rule_of(s)
    must('eval_tokens', s['eval_tokens'] is None or s['eval_tokens'] >= block_size,
         f'be at least block_size={block_size}')
    tokens = s['batch_size'] * block_size * world
    must('batch_tokens', s['eval_only'] or not (s['batch_tokens'] or 0) % tokens,
         f'be a multiple of {tokens}: batch_size * block_size tokens in {counted(world, "process")}')


def unread(s, world):
    """The rows of `warn_of_unread` for a run with the settings s."""
    decays, schedule = s['decay_lr'], s['schedule']
    return [
        (s['optimizer'] == 'adamw', 'with optimizer=adamw', ['muon_lr']),
        (not decays, 'with decay_lr=False',
         ['schedule', 'warmup_iters', 'lr_decay_iters', 'min_lr', 'wsd_decay']),
        (decays and schedule == 'constant', 'with schedule=constant', ['lr_decay_iters', 'min_lr']),
        (decays and schedule != 'wsd', f'with schedule={schedule}', ['wsd_decay']),
        (s['eval_tokens'], f'with eval_tokens={s["eval_tokens"]}', ['eval_iters']),
        (s['batch_tokens'], f'with batch_tokens={s["batch_tokens"]}', ['gradient_accumulation_steps']),
        (s['objective'] not in ('mask', 'span'), f'with objective={s["objective"]}', ['mask_rate']),
        (s['save_interval'] or s['save_minutes'], 'with save_interval or save_minutes',
         ['always_save_checkpoint']),
        (not s['wandb_log'], 'with wandb_log=False', ['wandb_project', 'wandb_run_name', 'wandb_samples']),
        (world == 1, 'in one process', ['backend'])]


def choose_compile(s, model, device_type, world, before=None):
    """
    (whether to compile the model, why in words; no words where nothing had to be weighed) by the settings s.
    It must not depend on how far a run is: the resumed part must choose as the part before did, to give the
    same bits. before: whether that was compiled; None for a new run.
    """
    if s['compile'] is not None:
        return s['compile'], ''
    if s['context_parallel']:
        return False, 'eager, as messages between processes cannot be compiled'
    if device_type != 'cpu':
        return device_type == 'cuda', ''
    if before is not None:
        return before, f'{"compiled" if before else "eager"}, as the run was so far'
    if s['eval_only']:
        return False, 'eager, as an evaluation is too short'
    if world > 1:
        return False, 'eager, as there are several processes'
    c = model.config
    flops = s['max_iters'] * s['gradient_accumulation_steps'] * s['batch_size'] * c.block_size
    flops *= model.flops_per_token(c.block_size)
    if c.n_embd < NARROW and (c.norm, c.ffn) == ('layernorm', 'gelu') and c.mixers() == {'a'}:
        return False, f'eager, as compiling narrow blocks of GPT-2 gains nothing (n_embd < {NARROW})'
    if c.dropout:
        return False, 'eager, as compiling gains nothing where there is dropout'
    if flops < PAYS_AFTER:
        return False, f'eager, as the run has {flops:.1e} FLOPs, and compiling pays from {PAYS_AFTER:.0e} on'
    return True, f'compiled, which takes a minute or two, and pays as the run has {flops:.1e} FLOPs'


def rule_of(settings):
    """must(name, ok, rule) raises a ValueError unless ok."""
    def must(name, ok, rule):
        if not ok:
            raise ValueError(f'{name}={settings[name]} must {rule}')
    return must


def check_objective(s, config):
    """What kind of model it is: decoder, encoder or both. ValueError if the objective is none for it."""
    kind = 'both' if config.n_encoder else 'decoder' if config.causal else 'encoder'
    fits = [name for name, task in OBJECTIVES.items() if kind in task.models]
    told = f'n_encoder={config.n_encoder}' if config.n_encoder else f'causal={config.causal}'
    must = rule_of(s | {'block_size': config.block_size})
    must('objective', s['objective'] in fits, f'be {", ".join(fits[:-1])} or {fits[-1]} when {told}')
    if s['objective'] == 'span':
        must('mask_rate', s['mask_rate'] < 1, 'be below 1 when objective=span, as a part of each row is kept')
        must('block_size', config.block_size >= 3, 'be at least 3 when objective=span')
    return kind


def check_documents(s, config):
    """ValueError if with doc_mask the documents of a row could not be read each by itself."""
    if not s['doc_mask']:
        return
    must = rule_of(s)
    must('doc_mask', s['objective'] in ('next', 'mask', 'diffusion'),
         f'be False when objective={s["objective"]}, where a row is one text in two parts')
    must('doc_mask', not config.n_encoder, f'be False when n_encoder={config.n_encoder}: an encoder beside a '
         'decoder reads a row as one text')
    must('doc_mask', not s['context_parallel'], 'be False when context_parallel=True, which splits rows')
    must('doc_mask', config.pos != 'alibi_bf16', 'be False when pos=alibi_bf16, whose rounding depends on '
         'where a row begins: choose alibi')


def check_context_parallel(s, config, world):
    """ValueError if the parts of a row that `world` processes hold cannot be trained as one row."""
    if not s['context_parallel']:
        return
    def must(name, ok, rule):
        if not ok:
            value = s[name] if name in s else getattr(config, name)
            raise ValueError(f'{name}={value} must {rule} when context_parallel=True')
    must('block_size', config.block_size % world == 0, f'be a multiple of {world}, the number of processes,')
    must('compile', not s['compile'], 'be False')
    must('objective', s['objective'] == 'next', 'be next')
    must('dropout', config.dropout == 0, 'be 0')
    must('n_predict', config.n_predict == 1, 'be 1')
    must('attn', config.attn != 'gau', 'not be gau, which has no softmax whose parts could be joined,')


def check_vocabulary(config, n_tokens, dataset, published, marks=0):
    """
    ValueError if a model lacks tokens of its data, or the `marks` behind them that an objective needs;
    published: what its weights come from, or None.
    """
    if published and n_tokens - marks <= config.vocab_size < n_tokens:
        raise ValueError(f'vocab_size={config.vocab_size} must be at least {n_tokens}, the tokens of '
                         f'dataset={dataset} and {counted(marks, "mark")} of the objective: choose another '
                         '--objective, or leave --init_from out')
    if config.vocab_size < n_tokens:
        remedy = f'prepare it with --tokenizer={published}' if published else 'leave it out, and it is set'
        raise ValueError(f'vocab_size={config.vocab_size} must be at least the {n_tokens} '
                         f'tokens of dataset={dataset}: {remedy}')


def warn_of_tokenizer(published, dataset, known, same):
    """Warn if data may have other tokens than weights, whose tokenizer is not `known` or not the `same`."""
    if not known:
        print(f'warning: init_from={published} has no tokenizer to compare with: dataset={dataset} must have '
              'been prepared with the one that its weights were trained with; to have that checked, put the '
              'tokenizer.json that was published with them beside them')
    elif not same:
        print(f'warning: dataset={dataset} was not prepared with the tokenizer of {published}, so its token '
              f'numbers have other meanings: prepare it with --tokenizer={published}')


def is_checkpoint(name):
    """Whether init_from may name published weights (see nanoblocks/pretrained)."""
    return '/' in name or os.path.exists(name) or bool(re.fullmatch('gpt2(-medium|-large|-xl)?', name))


def refuse_contradictions(resumed, path, model_args, settings, given, meta):
    """
    ValueError if a resumed run would have other data, other model flags or FIXED settings, or other rows in a
    step. An evaluation (eval_only) may have other flags, and other data of the same tokens.

    resumed     the checkpoint, read from path
    model_args  model flags of the command line
    settings    all settings
    given       {name: the flag or file that set it}
    meta        of the dataset
    """
    # an older checkpoint lacks the flags that came after it: they had their defaults
    trained = asdict(GPTConfig(**resumed['config']))
    before = {name: resumed['settings'].get(name, False) for name in FIXED} | trained
    flags = trained | model_args
    try:
        flags = asdict(GPTConfig(**flags))
    except ValueError:
        pass  # flags that do not fit together contradict the checkpoint, which the message below says
    now = {name: settings[name] for name in FIXED} | flags
    changed = [f'{name} (checkpoint {before[name]!r}, now {now[name]!r} by {given[name]})'
               for name in now if name in given and name in before and now[name] != before[name]]
    changed += other_rows(resumed, settings)
    if changed and not settings['eval_only']:
        raise ValueError(f'a resumed run must keep its model, seed, batches and optimizer: '
                         f'{"; ".join(changed)}; leave that out, or start a new run in another out_dir')
    if settings['eval_only'] and meta['tokenizer'] != resumed['meta']['tokenizer']:
        raise ValueError(f'dataset={settings["dataset"]} must have the tokens that {path} was trained on '
                         f'({resumed["settings"]["dataset"]}), but was prepared with another tokenizer: '
                         f'prepare it again by --tokenizer={shlex.quote(os.path.dirname(path))}')
    if meta != resumed['meta'] and not settings['eval_only']:
        raise ValueError(f'dataset={settings["dataset"]} must hold the data that {path} was trained on '
                         f'({resumed["settings"]["dataset"]}), but its meta.json differs, so it is another '
                         'dataset or was prepared anew: name the old one, or start a new run')


def other_rows(resumed, settings):
    """Sentences that say why the steps of a resumed run would not be of the rows that follow; or none."""
    old, old_micro = (resumed['settings'][name] for name in ('batch_size', 'gradient_accumulation_steps'))
    new, micro = settings['batch_size'], settings['gradient_accumulation_steps']
    rows, told = old * old_micro, f'batch_size (checkpoint {old}, now {new})'
    if new * micro != rows:
        length = resumed['config']['block_size']
        needs = (f'batch_tokens={rows * length}' if settings['batch_tokens'] else
                 f'gradient_accumulation_steps={rows // new}' if rows % new == 0 else
                 f'a batch_size that divides {rows}')
        yield (f'{told} times gradient_accumulation_steps (checkpoint {old_micro}, now {micro}) are not the '
               f'{rows} rows of a step, which needs {needs}')
    elif new != old and (resumed['step'] < settings['batch_warmup_iters']
                         or resumed['micro_done'] * old % new):
        yield f'{told} with batch_warmup_iters={settings["batch_warmup_iters"]}, whose steps have fewer rows'


def keep_rows(resumed, settings, block_size):
    """
    Micro-batches that a resumed run has done, by its batch_size of now. If that is another than before,
    evaluations keep their tokens by the setting eval_tokens, unless the number of batches is changed too.
    """
    before, batch_size = resumed['settings'], settings['batch_size']
    same_iters = settings['eval_iters'] == before['eval_iters']
    if batch_size != before['batch_size'] and settings['eval_tokens'] is None and same_iters:
        settings['eval_tokens'] = before['batch_size'] * settings['eval_iters'] * block_size
    return resumed['micro_done'] * before['batch_size'] // batch_size
