"""Commands that read finished runs: the dashboard, publishing, the README's tables, and comparing two tables."""
