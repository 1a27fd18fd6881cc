"""
Rotary positions in config.json: rope_parameters as transformers 5 writes them, rope_scaling and rope_theta as
older files have them.
"""
import math

from nanoblocks.pretrained.keys import width_of_head, write_window_types

# what makes the context longer: {rope_type: {its parameter: flag}}
LONGER = {'factor': 'rope_factor', 'original_max_position_embeddings': 'rope_context'}
SCALING = {
    'linear': {'factor': 'rope_factor'},
    'dynamic': {'factor': 'rope_factor'},
    'yarn': LONGER | {'beta_fast': 'rope_beta_fast', 'beta_slow': 'rope_beta_slow',
                      'truncate': 'rope_truncate', 'attention_factor': 'rope_attention_factor'},
    'llama3': LONGER | {'low_freq_factor': 'rope_low_freq', 'high_freq_factor': 'rope_high_freq'},
    'longrope': LONGER | {'short_factor': 'rope_short', 'long_factor': 'rope_long',
                          'attention_factor': 'rope_attention_factor'},
}
# parameters without a default
REQUIRED = ('low_freq_factor', 'high_freq_factor', 'short_factor', 'long_factor')


def rope_parameters(hf):
    return hf.get('rope_scaling') or hf.get('rope_parameters') or {}


def rope_type(parameters):
    return parameters.get('rope_type') or parameters.get('type') or 'default'


def read_rope(hf, parameters=None, partial=False):
    """
    The flags of rotary positions. parameters: those to read, where config.json has several sets. partial:
    whether models of the family may rotate a part of each head only.
    """
    p = parameters or rope_parameters(hf)
    theta = p.get('rope_theta')
    flags = {'rope_theta': float(hf['rope_theta'] if theta is None else theta)}
    share = p.get('partial_rotary_factor')
    share = hf.get('partial_rotary_factor', 1) if share is None else share
    if partial and share != 1:
        width = int(width_of_head(hf) * share)
        if width % 2 or width < 2:
            raise ValueError(f'partial_rotary_factor={share} in config.json must rotate an even number of '
                             f'coordinates, not {width} of the {width_of_head(hf)} of a head')
        flags['rope_fraction'] = width / width_of_head(hf)
    kind = rope_type(p)
    if kind == 'default' and p.get('factor') is not None and not (p.get('rope_type') or p.get('type')):
        raise ValueError(f'rope_type must be set beside factor={p["factor"]} in config.json')
    if kind == 'default':
        return flags
    if kind not in SCALING:
        raise ValueError(f'rope_type={kind} in config.json must be one of default, {", ".join(SCALING)}')
    return flags | read_scaling(hf, p, kind)


def read_scaling(hf, p, kind):
    """The flags of one rope_type other than the default."""
    original, longest = 'original_max_position_embeddings', 'max_position_embeddings'
    trained = p.get(original) if hf.get(original) is None else hf[original]
    if trained == 0:
        raise ValueError(f'{original}=0 in config.json must be at least 1')
    if p.get('factor') is None and not (trained and kind in ('yarn', 'longrope')):
        # of these two the factor is how much longer the context has become
        more = f', or {original}' if kind in ('yarn', 'longrope') else ''
        raise ValueError(f'factor{more} must be set beside rope_type={kind} in config.json')
    trained = trained or hf[longest]
    factor = hf[longest] / trained if p.get('factor') is None else p['factor']
    # null is no, absent is yes
    p = p | {'factor': factor, original: trained, 'truncate': bool(p.get('truncate', True))}
    if kind == 'longrope':
        p['factor'] = max(p['factor'], 1.0)
    elif p['factor'] < 1:
        raise ValueError(f'factor={p["factor"]} of rope_type={kind} in config.json must be at least 1')
    elif p['factor'] == 1 and kind != 'dynamic':
        if (p.get('attention_factor') or 1) != 1:
            raise ValueError(f'attention_factor={p["attention_factor"]} in config.json must be 1 when factor '
                             'is 1, which scales nothing')
        return {}
    flags = {'rope_scaling': kind} | {flag: p[key] for key, flag in SCALING[kind].items()
                                      if key in REQUIRED or p.get(key) is not None}
    if kind == 'dynamic':
        flags['rope_context'] = hf[longest]
    m, m_all = p.get('mscale'), p.get('mscale_all_dim')
    if kind == 'yarn' and p.get('attention_factor') is None and m and m_all:
        flags['rope_attention_factor'] = mscale(p['factor'], m) / mscale(p['factor'], m_all)
    return flags


def mscale(factor, m=1.0):
    """YaRN's factor on cos and sin for a context `factor` times longer (Peng et al. 2023, section 3.4)."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rope_parameters_of(c):
    """The rope_parameters that transformers 5 reads."""
    p = {'rope_theta': c.rope_theta, 'rope_type': 'default' if c.rope_scaling == 'none' else c.rope_scaling}
    if c.rope_fraction != 1:
        p['partial_rotary_factor'] = c.rope_fraction
    scaling = SCALING.get(c.rope_scaling, {})
    return p | {key: getattr(c, flag) for key, flag in scaling.items() if getattr(c, flag) is not None}


def write_rope(c):
    return {'rope_parameters': rope_parameters_of(c)}


def write_rope_and_windows(c):
    """The same, and the layers that have a window."""
    return write_rope(c) | write_window_types(c)


def read_partial(hf):
    """The flags of a family whose models may rotate a part of each head only."""
    return read_rope(hf, partial=True)


def write_partial(c):
    """For families in which an absent part is not the whole head: the part is written in any case."""
    return {'rope_parameters': rope_parameters_of(c) | {'partial_rotary_factor': c.rope_fraction}}
