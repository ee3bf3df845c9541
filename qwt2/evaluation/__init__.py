"""What a model or engine costs and gives: accuracy, latency, differences between executions, this machine."""
