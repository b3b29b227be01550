"""LAION's improved aesthetic predictor: how much people would like an image, about 1 to 10, whatever the prompt.

    score = MLP(image / |image|),  image the embedding of CLIP ViT-L/14

The MLP is github.com/christophschuhmann/improved-aesthetic-predictor's sac+logos+ava1-l14-linearMSE.pth; on the hub,
TRL's trl-lib/ddpo-aesthetic-predictor publishes one of this form as aesthetic-model.pth.
Letters: B images, D the width of an embedding.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from fastgrpo.rewards.networks.checkpoints import (
    checkpoint_directory,
    load_directory,
    load_state,
    load_tensors,
    read_for,
)
from fastgrpo.rewards.networks.clip import ClipImageTower, random_image_tower, vit_l_14
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward, RewardNetwork
from fastgrpo.rewards.networks.preprocess import Preprocess
from fastgrpo.rewards.networks.score_head import ScoreHead

_OPTION = "reward.terms.aesthetic"


def aesthetic(*, path: str, head: str, head_file: str, backend: Backend) -> NetworkReward:
    """The CLIP at ``path`` and the MLP in the file ``head_file`` at ``head``; both are directories or hub ids."""
    directory = checkpoint_directory(
        path, ["preprocessor_config.json", "config.json", "model.safetensors"], option=f"{_OPTION}.path"
    )
    file = checkpoint_directory(head, [head_file], option=f"{_OPTION}.head") / head_file
    with read_for(f"{_OPTION}.path", path):
        model = load_directory(CLIPModel, directory)
        preprocess = Preprocess.from_file(directory / "preprocessor_config.json")
    with read_for(f"{_OPTION}.head", head):
        score_head = ScoreHead(model.config.projection_dim)
        load_state(score_head, load_tensors(file), file)
    return NetworkReward(
        network=AestheticNetwork(ClipImageTower(model), score_head), preprocess=preprocess, backend=backend
    )


class AestheticNetwork(RewardNetwork):
    """Pixels [B, C, H, W] -> scores [B]."""

    def __init__(self, trunk: nn.Module, head: ScoreHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.head(F.normalize(self.trunk(pixels_BCHW).float(), dim=-1))


def full_size() -> AestheticNetwork:
    """The network in the official size, of random weights."""
    config = vit_l_14()
    return AestheticNetwork(random_image_tower(config), ScoreHead(config.projection_dim))
