"""The MLP that makes a score of an embedding: the improved aesthetic predictor's, which ImageReward took over."""

from torch import Tensor, nn


class ScoreHead(nn.Module):
    """Embeddings [B, D] -> scores [B] by five linear layers without activations between them.

    Its names are the official checkpoints': layers.0, 2, 4, 6 and 7, for dropout stood at 1, 3 and 5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        return self.layers(embeddings_BD).squeeze(-1)
