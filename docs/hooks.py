"""What mkdocs runs on each page: cross references of docstrings become links."""

import re

ROLE = re.compile(r":(?:func|class|meth|attr|mod):<code>([^<]+)</code>")


def on_page_content(html: str, **_) -> str:
    """Turn a role of a docstring into a link, or into its name where the documentation does not have it."""
    return ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
