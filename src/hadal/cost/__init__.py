"""What a V4 network costs, from its config alone: parameters, FLOPs, KV bytes, weight bytes.

Formulas only, no torch; tests/unit/test_cost.py holds them against the modules themselves.
`estimate` gives one report, `figure` draws the two curves of the report's Figure 1.
"""

from hadal.cost.baselines import BASELINES
from hadal.cost.estimate import CostReport, estimate, resolve
from hadal.cost.flops import CONVENTIONS, Convention
from hadal.cost.kv import KV_FORMATS

__all__ = [
    "BASELINES",
    "CONVENTIONS",
    "KV_FORMATS",
    "Convention",
    "CostReport",
    "estimate",
    "resolve",
]
