"""Activation patching: where in a model a behaviour lives."""
