"""Paired timing, statistics, memory, result store, report. See `hasten.measure.comparison.compare`."""
