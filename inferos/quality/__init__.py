"""What a compressed cache costs in quality: differences of distributions, perplexity and recall, always measured."""

from inferos.quality.greedy import Divergence, greedy_divergence, record_greedy
from inferos.quality.measurement import QualityMeasurement, QualityReport
from inferos.quality.measures import (
    Interval,
    Measures,
    Trace,
    compare,
    compare_all,
    evaluate,
    evaluate_all,
    record,
    record_all,
    sample_text,
    windows,
)
from inferos.quality.monitor import QualityMonitor, allowed_delta_ppl
from inferos.quality.recall import Recall
from inferos.quality.recovery import RecoveryLadder
from inferos.quality.scheduler import Alert, Evaluation, QualityScheduler
from inferos.quality.shadow import ShadowReading, ShadowReplay

__all__ = [
    "Alert",
    "Divergence",
    "Evaluation",
    "Interval",
    "Measures",
    "QualityMeasurement",
    "QualityMonitor",
    "QualityReport",
    "QualityScheduler",
    "Recall",
    "RecoveryLadder",
    "ShadowReading",
    "ShadowReplay",
    "Trace",
    "allowed_delta_ppl",
    "compare",
    "compare_all",
    "evaluate",
    "evaluate_all",
    "greedy_divergence",
    "record",
    "record_all",
    "record_greedy",
    "sample_text",
    "windows",
]
