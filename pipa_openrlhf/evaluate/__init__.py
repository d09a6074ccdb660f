"""Grading, results with their scores, report."""
