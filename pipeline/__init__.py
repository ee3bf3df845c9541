"""The benchmark pipeline. Its packages import each other in one direction only.

common <- tasks <- build <- stages <- sweeps <- comparison
"""
