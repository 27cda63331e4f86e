"""Closed-form steps: the log joint as a table in expected statistics, found by probing values."""
