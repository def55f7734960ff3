"""Figures and the HTML report of a finished run."""

from lockin_fast.report.html import write_report

__all__ = ["write_report"]
