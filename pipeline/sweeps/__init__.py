"""Cells outside the grid: experiments and trials. DVC builds the grid; these take one cell through the same stages."""
