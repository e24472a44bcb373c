"""Which programs load an adapter's file and apply it as this program does. No torch.

ComfyUI: comfy/lora.py and comfy/weight_adapter/; A1111: extensions-builtin/Lora/. Their rules are written out in
tests/networks/readers/, which reads files of every kind by them.
"""

from __future__ import annotations

from networks.settings import NetworkSettings

PROGRAMS = ("ComfyUI", "A1111", "diffusers")


def readers(settings: NetworkSettings) -> frozenset[str]:
    """The programs of PROGRAMS that load the file of a network with these settings and apply it as this one does."""
    if not settings.use_dora:
        return settings.kind.readers
    return frozenset() if settings.wd_on_output else settings.kind.readers - {"diffusers"}


def note_on_readers(settings: NetworkSettings) -> str | None:
    """What to know before training, if a WebUI cannot use the result; else None."""
    if settings.use_dora and settings.wd_on_output:
        return (
            "--network_args wd_on_output=True: ComfyUI and A1111 draw other images with this DoRA; diffusers and PEFT "
            "read it after tools/convert_lora.py (without wd_on_output it is the other way round)"
        )
    can = [name for name in PROGRAMS if name in readers(settings)]
    cannot = [name for name in PROGRAMS if name not in can]
    if {"ComfyUI", "A1111"} <= set(can):
        return None
    return (
        f"--network_module {settings.kind.module}: {' and '.join(can) or 'no WebUI'} can load the result, "
        f"{' and '.join(cannot)} cannot; tools/merge_lora.py merges it into a model for any program"
    )
