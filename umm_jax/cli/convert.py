"""``umm convert``: weights to and from PyTorch."""

import os

from umm_jax.cli.grammar import command, size
from umm_jax.errors import ConfigError


def add(commands) -> None:
    """Adds the commands of this group."""
    convert = commands.add_parser("convert", help="weights to and from PyTorch")
    of_convert = convert.add_subparsers(dest="convert_command", metavar="COMMAND", required=True)

    p = command(of_convert, "from-torch", _from_torch, "Make a run folder of a PyTorch checkpoint.")
    p.add_argument("source", help="a folder of weights, an index of shards, a .safetensors, .bin or .pt file")
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--config", help="whose model it is (default: config.json beside them, or the release)")
    p.add_argument("--family", help="whose names the tensors have, where no config says (mm_interleaved)")
    p.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model (default: the one beside them)")
    p.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt too, with weights_only")
    p.add_argument("--no-checksums", action="store_true", help="do not check sha256sums beside the weights")

    p = command(of_convert, "to-torch", _to_torch, "Write a checkpoint of a run for PyTorch.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    p.add_argument("--weights", choices=["raw", "ema"], default="raw", help="which weights")
    p.add_argument("--shard-size", type=size, default="5GB", help="largest file")
    p.add_argument("--memory", type=size, default="1GB", help="for layers that must be read together")
    p.add_argument(
        "--dtype",
        choices=["keep", "float32", "float16", "bfloat16"],
        default="keep",
        help="keep: that of the weights when they came from PyTorch, else that of the checkpoint",
    )
    p.add_argument(
        "--part",
        choices=["llm", "clip", "unet", "vae", "all"],
        help="only this part, as a folder for its class of transformers or diffusers",
    )
    p.add_argument("--verified", metavar="FILE", help="output of umm convert verify --json, for parity.json")

    p = command(of_convert, "verify", _verify, "Compare our numbers with tensors of a reference, row by row.")
    p.add_argument("path", help="folder of fixtures: config.json or fixture.json, *.safetensors")
    p.add_argument("--json", metavar="FILE", help="write the rows there too")
    p.add_argument(
        "--only", metavar="NAMES", help="fixture files to compare, comma-separated beginnings: a,g,h"
    )

    p = command(
        of_convert,
        "from-parts",
        _from_parts,
        "Begin a model from stock parts: a run folder for train.init_from.",
        overridable=True,
    )
    p.add_argument("--config", required=True, help="the model that is begun")
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--llama", metavar="DIR", help="folder of the language model: a Llama, Vicuna or Qwen2")
    p.add_argument("--clip", metavar="DIR", help="folder of a CLIP, whole or its vision model")
    p.add_argument("--siglip", metavar="DIR", help="folder of a SigLIP2, whole or its vision model")
    p.add_argument("--unet", metavar="DIR", help="folder of Stable Diffusion's unet")
    p.add_argument("--vae", metavar="DIR", help="folder of Stable Diffusion's vae, or FLUX's; or its file")
    p.add_argument(
        "--text-encoder", metavar="DIR", help="its text_encoder, for the empty prompt (needs torch)"
    )
    p.add_argument("--tokenizer2", metavar="DIR", help="its tokenizer, to go with the text encoder")
    p.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt too, with weights_only")
    p.add_argument("--no-checksums", action="store_true", help="do not check sha256sums beside the weights")


def _from_torch(args) -> None:
    from umm_jax.convert.from_torch import from_torch

    from_torch(
        args.source,
        args.out,
        config=args.config,
        family=args.family,
        allow_pickle=args.allow_pickle,
        checksums=not args.no_checksums,
        tokenizer=args.tokenizer,
    )


def _to_torch(args) -> None:
    from umm_jax.convert.to_torch import to_torch

    to_torch(
        args.folder,
        args.out,
        step=args.step,
        weights=args.weights,
        dtype=args.dtype,
        shard_size=args.shard_size,
        memory=args.memory,
        verified=args.verified,
        part=args.part,
    )


def _verify(args) -> None:
    import json

    # The bounds are those of float32 on a CPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from umm_jax.convert import verify
    from umm_jax.data.files import write_atomic
    from umm_jax.errors import ParityError

    print(verify.HEADER)
    rows = []
    for row in verify.checks(args.path, args.only.split(",") if args.only else ()):
        print(verify.line(row), flush=True)
        rows.append(row)
    if args.json:
        write_atomic(args.json, json.dumps(verify.as_json(rows), indent=1) + "\n")
    if not rows:
        raise ConfigError(f"{args.path}: nothing here to compare")
    if not all(row.passed for row in rows):
        raise ParityError(verify.summary(rows))
    print(verify.summary(rows))


def _from_parts(args) -> None:
    from umm_jax import config
    from umm_jax.convert.from_parts import from_parts

    parts = {"llm": args.llama, "clip": args.clip, "vit": args.siglip, "unet": args.unet, "vae": args.vae}
    from_parts(
        config.load(args.config, args.overrides),
        args.out,
        {name: path for name, path in parts.items() if path},
        text_encoder=args.text_encoder,
        text_tokenizer=args.tokenizer2,
        allow_pickle=args.allow_pickle,
        checksums=not args.no_checksums,
    )
