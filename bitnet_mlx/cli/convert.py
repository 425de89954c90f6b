"""bitnet-mlx convert: a checkpoint in another format, compared with its source."""

from __future__ import annotations

import argparse
import json

from bitnet_mlx.api import ACTIVATIONS, DTYPES, HEAD_BITS, I2S_LAYOUTS
from bitnet_mlx.cli import ternarizing
from bitnet_mlx.cli.progress import Bar
from bitnet_mlx.models.precision import PRESETS

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
    add(
        "--hf-path",
        required=True,
        metavar="SRC",
        help="a model folder, a GGUF file, or owner/name on the Hugging Face hub",
    )
    add("--mlx-path", required=True, metavar="DST", help="where the result is to be")
    add("--format", choices=FORMATS, default="words2", help="; ".join(f"{k}: {v}" for k, v in FORMATS.items()))
    add(
        "--head-bits", type=int, choices=HEAD_BITS,
        help="bits of embedding and head: 16 keeps them (default: 8, or 16 where the format holds no less)",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, help="type of what stays floats (default: the checkpoint's)")
    add(
        "--precision", choices=PRESETS, help="head bits and dtype together: 4 and 8 bits, or as in the file and float32"
    )
    add("--force", action="store_true", help="replace the model at DST")
    add("--activations", type=int, choices=ACTIVATIONS, help="bits of the layers' inputs (default: the model's own)")
    ternarizing.add_arguments(parser)
    add("--revision", help="branch, tag or commit on the hub")
    add("--i2s-layout", choices=I2S_LAYOUTS, help="byte layout of I2_S tensors (default: found from the weights)")


def run(args: argparse.Namespace) -> int:
    from bitnet_mlx.checkpoint.convert import convert
    from bitnet_mlx.checkpoint.convert_report import details, summary

    names = ("format", "head_bits", "dtype", "force", "activations", "revision", "i2s_layout", "precision")
    options = {name: getattr(args, name) for name in names}
    fitting, cost = ternarizing.wanted(args), None
    with Bar("converting") as bar:
        if fitting is None:
            done = convert(args.hf_path, args.mlx_path, ternarize=args.ternarize, progress=bar.update, **options)
        else:
            from bitnet_mlx.calibration.post_training import convert_ternary

            done, cost = convert_ternary(args.hf_path, args.mlx_path, fitting, bar.update, **options)
    if args.json:
        print(json.dumps(done.record() | ({} if cost is None else {"ternarize": cost})))
        return 0
    if args.verbose:
        print("\n".join(details(done)))
    print("\n".join(summary(done)))
    if cost is not None:
        from bitnet_mlx.calibration.post_training import summary as told

        print("\n".join(told(cost)))
    return 0
