"""bitnet-mlx convert: a checkpoint in another format, compared with its source."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from bitnet_mlx.api import ACTIVATIONS, DTYPES, HEAD_BITS, I2S_LAYOUTS
from bitnet_mlx.cli import ternarizing
from bitnet_mlx.cli.progress import Bar
from bitnet_mlx.models.precision import PRESETS

if TYPE_CHECKING:
    from bitnet_mlx.checkpoint.convert import Conversion

FORMATS = {
    "words2": "this package's own folder, 2 bits a weight, used in place (the default)",
    "trits5": "its own too, 1.6 bits a weight, unpacked to 2 when it is loaded",
    "hf": "Hugging Face's packed layout, for transformers",
    "hf-float": "plain floats for transformers, float32 unless --dtype says otherwise; activations are not quantised",
    "gguf-tq1_0": "a .gguf file with its tokenizer, 1.69 bits a weight",
    "gguf-tq2_0": "the same, 2.06 bits",
    "mlx-2bit": "for stock mlx-lm; llama and qwen3 families",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = "a model folder, a GGUF file, or owner/name on the hub"
    add("--hf-path", "--model", required=True, metavar="SRC", help=source)
    add("--mlx-path", default="mlx_model", metavar="DST", help="where the result is to be (default: mlx_model)")
    add("--format", choices=FORMATS, default="words2", help="; ".join(f"{k}: {v}" for k, v in FORMATS.items()))
    add(
        "--head-bits", type=int, choices=HEAD_BITS,
        help="bits of embedding and head: 16 keeps them (default: 8, or 16 where the format holds no less)",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, help="type of what stays floats (default: the checkpoint's)")
    add(
        "--precision",
        choices=PRESETS,
        help="head bits and dtype together: 4 and 8 bits, or as in the file and float32 (default: each by its flag)",
    )
    add("--force", action="store_true", help="replace the model at DST")
    add("--activations", type=int, choices=ACTIVATIONS, help="bits of the layers' inputs (default: the model's own)")
    ternarizing.add_arguments(parser)
    add("--revision", help="branch, tag or commit on the hub (default: main)")
    add("--upload-repo", metavar="OWNER/NAME", help="then upload the result to this repository on the Hugging Face hub")
    add("--i2s-layout", choices=I2S_LAYOUTS, help="byte layout of I2_S tensors (default: found from the weights)")


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.checkpoint.convert import convert

    names = ("format", "head_bits", "dtype", "force", "activations", "revision", "i2s_layout", "precision")
    options = {name: getattr(args, name) for name in names}
    fitting, cost, upload, uploaded = ternarizing.wanted(args), None, None, None
    if args.upload_repo is not None:
        from bitnet_mlx.checkpoint.upload import Upload

        upload = Upload(args.upload_repo, args.hf_path)
    with Bar("converting") as bar:
        if fitting is None:
            done = convert(args.hf_path, args.mlx_path, ternarize=args.ternarize, progress=bar.update, **options)
        else:
            from bitnet_mlx.calibration.post_training import convert_ternary

            done, cost = convert_ternary(args.hf_path, args.mlx_path, fitting, bar.update, **options)
    if not args.json:
        _tell(done, cost, args.verbose)
    try:
        uploaded = None if upload is None else upload.send(done.path, done.format)
    finally:  # the conversion is told where the upload fails as well
        if args.json:
            sent = None if uploaded is None else uploaded.record()
            print(json.dumps(done.record() | {"uploaded": sent} | ({} if cost is None else {"ternarize": cost})))
    if uploaded is not None and not args.json:
        print(f"uploaded to {uploaded.url}, {len(uploaded.files)} files")
    return 0


def _tell(done: Conversion, cost: dict[str, Any] | None, verbose: bool) -> None:
    from bitnet_mlx.checkpoint.convert_report import details, summary

    lines = (details(done) if verbose else []) + summary(done)
    if cost is not None:
        from bitnet_mlx.calibration.post_training import summary as told

        lines += told(cost)
    print("\n".join(lines), flush=True)
