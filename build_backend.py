"""The build backend: setuptools, plus torch as a build requirement where there is none to be found."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.11"


def find_torch() -> Path | None:
    """The directory of torch >= 2.11, or None.

    Only headers and libraries are needed, so under pip's build isolation the torch of the environment that is installed
    into serves as well as a downloaded copy.
    """
    spec = importlib.util.find_spec("torch")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    for root in (*roots, Path(sysconfig.get_path("purelib"), "torch")):
        version = root / "version.py"
        match = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.is_file() else None
        if match and (int(match[1]), int(match[2])) >= (2, 11):
            return root
    return None


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """Setuptools' requirements, and torch unless the environment has it or the native build is switched off."""
    torch = [] if find_torch() or os.environ.get("RESNET_FUSED_NATIVE") == "0" else [TORCH]
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch]


get_requires_for_build_editable = get_requires_for_build_wheel
