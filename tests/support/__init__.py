"""Code that tests share: tiny networks and detectors, oracles, graphs under test, users' models, golden vectors."""
