"""The approximate bank: inverted lists that follow the ring."""
