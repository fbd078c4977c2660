"""`python -m resnet_fused` is the command line."""

from .cli import app

app(prog_name="resnet-fused")
