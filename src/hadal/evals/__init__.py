"""Evaluations: an agent on many tasks, each in a box of its own, and what came of them."""

from hadal.evals.report import FamilyScore, interval, scores
from hadal.evals.task_run import TaskResult, keep_settings, run_task, run_tasks

__all__ = [
    "FamilyScore",
    "TaskResult",
    "interval",
    "keep_settings",
    "run_task",
    "run_tasks",
    "scores",
]
