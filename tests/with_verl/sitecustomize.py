"""Read by Python itself in every process of these tests' runs.

A start of Ray and verl imports the same 4,000 modules ten times; a fifth of that is the collector, which looks through
what has been imported already.
"""

import gc

gc.set_threshold(2_000_000, 20, 20)
