"""A talking corpus made on the spot: speech by espeak-ng, face curves by rule, in Live Link Face's layout.

For demos, tests and benchmarks: it moves like speech, and it is no capture.
"""

from pmm.precompute.synth.corpus import CorpusSpec, Summary, TakeWritten, plan, write_corpus

__all__ = ["CorpusSpec", "Summary", "TakeWritten", "plan", "write_corpus"]
