"""What tests share: tiny networks and detectors, oracles, graphs under test, a user's models, golden vectors."""
