"""Measurements: timing, sweeps of training runs, their statistics, reports and figures."""
