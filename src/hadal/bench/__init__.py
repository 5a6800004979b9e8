"""Measurements that users can repeat: each compares with a peer or with itself, in one run, interleaved.

One module a workload; `report.py` is how all of them count and print. `hadal bench` runs them.
"""

from hadal.bench.report import Report

__all__ = ["Report"]
