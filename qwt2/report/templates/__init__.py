"""Templates and what they include; imported so that whoever renders them depends on them."""
