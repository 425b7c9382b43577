"""Banks that scan a compressed copy of the ring, and compare the best of it exactly."""
