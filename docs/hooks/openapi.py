"""`docs/openapi.json`, Urza's OpenAPI document, is written by ``python docs/hooks/openapi.py``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from esper.configs import EsperConfig
from esper.services.urza import UrzaStore
from esper.services.urza.app import create_app

__all__ = ["TARGET", "main", "text"]

TARGET = Path(__file__).parent.parent / "openapi.json"


def text() -> str:
    """The document as it is written."""
    with tempfile.TemporaryDirectory() as folder, UrzaStore.in_folder(Path(folder)) as store:
        document = create_app(store, EsperConfig(environment="test")).openapi()
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write it."""
    TARGET.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
