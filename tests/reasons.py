"""Which reasons of failures the protos promise for each method, as their comments say."""

from __future__ import annotations

import re
from pathlib import Path

PROTOS = Path(__file__).parent.parent / "protos" / "denoised" / "v1"
COMMENTED = re.compile(r"((?:^ *//.*\n)+) *(service|rpc) (\w+)", re.MULTILINE)
REASON = re.compile(r"\b[A-Z][A-Z_]+[A-Z]\b")
LIKE = re.compile(r"\b(?:as|those of) ([A-Z][a-z]\w+)")


def documented() -> dict[str, set[str]]:
    """By the method's name."""
    found, like, common = dict[str, set[str]](), dict[str, set[str]](), set[str]()
    for file in sorted(PROTOS.glob("*_service.proto")):
        for lines, kind, name in COMMENTED.findall(file.read_text()):
            _, _, text = re.sub(r"\n? *// ?", " ", lines).partition("Reasons")
            if kind == "service":
                common = set(REASON.findall(text))
            else:
                found[name] = common | set(REASON.findall(text))
                like[name] = set(LIKE.findall(text))
    for _ in found:
        for name, others in like.items():
            found[name] |= set[str]().union(*(found[other] for other in others))
    return found
