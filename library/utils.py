"""The name of sd-scripts that kohya_ss's and LoRA_Easy_Training_Scripts' own tools import from `library.utils`."""

from __future__ import annotations

import logging


def setup_logging(args: object = None, log_level: str | None = None, *, reset: bool = False) -> None:
    """Show the messages of a tool from INFO on, or from `log_level`, on standard error. `args` has no effect."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=log_level or "INFO", force=reset)
