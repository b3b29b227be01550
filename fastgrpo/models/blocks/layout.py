"""Where in a diffusers transformer its repeated blocks are, and which of a block's layers make modulations."""

from collections.abc import Iterator

from torch import nn


def blocks_of(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in the transformer, block) of each."""
    for name, blocks in transformer.named_children():
        if isinstance(blocks, nn.ModuleList):
            for number, block in enumerate(blocks):
                yield f"{name}.{number}", block


def modulators(block: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a block that make its modulations: they run before the block does, on the embedding of time."""
    for part in block.children():
        last = part[-1] if isinstance(part, nn.Sequential) else getattr(part, "linear", None)
        if isinstance(last, nn.Linear):
            yield last
