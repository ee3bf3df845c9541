"""What DVC decides by: composed and checked configuration, hashes of code, its files, and whether they are sound."""
