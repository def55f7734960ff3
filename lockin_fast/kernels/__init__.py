"""Kernels written in Python, one package per language; the compiled ones are under csrc/."""


class Refused(Exception):
    """Raised by a kernel's launch, before any work, for a call that it cannot take; the text says why."""
