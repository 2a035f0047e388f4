"""Packs ImageNet, in any form that people have it, into one array that training reads fast.

`sources` recognises a source; `folders`, `tars` and `parquet` list its images (`listing`), `ground_truth` finds the
classes of those without. `packing` does the work in parts (`part`) on processes (`pool`), in a folder that survives a
kill (`staging`); `report` says what was found. `synthetic` generates sources to try it on.
"""

from sagan.prepare.listing import Listing
from sagan.prepare.packing import Prepared, prepare
from sagan.prepare.report import format_report
from sagan.prepare.sources import SourceOptions, list_source

__all__ = ["Listing", "Prepared", "SourceOptions", "format_report", "list_source", "prepare"]
