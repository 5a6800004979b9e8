"""Kinds of tasks, by level."""
