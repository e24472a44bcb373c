"""The page of `--debug_dataset`: one self-contained HTML file that shows the images and captions of a run."""

from library.data.contact_sheet.page import write_page
from library.data.contact_sheet.records import Page, SheetCaption, SheetImage

__all__ = ["Page", "SheetImage", "SheetCaption", "write_page"]
