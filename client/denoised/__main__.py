"""`python -m denoised` is the command `denoised`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="denoised")
