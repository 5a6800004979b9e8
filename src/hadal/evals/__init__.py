"""Evaluations: an agent on many tasks, each in a box of its own, and what came of them."""

from hadal.evals.report import FamilyScore, interval, scores
from hadal.evals.task_run import TaskResult, run_task, run_tasks

__all__ = ["FamilyScore", "TaskResult", "interval", "run_task", "run_tasks", "scores"]
