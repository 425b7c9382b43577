"""Random augmentations of images and the evaluation view."""
