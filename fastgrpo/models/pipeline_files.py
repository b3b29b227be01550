"""The files that a model is read from: a pipeline's, and a transformer's where another one takes its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgrpo.models.transformer_weights import (
    TransformerDirectory,
    TransformerFile,
    find_transformer,
    refuse_other_class,
    transformer_class_of,
)
from fastgrpo.models.weights import (
    load_pipeline,
    pipeline_directory,
    read_config,
    refuse_damaged_files,
    refuse_missing_parts,
)


@dataclass(frozen=True)
class PipelineFiles:
    """Those of a pipeline of a class in a directory.

    variant: of which files the weights are read; None is the plain ones.  transformer: the one in place of the
    pipeline's; None is the pipeline's own.
    """

    pipeline_class: Any
    directory: Path
    variant: str | None
    transformer: TransformerFile | TransformerDirectory | None

    @classmethod
    def find(cls, pipeline_class: Any, weights: str, variant: str | None, transformer: str | None) -> "PipelineFiles":
        """By the config's values, downloaded if they are ids of the hub; ValueError for what is not of the class."""
        directory = pipeline_directory(pipeline_class, weights, variant)
        found = None if transformer is None else find_transformer(transformer, pipeline_class, directory, variant)
        return cls(pipeline_class, directory, variant, found)

    def describe(
        self, text_encoders: Sequence[str], left_out: Sequence[str]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The configs of transformer and autoencoder; ValueError for files that are missing or damaged.

        ``text_encoders`` are the parts that will be wanted beside these two, ``left_out`` those that nobody wants.
        """
        parts = ("vae", *text_encoders)
        if self.transformer is None:
            parts = ("transformer", *parts)
        else:
            left_out = ("transformer", *left_out)
        refuse_missing_parts(self.directory, parts, left_out, self.variant)
        refuse_damaged_files(self.directory, parts, self.variant)
        vae = read_config(self.directory / "vae" / "config.json")
        if self.transformer is not None:
            return self.transformer.config, vae
        path = self.directory / "transformer" / "config.json"
        transformer = read_config(path)
        refuse_other_class(transformer, path, transformer_class_of(self.pipeline_class))
        return transformer, vae

    def load(self, dtype: torch.dtype, decode_dtype: torch.dtype, without: Sequence[str], **parts: Any) -> Any:
        """The pipeline, without some of its parts, with ``parts`` in place of those in the files."""
        components = dict.fromkeys(without) | parts
        if self.transformer is not None and "transformer" not in without:
            components["transformer"] = self.transformer.load(dtype)
        return load_pipeline(self.pipeline_class, self.directory, dtype, decode_dtype, self.variant, **components)
