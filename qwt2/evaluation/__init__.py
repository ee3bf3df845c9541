"""What a model or engine costs and gives.

In come outputs, models and compiled engines; out come accuracy, latency, operation counts, differences between two
executions of one model, and what machine they were taken on.
"""
