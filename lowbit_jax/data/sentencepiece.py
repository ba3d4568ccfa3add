"""BPE as SentencePiece has it, in the JSON of `tokenizers`: Llama 2, Mistral, TinyLlama.

A space is the character U+2581 and one comes before a text; characters without a token become
their bytes, spelled `<0x0A>`. A text that holds U+2581 itself decodes to spaces there.
"""

import re
from collections.abc import Mapping
from typing import Any

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def why_not(data: Mapping[str, Any]) -> str | None:
    """What of the JSON is no such tokenizer, or changes a text otherwise; None if nothing."""
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return f"a {model.get('type')} without byte fallback"
    if missing := [f"<0x{b:02X}>" for b in range(256) if f"<0x{b:02X}>" not in model["vocab"]]:
        return f"byte fallback without {missing[0]}"
    if model.get("dropout") or model.get("continuing_subword_prefix"):
        return "dropout or marks inside words"
    if model.get("end_of_word_suffix"):
        return "marks behind words"
    adds = 0
    for step in _steps(data["normalizer"], "normalizers"):
        is_space = step == {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": SPACE,
        }
        is_prefix = step == {"type": "Prepend", "prepend": SPACE}
        if not is_space and not is_prefix:
            return f"a normalizer {step['type']}"
        adds += is_prefix
    cuts = _steps(data["pre_tokenizer"], "pretokenizers")
    for step in cuts:
        is_cut = step["type"] == "Split" and step.get("pattern") == {"String": " "}
        if not is_cut and (step["type"] != "Metaspace" or step.get("replacement") != SPACE):
            return f"a pre-tokenizer {step['type']}"
    if adds + sum(step.get("prepend_scheme", "never") != "never" for step in cuts) > 1:
        return "two spaces before a text"
    return None


def piece_bytes(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for."""
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(SPACE, " ").encode()


def without_space(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON of the tokenizer that puts no space before a text; None if it puts none."""
    steps, cuts = (
        _steps(data["normalizer"], "normalizers"),
        _steps(data["pre_tokenizer"], "pretokenizers"),
    )
    kept = [step for step in steps if step["type"] != "Prepend"]
    plain = [
        {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
        for step in cuts
    ]
    if kept == steps and plain == cuts:
        return None
    return {
        **data,
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": plain} if plain else None,
    }


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Any]:
    """The steps of a sequence of the JSON, or the one."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
