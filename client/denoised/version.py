"""The version of this distribution."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("denoised")
except importlib.metadata.PackageNotFoundError:
    # Run from a source tree that was never installed.
    __version__ = "0.0.0+source"
