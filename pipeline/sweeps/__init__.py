"""Cells outside the grid: experiments and trials. Each goes through the grid's stages, in one process."""
