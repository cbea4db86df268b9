"""What peft has put around an encoder: its part in training, and its files."""

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
    """A tuner of peft. Its weights are parameters of the encoder; this holds what belongs to no layer.

    Args:
        name: as the user calls it.
        model: peft's wrapper of the network.
        targets: names of the wrapped layers.
        args: what the user has set.
    """

    def __init__(self, name: str, model: "PeftModel", targets: Sequence[str], args: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.targets, self.args = name, targets, args
        self._model = (model,)  # a tuple, so that the encoder's weights are not registered twice

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def config(self) -> Any:
        return self.model.peft_config["default"]

    def before_training(self, steps: int) -> None:
        """Once a launch, before the first step; `steps` is the length of the whole run."""

    def after_step(self, step: int) -> None:
        """After each optimizer step, counted from 1, while its gradients are still there."""

    def penalty(self) -> Tensor | None:
        """What is added to the mean loss."""
        return None

    def export(self, folder: Path, base: str) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`, which names the network below: `base`."""
        self.config.base_model_name_or_path = base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form about language models


class AdaLora(PeftAdapter):
    """AdaLoRA (Zhang et al. 2023): ranks are cut step by step, by the importance of their gradients.

    peft keeps the running averages in its allocator, where no state would find them. Here they are buffers, which the
    allocator is given before the first step, also when a run resumes.
    """

    def __init__(self, name: str, model: "PeftModel", targets: Sequence[str], args: Mapping[str, Any]) -> None:
        super().__init__(name, model, targets, args)
        for index, (key, each) in enumerate(self._adapters()):
            self.register_buffer(f"importance_{index}", torch.zeros_like(each))
            self.register_buffer(f"uncertainty_{index}", torch.zeros_like(each))
            if "lora_E" in key:
                self.register_buffer(f"kept_{index}", torch.ones(len(each), dtype=torch.bool, device=each.device))

    def before_training(self, steps: int) -> None:
        """Warm-up and final phase are a tenth and three tenths of the run unless given."""
        config, allocator = self.config, self.model.base_model.rankallocator
        config.total_step = steps
        config.tinit = self.args.get("tinit", steps // 10)
        config.tfinal = self.args.get("tfinal", 3 * steps // 10)
        cut = steps - config.tfinal  # the step of the last cut; importance is counted before it
        if cut < 2 or config.tinit >= cut:
            raise UserError(
                f"AdaLoRA cuts ranks between tinit {config.tinit} and {config.tfinal} steps (tfinal) before the end, "
                f"which leaves none of the {steps} steps of this run; set them in peft_args, or train longer"
            )
        buffers = dict(self.named_buffers())
        names = [key for key, _ in self._adapters()]
        allocator.exp_avg_ipt = {key: buffers[f"importance_{index}"] for index, key in enumerate(names)}
        allocator.exp_avg_unc = {key: buffers[f"uncertainty_{index}"] for index, key in enumerate(names)}
        allocator.ipt = dict(allocator.exp_avg_ipt)  # peft starts anew where this is empty
        kept = {key: buffers[f"kept_{index}"] for index, key in enumerate(names) if f"kept_{index}" in buffers}
        config.rank_pattern = {key: each.tolist() for key, each in kept.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        config, tuner = self.config, self.model.base_model
        for _, parameter in self._adapters():
            assert parameter.grad is not None, "every wrapped layer is called; that was checked when it was built"
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # of a step that fp16 overflow has skipped
        pattern = config.rank_pattern
        tuner.update_and_allocate(step)
        for index, (key, _) in enumerate(self._adapters()):
            if key in tuner.rankallocator.exp_avg_ipt:  # dropped after the last cut
                setattr(self, f"importance_{index}", tuner.rankallocator.exp_avg_ipt[key])
                setattr(self, f"uncertainty_{index}", tuner.rankallocator.exp_avg_unc[key])
            if "lora_E" in key and config.rank_pattern is not pattern:
                kept = self.get_buffer(f"kept_{index}")
                kept.copy_(torch.tensor(config.rank_pattern[key], dtype=torch.bool))

    def penalty(self) -> Tensor | None:
        """γ · mean over A and B of ‖AAᵀ − I‖, ‖BᵀB − I‖ (eq. 4), as peft adds it to the loss of its own models."""
        if not self.config.orth_reg_weight:
            return None
        factors = [each if "lora_A" in key else each.T for key, each in self._adapters() if "lora_E" not in key]
        norms = [
            (each @ each.T - torch.eye(len(each), dtype=each.dtype, device=each.device)).norm() for each in factors
        ]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def export(self, folder: Path, base: str) -> None:
        self.config.rank_pattern = {}  # ranks that were cut stand in the file as zeros
        super().export(folder, base)

    def _adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as the allocator knows them, and the matrices A, B and E."""
        names = tuple(f"{each}.lora_" for each in self.targets)
        return ((k, p) for k, p in self.model.get_base_model().named_parameters() if k.startswith(names))


def export_adapter(host: Encoder, peft: PeftAdapter, folder: Path, base: str) -> None:
    """Write the adapter for `peft.PeftModel.from_pretrained(network, folder)`.

    Args:
        base: what the network is called.

    Raises:
        UserError: other tuners have trained too, which that format cannot hold; or the disk is full.
    """
    own = {id(each) for layer in host.peft_layers for each in _around(layer)}
    other = [key for key, each in host.named_parameters() if each.requires_grad and id(each) not in own]
    if other:
        raise UserError(f"peft's format holds the adapter alone, and this run trained {other[0]} too; export merged")
    try:
        peft.export(folder, base)
    except SafetensorError as error:  # which is what it makes of a full disk
        raise UserError(f"export peft: cannot write the adapter ({error}); free the space") from error


@torch.no_grad()
def merge(host: Encoder, peft: PeftAdapter) -> dict[str, Tensor]:
    """The network's own tensors under its own names, with the adapter merged into the weights.

    The host computes in fp32 and stays as it is.

    Raises:
        UserError: the tuner is none that can be merged.
    """
    merged: Any = copy.deepcopy(peft.model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = merged.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise UserError(f"{peft.name} cannot be merged into the weights; export peft") from error
    for key, layer in zip(peft.targets, copy.deepcopy(host.peft_layers), strict=True):
        given = _probe(plain.get_submodule(key))
        wanted = layer.eval()(given)
        if (plain.get_submodule(key)(given) - wanted).abs().max() > 1e-3 * wanted.abs().max():
            raise UserError(f"peft merges {peft.name} into {key} wrongly (another output than unmerged); export peft")
    return plain.state_dict()


def _probe(layer: Any) -> Tensor:
    """Something to try a Linear or Conv2d on."""
    shape = (2, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 8, 8)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(layer.weight)


def _around(layer: nn.Module) -> Iterator[nn.Parameter]:
    return (each for key, each in layer.named_parameters() if not key.startswith("base_layer."))
