"""Report of stored results: tables, charts and one self-contained HTML page."""
