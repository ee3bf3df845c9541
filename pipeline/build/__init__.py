"""The inputs of DVC's decisions: composed and checked configuration, hashes of code, and DVC's own files."""
