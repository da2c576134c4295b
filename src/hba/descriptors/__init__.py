"""Behavioural descriptors: what is measured in a clip (openSMILE, MediaPipe landmarks), and the vector made of it.

`pool` and its neighbours turn a descriptor into what the BAM adapters read; `hba atlas describe` extracts descriptors.
Nothing here fills a gap: what cannot be measured or pooled is an error or a recorded failure, never zeros.
"""

from __future__ import annotations

from hba.batch.pool import flatten_landmarks, pool, sequence, stack

__all__ = ["flatten_landmarks", "pool", "sequence", "stack"]
