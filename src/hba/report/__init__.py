"""`hba report`: one self-contained HTML page for a run folder."""

from __future__ import annotations

from hba.report.page import write_report

__all__ = ["write_report"]
