"""The approximate bank of inverted lists, and what it consists of."""
