"""The names of a validation's metrics, for code that chooses among them before torch is loaded."""

from typing import Any

HIGHER = ("mean_acc", "accuracy", "macro_f1", "worst_case_acc", "hmean_acc", "gmean_acc")
"""Metrics of which a higher value is better. Those of class groups are left out: options of evaluation change the
groups, and such options must not change what is trained."""
LOWER = ("error_rate", "ece", "nll")
"""Metrics of which a lower value is better."""
BEST = "best:"
"""Beginning of the values of `keep` that name a metric."""

Validated = dict[str, Any]
"""One validation: `epoch` and `step`, counted from 1, and the metrics that are one number (None: no such images)."""
