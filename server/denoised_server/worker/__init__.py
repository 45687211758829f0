"""One process that owns one device. Only here is torch imported."""

import os

# Before torch is imported: measuring calls meets memory that was there before, of which it would warn every second.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
