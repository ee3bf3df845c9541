"""What is made of finished runs: the dashboard, published runs, tables of the README, differences of two tables."""
