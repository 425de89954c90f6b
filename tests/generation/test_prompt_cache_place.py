"""Where a computed prompt may be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.prompt_cache import check_place


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    check_place(tmp_path / "new")
    (tmp_path / "there").write_text("")
    check_place(tmp_path / "there")
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(ConfigError, match="a folder or a device"):
            check_place(path)
