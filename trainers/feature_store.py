"""`FeatureStore`: the features of a frozen encoder are computed once, and kept on disk for later runs.

Features that stand for images are always those of one pass over the images, in their order, in batches of
`test_batch_size` and in eval mode. The batches do not depend on the number of processes. So a run computes the same
numbers whether the features have been there before or not. Everything that can change a bit of a feature is a part of
the key of an entry: the images and their transform, weights and attributes of the encoder, its arithmetic, the size of
the batches, the device and the libraries.

Where only the last blocks of a ViT train, the tokens before them are kept in the same way (`token_store.py`).
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.launch_environment import is_first_process
from tailtune.configs.machine import LARGEST_SHARE, free_memory, local_processes
from tailtune.configs.option import option, options_from
from tailtune.configs.value_parsers import as_float, as_path
from tailtune.datasets.feature_view import FeatureView
from tailtune.datasets.image_identity import image_digest, without_draws
from tailtune.datasets.images.transforms import FIXED
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.models import ClassificationModel
from tailtune.models.backbones.backbone_types import TextEncoder
from tailtune.models.backbones.prompts import Sentences
from tailtune.trainers.distributed import on_main
from tailtune.trainers.feature_keys import circumstances, digest_before, digest_of, encoder_digest, hash_of
from tailtune.trainers.methods.base import Method
from tailtune.trainers.sharding import is_sharded
from tailtune.trainers.storage.kept_rows import KeptRows
from tailtune.trainers.storage.kept_tensors import KeptTensors
from tailtune.trainers.token_store import TOKENS_NOTE, TokenStore

FORMAT = 1
"""A change of the code that changes a bit of a feature needs another number."""
TOKENS_GB = 10.0
"""Limit of the tokens on a CPU."""
NOTE = "the features of the frozen encoder were computed once for each image (feature_cache)"
log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class FeatureOptions:
    """Features that later runs read again."""

    feature_cache: bool = option(
        True,
        "Features of a frozen encoder are computed once for each image, or each text, and kept for later runs. False "
        "means that they are computed whenever they are needed.",
        cls="runtime",
    )
    feature_cache_dir: str | None = option(
        None,
        "Folder of the features that are kept. None means the folder tailtune/features in XDG_CACHE_HOME or ~/.cache.",
        as_path,
        cls="runtime",
    )
    feature_cache_gb: float | None = option(
        None,
        "GB (10⁹ bytes) that tokens in this folder may take. They are kept where only the last blocks of a ViT train, "
        f"and `augment` is none or whole. None means {TOKENS_GB:g} on a CPU, and 0 on a GPU.",
        as_float,
        cls="runtime",
        least=0.0,
    )

    def kept(self) -> KeptTensors | None:
        """The entries of the folder; None without a cache, or without a home folder, which a warning says."""
        if not self.feature_cache:
            return None
        of_user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tailtune" / "features"
        return KeptTensors.below_home(Path(self.feature_cache_dir or of_user))

    def kept_tokens(self, below: KeptTensors | None, device: torch.device) -> KeptRows | None:
        """The entries of tokens in a folder of features; None without a cache or with a limit of 0."""
        limit = self.feature_cache_gb
        limit = TOKENS_GB * (device.type == "cpu") if limit is None else limit
        return KeptRows(below.folder / "tokens", limit * 1e9) if below is not None and limit > 0 else None


@dataclass(frozen=True)
class TextFeatures:
    """Encodes class texts, or reads the features that an earlier run has kept. It is called as `encode_texts`.

    Args:
        kept: the entries; None: nothing is kept.
        backbone: name of the backbone, which says how texts become tokens.
    """

    kept: KeptTensors | None
    backbone: str

    @classmethod
    def of(cls, cfg: CfgNode) -> "TextFeatures":
        return cls(options_from(FeatureOptions, cfg).kept(), cfg.backbone)

    def __call__(self, text_encoder: TextEncoder, sentences: Sentences, device: torch.device) -> Tensor:
        if self.kept is None:
            return text_encoder.class_features(sentences, device)
        facts = {
            "format": FORMAT,
            "texts": hash_of([list(each) for each in sentences]),
            "encoder": [self.backbone, digest_of(text_encoder.weights().items())],
            **circumstances(),
        }
        features = self.kept.read(facts)
        if features is not None:
            log.info("text features of %d classes: read from the feature cache", len(sentences))
            return features.to(device)
        features = text_encoder.class_features(sentences, device)
        if is_first_process():
            self.kept.write(facts, features.cpu())
        return features


@dataclass(frozen=True)
class FeatureStore:
    """Gives a view of features in place of a view of images, where both lead to the same results."""

    kept: KeptTensors | None
    """The entries; None: images stay images."""
    texts: TextFeatures
    accelerator: Accelerator
    batch_size: int
    """Number of images that a process encodes at once."""
    num_workers: int | None
    content: bool = False
    """Whether images are known again by their whole content."""
    note: Callable[[str], None] = field(default=lambda text: None)
    """Gets a sentence for the result when features are used."""
    tokens: TokenStore | None = None
    """Gives tokens where the encoder is constant up to a block; None: images stay images."""

    @classmethod
    def of(
        cls, cfg: CfgNode, accelerator: Accelerator, note: Callable[[str], None] = lambda text: None
    ) -> "FeatureStore":
        texts, content = TextFeatures.of(cfg), cfg.data_fingerprint == "content"
        rows = options_from(FeatureOptions, cfg).kept_tokens(texts.kept, accelerator.device)
        how = (accelerator, cfg.test_batch_size, cfg.num_workers)
        tokens = TokenStore(rows, *how) if rows is not None and cfg.augment in FIXED else None
        return cls(texts.kept, texts, *how, content, note, tokens)

    def applies(self, method: Method, view: View) -> bool:
        """Whether features can stand for the images of a view, for a method as it is at present.

        The encoder does not train, the view draws no random numbers, and only the encoder reads the images.
        """
        frozen = method.takes_features and method.model.encoder.is_constant and not is_sharded()
        return self._fixed(view) and frozen

    def view_of(self, method: Method, view: View) -> View:
        """The view of the features of the images, or the view itself. All processes must call this together."""
        if not self.applies(method, view):
            return self._tokens_of(method, view)
        model = method.model
        found = self._view(model, view, model.features, model.encoder.experts, untuned=False)
        if found is not view:
            self.note(NOTE)
        return found

    def _tokens_of(self, method: Method, view: View) -> View:
        """The view of the tokens before the first block that trains, or the view itself."""
        model, tokens, encoder = method.model, self.tokens, method.model.encoder
        possible = self._fixed(view) and method.takes_features and not is_sharded()
        if not possible or tokens is None or not tokens.applies(encoder, view):
            return view
        block, training = encoder.constant_blocks, encoder.training
        encoder.eval()
        try:
            facts = {"before block": block, **self._key(model, view, digest_before(encoder, block))}
            found = tokens.view_of(model, encoder, view, facts)
        finally:
            encoder.train(training)
        if found is not view:
            self.note(TOKENS_NOTE)
        return found

    def untuned(self, model: ClassificationModel, view: View, encode: Callable[[Tensor], Tensor]) -> View:
        """As `view_of`, for features of the pre-trained network alone, within `Encoder.untuned`.

        Args:
            model: the model. Its encoder may have tuners.
            view: the images.
            encode: uint8 images [B, 3, H, W] → the features of the first expert [B, D].
        """
        return self._view(model, view, encode, 1, untuned=True) if self._fixed(view) else view

    def _fixed(self, view: View) -> bool:
        images = len(view) > 0 and not isinstance(view, FeatureView)
        return self.kept is not None and images and without_draws(view) is not None

    def _view(
        self, model: ClassificationModel, view: View, encode: Callable[[Tensor], Tensor], experts: int, untuned: bool
    ) -> View:
        encoder, kept = model.encoder, self.kept
        assert kept is not None, "asked before"
        training = encoder.training
        encoder.eval()
        try:
            facts = on_main(self.accelerator, lambda: self._facts(model, view, experts, untuned))
            if facts is None:
                return view
            if (found := self._read(kept, facts)) is not None:
                return FeatureView(view, found, torch.ones(len(view), dtype=torch.bool))
            started = time.perf_counter()
            features, readable = self._computed(view, encode)
        finally:
            encoder.train(training)
        bad_images = int((~readable).sum())
        seconds, outcome = time.perf_counter() - started, "not kept"
        if bad_images:
            outcome = f"not kept, because {bad_images} cannot be read"
        elif self.accelerator.is_local_main_process and kept.write(facts, features):
            outcome = f"{features.nbytes / 1e6:,.1f} MB kept in {kept.folder}"
        log.info("features of %s images: computed in %.1f s, %s", f"{len(view):,}", seconds, outcome)
        return FeatureView(view, features, readable)

    def _facts(self, model: ClassificationModel, view: View, experts: int, untuned: bool) -> dict[str, Any] | None:
        """Everything that the features depend on; None if they do not fit into memory."""
        encoder = model.encoder
        size, free = 4 * len(view) * experts * encoder.feature_dim, free_memory() / local_processes()
        if 3 * size > LARGEST_SHARE * free:  # they are copied when they are gathered, and when they are written
            sizes = f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
            log.warning("warning: feature_cache: the features take %s: every image is encoded again", sizes)
            return None
        return {"experts": experts, **self._key(model, view, encoder_digest(encoder, untuned))}

    def _key(self, model: ClassificationModel, view: View, encoder: str) -> dict[str, Any]:
        """What features depend on besides the digest of what computes them."""
        of_transform = without_draws(view)
        assert of_transform is not None, "asked before"
        dtypes = [str(getattr(model.encoder, name, None)) for name in ("compute_dtype", "residual_dtype", "fast")]
        return {
            "images": image_digest(view, FORMAT, of_transform, self.content),
            "encoder": encoder,
            "pixels": [model.mean.flatten().tolist(), model.std.flatten().tolist()],
            "arithmetic": dtypes,
            "batch_size": self.batch_size,
            **circumstances(),
        }

    def _read(self, kept: KeptTensors, facts: dict[str, Any]) -> Tensor | None:
        """The features of an entry, if every process can read it."""
        found = kept.read(facts)
        everywhere = self.accelerator.gather(torch.tensor([found is not None], device=self.accelerator.device)).all()
        if found is None or not everywhere:
            return None
        log.info("features of %s images: read from the feature cache", f"{len(found):,}")
        return found

    @torch.no_grad()
    def _computed(self, view: View, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Features [N, …] and which images could be read, bool [N], on the CPU. The processes share the batches."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = torch.arange(len(view)).split(self.batch_size)
        shares = [torch.cat(batches[each::world] or batches[:1]) for each in range(world)]  # none is empty
        own = view if world == 1 else view.take(shares[rank].numpy())
        device, features = self.accelerator.device, torch.empty(0)
        readable = torch.zeros(len(shares[0]), dtype=torch.bool, device=device)  # the first share is the largest one
        loader = eval_loader(own, self.batch_size, self.num_workers, device=device, title="features" * (rank == 0))
        for number, batch in enumerate(loader):
            found = encode(batch["image"])
            if number == 0:
                features = found.new_zeros(len(readable), *found.shape[1:])
            features[batch["index"]], readable[batch["index"]] = found, batch["weight"] > 0
        gathered = [self.accelerator.gather(each).cpu().split(len(readable)) for each in (features, readable)]
        joined = [parts[0].new_zeros(len(view), *parts[0].shape[1:]) for parts in gathered]
        for tensor, parts in zip(joined, gathered, strict=True):
            for share, part in zip(shares, parts, strict=True):
                tensor[share] = part[: len(share)]
        return joined[0], joined[1]
