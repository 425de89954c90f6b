"""Each family's published form through every format that holds it: the logits of the direct load, or the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bitnet_mlx import convert
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import BitnetError
from tests.checkpoint import test_families, test_olmo
from tests.checkpoint.test_convert_formats import logits
from tests.support import hf_folder
from tests.support.same_weights import assert_same

FOLDERS: dict[str, Callable[[Path], object]] = {
    **{name: partial(test_families.write, name) for name in test_families.FORMS},
    "1bitLLM": test_families.one_bit,
    "bitnet-embedding": test_families.embedding,
    "OLMo-Bitnet": partial(test_olmo.write, norms=True),
    "qwen3 masters": lambda path: hf_folder.write(path, "qwen3", "online", head_dim=24),
    "biases": lambda path: hf_folder.write(path, "llama", "online", attention_bias=True),
}
FORMATS = ("words2", "trits5", "hf", "mlx-2bit")
# Narrow rows are no multiple of 64, so mlx-2bit holds none of these; what it holds is tested where formats are.
REFUSED = {
    ("bitnet-embedding", "hf"): "has a norm of its own",
    ("OLMo-Bitnet", "hf"): "has a norm of its own",
    ("biases", "hf"): "has a bias, which transformers multiplies by the scale",
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_through_every_format(name: str, kind: str, tmp_path: Path) -> None:
    FOLDERS[name](tmp_path / "source")
    reason = "mlx-lm|multiple of 64|64 columns" if kind == "mlx-2bit" else REFUSED.get((name, kind))
    if reason is not None:
        with pytest.raises(BitnetError, match=reason):
            convert(tmp_path / "source", tmp_path / "out", kind, head_bits=16)
        assert not (tmp_path / "out").exists()
        return
    direct = read_weights(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", kind, head_bits=16)
    found = read_weights(tmp_path / "out")
    assert_same(found, direct)
    assert (logits(found) == logits(direct)).all()
