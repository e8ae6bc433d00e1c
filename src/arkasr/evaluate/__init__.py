"""Measuring recognition: test sets, systems, runs, scores, statistics, analysis, robustness, reports.

A run writes manifests of raw predictions (`manifest`); all else is worked out from them (`score`), anybody's included.
"""
