"""Whether work grows with what it is given, and not with its square, however fast or busy the machine is.

`grows_linearly(work, small)` compares this thread's processor time for eight times as much with that for `small`: about
8 where it is linear, 64 where it is quadratic. What runs beside it may slow one of the two: the best of some tries
counts.
"""

import time

TIMES = 8
MOST = 24.0  # between the two, as a ratio of each
TRIES = 6


def grows_linearly(work, small):
    """Whether `work(TIMES * small)` takes less than MOST times as long as `work(small)`, in any try."""
    least = {small: float("inf"), TIMES * small: float("inf")}
    for _ in range(TRIES):
        for size in least:
            started = time.thread_time()
            work(size)
            least[size] = min(least[size], time.thread_time() - started)
        if least[TIMES * small] < MOST * least[small]:
            return True
    return False
