"""Benchmarks that anybody can rerun: inferos and its peers, timed in turns in one process."""

from inferos.bench.record import Peer, Report, Row
from inferos.bench.timing import Contender, Timing, interleave

__all__ = ["Contender", "Peer", "Report", "Row", "Timing", "interleave"]
