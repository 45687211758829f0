"""The embedded demo checkpoint, `demo`: small pictures of everyday things. MODEL_CARD.md says how it was made."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
