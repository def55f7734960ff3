"""Figures and the HTML report of a finished run, alone or beside others."""

from lockin_fast.report.html import write_report
from lockin_fast.report.robustness import compare, stored

__all__ = ["compare", "stored", "write_report"]
