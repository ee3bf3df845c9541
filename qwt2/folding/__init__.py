"""From a quantized, compensated model to the integer model that engines run; compensation is gone into its scales."""
