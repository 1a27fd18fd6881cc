"""Short text for numbers, durations and errors."""


def format_quantity(number):
    """1234567 -> 1.23M"""
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(number) >= size:
            return f'{number / size:.3g}{unit}'
    return f'{number:.3g}'


def counted(number, noun):
    """1 step, 2 steps, 2 batches"""
    return f'{number:,} {noun}' + ('' if number == 1 else 'es' if noun.endswith(('ch', 's')) else 's')


def format_duration(seconds):
    """3723 -> 1 h 2 min"""
    h, m, s = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f'{h} h {m} min' if h else f'{m} min {s} s' if m else f'{s} s'


def first_line(error):
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).split('\n')[0]
