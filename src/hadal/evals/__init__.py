"""Evaluations: an agent on many tasks, each in a box of its own, and what came of them."""

from hadal.evals.report import Score, interval, scores, well_formed
from hadal.evals.task_run import (
    TaskResult,
    journal_path,
    keep_settings,
    read_result,
    run_task,
    run_tasks,
)

__all__ = [
    "Score",
    "TaskResult",
    "interval",
    "journal_path",
    "keep_settings",
    "read_result",
    "run_task",
    "run_tasks",
    "scores",
    "well_formed",
]
