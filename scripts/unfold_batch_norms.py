"""Measures the statistics of batch norms that are folded into the convolutions, so that bn_tuning can train them.

python scripts/unfold_batch_norms.py -d DATA -m MODEL OUT.safetensors [KEY VALUE ...]
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save
from torch import Tensor, nn

from tailtune.configs import CfgNode, UserError, load_configs
from tailtune.datasets.build_data import build_data
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.main import Parser, exit_code_of, split_arguments
from tailtune.models import build_model, resolve
from tailtune.models.backbones.folded_norms import are_folded, unfold
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.console_log import start_console
from tailtune.trainers.storage.atomic_io import write_bytes

EXAMPLE = """
example:
  python scripts/unfold_batch_norms.py -d my.yaml -m in1k_mobilenetv2 unfolded.safetensors pretrained folded.pth
  python main.py -d my.yaml -m in1k_mobilenetv2 bn_tuning True pretrained unfolded.safetensors

The statistics are those of all training images, as a test sees them. In evaluation, the network computes the same as
before. OUT has the tensors of the network without its classifier.
"""
log = logging.getLogger("tailtune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 for success, 2 for wrong input, 130 for an interruption."""
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python scripts/unfold_batch_norms.py",
        description=__doc__.partition("\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/unfold_batch_norms.py -d DATA -m MODEL OUT.safetensors [KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("-d", "--data", metavar="DATA", required=True, help="data config")
    parser.add_argument("-m", "--model", metavar="MODEL", required=True, help="model config")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to write; it must not exist")
    flags, pairs = split_arguments(argv)
    args = parser.parse_args([*flags, *pairs[:1]])
    write_unfolded(resolve(load_configs(args.data, args.model, pairs[1:], declared())[-1]), args.out)
    return 0


def write_unfolded(cfg: CfgNode, out: Path) -> None:
    """Write the weights of a backbone whose folded batch norms have the statistics of the training images.

    Args:
        cfg: a resolved config without tuners.
        out: the file; it must not exist.

    Raises:
        UserError: the file exists, or the backbone has no folded batch norms.
    """
    if out.exists():
        raise UserError(f"{out} exists; name another file")
    start_console(main=True)
    device = make_accelerator(Devices.of(cfg)).device
    data = build_data(cfg)
    model = build_model(cfg, data.info.class_names).to(device).eval()
    encoder = model.encoder
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    if not isinstance(encoder, WholeNetworkEncoder) or not are_folded(norms):
        raise UserError(f"the weights of {cfg.backbone} have no folded batch norms: they can be trained as they are")

    def batches() -> Iterator[Tensor]:
        for batch in eval_loader(data.train_unaugmented, cfg.test_batch_size, cfg.num_workers, device=device):
            yield encoder.as_network_input(model.normalised(batch["image"][batch["weight"] > 0]))

    log.info("statistics of %d batch norms from %d training images", len(norms), len(data.train_unaugmented))
    unfold(encoder.net, norms, batches())
    write_bytes(out, save({name: tensor.cpu().contiguous() for name, tensor in encoder.net.state_dict().items()}))
    log.info("wrote %s", out)


if __name__ == "__main__":
    sys.exit(main())
