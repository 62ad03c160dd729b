"""A pickle that runs code."""

from __future__ import annotations

import os
from pathlib import Path


class MakesFolder:
    """A pickle of this object creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)
