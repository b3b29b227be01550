"""What is compared: two recipes, without a search and with each that may pay while a policy is trained."""

NFT = ("algorithm=nft", "algorithm/noise=gaussian")
# a window of three stochastic steps, the start noise plain
WINDOWED = ("algorithm=smart_grpo", "algorithm/noise=gaussian", "train.learning_rate=1e-3")
METHODS: dict[str, tuple[str, ...]] = {
    "nft": NFT,
    # a group without success is made again in full, up to three times
    "nft, retries": (*NFT, "algorithm/noise=retries"),
    # the same once, each sample from the best of 8 noises by an estimate
    "nft, retries by estimates": (
        *NFT,
        "algorithm/noise=retries",
        "algorithm.noise.tries=1",
        "algorithm.noise.candidates=8",
    ),
    # every group is made twice in full
    "nft, best and worst": (*NFT, "algorithm/noise=best_and_worst"),
    # every sample of every group starts from the best of 4 noises by an estimate
    "nft, estimates": (*NFT, "algorithm/noise=best_of_k", "algorithm.noise.candidates=4"),
    "windowed GRPO": WINDOWED,
    "windowed GRPO, retries": (*WINDOWED, "algorithm/noise=retries"),
    "windowed GRPO, estimates": (*WINDOWED, "algorithm/noise=best_of_k", "algorithm.noise.candidates=4"),
}
