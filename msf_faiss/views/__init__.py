"""Random augmentations of images, and the center view of evaluations."""
