"""Templates of the pages and their scripts and styles. Modules that render them import this package to depend on it."""
