"""The flags of `generate --profile`, and what it writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_mlx.errors import ConfigError

if TYPE_CHECKING:
    from bitnet_mlx.generation import GenerationResponse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--profile", metavar="FILE.json",
        help="then feed the same tokens again, with and without instruments, and write where the time went: a JSON record "
        "that is a Chrome trace as well; the table goes to stderr",
    )  # fmt: skip
    group.add_argument("--plot", metavar="FILE.png|.html", help="with --profile: draw the roofline (needs matplotlib)")
    group.add_argument("--metal-capture", metavar="FILE.gputrace", help="on a Mac: capture one token for Xcode")


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    if (args.plot or args.metal_capture) and not args.profile:
        raise ConfigError("[generate] --plot and --metal-capture go with a profile; give --profile FILE.json as well")
    if args.plot:
        from bitnet_mlx.profile.plots import check_path

        check_path(args.plot)
    for name in (args.profile, args.plot, args.metal_capture):
        if name and not Path(name).resolve().parent.is_dir():
            raise ConfigError(f"[generate] {name} lies in a folder that is not there; make the folder first")
        if name and Path(name).is_dir():
            raise ConfigError(f"[generate] {name} is a folder; give a name for a file")
    if args.metal_capture:
        from bitnet_mlx.bench.profiled.capture import check_capture

        check_capture(args.metal_capture)


def watched(
    stream: Iterator[GenerationResponse], args: argparse.Namespace, model: Any, ids: Sequence[int], load_s: float,
    sampling: Any,
) -> Iterator[GenerationResponse]:  # fmt: skip
    """The same stream; at its end the profile is made and written."""
    responses = []
    for response in stream:
        responses.append(response)
        yield response
    from bitnet_mlx.bench.profiled import replay
    from bitnet_mlx.profile import text, trace

    profile = replay(
        model, ids, [r.token for r in responses], text="".join(r.text for r in responses), load_s=load_s,
        first_token_s=responses[0].ttft_s, model=args.model or "embedded", sampling=sampling,
    )  # fmt: skip
    trace.write(profile, args.profile)
    print("\n" + "\n".join(text.lines(profile)), file=sys.stderr)
    if args.plot:
        from bitnet_mlx.profile.plots import draw

        draw(profile.record(), args.plot)
    if args.metal_capture:
        from bitnet_mlx.bench.profiled.capture import capture

        capture(model, [r.token for r in responses][:1], args.metal_capture)
