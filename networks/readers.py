"""Which programs load an adapter's file and apply it as this program does. No torch.

ComfyUI: comfy/lora.py and comfy/weight_adapter/; A1111: extensions-builtin/Lora/. Their rules are written out in
tests/networks/webui_rules.py, and files of every kind are read by them.
"""

from __future__ import annotations

from collections.abc import Mapping

from networks.settings import NetworkSettings

LYCORIS = "lycoris.kohya"
PROGRAMS = ("ComfyUI", "A1111", "diffusers")
_LYCORIS_DORA = (("dora_wd", "False"), ("wd_on_output", "True"))  # argument, default


def readers(settings: NetworkSettings) -> frozenset[str]:
    """The programs of PROGRAMS that load the file of a network with these settings and apply it as this one does."""
    if not settings.use_dora:
        return settings.kind.readers
    return frozenset() if settings.wd_on_output else settings.kind.readers - {"diffusers"}


def note_on_readers(settings: NetworkSettings) -> str | None:
    """What to know before training, if a WebUI cannot use the result; else None."""
    if settings.use_dora and settings.wd_on_output:
        return (
            "DoRA with magnitudes per output (wd_on_output=True): ComfyUI and A1111 draw other images with it, "
            "diffusers and PEFT read it after tools/convert_lora.py; with magnitudes per input it is the reverse"
        )
    can = [name for name in PROGRAMS if name in readers(settings)]
    cannot = [name for name in PROGRAMS if name not in can]
    if {"ComfyUI", "A1111"} <= set(can):
        return None
    return (
        f"--network_module {settings.kind.module}: {' and '.join(can) or 'no WebUI'} can load the result, "
        f"{' and '.join(cannot)} cannot; tools/merge_lora.py merges it into a model for any program"
    )


def note_on_lycoris(arguments: Mapping[str, str]) -> str | None:
    """The same for `lycoris.kohya` with these --network_args: its DoRA is per output unless wd_on_output=False."""
    is_off = {name: arguments.get(name, default).lower() in ("", "false", "0", "no") for name, default in _LYCORIS_DORA}
    if is_off["dora_wd"] or is_off["wd_on_output"]:
        return None
    return (
        f"--network_module {LYCORIS}, dora_wd=True: ComfyUI and A1111 draw other images with this DoRA; "
        "wd_on_output=False is the form that they read"
    )
