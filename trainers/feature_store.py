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
from tailtune.datasets.feature_view import FeatureView, JoinedView
from tailtune.datasets.image_identity import image_digest, without_draws
from tailtune.datasets.images.transforms import FIXED
from tailtune.datasets.view import View
from tailtune.models import ClassificationModel
from tailtune.models.backbones.backbone_types import TextEncoder
from tailtune.models.backbones.prompts import Sentences
from tailtune.trainers.distributed import copied_from_main, on_main
from tailtune.trainers.feature_keys import circumstances, digest_before, encoder_digest, hash_of
from tailtune.trainers.feature_pass import encoded_once
from tailtune.trainers.methods.base import Method
from tailtune.trainers.sharding import is_sharded
from tailtune.trainers.storage.kept_rows import KeptRows
from tailtune.trainers.storage.kept_tensors import KeptTensors
from tailtune.trainers.token_store import TOKENS_NOTE, TokenStore
from tailtune.trainers.weight_digest import weight_digest

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
            "encoder": [self.backbone, weight_digest(text_encoder, text_encoder.weights().items())],
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

    def view_of(self, method: Method, view: View) -> View:
        """The view of the features of the images, or the view itself. All processes must call this together.

        Features can stand for images if the encoder of the method as it is at present does not train, the view draws no
        random numbers, and only the encoder reads the images. Of a method with several parts, this may be so for some.
        """
        views = [self._of_part(part, view) for part in method.parts]
        if all(found is view for found in views):
            return view
        return views[0] if len(views) == 1 else JoinedView(views)

    def _of_part(self, method: Method, view: View) -> View:
        model = method.model
        if not (method.takes_features and self._fixed(view)) or is_sharded():
            return view
        if not model.encoder.is_constant:
            return self._tokens_of(model, view)
        found = self._view(model, view, model.features, model.encoder.experts, untuned=False)
        if found is not view:
            self.note(NOTE)
        return found

    def _tokens_of(self, model: ClassificationModel, view: View) -> View:
        """The view of the tokens before the first block that trains, or the view itself."""
        encoder, tokens = model.encoder, self.tokens
        if tokens is None or not tokens.applies(encoder, view):
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
            readable = torch.ones(len(view), dtype=torch.bool)
            if (found := self._read(kept, facts)) is not None:
                log.info("features of %s images: read from the feature cache", f"{len(view):,}")
                return FeatureView(view, found, readable)
            started = time.perf_counter()
            computed = encoded_once(view, encode, self.accelerator, self.batch_size, self.num_workers)
        finally:
            encoder.train(training)
        seconds = time.perf_counter() - started
        bad_images, written = on_main(self.accelerator, lambda: _written(kept, facts, computed))
        outcome = "not kept" + f", because {bad_images} cannot be read" * (bad_images > 0)
        if computed is not None and written:
            outcome = f"{computed[0].nbytes / 1e6:,.1f} MB kept in {kept.folder}"
        log.info("features of %s images: computed in %.1f s, %s", f"{len(view):,}", seconds, outcome)
        if written and (found := self._read(kept, facts)) is not None:
            return FeatureView(view, found, readable)
        features, readable = copied_from_main(self.accelerator, computed)
        if written and self.accelerator.is_local_main_process and not self.accelerator.is_main_process:
            kept.write(facts, features)  # this machine has a folder of its own
        return FeatureView(view, features, readable)

    def _facts(self, model: ClassificationModel, view: View, experts: int, untuned: bool) -> dict[str, Any] | None:
        """Everything that the features depend on; None if they do not fit into memory."""
        encoder = model.encoder
        size, free = 4 * len(view) * experts * encoder.feature_dim, free_memory()
        copies = 1 + local_processes()  # one while they are written; one in each process if they cannot be kept
        if copies * size > LARGEST_SHARE * free:
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
        found = kept.read(facts) if self.accelerator.is_main_process else None
        if not on_main(self.accelerator, lambda: found is not None):
            return None
        if not self.accelerator.is_main_process:
            found = kept.read(facts, checked=not self.accelerator.is_local_main_process)
        everywhere = self.accelerator.gather(torch.tensor([found is not None], device=self.accelerator.device)).all()
        return found if everywhere else None


def _written(kept: KeptTensors, facts: dict[str, Any], computed: tuple[Tensor, Tensor] | None) -> tuple[int, bool]:
    """Number of images that could not be read; whether the features of all images have become an entry."""
    assert computed is not None, "asked on the first process"
    features, readable = computed
    bad_images = int((~readable).sum())
    return bad_images, not bad_images and kept.write(facts, features)
