"""Progress of a preparation on the console (which data/console.py keeps from ending it)."""
import sys
import time


def say(text, end='\n'):
    """print(text) at once, so that a log shows how far a preparation is."""
    print(text, end=end, flush=True)


class Progress:
    """
    How far work has come: percentage and time left, on one line of a terminal, or every ten seconds as a line
    of a log. `total` is in any unit. Nothing is shown of work that takes less than a second.
    """

    def __init__(self, label, total):
        self.label, self.total, self.done = label, total, 0
        self.terminal = hasattr(sys.stdout, 'isatty') and sys.stdout.isatty()
        self.start = time.monotonic()
        self.last, self.width = self.start + (0 if self.terminal else -5), 0

    def add(self, n=1):
        self.done += n
        now = time.monotonic()
        if now - self.last < (1 if self.terminal else 10):
            return
        self.last = now
        share = min(1, self.done / self.total) if self.total else 1
        seconds = (now - self.start) * (1 - share) / share if share else 0
        left = f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'
        text = f'{self.label}: {share:.0%}, about {left} left'
        if self.terminal:
            say('\r' + text.ljust(self.width), end='')
        else:
            say(text)
        self.width = len(text)

    def close(self):
        if self.terminal and self.width:
            say('\r' + ' ' * self.width + '\r', end='')
            self.width = 0
