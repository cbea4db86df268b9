"""`peft`: what LoRA has learnt, or a tuner of the peft library, as an adapter folder of that library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from models.peft_adapter import export_adapter
from trainers.exchange.plain_net import network
from trainers.exchange.subject import Subject, save_head

CONVERTED = ("lora", "lora_mlp")

Adapter = tuple[str, Tensor, Tensor, int]
"""Layer, A [r, in], B [out, r], alpha: the layer's output grows by (alpha / r)·B A x."""


def check(subject: Subject) -> None:
    subject.refuse_experts("peft")
    others = [name for name in subject.tuners if name not in CONVERTED]
    if others:
        raise UserError(f"export peft: its format has no place for {', '.join(others)}; `export merged` or `onnx` has")
    if not subject.tuners and not subject.peft:
        raise UserError("export peft: neither lora, lora_mlp nor peft is on, so there is no adapter; use export merged")
    if subject.tuners and subject.peft:
        raise UserError(f"export peft: one adapter folder cannot hold {subject.tuners[0]} and peft; use export merged")


@torch.no_grad()
def write(subject: Subject, folder: Path) -> dict[str, Any]:
    if subject.peft:
        export_adapter(subject.encoder, subject.peft, folder)
    else:
        _write_lora(list(_adapters(subject)), folder)
    save_head(subject, folder)
    about = network(subject)
    base = f"# … and the pre-trained weights of {subject.facts.get('backbone')}"
    return {"network": about, "load": f"{about['code']}  {base}\nnet = peft.PeftModel.from_pretrained(net, FOLDER)"}


def _adapters(subject: Subject) -> Iterator[Adapter]:
    """Query and value have one packed layer, so their two pairs of rank r are one of rank 2r, B block by block."""
    tuners = subject.encoder.tuners
    for index, sites in tuners["lora"].items() if "lora" in subject.tuners else ():
        q, v = sites["q"], sites["v"]
        b_q, b_v = q.lora_B.T, v.lora_B.T  # [D, r]
        zero = torch.zeros_like(b_q)
        a = torch.cat([q.lora_A.T, v.lora_A.T])
        b = torch.cat([torch.cat(row, dim=1) for row in ((b_q, zero), (zero, zero), (zero, b_v))])
        yield f"blocks.{index}.attn.qkv", a, b, 2
    for index, sites in tuners["lora_mlp"].items() if "lora_mlp" in subject.tuners else ():
        yield from ((f"blocks.{index}.mlp.{site}", each.lora_A.T, each.lora_B.T, 1) for site, each in sites.items())


def _write_lora(adapters: list[Adapter], folder: Path) -> None:
    from peft import LoraConfig

    ranks = {name: a.shape[0] for name, a, _, _ in adapters}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alpha for *_, alpha in adapters),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={name: alpha for name, _, _, alpha in adapters},
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    state = {f"{name}.lora_{part}.weight": each for name, a, b, _ in adapters for part, each in (("A", a), ("B", b))}
    state = {f"base_model.model.{name}": each.contiguous() for name, each in state.items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
