"""Each metric is named once: whoever shows one shows what is logged."""

from raytrl.launch.session.gauges import _FROM_METRICS
from raytrl.launch.sweep.book import _ALSO
from raytrl.records.metrics import ALL_PHASES, METRICS, time_of
from raytrl.report.progress import CLOSING
from raytrl.report.run_page import PICTURES


def test_every_metric_says_what_it_means() -> None:
    assert all(metric.meaning for metric in METRICS.values())
    assert all(time_of(phase) in METRICS for phase in ALL_PHASES)


def test_what_is_shown_is_logged() -> None:
    shown = {*CLOSING, *_ALSO, *_FROM_METRICS.values(), *(key for _, lines in PICTURES for key in lines)}
    assert shown - set(METRICS) == set()
