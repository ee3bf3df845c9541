"""The benchmark pipeline, in rooms. Imports go one way: common <- tasks <- build <- stages <- sweeps <- comparison."""
