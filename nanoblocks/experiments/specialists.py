"""x"""
def specialists(folders, argv, figures, device):
    """Which experts take which kinds of tokens, in a trained mixture of experts: placeholder line."""
