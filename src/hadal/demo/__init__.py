"""The demonstration: everything that a user would start by hand, at once, with one of it killed on the way."""

from hadal.demo.show import DemoReport, run_demo

__all__ = ["DemoReport", "run_demo"]
