"""Scripts for LoRAs, models and masks as a user starts it: by its path, from another folder."""

from __future__ import annotations

import pytest

from tests.tools import loras

SCRIPTS = (
    "networks/check_lora_weights.py", "networks/extract_lora_from_dylora.py", "networks/extract_lora_from_models.py",
    "networks/lora_interrogator.py", "networks/merge_lora.py", "networks/resize_lora.py",
    "networks/sdxl_merge_lora.py", "networks/svd_merge_lora.py", "tools/make_masks.py",
    "tools/merge_models.py",
)  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_asks_for_what_it_needs(script: str) -> None:
    """Without torch, so cheap; test_merge_lora.py and test_convert_checkpoint.py start processes that do their work."""
    answer = loras.run(str(loras.ROOT / script))
    assert answer.returncode == 2 and "no --" in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
