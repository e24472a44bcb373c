"""What tests of adapters share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What diffusers, transformers and PEFT have to say of an adapter while they load it."""
    told: list[str] = []

    class OfAdapters(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()  # other remarks come once in a process, whoever is the first
            if any(word in text.lower() for word in ("lora", "adapter", "key", "unexpected", "state dict")):
                told.append(text)

    handler = OfAdapters(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield told
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
