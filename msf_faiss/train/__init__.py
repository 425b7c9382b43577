"""Training: the loop, the step, its state, and what watches them."""
