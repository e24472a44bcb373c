"""What `--debug_dataset` writes: one self-contained HTML page that shows what a run is about to be trained on."""

from library.data.contact_sheet.page import write_page
from library.data.contact_sheet.records import Page, Shown, ShownCaption

__all__ = ["Page", "Shown", "ShownCaption", "write_page"]
