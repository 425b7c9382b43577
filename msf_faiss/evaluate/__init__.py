"""Evaluations of frozen and fine-tuned encoders."""
