"""What the peft library has put around an encoder: its part in training, its file format, and merging."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder

if TYPE_CHECKING:
    from peft import PeftModel


class PeftAdapter(nn.Module):
    """A tuner of peft around an encoder. Its weights belong to the encoder; this object holds everything else.

    Args:
        name: entry of PEFTS.
        model: peft's wrapper of the network.
        targets: names of the wrapped layers.
        args: the user's `peft_args`.
    """

    depends_on_length = False
    """Whether a step depends on the number of steps of the run."""
    reads_weights = False
    """Whether it reads or changes trained weights outside of the network's forward pass."""

    def __init__(self, name: str, model: "PeftModel", targets: Sequence[str], args: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.targets, self.args = name, targets, args
        self._model = (model,)  # a tuple, so that the encoder's weights are not registered a second time

    @property
    def model(self) -> Any:
        """peft's wrapper of the network."""
        return self._model[0]

    @property
    def config(self) -> Any:
        """peft's configuration of the adapter."""
        return self.model.peft_config["default"]

    def before_training(self, steps: int) -> None:
        """Called once in each launch, before its first step.

        Args:
            steps: optimizer steps of the whole run.
        """

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, while its gradients still exist.

        Args:
            step: number of the step, counted from 1.
        """

    def penalty(self) -> Tensor | None:
        """What is added to the mean loss, a scalar; None: nothing."""
        return None

    def export(self, folder: Path, base: str) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`.

        Args:
            folder: where to write them.
            base: name of the network below the adapter, for the configuration.
        """
        self.config.base_model_name_or_path = base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form about language models


class AdaLora(PeftAdapter):
    """AdaLoRA: ranks are cut during training, by the importance of their gradients. Source: Zhang et al. 2023.

    peft keeps the running averages of the importance in its allocator, which no state dict contains. Here they are
    buffers, and the allocator gets these buffers before the first step, also when a run resumes. Their names are part
    of the checkpoint.
    """

    depends_on_length = reads_weights = True

    def __init__(self, name: str, model: "PeftModel", targets: Sequence[str], args: Mapping[str, Any]) -> None:
        super().__init__(name, model, targets, args)
        for index, (key, matrix) in enumerate(self._matrices()):
            self.register_buffer(f"importance_{index}", torch.zeros_like(matrix))
            self.register_buffer(f"uncertainty_{index}", torch.zeros_like(matrix))
            if "lora_E" in key:
                kept = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
                self.register_buffer(f"kept_{index}", kept)

    def before_training(self, steps: int) -> None:
        """Set the schedule and hand the buffers to peft's allocator.

        Unless `peft_args` set them, the warm-up (tinit) is a tenth and the final phase (tfinal) three tenths of the
        run.

        Args:
            steps: optimizer steps of the whole run.

        Raises:
            UserError: the schedule leaves no step for cutting ranks.
        """
        config, allocator = self.config, self.model.base_model.rankallocator
        config.total_step = steps
        config.tinit = self.args.get("tinit", steps // 10)
        config.tfinal = self.args.get("tfinal", 3 * steps // 10)
        last_cut = steps - config.tfinal  # importance is counted in the steps before the last cut
        if last_cut < 2 or config.tinit >= last_cut:
            raise UserError(
                f"AdaLoRA cuts ranks between tinit {config.tinit} and {config.tfinal} steps (tfinal) before the end, "
                f"which leaves none of the {steps} steps of this run; set them in peft_args, or train longer"
            )
        buffers = dict(self.named_buffers())
        names = [key for key, _ in self._matrices()]
        allocator.exp_avg_ipt = {key: buffers[f"importance_{index}"] for index, key in enumerate(names)}
        allocator.exp_avg_unc = {key: buffers[f"uncertainty_{index}"] for index, key in enumerate(names)}
        allocator.ipt = dict(allocator.exp_avg_ipt)  # if this were empty, peft would reset the averages
        kept = {key: buffers[f"kept_{index}"] for index, key in enumerate(names) if f"kept_{index}" in buffers}
        config.rank_pattern = {key: mask.tolist() for key, mask in kept.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importance and cut ranks where the schedule says so.

        Args:
            step: number of the step, counted from 1.
        """
        config, tuner = self.config, self.model.base_model
        for _, parameter in self._matrices():
            assert parameter.grad is not None, "every wrapped layer is called; that was checked when it was built"
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # after a step that was skipped because fp16 overflowed
        pattern = config.rank_pattern
        tuner.update_and_allocate(step)
        for index, (key, _) in enumerate(self._matrices()):
            if key in tuner.rankallocator.exp_avg_ipt:  # peft drops them after the last cut
                setattr(self, f"importance_{index}", tuner.rankallocator.exp_avg_ipt[key])
                setattr(self, f"uncertainty_{index}", tuner.rankallocator.exp_avg_unc[key])
            if "lora_E" in key and config.rank_pattern is not pattern:
                kept = self.get_buffer(f"kept_{index}")
                kept.copy_(torch.tensor(config.rank_pattern[key], dtype=torch.bool))

    def penalty(self) -> Tensor | None:
        """γ · mean over A and B of ‖AAᵀ − I‖ and ‖BᵀB − I‖, as peft adds it to the losses of its own models.

        Source: Zhang et al. 2023, eq. 4.
        """
        if not self.config.orth_reg_weight:
            return None
        factors = [matrix if "lora_A" in key else matrix.T for key, matrix in self._matrices() if "lora_E" not in key]
        norms = [
            (factor @ factor.T - torch.eye(len(factor), dtype=factor.dtype, device=factor.device)).norm()
            for factor in factors
        ]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def export(self, folder: Path, base: str) -> None:
        """Write the adapter with all of its ranks; those that were cut are zeros."""
        self.config.rank_pattern = {}
        super().export(folder, base)

    def _matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices A, B and E of all layers, under the names that the allocator uses."""
        prefixes = tuple(f"{target}.lora_" for target in self.targets)
        named = self.model.get_base_model().named_parameters()
        return ((key, parameter) for key, parameter in named if key.startswith(prefixes))


def export_adapter(encoder: Encoder, peft: PeftAdapter, folder: Path, base: str) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(network, folder)` reads.

    Args:
        encoder: the encoder that the adapter belongs to.
        peft: the adapter.
        folder: where to write it.
        base: name of the network below the adapter.

    Raises:
        UserError: other tuners have trained too, which that format cannot hold; or the disk is full.
    """
    adapter_parameters = {id(parameter) for layer in encoder.peft_layers for parameter in _adapter_parameters(layer)}
    others = [
        key
        for key, parameter in encoder.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapter_parameters
    ]
    if others:
        raise UserError(f"peft's format holds the adapter alone, and this run trained {others[0]} too; export merged")
    try:
        peft.export(folder, base)
    except SafetensorError as error:  # peft raises this when the disk is full
        raise UserError(f"export peft: cannot write the adapter ({error}); free the space") from error


@torch.no_grad()
def merge_adapter(encoder: Encoder, peft: PeftAdapter) -> dict[str, Tensor]:
    """The state dict of the network with the adapter merged into its weights.

    Args:
        encoder: the encoder that the adapter belongs to; it computes in fp32, and stays as it is.
        peft: the adapter.

    Returns:
        The network's own tensors under its own names.

    Raises:
        UserError: this tuner cannot be merged, or peft merges it wrongly.
    """
    merged: Any = copy.deepcopy(peft.model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = merged.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise UserError(f"{peft.name} cannot be merged into the weights; export peft") from error
    for key, layer in zip(peft.targets, copy.deepcopy(encoder.peft_layers), strict=True):
        inputs = _random_input(net.get_submodule(key))
        expected = layer.eval()(inputs)
        if (net.get_submodule(key)(inputs) - expected).abs().max() > 1e-3 * expected.abs().max():
            raise UserError(f"peft merges {peft.name} into {key} wrongly (another output than unmerged); export peft")
    return net.state_dict()


def _random_input(layer: Any) -> Tensor:
    """An input to compare a Linear or Conv2d before and after merging."""
    shape = (2, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 8, 8)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(layer.weight)


def _adapter_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """What peft has added to a layer that it wraps."""
    return (parameter for key, parameter in layer.named_parameters() if not key.startswith("base_layer."))
