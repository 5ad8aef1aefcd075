"""What a compressed cache costs in quality: differences of distributions, perplexity and recall, always measured."""

from inferos.quality.measures import Interval, Measures, Trace, compare, evaluate, record, sample_text
from inferos.quality.recall import Recall

__all__ = [
    "Interval",
    "Measures",
    "Recall",
    "Trace",
    "compare",
    "evaluate",
    "record",
    "sample_text",
]
