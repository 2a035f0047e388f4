"""Packs ImageNet, from what people have of it, into one array that training reads fast."""

from sagan.prepare.listing import Listing
from sagan.prepare.packing import Prepared, prepare
from sagan.prepare.report import format_report
from sagan.prepare.sources import SourceOptions, list_source

__all__ = ["Listing", "Prepared", "SourceOptions", "format_report", "list_source", "prepare"]
